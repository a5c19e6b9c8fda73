//! From the world of guest ring 0 to the confined world of ring 3 and back, without the monitor.
//!
//! Ring 0 of a guest with confined users leaves its world by the gate for each `iret` to ring 3. The runtime then does what the
//! monitor would: it gives the turn to the confined world of the address space, sleeps until it has it back, and looks why. A
//! system call it sends to the guest's handler and goes on in its own world; everything else is for the monitor
//! ([`exit_kind::USERS`]), which reads from the confined world's arena what it would have read after a run.
//!
//! What comes from there is an allegation of ring 3's: its registers have any value, and are used as such only. That it
//! sleeps while ring 0 runs is seen to as in `RawWorld::put_to_bed`. The monitor says by [`UsersRules`] what is allowed, and
//! for which world.
//!
//! Its page faults are dealt with as those of a world that fills its own shadow ([`super::rc_fill`], [`super::rc_deliver`]); the
//! mapper gets its orders from here then. What the guest flushes by `invlpg` is unmapped there before it is entered again
//! ([`flushed`]); if that cannot be done here it is not entered.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::arena::{Arena, CELLS, CELLS_VA, Cell, Fx, RAM_FD, exit_kind, request, turn};
use super::fill::{NO_FAULT, is_set, note, put};
use super::orders::{ORDERS, Order, Orders, WAKES};
use super::rc::{populate, syscall};
use super::rc_cpuid;
use super::rc_deliver::{
    CPL, Delivery, FIXED, Guest, HIDDEN_FLAGS, HOST_RING0, HOST_RING3, IF, IF_FLAG, IOPL, NATIVE, PageFault,
    REFILL, REFILL_WRITE, RF, RawSide, SELECTORS, Side,
};
use super::rc_fill::{PF_WRITE, Target, fill_in};
use super::rc_walk::{Access, refusal};
use super::spawn::SIGNALS_OPEN;
use crate::shared::copy;
use crate::world::{FillMode, FillRules, HwRegs, Table, UsersRules};

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
const INT: u8 = 0xcd;
const GENERAL_PROTECTION: u32 = 13;
/// The name of an order that is no command of the monitor's.
const OURS: u64 = u32::MAX as u64;
const PAGE_FAULT: u32 = 14;
/// Page-fault error code: a fetch.
const PF_FETCH: u32 = 16;
/// How long the mapper may take before it is looked whether it could, ns.
const PATIENCE: u64 = 100_000_000;
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
    /// How many pages of the confined world are to be unmapped before it is entered.
    pub(crate) flushes: AtomicU32,
    /// Their numbers.
    pub(crate) flushed: [AtomicU32; FLUSHES],
    /// For alignment.
    pub(crate) reserved: AtomicU32,
}

/// So many flushes are followed at once.
pub(crate) const FLUSHES: usize = 32;

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
    let cell = cell_of(&rules);
    // SAFETY: by contract.
    let (side, fill, regs) = unsafe { RawSide::begin(a) };
    if !fill.mode.contains(FillMode::ENABLED) {
        return false;
    }
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

/// The cell the rules name.
fn cell_of(rules: &UsersRules) -> *mut Cell {
    let number = u64::from(rules.cell).wrapping_sub(1);
    let at = CELLS_VA.wrapping_add(number.wrapping_mul(size_of::<Cell>() as u64));
    std::ptr::with_exposed_provenance_mut(at as usize)
}

