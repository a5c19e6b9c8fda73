//! A virtual machine with one virtual CPU on the host's KVM (Linux, Documentation/virt/kvm/api.rst).
//!
//! 1. `mod.rs`: [`KvmVm`]: guest RAM as memory slots, one vCPU, registers, CPUID, which MSR accesses leave the guest.
//! 2. `run`: the shared `kvm_run` page and KVM_RUN; what an exit was ([`KvmExit`]).
//! 3. `kick`, `signal`: how another thread makes KVM_RUN return.
//! 4. `probe`: what the host's `/dev/kvm` is worth.
//!
//! There is no interrupt controller in the kernel: all devices are the monitor's. What is no slot is MMIO.

pub(crate) mod fpu;
mod kick;
mod probe;
mod run;
pub(crate) mod signal;

pub use kick::KvmKicker;
pub use kvm_bindings::{
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_debugregs, kvm_dtable,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
pub use probe::{KvmWorth, probe};
pub use run::KvmExit;
pub(crate) use run::interrupt;

use crate::ram::GuestRam;
use crate::world::CpuidRow;
use kick::Shared;
use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SYNC_REGS, KVM_CAP_X86_MSR_FILTER,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_SYNC_X86_VALID_FIELDS, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, Msrs, kvm_cpuid_entry2, kvm_device_attr, kvm_enable_cap, kvm_msr_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use run::RunPage;
use std::sync::Arc;

/// Guest physical addresses KVM wants for itself on Intel CPUs (a TSS and a page table for real mode): four pages below
/// the BIOS, where QEMU has them, too.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;
/// The CPUID leaf with the widths of addresses: linear ones in EAX bits 8..=15.
const ADDRESS_WIDTHS: u32 = 0x8000_0008;
/// The busy bit in the type of a TSS descriptor.
const TSS_BUSY: u8 = 2;
/// IA32_TSC.
const MSR_TSC: u32 = 0x10;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct KvmError {
    /// Of which call.
    pub what: &'static str,
    /// What the kernel said.
    pub why: std::io::Error,
}

impl KvmError {
    fn new(what: &'static str, errno: i32) -> KvmError {
        KvmError { what, why: std::io::Error::from_raw_os_error(errno) }
    }
    fn last(what: &'static str) -> KvmError {
        KvmError { what, why: std::io::Error::last_os_error() }
    }
    fn wrong(what: &'static str, why: &'static str) -> KvmError {
        KvmError { what, why: std::io::Error::other(why) }
    }
}

/// Attaches the name of the call to an error of kvm-ioctls.
fn named<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, KvmError> {
    result.map_err(|e| KvmError::new(what, e.errno()))
}

/// KVM_CREATE_VM, again where a signal came meanwhile: the kernel gives up with EINTR when one is pending while it attaches
/// the machine to the process's memory (`mm_take_all_locks` in Linux's mm/mmap.c), a stop and continue among them.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            made => return made,
        }
    }
}

/// General registers, system registers and pending events of the vCPU.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct KvmState {
    /// General registers, RIP, RFLAGS.
    pub regs: kvm_regs,
    /// Segments, tables, control registers, EFER.
    pub sregs: kvm_sregs,
    /// Exceptions and interrupts on their way, interrupt shadow.
    pub events: kvm_vcpu_events,
}

/// A virtual machine with guest RAM from address 0 and one virtual CPU.
pub struct KvmVm {
    // In this order: the kernel must have let go of guest RAM before its mapping goes.
    vcpu: VcpuFd,
    vm: VmFd,
    page: RunPage,
    kick: Arc<Shared>,
    /// Registers go through the shared page.
    sync: bool,
    /// Every access to an MSR leaves the guest.
    msrs_leave: bool,
    /// QEMU's TCG (until 9.1) ends itself when it finds a busy TSS in the task register of an SVM guest at an interrupt
    /// from ring 3: it takes the type with the busy bit for invalid.
    tss_never_busy: bool,
    /// Where the TSS is that was set last.
    task: u64,
    /// Without nested paging KVM keeps tables of its own, made from the guest's, and follows what the guest's CPU writes to
    /// those; what anybody else writes it does not see.
    shadows_tables: bool,
    ram: GuestRam,
}

