//! Loads and transfers, each with its checks and error codes.

use super::descriptor::{Descriptor, code};
use super::flat_env::*;
use super::*;
use crate::cpum::{CpuState, SegAttr, Segment, cr0, eflags, gpr, seg};
use crate::env::{Env, PagingChange};
use crate::trap::Trap;

type Transfer<'a> = &'a dyn Fn(&mut CpuState, &mut dyn Env) -> Result<(), Trap>;

/// Expects an error and that nothing changed.
fn refused(cpu: &CpuState, env: &mut FlatEnv, transfer: Transfer<'_>) -> Trap {
    let mut after = cpu.clone();
    let trap = transfer(&mut after, env).expect_err("should be refused");
    assert_eq!(&after, cpu);
    trap
}

fn c(selector: u16) -> u32 {
    code(selector)
}

#[test]
fn descriptor_fields_are_taken_from_their_bits() {
    let d = Descriptor { low: 0x5678_ffff, high: 0x12cf_9a34 };
    assert_eq!((d.base(), d.limit(), d.dpl(), d.present()), (0x1234_5678, u32::MAX, 0, true));
    assert_eq!(d.attr().bits(), 0xc9a);
    assert!(d.is_code() && d.is_readable() && !d.is_conforming() && !d.is_writable_data());
    assert_eq!(Descriptor::from_bytes(d.to_bytes()), d);
    let small = Descriptor { low: 0x0000_1234, high: 0x000f_9200 };
    assert_eq!(small.limit(), 0xf_1234);
}

#[test]
fn a_data_load_sets_the_accessed_bit_in_memory_and_in_the_register() {
    let (mut cpu, mut env) = machine();
    load_segment(&mut cpu, &mut env, seg::ES, sel::DATA3).unwrap();
    assert_eq!(env.access_byte(sel::DATA3), 0xf3);
    assert_eq!(cpu.seg[seg::ES].attr.bits(), 0xcf3);
    assert!(cpu.seg[seg::ES].is_flat());
    // Once set it is not written again: a read-only GDT is then enough.
    env.read_only.insert(GDT >> 12);
    load_segment(&mut cpu, &mut env, seg::DS, sel::DATA3).unwrap();
    assert_eq!(
        refused(&cpu, &mut env, &|cpu, env| load_segment(cpu, env, seg::DS, sel::READ_ONLY0)).vector,
        14
    );
}

#[test]
fn data_loads_are_refused_with_the_right_codes() {
    for (cpl, selector, expected) in [
        (0, sel::BEYOND, Trap::gp(c(sel::BEYOND))),
        (0, sel::DATA0 | 3, Trap::gp(c(sel::DATA0))),
        (3, sel::DATA0, Trap::gp(c(sel::DATA0))),
        (0, sel::EXECUTE_ONLY0, Trap::gp(c(sel::EXECUTE_ONLY0))),
        (0, sel::TSS2, Trap::gp(c(sel::TSS2))),
        (0, sel::ABSENT_DATA0, Trap::np(c(sel::ABSENT_DATA0))),
        (0, 4, Trap::gp(4)),
    ] {
        let (mut cpu, mut env) = machine();
        enter_ring(&mut cpu, cpl);
        let trap = refused(&cpu, &mut env, &|cpu, env| load_segment(cpu, env, seg::DS, selector));
        assert_eq!(trap, expected, "{selector:#x} in ring {cpl}");
    }
}

#[test]
fn data_registers_take_null_readable_code_and_conforming_code() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    for selector in [0, 3, sel::CODE3, sel::CONFORMING0 | 3, sel::DATA3 & !3] {
        load_segment(&mut cpu, &mut env, seg::GS, selector).unwrap();
        assert_eq!(cpu.seg[seg::GS].selector, selector);
        assert_eq!(cpu.seg[seg::GS].present(), selector > 3);
    }
}

