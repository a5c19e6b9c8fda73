//! The oracle of the patcher: code run in raw mode, patched, against the same code interpreted.
//!
//! 1. [`interpret`] runs the original code and keeps every state between two instructions: the [`Trace`].
//! 2. [`follow`] runs it in raw mode from the same start. Whenever raw mode leaves the world (a site, a fault, a kick in
//!    the middle of a trampoline) the CPU must be in one of those states, in their order, and in the end so must memory.
//!    While an interrupt waits, raw mode must stop at the first state in which it may be delivered.
//! 3. With [`stepping`] worlds raw mode leaves at every instruction boundary the hardware knows, inside trampolines too,
//!    without chance; memory is then compared at each of them.
//! 4. [`follow`] may also branch to where the CPU stands, from code of the guest's: into any byte of a patch.
//!
//! Tests and fuzz targets differ in what they feed it: `patch_oracle.rs`, [`case`], [`rewrite`], [`defects`].

pub mod case;
pub mod defects;
pub mod guest;
pub mod rewrite;
pub mod rig;
pub mod stepping;
pub mod watch;

use csam::GuestLin;
use guest::{BRANCH, BRANCH_TARGET, COMPARED};
use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind, Register, RflagsBits};
use monitor::cpum::{CpuState, Segment, cr0, eflags, gpr};
use monitor::em::engine::Engine;
use monitor::em::raw::layout::Layout;
use monitor::em::raw::{After, RawEngine};
use monitor::env::Env;
use monitor::interp::{self, Step};
use monitor::machine::Machine;
use monitor::trap::{Event, Trap};
use monitor::trpm;
use std::time::{Duration, Instant};

use crate::ring0_code::Random;
use watch::{Watched, is_target_word};

/// What is compared of a CPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    eip: u32,
    gpr: [u32; 8],
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

/// How a run ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// With this exception.
    Trap(Trap),
    /// With `hlt`.
    Halt,
    /// After as many instructions as a run may have.
    Budget,
}

/// A state between two instructions.
pub struct Passed {
    /// The state.
    pub state: State,
    interruptible: bool,
    /// One of the two instructions before it is an `sti`. When IF was set before, or when the instruction behind it is
    /// displaced into its trampoline, raw mode may let the interrupt wait for one instruction more.
    behind_sti: bool,
    /// A digest of what memory held then, if that is kept.
    memory: Option<u64>,
    instruction: Instruction,
}

/// The interpreter's run.
pub struct Trace {
    /// Every state it passed.
    pub passed: Vec<Passed>,
    /// How it ended.
    pub end: End,
    /// Raw mode that gets here has been compared far enough. Behind it are the states of a run that was cut off in which
    /// raw mode may stop nevertheless: it hears of a boundary only now and then.
    enough: usize,
    last: State,
}

/// Where raw mode is.
enum Found {
    /// In the state of this number; whether none behind it is the same.
    At { place: usize, unique: bool },
    /// In no state of the trace.
    Nowhere,
    /// In this one or others that are the same, but with other memory.
    OtherMemory(usize),
}

/// Stops in one state of a loop that changes nothing after which it is clear that it has no end.
const LAPS: u32 = 64;

/// Stops in one state after which raw mode is not getting on.
const STUCK: u32 = 300;

impl Trace {
    /// Looks for a state from `at` on. Memory, where it was kept, tells states apart that are the same.
    fn find(&self, at: usize, state: &State, memory: impl Fn() -> u64) -> Found {
        let mut same = (at..self.passed.len()).filter(|&n| self.passed[n].state == *state).peekable();
        let Some(&first) = same.peek() else { return Found::Nowhere };
        let sum = self.passed[first].memory.map(|_| memory());
        // Two stores in a trampoline; one that was rolled back has done the first.
        let halves = matches!(self.passed[first].instruction.mnemonic(), Mnemonic::Sgdt | Mnemonic::Sidt);
        match same.find(|&n| halves || self.passed[n].memory.is_none_or(|kept| sum == Some(kept))) {
            Some(place) => Found::At { place, unique: same.next().is_none() },
            None => Found::OtherMemory(first),
        }
    }
    /// The run comes to this state again, with the same memory: it will for ever.
    fn repeats(&self, at: usize) -> bool {
        let now = &self.passed[at];
        now.memory.is_some()
            && self.passed[at + 1..].iter().any(|p| p.state == now.state && p.memory == now.memory)
    }
    /// The instructions around state `n`.
    fn place(&self, n: usize) -> String {
        let from = n.saturating_sub(6);
        let to = self.passed.len().min(n + 7);
        let line = |i: usize| {
            let p = &self.passed[i];
            format!("\n    {}{:08x} {}", if i == n { "> " } else { "  " }, p.state.eip, p.instruction)
        };
        (from..to).map(line).collect()
    }
    /// All instructions.
    #[must_use]
    pub fn text(&self) -> String {
        self.passed.iter().map(|p| format!("{:08x} {}\n", p.state.eip, p.instruction)).collect()
    }
}

