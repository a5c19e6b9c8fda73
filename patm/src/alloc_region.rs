//! Trampoline memory: placed where the jump to it has the bytes its window needs, dense in few pages.

use alloc::collections::{BTreeMap, BTreeSet};

const PAGE: u32 = 4096;

/// Is `byte`, executed as the first byte of an instruction at privilege level 3 with IOPL 0 and no I/O permission, a
/// general-protection fault? `hlt`, `cli`, `sti`, `in`, `out`, `ins`, `outs`: SDM Vol. 3A, 5.9 and Vol. 1, 19.5.
#[must_use]
pub const fn traps(byte: u8) -> bool {
    matches!(byte, 0xf4 | 0xfa | 0xfb | 0xec..=0xef | 0xe4..=0xe7 | 0x6c..=0x6f)
}

/// Which bytes of a 32-bit displacement must trap (bit n: byte n).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Trapping(pub(crate) u8);

/// The memory at `base..base + len`, by offset.
#[derive(Debug)]
pub(crate) struct Allocator {
    base: u32,
    len: u32,
    used: BTreeMap<u32, u32>,
    /// Pages that hold or held something, with an upper bound of their largest gap.
    pages: BTreeMap<u32, u32>,
}

impl Allocator {
    pub(crate) fn new(base: u32, len: u32) -> Self {
        // The region must not wrap: offsets are added to `base` without a check everywhere else.
        let len = len.min(u32::MAX - base);
        Self { base, len, used: BTreeMap::new(), pages: BTreeMap::new() }
    }

    /// The smallest offset >= `at` where the displacement from `jump_end` has its trapping bytes; None past the end.
    fn next_fit(&self, mut at: u32, limit: u32, jump_end: u32, trapping: Trapping) -> Option<u32> {
        'next: while at < limit {
            let rel = self.base.wrapping_add(at).wrapping_sub(jump_end);
            for byte in (0..4).rev() {
                if trapping.0 & (1 << byte) != 0 && !traps((rel >> (8 * byte)) as u8) {
                    // Nothing changes in this byte before the lower ones wrap.
                    let step = 1u32 << (8 * byte);
                    at = at.checked_add(step - (rel & (step - 1)))?;
                    continue 'next;
                }
            }
            return Some(at);
        }
        None
    }

    /// Looks in `from..to` for `size` free bytes.
    fn find(&self, from: u32, to: u32, size: u32, jump_end: u32, trapping: Trapping) -> Option<u32> {
        let mut at = from;
        if let Some((&start, &len)) = self.used.range(..=from).next_back() {
            at = at.max(start + len);
        }
        loop {
            at = self.next_fit(at, to, jump_end, trapping)?;
            let end = at.checked_add(size).filter(|&end| end <= self.len)?;
            // The last thing that begins before our end, if it also ends behind our start, is in the way.
            match self.used.range(..end).next_back() {
                Some((&start, &len)) if start + len > at => at = start + len,
                _ => return Some(at),
            }
        }
    }

    /// Allocates `size` bytes (more than 0) so that a jump ending at EIP `jump_end` has its trapping bytes.
    pub(crate) fn allocate(&mut self, size: u32, jump_end: u32, trapping: Trapping) -> Option<u32> {
        let mut found = None;
        for (&page, gap) in &self.pages {
            if *gap < size.min(PAGE) {
                continue;
            }
            let from = page * PAGE;
            found = self.find(from, from + PAGE, size, jump_end, trapping);
            // Not into an untouched page if a touched one has room.
            if found.is_some_and(|at| self.pages.contains_key(&((at + size - 1) / PAGE))) {
                break;
            }
            found = None;
        }
        let at = match found {
            Some(at) => at,
            None => self.find(0, self.len, size, jump_end, trapping)?,
        };
        self.used.insert(at, size);
        for page in at / PAGE..=(at + size - 1) / PAGE {
            let gap = self.largest_gap(page);
            self.pages.insert(page, gap);
        }
        Some(self.base.wrapping_add(at))
    }

    fn largest_gap(&self, page: u32) -> u32 {
        let (lo, hi) = (page * PAGE, (page * PAGE).saturating_add(PAGE).min(self.len));
        let mut at = lo;
        if let Some((&start, &len)) = self.used.range(..lo).next_back() {
            at = at.max(start + len);
        }
        let mut best = 0;
        for (&start, &len) in self.used.range(lo..hi) {
            best = best.max(start.saturating_sub(at));
            at = at.max(start + len);
        }
        best.max(hi.saturating_sub(at))
    }

    /// Gives back what `allocate` returned.
    pub(crate) fn free(&mut self, at: u32) {
        let offset = at.wrapping_sub(self.base);
        let Some(size) = self.used.remove(&offset) else { return };
        for page in offset / PAGE..=(offset + size - 1) / PAGE {
            let gap = self.largest_gap(page);
            self.pages.insert(page, gap);
        }
    }

    /// Pages that were ever used, as EIPs of their first byte.
    pub(crate) fn pages(&self) -> BTreeSet<u32> {
        self.pages.keys().map(|p| self.base.wrapping_add(p * PAGE)).collect()
    }

    /// Bytes in use.
    pub(crate) fn used_bytes(&self) -> u32 {
        self.used.values().sum()
    }

    pub(crate) fn contains(&self, eip: u32) -> bool {
        eip.wrapping_sub(self.base) < self.len
    }
}
