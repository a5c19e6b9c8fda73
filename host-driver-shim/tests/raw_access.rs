//! Accesses of ring 0 to pages that are mapped for a moment only: done in the world's runtime, and with the results of the processor.

mod common;
use common::*;
use host_driver_shim::raw::rc_deliver::REFILL;
use host_driver_shim::world::{
    Backing, FillMode, FillRules, HwRegs, Prot, QUICK_SITES, Quick, QuickKind, World, WorldExit, WorldLin,
};

const DIRECTORY: u64 = 0x10_0000;
const TABLE: u64 = 0x10_1000;
/// Guest linear, and where it is: a page mapped for a moment, one more, and one that stays.
const MOMENT: u32 = 0x70_0000;
const OTHER: u32 = 0x70_1000;
const STAYS: u32 = 0x70_2000;
const FRAME: u64 = 0x20_0000;
const CODE_FRAME: u64 = 0x30_0000;
/// Two instructions in front of a program: `invlpg` of EAX, and the end.
const FLUSHED: u32 = 1;
const DONE: u32 = 2;
/// In the place of [`FLUSHED`]: the page ring 3 wanted is there.
const REFILLED: u32 = 3;
/// The arithmetic flags.
const FLAGS: u32 = 0x8d5;
const SUPERVISOR: u32 = 0x63;

struct Machine {
    guest: Guest,
    program: u32,
}

impl Machine {
    fn new() -> Machine {
        let mut guest = Guest::new();
        let flush = gate_jump(FLUSHED);
        let behind = CODE + flush.len() as u32;
        guest.put(&[flush, gate_jump(DONE), gate_jump(REFILLED)].concat());
        let program = CODE + 3 * gate_jump(0).len() as u32;
        guest.ram.write_u32(DIRECTORY + 4, TABLE as u32 | 3).unwrap();
        for i in 0..3 {
            let entry = TABLE + 4 * u64::from(((MOMENT >> 12) + i) & 0x3ff);
            guest.ram.write_u32(entry, (FRAME as u32 + (i << 12)) | SUPERVISOR).unwrap();
        }
        let mode = FillMode::ENABLED | FillMode::SUPERVISOR | FillMode::WP;
        guest.world.set_fill_rules(&FillRules { cr3: DIRECTORY as u32, mode, ..FillRules::default() });
        let mut quick = [Quick::default(); QUICK_SITES];
        quick[0] = Quick {
            reason: FLUSHED,
            kind: QuickKind::Invlpg,
            segment: 3,
            resume: behind,
            ..Quick::default()
        };
        quick[1] = Quick { reason: REFILLED, kind: QuickKind::Refill, resume: behind, ..Quick::default() };
        guest.world.set_quick(&quick);
        Machine { guest, program }
    }
    /// With programs that are ring 3's, and their registers. None, and SKIP, where there is no LDT.
    fn of_ring3() -> Option<(Machine, HwRegs)> {
        let mut m = Machine::new();
        let mode = FillMode::ENABLED | FillMode::SUPERVISOR | FillMode::WP;
        let user_cs = u32::from(CS);
        m.guest.world.set_fill_rules(&FillRules {
            cr3: DIRECTORY as u32,
            mode,
            user_cs,
            ..FillRules::default()
        });
        m.guest.ram.write_u32(DIRECTORY + 4, TABLE as u32 | 7).unwrap();
        let entry = TABLE + 4 * u64::from(CODE >> 12 & 0x3ff);
        m.guest.ram.write_u32(entry, CODE_FRAME as u32 | 0x25).unwrap();
        let ldt = 100 << 3 | 7;
        let from = HwRegs { sel: [ldt, CS, ldt, ldt, 0, 0], ..regs() };
        has_ldt(&mut m.guest).then_some((m, from))
    }
    /// The guest has given ring 3 the pages in front of MOMENT one after the other, and MOMENT to read.
    fn expect_write(&mut self) {
        self.guest.world.unmap(WorldLin(MOMENT - 0x5000), 0x6000).unwrap();
        let set = |m: &Machine, lin: u32, value: u32| {
            m.guest.ram.write_u32(TABLE + 4 * u64::from(lin >> 12 & 0x3ff), value).unwrap();
        };
        let pages = (0..6).map(|i| (MOMENT - 0x5000 + (i << 12), FRAME as u32 - 0x5000 + (i << 12)));
        pages.clone().for_each(|(lin, _)| set(self, lin, 0));
        for (lin, frame) in pages {
            if lin == MOMENT {
                set(self, lin, frame | 0x25);
                break;
            }
            set(self, lin, frame | 0x67);
            self.guest.world.vcpu_write(REFILL, lin | 3);
            let refill = HwRegs { eip: self.program - gate_jump(0).len() as u32, ..regs() };
            assert_eq!(self.guest.run(&mut refill.clone()), WorldExit::Gate { reason: DONE });
        }
        assert_eq!(self.fills(), 5);
    }
    fn entry(&self, lin: u32) -> u32 {
        self.guest.ram.read_u32(TABLE + 4 * u64::from(lin >> 12 & 0x3ff)).unwrap()
    }
    fn flush(&mut self, lin: u32) {
        let mut r = regs();
        r.gpr[EAX] = lin;
        assert_eq!(self.guest.run(&mut r), WorldExit::Gate { reason: DONE });
        self.guest.world.take_fills(&mut |_| ());
    }
    /// Flushes both pages so often that they are known for it.
    fn make_fleeting(&mut self) {
        for _ in 0..4 {
            self.flush(MOMENT);
            self.flush(OTHER);
        }
    }
    /// Runs this code to its first write to the page, which can only be read: registers, EIP and flags there.
    fn run_to_write(&mut self, code: &[u8], from: HwRegs) -> ([u32; 8], u32, u32, u32) {
        self.put(code);
        let mut r = HwRegs { eip: self.program, ..from };
        // P is the host's: whether it maps something there.
        match self.guest.run(&mut r) {
            WorldExit::Fault { vector: 14, error_code: 6 | 7, cr2 } => (r.gpr, r.eip, r.eflags & FLAGS, cr2),
            other => panic!("{other:?}: {code:02x?}"),
        }
    }
    fn put(&self, code: &[u8]) {
        self.guest.code.write(self.guest.code_page + u64::from(self.program - CODE), code).unwrap();
        // What ring 3 runs is looked for where the tables have it.
        self.guest.ram.write(CODE_FRAME + u64::from(self.program - CODE), code).unwrap();
    }
    /// Runs this code to its end.
    fn run(&mut self, code: &[u8], from: HwRegs) -> HwRegs {
        self.put(code);
        let end = gate_jump(DONE);
        let at = self.program - CODE + code.len() as u32;
        self.guest.code.write(self.guest.code_page + u64::from(at), &end).unwrap();
        let mut r = HwRegs { eip: self.program, ..from };
        assert_eq!(self.guest.run(&mut r), WorldExit::Gate { reason: DONE }, "{code:02x?}");
        r
    }
    fn fills(&mut self) -> usize {
        let mut n = 0;
        self.guest.world.take_fills(&mut |_| n += 1);
        n
    }
}

