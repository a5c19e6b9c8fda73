//! Makes inputs for the fuzz targets.
//!
//! ```text
//! fuzz-seeds own DIR             generated code, a few files for each target: DIR/TARGET/... (these are committed)
//! fuzz-seeds kernel FILE DIR     code around the sensitive instructions of a kernel: DIR/TARGET/... (these are not)
//! ```

use csam::{CodeMap, CodeSize, CodeSource, GuestLin, ScanOptions};
use monitor::scan::image::Image;
use std::collections::BTreeMap;
use std::path::Path;
use subring_tests::forms;
use subring_tests::oracle::case::Case;
use subring_tests::oracle::rewrite::Rewrite;
use subring_tests::ring0_code::Random;

/// Sites of each kind of instruction that are taken from a kernel.
const OF_EACH: usize = 24;
/// Bytes of code around each.
const AROUND: usize = 112;

fn save(dir: &Path, target: &str, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let dir = dir.join(target);
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join(name), bytes)
}

/// Input of `scan` and `patch_structure` (see their `Input`): numbers from the front, the code as the rest.
fn scan_input(code: &[u8]) -> Vec<u8> {
    let mut b = 0xc100_0ff0u32.to_le_bytes().to_vec();
    b.push(0); // 32-bit
    b.extend([0; 6]); // entries
    b.extend(0x200u16.to_le_bytes()); // budget
    b.extend([1, 0, 0, 0, 0, 0, 1, 20, 0, 9]); // calls, no range, CS base, entry is a target, forget
    b.extend(code);
    b
}

fn patch_structure_input(code: &[u8], site: u8) -> Vec<u8> {
    let mut b = 0xc100_0ff0u32.to_le_bytes().to_vec();
    b.extend([0, 1, 0, 0, site, 0, site, 4]);
    b.extend(code);
    b
}

fn records(r: &mut Random, instructions: &[Vec<u8>]) -> Vec<u8> {
    let mut b = Vec::new();
    for i in instructions {
        b.push(u8::from(r.one_in(3)));
        b.extend(r.bits().to_le_bytes());
        let mut i = i.clone();
        i.resize(forms::RECORD - 9, 0);
        b.extend(i);
    }
    b
}

fn own(dir: &Path) -> std::io::Result<()> {
    let r = &mut Random(0x5eed);
    for n in 0..24 {
        let name = format!("generated-{n:02}");
        let case = Case::generate(r, n % 3 == 2);
        save(dir, "patch_semantics", &name, &case.to_bytes())?;
        save(dir, "code_write", &name, &Rewrite::generate(r, n % 3 == 2).to_bytes())?;
        let all = forms::forms(r);
        let some: Vec<Vec<u8>> = (0..12).map(|_| all[r.below(all.len() as u64) as usize].clone()).collect();
        save(dir, "interp_vs_cpu", &name, &records(r, &some))?;
    }
    Ok(())
}

fn kernel(file: &Path, dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let image = Image::read(std::fs::read(file)?, None)?;
    let mut map = CodeMap::new(CodeSize::Bits32);
    for entries in [&[image.entry][..], &image.functions, &image.relocated, &image.resumed] {
        let at: Vec<_> = entries.iter().copied().map(GuestLin).collect();
        map.scan_all(&at, &mut { &image }, &ScanOptions::default());
    }
    let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
    let r = &mut Random(u64::from(image.entry));
    let mut sites: Vec<_> = map.sites().map(|s| (s.at, s.kind.name())).collect();
    for i in (1..sites.len()).rev() {
        sites.swap(i, r.below(i as u64 + 1) as usize);
    }
    for (at, kind) in sites {
        let n = taken.entry(kind).or_default();
        if *n >= OF_EACH {
            continue;
        }
        let before = 4 + r.below(40) as u32;
        let Some(start) = (at.0.wrapping_sub(before)..=at.0).find(|a| map.is_instruction_start(GuestLin(*a)))
        else {
            continue;
        };
        let mut code = vec![0u8; AROUND];
        let got = CodeSource::fetch(&mut { &image }, GuestLin(start), &mut code);
        code.truncate(got);
        let site = (at.0 - start) as u8;
        let stem = file.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{stem}-{}-{n}", kind.replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
        let mut case = Case::generate(r, false);
        case.code.clone_from(&code);
        case.entry = if r.one_in(2) { 0 } else { site };
        save(dir, "patch_semantics", &name, &case.to_bytes())?;
        let mut rewrite = Rewrite::generate(r, false);
        rewrite.case.code.clone_from(&code);
        rewrite.case.entry = case.entry;
        for p in &mut rewrite.phases {
            p.to = 16 + u16::from(site).saturating_sub(4) + r.below(10) as u16;
        }
        save(dir, "code_write", &name, &rewrite.to_bytes())?;
        save(dir, "scan", &name, &scan_input(&code))?;
        save(dir, "patch_structure", &name, &patch_structure_input(&code, site))?;
        let instructions: Vec<Vec<u8>> = (start..start + AROUND as u32)
            .filter_map(|a| {
                let len = map.instruction_length(GuestLin(a))?;
                code.get((a - start) as usize..(a - start) as usize + usize::from(len)).map(<[u8]>::to_vec)
            })
            .take(24)
            .collect();
        save(dir, "interp_vs_cpu", &name, &records(r, &instructions))?;
        *n += 1;
    }
    println!("{}: {} inputs for each target", file.display(), taken.values().sum::<usize>());
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["own", dir] => Ok(own(Path::new(dir))?),
        ["kernel", file, dir] => kernel(Path::new(file), Path::new(dir)),
        _ => Err("usage: fuzz-seeds own DIR | fuzz-seeds kernel FILE DIR".into()),
    }
}
