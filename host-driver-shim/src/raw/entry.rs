//! The assembly by which a world enters guest code and leaves it.
//!
//! 1. `subring_rc_resume`: the one way in. Loads everything from the arena and ends in `iretq`. It only reads the arena, so a
//!    signal inside it can always start it again; a fault inside it means that the state cannot be loaded.
//! 2. `subring_rc_gate`: the way out by the gate stub (see `ArenaMap::set_stub`), all guest registers still live but EAX.
//!    `subring_rc_call`: the same from a confined world, without a stub, with all of them live and the guest's EIP in R8D.
//! 3. `subring_rc_signal_entry`: the way out by a signal.
//! 4. `subring_rc_return`: back to guest code behind a fault that was answered here, from its signal frame. It only reads
//!    that frame and the arena, so a signal inside it can always start it again.
//! 5. `subring_rc_leave`: back to `rc::serve` on a fresh stack.
//! 6. `subring_rc_keyed`: the end of 1 and 4 in a keyed world ([`super::keys`]): loads PKRU, too. A signal inside it finds the
//!    guest's state in what it goes by ([`interrupted_way`]).

use std::mem::offset_of;
use std::sync::atomic::Ordering::Relaxed;

use super::arena::{
    ARENA_VA, Arena, SHIM_SAVE, STACK_TOP, TRANSIT_OFFSET, TRANSIT_WAY, VCPU_OFFSET, exit_kind,
};
use super::keys::{KERNEL_PKRU, USER_PKRU};
use crate::world::HwRegs;

const REGS: usize = offset_of!(Arena, regs);
const GPR: usize = REGS + offset_of!(HwRegs, gpr);
const SEL: usize = REGS + offset_of!(HwRegs, sel);
const MCONTEXT: usize = offset_of!(libc::ucontext_t, uc_mcontext);

/// Where a general register is in a `ucontext_t`.
const fn greg(index: i32) -> usize {
    MCONTEXT + offset_of!(libc::mcontext_t, gregs) + 8 * index as usize
}

