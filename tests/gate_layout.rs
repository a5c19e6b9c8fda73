//! patm's trampolines and the shim's gate mean the same words of the vCPU page.

use host_driver_shim::raw;
use patm::vcpu_page;

#[test]
fn the_shim_and_patm_agree_on_the_gate() {
    assert_eq!(raw::GATE, vcpu_page::GATE);
    assert_eq!(raw::GATE_REASON, vcpu_page::GATE_REASON);
    assert_eq!(raw::SHIM_SAVE, vcpu_page::SHIM_SAVE);
}
