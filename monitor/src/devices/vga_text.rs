//! VGA in text mode: the registers a text console touches, and a dump of the screen.
//!
//! Source: IBM PS/2 Hardware Interface Technical Reference, "Video Subsystem" (CRT controller, sequencer, attribute and
//! graphics controllers, input status 1). The text buffer at B8000h is plain RAM of the machine.
//! Not emulated: graphics modes, planes, fonts; the registers are latches without effect but the cursor's.

/// Guest physical address of the text buffer.
pub const TEXT_BASE: u32 = 0xb8000;
/// Bytes of the text buffer.
pub const TEXT_SIZE: u32 = 0x8000;
/// Columns on the screen.
pub const COLUMNS: usize = 80;
/// Rows on the screen.
pub const ROWS: usize = 25;

const CRTC_START_HIGH: usize = 0x0c;
const CRTC_START_LOW: usize = 0x0d;
const CRTC_CURSOR_HIGH: usize = 0x0e;
const CRTC_CURSOR_LOW: usize = 0x0f;
const MISC_COLOR_BIT: u8 = 0x01;
const STATUS1_RETRACE_BIT: u8 = 0x08;
const STATUS1_DISPLAY_DISABLED_BIT: u8 = 0x01;
/// 70 Hz frame of 449 lines, 400 of them shown; retrace is two lines.
const LINE_NS: u64 = 31_778;
const LINES: u64 = 449;
const SHOWN_LINES: u64 = 400;
const RETRACE_LINES: std::ops::Range<u64> = 412..414;

/// Code page 437, 00h-1Fh.
const CP437_LOW: &str = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼";
/// Code page 437, 7Fh-FFh.
const CP437_HIGH: &str = "⌂ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■ ";

/// The character of code page 437 at `byte`; 0 and FFh are blanks.
#[must_use]
pub fn cp437(byte: u8) -> char {
    let found = match byte {
        0x00..=0x1f => CP437_LOW.chars().nth(usize::from(byte)),
        0x20..=0x7e => Some(char::from(byte)),
        _ => CP437_HIGH.chars().nth(usize::from(byte - 0x7f)),
    };
    found.unwrap_or(' ')
}

/// The first 80x25 cells of `buffer` (character and attribute bytes alternating) as 25 lines, trailing blanks removed.
/// A short buffer gives blank cells.
#[must_use]
pub fn dump(buffer: &[u8]) -> String {
    let mut text = String::new();
    for row in 0..ROWS {
        let line: String = (0..COLUMNS)
            .map(|col| buffer.get((row * COLUMNS + col) * 2).map_or(' ', |b| cp437(*b)))
            .collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// An index register and what it points at.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Indexed<const N: usize> {
    index: u8,
    data: [u8; N],
}

impl<const N: usize> Indexed<N> {
    const fn new(data: [u8; N]) -> Self {
        Indexed { index: 0, data }
    }
    fn read(&self) -> u8 {
        self.data.get(usize::from(self.index)).copied().unwrap_or(0xff)
    }
    fn write(&mut self, value: u8) {
        if let Some(register) = self.data.get_mut(usize::from(self.index)) {
            *register = value;
        }
    }
}

/// CRT controller of mode 3 (80x25, 9x16 cells), as firmware sets it.
const CRTC_MODE3: [u8; 25] = [
    0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f,
    0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
];
const SEQUENCER_MODE3: [u8; 5] = [0x03, 0x00, 0x03, 0x00, 0x02];
const GRAPHICS_MODE3: [u8; 9] = [0, 0, 0, 0, 0, 0x10, 0x0e, 0, 0xff];
const ATTRIBUTE_MODE3: [u8; 21] =
    [0, 1, 2, 3, 4, 5, 0x14, 7, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, 0x0c, 0, 0x0f, 0x08, 0];

/// The registers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vga {
    crtc: Indexed<25>,
    sequencer: Indexed<5>,
    graphics: Indexed<9>,
    attribute: Indexed<21>,
    /// The next write to 3C0h is data.
    attribute_data_next: bool,
    misc: u8,
    feature: u8,
    dac: Vec<u8>,
    dac_mask: u8,
    dac_read: usize,
    dac_write: usize,
    dac_reading: bool,
}

impl Default for Vga {
    fn default() -> Self {
        Vga::new()
    }
}

