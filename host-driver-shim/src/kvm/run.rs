//! The page a vCPU shares with the kernel (`struct kvm_run`), KVM_RUN, and two calls kvm-ioctls lacks.
//!
//! The kernel and kickers write the page at any moment, so there is no reference into it: fields are copied in and out by
//! volatile accesses. What the kernel says is believed; its lengths are bounded all the same.

use super::kick::ImmediateExit;
use super::{KvmError, KvmState};
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_device_attr, kvm_run,
};
use kvm_ioctls::VcpuFd;
use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// _IO(KVMIO, 80h), _IOW(KVMIO, 86h, struct kvm_interrupt), _IOW(KVMIO, e1h, struct kvm_device_attr).
const KVM_RUN: u64 = 0xae80;
const KVM_INTERRUPT: u64 = 0x4004_ae86;
const KVM_SET_DEVICE_ATTR: u64 = 0x4018_aee1;

/// Why KVM_RUN returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvmExit {
    /// `in`, `ins`: `port_data` is to be answered.
    PortIn {
        /// The port.
        port: u16,
        /// Bytes an access.
        size: u8,
        /// Accesses.
        count: u32,
    },
    /// `out`, `outs`: `port_data` has been written.
    PortOut {
        /// The port.
        port: u16,
        /// Bytes an access.
        size: u8,
        /// Accesses.
        count: u32,
    },
    /// A read of an address that is no slot.
    MmioRead {
        /// GuestPhys.
        at: u64,
        /// Bytes, at most 8.
        len: u8,
    },
    /// A write to an address that is no slot.
    MmioWrite {
        /// GuestPhys.
        at: u64,
        /// What was written.
        data: [u8; 8],
        /// Bytes of it that count.
        len: u8,
    },
    /// `rdmsr`.
    ReadMsr {
        /// ECX.
        msr: u32,
    },
    /// `wrmsr`.
    WriteMsr {
        /// ECX.
        msr: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// `hlt`; RIP is after it.
    Halt,
    /// Maskable interrupts can be delivered now.
    Window,
    /// A triple fault.
    Shutdown,
    /// A signal came, or `immediate_exit` was set.
    Interrupted,
    /// An instruction KVM's emulator does not know; RIP is at it.
    EmulationFailed,
    /// An event could not be delivered because delivery touched what is no memory.
    DeliveryFailed,
    /// The CPU refused the state, with this reason.
    BadState(u64),
    /// A single step or a breakpoint.
    Debug,
    /// Another internal error, or an exit reason of KVM that has no meaning here (then above 2^32).
    Unexpected(u64),
}

pub(super) struct RunPage {
    base: NonNull<kvm_run>,
    len: usize,
    /// KVM_RUN has returned at least once.
    ran: Cell<bool>,
}

// SAFETY: the mapping is owned by the value; every access is a volatile copy.
unsafe impl Send for RunPage {}

/// A copy of a field of the page.
macro_rules! get {
    ($page:expr, $($field:tt)+) => {
        // SAFETY: the page is mapped and at least as large as the structure; the fields are plain numbers, or unions of
        // them, of which any bit pattern is valid.
        unsafe { (&raw const (*$page.base.as_ptr()).$($field)+).read_volatile() }
    };
}

macro_rules! put {
    ($page:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as for reading; the kernel reads the page only during KVM_RUN, but for `immediate_exit`.
        unsafe { (&raw mut (*$page.base.as_ptr()).$($field)+).write_volatile($value) }
    };
}

impl RunPage {
    pub(super) fn map(vcpu: &VcpuFd, len: usize) -> Result<RunPage, KvmError> {
        if len < size_of::<kvm_run>() {
            return Err(KvmError::wrong("KVM_GET_VCPU_MMAP_SIZE", "the page is too small"));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(KvmError::last("mmap of the vCPU"));
        }
        let base = NonNull::new(base.cast()).ok_or(KvmError::wrong("mmap of the vCPU", "address 0"))?;
        Ok(RunPage { base, len, ran: Cell::new(false) })
    }

    pub(super) fn immediate_exit(&self) -> ImmediateExit {
        // SAFETY: a place inside the mapping.
        ImmediateExit(unsafe { &raw mut (*self.base.as_ptr()).immediate_exit })
    }

    pub(super) fn set_immediate_exit(&self, on: bool) {
        put!(self, u8::from(on), immediate_exit);
    }

    pub(super) fn want_window(&self, wanted: bool) {
        put!(self, u8::from(wanted), request_interrupt_window);
    }

    /// Which registers the kernel is to leave in the page at every exit.
    pub(super) fn ask_for_registers(&self, which: u64) {
        put!(self, which, kvm_valid_regs);
    }

    /// The page holds registers.
    pub(super) fn registers_are_there(&self) -> bool {
        self.ran.get()
    }

    pub(super) fn registers(&self) -> KvmState {
        KvmState {
            regs: get!(self, s.regs.regs),
            sregs: get!(self, s.regs.sregs),
            events: get!(self, s.regs.events),
        }
    }

    /// Leaves registers for the next KVM_RUN; those marked are taken over.
    pub(super) fn set_registers(&self, state: &KvmState, (regs, sregs, events): (bool, bool, bool)) {
        let bit = |on: bool, bit: u32| if on { u64::from(bit) } else { 0 };
        put!(self, state.regs, s.regs.regs);
        put!(self, state.sregs, s.regs.sregs);
        put!(self, state.events, s.regs.events);
        let dirty =
            bit(regs, KVM_SYNC_X86_REGS) | bit(sregs, KVM_SYNC_X86_SREGS) | bit(events, KVM_SYNC_X86_EVENTS);
        put!(self, dirty, kvm_dirty_regs);
    }

