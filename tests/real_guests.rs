//! Debian's own i386 kernels, unmodified: to a prompt that is used, and to a clean end, on machines of several sizes.
//!
//! `SUBRING_BOOTS=20` boots each kernel so many times in a row (3 otherwise).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};
use subring_tests::cache::{self, SkipReason};
use subring_tests::harness::{Guest, one_guest_at_a_time, subring_binary};
use subring_tests::initramfs::{SELFTEST_PASS, USERLAND_MARKER};
use subring_tests::{or_skip, procs};

/// To userland on a busy machine; a quiet one needs 3 s.
const BOOT: Duration = Duration::from_secs(120);
/// For an answer at the prompt, and for an end.
const SOON: Duration = Duration::from_secs(60);
/// Where Debian's kernels lie without KASLR (CONFIG_PAGE_OFFSET + CONFIG_PHYSICAL_START).
const UNMOVED_TEXT: u32 = 0xc100_0000;

/// One of the two kernels, and what is needed to boot it.
struct Kernel {
    name: &'static str,
    image: PathBuf,
    initrd: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

fn kernel_686() -> Result<Kernel, SkipReason> {
    Ok(Kernel {
        name: "686",
        image: cache::kernel_686()?,
        initrd: cache::initrd()?,
        _turn: one_guest_at_a_time(),
    })
}

fn kernel_pae() -> Result<Kernel, SkipReason> {
    let image = cache::kernel_686_pae()?;
    Ok(Kernel { name: "686-pae", image, initrd: cache::initrd()?, _turn: one_guest_at_a_time() })
}

impl Kernel {
    /// The release `uname -r` must print, read from where the boot protocol says it stands (offset 20Eh, less 200h).
    fn release(&self) -> String {
        let image = fs::read(&self.image).expect("the kernel can be read");
        let at = usize::from(u16::from_le_bytes([image[0x20e], image[0x20f]])) + 0x200;
        let text = image[at..].split(|&b| b == b' ').next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }

    /// The arguments of `subring` for this kernel.
    fn arguments(&self, memory: u32, append: &str) -> Vec<String> {
        let path = |p: &Path| p.display().to_string();
        let cmdline = format!("console=ttyS0 {append}").trim_end().to_owned();
        let words = ["run", "-kernel", &path(&self.image), "-initrd", &path(&self.initrd)];
        let more = ["-append", &cmdline, "-m", &memory.to_string(), "-nographic"];
        words.into_iter().chain(more).map(str::to_owned).collect()
    }

    fn boot(&self, memory: u32, append: &str) -> Running {
        Running::new(Guest::spawn(self.arguments(memory, append)), self.name)
    }

    /// Boots with 256 MiB; the run leaves an accounting.
    fn boot_accounted(&self, append: &str, name: &str) -> (Running, Accounting) {
        let stats = Accounting::new(name);
        let mut arguments = self.arguments(256, append);
        arguments.extend(stats.arguments());
        (Running::new(Guest::spawn(arguments), self.name), stats)
    }

    /// Boots, uses the prompt, powers off.
    fn boots_and_powers_off(&self, memory: u32, append: &str) -> u32 {
        let mut running = self.boot(memory, append);
        let text = running.reaches_a_prompt_that_is_used(&self.release());
        running.ends_after("poweroff -f");
        text
    }
}

/// A guest, and the worlds it has been seen to have.
struct Running {
    guest: Guest,
    name: &'static str,
    worlds: BTreeSet<u32>,
}

impl Running {
    fn new(guest: Guest, name: &'static str) -> Running {
        Running { guest, name, worlds: BTreeSet::new() }
    }

