//! The interpreter does behind the raw engine what that has just done, and nothing differs.

use std::path::Path;
use std::time::Duration;
use subring_tests::harness::{Guest, one_guest_at_a_time};
use subring_tests::{cache, or_skip};

const LONG: Duration = Duration::from_secs(600);

/// The number before `what` in the summary.
fn counted(console: &str, what: &str) -> u64 {
    let summary = console.lines().find(|line| line.contains("lockstep: no difference")).unwrap_or_default();
    let words: Vec<&str> = summary.split([' ', ';']).collect();
    let at = words.windows(2).find(|pair| pair[1] == what);
    at.and_then(|pair| pair[0].parse().ok()).unwrap_or_else(|| panic!("no {what} in {console}"))
}

#[test]
fn the_built_in_guest_does_the_same_on_the_raw_engine_and_in_the_interpreter() {
    let _turn = one_guest_at_a_time();
    for isolation in ["limits", "strict", "worlds"] {
        let mut guest = Guest::spawn(["run", "--lockstep", "interp", "--isolation", isolation]);
        assert_eq!(guest.wait_exit(LONG), 0, "{}", guest.console());
        let console = guest.console();
        assert!(console.contains("VERDICT: PASS"), "{console}");
        assert!(counted(&console, "instructions") > 100_000, "{console}");
    }
}

#[test]
fn the_first_50_million_instructions_of_debians_kernels_do_the_same() {
    for kernel in [cache::kernel_686(), cache::kernel_686_pae()] {
        let kernel = or_skip!("lockstep", kernel);
        let initrd = or_skip!("lockstep", cache::initrd());
        let _turn = one_guest_at_a_time();
        let path = |p: &Path| p.display().to_string();
        let words = ["run", "--lockstep", "interp", "--lockstep-limit", "50000000", "-m", "64", "-append"];
        let words = words.map(str::to_owned).into_iter();
        let more = ["console=ttyS0".into(), "-kernel".into(), path(&kernel), "-initrd".into(), path(&initrd)];
        let mut guest = Guest::spawn(words.chain(more));
        assert_eq!(guest.wait_exit(LONG), 0, "{}", guest.console());
        assert!(counted(&guest.console(), "instructions") >= 50_000_000, "{}", guest.console());
    }
}
