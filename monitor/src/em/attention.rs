//! How other threads get the EMT's attention: a flag, a condition variable for HLT, and a kick for a running world.

use super::raw::KickTarget;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// What a thread may ask of the EMT besides looking at the devices.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Bytes typed at COM1 (0) to COM4 (3).
    SerialInput(usize, Vec<u8>),
    /// End the run as the user's wish.
    Quit,
    /// End the run because of a signal.
    Interrupted,
    /// A line typed at the console.
    Console(String),
}

/// Shared between the EMT and everybody who may want something of it.
#[derive(Default)]
pub struct Attention {
    wanted: AtomicBool,
    requests: Mutex<Vec<Request>>,
    sleep: Condvar,
    kick: Mutex<Option<Arc<KickTarget>>>,
}

impl Attention {
    /// Where kicks go once there is an engine.
    pub fn set_kick(&self, target: Arc<KickTarget>) {
        *self.kick.lock().unwrap_or_else(PoisonError::into_inner) = Some(target);
    }

    /// Asks for something.
    pub fn request(&self, request: Request) {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        self.notify();
    }

    /// Makes the EMT look at its devices and requests soon.
    pub fn notify(&self) {
        {
            // Under the lock, so that it cannot fall between the EMT's check and its sleep.
            let _held = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
            self.wanted.store(true, Ordering::SeqCst);
        }
        self.sleep.notify_all();
        if let Some(kick) = self.kick.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            kick.kick();
        }
    }

    /// Something is wanted.
    #[must_use]
    pub fn wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Takes what was asked for; from here on new requests count again.
    pub fn take(&self) -> Vec<Request> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.store(false, Ordering::SeqCst);
        std::mem::take(&mut requests)
    }

    /// Sleeps until something is wanted, at most for `limit` (None: without limit).
    pub fn wait(&self, limit: Option<Duration>) {
        let guard = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = || self.wanted.load(Ordering::SeqCst);
        match limit {
            Some(limit) => {
                let _guard = self.sleep.wait_timeout_while(guard, limit, |_| !wanted());
            }
            None => {
                let _guard = self.sleep.wait_while(guard, |_| !wanted());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_made_before_the_wait_is_not_slept_through() {
        let a = Attention::default();
        a.request(Request::Quit);
        a.wait(None);
        assert_eq!(a.take(), [Request::Quit]);
        assert!(!a.wanted());
    }

    #[test]
    fn a_wait_ends_by_itself_at_its_limit() {
        let a = Attention::default();
        a.wait(Some(Duration::from_millis(1)));
        assert!(!a.wanted());
    }
}
