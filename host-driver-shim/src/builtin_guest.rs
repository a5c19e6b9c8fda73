//! The built-in guest's bytes: 32-bit assembly, assembled into our own read-only data.
//!
//! It is a Multiboot 1 kernel that checks the machine from inside. It is here and not in the monitor because reading
//! two assembler symbols takes `unsafe`.

use std::arch::global_asm;

global_asm!(
    include_str!("builtin_guest/head.s"),
    include_str!("builtin_guest/runtime.s"),
    include_str!("builtin_guest/checks.s"),
    include_str!("builtin_guest/v86.s"),
    include_str!("builtin_guest/paging.s"),
    options(att_syntax, raw)
);

unsafe extern "C" {
    /// The first byte of the image.
    static subring_builtin_guest_begin: u8;
    /// The byte after the last.
    static subring_builtin_guest_end: u8;
}

/// The Multiboot 1 kernel as a file would hold it; it is loaded at 100000h.
#[must_use]
pub fn image() -> &'static [u8] {
    let begin = &raw const subring_builtin_guest_begin;
    let end = &raw const subring_builtin_guest_end;
    // SAFETY: both symbols are defined by the assembly above in one read-only section, begin before end, so the range
    // is one initialised object that lives as long as the program and is never written.
    unsafe { std::slice::from_raw_parts(begin, end.offset_from(begin).unsigned_abs()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_starts_with_a_consistent_multiboot_header() {
        let word = |at: usize| u32::from_le_bytes(image()[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), 0x1bad_b002);
        assert_eq!(word(0).wrapping_add(word(4)).wrapping_add(word(8)), 0);
        assert_eq!(word(20) - word(16), image().len() as u32);
        assert!(word(20) <= 0x14_0000, "the image runs into its own tables");
        assert!((word(16)..word(20)).contains(&word(28)));
    }
}
