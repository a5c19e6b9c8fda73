//! Random 32-bit ring-0 code in which sensitive instructions are frequent, in every position a patch may find hard.

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// 0..n.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }
    /// True once in n.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// One of them.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
    fn byte(&mut self) -> u8 {
        self.bits() as u8
    }
}

/// Where things are in the guest, as linear addresses.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// First byte of the code pages.
    pub code: u32,
    /// The same frames once more.
    pub alias: u32,
    /// Data that may be written.
    pub data: u32,
    /// A page that may not be written, then one that is absent.
    pub guarded: u32,
}

/// Selectors of the guest's GDT.
pub mod sel {
    #![allow(missing_docs)]
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const SMALL: u16 = 0x18;
    pub const USER: u16 = 0x23;
    pub const CONFORMING: u16 = 0x28;
    pub const ABSENT: u16 = 0x30;
    pub const READ_ONLY: u16 = 0x38;
    pub const CODE_TOO: u16 = 0x40;
    /// What data segment registers may hold, mostly.
    pub const LOADS: [u16; 9] = [DATA, DATA, USER, SMALL, READ_ONLY, 0, 3, ABSENT, CODE];
}

/// A reference from the code to one of its own items, filled in at the end.
enum Fix {
    Rel8,
    Rel32,
    Abs32,
    /// Absolute, a few bytes further, in either view of the code.
    Store(u32),
}

/// Code and where its instructions start.
pub struct Code {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Offsets of the items.
    pub starts: Vec<u32>,
}

struct Writer<'a> {
    wild: bool,
    r: &'a mut Random,
    p: Places,
    bytes: Vec<u8>,
    starts: Vec<u32>,
    fixes: Vec<(usize, usize, Fix)>,
}

