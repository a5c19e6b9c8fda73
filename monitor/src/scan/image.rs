//! What `subring scan` reads: an ELF32 kernel, a bzImage or raw bytes, turned into code at addresses and hints.
//!
//! Addresses are the ones the code runs at after boot. Linux gives its entry point as a physical address (it starts
//! with paging off); it is translated through the program headers so that all of the kernel is scanned at one place.

use std::collections::BTreeSet;
use std::ops::Range;

use csam::{CodeSource, GuestLin};

use super::ScanError;
use crate::boot::payload;

const SHT_PROGBITS: u32 = 1;
const SHT_SYMTAB: u32 = 2;
const SHF_ALLOC: u32 = 2;
const SHF_EXECINSTR: u32 = 4;
const PT_LOAD: u32 = 1;
const PF_X: u32 = 1;
const EM_386: u16 = 3;
const STT_FUNC: u8 = 2;

/// Bytes of the file that lie at an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Region {
    /// The section's name, or what stands for it.
    pub name: String,
    /// Address of the first byte.
    pub at: u32,
    /// Where in [`Image::bytes`].
    pub file: Range<usize>,
}

/// A file to scan.
#[derive(Debug)]
pub struct Image {
    /// What it is, for the report.
    pub format: &'static str,
    /// The file, unpacked.
    pub bytes: Vec<u8>,
    /// Executable parts, ascending by address.
    pub code: Vec<Region>,
    /// The other parts that are loaded, ascending by address.
    pub data: Vec<Region>,
    /// The file's own entry point.
    pub entry: u32,
    /// Addresses of the function symbols.
    pub functions: Vec<u32>,
    /// Code addresses from the relocations behind a bzImage's ELF file: each names a place that holds an absolute
    /// address. Empty when the file has none.
    pub relocated: Vec<u32>,
    /// Where exception tables continue: fixups, and what follows a WARN's `ud2`.
    pub resumed: Vec<u32>,
}

impl Image {
    /// Recognises the file by its magic numbers; with a base it is raw whatever it looks like.
    pub fn read(bytes: Vec<u8>, base: Option<u32>) -> Result<Self, ScanError> {
        if let Some(base) = base {
            return Self::raw(bytes, base);
        }
        if bytes.starts_with(b"\x7fELF") {
            return Self::elf(bytes, "ELF32");
        }
        if bytes.get(0x202..0x206) == Some(b"HdrS") {
            let elf = payload::unpack(&bytes)?;
            return Self::elf(elf, "bzImage");
        }
        Err(ScanError::Unknown)
    }

    fn raw(bytes: Vec<u8>, base: u32) -> Result<Self, ScanError> {
        if bytes.is_empty() || u64::from(base) + bytes.len() as u64 > 1 << 32 {
            return Err(ScanError::DoesNotFit { length: bytes.len(), base });
        }
        let code = vec![Region { name: "raw".into(), at: base, file: 0..bytes.len() }];
        Ok(Self {
            format: "raw",
            bytes,
            code,
            data: Vec::new(),
            entry: base,
            functions: Vec::new(),
            relocated: Vec::new(),
            resumed: Vec::new(),
        })
    }

    fn elf(bytes: Vec<u8>, format: &'static str) -> Result<Self, ScanError> {
        let elf = Elf { bytes: &bytes };
        if bytes.get(4) == Some(&2) {
            return Err(ScanError::Not32Bit);
        }
        let header_ok = bytes.get(4..6) == Some(&[1, 1]) && elf.half(18) == Some(EM_386);
        if !header_ok {
            return Err(ScanError::NotI386);
        }
        let sections = elf.sections().ok_or(ScanError::TruncatedElf)?;
        let segments = elf.segments().ok_or(ScanError::TruncatedElf)?;
        let (mut code, mut data) = (Vec::new(), Vec::new());
        for section in &sections {
            if section.kind != SHT_PROGBITS || section.flags & SHF_ALLOC == 0 {
                continue;
            }
            let region = Region { name: section.name.clone(), at: section.at, file: section.file.clone() };
            // Replacements run where alternatives copy them to, not here.
            if section.flags & SHF_EXECINSTR != 0 && section.name != ".altinstr_replacement" {
                code.push(region);
            } else {
                data.push(region);
            }
        }
        if code.is_empty() {
            for (number, segment) in segments.iter().enumerate() {
                let name = format!("segment {number}");
                let region = Region { name, at: segment.at, file: segment.file.clone() };
                if segment.flags & PF_X != 0 { code.push(region) } else { data.push(region) }
            }
        }
        code.retain(|region| !region.file.is_empty());
        data.retain(|region| !region.file.is_empty());
        code.sort_by_key(|region| region.at);
        data.sort_by_key(|region| region.at);
        if code.is_empty() {
            return Err(ScanError::NoCode);
        }
        let physical = elf.word(24).ok_or(ScanError::TruncatedElf)?;
        let functions = elf.functions(&sections);
        let elf_end = elf.end(&sections, &segments);
        let mut image = Self {
            format,
            code,
            data,
            entry: 0,
            functions,
            relocated: Vec::new(),
            resumed: Vec::new(),
            bytes: Vec::new(),
        };
        image.entry = image.virtual_entry(physical, &segments);
        image.bytes = bytes;
        image.functions.retain(|at| image.code.iter().any(|region| region.contains(*at)));
        image.relocated = image.relocated_code(elf_end);
        image.resumed = image.resume_points();
        Ok(image)
    }

