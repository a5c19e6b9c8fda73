//! Intel 8042 keyboard controller with a keyboard and a PS/2 mouse behind it (ports 60h, 64h; IRQ1, IRQ12).
//!
//! Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller", "Keyboards" and
//! "Mouse"; Intel UPI-41AH/42AH (order 210393) for the chip.
//!
//! Devices answer at once. The mouse answers commands but never moves. Not emulated: scan code set 3, the password.

use std::collections::VecDeque;

/// Data port.
pub const DATA_PORT: u16 = 0x60;
/// Status (read) and command (write) port.
pub const COMMAND_PORT: u16 = 0x64;

const STATUS_OBF_BIT: u8 = 0x01;
const STATUS_SYS_BIT: u8 = 0x04;
const STATUS_COMMAND_BIT: u8 = 0x08;
const STATUS_UNLOCKED_BIT: u8 = 0x10;
const STATUS_AUX_BIT: u8 = 0x20;

const CTR_KBD_INT_BIT: u8 = 0x01;
const CTR_AUX_INT_BIT: u8 = 0x02;
const CTR_SYS_BIT: u8 = 0x04;
const CTR_KBD_DISABLE_BIT: u8 = 0x10;
const CTR_AUX_DISABLE_BIT: u8 = 0x20;
const CTR_TRANSLATE_BIT: u8 = 0x40;

/// Output port P2: bit 0 low resets, bit 1 is A20.
const OUTPUT_NO_RESET_BIT: u8 = 0x01;
const OUTPUT_A20_BIT: u8 = 0x02;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_OK: u8 = 0xaa;
/// A keyboard buffers 16 bytes; then keys are lost.
const KEYBOARD_BUFFER: usize = 16;
/// What a device may still have to say when commands pile up.
const ANSWER_LIMIT: usize = 64;

/// Scan code set 2 to set 1, as the controller translates; 80h-FFh pass but 83h and 84h.
const SET2_TO_SET1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, 0x65,
    0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, 0x67, 0x2e,
    0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, 0x69, 0x31, 0x30,
    0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, 0x6b, 0x33, 0x25, 0x17,
    0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, 0x6d, 0x73, 0x28, 0x74, 0x1a,
    0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, 0x55, 0x56, 0x77, 0x78, 0x79, 0x7a,
    0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, 0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01,
    0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// Whose byte is in the output buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Keyboard,
    Aux,
}

/// A byte written to port 60h goes there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Pending {
    #[default]
    Keyboard,
    Ram(u8),
    OutputPort,
    KeyboardOutput,
    AuxOutput,
    Aux,
}

/// One device on the controller: its answers, and the command whose parameter it waits for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Device {
    out: VecDeque<u8>,
    parameter_of: Option<u8>,
    last: u8,
    reporting: bool,
}

impl Device {
    fn answer(&mut self, bytes: &[u8]) {
        if self.out.len() + bytes.len() <= ANSWER_LIMIT {
            self.out.extend(bytes);
        }
    }
}

/// What a write to the controller asks of the rest of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Effect {
    /// P2 bit 0 went low: reset the processor.
    pub reset: bool,
    /// A20 gate was driven to this.
    pub a20: Option<bool>,
}

/// The controller and its two devices.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct I8042 {
    /// Internal RAM; byte 0 is the controller command byte.
    ram: [u8; 32],
    output: Option<(u8, Source)>,
    controller_answers: VecDeque<(u8, Source)>,
    last_was_command: bool,
    pending: Pending,
    keyboard: Device,
    mouse: Device,
    scan_set: u8,
    leds: u8,
    break_prefix: bool,
}

impl Default for I8042 {
    fn default() -> Self {
        I8042::new()
    }
}

impl I8042 {
    /// As firmware leaves it: self test passed, keyboard on and translated, both interrupts off.
    #[must_use]
    pub fn new() -> I8042 {
        let mut ram = [0; 32];
        ram[0] = CTR_TRANSLATE_BIT | CTR_SYS_BIT;
        I8042 {
            ram,
            output: None,
            controller_answers: VecDeque::new(),
            last_was_command: false,
            pending: Pending::Keyboard,
            keyboard: Device { reporting: true, ..Device::default() },
            mouse: Device::default(),
            scan_set: 2,
            leds: 0,
            break_prefix: false,
        }
    }

