//! Who lies where in guest RAM at the start, and the memory map a kernel is told.

use super::BootError;
use crate::GuestPhys;

/// End of the RAM below the hole, less the kilobyte at its end that a BIOS keeps for itself (EBDA).
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Start of the video memory.
pub const VIDEO_START: u64 = 0xa_0000;
/// Start of the BIOS ROM.
pub const ROM_START: u64 = 0xf_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// RAM ends here at the latest: above lie the addresses of PCI devices, APICs and the reset vector.
pub const HIGH_RAM_LIMIT: u64 = 0xe000_0000;
/// The first address given to boot data of our own: interrupt vectors and BIOS data area stay free.
const LOW_FIRST: u64 = 0x6000;

/// What a range of physical memory is, numbered as by BIOS INT 15h AX=E820h and Multiboot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum RangeKind {
    /// RAM free for use.
    Usable = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// A range of the physical memory map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map of a machine with `ram` bytes of RAM, as a PC's BIOS gives it.
#[must_use]
pub fn memory_map(ram: u64) -> Vec<Range> {
    let range = |start: u64, end: u64, kind| Range { start, len: end - start, kind };
    let mut map = vec![
        range(0, LOW_RAM_END.min(ram), RangeKind::Usable),
        range(LOW_RAM_END, VIDEO_START, RangeKind::Reserved),
        range(ROM_START, HIGH_RAM_START, RangeKind::Reserved),
    ];
    let end = ram.min(HIGH_RAM_LIMIT);
    if end > HIGH_RAM_START {
        map.push(range(HIGH_RAM_START, end, RangeKind::Usable));
    }
    map
}

/// One thing placed in guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placed {
    /// What it is, for people.
    pub what: &'static str,
    /// First address.
    pub start: GuestPhys,
    /// Length in bytes.
    pub len: u64,
}

impl Placed {
    fn end(&self) -> u64 {
        self.start.0.saturating_add(self.len)
    }
}

/// The places taken so far.
#[derive(Clone, Debug)]
pub struct Layout {
    ram_end: u64,
    placed: Vec<Placed>,
}

impl Layout {
    /// Nothing placed yet in `ram` bytes.
    #[must_use]
    pub fn new(ram: u64) -> Layout {
        Layout { ram_end: ram.min(HIGH_RAM_LIMIT), placed: Vec::new() }
    }

    /// End of the usable RAM.
    #[must_use]
    pub fn ram_end(&self) -> u64 {
        self.ram_end
    }

    /// Takes a place the kernel file names. It may overlap others: that is the kernel's own affair.
    pub fn claim(&mut self, what: &'static str, start: GuestPhys, len: u64) -> Result<(), BootError> {
        let needed = start.0.saturating_add(len);
        if needed > self.ram_end {
            return Err(BootError::TooLittleMemory { needed, have: self.ram_end });
        }
        self.placed.push(Placed { what, start, len });
        Ok(())
    }

    /// Finds a place for boot data of our own: the lowest free one below 640 KiB, else above 1 MiB.
    pub fn place_low(&mut self, what: &'static str, len: u64, align: u64) -> Result<GuestPhys, BootError> {
        let found = self
            .first_free(LOW_FIRST, LOW_RAM_END, len, align)
            .or_else(|| self.first_free(HIGH_RAM_START, self.ram_end, len, align));
        self.take(what, len, found, self.ram_end)
    }

    /// Finds the lowest free place above 1 MiB and above everything the kernel has claimed there.
    pub fn place_above(&mut self, what: &'static str, len: u64, align: u64) -> Result<GuestPhys, BootError> {
        let from = self.placed.iter().map(Placed::end).max().unwrap_or(0).max(HIGH_RAM_START);
        let found = self.first_free(from, self.ram_end, len, align);
        self.take(what, len, found, self.ram_end)
    }

