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
