//! `int 80h` of ring 3 goes to the guest's handler without an exit, as the guest's gate says; whatever is not as the host
//! has told the monitor comes out as it always did, with nothing changed.
//!
//! Needs a KVM with hardware behind it: `tests/lab/run` has one anywhere.

mod common_ring1;
use common_ring1::*;
use host_driver_shim::raw::rc_deliver::{
    CPL, HIDDEN_FLAGS, HOST_RING0, HOST_RING3, IF_FLAG, REFLECTED, SELECTORS,
};
use host_driver_shim::ring1::Ring1Engine;
use host_driver_shim::world::{
    Backing, DeliveryRules, HostSegment, HwRegs, Prot, Reflected, Table, World, WorldExit, WorldLin,
};

/// Guest linear addresses: descriptors and the TSS; the end of ring 0's stack; the handler.
const TABLES: u32 = 0xa000_0000;
const ESP0: u32 = 0xa000_3000;
const HANDLER: u32 = 0x44_0000;
/// Where they are in RAM.
const TABLES_RAM: u64 = 0x8000;
const STACK_RAM: u64 = 0x9000;
/// What the guest calls its segments.
const KERNEL: [u32; 2] = [0x60, 0x68];
const USER: [u32; 2] = [0x73, 0x7b];
/// Slots: flat data of ring 3, and a segment of both rings for FS.
const USER_FLAT: u16 = FLAT + 1;
const FS: [u16; 2] = [FLAT + 2, FLAT + 3];
/// `int 80h` as #GP.
const INT80: WorldExit = WorldExit::Fault { vector: 13, error_code: 0x80 * 8 + 2, cr2: 0 };
const AT_HANDLER: WorldExit = GP;

struct Calls {
    g: Guest,
    rules: DeliveryRules,
    regs: HwRegs,
}

fn selector(slot: u16, ring: u8) -> u16 {
    slot << 3 | 4 | u16::from(ring)
}

impl Calls {
    fn new() -> Option<Calls> {
        let mut g = Guest::new(3)?;
        // `int 80h`, and behind it; a handler that leaves at once.
        g.put(&[0xcd, 0x80, 0xf4, 0xcd, 0x80]);
        let handler = g.code.alloc().unwrap();
        g.code.write(handler, &[0xf4; 3]).unwrap();
        let w = &mut g.world;
        w.map(WorldLin(HANDLER), 4096, Backing::Code(handler), Prot::READ | Prot::EXEC).unwrap();
        let data = |lin: u32| WorldLin(lin.wrapping_add(END));
        w.map(data(TABLES), 4096, Backing::Ram(TABLES_RAM), Prot::READ).unwrap();
        let rw = Prot::READ | Prot::WRITE;
        w.map(data(ESP0 - 0x1000), 4096, Backing::Ram(STACK_RAM), rw).unwrap();
        w.set_segment(FLAT, flat(1, END)).unwrap();
        w.set_segment(USER_FLAT, flat(3, END)).unwrap();
        for (slot, ring) in FS.into_iter().zip([1, 3]) {
            let small = HostSegment { limit: 0xff, limit_in_pages: false, ..flat(ring, DATA) };
            w.set_segment(slot, small).unwrap();
        }
        let table = |n: u32| Table { at: TABLES + 8 * n, low: 0x1111_0000 + n, high: 0x2222_0000 + n };
        let rules = DeliveryRules {
            ready: 1,
            from_ring3: 1,
            gate: table(0),
            target: HANDLER,
            if_mask: 0,
            cs: KERNEL[0],
            cs_descriptor: table(1),
            cs_host: u32::from(Ring1Engine::segment_rules().code_ring0),
            tss_esp0: TABLES + 0x104,
            ss: KERNEL[1],
            ss_descriptor: table(2),
            ss_host: u32::from(selector(FLAT, 1)),
            user_ss_host: u32::from(selector(USER_FLAT, 3)),
        };
        for t in [rules.gate, rules.cs_descriptor, rules.ss_descriptor] {
            let at = TABLES_RAM + u64::from(t.at - TABLES);
            g.ram.write_u32(at, t.low).unwrap();
            g.ram.write_u32(at + 4, t.high).unwrap();
        }
        let tss = TABLES_RAM + 0x104;
        g.ram.write_u32(tss, ESP0).unwrap();
        g.ram.write_u32(tss + 4, KERNEL[1]).unwrap();
        let user = selector(USER_FLAT, 3);
        let code = Ring1Engine::segment_rules().code_ring3;
        let mut regs = HwRegs {
            eip: CODE,
            eflags: 0x202 | 0x8d5,
            sel: [user, code, user, user, selector(FS[1], 3), 0],
            gpr: [1, 2, 3, 4, 5, 6, 7, 8],
        };
        regs.gpr[ESP] = STACK.wrapping_sub(END);
        let mut c = Calls { g, rules, regs };
        c.reset();
        Some(c)
    }

