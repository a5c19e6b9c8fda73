//! The virtual machine: puts a guest together from a configuration and runs it to its end.

use crate::boot::{self, BootOptions, Module};
use crate::builtin;
use crate::config::{EngineChoice, Kernel, RunConfig};
use crate::console_io::Console;
use crate::cpuid_msr::CpuPolicy;
use crate::devices::ns16550a::{SerialSink, WriterSink};
use crate::em::attention::Attention;
use crate::em::engine::{Engine, EngineKind, Engines, Shuffle};
use crate::em::kvm::KvmEngine;
use crate::em::lockstep::{Difference, Lockstep};
use crate::em::placement::Placement;
use crate::em::raw::RawEngine;
use crate::em::{Em, Stop, dump};
use crate::iom::{Devices, DevicesConfig};
use crate::machine::Machine;
use crate::outcome::{Ending, RunOutcome};
use crate::tm::{Clock, HeldTime, host_utc_ns};
use host_driver_shim::capabilities::{Probe, modify_ldt};
use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::kvm::{self, KvmWorth};
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw;
use host_driver_shim::ring1::Ring1Engine;
use host_driver_shim::world::WorldError;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Code memory for code-view copies and trampolines: 64 Ki pages, of which only touched ones cost memory.
const CODE_MEMORY: u64 = 256 << 20;

/// The image a run boots, read once: a reboot loads it again.
struct Image {
    kernel: Vec<u8>,
    options: BootOptions,
}

/// Reads an input file. What is no regular file (`/dev/zero`, say) is not read to its end if that is beyond guest RAM.
fn read_file(path: &Path, memory: u64) -> Result<Vec<u8>, Ending> {
    let bad = |why: &dyn std::fmt::Display| Ending::BadInput(format!("{}: {why}", path.display()));
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| bad(&e))?;
    // A regular file may be larger than what is loaded of it: a vmlinux with debugging information.
    let limit = if file.metadata().map_err(|e| bad(&e))?.is_file() { u64::MAX } else { memory };
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| bad(&e))?;
    if bytes.len() as u64 > limit {
        return Err(bad(&format_args!("larger than the guest's memory ({} MiB)", memory >> 20)));
    }
    Ok(bytes)
}

fn read_image(config: &RunConfig) -> Result<Image, Ending> {
    let mut options = BootOptions { cmdline: config.append.clone(), ..BootOptions::default() };
    let kernel = match &config.kernel {
        Kernel::Builtin => builtin::image().to_vec(),
        Kernel::File(path) => read_file(path, config.memory)?,
        Kernel::Raw { file, load, entry } => {
            options.raw =
                Some(boot::raw::RawStart { load: *load, entry: *entry, mode: boot::raw::RawMode::Flat32 });
            read_file(file, config.memory)?
        }
    };
    if let Some(initrd) = &config.initrd {
        options.initrd = Some(read_file(initrd, config.memory)?);
    }
    for module in &config.modules {
        options
            .modules
            .push(Module { cmdline: module.args.clone(), data: read_file(&module.path, config.memory)? });
    }
    Ok(Image { kernel, options })
}

fn kernel_name(config: &RunConfig) -> String {
    match &config.kernel {
        Kernel::Builtin => "built-in guest".into(),
        Kernel::File(path) | Kernel::Raw { file: path, .. } => path.display().to_string(),
    }
}

fn host_error(what: &str, e: &dyn std::fmt::Display) -> Ending {
    Ending::HostCannot(format!("{what}: {e}; `subring doctor` shows what this host offers"))
}

/// Runs a guest until it ends.
pub fn run(config: RunConfig) -> RunOutcome {
    // With this handler a file that outgrows RLIMIT_FSIZE (guest RAM is one) is an error of the call, not our death.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    let image = match read_image(&config) {
        Ok(image) => image,
        Err(ending) => return RunOutcome::not_started(ending),
    };
    let attention = Arc::new(Attention::default());
    let console = match Console::open(&config, &attention) {
        Ok(console) => console,
        Err(ending) => return RunOutcome::not_started(ending),
    };
    let outcome = loop {
        let (ending, again, stats) = boot_once(&config, &image, &attention, &console);
        if !again {
            break RunOutcome { ending, stats };
        }
    };
    drop(console);
    outcome
}

type Finished = (Ending, bool, Option<Box<crate::account::Stats>>);

