//! Task switches: far transfers to a TSS or a task gate, task gates in the IDT, `iret` with NT; 16 and 32 bits.

use super::super::case::Case;
use super::super::setup::{self, DATA, LDT, NEW16, NEW32, PAGE_DIRECTORY, TSS16, TSS32, gate, segment, sel};
use super::{likely, ring, selector};
use monitor::cpum::{CpuState, eflags};
use subring_tests::ring0_code::Random;

/// A transfer to this selector is a task switch, or tries to be one.
pub(super) fn leads_to_a_task(selector: u16) -> bool {
    let index = selector & !7;
    let any = index >= sel::ANY && matches!(((index - sel::ANY) / 8) & 0x1f, 1 | 5 | 9);
    any || (sel::TSS32..=sel::NEW16).contains(&index)
}

/// A switch, and how: `jmp`, `call`, a gate in the GDT or IDT, `iret`.
fn switch(r: &mut Random, mut cpu: CpuState, wide: bool) -> Case {
    let (new, tss) = if wide { (sel::NEW32, NEW32) } else { (sel::NEW16, NEW16) };
    let target = if r.one_in(8) { selector(r) } else { new };
    let dpl = if r.one_in(6) { r.below(4) as u8 } else { 3 };
    let access = if r.one_in(10) { 5 } else { 0x85 } | dpl << 5;
    let busy = if wide { 0x8b } else { 0x83 };
    let (kind, rpl) = (r.below(6), r.below(4) as u16);
    let far = |opcode: u8, selector: u16| {
        let [low, high] = selector.to_le_bytes();
        [opcode, 0, 0, 2, 0, low, high]
    };
    let note = format!("to {target:04x}");
    match kind {
        0 => Case::new("jmp task", cpu, &far(0xea, target | rpl)).note(note),
        1 => Case::new("call task", cpu, &far(0x9a, target | rpl)).note(note),
        2 => Case::new("jmp task gate", cpu, &far(0xea, sel::FREE | rpl))
            .descriptor(sel::FREE, gate(access, target, 0, 0))
            .note(note + &format!(" gate {access:02x}")),
        3 => Case::new("call task gate", cpu, &far(0x9a, sel::FREE | rpl))
            .descriptor(sel::FREE, gate(access, target, 0, 0))
            .note(note + &format!(" gate {access:02x}")),
        4 => {
            let (name, vector, code): (_, u8, &[u8]) = r.pick(&[
                ("int n task", 0x80, &[0xcd, 0x80][..]),
                ("ud2 task", 6, &[0x0f, 0x0b]),
                ("page fault task", 14, &[0x8b, 0x03]),
                ("interrupt task", 0x20, &[0x90]),
            ]);
            if name == "interrupt task" {
                cpu.eflags |= eflags::IF;
            }
            let mut case = Case::new(name, cpu, code).gate(vector, gate(access, target, 0, 0)).note(note);
            if name == "page fault task" {
                case = case.page(DATA, 0);
            }
            case.interrupt = (name == "interrupt task").then_some(vector);
            case
        }
        _ => {
            cpu.eflags |= eflags::NT;
            let link = if r.one_in(8) { target } else { new };
            let current = if cpu.tr.base == TSS16 { TSS16 } else { TSS32 };
            let descriptor = segment(tss, if wide { 0x67 } else { 0x2b }, busy, 0);
            Case::new("iret task", cpu, &[0xcf])
                .descriptor(new, descriptor)
                .put(current, &link.to_le_bytes())
                .note(format!("link {link:04x}"))
        }
    }
}

/// Something is wrong with the new task, or special about it.
fn meddle(r: &mut Random, case: Case, wide: bool) -> Case {
    let tss = if wide { NEW32 } else { NEW16 };
    let slot = |n: u32| if wide { tss + 0x48 + n * 4 } else { tss + 0x22 + n * 2 };
    let new = if wide { sel::NEW32 } else { sel::NEW16 };
    let access = if wide { 0x89 } else { 0x81 };
    let ring = ring(r);
    match r.below(9) {
        0 => {
            let s = selector(r);
            let note = case.note.clone() + &format!(", ds {s:04x}");
            case.put(slot(3), &s.to_le_bytes()).note(note)
        }
        1 | 2 => {
            let (cs, ss) = (likely(r, true, ring), likely(r, false, ring));
            let note = case.note.clone() + &format!(", cs {cs:04x} ss {ss:04x}");
            case.put(slot(1), &cs.to_le_bytes()).put(slot(2), &ss.to_le_bytes()).note(note)
        }
        3 => {
            let s = selector(r);
            let note = case.note.clone() + &format!(", ldt {s:04x}");
            case.put(tss + if wide { 0x60 } else { 0x2a }, &s.to_le_bytes()).note(note)
        }
        4 => {
            let limit = r.pick(&[0x2a, 0x2b, 0x2c, 0x66, 0x67, 0x68, 0x10]);
            let note = case.note.clone() + &format!(", limit {limit:x}");
            let busy = if case.group == "iret task" { 2 } else { 0 };
            case.descriptor(new, segment(tss, limit, access | busy, 0)).note(note)
        }
        5 => {
            // Not present, of some DPL, busy or not.
            let access = access & 0x0f | (r.below(16) as u8) << 4 & 0xe0 | (r.below(2) as u8 * 2);
            let note = case.note.clone() + &format!(", access {access:02x}");
            case.descriptor(new, segment(tss, 0x67, access, 0)).note(note)
        }
        6 if wide => {
            let flags = (r.bits() as u32 & !(eflags::TF | eflags::VM)) | 2;
            let note = case.note.clone() + &format!(", flags {flags:x}");
            case.put(tss + 0x24, &flags.to_le_bytes()).note(note)
        }
        7 if wide => {
            let flags = eflags::VM | r.bits() as u32 & (eflags::IOPL | eflags::IF);
            let note = case.note.clone() + &format!(", v86 flags {flags:x}");
            case.put(tss + 0x24, &flags.to_le_bytes())
                .put(tss + 0x20, &0xc000u32.to_le_bytes())
                .put(tss + 0x4c, &0u16.to_le_bytes())
                .note(note)
        }
        8 => {
            let page = r.pick(&[TSS32, LDT]);
            let bits = r.pick(&[0, 1, 3]);
            let note = case.note.clone() + &format!(", page {page:x} {bits}");
            if case.cpu.paging() { case.page(page, bits).note(note) } else { case }
        }
        _ => case,
    }
}

pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    for _ in 0..3000 * more {
        let mut cpu = match r.below(8) {
            0 => setup::v86(r.one_in(2)),
            _ => setup::cpu(ring(r), r.one_in(2)),
        };
        super::flags(r, &mut cpu);
        if r.one_in(4) {
            setup::in_task16(&mut cpu);
        }
        let wide = !r.one_in(3);
        let mut case = switch(r, cpu, wide);
        if r.one_in(3) {
            case = meddle(r, case, wide);
        }
        // TSS32 in the back link of what is nested, and the tables of the new task.
        out.push(case.put(NEW32 + 0x1c, &PAGE_DIRECTORY.to_le_bytes()));
    }
    out
}