/// The guest has flushed the small page of world page `page`, guest linear page `lin`: what the confined world that may be
/// entered has there goes before it is.
///
/// # Safety
/// As [`enter`].
pub(crate) unsafe fn flushed(a: *mut Arena, lin: u32, page: u32) {
    // SAFETY: by contract; the monitor writes the rules only when it has the turn, the others are atomics.
    let (rules, area) = unsafe { ((&raw const (*a).users.rules).read_volatile(), &raw mut (*a).users) };
    if rules.cell == 0 || rules.cell as usize > CELLS {
        return;
    }
    // SAFETY: as above; the rules name a cell only to a world that has all of them mapped.
    let (stale, flushes, list, fill) =
        unsafe { (&(*area).stale, &(*area).flushes, &(*area).flushed, &(*cell_of(&rules)).fill) };
    let large =
        fill.large.get((lin >> 14) as usize).is_none_or(|w| w.load(Relaxed) >> (lin >> 9 & 31) & 1 != 0);
    let n = flushes.load(Relaxed);
    let known = large || is_set(&fill.foreign, lin) || is_set(&fill.foreign, page);
    if !known && !is_set(&fill.present, page) {
        return;
    }
    let slot = list.get(n as usize).filter(|_| !known && note(&fill.log, &fill.noted, page, 0, 0, 0));
    let Some(slot) = slot else {
        stale.store(1, Relaxed);
        return;
    };
    put(&fill.present, page, 1, false);
    slot.store(page, Relaxed);
    flushes.store(n.wrapping_add(1), Relaxed);
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

/// Has ring 3 run from these registers, and deals with its exits.
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
    // SAFETY: by contract; the monitor leaves all of it alone while we have the turn. Ring 3 may write its arena whenever it
    // runs: atomics, volatile accesses and raw copies.
    let (users, orders, area) = unsafe { (&raw mut (*cell).arena, &raw mut (*cell).orders, &(*cell).fill) };
    let ring3_rules =
        FillRules { mode: fill.mode.difference(FillMode::SUPERVISOR), user_cs: 0, users_below: 0, ..*fill };
    let target = Target { area, rules: &ring3_rules, ram: side.ram(), user: true, windows: false };
    // SAFETY: as above.
    let mut work = unsafe { Work::begin(a, orders) };
    area.last.store(NO_FAULT, Relaxed);
    let wanted = side.get(REFILL);
    if wanted != 0 {
        side.set(REFILL, 0);
        let place = (wanted & !0xfff).wrapping_add(fill.delta);
        // If that does not work ring 3 will fault, and it is looked at then.
        fill_in(&target, place, wanted & REFILL_WRITE != 0, &mut |at, n, prot, pfn| {
            work.map(at, n, prot, pfn)
        });
        area.last.store(NO_FAULT, Relaxed);
    }
    // SAFETY: as above.
    unsafe {
        (&raw mut (*users).regs).write_volatile(*regs);
        copy((&raw const (*a).fx).cast(), (&raw mut (*users).fx).cast(), size_of::<Fx>());
    }
    loop {
        // SAFETY: as above.
        let fine = unsafe {
            (*users).commands_len.store(0, Relaxed);
            (*users).request.store(request::RUN, Relaxed);
            let fine = work.run(&(*users).turn, orders);
            // What ring 3 makes of it: the guest's state is here from now on.
            copy((&raw const (*users).fx).cast(), (&raw mut (*a).fx).cast(), size_of::<Fx>());
            let mxcsr = (&raw mut (*a).fx).cast::<u8>().add(MXCSR).cast::<u32>();
            mxcsr.write_volatile(mxcsr.read_volatile() & MXCSR_BITS);
            fine
        };
        // SAFETY: as above.
        let (exit, kick, ring3) =
            unsafe { (&(*users).exit, (*a).kick.load(SeqCst), (&raw const (*users).regs).read_volatile()) };
        if fine {
            // SAFETY: as above: an atomic.
            unsafe { (*a).users.flushes.store(0, Relaxed) };
        } else {
            // It has not run: that is no more than a kick.
            exit.kind.store(exit_kind::KICK, Relaxed);
            return End::Monitor;
        }
        // SAFETY: as above: atomics.
        let (turn, abed, sent) = unsafe {
            ((*users).turn.load(SeqCst), (*orders).abed.load(Relaxed), (*orders).sent.load(SeqCst))
        };
        if turn != turn::MONITOR || kick != 0 || abed == 0 || sent != 0 {
            return End::Monitor;
        }
        let guest_rules = FillRules { user_cs: rules.cs_host, users_below: 0, ..*fill };
        let guest = Guest { side, rules: &guest_rules };
        let (kind, vector) = (exit.kind.load(Relaxed), exit.vector.load(Relaxed));
        let call = match kind {
            // EIP is behind the two bytes.
            exit_kind::SYSCALL | exit_kind::GATE => Some(ring3.eip.wrapping_sub(2)),
            // They are a trap in what is shown.
            exit_kind::FAULT if vector == GENERAL_PROTECTION => Some(ring3.eip),
            _ => None,
        };
        if let Some(at) = call
            && guest.byte(at) == Some(INT)
            && guest.byte(at.wrapping_add(1)).map(u32::from) == Some(rules.vector)
        {
            let delivery = Delivery { rules: &rules.gate, guest, regs: ring3 };
            let Some(ring0) = delivery.software(at.wrapping_add(2)) else { return End::Monitor };
            // SAFETY: by contract: an atomic.
            let calls = unsafe { &(*a).users.calls };
            calls.store(calls.load(Relaxed).wrapping_add(1), Relaxed);
            return End::Ring0(ring0);
        }
        if kind == exit_kind::FAULT && vector == GENERAL_PROTECTION && is_as_given(side, rules, &ring3) {
            let [eax, ecx, ..] = ring3.gpr;
            // SAFETY: by contract.
            let rows = unsafe { rc_cpuid::rows(a) };
            let Some([a, b, c, d]) =
                rc_cpuid::answer_by(side.ram(), &ring3_rules, rows, (ring3.eip, ring3.eflags), (eax, ecx))
            else {
                return End::Monitor;
            };
            let [_, _, _, _, esp, ebp, esi, edi] = ring3.gpr;
            let next =
                HwRegs { gpr: [a, c, d, b, esp, ebp, esi, edi], eip: ring3.eip.wrapping_add(2), ..ring3 };
            // SAFETY: as above.
            unsafe { (&raw mut (*users).regs).write_volatile(next) };
            continue;
        }
        if kind != exit_kind::FAULT || vector != PAGE_FAULT || !is_as_given(side, rules, &ring3) {
            return End::Monitor;
        }
        let (cr2, error) = (exit.cr2.load(Relaxed), exit.error_code.load(Relaxed));
        let (write, fetch) = (error & PF_WRITE != 0, error & PF_FETCH != 0);
        let lin = if fetch { cr2 } else { cr2.wrapping_sub(fill.delta) };
        if let Some(error_code) = refusal(side.ram(), &ring3_rules, lin, Access { write, user: true, fetch })
        {
            // SAFETY: by contract; the monitor writes the rules only when it has the turn.
            let page_fault = unsafe { (&raw const (*a).delivery).read_volatile() };
            let delivery = Delivery { rules: &page_fault, guest, regs: ring3 };
            let fault = PageFault { error_code, lin, fetch };
            let Some(ring0) = delivery.page_fault(&fault) else { return End::Monitor };
            side.has_delivered(&fault, true);
            return End::Ring0(ring0);
        }
        // SAFETY: as above.
        work = unsafe { Work::begin(a, orders) };
        if fetch
            || guest.names_cs(ring3.eip)
            || !fill_in(&target, cr2, write, &mut |at, n, prot, pfn| work.map(at, n, prot, pfn))
        {
            return End::Monitor;
        }
    }
}

