//! Control and debug registers, and what only ring 0 may do.

use super::super::case::Case;
use super::super::setup::{DATA, PAGE_DIRECTORY};
use super::any_mode;
use monitor::cpum::{cr0, cr4, eflags, gpr};
use subring_tests::ring0_code::Random;

const PRIVILEGED: [(&str, &[u8]); 13] = [
    ("clts", &[0x0f, 0x06]),
    ("hlt", &[0xf4]),
    ("invd", &[0x0f, 0x08]),
    ("wbinvd", &[0x0f, 0x09]),
    ("invlpg", &[0x0f, 0x01, 0x38]),
    ("rdmsr", &[0x0f, 0x32]),
    ("wrmsr", &[0x0f, 0x30]),
    ("rdtsc", &[0x0f, 0x31]),
    ("rdpmc", &[0x0f, 0x33]),
    ("lmsw", &[0x0f, 0x01, 0xf0]),
    ("smsw", &[0x0f, 0x01, 0xe0]),
    ("cli", &[0xfa]),
    ("sti", &[0xfb]),
];

/// Bits of CR4 KVM and the policy agree about.
const CR4: u32 = cr4::TSD | cr4::DE | cr4::PSE | cr4::MCE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT;

pub(crate) fn cases(r: &mut Random, more: u64) -> Vec<Case> {
    let mut out = Vec::new();
    for _ in 0..2500 * more {
        let mut cpu = any_mode(r);
        let (name, code) = r.pick(&PRIVILEGED);
        cpu.cr0 |= r.bits() as u32 & (cr0::MP | cr0::EM | cr0::TS);
        cpu.cr4 |= r.bits() as u32 & (cr4::TSD | cr4::DE | cr4::PCE);
        match name {
            "rdmsr" | "wrmsr" => {
                // TSC, the APIC's base, PAT, EFER, and none.
                cpu.gpr[gpr::ECX] = r.pick(&[0x1b, 0x277, 0xc000_0080, 0x7777_7777]);
                (cpu.gpr[gpr::EAX], cpu.gpr[gpr::EDX]) = (0, 0);
                if name == "wrmsr" && cpu.gpr[gpr::ECX] == 0x1b {
                    cpu.gpr[gpr::ECX] = 0x277;
                }
            }
            "rdpmc" => cpu.gpr[gpr::ECX] = 0x7777_7777,
            "lmsw" => cpu.gpr[gpr::EAX] = r.bits() as u32,
            "invlpg" => cpu.gpr[gpr::EAX] = DATA,
            _ => {}
        }
        let ignored = if name == "rdtsc" { 1 << gpr::EAX | 1 << gpr::EDX } else { 0 };
        let mut case = Case::new(name, cpu, code);
        case.ignored_gprs = ignored;
        out.push(case);
    }
    // mov from and to control registers, those that do not exist included; every mode.
    for _ in 0..2500 * more {
        let mut cpu = any_mode(r);
        if cpu.paging() {
            // Other tables than the CPU's own are no tables.
            cpu.cr4 |= r.bits() as u32 & cr4::PSE;
        }
        let number = r.pick(&[0u8, 0, 2, 3, 4, 4, 1, 5, 7]);
        let write = r.one_in(2);
        let value = match number {
            0 => {
                let flip = 1 << r.pick(&[1u32, 2, 3, 5, 16, 18, 29, 30, 31, 0, 17, 6, 28]);
                let second = 1 << r.pick(&[1u32, 2, 3, 30, 31, 0]);
                cpu.cr0 ^ flip ^ if r.one_in(2) { second } else { 0 }
            }
            3 => PAGE_DIRECTORY | r.pick(&[0, 8, 0x10, 0x18, 0x567]),
            4 => {
                let value = cpu.cr4 ^ r.bits() as u32 & CR4;
                if r.one_in(4) {
                    value | 1 << r.pick(&[13u32, 14, 15, 17, 20, 21, 22, 23, 31])
                } else {
                    value
                }
            }
            _ => r.bits() as u32,
        };
        cpu.gpr[gpr::EAX] = value;
        let code = [0x0f, if write { 0x22 } else { 0x20 }, 0xc0 | number << 3];
        let name = if write { "mov to cr" } else { "mov from cr" };
        out.push(Case::new(name, cpu, &code).note(format!("cr{number} {value:x}")));
    }
    // Debug registers, with DE and GD.
    for _ in 0..1500 * more {
        let mut cpu = any_mode(r);
        cpu.cr4 |= r.bits() as u32 & cr4::DE;
        for n in 0..4 {
            cpu.dr[n] = r.bits() as u32;
        }
        cpu.dr[6] = 0xffff_0ff0 | r.bits() as u32 & 0xf;
        if r.one_in(4) {
            cpu.dr[7] |= 1 << 13;
        }
        let number = r.below(8) as u8;
        let write = r.one_in(2);
        // No breakpoint is armed: they are not modelled.
        let value = if number & 5 == 5 { r.bits() as u32 & !0xff } else { r.bits() as u32 };
        cpu.gpr[gpr::EAX] = value;
        let code = [0x0f, if write { 0x23 } else { 0x21 }, 0xc0 | number << 3];
        let name = if write { "mov to dr" } else { "mov from dr" };
        out.push(Case::new(name, cpu, &code).note(format!("dr{number} {value:x}")));
    }
    // A single step over something.
    for _ in 0..600 * more {
        let mut cpu = any_mode(r);
        cpu.eflags |= eflags::TF;
        let (name, code): (_, &[u8]) = r.pick(&[
            ("step nop", &[0x90][..]),
            ("step cli", &[0xfa]),
            ("step sti", &[0xfb]),
            ("step pushf", &[0x9c]),
            ("step ud2", &[0x0f, 0x0b]),
            ("step int n", &[0xcd, 0x80]),
            ("step sldt", &[0x0f, 0x00, 0xc0]),
        ]);
        out.push(Case::new(name, cpu, code));
    }
    out
}
