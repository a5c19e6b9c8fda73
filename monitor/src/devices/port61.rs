//! System control port B (61h): counter 2's gate, the speaker, the refresh toggle.
//!
//! Source: IBM PS/2 Hardware Interface Technical Reference, "System Control Port B"; Intel 82371SB (PIIX3), 4.3.

use super::i8254::Pit;

/// The port.
pub const PORT_B: u16 = 0x61;

const WRITABLE: u8 = 0x0f;
const GATE2_BIT: u8 = 0x01;
const REFRESH_TOGGLE_BIT: u8 = 0x10;
const OUT2_BIT: u8 = 0x20;
/// Counter 1 requests a refresh every 18 CLKs of the 8254: 15.085 us.
const REFRESH_PERIOD_NS: u64 = 15_085;

/// The latch behind port 61h.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortB {
    latch: u8,
}

impl PortB {
    /// Reads the port. Bits 7 and 6 (parity and channel check) never report an error.
    pub fn read(&self, pit: &mut Pit, now: u64) -> u8 {
        let refresh = if now / REFRESH_PERIOD_NS % 2 == 1 { REFRESH_TOGGLE_BIT } else { 0 };
        let out2 = if pit.out(2, now) { OUT2_BIT } else { 0 };
        self.latch | refresh | out2
    }

    /// Writes the port: bit 0 is counter 2's gate, bit 1 the speaker's.
    pub fn write(&mut self, value: u8, pit: &mut Pit, now: u64) {
        self.latch = value & WRITABLE;
        pit.set_gate2(value & GATE2_BIT != 0, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_0_gates_counter_2_and_bit_5_shows_its_output() {
        let (mut b, mut pit) = (PortB::default(), Pit::new());
        b.write(0xff, &mut pit, 0);
        pit.write(0x43, 0xb0, 0);
        pit.write(0x42, 100, 0);
        pit.write(0x42, 0, 0);
        assert_eq!(b.read(&mut pit, 10) & !REFRESH_TOGGLE_BIT, 0x0f);
        assert_eq!(b.read(&mut pit, 1_000_000) & !REFRESH_TOGGLE_BIT, 0x2f);
        b.write(0, &mut pit, 1_000_000);
        assert!(!pit.gate2());
    }

    #[test]
    fn the_refresh_bit_toggles_every_15_us() {
        let (b, mut pit) = (PortB::default(), Pit::new());
        let mut toggles = 0;
        let mut last = b.read(&mut pit, 0) & REFRESH_TOGGLE_BIT;
        for now in (0..1_000_000).step_by(1000) {
            let bit = b.read(&mut pit, now) & REFRESH_TOGGLE_BIT;
            toggles += u32::from(bit != last);
            last = bit;
        }
        assert_eq!(toggles, 66);
    }
}
