//! The keeper: one thread per engine that gives birth to worlds and notices their death.
//!
//! Worlds ask the kernel to be killed when the *thread* that made them ends, so that thread must live as long as the
//! engine. It reaps every world it made; when the engine and its last world are dropped, it ends after the last reaping.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use super::arena::{ARENA_FD, ArenaMap, CELLS_FD, CODE_FD, RAM_FD, WATCHED_FD, Word, turn};
use super::init::{CONSTRUCTOR, STEPS, WORLD_ENV, WORLD_VALUE};
use super::orders::OrdersMap;
use super::rc::death;
use super::relay::Relay;

/// What everybody who deals with one world process shares.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: libc::pid_t,
    pidfd: OwnedFd,
    pub(crate) arena: ArenaMap,
    /// A kick that no run has answered yet. The monitor's own copy of `Arena::kick`.
    pub(crate) kicked: AtomicBool,
    pub(crate) signals: Signals,
    /// A confined world's.
    pub(crate) orders: Option<OrdersMap>,
    /// The relay it has a seat in, and which.
    pub(crate) seat: Option<(Weak<Relay>, u32)>,
    dead: AtomicBool,
    obituary: Mutex<Option<String>>,
}

/// Whether kicks are sent as signals: only while a world has the turn. A world that is to sleep would be woken. (The words of a
/// confined world are among its orders.)
#[derive(Debug, Default)]
pub(crate) struct Signals {
    open: AtomicU32,
    /// Not 0: there has been one since the last look.
    sent: AtomicU32,
    /// How many threads are about to send one.
    sending: AtomicU32,
}

/// Signals are open: what the mapper writes before it wakes the world.
pub(super) const SIGNALS_OPEN: u32 = super::orders::WAKES;

impl Process {
    fn signals_state(&self) -> &AtomicU32 {
        self.orders.as_ref().map_or(&self.signals.open, OrdersMap::signals)
    }

    fn signals_sent(&self) -> &AtomicU32 {
        self.orders.as_ref().map_or(&self.signals.sent, OrdersMap::sent)
    }

    /// From here on kicks are sent as signals.
    pub(crate) fn open_signals(&self) {
        self.signals_state().store(SIGNALS_OPEN, Ordering::SeqCst);
    }

    /// From here on they are not. Says whether one was sent.
    pub(crate) fn close_signals(&self) -> bool {
        self.signals_state().store(0, Ordering::SeqCst);
        // Whoever has seen them open is inside a system call.
        while self.signals.sending.load(Ordering::SeqCst) != 0 {
            std::hint::spin_loop();
        }
        let sent = self.signals_sent();
        sent.load(Ordering::SeqCst) != 0 && sent.swap(0, Ordering::SeqCst) != 0
    }

    /// Sends one if they are, and to whoever the guest has been handed to.
    pub(crate) fn signal_if_open(&self, signal: i32) {
        // The world of ring 0 that has entered a confined one looks at the second.
        let count = [Some(&self.signals.sending), self.orders.as_ref().map(OrdersMap::sending)];
        for word in count.into_iter().flatten() {
            word.fetch_add(1, Ordering::SeqCst);
        }
        if self.signals_state().load(Ordering::SeqCst) == SIGNALS_OPEN {
            self.signals_sent().store(1, Ordering::SeqCst);
            self.signal(signal);
            if let Some((relay, own)) = &self.seat
                && let Some(relay) = relay.upgrade()
            {
                relay.kick_holder(*own, signal);
            }
        }
        for word in count.into_iter().flatten() {
            word.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Sends a signal; a world that is gone takes none, which is no error.
    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: no memory is passed; the pidfd names our child even after its death.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// How the world ended, if it has.
    pub(crate) fn obituary(&self) -> Option<String> {
        self.obituary.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reaps the process if it has ended and wakes whoever waits for it.
    fn bury_if_dead(&self) -> bool {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: `info` is a valid place for the answer; the pidfd names our own child.
        let r = unsafe {
            libc::waitid(
                libc::P_PIDFD,
                self.pidfd.as_raw_fd() as libc::id_t,
                info.as_mut_ptr(),
                libc::WEXITED | libc::WNOHANG,
            )
        };
        let text = if r == 0 {
            // SAFETY: waitid filled `info`, which was zeroed before.
            let (pid, code, status) = unsafe {
                let info = info.assume_init();
                (info.si_pid(), info.si_code, info.si_status())
            };
            if pid == 0 {
                return false;
            }
            self.describe(code, status)
        } else if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
            return false;
        } else {
            // Somebody else reaped it (SIGCHLD ignored): it is gone all the same.
            String::from("its end was reported to somebody else")
        };
        *self.obituary.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        self.dead.store(true, Ordering::Release);
        let word = self.arena.word(Word::TURN);
        word.store(turn::DEAD, Ordering::SeqCst);
        futex_wake(word);
        if let Some(relay) = self.seat.as_ref().and_then(|(relay, _)| relay.upgrade()) {
            // Perhaps the guest was handed to it; whoever waits looks who has it.
            futex_wake(relay.turn());
        }
        true
    }

    fn describe(&self, code: i32, status: i32) -> String {
        if code != libc::CLD_EXITED {
            return match status {
                libc::SIGSYS => String::from("killed by its jail for a forbidden system call (SIGSYS)"),
                libc::SIGKILL => String::from("killed (SIGKILL)"),
                s => format!("killed by signal {s}"),
            };
        }
        match status {
            death::ESCAPED => String::from("guest code left its 32-bit mode and was stopped"),
            death::RUNTIME => String::from("its runtime faulted"),
            death::SETUP => {
                let step = self.arena.get(Word::SETUP_STEP) as usize;
                let errno = io::Error::from_raw_os_error(self.arena.get(Word::SETUP_ERRNO) as i32);
                format!("it failed while {}: {errno}", STEPS.get(step).unwrap_or(&"setting up"))
            }
            s => format!("exited with status {s}"),
        }
    }
}

/// Wakes the one process that waits for this word; false: none does.
pub(crate) fn futex_wake(word: &AtomicU32) -> bool {
    // SAFETY: the kernel uses only the address of a live word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) > 0 }
}

/// Has the one process that waits for a word with this value wait for another word instead; false: none does.
pub(crate) fn futex_requeue(word: &AtomicU32, value: u32, other: &AtomicU32) -> bool {
    // SAFETY: the kernel uses only the addresses of live words, and the value of the first.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_CMP_REQUEUE,
            0,
            1usize,
            other.as_ptr(),
            value,
        )
    };
    moved > 0
}

