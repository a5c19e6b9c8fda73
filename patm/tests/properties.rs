//! What holds for every patch of any code.

mod common;
use common::{BASE, Scanned, config};
use csam::GuestLin;
use iced_x86::{Decoder, DecoderOptions};
use patm::{Location, Patch, Patm, Tactic, traps};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Bytes that look like kernel code often enough: sensitive and short instructions are frequent.
fn code() -> impl Strategy<Value = Vec<u8>> {
    let likely: &[u8] = &[
        0xfa, 0xfb, 0x9c, 0x9d, 0x1e, 0x1f, 0x0e, 0x90, 0x50, 0x58, 0x31, 0xc0, 0x89, 0xc3, 0x74, 0x75, 0x01,
        0x02, 0x8e, 0x8c, 0xd8, 0x0f, 0x20, 0x22, 0xe8, 0xeb, 0xcf, 0xf4, 0xcc, 0xec, 0x00, 0x83, 0xe3, 0xff,
        0x2e, 0x66,
    ];
    let byte = prop_oneof![4 => prop::sample::select(likely), 1 => any::<u8>()];
    prop::collection::vec(byte, 1..200)
}

fn patched(bytes: &[u8]) -> (Scanned, Patm) {
    let scanned = Scanned::new(bytes);
    let mut patm = Patm::new(config());
    scanned.patch_all(&mut patm);
    (scanned, patm)
}

