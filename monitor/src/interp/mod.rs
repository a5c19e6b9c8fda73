//! The interpreter: one instruction at a time on engine-neutral state.
//!
//! (Skeleton: signatures only.)

use crate::cpum::CpuState;
use crate::env::Env;
use crate::trap::Event;

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

/// Interprets the instruction at CS:EIP. Clears an interrupt shadow that was in force when it started, sets one where
/// the instruction does.
pub fn step(_cpu: &mut CpuState, _env: &mut dyn Env) -> Step {
    unimplemented!()
}
