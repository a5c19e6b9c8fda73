//! Ticks of the guest's timer without the monitor: the world sleeps in the guest's `hlt` until the next one and delivers it,
//! or interrupts the guest's ring 3 for it.
//!
//! 1. The monitor says by [`Guard`] that the world watches the time. A timer of the world's own then makes it leave shortly
//!    after the tick that is expected next, whatever the guest does.
//! 2. The guest programs its timer by a count that posts ([`super::rc_port`]): the tick it ends with is known here.
//! 3. At a `hlt` with nothing in service and the tick not masked, the world sleeps till then, interruptible by a kick,
//!    delivers the interrupt ([`rc_deliver::interrupt`]) and notes it for the monitor between the writes that post.
//! 4. If the world's timer finds guest ring 3 running when the tick is due, the tick is delivered just so.
//!
//! The monitor does later in the interrupt controllers and the timer what the notes say. A guest that lies in them has
//! lied to itself.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use super::arena::{Arena, ArenaMap, turn};
use super::rc::syscall;
use super::{rc_deliver, rc_port};
use crate::tsc;
use crate::world::{DeliveryRules, Guard};

/// Lines of the log a tick needs, the handler's writes included; with fewer left the monitor is to empty it.
const LINES: u32 = 16;
/// How much too early the timer's model may think the world is, ns.
const MARGIN: u64 = 1000;

/// The part of the arena that is about time.
#[repr(C)]
pub(crate) struct DozeArea {
    pub(crate) rules: DeliveryRules,
    pub(crate) guard: Guard,
    /// When the world's timer will fire; 0: it is not set.
    pub(crate) armed: AtomicU64,
    /// When the count that was last posted in this run ends; 0: none was.
    pub(crate) ends: AtomicU64,
}

/// So many counts in ns.
fn ns(guard: &Guard, counts: u64) -> u64 {
    ((u128::from(counts) * u128::from(guard.scale)) >> 24) as u64
}

/// # Safety
/// In a world, `a` is its mapped arena.
unsafe fn guard(a: *const Arena) -> Guard {
    // SAFETY: by contract; the monitor writes it only when it has the turn.
    unsafe { (&raw const (*a).doze.guard).read_volatile() }
}

/// Sets the world's timer to the guard's time; if that is over, there is a kick.
///
/// # Safety
/// In a world, `a` is its mapped arena, and the world has the turn.
unsafe fn arm(a: *mut Arena, guard: &Guard) {
    // SAFETY: by contract: atomics.
    let (armed, kick) = unsafe { (&(*a).doze.armed, &(*a).kick) };
    let left = guard.at.saturating_sub(tsc::read());
    if left == 0 {
        kick.store(1, SeqCst);
        return;
    }
    if armed.load(Relaxed) == guard.at {
        return;
    }
    armed.store(guard.at, Relaxed);
    let us = ns(guard, left) / 1000 + 1;
    // struct itimerval: the interval, the time left; each seconds and microseconds.
    let value = [0u64, 0, us / 1_000_000, us % 1_000_000];
    // SAFETY: the kernel reads the 32 bytes of `value`.
    unsafe {
        let at = value.as_ptr().expose_provenance() as u64;
        syscall(libc::SYS_setitimer, libc::ITIMER_REAL as u64, at, 0, 0, 0, 0);
    }
}

/// The monitor has given the turn: begins to watch the time, if that is what it wants.
///
/// # Safety
/// As [`arm`].
pub(crate) unsafe fn enter(a: *mut Arena) {
    // SAFETY: by contract.
    unsafe {
        let guard = guard(a);
        (*a).doze.ends.store(0, Relaxed);
        if guard.at != 0 {
            arm(a, &guard);
        }
    }
}

/// The world's timer has fired, and is not set any more.
///
/// # Safety
/// In a world, `a` is its mapped arena.
pub(crate) unsafe fn spent(a: *mut Arena) {
    // SAFETY: by contract: an atomic.
    unsafe { (*a).doze.armed.store(0, Relaxed) };
}

/// The monitor is to look at the time.
///
/// # Safety
/// In a world, `a` is its mapped arena.
pub(crate) unsafe fn time_is_up(a: *mut Arena) {
    // SAFETY: by contract: atomics.
    unsafe {
        // While the monitor has the turn there is nothing to leave.
        if guard(a).at != 0 && (*a).turn.load(SeqCst) == turn::WORLD {
            (*a).kick.store(1, SeqCst);
        }
    }
}

/// A write to this port has posted; `ends`: a count is complete and ends then, else 0.
///
/// # Safety
/// As [`arm`].
pub(crate) unsafe fn posted(a: *mut Arena, port: u16, ends: u64) {
    // SAFETY: by contract.
    unsafe {
        let mut guard = guard(a);
        if ends != 0 {
            (*a).doze.ends.store(ends, Relaxed);
        }
        if u32::from(port) == guard.end_port {
            guard.idle = 1;
            (&raw mut (*a).doze.guard).write_volatile(guard);
        }
    }
}