/// Waits while the word holds `value`, at most this long, and not after an interruption. False: the time is over.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32, timeout: &libc::timespec) -> bool {
    // SAFETY: the kernel reads a live word and `timeout`.
    let r = unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const *timeout)
    };
    r == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
}

/// Descriptors of the memory objects a world gets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Objects {
    pub(crate) ram: RawFd,
    pub(crate) code: RawFd,
    /// The bitmap of watched frames, read-only; of a confined world the memory its orders are in.
    pub(crate) watched: RawFd,
    /// All cells, for a world that may enter confined ones.
    pub(crate) cells: Option<RawFd>,
    /// Where in its memory object its arena is, in bytes.
    pub(crate) arena_at: u64,
}

/// What the keeper is asked to do.
struct Birth {
    arena: ArenaMap,
    orders: Option<OrdersMap>,
    seat: Option<(Weak<Relay>, u32)>,
    objects: Objects,
    answer: Sender<io::Result<Arc<Process>>>,
}

/// The keeper thread's handle. The thread ends when this is dropped and every world has ended.
#[derive(Debug)]
pub(crate) struct Keeper {
    births: Option<Sender<Birth>>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(crate) fn start() -> io::Result<Keeper> {
        // SAFETY: touches no memory.
        let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned by eventfd and nobody else owns it.
        let bell = Arc::new(unsafe { OwnedFd::from_raw_fd(raw) });
        let (births, inbox) = channel();
        let theirs = Arc::clone(&bell);
        let thread = std::thread::Builder::new()
            .name(String::from("world-keeper"))
            .spawn(move || keep(&inbox, &theirs))?;
        Ok(Keeper { births: Some(births), bell, thread: Some(thread) })
    }

