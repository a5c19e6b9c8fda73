//! What the guest finds on its stack after a trap, and how it gets back.

use super::*;
use crate::cpum::{CpuState, Segment, Shadow, TableRegister, cr0, eflags, gpr, seg};
use crate::selm::descriptor::system_type::*;
use crate::selm::flat_env::{
    FlatEnv, IDT, STACK0, STACK3, TSS, TSS2, enter_ring, gate, machine, segment, sel,
};
use crate::selm::v86_segment;
use crate::trap::{Event, Trap};

const HANDLER: u32 = 0x1_2345;

/// Expects an error and that nothing changed.
fn refused(cpu: &CpuState, env: &mut FlatEnv, event: Event) -> Trap {
    let mut after = cpu.clone();
    let trap = try_deliver(&mut after, env, event).expect_err("delivery should fail");
    assert_eq!(&after, cpu);
    trap
}

fn iret_refused(cpu: &CpuState, env: &mut FlatEnv) -> Trap {
    let mut after = cpu.clone();
    let trap = iret(&mut after, env, 4).expect_err("iret should fail");
    assert_eq!(&after, cpu);
    trap
}

fn push(cpu: &mut CpuState, env: &mut FlatEnv, values: &[u32]) {
    cpu.gpr[gpr::ESP] -= 4 * values.len() as u32;
    for (i, v) in values.iter().enumerate() {
        env.put32(cpu.gpr[gpr::ESP] + 4 * i as u32, *v);
    }
}

#[test]
fn real_mode_pushes_three_words_and_takes_the_vector() {
    let mut cpu = CpuState::reset();
    let mut env = FlatEnv::new();
    cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
    cpu.seg[seg::CS] = Segment::real(0x1000);
    cpu.gpr[gpr::ESP] = 0xaaaa_0100;
    cpu.eip = 0x77;
    cpu.eflags |= eflags::IF | eflags::TF;
    env.put32(0x21 * 4, 0x2000_0456);
    try_deliver(&mut cpu, &mut env, Event::Software { vector: 0x21, short_form: false }).unwrap();
    assert_eq!((cpu.seg[seg::CS].selector, cpu.seg[seg::CS].base, cpu.eip), (0x2000, 0x2_0000, 0x456));
    assert_eq!(cpu.gpr[gpr::ESP], 0xaaaa_00fa);
    assert_eq!((env.get16(0xfa), env.get16(0xfc), env.get16(0xfe)), (0x77, 0x1000, 0x302));
    assert_eq!(cpu.eflags, eflags::FIXED);
    iret(&mut cpu, &mut env, 2).unwrap();
    assert_eq!((cpu.seg[seg::CS].selector, cpu.eip), (0x1000, 0x77));
    assert_eq!((cpu.gpr[gpr::ESP], cpu.eflags), (0xaaaa_0100, 0x302));
}

#[test]
fn real_mode_frame_wraps_around_the_stack_segment() {
    let mut cpu = CpuState::reset();
    let mut env = FlatEnv::new();
    cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
    cpu.gpr[gpr::ESP] = 2;
    cpu.seg[seg::SS] = Segment::real(0x1000);
    cpu.eip = 0x77;
    env.put32(0x20, 0x0200_0000);
    try_deliver(&mut cpu, &mut env, Event::External { vector: 8 }).unwrap();
    assert_eq!(cpu.gpr[gpr::ESP], 0xfffc);
    assert_eq!((env.get16(0x1_0000), env.get16(0x1_fffc)), (2, 0x77));
}

#[test]
fn real_mode_vector_beyond_the_idt_limit_is_refused() {
    let mut cpu = CpuState::reset();
    let mut env = FlatEnv::new();
    cpu.idtr = TableRegister { base: 0, limit: 0x22 };
    assert_eq!(refused(&cpu, &mut env, Event::External { vector: 8 }).vector, 13);
}

