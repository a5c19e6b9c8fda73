//! Linux bzImage by the 32-bit boot protocol (Linux, Documentation/arch/x86/boot.rst and zero-page.rst).

use super::layout::{self, Layout};
use super::{BootError, BootOptions, BootState, GuestMemoryWriter, Kind, flat_start, le16, le32, put};
use crate::GuestPhys;
use crate::cpum::gpr;

/// Offsets of the setup header, the same in the file and in the zero page.
mod hdr {
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const SYSSIZE: usize = 0x1f4;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const JUMP_LENGTH: usize = 0x201;
    pub(super) const HEADER: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const CODE32_START: usize = 0x214;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const EXT_LOADER_VER: usize = 0x226;
    pub(super) const EXT_LOADER_TYPE: usize = 0x227;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(super) const RELOCATABLE_KERNEL: usize = 0x234;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PAYLOAD_OFFSET: usize = 0x248;
    pub(super) const PAYLOAD_LENGTH: usize = 0x24c;
    pub(super) const SETUP_DATA: usize = 0x250;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    /// The header can reach up to the EDD table of the zero page.
    pub(super) const END_MAX: usize = 0x290;
}

/// Offsets of the zero page outside of the setup header.
mod zp {
    pub(super) const VIDEO_MODE: usize = 0x06;
    pub(super) const VIDEO_COLS: usize = 0x07;
    pub(super) const VIDEO_EGA_BX: usize = 0x0a;
    pub(super) const VIDEO_LINES: usize = 0x0e;
    pub(super) const VIDEO_IS_VGA: usize = 0x0f;
    pub(super) const VIDEO_POINTS: usize = 0x10;
    pub(super) const EXT_MEM_K: usize = 0x02;
    pub(super) const ALT_MEM_K: usize = 0x1e0;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const E820_TABLE: usize = 0x2d0;
    pub(super) const SIZE: usize = 4096;
}

const LOADED_HIGH: u8 = 1;
const QUIET_FLAG: u8 = 1 << 5;
const XLF_KERNEL_64: u16 = 1;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// Where the protected-mode part of a kernel with LOADED_HIGH goes.
const LOAD_ADDRESS: u64 = 0x10_0000;
/// `initrd_addr_max` of protocols before 2.03.
const OLD_INITRD_ADDR_MAX: u32 = 0x37ff_ffff;
/// Command line length of protocols before 2.06, without the NUL.
const OLD_CMDLINE_SIZE: u32 = 255;

/// The boot sector signature and the header magic of protocol 2.00 and later.
pub(super) fn has_magic(file: &[u8]) -> bool {
    le16(file, hdr::BOOT_FLAG) == Some(0xaa55) && file.get(hdr::HEADER..hdr::HEADER + 4) == Some(b"HdrS")
}

/// What the setup header says, checked against the file.
#[derive(Clone, Debug)]
struct Header<'a> {
    /// The header's bytes, to be copied into the zero page from 0x1f1 on.
    bytes: &'a [u8],
    /// The protected-mode part.
    kernel: &'a [u8],
    initrd_addr_max: u32,
    cmdline_size: u32,
    /// Where the kernel will run, and how many bytes from there it needs before it knows its memory map.
    run_address: u64,
    run_size: u64,
}

