//! What is known about code: per-page records of instruction starts, proven bytes, branch targets and sites.
//!
//! A [`CodeMap`] knows one linear address space in one code size. It grows by scanning (`scan.rs`) and shrinks by
//! [`CodeMap::forget_span`] when bytes change. Three facts a byte can have, independent of each other:
//! - an instruction *starts* here,
//! - it is *proven*: it belongs to an instruction some path reaches,
//! - it is a *target*: something may jump, call or return to it.
//!
//! Two decodings that overlap at different alignments are both kept; both run in real code (`je 1f; lock; 1:`).

use alloc::{boxed::Box, collections::BTreeMap, collections::BTreeSet, vec::Vec};
use iced_x86::Code;

use crate::GuestLin;
use crate::sensitivity::SensitiveKind;

/// The longest instruction there is, in bytes (SDM Vol. 2A, 2.3.11).
pub const MAX_INSTRUCTION: u32 = 15;

const PAGE: u32 = 4096;

/// The default operand and address size of the code segment (SDM Vol. 3A, 3.4.5, the D flag).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Default)]
pub enum CodeSize {
    /// D = 0: real mode, V86 mode and 16-bit segments.
    Bits16,
    /// D = 1.
    #[default]
    Bits32,
}

impl CodeSize {
    /// 16 or 32, as iced's decoder wants it.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
        }
    }
}

/// One sensitive instruction at one address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct SensitiveSite {
    /// Where it starts.
    pub at: GuestLin,
    /// Its length in bytes, 1..=15.
    pub len: u8,
    /// What it does.
    pub kind: SensitiveKind,
    /// Its exact form.
    pub code: Code,
}

/// A set of the 4096 byte offsets of a page.
#[derive(Clone, PartialEq, Eq)]
pub struct PageBits([u64; 64]);

impl Default for PageBits {
    fn default() -> Self {
        Self([0; 64])
    }
}

impl core::fmt::Debug for PageBits {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl PageBits {
    /// Is `offset` (taken modulo 4096) in the set?
    #[must_use]
    pub const fn contains(&self, offset: usize) -> bool {
        self.0[(offset >> 6) & 63] >> (offset & 63) & 1 != 0
    }

    /// Adds `offset` (modulo 4096); true when it was not there.
    pub const fn insert(&mut self, offset: usize) -> bool {
        let new = !self.contains(offset);
        self.0[(offset >> 6) & 63] |= 1 << (offset & 63);
        new
    }

    /// Removes `offset` (modulo 4096); true when it was there.
    pub const fn remove(&mut self, offset: usize) -> bool {
        let old = self.contains(offset);
        self.0[(offset >> 6) & 63] &= !(1 << (offset & 63));
        old
    }

    /// How many offsets are in the set, 0..=4096.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Is the set empty?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The first offset at or after `from`.
    #[must_use]
    pub fn next(&self, from: usize) -> Option<usize> {
        if from >= PAGE as usize {
            return None;
        }
        let mut index = from >> 6;
        let mut word = self.0[index] & (u64::MAX << (from & 63));
        loop {
            if word != 0 {
                return Some((index << 6) + word.trailing_zeros() as usize);
            }
            index += 1;
            word = *self.0.get(index)?;
        }
    }

    /// The offsets in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.range(0, PAGE as usize)
    }

    /// The offsets in `[from, end)` in ascending order.
    pub fn range(&self, mut from: usize, end: usize) -> impl Iterator<Item = usize> + '_ {
        core::iter::from_fn(move || {
            let found = self.next(from).filter(|found| *found < end)?;
            from = found + 1;
            Some(found)
        })
    }
}

/// What is known about one 4 KiB page.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct PageRecord {
    /// Offsets where a known instruction starts. One that runs into the next page starts here.
    pub starts: PageBits,
    /// Offsets of bytes that belong to a known instruction, whichever page it starts in.
    pub proven: PageBits,
    /// Offsets that a branch, a call, a return or an entry from outside may reach.
    pub targets: PageBits,
    /// The sensitive instructions that start here, in ascending order.
    sites: Vec<SensitiveSite>,
    /// Instruction lengths, four bits an offset; meaningful where `starts` has the bit.
    lengths: Lengths,
}

#[derive(Clone, PartialEq, Eq)]
struct Lengths([u8; 2048]);

impl Default for Lengths {
    fn default() -> Self {
        Self([0; 2048])
    }
}

impl core::fmt::Debug for Lengths {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Lengths")
    }
}

impl Lengths {
    const fn get(&self, offset: usize) -> u8 {
        self.0[(offset >> 1) & 2047] >> ((offset & 1) * 4) & 15
    }

    const fn set(&mut self, offset: usize, len: u8) {
        let shift = (offset & 1) * 4;
        let byte = &mut self.0[(offset >> 1) & 2047];
        *byte = *byte & !(15 << shift) | (len & 15) << shift;
    }
}