    /// Events are to be taken over at the next KVM_RUN.
    pub(super) fn events_wait(&self) -> bool {
        get!(self, kvm_dirty_regs) & u64::from(KVM_SYNC_X86_EVENTS) != 0
    }

    /// Adds an external interrupt to the events that are to be taken over.
    pub(super) fn add_interrupt(&self, vector: u8) {
        let mut events = get!(self, s.regs.events);
        (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, vector, 0);
        put!(self, events, s.regs.events);
    }

    pub(super) fn run(&self, vcpu: &VcpuFd) -> Result<KvmExit, KvmError> {
        // SAFETY: runs the guest, which reaches nothing but its slots, all of them guest RAM; the kernel writes the page.
        let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_RUN, 0) };
        if result == 0 {
            self.ran.set(true);
            return Ok(self.exit());
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => {
                self.ran.set(true);
                Ok(KvmExit::Interrupted)
            }
            _ => Err(KvmError { what: "KVM_RUN", why: error }),
        }
    }

    fn exit(&self) -> KvmExit {
        match get!(self, exit_reason) {
            KVM_EXIT_IO => {
                let io = get!(self, __bindgen_anon_1.io);
                let (port, size, count) = (io.port, io.size, io.count);
                if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                    KvmExit::PortOut { port, size, count }
                } else {
                    KvmExit::PortIn { port, size, count }
                }
            }
            KVM_EXIT_MMIO => {
                let mmio = get!(self, __bindgen_anon_1.mmio);
                let (at, len) = (mmio.phys_addr, mmio.len.min(8) as u8);
                if mmio.is_write != 0 {
                    KvmExit::MmioWrite { at, data: mmio.data, len }
                } else {
                    KvmExit::MmioRead { at, len }
                }
            }
            KVM_EXIT_X86_RDMSR => KvmExit::ReadMsr { msr: get!(self, __bindgen_anon_1.msr).index },
            KVM_EXIT_X86_WRMSR => {
                let msr = get!(self, __bindgen_anon_1.msr);
                KvmExit::WriteMsr { msr: msr.index, value: msr.data }
            }
            KVM_EXIT_HLT => KvmExit::Halt,
            KVM_EXIT_IRQ_WINDOW_OPEN => KvmExit::Window,
            KVM_EXIT_SHUTDOWN => KvmExit::Shutdown,
            KVM_EXIT_INTR => KvmExit::Interrupted,
            KVM_EXIT_DEBUG => KvmExit::Debug,
            KVM_EXIT_FAIL_ENTRY => {
                KvmExit::BadState(get!(self, __bindgen_anon_1.fail_entry).hardware_entry_failure_reason)
            }
            KVM_EXIT_INTERNAL_ERROR => match get!(self, __bindgen_anon_1.internal).suberror {
                KVM_INTERNAL_ERROR_EMULATION => KvmExit::EmulationFailed,
                KVM_INTERNAL_ERROR_DELIVERY_EV => KvmExit::DeliveryFailed,
                other => KvmExit::Unexpected(other.into()),
            },
            other => KvmExit::Unexpected((1 << 32) + u64::from(other)),
        }
    }

    /// Offset and length of the bytes of a port exit, inside the mapping.
    fn port_range(&self) -> (usize, usize) {
        let io = get!(self, __bindgen_anon_1.io);
        let offset = usize::try_from(io.data_offset).unwrap_or(usize::MAX).min(self.len);
        let len = (io.count as usize).saturating_mul(io.size.into());
        (offset, len.min(self.len - offset))
    }

    pub(super) fn port_data(&self) -> Vec<u8> {
        let (offset, len) = self.port_range();
        // SAFETY: the range lies inside the mapping.
        let byte = |i| unsafe { self.base.as_ptr().cast::<u8>().add(offset + i).read_volatile() };
        (0..len).map(byte).collect()
    }

    pub(super) fn answer_port(&self, data: &[u8]) {
        let (offset, len) = self.port_range();
        for (i, byte) in data.iter().take(len).enumerate() {
            // SAFETY: the range lies inside the mapping.
            unsafe { self.base.as_ptr().cast::<u8>().add(offset + i).write_volatile(*byte) };
        }
    }

    pub(super) fn answer_mmio(&self, data: &[u8]) {
        let mut all = [0u8; 8];
        for (to, from) in all.iter_mut().zip(data) {
            *to = *from;
        }
        put!(self, all, __bindgen_anon_1.mmio.data);
    }

    pub(super) fn answer_msr(&self, data: Option<u64>) {
        put!(self, u8::from(data.is_none()), __bindgen_anon_1.msr.error);
        if let Some(data) = data {
            put!(self, data, __bindgen_anon_1.msr.data);
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and kickers have been told that it goes.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Queues an external interrupt (KVM_INTERRUPT).
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<(), KvmError> {
    let interrupt = kvm_bindings::kvm_interrupt { irq: vector.into() };
    // SAFETY: the kernel reads the structure.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &raw const interrupt) } {
        0 => Ok(()),
        _ => Err(KvmError::last("KVM_INTERRUPT")),
    }
}

/// Sets an attribute of the vCPU; false where the kernel does not know it.
pub(super) fn set_device_attr(vcpu: &VcpuFd, attribute: &mut kvm_device_attr) -> bool {
    // SAFETY: the kernel reads the structure and the eight bytes it points to, both alive.
    unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const *attribute) == 0 }
}
