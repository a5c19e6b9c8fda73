//! Raw mode against the interpreter: random ring-0 code, and every state raw mode leaves must be one the interpreter passed.
//!
//! The interpreter runs the code first and keeps every state between two instructions. Raw mode then runs it from the
//! same start; whenever it leaves the world (a site, a fault, a kick of another thread in the middle of a trampoline) the
//! CPU must be in one of those states, in their order, and the end and memory must be the same. While an interrupt waits,
//! raw mode must stop at the first state in which it may be delivered.
//!
//! Left out is code whose bytes are two streams of instructions: a jump into the middle of a known instruction runs into
//! the patches behind it, which is a limit of patching. `SUBRING_WILD=1` makes such code, `SUBRING_DUMP=1` shows what
//! failed as a whole.
//!
//! `SUBRING_ITERATIONS` is the number of guests, `SUBRING_SEED` the seed of the first; a failure names its own.

use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw;
use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register, RflagsBits};
use monitor::cpuid_msr::CpuPolicy;
use monitor::cpum::{CpuState, SegAttr, Segment, TableRegister, cr0, eflags, gpr, seg};
use monitor::em::engine::Engine;
use monitor::em::placement::Placement;
use monitor::em::raw::{After, Isolation, KickTarget, RawEngine};
use monitor::env::Env;
use monitor::interp::{self, Step};
use monitor::iom::{Devices, DevicesConfig};
use monitor::machine::Machine;
use monitor::tm::Clock;
use monitor::trap::{Event, Trap};
use monitor::trpm;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use subring_tests::ring0_code::{Code, Places, Random, generate, generate_loop, sel};

const RAM: u64 = 1 << 20;
const PAGE_DIRECTORY: u32 = 0x1000;
const PAGE_TABLE: u32 = 0x2000;
const GDT: u32 = 0x3000;
const IDT: u32 = 0x4000;
const CODE: u32 = 0x1_0000;
const CODE_LEN: u32 = 0x4000;
const DATA: u32 = 0x2_0000;
const GUARDED: u32 = 0x2_2000;
const STACK: u32 = 0x2_5000;
/// Compared at the end, in bytes from 0: everything but the page tables, whose A and D bits raw mode may set early.
const COMPARED: std::ops::Range<usize> = 0x3000..0x2_8000;
/// Instructions of one run.
const BUDGET: usize = 6000;
const BASES: [u32; 5] = [0xc100_0000, 0xc000_0000, 0xf800_0000, 0x0040_0000, 0x0840_0000];

/// What is compared of a CPU.
#[derive(Clone, PartialEq, Eq, Debug)]
struct State {
    gpr: [u32; 8],
    eip: u32,
    eflags: u32,
    seg: [Segment; 6],
    control: [u32; 4],
}

