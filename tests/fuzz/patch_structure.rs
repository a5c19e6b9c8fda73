//! PATM on any code: what holds for every patch, while code is found and forgotten.

use arbitrary::{Arbitrary, Unstructured};
use csam::{CodeMap, CodeSize, GuestLin, ScanOptions, SliceSource};
use iced_x86::{Decoder, DecoderOptions};
use patm::{Config, Location, MapView, Patch, Patm, traps};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    base: u32,
    far: u8,
    count_inline: bool,
    entries: [u8; 4],
    undo: (u8, u8),
    bytes: &'a [u8],
}

fn check(map: &CodeMap, patm: &Patm, config: &Config) {
    let mut windows: Vec<_> =
        patm.patches().flat_map(|p| &p.writes).map(|w| (w.at.0, w.bytes.len() as u32)).collect();
    windows.sort_unstable();
    assert!(windows.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "windows and slots do not overlap");
    let mut memory: Vec<_> =
        patm.patches().filter_map(|p| p.trampoline.as_ref()).map(|t| (t.at, t.code.len() as u32)).collect();
    memory.sort_unstable();
    assert!(memory.windows(2).all(|m| m[0].0 + m[0].1 <= m[1].0), "trampolines do not overlap");
    for (at, len) in memory {
        let offset = at.wrapping_sub(config.tramp_base);
        assert!(offset <= config.tramp_len && config.tramp_len - offset >= len, "inside the region");
    }
    for patch in patm.patches() {
        assert_eq!(patch.original.len(), usize::from(patch.len));
        assert_eq!(patch.bytes().len(), usize::from(patch.len));
        check_patch(patm, patch);
        for site in &patch.sites {
            assert!(map.site_at(site.at).is_some());
            let word = patm::reason_word(site.id, patm::ReasonKind::Emulate);
            assert_eq!(patm.by_reason(word).map(|(p, s, _)| (p.id, s.at)), Some((patch.id, site.at)));
        }
    }
}

fn check_patch(patm: &Patm, patch: &Patch) {
    let Some(t) = &patch.trampoline else { return };
    let boundaries: Vec<u32> = Decoder::with_ip(32, &t.code, u64::from(t.at), DecoderOptions::NONE)
        .iter()
        .map(|i| i.ip32() - t.at)
        .collect();
    assert_eq!(patch.map.points.iter().map(|p| p.offset).collect::<Vec<_>>(), boundaries);
    for &(eip, offset) in &patch.map.starts {
        let byte = patch.bytes()[(eip - patch.start.0) as usize];
        if eip == patch.start.0 {
            assert!(matches!(byte, 0xe9 | 0xeb));
            assert_eq!(patm.resume_eip(eip), eip);
            continue;
        }
        assert!(traps(byte), "{byte:02x} at {eip:x}");
        let forward = t.at + offset;
        assert_eq!(patm.locate(eip), Location::MidWindow { id: patch.id, forward: Some(forward) });
        let Location::Trampoline { fix, .. } = patm.locate(forward) else { panic!("no boundary") };
        assert_eq!(fix, patm::Fix { resume: eip, ..patm::Fix::default() });
    }
}

/// The body of the fuzz target.
///
/// # Panics
/// When it finds something.
pub fn fuzz(bytes: &[u8]) {
    let Ok(i) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    // No wrap at 4 GiB here; a property test has that.
    let base = i.base & 0xfffe_ffff;
    // Rarely where no displacement has the bytes it needs: every search fails then, which takes time.
    let good = patm::good_bases((base >> 24) as u8).next().unwrap_or(0);
    let tramp_base = if i.far == 1 { 0x1234_5000 } else { good };
    let tramp_len = if i.far == 1 { 1 << 16 } else { 1 << 24 };
    let config = Config {
        tramp_base,
        tramp_len,
        vcpu_base: 0xffe0_0000,
        count_inline: i.count_inline,
        ring: 3,
        keys: None,
    };
    let mut patm = Patm::new(config);
    let mut map = CodeMap::new(CodeSize::Bits32);
    let fetch = |at: GuestLin, buf: &mut [u8]| {
        let rest = at.0.checked_sub(base).and_then(|o| i.bytes.get(o as usize..)).unwrap_or(&[]);
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        n
    };
    for entry in i.entries {
        let mut source = SliceSource { base: GuestLin(base), bytes: i.bytes };
        let report = map.scan(GuestLin(base + u32::from(entry)), &mut source, &ScanOptions::default());
        // What the monitor does: contradicted patches go first, then every site in order.
        for target in &report.targets {
            if patm.patch_at(target.0).is_some_and(|p| p.start != *target) {
                patm.undo_overlapping(*target, target.wrapping_add(1));
            }
        }
        for &(at, len) in &report.instructions {
            patm.undo_overlapping(at, at.wrapping_add(u32::from(len)));
        }
        let sites: Vec<_> = map.sites().map(|s| s.at).collect();
        let view = MapView { map: &map, fetch, writable: |_, _| true };
        for site in sites {
            let Ok(patch) = patm.patch(site, &view) else { continue };
            assert!(patch.sites.iter().any(|s| s.at == site));
            if let Some((lo, hi)) = patm.mergeable(site, &view) {
                assert!(lo <= site && site < hi);
                let mut again: Vec<_> =
                    patm.undo_overlapping(lo, hi).iter().flat_map(|p| p.sites.iter().map(|s| s.at)).collect();
                again.sort_unstable();
                assert!(again.contains(&site));
                for site in again {
                    let _ = patm.patch(site, &view);
                }
            }
        }
        check(&map, &patm, &config);
    }
    let (lo, hi) = (base + u32::from(i.undo.0), base + u32::from(i.undo.0) + u32::from(i.undo.1));
    patm.undo_overlapping(GuestLin(lo), GuestLin(hi));
    check(&map, &patm, &config);
    patm.undo_overlapping(GuestLin(0), GuestLin(u32::MAX));
    assert_eq!(patm.patches().count(), 0);
    assert_eq!(patm.stats().trampoline_bytes, 0);
}
