//! What guest code does in a raw world comes back exactly as the hardware left it.

mod common;
use common::*;
use host_driver_shim::world::{Backing, HwRegs, Prot, World, WorldError, WorldExit, WorldLin};

#[test]
fn arithmetic_runs_and_hlt_faults_at_its_own_eip() {
    // mov eax, 5; add eax, ecx; imul edx, eax, 3; hlt
    let mut g = Guest::with(&[0xb8, 5, 0, 0, 0, 0x01, 0xc8, 0x6b, 0xd0, 3, 0xf4]);
    let mut r = regs();
    r.gpr = [0, 7, 0, 0x3333_3333, STACK, 0x5555_5555, 0x6666_6666, 0xffff_ffff];
    assert_eq!(g.run(&mut r), GP);
    assert_eq!(r.eip, CODE + 10);
    assert_eq!(r.gpr, [12, 7, 36, 0x3333_3333, STACK, 0x5555_5555, 0x6666_6666, 0xffff_ffff]);
    assert_eq!(r.sel, [DS, CS, DS, DS, 0, 0]);
}

#[test]
fn page_faults_tell_address_and_kind() {
    // mov eax, [0x12345678]
    let mut g = Guest::with(&[0xa1, 0x78, 0x56, 0x34, 0x12]);
    let mut r = regs();
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 14, error_code: 4, cr2: 0x1234_5678 });
    assert_eq!(r.eip, CODE);
    // mov [CODE], eax: mapped, but not writable
    let mut c = vec![0xa3];
    c.extend(CODE.to_le_bytes());
    g.put(&c);
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 14, error_code: 7, cr2: CODE });
    // Data is not executable; neither is nothing.
    r.eip = DATA;
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 14, error_code: 0x15, cr2: DATA });
    r.eip = 0x7000_0000;
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 14, error_code: 0x14, cr2: 0x7000_0000 });
    assert_eq!(r.eip, 0x7000_0000);
}

#[test]
fn every_exception_a_ring_3_instruction_can_raise_has_its_vector() {
    let fault = |vector, error_code| WorldExit::Fault { vector, error_code, cr2: 0 };
    let cases: [(&[u8], WorldExit, u32, &str); 8] = [
        (&[0x31, 0xc9, 0xf7, 0xf1], fault(0, 0), 2, "div by zero"),
        (&[0xcc], fault(3, 0), 1, "int3"),
        (&[0xb0, 0x7f, 0x04, 1, 0xce], fault(4, 0), 5, "into"),
        (&[0x0f, 0x0b], fault(6, 0), 0, "ud2"),
        (&[0xcd, 0x2e], fault(13, 0x2e * 8 + 2), 0, "int 2eh"),
        (&[0xfa], fault(13, 0), 0, "cli"),
        (&[0x66, 0xb8, 0xf8, 0xff, 0x8e, 0xd8], fault(13, 0xfff8), 4, "mov ds, bad"),
        (&[0x0f, 0x22, 0xc0], fault(13, 0), 0, "mov cr0, eax"),
    ];
    let mut g = Guest::new();
    for (code, exit, at, name) in cases {
        g.put(code);
        let mut r = regs();
        assert_eq!(g.run(&mut r), exit, "{name}");
        assert_eq!(r.eip, CODE + at, "{name}");
    }
}

#[test]
fn icebp_is_a_debug_exception_before_or_after_it() {
    // After it on hardware (SDM vol. 3, 6.15); a virtual machine on SVM may report it at the instruction itself.
    let mut g = Guest::with(&[0xf1]);
    let mut r = regs();
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 1, error_code: 0, cr2: 0 });
    assert!([CODE, CODE + 1].contains(&r.eip), "{:#x}", r.eip);
}

#[test]
fn single_step_stops_after_one_instruction() {
    let mut g = Guest::with(&[0x40, 0x40]);
    let mut r = HwRegs { eflags: 0x302, ..regs() };
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 1, error_code: 0, cr2: 0 });
    assert_eq!((r.eip, r.gpr[EAX], r.eflags & 0x100), (CODE + 1, 1, 0x100));
}

