//! Writes a cpio archive in the "newc" format, the one an initramfs has (Linux, buffer-format.rst).
//!
//! Device nodes are only entries in the archive, so no root is needed to make one.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// File type bits of `st_mode`.
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive being written to `W`. Everything belongs to root and has time stamp 0: the same input gives the
/// same bytes.
pub struct Cpio<W: Write> {
    out: W,
    written: u64,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Cpio<W> {
        Cpio { out, written: 0, inode: 0 }
    }

    /// A directory, mode 755. Parents come first.
    pub fn dir(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, S_IFDIR | 0o755, 2, (0, 0), &[])
    }

    /// A regular file; `mode` holds the permission bits.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(path, S_IFREG | mode, 1, (0, 0), data)
    }

    /// A symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, S_IFLNK | 0o777, 1, (0, 0), target.as_bytes())
    }

    /// A character device, mode 600.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, S_IFCHR | 0o600, 1, (major, minor), &[])
    }

    /// Everything below a directory: directories, files with their permissions, symbolic links. Sorted by name.
    pub fn tree(&mut self, root: &Path) -> io::Result<()> {
        self.subtree(root, "")
    }

    fn subtree(&mut self, directory: &Path, prefix: &str) -> io::Result<()> {
        let mut entries: Vec<_> = std::fs::read_dir(directory)?.collect::<io::Result<_>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name();
            let path = format!(
                "{prefix}{}",
                name.to_str().ok_or_else(|| io::Error::other("a name that is not text"))?
            );
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                self.dir(&path)?;
                self.subtree(&entry.path(), &format!("{path}/"))?;
            } else if metadata.is_symlink() {
                let target = std::fs::read_link(entry.path())?;
                self.entry(&path, S_IFLNK | 0o777, 1, (0, 0), target.as_os_str().as_bytes())?;
            } else {
                self.file(&path, metadata.mode() & 0o7777, &std::fs::read(entry.path())?)?;
            }
        }
        Ok(())
    }

    /// Writes the end mark and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = u32::MAX;
        self.entry("TRAILER!!!", 0, 1, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        data: &[u8],
    ) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        let size = u32::try_from(data.len()).map_err(|_| io::Error::other(format!("{path}: over 4 GiB")))?;
        self.inode = self.inode.wrapping_add(1);
        let name_size = path.len() as u32 + 1;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        let fill = (4 - self.written % 4) % 4;
        self.put(&[0; 3][..fill as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_header_starts_on_a_multiple_of_four_and_the_archive_ends_with_the_trailer() {
        let mut c = Cpio::new(Vec::new());
        c.dir("dev").unwrap();
        c.char_device("dev/console", 5, 1).unwrap();
        c.file("/odd", 0o644, b"12345").unwrap();
        c.symlink("l", "odd").unwrap();
        let bytes = c.finish().unwrap();
        let magics: Vec<usize> = (0..bytes.len() - 6).filter(|&i| &bytes[i..i + 6] == b"070701").collect();
        assert_eq!(magics.len(), 5);
        assert!(magics.iter().all(|at| at % 4 == 0));
        let last = &bytes[magics[4] + 110..];
        assert!(last.starts_with(b"TRAILER!!!\0"));
    }

    #[test]
    fn a_device_node_carries_its_numbers_and_the_leading_slash_goes() {
        let mut c = Cpio::new(Vec::new());
        c.char_device("/dev/ttyS0", 4, 64).unwrap();
        let bytes = c.finish().unwrap();
        let field = |n: usize| {
            u32::from_str_radix(std::str::from_utf8(&bytes[6 + n * 8..14 + n * 8]).unwrap(), 16).unwrap()
        };
        assert_eq!((field(1), field(9), field(10)), (0o020_600, 4, 64));
        assert_eq!(&bytes[110..120], b"dev/ttyS0\0");
    }
}
