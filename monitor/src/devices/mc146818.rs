//! Motorola MC146818A real-time clock and its CMOS memory (ports 70h, 71h; IRQ8).
//!
//! Source: MC146818A datasheet (Motorola, 1984): registers A-D, update cycle, time base; IBM PS/2 Hardware Interface
//! Technical Reference and Ralf Brown's CMOS list for the memory the firmware keeps there (sizes, checksum, century).
//!
//! The time is the host's UTC at power-on plus guest time; nothing is ticked. The divider always runs at 32.768 kHz
//! (DV = 010) or is held in reset (DV = 11x). Not emulated: daylight saving (DSE), the square wave output.

/// Index port; bit 7 is the NMI mask, which is ignored.
pub const INDEX_PORT: u16 = 0x70;
/// Data port.
pub const DATA_PORT: u16 = 0x71;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// Century, by the PC/AT's convention.
const CENTURY: u8 = 0x32;

const A_UIP_BIT: u8 = 0x80;
const B_SET_BIT: u8 = 0x80;
const B_PIE_BIT: u8 = 0x40;
const B_AIE_BIT: u8 = 0x20;
const B_UIE_BIT: u8 = 0x10;
const B_DM_BIT: u8 = 0x04;
const B_24_12_BIT: u8 = 0x02;
const C_IRQF_BIT: u8 = 0x80;
const C_PF_BIT: u8 = 0x40;
const C_AF_BIT: u8 = 0x20;
const C_UF_BIT: u8 = 0x10;
const D_VRT_BIT: u8 = 0x80;
const HOURS_PM_BIT: u8 = 0x80;
/// Alarm bytes C0h-FFh match everything.
const ALARM_DONT_CARE: u8 = 0xc0;

const SEC: i128 = 1_000_000_000;
/// UIP precedes the update by t_BUC = 244 us and lasts through its t_UC = 1984 us.
const UIP_NS: i128 = (244 + 1984) * 1000;
const TIME_BASE_HZ: i128 = 32_768;

/// A broken-down UTC time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Calendar {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    weekday: u8,
    day: u8,
    month: u8,
    year: i64,
}

impl Calendar {
    /// From seconds since 1970. Days to a date as in Hinnant, "chrono-Compatible Low-Level Date Algorithms".
    fn from_unix(seconds: i64) -> Calendar {
        let days = seconds.div_euclid(86_400);
        let of_day = seconds.rem_euclid(86_400);
        let z = days + 719_468;
        let era = z.div_euclid(146_097);
        let doe = z.rem_euclid(146_097);
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        Calendar {
            second: (of_day % 60) as u8,
            minute: (of_day / 60 % 60) as u8,
            hour: (of_day / 3600) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            day: (doy - (153 * mp + 2) / 5 + 1) as u8,
            month: month as u8,
            year: yoe + era * 400 + i64::from(month <= 2),
        }
    }

    /// To seconds since 1970; fields out of range carry over.
    fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let y = if month <= 2 { self.year - 1 } else { self.year };
        let era = y.div_euclid(400);
        let yoe = y.rem_euclid(400);
        let doy = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + i64::from(self.day) - 1;
        let doe = yoe * 365 + yoe / 4 - yoe / 100 + doy;
        let days = era * 146_097 + doe - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

/// The clock and its memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rtc {
    index: u8,
    memory: [u8; 128],
    /// UTC in ns since 1970 at guest time 0.
    base: i128,
    /// The time registers while the update is inhibited (SET, or the divider in reset).
    frozen: Option<Calendar>,
    reg_a: u8,
    reg_b: u8,
    reg_c: u8,
    /// Guest time (ns) up to which register C's flags are current.
    synced: u64,
}

impl Rtc {
    /// A clock showing `utc_ns` (ns since 1970) at guest time 0: BCD, 24 hours, no interrupts enabled.
    #[must_use]
    pub fn new(utc_ns: i64) -> Rtc {
        let mut rtc = Rtc {
            index: 0,
            memory: [0; 128],
            base: i128::from(utc_ns),
            frozen: None,
            reg_a: 0x26,
            reg_b: B_24_12_BIT,
            reg_c: 0,
            synced: 0,
        };
        rtc.memory[0x14] = 0x06; // equipment: coprocessor, mouse; EGA or better; no diskette
        rtc.update_checksum();
        rtc
    }

