//! From ring 0 to ring 3 and back in line: at every boundary the guest is before the instruction or behind it.
//!
//! What `iret` and `int n` do is written here a second time, from the manual, as a change of the guest's state. Each
//! trampoline runs on the toy processor; before each of its instructions the state is translated and compared.

mod common;
use common::machine::{ARITHMETIC, DF, Event, IF, Machine, Mode};
use common::{BASE, Scanned, VCPU, config};
use csam::{CodeMap, CodeSize, GuestLin, ScanOptions, SliceSource};
use iced_x86::{Code, Decoder, DecoderOptions, Register};
use patm::{
    Config, Fix, Keys, Location, LongGate, Patm, Refusal, Trampoline, UserPatch, UserPatcher, VcpuWords,
    vcpu_page as page,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Where ring 3's segments end.
const LIMIT: u32 = 0xb000_0000;
const USER: u32 = 0x0804_8000;
const USER_VCPU: u32 = VCPU;
const GDT: u32 = 0xc300_0000;
const IDT: u32 = 0xc310_0000;
const TSS: u32 = 0xc320_0000;
const STACK0: u32 = 0xc330_0ffc;
const STACK3: u32 = 0x0900_0000;
const HANDLER: u32 = BASE;
/// Guest selectors.
const CS0: u16 = 0x60;
const SS0: u16 = 0x68;
const CS3: u16 = 0x73;
const SS3: u16 = 0x7b;
/// Host selectors.
const HOST_CS0: u16 = 0x23;
const HOST_SS0: u16 = 0x107;
const HOST_CS3: u16 = 0x10f;
const HOST_SS3: u16 = 0x117;
const IOPL: u32 = 0x3000;
const DATA: [usize; 4] = [0, 3, 4, 5];

/// What is wrong, and how it gets so.
type Spoil = (&'static str, fn(&mut Machine));

struct Words<'a>(&'a mut Machine);
impl VcpuWords for Words<'_> {
    fn read(&mut self, offset: u32) -> u32 {
        self.0.word(offset)
    }
    fn write(&mut self, offset: u32, value: u32) {
        self.0.set_word(offset, value);
    }
}

/// What the guest can see of its state.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Guest {
    gpr: [u32; 8],
    flags: u32,
    eip: u32,
    selectors: [u32; 6],
    if_flag: u32,
    hidden: u32,
    cpl: u32,
    frame: Vec<u32>,
}

fn guest(m: &Machine) -> Guest {
    Guest {
        gpr: m.gpr,
        flags: m.flags & (ARITHMETIC | DF),
        eip: m.eip,
        selectors: std::array::from_fn(|n| m.word(page::SELECTORS + 4 * n as u32)),
        if_flag: m.word(page::IF_FLAG),
        hidden: m.word(page::HIDDEN_FLAGS),
        cpl: m.word(page::CPL),
        frame: Vec::new(),
    }
}

/// Translates the state at a trampoline boundary.
fn fixed(m: &Machine, fix: &Fix) -> Guest {
    let mut m = m.clone();
    let (mut gpr, mut flags) = (m.gpr, m.flags);
    m.eip = fix.apply(&mut gpr, &mut flags, &mut Words(&mut m));
    (m.gpr, m.flags) = (gpr, flags);
    let state = guest(&m);
    if let Some(cpl) = fix.cpl {
        assert_eq!(u32::from(cpl), state.cpl);
    }
    state
}

fn descriptor(m: &mut Machine, selector: u16, at: u32, low: u32) {
    let lin = GDT + u32::from(selector & !7);
    m.set_word(at, lin);
    for half in [0, 4] {
        let value = 0x00cf_f000 + lin + half;
        m.write(lin + half, 4, value);
        m.set_word(low + half, value);
    }
}

