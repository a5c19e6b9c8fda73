//! The world's side of page faults that are the guest's own, and of its timer's interrupt: delivered through the guest's
//! IDT without the monitor.
//!
//! What it does is what the monitor's `trpm` does through a 32-bit interrupt or trap gate to flat ring-0
//! code, from ring 0 or from ring 3 through the TSS (SDM Vol. 3A, 6.12.1). The monitor says by
//! [`DeliveryRules`] what it found in the guest's tables; that it is there still is checked here. Whatever else is the
//! case is left to the monitor, with nothing changed. [`Side`] is what differs between the engines that do it.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::arena::{Arena, vcpu_word};
use super::rc_fill::Ram;
use super::rc_walk::{Tables, walk};
use crate::world::{DeliveryRules, FillRules, HwRegs, Table};

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
/// As [`CPL`].
pub const REFLECTED: u32 = 0x3f8;
/// In [`REFILL`].
pub(crate) const REFILL_WRITE: u32 = 2;
const PF_WRITE: u32 = 2;

/// Encoding order: ES, CS, SS, DS, FS, GS.
const CS: usize = 1;
const SS: usize = 2;
const DATA: [usize; 4] = [0, 3, 4, 5];
const ESP: usize = 4;

/// The arithmetic flags and DF, which are the hardware's own.
pub(crate) const NATIVE: u32 = 0xcd5;
pub(crate) const FIXED: u32 = 2;
pub(crate) const IF: u32 = 0x200;
pub(crate) const IOPL: u32 = 0x3000;
const NT: u32 = 0x4000;
pub(crate) const RF: u32 = 0x1_0000;
/// TF, NT, AC, ID: with one of them set in ring 3 the monitor delivers.
pub(crate) const USER_ONLY: u32 = 0x100 | NT | 0x4_0000 | 0x20_0000;
/// Flags the hardware has while guest code runs: always IF.
const HOST_IF: u32 = IF;

/// Whether the instruction whose bytes `byte` gives (none where there are none) has a CS prefix (SDM Vol. 2A, 2.1.1)
/// among its first four bytes.
pub fn has_cs_prefix(byte: impl FnMut(u32) -> Option<u8>) -> bool {
    (0..4).map_while(byte).take_while(|b| is_prefix(*b)).any(|b| b == 0x2e)
}

/// Whether this byte is a prefix of an instruction (SDM Vol. 2A, 2.1.1).
#[must_use]
pub fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// What the world's side of an engine has to deliver with: guest RAM (also where the guest's tables are), and the vCPU page.
pub(crate) trait Side: Tables {
    /// Writes to this frame are the monitor's business.
    fn is_watched(&self, pfn: u64) -> bool;
    /// Writes an aligned u32 of guest RAM.
    fn write(&self, at: u64, value: u32);
    /// A word of the vCPU page.
    fn get(&self, offset: u32) -> u32;
    /// The same, to write it.
    fn set(&self, offset: u32, value: u32);
}

/// Guest memory by guest linear address, with supervisor rights.
pub(super) struct Guest<'a, S> {
    pub(super) side: &'a S,
    pub(super) rules: &'a FillRules,
}

impl<S: Side> Guest<'_, S> {
    fn at(&self, lin: u32, write: bool) -> Option<u64> {
        let page = walk(self.side, self.rules, lin, write, false)?;
        if !lin.is_multiple_of(4) || write && self.side.is_watched(page.frame >> 12) {
            return None;
        }
        Some(page.frame | u64::from(lin & 0xfff))
    }
    /// An aligned word.
    pub(super) fn read(&self, lin: u32) -> Option<u32> {
        self.side.read(self.at(lin, false)?)
    }
    /// Any byte.
    pub(super) fn byte(&self, lin: u32) -> Option<u8> {
        self.read(lin & !3).map(|word| (word >> (8 * (lin & 3))) as u8)
    }
    /// The instruction at `eip` has a CS prefix: it reads the code view, and what faulted is not what `page_fault` was told.
    pub(super) fn names_cs(&self, eip: u32) -> bool {
        has_cs_prefix(|i| self.byte(eip.wrapping_add(i)))
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
            self.side.write(*at, *value);
        }
        true
    }
    /// The guest's table entry still is what the monitor saw.
    pub(super) fn holds(&self, t: &Table) -> bool {
        self.read(t.at) == Some(t.low) && self.read(t.at.wrapping_add(4)) == Some(t.high)
    }
}

