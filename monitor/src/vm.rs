//! The virtual machine: puts a guest together from a configuration and runs it to its end.

use crate::boot::{self, BootOptions, Module};
use crate::builtin;
use crate::config::{Kernel, RunConfig};
use crate::console_io::Console;
use crate::cpuid_msr::CpuPolicy;
use crate::devices::ns16550a::{SerialSink, WriterSink};
use crate::em::attention::Attention;
use crate::em::lockstep::{Difference, Lockstep};
use crate::em::placement::Placement;
use crate::em::{Em, Stop, dump};
use crate::engines::engines;
use crate::iom::{Devices, DevicesConfig};
use crate::machine::Machine;
use crate::outcome::{Ending, RunOutcome};
use crate::tm::{Clock, HeldTime, host_utc_ns};
use host_driver_shim::ram::GuestRam;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
        Err(e) => return (Ending::host_cannot("guest RAM", &e), false, None),
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
    let mut policy = CpuPolicy::host();
    policy.take_away(config.cpu.hidden.iter().copied());
    if config.lockstep.is_some() {
        policy.hide_randomness();
    }
    let m = Machine::new(ram.clone(), devices, policy, clock);
    let placement = match Placement::current() {
        Ok(placement) => placement,
        Err(e) => return (Ending::host_cannot("asking for the CPU", &e), false, None),
    };
    let engines = match engines(&ram, config, placement.cpu(), m.policy.rows()) {
        Ok(engines) => engines,
        Err(ending) => return (ending, false, None),
    };
    // For the accounting; a millisecond is good to 1 part in 10,000.
    let ns_per_tsc = m.clock.tsc_hz(Duration::from_millis(1)).map_or(0.0, |hz| 1e9 / hz as f64);
    let mut em = match Em::new(boot.cpu, m, engines, attention.clone(), config.trace, ns_per_tsc) {
        Ok(em) => em,
        Err(e) => return (Ending::host_cannot("timer", &e), false, None),
    };
    if let (Some(lockstep), Some(time)) = (config.lockstep, held) {
        let follower = match GuestRam::new(config.memory) {
            Ok(ram) => ram,
            Err(e) => return (Ending::host_cannot("the follower's RAM", &e), false, None),
        };
        let devices = Devices::new(DevicesConfig::default());
        let follower = Machine::new(follower, devices, em.m.policy.clone(), Clock::host());
        let lockstep = Lockstep::new(em.cpu.clone(), &mut em.m, follower, time, lockstep.limit);
        em.lockstep = Some(Box::new(lockstep));
    }
    // Only now: threads started before this must not share the CPU with a guest that never sleeps.
    if !em.engines.none()
        && let Err(e) = em.settle(placement)
    {
        return (Ending::host_cannot("binding the thread to a CPU", &e), false, None);
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
