//! The interpreter: one instruction at a time on engine-neutral state.
//!
//! 1. `step` here: fetch, decode, commit or roll back, traps after the instruction.
//! 2. `dispatch`: which handler an instruction has.
//! 3. `operand`: effective addresses, segment checks, reads and writes.
//! 4. `alu`, `shift`, `muldiv`, `bits`, `data`, `stack`, `flow`, `string`: user-mode integer instructions.
//! 5. `system`, `control`: privileged and sensitive instructions; control and debug registers.
//! 6. `fpu`, `fpu_env`: x87, MMX and SSE, run natively on a bounce buffer.
//!
//! Handlers work directly on `CpuState`; when one fails, `step` puts back the general registers, EIP and EFLAGS from the
//! last [`Checkpoint`], so a handler orders only what lies outside those (memory, segment registers, tables).
//!
//! Not modelled: debug register breakpoints (DR0-DR3 hold what was written and match nothing).

mod alu;
mod bits;
mod control;
mod data;
pub mod decode_cache;
mod dispatch;
mod flow;
mod fpu;
mod fpu_env;
mod muldiv;
mod operand;
mod shift;
mod stack;
mod string;
mod system;
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod tests;

pub use control::CR4_ALLOWED;

use crate::cpum::{CpuState, Shadow, eflags, seg};
use crate::env::{Env, Privilege};
use crate::trap::{Event, Trap};
use csam::GuestLin;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

/// How one interpreted instruction ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Done; EIP points at the next instruction (or the same, for a repeated string instruction with iterations left).
    Done,
    /// Done, it was `hlt`: `cpu.halted` is set and EIP is after it.
    Halted,
    /// Not done: this must be delivered with `trpm::deliver`. CPU state is as before the instruction, except for what
    /// the architecture says has happened (repeated string instructions; traps after the instruction).
    Raise(Event),
}

/// What a handler did with control flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flow {
    /// Goes on with the following instruction.
    Next,
    /// EIP is already where it must be.
    Jumped,
    /// A repeated string instruction has iterations left.
    Again,
    /// `hlt`.
    Halt,
    /// `int n` and friends: deliver with EIP after the instruction.
    Raise(Event),
}

/// What is put back when a handler fails.
#[derive(Clone, Copy)]
struct Checkpoint {
    gpr: [u32; 8],
    eip: u32,
    eflags: u32,
}

impl Checkpoint {
    fn of(cpu: &CpuState) -> Checkpoint {
        Checkpoint { gpr: cpu.gpr, eip: cpu.eip, eflags: cpu.eflags }
    }
}

/// One instruction in execution.
struct Exec<'a> {
    cpu: &'a mut CpuState,
    env: &'a mut dyn Env,
    i: &'a Instruction,
    /// EIP after the instruction.
    next: u32,
    resume: Checkpoint,
}

type Res<T = ()> = Result<T, Trap>;

/// Interprets the instruction at CS:EIP. Clears an interrupt shadow that was in force when it started, sets one where
/// the instruction does.
pub fn step(cpu: &mut CpuState, env: &mut dyn Env) -> Step {
    match fetch_decode(cpu, env) {
        Ok(insn) => execute(cpu, env, &insn),
        Err(trap) => {
            cpu.shadow = Shadow::None;
            Step::Raise(Event::Exception(trap))
        }
    }
}

/// Interprets an instruction that [`fetch_decode`] has just returned for CS:EIP.
pub fn execute(cpu: &mut CpuState, env: &mut dyn Env, insn: &Instruction) -> Step {
    cpu.shadow = Shadow::None;
    run(cpu, env, insn)
}

