//! Which host CPU the EMT and its worlds run on.
//!
//! They take turns, and a hand-over to another CPU costs tens of microseconds, so all of them are bound to one. The
//! price is that the host's scheduler cannot move them away from a CPU that others want too: we look ourselves, by the
//! time the thread had to wait for the CPU (`run_delay`, Documentation/scheduler/sched-stats.rst).

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use std::time::{Duration, Instant};

/// How often the waiting time is looked at.
const INTERVAL: Duration = Duration::from_millis(100);
/// Moves when more than a fifth of the time was spent waiting.
const UNBEARABLE: u32 = 5;

/// Keeps the calling thread on one CPU; dropping it gives the thread back its old set of CPUs.
pub struct Placement {
    allowed: CpuSet,
    cpus: Vec<usize>,
    cpu: usize,
    looked: Instant,
    delay: u64,
}

/// Nanoseconds this thread was runnable and not running, since it started.
fn run_delay() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

impl Placement {
    /// The CPU the thread is on now is where it would stay. Nothing is bound yet.
    pub fn current() -> nix::Result<Placement> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&c| allowed.is_set(c) == Ok(true)).collect();
        let cpu = sched_getcpu().unwrap_or_else(|_| cpus.first().copied().unwrap_or(0));
        Ok(Placement { allowed, cpus, cpu, looked: Instant::now(), delay: run_delay().unwrap_or(0) })
    }

    /// The CPU.
    #[must_use]
    pub fn cpu(&self) -> usize {
        self.cpu
    }

    /// Binds the thread. Threads started from here on inherit it, so those that must not come first.
    pub fn bind(&self) -> nix::Result<()> {
        let mut one = CpuSet::new();
        one.set(self.cpu)?;
        sched_setaffinity(Pid::from_raw(0), &one)
    }

    /// The CPU to move to, if this one turned out to be too busy. The thread is bound to it already; the caller moves
    /// the worlds.
    pub fn look(&mut self) -> Option<usize> {
        let since = self.looked.elapsed();
        if since < INTERVAL || self.cpus.len() < 2 {
            return None;
        }
        self.looked = Instant::now();
        let delay = run_delay()?;
        let waited = Duration::from_nanos(delay.saturating_sub(self.delay));
        self.delay = delay;
        if waited * UNBEARABLE < since {
            return None;
        }
        let here = self.cpus.iter().position(|&c| c == self.cpu).unwrap_or(0);
        self.cpu = self.cpus[(here + 1) % self.cpus.len()];
        self.bind().ok()?;
        Some(self.cpu)
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.allowed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_set_of_cpus_comes_back() {
        let before = sched_getaffinity(Pid::from_raw(0)).unwrap();
        {
            let p = Placement::current().unwrap();
            p.bind().unwrap();
            let now = sched_getaffinity(Pid::from_raw(0)).unwrap();
            assert_eq!(
                (0..CpuSet::count()).filter(|&c| now.is_set(c) == Ok(true)).collect::<Vec<_>>(),
                [p.cpu()]
            );
        }
        assert_eq!(sched_getaffinity(Pid::from_raw(0)).unwrap(), before);
    }
}