/// Ring 3 has in its segment registers what it was given: an address is what the guest takes it for.
fn is_as_given(side: &RawSide, rules: &UsersRules, regs: &HwRegs) -> bool {
    let same = |i: &usize| u32::from(regs.sel[*i]) == side.get(HOST_RING3 + 4 * *i as u32);
    u32::from(regs.sel[CS]) == rules.cs_host
        && u32::from(regs.sel[SS]) == rules.ss_host
        && DATA.iter().all(same)
}

/// Orders for the mapper of the confined world that is about to be entered.
struct Work {
    orders: *mut Orders,
    n: usize,
    /// Pages the guest has flushed: what is mapped there goes, unless something else is mapped instead.
    flushed: [u32; FLUSHES],
}

/// In [`Work::flushed`].
const NO_PAGE: u32 = u32::MAX;

impl Work {
    /// With what the guest has flushed.
    ///
    /// # Safety
    /// As [`enter`]; `orders` are mapped, and their mapper has nothing to do.
    unsafe fn begin(a: *mut Arena, orders: *mut Orders) -> Work {
        // SAFETY: by contract: atomics.
        let (flushes, list, prepared) =
            unsafe { (&(*a).users.flushes, &(*a).users.flushed, &(*orders).prepared) };
        // What the monitor has prepared lies before what comes from here.
        let n = (prepared.swap(0, SeqCst) as usize).min(ORDERS);
        let mut work = Work { orders, n, flushed: [NO_PAGE; FLUSHES] };
        let listed = list.iter().take(flushes.load(Relaxed) as usize);
        for (slot, page) in work.flushed.iter_mut().zip(listed) {
            *slot = page.load(Relaxed) & 0xf_ffff;
        }
        work
    }

    fn map(&mut self, page: u32, pages: u32, prot: u32, pfn: u64) -> bool {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | populate(pages << 12);
        let (at, len) = (u64::from(page) << 12, u64::from(pages) << 12);
        let arguments = [at, len, u64::from(prot), flags as u64, RAM_FD as u64, pfn << 12];
        let fits = self.order(libc::SYS_mmap, arguments);
        // It takes the place of what is there.
        for slot in self.flushed.iter_mut().filter(|slot| fits && slot.wrapping_sub(page) < pages) {
            *slot = NO_PAGE;
        }
        fits
    }