    /// Writes the firmware's record of the memory size, `bytes` of RAM from address 0 with nothing below 4 GiB remapped.
    pub fn set_memory_size(&mut self, bytes: u64) {
        let mut put = |at: usize, value: u64, width: usize| {
            if let Some(cells) = self.memory.get_mut(at..at + width) {
                cells.copy_from_slice(&value.to_le_bytes()[..width]);
            }
        };
        let above = |floor: u64, top: u64, unit: u64| bytes.min(top).saturating_sub(floor) / unit;
        put(0x15, above(0, 640 << 10, 1 << 10), 2);
        let extended = above(1 << 20, u64::MAX, 1 << 10).min(0xffff);
        put(0x17, extended, 2);
        put(0x30, extended, 2);
        put(0x34, above(16 << 20, 4 << 30, 64 << 10).min(0xffff), 2);
        put(0x5b, above(4 << 30, u64::MAX, 64 << 10).min(0xff_ffff), 3);
        self.update_checksum();
    }

    /// Bytes 2eh (high) and 2fh (low): the sum of 10h-2dh.
    fn update_checksum(&mut self) {
        let sum = self.memory[0x10..=0x2d].iter().fold(0u16, |s, b| s.wrapping_add(u16::from(*b)));
        self.memory[0x2e..=0x2f].copy_from_slice(&sum.to_be_bytes());
    }

    /// Whether IRQ8 is asserted.
    #[must_use]
    pub fn irq(&self) -> bool {
        self.reg_c & C_IRQF_BIT != 0
    }

    fn utc(&self, now: u64) -> i128 {
        self.base + i128::from(now)
    }

    fn divider_in_reset(&self) -> bool {
        self.reg_a & 0x60 == 0x60
    }

    fn calendar(&self, now: u64) -> Calendar {
        self.frozen.unwrap_or_else(|| Calendar::from_unix(self.utc(now).div_euclid(SEC) as i64))
    }

    /// Periodic rate in cycles of the time base, from RS3-RS0 (datasheet, table 5).
    fn periodic_cycles(&self) -> Option<i128> {
        match self.reg_a & 0x0f {
            _ if self.divider_in_reset() => None,
            0 => None,
            rs @ 1..=2 => Some(1 << (rs + 6)),
            rs => Some(1 << (rs - 1)),
        }
    }

    fn periods_at(&self, now: u64, cycles: i128) -> i128 {
        (self.utc(now) * TIME_BASE_HZ).div_euclid(SEC * cycles)
    }

    /// Brings the flags of register C up to `now`.
    fn sync(&mut self, now: u64) {
        let last = self.synced;
        if now <= last {
            return;
        }
        self.synced = now;
        if let Some(cycles) = self.periodic_cycles()
            && self.periods_at(now, cycles) > self.periods_at(last, cycles)
        {
            self.reg_c |= C_PF_BIT;
        }
        if self.frozen.is_none() {
            let first = self.utc(last).div_euclid(SEC) + 1;
            let current = self.utc(now).div_euclid(SEC);
            if first <= current {
                self.reg_c |= C_UF_BIT;
                // A day holds every time of day: more seconds tell nothing new.
                if self.reg_c & C_AF_BIT == 0
                    && (first.max(current - 86_399)..=current).any(|s| self.alarm_matches(s))
                {
                    self.reg_c |= C_AF_BIT;
                }
            }
        }
        self.update_irqf();
    }

    fn alarm_matches(&self, unix_seconds: i128) -> bool {
        let of_day = unix_seconds.rem_euclid(86_400) as u32;
        let matches = |alarm: u8, value: u8| {
            let byte = self.memory[usize::from(alarm)];
            byte >= ALARM_DONT_CARE || byte == value
        };
        matches(SECONDS_ALARM, self.encode((of_day % 60) as u8))
            && matches(MINUTES_ALARM, self.encode((of_day / 60 % 60) as u8))
            && matches(HOURS_ALARM, self.encode_hour((of_day / 3600) as u8))
    }

