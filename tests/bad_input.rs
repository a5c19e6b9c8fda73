//! Input that cannot be used and hosts that lack something: one line that says so, the documented exit code, nothing
//! left behind.

use host_driver_shim::kvm::{KvmWorth, probe};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use subring_tests::cache;
use subring_tests::harness::subring_binary;
use subring_tests::hostile::{End, FINE, Image, event, finish, run_command};

const LIMIT: Duration = Duration::from_secs(60);
const USAGE: i32 = 2;
const HOST_CANNOT: i32 = 4;

/// A file that is gone with its test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(bytes: &[u8]) -> Scratch {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("subring-bad-input-{}-{number}", std::process::id()));
        std::fs::write(&path, bytes).expect("the temporary directory can be written");
        Scratch(path)
    }
    fn path(&self) -> &str {
        self.0.to_str().expect("the temporary directory has a printable name")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn subring(args: &[&str]) -> End {
    let mut command = Command::new(subring_binary());
    command.args(args);
    run_command(command, LIMIT)
}

/// `run` with a kernel file of these bytes.
fn kernel(bytes: &[u8], more: &[&str]) -> End {
    let file = Scratch::new(bytes);
    let mut args = vec!["run", file.path()];
    args.extend(more);
    subring(&args)
}

/// A bzImage's setup part with a header as boot.rst has it: 32-bit, protocol 2.15, one megabyte of protected-mode code.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0u8; 1024 + (1 << 20)];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &0x1_0000u32.to_le_bytes()); // syssize, paragraphs
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]); // loaded high
    put(0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x10_0000u64.to_le_bytes()); // pref_address
    put(0x260, &0x40_0000u32.to_le_bytes()); // init_size
    put(1024, &[0xfa, 0xf4]); // cli; hlt
    image
}

#[test]
fn the_synthetic_bzimage_boots_when_nothing_is_wrong_with_it() {
    let end = kernel(&bzimage(), &[]);
    assert_eq!(end.code, 0, "{end:?}");
}

#[test]
fn a_kernel_file_that_cannot_be_read_is_named() {
    subring(&["run", "/nonexistent/kernel"]).expect_line(USAGE, "/nonexistent/kernel: No such file");
    subring(&["run", "/"]).expect_line(USAGE, "/: Is a directory");
    subring(&["run", "/dev/zero"]).expect_line(USAGE, "/dev/zero: larger than the guest's memory");
}

#[test]
fn what_is_no_kernel_is_refused() {
    kernel(b"", &[]).expect_line(USAGE, "empty");
    kernel(b"hello, world", &[]).expect_line(USAGE, "not a kernel");
    kernel(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0], &[]).expect_line(USAGE, "gzip");
    kernel(&vec![0xa5; 100_000], &[]).expect_line(USAGE, "not a kernel");
}

#[test]
fn a_truncated_kernel_is_refused_wherever_it_is_cut() {
    let whole = bzimage();
    // The header counts in paragraphs; up to 15 bytes may be missing of the last one.
    for len in [0x202, 0x206, 0x230, 600, 1024, 1025, 5000, whole.len() - 17] {
        let end = kernel(&whole[..len], &[]);
        assert_eq!(end.code, USAGE, "cut at {len}: {end:?}");
        assert_eq!(end.console.lines().count(), 1, "cut at {len}: {end:?}");
    }
}

#[test]
fn a_64_bit_kernel_is_refused() {
    kernel(&std::fs::read("/proc/self/exe").unwrap(), &[]).expect_line(USAGE, "64-bit kernel");
    let mut linux = bzimage();
    // A 64-bit Linux has its 64-bit entry point and says so (XLF_KERNEL_64, XLF_CAN_BE_LOADED_ABOVE_4G).
    linux[0x236..0x238].copy_from_slice(&3u16.to_le_bytes());
    kernel(&linux, &[]).expect_line(USAGE, "64-bit kernel");
}

