//! National Semiconductor NS16550A UART (COM1-COM4).
//!
//! Source: PC16550D datasheet (National Semiconductor, June 1995), 8.1-8.11; IBM PS/2 Hardware Interface Technical
//! Reference for OUT2 as the gate of the interrupt line.
//!
//! There is no baud rate: a byte written is sent at once, so the transmitter is always empty, and the character timeout
//! elapses at once, so data below the trigger level interrupts without delay. Not emulated: DMA mode, parity and framing
//! errors.

use std::collections::VecDeque;
use std::io::Write;

/// Base ports of COM1-COM4.
pub const COM_PORTS: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
/// IRQs of COM1-COM4.
pub const COM_IRQS: [u8; 4] = [4, 3, 4, 3];
/// Receiver FIFO depth, bytes.
pub const FIFO_DEPTH: usize = 16;

const IER_RDA_BIT: u8 = 0x01;
const IER_THRE_BIT: u8 = 0x02;
const IER_RLS_BIT: u8 = 0x04;
const IER_MS_BIT: u8 = 0x08;
const IER_VALID: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_RLS: u8 = 0x06;
const IIR_RDA: u8 = 0x04;
const IIR_CTI: u8 = 0x0c;
const IIR_THRE: u8 = 0x02;
const IIR_MS: u8 = 0x00;
const IIR_FIFO_BITS: u8 = 0xc0;

const FCR_ENABLE_BIT: u8 = 0x01;
const FCR_RCVR_RESET_BIT: u8 = 0x02;

const LCR_DLAB_BIT: u8 = 0x80;

const MCR_DTR_BIT: u8 = 0x01;
const MCR_RTS_BIT: u8 = 0x02;
const MCR_OUT1_BIT: u8 = 0x04;
const MCR_OUT2_BIT: u8 = 0x08;
const MCR_LOOP_BIT: u8 = 0x10;

const LSR_DR_BIT: u8 = 0x01;
const LSR_OE_BIT: u8 = 0x02;
const LSR_BI_BIT: u8 = 0x10;
const LSR_THRE_BIT: u8 = 0x20;
const LSR_TEMT_BIT: u8 = 0x40;
const LSR_FIFO_ERROR_BIT: u8 = 0x80;
const LSR_ERROR_BITS: u8 = 0x1e;

const MSR_CTS_BIT: u8 = 0x10;
const MSR_DSR_BIT: u8 = 0x20;
const MSR_RI_BIT: u8 = 0x40;
const MSR_DCD_BIT: u8 = 0x80;
const MSR_TERI_BIT: u8 = 0x04;

/// Where a UART's output goes. `transmit` is called on the virtual CPU's thread and must not block for long.
pub trait SerialSink: Send {
    /// One byte leaves the transmitter.
    fn transmit(&mut self, byte: u8);
}

/// Any writer is a sink; errors lose the byte, as a cable nobody listens to does.
pub struct WriterSink<W: Write + Send>(pub W);

impl<W: Write + Send> SerialSink for WriterSink<W> {
    fn transmit(&mut self, byte: u8) {
        let _ = self.0.write_all(&[byte]);
    }
}

/// A line nobody listens to.
#[derive(Clone, Copy, Debug)]
pub struct NullSink;

impl SerialSink for NullSink {
    fn transmit(&mut self, _byte: u8) {}
}

/// Keeps what was sent; clones share it.
#[derive(Clone, Debug, Default)]
pub struct CaptureSink(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl CaptureSink {
    /// What was sent since the last call.
    #[must_use]
    pub fn take(&self) -> Vec<u8> {
        self.0.lock().map(|mut bytes| std::mem::take(&mut *bytes)).unwrap_or_default()
    }
}

impl SerialSink for CaptureSink {
    fn transmit(&mut self, byte: u8) {
        if let Ok(mut bytes) = self.0.lock() {
            bytes.push(byte);
        }
    }
}

/// The registers of a UART.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SerialState {
    divisor: u16,
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    /// OE, BI: the bits of LSR that reading clears.
    line_errors: u8,
    /// Modem inputs as they were last seen (bits 4-7) and their changes (bits 0-3).
    msr: u8,
    fifo_enabled: bool,
    trigger: usize,
    receiver: VecDeque<u8>,
    /// THR became empty (or its interrupt was enabled while empty) and IIR has not told yet.
    thre_pending: bool,
}

