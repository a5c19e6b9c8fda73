//! The world of ring 0 enters a confined world of ring 3 by itself, and comes back with its system call or page fault.

mod common;
use common::*;
use host_driver_shim::raw::RawWorld;
use host_driver_shim::raw::rc_deliver::{CPL, CR2, HOST_RING0, HOST_RING3, IF_FLAG, SELECTORS};
use host_driver_shim::world::{
    Backing, DeliveryRules, Fill, FillMode, FillRules, HwRegs, Prot, QUICK_SITES, Quick, QuickKind, Table,
    UsersRules, World, WorldError, WorldExit, WorldLin,
};
use std::time::{Duration, Instant};

/// Guest tables in RAM: a page directory, the table of what is from 4 MiB on, and that of the users' 4 MiB.
const DIRECTORY: u64 = 0x10_0000;
const TABLE: u64 = 0x10_1000;
const USER_TABLE: u64 = 0x10_2000;
/// Ring 3's code, in frame 8.
const USER: u32 = 0x2000_0000;
const USER_FRAME: u64 = 0x8000;
/// And data, which the world does not have at first; page i is frame 10h + i.
const AREA: u32 = USER + 0x1_0000;
const AREA_FRAME: u64 = 0x1_0000;
/// Guest linear page behind the stack, in frame 3: gates, descriptors and the TSS's stack.
const TABLES: u32 = STACK;
const CALL_GATE: Table = Table { at: TABLES, low: 0x10_1234, high: 0x40_ee00 };
const FAULT_GATE: Table = Table { at: TABLES + 8, low: 0x10_5678, high: 0x40_8e00 };
const CS_ENTRY: Table = Table { at: TABLES + 16, low: 0xffff, high: 0xcf_9b00 };
const SS_ENTRY: Table = Table { at: TABLES + 24, low: 0xffff, high: 0xcf_9300 };
const USER_CS_ENTRY: Table = Table { at: TABLES + 32, low: 0xffff, high: 0xcf_fb00 };
const USER_SS_ENTRY: Table = Table { at: TABLES + 40, low: 0xffff, high: 0xcf_f300 };
const TSS: Table = Table { at: TABLES + 48, low: STACK, high: KERNEL_SS };
const KERNEL_CS: u32 = 0x10;
const KERNEL_SS: u32 = 0x18;
const USER_CS: u32 = 0x73;
const USER_SS: u32 = 0x7b;
const IF: u32 = 0x200;
/// Where the frame of ring 0's `iret` is.
const FRAME: u32 = STACK - 0x100;

const IRET: u32 = 1;
const CALLED: u32 = 2;
const FAULTED: u32 = 3;
const INVLPG: u32 = 4;

struct Both {
    ring0: Guest,
    ring3: RawWorld,
    rules: UsersRules,
    /// Ring 0's code: `iret`, and one that does `invlpg` of EAX before.
    iret: u32,
    flush: u32,
}

