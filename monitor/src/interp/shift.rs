//! Shifts and rotates.

use super::alu::zsp;
use super::{Exec, Flow, Res, mask, sext, sign};
use crate::cpum::eflags;
use host_driver_shim::undefined_flags::{self, Overflow};
use iced_x86::OpKind;

/// Which shift.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

impl Exec<'_> {
    pub(super) fn shift(&mut self, op: Shift) -> Res<Flow> {
        let size = self.size(0);
        let bits = u32::from(size) * 8;
        let count = self.get(1)? & 31;
        let a = self.get_for_update(0)? & mask(size);
        if count == 0 {
            // Nothing but the access (which is a write to memory) happens.
            self.put(0, a)?;
            return Ok(Flow::Next);
        }
        let msb = |v: u32| v & sign(size) != 0;
        let wide = u64::from(a);
        let old_cf = self.flag(eflags::CF);
        let (r, cf) = match op {
            Shift::Rol => {
                let n = count % bits;
                let r = (wide << n | wide >> (bits - n)) as u32;
                (r, r & 1 != 0)
            }
            Shift::Ror => {
                let n = count % bits;
                let r = (wide >> n | wide << (bits - n)) as u32;
                (r, msb(r))
            }
            Shift::Rcl | Shift::Rcr => {
                // A rotation of bits + 1 bits with CF on top.
                let n = count % (bits + 1);
                let ring = u128::from(wide | u64::from(old_cf) << bits);
                let left = if op == Shift::Rcl { n } else { bits + 1 - n };
                let r = ring << left | ring >> (bits + 1 - left);
                (r as u32, r >> bits & 1 != 0)
            }
            Shift::Shl => {
                let r = wide << count;
                (r as u32, r >> bits & 1 != 0)
            }
            Shift::Shr => (wide.wrapping_shr(count) as u32, wide >> (count - 1) & 1 != 0),
            Shift::Sar => {
                let v = i64::from(sext(a, size));
                ((v >> count) as u32, v >> (count - 1) & 1 != 0)
            }
        };
        let r = r & mask(size);
        self.put(0, r)?;
        // OF is defined for counts of 1 only, where all of these are the same.
        let host = undefined_flags::host();
        let by_constant =
            (self.i.op0_kind(), self.i.op1_kind()) == (OpKind::Register, OpKind::Immediate8) && count != 1;
        let of = match (host.overflow, op) {
            (_, Shift::Rol | Shift::Ror) if by_constant && host.constant_rotates_keep_overflow => {
                self.flag(eflags::OF)
            }
            (Overflow::LastStep, Shift::Rol | Shift::Rcl | Shift::Shl) => msb(r) != cf,
            (Overflow::LastStep, _) => msb(r) != msb(r << 1),
            (_, Shift::Rcl | Shift::Rcr) if count.is_multiple_of(bits + 1) => self.flag(eflags::OF),
            (_, Shift::Rol | Shift::Rcl | Shift::Shl) => msb(a) != msb(a << 1),
            (_, Shift::Ror) => msb(a) != (a & 1 != 0),
            (_, Shift::Rcr) => msb(a) != old_cf,
            (_, Shift::Shr) => msb(a),
            (_, Shift::Sar) => false,
        };
        if matches!(op, Shift::Shl | Shift::Shr | Shift::Sar) {
            self.set_shift_flags(r, size);
        }
        self.set_flag(eflags::CF, cf);
        self.set_flag(eflags::OF, of);
        Ok(Flow::Next)
    }

    /// `shld` and `shrd`.
    pub(super) fn double_shift(&mut self, left: bool) -> Res<Flow> {
        let size = self.size(0);
        let bits = u32::from(size) * 8;
        let count = self.get(2)? & 31;
        let a = self.get_for_update(0)? & mask(size);
        let b = self.get(1)? & mask(size);
        if count == 0 {
            self.put(0, a)?;
            return Ok(Flow::Next);
        }
        // Three copies wide so that 16-bit counts over 16 (undefined) do what most CPUs do: rotate the source back in.
        let (a3, b3) = (u128::from(a), u128::from(b));
        let (r, cf) = if left {
            let ring = a3 << (2 * bits) | b3 << bits | a3;
            let r = (ring << count) >> (2 * bits);
            (r as u32 & mask(size), r >> bits & 1 != 0)
        } else {
            let ring = a3 << (2 * bits) | b3 << bits | a3;
            ((ring >> count) as u32 & mask(size), ring >> (count - 1) & 1 != 0)
        };
        self.put(0, r)?;
        self.set_shift_flags(r, size);
        self.set_flag(eflags::CF, cf);
        // Defined for a count of 1, where it says that the sign has changed, and both are the same.
        let msb = |v: u32| v & sign(size) != 0;
        let of = match (undefined_flags::host().overflow, left) {
            (Overflow::LastStep, true) => msb(r) != cf,
            (Overflow::LastStep, false) => msb(r) != msb(r << 1),
            (Overflow::FirstStep, true) => msb(a) != msb(a << 1),
            (Overflow::FirstStep, false) => msb(a) != (b & 1 != 0),
        };
        self.set_flag(eflags::OF, of);
        Ok(Flow::Next)
    }

    /// SF, ZF and PF of a shift's result; AF is undefined.
    fn set_shift_flags(&mut self, r: u32, size: u8) {
        let af = self.cpu.eflags & eflags::AF;
        self.set_arith(zsp(r, size) | af);
        self.cpu.eflags = undefined_flags::host().shift.on(self.cpu.eflags);
    }
}
