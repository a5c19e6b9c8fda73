//! Guest RAM: one memory object, mapped in the monitor and, page by page, in worlds.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::shared::SharedMap;

/// Guest RAM. Offsets are byte offsets into the memory object, not guest-physical addresses.
///
/// A clone is another handle to the same memory. Guest code and other threads may write it at any moment, so there are
/// only copying accessors; each of the fixed-width ones is a single load or store (little-endian, any alignment).
/// `None` means that the access does not lie inside.
#[derive(Clone, Debug)]
pub struct GuestRam(Arc<SharedMap>, Arc<Watched>);

/// A bit for each frame: worlds must not map it writable by themselves, nor write to it.
#[derive(Debug)]
struct Watched {
    bits: SharedMap,
    for_worlds: OwnedFd,
}

/// Bytes of the memory object with the bits of so many frames.
pub(crate) fn watched_size(frames: u64) -> u64 {
    frames.div_ceil(8).next_multiple_of(4096)
}

impl GuestRam {
    /// `bytes` of zeroed RAM (a positive multiple of 4096). Memory is taken from the host as it is touched.
    pub fn new(bytes: u64) -> io::Result<GuestRam> {
        let len = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let size = usize::try_from(watched_size(bytes >> 12));
        let size = size.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let bits = SharedMap::new(c"subring-watched", size)?;
        let for_worlds = bits.read_only_fd()?;
        Ok(GuestRam(Arc::new(SharedMap::new(c"subring-ram", len)?), Arc::new(Watched { bits, for_worlds })))
    }

    /// Says whether writes to a frame are to be seen by the monitor. Only one thread may do that.
    pub fn set_watched(&self, frame: u32, watched: bool) {
        let (at, bit) = (u64::from(frame / 8), 1u8 << (frame % 8));
        if let Some(old) = self.1.bits.read_u8(at) {
            let _in_range = self.1.bits.write_u8(at, if watched { old | bit } else { old & !bit });
        }
    }

    /// Whether it was said of a frame that they are; of what is no frame they are.
    pub(crate) fn is_watched(&self, frame: u32) -> bool {
        self.1.bits.read_u8(u64::from(frame / 8)).is_none_or(|byte| byte >> (frame % 8) & 1 != 0)
    }

    pub(crate) fn watched_fd(&self) -> RawFd {
        self.1.for_worlds.as_raw_fd()
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.len() as u64
    }

    /// Copies `to.len()` bytes out, all or nothing.
    #[must_use]
    #[inline]
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Option<()> {
        self.0.read(offset, to)
    }

    /// Copies `from` in, all or nothing.
    #[must_use]
    #[inline]
    pub fn write(&self, offset: u64, from: &[u8]) -> Option<()> {
        self.0.write(offset, from)
    }

    /// Sets `len` bytes to `byte`.
    #[must_use]
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> Option<()> {
        self.0.fill(offset, usize::try_from(len).ok()?, byte)
    }

    /// Reads one byte.
    #[must_use]
    pub fn read_u8(&self, offset: u64) -> Option<u8> {
        self.0.read_u8(offset)
    }

    /// Reads a u16.
    #[must_use]
    pub fn read_u16(&self, offset: u64) -> Option<u16> {
        self.0.read_u16(offset)
    }

    /// Reads a u32.
    #[must_use]
    pub fn read_u32(&self, offset: u64) -> Option<u32> {
        self.0.read_u32(offset)
    }

    /// Reads a u64.
    #[must_use]
    pub fn read_u64(&self, offset: u64) -> Option<u64> {
        self.0.read_u64(offset)
    }

    /// Writes one byte.
    #[must_use]
    pub fn write_u8(&self, offset: u64, value: u8) -> Option<()> {
        self.0.write_u8(offset, value)
    }

    /// Writes a u16.
    #[must_use]
    pub fn write_u16(&self, offset: u64, value: u16) -> Option<()> {
        self.0.write_u16(offset, value)
    }

    /// Writes a u32.
    #[must_use]
    pub fn write_u32(&self, offset: u64, value: u32) -> Option<()> {
        self.0.write_u32(offset, value)
    }

    /// Writes a u64.
    #[must_use]
    pub fn write_u64(&self, offset: u64, value: u64) -> Option<()> {
        self.0.write_u64(offset, value)
    }

    /// Atomically replaces `old` by `new` in a u32 at a multiple of 4; `Some(false)` if it did not hold `old`. For
    /// locked guest instructions and for accessed/dirty bits.
    #[must_use]
    pub fn compare_exchange_u32(&self, offset: u64, old: u32, new: u32) -> Option<bool> {
        self.0.compare_exchange_u32(offset, old, new)
    }

    /// Gives whole pages back to the host; they read as zero afterwards, in every world too.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0
            .discard(offset, usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?)
    }

    pub(crate) fn shared(&self) -> &Arc<SharedMap> {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_at_any_alignment_and_width() {
        let ram = GuestRam::new(0x3000).unwrap();
        ram.write_u64(0xffd, 0x8877_6655_4433_2211).unwrap();
        assert_eq!(ram.read_u64(0xffd), Some(0x8877_6655_4433_2211));
        assert_eq!(ram.read_u32(0xffe), Some(0x5544_3322));
        assert_eq!(ram.read_u16(0x1003), Some(0x8877));
        assert_eq!(ram.read_u8(0x1004), Some(0x88));
        let mut b = [0; 3];
        ram.read(0xffe, &mut b).unwrap();
        assert_eq!(b, [0x22, 0x33, 0x44]);
    }

    #[test]
    fn nothing_outside_can_be_touched() {
        let ram = GuestRam::new(0x1000).unwrap();
        assert_eq!(ram.read_u32(0xffd), None);
        assert_eq!(ram.write_u16(0xfff, 1), None);
        assert_eq!(ram.read_u8(u64::MAX), None);
        assert_eq!(ram.write(0xff0, &[0; 17]), None);
        assert_eq!(ram.read_u8(0xfff), Some(0), "a refused write left nothing behind");
        assert_eq!(ram.fill(1, 0x1000, 0), None);
        assert!(ram.discard(0, 0x2000).is_err());
    }

    #[test]
    fn discarded_pages_read_as_zero_and_their_neighbours_stay() {
        let ram = GuestRam::new(0x3000).unwrap();
        ram.fill(0, 0x3000, 0xaa).unwrap();
        ram.discard(0x1000, 0x1000).unwrap();
        assert_eq!(
            (ram.read_u8(0xfff), ram.read_u8(0x1000), ram.read_u8(0x2000)),
            (Some(0xaa), Some(0), Some(0xaa))
        );
    }

    #[test]
    fn compare_exchange_needs_the_old_value_and_alignment() {
        let ram = GuestRam::new(0x1000).unwrap();
        ram.write_u32(8, 7).unwrap();
        assert_eq!(ram.compare_exchange_u32(8, 6, 9), Some(false));
        assert_eq!(ram.compare_exchange_u32(8, 7, 9), Some(true));
        assert_eq!(ram.read_u32(8), Some(9));
        assert_eq!(ram.compare_exchange_u32(9, 0, 0), None);
    }
}
