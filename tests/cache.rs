//! What the tests fetch or build once and keep: Debian's kernels, busybox, the initramfs, the compute program.

use crate::initramfs;
use std::ffi::OsString;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Why a test cannot be run here. It is printed, never swallowed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SkipReason(pub String);

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Says that a test is skipped. Goes past the test harness, which keeps back what passing tests print.
pub fn skip(test: &str, reason: &SkipReason) {
    let _ = writeln!(std::io::stderr(), "SKIP: {test}: {reason}");
}

/// The value, or an early return from the test with a `SKIP:` line.
#[macro_export]
macro_rules! or_skip {
    ($test:expr, $value:expr) => {
        match $value {
            Ok(value) => value,
            Err(reason) => {
                $crate::cache::skip($test, &reason);
                return;
            }
        }
    };
}

/// The cache directory: `SUBRING_CACHE`, or `tests/cache` in the source tree.
#[must_use]
pub fn dir() -> PathBuf {
    std::env::var_os("SUBRING_CACHE")
        .filter(|v| !v.is_empty())
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("cache"), PathBuf::from)
}

fn fetched(name: &str) -> Result<PathBuf, SkipReason> {
    if std::env::var_os("SUBRING_NO_GUESTS").is_some_and(|v| v == "1") {
        return Err(SkipReason("real guests are switched off (SUBRING_NO_GUESTS=1)".into()));
    }
    let path = dir().join(name);
    match std::fs::metadata(&path) {
        Ok(m) if m.is_file() && m.len() > 0 => Ok(path),
        _ => Err(SkipReason(format!("{name} is not in {} (run tests/guests/fetch)", dir().display()))),
    }
}

/// Debian's `linux-image-686`, without PAE.
pub fn kernel_686() -> Result<PathBuf, SkipReason> {
    fetched("vmlinuz-686")
}

/// Debian's `linux-image-686-pae`.
pub fn kernel_686_pae() -> Result<PathBuf, SkipReason> {
    fetched("vmlinuz-686-pae")
}

/// Debian's `busybox-static` for i386.
pub fn busybox() -> Result<PathBuf, SkipReason> {
    fetched("busybox")
}

/// The initramfs, built anew once in every process that asks, so that it is never older than its scripts.
pub fn initrd() -> Result<PathBuf, SkipReason> {
    static BUILT: OnceLock<Result<PathBuf, SkipReason>> = OnceLock::new();
    BUILT.get_or_init(|| build_initrd("initrd.gz", &[])).clone()
}

/// Builds an initramfs with more files in it (guest path, permission bits, contents), under `name` in the cache.
pub fn build_initrd(name: &str, extra: &[(String, u32, Vec<u8>)]) -> Result<PathBuf, SkipReason> {
    let busybox = busybox()?;
    let path = dir().join(name);
    let failed = |e: std::io::Error| SkipReason(format!("cannot build {}: {e}", path.display()));
    let mut bytes = Vec::new();
    initramfs::write(&mut bytes, &std::fs::read(busybox).map_err(failed)?, extra).map_err(failed)?;
    replace(&path, &bytes).map_err(failed)?;
    Ok(path)
}

/// Writes a file so that readers see the old one or the new one, never half of it.
pub fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut part = OsString::from(path);
    part.push(format!(".{}.part", std::process::id()));
    std::fs::write(&part, bytes)?;
    std::fs::rename(&part, path)
}

/// `guests/compute.c`, compiled for i386.
pub fn compute_program() -> Result<PathBuf, SkipReason> {
    compiled("compute")
}

/// `guests/rows.c`, compiled for i386.
pub fn rows_program() -> Result<PathBuf, SkipReason> {
    compiled("rows")
}

/// `guests/isolation.c`, compiled for i386.
pub fn isolation_program() -> Result<PathBuf, SkipReason> {
    compiled("isolation")
}

/// `guests/NAME.c` as a static i386 program without a C library.
fn compiled(name: &str) -> Result<PathBuf, SkipReason> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("guests/{name}.c"));
    std::fs::create_dir_all(dir()).map_err(|e| SkipReason(format!("{}: {e}", dir().display())))?;
    let part = dir().join(format!("{name}.{}.part", std::process::id()));
    let output = Command::new("gcc")
        .args(["-m32", "-march=i686", "-O2", "-ffreestanding", "-nostdlib", "-static"])
        .args(["-fno-stack-protector", "-fno-pic", "-no-pie", "-fno-math-errno", "-o"])
        .args([&part, &source])
        .output()
        .map_err(|e| SkipReason(format!("no gcc to compile guests/{name}.c with: {e}")))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find(|l| l.contains("error")).or(text.lines().last()).unwrap_or("");
        return Err(SkipReason(format!("gcc -m32 cannot compile guests/{name}.c: {line}")));
    }
    let path = dir().join(name);
    std::fs::rename(&part, &path).map_err(|e| SkipReason(format!("{}: {e}", path.display())))?;
    Ok(path)
}

/// A program in `PATH`.
pub fn program(name: &str) -> Result<PathBuf, SkipReason> {
    std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| SkipReason(format!("the program {name} is not installed")))
}

/// The peer of the benchmarks.
pub fn qemu() -> Result<PathBuf, SkipReason> {
    program("qemu-system-i386")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_not_exist_is_a_reason_that_names_it() {
        assert!(program("sh").is_ok());
        assert!(program("no-such-program-here").unwrap_err().to_string().contains("no-such-program-here"));
    }

    #[test]
    fn replacing_a_file_leaves_no_part_behind() {
        let dir = std::env::temp_dir().join(format!("subring-replace-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("x");
        replace(&path, b"1").unwrap();
        replace(&path, b"2").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"2");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