#[test]
fn interrupt_gate_in_the_same_ring_clears_if_and_a_trap_gate_does_not() {
    for (kind, if_after) in [(INTERRUPT_GATE32, 0), (TRAP_GATE32, eflags::IF)] {
        let (mut cpu, mut env) = machine();
        env.put_gate(0x20, kind, 0, sel::CODE0, HANDLER);
        cpu.eflags |= eflags::IF | eflags::TF | eflags::NT | eflags::RF | eflags::AC | eflags::CF;
        cpu.halted = true;
        cpu.shadow = Shadow::Sti;
        let before = cpu.clone();
        try_deliver(&mut cpu, &mut env, Event::External { vector: 0x20 }).unwrap();
        assert_eq!(cpu.eip, HANDLER);
        assert_eq!(cpu.gpr[gpr::ESP], STACK0 - 12);
        assert_eq!(env.stack32(STACK0 - 12), [0x7777, u32::from(sel::CODE0), before.eflags]);
        assert_eq!(cpu.eflags, eflags::FIXED | eflags::AC | eflags::CF | if_after);
        assert!(!cpu.halted);
        assert_eq!(cpu.shadow, Shadow::None);
        assert_eq!(env.access_byte(sel::CODE0), 0x9b);
    }
}

#[test]
fn from_ring_3_the_stack_comes_from_the_tss() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    cpu.eflags |= eflags::IF;
    env.put_gate(14, INTERRUPT_GATE32, 0, sel::CODE0, HANDLER);
    try_deliver(&mut cpu, &mut env, Event::Exception(Trap::pf(6, 0xdead_0000))).unwrap();
    assert_eq!((cpu.cpl, cpu.seg[seg::CS].selector, cpu.seg[seg::SS].selector), (0, sel::CODE0, sel::DATA0));
    assert_eq!(cpu.cr2, 0xdead_0000);
    assert_eq!(cpu.gpr[gpr::ESP], STACK0 - 24);
    let flags = eflags::FIXED | eflags::IF | eflags::RF;
    assert_eq!(
        env.stack32(STACK0 - 24),
        [6, 0x7777, u32::from(sel::CODE3), flags, STACK3, u32::from(sel::DATA3)]
    );
    assert_eq!(cpu.seg[seg::DS].selector, sel::DATA3, "data segments stay");
}

#[test]
fn a_16_bit_gate_pushes_words() {
    let (mut cpu, mut env) = machine();
    env.put_gate(13, INTERRUPT_GATE16, 0, sel::CODE0, 0xffff_4321);
    try_deliver(&mut cpu, &mut env, Event::Exception(Trap::gp(0x50))).unwrap();
    assert_eq!(cpu.eip, 0x4321);
    assert_eq!(cpu.gpr[gpr::ESP], STACK0 - 8);
    assert_eq!(env.get32(STACK0 - 8), 0x7777_0050);
}

#[test]
fn a_16_bit_tss_gives_a_16_bit_stack_pointer() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    cpu.tr = segment(TSS, 0x2b, 0x83, 0).segment(sel::TSS);
    env.put16(TSS + 2, 0x8800);
    env.put16(TSS + 4, sel::DATA0);
    env.put_gate(0x80, TRAP_GATE32, 3, sel::CODE0, HANDLER);
    try_deliver(&mut cpu, &mut env, Event::Software { vector: 0x80, short_form: false }).unwrap();
    assert_eq!(cpu.gpr[gpr::ESP], 0x8800 - 20);
}

#[test]
fn only_faults_push_rf() {
    let (cpu, mut env) = machine();
    for vector in 0..32 {
        env.put_gate(vector, INTERRUPT_GATE32, 3, sel::CODE0, HANDLER);
    }
    for (event, rf) in [
        (Event::Exception(Trap::UD), true),
        (Event::Exception(Trap::gp(0)), true),
        (Event::Exception(Trap::DB), false),
        (Event::Exception(Trap::BP), false),
        (Event::Exception(Trap::df()), false),
        (Event::Software { vector: 3, short_form: true }, false),
        (Event::External { vector: 31 }, false),
        (Event::Nmi, false),
    ] {
        let mut cpu = cpu.clone();
        try_deliver(&mut cpu, &mut env, event).unwrap();
        let error_code = matches!(event, Event::Exception(Trap { error_code: Some(_), .. }));
        let flags = env.get32(cpu.gpr[gpr::ESP] + 8 + 4 * u32::from(error_code));
        assert_eq!(flags & eflags::RF != 0, rf, "{event:?}");
    }
}

