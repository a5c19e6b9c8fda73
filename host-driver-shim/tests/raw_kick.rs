//! A kick makes a world leave guest code, is never lost, and disturbs nothing.

mod common;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::*;
use host_driver_shim::raw::{GATE, GATE_REASON};
use host_driver_shim::world::{World, WorldExit};

fn pause(loops: u32) {
    for _ in 0..loops {
        std::hint::spin_loop();
    }
}

#[test]
fn a_kick_before_a_run_ends_the_run_before_it_begins() {
    // inc eax; hlt
    let mut g = Guest::with(&[0x40, 0xf4]);
    let kicker = g.world.kicker();
    kicker.kick();
    kicker.kick();
    let mut r = regs();
    assert_eq!((g.run(&mut r), r), (WorldExit::Kick, regs()));
    assert_eq!((g.run(&mut r), r.gpr[EAX]), (GP, 1), "kicks before a run count as one");
}

#[test]
fn a_thousand_kicks_of_a_spinning_guest_are_a_thousand_exits() {
    // 1: inc eax; mov ecx, eax; cmp ecx, eax; je 1b; ud2
    let mut g = Guest::with(&[0x40, 0x89, 0xc1, 0x39, 0xc1, 0x74, 0xf9, 0x0f, 0x0b]);
    let kicker = g.world.kicker();
    let (go, gone) = channel::<u32>();
    let thread = std::thread::spawn(move || {
        while let Ok(n) = gone.recv() {
            pause(n);
            kicker.kick();
        }
    });
    let mut r = regs();
    r.gpr[EBX] = 0xb0b0_b0b0;
    for i in 0..1000u32 {
        go.send(i.wrapping_mul(2_654_435_761) >> 20).unwrap();
        assert_eq!(g.run(&mut r), WorldExit::Kick, "kick {i}");
        assert!((CODE..CODE + 7).contains(&r.eip), "{:#x}", r.eip);
        assert_eq!((r.gpr[EBX], r.gpr[ESP]), (0xb0b0_b0b0, STACK));
    }
    drop(go);
    thread.join().unwrap();
    assert!(r.gpr[EAX] > 0);
}

#[test]
fn a_storm_of_kicks_loses_neither_state_nor_other_exits() {
    // 1: inc esi; mov dword ss:[VCPU+GATE_REASON], 7; jmp far ss:[VCPU+GATE]; 2: hlt
    let mut c = vec![0x46, 0x36, 0xc7, 0x05];
    c.extend((VCPU + GATE_REASON).to_le_bytes());
    c.extend(7u32.to_le_bytes());
    c.extend([0x36, 0xff, 0x2d]);
    c.extend((VCPU + GATE).to_le_bytes());
    let hlt = CODE + c.len() as u32;
    c.push(0xf4);
    let mut g = Guest::with(&c);
    let stop = Arc::new(AtomicBool::new(false));
    let (kicker, halt) = (g.world.kicker(), Arc::clone(&stop));
    let thread = std::thread::spawn(move || {
        let mut n = 0u32;
        while !halt.load(Ordering::Relaxed) {
            kicker.kick();
            n = n.wrapping_add(1);
            pause(n % 4000);
        }
    });
    let mut r = regs();
    r.gpr[EBX] = 0x1234_5678;
    let (mut gates, mut faults, mut kicks) = (0, 0, 0);
    while gates < 10_000 {
        match g.run(&mut r) {
            WorldExit::Gate { reason: 7 } => {
                gates += 1;
                assert_eq!(r.gpr[ESI], gates);
                r.eip = hlt;
            }
            e if e == GP => {
                faults += 1;
                assert_eq!((faults, r.eip), (gates, hlt));
                r.eip = CODE;
            }
            WorldExit::Kick => kicks += 1,
            other => panic!("{other:?}"),
        }
        assert_eq!((r.gpr[EBX], r.gpr[ESP]), (0x1234_5678, STACK));
    }
    stop.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    println!("{gates} gates, {faults} faults, {kicks} kicks");
    assert!(kicks > 0);
}

#[test]
fn every_kick_is_answered_by_a_kick_exit_after_it() {
    // hlt
    let mut g = Guest::with(&[0xf4]);
    let kicker = g.world.kicker();
    let answered = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&answered);
    let thread = std::thread::spawn(move || {
        for i in 0..2000u32 {
            let before = seen.load(Ordering::SeqCst);
            kicker.kick();
            let start = Instant::now();
            while seen.load(Ordering::SeqCst) == before {
                assert!(start.elapsed() < Duration::from_secs(20), "kick {i} was lost");
                std::thread::yield_now();
            }
            pause(i % 500);
        }
    });
    while !thread.is_finished() {
        if g.run(&mut regs()) == WorldExit::Kick {
            answered.fetch_add(1, Ordering::SeqCst);
        }
    }
    thread.join().unwrap();
    // A run that answers a kick while it is being made may be followed by one more exit for it.
    let answered = answered.load(Ordering::SeqCst);
    assert!((2000..=4000).contains(&answered), "{answered}");
}
