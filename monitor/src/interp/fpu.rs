//! x87, MMX and SSE: the instruction itself runs natively, on the guest's FPU state and a bounce buffer.
//!
//! Control instructions and the memory formats of FPU state are in `fpu_env`. SSE exceptions are masked while the
//! instruction runs; if one the guest has unmasked turns up, its result is dropped and #XM raised. x87 instructions run
//! with the guest's own masks, because an unmasked x87 exception waits for the next x87 instruction anyway.
//!
//! Not exact: PE beside an unmasked SSE overflow or underflow is that of the masked response, and CR0.NE = 0 (external
//! IRQ 13) is treated as NE = 1.

use super::operand::{Access, Place};
use super::{Exec, Flow, Res};
use crate::cpum::{FxState, cr0, cr4, eflags};
use crate::trap::Trap;
use host_driver_shim::native::{self, BOUNCE, NativeError, NativeFpu, NativeRegs};
use iced_x86::{CpuidFeature, Instruction, Mnemonic as M, OpKind};
use std::cell::RefCell;

/// MXCSR: underflow masked.
const MXCSR_UM: u32 = 1 << 11;
/// MXCSR: flush to zero.
const MXCSR_FTZ: u32 = 1 << 15;

thread_local! {
    static NATIVE: RefCell<Option<NativeFpu>> = const { RefCell::new(None) };
}

/// Runs with this thread's native FPU; None when the host refuses one.
pub(super) fn with_native<T>(f: impl FnOnce(&mut NativeFpu) -> T) -> Option<T> {
    NATIVE.with_borrow_mut(|slot| {
        if slot.is_none() {
            match NativeFpu::new() {
                Ok(native) => *slot = Some(native),
                Err(e) => log::error!("no executable memory to run FPU instructions in: {e}"),
            }
        }
        slot.as_mut().map(f)
    })
}

/// Which rules of CR0.EM, CR0.TS and CR4.OSFXSR apply (SDM Vol. 3A, tables 2-2 and 13-1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    X87,
    Mmx,
    Sse,
    /// No FPU state at all (`rdrand`).
    Plain,
}

fn class(i: &Instruction) -> Class {
    let features = i.cpuid_features();
    let x87 = |f: &CpuidFeature| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387);
    let any = |test: fn(iced_x86::Register) -> bool| {
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && test(i.op_register(n)))
    };
    if matches!(i.mnemonic(), M::Rdrand | M::Rdseed) {
        Class::Plain
    } else if i.mnemonic() == M::Fisttp || features.iter().any(x87) {
        Class::X87
    } else if any(|r| r.is_xmm())
        || matches!(i.mnemonic(), M::Cvtpd2pi | M::Cvttpd2pi | M::Cvtps2pi | M::Cvttps2pi)
    {
        Class::Sse
    } else if any(|r| r.is_mm()) || i.mnemonic() == M::Emms {
        // MMX registers only, SSE extensions of MMX included: OSFXSR does not matter.
        Class::Mmx
    } else {
        Class::Sse
    }
}

/// x87 instructions whose memory operand is a destination. (Of SSE and MMX: those with memory as first operand.)
fn stores(i: &Instruction) -> bool {
    match i.mnemonic() {
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp => true,
        _ => i.op0_kind() == OpKind::Memory && i.op_count() > 1,
    }
}

/// SSE instructions that take a 16-byte memory operand at any address.
fn unaligned_ok(m: M) -> bool {
    matches!(
        m,
        // SHA: AMD allows any address, Intel documents #GP.
        M::Sha1msg1
            | M::Sha1msg2
            | M::Sha1nexte
            | M::Sha1rnds4
            | M::Sha256msg1
            | M::Sha256msg2
            | M::Sha256rnds2
            | M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestrm
            | M::Pcmpistri
            | M::Pcmpistrm
    )
}

