//! The built-in guest's bytes.

/// The Multiboot 1 kernel; empty as long as the guest is not written.
#[must_use]
pub fn image() -> &'static [u8] {
    &[]
}