/// One UART.
pub struct Serial {
    state: SerialState,
    sink: Box<dyn SerialSink>,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
}

impl Serial {
    /// After a master reset, with a modem that is connected and ready on the line.
    #[must_use]
    pub fn new(sink: Box<dyn SerialSink>) -> Serial {
        let state = SerialState {
            divisor: 12, // 9600 baud
            msr: MSR_CTS_BIT | MSR_DSR_BIT | MSR_DCD_BIT,
            trigger: 1,
            ..SerialState::default()
        };
        Serial { state, sink, sent: 0, received: 0 }
    }

    /// The registers, to be saved.
    #[must_use]
    pub fn state(&self) -> &SerialState {
        &self.state
    }

    /// Puts saved registers back.
    pub fn restore(&mut self, state: SerialState) {
        self.state = state;
    }

    fn dlab(&self) -> bool {
        self.state.lcr & LCR_DLAB_BIT != 0
    }

    fn depth(&self) -> usize {
        if self.state.fifo_enabled { FIFO_DEPTH } else { 1 }
    }

    /// The highest of the pending and enabled interrupts, as IIR bits 3-0 (datasheet, table IV).
    fn interrupt(&self) -> u8 {
        let s = &self.state;
        let enabled = |bit: u8| s.ier & bit != 0;
        if enabled(IER_RLS_BIT) && s.line_errors != 0 {
            IIR_RLS
        } else if enabled(IER_RDA_BIT) && !s.receiver.is_empty() {
            if !s.fifo_enabled || s.receiver.len() >= s.trigger { IIR_RDA } else { IIR_CTI }
        } else if enabled(IER_THRE_BIT) && s.thre_pending {
            IIR_THRE
        } else if enabled(IER_MS_BIT) && s.msr & 0x0f != 0 {
            IIR_MS
        } else {
            IIR_NONE
        }
    }

    /// Level of the interrupt line. OUT2 gates it; in loopback OUT2 is forced inactive.
    #[must_use]
    pub fn irq(&self) -> bool {
        self.state.mcr & (MCR_OUT2_BIT | MCR_LOOP_BIT) == MCR_OUT2_BIT && self.interrupt() != IIR_NONE
    }

    /// Byte read of register `offset` (0-7).
    pub fn read(&mut self, offset: u8) -> u8 {
        let dlab = self.dlab();
        match offset & 7 {
            0 if dlab => self.state.divisor as u8,
            0 => self.state.receiver.pop_front().unwrap_or(0),
            1 if dlab => (self.state.divisor >> 8) as u8,
            1 => self.state.ier,
            2 => {
                let id = self.interrupt();
                if id == IIR_THRE {
                    self.state.thre_pending = false;
                }
                id | if self.state.fifo_enabled { IIR_FIFO_BITS } else { 0 }
            }
            3 => self.state.lcr,
            4 => self.state.mcr,
            5 => {
                let errors = std::mem::take(&mut self.state.line_errors);
                let data = if self.state.receiver.is_empty() { 0 } else { LSR_DR_BIT };
                let fifo =
                    if self.state.fifo_enabled && errors & LSR_BI_BIT != 0 { LSR_FIFO_ERROR_BIT } else { 0 };
                LSR_THRE_BIT | LSR_TEMT_BIT | (errors & LSR_ERROR_BITS) | data | fifo
            }
            6 => {
                let msr = self.state.msr;
                self.state.msr &= 0xf0;
                msr
            }
            _ => self.state.scr,
        }
    }

    /// Byte write of register `offset` (0-7).
    pub fn write(&mut self, offset: u8, value: u8) {
        let dlab = self.dlab();
        let s = &mut self.state;
        match offset & 7 {
            0 if dlab => s.divisor = s.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(value),
            1 if dlab => s.divisor = s.divisor & 0x00ff | u16::from(value) << 8,
            1 => {
                let risen = value & !s.ier;
                s.ier = value & IER_VALID;
                // Enabling the interrupt while THR is empty interrupts at once: Linux' 8250 driver tests for it.
                if risen & IER_THRE_BIT != 0 {
                    s.thre_pending = true;
                }
            }
            2 => {
                let enable = value & FCR_ENABLE_BIT != 0;
                if enable != s.fifo_enabled || (enable && value & FCR_RCVR_RESET_BIT != 0) {
                    s.receiver.clear();
                }
                s.fifo_enabled = enable;
                s.trigger = if enable { [1, 4, 8, 14][usize::from(value >> 6)] } else { 1 };
            }
            3 => s.lcr = value,
            4 => {
                s.mcr = value & 0x1f;
                self.update_modem_inputs();
            }
            5 | 6 => {} // factory test only
            _ => s.scr = value,
        }
    }

