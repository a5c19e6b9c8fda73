//! How other threads get the EMT's attention: a flag, a condition variable for HLT, and a kick for a running world.
//!
//! Serial input waits here until the UARTs have room: whoever reads it from the host waits when there is too much.

use super::raw::KickTarget;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Bytes that wait for each UART before the thread that brings more of them is made to wait. Large, because that thread
/// finds the Ctrl-A commands, too: a guest that reads nothing must not make it deaf soon.
pub const INPUT_LIMIT: usize = 256 << 10;

/// What a thread may ask of the EMT besides looking at the devices.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// A break on the line of COM1 (0) to COM4 (3).
    Break(usize),
    /// End the run as the user's wish.
    Quit,
    /// End the run because of a signal.
    Interrupted,
    /// A line typed at the console.
    Console(String),
}

/// Prints what the console answers.
pub type Answer = Box<dyn Fn(&str) + Send>;

#[derive(Default)]
struct Input {
    ports: [VecDeque<u8>; 4],
    closed: bool,
}

/// Shared between the EMT and everybody who may want something of it.
#[derive(Default)]
pub struct Attention {
    wanted: AtomicBool,
    requests: Mutex<Vec<Request>>,
    sleep: Condvar,
    kick: Mutex<Option<Arc<KickTarget>>>,
    input: Mutex<Input>,
    /// Something of `input` is not empty.
    input_waits: AtomicBool,
    input_taken: Condvar,
    answer: Mutex<Option<Answer>>,
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

    /// Brings input for COM1 (0) to COM4 (3). Blocks while the port has [`INPUT_LIMIT`] bytes or more waiting.
    pub fn type_in(&self, port: usize, bytes: &[u8]) {
        {
            let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
            let full = |input: &mut Input| {
                !input.closed && input.ports.get(port).is_some_and(|queue| queue.len() >= INPUT_LIMIT)
            };
            let mut input = self.input_taken.wait_while(input, full).unwrap_or_else(PoisonError::into_inner);
            match input.ports.get_mut(port) {
                Some(queue) => queue.extend(bytes),
                None => return,
            }
            self.input_waits.store(true, Ordering::SeqCst);
        }
        self.notify();
    }

    /// Input waits for one of the ports.
    #[must_use]
    pub fn input_waits(&self) -> bool {
        self.input_waits.load(Ordering::SeqCst)
    }

    /// Takes at most `room` bytes of a port's input.
    pub fn take_input(&self, port: usize, room: usize) -> Vec<u8> {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = input.ports.get_mut(port) else { return Vec::new() };
        let bytes: Vec<u8> = queue.drain(..room.min(queue.len())).collect();
        self.input_waits.store(input.ports.iter().any(|queue| !queue.is_empty()), Ordering::SeqCst);
        drop(input);
        self.input_taken.notify_all();
        bytes
    }

    /// No input is wanted any more: nobody is made to wait.
    pub fn close_input(&self) {
        self.input.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.input_taken.notify_all();
    }

    /// Where the console's answers go.
    pub fn set_answer(&self, answer: Answer) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }

    /// Prints what the console answers to a line.
    pub fn answer(&self, text: &str) {
        if let Some(answer) = self.answer.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            answer(text);
        }
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

    #[test]
    fn input_waits_in_order_until_there_is_room() {
        let a = Attention::default();
        a.type_in(1, b"abc");
        assert!(a.wanted() && a.input_waits());
        assert_eq!(a.take_input(0, 9), b"");
        assert_eq!(a.take_input(1, 2), b"ab");
        assert!(a.input_waits());
        assert_eq!(a.take_input(1, 2), b"c");
        assert!(!a.input_waits());
        a.type_in(7, b"no such port");
        assert!(!a.input_waits());
    }

    #[test]
    fn too_much_input_makes_its_bringer_wait_until_some_is_taken_or_none_is_wanted() {
        let a = Arc::new(Attention::default());
        a.type_in(0, &vec![b'x'; INPUT_LIMIT]);
        let bringer = std::thread::spawn({
            let a = a.clone();
            move || {
                a.type_in(0, &vec![b'y'; INPUT_LIMIT]);
                a.type_in(0, b"z");
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(a.take_input(0, INPUT_LIMIT), vec![b'x'; INPUT_LIMIT], "no y before its time");
        a.close_input();
        bringer.join().unwrap();
        assert_eq!(a.take_input(0, usize::MAX).last(), Some(&b'z'));
    }
}
