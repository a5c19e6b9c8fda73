//! Addition, subtraction, logic and BCD adjustment.

use super::{Exec, Flow, Res, mask, sign};
use crate::cpum::{eflags, gpr};
use crate::trap::Trap;
use host_driver_shim::undefined_flags::{self, Overflow};

/// A two-operand operation whose result goes back to the first operand (`cmp`, `test`: nowhere).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Alu {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Cmp,
    Test,
}

/// ZF, SF and PF of a result.
pub(super) fn zsp(r: u32, size: u8) -> u32 {
    let r = r & mask(size);
    let mut f = 0;
    if r == 0 {
        f |= eflags::ZF;
    }
    if r & sign(size) != 0 {
        f |= eflags::SF;
    }
    if (r as u8).count_ones() & 1 == 0 {
        f |= eflags::PF;
    }
    f
}

/// `a + b + carry` with all six flags.
pub(super) fn add(a: u32, b: u32, carry: bool, size: u8) -> (u32, u32) {
    let m = mask(size);
    let (a, b) = (a & m, b & m);
    let wide = u64::from(a) + u64::from(b) + u64::from(carry);
    let r = wide as u32 & m;
    let mut f = zsp(r, size) | (a ^ b ^ r) & eflags::AF;
    if wide > u64::from(m) {
        f |= eflags::CF;
    }
    if (a ^ r) & (b ^ r) & sign(size) != 0 {
        f |= eflags::OF;
    }
    (r, f)
}

/// `a - b - borrow` with all six flags.
pub(super) fn sub(a: u32, b: u32, borrow: bool, size: u8) -> (u32, u32) {
    let m = mask(size);
    let (a, b) = (a & m, b & m);
    let r = a.wrapping_sub(b).wrapping_sub(u32::from(borrow)) & m;
    let mut f = zsp(r, size) | (a ^ b ^ r) & eflags::AF;
    if u64::from(a) < u64::from(b) + u64::from(borrow) {
        f |= eflags::CF;
    }
    if (a ^ b) & (a ^ r) & sign(size) != 0 {
        f |= eflags::OF;
    }
    (r, f)
}