impl FxState {
    /// A little-endian u16 of the image.
    pub(super) fn u16_at(&self, at: usize) -> u16 {
        match self.0.get(at..at + 2) {
            Some(&[a, b]) => u16::from_le_bytes([a, b]),
            _ => 0,
        }
    }
    /// A little-endian u32 of the image.
    pub(super) fn u32_at(&self, at: usize) -> u32 {
        u32::from(self.u16_at(at)) | u32::from(self.u16_at(at + 2)) << 16
    }
    /// Overwrites bytes of the image.
    pub(super) fn set_bytes(&mut self, at: usize, bytes: &[u8]) {
        if let Some(slot) = self.0.get_mut(at..at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    }
    /// x87 status bits that are set and not masked.
    pub(super) fn unmasked_x87(&self) -> u16 {
        self.u16_at(2) & !self.u16_at(0) & 0x3f
    }
    /// Makes ES and B of the status word follow status and masks (SDM Vol. 1, 8.1.3.3).
    pub(super) fn fix_summary(&mut self) {
        let fsw = self.u16_at(2);
        let fsw = if self.unmasked_x87() != 0 { fsw | 0x8080 } else { fsw & !0x8080 };
        self.set_bytes(2, &fsw.to_le_bytes());
    }
}

impl Exec<'_> {
    /// #UD and #NM by CR0 and CR4.
    pub(super) fn check_fpu(&self, class: Class) -> Res {
        let c = self.cpu.cr0;
        match class {
            Class::Plain => Ok(()),
            Class::X87 if c & (cr0::EM | cr0::TS) != 0 => Err(Trap::NM),
            Class::X87 => Ok(()),
            _ if c & cr0::EM != 0 => Err(Trap::UD),
            Class::Sse if self.cpu.cr4 & cr4::OSFXSR == 0 => Err(Trap::UD),
            _ if c & cr0::TS != 0 => Err(Trap::NM),
            _ => Ok(()),
        }
    }

    /// #MF if an unmasked x87 exception waits.
    pub(super) fn check_pending(&self) -> Res {
        if self.cpu.fpu.unmasked_x87() != 0 { Err(Trap::MF) } else { Ok(()) }
    }

