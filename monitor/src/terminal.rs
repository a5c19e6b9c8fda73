//! The host's terminal: raw mode that is always undone, Ctrl-A commands, and the thread that reads it.
//!
//! 1. [`EscapeFilter`] finds Ctrl-A commands in what is typed; it is a pure function of the bytes.
//! 2. [`RawTerminal`] switches the terminal to raw mode and back: when dropped, on a panic, and around a stop by
//!    SIGTSTP. Only SIGKILL leaves it raw.
//! 3. [`read_input`] and [`watch_signals`] deliver [`TerminalEvent`]s from threads of their own.
//!
//! Ctrl-A means something if standard input is a terminal, or if the serial port is `mon:stdio` (as `-nographic`
//! makes it); else a script may send any byte. The end of standard input is an event, not the end of the run.

use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;

use nix::sys::termios::{InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices, Termios};
use nix::sys::termios::{tcgetattr, tcsetattr};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// Ctrl-A.
pub const ESCAPE: u8 = 0x01;

/// What is printed for Ctrl-A h.
pub const HELP: &str = "\r\nCtrl-A h  this help\r\nCtrl-A x  quit\r\nCtrl-A c  console on and off\r\n\
                        Ctrl-A b  send a break\r\nCtrl-A a  send Ctrl-A\r\n";

/// What came from the terminal or from a signal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TerminalEvent {
    /// Typed bytes for the guest or the console.
    Bytes(Vec<u8>),
    /// Ctrl-A b: a break on the serial line.
    Break,
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A c.
    ToggleConsole,
    /// Ctrl-A h: print [`HELP`].
    Help,
    /// Standard input ended. The run goes on.
    End,
    /// SIGINT, SIGTERM or SIGHUP, by number.
    Interrupted(i32),
}

/// What one typed byte amounts to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Typed {
    /// A byte that passes.
    Byte(u8),
    /// Ctrl-A b.
    Break,
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A c.
    ToggleConsole,
    /// Ctrl-A h, or ?.
    Help,
}

/// Finds Ctrl-A commands in a stream of bytes.
#[derive(Clone, Debug)]
pub struct EscapeFilter {
    enabled: bool,
    escaped: bool,
}

impl EscapeFilter {
    /// A filter; if not `enabled`, every byte passes.
    #[must_use]
    pub fn new(enabled: bool) -> EscapeFilter {
        EscapeFilter { enabled, escaped: false }
    }

    /// Takes one byte; None if it was the first half of a command, or no command at all after Ctrl-A.
    pub fn feed(&mut self, byte: u8) -> Option<Typed> {
        if !self.enabled {
            return Some(Typed::Byte(byte));
        }
        if !std::mem::take(&mut self.escaped) {
            if byte == ESCAPE {
                self.escaped = true;
                return None;
            }
            return Some(Typed::Byte(byte));
        }
        match byte {
            b'x' | b'X' => Some(Typed::Quit),
            b'c' | b'C' => Some(Typed::ToggleConsole),
            b'b' | b'B' => Some(Typed::Break),
            b'h' | b'H' | b'?' => Some(Typed::Help),
            b'a' | b'A' | ESCAPE => Some(Typed::Byte(ESCAPE)),
            _ => None,
        }
    }

    /// Takes a chunk and groups it into events.
    pub fn feed_all(&mut self, bytes: &[u8]) -> Vec<TerminalEvent> {
        let mut events: Vec<TerminalEvent> = Vec::new();
        for typed in bytes.iter().filter_map(|byte| self.feed(*byte)) {
            match typed {
                Typed::Byte(byte) => match events.last_mut() {
                    Some(TerminalEvent::Bytes(run)) => run.push(byte),
                    _ => events.push(TerminalEvent::Bytes(vec![byte])),
                },
                Typed::Break => events.push(TerminalEvent::Break),
                Typed::Quit => events.push(TerminalEvent::Quit),
                Typed::ToggleConsole => events.push(TerminalEvent::ToggleConsole),
                Typed::Help => events.push(TerminalEvent::Help),
            }
        }
        events
    }
}

/// The terminal that is raw now, and how it was before.
struct Saved {
    fd: OwnedFd,
    before: Termios,
    raw: Termios,
}

static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

fn saved() -> MutexGuard<'static, Option<Saved>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The terminal is raw as long as this lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw if it is a terminal; None if it is none.
    pub fn enter() -> io::Result<Option<RawTerminal>> {
        let stdin = io::stdin();
        if stdin.is_terminal() {
            RawTerminal::enter_on(stdin.as_fd().try_clone_to_owned()?).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Makes the terminal `fd` raw. Ctrl-C and its like go to the guest; output is still processed, so that our own
    /// lines look right.
    pub fn enter_on(fd: OwnedFd) -> io::Result<RawTerminal> {
        let before = tcgetattr(&fd)?;
        let mut raw = before.clone();
        raw.input_flags.remove(
            InputFlags::IGNBRK
                | InputFlags::BRKINT
                | InputFlags::PARMRK
                | InputFlags::ISTRIP
                | InputFlags::INLCR
                | InputFlags::IGNCR
                | InputFlags::ICRNL
                | InputFlags::IXON,
        );
        raw.output_flags.insert(OutputFlags::OPOST);
        raw.local_flags.remove(
            LocalFlags::ECHO
                | LocalFlags::ECHONL
                | LocalFlags::ICANON
                | LocalFlags::ISIG
                | LocalFlags::IEXTEN,
        );
        raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
        raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        restore_on_panic();
        let mut slot = saved();
        if slot.is_some() {
            return Err(io::Error::other("the terminal is raw already"));
        }
        tcsetattr(&fd, SetArg::TCSANOW, &raw)?;
        *slot = Some(Saved { fd, before, raw });
        Ok(RawTerminal(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        *saved() = None;
    }
}

/// Gives the terminal back its settings, if it is raw. May be called at any time, more than once.
pub fn restore() {
    if let Some(saved) = &*saved() {
        let _ = tcsetattr(&saved.fd, SetArg::TCSANOW, &saved.before);
    }
}

/// Makes the terminal raw again after [`restore`], if a [`RawTerminal`] lives.
fn reenter() {
    if let Some(saved) = &*saved() {
        let _ = tcsetattr(&saved.fd, SetArg::TCSANOW, &saved.raw);
    }
}

fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // The panicking thread may hold the lock; better a raw terminal than a deadlock.
            if let Ok(slot) = SAVED.try_lock()
                && let Some(saved) = &*slot
            {
                let _ = tcsetattr(&saved.fd, SetArg::TCSANOW, &saved.before);
            }
            next(info);
        }));
    });
}