    /// Types at the shell, checks what it answers; yields where the kernel's text lies.
    #[track_caller]
    fn reaches_a_prompt_that_is_used(&mut self, release: &str) -> u32 {
        let g = &mut self.guest;
        g.expect(USERLAND_MARKER, BOOT);
        g.expect("/ # ", SOON);
        g.send("echo $((6*7))");
        g.expect("\n42\r\n", SOON);
        g.send("uname -r -m");
        g.expect(&format!("\n{release} i686\r\n"), SOON);
        g.send("grep -w _text /proc/kallsyms");
        g.expect(" T _text", SOON);
        let console = g.console();
        let line = console.lines().rfind(|line| line.ends_with(" T _text")).unwrap_or_default();
        let text = u32::from_str_radix(line.get(..8).unwrap_or_default(), 16);
        let text = text.unwrap_or_else(|_| panic!("no address in {line:?}"));
        self.worlds = procs::worlds_of(self.guest.id()).into_iter().collect();
        assert!(!self.worlds.is_empty(), "the guest runs without a world process");
        println!(
            "{}: at the prompt after {:.2} s, _text {text:#x}",
            self.name,
            self.guest.age().as_secs_f64()
        );
        text
    }

    /// Types a command that ends the machine; the run must end well and leave nothing behind.
    #[track_caller]
    fn ends_after(&mut self, command: &str) {
        self.guest.send(command);
        assert_eq!(self.guest.wait_exit(SOON), 0, "exit code after {command}");
        self.has_left_nothing();
    }

