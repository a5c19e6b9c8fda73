//! Names for guest addresses: a System.map, or the symbol table of an ELF32 file.

use std::path::Path;

/// Sorted symbols of a kernel, with where KASLR moved it.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    /// Address and name, by address.
    sorted: Vec<(u32, String)>,
    /// Added to a symbol's address to yield the run-time address.
    slide: u32,
}

/// Beyond this distance from the last symbol an address is not that symbol's: it is no kernel text.
const MAX_DISTANCE: u32 = 1 << 20;

/// The page-fault entry point of Linux: since 5.8 / before.
const PAGE_FAULT_HANDLERS: [&str; 2] = ["asm_exc_page_fault", "page_fault"];

impl Symbols {
    /// Reads a System.map or an ELF32 file. The error is the line to show.
    pub fn load(path: &Path) -> Result<Symbols, String> {
        let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let parsed = if bytes.starts_with(b"\x7fELF") { from_elf(&bytes) } else { from_map(&bytes) };
        let mut sorted = parsed.map_err(|why| format!("{}: {why}", path.display()))?;
        sorted.sort();
        sorted.dedup_by_key(|(address, _)| *address);
        Ok(Symbols { sorted, slide: 0 })
    }

    /// Accounts for KASLR, given the address of the guest's handler of vector 14.
    pub fn locate(&mut self, page_fault_handler: u32) {
        let entry = PAGE_FAULT_HANDLERS
            .iter()
            .find_map(|wanted| self.sorted.iter().find(|(_, name)| name == wanted))
            .map(|(address, _)| *address);
        if let Some(address) = entry {
            let slide = page_fault_handler.wrapping_sub(address);
            // Kernels move by whole pages; another value means the handler is not that symbol.
            if slide & 0xfff == 0 {
                self.slide = slide;
            }
        }
    }

    /// `name+0x12`, or None.
    #[must_use]
    pub fn name(&self, address: u32) -> Option<String> {
        let address = address.wrapping_sub(self.slide);
        let after = self.sorted.partition_point(|(start, _)| *start <= address);
        let (start, name) = self.sorted.get(after.checked_sub(1)?)?;
        match address - start {
            0 => Some(name.clone()),
            distance if distance < MAX_DISTANCE => Some(format!("{name}+{distance:#x}")),
            _ => None,
        }
    }

    /// How many symbols there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// No symbols.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }
}

/// `c1000000 T startup_32` lines. Absolute and undefined symbols name no code.
fn from_map(bytes: &[u8]) -> Result<Vec<(u32, String)>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "neither a System.map nor an ELF file".to_owned())?;
    let symbols: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = u32::from_str_radix(words.next()?, 16).ok()?;
            let class = words.next()?;
            let name = words.next()?;
            (class.len() == 1 && !"AaU".contains(class)).then(|| (address, name.to_owned()))
        })
        .collect();
    if symbols.is_empty() { Err("no symbols in it".into()) } else { Ok(symbols) }
}

/// The .symtab of an ELF32 little-endian file (System V ABI, "Symbol Table").
fn from_elf(bytes: &[u8]) -> Result<Vec<(u32, String)>, String> {
    const SHT_SYMTAB: u32 = 2;
    const SHN_ABS: u16 = 0xfff1;
    let u16_at = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?));
    if bytes.get(4) != Some(&1) || bytes.get(5) != Some(&1) {
        return Err("not a 32-bit little-endian ELF file".into());
    }
    let walk = || -> Option<Vec<(u32, String)>> {
        let section_headers = u32_at(0x20)? as usize;
        let entry_size = usize::from(u16_at(0x2e)?);
        let count = usize::from(u16_at(0x30)?);
        let header = |index: usize| section_headers.checked_add(index.checked_mul(entry_size)?);
        let range = |at: usize| -> Option<&[u8]> {
            let offset = u32_at(at.checked_add(0x10)?)? as usize;
            let size = u32_at(at.checked_add(0x14)?)? as usize;
            bytes.get(offset..offset.checked_add(size)?)
        };
        let symtab = (0..count).filter_map(header).find(|at| u32_at(at + 4) == Some(SHT_SYMTAB))?;
        let names = range(header(u32_at(symtab.checked_add(0x18)?)? as usize)?)?;
        let symbols = range(symtab)?
            .chunks_exact(16)
            .filter_map(|entry| {
                let name = u32::from_le_bytes(entry[..4].try_into().ok()?) as usize;
                let value = u32::from_le_bytes(entry[4..8].try_into().ok()?);
                let kind = entry[12] & 0xf;
                let section = u16::from_le_bytes(entry[14..16].try_into().ok()?);
                // NOTYPE and FUNC name code (assembly entry points have no type); objects, sections, files do not.
                if !matches!(kind, 0 | 2) || section == 0 || section == SHN_ABS {
                    return None;
                }
                let rest = names.get(name..)?;
                let text = std::str::from_utf8(rest.get(..rest.iter().position(|b| *b == 0)?)?).ok()?;
                (!text.is_empty()).then(|| (value, text.to_owned()))
            })
            .collect();
        Some(symbols)
    };
    match walk() {
        Some(symbols) if !symbols.is_empty() => Ok(symbols),
        _ => Err("no symbol table in it (a stripped kernel?)".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols(text: &str) -> Symbols {
        Symbols { sorted: from_map(text.as_bytes()).unwrap(), slide: 0 }
    }

    const MAP: &str =
        "00000001 A absolute\nc1000000 T startup_32\nc1000100 t helper\nc1800000 T asm_exc_page_fault\n";

    #[test]
    fn an_address_is_named_by_the_symbol_before_it() {
        let symbols = symbols(MAP);
        assert_eq!(symbols.name(0xc100_0000).as_deref(), Some("startup_32"));
        assert_eq!(symbols.name(0xc100_0123).as_deref(), Some("helper+0x23"));
        assert_eq!(symbols.name(0xc0ff_ffff), None);
        assert_eq!(symbols.name(0xf000_0000), None);
        assert_eq!(symbols.name(1), None);
    }

    #[test]
    fn kaslr_is_seen_from_the_page_fault_gate() {
        let mut symbols = symbols(MAP);
        symbols.locate(0xc1800000 + 0x0500_0000);
        assert_eq!(symbols.name(0xc600_0000).as_deref(), Some("startup_32"));
        // A handler that is not the symbol changes nothing.
        symbols.locate(0xc180_0123);
        assert_eq!(symbols.name(0xc600_0000).as_deref(), Some("startup_32"));
    }

    #[test]
    fn broken_elf_files_are_refused_without_a_panic() {
        let mut elf = b"\x7fELF\x01\x01".to_vec();
        elf.resize(52, 0xff);
        for length in 4..elf.len() {
            assert!(from_elf(&elf[..length]).is_err());
        }
        assert!(from_elf(&elf).is_err());
        assert!(from_map(b"\xff\xfe").is_err());
        assert!(from_map(b"hello world\n").is_err());
    }
}
