//! What guest code does in ring 1 and in ring 3 under the monitor comes back exactly as the hardware left it.
//!
//! Needs a KVM with hardware behind it: `tests/lab/run` has one anywhere.

mod common_ring1;
use common_ring1::*;
use host_driver_shim::ring1::Ring1Engine;
use host_driver_shim::world::{Backing, HostSegment, HwRegs, Prot, World, WorldError, WorldExit, WorldLin};

#[test]
fn arithmetic_runs_and_hlt_faults_at_its_own_eip() {
    in_both_rings(|mut g| {
        // mov eax, 5; add eax, ecx; imul edx, eax, 3; hlt
        g.put(&[0xb8, 5, 0, 0, 0, 0x01, 0xc8, 0x6b, 0xd0, 3, 0xf4]);
        let mut r = g.regs();
        let esp = r.gpr[ESP];
        r.gpr = [0, 7, 0, 0x3333_3333, esp, 0x5555_5555, 0x6666_6666, 0xffff_ffff];
        assert_eq!(g.run(&mut r), GP);
        assert_eq!(r.eip, CODE + 10);
        assert_eq!(r.gpr, [12, 7, 36, 0x3333_3333, esp, 0x5555_5555, 0x6666_6666, 0xffff_ffff]);
        assert_eq!(r.sel, [g.ds(), g.cs(), g.ds(), g.ds(), 0, 0]);
    });
}

#[test]
fn page_faults_tell_address_and_kind() {
    in_both_rings(|mut g| {
        let user = if g.ring == 3 { 4 } else { 0 };
        let pf = |error_code, cr2| WorldExit::Fault { vector: 14, error_code, cr2 };
        let read = g.at(&[0xa1], 0x1234_5678);
        let (exit, r) = g.run_code(&read);
        assert_eq!((exit, r.eip), (pf(user, 0x1234_5678), CODE));
        // mov [CODE], eax: mapped, but not writable
        let write = g.at(&[0xa3], CODE);
        assert_eq!(g.run_code(&write).0, pf(user | 3, CODE));
        // Data is not executable; neither is nothing.
        let mut r = HwRegs { eip: DATA, ..g.regs() };
        assert_eq!(g.run(&mut r), pf(user | 0x11, DATA));
        let mut r = HwRegs { eip: 0x7800_0000, ..g.regs() };
        assert_eq!(g.run(&mut r), pf(user | 0x10, 0x7800_0000));
    });
}

#[test]
fn every_exception_an_instruction_can_raise_has_its_vector() {
    let fault = |vector, error_code| WorldExit::Fault { vector, error_code, cr2: 0 };
    let cases: [(&[u8], WorldExit, u32, &str); 17] = [
        (&[0x31, 0xc9, 0xf7, 0xf1], fault(0, 0), 2, "div by zero"),
        (&[0xcc], fault(3, 0), 1, "int3"),
        (&[0xb0, 0x7f, 0x04, 1, 0xce], fault(4, 0), 5, "into"),
        (&[0x0f, 0x0b], fault(6, 0), 0, "ud2"),
        (&[0xcd, 0x80], fault(13, 0x80 * 8 + 2), 0, "int 80h"),
        (&[0xcd, 0x0e], fault(13, 0x0e * 8 + 2), 0, "int 14"),
        (&[0xcd, 0x20], fault(13, 0x20 * 8 + 2), 0, "int 20h, the doorbell"),
        (&[0xfa], fault(13, 0), 0, "cli"),
        (&[0xfb], fault(13, 0), 0, "sti"),
        (&[0xe4, 0xf4], fault(13, 0), 0, "in al, f4h"),
        (&[0xe6, 0xf4], fault(13, 0), 0, "out f4h, al"),
        (&[0x66, 0xb8, 0xf8, 0xff, 0x8e, 0xd8], fault(13, 0xfff8 & !3), 4, "mov ds, bad"),
        (&[0x66, 0xb8, 0x10, 0, 0x8e, 0xd8], fault(13, 0x10), 4, "mov ds, the monitor's"),
        (&[0x0f, 0x22, 0xc0], fault(13, 0), 0, "mov cr0, eax"),
        (&[0x0f, 0x20, 0xd8], fault(13, 0), 0, "mov eax, cr3"),
        (&[0x0f, 0x32], fault(13, 0), 0, "rdmsr"),
        (&[0xea, 0, 0, 0, 0, 8, 0], fault(13, 8), 0, "jmp far to the monitor's code"),
    ];
    in_both_rings(|mut g| {
        for (code, exit, at, name) in cases {
            let (found, r) = g.run_code(code);
            assert_eq!((found, r.eip), (exit, CODE + at), "{name} in ring {}", g.ring);
        }
    });
}

