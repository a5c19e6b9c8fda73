//! What a guest that breaks out of its 32 bits finds: nothing, and its end is told at once.

mod common;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use host_driver_shim::world::{World, WorldError};

/// The end of a world that runs this, at once.
fn death_of(code: &[u8]) -> String {
    let mut g = Guest::with(code);
    let start = Instant::now();
    let error = g.world.run(&mut regs()).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    let again = g.world.run(&mut regs()).unwrap_err();
    match (error, again) {
        (WorldError::Died(why), WorldError::Died(_)) => why,
        (error, again) => panic!("{error}, then {again}"),
    }
}

#[test]
fn a_system_call_from_escaped_code_ends_the_world() {
    // mov eax, 39 (getpid); syscall
    let why = death_of(&escape(&[0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0xf4]));
    assert!(why.contains("left its 32-bit mode"), "{why}");
}

#[test]
fn an_exception_in_escaped_code_ends_the_world() {
    let why = death_of(&escape(&[0x0f, 0x0b]));
    assert!(why.contains("left its 32-bit mode"), "{why}");
}

#[test]
fn forbidden_system_calls_through_the_runtime_are_stopped_by_the_filter() {
    for nr in [
        libc::SYS_getpid,
        libc::SYS_openat,
        libc::SYS_clone,
        libc::SYS_execve,
        libc::SYS_kill,
        libc::SYS_prctl,
    ] {
        let why = death_of(&escape(&runtime_syscall(nr as u32)));
        assert!(why.contains("forbidden system call"), "{nr}: {why}");
    }
}

#[test]
fn the_runtime_cannot_be_remapped_even_through_its_own_system_calls() {
    // rdi = the runtime's arena (top of 16 TiB), rsi = 4096, rdx = 7
    let mut mprotect = vec![0x48, 0xbf];
    mprotect.extend(0x1000_0000_0000u64.to_le_bytes());
    mprotect.extend([0xbe, 0, 0x10, 0, 0, 0xba, 7, 0, 0, 0]);
    for nr in [libc::SYS_mprotect, libc::SYS_munmap, libc::SYS_mmap] {
        let code = [mprotect.clone(), runtime_syscall(nr as u32)].concat();
        let why = death_of(&escape(&code));
        assert!(why.contains("forbidden system call"), "{nr}: {why}");
    }
    // Nor discarded (rdx = MADV_DONTNEED).
    let discard = [&mprotect[..], &[0xba, 4, 0, 0, 0], &runtime_syscall(libc::SYS_madvise as u32)].concat();
    let why = death_of(&escape(&discard));
    assert!(why.contains("forbidden system call"), "{why}");
}

#[test]
fn the_windows_descriptor_takes_two_requests_and_no_other_takes_any() {
    for (fd, request) in [(6, 0xc018_aa3fu32), (6, 0x8010_aa01), (5, 0xc020_aa07), (3, 0xc020_aa00)] {
        // edi = the descriptor, esi = the request
        let mut code = vec![0xbf, fd, 0, 0, 0, 0xbe];
        code.extend(request.to_le_bytes());
        code.extend(runtime_syscall(libc::SYS_ioctl as u32));
        let why = death_of(&escape(&code));
        assert!(why.contains("forbidden system call"), "{fd} {request:x}: {why}");
    }
}

#[test]
fn a_world_that_ends_itself_is_noticed_promptly() {
    // edi = 0, exit_group
    let code = [vec![0x31, 0xff], runtime_syscall(libc::SYS_exit_group as u32)].concat();
    let why = death_of(&escape(&code));
    assert!(why.contains("status 0"), "{why}");
}

#[test]
fn lies_in_the_arena_end_the_world_and_not_the_monitor() {
    // rax = what all worlds of the guest share; [rax] = turn, [rax + 4] = who has it. Claim that it is nobody's turn, or that of a
    // world that is none; wake the monitor by dying of a kick or spinning.
    for (at, lie) in [(0u8, 0u32), (0, 2), (0, 3), (0, 0xffff_ffff), (4, 1), (4, 639), (4, 0xffff_ffff)] {
        let mut code = vec![0x48, 0xb8];
        code.extend(0x1001_0000_0000u64.to_le_bytes());
        code.extend([0xc7, 0x40, at]);
        code.extend(lie.to_le_bytes()); // mov dword [rax + at], lie
        code.extend([0xeb, 0xfe]); // jmp $
        let why = death_of(&escape(&code));
        assert!(why.contains("protocol"), "{at} {lie}: {why}");
    }
}

#[test]
fn escaped_code_that_spins_is_ended_by_a_kick() {
    assert_dies_of_a_kick(Guest::with(&escape(&[0xeb, 0xfe])));
}

#[test]
fn a_world_holds_its_memory_a_userfaultfd_at_most_and_no_secret() {
    assert!(std::env::var_os("PATH").is_some(), "the monitor has an environment to hide");
    let _open = std::fs::File::open("/proc/self/status").unwrap();
    let g = Guest::new();
    let proc = PathBuf::from(format!("/proc/{}", g.world.pid()));
    let status = std::fs::read_to_string(proc.join("status")).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    assert!(status.contains("Threads:\t1"));
    let Ok(fds) = std::fs::read_dir(proc.join("fd")) else {
        println!("SKIP: an ordinary account cannot look into a world");
        return;
    };
    let mut links: Vec<_> = fds
        .map(|f| std::fs::read_link(f.unwrap().path()).unwrap().to_string_lossy().into_owned())
        .map(|l| l.trim_end_matches(" (deleted)").to_string())
        .collect();
    links.sort();
    // Where the host has one to give.
    links.retain(|l| l != "anon_inode:[userfaultfd]");
    assert_eq!(links, ["/memfd:subring-arena", "/memfd:subring-code", "/memfd:subring-ram"]);
    let environ = std::fs::read_to_string(proc.join("environ")).unwrap();
    assert!(environ.contains("SUBRING_WORLD=") && !environ.contains("PATH="), "{environ}");
    let maps = std::fs::read_to_string(proc.join("maps")).unwrap();
    for line in maps.lines() {
        let start = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        assert!(start >= 8 << 30, "mapped in the guest's half before the first run: {line}");
        let fine = ["rw-s", "r--s"].iter().zip([&["subring-arena", "subring-ram"][..], &["subring-watched"]]);
        let fine =
            fine.into_iter().any(|(how, what)| line.contains(how) && what.iter().any(|w| line.contains(w)));
        assert!(fine || !line.contains("memfd"), "{line}");
    }
}

fn alive(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

fn gone_soon(pid: &str) -> bool {
    let start = Instant::now();
    while alive(pid) && start.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(5));
    }
    !alive(pid)
}

#[test]
fn a_dropped_world_and_its_process_are_gone() {
    let g = Guest::new();
    let pid = g.world.pid().to_string();
    assert!(alive(&pid));
    drop(g);
    assert!(!PathBuf::from(format!("/proc/{pid}")).exists(), "the engine's drop waits for its worlds");
}

#[test]
#[ignore = "a part of the next test: a monitor that waits to be killed"]
fn monitor_to_be_killed() {
    let mut g = Guest::with(&[0xeb, 0xfe]);
    println!("\nworld {}", g.world.pid());
    let _killed = g.world.run(&mut regs());
}

#[test]
fn a_killed_monitor_takes_its_running_worlds_along() {
    let mut monitor = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "monitor_to_be_killed", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(monitor.stdout.take().unwrap());
    let pid = out.lines().find_map(|l| l.unwrap().strip_prefix("world ").map(str::to_string)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(alive(&pid));
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    assert!(gone_soon(&pid), "world {pid} outlived its monitor");
}
