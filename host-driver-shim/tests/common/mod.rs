//! A small guest: RAM, one world, code at a known place, flat host selectors.
#![allow(dead_code, reason = "each test program uses its part")]

use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw::{GATE, GATE_REASON, RawEngine, RawWorld};
use host_driver_shim::world::{Backing, HostSegment, HwRegs, Prot, World, WorldError, WorldExit, WorldLin};

pub(crate) const CODE: u32 = 0x40_0000;
pub(crate) const DATA: u32 = 0x50_0000;
pub(crate) const STACK: u32 = 0x60_1000;
pub(crate) const STUB: u32 = 0xffc0_0000;
pub(crate) const VCPU: u32 = 0xffc0_1000;
pub(crate) const CS: u16 = 0x23;
pub(crate) const DS: u16 = 0x2b;
pub(crate) const EAX: usize = 0;
pub(crate) const ECX: usize = 1;
pub(crate) const EDX: usize = 2;
pub(crate) const EBX: usize = 3;
pub(crate) const ESP: usize = 4;
pub(crate) const ESI: usize = 6;

pub(crate) struct Guest {
    pub(crate) ram: GuestRam,
    pub(crate) code: CodeMemory,
    pub(crate) engine: RawEngine,
    pub(crate) world: RawWorld,
    pub(crate) code_page: u64,
}

impl Guest {
    pub(crate) fn new() -> Guest {
        Guest::on(None)
    }

    pub(crate) fn on(cpu: Option<usize>) -> Guest {
        let ram = GuestRam::new(16 << 20).unwrap();
        let code = CodeMemory::new(1 << 20).unwrap();
        let engine = RawEngine::new(&ram, &code, cpu).unwrap();
        let mut world = engine.spawn_world().unwrap();
        let code_page = code.alloc().unwrap();
        world.map(WorldLin(CODE), 4096, Backing::Code(code_page), Prot::READ | Prot::EXEC).unwrap();
        world.map(WorldLin(DATA), 0x1000, Backing::Ram(0x1000), Prot::READ | Prot::WRITE).unwrap();
        world.map(WorldLin(STACK - 0x1000), 0x1000, Backing::Ram(0x2000), Prot::READ | Prot::WRITE).unwrap();
        world.place_gate(WorldLin(STUB), WorldLin(VCPU)).unwrap();
        Guest { ram, code, engine, world, code_page }
    }

    /// A guest with this code at [`CODE`].
    pub(crate) fn with(code: &[u8]) -> Guest {
        let guest = Guest::new();
        guest.put(code);
        guest
    }

    pub(crate) fn put(&self, code: &[u8]) {
        self.code.write(self.code_page, code).unwrap();
    }

    pub(crate) fn run(&mut self, regs: &mut HwRegs) -> WorldExit {
        self.world.run(regs).unwrap()
    }
}

pub(crate) fn regs() -> HwRegs {
    let mut regs = HwRegs { eip: CODE, eflags: 0x202, sel: [DS, CS, DS, DS, 0, 0], ..HwRegs::default() };
    regs.gpr[ESP] = STACK;
    regs
}

/// mov dword ss:[VCPU+GATE_REASON], reason; jmp far ss:[VCPU+GATE]
pub(crate) fn gate_jump(reason: u32) -> Vec<u8> {
    let mut c = vec![0x36, 0xc7, 0x05];
    c.extend((VCPU + GATE_REASON).to_le_bytes());
    c.extend(reason.to_le_bytes());
    c.extend([0x36, 0xff, 0x2d]);
    c.extend((VCPU + GATE).to_le_bytes());
    c
}

pub(crate) const GP: WorldExit = WorldExit::Fault { vector: 13, error_code: 0, cr2: 0 };

pub(crate) fn flat(base: u32, code: bool) -> HostSegment {
    HostSegment {
        base,
        limit: 0xf_ffff,
        limit_in_pages: true,
        code,
        big: true,
        expand_down: false,
        rw: true,
        ring: 3,
    }
}

/// Whether this host lets an ordinary process have an LDT; says SKIP if not.
pub(crate) fn has_ldt(guest: &mut Guest) -> bool {
    guest.world.set_segment(100, flat(0, false)).unwrap();
    match guest.world.flush() {
        Ok(()) => true,
        Err(WorldError::Host { what, source }) => {
            println!("SKIP: {what}: {source}");
            false
        }
        Err(e) => panic!("{e}"),
    }
}
