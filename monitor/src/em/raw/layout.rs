//! Where our own things lie in a world's 4 GiB: the code view, the trampolines, the vCPU page and the gate.

use csam::GuestLin;
use host_driver_shim::world::{KEYED_CODE, KEYED_DATA, WorldLin};
use patm::Keys;

/// The reservations of a world. They are ours to move: nothing in the guest knows them.
///
/// Instructions are fetched at the guest's own linear addresses (code segments have the guest's base); data lies `delta`
/// further (data segments have the guest's base plus delta). It is this way round because a code segment whose base is
/// not 0 makes every taken branch some 15 cycles slower on AMD processors, while a data segment's base costs one cycle
/// of load latency (`docs/decisions/0001-data-view-is-the-moved-one.md`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Base of the data segments: the guest's data at linear L is at L + delta (mod 4 GiB) in the world.
    pub delta: u32,
    /// First address of the trampolines of ring-0 code, a code address. 16 MiB aligned.
    pub tramp: u32,
    /// The vCPU page, as a guest data address (in the world at `vcpu + delta`).
    pub vcpu: u32,
    /// The 64-bit gate stub, as a guest data address.
    pub gate: u32,
    /// So many bytes in front of the data at guest linear 0 are the engine's own, in every world.
    pub hole: u32,
    /// The transit page of keyed worlds, as a guest data address.
    pub transit: Option<u32>,
}

/// Bytes reserved for trampolines of ring-0 code.
pub const TRAMP_LEN: u32 = 16 << 20;
/// Bytes reserved for trampolines of ring-3 code, right in front of them.
pub const USER_TRAMP_LEN: u32 = 2 << 20;
/// More places for those: code addresses from which a jump's highest displacement byte traps in code at 08xxxxxx (fixed
/// executables), 56xxxxxx (position-independent ones) and b7xxxxxx (libraries), where Linux puts them.
pub const USER_TRAMPS: [u32; 3] = [0x7600_0000, 0x3c00_0000, 0xa500_0000];

impl Layout {
    /// The arrangements tried in turn when one collides with what the guest maps. The first suits the usual 3:1 split:
    /// the code view of a kernel at c0000000 takes the place of data at 70000000, that of user code at 08048000 the
    /// place of data at b8048000, both between the heap and the mmap area or in the stack gap, where little is mapped.
    /// Trampolines are where no kernel has code, at a distance from c1000000 that makes the highest byte of a jump's
    /// displacement trap ([`patm::good_bases`]).
    pub const CANDIDATES: [Layout; 6] = [
        Layout {
            delta: 0x5000_0000,
            tramp: 0xaf00_0000,
            vcpu: 0x9d00_0000,
            gate: 0x9d00_1000,
            hole: 0,
            transit: None,
        },
        Layout {
            delta: 0x7000_0000,
            tramp: 0xaf00_0000,
            vcpu: 0x7c80_0000,
            gate: 0x7c80_1000,
            hole: 0,
            transit: None,
        },
        Layout {
            delta: 0x9000_0000,
            tramp: 0xa700_0000,
            vcpu: 0x5c40_0000,
            gate: 0x5c40_1000,
            hole: 0,
            transit: None,
        },
        Layout {
            delta: 0x5c00_0000,
            tramp: 0xa700_0000,
            vcpu: 0x8dc0_0000,
            gate: 0x8dc0_1000,
            hole: 0,
            transit: None,
        },
        Layout {
            delta: 0xac00_0000,
            tramp: 0xaf00_0000,
            vcpu: 0x3d00_0000,
            gate: 0x3d00_1000,
            hole: 0,
            transit: None,
        },
        // For kernels low in memory, without paging, with up to 3 GiB of RAM.
        Layout {
            delta: 0x1000_0000,
            tramp: 0xdf00_0000,
            vcpu: 0xc500_0000,
            gate: 0xc500_1000,
            hole: 0,
            transit: None,
        },
    ];

