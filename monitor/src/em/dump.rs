//! Text for people: registers, the code around EIP, the last exits, the screen.

use super::Em;
use crate::cpum::{CpuState, seg};
use crate::env::Env;
use crate::machine::Machine;
use csam::{GuestLin, GuestPhys};
use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};
use std::fmt::Write;

/// The virtual CPU's registers.
#[must_use]
pub fn registers(cpu: &CpuState) -> String {
    let g = &cpu.gpr;
    let mut t = format!(
        "eax={:08x} ebx={:08x} ecx={:08x} edx={:08x}\nesi={:08x} edi={:08x} ebp={:08x} esp={:08x}\neip={:08x} eflags={:08x} cpl={}{}\n",
        g[0],
        g[3],
        g[1],
        g[2],
        g[6],
        g[7],
        g[5],
        g[4],
        cpu.eip,
        cpu.eflags,
        cpu.cpl,
        if cpu.halted { " halted" } else { "" }
    );
    for (name, i) in
        [("cs", seg::CS), ("ss", seg::SS), ("ds", seg::DS), ("es", seg::ES), ("fs", seg::FS), ("gs", seg::GS)]
    {
        let s = &cpu.seg[i];
        let _ = writeln!(
            t,
            "{name}={:04x} base={:08x} limit={:08x} attr={:03x}",
            s.selector,
            s.base,
            s.limit,
            s.attr.bits()
        );
    }
    let _ = writeln!(
        t,
        "cr0={:08x} cr2={:08x} cr3={:08x} cr4={:08x}\ngdt={:08x}+{:04x} idt={:08x}+{:04x} ldt={:04x} tr={:04x}",
        cpu.cr0,
        cpu.cr2,
        cpu.cr3,
        cpu.cr4,
        cpu.gdtr.base,
        cpu.gdtr.limit,
        cpu.idtr.base,
        cpu.idtr.limit,
        cpu.ldtr.selector,
        cpu.tr.selector
    );
    t
}

/// The next instructions from EIP on.
pub fn disassembly(cpu: &CpuState, m: &mut Machine, count: usize) -> String {
    let mut text = String::new();
    let bits = if cpu.seg[seg::CS].big() && !cpu.real_addressing() { 32 } else { 16 };
    let mut formatter = NasmFormatter::new();
    let mut eip = cpu.eip;
    for _ in 0..count {
        let mut bytes = [0u8; 15];
        let at = GuestLin(cpu.seg[seg::CS].base.wrapping_add(eip));
        let Ok(n) = m.fetch(cpu, at, &mut bytes) else {
            let _ = writeln!(text, "{eip:08x}  (not mapped)");
            break;
        };
        let i = Decoder::with_ip(bits, &bytes[..n.min(15)], u64::from(eip), DecoderOptions::NONE).decode();
        let mut line = String::new();
        formatter.format(&i, &mut line);
        let hex: String = bytes[..i.len().clamp(1, 15)].iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(text, "{eip:08x}  {hex:<20} {line}");
        eip = eip.wrapping_add(i.len().max(1) as u32);
    }
    text
}

/// Everything about a guest that cannot go on.
pub fn fatal(em: &mut Em, reason: &str) -> String {
    let cpu = em.cpu.clone();
    let mut text = format!("{reason}\n{}", registers(&cpu));
    text += &disassembly(&cpu, &mut em.m, 6);
    let exits = em.last_exits();
    if !exits.is_empty() {
        let _ = writeln!(text, "last exits, oldest first:");
        let skip = exits.len().saturating_sub(24);
        for (record, number) in exits.iter().skip(skip) {
            let _ = writeln!(
                text,
                "  #{number} eip {:08x} cpl {} {} by {}: {:?}",
                record.eip,
                record.cpl,
                record.cause.name(),
                record.route.name(),
                record.raw
            );
        }
    }
    text
}

/// The VGA text screen.
#[must_use]
pub fn vga(m: &Machine) -> String {
    let mut screen = [0u8; 4000];
    m.read_ram(GuestPhys(0xb8000), &mut screen);
    crate::devices::vga_text::dump(&screen)
}
