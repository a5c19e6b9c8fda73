//! Measures whether a code segment base other than 0 costs anything on this CPU.
use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw::{RawEngine, pin};
use host_driver_shim::world::{Backing, HostSegment, HwRegs, Prot, World, WorldLin};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ram = GuestRam::new(16 << 20)?;
    let code = CodeMemory::new(CodeMemory::DEFAULT_SIZE)?;
    let page = code.alloc().ok_or("no code page")?;
    // Programs: ECX iterations, then hlt.
    let programs: [(&str, Vec<u8>); 4] = [
        ("dec; jnz", vec![0x49, 0x75, 0xfd, 0xf4]),
        ("call; ret; dec; jnz", vec![0xe8, 4, 0, 0, 0, 0x49, 0x75, 0xf8, 0xf4, 0xc3]),
        (
            "4 adds, jmp, dec; jnz",
            vec![0x01, 0xc3, 0x01, 0xc2, 0x01, 0xc6, 0x01, 0xc7, 0xeb, 0, 0x49, 0x75, 0xf3, 0xf4],
        ),
        (
            "mov [mem]; mov; dec; jnz",
            vec![0x8b, 0x1d, 0, 0, 0, 0x10, 0x89, 0x1d, 4, 0, 0, 0x10, 0x49, 0x75, 0xf1, 0xf4],
        ),
    ];
    pin(0)?;
    let engine = RawEngine::new(&ram, &code, Some(0))?;
    for (i, (name, bytes)) in programs.iter().enumerate() {
        code.write(page + 64 * i as u64, bytes).ok_or("write")?;
        for base in [0u32, 0x3000_0000, 0xb000_0000, 0xb000_0010] {
            let mut w = engine.spawn_world()?;
            let at = 0x40_0000u32;
            w.map(
                WorldLin(at.wrapping_add(base) & !0xfff),
                4096,
                Backing::Code(page),
                Prot::READ | Prot::EXEC,
            )?;
            w.map(WorldLin(0x1000_0000), 4096, Backing::Ram(0), Prot::READ | Prot::WRITE)?;
            w.set_segment(
                100,
                HostSegment {
                    base: base & !0xfff,
                    limit: 0xfffff,
                    limit_in_pages: true,
                    code: true,
                    big: true,
                    expand_down: false,
                    rw: true,
                    ring: 3,
                },
            )?;
            let mut best = f64::MAX;
            for _ in 0..5 {
                let mut regs = HwRegs {
                    eip: at + 64 * i as u32,
                    eflags: 0x202,
                    sel: [0x2b, 100 << 3 | 7, 0x2b, 0x2b, 0, 0],
                    gpr: [1, 20_000_000, 0, 0, 0x1000_0800, 0, 0, 0],
                };
                let t = Instant::now();
                w.run(&mut regs)?;
                best = best.min(t.elapsed().as_nanos() as f64 / 2e7);
            }
            println!("{name:28} base {:08x} {best:6.3} ns", base & !0xfff);
        }
    }
    // Data segments with a base: a pointer chase, a store-load pair, push/pop, and rep movsb.
    let programs: [(&str, Vec<u8>); 5] = [
        ("chase: mov ebx,[ebx]; dec; jnz", vec![0x8b, 0x1b, 0x49, 0x75, 0xfb, 0xf4]),
        (
            "mov [m]; mov; dec; jnz",
            vec![0x8b, 0x1d, 0, 0, 0, 0x10, 0x89, 0x1d, 4, 0, 0, 0x10, 0x49, 0x75, 0xf1, 0xf4],
        ),
        ("push; pop; dec; jnz", vec![0x50, 0x5b, 0x49, 0x75, 0xfb, 0xf4]),
        ("call; ret; dec; jnz", vec![0xe8, 4, 0, 0, 0, 0x49, 0x75, 0xf8, 0xf4, 0xc3]),
        (
            "8 loads; dec; jnz",
            vec![
                0x8b, 0x13, 0x8b, 0x43, 4, 0x8b, 0x73, 8, 0x8b, 0x7b, 12, 0x8b, 0x6b, 16, 0x8b, 0x53, 20,
                0x8b, 0x43, 24, 0x8b, 0x73, 28, 0x49, 0x75, 0xe6, 0xf4,
            ],
        ),
    ];
    for (i, (name, bytes)) in programs.iter().enumerate() {
        code.write(page + 64 * i as u64, bytes).ok_or("write")?;
        for base in [0u32, 0x3000_0000] {
            let mut w = engine.spawn_world()?;
            let at = 0x40_0000u32;
            w.map(WorldLin(at), 4096, Backing::Code(page), Prot::READ | Prot::EXEC)?;
            w.map(WorldLin(0x1000_0000 + base), 8192, Backing::Ram(0), Prot::READ | Prot::WRITE)?;
            ram.write(0x100, &0x1000_0100u32.to_le_bytes()).ok_or("ram")?;
            w.set_segment(
                101,
                HostSegment {
                    base,
                    limit: 0xfffff,
                    limit_in_pages: true,
                    code: false,
                    big: true,
                    expand_down: false,
                    rw: true,
                    ring: 3,
                },
            )?;
            let d = if base == 0 { 0x2b } else { 101 << 3 | 7 };
            let mut best = f64::MAX;
            for _ in 0..5 {
                let mut regs = HwRegs {
                    eip: at + 64 * i as u32,
                    eflags: 0x202,
                    sel: [d, 0x23, d, d, 0, 0],
                    gpr: [1, 20_000_000, 0, 0x1000_0100, 0x1000_0800, 0, 0, 0],
                };
                let t = Instant::now();
                w.run(&mut regs)?;
                best = best.min(t.elapsed().as_nanos() as f64 / 2e7);
            }
            println!("{name:34} data base {base:08x} {best:6.3} ns");
        }
    }
    Ok(())
}
