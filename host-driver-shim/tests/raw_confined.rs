//! Confined worlds: what guest code reaches in them even when it breaks out of its 32 bits, and that they are worlds.

mod common;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::*;
use host_driver_shim::raw::RawWorld;
use host_driver_shim::world::{Backing, HwRegs, Prot, World, WorldError, WorldExit, WorldLin};

/// Where the runtimes of worlds that may have guest RAM, watched frames and windows have them.
const RAM_VA: u64 = 0x2000_0000_0000;
const ARENA_VA: u64 = 0x1000_0000_0000;
const WATCHED_VA: u64 = ARENA_VA + 0x4000_0000;
const ORDERS_VA: u64 = ARENA_VA + 0x6000_0000;

/// The end of a confined world that runs this, at once.
fn death_of(code: &[u8]) -> String {
    let mut g = Guest::confined(code);
    let start = Instant::now();
    let error = g.world.run(&mut regs()).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    match error {
        WorldError::Died(why) => why,
        error => panic!("{error}"),
    }
}

/// `mov rax, at; mov byte [rax], al` or the load, and a jump to itself for the case that it works.
fn access(at: u64, write: bool) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8];
    code.extend(at.to_le_bytes());
    code.extend([if write { 0x88 } else { 0x8a }, 0x00, 0xeb, 0xfe]);
    escape(&code)
}

#[test]
fn guest_ram_is_not_there_and_the_mappers_orders_cannot_be_written() {
    for (at, write) in [(RAM_VA, false), (RAM_VA + 0x1000, true), (WATCHED_VA, false), (ORDERS_VA, true)] {
        let why = death_of(&access(at, write));
        assert!(why.contains("left its 32-bit mode"), "{at:x}: {why}");
    }
}

#[test]
fn escaped_code_can_change_no_mapping() {
    let arguments = [argument(0, u64::from(DATA)), argument(1, 4096), argument(2, 7)].concat();
    for nr in [
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_modify_ldt,
        libc::SYS_ioctl,
        libc::SYS_pwrite64,
        libc::SYS_setitimer,
    ] {
        let why = death_of(&escape(&[arguments.clone(), runtime_syscall(nr as u32)].concat()));
        assert!(why.contains("forbidden system call"), "{nr}: {why}");
    }
}

#[test]
fn escaped_code_cannot_sleep_so_that_it_wakes_by_itself() {
    let futex = |operation: i32, timeout: u64| {
        let arguments =
            [argument(0, ARENA_VA), argument(1, operation as u64), argument(2, 1), argument(3, timeout)];
        escape(&[arguments.concat(), runtime_syscall(libc::SYS_futex as u32)].concat())
    };
    let others = [libc::FUTEX_WAIT_BITSET, libc::FUTEX_CMP_REQUEUE, libc::FUTEX_LOCK_PI, libc::FUTEX_WAKE_OP];
    for code in others.map(|op| futex(op, 0)).into_iter().chain([futex(libc::FUTEX_WAIT, ARENA_VA)]) {
        let why = death_of(&code);
        assert!(why.contains("forbidden system call"), "{why}");
    }
}

#[test]
fn escaped_code_that_does_not_sleep_when_it_has_handed_over_is_ended() {
    // mov rax, ARENA_VA (the word says whose turn it is); mov dword [rax], 0; wake the monitor; jmp $
    let mut code = vec![0x48, 0xb8];
    code.extend(ARENA_VA.to_le_bytes());
    code.extend([0xc7, 0x00, 0, 0, 0, 0, 0xeb, 0xfe]);
    let why = death_of(&escape(&code));
    assert!(why.contains("protocol"), "{why}");
}

