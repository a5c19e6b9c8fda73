//! The built-in guest: a Multiboot kernel that checks the machine from inside and prints a verdict.

/// The Multiboot 1 kernel as a file would hold it.
#[must_use]
pub fn image() -> &'static [u8] {
    host_driver_shim::builtin_guest::image()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestPhys;
    use crate::boot::{self, BootOptions, GuestMemoryWriter, Kind, OutsideRam};
    use crate::config::MIN_MEMORY;

    struct Ram(Vec<u8>);

    impl Ram {
        fn range(&self, at: GuestPhys, len: usize) -> Result<std::ops::Range<usize>, OutsideRam> {
            let start = at.0 as usize;
            let end = start.saturating_add(len);
            if end <= self.0.len() { Ok(start..end) } else { Err(OutsideRam { at, len: len as u64 }) }
        }
    }

    impl GuestMemoryWriter for Ram {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }
        fn write(&mut self, at: GuestPhys, data: &[u8]) -> Result<(), OutsideRam> {
            let range = self.range(at, data.len())?;
            self.0[range].copy_from_slice(data);
            Ok(())
        }
        fn read(&self, at: GuestPhys, buf: &mut [u8]) -> Result<(), OutsideRam> {
            buf.copy_from_slice(&self.0[self.range(at, buf.len())?]);
            Ok(())
        }
    }

    #[test]
    fn the_smallest_machine_can_load_it() {
        let mut ram = Ram(vec![0; MIN_MEMORY as usize]);
        let boot = boot::load(image(), &BootOptions::default(), &mut ram).unwrap();
        assert_eq!(boot.kind, Kind::Multiboot);
        assert_eq!(&ram.0[0x10_0000..0x10_0000 + image().len()], image());
        // The entry is the `cli; cld` behind the 32-byte header.
        assert_eq!(boot.cpu.eip, 0x10_0020);
        assert_eq!(ram.0[0x10_0020..0x10_0022], [0xfa, 0xfc]);
    }
}