fn both(user: &[u8]) -> Both {
    let mut code = gate_jump(IRET);
    let call = CODE + code.len() as u32;
    code.extend(gate_jump(CALLED));
    let fault = CODE + code.len() as u32;
    code.extend(gate_jump(FAULTED));
    let flush = CODE + code.len() as u32;
    code.extend(gate_jump(INVLPG));
    let behind = CODE + code.len() as u32;
    code.extend(gate_jump(IRET));

    let mut g = Guest::master(&code);
    let put = |at: u64, value: u32| g.ram.write_u32(at, value).unwrap();
    put(DIRECTORY + 4, TABLE as u32 | 7);
    put(DIRECTORY + u64::from(USER >> 22) * 4, USER_TABLE as u32 | 7);
    for (page, frame) in [(0x200, 2), (0x201, 3)] {
        put(TABLE + 4 * page, frame << 12 | 0x63);
    }
    put(USER_TABLE, USER_FRAME as u32 | 0x67);
    for entry in [CALL_GATE, FAULT_GATE, CS_ENTRY, SS_ENTRY, USER_CS_ENTRY, USER_SS_ENTRY, TSS] {
        let at = 0x3000 + u64::from(entry.at - TABLES);
        put(at, entry.low);
        put(at + 4, entry.high);
    }
    for (i, word) in [USER, USER_CS, IF | 2 | 1, AREA + 0x800, USER_SS].into_iter().enumerate() {
        put(0x2000 + u64::from(FRAME & 0xfff) + 4 * i as u64, word);
    }
    g.ram.write(USER_FRAME, user).unwrap();

    let mode = FillMode::ENABLED | FillMode::SUPERVISOR | FillMode::WP;
    g.world.set_fill_rules(&FillRules { cr3: DIRECTORY as u32, mode, ..FillRules::default() });
    let delivery = |gate, target| DeliveryRules {
        ready: 1,
        from_ring3: 1,
        gate,
        target,
        if_mask: !IF,
        cs: KERNEL_CS,
        cs_descriptor: CS_ENTRY,
        cs_host: u32::from(CS),
        tss_esp0: TSS.at,
        ss: KERNEL_SS,
        ss_descriptor: SS_ENTRY,
        ss_host: u32::from(DS),
        user_ss_host: u32::from(DS),
    };
    g.world.set_delivery_rules(&delivery(FAULT_GATE, fault));
    let mut quick = [Quick::default(); QUICK_SITES];
    quick[0] = Quick { reason: IRET, kind: QuickKind::ToUsers, ..Quick::default() };
    quick[1] =
        Quick { reason: INVLPG, kind: QuickKind::Invlpg, segment: 3, resume: behind, ..Quick::default() };
    g.world.set_quick(&quick);
    g.world.vcpu_write(IF_FLAG, 0);
    g.world.vcpu_write(CPL, 0);
    g.world.vcpu_write(SELECTORS + 4, KERNEL_CS);
    for segment in [0, 3] {
        g.world.vcpu_write(HOST_RING0 + 4 * segment, u32::from(DS));
        g.world.vcpu_write(HOST_RING3 + 4 * segment, u32::from(DS));
    }
    let mut ring3 = g.engine.spawn_confined().unwrap();
    let page = g.code.alloc().unwrap();
    g.code.write(page, user).unwrap();
    ring3.map(WorldLin(USER), 4096, Backing::Code(page), Prot::READ | Prot::EXEC).unwrap();
    let rules = UsersRules {
        cell: ring3.cell().unwrap() + 1,
        vector: 0x80,
        gate: delivery(CALL_GATE, call),
        cs: USER_CS,
        cs_descriptor: USER_CS_ENTRY,
        cs_host: u32::from(CS),
        ss: USER_SS,
        ss_descriptor: USER_SS_ENTRY,
        ss_host: u32::from(DS),
    };
    Both { ring0: g, ring3, rules, iret: CODE, flush }
}

impl Both {
    /// Runs ring 0 from `eip`.
    fn run(&mut self, eip: u32) -> (WorldExit, HwRegs) {
        self.ring3.settle().unwrap();
        self.ring0.world.set_users(&self.rules);
        let mut r = HwRegs { eip, ..regs() };
        r.gpr[ESP] = FRAME;
        r.gpr[EAX] = AREA;
        let exit = self.ring0.run(&mut r);
        (exit, r)
    }
    fn set_page(&self, page: u32, rights: u32) {
        let frame = AREA_FRAME as u32 + (page << 12);
        self.ring0
            .ram
            .write_u32(USER_TABLE + u64::from((AREA >> 12 & 0x3ff) + page) * 4, frame | rights)
            .unwrap();
    }
    fn word(&self, at: u32) -> u32 {
        self.ring0.ram.read_u32(0x2000 + u64::from(at & 0xfff)).unwrap()
    }
    fn fills(&mut self) -> Vec<Fill> {
        let mut all = Vec::new();
        self.ring3.take_fills(&mut |f| all.push(f));
        all
    }
}

