//! Two cascaded Intel 8259A interrupt controllers, as a PC/AT wires them.
//!
//! Source: Intel 8259A datasheet (order 231468) for ICW1-4, OCW1-3, rotation, special mask, poll and the default IR7;
//! Intel 82371SB (PIIX3) datasheet, 4.5, for the edge/level control registers at 4d0h and 4d1h, which replace ICW1.LTIM.
//!
//! An edge request is dropped when its line falls before the acknowledge, as the datasheet has it; a processor that had
//! already seen INTR then gets the default IR7. What is not emulated: the MCS-80/85 mode (ICW4.uPM = 0), buffered mode.

use host_driver_shim::world::PortRow;

/// Port of the master's command register; data is at +1.
pub const MASTER_COMMAND: u16 = 0x20;
/// Port of the slave's command register; data is at +1.
pub const SLAVE_COMMAND: u16 = 0xa0;
/// Edge/level control, IRQ 0-7.
pub const ELCR1: u16 = 0x4d0;
/// Edge/level control, IRQ 8-15.
pub const ELCR2: u16 = 0x4d1;

const ICW1_SELECT_BIT: u8 = 0x10;
const ICW1_SNGL_BIT: u8 = 0x02;
const ICW1_IC4_BIT: u8 = 0x01;
const ICW4_SFNM_BIT: u8 = 0x10;
const ICW4_AEOI_BIT: u8 = 0x02;
const OCW3_SELECT_BIT: u8 = 0x08;
const OCW3_ESMM_BIT: u8 = 0x40;
const OCW3_SMM_BIT: u8 = 0x20;
const OCW3_POLL_BIT: u8 = 0x04;
const OCW3_RR_BIT: u8 = 0x02;
const OCW3_RIS_BIT: u8 = 0x01;
const CASCADE_LINE: u8 = 2;
/// The vector offset given when nothing requests any more ("default IR7").
const DEFAULT_IR: u8 = 7;
/// IRQ 0, 1, 2 and 8, 13 can be edge triggered only (PIIX3).
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum InitStep {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct I8259 {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Level of each input, for edge detection and level requests.
    lines: u8,
    elcr: u8,
    vector_base: u8,
    lowest_priority: u8,
    init: InitStep,
    single: bool,
    wants_icw4: bool,
    icw3: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    poll: bool,
    read_isr: bool,
}

impl I8259 {
    fn new() -> I8259 {
        I8259 { lowest_priority: 7, ..I8259::default() }
    }

    /// Interrupt request register.
    #[must_use]
    pub fn irr(&self) -> u8 {
        self.irr
    }
    /// In-service register.
    #[must_use]
    pub fn isr(&self) -> u8 {
        self.isr
    }
    /// Interrupt mask register.
    #[must_use]
    pub fn imr(&self) -> u8 {
        self.imr
    }
    /// First vector (ICW2).
    #[must_use]
    pub fn vector_base(&self) -> u8 {
        self.vector_base
    }

    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1u8 << (line & 7);
        if !level {
            self.lines &= !bit;
            self.irr &= !bit;
            return;
        }
        if self.elcr & bit != 0 || self.lines & bit == 0 {
            self.irr |= bit;
        }
        self.lines |= bit;
    }

    /// 0 is the highest priority of the moment.
    fn rank(&self, line: u8) -> u8 {
        line.wrapping_sub(self.lowest_priority).wrapping_sub(1) & 7
    }

    fn highest(&self, set: u8) -> Option<u8> {
        (0..8).filter(|line| set & (1 << line) != 0).min_by_key(|line| self.rank(*line))
    }

    /// The request INT stands for, if INT is active.
    fn request(&self) -> Option<u8> {
        let line = self.highest(self.irr & !self.imr)?;
        let bit = 1u8 << line;
        if self.special_mask {
            // Special mask mode: only a level's own service bit inhibits it.
            return self.highest(self.irr & !self.imr & !self.isr);
        }
        // Special fully nested mode: further requests of the slave in service are let through.
        let same_level_allowed = self.special_fully_nested && self.icw3 & bit != 0;
        match self.highest(self.isr) {
            Some(serving) if self.rank(serving) < self.rank(line) => None,
            Some(serving) if serving == line && !same_level_allowed => None,
            _ => Some(line),
        }
    }

    fn begin_service(&mut self, line: u8) {
        let bit = 1u8 << line;
        // An edge is consumed; a level request lasts as long as the level.
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest_priority = line;
            }
        } else {
            self.isr |= bit;
        }
    }

    fn acknowledge(&mut self) -> Option<u8> {
        let line = self.request()?;
        self.begin_service(line);
        Some(line)
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1_SELECT_BIT != 0 {
            self.write_icw1(value);
        } else if value & OCW3_SELECT_BIT != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_icw1(&mut self, value: u8) {
        // Datasheet, "Initialization Command Word 1": edge sense reset, IMR cleared, IR7 lowest, special mask off,
        // status read set to IRR; without ICW4 its functions are zero. A line held high by level stays a request.
        self.irr = self.lines & self.elcr;
        self.lines &= self.elcr;
        self.isr = 0;
        self.imr = 0;
        self.lowest_priority = 7;
        self.special_mask = false;
        self.poll = false;
        self.read_isr = false;
        self.auto_eoi = false;
        self.rotate_on_auto_eoi = false;
        self.special_fully_nested = false;
        self.single = value & ICW1_SNGL_BIT != 0;
        self.wants_icw4 = value & ICW1_IC4_BIT != 0;
        self.init = InitStep::Icw2;
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0b001 => drop(self.end_of_interrupt()),
            0b011 => self.isr &= !(1 << level),
            0b101 => {
                if let Some(line) = self.end_of_interrupt() {
                    self.lowest_priority = line;
                }
            }
            0b100 => self.rotate_on_auto_eoi = true,
            0b000 => self.rotate_on_auto_eoi = false,
            0b111 => {
                self.isr &= !(1 << level);
                self.lowest_priority = level;
            }
            0b110 => self.lowest_priority = level,
            _ => {} // 010: no operation
        }
    }

    /// Non-specific EOI: the highest level in service, leaving those that special mask mode hides.
    fn end_of_interrupt(&mut self) -> Option<u8> {
        let candidates = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let line = self.highest(candidates)?;
        self.isr &= !(1 << line);
        Some(line)
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & OCW3_ESMM_BIT != 0 {
            self.special_mask = value & OCW3_SMM_BIT != 0;
        }
        if value & OCW3_POLL_BIT != 0 {
            self.poll = true;
        } else if value & OCW3_RR_BIT != 0 {
            self.read_isr = value & OCW3_RIS_BIT != 0;
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            InitStep::Done => self.imr = value,
            InitStep::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init = match (self.single, self.wants_icw4) {
                    (false, _) => InitStep::Icw3,
                    (true, true) => InitStep::Icw4,
                    (true, false) => InitStep::Done,
                };
            }
            InitStep::Icw3 => {
                self.icw3 = value;
                self.init = if self.wants_icw4 { InitStep::Icw4 } else { InitStep::Done };
            }
            InitStep::Icw4 => {
                self.special_fully_nested = value & ICW4_SFNM_BIT != 0;
                self.auto_eoi = value & ICW4_AEOI_BIT != 0;
                self.init = InitStep::Done;
            }
        }
    }

    fn read(&mut self, data_port: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            // The read is the acknowledge of a poll command.
            return match self.acknowledge() {
                Some(line) => 0x80 | line,
                None => 0,
            };
        }
        match (data_port, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }
}

