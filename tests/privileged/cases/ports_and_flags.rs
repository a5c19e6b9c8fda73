//! Ports with IOPL and the I/O bitmap; `cli`, `sti`, `pushf`, `popf` at every IOPL.

use super::super::case::Case;
use super::super::setup::{self, IO_MAP, TSS32, TSS32_LIMIT};
use super::any_mode;
use monitor::cpum::{CpuState, Shadow, eflags, gpr};
use subring_tests::ring0_code::Random;

fn modes(r: &mut Random) -> [CpuState; 8] {
    let p = r.one_in(2);
    [
        setup::cpu(0, p),
        setup::cpu(1, p),
        setup::cpu(2, p),
        setup::cpu(3, p),
        setup::cpu16(0, p),
        setup::cpu16(3, p),
        setup::v86(p),
        setup::real(),
    ]
}

const FLAGS: [(&str, &[u8]); 8] = [
    ("cli", &[0xfa]),
    ("sti", &[0xfb]),
    ("pushf", &[0x9c]),
    ("pushf other", &[0x66, 0x9c]),
    ("popf", &[0x9d]),
    ("popf other", &[0x66, 0x9d]),
    ("int3", &[0xcc]),
    ("int n", &[0xcd, 0x80]),
];

const PORTS: [(&str, &[u8]); 8] = [
    ("in al, dx", &[0xec]),
    ("in eax, dx", &[0xed]),
    ("in ax, dx", &[0x66, 0xed]),
    ("out dx, al", &[0xee]),
    ("out dx, eax", &[0xef]),
    ("out dx, ax", &[0x66, 0xef]),
    ("in al, n", &[0xe4, 0x61]),
    ("out n, al", &[0xe6, 0x61]),
];

pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    for (name, code) in FLAGS {
        for iopl in 0..4u32 {
            for _ in 0..8 * more {
                for mut cpu in modes(r) {
                    super::flags(r, &mut cpu);
                    cpu.eflags = cpu.eflags & !eflags::IOPL | iopl << 12;
                    let esp = cpu.gpr[gpr::ESP];
                    // No step and no nested task, which are cases of their own; VM and RF are nothing to `popf`.
                    let value = r.bits() as u32 & !eflags::TF;
                    let note = format!("iopl {iopl}, {value:x} on the stack");
                    out.push(Case::new(name, cpu, code).put(esp, &value.to_le_bytes()).note(note));
                }
            }
        }
    }
    for _ in 0..2500 * more {
        let mut cpu = any_mode(r);
        let (name, code) = r.pick(&PORTS);
        let port = r.pick(&[0u16, 7, 8, 0x60, 0x61, 0x80, 0xf7, 0xf8, 0xfc, 0xff, 0x100, 0x3f8, 0xffff]);
        cpu.gpr[gpr::EDX] = u32::from(port) | 0x9999_0000;
        if r.one_in(8) {
            setup::in_task16(&mut cpu);
        }
        if r.one_in(8) {
            cpu.tr.limit = r.pick(&[0x65, 0x66, 0x67, 0x68, TSS32_LIMIT - 1, TSS32_LIMIT - 2]);
        }
        if r.one_in(16) {
            cpu.shadow = Shadow::MovSs;
        }
        let mut map = [0u8; 33];
        for byte in &mut map {
            *byte = if r.one_in(2) { 0 } else { 1 << r.below(8) };
        }
        map[32] = 0xff;
        let mut case = Case::new(name, cpu, code).note(format!("port {port:x}"));
        case = case.put(TSS32 + IO_MAP, &map);
        if r.one_in(12) {
            case = case.put(TSS32 + 0x66, &r.pick(&[0u16, 0x67, 0xffff, 0x8800]).to_le_bytes());
        }
        out.push(case);
    }
    out
}