    /// False: there are too many orders.
    fn unmap_flushed(&mut self) -> bool {
        for page in std::mem::replace(&mut self.flushed, [NO_PAGE; FLUSHES]) {
            let at = u64::from(page) << 12;
            if page != NO_PAGE && !self.order(libc::SYS_munmap, [at, 4096, 0, 0, 0, 0]) {
                return false;
            }
        }
        true
    }

    fn order(&mut self, call: i64, arguments: [u64; 6]) -> bool {
        if self.n >= ORDERS {
            return false;
        }
        // SAFETY: by the contract of `begin`, and the index is below ORDERS.
        unsafe {
            let first = (&raw mut (*self.orders).orders).cast::<Order>();
            first.add(self.n).write_volatile(Order { call: call as u64, arguments, name: OURS });
        }
        self.n = self.n.wrapping_add(1);
        true
    }

    /// Has the mapper do it, gives the confined world the turn, waits until it has given it back or is dead, and sees to it that
    /// it sleeps. False: an order could not be carried out, and it has not run.
    ///
    /// # Safety
    /// As [`Work::begin`]; `turn` is of the same cell.
    unsafe fn run(&mut self, turn: &AtomicU32, orders: *mut Orders) -> bool {
        // SAFETY: by contract: all but the array are atomics.
        let (go, count, wakes, failed, abed, bed, signals, sending) = unsafe {
            (
                &(*orders).go,
                &(*orders).count,
                &(*orders).wakes,
                &(*orders).failed,
                &(*orders).abed,
                &(*orders).bed,
                &(*orders).signals,
                &(*orders).sending,
            )
        };
        if !self.unmap_flushed() {
            return false;
        }
        let ordered = self.n != 0;
        turn.store(turn::WORLD, SeqCst);
        abed.store(0, Relaxed);
        if ordered {
            failed.store(0, Relaxed);
            count.store(self.n as u32, Relaxed);
            wakes.store(WAKES, Relaxed);
            go.fetch_add(1, SeqCst);
            futex(go, libc::FUTEX_WAKE, 1, 0, 0, 0);
            self.n = 0;
        } else {
            signals.store(SIGNALS_OPEN, SeqCst);
            if futex(bed, libc::FUTEX_WAKE, 1, 0, 0, 0) <= 0 {
                futex(turn, libc::FUTEX_WAKE, 1, 0, 0, 0);
            }
        }
        while turn.load(SeqCst) == turn::WORLD {
            let limit = [0, PATIENCE];
            let limit = if ordered { limit.as_ptr().expose_provenance() as u64 } else { 0 };
            futex(turn, libc::FUTEX_WAIT, turn::WORLD, limit, 0, 0);
            if ordered && turn.load(SeqCst) == turn::WORLD {
                if failed.load(SeqCst) != 0 {
                    turn.store(turn::MONITOR, SeqCst);
                    abed.store(1, Relaxed);
                    return false;
                }
                // It may be waiting behind us: what wakes one of those who wait for this word has woken us.
                futex(turn, libc::FUTEX_WAKE, 1, 0, 0, 0);
            }
        }
        signals.store(0, SeqCst);
        // Whoever has seen them open is inside a system call.
        while sending.load(SeqCst) != 0 {
            std::hint::spin_loop();
        }
        for _ in 0..YAWNS {
            let bed = bed.as_ptr().addr() as u64;
            if futex(turn, libc::FUTEX_CMP_REQUEUE, 0, 1, bed, turn::MONITOR) > 0 {
                abed.store(1, Relaxed);
                break;
            }
            if turn.load(SeqCst) != turn::MONITOR {
                break;
            }
            // SAFETY: touches no memory.
            unsafe { syscall(libc::SYS_sched_yield, 0, 0, 0, 0, 0, 0) };
        }
        true
    }
}

/// The system call; the limit is 0, a count, or the address of a live timespec.
fn futex(at: &AtomicU32, operation: i32, value: u32, limit: u64, other: u64, expected: u32) -> i64 {
    let (word, operation, value) = (at.as_ptr().addr() as u64, operation as u64, u64::from(value));
    // SAFETY: the words are in the mapped cells.
    unsafe { syscall(libc::SYS_futex, word, operation, value, limit, other, u64::from(expected)) }
}
