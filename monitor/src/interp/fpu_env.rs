//! FPU control words, environments and save areas, in their 16- and 32-bit formats (SDM Vol. 1, 8.1.10 and 10.5).
//!
//! FCS and FDS are stored as zero, as CPUs with CPUID.7.EBX[13] do; the x87 opcode field is zero, too.

use super::fpu::{Class, with_native};
use super::operand::{Access, Place};
use super::{Exec, Flow, Res};
use crate::cpum::{FxState, cr0};
use crate::trap::Trap;
use iced_x86::{Code, Mnemonic as M, OpKind};

/// Offsets in the FXSAVE image.
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const ST0: usize = 32;

impl FxState {
    /// TOP of the status word.
    pub(super) fn top(&self) -> usize {
        usize::from(self.u16_at(FSW) >> 11 & 7)
    }

    /// The 80-bit register `ST(n)`.
    fn st(&self, n: usize) -> [u8; 10] {
        let mut b = [0u8; 10];
        if let Some(bytes) = self.0.get(ST0 + 16 * (n & 7)..ST0 + 16 * (n & 7) + 10) {
            b.copy_from_slice(bytes);
        }
        b
    }

    fn set_st(&mut self, n: usize, v: &[u8]) {
        self.set_bytes(ST0 + 16 * (n & 7), v);
    }

    /// Changes the status word; registers keep their physical places, which the image orders by TOP.
    fn set_fsw(&mut self, fsw: u16) {
        let shift = (usize::from(fsw >> 11 & 7) + 8 - self.top()) & 7;
        let old = self.0;
        for n in 0..8 {
            let from = ST0 + 16 * ((n + shift) & 7);
            self.set_bytes(ST0 + 16 * n, old.get(from..from + 16).unwrap_or_default());
        }
        self.set_bytes(FSW, &fsw.to_le_bytes());
    }

    /// The 16-bit tag word (SDM Vol. 1, 8.1.7), which FXSAVE abridges.
    fn full_tags(&self) -> u16 {
        let mut tags = 0;
        for physical in 0..8 {
            let st = self.st((physical + 8 - self.top()) & 7);
            let exponent = u16::from_le_bytes([st[8], st[9]]) & 0x7fff;
            let zero = st.iter().take(8).all(|b| *b == 0);
            let tag = if self.0[FTW] >> physical & 1 == 0 {
                3
            } else if exponent == 0 && zero {
                1
            } else if exponent == 0 || exponent == 0x7fff || st[7] & 0x80 == 0 {
                2
            } else {
                0
            };
            tags |= tag << (2 * physical);
        }
        tags
    }

    fn set_full_tags(&mut self, tags: u16) {
        let mut abridged = 0;
        for physical in 0..8 {
            if tags >> (2 * physical) & 3 != 3 {
                abridged |= 1 << physical;
            }
        }
        self.0[FTW] = abridged;
    }

    /// FNINIT (SDM Vol. 2A): register contents stay.
    fn init(&mut self) {
        self.set_fsw(0);
        self.set_bytes(FCW, &0x37fu16.to_le_bytes());
        self.set_bytes(FTW, &[0; 20]);
    }
}

