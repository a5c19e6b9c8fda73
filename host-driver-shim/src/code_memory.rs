//! Code memory: the pool of pages that code views and trampolines live in.
//!
//! The monitor writes it; worlds can map it readable and executable only (they hold a read-only descriptor). A page
//! that is not in use is filled with `hlt`, so that a stale mapping of it traps.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::shared::SharedMap;

/// What every byte of a page holds after [`CodeMemory::alloc`] and after [`CodeMemory::free`]: `hlt`, which raises
/// #GP(0) outside ring 0.
pub const FILLER: u8 = 0xf4;

const PAGE: u64 = 4096;

/// A pool of 4 KiB pages of code. A clone is another handle to the same pool. Offsets are bytes into the pool, as
/// [`crate::world::Backing::Code`] takes them.
#[derive(Clone, Debug)]
pub struct CodeMemory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    map: Arc<SharedMap>,
    for_worlds: OwnedFd,
    pages: Mutex<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    /// Every page at or above this offset was never used.
    fresh: u64,
    free: Vec<u64>,
    used: u64,
}

impl CodeMemory {
    /// The pool used by default: 256 MiB of address space; host memory is taken as pages are used.
    pub const DEFAULT_SIZE: u64 = 256 << 20;

    /// A pool of at most `bytes` (a positive multiple of 4096).
    pub fn new(bytes: u64) -> io::Result<CodeMemory> {
        let len = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let map = SharedMap::new(c"subring-code", len)?;
        let for_worlds = map.read_only_fd()?;
        Ok(CodeMemory(Arc::new(Inner { map: Arc::new(map), for_worlds, pages: Mutex::default() })))
    }

    /// Takes one page, filled with [`FILLER`]; `None` if the pool is exhausted.
    #[must_use]
    pub fn alloc(&self) -> Option<u64> {
        let mut pages = self.0.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(offset) = pages.free.pop() {
            pages.used += 1;
            return Some(offset);
        }
        drop(pages);
        self.alloc_run(1)
    }

    /// Takes `count` neighbouring pages that were never used before, filled with [`FILLER`].
    #[must_use]
    pub fn alloc_run(&self, count: u32) -> Option<u64> {
        let len = u64::from(count) * PAGE;
        let mut pages = self.0.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = pages.fresh;
        let end = offset.checked_add(len)?;
        if end > self.size() {
            return None;
        }
        pages.fresh = end;
        pages.used += u64::from(count);
        drop(pages);
        self.0.map.fill(offset, usize::try_from(len).ok()?, FILLER)?;
        Some(offset)
    }

    /// Gives one page back and fills it with [`FILLER`]. `false` if no such page was ever taken.
    pub fn free(&self, offset: u64) -> bool {
        let mut pages = self.0.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if !offset.is_multiple_of(PAGE) || offset >= pages.fresh {
            return false;
        }
        debug_assert!(!pages.free.contains(&offset), "code page {offset:#x} freed twice");
        if self.0.map.fill(offset, PAGE as usize, FILLER).is_none() {
            return false;
        }
        pages.free.push(offset);
        pages.used = pages.used.saturating_sub(1);
        true
    }

    /// Size of the pool in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.map.len() as u64
    }

    /// Pages in use.
    #[must_use]
    pub fn used_pages(&self) -> u64 {
        self.0.pages.lock().unwrap_or_else(PoisonError::into_inner).used
    }

    /// Copies out, all or nothing.
    #[must_use]
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Option<()> {
        self.0.map.read(offset, to)
    }

    /// Copies in, all or nothing. A world executing these bytes meanwhile sees any mixture: only write code that no
    /// world can be in.
    #[must_use]
    pub fn write(&self, offset: u64, from: &[u8]) -> Option<()> {
        self.0.map.write(offset, from)
    }

    /// Reads one byte.
    #[must_use]
    pub fn read_u8(&self, offset: u64) -> Option<u8> {
        self.0.map.read_u8(offset)
    }

    /// Writes one byte.
    #[must_use]
    pub fn write_u8(&self, offset: u64, value: u8) -> Option<()> {
        self.0.map.write_u8(offset, value)
    }

    /// Reads a u32.
    #[must_use]
    pub fn read_u32(&self, offset: u64) -> Option<u32> {
        self.0.map.read_u32(offset)
    }

    /// Writes a u32 with one store.
    #[must_use]
    pub fn write_u32(&self, offset: u64, value: u32) -> Option<()> {
        self.0.map.write_u32(offset, value)
    }

    /// Sets `len` bytes to `byte`.
    #[must_use]
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> Option<()> {
        self.0.map.fill(offset, usize::try_from(len).ok()?, byte)
    }

    pub(crate) fn shared(&self) -> &Arc<SharedMap> {
        &self.0.map
    }

    pub(crate) fn world_fd(&self) -> RawFd {
        self.0.for_worlds.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_page_is_all_hlt_even_when_it_was_used_before() {
        let code = CodeMemory::new(0x4000).unwrap();
        let a = code.alloc().unwrap();
        code.write(a, &[0x90; 4096]).unwrap();
        assert!(code.free(a));
        let b = code.alloc().unwrap();
        assert_eq!(a, b);
        let mut page = [0; 4096];
        code.read(b, &mut page).unwrap();
        assert!(page.iter().all(|&x| x == FILLER));
    }

    #[test]
    fn an_exhausted_pool_says_so_and_serves_again_after_a_free() {
        let code = CodeMemory::new(0x3000).unwrap();
        let run = code.alloc_run(2).unwrap();
        let c = code.alloc().unwrap();
        assert_eq!((run, c, code.used_pages()), (0, 0x2000, 3));
        assert_eq!(code.alloc(), None);
        assert!(code.free(0x1000));
        assert_eq!(code.alloc(), Some(0x1000));
        assert!(!code.free(0x123));
        assert!(!code.free(0x3000));
    }
}
