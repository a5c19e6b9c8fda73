//! The world's side of shadow fill: a data fault that the guest's own tables allow is answered by mapping guest RAM,
//! without the monitor.
//!
//! What it does is what the monitor's `em/raw/fill.rs` does: same walk, same pages around, same write access. Whatever is
//! not plain (code in the way, devices, watched frames, our own pages) is left to the monitor.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU32};

use super::arena::{Arena, RAM_FD, RAM_VA, WATCHED_VA};
use super::fill::{FillArea, LOG, NO_FAULT, Note, is_set, note, put};
use super::rc::{FOR_RING3, map};
use super::rc_walk::{Access, Page, Tables, is_absent, is_only_read, prefetch, refusal, right, walk};
use super::rc_window;
use crate::world::{FillMode, FillRules};

/// Pages mapped around a faulting one where the guest has them present. As in the monitor.
const AROUND: u32 = 16;
/// 4 KiB pages mapped of a large one.
const LARGE_PAGES: u32 = 512;
/// World pages below this are never mapped (vm.mmap_min_addr of an ordinary account).
const LOW_PAGES: u32 = 16;
/// Page-fault error code: a write.
pub(crate) const PF_WRITE: u32 = 2;
/// Page-fault error code: a fetch.
const PF_FETCH: u32 = 16;

/// Guest RAM through the runtime's own mapping.
pub(crate) struct Ram {
    pub(crate) pages: u32,
}

impl Ram {
    pub(crate) fn word(&self, at: u64) -> Option<&AtomicU32> {
        if !at.is_multiple_of(4) || at >> 12 >= u64::from(self.pages) {
            return None;
        }
        let at: *mut u32 = std::ptr::with_exposed_provenance_mut((RAM_VA + at) as usize);
        // SAFETY: guest RAM has `pages` pages and is mapped at RAM_VA for the world's whole life; `at` is a multiple of 4
        // inside it. A world that lies about `pages` to itself ends by the fault.
        Some(unsafe { AtomicU32::from_ptr(at) })
    }

    pub(crate) fn holds(&self, pfn: u64) -> bool {
        pfn < u64::from(self.pages)
    }

    /// Writes to this frame are the monitor's business.
    pub(crate) fn is_watched(&self, pfn: u64) -> bool {
        if !self.holds(pfn) {
            return true;
        }
        let at: *mut u8 = std::ptr::with_exposed_provenance_mut((WATCHED_VA + pfn / 8) as usize);
        // SAFETY: the bitmap has a bit for each frame of RAM and is mapped, readable, for the world's whole life.
        let byte = unsafe { AtomicU8::from_ptr(at) }.load(Relaxed);
        byte >> (pfn % 8) & 1 != 0
    }
}

impl Tables for Ram {
    fn read(&self, at: u64) -> Option<u32> {
        self.word(at).map(|w| w.load(Relaxed))
    }
    fn update(&self, at: u64, old: u32, new: u32) -> bool {
        !self.is_watched(at >> 12)
            && self.word(at).is_some_and(|w| w.compare_exchange(old, new, SeqCst, Relaxed).is_ok())
    }
}

/// What a page fault of guest code is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    /// A miss of the shadow, filled: guest code can go on.
    Filled,
    /// The guest's: it is to see this error code and guest linear address.
    Guests { error_code: u32, lin: u32 },
    /// The monitor must look at it.
    Monitors,
}

