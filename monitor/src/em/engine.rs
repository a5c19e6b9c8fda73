//! Engines that run guest code natively, and which of them runs next.
//!
//! What an engine needs of the guest is in CPUM ([`CpuState`]) and in the [`Machine`]; whatever else it keeps is a copy.
//! So EM may go from one to another at any instruction boundary:
//!
//! 1. [`Engines::choose`] names who executes next: the preferred engine, where that refuses for long another, else the
//!    interpreter. With `--engine-shuffle` the preferred one changes every so often. An engine may wait in reserve
//!    ([`Reserve`]) until the preferred one has refused for so long that a hand-over is worth it.
//! 2. The interpreter may run between two runs of an engine at any time: it notes writes to code and flushes in the
//!    machine, where the engine finds them.
//! 3. Another engine notes nothing. [`Engines::enter`] takes the FPU state from the one that ran last and tells the next
//!    that it must not believe what it remembers of memory ([`Engine::others_ran`]).

use super::raw::{After, ExitRecord, KickTarget, RawEngine, RawError, RawRefusal};
use crate::cpum::CpuState;
use crate::machine::Machine;
use host_driver_shim::kvm::{KvmError, KvmExit};
use host_driver_shim::world::{WorldError, WorldExit};
use iced_x86::Instruction;
use std::sync::Arc;

/// Writes to code and flushes noted by the interpreter before the engine has to follow.
pub const MAX_NOTES: usize = 4096;

/// Who executes guest code.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum EngineKind {
    /// Native execution in jailed world processes.
    Raw,
    /// Native execution in hardware ring 1.
    Ring1,
    /// Hardware virtualisation.
    Kvm,
    /// The interpreter.
    Interp,
}

impl EngineKind {
    /// The name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            EngineKind::Raw => "raw",
            EngineKind::Ring1 => "ring1",
            EngineKind::Kvm => "kvm",
            EngineKind::Interp => "interp",
        }
    }
}

/// Why a run cannot go on: a reason in a line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EngineError {
    /// The guest's doing.
    #[error("{0}")]
    Guest(String),
    /// The host cannot.
    #[error("{0}")]
    Host(String),
}

impl From<RawError> for EngineError {
    fn from(e: RawError) -> EngineError {
        match e {
            RawError::World(WorldError::Died(why)) => {
                EngineError::Guest(format!("the guest broke its world: {why}"))
            }
            e => EngineError::Host(e.to_string()),
        }
    }
}

impl From<KvmError> for EngineError {
    fn from(e: KvmError) -> EngineError {
        EngineError::Host(format!("kvm: {e}"))
    }
}

/// What the host said at an exit, for traces.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum HostExit {
    /// A world.
    World(WorldExit),
    /// KVM.
    Kvm(KvmExit),
}

impl From<WorldExit> for HostExit {
    fn from(exit: WorldExit) -> HostExit {
        HostExit::World(exit)
    }
}

impl From<KvmExit> for HostExit {
    fn from(exit: KvmExit) -> HostExit {
        HostExit::Kvm(exit)
    }
}

impl std::fmt::Debug for HostExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            HostExit::World(exit) => exit.fmt(f),
            HostExit::Kvm(exit) => exit.fmt(f),
        }
    }
}