impl PageRecord {
    /// The sensitive instructions that start in this page, in ascending order.
    #[must_use]
    pub fn sites(&self) -> &[SensitiveSite] {
        &self.sites
    }

    /// The length of the instruction that starts at `offset` (modulo 4096).
    #[must_use]
    pub const fn length_at(&self, offset: usize) -> Option<u8> {
        if self.starts.contains(offset) { Some(self.lengths.get(offset)) } else { None }
    }
}

/// Everything known about the code of one linear address space in one code size.
#[derive(Clone, Debug)]
pub struct CodeMap {
    size: CodeSize,
    /// Where a page's record is in `records`.
    index: BTreeMap<u32, usize>,
    // Boxed because a record is 3.6 KiB and growing the list must not copy them.
    #[allow(clippy::vec_box)]
    records: Vec<Box<PageRecord>>,
    /// Indices in `records` that no page uses.
    free: Vec<usize>,
    /// The page asked for last and its index, because scans stay on a page.
    last: Option<(u32, usize)>,
    undecodable: BTreeSet<GuestLin>,
    instructions: usize,
}

impl CodeMap {
    /// An empty map of code of this size. Code executed in both sizes needs two maps.
    #[must_use]
    pub const fn new(size: CodeSize) -> Self {
        Self {
            size,
            index: BTreeMap::new(),
            records: Vec::new(),
            free: Vec::new(),
            last: None,
            undecodable: BTreeSet::new(),
            instructions: 0,
        }
    }

    /// The code size every instruction here was decoded in.
    #[must_use]
    pub const fn size(&self) -> CodeSize {
        self.size
    }

    /// How many instructions are known.
    #[must_use]
    pub const fn instruction_count(&self) -> usize {
        self.instructions
    }

    /// The record of a page, by page number (address / 4096).
    #[must_use]
    pub fn page(&self, page: u32) -> Option<&PageRecord> {
        let slot = match self.last {
            Some((last, slot)) if last == page => slot,
            _ => *self.index.get(&page)?,
        };
        self.records.get(slot).map(|record| &**record)
    }

    /// Every page something is known about, in ascending order of page number.
    pub fn pages(&self) -> impl Iterator<Item = (u32, &PageRecord)> {
        self.index.iter().filter_map(|(page, slot)| Some((*page, &**self.records.get(*slot)?)))
    }

    /// Does a known instruction start here?
    #[must_use]
    pub fn is_instruction_start(&self, at: GuestLin) -> bool {
        self.page(at.page_number()).is_some_and(|page| page.starts.contains(at.page_offset()))
    }

    /// The length in bytes of the known instruction that starts here.
    #[must_use]
    pub fn instruction_length(&self, at: GuestLin) -> Option<u8> {
        self.page(at.page_number())?.length_at(at.page_offset())
    }

    /// May something jump, call or return to this address? True for more than is so once code was forgotten: a target
    /// stays one, because nobody counts who else jumps there.
    #[must_use]
    pub fn is_target(&self, at: GuestLin) -> bool {
        self.page(at.page_number()).is_some_and(|page| page.targets.contains(at.page_offset()))
    }

    /// Does this byte belong to a known instruction?
    #[must_use]
    pub fn proven(&self, at: GuestLin) -> bool {
        self.page(at.page_number()).is_some_and(|page| page.proven.contains(at.page_offset()))
    }

    /// The site at exactly this address.
    #[must_use]
    pub fn site_at(&self, at: GuestLin) -> Option<&SensitiveSite> {
        let sites = self.page(at.page_number())?.sites();
        sites.get(sites.binary_search_by_key(&at, |site| site.at).ok()?)
    }

    /// Every site, in ascending order of address.
    pub fn sites(&self) -> impl Iterator<Item = &SensitiveSite> {
        self.pages().flat_map(|(_, page)| page.sites())
    }

