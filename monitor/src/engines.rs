//! Which engines a run gets: what the configuration asks for, as far as this host has it.

use crate::config::{EngineChoice, RunConfig, ShuffleConfig};
use crate::em::engine::{Engine, EngineKind, Engines, Shuffle};
use crate::em::kvm::KvmEngine;
use crate::em::raw::{Isolation, Keyed, RawEngine, Worlds};
use crate::outcome::Ending;
use host_driver_shim::capabilities::{Probe, modify_ldt};
use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::kvm::{self, KvmWorth};
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw;
use host_driver_shim::ring1::Ring1Engine;
use host_driver_shim::world::{CpuidRow, WorldError};

/// Code memory for code-view copies and trampolines: 64 Ki pages, of which only touched ones cost memory.
const CODE_MEMORY: u64 = 256 << 20;

/// The engines a run may use, the best first. `cpu` is the host CPU that worlds run on, `cpuid` what the guest sees where the
/// hardware answers it.
///
/// # Errors
/// An engine that was asked for by name is not to be had on this host, or none but the interpreter is and nobody asked
/// for that.
pub(crate) fn engines(
    ram: &GuestRam,
    config: &RunConfig,
    cpu: usize,
    cpuid: Vec<CpuidRow>,
) -> Result<Engines, Ending> {
    let host = Host { ram, config, cpu, cpuid };
    match (&config.shuffle, config.engine) {
        (Some(shuffle), _) => host.shuffled(shuffle),
        (None, EngineChoice::Auto) if config.lockstep.is_none() => host.best(),
        // It needs an engine on which the guest's reading of the time-stamp counter is seen.
        (None, EngineChoice::Auto | EngineChoice::Raw) => host.only(EngineKind::Raw),
        (None, EngineChoice::Ring1) => host.only(EngineKind::Ring1),
        (None, EngineChoice::Kvm) => host.only(EngineKind::Kvm),
        (None, EngineChoice::Interp) => host.only(EngineKind::Interp),
    }
}

/// What engines are made from.
struct Host<'a> {
    ram: &'a GuestRam,
    config: &'a RunConfig,
    cpu: usize,
    cpuid: Vec<CpuidRow>,
}

impl Host<'_> {
    /// An engine, or why there is none here; None for the interpreter, which is always there.
    fn make(&self, kind: EngineKind) -> Result<Option<Box<dyn Engine>>, String> {
        Ok(match kind {
            EngineKind::Raw => Some(Box::new(self.raw()?)),
            EngineKind::Ring1 => Some(Box::new(self.ring1()?)),
            EngineKind::Kvm => Some(Box::new(kvm_engine(self.ram, &self.cpuid)?)),
            EngineKind::Interp => None,
        })
    }

    fn only(&self, kind: EngineKind) -> Result<Engines, Ending> {
        let engine = self.make(kind).map_err(|why| lacking(kind, &why))?;
        Ok(Engines::new(engine.into_iter().collect(), None))
    }

    /// Raw mode, with kvm in reserve for what that refuses; kvm where there is no raw mode.
    fn best(&self) -> Result<Engines, Ending> {
        // Else this would show when the guest is under way.
        let tried = match modify_ldt() {
            Probe::Fails(why) => Err(format!("modify_ldt: {why}")),
            _ => Ok(()),
        };
        let why = match tried.and_then(|()| self.raw()) {
            Ok(raw) => {
                let (ram, cpuid) = (self.ram.clone(), self.cpuid.clone());
                let make = move || kvm_engine(&ram, &cpuid).map(|engine| Box::new(engine) as Box<dyn Engine>);
                return Ok(Engines::new(vec![Box::new(raw)], None).with_reserve(Box::new(make)));
            }
            Err(why) => why,
        };
        match kvm_engine(self.ram, &self.cpuid) {
            Ok(kvm) => {
                eprintln!("subring: there is no raw mode here ({why}): the guest runs on kvm");
                Ok(Engines::new(vec![Box::new(kvm)], None))
            }
            Err(no_kvm) => {
                log::info!("without the kvm engine: {no_kvm}");
                let why = format!("{why}; --engine interp does without, slowly");
                Err(lacking(EngineKind::Raw, &why))
            }
        }
    }

    fn shuffled(&self, shuffle: &ShuffleConfig) -> Result<Engines, Ending> {
        let mut list = Vec::new();
        for kind in [EngineKind::Raw, EngineKind::Ring1, EngineKind::Kvm] {
            let named = shuffle.engines.contains(&kind);
            if !named && !shuffle.engines.is_empty() {
                continue;
            }
            match self.make(kind) {
                Ok(engine) => list.extend(engine),
                Err(why) if named => return Err(lacking(kind, &why)),
                Err(why) => log::info!("without the {} engine: {why}", kind.name()),
            }
        }
        let ms = shuffle.interval_ms;
        let seed = shuffle.seed.unwrap_or_else(host_driver_shim::tsc::read);
        let engines = Engines::new(list, Some(Shuffle::new(u64::from(ms) * 1_000_000, seed)));
        let kinds: Vec<_> = engines.kinds().map(EngineKind::name).collect();
        let kinds = kinds.join(", ");
        eprintln!("subring: another engine of {kinds} every {ms} ms; again with --shuffle-seed {seed}");
        Ok(engines)
    }

    fn raw(&self) -> Result<RawEngine, String> {
        let code = code_memory()?;
        let host =
            raw::RawEngine::new(self.ram, &code, Some(self.cpu)).map_err(|e: WorldError| e.to_string())?;
        if self.config.lockstep.is_some() {
            host.trap_tsc();
        }
        if self.config.isolation == Isolation::Strict {
            match raw::keys::refusal() {
                None => return self.in_worlds(Box::new(Keyed(host)), code),
                Some(why) => log::info!("ring 3 runs in worlds of its own: {why}"),
            }
        }
        self.in_worlds(Box::new(host), code)
    }

    fn ring1(&self) -> Result<RawEngine, String> {
        let code = code_memory()?;
        let host = Ring1Engine::new(self.ram, &code).map_err(|e: WorldError| e.to_string())?;
        if self.config.lockstep.is_some() {
            host.trap_tsc();
        }
        self.in_worlds(Box::new(host), code)
    }

    fn in_worlds(&self, host: Box<dyn Worlds>, code: CodeMemory) -> Result<RawEngine, String> {
        let count_inline = self.config.stats || self.config.stats_out.is_some();
        RawEngine::new(host, code, count_inline, self.config.isolation).map_err(|e| e.to_string())
    }
}

fn lacking(kind: EngineKind, why: &str) -> Ending {
    let what = match kind {
        EngineKind::Raw => "raw mode",
        EngineKind::Ring1 => "the ring1 engine",
        EngineKind::Kvm => "kvm",
        EngineKind::Interp => "the interpreter",
    };
    Ending::host_cannot(what, &why)
}

fn code_memory() -> Result<CodeMemory, String> {
    CodeMemory::new(CODE_MEMORY).map_err(|e| format!("code memory: {e}"))
}

/// The kvm engine, if the host's KVM is hardware.
fn kvm_engine(ram: &GuestRam, cpuid: &[CpuidRow]) -> Result<KvmEngine, String> {
    match kvm::probe() {
        KvmWorth::Hardware { .. } => KvmEngine::new(ram, cpuid).map_err(|e| e.to_string()),
        worth => Err(worth.to_string()),
    }
}
