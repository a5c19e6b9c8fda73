//! Looking into a running guest.

pub mod console;
pub mod input;
