//! EM: the execution manager. One loop decides what happens next to the virtual CPU.
//!
//! 1. Requests of other threads, device timers, restart requests.
//! 2. An interrupt, if one waits and may be delivered.
//! 3. HLT: sleep on the host until something comes.
//! 4. Otherwise run: on the engine [`Engines::choose`] names, or in the interpreter.

pub mod attention;
pub mod dump;
pub mod engine;
pub mod kvm;
pub mod lockstep;
pub mod placement;
pub mod raw;
pub mod ticker;

use crate::account::{Account, Cause, Kind, Route};
use crate::config::Trace;
use crate::cpum::{CpuState, Shadow, cr0, eflags, seg};
use crate::debug::console::{self, ConsoleTarget, Info};
use crate::devices::i8254::CLK_HZ;
use crate::env::{Env, Privilege};
use crate::interp::{self, Step};
use crate::iom::{Look, ResetCause};
use crate::machine::Machine;
use crate::trap::{Event, Trap};
use crate::trpm;
use attention::{Attention, Request};
use csam::GuestLin;
use engine::{EngineError, EngineKind, Engines, MAX_NOTES, Next};
use host_driver_shim::raw::CpuidFaults;
use host_driver_shim::tsc::read as host_tsc;
use host_driver_shim::world::Guard;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use lockstep::{Difference, Lockstep};
use patm::vcpu_page as vp;
use placement::Placement;
use raw::{After, ExitRecord, RawRefusal};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use ticker::Ticker;

/// Instructions interpreted in a row before the loop looks around.
const INTERPRETER_SLICE: u32 = 2048;
/// Instructions interpreted on after one that had to be, in the hope of meeting the next, where nothing is known yet.
const BURST: u32 = 256;
/// The next one met after so many instructions is no gain: an exit costs as much as interpreting about these.
const BURST_WORTH: u32 = 64;
/// The least a site is given that has just met another.
const BURST_PAID: u32 = 64;
/// A site whose budget has shrunk below this is left at once.
const BURST_LEAST: u32 = 8;
/// Sites whose bursts are remembered. A guest that makes more of them is forgotten and learnt anew.
const MAX_BURST_SITES: usize = 1 << 16;
/// A guest that programs its timer for each tick is likely to go on as regularly as before. So the next look at the devices
/// is so much after the time at which the next tick would come (ns), and a count for then or later costs no exit.
const LOOK_AFTER_TICK: u64 = 15_000;
/// By so much (ns) may a tick be delayed for that, besides.
const TICK_DELAY: u64 = 25_000;
/// It is not worth while for a tick that is sooner than this, ns.
const LOOK_WORTH: u64 = 200_000;
/// Guest time after which a guest in lockstep is compared if it does not exit by itself, ns.
const LOCKSTEP_INTERVAL: u64 = 200_000;
/// Exits remembered for a dump.
const RING: usize = 64;

