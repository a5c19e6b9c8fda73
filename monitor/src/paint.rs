//! Colours, only where a person looks: on a terminal, without NO_COLOR.

use std::io::IsTerminal;

/// Paints text with ANSI colours, or leaves it alone.
#[derive(Clone, Copy, Debug)]
pub struct Paint {
    enabled: bool,
}

impl Paint {
    /// Never paints.
    pub const PLAIN: Paint = Paint { enabled: false };

    /// Paints if `stream` is a terminal, NO_COLOR (<https://no-color.org>) is unset or empty and TERM is not `dumb`.
    pub fn for_stream(stream: &impl IsTerminal) -> Paint {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
            || std::env::var_os("TERM").is_none_or(|v| v == "dumb");
        Paint { enabled: stream.is_terminal() && !refused }
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.enabled { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
    /// Something is as it should be.
    #[must_use]
    pub fn good(self, text: &str) -> String {
        self.wrap("32", text)
    }
    /// Something is missing that is needed.
    #[must_use]
    pub fn bad(self, text: &str) -> String {
        self.wrap("31;1", text)
    }
    /// Something is missing that would help.
    #[must_use]
    pub fn warn(self, text: &str) -> String {
        self.wrap("33", text)
    }
    /// A heading.
    #[must_use]
    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }
    /// Check marks instead of words may be used.
    #[must_use]
    pub fn enabled(self) -> bool {
        self.enabled
    }
}