std::arch::global_asm!(
    ".text",
    ".balign 64",
    ".hidden subring_rc_resume",
    ".globl subring_rc_resume",
    "subring_rc_resume:",
    "mov rdi, {arena}",
    "mov rsp, {stack}",
    "cmp dword ptr [rdi + {kick}], 0",
    "jne 2f",
    "fxrstor64 [rdi + {fx}]",
    "movzx eax, word ptr [rdi + {es}]",
    "mov es, eax",
    "movzx eax, word ptr [rdi + {ds}]",
    "mov ds, eax",
    "movzx eax, word ptr [rdi + {fs}]",
    "mov fs, eax",
    "movzx eax, word ptr [rdi + {gs}]",
    "mov gs, eax",
    "movzx eax, word ptr [rdi + {ss}]",
    "push rax",
    "mov eax, [rdi + {esp}]",
    "push rax",
    "mov eax, [rdi + {eflags}]",
    "push rax",
    "movzx eax, word ptr [rdi + {cs}]",
    "push rax",
    "mov eax, [rdi + {eip}]",
    "push rax",
    "cmp dword ptr [rdi + {keyed}], 0",
    "jne 4f",
    "mov eax, [rdi + {eax}]",
    "mov ecx, [rdi + {ecx}]",
    "mov edx, [rdi + {edx}]",
    "mov ebx, [rdi + {ebx}]",
    "mov ebp, [rdi + {ebp}]",
    "mov esi, [rdi + {esi}]",
    "mov edi, [rdi + {edi}]",
    "iretq",
    "4:",
    "mov r8, rdi",
    "lea rsi, [r8 + {kernel_way}]",
    "lea r9, [r8 + {transit_way}]",
    "test dword ptr [r8 + {pkru}], {user_pkru}",
    "cmovnz rsi, r9",
    "pop qword ptr [rsi]",
    "pop qword ptr [rsi + 8]",
    "pop qword ptr [rsi + 16]",
    "pop qword ptr [rsi + 24]",
    "pop qword ptr [rsi + 32]",
    "mov eax, [rdi + {eax}]",
    "mov [rsi + 40], eax",
    "mov eax, [rdi + {ecx}]",
    "mov [rsi + 44], eax",
    "mov eax, [rdi + {edx}]",
    "mov [rsi + 48], eax",
    "mov eax, [rdi + {edi}]",
    "mov [rsi + 52], eax",
    "mov ebx, [rdi + {ebx}]",
    "mov ebp, [rdi + {ebp}]",
    "mov esi, [rdi + {esi}]",
    "jmp subring_rc_keyed",
    ".hidden subring_rc_resume_end",
    ".globl subring_rc_resume_end",
    "subring_rc_resume_end:",
    "2:",
    "mov dword ptr [rdi + {kind}], {kind_kick}",
    "jmp subring_rc_leave",
    "",
    ".hidden subring_rc_keyed",
    ".globl subring_rc_keyed",
    "subring_rc_keyed:", // r8: the arena; what has no place in registers yet is in one of the two ways
    "xor ecx, ecx",
    "xor edx, edx",
    "test dword ptr [r8 + {pkru}], {user_pkru}",
    "jnz 5f",
    "lea rsp, [r8 + {kernel_way}]",
    "mov dword ptr [r8 + {token}], 1",
    "mov eax, {kernel_pkru}",
    ".hidden subring_rc_to_kernel",
    ".globl subring_rc_to_kernel",
    "subring_rc_to_kernel:",
    "wrpkru",
    "mov r8, {arena}", // who jumps here by himself has not set the token
    "cmp dword ptr [r8 + {token}], 1",
    "jne subring_rc_forged",
    "mov dword ptr [r8 + {token}], 0",
    ".hidden subring_rc_kernel_way",
    ".globl subring_rc_kernel_way",
    "subring_rc_kernel_way:",
    "mov eax, [rsp + 40]",
    "mov ecx, [rsp + 44]",
    "mov edx, [rsp + 48]",
    "mov edi, [rsp + 52]",
    "iretq",
    "5:",
    "mov dword ptr [r8 + {token}], 0",
    "mov rsp, [r8 + {transit_at}]",
    "add rsp, {way}",
    "mov eax, {user_pkru}",
    ".hidden subring_rc_to_user",
    ".globl subring_rc_to_user",
    "subring_rc_to_user:",
    "wrpkru",
    "cmp eax, {user_pkru}",
    "jne subring_rc_forged",
    ".hidden subring_rc_user_way",
    ".globl subring_rc_user_way",
    "subring_rc_user_way:",
    "mov eax, [rsp + 40]",
    "mov ecx, [rsp + 44]",
    "mov edx, [rsp + 48]",
    "mov edi, [rsp + 52]",
    "iretq",
    ".hidden subring_rc_keyed_end",
    ".globl subring_rc_keyed_end",
    "subring_rc_keyed_end:",
    ".hidden subring_rc_forged",
    ".globl subring_rc_forged",
    "subring_rc_forged:",
    "hlt",
    "",
    ".hidden subring_rc_bad_state",
    ".globl subring_rc_bad_state",
    "subring_rc_bad_state:",
    "mov rdi, {arena}",
    "mov dword ptr [rdi + {kind}], {kind_bad}",
    "jmp subring_rc_leave",
    "",
    ".hidden subring_rc_call",
    ".globl subring_rc_call",
    "subring_rc_call:",
    "mov r9, {arena}",
    "mov [r9 + {save_eax}], eax",
    "mov [r9 + {called}], r8d",
    "",
    ".hidden subring_rc_gate",
    ".globl subring_rc_gate",
    "subring_rc_gate:",
    "mov rax, {arena}",
    "mov [rax + {ecx}], ecx",
    "mov dword ptr [rax + {pkru}], {kernel_pkru}",
    "mov [rax + {edx}], edx",
    "mov [rax + {ebx}], ebx",
    "mov [rax + {esp}], esp",
    "mov [rax + {ebp}], ebp",
    "mov [rax + {esi}], esi",
    "mov [rax + {edi}], edi",
    "mov ecx, ss",
    "mov [rax + {ss}], cx",
    "mov ecx, 0x2b",
    "mov ss, ecx",
    "mov rsp, {stack}",
    "pushfq",
    "pop rcx",
    "or ecx, [rax + {stepped}]",
    "mov dword ptr [rax + {stepped}], 0",
    "mov [rax + {eflags}], ecx",
    "push 2", // no DF, AC (alignment checks in our own code), NT (iretq would raise #GP)
    "popfq",
    "mov ecx, [rax + {save_eax}]",
    "mov [rax + {eax}], ecx",
    "mov ecx, es",
    "mov [rax + {es}], cx",
    "mov ecx, ds",
    "mov [rax + {ds}], cx",
    "mov ecx, fs",
    "mov [rax + {fs}], cx",
    "mov ecx, gs",
    "mov [rax + {gs}], cx",
    "fxsave64 [rax + {fx}]",
    "mov ecx, [rax + {called}]",
    "mov [rax + {eip}], ecx",
    "mov dword ptr [rax + {kind}], {kind_gate}",
    "",
    ".hidden subring_rc_leave",
    ".globl subring_rc_leave",
    "subring_rc_leave:",
    "mov rsp, {stack}",
    "xor ebp, ebp",
    "call {serve}",
    "ud2",
    "",
    ".hidden subring_rc_return",
    ".globl subring_rc_return",
    "subring_rc_return:", // DS, ES, FS and GS are the guest's still: signals change CS and SS only
    "mov rax, {arena}",
    "mov rdi, [rax + {returning}]",
    "lea rsp, [rdi - 64]",
    "and rsp, -16",
    "cmp dword ptr [rax + {kick}], 0",
    "jne 3f",
    "mov rax, [rdi + {u_fp}]",
    "fxrstor64 [rax]",
    "movzx eax, word ptr [rdi + {u_ss}]",
    "push rax",
    "mov eax, [rdi + {u_esp}]",
    "push rax",
    "mov eax, [rdi + {u_eflags}]",
    "push rax",
    "movzx eax, word ptr [rdi + {u_cs}]",
    "push rax",
    "mov eax, [rdi + {u_eip}]",
    "push rax",
    "mov rax, {arena}",
    "cmp dword ptr [rax + {keyed}], 0",
    "jne 6f",
    "mov eax, [rdi + {u_eax}]",
    "mov ecx, [rdi + {u_ecx}]",
    "mov edx, [rdi + {u_edx}]",
    "mov ebx, [rdi + {u_ebx}]",
    "mov ebp, [rdi + {u_ebp}]",
    "mov esi, [rdi + {u_esi}]",
    "mov edi, [rdi + {u_edi}]",
    "iretq",
    "6:",
    "mov r8, rax",
    "lea rsi, [r8 + {kernel_way}]",
    "lea r9, [r8 + {transit_way}]",
    "test dword ptr [r8 + {pkru}], {user_pkru}",
    "cmovnz rsi, r9",
    "pop qword ptr [rsi]",
    "pop qword ptr [rsi + 8]",
    "pop qword ptr [rsi + 16]",
    "pop qword ptr [rsi + 24]",
    "pop qword ptr [rsi + 32]",
    "mov eax, [rdi + {u_eax}]",
    "mov [rsi + 40], eax",
    "mov eax, [rdi + {u_ecx}]",
    "mov [rsi + 44], eax",
    "mov eax, [rdi + {u_edx}]",
    "mov [rsi + 48], eax",
    "mov eax, [rdi + {u_edi}]",
    "mov [rsi + 52], eax",
    "mov ebx, [rdi + {u_ebx}]",
    "mov ebp, [rdi + {u_ebp}]",
    "mov esi, [rdi + {u_esi}]",
    "jmp subring_rc_keyed",
    ".hidden subring_rc_return_end",
    ".globl subring_rc_return_end",
    "subring_rc_return_end:",
    "3:",
    "call {kicked}",
    "ud2",
    "",
    ".hidden subring_rc_syscall",
    ".globl subring_rc_syscall",
    "subring_rc_syscall:",
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    "mov r8, r9",
    "mov r9, [rsp + 8]",
    "syscall",
    ".hidden subring_rc_syscall_end",
    ".globl subring_rc_syscall_end",
    "subring_rc_syscall_end:",
    "mov r11, {arena}", // in a keyed world this faults for ring 3 that has jumped here
    "cmp dword ptr [r11 + {kick}], 0",
    "ret",
    "",
    ".hidden subring_rc_restorer",
    ".globl subring_rc_restorer",
    "subring_rc_restorer:",
    "mov rdi, {arena}",
    "mov rdi, [rdi + {secret}]",
    "mov eax, {sigreturn}",
    "syscall",
    "ud2",
    "",
    ".hidden subring_rc_signal_entry",
    ".globl subring_rc_signal_entry",
    "subring_rc_signal_entry:", // rdi = signal, rsi = siginfo, rdx = ucontext; the kernel cleared DF and TF only
    "push 2",
    "popfq",
    "jmp {signal}",
    arena = const ARENA_VA,
    stack = const STACK_TOP,
    keyed = const offset_of!(Arena, keyed),
    pkru = const offset_of!(Arena, pkru),
    token = const offset_of!(Arena, token),
    secret = const offset_of!(Arena, secret),
    sigreturn = const libc::SYS_rt_sigreturn,
    transit_at = const offset_of!(Arena, transit_at),
    kernel_way = const offset_of!(Arena, kernel_way),
    way = const TRANSIT_WAY,
    transit_way = const TRANSIT_OFFSET + TRANSIT_WAY,
    user_pkru = const USER_PKRU,
    kernel_pkru = const KERNEL_PKRU,
    kick = const offset_of!(Arena, kick),
    stepped = const offset_of!(Arena, stepped),
    called = const offset_of!(Arena, called),
    kind = const offset_of!(Arena, exit.kind),
    kind_kick = const exit_kind::KICK,
    kind_bad = const exit_kind::BAD_STATE,
    kind_gate = const exit_kind::GATE,
    fx = const offset_of!(Arena, fx),
    save_eax = const VCPU_OFFSET + SHIM_SAVE as usize,
    eax = const GPR,
    ecx = const GPR + 4,
    edx = const GPR + 8,
    ebx = const GPR + 12,
    esp = const GPR + 16,
    ebp = const GPR + 20,
    esi = const GPR + 24,
    edi = const GPR + 28,
    eip = const REGS + offset_of!(HwRegs, eip),
    eflags = const REGS + offset_of!(HwRegs, eflags),
    es = const SEL,
    cs = const SEL + 2,
    ss = const SEL + 4,
    ds = const SEL + 6,
    fs = const SEL + 8,
    gs = const SEL + 10,
    returning = const offset_of!(Arena, returning),
    u_fp = const MCONTEXT + offset_of!(libc::mcontext_t, fpregs),
    u_cs = const greg(libc::REG_CSGSFS),
    u_ss = const greg(libc::REG_CSGSFS) + 6,
    u_eip = const greg(libc::REG_RIP),
    u_eflags = const greg(libc::REG_EFL),
    u_esp = const greg(libc::REG_RSP),
    u_eax = const greg(libc::REG_RAX),
    u_ecx = const greg(libc::REG_RCX),
    u_edx = const greg(libc::REG_RDX),
    u_ebx = const greg(libc::REG_RBX),
    u_ebp = const greg(libc::REG_RBP),
    u_esi = const greg(libc::REG_RSI),
    u_edi = const greg(libc::REG_RDI),
    kicked = sym super::signal::kicked,
    serve = sym super::rc::serve,
    signal = sym super::signal::handle,
);

