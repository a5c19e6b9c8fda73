//! Accesses to pages that would be mapped for a moment only, done on guest RAM.
//!
//! A kernel with more memory than it has addresses for maps a page of the rest where it needs it, and flushes it again: Linux's
//! `kmap_local_page`, a dozen times in a page fault where page tables lie in high memory. Between mapping and flush there are one
//! or two accesses as a rule. To map the page in the world and take it out again costs the host several times what the signal of
//! such an access costs. So where a page has been flushed again and again, its next few accesses are done here, as the guest's tables
//! say, and the page is not mapped; with more than a few it is.
//!
//! Only plain instructions are known here. All others have the page mapped as ever. As several accesses lie close together (a page
//! is cleared by two stores and a `rep stosd`), the plain instructions behind one are gone through here, too, until one comes that is not
//! known or goes to another kind of page.
//!
//! The same is done for a read of ring 3 in a page that it is expected to write to next, which the guest answers with a copy of the page
//! (copy on write): to show the old one for that read costs as much as to show the copy.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::arena::{Arena, RAM_VA};
use super::fill::NO_FAULT;
use super::rc_fill::{Places, Ram};
use super::rc_walk::{Access, refusal, right, walk};
use super::rc_window;
use super::signal::GENERAL;
use crate::shared::{copy, fill_words};
use crate::world::FillMode;

/// So many pages are known to be mapped for a moment only.
pub(crate) const FLEETING: usize = 64;
/// A page that has been flushed so often is one.
const OFTEN: u32 = 4;
/// So many accesses between two flushes are done here.
const FEW: u32 = 3;

/// So many instructions are gone through for one signal.
const STEPS: u32 = 24;
/// Bytes of an instruction that are looked at; the longest known one has 12.
const LENGTH: u32 = 12;
const CF: u32 = 1;
const TF: u32 = 0x100;
const DF: u32 = 0x400;
/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u32 = 0x8d5;

const EAX: usize = 0;
const ECX: usize = 1;
const ESP: usize = 4;
const EBP: usize = 5;
const ESI: usize = 6;
const EDI: usize = 7;

/// What is known of a guest linear page.
#[repr(C)]
pub(crate) struct Fleeting {
    page: AtomicU32,
    /// How often it was flushed, up to [`OFTEN`].
    flushes: AtomicU32,
    /// Accesses for which it was signalled since it was flushed last.
    accesses: AtomicU32,
}

/// The guest has flushed this linear page.
pub(crate) fn flushed(known: &[Fleeting; FLEETING], page: u32) {
    let Some(entry) = known.get(page as usize % FLEETING) else { return };
    if entry.page.swap(page, Relaxed) != page {
        entry.flushes.store(0, Relaxed);
    }
    entry.flushes.store(entry.flushes.load(Relaxed).wrapping_add(1).min(OFTEN), Relaxed);
    entry.accesses.store(0, Relaxed);
}

/// This linear page is mapped for a moment only, as a rule.
fn is_fleeting(known: &[Fleeting; FLEETING], page: u32) -> bool {
    let fits = |e: &Fleeting| e.page.load(Relaxed) == page && e.flushes.load(Relaxed) >= OFTEN;
    known.get(page as usize % FLEETING).is_some_and(fits)
}

/// An access to this linear page was signalled: it is to be done here.
fn is_due(known: &[Fleeting; FLEETING], page: u32) -> bool {
    let Some(entry) = known.get(page as usize % FLEETING).filter(|_| is_fleeting(known, page)) else {
        return false;
    };
    let n = entry.accesses.load(Relaxed);
    entry.accesses.store(n.wrapping_add(1).min(FEW), Relaxed);
    n < FEW
}

/// A place in memory, in DS or SS, which are flat.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Address {
    base: Option<usize>,
    /// And the power of two it is multiplied by.
    index: Option<(usize, u8)>,
    displacement: u32,
}

/// 32 bits an instruction works with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Value {
    Register(usize),
    Immediate(u32),
    Memory(Address),
}

/// With two operands, the ones of opcodes 0 to 3Fh, 80h, 81h and 83h. (`adc` and `sbb` are left out.)
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Add,
    Or,
    And,
    Sub,
    Xor,
    Cmp,
}

impl Operation {
    fn numbered(number: u8) -> Option<Operation> {
        Some(match number {
            0 => Operation::Add,
            1 => Operation::Or,
            4 => Operation::And,
            5 => Operation::Sub,
            6 => Operation::Xor,
            7 => Operation::Cmp,
            _ => return None,
        })
    }

