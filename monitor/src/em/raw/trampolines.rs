//! The memory of trampolines: pages of code memory at the addresses PATM chose, made as they are written to.

use super::kernel_code::{UNSCANNED, put};
use csam::GuestLin;
use host_driver_shim::code_memory::CodeMemory;
use std::collections::HashMap;

/// Trampoline pages of one patch manager.
#[derive(Default)]
pub struct Trampolines {
    /// Page number of the code address to code memory.
    pages: HashMap<u32, u64>,
    /// Pages that no world has mapped yet.
    pub new: Vec<(GuestLin, u64)>,
}

impl Trampolines {
    /// Every page with its code memory.
    pub fn pages(&self) -> impl Iterator<Item = (GuestLin, u64)> + '_ {
        self.pages.iter().map(|(page, offset)| (GuestLin(page << 12), *offset))
    }

    /// Writes trampoline code at EIP `start`; what is between trampolines traps.
    pub fn write(&mut self, code: &CodeMemory, start: u32, bytes: &[u8]) {
        for (i, b) in bytes.iter().enumerate() {
            let at = start.wrapping_add(i as u32);
            let number = at >> 12;
            let offset = match self.pages.get(&number) {
                Some(o) => *o,
                None => {
                    let Some(o) = code.alloc() else { return };
                    put(code, o, &[UNSCANNED; 4096]);
                    self.pages.insert(number, o);
                    self.new.push((GuestLin(number << 12), o));
                    o
                }
            };
            put(code, offset + u64::from(at & 0xfff), &[*b]);
        }
    }

    /// Makes trampoline code at EIP `start` trap.
    pub fn erase(&mut self, code: &CodeMemory, start: u32, len: usize) {
        self.write(code, start, &vec![UNSCANNED; len]);
    }

    /// Gives the memory back.
    pub fn free(&mut self, code: &CodeMemory) {
        for (_, offset) in self.pages.drain() {
            code.free(offset);
        }
        self.new.clear();
    }
}
