//! Intel 8254 programmable interval timer: three 16-bit counters, computed from guest time, never ticked.
//!
//! Source: Intel 8254 datasheet (order 231164). A counter remembers at which CLK its count was loaded; counting element,
//! OUT and the next edge of OUT are functions of `now`. CLK is 1,193,182 Hz (14.31818 MHz / 12), as in every PC.
//! A count of 1 in modes 2 and 3, which the datasheet forbids, counts as 2.

/// CLK of all three counters, Hz.
pub const CLK_HZ: u64 = 1_193_182;
/// Counter 0; counters 1 and 2 follow.
pub const COUNTER_0: u16 = 0x40;
/// Control word register.
pub const CONTROL_WORD: u16 = 0x43;
/// No periodic interrupt is asked for more often than this, ns: a guest that programs a count of 2 gets coalesced ticks
/// instead of a host timer at 600 kHz.
pub const MIN_IRQ_PERIOD_NS: u64 = 20_000;

const STATUS_OUT_BIT: u8 = 0x80;
const STATUS_NULL_COUNT_BIT: u8 = 0x40;

/// CLK periods that are complete at `now` (ns).
#[must_use]
pub fn ticks_at(now: u64) -> i64 {
    (u128::from(now) * u128::from(CLK_HZ) / 1_000_000_000) as i64
}

/// The first ns at which `ticks_at` reaches `tick`.
#[must_use]
pub fn ns_of_tick(tick: i64) -> u64 {
    let t = u128::from(tick.max(0) as u64);
    u64::try_from((t * 1_000_000_000).div_ceil(u128::from(CLK_HZ))).unwrap_or(u64::MAX)
}

/// RW1 and RW0 of the control word.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Access {
    #[default]
    Word,
    Low,
    High,
}

/// Where counting stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Run {
    /// No count written since the control word, or (modes 1 and 5) no trigger yet.
    Idle,
    /// The count was, or will be, loaded at this CLK.
    Since(i64),
    /// GATE is low, or half a count is written in mode 0; so many CLKs were counted.
    Stopped(i64),
}

