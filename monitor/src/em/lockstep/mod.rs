//! Lockstep: the interpreter does behind another engine what that has just done, on a machine of its own.
//!
//! 1. The *leader* is the guest that is run. Whatever comes into its machine from outside is recorded
//!    ([`crate::tape`]); `rdtsc` traps in worlds, so that it is, too.
//! 2. At each exit, and before each interrupt, EM calls [`Lockstep::compare`]: the *follower* plays the tape and
//!    interprets until it is where the leader is. There is no count of native instructions, so the place is known by
//!    the state alone: all inputs used up, the same registers, flags, segments and tables, and the same content of every
//!    page the follower has written to. (Registers alone do not do: a decompressor's loop comes by with the same ones
//!    again.) If it does not come there in as many instructions as the leader can have executed, or wants an input that
//!    is not next on the tape, the two differ. An interrupt is then delivered to both.
//! 3. Every so many instructions, and at the end, all of RAM and the FPU must agree as well (`state.rs`).
//! 4. Time stands still for the leader while the follower works.
//!
//! What need not agree is named in `state.rs`.

mod state;

use super::dump;
use super::engine::MAX_NOTES;
use crate::cpum::{CpuState, eflags};
use crate::interp::{self, Step};
use crate::machine::Machine;
use crate::tape::{Play, Tape};
use crate::tm::HeldTime;
use crate::trap::Event;
use crate::trpm;
use host_driver_shim::ram::GuestRam;
use iced_x86::{Formatter, Instruction, NasmFormatter};
use state::Early;
use std::collections::VecDeque;
use std::fmt::Write;

/// Instructions shown with a difference.
const SHOWN: usize = 40;
/// Instructions between two comparisons of RAM.
const RAM_INTERVAL: u64 = 1_000_000;
/// Instructions the follower may take for a piece in which the leader did nothing that can be counted.
const LEAST: u64 = 200_000;
/// No CPU completes more in one count of its time-stamp counter.
const MOST_PER_COUNT: u64 = 8;

/// How two engines came to differ, for people, several lines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference(pub String);

/// The follower and what is known of the leader.
pub struct Lockstep {
    cpu: CpuState,
    m: Machine,
    time: HeldTime,
    /// The last instructions, oldest first.
    trail: VecDeque<(u32, Instruction)>,
    /// Instructions the follower has executed.
    pub instructions: u64,
    /// Stop after so many.
    limit: u64,
    ram_compared_at: u64,
    /// Comparisons of registers, and of RAM.
    pub compared: (u64, u64),
    /// Page-table entries whose A or D bit the leader had set early.
    pub early_bits: u64,
}

impl Lockstep {
    /// A follower for a leader that has not yet started, whose CPU answers nothing at random. `m` has RAM of the same size and no devices that matter. `time`
    /// is the leader's.
    #[must_use]
    pub fn new(cpu: CpuState, leader: &mut Machine, mut m: Machine, time: HeldTime, limit: u64) -> Lockstep {
        copy_ram(&leader.ram, &m.ram);
        leader.tape = Tape::Record(VecDeque::new());
        m.policy = leader.policy.clone();
        m.tape = Tape::Play(Play::default());
        Lockstep {
            cpu,
            m,
            time,
            trail: VecDeque::with_capacity(SHOWN),
            instructions: 0,
            limit,
            ram_compared_at: 0,
            compared: (0, 0),
            early_bits: 0,
        }
    }

    /// All instructions that were to be compared have been.
    #[must_use]
    pub fn done(&self) -> bool {
        self.instructions >= self.limit
    }

    /// All of RAM and the FPU are to be compared the next time: the leader's FPU state must be in CPUM then.
    #[must_use]
    pub fn all_is_due(&self) -> bool {
        self.done() || self.instructions - self.ram_compared_at >= RAM_INTERVAL
    }

    /// One line for the end of a run without a difference.
    #[must_use]
    pub fn summary(&self) -> String {
        format!(
            "lockstep: no difference in {} instructions; registers compared {} times, memory {} times; {} table entries' bits set early",
            self.instructions, self.compared.0, self.compared.1, self.early_bits
        )
    }

    /// Brings the follower to where the leader is and compares. `counts`: time-stamp counts the leader has run natively
    /// since the last time, `interpreted`: instructions it has interpreted. `all`: compare all of RAM and the FPU.
    /// `event` is about to be delivered to the leader; the follower gets it here.
    pub fn compare(
        &mut self,
        leader: &CpuState,
        m: &mut Machine,
        counts: u64,
        interpreted: u64,
        all: bool,
        event: Option<Event>,
    ) -> Result<(), Difference> {
        self.time.hold();
        let most = LEAST + interpreted + counts.saturating_mul(MOST_PER_COUNT);
        let result = self.compare_held(leader, m, most, all, event);
        self.time.release();
        result
    }

    fn compare_held(
        &mut self,
        leader: &CpuState,
        m: &mut Machine,
        most: u64,
        all: bool,
        event: Option<Event>,
    ) -> Result<(), Difference> {
        if let (Tape::Record(recorded), Tape::Play(play)) = (&mut m.tape, &mut self.m.tape) {
            play.inputs.append(recorded);
        }
        self.advance(leader, m, most, all)?;
        self.compared.0 += 1;
        if let Some(event) = event {
            self.deliver(event);
        }
        Ok(())
    }

