//! Runs single 16- and 32-bit instructions on the real CPU, in a child process: the oracle of differential tests.
//!
//! Each case has a code page full of `hlt` with the instruction where EIP points, and a data page behind it; nothing else
//! is mapped below 4 GiB around them. Whatever the instruction does ends in an exception: its own, or the #GP of the
//! `hlt` it arrives at. The signal handler copies the state out. Test support: nothing else uses it.

use crate::raw::signal::GENERAL;
use std::arch::naked_asm;
use std::io;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Linear address of the code page.
pub const CODE: u32 = 0x1000_0000;
/// Linear address of the data page, right behind the code page.
pub const DATA: u32 = CODE + PAGE as u32;
/// Bytes of each.
pub const PAGE: usize = 4096;
/// Cases in one batch.
pub const BATCH: usize = 128;

/// LDT selectors of 16-bit segments: code over the code page (limit 4095), and data over both pages (limit 8191).
pub const CODE16: u16 = 0x07;
/// See [`CODE16`].
pub const DATA16: u16 = 0x0f;
/// The host's flat 32-bit code selector.
pub const CODE32: u16 = 0x23;
/// The host's flat data selector.
pub const DATA32: u16 = 0x2b;

/// State before or after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct State {
    /// x87/MMX/SSE in FXSAVE64 format.
    pub fx: [u8; 512],
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    pub gpr: [u32; 8],
    /// Offset into CS.
    pub eip: u32,
    /// Flags.
    pub eflags: u32,
    /// CS: [`CODE32`] or [`CODE16`].
    pub cs: u32,
    /// DS, ES and SS: [`DATA32`] or [`DATA16`].
    pub ds: u32,
    /// After: the exception that ended the case.
    pub vector: u32,
    /// After: its error code.
    pub error_code: u32,
    /// After: CR2 for vector 14.
    pub cr2: u32,
}

impl Default for State {
    fn default() -> State {
        let mut fx = [0u8; 512];
        fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        State {
            fx,
            gpr: [0; 8],
            eip: 0,
            eflags: 0x202,
            cs: u32::from(CODE32),
            ds: u32::from(DATA32),
            vector: 0,
            error_code: 0,
            cr2: 0,
        }
    }
}

/// One instruction to run, and what came of it.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Case {
    /// Registers: before, and overwritten with those after.
    pub state: State,
    /// The data page: before, and overwritten.
    pub data: [u8; PAGE],
    /// Bytes of the instruction, put into the code page where EIP points.
    pub code: [u8; 16],
}

impl Default for Case {
    fn default() -> Case {
        Case { state: State::default(), data: [0; PAGE], code: [0xf4; 16] }
    }
}

#[repr(C)]
struct Shared {
    /// The case being run; one more than the last when all are done.
    at: AtomicU32,
    cases: [Case; BATCH],
}

/// The pages and the batch buffer; one at a time in a process.
pub struct Native32 {
    shared: *mut Shared,
}

static CURRENT: AtomicPtr<State> = AtomicPtr::new(std::ptr::null_mut());
static CREATED: std::sync::Mutex<bool> = std::sync::Mutex::new(false);

fn check(what: &'static str, r: libc::c_long) -> io::Result<libc::c_long> {
    if r == -1 { Err(io::Error::other(format!("{what}: {}", io::Error::last_os_error()))) } else { Ok(r) }
}

