//! What this host offers, found out by trying. Nothing here leaves a trace in the calling process.

use crate::kvm::{self, KvmWorth};
use crate::raw::{keys, rc_window};
use std::ffi::c_long;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Outcome of a probe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Probe {
    /// It works; the text may say more.
    Works(String),
    /// It does not; the text says what the host answered.
    Fails(String),
}

impl Probe {
    /// It works.
    #[must_use]
    pub fn works(&self) -> bool {
        matches!(self, Probe::Works(_))
    }

    fn of(result: io::Result<String>) -> Probe {
        match result {
            Ok(text) => Probe::Works(text),
            Err(error) => Probe::Fails(error.to_string()),
        }
    }
}

/// What can be asked of the host, each tried when called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostCapabilities {
    /// `modify_ldt` installs a 32-bit code segment and execution through it reaches 32-bit code and comes back.
    pub modify_ldt: Probe,
    /// Syscall User Dispatch can be armed.
    pub syscall_user_dispatch: Probe,
    /// Seccomp filters with RET_TRAP and RET_KILL_PROCESS.
    pub seccomp: Probe,
    /// `memfd_create`.
    pub memfd: Probe,
    /// CPUID can be made to fault.
    pub cpuid_faulting: Probe,
    /// `wrfsbase` and `wrgsbase` in user mode.
    pub fsgsbase: Probe,
    /// `userfaultfd`, user mode only, with missing and minor faults of shared memory as signals.
    pub userfaultfd: Probe,
    /// Memory protection keys, and signals are delivered to code that may not reach key 0 (Linux 6.12).
    pub protection_keys: Probe,
    /// `/dev/kvm` makes a virtual machine that runs a few instructions of protected mode.
    pub kvm: Probe,
}

impl HostCapabilities {
    /// Tries everything.
    #[must_use]
    pub fn probe() -> HostCapabilities {
        HostCapabilities {
            modify_ldt: modify_ldt(),
            syscall_user_dispatch: syscall_user_dispatch(),
            seccomp: seccomp(),
            memfd: memfd(),
            cpuid_faulting: cpuid_faulting(),
            fsgsbase: fsgsbase(),
            userfaultfd: userfaultfd(),
            protection_keys: protection_keys(),
            kvm: kvm(),
        }
    }
}

/// How a probe in a child process ended.
enum Child {
    /// By `_exit` with this status.
    Exit(i32),
    /// By a signal.
    Signal(i32),
}

/// Runs `probe` in a child process, which ends with its result as exit status (0..=255).
///
/// `probe` must do nothing but system calls and plain memory accesses: the child of a threaded process may not touch
/// locks or the heap (signal-safety(7)).
fn in_child(probe: fn() -> i32) -> io::Result<Child> {
    // SAFETY: the child calls only `probe`, which by this function's contract is async-signal-safe, and `_exit`.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        let status = probe();
        // SAFETY: ends the child without running destructors or exit handlers of the parent's state.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the answer; `pid` is our child and nobody else waits for it.
        let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
        if waited == pid {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if libc::WIFEXITED(status) {
        Ok(Child::Exit(libc::WEXITSTATUS(status)))
    } else {
        Ok(Child::Signal(libc::WTERMSIG(status)))
    }
}

/// For probes whose exit status is 0 or an errno.
fn errno_of_child(probe: fn() -> i32) -> io::Result<String> {
    match in_child(probe)? {
        Child::Exit(0) => Ok(String::new()),
        Child::Exit(errno) => Err(io::Error::from_raw_os_error(errno)),
        Child::Signal(signal) => Err(io::Error::other(format!("the probe was killed by signal {signal}"))),
    }
}

/// The errno of a system call's result, 0 for success.
fn errno(result: c_long) -> i32 {
    if result >= 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(255) }
}

/// The child's word for "installed, but execution through it did not work".
const BROKEN: i32 = 254;

/// Tries what raw mode stands on ([`HostCapabilities::modify_ldt`]), in a child process.
#[must_use]
pub fn modify_ldt() -> Probe {
    match in_child(far_call_through_ldt) {
        Ok(Child::Exit(0)) => Probe::Works("32-bit code ran through an LDT segment".into()),
        Ok(Child::Exit(BROKEN)) => {
            Probe::Fails("the segment was installed but did not run 32-bit code".into())
        }
        Ok(Child::Exit(code)) => Probe::Fails(io::Error::from_raw_os_error(code).to_string()),
        Ok(Child::Signal(signal)) => {
            Probe::Fails(format!("the segment was installed but running it raised signal {signal}"))
        }
        Err(error) => Probe::Fails(error.to_string()),
    }
}

