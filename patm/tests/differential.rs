//! A patched program, interrupted anywhere, ends in the state the same program reaches on bare metal.
//!
//! Random programs of sensitive and ordinary instructions run on a toy processor twice: bare, and deprivileged from the
//! code view with its trampolines, where a kick may come between any two instructions. A kick makes the test do what the
//! monitor does: translate the state with the EIP map, look at it, and go on from the guest's EIP.

mod common;
use common::machine::{ARITHMETIC, DF, Event, IF, Machine, Mode};
use common::{BASE, Scanned, VCPU, config};
use patm::{Location, Patm, ReasonKind, VcpuWords, vcpu_page as page};
use proptest::prelude::*;

const STEPS: usize = 500;

/// Instructions without a direct branch.
const PLAIN: &[&[u8]] = &[
    &[0xfa],                         // cli
    &[0xfb],                         // sti
    &[0x9c],                         // pushfd
    &[0x9d],                         // popfd
    &[0x0e],                         // push cs
    &[0x16],                         // push ss
    &[0x1e],                         // push ds
    &[0x0f, 0xa8],                   // push gs
    &[0x1f],                         // pop ds
    &[0x07],                         // pop es
    &[0x0f, 0xa1],                   // pop fs
    &[0x8c, 0xd8],                   // mov eax, ds
    &[0x66, 0x8c, 0xc9],             // mov cx, cs
    &[0x8c, 0x5c, 0x24, 0x04],       // mov [esp+4], ds
    &[0x8c, 0x20],                   // mov [eax], fs
    &[0x8c, 0x04, 0x11],             // mov [ecx+edx], es
    &[0x8e, 0xd8],                   // mov ds, eax
    &[0x8e, 0xe9],                   // mov gs, ecx
    &[0x8e, 0xc3],                   // mov es, ebx
    &[0x8e, 0x5c, 0x24, 0x04],       // mov ds, [esp+4]
    &[0x8e, 0x20],                   // mov fs, [eax]
    &[0x36, 0x8e, 0x44, 0x0d, 0x08], // mov es, ss:[ebp+ecx+8]
    &[0x0f, 0x20, 0xc0],             // mov eax, cr0
    &[0x0f, 0x20, 0xd9],             // mov ecx, cr3
    &[0xec],                         // in al, dx
    &[0x2e, 0x8b, 0x03],             // mov eax, cs:[ebx]
    &[0x66, 0x9c],                   // pushf
    &[0x50],                         // push eax
    &[0x51],                         // push ecx
    &[0x59],                         // pop ecx
    &[0x5b],                         // pop ebx
    &[0x01, 0xc8],                   // add eax, ecx
    &[0x31, 0xd2],                   // xor edx, edx
    &[0x89, 0xc3],                   // mov ebx, eax
    &[0x8b, 0x44, 0x24, 0x08],       // mov eax, [esp+8]
    &[0x83, 0xe8, 0x10],             // sub eax, 10h
    &[0x85, 0xc9],                   // test ecx, ecx
    &[0x41],                         // inc ecx
    &[0x90],                         // nop
    &[0x8d, 0x44, 0x08, 0x04],       // lea eax, [eax+ecx+4]
    &[0xb8, 0x08, 0x00, 0x00, 0x00], // mov eax, 8
    &[0xb9, 0x01, 0x00, 0x00, 0x00], // mov ecx, 1
    &[0xff, 0x13],                   // call [ebx]
    &[0xcf],                         // iretd
    &[0x0f, 0x06],                   // clts
    &[0x0f, 0x00, 0xe8],             // verw eax
    &[0x0f, 0x00, 0x6c, 0x24, 0x04], // verw [esp+4]
    &[0x8e, 0xd0],                   // mov ss, eax
    &[0x17],                         // pop ss
    &[0xc5, 0x03],                   // lds eax, [ebx]
    &[0xc4, 0x4c, 0x24, 0x04],       // les ecx, [esp+4]
    &[0x0f, 0xb4, 0x10],             // lfs edx, [eax]
    &[0x36, 0x0f, 0xb5, 0x1c, 0x11], // lgs ebx, ss:[ecx+edx]
    &[0x0f, 0xb2, 0x2b],             // lss ebp, [ebx]
    &[0x0f, 0xb2, 0x64, 0x24, 0x08], // lss esp, [esp+8]
    &[0x0f, 0x01, 0x44, 0x24, 0x04], // sgdt [esp+4]
    &[0x0f, 0x01, 0x0b],             // sidt [ebx]
    &[0x0f, 0x00, 0xc0],             // sldt eax
    &[0x0f, 0x00, 0x01],             // sldt [ecx]
    &[0x66, 0x0f, 0x00, 0xc9],       // str cx
    &[0x0f, 0x01, 0xe0],             // smsw eax
    &[0x0f, 0x01, 0x23],             // smsw [ebx]
    &[0x0f, 0x00, 0xe0],             // verr eax
    &[0x0f, 0x02, 0xd8],             // lar ebx, eax
    &[0x0f, 0x02, 0x44, 0x24, 0x04], // lar eax, [esp+4]
    &[0x0f, 0x03, 0xc8],             // lsl ecx, eax
    &[0x0f, 0x03, 0xc0],             // lsl eax, eax
    &[0x0f, 0x09],                   // wbinvd
    &[0x0f, 0x08],                   // invd
    &[0x6a, 0x10],                   // push 10h
    &[0xb8, 0x10, 0x00, 0x00, 0x00], // mov eax, 10h
];
/// Opcodes with an 8-bit displacement, then `call rel32`.
const BRANCHES: &[u8] = &[0x74, 0x75, 0x72, 0x78, 0x7c, 0xe3, 0xe2, 0xe1, 0xeb, 0xe8];

