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
        let mut from = 0;
        core::iter::from_fn(move || {
            let found = self.next(from)?;
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
        let last_page = if hi > lo { hi.0.wrapping_sub(1) >> 12 } else { 0 };
        let pages = if hi > lo { lo.page_number()..last_page + 1 } else { 0..0 };
        self.index
            .range(pages)
            .flat_map(move |(page, slot)| {
                let record = self.records.get(*slot);
                let base = page << 12;
                record.into_iter().flat_map(move |record| {
                    record.starts.iter().map(move |offset| {
                        // An offset is below 4096.
                        (GuestLin(base | offset as u32), record.lengths.get(offset))
                    })
                })
            })
            .skip_while(move |(at, _)| *at < lo)
            .take_while(move |(at, _)| *at < hi)
    }

    /// The known instructions that share a byte with `[lo, hi)`, ascending, with their lengths.
    #[must_use]
    pub fn overlapping(&self, lo: GuestLin, hi: GuestLin) -> Vec<(GuestLin, u8)> {
        let from = GuestLin(lo.0.saturating_sub(MAX_INSTRUCTION - 1));
        self.instructions_in(from, hi)
            .filter(|(at, len)| at.0.saturating_add(u32::from(*len)) > lo.0)
            .collect()
    }

    /// The bytes in `[lo, hi)` changed: forgets every instruction that shares a byte with the span and returns their
    /// starts in ascending order, so that their patches can be undone and just these be scanned again. Targets stay.
    pub fn forget_span(&mut self, lo: GuestLin, hi: GuestLin) -> Vec<GuestLin> {
        let forgotten = self.overlapping(lo, hi);
        let reach = lo.0.saturating_sub(MAX_INSTRUCTION - 1);
        if hi > lo {
            let stale: Vec<_> = self.undecodable.range(GuestLin(reach)..hi).copied().collect();
            for at in stale {
                self.undecodable.remove(&at);
            }
        }
        let (Some(first), Some(last)) = (forgotten.first(), forgotten.last()) else { return Vec::new() };
        for (at, _) in &forgotten {
            self.remove_start(*at);
        }
        // A byte stays proven where another instruction that stays covers it.
        let end = last.0.0.saturating_add(MAX_INSTRUCTION);
        for byte in first.0.0..end {
            self.set_proven(GuestLin(byte), false);
        }
        for (at, len) in self.overlapping(first.0, GuestLin(end)) {
            for byte in 0..u32::from(len) {
                self.set_proven(at.wrapping_add(byte), true);
            }
        }
        forgotten.into_iter().map(|(at, _)| at).collect()
    }

    /// Forgets every instruction that has a byte in the page (by number) and returns their starts. Targets stay.
    pub fn forget_page(&mut self, page: u32) -> Vec<GuestLin> {
        let lo = GuestLin(page.wrapping_shl(12));
        // The end of the last page is not an address: it keeps its last byte only through an instruction that
        // wraps, and then that instruction starts before.
        let forgotten = self.forget_span(lo, GuestLin(lo.0.saturating_add(PAGE)));
        if self.page(page).is_some_and(|record| *record == PageRecord::default()) {
            if let Some(slot) = self.index.remove(&page) {
                self.free.push(slot);
            }
            self.last = None;
        }
        forgotten
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