/// mov ebx, [AREA]; int 80h
fn load_and_call() -> Vec<u8> {
    let mut code = vec![0x8b, 0x1d];
    code.extend(AREA.to_le_bytes());
    code.extend([0xcd, 0x80]);
    code
}

const PRESENT: u32 = 0x67;

#[test]
fn a_system_call_and_a_miss_of_the_shadow_need_no_monitor() {
    let mut b = both(&load_and_call());
    b.set_page(0, PRESENT);
    b.ring0.ram.write_u32(AREA_FRAME, 0x1234_5678).unwrap();
    for round in 1..=300 {
        let (exit, r) = b.run(b.iret);
        assert_eq!(
            (exit, r.gpr[EBX], r.gpr[ESP]),
            (WorldExit::Gate { reason: CALLED }, 0x1234_5678, STACK - 20)
        );
        let frame: Vec<u32> = (0..5).map(|i| b.word(STACK - 20 + 4 * i)).collect();
        assert_eq!(frame, [USER + 8, USER_CS, IF | 2 | 1, AREA + 0x800, USER_SS]);
        assert_eq!(b.ring0.world.vcpu_read(CPL), 0);
        assert_eq!(b.ring0.world.reflected(), round);
        assert_eq!(b.fills().len(), usize::from(round == 1), "mapped once, and noted");
    }
}

#[test]
fn a_system_call_that_leaves_by_the_gate_needs_no_monitor_either() {
    // The guest's own code has `int 80h` at USER + 6; what ring 3 is shown jumps.
    let mut b = both(&load_and_call());
    b.set_page(0, PRESENT);
    b.ring0.ram.write_u32(AREA_FRAME, 99).unwrap();
    let [load @ .., _, _] = &load_and_call()[..] else { panic!("it ends with two bytes") };
    let page = b.ring0.code.alloc().unwrap();
    let shown = [load, &call_jump(USER + 6, USER + 8)].concat();
    b.ring0.code.write(page, &shown).unwrap();
    b.ring3.map(WorldLin(USER), 4096, Backing::Code(page), Prot::READ | Prot::EXEC).unwrap();
    for round in 1..=300 {
        let (exit, r) = b.run(b.iret);
        assert_eq!(
            (exit, r.gpr[EBX], b.word(STACK - 20)),
            (WorldExit::Gate { reason: CALLED }, 99, USER + 8)
        );
        assert_eq!(b.ring0.world.reflected(), round);
        b.fills();
    }
    // Where the guest has no such instruction it is the monitor's.
    b.ring0.code.write(page, &call_jump(USER, USER + 5)).unwrap();
    assert_eq!(b.run(b.iret).0, WorldExit::Users);
    let mut r = HwRegs::default();
    assert_eq!((b.ring3.take_exit(&mut r).unwrap(), r.eip), (WorldExit::Gate { reason: 0 }, USER + 5));
}

#[test]
fn a_page_fault_goes_to_the_guest_and_its_page_is_mapped_on_the_way_back() {
    let mut b = both(&load_and_call());
    let (exit, r) = b.run(b.iret);
    assert_eq!((exit, r.gpr[ESP]), (WorldExit::Gate { reason: FAULTED }, STACK - 24));
    assert_eq!((b.word(STACK - 24), b.word(STACK - 20)), (4, USER));
    assert_eq!((b.ring0.world.vcpu_read(CR2), b.ring0.world.faults_delivered()), (AREA, 1));
    b.set_page(0, PRESENT);
    b.ring0.ram.write_u32(AREA_FRAME, 77).unwrap();
    let (exit, r) = b.run(b.iret);
    assert_eq!((exit, r.gpr[EBX]), (WorldExit::Gate { reason: CALLED }, 77));
    assert_eq!(b.ring0.world.faults_delivered(), 1);
}