#[test]
fn host_system_calls_of_the_guest_are_exits() {
    // mov eax, 1 (exit); int 0x80
    let mut g = Guest::with(&[0xb8, 1, 0, 0, 0, 0xcd, 0x80, 0xf4]);
    let mut r = regs();
    assert_eq!(g.run(&mut r), WorldExit::Syscall);
    assert_eq!((r.eip, r.gpr[EAX]), (CODE + 7, 1));
    // The world lives on.
    assert_eq!(g.run(&mut r), GP);
}

#[test]
fn sysenter_ends_where_nothing_is_mapped() {
    let mut g = Guest::with(&[0x0f, 0x34, 0xf4]);
    let mut r = regs();
    // Where the host's kernel looks for an argument, in vain: no system call comes of it, which the jail would answer.
    r.gpr[5] = 0; // EBP
    match g.run(&mut r) {
        // AMD.
        WorldExit::Fault { vector: 6, .. } => assert_eq!(r.eip, CODE),
        // Intel: the host's kernel goes on at its landing pad, with its own code segment.
        WorldExit::Fault { vector: 14, error_code, .. } => {
            assert!(error_code & 16 != 0 && r.eip < 0x1_0000 && r.sel[1] == CS, "{r:x?}");
        }
        other => panic!("{other:?}"),
    }
    // The world lives on.
    r = regs();
    r.eip += 2;
    assert_eq!(g.run(&mut r), GP);
}

#[test]
fn the_gate_carries_the_reason_and_disturbs_nothing() {
    let mut g = Guest::with(&gate_jump(0xdead_0001));
    let mut r = regs();
    r.gpr = [0x8000_0001, 2, 3, 4, STACK - 8, 6, 7, 0xffff_fff8];
    r.eflags = 0x4_0ed7; // AC, OF, DF, IF, SF, ZF, AF, PF, CF
    let before = r;
    let fpu: Vec<u8> = (0..512).map(|i| if (160..416).contains(&i) { i as u8 } else { 0 }).collect();
    g.world.fpu()[160..416].copy_from_slice(&fpu[160..416]);
    assert_eq!(g.run(&mut r), WorldExit::Gate { reason: 0xdead_0001 });
    assert_eq!(r.gpr, before.gpr);
    assert_eq!(r.eflags, before.eflags);
    assert_eq!(r.sel, before.sel);
    assert_eq!(r.eip, 0);
    assert_eq!(g.world.fpu()[160..416], fpu[160..416]);
}

#[test]
fn a_single_step_through_the_gate_keeps_tf() {
    let mut g = Guest::with(&gate_jump(9)[11..]);
    let mut r = HwRegs { eflags: 0x302, ..regs() };
    assert_eq!(g.run(&mut r), WorldExit::Gate { reason: 0 });
    assert_eq!(r.eflags, 0x302);
}

#[test]
fn fpu_state_goes_in_and_comes_out() {
    // fld1; fadd st, st(1); paddd xmm0, xmm1; hlt
    let mut g = Guest::with(&[0xd9, 0xe8, 0xd8, 0xc1, 0x66, 0x0f, 0xfe, 0xc1, 0xf4]);
    let fpu = g.world.fpu();
    fpu[24..28].copy_from_slice(&0xffff_1f80u32.to_le_bytes()); // reserved MXCSR bits must not hurt
    fpu[2..4].copy_from_slice(&(7u16 << 11).to_le_bytes()); // TOP = 7
    fpu[4] = 0x80; // ST(0) in use
    fpu[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0x00, 0x40]); // 2.0
    fpu[160..164].copy_from_slice(&40u32.to_le_bytes());
    fpu[176..180].copy_from_slice(&2u32.to_le_bytes());
    let mut r = regs();
    assert_eq!(g.run(&mut r), GP);
    let fpu = g.world.fpu();
    assert_eq!(fpu[160..164], 42u32.to_le_bytes());
    assert_eq!(fpu[32..42], [0, 0, 0, 0, 0, 0, 0, 0xc0, 0x00, 0x40], "1.0 + 2.0 in ST(0)");
    assert_eq!(u16::from_le_bytes([fpu[2], fpu[3]]) >> 11 & 7, 6);
}

