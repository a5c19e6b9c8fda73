//! Tests of the offline scan on files made here.

use super::*;
use proptest::prelude::*;

const TEXT: u32 = 0xc010_0000;
const DATA: u32 = 0xc020_0000;
const LOAD_OFFSET: u32 = 0xc000_0000;

struct Symbols(Vec<u32>);

/// An ELF32 file with .text and .data, mapped like Linux: the entry is the physical address of .text.
fn elf(text: &[u8], data: &[u8], functions: &Symbols) -> Vec<u8> {
    let names = b"\0.text\0.data\0.symtab\0.shstrtab\0";
    let mut symbols = vec![0; 16];
    for at in &functions.0 {
        symbols.extend([0; 4]);
        symbols.extend(at.to_le_bytes());
        symbols.extend([0, 0, 0, 0, 0x12, 0, 1, 0]);
    }
    let text_at = 52 + 32;
    let data_at = text_at + text.len();
    let symbols_at = data_at + data.len();
    let names_at = symbols_at + symbols.len();
    let sections_at = names_at + names.len();
    let mut file = vec![0x7f, b'E', b'L', b'F', 1, 1, 1];
    file.resize(16, 0);
    let halves = |file: &mut Vec<u8>, values: &[usize]| {
        values.iter().for_each(|value| file.extend((*value as u16).to_le_bytes()));
    };
    let words = |file: &mut Vec<u8>, values: &[usize]| {
        values.iter().for_each(|value| file.extend((*value as u32).to_le_bytes()));
    };
    halves(&mut file, &[2, 3]);
    words(&mut file, &[1, (TEXT - LOAD_OFFSET) as usize, 52, sections_at, 0]);
    halves(&mut file, &[52, 32, 1, 40, 5, 4]);
    words(
        &mut file,
        &[1, text_at, TEXT as usize, (TEXT - LOAD_OFFSET) as usize, text.len(), text.len(), 5, 4096],
    );
    file.extend_from_slice(text);
    file.extend_from_slice(data);
    file.extend_from_slice(&symbols);
    file.extend_from_slice(names);
    words(&mut file, &[0; 10]);
    words(&mut file, &[1, 1, 6, TEXT as usize, text_at, text.len(), 0, 0, 16, 0]);
    words(&mut file, &[7, 1, 3, DATA as usize, data_at, data.len(), 0, 0, 4, 0]);
    words(&mut file, &[13, 2, 0, 0, symbols_at, symbols.len(), 4, 1, 4, 16]);
    words(&mut file, &[21, 3, 0, 0, names_at, names.len(), 0, 0, 1, 0]);
    file
}

fn scan(file: Vec<u8>) -> Report {
    report(&Image::read(file, None).unwrap(), &[], CodeSize::Bits32)
}

fn proven(report: &Report) -> Vec<(u32, &'static str)> {
    report.sites.iter().filter(|site| site.proven).map(|site| (site.at, site.kind)).collect()
}

#[test]
fn the_entry_point_is_translated_from_physical_to_where_the_code_runs() {
    let report = scan(elf(&[0xfa, 0xc3], &[], &Symbols(vec![])));
    assert_eq!(report.entry, TEXT);
    assert_eq!(proven(&report), [(TEXT, "cli")]);
    assert_eq!(report.totals.instructions, 2);
}

#[test]
fn function_symbols_are_starting_points_and_the_rest_is_unproven() {
    // entry: ret; function: sti, ret; nobody: hlt
    let text = [0xc3, 0xfb, 0xc3, 0xf4];
    let report = scan(elf(&text, &[], &Symbols(vec![TEXT + 1])));
    assert_eq!(proven(&report), [(TEXT + 1, "sti")]);
    assert_eq!(report.totals.unproven_sites, 1);
    assert_eq!(
        report.kinds.iter().map(|kind| (kind.sites, kind.unproven)).collect::<Vec<_>>(),
        [(1, 0), (0, 1)]
    );
    assert_eq!(report.pages.len(), 1);
    assert_eq!((report.pages[0].instructions, report.pages[0].proven_bytes), (3, 3));
}

#[test]
fn relocations_behind_the_file_lead_to_functions_and_keep_guesses_away() {
    let text = [0xc3, 0xfb, 0xc3, 0xf4];
    let pointers = [(TEXT + 1).to_le_bytes(), (TEXT + 3).to_le_bytes()].concat();
    let mut file = elf(&text, &pointers, &Symbols(vec![]));
    // Only the first of the two words is an address, says the kernel.
    file.extend([0_u32, DATA].iter().flat_map(|word| word.to_le_bytes()));
    let report = scan(file);
    assert_eq!(proven(&report), [(TEXT + 1, "sti")]);
    assert!(report.passes.iter().any(|pass| pass.name == "relocations" && pass.entries == 1));
}

