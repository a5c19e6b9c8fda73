//! User-mode speed: the same static i386 program on the host and in a guest, results and times compared.

use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;
use subring_tests::cache::{self, SkipReason};
use subring_tests::harness::{self, Guest};
use subring_tests::measure::{Series, host};

const USAGE: &str = "usage: bench-compute [options]
Runs guests/compute.c natively and in a guest, in turn; prints how fast each loop is against native, by medians and by the
best run of each.
  --under WHO       subring, qemu or both (subring)
  --runs N          runs of each, alternating (5); each run takes the best of so many repetitions of a loop:
  --repetitions N   (3)
  --kernel K        686, 686-pae or a file (686)
  --memory MIB      guest RAM (256)
  --timeout SECS    for one guest's boot or run (300)
  --limit SHARE     fail when a loop of subring's is under SHARE of native speed (medians)
  --json FILE       write all numbers there (- for standard output)
Exit codes: 0 measured and results identical, 1 not so, 2 usage, 77 skipped.";

/// Result (hexadecimal) and best time in microseconds of each loop.
type Loops = BTreeMap<String, (String, f64)>;

fn main() -> ExitCode {
    let mut options: BTreeMap<String, String> = BTreeMap::new();
    let mut args = std::env::args().skip(1);
    let known =
        ["--under", "--runs", "--repetitions", "--kernel", "--memory", "--timeout", "--limit", "--json"];
    while let Some(arg) = args.next() {
        let Some(value) = args.next().filter(|_| known.contains(&arg.as_str())) else {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        };
        options.insert(arg, value);
    }
    match measure(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            cache::skip("bench-compute", &reason);
            ExitCode::from(77)
        }
    }
}

fn measure(options: &BTreeMap<String, String>) -> Result<bool, SkipReason> {
    let option = |name: &str, default: &str| options.get(name).cloned().unwrap_or_else(|| default.into());
    let kernel = match option("--kernel", "686").as_str() {
        "686" => cache::kernel_686()?,
        "686-pae" => cache::kernel_686_pae()?,
        file => file.into(),
    };
    let number = |name: &str, default: &str| -> Result<u64, SkipReason> {
        option(name, default).parse().map_err(|_| SkipReason(format!("{name}: no number")))
    };
    let timeout = Duration::from_secs(number("--timeout", "300")?);
    let (runs, repetitions) = (number("--runs", "5")?, number("--repetitions", "3")?.to_string());
    let limit: Option<f64> = options.get("--limit").and_then(|l| l.parse().ok());
    let program = cache::compute_program()?;
    run_natively(&program, "1")?;
    let binary = std::fs::read(&program).map_err(|e| SkipReason(e.to_string()))?;
    let initrd = cache::build_initrd("initrd-compute.gz", &[("bin/compute".into(), 0o755, binary)])?;

    let under = option("--under", "subring");
    let mut guests = Vec::new();
    if under != "qemu" {
        let mut command = Command::new(harness::subring_binary());
        command.arg("run");
        guests.push(("subring", command));
    }
    if under != "subring" {
        let mut command = Command::new(cache::qemu()?);
        command.args(["-accel", "tcg"]);
        guests.push(("qemu", command));
    }
    let mut good = true;
    let mut report = serde_json::Map::new();
    for (name, mut command) in guests {
        command.arg("-kernel").arg(&kernel).arg("-initrd").arg(&initrd);
        command.args(["-append", "console=ttyS0 quiet", "-nographic", "-no-reboot"]);
        command.args(["-m", &option("--memory", "256")]);
        let mut guest = Guest::spawn_in_our_group(command);
        let mut loops: BTreeMap<String, Pair> = BTreeMap::new();
        if let Err(missed) = guest.try_expect("/ # ", timeout) {
            eprintln!("bench-compute: {name}: {missed}");
            return Ok(false);
        }
        for _ in 0..runs {
            for (which, (result, us)) in run_natively(&program, &repetitions)? {
                let pair = loops.entry(which).or_default();
                pair.native.0.push(us);
                pair.native_results.insert(result);
            }
            let before = guest.console().len();
            guest.send(&format!("/bin/compute {repetitions}"));
            if let Err(missed) = guest.try_expect("COMPUTE-END", timeout) {
                eprintln!("bench-compute: {name}: {missed}");
                return Ok(false);
            }
            for (which, (result, us)) in parse(guest.console().get(before..).unwrap_or_default()) {
                let pair = loops.entry(which).or_default();
                pair.guest.0.push(us);
                pair.guest_results.insert(result);
            }
        }
        println!(
            "{name}: {:9} {:>11} {:>7} {:>11} {:>7} {:>10} {:>6}",
            "loop", "native us", "spread", "guest us", "spread", "of native", "best"
        );
        for (which, pair) in &loops {
            let share = pair.native.median() / pair.guest.median();
            // Of the least disturbed run of each: what a noisy host leaves of medians is no measure.
            let best = pair.native.min() / pair.guest.min();
            let same = pair.native_results.len() == 1 && pair.native_results == pair.guest_results;
            let verdict = if same { "" } else { "  RESULTS DIFFER" };
            println!(
                "{name}: {which:9} {:11.0} {:6.1}% {:11.0} {:6.1}% {share:10.3} {best:6.3}{verdict}",
                pair.native.median(),
                pair.native.spread() * 100.0,
                pair.guest.median(),
                pair.guest.spread() * 100.0,
            );
            good &= same && (name != "subring" || limit.is_none_or(|limit| share >= limit));
            report.insert(
                format!("{name}/{which}"),
                json!({
                    "native_us": pair.native.json(), "guest_us": pair.guest.json(),
                    "of_native": share, "best_of_native": best, "same_result": same,
                }),
            );
        }
    }
    if let Some(file) = options.get("--json") {
        let report = json!({ "benchmark": "compute", "version": 2, "loops": report, "host": host() });
        let text = format!("{report:#}\n");
        if file == "-" {
            print!("{text}");
        } else if let Err(e) = std::fs::write(file, text) {
            eprintln!("bench-compute: {file}: {e}");
            return Ok(false);
        }
    }
    Ok(good)
}