/// A machine whose guest has a gate for `int 80h` and ring-3 segments, in ring 0 (`cpl` 0) or 3.
fn machine(seed: u64, cpl: u32) -> Machine {
    let mut x = seed | 1;
    let mut random = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 16) as u32
    };
    let mut m = Machine {
        gpr: std::array::from_fn(|_| random()),
        flags: random() & (ARITHMETIC | DF),
        eip: BASE,
        hw_sel: [0; 6],
        limits: BTreeMap::new(),
        absent: None,
        pkru: 0,
        mem: BTreeMap::new(),
    };
    for at in (0..0x1000).step_by(4) {
        m.set_word(at, 0);
    }
    descriptor(&mut m, CS0, page::IRET_DESC_AT, page::IRET_DESC_LOW);
    descriptor(&mut m, SS0, page::KERNEL_SS_DESC_AT, page::KERNEL_SS_DESC_LOW);
    descriptor(&mut m, CS3, page::USER_CS_DESC_AT, page::USER_CS_DESC_LOW);
    descriptor(&mut m, SS3, page::USER_SS_DESC_AT, page::USER_SS_DESC_LOW);
    for (at, value) in [(page::GATE_LOW, 0x0060_1234), (page::GATE_HIGH, 0xc100_ef00)] {
        m.set_word(at, value);
        m.write(IDT + 0x400 + at - page::GATE_LOW, 4, value);
    }
    m.write(TSS + 4, 4, STACK0);
    m.write(TSS + 8, 2, u32::from(SS0));
    let if_mask = if random() & 1 == 0 { 0 } else { u32::MAX };
    for (at, value) in [
        (page::CPL, cpl),
        (page::IF_FLAG, if cpl == 3 { IF } else { random() & IF }),
        (page::HIDDEN_FLAGS, random() & IOPL),
        (page::USER_CS, u32::from(CS3)),
        (page::USER_SS, u32::from(SS3)),
        (page::USER_CS_HOST + 4, u32::from(HOST_CS3)),
        (page::USER_SS_HOST + 4, u32::from(HOST_SS3)),
        (page::USER_FRAME + 4, u32::from(HOST_CS3)),
        (page::USER_FRAME + 16, u32::from(HOST_SS3)),
        (page::GATE_READY, 1),
        (page::GATE_VECTOR, 0x80),
        (page::GATE_AT, IDT + 0x400),
        (page::GATE_TARGET, HANDLER),
        (page::GATE_IF_MASK, if_mask),
        (page::GATE_CS, u32::from(CS0)),
        (page::IRET_CS, u32::from(CS0)),
        (page::TSS_ESP0_AT, TSS + 4),
        (page::KERNEL_SS, u32::from(SS0)),
        (page::KERNEL_SS_HOST + 4, u32::from(HOST_SS0)),
        (page::KERNEL_CS_HOST + 4, u32::from(HOST_CS0)),
    ] {
        m.set_word(at, value);
    }
    for n in DATA {
        // Null, ring 0 only, the same for both rings, one for each.
        let own = 0x200 + 16 * n as u32 + 7;
        let (selector, ring0, ring3) = match random() & 3 {
            0 => (0, 0, 0),
            1 if cpl == 0 => (0xd8, own, 0),
            2 => (0x7b, own, own),
            _ => (0x33, own, own + 8),
        };
        let at = 4 * n as u32;
        m.set_word(page::SELECTORS + at, selector);
        m.set_word(page::HOST_RING0 + at, ring0);
        m.set_word(page::HOST_RING3 + at, ring3);
    }
    let (cs, ss) = if cpl == 0 { (CS0, SS0) } else { (CS3, SS3) };
    m.set_word(page::SELECTORS + 4, u32::from(cs));
    m.set_word(page::SELECTORS + 8, u32::from(ss));
    m.limits.insert(HOST_SS3, LIMIT);
    load_hardware(&mut m);
    m
}

/// What the monitor does before it lets a world run.
fn load_hardware(m: &mut Machine) {
    let cpl = m.word(page::CPL);
    for n in DATA {
        let words = if cpl == 0 { page::HOST_RING0 } else { page::HOST_RING3 };
        m.hw_sel[n] = m.word(words + 4 * n as u32) as u16;
    }
    (m.hw_sel[1], m.hw_sel[2]) = if cpl == 0 { (HOST_CS0, HOST_SS0) } else { (HOST_CS3, HOST_SS3) };
}

/// What trampolines of a keyed world go by.
const KEYS: Keys = Keys { code: HOST_CS3, data: HOST_SS0, transit: VCPU + page::TRANSIT };

/// `iretd` at `BASE`, patched for a ring 0 that runs in `ring`.
fn kernel(ring: u8, keys: Option<Keys>) -> (Scanned, Patm) {
    let scanned = Scanned::new(&[0x90, 0x90, 0x90, 0x90, 0xcf]);
    let mut patm = Patm::new(Config { ring, keys, ..config() });
    scanned.patch_all(&mut patm);
    (scanned, patm)
}

fn user_config() -> Config {
    Config {
        tramp_base: 0xa000_0000,
        tramp_len: 16 << 20,
        vcpu_base: USER_VCPU,
        count_inline: true,
        ring: 3,
        keys: None,
    }
}

