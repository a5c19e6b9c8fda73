//! What leaves a virtual machine, and that nothing is lost on the way: port, MMIO and MSR accesses, halts, kicks.
//!
//! Needs a KVM with hardware behind it: `tests/lab/run` has one anywhere.

use host_driver_shim::kvm::{KvmExit, KvmState, KvmVm, KvmWorth, kvm_segment, probe};
use host_driver_shim::ram::GuestRam;
use host_driver_shim::world::Kicker;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const CODE: u64 = 0x1000;
const SIZE: u64 = 0x1_0000;

/// A machine in flat protected mode at `code`, if there is hardware.
fn machine(code: &[u8]) -> Option<(KvmVm, GuestRam)> {
    if !matches!(probe(), KvmWorth::Hardware { .. }) {
        eprintln!("SKIP: kvm_run: there is no hardware KVM here: {}", probe());
        return None;
    }
    let ram = GuestRam::new(SIZE).unwrap();
    ram.write(CODE, code).unwrap();
    let mut vm = KvmVm::new(&ram, &[]).unwrap();
    let was = vm.state().unwrap();
    let mut new: KvmState = was;
    new.regs.rip = CODE;
    new.regs.rsp = 0x8000;
    new.sregs.cr0 |= 1;
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    new.sregs.cs = flat(8, 11);
    let data = flat(0x10, 3);
    let s = &mut new.sregs;
    (s.ss, s.ds, s.es, s.fs, s.gs) = (data, data, data, data, data);
    vm.set_state(&was, &new).unwrap();
    Some((vm, ram))
}

#[test]
fn ports_of_every_width_and_strings_leave_with_their_bytes() {
    // mov dx, 3f8h; mov eax, 44332211h; out dx, al; out dx, ax; out dx, eax; in al, 60h;
    // mov esi, 2000h; mov ecx, 3; cld; rep outsw; hlt
    let code = [
        0x66, 0xba, 0xf8, 3, 0xb8, 0x11, 0x22, 0x33, 0x44, 0xee, 0x66, 0xef, 0xef, 0xe4, 0x60, 0xbe, 0, 0x20,
        0, 0, 0xb9, 3, 0, 0, 0, 0xfc, 0xf3, 0x66, 0x6f, 0xf4,
    ];
    let Some((mut vm, ram)) = machine(&code) else { return };
    ram.write(0x2000, b"abcdef").unwrap();
    for (size, bytes) in [(1, &[0x11][..]), (2, &[0x11, 0x22]), (4, &[0x11, 0x22, 0x33, 0x44])] {
        assert_eq!(vm.run().unwrap(), KvmExit::PortOut { port: 0x3f8, size, count: 1 });
        assert_eq!(vm.port_data(), bytes);
    }
    assert_eq!(vm.run().unwrap(), KvmExit::PortIn { port: 0x60, size: 1, count: 1 });
    vm.answer_port(&[0x5a]);
    assert_eq!(vm.complete().unwrap(), None);
    assert_eq!(vm.state().unwrap().regs.rax, 0x4433_225a, "completed without a further instruction");
    let mut text = Vec::new();
    loop {
        match vm.run().unwrap() {
            KvmExit::PortOut { port: 0x3f8, size: 2, .. } => text.extend(vm.port_data()),
            KvmExit::Halt => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(text, b"abcdef");
    assert_eq!(vm.state().unwrap().regs.rip, CODE + code.len() as u64);
}

#[test]
fn what_is_no_ram_is_mmio_and_every_msr_leaves() {
    // mov eax, [f0000000h]; mov [f0000004h], eax; mov ecx, 10h; rdmsr; mov ecx, c0000080h; wrmsr; hlt
    let code = [
        0xa1, 0, 0, 0, 0xf0, 0xa3, 4, 0, 0, 0xf0, 0xb9, 0x10, 0, 0, 0, 0x0f, 0x32, 0xb9, 0x80, 0, 0, 0xc0,
        0x0f, 0x30, 0xf4,
    ];
    let Some((mut vm, _ram)) = machine(&code) else { return };
    assert_eq!(vm.run().unwrap(), KvmExit::MmioRead { at: 0xf000_0000, len: 4 });
    vm.answer_mmio(&[1, 2, 3, 4]);
    let KvmExit::MmioWrite { at: 0xf000_0004, data, len: 4 } = vm.run().unwrap() else { panic!("no write") };
    assert_eq!(data[..4], [1, 2, 3, 4]);
    if !vm.msrs_leave() {
        eprintln!("SKIP: kvm_run: this kernel does not pass MSR accesses on");
        return;
    }
    assert_eq!(vm.run().unwrap(), KvmExit::ReadMsr { msr: 0x10 });
    vm.answer_msr(Some(0x1122_3344_5566_7788));
    assert_eq!(vm.run().unwrap(), KvmExit::WriteMsr { msr: 0xc000_0080, value: 0x1122_3344_5566_7788 });
    vm.answer_msr(None);
    assert_eq!(vm.complete().unwrap(), None);
    let exception = vm.state().unwrap().events.exception;
    assert_eq!((exception.nr, exception.error_code), (13, 0), "refused: #GP(0) is on its way");
}

#[test]
fn a_storm_of_kicks_neither_loses_an_instruction_nor_a_kick() {
    const TURNS: u32 = 2_000_000;
    // mov ecx, TURNS; xor eax, eax; 1: inc eax; dec ecx; jnz 1b; hlt
    let mut code = vec![0xb9];
    code.extend(TURNS.to_le_bytes());
    code.extend([0x31, 0xc0, 0x40, 0x49, 0x75, 0xfc, 0xf4]);
    let Some((mut vm, _ram)) = machine(&code) else { return };
    let kicker = vm.kicker();
    // A kick before the run is not slept through.
    kicker.kick();
    assert_eq!(vm.run().unwrap(), KvmExit::Interrupted);
    let stop = Arc::new(AtomicBool::new(false));
    let storm = std::thread::spawn({
        let stop = stop.clone();
        move || {
            while !stop.load(Ordering::SeqCst) {
                kicker.kick();
                std::thread::yield_now();
            }
        }
    });
    let mut kicks = 0;
    let end = loop {
        match vm.run() {
            Ok(KvmExit::Interrupted) => kicks += 1,
            other => break other,
        }
        if kicks == 2000 {
            stop.store(true, Ordering::SeqCst);
        }
    };
    stop.store(true, Ordering::SeqCst);
    storm.join().unwrap();
    assert_eq!(end.unwrap(), KvmExit::Halt);
    assert_eq!(vm.state().unwrap().regs.rax, TURNS.into());
}

#[test]
fn memory_that_kvm_cannot_have_is_an_error_and_a_kicker_outlives_its_machine() {
    let Some((vm, _ram)) = machine(&[0xf4]) else { return };
    let kicker = vm.kicker();
    drop(vm);
    kicker.kick();
    let large = GuestRam::new(0xff00_0000).unwrap();
    assert!(KvmVm::new(&large, &[]).is_err());
}