/// Times of one loop, in microseconds, and all results seen of it.
#[derive(Default)]
struct Pair {
    native: Series,
    guest: Series,
    native_results: BTreeSet<String>,
    guest_results: BTreeSet<String>,
}

fn run_natively(program: &Path, repetitions: &str) -> Result<Loops, SkipReason> {
    let output = Command::new(program)
        .arg(repetitions)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| SkipReason(format!("this host cannot run i386 programs: {e}")))?;
    let loops = parse(&String::from_utf8_lossy(&output.stdout));
    if loops.is_empty() {
        return Err(SkipReason(format!("the i386 program does not run on this host ({})", output.status)));
    }
    Ok(loops)
}

/// Reads `COMPUTE name result=hex best_us=n` lines. A loop whose repetitions disagreed has no result to be equal to.
fn parse(console: &str) -> Loops {
    let mut loops = Loops::new();
    for line in console.lines() {
        let mut words = line.trim().split(' ');
        if words.next() != Some("COMPUTE") {
            continue;
        }
        let name = words.next().unwrap_or("").to_owned();
        let (mut result, mut time) = (None, None);
        for word in words {
            match word.split_once('=') {
                Some(("result", hex)) => result = Some(hex.to_owned()),
                Some(("best_us", us)) => time = us.parse().ok(),
                _ => result = Some("unstable".to_owned()),
            }
        }
        if let (Some(result), Some(time)) = (result, time) {
            loops.insert(name, (result, time));
        }
    }
    loops
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_serial_console_are_read_and_others_passed_over() {
        let loops = parse("[    1.0] noise\r\nCOMPUTE x87 result=00ff best_us=12\r\nCOMPUTE-END\r\n");
        assert_eq!(loops.get("x87"), Some(&("00ff".to_owned(), 12.0)));
        assert_eq!(loops.len(), 1);
    }

    #[test]
    fn an_unstable_result_equals_no_native_one() {
        let loops = parse("COMPUTE sse2 result=00ff UNSTABLE best_us=12");
        assert_eq!(loops["sse2"].0, "unstable");
    }
}