    fn virtual_entry(&self, entry: u32, segments: &[Segment]) -> u32 {
        if self.in_code(entry) {
            return entry;
        }
        let offset_in = |segment: &&Segment| entry.wrapping_sub(segment.physical) < segment.file.len() as u32;
        segments
            .iter()
            .find(offset_in)
            .map_or(entry, |segment| entry.wrapping_sub(segment.physical).wrapping_add(segment.at))
    }

    /// Is this the address of an executable byte?
    #[must_use]
    pub fn in_code(&self, at: u32) -> bool {
        self.code.iter().any(|region| region.contains(at))
    }

    /// The 32-bit word the file has for an address.
    #[must_use]
    pub fn word_at(&self, at: u32) -> Option<u32> {
        self.code.iter().chain(&self.data).find_map(|region| {
            let offset = region.file.start + region.offset(at)?;
            word(self.bytes.get(..region.file.end)?, offset)
        })
    }

    /// Linux's own relocations (arch/x86/tools/relocs.c): behind the ELF file, read backwards from the end until a
    /// zero, the addresses of all words that hold absolute addresses.
    fn relocated_code(&self, elf_end: usize) -> Vec<u32> {
        let tail = self.bytes.get(elf_end..).unwrap_or_default();
        let mut found = BTreeSet::new();
        for place in tail.rchunks_exact(4) {
            let place = word(place, 0).unwrap_or_default();
            if place == 0 {
                return found.into_iter().collect();
            }
            found.extend(self.word_at(place).filter(|target| self.in_code(*target)));
        }
        // No terminator: these are not relocations.
        Vec::new()
    }

    /// From `__ex_table` and `__bug_table`, whose fields are relative to themselves (Linux asm/extable.h, asm/bug.h).
    fn resume_points(&self) -> Vec<u32> {
        const UD2: [u8; 2] = [0x0f, 0x0b];
        let mut found = BTreeSet::new();
        let relative = |at: u32| Some(at.wrapping_add(self.word_at(at)?));
        for table in &self.data {
            let entries = (0..(table.file.len() / 12) as u32).map(|entry| table.at.wrapping_add(entry * 12));
            match table.name.as_str() {
                "__ex_table" => found.extend(entries.filter_map(|at| relative(at.wrapping_add(4)))),
                "__bug_table" => found.extend(entries.filter_map(|at| {
                    let trap = relative(at)?;
                    let warns = self.word_at(at.wrapping_add(8))? >> 16 & 1 != 0;
                    (warns && self.word_at(trap)?.to_le_bytes().starts_with(&UD2))
                        .then(|| trap.wrapping_add(2))
                })),
                _ => {}
            }
        }
        found.into_iter().filter(|at| self.in_code(*at)).collect()
    }

    /// Words at aligned places of the data that would be code addresses. A guess: numbers look like addresses.
    #[must_use]
    pub fn words_like_code(&self) -> Vec<u32> {
        let mut found = BTreeSet::new();
        for region in &self.data {
            let skip = (region.at.wrapping_neg() & 3) as usize;
            let bytes = self.bytes.get(region.file.clone()).unwrap_or_default();
            let words = bytes.get(skip..).unwrap_or_default().chunks_exact(4);
            found.extend(words.filter_map(|bytes| word(bytes, 0)).filter(|at| self.in_code(*at)));
        }
        found.into_iter().collect()
    }
}

