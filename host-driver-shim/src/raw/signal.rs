//! Signals in a world: how the hardware's exceptions on guest code become exit records.
//!
//! A frame that interrupted guest code is copied into the arena and abandoned, never returned to by sigreturn: the kernel
//! starts the signal stack from its top again because guest stacks lie below 4 GiB. If the fault can be answered here
//! ([`rc_fill`]), guest code goes on from the frame itself. A frame that interrupted the runtime is returned to, possibly
//! elsewhere.

use std::arch::asm;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::arena::{Arena, GATE, TRANSIT_WAY, exit_kind};
use super::entry::{
    Way, bad_state_address, forged_address, interrupted_way, resume_range, return_range, subring_rc_leave,
    subring_rc_resume, subring_rc_return,
};
use super::keys::{self, PF_KEY};
use super::long_gate;
use super::rc::{arena, death, die};
use super::rc_access;
use super::rc_cpuid;
use super::rc_deliver;
use super::rc_doze;
use super::rc_fill::{self, Answer, PF_WRITE};
use crate::shared::copy;
use crate::world::FillMode;

/// The signal that interrupts guest code.
pub(crate) const KICK_SIGNAL: i32 = libc::SIGUSR1;

/// The signal of the world's own timer, see [`super::rc_doze`].
pub(crate) const GUARD_SIGNAL: i32 = libc::SIGALRM;

/// The general registers in encoding order, in a signal frame.
pub(crate) const GENERAL: [i32; 8] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
];

/// The host's 64-bit user code selector: whatever interrupted code ran with it is not guest code (or has escaped).
const CS64: u64 = 0x33;
const TF: i64 = 0x100;
const PAGE_FAULT: i64 = 14;
/// Page-fault error code: a fetch.
const PF_FETCH: u32 = 16;
const GENERAL_PROTECTION: i64 = 13;
const FOUR_GIB: u64 = 1 << 32;

