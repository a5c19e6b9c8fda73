//! subring's monitor: everything between the command line and the host-driver shim.

pub mod cpum;
pub mod env;
pub mod interp;
pub mod selm;
pub mod trap;
pub mod trpm;

pub use csam::{GuestLin, GuestPhys};
