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
/// EFLAGS bits that are the hardware's own while guest ring 0 runs: the arithmetic flags and DF.
pub(crate) const NATIVE: u32 = 0xcd5;
/// EFLAGS.IOPL.
pub(crate) const IOPL: u32 = 0x3000;
/// EFLAGS.IF.
pub(crate) const IF: u32 = 1 << 9;
/// The bit of EFLAGS that is always 1.
pub(crate) const FIXED: u32 = 2;

/// The number of CS in encoding order.
pub(crate) const CS: u32 = 1;
/// The number of SS.
pub(crate) const SS: u32 = 2;
/// The numbers of ES, DS, FS and GS.
pub(crate) const DATA_SEGMENTS: [u8; 4] = [0, 3, 4, 5];

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
    /// A general register gets `SCRATCH_FAR` (`lar`, `lsl`, and a far pointer's offset after its selector).
    StoreRegister(u8),
    /// `SELECTORS[segment] := SCRATCH_VALUE`, and the general register gets `SCRATCH_FAR` (`lds` and its like).
    StoreFar {
        /// The segment register.
        segment: u8,
        /// The general register.
        register: u8,
    },
    /// `iret` to ring 3 is committed: everything [`Fix::apply`] says under this name. The vCPU page is read for it
    /// (`HOST_RING3`, `USER_CS`, `USER_SS` and the offsets of `USER_CS_HOST` and `USER_SS_HOST`); the monitor must not
    /// have rewritten it since the world ran, and must look whether the selectors are the ones it had put there.
    EnterUser,
    /// `int n` of ring 3 is committed, the frame is on the ring-0 stack: likewise, with `KERNEL_SS`, `GATE_CS`,
    /// `GATE_IF_MASK` and the offsets of `KERNEL_CS_HOST` and `KERNEL_SS_HOST`.
    EnterKernel,
}

/// How to turn the hardware state at one trampoline boundary into guest state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fix {
    /// The guest EIP the fixed state is at, unless `to_target`.
    pub resume: u32,
    /// The guest EIP is in `SCRATCH_TARGET` (an `iret` that has taken effect).
    pub to_target: bool,
    /// What is restored is in the transit page instead, and so are ESP and EIP of an `iret` to ring 3.
    pub transit: bool,
    /// Registers whose guest value is in their `SCRATCH` slot.
    pub restore: RegSet,
    /// The guest's arithmetic flags are in `SCRATCH_FLAGS`.
    pub restore_flags: bool,
    /// The guest's arithmetic flags and DF are in `SCRATCH_IMAGE`.
    pub restore_image: bool,
    /// To be added to ESP (after `restore`).
    pub esp_add: i32,
    /// To be added to ECX.
    pub count_add: u32,
    /// With ECX 0 the instruction is over: the guest EIP then.
    pub over_at_zero: Option<u32>,
    /// What is left to do.
    pub finish: Finish,
    /// The instruction that was being done has taken effect: `resume` is behind it (or see `to_target`).
    pub committed: bool,
    /// The CPL of the fixed state, 0 or 3; None: what `CPL` says, which in trampolines of ring-0 code is 0.
    pub cpl: Option<u8>,
    /// A page fault here is an access of the processor's own for the delivery or the return (descriptor tables, TSS,
    /// the ring-0 stack): it has supervisor rights whatever the CPL. Once the page is there, the site may be begun
    /// again, or the instruction of the trampoline restarted with the hardware state as it was.
    pub supervisor: bool,
}

/// u32 access to the vCPU page by offset.
pub trait VcpuWords {
    /// The word at byte offset `offset` (a constant of [`crate::vcpu_page`]).
    fn read(&mut self, offset: u32) -> u32;
    /// Stores a word.
    fn write(&mut self, offset: u32, value: u32);
}

fn copy(words: &mut dyn VcpuWords, from: u32, to: u32) {
    let value = words.read(from) & 0xffff;
    words.write(to, value);
}