/// Answers a page fault of guest code if it is only a shadow miss.
///
/// # Safety
/// In a world, `a` is its mapped arena, and the world has the turn.
pub(crate) unsafe fn answer(a: *mut Arena, cr2: u32, error: u32, cs: u16) -> Answer {
    // SAFETY: by contract; everything in the fill area but the rules is atomic.
    let (rules, ram, last) = unsafe {
        let area = &raw const (*a).fill;
        (
            (&raw const (*area).rules).read_volatile(),
            Ram { pages: (*area).ram_pages.load(Relaxed) },
            &(*area).last,
        )
    };
    if !rules.mode.contains(FillMode::ENABLED) {
        return Answer::Monitors;
    }
    let user_code = rules.user_cs != 0 && rules.user_cs == u32::from(cs);
    let user = user_code || !rules.mode.contains(FillMode::SUPERVISOR);
    let (write, fetch) = (error & PF_WRITE != 0, error & PF_FETCH != 0);
    let lin = if fetch { cr2 } else { cr2.wrapping_sub(rules.delta) };
    if (!fetch || user)
        && let Some(error_code) = refusal(&ram, &rules, lin, Access { write, user, fetch })
    {
        last.store(NO_FAULT, Relaxed);
        return Answer::Guests { error_code, lin };
    }
    // SAFETY: by contract.
    if unsafe { fill(a, cr2, error, cs) } { Answer::Filled } else { Answer::Monitors }
}

/// Whether ring 3 may execute the instruction at guest linear `eip`, as far as the guest's tables say.
///
/// # Safety
/// As [`answer`].
pub(crate) unsafe fn ring3_may_run(a: *mut Arena, eip: u32) -> bool {
    // SAFETY: by contract; everything in the fill area but the rules is atomic.
    let (rules, ram) = unsafe {
        let area = &raw const (*a).fill;
        ((&raw const (*area).rules).read_volatile(), Ram { pages: (*area).ram_pages.load(Relaxed) })
    };
    !rules.mode.contains(FillMode::ENABLED)
        || refusal(&ram, &rules, eip, Access { write: false, user: true, fetch: true }).is_none()
}

/// Fills a miss of the data shadow; false if it cannot.
///
/// # Safety
/// As [`answer`].
unsafe fn fill(a: *mut Arena, cr2: u32, error: u32, cs: u16) -> bool {
    // SAFETY: by contract.
    unsafe { fill_as(a, cr2, error, cs, false) }
}

/// Fills the page of a fault the guest's own handler has just answered.
///
/// # Safety
/// As [`answer`].
pub(crate) unsafe fn refill(a: *mut Arena, cr2: u32, error: u32, cs: u16) -> bool {
    // SAFETY: by contract.
    unsafe { fill_as(a, cr2, error, cs, true) }
}

/// # Safety
/// As [`answer`].
unsafe fn fill_as(a: *mut Arena, cr2: u32, error: u32, cs: u16, is_refill: bool) -> bool {
    // SAFETY: by contract; everything in the fill area but the rules is atomic.
    let (area, rules) = unsafe { (&(*a).fill, (&raw const (*a).fill.rules).read_volatile()) };
    if error & PF_FETCH != 0 {
        return false;
    }
    let user_code = rules.user_cs != 0 && rules.user_cs == u32::from(cs);
    let user = user_code || !rules.mode.contains(FillMode::SUPERVISOR);
    let ram = Ram { pages: area.ram_pages.load(Relaxed) };
    let target = Target { area, rules: &rules, ram: &ram, user, windows: is_refill };
    let mut now = |at: u32, pages: u32, prot: u32, pfn: u64| {
        map(at << 12, pages << 12, prot, RAM_FD as u32, pfn << 12) >= 0
    };
    fill_in(&target, cr2, error & PF_WRITE != 0, &mut now)
}

/// Maps so many pages at this one of the world with these rights (PROT_*) to frames from this one on; false: that failed.
pub(crate) type Map<'a> = &'a mut dyn FnMut(u32, u32, u32, u64) -> bool;

/// The world that is to be filled.
pub(crate) struct Target<'a> {
    pub(crate) area: &'a FillArea,
    /// How its guest's tables are walked.
    pub(crate) rules: &'a FillRules,
    pub(crate) ram: &'a Ram,
    /// With the rights of guest ring 3.
    pub(crate) user: bool,
    /// A window may answer.
    pub(crate) windows: bool,
}

