//! Bit tests and bit scans.

use super::alu::zsp;
use super::{Exec, Flow, Res, mask};
use crate::cpum::eflags;
use host_driver_shim::undefined_flags;
use iced_x86::OpKind;

/// What a bit test does to the bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum BitOp {
    Test,
    Set,
    Reset,
    Complement,
}

impl Exec<'_> {
    pub(super) fn bit_test(&mut self, op: BitOp) -> Res<Flow> {
        let size = self.size(0);
        let bits = u32::from(size) * 8;
        let index = self.get(1)?;
        let bit = 1u32 << (index & (bits - 1));
        if !self.is_mem(0) {
            let v = self.get(0)?;
            self.bit_result(op, v, bit, |e, r| e.put(0, r))?;
            return Ok(Flow::Next);
        }
        let mut at = self.place();
        if self.i.op1_kind() == OpKind::Register {
            // The register is a signed bit index: it reaches beyond the operand (SDM Vol. 1, 3.1.1.9).
            let words = super::sext(index, size) >> bits.trailing_zeros();
            at.off = at.off.wrapping_add((words as u32).wrapping_mul(u32::from(size))) & self.address_mask();
        }
        let v = if op == BitOp::Test { self.load(at, size)? } else { self.load_for_update(at, size)? };
        self.bit_result(op, v, bit, |e, r| e.store(at, size, r))?;
        Ok(Flow::Next)
    }

    fn bit_result(&mut self, op: BitOp, v: u32, bit: u32, write: impl FnOnce(&mut Self, u32) -> Res) -> Res {
        match op {
            BitOp::Test => {}
            BitOp::Set => write(self, v | bit)?,
            BitOp::Reset => write(self, v & !bit)?,
            BitOp::Complement => write(self, v ^ bit)?,
        }
        self.set_flag(eflags::CF, v & bit != 0);
        Ok(())
    }

    /// `bsf` and `bsr`: with a zero source the destination stays (AMD documents it, Intel does it).
    pub(super) fn bit_scan(&mut self, reverse: bool) -> Res<Flow> {
        let size = self.size(0);
        let v = self.get(1)? & mask(size);
        let n = if reverse { v.checked_ilog2().unwrap_or(0) } else { v.trailing_zeros() % 32 };
        if v != 0 {
            self.put(0, n)?;
        }
        let host = undefined_flags::host();
        self.cpu.eflags = host.scan.on(self.cpu.eflags);
        if host.scan_tells_number {
            self.set_flag(eflags::PF, zsp(n, 4) & eflags::PF != 0);
        }
        self.set_flag(eflags::ZF, v == 0);
        Ok(Flow::Next)
    }
}
