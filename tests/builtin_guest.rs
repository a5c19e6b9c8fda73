//! The built-in guest passes every one of its checks on a machine that is none of ours: QEMU's TCG is the oracle.

use std::process::{Command, Stdio};
use subring_tests::{cache, or_skip};

/// QEMU's exit status for a write of `value` to isa-debug-exit.
fn qemu_status(value: i32) -> i32 {
    value << 1 | 1
}

#[test]
fn qemu_passes_every_check_of_the_built_in_guest() {
    or_skip!("builtin_guest", cache::qemu());
    let image = std::env::temp_dir().join(format!("subring-builtin-{}.bin", std::process::id()));
    std::fs::write(&image, monitor::builtin::image()).expect("the temporary directory can be written");
    let output = Command::new("timeout")
        .args([
            "60",
            "qemu-system-i386",
            "-accel",
            "tcg",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=2", "-kernel"])
        .arg(&image)
        .stdin(Stdio::null())
        .output();
    let _ = std::fs::remove_file(&image);
    let output = output.expect("qemu can be started");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("FAIL"), "{text}");
    let verdict = text.lines().last().unwrap_or_default();
    let passed = text.lines().filter(|line| line.starts_with("ok ")).count();
    assert_eq!(verdict, format!("VERDICT: PASS ({passed} checks)"), "{text}");
    assert!(passed >= 290, "only {passed} checks ran");
    assert_eq!(output.status.code(), Some(qemu_status(0x10)));
}