#[test]
fn software_interrupts_need_the_gates_dpl_and_others_do_not() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    env.put_gate(0x40, INTERRUPT_GATE32, 0, sel::CODE0, HANDLER);
    let event = Event::Software { vector: 0x40, short_form: false };
    assert_eq!(refused(&cpu, &mut env, event), Trap::gp(0x40 * 8 + 2));
    try_deliver(&mut cpu, &mut env, Event::External { vector: 0x40 }).unwrap();
}

#[test]
fn bad_gates_and_targets_have_their_error_codes() {
    let (cpu, mut env) = machine();
    let external = Event::External { vector: 0x50 };
    let software = Event::Software { vector: 0x50, short_form: false };
    // Neither a gate nor present.
    assert_eq!(refused(&cpu, &mut env, external), Trap::gp(0x50 * 8 + 3));
    assert_eq!(refused(&cpu, &mut env, software), Trap::gp(0x50 * 8 + 2));
    let mut absent = gate(INTERRUPT_GATE32, 3, sel::CODE0, 0, 0);
    absent.high &= !0x8000;
    env.put(IDT + 0x50 * 8, &absent.to_bytes());
    assert_eq!(refused(&cpu, &mut env, external), Trap::np(0x50 * 8 + 3));
    for (target, expected) in [
        (0, Trap::gp(1)),
        (sel::BEYOND, Trap::gp(u32::from(sel::BEYOND) + 1)),
        (sel::DATA0, Trap::gp(u32::from(sel::DATA0) + 1)),
        (sel::CODE3, Trap::gp(u32::from(sel::CODE3 & !3) + 1)),
        (sel::ABSENT_CODE0, Trap::np(u32::from(sel::ABSENT_CODE0) + 1)),
    ] {
        env.put_gate(0x50, INTERRUPT_GATE32, 3, target, HANDLER);
        assert_eq!(refused(&cpu, &mut env, external), expected, "{target:#x}");
    }
    env.put_gate(0x50, INTERRUPT_GATE32, 3, sel::CODE16, HANDLER);
    assert_eq!(refused(&cpu, &mut env, external), Trap::gp(1), "offset beyond the limit");
    let beyond = CpuState { idtr: TableRegister { base: IDT, limit: 0x286 }, ..cpu.clone() };
    assert_eq!(refused(&beyond, &mut env, external), Trap::gp(0x50 * 8 + 3));
}

#[test]
fn bad_inner_stacks_have_their_error_codes() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    env.put_gate(0x50, INTERRUPT_GATE32, 3, sel::CODE0, HANDLER);
    let event = Event::Software { vector: 0x50, short_form: false };
    for (ss, expected) in [
        (0, Trap::ts(0)),
        (sel::BEYOND, Trap::ts(u32::from(sel::BEYOND))),
        (sel::DATA3, Trap::ts(u32::from(sel::DATA3 & !3))),
        (sel::READ_ONLY0, Trap::ts(u32::from(sel::READ_ONLY0))),
        (sel::ABSENT_DATA0, Trap::ss(u32::from(sel::ABSENT_DATA0))),
    ] {
        env.put16(TSS + 8, ss);
        assert_eq!(refused(&cpu, &mut env, event), expected, "{ss:#x}");
    }
    // No room: the error code names the new stack.
    env.put16(TSS + 8, sel::FREE);
    env.put_descriptor(sel::FREE, segment(0, 0x100, 0x92, 4));
    assert_eq!(refused(&cpu, &mut env, event), Trap::ss(u32::from(sel::FREE)));
    cpu.tr.limit = 8;
    assert_eq!(refused(&cpu, &mut env, event), Trap::ts(u32::from(sel::TSS)));
}

#[test]
fn a_page_fault_on_the_inner_stack_changes_nothing() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    env.put_gate(0x50, INTERRUPT_GATE32, 3, sel::CODE0, HANDLER);
    env.read_only.insert((STACK0 - 4) >> 12);
    let trap = refused(&cpu, &mut env, Event::External { vector: 0x50 });
    assert_eq!((trap.vector, trap.error_code), (14, Some(3)), "a supervisor write, though the CPL is 3");
}

#[test]
fn a_conforming_handler_stays_in_the_ring() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    env.put_gate(0x50, INTERRUPT_GATE32, 3, sel::CONFORMING0, HANDLER);
    try_deliver(&mut cpu, &mut env, Event::External { vector: 0x50 }).unwrap();
    assert_eq!((cpu.cpl, cpu.seg[seg::CS].selector), (3, sel::CONFORMING0 | 3));
    assert_eq!(cpu.gpr[gpr::ESP], STACK3 - 12);
}

