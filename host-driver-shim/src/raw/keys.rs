//! Keyed worlds: worlds of all rings in which ring 3 is kept from everything else by a memory protection key.
//!
//! The pages the guest gives its users have the key [`USER_KEY`]; all else in the process (the guest's kernel, the arena, the
//! runtime) has key 0. Guest ring 3 runs with a PKRU that forbids key 0 ([`USER_PKRU`]), the rest with one that forbids
//! nothing ([`KERNEL_PKRU`]), but for signal handlers, to which Linux gives one that allows key 0 alone
//! (Documentation/core-api/protection-keys.rst, SDM Vol. 3A, 4.6.2). PKRU can be changed by every code that executes one of
//! two instructions; so ring 3 is to find neither:
//! - what ring 3 is shown as code has neither (the monitor sees to it); in the program this process executes, they are
//!   overwritten before any guest code runs ([`disarm`]);
//! - those that must be there ([`super::entry`], trampolines) are followed by a check that whoever jumps there by himself does
//!   not pass;
//! - system calls are made in one place, behind which key 0 is read; a return from a signal takes a secret ([`guard`]).

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::arena::Arena;
use super::entry::{pkru_writers, syscall_end};
use super::init::{Refused, check};
use super::rc::arena;

/// The key of the guest's user pages.
pub const USER_KEY: u32 = 1;
/// PKRU of guest ring 3: neither reads nor writes of key 0.
pub const USER_PKRU: u32 = 3;
/// PKRU of guest ring 0.
pub const KERNEL_PKRU: u32 = 0;
/// AD and WD of key 0 in PKRU.
const KEY_0: u32 = 3;
/// Page-fault error code: a protection key forbids the access (SDM Vol. 3A, 4.7).
pub(crate) const PF_KEY: u32 = 0x20;

/// Where XSTATE_BV is in an XSAVE area (SDM Vol. 1, 13.4.2).
const XSTATE_BV: usize = 512;
/// PKRU's number among the state components.
const XFEATURE_PKRU: u32 = 9;

/// Whether these bytes are `wrpkru` (0f 01 ef), or begin an `xrstor` of memory (0f ae /5). (csam, which this crate does not know,
/// has the same for guest code.)
const fn loads_pkru(bytes: [u8; 3]) -> bool {
    match bytes {
        [0x0f, 0x01, 0xef] => true,
        [0x0f, 0xae, modrm] => modrm >> 3 & 7 == 5 && modrm < 0xc0,
        _ => false,
    }
}

/// The CPU has protection keys and the kernel uses them.
pub(crate) fn cpu_has_them() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const OSPKE: u32 = 1 << 4;
    __cpuid(0).eax >= 0xd && __cpuid_count(7, 0).ecx & OSPKE != 0
}

/// Why worlds here cannot be keyed, if they cannot.
#[must_use]
pub fn refusal() -> Option<String> {
    match crate::capabilities::protection_keys() {
        crate::capabilities::Probe::Works(_) => None,
        crate::capabilities::Probe::Fails(why) => Some(format!("no memory protection keys: {why}")),
    }
}

/// Takes the key, and notes where signal frames have PKRU. CPUID must not fault yet.
pub(super) fn set_up() -> Result<(), Refused> {
    check(cpu_has_them())?;
    // SAFETY: touches no memory.
    let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) };
    check(key == i64::from(USER_KEY))?;
    let at = std::arch::x86_64::__cpuid_count(0xd, XFEATURE_PKRU).ebx;
    let mut secret = [0u8; 8];
    // SAFETY: the kernel writes 8 bytes.
    check(unsafe { libc::getrandom(secret.as_mut_ptr().cast(), secret.len(), 0) } == 8)?;
    // SAFETY: the arena is mapped; its words are atomics.
    unsafe {
        (*arena()).pkru_at.store(at, Release);
        (*arena()).secret.store(u64::from_le_bytes(secret), Release);
    }
    disarm()
}

/// Overwrites in the code of this process whatever loads PKRU, but for what is ours.
fn disarm() -> Result<(), Refused> {
    unsafe extern "C" fn one(info: *mut libc::dl_phdr_info, _: usize, fine: *mut libc::c_void) -> i32 {
        // SAFETY: dl_iterate_phdr passes a valid record with its table of headers.
        let (base, headers) = unsafe {
            (
                (*info).dlpi_addr,
                std::slice::from_raw_parts((*info).dlpi_phdr, usize::from((*info).dlpi_phnum)),
            )
        };
        for h in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_X != 0) {
            let start = (base + h.p_vaddr) & !0xfff;
            let end = (base + h.p_vaddr + h.p_memsz).next_multiple_of(4096);
            if !disarm_range(start, end) {
                // SAFETY: what `disarm` passed.
                unsafe { *fine.cast::<bool>() = false };
            }
        }
        0
    }
    let mut fine = true;
    // SAFETY: the callback has the type asked for; `fine` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(one), (&raw mut fine).cast()) };
    check(fine)
}

/// Where `code` has something that loads PKRU. It is megabytes for each world: most chunks have no such opcode, which the compiler
/// finds out with vector instructions.
fn loaders(code: &[u8]) -> Vec<usize> {
    const CHUNK: usize = 64;
    let mut found = Vec::new();
    for (number, chunk) in code.chunks(CHUNK).enumerate() {
        let at = number * CHUNK;
        let next = code.get(at + 1..).unwrap_or_default();
        let opcodes = chunk
            .iter()
            .zip(next)
            .fold(0, |any, (&a, &b)| any | u8::from(a == 0x0f) & (u8::from(b == 0x01) | u8::from(b == 0xae)));
        if opcodes != 0 {
            let loads = |i: &usize| matches!(code.get(*i..*i + 3), Some(&[a, b, c]) if loads_pkru([a, b, c]));
            found.extend((at..at + chunk.len()).filter(loads));
        }
    }
    found
}

