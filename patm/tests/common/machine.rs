//! A toy processor: enough of the instruction set to run what trampolines and the test programs are made of.
//!
//! In [`Mode::Bare`] sensitive instructions do what the guest means by them (state in the vCPU page's words). In
//! [`Mode::Deprivileged`] they do what hardware does to ring 3: `popf` drops IF, `cli` faults, and so on.
#![allow(dead_code, unreachable_pub)]

use super::VCPU;
use iced_x86::{Code, ConditionCode, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use patm::vcpu_page as page;
use std::collections::BTreeMap;

pub const ARITHMETIC: u32 = 0x8d5;
pub const DF: u32 = 0x400;
pub const IF: u32 = 0x200;
/// NT, AC, ID: flags that ring 3 may have in the hardware.
const USER_ONLY: u32 = 0x24_4000;
const HELD_BACK: u32 = 0x24_7100;
/// What the monitor of these tests loads for a selector the segment cache does not serve.
pub const UNCACHED: u16 = 0xdea7;

/// Where what ring 3 may reach ends.
pub const RING3_END: u32 = 0xb000_0000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Bare,
    Deprivileged,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The instruction is done.
    Done,
    /// It faults and has changed nothing.
    Fault,
    /// It left through the gate.
    Gate,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    pub gpr: [u32; 8],
    pub flags: u32,
    pub eip: u32,
    pub hw_sel: [u16; 6],
    /// Hardware selectors whose segments end here.
    pub limits: BTreeMap<u16, u32>,
    /// A page, as its first address, that is not there.
    pub absent: Option<u32>,
    /// PKRU: with bit 0 set, what is not ring 3's is out of reach.
    pub pkru: u32,
    pub mem: BTreeMap<u32, u8>,
}

fn seg_index(r: Register) -> usize {
    [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS]
        .iter()
        .position(|&s| s == r)
        .unwrap()
}

fn is_far(i: &Instruction) -> bool {
    matches!(i.code(), Code::Jmp_ptr1632 | Code::Jmp_m1632 | Code::Call_ptr1632 | Code::Call_m1632)
}

impl Machine {
    pub fn byte(&self, at: u32) -> u8 {
        // Memory nobody wrote: a fixed pattern, mostly small so that words make plausible selectors and flags.
        self.mem.get(&at).copied().unwrap_or_else(|| {
            let h = (at.wrapping_mul(0x9e37_79b1) >> 13) as u8;
            if at & 1 == 0 { h & 0x7f } else { h & 3 }
        })
    }
    pub fn read(&self, at: u32, size: u32) -> u32 {
        (0..size).map(|i| u32::from(self.byte(at.wrapping_add(i))) << (8 * i)).sum()
    }
    pub fn write(&mut self, at: u32, size: u32, value: u32) {
        for i in 0..size {
            self.mem.insert(at.wrapping_add(i), (value >> (8 * i)) as u8);
        }
    }
    pub fn word(&self, offset: u32) -> u32 {
        self.read(VCPU + offset, 4)
    }
    pub fn set_word(&mut self, offset: u32, value: u32) {
        self.write(VCPU + offset, 4, value);
    }

