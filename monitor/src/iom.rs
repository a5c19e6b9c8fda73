//! IOM: from I/O ports to devices, from devices to the interrupt controller.
//!
//! All of it belongs to the virtual CPU's thread. What can change an interrupt line is followed by reading the lines of
//! that device and driving the 8259A pair; nothing calls back. Accesses of 16 and 32 bits are split into bytes, as the
//! bus does for byte-wide chips, but where a port is decoded whole: CF8h and isa-debug-exit. What no device decodes
//! floats: all ones, and counted.

use crate::devices::debug_ports::{DEBUG_CONSOLE_PORT, DebugPorts, POST_PORT};
use crate::devices::i8042::{self, I8042};
use crate::devices::i8237::Dma;
use crate::devices::i8254::{COUNTER_0, Pit};
use crate::devices::i8259::{MASTER_COMMAND, PicPair};
use crate::devices::mc146818::{self, Rtc};
use crate::devices::ns16550a::{COM_IRQS, COM_PORTS, Serial, SerialSink};
use crate::devices::pci_config::{CONFIG_ADDRESS, PciConfig};
use crate::devices::port61::{PORT_B, PortB};
use crate::devices::system_control::{PORT_A, PortA, RESET_CONTROL, ResetControl};
use crate::devices::vga_text::Vga;
use crate::tm::earliest;
use host_driver_shim::world::{Guard, PORT_ROWS, PortRow};
use std::collections::{BTreeMap, VecDeque};

const IRQ_TIMER: u8 = 0;
const IRQ_KEYBOARD: u8 = 1;
const IRQ_RTC: u8 = 8;
const IRQ_MOUSE: u8 = 12;
/// Bytes of serial input kept for a guest that does not read.
pub const SERIAL_INPUT_LIMIT: usize = 64 << 10;

/// Who asked for a reset, or for the end of the run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResetCause {
    /// Keyboard controller: output port bit 0, or command FEh.
    I8042,
    /// Reset control register.
    Cf9,
    /// System control port A, bit 0.
    Port92,
    /// isa-debug-exit: the exit status, (value << 1) | 1.
    DebugExit(u32),
}

/// What the machine has.
#[derive(Default)]
pub struct DevicesConfig {
    /// Guest RAM in bytes, for the CMOS.
    pub ram_bytes: u64,
    /// UTC in ns since 1970 at guest time 0, for the RTC.
    pub utc_ns: i64,
    /// COM1-COM4: where output goes; None leaves the port out.
    pub serial: [Option<Box<dyn SerialSink>>; 4],
    /// Debug console at E9h.
    pub debug_console: Option<Box<dyn SerialSink>>,
    /// Base port of isa-debug-exit.
    pub debug_exit: Option<u16>,
}

/// Accesses to one port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortCount {
    /// `in`s.
    pub reads: u64,
    /// `out`s.
    pub writes: u64,
    /// Those that no device decoded.
    pub unclaimed: u64,
}

/// A world may believe that the timer has ticked so much too early, ns.
const TICK_TOLERANCE: u64 = 100_000;

/// When the EMT will look at the devices whatever happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Look {
    /// The host's time-stamp counter then, about.
    pub tsc: u64,
    /// Its counts in a CLK of the 8254, 1 or more.
    pub counts_per_clk: u32,
    /// A world is to see to it, and may deliver ticks.
    pub guard: Option<Guard>,
}

/// Every device behind the I/O ports.
pub struct Devices {
    /// 8259A pair.
    pub pic: PicPair,
    /// 8254.
    pub pit: Pit,
    /// Port 61h.
    pub port_b: PortB,
    /// RTC and CMOS.
    pub rtc: Rtc,
    /// COM1-COM4.
    pub serial: [Option<Serial>; 4],
    /// Keyboard controller.
    pub i8042: I8042,
    /// VGA registers.
    pub vga: Vga,
    /// 8237A pair.
    pub dma: Dma,
    /// CF8h.
    pub pci: PciConfig,
    /// POST, E9h, debug exit.
    pub debug: DebugPorts,
    port_a: PortA,
    reset_control: ResetControl,
    a20: bool,
    reset: Option<ResetCause>,
    serial_input: [VecDeque<u8>; 4],
    counts: BTreeMap<u16, PortCount>,
}

