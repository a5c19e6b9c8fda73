use super::*;
use crate::machine::tests::machine;
use csam::SensitiveKind;

const AT: u32 = 0x2000;

/// A code view that has scanned this code.
fn scanned(bytes: &[u8]) -> (KernelCode, CodeMemory) {
    scanned_with(bytes, Layout::CANDIDATES[0])
}

fn scanned_with(bytes: &[u8], layout: Layout) -> (KernelCode, CodeMemory) {
    let mut m = machine(1);
    let code = CodeMemory::new(1 << 20).unwrap();
    let cpu = CpuState::reset();
    m.write_ram(GuestPhys(u64::from(AT)), bytes);
    let mut view = KernelCode::new(layout, false, 3);
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

#[test]
fn the_kernels_own_instructions_that_load_pkru_are_not_shown_to_rings_that_share_its_world() {
    let bytes = [
        0x90, // nop
        0x0f, 0xae, 0x2f, // 1: xrstor [edi]
        0xb8, 0x0f, 0x01, 0xef, 0x00, // 4: mov eax, 00ef010fh
        0x9c, 0x90, 0x90, 0x90, 0x90, // 9: pushf, and room for a jump
        0x04, 0x0f, // 0eh: add al, 0fh
        0x01, 0xef, // 10h: add edi, ebp
        0xc3, // ret
    ];
    let (mut view, code) = scanned_with(&bytes, Layout::CANDIDATES[0].keyed(0));
    let shown = |view: &KernelCode| {
        let mut page = [0u8; 4096];
        code.read(view.copy_of(GuestLin(AT), AT >> 12).unwrap(), &mut page).unwrap();
        page
    };
    assert_eq!(shown(&view)[1..4], bytes[1..4]);
    view.hide_pkru_loaders(&code);
    let page = shown(&view);
    assert_eq!(loader_in(&page, |_| false), None);
    // The instructions whose bytes they are trap where they start; the others are as they were.
    assert_eq!([0, 1, 4, 0x0e, 0x12].map(|at| page[at]), [0x90, UNSCANNED, UNSCANNED, UNSCANNED, 0xc3]);
    assert_eq!(view.unguarded(), None);
    // A second look changes nothing.
    view.hide_pkru_loaders(&code);
    assert_eq!(shown(&view), page);
}