unsafe extern "C" {
    /// Enters the guest from the arena's registers, never returns. Only in a world.
    pub(crate) fn subring_rc_resume() -> !;
    /// Drops the current stack and goes to `rc::serve`. Only in a world.
    pub(crate) fn subring_rc_leave() -> !;
    /// Goes back to the guest code a signal interrupted; `Arena::returning` is the frame. Only in a world.
    pub(crate) fn subring_rc_return() -> !;
    static subring_rc_resume_end: u8;
    static subring_rc_return_end: u8;
    fn subring_rc_bad_state();
    fn subring_rc_keyed();
    fn subring_rc_to_kernel();
    fn subring_rc_kernel_way();
    fn subring_rc_to_user();
    fn subring_rc_user_way();
    static subring_rc_keyed_end: u8;
    fn subring_rc_forged();
    fn subring_rc_syscall(nr: i64, a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> i64;
    fn subring_rc_syscall_end();
    fn subring_rc_restorer();
    fn subring_rc_gate();
    fn subring_rc_call();
    fn subring_rc_signal_entry();
}

/// First address and end of the way in.
pub(crate) fn resume_range() -> std::ops::Range<u64> {
    let start = subring_rc_resume as unsafe extern "C" fn() -> ! as usize as u64;
    let end = (&raw const subring_rc_resume_end).addr() as u64;
    start..end
}

/// First address and end of the way back behind an answered fault.
pub(crate) fn return_range() -> std::ops::Range<u64> {
    let start = subring_rc_return as unsafe extern "C" fn() -> ! as usize as u64;
    let end = (&raw const subring_rc_return_end).addr() as u64;
    start..end
}

pub(crate) fn bad_state_address() -> u64 {
    subring_rc_bad_state as unsafe extern "C" fn() as usize as u64
}

pub(crate) fn gate_address() -> u64 {
    subring_rc_gate as unsafe extern "C" fn() as usize as u64
}

/// Where trampolines of a confined world leave for, see [`super::long_gate`].
pub(crate) fn call_address() -> u64 {
    subring_rc_call as unsafe extern "C" fn() as usize as u64
}

pub(crate) fn signal_entry_address() -> usize {
    subring_rc_signal_entry as unsafe extern "C" fn() as usize
}

/// A system call, in the one place of a keyed world from which they may come.
///
/// # Safety
/// As the system call demands; only in a world.
pub(super) unsafe fn syscall(nr: i64, a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> i64 {
    // SAFETY: by contract.
    unsafe { subring_rc_syscall(nr, a, b, c, d, e, f) }
}

fn address(f: unsafe extern "C" fn()) -> u64 {
    f as usize as u64
}

/// The address behind the instruction that makes system calls.
pub(super) fn syscall_end() -> u64 {
    address(subring_rc_syscall_end)
}

/// Where handlers return to.
pub(super) fn restorer_address() -> u64 {
    address(subring_rc_restorer)
}

/// The addresses of this program's instructions that may load PKRU.
pub(super) fn pkru_writers() -> [u64; 2] {
    [address(subring_rc_to_kernel), address(subring_rc_to_user)]
}

/// Where code ends that has loaded PKRU without being entitled to.
pub(super) fn forged_address() -> u64 {
    address(subring_rc_forged)
}

/// By which way a keyed world was about to enter guest code when it was interrupted at `rip`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// By `Arena::kernel_way`.
    Kernel,
    /// By the transit page.
    User,
}

/// See [`Way`]; None: it was not, or not entitled to.
///
/// # Safety
/// `a` is the mapped arena; `ring3` says whether PKRU was ring 3's.
pub(super) unsafe fn interrupted_way(rip: u64, ring3: bool, a: *const Arena) -> Option<Way> {
    let end = (&raw const subring_rc_keyed_end).addr() as u64;
    if !(address(subring_rc_keyed)..end).contains(&rip) {
        return None;
    }
    let user = address(subring_rc_to_user);
    if ring3 {
        // Where PKRU has been loaded, checked or not: who comes there by himself gets his own rights.
        return (rip > user).then_some(Way::User);
    }
    // SAFETY: by contract: atomics.
    let (token, pkru) = unsafe { ((*a).token.load(Relaxed), (*a).pkru.load(Relaxed)) };
    match super::keys::is_ring3(pkru) {
        // Up to the instruction that loads it, whoever has key 0 is the runtime.
        true => (rip <= user).then_some(Way::User),
        false => {
            let checked =
                token != 0 || rip <= address(subring_rc_to_kernel) || rip >= address(subring_rc_kernel_way);
            checked.then_some(Way::Kernel)
        }
    }
}

/// What hostile code might want to jump to.
pub(super) fn places() -> [u64; 11] {
    [
        resume_range().start,
        return_range().start,
        address(subring_rc_keyed),
        address(subring_rc_to_kernel),
        address(subring_rc_kernel_way),
        address(subring_rc_to_user),
        address(subring_rc_user_way),
        address(subring_rc_syscall_end) - 2,
        address(subring_rc_restorer),
        gate_address(),
        signal_entry_address() as u64,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kick_finds_the_guest_wherever_a_keyed_world_is_about_to_enter_it() {
        let layout = std::alloc::Layout::new::<Arena>();
        // SAFETY: an arena has a size, and zeroes are one: words and atomics.
        let a = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<Arena>();
        assert!(!a.is_null());
        // SAFETY: allocated above, and nobody else's.
        let arena = unsafe { &*a };
        // SAFETY: as above.
        let way = |rip: u64, ring3: bool| unsafe { interrupted_way(rip, ring3, a) };
        const WRPKRU: u64 = 3;
        let (start, end) = (address(subring_rc_keyed), (&raw const subring_rc_keyed_end).addr() as u64);
        let (to_kernel, kernel_way) = (address(subring_rc_to_kernel), address(subring_rc_kernel_way));
        let (to_user, user_way) = (address(subring_rc_to_user), address(subring_rc_user_way));
        assert!(start < to_kernel && to_kernel + WRPKRU < kernel_way && kernel_way < to_user);
        assert!(to_user + WRPKRU < user_way && user_way < end);

        // To ring 3: the runtime's PKRU, and behind the instruction that loads it ring 3's.
        arena.pkru.store(USER_PKRU, Relaxed);
        assert!((start..=to_user).all(|rip| way(rip, false) == Some(Way::User)));
        assert!((to_user + WRPKRU..end).all(|rip| way(rip, true) == Some(Way::User)));
        // Ring 3 by itself, before it would be entitled to; another PKRU than ring 3's loaded there.
        assert!((start..=to_user).all(|rip| way(rip, true).is_none()));
        assert!((to_user + WRPKRU..end).all(|rip| way(rip, false).is_none()));

        // To ring 0: the token is set from the one instruction that loads PKRU until it has been checked.
        arena.pkru.store(KERNEL_PKRU, Relaxed);
        assert!((start..=to_kernel).all(|rip| way(rip, false) == Some(Way::Kernel)));
        arena.token.store(1, Relaxed);
        assert!((to_kernel + WRPKRU..kernel_way).all(|rip| way(rip, false) == Some(Way::Kernel)));
        arena.token.store(0, Relaxed);
        assert!((to_kernel + WRPKRU..kernel_way).all(|rip| way(rip, false).is_none()));
        assert!((kernel_way..to_user).all(|rip| way(rip, false) == Some(Way::Kernel)));
        assert!((start..to_user).all(|rip| way(rip, true).is_none()));

        for rip in [start - 1, end] {
            assert!(way(rip, true).is_none() && way(rip, false).is_none());
        }
        // SAFETY: allocated above with this layout; not used any more.
        unsafe { std::alloc::dealloc(a.cast(), layout) };
    }
}