    /// The result, and the arithmetic flags.
    fn of(self, a: u32, b: u32) -> (u32, u32) {
        match self {
            Operation::Add => {
                let r = a.wrapping_add(b);
                let overflow = !(a ^ b) & (a ^ r);
                (r, result_flags(r) | bit(r < a, 0) | (a ^ b ^ r) & 0x10 | bit(overflow >> 31 != 0, 11))
            }
            Operation::Sub | Operation::Cmp => {
                let r = a.wrapping_sub(b);
                let overflow = (a ^ b) & (a ^ r);
                (r, result_flags(r) | bit(a < b, 0) | (a ^ b ^ r) & 0x10 | bit(overflow >> 31 != 0, 11))
            }
            Operation::Or => (a | b, result_flags(a | b)),
            Operation::And => (a & b, result_flags(a & b)),
            Operation::Xor => (a ^ b, result_flags(a ^ b)),
        }
    }
}

/// Shifts by a constant that is not 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shift {
    Left,
    Right,
    Signed,
}

/// What an instruction does; of its values one is memory at the most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Action {
    /// `mov to, from`.
    Move(Value, Value),
    /// `lea`.
    Address(usize, Address),
    /// `xchg`.
    Swap(Value, usize),
    Two(Operation, Value, Value),
    Test(Value, Value),
    /// `test` of a byte of memory.
    TestByte(Address, u8),
    /// `lock and` of a byte of memory.
    AndByte(Address, u8),
    Shift(Shift, usize, u8),
    /// `inc` or, with true, `dec` of a register.
    Count(usize, bool),
    /// `nop`.
    Nothing,
    /// `rep stosd`.
    Fill,
    /// `rep movsd`.
    Copy,
}

impl Action {
    /// Where it goes to memory, and whether it writes there.
    fn memory(self) -> Option<(Address, bool)> {
        let of = |value, write| match value {
            Value::Memory(address) => Some((address, write)),
            _ => None,
        };
        match self {
            Action::Move(to, from) => of(to, true).or(of(from, false)),
            Action::Swap(place, _) => of(place, true),
            Action::Two(operation, to, from) => of(to, operation != Operation::Cmp).or(of(from, false)),
            Action::Test(a, b) => of(a, false).or(of(b, false)),
            Action::TestByte(address, _) => Some((address, false)),
            Action::AndByte(address, _) => Some((address, true)),
            _ => None,
        }
    }
    fn is_of_a_byte(self) -> bool {
        matches!(self, Action::AndByte(..) | Action::TestByte(..))
    }
}

/// The bytes of an instruction.
struct Bytes([u8; LENGTH as usize]);

impl Bytes {
    fn byte(&self, at: u32) -> Option<u8> {
        self.0.get(at as usize).copied()
    }
    fn word(&self, at: u32) -> Option<u32> {
        let four = self.0.get(at as usize..at.wrapping_add(4) as usize)?;
        Some(u32::from_le_bytes(four.try_into().ok()?))
    }
    fn extended(&self, at: u32) -> Option<u32> {
        Some(i32::from(self.byte(at)?.cast_signed()).cast_unsigned())
    }

    /// The operand of a ModRM byte there, and where what follows is (SDM Vol. 2A, 2.1.5).
    fn operand(&self, at: u32) -> Option<(Value, u32)> {
        let modrm = self.byte(at)?;
        let rm = usize::from(modrm & 7);
        let mode = modrm >> 6;
        if mode == 3 {
            return Some((Value::Register(rm), at.wrapping_add(1)));
        }
        let mut next = at.wrapping_add(1);
        let (mut base, mut index) = (Some(rm), None);
        if rm == ESP {
            let sib = self.byte(next)?;
            next = next.wrapping_add(1);
            base = Some(usize::from(sib & 7));
            index = Some((usize::from(sib >> 3 & 7), sib >> 6)).filter(|(register, _)| *register != ESP);
        }
        let (displacement, size) = match mode {
            0 if base == Some(EBP) => {
                base = None;
                (self.word(next)?, 4)
            }
            0 => (0, 0),
            1 => (self.extended(next)?, 1),
            _ => (self.word(next)?, 4),
        };
        Some((Value::Memory(Address { base, index, displacement }), next.wrapping_add(size)))
    }
}

