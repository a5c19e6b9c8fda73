//! Measures what the raw engine costs on this machine: `cargo run --release -p host-driver-shim --example raw_costs [unpinned]`.
//!
//! Each figure is the best and the median of 15 batches, in nanoseconds an operation, monitor and world on one CPU
//! unless said otherwise.

use std::time::Instant;

use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw::{GATE, GATE_REASON, RawEngine, RawWorld, pin};
use host_driver_shim::world::{Backing, HostSegment, HwRegs, Prot, World, WorldError, WorldLin};

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
    // 0: hlt. 16: the gate. 32: mov eax, [ecx]; hlt. 48: jmp $.
    let mut gate = vec![0x36, 0xc7, 0x05];
    gate.extend((VCPU + GATE_REASON).to_le_bytes());
    gate.extend(1u32.to_le_bytes());
    gate.extend([0x36, 0xff, 0x2d]);
    gate.extend((VCPU + GATE).to_le_bytes());
    code.write(page + 16, &gate).ok_or("code page")?;
    code.write(page + 40, &[0x8b, 0x01, 0xf4]).ok_or("code page")?;
    code.write(page + 48, &[0xeb, 0xfe]).ok_or("code page")?;
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
        let kicker = w.kicker();
        measure("run that was kicked before", 2000, |_| {
            kicker.kick();
            run(&mut w, 48)
        })?;
    }
    Ok(())
}
