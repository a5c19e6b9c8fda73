//! Moves, exchanges, conversions of layout, conditional moves and sets.

use super::operand::{Place, seg_index};
use super::{Exec, Flow, Res, mask, sext};
use crate::cpum::{Shadow, eflags, gpr, seg};
use crate::selm;
use crate::trap::Trap;
use iced_x86::{ConditionCode, OpKind, Register};

impl Exec<'_> {
    pub(super) fn mov(&mut self) -> Res<Flow> {
        let (dst, src) = (self.i.op0_kind(), self.i.op1_kind());
        if dst == OpKind::Register {
            let r = self.i.op0_register();
            if r.is_segment_register() {
                return self.mov_to_seg(seg_index(r));
            }
            if r.is_cr() || r.is_dr() {
                return self.mov_to_control(r);
            }
        }
        if src == OpKind::Register {
            let r = self.i.op1_register();
            if r.is_cr() || r.is_dr() {
                return self.mov_from_control(r);
            }
            if r.is_tr() {
                return Err(Trap::UD);
            }
        }
        if dst == OpKind::Register && self.i.op0_register().is_tr() {
            return Err(Trap::UD);
        }
        let v = self.get(1)?;
        self.put(0, v)?;
        Ok(Flow::Next)
    }

    fn mov_to_seg(&mut self, s: usize) -> Res<Flow> {
        if s == seg::CS {
            return Err(Trap::UD);
        }
        let selector = match self.i.op1_kind() {
            OpKind::Register => self.get(1)?,
            _ => self.load(self.place(), 2)?,
        };
        self.load_seg(s, selector as u16, true)
    }

    /// Loads a segment register; `shadow`: `mov ss` and `pop ss` hold interrupts back, `lss` does not.
    pub(super) fn load_seg(&mut self, s: usize, selector: u16, shadow: bool) -> Res<Flow> {
        selm::load_segment(self.cpu, self.env, s, selector)?;
        if s == seg::SS && shadow {
            self.cpu.shadow = Shadow::MovSs;
        }
        Ok(Flow::Next)
    }

    /// `lds`, `les`, `lfs`, `lgs`, `lss`.
    pub(super) fn load_far_pointer(&mut self, s: usize) -> Res<Flow> {
        let size = self.size_of_far_offset();
        let (selector, offset) = self.far_pointer(size)?;
        self.load_seg(s, selector, false)?;
        self.set_reg(self.i.op0_register(), offset);
        Ok(Flow::Next)
    }

    fn size_of_far_offset(&self) -> u8 {
        self.size(0)
    }

    /// Reads m16:16 or m16:32.
    pub(super) fn far_pointer(&mut self, size: u8) -> Res<(u16, u32)> {
        let at = self.place();
        let mut b = [0u8; 6];
        let n = usize::from(size);
        self.read_bytes_aligned(at, b.get_mut(..n + 2).unwrap_or_default(), u32::from(size))?;
        let [b0, b1, b2, b3, b4, b5] = b;
        Ok(match size {
            2 => (u16::from_le_bytes([b2, b3]), u32::from(u16::from_le_bytes([b0, b1]))),
            _ => (u16::from_le_bytes([b4, b5]), u32::from_le_bytes([b0, b1, b2, b3])),
        })
    }

    pub(super) fn movzx(&mut self) -> Res<Flow> {
        let v = self.get(1)?;
        self.put(0, v)?;
        Ok(Flow::Next)
    }

    pub(super) fn movsx(&mut self) -> Res<Flow> {
        let v = self.get(1)?;
        self.put(0, sext(v, self.size(1)) as u32)?;
        Ok(Flow::Next)
    }

    pub(super) fn lea(&mut self) -> Res<Flow> {
        let v = self.offset();
        self.put(0, v)?;
        Ok(Flow::Next)
    }

    pub(super) fn xchg(&mut self) -> Res<Flow> {
        let (mem, other) = if self.is_mem(1) { (1, 0) } else { (0, 1) };
        let a = self.get_for_update(mem)?;
        let b = self.get(other)?;
        self.put(mem, b)?;
        self.put(other, a)?;
        Ok(Flow::Next)
    }

    pub(super) fn bswap(&mut self) -> Res<Flow> {
        let v = self.get(0)?;
        // A 16-bit operand is undefined; CPUs yield zero.
        let v = if self.size(0) == 2 { 0 } else { v.swap_bytes() };
        self.put(0, v)?;
        Ok(Flow::Next)
    }

    pub(super) fn movbe(&mut self) -> Res<Flow> {
        let v = self.get(1)?;
        let v =
            if self.i.memory_size().size() == 2 { (v as u16).swap_bytes().into() } else { v.swap_bytes() };
        self.put(0, v)?;
        Ok(Flow::Next)
    }

    pub(super) fn xlat(&mut self) -> Res<Flow> {
        let m = if self.i.memory_base().size() == 2 { 0xffff } else { u32::MAX };
        let off = self.cpu.gpr[gpr::EBX].wrapping_add(self.gpr_n(gpr::EAX, 1)) & m;
        let v = self.load(Place { seg: seg_index(self.i.memory_segment()), off }, 1)?;
        self.set_gpr_n(gpr::EAX, 1, v);
        Ok(Flow::Next)
    }

    pub(super) fn lahf(&mut self) -> Res<Flow> {
        let f = self.cpu.eflags & 0xd5 | eflags::FIXED;
        self.set_reg(Register::AH, f);
        Ok(Flow::Next)
    }

    pub(super) fn sahf(&mut self) -> Res<Flow> {
        let ah = self.reg(Register::AH);
        self.cpu.eflags = self.cpu.eflags & !0xd5 | ah & 0xd5 | eflags::FIXED;
        Ok(Flow::Next)
    }

    pub(super) fn salc(&mut self) -> Res<Flow> {
        let v = if self.flag(eflags::CF) { 0xff } else { 0 };
        self.set_gpr_n(gpr::EAX, 1, v);
        Ok(Flow::Next)
    }

    /// The truth of a condition code.
    pub(super) fn condition(&self, cc: ConditionCode) -> bool {
        let f = |b| self.flag(b);
        let less = || f(eflags::SF) != f(eflags::OF);
        match cc {
            ConditionCode::None => true,
            ConditionCode::o => f(eflags::OF),
            ConditionCode::no => !f(eflags::OF),
            ConditionCode::b => f(eflags::CF),
            ConditionCode::ae => !f(eflags::CF),
            ConditionCode::e => f(eflags::ZF),
            ConditionCode::ne => !f(eflags::ZF),
            ConditionCode::be => f(eflags::CF) || f(eflags::ZF),
            ConditionCode::a => !f(eflags::CF) && !f(eflags::ZF),
            ConditionCode::s => f(eflags::SF),
            ConditionCode::ns => !f(eflags::SF),
            ConditionCode::p => f(eflags::PF),
            ConditionCode::np => !f(eflags::PF),
            ConditionCode::l => less(),
            ConditionCode::ge => !less(),
            ConditionCode::le => f(eflags::ZF) || less(),
            ConditionCode::g => !f(eflags::ZF) && !less(),
        }
    }

    /// The source is read whether or not the condition holds.
    pub(super) fn cmov(&mut self) -> Res<Flow> {
        let v = self.get(1)?;
        if self.condition(self.i.condition_code()) {
            self.put(0, v)?;
        }
        Ok(Flow::Next)
    }

    pub(super) fn setcc(&mut self) -> Res<Flow> {
        let v = self.condition(self.i.condition_code());
        self.put(0, u32::from(v))?;
        Ok(Flow::Next)
    }

    pub(super) fn bound(&mut self) -> Res<Flow> {
        let size = self.size(0);
        let index = sext(self.get(0)?, size);
        let at = self.place();
        let mut b = [0u8; 8];
        let n = usize::from(size);
        self.read_bytes_aligned(at, b.get_mut(..2 * n).unwrap_or_default(), u32::from(size))?;
        let both = u64::from_le_bytes(b);
        let lower = sext(both as u32 & mask(size), size);
        let upper = sext((both >> (8 * n)) as u32 & mask(size), size);
        if index < lower || index > upper { Err(Trap::BR) } else { Ok(Flow::Next) }
    }

    pub(super) fn arpl(&mut self) -> Res<Flow> {
        self.need_selectors()?;
        let dst = if self.is_mem(0) { self.load(self.place(), 2)? } else { self.get(0)? };
        let rpl = self.get(1)? & 3;
        let raise = dst & 3 < rpl;
        // Memory is written only when the RPL rises: CPUs take a write fault only then.
        let v = dst & !3 | rpl;
        if raise && self.is_mem(0) {
            self.store(self.place(), 2, v)?;
        } else if raise {
            let r = self.i.op0_register().full_register32() as usize - Register::EAX as usize;
            self.set_gpr_n(r, 2, v);
        }
        self.set_flag(eflags::ZF, raise);
        Ok(Flow::Next)
    }
}