/// Why the interpreter's run is no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Useless {
    /// The instruction at this EIP depends on more than the state.
    Excluded(u32),
    /// It left ring 0.
    Ring,
    /// It ran into its own page tables: instructions whose bytes are accessed bits, which worlds may set early.
    PageTables,
    /// It looked at where the oracle keeps the target of its own branches, which only raw mode's memory holds.
    BranchTarget,
    /// It looked at where the raw engine may have something of its own and the guest has nothing: there the world does not fault
    /// (docs/architecture.md).
    EnginesPlace,
    /// It took too long.
    Budget,
}

/// What a run compares and how long it may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Instructions.
    pub budget: usize,
    /// A run that is longer is compared as far as that. It is interpreted on for as long as raw mode may run without a stop,
    /// and compared to its end if it ends there.
    pub may_be_longer: bool,
    /// Memory is compared at every boundary at which raw mode stops, and not only in the end.
    pub memory: bool,
}

/// A digest of the memory that is compared. What lies right below ESP is anybody's: a push that was rolled back.
fn digest(m: &Machine, cpu: &CpuState) -> u64 {
    let mut bytes = vec![0u8; COMPARED.end - COMPARED.start];
    m.ram.read(COMPARED.start as u64, &mut bytes).unwrap();
    let top = (cpu.gpr[gpr::ESP] & 0x3f_ffff) as usize;
    let (lo, hi) = (top.saturating_sub(32).max(COMPARED.start), top.min(COMPARED.end));
    if lo < hi {
        bytes[lo - COMPARED.start..hi - COMPARED.start].fill(0);
    }
    // Four sums side by side: a multiplication takes long and need not wait for the one before.
    let mut sums = [1u64, 2, 3, 4];
    for chunk in bytes.chunks_exact(32) {
        for (sum, c) in sums.iter_mut().zip(chunk.chunks_exact(8)) {
            let v = u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]);
            *sum = (*sum ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
        }
    }
    sums.iter().fold(0, |all, sum| (all ^ sum).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23))
}

/// Instructions behind the budget: raw mode may have to branch there to get on, and then some.
const BEYOND: usize = stepping::LONGEST as usize + 64;

