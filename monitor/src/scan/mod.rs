//! `subring scan FILE`: counts a kernel's sensitive instructions offline, by kind and by page.
//!
//! Code is found in passes, from certain to guessed, and the report says how much each pass added:
//! 1. the entry point (or the `--entry` addresses, and then nothing else),
//! 2. function symbols,
//! 3. relocations: words the kernel itself relocates and that point at code (jump tables, function pointers),
//! 4. exception tables: where a fixup or a WARN goes on,
//! 5. without relocations: words of the data that look like code addresses (a guess),
//! 6. what nothing led to is swept linearly and counted apart as *unproven*: padding, dead code, and what only an
//!    indirect jump reaches. A running guest is never scanned this way.

pub mod image;
mod print;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use csam::{CodeMap, CodeSize, GuestLin, SensitiveKind};
use iced_x86::{Decoder, DecoderOptions, Instruction};
use serde::Serialize;
use thiserror::Error;

use crate::boot::payload::PayloadError;
use image::Image;

/// What to scan and how to show it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScanOptions {
    /// An ELF32 vmlinux, a bzImage, or with `base` a raw binary.
    pub file: PathBuf,
    /// The file is raw and its first byte has this linear address.
    pub base: Option<u32>,
    /// Linear addresses to start from, and no others; empty means all the file tells.
    pub entries: Vec<u32>,
    /// 16 or 32: the size of the code.
    pub bits: u32,
    /// JSON instead of a table.
    pub json: bool,
}

/// Why there is no report.
#[derive(Debug, Error)]
pub enum ScanError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", file.display())]
    Read {
        /// Which file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No magic number fits.
    #[error("neither an ELF file nor a bzImage; for a raw binary give --base")]
    Unknown,
    /// An ELF64 file.
    #[error("a 64-bit ELF file; only 32-bit x86 kernels can be scanned")]
    Not32Bit,
    /// An ELF file for something else.
    #[error("not an ELF file for the i386")]
    NotI386,
    /// A table or a section lies outside the file.
    #[error("the ELF file is truncated: its tables point outside the file")]
    TruncatedElf,
    /// No executable section or segment.
    #[error("the ELF file has no code")]
    NoCode,
    /// A raw binary and its base.
    #[error("{length} bytes at {base:#x} do not fit below 4 GiB")]
    DoesNotFit {
        /// Bytes in the file.
        length: usize,
        /// Linear address.
        base: u32,
    },
    /// A code size that does not exist.
    #[error("code is 16 or 32 bits wide, not {0}")]
    Bits(u32),
    /// The bzImage's payload.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// The report cannot be written.
    #[error("cannot write the report: {0}")]
    Write(#[from] io::Error),
}

/// Reads the file, scans it and writes the report.
pub fn run(options: &ScanOptions, out: &mut dyn Write) -> Result<(), ScanError> {
    let bytes = std::fs::read(&options.file)
        .map_err(|source| ScanError::Read { file: options.file.clone(), source })?;
    let size = match options.bits {
        16 => CodeSize::Bits16,
        32 => CodeSize::Bits32,
        other => return Err(ScanError::Bits(other)),
    };
    let report = report(&Image::read(bytes, options.base)?, &options.entries, size);
    if options.json {
        serde_json::to_writer_pretty(&mut *out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        print::table(&report, out)?;
    }
    Ok(())
}

/// The version of the JSON form; it changes when a field changes its meaning or goes away.
pub const REPORT_VERSION: u32 = 1;

/// What `subring scan` found. Addresses are linear.
#[derive(Serialize, PartialEq, Eq, Debug)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub version: u32,
    /// `ELF32`, `bzImage` or `raw`.
    pub format: &'static str,
    /// 16 or 32.
    pub bits: u32,
    /// The file's entry point.
    pub entry: u32,
    /// The executable parts.
    pub code: Vec<Part>,
    /// How the instructions were found.
    pub passes: Vec<Pass>,
    /// Sums over all pages.
    pub totals: Count,
    /// By kind of sensitive instruction; kinds that do not occur are left out.
    pub kinds: Vec<Kind>,
    /// Every sensitive instruction, ascending by address, the proven ones first.
    pub sites: Vec<Site>,
    /// By 4 KiB page; pages without instructions are left out.
    pub pages: Vec<Page>,
    /// Addresses that a path led to and where no instruction decodes.
    pub undecodable: Vec<u32>,
}

/// An executable section or segment.
#[derive(Serialize, PartialEq, Eq, Debug)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Address of its first byte.
    pub at: u32,
    /// Bytes.
    pub length: usize,
}

