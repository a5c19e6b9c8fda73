//! The benchmark: system calls, memory, processes, computing, boot and footprint; subring, QEMU's TCG and the host.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use subring_tests::cache::{self, SkipReason};
use subring_tests::harness::{self, Guest, Missed};
use subring_tests::initramfs::USERLAND_MARKER;
use subring_tests::measure::{Series, host};
use subring_tests::{chart, procs};

const USAGE: &str = "usage: bench [options]
Runs guests/rows.c in subring, in QEMU (TCG) and on the host, alternating; prints medians, spread and ratios.
  --runs N          runs of each (3)
  --kernel K        686, 686-pae or a file (686)
  --memory MIB      guest RAM (256)
  --append TEXT     added to the command line
  --isolation MODE  subring's, limits, limits-code or strict (limits)
  --row PREFIX      only rows whose names begin so; grow_ are rings of 64, 200 and 500 processes, else left out
  --only WHO        subring, qemu or native: one of them alone
  --timeout SECS    for one run (300)
  --json FILE       write all numbers there
  --svg FILE        write a chart of the ratios there
  --markdown FILE   write the table there
Exit codes: 0 measured and all results equal, 1 not so, 2 usage, 77 skipped.";

const KNOWN: [&str; 11] = [
    "--runs",
    "--kernel",
    "--memory",
    "--append",
    "--isolation",
    "--row",
    "--only",
    "--timeout",
    "--json",
    "--svg",
    "--markdown",
];
/// Nanoseconds an operation for all rows but these.
const UNITS: [(&str, &str); 3] = [("boot", "s"), ("idle_cpu", "%"), ("memory", "MiB")];
/// A guest's clock may differ from the host's by this share, console delays included.
const CLOCK_TOLERANCE: f64 = 0.02;
const WHO: [&str; 3] = ["subring", "qemu", "native"];

type Options = BTreeMap<String, String>;

/// One run's numbers: value by row, checked results by name, and what went wrong.
#[derive(Default)]
struct Run {
    rows: Vec<(String, f64)>,
    checks: BTreeMap<String, String>,
    failures: Vec<String>,
}

fn main() -> ExitCode {
    let mut options = Options::new();
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
            cache::skip("bench", &reason);
            ExitCode::from(77)
        }
    }
}

/// What all runs have in common.
struct Setting {
    program: PathBuf,
    busybox: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    memory: String,
    cmdline: String,
    isolation: String,
    prefix: Option<String>,
    timeout: Duration,
}