#[test]
fn the_guests_thread_has_no_descriptor_and_the_mapper_what_it_needs() {
    let g = Guest::confined(&[]);
    let proc = PathBuf::from(format!("/proc/{}", g.world.pid()));
    let status = std::fs::read_to_string(proc.join("status")).unwrap();
    assert!(status.contains("Threads:\t2"), "{status}");
    let Ok(tasks) = std::fs::read_dir(proc.join("task")) else { panic!("no tasks in {proc:?}") };
    let mut found: Vec<Vec<String>> = Vec::new();
    for task in tasks {
        let task = task.unwrap().path();
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
        let Ok(fds) = std::fs::read_dir(task.join("fd")) else {
            println!("SKIP: an ordinary account cannot look into a world");
            return;
        };
        let name = |f: std::io::Result<std::fs::DirEntry>| std::fs::read_link(f.unwrap().path()).unwrap();
        let mut links: Vec<_> = fds.map(|f| name(f).to_string_lossy().replace(" (deleted)", "")).collect();
        links.sort();
        found.push(links);
    }
    found.sort();
    let mappers = ["cells", "cells", "code", "ram"].map(|name| format!("/memfd:subring-{name}"));
    assert_eq!(found, [Vec::new(), mappers.to_vec()]);
    let maps = std::fs::read_to_string(proc.join("maps")).unwrap();
    // Its arena, and the orders, which follow it in memory.
    let mut memory = maps.lines().filter(|line| line.contains("memfd")).map(|line| {
        let mut words = line.split_whitespace();
        let (range, rights, offset) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let hex = |s| u64::from_str_radix(s, 16).unwrap();
        let (start, end) = range.split_once('-').unwrap();
        (rights, hex(offset), hex(end) - hex(start))
    });
    let (arena, orders) = (memory.next().unwrap(), memory.next().unwrap());
    assert_eq!((arena.0, orders.0, memory.next()), ("rw-s", "r--s", None));
    assert_eq!(arena.1 + arena.2, orders.1);
}

/// mov eax, [DATA]; mov dword [DATA], 55667788h; hlt
fn load_and_store() -> Vec<u8> {
    let mut code = vec![0xa1];
    code.extend(DATA.to_le_bytes());
    code.extend([0xc7, 0x05]);
    code.extend(DATA.to_le_bytes());
    code.extend(0x5566_7788u32.to_le_bytes());
    code.push(0xf4);
    code
}

#[test]
fn mappings_and_segments_are_there_before_the_next_instruction_and_gone_before_it() {
    let mut g = Guest::confined(&load_and_store());
    let writable = Prot::READ | Prot::WRITE;
    for round in 0..200u32 {
        let frame = u64::from(0x10 + round % 7) << 12;
        g.ram.write_u32(frame, round).unwrap();
        g.world.map(WorldLin(DATA), 0x1000, Backing::Ram(frame), writable).unwrap();
        let mut r = regs();
        assert_eq!((g.run(&mut r), r.gpr[EAX]), (GP, round));
        assert_eq!(g.ram.read_u32(frame), Some(0x5566_7788));
        g.world.protect(WorldLin(DATA), 0x1000, Prot::READ).unwrap();
        let page_fault = |error_code| WorldExit::Fault { vector: 14, error_code, cr2: DATA };
        assert_eq!(g.run(&mut regs()), page_fault(7));
        g.world.unmap(WorldLin(DATA), 0x1000).unwrap();
        if round % 2 == 0 {
            g.world.flush().unwrap();
        }
        assert_eq!(g.run(&mut regs()), page_fault(4));
        // DS with a base: [DATA] is at DATA + 2000h.
        g.world.map(WorldLin(DATA + 0x2000), 0x1000, Backing::Ram(frame), writable).unwrap();
        g.world.set_segment(9, flat(0x2000, false)).unwrap();
        let mut r = HwRegs { sel: [DS, CS, DS, 9 << 3 | 7, 0, 0], ..regs() };
        assert_eq!((g.run(&mut r), r.gpr[EAX]), (GP, 0x5566_7788), "{round}");
        g.world.unmap(WorldLin(DATA + 0x2000), 0x1000).unwrap();
    }
    // Everything at once.
    g.world.unmap(WorldLin(0), 0).unwrap();
    let WorldExit::Fault { vector: 14, cr2: CODE, .. } = g.run(&mut regs()) else {
        panic!("its code is there")
    };
}

