//! Raw mode against the interpreter ([`subring_tests::oracle`]): random ring-0 code, and every state raw mode leaves must
//! be one the interpreter passed.
//!
//! The first test runs worlds freely and kicks them from another thread; the second stops at every instruction boundary.
//!
//! Left out of the first is code whose bytes are two streams of instructions: a jump into the middle of a known instruction
//! runs into the patches behind it, which is a limit of patching. `SUBRING_WILD=1` makes such code, `SUBRING_DUMP=1` shows
//! what failed as a whole.
//!
//! `SUBRING_ITERATIONS` is the number of guests of the first, `SUBRING_CASES` of the second; `SUBRING_SEED` is where both
//! begin. A failure names its own.

use iced_x86::{Decoder, DecoderOptions};
use monitor::account::Cause;
use monitor::cpum::{CpuState, eflags, gpr};
use monitor::em::engine::Engine;
use monitor::em::placement::Placement;
use monitor::em::raw::{KickTarget, RawEngine};
use monitor::machine::Machine;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use subring_tests::oracle::case::{self, Case};
use subring_tests::oracle::guest::{BASES, CODE, CODE_LEN, Plain, RAM, STACK};
use subring_tests::oracle::rig::Rig;
use subring_tests::oracle::{
    Choices, Honest, Limits, Meddler, NEVER, Native, Tally, compare_memory, follow, interpret,
};
use subring_tests::ring0_code::{Code, Places, Random, generate, generate_loop};

const LIMITS: Limits = Limits { budget: 6000, may_be_longer: false, memory: false };

/// A guest before its first run.
struct Guest {
    plain: Plain,
    write_protect: bool,
    wild: bool,
    codes: Vec<(u32, Code)>,
}

impl Guest {
    fn new(r: &mut Random, hot: bool, wild: bool) -> Guest {
        let bases = (!r.one_in(8)).then(|| {
            let first = if r.one_in(2) { 0 } else { r.below(5) as usize };
            (BASES[first], BASES[(first + 1 + r.below(4) as usize) % 5])
        });
        let mut plain = Plain::new(bases);
        let places = plain.places;
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
            plain.put(CODE + at, &code.bytes);
            codes.push((at, code));
            at += len + if hot { 0xf80 - len % 0x400 } else { r.below(0x500) as u32 };
        }
        // What a stray `ret` finds.
        for i in 0..0x200u32 {
            let (at, code) = &codes[r.below(codes.len() as u64) as usize];
            let start = r.pick(&code.starts);
            plain.put(STACK - 0x400 + 4 * i, &(places.code + at + start).to_le_bytes());
        }
        Guest { plain, write_protect: r.one_in(2), wild, codes }
    }

    /// The state one of its runs starts in.
    fn start(&self, r: &mut Random, hot: bool, number: usize) -> CpuState {
        let mut cpu = self.plain.cpu(self.write_protect, r.one_in(3));
        cpu.eflags = eflags::FIXED | r.bits() as u32 & (eflags::ARITH | eflags::IF);
        for g in &mut cpu.gpr {
            *g = match r.below(4) {
                0 => r.bits() as u32,
                1 => r.below(12) as u32,
                _ => self.plain.places.data + r.below(0x1f00) as u32,
            };
        }
        cpu.gpr[gpr::ESP] = self.plain.base + STACK - 4 * r.below(64) as u32;
        let (at, code) = &self.codes[number % self.codes.len()];
        let start = if hot || r.one_in(3) { 0 } else { r.pick(&code.starts) };
        let middle = if self.wild && !hot && r.one_in(6) { r.below(4) as u32 } else { 0 };
        cpu.eip = self.plain.places.code + at + start + middle;
        cpu
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

/// Kicks less often where the guest does not get on: a turn through the monitor can take longer than the shortest periods,
/// and every kick then comes before the next instruction.
struct Patience<'a> {
    kicks: &'a Kicks,
    /// Where the last kick found the guest, and how many in a row did.
    at: u32,
    stalled: u32,
}

