//! A small guest of the ring1 engine: RAM, one world, code at a known place, flat segments.
#![allow(dead_code, reason = "each test program uses its part")]

use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw::{GATE, GATE_REASON};
use host_driver_shim::ring1::{Ring1Engine, Ring1World};
use host_driver_shim::world::{Backing, HostSegment, HwRegs, Prot, World, WorldExit, WorldLin};

pub(crate) const CODE: u32 = 0x40_0000;
pub(crate) const DATA: u32 = 0x50_0000;
pub(crate) const STACK: u32 = 0x60_1000;
pub(crate) const STUB: u32 = 0xffc0_0000;
pub(crate) const VCPU: u32 = 0xffc0_1000;
pub(crate) const EAX: usize = 0;
pub(crate) const ECX: usize = 1;
pub(crate) const ESP: usize = 4;
pub(crate) const GP: WorldExit = WorldExit::Fault { vector: 13, error_code: 0, cr2: 0 };
/// The slot of the flat data segment.
pub(crate) const FLAT: u16 = 0x800;
/// Where the monitor's region ends.
pub(crate) const END: u32 = 0x7000_0000;

pub(crate) struct Guest {
    pub(crate) ring: u8,
    pub(crate) ram: GuestRam,
    pub(crate) code: CodeMemory,
    pub(crate) engine: Ring1Engine,
    pub(crate) world: Ring1World,
    pub(crate) code_page: u64,
}

/// A data segment from `base` to the end of the address space, or to where the monitor is.
pub(crate) fn flat(ring: u8, base: u32) -> HostSegment {
    let hole = Ring1Engine::segment_rules().hole;
    let limit = if ring == 3 { 0xf_ffff } else { (END - hole).wrapping_sub(base).wrapping_sub(1) >> 12 };
    HostSegment {
        base,
        limit,
        limit_in_pages: true,
        code: false,
        big: true,
        expand_down: false,
        rw: true,
        ring,
    }
}

/// Readable memory of a ring, with more rights.
pub(crate) fn prot(ring: u8, more: Prot) -> Prot {
    let user = if ring == 3 { Prot::USER } else { Prot::empty() };
    Prot::READ | more | user
}

impl Guest {
    /// `None`, having said so, where there is no KVM for it.
    pub(crate) fn new(ring: u8) -> Option<Guest> {
        let ram = GuestRam::new(16 << 20).unwrap();
        let code = CodeMemory::new(1 << 20).unwrap();
        let engine = match Ring1Engine::new(&ram, &code) {
            Ok(engine) => engine,
            Err(e) => {
                println!("SKIP: {e}");
                return None;
            }
        };
        engine.settle(WorldLin(END)).unwrap();
        let mut world = engine.spawn_world().unwrap();
        let code_page = code.alloc().unwrap();
        let (code_prot, data_prot) = (prot(ring, Prot::EXEC), prot(ring, Prot::WRITE));
        world.map(WorldLin(CODE), 4096, Backing::Code(code_page), code_prot).unwrap();
        world.map(WorldLin(DATA), 0x1000, Backing::Ram(0x1000), data_prot).unwrap();
        world.map(WorldLin(STACK - 0x1000), 0x1000, Backing::Ram(0x2000), data_prot).unwrap();
        world.place_gate(WorldLin(STUB), WorldLin(VCPU)).unwrap();
        // From END on, so that everything but the region is within reach of ring 1.
        world.set_segment(FLAT, flat(ring, if ring == 1 { END } else { 0 })).unwrap();
        Some(Guest { ring, ram, code, engine, world, code_page })
    }

    /// Where data at a linear address is in the flat segment.
    pub(crate) fn data(&self, lin: u32) -> u32 {
        if self.ring == 1 { lin.wrapping_sub(END) } else { lin }
    }

    pub(crate) fn cs(&self) -> u16 {
        let rules = Ring1Engine::segment_rules();
        if self.ring == 1 { rules.code_ring0 } else { rules.code_ring3 }
    }

    pub(crate) fn ds(&self) -> u16 {
        FLAT << 3 | 4 | u16::from(self.ring)
    }

    pub(crate) fn regs(&self) -> HwRegs {
        let (cs, ds) = (self.cs(), self.ds());
        let mut regs = HwRegs { eip: CODE, eflags: 0x202, sel: [ds, cs, ds, ds, 0, 0], ..HwRegs::default() };
        regs.gpr[ESP] = self.data(STACK);
        regs
    }

    pub(crate) fn put(&self, code: &[u8]) {
        self.code.write(self.code_page, code).unwrap();
    }

    /// Runs these bytes from the usual state.
    pub(crate) fn run_code(&mut self, code: &[u8]) -> (WorldExit, HwRegs) {
        self.put(code);
        let mut regs = self.regs();
        (self.run(&mut regs), regs)
    }

    pub(crate) fn run(&mut self, regs: &mut HwRegs) -> WorldExit {
        self.world.run(regs).unwrap()
    }

    /// An instruction with a 32-bit address at its end.
    pub(crate) fn at(&self, opcode: &[u8], lin: u32) -> Vec<u8> {
        [opcode, &self.data(lin).to_le_bytes()].concat()
    }

    /// mov dword ss:[VCPU+GATE_REASON], reason; jmp far ss:[VCPU+GATE]
    pub(crate) fn gate_jump(&self, reason: u32) -> Vec<u8> {
        let mut c = self.at(&[0x36, 0xc7, 0x05], VCPU + GATE_REASON);
        c.extend(reason.to_le_bytes());
        c.extend(self.at(&[0x36, 0xff, 0x2d], VCPU + GATE));
        c
    }
}

/// Runs a test body for both rings.
pub(crate) fn in_both_rings(mut body: impl FnMut(Guest)) {
    for ring in [1, 3] {
        if let Some(guest) = Guest::new(ring) {
            body(guest);
        }
    }
}