impl Vga {
    /// Colour text mode 3, cursor at the top left.
    #[must_use]
    pub fn new() -> Vga {
        Vga {
            crtc: Indexed::new(CRTC_MODE3),
            sequencer: Indexed::new(SEQUENCER_MODE3),
            graphics: Indexed::new(GRAPHICS_MODE3),
            attribute: Indexed { index: 0x20, data: ATTRIBUTE_MODE3 },
            attribute_data_next: false,
            misc: 0x67,
            feature: 0,
            dac: vec![0; 256 * 3],
            dac_mask: 0xff,
            dac_read: 0,
            dac_write: 0,
            dac_reading: false,
        }
    }

    fn crtc_word(&self, high: usize, low: usize) -> u16 {
        u16::from_be_bytes([self.crtc.data[high], self.crtc.data[low]])
    }

    /// First cell shown, in cells from the start of the text buffer (Linux scrolls by it).
    #[must_use]
    pub fn start_cell(&self) -> u16 {
        self.crtc_word(CRTC_START_HIGH, CRTC_START_LOW)
    }

    /// Cursor, column and row on the screen; None when it is off it.
    #[must_use]
    pub fn cursor(&self) -> Option<(u8, u8)> {
        let cell = usize::from(self.crtc_word(CRTC_CURSOR_HIGH, CRTC_CURSOR_LOW))
            .checked_sub(usize::from(self.start_cell()))?;
        let (row, col) = (cell / COLUMNS, cell % COLUMNS);
        (row < ROWS).then_some((col as u8, row as u8))
    }

    /// The screen as shown: `buffer` is the whole text buffer.
    #[must_use]
    pub fn screen(&self, buffer: &[u8]) -> String {
        dump(buffer.get(usize::from(self.start_cell()) * 2..).unwrap_or(&[]))
    }

    /// Whether `port` belongs to the VGA.
    #[must_use]
    pub fn owns(port: u16) -> bool {
        matches!(port, 0x3b0..=0x3bb | 0x3c0..=0x3df)
    }

    /// Maps 3Dxh in colour and 3Bxh in mono emulation to 3Dxh; the other block is not decoded.
    fn decode(&self, port: u16) -> Option<u16> {
        match port {
            0x3b0..=0x3bf => (self.misc & MISC_COLOR_BIT == 0).then_some(port + 0x20),
            0x3d0..=0x3df => (self.misc & MISC_COLOR_BIT != 0).then_some(port),
            _ => Some(port),
        }
    }

    /// Byte read.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        match self.decode(port) {
            Some(0x3c0) => self.attribute.index,
            Some(0x3c1) => Indexed { index: self.attribute.index & 0x1f, ..self.attribute.clone() }.read(),
            Some(0x3c2) => 0x10, // input status 0: a monitor is sensed
            Some(0x3c4) => self.sequencer.index,
            Some(0x3c5) => self.sequencer.read(),
            Some(0x3c6) => self.dac_mask,
            Some(0x3c7) => {
                if self.dac_reading {
                    3
                } else {
                    0
                }
            }
            Some(0x3c8) => (self.dac_write / 3) as u8,
            Some(0x3c9) => {
                let at = self.dac_read;
                self.dac_read = (at + 1) % self.dac.len();
                self.dac.get(at).copied().unwrap_or(0)
            }
            Some(0x3ca) => self.feature,
            Some(0x3cc) => self.misc,
            Some(0x3ce) => self.graphics.index,
            Some(0x3cf) => self.graphics.read(),
            Some(0x3d4) => self.crtc.index,
            Some(0x3d5) => self.crtc.read(),
            Some(0x3da) => {
                self.attribute_data_next = false;
                input_status_1(now)
            }
            _ => 0xff,
        }
    }

    /// Byte write.
    pub fn write(&mut self, port: u16, value: u8) {
        match self.decode(port) {
            Some(0x3c0) => {
                if self.attribute_data_next {
                    let at = usize::from(self.attribute.index & 0x1f);
                    if let Some(register) = self.attribute.data.get_mut(at) {
                        *register = value;
                    }
                } else {
                    self.attribute.index = value & 0x3f;
                }
                self.attribute_data_next = !self.attribute_data_next;
            }
            Some(0x3c2) => self.misc = value,
            Some(0x3c4) => self.sequencer.index = value,
            Some(0x3c5) => self.sequencer.write(value),
            Some(0x3c6) => self.dac_mask = value,
            Some(0x3c7) => {
                self.dac_read = usize::from(value) * 3;
                self.dac_reading = true;
            }
            Some(0x3c8) => {
                self.dac_write = usize::from(value) * 3;
                self.dac_reading = false;
            }
            Some(0x3c9) => {
                let at = self.dac_write;
                if let Some(component) = self.dac.get_mut(at) {
                    *component = value & 0x3f;
                }
                self.dac_write = (at + 1) % self.dac.len();
            }
            Some(0x3ce) => self.graphics.index = value,
            Some(0x3cf) => self.graphics.write(value),
            Some(0x3d4) => self.crtc.index = value,
            // CR11 bit 7 protects CR0-CR7.
            Some(0x3d5) if self.crtc.index < 8 && self.crtc.data[0x11] & 0x80 != 0 => {}
            Some(0x3d5) => self.crtc.write(value),
            Some(0x3da) => self.feature = value,
            _ => {}
        }
    }
}

