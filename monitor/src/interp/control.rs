//! Control and debug registers.

use super::{Exec, Flow, Res};
use crate::cpum::{cr0, cr4};
use crate::env::PagingChange;
use crate::trap::Trap;
use csam::GuestPhys;
use iced_x86::Register;

/// CR4 bits a guest may set; the others raise #GP(0), as CPUID does not announce them.
pub const CR4_ALLOWED: u32 =
    cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;

/// CR0 bits that exist; writes to the others are ignored.
const CR0_EXIST: u32 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

/// Reserved bits of a present PAE PDPTE (SDM Vol. 3A, table 4-8), for the widest physical address (52 bits).
const PDPTE_RESERVED: u64 = 0xfff0_0000_0000_01e6;
/// Where other levels have the accessed bit.
const PDPTE_ACCESSED: u64 = 0x20;

/// DR6 bits that always read as one (SDM Vol. 3B, figure 17-1).
const DR6_ONES: u32 = 0xffff_0ff0;
/// DR6 bits software can change.
const DR6_WRITABLE: u32 = 0x0000_e00f;
/// DR6.BD: a debug register was accessed while DR7.GD was set.
const DR6_BD: u32 = 1 << 13;
/// DR7.GD.
const DR7_GD: u32 = 1 << 13;
/// DR7 bits that always read as zero.
const DR7_ZEROS: u32 = 0xd800;

impl Exec<'_> {
    pub(super) fn mov_from_control(&mut self, r: Register) -> Res<Flow> {
        let v = if r.is_dr() {
            let n = self.debug_register(r)?;
            self.cpu.dr[n & 7]
        } else {
            let v = match r {
                Register::CR0 => self.cpu.cr0,
                Register::CR2 => self.cpu.cr2,
                Register::CR3 => self.cpu.cr3,
                Register::CR4 => self.cpu.cr4,
                _ => return Err(Trap::UD),
            };
            self.need_cpl0()?;
            v
        };
        self.set_reg(self.i.op0_register(), v);
        Ok(Flow::Next)
    }

    pub(super) fn mov_to_control(&mut self, r: Register) -> Res<Flow> {
        let v = self.get(1)?;
        if r.is_dr() {
            let n = self.debug_register(r)?;
            self.cpu.dr[n & 7] = match n {
                6 => v & DR6_WRITABLE | DR6_ONES,
                7 => v & !DR7_ZEROS | 0x400,
                _ => v,
            };
            return Ok(Flow::Next);
        }
        if !matches!(r, Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4) {
            return Err(Trap::UD);
        }
        self.need_cpl0()?;
        match r {
            Register::CR0 => self.set_cr0(v)?,
            Register::CR2 => self.cpu.cr2 = v,
            Register::CR3 => self.set_cr3(v)?,
            _ => self.set_cr4(v)?,
        }
        Ok(Flow::Next)
    }

    /// The number of an accessible debug register; DR4 and DR5 are DR6 and DR7 unless CR4.DE.
    fn debug_register(&mut self, r: Register) -> Res<usize> {
        let n = (r as usize).wrapping_sub(Register::DR0 as usize);
        let n = match n {
            4 | 5 if self.cpu.cr4 & cr4::DE != 0 => return Err(Trap::UD),
            4 | 5 => n + 2,
            8.. => return Err(Trap::UD),
            _ => n,
        };
        self.need_cpl0()?;
        if self.cpu.dr[7] & DR7_GD != 0 {
            self.cpu.dr[6] |= DR6_BD;
            // Cleared on entry to the handler so that it can use the registers (SDM Vol. 3B, 17.2.4).
            self.cpu.dr[7] &= !DR7_GD;
            return Err(Trap::DB);
        }
        Ok(n)
    }

    /// The PDPTEs for a paging state; #GP(0) on reserved bits.
    fn pdptes(&mut self, cr0: u32, cr3: u32, cr4: u32) -> Res<[u64; 4]> {
        if cr0 & cr0::PG == 0 || cr4 & cr4::PAE == 0 {
            return Ok(self.cpu.pdpte);
        }
        let mut raw = [0u8; 32];
        self.env.read_phys(GuestPhys(u64::from(cr3 & !0x1f)), &mut raw);
        let reserved = PDPTE_RESERVED & !if self.env.marks_pdptes() { PDPTE_ACCESSED } else { 0 };
        let mut out = [0u64; 4];
        for (entry, bytes) in out.iter_mut().zip(raw.chunks_exact(8)) {
            *entry = bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(Trap::gp(0));
            }
        }
        Ok(out)
    }

    pub(super) fn set_cr0(&mut self, v: u32) -> Res {
        let v = v & CR0_EXIST | cr0::ET;
        if v & cr0::PG != 0 && v & cr0::PE == 0 || v & cr0::NW != 0 && v & cr0::CD == 0 {
            return Err(Trap::gp(0));
        }
        let changed = v ^ self.cpu.cr0;
        if changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.cpu.pdpte = self.pdptes(v, self.cpu.cr3, self.cpu.cr4)?;
        }
        self.cpu.cr0 = v;
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.env.paging_changed(self.cpu, PagingChange::Mode);
        }
        Ok(())
    }

    fn set_cr3(&mut self, v: u32) -> Res {
        self.cpu.pdpte = self.pdptes(self.cpu.cr0, v, self.cpu.cr4)?;
        self.cpu.cr3 = v;
        self.env.paging_changed(self.cpu, PagingChange::Cr3);
        Ok(())
    }

    fn set_cr4(&mut self, v: u32) -> Res {
        if v & !CR4_ALLOWED != 0 {
            return Err(Trap::gp(0));
        }
        let changed = v ^ self.cpu.cr4;
        let paging = changed & (cr4::PSE | cr4::PAE | cr4::PGE) != 0;
        if paging {
            self.cpu.pdpte = self.pdptes(self.cpu.cr0, self.cpu.cr3, v)?;
        }
        self.cpu.cr4 = v;
        if paging {
            self.env.paging_changed(self.cpu, PagingChange::Mode);
        }
        Ok(())
    }
}