#[derive(Clone, Debug)]
enum Item {
    Plain(usize),
    /// Opcode index, and how many items it jumps over.
    Branch(usize, usize),
    /// `pushfd; push cs; push imm32; iretd` over so many items.
    Iret(usize),
    /// `jmp` (or `call`) `ptr16:32` over so many items.
    FarBranch(bool, usize),
    /// `push cs; push imm32; retf` over so many items.
    FarReturn(usize),
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        5 => (0..PLAIN.len()).prop_map(Item::Plain),
        1 => (0..BRANCHES.len(), 0..4usize).prop_map(|(op, over)| Item::Branch(op, over)),
        1 => (0..3usize).prop_map(Item::Iret),
        1 => (any::<bool>(), 0..3usize).prop_map(|(call, over)| Item::FarBranch(call, over)),
        1 => (0..3usize).prop_map(Item::FarReturn),
    ]
}

/// The code, and where its `iretd`s and far transfers go.
fn assemble(items: &[Item]) -> (Vec<u8>, Vec<u32>) {
    let mut targets = Vec::new();
    let len = |i: &Item| match *i {
        Item::Plain(n) => PLAIN[n].len(),
        Item::Branch(op, _) => {
            if BRANCHES[op] == 0xe8 {
                5
            } else {
                2
            }
        }
        Item::Iret(_) => 8,
        Item::FarBranch(..) | Item::FarReturn(_) => 7,
    };
    let mut code = Vec::new();
    for (n, item) in items.iter().enumerate() {
        match *item {
            Item::Plain(p) => code.extend_from_slice(PLAIN[p]),
            Item::Iret(over) => {
                let rel: usize = items.iter().skip(n + 1).take(over).map(len).sum();
                let target = BASE + (code.len() + 8 + rel) as u32;
                targets.push(target);
                code.extend_from_slice(&[0x9c, 0x0e, 0x68]);
                code.extend_from_slice(&target.to_le_bytes());
                code.push(0xcf);
            }
            Item::FarBranch(call, over) => {
                let rel: usize = items.iter().skip(n + 1).take(over).map(len).sum();
                let target = BASE + (code.len() + 7 + rel) as u32;
                targets.push(target);
                code.push(if call { 0x9a } else { 0xea });
                code.extend_from_slice(&target.to_le_bytes());
                // Where the call comes back to is known only when it does.
                targets.push(BASE + (code.len() + 2) as u32);
                code.extend_from_slice(&[0x60, 0]);
            }
            Item::FarReturn(over) => {
                let rel: usize = items.iter().skip(n + 1).take(over).map(len).sum();
                let target = BASE + (code.len() + 7 + rel) as u32;
                targets.push(target);
                code.extend_from_slice(&[0x0e, 0x68]);
                code.extend_from_slice(&target.to_le_bytes());
                code.push(0xcb);
            }
            Item::Branch(op, over) => {
                let rel: usize = items.iter().skip(n + 1).take(over).map(len).sum();
                code.push(BRANCHES[op]);
                if BRANCHES[op] == 0xe8 {
                    code.extend_from_slice(&(rel as u32).to_le_bytes());
                } else {
                    code.push(rel as u8);
                }
            }
        }
    }
    code.extend_from_slice(&[0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc]); // ret and filler
    (code, targets)
}

