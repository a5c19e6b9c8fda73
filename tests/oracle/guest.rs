//! The guest of the oracle: where things are in its memory, and its CPU at the start.

use crate::ring0_code::{Places, sel};
use monitor::cpum::{CpuState, SegAttr, Segment, TableRegister, cr0, eflags, seg};

/// Bytes of guest RAM.
pub const RAM: u64 = 1 << 18;
const PAGE_DIRECTORY: u32 = 0x1000;
const PAGE_TABLE: u32 = 0x2000;
/// GuestPhys of the GDT.
pub const GDT: u32 = 0x3000;
const IDT: u32 = 0x4000;
/// GuestPhys of the code pages.
pub const CODE: u32 = 0x1_0000;
/// Their length in bytes.
pub const CODE_LEN: u32 = 0x4000;
/// GuestPhys of data that may be written.
pub const DATA: u32 = 0x2_0000;
const GUARDED: u32 = 0x2_2000;
/// GuestPhys of where the stack begins, about.
pub const STACK: u32 = 0x2_5000;
/// GuestPhys of an indirect `jmp`, and of where it goes.
pub const BRANCH: u32 = 0x3_0000;
/// See [`BRANCH`].
pub const BRANCH_TARGET: u32 = 0x3_1000;
/// Compared, in bytes from 0: everything but the page tables, whose A and D bits raw mode may set early, and [`BRANCH`].
pub const COMPARED: std::ops::Range<usize> = 0x3000..0x2_8000;
/// The instruction at [`BRANCH`]: `jmp [target]` through SS, which raw mode has flat.
#[must_use]
pub fn spring(base: u32) -> [u8; 7] {
    let [a, b, c, d] = (base + BRANCH_TARGET).to_le_bytes();
    [0x36, 0xff, 0x25, a, b, c, d]
}

/// Whether one of the bytes from linear address `at` on is the page tables', which are mapped at every base.
#[must_use]
pub fn in_page_tables(at: u32, len: u32) -> bool {
    // Bases are multiples of 4 MiB.
    let physical = at & 0x3f_ffff;
    physical < PAGE_TABLE + 0x1000 && physical + len > PAGE_DIRECTORY
}

/// Linear minus physical addresses.
pub const BASES: [u32; 5] = [0xc100_0000, 0xc000_0000, 0xf800_0000, 0x0040_0000, 0x0840_0000];

/// A segment descriptor: access byte, and the nibble G, D/B, L, AVL (SDM Vol. 3A, 3.4.5).
#[must_use]
pub fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> [u8; 8] {
    let low = base << 16 | limit & 0xffff;
    let high = base & 0xff00_0000
        | base >> 16 & 0xff
        | u32::from(access) << 8
        | limit & 0xf_0000
        | u32::from(flags) << 20;
    (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
}

/// A guest without code.
pub struct Plain {
    /// RAM.
    pub memory: Vec<u8>,
    /// Linear addresses.
    pub places: Places,
    /// Linear minus physical, by which the guest works.
    pub base: u32,
    /// CR0.PG.
    pub paging: bool,
}

impl Plain {
    /// Page tables, descriptor tables and handlers. `bases`: of the guest and of the alias of all its frames; None: no
    /// paging.
    #[must_use]
    pub fn new(bases: Option<(u32, u32)>) -> Plain {
        let mut memory = vec![0u8; RAM as usize];
        let (base, alias) = bases.unwrap_or((0, 0));
        let places =
            Places { code: base + CODE, alias: alias + CODE, data: base + DATA, guarded: base + GUARDED };
        let mut put =
            |at: u32, bytes: &[u8]| memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        for b in [base, alias] {
            put(PAGE_DIRECTORY + (b >> 22) * 4, &(PAGE_TABLE | 3).to_le_bytes());
        }
        for n in 0..(RAM >> 12) as u32 {
            let bits = match n << 12 {
                GUARDED => 1,
                at if at == GUARDED + 0x1000 => 0,
                _ => 3,
            };
            put(PAGE_TABLE + n * 4, &(n << 12 | bits).to_le_bytes());
        }
        for (selector, d) in [
            (sel::CODE, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
            (sel::DATA, descriptor(0, 0xf_ffff, 0x93, 0xc)),
            (sel::SMALL, descriptor(base + DATA, 0xfff, 0x93, 4)),
            (sel::USER, descriptor(0, 0xf_ffff, 0xf3, 0xc)),
            (sel::CONFORMING, descriptor(0, 0xf_ffff, 0x9f, 0xc)),
            (sel::ABSENT, descriptor(0, 0xf_ffff, 0x13, 0xc)),
            (sel::READ_ONLY, descriptor(0, 0xf_ffff, 0x91, 0xc)),
            (sel::CODE_TOO, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
        ] {
            put(GDT + u32::from(selector & !7), &d);
        }
        // One byte long, so that following the code beyond its end never gets out of step with what is there.
        put(CODE, &[0x90; CODE_LEN as usize]);
        // int 80h, int 2eh and int3 have handlers that return, in the last bytes of the code.
        for (vector, kind) in [(0x80u32, 0x8e00u32), (0x2e, 0x8f00), (3, 0x8f00)] {
            let handler = places.code + CODE_LEN - 16;
            put(IDT + vector * 8, &(u32::from(sel::CODE) << 16 | handler & 0xffff).to_le_bytes());
            put(IDT + vector * 8 + 4, &(handler & 0xffff_0000 | kind).to_le_bytes());
        }
        put(CODE + CODE_LEN - 16, &[0x1e, 0x9c, 0x58, 0xfb, 0xfa, 0x1f, 0xcf]);
        put(BRANCH, &spring(base));
        Plain { memory, places, base, paging: bases.is_some() }
    }

    /// Puts bytes to a physical address.
    pub fn put(&mut self, at: u32, bytes: &[u8]) {
        self.memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// A CPU in ring 0 with these tables and flat segments, with DPL 3 in DS and ES if `user_data`.
    #[must_use]
    pub fn cpu(&self, write_protect: bool, user_data: bool) -> CpuState {
        let mut cpu = CpuState::reset();
        cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
        if self.paging {
            cpu.cr0 |= cr0::PG;
        }
        if write_protect {
            cpu.cr0 |= cr0::WP;
        }
        cpu.cr3 = PAGE_DIRECTORY;
        cpu.gdtr = TableRegister { base: self.base + GDT, limit: 0x7f };
        cpu.idtr = TableRegister { base: self.base + IDT, limit: 0x7ff };
        let data = |selector, bits| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            attr: SegAttr::from_bits_truncate(bits),
        };
        cpu.seg = [data(sel::DATA, 0xc93); 6];
        cpu.seg[seg::CS] = data(sel::CODE, 0xc9b);
        if user_data {
            cpu.seg[seg::DS] = data(sel::USER, 0xcf3);
            cpu.seg[seg::ES] = data(sel::USER, 0xcf3);
        }
        cpu.seg[seg::FS] = Segment {
            selector: sel::SMALL,
            base: self.base + DATA,
            limit: 0xfff,
            attr: SegAttr::from_bits_truncate(0x493),
        };
        cpu.eflags = eflags::FIXED;
        cpu
    }
}
