//! Everything of subring that touches the host kernel or the hardware.
//!
//! - [`world`]: what an engine offers ([`world::World`]), and the types of that seam;
//! - [`ram`]: guest RAM as a memory object; [`code_memory`]: the pool code views and trampolines live in;
//! - [`raw`]: worlds that run guest code in hardware ring 3 of a jailed process;
//! - [`ring1`]: worlds that run guest code in hardware rings 1 and 3 of a virtual machine;
//! - [`kvm`]: a virtual machine on the host's KVM;
//! - [`native`]: single FPU instructions of a guest on the host CPU; [`native32`]: the CPU as a test oracle;
//! - [`fake`]: a scripted world for tests of what drives worlds.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("host-driver-shim needs an x86-64 Linux host");

pub mod builtin_guest;
pub mod capabilities;
pub mod code_memory;
pub mod fake;
pub mod kvm;
pub mod native;
pub mod native32;
pub mod ram;
pub mod raw;
pub mod ring1;
mod shared;
pub mod tsc;
pub mod undefined_flags;
pub mod world;
