//! Which windows are chosen for known code.

mod common;
use common::{BASE, Scanned, config};
use patm::{CodeWrite, Location, Patm, Refusal, Route, Tactic};

fn scanned_view(scanned: &Scanned) -> impl patm::CodeInfo + '_ {
    patm::MapView {
        map: &scanned.map,
        fetch: |at, buf: &mut [u8]| scanned.fetch(at, buf),
        writable: |_, _| true,
    }
}

fn patch(code: &[u8], offset: u32) -> (Patm, patm::Patch) {
    let mut patm = Patm::new(config());
    let patch = Scanned::new(code).patch_one(&mut patm, BASE + offset).unwrap();
    (patm, patch)
}

#[test]
fn a_site_of_five_bytes_gets_a_jump_of_its_own() {
    // mov [esp+40h], ds needs 4 bytes, with a disp32 7; ret
    let (patm, patch) = patch(&[0x8c, 0x9c, 0x24, 0x40, 0, 0, 0, 0xc3], 0);
    assert_eq!((patch.tactic, patch.len), (Tactic::Jump5, 7));
    assert_eq!(patch.bytes()[0], 0xe9);
    assert_eq!(patch.bytes()[5..], [0xf4, 0xf4]);
    assert_eq!(patm.locate(BASE), Location::PatchStart(patch.id));
}

#[test]
fn displacement_bytes_trap_where_displaced_instructions_start() {
    // cli; push ebx; push esi; push edi; push ebp; ret
    let (_, patch) = patch(&[0xfa, 0x53, 0x56, 0x57, 0x55, 0xc3], 0);
    assert_eq!((patch.tactic, patch.len), (Tactic::Pun, 5));
    assert!(patch.bytes()[1..5].iter().all(|&b| patm::traps(b)), "{:02x?}", patch.bytes());
}

#[test]
fn several_sites_share_a_window() {
    // pushf; pop eax; cli; mov ebx, eax; ret
    let (patm, patch) = patch(&[0x9c, 0x58, 0xfa, 0x89, 0xc3, 0xc3], 0);
    assert_eq!(patch.sites.len(), 2);
    assert!(patch.sites.iter().all(|s| s.route == Route::InLine));
    for site in &patch.sites {
        let reason = patm::reason_word(site.id, patm::ReasonKind::Emulate);
        assert_eq!(patm.by_reason(reason).unwrap().1, site);
    }
}

#[test]
fn the_window_starts_before_a_site_that_ends_the_flow() {
    // pop eax; pop ecx; add esp, 4; iretd
    let (_, patch) = patch(&[0x58, 0x59, 0x83, 0xc4, 0x04, 0xcf], 5);
    assert_eq!((patch.start.0, patch.len), (BASE + 1, 5));
    assert_eq!(patch.sites[0].route, Route::InLine);
}

/// pushfd; push cs; push imm32; iretd: Linux's sync_core.
const SYNC_CORE: [u8; 8] = [0x9c, 0x0e, 0x68, 8, 1, 0, 0xc1, 0xcf];

#[test]
fn a_window_grows_over_a_site_that_has_no_room_of_its_own() {
    let (patm, patch) = patch(&SYNC_CORE, 0);
    assert_eq!((patch.start.0, patch.len, patch.sites.len()), (BASE, 8, 3));
    assert!(patch.sites.iter().all(|s| s.route == Route::InLine));
    assert_eq!(patm.mergeable(csam::GuestLin(BASE + 7), &scanned_view(&Scanned::new(&SYNC_CORE))), None);
}

#[test]
fn a_window_does_not_grow_over_a_branch_target_that_is_no_site() {
    // pushfd; push cs; push imm32; 1: nop; iretd, entered at the nop too
    let code = [0x9c, 0x0e, 0x68, 8, 1, 0, 0xc1, 0x90, 0xcf];
    let mut scanned = Scanned::new(&code);
    scanned.scan_from(BASE + 7);
    let mut patm = Patm::new(config());
    assert_eq!(scanned.patch_one(&mut patm, BASE).unwrap().len, 7);
    assert_eq!(scanned.patch_one(&mut patm, BASE + 8).unwrap().tactic, Tactic::TrapByte);
    assert_eq!(patm.mergeable(csam::GuestLin(BASE + 8), &scanned_view(&scanned)), None);
}

