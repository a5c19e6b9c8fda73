use super::*;
use crate::interp::testing::flat_cpu;
use crate::machine::tests::machine;
use csam::GuestPhys;

const CODE: u32 = 0x1000;

/// A leader that runs this code in flat ring 0, and its follower.
fn pair(code: &[u8]) -> (CpuState, Machine, Lockstep) {
    let mut m = machine(1);
    m.write_ram(GuestPhys(CODE.into()), code);
    let cpu = flat_cpu(0, CODE, 0x8000);
    let time = HeldTime::new();
    let lockstep = Lockstep::new(cpu.clone(), &mut m, machine(1), time, u64::MAX);
    (cpu, m, lockstep)
}

fn run(cpu: &mut CpuState, m: &mut Machine, instructions: u32) {
    for _ in 0..instructions {
        assert_eq!(interp::step(cpu, m), Step::Done);
    }
}

/// `1: inc eax; in al, 60h; rdtsc; mov [2000h], eax; jmp 1b`
const LOOP: [u8; 12] = [0x40, 0xe4, 0x60, 0x0f, 0x31, 0xa3, 0, 0x20, 0, 0, 0xeb, 0xf4];

#[test]
fn a_follower_with_the_same_inputs_comes_to_the_same_places() {
    let (mut cpu, mut m, mut lockstep) = pair(&LOOP);
    for n in 1..200 {
        run(&mut cpu, &mut m, n % 7);
        lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap();
    }
    lockstep.compare(&cpu, &mut m, 0, 0, true, None).unwrap();
    assert!(lockstep.instructions >= 590 && lockstep.compared == (200, 1), "{}", lockstep.summary());
}

#[test]
fn a_wrong_register_is_a_difference_with_the_instructions_that_led_there() {
    let (mut cpu, mut m, mut lockstep) = pair(&LOOP);
    run(&mut cpu, &mut m, 9);
    lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap();
    run(&mut cpu, &mut m, 2);
    cpu.gpr[5] = 1;
    let Difference(text) = lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap_err();
    assert!(text.contains("rdtsc") && text.contains("00001001  in al,60h"), "{text}");
    assert!(text.contains("where the other had nothing"), "{text}");
}

#[test]
fn flags_and_segments_count_where_the_general_registers_agree() {
    let (mut cpu, mut m, mut lockstep) = pair(&LOOP);
    run(&mut cpu, &mut m, 1);
    cpu.eflags ^= eflags::CF;
    cpu.seg[4].base = 9;
    let Difference(text) = lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap_err();
    assert!(text.contains("wanted") || text.contains("eflags") || text.contains("in of"), "{text}");
}

#[test]
fn an_output_that_differs_is_told_at_once() {
    // `out 80h, al; hlt`
    let (mut cpu, mut m, mut lockstep) = pair(&[0xe6, 0x80, 0xf4]);
    run(&mut cpu, &mut m, 1);
    if let Tape::Record(inputs) = &mut m.tape {
        inputs[0] = crate::tape::Input::Out { port: 0x80, size: 1, value: 0x55 };
    }
    let Difference(text) = lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap_err();
    assert!(text.contains("value: 55") && text.contains("value: 0"), "{text}");
}

#[test]
fn a_leader_stopped_between_two_iterations_is_found_there() {
    // `rep stosb; hlt`
    let (mut cpu, mut m, mut lockstep) = pair(&[0xf3, 0xaa, 0xf4]);
    (cpu.gpr[1], cpu.gpr[7]) = (100, 0x3000);
    (lockstep.cpu.gpr[1], lockstep.cpu.gpr[7]) = (100, 0x3000);
    m.one_iteration = true;
    run(&mut cpu, &mut m, 37);
    assert_eq!((cpu.eip, cpu.gpr[1]), (CODE, 63));
    lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap();
    run(&mut cpu, &mut m, 63);
    lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap();
    lockstep.compare(&cpu, &mut m, 0, 0, true, None).unwrap();
}

#[test]
fn a_place_with_the_same_registers_and_other_memory_is_not_the_place() {
    // `1: inc dword [2000h]; jmp 1b`: once the flags are those of any number, registers never change.
    let (mut cpu, mut m, mut lockstep) = pair(&[0xff, 0x05, 0, 0x20, 0, 0, 0xeb, 0xf8]);
    run(&mut cpu, &mut m, 2 * 0x3333);
    lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap();
    assert_eq!(lockstep.instructions, 2 * 0x3333);
}

#[test]
fn memory_that_differs_is_a_difference_even_where_registers_agree() {
    let (mut cpu, mut m, mut lockstep) = pair(&LOOP);
    run(&mut cpu, &mut m, 5);
    m.write_ram(GuestPhys(0x4_2000), &[1]);
    lockstep.compare(&cpu, &mut m, 0, 0, false, None).unwrap();
    cpu.eip = CODE;
    let Difference(text) = lockstep.compare(&cpu, &mut m, 0, 0, true, None).unwrap_err();
    assert!(text.contains("page 00042000: +000 00000001 / 00000000"), "{text}");
}
