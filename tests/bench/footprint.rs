//! What a guest costs beside its work: CPU time while idle at the prompt, and memory beside its RAM.

use serde_json::json;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;
use subring_tests::cache::{self, SkipReason};
use subring_tests::harness::{Guest, Missed};
use subring_tests::initramfs::USERLAND_MARKER;
use subring_tests::measure::{Series, host};
use subring_tests::procs::{self, Idle, Overhead};

const USAGE: &str = "usage: bench-footprint [options]
CPU time of an idle guest, and memory beside guest RAM at the prompt and after the selftest script.
What counts as memory: tests/procs.rs, Overhead.
  --runs N          boots of each kernel (1)
  --kernel K        686 or 686-pae (both)
  --memory MIB      guest RAM (256)
  --append TEXT     added to the command line `console=ttyS0`
  --seconds N       how long to watch the idle guest (10)
  --limit-idle P    fail when the median is over P percent of a CPU
  --limit-mib N     fail when the median after the selftest is over N MiB
  --json FILE       write all numbers there (- for standard output)
Exit codes: 0 measured, 1 a boot failed or a limit is missed, 2 usage, 77 skipped.";

const KNOWN: [&str; 8] =
    ["--runs", "--kernel", "--memory", "--append", "--seconds", "--limit-idle", "--limit-mib", "--json"];

fn main() -> ExitCode {
    let mut options: BTreeMap<String, String> = BTreeMap::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let Some(value) = args.next().filter(|_| KNOWN.contains(&arg.as_str())) else {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        };
        options.insert(arg, value);
    }
    match measure(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            cache::skip("bench-footprint", &reason);
            ExitCode::from(77)
        }
    }
}

/// One boot's numbers.
struct Sample {
    idle: Idle,
    at_prompt: Overhead,
    after_selftest: Overhead,
}

fn measure(options: &BTreeMap<String, String>) -> Result<bool, SkipReason> {
    let number = |name: &str, default: f64| -> Result<f64, SkipReason> {
        let Some(text) = options.get(name) else { return Ok(default) };
        text.parse().map_err(|_| SkipReason(format!("{name}: {text} is no number")))
    };
    let runs = number("--runs", 1.0)? as usize;
    let time = Duration::from_secs_f64(number("--seconds", 10.0)?);
    let memory = options.get("--memory").map_or("256", String::as_str);
    let append = options.get("--append").map_or("", String::as_str);
    let kernels = match options.get("--kernel").map(String::as_str) {
        Some("686") => vec![("686", cache::kernel_686()?)],
        Some("686-pae") => vec![("686-pae", cache::kernel_686_pae()?)],
        None => vec![("686", cache::kernel_686()?), ("686-pae", cache::kernel_686_pae()?)],
        Some(other) => return Err(SkipReason(format!("--kernel: {other} is neither 686 nor 686-pae"))),
    };
    let initrd = cache::initrd()?.display().to_string();
    let (limit_idle, limit_mib) =
        (number("--limit-idle", f64::INFINITY)?, number("--limit-mib", f64::INFINITY)?);
    let mut good = true;
    let mut report = serde_json::Map::new();
    for (name, kernel) in kernels {
        let kernel = kernel.display().to_string();
        let cmdline = format!("console=ttyS0 {append}");
        let arguments =
            ["run", "-kernel", &kernel, "-initrd", &initrd, "-append", &cmdline, "-m", memory, "-nographic"];
        let (mut idle, mut switches, mut prompt, mut after) =
            (Series::default(), Series::default(), Series::default(), Series::default());
        for run in 1..=runs {
            let sample = match one_boot(Guest::spawn(arguments), time) {
                Ok(Some(sample)) => sample,
                Ok(None) => {
                    return Err(SkipReason(
                        "/proc shows nothing of the guest's processes to this user".into(),
                    ));
                }
                Err(missed) => {
                    eprintln!("bench-footprint: {name} run {run}: {missed}");
                    return Ok(false);
                }
            };
            println!("{name} run {run}: idle {}", show_idle(&sample.idle));
            println!("{name} run {run}: at the prompt      {}", show(&sample.at_prompt));
            println!("{name} run {run}: after the selftest {}", show(&sample.after_selftest));
            idle.0.push(sample.idle.share() * 100.0);
            switches.0.push(sample.idle.switches);
            prompt.0.push(mib(sample.at_prompt.total()));
            after.0.push(mib(sample.after_selftest.total()));
        }
        println!("{name:8} idle               {}", idle.line("% of a CPU"));
        println!("{name:8} at the prompt      {}", prompt.line("MiB"));
        println!("{name:8} after the selftest {}", after.line("MiB"));
        if idle.median() > limit_idle || after.median() > limit_mib {
            println!("{name:8} limit missed");
            good = false;
        }
        report.insert(
            name.into(),
            json!({
                "idle_percent": idle.json(), "switches_per_s": switches.json(),
                "prompt_mib": prompt.json(), "after_selftest_mib": after.json(),
            }),
        );
    }
    if let Some(file) = options.get("--json") {
        let report = json!({
            "benchmark": "footprint", "version": 1, "memory_mib": memory, "kernels": report, "host": host(),
        });
        let text = format!("{report:#}\n");
        if file == "-" {
            print!("{text}");
        } else if let Err(e) = std::fs::write(file, text) {
            eprintln!("bench-footprint: {file}: {e}");
            return Ok(false);
        }
    }
    Ok(good)
}

fn one_boot(mut guest: Guest, time: Duration) -> Result<Option<Sample>, Missed> {
    const LONG: Duration = Duration::from_secs(120);
    guest.try_expect(USERLAND_MARKER, LONG)?;
    guest.try_expect("/ # ", LONG)?;
    std::thread::sleep(Duration::from_secs(2));
    let Some(idle) = procs::watch(guest.id(), time) else { return Ok(None) };
    let Some(at_prompt) = procs::overhead(guest.id()) else { return Ok(None) };
    guest.send("sh /tests/selftest");
    guest.try_expect("SUBRING-SELFTEST PASS", LONG)?;
    guest.try_expect("/ # ", LONG)?;
    let Some(after_selftest) = procs::overhead(guest.id()) else { return Ok(None) };
    guest.send("poweroff -f");
    guest.try_wait_exit(LONG)?;
    Ok(Some(Sample { idle, at_prompt, after_selftest }))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn show_idle(idle: &Idle) -> String {
    format!(
        "{:.1} % of a CPU (monitor {:.1}, worlds {:.1}), {:.0} context switches/s",
        idle.share() * 100.0,
        idle.monitor * 100.0,
        idle.worlds * 100.0,
        idle.switches
    )
}

fn show(cost: &Overhead) -> String {
    format!(
        "{:.1} MiB (monitor {:.1}, worlds {:.1}, code and arenas {:.1}, page tables {:.1})",
        mib(cost.total()),
        mib(cost.monitor),
        mib(cost.worlds),
        mib(cost.objects),
        mib(cost.page_tables)
    )
}
