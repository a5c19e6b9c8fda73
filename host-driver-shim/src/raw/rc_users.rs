//! From the world of guest ring 0 to the confined world of ring 3 and back, without the monitor.
//!
//! Ring 0 of a guest with confined users leaves its world by the gate for each `iret` to ring 3. The runtime then does what the
//! monitor would: it gives the turn to the confined world of the address space, sleeps until it has it back, and looks why. A
//! system call it sends to the guest's handler and goes on in its own world; everything else is for the monitor
//! ([`exit_kind::USERS`]), which reads from the confined world's arena what it would have read after a run.
//!
//! What comes from there is an allegation of ring 3's: its registers have any value, and are used as such only. That it
//! sleeps while ring 0 runs is seen to as in `RawWorld::put_to_bed`. The monitor says by [`UsersRules`] what is allowed, and
//! for which world; nothing is while a flush has not been followed there.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::arena::{Arena, CELLS, CELLS_VA, Cell, Fx, exit_kind, request, turn};
use super::orders::Orders;
use super::rc::syscall;
use super::rc_deliver::{
    CPL, Delivery, FIXED, Guest, HIDDEN_FLAGS, HOST_RING0, HOST_RING3, IF, IF_FLAG, IOPL, NATIVE, REFILL, RF,
    RawSide, SELECTORS, Side,
};
use super::spawn::SIGNALS_OPEN;
use crate::shared::copy;
use crate::world::{FillRules, HwRegs, Table, UsersRules};

/// vCPU page: the same as patm's `vcpu_page` of these names.
const PENDING: u32 = 0x04;
/// As [`PENDING`].
const IRET_REFUSES: u32 = 0x198;
/// Encoding order: ES, CS, SS, DS, FS, GS.
const CS: usize = 1;
const SS: usize = 2;
const DATA: [usize; 4] = [0, 3, 4, 5];
const ESP: usize = 4;
/// `int imm8`.
const INT: u32 = 0xcd;
const GENERAL_PROTECTION: u32 = 13;
/// How often a world that has handed over is given the CPU to fall asleep.
const YAWNS: u32 = 100;
/// Where MXCSR is in an FXSAVE image, and the bits of it that exist.
const MXCSR: usize = 24;
const MXCSR_BITS: u32 = 0xffff;

/// The part of the arena of ring 0's world that is about users.
#[repr(C)]
pub(crate) struct UsersArea {
    pub(crate) rules: UsersRules,
    /// Not 0: the guest has flushed something the confined world may still have.
    pub(crate) stale: AtomicU32,
    /// System calls sent to the guest's handler, ever (wraps).
    pub(crate) calls: AtomicU32,
    /// For alignment.
    pub(crate) reserved: AtomicU64,
}

/// How a stay in the confined world ended.
enum End {
    /// Ring 0 goes on with these registers.
    Ring0(HwRegs),
    /// It is for the monitor.
    Monitor,
}

/// Ring 0's `iret` has left by the gate with the registers in the arena: if it is to ring 3, goes there and comes back with
/// the registers of ring 0's next instruction. False: the monitor is to look. If the exit's kind then is [`exit_kind::USERS`],
/// ring 3 has run; else nothing has changed.
///
/// # Safety
/// In a world, `a` is its mapped arena with the registers the gate saved, and the world has the turn.
pub(crate) unsafe fn enter(a: *mut Arena) -> bool {
    // SAFETY: by contract; the monitor writes the rules only when it has the turn, the others are atomics.
    let (rules, stale, kick, guarded) = unsafe {
        let guard = (&raw const (*a).doze.guard).read_volatile();
        ((&raw const (*a).users.rules).read_volatile(), &(*a).users.stale, &(*a).kick, guard.at != 0)
    };
    // Nobody but the monitor could stop ring 3 when the time is up.
    if rules.cell == 0
        || rules.cell as usize > CELLS
        || stale.load(Relaxed) != 0
        || kick.load(SeqCst) != 0
        || guarded
    {
        return false;
    }
    let number = u64::from(rules.cell).wrapping_sub(1);
    let at = CELLS_VA.wrapping_add(number.wrapping_mul(size_of::<Cell>() as u64));
    let cell: *mut Cell = std::ptr::with_exposed_provenance_mut(at as usize);
    // SAFETY: by contract.
    let (side, fill, regs) = unsafe { RawSide::begin(a) };
    let Some(ring3) = leave_ring0(&side, &fill, &rules, &regs) else { return false };
    // SAFETY: the rules name a cell only to a world that has all of them mapped.
    match unsafe { stay(a, cell, &side, &fill, &rules, &ring3) } {
        End::Ring0(regs) => {
            side.go_on(regs);
            true
        }
        End::Monitor => {
            // SAFETY: by contract.
            unsafe { (*a).exit.kind.store(exit_kind::USERS, Relaxed) };
            false
        }
    }
}