/// Reads standard input on a thread of its own until it ends, Ctrl-A commands filtered out if `escape`.
pub fn read_input(escape: bool, deliver: impl FnMut(TerminalEvent) + Send + 'static) -> io::Result<()> {
    let stdin = std::fs::File::from(io::stdin().as_fd().try_clone_to_owned()?);
    thread::Builder::new().name("terminal".into()).spawn(move || pump(stdin, escape, deliver))?;
    Ok(())
}

fn pump(mut input: impl Read + AsFd, escape: bool, mut deliver: impl FnMut(TerminalEvent)) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut filter = EscapeFilter::new(escape);
    let mut buffer = [0u8; 4096];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => filter.feed_all(&buffer[..count]).into_iter().for_each(&mut deliver),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Somebody who shares the descriptor made it non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(input.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
            }
            // A terminal that was hung up reads as an error: it ended.
            Err(_) => break,
        }
    }
    deliver(TerminalEvent::End);
}

/// Watches signals on a thread of its own: SIGINT, SIGTERM and SIGHUP are delivered as events, and the second of them
/// ends the process at once; SIGTSTP stops it with the terminal restored. Signals that were ignored when we started
/// (nohup) stay ignored.
pub fn watch_signals(mut deliver: impl FnMut(TerminalEvent) + Send + 'static) -> io::Result<()> {
    let ignored = ignored_signals();
    let wanted = [SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGCONT];
    let mut signals = Signals::new(wanted.iter().filter(|signal| ignored & (1 << (*signal - 1)) == 0))?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut warned = false;
        for signal in &mut signals {
            match signal {
                SIGTSTP => {
                    restore();
                    let _ = emulate_default_handler(SIGTSTP);
                }
                SIGCONT => reenter(),
                _ if warned => {
                    restore();
                    let _ = emulate_default_handler(signal);
                }
                _ => {
                    warned = true;
                    deliver(TerminalEvent::Interrupted(signal));
                }
            }
        }
    })?;
    Ok(())
}

/// The mask of ignored signals (bit 0 is signal 1), from /proc as asking the system call would need `unsafe`.
fn ignored_signals() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("SigIgn:"))?.trim().to_owned();
            u64::from_str_radix(&line, 16).ok()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;

    #[test]
    fn ctrl_a_commands_are_found_between_bytes() {
        let events = EscapeFilter::new(true).feed_all(b"ab\x01ccd\x01b\x01a\x01x\x01zq");
        assert_eq!(
            events,
            [
                TerminalEvent::Bytes(b"ab".into()),
                TerminalEvent::ToggleConsole,
                TerminalEvent::Bytes(b"cd".into()),
                TerminalEvent::Break,
                TerminalEvent::Bytes(b"\x01".into()),
                TerminalEvent::Quit,
                TerminalEvent::Bytes(b"q".into()),
            ]
        );
    }

    #[test]
    fn a_command_may_be_split_over_two_reads() {
        let mut filter = EscapeFilter::new(true);
        assert_eq!(filter.feed_all(b"\x01"), []);
        assert_eq!(filter.feed_all(b"x"), [TerminalEvent::Quit]);
    }

    #[test]
    fn a_disabled_filter_passes_every_byte() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(EscapeFilter::new(false).feed_all(&bytes), [TerminalEvent::Bytes(bytes)]);
    }

    #[test]
    fn input_that_ends_is_an_event_after_its_bytes() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&writer, b"hi\x01x").unwrap();
        drop(writer);
        let mut events = Vec::new();
        pump(std::fs::File::from(reader), true, |event| events.push(event));
        assert_eq!(events, [TerminalEvent::Bytes(b"hi".into()), TerminalEvent::Quit, TerminalEvent::End]);
    }

    /// One test for everything that uses the one saved terminal, as tests run in parallel.
    #[test]
    fn the_terminal_is_as_before_after_a_drop_and_after_a_panic() {
        let pty = openpty(None, None).unwrap();
        let flags = || tcgetattr(&pty.slave).unwrap().local_flags;
        let before = flags();
        assert!(before.contains(LocalFlags::ECHO));
        let raw = RawTerminal::enter_on(pty.slave.try_clone().unwrap()).unwrap();
        assert!(!flags().intersects(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG));
        assert!(RawTerminal::enter_on(pty.slave.try_clone().unwrap()).is_err());
        restore();
        assert_eq!(flags(), before);
        reenter();
        assert!(!flags().contains(LocalFlags::ECHO));
        drop(raw);
        assert_eq!(flags(), before);
        let raw = RawTerminal::enter_on(pty.slave.try_clone().unwrap()).unwrap();
        // The hook runs on the panicking thread while the guard still lives.
        let panicked = thread::spawn(|| panic!("on purpose")).join();
        assert!(panicked.is_err());
        assert_eq!(flags(), before);
        drop(raw);
    }
}
