//! The kvm engine: the guest runs at its own rings in a virtual machine of the host's (KVM).
//!
//! 1. [`KvmEngine::run`] brings CPUM's state into the vCPU where it differs (`convert.rs`), an external interrupt with it,
//!    runs, and takes the state back.
//! 2. Port, MMIO and MSR accesses go to the machine as those of the interpreter do. KVM completes the instruction when it
//!    runs next; before anybody else takes the CPU it is completed without running another one ([`Engine::settle`]).
//! 3. What KVM's emulator does not know is interpreted; what it was about to deliver is delivered by TRPM.
//!
//! Real mode, V86 and 16-bit code run here like everything else. CPUID and MSRs answer by the same policy as on the other
//! engines; where the kernel cannot pass MSR accesses on (before 5.10), KVM answers them by itself. Differences that stay:
//! CPUID 8000_0008h shows linear addresses of 48 bits, not 32, because KVM refuses the latter; `vmcall` is KVM's (no #UD); SYSENTER, which the policy hides, is #GP and not #UD.

pub mod convert;

use super::engine::{Engine, EngineError, EngineKind};
use super::raw::{After, ExitRecord, KickTarget, RawRefusal};
use crate::account::{Cause, Route};
use crate::cpum::{CpuState, FxState, cr0, cr4};
use crate::env::Env;
use crate::machine::Machine;
use crate::trap::{Event, Trap};
use convert::{into_cpu, into_kvm};
use csam::GuestPhys;
use host_driver_shim::kvm::{KvmError, KvmExit, KvmState, KvmVm, kvm_debugregs, kvm_vcpu_events};
use host_driver_shim::ram::GuestRam;
use host_driver_shim::tsc::read as host_tsc;
use host_driver_shim::world::CpuidRow;
use std::sync::Arc;

/// The guest in a virtual machine.
pub struct KvmEngine {
    vm: KvmVm,
    kick: Arc<KickTarget>,
    /// What the vCPU holds.
    held: KvmState,
    /// The same as CPUM had it after the last run.
    seen: Option<CpuState>,
    /// The guest's last instruction has been served and not yet completed: CPUM is at its beginning.
    incomplete: bool,
    /// The vCPU has the guest's newest FPU state and debug registers.
    fpu_here: bool,
    /// The guest's TLB may hold what is not true any more.
    flush: bool,
    /// What the vCPU's time-stamp counter is set to.
    tsc_offset: Option<i64>,
    injected: Option<u8>,
    last: ExitRecord,
    last_run: (u64, u64),
    /// Runs that had to set general registers, system registers, events.
    set: [u64; 3],
    flushes: u64,
    completions: u64,
    refused_states: u64,
}

impl KvmEngine {
    /// Makes the virtual machine around guest RAM.
    pub fn new(ram: &GuestRam, cpuid: &[CpuidRow]) -> Result<KvmEngine, KvmError> {
        let vm = KvmVm::new(ram, cpuid)?;
        let kick = Arc::<KickTarget>::default();
        kick.set(Some(Arc::new(vm.kicker())));
        let held = vm.state()?;
        let exit = KvmExit::Interrupted;
        Ok(KvmEngine {
            vm,
            kick,
            held,
            seen: None,
            incomplete: false,
            fpu_here: false,
            flush: true,
            tsc_offset: None,
            injected: None,
            last: ExitRecord { cause: Cause::Other, route: Route::VmExit, eip: 0, cpl: 0, raw: exit.into() },
            last_run: (0, 0),
            set: [0; 3],
            flushes: 0,
            completions: 0,
            refused_states: 0,
        })
    }

    /// Brings CPUM's state into the vCPU.
    fn push(&mut self, cpu: &CpuState) -> Result<(), KvmError> {
        if !self.fpu_here {
            self.vm.set_fpu(&cpu.fpu.0)?;
            let db = [cpu.dr[0], cpu.dr[1], cpu.dr[2], cpu.dr[3]].map(u64::from);
            let (dr6, dr7) = (cpu.dr[6].into(), cpu.dr[7].into());
            self.vm.set_debug_registers(&kvm_debugregs { db, dr6, dr7, ..kvm_debugregs::default() })?;
            self.fpu_here = true;
        }
        if self.tsc_offset != Some(cpu.msr.tsc_offset) {
            self.vm.set_tsc_offset(cpu.msr.tsc_offset)?;
            self.tsc_offset = Some(cpu.msr.tsc_offset);
        }
        let new = into_kvm(cpu, self.seen.as_ref(), &self.held);
        // What the interpreter has done may have been to page tables.
        let interpreted = self.held.regs != new.regs;
        if self.flush || interpreted && self.vm.shadows_tables() {
            self.vm.set_state_and_flush(&new)?;
            self.flush = false;
            self.flushes += 1;
        } else {
            self.vm.set_state(&self.held, &new)?;
            let differs =
                [self.held.regs != new.regs, self.held.sregs != new.sregs, self.held.events != new.events];
            for (count, differs) in self.set.iter_mut().zip(differs) {
                *count += u64::from(differs);
            }
        }
        self.held = new;
        Ok(())
    }