    /// The same with the trampolines where the highest displacement byte of a jump from code at `top` << 24 traps.
    #[must_use]
    pub fn near(self, top: u8) -> Layout {
        let place = self.data(GuestLin(self.vcpu)).0;
        let fits = |base: &u32| {
            let first = base.wrapping_sub(USER_TRAMP_LEN);
            let len = USER_TRAMP_LEN + TRAMP_LEN;
            let apart = |at: u32, size: u32| at.wrapping_sub(first) >= len && first.wrapping_sub(at) >= size;
            *base < 0xc000_0000
                && apart(self.delta.wrapping_sub(self.hole), self.hole)
                && apart(place, 3 * 4096)
                && self.transit.is_none_or(|at| apart(self.data(GuestLin(at)).0, 4096))
                && USER_TRAMPS.iter().all(|user| apart(*user, USER_TRAMP_LEN))
        };
        match patm::good_bases(top).find(fits) {
            Some(tramp) => Layout { tramp, ..self },
            None => self,
        }
    }

    /// Where the world fetches the instruction at guest linear `lin`.
    #[must_use]
    pub fn code(&self, lin: GuestLin) -> WorldLin {
        WorldLin(lin.0)
    }
    /// The guest linear address whose instruction is fetched from world address `at`.
    #[must_use]
    pub fn guest_of_code(&self, at: WorldLin) -> GuestLin {
        GuestLin(at.0)
    }
    /// Where the world has the data at guest linear `lin`.
    #[must_use]
    pub fn data(&self, lin: GuestLin) -> WorldLin {
        WorldLin(lin.0.wrapping_add(self.delta))
    }
    /// The guest linear address whose data is at world address `at`.
    #[must_use]
    pub fn guest_of_data(&self, at: WorldLin) -> GuestLin {
        GuestLin(at.0.wrapping_sub(self.delta))
    }
    /// The code address that shares its world address with the data at `lin`.
    #[must_use]
    pub fn code_in_place_of(&self, lin: GuestLin) -> GuestLin {
        self.guest_of_code(self.data(lin))
    }
    /// First address of the trampolines of ring-3 code, a code address.
    #[must_use]
    pub fn user_tramp(&self) -> u32 {
        self.tramp.wrapping_sub(USER_TRAMP_LEN)
    }
    /// First guest data address whose place trampolines (of either ring) take.
    #[must_use]
    pub fn tramp_as_data(&self) -> u32 {
        self.guest_of_data(self.code(GuestLin(self.user_tramp()))).0
    }
    /// `lin` lies among the trampolines (as a code address).
    #[must_use]
    pub fn in_trampolines(&self, lin: GuestLin) -> bool {
        lin.0.wrapping_sub(self.user_tramp()) < USER_TRAMP_LEN + TRAMP_LEN
            || USER_TRAMPS.iter().any(|base| lin.0.wrapping_sub(*base) < USER_TRAMP_LEN)
    }
    /// `lin` as data lies where the trampolines are.
    #[must_use]
    pub fn behind_trampolines(&self, lin: GuestLin) -> bool {
        self.in_trampolines(self.code_in_place_of(lin))
    }
    /// The engine has something of its own at world address `at`.
    #[must_use]
    pub fn is_engines(&self, at: WorldLin) -> bool {
        self.delta.wrapping_sub(1).wrapping_sub(at.0) < self.hole
    }
    /// The same for keyed worlds. Ring 3 finds the transit page without a fault, so it is where its memory is not: in the last
    /// page but two, which Linux has for early consoles (the last one is what a pointer of -1 means, the one before has been a vDSO).
    /// In arrangements that are tried later it is behind the gate.
    #[must_use]
    pub fn keyed(self, tried: usize) -> Layout {
        let transit = if tried % Self::CANDIDATES.len() < 3 { 0xffff_d000 } else { self.vcpu + 0x2000 };
        Layout { transit: Some(transit), ..self }
    }
    /// What trampolines of keyed worlds go by.
    #[must_use]
    pub fn keys(&self) -> Option<Keys> {
        self.transit.map(|transit| Keys { code: KEYED_CODE, data: KEYED_DATA, transit })
    }
    /// A data access at `lin` would hit the vCPU page, the gate or the trampolines.
    #[must_use]
    pub fn reserved(&self, lin: GuestLin) -> bool {
        let page = lin.0 & !0xfff;
        page == self.vcpu || page == self.gate || self.transit == Some(page) || self.behind_trampolines(lin)
    }
}
