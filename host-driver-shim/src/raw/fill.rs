//! Shadow fill inside worlds: what monitor and world share for it, and the monitor's side.
//!
//! 1. The monitor says by [`FillRules`] what the world needs for a walk of the guest's tables.
//! 2. Two bitmaps in the arena, a bit a page of the world's 4 GiB: [`FillArea::present`] (guest data is mapped there, by
//!    whichever side) and [`FillArea::foreign`] (something else is: code, our own pages). The monitor keeps them up to
//!    date as it queues commands, the world as it maps. Only the side that has the turn touches them.
//! 3. The world notes each run it mapped in [`FillArea::log`]; the monitor takes the notes after the run, as allegations.
//!
//! The world's side is [`super::rc_fill`], its walk [`super::rc_walk`].

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::arena::{Arena, ArenaMap};
use super::rc_cpuid::{CpuidTable, ROWS};
use super::rc_quick::QUICK;
use super::rc_users::FLUSHES;
use crate::world::{CpuidRow, DeliveryRules, Fill, FillRules, Quick, UsersRules, WorldLin};

/// Pages of a world.
const PAGES: u32 = 1 << 20;
/// How many runs the log holds.
pub(crate) const LOG: usize = 512;
/// No fault has been answered since the world was entered.
pub(crate) const NO_FAULT: u32 = u32::MAX;

/// One bit for each page of a world.
pub(crate) type Bitmap = [AtomicU32; (PAGES / 32) as usize];

/// One note of the log.
#[repr(C)]
pub(crate) struct Note {
    /// World page number.
    pub(crate) page: AtomicU32,
    pub(crate) pages: AtomicU32,
    pub(crate) pfn: AtomicU32,
    pub(crate) rights: AtomicU32,
}

/// Appends to the log, which `noted` counts; false if it is full.
pub(crate) fn note(
    log: &[Note; LOG],
    noted: &AtomicU32,
    page: u32,
    pages: u32,
    pfn: u32,
    rights: u32,
) -> bool {
    let n = noted.load(Relaxed);
    let Some(note) = log.get(n as usize) else { return false };
    note.page.store(page, Relaxed);
    note.pages.store(pages, Relaxed);
    note.pfn.store(pfn, Relaxed);
    note.rights.store(rights, Relaxed);
    noted.store(n.wrapping_add(1), Relaxed);
    true
}

/// The part of the arena that is about filling.
#[repr(C, align(4096))]
pub(crate) struct FillArea {
    pub(crate) present: Bitmap,
    pub(crate) foreign: Bitmap,
    pub(crate) rules: FillRules,
    /// A bit for each 2 MiB of guest linear space in which something of a large page was mapped, ever.
    pub(crate) large: [AtomicU32; 64],
    /// How many `invlpg`s were done, ever (wraps).
    pub(crate) flushes_done: AtomicU32,
    /// Accesses done on guest RAM ([`super::rc_access`]), ever (wraps).
    pub(crate) accessed: AtomicU32,
    /// Set-up: size of guest RAM in pages.
    pub(crate) ram_pages: AtomicU32,
    /// How many notes there are.
    pub(crate) noted: AtomicU32,
    /// How many faults were answered, ever (wraps).
    pub(crate) answered: AtomicU32,
    /// How many page faults were delivered to the guest, ever (wraps).
    pub(crate) delivered: AtomicU32,
    /// The fault answered last without an exit since: page address and bit 1 for a write; or [`NO_FAULT`].
    pub(crate) last: AtomicU32,
    pub(crate) log: [Note; LOG],
}

const _: () = {
    assert!(
        offset_of!(FillArea, foreign).is_multiple_of(4096)
            && offset_of!(FillArea, rules).is_multiple_of(4096)
    );
    assert!(size_of::<Note>() == 16);
};

/// Whether the bit of this page is set; what is beyond the last page is.
pub(crate) fn is_set(map: &Bitmap, page: u32) -> bool {
    map.get((page / 32) as usize).is_none_or(|w| w.load(Relaxed) >> (page % 32) & 1 != 0)
}

/// Sets or clears the bits of a run of pages, as far as they exist.
pub(crate) fn put(map: &Bitmap, first: u32, pages: u32, on: bool) {
    let end = first.saturating_add(pages).min(PAGES);
    let mut at = first;
    while at < end {
        let n = (32 - at % 32).min(end - at);
        let mask = (u32::MAX >> (32 - n)) << (at % 32);
        if let Some(w) = map.get((at / 32) as usize) {
            let old = w.load(Relaxed);
            let new = if on { old | mask } else { old & !mask };
            if new != old {
                w.store(new, Relaxed);
            }
        }
        at += n;
    }
}