#[test]
fn a_site_found_behind_a_live_window_can_be_merged_with_it() {
    let mut patm = Patm::new(config());
    // The scan that made the first patch had not seen the last byte.
    assert_eq!(Scanned::new(&SYNC_CORE[..7]).patch_one(&mut patm, BASE).unwrap().len, 7);
    let scanned = Scanned::new(&SYNC_CORE);
    assert_eq!(scanned.patch_one(&mut patm, BASE + 7).unwrap().tactic, Tactic::TrapByte);
    let (lo, hi) = patm.mergeable(csam::GuestLin(BASE + 7), &scanned_view(&scanned)).unwrap();
    assert_eq!((lo.0, hi.0), (BASE, BASE + 8));
    assert_eq!(patm.undo_overlapping(lo, hi).len(), 2);
    assert_eq!(scanned.patch_one(&mut patm, BASE).unwrap().sites.len(), 3);
}

#[test]
fn a_window_does_not_cross_an_unconditional_jump() {
    // cli; ret; then code reached by nobody here
    let (_, patch) = patch(&[0xfa, 0xc3, 0x90, 0x31, 0xc0, 0x31, 0xc9], 0);
    assert_eq!(patch.tactic, Tactic::TrapByte);
    assert_eq!(patch.why, Some(Refusal::EndOfFlow));
    assert_eq!(patch.bytes(), [0xf4]);
}

#[test]
fn the_jump_covers_filler_behind_the_end_of_the_flow() {
    // cli; ret; int3 * 8
    let (patm, patch) = patch(&[0xfa, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc], 0);
    assert_eq!((patch.tactic, patch.len), (Tactic::Pun, 5));
    assert!(patm::traps(patch.bytes()[1]), "the ret starts there");
    assert_eq!(patch.original, [0xfa, 0xc3, 0xf4, 0xf4, 0xf4], "filler is not proven code");
    assert_eq!(patm.contradicts(csam::GuestLin(BASE + 3)), Some(patch.id));
    assert_eq!(patm.contradicts(csam::GuestLin(BASE + 1)), None);
}

/// call 2f; mov eax, cr0; 1: inc ecx; jne 1b; ret; 2: jmp 1b
const NO_ROOM: [u8; 14] = [0xe8, 7, 0, 0, 0, 0x0f, 0x20, 0xc0, 0x41, 0x75, 0xfd, 0xc3, 0xeb, 0xfa];

#[test]
fn a_short_jump_uses_filler_behind_the_ret() {
    // lea esi, [esi + 0], 7 bytes
    let (patm, patch) = patch(&[NO_ROOM.as_slice(), &[0x8d, 0xb4, 0x26, 0, 0, 0, 0]].concat(), 5);
    assert_eq!((patch.tactic, patch.len), (Tactic::ShortJump, 3));
    let slot = patch.writes[1].at.0;
    assert_eq!(patch.bytes()[0], 0xeb);
    assert_eq!(u32::from(patch.bytes()[1]), slot - (BASE + 5 + 2));
    assert_eq!(patm.locate(slot), Location::PatchStart(patch.id));
    assert_eq!(patm.contradicts(csam::GuestLin(slot)), Some(patch.id));
    assert!(!patm.is_free(slot - 1, 2) && patm.is_free(slot - 1, 1));
}