/// Numbers for programs (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self, below: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as u32 % below
    }
    /// A register that is neither EBX, which points to the page, nor ESP.
    fn register(&mut self) -> u8 {
        [0, 1, 2, 5, 6, 7][self.next(6) as usize]
    }
    /// ModRM and what belongs to it: memory in the page, or a register.
    fn operand(&mut self, register: u8, memory: bool) -> Vec<u8> {
        let field = register << 3;
        match if memory { self.next(3) } else { 3 } {
            0 => vec![field | 3],
            1 => vec![0x40 | field | 3, (4 * self.next(32)) as u8],
            2 => [&[0x80 | field | 3][..], &(4 * self.next(1024)).to_le_bytes()].concat(),
            _ => vec![0xc0 | field | self.register()],
        }
    }
    /// Registers for a program, with these segments, and the same words in the page of both machines.
    fn start(&mut self, segments: HwRegs, machines: [&Machine; 2]) -> HwRegs {
        let mut from = segments;
        for i in (0..8).filter(|i| *i != ESP) {
            from.gpr[i] = self.next(u32::MAX).wrapping_mul(5);
        }
        from.gpr[EBX] = MOMENT;
        for i in 0..1024 {
            let value = self.next(u32::MAX).wrapping_mul(7);
            for machine in machines {
                machine.guest.ram.write_u32(FRAME + 4 * i, value).unwrap();
            }
        }
        from
    }
    fn instruction(&mut self) -> Vec<u8> {
        let (register, memory) = (self.register(), self.next(2) == 0);
        let value = self.next(u32::MAX).wrapping_mul(3);
        let word = value.to_le_bytes();
        let two = [0u8, 1, 4, 5, 6, 7];
        let number = two[self.next(6) as usize];
        let shift = [4, 5, 7][self.next(3) as usize];
        match self.next(15) {
            0 => [&[0x8b][..], &self.operand(register, memory)].concat(),
            1 => [&[0x89][..], &self.operand(register, memory)].concat(),
            2 => [&[0x87][..], &self.operand(register, memory)].concat(),
            3 => [&[0x85][..], &self.operand(register, memory)].concat(),
            4 => [&[number << 3 | 1][..], &self.operand(register, memory)].concat(),
            5 => [&[number << 3 | 3][..], &self.operand(register, memory)].concat(),
            6 => [&[0x81][..], &self.operand(number, memory), &word].concat(),
            7 => [&[0x83][..], &self.operand(number, memory), &word[..1]].concat(),
            8 => [&[0xc7][..], &self.operand(0, memory), &word].concat(),
            9 => [&[0xc1][..], &self.operand(shift, false), &word[..1]].concat(),
            10 => vec![0x40 | register | (self.next(2) as u8) << 3],
            11 => [&[0xb8 | register][..], &word].concat(),
            12 => [&[number << 3 | 5][..], &word].concat(),
            13 => [&[0xf6][..], &self.operand(0, true), &word[..1]].concat(),
            _ => [&[0xf0, 0x80][..], &self.operand(4, true), &word[..1]].concat(),
        }
    }
}

