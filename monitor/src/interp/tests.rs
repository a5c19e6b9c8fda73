//! Statements about the interpreter that need no real CPU: modes, faults, rollback, restarts.

use super::testing::{FlatEnv, flat_cpu, real_cpu};
use super::{Step, step};
use crate::cpum::{CpuState, Shadow, cr0, cr4, eflags, gpr, seg};
use crate::env::PagingChange;
use crate::trap::{Event, Trap};

fn machine(code: &[u8]) -> (CpuState, FlatEnv) {
    let mut env = FlatEnv::new(0, 0x10000);
    env.put(0x1000, code);
    (flat_cpu(0, 0x1000, 0x8000), env)
}

fn real(code: &[u8]) -> (CpuState, FlatEnv) {
    let mut env = FlatEnv::new(0, 0x20000);
    env.put(0x1000, code);
    (real_cpu(0x1000, 0x8000), env)
}

fn raised(trap: Trap) -> Step {
    Step::Raise(Event::Exception(trap))
}

#[test]
fn an_instruction_of_16_bytes_is_general_protection() {
    let (mut cpu, mut env) = machine(&[0x66; 16]);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
    assert_eq!(cpu.eip, 0x1000);
}

#[test]
fn an_instruction_of_15_bytes_is_fine() {
    let mut code = [0x66u8; 15];
    code[14] = 0x90;
    let (mut cpu, mut env) = machine(&code);
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(cpu.eip, 0x100f);
}

#[test]
fn a_fetch_that_crosses_into_a_missing_page_faults_there() {
    let mut env = FlatEnv::new(0, 0x2000);
    env.put(0x1ffe, &[0xb8, 1]);
    let mut cpu = flat_cpu(3, 0x1ffe, 0x1800);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::pf(4, 0x2000)));
    assert_eq!(cpu.eip, 0x1ffe);
}

#[test]
fn a_fetch_beyond_the_code_limit_is_general_protection() {
    let (mut cpu, mut env) = machine(&[0xb8, 1, 2, 3, 4]);
    cpu.seg[seg::CS].limit = 0x1002;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
}

#[test]
fn lock_on_a_register_destination_is_undefined() {
    let (mut cpu, mut env) = machine(&[0xf0, 0x01, 0xc8]);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::UD));
}

#[test]
fn a_faulting_push_leaves_esp_alone() {
    let (mut cpu, mut env) = machine(&[0x50]);
    cpu.gpr[gpr::ESP] = 0x20000;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::pf(2, 0x1fffc)));
    assert_eq!(cpu.gpr[gpr::ESP], 0x20000);
}

#[test]
fn a_read_modify_write_of_a_missing_page_faults_as_a_write() {
    // add dword [0x20000], eax
    let (mut cpu, mut env) = machine(&[0x01, 0x05, 0, 0, 2, 0]);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::pf(2, 0x20000)));
}

#[test]
fn pop_to_memory_addressed_by_esp_uses_the_new_esp() {
    // pop dword [esp]
    let (mut cpu, mut env) = machine(&[0x8f, 0x04, 0x24]);
    env.put(0x8000, &7u32.to_le_bytes());
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(env.get(0x8004, 4), 7u32.to_le_bytes());
    assert_eq!(cpu.gpr[gpr::ESP], 0x8004);
}

#[test]
fn rep_movs_stops_exactly_at_the_faulting_element() {
    let (mut cpu, mut env) = machine(&[0xf3, 0xa5]);
    cpu.gpr[gpr::ESI] = 0x2000;
    cpu.gpr[gpr::EDI] = 0x10000 - 20;
    cpu.gpr[gpr::ECX] = 10;
    env.put(0x2000, &[0x5a; 40]);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::pf(2, 0x10000)));
    assert_eq!((cpu.gpr[gpr::ECX], cpu.gpr[gpr::ESI], cpu.gpr[gpr::EDI]), (5, 0x2014, 0x10000));
    assert_eq!(cpu.eip, 0x1000);
    assert_eq!(env.get(0x10000 - 20, 20), [0x5a; 20]);
}

#[test]
fn rep_movs_onto_itself_repeats_the_pattern() {
    let (mut cpu, mut env) = machine(&[0xf3, 0xa4]);
    env.put(0x2000, &[1, 2, 3]);
    cpu.gpr[gpr::ESI] = 0x2000;
    cpu.gpr[gpr::EDI] = 0x2003;
    cpu.gpr[gpr::ECX] = 6;
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(env.get(0x2000, 9), [1, 2, 3, 1, 2, 3, 1, 2, 3]);
}

