//! Port accesses that a world answers by itself: reads of registers whose value is known, and writes that nothing waits
//! for. The monitor says by [`PortRow`] which these are and is told of the writes, in order, when it next has the turn.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::arena::{Arena, ArenaMap};
use super::rc_doze;
use crate::world::{PORT_ROWS, PortRow, PortWrite, TICK};

/// How many writes may wait for the monitor.
pub(crate) const POSTED: usize = 1024;

/// [`PortRow::value`]: a first byte is in the bits below.
const FIRST: u32 = 0x100;

/// The part of the arena that is about ports.
#[repr(C)]
pub(crate) struct PortArea {
    pub(crate) rows: [PortRow; PORT_ROWS],
    /// How many writes wait.
    pub(crate) posted: AtomicU32,
    /// How many accesses were answered, ever (wraps).
    pub(crate) done: AtomicU32,
    /// Port, the value in bits 16..24, the time-stamp counter in 24..64.
    pub(crate) log: [AtomicU64; POSTED],
}

/// The byte an `in` of this port reads; `None`: that is for the monitor to say.
///
/// # Safety
/// In a world, `a` is its mapped arena, and the world has the turn.
pub(crate) unsafe fn read(a: *mut Arena, port: u16) -> Option<u8> {
    // SAFETY: by contract; the monitor writes the rows only when it has the turn.
    let rows = unsafe { (&raw const (*a).ports.rows).read_volatile() };
    let row = rows.iter().find(|row| row.port == u32::from(port) && row.readable != 0)?;
    // SAFETY: by contract: an atomic.
    count(unsafe { &(*a).ports.done });
    Some(row.value as u8)
}

/// Notes an `out` for the monitor; false: it is to do it now.
///
/// # Safety
/// As [`read`].
pub(crate) unsafe fn write(a: *mut Arena, port: u16, value: u8) -> bool {
    // SAFETY: by contract; the monitor writes the rows only when it has the turn.
    let mut rows = unsafe { (&raw const (*a).ports.rows).read_volatile() };
    let row = rows.iter_mut().find(|row| row.port == u32::from(port));
    let Some(row) = row.filter(|row| row.posts != 0 && u32::from(value) & row.mask == row.pattern) else {
        return false;
    };
    let pending = row.value;
    let now = crate::tsc::read();
    let mut ends = 0;
    if row.unit != 0 {
        row.value = u32::from(value) | FIRST;
        if pending & FIRST != 0 {
            row.value = 0;
            let number = u32::from(value) << 8 | pending & 0xff;
            let time = u64::from(row.unit) * u64::from(if number == 0 { 0x1_0000 } else { number });
            ends = now.saturating_add(time);
            if ends < row.until {
                return false;
            }
        }
    } else if row.readable != 0 {
        row.value = u32::from(value);
    }
    // SAFETY: by contract: atomics.
    let (log, posted, done) = unsafe { (&(*a).ports.log, &(*a).ports.posted, &(*a).ports.done) };
    if !enter(log, posted, port, value, now) {
        return false;
    }
    count(done);
    // SAFETY: by contract.
    unsafe { rc_doze::posted(a, port, ends) };
    if row.value != pending {
        // SAFETY: as above.
        unsafe { (&raw mut (*a).ports.rows).write_volatile(rows) };
    }
    true
}

/// Enters a line in the log; false: it is full.
fn enter(log: &[AtomicU64; POSTED], posted: &AtomicU32, port: u16, value: u8, tsc: u64) -> bool {
    let n = posted.load(Relaxed);
    let Some(slot) = log.get(n as usize) else { return false };
    slot.store(u64::from(port) | u64::from(value) << 16 | tsc << 24, Relaxed);
    posted.store(n.wrapping_add(1), Relaxed);
    true
}

/// What the port reads as, if its row says that.
///
/// # Safety
/// As [`read`].
pub(crate) unsafe fn peek(a: *const Arena, port: u32) -> Option<u32> {
    // SAFETY: by contract; the monitor writes the rows only when it has the turn.
    let rows = unsafe { (&raw const (*a).ports.rows).read_volatile() };
    rows.iter().find(|row| row.port == port && row.readable != 0).map(|row| row.value)
}

/// From now on, counts that end before `until` do not post.
///
/// # Safety
/// As [`read`].
pub(crate) unsafe fn postpone(a: *mut Arena, until: u64) {
    // SAFETY: by contract; the monitor writes the rows only when it has the turn.
    unsafe {
        let mut rows = (&raw const (*a).ports.rows).read_volatile();
        for row in rows.iter_mut().filter(|row| row.unit != 0) {
            row.until = until;
        }
        (&raw mut (*a).ports.rows).write_volatile(rows);
    }
}

/// Whether so many lines more have room.
///
/// # Safety
/// As [`read`].
pub(crate) unsafe fn has_room(a: *const Arena, lines: u32) -> bool {
    // SAFETY: by contract: an atomic.
    unsafe { (*a).ports.posted.load(Relaxed) }.saturating_add(lines) <= POSTED as u32
}

/// Notes for the monitor that the timer's interrupt was delivered.
///
/// # Safety
/// As [`read`].
pub(crate) unsafe fn note_tick(a: *mut Arena, tsc: u64) {
    // SAFETY: by contract: atomics.
    let (log, posted) = unsafe { (&(*a).ports.log, &(*a).ports.posted) };
    enter(log, posted, TICK, 0, tsc);
}

fn count(word: &AtomicU32) {
    word.store(word.load(Relaxed).wrapping_add(1), Relaxed);
}

impl ArenaMap {
    pub(crate) fn set_ports(&self, rows: &[PortRow; PORT_ROWS]) {
        let at = offset_of!(Arena, ports) + offset_of!(PortArea, rows);
        // SAFETY: both sides are such rows; the destination is inside the mapping.
        unsafe {
            let to = self.shared().base().as_ptr().add(at);
            crate::shared::copy((&raw const *rows).cast(), to, size_of::<[PortRow; PORT_ROWS]>());
        }
    }

    /// How many port accesses the world says it has answered, ever.
    pub(crate) fn ports_done(&self) -> u32 {
        self.port_word(offset_of!(PortArea, done)).load(Relaxed)
    }

    /// Hands over the writes that wait. At most [`POSTED`] of any content.
    pub(crate) fn take_posted(&self, each: &mut dyn FnMut(PortWrite)) {
        let posted = self.port_word(offset_of!(PortArea, posted));
        let n = (posted.load(Relaxed) as usize).min(POSTED);
        for i in 0..n {
            let at = offset_of!(Arena, ports) + offset_of!(PortArea, log) + 8 * i;
            let word = self.shared().read_u64(at as u64).unwrap_or(0);
            each(PortWrite { port: word as u16, value: (word >> 16) as u8, tsc: word >> 24 });
        }
        if n != 0 {
            posted.store(0, Relaxed);
        }
    }

    /// The atomic word at this offset of the port area.
    fn port_word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= size_of::<PortArea>());
        // SAFETY: the callers pass the offset of an AtomicU32 inside PortArea, so it lies in the mapping, which lives as
        // long as self.
        unsafe {
            AtomicU32::from_ptr(self.shared().base().as_ptr().add(offset_of!(Arena, ports) + offset).cast())
        }
    }
}
