//! ELF32 executables for i386: a Linux vmlinux, or any kernel with an entry point (System V ABI, gABI chapters 4, 5).

use super::layout::Layout;
use super::{BootError, BootOptions, BootState, GuestMemoryWriter, Kind, bzimage, flat_start, le16, le32};
use crate::GuestPhys;
use crate::cpum::gpr;

const EM_386: u16 = 3;
const EM_486: u16 = 6;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const EHDR_SIZE: u64 = 52;
const PHDR_SIZE: usize = 32;

/// The magic number with class and byte order of i386, whatever the machine field says.
pub(super) fn has_magic(file: &[u8]) -> bool {
    file.len() >= 20 && file.starts_with(b"\x7fELF")
}

/// ELF, but not for a 32-bit x86.
pub(super) fn is_elf_for_other_machine(file: &[u8]) -> bool {
    has_magic(file)
        && (file.get(4..6) != Some(&[CLASS_32, 1]) || !matches!(le16(file, 18), Some(EM_386 | EM_486)))
}

/// Why such a file is refused.
pub(super) fn refusal(file: &[u8]) -> BootError {
    let machine = if file.get(5) == Some(&2) {
        le16(file, 18).unwrap_or(0).swap_bytes()
    } else {
        le16(file, 18).unwrap_or(0)
    };
    match file.get(4) {
        _ if machine == EM_X86_64 => BootError::SixtyFourBit("ELF for x86-64"),
        Some(&CLASS_64) => BootError::SixtyFourBit("ELF64"),
        Some(&CLASS_32) if file.get(5) == Some(&1) || file.get(5) == Some(&2) => {
            BootError::OtherMachine(machine)
        }
        _ => BootError::Corrupt("the ELF class or byte order is none that exists"),
    }
}

/// One PT_LOAD segment, checked against the file.
#[derive(Clone, Copy, Debug)]
struct LoadSegment<'a> {
    data: &'a [u8],
    vaddr: u32,
    paddr: u32,
    memory_len: u32,
}

fn segments(file: &[u8]) -> Result<Vec<LoadSegment<'_>>, BootError> {
    let have = file.len() as u64;
    let cut = |what, needed| BootError::Truncated { what, needed, have };
    let word = |at| le16(file, at).ok_or_else(|| cut("the ELF header", EHDR_SIZE));
    let long = |at| le32(file, at).ok_or_else(|| cut("the ELF header", EHDR_SIZE));
    let file_type = word(16)?;
    if file_type != ET_EXEC && file_type != ET_DYN {
        return Err(BootError::NotExecutable(file_type));
    }
    let (table, entry_size, count) = (long(28)?, usize::from(word(42)?), usize::from(word(44)?));
    if count == 0 || table == 0 {
        return Err(BootError::Corrupt("no program headers: nothing says what to load"));
    }
    if entry_size < PHDR_SIZE {
        return Err(BootError::Corrupt("program headers shorter than ELF32's"));
    }
    let table_len = entry_size * count;
    let needed = u64::from(table) + table_len as u64;
    let table = usize::try_from(table)
        .ok()
        .and_then(|start| file.get(start..start.checked_add(table_len)?))
        .ok_or_else(|| cut("the program header table", needed))?;
    let mut found = Vec::new();
    for entry in table.chunks_exact(entry_size) {
        let field = |n: usize| le32(entry, n * 4).unwrap_or(0);
        let (offset, vaddr, paddr, file_len, memory_len) = (field(1), field(2), field(3), field(4), field(5));
        if field(0) != PT_LOAD || memory_len == 0 {
            continue;
        }
        if file_len > memory_len {
            return Err(BootError::Corrupt("a segment is longer in the file than in memory"));
        }
        let end = u64::from(offset) + u64::from(file_len);
        let data = usize::try_from(end)
            .ok()
            .and_then(|end| file.get(offset as usize..end))
            .ok_or_else(|| cut("a segment", end))?;
        found.push(LoadSegment { data, vaddr, paddr, memory_len });
    }
    if found.is_empty() {
        return Err(BootError::Corrupt("no segment to load"));
    }
    // Some linkers leave physical addresses out.
    if found.iter().all(|s| s.paddr == 0) {
        for s in &mut found {
            s.paddr = s.vaddr;
        }
    }
    Ok(found)
}

