//! What one view of one world has mapped: the spte side of every gpte that was used.
//!
//! The shadow is a virtual TLB. It is filled by faults, and a flush by the guest drops exactly the entries whose guest
//! table no longer says what was used at the fill (frame changed, or P, R/W, U/S or D went away).

use super::walk::{Leaf, PhysMemory, Upper};
use crate::cpum::CpuState;
use csam::{GuestLin, GuestPhys};
use std::collections::HashMap;

/// One mapped page, packed: frame number in bits 31..12, rights used below.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(u32);

impl Entry {
    const MAPPED: u32 = 1;
    const RW: u32 = 2;
    const US: u32 = 4;
    const NX: u32 = 8;
    const D: u32 = 0x10;
    const G: u32 = 0x20;
    const HOST_WRITE: u32 = 0x40;
    const LARGE: u32 = 0x80;

    /// The entry for a leaf mapped with or without host write access. Frames beyond 4 GiB are never mapped.
    #[must_use]
    pub fn new(leaf: &Leaf, host_write: bool) -> Entry {
        let mut e = (leaf.frame.0 as u32 & !0xfff) | Self::MAPPED;
        let mut put = |on: bool, bit: u32| e |= if on { bit } else { 0 };
        put(leaf.writable, Self::RW);
        put(leaf.user, Self::US);
        put(leaf.no_execute, Self::NX);
        put(leaf.dirty, Self::D);
        put(leaf.global, Self::G);
        put(host_write, Self::HOST_WRITE);
        put(leaf.shift > 12, Self::LARGE);
        Entry(e)
    }
    /// The page is mapped.
    #[must_use]
    pub fn mapped(self) -> bool {
        self.0 & Self::MAPPED != 0
    }
    /// Guest frame number.
    #[must_use]
    pub fn pfn(self) -> u32 {
        self.0 >> 12
    }
    /// The host mapping allows writes.
    #[must_use]
    pub fn host_write(self) -> bool {
        self.0 & Self::HOST_WRITE != 0
    }
    /// The guest marked it global.
    #[must_use]
    pub fn global(self) -> bool {
        self.0 & Self::G != 0
    }
    /// The guest lets users use it.
    #[must_use]
    pub fn user(self) -> bool {
        self.0 & Self::US != 0
    }
    fn large(self) -> bool {
        self.0 & Self::LARGE != 0
    }
    /// The leaf still allows everything this entry was filled with.
    fn still_good(self, leaf: &Leaf) -> bool {
        let now = Entry::new(leaf, false).0;
        let lost = self.0 & !now & (Self::RW | Self::US | Self::D);
        let gained_nx = now & !self.0 & Self::NX;
        now >> 12 == self.0 >> 12 && leaf.frame.0 >> 32 == 0 && lost == 0 && gained_nx == 0
    }
}

struct Region {
    entries: [Entry; 512],
    /// Which of them are mapped, a bit each.
    mapped: [u64; 8],
    /// Which of those are not global.
    local: [u64; 8],
    count: u16,
    large: u16,
}

/// The numbers of the bits set, ascending, as they are when asked.
fn numbers(bits: [u64; 8]) -> impl Iterator<Item = u32> {
    bits.into_iter().enumerate().flat_map(|(word, mut bits)| {
        std::iter::from_fn(move || {
            let bit = (bits != 0).then(|| bits.trailing_zeros())?;
            bits &= bits - 1;
            Some(word as u32 * 64 + bit)
        })
    })
}

impl Region {
    /// Notes that an entry is mapped or not, global or not.
    fn mark(&mut self, index: u32, mapped: bool, global: bool) {
        let bit = 1u64 << (index & 63);
        for (words, on) in [(&mut self.mapped, mapped), (&mut self.local, mapped && !global)] {
            let word = &mut words[(index >> 6) as usize & 7];
            if on { *word |= bit } else { *word &= !bit }
        }
    }

