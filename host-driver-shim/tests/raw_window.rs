//! Pages that a world lets in from a longer mapping show what the guest's tables say, and nothing else is shown.

mod common;
use common::*;
use host_driver_shim::raw::rc_deliver::REFILL;
use host_driver_shim::world::{
    Backing, FillMode, FillRules, HwRegs, Prot, QUICK_SITES, Quick, QuickKind, World, WorldExit, WorldLin,
};

const DIRECTORY: u64 = 0x10_0000;
const TABLE: u64 = 0x10_1000;
const AREA: u32 = 0x2000_0000;
const PAGE: u32 = 0x1000;
/// P, RW and US.
const USABLE: u32 = 7;
/// In [`REFILL`]: a write, and that there is one.
const WRITE: u32 = 3;
const REFILL_REASON: u32 = 0x101;
const INVLPG_REASON: u32 = 0x102;
/// Where the refill and the `invlpg` go on: code that stores ECX at EBX and loads it again into EDX.
const BEHIND: u32 = CODE + 0x200;
const INVLPG: u32 = CODE + 0x100;
/// Code that loads EDX from EBX, increments it and stores it there.
const INCREMENT: u32 = CODE + 0x180;
const INCREMENTS: [u8; 6] = [0x8b, 0x13, 0x42, 0x89, 0x13, 0xf4];
/// Code that only loads it.
const LOAD: u32 = CODE + 0x1c0;
const LOADS: [u8; 3] = [0x8b, 0x13, 0xf4];
const CODE_TABLE: u64 = 0x10_2000;
const CODE_FRAME: u64 = 0x10_3000;
/// P and US.
const READABLE: u32 = 5;
const SLOT: u16 = 100;

fn set_pte(g: &Guest, page: u32, value: u32) {
    g.ram.write_u32(TABLE + u64::from(page) * 4, value).unwrap();
}

fn rules() -> FillRules {
    let mode = FillMode::ENABLED | FillMode::SUPERVISOR | FillMode::WP;
    FillRules { cr3: DIRECTORY as u32, mode, ..FillRules::default() }
}

/// The same with the code as ring 3's, with data segments from an LDT. None, and SKIP, where there can be none.
fn guest_of_ring3() -> Option<Guest> {
    let mut g = guest();
    g.world.set_fill_rules(&FillRules { user_cs: u32::from(CS), ..rules() });
    // What ring 3 runs is looked for where the tables have it.
    g.ram.write_u32(DIRECTORY + u64::from(CODE >> 22) * 4, CODE_TABLE as u32 | USABLE).unwrap();
    g.ram.write_u32(CODE_TABLE, CODE_FRAME as u32 | READABLE).unwrap();
    g.ram.write(CODE_FRAME + u64::from(INCREMENT - CODE), &INCREMENTS).unwrap();
    g.ram.write(CODE_FRAME + u64::from(LOAD - CODE), &LOADS).unwrap();
    let has_ldt = has_ldt(&mut g);
    has_ldt.then_some(g)
}