    fn address(&self, i: &Instruction) -> u32 {
        let reg = |r: Register| if r == Register::None { 0 } else { self.reg(r) };
        let a = reg(i.memory_base())
            .wrapping_add(reg(i.memory_index()).wrapping_mul(i.memory_index_scale()))
            .wrapping_add(i.memory_displacement32());
        if i.memory_base().size() == 2 { a & 0xffff } else { a }
    }
    fn reg(&self, r: Register) -> u32 {
        let n = r.number();
        match r.size() {
            4 => self.gpr[n],
            2 => self.gpr[n] & 0xffff,
            _ if n >= 4 => self.gpr[n - 4] >> 8 & 0xff,
            _ => self.gpr[n] & 0xff,
        }
    }
    fn set_reg(&mut self, r: Register, v: u32) {
        let n = r.number();
        match r.size() {
            4 => self.gpr[n] = v,
            2 => self.gpr[n] = self.gpr[n] & !0xffff | v & 0xffff,
            _ if n >= 4 => self.gpr[n - 4] = self.gpr[n - 4] & !0xff00 | (v & 0xff) << 8,
            _ => self.gpr[n] = self.gpr[n] & !0xff | v & 0xff,
        }
    }
    fn size(i: &Instruction, op: u32) -> u32 {
        match i.op_kind(op) {
            OpKind::Register => i.op_register(op).size() as u32,
            OpKind::Memory => i.memory_size().size() as u32,
            _ => 4,
        }
    }
    fn get(&self, i: &Instruction, op: u32) -> u32 {
        match i.op_kind(op) {
            OpKind::Register => self.reg(i.op_register(op)),
            OpKind::Memory => self.read(self.address(i), i.memory_size().size() as u32),
            _ => i.immediate(op) as u32,
        }
    }
    fn set(&mut self, i: &Instruction, op: u32, v: u32) {
        match i.op_kind(op) {
            OpKind::Register => self.set_reg(i.op_register(op), v),
            _ => self.write(self.address(i), i.memory_size().size() as u32, v),
        }
    }
    fn push(&mut self, size: u32, v: u32) {
        self.gpr[4] = self.gpr[4].wrapping_sub(size);
        self.write(self.gpr[4], size, v);
    }
    fn pop(&mut self, size: u32) -> u32 {
        let v = self.read(self.gpr[4], size);
        self.gpr[4] = self.gpr[4].wrapping_add(size);
        v
    }

    fn logic_flags(&mut self, size: u32, r: u32) {
        let mask = if size == 4 { u32::MAX } else { (1 << (8 * size)) - 1 };
        let r = r & mask;
        self.flags &= !ARITHMETIC;
        self.flags |= if r == 0 { 0x40 } else { 0 };
        self.flags |= if r >> (8 * size - 1) & 1 != 0 { 0x80 } else { 0 };
        self.flags |= if (r as u8).count_ones().is_multiple_of(2) { 4 } else { 0 };
    }
    fn add_flags(&mut self, size: u32, a: u32, b: u32, sub: bool) -> u32 {
        let mask = if size == 4 { u32::MAX } else { (1 << (8 * size)) - 1 };
        let (a, b) = (a & mask, b & mask);
        let r = if sub { a.wrapping_sub(b) } else { a.wrapping_add(b) } & mask;
        self.logic_flags(size, r);
        let top = 8 * size - 1;
        let carry = if sub { a < b } else { r < a };
        let overflow = if sub { (a ^ b) & (a ^ r) } else { !(a ^ b) & (a ^ r) } >> top & 1 != 0;
        self.flags |= u32::from(carry) | u32::from(overflow) << 11 | (a ^ b ^ r) & 0x10;
        r
    }
    fn condition(&self, c: ConditionCode) -> bool {
        let f = |bit: u32| self.flags >> bit & 1 != 0;
        let (cf, pf, zf, sf, of) = (f(0), f(2), f(6), f(7), f(11));
        use ConditionCode as C;
        match c {
            C::o => of,
            C::no => !of,
            C::b => cf,
            C::ae => !cf,
            C::e => zf,
            C::ne => !zf,
            C::be => cf || zf,
            C::a => !cf && !zf,
            C::s => sf,
            C::ns => !sf,
            C::p => pf,
            C::np => !pf,
            C::l => sf != of,
            C::ge => sf == of,
            C::le => zf || sf != of,
            C::g => !zf && sf == of,
            C::None => panic!("no condition"),
        }
    }

