//! CSAM: code scanning and analysis. Finds every sensitive instruction that can be reached from an entry point.
//!
//! It knows addresses, bytes and instructions, and neither patches nor how guest memory is mapped:
//! - [`sensitivity`]: what each instruction means to a deprivileged ring 0,
//! - [`scan`]: recursive descent from an entry,
//! - [`codemap`]: what was found, kept between scans and forgotten where bytes change.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod addr;
pub mod codemap;
pub mod pkru;
pub mod scan;
pub mod sensitivity;

pub use addr::{GuestLin, GuestPhys};
pub use codemap::{CodeMap, CodeSize, PageBits, PageRecord, SensitiveSite};
pub use scan::{CodeSource, Flow, ScanOptions, ScanReport, SliceSource};
pub use sensitivity::{Class, HostBehaviour, SensitiveKind, classify, classify_instruction};
