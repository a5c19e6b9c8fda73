//! The test guest's initramfs: busybox with all its applets, `/init` and the test scripts, gzipped.

use crate::cpio::Cpio;
use std::io::{self, Write};

/// Line printed by `/init` before anything else.
pub const USERLAND_MARKER: &str = "SUBRING-USERLAND";
/// Line the `selftest` script ends with when all its results are right.
pub const SELFTEST_PASS: &str = "SUBRING-SELFTEST PASS";

const INIT: &str = include_str!("guests/initramfs/init");

/// Scripts that `subring.run=NAME` on the kernel's command line starts.
pub const SCRIPTS: [(&str, &str); 7] = [
    ("selftest", include_str!("guests/initramfs/selftest")),
    ("poweroff", include_str!("guests/initramfs/poweroff")),
    ("reboot", include_str!("guests/initramfs/reboot")),
    ("idle", include_str!("guests/initramfs/idle")),
    ("compute", include_str!("guests/initramfs/compute")),
    ("rows", include_str!("guests/initramfs/rows")),
    ("isolation", include_str!("guests/initramfs/isolation")),
];

/// The applets a busybox binary holds, by its own sorted table of NUL-terminated names (`applet_tables.h`).
/// Empty when the table is not found; `/init` then lets busybox make its links itself.
#[must_use]
pub fn applets(busybox: &[u8]) -> Vec<&str> {
    let Some(start) = busybox.windows(5).position(|w| w == b"[\0[[\0") else { return Vec::new() };
    busybox[start..]
        .split(|&b| b == 0)
        .map_while(|name| {
            let plain = !name.is_empty() && name.len() < 32 && name.iter().all(u8::is_ascii_graphic);
            plain.then(|| std::str::from_utf8(name).ok()).flatten()
        })
        .collect()
}

/// Writes the archive. `extra` are files to add: path in the guest, permission bits, contents. Their directories
/// must be among those made here (`bin`, `tests`, `tmp`, `etc`, `root`).
pub fn write(out: impl Write, busybox: &[u8], extra: &[(String, u32, Vec<u8>)]) -> io::Result<()> {
    let gzip = flate2::write::GzEncoder::new(out, flate2::Compression::new(6));
    let mut cpio = Cpio::new(gzip);
    for dir in ["bin", "dev", "etc", "proc", "root", "sys", "tests", "tmp"] {
        cpio.dir(dir)?;
    }
    cpio.char_device("dev/console", 5, 1)?;
    cpio.char_device("dev/null", 1, 3)?;
    cpio.char_device("dev/ttyS0", 4, 64)?;
    cpio.file("bin/busybox", 0o755, busybox)?;
    for name in applets(busybox) {
        if name != "busybox" {
            cpio.symlink(&format!("bin/{name}"), "busybox")?;
        }
    }
    cpio.file("init", 0o755, INIT.as_bytes())?;
    for (name, text) in SCRIPTS {
        cpio.file(&format!("tests/{name}"), 0o755, text.as_bytes())?;
    }
    for (path, mode, data) in extra {
        cpio.file(path, *mode, data)?;
    }
    cpio.finish()?.finish()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applet_names_are_read_up_to_the_empty_name() {
        assert_eq!(applets(b"\x7fELF..\0[\0[[\0ash\0cat\0\0junk\0"), ["[", "[[", "ash", "cat"]);
        assert!(applets(b"no table here").is_empty());
    }

    #[test]
    fn init_prints_the_marker_this_module_promises() {
        assert!(INIT.contains(&format!("echo {USERLAND_MARKER}\n")));
        assert!(SCRIPTS[0].1.contains("echo \"SUBRING-SELFTEST $verdict\""));
    }
}
