//! A case on KVM: its CPU into a vCPU, one KVM_RUN, and back.

use super::case::{Case, End, Outcome, Port};
use super::interpreter::landed;
use super::setup::RAM;
use host_driver_shim::kvm::{KvmError, KvmExit, KvmState, KvmVm, kvm_debugregs};
use host_driver_shim::ram::GuestRam;
use host_driver_shim::world::Kicker;
use monitor::cpuid_msr::CpuPolicy;
use monitor::em::kvm::convert::{into_cpu, into_kvm};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A virtual machine that is used for one case after the other.
pub(crate) struct Kvm {
    vm: KvmVm,
    ram: GuestRam,
    policy: CpuPolicy,
    /// As the machine had it first.
    fresh: KvmState,
    /// As the vCPU has it.
    held: KvmState,
    /// Debug registers the vCPU has.
    debug: [u32; 8],
    /// How many cases have begun: a thread watches that they end.
    begun: Arc<AtomicU64>,
}

/// How long a case may take at least before it is given up.
const PATIENCE: Duration = Duration::from_millis(500);

/// Kicks the vCPU out of a case that does not end. The thread ends when the machine has gone.
fn watch(vm: &KvmVm) -> Arc<AtomicU64> {
    let begun = Arc::<AtomicU64>::default();
    let (kicker, seen) = (vm.kicker(), Arc::downgrade(&begun));
    std::thread::spawn(move || {
        let mut last = 0;
        while let Some(begun) = seen.upgrade() {
            let now = begun.load(Ordering::Relaxed);
            if now == last {
                kicker.kick();
            }
            last = now;
            drop(begun);
            std::thread::sleep(PATIENCE);
        }
    });
    begun
}

impl Kvm {
    /// Makes the machine.
    pub(crate) fn new() -> Result<Kvm, KvmError> {
        let ram = GuestRam::new(RAM.into()).map_err(|why| KvmError { what: "RAM", why })?;
        let policy = CpuPolicy::host();
        let mut vm = KvmVm::new(&ram, &policy.rows())?;
        let fresh = vm.state()?;
        let debug = [0; 8];
        vm.set_debug_registers(&kvm_debugregs::default())?;
        let begun = watch(&vm);
        Ok(Kvm { vm, ram, policy, fresh, held: fresh, debug, begun })
    }

    /// Its RAM.
    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Runs a case, which is in RAM. `tables`: page tables are not what they were in the case before.
    pub(crate) fn run(&mut self, case: &Case, tables: bool) -> Result<Outcome, KvmError> {
        if self.debug != case.cpu.dr {
            let d = case.cpu.dr.map(u64::from);
            let db = [d[0], d[1], d[2], d[3]];
            self.vm.set_debug_registers(&kvm_debugregs {
                db,
                dr6: d[6],
                dr7: d[7],
                ..kvm_debugregs::default()
            })?;
            self.debug = case.cpu.dr;
        }
        let new = into_kvm(&case.cpu, None, &self.fresh);
        if tables {
            self.vm.set_state_and_flush(&new)?;
        } else {
            self.vm.set_state(&self.held, &new)?;
        }
        if let Some(vector) = case.interrupt {
            self.vm.interrupt(vector)?;
        }
        let mut ports = Vec::new();
        let end = self.follow(case, &mut ports)?;
        self.held = self.vm.state()?;
        let mut cpu = case.cpu.clone();
        into_cpu(&self.held, &mut cpu);
        // What KVM has, also where EFLAGS.VM of the lab's CPU says otherwise (a task switch out of V86 mode).
        cpu.cpl = if cpu.protected() { self.held.sregs.ss.dpl & 3 } else { 0 };
        if end == End::Landed && !landed(&cpu) {
            return Err(KvmError { what: "a run", why: std::io::Error::other("it landed nowhere") });
        }
        let d = self.vm.debug_registers()?;
        for (to, from) in cpu.dr.iter_mut().zip(d.db) {
            *to = from as u32;
        }
        (cpu.dr[6], cpu.dr[7]) = (d.dr6 as u32, d.dr7 as u32);
        self.debug = cpu.dr;
        Ok(Outcome { end, cpu, ports })
    }

    fn follow(&mut self, case: &Case, ports: &mut Vec<Port>) -> Result<End, KvmError> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        loop {
            match self.vm.run()? {
                KvmExit::PortIn { port, size, count } => {
                    ports.extend((0..count).map(|_| Port { port, size, written: None }));
                    self.vm.answer_port(&vec![0xff; count as usize * usize::from(size)]);
                }
                KvmExit::PortOut { port, size, .. } => {
                    for value in self.vm.port_data().chunks(size.into()) {
                        let value = value.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
                        ports.push(Port { port, size, written: Some(value) });
                    }
                }
                KvmExit::ReadMsr { msr } => {
                    let value = self.policy.rdmsr(&case.cpu, msr, 0).ok();
                    self.vm.answer_msr(value);
                }
                KvmExit::WriteMsr { msr, value } => {
                    let done = self.policy.wrmsr(&mut case.cpu.clone(), msr, value, 0);
                    self.vm.answer_msr(done.ok().map(|_| value));
                }
                KvmExit::Halt => return Ok(End::Halted),
                KvmExit::Shutdown => return Ok(End::Shutdown),
                KvmExit::Interrupted if began.elapsed() < PATIENCE => {}
                KvmExit::Interrupted => return Ok(End::Lost("it does not end".into())),
                KvmExit::EmulationFailed => {
                    let state = self.vm.state()?;
                    let at = state.sregs.cs.base.wrapping_add(state.regs.rip) as u32;
                    if at >= RAM {
                        return Ok(End::Landed);
                    }
                    return Ok(End::Lost("KVM's emulator does not know it".into()));
                }
                other => {
                    // The next run would complete the access, with the next case's registers.
                    while self.vm.complete()?.is_some() {}
                    return Ok(End::Lost(format!("{other:?}")));
                }
            }
        }
    }
}
