//! Segment register loads: `mov`, `pop` and far pointers; `lldt` and `ltr`.

use super::super::case::Case;
use super::super::setup::{self, DATA, GDT, sel};
use super::{any_mode, selector};
use monitor::cpum::{CpuState, gpr};
use subring_tests::ring0_code::Random;

/// Segment registers by their number in `mov`, with the names of the instructions that load them.
const REGISTERS: [(u8, &str, &str, &str); 5] = [
    (0, "mov es", "pop es", "les"),
    (2, "mov ss", "pop ss", "lss"),
    (3, "mov ds", "pop ds", "lds"),
    (4, "mov fs", "pop fs", "lfs"),
    (5, "mov gs", "pop gs", "lgs"),
];

fn mov(name: &'static str, register: u8, mut cpu: CpuState, selector: u16) -> Case {
    cpu.gpr[gpr::EAX] = u32::from(selector) | 0x5555_0000;
    Case::new(name, cpu, &[0x8e, 0xc0 | register << 3]).note(format!("{selector:04x}"))
}

/// Every access byte, RPL and CPL for DS and SS; the others and the other ways, at random.
pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    for (register, name, _, _) in [REGISTERS[1], REGISTERS[2]] {
        for ring in 0..4u8 {
            for rpl in 0..4u16 {
                for access in 0..=255u8 {
                    out.push(mov(name, register, setup::cpu(ring, false), sel::any(access) | rpl));
                }
            }
        }
    }
    for _ in 0..3000 * more {
        let mut cpu = any_mode(r);
        let (register, by_mov, by_pop, by_pointer) = r.pick(&REGISTERS);
        let selector = selector(r);
        let sp = cpu.gpr[gpr::ESP];
        out.push(match r.below(4) {
            0 => mov(by_mov, register, cpu, selector),
            1 => {
                let code: &[u8] = match register {
                    0 => &[0x07],
                    2 => &[0x17],
                    3 => &[0x1f],
                    4 => &[0x0f, 0xa1],
                    _ => &[0x0f, 0xa9],
                };
                Case::new(by_pop, cpu, code).put(sp, &selector.to_le_bytes()).note(format!("{selector:04x}"))
            }
            2 => {
                let prefix: &[u8] = if r.one_in(2) { &[0x66] } else { &[] };
                let opcode: &[u8] = match register {
                    0 => &[0xc4],
                    2 => &[0x0f, 0xb2],
                    3 => &[0xc5],
                    4 => &[0x0f, 0xb4],
                    _ => &[0x0f, 0xb5],
                };
                let big = cpu.seg[1].big();
                let modrm: &[u8] = if big { &[0x03] } else { &[0x07] };
                let offset = if big == prefix.is_empty() { 4 } else { 2 };
                Case::new(by_pointer, cpu, &[prefix, opcode, modrm].concat())
                    .put(DATA + offset, &selector.to_le_bytes())
                    .note(format!("{selector:04x}"))
            }
            _ => {
                // The accessed bit cannot be written, or the table not be read.
                cpu = setup::cpu(r.below(4) as u8, true);
                let bits = r.pick(&[0, 1, 5, 4]);
                mov(by_mov, register, cpu, selector).page(GDT, bits)
            }
        });
    }
    out
}