#[test]
fn the_stack_segment_is_checked_most() {
    for (cpl, selector, expected) in [
        (0, 0, Trap::gp(0)),
        (0, sel::READ_ONLY0, Trap::gp(c(sel::READ_ONLY0))),
        (0, sel::CODE0, Trap::gp(c(sel::CODE0))),
        (0, sel::DATA3, Trap::gp(c(sel::DATA3))),
        (0, sel::DATA0 | 3, Trap::gp(c(sel::DATA0))),
        (3, sel::DATA3 & !3, Trap::gp(c(sel::DATA3))),
        (0, sel::ABSENT_DATA0, Trap::ss(c(sel::ABSENT_DATA0))),
    ] {
        let (mut cpu, mut env) = machine();
        enter_ring(&mut cpu, cpl);
        let trap = refused(&cpu, &mut env, &|cpu, env| load_segment(cpu, env, seg::SS, selector));
        assert_eq!(trap, expected, "{selector:#x} in ring {cpl}");
    }
}

#[test]
fn the_ldt_serves_selectors_with_ti_within_its_limit() {
    let (mut cpu, mut env) = machine();
    load_ldtr(&mut cpu, &mut env, sel::LDT).unwrap();
    env.put(LDT + 8, &segment(0x1_0000, 0xfff, 0x92, 4).to_bytes());
    load_segment(&mut cpu, &mut env, seg::FS, 0x0c).unwrap();
    assert_eq!((cpu.seg[seg::FS].base, cpu.seg[seg::FS].limit), (0x1_0000, 0xfff));
    assert_eq!(env.memory[(LDT + 13) as usize], 0x93);
    assert_eq!(refused(&cpu, &mut env, &|cpu, env| load_segment(cpu, env, seg::FS, 0x14)), Trap::gp(0x14));
    load_ldtr(&mut cpu, &mut env, 0).unwrap();
    assert_eq!(refused(&cpu, &mut env, &|cpu, env| load_segment(cpu, env, seg::FS, 0x0c)), Trap::gp(0x0c));
}

#[test]
fn unreal_mode_keeps_limits_and_v86_has_its_own() {
    let (mut cpu, mut env) = machine();
    cpu.cr0 &= !cr0::PE;
    load_segment(&mut cpu, &mut env, seg::DS, 0x1234).unwrap();
    assert_eq!((cpu.seg[seg::DS].base, cpu.seg[seg::DS].limit), (0x1_2340, u32::MAX));
    cpu.seg[seg::ES] = Segment::default();
    load_segment(&mut cpu, &mut env, seg::ES, 2).unwrap();
    assert_eq!(cpu.seg[seg::ES], Segment::real(2));
    cpu.cr0 |= cr0::PE;
    cpu.eflags |= eflags::VM;
    load_segment(&mut cpu, &mut env, seg::DS, 0x1234).unwrap();
    assert_eq!((cpu.seg[seg::DS].limit, cpu.seg[seg::DS].attr.dpl()), (0xffff, 3));
}

#[test]
fn lldt_and_ltr_check_what_they_load() {
    let (cpu, mut env) = machine();
    for (selector, expected) in [
        (sel::DATA0, Trap::gp(c(sel::DATA0))),
        (sel::TSS2, Trap::gp(c(sel::TSS2))),
        (sel::BEYOND, Trap::gp(c(sel::BEYOND))),
        (0x0c, Trap::gp(0x0c)),
    ] {
        assert_eq!(refused(&cpu, &mut env, &|cpu, env| load_ldtr(cpu, env, selector)), expected);
    }
    for (selector, expected) in [
        (0, Trap::gp(0)),
        (sel::TSS, Trap::gp(c(sel::TSS))),
        (sel::LDT, Trap::gp(c(sel::LDT))),
        (0x0c, Trap::gp(0x0c)),
    ] {
        assert_eq!(refused(&cpu, &mut env, &|cpu, env| load_tr(cpu, env, selector)), expected);
    }
    let mut user = cpu.clone();
    enter_ring(&mut user, 3);
    assert_eq!(refused(&user, &mut env, &|cpu, env| load_ldtr(cpu, env, sel::LDT)), Trap::gp(0));
    let real = CpuState { cr0: 0, ..cpu };
    assert_eq!(refused(&real, &mut env, &|cpu, env| load_tr(cpu, env, sel::TSS2)), Trap::UD);
}

