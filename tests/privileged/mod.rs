//! The privileged oracle: one instruction, or the delivery of an event, on KVM and by the interpreter, compared.
//!
//! 1. [`setup`]: the machine, [`case`]: a case and what is compared.
//! 2. [`interpreter`], [`kvm`]: a case on either side; [`rig`]: on both.
//! 3. [`gaps`]: what KVM in the lab gets wrong.
//! 4. [`cases`]: the cases; [`defects`]: that they find what is wrong.

pub(crate) mod case;
pub(crate) mod cases;
pub(crate) mod defects;
pub(crate) mod gaps;
pub(crate) mod interpreter;
pub(crate) mod kvm;
pub(crate) mod rig;
pub(crate) mod setup;
