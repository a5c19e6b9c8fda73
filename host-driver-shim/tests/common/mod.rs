//! A small guest: RAM, one world, code at a known place, flat host selectors.
#![allow(dead_code, reason = "each test program uses its part")]

use std::time::Duration;

use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw::rc_deliver::CPL;
use host_driver_shim::raw::{GATE, GATE_REASON, RawEngine, RawWorld, keys, long_gate};
use host_driver_shim::world::{
    Backing, HostSegment, HwRegs, KEYED_CODE, KEYED_CODE_SLOT, KEYED_DATA_SLOT, Prot, World, WorldError,
    WorldExit, WorldLin,
};

pub(crate) const CODE: u32 = 0x40_0000;
pub(crate) const DATA: u32 = 0x50_0000;
pub(crate) const STACK: u32 = 0x60_1000;
pub(crate) const STUB: u32 = 0xffc0_0000;
pub(crate) const VCPU: u32 = 0xffc0_1000;
pub(crate) const TRANSIT: u32 = 0xffc0_4000;
/// In a keyed world: a page of ring 0's, all bytes of which are [`CANARY`].
pub(crate) const KERNEL: u32 = 0x70_0000;
pub(crate) const CANARY: u8 = 0xc9;
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
        Guest::in_world(cpu, RawEngine::spawn_world)
    }

    /// In a confined world, with this code at [`CODE`].
    pub(crate) fn confined(code: &[u8]) -> Guest {
        let guest = Guest::in_world(None, RawEngine::spawn_confined);
        guest.put(code);
        guest
    }

    /// In a world that may enter confined ones, with this code at [`CODE`].
    pub(crate) fn master(code: &[u8]) -> Guest {
        let guest = Guest::in_world(None, RawEngine::spawn_master);
        guest.put(code);
        guest
    }

    /// In a keyed world, with this code at [`CODE`] for ring 3, whose pages these are; None, and SKIP, where there are no keys.
    pub(crate) fn keyed(code: &[u8]) -> Option<Guest> {
        if let Some(why) = keys::refusal() {
            println!("SKIP: {why}");
            return None;
        }
        let mut guest = Guest::in_world(None, RawEngine::spawn_keyed);
        guest.put(code);
        let world = &mut guest.world;
        let read_write = Prot::READ | Prot::WRITE | Prot::USER;
        let page = Backing::Code(guest.code_page);
        world.map(WorldLin(CODE), 4096, page, Prot::READ | Prot::EXEC | Prot::USER).unwrap();
        world.map(WorldLin(DATA), 4096, Backing::Ram(0x1000), read_write).unwrap();
        world.map(WorldLin(STACK - 4096), 4096, Backing::Ram(0x2000), read_write).unwrap();
        let kernels = Prot::READ | Prot::WRITE;
        world.map(WorldLin(KERNEL), 4096, Backing::Ram(u64::from(KERNEL)), kernels).unwrap();
        world.set_segment(KEYED_CODE_SLOT, HostSegment { rw: false, ..flat(0, true) }).unwrap();
        world.set_segment(KEYED_DATA_SLOT, flat(0, false)).unwrap();
        world.place_transit(WorldLin(TRANSIT)).unwrap();
        world.vcpu_write(CPL, 3);
        guest.ram.fill(u64::from(KERNEL), 4096, CANARY).unwrap();
        Some(guest)
    }

    fn in_world(cpu: Option<usize>, spawn: impl FnOnce(&RawEngine) -> Result<RawWorld, WorldError>) -> Guest {
        let ram = GuestRam::new(16 << 20).unwrap();
        let code = CodeMemory::new(1 << 20).unwrap();
        let engine = RawEngine::new(&ram, &code, cpu).unwrap();
        let mut world = spawn(&engine).unwrap();
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

/// A kick ends its world, once its code has run for a while.
pub(crate) fn assert_dies_of_a_kick(mut guest: Guest) {
    let kicker = guest.world.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        kicker.kick();
    });
    assert!(matches!(guest.world.run(&mut regs()), Err(WorldError::Died(_))));
    thread.join().unwrap();
}

pub(crate) fn regs() -> HwRegs {
    let mut regs = HwRegs { eip: CODE, eflags: 0x202, sel: [DS, CS, DS, DS, 0, 0], ..HwRegs::default() };
    regs.gpr[ESP] = STACK;
    regs
}

/// The same of ring 3 in a keyed world.
pub(crate) fn keyed_regs() -> HwRegs {
    let [es, _, ss, ds, fs, gs] = regs().sel;
    HwRegs { sel: [es, KEYED_CODE, ss, ds, fs, gs], ..regs() }
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

/// `jmp 33h:CODE+7`, then this 64-bit code.
pub(crate) fn escape(code64: &[u8]) -> Vec<u8> {
    let mut c = vec![0xea];
    c.extend((CODE + 7).to_le_bytes());
    c.extend([0x33, 0]);
    c.extend(code64);
    c
}

/// At `at`: leaves a confined world by its gate, as a trampoline does: jmp far 33h:1f; 1: mov r8d, next; mov r9, imm64; jmp [r9]
pub(crate) fn call_jump(at: u32, next: u32) -> Vec<u8> {
    let mut c = vec![0xea];
    c.extend((at + 7).to_le_bytes());
    c.extend([0x33, 0, 0x41, 0xb8]);
    c.extend(next.to_le_bytes());
    c.extend([0x49, 0xb9]);
    c.extend(long_gate().to_le_bytes());
    c.extend([0x41, 0xff, 0x21]);
    c
}

/// 64-bit code that finds a `syscall` instruction of the runtime by way of the gate stub and jumps to it. The stub is
/// `mov [moffs64], eax` (9 bytes), `mov rax, imm64`, `jmp [rax]`, and the runtime makes its system calls behind where that goes.
pub(crate) fn runtime_syscall(nr: u32) -> Vec<u8> {
    let mut c = vec![0xb9];
    c.extend(STUB.to_le_bytes()); // mov ecx, STUB
    c.extend([0x48, 0x8b, 0x49, 11]); // mov rcx, [rcx+11]
    c.extend([0x48, 0x8b, 0x09]); // mov rcx, [rcx]
    c.extend([0x48, 0xff, 0xc1]); // 1: inc rcx
    c.extend([0x66, 0x81, 0x39, 0x0f, 0x05]); // cmp word [rcx], 0x050f
    c.extend([0x75, 0xf6]); // jne 1b
    c.push(0xb8);
    c.extend(nr.to_le_bytes()); // mov eax, nr
    c.extend([0xff, 0xe1]); // jmp rcx
    c
}

/// `mov rdi, imm64` and its like: sets one of RDI, RSI, RDX and R10 (0 to 3), the arguments of a system call.
pub(crate) fn argument(which: usize, value: u64) -> Vec<u8> {
    let opcode: [[u8; 2]; 4] = [[0x48, 0xbf], [0x48, 0xbe], [0x48, 0xba], [0x49, 0xba]];
    [&opcode[which][..], &value.to_le_bytes()].concat()
}

pub(crate) const GP: WorldExit = WorldExit::Fault { vector: 13, error_code: 0, cr2: 0 };

pub(crate) fn flat(base: u32, code: bool) -> HostSegment {
    HostSegment { rw: true, ..HostSegment::flat(base, code) }
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