/// An instruction without a prefix of a segment, and its length (SDM Vol. 2, chapters 3 to 5).
fn decode(bytes: &Bytes) -> Option<(Action, u32)> {
    let [first, second, ..] = bytes.0;
    let eax = Value::Register(EAX);
    let absolute = || Some(Value::Memory(Address { base: None, index: None, displacement: bytes.word(1)? }));
    match (first, second) {
        (0xf3, 0xab) => return Some((Action::Fill, 2)),
        (0xf3, 0xa5) => return Some((Action::Copy, 2)),
        (0xa1, _) => return Some((Action::Move(eax, absolute()?), 5)),
        (0xa3, _) => return Some((Action::Move(absolute()?, eax), 5)),
        (0xb8..=0xbf, _) => {
            let to = Value::Register(usize::from(first & 7));
            return Some((Action::Move(to, Value::Immediate(bytes.word(1)?)), 5));
        }
        (0x00..=0x3f, _) if first & 7 == 5 => {
            let value = Value::Immediate(bytes.word(1)?);
            return Some((Action::Two(Operation::numbered(first >> 3)?, eax, value), 5));
        }
        (0x40..=0x4f, _) => return Some((Action::Count(usize::from(first & 7), first & 8 != 0), 1)),
        (0x90, _) => return Some((Action::Nothing, 1)),
        _ => {}
    }
    let locked = first == 0xf0;
    let start = u32::from(locked);
    let opcode = bytes.byte(start)?;
    let modrm = start.wrapping_add(1);
    let (operand, end) = bytes.operand(modrm)?;
    let number = bytes.byte(modrm)? >> 3 & 7;
    let register = usize::from(number);
    let memory = match operand {
        Value::Memory(address) => Some(address),
        _ => None,
    };
    if locked {
        return match (opcode, number) {
            (0x80, 4) => Some((Action::AndByte(memory?, bytes.byte(end)?), end.wrapping_add(1))),
            _ => None,
        };
    }
    let other = Value::Register(register);
    let word = || bytes.word(end).map(Value::Immediate);
    let (action, immediate) = match opcode {
        0x8b => (Action::Move(other, operand), 0),
        0x89 => (Action::Move(operand, other), 0),
        0x8d => (Action::Address(register, memory?), 0),
        0x87 => (Action::Swap(operand, register), 0),
        0x85 => (Action::Test(operand, other), 0),
        0xc7 if number == 0 => (Action::Move(operand, word()?), 4),
        0xf7 if number == 0 => (Action::Test(operand, word()?), 4),
        0xf6 if number == 0 => (Action::TestByte(memory?, bytes.byte(end)?), 1),
        0x81 => (Action::Two(Operation::numbered(number)?, operand, word()?), 4),
        0x83 => {
            let value = Value::Immediate(bytes.extended(end)?);
            (Action::Two(Operation::numbered(number)?, operand, value), 1)
        }
        0x00..=0x3f if opcode & 7 == 1 => (Action::Two(Operation::numbered(opcode >> 3)?, operand, other), 0),
        0x00..=0x3f if opcode & 7 == 3 => (Action::Two(Operation::numbered(opcode >> 3)?, other, operand), 0),
        0xc1 => {
            let Value::Register(to) = operand else { return None };
            let count = bytes.byte(end)? & 31;
            let shift = match number {
                4 => Shift::Left,
                5 => Shift::Right,
                7 => Shift::Signed,
                _ => return None,
            };
            (if count == 0 { Action::Nothing } else { Action::Shift(shift, to, count) }, 1)
        }
        _ => return None,
    };
    Some((action, end.wrapping_add(immediate)))
}

fn bit(on: bool, number: u32) -> u32 {
    u32::from(on) << number
}

/// PF, ZF and SF of a 32-bit result.
fn result_flags(result: u32) -> u32 {
    bit((result as u8).count_ones().is_multiple_of(2), 2) | bit(result == 0, 6) | bit(result >> 31 != 0, 7)
}

/// The arithmetic flags after an `and` or `test` of bytes; those of 32 bits are [`result_flags`].
fn byte_flags(result: u8) -> u32 {
    bit(result.count_ones().is_multiple_of(2), 2) | bit(result == 0, 6) | bit(result >> 7 != 0, 7)
}

