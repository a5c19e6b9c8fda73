//! Kernels with a Multiboot 1 header (Multiboot Specification 0.6.96), ELF32 or with addresses in the header.

use super::layout::{self, Layout};
use super::{BootError, BootOptions, BootState, GuestMemoryWriter, Kind, elf32, flat_start, le32, put};
use crate::GuestPhys;
use crate::cpum::gpr;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies wholly within these first bytes of the file, 4-aligned.
const SEARCH: usize = 8192;
/// Header flags: what the kernel wants.
const WANTS_PAGE_ALIGNED_MODULES: u32 = 1 << 0;
const WANTS_MEMORY_INFO: u32 = 1 << 1;
const WANTS_VIDEO_MODE: u32 = 1 << 2;
const HAS_ADDRESSES: u32 = 1 << 16;
/// Of these, a loader must refuse any it does not know.
const MANDATORY: u32 = 0xffff;
/// Information structure: which fields are valid.
mod info {
    pub(super) const MEMORY: u32 = 1 << 0;
    pub(super) const CMDLINE: u32 = 1 << 2;
    pub(super) const MODULES: u32 = 1 << 3;
    pub(super) const MMAP: u32 = 1 << 6;
    pub(super) const LOADER_NAME: u32 = 1 << 9;
    pub(super) const FRAMEBUFFER: u32 = 1 << 12;
    pub(super) const SIZE: usize = 116;
}
const LOADER_NAME: &[u8] = b"subring\0";

/// Offset of the header in the file, if there is one with a right checksum.
pub(super) fn find_header(file: &[u8]) -> Option<usize> {
    let end = file.len().min(SEARCH);
    (0..end.saturating_sub(11)).step_by(4).find(|&at| {
        let field = |n: usize| le32(file, at + n * 4).unwrap_or(0);
        field(0) == HEADER_MAGIC && field(0).wrapping_add(field(1)).wrapping_add(field(2)) == 0
    })
}

