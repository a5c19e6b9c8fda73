//! A running guest goes from engine to engine and does not notice.
//!
//! `SUBRING_BOOTS=5` boots each Debian kernel so many times (once otherwise).

use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw;
use monitor::boot::{self, BootOptions};
use monitor::builtin;
use monitor::cpuid_msr::CpuPolicy;
use monitor::devices::ns16550a::{SerialSink, WriterSink};
use monitor::em::attention::Attention;
use monitor::em::engine::{Engine, Engines, Shuffle};
use monitor::em::placement::Placement;
use monitor::em::raw::{Isolation, RawEngine};
use monitor::em::{Em, Stop};
use monitor::iom::{Devices, DevicesConfig};
use monitor::machine::Machine;
use monitor::tm::Clock;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use subring_tests::cache::{self, SkipReason};
use subring_tests::harness::{Guest, one_guest_at_a_time};
use subring_tests::initramfs::SELFTEST_PASS;
use subring_tests::or_skip;

/// To the end of the self-test on a busy machine.
const BOOT: Duration = Duration::from_secs(240);
const MS: u64 = 1_000_000;
const SELFTEST: &str = "console=ttyS0 quiet subring.run=selftest";

#[test]
fn the_built_in_guest_passes_wherever_it_is_handed_over() {
    let _turn = one_guest_at_a_time();
    for seed in ["1", "2", "3", "4", "5"] {
        let mut guest = Guest::spawn(["run", "--engine-shuffle", "1", "--shuffle-seed", seed]);
        guest.expect("VERDICT: PASS", BOOT);
        assert_eq!(guest.wait_exit(BOOT), 0, "seed {seed}: {}", guest.console());
    }
}

fn boots(kernel: Result<std::path::PathBuf, SkipReason>) {
    let kernel = or_skip!("handover", kernel);
    let initrd = or_skip!("handover", cache::initrd());
    let times = std::env::var("SUBRING_BOOTS").ok().and_then(|n| n.parse().ok()).unwrap_or(1u32);
    let _turn = one_guest_at_a_time();
    for _ in 0..times {
        let path = |p: &Path| p.display().to_string();
        let words = ["run", "--engine-shuffle", "50", "-m", "256", "-append", SELFTEST, "-kernel"];
        let words =
            words.map(str::to_owned).into_iter().chain([path(&kernel), "-initrd".into(), path(&initrd)]);
        let mut guest = Guest::spawn(words);
        assert_eq!(guest.wait_exit(BOOT), 0, "{}", guest.console());
        // The seed is on the console, too.
        assert!(guest.console().contains(SELFTEST_PASS), "{}", guest.console());
        assert!(guest.console().contains("--shuffle-seed "), "{}", guest.console());
    }
}

#[test]
fn the_686_kernel_boots_while_it_is_handed_over_every_50_ms() {
    boots(cache::kernel_686());
}

#[test]
fn the_pae_kernel_boots_while_it_is_handed_over_every_50_ms() {
    boots(cache::kernel_686_pae());
}

/// A console that others may read.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nobody panics while writing").write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs a guest on two raw engines, each with worlds and a code view of its own, and the interpreter. What one engine's
/// guest writes, the other has no notes of.
fn runs_on_two_engines(
    kernel: &[u8],
    options: &BootOptions,
    interval: u64,
    seed: u64,
) -> (Stop, String, u64) {
    let ram = GuestRam::new(256 << 20).expect("guest RAM");
    let boot = boot::load(kernel, options, &mut &ram).expect("the kernel can be loaded");
    let (text, clock) = (Text::default(), Clock::host());
    let sink: Box<dyn SerialSink> = Box::new(WriterSink(text.clone()));
    let devices = Devices::new(DevicesConfig {
        ram_bytes: ram.size(),
        utc_ns: clock.utc_ns(),
        serial: [Some(sink), None, None, None],
        debug_console: None,
        debug_exit: Some(0x501),
    });
    let m = Machine::new(ram.clone(), devices, CpuPolicy::host(), clock);
    let placement = Placement::current().expect("a CPU");
    let engine = || -> Box<dyn Engine> {
        let code = CodeMemory::new(256 << 20).expect("code memory");
        let host = raw::RawEngine::new(&ram, &code, Some(placement.cpu())).expect("raw mode");
        Box::new(RawEngine::new(Box::new(host), code, false, Isolation::Limits).expect("a world"))
    };
    let engines = Engines::new(vec![engine(), engine()], Some(Shuffle::new(interval, seed)));
    let attention = Arc::new(Attention::default());
    let mut em = Em::new(boot.cpu, m, engines, attention, Default::default(), 1.0).expect("a timer");
    em.settle(placement).expect("the thread can be bound");
    let stop = em.run();
    let text = String::from_utf8_lossy(&text.0.lock().expect("nobody panics while writing")).into_owned();
    (stop, text, em.engines.handovers)
}

#[test]
fn an_engine_takes_over_from_another_that_left_it_no_notes() {
    let _turn = one_guest_at_a_time();
    for seed in 1..=5 {
        let (stop, text, handovers) =
            runs_on_two_engines(builtin::image(), &BootOptions::default(), MS / 2, seed);
        assert!(matches!(stop, Stop::DebugExit(0x10)), "seed {seed}: {stop:?}\n{text}");
        assert!(text.contains("VERDICT: PASS"), "seed {seed}: {text}");
        assert!(handovers > 5, "seed {seed}: only {handovers} hand-overs");
    }
}

#[test]
fn debians_kernels_boot_on_two_engines_that_leave_each_other_no_notes() {
    for kernel in [cache::kernel_686(), cache::kernel_686_pae()] {
        let kernel = or_skip!("handover", kernel);
        let initrd = or_skip!("handover", cache::initrd());
        let _turn = one_guest_at_a_time();
        let kernel = std::fs::read(kernel).expect("the kernel can be read");
        let initrd = Some(std::fs::read(initrd).expect("the initramfs can be read"));
        let options = BootOptions { cmdline: SELFTEST.into(), initrd, ..BootOptions::default() };
        let (stop, text, handovers) = runs_on_two_engines(&kernel, &options, 50 * MS, 7);
        assert!(text.contains(SELFTEST_PASS), "{stop:?}\n{text}");
        assert!(handovers > 5, "only {handovers} hand-overs");
    }
}