fn machine(seed: u64) -> Machine {
    let mut x = seed | 1;
    let mut random = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 16) as u32
    };
    let mut gpr = [0; 8];
    for r in &mut gpr {
        *r = if random() & 1 == 0 { random() & 0x3ff } else { random() & 0x00ff_ffff };
    }
    gpr[4] = 0x0020_0000;
    let mut m = Machine {
        gpr,
        flags: random() & (ARITHMETIC | DF),
        eip: BASE,
        hw_sel: [7, 15, 23, 31, 39, 47],
        limits: std::collections::BTreeMap::new(),
        absent: None,
        pkru: 0,
        mem: std::collections::BTreeMap::new(),
    };
    for at in (page::IF_FLAG..0x1000).step_by(4) {
        m.set_word(at, 0);
    }
    m.set_word(page::IF_FLAG, random() & IF);
    m.set_word(page::HIDDEN_FLAGS, if random() & 7 == 0 { 0x20_0000 } else { 0 });
    m.set_word(page::PENDING, random() & 1);
    for n in 0..6 {
        m.set_word(page::SELECTORS + 4 * n, [0x7b, 0x60, 0x68, 0x7b, 0xd8, 0xe0][n as usize]);
    }
    for cr in [page::CR0, page::CR2, page::CR3, page::CR4] {
        m.set_word(cr, random());
    }
    for word in [page::IDT_BASE, page::IDT_LIMIT, page::LDTR, page::TR] {
        m.set_word(word, random() & if word == page::IDT_BASE { u32::MAX } else { 0xffff });
    }
    let gdt = 0x0300_0000u32;
    m.set_word(page::GDT_BASE, gdt);
    m.set_word(page::GDT_LIMIT, (random() & 0x3ff) | 7);
    for n in 0..page::SEGMENT_CACHE_LEN {
        let (mut low, mut high) = (random(), random());
        if n == 2 || n == 13 || random() & 3 == 0 {
            // What SS may be in ring 0; sometimes not quite.
            (low, high) = (0xffff, 0x00cf_9200 | random() & 0x10_0100);
            high ^= if random() & 7 == 0 { 1 << (random() & 31) } else { 0 };
            low ^= if random() & 15 == 0 { 1 << (random() & 31) } else { 0 };
        }
        m.write(gdt + 8 * n, 4, low);
        m.write(gdt + 8 * n + 4, 4, high);
        let entry = page::SEGMENT_CACHE + 16 * n;
        let stale = random() & 7;
        m.set_word(entry, low ^ u32::from(stale == 1));
        m.set_word(entry + 4, high ^ u32::from(stale == 2));
        m.set_word(entry + 8, 0x1000 + 8 * n + 7);
        m.set_word(entry + 12, if stale == 3 { 0 } else { 1 | random() << 16 });
    }
    let cs = 0x60;
    let stale = random() & 15;
    m.set_word(page::USER_CS, page::IRET_NOWHERE);
    m.set_word(page::IRET_CS, if stale == 0 { page::IRET_NOWHERE } else { cs });
    m.set_word(page::IRET_DESC_AT, gdt + cs);
    m.set_word(page::IRET_DESC_LOW, m.read(gdt + cs, 4) ^ u32::from(stale == 1));
    m.set_word(page::IRET_DESC_HIGH, m.read(gdt + cs + 4, 4) ^ u32::from(stale == 2));
    m
}

