//! TRPM: traps and interrupts through the guest's IDT, and the way back.
//!
//! (Skeleton: signatures only.)

use crate::cpum::CpuState;
use crate::env::Env;
use crate::trap::{Event, Trap};

/// The guest shut itself down: a fault while delivering a double fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TripleFault {
    /// The event that started it.
    pub first: Event,
    /// The last trap, which could not be delivered.
    pub last: Trap,
}

/// Delivers an event, escalating to #DF and triple fault (SDM Vol. 3A, 6.15 "Interrupt 8").
/// Real mode, V86 and protected mode; interrupt, trap and task gates.
pub fn deliver(_cpu: &mut CpuState, _env: &mut dyn Env, _event: Event) -> Result<(), TripleFault> {
    unimplemented!()
}

/// One attempt to deliver: on error nothing of the CPU state has changed and the trap is what the attempt raised.
/// The interpreter uses it for `int n`.
pub fn try_deliver(_cpu: &mut CpuState, _env: &mut dyn Env, _event: Event) -> Result<(), Trap> {
    unimplemented!()
}

/// `iret`: same and outer level, to V86, nested task. `operand_size` is 2 or 4.
pub fn iret(_cpu: &mut CpuState, _env: &mut dyn Env, _operand_size: u8) -> Result<(), Trap> {
    unimplemented!()
}