fn store_register(gpr: &mut [u32; 8], n: u8, words: &mut dyn VcpuWords) {
    let value = words.read(page::SCRATCH_FAR);
    if let Some(register) = gpr.get_mut(usize::from(n)) {
        *register = value;
    }
}

impl Fix {
    /// Turns the hardware state into the guest's: general registers (encoding order), the arithmetic flags and DF in
    /// `eflags`, and in the vCPU page `IF_FLAG`, `HIDDEN_FLAGS`, `SELECTORS` and `CPL`. Returns the guest EIP. What the
    /// segment registers hold follows from `SELECTORS` and `CPL` (`HOST_RING0` and `HOST_RING3` may be stale).
    pub fn apply(&self, gpr: &mut [u32; 8], eflags: &mut u32, words: &mut dyn VcpuWords) -> u32 {
        let at = |usual, transit| if self.transit { transit } else { usual };
        if self.restore_flags {
            let saved = words.read(at(page::SCRATCH_FLAGS, page::TRANSIT_FLAGS));
            *eflags &= !(LAHF_FLAGS | OF);
            *eflags |= (saved >> 8) & LAHF_FLAGS;
            if saved & 1 != 0 {
                *eflags |= OF;
            }
        }
        if self.restore_image {
            *eflags =
                (*eflags & !NATIVE) | (words.read(at(page::SCRATCH_IMAGE, page::TRANSIT_IMAGE)) & NATIVE);
        }
        for (n, reg) in gpr.iter_mut().enumerate() {
            let n = n as u8;
            if self.restore.contains(n) {
                *reg = words.read(at(page::SCRATCH, page::TRANSIT_REGISTERS) + 4 * u32::from(n));
            }
        }
        gpr[4] = gpr[4].wrapping_add_signed(self.esp_add);
        gpr[1] = gpr[1].wrapping_add(self.count_add);
        if let Some(next) = self.over_at_zero.filter(|_| gpr[1] == 0) {
            return next;
        }
        match self.finish {
            Finish::Nothing => {}
            Finish::StoreIf => {
                let value = words.read(page::SCRATCH_VALUE) & IF;
                words.write(page::IF_FLAG, value);
            }
            Finish::StoreSelector(n) => {
                copy(words, page::SCRATCH_VALUE, page::SELECTORS + 4 * u32::from(n));
            }
            Finish::StoreRegister(n) => store_register(gpr, n, words),
            Finish::StoreFar { segment, register } => {
                copy(words, page::SCRATCH_VALUE, page::SELECTORS + 4 * u32::from(segment));
                store_register(gpr, register, words);
            }
            Finish::EnterUser => {
                for n in DATA_SEGMENTS {
                    if words.read(page::HOST_RING3 + 4 * u32::from(n)) == 0 {
                        words.write(page::SELECTORS + 4 * u32::from(n), 0);
                    }
                }
                copy(words, page::USER_CS, page::SELECTORS + 4 * CS);
                copy(words, page::USER_SS, page::SELECTORS + 4 * SS);
                words.write(page::IF_FLAG, IF);
                words.write(page::CPL, 3);
                gpr[4] = words.read(at(page::USER_SS_HOST, page::TRANSIT_STACK));
                return words.read(at(page::USER_CS_HOST, page::TRANSIT_CODE));
            }
            Finish::EnterKernel => {
                copy(words, page::GATE_CS, page::SELECTORS + 4 * CS);
                copy(words, page::KERNEL_SS, page::SELECTORS + 4 * SS);
                let kept = words.read(page::IF_FLAG) & words.read(page::GATE_IF_MASK) & IF;
                words.write(page::IF_FLAG, kept);
                let kept = words.read(page::HIDDEN_FLAGS) & IOPL;
                words.write(page::HIDDEN_FLAGS, kept);
                words.write(page::CPL, 0);
                gpr[4] = words.read(page::KERNEL_SS_HOST);
                return words.read(page::GATE_TARGET);
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