/// One way of finding code.
#[derive(Serialize, PartialEq, Eq, Debug)]
pub struct Pass {
    /// Where its starting points come from.
    pub name: &'static str,
    /// How many starting points there were.
    pub entries: usize,
    /// Instructions it added.
    pub instructions: usize,
    /// Sensitive instructions it added.
    pub sites: usize,
}

/// Counts of instructions.
#[derive(Serialize, Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Count {
    /// Pages with a proven instruction.
    pub pages: usize,
    /// Instructions some path leads to.
    pub instructions: usize,
    /// The sensitive ones among them.
    pub sites: usize,
    /// Instructions of the linear sweep.
    pub unproven_instructions: usize,
    /// The sensitive ones among them.
    pub unproven_sites: usize,
}

/// Count of one kind.
#[derive(Serialize, PartialEq, Eq, Debug)]
pub struct Kind {
    /// [`SensitiveKind::name`].
    pub name: &'static str,
    /// What the host would do with it: `traps`, `silently wrong`, `depends on the host`, `depends on the operand`.
    pub host: &'static str,
    /// Proven sites.
    pub sites: usize,
    /// Sites of the linear sweep.
    pub unproven: usize,
}

/// One sensitive instruction.
#[derive(Serialize, PartialEq, Eq, Debug)]
pub struct Site {
    /// Its address.
    pub at: u32,
    /// [`SensitiveKind::name`].
    pub kind: &'static str,
    /// Does a path lead to it, or did only the linear sweep find it?
    pub proven: bool,
}

/// Counts of one page.
#[derive(Serialize, PartialEq, Eq, Debug)]
pub struct Page {
    /// Its address.
    pub at: u32,
    /// Proven instructions that start in it.
    pub instructions: usize,
    /// Bytes that belong to a proven instruction, 0..=4096.
    pub proven_bytes: usize,
    /// Branch targets in it.
    pub targets: usize,
    /// Proven sites.
    pub sites: usize,
    /// Sites of the linear sweep.
    pub unproven_sites: usize,
}

/// Scans an image from the entries, or in all passes when there are none.
#[must_use]
pub fn report(image: &Image, entries: &[u32], size: CodeSize) -> Report {
    let mut map = CodeMap::new(size);
    let mut passes = Vec::new();
    let scan = csam::ScanOptions::default();
    let mut pass = |map: &mut CodeMap, name, entries: &[u32]| {
        let at: Vec<_> = entries.iter().copied().map(GuestLin).collect();
        let found = map.scan_all(&at, &mut { image }, &scan);
        passes.push(Pass {
            name,
            entries: entries.len(),
            instructions: found.instructions.len(),
            sites: found.sites.len(),
        });
    };
    let mut swept = Sweep::default();
    if entries.is_empty() {
        pass(&mut map, "entry point", &[image.entry]);
        pass(&mut map, "function symbols", &image.functions);
        pass(&mut map, "relocations", &image.relocated);
        pass(&mut map, "exception tables", &image.resumed);
        if image.relocated.is_empty() {
            pass(&mut map, "data that looks like code addresses (a guess)", &image.words_like_code());
        }
        if image.format != "raw" {
            swept = sweep(image, &map);
        }
        passes.retain(|pass| pass.entries > 0);
        if swept.instructions > 0 {
            passes.push(Pass {
                name: "linear sweep of the rest (unproven)",
                entries: swept.gaps,
                instructions: swept.instructions,
                sites: swept.sites.len(),
            });
        }
    } else {
        pass(&mut map, "given entries", entries);
    }
    let parts = image.code.iter().map(|region| Part {
        name: region.name.clone(),
        at: region.at,
        length: region.file.len(),
    });
    let pages = pages(&map, &swept);
    Report {
        version: REPORT_VERSION,
        format: image.format,
        bits: size.bits(),
        entry: image.entry,
        code: parts.collect(),
        passes,
        totals: Count {
            pages: map.pages().filter(|(_, record)| !record.starts.is_empty()).count(),
            instructions: map.instruction_count(),
            sites: map.sites().count(),
            unproven_instructions: swept.instructions,
            unproven_sites: swept.sites.len(),
        },
        kinds: kinds(&map, &swept),
        sites: sites(&map, &swept),
        pages,
        undecodable: map.undecodable().map(|at| at.0).collect(),
    }
}