#[test]
fn single_step_stops_after_one_instruction() {
    in_both_rings(|mut g| {
        g.put(&[0x40, 0x40]);
        let mut r = HwRegs { eflags: 0x302, ..g.regs() };
        assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 1, error_code: 0, cr2: 0 });
        assert_eq!((r.eip, r.gpr[EAX], r.eflags & 0x100), (CODE + 1, 1, 0x100));
    });
}

#[test]
fn the_gate_carries_the_reason_and_disturbs_nothing() {
    let Some(mut g) = Guest::new(1) else { return };
    g.put(&g.gate_jump(0xdead_0001));
    let mut r = g.regs();
    r.gpr = [0x8000_0001, 2, 3, 4, r.gpr[ESP] - 8, 6, 7, 0xffff_fff8];
    r.eflags = 0x4_0ed7; // AC, OF, DF, IF, SF, ZF, AF, PF, CF
    let before = r;
    let lanes: Vec<u8> = (0..128).collect();
    g.world.fpu()[160..288].copy_from_slice(&lanes);
    assert_eq!(g.run(&mut r), WorldExit::Gate { reason: 0xdead_0001 });
    assert_eq!((r.gpr, r.sel, r.eip), (before.gpr, before.sel, 0));
    assert_eq!(r.eflags & !0x1_0000, before.eflags);
    assert_eq!(g.world.fpu()[160..288], lanes);
}

#[test]
fn fpu_state_goes_in_comes_out_and_stays_with_its_world() {
    in_both_rings(|mut g| {
        // fld1; fadd st, st(1); paddd xmm0, xmm1; hlt; jmp back to the paddd
        g.put(&[0xd9, 0xe8, 0xd8, 0xc1, 0x66, 0x0f, 0xfe, 0xc1, 0xf4, 0xeb, 0xf9]);
        let fpu = g.world.fpu();
        fpu[24..28].copy_from_slice(&0xffff_1f80u32.to_le_bytes()); // reserved MXCSR bits must not hurt
        fpu[2..4].copy_from_slice(&(7u16 << 11).to_le_bytes()); // TOP = 7
        fpu[4] = 0x80; // ST(0) in use
        fpu[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0x00, 0x40]); // 2.0
        fpu[160..164].copy_from_slice(&40u32.to_le_bytes());
        fpu[176..180].copy_from_slice(&2u32.to_le_bytes());
        let mut r = g.regs();
        assert_eq!(g.run(&mut r), GP);
        // Another world, with a state of its own, takes the CPU in between.
        let mut other = g.engine.spawn_world().unwrap();
        let mut r2 = g.regs();
        assert!(matches!(other.run(&mut r2), Err(WorldError::BadState(_))), "its LDT is empty");
        r.eip += 1;
        assert_eq!(g.run(&mut r), GP);
        let fpu = g.world.fpu();
        assert_eq!(fpu[160..164], 44u32.to_le_bytes());
        assert_eq!(fpu[32..42], [0, 0, 0, 0, 0, 0, 0, 0xc0, 0x00, 0x40], "1.0 + 2.0 in ST(0)");
        assert_eq!(other.fpu()[160..164], [0; 4]);
    });
}