    #[track_caller]
    fn has_left_nothing(&self) {
        // A world is killed by its monitor's end; the host needs a moment for it.
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let left: Vec<_> = self.worlds.iter().filter(|&&pid| procs::is_world(pid)).collect();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "worlds live on: {left:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn boots_in_a_row() -> u32 {
    std::env::var("SUBRING_BOOTS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

fn boots_several_times_in_a_row(kernel: &Kernel) {
    let places: BTreeSet<u32> = (0..boots_in_a_row()).map(|_| kernel.boots_and_powers_off(256, "")).collect();
    // The chance that KASLR chose the unmoved place every time is under 1 in 1,000 for three boots.
    assert!(places.iter().any(|&text| text != UNMOVED_TEXT), "KASLR has not moved the kernel: {places:x?}");
}

#[test]
fn the_686_kernel_boots_several_times_in_a_row() {
    boots_several_times_in_a_row(&or_skip!("real_guests", kernel_686()));
}

#[test]
fn the_pae_kernel_boots_several_times_in_a_row() {
    boots_several_times_in_a_row(&or_skip!("real_guests", kernel_pae()));
}

#[test]
fn kernels_boot_unmoved_with_nokaslr() {
    for kernel in [kernel_686, kernel_pae] {
        let kernel = or_skip!("real_guests: nokaslr", kernel());
        assert_eq!(kernel.boots_and_powers_off(256, "nokaslr"), UNMOVED_TEXT);
    }
}

/// Boots both kernels with so much memory, if the host has it to give.
fn with_memory(mib: u32) {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available: u32 =
        available.and_then(|kib| kib.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    let needed = mib + 256;
    if available / 1024 < needed {
        let reason =
            SkipReason(format!("{} MiB of host memory are available, {needed} are needed", available / 1024));
        return cache::skip(&format!("real_guests: {mib} MiB"), &reason);
    }
    for kernel in [kernel_686, kernel_pae] {
        let kernel = or_skip!("real_guests: memory", kernel());
        kernel.boots_and_powers_off(mib, "");
    }
}

#[test]
fn kernels_boot_with_64_mib() {
    with_memory(64);
}

#[test]
fn kernels_boot_with_768_mib() {
    with_memory(768);
}

#[test]
fn kernels_boot_with_2_gib() {
    with_memory(2048);
}

#[test]
fn a_restart_ends_the_run() {
    for kernel in [kernel_686, kernel_pae] {
        let kernel = or_skip!("real_guests: reboot", kernel());
        let mut running = kernel.boot(256, "");
        running.reaches_a_prompt_that_is_used(&kernel.release());
        running.ends_after("reboot -f");
    }
}

#[test]
fn with_reboot_a_restart_boots_again() {
    let kernel = or_skip!("real_guests: --reboot", kernel_686());
    let mut arguments = kernel.arguments(256, "");
    arguments.push("--reboot".into());
    let mut running = Running::new(Guest::spawn(arguments), kernel.name);
    running.reaches_a_prompt_that_is_used(&kernel.release());
    let first_worlds = running.worlds.clone();
    running.guest.send("reboot -f");
    running.reaches_a_prompt_that_is_used(&kernel.release());
    assert!(running.worlds.is_disjoint(&first_worlds), "worlds of the first life serve the second");
    assert!(first_worlds.iter().all(|&pid| !procs::is_world(pid)), "worlds of the first life live on");
    running.guest.send_bytes(b"\x01x");
    assert_eq!(running.guest.wait_exit(SOON), 0, "exit code after Ctrl-A x");
    running.has_left_nothing();
}

#[test]
fn results_inside_the_guest_are_right() {
    for kernel in [kernel_686, kernel_pae] {
        let kernel = or_skip!("real_guests: selftest", kernel());
        let (mut running, stats) = kernel.boot_accounted("quiet subring.run=selftest", "selftest");
        running.guest.expect(USERLAND_MARKER, BOOT);
        running.guest.expect("SUBRING-SELFTEST ", BOOT);
        running.guest.expect("SUBRING-EXIT 0", SOON);
        assert!(running.guest.console().contains(SELFTEST_PASS), "{}", running.guest.console());
        assert_eq!(running.guest.wait_exit(SOON), 0);
        let trapped = trapped(&stats.read());
        assert!(trapped < TRAPPED_AT_MOST, "{trapped} sensitive instructions by host signal");
    }
}

#[test]
fn an_idle_guest_sleeps_in_its_world_from_tick_to_tick() {
    for kernel in [kernel_686, kernel_pae] {
        let kernel = or_skip!("real_guests: idle", kernel());
        let (Running { mut guest, .. }, stats) = kernel.boot_accounted("quiet subring.run=idle", "idle");
        guest.expect("SUBRING-IDLE", BOOT);
        std::thread::sleep(Duration::from_secs(3));
        // A sleeping world hears a key.
        guest.send_bytes(b"\x01x");
        assert_eq!(guest.wait_exit(SOON), 0);
        let stats = stats.read();
        let ticks = by_themselves(&stats, "timer tick, in the world");
        assert!(ticks > 5, "{ticks} ticks in 3 s: {}", stats["inline"]);
    }
}

/// A count of what worlds did by themselves.
fn by_themselves(stats: &serde_json::Value, what: &str) -> u64 {
    let lines = stats["inline"].as_array().expect("it has what worlds did by themselves");
    lines.iter().find(|line| line["instruction"] == what).and_then(|line| line["count"].as_u64()).unwrap_or(0)
}

#[test]
fn two_processes_that_wait_for_each_other_go_from_world_to_world() {
    for kernel in [kernel_686, kernel_pae] {
        let kernel = or_skip!("real_guests: two processes", kernel());
        let (mut running, stats) = kernel.boot_accounted("quiet", "two-processes");
        running.reaches_a_prompt_that_is_used(&kernel.release());
        // Each line goes through both: two CR3 loads.
        running.guest.send("yes | head -n 3000 | while read x; do echo $x; done | wc -l");
        running.guest.expect("\n3000\r\n", SOON);
        running.ends_after("poweroff -f");
        let stats = stats.read();
        let loads = by_themselves(&stats, "CR3 load, from world to world");
        println!("{}: {loads} CR3 loads from world to world", kernel.name);
        assert!(loads > 1000, "{loads} CR3 loads from world to world");
        assert!(trapped(&stats) < TRAPPED_AT_MOST);
    }
}

#[test]
fn worlds_that_are_killed_while_they_sleep_are_replaced() {
    let kernel = or_skip!("real_guests: killed worlds", kernel_686());
    let (mut running, stats) = kernel.boot_accounted("quiet", "killed-worlds");
    running.reaches_a_prompt_that_is_used(&kernel.release());
    let mut killed = 0;
    for round in 1..=3 {
        let look = || -> Vec<(u32, Option<u64>)> {
            let worlds = procs::worlds_of(running.guest.id());
            worlds.into_iter().map(|world| (world, procs::context_switches(world))).collect()
        };
        let before = look();
        // The one the guest idles in wakes at every tick.
        std::thread::sleep(Duration::from_millis(500));
        for (world, _) in look().into_iter().filter(|now| before.contains(now)) {
            let pid = nix::unistd::Pid::from_raw(world.cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it is ours");
            killed += 1;
        }
        // They are missed once they are buried.
        std::thread::sleep(Duration::from_millis(500));
        running.guest.send(&format!("ls /bin | sort | head -n 1; echo $(({round} * 1000))"));
        running.guest.expect(&format!("\n{round}000\r\n"), SOON);
    }
    running.ends_after("poweroff -f");
    let replaced = stats.read()["gauges"]["worlds_replaced"].as_u64().unwrap_or(0);
    println!("{killed} worlds killed, {replaced} replaced");
    assert!(killed > 0 && replaced > 0, "{killed} killed, {replaced} replaced");
}

/// Sensitive instructions that cost a host signal in a self-test boot are some 200: the first hits of sites that are then
/// patched better. A site that keeps trapping has a thousand times more.
const TRAPPED_AT_MOST: u64 = 3000;

/// The sensitive instructions of an accounting that were met by a host signal.
fn trapped(stats: &serde_json::Value) -> u64 {
    let exits = stats["exits"].as_array().expect("it has a list of exits");
    let by_signal = exits.iter().filter(|e| e["cause"] == "sensitive" && e["route"] == "signal");
    by_signal.map(|e| e["count"].as_u64().expect("a count")).sum()
}

/// The file a run writes its accounting to.
struct Accounting(PathBuf);

impl Accounting {
    fn new(name: &str) -> Accounting {
        Accounting(std::env::temp_dir().join(format!("subring-{name}-{}.json", std::process::id())))
    }

    fn arguments(&self) -> [String; 2] {
        ["--stats-out".into(), self.0.display().to_string()]
    }

    /// What it says. The file is gone then.
    fn read(self) -> serde_json::Value {
        let text = fs::read_to_string(&self.0).expect("the accounting was written");
        let _ = fs::remove_file(&self.0);
        serde_json::from_str(&text).expect("it is JSON")
    }
}

/// A directory everybody may read, removed at the end.
struct Readable(PathBuf);

impl Readable {
    fn new() -> std::io::Result<Readable> {
        let dir = Readable(std::env::temp_dir().join(format!("subring-nobody-{}", std::process::id())));
        fs::create_dir_all(&dir.0)?;
        fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o755))?;
        Ok(dir)
    }

    fn copy(&self, from: &Path, name: &str, mode: u32) -> std::io::Result<PathBuf> {
        let to = self.0.join(name);
        fs::copy(from, &to)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
        Ok(to)
    }
}

impl Drop for Readable {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn nobody_with_no_new_privileges_can_boot_it() {
    let setpriv = or_skip!("real_guests: nobody", cache::program("setpriv"));
    for kernel in [kernel_686, kernel_pae] {
        let mut kernel = or_skip!("real_guests: nobody", kernel());
        // What lies in a closed home directory is copied to where nobody can read it.
        let dir = Readable::new().expect("the temporary directory can be written");
        let binary = dir.copy(&subring_binary(), "subring", 0o755).expect("the binary can be copied");
        kernel.image = dir.copy(&kernel.image, "vmlinuz", 0o644).expect("the kernel can be copied");
        kernel.initrd = dir.copy(&kernel.initrd, "initrd.gz", 0o644).expect("the initramfs can be copied");
        let mut command = Command::new(&setpriv);
        // Who is no root is nobody much already.
        let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        if root {
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
            command.arg("--bounding-set=-all");
        }
        command.arg("--no-new-privs").arg(binary).args(kernel.arguments(256, "")).current_dir("/");
        let mut running = Running::new(Guest::spawn_command(command), kernel.name);
        running.reaches_a_prompt_that_is_used(&kernel.release());
        let status = fs::read_to_string(format!("/proc/{}/status", running.guest.id())).unwrap_or_default();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
        if root {
            assert!(status.contains("Uid:\t65534\t65534\t65534\t65534"), "{status}");
        }
        running.ends_after("poweroff -f");
    }
}