    /// Levels of IRQ1 and IRQ12: the output buffer is full, with a byte of that side, and that side may interrupt.
    #[must_use]
    pub fn irqs(&self) -> (bool, bool) {
        match self.output {
            Some((_, Source::Keyboard)) => (self.ram[0] & CTR_KBD_INT_BIT != 0, false),
            Some((_, Source::Aux)) => (false, self.ram[0] & CTR_AUX_INT_BIT != 0),
            None => (false, false),
        }
    }

    /// Keyboard LEDs: bit 0 scroll, 1 num, 2 caps lock.
    #[must_use]
    pub fn leds(&self) -> u8 {
        self.leds
    }

    /// Byte read of port 60h or 64h. After a read of 60h call [`pump`](I8042::pump): the interrupt lines fall in between.
    pub fn read(&mut self, port: u16) -> u8 {
        if port == DATA_PORT {
            return self.output.take().map_or(0, |(byte, _)| byte);
        }
        let full = match self.output {
            Some((_, Source::Keyboard)) => STATUS_OBF_BIT,
            Some((_, Source::Aux)) => STATUS_OBF_BIT | STATUS_AUX_BIT,
            None => 0,
        };
        let sys = if self.ram[0] & CTR_SYS_BIT != 0 { STATUS_SYS_BIT } else { 0 };
        full | sys | STATUS_UNLOCKED_BIT | if self.last_was_command { STATUS_COMMAND_BIT } else { 0 }
    }

    /// Moves the next byte into an empty output buffer: the controller's own answers first.
    pub fn pump(&mut self) {
        if self.output.is_some() {
            return;
        }
        if let Some(answer) = self.controller_answers.pop_front() {
            self.output = Some(answer);
            return;
        }
        if self.ram[0] & CTR_KBD_DISABLE_BIT == 0 {
            while let Some(byte) = self.keyboard.out.pop_front() {
                if let Some(byte) = self.translate(byte) {
                    self.output = Some((byte, Source::Keyboard));
                    return;
                }
            }
        }
        if self.ram[0] & CTR_AUX_DISABLE_BIT == 0
            && let Some(byte) = self.mouse.out.pop_front()
        {
            self.output = Some((byte, Source::Aux));
        }
    }

    /// Set 2 to set 1: F0h is swallowed and sets bit 7 of the next code.
    fn translate(&mut self, byte: u8) -> Option<u8> {
        if self.ram[0] & CTR_TRANSLATE_BIT == 0 {
            return Some(byte);
        }
        if byte == 0xf0 {
            self.break_prefix = true;
            return None;
        }
        let code = set2_to_set1(byte);
        Some(if std::mem::take(&mut self.break_prefix) { code | 0x80 } else { code })
    }

    fn answer(&mut self, byte: u8, source: Source) {
        if self.controller_answers.len() < ANSWER_LIMIT {
            self.controller_answers.push_back((byte, source));
        }
    }

    /// Byte write to port 60h or 64h.
    pub fn write(&mut self, port: u16, value: u8) -> Effect {
        let effect = if port == DATA_PORT {
            self.last_was_command = false;
            self.write_data(value)
        } else {
            self.last_was_command = true;
            self.write_command(value)
        };
        self.pump();
        effect
    }

