//! A guest's program cannot reach the guest's kernel: every addressing form, in all kinds of isolation.
//!
//! `guests/isolation.c` says what bare metal gives; here it runs in Debian's 686 kernel and its verdicts are read.

use std::collections::BTreeSet;
use std::time::Duration;
use subring_tests::cache;
use subring_tests::harness::{Guest, one_guest_at_a_time};
use subring_tests::initramfs::USERLAND_MARKER;

/// To userland on a busy machine; a quiet one needs 3 s.
const BOOT: Duration = Duration::from_secs(120);
/// For the program's forms; a quiet machine needs a few seconds.
const FORMS: Duration = Duration::from_secs(120);
/// The program tries more forms than this; fewer means that it was cut short.
const AT_LEAST: usize = 200;

/// Forms that `docs/decisions/0003` says limits do not stop: segments with a base, numbers of the host's segments, 64-bit code,
/// and (0007) jumps into code of the kernel's that has run.
const KNOWN_GAPS: [&str; 12] = [
    "long_mode",
    "astray",
    "tls_based_gs",
    "tls_based_fs",
    "tls_based_ds",
    "ldt_based_gs",
    "host_flat",
    "host_code",
    "ds_again",
    "gs_as_ds",
    "tls_flat_fs",
    "tls_flat_gs",
];

/// What the program said: names by verdict, and its last line's numbers.
struct Verdicts {
    ok: BTreeSet<String>,
    gaps: BTreeSet<String>,
    failures: Vec<String>,
    /// How many were ok, failed and gaps by the program's own count.
    counts: Vec<usize>,
}

fn verdicts(console: &str) -> Verdicts {
    let mut v =
        Verdicts { ok: BTreeSet::new(), gaps: BTreeSet::new(), failures: Vec::new(), counts: Vec::new() };
    for line in console.lines().map(str::trim_end) {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["ISOLATION", "ok", name, _] => drop(v.ok.insert(name.into())),
            ["ISOLATION", "gap", name, ..] => drop(v.gaps.insert(name.into())),
            ["ISOLATION", "note", ..] => println!("{line}"),
            ["ISOLATION", ..] => v.failures.push(line.into()),
            ["ISOLATION-END", ref counts @ ..] => {
                v.counts = counts.iter().filter_map(|n| n.parse().ok()).collect();
            }
            _ => {}
        }
    }
    v
}

/// Boots with this isolation, runs the program, and yields what it said.
fn in_a_guest(test: &str, isolation: &str) -> Option<Verdicts> {
    let skipped = |reason| {
        cache::skip(test, &reason);
        None
    };
    let kernel = match cache::kernel_686() {
        Ok(kernel) => kernel,
        Err(reason) => return skipped(reason),
    };
    let program = match cache::isolation_program() {
        Ok(program) => program,
        Err(reason) => return skipped(reason),
    };
    let program = std::fs::read(program).expect("what was just compiled can be read");
    let initrd = match cache::build_initrd("initrd-isolation.gz", &[("bin/isolation".into(), 0o755, program)])
    {
        Ok(initrd) => initrd,
        Err(reason) => return skipped(reason),
    };
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    let mut guest = Guest::spawn([
        "run",
        "-kernel",
        &kernel,
        "-initrd",
        &initrd,
        "-append",
        "console=ttyS0 quiet subring.run=isolation",
        "-nographic",
        "--isolation",
        isolation,
    ]);
    guest.expect(USERLAND_MARKER, BOOT);
    guest.expect("ISOLATION-END ", FORMS);
    guest.expect("SUBRING-EXIT ", FORMS);
    assert_eq!(guest.wait_exit(BOOT), 0);
    Some(verdicts(&guest.console()))
}

fn check(isolation: &str, mut is_allowed: impl FnMut(&str) -> bool) {
    let _turn = one_guest_at_a_time();
    let test = format!("isolation: {isolation}");
    let Some(v) = in_a_guest(&test, isolation) else { return };
    println!("{isolation}: {} forms blocked or right, gaps {:?}", v.ok.len(), v.gaps);
    assert!(v.failures.is_empty(), "not as on bare metal:\n{}", v.failures.join("\n"));
    assert!(v.ok.len() >= AT_LEAST, "only {} forms were tried", v.ok.len());
    assert_eq!(v.counts.len(), 3, "the program's last line is damaged");
    assert_eq!(v.counts[1], 0, "failures by the program's own count");
    let unknown: Vec<_> = v.gaps.iter().filter(|name| !is_allowed(name)).collect();
    assert!(unknown.is_empty(), "reached the kernel: {unknown:?}");
}

#[test]
fn limits_stop_every_form_but_the_documented_gaps() {
    check("limits", |gap| KNOWN_GAPS.contains(&gap));
}

#[test]
fn limits_of_code_segments_stop_jumps_where_they_land() {
    check("limits-code", |gap| gap != "astray" && KNOWN_GAPS.contains(&gap));
}

#[test]
fn strict_stops_every_form() {
    // With a protection key (decision 0015) code can be executed that cannot be read.
    check("strict", |gap| gap == "astray");
}

#[test]
fn worlds_stop_every_form() {
    check("worlds", |_| false);
}

#[test]
fn verdicts_are_told_apart() {
    let text = "ISOLATION ok load 12\r\nISOLATION gap gs c0000000 00000001\r\n\
                ISOLATION FAIL store c0000000 NOT BLOCKED, read 00000000\r\nISOLATION-END 1 1 1\r\n";
    let v = verdicts(text);
    assert!(v.ok.contains("load") && v.ok.len() == 1);
    assert!(v.gaps.contains("gs") && v.gaps.len() == 1);
    assert_eq!(v.failures.len(), 1);
    assert_eq!(v.counts, [1, 1, 1]);
}