    /// Takes the vCPU's state into CPUM, all but FPU and debug registers.
    fn pull(&mut self, cpu: &mut CpuState, m: &mut Machine) -> Result<(), KvmError> {
        self.held = self.vm.state()?;
        into_cpu(&self.held, cpu);
        if !self.vm.msrs_leave() {
            cpu.msr.efer = self.held.sregs.efer & crate::cpum::efer::NXE;
        }
        if cpu.cr0 & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 {
            let mut bytes = [0u8; 32];
            m.read_phys(GuestPhys(u64::from(cpu.cr3 & !31)), &mut bytes);
            for (entry, bytes) in cpu.pdpte.iter_mut().zip(bytes.chunks_exact(8)) {
                *entry = bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            }
        }
        // EFER is the policy's: what the vCPU holds differs after a `wrmsr` until the next push.
        let mut seen = cpu.clone();
        seen.msr.efer = self.held.sregs.efer;
        self.seen = Some(seen);
        Ok(())
    }

    /// Gives the vCPU an interrupt, if one waits and the guest is ready; else asks for an exit when it is.
    fn inject(&mut self, cpu: &mut CpuState, m: &mut Machine) -> Result<(), KvmError> {
        self.injected = None;
        if cpu.interruptible() && m.devices.interrupt_pending() {
            self.complete(cpu, m)?;
            let vector = m.devices.acknowledge();
            m.devices_touched = true;
            cpu.halted = false;
            self.injected = Some(vector);
        }
        self.push(cpu)?;
        if let Some(vector) = self.injected {
            self.vm.interrupt(vector)?;
        }
        self.vm.want_window(m.devices.interrupt_pending());
        Ok(())
    }

    /// Does what the guest's access asks for.
    fn serve(&mut self, exit: KvmExit, cpu: &mut CpuState, m: &mut Machine) {
        match exit {
            KvmExit::PortIn { port, size, count } => {
                let mut data = Vec::with_capacity(count as usize * usize::from(size));
                for _ in 0..count {
                    let value = m.port_in(port, size).to_le_bytes();
                    data.extend_from_slice(&value[..usize::from(size).min(4)]);
                }
                self.vm.answer_port(&data);
            }
            KvmExit::PortOut { port, size, .. } => {
                for value in self.vm.port_data().chunks(size.max(1).into()) {
                    let value = value.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
                    m.port_out(port, size, value);
                }
            }
            KvmExit::MmioRead { at, len } => {
                let mut data = [0u8; 8];
                m.read_ram(GuestPhys(at), &mut data[..len.into()]);
                self.vm.answer_mmio(&data);
            }
            KvmExit::MmioWrite { at, data, len } => m.write_ram(GuestPhys(at), &data[..len.into()]),
            KvmExit::ReadMsr { msr } => self.vm.answer_msr(m.rdmsr(cpu, msr).ok()),
            KvmExit::WriteMsr { msr, value } => {
                let done = m.wrmsr(cpu, msr, value);
                self.vm.answer_msr(done.ok().map(|()| value));
            }
            _ => return,
        }
        self.incomplete = true;
    }

    /// Completes the instruction served last, with whatever further accesses it makes, without running another one.
    fn complete(&mut self, cpu: &mut CpuState, m: &mut Machine) -> Result<(), KvmError> {
        if !self.incomplete {
            return Ok(());
        }
        while self.incomplete {
            self.incomplete = false;
            self.completions += 1;
            if let Some(exit) = self.vm.complete()? {
                self.serve(exit, cpu, m);
            }
        }
        // The rest of an `ins` goes to RAM.
        m.ran_natively();
        self.pull(cpu, m)
    }

    /// What was on its way into the guest when it left, and has not arrived.
    fn on_the_way(&self) -> Option<Event> {
        let kvm_vcpu_events { exception, interrupt, nmi, .. } = self.held.events;
        if exception.injected != 0 || exception.pending != 0 {
            let error_code = (exception.has_error_code != 0).then_some(exception.error_code);
            let cr2 = (exception.nr == 14).then_some(self.held.sregs.cr2 as u32);
            return Some(Event::Exception(Trap { vector: exception.nr & 31, error_code, cr2 }));
        }
        // A software interrupt's instruction has not been passed: it will be executed again.
        if interrupt.injected != 0 && interrupt.soft == 0 {
            return Some(Event::External { vector: interrupt.nr });
        }
        (nmi.injected != 0 || nmi.pending != 0).then_some(Event::Nmi)
    }