fn kinds(map: &CodeMap, swept: &Sweep) -> Vec<Kind> {
    use csam::HostBehaviour as Host;
    let mut counts: BTreeMap<SensitiveKind, (usize, usize)> = BTreeMap::new();
    for site in map.sites() {
        counts.entry(site.kind).or_default().0 += 1;
    }
    for (_, kind) in &swept.sites {
        counts.entry(*kind).or_default().1 += 1;
    }
    let mut kinds: Vec<_> = counts
        .into_iter()
        .map(|(kind, (sites, unproven))| Kind {
            name: kind.name(),
            host: match kind.host_behaviour() {
                Host::Traps => "traps",
                Host::SilentlyWrong => "silently wrong",
                Host::HostDependent => "depends on the host",
                Host::OperandDependent => "depends on the operand",
            },
            sites,
            unproven,
        })
        .collect();
    kinds.sort_by_key(|kind| std::cmp::Reverse((kind.sites, kind.unproven)));
    kinds
}

fn sites(map: &CodeMap, swept: &Sweep) -> Vec<Site> {
    let proven = map.sites().map(|site| (site.at, site.kind, true));
    let unproven = swept.sites.iter().map(|(at, kind)| (*at, *kind, false));
    proven.chain(unproven).map(|(at, kind, proven)| Site { at: at.0, kind: kind.name(), proven }).collect()
}

fn pages(map: &CodeMap, swept: &Sweep) -> Vec<Page> {
    let mut unproven: BTreeMap<u32, usize> = BTreeMap::new();
    for (at, _) in &swept.sites {
        *unproven.entry(at.page_number()).or_default() += 1;
    }
    let mut pages: BTreeMap<u32, Page> = BTreeMap::new();
    for (number, record) in map.pages().filter(|(_, record)| !record.proven.is_empty()) {
        pages.insert(
            number,
            Page {
                at: number << 12,
                instructions: record.starts.count(),
                proven_bytes: record.proven.count(),
                targets: record.targets.count(),
                sites: record.sites().len(),
                unproven_sites: 0,
            },
        );
    }
    for (number, sites) in unproven {
        let at = number << 12;
        let empty = Page { at, instructions: 0, proven_bytes: 0, targets: 0, sites: 0, unproven_sites: 0 };
        pages.entry(number).or_insert(empty).unproven_sites = sites;
    }
    pages.into_values().collect()
}

#[derive(Default)]
struct Sweep {
    gaps: usize,
    instructions: usize,
    sites: Vec<(GuestLin, SensitiveKind)>,
}

/// Decodes the bytes of the code that no path led to, one after the other.
fn sweep(image: &Image, map: &CodeMap) -> Sweep {
    let mut found = Sweep::default();
    let mut instruction = Instruction::default();
    for region in &image.code {
        let bytes = image.bytes.get(region.file.clone()).unwrap_or_default();
        let proven = |offset: usize| map.proven(GuestLin(region.at.wrapping_add(offset as u32)));
        let mut offset = 0;
        while offset < bytes.len() {
            if proven(offset) {
                offset += 1;
                continue;
            }
            let length = (offset..bytes.len()).find(|byte| proven(*byte)).unwrap_or(bytes.len()) - offset;
            let gap = bytes.get(offset..offset + length).unwrap_or_default();
            found.gaps += 1;
            let mut decoder = Decoder::new(map.size().bits(), gap, DecoderOptions::NONE);
            while decoder.can_decode() {
                let at = region.at.wrapping_add((offset + decoder.position()) as u32);
                let position = decoder.position();
                decoder.decode_out(&mut instruction);
                if instruction.is_invalid() {
                    // One byte on, as disassemblers do; `position + 1` is at most the gap's length.
                    let _ = decoder.set_position(position + 1);
                    continue;
                }
                found.instructions += 1;
                if let csam::Class::Sensitive(kind) = csam::classify_instruction(&instruction) {
                    found.sites.push((GuestLin(at), kind));
                }
            }
            offset += length;
        }
    }
    found
}

#[cfg(test)]
mod tests;
