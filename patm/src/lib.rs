//! PATM: the patch manager.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod vcpu_page;
