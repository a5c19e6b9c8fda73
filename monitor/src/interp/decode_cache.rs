//! Remembers decoded instructions, so that code that runs again is not decoded again.
//!
//! Keyed by physical address and checked in one of two ways. While nothing but the interpreter writes to guest memory,
//! an entry is good as long as its page has the *stamp* it had: every write to a page with entries changes that. Once
//! an engine has run guest code natively no stamp says anything any more ([`DecodeCache::distrust`]); then the bytes are
//! compared, and an entry that passes gets a new stamp.

use iced_x86::Instruction;
use std::cell::Cell;

const ENTRIES: usize = 1 << 13;
/// The longest instruction.
const LONGEST: usize = 15;

/// What an instruction's meaning depends on besides its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// GuestPhys of its first byte.
    pub phys: u64,
    /// CS offset.
    pub eip: u32,
    /// CS.D.
    pub big: bool,
}

#[derive(Clone)]
struct Entry {
    place: Place,
    /// Stamp of the page when the bytes were last seen; 0: never good without comparing (it crosses its page).
    stamp: u64,
    /// The instruction's bytes, little-endian, and ones where there are some; 0: an empty entry.
    bytes: u128,
    mask: u128,
    instruction: Instruction,
}

/// Decoded instructions of one machine.
pub struct DecodeCache {
    entries: Vec<Entry>,
    /// The stamp of each frame; 0: written to since an entry was made.
    stamps: Vec<Cell<u64>>,
    /// The last stamp given.
    last: u64,
    /// Stamps up to this one are void.
    void: u64,
}

fn slot(phys: u64) -> usize {
    (phys ^ (phys >> 13)) as usize % ENTRIES
}

impl DecodeCache {
    /// For so many frames of RAM.
    #[must_use]
    pub fn new(frames: usize) -> DecodeCache {
        DecodeCache { entries: Vec::new(), stamps: vec![Cell::new(0); frames], last: 0, void: 0 }
    }

    /// The instruction at this place, if nothing was written to its page since it was remembered.
    #[must_use]
    #[inline]
    pub fn get(&self, place: Place) -> Option<&Instruction> {
        let e = self.entries.get(slot(place.phys))?;
        let stamp = self.stamps.get((place.phys >> 12) as usize)?.get();
        (e.place == place && e.stamp == stamp && stamp > self.void).then_some(&e.instruction)
    }

    /// The instruction at this place, if it was decoded from just these bytes: `bytes` holds `got` of them, zeroes
    /// behind.
    #[must_use]
    pub fn get_same(&mut self, place: Place, bytes: &[u8; 16], got: usize) -> Option<Instruction> {
        let now = u128::from_le_bytes(*bytes);
        let e = self.entries.get(slot(place.phys))?;
        let same = e.mask != 0 && e.place == place && now & e.mask == e.bytes && e.instruction.len() <= got;
        let instruction = same.then_some(e.instruction)?;
        let stamp = self.stamp(place, instruction.len());
        self.entries[slot(place.phys)].stamp = stamp;
        Some(instruction)
    }

    /// Remembers what was decoded from these bytes.
    pub fn put(&mut self, place: Place, bytes: &[u8; 16], instruction: &Instruction) {
        let len = instruction.len();
        if !(1..=LONGEST).contains(&len) {
            return;
        }
        if self.entries.is_empty() {
            let place = Place { phys: u64::MAX, eip: 0, big: false };
            let instruction = Instruction::default();
            self.entries = vec![Entry { place, stamp: 0, bytes: 0, mask: 0, instruction }; ENTRIES];
        }
        let mask = (1u128 << (8 * len)) - 1;
        let bytes = u128::from_le_bytes(*bytes) & mask;
        let stamp = self.stamp(place, len);
        self.entries[slot(place.phys)] = Entry { place, stamp, bytes, mask, instruction: *instruction };
    }

    /// The good stamp of a page whose bytes have just been read.
    fn stamp(&mut self, place: Place, len: usize) -> u64 {
        let inside = (place.phys & 0xfff) as usize + len <= 0x1000;
        match self.stamps.get((place.phys >> 12) as usize) {
            Some(stamp) if inside => {
                if stamp.get() <= self.void {
                    self.last += 1;
                    stamp.set(self.last);
                }
                stamp.get()
            }
            _ => 0,
        }
    }

    /// The page of this address is written to.
    #[inline]
    pub fn written(&self, phys: u64) {
        if let Some(stamp) = self.stamps.get((phys >> 12) as usize) {
            stamp.set(0);
        }
    }

    /// Somebody who does not tell may have written anywhere.
    pub fn distrust(&mut self) {
        self.void = self.last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decoded(code: &[u8; 16]) -> Instruction {
        Decoder::with_ip(32, code, 0x1000, DecoderOptions::NONE).decode()
    }

    #[test]
    fn changed_bytes_are_decoded_again() {
        let mut code = [0x90u8; 16];
        let mut cache = DecodeCache::new(16);
        let place = Place { phys: 0x5000, eip: 0x1000, big: true };
        let i = decoded(&code);
        assert_eq!((cache.get(place).copied(), cache.get_same(place, &code, 15)), (None, None));
        cache.put(place, &code, &i);
        assert_eq!((cache.get(place).copied(), cache.get_same(place, &code, 15)), (Some(i), Some(i)));
        assert_eq!(cache.get_same(place, &code, 0), None);
        for other in
            [Place { big: false, ..place }, Place { eip: 0, ..place }, Place { phys: 0x6000, ..place }]
        {
            assert_eq!((cache.get(other).copied(), cache.get_same(other, &code, 15)), (None, None));
        }
        cache.written(0x5fff);
        code[0] = 0xcc;
        assert_eq!((cache.get(place).copied(), cache.get_same(place, &code, 15)), (None, None));
    }

    #[test]
    fn a_stamp_ends_with_a_write_or_with_distrust_and_is_renewed_by_a_comparison() {
        let code = [0x90u8; 16];
        let mut cache = DecodeCache::new(16);
        let place = Place { phys: 0x5000, eip: 0x1000, big: true };
        cache.put(place, &code, &decoded(&code));
        cache.written(0x6000);
        assert!(cache.get(place).is_some());
        let spoilers: [fn(&mut DecodeCache); 2] = [|c| c.written(0x5004), DecodeCache::distrust];
        for spoil in spoilers {
            spoil(&mut cache);
            assert_eq!(cache.get(place), None);
            assert!(cache.get_same(place, &code, 15).is_some());
            assert!(cache.get(place).is_some());
        }
    }

    #[test]
    fn an_instruction_that_crosses_its_page_is_compared_each_time() {
        let mut code = [0x90u8; 16];
        code[..5].copy_from_slice(&[0xb8, 1, 2, 3, 4]);
        let mut cache = DecodeCache::new(16);
        let place = Place { phys: 0x5ffd, eip: 0x1000, big: true };
        cache.put(place, &code, &decoded(&code));
        assert_eq!(cache.get(place), None);
        assert!(cache.get_same(place, &code, 15).is_some());
        // Nor does memory that is not there have a stamp.
        let beyond = Place { phys: 0x10_0000, ..place };
        cache.put(beyond, &code, &decoded(&code));
        assert_eq!(cache.get(beyond), None);
    }
}
