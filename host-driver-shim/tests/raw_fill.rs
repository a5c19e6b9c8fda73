//! A world answers data faults that the guest's own page tables allow, and only those.

mod common;
use common::*;
use host_driver_shim::raw::rc_walk::right;
use host_driver_shim::world::{Backing, Fill, FillMode, FillRules, HwRegs, Prot, World, WorldExit, WorldLin};

/// Guest tables in RAM: a page directory and the one table below it.
const DIRECTORY: u64 = 0x10_0000;
const TABLE: u64 = 0x10_1000;
/// The 4 MiB the table is about.
const AREA: u32 = 0x2000_0000;
/// First frame of what is mapped there.
const FRAMES: u32 = 0x200;
const P: u32 = 1;
const RW: u32 = 2;
const US: u32 = 4;
const A: u32 = 0x20;
const D: u32 = 0x40;

fn rules() -> FillRules {
    let mode = FillMode::ENABLED | FillMode::SUPERVISOR | FillMode::WP | FillMode::PSE;
    FillRules { cr3: DIRECTORY as u32, mode, ..FillRules::default() }
}

fn pte(g: &Guest, page: u32) -> u32 {
    g.ram.read_u32(TABLE + u64::from(page) * 4).unwrap()
}

fn set_pte(g: &Guest, page: u32, value: u32) {
    g.ram.write_u32(TABLE + u64::from(page) * 4, value).unwrap();
}

/// A guest with this code, by whose tables page i of [`AREA`] is frame [`FRAMES`] + i, with these rights.
fn guest(code: &[u8], rights: u32) -> Guest {
    let mut g = Guest::with(code);
    g.ram.write_u32(DIRECTORY + u64::from(AREA >> 22) * 4, TABLE as u32 | P | RW | US).unwrap();
    for i in 0..1024 {
        set_pte(&g, i, (FRAMES + i) << 12 | rights);
    }
    g.world.set_fill_rules(&rules());
    g
}

/// mov eax, [AREA + 4 * 4096]; mov [AREA + 5 * 4096], ecx; hlt
fn load_and_store() -> Vec<u8> {
    let mut c = vec![0xa1];
    c.extend((AREA + 0x4000).to_le_bytes());
    c.extend([0x89, 0x0d]);
    c.extend((AREA + 0x5000).to_le_bytes());
    c.push(0xf4);
    c
}

fn fills(g: &mut Guest) -> (Vec<Fill>, u32) {
    let mut all = Vec::new();
    let answered = g.world.take_fills(&mut |f| all.push(f));
    (all, answered)
}

fn page_fault(write: bool, present: bool, page: u32) -> WorldExit {
    let error_code = 4 | if write { 2 } else { 0 } | u32::from(present);
    WorldExit::Fault { vector: 14, error_code, cr2: AREA + page * 4096 }
}

#[test]
fn a_load_and_a_store_are_answered_without_an_exit_and_leave_everything_else_alone() {
    let mut g = guest(&load_and_store(), P | RW);
    g.ram.write_u32(u64::from(FRAMES + 4) << 12, 0x1234_5678).unwrap();
    g.world.fpu()[160..176].copy_from_slice(&[7; 16]);
    let mut r = regs();
    r.gpr = [1, 0x2222_2222, 3, 4, STACK, 6, 7, 8];
    r.eflags = 0xed7; // OF, DF, IF, SF, ZF, AF, PF, CF
    let before = r;
    assert_eq!(g.run(&mut r), GP);
    assert_eq!(r.eip, CODE + 11);
    assert_eq!(r.gpr, [0x1234_5678, 0x2222_2222, 3, 4, STACK, 6, 7, 8]);
    assert_eq!((r.sel, r.eflags & 0xed7), (before.sel, before.eflags));
    assert_eq!(g.world.fpu()[160..176], [7; 16]);
    assert_eq!(g.ram.read_u32(u64::from(FRAMES + 5) << 12), Some(0x2222_2222));
    // A where it looked, D where it wrote, and nothing beyond the 16 pages around.
    assert_eq!((pte(&g, 4) & (A | D), pte(&g, 5) & (A | D), pte(&g, 15) & (A | D)), (A, A | D, A));
    assert_eq!(pte(&g, 16) & (A | D), 0);
    let (all, answered) = fills(&mut g);
    assert_eq!(answered, 2);
    let read = right::WRITABLE;
    let written = read | right::DIRTY | right::HOST_WRITE;
    assert_eq!(
        all,
        [
            Fill { at: WorldLin(AREA), pages: 16, pfn: FRAMES, rights: read },
            Fill { at: WorldLin(AREA + 0x5000), pages: 1, pfn: FRAMES + 5, rights: written },
        ]
    );
    assert_eq!(fills(&mut g), (vec![], 0), "what was taken is gone");
}