#[test]
fn segments_have_their_base_and_limit() {
    in_both_rings(|mut g| {
        // mov eax, fs:[8]; mov dl, fs:[0x1000]
        g.ram.write_u32(0x1008, 0xcafe).unwrap();
        let fs = HostSegment { limit: 0, ..flat(g.ring, DATA) };
        g.world.set_segment(2, fs).unwrap();
        g.put(&[0x64, 0xa1, 8, 0, 0, 0, 0x64, 0x8a, 0x15, 0, 0x10, 0, 0]);
        let mut r = g.regs();
        r.sel[4] = 2 << 3 | 4 | u16::from(g.ring);
        let exit = g.run(&mut r);
        assert_eq!((r.gpr[EAX], r.eip), (0xcafe, CODE + 6));
        if exit
            == (WorldExit::Fault {
                vector: 14,
                error_code: if g.ring == 3 { 4 } else { 0 },
                cr2: DATA + 0x1000,
            })
        {
            println!("SKIP: this CPU (QEMU's TCG?) does not look at segment limits");
        } else {
            assert_eq!(exit, GP, "the last access is over the limit");
        }
        assert_eq!(r.sel[4], 2 << 3 | 4 | u16::from(g.ring));
    });
}

#[test]
fn state_that_cannot_be_loaded_is_refused_and_the_world_stays() {
    in_both_rings(|mut g| {
        g.put(&[0x40, 0xf4]);
        for slot in 0..6 {
            for selector in [0xfff7, 8, 0x10, 0x13, 0x1b, 0x30] {
                let mut r = g.regs();
                r.sel[slot] = selector;
                g.world.fpu()[160] = 9;
                let result = g.world.run(&mut r);
                assert!(matches!(result, Err(WorldError::BadState(_))), "{slot}: {selector:x}: {result:?}");
                let mut r = g.regs();
                assert_eq!(g.run(&mut r), GP);
                assert_eq!((r.gpr[EAX], g.world.fpu()[160]), (1, 9));
            }
        }
    });
}

#[test]
fn mapping_commands_take_effect_in_order_before_the_next_instruction() {
    in_both_rings(|mut g| {
        // mov al, [DATA]; hlt
        let mut c = g.at(&[0xa0], DATA);
        c.push(0xf4);
        g.put(&c);
        g.ram.write_u8(0x5000, 5).unwrap();
        g.ram.write_u8(0x6000, 6).unwrap();
        let at = WorldLin(DATA);
        for round in 0..100u64 {
            let (now, value) = if round % 2 == 0 { (0x6000, 6) } else { (0x5000, 5) };
            g.world.map(at, 0x1000, Backing::Ram(0x5000), prot(g.ring, Prot::READ)).unwrap();
            g.world.unmap(at, 0x1000).unwrap();
            g.world.map(at, 0x1000, Backing::Ram(now), prot(g.ring, Prot::READ)).unwrap();
            let mut r = g.regs();
            assert_eq!((g.run(&mut r), r.gpr[EAX]), (GP, value));
        }
        g.world.unmap(WorldLin(0), 0).unwrap();
        let user = if g.ring == 3 { 4 } else { 0 };
        let mut r = g.regs();
        assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 14, error_code: user | 0x10, cr2: CODE });
    });
}

#[test]
fn refused_mappings_and_segments_are_told() {
    let Some(mut g) = Guest::new(1) else { return };
    let map_error = |r: Result<(), WorldError>| matches!(r, Err(WorldError::Map { .. }));
    assert!(map_error(g.world.map(WorldLin(0x123), 0x1000, Backing::Ram(0), Prot::READ)));
    assert!(map_error(g.world.map(WorldLin(0xffff_f000), 0x2000, Backing::Ram(0), Prot::READ)));
    assert!(map_error(g.world.map(WorldLin(DATA), 0x1000, Backing::Ram(16 << 20), Prot::READ)));
    assert!(map_error(g.world.map(WorldLin(DATA), 0x2000, Backing::Vcpu, Prot::READ)));
    assert!(map_error(g.world.map(WorldLin(DATA), 0x1000, Backing::Code(0), Prot::READ | Prot::WRITE)));
    assert!(map_error(g.world.map(WorldLin(DATA), 0x1000, Backing::Ram(0), Prot::WRITE | Prot::EXEC)));
    assert!(map_error(g.world.unmap(WorldLin(0x1000), 0)));
    assert!(map_error(g.world.protect(WorldLin(0x7800_0000), 0x3000, Prot::READ)));
    assert!(g.world.set_segment(1, HostSegment { limit: 0xf_ffff, ..flat(1, 0) }).is_err());
    assert!(g.world.set_segment(1, HostSegment { code: true, ..flat(1, 0) }).is_err(), "readable code");
    assert_eq!(g.run_code(&[0xf4]).0, GP);
}

