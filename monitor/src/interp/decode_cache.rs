//! Remembers decoded instructions by address and by the bytes they were decoded from, so that code that runs again is
//! not decoded again. The bytes are compared at every use: guest code may change at any time.

use iced_x86::Instruction;
use std::cell::RefCell;

const ENTRIES: usize = 1024;

#[derive(Clone, Copy)]
struct Entry {
    linear: u32,
    eip: u32,
    big: bool,
    /// The instruction's bytes, little-endian, and ones where there are some; 0: an empty entry.
    bytes: u128,
    mask: u128,
    instruction: Instruction,
}

thread_local! {
    static CACHE: RefCell<Vec<Entry>> = const { RefCell::new(Vec::new()) };
}

fn slot(linear: u32) -> usize {
    (linear ^ (linear >> 10)) as usize % ENTRIES
}

/// The instruction at this place, if it was decoded from just these bytes: `bytes` holds `got` of them, zeroes behind.
pub(super) fn get(linear: u32, eip: u32, big: bool, bytes: &[u8; 16], got: usize) -> Option<Instruction> {
    let now = u128::from_le_bytes(*bytes);
    CACHE.with_borrow(|cache| {
        let e = cache.get(slot(linear))?;
        let same = e.mask != 0
            && e.linear == linear
            && e.eip == eip
            && e.big == big
            && now & e.mask == e.bytes
            && e.instruction.len() <= got;
        same.then_some(e.instruction)
    })
}

/// Remembers one.
pub(super) fn put(linear: u32, eip: u32, big: bool, from: &[u8; 16], instruction: &Instruction) {
    let len = instruction.len();
    if !(1..=15).contains(&len) {
        return;
    }
    let mask = (1u128 << (8 * len)) - 1;
    let bytes = u128::from_le_bytes(*from) & mask;
    CACHE.with_borrow_mut(|cache| {
        if cache.is_empty() {
            let instruction = Instruction::default();
            cache.resize(ENTRIES, Entry { linear: 0, eip: 0, big: false, bytes: 0, mask: 0, instruction });
        }
        if let Some(e) = cache.get_mut(slot(linear)) {
            *e = Entry { linear, eip, big, bytes, mask, instruction: *instruction };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    #[test]
    fn changed_bytes_are_decoded_again() {
        let mut code = [0x90u8; 16];
        let i = Decoder::with_ip(32, &code, 0x1000, DecoderOptions::NONE).decode();
        put(0x1000, 0x1000, true, &code, &i);
        assert_eq!(get(0x1000, 0x1000, true, &code, 15), Some(i));
        assert_eq!(get(0x1000, 0x1000, true, &code, 0), None);
        assert_eq!(get(0x1000, 0x1000, false, &code, 15), None);
        assert_eq!(get(0x1000, 0, true, &code, 15), None);
        code[0] = 0xcc;
        assert_eq!(get(0x1000, 0x1000, true, &code, 15), None);
    }
}
