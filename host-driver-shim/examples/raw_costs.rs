//! Measures what the raw engine costs on this machine: `cargo run --release -p host-driver-shim --example raw_costs [unpinned]`.
//!
//! Each figure is the best and the median of 15 batches, in nanoseconds an operation, monitor and world on one CPU
//! unless said otherwise.

use std::time::Instant;

use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw::{GATE, GATE_REASON, RawEngine, RawWorld, pin};
use host_driver_shim::world::{
    Backing, FillMode, FillRules, HostSegment, HwRegs, Prot, World, WorldError, WorldExit, WorldLin,
};

const CODE: u32 = 0x40_0000;
const DATA: u32 = 0x1000_0000;
const STUB: u32 = 0xffc0_0000;
const VCPU: u32 = 0xffc0_1000;
const BATCHES: usize = 15;

fn measure(
    name: &str,
    batch: u32,
    mut f: impl FnMut(u32) -> Result<(), WorldError>,
) -> Result<(), WorldError> {
    let mut times = Vec::new();
    for _ in 0..BATCHES {
        let start = Instant::now();
        for i in 0..batch {
            f(i)?;
        }
        times.push(start.elapsed().as_nanos() as f64 / f64::from(batch));
    }
    times.sort_by(f64::total_cmp);
    println!("{name:58} {:9.0} {:9.0}", times[0], times[BATCHES / 2]);
    Ok(())
}

