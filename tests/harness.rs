//! Runs a guest as a user would: a process with its console on pipes, expected and typed at like a terminal.

use nix::sys::termios::{OutputFlags, SetArg, Termios, tcgetattr, tcsetattr};
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How much of the console a failure shows.
const TAIL: usize = 4000;

/// The `subring` binary: `SUBRING_BIN`, or a release build made now, once in a process.
///
/// # Panics
/// When it cannot be built: then no test of it can pass.
pub fn subring_binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(build_subring).clone()
}

fn build_subring() -> PathBuf {
    if let Some(path) = std::env::var_os("SUBRING_BIN").filter(|v| !v.is_empty()) {
        return PathBuf::from(path);
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["build", "--release", "--package", "monitor", "--bin", "subring", "--quiet"])
        .args(["--message-format=json-render-diagnostics", "--manifest-path"])
        .arg(&manifest)
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo can be started");
    assert!(output.status.success(), "subring does not build");
    // Cargo itself says where it put the executable, wherever the target directory is.
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
        .expect("cargo names the executable it built")
}

/// Real guests want a CPU of their own: tests that boot one hold this while they do.
pub fn one_guest_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the console has said so far.
#[derive(Default)]
struct Console {
    bytes: Vec<u8>,
    /// Up to here it has been expected already.
    seen: usize,
    /// It has not come to its end.
    open: bool,
}

/// A running guest (or any other program with a console). Dropping it kills it, and its process group if that is its own.
pub struct Guest {
    child: Child,
    stdin: Option<Box<dyn Write + Send>>,
    /// The program's end of its terminal, if it has one.
    terminal: Option<File>,
    /// How that terminal was set before the program started.
    settings: Option<Termios>,
    console: Arc<(Mutex<Console>, Condvar)>,
    started: Instant,
    exited: Option<i32>,
}

/// Something expected did not come. Shows the end of the console.
#[derive(Debug)]
pub struct Missed {
    /// What was waited for.
    pub what: String,
    /// The end of what the console said.
    pub console_tail: String,
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; the console ends with:\n{}", self.what, self.console_tail)
    }
}

impl std::error::Error for Missed {}

impl Guest {
    /// Runs `subring` with these arguments.
    pub fn spawn<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Guest {
        let mut command = Command::new(subring_binary());
        command.args(args);
        Guest::spawn_command(command)
    }

    /// Runs any command in a process group of its own. Its console is standard output and standard error together.
    ///
    /// # Panics
    /// When the command cannot be started.
    pub fn spawn_command(mut command: Command) -> Guest {
        command.process_group(0);
        Guest::spawn_in_our_group(command)
    }