    /// Finds the highest place below `limit` and above everything else.
    pub fn place_high(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
        limit: u64,
    ) -> Result<GuestPhys, BootError> {
        let limit = limit.min(self.ram_end);
        let from = self.placed.iter().map(Placed::end).max().unwrap_or(0).max(HIGH_RAM_START);
        let found = limit.checked_sub(len).map(|at| at - at % align).filter(|&at| at >= from);
        self.take(what, len, found, limit)
    }

    /// Everything placed, in ascending order.
    #[must_use]
    pub fn into_placed(mut self) -> Vec<Placed> {
        self.placed.sort_by_key(|p| p.start);
        self.placed
    }

    fn first_free(&self, from: u64, to: u64, len: u64, align: u64) -> Option<u64> {
        let mut at = from.checked_next_multiple_of(align)?;
        loop {
            let end = at.checked_add(len).filter(|&end| end <= to)?;
            match self.placed.iter().filter(|p| p.start.0 < end && at < p.end()).map(Placed::end).max() {
                None => return Some(at),
                Some(after) => at = after.checked_next_multiple_of(align)?,
            }
        }
    }

    fn take(
        &mut self,
        what: &'static str,
        len: u64,
        found: Option<u64>,
        limit: u64,
    ) -> Result<GuestPhys, BootError> {
        let Some(at) = found else {
            let from = self.placed.iter().map(Placed::end).max().unwrap_or(0).max(HIGH_RAM_START);
            let free = limit.saturating_sub(from);
            return Err(BootError::DoesNotFit { what, len, free, limit: GuestPhys(limit) });
        };
        let start = GuestPhys(at);
        self.placed.push(Placed { what, start, len });
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_leaves_out_video_memory_and_ends_with_ram() {
        let map = memory_map(256 << 20);
        assert_eq!(map[0], Range { start: 0, len: 0x9_fc00, kind: RangeKind::Usable });
        assert_eq!(map[3], Range { start: 0x10_0000, len: 255 << 20, kind: RangeKind::Usable });
        assert!(map.iter().all(|r| r.start + r.len <= 0xa_0000 || r.start >= 0xf_0000));
    }

    #[test]
    fn ram_beyond_the_device_addresses_is_not_shown() {
        let map = memory_map(8 << 30);
        assert_eq!(map[3].start + map[3].len, HIGH_RAM_LIMIT);
    }

    #[test]
    fn own_data_goes_low_but_never_over_the_kernel() {
        let mut l = Layout::new(16 << 20);
        l.claim("kernel", GuestPhys(0x5000), 0x3000).unwrap();
        assert_eq!(l.place_low("info", 0x1000, 0x1000).unwrap(), GuestPhys(0x8000));
        l.claim("all the rest", GuestPhys(0x8000), 0x9_8000).unwrap();
        assert_eq!(l.place_low("info", 0x1000, 0x1000).unwrap(), GuestPhys(0x10_0000));
    }

    #[test]
    fn what_is_placed_high_ends_below_the_limit_and_does_not_touch_the_kernel() {
        let mut l = Layout::new(16 << 20);
        l.claim("kernel", GuestPhys(0x10_0000), 8 << 20).unwrap();
        let at = l.place_high("initrd", 0x1234, 4096, 12 << 20).unwrap();
        assert_eq!(at, GuestPhys((12 << 20) - 0x2000));
        let refused = l.place_high("initrd", 4 << 20, 4096, 12 << 20).unwrap_err();
        assert!(matches!(refused, BootError::DoesNotFit { what: "initrd", .. }));
    }

    #[test]
    fn a_claim_beyond_ram_says_how_much_would_be_enough() {
        let refused = Layout::new(16 << 20).claim("kernel", GuestPhys(16 << 20), 1).unwrap_err();
        assert_eq!(refused, BootError::TooLittleMemory { needed: (16 << 20) + 1, have: 16 << 20 });
        assert!(refused.to_string().contains("17 MiB, there are 16 MiB"));
    }
}
