//! SELM: selectors, descriptors and every control transfer that loads CS.
//!
//! 1. `descriptor`: reading a descriptor, and what its bits say.
//! 2. `load`: data segments, LDTR, TR; `lar`, `lsl`, `verr`, `verw`; the I/O permission bitmap.
//! 3. `stack`: frames pushed and popped as one piece, and the inner stack out of the TSS.
//! 4. `transfer`: far `jmp`, `call` and `ret`, and the checks on CS they share with TRPM.
//! 5. `task`: the task switch.
//!
//! On error nothing of the CPU state has changed. What hardware itself does to memory before it faults (accessed bits)
//! may have happened.

pub mod descriptor;
mod load;
pub(crate) mod stack;
pub(crate) mod task;
mod transfer;

#[cfg(test)]
pub(crate) mod flat_env;
#[cfg(test)]
mod tests;

pub use load::{
    check_io, load_access_rights, load_ldtr, load_segment, load_segment_limit, load_tr, v86_segment,
    verify_segment,
};
pub(crate) use load::{drop_inner_segments, real_segment};
pub use transfer::{far_call, far_jump, far_return};
pub(crate) use transfer::{return_code_segment, return_stack_segment, task_gate_tss};