    /// May the segment cache serve this selector? Written from the meaning of the cache, not from the trampoline.
    fn cached(&self, selector: u16) -> Option<u16> {
        let index = u32::from(selector >> 3);
        if selector & 4 != 0 || index >= page::SEGMENT_CACHE_LEN || index * 8 + 7 > self.word(page::GDT_LIMIT)
        {
            return None;
        }
        let gdt = self.word(page::GDT_BASE) + index * 8;
        let entry = page::SEGMENT_CACHE + index * 16;
        let (low, high) = (self.read(gdt, 4), self.read(gdt + 4, 4));
        let same = self.word(entry) == low && self.word(entry + 4) == high && self.word(entry + 12) & 1 == 1;
        (same && (selector & 3 == 0 || high >> 13 & 3 == 3)).then(|| self.word(entry + 8) as u16)
    }
    /// The descriptor of a selector the cache knows and that is not null.
    fn descriptor(&self, selector: u16) -> Option<(u32, u32)> {
        self.cached(selector).filter(|_| selector > 3)?;
        let gdt = self.word(page::GDT_BASE) + u32::from(selector & !7);
        Some((self.read(gdt, 4), self.read(gdt + 4, 4)))
    }
    /// May the cache serve it for SS: a flat stack segment of ring 0?
    fn flat_stack(&self, selector: u16) -> bool {
        self.descriptor(selector).is_some_and(|(low, high)| {
            let base = low >> 16 | (high & 0xff) << 16 | high & 0xff00_0000;
            let limit = low & 0xffff | high & 0xf_0000;
            let big_pages_present_writable = high & 0xc0_fe00 == 0xc0_9200 && high & 0x20_0000 == 0;
            base == 0 && limit == 0xf_ffff && big_pages_present_writable && selector & 3 == 0
        })
    }
    fn load_segment(&mut self, seg: usize, selector: u16) {
        self.hw_sel[seg] = if seg == 2 && !self.flat_stack(selector) {
            UNCACHED
        } else if selector < 4 {
            selector
        } else {
            self.cached(selector).unwrap_or(UNCACHED)
        };
        self.set_word(page::SELECTORS + 4 * seg as u32, u32::from(selector));
    }

    /// Does an explicit memory operand lie behind a limit or in a page that is not there?
    fn faults(&self, i: &Instruction) -> bool {
        let has_memory = (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory);
        if !has_memory || i.mnemonic() == Mnemonic::Lea {
            return false;
        }
        let at = self.address(i);
        let limit = self.limits.get(&self.hw_sel[seg_index(i.memory_segment())]);
        let forbidden = self.pkru & 1 != 0 && at >= RING3_END && at & !0xfff != VCPU + page::TRANSIT;
        limit.is_some_and(|&limit| at >= limit) || self.absent == Some(at & !0xfff) || forbidden
    }

    /// What differs, for people.
    pub fn against(&self, other: &Machine) -> String {
        let mut text =
            format!("{:x?}\n{:x?}\n", (self.gpr, self.flags, self.eip), (other.gpr, other.flags, other.eip));
        text += &format!("{:x?} {:x?}\n", self.hw_sel, other.hw_sel);
        for at in self.mem.keys().chain(other.mem.keys()) {
            let (a, b) = (self.mem.get(at), other.mem.get(at));
            if a != b {
                text += &format!("{at:x}: {a:x?} {b:x?}\n");
            }
        }
        text
    }

