//! The host's side of a serial port: terminal, file, Unix socket or pseudo-terminal.
//!
//! Output: the virtual CPU's thread puts bytes into a bounded queue, a writer thread carries them away. When nobody takes
//! them (a stopped terminal, a full pipe), the virtual CPU waits once for [`STALL_LIMIT`]; from then on bytes are dropped
//! and counted until the queue moves again. A slow reader is none of these: the queue moves in steps of [`CHUNK`]. Input: a reader thread sleeps in poll(2), passes each byte through the
//! filter and hands over what is left. The end of the input ends the reader, not the run.

use super::ns16550a::{NullSink, SerialSink};
use crate::config::SerialTarget;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that wait for the writer thread.
pub const OUTPUT_LIMIT: usize = 256 << 10;
/// How long the virtual CPU waits for room, once per stall.
pub const STALL_LIMIT: Duration = Duration::from_millis(500);
/// Bytes the writer takes at once: a reader of 4 KiB/s or more loses nothing.
pub const CHUNK: usize = 2048;
/// The writer lets output gather so long: a wake-up per byte would cost more than the byte.
const GATHER: Duration = Duration::from_millis(1);
/// A non-blocking descriptor that is full is tried again after this.
const RETRY: Duration = Duration::from_millis(5);

/// Sees every input byte before the guest: appends to its second argument what goes on (nothing, the byte, or more).
/// The terminal's escape key lives there.
pub type InputFilter = Box<dyn FnMut(u8, &mut Vec<u8>) + Send>;
/// Receives input on the reader thread; may block while the guest has no room, which stops reading from the host.
pub type OnInput = Box<dyn FnMut(Vec<u8>) + Send>;

/// Why a serial port could not be connected.
#[derive(thiserror::Error, Debug)]
pub enum SerialError {
    /// Opening or listening failed.
    #[error("serial port: cannot open {what}: {source}")]
    Open {
        /// What was to be opened.
        what: String,
        /// The host's reason.
        source: io::Error,
    },
    /// The path of a socket is taken by something that is no socket.
    #[error("serial port: {0} exists and is no socket; remove it or name another path")]
    NotASocket(PathBuf),
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// The writer is busy with bytes it has taken.
    writing: bool,
    closed: bool,
    stalled: bool,
    dropped: u64,
}

#[derive(Default)]
struct Output {
    queue: Mutex<Queue>,
    /// Bytes came, or the queue was closed.
    filled: Condvar,
    /// The writer took the bytes, or finished writing them.
    moved: Condvar,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, byte: u8) {
        let mut q = self.lock();
        if q.bytes.len() >= OUTPUT_LIMIT {
            if !q.stalled {
                let full = |q: &mut Queue| q.bytes.len() >= OUTPUT_LIMIT && !q.closed;
                q = match self.moved.wait_timeout_while(q, STALL_LIMIT, full) {
                    Ok((q, _)) => q,
                    Err(poisoned) => poisoned.into_inner().0,
                };
                q.stalled = q.bytes.len() >= OUTPUT_LIMIT;
            }
            if q.stalled {
                q.dropped += 1;
                return;
            }
        }
        q.bytes.push_back(byte);
        if q.bytes.len() == 1 {
            self.filled.notify_one();
        }
    }

    /// The writer thread: until closed and empty.
    fn run(&self, mut to: impl Write) {
        loop {
            let mut q = self.lock();
            while q.bytes.is_empty() && !q.closed {
                q = self.filled.wait(q).unwrap_or_else(PoisonError::into_inner);
            }
            if q.bytes.is_empty() {
                return;
            }
            if !q.closed && q.bytes.len() < CHUNK {
                drop(q);
                thread::sleep(GATHER);
                q = self.lock();
            }
            let n = q.bytes.len().min(CHUNK);
            let bytes: Vec<u8> = q.bytes.drain(..n).collect();
            q.writing = true;
            q.stalled = false;
            drop(q);
            self.moved.notify_all();
            let lost = write_fully(&mut to, &bytes);
            let mut q = self.lock();
            q.dropped += lost as u64;
            q.writing = false;
            drop(q);
            self.moved.notify_all();
        }
    }

    fn drain(&self, limit: Duration) -> bool {
        let busy = |q: &mut Queue| q.writing || !q.bytes.is_empty();
        match self.moved.wait_timeout_while(self.lock(), limit, busy) {
            Ok((_, timeout)) => !timeout.timed_out(),
            Err(_) => false,
        }
    }
}

