//! Ports made for debugging: POST codes (80h), the Bochs debug console (E9h), QEMU's isa-debug-exit.
//!
//! Source: IBM PC/AT Technical Reference (80h); Bochs "port e9 hack"; QEMU hw/misc/debugexit.c for the exit status.

use super::ns16550a::SerialSink;

/// POST diagnostic port.
pub const POST_PORT: u16 = 0x80;
/// Debug console.
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;
/// QEMU's default base of isa-debug-exit; two ports wide.
pub const DEBUG_EXIT_PORT: u16 = 0x501;

/// The three of them; console and exit only where switched on.
#[derive(Default)]
pub struct DebugPorts {
    post: u8,
    console: Option<Box<dyn SerialSink>>,
    exit_base: Option<u16>,
}

impl DebugPorts {
    /// `console` receives what is written to E9h; `exit_base` switches isa-debug-exit on.
    #[must_use]
    pub fn new(console: Option<Box<dyn SerialSink>>, exit_base: Option<u16>) -> DebugPorts {
        DebugPorts { post: 0, console, exit_base }
    }

    /// The last POST code.
    #[must_use]
    pub fn post_code(&self) -> u8 {
        self.post
    }

    /// Sets the POST code.
    pub fn set_post_code(&mut self, value: u8) {
        self.post = value;
    }

    /// E9h reads as E9h where the console exists: how a guest finds it.
    #[must_use]
    pub fn read_console(&self) -> u8 {
        if self.console.is_some() { 0xe9 } else { 0xff }
    }

    /// A byte for the console.
    pub fn write_console(&mut self, value: u8) {
        if let Some(console) = &mut self.console {
            console.transmit(value);
        }
    }

    /// Whether `port` is isa-debug-exit.
    #[must_use]
    pub fn is_exit(&self, port: u16) -> bool {
        self.exit_base.is_some_and(|base| port.wrapping_sub(base) < 2)
    }

    /// The exit status for a value written to isa-debug-exit: always odd, so never 0.
    #[must_use]
    pub fn exit_status(value: u32) -> u32 {
        value << 1 | 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ns16550a::CaptureSink;

    #[test]
    fn the_console_is_found_by_reading_it_and_takes_text() {
        let sink = CaptureSink::default();
        let mut d = DebugPorts::new(Some(Box::new(sink.clone())), None);
        assert_eq!(d.read_console(), 0xe9);
        d.write_console(b'!');
        assert_eq!(sink.take(), b"!");
        assert_eq!(DebugPorts::default().read_console(), 0xff);
    }

    #[test]
    fn debug_exit_is_two_ports_wide_and_only_on_demand() {
        let d = DebugPorts::new(None, Some(DEBUG_EXIT_PORT));
        assert!(d.is_exit(0x501) && d.is_exit(0x502) && !d.is_exit(0x503) && !d.is_exit(0x500));
        assert!(!DebugPorts::default().is_exit(0x501));
        assert_eq!(DebugPorts::exit_status(0x10), 0x21);
    }
}