/// Installs a flat 32-bit code segment in LDT slot 0, jumps through it to 32-bit code and back to 64-bit code.
fn far_call_through_ldt() -> i32 {
    /// `struct user_desc` of asm/ldt.h.
    #[repr(C)]
    struct UserDesc {
        entry_number: u32,
        base: u32,
        limit: u32,
        flags: u32,
    }
    const SELECTOR: u16 = 7;
    const RESULT: u32 = 0x5ca1_ab1e;
    // seg_32bit, contents = 2 (code), limit_in_pages: bits 0, 1..2, 4.
    let desc = UserDesc { entry_number: 0, base: 0, limit: 0xf_ffff, flags: 1 | 2 << 1 | 1 << 4 };
    // SAFETY: `modify_ldt(1, ..)` reads the descriptor and changes only this (child) process's LDT.
    let installed =
        unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &raw const desc, size_of::<UserDesc>()) };
    // The 32-bit return value of modify_ldt is zero-extended.
    if installed as i32 != 0 {
        let code = -(installed as i32);
        return if installed == -1 { errno(-1) } else { code & 0xff };
    }
    // SAFETY: a new anonymous mapping below 4 GiB, at no address in use.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return errno(-1);
    }
    let base = page as usize as u32;
    let mut bytes = [0u8; 0x60];
    // 32-bit: mov eax, RESULT; jmp 33h:base+20h
    bytes[0] = 0xb8;
    bytes[1..5].copy_from_slice(&RESULT.to_le_bytes());
    bytes[5] = 0xea;
    bytes[6..10].copy_from_slice(&base.wrapping_add(0x20).to_le_bytes());
    bytes[10] = 0x33;
    // 64-bit: mov rsp, [base+40h]; ret
    bytes[0x20..0x24].copy_from_slice(&[0x48, 0x8b, 0x24, 0x25]);
    bytes[0x24..0x28].copy_from_slice(&base.wrapping_add(0x40).to_le_bytes());
    bytes[0x28] = 0xc3;
    // The far pointer to the 32-bit code.
    bytes[0x48..0x4c].copy_from_slice(&base.to_le_bytes());
    bytes[0x4c..0x4e].copy_from_slice(&SELECTOR.to_le_bytes());
    // SAFETY: `page` is 4096 writable bytes of our own.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), page.cast(), bytes.len()) };
    let result: u32;
    // SAFETY: the code at `page` changes EAX only and comes back by `ret` with the stack pointer saved at +40h. The
    // upper halves of registers are not relied upon across compatibility mode except RBX and RBP, which nothing
    // touches; every other register is declared lost.
    unsafe {
        std::arch::asm!(
            "lea rax, [rip + 2f]",
            "push rbx",
            "push rbp",
            "push rax",
            "mov [{page} + 0x40], rsp",
            "jmp fword ptr [{page} + 0x48]",
            "2:",
            "pop rbp",
            "pop rbx",
            page = in(reg) page,
            out("eax") result,
            clobber_abi("sysv64"),
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
    if result == RESULT { 0 } else { BROKEN }
}

fn syscall_user_dispatch() -> Probe {
    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    const PR_SYS_DISPATCH_ON: usize = 1;
    Probe::of(errno_of_child(|| {
        // SAFETY: arms dispatch in the child only, with everything from 4 GiB up allowed and no selector.
        errno(
            unsafe {
                libc::prctl(
                    PR_SET_SYSCALL_USER_DISPATCH,
                    PR_SYS_DISPATCH_ON,
                    1usize << 32,
                    (1usize << 47) - (1usize << 32),
                    0usize,
                )
            }
            .into(),
        )
    }))
}

fn seccomp() -> Probe {
    const SECCOMP_GET_ACTION_AVAIL: usize = 2;
    const RET_TRAP: u32 = 0x0003_0000;
    const RET_KILL_PROCESS: u32 = 0x8000_0000;
    for action in [RET_TRAP, RET_KILL_PROCESS] {
        // SAFETY: only asks; reads one u32.
        let result =
            unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0usize, &raw const action) };
        if result != 0 {
            return Probe::Fails(io::Error::last_os_error().to_string());
        }
    }
    Probe::Works(String::new())
}