/// The result and the flags of a shift by 1 to 31. OF is that of a shift by one; the manual does not say what else it is.
fn shifted(shift: Shift, value: u32, count: u8) -> (u32, u32) {
    let (before, last) = (u32::from(count).wrapping_sub(1), 31);
    let (result, carry, overflow) = match shift {
        Shift::Left => {
            let r = value.wrapping_shl(u32::from(count));
            let carry = value.wrapping_shl(before) >> last & 1;
            (r, carry, r >> last ^ carry)
        }
        Shift::Right => (value.wrapping_shr(u32::from(count)), value.wrapping_shr(before) & 1, value >> last),
        Shift::Signed => {
            let signed = |count| value.cast_signed().wrapping_shr(count).cast_unsigned();
            (signed(u32::from(count)), signed(before) & 1, 0)
        }
    };
    (result, result_flags(result) | carry | overflow << 11)
}

/// The guest code that made the access.
struct Cpu<'a> {
    gregs: &'a mut [i64; 23],
}

impl Cpu<'_> {
    fn get(&self, register: usize) -> u32 {
        let index = GENERAL.get(register).copied().unwrap_or(libc::REG_RAX);
        self.gregs.get(index as usize).copied().unwrap_or(0) as u32
    }
    fn set(&mut self, register: usize, value: u32) {
        let index = GENERAL.get(register).copied().unwrap_or(libc::REG_RAX);
        if let Some(place) = self.gregs.get_mut(index as usize) {
            *place = i64::from(value);
        }
    }
    fn lin(&self, address: Address) -> u32 {
        let base = address.base.map_or(0, |register| self.get(register));
        let index = address.index.map_or(0, |(register, power)| self.get(register) << power);
        base.wrapping_add(index).wrapping_add(address.displacement)
    }
    fn flags(&self) -> u32 {
        self.gregs[libc::REG_EFL as usize] as u32
    }
    fn set_arithmetic(&mut self, flags: u32) {
        self.gregs[libc::REG_EFL as usize] = i64::from(self.flags() & !ARITHMETIC | flags);
    }
    fn eip(&self) -> u32 {
        self.gregs[libc::REG_RIP as usize] as u32
    }
    fn go_behind(&mut self, len: u32) {
        self.gregs[libc::REG_RIP as usize] = i64::from(self.eip().wrapping_add(len));
    }
}

/// Guest memory with the rights of a ring.
struct Memory<'a> {
    ram: &'a Ram,
    places: Places<'a>,
    of: Whose<'a>,
}

/// Whose accesses, and to which pages.
#[derive(Clone, Copy)]
enum Whose<'a> {
    /// Ring 0's, to pages that are mapped for a moment only.
    Ring0(&'a [Fleeting; FLEETING]),
    /// Ring 3's, reads of this guest linear page.
    Ring3(u32),
}

impl Memory<'_> {
    /// Accesses to this guest linear address are done here.
    fn fits(&self, lin: u32) -> bool {
        match self.of {
            Whose::Ring0(known) => is_fleeting(known, lin >> 12),
            Whose::Ring3(page) => lin >> 12 == page,
        }
    }
    /// The page of ring 3's code at `eip`, as the guest's tables have it: in a keyed world the runtime cannot read what ring 3
    /// executes. None: it is a trampoline, or not what the tables have.
    fn code(&self, eip: u32) -> Option<Code> {
        let rules = self.places.rules;
        let page = eip >> 12;
        if rules.keeps_out(page, 1) {
            return None;
        }
        let frame = walk(self.ram, rules, eip, false, true)?.frame;
        self.ram.holds(frame >> 12).then(|| Code { page, at: ram_at(frame) })
    }
    /// The guest physical address of `lin`; A and D are set as the processor would. Code, devices and what is not the kernel's own
    /// are none of ours.
    fn at(&self, lin: u32, write: bool) -> Option<u64> {
        let rules = self.places.rules;
        if self.places.is_taken(lin.wrapping_add(rules.delta) >> 12) {
            return None;
        }
        let user = matches!(self.of, Whose::Ring3(_));
        if user && write {
            return None;
        }
        let page = walk(self.ram, rules, lin, write, user)?;
        let fits = (page.rights & right::USER != 0) == user
            && self.ram.holds(page.frame >> 12)
            && !(write && self.ram.is_watched(page.frame >> 12));
        fits.then_some(page.frame | u64::from(lin & 0xfff))
    }
}

/// The runtime's own address of guest RAM.
fn ram_at(at: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(RAM_VA.wrapping_add(at) as usize)
}

