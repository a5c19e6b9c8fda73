//! The one host timer: a thread that sleeps until the devices' next deadline and then gets the EMT's attention.

use super::attention::Attention;
use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Arms the timer; dropping it ends the thread.
pub struct Ticker {
    timer: Arc<TimerFd>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    armed: Option<u64>,
}

impl Ticker {
    /// Starts the thread.
    pub fn new(attention: Arc<Attention>) -> std::io::Result<Ticker> {
        let timer = Arc::new(TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("timer".into()).spawn({
            let (timer, stop) = (timer.clone(), stop.clone());
            move || {
                while matches!(timer.wait(), Ok(()) | Err(Errno::EINTR)) && !stop.load(Ordering::SeqCst) {
                    attention.notify();
                }
            }
        })?;
        Ok(Ticker { timer, stop, thread: Some(thread), armed: None })
    }

    /// The next deadline in guest time, of which `now` is the current value, both in ns.
    pub fn arm(&mut self, deadline: Option<u64>, now: u64) {
        if self.armed == deadline {
            return;
        }
        self.armed = deadline;
        let Some(deadline) = deadline else {
            let _ = self.timer.unset();
            return;
        };
        let wait = Duration::from_nanos(deadline.saturating_sub(now).max(1000));
        let _ =
            self.timer.set(Expiration::OneShot(TimeSpec::from_duration(wait)), TimerSetTimeFlags::empty());
    }

    /// The timer has fired, or the deadline has passed otherwise: the next `arm` sets it anew.
    pub fn spent(&mut self) {
        self.armed = None;
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let soon = Expiration::OneShot(TimeSpec::from_duration(Duration::from_nanos(1)));
        let _ = self.timer.set(soon, TimerSetTimeFlags::empty());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
