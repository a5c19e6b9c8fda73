//! TM: the guest's virtual time, in nanoseconds since the machine was switched on.
//!
//! Devices never look at a host clock: they are given `now` (ns of guest time) with every call and answer with the
//! `now` at which they want to be called next. So a test that injects its own [`TimeSource`] is deterministic, and a
//! paused guest does not age.
//!
//! The guest's time-stamp counter is the host's. How fast it counts in guest time is measured here, over the time since
//! the machine was switched on, and told to the guest (`crate::pvclock`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Nanoseconds in a second.
pub const NS_PER_SEC: u64 = 1_000_000_000;

/// A monotonic clock, in ns from an arbitrary origin.
pub trait TimeSource: Send {
    /// Current reading, ns; never goes backwards.
    fn monotonic_ns(&self) -> u64;

    /// The time-stamp counter that belongs to it.
    fn tsc(&self) -> u64 {
        host_driver_shim::tsc::read()
    }
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

/// The host's clocks, which can be held: while they are, and ever after, the time that passed meanwhile does not count.
/// Clones share the state.
#[derive(Clone, Debug)]
pub struct HeldTime(Arc<Mutex<Held>>);

#[derive(Debug)]
struct Held {
    host: HostTime,
    /// What did not count so far.
    lost: Moment,
    /// Readings when it was held, if it is.
    since: Option<Moment>,
}

impl Held {
    /// What the host's clocks show.
    fn host_now(&self) -> Moment {
        Moment { tsc: host_driver_shim::tsc::read(), ns: self.host.monotonic_ns() }
    }

    fn now(&self) -> Moment {
        let at = self.since.unwrap_or_else(|| self.host_now());
        Moment { tsc: at.tsc.wrapping_sub(self.lost.tsc), ns: at.ns.saturating_sub(self.lost.ns) }
    }
}

impl HeldTime {
    /// Counts from now on.
    #[must_use]
    pub fn new() -> HeldTime {
        let nothing = Moment { tsc: 0, ns: 0 };
        HeldTime(Arc::new(Mutex::new(Held { host: HostTime::new(), lost: nothing, since: None })))
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops; a second call changes nothing.
    pub fn hold(&self) {
        let mut held = self.lock();
        let now = held.host_now();
        held.since.get_or_insert(now);
    }

    /// Goes on from where it was held.
    pub fn release(&self) {
        let mut held = self.lock();
        if let Some(since) = held.since.take() {
            let now = held.host_now();
            held.lost.ns += now.ns.saturating_sub(since.ns);
            held.lost.tsc += now.tsc.wrapping_sub(since.tsc);
        }
    }
}

impl Default for HeldTime {
    fn default() -> Self {
        HeldTime::new()
    }
}

impl TimeSource for HeldTime {
    fn monotonic_ns(&self) -> u64 {
        self.lock().now().ns
    }
    fn tsc(&self) -> u64 {
        self.lock().now().tsc
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

    /// Three counts a nanosecond.
    fn tsc(&self) -> u64 {
        3 * self.monotonic_ns()
    }
}

/// Readings of a moment, of which the tightest is kept: one that was not interrupted between its two clocks is sure to
/// be among them.
const TRIES: u32 = 32;

/// One moment on two clocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// The host's time-stamp counter.
    pub tsc: u64,
    /// ns.
    pub ns: u64,
}

impl Moment {
    /// Now, by the source's clocks. A thread that loses its CPU between the two reads would be off by milliseconds, so
    /// the counter is read before and after the clock, and the closest pair of several counts.
    fn read(source: &dyn TimeSource) -> Moment {
        let mut before = source.tsc();
        let mut best = (u64::MAX, Moment { tsc: before, ns: source.monotonic_ns() });
        for _ in 0..TRIES {
            let ns = source.monotonic_ns();
            let after = source.tsc();
            let width = after.wrapping_sub(before);
            if width < best.0 {
                best = (width, Moment { tsc: before.wrapping_add(width / 2), ns });
            }
            before = after;
        }
        best.1
    }
}

/// Guest time: ns since start, standing still while paused.
pub struct Clock {
    source: Box<dyn TimeSource>,
    /// Source reading that is guest time 0 (moved forward by every pause).
    origin: u64,
    paused_at: Option<u64>,
    /// When the clock was made, by the source.
    made: Moment,
    /// UTC of guest time 0, ns since 1970-01-01.
    utc_ns: i64,
}

impl Clock {
    /// Guest time 0 is now, and is called `utc_ns` (ns since 1970-01-01).
    #[must_use]
    pub fn new(source: Box<dyn TimeSource>, utc_ns: i64) -> Clock {
        let made = Moment::read(&*source);
        let origin = source.monotonic_ns();
        Clock { source, origin, paused_at: None, made, utc_ns }
    }

    /// A clock on the host's monotonic time.
    #[must_use]
    pub fn host() -> Clock {
        Clock::new(Box::new(HostTime::new()), host_utc_ns())
    }

    /// UTC of guest time 0, ns since 1970-01-01.
    #[must_use]
    pub fn utc_ns(&self) -> i64 {
        self.utc_ns
    }

    /// Now, on the host's time-stamp counter and in guest time.
    #[must_use]
    pub fn moment(&self) -> Moment {
        let moment = Moment::read(&*self.source);
        Moment { ns: self.paused_at.unwrap_or_else(|| moment.ns.saturating_sub(self.origin)), ..moment }
    }