impl KvmVm {
    /// Makes a machine; CPUID answers by `cpuid`.
    pub fn new(ram: &GuestRam, cpuid: &[CpuidRow]) -> Result<KvmVm, KvmError> {
        let kvm = named("/dev/kvm", Kvm::new())?;
        if kvm.get_api_version() != 12 {
            return Err(KvmError::wrong("/dev/kvm", "its API version is not 12"));
        }
        if ram.size() > IDENTITY_MAP {
            return Err(KvmError::wrong("guest RAM", "it reaches to where KVM wants pages for itself"));
        }
        let vm = named("KVM_CREATE_VM", create_vm(&kvm))?;
        named("KVM_SET_IDENTITY_MAP_ADDR", vm.set_identity_map_address(IDENTITY_MAP))?;
        named("KVM_SET_TSS_ADDR", vm.set_tss_address(TSS))?;
        set_ram(&vm, ram, ram.size())?;
        let msrs_leave = msrs_leave(&vm)?;
        if vm.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0 {
            // Else KVM would raise #UD in guest ring 3 where its emulator does not know an instruction.
            enable(&vm, "KVM_CAP_EXIT_ON_EMULATION_FAILURE", KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)?;
        }
        let vcpu = named("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
        set_cpuid(&vcpu, cpuid)?;
        let page = RunPage::map(&vcpu, vm.run_size())?;
        let all = KVM_SYNC_X86_VALID_FIELDS;
        let sync = vm.check_extension_raw(KVM_CAP_SYNC_REGS.into()) as u32 & all == all;
        if sync {
            page.ask_for_registers(all.into());
        }
        let kick = Shared::new(page.immediate_exit())?;
        Ok(KvmVm {
            vcpu,
            vm,
            page,
            kick,
            sync,
            msrs_leave,
            tss_never_busy: emulated_by_tcg(),
            task: 0,
            shadows_tables: !nested_paging(),
            ram: ram.clone(),
        })
    }

    /// Every access of the guest to an MSR is an exit. Otherwise KVM answers as it likes.
    #[must_use]
    pub fn msrs_leave(&self) -> bool {
        self.msrs_leave
    }

    /// Registers go through the shared page and cost no system call.
    #[must_use]
    pub fn registers_are_shared(&self) -> bool {
        self.sync
    }

    /// For other threads.
    #[must_use]
    pub fn kicker(&self) -> KvmKicker {
        KvmKicker(self.kick.clone())
    }

    /// Runs the guest until an exit. The answer to a read (`answer`) is due before the next call.
    pub fn run(&mut self) -> Result<KvmExit, KvmError> {
        self.kick.enter();
        let exit = self.page.run(&self.vcpu)?;
        if exit == KvmExit::Interrupted {
            self.kick.take();
        }
        Ok(exit)
    }

    /// Completes the instruction of a port, MMIO or MSR exit without running another one. Yields an exit where the same
    /// instruction has one more.
    pub fn complete(&mut self) -> Result<Option<KvmExit>, KvmError> {
        self.page.set_immediate_exit(true);
        let exit = self.page.run(&self.vcpu);
        self.kick.restore(&self.page);
        Ok(Some(exit?).filter(|exit| *exit != KvmExit::Interrupted))
    }

    /// The bytes of the port exit just returned: written by the guest, or to be answered.
    #[must_use]
    pub fn port_data(&self) -> Vec<u8> {
        self.page.port_data()
    }

    /// Answers the port exit just returned.
    pub fn answer_port(&mut self, data: &[u8]) {
        self.page.answer_port(data);
    }

    /// Answers the MMIO read just returned.
    pub fn answer_mmio(&mut self, data: &[u8]) {
        self.page.answer_mmio(data);
    }

    /// Answers the MSR access just returned; None: #GP.
    pub fn answer_msr(&mut self, data: Option<u64>) {
        self.page.answer_msr(data);
    }

    /// Makes KVM_RUN return when maskable interrupts can be delivered.
    pub fn want_window(&mut self, wanted: bool) {
        self.page.want_window(wanted);
    }

    /// Delivers an external interrupt before the next instruction. The guest must be ready for it.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), KvmError> {
        if self.sync && self.page.events_wait() {
            // Events that are taken over at the next KVM_RUN would wipe it out: it goes with them.
            self.page.add_interrupt(vector);
            return Ok(());
        }
        interrupt(&self.vcpu, vector)
    }