/// Makes code of about `items` instructions that begins `at` bytes into the code pages.
///
/// Only `wild` code jumps into the middle of instructions, or becomes of another length when it writes to itself: the
/// same bytes are then two streams of instructions.
pub fn generate(r: &mut Random, p: Places, at: u32, items: usize, wild: bool) -> Code {
    let mut w = Writer { wild, r, p, bytes: Vec::new(), starts: Vec::new(), fixes: Vec::new() };
    for _ in 0..items {
        w.starts.push(w.bytes.len() as u32);
        w.item();
    }
    w.starts.push(w.bytes.len() as u32);
    w.b(&[0xf4]);
    let Writer { r, mut bytes, starts, fixes, .. } = w;
    for (place, item, fix) in fixes {
        let to = starts[item.min(starts.len() - 1)];
        let to = if wild && r.one_in(12) { to + r.below(5) as u32 } else { to };
        match fix {
            Fix::Rel8 => {
                let d = i64::from(to) - (place as i64 + 1);
                bytes[place] = i8::try_from(d).unwrap_or(0) as u8;
            }
            Fix::Rel32 => put(&mut bytes, place, to.wrapping_sub(place as u32 + 4)),
            Fix::Abs32 => put(&mut bytes, place, p.code + at + to),
            Fix::Store(more) => {
                let base = if r.one_in(3) { p.alias } else { p.code };
                let single = starts.windows(2).position(|w| w[0] >= to && w[1] == w[0] + 1);
                let to = match single {
                    _ if wild => to + more,
                    Some(n) => starts[n],
                    None => starts[starts.len() - 1],
                };
                put(&mut bytes, place, base + at + to);
            }
        }
    }
    if wild && r.one_in(6) {
        for _ in 0..r.below(8) {
            let n = r.below(bytes.len() as u64) as usize;
            bytes[n] ^= 1 << r.below(8);
        }
    }
    Code { bytes, starts }
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

impl Writer<'_> {
    fn b(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }
    fn w32(&mut self, v: u32) {
        self.b(&v.to_le_bytes());
    }
    /// `rep movsd` of a count that is seen to be small, in one way or another.
    fn short_copy(&mut self) {
        for register in [0xbe, 0xbf] {
            if !self.r.one_in(4) {
                let at = self.data_address();
                self.b(&[register]);
                self.w32(at);
            }
        }
        let (words, in_bytes) = (self.r.below(24) as u32, self.r.one_in(2));
        self.b(&[0xb9]);
        self.w32(if in_bytes { 4 * words } else { words });
        if in_bytes {
            self.b(&[0xc1, 0xe9, 2]);
        }
        let direction = self.r.pick(&[0xfc, 0xfc, 0xfc, 0xfd]);
        self.b(&[direction, 0xf3, 0xa5]);
    }
    /// A register other than ESP.
    fn reg(&mut self) -> u8 {
        self.r.pick(&[0, 1, 2, 3, 5, 6, 7])
    }
    fn data_address(&mut self) -> u32 {
        if self.r.one_in(24) {
            return self.p.guarded + self.r.below(0x2000) as u32;
        }
        self.p.data + self.r.below(0x1ff0) as u32
    }
    fn near(&mut self) -> usize {
        let here = self.starts.len() - 1;
        if self.r.one_in(5) {
            here.saturating_sub(self.r.below(6) as usize)
        } else {
            here + 1 + self.r.below(10) as usize
        }
    }
    fn fix(&mut self, item: usize, fix: Fix) {
        let n = if matches!(fix, Fix::Rel8) { 1 } else { 4 };
        self.fixes.push((self.bytes.len(), item, fix));
        self.bytes.extend(vec![0; n]);
    }

    fn item(&mut self) {
        if self.r.one_in(2) {
            self.plain();
        } else {
            self.sensitive();
        }
    }

    fn plain(&mut self) {
        let (a, c) = (self.reg(), self.reg());
        let imm = self.r.byte();
        match self.r.below(24) {
            0..=3 => {
                let op = self.r.pick(&[0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31, 0x39, 0x85, 0x89, 0x87]);
                self.b(&[op, 0xc0 | a << 3 | c]);
            }
            4 => {
                let n = self.r.below(8) as u8;
                self.b(&[0x83, 0xc0 | n << 3 | a, imm]);
            }
            5 => {
                self.b(&[0xb8 + a]);
                let v = self.r.bits() as u32;
                self.w32(v);
            }
            6 => {
                let op = self.r.pick(&[0x40, 0x48]);
                self.b(&[op + a]);
            }
            7 => self.b(&[0x50 + a]),
            8 => self.b(&[0x58 + a]),
            9 => {
                // With a displacement on the stack, ESP or a pointer register.
                let op = self.r.pick(&[0x8b, 0x89, 0x03, 0x39, 0x8d]);
                if self.r.one_in(3) {
                    let d = 4 * self.r.below(8) as u8;
                    self.b(&[op, 0x44 | a << 3, 0x24, d]);
                } else {
                    let base = self.r.pick(&[3, 5, 6, 7]);
                    self.b(&[op, 0x40 | a << 3 | base, imm]);
                }
            }
            10 => {
                let op = self.r.pick(&[0x8b, 0x89, 0x01]);
                self.b(&[op, 0x05 | a << 3]);
                let at = self.data_address();
                self.w32(at);
            }
            11 => {
                let nop: &[u8] = self.r.pick(&[
                    &[0x90],
                    &[0x66, 0x90],
                    &[0x0f, 0x1f, 0x00],
                    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
                    &[0x8d, 0x74, 0x26, 0x00],
                ]);
                self.b(nop);
            }
            12..=14 => {
                let item = self.near();
                let cc = self.r.below(16) as u8;
                if self.r.one_in(3) {
                    self.b(&[0x0f, 0x80 | cc]);
                    self.fix(item, Fix::Rel32);
                } else {
                    self.b(&[0x70 | cc]);
                    self.fix(item, Fix::Rel8);
                }
            }
            15 => {
                let item = self.near();
                match self.r.below(4) {
                    0 => self.b(&[0xe9]),
                    1 => self.b(&[0xe8]),
                    2 => {
                        self.b(&[0xeb]);
                        return self.fix(item, Fix::Rel8);
                    }
                    _ => {
                        self.b(&[0xb8 + a]);
                        self.fix(item, Fix::Abs32);
                        let how = self.r.pick(&[0xe0, 0xd0]);
                        return self.b(&[0xff, how | a]);
                    }
                }
                self.fix(item, Fix::Rel32);
            }
            16 => {
                let item = self.near();
                let op = self.r.pick(&[0xe0, 0xe1, 0xe2, 0xe3]);
                self.b(&[op]);
                self.fix(item, Fix::Rel8);
            }
            17 if self.r.one_in(2) => self.short_copy(),
            17 => {
                let n = self.r.below(20) as u8;
                self.b(&[0x6a, n, 0x59]);
                let op: &[u8] = self.r.pick(&[&[0xf3, 0xa4], &[0xf3, 0xab], &[0xf3, 0xa6], &[0xa5], &[0xaa]]);
                self.b(op);
            }
            18 => {
                let op = self.r.pick(&[0xfc, 0xfd, 0xf8, 0xf9, 0xf5, 0x9e, 0x9f, 0x98, 0x99, 0xc9]);
                self.b(&[op]);
            }
            19 => {
                let cc = self.r.below(16) as u8;
                let op = self.r.pick(&[0x40, 0x90]);
                self.b(&[0x0f, op | cc, 0xc0 | a << 3 | (c & 3)]);
            }
            20 => {
                let op = self.r.pick(&[0x64, 0x65, 0x26, 0x2e, 0x36]);
                let store = self.r.pick(&[0x8b, 0x8b, 0x89]);
                self.b(&[op, store, 0x05 | a << 3]);
                let at = if self.r.one_in(2) { self.r.below(0xff0) as u32 } else { self.data_address() };
                self.w32(at);
            }
            21 => {
                // The guest writes to its own code.
                let item = self.near() + self.r.below(3) as usize;
                let more = self.r.below(4) as u32;
                match if self.wild { self.r.below(3) } else { 0 } {
                    0 => {
                        self.b(&[0xc6, 0x05]);
                        self.fix(item, Fix::Store(more));
                        let v = self.r.pick(&[0x90, 0xfa, 0xfb, 0x9c, 0x9d, 0xf4, 0xcc, 0x40, 0x16]);
                        self.b(&[v]);
                    }
                    1 => {
                        self.b(&[0xc7, 0x05]);
                        self.fix(item, Fix::Store(0));
                        let v = self.r.pick(&[0x9090_9090, 0xfb9d_9cfa, 0x5890_9c90, 0x0000_03eb]);
                        self.w32(v);
                    }
                    _ => {
                        self.b(&[0x80, 0x35]);
                        self.fix(item, Fix::Store(more));
                        let v = 1 << self.r.below(8);
                        self.b(&[v]);
                    }
                }
            }
            22 => {
                let op = self.r.pick(&[0x60, 0x61, 0x9c]);
                self.b(&[op]);
            }
            _ => {
                if self.r.one_in(6) {
                    self.b(&[0xc3]);
                } else {
                    self.b(&[0xc0 | 1, 0xc0 | a, 1]);
                }
            }
        }
    }

    fn sensitive(&mut self) {
        let a = self.reg();
        let cc = self.r.below(16) as u8;
        match self.r.below(34) {
            0..=2 => self.b(&[0xfa]),
            3..=4 => self.b(&[0xfb]),
            5..=6 => self.b(&[0x9c]),
            7 => self.b(&[0x9d]),
            8 => self.b(&[0x9c, 0x58 + a]),
            9 => self.b(&[0x9c, 0xfa, 0x9d]),
            10 => self.b(&[0x50 + a, 0x9d]),
            11 => {
                // pushf; or/and [esp], imm; popf
                let bits =
                    self.r.pick(&[0x200u32, 0x40, 0x3000, 0x4000, 0x4_0000, 0x20_0000, 0x1_0000, 0x400]);
                self.b(&[0x9c, 0x81]);
                if self.r.one_in(2) {
                    self.b(&[0x0c, 0x24]);
                    self.w32(bits);
                } else {
                    self.b(&[0x24, 0x24]);
                    self.w32(!bits);
                }
                self.b(&[0x9d]);
            }
            12 => {
                let op = self.r.pick(&[0x9c, 0x9d]);
                self.b(&[0x66, op]);
            }
            13..=14 => {
                let op: &[u8] =
                    self.r.pick(&[&[0x06], &[0x0e], &[0x16], &[0x1e], &[0x0f, 0xa0], &[0x0f, 0xa8]]);
                if self.r.one_in(6) {
                    self.b(&[0x66]);
                }
                self.b(op);
            }
            15..=16 => {
                let s = self.r.pick(&sel::LOADS) as u8;
                self.b(&[0x6a, s]);
                let op: &[u8] = self.r.pick(&[&[0x07], &[0x1f], &[0x17], &[0x0f, 0xa1], &[0x0f, 0xa9]]);
                self.b(op);
            }
            17 => {
                let s = self.r.pick(&[sel::DATA, sel::USER, sel::SMALL, 0]) as u32;
                self.b(&[0xb8 + a]);
                self.w32(s);
                let which = self.r.pick(&[0, 3, 3, 4, 5]);
                self.b(&[0x8e, 0xc0 | which << 3 | a]);
            }
            18 => {
                // mov ss; mov esp, esp: what Linux does when it changes stacks.
                self.b(&[0x8c, 0xd0 | a, 0x8e, 0xd0 | a, 0x89, 0xe4]);
            }
            19 => {
                let which = self.r.below(6) as u8;
                if self.r.one_in(3) {
                    self.b(&[0x8c, 0x05 | which << 3]);
                    let at = self.data_address();
                    self.w32(at);
                } else {
                    if self.r.one_in(6) {
                        self.b(&[0x66]);
                    }
                    self.b(&[0x8c, 0xc0 | which << 3 | a]);
                }
            }
            20 => {
                let cr = self.r.pick(&[0, 0, 2, 3, 4]);
                self.b(&[0x0f, 0x20, 0xc0 | cr << 3 | a]);
                if self.r.one_in(3) {
                    self.b(&[0x0f, 0x22, 0xc0 | cr << 3 | a]);
                }
            }
            21 => {
                let port = self.r.pick(&[0xed, 0xee, 0xef]);
                let op = self.r.pick(&[0xe4, 0xe6, 0xe7, 0xe5]);
                self.b(&[op, port]);
            }
            22 => {
                self.b(&[0xba]);
                let port = self.r.pick(&[0xed, 0xee, 0xef]);
                self.w32(port);
                let op = self.r.pick(&[0xec, 0xee, 0xef, 0xed]);
                self.b(&[op]);
            }
            23 => {
                // An iret to the same ring.
                let item = self.near();
                self.b(&[0x9c, 0x0e, 0x68]);
                self.fix(item, Fix::Abs32);
                self.b(&[0xcf]);
            }
            24 => {
                let item = self.near();
                let cs = self.r.pick(&[sel::CODE, sel::CODE_TOO, sel::CONFORMING, sel::DATA]);
                if self.r.one_in(2) {
                    self.b(&[0x6a, cs as u8, 0x68]);
                    self.fix(item, Fix::Abs32);
                    self.b(&[0xcb]);
                } else {
                    let op = self.r.pick(&[0xea, 0x9a]);
                    self.b(&[op]);
                    self.fix(item, Fix::Abs32);
                    self.b(&cs.to_le_bytes());
                }
            }
            25 => {
                let int: &[u8] = self.r.pick(&[&[0xcd, 0x80], &[0xcd, 0x2e], &[0xcc], &[0xce], &[0xcd, 3]]);
                self.b(int);
            }
            26..=27 => {
                // je 1f; sti; 1:
                let op: &[u8] = self.r.pick(&[
                    &[0xfb],
                    &[0xfa],
                    &[0x9d],
                    &[0x9c],
                    &[0x0f, 0x20, 0xd8],
                    &[0xfa, 0x90],
                    &[0x0f, 0x06],
                    &[0xfb, 0x40],
                    &[0x8e, 0xdb],
                ]);
                self.b(&[0x70 | cc, op.len() as u8]);
                self.b(op);
            }
            28 => {
                let op: &[u8] = self.r.pick(&[
                    &[0x0f, 0x06],
                    &[0x0f, 0x09],
                    &[0xf3, 0xfa],
                    &[0x66, 0xfb],
                    &[0x2e, 0x9c],
                    &[0xf3, 0x9d],
                    &[0x66, 0x66, 0xfa],
                    &[0x3e, 0x3e, 0x26, 0xfb],
                ]);
                self.b(op);
            }
            29 => {
                // sgdt, sidt, smsw, invlpg; sldt, str, verr, verw
                let group = self.r.pick(&[(1, 0), (1, 1), (1, 4), (1, 7), (0, 0), (0, 1), (0, 4), (0, 5)]);
                self.b(&[0x0f, group.0, 0x05 | group.1 << 3]);
                let at = self.data_address();
                self.w32(at);
            }
            30 => {
                let op = self.r.pick(&[0x00, 0x01]);
                let n = if op == 1 { 4 } else { self.r.pick(&[0, 1, 4, 5]) };
                self.b(&[0x0f, op, 0xc0 | n << 3 | a]);
            }
            31 => {
                let to = self.reg();
                let op = self.r.pick(&[2, 3]);
                self.b(&[0x0f, op, 0xc0 | to << 3 | a]);
            }
            32 => {
                // les, lds, lfs, lgs from a far pointer on the stack
                let s = self.r.pick(&sel::LOADS) as u8;
                self.b(&[0x6a, s, 0x50 + a]);
                let op: &[u8] = self.r.pick(&[&[0xc4], &[0xc5], &[0x0f, 0xb4], &[0x0f, 0xb5], &[0x0f, 0xb2]]);
                self.b(op);
                self.b(&[0x04 | a << 3, 0x24]);
            }
            _ => {
                if !self.wild || self.r.one_in(8) {
                    let op = self.r.pick(&[0xf4, 0xfb, 0x9c]);
                    self.b(&[op]);
                } else {
                    let n = self.r.below(2) + 1;
                    for _ in 0..n {
                        let b = self.r.byte();
                        self.b(&[b]);
                    }
                }
            }
        }
    }
}

