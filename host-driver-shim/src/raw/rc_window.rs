//! Windows: guest RAM mapped ahead of the guest's own tables, of which the world lets in single pages when the tables allow
//! them.
//!
//! A `mmap` for each page a guest's handler has just filled is most of what such a fault costs. Guest kernels give out
//! frames that follow each other, and the same frames again at the same place. So the page goes in as the first of a
//! longer mapping that is registered with the world's userfaultfd: a page of it that was not let in raises
//! SIGBUS like any other miss (signal.rs), one that was (`UFFDIO_CONTINUE`) is there, and `MADV_DONTNEED` takes it out again.
//! Neither changes a mapping. (Documentation/admin-guide/mm/userfaultfd.rst of the Linux kernel.)
//!
//! [`Windows`] knows for each page of the world which frame a window has there, and is told of every other mapping.
//! Where there is no userfaultfd (Linux before 5.14, or forbidden) there are no windows, and pages are mapped one by one.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use super::arena::{RAM_FD, WINDOWS_VA};
use super::fill::{Bitmap, is_set};
use super::rc;

/// The world's userfaultfd; its number is free again when guest RAM and the watched frames are mapped.
pub(crate) const UFFD: i32 = super::arena::WATCHED_FD;
/// `UFFDIO_REGISTER`, `UFFDIO_CONTINUE`, `UFFDIO_API` of linux/userfaultfd.h.
pub(crate) const UFFDIO_REGISTER: u64 = 0xc020_aa00;
pub(crate) const UFFDIO_CONTINUE: u64 = 0xc020_aa07;
const UFFDIO_API: u64 = 0xc018_aa3f;
/// `UFFD_API`, `UFFD_USER_MODE_ONLY`, and the features: faults raise SIGBUS; missing and minor faults of shmem.
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: i32 = 1;
const FEATURES: u64 = 1 << 5 | 1 << 7 | 1 << 10;
/// `UFFDIO_REGISTER_MODE_MISSING` (pages of RAM nobody has touched so far) and `_MINOR`.
const REGISTER_MODE: u64 = 1 | 1 << 2;

/// Pages of a window.
const WINDOW: u32 = 16;
/// Windows remembered; with one more the oldest is closed, as far as nothing is in it.
const REMEMBERED: u32 = 2048;
/// When so many pages in a row got frames in a row, the next are expected to.
const ROW: u32 = 3;
const PAGES: usize = 1 << 20;
/// Bytes of [`Windows::frames`], which lie at [`WINDOWS_VA`].
pub(crate) const FRAMES_SIZE: u64 = 4 * PAGES as u64;

/// What a world knows about its windows: its own memory, zero at first.
#[repr(C)]
pub(crate) struct Windows {
    /// For each page of the world: the frame a window has there, plus 1; 0: no window.
    frames: [AtomicU32; PAGES],
    /// First pages of the last windows opened, a ring.
    opened: [AtomicU32; REMEMBERED as usize],
    /// How many were opened, ever (wraps).
    count: AtomicU32,
    /// There is a userfaultfd.
    enabled: AtomicU32,
    /// The page it was asked for last, and the frame.
    last: AtomicU32,
    last_frame: AtomicU32,
    /// So many times in a row both were behind those before, up to [`ROW`].
    row: AtomicU32,
}

/// The windows of this world.
pub(crate) fn windows() -> &'static Windows {
    let at: *const Windows = std::ptr::with_exposed_provenance(WINDOWS_VA as usize);
    // SAFETY: set-up maps zeroed memory of this size there before anything calls this, for the world's whole life; all
    // fields are atomics.
    unsafe { &*at }
}

/// A userfaultfd that does what windows need.
pub(crate) fn userfaultfd() -> Option<i32> {
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) } as i32;
    if fd < 0 {
        return None;
    }
    // struct uffdio_api: api, features, ioctls.
    let mut api = [UFFD_API, FEATURES, 0];
    // SAFETY: the kernel reads and writes the 24 bytes of `api`.
    if unsafe { libc::ioctl(fd, UFFDIO_API as libc::Ioctl, api.as_mut_ptr()) } == 0 {
        return Some(fd);
    }
    // SAFETY: closes the descriptor made above.
    unsafe { libc::close(fd) };
    None
}

/// Opens the world's userfaultfd at [`UFFD`], if the host has one to give.
pub(crate) fn set_up() {
    let Some(fd) = userfaultfd() else { return };
    // SAFETY: both are descriptors of this process, and nothing else uses UFFD any more.
    let fine = fd == UFFD || unsafe { libc::dup2(fd, UFFD) } == UFFD;
    if fd != UFFD {
        // SAFETY: closes the descriptor made above.
        unsafe { libc::close(fd) };
    }
    windows().enabled.store(u32::from(fine), Relaxed);
}

impl Windows {
    fn frame(&self, page: u32) -> u32 {
        self.frames.get(page as usize).map_or(0, |f| f.load(Relaxed))
    }

    fn set_frame(&self, page: u32, value: u32) {
        if let Some(f) = self.frames.get(page as usize) {
            f.store(value, Relaxed);
        }
    }

    /// Another mapping (or none) is now where these pages are.
    pub(crate) fn forget(&self, first: u32, pages: u32) {
        for page in first..first.saturating_add(pages).min(PAGES as u32) {
            if self.frame(page) != 0 {
                self.set_frame(page, 0);
            }
        }
    }

