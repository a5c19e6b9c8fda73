//! CPUID in the thread that takes turns with worlds.
//!
//! In worlds CPUID faults, where the CPU can do that. Linux switches it on and off by writing a model-specific register each time
//! it goes from a thread with faulting to one without (`__switch_to_xtra`, arch/x86/kernel/process.c), and in a virtual
//! machine that write is an exit to the hypervisor: a hand-over by futex takes 3.5 us with it and 1.4 us without. So CPUID faults
//! in this thread, too, for as long as [`CpuidFaults`] lives, and what executes it here all the same (a library that looks
//! what the CPU can do) gets its answer from a signal handler.

use std::io;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::init::ARCH_CPUID_SET;

/// `0f a2`.
const CPUID: [u8; 2] = [0x0f, 0xa2];
/// `si_code` of a signal by an exception that has no code of its own, #GP among them (asm-generic/siginfo.h).
const SI_KERNEL: i32 = 0x80;

/// What SIGSEGV did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// CPUID faults in the thread that made this, and is answered by a handler of SIGSEGV. Dropping it ends that.
#[derive(Debug)]
pub struct CpuidFaults(PhantomData<*const ()>);

impl CpuidFaults {
    /// Begins it in the calling thread; threads it starts from here on inherit it. None: the CPU cannot do that, and worlds
    /// have no faulting either.
    pub fn begin() -> io::Result<Option<CpuidFaults>> {
        install()?;
        Ok(set(false).then_some(CpuidFaults(PhantomData)))
    }
}

impl Drop for CpuidFaults {
    fn drop(&mut self) {
        set(true);
    }
}

/// Whether CPUID is to be executed in this thread, or faults.
fn set(executes: bool) -> bool {
    // SAFETY: touches no memory; what CPUID does when it faults is the handler's answer.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_CPUID_SET, u64::from(executes)) == 0 }
}

/// Puts the handler in place, once in a process.
fn install() -> io::Result<()> {
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: all zeros is a valid `sigaction`; the handler is a valid handler of three arguments and keeps to what is
    // async-signal-safe. It runs on the alternative stack if the thread has one, as the one before does.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut before) != 0 {
            return Err(io::Error::last_os_error());
        }
        BEFORE.get_or_init(|| before);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction =
            answer as unsafe extern "C" fn(i32, *const libc::siginfo_t, *mut libc::ucontext_t) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        if libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Executes the CPUID that faulted and goes on behind it; anything else is left to what SIGSEGV did before.
///
/// # Safety
/// Only as a handler of SIGSEGV, with what the kernel passes.
unsafe extern "C" fn answer(signal: i32, info: *const libc::siginfo_t, uc: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes valid pointers into its frame.
    let (gregs, code) = unsafe { (&mut (*uc).uc_mcontext.gregs, (*info).si_code) };
    let rip: *const u8 = std::ptr::with_exposed_provenance(gregs[libc::REG_RIP as usize] as usize);
    // SAFETY: an instruction of this program was fetched from there and raised #GP; the second byte is read only when the
    // first one says that there is one.
    let is_cpuid = code == SI_KERNEL
        && unsafe { rip.read_volatile() == CPUID[0] && rip.add(1).read_volatile() == CPUID[1] };
    if is_cpuid && set(true) {
        let [leaf, subleaf] = [libc::REG_RAX, libc::REG_RCX].map(|r| gregs[r as usize] as u32);
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        set(false);
        let registers = [libc::REG_RAX, libc::REG_RBX, libc::REG_RCX, libc::REG_RDX];
        for (register, value) in registers.into_iter().zip([r.eax, r.ebx, r.ecx, r.edx]) {
            gregs[register as usize] = i64::from(value);
        }
        gregs[libc::REG_RIP as usize] += CPUID.len() as i64;
        return;
    }
    // An exception comes again, and a signal somebody sent is sent again.
    // SAFETY: `before` is what `sigaction` gave; `raise` is async-signal-safe.
    unsafe {
        if let Some(before) = BEFORE.get() {
            libc::sigaction(signal, std::ptr::from_ref(before), std::ptr::null_mut());
        }
        if code <= 0 {
            libc::raise(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::arch::x86_64::__cpuid_count;

    #[test]
    fn cpuid_says_the_same_while_it_faults_and_afterwards() {
        const ARCH_CPUID_GET: u64 = 0x1011;
        // SAFETY: touches no memory.
        let executes = || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_CPUID_GET, 0u64) };
        let ask = || [(0, 0), (1, 0), (7, 0), (0x8000_0000, 0)].map(|(leaf, sub)| __cpuid_count(leaf, sub));
        let masked = |answers: [std::arch::x86_64::CpuidResult; 4]| {
            // Leaf 1, EBX: the local APIC's number, another one on another CPU.
            answers.map(|r| (r.eax, r.ebx & 0x00ff_ffff, r.ecx, r.edx))
        };
        let before = masked(ask());
        let Some(faults) = CpuidFaults::begin().unwrap() else {
            println!("SKIP: CPUID cannot fault here");
            return;
        };
        assert_eq!(executes(), 0);
        assert_eq!(masked(ask()), before);
        assert_eq!(executes(), 0, "it goes on faulting");
        drop(faults);
        assert_eq!(executes(), 1);
        assert_eq!(masked(ask()), before);
    }
}
