//! What the interpreter, SELM and TRPM ask of the machine around the CPU.
//!
//! PGM, IOM, TM and the CPUID/MSR policy answer in the real machine; tests answer with a flat array.

use crate::cpum::CpuState;
use crate::trap::Trap;
use csam::GuestLin;
use iced_x86::Instruction;

/// On whose behalf memory is accessed: decides U/S checks (SDM Vol. 3A, 4.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privilege {
    /// CPL 3 access.
    User,
    /// CPL 0..=2, or an implicit supervisor access (descriptor tables, TSS) at any CPL.
    Supervisor,
}

/// What the guest changed in its paging state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PagingChange {
    /// CR0.PG, CR0.WP or CR0.PE changed, or CR4.PSE/PAE/PGE, or EFER.NXE: every translation may go, global ones too.
    Mode,
    /// CR3 was loaded (same value or not): non-global translations may go.
    Cr3,
    /// `invlpg`.
    Page(GuestLin),
}

/// The machine around one virtual CPU.
pub trait Env {
    /// Reads guest linear memory, all of `buf` or nothing visible. A page fault comes back as `Trap::pf` with the right
    /// error code and the exact first faulting address. MMIO is served. May cross a page.
    fn read(
        &mut self,
        cpu: &CpuState,
        at: GuestLin,
        buf: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Trap>;
    /// Writes guest linear memory; if any byte cannot be written, none is.
    fn write(&mut self, cpu: &CpuState, at: GuestLin, data: &[u8], privilege: Privilege) -> Result<(), Trap>;
    /// Checks that `len` bytes could be written (sets A/D as the write would), without writing.
    fn probe_write(
        &mut self,
        cpu: &CpuState,
        at: GuestLin,
        len: u32,
        privilege: Privilege,
    ) -> Result<(), Trap>;
    /// Fetches up to `buf.len()` (at most 15) instruction bytes at CPL's privilege; returns how many could be fetched
    /// before a page that faults. The trap is returned only if not even one byte could be fetched.
    fn fetch(&mut self, cpu: &CpuState, at: GuestLin, buf: &mut [u8]) -> Result<usize, Trap>;
    /// The instruction at CS:EIP, if it is remembered and its bytes have not changed since.
    fn decoded(&mut self, _cpu: &CpuState) -> Option<Instruction> {
        None
    }
    /// The instruction at CS:EIP, if it is remembered to have been decoded from just these bytes: `got` of them were
    /// fetched, zeroes are behind.
    fn decoded_from(&mut self, _cpu: &CpuState, _bytes: &[u8; 16], _got: usize) -> Option<Instruction> {
        None
    }
    /// The bytes just fetched at CS:EIP are this instruction.
    fn remember_decoded(&mut self, _cpu: &CpuState, _bytes: &[u8; 16], _instruction: &Instruction) {}
    /// The page fault a fetch of the byte at `at` would raise, if any.
    fn fetch_fault(&mut self, cpu: &CpuState, at: GuestLin) -> Option<Trap> {
        let mut b = [0u8; 1];
        self.fetch(cpu, at, &mut b).err()
    }
    /// Repeated string instructions do one iteration in a step.
    fn one_iteration(&self) -> bool {
        false
    }
    /// `in`: `size` is 1, 2 or 4 bytes. Permission is already checked.
    fn port_in(&mut self, port: u16, size: u8) -> u32;
    /// `out`.
    fn port_out(&mut self, port: u16, size: u8, value: u32);
    /// The guest's time-stamp counter.
    fn tsc(&mut self, cpu: &CpuState) -> u64;
    /// CPUID by policy: EAX, EBX, ECX, EDX.
    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4];
    /// `rdmsr`; #GP(0) for what the policy hides.
    fn rdmsr(&mut self, cpu: &CpuState, msr: u32) -> Result<u64, Trap>;
    /// `wrmsr`.
    fn wrmsr(&mut self, cpu: &mut CpuState, msr: u32, value: u64) -> Result<(), Trap>;
    /// Reads guest physical memory for the CPU itself (PAE PDPTEs at a CR3 load). Unbacked memory reads as ones.
    fn read_phys(&mut self, at: csam::GuestPhys, buf: &mut [u8]);
    /// The CPU under us sets the accessed bit in PDPTEs of PAE paging, which is reserved there: the guest finds it set by an
    /// engine that has it walk the guest's own tables.
    fn marks_pdptes(&self) -> bool {
        false
    }
    /// The CPU's paging state has just changed (CpuState already holds the new values).
    fn paging_changed(&mut self, cpu: &CpuState, change: PagingChange);
}