/// Does the access that faulted at world address `cr2` if the page is one that is mapped for a moment only, and a few plain
/// instructions behind it; the frame's registers are those behind them. False: nothing has changed (but A and D bits).
///
/// # Safety
/// In a world, `a` is its mapped arena, the world has the turn, and `gregs` are those of the frame of the page fault, which
/// interrupted guest code with these selectors in CS, SS, ES and DS.
pub(crate) unsafe fn perform(
    a: *mut Arena,
    gregs: &mut [i64; 23],
    cr2: u32,
    [cs, ss, es, ds]: [u16; 4],
) -> bool {
    // SAFETY: by contract; everything in the fill area but the rules is atomic.
    let (area, known, mode, delta, user_cs) = unsafe {
        let rules = &raw const (*a).fill.rules;
        (
            &(*a).fill,
            &(*a).fleeting,
            (&raw const (*rules).mode).read_volatile(),
            (&raw const (*rules).delta).read_volatile(),
            (&raw const (*rules).user_cs).read_volatile(),
        )
    };
    let lin = cr2.wrapping_sub(delta);
    let ring0 = user_cs != u32::from(cs) && mode.contains(FillMode::ENABLED | FillMode::SUPERVISOR);
    if !ring0 || !is_due(known, lin >> 12) || ds != ss || es != ss {
        return false;
    }
    // SAFETY: by contract.
    let rules = unsafe { (&raw const (*a).fill.rules).read_volatile() };
    let ram = Ram { pages: area.ram_pages.load(Relaxed) };
    let places = Places { rules: &rules, foreign: &area.foreign };
    let memory = Memory { ram: &ram, places, of: Whose::Ring0(known) };
    let mut cpu = Cpu { gregs };
    // A page of ring 3's, which in a keyed world the runtime cannot read.
    if rules.mode.contains(FillMode::KEYS) && walk(&ram, &rules, cpu.eip(), false, true).is_some() {
        return false;
    }
    let page = cpu.eip() >> 12;
    let code = Code { page, at: std::ptr::with_exposed_provenance((page << 12) as usize) };
    let done = go_on(&mut cpu, &memory, &code, lin);
    if done {
        area.accessed.store(area.accessed.load(Relaxed).wrapping_add(1), Relaxed);
    }
    done
}

/// A page fault that the guest is to see: error code, and guest linear address.
pub(crate) type Refused = (u32, u32);

/// Goes through ring 3's read that faulted at world address `cr2` and a few plain instructions behind it, if the page is one that is
/// expected to be written to, which the guest will answer with a copy of it: then it need not be mapped for the read. The frame's
/// registers are then those of the write, which the guest's tables do not allow. None: no such write was found, and nothing has
/// changed (but A bits).
///
/// # Safety
/// As [`perform`].
pub(crate) unsafe fn read_before_write(
    a: *mut Arena,
    gregs: &mut [i64; 23],
    cr2: u32,
    [cs, ss, es, ds]: [u16; 4],
) -> Option<Refused> {
    if !rc_window::windows().expects(cr2 >> 12) {
        return None;
    }
    // SAFETY: by contract; everything in the fill area but the rules is atomic.
    let (area, rules) = unsafe { (&(*a).fill, (&raw const (*a).fill.rules).read_volatile()) };
    let ring3 =
        rules.user_cs == u32::from(cs) && rules.mode.contains(FillMode::ENABLED | FillMode::SUPERVISOR);
    if !ring3 || ds != ss || es != ss {
        return None;
    }
    let lin = cr2.wrapping_sub(rules.delta);
    let ram = Ram { pages: area.ram_pages.load(Relaxed) };
    let places = Places { rules: &rules, foreign: &area.foreign };
    let memory = Memory { ram: &ram, places, of: Whose::Ring3(lin >> 12) };
    let mut tried = *gregs;
    let mut cpu = Cpu { gregs: &mut tried };
    let code = memory.code(cpu.eip())?;
    if !go_on(&mut cpu, &memory, &code, lin) {
        return None;
    }
    let (address, true) = decode(&code.bytes(cpu.eip())?)?.0.memory()? else { return None };
    let lin = cpu.lin(address);
    let access = Access { write: true, user: true, fetch: false };
    let error_code = refusal(&ram, &rules, lin, access).filter(|_| memory.fits(lin))?;
    *gregs = tried;
    area.accessed.store(area.accessed.load(Relaxed).wrapping_add(1), Relaxed);
    area.last.store(NO_FAULT, Relaxed);
    Some((error_code, lin))
}

