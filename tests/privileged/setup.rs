//! The machine every case starts from: what lies where in its 48 KiB of RAM, and its CPU at each privilege.
//!
//! Behind RAM is nothing: an instruction that ends where RAM ends, and every handler and target of a transfer, go on in
//! addresses that no virtual machine can execute ([`super::case`]).

use monitor::cpum::{CpuState, SegAttr, Segment, TableRegister, cr0, eflags, gpr, seg};
pub(crate) use subring_tests::oracle::guest::descriptor as segment;

/// Bytes of RAM.
pub(crate) const RAM: u32 = 0xc000;
/// GuestPhys (and GuestLin: paging is the identity) of things in RAM.
pub(crate) const GDT: u32 = 0x1000;
pub(crate) const IDT: u32 = 0x2000;
pub(crate) const LDT: u32 = 0x2800;
pub(crate) const TSS32: u32 = 0x3000;
pub(crate) const NEW32: u32 = 0x3200;
pub(crate) const TSS16: u32 = 0x3400;
pub(crate) const NEW16: u32 = 0x3500;
/// One page for each ring's stack.
pub(crate) const STACKS: u32 = 0x4000;
/// Operands.
pub(crate) const DATA: u32 = 0x8000;
pub(crate) const PAGE_TABLE: u32 = 0x9000;
pub(crate) const PAGE_DIRECTORY: u32 = 0xa000;
/// Limits of the current TSSs: the 32-bit one has an I/O bitmap for 256 ports behind its 104 bytes.
pub(crate) const TSS32_LIMIT: u32 = 0x68 + 33 - 1;
pub(crate) const IO_MAP: u32 = 0x68;
pub(crate) const NEW32_LIMIT: u32 = 0x67;
pub(crate) const TSS16_LIMIT: u32 = 0x2b;

/// Where the handler of a vector begins that a 32-bit gate names: beyond RAM.
#[must_use]
pub(crate) const fn handler(vector: u32) -> u32 {
    0x1_0000 + vector * 16
}
/// Other targets of transfers.
pub(crate) const TARGET: u32 = 0x2_0000;
pub(crate) const TARGET16: u32 = 0xe000;
pub(crate) const TASK_EIP: u32 = 0x2_8000;
pub(crate) const TASK_IP: u32 = 0xf000;

/// Selectors in the GDT, with RPL 0.
pub(crate) mod sel {
    /// Flat 32-bit code and data of a ring.
    #[must_use]
    pub(crate) const fn code(ring: u8) -> u16 {
        8 + 16 * ring as u16
    }
    #[must_use]
    pub(crate) const fn data(ring: u8) -> u16 {
        16 + 16 * ring as u16
    }
    pub(crate) const CODE16: u16 = 0x48;
    pub(crate) const DATA16: u16 = 0x50;
    pub(crate) const CODE16_RING3: u16 = 0x58;
    pub(crate) const DATA16_RING3: u16 = 0x60;
    pub(crate) const TSS32: u16 = 0x68;
    pub(crate) const NEW32: u16 = 0x70;
    pub(crate) const TSS16: u16 = 0x78;
    pub(crate) const NEW16: u16 = 0x80;
    pub(crate) const LDT: u16 = 0x88;
    /// Empty descriptors for a case's own.
    pub(crate) const FREE: u16 = 0x100;
    /// 256 descriptors: [`any`].
    pub(crate) const ANY: u16 = 0x800;

    /// The descriptor with this access byte, of all there are.
    #[must_use]
    pub(crate) const fn any(access: u8) -> u16 {
        ANY + (access as u16) * 8
    }
}

