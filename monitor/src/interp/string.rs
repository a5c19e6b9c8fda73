//! String instructions, with and without a repeat prefix.
//!
//! One step does a bounded number of iterations and leaves EIP at the instruction while some are left. After each
//! iteration the checkpoint moves, so a fault leaves ECX, ESI and EDI exactly as far as memory got.

use super::alu::sub;
use super::operand::{Access, Place, seg_index};
use super::{Checkpoint, Exec, Flow, Res};
use crate::cpum::{eflags, gpr, seg};
use crate::selm;
use iced_x86::{OpKind, Register};

/// Which string instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Str {
    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
    Ins,
    Outs,
}

/// Iterations in one step when they go one by one.
const MAX_SINGLE: u32 = 1024;
/// Port accesses in one step: each may cost a device's time.
const MAX_IO: u32 = 256;
/// Bytes moved in one step in bulk.
const MAX_BULK: u32 = 4096;

impl Exec<'_> {
    pub(super) fn string(&mut self, op: Str, size: u8) -> Res<Flow> {
        let address_mask = self.string_address_mask();
        let source = seg_index(match self.i.memory_segment() {
            Register::None => Register::DS,
            r => r,
        });
        let repeated = self.i.has_rep_prefix() || self.i.has_repne_prefix();
        if !repeated {
            self.iteration(op, size, source, address_mask)?;
            return Ok(Flow::Next);
        }
        let compares = matches!(op, Str::Cmps | Str::Scas);
        let mut budget = match op {
            // A single-step trap comes after each iteration.
            _ if self.flag(eflags::TF) || self.env.one_iteration() => 1,
            Str::Ins | Str::Outs => MAX_IO,
            _ => MAX_SINGLE,
        };
        let mut bulk_left = MAX_BULK;
        loop {
            let count = self.cpu.gpr[gpr::ECX] & address_mask;
            if count == 0 {
                return Ok(Flow::Next);
            }
            if budget == 0 {
                return Ok(Flow::Again);
            }
            if budget > 1 && !self.flag(eflags::DF) && matches!(op, Str::Movs | Str::Stos) {
                let done = self.bulk(op, size, source, address_mask, count, bulk_left)?;
                if done > 0 {
                    self.checkpoint_registers();
                    bulk_left = bulk_left.saturating_sub(done * u32::from(size));
                    if bulk_left == 0 {
                        budget = 0;
                    }
                    continue;
                }
            }
            self.iteration(op, size, source, address_mask)?;
            self.set_count(count.wrapping_sub(1), address_mask);
            self.checkpoint_registers();
            budget -= 1;
            if compares && self.flag(eflags::ZF) != self.i.has_rep_prefix() {
                return Ok(Flow::Next);
            }
        }
    }

    /// Keeps registers advanced so far; EFLAGS stay those before the instruction (SDM Vol. 2B "REP").
    fn checkpoint_registers(&mut self) {
        let eflags = self.resume.eflags;
        self.resume = Checkpoint { eflags, ..Checkpoint::of(self.cpu) };
    }

    fn string_address_mask(&self) -> u32 {
        let wide = |k| matches!(k, OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI);
        if wide(self.i.op0_kind()) || (self.i.op_count() > 1 && wide(self.i.op1_kind())) {
            u32::MAX
        } else {
            0xffff
        }
    }

    fn set_count(&mut self, count: u32, m: u32) {
        let r = &mut self.cpu.gpr[gpr::ECX];
        *r = *r & !m | count & m;
    }

    fn advance(&mut self, r: usize, by: u32, m: u32) {
        let by = if self.flag(eflags::DF) { by.wrapping_neg() } else { by };
        let r = &mut self.cpu.gpr[r & 7];
        *r = *r & !m | r.wrapping_add(by) & m;
    }

    fn iteration(&mut self, op: Str, size: u8, source: usize, m: u32) -> Res {
        let src = Place { seg: source, off: self.cpu.gpr[gpr::ESI] & m };
        let dst = Place { seg: seg::ES, off: self.cpu.gpr[gpr::EDI] & m };
        let port = self.cpu.gpr[gpr::EDX] as u16;
        let (mut si, mut di) = (false, false);
        match op {
            Str::Movs => {
                let v = self.load(src, size)?;
                self.store(dst, size, v)?;
                (si, di) = (true, true);
            }
            Str::Cmps => {
                let a = self.load(src, size)?;
                let b = self.load(dst, size)?;
                self.set_arith(sub(a, b, false, size).1);
                (si, di) = (true, true);
            }
            Str::Stos => {
                let v = self.gpr_n(gpr::EAX, size);
                self.store(dst, size, v)?;
                di = true;
            }
            Str::Lods => {
                let v = self.load(src, size)?;
                self.set_gpr_n(gpr::EAX, size, v);
                si = true;
            }
            Str::Scas => {
                let b = self.load(dst, size)?;
                let a = self.gpr_n(gpr::EAX, size);
                self.set_arith(sub(a, b, false, size).1);
                di = true;
            }
            Str::Ins => {
                selm::check_io(self.cpu, self.env, port, size)?;
                // A port must not be read twice: the store has to be sure before it is read.
                let lin = self.linear(dst, u32::from(size), Access::Write)?;
                let privilege = self.privilege();
                self.env.probe_write(self.cpu, lin, u32::from(size), privilege)?;
                let v = self.env.port_in(port, size);
                self.store(dst, size, v)?;
                di = true;
            }
            Str::Outs => {
                selm::check_io(self.cpu, self.env, port, size)?;
                let v = self.load(src, size)?;
                self.env.port_out(port, size, v);
                si = true;
            }
        }
        if si {
            self.advance(gpr::ESI, u32::from(size), m);
        }
        if di {
            self.advance(gpr::EDI, u32::from(size), m);
        }
        Ok(())
    }

    /// Moves or stores as many elements as fit in one page of source and destination; 0 means go one by one.
    ///
    /// Faults are left to the single iteration that meets them: within one page a bulk access either works or fails
    /// as a whole.
    fn bulk(&mut self, op: Str, size: u8, source: usize, m: u32, count: u32, most: u32) -> Res<u32> {
        let step = u32::from(size);
        let src = Place { seg: source, off: self.cpu.gpr[gpr::ESI] & m };
        let dst = Place { seg: seg::ES, off: self.cpu.gpr[gpr::EDI] & m };
        let page_room = |lin: u32| 4096 - (lin & 4095);
        let wrap_room = |off: u32| (m - off).saturating_add(1);
        let Ok(to) = self.linear(dst, step, Access::Write) else { return Ok(0) };
        let mut bytes = most.min(page_room(to.0)).min(wrap_room(dst.off)).min(count.saturating_mul(step));
        let mut from = to;
        if op == Str::Movs {
            let Ok(lin) = self.linear(src, step, Access::Read) else { return Ok(0) };
            from = lin;
            bytes = bytes.min(page_room(from.0)).min(wrap_room(src.off));
            // A destination just ahead of the source repeats what was just written: stay behind it.
            let ahead = to.0.wrapping_sub(from.0);
            if ahead != 0 {
                bytes = bytes.min(ahead);
            }
        }
        let n = bytes / step;
        let len = n * step;
        if n < 2
            || self.linear_aligned(dst, len, Access::Write, step).is_err()
            || (op == Str::Movs && self.linear_aligned(src, len, Access::Read, step).is_err())
        {
            return Ok(0);
        }
        let privilege = self.privilege();
        let mut buffer = [0u8; MAX_BULK as usize];
        let Some(data) = buffer.get_mut(..len as usize) else { return Ok(0) };
        if op == Str::Movs {
            if self.env.read(self.cpu, from, data, privilege).is_err() {
                return Ok(0);
            }
        } else {
            let v = self.cpu.gpr[gpr::EAX].to_le_bytes();
            for slot in data.chunks_exact_mut(usize::from(size)) {
                slot.copy_from_slice(v.get(..usize::from(size)).unwrap_or_default());
            }
        }
        if self.env.write(self.cpu, to, data, privilege).is_err() {
            return Ok(0);
        }
        if op == Str::Movs {
            self.advance(gpr::ESI, len, m);
        }
        self.advance(gpr::EDI, len, m);
        self.set_count(count.wrapping_sub(n), m);
        Ok(n)
    }
}