fn guest() -> Guest {
    let mut g = Guest::new();
    let mut code = vec![0xf4; 0x300];
    let mut put = |at: u32, bytes: &[u8]| {
        let at = (at - CODE) as usize;
        code[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(CODE, &gate_jump(REFILL_REASON));
    put(INVLPG, &gate_jump(INVLPG_REASON));
    put(INCREMENT, &INCREMENTS);
    put(LOAD, &LOADS);
    put(BEHIND, &[0x89, 0x0b, 0x8b, 0x13, 0xf4]);
    g.put(&code);
    g.ram.write_u32(DIRECTORY + u64::from(AREA >> 22) * 4, TABLE as u32 | USABLE).unwrap();
    g.world.set_fill_rules(&rules());
    let mut quick = [Quick::default(); QUICK_SITES];
    quick[0] = Quick { reason: REFILL_REASON, kind: QuickKind::Refill, resume: BEHIND, ..Quick::default() };
    quick[1] = Quick { reason: INVLPG_REASON, kind: QuickKind::Invlpg, resume: BEHIND, ..Quick::default() };
    quick[1].base = EBX as u32;
    g.world.set_quick(&quick);
    g
}

/// From `eip`, which ends in a store of `value` to this page and a load from there.
fn go(g: &mut Guest, eip: u32, page: u32, value: u32) -> Result<u32, WorldExit> {
    go_with(regs(), g, eip, page, value).0
}

/// And the registers at the end.
fn go_with(
    mut r: HwRegs,
    g: &mut Guest,
    eip: u32,
    page: u32,
    value: u32,
) -> (Result<u32, WorldExit>, HwRegs) {
    (r.eip, r.gpr[EBX], r.gpr[ECX]) = (eip, AREA + page * PAGE, value);
    let exit = match g.run(&mut r) {
        GP => Ok(r.gpr[EDX]),
        // P is the host's: whether it maps something there.
        WorldExit::Fault { vector: 14, error_code, cr2 } => {
            Err(WorldExit::Fault { vector: 14, error_code: error_code & !1, cr2 })
        }
        other => Err(other),
    };
    (exit, r)
}

/// As [`go_with`] in [`guest_of_ring3`].
fn go_ring3(g: &mut Guest, eip: u32, page: u32, value: u32) -> (Result<u32, WorldExit>, HwRegs) {
    let ldt = SLOT << 3 | 7;
    go_with(HwRegs { sel: [ldt, CS, ldt, ldt, 0, 0], ..regs() }, g, eip, page, value)
}

/// Ring 3 increments a word of a page, for which the guest copies it to `frame` as Linux does: the old page is taken out and flushed
/// first. Yields how many accesses were done on guest RAM.
fn increment_copied(g: &mut Guest, page: u32, old: u32, frame: u32) -> u32 {
    let (before, value) = (g.world.accesses_done(), word(g, old).unwrap());
    let (exit, at) = go_ring3(g, INCREMENT, page, 0);
    assert_eq!((exit, at.eip, at.gpr[EDX]), (missed(page), INCREMENT + 3, value + 1), "page {page}");
    set_pte(g, page, 0);
    let (exit, _) = go_ring3(g, INVLPG, page, 0);
    assert_eq!(exit, missed(page));
    g.ram.write_u32(u64::from(frame) << 12, value).unwrap();
    set_pte(g, page, frame << 12 | USABLE);
    g.world.vcpu_write(REFILL, (AREA + page * PAGE) | WRITE);
    assert_eq!(go_ring3(g, CODE, page, value + 1).0, Ok(value + 1), "page {page}");
    assert_eq!((word(g, frame), word(g, old)), (Some(value + 1), Some(value)), "page {page}");
    g.world.take_fills(&mut |_| {});
    g.world.accesses_done().wrapping_sub(before)
}

/// The guest's handler has put `frame` there, and goes back to the store.
fn refill(g: &mut Guest, page: u32, frame: u32, value: u32) -> Result<u32, WorldExit> {
    set_pte(g, page, frame << 12 | USABLE);
    g.world.vcpu_write(REFILL, (AREA + page * PAGE) | WRITE);
    go(g, CODE, page, value)
}

fn missed(page: u32) -> Result<u32, WorldExit> {
    Err(WorldExit::Fault { vector: 14, error_code: 6, cr2: AREA + page * PAGE })
}

fn word(g: &Guest, frame: u32) -> Option<u32> {
    g.ram.read_u32(u64::from(frame) << 12)
}

#[test]
fn pages_the_tables_do_not_have_are_missed_touched_frames_and_untouched_ones() {
    let mut g = guest();
    // Frames 202h and 203h are in the host's memory, the others were never touched.
    g.ram.write_u32(0x20_2000, 0x1111).unwrap();
    g.ram.write_u32(0x20_3000, 0x2222).unwrap();
    assert_eq!(refill(&mut g, 1, 0x201, 0xabcd), Ok(0xabcd));
    assert_eq!(word(&g, 0x201), Some(0xabcd));
    for page in 2..20 {
        assert_eq!(go(&mut g, BEHIND, page, 5), missed(page), "page {page}");
    }
    assert_eq!((word(&g, 0x202), word(&g, 0x203), word(&g, 0x204)), (Some(0x1111), Some(0x2222), Some(0)));
    assert_eq!(go(&mut g, BEHIND, 1, 0xef), Ok(0xef), "the first still is there");
}

#[test]
fn frames_that_follow_and_frames_that_do_not_are_shown_where_the_tables_have_them() {
    let mut g = guest();
    // Each page's frame: following ones, a jump back, one that is there twice, and so on beyond a window's end.
    let frames = [0x201, 0x202, 0x203, 0x300, 0x301, 0x206, 0x203].into_iter().chain(0x400..0x430);
    let frames: Vec<u32> = frames.collect();
    for (page, frame) in (1..).zip(&frames) {
        assert_eq!(refill(&mut g, page, *frame, page << 8), Ok(page << 8), "page {page}");
        assert_eq!(word(&g, *frame), Some(page << 8));
    }
    for (page, frame) in (1..).zip(&frames) {
        assert_eq!(go(&mut g, BEHIND, page, page), Ok(page));
        assert_eq!(word(&g, *frame), Some(page), "page {page}");
    }
}

#[test]
fn after_invlpg_a_page_shows_what_the_tables_have_then() {
    let mut g = guest();
    for page in 1..6 {
        assert_eq!(refill(&mut g, page, 0x200 + page, 1), Ok(1));
    }
    for round in 0..3 {
        // Away: the store behind the instruction misses, whatever the window has there.
        for page in 1..6 {
            set_pte(&g, page, 0);
            assert_eq!(go(&mut g, INVLPG, page, 2), missed(page), "{round}: page {page}");
        }
        // There again, the third one with another frame each time.
        for page in 1..6 {
            let frame = if page == 3 { 0x500 + round } else { 0x200 + page };
            assert_eq!(refill(&mut g, page, frame, round << 16 | page), Ok(round << 16 | page));
            assert_eq!(word(&g, frame), Some(round << 16 | page));
        }
    }
    assert_eq!(word(&g, 0x203), Some(1));
}

#[test]
fn invlpg_takes_pages_behind_along_that_the_tables_have_not_any_more_and_no_others() {
    let mut g = guest();
    for page in 1..8 {
        // Frames nobody has touched are not let in, but mapped.
        g.ram.write_u32(u64::from(0x200 + page) << 12, 0).unwrap();
        assert_eq!(refill(&mut g, page, 0x200 + page, 1), Ok(1));
    }
    // Page 5 is there still, and so is what is behind it.
    for page in [2, 3, 4, 6] {
        set_pte(&g, page, 0);
    }
    assert_eq!(go(&mut g, INVLPG, 2, 2), missed(2));
    // From nothing to something needs no flush.
    for (page, frame) in [(3, 0x303), (4, 0x304), (6, 0x306)] {
        set_pte(&g, page, frame << 12 | USABLE);
    }
    for (page, frame) in [(3, 0x303), (4, 0x304), (5, 0x205), (6, 0x206)] {
        assert_eq!(go(&mut g, BEHIND, page, 7), Ok(7), "page {page}");
        assert_eq!(word(&g, frame), Some(7), "page {page}");
    }
}

#[test]
fn what_the_monitor_maps_or_unmaps_in_between_counts() {
    let mut g = guest();
    assert_eq!(refill(&mut g, 1, 0x201, 1), Ok(1));
    g.ram.write_u32(0x60_0000, 0x77).unwrap();
    g.world.map(WorldLin(AREA + 2 * PAGE), PAGE, Backing::Ram(0x60_0000), Prot::READ).unwrap();
    // The tables have frame 202h there, as the window had.
    assert_eq!(refill(&mut g, 2, 0x202, 2), Ok(2));
    assert_eq!((word(&g, 0x202), word(&g, 0x600)), (Some(2), Some(0x77)));
    g.world.unmap(WorldLin(AREA), 64 * PAGE).unwrap();
    set_pte(&g, 1, 0);
    set_pte(&g, 2, 0);
    for page in 1..5 {
        assert_eq!(go(&mut g, BEHIND, page, 3), missed(page));
        assert_eq!(refill(&mut g, page, 0x210 - page, 4), Ok(4), "downwards");
        assert_eq!(word(&g, 0x210 - page), Some(4));
    }
}

#[test]
fn more_windows_than_are_remembered_lose_nothing() {
    let mut g = guest();
    // Every 64th page of 1 GiB, each with a window of its own; their tables are from 2 MiB on, their frames from 4 MiB on.
    let directory = |i: u32| 0x20_0000 + u64::from(i) * 4096;
    for i in 0..256 {
        g.ram.write_u32(DIRECTORY + u64::from((AREA >> 22) + i) * 4, directory(i) as u32 | USABLE).unwrap();
    }
    let pages: Vec<u32> = (0..0x4_0000).step_by(64).collect();
    assert!(pages.len() > 2048 + 1024);
    let mut r = regs();
    for (n, page) in (0u32..).zip(&pages) {
        let frame = 0x400 + n % 0x800;
        let at = directory(page >> 10) + u64::from(page & 1023) * 4;
        g.ram.write_u32(at, frame << 12 | USABLE).unwrap();
        g.world.vcpu_write(REFILL, (AREA + page * PAGE) | WRITE);
        (r.eip, r.gpr[EBX], r.gpr[ECX]) = (CODE, AREA + page * PAGE, n);
        assert_eq!(g.run(&mut r), GP, "page {page:x}");
        assert_eq!(word(&g, frame), Some(n));
        g.world.take_fills(&mut |_| {});
    }
    for page in &pages[..40] {
        assert_eq!(go(&mut g, BEHIND, *page, 9), Ok(9));
        assert_eq!(go(&mut g, BEHIND, *page + 1, 9), missed(*page + 1));
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", g.world.pid())).unwrap();
    let low = maps.lines().filter(|l| l.split('-').next().is_some_and(|a| a.len() <= 8)).count();
    assert!(low < pages.len() + 2048 + 100, "{low} mappings");
}

/// Frames of pages that are only read, and of their copies.
const OLD: u32 = 0x600;
const COPY: u32 = 0x800;

/// So many pages that can be only read, with a number in each.
fn only_read(g: &Guest, pages: u32) {
    for page in 1..=pages {
        set_pte(g, page, (OLD + page) << 12 | READABLE);
        g.ram.write_u32(u64::from(OLD + page) << 12, page << 4).unwrap();
    }
}

#[test]
fn pages_that_are_copied_one_after_the_other_are_read_without_a_mapping() {
    let Some(mut g) = guest_of_ring3() else { return };
    only_read(&g, 60);
    for page in 1..=60 {
        let done = increment_copied(&mut g, page, OLD + page, COPY + page);
        // The first sixteen were shown together when the first was read.
        assert_eq!(done, u32::from(page >= 16), "page {page}");
    }
    for page in 1..=60 {
        assert_eq!(go_ring3(&mut g, LOAD, page, 0).0, Ok((page << 4) + 1), "page {page}");
        assert_eq!(go_ring3(&mut g, BEHIND, page, 7).0, Ok(7), "page {page}");
        assert_eq!(word(&g, OLD + page), Some(page << 4));
    }
}

#[test]
fn where_copies_were_expected_pages_show_what_the_tables_have() {
    let Some(mut g) = guest_of_ring3() else { return };
    only_read(&g, 60);
    for page in 1..=20 {
        increment_copied(&mut g, page, OLD + page, COPY + page);
    }
    for page in 20..=40 {
        g.ram.write_u32(u64::from(COPY + page) << 12, 0x9999).unwrap();
    }
    // Read, again and again, in any order.
    for page in [22, 24, 22, 24, 33, 40] {
        assert_eq!(go_ring3(&mut g, LOAD, page, 0).0, Ok(page << 4), "page {page}");
        assert_eq!(go_ring3(&mut g, BEHIND, page, 0).0, missed(page));
    }
    let before = g.world.accesses_done();
    for page in [22, 24, 22, 24] {
        assert_eq!(go_ring3(&mut g, LOAD, page, 0).0, Ok(page << 4), "page {page}");
    }
    assert_eq!(g.world.accesses_done(), before, "they are shown now");
    // Copied, with other frames than was expected, and with those.
    for (page, copy) in [(22, COPY + 0x100), (24, COPY + 24), (25, COPY + 25), (26, COPY + 0x101)] {
        increment_copied(&mut g, page, OLD + page, copy);
    }
    // Not there at all.
    for page in 27..=40 {
        set_pte(&g, page, 0);
        assert_eq!(go_ring3(&mut g, INVLPG, page, 0).0, missed(page));
        let (exit, at) = go_ring3(&mut g, LOAD, page, 0);
        let fault = WorldExit::Fault { vector: 14, error_code: 4, cr2: AREA + page * PAGE };
        assert_eq!((exit, at.eip), (Err(fault), LOAD), "page {page}");
    }
}

#[test]
fn a_page_that_may_be_written_to_where_a_copy_was_expected_is_read_and_written() {
    let Some(mut g) = guest_of_ring3() else { return };
    only_read(&g, 20);
    for page in 1..=19 {
        increment_copied(&mut g, page, OLD + page, COPY + page);
    }
    set_pte(&g, 20, (OLD + 20) << 12 | USABLE);
    let (exit, at) = go_ring3(&mut g, INCREMENT, 20, 0);
    assert_eq!((exit, at.eip), (Ok(20 << 4 | 1), INCREMENT + 5));
    assert_eq!(word(&g, OLD + 20), Some(20 << 4 | 1));
}

#[test]
fn code_that_the_tables_do_not_have_is_not_gone_through() {
    for keep_out in [true, false] {
        let Some(mut g) = guest_of_ring3() else { return };
        only_read(&g, 20);
        for page in 1..=19 {
            increment_copied(&mut g, page, OLD + page, COPY + page);
        }
        let mut rules = FillRules { user_cs: u32::from(CS), ..rules() };
        if keep_out {
            rules.keep_out[0] = (CODE >> 12, 1);
        } else {
            g.ram.write_u32(CODE_TABLE, 0).unwrap();
        }
        g.world.set_fill_rules(&rules);
        let before = g.world.accesses_done();
        assert_eq!(go_ring3(&mut g, LOAD, 20, 0).0, Ok(20 << 4));
        assert_eq!(g.world.accesses_done(), before);
    }
}