/// Ring-3 code at `at`, scanned from `entries`.
fn scanned_user(bytes: &[u8], at: u32, entries: &[u32]) -> CodeMap {
    let mut map = CodeMap::new(CodeSize::Bits32);
    for &entry in entries {
        let mut source = SliceSource { base: GuestLin(at), bytes };
        map.scan(GuestLin(entry), &mut source, &ScanOptions::default());
    }
    map
}

fn patch_user(
    patcher: &mut UserPatcher,
    key: u64,
    bytes: &[u8],
    entries: &[u32],
    site: u32,
) -> Result<UserPatch, Refusal> {
    let map = scanned_user(bytes, USER, entries);
    let fetch = |at: GuestLin, buf: &mut [u8]| {
        let rest = at.0.checked_sub(USER).and_then(|o| bytes.get(o as usize..)).unwrap_or(&[]);
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        n
    };
    patcher.patch_int(key, &map, fetch, GuestLin(site)).cloned()
}

/// mov eax, 14h; int 80h; ret
const MOV_INT: &[u8] = &[0xb8, 0x14, 0, 0, 0, 0xcd, 0x80, 0xc3];

fn mov_int() -> (UserPatcher, UserPatch) {
    mov_int_with(None)
}

fn mov_int_with(keys: Option<Keys>) -> (UserPatcher, UserPatch) {
    let mut patcher = UserPatcher::new(Config { keys, ..user_config() });
    let patch = patch_user(&mut patcher, 1, MOV_INT, &[USER], USER + 5).unwrap();
    (patcher, patch)
}

/// The vCPU page of these tests lies behind the limit of ring 3 otherwise.
fn reachable(m: &mut Machine) {
    m.limits.clear();
    m.limits.insert(HOST_SS3, u32::MAX);
}

/// How a trampoline ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Jumped,
    Gate,
    Fault { supervisor: bool },
}

/// Runs the trampoline at EIP `m.eip`. At each boundary the state is `before`, or `after` once it is committed. Returns
/// how it ended and how many boundaries there were of each.
fn run(
    m: &mut Machine,
    code: &[u8],
    at: u32,
    fix: &dyn Fn(u32) -> Fix,
    before: &Guest,
    after: &Guest,
) -> (End, [usize; 2]) {
    let mut seen = [0; 2];
    loop {
        let Some(rest) = code.get(m.eip.wrapping_sub(at) as usize..).filter(|r| !r.is_empty()) else {
            return (End::Jumped, seen);
        };
        let now = fix(m.eip);
        let state = fixed(m, &now);
        assert_eq!(&state, if now.committed { after } else { before }, "at +{:x}", m.eip - at);
        seen[usize::from(now.committed)] += 1;
        let was = m.eip;
        match m.step(rest, Mode::Deprivileged) {
            Event::Done => {}
            Event::Gate => return (End::Gate, seen),
            Event::Fault => {
                assert_eq!(m.eip, was);
                return (End::Fault { supervisor: now.supervisor }, seen);
            }
        }
    }
}

/// A frame for `iret` to ring 3 on the ring-0 stack.
fn push_frame(m: &mut Machine, flags: u32) {
    m.gpr[4] = STACK0 - 20;
    for (n, value) in [USER + 7, u32::from(CS3) | 0xabcd_0000, flags, STACK3, u32::from(SS3) | 0x1234_0000]
        .into_iter()
        .enumerate()
    {
        m.write(STACK0 - 20 + 4 * n as u32, 4, value);
    }
}

/// SDM Vol. 2A, "IRET", RETURN-TO-OUTER-PRIVILEGE-LEVEL.
fn after_iret(m: &Machine, flags: u32) -> Guest {
    let mut g = guest(m);
    g.gpr[4] = STACK3;
    g.eip = USER + 7;
    g.flags = flags & (ARITHMETIC | DF);
    g.if_flag = IF;
    g.cpl = 3;
    (g.selectors[1], g.selectors[2]) = (u32::from(CS3), u32::from(SS3));
    for n in DATA {
        if m.word(page::HOST_RING3 + 4 * n as u32) == 0 {
            g.selectors[n] = 0;
        }
    }
    g
}

/// `iret` at its place in the window.
fn at_iret(patm: &Patm, m: &mut Machine) -> (Vec<u8>, u32) {
    let patch = patm.patches().next().unwrap();
    let t = patch.trampoline.clone().unwrap();
    m.eip = patm.resume_eip(BASE + 4);
    (t.code, t.at)
}

