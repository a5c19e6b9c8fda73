//! The cases, by what they are about.

mod events;
mod inspect;
mod irets;
pub(crate) mod pages;
mod ports_and_flags;
mod segments;
mod system;
mod tasks;
mod transfers;

use super::case::Case;
use super::setup::{self, sel};
use monitor::cpum::{CpuState, eflags};
use subring_tests::ring0_code::Random;

/// A part of the cases, and its name.
pub(crate) struct Group {
    pub(crate) name: &'static str,
    pub(crate) cases: fn(&mut Random, u64) -> Vec<Case>,
}

/// All of them.
pub(crate) const GROUPS: &[Group] = &[
    Group { name: "segments", cases: segments::cases },
    Group { name: "inspect", cases: inspect::cases },
    Group { name: "transfers", cases: transfers::cases },
    Group { name: "irets", cases: irets::cases },
    Group { name: "events", cases: events::cases },
    Group { name: "tasks", cases: tasks::cases },
    Group { name: "system", cases: system::cases },
    Group { name: "pages", cases: pages::cases },
    Group { name: "ports and flags", cases: ports_and_flags::cases },
];

/// A ring, mostly 0 or 3.
fn ring(r: &mut Random) -> u8 {
    r.pick(&[0, 0, 0, 3, 3, 3, 1, 2])
}

/// A CPU of protected mode: some ring, 32 bits mostly; paging or not; flags nobody has asked for.
fn protected(r: &mut Random) -> CpuState {
    let paging = r.one_in(2);
    let mut cpu = match r.below(8) {
        0 => setup::cpu16(r.pick(&[0, 3]), paging),
        _ => setup::cpu(ring(r), paging),
    };
    flags(r, &mut cpu);
    cpu
}

/// Any mode.
fn any_mode(r: &mut Random) -> CpuState {
    let mut cpu = match r.below(8) {
        0 => setup::v86(r.one_in(2)),
        1 => setup::real(),
        _ => return protected(r),
    };
    flags(r, &mut cpu);
    cpu
}

/// Arithmetic flags, IF, DF, IOPL, AC, ID as they come; TF, NT, VIF and VIP have cases of their own.
fn flags(r: &mut Random, cpu: &mut CpuState) {
    let may = eflags::ARITH | eflags::IF | eflags::DF | eflags::IOPL | eflags::ID;
    cpu.eflags = cpu.eflags & !may | r.bits() as u32 & may;
}

/// A selector: of the 256 descriptors, the standard ones, the LDT's, a null one, one beyond the table; any RPL.
fn selector(r: &mut Random) -> u16 {
    let rpl = r.below(4) as u16;
    let selector = match r.below(16) {
        0 => 0,
        1 => 0xf000 | (r.below(16) as u16 * 8),
        2 | 3 => 4 | (r.below(40) as u16 * 8),
        4 | 5 => r.below(18) as u16 * 8,
        // Present more often than not.
        _ => sel::any((r.bits() as u8) | if r.one_in(4) { 0 } else { 0x80 }),
    };
    selector | rpl
}

/// A selector that has a fair chance to be right for a segment of this kind (0 data, 1 code) in this ring.
fn likely(r: &mut Random, code: bool, ring: u8) -> u16 {
    if r.one_in(3) {
        return selector(r);
    }
    let rpl = if r.one_in(6) { r.below(4) as u16 } else { ring.into() };
    let dpl = if r.one_in(6) { r.below(4) as u8 } else { ring };
    let access = 0x90 | dpl << 5 | if code { 8 } else { 0 } | r.below(8) as u8;
    let access = if r.one_in(3) { access } else { access & !4 | 2 };
    rpl | if r.one_in(2) {
        sel::any(access)
    } else if code {
        sel::code(dpl)
    } else {
        sel::data(dpl)
    }
}
