//! Worlds that stop at every instruction boundary, and that are used again for the next guest.
//!
//! The hardware's own trap flag does it: a world runs with EFLAGS.TF set, and the #DB behind each instruction is told to
//! the engine as a kick, as if another thread's kick had come just there. Nobody above sees the flag; the one
//! instruction that would show it, the `pushfd` in a trampoline, has it taken out of what it pushed.

use super::guest::RAM;
use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw::{self, RawWorld};
use host_driver_shim::world::{
    Backing, CpuidRow, DeliveryRules, Fill, FillRules, HostSegment, HwRegs, Kicker, PORT_ROWS, PortRow,
    PortWrite, Prot, QUICK_SITES, Quick, World, WorldError, WorldExit, WorldLin,
};
use monitor::em::raw::Worlds;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

const TF: u32 = 0x100;
/// More instructions than any trampoline has; no run of a world passes more boundaries.
pub const LONGEST: u32 = 512;

/// What is done to a world behind the engine's back: see [`super::defects`].
pub trait Tamper {
    /// The engine stores a word of the vCPU page.
    fn write(&self, _offset: u32, value: u32) -> u32 {
        value
    }
    /// The engine reads a word of the vCPU page.
    fn read(&self, _offset: u32, value: u32) -> u32 {
        value
    }
    /// The world stopped.
    fn stopped(&self, _regs: &mut HwRegs, _exit: &WorldExit) {}
}

/// How worlds step; shared with whoever drives the engine.
#[derive(Default)]
pub struct Control {
    /// The engine hears of every so many boundaries; 0: worlds run freely. A run that begins like the one before (it was
    /// rolled back) goes further: so the boundaries of a trampoline are met, and the guest gets on.
    pub every: Cell<u32>,
    /// Further by one boundary, so that each is met; else by about as many as before.
    pub each: Cell<bool>,
    begun: Cell<(HwRegs, u32)>,
    /// Boundaries passed.
    pub steps: Cell<u64>,
    /// What is done to worlds.
    pub tamper: RefCell<Option<Rc<dyn Tamper>>>,
}

/// Where the worlds of an engine come from: those of the engine before, if there was one.
#[derive(Clone)]
pub struct Stable {
    host: raw::RawEngine,
    ram: GuestRam,
    code: CodeMemory,
    idle: Rc<RefCell<Vec<RawWorld>>>,
    /// How they step.
    pub control: Rc<Control>,
}

impl Stable {
    /// Worlds for this memory.
    #[must_use]
    pub fn new(host: raw::RawEngine, ram: &GuestRam, code: &CodeMemory) -> Stable {
        Stable { host, ram: ram.clone(), code: code.clone(), idle: Rc::default(), control: Rc::default() }
    }
}

impl Worlds for Stable {
    fn spawn(&self) -> Result<Box<dyn World>, WorldError> {
        let used = self.idle.borrow_mut().pop();
        let world = match used {
            Some(mut world) => {
                world.set_fill_rules(&FillRules::default());
                world.set_delivery_rules(&DeliveryRules::default());
                world.set_quick(&[Quick::default(); QUICK_SITES]);
                world.set_ports(&[PortRow::default(); PORT_ROWS]);
                world.take_posted(&mut |_| ());
                world.take_fills(&mut |_| ());
                for offset in (0..0x1000).step_by(4) {
                    world.vcpu_write(offset, 0);
                }
                world
            }
            None => self.host.spawn_world()?,
        };
        Ok(Box::new(Stepping { world: Some(world), stable: self.clone(), code_pages: HashMap::new() }))
    }
    fn set_cpu(&self, cpu: usize) {
        self.host.set_cpu(cpu);
    }
}

/// A world that steps.
struct Stepping {
    /// None only while it is dropped.
    world: Option<RawWorld>,
    stable: Stable,
    /// World page number to code memory.
    code_pages: HashMap<u32, u64>,
}

impl Stepping {
    fn inner(&mut self) -> &mut RawWorld {
        self.world.as_mut().expect("only drop takes it")
    }

    /// The byte of code the world executes at `eip`.
    fn code_byte(&self, eip: u32) -> Option<u8> {
        let offset = self.code_pages.get(&(eip >> 12))?;
        self.stable.code.read_u8(offset + u64::from(eip & 0xfff))
    }

    /// Takes the trap flag out of what the `pushfd` before this boundary pushed. The stack is flat, and every frame of
    /// the guest's RAM is mapped at an address that differs in the upper bits only.
    fn hide(&self, esp: u32) {
        let at = u64::from(esp.wrapping_add(1) & 0x3f_ffff);
        if at < RAM
            && let Some(b) = self.stable.ram.read_u8(at)
        {
            let _in_ram = self.stable.ram.write_u8(at, b & !(TF >> 8) as u8);
        }
    }
}

impl Drop for Stepping {
    fn drop(&mut self) {
        if let Some(mut world) = self.world.take()
            && world.unmap(WorldLin(0), 0).and_then(|()| world.flush()).is_ok()
        {
            self.stable.idle.borrow_mut().push(world);
        }
    }
}