/// Writes all of `bytes`; returns how many were lost to an error.
fn write_fully(to: &mut impl Write, mut bytes: &[u8]) -> usize {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return bytes.len(),
            Ok(n) => bytes = bytes.get(n..).unwrap_or(&[]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(_) => return bytes.len(),
        }
    }
    let _ = to.flush();
    0
}

/// The device's end of the output queue.
struct QueueSink(Arc<Output>);

impl SerialSink for QueueSink {
    fn transmit(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// A connected serial port. Dropping it stops the threads without waiting for a reader that never reads.
pub struct SerialBackend {
    output: Option<Arc<Output>>,
    /// Closing it wakes the reader.
    _stop: Option<OwnedFd>,
    location: Option<String>,
    socket: Option<PathBuf>,
    /// Keeps the pseudo-terminal alive while no program has it open.
    _pty_slave: Option<File>,
}

impl SerialBackend {
    /// Connects to `target`. `on_input` gets what comes in after `filter`.
    pub fn open(
        target: &SerialTarget,
        on_input: OnInput,
        filter: Option<InputFilter>,
    ) -> Result<SerialBackend, SerialError> {
        let input = Input { on_input, filter };
        match target {
            SerialTarget::None => Ok(SerialBackend {
                output: None,
                _stop: None,
                location: None,
                socket: None,
                _pty_slave: None,
            }),
            SerialTarget::Stdio { .. } => {
                let open = |what: &str, fd: io::Result<OwnedFd>| fd.map_err(error_opening(what));
                let stdout = open("standard output", io::stdout().as_fd().try_clone_to_owned())?;
                let stdin = open("standard input", io::stdin().as_fd().try_clone_to_owned())?;
                Self::start(File::from(stdout), |stop| input.read_from(stdin, &stop))
            }
            SerialTarget::File(path) => {
                let file = File::create(path).map_err(error_opening(path.display()))?;
                Self::start(file, |_stop| {})
            }
            SerialTarget::Unix(path) => Self::open_unix(path, input),
            SerialTarget::Pty => Self::open_pty(input),
        }
    }

    fn start(
        to: impl Write + Send + 'static,
        reader: impl FnOnce(OwnedFd) + Send + 'static,
    ) -> Result<SerialBackend, SerialError> {
        let (stop_reader, stop) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|e| error_opening("a pipe")(e.into()))?;
        let output = Arc::new(Output::default());
        let for_writer = Arc::clone(&output);
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            thread::Builder::new().name(name.into()).spawn(run).map_err(error_opening("a thread"))
        };
        spawn("serial-out", Box::new(move || for_writer.run(to)))?;
        spawn("serial-in", Box::new(move || reader(stop_reader)))?;
        Ok(SerialBackend {
            output: Some(output),
            _stop: Some(stop),
            location: None,
            socket: None,
            _pty_slave: None,
        })
    }

    /// Listens; one client at a time. What is sent while there is none is lost, as on an unplugged cable.
    fn open_unix(path: &Path, mut input: Input) -> Result<SerialBackend, SerialError> {
        use std::os::unix::fs::FileTypeExt;
        if let Ok(existing) = path.symlink_metadata() {
            if !existing.file_type().is_socket() {
                return Err(SerialError::NotASocket(path.into()));
            }
            // A socket somebody answers on is in use; a dead one is left over from an earlier run.
            if UnixStream::connect(path).is_ok() {
                return Err(error_opening(path.display())(ErrorKind::AddrInUse.into()));
            }
            std::fs::remove_file(path).map_err(error_opening(path.display()))?;
        }
        let listener = UnixListener::bind(path).map_err(error_opening(path.display()))?;
        let client: Arc<Mutex<Option<UnixStream>>> = Arc::default();
        let to = ClientWriter(Arc::clone(&client));
        let mut backend = Self::start(to, move |stop| {
            while wait_readable(&listener, &stop) {
                let Ok((stream, _)) = listener.accept() else { continue };
                let Ok(reading) = stream.try_clone() else { continue };
                set_client(&client, Some(stream));
                input.read_from_ref(&OwnedFd::from(reading), &stop);
                set_client(&client, None);
            }
        })?;
        backend.location = Some(path.display().to_string());
        backend.socket = Some(path.into());
        Ok(backend)
    }

