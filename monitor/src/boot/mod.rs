//! Boot: puts a kernel into guest RAM and says in which CPU state it starts.
//!
//! The way of a kernel file:
//!
//! 1. [`detect`] tells by magic numbers what the file is;
//! 2. the loader of that kind ([`bzimage`], [`elf32`], [`multiboot`], [`raw`]) checks the headers, claims places in
//!    guest RAM ([`layout::Layout`]) and writes kernel, boot information, command line and initial RAM disk there;
//! 3. the [`BootState`] holds the CPU state that the boot protocol promises to the kernel; any engine can run it.
//!
//! A kernel file is hostile input: every offset in it is an allegation until it has been compared with the file's
//! length and with the size of guest RAM. Whatever is wrong comes back as one [`BootError`], one line long.

pub mod bzimage;
pub mod elf32;
#[cfg(test)]
mod hostile;
pub mod layout;
pub mod multiboot;
pub mod payload;
pub mod raw;
#[cfg(test)]
mod testram;

use crate::GuestPhys;
use crate::cpum::{CpuState, SegAttr, Segment, TableRegister, cr0, eflags, seg};
use host_driver_shim::ram::GuestRam;
use layout::{Layout, Placed};
use thiserror::Error;

/// Guest RAM as the loaders see it: one block from physical address 0. The hole at 640 KiB is RAM to them, too; they
/// never place anything there of their own accord.
pub trait GuestMemoryWriter {
    /// Bytes of guest RAM.
    fn size(&self) -> u64;
    /// Copies `data` to guest physical memory, all of it or nothing.
    fn write(&mut self, at: GuestPhys, data: &[u8]) -> Result<(), OutsideRam>;
    /// Copies guest physical memory out.
    fn read(&self, at: GuestPhys, buf: &mut [u8]) -> Result<(), OutsideRam>;
}

impl GuestMemoryWriter for &GuestRam {
    fn size(&self) -> u64 {
        GuestRam::size(self)
    }
    fn write(&mut self, at: GuestPhys, data: &[u8]) -> Result<(), OutsideRam> {
        GuestRam::write(self, at.0, data).ok_or(OutsideRam { at, len: data.len() as u64 })
    }
    fn read(&self, at: GuestPhys, buf: &mut [u8]) -> Result<(), OutsideRam> {
        GuestRam::read(self, at.0, buf).ok_or(OutsideRam { at, len: buf.len() as u64 })
    }
}

/// An access by a loader that is not wholly inside guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("{len:#x} bytes at {at} lie outside guest RAM")]
pub struct OutsideRam {
    /// First address.
    pub at: GuestPhys,
    /// Length in bytes.
    pub len: u64,
}

/// What a user asks for beside the kernel itself.
#[derive(Clone, Debug, Default)]
pub struct BootOptions {
    /// The kernel's command line, without a terminating NUL.
    pub cmdline: String,
    /// Initial RAM disk (Linux), or the first module (Multiboot).
    pub initrd: Option<Vec<u8>>,
    /// Multiboot modules.
    pub modules: Vec<Module>,
    /// Start the file as a raw binary in this way, whatever it looks like.
    pub raw: Option<raw::RawStart>,
}

/// A Multiboot module.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// The module's own command line.
    pub cmdline: String,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// What a kernel file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Linux bzImage.
    BzImage,
    /// A kernel with a Multiboot 1 header, ELF32 or not.
    Multiboot,
    /// ELF32 for i386 without a Multiboot header: a Linux vmlinux, or anything with an entry point.
    Elf32,
    /// An ELF file for a 64-bit machine, or for another one than i386.
    ElfOther,
    /// Nothing known: can only be started as a raw binary.
    Unknown,
}