fn measure(o: &Options) -> Result<bool, SkipReason> {
    let get = |name: &str, default: &str| o.get(name).cloned().unwrap_or_else(|| default.into());
    let number = |name: &str, default: &str| {
        get(name, default).parse::<u64>().map_err(|_| SkipReason(format!("{name}: no number")))
    };
    let runs = number("--runs", "3")?;
    let program = cache::rows_program()?;
    let binary = std::fs::read(&program).map_err(|e| SkipReason(e.to_string()))?;
    let prefix = o.get("--row").cloned();
    let mut cmdline =
        format!("console=ttyS0 quiet subring.run=rows {}", get("--append", "")).trim_end().to_owned();
    if let Some(prefix) = &prefix {
        cmdline = format!("{cmdline} subring.rows={prefix}");
    }
    let setting = Setting {
        program,
        busybox: cache::busybox()?,
        kernel: match get("--kernel", "686").as_str() {
            "686" => cache::kernel_686()?,
            "686-pae" => cache::kernel_686_pae()?,
            file => file.into(),
        },
        initrd: cache::build_initrd("initrd-rows.gz", &[("bin/rows".into(), 0o755, binary)])?,
        memory: get("--memory", "256"),
        cmdline,
        isolation: get("--isolation", "limits"),
        prefix,
        timeout: Duration::from_secs(number("--timeout", "300")?),
    };
    let only = o.get("--only");
    let mut whose: Vec<(&str, Vec<Run>)> =
        WHO.iter().filter(|w| only.is_none_or(|o| o == *w)).map(|w| (*w, Vec::new())).collect();
    let Setting { kernel, memory, cmdline, isolation, .. } = &setting;
    println!("{} with {memory} MiB, `{cmdline}`, isolation {isolation}", kernel.display());
    let mut good = true;
    for run in 1..=runs {
        for (who, done) in &mut whose {
            let started = Instant::now();
            match one_run(who, &setting)? {
                Ok(result) => {
                    println!(
                        "  run {run}: {who:8} {} rows in {:.0} s",
                        result.rows.len(),
                        started.elapsed().as_secs_f64()
                    );
                    for failure in &result.failures {
                        println!("  run {run}: {who:8} {failure}");
                        good = false;
                    }
                    done.push(result);
                }
                Err(missed) => {
                    println!("  run {run}: {who:8} {missed}");
                    good = false;
                }
            }
        }
    }
    good &= same_results(&whose);
    let table = Table::new(&whose);
    print!("{}", table.text());
    let report = json!({
        "benchmark": "rows", "version": 1, "kernel": setting.kernel.file_name().map(|n| n.to_string_lossy()),
        "memory_mib": setting.memory, "cmdline": setting.cmdline, "runs": runs, "rows": table.json(), "host": host(),
    });
    let bars: Vec<_> = table.0.iter().filter_map(|row| Some((row.name.clone(), row.ratio()?))).collect();
    let files = [
        ("--json", format!("{report:#}\n")),
        ("--svg", chart::svg("time in QEMU (TCG) / time in subring; more is better", &bars)),
        ("--markdown", table.markdown()),
    ];
    for (option, text) in files {
        if let Some(file) = o.get(option)
            && let Err(e) = std::fs::write(file, text)
        {
            eprintln!("bench: {file}: {e}");
            good = false;
        }
    }
    Ok(good)
}

fn one_run(who: &str, s: &Setting) -> Result<Result<Run, Missed>, SkipReason> {
    if who == "native" {
        return natively(s);
    }
    let mut command = if who == "subring" {
        let mut command = Command::new(harness::subring_binary());
        command.args(["run", "--isolation", &s.isolation]);
        command
    } else {
        let mut command = Command::new(cache::qemu()?);
        // RAM as a memory object, so that it can be told from what QEMU needs beside it.
        let ram = format!("memory-backend-memfd,id=ram,size={}M", s.memory);
        command.args(["-accel", "tcg", "-object", &ram, "-machine", "memory-backend=ram"]);
        command
    };
    command.arg("-kernel").arg(&s.kernel).arg("-initrd").arg(&s.initrd).args(["-append", &s.cmdline]);
    command.args(["-m", &s.memory, "-nographic", "-no-reboot"]);
    Ok(in_guest(who, Guest::spawn_in_our_group(command), s))
}

fn in_guest(who: &str, mut guest: Guest, s: &Setting) -> Result<Run, Missed> {
    let booted = guest.try_expect(USERLAND_MARKER, s.timeout)?.as_secs_f64();
    let host_ns = rows_of(&mut guest, s)?;
    let mut run = parse(&guest.console(), host_ns);
    if s.prefix.is_none() {
        std::thread::sleep(Duration::from_secs(1));
        run.rows.push(("boot".into(), booted));
        if let Some(idle) = procs::watch(guest.id(), Duration::from_secs(4)) {
            run.rows.push(("idle_cpu".into(), idle.share() * 100.0));
        }
        if let Some(cost) = procs::overhead(guest.id()) {
            // QEMU's only memory object is the guest's RAM.
            let beside = if who == "qemu" { cost.total() - cost.objects } else { cost.total() };
            run.rows.push(("memory".into(), beside as f64 / f64::from(1 << 20)));
        }
    }
    Ok(run)
}

/// Waits for the rows; yields the host's time between the guest's two clock lines, in nanoseconds.
fn rows_of(guest: &mut Guest, s: &Setting) -> Result<f64, Missed> {
    guest.try_expect("CLOCK ", s.timeout)?;
    let first = Instant::now();
    guest.try_expect("CLOCK ", s.timeout)?;
    let took = first.elapsed().as_secs_f64() * 1e9;
    guest.try_expect("ROWS-END", s.timeout)?;
    Ok(took)
}

