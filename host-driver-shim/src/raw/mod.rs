//! The raw engine: guest code in hardware ring 3 of a jailed process, 32-bit compatibility mode.
//!
//! 1. [`RawEngine`] holds what all worlds of a guest share: RAM, code memory, the keeper thread ([`spawn`]).
//! 2. A world is this program executed again; a constructor turns it into a world before `main` ([`init`], [`jail`]).
//! 3. Monitor and world take turns by one futex word in their shared [`arena`]; the world's side is [`rc`].
//! 4. Guest code is entered and left in [`entry`] (assembly) and [`signal`].
//! 5. Data faults that are only misses of the shadow are answered inside the world: [`fill`], [`rc_fill`], [`rc_walk`].
//! 6. A world hands the guest over to another one when it loads CR3: [`relay`], [`rc_switch`].
//!
//! A world can be taken over by its guest (`ljmp 33h`). What it can do then: compute, change its own mappings of guest
//! RAM, lie to the monitor in the arena, end itself. A *confined* world, for guest code that must not reach all guest RAM, has
//! no mapping and no descriptor of it: a thread that cannot be taken over makes its mappings ([`mapper`]), and it sleeps when
//! it has not the turn ([`RawWorld::put_to_bed`]).

mod arena;
mod cpuid_faults;
mod entry;
mod fill;
mod init;
mod jail;
pub mod keys;
mod mapper;
mod orders;
mod rc;
mod rc_access;
pub(crate) mod rc_cpuid;
pub mod rc_deliver;
mod rc_doze;
mod rc_fill;
mod rc_port;
mod rc_quick;
mod rc_switch;
mod rc_users;
pub mod rc_walk;
pub(crate) mod rc_window;
mod relay;
pub(crate) mod signal;
mod spawn;

use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::code_memory::CodeMemory;
use crate::ram::GuestRam;
use crate::shared::SharedMap;
use crate::world::{
    Backing, CpuidRow, DeliveryRules, Fill, FillRules, Guard, HostSegment, HwRegs, Kicker, PORT_ROWS,
    PortRow, PortWrite, Prot, QUICK_SITES, Quick, TableSpan, UsersRules, World, WorldError, WorldExit,
    WorldLin, initial_fx,
};
use arena::{
    ARENA_FD, ARENA_VA, Arena, ArenaMap, CELLS, CODE_FD, COMMANDS, Cell, Command, MAPPERS_FILTER, OWN_FILTER,
    RAM_FD, Word, exit_kind, op, request, turn,
};
pub use arena::{GATE, GATE_REASON, SHIM_SAVE, TRANSIT};
pub use cpuid_faults::CpuidFaults;
use fill::Shown;
use jail::Filters;
use orders::{OrdersMap, Then};
#[doc(hidden)]
pub use rc_switch::CARRIED;
use relay::Relay;
use spawn::{Keeper, Objects, Process, futex_requeue, futex_wait, futex_wake};

/// No CPU to bind worlds to.
const UNBOUND: usize = usize::MAX;
/// How long the monitor sleeps before it looks whether a world still behaves.
const TICK: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How many ticks a world may leave a kick unanswered before it is killed: only a hostile guest does.
const PATIENCE: u32 = 50;
/// How long a new world may take to be ready.
const BIRTH: Duration = Duration::from_secs(20);
/// How long a confined world that has handed over may stay awake: only a hostile guest's does.
const BEDTIME: Duration = Duration::from_secs(2);
/// Where the guest of a world ends.
const FOUR_GIB: u64 = 1 << 32;
/// Bits of MXCSR that exist on every CPU with SSE2 (SDM vol. 1, 10.2.3); a set reserved bit would make FXRSTOR fault.
const MXCSR_BITS: u32 = 0xffff;

/// Binds the calling thread to one host CPU. The thread that runs worlds and its worlds belong on the same one: a
/// hand-over across CPUs costs tens of microseconds.
pub fn pin(cpu: usize) -> io::Result<()> {
    set_affinity(0, cpu)
}