fn run_iret(m: &mut Machine, flags: u32, ring: u8, keys: Option<Keys>) -> (End, [usize; 2]) {
    let (_, patm) = kernel(ring, keys);
    m.eip = BASE + 4;
    let (before, after) = (guest(m), after_iret(m, flags));
    let (code, at) = at_iret(&patm, m);
    let fix = |eip| match patm.locate(eip) {
        Location::Trampoline { fix, .. } => fix,
        other => panic!("{eip:x}: {other:?}"),
    };
    run(m, &code, at, &fix, &before, &after)
}

proptest! {
    #[test]
    fn iret_to_ring_3_is_before_or_behind_at_every_boundary(
        seed: u64,
        flags: u32,
        rf: bool,
        how in 0..3u8,
    ) {
        let mut m = machine(seed, 0);
        reachable(&mut m);
        let flags = flags & (ARITHMETIC | DF) | IF | 2 | m.word(page::HIDDEN_FLAGS) | u32::from(rf) << 16;
        push_frame(&mut m, flags);
        let after = after_iret(&m, flags);
        let (end, seen) = run_iret(&mut m, flags, if how == 1 { 1 } else { 3 }, (how == 2).then_some(KEYS));
        prop_assert_eq!(m.pkru, if how == 2 { u32::from(Keys::RING3) } else { 0 });
        prop_assert_eq!(end, End::Jumped);
        prop_assert!(seen[0] > 20 && seen[1] > 20, "{:?}", seen);
        prop_assert_eq!(guest(&m), after);
        let loaded = m.hw_sel;
        load_hardware(&mut m);
        prop_assert_eq!(loaded, m.hw_sel);
        // Back in ring 0, what became null is null.
        for n in DATA {
            let at = 4 * n as u32;
            prop_assert!(m.word(page::SELECTORS + at) != 0 || m.word(page::HOST_RING0 + at) == 0);
        }
    }

    #[test]
    fn int_n_is_before_or_behind_at_every_boundary(seed: u64, keyed: bool) {
        let (patcher, patch) = mov_int_with(keyed.then_some(KEYS));
        let mut m = machine(seed, 3);
        m.pkru = if keyed { Keys::RING3.into() } else { 0 };
        reachable(&mut m);
        let (end, seen) = run_int(&mut m, &patcher, &patch);
        prop_assert_eq!(end, End::Jumped);
        prop_assert!(seen[0] > 60 && seen[1] > 20, "{:?}", seen);
        prop_assert_eq!(m.pkru, 0);
        let loaded = m.hw_sel;
        load_hardware(&mut m);
        prop_assert_eq!(loaded, m.hw_sel);
        prop_assert_eq!(m.word(page::COUNTERS + 4 * patm::counter(csam::SensitiveKind::Int)), 1);
    }
}

#[test]
fn an_iret_to_ring_3_the_monitor_must_see_leaves_with_nothing_done() {
    let spoil: &[Spoil] = &[
        ("pending", |m| m.set_word(page::PENDING, 1)),
        ("no IF", |m| m.write(STACK0 - 12, 4, 2)),
        ("TF", |m| m.write(STACK0 - 12, 4, 0x302)),
        ("NT", |m| m.write(STACK0 - 12, 4, 0x4202)),
        ("VM", |m| m.write(STACK0 - 12, 4, 0x2_0202)),
        ("AC", |m| m.write(STACK0 - 12, 4, 0x4_0202)),
        ("ID", |m| m.write(STACK0 - 12, 4, 0x20_0202)),
        ("ID as it is", |m| {
            m.write(STACK0 - 12, 4, 0x20_0202);
            m.set_word(page::HIDDEN_FLAGS, 0x20_0000);
        }),
        ("other IOPL", |m| m.set_word(page::HIDDEN_FLAGS, 0x1000)),
        ("RF with breakpoints", |m| {
            m.write(STACK0 - 12, 4, 0x1_0202);
            m.set_word(page::IRET_REFUSES, 0x1_0000);
        }),
        ("another SS", |m| m.write(STACK0 - 4, 4, 0x33)),
        ("nowhere", |m| m.set_word(page::USER_CS, page::IRET_NOWHERE)),
        ("CS changed, low", |m| m.write(GDT + 0x70, 1, 1)),
        ("CS changed, high", |m| m.write(GDT + 0x74, 1, 1)),
        ("SS changed, low", |m| m.write(GDT + 0x78, 1, 1)),
        ("SS changed, high", |m| m.write(GDT + 0x7c, 1, 1)),
    ];
    for (what, spoil) in spoil {
        let mut m = machine(5, 0);
        reachable(&mut m);
        m.set_word(page::HIDDEN_FLAGS, 0);
        push_frame(&mut m, IF | 2);
        spoil(&mut m);
        let mut before = guest(&m);
        let hardware = m.hw_sel;
        let (end, seen) = run_iret(&mut m, IF | 2, 3, None);
        assert_eq!((end, seen[1]), (End::Gate, 0), "{what}");
        before.eip = m.eip;
        assert_eq!(guest(&m), before, "{what}");
        assert_eq!(m.hw_sel, hardware, "{what}");
    }
}

