//! The world's side of page faults that are the guest's own: delivered through the guest's IDT without the monitor.
//!
//! What it does is what the monitor's `trpm` does for a page fault through a 32-bit interrupt or trap gate to flat ring-0
//! code, from ring 0 or from ring 3 through the TSS (SDM Vol. 3A, 6.12.1). The monitor says by
//! [`DeliveryRules`] what it found in the guest's tables; that it is there still is checked here. Whatever else is the
//! case is left to the monitor, with nothing changed.

use std::sync::atomic::Ordering::Relaxed;

use super::arena::{Arena, vcpu_word};
use super::rc_fill::Ram;
use super::rc_walk::{Tables, walk};
use crate::world::{DeliveryRules, FillRules, Table};

/// vCPU page: the same as patm's `vcpu_page` of these names.
pub const CPL: u32 = 0x300;
/// As [`CPL`].
pub const IF_FLAG: u32 = 0x00;
/// As [`CPL`].
pub const HIDDEN_FLAGS: u32 = 0x08;
/// As [`CPL`].
pub const SELECTORS: u32 = 0x10;
/// As [`CPL`].
pub const CR2: u32 = 0x2c;
/// As [`CPL`].
pub const HOST_RING0: u32 = 0x320;
/// As [`CPL`].
pub const HOST_RING3: u32 = 0x340;
/// As [`CPL`]. Guest linear page of the fault last delivered from ring 3, with [`REFILL_WRITE`] if it was a write; bit 0
/// is set, so it is never 0.
pub const REFILL: u32 = 0x3e0;
/// In [`REFILL`].
pub(crate) const REFILL_WRITE: u32 = 2;
const PF_WRITE: u32 = 2;

/// Encoding order: ES, CS, SS, DS, FS, GS.
const CS: usize = 1;
const SS: usize = 2;
const DATA: [usize; 4] = [0, 3, 4, 5];
const ESP: usize = 4;

/// The arithmetic flags and DF, which are the hardware's own.
const NATIVE: u32 = 0xcd5;
const FIXED: u32 = 2;
const IF: u32 = 0x200;
const IOPL: u32 = 0x3000;
const NT: u32 = 0x4000;
const RF: u32 = 0x1_0000;
/// TF, NT, AC, ID: with one of them set in ring 3 the monitor delivers.
const USER_ONLY: u32 = 0x100 | NT | 0x4_0000 | 0x20_0000;
/// Flags the hardware has while guest code runs: always IF.
const HOST_IF: u32 = IF;

/// Whether the instruction whose bytes `byte` gives (none where there are none) has a CS prefix (SDM Vol. 2A, 2.1.1)
/// among its first four bytes.
pub fn has_cs_prefix(byte: impl FnMut(u32) -> Option<u8>) -> bool {
    let prefix =
        |b: &u8| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3);
    (0..4).map_while(byte).take_while(prefix).any(|b| b == 0x2e)
}

/// Guest memory by guest linear address, with supervisor rights.
struct Guest<'a> {
    ram: &'a Ram,
    rules: &'a FillRules,
}

impl Guest<'_> {
    fn at(&self, lin: u32, write: bool) -> Option<u64> {
        let page = walk(self.ram, self.rules, lin, write, false)?;
        if !lin.is_multiple_of(4) || write && self.ram.is_watched(page.frame >> 12) {
            return None;
        }
        Some(page.frame | u64::from(lin & 0xfff))
    }
    fn read(&self, lin: u32) -> Option<u32> {
        self.ram.read(self.at(lin, false)?)
    }
    /// The instruction at `eip` has a CS prefix: it reads the code view, and what faulted is not what `deliver` was told.
    fn names_cs(&self, eip: u32) -> bool {
        let byte = |at: u32| self.read(at & !3).map(|word| (word >> (8 * (at & 3))) as u8);
        has_cs_prefix(|i| byte(eip.wrapping_add(i)))
    }
    /// Writes a frame whose last word is at `esp`; false: nothing is written.
    fn push(&self, esp: u32, frame: &[u32]) -> bool {
        let mut places = [0u64; 6];
        for (i, place) in places.iter_mut().enumerate().take(frame.len()) {
            match self.at(esp.wrapping_add(4 * i as u32), true) {
                Some(at) => *place = at,
                None => return false,
            }
        }
        for (at, value) in places.iter().zip(frame) {
            if let Some(w) = self.ram.word(*at) {
                w.store(*value, Relaxed);
            }
        }
        true
    }
    /// The guest's table entry still is what the monitor saw.
    fn holds(&self, t: &Table) -> bool {
        self.read(t.at) == Some(t.low) && self.read(t.at.wrapping_add(4)) == Some(t.high)
    }
}

