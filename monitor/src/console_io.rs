//! The guest's serial ports on the host: terminal, files, sockets, and the console behind Ctrl-A c.
//!
//! Threads: each port has a reader and a writer (`devices::serial_backend`), signals have one (`terminal`). None of them
//! touches the machine: they ask for the EMT's attention. What the console says goes through the same queue as the
//! guest's output, so that both come in order.

use crate::config::{RunConfig, SerialTarget};
use crate::debug::console::{LineEditor, PROMPT};
use crate::devices::ns16550a::{NullSink, SerialSink};
use crate::devices::serial_backend::{InputFilter, OnInput, SerialBackend, drain_all};
use crate::em::attention::{Attention, Request};
use crate::outcome::Ending;
use crate::terminal::{self, HELP, RawTerminal, TerminalEvent};
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// At the end, output that does not move for so long is given up.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// All serial ports of a run, and the terminal's state while it lasts. Dropping it writes what is left, then restores
/// the terminal.
pub struct Console {
    // Before the terminal: fields are dropped in this order, and the sockets' files go with the backends.
    ports: [Option<SerialBackend>; 4],
    terminal: Option<RawTerminal>,
    attention: Arc<Attention>,
}

impl Console {
    /// Connects the ports, makes the terminal raw if a port is on it, and watches signals. Once in a process.
    pub fn open(config: &RunConfig, attention: &Arc<Attention>) -> Result<Console, Ending> {
        // Signals first: from the moment the terminal is raw, nothing may end the process unseen.
        let for_signals = attention.clone();
        terminal::watch_signals(move |event| {
            if let TerminalEvent::Interrupted(_) = event {
                for_signals.request(Request::Interrupted);
            }
        })
        .map_err(|e| Ending::HostCannot(format!("watching signals: {e}")))?;
        let on_stdio = config.serial.iter().any(|s| matches!(s, SerialTarget::Stdio { .. }));
        let terminal = if on_stdio { RawTerminal::enter() } else { Ok(None) }
            .map_err(|e| Ending::HostCannot(format!("the terminal cannot be made raw: {e}")))?;
        let mut console = Console { ports: [None, None, None, None], terminal, attention: attention.clone() };
        for (number, target) in config.serial.iter().enumerate() {
            let backend = console.open_port(number, target)?;
            if let Some(location) = backend.as_ref().and_then(SerialBackend::location) {
                eprintln!("subring: COM{} is {location}", number + 1);
            }
            console.ports[number] = backend;
        }
        Ok(console)
    }

    fn open_port(&self, number: usize, target: &SerialTarget) -> Result<Option<SerialBackend>, Ending> {
        if *target == SerialTarget::None {
            return Ok(None);
        }
        let attention = self.attention.clone();
        let on_input: OnInput = Box::new(move |bytes| attention.type_in(number, &bytes));
        let screen = Arc::new(Screen {
            to: OnceLock::new(),
            raw: self.terminal.is_some() && io::stdout().is_terminal(),
        });
        let filter: Option<InputFilter> =
            terminal::escape_applies(target).then(|| commands(number, &self.attention, &screen));
        let backend = SerialBackend::open(target, on_input, filter).map_err(|e| match target {
            // Nothing the user named.
            SerialTarget::Pty | SerialTarget::Stdio { .. } => Ending::HostCannot(e.to_string()),
            _ => Ending::BadInput(e.to_string()),
        })?;
        let _ = screen.to.set(Mutex::new(backend.sink()));
        Ok(Some(backend))
    }

    /// The ends for the UARTs. COM1 is always there, as firmware-less kernels write to it unasked.
    #[must_use]
    pub fn sinks(&self) -> [Option<Box<dyn SerialSink>>; 4] {
        let mut sinks = self.ports.each_ref().map(|port| port.as_ref().map(SerialBackend::sink));
        sinks[0].get_or_insert_with(|| Box::new(NullSink));
        sinks
    }

