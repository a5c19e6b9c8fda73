//! What a world does by itself when a trampoline leaves by the gate: `invlpg` of a small page that only the data view
//! shows, and mapping the page of the fault that an `iret` returns from, which saves ring 3 a second fault.
//!
//! The monitor says by [`Quick`] which reason words mean what. The world's page is unmapped here and the flush noted for
//! the monitor, which follows it in the other worlds.

use std::sync::atomic::Ordering::Relaxed;

use super::arena::{Arena, GATE_REASON, exit_kind, vcpu_word};
use super::fill::{NO_FAULT, is_set, note, put};
use super::rc::unmap;
use super::rc_deliver::{REFILL, REFILL_WRITE, SELECTORS};
use super::rc_fill::{self, PF_WRITE};
use crate::world::QuickKind;

/// CS in [`crate::world::HwRegs::sel`].
const CS: usize = 1;
/// What ring 0 runs with at the sites of the table: the host's flat 32-bit code segment.
const KERNEL_CS: u16 = 0x23;
/// Entries of the table.
pub(crate) const QUICK: usize = crate::world::QUICK_SITES;

/// Does what the gate was left for, if it is in the table; the arena's registers are then those behind it. False: the
/// monitor is to do it, and nothing has changed.
///
/// # Safety
/// In a world, `a` is its mapped arena with the registers the gate saved, and the world has the turn.
pub(crate) unsafe fn answer(a: *mut Arena) -> bool {
    // SAFETY: by contract: atomics.
    let (kind, reason) = unsafe { ((*a).exit.kind.load(Relaxed), vcpu_word(a, GATE_REASON).load(Relaxed)) };
    if kind != exit_kind::GATE || reason == 0 {
        return false;
    }
    // SAFETY: by contract; the monitor writes the table only when it has the turn.
    let table = unsafe { (&raw const (*a).quick).read_volatile() };
    let Some(quick) = table.iter().find(|q| q.reason == reason) else { return false };
    if quick.kind == QuickKind::Refill {
        // SAFETY: by contract.
        return unsafe { refill(a, quick.resume) };
    }
    // SAFETY: by contract.
    let selector =
        unsafe { vcpu_word(a, SELECTORS.wrapping_add(quick.segment.wrapping_mul(4))).load(Relaxed) };
    if selector != quick.selector {
        return false;
    }
    // SAFETY: by contract: while the world has the turn only we touch its registers.
    let mut regs = unsafe { (&raw const (*a).regs).read_volatile() };
    let Some(base) = regs.gpr.get(quick.base as usize) else { return false };
    let lin = base.wrapping_add(quick.displacement);
    // SAFETY: by contract: everything in the fill area but the rules is atomic.
    let (area, delta) = unsafe { (&(*a).fill, (&raw const (*a).fill.rules.delta).read_volatile()) };
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
        put(&area.present, page, 1, false);
        if unmap(page << 12, 4096) < 0 {
            return false;
        }
    }
    // The same fault again is what is to be expected now.
    area.last.store(NO_FAULT, Relaxed);
    area.quick_done.store(area.quick_done.load(Relaxed).wrapping_add(1), Relaxed);
    regs.eip = quick.resume;
    // The gate cannot tell CS: what is there is from the last entry, which may have been one of ring 3.
    regs.sel[CS] = KERNEL_CS;
    // SAFETY: as above.
    unsafe { (&raw mut (*a).regs).write_volatile(regs) };
    true
}

/// Maps the page for which ring 3 would fault again right behind the `iret`, and does that again.
///
/// # Safety
/// As [`answer`].
unsafe fn refill(a: *mut Arena, resume: u32) -> bool {
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
    let _filled = unsafe { rc_fill::fill(a, place, error, rules.user_cs as u16) };
    // SAFETY: by contract: while the world has the turn only we touch its registers.
    unsafe {
        (&raw mut (*a).regs.eip).write_volatile(resume);
        (&raw mut (*a).regs.sel[CS]).write_volatile(KERNEL_CS);
    }
    true
}
