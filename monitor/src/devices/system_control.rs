//! Ports by which software resets or switches A20: 92h (system control port A) and CF9h (reset control).
//!
//! Source: IBM PS/2 Hardware Interface Technical Reference, "System Control Port A"; Intel 82371SB (PIIX3), 4.3.2,
//! "RC - Reset Control Register".

/// System control port A.
pub const PORT_A: u16 = 0x92;
/// Reset control register.
pub const RESET_CONTROL: u16 = 0xcf9;

const PORT_A_FAST_RESET_BIT: u8 = 0x01;
const PORT_A_A20_BIT: u8 = 0x02;
const RC_SYSTEM_RESET_BIT: u8 = 0x02;
const RC_RESET_CPU_BIT: u8 = 0x04;

/// Port 92h. A20 itself is kept by the machine, since the 8042 drives it too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortA {
    latch: u8,
}

impl PortA {
    /// Reads the port; `a20` is the state of the gate.
    #[must_use]
    pub fn read(&self, a20: bool) -> u8 {
        self.latch & !PORT_A_A20_BIT | if a20 { PORT_A_A20_BIT } else { 0 }
    }

    /// Writes the port; the new A20, and whether bit 0 rose: a reset.
    pub fn write(&mut self, value: u8) -> (bool, bool) {
        let reset = value & !self.latch & PORT_A_FAST_RESET_BIT != 0;
        self.latch = value;
        (value & PORT_A_A20_BIT != 0, reset)
    }
}

/// Port CF9h.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ResetControl {
    latch: u8,
}

impl ResetControl {
    /// Reads the register; RCPU reads as 0.
    #[must_use]
    pub fn read(&self) -> u8 {
        self.latch & !RC_RESET_CPU_BIT
    }

    /// Writes the register; true for a reset, hard or soft: RCPU went from 0 to 1.
    pub fn write(&mut self, value: u8) -> bool {
        let reset = value & !self.latch & RC_RESET_CPU_BIT != 0;
        self.latch = value & (RC_RESET_CPU_BIT | RC_SYSTEM_RESET_BIT);
        reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_92_resets_on_a_rising_bit_0_and_drives_a20() {
        let mut p = PortA::default();
        assert_eq!(p.write(0x02), (true, false));
        assert_eq!(p.write(0x03), (true, true));
        assert_eq!(p.write(0x01), (false, false), "bit 0 did not rise");
        assert_eq!(p.read(true), 0x03);
        assert_eq!(p.read(false), 0x01);
    }

    #[test]
    fn cf9_resets_when_rcpu_rises() {
        let mut r = ResetControl::default();
        assert!(!r.write(0x02), "as Linux does: first the kind of reset");
        assert_eq!(r.read(), 0x02);
        assert!(r.write(0x06), "then the reset");
        assert!(ResetControl::default().write(0x04));
    }
}
