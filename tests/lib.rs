//! Helpers shared by the behaviour tests.

pub mod cpio;
pub mod initramfs;