#[test]
fn a_refused_mapping_is_told_and_the_world_stays() {
    let mut g = Guest::confined(&load_and_store());
    for flush in [false, true] {
        g.world.protect(WorldLin(0x7000_0000), 0x1000, Prot::READ).unwrap();
        let told = if flush { g.world.flush() } else { g.world.run(&mut regs()).map(drop) };
        assert!(matches!(told, Err(WorldError::Map { at: 0x7000_0000, len: 0x1000, .. })), "{told:?}");
        assert_eq!(g.run(&mut regs()), GP);
    }
}

#[test]
fn more_commands_than_fit_are_carried_out_too() {
    let mut g = Guest::confined(&load_and_store());
    for i in 0..3000u32 {
        let at = WorldLin(0x1000_0000 + (i << 13));
        g.world.map(at, 0x1000, Backing::Ram(u64::from(i % 64) << 12), Prot::READ).unwrap();
        if i % 3 == 0 {
            g.world.unmap(WorldLin(0x1000_0000 + (i << 13)), 0x1000).unwrap();
        }
    }
    assert_eq!(g.run(&mut regs()), GP);
    assert_eq!(g.run(&mut regs()), GP);
}

/// Kicks a world again and again.
struct Storm {
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Storm {
    fn of(world: &RawWorld) -> Storm {
        let (kicker, over) = (world.kicker(), Arc::new(AtomicBool::new(false)));
        let seen = over.clone();
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                kicker.kick();
                std::thread::sleep(Duration::from_micros(30));
            }
        });
        Storm { over, thread }
    }
    fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

#[test]
fn a_storm_of_kicks_loses_nothing_and_wakes_nobody() {
    // 1: inc eax; jnz 1b; hlt
    let mut g = Guest::confined(&[0x40, 0x75, 0xfd, 0xf4]);
    let storm = Storm::of(&g.world);
    let mut kicks = 0;
    for _ in 0..300 {
        let mut r = regs();
        r.gpr[EAX] = 0u32.wrapping_sub(300_000);
        loop {
            match g.run(&mut r) {
                WorldExit::Kick => kicks += 1,
                exit => {
                    assert_eq!((exit, r.eip, r.gpr[EAX]), (GP, CODE + 3, 0));
                    break;
                }
            }
        }
        // A mapping between two runs: a world that is awake might not have it.
        g.world.map(WorldLin(DATA), 0x1000, Backing::Ram(0x1000), Prot::READ).unwrap();
    }
    storm.end();
    assert!(kicks > 100, "only {kicks} kicks came");
}

#[test]
fn the_gate_and_system_calls_are_exits() {
    let mut g = Guest::confined(&[0xcd, 0x80, 0xf4]);
    assert_eq!(g.run(&mut regs()), WorldExit::Syscall);
    g.put(&call_jump(CODE, 0xdead_beef));
    let mut r = HwRegs { eflags: 0x8d7, ..regs() };
    for (i, register) in r.gpr.iter_mut().enumerate().filter(|(i, _)| *i != ESP) {
        *register = 0x8001_0203u32.wrapping_mul(i as u32 + 1);
    }
    let before = r;
    assert_eq!(g.run(&mut r), WorldExit::Gate { reason: 0 });
    // The hardware has IF set in any case.
    assert_eq!(r, HwRegs { eip: 0xdead_beef, eflags: 0xad7, ..before });
}

#[test]
fn a_kick_on_the_way_to_the_gate_does_not_end_the_world() {
    let mut g = Guest::confined(&call_jump(CODE, CODE));
    let storm = Storm::of(&g.world);
    let (mut kicks, mut gates) = (0, 0);
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        match g.run(&mut regs()) {
            WorldExit::Kick => kicks += 1,
            WorldExit::Gate { .. } => gates += 1,
            exit => panic!("{exit:?}"),
        }
    }
    storm.end();
    assert!(kicks > 100 && gates > 100, "{kicks} {gates}");
    let code = call_jump(CODE, CODE);
    for at in [7, 13, 23] {
        // `jmp $` in its place: that is on its way nowhere.
        let mut spins = code.clone();
        spins.truncate(at);
        spins.extend([0xeb, 0xfe]);
        assert_dies_of_a_kick(Guest::confined(&spins));
    }
}