fn memfd() -> Probe {
    // SAFETY: the name is a C string; the new descriptor is owned right away.
    let fd = unsafe { libc::memfd_create(c"subring-probe".as_ptr(), libc::MFD_CLOEXEC) };
    owned(fd.into()).map_or_else(|e| Probe::Fails(e.to_string()), |_| Probe::Works(String::new()))
}

/// Takes ownership of a descriptor a system call returned.
fn owned(fd: c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn cpuid_faulting() -> Probe {
    const ARCH_CPUID_SET: usize = 0x1012;
    Probe::of(errno_of_child(|| {
        // SAFETY: makes CPUID fault in the child, which executes none afterwards.
        errno(unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_CPUID_SET, 0usize) })
    }))
}

fn fsgsbase() -> Probe {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads the auxiliary vector.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0 {
        Probe::Works(String::new())
    } else {
        Probe::Fails("the kernel does not enable it".into())
    }
}

fn userfaultfd() -> Probe {
    match rc_window::userfaultfd() {
        Some(fd) => {
            owned(fd.into()).map_or_else(|e| Probe::Fails(e.to_string()), |_| Probe::Works(String::new()))
        }
        None => Probe::Fails(io::Error::last_os_error().to_string()),
    }
}

/// Tries what keyed worlds stand on ([`HostCapabilities::protection_keys`]), in a child process.
#[must_use]
pub fn protection_keys() -> Probe {
    if !keys::cpu_has_them() {
        return Probe::Fails("the CPU has none, or the kernel does not use them".into());
    }
    match in_child(signal_without_key_0) {
        Ok(Child::Exit(0)) => Probe::Works(String::new()),
        Ok(Child::Exit(code)) => Probe::Fails(io::Error::from_raw_os_error(code).to_string()),
        Ok(Child::Signal(_)) => Probe::Fails("no signal reaches code that may not use key 0".into()),
        Err(error) => Probe::Fails(error.to_string()),
    }
}

/// Raises a signal where PKRU forbids key 0, the signal stack's.
fn signal_without_key_0() -> i32 {
    extern "C" fn arrived(_: i32) {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    const STACK: usize = 256 << 10;
    // SAFETY: new memory of the child's own; the handler and the stack serve nothing else, all arguments are local and live.
    // The assembly touches no memory, and nobody needs what comes behind it.
    unsafe {
        if libc::syscall(libc::SYS_pkey_alloc, 0, 0) < 0 {
            return errno(-1);
        }
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let memory = libc::mmap(std::ptr::null_mut(), STACK, rights, kind, -1, 0);
        if memory == libc::MAP_FAILED {
            return errno(-1);
        }
        let stack = libc::stack_t { ss_sp: memory, ss_flags: 0, ss_size: STACK };
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = arrived as extern "C" fn(i32) as usize;
        action.sa_flags = libc::SA_ONSTACK;
        if libc::sigaltstack(&raw const stack, std::ptr::null_mut()) != 0
            || libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()) != 0
        {
            return errno(-1);
        }
        std::arch::asm!("wrpkru", "ud2", in("eax") keys::USER_PKRU, in("ecx") 0, in("edx") 0, options(noreturn));
    }
}

fn kvm() -> Probe {
    match kvm::probe() {
        worth @ KvmWorth::Hardware { .. } => Probe::Works(worth.to_string()),
        worth => Probe::Fails(worth.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_that_dies_is_a_failure_and_not_our_death() {
        let probe = || {
            // SAFETY: ends the child by a signal.
            unsafe { libc::raise(libc::SIGKILL) };
            0
        };
        assert!(errno_of_child(probe).is_err_and(|e| e.to_string().contains("signal 9")));
        assert!(errno_of_child(|| libc::ENOSYS).is_err_and(|e| e.raw_os_error() == Some(libc::ENOSYS)));
    }

    #[test]
    fn probing_leaves_this_process_as_it_was() {
        let before = HostCapabilities::probe();
        // CPUID still answers here although the probe made it fault in a child.
        assert_ne!(std::arch::x86_64::__cpuid(0).eax, 0);
        assert_eq!(before, HostCapabilities::probe());
    }
}
