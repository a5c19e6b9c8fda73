//! A world hands the guest over to another one when it loads CR3, if that one is armed for it, and only then.

mod common;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::*;
use host_driver_shim::raw::rc_deliver::SELECTORS;
use host_driver_shim::raw::{RawEngine, RawWorld};
use host_driver_shim::world::{
    Backing, HwRegs, Prot, QUICK_SITES, Quick, QuickKind, TableSpan, World, WorldError, WorldExit, WorldLin,
};

/// The CR3 values of the two worlds.
const HERE: u32 = 0x10_0000;
const THERE: u32 = 0x10_1000;
/// What is watched for both.
const TABLE: TableSpan = TableSpan { at: 0x10_2000, len: 64 };
const REASON: u32 = 7;
/// vCPU page: CR3, as patm's `vcpu_page` has it.
const CR3: u32 = 0x30;
const EPOCH: u32 = 3;
const GATE: WorldExit = WorldExit::Gate { reason: REASON };

/// Both worlds have this at [`CODE`]: leave by the gate with CR3 in EAX; behind it: `inc ecx; hlt`.
struct Pair {
    g: Guest,
    other: RawWorld,
    resume: u32,
}

fn pair(behind: &[u8]) -> Pair {
    let gate = gate_jump(REASON);
    let resume = CODE + gate.len() as u32;
    let g = Guest::with(&[&gate[..], behind].concat());
    let other = g.engine.spawn_world().unwrap();
    let mut pair = Pair { g, other, resume };
    let page = Backing::Code(pair.g.code_page);
    let other = &mut pair.other;
    other.map(WorldLin(CODE), 4096, page, Prot::READ | Prot::EXEC).unwrap();
    other.map(WorldLin(STACK - 4096), 4096, Backing::Ram(0x3000), Prot::READ | Prot::WRITE).unwrap();
    other.place_gate(WorldLin(STUB), WorldLin(VCPU)).unwrap();
    other.flush().unwrap();
    pair.g.world.flush().unwrap();
    let mut quick = [Quick::default(); QUICK_SITES];
    let kind = QuickKind::LoadCr3;
    quick[0] = Quick { reason: REASON, kind, base: EAX as u32, resume, ..Quick::default() };
    pair.g.world.set_quick(&quick);
    pair.other.set_quick(&quick);
    pair.g.world.set_epoch(EPOCH);
    pair
}

/// Registers with which guest code loads this CR3.
fn loads(cr3: u32) -> HwRegs {
    let mut r = regs();
    r.gpr = [cr3, 1, 2, 3, STACK, 5, 6, 7];
    r.eflags |= 1;
    r
}

impl Pair {
    fn armed(behind: &[u8]) -> Pair {
        let mut pair = pair(behind);
        assert!(pair.other.arm(EPOCH, THERE, &[TABLE]));
        pair
    }

    fn handed(&self) -> WorldExit {
        WorldExit::Handed { seat: self.other.seat().unwrap() }
    }
}

#[test]
fn an_armed_world_goes_on_with_the_state_of_the_one_that_loads_its_cr3() {
    let mut p = Pair::armed(&[0x41, 0xf4]);
    p.g.world.fpu()[160..176].copy_from_slice(&[9; 16]);
    p.g.world.vcpu_write(SELECTORS, 0x7b);
    let mut r = loads(THERE);
    let before = r;
    assert_eq!(p.g.run(&mut r), p.handed());
    let mut r = HwRegs::default();
    assert_eq!(p.other.take_exit(&mut r).unwrap(), GP);
    assert_eq!((r.eip, r.gpr[ECX], r.sel), (p.resume + 1, 2, before.sel));
    assert_eq!(r.gpr[EDX..], before.gpr[EDX..]);
    assert_eq!(p.other.fpu()[160..176], [9; 16]);
    assert_eq!((p.other.vcpu_read(SELECTORS), p.other.vcpu_read(CR3)), (0x7b, THERE));
    assert_eq!((p.other.taken_over(), p.g.world.taken_over()), (1, 0));
    assert_eq!(p.g.world.take_runners(), [p.other.seat().unwrap()]);
    assert!(p.g.world.take_runners().is_empty());
    // And both run again when the monitor says so.
    p.g.put(&[0x40, 0xf4]);
    for world in [&mut p.g.world, &mut p.other] {
        let mut r = regs();
        assert_eq!((world.run(&mut r).unwrap(), r.gpr[EAX]), (GP, 1));
    }
}

#[test]
fn a_world_that_is_handed_to_and_fro_ends_where_it_began() {
    // dec ecx; mov eax, HERE; jz 1f; jmp CODE; 1: hlt: the second load, of HERE, goes on behind with ECX 0
    let back = [&[0x49, 0xb8][..], &HERE.to_le_bytes(), &[0x74, 0x05, 0xe9]].concat();
    let next = CODE + gate_jump(REASON).len() as u32 + back.len() as u32 + 4;
    let mut p = Pair::armed(&[&back[..], &CODE.wrapping_sub(next).to_le_bytes(), &[0xf4]].concat());
    assert!(p.g.world.arm(EPOCH, HERE, &[]));
    let mut r = loads(THERE);
    r.gpr[ECX] = 2;
    assert_eq!(p.g.run(&mut r), GP);
    assert_eq!((r.gpr[EAX], r.gpr[ECX]), (HERE, 0));
    assert_eq!((p.other.taken_over(), p.g.world.taken_over()), (1, 1));
    assert!(p.g.world.take_runners().contains(&p.other.seat().unwrap()));
}