#[test]
fn programs_of_ring_3_come_to_the_write_for_which_they_get_a_copy_as_they_do_natively() {
    let Some((mut here, segments)) = Machine::of_ring3() else { return };
    let mut native = Machine::new();
    assert!(has_ldt(&mut native.guest));
    native.guest.world.set_fill_rules(&FillRules::default());
    native.guest.world.map(WorldLin(MOMENT), 0x1000, Backing::Ram(FRAME), Prot::READ).unwrap();
    let mut random = Random(0x0dd0_1234_5678_9abd);
    for round in 0..3000 {
        let mut code = vec![0x8b, 0x03]; // mov eax, [ebx]
        for _ in 0..random.next(8) {
            // In front of a write the flags are all defined, and CF is that of before.
            code.push(0x40); // inc eax
            code.extend(random.instruction());
        }
        code.extend([0x40, 0x89, 0x43, 0x10]); // inc eax; mov [ebx+16], eax
        let from = random.start(segments, [&here, &native]);
        here.expect_write();
        let before = here.guest.world.accesses_done();
        let [a, b] = [&mut here, &mut native].map(|m| m.run_to_write(&code, from));
        assert_eq!(a, b, "{round}: {code:02x?}");
        assert_eq!((here.guest.world.accesses_done() - before, here.fills()), (1, 0), "{round}: {code:02x?}");
    }
}

#[test]
fn programs_end_as_they_do_natively() {
    let (mut here, mut native) = (Machine::new(), Machine::new());
    native.guest.world.map(WorldLin(MOMENT), 0x1000, Backing::Ram(FRAME), Prot::READ | Prot::WRITE).unwrap();
    here.make_fleeting();
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..3000 {
        let mut code = vec![0x8b, 0x03]; // mov eax, [ebx]
        for _ in 0..random.next(16) {
            code.extend(random.instruction());
        }
        // The flags are then all defined, and show CF of before.
        code.extend([0x40, 0x83, 0xd1, 0x00]); // inc eax; adc ecx, 0
        let from = random.start(regs(), [&here, &native]);
        here.flush(MOMENT);
        let (a, b) = (here.run(&code, from), native.run(&code, from));
        assert_eq!((a.gpr, a.eflags & FLAGS), (b.gpr, b.eflags & FLAGS), "{round}: {code:02x?}");
        for i in 0..1024 {
            let at = FRAME + 4 * i;
            assert_eq!(
                here.guest.ram.read_u32(at),
                native.guest.ram.read_u32(at),
                "{round} {i}: {code:02x?}"
            );
        }
        assert_eq!(here.fills(), 0, "{round}: {code:02x?}");
    }
    assert!(here.guest.world.accesses_done() >= 3000);
    assert_eq!(native.guest.world.accesses_done(), 0);
}