/// An engine that runs guest code natively.
pub trait Engine {
    /// Which one it is.
    fn kind(&self) -> EngineKind;
    /// Why it cannot run the CPU as it is, if it cannot.
    fn refusal(&self, cpu: &CpuState) -> Option<RawRefusal>;
    /// Runs the guest until something happens, in a state [`Self::refusal`] has nothing against. `interrupt_waits`: an
    /// interrupt waits for IF to be set. Afterwards `cpu` is at an instruction boundary and whole but for the FPU, and the
    /// machine has been told that RAM may have changed ([`Machine::ran_natively`]) and, where the guest may have flushed
    /// its TLB, that too ([`Machine::forget_translations`]).
    fn run(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        interrupt_waits: bool,
    ) -> Result<After, EngineError>;
    /// Completes an instruction the last run left half done: a port access that has been served and whose result has not
    /// arrived. From here to the next run `cpu` counts; without this call nobody else may change or execute it.
    fn settle(&mut self, _cpu: &mut CpuState, _m: &mut Machine) -> Result<(), EngineError> {
        Ok(())
    }
    /// Brings the guest's FPU state into CPUM, whose copy counts from here to the next run.
    fn fetch_fpu(&mut self, cpu: &mut CpuState);
    /// Takes what the interpreter noted in the machine (writes to code, flushes), before that is too much.
    fn follow(&mut self, cpu: &CpuState, m: &mut Machine) -> Result<(), EngineError>;
    /// Another engine has run since the last run of this one: guest memory, page tables and descriptor tables may have
    /// changed anywhere, and the guest may have flushed what it liked. The notes of the interpreter in the machine are
    /// not to be believed complete.
    fn others_ran(&mut self, cpu: &CpuState, m: &mut Machine) -> Result<(), EngineError>;
    /// Where other threads kick it out of guest code.
    fn kick_target(&self) -> Arc<KickTarget>;
    /// The last exit.
    fn last_exit(&self) -> ExitRecord;
    /// TSC when the last run began and when it ended.
    fn last_run(&self) -> (u64, u64);
    /// The instruction at EIP is about to be interpreted, because a run ended with [`After::Interpret`].
    fn will_interpret(&mut self, _cpu: &CpuState, _m: &Machine, _instruction: &Instruction) {}
    /// It was, in ring 0 and without a fault.
    fn has_interpreted(&mut self, _cpu: &CpuState, _m: &mut Machine, _instruction: &Instruction) {}
    /// It delivers external interrupts by itself when it runs: EM leaves them to it.
    fn injects(&self) -> bool {
        false
    }
    /// The vector of the external interrupt the last run began with.
    fn take_injected(&mut self) -> Option<u8> {
        None
    }
    /// It can watch the time by itself and deliver ticks: see [`crate::iom::Look::guard`].
    fn can_guard(&self) -> bool {
        false
    }
    /// And in the run to come, too.
    fn guards(&self, _cpu: &CpuState) -> bool {
        self.can_guard()
    }
    /// What it has counted, for reports.
    fn gauges(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
    /// The engine with scans and patches, for reports.
    fn as_raw(&self) -> Option<&RawEngine> {
        None
    }
}

/// Random changes of engines, reproducible by the seed.
#[derive(Clone, Debug)]
pub struct Shuffle {
    /// Guest time between two changes, ns.
    interval: u64,
    /// Guest time of the next one, ns.
    at: u64,
    state: u64,
}

impl Shuffle {
    /// A change every `interval` ns of guest time.
    #[must_use]
    pub fn new(interval: u64, seed: u64) -> Shuffle {
        Shuffle { interval: interval.max(1), at: interval, state: seed }
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Makes an engine when it is first needed, or says why there is none.
pub type Reserve = Box<dyn FnOnce() -> Result<Box<dyn Engine>, String>>;

/// How many instructions the interpreter does in a state the preferred engine refuses, before the engine in reserve is
/// taken: about what going there and back costs (each drops all it has mapped).
const PATIENCE: u64 = 2000;

/// Who executes next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// The engine with this number, which is preferred.
    Native(usize),
    /// The engine with this number, because the preferred one has this against it.
    Instead(usize, RawRefusal),
    /// The interpreter: the engine that should has this against it, or it is the interpreter's turn.
    Interp(Option<RawRefusal>),
}

/// The engines of a run.
pub struct Engines {
    /// In order of preference.
    list: Vec<Box<dyn Engine>>,
    /// Who is preferred now; one more than the list has: the interpreter.
    preferred: usize,
    shuffle: Option<Shuffle>,
    /// What nobody has needed yet.
    reserve: Option<Reserve>,
    /// Instructions to interpret in a state that is refused, before another engine is taken.
    patience: u64,
    /// How many have been, since the preferred engine ran.
    waited: u64,
    /// Who ran last.
    last: Option<usize>,
    /// How often another engine took over, the interpreter not counted.
    pub handovers: u64,
    /// How often the shuffle changed its mind.
    pub shuffles: u64,
}

impl Engines {
    /// Engines in order of preference; the interpreter is always there. With no engine everything is interpreted.
    #[must_use]
    pub fn new(list: Vec<Box<dyn Engine>>, shuffle: Option<Shuffle>) -> Engines {
        Engines {
            list,
            preferred: 0,
            shuffle,
            reserve: None,
            patience: 0,
            waited: 0,
            last: None,
            handovers: 0,
            shuffles: 0,
        }
    }