/// Where the entry point lies physically: `e_entry` may be a virtual address (most kernels) or a physical one (Linux).
fn physical_entry(entry: u32, segments: &[LoadSegment<'_>]) -> Result<GuestPhys, BootError> {
    let inside = |start: u32, s: &LoadSegment<'_>| entry.checked_sub(start).filter(|&o| o < s.memory_len);
    segments
        .iter()
        .find_map(|s| inside(s.vaddr, s).map(|offset| s.paddr.wrapping_add(offset)))
        .or_else(|| segments.iter().find_map(|s| inside(s.paddr, s).map(|_| entry)))
        .map(|at| GuestPhys(u64::from(at)))
        .ok_or(BootError::BadEntry(GuestPhys(u64::from(entry))))
}

/// Copies all segments to their physical addresses, zeroes what the file does not fill; yields the entry point.
pub(super) fn place_segments(
    file: &[u8],
    layout: &mut Layout,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<GuestPhys, BootError> {
    let segments = segments(file)?;
    let entry = physical_entry(le32(file, 24).unwrap_or(0), &segments)?;
    for s in &segments {
        layout.claim("kernel segment", GuestPhys(u64::from(s.paddr)), u64::from(s.memory_len))?;
    }
    for s in &segments {
        let start = GuestPhys(u64::from(s.paddr));
        ram.write(start, s.data)?;
        let filled = s.data.len() as u64;
        zero(start.wrapping_add(filled), u64::from(s.memory_len) - filled, ram)?;
    }
    Ok(entry)
}

/// Zeroes guest RAM.
pub(super) fn zero(at: GuestPhys, len: u64, ram: &mut dyn GuestMemoryWriter) -> Result<(), BootError> {
    static ZEROES: [u8; 0x1_0000] = [0; 0x1_0000];
    let mut done = 0;
    while done < len {
        let chunk = (len - done).min(ZEROES.len() as u64);
        ram.write(at.wrapping_add(done), &ZEROES[..chunk as usize])?;
        done += chunk;
    }
    Ok(())
}

/// Starts with a Linux zero page in ESI. A kernel that is no Linux finds a register it does not look at.
pub(super) fn load(
    file: &[u8],
    options: &BootOptions,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<BootState, BootError> {
    let mut layout = Layout::new(ram.size());
    let entry = place_segments(file, &mut layout, ram)?;
    let zero_page = bzimage::zero_page_for_vmlinux(options, &mut layout, ram)?;
    let mut cpu = flat_start(entry, &mut layout, ram)?;
    cpu.gpr[gpr::ESI] = zero_page.0 as u32;
    Ok(BootState { cpu, kind: Kind::Elf32, placed: layout.into_placed() })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::testram::TestRam;
    use super::super::{detect, load, put};
    use super::*;

    /// An executable: 4 KiB of code at virtual 0xc1000000, physical 0x1000000, with 4 KiB of bss behind it.
    pub(in crate::boot) fn synthetic() -> Vec<u8> {
        let mut f = vec![0u8; 0x2000];
        put(&mut f, 0, b"\x7fELF\x01\x01\x01");
        for (at, v) in [(16, ET_EXEC), (18, EM_386), (40, 52), (42, 32), (44, 1)] {
            put(&mut f, at, &v.to_le_bytes());
        }
        let longs = [(20, 1), (24, 0x100_0010), (28, 52), (52, PT_LOAD), (56, 0x1000), (60, 0xc100_0000u32)];
        for (at, v) in longs.into_iter().chain([(64, 0x100_0000), (68, 0x1000), (72, 0x2000), (76, 7)]) {
            put(&mut f, at, &v.to_le_bytes());
        }
        f[0x1000..].fill(0x90);
        f
    }
    fn boot(file: &[u8], mib: usize) -> Result<(BootState, TestRam), BootError> {
        let mut ram = TestRam::new(mib << 20);
        let options = BootOptions { cmdline: "quiet".into(), ..BootOptions::default() };
        load(file, &options, &mut ram).map(|state| (state, ram))
    }

    #[test]
    fn a_vmlinux_is_loaded_at_its_physical_addresses_with_a_zero_page_in_esi() {
        let (state, ram) = boot(&synthetic(), 32).unwrap();
        assert_eq!((state.kind, state.cpu.eip), (Kind::Elf32, 0x100_0010));
        assert_eq!(ram.bytes(0x100_0ffe, 4), [0x90, 0x90, 0, 0]);
        let page = u64::from(state.cpu.gpr[gpr::ESI]);
        assert_eq!(ram.bytes(page + 0x202, 4), b"HdrS");
        assert_eq!(ram.string(u64::from(ram.u32(page + 0x228))), "quiet");
    }

    #[test]
    fn a_virtual_entry_point_becomes_a_physical_one() {
        let mut f = synthetic();
        put(&mut f, 24, &0xc100_0020u32.to_le_bytes());
        assert_eq!(boot(&f, 32).unwrap().0.cpu.eip, 0x100_0020);
    }

    #[test]
    fn bss_left_over_from_an_earlier_run_is_zeroed() {
        let mut ram = TestRam::new(32 << 20);
        ram.write(GuestPhys(0x100_1000), &[0xff; 0x1000]).unwrap();
        load(&synthetic(), &BootOptions::default(), &mut ram).unwrap();
        assert_eq!(ram.bytes(0x100_1000, 0x1000), [0; 0x1000]);
    }

    #[test]
    fn an_entry_point_outside_of_every_segment_is_refused() {
        let mut f = synthetic();
        put(&mut f, 24, &0x200_0000u32.to_le_bytes());
        assert_eq!(boot(&f, 64).unwrap_err(), BootError::BadEntry(GuestPhys(0x200_0000)));
    }

    #[test]
    fn elf64_and_other_machines_are_refused_by_name() {
        let mut f = synthetic();
        f[4] = CLASS_64;
        put(&mut f, 18, &EM_X86_64.to_le_bytes());
        assert_eq!(detect(&f), Kind::ElfOther);
        assert!(matches!(boot(&f, 32), Err(BootError::SixtyFourBit(_))));
        let mut f = synthetic();
        put(&mut f, 18, &40u16.to_le_bytes());
        assert_eq!(boot(&f, 32).unwrap_err(), BootError::OtherMachine(40));
    }

    #[test]
    fn object_files_are_refused() {
        let mut f = synthetic();
        put(&mut f, 16, &1u16.to_le_bytes());
        assert_eq!(boot(&f, 32).unwrap_err(), BootError::NotExecutable(1));
    }

    #[test]
    fn truncated_files_and_too_little_memory_are_told_apart() {
        let f = synthetic();
        assert!(matches!(boot(&f[..60], 32), Err(BootError::Truncated { .. })));
        assert!(matches!(boot(&f[..0x1fff], 32), Err(BootError::Truncated { .. })));
        assert_eq!(
            boot(&f, 16).unwrap_err(),
            BootError::TooLittleMemory { needed: 0x100_2000, have: 16 << 20 }
        );
    }
}