impl Meddler for Patience<'_> {
    fn after(&mut self, raw: &mut RawEngine, _m: &mut Machine) {
        let exit = raw.last_exit();
        if exit.cause != Cause::Kick || exit.eip != self.at {
            (self.at, self.stalled) = (exit.eip, 0);
        } else {
            self.stalled += 1;
            if self.stalled.is_multiple_of(16) {
                let longer = (2 * self.kicks.period.load(Ordering::Relaxed)).min(50_000_000);
                self.kicks.period.store(longer, Ordering::Relaxed);
            }
        }
    }
}

/// One guest and all its runs.
fn one(seed: u64, kicks: &Kicks, rig: &mut Rig, tally: &mut Tally) -> Result<(), String> {
    let mut r = Random(seed);
    let hot = r.one_in(3);
    let wild = std::env::var_os("SUBRING_WILD").is_some();
    let guest = Guest::new(&mut r, hot, wild);
    let base = guest.plain.base;
    rig.worlds.control.every.set(0);
    let mut raw = rig.engine(r.one_in(2))?;
    *kicks.target.lock().unwrap() = Some(raw.kick_target());
    let period = if hot || r.one_in(3) { 3_000 + r.below(40_000) } else { 50_000_000 };
    kicks.period.store(period, Ordering::Relaxed);
    rig.fill(&guest.plain.memory, &guest.plain.cpu(false, false));
    let mut result = Ok(());
    for number in 0..12 {
        let mut before = vec![0u8; RAM as usize];
        rig.interpreter.ram.read(0, &mut before).unwrap();
        let start = guest.start(&mut r, hot, number);
        let Ok(trace) = interpret(start.clone(), &mut rig.interpreter, LIMITS) else {
            rig.interpreter.ram.write(0, &before).unwrap();
            rig.interpreter.ran_natively();
            tally.discarded += 1;
            continue;
        };
        tally.runs += 1;
        tally.instructions += trace.passed.len() as u64;
        let end = format!("{:x?}", trace.end).chars().take(24).collect();
        *tally.ends.entry(end).or_default() += 1;
        let mut cpu = start;
        // Every run starts with empty hands, as after a CR3 load.
        monitor::env::Env::paging_changed(&mut rig.native, &cpu, monitor::env::PagingChange::Cr3);
        let rarity = r.pick(&[1, 2, 16, NEVER]);
        let branch = r.pick(&[4, 32, NEVER]);
        let mut choices = Choices { r: &mut r, wait: rarity, burst: 4, branch };
        let native = &mut rig.native;
        result = follow(
            Native { raw: &mut raw, cpu: &mut cpu, m: native, base },
            &trace,
            &mut choices,
            &mut Patience { kicks, at: 0, stalled: 0 },
            tally,
        )
        .and_then(|()| compare_memory(&rig.native, &rig.interpreter, &cpu, trace.end))
        .and_then(|()| case::all_guarded(&raw));
        if let Err(why) = &mut result {
            let shown = raw.debug_view(cpu.eip.wrapping_sub(12), 32);
            let two = case::two_streams(&raw, &trace);
            *why = format!("run {number} (base {base:08x}, hot {hot}, two streams: {two}): {why}\n{shown}");
            if std::env::var_os("SUBRING_DUMP").is_some() {
                let (at, code) = &guest.codes[number % guest.codes.len()];
                let ip = u64::from(guest.plain.places.code + at);
                for i in &mut Decoder::with_ip(32, &code.bytes, ip, DecoderOptions::NONE) {
                    println!("{:08x} {i}", i.ip32());
                }
                println!("trace:\n{}", trace.text());
            }
            break;
        }
    }
    *kicks.target.lock().unwrap() = None;
    rig.retire(raw);
    result
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Both sides, bound to one CPU with the calling thread. None: said why.
fn rig() -> Option<Rig> {
    let placement = Placement::current().unwrap();
    match Rig::new(Some(placement.cpu())) {
        Ok(rig) => {
            placement.bind().unwrap();
            Some(rig)
        }
        Err(why) => {
            println!("SKIP: no raw mode here: {why}");
            None
        }
    }
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
    let first = number("SUBRING_SEED", 0x5eed);
    let guests = number("SUBRING_ITERATIONS", 400);
    let since = Instant::now();
    let mut tally = Tally::default();
    let mut wrong = Vec::new();
    let rig = rig();
    let skipped = rig.is_none();
    if let Some(mut rig) = rig {
        for seed in first..first + guests {
            if let Err(why) = one(seed, &kicks, &mut rig, &mut tally) {
                println!("SUBRING_SEED={seed} SUBRING_ITERATIONS=1: {why}");
                wrong.push(seed);
            }
        }
    }
    kicks.done.store(true, Ordering::Relaxed);
    kicker.join().unwrap();
    if skipped {
        return;
    }
    println!("{guests} guests from seed {first} in {:?}: {tally:?}", since.elapsed());
    assert!(wrong.is_empty(), "{} guests differ, seeds {wrong:?}", wrong.len());
    assert!(tally.runs > guests && tally.exits > tally.runs, "hardly anything was tried: {tally:?}");
    assert!(guests < 100 || tally.kicks > 10 && tally.delivered > 10, "too few interrupts: {tally:?}");
}

/// Cases of generated code, tame and wild, and of any bytes.
fn cases() -> impl Strategy<Value = Case> {
    let generated =
        (any::<u64>(), any::<bool>()).prop_map(|(seed, wild)| Case::generate(&mut Random(seed), wild));
    let bytes = (any::<u64>(), prop::collection::vec(any::<u8>(), 1..64)).prop_map(|(seed, code)| {
        let mut case = Case::generate(&mut Random(seed), true);
        case.code = code;
        case
    });
    prop_oneof![8 => generated, 1 => bytes]
}

#[test]
fn at_every_instruction_boundary_raw_mode_is_where_the_interpreter_is() {
    let Some(mut rig) = rig() else { return };
    let mut tally = Tally::default();
    let since = Instant::now();
    let count = number("SUBRING_CASES", 800);
    let config = ProptestConfig {
        cases: count as u32,
        failure_persistence: None,
        max_shrink_iters: 60,
        ..ProptestConfig::default()
    };
    let seed = number("SUBRING_SEED", 0x5eed).to_le_bytes();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed.repeat(4));
    let mut runner = TestRunner::new_with_rng(config, rng);
    let cell = std::cell::RefCell::new((&mut rig, &mut tally));
    let result = runner.run(&cases(), |case| {
        let (rig, tally) = &mut *cell.borrow_mut();
        case::run(rig, &case, &mut Honest, tally).map_err(TestCaseError::fail)
    });
    println!("{:?}, {} steps: {tally:?}", since.elapsed(), rig.worlds.control.steps.get());
    match result {
        Err(TestError::Fail(why, case)) => panic!("SUBRING_CASE={case:?}: {why}"),
        result => result.unwrap(),
    }
    let enough = tally.runs * 2 > count && tally.branches > count && tally.delivered * 20 > count;
    assert!(enough, "hardly anything was tried: {tally:?}");
}