impl World for Stepping {
    fn run(&mut self, regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        let control = Rc::clone(&self.stable.control);
        let every = control.every.get();
        let tamper = control.tamper.borrow().clone();
        let (begun, reach) = control.begun.get();
        let further = if control.each.get() { 1 } else { reach + (control.steps.get() & 1) as u32 };
        let reach = if begun == *regs && reach < LONGEST { (reach + further).min(LONGEST) } else { every };
        control.begun.set((*regs, reach));
        let mut left = reach;
        let exit = loop {
            if every == 0 {
                break self.inner().run(regs)?;
            }
            let pushes = self.code_byte(regs.eip) == Some(0x9c);
            let esp = regs.gpr[4];
            regs.eflags |= TF;
            let result = self.inner().run(regs);
            regs.eflags &= !TF;
            let exit = result?;
            if exit != (WorldExit::Fault { vector: 1, error_code: 0, cr2: 0 }) {
                break exit;
            }
            if pushes && regs.gpr[4] == esp.wrapping_sub(4) {
                self.hide(regs.gpr[4]);
            }
            control.steps.set(control.steps.get() + 1);
            left -= 1;
            if left == 0 {
                break WorldExit::Kick;
            }
        };
        if let Some(t) = tamper {
            t.stopped(regs, &exit);
        }
        Ok(exit)
    }

    fn map(&mut self, at: WorldLin, len: u32, backing: Backing, prot: Prot) -> Result<(), WorldError> {
        for n in 0..len >> 12 {
            let page = (at.0 >> 12).wrapping_add(n);
            match backing {
                Backing::Code(offset) => self.code_pages.insert(page, offset + (u64::from(n) << 12)),
                _ => self.code_pages.remove(&page),
            };
        }
        self.inner().map(at, len, backing, prot)
    }

    fn unmap(&mut self, at: WorldLin, len: u32) -> Result<(), WorldError> {
        if (at.0, len) == (0, 0) {
            self.code_pages.clear();
        } else {
            self.code_pages.retain(|p, _| p.wrapping_sub(at.0 >> 12) >= len >> 12);
        }
        self.inner().unmap(at, len)
    }

    fn protect(&mut self, at: WorldLin, len: u32, prot: Prot) -> Result<(), WorldError> {
        self.inner().protect(at, len, prot)
    }
    fn set_segment(&mut self, slot: u16, segment: HostSegment) -> Result<(), WorldError> {
        self.inner().set_segment(slot, segment)
    }
    fn fpu(&mut self) -> &mut [u8; 512] {
        self.inner().fpu()
    }
    fn vcpu_read(&self, offset: u32) -> u32 {
        let value = self.world.as_ref().expect("only drop takes it").vcpu_read(offset);
        match &*self.stable.control.tamper.borrow() {
            Some(t) => t.read(offset, value),
            None => value,
        }
    }
    fn vcpu_write(&mut self, offset: u32, value: u32) {
        let value = match &*self.stable.control.tamper.borrow() {
            Some(t) => t.write(offset, value),
            None => value,
        };
        self.inner().vcpu_write(offset, value);
    }
    fn place_gate(&mut self, stub: WorldLin, vcpu: WorldLin) -> Result<(), WorldError> {
        self.inner().place_gate(stub, vcpu)
    }
    fn pin(&mut self, cpu: usize) -> Result<(), WorldError> {
        self.inner().pin(cpu)
    }
    fn set_fill_rules(&mut self, rules: &FillRules) {
        self.inner().set_fill_rules(rules);
    }
    fn set_delivery_rules(&mut self, rules: &DeliveryRules) {
        self.inner().set_delivery_rules(rules);
    }
    fn faults_delivered(&self) -> u32 {
        self.world.as_ref().map_or(0, World::faults_delivered)
    }
    fn set_cpuid(&mut self, rows: &[CpuidRow]) {
        self.inner().set_cpuid(rows);
    }
    fn set_quick(&mut self, table: &[Quick; QUICK_SITES]) {
        self.inner().set_quick(table);
    }
    fn flushes_done(&self) -> u32 {
        self.world.as_ref().map_or(0, World::flushes_done)
    }
    fn set_ports(&mut self, rows: &[PortRow; PORT_ROWS]) {
        self.inner().set_ports(rows);
    }
    fn ports_done(&self) -> u32 {
        self.world.as_ref().map_or(0, World::ports_done)
    }
    fn take_posted(&mut self, each: &mut dyn FnMut(PortWrite)) {
        self.inner().take_posted(each);
    }
    fn mark_large(&mut self, lin: u32) {
        self.inner().mark_large(lin);
    }
    fn take_fills(&mut self, each: &mut dyn FnMut(Fill)) -> u32 {
        self.inner().take_fills(each)
    }
    fn kicker(&self) -> Arc<dyn Kicker> {
        self.world.as_ref().expect("only drop takes it").kicker()
    }
}