#[test]
fn a_long_rep_stos_takes_several_steps_and_stays_at_the_instruction() {
    let (mut cpu, mut env) = machine(&[0xf3, 0xab]);
    cpu.gpr[gpr::EDI] = 0x2000;
    cpu.gpr[gpr::ECX] = 3000;
    cpu.gpr[gpr::EAX] = 0x0102_0304;
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(cpu.eip, 0x1000);
    assert_eq!(cpu.gpr[gpr::ECX], 3000 - 1024);
    while cpu.eip == 0x1000 {
        assert_eq!(step(&mut cpu, &mut env), Step::Done);
    }
    assert_eq!(cpu.gpr[gpr::ECX], 0);
    assert_eq!(cpu.gpr[gpr::EDI], 0x2000 + 12000);
    assert_eq!(env.get(0x2000 + 11996, 8), [4, 3, 2, 1, 0, 0, 0, 0]);
}

#[test]
fn repne_scas_finds_and_stops_after_the_match() {
    let (mut cpu, mut env) = machine(&[0xf2, 0xae]);
    env.put(0x2000, b"subring");
    cpu.gpr[gpr::EDI] = 0x2000;
    cpu.gpr[gpr::ECX] = 7;
    cpu.gpr[gpr::EAX] = u32::from(b'r');
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!((cpu.gpr[gpr::ECX], cpu.gpr[gpr::EDI]), (3, 0x2004));
    assert_ne!(cpu.eflags & eflags::ZF, 0);
}

#[test]
fn real_mode_addresses_wrap_at_64_kib() {
    // mov al, [bx+si]
    let (mut cpu, mut env) = real(&[0x8a, 0x00]);
    cpu.gpr[gpr::EBX] = 0xfff0;
    cpu.gpr[gpr::ESI] = 0x20;
    env.put(0x10, &[0x77]);
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(cpu.gpr[gpr::EAX], 0x77);
}

#[test]
fn a_word_at_offset_ffff_exceeds_a_real_mode_segment() {
    // mov ax, [0xffff]
    let (mut cpu, mut env) = real(&[0xa1, 0xff, 0xff]);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
}

#[test]
fn an_expand_down_segment_ends_where_its_limit_says() {
    // mov eax, [0x2000]
    for (limit, ok) in [(0x1fff, true), (0x2000, false)] {
        let (mut cpu, mut env) = machine(&[0xa1, 0x00, 0x20, 0, 0]);
        let ds = &mut cpu.seg[seg::DS];
        ds.attr |= crate::cpum::SegAttr::EXPAND_DOWN;
        ds.limit = limit;
        let want = if ok { Step::Done } else { raised(Trap::gp(0)) };
        assert_eq!(step(&mut cpu, &mut env), want);
    }
}

#[test]
fn a_null_segment_faults_on_use() {
    let (mut cpu, mut env) = machine(&[0xa1, 0x00, 0x20, 0, 0]);
    cpu.seg[seg::DS] = crate::cpum::Segment::default();
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
}

#[test]
fn writing_through_a_code_segment_is_general_protection() {
    // mov cs:[0x2000], eax
    let (mut cpu, mut env) = machine(&[0x2e, 0xa3, 0x00, 0x20, 0, 0]);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
}

#[test]
fn sti_holds_interrupts_back_for_one_instruction() {
    let (mut cpu, mut env) = machine(&[0xfb, 0x90]);
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(cpu.shadow, Shadow::Sti);
    assert!(!cpu.interruptible());
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert!(cpu.interruptible());
}

#[test]
fn cli_at_user_level_needs_iopl() {
    let mut env = FlatEnv::new(0, 0x10000);
    env.put(0x1000, &[0xfa]);
    let mut cpu = flat_cpu(3, 0x1000, 0x8000);
    cpu.eflags |= eflags::IF;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
    cpu.eflags |= eflags::IOPL;
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(cpu.eflags & eflags::IF, 0);
}

#[test]
fn popf_at_user_level_keeps_if_and_iopl() {
    let mut env = FlatEnv::new(0, 0x10000);
    env.put(0x1000, &[0x9d]);
    let mut cpu = flat_cpu(3, 0x1000, 0x8000);
    cpu.eflags |= eflags::IF;
    env.put(0x8000, &(eflags::IOPL | eflags::DF | eflags::VM).to_le_bytes());
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(cpu.eflags, eflags::FIXED | eflags::IF | eflags::DF);
}

#[test]
fn pushf_in_v86_needs_iopl_3() {
    let (mut cpu, mut env) = real(&[0x9c]);
    cpu.cr0 |= cr0::PE;
    cpu.eflags |= eflags::VM;
    cpu.cpl = 3;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
    cpu.eflags |= eflags::IOPL;
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
}