/// Does the access that faulted at guest linear `lin` and a few plain instructions behind it, as far as `memory` has it and they are
/// in `code`. False: nothing has changed (but A and D bits).
fn go_on(cpu: &mut Cpu<'_>, memory: &Memory<'_>, code: &Code, lin: u32) -> bool {
    if cpu.flags() & TF != 0 {
        return false;
    }
    let mut faulted = Some(lin);
    for _ in 0..STEPS {
        let Some(bytes) = code.bytes(cpu.eip()) else { break };
        let Some(instruction) = decode(&bytes) else { break };
        if step(cpu, memory, instruction, faulted).is_none() {
            break;
        }
        faulted = None;
    }
    faulted.is_none()
}

/// A page of code.
struct Code {
    /// Its number in the guest's linear space.
    page: u32,
    /// Where the runtime can read it: what is made with another address is unsound.
    at: *const u8,
}

impl Code {
    /// The bytes of the instruction at `eip`, if it surely ends in this page.
    fn bytes(&self, eip: u32) -> Option<Bytes> {
        let offset = eip & 0xfff;
        if offset > 0x1000 - LENGTH || eip >> 12 != self.page {
            return None;
        }
        let mut bytes = Bytes([0; LENGTH as usize]);
        // SAFETY: they lie in the page at `at`, which the runtime can read: ring 0's is one an instruction was fetched from, mapped to
        // be read, too, with a key the runtime has; ring 3's is a frame of RAM.
        unsafe { copy(self.at.wrapping_add(offset as usize), bytes.0.as_mut_ptr(), bytes.0.len()) };
        Some(bytes)
    }
}

/// Carries out one instruction, which has faulted at a linear address or follows one that has. None: it cannot be done here, or is
/// better done natively, and nothing has changed.
fn step(
    cpu: &mut Cpu<'_>,
    memory: &Memory<'_>,
    (action, len): (Action, u32),
    faulted: Option<u32>,
) -> Option<()> {
    if matches!(action, Action::Fill | Action::Copy) {
        return string(cpu, memory, (action, len), faulted);
    }
    let place = match action.memory() {
        Some((address, write)) => {
            let lin = cpu.lin(address);
            let fits = faulted.map_or_else(|| memory.fits(lin), |at| at == lin);
            if !fits || !action.is_of_a_byte() && !lin.is_multiple_of(4) {
                return None;
            }
            Some((lin, memory.ram.word(memory.at(lin, write)? & !3)?))
        }
        // What has faulted is not what we think.
        None if faulted.is_some() => return None,
        None => None,
    };
    let (shift, word) = (place.map_or(0, |(lin, _)| 8 * (lin & 3)), place.map(|(_, word)| word));
    let read = |cpu: &Cpu<'_>, value| match value {
        Value::Register(register) => cpu.get(register),
        Value::Immediate(value) => value,
        Value::Memory(_) => word.map_or(0, |word| word.load(SeqCst)),
    };
    let write = |cpu: &mut Cpu<'_>, to, value| match to {
        Value::Register(register) => cpu.set(register, value),
        Value::Immediate(_) => {}
        Value::Memory(_) => word.into_iter().for_each(|word| word.store(value, SeqCst)),
    };
    let byte = |cpu: &Cpu<'_>, address| (read(cpu, Value::Memory(address)) >> shift) as u8;
    match action {
        Action::Move(to, from) => {
            let value = read(cpu, from);
            write(cpu, to, value);
        }
        Action::Address(register, address) => cpu.set(register, cpu.lin(address)),
        Action::Swap(place, register) => {
            let (old, new) = (read(cpu, place), cpu.get(register));
            write(cpu, place, new);
            cpu.set(register, old);
        }
        Action::Two(operation, to, from) => {
            let (result, flags) = operation.of(read(cpu, to), read(cpu, from));
            if operation != Operation::Cmp {
                write(cpu, to, result);
            }
            cpu.set_arithmetic(flags);
        }
        Action::Test(a, b) => cpu.set_arithmetic(result_flags(read(cpu, a) & read(cpu, b))),
        Action::TestByte(address, mask) => cpu.set_arithmetic(byte_flags(byte(cpu, address) & mask)),
        Action::AndByte(address, mask) => {
            let kept = u32::from(mask) << shift | !(0xff << shift);
            let old = read(cpu, Value::Memory(address));
            write(cpu, Value::Memory(address), old & kept);
            cpu.set_arithmetic(byte_flags((old >> shift) as u8 & mask));
        }
        Action::Shift(shift, register, count) => {
            let (result, flags) = shifted(shift, cpu.get(register), count);
            cpu.set(register, result);
            cpu.set_arithmetic(flags);
        }
        Action::Count(register, down) => {
            let value = cpu.get(register);
            let (result, flags) = if down { Operation::Sub } else { Operation::Add }.of(value, 1);
            cpu.set(register, result);
            cpu.set_arithmetic(flags & !CF | cpu.flags() & CF);
        }
        Action::Nothing | Action::Fill | Action::Copy => {}
    }
    cpu.go_behind(len);
    Some(())
}