/// A gate.
#[must_use]
pub(crate) fn gate(access: u8, selector: u16, offset: u32, parameters: u8) -> [u8; 8] {
    let low = u32::from(selector) << 16 | offset & 0xffff;
    let high = offset & 0xffff_0000 | u32::from(access) << 8 | u32::from(parameters & 31);
    (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
}

/// A descriptor of the kind its access byte says, with sensible contents.
#[must_use]
pub(crate) fn of_access(access: u8) -> [u8; 8] {
    match (access & 0x10 != 0, access & 15) {
        // Expand-down: all but the first 256 bytes.
        (true, 4..=7) => segment(0, 0xff, access, 0x4),
        (true, 0..=7) => segment(0x40, 0xf_ffff, access, 0xd),
        (true, _) => segment(0, 0xf_ffff, access, 0xc),
        (false, 1 | 3) => segment(NEW16, TSS16_LIMIT, access, 0),
        (false, 9 | 0xb) => segment(NEW32, NEW32_LIMIT, access, 0),
        (false, 2) => segment(LDT, 0xff, access, 0),
        (false, 4) => gate(access, sel::code(0), TARGET16, 2),
        (false, 5) => gate(access, sel::NEW32, 0, 0),
        (false, 6 | 7) => gate(access, sel::code(0), TARGET16, 0),
        (false, 0xc) => gate(access, sel::code(0), TARGET, 3),
        (false, _) => gate(access, sel::code(0), TARGET, 0),
    }
}

fn put(memory: &mut [u8], at: u32, bytes: &[u8]) {
    memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
}

/// Top of a ring's stack at the start of a case, and in the TSSs (for rings 0 to 2).
#[must_use]
pub(crate) const fn stack(ring: u8) -> u32 {
    STACKS + ring as u32 * 0x1000 + 0x800
}
#[must_use]
pub(crate) const fn inner_stack(ring: u8) -> u32 {
    STACKS + ring as u32 * 0x1000 + 0xc00
}

fn tasks(memory: &mut [u8]) {
    for (at, limit) in [(TSS32, TSS32_LIMIT), (NEW32, NEW32_LIMIT)] {
        for ring in 0..3u8 {
            put(memory, at + 4 + u32::from(ring) * 8, &inner_stack(ring).to_le_bytes());
            put(memory, at + 8 + u32::from(ring) * 8, &(sel::data(ring) | u16::from(ring)).to_le_bytes());
        }
        // The map of the current one begins behind it; the new one has none.
        put(memory, at + 0x66, &(limit.min(IO_MAP) as u16).to_le_bytes());
    }
    put(memory, NEW32 + 0x66, &0xffffu16.to_le_bytes());
    put(memory, NEW32 + 0x1c, &PAGE_DIRECTORY.to_le_bytes());
    put(memory, NEW32 + 0x20, &TASK_EIP.to_le_bytes());
    put(memory, NEW32 + 0x24, &0x0000_0882u32.to_le_bytes());
    for n in 0..8u32 {
        put(memory, NEW32 + 0x28 + n * 4, &(0x1111_1111 * (n + 1)).to_le_bytes());
        put(memory, NEW16 + 0x12 + n * 2, &(0x1111 * (n as u16 + 1)).to_le_bytes());
    }
    let esp = stack(0) - 0x400;
    put(memory, NEW32 + 0x28 + 4 * 4, &esp.to_le_bytes());
    put(memory, NEW16 + 0x12 + 4 * 2, &(esp as u16).to_le_bytes());
    let selectors = [sel::data(3) | 3, sel::code(0), sel::data(0), sel::data(3) | 3];
    for (n, selector) in (0u32..).zip(selectors.into_iter().chain([0, sel::data(0)])) {
        put(memory, NEW32 + 0x48 + n * 4, &selector.to_le_bytes());
    }
    for (n, selector) in (0u32..).zip(selectors) {
        put(memory, NEW16 + 0x22 + n * 2, &selector.to_le_bytes());
    }
    put(memory, NEW32 + 0x60, &sel::LDT.to_le_bytes());
    put(memory, NEW16 + 0x2a, &sel::LDT.to_le_bytes());
    for ring in 0..3u8 {
        for at in [TSS16, NEW16] {
            put(memory, at + 2 + u32::from(ring) * 4, &(inner_stack(ring) as u16).to_le_bytes());
            put(memory, at + 4 + u32::from(ring) * 4, &(sel::data(ring) | u16::from(ring)).to_le_bytes());
        }
    }
    put(memory, NEW16 + 0x0e, &(TASK_IP as u16).to_le_bytes());
    put(memory, NEW16 + 0x10, &0x0882u16.to_le_bytes());
    // Back links, for `iret` with NT. The descriptors of the new ones are not busy in the beginning.
    put(memory, TSS32, &sel::NEW32.to_le_bytes());
    put(memory, TSS16, &sel::NEW16.to_le_bytes());
}

/// RAM before a case changes it. Accessed bits are set in what every case uses, and as it comes in the 256.
#[must_use]
pub(crate) fn memory() -> Vec<u8> {
    let mut memory = vec![0u8; RAM as usize];
    let m = &mut memory[..];
    for vector in 0..256u32 {
        put(m, vector * 4, &[(vector * 16) as u8, (vector >> 4) as u8, (RAM >> 4) as u8, (RAM >> 12) as u8]);
        let access = if vector < 32 { 0x8e } else { 0xee };
        put(m, IDT + vector * 8, &gate(access, sel::code(0), handler(vector), 0));
    }
    for ring in 0..4u8 {
        let dpl = ring << 5;
        put(m, GDT + u32::from(sel::code(ring)), &segment(0, 0xf_ffff, 0x9b | dpl, 0xc));
        put(m, GDT + u32::from(sel::data(ring)), &segment(0, 0xf_ffff, 0x93 | dpl, 0xc));
    }
    for (selector, descriptor) in [
        (sel::CODE16, segment(0, 0xffff, 0x9b, 0)),
        (sel::DATA16, segment(0, 0xffff, 0x93, 0)),
        (sel::CODE16_RING3, segment(0, 0xffff, 0xfb, 0)),
        (sel::DATA16_RING3, segment(0, 0xffff, 0xf3, 0)),
        (sel::TSS32, segment(TSS32, TSS32_LIMIT, 0x8b, 0)),
        (sel::NEW32, segment(NEW32, NEW32_LIMIT, 0x89, 0)),
        (sel::TSS16, segment(TSS16, TSS16_LIMIT, 0x83, 0)),
        (sel::NEW16, segment(NEW16, TSS16_LIMIT, 0x81, 0)),
        (sel::LDT, segment(LDT, 0xff, 0x82, 0)),
    ] {
        put(m, GDT + u32::from(selector), &descriptor);
    }
    for access in 0..=255u8 {
        put(m, GDT + u32::from(sel::any(access)), &of_access(access));
    }
    // A code and a data segment of each ring in the LDT, and of all DPLs one that is absent.
    for ring in 0..4u8 {
        let dpl = ring << 5;
        for (n, access) in (0u32..).zip([0x9a, 0x92, 0x1a, 0x12]) {
            put(m, LDT + u32::from(ring) * 32 + n * 8, &segment(0, 0xf_ffff, access | dpl, 0xc));
        }
    }
    tasks(m);
    // Identity for 4 MiB, all of it for users, and accessed and dirty: what is tested is not the walk.
    put(m, PAGE_DIRECTORY, &(PAGE_TABLE | 0x67).to_le_bytes());
    for page in 0..1024u32 {
        put(m, PAGE_TABLE + page * 4, &(page << 12 | 0x67).to_le_bytes());
    }
    for at in (DATA..DATA + 0x1000).chain(STACKS..STACKS + 0x4000).step_by(4) {
        put(m, at, &(at.wrapping_mul(0x9e37_79b9) & 0x7f7f_7f7f).to_le_bytes());
    }
    memory
}

fn loaded(selector: u16, base: u32, limit: u32, attr: u16) -> Segment {
    Segment { selector, base, limit, attr: SegAttr::from_bits_truncate(attr) }
}

/// A CPU in 32-bit protected mode in a ring. EIP is to be set by the code of the case.
#[must_use]
pub(crate) fn cpu(ring: u8, paging: bool) -> CpuState {
    let mut cpu = CpuState::reset();
    let dpl = u16::from(ring) << 5;
    let rpl = u16::from(ring);
    cpu.seg = [loaded(sel::data(3) | 3, 0, u32::MAX, 0xcf3); 6];
    cpu.seg[seg::CS] = loaded(sel::code(ring) | rpl, 0, u32::MAX, 0xc9b | dpl);
    cpu.seg[seg::SS] = loaded(sel::data(ring) | rpl, 0, u32::MAX, 0xc93 | dpl);
    cpu.cpl = ring;
    common(&mut cpu, paging);
    cpu.gpr[gpr::ESP] = stack(ring);
    cpu
}

/// The same in 16-bit segments, of ring 0 or 3.
#[must_use]
pub(crate) fn cpu16(ring: u8, paging: bool) -> CpuState {
    let mut cpu = cpu(ring, paging);
    let dpl = u16::from(ring) << 5;
    let (cs, ss) =
        if ring == 0 { (sel::CODE16, sel::DATA16) } else { (sel::CODE16_RING3, sel::DATA16_RING3) };
    cpu.seg[seg::CS] = loaded(cs | u16::from(ring), 0, 0xffff, 0x9b | dpl);
    cpu.seg[seg::SS] = loaded(ss | u16::from(ring), 0, 0xffff, 0x93 | dpl);
    cpu
}

/// A CPU in V86 mode, IOPL 3.
#[must_use]
pub(crate) fn v86(paging: bool) -> CpuState {
    let mut cpu = cpu(3, paging);
    cpu.eflags |= eflags::VM | eflags::IOPL;
    cpu.seg = [monitor::selm::v86_segment(0); 6];
    cpu
}

/// A CPU in real mode.
#[must_use]
pub(crate) fn real() -> CpuState {
    let mut cpu = cpu(0, false);
    cpu.cr0 &= !cr0::PE;
    cpu.seg = [Segment::real(0); 6];
    cpu.seg[seg::CS].attr = SegAttr::from_bits_truncate(0x9b);
    cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
    cpu
}

fn common(cpu: &mut CpuState, paging: bool) {
    cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
    if paging {
        cpu.cr0 |= cr0::PG | cr0::WP;
    }
    cpu.cr3 = PAGE_DIRECTORY;
    cpu.gdtr = TableRegister { base: GDT, limit: 0xfff };
    cpu.idtr = TableRegister { base: IDT, limit: 0x7ff };
    cpu.ldtr = loaded(sel::LDT, LDT, 0xff, 0x82);
    cpu.tr = loaded(sel::TSS32, TSS32, TSS32_LIMIT, 0x8b);
    cpu.eflags = eflags::FIXED;
    cpu.gpr = [0x1234_5601, 0x2345_6702, 0x3456_7803, DATA, 0, 0x5678_9a05, DATA + 0x40, DATA + 0x80];
}

/// The 16-bit TSS as the current one.
pub(crate) fn in_task16(cpu: &mut CpuState) {
    cpu.tr = loaded(sel::TSS16, TSS16, TSS16_LIMIT, 0x83);
}