    /// If all that is mapped comes from one large page: the first mapped page, with the rights any of them was filled
    /// with.
    fn as_one(&self) -> Option<(u32, Entry)> {
        if self.large != self.count {
            return None;
        }
        let first = self.entries.iter().position(|e| e.mapped())?;
        let mut all = self.entries[first];
        for (i, e) in self.entries.iter().enumerate().skip(first).filter(|(_, e)| e.mapped()) {
            if e.pfn().wrapping_sub(i as u32) != all.pfn().wrapping_sub(first as u32) {
                return None;
            }
            all.0 |= e.0 & (Entry::RW | Entry::US | Entry::D);
            all.0 &= e.0 | !(Entry::NX | Entry::G);
        }
        Some((first as u32, all))
    }
}

/// Which translations a flush concerns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// A CR3 load: global entries stay.
    NonGlobal,
    /// A mode change or PGE toggle: all of them.
    All,
}

/// All mapped pages of one view, by 2 MiB region.
pub struct Shadow {
    regions: Vec<Option<Box<Region>>>,
    live: Vec<u16>,
    count: usize,
    small: usize,
    /// How often anything was entered or dropped (wraps).
    changes: u32,
    /// Frame number to the linear pages that (may) map it writable; checked against `regions` when used.
    writable: HashMap<u32, LinPages>,
}

/// Linear page numbers that showed one frame writable: nearly always one.
#[derive(Default)]
struct LinPages {
    first: u32,
    more: Vec<u32>,
}

impl Default for Shadow {
    fn default() -> Self {
        Shadow {
            regions: (0..2048).map(|_| None).collect(),
            live: Vec::new(),
            count: 0,
            small: 0,
            changes: 0,
            writable: HashMap::new(),
        }
    }
}

impl Shadow {
    /// The entry of the page `lin` lies in; unmapped ones say so.
    #[must_use]
    pub fn get(&self, lin: GuestLin) -> Entry {
        match &self.regions[(lin.0 >> 21) as usize] {
            Some(r) => r.entries[(lin.0 >> 12 & 511) as usize],
            None => Entry::default(),
        }
    }

    /// Records that the page of `lin` is mapped as `entry`.
    pub fn set(&mut self, lin: GuestLin, entry: Entry) {
        self.clear(lin);
        self.changes = self.changes.wrapping_add(1);
        let index = (lin.0 >> 21) as usize;
        let live = &mut self.live;
        let region = self.regions[index].get_or_insert_with(|| {
            live.push(index as u16);
            Box::new(Region {
                entries: [Entry::default(); 512],
                mapped: [0; 8],
                local: [0; 8],
                count: 0,
                large: 0,
            })
        });
        region.entries[(lin.0 >> 12 & 511) as usize] = entry;
        region.mark(lin.0 >> 12 & 511, true, entry.global());
        region.count += 1;
        region.large += u16::from(entry.large());
        self.count += 1;
        self.small += usize::from(!entry.large());
        if entry.host_write() {
            let page = lin.0 >> 12;
            match self.writable.entry(entry.pfn()) {
                std::collections::hash_map::Entry::Vacant(v) => {
                    v.insert(LinPages { first: page, more: Vec::new() });
                }
                std::collections::hash_map::Entry::Occupied(mut o) => {
                    let pages = o.get_mut();
                    if pages.first != page && !pages.more.contains(&page) {
                        pages.more.push(page);
                        let len = pages.more.len();
                        if len >= 32 && len.is_power_of_two() {
                            // A frame that is mapped here and there in turn: forget where it is no longer.
                            let (regions, pfn) = (&self.regions, entry.pfn());
                            pages.more.retain(|&p| {
                                let e = regions[(p >> 9) as usize & 2047]
                                    .as_ref()
                                    .map_or(Entry::default(), |r| r.entries[(p & 511) as usize]);
                                e.host_write() && e.pfn() == pfn
                            });
                        }
                    }
                }
            }
        }
    }

    /// The pages that map frame `pfn` writable now.
    pub fn take_writable(&mut self, pfn: u32) -> Vec<GuestLin> {
        let Some(pages) = self.writable.remove(&pfn) else { return Vec::new() };
        std::iter::once(pages.first)
            .chain(pages.more)
            .map(|p| GuestLin(p << 12))
            .filter(|&lin| {
                let e = self.get(lin);
                e.host_write() && e.pfn() == pfn
            })
            .collect()
    }