#[test]
fn single_step_traps_after_the_instruction() {
    let (mut cpu, mut env) = machine(&[0x40]);
    cpu.eflags |= eflags::TF;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::DB));
    assert_eq!((cpu.eip, cpu.gpr[gpr::EAX]), (0x1001, 1));
    assert_ne!(cpu.dr[6] & 1 << 14, 0);
}

#[test]
fn int_n_is_raised_with_eip_after_it() {
    let (mut cpu, mut env) = machine(&[0xcd, 0x80]);
    let want = Step::Raise(Event::Software { vector: 0x80, short_form: false });
    assert_eq!(step(&mut cpu, &mut env), want);
    assert_eq!(cpu.eip, 0x1002);
}

#[test]
fn hlt_halts_after_itself_and_only_at_level_0() {
    let (mut cpu, mut env) = machine(&[0xf4]);
    assert_eq!(step(&mut cpu, &mut env), Step::Halted);
    assert!(cpu.halted);
    assert_eq!(cpu.eip, 0x1001);
    let mut user = flat_cpu(3, 0x1000, 0x8000);
    assert_eq!(step(&mut user, &mut env), raised(Trap::gp(0)));
}

#[test]
fn paging_without_protection_is_refused() {
    let (mut cpu, mut env) = real(&[0x0f, 0x22, 0xc0]); // mov cr0, eax
    cpu.gpr[gpr::EAX] = cr0::PG;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
    assert!(env.paging.is_empty());
}

#[test]
fn loading_cr3_under_pae_loads_the_page_directory_pointers() {
    let (mut cpu, mut env) = machine(&[0x0f, 0x22, 0xd8]); // mov cr3, eax
    cpu.cr0 |= cr0::PG;
    cpu.cr4 = cr4::PAE;
    cpu.gpr[gpr::EAX] = 0x3020;
    env.put(0x3020, &0x5001u64.to_le_bytes());
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(cpu.pdpte, [0x5001, 0, 0, 0]);
    assert_eq!(env.paging, [PagingChange::Cr3]);
    for (reserved, own_doing) in [(2, false), (0x20, true)] {
        env.put(0x3028, &(0x5001u64 | reserved).to_le_bytes());
        cpu.eip = 0x1000;
        assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
        env.marks_pdptes = true;
        cpu.eip = 0x1000;
        assert_eq!(step(&mut cpu, &mut env) == Step::Done, own_doing, "{reserved:x}");
        env.marks_pdptes = false;
    }
}

#[test]
fn unknown_cr4_bits_are_refused() {
    let (mut cpu, mut env) = machine(&[0x0f, 0x22, 0xe0]); // mov cr4, eax
    cpu.gpr[gpr::EAX] = 1 << 18;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
}

#[test]
fn a_16_bit_lgdt_takes_24_base_bits() {
    let (mut cpu, mut env) = real(&[0x0f, 0x01, 0x16, 0x00, 0x20]); // lgdt [0x2000]
    env.put(0x2000, &[0x34, 0x12, 1, 2, 3, 4]);
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!((cpu.gdtr.base, cpu.gdtr.limit), (0x0003_0201, 0x1234));
}

#[test]
fn selectors_do_not_exist_in_real_mode() {
    for code in [[0x0f, 0x00, 0xc0], [0x0f, 0x02, 0xc0], [0x63, 0xc0, 0x90]] {
        let (mut cpu, mut env) = real(&code);
        assert_eq!(step(&mut cpu, &mut env), raised(Trap::UD));
    }
}

#[test]
fn an_unaligned_access_at_user_level_with_ac_is_an_alignment_check() {
    let mut env = FlatEnv::new(0, 0x10000);
    env.put(0x1000, &[0xa1, 0x01, 0x20, 0, 0]);
    let mut cpu = flat_cpu(3, 0x1000, 0x8000);
    cpu.cr0 |= cr0::AM;
    cpu.eflags |= eflags::AC;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::ac()));
}

#[test]
fn bit_test_with_a_register_index_reaches_below_its_operand() {
    // bts [0x2004], eax with eax = -1: bit 31 of the dword before.
    let (mut cpu, mut env) = machine(&[0x0f, 0xab, 0x05, 0x04, 0x20, 0, 0]);
    cpu.gpr[gpr::EAX] = u32::MAX;
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    assert_eq!(env.get(0x2000, 8), [0, 0, 0, 0x80, 0, 0, 0, 0]);
}

