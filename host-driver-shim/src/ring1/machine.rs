//! The virtual machine that carries the monitor: one vCPU, three memory slots, no devices.
//!
//! 1. [`Machine::new`]: what is asked of KVM, and what is said where something is missing.
//! 2. [`Machine::run`]: from a [`Frame`] to the next. The vCPU stands behind an `out` of the monitor's whenever it is not
//!    running, so all that goes to and fro is in the monitor's state page.
//! 3. [`Bell`]: how another thread makes it leave guest code: by an interrupt, so that the guest's registers come out
//!    the same way as ever.
//! 4. [`Machine::rescued`]: what KVM could not carry out for guest code is taken out of the vCPU's registers instead.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, Msrs, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};

use super::monitor::{self, Descriptor, FRAME, FRAME_WORDS, Frame};
use super::reflect::Reflect;
use super::tables::Pool;
use crate::kvm::nested_paging;
use crate::kvm::{create_vm, fpu, interrupt, signal};
use crate::shared::SharedMap;
use crate::world::WorldError;

/// GuestPhys, in the virtual machine, of code memory and of guest RAM. The monitor's memory is at 0, below 4 GiB as CR3
/// of PAE paging wants it.
pub(super) const CODE_AT: u64 = 0x8000_0000;
pub(super) const RAM_AT: u64 = 0x1_0000_0000;

/// CR0: PE, MP, ET, NE, WP, AM, PG. CR4: PAE, OSFXSR, OSXMMEXCPT. EFER: NXE.
const CR0: u64 = 0x8005_0033;
const CR0_PG: u64 = 1 << 31;
const CR4: u64 = 0x620;
const CR4_TSD: u64 = 1 << 2;
const CR4_UMIP: u64 = 1 << 11;
const CR4_SMEP: u64 = 1 << 20;
/// CPUID leaf 7, EBX.
const CPUID_SMEP: u32 = 1 << 7;
const EFER: u64 = 0x800;
/// MSR_MISC_FEATURES_ENABLES: bit 0 makes CPUID fault outside ring 0.
const MISC_FEATURES_ENABLES: u32 = 0x140;
/// Types of a TSS. VMX wants it busy (SDM vol. 3, 26.3.1.2). For SVM the type does not matter, but QEMU's emulation of
/// it takes a stack from an available one only.
const TSS_AVAILABLE: u8 = 9;
const TSS_BUSY: u8 = 11;

/// Why the vCPU came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Exit {
    /// By the monitor's way out, or rescued: the frame is that of guest code.
    Guest,
    /// The frame could not be loaded: the vector and the error code.
    BadState(u32, u32),
    /// A kick that came before guest code ran.
    Kicked,
}