/// Why the loop ended.
#[derive(Debug)]
pub enum Stop {
    /// HLT with interrupts disabled.
    Halted,
    /// The guest asked for a restart.
    Restart(&'static str),
    /// The user wants the machine reset.
    Reset,
    /// isa-debug-exit.
    DebugExit(u32),
    /// The user's wish.
    Quit,
    /// A signal.
    Interrupted,
    /// The guest cannot go on: the reason in a line.
    Fatal(String),
    /// The host cannot go on: the reason in a line.
    Host(String),
    /// Lockstep has compared what was to be compared.
    Compared,
    /// Lockstep found a difference.
    Differs(Difference),
}

/// Interpreting on after an exit.
#[derive(Clone, Copy, Debug)]
struct Burst {
    /// The last instruction that was, or would have been, an exit.
    site: u32,
    /// Instructions since then.
    used: u32,
    /// Instructions left until it is given up.
    left: u32,
}

/// One virtual CPU with its machine.
pub struct Em {
    /// CPUM.
    pub cpu: CpuState,
    /// RAM, devices, time.
    pub m: Machine,
    /// The engines besides the interpreter.
    pub engines: Engines,
    /// The fault accounting.
    pub account: Account,
    /// Who ran why instead of the preferred engine: so many instructions of the interpreter, exits of others.
    pub refusals: BTreeMap<(EngineKind, &'static str), u64>,
    /// Instructions interpreted.
    pub interpreted: u64,
    attention: Arc<Attention>,
    ticker: Ticker,
    deadline: Option<u64>,
    /// The last tick found the guest asleep or in ring 3: worlds deliver the next ones by themselves if it goes on like that.
    dozes: bool,
    trace: Trace,
    ring: Vec<(ExitRecord, u64)>,
    exits: u64,
    open: Option<(ExitRecord, Kind, u64)>,
    burst: Option<Burst>,
    /// For each site that is interpreted: for how many instructions it is worth to go on from there. Twice the distance
    /// to the next one where one was met, a quarter less where none was.
    burst_budgets: HashMap<u32, u32>,
    /// Sensitive instructions that were interpreted in bursts, so that they cost no exit.
    pub burst_hits: u64,
    ns_per_tsc: f64,
    /// CR3 and EIP of the last #NM that was raised ahead of an FPU instruction: if the guest comes back there with
    /// CR0.TS still set, it wants to see the instruction itself.
    early_nm: Option<(u32, u32)>,
    stop: Option<Stop>,
    stopped: bool,
    placement: Option<Placement>,
    cpuid_faults: Option<CpuidFaults>,
    /// The follower, if every step is done again by the interpreter.
    pub lockstep: Option<Box<Lockstep>>,
    /// Instructions interpreted when the follower was last compared.
    compared_at: u64,
}

impl Em {
    /// Puts the parts together. `ns_per_tsc` converts time-stamp counts to nanoseconds.
    pub fn new(
        cpu: CpuState,
        m: Machine,
        engines: Engines,
        attention: Arc<Attention>,
        trace: Trace,
        ns_per_tsc: f64,
    ) -> std::io::Result<Em> {
        let ticker = Ticker::new(attention.clone())?;
        Ok(Em {
            cpu,
            m,
            engines,
            account: Account::new(),
            refusals: BTreeMap::new(),
            interpreted: 0,
            attention,
            ticker,
            deadline: None,
            dozes: false,
            trace,
            ring: Vec::with_capacity(RING),
            exits: 0,
            open: None,
            burst: None,
            burst_budgets: HashMap::new(),
            burst_hits: 0,
            ns_per_tsc,
            early_nm: None,
            stop: None,
            stopped: false,
            placement: None,
            cpuid_faults: None,
            lockstep: None,
            compared_at: 0,
        })
    }

    /// Makes the calling thread the EMT: binds it to the CPU of the worlds, and makes it like them in what the host would
    /// otherwise change at each hand-over.
    pub fn settle(&mut self, placement: Placement) -> std::io::Result<()> {
        placement.bind()?;
        self.placement = Some(placement);
        // A guest in a virtual machine of this thread's would get the fault, too (SDM vol. 3C, "Relative Priority of Faults and VM Exits").
        let raw_alone = |kind| matches!(kind, EngineKind::Raw | EngineKind::Interp);
        if self.engines.raw().is_some() && self.engines.kinds().all(raw_alone) {
            self.cpuid_faults = CpuidFaults::begin()?;
        }
        Ok(())
    }

    /// Number of exits from worlds so far.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.exits
    }

    /// Where the guest's IDT sends page faults: with a symbol table it tells how far KASLR moved the kernel.
    pub fn page_fault_handler(&mut self) -> Option<u32> {
        let at = GuestLin(self.cpu.idtr.base.wrapping_add(14 * 8));
        let mut gate = [0u8; 8];
        let cpu = self.cpu.clone();
        self.m.read(&cpu, at, &mut gate, Privilege::Supervisor).ok()?;
        let present = cpu.protected() && cpu.idtr.limit >= 14 * 8 + 7 && gate[5] & 0x80 != 0;
        present.then(|| u32::from_le_bytes([gate[0], gate[1], gate[6], gate[7]]))
    }

    /// The last exits, oldest first.
    #[must_use]
    pub fn last_exits(&self) -> Vec<(ExitRecord, u64)> {
        let mut ring = self.ring.clone();
        ring.sort_by_key(|(_, n)| *n);
        ring
    }

