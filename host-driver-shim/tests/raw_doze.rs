//! A world sleeps in the guest's `hlt` until the tick the guest has programmed, and delivers it.

mod common;
use common::*;
use host_driver_shim::raw::rc_deliver::{CPL, IF_FLAG, SELECTORS};
use host_driver_shim::tsc;
use host_driver_shim::world::{
    DeliveryRules, FillMode, FillRules, Guard, HwRegs, NO_BASE, PORT_ROWS, POSTED_TSC, PortRow, PortWrite,
    QUICK_SITES, Quick, QuickKind, TICK, Table, World, WorldExit,
};
use std::time::Duration;

/// Guest tables in RAM: a page directory, and the table of what is from 4 MiB on.
const DIRECTORY: u64 = 0x10_0000;
const TABLE: u64 = 0x10_1000;
/// Guest linear page behind the stack, in frame 3: the interrupt gate and the descriptor of CS.
const TABLES: u32 = STACK;
const GATE_ENTRY: Table = Table { at: TABLES, low: 0x10_1234, high: 0x40_8e00 };
const CS_ENTRY: Table = Table { at: TABLES + 8, low: 0xffff, high: 0xcf_9b00 };
const KERNEL_CS: u32 = 0x10;
const IF: u32 = 0x200;

const TIMER: u16 = 0x40;
const MASK: u16 = 0x21;
const UNIT: u32 = 2000;
const COUNT: u32 = 0x2710;
/// Counts of the time-stamp counter till the tick.
const LENGTH: u64 = COUNT as u64 * UNIT as u64;
const LONG: u64 = 1 << 40;

const LOW: u32 = 1;
const HIGH: u32 = 2;
const HALT: u32 = 3;
const DONE: u32 = 4;

/// A guest that writes a count to its timer, sleeps, and has a handler that counts in EBX. And where it goes on behind `hlt`.
fn guest() -> (Guest, u32) {
    let mut code = vec![0xb0, COUNT as u8];
    code.extend(gate_jump(LOW));
    let high = CODE + code.len() as u32;
    code.extend([0xb0, (COUNT >> 8) as u8]);
    code.extend(gate_jump(HIGH));
    let halt = CODE + code.len() as u32;
    code.extend(gate_jump(HALT));
    let behind = CODE + code.len() as u32;
    code.push(0xf4);
    let handler = CODE + code.len() as u32;
    code.push(0x43);
    code.extend(gate_jump(DONE));

    let mut g = Guest::with(&code);
    g.ram.write_u32(DIRECTORY + 4, TABLE as u32 | 7).unwrap();
    for (page, frame) in [(0x200, 2), (0x201, 3)] {
        g.ram.write_u32(TABLE + 4 * page, frame << 12 | 0x63).unwrap();
    }
    for entry in [GATE_ENTRY, CS_ENTRY] {
        let at = 0x3000 + u64::from(entry.at - TABLES);
        g.ram.write_u32(at, entry.low).unwrap();
        g.ram.write_u32(at + 4, entry.high).unwrap();
    }
    let mode = FillMode::ENABLED | FillMode::SUPERVISOR | FillMode::WP;
    g.world.set_fill_rules(&FillRules { cr3: DIRECTORY as u32, mode, ..FillRules::default() });
    g.world.set_tick_rules(&DeliveryRules {
        ready: 1,
        gate: GATE_ENTRY,
        target: handler,
        if_mask: !IF,
        cs: KERNEL_CS,
        cs_descriptor: CS_ENTRY,
        cs_host: u32::from(CS),
        ..DeliveryRules::default()
    });
    let out = |reason, resume| Quick {
        reason,
        kind: QuickKind::Out,
        base: NO_BASE,
        displacement: u32::from(TIMER),
        resume,
        ..Quick::default()
    };
    let mut quick = [Quick::default(); QUICK_SITES];
    quick[0] = out(LOW, high);
    quick[1] = out(HIGH, halt);
    quick[2] = Quick { reason: HALT, kind: QuickKind::Halt, resume: behind, ..Quick::default() };
    g.world.set_quick(&quick);
    g.world.vcpu_write(IF_FLAG, IF);
    g.world.vcpu_write(CPL, 0);
    g.world.vcpu_write(SELECTORS + 4, KERNEL_CS);
    allow(&mut g, 0xfe, LONG);
    (g, behind)
}

