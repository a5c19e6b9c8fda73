//! The built-in guest: a Multiboot kernel that checks the machine from inside and prints a verdict.

/// The Multiboot 1 kernel as a file would hold it.
#[must_use]
pub fn image() -> &'static [u8] {
    host_driver_shim::builtin_guest::image()
}