#[test]
fn without_relocations_words_that_look_like_code_are_tried_and_called_a_guess() {
    let report = scan(elf(&[0xc3, 0xfb, 0xc3], &(TEXT + 1).to_le_bytes(), &Symbols(vec![])));
    assert_eq!(proven(&report), [(TEXT + 1, "sti")]);
    assert!(report.passes.iter().any(|pass| pass.name.contains("guess") && pass.sites == 1));
}

#[test]
fn given_entries_are_the_only_ones() {
    let image = Image::read(elf(&[0xfa, 0xc3, 0xfb, 0xc3], &[], &Symbols(vec![TEXT])), None).unwrap();
    let report = report(&image, &[TEXT + 2], CodeSize::Bits32);
    assert_eq!(proven(&report), [(TEXT + 2, "sti")]);
    assert_eq!(report.passes.len(), 1);
    assert_eq!(report.totals.unproven_instructions, 0);
}

#[test]
fn raw_bytes_are_scanned_in_the_size_asked_for() {
    // 16-bit: mov ax, 9090h; cli. 32-bit: the cli is part of the constant.
    let image = Image::read(vec![0xb8, 0x90, 0x90, 0xfa, 0xc3, 0xc3], Some(0x7c00)).unwrap();
    assert_eq!(proven(&report(&image, &[], CodeSize::Bits16)), [(0x7c03, "cli")]);
    assert_eq!(proven(&report(&image, &[], CodeSize::Bits32)), []);
}

#[test]
fn files_that_are_no_32_bit_kernel_are_refused_with_their_reason() {
    let refused = |bytes: Vec<u8>| Image::read(bytes, None).unwrap_err();
    let good = elf(&[0xc3], &[], &Symbols(vec![]));
    let with = |at: usize, byte: u8| {
        let mut file = good.clone();
        file[at] = byte;
        file
    };
    assert!(matches!(refused(with(4, 2)), ScanError::Not32Bit));
    assert!(matches!(refused(with(18, 40)), ScanError::NotI386));
    assert!(matches!(refused(good[..good.len() - 1].to_vec()), ScanError::TruncatedElf));
    assert!(matches!(refused(good[..40].to_vec()), ScanError::TruncatedElf));
    assert!(matches!(refused(vec![]), ScanError::Unknown));
    assert!(matches!(Image::read(vec![0; 2], Some(u32::MAX)), Err(ScanError::DoesNotFit { .. })));
}

#[test]
fn both_forms_of_the_report_are_written() {
    let dir = std::env::temp_dir().join(format!("subring-scan-{}", std::process::id()));
    std::fs::write(&dir, elf(&[0xfa, 0xc3], &[], &Symbols(vec![]))).unwrap();
    let mut options = ScanOptions { file: dir.clone(), base: None, entries: vec![], bits: 32, json: true };
    let mut json = Vec::new();
    run(&options, &mut json).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(value["version"], REPORT_VERSION);
    assert_eq!(value["totals"]["sites"], 1);
    assert_eq!(value["kinds"][0]["name"], "cli");
    options.json = false;
    let mut table = Vec::new();
    run(&options, &mut table).unwrap();
    assert!(String::from_utf8(table).unwrap().contains("1 pages, 2 instructions, 1 sensitive"));
    std::fs::remove_file(dir).unwrap();
}

proptest! {
    #[test]
    fn a_damaged_elf_file_is_scanned_or_refused_and_never_worse(
        damage in prop::collection::vec((0_usize..400, any::<u8>()), 1..8),
        keep in 0_usize..400,
    ) {
        let mut file = elf(&[0xfa, 0xe8, 0, 0, 0, 0, 0xc3], &[0; 16], &Symbols(vec![TEXT, TEXT + 6]));
        file.truncate(file.len().min(keep + 100));
        for (at, byte) in damage {
            if let Some(place) = file.get_mut(at) {
                *place = byte;
            }
        }
        if let Ok(image) = Image::read(file, None) {
            let report = report(&image, &[], CodeSize::Bits32);
            prop_assert!(report.totals.sites <= report.totals.instructions);
        }
    }
}