/// What a delivery works with.
pub(super) struct Delivery<'a, S> {
    pub(super) rules: &'a DeliveryRules,
    pub(super) guest: Guest<'a, S>,
    pub(super) regs: HwRegs,
}

/// Number `i` of the words from `offset` on.
fn nth(offset: u32, i: usize) -> u32 {
    offset + 4 * i as u32
}

impl<S: Side> Delivery<'_, S> {
    fn get(&self, offset: u32) -> u32 {
        self.guest.side.get(offset)
    }
    fn set(&self, offset: u32, value: u32) {
        self.guest.side.set(offset, value);
    }
    /// The flags the guest sees that are the hardware's own.
    fn visible(&self) -> u32 {
        self.regs.eflags & NATIVE | FIXED
    }
    /// The guest's tables say what the rules say, and the registers are not a trampoline's.
    fn holds(&self) -> bool {
        let page = self.regs.eip >> 12;
        let ours = self.guest.rules.keep_out.iter().any(|&(first, len)| page.wrapping_sub(first) < len);
        self.rules.ready != 0
            && !ours
            && self.guest.holds(&self.rules.gate)
            && self.guest.holds(&self.rules.cs_descriptor)
    }
    /// Ring 3 was interrupted.
    fn is_from_ring3(&self) -> bool {
        u32::from(self.regs.sel[CS]) == self.guest.rules.user_cs && self.guest.rules.user_cs != 0
    }
    /// The frame of an interruption of ring 3 (EIP, CS, EFLAGS without RF, ESP, SS) and the ESP it lies below.
    fn ring3_frame(&self) -> Option<([u32; 5], u32)> {
        let (rules, regs) = (self.rules, &self.regs);
        let same = |i: &usize| u32::from(regs.sel[*i]) == self.get(nth(HOST_RING3, *i));
        // Ring 3 in the guest's kernel has jumped there, and gets its fault from the monitor.
        let astray = self.guest.rules.users_below != 0 && regs.eip >= self.guest.rules.users_below;
        if rules.from_ring3 == 0
            || astray
            || self.get(CPL) != 3
            || regs.eflags & USER_ONLY != 0
            || u32::from(regs.sel[SS]) != rules.user_ss_host
            || !DATA.iter().all(same)
            || !self.guest.holds(&rules.ss_descriptor)
        {
            return None;
        }
        let esp0 = self.guest.read(rules.tss_esp0)?;
        if self.guest.read(rules.tss_esp0.wrapping_add(4))? & 0xffff != rules.ss {
            return None;
        }
        let flags = self.visible() | self.get(HIDDEN_FLAGS) & IOPL | IF;
        let selector = |i| self.get(nth(SELECTORS, i));
        Some(([regs.eip, selector(CS), flags, regs.gpr[ESP], selector(SS)], esp0))
    }
    /// Ring 0's segments instead of ring 3's.
    fn leave_ring3(&mut self) {
        self.set(nth(SELECTORS, SS), self.rules.ss);
        self.set(CPL, 0);
        self.set(HIDDEN_FLAGS, self.get(HIDDEN_FLAGS) & IOPL);
        self.regs.sel[SS] = self.rules.ss_host as u16;
        for i in DATA {
            self.regs.sel[i] = self.get(nth(HOST_RING0, i)) as u16;
        }
    }
    /// The handler is what runs next, on this stack.
    fn enter(mut self, esp: u32) -> HwRegs {
        self.set(nth(SELECTORS, CS), self.rules.cs);
        self.set(IF_FLAG, self.get(IF_FLAG) & self.rules.if_mask);
        self.regs.eflags = self.visible() | HOST_IF;
        self.regs.sel[CS] = self.rules.cs_host as u16;
        self.regs.gpr[ESP] = esp;
        self.regs.eip = self.rules.target;
        self.regs
    }
    /// See [`interrupt`].
    fn interrupt(self, behind: Option<u32>) -> Option<HwRegs> {
        if !self.holds() || self.get(IF_FLAG) & IF == 0 {
            return None;
        }
        if let Some(eip) = behind {
            let hidden = self.get(HIDDEN_FLAGS);
            let esp = self.regs.gpr[ESP].wrapping_sub(12);
            let frame = [eip, self.get(nth(SELECTORS, CS)), self.visible() | hidden | IF];
            if self.get(CPL) != 0 || hidden & NT != 0 || !self.guest.push(esp, &frame) {
                return None;
            }
            return Some(self.enter(esp));
        }
        let next = self.regs.eip;
        self.interrupt_ring3(next)
    }
    /// Sends ring 3 through the gate for an `int n` behind which is `next`, and yields the registers to go on with. `None`: the
    /// monitor is to do it, and nothing has changed (but A and D bits it sets in any case).
    pub(super) fn software(self, next: u32) -> Option<HwRegs> {
        if self.holds() { self.interrupt_ring3(next) } else { None }
    }
    /// From ring 3, which is to go on at `next`, without an error code. The tables hold.
    fn interrupt_ring3(mut self, next: u32) -> Option<HwRegs> {
        let ([_, cs, flags, user_esp, user_ss], esp0) =
            self.ring3_frame().filter(|_| self.is_from_ring3())?;
        let esp = esp0.wrapping_sub(20);
        if !self.guest.push(esp, &[next, cs, flags, user_esp, user_ss]) {
            return None;
        }
        self.leave_ring3();
        Some(self.enter(esp))
    }
    /// See [`page_fault`].
    pub(super) fn page_fault(mut self, fault: &PageFault) -> Option<HwRegs> {
        let &PageFault { error_code, lin, fetch } = fault;
        if !self.holds() {
            return None;
        }
        let esp;
        if self.is_from_ring3() {
            if !fetch && self.guest.names_cs(self.regs.eip) {
                return None;
            }
            let ([eip, cs, flags, user_esp, user_ss], esp0) = self.ring3_frame()?;
            esp = esp0.wrapping_sub(24);
            if !self.guest.push(esp, &[error_code, eip, cs, flags | RF, user_esp, user_ss]) {
                return None;
            }
            self.leave_ring3();
        } else {
            let hidden = self.get(HIDDEN_FLAGS);
            if self.get(CPL) != 0 || u32::from(self.regs.sel[CS]) != self.rules.cs_host || hidden & NT != 0 {
                return None;
            }
            esp = self.regs.gpr[ESP].wrapping_sub(16);
            let flags = self.visible() | hidden | self.get(IF_FLAG) & IF | RF;
            let cs = self.get(nth(SELECTORS, CS));
            if !self.guest.push(esp, &[error_code, self.regs.eip, cs, flags]) {
                return None;
            }
        }
        self.set(CR2, lin);
        Some(self.enter(esp))
    }
}