fn parse(file: &[u8]) -> Result<Header<'_>, BootError> {
    let header_cut = || BootError::Truncated {
        what: "the setup header",
        needed: hdr::END_MAX as u64,
        have: file.len() as u64,
    };
    let byte = |at: usize| file.get(at).copied().ok_or_else(header_cut);
    let word = |at| le16(file, at).ok_or_else(header_cut);
    let long = |at| le32(file, at).ok_or_else(header_cut);

    let version = word(hdr::VERSION)?;
    if version < 0x202 || byte(hdr::LOADFLAGS)? & LOADED_HIGH == 0 {
        return Err(BootError::ProtocolTooOld(version));
    }
    if version >= 0x20c && word(hdr::XLOADFLAGS)? & XLF_KERNEL_64 != 0 {
        return Err(BootError::SixtyFourBit("a bzImage for x86-64"));
    }
    let end = hdr::HEADER + usize::from(byte(hdr::JUMP_LENGTH)?);
    let bytes = file.get(hdr::SETUP_SECTS..end.min(hdr::END_MAX)).ok_or_else(header_cut)?;
    let last_field = if version >= 0x20a { hdr::INIT_SIZE + 4 } else { hdr::CMD_LINE_PTR + 4 };
    if end < last_field {
        return Err(BootError::Corrupt("the setup header is shorter than its version says"));
    }

    // For backwards compatibility 0 means 4 sectors; the boot sector itself comes on top.
    let sectors = match byte(hdr::SETUP_SECTS)? {
        0 => 4,
        n => usize::from(n),
    };
    let setup_len = (sectors + 1) * 512;
    // syssize counts paragraphs; before 2.04 only its low half is meant.
    let paragraphs = if version >= 0x204 { long(hdr::SYSSIZE)? } else { long(hdr::SYSSIZE)? & 0xffff };
    let kernel_len = u64::from(paragraphs) * 16;
    if paragraphs == 0 {
        return Err(BootError::Corrupt("the setup header gives the kernel no length"));
    }
    // The last paragraph need not be full.
    let needed = setup_len as u64 + kernel_len;
    if (file.len() as u64).saturating_add(15) < needed {
        return Err(BootError::Truncated { what: "the bzImage", needed, have: file.len() as u64 });
    }
    let kernel_end = (file.len() as u64).min(needed) as usize;
    let kernel = file
        .get(setup_len..kernel_end)
        .filter(|k| !k.is_empty())
        .ok_or(BootError::Corrupt("the setup code leaves no room for the kernel"))?;

    if version >= 0x208 {
        let payload_end = u64::from(long(hdr::PAYLOAD_OFFSET)?) + u64::from(long(hdr::PAYLOAD_LENGTH)?);
        if payload_end > kernel_len {
            return Err(BootError::Corrupt("the compressed kernel reaches beyond the end of the bzImage"));
        }
    }
    let (run_address, run_size) = if version >= 0x20a {
        let preferred = u64::from(long(hdr::PREF_ADDRESS)?) | u64::from(long(hdr::PREF_ADDRESS + 4)?) << 32;
        // A relocatable kernel that finds itself below its preferred address moves there.
        let at = if byte(hdr::RELOCATABLE_KERNEL)? != 0 { preferred.max(LOAD_ADDRESS) } else { preferred };
        (at, u64::from(long(hdr::INIT_SIZE)?))
    } else {
        (LOAD_ADDRESS, kernel.len() as u64)
    };
    Ok(Header {
        bytes,
        kernel,
        initrd_addr_max: if version >= 0x203 { long(hdr::INITRD_ADDR_MAX)? } else { OLD_INITRD_ADDR_MAX },
        cmdline_size: if version >= 0x206 { long(hdr::CMDLINE_SIZE)? } else { OLD_CMDLINE_SIZE },
        run_address,
        run_size,
    })
}

pub(super) fn load(
    file: &[u8],
    options: &BootOptions,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<BootState, BootError> {
    let header = parse(file)?;
    let mut layout = Layout::new(ram.size());
    layout.claim("kernel image", GuestPhys(LOAD_ADDRESS), header.kernel.len() as u64)?;
    layout.claim("kernel at work", GuestPhys(header.run_address), header.run_size)?;
    ram.write(GuestPhys(LOAD_ADDRESS), header.kernel)?;

    let mut page = ZeroPage::new(ram.size());
    page.setup_header(header.bytes);
    page.long(hdr::CODE32_START, LOAD_ADDRESS as u32);
    let limits = Limits { initrd_end: u64::from(header.initrd_addr_max) + 1, cmdline: header.cmdline_size };
    let zero_page = page.finish(options, limits, &mut layout, ram)?;

    let mut cpu = flat_start(GuestPhys(LOAD_ADDRESS), &mut layout, ram)?;
    cpu.gpr[gpr::ESI] = zero_page.0 as u32;
    Ok(BootState { cpu, kind: Kind::BzImage, placed: layout.into_placed() })
}

/// What a kernel can take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// First address the initial RAM disk may not reach.
    initrd_end: u64,
    /// Bytes of command line, without the NUL.
    cmdline: u32,
}

/// `struct boot_params` under construction.
struct ZeroPage(Box<[u8; zp::SIZE]>);