impl Exec<'_> {
    /// What every MMX instruction but `emms` does: TOP = 0, all registers valid.
    pub(super) fn enter_mmx(&mut self) {
        // MMX registers are physical registers: the image must not turn with TOP.
        let fsw = self.cpu.fpu.u16_at(FSW);
        self.cpu.fpu.set_fsw(fsw & !0x3800);
        self.cpu.fpu.0[FTW] = 0xff;
    }

    pub(super) fn fpu_control(&mut self) -> Res<Flow> {
        match self.i.mnemonic() {
            M::Fninit
            | M::Fnclex
            | M::Fneni
            | M::Fndisi
            | M::Fnsetpm
            | M::Fldcw
            | M::Fnstcw
            | M::Fnstsw
            | M::Fldenv
            | M::Fnstenv
            | M::Fnsave
            | M::Frstor => {
                self.check_fpu(Class::X87)?;
                self.x87_control()
            }
            M::Fxsave => self.fxsave(),
            M::Fxrstor => self.fxrstor(),
            M::Ldmxcsr => {
                self.check_fpu(Class::Sse)?;
                let v = self.load(self.place(), 4)?;
                self.set_mxcsr(v)?;
                Ok(Flow::Next)
            }
            M::Stmxcsr => {
                self.check_fpu(Class::Sse)?;
                self.store(self.place(), 4, self.cpu.fpu.u32_at(MXCSR))?;
                Ok(Flow::Next)
            }
            _ => Err(Trap::UD),
        }
    }

    fn set_mxcsr(&mut self, v: u32) -> Res {
        if v & !mxcsr_mask() != 0 {
            return Err(Trap::gp(0));
        }
        self.cpu.fpu.set_bytes(MXCSR, &v.to_le_bytes());
        Ok(())
    }

    fn x87_control(&mut self) -> Res<Flow> {
        match self.i.mnemonic() {
            M::Fninit => self.cpu.fpu.init(),
            M::Fnclex => {
                let fsw = self.cpu.fpu.u16_at(FSW) & 0x7f00;
                self.cpu.fpu.set_bytes(FSW, &fsw.to_le_bytes());
            }
            M::Fldcw => {
                self.check_pending()?;
                let v = self.load(self.place(), 2)?;
                self.set_fcw(v as u16);
                self.cpu.fpu.fix_summary();
            }
            M::Fnstcw => self.store(self.place(), 2, u32::from(self.cpu.fpu.u16_at(FCW)))?,
            M::Fnstsw => {
                let v = u32::from(self.cpu.fpu.u16_at(FSW));
                if self.i.op0_kind() == OpKind::Register {
                    self.set_gpr_n(0, 2, v);
                } else {
                    self.store(self.place(), 2, v)?;
                }
            }
            M::Fnstenv => {
                let at = self.place();
                let (image, len) = self.environment();
                self.write_bytes_aligned(at, image.get(..len).unwrap_or_default(), 1)?;
                // All exceptions masked from here on (SDM Vol. 2A "FSTENV").
                let fcw = self.cpu.fpu.u16_at(FCW) | 0x3f;
                self.cpu.fpu.set_bytes(FCW, &fcw.to_le_bytes());
                self.cpu.fpu.fix_summary();
            }
            M::Fldenv => {
                self.check_pending()?;
                let at = self.place();
                let mut image = [0u8; 28];
                let len = self.environment_len();
                self.read_bytes_aligned(at, image.get_mut(..len).unwrap_or_default(), 1)?;
                self.set_environment(&image);
            }
            M::Fnsave => {
                let at = self.place();
                let (image, len) = self.environment();
                let mut area = [0u8; 108];
                area[..28].copy_from_slice(&image);
                for n in 0..8 {
                    if let Some(slot) = area.get_mut(len + 10 * n..len + 10 * n + 10) {
                        slot.copy_from_slice(&self.cpu.fpu.st(n));
                    }
                }
                self.write_bytes_aligned(at, area.get(..len + 80).unwrap_or_default(), 1)?;
                self.cpu.fpu.init();
            }
            M::Frstor => {
                self.check_pending()?;
                let at = self.place();
                let len = self.environment_len();
                let mut area = [0u8; 108];
                self.read_bytes_aligned(at, area.get_mut(..len + 80).unwrap_or_default(), 1)?;
                let mut image = [0u8; 28];
                image.copy_from_slice(&area[..28]);
                self.set_environment(&image);
                for n in 0..8 {
                    let st = area.get(len + 10 * n..len + 10 * n + 10).unwrap_or_default();
                    self.cpu.fpu.set_st(n, st);
                }
            }
            // `fneni`, `fndisi`, `fnsetpm`: no effect since the 387.
            _ => {}
        }
        Ok(Flow::Next)
    }

    /// The control word: bit 6 always reads as one, other reserved bits as zero.
    fn set_fcw(&mut self, v: u16) {
        let v = v & 0x1f3f | 0x40;
        self.cpu.fpu.set_bytes(FCW, &v.to_le_bytes());
    }

    fn environment_len(&self) -> usize {
        match self.i.code() {
            Code::Fldenv_m14byte | Code::Fnstenv_m14byte | Code::Frstor_m94byte | Code::Fnsave_m94byte => 14,
            _ => 28,
        }
    }

    /// The environment in the format of operand size and mode, and its length.
    fn environment(&self) -> ([u8; 28], usize) {
        let fx = &self.cpu.fpu;
        let (ip, dp) = (fx.u32_at(FIP), fx.u32_at(FDP));
        let control = [fx.u16_at(FCW), fx.u16_at(FSW), fx.full_tags()];
        let mut out = [0u8; 28];
        let real = self.cpu.real_addressing();
        if self.environment_len() == 14 {
            let high = |p: u32| if real { (p >> 16 & 0xf) << 12 } else { 0 } as u16;
            let words = control.into_iter().chain([ip as u16, high(ip), dp as u16, high(dp)]);
            for (slot, w) in out.chunks_exact_mut(2).zip(words) {
                slot.copy_from_slice(&w.to_le_bytes());
            }
            return (out, 14);
        }
        let pointers = if real {
            [ip & 0xffff, (ip >> 16) << 12, dp & 0xffff, (dp >> 16) << 12]
        } else {
            [ip, 0, dp, 0xffff_0000]
        };
        // The unused upper halves read as ones.
        let words = control.into_iter().map(|w| u32::from(w) | 0xffff_0000).chain(pointers);
        for (slot, w) in out.chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&w.to_le_bytes());
        }
        (out, 28)
    }

    fn set_environment(&mut self, image: &[u8; 28]) {
        let real = self.cpu.real_addressing();
        let mut w = [0u32; 7];
        if self.environment_len() == 14 {
            for (v, b) in w.iter_mut().zip(image.chunks_exact(2)) {
                *v = b.iter().rev().fold(0, |v, b| v << 8 | u32::from(*b));
            }
        } else {
            for (v, b) in w.iter_mut().zip(image.chunks_exact(4)) {
                *v = b.iter().rev().fold(0, |v, b| v << 8 | u32::from(*b));
            }
        }
        let [fcw, fsw, tags, ip, ip_high, dp, dp_high] = w;
        let (ip, dp) = if real {
            (ip & 0xffff | (ip_high >> 12) << 16, dp & 0xffff | (dp_high >> 12) << 16)
        } else {
            (ip, dp)
        };
        self.set_fcw(fcw as u16);
        self.cpu.fpu.set_fsw(fsw as u16);
        self.cpu.fpu.set_full_tags(tags as u16);
        self.cpu.fpu.set_bytes(6, &[0; 2]);
        self.cpu.fpu.set_bytes(FIP, &u64::from(ip).to_le_bytes());
        self.cpu.fpu.set_bytes(FDP, &u64::from(dp).to_le_bytes());
        self.cpu.fpu.fix_summary();
    }

    /// CR0.EM or TS: #NM; the operand must be 16-byte aligned (SDM Vol. 2A "FXSAVE").
    fn fx_operand(&self, access: Access) -> Res<Place> {
        if self.cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(Trap::NM);
        }
        let at = self.place();
        let lin = self.linear_aligned(at, 512, access, 1)?;
        if lin.0 & 15 != 0 { Err(Trap::gp(0)) } else { Ok(at) }
    }

    /// FXSAVE without REX.W: 32-bit pointers, XMM0-XMM7; the rest of the area is left as it is.
    fn fxsave(&mut self) -> Res<Flow> {
        let at = self.fx_operand(Access::Write)?;
        // All 512 bytes must be writable, though the CPU leaves the last ones alone.
        let lin = self.linear_aligned(at, 512, Access::Write, 1)?;
        let privilege = self.privilege();
        self.env.probe_write(self.cpu, lin, 512, privilege)?;
        let mut image = [0u8; 288];
        if let Some(known) = self.cpu.fpu.0.get(..288) {
            image.copy_from_slice(known);
        }
        image[12..16].fill(0);
        image[20..24].fill(0);
        image[28..32].copy_from_slice(&mxcsr_mask().to_le_bytes());
        self.write_bytes_aligned(at, &image, 1)?;
        Ok(Flow::Next)
    }

    fn fxrstor(&mut self) -> Res<Flow> {
        let at = self.fx_operand(Access::Read)?;
        let mut area = [0u8; 512];
        self.read_bytes_aligned(at, &mut area, 1)?;
        let mut image = [0u8; 288];
        image.copy_from_slice(&area[..288]);
        let [m0, m1, m2, m3] = [image[24], image[25], image[26], image[27]];
        if u32::from_le_bytes([m0, m1, m2, m3]) & !mxcsr_mask() != 0 {
            return Err(Trap::gp(0));
        }
        image[12..16].fill(0);
        image[20..24].fill(0);
        image[5] = 0;
        self.cpu.fpu.set_bytes(0, &image);
        let fcw = self.cpu.fpu.u16_at(FCW);
        self.set_fcw(fcw);
        self.cpu.fpu.fix_summary();
        Ok(Flow::Next)
    }
}

fn mxcsr_mask() -> u32 {
    with_native(|native| native.mxcsr_mask()).unwrap_or(0xffbf)
}
