//! What a world may ask of the host kernel: next to nothing.
//!
//! The filter allows the eleven calls the runtime needs; the mapping calls only below 4 GiB of address and length, so not
//! even a guest in 64-bit mode can change the runtime's own mappings (all of it lies above 8 GiB), and only for the
//! world's own descriptors. Everything else kills the process.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction,
    SeccompCmpArgLen::{Dword, Qword},
    SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::arena::{ARENA_FD, ORDERS_FD, RAM_FD, WINDOWS_VA};
use super::keys::USER_KEY;
use super::rc_window::{FRAMES_SIZE, UFFD, UFFDIO_CONTINUE, UFFDIO_REGISTER};

const FOUR_GIB: u64 = 1 << 32;

/// Filters, one BPF instruction (`struct sock_filter`) a word, to be installed by the worlds themselves.
#[derive(Debug)]
pub(crate) struct Filters {
    /// For worlds that change their mappings themselves.
    pub(crate) plain: Vec<u64>,
    /// For keyed ones, which put [`super::keys::guard`] in front.
    pub(crate) keyed: Vec<u64>,
    /// For confined ones.
    pub(crate) confined: Vec<u64>,
    /// For their mappers.
    pub(crate) mapper: Vec<u64>,
}

/// Builds them.
pub(crate) fn filters() -> io::Result<Filters> {
    let words = |program: BpfProgram| {
        let word = |code, jt, jf, k| {
            u64::from(code) | u64::from(jt) << 16 | u64::from(jf) << 24 | u64::from(k) << 32
        };
        program.iter().map(|i| word(i.code, i.jt, i.jf, i.k)).collect()
    };
    let compiled = |rules: Result<Rules, _>| rules.and_then(compile).map(words).map_err(io::Error::other);
    let keyed = plain().and_then(with_keys);
    Ok(Filters {
        plain: compiled(plain())?,
        keyed: compiled(keyed)?,
        confined: compiled(confined())?,
        mapper: compiled(mapper())?,
    })
}

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

fn compile(rules: Rules) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?
        .try_into()
}

/// Address and length end below 4 GiB.
fn low() -> Result<Vec<SeccompCondition>, seccompiler::BackendError> {
    use SeccompCmpOp::Lt;
    Ok(vec![SeccompCondition::new(0, Qword, Lt, FOUR_GIB)?, SeccompCondition::new(1, Qword, Lt, FOUR_GIB)?])
}

/// A mapping of one of the memory objects in place of whatever was there.
fn map() -> Result<Vec<SeccompCondition>, seccompiler::BackendError> {
    use SeccompCmpOp::{Ge, Le, MaskedEq};
    let mut map = low()?;
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
    map.push(SeccompCondition::new(3, Dword, MaskedEq(!(libc::MAP_POPULATE as u64)), flags)?);
    map.push(SeccompCondition::new(4, Dword, Ge, RAM_FD as u64)?);
    map.push(SeccompCondition::new(4, Dword, Le, ARENA_FD as u64)?);
    Ok(map)
}

/// Descriptors of the LDT are written.
fn write_ldt() -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(0, Dword, SeccompCmpOp::Eq, 0x11)?])
}

fn confined() -> Result<Rules, seccompiler::BackendError> {
    use SeccompCmpOp::Eq;
    let futex = |op: i32| SeccompCondition::new(1, Dword, Eq, op as u64);
    // A wait that could end by itself, or by another world, would be no rest (`RawWorld::put_to_bed`).
    let wait = vec![futex(libc::FUTEX_WAIT)?, SeccompCondition::new(3, Qword, Eq, 0)?];
    Ok(BTreeMap::from([
        (libc::SYS_futex, vec![SeccompRule::new(wait)?, SeccompRule::new(vec![futex(libc::FUTEX_WAKE)?])?]),
        (libc::SYS_rt_sigreturn, vec![]),
        (libc::SYS_exit_group, vec![]),
    ]))
}

fn mapper() -> Result<Rules, seccompiler::BackendError> {
    let orders = SeccompCondition::new(0, Dword, SeccompCmpOp::Eq, ORDERS_FD as u64)?;
    Ok(BTreeMap::from([
        (libc::SYS_futex, vec![]),
        (libc::SYS_gettid, vec![]),
        (libc::SYS_exit_group, vec![]),
        (libc::SYS_mmap, vec![SeccompRule::new(map()?)?]),
        (libc::SYS_munmap, vec![SeccompRule::new(low()?)?]),
        (libc::SYS_mprotect, vec![SeccompRule::new(low()?)?]),
        (libc::SYS_pwrite64, vec![SeccompRule::new(vec![orders])?]),
        (libc::SYS_modify_ldt, vec![write_ldt()?]),
    ]))
}

/// The same, and mappings may be given the key of ring 3.
fn with_keys(mut rules: Rules) -> Result<Rules, seccompiler::BackendError> {
    let mut give = low()?;
    give.push(SeccompCondition::new(3, Dword, SeccompCmpOp::Eq, u64::from(USER_KEY))?);
    rules.insert(libc::SYS_pkey_mprotect, vec![SeccompRule::new(give)?]);
    Ok(rules)
}

fn plain() -> Result<Rules, seccompiler::BackendError> {
    use SeccompCmpOp::Eq;
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
    Ok(BTreeMap::from([
        // No conditions: the kernel then answers from its bitmap without running the filter (seccomp action cache).
        (libc::SYS_futex, vec![]),
        (libc::SYS_sched_yield, vec![]),
        (libc::SYS_rt_sigreturn, vec![]),
        (libc::SYS_exit_group, vec![]),
        (libc::SYS_mmap, vec![SeccompRule::new(map()?)?]),
        (libc::SYS_ioctl, vec![windows(UFFDIO_CONTINUE)?, windows(UFFDIO_REGISTER)?]),
        (libc::SYS_madvise, vec![SeccompRule::new(discard)?, SeccompRule::new(forget)?]),
        (libc::SYS_munmap, vec![SeccompRule::new(low()?)?]),
        (libc::SYS_mprotect, vec![SeccompRule::new(low()?)?]),
        (
            libc::SYS_setitimer,
            vec![SeccompRule::new(vec![SeccompCondition::new(0, Dword, Eq, libc::ITIMER_REAL as u64)?])?],
        ),
        (libc::SYS_modify_ldt, vec![write_ldt()?]),
    ]))
}