impl Devices {
    /// The machine at power-on, A20 enabled.
    #[must_use]
    pub fn new(config: DevicesConfig) -> Devices {
        let mut rtc = Rtc::new(config.utc_ns);
        rtc.set_memory_size(config.ram_bytes);
        Devices {
            pic: PicPair::new(),
            pit: Pit::new(),
            port_b: PortB::default(),
            rtc,
            serial: config.serial.map(|sink| sink.map(Serial::new)),
            i8042: I8042::new(),
            vga: Vga::new(),
            dma: Dma::default(),
            pci: PciConfig::default(),
            debug: DebugPorts::new(config.debug_console, config.debug_exit),
            port_a: PortA::default(),
            reset_control: ResetControl::default(),
            a20: true,
            reset: None,
            serial_input: Default::default(),
            counts: BTreeMap::new(),
        }
    }

    /// `in` of `size` (1, 2, 4) bytes at guest time `now` (ns).
    pub fn port_in(&mut self, port: u16, size: u8, now: u64) -> u32 {
        if port == CONFIG_ADDRESS && size == 4 {
            self.count(port, false, true);
            return self.pci.address();
        }
        let mut value = 0;
        let mut claimed = false;
        for i in 0..size.min(4) {
            let byte = self.read_byte(port.wrapping_add(u16::from(i)), now);
            claimed |= byte.is_some();
            value |= u32::from(byte.unwrap_or(0xff)) << (8 * i);
        }
        self.count(port, false, claimed);
        value
    }

    /// `out` of `size` (1, 2, 4) bytes at guest time `now` (ns).
    pub fn port_out(&mut self, port: u16, size: u8, value: u32, now: u64) {
        if port == CONFIG_ADDRESS && size == 4 {
            self.count(port, true, true);
            self.pci.set_address(value);
            return;
        }
        if self.debug.is_exit(port) {
            self.count(port, true, true);
            let mask = if size >= 4 { u32::MAX } else { (1 << (8 * size)) - 1 };
            self.request_reset(ResetCause::DebugExit(DebugPorts::exit_status(value & mask)));
            return;
        }
        let mut claimed = false;
        for i in 0..size.min(4) {
            claimed |= self.write_byte(port.wrapping_add(u16::from(i)), (value >> (8 * i)) as u8, now);
        }
        self.count(port, true, claimed);
    }

    fn count(&mut self, port: u16, write: bool, claimed: bool) {
        let c = self.counts.entry(port).or_default();
        c.reads += u64::from(!write);
        c.writes += u64::from(write);
        c.unclaimed += u64::from(!claimed);
    }

    /// Accesses so far, by port.
    #[must_use]
    pub fn port_counts(&self) -> &BTreeMap<u16, PortCount> {
        &self.counts
    }

    /// COM port index and register of `port`, where that UART exists.
    fn uart(&self, port: u16) -> Option<(usize, u8)> {
        let com = COM_PORTS.iter().position(|base| port & !7 == *base)?;
        self.serial.get(com)?.as_ref()?;
        Some((com, (port & 7) as u8))
    }