    /// Runs the guest until something ends the run.
    pub fn run(&mut self) -> Stop {
        loop {
            if let Some(stop) = self.stop.take() {
                self.close_record(host_tsc());
                return self.compare_at_end(stop);
            }
            if self.attention.wanted() {
                self.serve_requests();
                self.m.devices_touched = true;
                continue;
            }
            if self.m.devices_touched || self.m.guard().is_some_and(|guard| guard.at <= host_tsc()) {
                self.serve_devices();
                if self.stop.is_some() {
                    continue;
                }
            }
            if self.stopped {
                self.attention.wait(None);
                continue;
            }
            let interrupt = self.cpu.interruptible() && self.m.devices.interrupt_pending();
            // Lockstep has to see it.
            let left = self.burst.is_none() && self.lockstep.is_none();
            let injected = interrupt && left && self.engines.injects(&self.cpu);
            if interrupt && !injected {
                let vector = self.m.devices.acknowledge();
                self.m.devices_touched = true;
                let event = Event::External { vector };
                self.compare(0, Some(event));
                self.deliver(event);
                continue;
            }
            if self.cpu.halted && !injected {
                self.sleep();
                continue;
            }
            self.execute();
        }
    }

    fn serve_requests(&mut self) {
        for request in self.attention.take() {
            match request {
                Request::Quit => self.stop = Some(Stop::Quit),
                Request::Interrupted => self.stop = Some(Stop::Interrupted),
                Request::Break(port) => self.m.devices.serial_break(port),
                Request::Console(line) => {
                    let text = console::execute(&line, self);
                    self.attention.answer(&text);
                }
            }
        }
    }

    /// Gives the UARTs as much of the waiting input as they have room for.
    fn feed_serial(&mut self) {
        if !self.attention.input_waits() {
            return;
        }
        for port in 0..4 {
            let room = self.m.devices.serial_room(port);
            if room != 0 {
                let bytes = self.attention.take_input(port, room);
                if !bytes.is_empty() {
                    self.m.devices.serial_input(port, &bytes);
                }
            }
        }
    }

    fn serve_devices(&mut self) {
        self.m.devices_touched = false;
        self.feed_serial();
        let now = self.m.clock.now();
        self.deadline = self.m.devices.next_deadline(now);
        if self.deadline.is_some_and(|d| d <= now) {
            self.m.devices.run_timers(now);
            self.ticker.spent();
            self.deadline = self.m.devices.next_deadline(now);
        }
        if self.engines.next_shuffle().is_some_and(|at| at <= now) {
            self.engines.shuffle(now);
            self.ticker.spent();
        }
        self.m.look = None;
        if !self.cpu.halted {
            let tick = self.m.devices.pit.rhythm().filter(|tick| *tick > now + LOOK_WORTH);
            self.m.look = tick.and_then(|tick| self.look_at(tick, now));
            // A world with a guard looks by itself.
            let looks = self.m.look.is_some_and(|look| look.guard.is_none());
            let look = tick.filter(|_| looks).map(|tick| tick + LOOK_AFTER_TICK);
            let lockstep = self.lockstep.as_ref().map(|_| now + LOCKSTEP_INTERVAL);
            let wanted = [self.deadline, self.engines.next_shuffle(), look, lockstep];
            self.ticker.arm(wanted.into_iter().flatten().min(), now);
        }
        if let Some(cause) = self.m.devices.take_reset_request() {
            self.stop = Some(match cause {
                ResetCause::I8042 => Stop::Restart("keyboard controller"),
                ResetCause::Cf9 => Stop::Restart("port CF9h"),
                ResetCause::Port92 => Stop::Restart("port 92h"),
                // The exit status is QEMU's, (value << 1) | 1; the guest wrote the value.
                ResetCause::DebugExit(status) => Stop::DebugExit(status >> 1),
            });
        }
    }

    /// The look that comes with the tick expected at `tick`, guest time in ns as `now` is.
    fn look_at(&self, tick: u64, now: u64) -> Option<Look> {
        let second = self.m.clock.counts_of_ns(1_000_000_000);
        let counts_per_clk = u32::try_from(second / CLK_HZ).ok().filter(|counts| *counts != 0)?;
        let counts = |ns: u64| (u128::from(second) * u128::from(ns) / 1_000_000_000) as u64;
        let tsc = host_tsc();
        let guarded = self.dozes && self.lockstep.is_none() && self.engines.can_guard();
        let guard = guarded.then(|| Guard {
            at: tsc.saturating_add(counts(tick - now + LOOK_AFTER_TICK)),
            period: counts(self.m.devices.pit.period()),
            before: counts(TICK_DELAY),
            after: counts(LOOK_AFTER_TICK),
            scale: self.m.clock.ns_of_counts(1 << 24) as u32,
            ..Guard::default()
        });
        Some(Look { tsc: tsc.saturating_add(counts(tick - TICK_DELAY - now)), counts_per_clk, guard })
    }

