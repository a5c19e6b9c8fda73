//! The signal that makes KVM_RUN return in a thread of this process. Its handler does nothing.

use std::io;

/// A signal nothing else in the process uses.
fn number() -> i32 {
    libc::SIGRTMIN() + 5
}

extern "C" fn nothing(_: i32) {}

/// Arranges that the signal interrupts system calls and does nothing else.
pub(crate) fn install() -> io::Result<()> {
    // SAFETY: all zeros is a valid `sigaction`; the handler is an empty function; no SA_RESTART, so that KVM_RUN returns.
    // Nothing else in this process uses the signal, and installing it again changes nothing.
    let set = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        libc::sigaction(number(), &raw const action, std::ptr::null_mut())
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The calling thread's number for [`send`]; never 0.
pub(crate) fn this_thread() -> i32 {
    // SAFETY: touches no memory.
    unsafe { libc::gettid() }
}

/// Interrupts a thread. A number that has gone, or is another thread's by now, does no harm.
pub(crate) fn send(thread: i32) {
    // SAFETY: sends a signal whose handler does nothing to a thread of this process.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, number()) };
}
