//! What must agree between leader and follower, and what need not:
//!
//! - EFLAGS.RF, and the interrupt shadow: they are about the next instruction only.
//! - The accessed bit of page-table entries. A processor may set it for pages it does not access (SDM Vol. 3A, 4.8), and
//!   worlds do, for the neighbours of a page that is missing. It counts as that only in a frame the follower has read
//!   tables from, and if nothing else of the entry differs; the follower then takes over the leader's bit.
//! - The dirty bit likewise, but of pages only that the next instruction writes to: the leader has begun it, its page was
//!   missing, and it was interrupted before the instruction could be completed.
//! - The FPU's last instruction and its operand (FOP, FIP, FDP), which AMD's processors keep only for exceptions.

use super::COMPARED_FLAGS;
use crate::cpum::{CpuState, FxState};
use crate::interp;
use crate::machine::Machine;
use crate::pgm::walk::entry;
use csam::{GuestLin, GuestPhys};
use iced_x86::{InstructionInfoFactory, OpAccess, Register};
use std::collections::HashSet;
use std::fmt::Write;

/// Bit 5 of a table entry (SDM Vol. 3A, table 4-20).
const ACCESSED: u8 = 0x20;
/// Bit 6.
const DIRTY: u8 = 0x40;
/// Differing pages told of.
const MAX_PAGES: usize = 8;
const CHUNK: usize = 1 << 16;

/// The registers that differ, one a line: the leader's, the follower's.
pub(super) fn registers(leader: &CpuState, follower: &CpuState) -> String {
    let mut text = String::new();
    let mut word = |name: &str, a: u64, b: u64| {
        if a != b {
            let _ = writeln!(text, "  {name:<8} {a:08x} / {b:08x}");
        }
    };
    for (i, name) in ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"].into_iter().enumerate() {
        word(name, leader.gpr[i].into(), follower.gpr[i].into());
    }
    word("eip", leader.eip.into(), follower.eip.into());
    word("eflags", (leader.eflags & COMPARED_FLAGS).into(), (follower.eflags & COMPARED_FLAGS).into());
    word("cpl", leader.cpl.into(), follower.cpl.into());
    word("halted", leader.halted.into(), follower.halted.into());
    for (name, a, b) in [
        ("cr0", leader.cr0, follower.cr0),
        ("cr2", leader.cr2, follower.cr2),
        ("cr3", leader.cr3, follower.cr3),
        ("cr4", leader.cr4, follower.cr4),
    ] {
        word(name, a.into(), b.into());
    }
    for (i, (a, b)) in leader.pdpte.iter().zip(&follower.pdpte).enumerate() {
        word(&format!("pdpte{i}"), *a, *b);
    }
    for (i, (a, b)) in leader.dr.iter().zip(&follower.dr).enumerate() {
        word(&format!("dr{i}"), (*a).into(), (*b).into());
    }
    let named = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];
    let a = leader.seg.iter().chain([&leader.ldtr, &leader.tr]);
    let b = follower.seg.iter().chain([&follower.ldtr, &follower.tr]);
    for (name, (a, b)) in named.into_iter().zip(a.zip(b)) {
        if a != b {
            let _ = writeln!(text, "  {name:<8} {a:x?} / {b:x?}");
        }
    }
    for (name, a, b) in [("gdtr", leader.gdtr, follower.gdtr), ("idtr", leader.idtr, follower.idtr)] {
        if a != b {
            let _ = writeln!(text, "  {name:<8} {a:x?} / {b:x?}");
        }
    }
    if leader.msr != follower.msr {
        let _ = writeln!(text, "  msr      {:x?} / {:x?}", leader.msr, follower.msr);
    }
    text
}

/// Parts of the FXSAVE image that are compared (SDM Vol. 1, table 10-2): name, offset, length.
const FX_PARTS: [(&str, usize, usize); 4] = [("fcw", 0, 2), ("fsw", 2, 2), ("ftw", 4, 1), ("mxcsr", 24, 4)];

/// What differs of the FPU.
pub(super) fn fpu(leader: &FxState, follower: &FxState) -> String {
    let st = (0..8).map(|i| (format!("st{i}"), 32 + 16 * i, 10));
    let xmm = (0..8).map(|i| (format!("xmm{i}"), 160 + 16 * i, 16));
    let parts = FX_PARTS.into_iter().map(|(name, at, len)| (name.to_owned(), at, len));
    let mut text = String::new();
    for (name, at, len) in parts.chain(st).chain(xmm) {
        let (a, b) = (&leader.0[at..at + len], &follower.0[at..at + len]);
        if a != b {
            let _ = writeln!(text, "  {name:<8} {a:02x?} / {b:02x?}");
        }
    }
    text
}

/// Table entries whose bits the leader may have set before the follower.
pub(super) struct Early<'a> {
    /// Frames the follower has read tables from.
    pub tables: &'a HashSet<u32>,
    /// Entries of pages the next instruction writes to: [`about_to_write`].
    pub dirty: Vec<GuestPhys>,
}

