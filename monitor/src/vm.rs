//! The virtual machine: puts a guest together from a configuration and runs it to its end.

use crate::config::RunConfig;
use crate::outcome::{Ending, RunOutcome};

/// Runs a guest until it ends.
pub fn run(_config: RunConfig) -> RunOutcome {
    RunOutcome::not_started(Ending::HostCannot("the execution manager is not built yet".into()))
}
