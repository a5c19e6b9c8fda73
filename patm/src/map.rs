//! The EIP map of one trampoline: what guest state every instruction boundary inside it stands for.
//!
//! A hardware fault or a kick may stop the CPU between any two instructions of a trampoline. The guest must see an
//! instruction boundary of its own code then: before the *commit point* of the instruction being done the state is
//! rolled back to that instruction's start, after it forward to its end. The emitter records a [`Fix`] for each
//! boundary while it emits, so the map cannot disagree with the code.

use crate::vcpu_page as page;
use alloc::vec::Vec;

/// Arithmetic flags `lahf` keeps: SF, ZF, AF, PF, CF.
const LAHF_FLAGS: u32 = 0xd5;
/// EFLAGS.OF.
const OF: u32 = 1 << 11;
/// EFLAGS.IF.
pub(crate) const IF: u32 = 1 << 9;

/// A set of general registers (bit n: register n in encoding order).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RegSet(pub u8);

impl RegSet {
    /// The register numbers in the set, ascending, 0..=7.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..8).filter(move |r| self.0 & (1 << r) != 0)
    }
    pub(crate) fn insert(&mut self, reg: u8) {
        self.0 |= 1 << (reg & 7);
    }
    pub(crate) fn remove(&mut self, reg: u8) {
        self.0 &= !(1 << (reg & 7));
    }
    pub(crate) fn contains(self, reg: u8) -> bool {
        self.0 & (1 << (reg & 7)) != 0
    }
}

/// What is left to do in the vCPU page for an instruction that is already committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Finish {
    /// Nothing.
    #[default]
    Nothing,
    /// `IF_FLAG := SCRATCH_VALUE` (`popf` and `iret`, between the real `popfd` and the store).
    StoreIf,
    /// `SELECTORS[n] := SCRATCH_VALUE` (a segment load, between the real load and the store).
    StoreSelector(u8),
}

/// How to turn the hardware state at one trampoline boundary into guest state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fix {
    /// The guest EIP the fixed state is at, unless `to_target`.
    pub resume: u32,
    /// The guest EIP is in `SCRATCH_TARGET` (an `iret` that has taken effect).
    pub to_target: bool,
    /// Registers whose guest value is in their `SCRATCH` slot.
    pub restore: RegSet,
    /// The guest's arithmetic flags are in `SCRATCH_FLAGS`.
    pub restore_flags: bool,
    /// To be added to ESP (after `restore`).
    pub esp_add: i32,
    /// What is left to do.
    pub finish: Finish,
    /// The instruction that was being done has taken effect: `resume` is behind it (or see `to_target`).
    pub committed: bool,
}

/// u32 access to the vCPU page by offset.
pub trait VcpuWords {
    /// The word at byte offset `offset` (a constant of [`crate::vcpu_page`]).
    fn read(&mut self, offset: u32) -> u32;
    /// Stores a word.
    fn write(&mut self, offset: u32, value: u32);
}

impl Fix {
    /// The state is exactly the guest's, at `eip`.
    pub(crate) fn at(eip: u32) -> Self {
        Self { resume: eip, ..Self::default() }
    }

    /// Turns the hardware state into the guest's: general registers (encoding order), the arithmetic flags in
    /// `eflags` and the vCPU page words. Returns the guest EIP. Selectors are left as the hardware holds them.
    pub fn apply(&self, gpr: &mut [u32; 8], eflags: &mut u32, words: &mut dyn VcpuWords) -> u32 {
        if self.restore_flags {
            let saved = words.read(page::SCRATCH_FLAGS);
            *eflags &= !(LAHF_FLAGS | OF);
            *eflags |= (saved >> 8) & LAHF_FLAGS;
            if saved & 1 != 0 {
                *eflags |= OF;
            }
        }
        for (n, reg) in gpr.iter_mut().enumerate() {
            let n = n as u8;
            if self.restore.contains(n) {
                *reg = words.read(page::SCRATCH + 4 * u32::from(n));
            }
        }
        gpr[4] = gpr[4].wrapping_add_signed(self.esp_add);
        match self.finish {
            Finish::Nothing => {}
            Finish::StoreIf => {
                let value = words.read(page::SCRATCH_VALUE) & IF;
                words.write(page::IF_FLAG, value);
            }
            Finish::StoreSelector(n) => {
                let value = words.read(page::SCRATCH_VALUE) & 0xffff;
                words.write(page::SELECTORS + 4 * u32::from(n), value);
            }
        }
        if self.to_target { words.read(page::SCRATCH_TARGET) } else { self.resume }
    }
}

/// One instruction boundary of a trampoline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Point {
    /// Byte offset in the trampoline.
    pub offset: u32,
    /// What the state there stands for.
    pub fix: Fix,
}

/// Both directions for one trampoline; empty for a trap byte.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EipMap {
    /// Every instruction boundary, ascending.
    pub points: Vec<Point>,
    /// Guest EIP of each instruction of the window, with the trampoline offset that does the same; ascending.
    pub starts: Vec<(u32, u32)>,
}

impl EipMap {
    /// The fix at byte `offset` of the trampoline, if an instruction starts there.
    #[must_use]
    pub fn fix(&self, offset: u32) -> Option<&Fix> {
        let n = self.points.binary_search_by_key(&offset, |p| p.offset).ok()?;
        self.points.get(n).map(|p| &p.fix)
    }

    /// The trampoline offset that does what the guest instruction at `eip` does.
    #[must_use]
    pub fn forward(&self, eip: u32) -> Option<u32> {
        let n = self.starts.binary_search_by_key(&eip, |s| s.0).ok()?;
        self.starts.get(n).map(|s| s.1)
    }
}