/// Decodes the instruction at CS:EIP without executing it. The trap is the one its execution would raise.
pub fn fetch_decode(cpu: &CpuState, env: &mut dyn Env) -> Result<Instruction, Trap> {
    let cs = &cpu.seg[seg::CS];
    if cpu.eip > cs.limit {
        return Err(Trap::gp(0));
    }
    if let Some(insn) = env.decoded(cpu) {
        return Ok(insn);
    }
    let mut bytes = [0u8; 16];
    let room = (cs.limit - cpu.eip).min(14) as usize + 1;
    let at = GuestLin(cpu.linear_eip());
    let got = env.fetch(cpu, at, bytes.get_mut(..room).unwrap_or_default())?.min(room);
    let big = cs.big();
    let fetched = bytes.get(..got).unwrap_or_default();
    if let Some(insn) = env.decoded_from(cpu, &bytes, got) {
        return Ok(insn);
    }
    let bitness = if big { 32 } else { 16 };
    let mut decoder = Decoder::with_ip(bitness, fetched, u64::from(cpu.eip), DecoderOptions::NONE);
    let insn = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => {
            env.remember_decoded(cpu, &bytes, &insn);
            Ok(insn)
        }
        DecoderError::NoMoreBytes if got < room => {
            // The missing byte lies on a page that faults: CR2 is the address of that byte, not of the instruction.
            Err(env.fetch_fault(cpu, GuestLin(at.0.wrapping_add(got as u32))).unwrap_or(Trap::gp(0)))
        }
        // Beyond the CS limit.
        DecoderError::NoMoreBytes => Err(Trap::gp(0)),
        // Longer than 15 bytes (SDM Vol. 3A, 6.15 "Interrupt 13").
        _ if decoder.position() >= 15 => Err(Trap::gp(0)),
        _ => Err(Trap::UD),
    }
}

fn run(cpu: &mut CpuState, env: &mut dyn Env, insn: &Instruction) -> Step {
    let resume = Checkpoint::of(cpu);
    let next = cpu.eip.wrapping_add(insn.len() as u32);
    // In a 16-bit code segment IP wraps only where the limit lets it: a fetch at 0x10000 must fault, so keep the carry.
    let mut exec = Exec { cpu, env, i: insn, next, resume };
    let flow = exec.run();
    let resume = exec.resume;
    match flow {
        Err(trap) => {
            cpu.gpr = resume.gpr;
            cpu.eip = resume.eip;
            cpu.eflags = resume.eflags;
            return Step::Raise(Event::Exception(trap));
        }
        Ok(Flow::Raise(event)) => {
            cpu.eip = next;
            return Step::Raise(event);
        }
        Ok(Flow::Next | Flow::Halt) => {
            cpu.eip = next;
            cpu.eflags &= !eflags::RF;
        }
        Ok(Flow::Jumped | Flow::Again) => {}
    }
    // A single-step trap is due if TF was set when the instruction started; MOV SS holds it back (SDM Vol. 3B, 17.3.1.4).
    if resume.eflags & eflags::TF != 0 && cpu.shadow != Shadow::MovSs {
        cpu.dr[6] |= 1 << 14;
        if flow == Ok(Flow::Halt) {
            // The trap wakes the CPU again: it never gets to halt.
            cpu.halted = false;
        }
        return Step::Raise(Event::Exception(Trap::DB));
    }
    if flow == Ok(Flow::Halt) { Step::Halted } else { Step::Done }
}

impl Exec<'_> {
    fn privilege(&self) -> Privilege {
        if self.cpu.cpl == 3 { Privilege::User } else { Privilege::Supervisor }
    }
    /// #GP(0) unless CPL is 0.
    fn need_cpl0(&self) -> Res {
        if self.cpu.cpl == 0 { Ok(()) } else { Err(Trap::gp(0)) }
    }
    /// #UD in real and V86 mode.
    fn need_selectors(&self) -> Res {
        if self.cpu.real_addressing() { Err(Trap::UD) } else { Ok(()) }
    }
    fn flag(&self, bit: u32) -> bool {
        self.cpu.eflags & bit != 0
    }
    fn set_flag(&mut self, bit: u32, on: bool) {
        if on {
            self.cpu.eflags |= bit;
        } else {
            self.cpu.eflags &= !bit;
        }
    }
}

/// All ones in the low `size` bytes.
const fn mask(size: u8) -> u32 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        _ => u32::MAX,
    }
}

/// The sign bit of a value of `size` bytes.
const fn sign(size: u8) -> u32 {
    match size {
        1 => 0x80,
        2 => 0x8000,
        _ => 0x8000_0000,
    }
}

/// Sign-extends the low `size` bytes.
const fn sext(v: u32, size: u8) -> i32 {
    match size {
        1 => v as u8 as i8 as i32,
        2 => v as u16 as i16 as i32,
        _ => v as i32,
    }
}