    fn open_pty(input: Input) -> Result<SerialBackend, SerialError> {
        use nix::fcntl::OFlag;
        use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
        let fail = |e: Errno| error_opening("a pseudo-terminal")(e.into());
        let master =
            nix::pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).map_err(fail)?;
        nix::pty::grantpt(&master).map_err(fail)?;
        nix::pty::unlockpt(&master).map_err(fail)?;
        let name = nix::pty::ptsname_r(&master).map_err(fail)?;
        let slave = nix::fcntl::open(
            name.as_str(),
            OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )
        .map_err(fail)?;
        // The line discipline must not echo the guest's output back to it as input.
        let mut termios = tcgetattr(&slave).map_err(fail)?;
        cfmakeraw(&mut termios);
        tcsetattr(&slave, SetArg::TCSANOW, &termios).map_err(fail)?;
        let dup = || master.as_fd().try_clone_to_owned().map_err(error_opening("a pseudo-terminal"));
        let (reading, writing) = (dup()?, dup()?);
        let mut backend = Self::start(File::from(writing), |stop| input.read_from(reading, &stop))?;
        backend.location = Some(name);
        backend._pty_slave = Some(File::from(slave));
        Ok(backend)
    }

    /// The end to give to the UART.
    #[must_use]
    pub fn sink(&self) -> Box<dyn SerialSink> {
        match &self.output {
            Some(output) => Box::new(QueueSink(Arc::clone(output))),
            None => Box::new(NullSink),
        }
    }

    /// Where to connect to: the pseudo-terminal's or the socket's path.
    #[must_use]
    pub fn location(&self) -> Option<&str> {
        self.location.as_deref()
    }

    /// Output bytes nobody took.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.output.as_ref().map_or(0, |o| o.lock().dropped)
    }

    /// Output bytes that still wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.output.as_ref().map_or(0, |o| {
            let q = o.lock();
            q.bytes.len() + usize::from(q.writing)
        })
    }

    /// Waits at most `limit` until all output is written; false if it is not.
    pub fn drain(&self, limit: Duration) -> bool {
        self.output.as_ref().is_none_or(|o| o.drain(limit))
    }
}