#[test]
fn fpu_state_survives_exits_nobody_looks_at() {
    // 1: paddd xmm0, xmm1; hlt; jmp 1b
    let mut g = Guest::with(&[0x66, 0x0f, 0xfe, 0xc1, 0xf4, 0xeb, 0xf9]);
    g.world.fpu()[176] = 1;
    let mut r = regs();
    for _ in 0..100 {
        assert_eq!(g.run(&mut r), GP);
        r.eip += 1;
    }
    assert_eq!(g.world.fpu()[160], 100);
}

#[test]
fn a_code_segment_with_a_base_runs_code_elsewhere() {
    let mut g = Guest::with(&[0x2e, 0xa1, 0x0a, 0x10, 0, 0, 0xf4, 0, 0, 0, 0x78, 0x56, 0x34, 0x12]);
    if !has_ldt(&mut g) {
        return;
    }
    g.world.set_segment(1, flat(CODE - 0x1000, true)).unwrap();
    let mut r = HwRegs { eip: 0x1000, ..regs() };
    r.sel[1] = 1 << 3 | 7;
    assert_eq!(g.run(&mut r), GP);
    assert_eq!((r.eip, r.gpr[EAX], r.sel[1]), (0x1006, 0x1234_5678, 0xf));
}

#[test]
fn data_segments_have_their_base_limit_and_direction() {
    // mov eax, fs:[8]; mov ecx, gs:[0xfffffffc]; mov dl, fs:[0x1000]
    let code =
        [0x64, 0xa1, 8, 0, 0, 0, 0x65, 0x8b, 0x0d, 0xfc, 0xff, 0xff, 0xff, 0x64, 0x8a, 0x15, 0, 0x10, 0, 0];
    let mut g = Guest::with(&code);
    if !has_ldt(&mut g) {
        return;
    }
    g.ram.write_u32(0x1008, 0xcafe).unwrap();
    g.ram.write_u32(0x1ffc, 0xbeef).unwrap();
    let fs = host_driver_shim::world::HostSegment { limit: 0, ..flat(DATA, false) };
    let gs =
        host_driver_shim::world::HostSegment { limit: 0, expand_down: true, ..flat(DATA + 0x1000, false) };
    g.world.set_segment(2, fs).unwrap();
    g.world.set_segment(3, gs).unwrap();
    let mut r = regs();
    r.sel[4] = 2 << 3 | 7;
    r.sel[5] = 3 << 3 | 7;
    assert_eq!(g.run(&mut r), GP, "the last access is over the limit");
    assert_eq!((r.gpr[EAX], r.gpr[ECX], r.eip), (0xcafe, 0xbeef, CODE + 13));
    assert_eq!(r.sel[4..], [0x17, 0x1f]);
}

#[test]
fn a_stack_in_the_ldt_works_and_its_faults_are_stack_faults() {
    // push eax; mov eax, ss:[0x2000]
    let mut g = Guest::with(&[0x50, 0x36, 0xa1, 0, 0x20, 0, 0]);
    if !has_ldt(&mut g) {
        return;
    }
    let ss = host_driver_shim::world::HostSegment { limit: 0, ..flat(DATA, false) };
    g.world.set_segment(4, ss).unwrap();
    let mut r = regs();
    r.sel[2] = 4 << 3 | 7;
    r.gpr[EAX] = 77;
    r.gpr[ESP] = 0x800;
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 12, error_code: 0, cr2: 0 });
    assert_eq!((r.eip, r.gpr[ESP], r.sel[2]), (CODE + 1, 0x7fc, 0x27));
    assert_eq!(g.ram.read_u32(0x17fc), Some(77));
}