#[test]
fn filler_that_holds_a_short_jumps_slot_traps_where_its_instructions_start() {
    // lea esi, [esi + 0], 4 bytes; nop; nop
    let (_, patch) = patch(&[NO_ROOM.as_slice(), &[0x8d, 0x74, 0x26, 0, 0x90, 0x90]].concat(), 5);
    assert_eq!(patch.tactic, Tactic::ShortJump);
    let CodeWrite { at, bytes } = &patch.writes[1];
    assert_eq!(at.0, BASE + 15, "the first byte of the lea stays");
    assert!(patm::traps(bytes[3]) && patm::traps(bytes[4]), "{bytes:02x?}");
    let (_, patch) = self::patch(&[NO_ROOM.as_slice(), &[0x90; 8]].concat(), 5);
    assert_eq!(patch.tactic, Tactic::TrapByte, "an instruction starts at each byte");
}

#[test]
fn a_window_may_start_at_the_jump_over_the_site() {
    // test eax, eax; je 1f; sti; 1: mov eax, ecx; ret
    let (patm, patch) = patch(&[0x85, 0xc0, 0x74, 0x01, 0xfb, 0x89, 0xc8, 0xc3], 4);
    assert_eq!(patch.tactic, Tactic::JccWindow);
    assert_eq!((patch.start.0, patch.len), (BASE + 2, 5));
    let inner = BASE + 5;
    assert_eq!(
        patm.locate(inner),
        Location::MidWindow { id: patch.id, forward: Some(patm.resume_eip(inner)) }
    );
}

#[test]
fn a_window_never_swallows_a_target_of_a_branch_outside() {
    // xor eax, eax; cli; 2: xor ecx, ecx; xor edx, edx; jne 2b; ret
    let (_, patch) = patch(&[0x31, 0xc0, 0xfa, 0x31, 0xc9, 0x31, 0xd2, 0x75, 0xfa, 0xc3], 2);
    assert_eq!((patch.tactic, patch.why), (Tactic::TrapByte, Some(Refusal::BranchTarget)));
}

#[test]
fn int3_is_left_alone_and_other_code_refused() {
    let scanned = Scanned::new(&[0x90, 0xcc, 0xc3]);
    let mut patm = Patm::new(config());
    assert_eq!(scanned.patch_one(&mut patm, BASE + 1), Err(Refusal::TrapsItself));
    assert_eq!(scanned.patch_one(&mut patm, BASE), Err(Refusal::NotSensitive));
    assert_eq!(scanned.patch_one(&mut patm, BASE + 9), Err(Refusal::NotCode));
}

#[test]
fn a_displaced_call_pushes_the_guests_return_address() {
    // cli; call +0 ; the window ends with the call
    let (_, patch) = patch(&[0xfa, 0xe8, 0x01, 0, 0, 0, 0xc3, 0xc3], 0);
    let code = &patch.trampoline.as_ref().unwrap().code;
    let push = [[0x68].as_slice(), &(BASE + 6).to_le_bytes()].concat();
    assert!(code.windows(5).any(|w| w == push));
    assert_eq!(patch.len, 6);
}

#[test]
fn an_interrupt_waits_behind_sti() {
    let (patm, _) = patch(&[0xfb, 0xf4, 0x31, 0xc0, 0x31, 0xc9, 0xc3], 0);
    assert!(patm.is_after_sti(BASE + 1));
    assert!(!patm.is_after_sti(BASE + 2));
}

#[test]
fn an_interrupt_waits_behind_a_load_of_ss_too() {
    // mov ss, eax; pop ss; mov ds, eax; lss esp, [esp]; nop
    let code = [0x8e, 0xd0, 0x17, 0x8e, 0xd8, 0x0f, 0xb2, 0x24, 0x24, 0x90, 0x90, 0x90, 0x90, 0xc3];
    let scanned = Scanned::new(&code);
    let mut patm = Patm::new(config());
    scanned.patch_all(&mut patm);
    let after: Vec<u32> = (0..code.len() as u32).filter(|&o| patm.is_after_sti(BASE + o)).collect();
    assert_eq!(after, [2, 3], "behind mov ss and pop ss, not behind lss");
}