/// A page fault the guest is to see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PageFault {
    /// As the guest sees it.
    pub(crate) error_code: u32,
    /// Guest linear.
    pub(crate) lin: u32,
    /// It is about an instruction.
    pub(crate) fetch: bool,
}

/// Delivers a page fault to the guest at `regs`, and yields the registers to go on with. `None`: the monitor is to do it, and
/// nothing has changed (but A and D bits the delivery sets in any case).
pub(crate) fn page_fault<S: Side>(
    side: &S,
    (rules, fill): (&DeliveryRules, &FillRules),
    regs: &HwRegs,
    fault: &PageFault,
) -> Option<HwRegs> {
    Delivery { rules, guest: Guest { side, rules: fill }, regs: *regs }.page_fault(fault)
}

/// The side of a world of `raw`.
pub(super) struct RawSide {
    a: *mut Arena,
    ram: Ram,
}

impl RawSide {
    /// With the rules the guest's tables are walked by, and the registers in the arena.
    ///
    /// # Safety
    /// In a world, `a` is its mapped arena, and the world has the turn.
    pub(super) unsafe fn begin(a: *mut Arena) -> (RawSide, FillRules, HwRegs) {
        // SAFETY: by contract; the monitor writes the rules only when it has the turn, and only we touch the registers.
        unsafe {
            let ram = Ram { pages: (*a).fill.ram_pages.load(Relaxed) };
            let rules = (&raw const (*a).fill.rules).read_volatile();
            (RawSide { a, ram }, rules, (&raw const (*a).regs).read_volatile())
        }
    }
    /// Guest RAM.
    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }
    /// The world goes on with these registers.
    pub(super) fn go_on(&self, regs: HwRegs) {
        // SAFETY: by the contract of `begin`: while the world has the turn only we touch its registers. They are ring 0's.
        unsafe {
            (&raw mut (*self.a).regs).write_volatile(regs);
            (*self.a).pkru.store(super::keys::KERNEL_PKRU, Relaxed);
        }
    }
    /// Counts a page fault of the guest's, and notes which page ring 3 will want when its handler has answered.
    pub(super) fn has_delivered(&self, fault: &PageFault, from_ring3: bool) {
        if from_ring3 && !fault.fetch {
            let write = if fault.error_code & PF_WRITE != 0 { REFILL_WRITE } else { 0 };
            self.set(REFILL, fault.lin & !0xfff | write | 1);
        }
        // SAFETY: by the contract of `begin`: an atomic.
        let delivered = unsafe { &(*self.a).fill.delivered };
        delivered.store(delivered.load(Relaxed).wrapping_add(1), Relaxed);
    }
    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: by the contract of `begin`.
        unsafe { vcpu_word(self.a, offset) }
    }
}

