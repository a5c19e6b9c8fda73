//! The mapper of a confined world: the thread that changes its mappings.
//!
//! The code of a confined world may be hostile in 64-bit mode, too, where it reaches everything its process has mapped. So its
//! process has neither guest RAM mapped nor a descriptor of anything, and its filter forbids it to change its mappings. A second
//! thread does that: it shares the memory, but not the descriptors. Hostile code can write whatever that thread could read
//! back, so it reads nothing but the monitor's [`Orders`], which are mapped read-only, and keeps what it works with in its
//! registers. It has no stack and takes no signal.

use std::mem::offset_of;
use std::sync::atomic::Ordering::Acquire;

use super::arena::{ARENA_VA, Arena, Cell, MAPPERS_FILTER, ORDERS_FD, ORDERS_VA, STACK_TOP};
use super::init::install_filter;
use super::orders::{ORDERS, Order, Orders};
use super::rc::{arena, death, die, syscall};

std::arch::global_asm!(
    ".text",
    ".hidden subring_mapper",
    ".globl subring_mapper",
    // edi: the thread's number, which tells the other one that the stack is its own again; rsi: where the orders are in their
    // memory object
    "subring_mapper:",
    "xor esp, esp",
    "mov rbp, rsi",
    "mov rax, {mapper_va}",
    "mov [rax], edi",
    "mov r12, {orders_va}", // r12: the orders; r13d: those carried out; r14d: how many are left; r15: the next one
    "xor r13d, r13d",
    "2:",
    "cmp [r12 + {go}], r13d",
    "jne 3f",
    "lea rdi, [r12 + {go}]",
    "mov esi, {futex_wait}",
    "mov edx, r13d",
    "xor r10d, r10d",
    "mov eax, {futex}",
    "syscall",
    "jmp 2b",
    "3:",
    "mov r13d, [r12 + {go}]",
    "mov ebx, [r12 + {wakes}]", // the monitor may give new orders as soon as the world is awake
    "mov r14d, [r12 + {count}]",
    "lea r15, [r12 + {first}]",
    "cmp r14d, {most}",
    "ja 6f",
    "4:",
    "dec r14d",
    "js 6f",
    "mov rax, [r15 + {call}]",
    "mov rdi, [r15 + {arguments}]",
    "mov rsi, [r15 + {arguments} + 8]",
    "mov rdx, [r15 + {arguments} + 16]",
    "mov r10, [r15 + {arguments} + 24]",
    "mov r8, [r15 + {arguments} + 32]",
    "mov r9, [r15 + {arguments} + 40]",
    "syscall",
    "cmp eax, -4095", // an int, or a page's address: neither is between -4095 and -1 if all went well
    "jae 5f",
    "add r15, {size}",
    "jmp 4b",
    "5:",
    "xor ebx, ebx",
    "lea rsi, [r15 + {name}]",
    "lea r10, [rbp + {failed}]",
    "mov edi, {orders_fd}",
    "mov edx, 4",
    "mov eax, {pwrite}",
    "syscall",
    "6:",
    "test ebx, ebx",
    "jz 7f",
    "lea rsi, [r12 + {wakes}]",
    "lea r10, [rbp + {signals}]",
    "mov edi, {orders_fd}",
    "mov edx, 4",
    "mov eax, {pwrite}",
    "syscall",
    "lea rdi, [r12 + {bed}]", // where the world is as a rule; else it has been woken, and looks at its turn again
    "mov esi, {futex_wake}",
    "mov edx, 1",
    "mov eax, {futex}",
    "syscall",
    "test eax, eax",
    "jg 2b",
    "mov rdi, {turn_va}",
    "jmp 8f",
    "7:",
    "lea rsi, [r12 + {go}]",
    "lea r10, [rbp + {done}]",
    "mov edi, {orders_fd}",
    "mov edx, 4",
    "mov eax, {pwrite}",
    "syscall",
    "lea rdi, [r12 + {done}]",
    "8:",
    "mov esi, {futex_wake}",
    "mov edx, 1",
    "mov eax, {futex}",
    "syscall",
    "jmp 2b",
    mapper_va = const ARENA_VA + offset_of!(Arena, mapper) as u64,
    orders_va = const ORDERS_VA,
    orders_fd = const ORDERS_FD,
    go = const offset_of!(Orders, go),
    done = const offset_of!(Orders, done),
    failed = const offset_of!(Orders, failed),
    bed = const offset_of!(Orders, bed),
    wakes = const offset_of!(Orders, wakes),
    signals = const offset_of!(Orders, signals),
    turn_va = const ARENA_VA + offset_of!(Arena, turn) as u64,
    count = const offset_of!(Orders, count),
    first = const offset_of!(Orders, orders),
    most = const ORDERS,
    size = const size_of::<Order>(),
    call = const offset_of!(Order, call),
    arguments = const offset_of!(Order, arguments),
    name = const offset_of!(Order, name),
    futex = const libc::SYS_futex,
    futex_wait = const libc::FUTEX_WAIT,
    futex_wake = const libc::FUTEX_WAKE,
    pwrite = const libc::SYS_pwrite64,
);

unsafe extern "C" {
    /// What the thread `tid` does for the rest of its life.
    fn subring_mapper(tid: u32, orders: u64) -> !;
}

/// Starts the mapper of the cell at this offset in its memory object, and waits until it needs no memory any more but the orders. False: the host refused.
///
/// # Safety
/// Only in a world that is being set up, which uses its runtime's stack for nothing yet.
pub(super) unsafe fn start(cell: u64) -> bool {
    let stack = std::ptr::with_exposed_provenance_mut(STACK_TOP as usize);
    let flags =
        libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_SIGHAND | libc::CLONE_THREAD | libc::CLONE_SYSVSEM;
    // SAFETY: by contract nothing else uses the stack; the thread needs nothing of this one's.
    if unsafe { libc::clone(main, stack, flags, std::ptr::with_exposed_provenance_mut(cell as usize)) } < 0 {
        return false;
    }
    // SAFETY: in a world the arena is mapped; its words are atomics.
    while unsafe { (*arena()).mapper.load(Acquire) } == 0 {
        // SAFETY: touches no memory.
        unsafe { libc::sched_yield() };
    }
    true
}

extern "C" fn main(cell: *mut libc::c_void) -> i32 {
    let all = u64::MAX;
    let blocked = (&raw const all).expose_provenance() as u64;
    // SAFETY: the kernel reads 8 bytes; a thread that shares its memory but has no signal stack must take no signal.
    let fine =
        unsafe { syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK as u64, blocked, 0, 8, 0, 0) } == 0;
    if !fine || install_filter(MAPPERS_FILTER).is_err() {
        die(death::SETUP);
    }
    // SAFETY: gettid touches no memory. The assembly says that it is ready when it needs the stack no more.
    unsafe {
        let tid = syscall(libc::SYS_gettid, 0, 0, 0, 0, 0, 0);
        subring_mapper(tid as u32, (cell.addr() + offset_of!(Cell, orders)) as u64)
    }
}
