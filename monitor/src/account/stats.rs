//! The account as plain data: the JSON of `--stats-out` (docs/stats-format.md).

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The version this program writes and reads. It changes when a field changes its meaning or disappears.
pub const STATS_VERSION: u32 = 1;

/// Everything counted in one run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stats {
    /// [`STATS_VERSION`].
    pub version: u32,
    /// The version of subring that wrote it.
    pub subring: String,
    /// The engine that ran the guest.
    pub engine: String,
    /// Wall-clock time of the run in nanoseconds.
    pub wall_ns: u64,
    /// The guest's handler of vector 14, from its IDT at the end: tells where KASLR put a Linux kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_fault_handler: Option<u32>,
    /// Events by cause, route, instruction, site and CPL, most frequent first.
    pub exits: Vec<ExitLine>,
    /// Instructions completed in line by trampolines: the faults avoided by patches.
    pub inline: Vec<InlineLine>,
    /// Exceptions and interrupts delivered to the guest.
    pub injected: Vec<InjectedLine>,
    /// Numbers that are no event counts.
    pub gauges: BTreeMap<String, u64>,
    /// Patches by tactic.
    pub patches: BTreeMap<String, u64>,
    /// Sites that only a trapping byte could be put on.
    pub trap_sites: Vec<TrapSiteLine>,
}

/// One kind of event at one site.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExitLine {
    /// [`super::Cause`] by name.
    pub cause: String,
    /// [`super::Route`] by name.
    pub route: String,
    /// Mnemonic, or `-`.
    pub instruction: String,
    /// Guest EIP of the instruction.
    pub eip: u32,
    /// Guest CPL.
    pub cpl: u8,
    /// How often.
    pub count: u64,
    /// Nanoseconds in all.
    pub ns: u64,
}

/// Instructions of one kind completed in line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InlineLine {
    /// Which instruction.
    pub instruction: String,
    /// How often.
    pub count: u64,
}

/// Events of one vector delivered to the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InjectedLine {
    /// The vector.
    pub vector: u8,
    /// How often.
    pub count: u64,
}

/// A site with a trapping byte.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TrapSiteLine {
    /// Guest EIP.
    pub eip: u32,
    /// Mnemonic.
    pub instruction: String,
    /// Why nothing better fitted.
    pub reason: String,
}

/// Why a statistics file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The host's answer.
        source: std::io::Error,
    },
    /// It is not what `--stats-out` writes.
    #[error("{path}: no statistics file of subring ({why})")]
    Format {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// Another program version wrote it.
    #[error("{path}: statistics version {found}; this program reads version {STATS_VERSION}")]
    Version {
        /// The file.
        path: String,
        /// The version found.
        found: u64,
    },
}

impl Stats {
    /// Writes the JSON to a file.
    pub fn write(&self, path: &Path) -> Result<(), StatsError> {
        let io = |source| StatsError::Io { path: path.display().to_string(), source };
        let mut text = serde_json::to_string_pretty(self).map_err(|e| io(e.into()))?;
        text.push('\n');
        std::fs::write(path, text).map_err(io)
    }

    /// Reads a file written by [`Stats::write`].
    pub fn read(path: &Path) -> Result<Stats, StatsError> {
        let name = || path.display().to_string();
        let text = std::fs::read(path).map_err(|source| StatsError::Io { path: name(), source })?;
        Stats::parse(&text, &name())
    }

    fn parse(text: &[u8], name: &str) -> Result<Stats, StatsError> {
        let format = |why: String| StatsError::Format { path: name.into(), why };
        let value: serde_json::Value = serde_json::from_slice(text).map_err(|e| format(e.to_string()))?;
        match value.get("version").and_then(serde_json::Value::as_u64) {
            None => return Err(format("it has no version".into())),
            Some(found) if found != u64::from(STATS_VERSION) => {
                return Err(StatsError::Version { path: name.into(), found });
            }
            Some(_) => {}
        }
        serde_json::from_value(value).map_err(|e| format(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Account, Cause, Kind, Route};
    use super::*;

    #[test]
    fn what_is_written_reads_back_the_same() {
        let mut account = Account::new();
        account.record(Cause::PortIo, Route::FarExit, Kind::NONE, 0xc010_0000, 0, 900);
        account.record_injected(32);
        account.set_inline("cli", 1000);
        account.set_gauge("worlds", 1);
        account.set_patches("jump", 12);
        account.add_trap_site(0xc010_0004, Kind::NONE, "branch target inside");
        let stats = account.stats("raw", 5);
        let text = serde_json::to_vec(&stats).unwrap();
        assert_eq!(Stats::parse(&text, "x").unwrap(), stats);
    }

    #[test]
    fn another_version_and_other_json_are_told_apart() {
        assert!(matches!(Stats::parse(br#"{"version": 2}"#, "x"), Err(StatsError::Version { found: 2, .. })));
        assert!(matches!(Stats::parse(br#"{"version": 1}"#, "x"), Err(StatsError::Format { .. })));
        assert!(matches!(Stats::parse(b"[]", "x"), Err(StatsError::Format { .. })));
        assert!(matches!(Stats::parse(b"\xff\x00", "x"), Err(StatsError::Format { .. })));
    }
}
