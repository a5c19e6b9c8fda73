//! The runtime inside a world: waits for the monitor, carries out its commands, enters the guest.
//!
//! Runs with the guest's FS and GS bases, so it uses no thread-local storage; it allocates nothing, calls nothing but
//! its own system calls, and touches only the arena. Everything it needs lies above 8 GiB, where the jail forbids to
//! change mappings.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::arena::{ARENA_VA, Arena, COMMANDS, Command, exit_kind, op, request, turn, vcpu_word};
use super::entry::{self, subring_rc_resume};
use super::fill::NO_FAULT;
use super::rc_deliver::CPL;
use super::rc_quick::Next;
use super::{keys, rc_doze, rc_quick, rc_switch, rc_window};

/// A run of pages up to this long is entered in the page tables when it is mapped: cheaper than a page fault each.
const POPULATE_UP_TO: u32 = 64 << 10;

/// Exit codes by which a world says why it gave up.
pub(crate) mod death {
    /// The process is a world but could not be set up; the arena's `setup_step` says more.
    pub(crate) const SETUP: i32 = 120;
    /// Guest code ran in 64-bit mode and raised an exception or made a system call.
    pub(crate) const ESCAPED: i32 = 121;
    /// The runtime itself faulted.
    pub(crate) const RUNTIME: i32 = 122;
}

/// The arena as the world sees it.
pub(crate) fn arena() -> *mut Arena {
    std::ptr::with_exposed_provenance_mut(ARENA_VA as usize)
}

