//! A raw engine and an interpreter side by side, for one guest after the other.

use super::guest::RAM;
use super::stepping::Stable;
use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw;
use monitor::cpuid_msr::CpuPolicy;
use monitor::em::raw::layout::Layout;
use monitor::em::raw::{Isolation, RawEngine};
use monitor::env::{Env, PagingChange};
use monitor::iom::{Devices, DevicesConfig};
use monitor::machine::Machine;
use monitor::tm::Clock;

fn machine(ram: GuestRam) -> Machine {
    let devices = Devices::new(DevicesConfig { ram_bytes: RAM, ..DevicesConfig::default() });
    Machine::new(ram, devices, CpuPolicy::host(), Clock::host())
}

/// Both sides. One at a time in a process is quite enough: its worlds are processes that live as long.
pub struct Rig {
    /// The machine the interpreter works on.
    pub interpreter: Machine,
    /// The machine raw mode works on.
    pub native: Machine,
    /// Where worlds come from.
    pub worlds: Stable,
    /// Where code views and trampolines are.
    pub code: CodeMemory,
}

impl Rig {
    /// Memory, and where worlds come from, bound to a host CPU if one is given.
    ///
    /// # Errors
    /// When there is no raw mode on this host, with the reason.
    pub fn new(cpu: Option<usize>) -> Result<Rig, String> {
        let (ours, theirs) = match (GuestRam::new(RAM), GuestRam::new(RAM)) {
            (Ok(a), Ok(b)) => (a, b),
            (Err(e), _) | (_, Err(e)) => return Err(e.to_string()),
        };
        let code = CodeMemory::new(16 << 20).map_err(|e| e.to_string())?;
        let host = raw::RawEngine::new(&theirs, &code, cpu).map_err(|e| e.to_string())?;
        host.spawn_world().map_err(|e| e.to_string())?;
        let worlds = Stable::new(host, &theirs, &code);
        Ok(Rig { interpreter: machine(ours), native: machine(theirs), worlds, code })
    }

    /// An engine that knows nothing of the guest yet.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn engine(&self, count_inline: bool) -> Result<RawEngine, String> {
        RawEngine::new(Box::new(self.worlds.clone()), self.code.clone(), count_inline, Isolation::Worlds)
            .map_err(|e| e.to_string())
    }

    /// Gives back what an engine has of both sides.
    pub fn retire(&mut self, mut raw: RawEngine) {
        raw.kernel_code.reset(&mut self.native, &self.code, Layout::CANDIDATES[0]);
        self.native.take_code_writes();
    }

    /// Both memories get these contents, and caches of the paging are emptied.
    pub fn fill(&mut self, memory: &[u8], cpu: &monitor::cpum::CpuState) {
        for m in [&mut self.interpreter, &mut self.native] {
            let _fits = m.ram.write(0, memory);
            // What it remembers of instructions is of the guest before.
            m.ran_natively();
            m.paging_changed(cpu, PagingChange::Cr3);
        }
    }
}
