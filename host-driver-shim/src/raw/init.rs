//! How a freshly executed process becomes a world: before `main`, in a constructor, and it never returns.
//!
//! The monitor executes its own program again with [`WORLD_ENV`] in the environment, so every program that links this
//! crate can spawn worlds. After the exec nothing of the monitor's memory is left in the process.

use std::ffi::CStr;
use std::mem::offset_of;
use std::sync::atomic::Ordering::{Acquire, Release};

use super::arena::{
    ARENA_FD, ARENA_VA, Arena, CELLS, CELLS_FD, CELLS_VA, Cell, FILTER_MAX, ORDERS_FD, ORDERS_VA, OWN_FILTER,
    RAM_FD, RAM_VA, SEATS_VA, SIGNAL_STACK_SIZE, SIGNAL_STACK_VA, STACK_SIZE, STACK_VA, VDSO_VA, WATCHED_FD,
    WATCHED_VA, WINDOWS_VA, exit_kind,
};
use super::entry::{call_address, gate_address, restorer_address, signal_entry_address, subring_rc_leave};
use super::orders::Orders;
use super::rc::{arena, death, die};
use super::relay::RelayMemory;
use super::signal::{GUARD_SIGNAL, KICK_SIGNAL};
use super::{keys, mapper, rc_window};
use crate::ram::watched_size;

/// The variable that makes a process a world. Its value is [`WORLD_VALUE`].
pub(crate) const WORLD_ENV: &CStr = c"SUBRING_WORLD";
/// Changes with the arena's layout in spirit; the program is the same file, so it always matches.
pub(crate) const WORLD_VALUE: &CStr = c"1";

const EIGHT_GIB: u64 = 8 << 30;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
const PR_SYS_DISPATCH_ON: u64 = 1;
/// How late a sleep may end, ns: by default it is 50 us, which would be a guest's tick's.
const TIMER_SLACK: u64 = 1000;
/// `arch_prctl`: CPUID executes (1) or raises #GP (0) in the calling thread.
pub(super) const ARCH_CPUID_SET: u64 = 0x1012;

/// Runs before `main` of every program that links this crate.
#[used]
#[unsafe(link_section = ".init_array")]
pub(crate) static CONSTRUCTOR: extern "C" fn() = become_world_if_asked;

/// What set-up was doing when it failed, as `setup_step` counts.
pub(crate) const STEPS: [&str; 16] = [
    "starting",
    "mapping the arena",
    "mapping guest RAM for itself",
    "closing descriptors",
    "checking for its parent",
    "finding 0..4 GiB empty (a non-PIE program cannot be a world)",
    "mapping its stacks",
    "setting its signal stack",
    "installing signal handlers",
    "giving up privileges",
    "forbidding core dumps",
    "taking a protection key and the code that loads PKRU out of its program",
    "catching system calls of guest code (syscall user dispatch, Linux 5.11)",
    "starting its mapper",
    "installing its seccomp filter",
    "ready",
];

extern "C" fn become_world_if_asked() {
    // SAFETY: the C library is initialised before constructors run; nothing changes the environment meanwhile.
    let value = unsafe { libc::getenv(WORLD_ENV.as_ptr()) };
    if value.is_null() {
        return;
    }
    // SAFETY: getenv returned a valid C string.
    let Some(at) = place_named(unsafe { CStr::from_ptr(value) }.to_bytes()) else { return };
    let mut step = 1;
    if set_up(at, &mut step).is_ok() {
        // SAFETY: set-up is complete: arena and stack are mapped and the handlers are in place.
        unsafe { subring_rc_leave() }
    }
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    if step > 1 {
        // SAFETY: step 1 mapped the arena; its words are atomics.
        unsafe {
            (*arena()).setup_errno.store(errno as u32, Release);
            (*arena()).setup_step.store(step, Release);
        }
    }
    die(death::SETUP)
}