    /// The registers after the last exit.
    pub fn state(&self) -> Result<KvmState, KvmError> {
        if self.sync && self.page.registers_are_there() {
            return Ok(self.page.registers());
        }
        Ok(KvmState {
            regs: named("KVM_GET_REGS", self.vcpu.get_regs())?,
            sregs: named("KVM_GET_SREGS", self.vcpu.get_sregs())?,
            events: named("KVM_GET_VCPU_EVENTS", self.vcpu.get_vcpu_events())?,
        })
    }

    /// Sets what differs from `was`, which the vCPU has now.
    pub fn set_state(&mut self, was: &KvmState, new: &KvmState) -> Result<(), KvmError> {
        let mut dirty = (was.regs != new.regs, was.sregs != new.sregs, was.events != new.events);
        let mut new = *new;
        if self.tss_never_busy {
            // KVM always reports it busy. If it is another one, KVM may have made it so, in a task switch.
            new.sregs.tr.type_ &= !TSS_BUSY;
            dirty.1 |= self.task != new.sregs.tr.base;
            self.task = new.sregs.tr.base;
        }
        if self.sync {
            self.page.set_registers(&new, dirty);
            return Ok(());
        }
        if dirty.0 {
            named("KVM_SET_REGS", self.vcpu.set_regs(&new.regs))?;
        }
        if dirty.1 {
            named("KVM_SET_SREGS", self.vcpu.set_sregs(&new.sregs))?;
        }
        if dirty.2 {
            named("KVM_SET_VCPU_EVENTS", self.vcpu.set_vcpu_events(&new.events))?;
        }
        Ok(())
    }

    /// KVM does not notice what others than the guest's CPU write to page tables: after that a flush is due.
    #[must_use]
    pub fn shadows_tables(&self) -> bool {
        self.shadows_tables
    }

    /// Sets all registers at once; the guest's TLB is flushed (another CR0.WP in between makes KVM start over).
    pub fn set_state_and_flush(&mut self, new: &KvmState) -> Result<(), KvmError> {
        const WP: u64 = 1 << 16;
        if self.shadows_tables {
            // KVM would keep its tables, and use them again.
            set_ram(&self.vm, &self.ram, 0)?;
            set_ram(&self.vm, &self.ram, self.ram.size())?;
        }
        let mut new = *new;
        if self.tss_never_busy {
            new.sregs.tr.type_ &= !TSS_BUSY;
        }
        let mut other = new.sregs;
        other.cr0 ^= WP;
        named("KVM_SET_SREGS", self.vcpu.set_sregs(&other))?;
        named("KVM_SET_SREGS", self.vcpu.set_sregs(&new.sregs))?;
        named("KVM_SET_REGS", self.vcpu.set_regs(&new.regs))?;
        named("KVM_SET_VCPU_EVENTS", self.vcpu.set_vcpu_events(&new.events))?;
        if self.sync {
            self.page.set_registers(&new, (false, false, false));
        }
        Ok(())
    }

    /// x87 and SSE state in the 512-byte FXSAVE64 format.
    pub fn fpu(&self) -> Result<[u8; 512], KvmError> {
        named("KVM_GET_XSAVE", fpu::get(&self.vcpu))
    }

    /// Sets x87 and SSE state from the 512-byte FXSAVE64 format.
    pub fn set_fpu(&mut self, image: &[u8; 512]) -> Result<(), KvmError> {
        named("KVM_SET_XSAVE", fpu::set(&self.vcpu, image))
    }

    /// DR0-DR3, DR6, DR7.
    pub fn debug_registers(&self) -> Result<kvm_debugregs, KvmError> {
        named("KVM_GET_DEBUGREGS", self.vcpu.get_debug_regs())
    }

    /// Sets DR0-DR3, DR6, DR7.
    pub fn set_debug_registers(&mut self, registers: &kvm_debugregs) -> Result<(), KvmError> {
        named("KVM_SET_DEBUGREGS", self.vcpu.set_debug_regs(registers))
    }

