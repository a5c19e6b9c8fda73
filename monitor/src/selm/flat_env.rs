//! A machine for tests: a flat array of memory, identity-mapped, with pages that can be made to fault.

use super::descriptor::Descriptor;
use crate::cpum::{CpuState, Segment, TableRegister, cr0, gpr, seg};
use crate::env::{Env, PagingChange, Privilege};
use crate::trap::Trap;
use csam::{GuestLin, GuestPhys};
use std::collections::BTreeSet;

/// Memory size; linear addresses beyond it fault.
pub(crate) const SIZE: usize = 0x4_0000;
pub(crate) const GDT: u32 = 0x1000;
pub(crate) const IDT: u32 = 0x2000;
pub(crate) const LDT: u32 = 0x3000;
pub(crate) const TSS: u32 = 0x4000;
pub(crate) const TSS2: u32 = 0x5000;
/// Tops of the stacks the test machine's TSS and registers name.
pub(crate) const STACK0: u32 = 0x9000;
pub(crate) const STACK1: u32 = 0xa000;
pub(crate) const STACK3: u32 = 0xc000;

/// Selectors of the test machine's GDT.
pub(crate) mod sel {
    pub(crate) const CODE0: u16 = 0x08;
    pub(crate) const DATA0: u16 = 0x10;
    pub(crate) const CODE3: u16 = 0x1b;
    pub(crate) const DATA3: u16 = 0x23;
    pub(crate) const TSS: u16 = 0x28;
    pub(crate) const TSS2: u16 = 0x30;
    pub(crate) const LDT: u16 = 0x38;
    pub(crate) const CONFORMING0: u16 = 0x40;
    pub(crate) const ABSENT_DATA0: u16 = 0x48;
    pub(crate) const READ_ONLY0: u16 = 0x50;
    pub(crate) const CODE1: u16 = 0x59;
    pub(crate) const DATA1: u16 = 0x61;
    pub(crate) const CALL_GATE: u16 = 0x68;
    pub(crate) const CODE16: u16 = 0x70;
    pub(crate) const DATA16: u16 = 0x78;
    pub(crate) const TASK_GATE: u16 = 0x80;
    pub(crate) const EXECUTE_ONLY0: u16 = 0x88;
    pub(crate) const ABSENT_CODE0: u16 = 0x90;
    pub(crate) const TSS16: u16 = 0x98;
    pub(crate) const FREE: u16 = 0xa0;
    pub(crate) const BEYOND: u16 = 0x200;
}

#[derive(Default)]
pub(crate) struct FlatEnv {
    pub(crate) memory: Vec<u8>,
    /// Page numbers where any access faults as not present.
    pub(crate) absent: BTreeSet<u32>,
    /// Page numbers where writes fault.
    pub(crate) read_only: BTreeSet<u32>,
    pub(crate) paging_changes: Vec<PagingChange>,
}

impl FlatEnv {
    pub(crate) fn new() -> FlatEnv {
        FlatEnv { memory: vec![0; SIZE], ..FlatEnv::default() }
    }
    fn check(&self, at: GuestLin, len: u32, write: bool, privilege: Privilege) -> Result<(), Trap> {
        for i in 0..len {
            let a = at.wrapping_add(i);
            let page = a.page_number();
            let code = u32::from(write) << 1 | u32::from(privilege == Privilege::User) << 2;
            if a.0 as usize >= self.memory.len() || self.absent.contains(&page) {
                return Err(Trap::pf(code, a.0));
            }
            if write && self.read_only.contains(&page) {
                return Err(Trap::pf(code | 1, a.0));
            }
        }
        Ok(())
    }
    pub(crate) fn put(&mut self, at: u32, data: &[u8]) {
        self.memory[at as usize..at as usize + data.len()].copy_from_slice(data);
    }
    pub(crate) fn put32(&mut self, at: u32, value: u32) {
        self.put(at, &value.to_le_bytes());
    }
    pub(crate) fn put16(&mut self, at: u32, value: u16) {
        self.put(at, &value.to_le_bytes());
    }
    pub(crate) fn get32(&self, at: u32) -> u32 {
        let at = at as usize;
        u32::from_le_bytes(self.memory[at..at + 4].try_into().unwrap())
    }
    pub(crate) fn get16(&self, at: u32) -> u16 {
        self.get32(at) as u16
    }
    pub(crate) fn put_descriptor(&mut self, selector: u16, descriptor: Descriptor) {
        self.put(GDT + u32::from(selector & !7), &descriptor.to_bytes());
    }
    pub(crate) fn access_byte(&self, selector: u16) -> u8 {
        self.memory[(GDT + u32::from(selector & !7) + 5) as usize]
    }
    pub(crate) fn put_gate(&mut self, vector: u8, kind: u8, dpl: u8, selector: u16, offset: u32) {
        self.put(IDT + u32::from(vector) * 8, &gate(kind, dpl, selector, offset, 0).to_bytes());
    }
    /// The values on a stack of 4-byte items, from `esp` up.
    pub(crate) fn stack32<const N: usize>(&self, esp: u32) -> [u32; N] {
        std::array::from_fn(|i| self.get32(esp + 4 * i as u32))
    }
}

/// A segment or TSS descriptor; `access` is its access byte, `flags` the nibble G, D/B, L, AVL.
pub(crate) fn segment(base: u32, limit: u32, access: u8, flags: u8) -> Descriptor {
    Descriptor {
        low: base << 16 | limit & 0xffff,
        high: base & 0xff00_0000
            | base >> 16 & 0xff
            | u32::from(access) << 8
            | limit & 0xf_0000
            | u32::from(flags) << 20,
    }
}