#[derive(Debug)]
pub(super) struct Machine {
    vcpu: VcpuFd,
    bell: Arc<Bell>,
    pool: Pool,
    /// Pages of the pool that all worlds show in their region.
    tables_page: u64,
    state_page: u64,
    /// What the parts of SREGS nobody sets were after creation.
    template: kvm_sregs,
    tss_kind: u8,
    /// Where the region is; None: the vCPU has to be put into the monitor anew.
    region: Option<u32>,
    /// What the tables page says the monitor may do by itself.
    reflect: Option<Reflect>,
    /// CR3 of the world that ran last; 0: it has to be loaded.
    cr3: u32,
    /// CPUID raises #GP outside ring 0.
    pub(super) cpuid_faults: bool,
    /// The vCPU has SMEP, and uses it.
    pub(super) smep: bool,
    /// Guest code is not to read the time-stamp counter.
    trap_tsc: bool,
    /// For as long as the vCPU: KVM maps their memory.
    _vm: VmFd,
    _slots: [Arc<SharedMap>; 2],
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> WorldError {
    move |e| WorldError::Host { what, source: io::Error::from_raw_os_error(e.errno()) }
}

fn lacks(what: &'static str, why: &str) -> WorldError {
    WorldError::Host { what, source: io::Error::other(String::from(why)) }
}

impl Machine {
    /// A machine with the pool, guest RAM and code memory in place, about to run for the first time.
    pub(super) fn new(
        pool: &Pool,
        state_page: u64,
        tables_page: u64,
        ram: &Arc<SharedMap>,
        code: &Arc<SharedMap>,
    ) -> Result<Machine, WorldError> {
        let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
        // Else it would keep tables of its own, and not see what we write to ours.
        if !nested_paging() {
            return Err(lacks("/dev/kvm", "the kvm module runs without nested paging (EPT or NPT)"));
        }
        let vm = create_vm(&kvm).map_err(failed("making a virtual machine"))?;
        let code_flags = if kvm.check_extension(Cap::ReadonlyMem) { KVM_MEM_READONLY } else { 0 };
        for (slot, (map, at, flags)) in
            (0..).zip([(pool.map(), 0, 0), (&**code, CODE_AT, code_flags), (&**ram, RAM_AT, 0)])
        {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: at,
                memory_size: map.len() as u64,
                userspace_addr: map.base().addr().get() as u64,
            };
            // SAFETY: the object stays mapped where it is as long as `_slots` and `pool` live, which is longer than `vm`
            // does. What the guest does to it, others may do at any time anyway (`SharedMap`).
            unsafe { vm.set_user_memory_region(region) }
                .map_err(failed("giving memory to a virtual machine"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(failed("making a vCPU"))?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("asking KVM for its CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("setting a vCPU's CPUID"))?;
        let smep =
            cpuid.as_slice().iter().any(|e| (e.function, e.index) == (7, 0) && e.ebx & CPUID_SMEP != 0);
        let faulting = kvm_msr_entry { index: MISC_FEATURES_ENABLES, data: 1, ..kvm_msr_entry::default() };
        let cpuid_faults =
            Msrs::from_entries(&[faulting]).is_ok_and(|msrs| vcpu.set_msrs(&msrs).is_ok_and(|n| n == 1));
        let template = vcpu.get_sregs().map_err(failed("reading a vCPU's registers"))?;
        let bell = Arc::new(
            Bell::new(&vcpu)
                .map_err(|source| WorldError::Host { what: "mapping a vCPU's control page", source })?,
        );
        Ok(Machine {
            vcpu,
            bell,
            pool: pool.clone(),
            tables_page,
            state_page,
            template,
            tss_kind: if is_svm() { TSS_AVAILABLE } else { TSS_BUSY },
            region: None,
            reflect: None,
            cr3: 0,
            cpuid_faults,
            smep,
            trap_tsc: false,
            _vm: vm,
            _slots: [Arc::clone(ram), Arc::clone(code)],
        })
    }

    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// From the next run on, `rdtsc` raises #GP outside ring 0 (CR4.TSD, SDM Vol. 3A, 2.5).
    pub(super) fn trap_tsc(&mut self) {
        self.trap_tsc = true;
        self.region = None;
    }

    /// The tables at `cr3` are about to go.
    pub(super) fn leave_world(&mut self, cr3: u32) {
        if self.cr3 == cr3 {
            self.region = None;
        }
    }

    /// Where the region is, if the vCPU is in the monitor.
    pub(super) fn region(&self) -> Option<u32> {
        self.region
    }

    /// The x87 and SSE state the vCPU has.
    pub(super) fn fpu(&self) -> Result<[u8; 512], WorldError> {
        fpu::get(&self.vcpu).map_err(failed("reading the FPU state"))
    }

    pub(super) fn set_fpu(&self, fx: &[u8; 512]) -> Result<(), WorldError> {
        fpu::set(&self.vcpu, fx).map_err(failed("loading the FPU state"))
    }

    fn word_at(&self, offset: u32) -> u64 {
        self.state_page + u64::from(offset - monitor::STATE)
    }

    fn set_frame(&self, frame: &[u32; FRAME_WORDS]) {
        for (i, word) in (0..).zip(frame) {
            let _in_range = self.pool.map().write_u32(self.word_at(FRAME + 4 * i), *word);
        }
    }

    fn set_reflect(&mut self, reflect: &Reflect) {
        if self.reflect.as_ref() == Some(reflect) {
            return;
        }
        for (i, word) in (0u64..).zip(reflect.words()) {
            let _in_range =
                self.pool.map().write_u32(self.tables_page + u64::from(monitor::REFLECT_AT) + 4 * i, word);
        }
        self.reflect = Some(*reflect);
    }

    fn frame(&self) -> [u32; FRAME_WORDS] {
        let mut frame = [0; FRAME_WORDS];
        for (i, word) in (0..).zip(&mut frame) {
            *word = self.pool.map().read_u32(self.word_at(FRAME + 4 * i)).unwrap_or(0);
        }
        frame
    }

    /// Runs guest code from `frame`, in the world of `cr3` whose region is at `region`, to the next exit. `stale`: its tables
    /// have changed. CS and SS of the frame are of ring 1 or 3. The monitor may do what `reflect` says by itself.
    pub(super) fn run(
        &mut self,
        frame: &mut [u32; FRAME_WORDS],
        (cr3, region, stale): (u32, u32, bool),
        reflect: &Reflect,
        kicked: &AtomicBool,
    ) -> Result<Exit, WorldError> {
        let new_cr3 = if stale || cr3 != self.cr3 || self.region != Some(region) { cr3 } else { 0 };
        let _in_range = self.pool.map().write_u32(self.word_at(monitor::NEW_CR3), new_cr3);
        if self.region != Some(region) {
            self.put_into_monitor(region, cr3)?;
        }
        self.cr3 = cr3;
        self.set_reflect(reflect);
        self.set_frame(frame);
        self.bell.enter();
        let exit = self.run_to_exit(kicked);
        self.bell.leave();
        let exit = exit?;
        if exit == Exit::Kicked {
            // The vCPU has not been there yet.
            self.cr3 = if new_cr3 == 0 { cr3 } else { 0 };
            return Ok(exit);
        }
        *frame = self.frame();
        Ok(exit)
    }

    fn run_to_exit(&mut self, kicked: &AtomicBool) -> Result<Exit, WorldError> {
        let (mut started, mut rung) = (false, false);
        loop {
            self.bell.quiet();
            if kicked.load(Ordering::SeqCst) {
                if !started {
                    return Ok(Exit::Kicked);
                }
                let run = self.vcpu.get_kvm_run();
                if rung {
                    run.request_interrupt_window = 0;
                } else if run.ready_for_interrupt_injection != 0 {
                    run.request_interrupt_window = 0;
                    interrupt(&self.vcpu, monitor::DOORBELL)
                        .map_err(|e| WorldError::Host { what: e.what, source: e.why })?;
                    rung = true;
                } else {
                    // In the monitor, or in the shadow of a `mov ss`.
                    run.request_interrupt_window = 1;
                }
            }
            started = true;
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(monitor::PORT, [what])) => {
                    let bad = *what == monitor::EXIT_BAD_STATE;
                    self.vcpu.get_kvm_run().request_interrupt_window = 0;
                    return if bad { Ok(self.bad_state()?) } else { Ok(Exit::Guest) };
                }
                Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => {
                    return Err(WorldError::Died(String::from(
                        "the virtual machine shut down (KVM cannot run code in ring 1, or a fault of the monitor's)",
                    )));
                }
                Ok(other) => {
                    let what = format!("{other:?}");
                    self.vcpu.get_kvm_run().request_interrupt_window = 0;
                    return self.rescued(&what);
                }
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
                Err(e) => return Err(failed("running a vCPU")(e)),
            }
        }
    }

    /// The frame of a fault in ring 0 lies somewhere on the stack: only what the CPU says of it is of interest.
    fn bad_state(&self) -> Result<Exit, WorldError> {
        let regs = self.vcpu.get_regs().map_err(failed("reading a vCPU's registers"))?;
        let word = |field: usize| {
            let at = (regs.rsp as u32).wrapping_add(field as u32);
            let inside = (monitor::STATE..=monitor::STACK_TOP - 4).contains(&at);
            if inside { self.pool.map().read_u32(self.word_at(at)).unwrap_or(0) } else { 0 }
        };
        Ok(Exit::BadState(word(offset_of!(Frame, vector)), word(offset_of!(Frame, error_code))))
    }

    /// KVM gave up on an instruction. If it was the guest's, its state is in the vCPU: it is as if the instruction had
    /// raised #GP, which the monitor process then looks into.
    fn rescued(&mut self, what: &str) -> Result<Exit, WorldError> {
        self.region = None;
        let regs = self.vcpu.get_regs().map_err(failed("reading a vCPU's registers"))?;
        let sregs = self.vcpu.get_sregs().map_err(failed("reading a vCPU's registers"))?;
        if sregs.cs.selector & 3 == 0 {
            return Err(WorldError::Died(format!("the virtual machine stopped in its monitor: {what}")));
        }
        let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags, .. } = regs;
        let frame = Frame {
            gs: u32::from(sregs.gs.selector),
            fs: u32::from(sregs.fs.selector),
            es: u32::from(sregs.es.selector),
            ds: u32::from(sregs.ds.selector),
            edi: rdi as u32,
            esi: rsi as u32,
            ebp: rbp as u32,
            ebx: rbx as u32,
            edx: rdx as u32,
            ecx: rcx as u32,
            eax: rax as u32,
            vector: 13,
            eip: rip as u32,
            cs: u32::from(sregs.cs.selector),
            eflags: rflags as u32,
            esp: rsp as u32,
            ss: u32::from(sregs.ss.selector),
            ..Frame::default()
        };
        self.set_frame(&frame.words());
        Ok(Exit::Guest)
    }

