//! Multiplication and division.

use super::alu::zsp;
use super::{Exec, Flow, Res, mask, sext};
use crate::cpum::{eflags, gpr};
use crate::trap::Trap;
use host_driver_shim::undefined_flags;

impl Exec<'_> {
    /// `mul` and the one-operand `imul`.
    pub(super) fn mul(&mut self, signed: bool) -> Res<Flow> {
        let size = self.size(0);
        let b = self.get(0)?;
        let a = self.gpr_n(gpr::EAX, size);
        let product = if signed {
            i64::from(sext(a, size)).wrapping_mul(i64::from(sext(b, size))) as u64
        } else {
            u64::from(a).wrapping_mul(u64::from(b & mask(size)))
        };
        let low = product as u32 & mask(size);
        let overflow =
            if signed { product as i64 != i64::from(sext(low, size)) } else { product != u64::from(low) };
        self.set_double(size, product);
        self.mul_flags(overflow, low, size);
        Ok(Flow::Next)
    }

    /// CF and OF; SF, ZF, AF and PF are undefined.
    fn mul_flags(&mut self, overflow: bool, low: u32, size: u8) {
        let host = undefined_flags::host();
        self.cpu.eflags = host.multiply.on(self.cpu.eflags);
        if host.multiply_tells_product {
            let told = eflags::SF | eflags::PF;
            self.cpu.eflags = self.cpu.eflags & !told | zsp(low, size) & told;
        }
        self.set_flag(eflags::CF, overflow);
        self.set_flag(eflags::OF, overflow);
    }

    /// AX, DX:AX or EDX:EAX.
    fn double(&self, size: u8) -> u64 {
        let r = &self.cpu.gpr;
        match size {
            1 => u64::from(r[gpr::EAX] & 0xffff),
            2 => u64::from(r[gpr::EDX] & 0xffff) << 16 | u64::from(r[gpr::EAX] & 0xffff),
            _ => u64::from(r[gpr::EDX]) << 32 | u64::from(r[gpr::EAX]),
        }
    }

    fn set_double(&mut self, size: u8, v: u64) {
        match size {
            1 => self.set_gpr_n(gpr::EAX, 2, v as u32),
            _ => {
                self.set_gpr_n(gpr::EAX, size, v as u32);
                self.set_gpr_n(gpr::EDX, size, (v >> (u32::from(size) * 8)) as u32);
            }
        }
    }

    /// The two- and three-operand `imul`.
    pub(super) fn imul_truncating(&mut self) -> Res<Flow> {
        let size = self.size(0);
        let (a, b) =
            if self.i.op_count() == 3 { (self.get(1)?, self.get(2)?) } else { (self.get(0)?, self.get(1)?) };
        let product = i64::from(sext(a, size)).wrapping_mul(i64::from(sext(b, size)));
        let low = product as u32 & mask(size);
        self.put(0, low)?;
        self.mul_flags(product != i64::from(sext(low, size)), low, size);
        Ok(Flow::Next)
    }

    pub(super) fn div(&mut self) -> Res<Flow> {
        let size = self.size(0);
        let b = u64::from(self.get(0)? & mask(size));
        let a = self.double(size);
        let (Some(q), Some(r)) = (a.checked_div(b), a.checked_rem(b)) else { return Err(Trap::DE) };
        if q > u64::from(mask(size)) {
            return Err(Trap::DE);
        }
        self.set_double(size, q | r << (u32::from(size) * 8));
        self.cpu.eflags = undefined_flags::host().divide.on(self.cpu.eflags);
        Ok(Flow::Next)
    }

    pub(super) fn idiv(&mut self) -> Res<Flow> {
        let size = self.size(0);
        let b = i64::from(sext(self.get(0)?, size));
        let a = self.double(size);
        let a = match size {
            1 => i64::from(a as i16),
            2 => i64::from(a as i32),
            _ => a as i64,
        };
        let (Some(q), Some(r)) = (a.checked_div(b), a.checked_rem(b)) else { return Err(Trap::DE) };
        if q != i64::from(sext(q as u32, size)) {
            return Err(Trap::DE);
        }
        let m = u64::from(mask(size));
        self.set_double(size, q as u64 & m | (r as u64 & m) << (u32::from(size) * 8));
        self.cpu.eflags = undefined_flags::host().divide.on(self.cpu.eflags);
        Ok(Flow::Next)
    }

    /// `cbw`/`cwde` and `cwd`/`cdq`.
    pub(super) fn extend_acc(&mut self, from: u8, into_dx: bool) -> Res<Flow> {
        let v = sext(self.gpr_n(gpr::EAX, from), from);
        if into_dx {
            self.set_gpr_n(gpr::EDX, from, (v >> 31) as u32);
        } else {
            self.set_gpr_n(gpr::EAX, from * 2, v as u32);
        }
        Ok(Flow::Next)
    }

    /// `crc32` (SDM Vol. 2A): CRC-32C, bits reflected.
    pub(super) fn crc32(&mut self) -> Res<Flow> {
        let size = self.size(1);
        let data = self.get(1)?;
        let mut crc = self.get(0)?;
        for byte in data.to_le_bytes().into_iter().take(usize::from(size)) {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
            }
        }
        self.put(0, crc)?;
        Ok(Flow::Next)
    }

    /// `popcnt`.
    pub(super) fn popcnt(&mut self) -> Res<Flow> {
        let v = self.get(1)?;
        self.put(0, v.count_ones())?;
        self.set_arith(if v == 0 { eflags::ZF } else { 0 });
        Ok(Flow::Next)
    }

    /// `lzcnt` and `tzcnt`.
    pub(super) fn count_zeros(&mut self, leading: bool) -> Res<Flow> {
        let size = self.size(0);
        let bits = u32::from(size) * 8;
        let v = self.get(1)? & mask(size);
        let n = if v == 0 {
            bits
        } else if leading {
            v.leading_zeros() - (32 - bits)
        } else {
            v.trailing_zeros()
        };
        self.put(0, n)?;
        self.cpu.eflags = undefined_flags::host().count.on(self.cpu.eflags);
        self.set_flag(eflags::CF, v == 0);
        self.set_flag(eflags::ZF, n == 0);
        Ok(Flow::Next)
    }
}