fn enter_v86(cpu: &mut CpuState, iopl: u32) {
    cpu.eflags = eflags::FIXED | eflags::VM | eflags::IF | iopl << 12;
    for index in 0..6 {
        cpu.seg[index] = v86_segment(0x100 + index as u16);
    }
    cpu.seg[seg::SS] = v86_segment(0xc00);
    cpu.cpl = 3;
    cpu.gpr[gpr::ESP] = 0x200;
    cpu.eip = 0x33;
}

#[test]
fn from_v86_nine_values_are_pushed_and_data_segments_become_null() {
    let (mut cpu, mut env) = machine();
    enter_v86(&mut cpu, 0);
    let before = cpu.clone();
    env.put_gate(13, INTERRUPT_GATE32, 0, sel::CODE0, HANDLER);
    try_deliver(&mut cpu, &mut env, Event::Exception(Trap::gp(0))).unwrap();
    assert_eq!(
        env.stack32(STACK0 - 40),
        [0, 0x33, 0x101, before.eflags | eflags::RF, 0x200, 0xc00, 0x100, 0x103, 0x104, 0x105]
    );
    assert!(!cpu.v86());
    assert_eq!(cpu.cpl, 0);
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        assert_eq!(cpu.seg[index], Segment::default());
    }
    cpu.gpr[gpr::ESP] += 4;
    iret(&mut cpu, &mut env, 4).unwrap();
    assert_eq!(CpuState { eflags: cpu.eflags & !eflags::RF, ..cpu }, before, "iret restores V86 mode whole");
}

#[test]
fn v86_int_n_needs_iopl_3_but_int3_does_not() {
    let (mut cpu, mut env) = machine();
    enter_v86(&mut cpu, 0);
    env.put_gate(3, INTERRUPT_GATE32, 3, sel::CODE0, HANDLER);
    assert_eq!(refused(&cpu, &mut env, Event::Software { vector: 3, short_form: false }), Trap::gp(0));
    try_deliver(&mut cpu, &mut env, Event::Software { vector: 3, short_form: true }).unwrap();
    enter_v86(&mut cpu, 3);
    try_deliver(&mut cpu, &mut env, Event::Software { vector: 3, short_form: false }).unwrap();
}

#[test]
fn from_v86_the_handler_must_be_ring_0() {
    let (mut cpu, mut env) = machine();
    enter_v86(&mut cpu, 3);
    for target in [sel::CODE1, sel::CODE3, sel::CONFORMING0] {
        env.put_gate(0x20, INTERRUPT_GATE32, 3, target, HANDLER);
        let expected = Trap::gp(u32::from(target & !3) + 1);
        assert_eq!(refused(&cpu, &mut env, Event::External { vector: 0x20 }), expected);
    }
}

#[test]
fn v86_iret_changes_if_but_not_iopl() {
    let (mut cpu, mut env) = machine();
    enter_v86(&mut cpu, 3);
    env.put16(0xc200, 0x44);
    env.put16(0xc202, 0x300);
    env.put16(0xc204, 0x0001);
    iret(&mut cpu, &mut env, 2).unwrap();
    assert_eq!((cpu.eip, cpu.seg[seg::CS]), (0x44, v86_segment(0x300)));
    assert_eq!(cpu.eflags, eflags::FIXED | eflags::VM | eflags::IOPL | eflags::CF);
    enter_v86(&mut cpu, 2);
    assert_eq!(iret_refused(&cpu, &mut env), Trap::gp(0));
}