#[test]
fn state_that_cannot_be_loaded_is_refused_and_the_world_stays() {
    let mut g = Guest::with(&[0x40, 0xf4]);
    for slot in 0..6 {
        let mut r = regs();
        r.sel[slot] = 0xfff7; // an LDT slot nobody filled
        g.world.fpu()[160] = 9;
        let error = g.world.run(&mut r).unwrap_err();
        assert!(matches!(error, WorldError::BadState(_)), "{slot}: {error}");
        let mut r = regs();
        assert_eq!(g.run(&mut r), GP);
        assert_eq!((r.gpr[EAX], g.world.fpu()[160]), (1, 9));
    }
    let mut r = regs();
    r.sel[1] = 0x33;
    assert!(matches!(g.world.run(&mut r), Err(WorldError::BadState(_))));
}

#[test]
fn mapping_commands_take_effect_in_order_before_the_next_instruction() {
    // mov al, [DATA]; hlt
    let mut c = vec![0xa0];
    c.extend(DATA.to_le_bytes());
    c.push(0xf4);
    let mut g = Guest::with(&c);
    g.ram.write_u8(0x5000, 5).unwrap();
    g.ram.write_u8(0x6000, 6).unwrap();
    let at = WorldLin(DATA);
    g.world.map(at, 0x1000, Backing::Ram(0x5000), Prot::READ).unwrap();
    g.world.unmap(at, 0x1000).unwrap();
    g.world.map(at, 0x1000, Backing::Ram(0x6000), Prot::READ).unwrap();
    let mut r = regs();
    assert_eq!((g.run(&mut r), r.gpr[EAX]), (GP, 6));
    // More commands than the queue holds, alternately, the last one wins.
    for i in 0..5001u64 {
        g.world.map(at, 0x1000, Backing::Ram(0x5000 + (i % 2) * 0x1000), Prot::READ).unwrap();
    }
    let mut r = regs();
    assert_eq!((g.run(&mut r), r.gpr[EAX]), (GP, 5));
    // Neighbouring pages mapped one by one are one mapping.
    for i in 0..64u32 {
        let at = WorldLin(0x1000_0000 + i * 0x1000);
        g.world.map(at, 0x1000, Backing::Ram(0x10000 + u64::from(i) * 0x1000), Prot::READ).unwrap();
    }
    g.world.protect(WorldLin(0x1000_0000), 0x40000, Prot::READ | Prot::WRITE).unwrap();
    let mut r = regs();
    assert_eq!(g.run(&mut r), GP);
    g.world.unmap(WorldLin(0), 0).unwrap();
    let mut r = regs();
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 14, error_code: 0x14, cr2: CODE });
}