#[test]
fn the_region_moves_between_runs() {
    in_both_rings(|mut g| {
        for end in [0x2000_0000, 0xffff_f000, 0x6000_0000, 0] {
            g.engine.settle(WorldLin(end)).unwrap();
            let ss = match g.ring {
                3 => flat(3, 0),
                _ => HostSegment { base: 0, limit: 0x1000, ..flat(1, END) },
            };
            g.world.set_segment(7, ss).unwrap();
            let mut r = g.regs();
            r.sel = r.sel.map(|s| if s == g.ds() { 7 << 3 | 4 | u16::from(g.ring) } else { s });
            r.gpr[ESP] = STACK;
            g.put(&[0x50, 0x58, 0x50, 0xf4]); // push eax; pop eax; push eax; hlt
            assert_eq!(g.run(&mut r), GP);
            assert_eq!(r.gpr[ESP], STACK - 4);
        }
    });
}

#[test]
fn a_kick_ends_a_loop_of_the_guest_and_comes_before_it_begins() {
    in_both_rings(|mut g| {
        g.put(&[0x40, 0xeb, 0xfd]); // inc eax; jmp $-1
        let kicker = g.world.kicker();
        kicker.kick();
        let mut r = g.regs();
        assert_eq!(g.run(&mut r), WorldExit::Kick);
        assert_eq!((r.gpr[EAX], r.eip), (0, CODE));
        for _ in 0..20 {
            let kicker = g.world.kicker();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(5));
                kicker.kick();
            });
            assert_eq!(g.run(&mut r), WorldExit::Kick);
            assert!((CODE..CODE + 3).contains(&r.eip) && r.eflags & 0x200 != 0);
            thread.join().unwrap();
        }
        assert_ne!(r.gpr[EAX], 0, "twenty times 5 ms and not one turn");
    });
}

#[test]
fn a_kick_on_the_way_into_another_world_leaves_each_its_own_tables() {
    in_both_rings(|mut g| {
        // mov eax, [DATA]; hlt
        let mut code = g.at(&[0xa1], DATA);
        code.push(0xf4);
        g.put(&code);
        g.ram.write_u32(0x1000, 1).unwrap();
        g.ram.write_u32(0x5000, 2).unwrap();
        let mut other = g.engine.spawn_world().unwrap();
        other.map(WorldLin(CODE), 4096, Backing::Code(g.code_page), prot(g.ring, Prot::EXEC)).unwrap();
        other.map(WorldLin(DATA), 4096, Backing::Ram(0x5000), prot(g.ring, Prot::READ)).unwrap();
        other.set_segment(FLAT, flat(g.ring, if g.ring == 1 { END } else { 0 })).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let kickers = [g.world.kicker(), other.kicker()];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Not for ever, should the other thread fail.
                for _ in (0..100_000).take_while(|_| !stop.load(std::sync::atomic::Ordering::Relaxed)) {
                    kickers.iter().for_each(|k| k.kick());
                    std::thread::sleep(std::time::Duration::from_micros(50));
                }
            });
            for round in 0..500 {
                let (world, value) = if round % 2 == 0 { (&mut g.world, 1) } else { (&mut other, 2) };
                let mut r = HwRegs { eip: CODE, eflags: 0x202, ..HwRegs::default() };
                let rules = Ring1Engine::segment_rules();
                let cs = if g.ring == 1 { rules.code_ring0 } else { rules.code_ring3 };
                let ds = FLAT << 3 | 4 | u16::from(g.ring);
                r.sel = [ds, cs, ds, ds, 0, 0];
                let mut exit = WorldExit::Kick;
                while exit == WorldExit::Kick {
                    exit = world.run(&mut r).unwrap();
                }
                assert_eq!((exit, r.gpr[EAX]), (GP, value), "round {round}");
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    });
}