    fn read_byte(&mut self, port: u16, now: u64) -> Option<u8> {
        let value = match port {
            p if PicPair::owns(p) => self.pic.read(p),
            0x40..=0x43 => {
                let value = self.pit.read(port, now);
                self.update_timer(now);
                value
            }
            PORT_B => self.port_b.read(&mut self.pit, now),
            i8042::DATA_PORT => {
                let value = self.i8042.read(port);
                // The lines fall with the read and rise again for the next byte: each byte is an edge.
                self.update_keyboard();
                self.i8042.pump();
                self.update_keyboard();
                value
            }
            i8042::COMMAND_PORT => self.i8042.read(port),
            mc146818::INDEX_PORT | mc146818::DATA_PORT => {
                let value = self.rtc.read(port, now);
                self.pic.set_irq(IRQ_RTC, self.rtc.irq());
                value
            }
            POST_PORT => self.debug.post_code(),
            p if Dma::owns(p) && p != PORT_A => self.dma.read(p),
            PORT_A => self.port_a.read(self.a20),
            DEBUG_CONSOLE_PORT => self.debug.read_console(),
            RESET_CONTROL => self.reset_control.read(),
            p if Vga::owns(p) => self.vga.read(p, now),
            p => {
                let (com, register) = self.uart(p)?;
                let value = self.serial.get_mut(com)?.as_mut()?.read(register);
                self.pump_serial(com);
                value
            }
        };
        Some(value)
    }

    fn write_byte(&mut self, port: u16, value: u8, now: u64) -> bool {
        match port {
            p if PicPair::owns(p) => self.pic.write(p, value),
            0x40..=0x43 => {
                self.pit.write(port, value, now);
                self.update_timer(now);
            }
            PORT_B => self.port_b.write(value, &mut self.pit, now),
            i8042::DATA_PORT | i8042::COMMAND_PORT => {
                let effect = self.i8042.write(port, value);
                if let Some(a20) = effect.a20 {
                    self.a20 = a20;
                }
                if effect.reset {
                    self.request_reset(ResetCause::I8042);
                }
                self.update_keyboard();
            }
            mc146818::INDEX_PORT | mc146818::DATA_PORT => {
                self.rtc.write(port, value, now);
                self.pic.set_irq(IRQ_RTC, self.rtc.irq());
            }
            POST_PORT => self.debug.set_post_code(value),
            p if Dma::owns(p) => self.dma.write(p, value),
            PORT_A => {
                let (a20, reset) = self.port_a.write(value);
                self.a20 = a20;
                if reset {
                    self.request_reset(ResetCause::Port92);
                }
            }
            DEBUG_CONSOLE_PORT => self.debug.write_console(value),
            RESET_CONTROL => {
                if self.reset_control.write(value) {
                    self.request_reset(ResetCause::Cf9);
                }
            }
            p if Vga::owns(p) => self.vga.write(p, value),
            p => {
                let Some((com, register)) = self.uart(p) else { return false };
                if let Some(uart) = self.serial.get_mut(com).and_then(Option::as_mut) {
                    uart.write(register, value);
                }
                self.pump_serial(com);
            }
        }
        true
    }

    fn request_reset(&mut self, cause: ResetCause) {
        self.reset.get_or_insert(cause);
    }

    /// The first reset asked for since the last call.
    pub fn take_reset_request(&mut self) -> Option<ResetCause> {
        self.reset.take()
    }

    /// State of the A20 gate. It is kept and read back, but does not change addresses.
    #[must_use]
    pub fn a20(&self) -> bool {
        self.a20
    }

    /// IRQ0 is an edge for each rise of OUT0 and stays high until the next one: a guest that has interrupts disabled
    /// through the low half of a square wave still gets its tick, as on hardware with a CPU that keeps up. It falls when
    /// the guest itself programs OUT0 low (mode 0).
    fn update_timer(&mut self, now: u64) {
        let out = self.pit.take_out0(now);
        if out.rose {
            self.pic.set_irq(IRQ_TIMER, false);
            self.pic.set_irq(IRQ_TIMER, true);
        }
        if self.pit.out0_is_idle_low(now) {
            self.pic.set_irq(IRQ_TIMER, false);
        }
    }

    fn update_keyboard(&mut self) {
        let (keyboard, mouse) = self.i8042.irqs();
        self.pic.set_irq(IRQ_KEYBOARD, keyboard);
        self.pic.set_irq(IRQ_MOUSE, mouse);
    }

