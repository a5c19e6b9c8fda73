//! The FPU state of a vCPU, in the 512-byte FXSAVE64 format. By KVM_GET_XSAVE: what KVM_GET_FPU and KVM_SET_FPU carry has a
//! place for MXCSR, but KVM leaves it out (Linux, arch/x86/kvm/x86.c).

use kvm_bindings::kvm_xsave;
use kvm_ioctls::{Error, VcpuFd};

/// The first word of the XSAVE header (SDM Vol. 1, 13.4.2), which says what the image has.
const HEADER: usize = 512 / 4;
const X87_AND_SSE: u32 = 3;

/// x87 and SSE state.
pub(crate) fn get(vcpu: &VcpuFd) -> Result<[u8; 512], Error> {
    let xsave = vcpu.get_xsave()?;
    let mut image = [0u8; 512];
    for (bytes, word) in image.chunks_exact_mut(4).zip(xsave.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Ok(image)
}

/// Sets x87 and SSE state.
pub(crate) fn set(vcpu: &VcpuFd, image: &[u8; 512]) -> Result<(), Error> {
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(image.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    xsave.region[HEADER] = X87_AND_SSE;
    // SAFETY: the call reads 4096 bytes, the structure's size, unless the process has asked for larger dynamic state
    // components (AMX) of guests, which nothing here does.
    unsafe { vcpu.set_xsave(&xsave) }
}