#[test]
fn hot_instructions_complete_in_line_and_the_rest_leaves_by_the_gate() {
    let table: &[(&[u8], Route)] = &[
        (&[0xfa], Route::InLine),                           // cli
        (&[0xfb], Route::InLine),                           // sti
        (&[0x9c], Route::InLine),                           // pushfd
        (&[0x9d], Route::InLine),                           // popfd
        (&[0x66, 0x9c], Route::Gate),                       // pushf
        (&[0x66, 0x9d], Route::Gate),                       // popf
        (&[0x0e], Route::InLine),                           // push cs
        (&[0x0f, 0xa0], Route::InLine),                     // push fs
        (&[0x66, 0x1e], Route::Gate),                       // 16-bit push ds
        (&[0x1f], Route::InLine),                           // pop ds
        (&[0x0f, 0xa9], Route::InLine),                     // pop gs
        (&[0x17], Route::InLine),                           // pop ss
        (&[0x66, 0x1f], Route::Gate),                       // 16-bit pop ds
        (&[0x8c, 0xc8], Route::InLine),                     // mov eax, cs
        (&[0x8c, 0x1b], Route::InLine),                     // mov [ebx], ds
        (&[0x8e, 0xe0], Route::InLine),                     // mov fs, eax
        (&[0x8e, 0xd0], Route::InLine),                     // mov ss, eax
        (&[0x0f, 0xb2, 0x24, 0x24], Route::InLine),         // lss esp, [esp]
        (&[0xc5, 0x20], Route::Gate),                       // lds esp, [eax]
        (&[0x66, 0xc4, 0x00], Route::Gate),                 // les ax, [eax]
        (&[0x0f, 0x01, 0x00], Route::InLine),               // sgdt [eax]
        (&[0x66, 0x0f, 0x01, 0x00], Route::Gate),           // sgdt [eax] of 24 bits
        (&[0x2e, 0x0f, 0x01, 0x08], Route::Gate),           // sidt cs:[eax], which faults
        (&[0x0f, 0x00, 0xc8], Route::InLine),               // str eax
        (&[0x0f, 0x01, 0xe4], Route::Gate),                 // smsw esp
        (&[0x0f, 0x02, 0xc1], Route::InLine),               // lar eax, ecx
        (&[0x66, 0x0f, 0x03, 0xc1], Route::Gate),           // lsl ax, cx
        (&[0x0f, 0x09], Route::InLine),                     // wbinvd
        (&[0xea, 0, 1, 0, 0xc1, 0x60, 0], Route::InLine),   // jmp 60h:0c1000100h
        (&[0xff, 0x58, 0x10, 0x90, 0x90], Route::TrapByte), // call far [eax+10h]: nothing behind it may be displaced
        (&[0xff, 0x1d, 0, 0, 0, 0], Route::InLine),         // call far [0]
        (&[0xcb, 0x90, 0x90, 0x90, 0x90], Route::InLine),   // retf, with filler behind it
        (&[0x8e, 0x5d, 0x08], Route::InLine),               // mov ds, [ebp+8]
        (&[0x0f, 0x20, 0xd0], Route::InLine),               // mov eax, cr2
        (&[0x0f, 0x22, 0xd8], Route::Gate),                 // mov cr3, eax
        (&[0x2e, 0x8b, 0x03], Route::InLine),               // mov eax, cs:[ebx]
        (&[0x2e, 0x89, 0x03], Route::Gate),                 // mov cs:[ebx], eax
        (&[0x0f, 0x01, 0x38], Route::Gate),                 // invlpg [eax]
        (&[0x0f, 0x06], Route::InLine),                     // clts
        (&[0x0f, 0x00, 0x28], Route::InLine),               // verw [eax]
        (&[0x0f, 0x00, 0x20], Route::InLine),               // verr [eax]
        (&[0x66, 0xcf, 0x90, 0x90, 0x90], Route::Gate),     // iretw, with filler behind it
        (&[0xe4, 0x60], Route::Gate),                       // in al, 60h
        (&[0x0f, 0xa2], Route::Gate),                       // cpuid
        (&[0xcd, 0x80, 0x90, 0x90, 0x90], Route::TrapByte), // int 80h: nothing behind it may be displaced
    ];
    for (bytes, route) in table {
        let code = [bytes, [0x89, 0xc1].as_slice(), &[0x89, 0xca], &[0x89, 0xd3], &[0xc3]].concat();
        let (_, patch) = patch(&code, 0);
        assert_eq!(patch.sites[0].route, *route, "{bytes:02x?}");
    }
}

