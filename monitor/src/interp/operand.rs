//! Operands: registers, effective addresses, segment checks, memory reads and writes.

use super::{Exec, Res, mask};
use crate::cpum::{SegAttr, cr0, eflags, gpr, seg};
use crate::trap::Trap;
use csam::GuestLin;
use iced_x86::{OpKind, Register};

/// A memory operand: segment number and offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) seg: usize,
    pub(super) off: u32,
}

/// What an access is going to do, for the checks it needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    Read,
    Write,
}

/// The index into [`crate::cpum::CpuState::seg`] of a segment register.
pub(super) fn seg_index(r: Register) -> usize {
    match r {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

impl Exec<'_> {
    /// Reads an 8, 16 or 32-bit general or a segment register.
    pub(super) fn reg(&self, r: Register) -> u32 {
        let n = r as usize;
        if (Register::EAX as usize..=Register::EDI as usize).contains(&n) {
            self.cpu.gpr[(n - Register::EAX as usize) & 7]
        } else if (Register::AX as usize..=Register::DI as usize).contains(&n) {
            self.cpu.gpr[(n - Register::AX as usize) & 7] & 0xffff
        } else if (Register::AL as usize..=Register::BL as usize).contains(&n) {
            self.cpu.gpr[(n - Register::AL as usize) & 3] & 0xff
        } else if (Register::AH as usize..=Register::BH as usize).contains(&n) {
            self.cpu.gpr[(n - Register::AH as usize) & 3] >> 8 & 0xff
        } else if r.is_segment_register() {
            u32::from(self.cpu.seg[seg_index(r)].selector)
        } else {
            0
        }
    }

    /// Writes an 8, 16 or 32-bit general register.
    pub(super) fn set_reg(&mut self, r: Register, v: u32) {
        let n = r as usize;
        let merge = |old: &mut u32, m: u32, shift: u32| *old = *old & !(m << shift) | (v & m) << shift;
        if (Register::EAX as usize..=Register::EDI as usize).contains(&n) {
            self.cpu.gpr[(n - Register::EAX as usize) & 7] = v;
        } else if (Register::AX as usize..=Register::DI as usize).contains(&n) {
            merge(&mut self.cpu.gpr[(n - Register::AX as usize) & 7], 0xffff, 0);
        } else if (Register::AL as usize..=Register::BL as usize).contains(&n) {
            merge(&mut self.cpu.gpr[(n - Register::AL as usize) & 3], 0xff, 0);
        } else if (Register::AH as usize..=Register::BH as usize).contains(&n) {
            merge(&mut self.cpu.gpr[(n - Register::AH as usize) & 3], 0xff, 8);
        }
    }

    /// Reads AL, AX or EAX (or another register by number), by size.
    pub(super) fn gpr_n(&self, n: usize, size: u8) -> u32 {
        self.cpu.gpr[n & 7] & mask(size)
    }

    /// Writes the low `size` bytes of a general register by number.
    pub(super) fn set_gpr_n(&mut self, n: usize, size: u8, v: u32) {
        let m = mask(size);
        let r = &mut self.cpu.gpr[n & 7];
        *r = *r & !m | v & m;
    }

    /// Whether operand `n` is a memory operand.
    pub(super) fn is_mem(&self, n: u32) -> bool {
        self.i.op_kind(n) == OpKind::Memory
    }

    /// Size of operand `n` in bytes, for registers and memory.
    pub(super) fn size(&self, n: u32) -> u8 {
        match self.i.op_kind(n) {
            OpKind::Register => self.i.op_register(n).size() as u8,
            _ => self.i.memory_size().size() as u8,
        }
    }

    /// The mask of the instruction's address size.
    pub(super) fn address_mask(&self) -> u32 {
        let i = self.i;
        let r = if i.memory_base() != Register::None { i.memory_base() } else { i.memory_index() };
        match r {
            Register::None if i.memory_displ_size() == 2 => 0xffff,
            Register::None => u32::MAX,
            r if r.size() == 2 => 0xffff,
            _ => u32::MAX,
        }
    }

    /// The offset of the memory operand inside its segment.
    pub(super) fn offset(&self) -> u32 {
        let i = self.i;
        let index = match i.memory_index() {
            Register::None => 0,
            r => self.reg(r).wrapping_mul(i.memory_index_scale()),
        };
        let base = match i.memory_base() {
            Register::None => 0,
            r => self.reg(r),
        };
        base.wrapping_add(index).wrapping_add(i.memory_displacement32()) & self.address_mask()
    }

    /// The memory operand.
    pub(super) fn place(&self) -> Place {
        Place { seg: seg_index(self.i.memory_segment()), off: self.offset() }
    }

    /// Applies segmentation (SDM Vol. 3A, 5.3 and 5.5) and the alignment check; `len` is 1..=4096.
    pub(super) fn linear(&self, at: Place, len: u32, access: Access) -> Res<GuestLin> {
        self.linear_aligned(at, len, access, len)
    }

    /// As `linear`, with the alignment the #AC check asks for (1: none).
    pub(super) fn linear_aligned(&self, at: Place, len: u32, access: Access, align: u32) -> Res<GuestLin> {
        let s = &self.cpu.seg[at.seg];
        let fault = if at.seg == seg::SS { Trap::ss(0) } else { Trap::gp(0) };
        let expand_down = s.attr.contains(SegAttr::EXPAND_DOWN) && !s.attr.contains(SegAttr::CODE);
        if !self.cpu.real_addressing() {
            if !s.present() {
                return Err(fault);
            }
            let allowed = match access {
                Access::Read => !s.attr.contains(SegAttr::CODE) || s.attr.contains(SegAttr::RW),
                Access::Write => !s.attr.contains(SegAttr::CODE) && s.attr.contains(SegAttr::RW),
            };
            if !allowed {
                return Err(fault);
            }
        }
        let Some(last) = at.off.checked_add(len.wrapping_sub(1)) else { return Err(fault) };
        let inside = if expand_down {
            at.off > s.limit && last <= if s.big() { u32::MAX } else { 0xffff }
        } else {
            last <= s.limit
        };
        if !inside {
            return Err(fault);
        }
        let lin = s.base.wrapping_add(at.off);
        if self.cpu.cpl == 3
            && self.cpu.cr0 & cr0::AM != 0
            && self.cpu.eflags & eflags::AC != 0
            && align.is_power_of_two()
            && lin & (align - 1) != 0
        {
            return Err(Trap::ac());
        }
        Ok(GuestLin(lin))
    }

    /// Reads bytes from a segment.
    pub(super) fn read_bytes(&mut self, at: Place, buf: &mut [u8]) -> Res {
        self.read_bytes_aligned(at, buf, buf.len() as u32)
    }

    pub(super) fn read_bytes_aligned(&mut self, at: Place, buf: &mut [u8], align: u32) -> Res {
        let lin = self.linear_aligned(at, buf.len() as u32, Access::Read, align)?;
        let privilege = self.privilege();
        self.env.read(self.cpu, lin, buf, privilege)
    }

    /// Writes bytes to a segment.
    pub(super) fn write_bytes(&mut self, at: Place, data: &[u8]) -> Res {
        self.write_bytes_aligned(at, data, data.len() as u32)
    }

    pub(super) fn write_bytes_aligned(&mut self, at: Place, data: &[u8], align: u32) -> Res {
        let lin = self.linear_aligned(at, data.len() as u32, Access::Write, align)?;
        let privilege = self.privilege();
        self.env.write(self.cpu, lin, data, privilege)
    }

    /// Reads 1, 2 or 4 bytes.
    pub(super) fn load(&mut self, at: Place, size: u8) -> Res<u32> {
        let mut b = [0u8; 4];
        self.read_bytes(at, b.get_mut(..usize::from(size)).unwrap_or_default())?;
        Ok(u32::from_le_bytes(b))
    }

    /// Writes 1, 2 or 4 bytes.
    pub(super) fn store(&mut self, at: Place, size: u8, v: u32) -> Res {
        self.write_bytes(at, v.to_le_bytes().get(..usize::from(size)).unwrap_or_default())
    }

    /// Reads bytes that will be written back: every check is that of a write (the page-fault error code says W).
    pub(super) fn read_for_update(&mut self, at: Place, buf: &mut [u8]) -> Res {
        let len = buf.len() as u32;
        let lin = self.linear(at, len, Access::Write)?;
        let privilege = self.privilege();
        let read = self.env.read(self.cpu, lin, buf, privilege);
        if read.is_err() {
            self.env.probe_write(self.cpu, lin, len, privilege)?;
        }
        read
    }

    /// Reads 1, 2 or 4 bytes that will be written back.
    pub(super) fn load_for_update(&mut self, at: Place, size: u8) -> Res<u32> {
        let mut b = [0u8; 4];
        self.read_for_update(at, b.get_mut(..usize::from(size)).unwrap_or_default())?;
        Ok(u32::from_le_bytes(b))
    }

    /// The value of operand `n`, zero-extended from its size; immediates come sign-extended as encoded.
    pub(super) fn get(&mut self, n: u32) -> Res<u32> {
        match self.i.op_kind(n) {
            OpKind::Register => Ok(self.reg(self.i.op_register(n))),
            OpKind::Memory => {
                let size = self.i.memory_size().size() as u8;
                self.load(self.place(), size)
            }
            _ => Ok(self.i.try_immediate(n).unwrap_or(0) as u32),
        }
    }

    /// The value of operand `n`, which will be written back with `put`.
    pub(super) fn get_for_update(&mut self, n: u32) -> Res<u32> {
        if self.is_mem(n) {
            let size = self.i.memory_size().size() as u8;
            self.load_for_update(self.place(), size)
        } else {
            self.get(n)
        }
    }

    /// Writes operand `n`.
    pub(super) fn put(&mut self, n: u32, v: u32) -> Res {
        if self.is_mem(n) {
            let size = self.i.memory_size().size() as u8;
            self.store(self.place(), size, v)
        } else {
            self.set_reg(self.i.op_register(n), v);
            Ok(())
        }
    }

    /// The mask of the stack pointer: SP or ESP by SS.B.
    pub(super) fn stack_mask(&self) -> u32 {
        if self.cpu.seg[seg::SS].big() { u32::MAX } else { 0xffff }
    }

    /// Sets SP or ESP.
    pub(super) fn set_sp(&mut self, v: u32) {
        let m = self.stack_mask();
        let sp = &mut self.cpu.gpr[gpr::ESP];
        *sp = *sp & !m | v & m;
    }

    /// Pushes 2 or 4 bytes.
    pub(super) fn push(&mut self, v: u32, size: u8) -> Res {
        let sp = self.cpu.gpr[gpr::ESP].wrapping_sub(u32::from(size)) & self.stack_mask();
        self.store(Place { seg: seg::SS, off: sp }, size, v)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Reads 2 or 4 bytes at `depth` bytes above the top of the stack, without popping.
    pub(super) fn peek(&mut self, depth: u32, size: u8) -> Res<u32> {
        let off = self.cpu.gpr[gpr::ESP].wrapping_add(depth) & self.stack_mask();
        self.load(Place { seg: seg::SS, off }, size)
    }

    /// Pops 2 or 4 bytes.
    pub(super) fn pop(&mut self, size: u8) -> Res<u32> {
        let v = self.peek(0, size)?;
        self.set_sp(self.cpu.gpr[gpr::ESP].wrapping_add(u32::from(size)));
        Ok(v)
    }
}