/// Where in its memory object the arena of the world named is, in bytes: the number behind [`WORLD_VALUE`].
fn place_named(value: &[u8]) -> Option<u64> {
    let digits = value.strip_prefix(WORLD_VALUE.to_bytes())?;
    digits.iter().try_fold(0u64, |n, digit| {
        digit.is_ascii_digit().then(|| n.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')))
    })
}

/// A step failed, errno says why.
pub(super) struct Refused;

pub(super) fn check(fine: bool) -> Result<(), Refused> {
    if fine { Ok(()) } else { Err(Refused) }
}

fn set_up(at: u64, step: &mut u32) -> Result<(), Refused> {
    map_part(ARENA_VA, size_of::<Arena>() as u64, READ_WRITE, libc::MAP_SHARED, (ARENA_FD, at))?;
    *step = 2;
    // SAFETY: the arena is mapped.
    let confined = unsafe { (*arena()).confined.load(Acquire) } != 0;
    if confined {
        let orders = (ORDERS_FD, at + offset_of!(Cell, orders) as u64);
        map_part(ORDERS_VA, size_of::<Orders>() as u64, libc::PROT_READ, libc::MAP_SHARED, orders)?;
    } else {
        // SAFETY: the arena is mapped.
        let pages = u64::from(unsafe { (*arena()).fill.ram_pages.load(Acquire) });
        map_fixed(RAM_VA, pages << 12, READ_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE, RAM_FD)?;
        map_fixed(WATCHED_VA, watched_size(pages), libc::PROT_READ, libc::MAP_SHARED, WATCHED_FD)?;
        // SAFETY: the arena is mapped.
        if unsafe { (*arena()).master.load(Acquire) } != 0 {
            map_fixed(CELLS_VA, (CELLS * size_of::<Cell>()) as u64, READ_WRITE, libc::MAP_SHARED, CELLS_FD)?;
        }
        // SAFETY: the arena is mapped.
        if unsafe { (*arena()).hand.seat.load(Acquire) } != 0 {
            let shared = libc::MAP_SHARED | libc::MAP_NORESERVE;
            map_fixed(SEATS_VA, size_of::<RelayMemory>() as u64, READ_WRITE, shared, ARENA_FD)?;
        }
    }
    let own = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    map_fixed(
        WINDOWS_VA,
        size_of::<rc_window::Windows>().next_multiple_of(4096) as u64,
        READ_WRITE,
        own,
        -1,
    )?;
    *step = 3;
    // SAFETY: closes descriptors nothing in this process uses.
    check(unsafe { libc::syscall(libc::SYS_close_range, 0, 2, 0) } == 0)?;
    let kept = if confined { ORDERS_FD } else { ARENA_FD };
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_close_range, kept + 1, u32::MAX, 0) } == 0)?;
    if !confined {
        // Without it pages are mapped one by one.
        rc_window::set_up();
    }
    *step = 4;
    let a = arena();
    // SAFETY: the arena is mapped; prctl and getppid touch no memory of ours.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0)?;
        check(libc::getppid() as u32 == (*a).monitor_pid.load(Acquire))?;
    }
    *step = 5;
    low_half_is_empty()?;
    *step = 6;
    map_fixed(STACK_VA, STACK_SIZE, READ_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    // SAFETY: reads the auxiliary vector.
    let frame = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) };
    let signal_stack = SIGNAL_STACK_SIZE + frame.next_multiple_of(4096) * 2;
    map_fixed(SIGNAL_STACK_VA, signal_stack, READ_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    *step = 7;
    let stack = libc::stack_t {
        ss_sp: std::ptr::with_exposed_provenance_mut(SIGNAL_STACK_VA as usize),
        ss_flags: 0,
        ss_size: signal_stack as usize,
    };
    // SAFETY: the stack was just mapped and serves nothing else.
    check(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) } == 0)?;
    *step = 8;
    install_handlers()?;
    *step = 9;
    // SAFETY: these prctl calls touch no memory.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)?;
        check(libc::prctl(libc::PR_SET_DUMPABLE, 0) == 0)?;
        check(libc::prctl(libc::PR_SET_TIMERSLACK, TIMER_SLACK) == 0)?;
    }
    *step = 10;
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: setrlimit reads `none`.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) } == 0)?;
    *step = 11;
    // SAFETY: the arena is mapped.
    let keyed = unsafe { (*a).keyed.load(Acquire) } != 0;
    if keyed {
        keys::set_up()?;
    }
    move_vdso();
    *step = 12;
    // Let CPUID raise #GP where the CPU can do that; no failure where it cannot.
    // SAFETY: touches no memory; nothing here executes CPUID any more.
    let faults = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_CPUID_SET, 0u64) } == 0;
    // SAFETY: the arena is mapped.
    unsafe { (*a).cpuid_faults.store(u32::from(faults), Release) };
    // SAFETY: the arena is mapped; prctl touches no memory, and nothing here executes RDTSC.
    unsafe {
        if (*a).trap_tsc.load(Acquire) != 0 {
            check(libc::prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV) == 0)?;
        }
    }
    // System calls from below 4 GiB become SIGSYS. The range that may call is everything above.
    let (from, len) = (1u64 << 32, (1u64 << 63) - (1u64 << 32));
    // SAFETY: touches no memory; the runtime lies above 4 GiB.
    check(unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, from, len, 0u64) } == 0)?;
    let entry = if confined { call_address() } else { gate_address() };
    // SAFETY: the arena is mapped, its words are atomics.
    unsafe {
        (*a).gate_entry.store(entry, Release);
        (*a).exit.kind.store(exit_kind::READY, Release);
    }
    *step = 13;
    if confined {
        // SAFETY: the runtime's stack is used first by `subring_rc_leave`.
        check(unsafe { mapper::start(at) })?;
        // The mapper has its own table of them.
        // SAFETY: closes descriptors nothing in this thread uses any more.
        check(unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) } == 0)?;
    }
    *step = 14;
    if keyed {
        install_keyed_filter()?
    } else {
        install_filter(OWN_FILTER)?
    }
    *step = 15;
    // SAFETY: as above.
    unsafe { (*a).setup_step.store(*step, Release) };
    Ok(())
}

fn map_fixed(at: u64, len: u64, prot: i32, flags: i32, fd: i32) -> Result<(), Refused> {
    map_part(at, len, prot, flags, (fd, 0))
}