/// SDM Vol. 2A, "INT n", INTER-PRIVILEGE-LEVEL-INTERRUPT, and what it pushes.
fn after_int(m: &Machine, next: u32) -> (Guest, [u32; 5]) {
    let mut g = guest(m);
    let image = g.flags | 2 | IF | g.hidden & IOPL;
    let frame = [next, g.selectors[1], image, g.gpr[4], g.selectors[2]];
    g.gpr[4] = STACK0 - 20;
    g.eip = HANDLER;
    g.if_flag &= m.word(page::GATE_IF_MASK);
    g.hidden &= IOPL;
    g.cpl = 0;
    (g.selectors[1], g.selectors[2]) = (u32::from(CS0), u32::from(SS0));
    (g, frame)
}

fn run_int(m: &mut Machine, patcher: &UserPatcher, patch: &UserPatch) -> (End, [usize; 2]) {
    m.eip = patch.site.0;
    let before = guest(m);
    let (after, frame) = after_int(m, patch.end().0);
    m.eip = patcher.resume_eip(patch.key, patch.site.0);
    let fix = |eip| {
        let (owner, fix) = patcher.locate(eip).expect("a boundary");
        assert_eq!(owner.id, patch.id);
        fix
    };
    let result = run(m, &patch.trampoline.code, patch.trampoline.at, &fix, &before, &after);
    if result.0 == End::Jumped {
        assert_eq!(guest(m), after);
        let pushed: Vec<u32> = (0..5).map(|n| m.read(STACK0 - 20 + 4 * n, 4)).collect();
        assert_eq!(pushed, frame);
    }
    result
}

#[test]
fn an_int_n_the_monitor_must_see_leaves_with_nothing_done() {
    let spoil: &[Spoil] = &[
        ("not ready", |m| m.set_word(page::GATE_READY, 0)),
        ("another vector", |m| m.set_word(page::GATE_VECTOR, 0x81)),
        ("NT", |m| m.flags |= 0x4000),
        ("AC", |m| m.flags |= 0x4_0000),
        ("ID", |m| m.flags |= 0x20_0000),
        ("another DS", |m| m.hw_sel[3] = 0x2b),
        ("another ES", |m| m.hw_sel[0] = 0x2b),
        ("another FS", |m| m.hw_sel[4] = 3),
        ("another GS", |m| m.hw_sel[5] = 0x7b),
        ("another SS", |m| m.hw_sel[2] = 0x2b),
        ("another gate, low", |m| m.write(IDT + 0x400, 1, 1)),
        ("another gate, high", |m| m.write(IDT + 0x407, 1, 1)),
        ("another CS runs", |m| m.set_word(page::IRET_CS, 0x10)),
        ("CS changed, low", |m| m.write(GDT + 0x60, 1, 1)),
        ("CS changed, high", |m| m.write(GDT + 0x67, 1, 1)),
        ("SS changed, low", |m| m.write(GDT + 0x68, 1, 1)),
        ("SS changed, high", |m| m.write(GDT + 0x6f, 1, 1)),
        ("another SS0", |m| m.write(TSS + 8, 2, 0x10)),
    ];
    for ((what, spoil), keyed) in spoil.iter().flat_map(|spoil| [(spoil, false), (spoil, true)]) {
        let (patcher, patch) = mov_int_with(keyed.then_some(KEYS));
        let mut m = machine(9, 3);
        m.pkru = if keyed { Keys::RING3.into() } else { 0 };
        reachable(&mut m);
        spoil(&mut m);
        let mut before = guest(&m);
        let hardware = m.hw_sel;
        let (end, seen) = run_int(&mut m, &patcher, &patch);
        assert_eq!((end, seen[1]), (End::Gate, 0), "{what}");
        let left = patcher.by_reason(m.word(page::GATE_REASON)).expect("its reason");
        assert_eq!(left.site, patch.site);
        assert!(patm::is_user_reason(m.word(page::GATE_REASON)));
        before.eip = m.eip;
        assert_eq!(guest(&m), before, "{what}");
        if keyed {
            assert_eq!(m.word(page::SCRATCH_SS), u32::from(hardware[2]), "{what}");
            m.hw_sel[2] = hardware[2];
        }
        assert_eq!(m.hw_sel, hardware, "{what}");
    }
}