/// Input status 1: where the beam is at `now`.
fn input_status_1(now: u64) -> u8 {
    let line = now / LINE_NS % LINES;
    let blanked = line >= SHOWN_LINES || now % LINE_NS > LINE_NS * 4 / 5;
    (if RETRACE_LINES.contains(&line) { STATUS1_RETRACE_BIT } else { 0 })
        | (if blanked { STATUS1_DISPLAY_DISABLED_BIT } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_code_page_437_has_its_character() {
        assert_eq!(CP437_LOW.chars().count(), 0x20);
        assert_eq!(CP437_HIGH.chars().count(), 0x81);
        for (byte, c) in [
            (0x01, '☺'),
            (b'A', 'A'),
            (0x7f, '⌂'),
            (0x80, 'Ç'),
            (0xb3, '│'),
            (0xdb, '█'),
            (0xe1, 'ß'),
            (0xfe, '■'),
        ] {
            assert_eq!(cp437(byte), c);
        }
    }

    #[test]
    fn a_dump_is_25_lines_of_text_without_attributes() {
        let mut buffer = vec![0u8; 4000];
        for (i, b) in b"login: ".iter().enumerate() {
            buffer[160 + i * 2] = *b;
            buffer[160 + i * 2 + 1] = 0x07;
        }
        let text = dump(&buffer);
        assert_eq!(text.lines().count(), 25);
        assert_eq!(text.lines().nth(1), Some("login:"));
        assert_eq!(dump(&[]).trim(), "");
    }

    #[test]
    fn the_screen_starts_where_the_crtc_says_and_the_cursor_is_on_it() {
        let mut v = Vga::new();
        let mut buffer = vec![0u8; TEXT_SIZE as usize];
        buffer[160 * 3] = b'X';
        for (i, d) in [(0x0c, 0), (0x0d, 240u8), (0x0e, 1), (0x0f, 0x45)] {
            v.write(0x3d4, i);
            v.write(0x3d5, d);
        }
        assert_eq!(v.screen(&buffer).lines().next(), Some("X"));
        assert_eq!(v.cursor(), Some((5, 1)));
        v.write(0x3d4, 0x0f);
        assert_eq!(v.read(0x3d5, 0), 0x45);
    }

    #[test]
    fn status_1_resets_the_attribute_flip_flop_and_shows_retrace() {
        let mut v = Vga::new();
        v.write(0x3c0, 0x10);
        v.read(0x3da, 0);
        v.write(0x3c0, 0x11);
        v.write(0x3c0, 0x2a);
        assert_eq!(v.read(0x3c1, 0), 0x2a);
        let frame = LINES * LINE_NS;
        let seen: Vec<u8> = (0..frame).step_by(1000).map(|t| v.read(0x3da, t)).collect();
        assert!(seen.iter().any(|s| s & STATUS1_RETRACE_BIT != 0));
        assert!(seen.iter().any(|s| s & STATUS1_RETRACE_BIT == 0));
    }

    #[test]
    fn mono_ports_float_in_colour_mode() {
        let mut v = Vga::new();
        assert_eq!(v.read(0x3b4, 0), 0xff);
        v.write(0x3c2, 0x66);
        v.write(0x3b4, 3);
        assert_eq!(v.read(0x3b4, 0), 3);
        assert_eq!(v.read(0x3d4, 0), 0xff);
    }
}