/// One counter of the 8254.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counter {
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// Effective initial count, 1..=65536 (or 10000).
    count: i64,
    run: Run,
    /// Modes 2 and 3: a count that takes over at this CLK.
    next: Option<(i64, i64)>,
    count_written: bool,
    write_low: Option<u8>,
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    fn new() -> Counter {
        Counter {
            mode: 3,
            bcd: false,
            access: Access::Word,
            gate: true,
            count: 0x1_0000,
            run: Run::Idle,
            next: None,
            count_written: false,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    fn modulus(&self) -> i64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// CLKs counted at `tick`; None while idle.
    fn elapsed(&self, tick: i64) -> Option<i64> {
        match self.run {
            Run::Idle => None,
            Run::Since(start) => Some((tick - start).max(0)),
            Run::Stopped(e) => Some(e),
        }
    }

    /// Lets a count that was waiting for the end of its cycle take over.
    fn settle(&mut self, tick: i64) {
        if let Some((count, at)) = self.next
            && tick >= at
        {
            // Mode 3 reloads at the end of a half-cycle and goes on with the other half.
            let mid =
                self.mode == 3 && self.elapsed(at - 1).is_some_and(|e| e % self.count < self.high_half());
            self.count = count;
            self.run = Run::Since(if mid { at - self.high_half() } else { at });
            self.next = None;
        }
    }

    /// Mode 3: CLKs of the high half, the longer one of an odd count.
    fn high_half(&self) -> i64 {
        (self.count + 1) / 2
    }

    /// OUT at `tick`.
    fn out_at(&self, tick: i64) -> bool {
        let Some(e) = self.elapsed(tick) else { return self.mode != 0 };
        match self.mode {
            0 => e >= self.count,
            1 => e >= self.count || matches!(self.run, Run::Since(start) if tick < start),
            2 => !self.gate || e % self.count != self.count - 1,
            3 => !self.gate || e % self.count < self.high_half(),
            _ => e != self.count,
        }
    }

    /// The counting element at `tick`, as it reads (BCD where so programmed).
    fn value_at(&self, tick: i64) -> u16 {
        let e = self.elapsed(tick).unwrap_or(0);
        let value = match self.mode {
            2 => self.count - e % self.count,
            3 => {
                let phase = e % self.count;
                let even = self.count & !1;
                if phase < self.high_half() {
                    even - 2 * phase
                } else {
                    even - 2 * (phase - self.high_half())
                }
            }
            _ => self.count - e,
        }
        .rem_euclid(self.modulus());
        if self.bcd { to_bcd(value) } else { value as u16 }
    }

    fn status_at(&self, tick: i64) -> u8 {
        let null = match self.run {
            Run::Since(start) => tick < start,
            Run::Idle => true,
            Run::Stopped(_) => !self.count_written,
        };
        let access = match self.access {
            Access::Low => 0x10,
            Access::High => 0x20,
            Access::Word => 0x30,
        };
        (if self.out_at(tick) { STATUS_OUT_BIT } else { 0 })
            | (if null || self.next.is_some() { STATUS_NULL_COUNT_BIT } else { 0 })
            | access
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn write_control(&mut self, control: u8) {
        self.access = match control >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Word,
        };
        // Modes 6 and 7 are 2 and 3: the datasheet's "X10" and "X11".
        self.mode = match control >> 1 & 7 {
            m @ 0..=5 => m,
            m => m - 4,
        };
        self.bcd = control & 1 != 0;
        self.run = Run::Idle;
        self.next = None;
        self.count_written = false;
        self.write_low = None;
        self.read_high = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn write_count(&mut self, byte: u8, tick: i64) {
        let raw = match (self.access, self.write_low.take()) {
            (Access::Low, _) => u16::from(byte),
            (Access::High, _) => u16::from(byte) << 8,
            (Access::Word, Some(low)) => u16::from_le_bytes([low, byte]),
            (Access::Word, None) => {
                self.write_low = Some(byte);
                if self.mode == 0 {
                    // "Writing the first byte disables counting. OUT is set low immediately."
                    self.run = Run::Stopped(0);
                    self.count_written = false;
                }
                return;
            }
        };
        let mut count = if self.bcd { from_bcd(raw) } else { i64::from(raw) };
        if count == 0 {
            count = self.modulus();
        }
        if matches!(self.mode, 2 | 3) {
            count = count.max(2);
        }
        let first = !self.count_written;
        self.count_written = true;
        match self.mode {
            0 | 4 => {
                self.count = count;
                self.run = if self.gate { Run::Since(tick + 1) } else { Run::Stopped(0) };
            }
            2 | 3 if !first && matches!(self.run, Run::Since(_)) => {
                self.next = Some((count, self.cycle_end(tick)));
            }
            2 | 3 => {
                self.count = count;
                self.run = if self.gate { Run::Since(tick + 1) } else { Run::Stopped(0) };
            }
            // Modes 1 and 5: the count is used by the next trigger.
            _ if matches!(self.run, Run::Idle) => self.count = count,
            _ => self.next = Some((count, i64::MAX)),
        }
    }

    /// The CLK at which the running cycle (mode 3: half-cycle) of modes 2 and 3 ends.
    fn cycle_end(&self, tick: i64) -> i64 {
        let Run::Since(start) = self.run else { return tick + 1 };
        let e = (tick - start).max(0);
        let phase = e % self.count;
        let rest = if self.mode == 3 && phase < self.high_half() {
            self.high_half() - phase
        } else {
            self.count - phase
        };
        start + e + rest
    }

    fn set_gate(&mut self, gate: bool, tick: i64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        if gate {
            // A rising edge triggers modes 1 and 5, reloads modes 2 and 3 and lets 0 and 4 go on.
            self.run = match (self.mode, self.run) {
                (0 | 4, Run::Stopped(e)) if self.write_low.is_none() || self.mode == 4 => {
                    Run::Since(tick - e)
                }
                (0 | 4, run) => run,
                _ if !self.count_written => self.run,
                _ => {
                    if let Some((count, _)) = self.next.take() {
                        self.count = count;
                    }
                    Run::Since(tick + 1)
                }
            };
        } else if !matches!(self.mode, 1 | 5)
            && let Run::Since(start) = self.run
        {
            self.run = Run::Stopped((tick - start).max(0));
        }
    }

    fn read(&mut self, tick: i64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched_count.unwrap_or_else(|| self.value_at(tick));
        let [low, high] = value.to_le_bytes();
        match self.access {
            Access::Low => {
                self.latched_count = None;
                low
            }
            Access::High => {
                self.latched_count = None;
                high
            }
            Access::Word => {
                self.read_high = !self.read_high;
                if self.read_high {
                    return low;
                }
                self.latched_count = None;
                high
            }
        }
    }

    fn latch_count(&mut self, tick: i64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value_at(tick));
        }
    }

    /// The first CLK after `tick` at which OUT rises, if it will without further programming.
    fn next_rise(&self, tick: i64) -> Option<i64> {
        let Run::Since(start) = self.run else { return None };
        match self.mode {
            2 | 3 => {
                // Before the count is loaded, and up to the first full cycle, the first rise is at start + count.
                let cycles = (tick - start).max(0) / self.count + 1;
                let rise = start + cycles * self.count;
                match self.next {
                    // The new count takes over at or before that rise; when it does so in mid-cycle, the rise moves.
                    Some((count, at)) if at < rise => Some(at + count / 2),
                    _ => Some(rise),
                }
            }
            0 | 1 => Some(start + self.count).filter(|rise| *rise > tick),
            _ => Some(start + self.count + 1).filter(|rise| *rise > tick),
        }
    }
}