impl Native32 {
    /// Maps the pages.
    ///
    /// # Errors
    /// When the host refuses, or another `Native32` exists.
    pub fn new() -> io::Result<Native32> {
        let mut created = CREATED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *created {
            return Err(io::Error::other("only one Native32 at a time"));
        }
        // SAFETY: NOREPLACE: the mapping replaces nothing.
        let pages = unsafe {
            libc::mmap(
                CODE as usize as *mut libc::c_void,
                2 * PAGE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if pages == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A jump into the data page must not execute random bytes.
        // SAFETY: the second page of our own fresh mapping, which nothing uses yet.
        let no_exec = unsafe {
            libc::mprotect(DATA as usize as *mut libc::c_void, PAGE, libc::PROT_READ | libc::PROT_WRITE)
        };
        check("mprotect", no_exec.into())?;
        // SAFETY: a fresh mapping where the kernel likes; zero bytes are a valid `Shared`.
        let shared = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if shared == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        *created = true;
        Ok(Native32 { shared: shared.cast() })
    }

    /// Runs up to [`BATCH`] cases in a child process and stores what came of each in it.
    ///
    /// # Errors
    /// When the child cannot be made, or died in a case, which the message names.
    pub fn run(&mut self, cases: &mut [Case]) -> io::Result<()> {
        assert!(cases.len() <= BATCH);
        // SAFETY: `shared` is our own live mapping and no child runs now, so access is exclusive.
        let shared = unsafe { &mut *self.shared };
        *shared.at.get_mut() = 0;
        for (slot, case) in shared.cases.iter_mut().zip(cases.iter()) {
            *slot = *case;
        }
        // SAFETY: the child calls only async-signal-safe functions and ends with `_exit`.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            child(shared, cases.len());
        }
        check("fork", pid.into())?;
        let mut status = 0;
        loop {
            // SAFETY: `pid` is our own child and `status` is ours.
            let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
            // A fuzzer has signals of its own.
            if waited != -1 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                check("waitpid", waited.into())?;
                break;
            }
        }
        if status != 0 {
            let at = shared.at.load(Ordering::Relaxed) as usize;
            let code = cases.get(at).map(|c| c.code);
            return Err(io::Error::other(format!(
                "the child ended with status {status:#x} in case {at}: {code:02x?}"
            )));
        }
        for (slot, case) in shared.cases.iter().zip(cases.iter_mut()) {
            *case = *slot;
        }
        Ok(())
    }
}

impl Drop for Native32 {
    fn drop(&mut self) {
        // SAFETY: both mappings are our own, of these lengths, and no child runs.
        unsafe {
            libc::munmap(CODE as usize as *mut libc::c_void, 2 * PAGE);
            libc::munmap(self.shared.cast(), size_of::<Shared>());
        }
        *CREATED.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = false;
    }
}

#[repr(C)]
struct UserDesc {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

fn set_ldt(entry: u32, base: u32, limit: u32, code: bool) -> bool {
    // seg_32bit 0, contents 2 (code) or 0 (data), readable/writable, byte granular, present, useable.
    let flags = u32::from(code) << 2 | 1 << 6;
    let desc = UserDesc { entry, base, limit, flags };
    // SAFETY: modify_ldt reads one `user_desc` of this size.
    unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &raw const desc, size_of::<UserDesc>()) == 0 }
}