/// When the tick comes that the world may deliver by itself, and the rules for that. None: there is none, it is masked, an
/// interrupt is in service, or the monitor is wanted.
///
/// # Safety
/// As [`arm`].
unsafe fn deliverable(a: *const Arena, guard: &Guard) -> Option<(u64, DeliveryRules)> {
    // SAFETY: by contract: the monitor writes the rules only when it has the turn; the others are atomics.
    unsafe {
        let tick = (*a).doze.ends.load(Relaxed);
        let rules = (&raw const (*a).doze.rules).read_volatile();
        let possible = guard.at != 0 && guard.idle != 0 && tick != 0 && rules.ready != 0;
        let fine = possible
            && (*a).kick.load(SeqCst) == 0
            && rc_port::peek(a, guard.mask_port).is_some_and(|mask| mask & 1 == 0)
            && rc_port::has_room(a, LINES);
        fine.then_some((tick, rules))
    }
}

/// The next tick is expected a period behind this one: watches the time till then.
///
/// # Safety
/// As [`arm`].
unsafe fn expect_next(a: *mut Arena, guard: &mut Guard, tick: u64) {
    let next = tick.saturating_add(guard.period);
    guard.at = next.saturating_add(guard.after);
    // SAFETY: by contract.
    unsafe {
        (&raw mut (*a).doze.guard).write_volatile(*guard);
        arm(a, guard);
        rc_port::postpone(a, next.saturating_sub(guard.before));
    }
}

/// A tick was delivered: notes it.
///
/// # Safety
/// As [`arm`].
unsafe fn delivered(a: *mut Arena, guard: &mut Guard) {
    guard.idle = 0;
    // SAFETY: by contract.
    unsafe {
        rc_port::note_tick(a, tsc::read());
        (*a).doze.ends.store(0, Relaxed);
        (&raw mut (*a).doze.guard).write_volatile(*guard);
    }
}

/// The world's timer has interrupted guest code, whose registers are in the arena: delivers the tick to ring 3. False: it is
/// the monitor's.
///
/// # Safety
/// As [`arm`].
pub(crate) unsafe fn tick(a: *mut Arena) -> bool {
    // SAFETY: by contract.
    unsafe {
        let mut guard = guard(a);
        let Some((tick, rules)) = deliverable(a, &guard) else { return false };
        if tsc::read() < tick || !rc_deliver::interrupt(a, &rules, None) {
            return false;
        }
        delivered(a, &mut guard);
        expect_next(a, &mut guard, tick);
    }
    true
}

/// `hlt`, with guest linear `eip` behind it. False: it is the monitor's.
///
/// # Safety
/// As [`arm`], with the registers the gate saved.
pub(crate) unsafe fn doze(a: *mut Arena, eip: u32) -> bool {
    // SAFETY: by contract.
    let mut guard = unsafe { guard(a) };
    // SAFETY: by contract.
    let Some((tick, rules)) = (unsafe { deliverable(a, &guard) }) else { return false };
    // SAFETY: by contract.
    let kick = unsafe {
        expect_next(a, &mut guard, tick);
        &(*a).kick
    };
    loop {
        if kick.load(SeqCst) != 0 {
            return false;
        }
        let now = tsc::read();
        if now >= tick {
            break;
        }
        let wait = ns(&guard, tick - now) + MARGIN;
        let timeout = [wait / 1_000_000_000, wait % 1_000_000_000];
        let word = kick.as_ptr().addr() as u64;
        let at = timeout.as_ptr().expose_provenance() as u64;
        // SAFETY: `word` is the address of a futex word in the arena, and the kernel reads the 16 bytes of `timeout`.
        unsafe { syscall(libc::SYS_futex, word, libc::FUTEX_WAIT as u64, 0, at, 0, 0) };
    }
    // SAFETY: by contract.
    unsafe {
        if !rc_deliver::interrupt(a, &rules, Some(eip)) {
            return false;
        }
        delivered(a, &mut guard);
    }
    true
}

impl ArenaMap {
    pub(crate) fn set_tick_rules(&self, rules: &DeliveryRules) {
        self.put_doze(offset_of!(DozeArea, rules), rules);
    }

    pub(crate) fn set_guard(&self, guard: &Guard) {
        self.put_doze(offset_of!(DozeArea, guard), guard);
    }

    /// Copies a plain value to this offset of the area.
    fn put_doze<T: Copy>(&self, offset: usize, value: &T) {
        assert!(offset + size_of::<T>() <= size_of::<DozeArea>());
        // SAFETY: the destination lies inside the area, thus inside the mapping; any bytes are valid there.
        unsafe {
            let to = self.shared().base().as_ptr().add(offset_of!(Arena, doze) + offset);
            crate::shared::copy((&raw const *value).cast(), to, size_of::<T>());
        }
    }
}