/// `iret` to ring 3 (SDM Vol. 2A, "IRET", label RETURN-TO-OUTER-PRIVILEGE-LEVEL) as patm's `transition::enter_user` does it;
/// yields ring 3's registers. None: something is not plain, and nothing has changed.
fn leave_ring0(side: &RawSide, fill: &FillRules, rules: &UsersRules, regs: &HwRegs) -> Option<HwRegs> {
    let guest = Guest { side, rules: fill };
    let esp = regs.gpr[ESP];
    let mut frame = [0; 5];
    for (i, word) in frame.iter_mut().enumerate() {
        *word = guest.read(esp.wrapping_add(4 * i as u32))?;
    }
    let [eip, cs, flags, user_esp, ss] = frame;
    let hidden = side.get(HIDDEN_FLAGS);
    let holds = |table: &Table| guest.holds(table);
    let fine = side.get(CPL) == 0
        && side.get(PENDING) == 0
        && side.get(REFILL) == 0
        && cs & 0xffff == rules.cs
        && ss & 0xffff == rules.ss
        && flags & !(NATIVE | FIXED | IF | IOPL | RF) == 0
        && flags & IF != 0
        && flags & side.get(IRET_REFUSES) == 0
        && (flags & IOPL) == hidden
        && holds(&rules.cs_descriptor)
        && holds(&rules.ss_descriptor);
    if !fine {
        return None;
    }
    let mut ring3 = HwRegs { gpr: regs.gpr, eip, eflags: flags & NATIVE | FIXED | IF, ..HwRegs::default() };
    ring3.gpr[ESP] = user_esp;
    ring3.sel[CS] = rules.cs_host as u16;
    ring3.sel[SS] = rules.ss_host as u16;
    for i in DATA {
        let word = 4 * i as u32;
        let selector = side.get(HOST_RING3 + word);
        if selector == 0 && side.get(HOST_RING0 + word) != 0 {
            // A segment that is not for ring 3 is null there.
            side.set(SELECTORS + word, 0);
            side.set(HOST_RING0 + word, 0);
        }
        ring3.sel[i] = selector as u16;
    }
    side.set(SELECTORS + 4 * CS as u32, rules.cs);
    side.set(SELECTORS + 4 * SS as u32, rules.ss);
    side.set(IF_FLAG, IF);
    side.set(CPL, 3);
    Some(ring3)
}