    /// Addresses a path led to where no instruction could be decoded, in ascending order.
    pub fn undecodable(&self) -> impl Iterator<Item = GuestLin> + '_ {
        self.undecodable.iter().copied()
    }

    /// The known instructions that start in `[lo, hi)`, ascending, with their lengths. Nothing when `hi <= lo`.
    pub fn instructions_in(&self, lo: GuestLin, hi: GuestLin) -> impl Iterator<Item = (GuestLin, u8)> + '_ {
        self.starts_in(u64::from(lo.0), u64::from(hi.0))
    }

    /// The known instructions that share a byte with `[lo, hi)`, ascending, with their lengths.
    #[must_use]
    pub fn overlapping(&self, lo: GuestLin, hi: GuestLin) -> Vec<(GuestLin, u8)> {
        self.overlapping_span(u64::from(lo.0), u64::from(hi.0))
    }

    /// The bytes in `[lo, hi)` changed: forgets every instruction that shares a byte with the span, and every
    /// undecodable address that may have. Returns all of these in ascending order, so that their patches can be
    /// undone and just these be decoded again. Targets stay.
    ///
    /// What comes back were instructions; whether they still are only execution tells. Scanning from one that
    /// became the middle of something else would prove bytes that are no code, so scan again from those that
    /// execution reaches.
    pub fn forget_span(&mut self, lo: GuestLin, hi: GuestLin) -> Vec<GuestLin> {
        self.forget(u64::from(lo.0), u64::from(hi.0))
    }

    /// Forgets every instruction that has a byte in the page (by number), as [`CodeMap::forget_span`] does.
    pub fn forget_page(&mut self, page: u32) -> Vec<GuestLin> {
        let lo = u64::from(page & 0xf_ffff) << 12;
        let forgotten = self.forget(lo, lo + u64::from(PAGE));
        if self.page(page).is_some_and(|record| *record == PageRecord::default()) {
            if let Some(slot) = self.index.remove(&page) {
                self.free.push(slot);
            }
            self.last = None;
        }
        forgotten
    }

    // Spans in here are 64 bits wide because the end of the last page is no 32-bit address.

    fn starts_in(&self, lo: u64, hi: u64) -> impl Iterator<Item = (GuestLin, u8)> + '_ {
        let pages = if hi > lo { (lo >> 12) as u32..((hi - 1) >> 12) as u32 + 1 } else { 0..0 };
        self.index.range(pages).flat_map(move |(page, slot)| {
            let base = page << 12;
            self.records.get(*slot).into_iter().flat_map(move |record| {
                // The part of this page that is asked for, so that a small span does not walk the page.
                let from = lo.saturating_sub(u64::from(base)) as usize;
                let end = (hi - u64::from(base)).min(u64::from(PAGE)) as usize;
                record
                    .starts
                    .range(from, end)
                    .map(move |offset| (GuestLin(base | offset as u32), record.lengths.get(offset)))
            })
        })
    }

    fn overlapping_span(&self, lo: u64, hi: u64) -> Vec<(GuestLin, u8)> {
        let from = lo.saturating_sub(u64::from(MAX_INSTRUCTION - 1));
        let ends_after = |at: GuestLin, len: u8| u64::from(at.0) + u64::from(len) > lo;
        if hi <= lo {
            return Vec::new();
        }
        self.starts_in(from, hi).filter(|(at, len)| ends_after(*at, *len)).collect()
    }

    fn forget(&mut self, lo: u64, hi: u64) -> Vec<GuestLin> {
        let gone = self.overlapping_span(lo, hi);
        for (at, _) in &gone {
            self.remove_start(*at);
        }
        if let (Some((first, _)), Some((last, last_len))) = (gone.first(), gone.last()) {
            // A byte stays proven where an instruction that stays covers it.
            let end = gone.iter().map(|(at, len)| u64::from(at.0) + u64::from(*len)).max();
            let end = end.unwrap_or(u64::from(last.0) + u64::from(*last_len));
            for byte in u64::from(first.0)..end {
                self.set_proven(GuestLin(byte as u32), false);
            }
            for (at, len) in self.overlapping_span(u64::from(first.0), end) {
                for byte in 0..u32::from(len) {
                    self.set_proven(at.wrapping_add(byte), true);
                }
            }
        }
        let mut gone: Vec<_> = gone.into_iter().map(|(at, _)| at).collect();
        if hi > lo {
            let from = lo.saturating_sub(u64::from(MAX_INSTRUCTION - 1)) as u32;
            let stale = self.undecodable.range(GuestLin(from)..=GuestLin((hi - 1) as u32));
            let stale: Vec<_> = stale.copied().collect();
            for at in &stale {
                self.undecodable.remove(at);
            }
            gone.extend(stale);
            gone.sort_unstable();
        }
        gone
    }

    /// Forgets everything, targets too.
    pub fn clear(&mut self) {
        *self = Self::new(self.size);
    }

    pub(crate) fn add_instruction(&mut self, at: GuestLin, len: u8, site: Option<SensitiveSite>) {
        let offset = at.page_offset();
        let record = self.record_mut(at.page_number());
        let new = record.starts.insert(offset);
        record.lengths.set(offset, len);
        if let Some(site) = site
            && let Err(place) = record.sites.binary_search_by_key(&at, |site| site.at)
        {
            record.sites.insert(place, site);
        }
        let end = offset + usize::from(len);
        for byte in offset..end.min(PAGE as usize) {
            record.proven.insert(byte);
        }
        if end > PAGE as usize {
            let next = self.record_mut(at.wrapping_add(u32::from(len)).page_number());
            for byte in 0..end - PAGE as usize {
                next.proven.insert(byte);
            }
        }
        self.undecodable.remove(&at);
        self.instructions += usize::from(new);
    }

    /// Marks a branch target; true when it is new.
    pub(crate) fn add_target(&mut self, at: GuestLin) -> bool {
        self.record_mut(at.page_number()).targets.insert(at.page_offset())
    }

    pub(crate) fn add_undecodable(&mut self, at: GuestLin) {
        self.undecodable.insert(at);
    }

    fn remove_start(&mut self, at: GuestLin) {
        let record = self.record_mut(at.page_number());
        let known = record.starts.remove(at.page_offset());
        record.lengths.set(at.page_offset(), 0);
        if let Ok(place) = record.sites.binary_search_by_key(&at, |site| site.at) {
            record.sites.remove(place);
        }
        self.instructions -= usize::from(known);
    }

    fn set_proven(&mut self, at: GuestLin, proven: bool) {
        if !proven && self.page(at.page_number()).is_none() {
            return;
        }
        let bits = &mut self.record_mut(at.page_number()).proven;
        if proven {
            bits.insert(at.page_offset());
        } else {
            bits.remove(at.page_offset());
        }
    }

    fn record_mut(&mut self, page: u32) -> &mut PageRecord {
        let slot = match self.last {
            Some((last, slot)) if last == page => slot,
            _ => match self.index.get(&page) {
                Some(slot) => *slot,
                None => {
                    let slot = self.free.pop().unwrap_or_else(|| {
                        self.records.push(Box::default());
                        self.records.len() - 1
                    });
                    self.index.insert(page, slot);
                    slot
                }
            },
        };
        self.last = Some((page, slot));
        &mut self.records[slot]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map_of(instructions: &[(u32, u8)]) -> CodeMap {
        let mut map = CodeMap::new(CodeSize::Bits32);
        for (at, len) in instructions {
            map.add_instruction(GuestLin(*at), *len, None);
        }
        map
    }

    #[test]
    fn an_instruction_across_a_page_starts_in_the_first_and_proves_bytes_in_both() {
        let map = map_of(&[(0x1ffe, 5)]);
        assert_eq!(map.page(1).unwrap().starts.count(), 1);
        assert_eq!(map.page(2).unwrap().starts.count(), 0);
        assert_eq!(map.page(1).unwrap().proven.count(), 2);
        assert_eq!(map.page(2).unwrap().proven.count(), 3);
    }

    #[test]
    fn a_span_takes_the_instructions_that_reach_into_it_and_no_other() {
        let mut map = map_of(&[(0x1000, 1), (0x1001, 5), (0x1006, 2), (0x1008, 1)]);
        assert_eq!(map.forget_span(GuestLin(0x1005), GuestLin(0x1007)), [GuestLin(0x1001), GuestLin(0x1006)]);
        assert!(map.proven(GuestLin(0x1000)) && map.proven(GuestLin(0x1008)));
        assert!((0x1001..0x1008).all(|at| !map.proven(GuestLin(at))));
        assert_eq!(map.instruction_count(), 2);
    }

    #[test]
    fn bytes_of_an_overlapping_instruction_that_stays_stay_proven() {
        // 1003 changes: the 5-byte instruction goes, the 2-byte one inside it does not.
        let mut map = map_of(&[(0x1000, 5), (0x1001, 2)]);
        assert_eq!(map.forget_span(GuestLin(0x1003), GuestLin(0x1004)), [GuestLin(0x1000)]);
        assert!(!map.proven(GuestLin(0x1000)) && !map.proven(GuestLin(0x1004)));
        assert!(map.proven(GuestLin(0x1001)) && map.proven(GuestLin(0x1002)));
    }

    #[test]
    fn the_last_page_is_forgotten_to_its_last_byte() {
        let mut map = map_of(&[(0xffff_ffff, 1)]);
        assert_eq!(map.forget_page(0xf_ffff), [GuestLin(0xffff_ffff)]);
        assert_eq!(map.pages().count(), 0);
    }

    #[test]
    fn a_forgotten_page_keeps_its_targets() {
        let mut map = map_of(&[(0x1000, 1)]);
        map.add_target(GuestLin(0x1000));
        map.forget_page(1);
        assert!(map.is_target(GuestLin(0x1000)) && !map.is_instruction_start(GuestLin(0x1000)));
    }

    #[test]
    fn lengths_of_neighbours_do_not_mix() {
        let map = map_of(&[(0x1000, 15), (0x1001, 1), (0x1002, 7)]);
        let lengths: Vec<_> = map.instructions_in(GuestLin(0x1000), GuestLin(0x1002)).collect();
        assert_eq!(lengths, [(GuestLin(0x1000), 15), (GuestLin(0x1001), 1)]);
        assert_eq!(map.instruction_length(GuestLin(0x1002)), Some(7));
        assert_eq!(map.instruction_length(GuestLin(0x1003)), None);
    }
}
