//! Sensitive instructions that a world does by itself when their trampoline leaves by the gate: `invlpg` of a small page
//! that only the data view shows.
//!
//! The monitor says by [`Quick`] which reason words mean what. The world's page is unmapped here and the flush noted for
//! the monitor, which follows it in the other worlds.

use std::sync::atomic::Ordering::Relaxed;

use super::arena::{Arena, GATE_REASON, exit_kind, vcpu_word};
use super::fill::{NO_FAULT, Note, is_set, note, put};
use super::rc::unmap;
use super::rc_deliver::SELECTORS;

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
    if !note(area, &Note::of(page, 0, 0, 0)) {
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
