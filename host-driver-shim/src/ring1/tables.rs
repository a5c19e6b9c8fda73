//! PAE page tables of worlds, in memory of the virtual machine that no page table maps.
//!
//! [`Pool`] is that memory; [`Tables`] is one set of tables in it, for one world. The processor only sees entries written
//! here; those for guest memory are user pages where guest ring 3 may go, and supervisor pages else, as those of the region
//! (`monitor.rs`) are.

use std::sync::{Arc, Mutex, PoisonError};

use crate::shared::SharedMap;

const PAGE: u64 = 4096;
/// Entries of a PAE table.
const ENTRIES: u32 = 512;
/// Page tables that cover 4 GiB.
const TABLES: usize = 2048;
/// Pages of 4 GiB.
const PAGES: u32 = 1 << 20;

/// Bits of a PAE entry (SDM vol. 3, 4.4.2).
pub(super) mod bit {
    pub(crate) const PRESENT: u64 = 1;
    pub(crate) const WRITE: u64 = 2;
    pub(crate) const USER: u64 = 4;
    /// Set by us, so that the processor has nothing to write.
    pub(crate) const ACCESSED: u64 = 0x20;
    pub(crate) const DIRTY: u64 = 0x40;
    pub(crate) const NO_EXECUTE: u64 = 1 << 63;
    /// Ignored by the processor: guest RAM as data.
    pub(crate) const DATA: u64 = 1 << 9;
    /// What every entry has.
    pub(crate) const ALWAYS: u64 = PRESENT | ACCESSED | DIRTY;
    /// What [`super::Tables::protect`] changes.
    pub(crate) const RIGHTS: u64 = WRITE | NO_EXECUTE;
}

/// The monitor's memory: pages by their GuestPhys in the virtual machine, which is the offset in the memory object. 0 is
/// no page.
#[derive(Clone, Debug)]
pub(super) struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    map: SharedMap,
    pages: Mutex<Pages>,
}

#[derive(Debug)]
struct Pages {
    fresh: u64,
    free: Vec<u64>,
}

impl Pool {
    pub(super) fn new(bytes: usize) -> std::io::Result<Pool> {
        let pages = Mutex::new(Pages { fresh: PAGE, free: Vec::new() });
        Ok(Pool(Arc::new(Inner { map: SharedMap::new(c"subring-ring1", bytes)?, pages })))
    }

    /// The memory object.
    pub(super) fn map(&self) -> &SharedMap {
        &self.0.map
    }

    /// Takes a page of zeroes; `None`: there is none left.
    pub(super) fn alloc(&self) -> Option<u64> {
        let mut pages = self.0.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let page = pages.free.pop().or_else(|| {
            let page = pages.fresh;
            (page < self.0.map.len() as u64).then(|| {
                pages.fresh += PAGE;
                page
            })
        })?;
        drop(pages);
        self.0.map.fill(page, PAGE as usize, 0)?;
        Some(page)
    }

    /// Gives a page back.
    pub(super) fn free(&self, page: u64) {
        self.0.pages.lock().unwrap_or_else(PoisonError::into_inner).free.push(page);
    }

    fn entry(&self, table: u64, index: u32) -> u64 {
        self.0.map.read_u64(table + u64::from(index) * 8).unwrap_or(0)
    }

    fn set_entry(&self, table: u64, index: u32, entry: u64) {
        let _in_range = self.0.map.write_u64(table + u64::from(index) * 8, entry);
    }
}

/// No memory for tables.
#[derive(Debug)]
pub(super) struct Exhausted;

/// The tables of one world.
#[derive(Debug)]
pub(super) struct Tables {
    pool: Pool,
    /// The page with the four PDPTEs.
    root: u64,
    /// Page directories, all always there: what the processor keeps of PDPTEs never changes.
    directories: [u64; 4],
    /// Page tables by linear address >> 21; 0: none.
    tables: Vec<u64>,
    /// An entry the processor may have in its TLB was changed.
    pub(super) stale: bool,
}

impl Tables {
    pub(super) fn new(pool: &Pool) -> Result<Tables, Exhausted> {
        let mut taken = Vec::new();
        for _ in 0..5 {
            match pool.alloc() {
                Some(page) => taken.push(page),
                None => {
                    taken.into_iter().for_each(|p| pool.free(p));
                    return Err(Exhausted);
                }
            }
        }
        let directories = [taken[1], taken[2], taken[3], taken[4]];
        for (i, directory) in (0..).zip(directories) {
            pool.set_entry(taken[0], i, directory | bit::PRESENT);
        }
        Ok(Tables { pool: pool.clone(), root: taken[0], directories, tables: vec![0; TABLES], stale: false })
    }

    /// What CR3 is for this world.
    pub(super) fn cr3(&self) -> u32 {
        self.root as u32
    }

    fn table(&mut self, page: u32) -> Result<u64, Exhausted> {
        let number = page / ENTRIES;
        let known = self.tables[number as usize];
        if known != 0 {
            return Ok(known);
        }
        let table = self.pool.alloc().ok_or(Exhausted)?;
        self.tables[number as usize] = table;
        let entry = table | bit::PRESENT | bit::WRITE | bit::USER | bit::ACCESSED;
        let directory = self.directories[(number / ENTRIES) as usize];
        self.pool.set_entry(directory, number % ENTRIES, entry);
        Ok(table)
    }

    /// The entry of a page (linear >> 12); 0: none.
    pub(super) fn get(&self, page: u32) -> u64 {
        match self.tables[(page / ENTRIES) as usize] {
            0 => 0,
            table => self.pool.entry(table, page % ENTRIES),
        }
    }

