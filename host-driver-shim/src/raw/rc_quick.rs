//! What a world does by itself when a trampoline leaves by the gate: `invlpg` of a small page that only the data view
//! shows, port accesses that need nobody ([`super::rc_port`]), and mapping the page of the fault that an `iret` returns
//! from, which saves ring 3 a second fault.
//!
//! The monitor says by [`Quick`] which reason words mean what. The world's page is unmapped here and the flush noted for
//! the monitor, which follows it in the other worlds.

use std::sync::atomic::Ordering::Relaxed;

use super::arena::{Arena, GATE_REASON, exit_kind, vcpu_word};
use super::fill::{NO_FAULT, is_set, note, put};
use super::rc::unmap;
use super::rc_deliver::{REFILL, REFILL_WRITE, SELECTORS};
use super::rc_doze;
use super::rc_fill::{self, PF_WRITE, Ram};
use super::rc_walk::is_absent;
use super::{rc_access, rc_port};
use super::{rc_switch, rc_users, rc_window};
use crate::world::{Quick, QuickKind};

/// CS in [`crate::world::HwRegs::sel`].
pub(crate) const CS: usize = 1;
/// What ring 0 runs with at the sites of the table: the host's flat 32-bit code segment.
pub(crate) const KERNEL_CS: u16 = 0x23;
/// Entries of the table.
pub(crate) const QUICK: usize = crate::world::QUICK_SITES;

/// Who goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The guest, in this world.
    Guest,
    /// The monitor.
    Monitor,
    /// The guest, in another world.
    Other,
}

/// Does what the gate was left for, if it is in the table; the arena's registers are then those behind it. The monitor: it is
/// to do it, and nothing has changed.
///
/// # Safety
/// In a world, `a` is its mapped arena with the registers the gate saved, and the world has the turn.
pub(crate) unsafe fn answer(a: *mut Arena) -> Next {
    // SAFETY: by contract: atomics.
    let (kind, reason) = unsafe { ((*a).exit.kind.load(Relaxed), vcpu_word(a, GATE_REASON).load(Relaxed)) };
    if kind != exit_kind::GATE || reason == 0 {
        return Next::Monitor;
    }
    // SAFETY: by contract; the monitor writes the table only when it has the turn.
    let Some(quick) = (unsafe { entry(a, reason) }) else { return Next::Monitor };
    let quick = &quick;
    let done = match quick.kind {
        // SAFETY: by contract.
        QuickKind::LoadCr3 if unsafe { rc_switch::load_cr3(a, quick) } => return Next::Other,
        QuickKind::LoadCr3 => false,
        // SAFETY: by contract.
        QuickKind::Refill => unsafe { refill(a, quick) },
        // SAFETY: by contract.
        QuickKind::In | QuickKind::Out => unsafe { port(a, quick) },
        // SAFETY: by contract.
        QuickKind::Halt => unsafe { rc_doze::doze(a, quick.resume) },
        // SAFETY: by contract.
        QuickKind::Invlpg => unsafe { flush(a, quick) },
        // SAFETY: by contract.
        QuickKind::ToUsers => unsafe { rc_users::enter(a) },
    };
    if done { Next::Guest } else { Next::Monitor }
}

/// The table's entry for a reason.
///
/// # Safety
/// As [`answer`].
unsafe fn entry(a: *mut Arena, reason: u32) -> Option<Quick> {
    // SAFETY: by contract: the index is below the table's length. Most entries are not looked at but for the reason.
    unsafe {
        let table = (&raw const (*a).quick).cast::<Quick>();
        let found = (0..QUICK).find(|i| (&raw const (*table.add(*i)).reason).read_volatile() == reason);
        found.map(|i| table.add(i).read_volatile())
    }
}

/// Goes on behind the instruction.
///
/// # Safety
/// As [`answer`].
unsafe fn finish(a: *mut Arena, quick: &Quick) {
    // The gate cannot tell CS: what is there is from the last entry, which may have been one of ring 3.
    // SAFETY: by contract: while the world has the turn only we touch its registers.
    unsafe {
        (&raw mut (*a).regs.eip).write_volatile(quick.resume);
        (&raw mut (*a).regs.sel[CS]).write_volatile(KERNEL_CS);
    }
}