#[test]
fn a_corrupt_kernel_is_refused() {
    let mut old = bzimage();
    old[0x206..0x208].copy_from_slice(&0x0100u16.to_le_bytes());
    kernel(&old, &[]).expect_line(USAGE, "too old");
    let mut elf = vec![0u8; 4096];
    elf[..20].copy_from_slice(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0");
    elf[28..32].copy_from_slice(&0xffff_fff0u32.to_le_bytes()); // e_phoff
    elf[42..46].copy_from_slice(&[32, 0, 0xff, 0xff]); // e_phentsize, e_phnum
    let end = kernel(&elf, &[]);
    assert_eq!((end.code, end.console.lines().count()), (USAGE, 1), "{end:?}");
}

#[test]
fn an_initrd_that_cannot_be_had_or_does_not_fit_is_named() {
    kernel(&bzimage(), &["--initrd", "/nonexistent/initrd"]).expect_line(USAGE, "/nonexistent/initrd");
    let initrd = Scratch::new(&vec![7; 14 << 20]);
    kernel(&bzimage(), &["--initrd", initrd.path(), "-m", "16"]).expect_line(USAGE, "initrd does not fit");
}

#[test]
fn too_little_memory_says_how_much_is_needed() {
    kernel(&bzimage(), &["-m", "3"]).expect_line(USAGE, "-m");
    subring(&["run", "-m", "0"]).expect_line(USAGE, "out of range");
    subring(&["run", "-m", "1T"]).expect_line(USAGE, "memory size");
    match cache::kernel_686() {
        Ok(debian) => {
            let debian = debian.to_str().unwrap().to_owned();
            subring(&["run", &debian, "-m", "16"]).expect_line(USAGE, "too little memory");
        }
        Err(reason) => cache::skip("a Debian kernel in 16 MiB", &reason),
    }
}

#[test]
fn mistakes_on_the_command_line_are_one_line() {
    for args in [
        &["run", "--frobnicate"][..],
        &["run", "-frobnicate", "x"],
        &["frobnicate"],
        &[],
        &["run", "--engine", "magic"],
        &["run", "--serial", "carrier-pigeon"],
        &["run", "--raw", "/bin/true"],
        &["run", "--initrd", "/bin/true"],
        &["report", "/nonexistent"],
        &["scan", "/nonexistent"],
    ] {
        let end = subring(args);
        assert_eq!((end.code, end.console.lines().count()), (USAGE, 1), "{args:?}: {end:?}");
    }
}

#[test]
fn a_raw_binary_must_lie_in_memory_and_start_inside_itself() {
    let file = Scratch::new(&[0xf4]);
    let at = |load, entry| subring(&["run", "--raw", file.path(), "--load-addr", load, "--entry", entry]);
    at("0x40000000", "0x40000000").expect_line(USAGE, "too little memory");
    at("0x100000", "0x200000").expect_line(USAGE, "entry point");
    at("0xffffffff", "0xffffffff").expect_line(USAGE, "memory");
}

/// A guest that says FINE, from ring 3 and back.
fn good_guest() -> Scratch {
    let mut image = Image::user();
    image.code(subring_tests::hostile::USER, |a| a.int(0x40));
    Scratch::new(image.bytes())
}

fn run_args(file: &Scratch) -> Vec<String> {
    ["run", "--raw", file.path(), "--load-addr", "0x100000", "--isa-debug-exit", "--engine", "raw"]
        .map(String::from)
        .to_vec()
}

/// A program before subring that takes something away from it.
fn under(before: &[&str], file: &Scratch) -> End {
    under_with(before, &[], file)
}

/// The same with more arguments for subring.
fn under_with(before: &[&str], more: &[&str], file: &Scratch) -> End {
    let mut command = Command::new(before[0]);
    command.args(&before[1..]).arg(subring_binary()).args(run_args(file)).args(more);
    run_command(command, LIMIT)
}

fn exists(program: &str) -> bool {
    Path::new("/usr/bin").join(program).exists() || Path::new("/bin").join(program).exists()
}

#[test]
fn a_host_without_modify_ldt_is_told_so() {
    let file = good_guest();
    let before = [env!("CARGO_BIN_EXE_without-modify-ldt")];
    under(&before, &file).expect_line(HOST_CANNOT, "modify_ldt");
    let end = under_with(&before, &["--engine", "auto"], &file);
    if matches!(probe(), KvmWorth::Hardware { .. }) {
        assert!(end.console.contains("modify_ldt") && end.console.contains("runs on kvm"), "{end:?}");
        end.expect_said(event(0x40));
    } else {
        assert!(end.console.contains("--engine interp"), "{end:?}");
        end.expect_line(HOST_CANNOT, "modify_ldt");
    }
}

#[test]
fn nobody_with_no_new_privileges_can_run_a_guest() {
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
    if !root || !exists("setpriv") {
        println!("SKIP: changing to user nobody needs root and setpriv");
        return;
    }
    // Where nobody can reach it.
    let binary = Scratch::new(&std::fs::read(subring_binary()).unwrap());
    let file = good_guest();
    for path in [&binary, &file] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path.0, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs", binary.path()]);
    command.args(run_args(&file)).current_dir("/");
    run_command(command, LIMIT).expect_said(event(0x40));
}

#[test]
fn limits_on_resources_end_in_one_line() {
    if !exists("prlimit") {
        println!("SKIP: no prlimit");
        return;
    }
    let file = good_guest();
    for limit in
        ["--as=300000000", "--as=100000000", "--nofile=12", "--nofile=5", "--fsize=1000000", "--stack=65536"]
    {
        let end = under(&["prlimit", limit], &file);
        let works = end.said() == Some(event(0x40));
        assert!(works || end.code == HOST_CANNOT && end.console.lines().count() == 1, "{limit}: {end:?}");
    }
}

#[test]
fn a_guest_may_say_that_all_is_fine() {
    let mut image = Image::kernel();
    image.code(subring_tests::hostile::KERNEL, |a| finish(a, FINE));
    image.run("raw", LIMIT).expect_said(FINE);
}