    /// Guest RAM is mapped there as data.
    pub(super) fn is_data(&self, page: u32) -> bool {
        self.get(page & (PAGES - 1)) & bit::DATA != 0
    }

    /// Something is mapped there that is not guest RAM as data.
    pub(super) fn is_other(&self, page: u32) -> bool {
        let entry = self.get(page & (PAGES - 1));
        entry != 0 && entry & bit::DATA == 0
    }

    /// Sets the entry of a page.
    pub(super) fn set(&mut self, page: u32, entry: u64) -> Result<(), Exhausted> {
        let table = self.table(page)?;
        let old = self.pool.entry(table, page % ENTRIES);
        if old != entry {
            self.pool.set_entry(table, page % ENTRIES, entry);
            self.stale |= old & bit::PRESENT != 0;
        }
        Ok(())
    }

    /// Does something to each entry there is of the pages `first..end`; it yields the new one.
    fn change(&mut self, first: u32, end: u32, mut each: impl FnMut(u32, u64) -> u64) {
        let mut page = first;
        while page < end {
            let table = self.tables[(page / ENTRIES) as usize];
            let next = (page / ENTRIES + 1) * ENTRIES;
            if table != 0 {
                for p in page..next.min(end) {
                    let old = self.pool.entry(table, p % ENTRIES);
                    if old != 0 {
                        let new = each(p, old);
                        if new != old {
                            self.pool.set_entry(table, p % ENTRIES, new);
                            self.stale = true;
                        }
                    }
                }
            }
            page = next;
        }
    }

    /// Removes the pages `first..end` except those of the region, `keep..keep_end`.
    pub(super) fn clear(&mut self, first: u32, end: u32, keep: std::ops::Range<u32>) {
        self.change(first, end.min(PAGES), |p, old| if keep.contains(&p) { old } else { 0 });
    }

    /// Gives the present pages of `first..end` other rights; false if one is not present or is kept, then nothing changes.
    pub(super) fn protect(&mut self, first: u32, end: u32, rights: u64, keep: &std::ops::Range<u32>) -> bool {
        if (first..end).any(|p| self.get(p) == 0 || keep.contains(&p)) {
            return false;
        }
        self.change(first, end, |_, old| old & !bit::RIGHTS | rights);
        true
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        let all = self.tables.iter().chain(&self.directories).chain([&self.root]);
        all.filter(|p| **p != 0).for_each(|p| self.pool.free(*p));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = bit::PRESENT | bit::WRITE | bit::USER | bit::NO_EXECUTE;

    /// What the processor finds for a linear address.
    fn walk(pool: &Pool, cr3: u32, lin: u32) -> Option<u64> {
        let read = |table: u64, index: u32| {
            let e = pool.map().read_u64((table & 0xf_ffff_f000) + u64::from(index) * 8).unwrap();
            (e & bit::PRESENT != 0).then_some(e)
        };
        let directory = read(u64::from(cr3), lin >> 30)?;
        let table = read(directory, lin >> 21 & 511)?;
        read(table, lin >> 12 & 511)
    }

    #[test]
    fn the_processor_finds_what_was_set_and_nothing_else() {
        let pool = Pool::new(1 << 20).unwrap();
        let mut t = Tables::new(&pool).unwrap();
        for (page, frame) in [(0, 0x5000), (0xf_ffff, 0x1_0000_0000), (0x4_0200, 0x7000)] {
            t.set(page, frame | DATA).unwrap();
            assert_eq!(walk(&pool, t.cr3(), page << 12), Some(frame | DATA));
        }
        assert!(!t.stale, "what was not there is in no TLB");
        assert_eq!(walk(&pool, t.cr3(), 0x1000), None);
        assert_eq!(walk(&pool, t.cr3(), 0x8000_0000), None);
        t.set(0, 0x6000 | DATA).unwrap();
        assert!(t.stale);
    }

    #[test]
    fn clearing_everything_leaves_the_region() {
        let pool = Pool::new(1 << 20).unwrap();
        let mut t = Tables::new(&pool).unwrap();
        for page in [0, 511, 512, 1000, 0xf_ffff] {
            t.set(page, 0x1000 | DATA).unwrap();
        }
        t.clear(0, PAGES, 511..513);
        let there: Vec<u32> = (0..2048).filter(|p| t.get(*p) != 0).collect();
        assert_eq!(there, [511, 512]);
        assert_eq!(t.get(0xf_ffff), 0);
    }

    #[test]
    fn a_hole_cannot_be_protected() {
        let pool = Pool::new(1 << 20).unwrap();
        let mut t = Tables::new(&pool).unwrap();
        t.set(1, 0x1000 | DATA).unwrap();
        t.set(2, 0x2000 | DATA).unwrap();
        assert!(!t.protect(1, 4, bit::NO_EXECUTE, &(0..0)));
        assert_eq!(t.get(1), 0x1000 | DATA);
        assert!(t.protect(1, 3, bit::NO_EXECUTE, &(0..0)));
        assert_eq!(t.get(2), 0x2000 | DATA & !bit::WRITE);
        assert!(!t.protect(1, 3, DATA & bit::RIGHTS, &(2..3)));
    }

    #[test]
    fn dropped_tables_are_used_again_and_an_empty_pool_says_so() {
        let pool = Pool::new(8 * 4096).unwrap();
        for _ in 0..10 {
            let mut t = Tables::new(&pool).unwrap();
            t.set(0, 1).unwrap();
            t.set(512, 1).unwrap();
            assert!(t.set(1024, 1).is_err());
            assert!(Tables::new(&pool).is_err());
        }
    }
}
