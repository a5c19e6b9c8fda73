//! TRPM: traps and interrupts through the guest's IDT, and the way back.
//!
//! `deliver` goes in (real-mode vectors, gates, the double-fault rules), `iret` comes back.

mod deliver;
mod iret;
#[cfg(test)]
mod tests;

pub use deliver::{TripleFault, deliver, try_deliver};
pub use iret::iret;