    fn transmit(&mut self, byte: u8) {
        if self.state.mcr & MCR_LOOP_BIT != 0 {
            self.receive_byte(byte);
        } else {
            self.sent += 1;
            self.sink.transmit(byte);
        }
        self.state.thre_pending = true;
    }

    /// Loopback feeds the modem outputs back; otherwise the line's modem is there and ready.
    fn update_modem_inputs(&mut self) {
        let s = &mut self.state;
        let inputs = if s.mcr & MCR_LOOP_BIT != 0 {
            [
                (MCR_RTS_BIT, MSR_CTS_BIT),
                (MCR_DTR_BIT, MSR_DSR_BIT),
                (MCR_OUT1_BIT, MSR_RI_BIT),
                (MCR_OUT2_BIT, MSR_DCD_BIT),
            ]
            .iter()
            .filter(|(out, _)| s.mcr & out != 0)
            .fold(0, |m, (_, input)| m | input)
        } else {
            MSR_CTS_BIT | MSR_DSR_BIT | MSR_DCD_BIT
        };
        let old = s.msr & 0xf0;
        let mut delta = (old ^ inputs) >> 4;
        // TERI is the trailing edge of RI only.
        if old & MSR_RI_BIT == 0 || inputs & MSR_RI_BIT != 0 {
            delta &= !MSR_TERI_BIT;
        }
        s.msr = inputs | s.msr & 0x0f | delta;
    }

    /// Whether [`receive`](Serial::receive) would take a byte without an overrun.
    #[must_use]
    pub fn can_receive(&self) -> bool {
        self.state.mcr & MCR_LOOP_BIT == 0 && self.state.receiver.len() < self.depth()
    }

    /// A byte arrives on the line. False if it cannot be taken now: keep it and try again after the guest has read.
    pub fn receive(&mut self, byte: u8) -> bool {
        let taken = self.can_receive();
        if taken {
            self.received += 1;
            self.receive_byte(byte);
        }
        taken
    }

    /// A break condition arrives: a zero byte with BI.
    pub fn receive_break(&mut self) {
        if self.receive(0) {
            self.state.line_errors |= LSR_BI_BIT;
        }
    }