    /// The vCPU page as the monitor process leaves it for ring 3.
    fn reset(&mut self) {
        let w = &mut self.g.world;
        w.vcpu_write(CPL, 3);
        w.vcpu_write(IF_FLAG, 0x200);
        w.vcpu_write(HIDDEN_FLAGS, 0x3000);
        let flat = [selector(FLAT, 1), selector(USER_FLAT, 3)];
        let fs = [selector(FS[0], 1), selector(FS[1], 3)];
        let (none, data) = ([0, 0], [USER[1]; 2]);
        for (i, (guests, [ring0, ring3])) in [
            (data, flat),
            ([USER[0]; 2], none),
            (data, none),
            (data, flat),
            ([0x33; 2], fs),
            (none.map(u32::from), none),
        ]
        .into_iter()
        .enumerate()
        {
            let at = 4 * i as u32;
            w.vcpu_write(SELECTORS + at, guests[0]);
            w.vcpu_write(HOST_RING0 + at, u32::from(ring0));
            w.vcpu_write(HOST_RING3 + at, u32::from(ring3));
        }
        let events = self.events();
        self.g.world.set_reflections(&events);
    }

    fn events(&self) -> [(Reflected, DeliveryRules); 3] {
        let other = |n: u32| DeliveryRules { target: HANDLER + n, if_mask: u32::MAX, ..self.rules };
        [(Reflected::Fault(0), other(1)), (Reflected::Int(0x80), self.rules), (Reflected::Trap(3), other(2))]
    }

    /// Runs from `self.regs`.
    fn run(&mut self) -> (WorldExit, HwRegs) {
        let mut regs = self.regs;
        (self.g.run(&mut regs), regs)
    }

    fn stack(&self, below: u32) -> u32 {
        self.g.ram.read_u32(STACK_RAM + 0x1000 - u64::from(below)).unwrap()
    }

    /// `int 80h` leaves with nothing changed.
    fn is_left_to_the_host(&mut self, why: &str) {
        let done = self.g.world.vcpu_read(REFLECTED);
        let (exit, regs) = self.run();
        assert_eq!(exit, INT80, "{why}");
        assert_eq!(regs.eip, self.regs.eip, "{why}");
        assert_eq!((regs.gpr, regs.sel), (self.regs.gpr, self.regs.sel), "{why}");
        let word = |at| self.g.world.vcpu_read(at);
        assert_eq!((word(CPL), word(IF_FLAG), word(REFLECTED)), (3, 0x200, done), "{why}");
        assert!(self.g.engine.is_intact(), "{why}");
        self.reset();
    }

    /// And it goes to the handler.
    fn goes_to_the_handler(&mut self) -> HwRegs {
        let done = self.g.world.reflected();
        let (exit, regs) = self.run();
        assert_eq!((exit, regs.eip), (AT_HANDLER, HANDLER));
        assert_eq!(self.g.world.reflected(), done + 1);
        assert!(self.g.engine.is_intact());
        regs
    }
}

#[test]
fn int_80h_goes_to_the_handler_as_the_gate_says() {
    let Some(mut c) = Calls::new() else { return };
    let regs = c.goes_to_the_handler();
    let frame = [20, 16, 12, 8, 4].map(|below| c.stack(below));
    assert_eq!(frame, [CODE + 2, USER[0], 0x3000 | 0x2 | 0x200 | 0x8d5, c.regs.gpr[ESP], USER[1]]);
    let (ss, fs) = (selector(FLAT, 1), selector(FS[0], 1));
    let cs = Ring1Engine::segment_rules().code_ring0;
    assert_eq!(regs.sel, [ss, cs, ss, ss, fs, 0]);
    let mut gpr = c.regs.gpr;
    gpr[ESP] = ESP0 - 20;
    assert_eq!(regs.gpr, gpr);
    assert_eq!(regs.eflags & !0x1_0000, 0x202 | 0x8d5);
    let word = |at| c.g.world.vcpu_read(at);
    assert_eq!((word(CPL), word(IF_FLAG), word(HIDDEN_FLAGS)), (0, 0, 0x3000));
    assert_eq!((word(SELECTORS + 4), word(SELECTORS + 8)), (KERNEL[0], KERNEL[1]));
    // A trap gate leaves IF as it is.
    c.rules.if_mask = u32::MAX;
    c.reset();
    c.goes_to_the_handler();
    assert_eq!(c.g.world.vcpu_read(IF_FLAG), 0x200);
}

