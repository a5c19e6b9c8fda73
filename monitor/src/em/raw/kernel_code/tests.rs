use super::*;
use crate::machine::tests::machine;
use csam::SensitiveKind;

const AT: u32 = 0x2000;

/// A code view that has scanned this code.
fn scanned(bytes: &[u8]) -> (KernelCode, CodeMemory) {
    let mut m = machine(1);
    let code = CodeMemory::new(1 << 20).unwrap();
    let cpu = CpuState::reset();
    m.write_ram(GuestPhys(u64::from(AT)), bytes);
    let mut view = KernelCode::new(Layout::CANDIDATES[0], false, 3, None);
    view.page(&mut m, &code, GuestLin(AT), AT >> 12).unwrap();
    view.scan(&mut m, &code, &cpu, GuestLin(AT));
    (view, code)
}

#[test]
fn sites_done_with_one_that_shares_its_bytes_are_patched_again_when_that_one_traps() {
    let (view, code) = scanned(&[
        0x74, 0x08, // je 0ah
        0x8e, 0x1d, 0x00, 0x30, 0x00, 0x00, // 2: mov ds, [3000h]
        0xeb, 0x05, // jmp 0fh, and what is there is done in the same patch: it can have none of its own
        0x64, 0x8b, 0x0d, 0xd8, 0xe6, 0xe5, 0xc1, // 0ah: mov ecx, fs:[..]; 0fh: in eax, 0c1h
        0xc3, // ret
    ]);
    let kind = |offset: u32| view.map.site_at(GuestLin(AT + offset)).map(|s| s.kind);
    assert_eq!([2, 15].map(kind), [Some(SensitiveKind::MovToSreg), Some(SensitiveKind::In)]);
    assert_ne!(view.counts.conflicts, 0);
    assert_eq!(view.unguarded(), None);
    let patch = view.patm.patch_at(AT + 2).expect("a patch");
    assert!(patch.sites.iter().any(|s| s.at == GuestLin(AT + 15)), "no jump was followed");
    let shown = |offset: u32| {
        let page = view.copy_of(GuestLin(AT), AT >> 12).unwrap();
        code.read_u8(page + u64::from(offset))
    };
    assert_eq!([10, 15].map(shown), [Some(UNSCANNED); 2]);
    assert_ne!(shown(2), Some(0x8e));
}
