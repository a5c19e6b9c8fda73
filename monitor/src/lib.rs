//! subring's monitor: everything between the command line and the host-driver shim.

pub mod account;
pub mod boot;
pub mod builtin;
pub mod cli;
pub mod config;
pub mod console_io;
pub mod cpuid_msr;
pub mod cpum;
pub mod debug;
pub mod devices;
pub mod doctor;
pub mod em;
mod engines;
pub mod env;
pub mod interp;
pub mod iom;
pub mod machine;
pub mod outcome;
pub mod paint;
pub mod pgm;
pub mod pvclock;
pub mod scan;
pub mod selm;
pub mod tape;
pub mod terminal;
pub mod tm;
pub mod trap;
pub mod trpm;
pub mod vm;

pub use csam::{GuestLin, GuestPhys};