    /// Another engine, to be made when the preferred one refuses for so long that it is worth a hand-over.
    #[must_use]
    pub fn with_reserve(self, reserve: Reserve) -> Engines {
        Engines { reserve: Some(reserve), patience: PATIENCE, ..self }
    }

    /// So many instructions have been interpreted, because the preferred engine has this against running them. Makes the
    /// engine in reserve if it is time for it.
    pub fn has_waited(&mut self, reason: RawRefusal, instructions: u64) {
        if !reason.lasts() {
            return;
        }
        self.waited = self.waited.saturating_add(instructions);
        if self.waited < self.patience {
            return;
        }
        match self.reserve.take().map(|make| make()) {
            Some(Ok(engine)) => self.list.push(engine),
            Some(Err(why)) => log::info!("{} is interpreted: {why}", reason.name()),
            None => {}
        }
    }

    /// Nothing but the interpreter.
    #[must_use]
    pub fn none(&self) -> bool {
        self.list.is_empty()
    }

    /// What the engine with this number is.
    #[must_use]
    pub fn kind(&self, number: usize) -> EngineKind {
        self.list.get(number).map_or(EngineKind::Interp, |e| e.kind())
    }

    /// The kinds there are, the interpreter last.
    pub fn kinds(&self) -> impl Iterator<Item = EngineKind> {
        self.list.iter().map(|e| e.kind()).chain([EngineKind::Interp])
    }

    /// The engine whose accounting a report shows.
    #[must_use]
    pub fn raw(&self) -> Option<&RawEngine> {
        self.list.iter().find_map(|e| e.as_raw())
    }

    /// The preferred engine's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.list.first().map_or(EngineKind::Interp, |e| e.kind()).name()
    }

    /// Guest time of the next random change, ns.
    #[must_use]
    pub fn next_shuffle(&self) -> Option<u64> {
        self.shuffle.as_ref().map(|s| s.at)
    }

    /// Prefers another engine if it is time for that; `now` is guest time in ns.
    pub fn shuffle(&mut self, now: u64) {
        let others = self.list.len() as u64;
        let Some(shuffle) = self.shuffle.as_mut().filter(|s| s.at <= now && others != 0) else { return };
        shuffle.at = now.saturating_add(shuffle.interval);
        let pick = (shuffle.random() % others) as usize;
        // Any but the one it is.
        self.preferred = if pick >= self.preferred { pick + 1 } else { pick };
        self.shuffles += 1;
    }

    /// Who executes the next instruction.
    #[must_use]
    pub fn choose(&self, cpu: &CpuState) -> Next {
        let Some(preferred) = self.list.get(self.preferred) else { return Next::Interp(None) };
        let Some(reason) = preferred.refusal(cpu) else { return Next::Native(self.preferred) };
        if reason.lasts() && self.waited >= self.patience {
            let able = |i: &usize| *i != self.preferred && self.list[*i].refusal(cpu).is_none();
            if let Some(other) = (0..self.list.len()).find(able) {
                return Next::Instead(other, reason);
            }
        }
        Next::Interp(Some(reason))
    }

    /// The engine that executes next delivers external interrupts by itself.
    #[must_use]
    pub fn injects(&self, cpu: &CpuState) -> bool {
        match self.choose(cpu) {
            Next::Native(number) | Next::Instead(number, _) => self.list[number].injects(),
            Next::Interp(_) => false,
        }
    }

    /// The preferred engine can watch the time by itself, and remains preferred.
    #[must_use]
    pub fn can_guard(&self) -> bool {
        self.shuffle.is_none() && self.list.get(self.preferred).is_some_and(|e| e.can_guard())
    }

    /// The engine of this number watches the time by itself in the run to come.
    #[must_use]
    pub fn guards(&self, number: usize, cpu: &CpuState) -> bool {
        self.list.get(number).is_some_and(|e| e.guards(cpu))
    }

    /// What the engines have counted, for reports.
    pub fn gauges(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.list.iter().flat_map(|engine| engine.gauges())
    }

    /// The engine with this number, which is to run next.
    pub fn enter(
        &mut self,
        number: usize,
        cpu: &mut CpuState,
        m: &mut Machine,
    ) -> Result<&mut dyn Engine, EngineError> {
        if number == self.preferred {
            self.waited = 0;
        }
        if self.last != Some(number) {
            if self.last.is_some() {
                self.settle(cpu, m)?;
                self.fetch_fpu(cpu);
                m.forget_translations();
                self.list[number].others_ran(cpu, m)?;
                self.handovers += 1;
            }
            self.last = Some(number);
        }
        Ok(self.list[number].as_mut())
    }