struct Words<'a>(&'a mut Machine);
impl VcpuWords for Words<'_> {
    fn read(&mut self, offset: u32) -> u32 {
        self.0.word(offset)
    }
    fn write(&mut self, offset: u32, value: u32) {
        self.0.set_word(offset, value);
    }
}

struct Patched {
    scanned: Scanned,
    patm: Patm,
    view: Vec<u8>,
    traps: usize,
}

impl Patched {
    fn code_at(&self, eip: u32) -> Option<Vec<u8>> {
        for t in self.patm.patches().filter_map(|p| p.trampoline.as_ref()) {
            if let Some(rest) = t.code.get(eip.wrapping_sub(t.at) as usize..).filter(|r| !r.is_empty()) {
                return Some(rest.to_vec());
            }
        }
        self.view.get(eip.wrapping_sub(BASE) as usize..).filter(|r| !r.is_empty()).map(<[u8]>::to_vec)
    }

    /// The monitor interprets one instruction of the original code, then the hardware goes on.
    fn emulate(&self, m: &mut Machine) {
        let original = &self.scanned.bytes[(m.eip - BASE) as usize..];
        assert_eq!(m.step(original, Mode::Bare), Event::Done);
        if m.word(page::SELECTORS + 4) != m.word(page::IRET_CS) {
            m.set_word(page::IRET_CS, page::IRET_NOWHERE); // it is the running segment or none
        }
        m.eip = self.patm.resume_eip(m.eip);
    }

    /// Turns the state into the guest's at an instruction boundary of the original code.
    fn to_guest(&self, m: &mut Machine) {
        match self.patm.locate(m.eip) {
            Location::Guest | Location::PatchStart(_) => {}
            Location::MidWindow { forward, .. } => assert!(forward.is_some(), "at {:x}", m.eip),
            Location::Trampoline { fix, .. } => {
                let (mut gpr, mut flags) = (m.gpr, m.flags);
                m.eip = fix.apply(&mut gpr, &mut flags, &mut Words(m));
                (m.gpr, m.flags) = (gpr, flags);
            }
            Location::Stray => panic!("no boundary at {:x}", m.eip),
        }
    }

    fn run(&mut self, m: &mut Machine, kicks: Option<u64>) {
        let interrupted = kicks.is_some();
        let mut kicks = kicks.unwrap_or(0) | 1;
        for _ in 0..STEPS * 200 {
            kicks ^= kicks << 13;
            kicks ^= kicks >> 7;
            kicks ^= kicks << 17;
            if interrupted && kicks >> 20 & 7 == 0 {
                self.to_guest(m);
                m.eip = self.patm.resume_eip(m.eip);
            }
            let Some(code) = self.code_at(m.eip) else { return };
            match m.step(&code, Mode::Deprivileged) {
                Event::Done => {}
                Event::Fault => {
                    self.traps += 1;
                    match self.patm.locate(m.eip) {
                        Location::MidWindow { forward: Some(eip), .. } => m.eip = eip,
                        Location::PatchStart(id) => {
                            assert_eq!(self.patm.get(id).unwrap().tactic, patm::Tactic::TrapByte);
                            self.emulate(m);
                        }
                        other => panic!("fault at {:x}: {other:?}", m.eip),
                    }
                }
                Event::Gate => {
                    let (_, site, kind) = self.patm.by_reason(m.word(page::GATE_REASON)).unwrap();
                    if kind == ReasonKind::Emulate {
                        m.eip = site.at.0;
                        self.emulate(m);
                    } else {
                        assert_eq!(m.word(page::IF_FLAG), IF);
                        assert_ne!(m.word(page::PENDING), 0);
                        let iret = kind == ReasonKind::PendingAfterIret;
                        let eip = if iret { m.word(page::SCRATCH_TARGET) } else { site.next().0 };
                        m.eip = self.patm.resume_eip(eip);
                    }
                }
            }
        }
        panic!("the patched program does not end");
    }
}