/// Iterations of a string instruction that are still few.
const REPEATS: u32 = 64;

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
    // Each iteration is a boundary.
    let prefixed = i.has_rep_prefix() || i.has_repne_prefix();
    let repeats = i.is_string_instruction() && prefixed && cpu.gpr[gpr::ECX] > REPEATS;
    // A repeat prefix turns the condition round on AMD; it is reserved (SDM Vol. 2A, 2.1.1).
    let turned = prefixed && matches!(i.mnemonic(), M::Loope | M::Loopne);
    !known
        || undefined != 0
        || repeats
        || turned
        || moves_control
        || port
        || matches!(
            i.mnemonic(),
            // `int1` cannot be told from a step.
            M::Int1
                | M::Lgdt
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
fn step(cpu: &mut CpuState, m: &mut dyn Env) -> Option<End> {
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

/// Whether the raw engine may have something of its own where a guest that runs code at `eip` has nothing.
fn is_engines_place(eip: u32, at: GuestLin) -> bool {
    let [.., top] = eip.to_le_bytes();
    Layout::CANDIDATES.iter().any(|layout| layout.reserved(at) || layout.near(top).reserved(at))
}

/// Runs in the interpreter.
///
/// # Errors
/// When the run cannot be compared.
pub fn interpret(mut cpu: CpuState, m: &mut Machine, limits: Limits) -> Result<Trace, Useless> {
    let mut passed: Vec<Passed> = Vec::new();
    let mut since_sti = 2;
    let cut = |passed: Vec<Passed>, last| {
        // Not to its last instruction: raw mode would have to stop there.
        let enough = limits.budget - limits.budget / 4;
        Ok(Trace { passed, end: End::Budget, enough, last })
    };
    loop {
        let state = State::of(&cpu);
        let over = passed.len() >= limits.budget;
        if over && !limits.may_be_longer {
            return Err(Useless::Budget);
        }
        if cpu.cpl != 0 || cpu.v86() {
            if !over {
                return Err(Useless::Ring);
            }
            passed.push(Passed {
                state: state.clone(),
                interruptible: cpu.interruptible(),
                behind_sti: since_sti < 2,
                memory: None,
                instruction: Instruction::default(),
            });
            return cut(passed, state);
        }
        if passed.last().is_some_and(|p| p.state == state) {
            // A branch to itself, or to a store that changes nothing: nobody can tell how often it was done.
            return if over { cut(passed, state) } else { Err(Useless::Budget) };
        }
        if passed.len() >= limits.budget + BEYOND {
            return cut(passed, state);
        }
        let behind_sti = since_sti < 2;
        let instruction = interp::fetch_decode(&cpu, m).ok();
        if let Some(i) = &instruction {
            if cpu.cr0 & cr0::PG != 0 && guest::in_page_tables(cpu.eip, i.len() as u32) {
                return Err(Useless::PageTables);
            }
            if is_target_word(cpu.eip, i.len() as u32) {
                return Err(Useless::BranchTarget);
            }
            if excluded(&cpu, i) {
                return Err(Useless::Excluded(cpu.eip));
            }
            since_sti = if i.mnemonic() == Mnemonic::Sti { 0 } else { since_sti + 1 };
        }
        passed.push(Passed {
            state,
            interruptible: cpu.interruptible(),
            behind_sti,
            memory: (limits.memory && !over).then(|| digest(m, &cpu)),
            instruction: instruction.unwrap_or_default(),
        });
        let mut watched = Watched { m, looked: false };
        let end = step(&mut cpu, &mut watched);
        if watched.looked {
            return Err(Useless::BranchTarget);
        }
        if let Some(End::Trap(Trap { vector: 14, cr2: Some(at), .. })) = end
            && is_engines_place(cpu.eip, GuestLin(at))
        {
            return Err(Useless::EnginesPlace);
        }
        if let Some(end) = end {
            return Ok(Trace { passed, end, enough: usize::MAX, last: State::of(&cpu) });
        }
    }
}

/// How often what happened, so that a test of nothing is noticed.
#[derive(Default, Debug, Clone)]
#[allow(missing_docs)]
pub struct Tally {
    pub runs: u64,
    pub discarded: u64,
    pub instructions: u64,
    pub exits: u64,
    pub kicks: u64,
    pub delivered: u64,
    pub branches: u64,
    /// Runs that differed because the guest branched into the middle of an instruction that was known and not to a
    /// place that was: see `docs/oracle.md`.
    pub two_streams: u64,
    pub ends: std::collections::BTreeMap<String, u64>,
}

/// What happens by the way, and how often: once in so many chances.
pub struct Choices<'a> {
    /// Decides.
    pub r: &'a mut Random,
    /// An interrupt begins to wait.
    pub wait: u64,
    /// Some instructions behind an interpreted one are interpreted too.
    pub burst: u64,
    /// The guest branches to where it stands.
    pub branch: u64,
}

/// Never, as a rarity.
pub const NEVER: u64 = 1 << 40;

/// Something to be done to the engine and its machine before and after each run: see [`defects`].
pub trait Meddler {
    /// Before the engine looks at what the machine has for it.
    fn before(&mut self, _raw: &mut RawEngine, _m: &mut Machine) {}
    /// After a run: the engine may have made patches.
    fn after(&mut self, _raw: &mut RawEngine, _m: &mut Machine) {}
}

/// Nobody meddles.
pub struct Honest;

impl Meddler for Honest {}

/// The raw side of a run.
pub struct Native<'a> {
    /// The engine.
    pub raw: &'a mut RawEngine,
    /// Its CPU, at the start of the trace.
    pub cpu: &'a mut CpuState,
    /// Its machine.
    pub m: &'a mut Machine,
    /// Linear minus physical addresses of the guest, for branches.
    pub base: u32,
}