    /// Writes what the guest has sent, as long as somebody takes it; false if somebody does not.
    pub fn flush(&self) -> bool {
        let waiting = || self.ports.iter().flatten().map(SerialBackend::waiting).sum::<usize>();
        loop {
            let before = waiting();
            if drain_all(self.ports.iter().flatten(), DRAIN_LIMIT) {
                return true;
            }
            if waiting() == before {
                return false;
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.attention.close_input();
        self.flush();
        self.terminal = None;
        for (number, port) in self.ports.iter().enumerate() {
            let lost = port.as_ref().map_or(0, |port| port.dropped() + port.waiting() as u64);
            if lost != 0 {
                eprintln!("subring: {lost} bytes of output of COM{} were lost: nobody took them", number + 1);
            }
        }
    }
}

/// Where the console's text goes: the output queue of its serial port, once that exists.
struct Screen {
    to: OnceLock<Mutex<Box<dyn SerialSink>>>,
    /// Lines end in CR LF, as the guest's do.
    raw: bool,
}

impl Screen {
    fn say(&self, text: &str) {
        let Some(to) = self.to.get() else { return };
        let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in line_ends(text, self.raw).bytes() {
            to.transmit(byte);
        }
    }
}

/// The text with the line ends a raw terminal needs, or with plain ones.
fn line_ends(text: &str, raw: bool) -> String {
    let plain = text.replace("\r\n", "\n");
    if raw { plain.replace('\n', "\r\n") } else { plain }
}

/// The filter that finds the Ctrl-A commands in what is typed at port `number` and carries them out.
fn commands(number: usize, attention: &Arc<Attention>, screen: &Arc<Screen>) -> InputFilter {
    let open = Arc::new(AtomicBool::new(false));
    let (answering, answers_open) = (screen.clone(), open.clone());
    attention.set_answer(Box::new(move |text| {
        answering.say(text);
        if answers_open.load(Ordering::SeqCst) {
            answering.say(PROMPT);
        }
    }));
    let (attention, screen) = (attention.clone(), screen.clone());
    let (to_console, mut editor) = (open.clone(), LineEditor::default());
    Box::new(terminal::input_filter(
        true,
        move || to_console.load(Ordering::SeqCst),
        move |event| match event {
            TerminalEvent::Console(byte) => {
                let (echo, line) = editor.feed(byte);
                screen.say(&echo);
                if let Some(line) = line {
                    attention.request(Request::Console(line));
                }
            }
            TerminalEvent::ToggleConsole => {
                if open.fetch_xor(true, Ordering::SeqCst) {
                    screen.say("\nback to the guest\n");
                } else {
                    editor = LineEditor::default();
                    screen.say("\nconsole: 'help' lists the commands, Ctrl-A c goes back to the guest\n");
                    screen.say(PROMPT);
                }
            }
            TerminalEvent::Help => screen.say(HELP),
            TerminalEvent::Break => attention.request(Request::Break(number)),
            TerminalEvent::Quit => attention.request(Request::Quit),
            TerminalEvent::Interrupted(_) => attention.request(Request::Interrupted),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ns16550a::CaptureSink;

    fn typed(bytes: &[u8]) -> (Vec<u8>, String, Vec<Request>, Arc<Attention>) {
        let attention = Arc::new(Attention::default());
        let capture = CaptureSink::default();
        let screen = Arc::new(Screen { to: OnceLock::new(), raw: false });
        let _ = screen.to.set(Mutex::new(Box::new(capture.clone())));
        let mut filter = commands(0, &attention, &screen);
        let mut guest = Vec::new();
        bytes.iter().for_each(|byte| filter(*byte, &mut guest));
        attention.answer("42\n");
        (guest, String::from_utf8(capture.take()).unwrap(), attention.take(), attention)
    }

    #[test]
    fn a_line_typed_into_the_console_is_a_request_and_the_guest_sees_none_of_it() {
        let (guest, said, requests, _) = typed(b"a\x01cinfo pic\r\x01cb");
        assert_eq!(guest, b"ab");
        assert_eq!(requests, [Request::Console("info pic".into())]);
        assert!(said.contains("(subring) info pic\n"), "{said}");
        assert!(said.ends_with("back to the guest\n42\n"), "no prompt once it is closed: {said}");
    }

    #[test]
    fn an_answer_is_followed_by_the_prompt_while_the_console_is_open() {
        let (_, said, ..) = typed(b"\x01cx\r");
        assert!(said.ends_with("x\n42\n(subring) "), "{said}");
    }

    #[test]
    fn quit_break_and_ctrl_a_itself_can_be_typed() {
        let (guest, said, requests, _) = typed(b"\x01a\x01b\x01h\x01x");
        assert_eq!(guest, b"\x01");
        assert_eq!(requests, [Request::Break(0), Request::Quit]);
        assert!(said.contains("Ctrl-A x  quit\n"), "{said}");
    }

    #[test]
    fn lines_end_in_cr_lf_on_a_raw_terminal_only() {
        assert_eq!(line_ends("a\r\nb\n", true), "a\r\nb\r\n");
        assert_eq!(line_ends("a\r\nb\n", false), "a\nb\n");
    }

    #[test]
    fn com1_is_there_even_if_it_leads_nowhere() {
        let mut config = RunConfig::default();
        config.serial[0] = SerialTarget::None;
        let console = Console::open(&config, &Arc::default()).unwrap();
        assert_eq!(console.sinks().map(|s| s.is_some()), [true, false, false, false]);
    }
}
