//! Privileged and sensitive instructions, ports, and what identifies the CPU.

use super::operand::Access;
use super::{Exec, Flow, Res};
use crate::cpum::{Shadow, TableRegister, cr0, cr4, eflags, gpr};
use crate::env::PagingChange;
use crate::selm;
use crate::trap::Trap;
use csam::GuestLin;
use iced_x86::OpKind;

/// IA32_TSC_AUX, which `rdtscp` returns.
const MSR_TSC_AUX: u32 = 0xc000_0103;

impl Exec<'_> {
    /// `cli` and `sti`: CPL against IOPL in protected and V86 mode (PVI and VME are absent).
    pub(super) fn set_if(&mut self, on: bool) -> Res<Flow> {
        if self.cpu.protected() && self.cpu.cpl > self.cpu.iopl() {
            return Err(Trap::gp(0));
        }
        if on && !self.flag(eflags::IF) {
            self.cpu.shadow = Shadow::Sti;
        }
        self.set_flag(eflags::IF, on);
        Ok(Flow::Next)
    }

    pub(super) fn hlt(&mut self) -> Res<Flow> {
        self.need_cpl0()?;
        self.cpu.halted = true;
        Ok(Flow::Halt)
    }

    pub(super) fn clts(&mut self) -> Res<Flow> {
        self.need_cpl0()?;
        self.cpu.cr0 &= !cr0::TS;
        Ok(Flow::Next)
    }

    /// `invd`, `wbinvd`: memory is coherent already.
    pub(super) fn flush_caches(&mut self) -> Res<Flow> {
        self.need_cpl0()?;
        Ok(Flow::Next)
    }

    pub(super) fn invlpg(&mut self) -> Res<Flow> {
        self.need_cpl0()?;
        let at = self.place();
        let lin = self.cpu.seg[at.seg].base.wrapping_add(at.off);
        self.env.paging_changed(self.cpu, PagingChange::Page(GuestLin(lin)));
        Ok(Flow::Next)
    }

    /// UMIP hides the tables from CPL above 0.
    fn check_umip(&self) -> Res {
        if self.cpu.cr4 & cr4::UMIP != 0 && self.cpu.cpl > 0 { Err(Trap::gp(0)) } else { Ok(()) }
    }

    /// `sgdt`/`sidt`; `short`: 16-bit operand size, whose top base byte is stored as zero (SDM Vol. 2B).
    pub(super) fn store_table(&mut self, idt: bool, short: bool) -> Res<Flow> {
        self.check_umip()?;
        let t = if idt { self.cpu.idtr } else { self.cpu.gdtr };
        let base = if short { t.base & 0xff_ffff } else { t.base };
        let [l0, l1] = t.limit.to_le_bytes();
        let [b0, b1, b2, b3] = base.to_le_bytes();
        self.write_bytes_aligned(self.place(), &[l0, l1, b0, b1, b2, b3], 1)?;
        Ok(Flow::Next)
    }

    /// `lgdt`/`lidt`; `short`: 16-bit operand size takes 24 base bits.
    pub(super) fn load_table(&mut self, idt: bool, short: bool) -> Res<Flow> {
        self.need_cpl0()?;
        let mut b = [0u8; 6];
        self.read_bytes_aligned(self.place(), &mut b, 1)?;
        let [l0, l1, b0, b1, b2, b3] = b;
        let base = u32::from_le_bytes([b0, b1, b2, if short { 0 } else { b3 }]);
        let t = TableRegister { base, limit: u16::from_le_bytes([l0, l1]) };
        if idt {
            self.cpu.idtr = t;
        } else {
            self.cpu.gdtr = t;
        }
        Ok(Flow::Next)
    }

    /// `sldt` and `str`.
    pub(super) fn store_selector(&mut self, tr: bool) -> Res<Flow> {
        self.need_selectors()?;
        self.check_umip()?;
        let v = if tr { self.cpu.tr.selector } else { self.cpu.ldtr.selector };
        self.put(0, u32::from(v))?;
        Ok(Flow::Next)
    }

    /// A selector operand: 16 bits of a register or memory.
    fn selector(&mut self, n: u32) -> Res<u16> {
        let v = match self.i.op_kind(n) {
            OpKind::Memory => self.load(self.place(), 2)?,
            _ => self.get(n)?,
        };
        Ok(v as u16)
    }

    /// `lldt` and `ltr`.
    pub(super) fn load_system_segment(&mut self, tr: bool) -> Res<Flow> {
        self.need_selectors()?;
        self.need_cpl0()?;
        let selector = self.selector(0)?;
        if tr {
            selm::load_tr(self.cpu, self.env, selector)?;
        } else {
            selm::load_ldtr(self.cpu, self.env, selector)?;
        }
        Ok(Flow::Next)
    }

    /// `lar` and `lsl`.
    pub(super) fn load_descriptor_part(&mut self, limit: bool) -> Res<Flow> {
        self.need_selectors()?;
        let selector = self.selector(1)?;
        let v = if limit {
            selm::load_segment_limit(self.cpu, self.env, selector)?
        } else {
            selm::load_access_rights(self.cpu, self.env, selector)?
        };
        if let Some(v) = v {
            self.put(0, v)?;
        }
        self.set_flag(eflags::ZF, v.is_some());
        Ok(Flow::Next)
    }

    /// `verr` and `verw`.
    pub(super) fn verify(&mut self, write: bool) -> Res<Flow> {
        self.need_selectors()?;
        let selector = self.selector(0)?;
        let ok = selm::verify_segment(self.cpu, self.env, selector, write)?;
        self.set_flag(eflags::ZF, ok);
        Ok(Flow::Next)
    }

    pub(super) fn smsw(&mut self) -> Res<Flow> {
        self.check_umip()?;
        let v = self.cpu.cr0;
        if self.is_mem(0) {
            self.store(self.place(), 2, v)?;
        } else {
            self.put(0, v)?;
        }
        Ok(Flow::Next)
    }

    pub(super) fn lmsw(&mut self) -> Res<Flow> {
        self.need_cpl0()?;
        let v = u32::from(self.selector(0)?);
        // PE can be set, not cleared.
        let low = v & (cr0::PE | cr0::MP | cr0::EM | cr0::TS) | self.cpu.cr0 & cr0::PE;
        self.set_cr0(self.cpu.cr0 & !0xf | low)?;
        Ok(Flow::Next)
    }

    pub(super) fn rdtsc(&mut self, with_aux: bool) -> Res<Flow> {
        if self.cpu.cr4 & cr4::TSD != 0 && self.cpu.cpl > 0 {
            return Err(Trap::gp(0));
        }
        let t = self.env.tsc(self.cpu);
        self.cpu.gpr[gpr::EAX] = t as u32;
        self.cpu.gpr[gpr::EDX] = (t >> 32) as u32;
        if with_aux {
            self.cpu.gpr[gpr::ECX] = self.env.rdmsr(self.cpu, MSR_TSC_AUX).unwrap_or(0) as u32;
        }
        Ok(Flow::Next)
    }

    pub(super) fn rdmsr(&mut self) -> Res<Flow> {
        self.need_cpl0()?;
        let v = self.env.rdmsr(self.cpu, self.cpu.gpr[gpr::ECX])?;
        self.cpu.gpr[gpr::EAX] = v as u32;
        self.cpu.gpr[gpr::EDX] = (v >> 32) as u32;
        Ok(Flow::Next)
    }

    pub(super) fn wrmsr(&mut self) -> Res<Flow> {
        self.need_cpl0()?;
        let v = u64::from(self.cpu.gpr[gpr::EDX]) << 32 | u64::from(self.cpu.gpr[gpr::EAX]);
        let msr = self.cpu.gpr[gpr::ECX];
        let efer = self.cpu.msr.efer;
        self.env.wrmsr(self.cpu, msr, v)?;
        if self.cpu.msr.efer != efer {
            self.env.paging_changed(self.cpu, PagingChange::Mode);
        }
        Ok(Flow::Next)
    }

    pub(super) fn cpuid(&mut self) -> Res<Flow> {
        let [a, b, c, d] = self.env.cpuid(self.cpu, self.cpu.gpr[gpr::EAX], self.cpu.gpr[gpr::ECX]);
        let r = &mut self.cpu.gpr;
        (r[gpr::EAX], r[gpr::EBX], r[gpr::ECX], r[gpr::EDX]) = (a, b, c, d);
        Ok(Flow::Next)
    }

    /// The port operand `n`: an immediate byte or DX.
    fn port(&mut self, n: u32) -> Res<u16> {
        match self.i.op_kind(n) {
            OpKind::Register => Ok(self.cpu.gpr[gpr::EDX] as u16),
            _ => Ok(self.get(n)? as u16 & 0xff),
        }
    }

    pub(super) fn port_in(&mut self) -> Res<Flow> {
        let size = self.size(0);
        let port = self.port(1)?;
        selm::check_io(self.cpu, self.env, port, size)?;
        let v = self.env.port_in(port, size);
        self.set_gpr_n(gpr::EAX, size, v);
        Ok(Flow::Next)
    }

    pub(super) fn port_out(&mut self) -> Res<Flow> {
        let size = self.size(1);
        let port = self.port(0)?;
        selm::check_io(self.cpu, self.env, port, size)?;
        let v = self.gpr_n(gpr::EAX, size);
        self.env.port_out(port, size, v);
        Ok(Flow::Next)
    }

    /// `clflush` and friends: the checks of a byte read, no effect.
    pub(super) fn flush_line(&mut self) -> Res<Flow> {
        let lin = self.linear(self.place(), 1, Access::Read)?;
        let privilege = self.privilege();
        self.env.read(self.cpu, lin, &mut [0u8; 1], privilege)?;
        Ok(Flow::Next)
    }
}