/// What a mapping puts into a page of a world.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Shown {
    Nothing,
    /// Guest RAM for data accesses.
    Data,
    /// Code, or something of ours.
    Other,
}

impl ArenaMap {
    /// Notes what is mapped in a run of world pages from the next run on.
    pub(crate) fn show(&self, first: u32, pages: u32, what: Shown) {
        put(self.bitmap(offset_of!(FillArea, present)), first, pages, what == Shown::Data);
        put(self.bitmap(offset_of!(FillArea, foreign)), first, pages, what == Shown::Other);
    }

    /// Notes that nothing is mapped any more.
    pub(crate) fn show_nothing(&self) {
        // Both bitmaps: given back to the host, so they read as zero.
        let (map, start) = self.fill_area();
        if map.discard(start as u64, 2 * size_of::<Bitmap>()).is_err() {
            self.show(0, PAGES, Shown::Nothing);
        }
    }

    fn bitmap(&self, offset: usize) -> &Bitmap {
        let (map, start) = self.fill_area();
        // SAFETY: `offset` is that of one of the two bitmaps, so this lies inside the mapping, which lives as long as
        // self, at a multiple of 4; the elements are atomics.
        unsafe { &*map.base().as_ptr().add(start + offset).cast::<Bitmap>() }
    }

    pub(crate) fn set_fill_rules(&self, rules: &FillRules) {
        let (map, start) = self.fill_area();
        // SAFETY: both sides are one FillRules; the destination is inside the mapping.
        unsafe {
            let to = map.base().as_ptr().add(start + offset_of!(FillArea, rules));
            crate::shared::copy((&raw const *rules).cast(), to, size_of::<FillRules>());
        }
    }

    pub(crate) fn set_ram_pages(&self, pages: u32) {
        self.fill_word(offset_of!(FillArea, ram_pages)).store(pages, Relaxed);
        self.fill_word(offset_of!(FillArea, last)).store(NO_FAULT, Relaxed);
    }

    /// Something of a large page is mapped around this guest linear address.
    pub(crate) fn mark_large(&self, lin: u32) {
        let word = self.fill_word(offset_of!(FillArea, large) + (lin >> 26) as usize * 4);
        word.fetch_or(1 << (lin >> 21 & 31), Relaxed);
    }

    pub(crate) fn set_quick(&self, table: &[Quick; QUICK]) {
        let at = offset_of!(Arena, quick);
        // SAFETY: both sides are one such table; the destination is inside the mapping.
        unsafe {
            let to = self.shared().base().as_ptr().add(at);
            crate::shared::copy((&raw const *table).cast(), to, size_of::<[Quick; QUICK]>());
        }
    }

    /// How many `invlpg`s the world says it has done, ever.
    pub(crate) fn flushes_done(&self) -> u32 {
        self.fill_word(offset_of!(FillArea, flushes_done)).load(Relaxed)
    }

    /// Accesses the world says it has done on guest RAM.
    pub(crate) fn accesses_done(&self) -> u32 {
        self.fill_word(offset_of!(FillArea, accessed)).load(Relaxed)
    }

    /// As many rows as there is room for; with more, none.
    pub(crate) fn set_cpuid(&self, rows: &[CpuidRow]) {
        let n = if rows.len() > ROWS { 0 } else { rows.len() };
        let at = offset_of!(Arena, cpuid) + offset_of!(CpuidTable, row);
        // SAFETY: n rows fit the table, which lies inside the mapping.
        unsafe {
            let to = self.shared().base().as_ptr().add(at);
            crate::shared::copy(rows.as_ptr().cast(), to, n * size_of::<CpuidRow>());
        }
        let at = offset_of!(Arena, cpuid) + offset_of!(CpuidTable, rows);
        let _in_range = self.shared().write_u32(at as u64, n as u32);
    }

    pub(crate) fn set_delivery_rules(&self, rules: &DeliveryRules) {
        let at = offset_of!(Arena, delivery);
        // SAFETY: both sides are one DeliveryRules; the destination is inside the mapping.
        unsafe {
            let to = self.shared().base().as_ptr().add(at);
            crate::shared::copy((&raw const *rules).cast(), to, size_of::<DeliveryRules>());
        }
    }