/// The pair: master on IRQ 0-7, slave on IRQ 8-15 cascaded through IRQ 2.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PicPair {
    /// IRQ 0-7.
    pub master: I8259,
    /// IRQ 8-15.
    pub slave: I8259,
    /// Acknowledges that found nothing to acknowledge.
    pub spurious: u64,
}

impl Default for PicPair {
    fn default() -> Self {
        PicPair::new()
    }
}

impl PicPair {
    /// Both chips as after power-on: uninitialised, nothing requested.
    #[must_use]
    pub fn new() -> PicPair {
        PicPair { master: I8259::new(), slave: I8259::new(), spurious: 0 }
    }

    /// Drives input `irq` (0-15; 2 is the cascade and ignored) to `level`.
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE_LINE => {}
            0..=7 => self.master.set_line(irq, level),
            8..=15 => self.slave.set_line(irq - 8, level),
            _ => {}
        }
        self.update_cascade();
    }

    fn update_cascade(&mut self) {
        let int = self.slave.request().is_some();
        self.master.set_line(CASCADE_LINE, int);
    }

    /// Whether INTR is active.
    #[must_use]
    pub fn has_interrupt(&self) -> bool {
        self.master.request().is_some()
    }

    /// The INTA cycle: the vector, after setting the service bits. With no request left it is the default IR7 of the
    /// chip that was asked, and no service bit is set there.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(line) = self.master.acknowledge() else {
            self.spurious += 1;
            return self.master.vector_base | DEFAULT_IR;
        };
        if line != CASCADE_LINE {
            return self.master.vector_base | line;
        }
        let slave_line = self.slave.acknowledge();
        // INT of the slave drops during INTA: what is still pending there is a new edge for the master.
        self.master.set_line(CASCADE_LINE, false);
        self.update_cascade();
        self.spurious += u64::from(slave_line.is_none());
        self.slave.vector_base | slave_line.unwrap_or(DEFAULT_IR)
    }

    /// Whether `port` belongs to the pair.
    #[must_use]
    pub fn owns(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | ELCR1 | ELCR2)
    }

    /// The ports whose accesses nobody has to see at once: the mask registers, and the command ports for EOIs without
    /// rotation (OCW2 001 and 011). With nothing requested no write to them can make INTR active, and whatever
    /// requests something later comes through [`set_irq`](PicPair::set_irq).
    #[must_use]
    pub fn quiet_ports(&self) -> [PortRow; 4] {
        let chips = [(MASTER_COMMAND, &self.master), (SLAVE_COMMAND, &self.slave)];
        if chips.iter().any(|(_, chip)| chip.irr != 0 || chip.init != InitStep::Done || chip.poll) {
            return Default::default();
        }
        let command = |(port, _): (u16, &I8259)| PortRow {
            port: u32::from(port),
            posts: 1,
            mask: 0xb8,
            pattern: 0x20,
            ..PortRow::default()
        };
        let data = |(port, chip): (u16, &I8259)| PortRow {
            port: u32::from(port) + 1,
            readable: 1,
            value: u32::from(chip.imr),
            posts: 1,
            ..PortRow::default()
        };
        [command(chips[0]), data(chips[0]), command(chips[1]), data(chips[1])]
    }

    /// Byte read from one of the pair's ports.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.master.read(port & 1 != 0),
            0xa0 | 0xa1 => self.slave.read(port & 1 != 0),
            ELCR1 => self.master.elcr,
            ELCR2 => self.slave.elcr,
            _ => 0xff,
        };
        self.update_cascade();
        value
    }

    /// Byte write to one of the pair's ports.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            ELCR1 => self.master.elcr = value & ELCR_WRITABLE[0],
            ELCR2 => self.slave.elcr = value & ELCR_WRITABLE[1],
            _ => {}
        }
        self.update_cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux' init_8259A does: vectors 30h and 38h, everything unmasked here.
    fn initialised(icw4: u8) -> PicPair {
        let mut p = PicPair::new();
        for (port, v) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, icw4)] {
            p.write(port, v);
        }
        for (port, v) in [(0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, icw4)] {
            p.write(port, v);
        }
        p
    }

    fn isr(p: &mut PicPair, port: u16) -> u8 {
        p.write(port, 0x0b);
        p.read(port)
    }

    #[test]
    fn an_edge_is_one_interrupt_with_the_programmed_vector() {
        let mut p = initialised(1);
        assert!(!p.has_interrupt());
        p.set_irq(4, true);
        assert!(p.has_interrupt());
        assert_eq!(p.acknowledge(), 0x34);
        assert_eq!(isr(&mut p, 0x20), 0x10);
        p.write(0x20, 0x20);
        assert!(!p.has_interrupt(), "the line is still high, but there was no new edge");
        p.set_irq(4, false);
        p.set_irq(4, true);
        assert!(p.has_interrupt());
    }

    #[test]
    fn the_mask_register_reads_back_and_inhibits() {
        let mut p = initialised(1);
        p.write(0x21, 0xfb);
        assert_eq!(p.read(0x21), 0xfb);
        p.set_irq(0, true);
        assert!(!p.has_interrupt());
        p.write(0x21, 0xfa);
        assert!(p.has_interrupt(), "a masked request is remembered");
    }

    #[test]
    fn ports_are_quiet_while_nothing_is_requested() {
        let none: [PortRow; 4] = Default::default();
        let mut p = initialised(1);
        p.write(0x21, 0x5a);
        let rows = p.quiet_ports();
        assert_eq!(rows.map(|r| r.port), [0x20, 0x21, 0xa0, 0xa1]);
        assert_eq!((rows[1].readable, rows[1].value), (1, 0x5a));
        // EOIs only; rotation, OCW3 and ICW1 are not.
        let posts = |v: u32| v & rows[0].mask == rows[0].pattern;
        let fine: Vec<u32> = (0..256).filter(|&v| posts(v)).collect();
        assert_eq!(fine, (0x20..0x28).chain(0x60..0x68).collect::<Vec<_>>());
        p.set_irq(3, true);
        assert_eq!(p.quiet_ports(), none, "masked, but an unmasking would let it through");
        p.write(0x21, 0);
        p.acknowledge();
        assert_eq!(p.quiet_ports()[1].value, 0, "in service: an EOI makes nothing active");
        p.set_irq(12, true);
        assert_eq!(p.quiet_ports(), none);
        let mut p = initialised(1);
        p.write(0xa0, 0x11);
        assert_eq!(p.quiet_ports(), none, "in the middle of an initialisation");
    }

    #[test]
    fn a_lower_priority_waits_for_the_eoi_and_a_higher_one_does_not() {
        let mut p = initialised(1);
        p.set_irq(3, true);
        assert_eq!(p.acknowledge(), 0x33);
        p.set_irq(5, true);
        assert!(!p.has_interrupt());
        p.set_irq(1, true);
        assert_eq!(p.acknowledge(), 0x31);
        p.write(0x20, 0x20);
        p.write(0x20, 0x20);
        assert_eq!(p.acknowledge(), 0x35);
    }

    #[test]
    fn a_slave_interrupt_needs_an_eoi_on_both_chips() {
        let mut p = initialised(1);
        p.set_irq(12, true);
        p.set_irq(8, true);
        assert_eq!(p.acknowledge(), 0x38);
        assert_eq!(isr(&mut p, 0x20), 4);
        assert_eq!(isr(&mut p, 0xa0), 1);
        assert!(!p.has_interrupt());
        p.write(0xa0, 0x60);
        assert!(!p.has_interrupt(), "the master still serves IR2");
        p.write(0x20, 0x62);
        assert_eq!(p.acknowledge(), 0x3c);
    }

    #[test]
    fn special_fully_nested_mode_lets_a_higher_slave_request_through() {
        let mut p = initialised(1 | ICW4_SFNM_BIT);
        p.set_irq(12, true);
        assert_eq!(p.acknowledge(), 0x3c);
        p.set_irq(9, true);
        assert_eq!(p.acknowledge(), 0x39);
    }

    #[test]
    fn a_request_withdrawn_before_the_acknowledge_is_the_default_ir7() {
        let mut p = initialised(1);
        p.set_irq(4, true);
        p.set_irq(4, false);
        assert!(!p.has_interrupt());
        assert_eq!(p.acknowledge(), 0x37);
        assert_eq!(isr(&mut p, 0x20), 0, "a default IR7 sets no service bit");
        assert_eq!(p.spurious, 1);
    }

    #[test]
    fn a_slave_masked_between_the_two_inta_cycles_gives_irq15_without_service_bit() {
        let mut p = initialised(1);
        p.set_irq(9, true);
        // The master has latched IR2; the slave's request vanishes without the master being told.
        p.slave.imr = 0xff;
        assert_eq!(p.acknowledge(), 0x3f);
        assert_eq!(isr(&mut p, 0xa0), 0);
        assert_eq!(isr(&mut p, 0x20), 4);
    }

    #[test]
    fn a_level_line_requests_again_after_the_eoi_until_it_falls() {
        let mut p = initialised(1);
        p.write(ELCR2, 0xff);
        assert_eq!(p.read(ELCR2), 0xde, "IRQ 8 and 13 stay edge triggered");
        p.write(ELCR2, 0x02);
        p.set_irq(9, true);
        assert_eq!(p.acknowledge(), 0x39);
        p.write(0xa0, 0x20);
        p.write(0x20, 0x20);
        assert_eq!(p.acknowledge(), 0x39);
        p.set_irq(9, false);
        p.write(0xa0, 0x20);
        p.write(0x20, 0x20);
        assert!(!p.has_interrupt());
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service_on_either_chip() {
        let mut p = initialised(1 | ICW4_AEOI_BIT);
        p.set_irq(8, true);
        p.set_irq(9, true);
        assert_eq!(p.acknowledge(), 0x38);
        assert_eq!(p.acknowledge(), 0x39);
        assert_eq!((isr(&mut p, 0x20), isr(&mut p, 0xa0)), (0, 0));
        assert!(!p.has_interrupt());
    }

    #[test]
    fn rotation_on_eoi_makes_the_served_level_the_lowest() {
        let mut p = initialised(1);
        p.set_irq(0, true);
        assert_eq!(p.acknowledge(), 0x30);
        p.write(0x20, 0xa0);
        p.set_irq(0, false);
        p.set_irq(0, true);
        p.set_irq(1, true);
        assert_eq!(p.acknowledge(), 0x31);
        p.write(0x20, 0x20);
        p.write(0x20, 0xc3); // IR3 lowest, so IR4 highest
        p.set_irq(4, true);
        assert_eq!(p.acknowledge(), 0x34);
    }

    #[test]
    fn special_mask_mode_lets_lower_levels_in_while_one_is_served() {
        let mut p = initialised(1);
        p.set_irq(1, true);
        assert_eq!(p.acknowledge(), 0x31);
        p.set_irq(6, true);
        assert!(!p.has_interrupt());
        p.write(0x21, 0x02);
        p.write(0x20, 0x68);
        assert_eq!(p.acknowledge(), 0x36);
    }

    #[test]
    fn a_poll_read_acknowledges() {
        let mut p = initialised(1);
        p.write(0x20, 0x0c);
        assert_eq!(p.read(0x20), 0);
        p.set_irq(5, true);
        p.write(0x20, 0x0c);
        assert_eq!(p.read(0x20), 0x85);
        assert!(!p.has_interrupt());
        assert_eq!(isr(&mut p, 0x20), 0x20);
    }

    #[test]
    fn irr_and_isr_are_read_as_ocw3_selects() {
        let mut p = initialised(1);
        p.set_irq(7, true);
        p.write(0x20, 0x0a);
        assert_eq!(p.read(0x20), 0x80);
        assert_eq!(isr(&mut p, 0x20), 0);
    }
}
