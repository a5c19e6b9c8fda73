//! Boot to userland: subring against QEMU's TCG, alternating, on the same kernel, initramfs and command line.

use serde_json::json;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;
use subring_tests::cache::{self, SkipReason};
use subring_tests::harness::{self, Guest};
use subring_tests::initramfs::USERLAND_MARKER;
use subring_tests::measure::{Series, host};

const USAGE: &str = "usage: bench-boot [options]
Measures the time from the start of the process to the first line of the guest's userland.
  --runs N          runs of each, alternating (5)
  --kernel K        686, 686-pae or a file (686)
  --memory MIB      guest RAM (256)
  --append TEXT     added to the command line `console=ttyS0`
  --only WHO        subring or qemu: one of them alone
  --timeout SECS    for one boot (120)
  --limit RATIO     fail when subring's median is over RATIO of the peer's
  --json FILE       write all numbers there (- for standard output)
Exit codes: 0 measured, 1 a boot failed or the limit is missed, 2 usage, 77 skipped.";

struct Options {
    runs: usize,
    kernel: String,
    memory: String,
    append: String,
    only: Option<String>,
    timeout: Duration,
    limit: Option<f64>,
    json: Option<String>,
}

fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut o = Options {
        runs: 5,
        kernel: "686".into(),
        memory: "256".into(),
        append: String::new(),
        only: None,
        timeout: Duration::from_secs(120),
        limit: None,
        json: None,
    };
    let mut args = args;
    while let Some(arg) = args.next() {
        if arg == "--help" || arg == "-h" {
            return Err(USAGE.into());
        }
        let value = args.next().ok_or_else(|| format!("{arg} needs a value\n{USAGE}"))?;
        let bad = |_| format!("{arg}: {value} is no number");
        match arg.as_str() {
            "--runs" => o.runs = value.parse().map_err(bad)?,
            "--kernel" => o.kernel = value,
            "--memory" => o.memory = value,
            "--append" => o.append = value,
            "--only" if value == "subring" || value == "qemu" => o.only = Some(value),
            "--timeout" => o.timeout = Duration::from_secs(value.parse().map_err(bad)?),
            "--limit" => {
                o.limit = Some(value.parse().map_err(|_| format!("{arg}: {value} is no number"))?);
            }
            "--json" => o.json = Some(value),
            _ => return Err(format!("{arg} {value}: not understood\n{USAGE}")),
        }
    }
    Ok(o)
}

/// Whom to measure.
struct Contender {
    name: &'static str,
    program: PathBuf,
    first_args: &'static [&'static str],
    times: Series,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    match measure(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            cache::skip("bench-boot", &reason);
            ExitCode::from(77)
        }
    }
}

fn measure(o: &Options) -> Result<bool, SkipReason> {
    let kernel = match o.kernel.as_str() {
        "686" => cache::kernel_686()?,
        "686-pae" => cache::kernel_686_pae()?,
        file => PathBuf::from(file),
    };
    let initrd = cache::initrd()?;
    let cmdline = format!("console=ttyS0 {}", o.append).trim_end().to_owned();
    let mut contenders = Vec::new();
    if o.only.as_deref() != Some("qemu") {
        let program = harness::subring_binary();
        contenders.push(Contender {
            name: "subring",
            program,
            first_args: &["run"],
            times: Series::default(),
        });
    }
    if o.only.as_deref() != Some("subring") {
        let program = cache::qemu()?;
        let first_args = &["-accel", "tcg"];
        contenders.push(Contender { name: "qemu", program, first_args, times: Series::default() });
    }
    println!("boot to userland: {} with {} MiB, `{cmdline}`, {} runs", kernel.display(), o.memory, o.runs);
    for run in 1..=o.runs {
        for c in &mut contenders {
            let mut command = Command::new(&c.program);
            command.args(c.first_args).arg("-kernel").arg(&kernel).arg("-initrd").arg(&initrd);
            command.args(["-append", &cmdline, "-m", &o.memory, "-nographic", "-no-reboot"]);
            match Guest::spawn_in_our_group(command).try_expect(USERLAND_MARKER, o.timeout) {
                Ok(time) => {
                    println!("  run {run}: {:8} {:.3} s", c.name, time.as_secs_f64());
                    c.times.0.push(time.as_secs_f64());
                }
                Err(missed) => {
                    eprintln!("bench-boot: {} run {run}: {missed}", c.name);
                    return Ok(false);
                }
            }
        }
    }
    for c in &contenders {
        println!("{:8} {}", c.name, c.times.line("s"));
    }
    let ratio = match contenders.as_slice() {
        [subring, peer] => Some(subring.times.median() / peer.times.median()),
        _ => None,
    };
    if let Some(ratio) = ratio {
        println!("ratio    {ratio:.3} (subring's median over qemu's; under 1 is faster)");
    }
    if let Some(file) = &o.json {
        let series: serde_json::Map<_, _> =
            contenders.iter().map(|c| (c.name.to_owned(), c.times.json())).collect();
        let report = json!({
            "benchmark": "boot", "version": 1, "unit": "s", "kernel": kernel, "cmdline": cmdline,
            "memory_mib": o.memory, "series": series, "ratio": ratio, "host": host(),
        });
        if let Err(e) = write_report(file, &report) {
            eprintln!("bench-boot: {file}: {e}");
            return Ok(false);
        }
    }
    match (ratio, o.limit) {
        (Some(ratio), Some(limit)) if ratio > limit => {
            println!("limit    {limit} missed");
            Ok(false)
        }
        _ => Ok(true),
    }
}

fn write_report(file: &str, report: &serde_json::Value) -> std::io::Result<()> {
    let text = format!("{report:#}\n");
    if file == "-" {
        print!("{text}");
        return Ok(());
    }
    std::fs::write(file, text)
}
