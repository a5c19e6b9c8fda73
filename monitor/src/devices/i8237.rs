//! Two Intel 8237A DMA controllers and their page registers, as registers only: nothing here does DMA.
//!
//! Source: Intel 8237A datasheet (order 231466); IBM PC/AT Technical Reference for the ports: 00h-0Fh, C0h-DFh (even
//! ones, A0 is not decoded), pages 80h-8Fh.

/// One 8237A: four channels of address and count behind a byte flip-flop.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct I8237 {
    /// Address and count of channels 0-3, in port order.
    words: [u16; 8],
    high_byte: bool,
    mask: u8,
}

impl I8237 {
    fn read(&mut self, register: u8) -> u8 {
        match register & 0xf {
            r @ 0..=7 => {
                let [low, high] = self.words[usize::from(r)].to_le_bytes();
                self.high_byte = !self.high_byte;
                if self.high_byte { low } else { high }
            }
            8 => 0, // status: no request, no terminal count
            0xf => self.mask | 0xf0,
            _ => 0,
        }
    }

    fn write(&mut self, register: u8, value: u8) {
        match register & 0xf {
            r @ 0..=7 => {
                let word = &mut self.words[usize::from(r)];
                *word = if self.high_byte {
                    *word & 0x00ff | u16::from(value) << 8
                } else {
                    *word & 0xff00 | u16::from(value)
                };
                self.high_byte = !self.high_byte;
            }
            0xa => {
                let bit = 1 << (value & 3);
                self.mask = if value & 4 != 0 { self.mask | bit } else { self.mask & !bit };
            }
            0xc => self.high_byte = false,
            0xd => {
                self.high_byte = false;
                self.mask = 0xf;
            }
            0xe => self.mask = 0,
            0xf => self.mask = value & 0xf,
            _ => {} // command, request and mode registers are write-only
        }
    }
}

/// Both controllers and the page registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dma {
    controllers: [I8237; 2],
    pages: [u8; 16],
}

impl Dma {
    /// Whether `port` belongs to the DMA subsystem (80h is the POST port, though it latches here on a real PC).
    #[must_use]
    pub fn owns(port: u16) -> bool {
        matches!(port, 0x00..=0x0f | 0x81..=0x8f | 0xc0..=0xdf)
    }

    /// Byte read.
    pub fn read(&mut self, port: u16) -> u8 {
        match port {
            0x00..=0x0f => self.controllers[0].read(port as u8),
            0xc0..=0xdf => self.controllers[1].read((port >> 1) as u8),
            _ => self.pages[usize::from(port & 0xf)],
        }
    }

    /// Byte write.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x00..=0x0f => self.controllers[0].write(port as u8, value),
            0xc0..=0xdf => self.controllers[1].write((port >> 1) as u8, value),
            _ => self.pages[usize::from(port & 0xf)] = value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_registers_are_two_bytes_behind_the_flip_flop() {
        let mut d = Dma::default();
        for base in [0x00, 0xc0] {
            let clear = if base == 0 { 0x0c } else { 0xd8 };
            d.write(clear, 0);
            d.write(base, 0x34);
            d.write(base, 0x12);
            d.write(clear, 0);
            assert_eq!((d.read(base), d.read(base)), (0x34, 0x12));
        }
    }

    #[test]
    fn master_clear_masks_every_channel() {
        let mut d = Dma::default();
        d.write(0x0d, 0);
        assert_eq!(d.read(0x0f) & 0xf, 0xf);
        d.write(0x0a, 2);
        assert_eq!(d.read(0x0f) & 0xf, 0xb);
    }

    #[test]
    fn page_registers_hold_what_is_written() {
        let mut d = Dma::default();
        d.write(0x8f, 0x77);
        assert_eq!(d.read(0x8f), 0x77);
    }
}