#[test]
fn a_double_fault_task_gate_switches_tasks_and_iret_returns() {
    let (mut cpu, mut env) = machine();
    env.put(IDT + 8 * 8, &gate(TASK_GATE, 0, sel::TSS2, 0, 0).to_bytes());
    let image = [(0x20, HANDLER), (0x24, 0x2), (0x38, 0xb000), (0x1c, 0x5_5000)];
    for (at, value) in image {
        env.put32(TSS2 + at, value);
    }
    for (at, selector) in [(0x48, 0), (0x4c, sel::CODE0), (0x50, sel::DATA0), (0x54, sel::DATA0)] {
        env.put16(TSS2 + at, selector);
    }
    cpu.gpr[gpr::EBX] = 0xb0b;
    let before = cpu.clone();
    deliver(&mut cpu, &mut env, Event::Exception(Trap::df())).unwrap();
    assert_eq!((cpu.eip, cpu.tr.selector, cpu.tr.base), (HANDLER, sel::TSS2, TSS2));
    assert_eq!(cpu.gpr[gpr::ESP], 0xb000 - 4);
    assert_eq!(env.get32(0xb000 - 4), 0, "the error code is on the new task's stack");
    assert_eq!(cpu.eflags, eflags::FIXED | eflags::NT);
    assert_eq!(cpu.cr3, 0, "without paging CR3 stays");
    assert_eq!(env.get16(TSS2), sel::TSS, "the back link");
    assert_eq!((env.get32(TSS + 0x20), env.get32(TSS + 0x34)), (0x7777, 0xb0b), "the old task is saved");
    assert_eq!((env.access_byte(sel::TSS), env.access_byte(sel::TSS2)), (0x8b, 0x8b), "both are busy");
    assert_ne!(cpu.cr0 & cr0::TS, 0);

    iret(&mut cpu, &mut env, 4).unwrap();
    assert_eq!((cpu.eip, cpu.gpr, cpu.seg), (before.eip, before.gpr, before.seg));
    assert_eq!(cpu.tr, before.tr);
    assert_eq!((env.access_byte(sel::TSS), env.access_byte(sel::TSS2)), (0x8b, 0x89));
    assert_eq!(env.get32(TSS2 + 0x24) & eflags::NT, 0, "the ended task is saved without NT");
}

#[test]
fn iret_to_an_outer_ring_drops_inner_data_segments() {
    let (mut cpu, mut env) = machine();
    cpu.seg[seg::FS] = segment(0, 0xf_ffff, 0xf3, 0xc).segment(sel::DATA3);
    let flags = eflags::FIXED | eflags::IF | eflags::CF;
    push(&mut cpu, &mut env, &[0x6000, u32::from(sel::CODE3), flags, STACK3, u32::from(sel::DATA3)]);
    iret(&mut cpu, &mut env, 4).unwrap();
    assert_eq!((cpu.cpl, cpu.eip, cpu.gpr[gpr::ESP], cpu.eflags), (3, 0x6000, STACK3, flags));
    assert_eq!((cpu.seg[seg::CS].selector, cpu.seg[seg::SS].selector), (sel::CODE3, sel::DATA3));
    assert_eq!(cpu.seg[seg::DS], Segment::default());
    assert_eq!(cpu.seg[seg::FS].selector, sel::DATA3);
}

#[test]
fn iret_to_a_16_bit_stack_keeps_the_upper_half_of_esp() {
    let (mut cpu, mut env) = machine();
    env.put_descriptor(sel::FREE, segment(0, 0xffff, 0xf2, 0));
    push(&mut cpu, &mut env, &[0x6000, u32::from(sel::CODE3), 2, 0x1234_5678, u32::from(sel::FREE | 3)]);
    let upper = cpu.gpr[gpr::ESP] & 0xffff_0000;
    iret(&mut cpu, &mut env, 4).unwrap();
    assert_eq!(cpu.gpr[gpr::ESP], upper | 0x5678);
}

#[test]
fn iret_changes_if_only_up_to_iopl_and_iopl_only_in_ring_0() {
    let popped = eflags::FIXED | eflags::IF | eflags::IOPL | eflags::ID | eflags::RF;
    let ring0 = {
        let (mut cpu, mut env) = machine();
        push(&mut cpu, &mut env, &[0x6000, u32::from(sel::CODE0), popped]);
        iret(&mut cpu, &mut env, 4).unwrap();
        cpu.eflags
    };
    assert_eq!(ring0, popped);
    for (iopl, expected) in [(0, 0), (3, eflags::IF)] {
        let (mut cpu, mut env) = machine();
        enter_ring(&mut cpu, 3);
        cpu.eflags |= iopl << 12;
        push(&mut cpu, &mut env, &[0x6000, u32::from(sel::CODE3), popped]);
        iret(&mut cpu, &mut env, 4).unwrap();
        assert_eq!(cpu.eflags, eflags::FIXED | iopl << 12 | expected | eflags::ID | eflags::RF);
    }
}

