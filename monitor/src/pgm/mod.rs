//! PGM: guest paging and its shadow.
//!
//! 1. [`walk`] reads the guest's own tables as the MMU would (32-bit, PSE, PAE with NX), and sets A and D.
//! 2. [`tlb`] remembers recent walks for the monitor's own accesses.
//! 3. [`shadow`] remembers, for each world, which guest pages its host mappings show and with which rights, so that a
//!    guest's TLB flush drops just what went stale.

pub mod shadow;
pub mod tlb;
pub mod walk;