fn to_bcd(value: i64) -> u16 {
    let v = value as u16;
    ((v / 1000 % 10) << 12) | ((v / 100 % 10) << 8) | ((v / 10 % 10) << 4) | (v % 10)
}

fn from_bcd(raw: u16) -> i64 {
    (0..4).rev().fold(0, |sum, digit| sum * 10 + i64::from(raw >> (digit * 4) & 0xf))
}

/// What counter 0's OUT did since it was last asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutEvent {
    /// OUT rose at least once.
    pub rose: bool,
    /// OUT is now high.
    pub level: bool,
}

/// The 8254.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pit {
    counters: [Counter; 3],
    /// CLK up to which counter 0's rises have been reported.
    seen: i64,
    /// A rise found while the guest reprogrammed the counter, not yet reported.
    unreported: bool,
    /// When counter 0's last rise was reported, ns.
    reported_at: u64,
    /// CLKs of counter 0's last two rises, the later one first.
    rises: [i64; 2],
    /// Rises of counter 0 reported together with a later one.
    pub coalesced: u64,
}

impl Default for Pit {
    fn default() -> Self {
        Pit::new()
    }
}

impl Pit {
    /// Counters undefined until programmed, as the datasheet says; none runs, every OUT is high (mode 3, which a PC's
    /// firmware leaves behind), counter 2's gate is low.
    #[must_use]
    pub fn new() -> Pit {
        let mut counters = [Counter::new(), Counter::new(), Counter::new()];
        counters[2].gate = false;
        Pit { counters, seen: 0, unreported: false, reported_at: 0, rises: [0; 2], coalesced: 0 }
    }

    fn sync(&mut self, now: u64) -> i64 {
        let tick = ticks_at(now);
        self.note_rises(tick);
        for counter in &mut self.counters {
            counter.settle(tick);
        }
        tick
    }

    fn note_rises(&mut self, tick: i64) {
        let c = &self.counters[0];
        if let Some(first) = c.next_rise(self.seen).filter(|rise| *rise <= tick) {
            let more = if matches!(c.mode, 2 | 3) && c.next.is_none() { (tick - first) / c.count } else { 0 };
            self.coalesced = self.coalesced.saturating_add(more as u64 + u64::from(self.unreported));
            self.unreported = true;
            self.rises = [first, self.rises[0]];
        }
        self.seen = self.seen.max(tick);
    }