#[test]
fn ltr_marks_the_tss_busy() {
    let (mut cpu, mut env) = machine();
    load_tr(&mut cpu, &mut env, sel::TSS2).unwrap();
    assert_eq!((env.access_byte(sel::TSS2), cpu.tr.attr.type_bits(), cpu.tr.base), (0x8b, 0xb, TSS2));
}

#[test]
fn lar_lsl_verr_verw_tell_what_may_be_seen() {
    let (mut cpu, mut env) = machine();
    assert_eq!(load_access_rights(&cpu, &mut env, sel::DATA0), Ok(Some(0x00cf_9200)));
    assert_eq!(load_segment_limit(&cpu, &mut env, sel::DATA0), Ok(Some(u32::MAX)));
    assert_eq!(load_access_rights(&cpu, &mut env, sel::TASK_GATE).map(|v| v.is_some()), Ok(true));
    assert_eq!(load_segment_limit(&cpu, &mut env, sel::TASK_GATE), Ok(None));
    assert_eq!(load_segment_limit(&cpu, &mut env, sel::TSS), Ok(Some(0x67)));
    for none in [0, sel::BEYOND, sel::DATA0 | 3] {
        assert_eq!(load_access_rights(&cpu, &mut env, none), Ok(None));
    }
    assert_eq!(verify_segment(&cpu, &mut env, sel::READ_ONLY0, false), Ok(true));
    assert_eq!(verify_segment(&cpu, &mut env, sel::READ_ONLY0, true), Ok(false));
    assert_eq!(verify_segment(&cpu, &mut env, sel::EXECUTE_ONLY0, false), Ok(false));
    assert_eq!(verify_segment(&cpu, &mut env, sel::TSS, false), Ok(false));
    enter_ring(&mut cpu, 3);
    assert_eq!(verify_segment(&cpu, &mut env, sel::DATA0, false), Ok(false));
    assert_eq!(verify_segment(&cpu, &mut env, sel::CONFORMING0, false), Ok(true));
    assert_eq!(verify_segment(&cpu, &mut env, sel::DATA3, true), Ok(true));
    cpu.cr0 = 0;
    assert_eq!(verify_segment(&cpu, &mut env, sel::DATA3, true), Err(Trap::UD));
}

#[test]
fn io_needs_iopl_or_clear_bitmap_bits() {
    let (mut cpu, mut env) = machine();
    env.put16(TSS + 0x66, 0x68);
    assert_eq!(check_io(&cpu, &mut env, 0x3f8, 1), Ok(()));
    enter_ring(&mut cpu, 3);
    assert_eq!(check_io(&cpu, &mut env, 0, 1), Err(Trap::gp(0)), "the map lies beyond the limit");
    cpu.tr.limit = 0x68 + 2;
    env.put16(TSS + 0x68, 0xfe7f);
    assert_eq!(check_io(&cpu, &mut env, 7, 2), Ok(()), "bits 7 and 8 are clear");
    assert_eq!(check_io(&cpu, &mut env, 7, 4), Err(Trap::gp(0)));
    assert_eq!(check_io(&cpu, &mut env, 6, 1), Err(Trap::gp(0)));
    assert_eq!(check_io(&cpu, &mut env, 16, 1), Err(Trap::gp(0)), "one byte more than the map is read");
    cpu.eflags |= eflags::IOPL;
    assert_eq!(check_io(&cpu, &mut env, 6, 1), Ok(()));
    cpu.eflags |= eflags::VM;
    assert_eq!(check_io(&cpu, &mut env, 6, 1), Err(Trap::gp(0)), "in V86 IOPL does not help");
}

#[test]
fn far_jump_loads_cs_with_the_cpl() {
    let (mut cpu, mut env) = machine();
    far_jump(&mut cpu, &mut env, sel::CODE0, 0x9_1234, 2).unwrap();
    assert_eq!((cpu.eip, env.access_byte(sel::CODE0)), (0x1234, 0x9b));
    enter_ring(&mut cpu, 3);
    far_jump(&mut cpu, &mut env, sel::CONFORMING0, 0x9_1234, 4).unwrap();
    assert_eq!((cpu.eip, cpu.cpl, cpu.seg[seg::CS].selector), (0x9_1234, 3, sel::CONFORMING0 | 3));
    far_jump(&mut cpu, &mut env, sel::CODE3 & !3, 0, 4).unwrap();
    assert_eq!(cpu.seg[seg::CS].selector, sel::CODE3);
}