/// Everything the guest can see.
fn visible(m: &Machine) -> Machine {
    let mut m = m.clone();
    for at in (page::SCRATCH..page::GDT_BASE).chain(page::SCRATCH_FLAGS..page::SEGMENT_CACHE) {
        m.mem.remove(&(VCPU + at));
    }
    m
}

fn compare(items: &[Item], seed: u64, kicks: u64, count_inline: bool) -> Result<usize, TestCaseError> {
    let (code, targets) = assemble(items);
    let mut scanned = Scanned::new(&code);
    for target in targets {
        scanned.scan_from(target);
    }
    let mut bare = machine(seed);
    let mut steps = 0;
    while let Some(rest) = code.get(bare.eip.wrapping_sub(BASE) as usize..).filter(|r| !r.is_empty()) {
        // A program that returns into the middle of an instruction is another program; nobody scanned it.
        prop_assume!(scanned.map.is_instruction_start(csam::GuestLin(bare.eip)));
        prop_assert_eq!(bare.step(rest, Mode::Bare), Event::Done);
        steps += 1;
        prop_assume!(steps < STEPS);
    }
    // It ended by going to an address that happened to be on the stack. Our own memory is not for the guest.
    prop_assume!(bare.eip.wrapping_sub(config().tramp_base) >= config().tramp_len);
    let mut patm = Patm::new(patm::Config { count_inline, ..config() });
    scanned.patch_all(&mut patm);
    let view = scanned.view(&patm);
    let mut patched = Patched { scanned, patm, view, traps: 0 };
    let mut m = machine(seed);
    patched.run(&mut m, Some(kicks));
    let (m, bare) = (visible(&m), visible(&bare));
    prop_assert!(m == bare, "{}", m.against(&bare));
    Ok(patched.traps)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn a_patched_program_interrupted_anywhere_behaves_like_the_original(
        items in prop::collection::vec(item(), 1..24), seed: u64, kicks: u64, count: bool,
    ) {
        compare(&items, seed, kicks, count)?;
    }
}

#[test]
fn in_line_executions_are_counted_by_kind() {
    // cli; pushfd; popfd; sti; push ds; pop ds; clts; mov eax, cr0; pushfd; push cs; push 1f; iretd; 1: ret
    let [a, b, c, d] = (BASE + 21).to_le_bytes();
    let code = [
        0xfa, 0x9c, 0x9d, 0xfb, 0x1e, 0x6a, 0x00, 0x1f, 0x0f, 0x06, 0x0f, 0x20, 0xc0, 0x9c, 0x0e, 0x68, a, b,
        c, d, 0xcf, 0xc3,
    ];
    let mut scanned = Scanned::new(&code);
    scanned.scan_from(BASE + 21);
    let mut patm = Patm::new(patm::Config { count_inline: true, ..config() });
    scanned.patch_all(&mut patm);
    let view = scanned.view(&patm);
    let mut patched = Patched { scanned, patm, view, traps: 0 };
    let mut m = machine(2);
    m.set_word(page::CR0, 0x8005_0033);
    m.set_word(page::PENDING, 0);
    m.set_word(page::HIDDEN_FLAGS, 0);
    patched.run(&mut m, None);
    use csam::SensitiveKind as K;
    for kind in [K::Cli, K::Popf, K::Sti, K::PopSreg, K::MovFromCr, K::Clts, K::Iret] {
        assert_eq!(m.word(page::COUNTERS + 4 * patm::counter(kind)), 1, "{kind:?}");
    }
    for kind in [K::Pushf, K::PushSreg] {
        assert_eq!(m.word(page::COUNTERS + 4 * patm::counter(kind)), 2, "{kind:?}");
    }
    assert_eq!(m.word(page::COUNTERS + 4 * patm::counter(K::MovToSreg)), 0);
    assert_eq!(patched.traps, 0);
}
