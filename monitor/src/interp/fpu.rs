//! x87, MMX and SSE: not there yet, every one of them is #UD.

use super::{Exec, Flow, Res};
use crate::trap::Trap;

impl Exec<'_> {
    pub(super) fn fpu(&mut self) -> Res<Flow> {
        Err(Trap::UD)
    }
}