#[test]
fn far_jumps_and_calls_are_refused_with_the_right_codes() {
    for (cpl, selector, offset, expected) in [
        (0, 0, 0, Trap::gp(0)),
        (0, sel::BEYOND, 0, Trap::gp(c(sel::BEYOND))),
        (0, sel::DATA0, 0, Trap::gp(c(sel::DATA0))),
        (0, sel::CODE3, 0, Trap::gp(c(sel::CODE3))),
        (3, sel::CODE0, 0, Trap::gp(c(sel::CODE0))),
        (0, sel::CODE0 | 3, 0, Trap::gp(c(sel::CODE0))),
        (0, sel::ABSENT_CODE0, 0, Trap::np(c(sel::ABSENT_CODE0))),
        (0, sel::CODE16, 0x1_0000, Trap::gp(0)),
        (0, sel::LDT, 0, Trap::gp(c(sel::LDT))),
        (0, sel::TSS, 0, Trap::gp(c(sel::TSS))),
        (3, sel::TSS2, 0, Trap::gp(c(sel::TSS2))),
    ] {
        let (mut cpu, mut env) = machine();
        enter_ring(&mut cpu, cpl);
        let jump = refused(&cpu, &mut env, &|cpu, env| far_jump(cpu, env, selector, offset, 4));
        let call = refused(&cpu, &mut env, &|cpu, env| far_call(cpu, env, selector, offset, 4));
        assert_eq!((jump, call), (expected, expected), "{selector:#x} in ring {cpl}");
    }
}

#[test]
fn real_mode_far_call_and_return() {
    let mut cpu = CpuState::reset();
    let mut env = FlatEnv::new();
    cpu.gpr[gpr::ESP] = 0x200;
    cpu.seg[seg::CS] = Segment::real(0x1000);
    cpu.eip = 0x77;
    let before = cpu.clone();
    far_call(&mut cpu, &mut env, 0x2000, 0x5_0456, 2).unwrap();
    assert_eq!((cpu.seg[seg::CS].base, cpu.eip, env.get32(0x1fc)), (0x2_0000, 0x456, 0x1000_0077));
    far_return(&mut cpu, &mut env, 2, 0).unwrap();
    assert_eq!(cpu, before);
    let trap = refused(&cpu, &mut env, &|cpu, env| far_jump(cpu, env, 0x2000, 0x1_0000, 4));
    assert_eq!(trap, Trap::gp(0));
}

#[test]
fn far_call_and_return_in_the_same_ring() {
    let (mut cpu, mut env) = machine();
    let before = cpu.clone();
    far_call(&mut cpu, &mut env, sel::CODE16, 0x1234, 4).unwrap();
    assert_eq!(env.stack32(STACK0 - 8), [0x7777, u32::from(sel::CODE0)]);
    assert!(!cpu.seg[seg::CS].big());
    far_return(&mut cpu, &mut env, 4, 0x10).unwrap();
    assert_eq!((cpu.eip, cpu.gpr[gpr::ESP]), (before.eip, STACK0 + 0x10));
}

#[test]
fn far_call_with_no_room_on_the_stack_is_a_stack_fault() {
    let (mut cpu, mut env) = machine();
    cpu.seg[seg::SS].limit = 0x8ffa;
    let trap = refused(&cpu, &mut env, &|cpu, env| far_call(cpu, env, sel::CODE0, 0, 4));
    assert_eq!(trap, Trap::ss(0));
}

#[test]
fn expand_down_stacks_are_bounded_from_below() {
    let (mut cpu, mut env) = machine();
    cpu.seg[seg::SS].attr |= SegAttr::EXPAND_DOWN;
    cpu.seg[seg::SS].limit = STACK0 - 9;
    far_call(&mut cpu, &mut env, sel::CODE0, 0, 4).unwrap();
    let trap = refused(&cpu, &mut env, &|cpu, env| far_call(cpu, env, sel::CODE0, 0, 4));
    assert_eq!(trap, Trap::ss(0));
}