impl State {
    fn of(cpu: &CpuState) -> State {
        State {
            gpr: cpu.gpr,
            eip: cpu.eip,
            eflags: cpu.eflags & !eflags::RF,
            seg: cpu.seg,
            control: [cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4],
        }
    }
    /// What differs, as text.
    fn against(&self, other: &State) -> String {
        let mut text = String::new();
        for i in 0..8 {
            if self.gpr[i] != other.gpr[i] {
                text += &format!(" gpr{i} {:08x}/{:08x}", self.gpr[i], other.gpr[i]);
            }
        }
        if self.eip != other.eip {
            text += &format!(" eip {:08x}/{:08x}", self.eip, other.eip);
        }
        if self.eflags != other.eflags {
            text += &format!(" eflags {:08x}/{:08x}", self.eflags, other.eflags);
        }
        for i in 0..6 {
            if self.seg[i] != other.seg[i] {
                text += &format!(" seg{i} {:x?}/{:x?}", self.seg[i], other.seg[i]);
            }
        }
        if self.control != other.control {
            text += &format!(" cr {:x?}/{:x?}", self.control, other.control);
        }
        text
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Trap(Trap),
    Halt,
}

struct Passed {
    state: State,
    interruptible: bool,
    /// One of the two instructions before it is an `sti`. When IF was set before, or when the instruction behind it is
    /// displaced into its trampoline, raw mode may let the interrupt wait for one instruction more.
    behind_sti: bool,
}

/// The interpreter's run.
struct Trace {
    passed: Vec<Passed>,
    end: End,
    last: State,
    text: Vec<String>,
}

fn machine(ram: GuestRam) -> Machine {
    let devices = Devices::new(DevicesConfig { ram_bytes: RAM, ..DevicesConfig::default() });
    Machine::new(ram, devices, CpuPolicy::host(), Clock::host())
}

fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> [u8; 8] {
    let low = base << 16 | limit & 0xffff;
    let high = base & 0xff00_0000
        | base >> 16 & 0xff
        | u32::from(access) << 8
        | limit & 0xf_0000
        | u32::from(flags) << 20;
    (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
}

/// A guest before its first run.
struct Guest {
    memory: Vec<u8>,
    places: Places,
    /// Linear minus physical.
    base: u32,
    paging: bool,
    write_protect: bool,
    wild: bool,
    codes: Vec<(u32, Code)>,
}

impl Guest {
    fn new(r: &mut Random, hot: bool, wild: bool) -> Guest {
        let mut memory = vec![0u8; RAM as usize];
        let paging = !r.one_in(8);
        let (base, alias) = if paging {
            let first = if r.one_in(2) { 0 } else { r.below(5) as usize };
            (BASES[first], BASES[(first + 1 + r.below(4) as usize) % 5])
        } else {
            (0, 0)
        };
        let places =
            Places { code: base + CODE, alias: alias + CODE, data: base + DATA, guarded: base + GUARDED };
        let mut put =
            |at: u32, bytes: &[u8]| memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        for b in [base, alias] {
            put(PAGE_DIRECTORY + (b >> 22) * 4, &(PAGE_TABLE | 3).to_le_bytes());
        }
        for n in 0..(RAM >> 12) as u32 {
            let bits = match n << 12 {
                GUARDED => 1,
                at if at == GUARDED + 0x1000 => 0,
                _ => 3,
            };
            put(PAGE_TABLE + n * 4, &(n << 12 | bits).to_le_bytes());
        }
        for (selector, d) in [
            (sel::CODE, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
            (sel::DATA, descriptor(0, 0xf_ffff, 0x93, 0xc)),
            (sel::SMALL, descriptor(base + DATA, 0xfff, 0x93, 4)),
            (sel::USER, descriptor(0, 0xf_ffff, 0xf3, 0xc)),
            (sel::CONFORMING, descriptor(0, 0xf_ffff, 0x9f, 0xc)),
            (sel::ABSENT, descriptor(0, 0xf_ffff, 0x13, 0xc)),
            (sel::READ_ONLY, descriptor(0, 0xf_ffff, 0x91, 0xc)),
            (sel::CODE_TOO, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
        ] {
            put(GDT + u32::from(selector & !7), &d);
        }
        // One byte long, so that following the code beyond its end never gets out of step with what is there.
        put(CODE, &[0x90; CODE_LEN as usize]);
        let mut codes = Vec::new();
        let mut at = if hot { r.below(64) as u32 } else { 0xd00 + r.below(0x300) as u32 };
        for _ in 0..if hot { 3 } else { 6 } {
            let items = 10 + r.below(60) as usize;
            let code = if hot {
                let turns = 20 + r.below(300) as u32;
                generate_loop(r, Places { code: places.code + at, ..places }, turns)
            } else {
                generate(r, places, at, items, wild)
            };
            let len = code.bytes.len() as u32;
            if at + len > CODE_LEN - 16 {
                break;
            }
            put(CODE + at, &code.bytes);
            codes.push((at, code));
            at += len + if hot { 0xf80 - len % 0x400 } else { r.below(0x500) as u32 };
        }
        // int 80h, int 2eh and int3 have handlers that return, in the last bytes of the code.
        for (vector, kind) in [(0x80u32, 0x8e00u32), (0x2e, 0x8f00), (3, 0x8f00)] {
            let handler = places.code + CODE_LEN - 16;
            put(IDT + vector * 8, &(u32::from(sel::CODE) << 16 | handler & 0xffff).to_le_bytes());
            put(IDT + vector * 8 + 4, &(handler & 0xffff_0000 | kind).to_le_bytes());
        }
        put(CODE + CODE_LEN - 16, &[0x1e, 0x9c, 0x58, 0xfb, 0xfa, 0x1f, 0xcf]);
        // What a stray `ret` finds.
        for i in 0..0x200u32 {
            let (at, code) = &codes[r.below(codes.len() as u64) as usize];
            let start = r.pick(&code.starts);
            put(STACK - 0x400 + 4 * i, &(places.code + at + start).to_le_bytes());
        }
        Guest { memory, places, base, paging, write_protect: r.one_in(2), wild, codes }
    }

    /// The state one of its runs starts in.
    fn start(&self, r: &mut Random, hot: bool, number: usize) -> CpuState {
        let mut cpu = CpuState::reset();
        cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
        if self.paging {
            cpu.cr0 |= cr0::PG;
        }
        if self.write_protect {
            cpu.cr0 |= cr0::WP;
        }
        cpu.cr3 = PAGE_DIRECTORY;
        cpu.gdtr = TableRegister { base: self.base + GDT, limit: 0x7f };
        cpu.idtr = TableRegister { base: self.base + IDT, limit: 0x7ff };
        let data = |selector, bits| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            attr: SegAttr::from_bits_truncate(bits),
        };
        cpu.seg = [data(sel::DATA, 0xc93); 6];
        cpu.seg[seg::CS] = data(sel::CODE, 0xc9b);
        if r.one_in(3) {
            cpu.seg[seg::DS] = data(sel::USER, 0xcf3);
            cpu.seg[seg::ES] = data(sel::USER, 0xcf3);
        }
        cpu.seg[seg::FS] = Segment {
            selector: sel::SMALL,
            base: self.base + DATA,
            limit: 0xfff,
            attr: SegAttr::from_bits_truncate(0x493),
        };
        cpu.eflags = eflags::FIXED | r.bits() as u32 & (eflags::ARITH | eflags::IF);
        for g in &mut cpu.gpr {
            *g = match r.below(4) {
                0 => r.bits() as u32,
                1 => r.below(12) as u32,
                _ => self.places.data + r.below(0x1f00) as u32,
            };
        }
        cpu.gpr[gpr::ESP] = self.base + STACK - 4 * r.below(64) as u32;
        let (at, code) = &self.codes[number % self.codes.len()];
        let start = if hot || r.one_in(3) { 0 } else { r.pick(&code.starts) };
        let middle = if self.wild && !hot && r.one_in(6) { r.below(4) as u32 } else { 0 };
        cpu.eip = self.places.code + at + start + middle;
        cpu
    }
}

/// Instructions whose results depend on more than the state, or that would take the run elsewhere than to ring 0.
fn excluded(cpu: &CpuState, i: &Instruction) -> bool {
    use CpuidFeature as F;
    use Mnemonic as M;
    let known = i.cpuid_features().iter().all(|f| {
        matches!(
            f,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::CMOV
                | F::CX8
                | F::MULTIBYTENOP
        )
    });
    let logic = matches!(i.mnemonic(), M::And | M::Or | M::Xor | M::Test);
    let undefined = i.rflags_undefined() & if logic { !RflagsBits::AF } else { u32::MAX };
    let moves_control = i.mnemonic() == M::Mov && {
        let value = |r: Register| cpu.gpr[r.number() & 7];
        match i.op0_register() {
            Register::CR0 => value(i.op1_register()) != cpu.cr0,
            Register::CR3 => value(i.op1_register()) != cpu.cr3,
            Register::CR4 => value(i.op1_register()) != cpu.cr4,
            r => r.is_dr() || r.is_tr() || i.op1_register().is_dr(),
        }
    };
    let port = match i.mnemonic() {
        M::In | M::Out => {
            let n = u32::from(i.mnemonic() == M::In);
            let at = if i.op_kind(n) == OpKind::Immediate8 {
                u32::from(i.immediate8())
            } else {
                cpu.gpr[gpr::EDX] & 0xffff
            };
            !(0xed..=0xef).contains(&at)
        }
        _ => false,
    };
    !known
        || undefined != 0
        || moves_control
        || port
        || matches!(
            i.mnemonic(),
            M::Lgdt
                | M::Lidt
                | M::Lldt
                | M::Ltr
                | M::Lmsw
                | M::Rdtsc
                | M::Rdpmc
                | M::Rdmsr
                | M::Wrmsr
                | M::Insb
                | M::Insw
                | M::Insd
                | M::Outsb
                | M::Outsw
                | M::Outsd
                | M::Sysenter
                | M::Sysexit
                | M::Syscall
                | M::Sysret
                | M::Salc
        )
}

/// One instruction with what EM does about it; the end, if it ended the run.
fn step(cpu: &mut CpuState, m: &mut Machine) -> Option<End> {
    let start = cpu.eip;
    match interp::step(cpu, m) {
        Step::Done => None,
        Step::Halted => {
            cpu.halted = false;
            Some(End::Halt)
        }
        Step::Raise(Event::Exception(trap)) => Some(End::Trap(trap)),
        Step::Raise(event) => match trpm::try_deliver(cpu, m, event) {
            Ok(()) => None,
            Err(trap) => {
                cpu.eip = start;
                Some(End::Trap(trap))
            }
        },
    }
}

fn interpret(mut cpu: CpuState, m: &mut Machine) -> Option<Trace> {
    let mut passed = Vec::new();
    let mut text = Vec::new();
    let mut since_sti = 2;
    loop {
        if passed.len() >= BUDGET || cpu.cpl != 0 || cpu.v86() {
            return None;
        }
        passed.push(Passed {
            state: State::of(&cpu),
            interruptible: cpu.interruptible(),
            behind_sti: since_sti < 2,
        });
        let mut words = format!("{:08x} ", cpu.eip);
        if let Ok(i) = interp::fetch_decode(&cpu, m) {
            if excluded(&cpu, &i) {
                return None;
            }
            words += &format!("{i}");
            since_sti = if i.mnemonic() == Mnemonic::Sti { 0 } else { since_sti + 1 };
        }
        text.push(words);
        if let Some(end) = step(&mut cpu, m) {
            return Some(Trace { passed, end, last: State::of(&cpu), text });
        }
    }
}

/// The data segment register an instruction loads: what EM tells the engine's cache of.
fn loaded_segment(i: &Instruction) -> Option<usize> {
    let of = |r: Register| {
        let all = [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];
        all.iter().position(|s| *s == r).filter(|n| *n != seg::CS)
    };
    match i.mnemonic() {
        Mnemonic::Mov | Mnemonic::Pop if i.op0_kind() == OpKind::Register => of(i.op0_register()),
        Mnemonic::Les => Some(seg::ES),
        Mnemonic::Lds => Some(seg::DS),
        Mnemonic::Lss => Some(seg::SS),
        Mnemonic::Lfs => Some(seg::FS),
        Mnemonic::Lgs => Some(seg::GS),
        _ => None,
    }
}

/// How often what happened, so that a test of nothing is noticed.
#[derive(Default, Debug)]
struct Tally {
    runs: u64,
    discarded: u64,
    instructions: u64,
    exits: u64,
    kicks: u64,
    delivered: u64,
    ends: std::collections::BTreeMap<String, u64>,
}

/// Runs in raw mode along the trace.
fn follow(
    raw: &mut RawEngine,
    cpu: &mut CpuState,
    m: &mut Machine,
    trace: &Trace,
    r: &mut Random,
    tally: &mut Tally,
) -> Result<(), String> {
    let since = Instant::now();
    let mut at = 0;
    let mut waits: Option<usize> = None;
    let mut burst = 0;
    let rarity = r.pick(&[1, 2, 16, 1 << 40]);
    let mut how = "start".to_string();
    let place = |n: usize| {
        trace.text[n.saturating_sub(6)..trace.text.len().min(n + 7)]
            .iter()
            .enumerate()
            .map(|(i, t)| format!("\n    {}{t}", if n.saturating_sub(6) + i == n { "> " } else { "  " }))
            .collect::<String>()
    };
    loop {
        if since.elapsed() > Duration::from_secs(5) {
            return Err(format!("no end after {how} at {:08x}, trace {}", cpu.eip, place(at)));
        }
        let now = State::of(cpu);
        let repeats = interp::fetch_decode(cpu, m)
            .is_ok_and(|i| i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix()));
        if !repeats {
            let Some(to) = (at..trace.passed.len()).find(|&n| trace.passed[n].state == now) else {
                let nearest = (at..trace.passed.len()).find(|&n| trace.passed[n].state.eip == now.eip);
                let near = nearest.unwrap_or(at);
                return Err(format!(
                    "after {how}: not a state the interpreter passed from {at} on; nearest {near} (raw/interp): {}{}",
                    now.against(&trace.passed[near].state),
                    place(near)
                ));
            };
            at = to;
            let unique = !trace.passed[at + 1..].iter().any(|p| p.state == now);
            // Whatever interrupt there is would be delivered now.
            if cpu.interruptible() && !trace.passed[at].interruptible && unique {
                return Err(format!("after {how}: an interrupt would come too early{}", place(at)));
            }
            if let Some(from) = waits
                && cpu.interruptible()
            {
                if let Some(missed) =
                    (from + 1..at).find(|&n| trace.passed[n].interruptible && !trace.passed[n].behind_sti)
                {
                    return Err(format!(
                        "after {how}: an interrupt was missed at {missed}, came at {at}{}",
                        place(missed)
                    ));
                }
                tally.delivered += 1;
                waits = None;
            } else if waits.is_none() && unique && !cpu.interruptible() && r.one_in(rarity) {
                waits = Some(at);
            }
        }
        let end = if burst > 0 || RawEngine::refusal(cpu).is_some() {
            burst = i32::max(burst - 1, 0);
            how = format!("interpreting {:08x}", cpu.eip);
            step(cpu, m)
        } else {
            tally.exits += 1;
            let masked = cpu.eflags & eflags::IF == 0;
            let after =
                raw.run(cpu, m, waits.is_some() && masked).map_err(|e| format!("after {how}: {e}"))?;
            how = format!("{after:?} {:x?}", raw.last_exit());
            match after {
                After::Continue => None,
                After::Kicked => {
                    tally.kicks += 1;
                    None
                }
                After::Deliver(Event::Exception(trap)) => Some(End::Trap(trap)),
                After::Deliver(event) => return Err(format!("{how}: raised {event:?}")),
                After::Interpret => {
                    raw.fetch_fpu(cpu);
                    let instruction = interp::fetch_decode(cpu, m).unwrap_or_default();
                    let end = step(cpu, m);
                    if end.is_none()
                        && let Some(which) = loaded_segment(&instruction)
                    {
                        raw.cache_segment(cpu, m, which);
                    }
                    if r.one_in(4) {
                        burst = r.below(6) as i32;
                    }
                    end
                }
            }
        };
        if let Some(end) = end {
            let now = State::of(cpu);
            let last = trace.text.len() - 1;
            // Which operand of CMPS faults is the CPU's choice, and CPUs differ.
            let either = matches!(
                interp::fetch_decode(cpu, m).map(|i| i.mnemonic()),
                Ok(Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd)
            );
            let same = match (&end, &trace.end) {
                (End::Trap(a), End::Trap(b)) if either => {
                    (a.vector, a.error_code, a.cr2.is_some()) == (b.vector, b.error_code, b.cr2.is_some())
                }
                (a, b) => a == b,
            };
            if !same || now != trace.last {
                return Err(format!(
                    "after {how}: ended with {end:x?}, interpreter {:x?} (raw/interp): {}{}",
                    trace.end,
                    now.against(&trace.last),
                    place(last)
                ));
            }
            return Ok(());
        }
    }
}

/// Kicks the engine of the moment every so often.
#[derive(Default)]
struct Kicks {
    target: Mutex<Option<Arc<KickTarget>>>,
    /// Nanoseconds between two kicks.
    period: AtomicU64,
    done: AtomicBool,
}

impl Kicks {
    fn run(&self) {
        while !self.done.load(Ordering::Relaxed) {
            let period = self.period.load(Ordering::Relaxed);
            if period > 1_000_000 {
                std::thread::sleep(Duration::from_nanos(period));
            } else {
                let since = Instant::now();
                while since.elapsed() < Duration::from_nanos(period) {
                    std::hint::spin_loop();
                }
            }
            if let Some(target) = self.target.lock().unwrap().as_ref() {
                target.kick();
            }
        }
    }
}

/// One guest and all its runs.
fn one(seed: u64, kicks: &Kicks, cpu_number: usize, tally: &mut Tally) -> Result<(), String> {
    let mut r = Random(seed);
    let hot = r.one_in(3);
    let wild = std::env::var_os("SUBRING_WILD").is_some();
    let guest = Guest::new(&mut r, hot, wild);
    let (ours, theirs) = (GuestRam::new(RAM).unwrap(), GuestRam::new(RAM).unwrap());
    ours.write(0, &guest.memory).unwrap();
    theirs.write(0, &guest.memory).unwrap();
    let code = CodeMemory::new(16 << 20).unwrap();
    let host = raw::RawEngine::new(&theirs, &code, Some(cpu_number)).map_err(|e| e.to_string())?;
    let mut raw =
        RawEngine::new(Box::new(host), code, r.one_in(2), Isolation::Strict).map_err(|e| e.to_string())?;
    *kicks.target.lock().unwrap() = Some(raw.kick_target());
    let period = if hot || r.one_in(3) { 3_000 + r.below(40_000) } else { 50_000_000 };
    kicks.period.store(period, Ordering::Relaxed);
    let mut interpreter = machine(ours);
    let mut native = machine(theirs);
    let mut result = Ok(());
    for number in 0..12 {
        let mut before = vec![0u8; RAM as usize];
        interpreter.ram.read(0, &mut before).unwrap();
        let start = guest.start(&mut r, hot, number);
        let Some(trace) = interpret(start.clone(), &mut interpreter) else {
            interpreter.ram.write(0, &before).unwrap();
            tally.discarded += 1;
            continue;
        };
        tally.runs += 1;
        tally.instructions += trace.passed.len() as u64;
        let end = match trace.end {
            End::Trap(t) => format!("#{}", t.vector),
            End::Halt => "hlt".into(),
        };
        *tally.ends.entry(end).or_default() += 1;
        let mut cpu = start;
        // Every run starts with empty hands, as after a CR3 load.
        native.paging_changed(&cpu, monitor::env::PagingChange::Cr3);
        result = follow(&mut raw, &mut cpu, &mut native, &trace, &mut r, tally).and_then(|()| {
            let (mut a, mut b) = (vec![0u8; COMPARED.end], vec![0u8; COMPARED.end]);
            interpreter.ram.read(0, &mut a).unwrap();
            native.ram.read(0, &mut b).unwrap();
            match COMPARED.clone().find(|&n| a[n] != b[n]) {
                Some(n) => Err(format!("memory at {n:#x}: {:02x}/{:02x}", b[n], a[n])),
                None => Ok(()),
            }
        });
        if let Err(why) = &mut result {
            let shown = raw.debug_view(cpu.eip.wrapping_sub(12), 32);
            *why = format!("run {number} (base {:08x}, hot {hot}): {why}\n{shown}", guest.base);
            if std::env::var_os("SUBRING_DUMP").is_some() {
                let (at, code) = &guest.codes[number % guest.codes.len()];
                let ip = u64::from(guest.places.code + at);
                for i in &mut Decoder::with_ip(32, &code.bytes, ip, DecoderOptions::NONE) {
                    println!("{:08x} {i}", i.ip32());
                }
                println!("trace:\n{}", trace.text.join("\n"));
            }
            break;
        }
    }
    *kicks.target.lock().unwrap() = None;
    result
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn raw_mode_only_passes_states_the_interpreter_passes() {
    let kicks = Arc::new(Kicks::default());
    kicks.period.store(50_000_000, Ordering::Relaxed);
    // Before the thread is bound: the kicks must come from another CPU.
    let kicker = std::thread::spawn({
        let kicks = kicks.clone();
        move || kicks.run()
    });
    let placement = Placement::current().unwrap();
    let cpu_number = placement.cpu();
    let probe = GuestRam::new(RAM).map_err(|e| e.to_string()).and_then(|ram| {
        let code = CodeMemory::new(1 << 20).map_err(|e| e.to_string())?;
        let host = raw::RawEngine::new(&ram, &code, Some(cpu_number)).map_err(|e| e.to_string())?;
        host.spawn_world().map(drop).map_err(|e| e.to_string())
    });
    if let Err(why) = probe {
        println!("SKIP: no raw mode here: {why}");
        kicks.done.store(true, Ordering::Relaxed);
        kicker.join().unwrap();
        return;
    }
    placement.bind().unwrap();
    let first = number("SUBRING_SEED", 0x5eed);
    let guests = number("SUBRING_ITERATIONS", 400);
    let since = Instant::now();
    let mut tally = Tally::default();
    let mut wrong = Vec::new();
    for seed in first..first + guests {
        if let Err(why) = one(seed, &kicks, cpu_number, &mut tally) {
            println!("SUBRING_SEED={seed} SUBRING_ITERATIONS=1: {why}");
            wrong.push(seed);
        }
    }
    kicks.done.store(true, Ordering::Relaxed);
    kicker.join().unwrap();
    println!("{guests} guests from seed {first} in {:?}: {tally:?}", since.elapsed());
    assert!(wrong.is_empty(), "{} guests differ, seeds {wrong:?}", wrong.len());
    assert!(tally.runs > guests && tally.exits > tally.runs, "hardly anything was tried: {tally:?}");
    assert!(guests < 100 || tally.kicks > 10 && tally.delivered > 10, "too few interrupts: {tally:?}");
}