/// A trampoline for a keyed world loads PKRU once, whatever the guest's own bytes in it are.
#[test]
fn bytes_of_the_guests_that_load_pkru_get_no_trampoline() {
    let loads = |code: &[u8]| code.windows(3).filter(|w| *w == [0x0f, 0x01, 0xef]).count();
    // mov eax, 00ef010fh; int 80h; ret
    let code = [0xb8, 0x0f, 0x01, 0xef, 0x00, 0xcd, 0x80, 0xc3];
    for (keys, allowed) in [(None, true), (Some(KEYS), false)] {
        let mut patcher = UserPatcher::new(Config { keys, ..user_config() });
        let patched = patch_user(&mut patcher, 1, &code, &[USER], USER + 5);
        assert_eq!(patched.is_ok(), allowed, "{keys:?}");
        // What was refused left nothing behind.
        assert_eq!(patcher.patches().count(), usize::from(allowed));
    }
    let (_, patch) = mov_int_with(Some(KEYS));
    assert_eq!(loads(&patch.trampoline.code), 1);
    let (_, patm) = kernel(3, Some(KEYS));
    let code = patm.patches().next().unwrap().trampoline.clone().unwrap().code;
    assert_eq!(loads(&code), 1);
}

#[test]
fn a_missing_page_of_the_delivery_is_the_processors_own_access() {
    for absent in [IDT, GDT, TSS, STACK0 & !0xfff] {
        let (patcher, patch) = mov_int();
        let mut m = machine(3, 3);
        reachable(&mut m);
        m.absent = Some(absent);
        assert_eq!(run_int(&mut m, &patcher, &patch).0, End::Fault { supervisor: true }, "{absent:x}");
        // Once it is there the trampoline goes on where it was.
        m.absent = None;
        let (code, at) = (&patch.trampoline.code, patch.trampoline.at);
        while let Some(rest) = code.get(m.eip.wrapping_sub(at) as usize..).filter(|r| !r.is_empty()) {
            assert_eq!(m.step(rest, Mode::Deprivileged), Event::Done);
        }
        assert_eq!((m.eip, m.word(page::CPL)), (HANDLER, 0));
    }
}

#[test]
fn nothing_behind_the_limit_is_reached_through_ring_3s_stack_segment() {
    // The vCPU page below the limit, the kernel above it: any access of the kernel with the wrong SS would fault.
    let low = 0x9000_0000;
    let mut patcher = UserPatcher::new(Config { vcpu_base: low, ..user_config() });
    let patch = patch_user(&mut patcher, 1, MOV_INT, &[USER], USER + 5).unwrap();
    let mut m = machine(11, 3);
    for at in (0..0x1000).step_by(4) {
        let value = m.word(at);
        m.write(low + at, 4, value);
    }
    m.eip = patch.start.0;
    let (code, at) = (&patch.trampoline.code, patch.trampoline.at);
    m.eip = at;
    while let Some(rest) = code.get(m.eip.wrapping_sub(at) as usize..).filter(|r| !r.is_empty()) {
        assert_eq!(m.step(rest, Mode::Deprivileged), Event::Done, "at +{:x}", m.eip - at);
    }
    assert_eq!((m.eip, m.gpr[4], m.hw_sel[2]), (HANDLER, STACK0 - 20, HOST_SS0));
}