fn natively(s: &Setting) -> Result<Result<Run, Missed>, SkipReason> {
    let dir = Path::new("/dev/shm").join(format!("subring-rows-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|e| SkipReason(format!("{}: {e}", dir.display())))?;
    let mut command = Command::new(&s.program);
    command.arg(&dir).arg(&s.busybox).args(&s.prefix);
    let mut program = Guest::spawn_in_our_group(command);
    let result = rows_of(&mut program, s).map(|host_ns| parse(&program.console(), host_ns));
    let _ = std::fs::remove_dir_all(&dir);
    Ok(result)
}

fn parse(console: &str, host_ns: f64) -> Run {
    let mut run = Run::default();
    let mut clocks: Vec<f64> = Vec::new();
    for line in console.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["ROW", name, ns, _] => match ns.parse() {
                Ok(ns) => run.rows.push(((*name).to_owned(), ns)),
                Err(_) => run.failures.push(format!("not understood: {line}")),
            },
            ["CHECK", name, result] => {
                run.checks.insert((*name).to_owned(), (*result).to_owned());
            }
            ["CLOCK", ns] => clocks.extend(ns.parse::<f64>()),
            // Another one means that the guest could not calibrate the time-stamp counter: its rows are not comparable.
            ["CLOCKSOURCE", source] if !source.starts_with("tsc") => {
                run.failures.push(format!("FAIL the guest's clock source is {source}, not tsc"));
            }
            ["FAIL", ..] => run.failures.push(line.trim().to_owned()),
            _ => {}
        }
    }
    match clocks.as_slice() {
        [first, last] if ((last - first) / host_ns - 1.0).abs() <= CLOCK_TOLERANCE => {}
        [first, last] => run.failures.push(format!(
            "FAIL the clock ran {:.2} s in {:.2} s of the host's",
            (last - first) / 1e9,
            host_ns / 1e9
        )),
        _ => run.failures.push("FAIL the clock lines are missing".into()),
    }
    run
}

/// Every run computed the same; says where not.
fn same_results(whose: &[(&str, Vec<Run>)]) -> bool {
    let mut seen: BTreeMap<&str, BTreeMap<&str, Vec<&str>>> = BTreeMap::new();
    for (who, runs) in whose {
        for (name, result) in runs.iter().flat_map(|run| &run.checks) {
            seen.entry(name).or_default().entry(result).or_default().push(who);
        }
    }
    let mut same = !seen.is_empty();
    for (name, results) in seen {
        if results.len() > 1 {
            println!("FAIL results of {name} differ: {results:?}");
            same = false;
        }
    }
    same
}

/// Medians of all contenders, a line for each row, in the order of measuring.
struct Table(Vec<Row>);

struct Row {
    name: String,
    series: [Series; 3],
}

impl Row {
    fn unit(&self) -> &'static str {
        UNITS.iter().find(|(name, _)| *name == self.name).map_or("ns", |(_, unit)| unit)
    }
    fn median(&self, who: usize) -> Option<f64> {
        Some(self.series[who].median()).filter(|m| m.is_finite())
    }
    /// TCG's time over subring's.
    fn ratio(&self) -> Option<f64> {
        Some(self.median(1)? / self.median(0)?).filter(|r| r.is_finite())
    }
    /// The host's time over subring's: 1 is native speed.
    fn of_native(&self) -> Option<f64> {
        Some(self.median(2)? / self.median(0)?)
    }
    fn cells(&self) -> Vec<String> {
        let unit = self.unit();
        let mut cells = vec![self.name.clone()];
        for who in 0..3 {
            cells.push(self.median(who).map_or("-".into(), |m| show(m, unit)));
            let spread = self.series[who].spread() * 100.0;
            cells.push(if spread.is_finite() { format!("{spread:.0} %") } else { "-".into() });
        }
        for ratio in [self.ratio(), self.of_native()] {
            cells.push(ratio.map_or("-".into(), |r| format!("{r:.2}")));
        }
        cells
    }
}

const HEAD: [&str; 9] =
    ["row", "subring", "spread", "TCG", "spread", "native", "spread", "TCG/subring", "native/subring"];