/// Has ring 3 run from these registers, and deals with its exit.
///
/// # Safety
/// As [`enter`]; `cell` is mapped and belongs to the confined world of the rules.
unsafe fn stay(
    a: *mut Arena,
    cell: *mut Cell,
    side: &RawSide,
    fill: &FillRules,
    rules: &UsersRules,
    regs: &HwRegs,
) -> End {
    // SAFETY: by contract; the monitor leaves both alone while we have the turn. Ring 3 may write its arena whenever it runs:
    // atomics, volatile accesses and raw copies.
    let (users, orders) = unsafe { (&raw mut (*cell).arena, &(*cell).orders) };
    // SAFETY: as above.
    unsafe {
        (&raw mut (*users).regs).write_volatile(*regs);
        copy((&raw const (*a).fx).cast(), (&raw mut (*users).fx).cast(), size_of::<Fx>());
        (*users).commands_len.store(0, Relaxed);
        (*users).request.store(request::RUN, Relaxed);
        run(&(*users).turn, orders);
        // What ring 3 makes of it: the guest's state is here from now on.
        copy((&raw const (*users).fx).cast(), (&raw mut (*a).fx).cast(), size_of::<Fx>());
        let mxcsr = (&raw mut (*a).fx).cast::<u8>().add(MXCSR).cast::<u32>();
        mxcsr.write_volatile(mxcsr.read_volatile() & MXCSR_BITS);
    }
    // SAFETY: as above.
    let (kind, turn, kick, ring3) = unsafe {
        (
            (*users).exit.kind.load(Relaxed),
            (*users).turn.load(SeqCst),
            (*a).kick.load(SeqCst),
            (&raw const (*users).regs).read_volatile(),
        )
    };
    if turn != turn::MONITOR || kick != 0 || orders.abed.load(Relaxed) == 0 || orders.sent.load(SeqCst) != 0 {
        return End::Monitor;
    }
    let fill = FillRules { user_cs: rules.cs_host, users_below: 0, ..*fill };
    let guest = Guest { side, rules: &fill };
    // SAFETY: as above: an atomic.
    let vector = unsafe { (*users).exit.vector.load(Relaxed) };
    let call = match kind {
        // EIP is behind the two bytes.
        exit_kind::SYSCALL => Some(ring3.eip.wrapping_sub(2)),
        // They are a trap in what is shown.
        exit_kind::FAULT if vector == GENERAL_PROTECTION => Some(ring3.eip),
        _ => None,
    };
    let byte = |at: u32| guest.read(at & !3).map(|word| word >> (8 * (at & 3)) & 0xff);
    if let Some(at) = call
        && byte(at) == Some(INT)
        && byte(at.wrapping_add(1)) == Some(rules.vector)
    {
        let delivery = Delivery { rules: &rules.gate, guest, regs: ring3 };
        if let Some(ring0) = delivery.software(at.wrapping_add(2)) {
            // SAFETY: by contract: an atomic.
            let calls = unsafe { &(*a).users.calls };
            calls.store(calls.load(Relaxed).wrapping_add(1), Relaxed);
            return End::Ring0(ring0);
        }
    }
    End::Monitor
}

/// Gives the confined world the turn, waits until it has given it back or is dead, and sees to it that it sleeps.
fn run(turn: &AtomicU32, orders: &Orders) {
    let word = |atomic: &AtomicU32| atomic.as_ptr().addr() as u64;
    let futex = |at: &AtomicU32, operation: i32, value: u32, limit: u64, other: u64, expected: u32| {
        let (operation, value) = (operation as u64, u64::from(value));
        // SAFETY: the words are in the mapped cells; the limit is 0, a count, or the address of a live timespec.
        unsafe { syscall(libc::SYS_futex, word(at), operation, value, limit, other, u64::from(expected)) }
    };
    turn.store(turn::WORLD, SeqCst);
    orders.abed.store(0, Relaxed);
    orders.signals.store(SIGNALS_OPEN, SeqCst);
    if futex(&orders.bed, libc::FUTEX_WAKE, 1, 0, 0, 0) <= 0 {
        futex(turn, libc::FUTEX_WAKE, 1, 0, 0, 0);
    }
    while turn.load(SeqCst) == turn::WORLD {
        futex(turn, libc::FUTEX_WAIT, turn::WORLD, 0, 0, 0);
    }
    orders.signals.store(0, SeqCst);
    // Whoever has seen them open is inside a system call.
    while orders.sending.load(SeqCst) != 0 {
        std::hint::spin_loop();
    }
    for _ in 0..YAWNS {
        if futex(turn, libc::FUTEX_CMP_REQUEUE, 0, 1, word(&orders.bed), turn::MONITOR) > 0 {
            orders.abed.store(1, Relaxed);
            return;
        }
        if turn.load(SeqCst) != turn::MONITOR {
            return;
        }
        // SAFETY: touches no memory.
        unsafe { syscall(libc::SYS_sched_yield, 0, 0, 0, 0, 0, 0) };
    }
}