    fn sleep(&mut self) {
        if self.cpu.eflags & eflags::IF == 0 {
            self.stop = Some(Stop::Halted);
            return;
        }
        self.close_record(host_tsc());
        self.dozes = true;
        let now = self.m.clock.now();
        // This sleep has its own limit; the timer's thread would only be a second one to be woken.
        self.ticker.arm(None, now);
        match self.deadline {
            Some(d) if d <= now => {}
            Some(d) => self.attention.wait(Some(Duration::from_nanos(d - now))),
            None => self.attention.wait(None),
        }
        self.m.devices_touched = true;
    }

    /// Delivers an event through the guest's IDT.
    fn deliver(&mut self, event: Event) {
        if let Err(e) = self.engines.settle(&mut self.cpu, &mut self.m) {
            return self.fail(e);
        }
        self.note_delivery(event);
        if let Err(triple) = trpm::deliver(&mut self.cpu, &mut self.m, event) {
            self.triple_fault(&|| {
                format!("triple fault: {:?} could not be delivered (last {:?})", triple.first, triple.last)
            });
        }
    }

    /// The CPU shut down: a kernel that has taken its IDT away wants a restart.
    fn triple_fault(&mut self, what: &dyn Fn() -> String) {
        let deliberate = self.cpu.idtr.limit < 8;
        self.stop = Some(if deliberate { Stop::Restart("triple fault") } else { Stop::Fatal(what()) });
    }

    /// Delivers what the instruction at `start` raised.
    fn raise(&mut self, event: Event, start: u32) {
        if matches!(event, Event::Software { .. }) {
            // A fault on the way into the gate is a fault of the `int` itself.
            if let Err(trap) = trpm::try_deliver(&mut self.cpu, &mut self.m, event) {
                self.cpu.eip = start;
                self.deliver(Event::Exception(trap));
            } else {
                self.note_delivery(event);
            }
        } else {
            self.deliver(event);
        }
    }

    /// Accounts for a delivery and traces it.
    fn note_delivery(&mut self, event: Event) {
        let vector = match event {
            Event::Exception(trap) => trap.vector,
            Event::Software { vector, .. } | Event::External { vector } => vector,
            Event::Nmi => 2,
        };
        if self.trace.contains(Trace::INT) {
            eprintln!(
                "int   {event:?} at {:04x}:{:08x} cpl {}",
                self.cpu.seg[seg::CS].selector,
                self.cpu.eip,
                self.cpu.cpl
            );
        }
        self.account.record_injected(vector);
    }

    fn execute(&mut self) {
        match self.engines.choose(&self.cpu) {
            Next::Interp(Some(RawRefusal::FpuTrap))
                if self.cpu.cr0 & cr0::EM == 0 && self.early_nm != Some((self.cpu.cr3, self.cpu.eip)) =>
            {
                // The hardware's CR0.TS is not ours to set: raise the #NM a lazy-FPU kernel waits for right away.
                self.early_nm = Some((self.cpu.cr3, self.cpu.eip));
                self.compare(0, Some(Event::Exception(Trap::NM)));
                self.deliver(Event::Exception(Trap::NM));
            }
            Next::Interp(reason) => {
                if reason.is_none() {
                    self.burst = None;
                }
                self.interpret_slice(reason);
            }
            Next::Native(_) | Next::Instead(..) if self.burst.is_some() => self.interpret_burst(),
            next @ (Next::Native(number) | Next::Instead(number, _)) => {
                if self.cpu.cpl == 3 {
                    self.early_nm = None;
                }
                if let Some(target) = self.engines.kick_target_of_new(number) {
                    self.attention.set_kick(target);
                    if self.attention.wanted() {
                        // The kick went to the other one.
                        return;
                    }
                }
                if self.m.guard().is_some() && !self.engines.guards(number, &self.cpu) {
                    self.dozes = false;
                    self.m.devices_touched = true;
                    return;
                }
                if let Next::Instead(_, reason) = next {
                    let kind = self.engines.kind(number);
                    *self.refusals.entry((kind, reason.name())).or_default() += 1;
                }
                self.run_native(number);
            }
        }
    }