    /// Frequency of the host's time-stamp counter by the source's clock, Hz; measured over the time since the clock was
    /// made. If that is less than `least`, the calling thread sleeps for the rest. None where it cannot be told: a clock
    /// that stands still, a counter that went backwards.
    #[must_use]
    pub fn tsc_hz(&self, least: Duration) -> Option<u64> {
        let age = Duration::from_nanos(self.source.monotonic_ns().saturating_sub(self.made.ns));
        if let Some(rest) = least.checked_sub(age) {
            std::thread::sleep(rest);
        }
        let now = Moment::read(&*self.source);
        let counts = u128::from(now.tsc.checked_sub(self.made.tsc)?);
        let ns = u128::from(now.ns.checked_sub(self.made.ns).filter(|ns| *ns != 0)?);
        u64::try_from((counts * u128::from(NS_PER_SEC) + ns / 2) / ns).ok().filter(|hz| *hz != 0)
    }

    /// How long so many counts of the time-stamp counter take, ns; 0 where it cannot be told.
    #[must_use]
    pub fn ns_of_counts(&self, counts: u64) -> u64 {
        let age = self.age();
        scaled(counts, age.ns, age.tsc)
    }

    /// How many counts of the time-stamp counter so many ns are; 0 where it cannot be told.
    #[must_use]
    pub fn counts_of_ns(&self, ns: u64) -> u64 {
        let age = self.age();
        scaled(ns, age.tsc, age.ns)
    }

    /// What both clocks have counted since this one was made.
    fn age(&self) -> Moment {
        Moment {
            tsc: self.source.tsc().saturating_sub(self.made.tsc),
            ns: self.source.monotonic_ns().saturating_sub(self.made.ns),
        }
    }

    /// The time-stamp counter a guest with offset 0 reads.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        self.source.tsc()
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

/// `value` by `by` over `over`; 0 where that is 0.
fn scaled(value: u64, by: u64, over: u64) -> u64 {
    let scaled = (u128::from(value) * u128::from(by)).checked_div(u128::from(over)).unwrap_or(0);
    u64::try_from(scaled).unwrap_or(u64::MAX)
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
        let clock = Clock::new(Box::new(t.clone()), 0);
        assert_eq!(clock.now(), 0);
        t.advance(1234);
        assert_eq!(clock.now(), 1234);
        assert_eq!(clock.until(2000), 766);
        assert_eq!(clock.until(1000), 0);
    }

    #[test]
    fn a_paused_guest_does_not_age() {
        let t = ManualTime::default();
        let mut clock = Clock::new(Box::new(t.clone()), 0);
        t.advance(10);
        clock.pause();
        t.advance(1000);
        clock.pause();
        assert_eq!(clock.now(), 10);
        clock.resume();
        t.advance(5);
        assert_eq!(clock.now(), 15);
    }

    #[test]
    fn the_counters_frequency_is_what_it_counts_in_a_second_of_the_clock() {
        let t = ManualTime::default();
        t.advance(77);
        let mut clock = Clock::new(Box::new(t.clone()), 5);
        assert_eq!(clock.tsc_hz(Duration::ZERO), None, "no time has passed");
        t.advance(1_000_003);
        assert_eq!(clock.tsc_hz(Duration::ZERO), Some(3_000_000_000));
        assert_eq!((clock.ns_of_counts(300), clock.counts_of_ns(100)), (100, 300));
        assert_eq!(clock.moment(), Moment { tsc: 3 * 1_000_080, ns: 1_000_003 });
        clock.pause();
        t.advance(10);
        assert_eq!(clock.moment(), Moment { tsc: 3 * 1_000_090, ns: 1_000_003 });
        assert_eq!(clock.utc_ns(), 5);
    }

    #[test]
    fn time_that_is_held_does_not_count_on_either_clock() {
        let t = HeldTime::new();
        t.hold();
        let (ns, tsc) = (t.monotonic_ns(), t.tsc());
        std::thread::sleep(Duration::from_millis(20));
        t.hold();
        assert_eq!((t.monotonic_ns(), t.tsc()), (ns, tsc));
        t.release();
        assert!(t.monotonic_ns() >= ns && t.tsc() >= tsc);
        assert!(t.0.lock().unwrap().lost.ns >= 20_000_000);
    }

    /// A CPU that is taken away: every reading of a clock but the `good`th pair lets a long time pass.
    struct Busy {
        ns: AtomicU64,
        reads: AtomicU64,
        good: u64,
    }

    impl TimeSource for Busy {
        fn monotonic_ns(&self) -> u64 {
            let n = self.reads.fetch_add(1, Ordering::Relaxed);
            let pass = if n.is_multiple_of(self.good) { 10 } else { 5_000_000 };
            self.ns.fetch_add(pass, Ordering::Relaxed) + pass / 2
        }
        fn tsc(&self) -> u64 {
            2 * self.ns.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn a_thread_that_loses_its_cpu_between_two_reads_still_gets_the_right_frequency() {
        let busy = Busy { ns: AtomicU64::new(0), reads: AtomicU64::new(0), good: 13 };
        let clock = Clock::new(Box::new(busy), 0);
        let hz = clock.tsc_hz(Duration::ZERO).unwrap();
        assert!(hz.abs_diff(2_000_000_000) < 2_000, "{hz} Hz");
    }

    #[test]
    fn the_hosts_counter_is_measured_alike_twice() {
        let clock = Clock::host();
        let (a, b) = (clock.tsc_hz(Duration::from_millis(20)), clock.tsc_hz(Duration::from_millis(40)));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert!(a.abs_diff(b) < a / 1000, "{a} and {b} Hz");
    }
}
