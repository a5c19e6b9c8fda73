//! How a run ends, and the exit code that tells it to the caller.

use crate::account::Stats;

/// Exit codes of the `subring` command. They are part of its interface: README.md lists them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest ended well: power-off, restart without `--reboot`, HLT with IF clear, a passed verdict, Ctrl-A x.
    Well = 0,
    /// A mistake on the command line, or a file that cannot be used (missing, truncated, 64-bit, too big, corrupt).
    Usage = 2,
    /// The guest cannot go on: triple fault, or a state nothing can run.
    GuestFatal = 3,
    /// The host lacks what the chosen engine needs, or a host call failed.
    HostCannot = 4,
    /// The guest itself reported failure: the built-in guest's verdict is FAIL, or isa-debug-exit got another value
    /// than 0 or 10h.
    GuestFailed = 5,
    /// The two engines of a lockstep run differ.
    Differs = 6,
    /// A mistake in subring itself: a panic. Rust's own exit code for it.
    Internal = 101,
    /// SIGINT, SIGTERM or SIGHUP ended the run.
    Interrupted = 130,
}

impl ExitCode {
    /// Every code with its meaning in a line, in numeric order.
    pub const ALL: [(ExitCode, &'static str); 8] = [
        (ExitCode::Well, "the guest ended well (power-off, restart, halt for ever, verdict PASS, Ctrl-A x)"),
        (ExitCode::Usage, "usage, or an input file that cannot be used"),
        (
            ExitCode::GuestFatal,
            "guest fatal: it cannot go on (triple fault, unrunnable state); a dump was printed",
        ),
        (ExitCode::HostCannot, "the host lacks something; `subring doctor` says what"),
        (ExitCode::GuestFailed, "the guest reported failure (verdict FAIL, isa-debug-exit not 0 or 10h)"),
        (ExitCode::Differs, "--lockstep found a difference between two engines"),
        (ExitCode::Internal, "an error in subring itself; one line says where"),
        (ExitCode::Interrupted, "interrupted by SIGINT, SIGTERM or SIGHUP"),
    ];
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        std::process::ExitCode::from(code as u8)
    }
}

/// Why a run is over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// The guest switched the machine off, or halted with interrupts disabled. The text says how.
    PoweredOff(&'static str),
    /// The guest asked for a restart and `--reboot` was not given. The text says by which means.
    Restart(&'static str),
    /// The guest wrote this to isa-debug-exit.
    DebugExit(u32),
    /// The user said Ctrl-A x, or `quit` in the console.
    Quit,
    /// A signal ended the run.
    Interrupted,
    /// The guest cannot go on; the text is the whole dump, several lines, the first of which is the reason.
    GuestFatal(String),
    /// Lockstep compared as many instructions as it was to.
    Compared,
    /// Lockstep found a difference; the text is all that is known of it, several lines.
    Differs(String),
    /// An input file cannot be used; one line.
    BadInput(String),
    /// The host cannot do it; one line that says what is lacking and what to do.
    HostCannot(String),
}

impl Ending {
    /// The host cannot give `what`.
    #[must_use]
    pub fn host_cannot(what: &str, why: &dyn std::fmt::Display) -> Ending {
        Ending::HostCannot(format!("{what}: {why}; `subring doctor` shows what this host offers"))
    }

    /// The exit code for this ending.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Ending::PoweredOff(_) | Ending::Restart(_) | Ending::Quit => ExitCode::Well,
            Ending::DebugExit(0 | 0x10) | Ending::Compared => ExitCode::Well,
            Ending::Differs(_) => ExitCode::Differs,
            Ending::DebugExit(_) => ExitCode::GuestFailed,
            Ending::Interrupted => ExitCode::Interrupted,
            Ending::GuestFatal(_) => ExitCode::GuestFatal,
            Ending::BadInput(_) => ExitCode::Usage,
            Ending::HostCannot(_) => ExitCode::HostCannot,
        }
    }
}

/// What a run leaves behind.
#[derive(Debug)]
pub struct RunOutcome {
    /// Why it ended.
    pub ending: Ending,
    /// The accounting, if the run came far enough to have one.
    pub stats: Option<Box<Stats>>,
}

impl RunOutcome {
    /// An outcome of a run that never started.
    #[must_use]
    pub fn not_started(ending: Ending) -> RunOutcome {
        RunOutcome { ending, stats: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_kinds_of_ending_have_different_codes() {
        let mut codes: Vec<u8> = ExitCode::ALL.iter().map(|(code, _)| *code as u8).collect();
        codes.dedup();
        assert_eq!(codes, [0, 2, 3, 4, 5, 6, 101, 130]);
    }

    #[test]
    fn a_debug_exit_is_well_only_for_the_two_customary_values() {
        assert_eq!(Ending::DebugExit(0).exit_code(), ExitCode::Well);
        assert_eq!(Ending::DebugExit(0x10).exit_code(), ExitCode::Well);
        assert_eq!(Ending::DebugExit(0x11).exit_code(), ExitCode::GuestFailed);
        assert_eq!(Ending::DebugExit(1).exit_code(), ExitCode::GuestFailed);
    }
}