/// Makes a loop whose sensitive instructions all complete in trampolines: somewhere to be interrupted.
pub fn generate_loop(r: &mut Random, p: Places, turns: u32) -> Code {
    let mut w = Writer { wild: false, r, p, bytes: Vec::new(), starts: vec![0], fixes: Vec::new() };
    // mov dword [data + 0x1ff8], turns
    w.b(&[0xc7, 0x05]);
    w.w32(p.data + 0x1ff8);
    w.w32(turns);
    let top = w.bytes.len();
    for _ in 0..10 {
        w.starts.push(w.bytes.len() as u32);
        let a = w.reg();
        let cc = w.r.below(16) as u8;
        let flags = w.r.pick(&[0x202u32, 0x2, 0x246, 0xad7]);
        match w.r.below(17) {
            0 => w.b(&[0xfa]),
            1 => w.b(&[0xfb]),
            16 => w.short_copy(),
            2 => w.b(&[0x9c, 0x58 + a]),
            3 => w.b(&[0x9c, 0xfa, 0x9d]),
            4 => {
                w.b(&[0x68]);
                w.w32(flags);
                w.b(&[0x9d]);
            }
            5 => {
                let push = w.r.pick(&[[0x1e, 0x1f], [0x06, 0x07], [0x16, 0x17]]);
                w.b(&push);
            }
            6 => w.b(&[0x0f, 0xa0, 0x0f, 0xa1]),
            7 => w.b(&[0x8c, 0xd8 | a, 0x8e, 0xd8 | a]),
            8 => w.b(&[0x8c, 0xd0 | a, 0x8e, 0xd0 | a, 0x89, 0xe4]),
            9 => {
                let op = w.r.pick(&[0xfb, 0xfa]);
                w.b(&[0x70 | cc, 1, op]);
            }
            10 => w.b(&[0x0f, 0x20, 0xd0 | a]),
            11 => w.b(&[0x0e, 0x58 + a]),
            12 => w.b(&[0x9c, 0x81, 0x34, 0x24, 0x41, 0x02, 0x00, 0x00, 0x9d]),
            13 => w.b(&[0x40 + a]),
            14 => w.b(&[0x50 + a, 0xfa, 0x58 + a]),
            _ => w.b(&[0x8d, 0x44, 0x24, 0x04]),
        }
    }
    // dec dword [data + 0x1ff8]; jnz top; hlt
    w.b(&[0xff, 0x0d]);
    w.w32(p.data + 0x1ff8);
    w.b(&[0x0f, 0x85]);
    let back = (top as u32).wrapping_sub(w.bytes.len() as u32 + 4);
    w.w32(back);
    w.b(&[0xf4]);
    Code { bytes: w.bytes, starts: w.starts }
}