/// `in al` or `out al`.
///
/// # Safety
/// As [`answer`].
unsafe fn port(a: *mut Arena, quick: &Quick) -> bool {
    // SAFETY: by contract: while the world has the turn only we touch its registers.
    let gpr = unsafe { (&raw const (*a).regs.gpr).read_volatile() };
    let base = gpr.get(quick.base as usize).copied().unwrap_or(0);
    let port = base.wrapping_add(quick.displacement) as u16;
    let [eax, ..] = gpr;
    if quick.kind == QuickKind::Out {
        // SAFETY: by contract.
        if !unsafe { rc_port::write(a, port, eax as u8) } {
            return false;
        }
    } else {
        // SAFETY: by contract.
        let Some(value) = (unsafe { rc_port::read(a, port) }) else { return false };
        // SAFETY: as above.
        unsafe { (&raw mut (*a).regs.gpr[0]).write_volatile(eax & !0xff | u32::from(value)) };
    }
    // SAFETY: by contract.
    unsafe { finish(a, quick) };
    true
}

/// `invlpg`.
///
/// # Safety
/// As [`answer`].
unsafe fn flush(a: *mut Arena, quick: &Quick) -> bool {
    // SAFETY: by contract.
    let selector =
        unsafe { vcpu_word(a, SELECTORS.wrapping_add(quick.segment.wrapping_mul(4))).load(Relaxed) };
    if selector != quick.selector {
        return false;
    }
    // SAFETY: by contract: while the world has the turn only we touch its registers.
    let gpr = unsafe { (&raw const (*a).regs.gpr).read_volatile() };
    let Some(base) = gpr.get(quick.base as usize) else { return false };
    let lin = base.wrapping_add(quick.displacement);
    // SAFETY: by contract: everything in the fill area but the rules is atomic.
    let (area, delta, users_below) = unsafe {
        let rules = &raw const (*a).fill.rules;
        let of_users = (&raw const (*rules).users_below).read_volatile();
        (&(*a).fill, (&raw const (*rules).delta).read_volatile(), of_users)
    };
    let page = lin.wrapping_add(delta) >> 12;
    let large =
        area.large.get((lin >> 26) as usize).is_none_or(|w| w.load(Relaxed) >> (lin >> 21 & 31) & 1 != 0);
    // Code is shown at its own address; large pages have neighbours that go with them.
    if large || is_set(&area.foreign, lin >> 12) || is_set(&area.foreign, page) {
        return false;
    }
    if !note(&area.log, &area.noted, page, 0, 0, 0) {
        return false;
    }
    if is_set(&area.present, page) {
        // SAFETY: by contract; the monitor writes the rules only when it has the turn.
        let rules = unsafe { (&raw const (*a).fill.rules).read_volatile() };
        let ram = Ram { pages: area.ram_pages.load(Relaxed) };
        // What the tables do not show any more may go at any time: nothing is noted for it, its own flush will be.
        let stale =
            |p: u32| is_set(&area.present, p) && is_absent(&ram, &rules, (p << 12).wrapping_sub(delta));
        let taken = rc_window::windows().take_out(page, stale);
        put(&area.present, page, taken.max(1), false);
        if taken == 0 && unmap(page << 12, 4096) < 0 {
            return false;
        }
    }
    if lin >= users_below {
        // SAFETY: by contract: an atomic.
        unsafe { (*a).hand.flushed.store(1, Relaxed) };
    }
    // The same fault again is what is to be expected now.
    area.last.store(NO_FAULT, Relaxed);
    // SAFETY: by contract: atomics.
    rc_access::flushed(unsafe { &(*a).fleeting }, lin >> 12);
    area.flushes_done.store(area.flushes_done.load(Relaxed).wrapping_add(1), Relaxed);
    // SAFETY: by contract.
    unsafe { rc_users::flushed(a, lin >> 12, page) };
    // SAFETY: by contract.
    unsafe { finish(a, quick) };
    true
}

/// Maps the page for which ring 3 would fault again right behind the `iret`, and does that again.
///
/// # Safety
/// As [`answer`].
unsafe fn refill(a: *mut Arena, quick: &Quick) -> bool {
    // SAFETY: by contract.
    let word = unsafe { vcpu_word(a, REFILL) };
    let wanted = word.swap(0, Relaxed);
    if wanted == 0 {
        return false;
    }
    // SAFETY: by contract; the monitor writes the rules only when it has the turn.
    let rules = unsafe { (&raw const (*a).fill.rules).read_volatile() };
    let place = (wanted & !0xfff).wrapping_add(rules.delta);
    let error = if wanted & REFILL_WRITE != 0 { PF_WRITE } else { 0 };
    // If that does not work, ring 3 will fault, and it is looked at then.
    // SAFETY: by contract.
    let _filled = unsafe { rc_fill::refill(a, place, error, rules.user_cs as u16) };
    // SAFETY: by contract.
    unsafe { finish(a, quick) };
    true
}
