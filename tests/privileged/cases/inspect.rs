//! `lar`, `lsl`, `verr`, `verw`, `arpl`; `lldt`, `ltr` and what stores table registers.

use super::super::case::Case;
use super::super::setup::{self, DATA, sel};
use super::{any_mode, selector};
use monitor::cpum::{SegAttr, Segment, cr4, gpr};
use subring_tests::ring0_code::Random;

/// Opcode and ModRM with EAX as the selector; what is loaded goes to EDX.
const LOOK: [(&str, &[u8]); 6] = [
    ("lar", &[0x0f, 0x02, 0xd0]),
    ("lsl", &[0x0f, 0x03, 0xd0]),
    ("lar 16", &[0x66, 0x0f, 0x02, 0xd0]),
    ("lsl 16", &[0x66, 0x0f, 0x03, 0xd0]),
    ("verr", &[0x0f, 0x00, 0xe0]),
    ("verw", &[0x0f, 0x00, 0xe8]),
];

/// Every access byte by each instruction from the outermost corners of privilege; everything else at random.
pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    for (n, (name, code)) in (0u32..).zip(LOOK) {
        for access in 0..=255u8 {
            for (ring, rpl) in [(0, 0), (3, 3), (0, 3), (3, 0), (1, 2)] {
                if n % 2 == 1 && (ring, rpl) == (1, 2) {
                    continue;
                }
                let mut cpu = setup::cpu(ring, false);
                cpu.gpr[gpr::EAX] = u32::from(sel::any(access) | rpl);
                out.push(Case::new(name, cpu, code).note(format!("access {access:02x} rpl {rpl}")));
            }
        }
    }
    for _ in 0..1500 * more {
        let mut cpu = any_mode(r);
        let selector = selector(r);
        let (name, code) = r.pick(&LOOK);
        cpu.gpr[gpr::EAX] = u32::from(selector) | 0xaaaa_0000;
        if r.one_in(8) {
            cpu.ldtr = Segment { selector: 0, attr: SegAttr::empty(), ..Segment::default() };
        }
        out.push(Case::new(name, cpu, code).note(format!("{selector:04x}")));
    }
    for access in 0..=255u8 {
        for (name, modrm) in [("lldt", 0xd0u8), ("ltr", 0xd8)] {
            let mut cpu = setup::cpu(0, false);
            cpu.gpr[gpr::EAX] = sel::any(access).into();
            out.push(Case::new(name, cpu, &[0x0f, 0, modrm]).note(format!("access {access:02x}")));
        }
    }
    for _ in 0..1500 * more {
        let mut cpu = any_mode(r);
        let selector = selector(r);
        cpu.gpr[gpr::EAX] = u32::from(selector) | 0xaaaa_0000;
        if r.one_in(4) {
            cpu.cr4 |= cr4::DE;
        }
        let prefix: &[u8] = if r.one_in(3) { &[0x66] } else { &[] };
        // [ebx] or [bx]: both are DATA.
        let memory: u8 = if cpu.seg[1].big() { 0x03 } else { 0x07 };
        let (name, code): (&str, [u8; 3]) = match r.below(14) {
            0 => ("lldt", [0x0f, 0, 0xd0]),
            1 => ("ltr", [0x0f, 0, 0xd8]),
            2 => ("lldt", [0x0f, 0, 0x10 | memory]),
            3 => ("ltr", [0x0f, 0, 0x18 | memory]),
            4 => ("sldt", [0x0f, 0, 0xc2]),
            5 => ("str", [0x0f, 0, 0xca]),
            6 => ("sldt", [0x0f, 0, memory]),
            7 => ("str", [0x0f, 0, 0x08 | memory]),
            8 => ("sgdt", [0x0f, 1, memory]),
            9 => ("sidt", [0x0f, 1, 0x08 | memory]),
            10 => ("lgdt", [0x0f, 1, 0x10 | memory]),
            11 => ("lidt", [0x0f, 1, 0x18 | memory]),
            12 => ("smsw", [0x0f, 1, 0xe2]),
            _ => ("arpl", [0x90, 0x63, 0xc2]),
        };
        let code = [prefix, &code[..]].concat();
        let code = if name == "arpl" { &code[code.len() - 2..] } else { &code[..] };
        out.push(
            Case::new(name, cpu, code).put(DATA, &selector.to_le_bytes()).note(format!("{selector:04x}")),
        );
    }
    out
}
