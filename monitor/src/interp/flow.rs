//! Jumps, calls, returns, loops and software interrupts.

use super::{Exec, Flow, Res};
use crate::cpum::{eflags, gpr, seg};
use crate::trap::{Event, Trap};
use crate::{selm, trpm};
use iced_x86::{Code, OpKind};

impl Exec<'_> {
    /// #GP(0) if a near branch leaves CS.
    fn check_target(&self, target: u32) -> Res {
        if target > self.cpu.seg[seg::CS].limit { Err(Trap::gp(0)) } else { Ok(()) }
    }

    fn jump(&mut self, target: u32) -> Res<Flow> {
        self.check_target(target)?;
        self.cpu.eip = target;
        self.cpu.eflags &= !eflags::RF;
        Ok(Flow::Jumped)
    }

    /// The target of a near branch: immediate, register or memory; 16-bit operands are zero-extended.
    fn near_target(&mut self) -> Res<u32> {
        match self.i.op0_kind() {
            OpKind::NearBranch16 => Ok(u32::from(self.i.near_branch16())),
            OpKind::NearBranch32 => Ok(self.i.near_branch32()),
            _ => self.get(0),
        }
    }

    pub(super) fn jcc(&mut self) -> Res<Flow> {
        if self.condition(self.i.condition_code()) {
            let target = self.near_target()?;
            self.jump(target)
        } else {
            Ok(Flow::Next)
        }
    }

    pub(super) fn jmp(&mut self) -> Res<Flow> {
        let (selector, offset, size) = match self.i.code() {
            Code::Jmp_ptr1616 => (self.i.far_branch_selector(), u32::from(self.i.far_branch16()), 2),
            Code::Jmp_ptr1632 => (self.i.far_branch_selector(), self.i.far_branch32(), 4),
            Code::Jmp_m1616 => self.far_memory(2)?,
            Code::Jmp_m1632 => self.far_memory(4)?,
            _ => {
                let target = self.near_target()?;
                return self.jump(target);
            }
        };
        // A task switch saves the EIP after the jump.
        self.cpu.eip = self.next;
        selm::far_jump(self.cpu, self.env, selector, offset, size)?;
        Ok(Flow::Jumped)
    }

    fn far_memory(&mut self, size: u8) -> Res<(u16, u32, u8)> {
        let (selector, offset) = self.far_pointer(size)?;
        Ok((selector, offset, size))
    }

    pub(super) fn call(&mut self) -> Res<Flow> {
        let (selector, offset, size) = match self.i.code() {
            Code::Call_ptr1616 => (self.i.far_branch_selector(), u32::from(self.i.far_branch16()), 2),
            Code::Call_ptr1632 => (self.i.far_branch_selector(), self.i.far_branch32(), 4),
            Code::Call_m1616 => self.far_memory(2)?,
            Code::Call_m1632 => self.far_memory(4)?,
            _ => {
                let target = self.near_target()?;
                self.check_target(target)?;
                self.push(self.next, self.stack_size())?;
                return self.jump(target);
            }
        };
        self.cpu.eip = self.next;
        selm::far_call(self.cpu, self.env, selector, offset, size)?;
        Ok(Flow::Jumped)
    }

    /// `ret` and `ret imm16`.
    pub(super) fn ret(&mut self, size: u8) -> Res<Flow> {
        let target = self.pop(size)?;
        self.check_target(target)?;
        if self.i.op_count() == 1 {
            let release = u32::from(self.i.immediate16());
            self.set_sp(self.cpu.gpr[gpr::ESP].wrapping_add(release));
        }
        self.jump(target)
    }

    /// `retf` and `retf imm16`.
    pub(super) fn ret_far(&mut self, size: u8) -> Res<Flow> {
        let release = if self.i.op_count() == 1 { self.i.immediate16() } else { 0 };
        self.cpu.eip = self.next;
        selm::far_return(self.cpu, self.env, size, release)?;
        Ok(Flow::Jumped)
    }

    pub(super) fn iret(&mut self, size: u8) -> Res<Flow> {
        // A return from a nested task saves the EIP after the instruction.
        self.cpu.eip = self.next;
        trpm::iret(self.cpu, self.env, size)?;
        Ok(Flow::Jumped)
    }

    /// Size of the count register of `loop` and `jcxz`: the address size.
    fn count_size(&self) -> u8 {
        match self.i.code() {
            Code::Loopne_rel8_16_CX
            | Code::Loopne_rel8_32_CX
            | Code::Loope_rel8_16_CX
            | Code::Loope_rel8_32_CX
            | Code::Loop_rel8_16_CX
            | Code::Loop_rel8_32_CX
            | Code::Jcxz_rel8_16
            | Code::Jcxz_rel8_32 => 2,
            _ => 4,
        }
    }

    /// `loop` (`zf` None), `loope` and `loopne`.
    pub(super) fn loop_(&mut self, zf: Option<bool>) -> Res<Flow> {
        let size = self.count_size();
        let count = self.gpr_n(gpr::ECX, size).wrapping_sub(1);
        self.set_gpr_n(gpr::ECX, size, count);
        let again = self.gpr_n(gpr::ECX, size) != 0 && zf.is_none_or(|want| self.flag(eflags::ZF) == want);
        if again {
            let target = self.near_target()?;
            self.jump(target)
        } else {
            Ok(Flow::Next)
        }
    }

    pub(super) fn jcxz(&mut self) -> Res<Flow> {
        if self.gpr_n(gpr::ECX, self.count_size()) == 0 {
            let target = self.near_target()?;
            self.jump(target)
        } else {
            Ok(Flow::Next)
        }
    }

    pub(super) fn int(&mut self, vector: u8, short_form: bool) -> Res<Flow> {
        Ok(Flow::Raise(Event::Software { vector, short_form }))
    }

    pub(super) fn into(&mut self) -> Res<Flow> {
        if self.flag(eflags::OF) { self.int(4, true) } else { Ok(Flow::Next) }
    }

    /// `icebp`: a #DB trap that checks no gate DPL.
    pub(super) fn int1(&mut self) -> Res<Flow> {
        Ok(Flow::Raise(Event::Exception(Trap::DB)))
    }
}