#[test]
fn a_system_call_goes_in_and_out_in_line_whatever_interrupts_it() {
    // 0: mov eax, 14h; int 80h; inc esi; dec edi; jne 0; hlt. The handler at BASE does nothing but return.
    let bytes = [0xb8, 0x14, 0, 0, 0, 0xcd, 0x80, 0x46, 0x4f, 0x75, 0xf5, 0xf4];
    let mut patcher = UserPatcher::new(user_config());
    let patch = patch_user(&mut patcher, 1, &bytes, &[USER], USER + 5).unwrap();
    let (scanned, patm) = kernel(3, None);
    let kernel_view = scanned.view(&patm);
    let mut user_view = bytes.to_vec();
    user_view[..7].copy_from_slice(&patch.write.bytes);
    let tramp0 = patm.patches().next().unwrap().trampoline.clone().unwrap();
    let tramp3 = &patch.trampoline;
    let regions =
        [(BASE, &kernel_view), (USER, &user_view), (tramp0.at, &tramp0.code), (tramp3.at, &tramp3.code)];
    for seed in 1..40 {
        let mut m = machine(seed, 3);
        reachable(&mut m);
        m.set_word(page::GATE_IF_MASK, 0);
        (m.eip, m.gpr[4], m.gpr[6], m.gpr[7]) = (USER, STACK3, 0, 10);
        let mut kicks = seed;
        let mut steps = 0;
        while m.eip != USER + 11 {
            steps += 1;
            assert!(steps < 1_000_000);
            kicks ^= kicks << 13;
            kicks ^= kicks >> 7;
            kicks ^= kicks << 17;
            if kicks & 15 == 0 {
                let fix = match patm.locate(m.eip) {
                    Location::Trampoline { fix, .. } => Some(fix),
                    _ => patcher.locate(m.eip).map(|(_, fix)| fix),
                };
                if let Some(fix) = fix {
                    let (mut gpr, mut flags) = (m.gpr, m.flags);
                    m.eip = fix.apply(&mut gpr, &mut flags, &mut Words(&mut m));
                    (m.gpr, m.flags) = (gpr, flags);
                }
                // The monitor finds the host's selectors by the guest's.
                for n in DATA {
                    if m.word(page::SELECTORS + 4 * n as u32) == 0 {
                        m.set_word(page::HOST_RING0 + 4 * n as u32, 0);
                        m.set_word(page::HOST_RING3 + 4 * n as u32, 0);
                    }
                }
                load_hardware(&mut m);
                m.eip = match m.word(page::CPL) {
                    0 => patm.resume_eip(m.eip),
                    _ => patcher.resume_eip(1, m.eip),
                };
            }
            let rest = regions.iter().find_map(|(at, code)| {
                code.get(m.eip.wrapping_sub(*at) as usize..).filter(|r| !r.is_empty())
            });
            assert_eq!(m.step(rest.expect("code"), Mode::Deprivileged), Event::Done, "at {:x}", m.eip);
        }
        assert_eq!((m.gpr[0], m.gpr[4], m.gpr[6], m.gpr[7]), (0x14, STACK3, 10, 0));
        assert_eq!((m.word(page::CPL), m.word(page::IF_FLAG)), (3, IF));
    }
}

#[test]
fn the_vdso_shape_is_patched_and_what_follows_the_site_is_not_touched() {
    // push ecx; push edx; push ebp; lea esi, [esi]; int 80h; pop ebp; pop edx; pop ecx; ret
    let bytes = [0x51, 0x52, 0x55, 0x8d, 0x74, 0x26, 0, 0xcd, 0x80, 0x5d, 0x5a, 0x59, 0xc3];
    let mut patcher = UserPatcher::new(user_config());
    let patch = patch_user(&mut patcher, 1, &bytes, &[USER], USER + 7).unwrap();
    assert_eq!((patch.site.0, patch.end().0), (USER + 7, USER + 9));
    assert!(patch.start.0 + 5 <= patch.end().0);
    for &(eip, offset) in &patch.map.starts {
        let byte = patch.write.bytes[(eip - patch.start.0) as usize];
        if eip != patch.start.0 {
            assert!(patm::traps(byte), "{byte:02x} at {eip:x}");
            assert_eq!(patcher.resume_eip(1, eip), patch.trampoline.at + offset);
        }
        let (_, fix) = patcher.locate(patch.trampoline.at + offset).unwrap();
        assert_eq!((fix.resume, fix.cpl, fix.committed), (eip, Some(3), false));
    }
}