fn prepare(engine: &RawEngine, code_page: u64) -> Result<RawWorld, WorldError> {
    let mut world = engine.spawn_world()?;
    world.map(WorldLin(CODE), 4096, Backing::Code(code_page), Prot::READ | Prot::EXEC)?;
    world.place_gate(WorldLin(STUB), WorldLin(VCPU))?;
    Ok(world)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ram = GuestRam::new(256 << 20)?;
    let code = CodeMemory::new(CodeMemory::DEFAULT_SIZE)?;
    let page = code.alloc().ok_or("no code page")?;
    // 0: hlt. 16: the gate. 40: mov eax, [ecx]; hlt. 48: jmp $. 64: a load from each 64 KiB.
    let mut gate = vec![0x36, 0xc7, 0x05];
    gate.extend((VCPU + GATE_REASON).to_le_bytes());
    gate.extend(1u32.to_le_bytes());
    gate.extend([0x36, 0xff, 0x2d]);
    gate.extend((VCPU + GATE).to_le_bytes());
    code.write(page + 16, &gate).ok_or("code page")?;
    code.write(page + 40, &[0x8b, 0x01, 0xf4]).ok_or("code page")?;
    code.write(page + 48, &[0xeb, 0xfe]).ok_or("code page")?;
    // mov eax, [ebx]; add ebx, 10000h; dec edx; jnz; hlt
    code.write(page + 64, &[0x8b, 0x03, 0x81, 0xc3, 0, 0, 1, 0, 0x4a, 0x75, 0xf5, 0xf4])
        .ok_or("code page")?;
    let regs = |at: u32| HwRegs {
        eip: CODE + at,
        eflags: 0x202,
        sel: [0x2b, 0x23, 0x2b, 0x2b, 0, 0],
        gpr: [0, DATA, 0, 0, 0, 0, 0, 0],
    };
    println!("{:58} {:>9} {:>9}", "", "best ns", "median ns");

    let unpinned = std::env::args().nth(1).as_deref() == Some("unpinned");
    {
        let (name, cpu) = if unpinned { ("unpinned", None) } else { ("same CPU", Some(0)) };
        if let Some(cpu) = cpu {
            pin(cpu)?;
        }
        let engine = RawEngine::new(&ram, &code, cpu)?;
        let run = |w: &mut RawWorld, at| w.run(&mut regs(at)).map(|_| ());
        println!("-- {name}");
        measure("spawn and drop a world", 10, |_| engine.spawn_world().map(drop))?;
        let mut w = prepare(&engine, page)?;
        measure("run to the gate and back", 2000, |_| run(&mut w, 16))?;
        measure("run to hlt (signal) and back", 2000, |_| run(&mut w, 0))?;
        measure("  the same, reading and writing the FPU state", 2000, |_| {
            w.fpu()[160] ^= 1;
            run(&mut w, 0)
        })?;
        let mut other = prepare(&engine, page)?;
        measure("  the same, two worlds in turn", 2000, |i| {
            run(if i % 2 == 0 { &mut w } else { &mut other }, 0)
        })?;
        measure("round trip without guest code (one set_segment)", 2000, |i| {
            w.set_segment(
                9,
                HostSegment {
                    base: i << 12,
                    limit: 0xfffff,
                    limit_in_pages: true,
                    code: false,
                    big: true,
                    expand_down: false,
                    rw: true,
                    ring: 3,
                },
            )?;
            w.flush()
        })?;
        let rw = Prot::READ | Prot::WRITE;
        let scatter = |i: u32| Backing::Ram(u64::from(i.wrapping_mul(40503) % 0x8000) << 12);
        measure("map one page of 1000 scattered, each command", 1, |_| {
            for i in 0..1000 {
                w.map(WorldLin(DATA + i * 0x2000), 0x1000, scatter(i), rw)?;
            }
            w.flush()
        })?;
        println!("   (the line above is for 1000 commands)");
        measure("unmap one page of 1000 scattered", 1, |_| {
            for i in 0..1000 {
                w.unmap(WorldLin(DATA + i * 0x2000), 0x1000)?;
            }
            w.flush()
        })?;
        println!("   (the line above is for 1000 commands)");
        measure("#PF exit, map the page, run on to hlt, exit", 500, |i| {
            let mut r = regs(40);
            r.gpr[1] = DATA + (i + 1) * 0x2000;
            w.unmap(WorldLin(r.gpr[1]), 0x1000)?;
            w.run(&mut r)?;
            w.map(WorldLin(r.gpr[1]), 0x1000, scatter(i), rw)?;
            w.run(&mut r).map(|_| ())
        })?;
        // The guest's tables: DATA's page directory and 64 tables with scattered frames.
        let tables = 0x100_0000u64;
        for i in 0..64u32 {
            let at = tables + u64::from((DATA >> 22) + i) * 4;
            ram.write_u32(at, (tables as u32 + 0x1000 + i * 0x1000) | 0x67).ok_or("RAM")?;
        }
        let mode = FillMode::ENABLED | FillMode::SUPERVISOR;
        w.set_fill_rules(&FillRules { mode, cr3: tables as u32, ..FillRules::default() });
        // One present page in 16, so that a fault is one mapping; then all of them, in two's steps.
        for (name, every) in
            [("1000 #PF answered in the world, one page each", 16), ("  the same, 8 mappings each", 2)]
        {
            for i in 0..64 * 1024u32 {
                let frame = (i.wrapping_mul(40503) % 0x8000) << 12;
                let at = tables + 0x1000 + u64::from(i) * 4;
                ram.write_u32(at, frame | if i % every == 0 { 0x67 } else { 0 }).ok_or("RAM")?;
            }
            let mut times = Vec::new();
            for _ in 0..BATCHES {
                w.unmap(WorldLin(DATA), 64 << 22)?;
                w.flush()?;
                let start = Instant::now();
                let mut r = regs(64);
                (r.gpr[2], r.gpr[3]) = (1000, DATA);
                let mut answered = 0;
                while w.run(&mut r)? == (WorldExit::Fault { vector: 14, error_code: 4, cr2: r.gpr[3] }) {
                    answered += w.take_fills(&mut |_| ());
                }
                answered += w.take_fills(&mut |_| ());
                if answered < 900 {
                    return Err("the world did not answer its faults".into());
                }
                times.push(start.elapsed().as_nanos() as f64 / 1000.0);
            }
            times.sort_by(f64::total_cmp);
            println!("{name:58} {:9.0} {:9.0}", times[0], times[BATCHES / 2]);
        }
        w.unmap(WorldLin(DATA), 64 << 22)?;
        w.set_fill_rules(&FillRules::default());
        let kicker = w.kicker();
        measure("run that was kicked before", 2000, |_| {
            kicker.kick();
            run(&mut w, 48)
        })?;
    }
    Ok(())
}
