//! Everything of subring that touches the host kernel or the hardware.

pub mod builtin_guest;
pub mod world;
