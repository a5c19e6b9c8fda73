//! Looking into a running guest.

pub mod console;