    fn write_command(&mut self, command: u8) -> Effect {
        self.pending = Pending::Keyboard;
        match command {
            0x20..=0x3f => self.answer(self.ram[usize::from(command & 0x1f)], Source::Keyboard),
            0x60..=0x7f => self.pending = Pending::Ram(command & 0x1f),
            0xa7 => self.ram[0] |= CTR_AUX_DISABLE_BIT,
            0xa8 => self.ram[0] &= !CTR_AUX_DISABLE_BIT,
            0xa9 | 0xab => self.answer(0, Source::Keyboard), // interface test passed
            0xaa => {
                self.ram[0] |= CTR_SYS_BIT;
                self.answer(0x55, Source::Keyboard);
            }
            0xad => self.ram[0] |= CTR_KBD_DISABLE_BIT,
            0xae => self.ram[0] &= !CTR_KBD_DISABLE_BIT,
            0xc0 => self.answer(0x80, Source::Keyboard), // input port: keyboard not inhibited
            0xd0 => self.answer(OUTPUT_NO_RESET_BIT | OUTPUT_A20_BIT, Source::Keyboard),
            0xd1 => self.pending = Pending::OutputPort,
            0xd2 => self.pending = Pending::KeyboardOutput,
            0xd3 => self.pending = Pending::AuxOutput,
            0xd4 => self.pending = Pending::Aux,
            0xdd => return Effect { a20: Some(false), reset: false },
            0xdf => return Effect { a20: Some(true), reset: false },
            // Pulse the output bits that are 0 in the command low; bit 0 is the processor's reset.
            0xf0..=0xff => return Effect { reset: command & OUTPUT_NO_RESET_BIT == 0, a20: None },
            _ => {}
        }
        Effect::default()
    }

    fn write_data(&mut self, value: u8) -> Effect {
        match std::mem::take(&mut self.pending) {
            Pending::Keyboard => {
                // A byte for the keyboard switches its clock on again.
                self.ram[0] &= !CTR_KBD_DISABLE_BIT;
                self.keyboard_byte(value);
            }
            Pending::Ram(at) => self.ram[usize::from(at & 0x1f)] = value,
            Pending::OutputPort => {
                return Effect {
                    reset: value & OUTPUT_NO_RESET_BIT == 0,
                    a20: Some(value & OUTPUT_A20_BIT != 0),
                };
            }
            Pending::KeyboardOutput => self.answer(value, Source::Keyboard),
            Pending::AuxOutput => self.answer(value, Source::Aux),
            Pending::Aux => self.mouse_byte(value),
        }
        Effect::default()
    }

    fn keyboard_byte(&mut self, value: u8) {
        let k = &mut self.keyboard;
        if let Some(command) = k.parameter_of.take() {
            match command {
                0xed => self.leds = value & 7,
                0xf0 if value == 0 => {
                    k.answer(&[ACK, self.scan_set]);
                    return;
                }
                0xf0 if (1..=2).contains(&value) => self.scan_set = value,
                0xf0 => {
                    k.answer(&[RESEND]);
                    return;
                }
                _ => {} // F3: typematic rate, nothing repeats here
            }
            k.answer(&[ACK]);
            return;
        }
        // A command discards what the keyboard still had to send.
        k.out.clear();
        match value {
            0xed | 0xf0 | 0xf3 => {
                k.parameter_of = Some(value);
                k.answer(&[ACK]);
            }
            0xee => k.answer(&[0xee]),
            0xf2 => k.answer(&[ACK, 0xab, 0x83]),
            0xf4 => {
                k.reporting = true;
                k.answer(&[ACK]);
            }
            0xf5 => {
                k.reporting = false;
                self.scan_set = 2;
                k.answer(&[ACK]);
            }
            0xf6 => {
                self.scan_set = 2;
                k.answer(&[ACK]);
            }
            0xf7..=0xfa => k.answer(&[ACK]),
            0xfe => k.answer(&[k.last]),
            0xff => {
                k.reporting = true;
                self.scan_set = 2;
                self.leds = 0;
                k.answer(&[ACK, SELF_TEST_OK]);
            }
            _ => k.answer(&[RESEND]),
        }
        k.last = k.out.back().copied().unwrap_or(0);
    }