    /// Puts the vCPU at the monitor's way in, with the region at `region`.
    fn put_into_monitor(&mut self, region: u32, cr3: u32) -> Result<(), WorldError> {
        let _in_range = self.pool.map().write(self.tables_page, &monitor::tables_page(region));
        self.reflect = None;
        let mut s = self.template;
        let segment = |selector: u16, d: Descriptor| kvm_segment {
            base: u64::from(d.base),
            limit: if d.pages { d.limit << 12 | 0xfff } else { d.limit },
            selector,
            type_: d.kind,
            present: 1,
            dpl: d.dpl,
            db: u8::from(d.big),
            s: u8::from(d.s),
            l: 0,
            g: u8::from(d.pages),
            avl: 0,
            unusable: 0,
            padding: 0,
        };
        let null = kvm_segment { unusable: 1, ..kvm_segment::default() };
        s.cs = segment(monitor::MONITOR_CS, monitor::monitor_cs(region));
        s.ss = segment(monitor::MONITOR_DS, monitor::monitor_ds(region));
        (s.ds, s.es, s.fs, s.gs) = (null, null, null, null);
        s.ldt = segment(monitor::LDT_SELECTOR, monitor::ldt(region));
        s.tr = segment(monitor::TSS_SELECTOR, monitor::tss(region, self.tss_kind));
        s.gdt.base = u64::from(region + monitor::TABLES + monitor::GDT_AT);
        s.gdt.limit = (monitor::GDT_LEN - 1) as u16;
        s.idt.base = u64::from(region + monitor::TABLES + monitor::IDT_AT);
        s.idt.limit = (monitor::IDT_LEN - 1) as u16;
        s.cr3 = u64::from(cr3);
        s.efer = EFER;
        s.interrupt_bitmap = [0; 4];
        // First without paging: what KVM and the hardware remember of translations goes.
        (s.cr0, s.cr4) = (CR0 & !CR0_PG, CR4);
        self.vcpu.set_sregs(&s).map_err(failed("setting a vCPU's registers"))?;
        s.cr0 = CR0;
        let smep = if self.smep { CR4_SMEP } else { 0 };
        let tsd = if self.trap_tsc { CR4_TSD } else { 0 };
        s.cr4 = CR4 | smep | tsd | CR4_UMIP;
        if self.vcpu.set_sregs(&s).is_err() {
            s.cr4 = CR4 | smep | tsd;
            self.vcpu.set_sregs(&s).map_err(failed("setting a vCPU's registers"))?;
        }
        let regs = kvm_regs {
            rip: u64::from(monitor::resume()),
            rsp: u64::from(FRAME),
            rflags: 2,
            ..kvm_regs::default()
        };
        self.vcpu.set_regs(&regs).map_err(failed("setting a vCPU's registers"))?;
        self.region = Some(region);
        Ok(())
    }
}

impl Frame {
    /// The frame as it lies in memory.
    pub(super) fn words(&self) -> [u32; FRAME_WORDS] {
        [
            self.cr2,
            self.gs,
            self.fs,
            self.es,
            self.ds,
            self.edi,
            self.esi,
            self.ebp,
            self.own_esp,
            self.ebx,
            self.edx,
            self.ecx,
            self.eax,
            self.vector,
            self.error_code,
            self.eip,
            self.cs,
            self.eflags,
            self.esp,
            self.ss,
        ]
    }

