//! `int n`, exceptions and external interrupts through every kind of gate, and faults on the way.

use super::super::case::Case;
use super::super::setup::{self, DATA, IDT, TARGET16, TSS16, TSS32, gate, handler, sel};
use super::{any_mode, likely, ring, selector};
use monitor::cpum::{CpuState, cr0, eflags, gpr};
use subring_tests::ring0_code::Random;

/// Something that raises, by name, vector, code. Those that need more are in [`raise`].
const RAISE: [(&str, u8, &[u8]); 12] = [
    ("int n", 0x80, &[0xcd, 0x80]),
    ("int n", 0x0d, &[0xcd, 0x0d]),
    ("int n", 0x03, &[0xcd, 0x03]),
    ("int3", 3, &[0xcc]),
    ("into", 4, &[0xce]),
    ("int1", 1, &[0xf1]),
    ("ud2", 6, &[0x0f, 0x0b]),
    ("div", 0, &[0xf6, 0xf4]),
    ("hlt", 13, &[0xf4]),
    ("fpu", 7, &[0xdb, 0xe2]),
    ("page fault", 14, &[0x8b, 0x03]),
    ("interrupt", 0x20, &[0x90]),
];

/// A case that raises something.
fn raise(r: &mut Random, mut cpu: CpuState) -> (Case, u8) {
    let (name, vector, code) = r.pick(&RAISE);
    cpu.gpr[gpr::EAX] = 0;
    match name {
        "into" if !r.one_in(8) => cpu.eflags |= eflags::OF,
        "fpu" => cpu.cr0 |= cr0::TS,
        "interrupt" => cpu.eflags |= eflags::IF,
        _ => {}
    }
    let mut case = Case::new(name, cpu, code);
    if name == "interrupt" {
        case.interrupt = Some(vector);
    }
    if name == "page fault" {
        if !case.cpu.seg[1].big() {
            case = Case::new(name, case.cpu, &[0x8b, 0x07]);
        }
        let bits = r.pick(&[0, 3, 2]);
        case = case.page(DATA, bits);
    }
    (case, vector)
}

fn tss_stack(case: Case, ring: u8, selector: u16) -> Case {
    let bytes = selector.to_le_bytes();
    case.put(TSS32 + 8 + u32::from(ring) * 8, &bytes).put(TSS16 + 4 + u32::from(ring) * 4, &bytes)
}

/// An entry of the IDT: any access byte; mostly a gate to a code segment of this ring.
fn entry(r: &mut Random, ring: u8, case: Case, vector: u8, notes: &mut Vec<String>) -> Case {
    let mut access = match r.below(8) {
        0 => r.bits() as u8,
        _ => 0x86 | r.pick(&[0, 1, 8, 9]) | (r.below(4) as u8) << 5,
    };
    if access & 0x1f == 5 {
        // Tasks have cases of their own.
        access |= 8;
    }
    let selector = likely(r, true, ring);
    let offset = if access & 8 != 0 { handler(0x55) } else { TARGET16 };
    notes.push(format!("{vector:x}: gate {access:02x} to {selector:04x}"));
    case.gate(vector, gate(access, selector, offset, 0)).target(selector, offset)
}

pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    // `int n` from each ring through every access byte.
    for access in 0..=255u8 {
        if access & 0x1f == 5 {
            continue;
        }
        for ring in [0, 1, 3] {
            let offset = if access & 8 != 0 { handler(0x55) } else { TARGET16 };
            let case = Case::new("int n", setup::cpu(ring, false), &[0xcd, 0x80]);
            out.push(
                case.gate(0x80, gate(access, sel::code(0), offset, 0)).note(format!("gate {access:02x}")),
            );
        }
    }
    for _ in 0..7000 * more {
        let mut cpu = any_mode(r);
        if r.one_in(6) {
            setup::in_task16(&mut cpu);
        }
        let (cpl, inner) = (cpu.cpl, ring(r).min(cpu.cpl));
        let real = !cpu.protected();
        let (mut case, vector) = raise(r, cpu);
        let mut notes = Vec::new();
        if r.one_in(2) && !real {
            case = entry(r, inner, case, vector, &mut notes);
        }
        // The handler of the fault on the way, too.
        if r.one_in(8) && !real {
            let second = r.pick(&[10u8, 11, 12, 13, 14]);
            case = entry(r, inner, case, second, &mut notes);
        }
        if r.one_in(4) {
            let stack = likely(r, false, inner);
            case = tss_stack(case, inner, stack);
            notes.push(format!("stack {stack:04x}"));
        }
        if case.cpu.paging() && r.one_in(4) {
            let page = r.pick(&[setup::stack(inner), setup::stack(cpl), setup::stack(0), IDT]);
            let bits = r.pick(&[0, 1, 3]);
            case = case.page(page, bits);
            notes.push(format!("page {page:x} {bits}"));
        }
        if r.one_in(10) {
            case.cpu.idtr.limit = r.below(0x120) as u16;
            notes.push(format!("idt limit {:x}", case.cpu.idtr.limit));
        }
        if r.one_in(16) {
            case.cpu.eflags |= r.pick(&[eflags::NT, eflags::AC, eflags::RF]);
        }
        out.push(case.note(notes.join(", ")));
    }
    // Double faults: the gate of the first is not there, and then those of others.
    for _ in 0..1500 * more {
        let (mut case, vector) = {
            let cpu = any_mode(r);
            raise(r, cpu)
        };
        if !case.cpu.protected() {
            continue;
        }
        let mut notes = Vec::new();
        let absent = gate(0x0e, sel::code(0), 0, 0);
        let bad = gate(0xee, sel::data(0), 0, 0);
        for v in [vector, 11, 8, 13, 14, 10, 12] {
            if v == vector || r.one_in(4) {
                let (bytes, name) = match r.below(4) {
                    0 => (absent, "absent"),
                    1 => (bad, "to data"),
                    2 => (gate(0xee, 0, handler(1), 0), "null"),
                    _ => {
                        let to = selector(r) & 0x07ff;
                        case = case.target(to, handler(1));
                        (gate(0xee, to, handler(1), 0), "to any")
                    }
                };
                notes.push(format!("{v} {name}"));
                case = case.gate(v, bytes);
            }
        }
        out.push(case.note(notes.join(", ")));
    }
    out
}