    fn receive_byte(&mut self, byte: u8) {
        let depth = self.depth();
        let s = &mut self.state;
        if s.receiver.len() >= depth {
            s.line_errors |= LSR_OE_BIT;
            // With the FIFO the new character is lost, without it the old one is overwritten (datasheet 8.6.2).
            if s.fifo_enabled {
                return;
            }
            s.receiver.clear();
        }
        s.receiver.push_back(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uart() -> (Serial, CaptureSink) {
        let sink = CaptureSink::default();
        (Serial::new(Box::new(sink.clone())), sink)
    }

    #[test]
    fn a_byte_written_is_sent_and_the_transmitter_is_empty_again() {
        let (mut s, sink) = uart();
        for b in b"hi\n" {
            assert_eq!(s.read(5), LSR_THRE_BIT | LSR_TEMT_BIT);
            s.write(0, *b);
        }
        assert_eq!(sink.take(), b"hi\n");
    }

    #[test]
    fn dlab_shows_the_divisor_and_hides_data() {
        let (mut s, sink) = uart();
        s.write(3, 0x83);
        s.write(0, 0x01);
        s.write(1, 0x02);
        assert_eq!((s.read(0), s.read(1)), (1, 2));
        s.write(3, 0x03);
        assert_eq!((s.read(0), s.read(1)), (0, 0));
        assert_eq!(sink.take(), b"");
    }

    #[test]
    fn linux_autoconfig_finds_a_16550a() {
        // drivers/tty/serial/8250/8250_port.c, autoconfig.
        let (mut s, _) = uart();
        s.write(1, 0);
        assert_eq!(s.read(1), 0);
        s.write(1, 0x0f);
        assert_eq!(s.read(1) & 0x0f, 0x0f);
        s.write(1, 0x40);
        assert_eq!(s.read(1), 0, "no UUE bit: no XScale UART");
        s.write(4, MCR_LOOP_BIT | 0x0a);
        assert_eq!(s.read(6) & 0xf0, 0x90);
        s.write(4, 0);
        s.write(2, FCR_ENABLE_BIT);
        assert_eq!(s.read(2) >> 6, 3);
        s.write(7, 0xa5);
        assert_eq!(s.read(7), 0xa5);
    }

    #[test]
    fn enabling_thri_on_an_empty_transmitter_interrupts_every_time_and_iir_clears_it() {
        let (mut s, _) = uart();
        s.write(4, MCR_OUT2_BIT);
        for _ in 0..2 {
            s.write(1, IER_THRE_BIT);
            assert!(s.irq());
            assert_eq!(s.read(2), IIR_THRE);
            assert_eq!(s.read(2), IIR_NONE);
            assert!(!s.irq());
            s.write(1, 0);
        }
        s.write(1, IER_THRE_BIT);
        s.read(2);
        s.write(0, b'x');
        assert!(s.irq(), "the byte is gone: empty again");
    }

    #[test]
    fn out2_gates_the_interrupt_line_but_not_iir() {
        let (mut s, _) = uart();
        s.write(1, IER_THRE_BIT);
        assert!(!s.irq());
        assert_eq!(s.read(2), IIR_THRE);
    }

    #[test]
    fn receive_takes_what_fits_and_says_no_after_that() {
        let (mut s, _) = uart();
        assert!(s.receive(1));
        assert!(!s.receive(2), "without FIFO there is room for one");
        s.write(2, FCR_ENABLE_BIT);
        for b in 0..16 {
            assert!(s.receive(b));
        }
        assert!(!s.can_receive());
        assert_eq!(s.read(5) & (LSR_DR_BIT | LSR_OE_BIT), LSR_DR_BIT);
        assert_eq!((0..16).map(|_| s.read(0)).collect::<Vec<_>>(), (0..16).collect::<Vec<u8>>());
        assert_eq!(s.read(5) & LSR_DR_BIT, 0);
    }

    #[test]
    fn data_below_the_trigger_level_is_a_character_timeout() {
        let (mut s, _) = uart();
        s.write(4, MCR_OUT2_BIT);
        s.write(2, FCR_ENABLE_BIT | 0x40);
        s.write(1, IER_RDA_BIT);
        s.receive(1);
        assert_eq!(s.read(2) & 0x0f, IIR_CTI);
        for b in 0..3 {
            s.receive(b);
        }
        assert_eq!(s.read(2) & 0x0f, IIR_RDA);
        assert!(s.irq());
        for _ in 0..4 {
            s.read(0);
        }
        assert!(!s.irq());
    }

    #[test]
    fn loopback_returns_data_and_overruns() {
        let (mut s, sink) = uart();
        s.write(4, MCR_LOOP_BIT | MCR_OUT2_BIT);
        s.write(1, IER_RLS_BIT);
        s.write(0, 0x55);
        s.write(0, 0x66);
        assert_eq!(s.read(2) & 0x0f, IIR_RLS);
        assert!(!s.irq(), "OUT2 is forced inactive in loopback");
        assert_eq!(s.read(5) & LSR_OE_BIT, LSR_OE_BIT);
        assert_eq!(s.read(5) & LSR_OE_BIT, 0, "reading LSR clears it");
        assert_eq!(s.read(0), 0x66);
        assert_eq!(sink.take(), b"");
    }

    #[test]
    fn modem_status_changes_interrupt_until_msr_is_read() {
        let (mut s, _) = uart();
        s.write(1, IER_MS_BIT);
        s.write(4, MCR_LOOP_BIT | MCR_OUT1_BIT);
        s.read(6);
        s.write(4, MCR_LOOP_BIT);
        assert_eq!(s.read(2), IIR_MS);
        assert_eq!(s.read(6), MSR_TERI_BIT);
        assert_eq!(s.read(2), IIR_NONE);
    }

    #[test]
    fn a_break_is_reported_once_with_a_zero_byte() {
        let (mut s, _) = uart();
        s.receive_break();
        assert_eq!(s.read(5) & (LSR_BI_BIT | LSR_DR_BIT), LSR_BI_BIT | LSR_DR_BIT);
        assert_eq!(s.read(5) & LSR_BI_BIT, 0);
        assert_eq!(s.read(0), 0);
    }
}
