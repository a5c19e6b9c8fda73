//! CSAM on any bytes, from any entries, with any options; then spans are forgotten and scanned again.

use arbitrary::{Arbitrary, Unstructured};
use csam::{CodeMap, CodeSize, GuestLin, ScanOptions, SliceSource};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    base: u32,
    bits16: bool,
    entries: [u16; 3],
    budget: u16,
    follow_calls: bool,
    range: Option<(u16, u16)>,
    cs_base: u32,
    entry_is_target: bool,
    forget: (u16, u8),
    bytes: &'a [u8],
}

/// The body of the fuzz target.
///
/// # Panics
/// When it finds something.
pub fn fuzz(bytes: &[u8]) {
    let Ok(i) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let at = |offset: u16| GuestLin(i.base.wrapping_add(u32::from(offset)));
    let mut map = CodeMap::new(if i.bits16 { CodeSize::Bits16 } else { CodeSize::Bits32 });
    let options = ScanOptions {
        budget: usize::from(i.budget),
        follow_calls: i.follow_calls,
        range: i.range.map(|(lo, hi)| at(lo)..at(hi)),
        cs_base: i.cs_base,
        entry_is_target: i.entry_is_target,
    };
    let mut source = SliceSource { base: GuestLin(i.base), bytes: i.bytes };
    for entry in i.entries {
        let report = map.scan(at(entry), &mut source, &options);
        assert!(report.instructions.len() <= options.budget);
        for (start, len) in &report.instructions {
            assert!((1..=15).contains(len));
            assert_eq!(map.instruction_length(*start), Some(*len));
            assert!((0..u32::from(*len)).all(|n| map.proven(start.wrapping_add(n))));
            assert!(options.range.as_ref().is_none_or(|r| r.contains(start)));
        }
        for site in &report.sites {
            assert!(map.is_instruction_start(site.at) && map.site_at(site.at) == Some(site));
        }
        for target in &report.targets {
            assert!(map.is_target(*target));
        }
    }
    let known = map.instruction_count();
    assert_eq!(known, map.pages().flat_map(|(n, _)| starts(&map, n)).count());
    let (lo, hi) = (at(i.forget.0), at(i.forget.0).wrapping_add(u32::from(i.forget.1)));
    if lo < hi {
        let mut expected: Vec<_> = map.overlapping(lo, hi).iter().map(|(a, _)| *a).collect();
        let instructions = expected.len();
        // An undecodable address comes back too when the change may have made an instruction of it.
        let near = |a: &GuestLin| a.0 < hi.0 && a.0.saturating_add(14) >= lo.0;
        expected.extend(map.undecodable().filter(near));
        expected.sort_unstable();
        assert_eq!(map.forget_span(lo, hi), expected);
        assert!(map.overlapping(lo, hi).is_empty());
        assert_eq!(map.instruction_count(), known - instructions);
    }
}

fn starts(map: &CodeMap, page: u32) -> Vec<GuestLin> {
    (0..0x1000).map(|n| GuestLin(page << 12 | n)).filter(|a| map.is_instruction_start(*a)).collect()
}
