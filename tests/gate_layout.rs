//! patm's trampolines and the shim's gate mean the same words of the vCPU page.

use host_driver_shim::raw;
use patm::vcpu_page;

#[test]
fn the_shim_and_patm_agree_on_the_gate() {
    assert_eq!(raw::GATE, vcpu_page::GATE);
    assert_eq!(raw::GATE_REASON, vcpu_page::GATE_REASON);
    assert_eq!(raw::SHIM_SAVE, vcpu_page::SHIM_SAVE);
    use raw::rc_deliver as rc;
    let shared = [
        (rc::CPL, vcpu_page::CPL),
        (rc::IF_FLAG, vcpu_page::IF_FLAG),
        (rc::HIDDEN_FLAGS, vcpu_page::HIDDEN_FLAGS),
        (rc::SELECTORS, vcpu_page::SELECTORS),
        (rc::CR2, vcpu_page::CR2),
        (rc::HOST_RING0, vcpu_page::HOST_RING0),
        (rc::HOST_RING3, vcpu_page::HOST_RING3),
        (rc::REFILL, vcpu_page::REFILL),
        (rc::REFLECTED, vcpu_page::REFLECTED),
    ];
    for (shim, patm) in shared {
        assert_eq!(shim, patm);
    }
}

#[test]
fn what_goes_along_with_the_guest_is_the_state_of_its_cpu() {
    use vcpu_page as vp;
    let segments = [vp::SELECTORS, vp::HOST_RING0, vp::HOST_RING3];
    let single = [vp::IF_FLAG, vp::PENDING, vp::HIDDEN_FLAGS, vp::CR0, vp::CR2, vp::CR4, vp::CPL];
    let tables = [vp::GDT_BASE, vp::GDT_LIMIT, vp::IDT_BASE, vp::IDT_LIMIT, vp::LDTR, vp::TR];
    let six = segments.into_iter().flat_map(|first| (0..6).map(move |i| first + 4 * i));
    let mut wanted: Vec<u32> = six.chain(single).chain(tables).collect();
    let mut carried: Vec<u32> =
        raw::CARRIED.iter().flat_map(|(first, words)| (0..*words).map(move |i| first + 4 * i)).collect();
    wanted.sort_unstable();
    carried.sort_unstable();
    assert_eq!(carried, wanted);
}