#[test]
fn a_call_gate_copies_parameters_and_the_return_drops_them() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    env.put_descriptor(sel::CALL_GATE, gate(0xc, 3, sel::CODE0, 0x1_2345, 2));
    env.put32(STACK3 - 8, 0x1111);
    env.put32(STACK3 - 4, 0x2222);
    cpu.gpr[gpr::ESP] -= 8;
    far_call(&mut cpu, &mut env, sel::CALL_GATE, 0xdead_beef, 4).unwrap();
    assert_eq!((cpu.cpl, cpu.eip, cpu.gpr[gpr::ESP]), (0, 0x1_2345, STACK0 - 24));
    assert_eq!(
        env.stack32(STACK0 - 24),
        [0x7777, u32::from(sel::CODE3), 0x1111, 0x2222, STACK3 - 8, u32::from(sel::DATA3)]
    );
    load_segment(&mut cpu, &mut env, seg::ES, sel::DATA0).unwrap();
    far_return(&mut cpu, &mut env, 4, 8).unwrap();
    assert_eq!((cpu.cpl, cpu.eip, cpu.gpr[gpr::ESP]), (3, 0x7777, STACK3));
    assert_eq!((cpu.seg[seg::ES].selector, cpu.seg[seg::DS].selector), (0, sel::DATA3));
}

#[test]
fn a_16_bit_call_gate_pushes_words() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    env.put_descriptor(sel::CALL_GATE, gate(4, 3, sel::CODE1 & !3, 0xffff_2345, 1));
    env.put16(STACK3 - 2, 0x1111);
    cpu.gpr[gpr::ESP] -= 2;
    far_call(&mut cpu, &mut env, sel::CALL_GATE, 0, 4).unwrap();
    assert_eq!((cpu.cpl, cpu.eip, cpu.gpr[gpr::ESP]), (1, 0x2345, STACK1 - 10));
    assert_eq!(env.get16(STACK1 - 6), 0x1111);
    assert_eq!(cpu.seg[seg::SS].selector, sel::DATA1);
}

#[test]
fn call_gates_are_refused_with_the_right_codes() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    for (found, jump, call) in [
        (gate(0xc, 0, sel::CODE0, 0, 0), Trap::gp(c(sel::CALL_GATE)), Trap::gp(c(sel::CALL_GATE))),
        (gate(0xc, 3, 0, 0, 0), Trap::gp(0), Trap::gp(0)),
        (gate(0xc, 3, sel::DATA0, 0, 0), Trap::gp(c(sel::DATA0)), Trap::gp(c(sel::DATA0))),
        (
            gate(0xc, 3, sel::ABSENT_CODE0, 0, 0),
            Trap::gp(c(sel::ABSENT_CODE0)),
            Trap::np(c(sel::ABSENT_CODE0)),
        ),
    ] {
        env.put_descriptor(sel::CALL_GATE, found);
        assert_eq!(refused(&cpu, &mut env, &|cpu, env| far_jump(cpu, env, sel::CALL_GATE, 0, 4)), jump);
        assert_eq!(refused(&cpu, &mut env, &|cpu, env| far_call(cpu, env, sel::CALL_GATE, 0, 4)), call);
    }
    // A jump through a gate does not change the ring.
    env.put_descriptor(sel::CALL_GATE, gate(0xc, 3, sel::CODE0, 0, 0));
    let trap = refused(&cpu, &mut env, &|cpu, env| far_jump(cpu, env, sel::CALL_GATE, 0, 4));
    assert_eq!(trap, Trap::gp(c(sel::CODE0)));
    env.put16(TSS + 8, sel::DATA3);
    let trap = refused(&cpu, &mut env, &|cpu, env| far_call(cpu, env, sel::CALL_GATE, 0, 4));
    assert_eq!(trap, Trap::ts(c(sel::DATA3)));
}