impl Exec<'_> {
    pub(super) fn set_arith(&mut self, f: u32) {
        self.cpu.eflags = self.cpu.eflags & !eflags::ARITH | f;
    }

    pub(super) fn alu(&mut self, op: Alu) -> Res<Flow> {
        let size = self.size(0);
        let writes = !matches!(op, Alu::Cmp | Alu::Test);
        let a = if writes { self.get_for_update(0)? } else { self.get(0)? };
        let b = self.get(1)?;
        let carry = self.flag(eflags::CF);
        let (r, f) = match op {
            Alu::Add => add(a, b, false, size),
            Alu::Adc => add(a, b, carry, size),
            Alu::Sub | Alu::Cmp => sub(a, b, false, size),
            Alu::Sbb => sub(a, b, carry, size),
            Alu::Or => (a | b, zsp(a | b, size)),
            Alu::And | Alu::Test => (a & b, zsp(a & b, size)),
            Alu::Xor => (a ^ b, zsp(a ^ b, size)),
        };
        if writes {
            self.put(0, r)?;
        }
        self.set_arith(f);
        Ok(Flow::Next)
    }

    /// `inc` and `dec`: CF stays.
    pub(super) fn inc_dec(&mut self, dec: bool) -> Res<Flow> {
        let size = self.size(0);
        let a = self.get_for_update(0)?;
        let (r, f) = if dec { sub(a, 1, false, size) } else { add(a, 1, false, size) };
        self.put(0, r)?;
        let cf = self.cpu.eflags & eflags::CF;
        self.set_arith(f & !eflags::CF | cf);
        Ok(Flow::Next)
    }

    pub(super) fn neg(&mut self) -> Res<Flow> {
        let size = self.size(0);
        let a = self.get_for_update(0)?;
        let (r, f) = sub(0, a, false, size);
        self.put(0, r)?;
        self.set_arith(f);
        Ok(Flow::Next)
    }

    pub(super) fn not(&mut self) -> Res<Flow> {
        let a = self.get_for_update(0)?;
        self.put(0, !a)?;
        Ok(Flow::Next)
    }

    /// `adcx` and `adox`: only CF, or only OF, takes part.
    pub(super) fn add_with_flag(&mut self, bit: u32) -> Res<Flow> {
        let (a, b) = (self.get(0)?, self.get(1)?);
        let wide = u64::from(a) + u64::from(b) + u64::from(self.flag(bit));
        self.put(0, wide as u32)?;
        self.set_flag(bit, wide >> 32 != 0);
        Ok(Flow::Next)
    }

    pub(super) fn xadd(&mut self) -> Res<Flow> {
        let size = self.size(0);
        let a = self.get_for_update(0)?;
        let b = self.get(1)?;
        let (r, f) = add(a, b, false, size);
        if self.is_mem(0) {
            self.put(0, r)?;
            self.put(1, a)?;
        } else {
            self.put(1, a)?;
            self.put(0, r)?;
        }
        self.set_arith(f);
        Ok(Flow::Next)
    }

    pub(super) fn cmpxchg(&mut self) -> Res<Flow> {
        let size = self.size(0);
        let old = self.get_for_update(0)?;
        let new = self.get(1)?;
        let acc = self.gpr_n(gpr::EAX, size);
        let (_, f) = sub(acc, old, false, size);
        if acc == old {
            self.put(0, new)?;
        } else {
            // The destination is written even when the comparison fails (SDM Vol. 2A).
            if self.is_mem(0) {
                self.put(0, old)?;
            }
            self.set_gpr_n(gpr::EAX, size, old);
        }
        self.set_arith(f);
        Ok(Flow::Next)
    }

    pub(super) fn cmpxchg8b(&mut self) -> Res<Flow> {
        let at = self.place();
        let mut b = [0u8; 8];
        self.read_for_update(at, &mut b)?;
        let old = u64::from_le_bytes(b);
        let pair = |hi: u32, lo: u32| u64::from(hi) << 32 | u64::from(lo);
        let r = self.cpu.gpr;
        let equal = pair(r[gpr::EDX], r[gpr::EAX]) == old;
        let new = if equal { pair(r[gpr::ECX], r[gpr::EBX]) } else { old };
        self.write_bytes(at, &new.to_le_bytes())?;
        if !equal {
            self.cpu.gpr[gpr::EAX] = old as u32;
            self.cpu.gpr[gpr::EDX] = (old >> 32) as u32;
        }
        self.set_flag(eflags::ZF, equal);
        Ok(Flow::Next)
    }

    pub(super) fn daa_das(&mut self, subtract: bool) -> Res<Flow> {
        let old = self.gpr_n(gpr::EAX, 1);
        let old_cf = self.flag(eflags::CF);
        let adjust = |v: u32, by: u32| if subtract { v.wrapping_sub(by) } else { v.wrapping_add(by) };
        let mut al = old;
        let (mut cf, mut af) = (false, false);
        if old & 0xf > 9 || self.flag(eflags::AF) {
            let t = adjust(al, 6);
            cf = old_cf || t > 0xff;
            al = t & 0xff;
            af = true;
        }
        if old > 0x99 || old_cf {
            al = adjust(al, 0x60) & 0xff;
            cf = true;
        } else if !subtract {
            cf = false;
        }
        self.set_gpr_n(gpr::EAX, 1, al);
        self.set_arith(zsp(al, 1) | self.overflow_of_decimal());
        self.set_flag(eflags::CF, cf);
        self.set_flag(eflags::AF, af);
        Ok(Flow::Next)
    }

    /// OF after `daa`, `das`, `aaa` and `aas`, which leave it undefined: AMD's CPUs keep it, Intel's clear it. They do not exist in
    /// 64-bit mode, in which our own code could try them, so another habit tells whose CPU this is.
    fn overflow_of_decimal(&self) -> u32 {
        match undefined_flags::host().overflow {
            Overflow::LastStep => self.cpu.eflags & eflags::OF,
            Overflow::FirstStep => 0,
        }
    }

    pub(super) fn aaa_aas(&mut self, subtract: bool) -> Res<Flow> {
        let mut ax = self.gpr_n(gpr::EAX, 2);
        let adjust = ax & 0xf > 9 || self.flag(eflags::AF);
        if adjust {
            ax = if subtract { ax.wrapping_sub(0x106) } else { ax.wrapping_add(0x106) };
        }
        self.set_gpr_n(gpr::EAX, 2, ax & 0xff0f);
        self.set_arith(zsp(ax & 0xf, 1) | self.overflow_of_decimal());
        self.set_flag(eflags::CF, adjust);
        self.set_flag(eflags::AF, adjust);
        Ok(Flow::Next)
    }

    pub(super) fn aam(&mut self) -> Res<Flow> {
        let base = self.get(0)? & 0xff;
        let al = self.gpr_n(gpr::EAX, 1);
        let (Some(ah), Some(al)) = (al.checked_div(base), al.checked_rem(base)) else {
            return Err(Trap::DE);
        };
        self.set_gpr_n(gpr::EAX, 2, ah << 8 | al);
        self.set_arith(zsp(al, 1));
        Ok(Flow::Next)
    }

    pub(super) fn aad(&mut self) -> Res<Flow> {
        let base = self.get(0)? & 0xff;
        let ax = self.gpr_n(gpr::EAX, 2);
        let (r, f) = add(ax & 0xff, (ax >> 8).wrapping_mul(base), false, 1);
        self.set_gpr_n(gpr::EAX, 2, r);
        self.set_arith(f);
        Ok(Flow::Next)
    }
}