fn disarm_range(start: u64, end: u64) -> bool {
    let at = |address: u64| std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
    // SAFETY: mapped code of this process, which only this (its only) thread changes.
    let code = unsafe { std::slice::from_raw_parts(at(start), (end - start) as usize) };
    let ours = pkru_writers();
    let found: Vec<u64> = loaders(code)
        .into_iter()
        .map(|i| start + i as u64)
        .filter(|address| !ours.contains(address))
        .collect();
    found.into_iter().all(|address| {
        let page = address & !0xfff;
        let set = |rights: i32| {
            // SAFETY: a page of code that is not executed meanwhile: this function is not in it, or the instruction would be ours.
            unsafe { libc::mprotect(at(page).cast(), 4096, rights) == 0 }
        };
        let (read, write, execute) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        if !set(read | write | execute) {
            return false;
        }
        // SAFETY: just made writable; private to this process.
        unsafe { at(address).write_volatile(0xf4) };
        set(read | execute)
    })
}

/// The PKRU of what a signal interrupted.
///
/// # Safety
/// `fp` points to the frame's XSAVE area; `a` is the mapped arena of a keyed world.
pub(super) unsafe fn of_frame(fp: *const u8, a: *const Arena) -> u32 {
    // SAFETY: by contract; Linux lays the area out as CPUID says, with all components that are in use.
    unsafe {
        let present = fp.add(XSTATE_BV).cast::<u64>().read_unaligned();
        if present >> XFEATURE_PKRU & 1 == 0 {
            return 0;
        }
        fp.add((*a).pkru_at.load(Relaxed) as usize).cast::<u32>().read_unaligned()
    }
}

/// Whether code with this PKRU is, or has been started by, guest ring 3.
pub(super) fn is_ring3(pkru: u32) -> bool {
    pkru & KEY_0 != 0
}

/// A `struct sock_filter` as a word.
fn bpf(code: u32, jt: u8, jf: u8, k: u32) -> u64 {
    u64::from(code) | u64::from(jt) << 16 | u64::from(jf) << 24 | u64::from(k) << 32
}

/// Instructions in front of a filter: a system call comes from [`super::rc::syscall`], or it is the return from a signal and
/// has this world's secret for its first argument. What they let pass falls through.
pub(super) fn guard() -> [u64; GUARD_LEN] {
    let (load, equal, kill) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    // struct seccomp_data: nr, arch, instruction_pointer, args.
    const NR: u32 = 0;
    const IP: u32 = 8;
    const FIRST: u32 = 16;
    let here = syscall_end();
    // SAFETY: the arena is mapped; its words are atomics.
    let secret = unsafe { (*arena()).secret.load(Acquire) };
    let (low, high) = (|x: u64| x as u32, |x: u64| (x >> 32) as u32);
    [
        bpf(load, 0, 0, NR),
        bpf(equal, 4, 0, libc::SYS_rt_sigreturn as u32),
        bpf(load, 0, 0, IP),
        bpf(equal, 0, 6, low(here)),
        bpf(load, 0, 0, IP + 4),
        bpf(equal, 5, 4, high(here)),
        bpf(load, 0, 0, FIRST),
        bpf(equal, 0, 2, low(secret)),
        bpf(load, 0, 0, FIRST + 4),
        bpf(equal, 1, 0, high(secret)),
        bpf(kill, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ]
}

/// How many.
pub(super) const GUARD_LEN: usize = 11;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_loads_pkru_is_found_at_every_offset() {
        for at in 0..200 {
            for bytes in [[0x0f, 0x01, 0xef], [0x0f, 0xae, 0x2d]] {
                let mut code = vec![0x90; at];
                code.extend(bytes);
                assert_eq!(loaders(&code), [at]);
                code.extend([0x0f, 0x01]);
                assert_eq!(loaders(&code), [at]);
                assert_eq!(loaders(&code[..at + 2]), []);
            }
        }
    }

    #[test]
    fn code_that_loads_pkru_is_overwritten_wherever_it_lies() {
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), 8192, 7, kind, -1, 0) };
        assert_ne!(memory, libc::MAP_FAILED);
        let put = |at: usize, bytes: &[u8]| {
            // SAFETY: inside the mapping, which nobody else has.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.cast::<u8>().add(at), bytes.len())
            };
        };
        let (wrpkru, xrstor) = ([0x0f, 0x01, 0xef], [0x48, 0x0f, 0xae, 0x6c, 0x24, 0x40]);
        for at in [1, 4094, 8189] {
            put(at, &wrpkru);
        }
        put(100, &xrstor);
        put(200, &[0x0f, 0xae, 0xe8]); // lfence
        let start = memory.expose_provenance() as u64;
        assert!(disarm_range(start, start + 8192));
        // SAFETY: as above; disarm_range leaves it readable.
        let code = unsafe { std::slice::from_raw_parts(memory.cast::<u8>(), 8192) };
        assert!(!code.windows(3).any(|w| loads_pkru([w[0], w[1], w[2]])));
        assert_eq!(code.iter().filter(|b| **b == 0xf4).count(), 4);
        assert_eq!(code[200..203], [0x0f, 0xae, 0xe8]);
        // SAFETY: the mapping made above; `code` is not used any more.
        unsafe { libc::munmap(memory, 8192) };
    }
}