    /// Nothing is mapped any more.
    pub(crate) fn forget_all(&self) {
        // SAFETY: anonymous memory of our own (`frames` comes first), which reads as zero again; atomics are valid as that.
        unsafe {
            rc::syscall(libc::SYS_madvise, WINDOWS_VA, FRAMES_SIZE, libc::MADV_DONTNEED as u64, 0, 0, 0)
        };
    }

    /// Takes a page out, if a window has it: accesses miss then. So do those of the pages behind it, as far as windows have them
    /// and `stale` says that they are in, and gone: their flushes will come, and one call of the host for all of them costs what
    /// one for each does. How many; 0: the page is an ordinary mapping's.
    pub(crate) fn take_out(&self, page: u32, stale: impl Fn(u32) -> bool) -> u32 {
        if self.frame(page) == 0 {
            return 0;
        }
        let goes = |i: &u32| self.frame(page.wrapping_add(*i)) != 0 && stale(page.wrapping_add(*i));
        let pages = 1 + (1..WINDOW).take_while(goes).count() as u32;
        let (at, len) = (u64::from(page) << 12, u64::from(pages) << 12);
        // SAFETY: changes guest mappings below 4 GiB only.
        let r = unsafe { rc::syscall(libc::SYS_madvise, at, len, libc::MADV_DONTNEED as u64, 0, 0, 0) };
        if r == 0 { pages } else { 0 }
    }

    /// Ring 3 is expected to write to this page next, or a window waits for that.
    pub(crate) fn expects(&self, page: u32) -> bool {
        let next = self.last.load(Relaxed).wrapping_add(1) == page && self.row.load(Relaxed) == ROW;
        self.enabled.load(Relaxed) != 0 && (next || self.frame(page) != 0)
    }

    /// Shows frame `pfn`, writable, in a page (`more`: as for [`rc::reserve`], the same for all windows): from the window that
    /// has it there, or else from a new one. False: the caller is to map it. `free` says which pages may belong to a new window,
    /// with true also of those that the guest's tables show for reading; `present` which have a mapping of guest RAM.
    pub(crate) fn let_in(
        &self,
        (page, pfn, more): (u32, u32, u32),
        present: &Bitmap,
        free: impl Fn(u32, bool) -> bool,
    ) -> bool {
        if self.enabled.load(Relaxed) == 0 {
            return false;
        }
        let (last, last_frame) = (self.last.swap(page, Relaxed), self.last_frame.swap(pfn, Relaxed));
        let follows = (last.wrapping_add(1), last_frame.wrapping_add(1)) == (page, pfn);
        let row = if follows { self.row.load(Relaxed).wrapping_add(1).min(ROW) } else { 0 };
        self.row.store(row, Relaxed);
        if self.frame(page) == pfn.wrapping_add(1) {
            return continue_at(page);
        }
        let free = |page| free(page, row == ROW);
        // A page on its own, such as one that was copied on write, is better mapped by itself.
        if last != page.wrapping_sub(1) && !free(page.wrapping_sub(1)) {
            return false;
        }
        let pages = 1 + (1..WINDOW).take_while(|i| free(page.wrapping_add(*i))).count() as u32;
        pages > 1 && self.open((page, pfn, more), pages, present) && continue_at(page)
    }

    /// Makes a window, with nothing let in.
    fn open(&self, (page, pfn, more): (u32, u32, u32), pages: u32, present: &Bitmap) -> bool {
        self.close_oldest(present);
        if !rc::reserve(page << 12, pages << 12, RAM_FD as u32, u64::from(pfn) << 12, more) {
            return false;
        }
        // struct uffdio_register: start, len, mode, ioctls.
        let mut register = [u64::from(page) << 12, u64::from(pages) << 12, REGISTER_MODE, 0];
        let at = register.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: the kernel reads and writes the 32 bytes of `register`, which names guest mappings below 4 GiB.
        if unsafe { rc::syscall(libc::SYS_ioctl, UFFD as u64, UFFDIO_REGISTER, at, 0, 0, 0) } < 0 {
            // Nothing would stop an access to the other pages.
            rc::unmap(page << 12, pages << 12);
            return false;
        }
        for i in 0..pages {
            self.set_frame(page.wrapping_add(i), pfn.wrapping_add(i).wrapping_add(1));
        }
        if let Some(slot) = self.opened.get((self.count.load(Relaxed) % REMEMBERED) as usize) {
            slot.store(page, Relaxed);
        }
        self.count.store(self.count.load(Relaxed).wrapping_add(1), Relaxed);
        true
    }

    /// Unmaps what is left of the window whose place in the ring is needed: host mappings are not without limit.
    fn close_oldest(&self, present: &Bitmap) {
        let count = self.count.load(Relaxed);
        let Some(oldest) = self.opened.get((count % REMEMBERED) as usize) else { return };
        let first = oldest.load(Relaxed);
        if first == 0 {
            return;
        }
        let empty = |p: u32| self.frame(p) != 0 && !is_set(present, p);
        let (mut page, end) = (first, first.saturating_add(WINDOW));
        while page < end {
            let n = (page..end).take_while(|p| empty(*p)).count() as u32;
            if n != 0 {
                rc::unmap(page << 12, n << 12);
            }
            page += n.max(1);
        }
    }
}

fn continue_at(page: u32) -> bool {
    // struct uffdio_continue: start, len, mode, mapped.
    let mut at = [u64::from(page) << 12, 4096, 0, 0];
    let record = at.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: the kernel reads and writes the 32 bytes of `at`, which names a guest page below 4 GiB.
    unsafe { rc::syscall(libc::SYS_ioctl, UFFD as u64, UFFDIO_CONTINUE, record, 0, 0, 0) == 0 }
}
