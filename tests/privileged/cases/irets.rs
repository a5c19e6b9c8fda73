//! `iret` to the same ring, to an outer one, to V86 mode, in 16 and 32 bits, from everywhere.

use super::super::case::Case;
use super::super::setup::{self, TARGET, TARGET16};
use super::{any_mode, likely, ring};
use monitor::cpum::{CpuState, eflags, gpr};
use subring_tests::ring0_code::Random;

/// `iret`, with what is on the stack.
fn iret(cpu: CpuState, values: &[u32], other: bool) -> Case {
    let wide = cpu.seg[1].big() != other;
    let code: &[u8] = if other { &[0x66, 0xcf] } else { &[0xcf] };
    let mut at = cpu.gpr[gpr::ESP];
    let mut case = Case::new("iret", cpu, code).note(format!("{values:x?}"));
    for value in values {
        let bytes = value.to_le_bytes();
        case = case.put(at, if wide { &bytes } else { &bytes[..2] });
        at += if wide { 4 } else { 2 };
    }
    case
}

/// Flags on the stack: everything but TF and NT, which have an effect of their own, and VM.
fn flags(r: &mut Random) -> u32 {
    r.bits() as u32 & !(eflags::TF | eflags::NT | eflags::VM)
}

pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    for _ in 0..5000 * more {
        let cpu = any_mode(r);
        let outer = ring(r).max(cpu.cpl);
        let other = r.one_in(3);
        let wide = cpu.seg[1].big() != other;
        let eip = if wide && !r.one_in(4) { TARGET } else { TARGET16 };
        let (cs, ss) = if cpu.real_addressing() {
            (0x0c00 + r.below(16) as u16, 0)
        } else {
            (likely(r, true, outer), likely(r, false, outer))
        };
        let mut popped = flags(r);
        if r.one_in(8) && cpu.cpl == 3 {
            // Outside ring 0 it means nothing.
            popped |= eflags::VM;
        }
        let esp = setup::stack(outer) - 0x100;
        let mut case = iret(cpu, &[eip, cs.into(), popped, esp, ss.into()], other).target(cs, eip);
        if case.cpu.paging() && r.one_in(8) {
            let (page, bits) = (setup::stack(r.pick(&[0, case.cpu.cpl])), r.pick(&[0, 1, 3]));
            let note = format!("{}, page {page:x} {bits}", case.note);
            case = case.page(page, bits).note(note);
        }
        out.push(case);
    }
    for _ in 0..1000 * more {
        // To V86 mode; a ring that may not gets #GP for what the frame says otherwise.
        let mut cpu = setup::cpu(r.pick(&[0, 0, 0, 1, 3]), r.one_in(2));
        super::flags(r, &mut cpu);
        let popped = flags(r) | eflags::VM;
        let segments: [u32; 5] = std::array::from_fn(|_| r.bits() as u32);
        let [ss, es, ds, fs, gs] = segments;
        let eip = if r.one_in(8) { r.bits() as u32 | 0x1_0000 } else { TARGET16 + r.below(256) as u32 };
        let frame = [eip, 0x0c00 + r.below(0x100) as u32, popped, r.bits() as u32, ss, es, ds, fs, gs];
        let mut case = iret(cpu, &frame, r.one_in(16));
        case.beyond_limit = eip > 0xffff;
        out.push(case);
    }
    out
}