#[test]
fn a_branch_to_a_site_without_room_does_not_cost_those_who_fall_through_to_it() {
    // verw [disp32]; 1: iret; 2: jmp 1b: the way out of Linux, to ring 3 by falling through.
    let code = [0x0f, 0x00, 0x2d, 0, 0x10, 0, 0xc1, 0xcf, 0xeb, 0xfd];
    let mut scanned = Scanned::new(&code);
    let mut patm = Patm::new(config());
    let info = |s: &Scanned, patm: &mut Patm, site| s.patch_one(patm, site).unwrap();
    // Before anybody knows the branch, verw's window takes iret in; it stays when the branch is found.
    let first = info(&scanned, &mut patm, BASE);
    assert_eq!(first.sites.len(), 2);
    scanned.scan_from(BASE + 8);
    assert!(scanned.map.is_target(csam::GuestLin(BASE + 7)));
    // The same when it is known from the start.
    let mut patm = Patm::new(config());
    let patch = info(&scanned, &mut patm, BASE);
    assert_eq!((patch.sites.len(), patch.len), (2, 8));
    assert!(patch.sites.iter().all(|s| s.route == Route::InLine));
    assert!(patm::traps(patch.bytes()[7]), "the branch meets a trap");
    assert_ne!(patm.resume_eip(BASE + 7), BASE + 7, "and is forwarded");
}

#[test]
fn a_site_found_late_behind_a_live_window_is_merged_though_a_branch_goes_to_it() {
    // jmp 2f; verw [disp32]; 1: iret; 2: jmp 1b, of which the iret is known first.
    let code = [0xeb, 8, 0x0f, 0x00, 0x2d, 0, 0x10, 0, 0xc1, 0xcf, 0xeb, 0xfd];
    let mut scanned = Scanned::new(&code);
    let mut patm = Patm::new(config());
    let iret = scanned.patch_one(&mut patm, BASE + 9).unwrap();
    assert_eq!(iret.tactic, Tactic::TrapByte);
    scanned.scan_from(BASE + 2);
    let verw = scanned.patch_one(&mut patm, BASE + 2).unwrap();
    assert_eq!(verw.sites.len(), 1, "the trap byte is in the way");
    // Whichever of the two was made last, it says so.
    for site in [BASE + 2, BASE + 9] {
        let merged = patm.mergeable(csam::GuestLin(site), &scanned_view(&scanned)).expect("they can be one");
        assert_eq!((merged.0.0, merged.1.0), (BASE + 2, BASE + 10));
    }
    patm.undo_overlapping(csam::GuestLin(BASE + 2), csam::GuestLin(BASE + 10));
    assert_eq!(scanned.patch_one(&mut patm, BASE + 2).unwrap().sites.len(), 2);
    assert_eq!(patm.mergeable(csam::GuestLin(BASE + 2), &scanned_view(&scanned)), None);
}