#[test]
fn hidden_instructions_are_undefined() {
    let hidden: [&[u8]; 6] = [
        &[0x0f, 0x34],       // sysenter
        &[0x0f, 0x05],       // syscall
        &[0x0f, 0x01, 0xd0], // xgetbv
        &[0x0f, 0x01, 0xc8], // monitor
        &[0x0f, 0x0b],       // ud2
        &[0xc5, 0xf8, 0x77], // vzeroupper
    ];
    for code in hidden {
        let (mut cpu, mut env) = machine(code);
        assert_eq!(step(&mut cpu, &mut env), raised(Trap::UD), "{code:02x?}");
    }
}

fn fpu_machine(code: &[u8]) -> (CpuState, FlatEnv) {
    let (mut cpu, env) = machine(code);
    cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT;
    (cpu, env)
}

#[test]
fn task_switched_makes_fpu_instructions_device_not_available() {
    let codes: [&[u8]; 4] = [&[0xd9, 0xe8], &[0x0f, 0x77], &[0x0f, 0x58, 0xc1], &[0x0f, 0xae, 0x00]];
    for code in codes {
        let (mut cpu, mut env) = fpu_machine(code);
        cpu.cr0 |= cr0::TS;
        assert_eq!(step(&mut cpu, &mut env), raised(Trap::NM), "{code:02x?}");
    }
}

#[test]
fn wait_looks_at_ts_only_with_mp() {
    let (mut cpu, mut env) = fpu_machine(&[0x9b]);
    cpu.cr0 |= cr0::TS;
    assert_eq!(step(&mut cpu, &mut env), Step::Done);
    cpu.eip = 0x1000;
    cpu.cr0 |= cr0::MP;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::NM));
}

#[test]
fn sse_without_osfxsr_or_with_em_is_undefined() {
    let (mut cpu, mut env) = machine(&[0x0f, 0x58, 0xc1]);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::UD));
    cpu.cr4 = cr4::OSFXSR;
    cpu.cr0 |= cr0::EM;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::UD));
}

#[test]
fn an_unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
    // fldz; fldz; fdivp (invalid, unmasked); fnstsw ax; fld1
    let (mut cpu, mut env) = fpu_machine(&[0xd9, 0xee, 0xd9, 0xee, 0xde, 0xf9, 0xdf, 0xe0, 0xd9, 0xe8]);
    cpu.fpu.0[0] = 0x7e;
    for _ in 0..4 {
        assert_eq!(step(&mut cpu, &mut env), Step::Done);
    }
    assert_eq!(cpu.gpr[gpr::EAX] & 0x81, 0x81);
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::MF));
    assert_eq!(cpu.eip, 0x1008);
}

#[test]
fn an_unmasked_sse_exception_drops_the_result() {
    let (mut cpu, mut env) = fpu_machine(&[0xf3, 0x0f, 0x5e, 0xc1]); // divss xmm0, xmm1
    cpu.fpu.0[160..164].copy_from_slice(&1f32.to_le_bytes());
    cpu.fpu.0[24..28].copy_from_slice(&0x1d80u32.to_le_bytes());
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::XM));
    assert_eq!(cpu.fpu.0[160..164], 1f32.to_le_bytes());
    assert_eq!(cpu.fpu.0[24], 0x84);
    cpu.cr4 = cr4::OSFXSR;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::UD));
}

#[test]
fn what_fnsave_wrote_frstor_brings_back_in_both_formats() {
    // fld1; fldz; fnsave [0x2000]; frstor [0x2000], with 32-bit and with 16-bit operands
    let formats: [&[u8]; 2] = [
        &[0xd9, 0xe8, 0xd9, 0xee, 0xdd, 0x35, 0, 0x20, 0, 0, 0xdd, 0x25, 0, 0x20, 0, 0],
        &[0xd9, 0xe8, 0xd9, 0xee, 0x66, 0xdd, 0x35, 0, 0x20, 0, 0, 0x66, 0xdd, 0x25, 0, 0x20, 0, 0],
    ];
    for code in formats {
        let (mut cpu, mut env) = fpu_machine(code);
        step(&mut cpu, &mut env);
        step(&mut cpu, &mut env);
        let before = cpu.fpu;
        assert_eq!(step(&mut cpu, &mut env), Step::Done);
        assert_eq!((cpu.fpu.0[2], cpu.fpu.0[4]), (0, 0), "initialised by fnsave");
        assert_eq!(step(&mut cpu, &mut env), Step::Done);
        assert_eq!(cpu.fpu.0[..6], before.0[..6]);
        assert_eq!(cpu.fpu.0[32..160], before.0[32..160]);
    }
}

#[test]
fn fxsave_needs_an_aligned_operand() {
    let (mut cpu, mut env) = fpu_machine(&[0x0f, 0xae, 0x00]);
    cpu.gpr[gpr::EAX] = 0x2008;
    assert_eq!(step(&mut cpu, &mut env), raised(Trap::gp(0)));
}
