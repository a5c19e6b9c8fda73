//! The console behind Ctrl-A c: parses commands and hands them to whoever knows the machine.

/// What `info` can show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Info {
    /// CPU state.
    Registers,
    /// The 8259A pair.
    Pic,
    /// Patches by tactic, refused patches, trap-byte sites.
    Patches,
    /// Scans and code pages.
    Csam,
    /// The fault accounting.
    Faults,
    /// World processes.
    Worlds,
    /// RAM, mappings, shadow.
    Memory,
    /// The VGA text screen.
    Vga,
}

impl Info {
    /// Every topic with its name and a description.
    pub const ALL: [(&'static str, Info, &'static str); 8] = [
        ("registers", Info::Registers, "the virtual CPU's registers"),
        ("pic", Info::Pic, "the interrupt controllers"),
        ("patches", Info::Patches, "patches by tactic, refusals, trap-byte sites"),
        ("csam", Info::Csam, "code pages and scans"),
        ("faults", Info::Faults, "the fault accounting so far"),
        ("worlds", Info::Worlds, "world processes and their address spaces"),
        ("memory", Info::Memory, "guest RAM, mappings and the shadow"),
        ("vga", Info::Vga, "the VGA text screen"),
    ];
}

/// A parsed command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Nothing was typed.
    Empty,
    /// Show something.
    Info(Info),
    /// Show the commands.
    Help,
    /// End the run.
    Quit,
    /// Let the guest run.
    Cont,
    /// Stop the guest.
    Stop,
    /// Reset the machine.
    Reset,
    /// Raise the non-maskable interrupt.
    Nmi,
}

/// Parses a line. A command or topic may be shortened as long as only one is meant. The error is the line to show.
pub fn parse(line: &str) -> Result<Command, String> {
    const WORDS: [(&str, Option<Command>); 9] = [
        ("cont", Some(Command::Cont)),
        ("help", Some(Command::Help)),
        ("info", None),
        ("nmi", Some(Command::Nmi)),
        ("quit", Some(Command::Quit)),
        ("reset", Some(Command::Reset)),
        ("stop", Some(Command::Stop)),
        ("?", Some(Command::Help)),
        ("continue", Some(Command::Cont)),
    ];
    let mut words = line.split_ascii_whitespace();
    let Some(verb) = words.next() else { return Ok(Command::Empty) };
    let argument = words.next();
    if words.next().is_some() {
        return Err(format!("too many words in '{}'; try 'help'", line.trim()));
    }
    let command = WORDS
        .iter()
        .find(|(name, _)| *name == verb)
        .or_else(|| WORDS.iter().find(|(name, _)| name.starts_with(verb)))
        .map(|(_, command)| *command)
        .ok_or_else(|| format!("unknown command '{verb}'; try 'help'"))?;
    match (command, argument) {
        (Some(command), None) => Ok(command),
        (Some(_), Some(extra)) => Err(format!("'{verb}' takes no argument, not '{extra}'")),
        (None, None) => Err(format!("info about what? {}", topics())),
        (None, Some(topic)) => {
            let mut matching = Info::ALL.iter().filter(|(name, _, _)| name.starts_with(topic));
            match (matching.next(), matching.next()) {
                (Some((_, info, _)), None) => Ok(Command::Info(*info)),
                (Some(_), Some(_)) => Err(format!("'{topic}' can mean several topics: {}", topics())),
                (None, _) => Err(format!("no info about '{topic}', only: {}", topics())),
            }
        }
    }
}

fn topics() -> String {
    Info::ALL.map(|(name, _, _)| name).join(", ")
}

/// The help text, lines ending in `\n`.
#[must_use]
pub fn help() -> String {
    let mut text = String::new();
    for (name, _, what) in Info::ALL {
        text += &format!("info {name:<10} {what}\n");
    }
    text += "cont            let the guest run\n\
             stop            stop the guest\n\
             reset           reset the machine\n\
             nmi             raise a non-maskable interrupt\n\
             quit            end the run\n\
             Ctrl-A c        back to the guest's serial port\n";
    text
}

/// Whoever knows the machine.
pub trait ConsoleTarget {
    /// Text to show, lines ending in `\n`.
    fn info(&mut self, what: Info) -> String;
    /// Ends the run.
    fn quit(&mut self);
    /// Lets a stopped guest run.
    fn cont(&mut self);
    /// Stops the guest between two instructions.
    fn stop(&mut self);
    /// Resets the machine.
    fn reset(&mut self);
    /// Raises the non-maskable interrupt.
    fn nmi(&mut self);
}

/// Runs one line against the target and returns what to print.
pub fn execute(line: &str, target: &mut dyn ConsoleTarget) -> String {
    match parse(line) {
        Err(problem) => format!("{problem}\n"),
        Ok(Command::Empty) => String::new(),
        Ok(Command::Help) => help(),
        Ok(Command::Info(what)) => target.info(what),
        Ok(Command::Quit) => {
            target.quit();
            String::new()
        }
        Ok(Command::Cont) => {
            target.cont();
            String::new()
        }
        Ok(Command::Stop) => {
            target.stop();
            "the guest is stopped; 'cont' lets it run\n".into()
        }
        Ok(Command::Reset) => {
            target.reset();
            String::new()
        }
        Ok(Command::Nmi) => {
            target.nmi();
            String::new()
        }
    }
}

/// What is printed when the console waits for a line.
pub const PROMPT: &str = "(subring) ";

/// Collects typed bytes into lines with echo, as a raw terminal has none of its own.
#[derive(Default, Debug)]
pub struct LineEditor {
    line: String,
}

impl LineEditor {
    /// Takes one byte. Returns what to echo and, on Enter, the line.
    pub fn feed(&mut self, byte: u8) -> (String, Option<String>) {
        match byte {
            b'\r' | b'\n' => ("\r\n".into(), Some(std::mem::take(&mut self.line))),
            0x08 | 0x7f => match self.line.pop() {
                Some(_) => ("\x08 \x08".into(), None),
                None => (String::new(), None),
            },
            0x15 => {
                let erase = "\x08 \x08".repeat(self.line.len());
                self.line.clear();
                (erase, None)
            }
            0x20..=0x7e if self.line.len() < 200 => {
                self.line.push(char::from(byte));
                (char::from(byte).to_string(), None)
            }
            _ => (String::new(), None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_topic_can_be_named_and_shortened() {
        for (name, info, _) in Info::ALL {
            assert_eq!(parse(&format!("info {name}")), Ok(Command::Info(info)));
        }
        assert_eq!(parse(" i r "), Ok(Command::Info(Info::Registers)));
        assert_eq!(parse("q"), Ok(Command::Quit));
        assert_eq!(parse(""), Ok(Command::Empty));
    }

    #[test]
    fn an_ambiguous_or_unknown_word_is_explained() {
        assert!(parse("info p").is_err_and(|e| e.contains("several")));
        assert!(parse("info x").is_err_and(|e| e.contains("'x'")));
        assert!(parse("launch").is_err_and(|e| e.contains("'launch'")));
        assert!(parse("info").is_err_and(|e| e.contains("registers")));
        assert!(parse("quit now").is_err());
    }

    #[test]
    fn a_typed_line_can_be_corrected() {
        let mut editor = LineEditor::default();
        let mut lines = Vec::new();
        for byte in *b"inx\x7ffo pic\r\x7fq\x15quit\n" {
            lines.extend(editor.feed(byte).1);
        }
        assert_eq!(lines, ["info pic", "quit"]);
    }
}