    /// Byte read from 40h-43h.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        let tick = self.sync(now);
        match self.counters.get_mut(usize::from(port.wrapping_sub(COUNTER_0))) {
            Some(counter) => counter.read(tick),
            None => 0xff, // "read from control word register": no operation, the bus floats
        }
    }

    /// Byte write to 40h-43h.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        let tick = self.sync(now);
        if port != CONTROL_WORD {
            if let Some(counter) = self.counters.get_mut(usize::from(port.wrapping_sub(COUNTER_0))) {
                counter.write_count(value, tick);
            }
            return;
        }
        match self.counters.get_mut(usize::from(value >> 6)) {
            Some(counter) if value & 0x30 == 0 => counter.latch_count(tick),
            Some(counter) => {
                let was_high = counter.out_at(tick);
                counter.write_control(value);
                // Any mode but 0 makes OUT high at once: for counter 0 that can be an edge on IRQ0.
                if value >> 6 == 0 && !was_high && counter.out_at(tick) {
                    self.unreported = true;
                }
            }
            None => self.read_back(value, tick),
        }
    }

    /// Datasheet, "Read-Back Command": D5 = 0 latches counts, D4 = 0 latches status, D3..D1 select counters.
    fn read_back(&mut self, command: u8, tick: i64) {
        for (i, counter) in self.counters.iter_mut().enumerate() {
            if command & (2 << i) == 0 {
                continue;
            }
            if command & 0x10 == 0 && counter.latched_status.is_none() {
                counter.latched_status = Some(counter.status_at(tick));
            }
            if command & 0x20 == 0 {
                counter.latch_count(tick);
            }
        }
    }

    /// Drives GATE of counter 2 (port 61h, bit 0).
    pub fn set_gate2(&mut self, gate: bool, now: u64) {
        let tick = self.sync(now);
        self.counters[2].set_gate(gate, tick);
    }

    /// GATE of counter 2.
    #[must_use]
    pub fn gate2(&self) -> bool {
        self.counters[2].gate
    }

    /// OUT of `counter` (0-2; others are low).
    pub fn out(&mut self, counter: usize, now: u64) -> bool {
        let tick = self.sync(now);
        self.counters.get(counter).is_some_and(|c| c.out_at(tick))
    }

    /// What counter 0's OUT did since the last call; rises missed in between are one.
    pub fn take_out0(&mut self, now: u64) -> OutEvent {
        let tick = self.sync(now);
        let rose = std::mem::take(&mut self.unreported);
        if rose {
            self.reported_at = now;
        }
        OutEvent { rose, level: self.counters[0].out_at(tick) }
    }

    /// Whether counter 0 is in mode 0 and its OUT low: the guest itself has programmed it so.
    pub fn out0_is_idle_low(&mut self, now: u64) -> bool {
        self.counters[0].mode == 0 && !self.out(0, now)
    }

    /// If counter 0 is a one-shot (mode 4) that is spent, and waits for a count of two bytes: the guest time (ns) at which
    /// it would rise next if it went on as regularly as last time.
    #[must_use]
    pub fn rhythm(&self) -> Option<u64> {
        let c = &self.counters[0];
        let [last, before] = self.rises;
        let waits = c.mode == 4 && !c.bcd && c.gate && c.access == Access::Word && c.write_low.is_none();
        let spent = !self.unreported && c.next_rise(self.seen).is_none();
        (waits && spent && before != 0).then(|| ns_of_tick(2 * last - before))
    }

    /// Time from counter 0's last rise but one to its last, ns.
    #[must_use]
    pub fn period(&self) -> u64 {
        let [last, before] = self.rises;
        ns_of_tick(last - before)
    }

    /// Guest time (ns) of counter 0's next rise that has not been reported.
    #[must_use]
    pub fn next_deadline(&self, now: u64) -> Option<u64> {
        if self.unreported {
            return Some(now);
        }
        let counter = &self.counters[0];
        let at = ns_of_tick(counter.next_rise(self.seen)?);
        if matches!(counter.mode, 2 | 3) && self.reported_at != 0 {
            return Some(at.max(self.reported_at.saturating_add(MIN_IRQ_PERIOD_NS)));
        }
        Some(at)
    }

    /// One line a counter for a console: mode, count, current value, OUT.
    pub fn describe(&mut self, now: u64) -> String {
        let tick = self.sync(now);
        let line = |(i, c): (usize, &Counter)| {
            format!(
                "pit{i}: mode {} count {} value {:#06x} gate {} out {}\n",
                c.mode,
                c.count,
                c.value_at(tick),
                u8::from(c.gate),
                u8::from(c.out_at(tick))
            )
        };
        self.counters.iter().enumerate().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ns at which CLK `t` has passed.
    fn at(t: i64) -> u64 {
        ns_of_tick(t)
    }

    fn program(p: &mut Pit, control: u8, count: u16, tick: i64) {
        let port = COUNTER_0 + u16::from(control >> 6);
        p.write(CONTROL_WORD, control, at(tick));
        p.write(port, count as u8, at(tick));
        p.write(port, (count >> 8) as u8, at(tick));
    }

    fn read_word(p: &mut Pit, counter: u8, tick: i64) -> u16 {
        p.write(CONTROL_WORD, counter << 6, at(tick));
        let port = COUNTER_0 + u16::from(counter);
        u16::from_le_bytes([p.read(port, at(tick)), p.read(port, at(tick))])
    }

    #[test]
    fn ticks_and_nanoseconds_are_inverse() {
        for t in [0, 1, 2, 11932, 1_193_182, 1_193_182 * 86_400 * 365] {
            assert_eq!(ticks_at(ns_of_tick(t)), t);
            assert!(t == 0 || ticks_at(ns_of_tick(t) - 1) == t - 1);
        }
        assert_eq!(ticks_at(1_000_000_000), 1_193_182);
    }

    #[test]
    fn a_one_shot_has_a_rhythm_while_it_is_spent() {
        let mut p = Pit::new();
        for (start, count) in [(1000, 99), (1200, 98)] {
            program(&mut p, 0x38, count, start);
            assert_eq!(p.rhythm(), None, "it runs");
            assert!(p.take_out0(at(start + 150)).rose);
        }
        // Rises at 1101 and 1300.
        assert_eq!(p.rhythm(), Some(at(1499)));
        p.write(COUNTER_0, 7, at(1400));
        assert_eq!(p.rhythm(), None, "half a count is written");
        p.write(COUNTER_0, 0, at(1400));
        assert_eq!(p.next_deadline(at(1400)), Some(at(1409)));
        program(&mut p, 0x34, 100, 2000);
        assert!(p.take_out0(at(2500)).rose);
        assert_eq!(p.rhythm(), None, "it goes on by itself");
    }

    #[test]
    fn mode_0_raises_out_n_plus_1_clks_after_the_write_and_only_once() {
        let mut p = Pit::new();
        program(&mut p, 0x30, 4, 100);
        assert!(!p.out(0, at(104)));
        assert!(p.out(0, at(105)));
        assert_eq!(p.next_deadline(at(106)), Some(at(106)), "the rise is not reported yet");
        assert_eq!(p.take_out0(at(106)), OutEvent { rose: true, level: true });
        assert_eq!(p.take_out0(at(500_000)), OutEvent { rose: false, level: true });
        assert_eq!(p.next_deadline(at(500_000)), None);
    }

    #[test]
    fn mode_0_deadline_is_the_exact_nanosecond() {
        let mut p = Pit::new();
        program(&mut p, 0x30, 1000, 0);
        let d = p.next_deadline(0).unwrap();
        assert_eq!(d, at(1001));
        assert!(!p.take_out0(d - 1).rose);
        assert!(p.take_out0(d).rose);
    }

    #[test]
    fn mode_0_counts_on_past_zero_and_wraps() {
        let mut p = Pit::new();
        program(&mut p, 0x30, 4, 0);
        assert_eq!(read_word(&mut p, 0, 3), 2);
        assert_eq!(read_word(&mut p, 0, 5), 0);
        assert_eq!(read_word(&mut p, 0, 6), 0xffff);
    }

    #[test]
    fn mode_0_first_byte_stops_counting_and_lowers_out() {
        let mut p = Pit::new();
        program(&mut p, 0x30, 1, 0);
        assert!(p.out(0, at(10)));
        p.write(COUNTER_0, 9, at(10));
        assert!(!p.out(0, at(10_000)));
        p.write(COUNTER_0, 0, at(10_000));
        assert!(p.out(0, at(10_010)));
    }

    #[test]
    fn mode_1_is_one_pulse_per_trigger() {
        let mut p = Pit::new();
        program(&mut p, 0xb2, 5, 0);
        assert!(p.out(2, at(50)), "no trigger, no pulse");
        p.set_gate2(true, at(100));
        assert!(!p.out(2, at(101)));
        assert!(!p.out(2, at(105)));
        assert!(p.out(2, at(106)));
        p.set_gate2(false, at(110));
        p.set_gate2(true, at(120));
        assert!(!p.out(2, at(121)));
    }

    #[test]
    fn mode_2_divides_and_is_low_for_the_last_clk() {
        let mut p = Pit::new();
        program(&mut p, 0x34, 3, 0);
        let out: Vec<bool> = (1..=7).map(|t| p.out(0, at(t))).collect();
        assert_eq!(out, [true, true, false, true, true, false, true]);
        assert_eq!(read_word(&mut p, 0, 1), 3);
        assert_eq!(read_word(&mut p, 0, 3), 1);
        assert_eq!(read_word(&mut p, 0, 4), 3);
    }

    #[test]
    fn missed_periods_are_one_interrupt_and_the_phase_stays() {
        let mut p = Pit::new();
        program(&mut p, 0x34, 11932, 0);
        assert_eq!(p.next_deadline(0), Some(at(1 + 11932)));
        assert!(p.take_out0(at(11933)).rose);
        let late = at(1 + 11932 * 10 + 77);
        assert!(p.take_out0(late).rose);
        assert!(!p.take_out0(late).rose);
        assert_eq!(p.coalesced, 8);
        assert_eq!(p.next_deadline(late), Some(at(1 + 11932 * 11)));
    }

    #[test]
    fn a_new_count_in_mode_2_waits_for_the_end_of_the_cycle() {
        let mut p = Pit::new();
        program(&mut p, 0x34, 100, 0);
        p.write(COUNTER_0, 200, at(50));
        p.write(COUNTER_0, 0, at(50));
        assert_eq!(read_word(&mut p, 0, 100), 1);
        assert_eq!(read_word(&mut p, 0, 101), 200);
        assert!(p.take_out0(at(101)).rose);
        assert_eq!(p.next_deadline(at(101)), Some(at(301)));
    }

    #[test]
    fn mode_3_is_a_square_wave_with_the_longer_half_high() {
        let mut p = Pit::new();
        program(&mut p, 0x36, 5, 0);
        let out: Vec<bool> = (1..=10).map(|t| p.out(0, at(t))).collect();
        assert_eq!(out, [true, true, true, false, false, true, true, true, false, false]);
        program(&mut p, 0x36, 8, 20);
        let values: Vec<u16> = (21..=29).map(|t| read_word(&mut p, 0, t)).collect();
        assert_eq!(values, [8, 6, 4, 2, 8, 6, 4, 2, 8]);
    }

    #[test]
    fn mode_4_strobes_for_one_clk_and_the_irq_is_its_end() {
        let mut p = Pit::new();
        program(&mut p, 0x38, 10, 0);
        p.take_out0(0);
        assert_eq!(p.next_deadline(0), Some(at(12)));
        assert!(p.out(0, at(10)));
        assert!(!p.out(0, at(11)));
        assert!(p.out(0, at(12)));
        assert!(p.take_out0(at(12)).rose);
        assert_eq!(p.next_deadline(at(12)), None);
        p.write(COUNTER_0, 20, at(100));
        p.write(COUNTER_0, 0, at(100));
        assert_eq!(
            p.next_deadline(at(100)),
            Some(at(122)),
            "a count alone retriggers, as Linux' one-shot mode does"
        );
    }

    #[test]
    fn mode_5_strobes_after_a_trigger() {
        let mut p = Pit::new();
        program(&mut p, 0xba, 3, 0);
        p.set_gate2(true, at(10));
        assert!(p.out(2, at(13)));
        assert!(!p.out(2, at(14)));
        assert!(p.out(2, at(15)));
    }

    #[test]
    fn a_low_gate_stops_mode_0_and_restarts_mode_2() {
        let mut p = Pit::new();
        p.set_gate2(true, 0);
        program(&mut p, 0xb0, 100, 0);
        p.set_gate2(false, at(31));
        assert_eq!(read_word(&mut p, 2, 1000), 70);
        p.set_gate2(true, at(1000));
        assert_eq!(read_word(&mut p, 2, 1010), 60);

        program(&mut p, 0xb4, 100, 2000);
        p.set_gate2(false, at(2050));
        assert!(p.out(2, at(2060)));
        p.set_gate2(true, at(3000));
        assert_eq!(read_word(&mut p, 2, 3001), 100);
    }

    #[test]
    fn linux_tsc_calibration_sees_out2_rise_after_the_programmed_time() {
        // arch/x86/kernel/tsc.c, pit_calibrate_tsc: gate on, mode 0, 50 ms.
        let mut p = Pit::new();
        let latch = (CLK_HZ / 20) as u16;
        p.set_gate2(true, 0);
        program(&mut p, 0xb0, latch, 0);
        assert!(!p.out(2, 49_999_000));
        assert!(p.out(2, 50_002_000));
    }

    #[test]
    fn a_latched_count_stays_until_read() {
        let mut p = Pit::new();
        program(&mut p, 0x34, 1000, 0);
        p.write(CONTROL_WORD, 0x00, at(11));
        p.write(CONTROL_WORD, 0x00, at(500));
        assert_eq!(u16::from(p.read(COUNTER_0, at(600))), 990 & 0xff);
        assert_eq!(u16::from(p.read(COUNTER_0, at(700))), 990 >> 8);
        assert_eq!(u16::from(p.read(COUNTER_0, at(701))), 300 & 0xff);
    }

    #[test]
    fn read_back_gives_status_then_count() {
        let mut p = Pit::new();
        program(&mut p, 0x34, 1000, 0);
        p.write(CONTROL_WORD, 0xc2, at(11));
        assert_eq!(p.read(COUNTER_0, at(20)), 0xb4, "OUT high, count loaded, RW 3, mode 2, binary");
        assert_eq!(u16::from(p.read(COUNTER_0, at(20))), 990 & 0xff);
        assert_eq!(u16::from(p.read(COUNTER_0, at(20))), 990 >> 8);
        program(&mut p, 0x30, 1000, 30);
        p.write(CONTROL_WORD, 0xe2, at(30));
        assert_eq!(p.read(COUNTER_0, at(30)), 0x70, "OUT low, null count");
    }

    #[test]
    fn bcd_counts_in_decades() {
        let mut p = Pit::new();
        program(&mut p, 0x31, 0x1000, 0);
        assert_eq!(read_word(&mut p, 0, 2), 0x0999);
        program(&mut p, 0x31, 0, 10);
        assert_eq!(read_word(&mut p, 0, 12), 0x9999);
        assert_eq!(p.next_deadline(at(12)), Some(at(11 + 10_000)));
    }

    #[test]
    fn byte_access_modes_leave_the_other_byte_zero() {
        let mut p = Pit::new();
        p.write(CONTROL_WORD, 0x14, 0);
        p.write(COUNTER_0, 50, 0);
        assert_eq!(p.read(COUNTER_0, at(11)), 40);
        p.write(CONTROL_WORD, 0x24, at(20));
        p.write(COUNTER_0, 2, at(20));
        assert_eq!(p.read(COUNTER_0, at(22)), 1, "511 reads its high byte");
    }

    #[test]
    fn an_absurdly_short_period_does_not_become_a_host_timer_storm() {
        let mut p = Pit::new();
        program(&mut p, 0x34, 1, 0);
        let mut now = 0;
        for _ in 0..10 {
            let next = p.next_deadline(now).unwrap().max(now + 1);
            assert!(p.take_out0(next).rose);
            assert!(now == 0 || next - now >= MIN_IRQ_PERIOD_NS);
            now = next;
        }
    }
}