impl Table {
    fn new(whose: &[(&str, Vec<Run>)]) -> Table {
        let mut rows: Vec<Row> = Vec::new();
        for (who, runs) in whose {
            let Some(column) = WHO.iter().position(|w| w == who) else { continue };
            for (name, value) in runs.iter().flat_map(|run| &run.rows) {
                let at = rows.iter().position(|row| row.name == *name).unwrap_or_else(|| {
                    rows.push(Row { name: name.clone(), series: Default::default() });
                    rows.len() - 1
                });
                rows[at].series[column].0.push(*value);
            }
        }
        Table(rows)
    }

    fn text(&self) -> String {
        let line = |c: &[String]| {
            format!(
                "{:20} {:>11} {:>6} {:>11} {:>6} {:>11} {:>6} {:>12} {:>15}\n",
                c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8]
            )
        };
        let mut out = line(&HEAD.map(str::to_owned));
        self.0.iter().for_each(|row| out.push_str(&line(&row.cells())));
        out
    }

    fn markdown(&self) -> String {
        let mut out = format!("| {} |\n|---|{}\n", HEAD.join(" | "), "--:|".repeat(HEAD.len() - 1));
        for row in &self.0 {
            out.push_str(&format!("| {} |\n", row.cells().join(" | ")));
        }
        out
    }

    fn json(&self) -> Value {
        let one = |row: &Row| {
            let series: serde_json::Map<_, _> = WHO
                .iter()
                .zip(&row.series)
                .filter(|(_, series)| !series.0.is_empty())
                .map(|(who, series)| ((*who).to_owned(), series.json()))
                .collect();
            json!({
                "row": row.name, "unit": row.unit(), "series": series,
                "tcg_over_subring": row.ratio(), "native_over_subring": row.of_native(),
            })
        };
        Value::Array(self.0.iter().map(one).collect())
    }
}

/// A value with a unit a person can read.
fn show(value: f64, unit: &str) -> String {
    match unit {
        "ns" if value >= 1e6 => format!("{:.2} ms", value / 1e6),
        "ns" if value >= 1e3 => format!("{:.2} us", value / 1e3),
        "ns" => format!("{value:.0} ns"),
        _ => format!("{value:.2} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str =
        "CLOCK 1000000000\r\nCHECK x87 00ff\r\nROW stat 12.500 80\r\nCLOCK 2000000000\r\nROWS-END\r\n";

    #[test]
    fn rows_and_results_are_read_off_a_serial_console() {
        let run = parse(CONSOLE, 1.001e9);
        assert_eq!(run.rows, [("stat".to_owned(), 12.5)]);
        assert_eq!(run.checks["x87"], "00ff");
        assert!(run.failures.is_empty());
    }

    #[test]
    fn a_clock_that_runs_at_another_pace_is_a_failure() {
        assert!(parse(CONSOLE, 0.9e9).failures[0].contains("clock"));
        assert!(parse("ROWS-END", 1e9).failures[0].contains("clock"));
    }

    #[test]
    fn a_guest_that_gave_up_the_time_stamp_counter_is_a_failure() {
        let with = |source: &str| parse(&format!("CLOCKSOURCE {source}\r\n{CONSOLE}"), 1e9);
        assert!(with("tsc").failures.is_empty() && with("tsc-early").failures.is_empty());
        assert!(with("pit").failures[0].contains("pit"));
    }

    #[test]
    fn a_result_that_differs_is_told() {
        let right = || vec![parse(CONSOLE, 1e9)];
        let wrong = vec![parse(&CONSOLE.replace("00ff", "00fe"), 1e9)];
        assert!(same_results(&[("subring", right()), ("qemu", right())]));
        assert!(!same_results(&[("subring", wrong), ("qemu", right())]));
    }

    #[test]
    fn a_ratio_over_one_is_ahead_of_the_peer() {
        let run = |ns: &str| vec![parse(&CONSOLE.replace("12.500", ns), 1e9)];
        let table = Table::new(&[("subring", run("10")), ("qemu", run("30")), ("native", run("5"))]);
        assert_eq!(table.0[0].ratio(), Some(3.0));
        assert_eq!(table.0[0].of_native(), Some(0.5));
    }
}