#[test]
fn a_fault_goes_to_its_handler_with_rf_and_a_trap_without() {
    let Some(mut c) = Calls::new() else { return };
    // div ecx, by 0; int3; int 3; the others' handlers, which are the host's.
    c.g.put(&[0xf7, 0xf1, 0xcc, 0xcd, 0x03, 0x0f, 0x0b]);
    c.regs.gpr[ECX] = 0;
    for (at, handler, eip, rf) in [(0, 1, 0, 0x1_0000), (2, 2, 3, 0), (3, 2, 5, 0)] {
        c.reset();
        c.regs.eip = CODE + at;
        let (exit, regs) = c.run();
        assert_eq!((exit, regs.eip), (AT_HANDLER, HANDLER + handler), "at {at}");
        assert_eq!((c.stack(20), c.stack(12) & !0xcd5), (CODE + eip, 0x3202 | rf), "at {at}");
        assert_eq!((regs.gpr[ESP], c.g.world.vcpu_read(IF_FLAG)), (ESP0 - 20, 0x200));
    }
    assert_eq!(c.g.world.reflected(), 3);
    c.reset();
    c.regs.eip = CODE + 5;
    assert_eq!(c.run().0, WorldExit::Fault { vector: 6, error_code: 0, cr2: 0 });
    assert_eq!(c.g.world.reflected(), 3);
    // Of ring 0 they are none of this.
    let (ring0, code) = (selector(FLAT, 1), Ring1Engine::segment_rules().code_ring0);
    c.regs.sel = [ring0, code, ring0, ring0, 0, 0];
    c.regs.eip = HANDLER;
    let page = c.g.code.alloc().unwrap();
    c.g.code.write(page, &[0xcc]).unwrap();
    c.g.world.map(WorldLin(HANDLER), 4096, Backing::Code(page), Prot::READ | Prot::EXEC).unwrap();
    assert_eq!(c.run().0, WorldExit::Fault { vector: 3, error_code: 0, cr2: 0 });
}

#[test]
fn what_is_not_as_the_host_found_it_is_left_to_the_host() {
    let Some(mut c) = Calls::new() else { return };
    c.goes_to_the_handler();
    for at in (TABLES_RAM..TABLES_RAM + 24).step_by(4).chain([TABLES_RAM + 0x108]) {
        let was = c.g.ram.read_u32(at).unwrap();
        c.g.ram.write_u32(at, was ^ 8).unwrap();
        c.reset();
        c.is_left_to_the_host(&format!("a table word at {at:#x} changed"));
        c.g.ram.write_u32(at, was).unwrap();
    }
    for (offset, value) in [(HOST_RING3, 0x13), (HOST_RING3 + 12, 0), (HOST_RING3 + 20, 0x4007)] {
        c.reset();
        c.g.world.vcpu_write(offset, value);
        c.is_left_to_the_host("another segment");
    }
    for bad in [0xfff7, 0x30, 0x28, 0x1b] {
        for i in [0, 3, 4, 5] {
            c.reset();
            c.g.world.vcpu_write(HOST_RING0 + 4 * i, bad);
            c.is_left_to_the_host("a selector that cannot be loaded");
        }
    }
    for monitors in [8, 0x10] {
        c.reset();
        c.g.world.vcpu_write(HOST_RING0 + 20, monitors);
        // What ring 0 can load and ring 1 may not have is null on the way there (SDM vol. 2A, IRET).
        assert_eq!(c.goes_to_the_handler().sel[5], 0);
    }
    c.reset();
    c.g.put(&[0x3e, 0xcd, 0x80, 0xcd, 0x80]);
    c.is_left_to_the_host("a prefix");
    c.regs.eip += 3;
    c.regs.eflags |= 0x4_0000;
    c.is_left_to_the_host("AC");
    c.regs.eflags &= !0x4_0000;
    c.goes_to_the_handler();
    c.reset();
    c.g.world.set_reflections(&[(Reflected::Int(0x81), c.rules)]);
    c.is_left_to_the_host("another vector");
    c.g.world.set_reflections(&[(Reflected::Int(0x80), DeliveryRules { from_ring3: 0, ..c.rules })]);
    c.is_left_to_the_host("no rules for ring 3");
    c.goes_to_the_handler();
}

