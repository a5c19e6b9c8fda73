//! CSAM: code scanning and analysis.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod addr;
pub use addr::{GuestLin, GuestPhys};