#[test]
fn a_16_bit_iret_leaves_the_upper_flags_alone() {
    let (mut cpu, mut env) = machine();
    cpu.eflags |= eflags::ID;
    cpu.gpr[gpr::ESP] -= 6;
    let esp = cpu.gpr[gpr::ESP];
    env.put16(esp, 0x6000);
    env.put16(esp + 2, sel::CODE0);
    env.put16(esp + 4, 0x203);
    iret(&mut cpu, &mut env, 2).unwrap();
    assert_eq!((cpu.eflags, cpu.gpr[gpr::ESP]), (eflags::ID | 0x203, STACK0));
}

#[test]
fn iret_never_returns_inward_or_to_nonsense() {
    for (cpl, cs, expected) in [
        (3, sel::CODE0, Trap::gp(u32::from(sel::CODE0))),
        (0, 0, Trap::gp(0)),
        (0, sel::DATA0, Trap::gp(u32::from(sel::DATA0))),
        (0, sel::CODE0 | 3, Trap::gp(u32::from(sel::CODE0))),
        (0, sel::BEYOND, Trap::gp(u32::from(sel::BEYOND))),
        (0, sel::ABSENT_CODE0, Trap::np(u32::from(sel::ABSENT_CODE0))),
    ] {
        let (mut cpu, mut env) = machine();
        enter_ring(&mut cpu, cpl);
        push(&mut cpu, &mut env, &[0x6000, u32::from(cs), 2, STACK3, u32::from(sel::DATA3)]);
        assert_eq!(iret_refused(&cpu, &mut env), expected, "{cs:#x} from ring {cpl}");
    }
    for (ss, expected) in [
        (0, Trap::gp(0)),
        (sel::DATA0, Trap::gp(u32::from(sel::DATA0))),
        (sel::CODE3, Trap::gp(u32::from(sel::CODE3 & !3))),
    ] {
        let (mut cpu, mut env) = machine();
        push(&mut cpu, &mut env, &[0x6000, u32::from(sel::CODE3), 2, STACK3, u32::from(ss)]);
        assert_eq!(iret_refused(&cpu, &mut env), expected, "stack {ss:#x}");
    }
}

#[test]
fn iret_from_an_unmapped_stack_is_a_page_fault_with_nothing_changed() {
    let (mut cpu, mut env) = machine();
    cpu.gpr[gpr::ESP] -= 12;
    env.absent.insert(cpu.gpr[gpr::ESP] >> 12);
    assert_eq!(iret_refused(&cpu, &mut env), Trap::pf(0, STACK0 - 12));
}

#[test]
fn nested_iret_needs_a_busy_tss_in_the_back_link() {
    let (mut cpu, mut env) = machine();
    cpu.eflags |= eflags::NT;
    for (link, expected) in [
        (0, Trap::ts(0)),
        (sel::TSS2, Trap::ts(u32::from(sel::TSS2))),
        (sel::DATA0, Trap::ts(u32::from(sel::DATA0))),
        (sel::BEYOND, Trap::ts(u32::from(sel::BEYOND))),
    ] {
        env.put16(TSS, link);
        assert_eq!(iret_refused(&cpu, &mut env), expected, "{link:#x}");
    }
}

/// A machine whose IDT has only the given vectors.
fn with_vectors(vectors: &[u8]) -> (CpuState, FlatEnv) {
    let (cpu, mut env) = machine();
    for &v in vectors {
        env.put_gate(v, INTERRUPT_GATE32, 0, sel::CODE0, 0x1000 * u32::from(v));
    }
    (cpu, env)
}

#[test]
fn two_contributory_exceptions_make_a_double_fault() {
    let (mut cpu, mut env) = with_vectors(&[8]);
    deliver(&mut cpu, &mut env, Event::Exception(Trap::gp(0))).unwrap();
    assert_eq!((cpu.eip, env.get32(cpu.gpr[gpr::ESP])), (0x8000, 0));
}

#[test]
fn a_benign_event_that_faults_is_replaced_by_the_fault() {
    let (mut cpu, mut env) = with_vectors(&[8, 13]);
    deliver(&mut cpu, &mut env, Event::External { vector: 0x77 }).unwrap();
    assert_eq!((cpu.eip, env.get32(cpu.gpr[gpr::ESP])), (0xd000, 0x77 * 8 + 3));
    assert_eq!(env.get32(cpu.gpr[gpr::ESP] + 4), 0x7777, "EIP is where the event came in");
}