    fn exited(&mut self, exit: KvmExit, cpu: &mut CpuState, m: &mut Machine) -> Result<After, EngineError> {
        let (eip, cpl) = (cpu.eip, cpu.cpl);
        let (cause, after) = match exit {
            KvmExit::PortIn { .. } | KvmExit::PortOut { .. } => (Cause::PortIo, After::Continue),
            KvmExit::MmioRead { .. } | KvmExit::MmioWrite { .. } => (Cause::Mmio, After::Continue),
            KvmExit::ReadMsr { .. } | KvmExit::WriteMsr { .. } => (Cause::ControlRegister, After::Continue),
            KvmExit::Halt => {
                cpu.halted = true;
                (Cause::Halt, After::Continue)
            }
            KvmExit::Window => (Cause::Interrupt, After::Continue),
            KvmExit::Interrupted => {
                self.kick.answered();
                (Cause::Kick, After::Kicked)
            }
            KvmExit::EmulationFailed => (Cause::Emulation, After::Interpret),
            KvmExit::BadState(reason) => {
                self.refused_states += 1;
                log::debug!("the CPU refuses the guest's state: {reason:#x}");
                (Cause::Mode, After::Interpret)
            }
            KvmExit::DeliveryFailed => (Cause::GuestFault, After::Continue),
            KvmExit::Shutdown => {
                // AMD's hardware leaves no state behind; KVM then resets the CPU.
                let state_lost = cpu.eip == 0xfff0 && !cpu.protected();
                (Cause::Shutdown, After::TripleFault { state_lost })
            }
            KvmExit::Debug | KvmExit::Unexpected(_) => {
                return Err(EngineError::Host(format!("kvm: an exit that makes no sense here: {exit:?}")));
            }
        };
        self.last = ExitRecord { cause, route: Route::VmExit, eip, cpl, raw: exit.into() };
        self.serve(exit, cpu, m);
        if matches!(exit, KvmExit::ReadMsr { .. } | KvmExit::WriteMsr { .. }) {
            // It may raise #GP, and what was written is the vCPU's state, too.
            self.complete(cpu, m)?;
        }
        match (after, self.on_the_way()) {
            (After::TripleFault { .. }, _) => Ok(after),
            (_, Some(event)) => {
                // It is TRPM's now. The next push takes it from the vCPU.
                if let (Event::External { .. }, Some(_)) = (event, self.injected) {
                    self.injected = None;
                }
                Ok(After::Deliver(event))
            }
            (_, None) if exit == KvmExit::DeliveryFailed => {
                Err(EngineError::Host("kvm: an event could not be delivered, and there is none".into()))
            }
            (after, None) => Ok(after),
        }
    }
}

impl Engine for KvmEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Kvm
    }

    fn refusal(&self, _: &CpuState) -> Option<RawRefusal> {
        None
    }

    fn run(&mut self, cpu: &mut CpuState, m: &mut Machine, _: bool) -> Result<After, EngineError> {
        // Writes to code are none of this engine's business; the hardware follows them by itself.
        self.follow(cpu, m)?;
        if self.flush || !self.fpu_here {
            self.complete(cpu, m)?;
        }
        self.inject(cpu, m)?;
        let entered = host_tsc();
        self.incomplete = false;
        let exit = self.vm.run()?;
        self.last_run = (entered, host_tsc());
        self.pull(cpu, m)?;
        // The guest may have written to code and flushed its TLB where the interpreter did not see it.
        m.ran_natively();
        m.forget_translations();
        self.exited(exit, cpu, m)
    }

    fn settle(&mut self, cpu: &mut CpuState, m: &mut Machine) -> Result<(), EngineError> {
        Ok(self.complete(cpu, m)?)
    }

    fn fetch_fpu(&mut self, cpu: &mut CpuState) {
        if !self.fpu_here {
            return;
        }
        match (self.vm.fpu(), self.vm.debug_registers()) {
            (Ok(fpu), Ok(debug)) => {
                cpu.fpu = FxState(fpu);
                for (to, from) in cpu.dr.iter_mut().zip(debug.db) {
                    *to = from as u32;
                }
                (cpu.dr[6], cpu.dr[7]) = (debug.dr6 as u32, debug.dr7 as u32);
                self.fpu_here = false;
            }
            (Err(e), _) | (_, Err(e)) => log::error!("the guest's FPU state stays where it is: kvm: {e}"),
        }
    }

    fn follow(&mut self, _: &CpuState, m: &mut Machine) -> Result<(), EngineError> {
        self.flush |= !m.paging_changes.is_empty();
        m.forget_notes();
        Ok(())
    }

    fn others_ran(&mut self, _: &CpuState, m: &mut Machine) -> Result<(), EngineError> {
        m.forget_notes();
        self.flush = true;
        Ok(())
    }

    fn kick_target(&self) -> Arc<KickTarget> {
        self.kick.clone()
    }

    fn last_exit(&self) -> ExitRecord {
        self.last
    }

    fn last_run(&self) -> (u64, u64) {
        self.last_run
    }

    fn injects(&self) -> bool {
        true
    }

    fn take_injected(&mut self) -> Option<u8> {
        self.injected.take()
    }

    fn gauges(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("kvm_general_registers_set", self.set[0]),
            ("kvm_system_registers_set", self.set[1]),
            ("kvm_events_set", self.set[2]),
            ("kvm_tlb_flushes", self.flushes),
            ("kvm_instructions_completed", self.completions),
            ("kvm_states_refused_by_the_cpu", self.refused_states),
        ]
    }
}

impl Drop for KvmEngine {
    fn drop(&mut self) {
        self.kick.set(None);
    }
}
