//! The host's time-stamp counter.

/// Reads it.
#[must_use]
pub fn read() -> u64 {
    // SAFETY: RDTSC reads a counter and touches nothing; every x86-64 CPU has it, and a process that has made it trap
    // (PR_SET_TSC) gets a signal, not undefined behaviour.
    unsafe { core::arch::x86_64::_rdtsc() }
}