    /// Forgets the page of `lin`; returns whether it was mapped.
    pub fn clear(&mut self, lin: GuestLin) -> bool {
        let Some(region) = &mut self.regions[(lin.0 >> 21) as usize] else { return false };
        let slot = &mut region.entries[(lin.0 >> 12 & 511) as usize];
        let old = std::mem::take(slot);
        if !old.mapped() {
            return false;
        }
        self.changes = self.changes.wrapping_add(1);
        region.mark(lin.0 >> 12 & 511, false, false);
        region.count -= 1;
        region.large -= u16::from(old.large());
        self.count -= 1;
        self.small -= usize::from(!old.large());
        true
    }

    /// What `invlpg` of `lin` concerns: its page, and as far as they come from large pages its neighbours in the same
    /// 4 MiB. Forgets them and hands each to `dropped`.
    pub fn clear_page_of(&mut self, lin: GuestLin, mut dropped: impl FnMut(GuestLin)) {
        if self.clear(lin) {
            dropped(lin.page_base());
        }
        for base in [lin.0 & !0x3f_ffff, lin.0 & !0x3f_ffff | 0x20_0000] {
            for i in 0..512u32 {
                let Some(region) = &self.regions[(base >> 21) as usize] else { break };
                if region.large == 0 {
                    break;
                }
                let at = GuestLin(base | i << 12);
                if region.entries[i as usize].large() && self.clear(at) {
                    dropped(at);
                }
            }
        }
    }

    /// Forgets everything.
    pub fn clear_all(&mut self) {
        *self = Shadow { changes: self.changes.wrapping_add(1), ..Shadow::default() };
    }

    /// A number that is another one after anything was entered or dropped.
    #[must_use]
    pub fn changes(&self) -> u32 {
        self.changes
    }

    /// Where the guest has the table entries of all that a CR3 load concerns, as address and length in bytes. None: some of
    /// it has none.
    pub fn local_tables<M: PhysMemory + ?Sized>(
        &self,
        mem: &M,
        cpu: &CpuState,
    ) -> Option<Vec<(GuestPhys, u32)>> {
        let mut tables = Vec::new();
        for &index in &self.live {
            let Some(region) = self.regions[index as usize].as_ref() else { continue };
            let mut local = numbers(region.local);
            let Some(first) = local.next() else { continue };
            let (last, base) = (local.last().unwrap_or(first), GuestLin(u32::from(index) << 21));
            let entries = Upper::read(mem, cpu, base).entries(cpu, base, first, last)?;
            tables.extend(entries.into_iter().filter(|(_, len)| *len != 0));
        }
        Some(tables)
    }

    /// A page below this guest linear address is global.
    #[must_use]
    pub fn has_global_below(&self, end: u32) -> bool {
        self.live.iter().any(|&index| {
            let base = u32::from(index) << 21;
            base < end
                && self.regions[index as usize]
                    .as_ref()
                    .is_some_and(|r| r.mapped.iter().zip(r.local).any(|(mapped, local)| mapped & !local != 0))
        })
    }

    /// Number of mapped pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Number of mapped pages that do not come from a large guest page: about one host mapping each.
    #[must_use]
    pub fn small(&self) -> usize {
        self.small
    }