    /// Spawns a world process. The objects stay open during the call.
    pub(crate) fn spawn(
        &self,
        arena: ArenaMap,
        orders: Option<OrdersMap>,
        seat: Option<(Weak<Relay>, u32)>,
        objects: Objects,
    ) -> io::Result<Arc<Process>> {
        let gone = || io::Error::other("the world keeper is gone");
        let (answer, result) = channel();
        self.births
            .as_ref()
            .ok_or_else(gone)?
            .send(Birth { arena, orders, seat, objects, answer })
            .map_err(|_| gone())?;
        ring(&self.bell);
        result.recv().map_err(|_| gone())?
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.births = None;
        ring(&self.bell);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn ring(bell: &OwnedFd) {
    let one = 1u64;
    // SAFETY: writes the 8 bytes of `one` to an eventfd.
    unsafe { libc::write(bell.as_raw_fd(), (&raw const one).cast(), 8) };
}

fn keep(inbox: &Receiver<Birth>, bell: &OwnedFd) {
    let mut alive: Vec<Arc<Process>> = Vec::new();
    let mut open = true;
    while open || !alive.is_empty() {
        let mut fds: Vec<libc::pollfd> = std::iter::once(bell.as_raw_fd())
            .chain(alive.iter().map(|p| p.pidfd.as_raw_fd()))
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        // SAFETY: `fds` is a valid array of its length; all descriptors are open.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        let mut count = 0u64;
        // SAFETY: reads at most 8 bytes into `count`; the eventfd does not block.
        unsafe { libc::read(bell.as_raw_fd(), (&raw mut count).cast(), 8) };
        alive.retain(|p| !p.bury_if_dead());
        loop {
            match inbox.try_recv() {
                Ok(birth) => {
                    let answer = birth.answer.clone();
                    let made = make(birth);
                    if let Ok(process) = &made {
                        alive.push(Arc::clone(process));
                    }
                    let _asker_left = answer.send(made);
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                    open = false;
                    break;
                }
            }
        }
        if !open {
            // Worlds hold the engine alive, so whatever still runs here has no owner any more.
            alive.iter().for_each(|p| p.signal(libc::SIGKILL));
        }
    }
}

/// Executes this very program as a world.
fn make(birth: Birth) -> io::Result<Arc<Process>> {
    let Birth { arena, orders, seat, objects, .. } = birth;
    // Reading it keeps the constructor in the program whatever the linker thinks of it.
    // SAFETY: reads an initialised static.
    let _kept = unsafe { (&raw const CONSTRUCTOR).read_volatile() };
    let mut descriptors = vec![
        (objects.ram, RAM_FD),
        (objects.code, CODE_FD),
        (arena.fd(), ARENA_FD),
        (objects.watched, WATCHED_FD),
    ];
    descriptors.extend(objects.cells.map(|fd| (fd, CELLS_FD)));
    let pid = posix_spawn(&descriptors, objects.arena_at)?;
    // SAFETY: touches no memory. The child is not reaped yet, so the number is still its own.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if raw < 0 {
        let error = io::Error::last_os_error();
        // SAFETY: our own child, not reaped yet.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, std::ptr::null_mut(), 0);
        }
        return Err(error);
    }
    // SAFETY: `raw` was just returned by pidfd_open and nobody else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(raw as RawFd) };
    Ok(Arc::new(Process {
        pid,
        pidfd,
        arena,
        kicked: AtomicBool::new(false),
        signals: Signals::default(),
        orders,
        seat,
        dead: AtomicBool::new(false),
        obituary: Mutex::new(None),
    }))
}

fn posix_spawn(fds: &[(RawFd, RawFd)], arena_at: u64) -> io::Result<libc::pid_t> {
    fn ok(r: i32) -> io::Result<()> {
        if r == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(r)) }
    }
    let arena_at = arena_at.to_string();
    let marker =
        CString::new([WORLD_ENV.to_bytes(), b"=", WORLD_VALUE.to_bytes(), arena_at.as_bytes()].concat())?;
    // glibc's restartable sequences would cost the kernel work at every preemption of a world.
    let tunables: &CStr = c"GLIBC_TUNABLES=glibc.pthread.rseq=0";
    let argv = [c"subring-world".as_ptr().cast_mut(), std::ptr::null_mut()];
    let envp = [marker.as_ptr().cast_mut(), tunables.as_ptr().cast_mut(), std::ptr::null_mut()];
    let mut pid = 0;
    // SAFETY: every object is initialised by its init call before use and destroyed once; strings and arrays live
    // until posix_spawn returns, which is after the exec.
    unsafe {
        let mut actions = MaybeUninit::<libc::posix_spawn_file_actions_t>::uninit();
        ok(libc::posix_spawn_file_actions_init(actions.as_mut_ptr()))?;
        let mut attr = MaybeUninit::<libc::posix_spawnattr_t>::uninit();
        ok(libc::posix_spawnattr_init(attr.as_mut_ptr()))?;
        let result = (|| {
            for &(from, to) in fds {
                ok(libc::posix_spawn_file_actions_adddup2(actions.as_mut_ptr(), from, to))?;
            }
            for std_fd in 0..3 {
                ok(libc::posix_spawn_file_actions_addclose(actions.as_mut_ptr(), std_fd))?;
            }
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            ok(libc::posix_spawnattr_setsigmask(attr.as_mut_ptr(), &raw const set))?;
            libc::sigfillset(&raw mut set);
            ok(libc::posix_spawnattr_setsigdefault(attr.as_mut_ptr(), &raw const set))?;
            // Its own process group: the terminal's ^C is not for worlds.
            ok(libc::posix_spawnattr_setpgroup(attr.as_mut_ptr(), 0))?;
            let flags =
                libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF | libc::POSIX_SPAWN_SETPGROUP;
            ok(libc::posix_spawnattr_setflags(attr.as_mut_ptr(), flags as libc::c_short))?;
            ok(libc::posix_spawn(
                &raw mut pid,
                c"/proc/self/exe".as_ptr(),
                actions.as_ptr(),
                attr.as_ptr(),
                argv.as_ptr(),
                envp.as_ptr(),
            ))
        })();
        libc::posix_spawnattr_destroy(attr.as_mut_ptr());
        libc::posix_spawn_file_actions_destroy(actions.as_mut_ptr());
        result?;
    }
    Ok(pid)
}