/// The mask register reads as `mask`, and the world may be away for so long.
fn allow(g: &mut Guest, mask: u32, time: u64) {
    let mut rows = [PortRow::default(); PORT_ROWS];
    rows[0] = PortRow { port: u32::from(TIMER), posts: 1, unit: UNIT, ..PortRow::default() };
    rows[1] = PortRow { port: u32::from(MASK), readable: 1, value: mask, posts: 1, ..PortRow::default() };
    g.world.set_ports(&rows);
    g.world.set_guard(&Guard {
        at: tsc::read() + time,
        period: LENGTH,
        after: LONG,
        scale: 7_000_000,
        idle: 1,
        mask_port: u32::from(MASK),
        ..Guard::default()
    });
}

fn start() -> HwRegs {
    HwRegs { eflags: 0x202 | 1, ..regs() }
}

fn posted(g: &mut Guest) -> Vec<PortWrite> {
    let mut all = Vec::new();
    g.world.take_posted(&mut |write| all.push(write));
    all
}

fn ports(writes: &[PortWrite]) -> Vec<u16> {
    writes.iter().map(|write| write.port).collect()
}

#[test]
fn a_sleeping_guest_gets_its_tick_when_it_is_due_and_the_monitor_hears_of_it() {
    let (mut g, behind) = guest();
    let mut r = start();
    assert_eq!(g.run(&mut r), WorldExit::Gate { reason: DONE });
    assert_eq!(r.gpr[EBX], 1);
    assert_eq!(r.gpr[ESP], STACK - 12);
    let frame = [0x2ff4, 0x2ff8, 0x2ffc].map(|at| g.ram.read_u32(at).unwrap());
    assert_eq!(frame, [behind, KERNEL_CS, IF | 2 | 1]);
    assert_eq!(g.world.vcpu_read(IF_FLAG), 0, "an interrupt gate");
    let writes = posted(&mut g);
    assert_eq!(ports(&writes), [TIMER, TIMER, TICK]);
    let slept = writes[2].tsc.wrapping_sub(writes[1].tsc) & POSTED_TSC;
    assert!(slept >= LENGTH, "{slept} of {LENGTH}");
}

#[test]
fn what_the_monitor_is_to_see_is_an_exit_at_the_hlt() {
    let halted = |change: &dyn Fn(&mut Guest)| {
        let (mut g, _) = guest();
        change(&mut g);
        let mut r = start();
        let exit = g.run(&mut r);
        (exit, ports(&posted(&mut g)))
    };
    let at_hlt = (WorldExit::Gate { reason: HALT }, vec![TIMER, TIMER]);
    assert_eq!(halted(&|g| allow(g, 0xff, LONG)), at_hlt, "masked");
    assert_eq!(halted(&|g| g.world.vcpu_write(IF_FLAG, 0)), at_hlt, "asleep for good");
    assert_eq!(halted(&|g| g.world.set_guard(&Guard::default())), at_hlt, "the monitor watches the time");
    assert_eq!(halted(&|g| g.world.set_tick_rules(&DeliveryRules::default())), at_hlt, "no gate is known");
    assert_eq!(halted(&|g| g.ram.write_u32(0x3004, 0).unwrap()), at_hlt, "another gate");
    assert_eq!(halted(&|g| g.ram.write_u32(TABLE + 4 * 0x200, 0).unwrap()), at_hlt, "no stack");
}

#[test]
fn a_kick_ends_the_sleep() {
    let (mut g, _) = guest();
    // A tick in an hour.
    let mut rows = [PortRow::default(); PORT_ROWS];
    rows[0] = PortRow { port: u32::from(TIMER), posts: 1, unit: u32::MAX, ..PortRow::default() };
    rows[1] = PortRow { port: u32::from(MASK), readable: 1, posts: 1, ..PortRow::default() };
    g.world.set_ports(&rows);
    let kicker = g.world.kicker();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        kicker.kick();
    });
    let mut r = start();
    assert_eq!(g.run(&mut r), WorldExit::Gate { reason: HALT });
    other.join().unwrap();
    assert_eq!(g.run(&mut r), WorldExit::Kick);
}

#[test]
fn the_worlds_own_timer_ends_a_run_that_does_not_sleep() {
    let mut g = Guest::with(&[0xeb, 0xfe]);
    g.world.set_guard(&Guard { at: tsc::read() + 20_000_000, scale: 7_000_000, ..Guard::default() });
    let mut r = regs();
    assert_eq!(g.run(&mut r), WorldExit::Kick);
    assert_eq!(r.eip, CODE);
    // And one that is over already.
    assert_eq!(g.run(&mut r), WorldExit::Kick);
}