#[test]
fn a_trampoline_that_leaves_by_a_long_gate_touches_nothing_but_two_registers_of_64_bit_code() {
    let gate = LongGate { selector: 0x33, at: 0x1234_5678_9abc_def0 };
    let mut patcher = UserPatcher::new(user_config()).leaving_by(gate);
    let patch = patch_user(&mut patcher, 1, MOV_INT, &[USER], USER + 5).unwrap();
    let Trampoline { at, code } = &patch.trampoline;
    let (moved, rest) = code.split_at(5);
    assert_eq!(moved, &MOV_INT[..5]);
    let (jump, long) = rest.split_at(7);
    let jump = Decoder::with_ip(32, jump, u64::from(at + 5), DecoderOptions::NONE).decode();
    assert_eq!((jump.code(), jump.far_branch_selector()), (Code::Jmp_ptr1632, 0x33));
    assert_eq!(jump.far_branch32(), at + 12);
    let long: Vec<_> = Decoder::new(64, long, DecoderOptions::NONE).into_iter().collect();
    let codes: Vec<_> = long.iter().map(|i| (i.code(), i.op0_register())).collect();
    let expected = [
        (Code::Mov_r32_imm32, Register::R8D),
        (Code::Mov_r64_imm64, Register::R9),
        (Code::Jmp_rm64, Register::None),
    ];
    assert_eq!(codes, expected);
    assert_eq!((long[0].immediate32(), long[1].immediate64()), (USER + 7, gate.at));
    assert_eq!(long[2].memory_base(), Register::R9);
    // Up to the far jump it is where it was.
    for (offset, eip) in [(0, USER), (5, USER + 5)] {
        let (_, fix) = patcher.locate(at + offset).unwrap();
        assert_eq!((fix.resume, fix.committed), (eip, false));
    }
}

#[test]
fn windows_of_ring_3_code_are_kept_by_page_and_end() {
    let mut patcher = UserPatcher::new(user_config());
    let a = patch_user(&mut patcher, 1, MOV_INT, &[USER], USER + 5).unwrap();
    let b = patch_user(&mut patcher, 2, MOV_INT, &[USER], USER + 5).unwrap();
    assert_eq!(patch_user(&mut patcher, 1, MOV_INT, &[USER], USER + 5).unwrap(), a);
    assert_ne!(a.trampoline.at, b.trampoline.at);
    assert_eq!(patcher.at(2, USER + 6).map(|p| p.id), Some(b.id));
    assert_eq!(patcher.at(2, USER + 7), None);
    assert_eq!(patcher.at(3, USER), None);
    assert_eq!(patcher.remove(1), std::slice::from_ref(&a));
    assert_eq!((patcher.at(1, USER), patcher.locate(a.trampoline.at)), (None, None));
    assert!(patcher.owns(a.trampoline.at) && patcher.locate(b.trampoline.at).is_some());
    assert_eq!(patcher.by_reason(patm::reason_word(a.id, patm::ReasonKind::Emulate)), None);
    // Its memory is used again.
    let c = patch_user(&mut patcher, 3, MOV_INT, &[USER], USER + 5).unwrap();
    assert_eq!(c.trampoline.at, a.trampoline.at);
}

#[test]
fn ring_3_code_without_room_for_a_jump_is_refused() {
    let mut patcher = UserPatcher::new(user_config());
    let mut refused =
        |bytes: &[u8], entries: &[u32], site| patch_user(&mut patcher, 1, bytes, entries, site).unwrap_err();
    // Only the site itself was ever executed.
    assert_eq!(refused(MOV_INT, &[USER + 5], USER + 5), Refusal::NoRoom);
    // int3 has no room either, and is not ours.
    assert_eq!(refused(&[0x90, 0xcc, 0xc3], &[USER], USER + 1), Refusal::NotSensitive);
    // jmp 1f; nop; 1: int 80h: the nop is no code.
    assert_eq!(refused(&[0xeb, 1, 0x90, 0xcd, 0x80, 0xc3], &[USER], USER + 3), Refusal::NoRoom);
    // mov eax, 1; int 80h; int 80h: not over another site.
    let twice = [0xb8, 1, 0, 0, 0, 0xcd, 0x80, 0xcd, 0x80, 0xc3];
    assert_eq!(refused(&twice, &[USER], USER + 7), Refusal::NoRoom);
    // 0: mov eax, 1; 1: int 80h; jmp 1b: the branch would land where nothing may be.
    let back = [0xb8, 1, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xfc];
    assert_eq!(refused(&back, &[USER], USER + 5), Refusal::BranchTarget);
    // The mov lies in the page before.
    let mut page_end = vec![0x90; 0x1000 - 5];
    page_end.extend_from_slice(MOV_INT);
    assert_eq!(refused(&page_end, &[USER + 0xffb], USER + 0x1000), Refusal::NoRoom);
}
