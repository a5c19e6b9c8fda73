//! The interpreter's machine, watched for reads of the one word that raw mode's memory has and the interpreter's has not.

use super::guest::BRANCH_TARGET;
use csam::{GuestLin, GuestPhys};
use iced_x86::Instruction;
use monitor::cpum::CpuState;
use monitor::env::{Env, PagingChange, Privilege};
use monitor::machine::Machine;
use monitor::trap::Trap;

/// Whether one of the bytes from linear address `at` on is of the word at [`BRANCH_TARGET`].
pub fn is_target_word(at: u32, len: u32) -> bool {
    // Bases are multiples of 4 MiB.
    let physical = at & 0x3f_ffff;
    physical < BRANCH_TARGET + 4 && physical + len > BRANCH_TARGET
}

/// A machine that notes such reads.
pub struct Watched<'a> {
    /// The machine.
    pub m: &'a mut Machine,
    /// There was one.
    pub looked: bool,
}

impl Env for Watched<'_> {
    fn read(
        &mut self,
        cpu: &CpuState,
        at: GuestLin,
        buf: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Trap> {
        self.looked |= is_target_word(at.0, buf.len() as u32);
        self.m.read(cpu, at, buf, privilege)
    }
    fn write(&mut self, cpu: &CpuState, at: GuestLin, data: &[u8], privilege: Privilege) -> Result<(), Trap> {
        self.m.write(cpu, at, data, privilege)
    }
    fn probe_write(
        &mut self,
        cpu: &CpuState,
        at: GuestLin,
        len: u32,
        privilege: Privilege,
    ) -> Result<(), Trap> {
        self.m.probe_write(cpu, at, len, privilege)
    }
    fn fetch(&mut self, cpu: &CpuState, at: GuestLin, buf: &mut [u8]) -> Result<usize, Trap> {
        self.m.fetch(cpu, at, buf)
    }
    fn decoded(&mut self, cpu: &CpuState) -> Option<Instruction> {
        self.m.decoded(cpu)
    }
    fn decoded_from(&mut self, cpu: &CpuState, bytes: &[u8; 16], got: usize) -> Option<Instruction> {
        self.m.decoded_from(cpu, bytes, got)
    }
    fn remember_decoded(&mut self, cpu: &CpuState, bytes: &[u8; 16], instruction: &Instruction) {
        self.m.remember_decoded(cpu, bytes, instruction);
    }
    fn one_iteration(&self) -> bool {
        self.m.one_iteration()
    }
    fn port_in(&mut self, port: u16, size: u8) -> u32 {
        self.m.port_in(port, size)
    }
    fn port_out(&mut self, port: u16, size: u8, value: u32) {
        self.m.port_out(port, size, value);
    }
    fn tsc(&mut self, cpu: &CpuState) -> u64 {
        self.m.tsc(cpu)
    }
    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.m.cpuid(cpu, leaf, subleaf)
    }
    fn rdmsr(&mut self, cpu: &CpuState, msr: u32) -> Result<u64, Trap> {
        self.m.rdmsr(cpu, msr)
    }
    fn wrmsr(&mut self, cpu: &mut CpuState, msr: u32, value: u64) -> Result<(), Trap> {
        self.m.wrmsr(cpu, msr, value)
    }
    fn read_phys(&mut self, at: GuestPhys, buf: &mut [u8]) {
        self.m.read_phys(at, buf);
    }
    fn marks_pdptes(&self) -> bool {
        self.m.marks_pdptes()
    }
    fn paging_changed(&mut self, cpu: &CpuState, change: PagingChange) {
        self.m.paging_changed(cpu, change);
    }
}