#[test]
fn what_the_guest_has_flushed_is_gone_when_ring_3_goes_on() {
    let mut b = both(&load_and_call());
    for (page, value) in [(0, 1), (1, 2)] {
        b.set_page(page, PRESENT);
        b.ring0.ram.write_u32(AREA_FRAME + (u64::from(page) << 12), value).unwrap();
    }
    assert_eq!(b.run(b.iret).1.gpr[EBX], 1);
    let entry = USER_TABLE + u64::from(AREA >> 12 & 0x3ff) * 4;
    for round in 0..100u32 {
        let frame = AREA_FRAME as u32 + ((round & 1) << 12);
        b.ring0.ram.write_u32(entry, frame | PRESENT).unwrap();
        let (exit, r) = b.run(b.flush);
        assert_eq!((exit, r.gpr[EBX]), (WorldExit::Gate { reason: CALLED }, 1 + (round & 1)));
        let mut left = 0;
        b.ring0.world.take_flushes_of_users(&mut |_| left += 1);
        assert_eq!(left, 0);
        b.fills();
        b.ring0.world.take_fills(&mut |_| ());
    }
    // Not present: the flush is followed by the guest's own fault.
    b.ring0.ram.write_u32(entry, 0).unwrap();
    assert_eq!(b.run(b.flush).0, WorldExit::Gate { reason: FAULTED });
}

#[test]
fn a_flush_that_cannot_be_followed_here_is_left_to_the_monitor() {
    let mut b = both(&load_and_call());
    b.set_page(0, PRESENT);
    b.run(b.iret);
    assert!(!b.ring0.world.users_are_stale());
    // The page of ring 3's code; and with `invlpg` of nothing that is mapped ring 3 may run.
    for (lin, stale) in [(USER, true), (AREA + 0x3000, false)] {
        b.ring3.settle().unwrap();
        b.ring0.world.set_users(&b.rules);
        let mut r = HwRegs { eip: b.flush, ..regs() };
        r.gpr[ESP] = FRAME;
        r.gpr[EAX] = lin;
        let reason = if stale { IRET } else { CALLED };
        assert_eq!(b.ring0.run(&mut r), WorldExit::Gate { reason });
        assert_eq!(b.ring0.world.users_are_stale(), stale);
        b.ring0.world.take_fills(&mut |_| ());
    }
}

#[test]
fn commands_of_the_monitor_take_effect_before_ring_3_is_entered() {
    let mut b = both(&load_and_call());
    for i in 0..100u64 {
        b.ring0.ram.write_u32(AREA_FRAME + (i << 12), i as u32).unwrap();
        b.ring3.map(WorldLin(AREA), 0x1000, Backing::Ram(AREA_FRAME + (i << 12)), Prot::READ).unwrap();
        if i % 3 == 0 {
            // Told, and not entered.
            b.ring3.settle().unwrap();
        }
        assert_eq!(b.run(b.iret).1.gpr[EBX], i as u32);
    }
}

#[test]
fn other_exits_of_ring_3_are_the_monitors() {
    let mut b = both(&[0x0f, 0x0b]);
    let (exit, _) = b.run(b.iret);
    assert_eq!((exit, b.ring0.world.vcpu_read(CPL)), (WorldExit::Users, 3));
    let mut r = HwRegs::default();
    let undefined = WorldExit::Fault { vector: 6, error_code: 0, cr2: 0 };
    assert_eq!(b.ring3.take_exit(&mut r).unwrap(), undefined);
    assert_eq!((r.eip, r.gpr[ESP], r.eflags & 1), (USER, AREA + 0x800, 1));
    // And it is a world as before.
    assert_eq!(b.ring3.run(&mut r).unwrap(), undefined);
}