/// Runs in raw mode along the trace.
///
/// # Errors
/// What differs, in words.
pub fn follow(
    native: Native,
    trace: &Trace,
    choices: &mut Choices,
    meddler: &mut dyn Meddler,
    tally: &mut Tally,
) -> Result<(), String> {
    let Native { raw, cpu, m, base } = native;
    let since = Instant::now();
    let (mut at, mut stops) = (0, 0);
    let mut waits: Option<usize> = None;
    let mut burst = 0;
    let mut branching: Option<u32> = None;
    let mut branched = usize::MAX;
    let mut how = "start".to_string();
    let spring = base + BRANCH;
    // Where an interrupt would have been delivered first, between two places.
    let missed = |from: usize, to: usize| {
        (from + 1..to).find(|&n| trace.passed[n].interruptible && !trace.passed[n].behind_sti)
    };
    let mut exits = 0u32;
    loop {
        exits += 1;
        if exits as usize > 2000 + 64 * trace.passed.len()
            || exits.is_multiple_of(256) && since.elapsed() > Duration::from_secs(60)
        {
            return Err(format!("no end after {how} at {:08x}, trace {}", cpu.eip, trace.place(at)));
        }
        let mut now = State::of(cpu);
        match branching {
            Some(target) if cpu.eip == spring => now.eip = target,
            _ => branching = None,
        }
        let next = interp::fetch_decode(cpu, m).ok();
        let repeats = next
            .as_ref()
            .is_some_and(|i| i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix()));
        // How often it was repeated is not known, but that an interrupt would come before the next time.
        if repeats
            && let Some(from) = waits
            && cpu.interruptible()
        {
            let here = (from + 1..trace.passed.len()).find(|&n| trace.passed[n].state.eip == now.eip);
            if let Some(missed) = missed(from, here.unwrap_or(0)) {
                return Err(format!(
                    "after {how}: an interrupt was missed at {missed}, came in a repetition{}",
                    trace.place(missed)
                ));
            }
            tally.delivered += 1;
            waits = None;
        }
        if !repeats {
            let mut found = trace.find(at, &now, || digest(m, cpu));
            // The hardware may stop in the middle of a popa whose stack goes on in a page that was not there yet: some
            // registers are popped then, and are popped again.
            if matches!(found, Found::Nowhere)
                && next.is_some_and(|i| matches!(i.mnemonic(), Mnemonic::Popa | Mnemonic::Popad))
                && let Some(before) = (trace.passed.iter().skip(at).map(|p| &p.state))
                    .find(|s| s.eip == now.eip && s.gpr[gpr::ESP] == now.gpr[gpr::ESP])
            {
                now.gpr = before.gpr;
                found = trace.find(at, &now, || digest(m, cpu));
            }
            let (to, unique) = match found {
                Found::At { place, unique } => (place, unique),
                Found::OtherMemory(near) => {
                    return Err(format!("after {how}: memory differs at {near}{}", trace.place(near)));
                }
                Found::Nowhere => {
                    let nearest = (at..trace.passed.len()).find(|&n| trace.passed[n].state.eip == now.eip);
                    let near = nearest.unwrap_or(at);
                    return Err(format!(
                        "after {how}: not a state the interpreter passed from {at} on; nearest {near} (raw/interp): {}{}",
                        now.against(&trace.passed[near].state),
                        trace.place(near)
                    ));
                }
            };
            stops = if to == at { stops + 1 } else { 0 };
            at = to;
            // Nobody kicks where memory is kept: the boundaries inside a trampoline are far fewer.
            if stops > STUCK && trace.passed[at].memory.is_some() {
                return Err(format!("no end after {how} at {:08x}, trace {}", cpu.eip, trace.place(at)));
            }
            if at >= trace.enough || stops > LAPS && trace.repeats(at) {
                return Ok(());
            }
            // Whatever interrupt there is would be delivered now.
            if cpu.interruptible() && !trace.passed[at].interruptible && unique {
                return Err(format!("after {how}: an interrupt would come too early{}", trace.place(at)));
            }
            if let Some(from) = waits
                && cpu.interruptible()
            {
                if let Some(missed) = missed(from, at) {
                    return Err(format!(
                        "after {how}: an interrupt was missed at {missed}, came at {at}{}",
                        trace.place(missed)
                    ));
                }
                tally.delivered += 1;
                waits = None;
            } else if waits.is_none() && unique && !cpu.interruptible() && choices.r.one_in(choices.wait) {
                waits = Some(at);
            }
            // Once a state: else the run would not get on.
            let fresh = std::mem::replace(&mut branched, at) != at;
            if fresh && branching.is_none() && burst == 0 && choices.r.one_in(choices.branch) {
                let _in_ram = m.ram.write_u32(u64::from(BRANCH_TARGET), cpu.eip);
                let mut there = [0; 7];
                let _in_ram = m.ram.read(u64::from(BRANCH), &mut there);
                // The guest may have written to it.
                if RawEngine::refusal(cpu).is_none() && there == guest::spring(base) {
                    tally.branches += 1;
                    branching = Some(cpu.eip);
                    cpu.eip = spring;
                }
            }
        }
        let end = if burst > 0 || RawEngine::refusal(cpu).is_some() {
            burst = i32::max(burst - 1, 0);
            how = format!("interpreting {:08x}", cpu.eip);
            step(cpu, m)
        } else {
            tally.exits += 1;
            let masked = cpu.eflags & eflags::IF == 0;
            meddler.before(raw, m);
            let after =
                raw.run(cpu, m, waits.is_some() && masked).map_err(|e| format!("after {how}: {e}"))?;
            meddler.after(raw, m);
            how = format!("{after:?} {:x?}", raw.last_exit());
            match after {
                After::Continue => None,
                After::Kicked => {
                    tally.kicks += 1;
                    None
                }
                After::Deliver(Event::Exception(trap)) => Some(End::Trap(trap)),
                After::Deliver(event) => return Err(format!("{how}: raised {event:?}")),
                After::TripleFault { .. } => return Err(format!("{how}: shut down")),
                After::Interpret => {
                    raw.fetch_fpu(cpu);
                    let instruction = interp::fetch_decode(cpu, m).unwrap_or_default();
                    raw.will_interpret(cpu, m, &instruction);
                    let end = step(cpu, m);
                    if end.is_none() {
                        raw.has_interpreted(cpu, m, &instruction);
                    }
                    if choices.r.one_in(choices.burst) {
                        burst = choices.r.below(6) as i32;
                    }
                    end
                }
            }
        };
        if let Some(end) = end {
            let now = State::of(cpu);
            let last = trace.passed.len() - 1;
            // Which operand of CMPS faults is the CPU's choice, and CPUs differ.
            let either = matches!(
                interp::fetch_decode(cpu, m).map(|i| i.mnemonic()),
                Ok(Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd)
            );
            let same = match (&end, &trace.end) {
                // One may be refused by its segment (12, 13), the other by its page (14).
                (End::Trap(a), End::Trap(b)) if either && a.vector != b.vector => {
                    [a, b].iter().all(|t| (12..=14).contains(&t.vector))
                }
                (End::Trap(a), End::Trap(b)) if either => {
                    (a.error_code, a.cr2.is_some()) == (b.error_code, b.cr2.is_some())
                }
                (a, b) => a == b,
            };
            if !same || now != trace.last {
                return Err(format!(
                    "after {how}: ended with {end:x?}, interpreter {:x?} (raw/interp): {}{}",
                    trace.end,
                    now.against(&trace.last),
                    trace.place(last)
                ));
            }
            return Ok(());
        }
    }
}