    pub(super) fn fpu(&mut self) -> Res<Flow> {
        match self.i.mnemonic() {
            M::Wait => {
                if self.cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
                    return Err(Trap::NM);
                }
                self.check_pending()?;
                Ok(Flow::Next)
            }
            M::Maskmovq | M::Maskmovdqu => self.mask_move(),
            _ if native::allowed(self.i) => self.run_natively(),
            _ => self.fpu_control(),
        }
    }

    fn run_natively(&mut self) -> Res<Flow> {
        // What the host CPU lacks, the guest's CPU lacks: before anything is looked at.
        if !native::host_has(self.i.code()) {
            return Err(Trap::UD);
        }
        let class = class(self.i);
        self.check_fpu(class)?;
        let uses_mm = (0..self.i.op_count())
            .any(|n| self.i.op_kind(n) == OpKind::Register && self.i.op_register(n).is_mm());
        if matches!(class, Class::X87 | Class::Mmx) || uses_mm {
            self.check_pending()?;
        }
        let has_memory = (0..self.i.op_count()).any(|n| self.is_mem(n));
        let mut regs =
            NativeRegs { gpr: self.cpu.gpr, flags: self.cpu.eflags & eflags::ARITH, memory: [0; BOUNCE] };
        let size = if has_memory { self.i.memory_size().size().min(16) } else { 0 };
        let at = if has_memory { Some(self.fpu_operand(class, size)?) } else { None };
        let store = stores(self.i);
        if let (Some(at), false) = (at, store) {
            let buf = regs.memory.get_mut(..size).unwrap_or_default();
            self.read_bytes_aligned(at, buf, natural(size))?;
        }
        let mut fx = self.cpu.fpu;
        let mxcsr = fx.u32_at(24);
        // The masked run shows in the sticky bits what happened in it and nothing else. Masked, an exact tiny result is no
        // underflow, but unmasked it is: flush-to-zero shows it, and its result is dropped then.
        let flush = if mxcsr & MXCSR_UM == 0 { MXCSR_FTZ } else { mxcsr & MXCSR_FTZ };
        fx.set_bytes(24, &(mxcsr & !(0x3f | MXCSR_FTZ) | 0x1f80 | flush).to_le_bytes());
        match with_native(|native| native.execute(self.i, &mut fx.0, &mut regs)) {
            Some(Ok(())) => {}
            Some(Err(NativeError::Pending)) => return Err(Trap::MF),
            Some(Err(_)) | None => return Err(Trap::UD),
        }
        let raised = fx.u32_at(24) & 0x3f;
        let unmasked = raised & !(mxcsr >> 7) & 0x3f;
        if unmasked != 0 {
            // Invalid, denormal and zero-divide are found before the operation and keep the others from arising.
            let seen = if unmasked & 7 != 0 { raised & 7 } else { raised };
            self.cpu.fpu.set_bytes(24, &(mxcsr | seen).to_le_bytes());
            return Err(if self.cpu.cr4 & cr4::OSXMMEXCPT != 0 { Trap::XM } else { Trap::UD });
        }
        fx.set_bytes(24, &(mxcsr | raised).to_le_bytes());
        // An unmasked invalid, overflow or underflow keeps an x87 store from writing (SDM Vol. 1, 8.5).
        let suppressed = class == Class::X87 && fx.unmasked_x87() & 0x19 != 0;
        if let (Some(at), true) = (at, store) {
            if suppressed {
                let lin = self.linear_aligned(at, size as u32, Access::Write, natural(size))?;
                let privilege = self.privilege();
                self.env.probe_write(self.cpu, lin, size as u32, privilege)?;
            } else {
                let data = regs.memory.get(..size).unwrap_or_default();
                self.write_bytes_aligned(at, data, natural(size))?;
            }
        }
        // Instruction and operand pointers: the guest's, not those of the native run.
        let old = self.cpu.fpu.0;
        fx.set_bytes(6, old.get(6..24).unwrap_or_default());
        if class == Class::X87 {
            fx.set_bytes(8, &u64::from(self.resume.eip).to_le_bytes());
            if let Some(at) = at {
                fx.set_bytes(16, &u64::from(at.off).to_le_bytes());
            }
        }
        self.cpu.fpu = fx;
        self.cpu.gpr = regs.gpr;
        self.set_arith(regs.flags & eflags::ARITH);
        Ok(Flow::Next)
    }

    /// The memory operand, with the 16-byte alignment SSE asks for.
    fn fpu_operand(&self, class: Class, size: usize) -> Res<Place> {
        let at = self.place();
        if class == Class::Sse && size == 16 && !unaligned_ok(self.i.mnemonic()) {
            // Before the limit: CPUs answer #GP where both apply and the segment is SS.
            if self.cpu.seg[at.seg].base.wrapping_add(at.off) & 15 != 0 {
                return Err(Trap::gp(0));
            }
        }
        Ok(at)
    }

    /// `maskmovq` and `maskmovdqu`: stores the bytes whose mask byte has its top bit set, at DS:(E)DI.
    fn mask_move(&mut self) -> Res<Flow> {
        let quad = self.i.mnemonic() == M::Maskmovq;
        self.check_fpu(if quad { Class::Mmx } else { Class::Sse })?;
        if quad {
            self.check_pending()?;
        }
        let narrow = self.i.op0_kind() == OpKind::MemorySegDI;
        let m = if narrow { 0xffff } else { u32::MAX };
        let seg = super::operand::seg_index(self.i.memory_segment());
        let off = self.cpu.gpr[crate::cpum::gpr::EDI] & m;
        let len = if quad { 8 } else { 16 };
        let bytes = |e: &Self, n: u32| {
            let r = e.i.op_register(n).number();
            // MMX registers are physical x87 registers, which the image orders by TOP.
            let at = if quad { 32 + 16 * ((r + 8 - e.cpu.fpu.top()) & 7) } else { 160 + 16 * (r & 7) };
            e.cpu.fpu.0.get(at..at + len).map(<[u8]>::to_vec).unwrap_or_default()
        };
        let (data, select) = (bytes(self, 1), bytes(self, 2));
        if quad {
            self.enter_mmx();
        }
        for (n, (byte, select)) in (0u32..).zip(data.iter().zip(&select)) {
            if select & 0x80 != 0 {
                self.store(Place { seg, off: off.wrapping_add(n) & m }, 1, u32::from(*byte))?;
            }
        }
        Ok(Flow::Next)
    }
}

/// The alignment #AC asks of an FPU operand; none for the 10-byte formats.
fn natural(size: usize) -> u32 {
    if size.is_power_of_two() && size <= 8 { size as u32 } else { 1 }
}