#[test]
fn a_kick_reaches_ring_3_too() {
    let mut b = both(&[0xeb, 0xfe]);
    for _ in 0..20 {
        let kickers = [b.ring0.world.kicker(), b.ring3.kicker()];
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            kickers.iter().for_each(|kicker| kicker.kick());
        });
        assert_eq!(b.run(b.iret).0, WorldExit::Users);
        assert_eq!(b.ring3.take_exit(&mut HwRegs::default()).unwrap(), WorldExit::Kick);
        thread.join().unwrap();
        b.ring0.world.forget_kick();
        b.ring3.forget_kick();
        b.ring0.world.vcpu_write(CPL, 0);
    }
}

/// `jmp 33h:USER+7`, then this 64-bit code.
fn long(code64: &[u8]) -> Vec<u8> {
    let mut code = vec![0xea];
    code.extend((USER + 7).to_le_bytes());
    code.extend([0x33, 0]);
    code.extend(code64);
    code
}

#[test]
fn ring_3_that_breaks_out_ends_its_own_world_and_not_ring_0s() {
    // mov rax, its arena; mov dword [rax], 0; jmp $: it hands over and does not sleep.
    let mut awake = vec![0x48, 0xb8];
    awake.extend(0x1000_0000_0000u64.to_le_bytes());
    awake.extend([0xc7, 0x00, 0, 0, 0, 0, 0xeb, 0xfe]);
    // mov rax, [0]
    for code in [vec![0x31, 0xc0, 0x48, 0x8b, 0x00], vec![0x0f, 0x05], awake] {
        let mut b = both(&long(&code));
        let start = Instant::now();
        // One that hands over is only found out when its exit is taken.
        let kicker = b.ring0.world.kicker();
        assert_eq!(b.run(b.iret).0, WorldExit::Users);
        let end = b.ring3.take_exit(&mut HwRegs::default());
        assert!(matches!(end, Err(WorldError::Died(_))), "{end:?}");
        assert!(start.elapsed() < Duration::from_secs(30));
        // Ring 0 goes on.
        b.rules.cell = 0;
        b.ring0.world.set_users(&b.rules);
        b.ring0.world.vcpu_write(CPL, 0);
        kicker.kick();
        assert_eq!(b.ring0.run(&mut regs()), WorldExit::Kick);
        assert_eq!(b.ring0.run(&mut regs()), WorldExit::Gate { reason: IRET });
    }
}

#[test]
fn ring_3_that_answers_no_kick_loses_its_world_in_the_end() {
    let mut b = both(&long(&[0xeb, 0xfe]));
    let kickers = [b.ring0.world.kicker(), b.ring3.kicker()];
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        // To the world of ring 0 alone: the other one might as well have blocked it.
        kickers[0].kick();
    });
    assert_eq!(b.run(b.iret).0, WorldExit::Users);
    assert!(matches!(b.ring3.take_exit(&mut HwRegs::default()), Err(WorldError::Died(_))));
    thread.join().unwrap();
}

#[test]
fn what_is_not_as_the_rules_say_is_left_to_the_monitor_with_nothing_changed() {
    let spoil: [fn(&mut Both); 6] = [
        |b| b.rules.cs = 0x33,
        |b| b.rules.ss_descriptor.low ^= 1,
        |b| b.ring0.ram.write_u32(0x2000 + u64::from(FRAME & 0xfff) + 8, 2).unwrap(),
        |b| b.ring0.ram.write_u32(0x2000 + u64::from(FRAME & 0xfff) + 8, IF | 0x100).unwrap(),
        |b| b.ring0.world.vcpu_write(0x04, 1),
        |b| b.rules.cell = 0,
    ];
    for spoil in spoil {
        let mut b = both(&load_and_call());
        spoil(&mut b);
        assert_eq!(b.run(b.iret).0, WorldExit::Gate { reason: IRET });
        assert_eq!(b.ring0.world.vcpu_read(CPL), 0);
    }
}