impl ZeroPage {
    /// With the memory map and a VGA text screen of 80 by 25.
    fn new(ram: u64) -> ZeroPage {
        let mut page = ZeroPage(Box::new([0; zp::SIZE]));
        page.byte(zp::VIDEO_MODE, 3);
        page.byte(zp::VIDEO_COLS, 80);
        page.byte(zp::VIDEO_EGA_BX, 3);
        page.byte(zp::VIDEO_LINES, 25);
        page.byte(zp::VIDEO_IS_VGA, 1);
        page.byte(zp::VIDEO_POINTS, 16);
        let high_kib = ram.min(layout::HIGH_RAM_LIMIT).saturating_sub(layout::HIGH_RAM_START) >> 10;
        put(&mut page.0[..], zp::EXT_MEM_K, &(high_kib.min(0xffff) as u16).to_le_bytes());
        page.long(zp::ALT_MEM_K, high_kib as u32);
        let map = layout::memory_map(ram);
        page.byte(zp::E820_ENTRIES, map.len() as u8);
        for (i, range) in map.iter().enumerate() {
            let at = zp::E820_TABLE + i * 20;
            put(&mut page.0[..], at, &range.start.to_le_bytes());
            put(&mut page.0[..], at + 8, &range.len.to_le_bytes());
            page.long(at + 16, range.kind as u32);
        }
        page
    }

    fn byte(&mut self, at: usize, value: u8) {
        put(&mut self.0[..], at, &[value]);
    }
    fn long(&mut self, at: usize, value: u32) {
        put(&mut self.0[..], at, &value.to_le_bytes());
    }

    /// Copies the header from a file; what the loader decides is overwritten.
    fn setup_header(&mut self, bytes: &[u8]) {
        put(&mut self.0[..], hdr::SETUP_SECTS, bytes);
        put(&mut self.0[..], hdr::SETUP_DATA, &[0; 8]);
        let flags = self.0[hdr::LOADFLAGS];
        self.byte(hdr::LOADFLAGS, flags & !QUIET_FLAG | LOADED_HIGH);
    }

    /// Makes up the header that a vmlinux has lost.
    fn made_up_header(&mut self) {
        put(&mut self.0[..], hdr::BOOT_FLAG, &0xaa55u16.to_le_bytes());
        put(&mut self.0[..], hdr::HEADER, b"HdrS");
        put(&mut self.0[..], hdr::VERSION, &0x20fu16.to_le_bytes());
        self.byte(hdr::LOADFLAGS, LOADED_HIGH);
    }

    /// Places and writes initial RAM disk, command line and the page itself; yields the page's address.
    fn finish(
        mut self,
        options: &BootOptions,
        limits: Limits,
        layout: &mut Layout,
        ram: &mut dyn GuestMemoryWriter,
    ) -> Result<GuestPhys, BootError> {
        let cmdline = options.cmdline.as_bytes();
        let max = usize::try_from(limits.cmdline).unwrap_or(usize::MAX);
        if cmdline.len() > max {
            return Err(BootError::CommandLineTooLong { len: cmdline.len(), max });
        }
        let (mut ramdisk, mut ramdisk_len) = (0, 0);
        if let Some(initrd) = options.initrd.as_deref().filter(|i| !i.is_empty()) {
            let at = layout.place_high("initrd", initrd.len() as u64, 4096, limits.initrd_end)?;
            ram.write(at, initrd)?;
            (ramdisk, ramdisk_len) = (at.0 as u32, initrd.len() as u32);
        }
        let page_at = layout.place_low("zero page", zp::SIZE as u64, 4096)?;
        let line_at = layout.place_low("command line", cmdline.len() as u64 + 1, 16)?;
        ram.write(line_at, cmdline)?;
        ram.write(line_at.wrapping_add(cmdline.len() as u64), &[0])?;

        self.byte(hdr::TYPE_OF_LOADER, LOADER_UNDEFINED);
        self.byte(hdr::EXT_LOADER_VER, 0);
        self.byte(hdr::EXT_LOADER_TYPE, 0);
        self.long(hdr::RAMDISK_IMAGE, ramdisk);
        self.long(hdr::RAMDISK_SIZE, ramdisk_len);
        self.long(hdr::CMD_LINE_PTR, line_at.0 as u32);
        ram.write(page_at, &self.0[..])?;
        Ok(page_at)
    }
}