/// Where the instructions of the trampoline start, by decoding it.
fn boundaries(patch: &Patch) -> Vec<u32> {
    let Some(t) = &patch.trampoline else { return Vec::new() };
    Decoder::with_ip(32, &t.code, u64::from(t.at), DecoderOptions::NONE)
        .iter()
        .map(|i| i.ip32() - t.at)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn every_site_is_in_exactly_one_window(bytes in code()) {
        let (scanned, patm) = patched(&bytes);
        for site in scanned.map.sites() {
            let here = |p: &&Patch| site.at >= p.start && site.at < p.end();
            let holders =
                patm.patches().filter(here).filter(|p| p.sites.iter().any(|s| s.at == site.at)).count();
            let patch = patm.patch_at(site.at.0);
            // Only overlapping code can leave a site out: its bytes are another window's.
            prop_assert!(holders == 1 || holders == 0 && patch.is_some_and(|p| p.start != site.at));
        }
        let mut end = 0;
        let mut windows: Vec<_> = patm.patches().flat_map(|p| &p.writes).map(|w| (w.at.0, w.bytes.len())).collect();
        windows.sort_unstable();
        for (at, len) in windows {
            prop_assert!(at >= end, "windows and slots do not overlap");
            end = at + len as u32;
        }
    }

    #[test]
    fn what_a_stray_branch_into_a_window_meets_traps_and_is_forwarded(bytes in code()) {
        let (scanned, patm) = patched(&bytes);
        for patch in patm.patches().filter(|p| p.trampoline.is_some()) {
            for &(eip, offset) in &patch.map.starts {
                let byte = patch.bytes()[(eip - patch.start.0) as usize];
                if eip == patch.start.0 {
                    prop_assert!(matches!(byte, 0xe9 | 0xeb));
                    prop_assert_eq!(patm.resume_eip(eip), eip);
                    continue;
                }
                prop_assert!(traps(byte), "{:02x} at {:x}", byte, eip);
                let forward = patch.trampoline.as_ref().unwrap().at + offset;
                prop_assert_eq!(patm.locate(eip), Location::MidWindow { id: patch.id, forward: Some(forward) });
                prop_assert_eq!(patm.resume_eip(eip), forward);
                let Location::Trampoline { fix, .. } = patm.locate(forward) else { panic!("no boundary") };
                prop_assert_eq!(fix, patm::Fix { resume: eip, ..patm::Fix::default() }, "there and back again");
            }
            // Targets known now are only inside when their branch is in the window too, or when they are sites, which
            // would trap anyway.
            if patch.tactic != Tactic::JccWindow {
                for eip in patch.start.0 + 1..patch.end().0 {
                    let site = patch.sites.iter().any(|s| s.at.0 == eip);
                    prop_assert!(site || !scanned.map.is_target(GuestLin(eip)));
                }
            }
        }
    }

    #[test]
    fn the_eip_map_knows_every_boundary_of_a_trampoline_and_only_those(bytes in code()) {
        let (_, patm) = patched(&bytes);
        for patch in patm.patches() {
            let points: Vec<u32> = patch.map.points.iter().map(|p| p.offset).collect();
            prop_assert_eq!(&points, &boundaries(patch));
            let ends: Vec<u32> = patch.sites.iter().map(|s| s.next().0).collect();
            for point in &patch.map.points {
                let parked = point.fix.restore.iter().any(|r| r == 4);
                prop_assert!(!parked || patch.sites.iter().any(|s| s.kind == csam::SensitiveKind::Iret));
                let goes_on = point.fix.to_target || ends.contains(&point.fix.resume);
                prop_assert!(!point.fix.committed || goes_on);
            }
        }
    }

    #[test]
    fn trampolines_do_not_overlap_and_stay_in_their_region(bytes in code()) {
        let (_, patm) = patched(&bytes);
        let mut end = config().tramp_base;
        let all: BTreeMap<_, _> =
            patm.patches().filter_map(|p| p.trampoline.as_ref()).map(|t| (t.at, t.code.len() as u32)).collect();
        for (at, len) in all {
            prop_assert!(at >= end);
            end = at + len;
            for page in (at >> 12)..=((end - 1) >> 12) {
                prop_assert!(patm.trampoline_pages().contains(&(page << 12)));
            }
        }
        prop_assert!(end - config().tramp_base <= config().tramp_len);
    }

    #[test]
    fn undo_gives_everything_back(bytes in code(), lo in 0u32..200, len in 1u32..40) {
        let (scanned, mut patm) = patched(&bytes);
        let (lo, hi) = (GuestLin(BASE + lo), GuestLin(BASE + lo + len));
        let touches = |p: &Patch| {
            p.writes.iter().any(|w| w.at < hi && w.at.0 + w.bytes.len() as u32 > lo.0)
                || p.sites.iter().any(|s| s.at < hi && s.next() > lo)
        };
        let expected: Vec<_> = patm.patches().filter(|p| touches(p)).map(|p| p.id).collect();
        let undone = patm.undo_overlapping(lo, hi);
        prop_assert_eq!(undone.iter().map(|p| p.id).collect::<Vec<_>>(), expected);
        for patch in &undone {
            let start = (patch.start.0 - BASE) as usize;
            for (i, &byte) in patch.original.iter().enumerate() {
                let proven = scanned.map.proven(GuestLin(patch.start.0 + i as u32));
                prop_assert_eq!(byte, if proven { scanned.bytes[start + i] } else { 0xf4 });
            }
            prop_assert_eq!(patch.original.len(), usize::from(patch.len));
            prop_assert_eq!(patm.locate(patch.start.0), Location::Guest);
        }
        let rest: Vec<_> = patm.patches().map(|p| p.id).collect();
        for id in rest {
            prop_assert!(patm.undo(id).is_some());
        }
        let stats = patm.stats();
        prop_assert_eq!(stats.trampoline_bytes, 0);
        prop_assert!(stats.sites.values().chain(stats.tactics.values()).all(|&n| n == 0));
    }

    #[test]
    fn any_bytes_at_any_address_can_be_asked_about(
        bytes in prop::collection::vec(any::<u8>(), 0..64), base: u32, tramp_base: u32, tramp_len: u32, eips: [u32; 8],
    ) {
        use csam::{CodeMap, CodeSize, ScanOptions, SliceSource};
        for base in [base, 0u32.wrapping_sub(bytes.len() as u32), 0] {
            let mut map = CodeMap::new(CodeSize::Bits32);
            let mut source = SliceSource { base: GuestLin(base), bytes: &bytes };
            map.scan(GuestLin(base), &mut source, &ScanOptions::default());
            let fetch = |at: GuestLin, buf: &mut [u8]| {
                let rest = at.0.checked_sub(base).and_then(|o| bytes.get(o as usize..)).unwrap_or(&[]);
                let n = rest.len().min(buf.len());
                buf[..n].copy_from_slice(&rest[..n]);
                n
            };
            let view = patm::MapView { map: &map, fetch, writable: |_, _| true };
            let mut patm = Patm::new(patm::Config { tramp_base, tramp_len, ..config() });
            for i in 0..bytes.len() as u32 {
                let _ = patm.patch(GuestLin(base.wrapping_add(i)), &view);
            }
            for eip in eips {
                let _ = (patm.locate(eip), patm.resume_eip(eip), patm.by_reason(eip), patm.is_after_sti(eip));
            }
            let _ = patm.undo_overlapping(GuestLin(eips[0]), GuestLin(eips[1]));
        }
    }
}

#[test]
fn freed_trampoline_memory_is_used_again() {
    let scanned = Scanned::new(&[0x0f, 0x20, 0xc0, 0x89, 0xc1, 0xc3]);
    let mut patm = Patm::new(config());
    let first = scanned.patch_one(&mut patm, BASE).unwrap();
    patm.undo(first.id).unwrap();
    let second = scanned.patch_one(&mut patm, BASE).unwrap();
    assert_eq!(first.trampoline, second.trampoline);
    assert_ne!(first.id, second.id);
}