/// The page-table entries of the pages the instruction at CS:EIP writes to.
pub(super) fn about_to_write(cpu: &CpuState, m: &mut Machine) -> Vec<GuestPhys> {
    let Ok(instruction) = interp::fetch_decode(cpu, m) else { return Vec::new() };
    let mut entries = Vec::new();
    for used in InstructionInfoFactory::new().info(&instruction).used_memory() {
        let reads = matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
        let at = used.virtual_address(0, |register, _, _| Some(value(cpu, register)));
        let Some(first) = at.filter(|_| !reads) else { continue };
        let last = first.wrapping_add((used.memory_size().size() as u64).saturating_sub(1));
        entries.extend([first, last].into_iter().filter_map(|at| entry(m, cpu, GuestLin(at as u32))));
    }
    entries
}

/// A register as part of an address: a segment's is its base.
fn value(cpu: &CpuState, register: Register) -> u64 {
    let segments = [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];
    if let Some(n) = segments.iter().position(|s| *s == register) {
        return cpu.seg[n].base.into();
    }
    let number = register.full_register32() as usize - Register::EAX as usize;
    let whole = cpu.gpr.get(number).copied().unwrap_or_default();
    if register.size() == 2 { u64::from(whole & 0xffff) } else { whole.into() }
}

/// Where leader and follower differ in RAM.
struct Found<'a> {
    forgiven: &'a Early<'a>,
    early: u64,
    text: String,
    pages: usize,
}

impl Found<'_> {
    /// Two versions of the page at `base` that are not the same.
    fn page(&mut self, base: u64, leader: &[u8], own: &[u8], follower: &mut Machine) {
        match differences(leader, own, base, self.forgiven) {
            Ok(early) => {
                self.early += early.len() as u64;
                for offset in early {
                    follower.write_ram(GuestPhys(base + offset as u64), &leader[offset..=offset]);
                }
            }
            Err(words) => {
                self.pages += 1;
                if self.pages <= MAX_PAGES {
                    let _ = writeln!(self.text, "  page {base:08x}:{words}");
                }
            }
        }
    }

    fn result(mut self) -> Result<u64, String> {
        if self.pages > MAX_PAGES {
            let _ = writeln!(self.text, "  and {} pages more", self.pages - MAX_PAGES);
        }
        if self.text.is_empty() { Ok(self.early) } else { Err(self.text) }
    }
}

/// Compares some frames. Yields how many entries had bits set early, or what differs.
pub(super) fn frames(
    leader: &Machine,
    follower: &mut Machine,
    forgiven: &Early,
    frames: impl Iterator<Item = u32>,
) -> Result<u64, String> {
    let mut found = Found { forgiven, early: 0, text: String::new(), pages: 0 };
    let (mut ours, mut theirs) = ([0u8; 4096], [0u8; 4096]);
    for frame in frames {
        let base = u64::from(frame) << 12;
        leader.read_ram(GuestPhys(base), &mut ours);
        follower.read_ram(GuestPhys(base), &mut theirs);
        if ours != theirs {
            found.page(base, &ours, &theirs, follower);
        }
    }
    found.result()
}

/// Compares all of RAM.
pub(super) fn ram(leader: &Machine, follower: &mut Machine, forgiven: &Early) -> Result<u64, String> {
    let mut found = Found { forgiven, early: 0, text: String::new(), pages: 0 };
    let (mut ours, mut theirs) = (vec![0u8; CHUNK], vec![0u8; CHUNK]);
    for at in (0..leader.ram.size()).step_by(CHUNK) {
        let len = CHUNK.min((leader.ram.size() - at) as usize);
        leader.read_ram(GuestPhys(at), &mut ours[..len]);
        follower.read_ram(GuestPhys(at), &mut theirs[..len]);
        if ours[..len] == theirs[..len] {
            continue;
        }
        for page in (0..len).step_by(4096) {
            let (a, b) = (&ours[page..page + 4096], &theirs[page..page + 4096]);
            if a != b {
                found.page(at + page as u64, a, b, follower);
            }
        }
    }
    found.result()
}