#[test]
fn far_returns_are_refused_with_the_right_codes() {
    for (cpl, cs, ss, expected) in [
        (0, 0, 0, Trap::gp(0)),
        (3, sel::CODE0, 0, Trap::gp(c(sel::CODE0))),
        (0, sel::DATA0, 0, Trap::gp(c(sel::DATA0))),
        (0, sel::ABSENT_CODE0, 0, Trap::np(c(sel::ABSENT_CODE0))),
        (0, sel::CODE3, 0, Trap::gp(0)),
        (0, sel::CODE3, sel::DATA0, Trap::gp(c(sel::DATA0))),
        (0, sel::CODE3, sel::BEYOND, Trap::gp(c(sel::BEYOND))),
    ] {
        let (mut cpu, mut env) = machine();
        enter_ring(&mut cpu, cpl);
        cpu.gpr[gpr::ESP] -= 16;
        for (i, v) in [0x10, u32::from(cs), 0x20, u32::from(ss)].into_iter().enumerate() {
            env.put32(cpu.gpr[gpr::ESP] + 4 * i as u32, v);
        }
        let trap = refused(&cpu, &mut env, &|cpu, env| far_return(cpu, env, 4, 0));
        assert_eq!(trap, expected, "{cs:#x}:{ss:#x} from ring {cpl}");
    }
}

fn put_task(env: &mut FlatEnv, cs: u16, data: u16, esp: u32) {
    for (at, value) in [(0x1c, 0x3_0000), (0x20, 0x4444), (0x24, 0x202), (0x38, esp)] {
        env.put32(TSS2 + at, value);
    }
    for (at, selector) in [(0x48, data), (0x4c, cs), (0x50, data), (0x54, data), (0x60, sel::LDT)] {
        env.put16(TSS2 + at, selector);
    }
}

#[test]
fn a_jump_to_a_tss_switches_tasks_without_nesting() {
    let (mut cpu, mut env) = machine();
    put_task(&mut env, sel::CODE3, sel::DATA3, STACK3);
    cpu.cr0 |= cr0::PG;
    far_jump(&mut cpu, &mut env, sel::TSS2, 0, 4).unwrap();
    assert_eq!((cpu.cpl, cpu.eip, cpu.eflags, cpu.gpr[gpr::ESP]), (3, 0x4444, 0x202, STACK3));
    assert_eq!((cpu.cr3, cpu.ldtr.base), (0x3_0000, LDT));
    assert_eq!(env.paging_changes, [PagingChange::Cr3]);
    assert_eq!((env.access_byte(sel::TSS), env.access_byte(sel::TSS2)), (0x89, 0x8b));
    assert_eq!((env.get16(TSS2), env.get32(TSS + 0x20)), (0, 0x7777));
    assert_eq!(env.get16(TSS + 0x4c), sel::CODE0);
}

#[test]
fn a_call_through_a_task_gate_nests() {
    let (mut cpu, mut env) = machine();
    enter_ring(&mut cpu, 3);
    put_task(&mut env, sel::CODE0, sel::DATA0, STACK0);
    far_call(&mut cpu, &mut env, sel::TASK_GATE, 0, 4).unwrap();
    assert_eq!((cpu.cpl, cpu.eflags, env.get16(TSS2)), (0, 0x202 | eflags::NT, sel::TSS));
}

#[test]
fn a_16_bit_task_has_word_registers() {
    let (mut cpu, mut env) = machine();
    for (at, value) in [(0x0e, 0x4444), (0x10, 0x202), (0x1a, 0x8000), (0x12, 0x5678)] {
        env.put16(TSS2 + at, value);
    }
    for (at, selector) in [(0x22, 0), (0x24, sel::CODE16), (0x26, sel::DATA16), (0x28, sel::DATA0)] {
        env.put16(TSS2 + at, selector);
    }
    far_call(&mut cpu, &mut env, sel::TSS16, 0, 4).unwrap();
    assert_eq!((cpu.eip, cpu.gpr[gpr::EAX] & 0xffff, cpu.gpr[gpr::ESP] & 0xffff), (0x4444, 0x5678, 0x8000));
    assert_eq!((cpu.seg[seg::CS].selector, cpu.tr.attr.type_bits()), (sel::CODE16, 3));
    assert_eq!(cpu.seg[seg::FS], Segment::default());
}

