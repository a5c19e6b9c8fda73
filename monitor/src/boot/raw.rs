//! Raw binaries: bytes at an address, started in 32-bit flat or in 16-bit real mode.

use super::layout::{HIGH_RAM_START, Layout};
use super::{BootError, BootOptions, BootState, GuestMemoryWriter, Kind, flat_start};
use crate::GuestPhys;
use crate::cpum::{CpuState, Segment, TableRegister, gpr, seg};

/// How to start a raw binary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RawStart {
    /// Where its first byte goes.
    pub load: GuestPhys,
    /// Physical address of its first instruction.
    pub entry: GuestPhys,
    /// The mode it starts in.
    pub mode: RawMode,
}

/// CPU mode at the start of a raw binary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RawMode {
    /// Protected mode, flat 4 GiB segments, paging and interrupts off.
    Flat32,
    /// Real mode: CS:IP holds the entry with the smallest CS that is a multiple of 0x1000, the other segments are 0,
    /// SP is 0x7c00 as a BIOS leaves it to a boot sector.
    Real16,
}

pub(super) fn load(
    file: &[u8],
    start: RawStart,
    options: &BootOptions,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<BootState, BootError> {
    if options.initrd.is_some() || !options.cmdline.is_empty() {
        return Err(BootError::RawTakesNothing);
    }
    if !options.modules.is_empty() {
        return Err(BootError::ModulesNotSupported);
    }
    let mut layout = Layout::new(ram.size());
    layout.claim("raw binary", start.load, file.len() as u64)?;
    let offset = start.entry.0.checked_sub(start.load.0);
    if offset.is_none_or(|o| o >= file.len() as u64) {
        return Err(BootError::BadEntry(start.entry));
    }
    ram.write(start.load, file)?;
    let cpu = match start.mode {
        RawMode::Flat32 => flat_start(start.entry, &mut layout, ram)?,
        RawMode::Real16 if start.entry.0 >= HIGH_RAM_START => {
            return Err(BootError::BadEntry(start.entry));
        }
        RawMode::Real16 => real_start(start.entry),
    };
    Ok(BootState { cpu, kind: Kind::Unknown, placed: layout.into_placed() })
}

fn real_start(entry: GuestPhys) -> CpuState {
    let mut cpu = CpuState::reset();
    cpu.gpr = [0; 8];
    cpu.gpr[gpr::ESP] = 0x7c00;
    cpu.seg = [Segment::real(0); 6];
    cpu.seg[seg::CS] = Segment::real(((entry.0 >> 4) & 0xf000) as u16);
    cpu.eip = (entry.0 & 0xffff) as u32;
    cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
    cpu
}

#[cfg(test)]
mod tests {
    use super::super::load;
    use super::super::testram::TestRam;
    use super::*;

    fn boot(at: u64, entry: u64, mode: RawMode) -> Result<BootState, BootError> {
        let raw = Some(RawStart { load: GuestPhys(at), entry: GuestPhys(entry), mode });
        load(&[0xf4; 512], &BootOptions { raw, ..BootOptions::default() }, &mut TestRam::new(2 << 20))
    }

    #[test]
    fn a_boot_sector_starts_at_0000_7c00_in_real_mode() {
        let cpu = boot(0x7c00, 0x7c00, RawMode::Real16).unwrap().cpu;
        assert!(!cpu.protected());
        assert_eq!((cpu.seg[seg::CS].selector, cpu.eip, cpu.linear_eip()), (0, 0x7c00, 0x7c00));
    }

    #[test]
    fn a_real_mode_entry_above_64_kib_gets_a_code_segment() {
        let cpu = boot(0xf_fe00, 0xf_fff0, RawMode::Real16).unwrap().cpu;
        assert_eq!((cpu.seg[seg::CS].selector, cpu.eip), (0xf000, 0xfff0));
        assert_eq!(cpu.linear_eip(), 0xf_fff0);
    }

    #[test]
    fn a_flat_binary_starts_at_its_entry_even_where_boot_data_would_lie() {
        let state = boot(0x6000, 0x6004, RawMode::Flat32).unwrap();
        assert_eq!(state.cpu.eip, 0x6004);
        assert!(u64::from(state.cpu.gdtr.base) >= 0x6200, "the GDT is not in the binary");
    }

    #[test]
    fn entries_outside_of_the_binary_and_real_mode_above_1_mib_are_refused() {
        assert!(matches!(boot(0x7c00, 0x7e00, RawMode::Flat32), Err(BootError::BadEntry(_))));
        assert!(matches!(boot(0x7c00, 0x7bff, RawMode::Flat32), Err(BootError::BadEntry(_))));
        assert!(matches!(boot(0x10_0000, 0x10_0000, RawMode::Real16), Err(BootError::BadEntry(_))));
        assert!(matches!(boot(2 << 20, 2 << 20, RawMode::Flat32), Err(BootError::TooLittleMemory { .. })));
    }
}