    /// Interprets until the follower is where the leader is.
    fn advance(&mut self, leader: &CpuState, m: &Machine, most: u64, all: bool) -> Result<(), Difference> {
        let mut left = most;
        // What differed at the first place with the leader's general registers.
        let mut near: Option<String> = None;
        loop {
            let mismatch = self.mismatch().map(|what| format!("the interpreter has {what}"));
            if mismatch.is_none()
                && self.cpu.eip == leader.eip
                && self.cpu.gpr == leader.gpr
                && self.inputs_are_used_up()
            {
                let differs = self.compare_here(leader, m, all);
                if differs.is_empty() {
                    return Ok(());
                }
                near.get_or_insert(differs);
            }
            let why = if mismatch.is_some() {
                mismatch
            } else if left == 0 {
                Some("the interpreter does not come where the leader is".into())
            } else if self.cpu.halted {
                Some("the interpreter halts where the leader goes on".into())
            } else {
                None
            };
            if let Some(mut why) = why {
                if let Some(near) = near {
                    why += ". Before that, where it first had the leader's general registers, these differed (leader / ";
                    why += "interpreter):\n";
                    why += &near;
                }
                return Err(self.differ(leader, &why));
            }
            // The leader may have been interrupted between two iterations.
            self.m.one_iteration = self.cpu.eip == leader.eip;
            if self.step() {
                left -= 1;
            }
        }
    }

    fn mismatch(&self) -> Option<&String> {
        if let Tape::Play(play) = &self.m.tape { play.mismatch.as_ref() } else { None }
    }

    fn inputs_are_used_up(&self) -> bool {
        if let Tape::Play(play) = &self.m.tape { play.inputs.is_empty() } else { true }
    }

    /// Interprets one instruction; false if it was one of several iterations.
    fn step(&mut self) -> bool {
        let start = self.cpu.eip;
        let step = match interp::fetch_decode(&self.cpu, &mut self.m) {
            Ok(instruction) => {
                if self.trail.len() >= SHOWN {
                    self.trail.pop_front();
                }
                self.trail.push_back((self.cpu.linear_eip(), instruction));
                interp::execute(&mut self.cpu, &mut self.m, &instruction)
            }
            Err(trap) => {
                self.cpu.shadow = crate::cpum::Shadow::None;
                Step::Raise(Event::Exception(trap))
            }
        };
        if self.m.notes() > MAX_NOTES {
            // No engine follows the follower.
            self.m.forget_notes();
        }
        if let Step::Raise(event) = step {
            if matches!(event, Event::Software { .. }) {
                if let Err(trap) = trpm::try_deliver(&mut self.cpu, &mut self.m, event) {
                    self.cpu.eip = start;
                    self.deliver(Event::Exception(trap));
                }
            } else {
                self.deliver(event);
            }
        }
        let again = step == Step::Done && self.cpu.eip == start && self.m.one_iteration;
        self.instructions += u64::from(!again);
        !again
    }

    fn deliver(&mut self, event: Event) {
        if trpm::deliver(&mut self.cpu, &mut self.m, event).is_err() {
            // The leader ends with it; if it does not, the registers differ from here on.
            self.cpu.halted = true;
        }
    }

    /// What differs if this is the place.
    fn compare_here(&mut self, leader: &CpuState, m: &Machine, all: bool) -> String {
        let fields = state::registers(leader, &self.cpu);
        if !fields.is_empty() {
            return fields;
        }
        let Tape::Play(play) = &self.m.tape else { return String::new() };
        let (tables, written) = (play.tables.borrow().clone(), play.written.borrow().clone());
        let forgiven = Early { tables: &tables, dirty: state::about_to_write(&self.cpu, &mut self.m) };
        let mut early = match state::frames(m, &mut self.m, &forgiven, written.into_iter()) {
            Ok(early) => early,
            Err(pages) => return pages,
        };
        if all {
            match state::ram(m, &mut self.m, &forgiven) {
                Ok(n) => early += n,
                Err(pages) => {
                    let since = self.instructions - self.ram_compared_at;
                    return format!("{pages}  (or one of them within the last {since} instructions)\n");
                }
            }
            let fpu = state::fpu(&leader.fpu, &self.cpu.fpu);
            if !fpu.is_empty() {
                return fpu;
            }
            if let Tape::Play(play) = &mut self.m.tape {
                play.forget_written();
            }
            self.ram_compared_at = self.instructions;
            self.compared.1 += 1;
        }
        self.early_bits += early;
        String::new()
    }

    fn differ(&mut self, leader: &CpuState, why: &str) -> Difference {
        let mut text = format!(
            "after {} instructions the leader and the interpreter differ: {why}\n\nthe leader\n{}\nthe interpreter\n{}",
            self.instructions,
            dump::registers(leader),
            dump::registers(&self.cpu),
        );
        let fields = state::registers(leader, &self.cpu);
        if !fields.is_empty() {
            let _ = write!(text, "\nleader / interpreter\n{fields}");
        }
        let _ = writeln!(text, "\nthe interpreter's last instructions");
        let mut formatter = NasmFormatter::new();
        for (at, instruction) in &self.trail {
            let mut line = String::new();
            formatter.format(instruction, &mut line);
            let _ = writeln!(text, "  {at:08x}  {line}");
        }
        Difference(text)
    }
}

/// Copies what is not zero.
fn copy_ram(from: &GuestRam, to: &GuestRam) {
    let mut page = [0u8; 4096];
    for at in (0..from.size()).step_by(4096) {
        if from.read(at, &mut page).is_some() && page != [0; 4096] {
            let _ = to.write(at, &page);
        }
    }
}

/// EFLAGS bits that are compared: RF lives for one instruction and is no engine's business between two.
const COMPARED_FLAGS: u32 = !eflags::RF;

#[cfg(test)]
mod tests;