/// Delivers an external interrupt to ring 0, which is to go on at guest linear `eip` behind it, by rules like those for
/// page faults. False: the monitor is to do it, and nothing has changed (but A and D bits, as in [`deliver`]).
///
/// # Safety
/// As [`deliver`], with the registers the gate saved.
pub(crate) unsafe fn interrupt(a: *mut Arena, rules: &DeliveryRules, eip: u32) -> bool {
    // SAFETY: by contract; the monitor writes the rules only when it has the turn.
    let (fill, pages) =
        unsafe { ((&raw const (*a).fill.rules).read_volatile(), (*a).fill.ram_pages.load(Relaxed)) };
    // SAFETY: by contract: while the world has the turn only we touch its registers.
    let mut regs = unsafe { (&raw const (*a).regs).read_volatile() };
    // SAFETY: by contract.
    let word = |offset: u32| unsafe { vcpu_word(a, offset) };
    let ram = Ram { pages };
    let guest = Guest { ram: &ram, rules: &fill };
    let (hidden, flag) = (word(HIDDEN_FLAGS).load(Relaxed), word(IF_FLAG).load(Relaxed));
    let known = rules.ready != 0 && guest.holds(&rules.gate) && guest.holds(&rules.cs_descriptor);
    if !known || word(CPL).load(Relaxed) != 0 || hidden & NT != 0 || flag & IF == 0 {
        return false;
    }
    let visible = regs.eflags & NATIVE | FIXED;
    let cs = word(SELECTORS + 4 * CS as u32);
    let esp = regs.gpr[ESP].wrapping_sub(12);
    if !guest.push(esp, &[eip, cs.load(Relaxed), visible | hidden | IF]) {
        return false;
    }
    cs.store(rules.cs, Relaxed);
    word(IF_FLAG).store(flag & rules.if_mask, Relaxed);
    regs.sel[CS] = rules.cs_host as u16;
    regs.gpr[ESP] = esp;
    regs.eip = rules.target;
    regs.eflags = visible | HOST_IF;
    // SAFETY: as above.
    unsafe { (&raw mut (*a).regs).write_volatile(regs) };
    true
}

/// Delivers a page fault at guest linear `lin` to the guest, whose registers are in the arena. False: the monitor is to
/// do it, and nothing has changed (but A and D bits the delivery sets in any case).
///
/// # Safety
/// In a world, `a` is its mapped arena with the registers of the interrupted guest code, and the world has the turn.
pub(crate) unsafe fn deliver(a: *mut Arena, error_code: u32, lin: u32, fetch: bool) -> bool {
    // SAFETY: by contract; the monitor writes the rules only when it has the turn.
    let (rules, fill, pages) = unsafe {
        (
            (&raw const (*a).delivery).read_volatile(),
            (&raw const (*a).fill.rules).read_volatile(),
            (*a).fill.ram_pages.load(Relaxed),
        )
    };
    // SAFETY: by contract: while the world has the turn only we touch its registers.
    let mut regs = unsafe { (&raw const (*a).regs).read_volatile() };
    // SAFETY: by contract.
    let word = |offset: u32| unsafe { vcpu_word(a, offset) };
    let get = |offset: u32| word(offset).load(Relaxed);
    let nth = |offset: u32, i: usize| offset + 4 * i as u32;
    let (ram, from3) = (Ram { pages }, u32::from(regs.sel[CS]) == fill.user_cs && fill.user_cs != 0);
    let guest = Guest { ram: &ram, rules: &fill };
    let page = regs.eip >> 12;
    // In a trampoline the registers are not the guest's.
    let ours = fill.keep_out.iter().any(|&(first, len)| page.wrapping_sub(first) < len);
    if rules.ready == 0 || ours || !guest.holds(&rules.gate) || !guest.holds(&rules.cs_descriptor) {
        return false;
    }
    let hidden = get(HIDDEN_FLAGS);
    let visible = regs.eflags & NATIVE | FIXED;
    let (frame, esp);
    if from3 {
        let same = |i: &usize| u32::from(regs.sel[*i]) == get(nth(HOST_RING3, *i));
        if rules.from_ring3 == 0
            || get(CPL) != 3
            || regs.eflags & USER_ONLY != 0
            || u32::from(regs.sel[SS]) != rules.user_ss_host
            || !DATA.iter().all(same)
            || !guest.holds(&rules.ss_descriptor)
            || !fetch && guest.names_cs(regs.eip)
        {
            return false;
        }
        let (Some(esp0), Some(ss0)) =
            (guest.read(rules.tss_esp0), guest.read(rules.tss_esp0.wrapping_add(4)))
        else {
            return false;
        };
        if ss0 & 0xffff != rules.ss {
            return false;
        }
        let flags = visible | hidden & IOPL | IF | RF;
        frame =
            [error_code, regs.eip, get(nth(SELECTORS, CS)), flags, regs.gpr[ESP], get(nth(SELECTORS, SS))];
        esp = esp0.wrapping_sub(24);
    } else {
        if get(CPL) != 0 || u32::from(regs.sel[CS]) != rules.cs_host || hidden & NT != 0 {
            return false;
        }
        let flags = visible | hidden | get(IF_FLAG) & IF | RF;
        frame = [error_code, regs.eip, get(nth(SELECTORS, CS)), flags, 0, 0];
        esp = regs.gpr[ESP].wrapping_sub(16);
    }
    let words = if from3 { 6 } else { 4 };
    if !guest.push(esp, frame.get(..words).unwrap_or(&[])) {
        return false;
    }
    if from3 {
        word(nth(SELECTORS, SS)).store(rules.ss, Relaxed);
        word(CPL).store(0, Relaxed);
        if !fetch {
            let write = if error_code & PF_WRITE != 0 { REFILL_WRITE } else { 0 };
            word(REFILL).store(lin & !0xfff | write | 1, Relaxed);
        }
        word(HIDDEN_FLAGS).store(hidden & IOPL, Relaxed);
        regs.sel[SS] = rules.ss_host as u16;
        for i in DATA {
            regs.sel[i] = get(nth(HOST_RING0, i)) as u16;
        }
    }
    word(nth(SELECTORS, CS)).store(rules.cs, Relaxed);
    word(IF_FLAG).store(get(IF_FLAG) & rules.if_mask, Relaxed);
    word(CR2).store(lin, Relaxed);
    regs.sel[CS] = rules.cs_host as u16;
    regs.gpr[ESP] = esp;
    regs.eip = rules.target;
    regs.eflags = visible | HOST_IF;
    // SAFETY: as above.
    unsafe {
        (&raw mut (*a).regs).write_volatile(regs);
        let delivered = &(*a).fill.delivered;
        delivered.store(delivered.load(Relaxed).wrapping_add(1), Relaxed);
    }
    true
}