impl Tables for RawSide {
    fn read(&self, at: u64) -> Option<u32> {
        self.ram.read(at)
    }
    fn update(&self, at: u64, old: u32, new: u32) -> bool {
        self.ram.update(at, old, new)
    }
}

impl Side for RawSide {
    fn is_watched(&self, pfn: u64) -> bool {
        self.ram.is_watched(pfn)
    }
    fn write(&self, at: u64, value: u32) {
        if let Some(w) = self.ram.word(at) {
            w.store(value, Relaxed);
        }
    }
    fn get(&self, offset: u32) -> u32 {
        self.word(offset).load(Relaxed)
    }
    fn set(&self, offset: u32, value: u32) {
        self.word(offset).store(value, Relaxed);
    }
}

/// Delivers an external interrupt. `behind`: to ring 0, which is to go on at that guest linear address behind it; else to
/// ring 3 at the EIP in the arena. False: the monitor is to do it, and nothing has changed (but A and D bits, as in
/// [`deliver`]).
///
/// # Safety
/// As [`deliver`]; with `behind`, the registers are those the gate saved.
pub(crate) unsafe fn interrupt(a: *mut Arena, rules: &DeliveryRules, behind: Option<u32>) -> bool {
    // SAFETY: by contract.
    let (side, fill, regs) = unsafe { RawSide::begin(a) };
    let d = Delivery { rules, guest: Guest { side: &side, rules: &fill }, regs };
    let Some(regs) = d.interrupt(behind) else { return false };
    side.go_on(regs);
    true
}

/// Delivers a page fault at guest linear `lin` to the guest, whose registers are in the arena. False: the monitor is to
/// do it, and nothing has changed (but A and D bits the delivery sets in any case).
///
/// # Safety
/// In a world, `a` is its mapped arena with the registers of the interrupted guest code, and the world has the turn.
pub(crate) unsafe fn deliver(a: *mut Arena, error_code: u32, lin: u32, fetch: bool) -> bool {
    // SAFETY: by contract; the monitor writes the rules only when it has the turn.
    let ((side, fill, regs), rules) =
        unsafe { (RawSide::begin(a), (&raw const (*a).delivery).read_volatile()) };
    let d = Delivery { rules: &rules, guest: Guest { side: &side, rules: &fill }, regs };
    let from_ring3 = d.is_from_ring3();
    let fault = PageFault { error_code, lin, fetch };
    let Some(regs) = d.page_fault(&fault) else { return false };
    side.has_delivered(&fault, from_ring3);
    side.go_on(regs);
    true
}