    fn mouse_byte(&mut self, value: u8) {
        let m = &mut self.mouse;
        if m.parameter_of.take().is_some() {
            m.answer(&[ACK]);
            return;
        }
        m.out.clear();
        match value {
            0xe8 | 0xf3 => {
                m.parameter_of = Some(value); // resolution, sample rate
                m.answer(&[ACK]);
            }
            0xe9 => m.answer(&[ACK, if m.reporting { 0x20 } else { 0 }, 2, 100]),
            0xeb => m.answer(&[ACK, 0x08, 0, 0]), // a packet: no motion, no button
            0xf2 => m.answer(&[ACK, 0]),
            0xf4 => {
                m.reporting = true;
                m.answer(&[ACK]);
            }
            0xf5 | 0xf6 => {
                m.reporting = false;
                m.answer(&[ACK]);
            }
            0xe6 | 0xe7 | 0xea | 0xec | 0xee | 0xf0 => m.answer(&[ACK]),
            0xfe => m.answer(&[m.last]),
            0xff => {
                m.reporting = false;
                m.answer(&[ACK, SELF_TEST_OK, 0]);
            }
            _ => m.answer(&[RESEND]),
        }
        m.last = m.out.back().copied().unwrap_or(0);
    }

    /// A key event: its bytes in scan code set 2 (`1c` is A down, `f0 1c` A up). False if the keyboard is off or its
    /// buffer full; the event is lost then, as on the real one.
    pub fn key(&mut self, set2: &[u8]) -> bool {
        if !self.keyboard.reporting || self.keyboard.out.len() + set2.len() > KEYBOARD_BUFFER {
            return false;
        }
        if self.scan_set == 1 {
            let mut up = false;
            for byte in set2 {
                if *byte == 0xf0 {
                    up = true;
                } else {
                    let code = set2_to_set1(*byte);
                    self.keyboard.out.push_back(if std::mem::take(&mut up) { code | 0x80 } else { code });
                }
            }
        } else {
            self.keyboard.out.extend(set2);
        }
        self.pump();
        true
    }
}