fn set_affinity(pid: libc::pid_t, cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: all-zero is the empty cpu_set_t; CPU_SET stays inside it (checked); the kernel reads it.
    let r = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(pid, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Where a confined world has the address of the 64-bit code by which trampolines leave: [`WorldExit::Gate`], with EIP as R8D
/// says. All other registers but R9 are the guest's still.
#[must_use]
pub const fn long_gate() -> u64 {
    ARENA_VA + offset_of!(Arena, gate_entry) as u64
}

/// What all worlds of one guest share. One of them runs at a time.
#[derive(Clone, Debug)]
pub struct RawEngine(Arc<Engine>);

#[derive(Debug)]
struct Engine {
    ram: GuestRam,
    code: CodeMemory,
    cpu: AtomicUsize,
    trap_tsc: AtomicBool,
    filters: Filters,
    keeper: Keeper,
    relay: Arc<Relay>,
    /// Those of confined worlds.
    cells: SharedMap,
    /// Whose they are.
    tenants: Mutex<Vec<Option<Arc<Process>>>>,
}

impl RawEngine {
    /// An engine for this RAM and code memory; its worlds are bound to host CPU `cpu` if one is given.
    pub fn new(ram: &GuestRam, code: &CodeMemory, cpu: Option<usize>) -> Result<RawEngine, WorldError> {
        let filters = jail::filters().map_err(host("building the jail's filters"))?;
        let keeper = Keeper::start().map_err(host("starting the world keeper"))?;
        Ok(RawEngine(Arc::new(Engine {
            ram: ram.clone(),
            code: code.clone(),
            cpu: AtomicUsize::new(cpu.unwrap_or(UNBOUND)),
            trap_tsc: AtomicBool::new(false),
            filters,
            keeper,
            relay: Arc::new(Relay::new().map_err(host("making the memory of worlds"))?),
            cells: SharedMap::new(c"subring-cells", CELLS * size_of::<Cell>())
                .map_err(host("making the memory of confined worlds"))?,
            tenants: Mutex::new(vec![None; CELLS]),
        })))
    }

    /// Worlds made from here on are bound to this CPU.
    pub fn set_cpu(&self, cpu: usize) {
        self.0.cpu.store(cpu, Ordering::Relaxed);
    }

    /// In worlds made from here on `rdtsc` raises #GP(0), so that the monitor decides what the guest reads.
    pub fn trap_tsc(&self) {
        self.0.trap_tsc.store(true, Ordering::Relaxed);
    }

    /// Makes a world, ready to run, with nothing mapped.
    pub fn spawn_world(&self) -> Result<RawWorld, WorldError> {
        self.spawn(Kind::Plain)
    }

    /// Makes a keyed world, see [`keys`]: one whose code of guest ring 3 reaches only what is mapped for ring 3
    /// ([`Prot::USER`]), even in 64-bit mode. [`keys::refusal`] says where that cannot be.
    pub fn spawn_keyed(&self) -> Result<RawWorld, WorldError> {
        self.spawn(Kind::Keyed)
    }

    /// The same, one that may enter confined worlds by itself if told so.
    pub fn spawn_master(&self) -> Result<RawWorld, WorldError> {
        self.spawn(Kind::Master)
    }

    /// Makes a confined world: one whose guest code reaches nothing but what is mapped for it, even in 64-bit mode. It answers
    /// nothing by itself.
    pub fn spawn_confined(&self) -> Result<RawWorld, WorldError> {
        let free = |tenant: &Option<Arc<Process>>| tenant.as_ref().is_none_or(|p| p.is_dead());
        let number = once_free(|| Ok(self.0.tenants().iter().position(free)))
            .map_err(host("making a confined world"))?;
        self.spawn(Kind::Confined(number))
    }

    fn spawn(&self, kind: Kind) -> Result<RawWorld, WorldError> {
        let engine = &self.0;
        let failed = "making a world's memory";
        let mut seat = None;
        let (arena, orders, cell) = match kind {
            Kind::Plain | Kind::Keyed => {
                let (number, arena) = once_free(|| engine.relay.free()).map_err(host(failed))?;
                arena.set_seat(number);
                seat = Some(number);
                (arena, None, None)
            }
            Kind::Confined(number) => {
                let arena = ArenaMap::in_cell(&engine.cells, number).map_err(host(failed))?;
                let orders = OrdersMap::in_cell(&engine.cells, number).map_err(host(failed))?;
                let at = (number * size_of::<Cell>()) as u64;
                engine.cells.discard(at, size_of::<Cell>()).map_err(host(failed))?;
                (arena, Some(orders), Some(number))
            }
            Kind::Master => (ArenaMap::new().map_err(host(failed))?, None, None),
        };
        let fits = match cell {
            None if kind == Kind::Keyed => arena.set_filter(OWN_FILTER, &engine.filters.keyed),
            None => arena.set_filter(OWN_FILTER, &engine.filters.plain),
            Some(_) => {
                arena.set_filter(OWN_FILTER, &engine.filters.confined)
                    && arena.set_filter(MAPPERS_FILTER, &engine.filters.mapper)
            }
        };
        if !fits {
            return Err(host("building the jail's filter")(io::Error::other("too long")));
        }
        arena.set(Word::MONITOR_PID, std::process::id());
        arena.set(Word::TRAP_TSC, u32::from(engine.trap_tsc.load(Ordering::Relaxed)));
        arena.set(Word::CONFINED, u32::from(cell.is_some()));
        arena.set(Word::KEYED, u32::from(kind == Kind::Keyed));
        arena.set(Word::MASTER, u32::from(kind == Kind::Master));
        if cell.is_none() {
            arena.set_ram_pages(u32::try_from(engine.ram.size() >> 12).unwrap_or(u32::MAX));
        }
        arena.set(Word::TURN, turn::WORLD);
        let objects = Objects {
            ram: engine.ram.shared().fd(),
            code: engine.code.world_fd(),
            watched: if cell.is_some() { engine.cells.fd() } else { engine.ram.watched_fd() },
            cells: (kind == Kind::Master).then(|| engine.cells.fd()),
            arena_at: arena.start(),
        };
        let seat = seat.map(|number| number as u32);
        let relay = seat.map(|number| (Arc::downgrade(&engine.relay), number));
        if let Some(number) = seat {
            engine.relay.begin(number);
        }
        let process = engine.keeper.spawn(arena, orders, relay, objects).map_err(host("spawning a world"))?;
        if let Some(number) = seat {
            engine.relay.seat(number as usize, &process);
        }
        if let Some(number) = cell
            && let Some(tenant) = engine.tenants().get_mut(number)
        {
            *tenant = Some(Arc::clone(&process));
        }
        let mut world = RawWorld {
            kicker: Arc::new(RawKicker(Arc::clone(&process))),
            process,
            engine: Arc::clone(engine),
            commands: Vec::with_capacity(COMMANDS),
            fx: Box::new(initial_fx()),
            fx_state: FxState::Ours,
            cpuid_faults: false,
            finished: false,
            answered: 0,
            mapper: None,
            keyed: kind == Kind::Keyed,
            cell,
            seat,
            entered: None,
            prepared: 0,
        };
        let cpu = engine.cpu.load(Ordering::Relaxed);
        if cpu != UNBOUND {
            world.pin(cpu)?;
        }
        world.wait(Some(BIRTH))?;
        if world.process.arena.get(Word::EXIT_KIND) != exit_kind::READY {
            return Err(world.misbehaved());
        }
        if world.process.orders.is_some() {
            // No guest code has run yet: this is true.
            world.mapper = Some(world.process.arena.get(Word::MAPPER).cast_signed());
            if cpu != UNBOUND {
                world.pin(cpu)?;
            }
            world.put_to_bed()?;
        }
        world.cpuid_faults = world.process.arena.get(Word::CPUID_FAULTS) == 1;
        Ok(world)
    }
}

/// What a world is to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Keyed,
    Master,
    /// In this cell.
    Confined(usize),
}

impl Engine {
    fn tenants(&self) -> MutexGuard<'_, Vec<Option<Arc<Process>>>> {
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place for a new world: those that have ended leave theirs when they are gone.
fn once_free<T>(mut find: impl FnMut() -> io::Result<Option<T>>) -> io::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(free) = find()? {
            return Ok(free);
        }
        if start.elapsed() > BIRTH {
            return Err(io::Error::other("there are too many"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> WorldError {
    move |source| WorldError::Host { what, source }
}

/// Where the valid copy of the FPU state is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FxState {
    /// In the arena; our copy is stale.
    Arena,
    /// In our copy, which may have been changed; the arena gets it at the next start.
    Ours,
}

/// A world: a process that runs guest code for us. Dropping it kills the process.
#[derive(Debug)]
pub struct RawWorld {
    process: Arc<Process>,
    kicker: Arc<RawKicker>,
    engine: Arc<Engine>,
    /// Queued, carried out at the next start.
    commands: Vec<Command>,
    /// Never handed to the world: [`World::fpu`] gives out a reference, and the arena may change at any time.
    fx: Box<[u8; 512]>,
    fx_state: FxState,
    cpuid_faults: bool,
    /// We have sent SIGKILL: it never gets the turn again, even if it is not dead yet.
    finished: bool,
    /// Faults the world had answered when we last asked.
    answered: u32,
    /// The mapper's thread id, of a confined world.
    mapper: Option<libc::pid_t>,
    keyed: bool,
    /// The number of a confined world's cell.
    cell: Option<usize>,
    /// Its number among those that may hand the guest over to each other.
    seat: Option<u32>,
    /// The cell of the confined world this one may enter by itself.
    entered: Option<usize>,
    /// So many queued commands have been left for another world to have carried out.
    prepared: usize,
}

impl RawWorld {
    /// Descriptors this process has open for each: its arena's and its process's.
    pub const FILES: usize = 2;

    /// The world's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid.unsigned_abs()
    }

    /// Whether CPUID raises #GP(0) in this world (the CPU can fault it); otherwise guest code sees the host's CPUID.
    #[must_use]
    pub fn cpuid_faults(&self) -> bool {
        self.cpuid_faults
    }

    /// Where pieces of the runtime are in this world that hostile code could jump to, for tests that do.
    #[doc(hidden)]
    #[must_use]
    pub fn runtime_places(&self) -> Vec<u64> {
        let moved = self.process.arena.gate_entry().wrapping_sub(entry::gate_address());
        entry::places().iter().map(|at| at.wrapping_add(moved)).collect()
    }

    /// Carries out the queued commands now, without running guest code.
    pub fn flush(&mut self) -> Result<(), WorldError> {
        self.take_back();
        if self.commands.is_empty() {
            return Ok(());
        }
        if self.process.orders.is_some() {
            return self.have_mapped();
        }
        match self.hand_over(request::COMMANDS)? {
            exit_kind::COMMANDS_DONE => {
                self.commands.clear();
                Ok(())
            }
            exit_kind::COMMAND_FAILED => Err(self.alleged_failure()),
            _ => Err(self.misbehaved()),
        }
    }

    /// Gives the world the turn, waits until it gives it back, and says why it did (an allegation).
    fn hand_over(&mut self, what: u32) -> Result<u32, WorldError> {
        let given = self.give_turn(what, true);
        if given.is_err() {
            // It will not have the turn again: whoever kicks it must not take another one for it.
            self.process.close_signals();
        }
        given?;
        if self.process.orders.is_some() {
            // The mapper has carried them out.
            self.commands.clear();
        }
        self.has_run()
    }

    /// It has handed over: says why (an allegation), and sees to it that a confined world sleeps.
    fn has_run(&mut self) -> Result<u32, WorldError> {
        let signalled = self.process.close_signals();
        let why = self.process.arena.get(Word::EXIT_KIND);
        if self.process.orders.is_some() {
            if signalled {
                // It may take that signal only now, and would not stay asleep.
                let later = std::mem::take(&mut self.commands);
                self.give_turn(request::COMMANDS, false)?;
                self.commands = later;
            }
            self.put_to_bed()?;
        }
        Ok(why)
    }

    fn give_turn(&mut self, what: u32, signals: bool) -> Result<(), WorldError> {
        self.take_back();
        let arena = &self.process.arena;
        let confined = self.process.orders.as_ref();
        arena.set_commands(if confined.is_some() { &[] } else { &self.commands });
        arena.set(Word::REQUEST, what);
        let word = arena.word(Word::TURN);
        if self.process.is_dead() || self.finished {
            return Err(self.died());
        }
        if let Some(seat) = self.seat {
            self.engine.relay.begin(seat);
        }
        // A death between that check and this store overwrites neither: the keeper stores DEAD after it sets `dead`,
        // and the wait below looks at `dead` again before its first sleep is over and at every tick.
        word.store(turn::WORLD, Ordering::SeqCst);
        if let Some(orders) = confined {
            orders.abed().store(0, Ordering::SeqCst);
        }
        match confined {
            Some(orders) if !self.commands.is_empty() => {
                orders.give(&self.commands, Then::WakeWorld);
            }
            Some(orders) => {
                if signals {
                    self.process.open_signals();
                }
                let _awake = futex_wake(orders.bed()) || futex_wake(word);
            }
            None => {
                self.process.open_signals();
                futex_wake(word);
            }
        }
        self.wait(None)
    }

    /// Sees to it that a confined world sleeps until it is woken, by the monitor or its mapper: what it has mapped may be taken
    /// from it as late as that.
    ///
    /// It sleeps on a word everybody who has its memory could wake; from there it is moved to another, which proves that it
    /// does. Its filter allows it only sleeps without an end, and signals are sent while it has the turn alone.
    fn put_to_bed(&mut self) -> Result<(), WorldError> {
        let Some(orders) = &self.process.orders else { return Ok(()) };
        if orders.abed().load(Ordering::SeqCst) != 0 {
            return Ok(());
        }
        let (turn, bed) = (self.process.arena.word(Word::TURN), orders.bed());
        let mut start = None;
        while !futex_requeue(turn, turn::MONITOR, bed) {
            if self.process.is_dead() {
                return Err(self.died());
            }
            // It is about to: give it the time.
            std::thread::yield_now();
            let start = *start.get_or_insert_with(Instant::now);
            if start.elapsed() > BEDTIME {
                return Err(self.misbehaved());
            }
        }
        orders.abed().store(1, Ordering::SeqCst);
        Ok(())
    }

    /// Has a confined world's mapper carry out the queued commands.
    fn have_mapped(&mut self) -> Result<(), WorldError> {
        let Some(orders) = &self.process.orders else { return Ok(()) };
        let number = orders.give(&self.commands, Then::Tell);
        loop {
            let done = orders.done().load(Ordering::SeqCst);
            if done == number {
                break;
            }
            if self.process.is_dead() {
                return Err(self.died());
            }
            futex_wait(orders.done(), done, &TICK);
        }
        match orders.failed() {
            Some(index) => Err(self.command_failed(index, None)),
            None => {
                self.commands.clear();
                Ok(())
            }
        }
    }

    /// Waits for the world to hand over, or its death.
    fn wait(&mut self, limit: Option<Duration>) -> Result<(), WorldError> {
        let word = match self.seat {
            Some(_) => self.engine.relay.turn(),
            None => self.process.arena.word(Word::TURN),
        };
        let start = limit.map(|_| Instant::now());
        let mut unanswered = 0;
        loop {
            let whose = word.load(Ordering::SeqCst);
            if whose == turn::MONITOR {
                return Ok(());
            }
            let other = match self.handed_to() {
                None if self.process.is_dead() => return Err(self.died()),
                None => None,
                Some(seat) => match self.engine.relay.process(seat) {
                    None => return Err(self.misbehaved()),
                    Some(other) if other.is_dead() => return Ok(()),
                    other => other,
                },
            };
            if whose != turn::WORLD {
                // Not the keeper's DEAD (it sets `dead` first), so the world wrote it; waiting would not sleep.
                return Err(self.misbehaved());
            }
            let woken = futex_wait(word, turn::WORLD, &TICK);
            if let Some(orders) = &self.process.orders
                && word.load(Ordering::SeqCst) == turn::WORLD
            {
                if let Some(index) = orders.failed() {
                    word.store(turn::MONITOR, Ordering::SeqCst);
                    orders.abed().store(1, Ordering::SeqCst);
                    return Err(self.command_failed(index, None));
                }
                // It may be waiting behind us: what wakes one of those who wait for this word has woken us.
                if woken {
                    futex_wake(word);
                }
            }
            if woken {
                continue;
            }
            unanswered = if self.process.kicked.load(Ordering::SeqCst) { unanswered + 1 } else { 0 };
            let late = matches!((limit, start), (Some(l), Some(s)) if s.elapsed() > l);
            if unanswered == PATIENCE / 2
                && let Some(number) = self.entered
                && let Some(Some(guest)) = self.engine.tenants().get(number)
            {
                // Perhaps it is the confined world that does not answer; then this one will.
                guest.signal(libc::SIGKILL);
            }
            if unanswered > PATIENCE
                && let Some(other) = other
            {
                // Its end is noticed.
                other.signal(libc::SIGKILL);
                unanswered = 0;
                continue;
            }
            if unanswered > PATIENCE || late {
                self.process.signal(libc::SIGKILL);
                self.finished = true;
                let why = if late { "it was not ready in time" } else { "it did not answer a kick" };
                return Err(WorldError::Died(String::from(why)));
            }
        }
    }

    /// The seat of the world to which the guest has been handed from here, in the run that is on or was the last.
    fn handed_to(&self) -> Option<u32> {
        self.seat.and_then(|own| Some(self.engine.relay.holder()).filter(|holder| *holder != own))
    }

    fn died(&self) -> WorldError {
        WorldError::Died(self.process.obituary().unwrap_or_else(|| String::from("it is gone")))
    }

    /// The world said something that cannot be: it is not ours any more.
    fn misbehaved(&mut self) -> WorldError {
        self.process.signal(libc::SIGKILL);
        self.finished = true;
        WorldError::Died(String::from("it did not keep to the protocol"))
    }

    /// Reads which command failed.
    fn alleged_failure(&mut self) -> WorldError {
        let index = self.process.arena.get(Word::EXIT_COMMAND) as usize;
        let errno = i32::try_from(self.process.arena.get(Word::EXIT_ERRNO)).unwrap_or(0);
        self.command_failed(index, Some(errno))
    }

    /// A command failed. Nothing is queued any more.
    fn command_failed(&mut self, index: usize, errno: Option<i32>) -> WorldError {
        self.prepared = 0;
        let Some(&c) = self.commands.get(index) else { return self.misbehaved() };
        self.commands.clear();
        let source = errno.map_or_else(|| io::Error::other("the host refused"), io::Error::from_raw_os_error);
        match c.op {
            op::SEGMENT => WorldError::Host { what: "modify_ldt", source },
            _ => WorldError::Map { at: c.a, len: c.b, why: source.to_string() },
        }
    }

    /// What the world says of its exit.
    fn exit(&mut self, kind: u32, regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        let arena = &self.process.arena;
        let exit = match kind {
            exit_kind::FAULT => {
                let vector = arena.get(Word::EXIT_VECTOR);
                if vector > 31 {
                    return Err(self.misbehaved());
                }
                WorldExit::Fault {
                    vector: vector as u8,
                    error_code: arena.get(Word::EXIT_ERROR),
                    cr2: if vector == 14 { arena.get(Word::EXIT_CR2) } else { 0 },
                }
            }
            exit_kind::GATE => WorldExit::Gate { reason: arena.vcpu_read(GATE_REASON) },
            exit_kind::SYSCALL => WorldExit::Syscall,
            exit_kind::KICK => {
                self.forget_kick();
                WorldExit::Kick
            }
            exit_kind::USERS if self.entered.is_some() => WorldExit::Users,
            exit_kind::BAD_STATE => {
                let (vector, code) = (arena.get(Word::EXIT_VECTOR), arena.get(Word::EXIT_ERROR));
                return Err(WorldError::BadState(format!(
                    "exception {vector} (error code {code:#x}) while loading {regs:x?}"
                )));
            }
            _ => return Err(self.misbehaved()),
        };
        *regs = self.process.arena.regs();
        self.fx_state = FxState::Arena;
        Ok(exit)
    }

    /// Takes commands back that were left for another world to have carried out, as far as it has not.
    fn take_back(&mut self) {
        let Some(orders) = self.process.orders.as_ref().filter(|_| self.prepared != 0) else { return };
        let n = std::mem::take(&mut self.prepared).min(self.commands.len());
        if orders.prepared().swap(0, Ordering::SeqCst) == 0 {
            self.commands.drain(..n);
        }
    }

    fn push(&mut self, command: Command) -> Result<(), WorldError> {
        self.process.arena.disarm();
        self.take_back();
        if self.commands.len() >= COMMANDS {
            self.flush()?;
        }
        self.commands.push(command);
        Ok(())
    }

    /// What a world is told of the rights of a mapping.
    fn prot(&self, prot: Prot) -> u32 {
        host_prot(prot) | if self.keyed && prot.contains(Prot::USER) { rc::FOR_RING3 } else { 0 }
    }

    fn range(at: WorldLin, len: u32) -> Result<(), WorldError> {
        let fine = len > 0
            && len.is_multiple_of(4096)
            && at.0.is_multiple_of(4096)
            && u64::from(at.0) + u64::from(len) <= FOUR_GIB;
        if fine { Ok(()) } else { Err(refused(at, len, "not a range of whole pages below 4 GiB")) }
    }
}

fn refused(at: WorldLin, len: u32, why: &str) -> WorldError {
    WorldError::Map { at: at.0, len, why: String::from(why) }
}

fn host_prot(prot: Prot) -> u32 {
    let bit = |p, host: i32| if prot.contains(p) { host as u32 } else { 0 };
    bit(Prot::READ, libc::PROT_READ) | bit(Prot::WRITE, libc::PROT_WRITE) | bit(Prot::EXEC, libc::PROT_EXEC)
}

impl World for RawWorld {
    fn run(&mut self, regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        let arena = &self.process.arena;
        if self.process.kicked.swap(false, Ordering::SeqCst) {
            arena.word(Word::KICK).store(0, Ordering::SeqCst);
            return if self.process.is_dead() { Err(self.died()) } else { Ok(WorldExit::Kick) };
        }
        let [_, cs, ..] = regs.sel;
        if cs & !3 == 0x30 {
            return Err(WorldError::BadState(String::from("CS is the host's 64-bit code segment")));
        }
        arena.set_regs(regs);
        if self.fx_state == FxState::Ours {
            for (byte, real) in self.fx[24..28].iter_mut().zip(MXCSR_BITS.to_le_bytes()) {
                *byte &= real;
            }
            arena.set_fx(&self.fx);
        }
        let kind = self.hand_over(request::RUN)?;
        if kind == exit_kind::COMMAND_FAILED {
            return Err(self.alleged_failure());
        }
        self.commands.clear();
        if let Some(seat) = self.handed_to() {
            return match self.engine.relay.process(seat) {
                Some(_) => Ok(WorldExit::Handed { seat }),
                None => Err(self.misbehaved()),
            };
        }
        self.exit(kind, regs)
    }

    fn map(&mut self, at: WorldLin, len: u32, backing: Backing, prot: Prot) -> Result<(), WorldError> {
        RawWorld::range(at, len)?;
        let (fd, offset, size) = match backing {
            Backing::Ram(offset) => (RAM_FD, offset, self.engine.ram.size()),
            Backing::Code(offset) => (CODE_FD, offset, self.engine.code.size()),
            Backing::Vcpu => {
                let at = self.process.arena.start() + arena::VCPU_OFFSET as u64;
                (ARENA_FD, at, at + 4096)
            }
        };
        if !offset.is_multiple_of(4096) || offset.checked_add(u64::from(len)).is_none_or(|end| end > size) {
            return Err(refused(at, len, "its backing ends before it"));
        }
        if matches!(backing, Backing::Code(_)) && prot.contains(Prot::WRITE) {
            return Err(refused(at, len, "code memory is never writable in a world"));
        }
        let data = matches!(backing, Backing::Ram(_)) && !prot.contains(Prot::EXEC);
        self.process.arena.show(at.0 >> 12, len >> 12, if data { Shown::Data } else { Shown::Other });
        self.take_back();
        self.process.arena.disarm();
        let c =
            Command { op: op::MAP, a: at.0, b: len, c: self.prot(prot), d: fd as u32, reserved: 0, offset };
        if let Some(last) = self.commands.last_mut()
            && (last.op, last.c, last.d) == (c.op, c.c, c.d)
            && last.a.checked_add(last.b) == Some(c.a)
            && last.offset + u64::from(last.b) == c.offset
            && let Some(len) = last.b.checked_add(c.b)
        {
            last.b = len;
            return Ok(());
        }
        self.push(c)
    }

    fn unmap(&mut self, at: WorldLin, len: u32) -> Result<(), WorldError> {
        if (at.0, len) == (0, 0) {
            self.process.arena.show_nothing();
        } else {
            RawWorld::range(at, len)?;
            self.process.arena.show(at.0 >> 12, len >> 12, Shown::Nothing);
        }
        self.push(Command { op: op::UNMAP, a: at.0, b: len, ..Command::default() })
    }

    fn protect(&mut self, at: WorldLin, len: u32, prot: Prot) -> Result<(), WorldError> {
        RawWorld::range(at, len)?;
        self.push(Command { op: op::PROTECT, a: at.0, b: len, c: host_prot(prot), ..Command::default() })
    }

    fn set_segment(&mut self, slot: u16, segment: HostSegment) -> Result<(), WorldError> {
        if slot >= 8192 {
            let source = io::Error::from(io::ErrorKind::InvalidInput);
            return Err(WorldError::Host { what: "modify_ldt (slots are 0..8192)", source });
        }
        // struct user_desc's bit fields: seg_32bit, contents (2 bits: 0 data, 1 expand-down, 2 code), read_exec_only,
        // limit_in_pages, seg_not_present, useable.
        let contents = match segment {
            HostSegment { code: true, .. } => 2,
            HostSegment { expand_down: true, .. } => 1,
            _ => 0,
        };
        let flags = u32::from(segment.big)
            | contents << 1
            | u32::from(!segment.rw) << 3
            | u32::from(segment.limit_in_pages) << 4
            | 1 << 6;
        self.process.arena.slot_is_set(slot);
        self.push(Command {
            op: op::SEGMENT,
            a: u32::from(slot),
            b: segment.base,
            c: segment.limit & 0xf_ffff,
            d: flags,
            ..Command::default()
        })
    }

    fn fpu(&mut self) -> &mut [u8; 512] {
        if self.fx_state == FxState::Arena {
            self.process.arena.fx(&mut self.fx);
            self.fx_state = FxState::Ours;
        }
        &mut self.fx
    }

    fn vcpu_read(&self, offset: u32) -> u32 {
        self.process.arena.vcpu_read(offset)
    }

    fn vcpu_write(&mut self, offset: u32, value: u32) {
        self.process.arena.vcpu_write(offset, value);
    }

    fn place_gate(&mut self, stub: WorldLin, vcpu: WorldLin) -> Result<(), WorldError> {
        RawWorld::range(stub, 4096)?;
        RawWorld::range(vcpu, 4096)?;
        self.process.arena.set_stub(vcpu.0);
        self.vcpu_write(GATE, stub.0);
        self.vcpu_write(GATE + 4, 0x33);
        self.map(vcpu, 4096, Backing::Vcpu, Prot::READ | Prot::WRITE)?;
        self.process.arena.show(stub.0 >> 12, 1, Shown::Other);
        self.push(Command {
            op: op::MAP,
            a: stub.0,
            b: 4096,
            c: host_prot(Prot::READ | Prot::EXEC),
            d: ARENA_FD as u32,
            reserved: 0,
            offset: self.process.arena.start() + arena::STUB_OFFSET as u64,
        })
    }

    fn place_transit(&mut self, at: WorldLin) -> Result<(), WorldError> {
        if !self.keyed {
            return Ok(());
        }
        RawWorld::range(at, 4096)?;
        self.process.arena.set_transit(at.0);
        self.process.arena.show(at.0 >> 12, 1, Shown::Other);
        self.push(Command {
            op: op::MAP,
            a: at.0,
            b: 4096,
            c: self.prot(Prot::READ | Prot::WRITE | Prot::USER),
            d: ARENA_FD as u32,
            reserved: 0,
            offset: self.process.arena.start() + arena::TRANSIT_OFFSET as u64,
        })
    }
    fn pin(&mut self, cpu: usize) -> Result<(), WorldError> {
        for thread in std::iter::once(self.process.pid).chain(self.mapper) {
            match set_affinity(thread, cpu) {
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(self.died()),
                r => r.map_err(host("binding a world to a CPU"))?,
            }
        }
        Ok(())
    }

    fn set_fill_rules(&mut self, rules: &FillRules) {
        if self.process.orders.is_some() {
            // It has nothing to fill with, nor to look at guest code.
            return;
        }
        self.process.arena.set_fill_rules(rules);
    }

    fn set_cpuid(&mut self, rows: &[CpuidRow]) {
        self.process.arena.set_cpuid(rows);
    }

    fn set_quick(&mut self, table: &[Quick; QUICK_SITES]) {
        self.process.arena.set_quick(table);
    }

    fn flushes_done(&self) -> u32 {
        self.process.arena.flushes_done()
    }

    fn accesses_done(&self) -> u32 {
        self.process.arena.accesses_done()
    }

    fn cell(&self) -> Option<u32> {
        self.cell.and_then(|number| u32::try_from(number).ok())
    }

    fn set_users(&mut self, rules: &UsersRules) {
        self.entered = rules.cell.checked_sub(1).map(|number| number as usize);
        self.process.arena.set_users(rules);
    }

    fn users_are_stale(&self) -> bool {
        self.process.arena.users_are_stale()
    }

    fn take_flushes_of_users(&mut self, each: &mut dyn FnMut(WorldLin)) {
        self.process.arena.flushes_of_users().for_each(|page| each(WorldLin(page << 12)));
    }

    fn settle(&mut self) -> Result<(), WorldError> {
        if self.process.is_dead() || self.finished {
            return Err(self.died());
        }
        self.take_back();
        if let Some(orders) = &self.process.orders {
            orders.prepare(&self.commands);
            self.prepared = self.commands.len();
        }
        Ok(())
    }

    fn take_exit(&mut self, regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        if self.process.is_dead() || self.finished {
            return Err(self.died());
        }
        if self.process.arena.get(Word::TURN) != turn::MONITOR {
            return Err(self.misbehaved());
        }
        if self.seat.is_some() {
            let kind = self.process.arena.get(Word::EXIT_KIND);
            return self.exit(kind, regs);
        }
        let failed = self.process.orders.as_ref().and_then(OrdersMap::failed);
        if let Some(index) = failed.filter(|_| self.prepared != 0) {
            return Err(self.command_failed(index, None));
        }
        self.take_back();
        let kind = self.has_run()?;
        self.exit(kind, regs)
    }

    fn forget_kick(&mut self) {
        // First ours, then the world's: a kick between the two is seen by the next run.
        self.process.kicked.store(false, Ordering::SeqCst);
        self.process.arena.word(Word::KICK).store(0, Ordering::SeqCst);
    }

    fn reflected(&self) -> u32 {
        self.process.arena.calls()
    }

    fn set_ports(&mut self, rows: &[PortRow; PORT_ROWS]) {
        self.process.arena.set_ports(rows);
    }

    fn ports_done(&self) -> u32 {
        self.process.arena.ports_done()
    }

    fn take_posted(&mut self, each: &mut dyn FnMut(PortWrite)) {
        self.process.arena.take_posted(each);
    }

    fn mark_large(&mut self, lin: u32) {
        self.process.arena.mark_large(lin);
    }

    fn set_delivery_rules(&mut self, rules: &DeliveryRules) {
        self.process.arena.set_delivery_rules(rules);
    }

    fn set_tick_rules(&mut self, rules: &DeliveryRules) {
        self.process.arena.set_tick_rules(rules);
    }

    fn can_guard(&self) -> bool {
        // A confined world's timer would wake it.
        self.process.orders.is_none()
    }

    fn set_guard(&mut self, guard: &Guard) {
        if !self.can_guard() {
            return;
        }
        self.process.arena.set_guard(guard);
    }

    fn faults_delivered(&self) -> u32 {
        self.process.arena.faults_delivered()
    }

    fn take_fills(&mut self, each: &mut dyn FnMut(Fill)) -> u32 {
        let arena = &self.process.arena;
        arena.take_fills(each);
        let now = arena.faults_answered();
        now.wrapping_sub(std::mem::replace(&mut self.answered, now))
    }

    fn is_gone(&self) -> bool {
        self.process.is_dead() || self.finished
    }

    fn seat(&self) -> Option<u32> {
        self.seat
    }

    fn arm(&mut self, epoch: u32, cr3: u32, tables: &[TableSpan]) -> bool {
        let Some(seat) = self.seat else { return false };
        let armed = self.process.arena.arm(&self.engine.ram, epoch, cr3, tables);
        if armed {
            self.engine.relay.set_place(cr3, seat);
        }
        armed
    }

    fn is_armed(&self, epoch: u32) -> bool {
        self.seat.is_some() && self.process.arena.is_armed(epoch)
    }

    fn disarm(&mut self) {
        self.process.arena.disarm();
    }

    fn set_epoch(&mut self, epoch: u32) {
        if self.seat.is_some() {
            self.engine.relay.set_epoch(epoch);
        }
    }

    fn take_runners(&mut self) -> Vec<u32> {
        if self.seat.is_some() { self.engine.relay.take_listed() } else { Vec::new() }
    }

    fn forget_segments(&mut self) {
        self.process.arena.forget_slots();
    }

    fn taken_over(&self) -> u32 {
        self.process.arena.taken()
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.kicker.clone()
    }
}

impl Drop for RawWorld {
    fn drop(&mut self) {
        // The keeper reaps it.
        self.process.signal(libc::SIGKILL);
        if let Some(seat) = self.seat {
            self.engine.relay.leave(seat);
        }
    }
}

/// Interrupts one world.
#[derive(Debug)]
struct RawKicker(Arc<Process>);

impl Kicker for RawKicker {
    fn kick(&self) {
        if self.0.kicked.swap(true, Ordering::SeqCst) {
            return; // One is on its way, and one exit answers all.
        }
        self.0.arena.word(Word::KICK).store(1, Ordering::SeqCst);
        // A world that gets the turn later looks at the flag on its way in.
        self.0.signal_if_open(signal::KICK_SIGNAL);
    }
}