/// Fills a miss of a world's data shadow at world address `cr2`; false if that cannot be done here.
pub(crate) fn fill_in(target: &Target<'_>, cr2: u32, write: bool, map: Map<'_>) -> bool {
    let &Target { area, rules, ram, user, windows: is_refill } = target;
    if !rules.mode.contains(FillMode::ENABLED) {
        return false;
    }
    let FillArea { present, foreign, last, answered, log, noted, large: large_regions, .. } = area;
    // The same fault again: the host does not do what we think. The monitor knows more.
    let this = cr2 & !0xfff | u32::from(write) << 1;
    if last.swap(this, Relaxed) == this {
        return false;
    }
    let lin = cr2.wrapping_sub(rules.delta);
    let place = Places { rules, foreign };
    if place.is_taken(cr2 >> 12) {
        return false;
    }
    let Some(page) = walk(ram, rules, lin, write, user) else { return false };
    let exposed = |at: u32, rights: u32| rights & right::USER == 0 && at < rules.users_below;
    if exposed(lin, page.rights) {
        return false;
    }
    if !ram.holds(page.frame >> 12) || write && ram.is_watched(page.frame >> 12) {
        return false;
    }
    let large = page.rights & right::LARGE != 0;
    let span = if large { LARGE_PAGES } else { AROUND };
    let centre = lin >> 12;
    let low = centre & !(span - 1);
    let delta_pages = rules.delta >> 12;
    if large && rules.keeps_out(low.wrapping_add(delta_pages) & 0xf_ffff, span) {
        return false;
    }
    if large && let Some(w) = large_regions.get((lin >> 26) as usize) {
        w.store(w.load(Relaxed) | 1 << (lin >> 21 & 31), Relaxed);
    }
    let mut runs = Runs { log, noted, present, rules, run: None, map };
    let mut fine = runs.have_room();
    let may_write =
        |rights: u32| rights & right::WRITABLE != 0 || !user && !rules.mode.contains(FillMode::WP);
    // All windows of a keyed world are ring 3's.
    let keyed_alike = !rules.mode.contains(FillMode::KEYS) || page.rights & right::USER != 0;
    if fine && is_refill && write && !large && keyed_alike && may_write(page.rights) {
        let (at, pfn) = (cr2 >> 12, (page.frame >> 12) as u32);
        // Where the guest has something already, it is mapped when it is accessed, unless it is soon to be copied.
        let free = |p: u32, copied: bool| {
            let lin = (p << 12).wrapping_sub(rules.delta);
            !is_set(present, p)
                && !place.is_taken(p)
                && (is_absent(ram, rules, lin) || copied && is_only_read(ram, rules, lin))
        };
        if rc_window::windows().let_in((at, pfn, key_of(rules, page.rights)), present, free) {
            put(present, at, 1, true);
            runs.note(at, 1, page.frame >> 12, (page.rights | right::HOST_WRITE) as u8);
            answered.store(answered.load(Relaxed).wrapping_add(1), Relaxed);
            return true;
        }
    }
    for number in low..low.wrapping_add(span) {
        let at = number.wrapping_add(delta_pages) & 0xf_ffff;
        let skip = at < LOW_PAGES || number != centre && is_set(present, at) || place.is_taken(at);
        let this = if skip {
            None
        } else if number == centre {
            Some(page)
        } else if large {
            let into = u64::from(number).wrapping_sub(u64::from(centre)) << 12;
            Some(Page { frame: page.frame.wrapping_add(into), ..page })
        } else {
            prefetch(ram, rules, number << 12, user).filter(|p| !exposed(number << 12, p.rights))
        };
        let this = this.filter(|p| ram.holds(p.frame >> 12)).map(|p| {
            let writes =
                may_write(p.rights) && p.rights & right::DIRTY != 0 && !ram.is_watched(p.frame >> 12);
            (p.frame >> 12, p.rights | if writes { right::HOST_WRITE } else { 0 })
        });
        fine = fine && runs.add(at, this);
    }
    fine = fine && runs.finish();
    if fine {
        answered.store(answered.load(Relaxed).wrapping_add(1), Relaxed);
    }
    fine
}

