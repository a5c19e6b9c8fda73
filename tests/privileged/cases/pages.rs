//! Page walks: reads, writes and fetches through entries with every mixture of bits, with and without PAE; which fault, with
//! which error code, and which accessed and dirty bits.

use super::super::case::Case;
use super::super::setup::{self, DATA, PAGE_DIRECTORY, PAGE_TABLE, RAM, STACKS};
use super::ring;
use monitor::cpum::{CpuState, cr0, cr4, efer, gpr};
use subring_tests::ring0_code::Random;

/// Where the tables of PAE are: nobody in such a case is in real mode or ring 2.
pub(crate) const PDPT: u32 = PAGE_DIRECTORY + 0x800;
pub(crate) const PAE_DIRECTORY: u32 = 0;
const PAE_TABLE: u32 = STACKS + 0x2000;
/// Present, writable, a user's; accessed and dirty.
const FINE: u64 = 0x67;

/// Bits of an entry: mostly good ones.
fn bits(r: &mut Random) -> u64 {
    let mut bits = FINE & !0x60;
    for bit in [1, 2, 4] {
        if r.one_in(4) {
            bits ^= bit;
        }
    }
    bits | r.bits() & 0x60
}

/// An instruction that accesses this address; the last field: by fetching from it.
fn access(r: &mut Random, cpu: CpuState, at: u32) -> Case {
    let [a, b, c, d] = at.to_le_bytes();
    let (name, code): (_, &[u8]) = match r.below(4) {
        0 => ("page read", &[0xa1, a, b, c, d]),
        1 => ("page write", &[0xa3, a, b, c, d]),
        2 => ("page update", &[0x01, 0x05, a, b, c, d]),
        _ => ("page fetch", &[0xff, 0xe2]),
    };
    let mut cpu = cpu;
    if name == "page fetch" {
        // To where nothing is, through the same directory entry.
        cpu.gpr[gpr::EDX] = at & !0xffff | (RAM + 0x123);
    }
    Case::new(name, cpu, code).note(format!("at {at:x}"))
}

/// An address in the second large page: at the end of a page in some.
fn somewhere(r: &mut Random, base: u32) -> u32 {
    base + if r.one_in(4) { DATA - 2 } else { DATA + r.below(0x80) as u32 }
}

fn plain(r: &mut Random, mut cpu: CpuState) -> Case {
    cpu.cr4 |= r.bits() as u32 & cr4::PGE;
    let large = r.one_in(3);
    if !large || !r.one_in(8) {
        cpu.cr4 |= cr4::PSE;
    }
    let at = somewhere(r, 1 << 22);
    let case = access(r, cpu, at);
    let note = case.note.clone();
    let mut directory = bits(r) as u32;
    if large {
        // Without PSE it is a table's after all.
        directory |= match case.cpu.cr4 & cr4::PSE {
            0 => 0x80 | PAGE_TABLE,
            _ if r.one_in(8) => 0x80 | 1 << 21,
            _ => 0x80,
        };
    } else {
        directory |= PAGE_TABLE;
    }
    let [below, own, code] = [(); 3].map(|()| bits(r) as u32);
    let entry = |page: u32| PAGE_TABLE + (page >> 12) * 4;
    case.put(PAGE_DIRECTORY + 4, &directory.to_le_bytes())
        .put(entry(DATA - 1), &((DATA - 0x1000) | below).to_le_bytes())
        .put(entry(DATA), &(DATA | own).to_le_bytes())
        .put(entry(RAM), &(RAM | code).to_le_bytes())
        .note(format!("{note} directory {directory:x} entries {below:x} {own:x} {code:x}"))
}

fn pae(r: &mut Random, mut cpu: CpuState) -> Case {
    cpu.cr4 |= cr4::PAE | r.bits() as u32 & cr4::PGE;
    cpu.cr3 = PDPT;
    if r.one_in(2) {
        cpu.msr.efer |= efer::NXE;
    }
    cpu.pdpte = [u64::from(PAE_DIRECTORY) | 1, 0, 0, 0];
    let at = somewhere(r, 1 << 21);
    let case = access(r, cpu, at);
    let note = case.note.clone();
    let large = r.one_in(3);
    let high = |r: &mut Random| match r.below(8) {
        0 => 1 << 63,
        1 => 1 << (52 + r.below(11)),
        _ => 0,
    };
    let mut directory = bits(r) | high(r);
    directory |= if large { 0x80 | if r.one_in(8) { 1 << 13 } else { 0 } } else { PAE_TABLE.into() };
    let mut tables = Vec::new();
    for page in 0..512u64 {
        let mut entry = page << 12 | FINE;
        if [DATA >> 12, (DATA >> 12) - 1, RAM >> 12].contains(&(page as u32)) {
            entry = page << 12 | bits(r) | high(r);
        }
        tables.extend(entry.to_le_bytes());
    }
    // The first large page has a directory entry and the table's sound entries for itself: only the second one's are tested.
    let first = FINE | 0x80;
    let note = format!("{note} pae directory {directory:x}, nxe {}", case.cpu.msr.efer != 0);
    case.put(PDPT, &(u64::from(PAE_DIRECTORY) | 1).to_le_bytes())
        .put(PAE_DIRECTORY, &first.to_le_bytes())
        .put(PAE_DIRECTORY + 8, &directory.to_le_bytes())
        .put(PAE_TABLE, &tables)
        .note(note)
}

pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    for n in 0..2000 * more {
        let ring = match ring(r) {
            2 => 1,
            ring => ring,
        };
        let mut cpu = setup::cpu(ring, true);
        super::flags(r, &mut cpu);
        if r.one_in(2) {
            cpu.cr0 &= !cr0::WP;
        }
        out.push(if n % 3 == 0 { pae(r, cpu) } else { plain(r, cpu) });
    }
    out
}