    /// Moves waiting input into the UART and drives its line. COM1 and COM3 (COM2 and COM4) share a line: wired OR.
    fn pump_serial(&mut self, com: usize) {
        if let (Some(Some(uart)), Some(input)) = (self.serial.get_mut(com), self.serial_input.get_mut(com)) {
            while uart.can_receive()
                && let Some(byte) = input.pop_front()
            {
                uart.receive(byte);
            }
        }
        let Some(irq) = COM_IRQS.get(com).copied() else { return };
        let level = self
            .serial
            .iter()
            .zip(COM_IRQS)
            .any(|(uart, line)| line == irq && uart.as_ref().is_some_and(Serial::irq));
        self.pic.set_irq(irq, level);
    }

    /// Input for COM `com` (0-3); what the UART cannot take waits. Returns how many bytes were kept: ask
    /// [`serial_room`](Devices::serial_room) before reading more from the host.
    pub fn serial_input(&mut self, com: usize, bytes: &[u8]) -> usize {
        let room = self.serial_room(com);
        let taken = bytes.get(..room.min(bytes.len())).unwrap_or(&[]);
        if let Some(queue) = self.serial_input.get_mut(com) {
            queue.extend(taken);
        }
        self.pump_serial(com);
        taken.len()
    }

    /// A break on the line of COM `com` (0-3).
    pub fn serial_break(&mut self, com: usize) {
        if let Some(uart) = self.serial.get_mut(com).and_then(Option::as_mut) {
            uart.receive_break();
        }
        self.pump_serial(com);
    }

    /// How many bytes [`serial_input`](Devices::serial_input) would keep; 0 for a port that does not exist.
    #[must_use]
    pub fn serial_room(&self, com: usize) -> usize {
        match (self.serial.get(com), self.serial_input.get(com)) {
            (Some(Some(_)), Some(queue)) => SERIAL_INPUT_LIMIT.saturating_sub(queue.len()),
            _ => 0,
        }
    }

    /// A key event in scan code set 2 bytes; false if the keyboard lost it.
    pub fn key(&mut self, set2: &[u8]) -> bool {
        let taken = self.i8042.key(set2);
        self.update_keyboard();
        taken
    }

    /// Whether INTR is active.
    #[must_use]
    pub fn interrupt_pending(&self) -> bool {
        self.pic.has_interrupt()
    }

    /// The processor's INTA: the vector to deliver.
    pub fn acknowledge(&mut self) -> u8 {
        self.pic.acknowledge()
    }

    /// The ports whose accesses need not be seen at once. With `look` that is also a new count of counter 0 that is over at
    /// that time or later.
    #[must_use]
    pub fn quiet_ports(&self, look: Option<Look>) -> [PortRow; PORT_ROWS] {
        let [a, b, c, d] = self.pic.quiet_ports();
        let timer = look.map(|look| PortRow {
            port: u32::from(COUNTER_0),
            posts: 1,
            unit: look.counts_per_clk,
            until: look.tsc,
            ..PortRow::default()
        });
        [a, b, c, d, timer.unwrap_or_default()]
    }

    /// The interrupt controllers' part of a guard: where ticks are masked and where their service ends.
    #[must_use]
    pub fn guarded(&self, guard: Guard) -> Guard {
        let (end_port, mask_port) = (u32::from(MASTER_COMMAND), u32::from(MASTER_COMMAND) + 1);
        Guard { idle: u32::from(self.pic.master.isr() == 0), end_port, mask_port, ..guard }
    }

    /// A world says that it delivered the timer's tick at guest time `then` (ns). Yields the vector if that can be.
    pub fn tick_was_delivered(&mut self, then: u64) -> Option<u8> {
        // It counts in host time, the timer in its own CLKs.
        let rise = self.pit.next_deadline(then).filter(|at| *at <= then.saturating_add(TICK_TOLERANCE));
        self.run_timers(rise.map_or(then, |at| at.max(then)));
        self.interrupt_pending().then(|| self.acknowledge())
    }