#[test]
fn a_jump_to_a_site_without_room_does_it_in_its_own_window() {
    // verw [disp32]; 1: iret; 2: pop fs; add esp, 4; jmp 1b: Linux's return to ring 0.
    let code = [0x0f, 0x00, 0x2d, 0, 0x10, 0, 0xc1, 0xcf, 0x0f, 0xa1, 0x83, 0xc4, 0x04, 0xeb, 0xf8];
    let mut scanned = Scanned::new(&code);
    scanned.scan_from(BASE + 8);
    let mut patm = Patm::new(config());
    scanned.patch_all(&mut patm);
    let patch = patm.patch_at(BASE + 8).unwrap().clone();
    assert_eq!((patch.start.0, patch.len), (BASE + 8, 7));
    let sites: Vec<_> = patch.sites.iter().map(|s| (s.at.0, s.route)).collect();
    assert_eq!(sites, [(BASE + 8, Route::InLine), (BASE + 7, Route::InLine)]);
    // It has a number of its own, and its boundaries are at the iret.
    let word = patm::reason_word(patch.sites[1].id, patm::ReasonKind::Emulate);
    let (owner, site, _) = patm.by_reason(word).unwrap();
    assert_eq!((owner.id, site.at.0), (patch.id, BASE + 7));
    assert!(patch.map.points.iter().any(|p| p.fix.resume == BASE + 7));
    assert_eq!(patm.patch_at(BASE + 7).unwrap().start.0, BASE);
    // Who writes the iret changes both.
    let undone = patm.undo_overlapping(csam::GuestLin(BASE + 7), csam::GuestLin(BASE + 8));
    assert_eq!(undone.len(), 2);
    assert_eq!(patm.patches().count(), 0);
}

#[test]
fn a_branch_to_a_trapping_site_does_the_one_behind_it_as_well() {
    // push ebp; mov ebp, esp; jmp 1f; verw [disp32]; 1: sti; hlt; 2: pop ebp; jmp 2b: Linux's idle loop.
    let code = [0x55, 0x89, 0xe5, 0xeb, 7, 0x0f, 0x00, 0x2d, 0, 0x10, 0, 0xc1, 0xfb, 0xf4, 0x5d, 0xeb, 0xfd];
    let mut scanned = Scanned::new(&code);
    scanned.scan_from(BASE + 5);
    let mut patm = Patm::new(config());
    scanned.patch_all(&mut patm);
    let (sti, hlt) = (BASE + 12, BASE + 13);
    assert!([sti, hlt].iter().all(|&at| patm.patch_at(at).unwrap().tactic == Tactic::TrapByte));
    let made = patm.improve(csam::GuestLin(sti), &scanned_view(&scanned));
    let thread = patm.get(made[0]).unwrap().clone();
    assert_eq!((thread.tactic, thread.start.0, thread.len), (Tactic::Thread, BASE, 5));
    let sites: Vec<_> = thread.sites.iter().map(|s| (s.at.0, s.route)).collect();
    assert_eq!(sites, [(sti, Route::InLine), (hlt, Route::Gate)]);
    // Behind `sti` is the `hlt` in the trampoline, in its shadow.
    assert!(thread.map.points.iter().any(|p| p.fix.resume == hlt));
    assert!(patm.is_after_sti(hlt));
    // Who writes the `hlt` changes the branch.
    let undone = patm.undo_overlapping(csam::GuestLin(hlt), csam::GuestLin(BASE + 14));
    assert!(undone.iter().any(|p| p.id == thread.id));
}

#[test]
fn a_window_does_not_start_inside_another_instruction() {
    // 0: add [ebp+ecx+25h], dh, of which the last byte is the first of 3: and eax, 0fffff0ffh; then mov cr3, eax.
    let code = [0x00, 0x74, 0x0d, 0x25, 0xff, 0xf0, 0xff, 0xff, 0x0f, 0x22, 0xd8, 0xc3];
    let mut scanned = Scanned::new(&code);
    scanned.scan_from(BASE + 3);
    let mut patm = Patm::new(config());
    scanned.patch_all(&mut patm);
    for patch in patm.patches() {
        assert!(patch.start.0 >= BASE + 4, "{:#x}", patch.start.0);
    }
    assert!(patm.patches().any(|p| p.sites.iter().any(|s| s.at.0 == BASE + 8)));
}