/// The handler of every signal, called by `subring_rc_signal_entry`.
///
/// # Safety
/// Only as a signal handler in a world, with what the kernel passes.
pub(crate) unsafe extern "C" fn handle(signal: i32, info: *const libc::siginfo_t, uc: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes valid pointers into its frame, which is ours alone now.
    let (gregs, code) = unsafe { (&mut (*uc).uc_mcontext.gregs, (*info).si_code) };
    // SAFETY: as above; in a world the arena is mapped and its words are atomics.
    let arena = arena();
    let mut signal = signal;
    let csgsfs = greg(gregs, libc::REG_CSGSFS) as u64;
    // SAFETY: as above: `fpregs` points to the frame's XSAVE area.
    let pkru = unsafe {
        let fp = (*uc).uc_mcontext.fpregs.cast();
        ((*arena).keyed.load(Relaxed) != 0).then(|| keys::of_frame(fp, arena))
    };
    let ring3 = pkru.is_some_and(keys::is_ring3);
    if csgsfs & 0xffff != CS64 {
        // SAFETY: in a world the arena is mapped and its words are atomics.
        unsafe { (*arena).pkru.store(if ring3 { keys::USER_PKRU } else { keys::KERNEL_PKRU }, Relaxed) };
    }
    if signal == GUARD_SIGNAL {
        // SAFETY: `arena` is the mapped arena; the frame is live. In guest code the world has the turn.
        unsafe {
            rc_doze::spent(arena);
            if csgsfs & 0xffff != CS64 {
                save_guest(gregs, csgsfs, (*uc).uc_mcontext.fpregs.cast(), arena);
                if rc_doze::tick(arena) {
                    subring_rc_resume();
                }
            }
            rc_doze::time_is_up(arena);
        }
        signal = KICK_SIGNAL;
    }
    if csgsfs & 0xffff == CS64 {
        if pkru.is_some() {
            let rip = greg(gregs, libc::REG_RIP) as u64;
            // SAFETY: the arena is mapped.
            let way = unsafe { interrupted_way(rip, ring3, arena) };
            if let (KICK_SIGNAL, Some(way)) = (signal, way) {
                // SAFETY: the frame is live, and so is what was to be loaded that way.
                unsafe {
                    save_way(gregs, way, (*uc).uc_mcontext.fpregs.cast(), arena);
                    (*arena).exit.kind.store(exit_kind::KICK, Release);
                    subring_rc_leave();
                }
            }
            if ring3 || rip == forged_address() {
                die(death::ESCAPED);
            }
        }
        in_runtime(signal, code, gregs, arena);
        return;
    }
    // SAFETY: `arena` is the mapped arena; the frame is live; we are on the signal stack, which nobody needs after this.
    unsafe {
        // SIGBUS: a page of a window that was not let in.
        if matches!(signal, libc::SIGSEGV | libc::SIGBUS)
            && code > 0
            && may_answer(gregs, csgsfs, arena)
            && pkru.is_none_or(|_| may_answer_keyed(gregs, csgsfs, ring3, arena))
        {
            let (cr2, error) =
                (greg(gregs, libc::REG_CR2) as u32, greg(gregs, libc::REG_ERR) as u32 & !PF_KEY);
            let [es, ds, ..] = data_selectors();
            let selectors = [csgsfs as u16, (csgsfs >> 48) as u16, es, ds];
            if signal == libc::SIGSEGV
                && error & PF_FETCH == 0
                && rc_access::perform(arena, gregs, cr2, selectors)
            {
                (*arena).returning.store(uc.expose_provenance() as u64, Release);
                subring_rc_return();
            }
            let refused = if error & (PF_WRITE | PF_FETCH) == 0 {
                rc_access::read_before_write(arena, gregs, cr2, selectors)
            } else {
                None
            };
            let answer = match refused {
                Some((error_code, lin)) => Answer::Guests { error_code, lin },
                None => rc_fill::answer(arena, cr2, error, csgsfs as u16),
            };
            match answer {
                Answer::Filled => {
                    (*arena).returning.store(uc.expose_provenance() as u64, Release);
                    subring_rc_return();
                }
                Answer::Guests { error_code, lin } => {
                    save_guest(gregs, csgsfs, (*uc).uc_mcontext.fpregs.cast(), arena);
                    if rc_deliver::deliver(arena, error_code, lin, error & PF_FETCH != 0) {
                        subring_rc_resume();
                    }
                    if refused.is_some() {
                        // The monitor is to see the fault of the instruction that is next now.
                        subring_rc_resume();
                    }
                }
                Answer::Monitors => {}
            }
        }
        let sure = pkru.is_none_or(|_| is_rings_code(csgsfs, ring3, arena));
        if sure && signal == libc::SIGSEGV && code > 0 && greg(gregs, libc::REG_TRAPNO) == GENERAL_PROTECTION
        {
            let word = |index| greg(gregs, index) as u32;
            let (eip, flags) = (word(libc::REG_RIP), word(libc::REG_EFL));
            let (leaf, subleaf) = (word(libc::REG_RAX), word(libc::REG_RCX));
            if let Some(answer) = rc_cpuid::answer(arena, eip, csgsfs as u16, flags, leaf, subleaf) {
                let order = [libc::REG_RAX, libc::REG_RBX, libc::REG_RCX, libc::REG_RDX];
                for (register, value) in order.into_iter().zip(answer) {
                    gregs[register as usize] = i64::from(value);
                }
                gregs[libc::REG_RIP as usize] = i64::from(eip.wrapping_add(2));
                (*arena).returning.store(uc.expose_provenance() as u64, Release);
                subring_rc_return();
            }
        }
        save_guest(gregs, csgsfs, (*uc).uc_mcontext.fpregs.cast(), arena);
        let exit = &(*arena).exit;
        let kind = match signal {
            KICK_SIGNAL if (*arena).kick.load(Acquire) != 0 => exit_kind::KICK,
            // A kick that another exit has already answered, or a signal somebody sent by hand.
            _ if signal == KICK_SIGNAL || code <= 0 => subring_rc_resume(),
            libc::SIGSYS => exit_kind::SYSCALL,
            _ => {
                let vector = greg(gregs, libc::REG_TRAPNO) as u32;
                exit.vector.store(vector, Relaxed);
                let error = greg(gregs, libc::REG_ERR) as u32;
                let (hidden, cr2) = match vector {
                    14 => (PF_KEY, greg(gregs, libc::REG_CR2) as u32),
                    _ => (0, 0),
                };
                exit.error_code.store(error & !hidden, Relaxed);
                exit.cr2.store(cr2, Relaxed);
                exit_kind::FAULT
            }
        };
        exit.kind.store(kind, Release);
        subring_rc_leave();
    }
}

/// Whether a fault is a page fault at an address that can be trusted to be the guest's: of code with user rights only
/// while its data segments are those it was given (it can load the host's flat ones, which have another base).
///
/// # Safety
/// `arena` is the mapped arena.
unsafe fn may_answer(gregs: &[i64; 23], csgsfs: u64, arena: *const Arena) -> bool {
    if greg(gregs, libc::REG_TRAPNO) != PAGE_FAULT {
        return false;
    }
    // SAFETY: by contract; the monitor writes both only when it has the turn.
    let (mode, user_cs, sel) = unsafe {
        let rules = &raw const (*arena).fill.rules;
        let sel = (&raw const (*arena).regs.sel).read_volatile();
        ((&raw const (*rules).mode).read_volatile(), (&raw const (*rules).user_cs).read_volatile(), sel)
    };
    let [es, ds, fs, gs] = data_selectors();
    let ss = (csgsfs >> 48) as u16;
    if !mode.contains(FillMode::SUPERVISOR) {
        return sel == [es, csgsfs as u16, ss, ds, fs, gs];
    }
    // Every descriptor of the LDT is one of ours.
    let ours = |s: u16| s & !3 == 0 || s & 4 != 0;
    user_cs == 0 || user_cs != csgsfs as u32 & 0xffff || [es, ds, fs, gs, ss].into_iter().all(ours)
}

