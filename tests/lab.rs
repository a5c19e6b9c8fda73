//! Guests on engines that need hardware virtualisation: in the lab (`tests/lab/run`), a Debian machine on QEMU's TCG, which
//! emulates SVM; directly where the host has hardware KVM.
//!
//! `SUBRING_LAB_DEBIAN=1` boots Debian's kernels there, too, which is slow under TCG.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use subring_tests::cache::{self, SkipReason};
use subring_tests::exhaustive::{Exhaustive, guests};
use subring_tests::harness::{one_guest_at_a_time, subring_binary};
use subring_tests::hostile::{AFTER_IMAGE, BEFORE_IMAGE, End, FINE};
use subring_tests::or_skip;

/// The exit code with which the lab says that it cannot be had here.
const UNAVAILABLE: i32 = 77;

fn lab(arguments: &[&str]) -> Result<Output, SkipReason> {
    let _turn = one_guest_at_a_time();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/run");
    let output = Command::new(script)
        .args(["--timeout", "900"])
        .args(arguments)
        .env("SUBRING_BIN", subring_binary())
        .stdin(Stdio::null())
        .output()
        .expect("the lab's script can be started");
    if output.status.code() == Some(UNAVAILABLE) {
        return Err(SkipReason(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(output)
}

/// One run of the lab's machine for all that is short: starting it costs more than they do.
fn short_runs() -> Result<String, SkipReason> {
    static RUN: OnceLock<Result<String, SkipReason>> = OnceLock::new();
    RUN.get_or_init(|| {
        // The same switch as for real guests.
        cache::busybox()?;
        // Stopped and continued, it leaves KVM_RUN each time.
        let storm = "storm() { \
                     subring run --engine $1 > out 2>&1 & local p=$! n=0; \
                     while kill -STOP $p 2>/dev/null; do \
                     kill -CONT $p; usleep 2000; n=$((n+1)); done; \
                     wait $p; local code=$?; cat out; echo \"signals $n\"; return $code; }; ";
        let job = "echo START doctor; subring doctor; echo END doctor $?; \
                   echo START kvm; subring run --engine kvm; echo END kvm $?; \
                   echo START ring1; subring run --engine ring1; echo END ring1 $?; \
                   echo START lockstep; subring run --engine ring1 --lockstep interp; echo END lockstep $?; \
                   echo START auto; subring run --engine auto --stats; echo END auto $?; \
                   echo START shuffle; subring run --engine-shuffle 20 --stats; echo END shuffle $?; \
                   echo START storm_ring1; storm ring1; echo END storm_ring1 $?; \
                   echo START storm_kvm; storm kvm; echo END storm_kvm $?; \
                   echo START no_ldt; ./without-modify-ldt subring run; echo END no_ldt $?; \
                   echo START oracle; ./privileged-oracle; echo END oracle $?";
        let oracle = env!("CARGO_BIN_EXE_privileged-oracle");
        let no_ldt = env!("CARGO_BIN_EXE_without-modify-ldt");
        let output = lab(&["--add", oracle, "--add", no_ldt, "--command", &format!("{storm}{job}")])?;
        Ok(String::from_utf8_lossy(&output.stdout).replace('\r', "")
            + &String::from_utf8_lossy(&output.stderr))
    })
    .clone()
}

/// What one of them printed, and its exit code.
fn part(name: &str) -> Result<(String, i32), SkipReason> {
    Ok(part_of(&short_runs()?, name))
}

fn part_of(all: &str, name: &str) -> (String, i32) {
    let begin = format!("START {name}\n");
    let end = format!("END {name} ");
    let text = all.split_once(&begin).map(|(_, text)| text).unwrap_or_else(|| panic!("no {name} in: {all}"));
    let (text, rest) = text.split_once(&end).unwrap_or_else(|| panic!("{name} did not end: {all}"));
    let code = rest.lines().next().and_then(|code| code.trim().parse().ok());
    (text.to_owned(), code.unwrap_or_else(|| panic!("no exit code of {name} in: {all}")))
}

#[test]
fn doctor_knows_hardware_when_it_sees_it() {
    let (text, _) = or_skip!("lab", part("doctor"));
    let line = text.lines().find(|line| line.contains("/dev/kvm")).unwrap_or_default();
    assert!(line.contains("hardware, runs protected mode"), "{text}");
}

/// What the built-in guest printed in a run that it ended well.
fn passes(name: &str) -> Result<String, SkipReason> {
    let (text, code) = part(name)?;
    let failed: Vec<_> = text.lines().filter(|line| line.contains("FAIL")).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(text.contains("VERDICT: PASS"), "{text}");
    assert_eq!(code, 0, "{text}");
    Ok(text)
}

/// A number at the end of the accounting; 0 where it is not there.
fn gauge(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[test]
fn the_built_in_guest_passes_on_kvm() {
    or_skip!("lab", passes("kvm"));
}

#[test]
fn the_built_in_guest_does_the_same_on_ring1_and_in_the_interpreter() {
    let text = or_skip!("lab", passes("lockstep"));
    assert!(text.contains("lockstep: no difference in"), "{text}");
}

#[test]
fn the_built_in_guest_passes_on_ring1() {
    or_skip!("lab", passes("ring1"));
}

#[test]
fn a_storm_of_signals_changes_nothing() {
    for name in ["storm_ring1", "storm_kvm"] {
        let text = or_skip!("lab", passes(name));
        assert!(gauge(&text, "signals") > 20, "{text}");
    }
}

#[test]
fn kvm_runs_what_raw_refuses_for_long() {
    let text = or_skip!("lab", passes("auto"));
    assert_ne!(gauge(&text, "kvm_ran_in_v86_mode"), 0, "{text}");
    assert_ne!(gauge(&text, "interpreted_in_v86_mode"), 0, "{text}");
}

#[test]
fn kvm_runs_the_guest_where_there_is_no_raw_mode() {
    let text = or_skip!("lab", passes("no_ldt"));
    assert!(text.contains("modify_ldt") && text.contains("the guest runs on kvm"), "{text}");
}

#[test]
fn the_built_in_guest_passes_while_it_goes_from_engine_to_engine() {
    let text = or_skip!("lab", passes("shuffle"));
    assert!(text.contains("another engine of raw, ring1, kvm, interp"), "{text}");
    assert_ne!(gauge(&text, "handovers_between_engines"), 0, "{text}");
}

#[test]
fn the_interpreter_does_what_kvm_does_at_every_privilege() {
    let (text, code) = or_skip!("lab", part("oracle"));
    println!("{text}");
    assert_eq!(code, 0, "{text}");
    assert!(text.trim_end().ends_with("PASS"), "it ran: {text}");
}

/// Beyond the first 512: each is nine exits.
const EVERY_NTH_SELECTOR: u32 = 501;

/// Guests that try everything on these engines, and what each printed there.
fn exhaustive_runs(guests: &[Exhaustive], engines: &[&str]) -> Result<String, SkipReason> {
    cache::busybox()?;
    let directory = std::env::temp_dir().join(format!("subring-exhaustive-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("the temporary directory can be written");
    let (mut job, mut arguments) = (String::new(), Vec::new());
    for guest in guests {
        let file = directory.join(guest.name);
        std::fs::write(&file, guest.image.bytes()).expect("the temporary directory can be written");
        arguments.extend(["--add".to_owned(), file.display().to_string()]);
        for engine in engines {
            let name = format!("{engine}-{}", guest.name);
            let words = [&BEFORE_IMAGE[..], &[guest.name], &AFTER_IMAGE, &["--engine", engine]].concat();
            job += &format!("echo START {name}; subring {}; echo END {name} $?; ", words.join(" "));
        }
    }
    arguments.extend(["--command".to_owned(), job]);
    let output = lab(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let _ = std::fs::remove_dir_all(&directory);
    let output = output?;
    Ok(String::from_utf8_lossy(&output.stdout).replace('\r', "") + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn what_tries_everything_is_told_the_same_by_ring1_and_kvm() {
    // The interpreter's CPU is the lab's, too: which instructions there are is a matter of the CPU.
    const ENGINES: [&str; 3] = ["interp", "ring1", "kvm"];
    let guests = guests(EVERY_NTH_SELECTOR);
    let all = or_skip!("lab", exhaustive_runs(&guests, &ENGINES));
    for guest in guests {
        let [interp, others @ ..] = ENGINES.map(|engine| {
            let (console, code) = part_of(&all, &format!("{engine}-{}", guest.name));
            (engine, End { code, console, stopped: false })
        });
        for (engine, end) in &others {
            let of_the_cpu = ["opcodes", "selectors"].iter().any(|kind| guest.name.starts_with(kind));
            if *engine == "kvm" && of_the_cpu {
                // It is TCG's here, and has what the policy hides: the privileged oracle compares, with each gap's name.
                assert_eq!(end.said(), Some(FINE), "{}: {end:?}", guest.name);
                continue;
            }
            guest.compare((engine, end), (interp.0, &interp.1));
        }
    }
}

/// Debian's kernels take minutes under TCG.
fn debian_is_asked_for(what: &str) -> bool {
    let asked = std::env::var_os("SUBRING_LAB_DEBIAN").is_some_and(|v| v == "1");
    if !asked {
        let why = format!("{what} takes minutes under TCG (SUBRING_LAB_DEBIAN=1)");
        cache::skip("lab", &SkipReason(why));
    }
    asked
}

fn debian_on_kvm(guest: &str) {
    if !debian_is_asked_for(&format!("{guest} on kvm")) {
        return;
    }
    let output = or_skip!("lab", lab(&["kvm", guest]));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.trim_end().ends_with("PASS"), "{text}");
}

#[test]
fn debians_686_kernel_passes_its_self_test_on_kvm() {
    or_skip!("lab", cache::kernel_686());
    debian_on_kvm("debian-686");
}

#[test]
fn debians_686_pae_kernel_passes_its_self_test_on_kvm() {
    or_skip!("lab", cache::kernel_686_pae());
    debian_on_kvm("debian-686-pae");
}

/// Debian's kernel reaches its userland, which switches the machine off; then what it printed is looked at.
fn debian_boots(kernel: &str, engine: &str, look: impl FnOnce(&str)) {
    if !debian_is_asked_for(&format!("Debian with {engine}")) {
        return;
    }
    let job = format!(
        "subring run {engine} --kernel vmlinuz-{kernel} --initrd initrd.gz -m 256 \
         --append 'console=ttyS0 quiet subring.run=poweroff'"
    );
    let output = or_skip!("lab", lab(&["--command", &job]));
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("SUBRING-USERLAND"), "{text}");
    look(&text);
}

#[test]
fn debians_686_kernel_boots_on_ring1() {
    or_skip!("lab", cache::kernel_686());
    debian_boots("686", "--engine ring1 --stats", |text| {
        // System calls in ring 0, and page faults in the loop around KVM_RUN: the monitor process sees the first of them.
        let events =
            ["int and exceptions to the guest, in the world", "page fault to the guest, in the world"];
        for event in events {
            assert!(gauge(text, event) > 100, "{event}: {text}");
        }
    });
}

#[test]
fn debians_686_kernel_boots_while_it_goes_from_engine_to_engine() {
    or_skip!("lab", cache::kernel_686());
    debian_boots("686", "--engine-shuffle 50", |_| ());
}

#[test]
fn debians_686_pae_kernel_boots_while_it_goes_from_engine_to_engine() {
    or_skip!("lab", cache::kernel_686_pae());
    // Without these two it does not write CR4, which the lab's KVM would answer with #GP (docs/architecture.md).
    debian_boots("686-pae", "--engine-shuffle 50 --cpu host,-pge,-pse", |_| ());
}