#[test]
fn a_task_with_bad_contents_is_refused_before_anything_is_written() {
    for (at, selector, expected) in [
        (0x4c, 0, Trap::ts(0)),
        (0x4c, sel::DATA0, Trap::ts(c(sel::DATA0))),
        (0x4c, sel::ABSENT_CODE0, Trap::np(c(sel::ABSENT_CODE0))),
        (0x50, 0, Trap::ts(0)),
        (0x50, sel::READ_ONLY0, Trap::ts(c(sel::READ_ONLY0))),
        (0x50, sel::ABSENT_DATA0, Trap::ss(c(sel::ABSENT_DATA0))),
        (0x54, sel::EXECUTE_ONLY0, Trap::ts(c(sel::EXECUTE_ONLY0))),
        (0x54, sel::ABSENT_DATA0, Trap::np(c(sel::ABSENT_DATA0))),
        (0x60, sel::DATA0, Trap::ts(c(sel::DATA0))),
    ] {
        let (cpu, mut env) = machine();
        put_task(&mut env, sel::CODE0, sel::DATA0, STACK0);
        env.put16(TSS2 + at, selector);
        let trap = refused(&cpu, &mut env, &|cpu, env| far_jump(cpu, env, sel::TSS2, 0, 4));
        assert_eq!(trap, expected, "{selector:#x} at {at:#x}");
        assert_eq!((env.access_byte(sel::TSS), env.get32(TSS + 0x20)), (0x8b, 0));
    }
    let (cpu, mut env) = machine();
    env.put_descriptor(sel::TSS2, segment(TSS2, 0x66, 0x89, 0));
    let trap = refused(&cpu, &mut env, &|cpu, env| far_jump(cpu, env, sel::TSS2, 0, 4));
    assert_eq!(trap, Trap::ts(c(sel::TSS2)));
}

mod random {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn transfers_never_panic_and_errors_change_nothing(
            table in proptest::collection::vec(any::<u8>(), 0x100),
            selector in 0u16..0x120,
            offset in any::<u32>(),
            cpl in prop_oneof![Just(0u8), Just(3)],
            esp in prop_oneof![any::<u32>(), STACK0 - 0x40..STACK0],
            mode in 0u8..3,
            release in any::<u16>(),
            ldt in any::<bool>(),
            frame in proptest::collection::vec(0u16..0x120, 16),
            size in prop_oneof![Just(2u8), Just(4)],
        ) {
            let (mut cpu, mut env) = machine();
            enter_ring(&mut cpu, cpl);
            if ldt { cpu.ldtr = segment(GDT, 0xff, 0x82, 0).segment(sel::LDT); }
            env.put(GDT, &table);
            for (i, v) in frame.iter().enumerate() { env.put16(STACK0 - 0x20 + 2 * i as u32, *v); }
            cpu.gpr[gpr::ESP] = esp;
            match mode {
                0 => cpu.cr0 &= !cr0::PE,
                1 => { cpu.eflags |= eflags::VM; cpu.cpl = 3 }
                _ => {}
            }
            let steps: [Transfer<'_>; 9] = [
                &|cpu, env| far_jump(cpu, env, selector, offset, size),
                &|cpu, env| far_call(cpu, env, selector, offset & 0xffff, size),
                &|cpu, env| far_return(cpu, env, size, release),
                &|cpu, env| load_segment(cpu, env, seg::SS, selector),
                &|cpu, env| load_segment(cpu, env, seg::DS, selector),
                &|cpu, env| load_ldtr(cpu, env, selector),
                &|cpu, env| load_tr(cpu, env, selector),
                &|cpu, env| load_access_rights(cpu, env, selector).map(drop),
                &|cpu, env| check_io(cpu, env, selector, size),
            ];
            for step in steps {
                let mut after = cpu.clone();
                if step(&mut after, &mut env).is_err() {
                    prop_assert_eq!(&after, &cpu);
                }
            }
        }
    }
}