#[test]
fn a_stack_that_cannot_be_written_or_is_the_monitors_is_left_to_the_host() {
    let Some(mut c) = Calls::new() else { return };
    let esp0 = TABLES_RAM + 0x104;
    let hole = Ring1Engine::segment_rules().hole;
    let region = 0u32.wrapping_sub(hole);
    // Nothing there; only readable; every place around and in the monitor's region; round the end of the address space.
    let mut bad = vec![0x9000_0000, TABLES + 0x800, 0, 4, 19, region + 1, u32::MAX];
    bad.extend((region + 4..=region + 0x4000).step_by(4));
    for esp in bad {
        c.g.ram.write_u32(esp0, esp).unwrap();
        c.is_left_to_the_host(&format!("ESP0 {esp:#x}"));
    }
    // Half of the frame can be written.
    c.g.ram.write_u32(esp0, ESP0 - 0x1000 + 8).unwrap();
    c.is_left_to_the_host("half of the frame");
    // And on it goes once the stack is there.
    c.g.ram.write_u32(esp0, ESP0).unwrap();
    c.goes_to_the_handler();
    // Another region: nothing the host has said of the old one counts.
    c.reset();
    c.g.engine.settle(WorldLin(0x2000_0000)).unwrap();
    let w = &mut c.g.world;
    w.set_segment(USER_FLAT, flat(3, END)).unwrap();
    w.set_segment(FS[1], HostSegment { limit: 0xff, limit_in_pages: false, ..flat(3, DATA) }).unwrap();
    let mut regs = c.regs;
    assert_eq!(c.g.run(&mut regs), INT80);
}

#[test]
fn ring_3_reaches_nothing_of_ring_0s_and_ring_1_runs_nothing_of_ring_3s() {
    let Some(mut c) = Calls::new() else { return };
    let pf = |error_code, cr2| WorldExit::Fault { vector: 14, error_code, cr2 };
    // mov eax, [edi]; mov [edi], eax; call edi
    c.g.put(&[0x8b, 0x07, 0xf4, 0x89, 0x07, 0xf4, 0xff, 0xd7]);
    let start = END - Ring1Engine::segment_rules().hole;
    for at in
        [HANDLER, TABLES.wrapping_add(END), (ESP0 - 4).wrapping_add(END), VCPU, STUB, start, start + 0x2ffc]
    {
        c.regs.gpr[7] = at.wrapping_sub(END);
        c.regs.eip = CODE;
        assert_eq!(c.run().0, pf(5, at), "read {at:#x}");
        c.regs.eip = CODE + 3;
        assert_eq!(c.run().0, pf(7, at), "write {at:#x}");
    }
    c.regs.eip = CODE + 6;
    c.regs.gpr[7] = HANDLER;
    assert_eq!(c.run().0, pf(0x15, HANDLER));
    if !c.g.engine.has_smep() {
        println!("SKIP: no SMEP");
        return;
    }
    let ring0 = selector(FLAT, 1);
    let code = Ring1Engine::segment_rules().code_ring0;
    c.regs.sel = [ring0, code, ring0, ring0, 0, 0];
    c.regs.eip = CODE;
    assert_eq!(c.run().0, pf(0x11, CODE));
}

#[test]
fn thousands_of_calls_leave_no_trace() {
    let Some(mut c) = Calls::new() else { return };
    let mut x = 0x9e37_79b9u32;
    for _ in 0..2_000 {
        for gpr in &mut c.regs.gpr {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            *gpr = x;
        }
        c.regs.eflags = 0x202 | x & 0x0cd5;
        let regs = c.goes_to_the_handler();
        let mut gpr = c.regs.gpr;
        gpr[ESP] = ESP0 - 20;
        assert_eq!((regs.gpr, regs.eflags & !0x1_0000), (gpr, c.regs.eflags));
        assert_eq!((c.stack(20), c.stack(8)), (CODE + 2, c.regs.gpr[ESP]));
        c.reset();
    }
}