fn child(shared: &mut Shared, count: usize) -> ! {
    // SAFETY: the child is single-threaded, owns its copy of everything, and calls only system calls and `enter`, whose
    // contract (handlers installed on an alternate stack, pages mapped) is set up here.
    unsafe {
        libc::alarm(20);
        if !set_ldt(0, CODE, PAGE as u32 - 1, true) || !set_ldt(1, CODE, 2 * PAGE as u32 - 1, false) {
            libc::_exit(3);
        }
        let stack = libc::mmap(
            std::ptr::null_mut(),
            256 * 1024,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if stack == libc::MAP_FAILED {
            libc::_exit(4);
        }
        let alt = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: 256 * 1024 };
        libc::sigaltstack(&raw const alt, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGBUS] {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
        let code = std::slice::from_raw_parts_mut(CODE as usize as *mut u8, PAGE);
        let data = std::slice::from_raw_parts_mut(DATA as usize as *mut u8, PAGE);
        for n in 0..count {
            shared.at.store(n as u32, Ordering::Relaxed);
            let case = &mut shared.cases[n];
            code.fill(0xf4);
            let at = (case.state.eip as usize & (PAGE - 1)).min(PAGE - 16);
            code[at..at + 16].copy_from_slice(&case.code);
            data.copy_from_slice(&case.data);
            CURRENT.store(&raw mut case.state, Ordering::Relaxed);
            enter(&raw const case.state);
            case.data.copy_from_slice(data);
        }
        shared.at.store(count as u32, Ordering::Relaxed);
        libc::_exit(0);
    }
}

/// Where `enter` left off, for the handler to go back to.
static RESUME: [AtomicPtr<u8>; 2] =
    [AtomicPtr::new(std::ptr::null_mut()), AtomicPtr::new(std::ptr::null_mut())];

extern "C" fn on_signal(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a live ucontext of this thread; CURRENT points at the case being run; RESUME was set by
    // `enter`, whose frame is intact because compatibility-mode code cannot reach it.
    unsafe {
        let uc = &mut *context.cast::<libc::ucontext_t>();
        let g = &mut uc.uc_mcontext.gregs;
        let csgsfs = g[libc::REG_CSGSFS as usize] as u64;
        if csgsfs as u16 == 0x33 {
            // In our own code: a bug of the harness.
            libc::_exit(5);
        }
        let state = &mut *CURRENT.load(Ordering::Relaxed);
        for (r, n) in state.gpr.iter_mut().zip(GENERAL) {
            *r = g[n as usize] as u32;
        }
        state.eip = g[libc::REG_RIP as usize] as u32;
        state.eflags = g[libc::REG_EFL as usize] as u32;
        state.cs = u32::from(csgsfs as u16);
        state.vector = g[libc::REG_TRAPNO as usize] as u32;
        state.error_code = g[libc::REG_ERR as usize] as u32;
        state.cr2 = g[libc::REG_CR2 as usize] as u32;
        std::ptr::copy_nonoverlapping(uc.uc_mcontext.fpregs.cast::<u8>(), state.fx.as_mut_ptr(), 512);
        g[libc::REG_RIP as usize] = RESUME[0].load(Ordering::Relaxed) as i64;
        g[libc::REG_RSP as usize] = RESUME[1].load(Ordering::Relaxed) as i64;
        g[libc::REG_EFL as usize] = 0x202;
        // CS = 0x33, SS = 0x2b.
        g[libc::REG_CSGSFS as usize] = (csgsfs & 0x0000_ffff_ffff_0000 | 0x002b_0000_0000_0033) as i64;
    }
}

/// Loads a state and goes to compatibility mode; comes back through `on_signal`.
///
/// # Safety
/// Signal handlers must be installed on an alternate stack and the selectors of the state must exist.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter(state: *const State) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "stmxcsr [rsp]",
        "fnstcw [rsp + 4]",
        "mov r15, rdi",
        // NT survives a signal return and would make `iretq` fault.
        "push 2",
        "popfq",
        "lea rax, [rip + 2f]",
        "mov [rip + {resume}], rax",
        "mov [rip + {resume} + 8], rsp",
        "fxrstor64 [r15]",
        "mov eax, [r15 + {ds}]",
        "mov ds, eax",
        "mov es, eax",
        "push rax",
        "mov eax, [r15 + {gpr} + 16]",
        "push rax",
        "mov eax, [r15 + {eflags}]",
        "push rax",
        "mov eax, [r15 + {cs}]",
        "push rax",
        "mov eax, [r15 + {eip}]",
        "push rax",
        "mov eax, [r15 + {gpr}]",
        "mov ecx, [r15 + {gpr} + 4]",
        "mov edx, [r15 + {gpr} + 8]",
        "mov ebx, [r15 + {gpr} + 12]",
        "mov ebp, [r15 + {gpr} + 20]",
        "mov esi, [r15 + {gpr} + 24]",
        "mov edi, [r15 + {gpr} + 28]",
        "iretq",
        "2:",
        "fninit",
        "fldcw [rsp + 4]",
        "ldmxcsr [rsp]",
        "cld",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        resume = sym RESUME,
        gpr = const std::mem::offset_of!(State, gpr),
        eflags = const std::mem::offset_of!(State, eflags),
        eip = const std::mem::offset_of!(State, eip),
        cs = const std::mem::offset_of!(State, cs),
        ds = const std::mem::offset_of!(State, ds),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_runs_and_ends_at_the_hlt_behind_it() {
        let mut native = match Native32::new() {
            Ok(native) => native,
            Err(e) => {
                println!("SKIP: {e}");
                return;
            }
        };
        let mut add = Case::default();
        add.state.eip = CODE;
        add.code[..2].copy_from_slice(&[0x01, 0x08]); // add [eax], ecx
        add.state.gpr[0] = DATA + 8;
        add.state.gpr[1] = 5;
        add.data[8] = 2;
        let mut fault = add;
        fault.state.gpr[0] = DATA + 4096;
        let mut push16 = Case::default();
        push16.state.cs = CODE16.into();
        push16.state.ds = DATA16.into();
        push16.state.gpr[0] = 0x1234;
        push16.state.gpr[4] = 0x1800;
        push16.code[0] = 0x50;
        let mut cases = [add, fault, push16];
        if let Err(e) = native.run(&mut cases) {
            println!("SKIP: {e}");
            return;
        }
        let [add, fault, push16] = cases;
        assert_eq!((add.data[8], add.state.eip, add.state.vector), (7, CODE + 2, 13));
        assert_eq!((fault.state.eip, fault.state.vector, fault.state.error_code), (CODE, 14, 6));
        assert_eq!(fault.state.cr2, DATA + 4096);
        assert_eq!((push16.state.eip, push16.data[0x7fe], push16.data[0x7ff]), (1, 0x34, 0x12));
    }
}