/// Offsets of bytes that differ in forgiven bits only, or the words that differ, for people.
fn differences(leader: &[u8], follower: &[u8], base: u64, forgiven: &Early) -> Result<Vec<usize>, String> {
    let table = forgiven.tables.contains(&((base >> 12) as u32));
    let mut early = Vec::new();
    let mut text = String::new();
    let mut shown = 0;
    for (i, (a, b)) in leader.chunks_exact(4).zip(follower.chunks_exact(4)).enumerate() {
        if a == b {
            continue;
        }
        let dirty = forgiven.dirty.contains(&GuestPhys(base + 4 * i as u64));
        let may = ACCESSED | if dirty { a[0] & DIRTY } else { 0 };
        if table && (a[0] ^ b[0]) & !may == 0 && a[1..] == b[1..] && a[0] & 1 != 0 {
            early.push(4 * i);
            continue;
        }
        shown += 1;
        if shown <= 4 {
            let word = |w: &[u8]| w.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
            let _ = write!(text, " +{:03x} {} / {}", 4 * i, word(a), word(b));
        }
    }
    if shown > 4 {
        let _ = write!(text, " and {} words more", shown - 4);
    }
    if text.is_empty() { Ok(early) } else { Err(text) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpum::gpr;
    use crate::interp::testing::flat_cpu;
    use crate::machine::tests::machine;

    #[test]
    fn every_register_counts() {
        let cpu = CpuState::reset();
        assert_eq!(registers(&cpu, &cpu), "");
        let mut other = cpu.clone();
        (other.gpr[3], other.seg[4].limit, other.dr[7], other.msr.pat) = (1, 7, 0, 0);
        let text = registers(&cpu, &other);
        assert!(["ebx", "fs", "dr7", "msr"].iter().all(|name| text.contains(name)), "{text}");
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn of_the_fpu_all_but_its_last_instruction_counts() {
        let fx = FxState::default();
        let mut other = fx;
        other.0[6..24].fill(0xaa);
        assert_eq!(fpu(&fx, &other), "");
        for (byte, name) in [(0, "fcw"), (32, "st0"), (153, "st7"), (160, "xmm0"), (287, "xmm7")] {
            let mut other = fx;
            other.0[byte] ^= 1;
            assert!(fpu(&fx, &other).contains(name), "{name}");
        }
    }

    /// With tables in this frame and one entry that may be dirty.
    fn compare(a: &Machine, b: &mut Machine, table: u32, dirty: &[u64]) -> Result<u64, String> {
        let dirty = dirty.iter().map(|&at| GuestPhys(at)).collect();
        ram(a, b, &Early { tables: &HashSet::from([table]), dirty })
    }

    #[test]
    fn an_accessed_bit_is_forgiven_in_a_table_only_and_then_taken_over() {
        let (a, mut b) = (machine(1), machine(1));
        assert_eq!(compare(&a, &mut b, 5, &[]), Ok(0));
        let _ = a.ram.write(0x5008, &[0x63, 0x40, 0, 0]);
        let _ = b.ram.write(0x5008, &[0x43, 0x40, 0, 0]);
        let text = compare(&a, &mut b, 4, &[]).unwrap_err();
        assert_eq!(text, "  page 00005000: +008 00004063 / 00004043\n");
        assert_eq!(compare(&a, &mut b, 5, &[]), Ok(1));
        assert_eq!(compare(&a, &mut b, 4, &[]), Ok(0));
        // Not the dirty bit, nor an entry that is not present.
        for (own, other) in [(0x63, 0x23), (0x20, 0)] {
            let _ = a.ram.write(0x5008, &[own]);
            let _ = b.ram.write(0x5008, &[other]);
            assert!(compare(&a, &mut b, 5, &[]).is_err());
        }
    }

    #[test]
    fn a_dirty_bit_is_forgiven_the_leader_for_a_page_about_to_be_written() {
        let (a, mut b) = (machine(1), machine(1));
        let _ = b.ram.write(0x5008, &[0x63]);
        let _ = a.ram.write(0x5008, &[0x23]);
        assert!(compare(&a, &mut b, 5, &[0x5008]).is_err(), "the leader has not set it");
        let _ = b.ram.write(0x5008, &[0x03]);
        let _ = a.ram.write(0x5008, &[0x63]);
        assert!(compare(&a, &mut b, 5, &[0x500c]).is_err(), "another page");
        assert_eq!(compare(&a, &mut b, 5, &[0x5008]), Ok(1));
    }

    #[test]
    fn what_is_about_to_be_written_is_known_by_its_entries() {
        // Linear pages 0 to 3ffh are physical ones, by a table at 5000h.
        let mut m = machine(1);
        let mut cpu = flat_cpu(0, 0x1000, 0x8000);
        m.write_ram(GuestPhys(0x4000), &0x5003u32.to_le_bytes());
        for page in 0..0x100u32 {
            m.write_ram(GuestPhys(u64::from(0x5000 + 4 * page)), &(page << 12 | 3).to_le_bytes());
        }
        (cpu.cr3, cpu.cr0) = (0x4000, cpu.cr0 | crate::cpum::cr0::PG);
        cpu.gpr[gpr::EDI] = 0x1_7ffe;
        let cases: [(&[u8], &[u64]); 6] = [
            (&[0xab], &[0x505c, 0x5060]),                         // stosd
            (&[0x50], &[0x501c, 0x501c]),                         // push eax
            (&[0x8b, 0x07], &[]),                                 // mov eax, [edi]
            (&[0x01, 0x47, 0x02], &[0x5060, 0x5060]),             // add [edi+2], eax
            (&[0x67, 0x88, 0x05], &[0x501c, 0x501c]),             // mov [di], al
            (&[0xc6, 0x05, 0, 0x20, 0, 0, 1], &[0x5008, 0x5008]), // mov byte [2000h], 1
        ];
        for (code, entries) in cases {
            m.write_ram(GuestPhys(0x1000), code);
            let found = about_to_write(&cpu, &mut m);
            assert_eq!(found, entries.iter().map(|&at| GuestPhys(at)).collect::<Vec<_>>(), "{code:x?}");
        }
    }
}