/// A system call without errno, thus without thread-local storage.
///
/// # Safety
/// As the system call demands.
pub(crate) unsafe fn syscall(nr: i64, a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> i64 {
    // SAFETY: what the call does to memory is the caller's promise.
    unsafe { entry::syscall(nr, a, b, c, d, e, f) }
}

/// Ends the world.
pub(crate) fn die(code: i32) -> ! {
    loop {
        // SAFETY: exit_group touches no memory.
        unsafe { syscall(libc::SYS_exit_group, code as u64, 0, 0, 0, 0, 0) };
    }
}

/// Hands over to the monitor with the exit record as it stands, waits for its next request and does it.
///
/// Entered by assembly on a fresh stack, never returns.
pub(crate) unsafe extern "C" fn serve() -> ! {
    let a = arena();
    // SAFETY: in a world the arena is mapped at `a`; if the gate brought us here, it has saved the registers.
    let mut next = unsafe { rc_quick::answer(a) };
    if next == Next::Guest {
        // SAFETY: we are in a world on the runtime's stack.
        unsafe { subring_rc_resume() };
    }
    loop {
        // SAFETY: in a world the arena is mapped at `a` for the process's whole life; its words are atomics.
        let (turn, seat) = unsafe { (&(*a).turn, (*a).hand.seat.load(Relaxed)) };
        let word = turn.as_ptr().addr() as u64;
        if next != Next::Other {
            turn.store(turn::MONITOR, SeqCst);
            let common = if seat == 0 { turn } else { rc_switch::common_turn() };
            common.store(turn::MONITOR, SeqCst);
            let word = common.as_ptr().addr() as u64;
            // SAFETY: `word` is the address of a futex word in the arena or before the seats.
            unsafe { syscall(libc::SYS_futex, word, libc::FUTEX_WAKE as u64, 1, 0, 0, 0) };
        }
        next = Next::Monitor;
        while turn.load(SeqCst) != turn::WORLD {
            // SAFETY: `word` is the address of a futex word in the arena; 0 = no timeout.
            unsafe {
                syscall(libc::SYS_futex, word, libc::FUTEX_WAIT as u64, u64::from(turn::MONITOR), 0, 0, 0);
            }
        }
        if !carry_out() {
            continue;
        }
        // SAFETY: as above.
        if unsafe { (*a).request.load(Acquire) } == request::COMMANDS {
            // SAFETY: as above.
            unsafe { (*a).exit.kind.store(exit_kind::COMMANDS_DONE, Release) };
            continue;
        }
        // SAFETY: as above.
        unsafe { (*a).fill.last.store(NO_FAULT, Relaxed) };
        // SAFETY: as above.
        unsafe {
            let ring3 = vcpu_word(a, CPL).load(Relaxed) == 3;
            (*a).pkru.store(if ring3 { keys::USER_PKRU } else { keys::KERNEL_PKRU }, Relaxed);
        }
        // SAFETY: as above, and the world has the turn.
        unsafe { rc_doze::enter(a) };
        // SAFETY: we are in a world on the runtime's stack; the state comes from the monitor and a fault while
        // loading it is handled (signal.rs).
        unsafe { subring_rc_resume() };
    }
}

/// Does all commands in order; on failures records the first one and says `false`.
fn carry_out() -> bool {
    let a = arena();
    // SAFETY: in a world the arena is mapped at `a`; its words are atomics.
    let n = (unsafe { (*a).commands_len.load(Acquire) } as usize).min(COMMANDS);
    let mut fine = true;
    for i in 0..n {
        // SAFETY: i < COMMANDS, so the element lies in the arena; the monitor writes it only when it has the turn.
        let command = unsafe { (&raw const (*a).commands).cast::<Command>().add(i).read_volatile() };
        let r = perform(&command);
        if r < 0 && fine {
            fine = false;
            // SAFETY: as above.
            let exit = unsafe { &(*a).exit };
            exit.command.store(i as u32, Relaxed);
            exit.errno.store(r.unsigned_abs() as u32, Relaxed);
            exit.kind.store(exit_kind::COMMAND_FAILED, Release);
        }
    }
    fine
}

/// Among the PROT_* of a mapping: the page is ring 3's, of a keyed world.
pub(crate) const FOR_RING3: u32 = 1 << 16;

/// Maps `len` bytes of one of the world's descriptors at `at`; negative: the errno.
pub(crate) fn map(at: u32, len: u32, prot: u32, fd: u32, offset: u64) -> i64 {
    map_with(populate(len), (at, len), prot, fd, offset)
}

/// Gives a range the key of ring 3.
fn give_key(at: u32, len: u32, prot: u32) -> i64 {
    let (at, len, prot, key) = (u64::from(at), u64::from(len), u64::from(prot), u64::from(keys::USER_KEY));
    // SAFETY: changes guest mappings below 4 GiB only (the jail enforces it).
    unsafe { syscall(libc::SYS_pkey_mprotect, at, len, prot, key, 0, 0) }
}

/// The flag of mmap that a mapping of `len` bytes is made with.
pub(crate) fn populate(len: u32) -> i32 {
    if len <= POPULATE_UP_TO { libc::MAP_POPULATE } else { 0 }
}

/// Maps `len` writable bytes of one of the world's descriptors at `at`, without entering a page in the page tables; `more` may be
/// [`FOR_RING3`].
pub(crate) fn reserve(at: u32, len: u32, fd: u32, offset: u64, more: u32) -> bool {
    map_with(0, (at, len), (libc::PROT_READ | libc::PROT_WRITE) as u32 | more, fd, offset) >= 0
}

fn map_with(flags: i32, (at, len): (u32, u32), prot: u32, fd: u32, offset: u64) -> i64 {
    rc_window::windows().forget(at >> 12, len >> 12);
    let flags = (flags | libc::MAP_SHARED | libc::MAP_FIXED) as u64;
    let rights = prot & !FOR_RING3;
    let (first, bytes) = (u64::from(at), u64::from(len));
    // SAFETY: replaces guest mappings below 4 GiB only (the jail enforces it), where nothing of ours lives.
    let r = unsafe { syscall(libc::SYS_mmap, first, bytes, u64::from(rights), flags, u64::from(fd), offset) };
    if prot & FOR_RING3 == 0 || r < 0 { r.min(0) } else { give_key(at, len, rights) }
}

/// Removes what is mapped in `len` bytes at `at`; negative: the errno.
pub(crate) fn unmap(at: u32, len: u32) -> i64 {
    rc_window::windows().forget(at >> 12, len >> 12);
    // SAFETY: removes guest mappings below 4 GiB only (the jail enforces it).
    unsafe { syscall(libc::SYS_munmap, u64::from(at), u64::from(len), 0, 0, 0, 0) }
}

fn perform(c: &Command) -> i64 {
    let (at, len) = (u64::from(c.a), u64::from(c.b));
    match c.op {
        op::MAP => map(c.a, c.b, c.c, c.d, c.offset),
        op::UNMAP if c.b == 0 => {
            const HALF: u64 = 1 << 31;
            rc_window::windows().forget_all();
            // SAFETY: removes guest mappings below 4 GiB only.
            let low = unsafe { syscall(libc::SYS_munmap, 0, HALF, 0, 0, 0, 0) };
            // SAFETY: removes guest mappings below 4 GiB only.
            let high = unsafe { syscall(libc::SYS_munmap, HALF, HALF, 0, 0, 0, 0) };
            low.min(high)
        }
        op::UNMAP => unmap(c.a, c.b),
        op::PROTECT => {
            rc_window::windows().forget(c.a >> 12, c.b >> 12);
            // SAFETY: changes guest mappings below 4 GiB only (the jail enforces it).
            unsafe { syscall(libc::SYS_mprotect, at, len, u64::from(c.c), 0, 0, 0) }
        }
        op::SEGMENT => {
            // struct user_desc: entry_number, base_addr, limit, flags.
            let desc = [c.a, c.b, c.c, c.d];
            // SAFETY: the kernel reads 16 bytes of `desc`. The result is an int in EAX.
            let r = unsafe {
                syscall(libc::SYS_modify_ldt, 0x11, desc.as_ptr().expose_provenance() as u64, 16, 0, 0, 0)
            };
            i64::from(r as i32)
        }
        _ => -i64::from(libc::EINVAL),
    }
}