#[test]
fn pages_are_cleared_and_copied_without_being_mapped() {
    let mut m = Machine::new();
    m.make_fleeting();
    for i in 0..1024u32 {
        m.guest.ram.write_u32(FRAME + 4 * u64::from(i), i).unwrap();
    }
    // rep movsd
    let mut from = regs();
    (from.gpr[ESI], from.gpr[7], from.gpr[ECX]) = (MOMENT, OTHER, 1024);
    let r = m.run(&[0xf3, 0xa5], from);
    assert_eq!((r.gpr[ESI], r.gpr[7], r.gpr[ECX]), (MOMENT + 0x1000, OTHER + 0x1000, 0));
    assert!((0..1024u32).all(|i| m.guest.ram.read_u32(FRAME + 0x1000 + 4 * u64::from(i)) == Some(i)));
    m.flush(MOMENT);
    m.flush(OTHER);
    // rep stosd over the end of the page, into the next one and into one that stays, which is mapped.
    (from.gpr[EAX], from.gpr[7], from.gpr[ECX]) = (0x5555_5555, MOMENT + 0xff0, 4 + 1024 + 4);
    let r = m.run(&[0xf3, 0xab], from);
    assert_eq!((r.gpr[7], r.gpr[ECX]), (STAYS + 16, 0));
    let word = |at: u64| m.guest.ram.read_u32(FRAME + at).unwrap();
    assert_eq!((word(0xfec), word(0xff0), word(0x200c), word(0x2010)), (0x3fb, 0x5555_5555, 0x5555_5555, 0));
    assert_eq!(m.fills(), 1);
}

#[test]
fn more_than_a_few_accesses_have_the_page_mapped() {
    let mut m = Machine::new();
    m.make_fleeting();
    let mut from = regs();
    from.gpr[EBX] = MOMENT;
    // Each with something in between that only the processor does: cpuid would, pushes do.
    let access = [0x8b, 0x03, 0x50, 0x58];
    let before = m.guest.world.accesses_done();
    m.run(&access.repeat(3), from);
    assert_eq!((m.guest.world.accesses_done() - before, m.fills()), (3, 0));
    m.run(&access.repeat(3), from);
    assert_eq!((m.guest.world.accesses_done() - before, m.fills()), (3, 1));
    m.flush(MOMENT);
    m.run(&access.repeat(2), from);
    assert_eq!((m.guest.world.accesses_done() - before, m.fills()), (5, 0));
}

#[test]
fn what_the_tables_do_not_allow_or_the_monitor_watches_is_not_done() {
    let mut m = Machine::new();
    m.make_fleeting();
    let entry = TABLE + 4 * u64::from(MOMENT >> 12 & 0x3ff);
    let mut from = regs();
    from.gpr[EBX] = MOMENT;
    let store = [0x89, 0x03]; // mov [ebx], eax
    let exit_of = |m: &mut Machine, rights: u32| {
        m.guest.ram.write_u32(entry, FRAME as u32 | rights).unwrap();
        m.flush(MOMENT);
        m.guest.code.write(m.guest.code_page + u64::from(m.program - CODE), &store).unwrap();
        let before = m.guest.world.accesses_done();
        let mut r = HwRegs { eip: m.program, ..from };
        let exit = m.guest.run(&mut r);
        assert_eq!(m.guest.world.accesses_done(), before);
        (exit, r.eip)
    };
    let fault = |error_code| WorldExit::Fault { vector: 14, error_code, cr2: MOMENT };
    for rights in [0, 1] {
        let (exit, eip) = exit_of(&mut m, rights);
        assert!(matches!(exit, WorldExit::Fault { vector: 14, cr2: MOMENT, .. }), "{exit:?}");
        assert_eq!(eip, m.program);
        m.fills();
    }
    m.guest.ram.set_watched((FRAME >> 12) as u32, true);
    assert_eq!(exit_of(&mut m, SUPERVISOR), (fault(6), m.program));
    // D and A are set by an access that is done.
    m.guest.ram.set_watched((FRAME >> 12) as u32, false);
    m.guest.ram.write_u32(entry, FRAME as u32 | 3).unwrap();
    m.flush(MOMENT);
    m.run(&[0x8b, 0x03], from);
    assert_eq!(m.entry(MOMENT) & 0x60, 0x20);
    m.run(&store, from);
    assert_eq!((m.entry(MOMENT) & 0x60, m.fills()), (0x60, 0));
}