    /// PF, AF and UF line up with PIE, AIE and UIE: IRQF is the OR of the pairs.
    fn update_irqf(&mut self) {
        if self.reg_c & self.reg_b & (C_PF_BIT | C_AF_BIT | C_UF_BIT) != 0 {
            self.reg_c |= C_IRQF_BIT;
        } else {
            self.reg_c &= !C_IRQF_BIT;
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.reg_b & B_DM_BIT != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn decode(&self, byte: u8) -> u8 {
        if self.reg_b & B_DM_BIT != 0 { byte } else { (byte >> 4).wrapping_mul(10).wrapping_add(byte & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.reg_b & B_24_12_BIT != 0 {
            return self.encode(hour);
        }
        let twelve = (hour % 12 + 11) % 12 + 1;
        self.encode(twelve) | if hour >= 12 { HOURS_PM_BIT } else { 0 }
    }

    fn decode_hour(&self, byte: u8) -> u8 {
        if self.reg_b & B_24_12_BIT != 0 {
            return self.decode(byte);
        }
        let twelve = self.decode(byte & !HOURS_PM_BIT) % 12;
        twelve + if byte & HOURS_PM_BIT != 0 { 12 } else { 0 }
    }

    /// Byte read from 70h or 71h.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        if port != DATA_PORT {
            return 0xff; // the index is write-only
        }
        self.sync(now);
        let c = self.calendar(now);
        match self.index {
            SECONDS => self.encode(c.second),
            MINUTES => self.encode(c.minute),
            HOURS => self.encode_hour(c.hour),
            DAY_OF_WEEK => self.encode(c.weekday),
            DAY_OF_MONTH => self.encode(c.day),
            MONTH => self.encode(c.month),
            YEAR => self.encode(c.year.rem_euclid(100) as u8),
            CENTURY => self.encode(c.year.div_euclid(100).rem_euclid(100) as u8),
            REGISTER_A => self.reg_a | if self.update_in_progress(now) { A_UIP_BIT } else { 0 },
            REGISTER_B => self.reg_b,
            REGISTER_C => std::mem::take(&mut self.reg_c),
            REGISTER_D => D_VRT_BIT,
            index => self.memory[usize::from(index)],
        }
    }

    fn update_in_progress(&self, now: u64) -> bool {
        self.frozen.is_none() && self.utc(now).rem_euclid(SEC) >= SEC - UIP_NS
    }

    /// Byte write to 70h or 71h.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        if port != DATA_PORT {
            self.index = value & 0x7f;
            return;
        }
        self.sync(now);
        match self.index {
            SECONDS..=YEAR | CENTURY => self.write_time(value, now),
            REGISTER_A => {
                let was_reset = self.divider_in_reset();
                self.reg_a = value & !A_UIP_BIT;
                self.change_inhibit(now, was_reset);
            }
            REGISTER_B => {
                // "UIE is cleared when SET is written with a 1".
                self.reg_b = if value & B_SET_BIT != 0 { value & !B_UIE_BIT } else { value };
                self.change_inhibit(now, false);
                self.update_irqf();
            }
            REGISTER_C | REGISTER_D => {}
            index => self.memory[usize::from(index)] = value,
        }
    }

    fn write_time(&mut self, value: u8, now: u64) {
        let mut c = self.calendar(now);
        match self.index {
            SECONDS => c.second = self.decode(value),
            MINUTES => c.minute = self.decode(value),
            HOURS => c.hour = self.decode_hour(value),
            DAY_OF_MONTH => c.day = self.decode(value),
            MONTH => c.month = self.decode(value),
            YEAR => c.year = c.year.div_euclid(100) * 100 + i64::from(self.decode(value)),
            CENTURY => c.year = i64::from(self.decode(value)) * 100 + c.year.rem_euclid(100),
            DAY_OF_WEEK => return, // follows from the date here
            alarm => {
                self.memory[usize::from(alarm)] = value;
                return;
            }
        }
        if self.frozen.is_some() {
            self.frozen = Some(c);
        } else {
            self.set_time(c, self.utc(now).rem_euclid(SEC), now);
        }
    }

    fn set_time(&mut self, c: Calendar, sub_second: i128, now: u64) {
        self.base = i128::from(c.to_unix()) * SEC + sub_second - i128::from(now);
    }