#[test]
fn thousands_of_runs_with_random_state_bring_back_what_they_took() {
    in_both_rings(|mut g| {
        // 0: hlt; 1: gate; 19: int3; 20: ud2
        let mut c = vec![0xf4];
        c.extend(g.gate_jump(4711));
        assert_eq!(c.len(), 19);
        c.extend([0xcc, 0x0f, 0x0b]);
        g.put(&c);
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u32
        };
        for i in 0..2_000 {
            let mut r = g.regs();
            for gpr in &mut r.gpr {
                *gpr = next();
            }
            r.eflags = 0x202 | next() & 0x0cd5;
            let lane = next();
            g.world.fpu()[160..164].copy_from_slice(&lane.to_le_bytes());
            let (eip, exit, end) = match next() % 4 {
                1 if g.ring == 1 => (1, WorldExit::Gate { reason: 4711 }, 0),
                2 => (19, WorldExit::Fault { vector: 3, error_code: 0, cr2: 0 }, CODE + 20),
                3 => (20, WorldExit::Fault { vector: 6, error_code: 0, cr2: 0 }, CODE + 20),
                _ => (0, GP, CODE),
            };
            r.eip = CODE + eip;
            let before = r;
            assert_eq!(g.run(&mut r), exit, "run {i}");
            assert_eq!((r.gpr, r.sel, r.eip), (before.gpr, before.sel, end), "run {i}");
            assert_eq!(r.eflags & !0x1_0000, before.eflags, "run {i}"); // RF is set by faults
            assert_eq!(g.world.fpu()[160..164], lane.to_le_bytes(), "run {i}");
        }
    });
}

#[test]
fn registers_of_the_guest_survive_segment_loads_of_its_own() {
    in_both_rings(|mut g| {
        // mov eax, ds; mov es, eax; xor eax, eax; mov fs, eax; mov gs, ecx; hlt
        g.put(&[0x8c, 0xd8, 0x8e, 0xc0, 0x31, 0xc0, 0x8e, 0xe0, 0x8e, 0xe9, 0xf4]);
        let mut r = g.regs();
        r.gpr[ECX] = u32::from(g.ds());
        assert_eq!(g.run(&mut r), GP);
        assert_eq!(r.sel, [g.ds(), g.cs(), g.ds(), g.ds(), 0, g.ds()]);
    });
}

#[test]
fn what_ring_1_writes_into_the_region_is_a_fault_or_without_consequence() {
    let Some(mut g) = Guest::new(1) else { return };
    let start = END - Ring1Engine::segment_rules().hole;
    // mov [edi], eax; hlt, through a segment that ends before the region, and through one that would not.
    g.put(&[0x89, 0x07, 0xf4]);
    let mut unlimited = 0;
    for at in (start..END).step_by(0x10) {
        let mut r = g.regs();
        r.gpr[7] = at.wrapping_sub(END);
        r.gpr[EAX] = 0xdead_beef;
        match g.run(&mut r) {
            GP if r.eip == CODE => {}
            WorldExit::Fault { vector: 14, error_code: 3, cr2 } if cr2 == at => unlimited += 1,
            GP if (start + 0x2000..start + 0x3000).contains(&at) => unlimited += 1,
            other => panic!("{at:x}: {other:?} {r:x?}"),
        }
    }
    if unlimited > 0 {
        println!("SKIP: limits are not looked at here; what was written had no consequence");
    }
    assert_eq!(g.run_code(&[0x40, 0xf4]).0, GP);
}

#[test]
fn a_world_may_go_while_the_cpu_still_has_its_tables() {
    in_both_rings(|mut g| {
        assert_eq!(g.run_code(&[0xf4]).0, GP);
        for _ in 0..3 {
            let new = g.engine.spawn_world().unwrap();
            let old = std::mem::replace(&mut g.world, new);
            drop(old);
            // Its pages are used again.
            let (mut world, ring) = (g.engine.spawn_world().unwrap(), g.ring);
            std::mem::swap(&mut g.world, &mut world);
            g.world.map(WorldLin(CODE), 4096, Backing::Code(g.code_page), prot(g.ring, Prot::EXEC)).unwrap();
            g.world.set_segment(FLAT, flat(ring, if ring == 1 { END } else { 0 })).unwrap();
            assert_eq!(g.run_code(&[0xf4]).0, GP);
        }
    });
}