    /// Goes on interpreting: loops over ports, page flushes and code writes leave the world once, not at every turn.
    fn interpret_burst(&mut self) {
        let Some(mut burst) = self.burst.take() else { return };
        if self.cpu.cpl != 0 {
            burst.left = 0;
        }
        while burst.left > 0 {
            burst.left -= 1;
            burst.used += 1;
            self.interpreted += 1;
            let start = self.cpu.eip;
            let cpl = self.cpu.cpl;
            let (flushes, writes) = (self.m.paging_changes.len(), self.m.code_writes.len());
            let instruction = match interp::fetch_decode(&self.cpu, &mut self.m) {
                Ok(instruction) => instruction,
                Err(trap) => {
                    self.deliver(Event::Exception(trap));
                    burst.left = 0;
                    break;
                }
            };
            match interp::execute(&mut self.cpu, &mut self.m, &instruction) {
                Step::Done => {}
                Step::Halted => {
                    burst.left = 0;
                    break;
                }
                Step::Raise(event) => {
                    self.raise(event, start);
                    burst.left = 0;
                    break;
                }
            }
            if self.m.devices_touched
                || self.m.paging_changes.len() != flushes
                || self.m.code_writes.len() != writes
            {
                self.burst_hits += 1;
                let budget = self.budget(burst.site);
                let next = if burst.used <= BURST_WORTH {
                    (2 * burst.used).max(budget).clamp(BURST_PAID, BURST)
                } else {
                    // It was met, but an exit would have cost less.
                    budget - budget / 4
                };
                self.set_budget(burst.site, next);
                let left = self.budget(start);
                burst = Burst { site: start, used: 0, left };
                let cause = if self.m.code_writes.len() != writes {
                    Cause::CodeWrite
                } else {
                    finer_cause(&instruction)
                };
                let kind = Kind::from(instruction.mnemonic());
                self.account.record(cause, Route::Interpreter, kind, start, cpl, 0);
                if self.m.notes() > MAX_NOTES {
                    // The engine has to follow before the lists grow without bound.
                    burst.left = 0;
                }
                if burst.left == 0 {
                    return;
                }
                break;
            }
            if self.cpu.shadow != Shadow::None
                || self.cpu.eflags & eflags::IF != 0 && self.m.devices.interrupt_pending()
                || self.attention.wanted()
            {
                break;
            }
        }
        if burst.left > 0 {
            self.burst = Some(burst);
            return;
        }
        let spent = self.budget(burst.site);
        self.set_budget(burst.site, spent - spent / 4);
    }

    /// How many instructions to interpret on from a site; 0 where that never paid.
    fn budget(&self, site: u32) -> u32 {
        let budget = self.burst_budgets.get(&site).copied().unwrap_or(BURST);
        if budget < BURST_LEAST { 0 } else { budget }
    }

    fn set_budget(&mut self, site: u32, budget: u32) {
        if self.burst_budgets.len() >= MAX_BURST_SITES {
            self.burst_budgets.clear();
        }
        self.burst_budgets.insert(site, budget);
    }

    /// Interprets until raw mode is possible again, or for a while.
    fn interpret_slice(&mut self, reason: Option<RawRefusal>) {
        let settled = self.engines.settle(&mut self.cpu, &mut self.m);
        self.engines.fetch_fpu(&mut self.cpu);
        if let Err(e) = settled.and_then(|()| self.engines.follow(&self.cpu, &mut self.m)) {
            self.fail(e);
            return;
        }
        let mut n = 0;
        while n < INTERPRETER_SLICE {
            n += 1;
            let start = self.cpu.eip;
            match interp::step(&mut self.cpu, &mut self.m) {
                Step::Done => {}
                Step::Halted => break,
                Step::Raise(event) => {
                    self.raise(event, start);
                    break;
                }
            }
            if self.m.devices_touched
                || self.cpu.eflags & eflags::IF != 0 && self.m.devices.interrupt_pending()
                || self.attention.wanted()
            {
                break;
            }
            if reason.is_some() && self.engines.choose(&self.cpu) != Next::Interp(reason) {
                break;
            }
        }
        self.interpreted += u64::from(n);
        if let Some(reason) = reason {
            *self.refusals.entry((EngineKind::Interp, reason.name())).or_default() += u64::from(n);
            self.engines.has_waited(reason, n.into());
        }
    }

    /// Lockstep: the follower comes to where the CPU is. It gets the event that the CPU is about to get.
    fn compare(&mut self, counts: u64, event: Option<Event>) {
        let Some(lockstep) = &mut self.lockstep else { return };
        let interpreted = self.interpreted - self.compared_at;
        self.compared_at = self.interpreted;
        let all = lockstep.all_is_due();
        if all {
            self.engines.fetch_fpu(&mut self.cpu);
        }
        let result = lockstep.compare(&self.cpu, &mut self.m, counts, interpreted, all, event);
        match result {
            Err(difference) => self.stop = Some(Stop::Differs(difference)),
            Ok(()) if all && lockstep.done() => self.stop = Some(Stop::Compared),
            Ok(()) => {}
        }
        // The timer's thread went on counting.
        self.ticker.spent();
        self.m.devices_touched = true;
    }