    /// The guest's time-stamp counter is the host's plus `offset`.
    pub fn set_tsc_offset(&mut self, offset: i64) -> Result<(), KvmError> {
        let mut attribute = kvm_device_attr {
            flags: 0,
            group: KVM_VCPU_TSC_CTRL,
            attr: KVM_VCPU_TSC_OFFSET.into(),
            addr: (&raw const offset) as u64,
        };
        if run::set_device_attr(&self.vcpu, &mut attribute) {
            return Ok(());
        }
        // Linux before 5.16: as near as two readings get.
        let data = crate::tsc::read().wrapping_add_signed(offset);
        let entry = kvm_msr_entry { index: MSR_TSC, reserved: 0, data };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| KvmError::new("KVM_SET_MSRS", libc::EINVAL))?;
        match named("KVM_SET_MSRS", self.vcpu.set_msrs(&msrs))? {
            1 => Ok(()),
            _ => Err(KvmError::wrong("KVM_SET_MSRS", "it does not take the time-stamp counter")),
        }
    }

    /// Stops after each instruction with [`KvmExit::Debug`], or no more.
    pub fn single_step(&mut self, on: bool) -> Result<(), KvmError> {
        use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug};
        let control = if on { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP } else { 0 };
        let debug = kvm_guest_debug { control, ..kvm_guest_debug::default() };
        named("KVM_SET_GUEST_DEBUG", self.vcpu.set_guest_debug(&debug))
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        // Other threads keep kickers.
        self.kick.close();
    }
}

fn enable(vm: &VmFd, what: &'static str, cap: u32, argument: u64) -> Result<(), KvmError> {
    let mut request = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
    request.args[0] = argument;
    named(what, vm.enable_cap(&request))
}

/// Arranges that every access of the guest to an MSR is an exit, if this kernel can (5.10 and later).
fn msrs_leave(vm: &VmFd) -> Result<bool, KvmError> {
    let able = |cap: u32| vm.check_extension_raw(cap.into()) > 0;
    if !able(KVM_CAP_X86_USER_SPACE_MSR) || !able(KVM_CAP_X86_MSR_FILTER) {
        return Ok(false);
    }
    let reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN;
    enable(vm, "KVM_CAP_X86_USER_SPACE_MSR", KVM_CAP_X86_USER_SPACE_MSR, reasons.into())?;
    // A filter that denies everything needs one range, which denies, too.
    let range = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: MSR_TSC,
        msr_count: 1,
        bitmap: &[0],
    };
    named("KVM_X86_SET_MSR_FILTER", vm.set_msr_filter(MsrFilterDefaultAction::DENY, &[range]))?;
    Ok(true)
}

/// Makes the first `size` bytes of guest RAM the machine's memory from address 0.
fn set_ram(vm: &VmFd, ram: &GuestRam, size: u64) -> Result<(), KvmError> {
    assert!(size <= ram.size());
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: size,
        userspace_addr: ram.shared().address(),
    };
    // SAFETY: the range lies in the mapping of guest RAM, which nothing in this process holds references into, and
    // which stays until after the machine is gone (`KvmVm::ram`).
    named("KVM_SET_USER_MEMORY_REGION", unsafe { vm.set_user_memory_region(slot) })
}

/// KVM has the hardware walk the guest's page tables (EPT, NPT). Modules that are not there (built into the kernel, or
/// another hypervisor behind the node) have nothing to say.
pub(crate) fn nested_paging() -> bool {
    let off = |path: &str| std::fs::read_to_string(path).is_ok_and(|text| matches!(text.trim(), "N" | "0"));
    !off("/sys/module/kvm_amd/parameters/npt") && !off("/sys/module/kvm_intel/parameters/ept")
}

/// The CPU this process runs on is QEMU's TCG, by its hypervisor leaf (QEMU, target/i386/cpu.c).
fn emulated_by_tcg() -> bool {
    const HYPERVISOR: u32 = 1 << 31;
    let present = std::arch::x86_64::__cpuid(1).ecx & HYPERVISOR != 0;
    let r = std::arch::x86_64::__cpuid(0x4000_0000);
    let name = [r.ebx, r.ecx, r.edx].map(u32::to_le_bytes);
    present && name.as_flattened() == b"TCGTCGTCGTCG"
}

fn set_cpuid(vcpu: &VcpuFd, rows: &[CpuidRow]) -> Result<(), KvmError> {
    let entry = |row: &CpuidRow| {
        let [mut eax, ebx, ecx, edx] = row.registers;
        if row.leaf == ADDRESS_WIDTHS {
            // KVM takes no other width of linear addresses than 48, 57 and none.
            eax = eax & !0xff00 | 48 << 8;
        }
        kvm_cpuid_entry2 {
            function: row.leaf,
            index: row.subleaf,
            flags: if row.any_subleaf == 0 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax,
            ebx,
            ecx,
            edx,
            padding: [0; 3],
        }
    };
    let entries: Vec<_> = rows.iter().map(entry).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| KvmError::new("KVM_SET_CPUID2", libc::E2BIG))?;
    named("KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid))
}