    /// Whether the engine with this number is not the one that ran last, so that kicks go elsewhere.
    #[must_use]
    pub fn kick_target_of_new(&self, number: usize) -> Option<Arc<KickTarget>> {
        (self.last != Some(number)).then(|| self.list[number].kick_target())
    }

    /// The engine that ran last.
    pub fn last(&mut self) -> Option<&mut dyn Engine> {
        match self.last {
            Some(number) => Some(self.list[number].as_mut()),
            None => None,
        }
    }

    /// Sees to it that the interpreter's notes in the machine do not grow without bound.
    pub fn follow(&mut self, cpu: &CpuState, m: &mut Machine) -> Result<(), EngineError> {
        if m.notes() <= MAX_NOTES {
            return Ok(());
        }
        match self.last() {
            Some(engine) => engine.follow(cpu, m),
            None => {
                // No engine has anything to forget yet.
                m.forget_notes();
                Ok(())
            }
        }
    }

    /// Sees to it that CPUM's state is the guest's at an instruction boundary.
    pub fn settle(&mut self, cpu: &mut CpuState, m: &mut Machine) -> Result<(), EngineError> {
        self.last().map_or(Ok(()), |engine| engine.settle(cpu, m))
    }

    /// Brings the guest's FPU state into CPUM.
    pub fn fetch_fpu(&mut self, cpu: &mut CpuState) {
        if let Some(engine) = self.last() {
            engine.fetch_fpu(cpu);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::{Cause, Route};
    use crate::env::Env;
    use crate::machine::tests::machine;
    use std::cell::RefCell;
    use std::rc::Rc;

    struct Fake {
        kind: EngineKind,
        against: Option<RawRefusal>,
        log: Rc<RefCell<Vec<String>>>,
    }

    impl Engine for Fake {
        fn kind(&self) -> EngineKind {
            self.kind
        }
        fn refusal(&self, _: &CpuState) -> Option<RawRefusal> {
            self.against
        }
        fn run(&mut self, _: &mut CpuState, _: &mut Machine, _: bool) -> Result<After, EngineError> {
            Ok(After::Continue)
        }
        fn fetch_fpu(&mut self, cpu: &mut CpuState) {
            self.log.borrow_mut().push(format!("fpu of {}", self.kind.name()));
            cpu.fpu.0[0] = self.kind as u8;
        }
        fn follow(&mut self, _: &CpuState, m: &mut Machine) -> Result<(), EngineError> {
            m.forget_notes();
            Ok(())
        }
        fn others_ran(&mut self, cpu: &CpuState, _: &mut Machine) -> Result<(), EngineError> {
            self.log.borrow_mut().push(format!("{} after fpu {}", self.kind.name(), cpu.fpu.0[0]));
            Ok(())
        }
        fn kick_target(&self) -> Arc<KickTarget> {
            Arc::default()
        }
        fn last_exit(&self) -> ExitRecord {
            ExitRecord {
                cause: Cause::Other,
                route: Route::Signal,
                eip: 0,
                cpl: 0,
                raw: WorldExit::Kick.into(),
            }
        }
        fn last_run(&self) -> (u64, u64) {
            (0, 0)
        }
    }

    fn engines(
        against: [Option<RawRefusal>; 2],
        shuffle: Option<Shuffle>,
    ) -> (Engines, Rc<RefCell<Vec<String>>>) {
        let log = Rc::<RefCell<Vec<String>>>::default();
        let list = [EngineKind::Raw, EngineKind::Kvm].into_iter().zip(against);
        let list = list.map(|(kind, against)| Box::new(Fake { kind, against, log: log.clone() }) as _);
        (Engines::new(list.collect(), shuffle), log)
    }

    #[test]
    fn what_raw_refuses_for_long_goes_to_kvm_and_what_kvm_refuses_too_is_interpreted() {
        let cpu = CpuState::reset();
        let choose = |raw, kvm| engines([raw, kvm], None).0.choose(&cpu);
        assert_eq!(choose(None, None), Next::Native(0));
        assert_eq!(choose(Some(RawRefusal::RealMode), None), Next::Instead(1, RawRefusal::RealMode));
        assert_eq!(
            choose(Some(RawRefusal::RealMode), Some(RawRefusal::V86)),
            Next::Interp(Some(RawRefusal::RealMode))
        );
        // One instruction is sooner interpreted than handed over.
        assert_eq!(choose(Some(RawRefusal::Shadow), None), Next::Interp(Some(RawRefusal::Shadow)));
        assert_eq!(Engines::new(Vec::new(), None).choose(&cpu), Next::Interp(None));
    }

    #[test]
    fn an_engine_in_reserve_is_made_when_a_refusal_has_lasted() {
        let cpu = CpuState::reset();
        let log = Rc::<RefCell<Vec<String>>>::default();
        let fake = |kind, against| Box::new(Fake { kind, against, log: log.clone() }) as Box<dyn Engine>;
        let v86 = RawRefusal::V86;
        let new = |reserve| Engines::new(vec![fake(EngineKind::Raw, Some(v86))], None).with_reserve(reserve);
        let kvm = fake(EngineKind::Kvm, None);
        let mut engines = new(Box::new(|| Ok(kvm)));
        assert_eq!(engines.choose(&cpu), Next::Interp(Some(v86)));
        engines.has_waited(RawRefusal::Shadow, 10 * PATIENCE);
        engines.has_waited(v86, PATIENCE - 1);
        assert_eq!((engines.kinds().count(), engines.choose(&cpu)), (2, Next::Interp(Some(v86))));
        engines.has_waited(v86, 1);
        assert_eq!(engines.choose(&cpu), Next::Instead(1, v86));
        // It stays until the preferred one has run; then the interpreter is tried first again.
        let mut m = machine(1);
        for (number, next) in [(1, Next::Instead(1, v86)), (0, Next::Interp(Some(v86)))] {
            engines.enter(number, &mut CpuState::reset(), &mut m).unwrap();
            assert_eq!(engines.choose(&cpu), next);
        }
        // Where it cannot be made, that is asked once.
        let mut without = new(Box::new(|| Err("no hardware".into())));
        without.has_waited(v86, PATIENCE);
        without.has_waited(v86, PATIENCE);
        assert_eq!(without.choose(&cpu), Next::Interp(Some(v86)));
    }

    #[test]
    fn an_engine_that_takes_over_gets_the_fpu_and_is_told_to_believe_nothing() {
        let (mut engines, log) = engines([None, None], None);
        let (mut cpu, mut m) = (CpuState::reset(), machine(1));
        for number in [0, 0, 1, 0] {
            engines.enter(number, &mut cpu, &mut m).unwrap();
        }
        assert_eq!(*log.borrow(), ["fpu of raw", "kvm after fpu 0", "fpu of kvm", "raw after fpu 2"]);
        assert_eq!(engines.handovers, 2);
    }

    #[test]
    fn notes_of_the_interpreter_are_taken_before_they_are_too_many() {
        let (mut engines, _) = engines([None, None], None);
        let (mut cpu, mut m) = (CpuState::reset(), machine(1));
        for entered in [false, true] {
            if entered {
                engines.enter(0, &mut cpu, &mut m).unwrap();
            }
            for _ in 0..3 * MAX_NOTES {
                m.paging_changed(&cpu, crate::env::PagingChange::Cr3);
                engines.follow(&cpu, &mut m).unwrap();
                assert!(m.notes() <= MAX_NOTES);
            }
            assert_ne!(m.notes(), 0);
        }
    }

    #[test]
    fn a_shuffle_visits_all_engines_in_an_order_that_its_seed_repeats() {
        let order = |seed| {
            let (mut engines, _) = engines([None, None], Some(Shuffle::new(50, seed)));
            let cpu = CpuState::reset();
            let mut order = vec![engines.choose(&cpu)];
            for now in 1..2000 {
                engines.shuffle(now);
                if now % 50 == 0 {
                    order.push(engines.choose(&cpu));
                } else {
                    assert_eq!(order.last(), Some(&engines.choose(&cpu)), "a change at {now}");
                }
            }
            order
        };
        let first = order(1);
        assert!(first.windows(2).all(|pair| pair[0] != pair[1]));
        for next in [Next::Native(0), Next::Native(1), Next::Interp(None)] {
            assert!(first.contains(&next), "{next:?} never");
        }
        assert_eq!(first, order(1));
        assert_ne!(first, order(2));
    }
}
