//! Far `jmp`, `call` and `ret`: directly, through call gates, to outer rings.

use super::super::case::Case;
use super::super::setup::{self, DATA, GDT, TARGET, TARGET16, TSS16, TSS32, gate, sel};
use super::{any_mode, likely, protected, ring, selector};
use monitor::cpum::{CpuState, eflags, gpr};
use subring_tests::ring0_code::Random;

/// `jmp` or `call` to selector:offset, in the other operand size if `other`.
fn far(name: &'static str, cpu: CpuState, selector: u16, other: bool) -> Case {
    let jmp = name.starts_with("jmp");
    let opcode = if jmp { 0xea } else { 0x9a };
    let mut code = if other { vec![0x66, opcode] } else { vec![opcode] };
    if cpu.seg[1].big() != other {
        code.extend(TARGET.to_le_bytes());
    } else {
        code.extend((TARGET16 as u16).to_le_bytes());
    }
    let eip = if cpu.seg[1].big() != other { TARGET } else { TARGET16 };
    code.extend(selector.to_le_bytes());
    let pointer = code[1 + usize::from(other)..].to_vec();
    if selector & 8 != 0 && cpu.eflags & eflags::PF != 0 {
        // The same through memory: [ebx] or [bx].
        let modrm = if jmp { 0x28 } else { 0x18 } | if cpu.seg[1].big() { 3 } else { 7 };
        code = if other { vec![0x66, 0xff, modrm] } else { vec![0xff, modrm] };
    }
    Case::new(name, cpu, &code).put(DATA, &pointer).note(format!("{selector:04x}")).target(selector, eip)
}

/// `ret` far, with `release` bytes, in the other operand size if `other`; what is on the stack.
fn ret(cpu: CpuState, values: &[u32], release: Option<u16>, other: bool) -> Case {
    let wide = cpu.seg[1].big() != other;
    let mut code = if other { vec![0x66] } else { vec![] };
    match release {
        Some(n) => code.extend([&[0xca][..], &n.to_le_bytes()].concat()),
        None => code.push(0xcb),
    }
    let mut at = cpu.gpr[gpr::ESP];
    let mut case = Case::new("retf", cpu, &code).note(format!("{values:x?}"));
    for (n, value) in values.iter().enumerate() {
        if n == 2 {
            at += u32::from(release.unwrap_or(0));
        }
        let bytes = value.to_le_bytes();
        case = case.put(at, if wide { &bytes } else { &bytes[..2] });
        at += if wide { 4 } else { 2 };
    }
    case
}

/// EIP for a target: beyond RAM in both widths.
fn target(r: &mut Random, wide: bool) -> u32 {
    if wide && !r.one_in(4) { TARGET } else { TARGET16 }
}

/// The stack an inner ring is given by the TSS: `selector` for `ring`.
fn tss_stack(case: Case, ring: u8, selector: u16) -> Case {
    let bytes = selector.to_le_bytes();
    case.put(TSS32 + 8 + u32::from(ring) * 8, &bytes).put(TSS16 + 4 + u32::from(ring) * 4, &bytes)
}

/// Every access byte, RPL and CPL for a direct `jmp` and `call`; call gates and returns at random.
pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    for access in 0..=255u8 {
        // Tasks have cases of their own.
        if matches!(access & 0x1f, 1 | 5 | 9) {
            continue;
        }
        for ring in [0, 1, 3] {
            for rpl in [0, 2, 3] {
                for name in ["jmp far", "call far"] {
                    out.push(far(name, setup::cpu(ring, false), sel::any(access) | rpl, false));
                }
            }
        }
    }
    for _ in 0..1500 * more {
        let cpu = any_mode(r);
        let ring = cpu.cpl;
        let selector = if cpu.real_addressing() { 0x0c00 } else { likely(r, true, ring) };
        if !cpu.real_addressing() && super::tasks::leads_to_a_task(selector) {
            continue;
        }
        out.push(far(r.pick(&["jmp far", "call far"]), cpu, selector, r.one_in(2)));
    }
    for _ in 0..4000 * more {
        let mut cpu = protected(r);
        if r.one_in(6) {
            setup::in_task16(&mut cpu);
        }
        let (cpl, inner) = (cpu.cpl, ring(r).min(cpu.cpl));
        let wide = r.one_in(2);
        let dpl = if r.one_in(8) { r.below(4) as u8 } else { 3 };
        let access = 0x80 | dpl << 5 | if wide { 0xc } else { 4 };
        let selector = likely(r, true, inner);
        let eip = target(r, wide);
        let parameters = if r.one_in(2) { 0 } else { r.below(32) as u8 };
        let (name, to) = (r.pick(&["jmp gate", "call gate", "call gate"]), sel::FREE | u16::from(cpl));
        let mut case = far(name, cpu, to, r.one_in(2))
            .descriptor(to, gate(access, selector, eip, parameters))
            .target(selector, eip);
        case.note = format!("{access:02x} to {selector:04x}:{eip:x}, {parameters}");
        if r.one_in(3) {
            let stack = likely(r, false, inner);
            case = tss_stack(case, inner, stack);
            case.note += &format!(", stack {stack:04x}");
        }
        if case.cpu.paging() && r.one_in(4) {
            let bits = r.pick(&[0, 1, 3]);
            let page = r.pick(&[inner, cpl]);
            case = case.page(setup::stack(page), bits);
            case.note += &format!(", stack page of {page} {bits}");
        }
        out.push(case);
    }
    for _ in 0..4000 * more {
        let cpu = any_mode(r);
        let outer = ring(r).max(cpu.cpl);
        let other = r.one_in(2);
        let eip = target(r, cpu.seg[1].big() != other);
        let (cs, ss) = if cpu.real_addressing() {
            (0x0c00, 0)
        } else {
            (likely(r, true, outer), likely(r, false, outer))
        };
        let values = [eip, cs.into(), setup::stack(outer) - 0x100, ss.into()];
        let release = r.one_in(2).then(|| r.below(64) as u16);
        let mut case = ret(cpu, &values, release, other).target(cs, eip);
        // What data segments an outer ring may keep.
        if !case.cpu.real_addressing() {
            for index in [0, 3, 4, 5] {
                let dpl = r.below(4) as u8;
                let access = r.pick(&[0x93u8, 0x91, 0x9b, 0x9f]) | dpl << 5;
                let segment = monitor::cpum::Segment {
                    selector: sel::any(access) | 3,
                    base: 0,
                    limit: u32::MAX,
                    attr: monitor::cpum::SegAttr::from_bits_truncate(0xc00 | u16::from(access)),
                };
                case.cpu.seg[index] = segment;
            }
        }
        out.push(case);
    }
    // A descriptor table that ends, or is not there.
    for _ in 0..300 * more {
        let mut cpu = protected(r);
        cpu.gdtr.limit = r.below(0x120) as u16;
        let selector = selector(r);
        if super::tasks::leads_to_a_task(selector) {
            continue;
        }
        let case = far(r.pick(&["jmp far", "call far"]), cpu, selector, r.one_in(2));
        out.push(if case.cpu.paging() { case.page(GDT, r.pick(&[0, 1])) } else { case });
    }
    out
}
