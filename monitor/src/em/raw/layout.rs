//! Where our own things lie in a world's 4 GiB: the code view, the trampolines, the vCPU page and the gate.

use csam::GuestLin;
use host_driver_shim::world::WorldLin;

/// The reservations of a world. They are ours to move: nothing in the guest knows them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Base of the code segments: an instruction at guest linear L is fetched from L + delta (mod 4 GiB).
    pub delta: u32,
    /// First trampoline address, in the guest's code addresses (fetched from `tramp + delta`). 16 MiB aligned.
    pub tramp: u32,
    /// Where ring-0 worlds see the vCPU page as data.
    pub vcpu: u32,
    /// Where ring-0 worlds have the 64-bit gate stub.
    pub gate: u32,
}

/// Bytes reserved for trampolines.
pub const TRAMP_LEN: u32 = 16 << 20;

impl Layout {
    /// The arrangements tried in turn when one collides with what the guest maps. The first suits the usual 3:1 split:
    /// a kernel at c0000000 has its code view at 70000000, user code at 08048000 at b8048000, both between the heap
    /// and the mmap area or in the stack gap, where little is mapped. Trampolines are where no kernel has code, at a
    /// distance from c1000000 that makes the highest byte of a jump's displacement trap ([`patm::good_bases`]).
    pub const CANDIDATES: [Layout; 5] = [
        Layout { delta: 0xb000_0000, tramp: 0xaf00_0000, vcpu: 0x9d00_0000, gate: 0x9d00_1000 },
        Layout { delta: 0x9000_0000, tramp: 0xaf00_0000, vcpu: 0x7c80_0000, gate: 0x7c80_1000 },
        Layout { delta: 0x7000_0000, tramp: 0xa700_0000, vcpu: 0x5c40_0000, gate: 0x5c40_1000 },
        Layout { delta: 0xa400_0000, tramp: 0xa700_0000, vcpu: 0x8dc0_0000, gate: 0x8dc0_1000 },
        Layout { delta: 0x5400_0000, tramp: 0xaf00_0000, vcpu: 0x3d00_0000, gate: 0x3d00_1000 },
    ];

    /// Where the world fetches the instruction at guest linear `lin`.
    #[must_use]
    pub fn code(&self, lin: GuestLin) -> WorldLin {
        WorldLin(lin.0.wrapping_add(self.delta))
    }
    /// The guest linear address whose instruction is fetched from world address `at`.
    #[must_use]
    pub fn guest_of_code(&self, at: u32) -> GuestLin {
        GuestLin(at.wrapping_sub(self.delta))
    }
    /// `lin` lies among the trampolines (as a code address).
    #[must_use]
    pub fn in_trampolines(&self, lin: GuestLin) -> bool {
        lin.0.wrapping_sub(self.tramp) < TRAMP_LEN
    }
    /// A data access at `lin` would hit the vCPU page, the gate or the trampolines.
    #[must_use]
    pub fn reserved(&self, lin: GuestLin) -> bool {
        let page = lin.0 & !0xfff;
        page == self.vcpu
            || page == self.gate
            || lin.0.wrapping_sub(self.tramp.wrapping_add(self.delta)) < TRAMP_LEN
    }
}