    /// The earliest guest time (ns) at which [`run_timers`](Devices::run_timers) must be called.
    #[must_use]
    pub fn next_deadline(&self, now: u64) -> Option<u64> {
        earliest(self.pit.next_deadline(now), self.rtc.next_deadline(now))
    }

    /// Brings timers, and the lines they drive, up to `now`.
    pub fn run_timers(&mut self, now: u64) {
        self.update_timer(now);
        self.rtc.run_timers(now);
        self.pic.set_irq(IRQ_RTC, self.rtc.irq());
    }

    /// The interrupt controllers and timers in words, for a console.
    pub fn describe_pic(&mut self, now: u64) -> String {
        let chip = |name: &str, c: &crate::devices::i8259::I8259| {
            format!(
                "{name}: irr {:02x} isr {:02x} imr {:02x} vectors {:02x}-{:02x}\n",
                c.irr(),
                c.isr(),
                c.imr(),
                c.vector_base(),
                c.vector_base() | 7
            )
        };
        let mut text = chip("master", &self.pic.master) + &chip("slave", &self.pic.slave);
        text += &format!("spurious {}\n", self.pic.spurious);
        text + &self.pit.describe(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ns16550a::CaptureSink;

    fn machine() -> (Devices, CaptureSink) {
        let sink = CaptureSink::default();
        let mut d = Devices::new(DevicesConfig {
            ram_bytes: 64 << 20,
            serial: [Some(Box::new(sink.clone())), None, None, None],
            debug_exit: Some(0x501),
            ..DevicesConfig::default()
        });
        for (port, v) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, 1),
        ] {
            d.port_out(port, 1, v, 0);
        }
        (d, sink)
    }

    fn eoi(d: &mut Devices) {
        d.port_out(0xa0, 1, 0x20, 0);
        d.port_out(0x20, 1, 0x20, 0);
    }

    #[test]
    fn a_periodic_timer_interrupts_at_its_deadlines() {
        let (mut d, _) = machine();
        d.port_out(0x43, 1, 0x34, 0);
        d.port_out(0x40, 1, 11932 & 0xff, 0);
        d.port_out(0x40, 1, 11932 >> 8, 0);
        let mut now = 0;
        for tick in 1..=100u64 {
            assert!(!d.interrupt_pending());
            now = d.next_deadline(now).unwrap();
            d.run_timers(now);
            assert_eq!(d.acknowledge(), 0x20);
            eoi(&mut d);
            assert!(now.abs_diff(tick * 10_000_000) < 20_000, "tick {tick} at {now}");
        }
    }

    #[test]
    fn a_tick_delivered_in_a_world_is_believed_if_it_is_due_and_not_masked() {
        let (mut d, _) = machine();
        let due = |d: &mut Devices, from: u64| {
            for (port, v) in [(0x43, 0x38), (0x40, 0xa9), (0x40, 4)] {
                d.port_out(port, 1, v, from);
            }
            d.next_deadline(from).unwrap()
        };
        let at = due(&mut d, 0);
        assert!(at.abs_diff(1_000_000) < 5000, "{at}");
        assert_eq!(d.guarded(Guard::default()).idle, 1);
        assert_eq!(d.tick_was_delivered(at - TICK_TOLERANCE - 1), None, "much too early");
        assert_eq!(d.tick_was_delivered(at - 700), Some(0x20), "the world's clock is not as fine");
        assert_eq!(d.guarded(Guard::default()).idle, 0);
        assert_eq!(d.tick_was_delivered(at), None, "it is in service");
        eoi(&mut d);
        assert_eq!(d.tick_was_delivered(at + 10_000_000), None, "no count was written");
        d.port_out(0x21, 1, 1, at);
        let at = due(&mut d, at + 20_000_000);
        assert_eq!(d.tick_was_delivered(at), None, "masked");
    }

