//! The host's terminal: raw mode that is always undone, Ctrl-A commands, and the thread that reads it.
//!
//! 1. [`EscapeFilter`] finds Ctrl-A commands in what is typed; it is a pure function of the bytes.
//! 2. [`RawTerminal`] switches the terminal to raw mode and back: when dropped, on a panic, and around a stop by
//!    SIGTSTP. Only SIGKILL leaves it raw.
//! 3. [`input_filter`] makes the filter one a serial port can have; [`watch_signals`] delivers signals from a thread.
//!
//! Ctrl-A means something if standard input is a terminal, or if the serial port is `mon:stdio` (as `-nographic`
//! makes it); else a script may send any byte.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;

use nix::sys::termios::{InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices, Termios};
use nix::sys::termios::{tcgetattr, tcsetattr};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::config::SerialTarget;

/// Ctrl-A.
pub const ESCAPE: u8 = 0x01;

/// What is printed for Ctrl-A h.
pub const HELP: &str = "\r\nCtrl-A h  this help\r\nCtrl-A x  quit\r\nCtrl-A c  console on and off\r\n\
                        Ctrl-A b  send a break\r\nCtrl-A a  send Ctrl-A\r\n";

/// What came from the terminal or from a signal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TerminalEvent {
    /// A byte typed while the console is open.
    Console(u8),
    /// Ctrl-A b: a break on the serial line.
    Break,
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A c.
    ToggleConsole,
    /// Ctrl-A h: print [`HELP`].
    Help,
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
            restore_from_panic();
            next(info);
        }));
    });
}

/// As [`restore`], for a panic hook.
pub fn restore_from_panic() {
    // The panicking thread may hold the lock; better a raw terminal than a deadlock.
    if let Ok(slot) = SAVED.try_lock()
        && let Some(saved) = &*slot
    {
        let _ = tcsetattr(&saved.fd, SetArg::TCSANOW, &saved.before);
    }
}

/// Do Ctrl-A commands apply to a serial port that leads here?
#[must_use]
pub fn escape_applies(target: &SerialTarget) -> bool {
    match target {
        SerialTarget::Stdio { escape_always } => *escape_always || io::stdin().is_terminal(),
        _ => false,
    }
}

/// A serial port's input filter (`InputFilter` of the serial backend): bytes go on to the guest, commands are
/// delivered. While `to_console` says so, bytes are delivered, too, and the guest gets none.
pub fn input_filter(
    escape: bool,
    to_console: impl Fn() -> bool + Send,
    mut deliver: impl FnMut(TerminalEvent) + Send,
) -> impl FnMut(u8, &mut Vec<u8>) + Send {
    let mut filter = EscapeFilter::new(escape);
    move |byte, to_guest| match filter.feed(byte) {
        None => {}
        Some(Typed::Byte(byte)) if to_console() => deliver(TerminalEvent::Console(byte)),
        Some(Typed::Byte(byte)) => to_guest.push(byte),
        Some(Typed::Break) => deliver(TerminalEvent::Break),
        Some(Typed::Quit) => deliver(TerminalEvent::Quit),
        Some(Typed::ToggleConsole) => deliver(TerminalEvent::ToggleConsole),
        Some(Typed::Help) => deliver(TerminalEvent::Help),
    }
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

    /// What the guest got and what was delivered, with the console open between two Ctrl-A c.
    fn typed(escape: bool, bytes: &[u8]) -> (Vec<u8>, Vec<TerminalEvent>) {
        let mut console = false;
        let mut filter = EscapeFilter::new(escape);
        let (mut guest, mut events) = (Vec::new(), Vec::new());
        for typed in bytes.iter().filter_map(|byte| filter.feed(*byte)) {
            match typed {
                Typed::Byte(byte) if console => events.push(TerminalEvent::Console(byte)),
                Typed::Byte(byte) => guest.push(byte),
                Typed::ToggleConsole => console = !console,
                Typed::Break => events.push(TerminalEvent::Break),
                Typed::Quit => events.push(TerminalEvent::Quit),
                Typed::Help => events.push(TerminalEvent::Help),
            }
        }
        (guest, events)
    }

    #[test]
    fn ctrl_a_commands_are_found_between_bytes() {
        let (guest, events) = typed(true, b"ab\x01c?\x01cd\x01b\x01a\x01x\x01zq");
        assert_eq!(guest, b"abd\x01q");
        assert_eq!(events, [TerminalEvent::Console(b'?'), TerminalEvent::Break, TerminalEvent::Quit]);
    }

    #[test]
    fn a_disabled_filter_passes_every_byte() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(typed(false, &bytes), (bytes, vec![]));
    }

    #[test]
    fn a_serial_filter_tells_the_console_from_the_guest() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicBool, Ordering};
        let open = Arc::new(AtomicBool::new(false));
        let (seen, delivered) = std::sync::mpsc::channel();
        let is_open = open.clone();
        let mut filter = input_filter(
            true,
            move || is_open.load(Ordering::Relaxed),
            move |event| seen.send(event).unwrap(),
        );
        let mut guest = Vec::new();
        b"hi\x01c".iter().for_each(|byte| filter(*byte, &mut guest));
        open.store(true, Ordering::Relaxed);
        filter(b'q', &mut guest);
        assert_eq!(guest, b"hi");
        let events: Vec<_> = delivered.try_iter().collect();
        assert_eq!(events, [TerminalEvent::ToggleConsole, TerminalEvent::Console(b'q')]);
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