    /// The same in the caller's process group: Ctrl-C ends both.
    ///
    /// # Panics
    /// When the command cannot be started.
    pub fn spawn_in_our_group(mut command: Command) -> Guest {
        // One pipe for both, so that what is written first is read first.
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let second = writer.try_clone().expect("a descriptor");
        command.stdin(Stdio::piped()).stdout(writer).stderr(second);
        let started = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}"));
        drop(command); // with its ends of the pipe
        let console = Arc::new((Mutex::new(Console { open: true, ..Console::default() }), Condvar::new()));
        collect(reader, &console);
        let stdin = child.stdin.take().map(|stdin| Box::new(stdin) as Box<dyn Write + Send>);
        Guest { child, stdin, terminal: None, settings: None, console, started, exited: None }
    }

    /// Runs `subring` with these arguments on a terminal of its own.
    ///
    /// # Panics
    /// When there are no pseudo-terminals, or the command cannot be started.
    pub fn spawn_on_terminal<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Guest {
        let pty = nix::pty::openpty(None, None).expect("a pseudo-terminal");
        // No line ends of the terminal's making: what is expected is what the program sent.
        let mut settings = tcgetattr(&pty.slave).expect("the settings of a terminal");
        settings.output_flags.remove(OutputFlags::ONLCR);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &settings).expect("a terminal that can be set");
        // Read back now: once the program runs, it may have changed them already.
        let settings = Some(tcgetattr(&pty.slave).expect("the settings of a terminal"));
        let slave = || Stdio::from(pty.slave.try_clone().expect("a descriptor"));
        let mut command = Command::new(subring_binary());
        command.args(args).stdin(slave()).stdout(slave()).stderr(slave()).process_group(0);
        let started = Instant::now();
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}"));
        drop(command);
        let console = Arc::new((Mutex::new(Console { open: true, ..Console::default() }), Condvar::new()));
        let master = File::from(pty.master);
        collect(master.try_clone().expect("a descriptor"), &console);
        let terminal = Some(File::from(pty.slave));
        Guest { child, stdin: Some(Box::new(master)), terminal, settings, console, started, exited: None }
    }

    /// How the program's terminal was set before the program started.
    ///
    /// # Panics
    /// When the program was not started on a terminal.
    #[must_use]
    pub fn settings_before(&self) -> Termios {
        self.settings.clone().expect("a program on a terminal")
    }

    /// How the program's terminal is set now: input, output, control and local flags and the control characters.
    ///
    /// # Panics
    /// When the program was not started on a terminal.
    #[must_use]
    pub fn terminal_settings(&self) -> Termios {
        let terminal = self.terminal.as_ref().expect("a program on a terminal");
        tcgetattr(terminal).expect("the settings of a terminal")
    }

    /// Process id of the program itself; its process group has the same number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Time since the start.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits until the console says `pattern` (after what was expected before); yields the time since the start.
    pub fn try_expect(&mut self, pattern: &str, timeout: Duration) -> Result<Duration, Missed> {
        let deadline = Instant::now() + timeout;
        let (lock, changed) = &*self.console;
        let mut console = lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Searched from where a pattern cut off by the last look would begin.
        let mut from = console.seen;
        loop {
            if let Some(at) = find(&console.bytes[from..], pattern.as_bytes()) {
                console.seen = from + at + pattern.len();
                return Ok(self.started.elapsed());
            }
            from = console.bytes.len().saturating_sub(pattern.len()).max(console.seen);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !console.open {
                let why = if console.open { "waited in vain for" } else { "the program ended without" };
                let what = format!("{why} {pattern:?} (after {:.1} s)", self.started.elapsed().as_secs_f64());
                return Err(Missed { what, console_tail: tail(&console.bytes) });
            }
            console = changed.wait_timeout(console, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// As `try_expect`.
    ///
    /// # Panics
    /// With the end of the console, when the pattern does not come.
    #[track_caller]
    pub fn expect(&mut self, pattern: &str, timeout: Duration) -> Duration {
        self.try_expect(pattern, timeout).unwrap_or_else(|missed| panic!("{missed}"))
    }

    /// Types a line. A guest that has gone does not hear it; what is expected next will tell.
    pub fn send(&mut self, line: &str) {
        self.send_bytes(line.as_bytes());
        self.send_bytes(b"\n");
    }

    /// Types bytes, control characters for instance.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        if let Some(stdin) = &mut self.stdin {
            let _ = stdin.write_all(bytes).and_then(|()| stdin.flush());
        }
    }

    /// Ends standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for the end and yields the exit code, or 128 + the signal's number.
    pub fn try_wait_exit(&mut self, timeout: Duration) -> Result<i32, Missed> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(code) = self.exited {
                return Ok(code);
            }
            match self.child.try_wait() {
                Ok(Some(status)) => {
                    self.exited = Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
                }
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => return Err(self.missed("the program did not end".into())),
                Err(e) => return Err(self.missed(format!("waiting for the program failed: {e}"))),
            }
        }
    }

    /// As `try_wait_exit`.
    ///
    /// # Panics
    /// With the end of the console, when the program does not end.
    #[track_caller]
    pub fn wait_exit(&mut self, timeout: Duration) -> i32 {
        self.try_wait_exit(timeout).unwrap_or_else(|missed| panic!("{missed}"))
    }

    /// Everything the console has said.
    #[must_use]
    pub fn console(&self) -> String {
        let console = self.console.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&console.bytes).into_owned()
    }

    fn missed(&self, what: String) -> Missed {
        Missed { what, console_tail: tail(self.console().as_bytes()) }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The group first: a world process must not outlive a monitor that failed a test.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
        }
        if self.exited.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn collect(mut stream: impl Read + Send + 'static, console: &Arc<(Mutex<Console>, Condvar)>) {
    let console = Arc::clone(console);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let read = stream.read(&mut buffer);
            let (lock, changed) = &*console;
            let mut console = lock.lock().unwrap_or_else(PoisonError::into_inner);
            match read {
                Ok(n) if n > 0 => console.bytes.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                _ => {
                    console.open = false;
                    changed.notify_all();
                    return;
                }
            }
            changed.notify_all();
        }
    });
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    text.windows(pattern.len().max(1)).position(|w| w == pattern)
}

fn tail(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL)..]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Guest {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Guest::spawn_command(command)
    }

    #[test]
    fn a_console_is_expected_in_order_and_typed_at() {
        let mut g = shell("printf 'login: '; read name; echo \"hello $name\"; exit 7");
        g.expect("login: ", SOON);
        g.send("you");
        g.expect("hello you", SOON);
        assert_eq!(g.wait_exit(SOON), 7);
    }

    #[test]
    fn what_was_expected_once_does_not_match_again() {
        let mut g = shell("echo one; echo two");
        g.expect("two", SOON);
        let missed = g.try_expect("one", SOON).unwrap_err();
        assert!(missed.what.contains("ended without \"one\""));
        assert!(missed.console_tail.contains("one\ntwo"));
    }

    #[test]
    fn a_pattern_that_arrives_in_two_parts_is_found() {
        let mut g = shell("printf SUB; sleep 0.1; printf RING");
        g.expect("SUBRING", SOON);
    }

    #[test]
    fn a_signal_shows_in_the_exit_code() {
        assert_eq!(shell("kill -9 $$").wait_exit(SOON), 137);
    }

    #[test]
    fn dropping_a_guest_kills_its_children_too() {
        let mut g = shell("sleep 60 & echo child=$!; wait");
        g.expect("child=", SOON);
        g.expect("\n", SOON);
        let text = g.console();
        let pid: i32 = text.trim().trim_start_matches("child=").parse().unwrap();
        drop(g);
        let deadline = Instant::now() + SOON;
        // Dead, or a zombie nobody has reaped yet.
        while let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            if stat.contains(") Z ") {
                break;
            }
            assert!(Instant::now() < deadline, "the child lives on: {stat}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