/// In a keyed world: the code segment is the one of the ring that PKRU says is running.
///
/// # Safety
/// `arena` is the mapped arena.
unsafe fn is_rings_code(csgsfs: u64, ring3: bool, arena: *const Arena) -> bool {
    // SAFETY: by contract; the monitor writes it only when it has the turn.
    let user_cs = unsafe { (&raw const (*arena).fill.rules.user_cs).read_volatile() };
    ring3 == (user_cs != 0 && user_cs == csgsfs as u32 & 0xffff)
}

/// What [`may_answer`] is for joint worlds, in a keyed one: besides, ring 3 may run what it runs.
///
/// # Safety
/// As [`may_answer`].
unsafe fn may_answer_keyed(gregs: &[i64; 23], csgsfs: u64, ring3: bool, arena: *mut Arena) -> bool {
    // SAFETY: by contract.
    unsafe {
        is_rings_code(csgsfs, ring3, arena)
            && (!ring3 || rc_fill::ring3_may_run(arena, greg(gregs, libc::REG_RIP) as u32))
    }
}

/// Copies the guest's state from where it lies while a keyed world is about to enter guest code.
///
/// # Safety
/// As [`save_guest`]; `gregs` are the runtime's then.
unsafe fn save_way(gregs: &mut [i64; 23], way: Way, fp: *const u8, arena: *mut Arena) {
    // SAFETY: by contract: both ways are in the arena. What ring 3 can write there is about its own registers.
    let way = unsafe {
        match way {
            Way::Kernel => (&raw const (*arena).kernel_way).cast::<[u64; 7]>(),
            Way::User => (&raw const (*arena).transit).cast::<u8>().add(TRANSIT_WAY).cast::<[u64; 7]>(),
        }
        .read_volatile()
    };
    let [eip, cs, flags, esp, ss, ax_cx, dx_di] = way;
    let (low, high) = (|x: u64| i64::from(x as u32), |x: u64| (x >> 32) as i64);
    let put = [
        (libc::REG_RIP, low(eip)),
        (libc::REG_EFL, low(flags)),
        (libc::REG_RSP, low(esp)),
        (libc::REG_RAX, low(ax_cx)),
        (libc::REG_RCX, high(ax_cx)),
        (libc::REG_RDX, low(dx_di)),
        (libc::REG_RDI, high(dx_di)),
    ];
    for (register, value) in put {
        if let Some(slot) = gregs.get_mut(register as usize) {
            *slot = value;
        }
    }
    // SAFETY: by contract.
    unsafe { save_guest(gregs, cs & 0xffff | (ss & 0xffff) << 48, fp, arena) };
}

/// What `subring_rc_return` calls when a kick came before it was back in guest code: leaves for the monitor instead.
///
/// # Safety
/// Only in a world, with the context of the signal frame that interrupted guest code.
pub(crate) unsafe extern "C" fn kicked(uc: *mut libc::ucontext_t) -> ! {
    let arena = arena();
    // SAFETY: by contract the frame is live, and `arena` is the mapped arena.
    unsafe {
        let gregs = &(*uc).uc_mcontext.gregs;
        let csgsfs = greg(gregs, libc::REG_CSGSFS) as u64;
        save_guest(gregs, csgsfs, (*uc).uc_mcontext.fpregs.cast(), arena);
        (*arena).exit.kind.store(exit_kind::KICK, Release);
        subring_rc_leave();
    }
}

/// ES, DS, FS and GS as the hardware has them: signals do not change them.
fn data_selectors() -> [u16; 4] {
    let (es, ds, fs, gs): (u32, u32, u32, u32);
    // SAFETY: reads segment registers only.
    unsafe {
        asm!("mov {0:e}, es", "mov {1:e}, ds", "mov {2:e}, fs", "mov {3:e}, gs", out(reg) es, out(reg) ds, out(reg) fs,
            out(reg) gs, options(nomem, nostack, preserves_flags));
    }
    [es as u16, ds as u16, fs as u16, gs as u16]
}

fn greg(gregs: &[i64; 23], index: i32) -> i64 {
    gregs.get(index as usize).copied().unwrap_or(0)
}