pub(super) fn load(
    file: &[u8],
    options: &BootOptions,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<BootState, BootError> {
    let header = find_header(file).ok_or(BootError::UnknownFormat)?;
    let flags = le32(file, header + 4).unwrap_or(0);
    let known = WANTS_PAGE_ALIGNED_MODULES | WANTS_MEMORY_INFO | WANTS_VIDEO_MODE;
    if flags & MANDATORY & !known != 0 {
        return Err(BootError::MultibootFlags(flags));
    }
    let mut layout = Layout::new(ram.size());
    let entry = if flags & HAS_ADDRESSES != 0 {
        place_by_addresses(file, header, &mut layout, ram)?
    } else if elf32::has_magic(file) {
        elf32::place_segments(file, &mut layout, ram)?
    } else {
        return Err(BootError::Corrupt("a Multiboot header without addresses in a file that is not ELF"));
    };

    // An initrd is the first module, as with QEMU.
    let initrd = options.initrd.iter().map(|data| ("", data.as_slice()));
    let given = options.modules.iter().map(|m| (m.cmdline.as_str(), m.data.as_slice()));
    let mut modules = Vec::new();
    for (cmdline, data) in initrd.chain(given) {
        let at = layout.place_above("module", data.len() as u64, 4096)?;
        ram.write(at, data)?;
        modules.push((at, data.len() as u64, cmdline));
    }
    let info = write_info(&options.cmdline, &modules, &mut layout, ram)?;

    let mut cpu = flat_start(entry, &mut layout, ram)?;
    cpu.gpr[gpr::EAX] = LOADER_MAGIC;
    cpu.gpr[gpr::EBX] = info.0 as u32;
    Ok(BootState { cpu, kind: Kind::Multiboot, placed: layout.into_placed() })
}

/// Loads by the header's own addresses (section 3.1.3); yields the entry point.
fn place_by_addresses(
    file: &[u8],
    header: usize,
    layout: &mut Layout,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<GuestPhys, BootError> {
    let field = |n: usize| {
        le32(file, header + n * 4).ok_or(BootError::Truncated {
            what: "the Multiboot header",
            needed: header as u64 + 32,
            have: file.len() as u64,
        })
    };
    let (header_addr, load_addr, load_end, bss_end, entry) =
        (field(3)?, field(4)?, field(5)?, field(6)?, field(7)?);
    let before_header = header_addr
        .checked_sub(load_addr)
        .ok_or(BootError::Corrupt("the Multiboot header lies before the load address"))?;
    let first = header
        .checked_sub(before_header as usize)
        .ok_or(BootError::Corrupt("the Multiboot load address lies before the start of the file"))?;
    let available = (file.len() - first) as u64;
    let wanted = match load_end {
        0 => available,
        end => u64::from(end)
            .checked_sub(u64::from(load_addr))
            .ok_or(BootError::Corrupt("the Multiboot load end lies before the load address"))?,
    };
    if wanted > available {
        let needed = first as u64 + wanted;
        return Err(BootError::Truncated { what: "the kernel", needed, have: file.len() as u64 });
    }
    let start = GuestPhys(u64::from(load_addr));
    let filled_end = start.0 + wanted;
    let end = u64::from(bss_end).max(filled_end);
    layout.claim("kernel", start, end - start.0)?;
    if !(start.0..end).contains(&u64::from(entry)) {
        return Err(BootError::BadEntry(GuestPhys(u64::from(entry))));
    }
    ram.write(start, file.get(first..first + wanted as usize).unwrap_or(&[]))?;
    elf32::zero(GuestPhys(filled_end), end - filled_end, ram)?;
    Ok(GuestPhys(u64::from(entry)))
}

/// Writes the information structure (section 3.3) and what it points to; yields its address.
fn write_info(
    cmdline: &str,
    modules: &[(GuestPhys, u64, &str)],
    layout: &mut Layout,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<GuestPhys, BootError> {
    let ram_size = ram.size();
    let mut place = |what, data: &[u8]| {
        let at = layout.place_low(what, data.len() as u64, 16)?;
        ram.write(at, data)?;
        Ok::<u32, BootError>(at.0 as u32)
    };
    let c_string = |text: &str| [text.as_bytes(), b"\0"].concat();
    let longs = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();

    let mut module_table = Vec::new();
    for &(at, len, line) in modules {
        let line = place("module command line", &c_string(line))?;
        module_table.extend(longs(&[at.0 as u32, (at.0 + len) as u32, line, 0]));
    }
    let mut memory_map = Vec::new();
    for range in layout::memory_map(ram_size) {
        // Each entry is preceded by its size, which does not count itself.
        memory_map.extend(longs(&[20]));
        memory_map.extend(range.start.to_le_bytes());
        memory_map.extend(range.len.to_le_bytes());
        memory_map.extend(longs(&[range.kind as u32]));
    }
    let modules_at = if module_table.is_empty() { 0 } else { place("module table", &module_table)? };
    let map_at = place("memory map", &memory_map)?;
    let cmdline_at = place("command line", &c_string(cmdline))?;
    let name_at = place("loader name", LOADER_NAME)?;

    let high = ram_size.min(layout::HIGH_RAM_LIMIT).saturating_sub(layout::HIGH_RAM_START);
    let flags =
        info::MEMORY | info::CMDLINE | info::MODULES | info::MMAP | info::LOADER_NAME | info::FRAMEBUFFER;
    let mut bytes = [0u8; info::SIZE];
    for (at, value) in [
        (0, flags),
        (4, (layout::LOW_RAM_END.min(ram_size) >> 10) as u32),
        (8, (high >> 10) as u32),
        (16, cmdline_at),
        (20, modules.len() as u32),
        (24, modules_at),
        (44, memory_map.len() as u32),
        (48, map_at),
        (64, name_at),
        // An EGA text screen: address, bytes a line, columns, lines, 16 bits a character, type 2.
        (88, 0xb_8000),
        (96, 160),
        (100, 80),
        (104, 25),
        (108, 0x0210),
    ] {
        put(&mut bytes, at, &value.to_le_bytes());
    }
    place("Multiboot information", &bytes).map(|at| GuestPhys(u64::from(at)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::testram::TestRam;
    use super::super::{Module, detect, load};
    use super::*;

    /// A flat file with addresses in its header at offset 16: load 0x100000, bss to 0x103000, entry 0x100040.
    pub(in crate::boot) fn synthetic() -> Vec<u8> {
        let mut f = vec![0u8; 0x1000];
        let flags = HAS_ADDRESSES | WANTS_PAGE_ALIGNED_MODULES | WANTS_MEMORY_INFO;
        let header = [HEADER_MAGIC, flags, 0, 0x10_0010, 0x10_0000, 0x10_1000, 0x10_3000, 0x10_0040];
        for (i, v) in header.into_iter().enumerate() {
            put(&mut f, 16 + i * 4, &v.to_le_bytes());
        }
        fix_checksum(&mut f);
        f[0x40..].fill(0xf4);
        f
    }
    fn fix_checksum(f: &mut [u8]) {
        let sum = HEADER_MAGIC.wrapping_add(le32(f, 20).unwrap()).wrapping_neg();
        put(f, 24, &sum.to_le_bytes());
    }
    fn boot(file: &[u8], options: &BootOptions) -> Result<(BootState, TestRam), BootError> {
        let mut ram = TestRam::new(8 << 20);
        ram.write(GuestPhys(0x10_1000), &[0xff; 0x2000]).unwrap();
        load(file, options, &mut ram).map(|state| (state, ram))
    }

    #[test]
    fn a_kernel_starts_with_the_loader_magic_and_its_bss_zeroed() {
        let (state, ram) = boot(&synthetic(), &BootOptions::default()).unwrap();
        assert_eq!(state.kind, Kind::Multiboot);
        assert_eq!((state.cpu.eip, state.cpu.gpr[gpr::EAX]), (0x10_0040, 0x2bad_b002));
        assert_eq!(ram.bytes(0x10_0fff, 2), [0xf4, 0]);
        assert_eq!(ram.bytes(0x10_2fff, 1), [0]);
    }

    #[test]
    fn memory_is_told_in_kib_and_as_a_map() {
        let (state, ram) = boot(&synthetic(), &BootOptions::default()).unwrap();
        let info = u64::from(state.cpu.gpr[gpr::EBX]);
        assert_eq!((ram.u32(info + 4), ram.u32(info + 8)), (639, 7 << 10));
        let (len, map) = (ram.u32(info + 44), u64::from(ram.u32(info + 48)));
        assert_eq!((len, ram.u32(map)), (4 * 24, 20));
        let last = map + 3 * 24;
        assert_eq!((ram.u32(last + 4), ram.u32(last + 12), ram.u32(last + 20)), (0x10_0000, 7 << 20, 1));
        assert_eq!(ram.string(u64::from(ram.u32(info + 64))), "subring");
    }

    #[test]
    fn modules_lie_page_aligned_above_the_kernel_with_the_initrd_first() {
        let options = BootOptions {
            cmdline: "kernel line".into(),
            initrd: Some(vec![1; 5000]),
            modules: vec![Module { cmdline: "second".into(), data: vec![2; 10] }],
            ..BootOptions::default()
        };
        let (state, ram) = boot(&synthetic(), &options).unwrap();
        let info = u64::from(state.cpu.gpr[gpr::EBX]);
        assert_eq!(ram.string(u64::from(ram.u32(info + 16))), "kernel line");
        assert_eq!(ram.u32(info + 20), 2);
        let table = u64::from(ram.u32(info + 24));
        assert_eq!((ram.u32(table), ram.u32(table + 4)), (0x10_3000, 0x10_3000 + 5000));
        assert_eq!((ram.u32(table + 16), ram.u32(table + 20)), (0x10_5000, 0x10_500a));
        assert_eq!(ram.bytes(0x10_5000, 10), [2; 10]);
        assert_eq!(ram.string(u64::from(ram.u32(table + 24))), "second");
    }

    #[test]
    fn an_elf_kernel_with_a_header_is_multiboot_and_loaded_by_its_segments() {
        let mut f = elf32::tests::synthetic();
        let header = synthetic();
        put(&mut f, 0x1010, &header[16..28]);
        put(&mut f, 0x1014, &WANTS_MEMORY_INFO.to_le_bytes());
        put(&mut f, 0x1018, &HEADER_MAGIC.wrapping_add(WANTS_MEMORY_INFO).wrapping_neg().to_le_bytes());
        assert_eq!(detect(&f), Kind::Multiboot);
        let mut ram = TestRam::new(32 << 20);
        let state = load(&f, &BootOptions::default(), &mut ram).unwrap();
        assert_eq!(state.cpu.eip, 0x100_0010);
    }

    #[test]
    fn unknown_mandatory_flags_are_refused_and_optional_ones_are_not() {
        let mut f = synthetic();
        put(&mut f, 20, &(HAS_ADDRESSES | 1 << 9).to_le_bytes());
        fix_checksum(&mut f);
        assert!(matches!(boot(&f, &BootOptions::default()), Err(BootError::MultibootFlags(_))));
        put(&mut f, 20, &(HAS_ADDRESSES | 1 << 20).to_le_bytes());
        fix_checksum(&mut f);
        assert!(boot(&f, &BootOptions::default()).is_ok());
    }

    #[test]
    fn a_header_with_a_wrong_checksum_or_beyond_8_kib_is_none() {
        let mut f = synthetic();
        f[24] ^= 1;
        assert_eq!(find_header(&f), None);
        let late = [vec![0; SEARCH - 20], synthetic()].concat();
        assert_eq!(find_header(&late[..]), None, "the header begins before the limit but ends behind it");
    }

    #[test]
    fn a_module_that_does_not_fit_is_refused() {
        let options = BootOptions { initrd: Some(vec![0; 8 << 20]), ..BootOptions::default() };
        let refused = boot(&synthetic(), &options).unwrap_err();
        assert!(matches!(refused, BootError::DoesNotFit { what: "module", .. }));
    }

    #[test]
    fn contradicting_addresses_are_corrupt_and_a_short_file_is_truncated() {
        let mut f = synthetic();
        put(&mut f, 16 + 12, &0xf_0000u32.to_le_bytes());
        assert!(matches!(boot(&f, &BootOptions::default()), Err(BootError::Corrupt(_))));
        assert!(matches!(
            boot(&synthetic()[..0x800], &BootOptions::default()),
            Err(BootError::Truncated { .. })
        ));
    }
}