#[test]
fn a_large_page_is_mapped_as_far_as_nothing_is_in_the_way() {
    let mut g = guest(&load_and_store(), 0);
    g.ram.write_u32(DIRECTORY + u64::from(AREA >> 22) * 4, 0x0040_0000 | 0x80 | D | P | RW).unwrap();
    g.world.map(WorldLin(AREA + 0x8000), 0x1000, Backing::Code(g.code_page), Prot::READ).unwrap();
    g.ram.set_watched(0x40a, true);
    assert_eq!(g.run(&mut regs()), GP);
    let (all, _) = fills(&mut g);
    let runs: Vec<_> = all.iter().map(|f| ((f.at.0 - AREA) >> 12, f.pages, f.pfn)).collect();
    assert_eq!(runs, [(0, 8, 0x400), (9, 1, 0x409), (10, 1, 0x40a), (11, 501, 0x40b)]);
    let writable: Vec<_> = all.iter().map(|f| f.rights & right::HOST_WRITE != 0).collect();
    assert_eq!(writable, [true, true, false, true], "a watched frame is not writable");
}

#[test]
fn what_the_tables_do_not_allow_is_an_exit() {
    for (rights, mode, user_sees) in [
        (0, FillMode::SUPERVISOR, (false, 4)),
        (P | RW, FillMode::empty(), (false, 4)),
        (P, FillMode::SUPERVISOR | FillMode::WP, (true, 5)),
        (P | US, FillMode::empty(), (true, 5)),
    ] {
        let mut g = guest(&load_and_store(), rights);
        g.world.set_fill_rules(&FillRules { mode: mode | FillMode::ENABLED, ..rules() });
        let (write, page) = user_sees;
        // The store finds what the load's window brought, read-only.
        assert_eq!(g.run(&mut regs()), page_fault(write, write, page), "{rights:x} {mode:?}");
        assert_eq!(pte(&g, 5) & D, 0);
    }
    // Without WP the supervisor writes to read-only pages.
    let mut g = guest(&load_and_store(), P);
    g.world.set_fill_rules(&FillRules { mode: FillMode::ENABLED | FillMode::SUPERVISOR, ..rules() });
    assert_eq!(g.run(&mut regs()), GP);
    assert_eq!(g.ram.read_u32(u64::from(FRAMES + 5) << 12), Some(0));
    assert_ne!(pte(&g, 5) & D, 0);
}

#[test]
fn code_with_the_user_selector_has_user_rights_in_a_supervisor_world() {
    let mut g = guest(&load_and_store(), P | RW);
    g.world.set_fill_rules(&FillRules { user_cs: u32::from(CS), ..rules() });
    // Flat segments are the host's and no user's of ours: not even a look.
    assert_eq!(g.run(&mut regs()), page_fault(false, false, 4));
    assert_eq!(pte(&g, 4) & A, 0);
    if !has_ldt(&mut g) {
        return;
    }
    let ldt = 100 << 3 | 7;
    let user = HwRegs { sel: [ldt, CS, ldt, ldt, 0, 0], ..regs() };
    assert_eq!(g.run(&mut user.clone()), page_fault(false, false, 4));
    for i in 0..16 {
        set_pte(&g, i, (FRAMES + i) << 12 | P | RW | US);
    }
    assert_eq!(g.run(&mut user.clone()), GP);
}

