//! Hostile kernel files: whatever is in them, loading ends in a state or an error, never in a panic.

use super::testram::TestRam;
use super::{BootOptions, Module, bzimage, detect, elf32, load, multiboot};
use proptest::prelude::*;

fn valid(which: usize) -> Vec<u8> {
    match which {
        0 => bzimage::tests::synthetic(),
        1 => elf32::tests::synthetic(),
        _ => multiboot::tests::synthetic(),
    }
}

/// Values that sit on the edges of what arithmetic and length checks must survive.
fn edgy() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        Just(0),
        Just(u32::MAX),
        Just(0x8000_0000),
        Just(0x7fff_ffff),
        0u32..0x4000,
        (0u32..64).prop_map(|n| u32::MAX - n),
    ]
}

fn try_to_load(file: &[u8], with_extras: bool) -> Result<(), TestCaseError> {
    let mut options = BootOptions { cmdline: "a=b".into(), ..BootOptions::default() };
    if with_extras {
        options.initrd = Some(vec![1; 4097]);
        if detect(file) == super::Kind::Multiboot {
            options.modules.push(Module { cmdline: "m".into(), data: vec![2; 3] });
        }
    }
    let size = 24 << 20;
    match load(file, &options, &mut TestRam::new(size)) {
        Ok(state) => {
            prop_assert!(state.cpu.eip < size as u32, "the entry point lies in RAM");
            prop_assert!(state.placed.iter().all(|p| p.start.0 + p.len <= size as u64));
        }
        Err(e) => prop_assert!(!e.to_string().contains('\n')),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn mutated_headers_are_loaded_or_refused(
        which in 0usize..3,
        changes in prop::collection::vec((0usize..0x140, edgy()), 1..6),
        extras: bool,
    ) {
        let mut file = valid(which);
        // The setup header of a bzImage starts at 0x1f1, the others' headers near the start.
        let base = if which == 0 { 0x1f0 } else { 0 };
        for (at, value) in changes {
            file[base + at..base + at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if which == 2 {
            // With a right checksum, so that the mutation is looked at.
            let sum = 0x1bad_b002_u32.wrapping_add(super::le32(&file, 20).unwrap()).wrapping_neg();
            file[16..20].copy_from_slice(&0x1bad_b002_u32.to_le_bytes());
            file[24..28].copy_from_slice(&sum.to_le_bytes());
        }
        try_to_load(&file, extras)?;
    }

    #[test]
    fn truncated_files_are_loaded_or_refused(which in 0usize..3, cut in 0usize..0x1_0500, extras: bool) {
        let file = valid(which);
        try_to_load(&file[..cut.min(file.len())], extras)?;
    }

    #[test]
    fn noise_is_refused_or_loaded(file in prop::collection::vec(any::<u8>(), 0..2048)) {
        try_to_load(&file, true)?;
    }
}