    #[test]
    fn a_square_wave_tick_survives_its_low_half_with_interrupts_off() {
        let (mut d, _) = machine();
        for (port, v) in [(0x43, 0x36), (0x40, 0), (0x40, 0)] {
            d.port_out(port, 1, v, 0);
        }
        let rise = d.next_deadline(0).unwrap();
        d.run_timers(rise);
        d.port_in(0x40, 1, rise + 30_000_000);
        d.run_timers(rise + 40_000_000);
        assert!(d.interrupt_pending());
    }

    #[test]
    fn stopping_the_timer_with_mode_0_withdraws_its_interrupt() {
        let (mut d, _) = machine();
        for (port, v) in [(0x43, 0x34), (0x40, 0), (0x40, 1)] {
            d.port_out(port, 1, v, 0);
        }
        let rise = d.next_deadline(0).unwrap();
        d.run_timers(rise);
        assert!(d.interrupt_pending());
        d.port_out(0x43, 1, 0x30, rise);
        assert!(!d.interrupt_pending());
    }

    #[test]
    fn rtc_interrupts_on_irq8() {
        let (mut d, _) = machine();
        d.port_out(0x70, 1, 0x0b, 0);
        d.port_out(0x71, 1, 0x12, 0);
        let at = d.next_deadline(0).unwrap();
        d.run_timers(at);
        assert_eq!(d.acknowledge(), 0x28);
    }

    #[test]
    fn serial_input_waits_for_the_guest_and_every_byte_arrives() {
        let (mut d, _) = machine();
        d.port_out(0x3fa, 1, 1, 0);
        d.port_out(0x3fc, 1, 8, 0);
        d.port_out(0x3f9, 1, 1, 0);
        let text: Vec<u8> = (0..100).collect();
        assert_eq!(d.serial_input(0, &text), 100);
        let mut got = Vec::new();
        assert_eq!(d.acknowledge(), 0x24);
        while d.port_in(0x3fd, 1, 0) & 1 != 0 {
            got.push(d.port_in(0x3f8, 1, 0) as u8);
        }
        assert_eq!(got, text);
        assert_eq!(d.serial_room(0), SERIAL_INPUT_LIMIT);
        assert_eq!(d.serial_input(1, b"x"), 0, "there is no COM2");
    }

    #[test]
    fn serial_output_reaches_the_sink_and_a_missing_com_floats() {
        let (mut d, sink) = machine();
        d.port_out(0x3f8, 1, u32::from(b'A'), 0);
        assert_eq!(sink.take(), b"A");
        assert_eq!(d.port_in(0x2fd, 1, 0), 0xff);
    }

    #[test]
    fn keyboard_bytes_are_one_interrupt_each() {
        let (mut d, _) = machine();
        d.port_out(0x64, 1, 0x60, 0);
        d.port_out(0x60, 1, 0x41, 0);
        assert!(d.key(&[0x1c]));
        assert!(d.key(&[0xf0, 0x1c]));
        for code in [0x1e, 0x9e] {
            assert_eq!(d.acknowledge(), 0x21);
            assert_eq!(d.port_in(0x60, 1, 0), code);
            eoi(&mut d);
        }
        assert!(!d.interrupt_pending());
    }

    #[test]
    fn every_way_to_reset_is_named_and_the_first_counts() {
        let (mut d, _) = machine();
        d.port_out(0x64, 1, 0xfe, 0);
        d.port_out(0xcf9, 1, 0x06, 0);
        assert_eq!(d.take_reset_request(), Some(ResetCause::I8042));
        assert_eq!(d.take_reset_request(), None);
        d.port_out(0xcf9, 1, 0x02, 0);
        d.port_out(0xcf9, 1, 0x06, 0);
        assert_eq!(d.take_reset_request(), Some(ResetCause::Cf9));
        d.port_out(0x92, 1, 0x03, 0);
        assert_eq!(d.take_reset_request(), Some(ResetCause::Port92));
        d.port_out(0x501, 4, 3, 0);
        assert_eq!(d.take_reset_request(), Some(ResetCause::DebugExit(7)));
    }