/// A present gate.
pub(crate) fn gate(kind: u8, dpl: u8, selector: u16, offset: u32, parameters: u8) -> Descriptor {
    Descriptor {
        low: u32::from(selector) << 16 | offset & 0xffff,
        high: offset & 0xffff_0000
            | 0x8000
            | u32::from(dpl) << 13
            | u32::from(kind) << 8
            | u32::from(parameters),
    }
}

/// A protected-mode machine in ring 0 with flat segments for rings 0, 1 and 3, a TSS and an empty IDT.
pub(crate) fn machine() -> (CpuState, FlatEnv) {
    let mut env = FlatEnv::new();
    let mut cpu = CpuState::reset();
    cpu.cr0 |= cr0::PE;
    cpu.gdtr = TableRegister { base: GDT, limit: 0xff };
    cpu.idtr = TableRegister { base: IDT, limit: 0x7ff };
    // Accessed bits start clear: setting them is part of what is tested.
    for (selector, access) in [
        (sel::CODE0, 0x9a),
        (sel::DATA0, 0x92),
        (sel::CODE1, 0xba),
        (sel::DATA1, 0xb2),
        (sel::CODE3, 0xfa),
        (sel::DATA3, 0xf2),
        (sel::CONFORMING0, 0x9e),
        (sel::ABSENT_DATA0, 0x12),
        (sel::READ_ONLY0, 0x90),
        (sel::EXECUTE_ONLY0, 0x98),
        (sel::ABSENT_CODE0, 0x1a),
    ] {
        env.put_descriptor(selector, segment(0, 0xf_ffff, access, 0xc));
    }
    env.put_descriptor(sel::CODE16, segment(0, 0xffff, 0x9a, 0));
    env.put_descriptor(sel::DATA16, segment(0, 0xffff, 0x92, 0));
    env.put_descriptor(sel::TSS, segment(TSS, 0x67, 0x8b, 0));
    env.put_descriptor(sel::TSS2, segment(TSS2, 0x67, 0x89, 0));
    env.put_descriptor(sel::TSS16, segment(TSS2, 0x2b, 0x81, 0));
    env.put_descriptor(sel::LDT, segment(LDT, 0xf, 0x82, 0));
    env.put_descriptor(sel::TASK_GATE, gate(5, 3, sel::TSS2, 0, 0));
    env.put32(TSS + 4, STACK0);
    env.put16(TSS + 8, sel::DATA0);
    env.put32(TSS + 12, STACK1);
    env.put16(TSS + 16, sel::DATA1);
    cpu.tr = segment(TSS, 0x67, 0x8b, 0).segment(sel::TSS);
    cpu.ldtr = Segment::default();
    enter_ring(&mut cpu, 0);
    (cpu, env)
}

/// Puts the machine into ring 0 or 3 with that ring's flat segments and stack.
pub(crate) fn enter_ring(cpu: &mut CpuState, cpl: u8) {
    let (code, data, esp) =
        if cpl == 0 { (sel::CODE0, sel::DATA0, STACK0) } else { (sel::CODE3, sel::DATA3, STACK3) };
    let dpl = cpl << 5;
    let data = segment(0, 0xf_ffff, 0x93 | dpl, 0xc).segment(data);
    cpu.seg = [data; 6];
    cpu.seg[seg::CS] = segment(0, 0xf_ffff, 0x9b | dpl, 0xc).segment(code);
    cpu.cpl = cpl;
    cpu.gpr[gpr::ESP] = esp;
    cpu.eip = 0x7777;
}

impl Env for FlatEnv {
    fn read(&mut self, _: &CpuState, at: GuestLin, buf: &mut [u8], privilege: Privilege) -> Result<(), Trap> {
        self.check(at, buf.len() as u32, false, privilege)?;
        let start = at.0 as usize;
        buf.copy_from_slice(&self.memory[start..start + buf.len()]);
        Ok(())
    }
    fn write(&mut self, _: &CpuState, at: GuestLin, data: &[u8], privilege: Privilege) -> Result<(), Trap> {
        self.check(at, data.len() as u32, true, privilege)?;
        self.put(at.0, data);
        Ok(())
    }
    fn probe_write(
        &mut self,
        _: &CpuState,
        at: GuestLin,
        len: u32,
        privilege: Privilege,
    ) -> Result<(), Trap> {
        self.check(at, len, true, privilege)
    }
    fn fetch(&mut self, _: &CpuState, _: GuestLin, _: &mut [u8]) -> Result<usize, Trap> {
        unreachable!("selectors and traps fetch no instructions")
    }
    fn port_in(&mut self, _: u16, _: u8) -> u32 {
        unreachable!()
    }
    fn port_out(&mut self, _: u16, _: u8, _: u32) {
        unreachable!()
    }
    fn tsc(&mut self, _: &CpuState) -> u64 {
        unreachable!()
    }
    fn cpuid(&mut self, _: &CpuState, _: u32, _: u32) -> [u32; 4] {
        unreachable!()
    }
    fn rdmsr(&mut self, _: &CpuState, _: u32) -> Result<u64, Trap> {
        unreachable!()
    }
    fn wrmsr(&mut self, _: &mut CpuState, _: u32, _: u64) -> Result<(), Trap> {
        unreachable!()
    }
    fn read_phys(&mut self, at: GuestPhys, buf: &mut [u8]) {
        for (i, b) in buf.iter_mut().enumerate() {
            *b = self.memory.get(at.0 as usize + i).copied().unwrap_or(0xff);
        }
    }
    fn paging_changed(&mut self, _: &CpuState, change: PagingChange) {
        self.paging_changes.push(change);
    }
}
