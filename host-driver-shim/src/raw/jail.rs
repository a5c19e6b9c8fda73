//! What a world may ask of the host kernel: next to nothing.
//!
//! The filter allows the ten calls the runtime needs; the mapping calls only below 4 GiB of address and length, so not
//! even a guest in 64-bit mode can change the runtime's own mappings (all of it lies above 8 GiB), and only for the
//! world's own descriptors. Everything else kills the process.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction,
    SeccompCmpArgLen::{Dword, Qword},
    SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::arena::{ARENA_FD, RAM_FD, WINDOWS_VA};
use super::rc_window::{FRAMES_SIZE, UFFD, UFFDIO_CONTINUE, UFFDIO_REGISTER};

const FOUR_GIB: u64 = 1 << 32;

/// The filter, one BPF instruction (`struct sock_filter`) a word, to be installed by the world itself.
pub(crate) fn filter() -> io::Result<Vec<u64>> {
    let program = compile().map_err(io::Error::other)?;
    Ok(program
        .iter()
        .map(|i| u64::from(i.code) | u64::from(i.jt) << 16 | u64::from(i.jf) << 24 | u64::from(i.k) << 32)
        .collect())
}

fn compile() -> Result<BpfProgram, seccompiler::BackendError> {
    use SeccompCmpOp::{Eq, Ge, Le, Lt, MaskedEq};
    let low = || -> Result<Vec<SeccompCondition>, seccompiler::BackendError> {
        Ok(vec![
            SeccompCondition::new(0, Qword, Lt, FOUR_GIB)?,
            SeccompCondition::new(1, Qword, Lt, FOUR_GIB)?,
        ])
    };
    let mut map = low()?;
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
    map.push(SeccompCondition::new(3, Dword, MaskedEq(!(libc::MAP_POPULATE as u64)), flags)?);
    map.push(SeccompCondition::new(4, Dword, Ge, RAM_FD as u64)?);
    map.push(SeccompCondition::new(4, Dword, Le, ARENA_FD as u64)?);
    // The kernel checks what `ioctl` names against the world's own mappings. A guest in 64-bit mode could have our own memory
    // raise faults, too: its world would end.
    let windows = |request: u64| -> Result<SeccompRule, seccompiler::BackendError> {
        SeccompRule::new(vec![
            SeccompCondition::new(0, Dword, Eq, UFFD as u64)?,
            SeccompCondition::new(1, Dword, Eq, request)?,
        ])
    };
    let dont_need = || SeccompCondition::new(2, Dword, Eq, libc::MADV_DONTNEED as u64);
    let mut discard = low()?;
    discard.push(dont_need()?);
    let forget = vec![
        SeccompCondition::new(0, Qword, Eq, WINDOWS_VA)?,
        SeccompCondition::new(1, Qword, Eq, FRAMES_SIZE)?,
        dont_need()?,
    ];
    let rules = BTreeMap::from([
        // No conditions: the kernel then answers from its bitmap without running the filter (seccomp action cache).
        (libc::SYS_futex, vec![]),
        (libc::SYS_rt_sigreturn, vec![]),
        (libc::SYS_exit_group, vec![]),
        (libc::SYS_mmap, vec![SeccompRule::new(map)?]),
        (libc::SYS_ioctl, vec![windows(UFFDIO_CONTINUE)?, windows(UFFDIO_REGISTER)?]),
        (libc::SYS_madvise, vec![SeccompRule::new(discard)?, SeccompRule::new(forget)?]),
        (libc::SYS_munmap, vec![SeccompRule::new(low()?)?]),
        (libc::SYS_mprotect, vec![SeccompRule::new(low()?)?]),
        (
            libc::SYS_setitimer,
            vec![SeccompRule::new(vec![SeccompCondition::new(0, Dword, Eq, libc::ITIMER_REAL as u64)?])?],
        ),
        (libc::SYS_modify_ldt, vec![SeccompRule::new(vec![SeccompCondition::new(0, Dword, Eq, 0x11)?])?]),
    ]);
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?
        .try_into()
}