    pub(crate) fn set_users(&self, rules: &UsersRules) {
        let at = offset_of!(Arena, users.rules);
        // SAFETY: both sides are one UsersRules; the destination is inside the mapping.
        unsafe {
            let to = self.shared().base().as_ptr().add(at);
            crate::shared::copy((&raw const *rules).cast(), to, size_of::<UsersRules>());
        }
        let _in_range = self.shared().write_u32(offset_of!(Arena, users.stale) as u64, 0);
        let _in_range = self.shared().write_u32(offset_of!(Arena, users.flushes) as u64, 0);
    }

    /// The guest has flushed something the world of ring 0 has not followed for the confined world.
    pub(crate) fn users_are_stale(&self) -> bool {
        self.shared().read_u32(offset_of!(Arena, users.stale) as u64) != Some(0)
    }

    /// World pages of the confined world whose flush the world of ring 0 has followed there in its notes only.
    pub(crate) fn flushes_of_users(&self) -> impl Iterator<Item = u32> {
        let word = |at: usize| self.shared().read_u32(at as u64).unwrap_or(0);
        let n = (word(offset_of!(Arena, users.flushes)) as usize).min(FLUSHES);
        (0..n).map(move |i| word(offset_of!(Arena, users.flushed) + 4 * i) & (PAGES - 1))
    }

    /// How many system calls of a confined world's the world says it has sent to the guest's handler, ever.
    pub(crate) fn calls(&self) -> u32 {
        self.shared().read_u32(offset_of!(Arena, users.calls) as u64).unwrap_or(0)
    }

    /// How many page faults the world says it has delivered, ever.
    pub(crate) fn faults_delivered(&self) -> u32 {
        self.fill_word(offset_of!(FillArea, delivered)).load(Relaxed)
    }

    /// How many faults the world says it has answered, ever.
    pub(crate) fn faults_answered(&self) -> u32 {
        self.fill_word(offset_of!(FillArea, answered)).load(Relaxed)
    }

    /// Hands over the log and empties it. At most [`LOG`] notes of any content.
    pub(crate) fn take_fills(&self, each: &mut dyn FnMut(Fill)) {
        let noted = self.fill_word(offset_of!(FillArea, noted));
        let n = (noted.load(Relaxed) as usize).min(LOG);
        for i in 0..n {
            let note = offset_of!(FillArea, log) + i * size_of::<Note>();
            let read = |field: usize| self.fill_word(note + field).load(Relaxed);
            each(Fill {
                at: WorldLin(read(offset_of!(Note, page)) << 12),
                pages: read(offset_of!(Note, pages)),
                pfn: read(offset_of!(Note, pfn)),
                rights: read(offset_of!(Note, rights)),
            });
        }
        if n != 0 {
            noted.store(0, Relaxed);
            // What it is armed for does not know of these.
            self.disarm();
        }
        self.forget_hand();
    }

    /// The atomic word at this offset of the fill area.
    fn fill_word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= size_of::<FillArea>());
        let (map, start) = self.fill_area();
        // SAFETY: the callers pass the offset of an AtomicU32 inside FillArea (of the log: i < LOG), so it lies in the
        // mapping, which lives as long as self.
        unsafe { AtomicU32::from_ptr(map.base().as_ptr().add(start + offset).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_end_where_they_should() {
        let arena = ArenaMap::new().unwrap();
        let map = arena.bitmap(0);
        for (first, pages) in [(0, 1), (31, 2), (5, 100), (64, 32), (PAGES - 3, 10)] {
            put(map, first, pages, true);
            let set = (0..PAGES).filter(|&p| is_set(map, p));
            assert!(set.eq(first..(first + pages).min(PAGES)), "{first} {pages}");
            put(map, first, pages, false);
            assert!((0..PAGES).all(|p| !is_set(map, p)));
        }
        assert!(is_set(map, PAGES));
    }

    #[test]
    fn what_is_shown_last_counts() {
        let arena = ArenaMap::new().unwrap();
        let both = |page| {
            let foreign = arena.bitmap(offset_of!(FillArea, foreign));
            (is_set(arena.bitmap(0), page), is_set(foreign, page))
        };
        arena.show(100, 3, Shown::Data);
        arena.show(101, 1, Shown::Other);
        assert_eq!((both(100), both(101), both(102)), ((true, false), (false, true), (true, false)));
        arena.show(102, 1, Shown::Nothing);
        assert_eq!(both(102), (false, false));
        arena.show_nothing();
        assert_eq!((both(100), both(101)), ((false, false), (false, false)));
    }
}