#[test]
fn what_is_not_armed_for_just_that_is_the_monitors() {
    type Spoil = fn(&mut Pair);
    let spoils: [(&str, Spoil); 9] = [
        ("disarmed", |p| p.other.disarm()),
        ("another epoch", |p| p.g.world.set_epoch(EPOCH + 1)),
        ("another CR3", |p| assert!(p.other.arm(EPOCH, THERE + 0x100_0000, &[]))),
        ("a table changed", |p| p.g.ram.write_u32(TABLE.at + 60, 1).unwrap()),
        ("a mapping is queued", |p| p.other.unmap(WorldLin(DATA), 4096).unwrap()),
        ("a descriptor is queued", |p| p.other.set_segment(5, flat(0, false)).unwrap()),
        ("a kick waits", |p| p.other.kicker().kick()),
        ("ring 3", |p| p.g.world.vcpu_write(0x300, 3)),
        ("a descriptor the other one has not", |p| p.g.world.vcpu_write(0x320, 0x804 << 3 | 7)),
    ];
    for (what, spoil) in spoils {
        let mut p = Pair::armed(&[0x41, 0xf4]);
        spoil(&mut p);
        let mut r = loads(THERE);
        let before = r;
        assert_eq!(p.g.run(&mut r), GATE, "{what}");
        assert_eq!(r.gpr, before.gpr, "{what}");
        assert_eq!(p.other.taken_over(), 0, "{what}");
    }
}

#[test]
fn a_table_that_is_not_in_ram_or_too_long_arms_nothing() {
    let mut p = pair(&[0xf4]);
    let end = p.g.ram.size();
    for bad in [
        TableSpan { at: end, len: 4 },
        TableSpan { at: end - 4, len: 8 },
        TableSpan { at: u64::MAX - 3, len: 8 },
        TableSpan { at: 2, len: 4 },
        TableSpan { at: 0, len: 6 },
        TableSpan { at: 0, len: 1 << 20 },
    ] {
        assert!(!p.other.arm(EPOCH, THERE, &[TABLE, bad]), "{bad:?}");
        assert!(!p.other.is_armed(EPOCH));
        assert_eq!(p.g.run(&mut loads(THERE)), GATE);
    }
    assert!(!p.other.arm(EPOCH, THERE, &[TABLE; 1000]));
}

#[test]
fn a_kick_reaches_whoever_has_the_guest() {
    let mut p = Pair::armed(&[0xeb, 0xfe]);
    for i in 0..200u32 {
        let kicker = p.g.world.kicker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(u64::from(i) * 7));
            kicker.kick();
        });
        let mut r = loads(THERE);
        let handed = match p.g.run(&mut r) {
            WorldExit::Kick => false,
            exit => {
                assert_eq!(exit, p.handed());
                assert_eq!(p.other.take_exit(&mut r).unwrap(), WorldExit::Kick);
                p.g.world.forget_kick();
                true
            }
        };
        assert_eq!(r.eip, if handed { p.resume } else { r.eip }, "kick {i}");
        thread.join().unwrap();
        p.g.world.forget_kick();
        p.other.forget_kick();
        p.g.world.take_runners();
        p.other.take_fills(&mut |_| ());
        assert!(p.other.arm(EPOCH, THERE, &[TABLE]));
    }
    assert!(p.other.taken_over() > 0);
}

#[test]
fn the_death_of_whoever_has_the_guest_is_noticed_and_is_its_own() {
    let mut p = Pair::armed(&escape_behind());
    let mut r = loads(THERE);
    assert_eq!(p.g.run(&mut r), p.handed());
    assert!(matches!(p.other.take_exit(&mut r), Err(WorldError::Died(_))));
    p.g.put(&[0x40, 0xf4]);
    let mut r = regs();
    assert_eq!((p.g.run(&mut r), r.gpr[EAX]), (GP, 1));
    let mut another = p.g.engine.spawn_world().unwrap();
    another.flush().unwrap();
}

#[test]
fn kicks_of_a_world_that_has_died_disturb_no_world_that_is_born() {
    let mut g = Guest::with(&escape(&[0x0f, 0x05, 0xf4]));
    assert!(matches!(g.world.run(&mut regs()), Err(WorldError::Died(_))));
    let (go, gone) = channel::<u64>();
    let kicker = g.world.kicker();
    let thread = std::thread::spawn(move || {
        while let Ok(after) = gone.recv() {
            std::thread::sleep(Duration::from_micros(after));
            kicker.kick();
        }
    });
    for i in 0..60 {
        g.world.forget_kick();
        go.send(i * 50).unwrap();
        let born = g.engine.spawn_world();
        assert!(born.is_ok(), "{i}: {born:?}");
    }
    drop(go);
    thread.join().unwrap();
}

/// Behind the gate: out of 32-bit mode, and a system call, which is the world's end.
fn escape_behind() -> Vec<u8> {
    let at = CODE + gate_jump(REASON).len() as u32 + 7;
    [&[0xea][..], &at.to_le_bytes(), &[0x33, 0, 0x0f, 0x05, 0xf4]].concat()
}

#[test]
fn seats_are_given_again_when_their_worlds_are_gone() {
    let g = Guest::new();
    let engine: &RawEngine = &g.engine;
    let first = engine.spawn_world().unwrap();
    let seat = first.seat().unwrap();
    drop(first);
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        if engine.spawn_world().unwrap().seat().unwrap() == seat {
            return;
        }
    }
    panic!("seat {seat} stayed taken");
}