    /// Lockstep: the last comparison, where the guest ended.
    fn compare_at_end(&mut self, stop: Stop) -> Stop {
        if matches!(stop, Stop::Compared | Stop::Differs(_) | Stop::Fatal(_) | Stop::Host(_)) {
            return stop;
        }
        let Some(lockstep) = &mut self.lockstep else { return stop };
        self.engines.fetch_fpu(&mut self.cpu);
        let interpreted = self.interpreted - self.compared_at;
        match lockstep.compare(&self.cpu, &mut self.m, 0, interpreted, true, None) {
            Ok(()) => stop,
            Err(difference) => Stop::Differs(difference),
        }
    }

    /// An engine cannot go on.
    fn fail(&mut self, e: EngineError) {
        self.stop = Some(match e {
            EngineError::Guest(why) => Stop::Fatal(why),
            EngineError::Host(why) => Stop::Host(why),
        });
    }

    fn run_native(&mut self, number: usize) {
        let waits = self.cpu.eflags & eflags::IF == 0 && self.m.devices.interrupt_pending();
        let ran = self.engines.enter(number, &mut self.cpu, &mut self.m).and_then(|engine| {
            let after = engine.run(&mut self.cpu, &mut self.m, waits)?;
            Ok((after, engine.last_run(), engine.last_exit(), engine.take_injected()))
        });
        let (after, (entered, left), record, injected) = match ran {
            Ok(ran) => ran,
            Err(e) => return self.fail(e),
        };
        if let Some(vector) = injected {
            self.note_delivery(Event::External { vector });
        }
        let ticks = std::mem::take(&mut self.m.ticks);
        if ticks.is_empty() && self.m.guard().is_some_and(|guard| guard.at <= left) {
            // The world could not.
            self.dozes = false;
        }
        for vector in ticks {
            self.note_delivery(Event::External { vector });
        }
        self.close_record(entered);
        if self.lockstep.is_some()
            && let Err(e) = self.engines.settle(&mut self.cpu, &mut self.m)
        {
            return self.fail(e);
        }
        self.compare(left.wrapping_sub(entered), None);
        self.exits += 1;
        if self.ring.len() < RING {
            self.ring.push((record, self.exits));
        } else {
            self.ring[(self.exits % RING as u64) as usize] = (record, self.exits);
        }
        if self.trace.contains(Trace::EXITS) {
            let r = &record;
            eprintln!(
                "exit  {} by {} eip {:08x} cpl {} {:?}",
                r.cause.name(),
                r.route.name(),
                r.eip,
                r.cpl,
                r.raw
            );
        }
        let mut kind = Kind::NONE;
        let mut cause = record.cause;
        match after {
            After::Continue => {}
            After::Kicked => {
                self.m.devices_touched = true;
                // Ring 3 computes: the next ticks may find it there.
                self.dozes |= self.cpu.cpl == 3;
            }
            After::Deliver(event) => self.deliver(event),
            After::TripleFault { state_lost: true } => self.stop = Some(Stop::Restart("triple fault")),
            After::TripleFault { state_lost: false } => self.triple_fault(&|| "triple fault".into()),
            After::Interpret => {
                let instruction = self.decode();
                if self.trace.contains(Trace::EXITS) {
                    eprintln!("      interpret {instruction}");
                }
                kind = Kind::from(instruction.mnemonic());
                if cause == Cause::Sensitive {
                    cause = finer_cause(&instruction);
                }
                let site = self.cpu.eip;
                if let Some(engine) = self.engines.last() {
                    engine.will_interpret(&self.cpu, &self.m, &instruction);
                }
                self.interpret_one(&instruction);
                let left = self.budget(site);
                if self.cpu.cpl == 0 && left > 0 {
                    self.burst = Some(Burst { site, used: 0, left });
                }
            }
        }
        self.open = Some((ExitRecord { cause, ..record }, kind, left));
    }

    /// Decodes the instruction at EIP; an invalid one if that is not possible.
    fn decode(&mut self) -> Instruction {
        interp::fetch_decode(&self.cpu, &mut self.m).unwrap_or_default()
    }