#[test]
fn user_code_that_loaded_another_segment_is_left_to_the_monitor() {
    // mov ds, bx; mov eax, [AREA + 4 * 4096]
    let mut c = vec![0x8e, 0xdb];
    c.extend(load_and_store());
    let mut g = guest(&c, P | RW | US);
    g.world.set_fill_rules(&FillRules { mode: FillMode::ENABLED, ..rules() });
    let mut r = regs();
    r.gpr[EBX] = 0x2b;
    assert_eq!(g.run(&mut r), GP, "the same selector is no other");
    g.world.unmap(WorldLin(AREA), 0x40_0000).unwrap();
    let mut r = HwRegs { sel: [DS, CS, DS, 0, 0, 0], ..regs() };
    r.gpr[EBX] = 0x2b;
    assert_eq!(g.run(&mut r), page_fault(false, false, 4));
}

#[test]
fn watched_frames_code_and_reservations_are_left_to_the_monitor() {
    type Case = (&'static str, fn(&mut Guest), WorldExit);
    let cases: [Case; 6] = [
        ("a write to a watched frame", |g| g.ram.set_watched(FRAMES + 5, true), page_fault(true, true, 5)),
        (
            "a watched page table",
            |g| g.ram.set_watched((TABLE >> 12) as u32, true),
            page_fault(false, false, 4),
        ),
        (
            "a reservation",
            |g| {
                let mut keep_out = [(0, 0); 8];
                keep_out[7] = ((AREA >> 12) + 3, 2);
                g.world.set_fill_rules(&FillRules { keep_out, ..rules() });
            },
            page_fault(false, false, 4),
        ),
        ("no RAM", |g| set_pte(g, 4, 0xfee0_0000 | P | RW), page_fault(false, false, 4)),
        (
            "a table outside RAM",
            |g| g.ram.write_u32(DIRECTORY + u64::from(AREA >> 22) * 4, 0xfff0_0000 | P | RW).unwrap(),
            page_fault(false, false, 4),
        ),
        ("no permission", |g| g.world.set_fill_rules(&FillRules::default()), page_fault(false, false, 4)),
    ];
    for (name, change, exit) in cases {
        let mut g = guest(&load_and_store(), P | RW);
        change(&mut g);
        assert_eq!(g.run(&mut regs()), exit, "{name}");
        let (all, answered) = fills(&mut g);
        assert_eq!(
            (all.is_empty(), answered),
            (exit != page_fault(true, true, 5), u32::from(!all.is_empty()))
        );
    }
    // Code is there, not readable: the fault is about data that would be in its place.
    let mut g = guest(&load_and_store(), P | RW);
    g.world.map(WorldLin(AREA + 0x4000), 0x1000, Backing::Code(g.code_page), Prot::empty()).unwrap();
    assert_eq!(g.run(&mut regs()), page_fault(false, false, 4));
    g.world.unmap(WorldLin(AREA + 0x4000), 0x1000).unwrap();
    assert_eq!(g.run(&mut regs()), GP);
}

#[test]
fn the_pages_around_are_those_the_guest_has_present_and_that_are_not_there_yet() {
    let mut g = guest(&load_and_store(), P | RW);
    set_pte(&g, 2, 0);
    set_pte(&g, 9, (FRAMES + 0x100) << 12 | P | RW);
    g.world.map(WorldLin(AREA + 0xc000), 0x1000, Backing::Ram(0x3000), Prot::READ).unwrap();
    assert_eq!(g.run(&mut regs()), GP);
    let (all, _) = fills(&mut g);
    let runs: Vec<_> = all.iter().map(|f| ((f.at.0 - AREA) >> 12, f.pages, f.pfn - FRAMES)).collect();
    assert_eq!(runs, [(0, 2, 0), (3, 6, 3), (9, 1, 0x100), (10, 2, 10), (13, 3, 13), (5, 1, 5)]);
    assert_eq!(pte(&g, 12) & A, 0);
}

#[test]
fn a_delta_separates_where_the_guest_has_it_from_where_the_world_has_it() {
    let mut g = guest(&load_and_store(), P | RW);
    // The guest's own addresses are 256 MiB lower.
    g.ram.write_u32(DIRECTORY + u64::from((AREA - 0x1000_0000) >> 22) * 4, TABLE as u32 | P | RW).unwrap();
    g.ram.write_u32(DIRECTORY + u64::from(AREA >> 22) * 4, 0).unwrap();
    assert_eq!(g.run(&mut regs()), page_fault(false, false, 4));
    g.world.set_fill_rules(&FillRules { delta: 0x1000_0000, ..rules() });
    assert_eq!(g.run(&mut regs()), GP);
    assert_eq!(fills(&mut g).0[0].at, WorldLin(AREA));
}

#[test]
fn single_stepping_goes_on_behind_an_answered_fault() {
    let mut g = guest(&load_and_store(), P | RW);
    let mut r = HwRegs { eflags: 0x302, ..regs() };
    assert_eq!(g.run(&mut r), WorldExit::Fault { vector: 1, error_code: 0, cr2: 0 });
    assert_eq!(r.eip, CODE + 5);
    assert_eq!(fills(&mut g).1, 1);
}

#[test]
fn a_full_log_is_an_exit_and_nothing_is_lost() {
    // The odd pages of 4 MiB: 512 runs. mov [ebx], ebx; add ebx, 2000h; loop; hlt
    let mut g = guest(&[0x89, 0x1b, 0x81, 0xc3, 0, 0x20, 0, 0, 0xe2, 0xf6, 0xf4], 0);
    for i in (1..1024).step_by(2) {
        set_pte(&g, i, (FRAMES + i) << 12 | P | RW);
    }
    let mut r = regs();
    (r.gpr[EBX], r.gpr[ECX]) = (AREA + 0x1000, 512);
    let mut exits = 0;
    let mut seen = std::collections::BTreeSet::new();
    while g.run(&mut r) != GP {
        exits += 1;
        assert!(exits < 50);
        for f in fills(&mut g).0 {
            seen.extend((0..f.pages).map(|i| (f.at.0 >> 12) + i));
        }
    }
    seen.extend(fills(&mut g).0.iter().map(|f| f.at.0 >> 12));
    assert!(exits >= 1);
    assert_eq!(seen.len(), 512);
    for i in (1..1024u32).step_by(2) {
        assert_eq!(g.ram.read_u32(u64::from(FRAMES + i) << 12), Some(AREA + i * 4096));
    }
}

#[test]
fn kicks_in_the_middle_of_answers_lose_nothing() {
    // mov [ebx], ebx; inc eax; add ebx, 1000h; loop; hlt
    let mut g = guest(&[0x89, 0x1b, 0x40, 0x81, 0xc3, 0, 0x10, 0, 0, 0xe2, 0xf5, 0xf4], P | RW);
    let kicker = g.world.kicker();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let storm = std::thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            kicker.kick();
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
    });
    let mut kicks = 0;
    for round in 0..20 {
        g.world.unmap(WorldLin(AREA), 0x40_0000).unwrap();
        for i in 0..1024 {
            // Every other frame, so that each page is a fault and a run of its own.
            set_pte(&g, i, (FRAMES + (i * 2 + round) % 1024) << 12 | P | RW);
        }
        let mut r = regs();
        (r.gpr[EBX], r.gpr[ECX]) = (AREA, 1024);
        loop {
            match g.run(&mut r) {
                WorldExit::Kick => kicks += 1,
                GP => break,
                WorldExit::Fault { vector: 14, .. } => {} // the log is full
                other => panic!("{other:?} at {:x}", r.eip),
            }
            fills(&mut g);
        }
        assert_eq!((r.gpr[EAX], r.gpr[EBX], r.gpr[ECX]), (1024, AREA + 0x40_0000, 0));
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    storm.join().unwrap();
    assert!(kicks > 0);
}