    /// Drops what a flush by the guest makes stale, and hands each dropped run (first page, pages) to `dropped`.
    pub fn sync<M: PhysMemory + ?Sized>(
        &mut self,
        mem: &M,
        cpu: &CpuState,
        scope: Scope,
        mut dropped: impl FnMut(GuestLin, u32),
    ) {
        let mut live = std::mem::take(&mut self.live);
        live.retain(|&index| {
            let Some(region) = self.regions[index as usize].as_mut() else { return false };
            if region.count == 0 {
                self.regions[index as usize] = None;
                return false;
            }
            let concerned = match scope {
                Scope::NonGlobal => region.local,
                Scope::All => region.mapped,
            };
            if concerned == [0; 8] {
                return true;
            }
            let base = u32::from(index) << 21;
            let upper = Upper::read(mem, cpu, GuestLin(base));
            // A whole region filled from one large page is still good if all of it together is.
            if let Some((i, e)) = region.as_one()
                && upper
                    .peek(mem, cpu, GuestLin(base | i << 12))
                    .is_some_and(|l| l.shift > 12 && e.still_good(&l) && (e.global() || !l.global))
            {
                return true;
            }
            let mut run: Option<(u32, u32)> = None;
            for i in numbers(concerned) {
                let e = region.entries[i as usize];
                let at = base | i << 12;
                let leaf = upper.peek(mem, cpu, GuestLin(at));
                match leaf.filter(|l| e.still_good(l)) {
                    // Filled before the guest made it global: from here on CR3 loads need not look at it.
                    Some(l) if l.global && !e.global() => {
                        region.entries[i as usize] = Entry(e.0 | Entry::G);
                        region.mark(i, true, true);
                    }
                    Some(_) => {}
                    None => {
                        self.changes = self.changes.wrapping_add(1);
                        region.entries[i as usize] = Entry::default();
                        region.mark(i, false, false);
                        region.count -= 1;
                        region.large -= u16::from(e.large());
                        self.count -= 1;
                        self.small -= usize::from(!e.large());
                        match &mut run {
                            Some((first, n)) if *first + (*n << 12) == at => *n += 1,
                            _ => {
                                if let Some((first, n)) = run.replace((at, 1)) {
                                    dropped(GuestLin(first), n);
                                }
                            }
                        }
                    }
                }
            }
            if let Some((at, n)) = run {
                dropped(GuestLin(at), n);
            }
            true
        });
        self.live = live;
    }