/// The words a fault pushes at least when it is delivered in the same ring: EFLAGS, CS, EIP.
const FRAME: usize = 12;

/// The first byte of what is compared that differs between two machines whose runs ended with this CPU.
///
/// Behind a fault, where its frame goes is left out: a displaced `call [m]` pushes before it reads, and taken back the push
/// is still below ESP. Nobody sees it, as the frame is pushed over it.
///
/// # Errors
/// Where, in words.
pub fn compare_memory(
    native: &Machine,
    interpreter: &Machine,
    cpu: &CpuState,
    end: End,
) -> Result<(), String> {
    let (mut a, mut b) = (vec![0u8; COMPARED.end], vec![0u8; COMPARED.end]);
    interpreter.ram.read(0, &mut a).unwrap();
    native.ram.read(0, &mut b).unwrap();
    let frame = frame_of(cpu, end);
    match COMPARED.clone().find(|n| a[*n] != b[*n] && !frame.contains(n)) {
        Some(n) => Err(format!("memory at {n:#x}: {:02x}/{:02x}, ESP {:#x}", b[n], a[n], cpu.gpr[gpr::ESP])),
        None => Ok(()),
    }
}

/// Where the frame of the fault goes that the run ended with, GuestPhys; nowhere if it ended otherwise.
fn frame_of(cpu: &CpuState, end: End) -> std::ops::Range<usize> {
    let top = (cpu.gpr[gpr::ESP] & 0x3f_ffff) as usize;
    if matches!(end, End::Trap(_)) { top.saturating_sub(FRAME)..top } else { 0..0 }
}

/// Makes what [`compare_memory`] left out the same in both machines, as the frame would: for a run that goes on.
pub fn settle_frame(native: &mut Machine, interpreter: &Machine, cpu: &CpuState, end: End) {
    for at in frame_of(cpu, end) {
        let at = csam::GuestPhys(at as u64);
        let mut byte = [0];
        interpreter.read_ram(at, &mut byte);
        native.write_ram(at, &byte);
    }
}
