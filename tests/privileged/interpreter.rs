//! A case by the interpreter, with what raises going through TRPM as EM does it.

use super::case::{Case, End, Outcome, Port};
use super::defects::Defect;
use super::setup::RAM;
use host_driver_shim::ram::GuestRam;
use monitor::cpuid_msr::CpuPolicy;
use monitor::cpum::{CpuState, cr0, seg};
use monitor::env::{Env, PagingChange, Privilege};
use monitor::interp::{self, Step};
use monitor::iom::{Devices, DevicesConfig};
use monitor::machine::Machine;
use monitor::tm::Clock;
use monitor::trap::{Event, Trap};
use monitor::{GuestLin, GuestPhys, trpm};

/// A case that has not ended after so many instructions and deliveries is not one.
const STEPS: usize = 16;

/// The real machine, but for ports: a device would make them differ.
struct Ours {
    machine: Machine,
    ports: Vec<Port>,
    defect: Option<Defect>,
}

impl Env for Ours {
    fn read(&mut self, cpu: &CpuState, at: GuestLin, buf: &mut [u8], p: Privilege) -> Result<(), Trap> {
        self.machine.read(cpu, at, buf, p)?;
        if let Some(defect) = self.defect {
            defect.read(at.0, buf);
        }
        Ok(())
    }
    fn write(&mut self, cpu: &CpuState, at: GuestLin, data: &[u8], p: Privilege) -> Result<(), Trap> {
        match self.defect {
            Some(defect) if defect.loses(at.0, data) => Ok(()),
            Some(Defect::WriteProtect) => {
                let mut free = cpu.clone();
                free.cr0 &= !cr0::WP;
                self.machine.write(&free, at, data, p)
            }
            _ => self.machine.write(cpu, at, data, p),
        }
    }
    fn probe_write(&mut self, cpu: &CpuState, at: GuestLin, len: u32, p: Privilege) -> Result<(), Trap> {
        self.machine.probe_write(cpu, at, len, p)
    }
    fn fetch(&mut self, cpu: &CpuState, at: GuestLin, buf: &mut [u8]) -> Result<usize, Trap> {
        self.machine.fetch(cpu, at, buf)
    }
    fn port_in(&mut self, port: u16, size: u8) -> u32 {
        self.ports.push(Port { port, size, written: None });
        u32::MAX
    }
    fn port_out(&mut self, port: u16, size: u8, value: u32) {
        self.ports.push(Port { port, size, written: Some(value) });
    }
    fn tsc(&mut self, cpu: &CpuState) -> u64 {
        self.machine.tsc(cpu)
    }
    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.machine.cpuid(cpu, leaf, subleaf)
    }
    fn rdmsr(&mut self, cpu: &CpuState, msr: u32) -> Result<u64, Trap> {
        self.machine.rdmsr(cpu, msr)
    }
    fn wrmsr(&mut self, cpu: &mut CpuState, msr: u32, value: u64) -> Result<(), Trap> {
        self.machine.wrmsr(cpu, msr, value)
    }
    fn read_phys(&mut self, at: GuestPhys, buf: &mut [u8]) {
        self.machine.read_phys(at, buf);
    }
    fn paging_changed(&mut self, cpu: &CpuState, change: PagingChange) {
        self.machine.paging_changed(cpu, change);
    }
}

/// What runs cases.
pub(crate) struct Interpreter(Ours);

/// What the CPU stands before cannot be executed.
pub(crate) fn landed(cpu: &CpuState) -> bool {
    cpu.eip <= cpu.seg[seg::CS].limit && cpu.linear_eip() >= RAM
}

impl Interpreter {
    /// With memory of its own.
    pub(crate) fn new() -> std::io::Result<Interpreter> {
        let ram = GuestRam::new(RAM.into())?;
        let devices = Devices::new(DevicesConfig { ram_bytes: RAM.into(), ..DevicesConfig::default() });
        let machine = Machine::new(ram, devices, CpuPolicy::host(), Clock::host());
        Ok(Interpreter(Ours { machine, ports: Vec::new(), defect: None }))
    }

    /// From here on this is wrong with it.
    pub(crate) fn set_defect(&mut self, defect: Option<Defect>) {
        self.0.defect = defect;
    }

    /// Its RAM.
    pub(crate) fn ram(&self) -> &GuestRam {
        &self.0.machine.ram
    }

    /// Runs a case, which is in RAM.
    pub(crate) fn run(&mut self, case: &Case) -> Outcome {
        let env = &mut self.0;
        let mut cpu = case.cpu.clone();
        env.machine.ran_natively();
        env.machine.forget_translations();
        env.ports.clear();
        let end = follow(&mut cpu, env, case.interrupt);
        env.machine.forget_notes();
        Outcome { end, cpu, ports: env.ports.clone() }
    }
}

fn follow(cpu: &mut CpuState, env: &mut Ours, interrupt: Option<u8>) -> End {
    if let Some(vector) = interrupt
        && trpm::deliver(cpu, env, Event::External { vector }).is_err()
    {
        return End::Shutdown;
    }
    for _ in 0..STEPS {
        if landed(cpu) {
            match env.fetch_fault(cpu, GuestLin(cpu.linear_eip())) {
                None => return End::Landed,
                Some(trap) if trpm::deliver(cpu, env, Event::Exception(trap)).is_err() => {
                    return End::Shutdown;
                }
                Some(_) => continue,
            }
        }
        let start = cpu.eip;
        match interp::step(cpu, env) {
            Step::Done => {}
            Step::Halted => return End::Halted,
            Step::Raise(event) => {
                let mut event = event;
                if let Event::Software { .. } = event {
                    match trpm::try_deliver(cpu, env, event) {
                        Ok(()) => continue,
                        Err(trap) => {
                            cpu.eip = start;
                            event = Event::Exception(trap);
                        }
                    }
                }
                if trpm::deliver(cpu, env, event).is_err() {
                    return End::Shutdown;
                }
            }
        }
    }
    End::Lost(format!("it goes on at {:x}", cpu.linear_eip()))
}