    /// Every mapped page.
    pub fn pages(&self) -> impl Iterator<Item = (GuestLin, Entry)> + '_ {
        self.live.iter().flat_map(move |&index| {
            let base = u32::from(index) << 21;
            self.regions[index as usize].iter().flat_map(move |r| {
                r.entries
                    .iter()
                    .enumerate()
                    .filter(|(_, e)| e.mapped())
                    .map(move |(i, e)| (GuestLin(base | (i as u32) << 12), *e))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use csam::GuestPhys;

    fn leaf(frame: u64, writable: bool, dirty: bool, global: bool) -> Leaf {
        Leaf { frame: GuestPhys(frame), writable, user: true, no_execute: false, dirty, global, shift: 12 }
    }

    #[test]
    fn an_entry_goes_stale_when_the_frame_or_a_right_goes_away_but_not_when_one_comes() {
        let e = Entry::new(&leaf(0x5000, true, true, false), true);
        assert!(e.still_good(&leaf(0x5000, true, true, false)));
        assert!(!e.still_good(&leaf(0x6000, true, true, false)));
        assert!(!e.still_good(&leaf(0x5000, false, true, false)));
        assert!(!e.still_good(&leaf(0x5000, true, false, false)));
        let ro = Entry::new(&leaf(0x5000, false, false, false), false);
        assert!(ro.still_good(&leaf(0x5000, true, true, false)));
    }

    #[test]
    fn counts_follow_what_is_set_and_cleared() {
        let mut s = Shadow::default();
        s.set(GuestLin(0x1000), Entry::new(&leaf(0x5000, true, true, false), true));
        s.set(GuestLin(0x1000), Entry::new(&leaf(0x6000, true, true, true), true));
        s.set(GuestLin(0xffff_f000), Entry::new(&leaf(0x6000, true, true, true), true));
        assert_eq!((s.len(), s.pages().count()), (2, 2));
        assert!(s.clear(GuestLin(0x1234)));
        assert!(!s.clear(GuestLin(0x1234)));
        assert_eq!(s.len(), 1);
    }

    #[test]
    fn the_tables_of_what_a_cr3_load_concerns_are_the_upper_entry_and_the_run_of_leaves() {
        let m = crate::machine::tests::machine(1);
        let cpu = crate::machine::tests::paged(&m, 0x1000, 0);
        let mut s = Shadow::default();
        assert_eq!(s.local_tables(&m, &cpu), Some(vec![]));
        for (page, global) in [(3, false), (9, false), (1, true), (20, true), (0x201, false)] {
            s.set(GuestLin(page << 12), Entry::new(&leaf(0x5000, true, true, global), true));
        }
        let at = |at| GuestPhys(at);
        let tables = vec![(at(0x1000), 4), (at(0x200c), 28), (at(0x1000), 4), (at(0x2804), 4)];
        assert_eq!(s.local_tables(&m, &cpu), Some(tables));
        assert!(s.has_global_below(0x1000) && !s.has_global_below(0));
        // What is no longer there has no tables to compare.
        s.set(GuestLin(0x40_0000), Entry::new(&leaf(0x5000, true, true, false), true));
        assert_eq!(s.local_tables(&m, &cpu), None);
    }

    #[test]
    fn whatever_is_entered_or_dropped_is_a_change() {
        let mut s = Shadow::default();
        let mut last = s.changes();
        let mut changed = |s: &Shadow| std::mem::replace(&mut last, s.changes()) != s.changes();
        s.set(GuestLin(0x1000), Entry::new(&leaf(0x5000, true, true, false), true));
        assert!(changed(&s));
        assert!(!s.clear(GuestLin(0x2000)) && !changed(&s));
        assert!(s.clear(GuestLin(0x1000)) && changed(&s));
        s.clear_all();
        assert!(changed(&s));
    }

    fn large(frame: u64, dirty: bool) -> Entry {
        let mut l = leaf(frame, true, dirty, false);
        l.shift = 21;
        Entry::new(&l, dirty)
    }

    #[test]
    fn invlpg_anywhere_in_a_large_page_drops_all_of_it_and_no_small_neighbour() {
        let mut s = Shadow::default();
        s.set(GuestLin(0x40_0000), large(0x40_0000, true));
        s.set(GuestLin(0x40_1000), Entry::new(&leaf(0x5000, true, true, false), true));
        s.set(GuestLin(0x7f_f000), large(0x7f_f000, true));
        s.set(GuestLin(0x80_0000), large(0x80_0000, true));
        let mut dropped = Vec::new();
        s.clear_page_of(GuestLin(0x55_5123), |lin| dropped.push(lin.0));
        assert_eq!(dropped, [0x40_0000, 0x7f_f000]);
        assert_eq!(s.len(), 2);
        s.clear_page_of(GuestLin(0x40_1fff), |lin| dropped.push(lin.0));
        assert_eq!((dropped.last(), s.len()), (Some(&0x40_1000), 1));
    }

    #[test]
    fn a_large_page_that_lost_its_d_bit_goes_stale_where_it_was_filled_with_it() {
        let m = crate::machine::tests::machine(1);
        let mut cpu = crate::machine::tests::paged(&m, 0x1000, 0);
        cpu.cr4 |= crate::cpum::cr4::PSE;
        let pde = csam::GuestPhys(0x1000);
        let mut s = Shadow::default();
        s.set(GuestLin(0), large(0, false));
        s.set(GuestLin(0x1000), large(0x1000, true));
        let mut count = |pde_value: u32| {
            m.write_u32(pde, pde_value);
            let mut n = 0;
            s.sync(&m, &cpu, Scope::All, |_, pages| n += pages);
            n
        };
        assert_eq!(count(0xc7), 0, "D is still set");
        assert_eq!(count(0x87), 1, "the page that was filled as dirty must fault at the next write");
    }

    #[test]
    fn a_region_filled_from_two_large_pages_in_turn_loses_what_is_from_the_old_one() {
        let m = crate::machine::tests::machine(1);
        let mut cpu = crate::machine::tests::paged(&m, 0x1000, 0);
        cpu.cr4 |= crate::cpum::cr4::PSE;
        let mut s = Shadow::default();
        s.set(GuestLin(0), large(0, true));
        s.set(GuestLin(0x1000), large(0x80_1000, true));
        m.write_u32(csam::GuestPhys(0x1000), 0xc7);
        let mut gone = Vec::new();
        s.sync(&m, &cpu, Scope::All, |at, pages| gone.push((at.0, pages)));
        assert_eq!(gone, [(0x1000, 1)]);
    }

    #[test]
    fn a_frame_shown_at_many_places_in_turn_is_remembered_only_where_it_is() {
        let mut s = Shadow::default();
        for i in 0..5000u32 {
            s.set(GuestLin(i << 12), Entry::new(&leaf(0x5000, true, true, false), true));
            if i != 17 {
                s.clear(GuestLin(i << 12));
            }
        }
        assert!(s.writable[&5].more.len() < 64);
        assert_eq!(s.take_writable(5), [GuestLin(17 << 12)]);
    }
}