#[test]
fn refused_mappings_are_told_and_the_world_stays() {
    let mut g = Guest::with(&[0xf4]);
    let map_error = |r: Result<(), WorldError>| matches!(r, Err(WorldError::Map { .. }));
    assert!(map_error(g.world.map(WorldLin(0x123), 0x1000, Backing::Ram(0), Prot::READ)));
    assert!(map_error(g.world.map(WorldLin(0xffff_f000), 0x2000, Backing::Ram(0), Prot::READ)));
    assert!(map_error(g.world.map(WorldLin(DATA), 0x1000, Backing::Ram(16 << 20), Prot::READ)));
    assert!(map_error(g.world.map(WorldLin(DATA), 0x2000, Backing::Vcpu, Prot::READ)));
    assert!(map_error(g.world.map(WorldLin(DATA), 0x1000, Backing::Code(0), Prot::READ | Prot::WRITE)));
    assert!(map_error(g.world.unmap(WorldLin(0x1000), 0)));
    // What only the host can refuse: protecting a hole.
    g.world.protect(WorldLin(0x7000_0000), 0x3000, Prot::READ).unwrap();
    match g.world.run(&mut regs()) {
        Err(WorldError::Map { at: 0x7000_0000, len: 0x3000, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(g.run(&mut regs()), GP);
}

#[test]
fn page_zero_is_refused_where_the_host_reserves_it() {
    let mut g = Guest::with(&[0xf4]);
    g.world.map(WorldLin(0), 0x1000, Backing::Ram(0), Prot::READ).unwrap();
    match g.world.flush() {
        Err(WorldError::Map { at: 0, len: 0x1000, .. }) => {}
        Ok(()) => println!("SKIP: this account may map page 0"),
        other => panic!("{other:?}"),
    }
    assert_eq!(g.run(&mut regs()), GP);
}

#[test]
fn two_worlds_share_ram_and_code_but_not_mappings() {
    // inc dword [DATA]; hlt
    let mut c = vec![0xff, 0x05];
    c.extend(DATA.to_le_bytes());
    c.push(0xf4);
    let mut g = Guest::with(&c);
    let mut other = g.engine.spawn_world().unwrap();
    assert_eq!(other.run(&mut regs()).unwrap(), WorldExit::Fault { vector: 14, error_code: 0x14, cr2: CODE });
    other.map(WorldLin(CODE), 0x1000, Backing::Code(g.code_page), Prot::READ | Prot::EXEC).unwrap();
    other.map(WorldLin(DATA), 0x1000, Backing::Ram(0x1000), Prot::READ | Prot::WRITE).unwrap();
    assert_eq!(other.run(&mut regs()).unwrap(), GP);
    assert_eq!(g.run(&mut regs()), GP);
    assert_eq!(g.ram.read_u32(0x1000), Some(2));
}

#[test]
fn the_vcpu_page_is_shared_with_the_guest() {
    // mov eax, [VCPU+0x10]; mov [VCPU+0x14], eax; hlt
    let mut c = vec![0xa1];
    c.extend((VCPU + 0x10).to_le_bytes());
    c.push(0xa3);
    c.extend((VCPU + 0x14).to_le_bytes());
    c.push(0xf4);
    let mut g = Guest::with(&c);
    g.world.vcpu_write(0x10, 0x1357_9bdf);
    assert_eq!(g.run(&mut regs()), GP);
    assert_eq!(g.world.vcpu_read(0x14), 0x1357_9bdf);
    assert_eq!(g.world.vcpu_read(4093), 0);
}

#[test]
fn twenty_thousand_runs_with_random_state_bring_back_what_they_took() {
    // 0: hlt; 1: gate; 18: int3; 19: ud2
    let mut c = vec![0xf4];
    c.extend(gate_jump(4711));
    assert_eq!(c.len(), 19);
    c.extend([0xcc, 0x0f, 0x0b]);
    let mut g = Guest::with(&c);
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u32
    };
    for i in 0..20_000 {
        let mut r = regs();
        for gpr in &mut r.gpr {
            *gpr = next();
        }
        r.eflags = 0x202 | next() & 0x4_0cd5;
        let lane = next();
        g.world.fpu()[160..164].copy_from_slice(&lane.to_le_bytes());
        let (eip, exit, end) = match next() % 4 {
            0 => (0, GP, CODE),
            1 => (1, WorldExit::Gate { reason: 4711 }, 0),
            2 => (19, WorldExit::Fault { vector: 3, error_code: 0, cr2: 0 }, CODE + 20),
            _ => (20, WorldExit::Fault { vector: 6, error_code: 0, cr2: 0 }, CODE + 20),
        };
        r.eip = CODE + eip;
        let before = r;
        assert_eq!(g.run(&mut r), exit, "run {i}");
        assert_eq!((r.gpr, r.sel, r.eip), (before.gpr, before.sel, end), "run {i}");
        assert_eq!(r.eflags & !0x1_0000, before.eflags, "run {i}"); // RF is set by faults
        assert_eq!(g.world.fpu()[160..164], lane.to_le_bytes(), "run {i}");
    }
}