    /// SET or the divider's reset has changed: stop the time registers or let them go on.
    fn change_inhibit(&mut self, now: u64, divider_was_reset: bool) {
        let inhibited = self.reg_b & B_SET_BIT != 0 || self.divider_in_reset();
        if divider_was_reset && !self.divider_in_reset() {
            // "the first update cycle is one-half second later" (datasheet, "Divider control").
            let c = self.calendar(now);
            self.set_time(c, SEC / 2, now);
        }
        match (inhibited, self.frozen) {
            (true, None) => self.frozen = Some(self.calendar(now)),
            (false, Some(c)) => {
                self.frozen = None;
                self.set_time(c, self.utc(now).rem_euclid(SEC), now);
            }
            _ => {}
        }
    }

    /// Brings flags and IRQ8 up to `now`.
    pub fn run_timers(&mut self, now: u64) {
        self.sync(now);
    }

    /// Guest time (ns) at which an enabled interrupt may come. With an alarm enabled that is the next full second.
    #[must_use]
    pub fn next_deadline(&self, _now: u64) -> Option<u64> {
        let wanted = self.reg_b & !self.reg_c;
        let mut at: Option<i128> = None;
        if wanted & B_PIE_BIT != 0
            && let Some(cycles) = self.periodic_cycles()
        {
            let next = (self.periods_at(self.synced, cycles) + 1) * SEC * cycles;
            at = Some(next.div_euclid(TIME_BASE_HZ) + i128::from(next.rem_euclid(TIME_BASE_HZ) != 0));
        }
        if wanted & (B_AIE_BIT | B_UIE_BIT) != 0 && self.frozen.is_none() {
            let next = (self.utc(self.synced).div_euclid(SEC) + 1) * SEC;
            at = Some(at.map_or(next, |a| a.min(next)));
        }
        at.map(|utc| u64::try_from(utc - self.base).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP: i64 = 1_709_251_198 * 1_000_000_000;
    const S: u64 = 1_000_000_000;

    fn get(r: &mut Rtc, index: u8, now: u64) -> u8 {
        r.write(INDEX_PORT, index | 0x80, now);
        r.read(DATA_PORT, now)
    }

    fn set(r: &mut Rtc, index: u8, value: u8, now: u64) {
        r.write(INDEX_PORT, index, now);
        r.write(DATA_PORT, value, now);
    }

    fn date(r: &mut Rtc, now: u64) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY_OF_MONTH, DAY_OF_WEEK, HOURS, MINUTES, SECONDS].map(|i| get(r, i, now))
    }