fn set2_to_set1(byte: u8) -> u8 {
    match byte {
        0x83 => 0x41,
        0x84 => 0x54,
        _ => SET2_TO_SET1.get(usize::from(byte)).copied().unwrap_or(byte),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(c: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while c.read(COMMAND_PORT) & STATUS_OBF_BIT != 0 {
            bytes.push(c.read(DATA_PORT));
            c.pump();
        }
        bytes
    }

    fn aux(c: &mut I8042, byte: u8) -> Vec<u8> {
        c.write(COMMAND_PORT, 0xd4);
        c.write(DATA_PORT, byte);
        read_all(c)
    }

    #[test]
    fn the_command_byte_is_written_and_read_back() {
        let mut c = I8042::new();
        c.write(COMMAND_PORT, 0x60);
        c.write(DATA_PORT, 0x47);
        c.write(COMMAND_PORT, 0x20);
        assert_eq!(read_all(&mut c), [0x47]);
    }

    #[test]
    fn self_and_interface_tests_pass() {
        let mut c = I8042::new();
        for (command, answer) in [(0xaa, 0x55), (0xab, 0), (0xa9, 0)] {
            c.write(COMMAND_PORT, command);
            assert_eq!(read_all(&mut c), [answer]);
        }
    }

    #[test]
    fn keyboard_reset_and_identify_answer_at_once() {
        let mut c = I8042::new();
        c.write(DATA_PORT, 0xff);
        assert_eq!(read_all(&mut c), [ACK, SELF_TEST_OK]);
        c.write(DATA_PORT, 0xf2);
        assert_eq!(read_all(&mut c), [ACK, 0xab, 0x41], "the second byte of the id is translated");
        c.write(DATA_PORT, 0xed);
        c.write(DATA_PORT, 0x02);
        assert_eq!(read_all(&mut c), [ACK, ACK]);
        assert_eq!(c.leds(), 2);
        c.write(DATA_PORT, 0x01);
        assert_eq!(read_all(&mut c), [RESEND]);
    }

    #[test]
    fn keys_are_translated_to_set_1_and_interrupt() {
        let mut c = I8042::new();
        c.write(COMMAND_PORT, 0x60);
        c.write(DATA_PORT, CTR_TRANSLATE_BIT | CTR_KBD_INT_BIT);
        assert!(c.key(&[0x1c]));
        assert_eq!(c.irqs(), (true, false));
        assert!(c.key(&[0xf0, 0x1c]));
        assert!(c.key(&[0xe0, 0xf0, 0x75]));
        assert_eq!(read_all(&mut c), [0x1e, 0x9e, 0xe0, 0xc8]);
        assert_eq!(c.irqs(), (false, false));
    }

    #[test]
    fn the_line_falls_between_two_bytes() {
        let mut c = I8042::new();
        c.write(COMMAND_PORT, 0x60);
        c.write(DATA_PORT, CTR_KBD_INT_BIT);
        c.key(&[0xf0, 0x1c]);
        assert_eq!(c.read(DATA_PORT), 0xf0, "untranslated");
        assert_eq!(c.irqs(), (false, false));
        c.pump();
        assert_eq!(c.irqs(), (true, false));
    }

    #[test]
    fn a_disabled_or_full_keyboard_loses_keys() {
        let mut c = I8042::new();
        c.write(DATA_PORT, 0xf5);
        read_all(&mut c);
        assert!(!c.key(&[0x1c]));
        c.write(DATA_PORT, 0xf4);
        read_all(&mut c);
        assert_eq!(
            (0..40).filter(|_| c.key(&[0x1c])).count(),
            17,
            "16 in the keyboard, one in the controller"
        );
    }

    #[test]
    fn aux_loopback_and_mouse_probe_are_quick_for_linux() {
        // drivers/input/serio/i8042.c, i8042_check_aux and the multiplexer probe.
        let mut c = I8042::new();
        c.write(COMMAND_PORT, 0x60);
        c.write(DATA_PORT, CTR_AUX_INT_BIT);
        c.write(COMMAND_PORT, 0xd3);
        c.write(DATA_PORT, 0x5a);
        assert_eq!(c.read(COMMAND_PORT) & (STATUS_OBF_BIT | STATUS_AUX_BIT), STATUS_OBF_BIT | STATUS_AUX_BIT);
        assert_eq!(c.irqs(), (false, true));
        assert_eq!(read_all(&mut c), [0x5a]);
        c.write(COMMAND_PORT, 0xa7);
        c.write(COMMAND_PORT, 0x20);
        assert_ne!(read_all(&mut c)[0] & CTR_AUX_DISABLE_BIT, 0);
        c.write(COMMAND_PORT, 0xa8);
        assert_eq!(aux(&mut c, 0xff), [ACK, SELF_TEST_OK, 0]);
        assert_eq!(aux(&mut c, 0xf2), [ACK, 0]);
        assert_eq!(aux(&mut c, 0xf3), [ACK]);
        assert_eq!(aux(&mut c, 200), [ACK]);
        assert_eq!(aux(&mut c, 0xe9), [ACK, 0, 2, 100]);
    }

    #[test]
    fn pulsing_bit_0_resets_and_the_output_port_drives_a20() {
        let mut c = I8042::new();
        assert!(c.write(COMMAND_PORT, 0xfe).reset);
        assert!(!c.write(COMMAND_PORT, 0xff).reset);
        c.write(COMMAND_PORT, 0xd1);
        assert_eq!(c.write(DATA_PORT, 0xdd), Effect { reset: false, a20: Some(false) });
        c.write(COMMAND_PORT, 0xd1);
        assert!(c.write(DATA_PORT, 0x02).reset);
        assert_eq!(c.write(COMMAND_PORT, 0xdf).a20, Some(true));
    }

    #[test]
    fn a_disabled_keyboard_interface_holds_bytes_back() {
        let mut c = I8042::new();
        c.write(COMMAND_PORT, 0xad);
        c.key(&[0x1c]);
        assert_eq!(c.read(COMMAND_PORT) & STATUS_OBF_BIT, 0);
        c.write(COMMAND_PORT, 0xae);
        assert_eq!(read_all(&mut c), [0x1e]);
    }
}