    #[test]
    fn pci_has_an_address_register_and_nothing_behind_it() {
        let (mut d, _) = machine();
        d.port_out(0xcfb, 1, 1, 0);
        assert_eq!(d.take_reset_request(), None);
        d.port_out(0xcf8, 4, 0x8000_0000, 0);
        assert_eq!(d.port_in(0xcf8, 4, 0), 0x8000_0000);
        assert_eq!(d.port_in(0xcfc, 4, 0), 0xffff_ffff);
        assert_eq!(d.port_in(0xcfe, 2, 0), 0xffff);
    }

    #[test]
    fn a_word_write_to_the_crtc_is_index_and_data() {
        let (mut d, _) = machine();
        d.port_out(0x3d4, 2, 0x120e, 0);
        d.port_out(0x3d4, 2, 0x340f, 0);
        d.port_out(0x3d4, 1, 0x0e, 0);
        assert_eq!(d.port_in(0x3d5, 1, 0), 0x12);
    }

    #[test]
    fn unknown_ports_float_and_are_counted() {
        let (mut d, _) = machine();
        assert_eq!(d.port_in(0x378, 1, 0), 0xff);
        assert_eq!(d.port_in(0x278, 2, 0), 0xffff);
        assert_eq!(d.port_in(0xffff, 4, 0), 0xff, "the access wraps to port 0, a DMA register");
        d.port_out(0x378, 1, 0, 0);
        assert_eq!(d.port_counts()[&0x378], PortCount { reads: 1, writes: 1, unclaimed: 2 });
    }

    #[test]
    fn a20_is_one_gate_with_two_handles() {
        let (mut d, _) = machine();
        assert!(d.a20());
        d.port_out(0x92, 1, 0, 0);
        assert!(!d.a20());
        d.port_out(0x64, 1, 0xdf, 0);
        assert_eq!(d.port_in(0x92, 1, 0) & 2, 2);
    }

    /// Ports that have a device, and a few that have none.
    fn ports() -> impl proptest::strategy::Strategy<Value = u16> {
        use proptest::prelude::*;
        prop_oneof![
            4 => 0x40u16..0x44,
            2 => 0x60u16..0x72,
            2 => 0x20u16..0x22,
            2 => 0xa0u16..0xa2,
            2 => 0x3f8u16..0x400,
            2 => 0x3b0u16..0x3e0,
            1 => 0u16..0x10,
            1 => 0xcf8u16..0xd00,
            1 => any::<u16>(),
        ]
    }

    proptest::proptest! {
        /// Whatever a guest does to the ports, at whatever times, no device panics, a deadline that has been served is
        /// not asked for again at once, and acknowledging always yields a vector of the two chips.
        #[test]
        fn no_sequence_of_port_accesses_breaks_the_machine(
            ops in proptest::collection::vec((ports(), proptest::bool::ANY, 0u8..3, proptest::num::u32::ANY, 0u32..48), 1..300)
        ) {
            let (mut d, _) = machine();
            let mut now = 0u64;
            for (port, write, size, value, jump) in ops {
                now = now.saturating_add((1u64 << jump) - 1);
                if write {
                    d.port_out(port, 1 << size, value, now);
                } else {
                    let got = d.port_in(port, 1 << size, now);
                    proptest::prop_assert!(size == 2 || got >> (8 << size) == 0);
                }
                d.run_timers(now);
                proptest::prop_assert!(d.next_deadline(now).is_none_or(|at| at > now));
                d.key(&[value as u8]);
                d.serial_input(0, &[value as u8]);
                if d.interrupt_pending() {
                    let vector = d.acknowledge();
                    let bases = [d.pic.master.vector_base(), d.pic.slave.vector_base()];
                    proptest::prop_assert!(bases.contains(&(vector & 0xf8)));
                }
            }
        }
    }
}