fn map_part(at: u64, len: u64, prot: i32, flags: i32, (fd, offset): (i32, u64)) -> Result<(), Refused> {
    let at: *mut libc::c_void = std::ptr::with_exposed_provenance_mut(at as usize);
    // SAFETY: MAP_FIXED_NOREPLACE replaces no mapping.
    let got = unsafe {
        libc::mmap(at, len as usize, prot, flags | libc::MAP_FIXED_NOREPLACE, fd, offset as libc::off_t)
    };
    check(got == at)
}

/// Moves the vDSO to [`VDSO_VA`]; without it SYSENTER of ring 3 goes on anywhere. Nothing in a world calls it.
fn move_vdso() {
    const MOST_PAGES: usize = 8;
    let at = |address: u64| std::ptr::with_exposed_provenance_mut::<libc::c_void>(address as usize);
    // SAFETY: reads the auxiliary vector.
    let from = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // The kernel moves it as a whole or not at all.
    let _moved = from != 0
        && (1..=MOST_PAGES).any(|pages| {
            // SAFETY: nobody uses what is moved, and there is nothing where it goes.
            let got = unsafe { libc::mremap(at(from), pages << 12, pages << 12, flags, at(VDSO_VA)) };
            got == at(VDSO_VA)
        });
}

/// Nothing may be mapped where guests live: a probe over the whole range that replaces nothing.
fn low_half_is_empty() -> Result<(), Refused> {
    check(gate_address() >= EIGHT_GIB)?;
    let (from, len) = (0x1_0000_usize, (1usize << 32) - 0x1_0000);
    let at: *mut libc::c_void = std::ptr::with_exposed_provenance_mut(from);
    // SAFETY: MAP_FIXED_NOREPLACE replaces no mapping; the probe is removed again.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        let got = libc::mmap(at, len, libc::PROT_NONE, flags, -1, 0);
        check(got == at)?;
        check(libc::munmap(at, len) == 0)
    }
}

/// `struct sigaction` as the kernel has it (arch/x86/include/uapi/asm/signal.h).
#[repr(C)]
struct KernelSigaction {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

/// The flag that there is a restorer.
const SA_RESTORER: u64 = 0x0400_0000;

fn install_handlers() -> Result<(), Refused> {
    let signals = [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGSYS,
        KICK_SIGNAL,
        GUARD_SIGNAL,
    ];
    // NODEFER and the empty mask: handlers are left without sigreturn, so there must be no mask to restore.
    let action = KernelSigaction {
        handler: signal_entry_address() as u64,
        flags: (libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER) as u64 | SA_RESTORER,
        restorer: restorer_address(),
        mask: 0,
    };
    let none = std::ptr::null_mut::<KernelSigaction>();
    for signal in signals {
        // SAFETY: the kernel reads `action`, whose handler is a valid one for this process.
        let r = unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &raw const action, none, 8usize) };
        check(r == 0)?;
    }
    // SAFETY: all-zero is the empty mask.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut()) == 0)
    }
}

/// Installs the filter of a keyed world, with what only the world itself knows in front of it.
fn install_keyed_filter() -> Result<(), Refused> {
    const MOST: usize = keys::GUARD_LEN + FILTER_MAX;
    let a = arena();
    // SAFETY: the arena is mapped.
    let len = unsafe { &(*a).filter_len }.first().map_or(0, |len| len.load(Acquire)) as usize;
    check(len > 0 && len <= FILTER_MAX)?;
    let mut program = [0u64; MOST];
    let (guard, rest) = program.split_at_mut(keys::GUARD_LEN);
    guard.copy_from_slice(&keys::guard());
    for (i, word) in rest.iter_mut().enumerate().take(len) {
        // SAFETY: i < FILTER_MAX: inside the arena's first filter, which nobody writes any more.
        *word = unsafe { (&raw const (*a).filters).cast::<u64>().add(i).read_volatile() };
    }
    install_program(program.as_mut_ptr(), keys::GUARD_LEN + len)
}

/// Installs one of the filters in the arena for the calling thread.
pub(super) fn install_filter(which: usize) -> Result<(), Refused> {
    let a = arena();
    // SAFETY: the arena is mapped.
    let lengths = unsafe { &(*a).filter_len };
    let len = lengths.get(which).map_or(0, |len| len.load(Acquire));
    check(len > 0 && len as usize <= FILTER_MAX)?;
    let filters = ARENA_VA as usize + offset_of!(Arena, filters);
    let filter: *mut u64 =
        std::ptr::with_exposed_provenance_mut(filters + which * size_of::<[u64; FILTER_MAX]>());
    install_program(filter, len as usize)
}

/// Installs the filter of `len` BPF instructions at `filter` for the calling thread.
fn install_program(filter: *mut u64, len: usize) -> Result<(), Refused> {
    let program = libc::sock_fprog { len: len as u16, filter: filter.cast() };
    // SPEC_ALLOW: before Linux 5.16 a filter would switch on speculation controls that slow the guest down; what they
    // protect is this process's memory from itself.
    // SAFETY: the kernel reads `program` and the filter.
    let r = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            &raw const program,
        )
    };
    check(r == 0)
}