impl CodeSource for &Image {
    fn fetch(&mut self, at: GuestLin, buf: &mut [u8]) -> usize {
        let Some(region) = self.code.iter().find(|region| region.contains(at.0)) else { return 0 };
        let Some(offset) = region.offset(at.0) else { return 0 };
        let bytes = self.bytes.get(region.file.start + offset..region.file.end).unwrap_or_default();
        let count = bytes.len().min(buf.len());
        buf[..count].copy_from_slice(&bytes[..count]);
        count
    }
}

impl Region {
    fn offset(&self, at: u32) -> Option<usize> {
        let offset = at.checked_sub(self.at)? as usize;
        (offset < self.file.len()).then_some(offset)
    }

    /// Is there a byte of the region at this address?
    #[must_use]
    pub fn contains(&self, at: u32) -> bool {
        self.offset(at).is_some()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

struct Elf<'a> {
    bytes: &'a [u8],
}

struct Section {
    name: String,
    kind: u32,
    flags: u32,
    at: u32,
    file: Range<usize>,
    link: usize,
}

struct Segment {
    at: u32,
    physical: u32,
    flags: u32,
    file: Range<usize>,
}

impl Elf<'_> {
    fn word(&self, at: usize) -> Option<u32> {
        word(self.bytes, at)
    }

    fn half(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(self.bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
    }

    fn range(&self, offset: u32, length: u32) -> Option<Range<usize>> {
        let end = (offset as usize).checked_add(length as usize)?;
        (end <= self.bytes.len()).then_some(offset as usize..end)
    }

    fn table(&self, offset: usize, size: usize, count: usize) -> Option<impl Iterator<Item = usize> + use<>> {
        let start = self.word(offset)? as usize;
        let size = usize::from(self.half(size)?);
        let count = usize::from(self.half(count)?);
        self.bytes.get(start..start.checked_add(size * count)?)?;
        Some((0..count).filter_map(move |entry| start.checked_add(entry * size)))
    }

    fn segments(&self) -> Option<Vec<Segment>> {
        let mut segments = Vec::new();
        for at in self.table(28, 42, 44)? {
            if self.word(at)? == PT_LOAD {
                segments.push(Segment {
                    at: self.word(at + 8)?,
                    physical: self.word(at + 12)?,
                    flags: self.word(at + 24)?,
                    file: self.range(self.word(at + 4)?, self.word(at + 16)?)?,
                });
            }
        }
        Some(segments)
    }

    fn sections(&self) -> Option<Vec<Section>> {
        const SHT_NOBITS: u32 = 8;
        let mut sections = Vec::new();
        let mut names = Vec::new();
        for at in self.table(32, 46, 48)? {
            let kind = self.word(at + 4)?;
            let length = if kind == SHT_NOBITS { 0 } else { self.word(at + 20)? };
            let offset = if kind == SHT_NOBITS { 0 } else { self.word(at + 16)? };
            names.push(self.word(at)? as usize);
            sections.push(Section {
                name: String::new(),
                kind,
                flags: self.word(at + 8)?,
                at: self.word(at + 12)?,
                file: self.range(offset, length)?,
                link: self.word(at + 24)? as usize,
            });
        }
        let strings = sections.get(usize::from(self.half(50)?)).map(|section| section.file.clone());
        let strings = strings.and_then(|range| self.bytes.get(range)).unwrap_or_default();
        for (section, name) in sections.iter_mut().zip(names) {
            let text = strings.get(name..).unwrap_or_default();
            let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
            section.name = String::from_utf8_lossy(text).into_owned();
        }
        Some(sections)
    }

    fn functions(&self, sections: &[Section]) -> Vec<u32> {
        let mut found = BTreeSet::new();
        for table in sections.iter().filter(|section| section.kind == SHT_SYMTAB && section.link != 0) {
            let symbols = self.bytes.get(table.file.clone()).unwrap_or_default().chunks_exact(16);
            found.extend(
                symbols
                    .filter(|symbol| symbol.get(12).is_some_and(|info| info & 15 == STT_FUNC))
                    .filter_map(|symbol| word(symbol, 4)),
            );
        }
        found.into_iter().collect()
    }

    /// Where the ELF file ends, as far as its tables tell.
    fn end(&self, sections: &[Section], segments: &[Segment]) -> usize {
        let headers = [(28, 42, 44), (32, 46, 48)].into_iter().filter_map(|(offset, size, count)| {
            let size = usize::from(self.half(size)?) * usize::from(self.half(count)?);
            (self.word(offset)? as usize).checked_add(size)
        });
        let contents = sections.iter().map(|section| section.file.end);
        let loads = segments.iter().map(|segment| segment.file.end);
        headers.chain(contents).chain(loads).max().unwrap_or_default()
    }
}