/// A zero page for a Linux kernel without a setup header; yields its address.
pub(super) fn zero_page_for_vmlinux(
    options: &BootOptions,
    layout: &mut Layout,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<GuestPhys, BootError> {
    let mut page = ZeroPage::new(ram.size());
    page.made_up_header();
    // i386's COMMAND_LINE_SIZE is 2048 with the NUL.
    let limits = Limits { initrd_end: u64::from(OLD_INITRD_ADDR_MAX) + 1, cmdline: 2047 };
    page.finish(options, limits, layout, ram)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::testram::TestRam;
    use super::super::{Module, load};
    use super::*;

    /// A bzImage with a valid header of protocol 2.15 and 64 KiB of kernel, needing RAM from 16 to 20 MiB.
    pub(in crate::boot) fn synthetic() -> Vec<u8> {
        let mut f = vec![0u8; 1024 + 0x1_0000];
        f[hdr::SETUP_SECTS] = 1;
        put(&mut f, hdr::SYSSIZE, &0x1000u32.to_le_bytes());
        put(&mut f, hdr::BOOT_FLAG, &0xaa55u16.to_le_bytes());
        f[0x200] = 0xeb;
        f[hdr::JUMP_LENGTH] = 0x6a;
        put(&mut f, hdr::HEADER, b"HdrS");
        put(&mut f, hdr::VERSION, &0x20fu16.to_le_bytes());
        f[hdr::LOADFLAGS] = LOADED_HIGH | QUIET_FLAG;
        put(&mut f, hdr::INITRD_ADDR_MAX, &0x7fff_ffffu32.to_le_bytes());
        f[hdr::RELOCATABLE_KERNEL] = 1;
        put(&mut f, hdr::CMDLINE_SIZE, &2047u32.to_le_bytes());
        put(&mut f, hdr::PAYLOAD_OFFSET, &0x94u32.to_le_bytes());
        put(&mut f, hdr::PAYLOAD_LENGTH, &0xf000u32.to_le_bytes());
        put(&mut f, hdr::PREF_ADDRESS, &0x100_0000u64.to_le_bytes());
        put(&mut f, hdr::INIT_SIZE, &0x40_0000u32.to_le_bytes());
        f[1024..].fill(0xf4);
        f
    }

    fn boot(file: &[u8], options: &BootOptions, mib: usize) -> Result<(BootState, TestRam), BootError> {
        let mut ram = TestRam::new(mib << 20);
        load(file, options, &mut ram).map(|state| (state, ram))
    }
    fn options() -> BootOptions {
        BootOptions { cmdline: "console=ttyS0".into(), initrd: Some(vec![7; 5000]), ..BootOptions::default() }
    }

    #[test]
    fn a_bzimage_starts_as_the_32_bit_protocol_says() {
        let (state, ram) = boot(&synthetic(), &options(), 64).unwrap();
        assert_eq!(state.kind, Kind::BzImage);
        assert_eq!(state.cpu.eip, 0x10_0000);
        assert_eq!(ram.bytes(0x10_0000, 4), [0xf4; 4]);
        for r in [gpr::EBP, gpr::EDI, gpr::EBX] {
            assert_eq!(state.cpu.gpr[r], 0);
        }
        let page = u64::from(state.cpu.gpr[gpr::ESI]);
        assert_eq!(ram.string(u64::from(ram.u32(page + 0x228))), "console=ttyS0");
        assert_eq!(ram.bytes(page + 0x210, 2), [0xff, LOADED_HIGH]);
        assert_eq!((ram.bytes(page + 6, 2), ram.bytes(page + 0xf, 1)), (&[3u8, 80][..], &[1u8][..]));
    }

    #[test]
    fn the_initrd_lies_page_aligned_at_the_top_of_ram() {
        let (state, ram) = boot(&synthetic(), &options(), 64).unwrap();
        let page = u64::from(state.cpu.gpr[gpr::ESI]);
        let (at, len) = (u64::from(ram.u32(page + 0x218)), ram.u32(page + 0x21c));
        assert_eq!((at, len), ((64 << 20) - 0x2000, 5000));
        assert_eq!(ram.bytes(at, 5000), [7; 5000]);
    }

    #[test]
    fn the_initrd_stays_below_the_address_the_kernel_names() {
        let mut f = synthetic();
        put(&mut f, hdr::INITRD_ADDR_MAX, &0x1ff_ffffu32.to_le_bytes());
        let (state, ram) = boot(&f, &options(), 64).unwrap();
        let page = u64::from(state.cpu.gpr[gpr::ESI]);
        assert_eq!(ram.u32(page + 0x218), 0x1ff_e000);
    }

    #[test]
    fn the_e820_map_covers_ram_without_the_hole() {
        let (state, ram) = boot(&synthetic(), &options(), 64).unwrap();
        let page = u64::from(state.cpu.gpr[gpr::ESI]);
        assert_eq!(ram.bytes(page + 0x1e8, 1), [4]);
        let last = page + 0x2d0 + 3 * 20;
        assert_eq!((ram.u32(last), ram.u32(last + 8), ram.u32(last + 16)), (0x10_0000, 63 << 20, 1));
    }

    #[test]
    fn an_initrd_that_does_not_fit_is_refused() {
        let big = BootOptions { initrd: Some(vec![0; 45 << 20]), ..options() };
        let refused = boot(&synthetic(), &big, 64).unwrap_err();
        assert!(matches!(refused, BootError::DoesNotFit { what: "initrd", .. }), "{refused}");
        assert!(boot(&synthetic(), &big, 128).is_ok());
    }

    #[test]
    fn too_little_memory_says_how_much_the_kernel_needs() {
        let refused = boot(&synthetic(), &options(), 16).unwrap_err();
        assert_eq!(refused, BootError::TooLittleMemory { needed: 20 << 20, have: 16 << 20 });
    }

    #[test]
    fn a_kernel_for_x86_64_is_refused() {
        let mut f = synthetic();
        f[hdr::XLOADFLAGS] = 1;
        assert!(matches!(boot(&f, &options(), 64), Err(BootError::SixtyFourBit(_))));
    }

    #[test]
    fn old_protocols_and_kernels_loaded_low_are_refused() {
        let mut f = synthetic();
        put(&mut f, hdr::VERSION, &0x201u16.to_le_bytes());
        assert_eq!(boot(&f, &options(), 64).unwrap_err(), BootError::ProtocolTooOld(0x201));
        let mut f = synthetic();
        f[hdr::LOADFLAGS] = 0;
        assert!(matches!(boot(&f, &options(), 64), Err(BootError::ProtocolTooOld(_))));
    }

    #[test]
    fn protocol_2_02_is_loaded_with_its_own_limits() {
        let mut f = synthetic();
        put(&mut f, hdr::VERSION, &0x202u16.to_le_bytes());
        f[hdr::JUMP_LENGTH] = 0x2a;
        let (state, _) = boot(&f, &options(), 8).unwrap();
        assert_eq!(state.cpu.eip, 0x10_0000);
        let long = BootOptions { cmdline: "x".repeat(256), ..options() };
        assert_eq!(boot(&f, &long, 8).unwrap_err(), BootError::CommandLineTooLong { len: 256, max: 255 });
    }

    #[test]
    fn a_truncated_bzimage_is_called_truncated_wherever_it_is_cut() {
        let f = synthetic();
        for len in [0x206, 0x212, 0x240, 0x300, 1024, 1025, f.len() - 16] {
            let refused = boot(&f[..len], &options(), 64).unwrap_err();
            assert!(matches!(refused, BootError::Truncated { .. }), "{len}: {refused}");
        }
        assert!(boot(&f[..f.len() - 15], &options(), 64).is_ok());
    }

    #[test]
    fn a_payload_beyond_the_end_is_corrupt() {
        let mut f = synthetic();
        put(&mut f, hdr::PAYLOAD_LENGTH, &u32::MAX.to_le_bytes());
        assert!(matches!(boot(&f, &options(), 64), Err(BootError::Corrupt(_))));
    }

    #[test]
    fn modules_are_refused() {
        let with = BootOptions { modules: vec![Module::default()], ..options() };
        assert_eq!(boot(&synthetic(), &with, 64).unwrap_err(), BootError::ModulesNotSupported);
    }
}