    fn interpret_one(&mut self, instruction: &Instruction) {
        self.interpreted += 1;
        self.engines.fetch_fpu(&mut self.cpu);
        let ring0 = self.cpu.cpl == 0;
        let start = self.cpu.eip;
        let step = if instruction.is_invalid() {
            interp::step(&mut self.cpu, &mut self.m)
        } else {
            interp::execute(&mut self.cpu, &mut self.m, instruction)
        };
        match step {
            Step::Done => {
                if ring0 && let Some(engine) = self.engines.last() {
                    engine.has_interpreted(&self.cpu, &mut self.m, instruction);
                }
            }
            Step::Halted => {}
            Step::Raise(event) => self.raise(event, start),
        }
    }

    /// Enters the last exit into the account: it took until `entered` (TSC).
    fn close_record(&mut self, entered: u64) {
        if let Some((record, kind, left)) = self.open.take() {
            let ns = (entered.wrapping_sub(left) as f64 * self.ns_per_tsc) as u64;
            self.account.record(record.cause, record.route, kind, record.eip, record.cpl, ns);
        }
    }

    /// Enters what is only known at the end (in-line counters, patches, sizes) into the account.
    pub fn finish_account(&mut self) {
        self.close_record(host_tsc());
        self.account.set_gauge("exits", self.exits);
        self.account.set_gauge("exits_saved_by_interpreting_on", self.burst_hits);
        self.account.set_gauge("interpreted_instructions", self.interpreted);
        for (name, n) in self.engines.gauges() {
            self.account.set_gauge(name, n);
        }
        for ((kind, reason), n) in &self.refusals {
            let who = match kind {
                EngineKind::Interp => "interpreted".into(),
                kind => format!("{}_ran", kind.name()),
            };
            self.account.set_gauge(format!("{who}_{reason}"), *n);
        }
        self.account.set_gauge("handovers_between_engines", self.engines.handovers);
        self.account.set_gauge("engine_shuffles", self.engines.shuffles);
        if let Some(raw) = self.engines.raw() {
            let (worlds, data, code) = raw.sizes();
            self.account.set_gauge("worlds", worlds as u64);
            self.account.set_gauge("data_pages_mapped", data as u64);
            self.account.set_gauge("code_pages_mapped", code as u64);
            self.account.set_gauge("reservations_moved", raw.moves);
            self.account.set_gauge("ring_3_worlds_broken", raw.broken_worlds);
            self.account.set_gauge("worlds_replaced", raw.replaced_worlds);
            let c = raw.kernel_code.counts;
            let (pages, instructions) = raw.kernel_code.sizes();
            self.account.set_gauge("code_pages_copied", pages as u64);
            self.account.set_gauge("instructions_known", instructions as u64);
            self.account.set_gauge("scans", c.scans);
            self.account.set_gauge("exits_in_the_middle_of_an_instruction", c.mid_instruction);
            self.account.set_gauge("sites_overlapping_other_code", c.conflicts);
            self.account.set_gauge("sites_refused", c.refused);
            self.account.set_gauge("code_writes", c.code_writes);
            self.account.set_gauge("spans_rescanned", c.rescans);
            self.account.set_gauge("patches_undone", c.undone);
            self.account.set_gauge("patches_improved", c.improved);
            self.account.set_gauge("copies_hastened", c.hastened);
            let (own, joint) = (&raw.user_code, &raw.joint_code);
            self.account.set_gauge("user_pages_examined", own.looked_at + joint.looked_at);
            self.account.set_gauge("user_pages_copied", own.copied + joint.copied);
            self.account.set_gauge("user_system_calls_patched", (own.patches() + joint.patches()) as u64);
            let stats = raw.kernel_code.patm.stats();
            for (tactic, n) in &stats.tactics {
                self.account.set_patches(tactic.name(), *n);
            }
            for kind in csam::SensitiveKind::ALL {
                let counter = patm::counter(*kind);
                if counter != vp::COUNTERS_LEN - 1 {
                    let n = raw.inline_counter(counter);
                    if n != 0 {
                        self.account.set_inline(kind.name(), n);
                    }
                }
            }
            self.account.set_inline("shadow fill, in the world", raw.filled_in_worlds());
            self.account.set_inline("page fault to the guest, in the world", raw.delivered_in_worlds());
            self.account
                .set_inline("int and exceptions to the guest, in the world", raw.reflected_in_worlds());
            self.account.set_inline("invlpg, in the world", raw.flushed_in_worlds());
            self.account
                .set_inline("access to a page mapped for a moment, in the world", raw.accessed_in_worlds());
            self.account.set_inline("in and out, in the world", raw.ports_in_worlds());
            self.account.set_inline("CR3 load, from world to world", raw.handed_over());
            self.account.set_inline("timer tick, in the world", raw.ticks_in_worlds());
            for patch in raw.kernel_code.patm.patches() {
                let (Some(why), Some(site)) = (patch.why, patch.sites.first()) else { continue };
                let i = Decoder::new(32, &patch.original, DecoderOptions::NONE).decode();
                self.account.add_trap_site(site.at.0, Kind::from(i.mnemonic()), why.name());
            }
        }
    }
}

/// What kind of sensitive instruction it was, for the accounting.
fn finer_cause(i: &Instruction) -> Cause {
    match i.mnemonic() {
        Mnemonic::In
        | Mnemonic::Out
        | Mnemonic::Insb
        | Mnemonic::Insw
        | Mnemonic::Insd
        | Mnemonic::Outsb
        | Mnemonic::Outsw
        | Mnemonic::Outsd => Cause::PortIo,
        Mnemonic::Hlt => Cause::Halt,
        Mnemonic::Cpuid => Cause::Cpuid,
        Mnemonic::Int => Cause::Syscall,
        Mnemonic::Rdmsr | Mnemonic::Wrmsr | Mnemonic::Clts | Mnemonic::Lmsw => Cause::ControlRegister,
        Mnemonic::Invlpg => Cause::AddressSpace,
        Mnemonic::Mov if i.op0_register() == Register::CR3 => Cause::AddressSpace,
        Mnemonic::Mov if i.op0_register().is_cr() || i.op0_register().is_dr() => Cause::ControlRegister,
        _ if loaded_segment(i).is_some() => Cause::Segment,
        _ => Cause::Sensitive,
    }
}

/// The data segment register an instruction loads, if it does.
pub(crate) fn loaded_segment(i: &Instruction) -> Option<usize> {
    let of = |r: Register| match r {
        Register::ES => Some(seg::ES),
        Register::SS => Some(seg::SS),
        Register::DS => Some(seg::DS),
        Register::FS => Some(seg::FS),
        Register::GS => Some(seg::GS),
        _ => None,
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

impl ConsoleTarget for Em {
    fn info(&mut self, what: Info) -> String {
        match what {
            Info::Registers => dump::registers(&self.cpu),
            Info::Pic => self.m.devices.describe_pic(self.m.clock.now()),
            Info::Patches => match self.engines.raw() {
                Some(raw) => {
                    let mut text = String::new();
                    for (tactic, n) in raw.kernel_code.patm.stats().tactics {
                        text += &format!("{:<12} {n}\n", tactic.name());
                    }
                    text + &format!("refused      {}\n", raw.kernel_code.counts.refused)
                }
                None => "no patches: everything is interpreted\n".into(),
            },
            Info::Csam => match self.engines.raw() {
                Some(raw) => {
                    let (pages, instructions) = raw.kernel_code.sizes();
                    let c = raw.kernel_code.counts;
                    format!(
                        "{pages} code pages copied, {instructions} instructions known, {} scans, {} code writes, {} spans rescanned\n",
                        c.scans, c.code_writes, c.rescans
                    )
                }
                None => "no scans: everything is interpreted\n".into(),
            },
            Info::Faults => {
                self.close_record(host_tsc());
                let stats = self.account.stats(self.engines.name(), self.m.clock.now());
                crate::account::report::render(&stats, None, crate::paint::Paint::PLAIN)
            }
            Info::Worlds => match self.engines.raw() {
                Some(raw) => raw.describe_worlds(),
                None => "no worlds: everything is interpreted\n".into(),
            },
            Info::Memory => {
                let (_, data, code) = self.engines.raw().map_or((0, 0, 0), raw::RawEngine::sizes);
                format!(
                    "{} MiB of guest RAM, {data} data pages and {code} code pages mapped in worlds\n",
                    self.m.ram.size() >> 20
                )
            }
            Info::Vga => dump::vga(&self.m),
        }
    }
    fn quit(&mut self) {
        self.stop = Some(Stop::Quit);
    }
    fn cont(&mut self) {
        self.stopped = false;
    }
    fn stop(&mut self) {
        self.stopped = true;
    }
    fn reset(&mut self) {
        self.stop = Some(Stop::Reset);
    }
    fn nmi(&mut self) {
        self.compare(0, Some(Event::Nmi));
        self.deliver(Event::Nmi);
    }
}