#[test]
fn a_page_fault_with_a_bad_gate_makes_a_double_fault_and_loads_cr2() {
    let (mut cpu, mut env) = with_vectors(&[8, 13]);
    deliver(&mut cpu, &mut env, Event::Exception(Trap::pf(2, 0x1234_5000))).unwrap();
    assert_eq!((cpu.eip, cpu.cr2), (0x8000, 0x1234_5000));
}

#[test]
fn a_page_fault_while_delivering_a_contributory_fault_is_delivered() {
    let (mut cpu, mut env) = with_vectors(&[8, 14]);
    // Vector 13 is the last entry of an absent page, vector 14 the first of the next.
    cpu.idtr.base = IDT + 0xf90;
    env.put(IDT + 0x1000, &gate(INTERRUPT_GATE32, 0, sel::CODE0, 0xe000, 0).to_bytes());
    env.absent.insert(IDT >> 12);
    deliver(&mut cpu, &mut env, Event::Exception(Trap::gp(0))).unwrap();
    assert_eq!((cpu.eip, cpu.cr2), (0xe000, IDT + 0xff8));
}

#[test]
fn a_fault_in_the_double_fault_is_the_end() {
    let (mut cpu, mut env) = with_vectors(&[]);
    let first = Event::Exception(Trap::UD);
    let end = deliver(&mut cpu, &mut env, first).unwrap_err();
    assert_eq!(end, TripleFault { first, last: Trap::gp(8 * 8 + 3) });
}

mod random {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tables_never_panic_and_errors_change_nothing(
            seed in proptest::collection::vec(any::<u8>(), 256),
            table in proptest::collection::vec(any::<u8>(), 512),
            frame in proptest::collection::vec(any::<u16>(), 24),
            ring3 in any::<bool>(),
            vector in 0u8..64,
            flags in any::<u32>(),
            esp in any::<u32>(),
            keep_esp in any::<bool>(),
            operand_size in prop_oneof![Just(2u8), Just(4)],
        ) {
            let (mut cpu, mut env) = machine();
            env.put(crate::selm::flat_env::GDT + 0x60, &seed[..0xa0]);
            env.put(IDT, &table);
            if ring3 { enter_ring(&mut cpu, 3); }
            cpu.eflags = flags & 0x0025_7fd7 | 2;
            if keep_esp { cpu.gpr[gpr::ESP] -= 64 } else { cpu.gpr[gpr::ESP] = esp }
            for (i, v) in frame.iter().enumerate() {
                env.put16(STACK0 - 64 + 2 * i as u32, *v & 0xff);
                env.put16(STACK3 - 64 + 2 * i as u32, *v & 0xff);
            }
            for event in [
                Event::Exception(Trap::pf(2, 0x123)),
                Event::External { vector },
                Event::Software { vector, short_form: false },
            ] {
                let mut after = cpu.clone();
                if try_deliver(&mut after, &mut env, event).is_err() {
                    prop_assert_eq!(&after, &cpu);
                }
            }
            let mut after = cpu.clone();
            if iret(&mut after, &mut env, operand_size).is_err() {
                prop_assert_eq!(&after, &cpu);
            }
            let _ = deliver(&mut cpu, &mut env, Event::External { vector });
        }
    }
}

#[test]
fn the_first_push_that_faults_decides_cr2() {
    let (mut cpu, mut env) = machine();
    env.put_gate(0x50, INTERRUPT_GATE32, 0, sel::CODE0, HANDLER);
    // EFLAGS would lie in the page above, CS and EIP in the one below.
    cpu.gpr[gpr::ESP] = STACK0 + 4;
    let event = Event::External { vector: 0x50 };
    env.absent.insert((STACK0 >> 12) - 1);
    assert_eq!(refused(&cpu, &mut env, event), Trap::pf(2, STACK0 - 4));
    env.absent.insert(STACK0 >> 12);
    assert_eq!(refused(&cpu, &mut env, event), Trap::pf(2, STACK0));
    cpu.gpr[gpr::ESP] = STACK0 + 12;
    assert_eq!(refused(&cpu, &mut env, event), Trap::pf(2, STACK0 + 8));
}
