//! Stack instructions: push, pop, their all-register forms, flags, enter and leave.

use super::operand::{Place, seg_index};
use super::{Exec, Flow, Res, mask};
use crate::cpum::{eflags, gpr, seg};
use crate::trap::Trap;
use iced_x86::OpKind;

impl Exec<'_> {
    /// Bytes the instruction moves the stack pointer by, as encoded (2 or 4 for pushes and pops).
    pub(super) fn stack_size(&self) -> u8 {
        if self.i.stack_pointer_increment().unsigned_abs() & 2 != 0 { 2 } else { 4 }
    }

    pub(super) fn push_op(&mut self) -> Res<Flow> {
        let v = self.get(0)?;
        self.push(v, self.stack_size())?;
        Ok(Flow::Next)
    }

    pub(super) fn pop_op(&mut self) -> Res<Flow> {
        let size = self.stack_size();
        if self.i.op0_kind() == OpKind::Register && self.i.op0_register().is_segment_register() {
            let v = self.peek(0, size)?;
            let sp = self.cpu.gpr[gpr::ESP].wrapping_add(u32::from(size));
            // The width of the stack pointer is that of the old stack (SDM Vol. 2B "POP").
            let m = self.stack_mask();
            let flow = self.load_seg(seg_index(self.i.op0_register()), v as u16, true)?;
            let old = self.cpu.gpr[gpr::ESP];
            self.cpu.gpr[gpr::ESP] = old & !m | sp & m;
            return Ok(flow);
        }
        let v = self.pop(size)?;
        // A memory operand addressed by ESP sees the new value; `pop esp` overwrites it.
        self.put(0, v)?;
        Ok(Flow::Next)
    }

    pub(super) fn push_all(&mut self, size: u8) -> Res<Flow> {
        let step = u32::from(size);
        let m = self.stack_mask();
        let sp = self.cpu.gpr[gpr::ESP];
        let low = sp.wrapping_sub(step * 8) & m;
        // One by one from the top: the first push that faults decides CR2.
        for n in 0..8 {
            let v = self.cpu.gpr[n as usize & 7];
            let off = sp.wrapping_sub(step * (n + 1)) & m;
            self.store(Place { seg: seg::SS, off }, size, v)?;
        }
        self.set_sp(low);
        Ok(Flow::Next)
    }

    pub(super) fn pop_all(&mut self, size: u8) -> Res<Flow> {
        let step = u32::from(size);
        let mut new = [0u32; 8];
        for (depth, r) in (0u32..).step_by(usize::from(size)).zip(new.iter_mut().rev()) {
            *r = self.peek(depth, size)?;
        }
        let sp = self.cpu.gpr[gpr::ESP].wrapping_add(step * 8);
        for (n, v) in new.into_iter().enumerate() {
            if n != gpr::ESP {
                self.set_gpr_n(n, size, v);
            }
        }
        self.set_sp(sp);
        Ok(Flow::Next)
    }

    /// V86 with IOPL below 3 may not touch the flags through the stack (VME absent).
    fn check_v86_flags(&self) -> Res {
        if self.cpu.v86() && self.cpu.iopl() < 3 { Err(Trap::gp(0)) } else { Ok(()) }
    }

    pub(super) fn pushf(&mut self, size: u8) -> Res<Flow> {
        self.check_v86_flags()?;
        let v = self.cpu.eflags & !(eflags::VM | eflags::RF) | eflags::FIXED;
        self.push(v, size)?;
        Ok(Flow::Next)
    }

    /// SDM Vol. 2B, table 4-15.
    pub(super) fn popf(&mut self, size: u8) -> Res<Flow> {
        self.check_v86_flags()?;
        let v = self.pop(size)?;
        let mut may = eflags::ARITH | eflags::TF | eflags::DF | eflags::NT | eflags::AC | eflags::ID;
        if self.cpu.cpl <= self.cpu.iopl() || !self.cpu.protected() {
            may |= eflags::IF;
        }
        if self.cpu.cpl == 0 {
            may |= eflags::IOPL;
        }
        may &= mask(size);
        self.cpu.eflags = (self.cpu.eflags & !may | v & may | eflags::FIXED) & !eflags::RF;
        Ok(Flow::Next)
    }

    pub(super) fn enter(&mut self, size: u8) -> Res<Flow> {
        let alloc = u32::from(self.i.immediate16());
        let level = u32::from(self.i.immediate8_2nd()) & 31;
        let m = self.stack_mask();
        let step = u32::from(size);
        let bp = self.gpr_n(gpr::EBP, size);
        self.push(bp, size)?;
        let frame = self.cpu.gpr[gpr::ESP];
        if level > 0 {
            for n in 1..level {
                let off = self.cpu.gpr[gpr::EBP].wrapping_sub(step * n) & m;
                let v = self.load(Place { seg: seg::SS, off }, size)?;
                self.push(v, size)?;
            }
            self.push(frame, size)?;
        }
        let sp = self.cpu.gpr[gpr::ESP].wrapping_sub(alloc);
        // The final stack pointer must be writable (SDM Vol. 2A: a probe without a write).
        let lin = self.linear(Place { seg: seg::SS, off: sp & m }, 1, super::operand::Access::Write)?;
        let privilege = self.privilege();
        self.env.probe_write(self.cpu, lin, 1, privilege)?;
        self.set_gpr_n(gpr::EBP, size, frame);
        self.set_sp(sp);
        Ok(Flow::Next)
    }

    pub(super) fn leave(&mut self, size: u8) -> Res<Flow> {
        self.set_sp(self.cpu.gpr[gpr::EBP]);
        let v = self.pop(size)?;
        self.set_gpr_n(gpr::EBP, size, v);
        Ok(Flow::Next)
    }
}
