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
    len: u8,
    bytes: [u8; 15],
    instruction: Instruction,
}

thread_local! {
    static CACHE: RefCell<Vec<Entry>> = RefCell::new(vec![
        Entry { linear: 0, eip: 0, big: false, len: 0, bytes: [0; 15], instruction: Instruction::default() };
        ENTRIES
    ]);
}

fn slot(linear: u32) -> usize {
    (linear ^ (linear >> 10)) as usize % ENTRIES
}

/// The instruction at this place, if it was decoded from just these bytes.
pub(super) fn get(linear: u32, eip: u32, big: bool, bytes: &[u8]) -> Option<Instruction> {
    CACHE.with_borrow(|cache| {
        let e = cache.get(slot(linear))?;
        let len = usize::from(e.len);
        let same = len != 0
            && (e.linear, e.eip, e.big) == (linear, eip, big)
            && bytes.get(..len)? == e.bytes.get(..len)?;
        same.then_some(e.instruction)
    })
}

/// Remembers one.
pub(super) fn put(linear: u32, eip: u32, big: bool, from: &[u8], instruction: &Instruction) {
    let len = instruction.len();
    let (Some(from), Ok(len8)) = (from.get(..len), u8::try_from(len)) else { return };
    CACHE.with_borrow_mut(|cache| {
        if let Some(e) = cache.get_mut(slot(linear)) {
            let mut bytes = [0; 15];
            if let Some(to) = bytes.get_mut(..len) {
                to.copy_from_slice(from);
                *e = Entry { linear, eip, big, len: len8, bytes, instruction: *instruction };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    #[test]
    fn changed_bytes_are_decoded_again() {
        let code = [0x90u8, 0x90];
        let i = Decoder::with_ip(32, &code, 0x1000, DecoderOptions::NONE).decode();
        put(0x1000, 0x1000, true, &code, &i);
        assert_eq!(get(0x1000, 0x1000, true, &code), Some(i));
        assert_eq!(get(0x1000, 0x1000, true, &[0xcc, 0x90]), None);
        assert_eq!(get(0x1000, 0x1000, false, &code), None);
        assert_eq!(get(0x1000, 0, true, &code), None);
    }
}
