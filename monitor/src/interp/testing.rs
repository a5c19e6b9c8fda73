//! A flat test machine: memory is one array, linear equals physical, ports and MSRs are recorded.

use crate::cpum::{CpuState, SegAttr, Segment, cr0, seg};
use crate::env::{Env, PagingChange, Privilege};
use crate::trap::Trap;
use csam::{GuestLin, GuestPhys};

/// Flat memory from linear address `base`; everything outside it page-faults.
#[derive(Clone, Debug, Default)]
pub struct FlatEnv {
    /// Linear address of the first byte of `memory`.
    pub base: u32,
    /// The memory.
    pub memory: Vec<u8>,
    /// Pages (numbers) that may not be written.
    pub read_only: Vec<u32>,
    /// `out`s in order: port, size, value.
    pub outs: Vec<(u16, u8, u32)>,
    /// What the next `in`s yield, first one first; then zero.
    pub ins: std::collections::VecDeque<u32>,
    /// Paging changes in order.
    pub paging: Vec<PagingChange>,
    /// MSRs that exist.
    pub msrs: std::collections::BTreeMap<u32, u64>,
    /// What `tsc` yields next.
    pub tsc: u64,
    /// The CPU sets the accessed bit in PDPTEs.
    pub marks_pdptes: bool,
}

impl FlatEnv {
    /// Zeroed memory of `len` bytes at `base`.
    #[must_use]
    pub fn new(base: u32, len: usize) -> FlatEnv {
        FlatEnv { base, memory: vec![0; len], ..FlatEnv::default() }
    }

    /// Puts bytes at a linear address.
    ///
    /// # Panics
    /// When they lie outside the memory.
    pub fn put(&mut self, at: u32, bytes: &[u8]) {
        let start = (at - self.base) as usize;
        self.memory[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Bytes at a linear address.
    ///
    /// # Panics
    /// When they lie outside the memory.
    #[must_use]
    pub fn get(&self, at: u32, len: usize) -> &[u8] {
        let start = (at - self.base) as usize;
        &self.memory[start..start + len]
    }

    fn range(&self, at: u32, len: u32, code: u32) -> Result<std::ops::Range<usize>, Trap> {
        for n in 0..len {
            let lin = at.wrapping_add(n);
            let inside = lin.checked_sub(self.base).is_some_and(|o| (o as usize) < self.memory.len());
            if !inside {
                return Err(Trap::pf(code, lin));
            }
            if code & 2 != 0 && self.read_only.contains(&(lin >> 12)) {
                return Err(Trap::pf(code | 1, lin));
            }
        }
        let start = at.wrapping_sub(self.base) as usize;
        Ok(start..start + len as usize)
    }

    fn code(privilege: Privilege, write: bool) -> u32 {
        u32::from(write) << 1 | u32::from(privilege == Privilege::User) << 2
    }
}

impl Env for FlatEnv {
    fn read(
        &mut self,
        _cpu: &CpuState,
        at: GuestLin,
        buf: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Trap> {
        let r = self.range(at.0, buf.len() as u32, Self::code(privilege, false))?;
        buf.copy_from_slice(&self.memory[r]);
        Ok(())
    }
    fn write(
        &mut self,
        _cpu: &CpuState,
        at: GuestLin,
        data: &[u8],
        privilege: Privilege,
    ) -> Result<(), Trap> {
        let r = self.range(at.0, data.len() as u32, Self::code(privilege, true))?;
        self.memory[r].copy_from_slice(data);
        Ok(())
    }
    fn probe_write(
        &mut self,
        _cpu: &CpuState,
        at: GuestLin,
        len: u32,
        privilege: Privilege,
    ) -> Result<(), Trap> {
        self.range(at.0, len, Self::code(privilege, true)).map(|_| ())
    }
    fn fetch(&mut self, cpu: &CpuState, at: GuestLin, buf: &mut [u8]) -> Result<usize, Trap> {
        let code = if cpu.cpl == 3 { 4 } else { 0 };
        let mut n = 0;
        for slot in buf.iter_mut() {
            match self.range(at.0.wrapping_add(n as u32), 1, code) {
                Ok(r) => *slot = self.memory[r.start],
                Err(trap) if n == 0 => return Err(trap),
                Err(_) => break,
            }
            n += 1;
        }
        Ok(n)
    }
    fn port_in(&mut self, _port: u16, _size: u8) -> u32 {
        self.ins.pop_front().unwrap_or(0)
    }
    fn port_out(&mut self, port: u16, size: u8, value: u32) {
        self.outs.push((port, size, value));
    }
    fn tsc(&mut self, _cpu: &CpuState) -> u64 {
        self.tsc += 1;
        self.tsc
    }
    fn cpuid(&mut self, _cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        [leaf, subleaf, 0x6c6c_7566, 0]
    }
    fn rdmsr(&mut self, _cpu: &CpuState, msr: u32) -> Result<u64, Trap> {
        self.msrs.get(&msr).copied().ok_or(Trap::gp(0))
    }
    fn wrmsr(&mut self, _cpu: &mut CpuState, msr: u32, value: u64) -> Result<(), Trap> {
        *self.msrs.get_mut(&msr).ok_or(Trap::gp(0))? = value;
        Ok(())
    }
    fn read_phys(&mut self, at: GuestPhys, buf: &mut [u8]) {
        for (n, slot) in buf.iter_mut().enumerate() {
            *slot = u32::try_from(at.0)
                .ok()
                .and_then(|a| a.checked_sub(self.base))
                .and_then(|o| self.memory.get(o as usize + n).copied())
                .unwrap_or(0xff);
        }
    }
    fn marks_pdptes(&self) -> bool {
        self.marks_pdptes
    }

    fn paging_changed(&mut self, _cpu: &CpuState, change: PagingChange) {
        self.paging.push(change);
    }
}

/// A flat 32-bit protected-mode CPU at a privilege level, with interrupts off.
#[must_use]
pub fn flat_cpu(cpl: u8, eip: u32, esp: u32) -> CpuState {
    let mut cpu = CpuState::reset();
    let dpl = u16::from(cpl) << 5;
    let flat = |selector: u16, kind: u16| Segment {
        selector: selector | u16::from(cpl),
        base: 0,
        limit: u32::MAX,
        attr: SegAttr::from_bits_truncate(0xc90 | kind | dpl),
    };
    cpu.seg = [flat(0x10, 3); 6];
    cpu.seg[seg::CS] = flat(8, 0xb);
    cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
    cpu.cpl = cpl;
    cpu.eip = eip;
    cpu.gpr = [0; 8];
    cpu.gpr[crate::cpum::gpr::ESP] = esp;
    cpu
}

/// A real-mode CPU with all segments at 0.
#[must_use]
pub fn real_cpu(ip: u32, sp: u32) -> CpuState {
    let mut cpu = CpuState::reset();
    cpu.seg = [Segment::real(0); 6];
    cpu.seg[seg::CS].attr = SegAttr::from_bits_truncate(0x9b);
    cpu.gpr = [0; 8];
    cpu.gpr[crate::cpum::gpr::ESP] = sp;
    cpu.eip = ip;
    cpu
}