    /// The other way round.
    pub(super) fn from_words(w: &[u32; FRAME_WORDS]) -> Frame {
        let [cr2, gs, fs, es, ds, edi, esi, ebp, own_esp, ebx, edx, ecx, eax, rest @ ..] = *w;
        let [vector, error_code, eip, cs, eflags, esp, ss] = rest;
        Frame {
            cr2,
            gs,
            fs,
            es,
            ds,
            edi,
            esi,
            ebp,
            own_esp,
            ebx,
            edx,
            ecx,
            eax,
            vector,
            error_code,
            eip,
            cs,
            eflags,
            esp,
            ss,
        }
    }
}

/// Whether the carrier is SVM.
fn is_svm() -> bool {
    let id = std::arch::x86_64::__cpuid(0x8000_0000);
    id.eax >= 0x8000_0001 && std::arch::x86_64::__cpuid(0x8000_0001).ecx & 4 != 0
}

/// Makes the thread in KVM_RUN come back.
#[derive(Debug)]
pub(super) struct Bell {
    /// Our own mapping of the page KVM shares with whoever runs the vCPU.
    page: NonNull<u8>,
    /// The thread that is about to run the vCPU, or runs it; 0: none.
    thread: AtomicI32,
}

// SAFETY: the mapping belongs to the value for its whole life; the one byte used of it is only accessed atomically.
unsafe impl Send for Bell {}
// SAFETY: as for Send.
unsafe impl Sync for Bell {}

const PAGE: usize = 4096;

impl Bell {
    fn new(vcpu: &VcpuFd) -> io::Result<Bell> {
        signal::install()?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), PAGE, prot, libc::MAP_SHARED, vcpu.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Bell { page, thread: AtomicI32::new(0) })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the mapping, which lives as long as self; KVM reads it as a byte.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit))) }
    }

    /// From any thread: KVM_RUN ends, now or as soon as it begins.
    pub(super) fn ring(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            signal::send(thread);
        }
    }

    fn quiet(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    fn enter(&self) {
        self.thread.store(signal::this_thread(), Ordering::SeqCst);
    }

    fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and no pointer into it outlives self.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_its_words() {
        let words: [u32; FRAME_WORDS] = std::array::from_fn(|i| i as u32 * 3);
        let frame = Frame::from_words(&words);
        assert_eq!(frame.words(), words);
        // And the words are where the assembly has them.
        assert_eq!(words[offset_of!(Frame, ss) / 4], frame.ss);
        assert_eq!(words[offset_of!(Frame, eax) / 4], frame.eax);
        assert_eq!(words[offset_of!(Frame, vector) / 4], frame.vector);
    }
}