    /// Runs one instruction of `code` (what instruction fetch sees at EIP).
    pub fn step(&mut self, code: &[u8], mode: Mode) -> Event {
        let i = Decoder::with_ip(32, code, u64::from(self.eip), DecoderOptions::NONE).decode();
        let next = self.eip.wrapping_add(i.len() as u32);
        let bare = mode == Mode::Bare;
        let mut eip = next;
        if self.faults(&i) {
            return Event::Fault;
        }
        match i.mnemonic() {
            Mnemonic::Cli | Mnemonic::Sti if bare => {
                self.set_word(page::IF_FLAG, if i.mnemonic() == Mnemonic::Sti { IF } else { 0 });
            }
            Mnemonic::In if bare => self.set_reg(Register::AL, 0x5a),
            Mnemonic::Cli | Mnemonic::Sti | Mnemonic::In | Mnemonic::Hlt | Mnemonic::Out => {
                return Event::Fault;
            }
            Mnemonic::Insb | Mnemonic::Insd | Mnemonic::Outsb | Mnemonic::Outsd => return Event::Fault,
            Mnemonic::Pushfd | Mnemonic::Pushf => {
                let size = if i.code() == Code::Pushfd { 4 } else { 2 };
                let virt = self.word(page::IF_FLAG) | self.word(page::HIDDEN_FLAGS);
                let native = ARITHMETIC | DF | if bare { 0 } else { USER_ONLY };
                let image = self.flags & native | 2 | if bare { virt } else { IF };
                self.push(size, image);
            }
            Mnemonic::Popfd | Mnemonic::Popf => {
                let size = if i.code() == Code::Popfd { 4 } else { 2 };
                let image = self.pop(size);
                self.flags = image & (ARITHMETIC | DF);
                if bare {
                    self.set_word(page::IF_FLAG, image & IF);
                    let kept = if size == 2 { self.word(page::HIDDEN_FLAGS) & 0xffff_0000 } else { 0 };
                    self.set_word(page::HIDDEN_FLAGS, image & HELD_BACK & !0x100 | kept);
                } else {
                    assert_eq!(image & HELD_BACK, 0, "hardware flags must not get these");
                }
            }
            Mnemonic::Iretd if !bare && self.gpr[4] == VCPU + page::USER_FRAME => {
                let words: [u32; 5] = std::array::from_fn(|_| self.pop(4));
                eip = words[0];
                self.hw_sel[1] = words[1] as u16;
                self.flags = words[2] & (ARITHMETIC | DF);
                assert_eq!(words[2] & HELD_BACK, 0, "hardware flags must not get these");
                self.gpr[4] = words[3];
                self.hw_sel[2] = words[4] as u16;
            }
            Mnemonic::Iretd => {
                assert!(bare, "iret would go by the host's tables");
                eip = self.pop(4);
                let cs = self.pop(4) & 0xffff;
                self.set_word(page::SELECTORS + 4, cs);
                let image = self.pop(4);
                self.flags = image & (ARITHMETIC | DF);
                self.set_word(page::IF_FLAG, image & IF);
                self.set_word(page::HIDDEN_FLAGS, image & HELD_BACK & !0x100);
            }
            Mnemonic::Wrpkru => {
                assert_eq!((self.gpr[1], self.gpr[2]), (0, 0));
                self.pkru = self.gpr[0];
            }
            Mnemonic::Clts => {
                assert!(bare);
                let cr0 = self.word(page::CR0) & !8;
                self.set_word(page::CR0, cr0);
            }
            Mnemonic::Verw | Mnemonic::Verr | Mnemonic::Lar | Mnemonic::Lsl => {
                assert!(bare, "it would look into the host's tables");
                let op = u32::from(matches!(i.mnemonic(), Mnemonic::Lar | Mnemonic::Lsl));
                let selector = match i.op_kind(op) {
                    OpKind::Register => self.reg(i.op_register(op)) as u16,
                    _ => self.read(self.address(&i), 2) as u16,
                };
                let mut found = self.descriptor(selector);
                match (i.mnemonic(), found) {
                    (Mnemonic::Verw, _) => found = found.filter(|d| d.1 & 0x1a00 == 0x1200),
                    (Mnemonic::Verr, _) => found = found.filter(|d| d.1 & 0x1800 == 0x1000),
                    (Mnemonic::Lar, Some((_, high))) => self.set(&i, 0, high & 0x00ff_ff00),
                    (_, Some((low, high))) => {
                        let limit = low & 0xffff | high & 0xf_0000;
                        let limit = if high >> 23 & 1 == 0 { limit } else { limit << 12 | 0xfff };
                        self.set(&i, 0, limit);
                    }
                    _ => {}
                }
                self.flags = self.flags & !0x40 | u32::from(found.is_some()) << 6;
            }
            Mnemonic::Sgdt | Mnemonic::Sidt => {
                assert!(bare);
                let gdt = i.mnemonic() == Mnemonic::Sgdt;
                let (base, limit) =
                    if gdt { (page::GDT_BASE, page::GDT_LIMIT) } else { (page::IDT_BASE, page::IDT_LIMIT) };
                let (base, limit, at) = (self.word(base), self.word(limit), self.address(&i));
                self.write(at, 2, limit);
                self.write(at.wrapping_add(2), 4, base);
            }
            Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Smsw => {
                assert!(bare);
                let from = match i.mnemonic() {
                    Mnemonic::Sldt => page::LDTR,
                    Mnemonic::Str => page::TR,
                    _ => page::CR0,
                };
                let v = self.word(from);
                match i.op0_kind() {
                    OpKind::Register => self.set_reg(i.op0_register(), v),
                    _ => self.write(self.address(&i), 2, v),
                }
            }
            Mnemonic::Wbinvd | Mnemonic::Invd => assert!(bare),
            Mnemonic::Shl => {
                let v = self.get(&i, 0) << (self.get(&i, 1) & 31);
                self.logic_flags(4, v); // CF and OF are not looked at
                self.set(&i, 0, v);
            }
            Mnemonic::Lahf => self.set_reg(Register::AH, self.flags & 0xd5 | 2),
            Mnemonic::Sahf => self.flags = self.flags & !0xd5 | self.reg(Register::AH) & 0xd5,
            Mnemonic::Seto => self.set(&i, 0, self.flags >> 11 & 1),
            Mnemonic::Push if i.op0_register().is_segment_register() => {
                assert!(bare, "push sreg would show the hardware selector");
                self.push(4, self.word(page::SELECTORS + 4 * seg_index(i.op0_register()) as u32));
            }
            Mnemonic::Pop if i.op0_register().is_segment_register() => {
                assert!(bare, "pop sreg would load from the host's tables");
                let selector = self.pop(4) as u16;
                self.load_segment(seg_index(i.op0_register()), selector);
            }
            Mnemonic::Push => {
                let v = self.get(&i, 0);
                self.push(4, v);
            }
            Mnemonic::Pop => {
                let v = self.pop(4);
                self.set(&i, 0, v);
            }
            Mnemonic::Mov if i.op_register(1).is_segment_register() => {
                let n = seg_index(i.op1_register());
                let v =
                    if bare { self.word(page::SELECTORS + 4 * n as u32) } else { u32::from(self.hw_sel[n]) };
                match i.op0_kind() {
                    OpKind::Register => self.set_reg(i.op0_register(), v),
                    _ => self.write(self.address(&i), 2, v),
                }
            }
            Mnemonic::Mov if i.op_register(0).is_segment_register() => {
                let selector = match i.op1_kind() {
                    OpKind::Register => self.reg(i.op1_register()) as u16,
                    _ => self.read(self.address(&i), 2) as u16,
                };
                let seg = seg_index(i.op0_register());
                if bare {
                    self.load_segment(seg, selector);
                } else {
                    self.hw_sel[seg] = selector;
                }
            }
            Mnemonic::Mov if i.op_register(1).is_cr() => {
                assert!(bare);
                let n = i.op1_register().number() as u32;
                let offset = [page::CR0, 0, page::CR2, page::CR3, page::CR4][n as usize];
                self.set_reg(i.op0_register(), self.word(offset));
            }
            Mnemonic::Mov => {
                assert!(bare || i.segment_prefix() != Register::CS, "a read through CS shows the code view");
                let v = self.get(&i, 1);
                self.set(&i, 0, v);
            }
            Mnemonic::Movzx => {
                let v = self.get(&i, 1);
                self.set(&i, 0, v);
            }
            Mnemonic::Lea => {
                let v = self.address(&i);
                self.set(&i, 0, v);
            }
            Mnemonic::Add | Mnemonic::Sub | Mnemonic::Cmp => {
                let (a, b) = (self.get(&i, 0), self.get(&i, 1));
                let r = self.add_flags(Self::size(&i, 0), a, b, i.mnemonic() != Mnemonic::Add);
                if i.mnemonic() != Mnemonic::Cmp {
                    self.set(&i, 0, r);
                }
            }
            Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test => {
                let (a, b) = (self.get(&i, 0), self.get(&i, 1));
                let r = match i.mnemonic() {
                    Mnemonic::Or => a | b,
                    Mnemonic::Xor => a ^ b,
                    _ => a & b,
                };
                self.logic_flags(Self::size(&i, 0), r);
                if i.mnemonic() != Mnemonic::Test {
                    self.set(&i, 0, r);
                }
            }
            Mnemonic::Inc | Mnemonic::Dec => {
                let carry = self.flags & 1;
                let a = self.get(&i, 0);
                let r = self.add_flags(Self::size(&i, 0), a, 1, i.mnemonic() == Mnemonic::Dec);
                self.flags = self.flags & !1 | carry;
                self.set(&i, 0, r);
            }
            Mnemonic::Nop => {}
            Mnemonic::Jecxz => {
                if self.gpr[1] == 0 {
                    eip = i.near_branch32();
                }
            }
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
                self.gpr[1] = self.gpr[1].wrapping_sub(1);
                let zf = self.flags & 0x40 != 0;
                let goes = match i.mnemonic() {
                    Mnemonic::Loope => zf,
                    Mnemonic::Loopne => !zf,
                    _ => true,
                };
                if self.gpr[1] != 0 && goes {
                    eip = i.near_branch32();
                }
            }
            Mnemonic::Jmp | Mnemonic::Call if is_far(&i) && (bare || !i.is_jmp_far_indirect()) => {
                assert!(bare, "a far transfer would go by the host's tables");
                let (target, selector) = match i.op0_kind() {
                    OpKind::FarBranch32 => (i.far_branch32(), u32::from(i.far_branch_selector())),
                    _ => {
                        let at = self.address(&i);
                        (self.read(at, 4), self.read(at.wrapping_add(4), 2))
                    }
                };
                if i.mnemonic() == Mnemonic::Call {
                    self.push(4, self.word(page::SELECTORS + 4));
                    self.push(4, next);
                }
                self.set_word(page::SELECTORS + 4, selector);
                eip = target;
            }
            Mnemonic::Call => {
                let target = match i.op0_kind() {
                    OpKind::NearBranch32 => i.near_branch32(),
                    _ => self.get(&i, 0),
                };
                self.push(4, next);
                eip = target;
            }
            Mnemonic::Ret => eip = self.pop(4),
            Mnemonic::Lss if !bare => {
                let at = self.address(&i);
                self.set_reg(i.op0_register(), self.read(at, 4));
                self.hw_sel[2] = self.read(at + 4, 2) as u16;
            }
            Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs => {
                assert!(bare);
                let at = self.address(&i);
                let seg = match i.mnemonic() {
                    Mnemonic::Les => 0,
                    Mnemonic::Lss => 2,
                    Mnemonic::Lds => 3,
                    Mnemonic::Lfs => 4,
                    _ => 5,
                };
                let (offset, selector) = (self.read(at, 4), self.read(at.wrapping_add(4), 2) as u16);
                self.load_segment(seg, selector);
                self.set_reg(i.op0_register(), offset);
            }
            Mnemonic::Jmp if i.is_jmp_far_indirect() && !bare => {
                let at = self.address(&i);
                if at == VCPU + page::GATE {
                    return Event::Gate;
                }
                eip = self.read(at, 4);
                self.hw_sel[1] = self.read(at + 4, 2) as u16;
            }
            Mnemonic::Retf => {
                assert!(bare);
                eip = self.pop(4);
                let cs = self.pop(4) & 0xffff;
                self.set_word(page::SELECTORS + 4, cs);
                if i.op_count() == 1 {
                    self.gpr[4] = self.gpr[4].wrapping_add(u32::from(i.immediate16()));
                }
            }
            Mnemonic::Jmp => {
                eip = match i.op0_kind() {
                    OpKind::NearBranch32 => i.near_branch32(),
                    _ => self.get(&i, 0),
                }
            }
            _ if i.is_jcc_short_or_near() => {
                if self.condition(i.condition_code()) {
                    eip = i.near_branch32();
                }
            }
            _ => panic!("the toy processor has no {i} ({code:02x?})"),
        }
        self.eip = eip;
        Event::Done
    }
}