/// `rep stosd` or `rep movsd` up to the end of a page, with which the instruction is not over if there is more to do.
fn string(
    cpu: &mut Cpu<'_>,
    memory: &Memory<'_>,
    (action, len): (Action, u32),
    faulted: Option<u32>,
) -> Option<()> {
    if matches!(memory.of, Whose::Ring3(_)) {
        return None;
    }
    let (count, from, to) = (cpu.get(ECX), cpu.get(ESI), cpu.get(EDI));
    let in_page = |lin: u32| 0x1000u32.wrapping_sub(lin & 0xfff) / 4;
    let copies = action == Action::Copy;
    let fleeting = |lin: u32| memory.fits(lin);
    // With segments that begin at 0 the fault is at one of these.
    let fits = match faulted {
        Some(lin) => lin == to || copies && lin == from,
        None => count != 0 && (fleeting(to) || copies && fleeting(from)),
    };
    if !fits || cpu.flags() & DF != 0 || !to.is_multiple_of(4) || copies && !from.is_multiple_of(4) {
        return None;
    }
    let n = count.min(in_page(to)).min(if copies { in_page(from) } else { u32::MAX });
    let bytes = n.wrapping_mul(4);
    if copies {
        let (source, target) = (memory.at(from, false)?, memory.at(to, true)?);
        if source >> 12 == target >> 12 {
            return None;
        }
        // SAFETY: both lie in frames of RAM, which is mapped for the world's whole life, and end in them; they are not the same.
        unsafe { copy(ram_at(source), ram_at(target), bytes as usize) };
        cpu.set(ESI, from.wrapping_add(bytes));
    } else {
        let target = memory.at(to, true)?;
        // SAFETY: as above.
        unsafe { fill_words(ram_at(target), cpu.get(EAX), n as usize) };
    }
    cpu.set(EDI, to.wrapping_add(bytes));
    cpu.set(ECX, count.wrapping_sub(n));
    if count == n {
        cpu.go_behind(len);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::Value::{Immediate, Memory as M, Register};
    use super::*;

    fn decoded(code: &[u8]) -> Option<(Action, u32)> {
        let mut bytes = [0xcc; LENGTH as usize];
        bytes[..code.len()].copy_from_slice(code);
        decode(&Bytes(bytes))
    }

    fn address(base: Option<usize>, index: Option<(usize, u8)>, displacement: u32) -> Address {
        Address { base, index, displacement }
    }

    #[test]
    fn lengths_and_operands_are_those_of_the_manual() {
        use Action::*;
        let at = |base| M(address(Some(base), None, 0));
        for (code, action) in [
            (&[0x8b, 0x01][..], Move(Register(0), at(1))),
            (&[0x8b, 0x58, 0xfc], Move(Register(3), M(address(Some(0), None, 0xffff_fffc)))),
            (&[0x8b, 0xb0, 1, 2, 3, 4], Move(Register(6), M(address(Some(0), None, 0x0403_0201)))),
            (&[0x8b, 0x3d, 1, 2, 3, 4], Move(Register(7), M(address(None, None, 0x0403_0201)))),
            (&[0x8b, 0x04, 0x8b], Move(Register(0), M(address(Some(3), Some((1, 2)), 0)))),
            (&[0x8b, 0x04, 0x24], Move(Register(0), M(address(Some(4), None, 0)))),
            (&[0x8b, 0x04, 0x8d, 1, 2, 3, 4], Move(Register(0), M(address(None, Some((1, 2)), 0x0403_0201)))),
            (&[0x8b, 0x44, 0x8d, 8], Move(Register(0), M(address(Some(5), Some((1, 2)), 8)))),
            (&[0x8b, 0xc1], Move(Register(0), Register(1))),
            (&[0xa1, 1, 2, 3, 4], Move(Register(0), M(address(None, None, 0x0403_0201)))),
            (&[0xa3, 1, 2, 3, 4], Move(M(address(None, None, 0x0403_0201)), Register(0))),
            (&[0x89, 0x0a], Move(at(2), Register(1))),
            (&[0xc7, 0, 0x78, 0x56, 0x34, 0x12], Move(at(0), Immediate(0x1234_5678))),
            (
                &[0xc7, 0x84, 0x8b, 4, 0, 0, 0, 0x78, 0x56, 0x34, 0x12],
                Move(M(address(Some(3), Some((1, 2)), 4)), Immediate(0x1234_5678)),
            ),
            (&[0x87, 0x0a], Swap(at(2), 1)),
            (&[0x39, 0x1e], Two(Operation::Cmp, at(6), Register(3))),
            (&[0x3b, 0x1e], Two(Operation::Cmp, Register(3), at(6))),
            (&[0x83, 0x3e, 0xff], Two(Operation::Cmp, at(6), Immediate(u32::MAX))),
            (&[0x83, 0xe7, 0xfc], Two(Operation::And, Register(7), Immediate(0xffff_fffc))),
            (&[0x81, 0xc1, 0, 0x10, 0, 0], Two(Operation::Add, Register(1), Immediate(0x1000))),
            (&[0x05, 0, 0x10, 0, 0], Two(Operation::Add, Register(0), Immediate(0x1000))),
            (&[0x29, 0xf9], Two(Operation::Sub, Register(1), Register(7))),
            (&[0x31, 0xc0], Two(Operation::Xor, Register(0), Register(0))),
            (&[0x85, 0x02], Test(at(2), Register(0))),
            (&[0xf7, 0x00, 1, 1, 0, 0], Test(at(0), Immediate(0x101))),
            (&[0xf6, 0x00, 0x81], TestByte(address(Some(0), None, 0), 0x81)),
            (&[0xf0, 0x80, 0x22, 0xfd], AndByte(address(Some(2), None, 0), 0xfd)),
            (&[0xc1, 0xe9, 2], Action::Shift(super::Shift::Right, 1, 2)),
            (&[0xc1, 0xe9, 0x20], Nothing),
            (&[0x8d, 0x78, 4], Action::Address(7, address(Some(0), None, 4))),
            (&[0xb9, 1, 0, 0, 0], Move(Register(1), Immediate(1))),
            (&[0x4e], Count(6, true)),
            (&[0x90], Nothing),
            (&[0xf3, 0xab], Fill),
            (&[0xf3, 0xa5], Copy),
        ] {
            assert_eq!(decoded(code), Some((action, code.len() as u32)), "{code:02x?}");
        }
        for code in [
            &[0x64, 0x8b, 0x01][..],
            &[0x66, 0x8b, 0x01],
            &[0xf0, 0x87, 0x0a],
            &[0x80, 0x22, 0xfd],
            &[0xc7, 0x48, 4],
            &[0x0f, 0xb6, 0x00],
            &[0xff, 0x30],
            &[0x11, 0xc0],
            &[0x1d, 1, 2, 3, 4],
            &[0x83, 0xd8, 1],
            &[0x8d, 0xc0],
            &[0x00, 0xc0],
            &[0xf4],
            &[0xe9],
        ] {
            assert_eq!(decoded(code), None, "{code:02x?}");
        }
    }

    #[test]
    fn a_page_is_fleeting_when_it_has_been_flushed_often_and_for_a_few_accesses() {
        let known: [Fleeting; FLEETING] = std::array::from_fn(|_| Fleeting {
            page: AtomicU32::new(0),
            flushes: AtomicU32::new(0),
            accesses: AtomicU32::new(0),
        });
        const PAGE: u32 = 0xf_ff12;
        for _ in 0..OFTEN {
            assert!(!is_due(&known, PAGE));
            flushed(&known, PAGE);
        }
        for _ in 0..FEW {
            assert!(is_due(&known, PAGE) && !is_due(&known, PAGE + 1) && !is_due(&known, 0));
        }
        assert!(!is_due(&known, PAGE) && is_fleeting(&known, PAGE));
        flushed(&known, PAGE);
        assert!(is_due(&known, PAGE));
        // Another page takes its place.
        flushed(&known, PAGE + FLEETING as u32);
        assert!(!is_due(&known, PAGE) && !is_due(&known, PAGE + FLEETING as u32));
    }
}