/// Why a kernel cannot be started. Each is one line about the file; the caller knows the file's name.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum BootError {
    /// Nothing in the file.
    #[error("the kernel file is empty")]
    Empty,
    /// No known format.
    #[error(
        "not a kernel: neither a bzImage, nor ELF32, nor with a Multiboot header (a raw binary needs a load address)"
    )]
    UnknownFormat,
    /// A file commonly taken for a kernel.
    #[error("not a kernel: this is {0}")]
    NotAKernel(&'static str),
    /// Shorter than its own headers say.
    #[error("the kernel file is truncated: {what} needs {needed} bytes, the file has {have}")]
    Truncated {
        /// The part that is cut off.
        what: &'static str,
        /// Bytes the file would need.
        needed: u64,
        /// Bytes it has.
        have: u64,
    },
    /// Headers that contradict themselves.
    #[error("the kernel file is corrupt: {0}")]
    Corrupt(&'static str),
    /// x86-64.
    #[error("this is a 64-bit kernel ({0}); subring runs 32-bit x86 kernels")]
    SixtyFourBit(&'static str),
    /// ELF for something else than i386.
    #[error("this ELF file is for another machine (e_machine {0}); subring runs 32-bit x86 kernels")]
    OtherMachine(u16),
    /// ELF that is no executable.
    #[error("this ELF file is not an executable (e_type {0}; an object file or a core dump?)")]
    NotExecutable(u16),
    /// Linux boot protocol too old, or a zImage.
    #[error("boot protocol {}.{:02} is too old, 2.02 with a kernel loaded high is the oldest supported", .0 >> 8, .0 & 0xff)]
    ProtocolTooOld(u16),
    /// A Multiboot feature that must be there, and is not.
    #[error("the Multiboot header demands features that do not exist here (flags {0:#06x})")]
    MultibootFlags(u32),
    /// The kernel does not fit.
    #[error("too little memory: the kernel needs guest RAM up to {} MiB, there are {} MiB (give more with -m)", needed.div_ceil(1 << 20), have >> 20)]
    TooLittleMemory {
        /// Bytes of RAM that would be enough for the kernel alone.
        needed: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The initial RAM disk or a module does not fit.
    #[error("the {what} does not fit: {len} bytes, and {free} bytes are free between the kernel and {limit}")]
    DoesNotFit {
        /// `initrd` or `module`.
        what: &'static str,
        /// Its length.
        len: u64,
        /// Room there is.
        free: u64,
        /// End of the memory it may lie in.
        limit: GuestPhys,
    },
    /// Command line longer than the kernel takes.
    #[error("the command line has {len} bytes, this kernel takes {max}")]
    CommandLineTooLong {
        /// Bytes given.
        len: usize,
        /// Bytes taken.
        max: usize,
    },
    /// A NUL inside of it would end it early.
    #[error("the command line contains a NUL byte")]
    CommandLineNul,
    /// Modules for a kernel that knows none.
    #[error("modules can only be given to a Multiboot kernel")]
    ModulesNotSupported,
    /// An initial RAM disk for a raw binary.
    #[error("a raw binary takes neither a command line nor an initrd")]
    RawTakesNothing,
    /// An entry point outside of what was loaded.
    #[error("the entry point {0} lies outside of the loaded kernel")]
    BadEntry(GuestPhys),
    /// Guest RAM refused a write, which the checks before should have made impossible.
    #[error(transparent)]
    Ram(#[from] OutsideRam),
}

/// A machine ready to start.
#[derive(Clone, Debug)]
pub struct BootState {
    /// The state the first instruction runs in.
    pub cpu: CpuState,
    /// What was started.
    pub kind: Kind,
    /// What lies where, in ascending order.
    pub placed: Vec<Placed>,
}

/// Tells by its magic numbers what a file is. Never fails; a file that looks right may still be refused by [`load`].
#[must_use]
pub fn detect(kernel: &[u8]) -> Kind {
    if bzimage::has_magic(kernel) {
        Kind::BzImage
    } else if elf32::is_elf_for_other_machine(kernel) {
        Kind::ElfOther
    } else if multiboot::find_header(kernel).is_some() {
        Kind::Multiboot
    } else if elf32::has_magic(kernel) {
        Kind::Elf32
    } else {
        Kind::Unknown
    }
}

/// Loads `kernel` into guest RAM, which should be zero, and yields the state to start in.
///
/// # Errors
/// Whatever is wrong with the file, the options or the size of guest RAM. Guest RAM may then be partly written.
pub fn load(
    kernel: &[u8],
    options: &BootOptions,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<BootState, BootError> {
    if options.cmdline.contains('\0') || options.modules.iter().any(|m| m.cmdline.contains('\0')) {
        return Err(BootError::CommandLineNul);
    }
    if kernel.is_empty() {
        return Err(BootError::Empty);
    }
    if let Some(start) = options.raw {
        return raw::load(kernel, start, options, ram);
    }
    let kind = detect(kernel);
    if kind != Kind::Multiboot && !options.modules.is_empty() {
        return Err(BootError::ModulesNotSupported);
    }
    match kind {
        Kind::BzImage => bzimage::load(kernel, options, ram),
        Kind::Multiboot => multiboot::load(kernel, options, ram),
        Kind::Elf32 => elf32::load(kernel, options, ram),
        Kind::ElfOther => Err(elf32::refusal(kernel)),
        Kind::Unknown => Err(unknown(kernel)),
    }
}

/// Names the files people give in place of a kernel.
fn unknown(file: &[u8]) -> BootError {
    let known: [(&[u8], &'static str); 8] = [
        (b"\x1f\x8b", "gzip-compressed data (an initrd?)"),
        (b"\xfd7zXZ", "xz-compressed data (an initrd?)"),
        (b"\x28\xb5\x2f\xfd", "zstd-compressed data (an initrd?)"),
        (b"BZh", "bzip2-compressed data"),
        (b"070701", "a cpio archive (an initrd?)"),
        (b"!<arch>", "an archive or a Debian package"),
        (b"#!", "a script"),
        (b"MZ", "a DOS or EFI program without a Linux setup header"),
    ];
    match known.iter().find(|(magic, _)| file.starts_with(magic)) {
        Some((_, name)) => BootError::NotAKernel(name),
        None if file.starts_with(b"\x7fELF") => {
            BootError::Truncated { what: "the ELF header", needed: 52, have: file.len() as u64 }
        }
        None => BootError::UnknownFormat,
    }
}

/// Selectors of the flat segments a kernel starts with: `__BOOT_CS` and `__BOOT_DS` of the Linux 32-bit boot protocol
/// (boot.rst); Multiboot leaves them open.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// The boot GDT: null, unused, flat 4 GiB code (execute/read), flat 4 GiB data (read/write).
const BOOT_GDT: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes the boot GDT and yields a CPU in 32-bit protected mode with flat segments, paging and interrupts off.
fn flat_start(
    entry: GuestPhys,
    layout: &mut Layout,
    ram: &mut dyn GuestMemoryWriter,
) -> Result<CpuState, BootError> {
    let mut bytes = [0u8; 32];
    for (slot, descriptor) in bytes.chunks_exact_mut(8).zip(BOOT_GDT) {
        slot.copy_from_slice(&descriptor.to_le_bytes());
    }
    let gdt = layout.place_low("GDT", bytes.len() as u64, 16)?;
    ram.write(gdt, &bytes)?;
    let flat = |selector, access: u16| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attr: SegAttr::from_bits_truncate(0xc00 | access),
    };
    let mut cpu = CpuState::reset();
    cpu.gpr = [0; 8];
    cpu.eip = entry.0 as u32;
    cpu.eflags = eflags::FIXED;
    cpu.seg = [flat(BOOT_DS, 0x93); 6];
    cpu.seg[seg::CS] = flat(BOOT_CS, 0x9b);
    cpu.gdtr = TableRegister { base: gdt.0 as u32, limit: 31 };
    // As a BIOS leaves it. An IDT with no room for a gate would say that the guest wants its next exception to be a
    // restart; a guest that has not loaded one yet wants nothing of the kind.
    cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
    cpu.cr0 = cr0::PE | cr0::ET;
    Ok(cpu)
}

/// Little-endian fields of a file; `None` beyond its end.
fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}
fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Sets a field of a structure being built. The offsets are ours, inside structures of fixed size.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(slot) = at.checked_add(value.len()).and_then(|end| bytes.get_mut(at..end)) {
        slot.copy_from_slice(value);
    } else {
        debug_assert!(false, "field at {at:#x} outside of its structure");
    }
}

#[cfg(test)]
mod tests {
    use super::testram::TestRam;
    use super::*;

    fn error(file: &[u8]) -> String {
        load(file, &BootOptions::default(), &mut TestRam::new(64 << 20)).unwrap_err().to_string()
    }

    #[test]
    fn files_that_are_no_kernels_are_named() {
        assert_eq!(error(b""), "the kernel file is empty");
        assert!(error(b"\x1f\x8b\x08").contains("gzip"));
        assert!(error(b"#!/bin/sh").contains("a script"));
        assert!(error(b"hello").starts_with("not a kernel: neither"));
        assert!(error(b"\x7fELF\x01\x01").contains("truncated"));
    }

    #[test]
    fn every_error_is_one_line() {
        for e in [
            BootError::UnknownFormat,
            BootError::ProtocolTooOld(0x201),
            BootError::TooLittleMemory { needed: 3 << 20, have: 1 << 20 },
            BootError::Truncated { what: "x", needed: 2, have: 1 },
        ] {
            assert!(!e.to_string().contains('\n'));
        }
        assert!(BootError::ProtocolTooOld(0x201).to_string().contains("2.01"));
    }

    #[test]
    fn a_command_line_with_a_nul_is_refused() {
        let options = BootOptions { cmdline: "a\0b".into(), ..BootOptions::default() };
        let got = load(b"x", &options, &mut TestRam::new(1 << 20));
        assert_eq!(got.unwrap_err(), BootError::CommandLineNul);
    }

    #[test]
    fn the_boot_gdt_holds_the_segments_the_cpu_starts_with() {
        let mut ram = TestRam::new(4 << 20);
        let cpu = flat_start(GuestPhys(0x10_0000), &mut Layout::new(4 << 20), &mut ram).unwrap();
        for (selector, index) in [(BOOT_CS, seg::CS), (BOOT_DS, seg::DS)] {
            let mut raw = [0; 8];
            ram.read(GuestPhys(u64::from(cpu.gdtr.base + u32::from(selector))), &mut raw).unwrap();
            let d = u64::from_le_bytes(raw);
            let attr = ((d >> 40) & 0xff) | ((d >> 44) & 0xf00);
            assert_eq!(cpu.seg[index].attr.bits(), attr as u16);
            assert_eq!(cpu.seg[index].selector, selector);
            assert!(cpu.seg[index].is_flat());
        }
        assert!(cpu.protected() && !cpu.paging() && !cpu.interruptible());
    }
}