    #[test]
    fn the_time_is_the_hosts_in_bcd_and_goes_over_a_leap_day() {
        let mut r = Rtc::new(LEAP);
        assert_eq!(date(&mut r, 0), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        assert_eq!(date(&mut r, 2 * S), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
    }

    #[test]
    fn calendar_conversion_is_its_own_inverse_over_four_centuries() {
        for day in (-80_000..80_000).step_by(7) {
            let t = day * 86_400 + 12_345;
            assert_eq!(Calendar::from_unix(t).to_unix(), t);
        }
        assert_eq!(Calendar::from_unix(0).weekday, 5, "1970-01-01 was a Thursday");
    }

    #[test]
    fn binary_and_twelve_hour_modes() {
        let mut r = Rtc::new(LEAP);
        set(&mut r, REGISTER_B, B_DM_BIT, 0);
        assert_eq!(get(&mut r, HOURS, 0), 11 | HOURS_PM_BIT);
        assert_eq!(get(&mut r, MINUTES, 0), 59);
        assert_eq!(get(&mut r, HOURS, 2 * S), 12, "midnight is 12 am");
    }

    #[test]
    fn the_guest_sets_the_time_under_set_as_linux_does() {
        let mut r = Rtc::new(LEAP);
        set(&mut r, REGISTER_B, B_SET_BIT | B_24_12_BIT, S / 2);
        for (i, v) in [(YEAR, 0x99), (CENTURY, 0x19), (MONTH, 0x12), (DAY_OF_MONTH, 0x31)] {
            set(&mut r, i, v, S / 2);
        }
        for (i, v) in [(HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)] {
            set(&mut r, i, v, S / 2);
        }
        assert_eq!(get(&mut r, SECONDS, 5 * S), 0x59, "SET stops the registers");
        assert_eq!(get(&mut r, REGISTER_A, 5 * S - 1) & A_UIP_BIT, 0);
        set(&mut r, REGISTER_B, B_24_12_BIT, 5 * S);
        assert_eq!(date(&mut r, 6 * S), [0x20, 0, 1, 1, 7, 0, 0, 0]);
    }

    #[test]
    fn leaving_divider_reset_updates_half_a_second_later() {
        let mut r = Rtc::new(LEAP);
        set(&mut r, REGISTER_A, 0x70, 0);
        set(&mut r, REGISTER_A, 0x26, S / 4);
        let before = get(&mut r, SECONDS, S / 4 + S / 2 - 1);
        assert_eq!(before, 0x58);
        assert_eq!(get(&mut r, SECONDS, S / 4 + S / 2), 0x59);
    }

    #[test]
    fn uip_is_set_2228_us_before_each_second_and_clear_after_it() {
        let mut r = Rtc::new(LEAP);
        assert_eq!(get(&mut r, REGISTER_A, S - 2_228_001), 0x26);
        assert_eq!(get(&mut r, REGISTER_A, S - 2_228_000), 0xa6);
        assert_eq!(get(&mut r, REGISTER_A, S), 0x26);
    }

    #[test]
    fn update_interrupt_comes_at_the_second_and_reading_c_clears_it() {
        let mut r = Rtc::new(LEAP);
        assert_eq!(r.next_deadline(0), None);
        set(&mut r, REGISTER_B, B_UIE_BIT | B_24_12_BIT, 0);
        assert_eq!(r.next_deadline(0), Some(S));
        r.run_timers(S - 1);
        assert!(!r.irq());
        r.run_timers(S);
        assert!(r.irq());
        assert_eq!(r.next_deadline(S), None, "nothing new before register C is read");
        assert_eq!(get(&mut r, REGISTER_C, S) & !C_PF_BIT, C_IRQF_BIT | C_UF_BIT);
        assert!(!r.irq());
        assert_eq!(r.next_deadline(S), Some(2 * S));
    }

    #[test]
    fn periodic_interrupt_at_1024_hz() {
        let mut r = Rtc::new(0);
        set(&mut r, REGISTER_B, B_PIE_BIT | B_24_12_BIT, 0);
        let mut now = 0;
        let mut n = 0;
        while let Some(at) = r.next_deadline(now) {
            if at > S {
                break;
            }
            assert!(at > now);
            now = at;
            r.run_timers(now);
            assert!(r.irq());
            get(&mut r, REGISTER_C, now);
            n += 1;
        }
        assert_eq!(n, 1024);
    }

    #[test]
    fn the_alarm_rings_at_its_time_and_wildcards_match() {
        let mut r = Rtc::new(LEAP);
        set(&mut r, SECONDS_ALARM, 0x05, 0);
        set(&mut r, MINUTES_ALARM, 0xff, 0);
        set(&mut r, HOURS_ALARM, 0xc0, 0);
        set(&mut r, REGISTER_B, B_AIE_BIT | B_24_12_BIT, 0);
        for s in 1..7 {
            r.run_timers(s * S);
            assert!(!r.irq(), "second {s}");
        }
        r.run_timers(7 * S);
        assert!(r.irq());
        assert_ne!(get(&mut r, REGISTER_C, 7 * S) & C_AF_BIT, 0);
        r.run_timers(3600 * S);
        assert!(r.irq(), "an alarm passed during a long sleep is not lost");
    }

    #[test]
    fn memory_size_is_where_firmware_and_guests_look() {
        let mut r = Rtc::new(0);
        r.set_memory_size(256 << 20);
        let word = |r: &mut Rtc, i: u8| u16::from_le_bytes([get(r, i, 0), get(r, i + 1, 0)]);
        assert_eq!(word(&mut r, 0x15), 640);
        assert_eq!(word(&mut r, 0x17), 0xffff);
        assert_eq!(word(&mut r, 0x30), 0xffff);
        assert_eq!(word(&mut r, 0x34), (240 << 20 >> 16) as u16);
        assert_eq!(word(&mut r, 0x5b), 0);
        let sum: u16 = (0x10..=0x2d).map(|i| u16::from(get(&mut r, i, 0))).sum();
        assert_eq!([get(&mut r, 0x2e, 0), get(&mut r, 0x2f, 0)], sum.to_be_bytes());
        set(&mut r, 0x50, 0xa5, 0);
        assert_eq!(get(&mut r, 0x50, 0), 0xa5);
    }
}