impl Drop for SerialBackend {
    fn drop(&mut self) {
        if let Some(output) = &self.output {
            output.lock().closed = true;
            output.filled.notify_all();
            output.moved.notify_all();
        }
        if let Some(path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn error_opening(what: impl ToString) -> impl FnOnce(io::Error) -> SerialError {
    move |source| SerialError::Open { what: what.to_string(), source }
}

fn set_client(client: &Mutex<Option<UnixStream>>, stream: Option<UnixStream>) {
    *client.lock().unwrap_or_else(PoisonError::into_inner) = stream;
}

/// Writes to the client of the moment.
struct ClientWriter(Arc<Mutex<Option<UnixStream>>>);

impl Write for ClientWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The lock is not held while writing: a client that does not read must not keep the next one out.
        let stream = {
            let client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            client.as_ref().and_then(|s| s.try_clone().ok())
        };
        match stream {
            Some(mut stream) => stream.write(bytes),
            None => Err(ErrorKind::NotConnected.into()),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Input {
    on_input: OnInput,
    filter: Option<InputFilter>,
}

impl Input {
    fn read_from(mut self, fd: OwnedFd, stop: &OwnedFd) {
        self.read_from_ref(&fd, stop);
    }

    /// Until the end of the input, an error, or the stop.
    fn read_from_ref(&mut self, fd: &OwnedFd, stop: &OwnedFd) {
        let mut buffer = [0u8; 4096];
        while wait_readable(fd, stop) {
            let n = match nix::unistd::read(fd, &mut buffer) {
                Ok(0) => return,
                Ok(n) => n,
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                Err(_) => return,
            };
            let bytes = buffer.get(..n).unwrap_or(&[]);
            let passed = match &mut self.filter {
                None => bytes.to_vec(),
                Some(filter) => {
                    let mut passed = Vec::with_capacity(n);
                    bytes.iter().for_each(|b| filter(*b, &mut passed));
                    passed
                }
            };
            if !passed.is_empty() {
                (self.on_input)(passed);
            }
        }
    }
}

/// Sleeps until `fd` has input or is at its end; false when the backend is gone.
fn wait_readable(fd: &impl AsFd, stop: &OwnedFd) -> bool {
    loop {
        let mut fds =
            [PollFd::new(fd.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(_) => return false,
            Ok(_) if fds[1].any() != Some(false) => return false,
            Ok(_) => return true,
        }
    }
}

/// Drains several backends together within `limit`; false if one could not be.
pub fn drain_all<'a>(backends: impl IntoIterator<Item = &'a SerialBackend>, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    let mut all = true;
    for backend in backends {
        all &= backend.drain(end.saturating_duration_since(Instant::now()));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::mpsc;

    const SOON: Duration = Duration::from_secs(10);

    fn collector() -> (OnInput, mpsc::Receiver<Vec<u8>>) {
        let (tx, rx) = mpsc::channel();
        (Box::new(move |bytes| drop(tx.send(bytes))), rx)
    }

    fn ignore() -> OnInput {
        Box::new(|_| {})
    }

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("subring-serial-{}-{name}", std::process::id()))
    }

    fn send(sink: &mut Box<dyn SerialSink>, text: &[u8]) {
        text.iter().for_each(|b| sink.transmit(*b));
    }

    #[test]
    fn a_file_holds_every_byte_in_order_once_drained() {
        let path = scratch("file");
        let backend = SerialBackend::open(&SerialTarget::File(path.clone()), ignore(), None).unwrap();
        let text: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        send(&mut backend.sink(), &text);
        assert!(backend.drain(SOON));
        assert_eq!(std::fs::read(&path).unwrap(), text);
        assert_eq!(backend.dropped(), 0);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_created_is_an_error_with_its_name() {
        let path = PathBuf::from("/nonexistent/serial.log");
        let error = SerialBackend::open(&SerialTarget::File(path), ignore(), None).err().unwrap();
        assert!(error.to_string().contains("/nonexistent/serial.log"), "{error}");
    }

    #[test]
    fn output_nobody_takes_is_dropped_and_counted_after_one_wait() {
        struct Stuck(mpsc::Receiver<()>);
        impl Write for Stuck {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                let _ = self.0.recv();
                Err(ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (release, stuck) = mpsc::channel();
        let backend = SerialBackend::start(Stuck(stuck), |_| {}).unwrap();
        let mut sink = backend.sink();
        sink.transmit(0);
        thread::sleep(GATHER * 50); // the writer has taken the first byte and is stuck with it
        let started = Instant::now();
        for _ in 0..OUTPUT_LIMIT + 1000 {
            sink.transmit(1);
        }
        let took = started.elapsed();
        assert!(took >= STALL_LIMIT && took < STALL_LIMIT * 8, "{took:?}");
        assert!(backend.dropped() >= 999);
        assert!(!backend.drain(Duration::from_millis(10)));
        drop(release);
    }

    #[test]
    fn a_slow_reader_gets_every_byte() {
        /// Takes 1 KiB in 5 ms: the whole queue takes it longer than the limit for a stall.
        struct Slow(Arc<Mutex<Vec<u8>>>);
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                thread::sleep(Duration::from_millis(5));
                let n = bytes.len().min(1024);
                self.0.lock().unwrap().extend(&bytes[..n]);
                Ok(n)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let got = Arc::default();
        let backend = SerialBackend::start(Slow(Arc::clone(&got)), |_| {}).unwrap();
        let text: Vec<u8> = (0..OUTPUT_LIMIT as u32 + 20_000).map(|i| (i >> 3) as u8).collect();
        send(&mut backend.sink(), &text);
        assert!(backend.drain(SOON));
        assert_eq!(backend.dropped(), 0);
        assert!(*got.lock().unwrap() == text);
    }

    #[test]
    fn the_filter_sees_each_byte_and_decides_what_goes_on() {
        let (on_input, rx) = collector();
        let filter: InputFilter = Box::new(|byte, out| match byte {
            1 => {}
            b'2' => out.extend(b"22"),
            b => out.push(b),
        });
        let (read, write) = nix::unistd::pipe().unwrap();
        let input = Input { on_input, filter: Some(filter) };
        let _backend = SerialBackend::start(io::sink(), move |stop| input.read_from(read, &stop)).unwrap();
        nix::unistd::write(&write, b"\x01a2\x01").unwrap();
        assert_eq!(rx.recv_timeout(SOON).unwrap(), b"a22");
        nix::unistd::write(&write, b"\x01").unwrap();
        drop(write);
        assert!(rx.recv_timeout(SOON).is_err(), "the reader ends with its input and passed nothing more on");
    }

    #[test]
    fn the_end_of_input_leaves_output_working() {
        let (read, write) = nix::unistd::pipe().unwrap();
        drop(write);
        let (on_input, rx) = collector();
        let input = Input { on_input, filter: None };
        let path = scratch("eof");
        let file = File::create(&path).unwrap();
        let backend = SerialBackend::start(file, move |stop| input.read_from(read, &stop)).unwrap();
        assert!(rx.recv_timeout(SOON).is_err());
        send(&mut backend.sink(), b"still here");
        assert!(backend.drain(SOON));
        assert_eq!(std::fs::read(&path).unwrap(), b"still here");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn dropping_the_backend_ends_the_reader() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        let (on_input, rx) = collector();
        let input = Input { on_input, filter: None };
        let backend = SerialBackend::start(io::sink(), move |stop| input.read_from(read, &stop)).unwrap();
        drop(backend);
        assert_eq!(rx.recv_timeout(SOON), Err(mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn a_unix_socket_serves_one_client_after_another_and_is_removed() {
        let path = scratch("socket");
        let (on_input, rx) = collector();
        let backend = SerialBackend::open(&SerialTarget::Unix(path.clone()), on_input, None).unwrap();
        for word in [b"one", b"two"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(SOON)).unwrap();
            client.write_all(word).unwrap();
            assert_eq!(rx.recv_timeout(SOON).unwrap(), word);
            send(&mut backend.sink(), b"answer");
            let mut got = [0u8; 6];
            client.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"answer");
        }
        assert!(
            matches!(
                SerialBackend::open(&SerialTarget::Unix(path.clone()), ignore(), None),
                Err(SerialError::Open { .. })
            ),
            "a second machine does not take the socket over"
        );
        drop(backend);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_is_no_socket_is_not_removed() {
        let path = scratch("notsocket");
        std::fs::write(&path, "precious").unwrap();
        let result = SerialBackend::open(&SerialTarget::Unix(path.clone()), ignore(), None);
        assert!(matches!(result, Err(SerialError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_pty_carries_both_ways_without_echo() {
        let (on_input, rx) = collector();
        let backend = match SerialBackend::open(&SerialTarget::Pty, on_input, None) {
            Ok(backend) => backend,
            Err(e) => return println!("SKIP: no pseudo-terminals here: {e}"),
        };
        let mut user = File::options().read(true).write(true).open(backend.location().unwrap()).unwrap();
        send(&mut backend.sink(), b"login\r\n");
        let mut got = [0u8; 7];
        user.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"login\r\n");
        user.write_all(b"root\r").unwrap();
        assert_eq!(rx.recv_timeout(SOON).unwrap(), b"root\r");
    }

    #[test]
    fn none_swallows_output() {
        let backend = SerialBackend::open(&SerialTarget::None, ignore(), None).unwrap();
        send(&mut backend.sink(), b"gone");
        assert!(backend.drain(Duration::ZERO));
        assert_eq!((backend.dropped(), backend.location()), (0, None));
    }
}