/// One life of the guest, from switching on to its end; the flag says that it is to be started again.
fn boot_once(config: &RunConfig, image: &Image, attention: &Arc<Attention>, console: &Console) -> Finished {
    let time0 = Instant::now();
    let held = config.lockstep.map(|_| HeldTime::new());
    let clock = match &held {
        Some(time) => Clock::new(Box::new(time.clone()), host_utc_ns()),
        None => Clock::host(),
    };
    let ram = match GuestRam::new(config.memory) {
        Ok(ram) => ram,
        Err(e) => return (host_error("guest RAM", &e), false, None),
    };
    let boot = match boot::load(&image.kernel, &image.options, &mut &ram) {
        Ok(boot) => boot,
        Err(e) => return (Ending::BadInput(format!("{}: {e}", kernel_name(config))), false, None),
    };
    let devices = Devices::new(DevicesConfig {
        ram_bytes: config.memory,
        utc_ns: clock.utc_ns(),
        serial: console.sinks(),
        debug_console: config
            .debugcon
            .then(|| Box::new(WriterSink(std::io::stderr())) as Box<dyn SerialSink>),
        debug_exit: config.isa_debug_exit,
    });
    let m = Machine::new(ram.clone(), devices, CpuPolicy::host(), clock);
    let placement = match Placement::current() {
        Ok(placement) => placement,
        Err(e) => return (host_error("asking for the CPU", &e), false, None),
    };
    let engines = match engines(&ram, config, placement.cpu()) {
        Ok(engines) => engines,
        Err(ending) => return (ending, false, None),
    };
    // For the accounting; a millisecond is good to 1 part in 10,000.
    let ns_per_tsc = m.clock.tsc_hz(Duration::from_millis(1)).map_or(0.0, |hz| 1e9 / hz as f64);
    let mut em = match Em::new(boot.cpu, m, engines, attention.clone(), config.trace, ns_per_tsc) {
        Ok(em) => em,
        Err(e) => return (host_error("timer", &e), false, None),
    };
    if let (Some(lockstep), Some(time)) = (config.lockstep, held) {
        let follower = match GuestRam::new(config.memory) {
            Ok(ram) => ram,
            Err(e) => return (host_error("the follower's RAM", &e), false, None),
        };
        let devices = Devices::new(DevicesConfig::default());
        let follower = Machine::new(follower, devices, em.m.policy.clone(), Clock::host());
        em.lockstep = Some(Lockstep::new(em.cpu.clone(), &mut em.m, follower, time, lockstep.limit));
    }
    // Only now: threads started before this must not share the CPU with a guest that never sleeps.
    if !em.engines.none()
        && let Err(e) = em.settle(placement)
    {
        return (host_error("binding the thread to a CPU", &e), false, None);
    }
    let stop = em.run();
    em.finish_account();
    let mut stats = Box::new(em.account.stats(em.engines.name(), time0.elapsed().as_nanos() as u64));
    stats.page_fault_handler = em.page_fault_handler();
    console.flush();
    if let Some(lockstep) = em.lockstep.as_ref().filter(|_| !matches!(stop, Stop::Differs(_))) {
        eprintln!("subring: {}", lockstep.summary());
    }
    if let Some(path) = &config.vga_dump {
        let text = dump::vga(&em.m);
        if path.as_os_str() == "-" {
            print!("{text}");
        } else if let Err(e) = std::fs::write(path, text) {
            log::error!("{}: {e}", path.display());
        }
    }
    let (ending, again) = match stop {
        Stop::Halted => (Ending::PoweredOff("halted with interrupts disabled"), false),
        Stop::Restart(how) => (Ending::Restart(how), config.reboot),
        Stop::Reset => (Ending::Quit, true),
        Stop::DebugExit(value) => (Ending::DebugExit(value), false),
        Stop::Quit => (Ending::Quit, false),
        Stop::Interrupted => (Ending::Interrupted, false),
        Stop::Fatal(reason) => (Ending::GuestFatal(dump::fatal(&mut em, &reason)), false),
        Stop::Host(reason) => (Ending::HostCannot(reason), false),
        Stop::Compared => (Ending::Compared, false),
        Stop::Differs(Difference(text)) => (Ending::Differs(text), false),
    };
    (ending, again, Some(stats))
}