/// A signal while the runtime (or the gate stub, or an escaped guest) was running.
fn in_runtime(signal: i32, code: i32, gregs: &mut [i64; 23], arena: *mut Arena) {
    let rip = greg(gregs, libc::REG_RIP) as u64;
    let resume = resume_range();
    if signal == KICK_SIGNAL {
        // Outside the way in nothing is to be done: the way in looks at the flag. Inside it, start it again.
        let back = return_range();
        if resume.contains(&rip) {
            gregs[libc::REG_RIP as usize] = resume.start as i64;
        } else if back.contains(&rip) {
            gregs[libc::REG_RIP as usize] = back.start as i64;
        } else if rip < FOUR_GIB && !in_stub(rip, arena) && !leads_to_gate(rip, gregs) {
            die(death::ESCAPED);
        }
        return;
    }
    if code <= 0 {
        return; // Sent by hand from outside.
    }
    if resume.contains(&rip) {
        // SAFETY: in a world the arena is mapped and its words are atomics.
        let exit = unsafe { &(*arena).exit };
        exit.vector.store(greg(gregs, libc::REG_TRAPNO) as u32, Relaxed);
        exit.error_code.store(greg(gregs, libc::REG_ERR) as u32, Relaxed);
        gregs[libc::REG_RIP as usize] = bad_state_address() as i64;
        return;
    }
    if signal == libc::SIGTRAP && greg(gregs, libc::REG_EFL) & TF != 0 && rip < FOUR_GIB {
        // A guest that single-steps through a trampoline into the gate: the trap belongs to the trampoline's jump.
        // SAFETY: in a world the arena is mapped and its words are atomics.
        unsafe { (*arena).stepped.store(TF as u32, Relaxed) };
        gregs[libc::REG_EFL as usize] &= !TF;
        return;
    }
    die(if rip < FOUR_GIB { death::ESCAPED } else { death::RUNTIME })
}

/// Whether the gate stub was placed in this page. (A guest that lies about it in its vCPU page only delays its end.)
fn in_stub(rip: u64, arena: *const Arena) -> bool {
    // SAFETY: in a world the arena is mapped; GATE lies inside the vCPU page, at a multiple of 4.
    let stub = unsafe { (&raw const (*arena).vcpu).cast::<u32>().add(GATE as usize / 4).read_volatile() };
    u64::from(stub) & !0xfff == rip & !0xfff
}

/// Whether the 64-bit code below 4 GiB that was interrupted at `rip` is on its way from a trampoline of a confined world to
/// [`super::long_gate`]: `mov r8d, imm32; mov r9, gate; jmp [r9]`. Other code that looks like that only delays its end.
fn leads_to_gate(rip: u64, gregs: &[i64; 23]) -> bool {
    let gate = long_gate();
    let byte = |i: u64| {
        let at: *const u8 = std::ptr::with_exposed_provenance(rip.wrapping_add(i) as usize);
        // SAFETY: code that was about to be executed there; where it ends, the fault ends the world.
        unsafe { at.read_volatile() }
    };
    let loads_gate = |i: u64| {
        byte(i) == 0x49
            && byte(i.wrapping_add(1)) == 0xb9
            && (0..8).all(|n| u64::from(byte(i.wrapping_add(n + 2))) == gate >> (8 * n) & 0xff)
    };
    match (byte(0), byte(1)) {
        (0x41, 0xb8) => loads_gate(6),
        (0x49, 0xb9) => loads_gate(0),
        (0x41, 0xff) => greg(gregs, libc::REG_R9) as u64 == gate,
        _ => false,
    }
}

/// Copies the guest's state out of the signal frame and, for what the frame does not hold, out of the hardware.
///
/// # Safety
/// `fp` points to the frame's FXSAVE image, `arena` to the mapped arena.
unsafe fn save_guest(gregs: &[i64; 23], csgsfs: u64, fp: *const u8, arena: *mut Arena) {
    let [es, ds, fs, gs] = data_selectors();
    // SAFETY: `arena` is mapped, and while the world has the turn only we write its registers; the frame's FXSAVE image
    // is 512 bytes (more follow it).
    unsafe {
        let regs = &raw mut (*arena).regs;
        let gpr = (&raw mut (*regs).gpr).cast::<u32>();
        for (i, r) in GENERAL.into_iter().enumerate() {
            gpr.add(i).write_volatile(greg(gregs, r) as u32);
        }
        (&raw mut (*regs).eip).write_volatile(greg(gregs, libc::REG_RIP) as u32);
        (&raw mut (*regs).eflags).write_volatile(greg(gregs, libc::REG_EFL) as u32);
        let sel = [es, csgsfs as u16, (csgsfs >> 48) as u16, ds, fs, gs];
        (&raw mut (*regs).sel).write_volatile(sel);
        copy(fp, (&raw mut (*arena).fx).cast(), 512);
    }
}
