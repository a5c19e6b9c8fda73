//! A memory object (memfd) mapped in the monitor and shared with worlds: bounds-checked copies, never references.
//!
//! Worlds write the same bytes at any moment, so nothing here hands out `&` or `&mut` into the mapping. Every access
//! is one inline-assembly instruction (or a volatile atomic), which the compiler can neither tear nor cache.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// A memfd of fixed size, mapped shared and read-write in this process.
#[derive(Debug)]
pub(crate) struct SharedMap {
    base: NonNull<u8>,
    len: usize,
    /// Where in the object the mapping begins.
    start: u64,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to the value for its whole life, and every access through it is a bounds-checked raw
// copy (assembly or atomic) that tolerates concurrent writers; no reference into it ever exists.
unsafe impl Send for SharedMap {}
// SAFETY: as for Send; all methods take `&self` and tolerate concurrent writers.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Creates the memory object with `len` bytes of zeroes and maps it.
    pub(crate) fn new(name: &CStr, len: usize) -> io::Result<SharedMap> {
        if len == 0 || !len.is_multiple_of(4096) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "size is not a positive multiple of 4096",
            ));
        }
        let off = libc::off_t::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: `name` is a valid C string; the call touches no memory of ours.
        let raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned by memfd_create and nobody else owns it.
        let low = unsafe { OwnedFd::from_raw_fd(raw) };
        // Number 16 or above: spawning a world installs its descriptors at 3, 4 and 5 and must not meet a source there.
        // SAFETY: `low` is open; fcntl touches no memory of ours.
        let raw = unsafe { libc::fcntl(low.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 16) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned by fcntl and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: plain descriptor operations on an open memfd.
        if unsafe { libc::ftruncate(raw, off) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // A world that could shrink the object would turn the monitor's accesses into SIGBUS.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: plain descriptor operation on an open memfd.
        if unsafe { libc::fcntl(raw, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                raw,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(SharedMap { base, len, start: 0, fd })
    }

    /// A mapping of its own of the `len` bytes at `offset`, with a descriptor of the whole object.
    pub(crate) fn part(&self, offset: u64, len: usize) -> io::Result<SharedMap> {
        let fine = offset.is_multiple_of(4096) && len.is_multiple_of(4096) && len > 0;
        let off = libc::off_t::try_from(offset).ok().filter(|_| fine && self.at(offset, len).is_some());
        let off = off.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: our descriptor is open; fcntl touches no memory of ours.
        let raw = unsafe { libc::fcntl(self.fd(), libc::F_DUPFD_CLOEXEC, 16) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned by fcntl and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours; the object is that large.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, libc::MAP_SHARED, raw, off) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(SharedMap { base, len, start: offset, fd })
    }

    /// Where in the object the mapping begins.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Where it is mapped in this process, for the kernel (KVM's memory slots).
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// A second descriptor of the object that allows no writable mapping.
    pub(crate) fn read_only_fd(&self) -> io::Result<OwnedFd> {
        let path = std::ffi::CString::new(format!("/proc/self/fd/{}", self.fd()))?;
        // SAFETY: `path` is a valid C string.
        let low = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        if low < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `low` was just opened and nobody else owns it.
        let low = unsafe { OwnedFd::from_raw_fd(low) };
        // SAFETY: `low` is open; fcntl touches no memory of ours.
        let raw = unsafe { libc::fcntl(low.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 16) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned by fcntl and nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    }

    /// The address of `offset` if `len` bytes from there lie inside.
    #[inline]
    fn at(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset + len <= self.len, so the result stays inside the mapping (or one past its end).
        Some(unsafe { self.base.as_ptr().add(offset) })
    }

    /// Copies from the object into `to`; `None` (and nothing copied) if it does not lie inside.
    #[inline]
    pub(crate) fn read(&self, offset: u64, to: &mut [u8]) -> Option<()> {
        let from = self.at(offset, to.len())?;
        // SAFETY: `from` is valid for to.len() bytes (checked by `at`), `to` is ours alone.
        unsafe { copy(from, to.as_mut_ptr(), to.len()) };
        Some(())
    }

    /// Copies `from` into the object; `None` (and nothing copied) if it does not lie inside.
    #[inline]
    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Option<()> {
        let to = self.at(offset, from.len())?;
        // SAFETY: `to` is valid for from.len() bytes (checked by `at`), `from` cannot overlap a mapping that no
        // reference ever points into.
        unsafe { copy(from.as_ptr(), to, from.len()) };
        Some(())
    }

    /// Sets `len` bytes to `byte`.
    pub(crate) fn fill(&self, offset: u64, len: usize, byte: u8) -> Option<()> {
        let to = self.at(offset, len)?;
        // SAFETY: `to` is valid for `len` bytes; `rep stosb` writes exactly those (DF is clear by the ABI).
        unsafe {
            std::arch::asm!("rep stosb", inout("rdi") to => _, inout("rcx") len => _, in("al") byte,
                options(nostack, preserves_flags));
        }
        Some(())
    }

    pub(crate) fn read_u8(&self, offset: u64) -> Option<u8> {
        let p = self.at(offset, 1)?;
        // SAFETY: `p` is valid for one byte.
        Some(unsafe { p.read_volatile() })
    }

    pub(crate) fn write_u8(&self, offset: u64, value: u8) -> Option<()> {
        let p = self.at(offset, 1)?;
        // SAFETY: `p` is valid for one byte.
        unsafe { p.write_volatile(value) };
        Some(())
    }

    /// An aligned u32 of the object as an atomic, `None` if it is outside or misaligned.
    pub(crate) fn atomic_u32(&self, offset: u64) -> Option<&AtomicU32> {
        let p = self.at(offset, 4)?;
        if !p.addr().is_multiple_of(4) {
            return None;
        }
        // SAFETY: `p` is aligned, valid for the life of `self`, and an atomic tolerates concurrent writers; the other
        // accessors are assembly, which does not count as a non-atomic access of the same program.
        Some(unsafe { AtomicU32::from_ptr(p.cast()) })
    }

    /// Replaces `old` by `new` in an aligned u32; `Some(false)` if it did not hold `old`.
    pub(crate) fn compare_exchange_u32(&self, offset: u64, old: u32, new: u32) -> Option<bool> {
        let a = self.atomic_u32(offset)?;
        Some(a.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok())
    }

    /// Gives the host back the memory of whole pages; they read as zero afterwards.
    pub(crate) fn discard(&self, offset: u64, len: usize) -> io::Result<()> {
        if self.at(offset, len).is_none() || !offset.is_multiple_of(4096) || !len.is_multiple_of(4096) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let place = self.start.saturating_add(offset);
        let (Ok(off), Ok(n)) = (libc::off_t::try_from(place), libc::off_t::try_from(len)) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: plain descriptor operation; the mapping stays, its pages become zero.
        if unsafe { libc::fallocate(self.fd(), mode, off, n) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The first byte of the mapping. Whoever uses it promises not to make references other than to atomics.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

macro_rules! accessors {
    ($($read:ident $write:ident $t:ty, $reg:ident, $shape:literal;)*) => {
        impl SharedMap {
            $(
                #[doc = "Reads little-endian at any alignment with one load; `None` if it does not lie inside."]
                pub(crate) fn $read(&self, offset: u64) -> Option<$t> {
                    let p = self.at(offset, size_of::<$t>())?;
                    let value: $t;
                    // SAFETY: `p` is valid for the width of the load.
                    unsafe {
                        std::arch::asm!(concat!("mov {v:", $shape, "}, [{p}]"), v = out($reg) value, p = in(reg) p,
                            options(nostack, preserves_flags, readonly));
                    }
                    Some(value)
                }

                #[doc = "Writes little-endian at any alignment with one store; `None` if it does not lie inside."]
                pub(crate) fn $write(&self, offset: u64, value: $t) -> Option<()> {
                    let p = self.at(offset, size_of::<$t>())?;
                    // SAFETY: `p` is valid for the width of the store.
                    unsafe {
                        std::arch::asm!(concat!("mov [{p}], {v:", $shape, "}"), v = in($reg) value, p = in(reg) p,
                            options(nostack, preserves_flags));
                    }
                    Some(())
                }
            )*
        }
    };
}

accessors! {
    read_u16 write_u16 u16, reg, "x";
    read_u32 write_u32 u32, reg, "e";
    read_u64 write_u64 u64, reg, "r";
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and no pointer into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Stores a word again and again; the compiler does not look into it, for memory others may access meanwhile.
///
/// # Safety
/// `to` is writable for `count` words.
pub(crate) unsafe fn fill_words(to: *mut u8, value: u32, count: usize) {
    // SAFETY: by contract. DF is clear by the ABI.
    unsafe {
        std::arch::asm!("rep stosd", inout("rcx") count => _, inout("rdi") to => _, in("eax") value,
            options(nostack, preserves_flags));
    }
}

/// A byte copy the compiler does not look into, for memory others may write meanwhile.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, and they do not overlap.
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // `rep movsb` takes some 30 cycles to start; what the interpreter moves is nearly always one of these sizes.
    // SAFETY: by contract; each case reads and writes just `len` bytes from the start (9..=16: the first and the last
    // eight, which overlap). DF is clear by the ABI.
    unsafe {
        match len {
            1 => std::arch::asm!("mov {t}, byte ptr [{f}]", "mov byte ptr [{d}], {t}",
                t = out(reg_byte) _, f = in(reg) from, d = in(reg) to, options(nostack, preserves_flags)),
            2 => std::arch::asm!("mov {t:x}, word ptr [{f}]", "mov word ptr [{d}], {t:x}",
                t = out(reg) _, f = in(reg) from, d = in(reg) to, options(nostack, preserves_flags)),
            4 => std::arch::asm!("mov {t:e}, dword ptr [{f}]", "mov dword ptr [{d}], {t:e}",
                t = out(reg) _, f = in(reg) from, d = in(reg) to, options(nostack, preserves_flags)),
            8 => std::arch::asm!("mov {t}, qword ptr [{f}]", "mov qword ptr [{d}], {t}",
                t = out(reg) _, f = in(reg) from, d = in(reg) to, options(nostack, preserves_flags)),
            9..=16 => std::arch::asm!(
                "mov {t}, qword ptr [{f}]", "mov {u}, qword ptr [{f} + {n} - 8]",
                "mov qword ptr [{d}], {t}", "mov qword ptr [{d} + {n} - 8], {u}",
                t = out(reg) _, u = out(reg) _, f = in(reg) from, d = in(reg) to, n = in(reg) len,
                options(nostack, preserves_flags)),
            _ => {
                std::arch::asm!("rep movsb", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") len => _,
                options(nostack, preserves_flags))
            }
        }
    }
}