/// The engines a run may use, the best first.
fn engines(ram: &GuestRam, config: &RunConfig, cpu: usize) -> Result<Engines, Ending> {
    let mut list: Vec<Box<dyn Engine>> = Vec::new();
    if matches!(config.engine, EngineChoice::Auto | EngineChoice::Raw) {
        let instead =
            config.engine == EngineChoice::Auto && config.shuffle.is_none() && config.lockstep.is_none();
        // Else this would show when the guest is under way.
        let tried = match instead.then(modify_ldt) {
            Some(Probe::Fails(why)) => Err(format!("modify_ldt: {why}")),
            _ => Ok(()),
        };
        match tried.and_then(|()| raw_engine(ram, config, cpu)) {
            Ok(raw) => list.push(Box::new(raw)),
            Err(why) if instead => match kvm_engine(ram, &CpuPolicy::host()) {
                Ok(kvm) => {
                    eprintln!("subring: there is no raw mode here ({why}): the guest runs on kvm");
                    return Ok(Engines::new(vec![Box::new(kvm)], None));
                }
                Err(no_kvm) => {
                    log::info!("without the kvm engine: {no_kvm}");
                    let why = format!("{why}; --engine interp does without, slowly");
                    return Err(host_error("raw mode", &why));
                }
            },
            Err(why) => return Err(host_error("raw mode", &why)),
        }
    }
    if config.engine == EngineChoice::Ring1 {
        list.push(Box::new(ring1_engine(ram, config).map_err(|e| host_error("the ring1 engine", &e))?));
    }
    if config.engine == EngineChoice::Kvm || config.shuffle.is_some() {
        match kvm_engine(ram, &CpuPolicy::host()) {
            Ok(engine) => {
                if config.shuffle.is_some() {
                    match ring1_engine(ram, config) {
                        Ok(ring1) => list.push(Box::new(ring1)),
                        Err(e) => log::info!("without the ring1 engine: {e}"),
                    }
                }
                list.push(Box::new(engine));
            }
            Err(e) if config.engine == EngineChoice::Kvm => return Err(host_error("kvm", &e)),
            Err(e) => log::info!("without the engines on KVM: {e}"),
        }
    }
    let shuffle = config.shuffle.map(|s| {
        let seed = s.seed.unwrap_or_else(host_driver_shim::tsc::read);
        (Shuffle::new(u64::from(s.interval_ms) * 1_000_000, seed), s.interval_ms, seed)
    });
    let mut engines = Engines::new(list, shuffle.as_ref().map(|(shuffle, ..)| shuffle.clone()));
    // Not with a lockstep: it needs engines on which the guest's reading of the time-stamp counter is seen.
    if config.engine == EngineChoice::Auto && shuffle.is_none() && config.lockstep.is_none() {
        let ram = ram.clone();
        let make =
            move || kvm_engine(&ram, &CpuPolicy::host()).map(|engine| Box::new(engine) as Box<dyn Engine>);
        engines = engines.with_reserve(Box::new(make));
    }
    if let Some((_, ms, seed)) = shuffle {
        let kinds: Vec<_> = engines.kinds().map(EngineKind::name).collect();
        let kinds = kinds.join(", ");
        eprintln!("subring: another engine of {kinds} every {ms} ms; again with --shuffle-seed {seed}");
    }
    Ok(engines)
}

/// The kvm engine, if the host's KVM is hardware.
fn kvm_engine(ram: &GuestRam, policy: &CpuPolicy) -> Result<KvmEngine, String> {
    match kvm::probe() {
        KvmWorth::Hardware { .. } => KvmEngine::new(ram, &policy.rows()).map_err(|e| e.to_string()),
        worth => Err(worth.to_string()),
    }
}

fn raw_engine(ram: &GuestRam, config: &RunConfig, cpu: usize) -> Result<RawEngine, String> {
    let code = CodeMemory::new(CODE_MEMORY).map_err(|e| format!("code memory: {e}"))?;
    let host = raw::RawEngine::new(ram, &code, Some(cpu)).map_err(|e: WorldError| e.to_string())?;
    if config.lockstep.is_some() {
        host.trap_tsc();
    }
    let count_inline = config.stats || config.stats_out.is_some();
    RawEngine::new(Box::new(host), code, count_inline, config.isolation).map_err(|e| e.to_string())
}

fn ring1_engine(ram: &GuestRam, config: &RunConfig) -> Result<RawEngine, String> {
    let code = CodeMemory::new(CODE_MEMORY).map_err(|e| format!("code memory: {e}"))?;
    let host = Ring1Engine::new(ram, &code).map_err(|e: WorldError| e.to_string())?;
    let count_inline = config.stats || config.stats_out.is_some();
    RawEngine::new(Box::new(host), code, count_inline, config.isolation).map_err(|e| e.to_string())
}