/// `SUBRING_CASE` is a case in hexadecimal, or the first seed of as many generated ones as `SUBRING_CASES` says.
#[test]
#[ignore = "to look at failures"]
fn one_case() {
    let Some(mut rig) = rig() else { return };
    let Ok(text) = std::env::var("SUBRING_CASE") else { return };
    let mut tally = Tally::default();
    let mut failed = 0;
    let since = Instant::now();
    let count = number("SUBRING_CASES", 0);
    for n in 0..count.max(1) {
        let case = match count {
            0 => Case::from_hex(&text),
            _ => Case::generate(&mut Random(text.parse::<u64>().unwrap() + n), n % 2 == 1),
        };
        if let Err(why) = case::run(&mut rig, &case, &mut Honest, &mut tally) {
            println!("SUBRING_CASE={case:?} ({n}, entry {:x}): {why}\n", case.at() + CODE);
            failed += 1;
        }
    }
    println!("{:?}, {} steps: {tally:?}", since.elapsed(), rig.worlds.control.steps.get());
    assert_eq!(failed, 0);
}

#[test]
fn a_case_is_the_same_after_it_was_bytes() {
    for seed in 0..50 {
        let case = Case::generate(&mut Random(seed), seed % 2 == 0);
        assert_eq!(Case::from_bytes(&case.to_bytes()), case);
    }
}