/// What is added to the PROT_* of a page with these rights.
fn key_of(rules: &FillRules, rights: u32) -> u32 {
    if rules.mode.contains(FillMode::KEYS) && rights & right::USER != 0 { FOR_RING3 } else { 0 }
}

/// Which world pages are not the guest's data's.
pub(crate) struct Places<'a> {
    pub(crate) rules: &'a FillRules,
    pub(crate) foreign: &'a super::fill::Bitmap,
}

impl Places<'_> {
    pub(crate) fn is_taken(&self, page: u32) -> bool {
        page < LOW_PAGES || is_set(self.foreign, page) || self.rules.keeps_out(page, 1)
    }
}

/// Pages that follow each other in the world and in RAM, with the same host access: one mapping.
struct Run {
    at: u32,
    pfn: u64,
    pages: u32,
    writes: bool,
    /// The key its pages get: 0, or [`FOR_RING3`].
    key: u32,
    /// Rights of each page; of a large page (they are all the same) the first only.
    rights: [u8; AROUND as usize],
}

struct Runs<'a> {
    log: &'a [Note; LOG],
    noted: &'a AtomicU32,
    present: &'a super::fill::Bitmap,
    rules: &'a FillRules,
    run: Option<Run>,
    map: Map<'a>,
}

impl Runs<'_> {
    /// The log takes what a window of small pages may need.
    fn have_room(&self) -> bool {
        self.noted.load(Relaxed) as usize + AROUND as usize <= LOG
    }

    /// The next page of the window; `None` is a gap. False if the host or the log refuses.
    fn add(&mut self, at: u32, page: Option<(u64, u32)>) -> bool {
        let Some((pfn, rights)) = page else { return self.finish() };
        let writes = rights & right::HOST_WRITE != 0;
        let key = key_of(self.rules, rights);
        if let Some(run) = &mut self.run
            && run.at.wrapping_add(run.pages) == at
            && run.pfn.wrapping_add(u64::from(run.pages)) == pfn
            && (run.writes, run.key) == (writes, key)
        {
            if let Some(r) = run.rights.get_mut(run.pages as usize) {
                *r = rights as u8;
            }
            run.pages = run.pages.wrapping_add(1);
            return true;
        }
        let fine = self.finish();
        let mut all = [0; AROUND as usize];
        if let Some(r) = all.first_mut() {
            *r = rights as u8;
        }
        self.run = Some(Run { at, pfn, pages: 1, writes, key, rights: all });
        fine
    }

    /// Maps the run and notes it.
    fn finish(&mut self) -> bool {
        let Some(run) = self.run.take() else { return true };
        if !self.have_room() {
            return false;
        }
        let prot = libc::PROT_READ | if run.writes { libc::PROT_WRITE } else { 0 };
        if !(self.map)(run.at, run.pages, prot as u32 | run.key, run.pfn) {
            return false;
        }
        put(self.present, run.at, run.pages, true);
        let [first, ..] = run.rights;
        if u32::from(first) & right::LARGE != 0 {
            self.note(run.at, run.pages, run.pfn, first);
            return true;
        }
        // One note for neighbours with the same rights.
        let (mut from, mut have) = (0u32, first);
        for i in 1..=run.pages {
            let rights = if i == run.pages { None } else { run.rights.get(i as usize).copied() };
            if rights != Some(have) {
                self.note(
                    run.at.wrapping_add(from),
                    i.wrapping_sub(from),
                    run.pfn.wrapping_add(u64::from(from)),
                    have,
                );
                (from, have) = (i, rights.unwrap_or(0));
            }
        }
        true
    }

    /// There is room: [`Self::have_room`].
    fn note(&self, at: u32, pages: u32, pfn: u64, rights: u8) {
        let _room = note(self.log, self.noted, at, pages, pfn as u32, u32::from(rights));
    }
}
