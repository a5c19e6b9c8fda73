//! TM: the guest's virtual time, in nanoseconds since the machine was switched on.
//!
//! Devices never look at a host clock: they are given `now` (ns of guest time) with every call and answer with the
//! `now` at which they want to be called next. So a test that injects its own [`TimeSource`] is deterministic, and a
//! paused guest does not age.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Nanoseconds in a second.
pub const NS_PER_SEC: u64 = 1_000_000_000;

/// A monotonic clock, in ns from an arbitrary origin.
pub trait TimeSource: Send {
    /// Current reading, ns; never goes backwards.
    fn monotonic_ns(&self) -> u64;
}

/// The host's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct HostTime(Instant);

impl HostTime {
    /// Counts from now on.
    #[must_use]
    pub fn new() -> HostTime {
        HostTime(Instant::now())
    }
}

impl Default for HostTime {
    fn default() -> Self {
        HostTime::new()
    }
}

impl TimeSource for HostTime {
    fn monotonic_ns(&self) -> u64 {
        // 2^64 ns are 584 years.
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A time source that moves only when told to; clones share the reading.
#[derive(Clone, Debug, Default)]
pub struct ManualTime(Arc<AtomicU64>);

impl ManualTime {
    /// Moves the clock forward by `ns`.
    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::Relaxed);
    }
}

impl TimeSource for ManualTime {
    fn monotonic_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Guest time: ns since start, standing still while paused.
pub struct Clock {
    source: Box<dyn TimeSource>,
    /// Source reading that is guest time 0 (moved forward by every pause).
    origin: u64,
    paused_at: Option<u64>,
}

impl Clock {
    /// Guest time 0 is now.
    #[must_use]
    pub fn new(source: Box<dyn TimeSource>) -> Clock {
        let origin = source.monotonic_ns();
        Clock { source, origin, paused_at: None }
    }

    /// A clock on the host's monotonic time.
    #[must_use]
    pub fn host() -> Clock {
        Clock::new(Box::new(HostTime::new()))
    }

    /// Guest time, ns.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.paused_at.unwrap_or_else(|| self.source.monotonic_ns().saturating_sub(self.origin))
    }

    /// Stops guest time; a second call changes nothing.
    pub fn pause(&mut self) {
        self.paused_at = Some(self.now());
    }

    /// Lets guest time go on from where it was paused.
    pub fn resume(&mut self) {
        if let Some(at) = self.paused_at.take() {
            self.origin = self.source.monotonic_ns().wrapping_sub(at);
        }
    }

    /// How long from now to the guest time `deadline`, ns; 0 when it is past.
    #[must_use]
    pub fn until(&self, deadline: u64) -> u64 {
        deadline.saturating_sub(self.now())
    }
}

/// The host's UTC as ns since 1970-01-01, for the RTC at power-on.
#[must_use]
pub fn host_utc_ns() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(d) => i64::try_from(d.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
    }
}

/// The earlier of two optional deadlines.
#[must_use]
pub fn earliest(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_time_starts_at_zero_and_follows_the_source() {
        let t = ManualTime::default();
        t.advance(500);
        let clock = Clock::new(Box::new(t.clone()));
        assert_eq!(clock.now(), 0);
        t.advance(1234);
        assert_eq!(clock.now(), 1234);
        assert_eq!(clock.until(2000), 766);
        assert_eq!(clock.until(1000), 0);
    }

    #[test]
    fn a_paused_guest_does_not_age() {
        let t = ManualTime::default();
        let mut clock = Clock::new(Box::new(t.clone()));
        t.advance(10);
        clock.pause();
        t.advance(1000);
        clock.pause();
        assert_eq!(clock.now(), 10);
        clock.resume();
        t.advance(5);
        assert_eq!(clock.now(), 15);
    }
}
