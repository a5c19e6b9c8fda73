//! The raw engine: guest code runs natively in worlds until it must leave.
//!
//! 1. [`RawEngine::refusal`] says whether the CPU is in a state raw mode can carry, and if not, why.
//! 2. [`RawEngine::run`] follows what the guest changed since the last run (flushes, code writes), picks the space
//!    (one for guest ring 0, one for each hot CR3 of guest ring 3), loads the hardware state, runs, reads it back and
//!    turns an EIP inside a trampoline into a guest EIP.
//! 3. The exit is then dealt with here if it is about the shadow or the code view; the rest is told to EM as
//!    [`After`].
//!
//! What a world holds after a run is an allegation: selectors, flags and vCPU words are checked before they are used.

pub mod kernel_code;
pub mod layout;
pub mod space;
pub mod user_code;

use crate::account::{Cause, Route};
use crate::cpum::{CpuState, SegAttr, Segment, Shadow as Held, cr0, cr4, eflags, seg};
use crate::env::{Env, PagingChange, Privilege};
use crate::machine::Machine;
use crate::pgm::shadow::Scope;
use crate::pgm::walk::{Access, Leaf, peek, pf, prefetch, walk};
use crate::selm;
use crate::trap::{Event, Trap};
use csam::{GuestLin, GuestPhys};
use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::raw::RawEngine as RawHost;
use host_driver_shim::tsc::read as host_tsc;
use host_driver_shim::world::{Backing, HwRegs, Kicker, Prot, World, WorldError, WorldExit, WorldLin};
use kernel_code::KernelCode;
use layout::{Layout, TRAMP_LEN};
use patm::{Location, ReasonKind, VcpuWords, vcpu_page as vp};
use space::{Role, Space};
use std::sync::{Arc, Mutex};
use user_code::UserCode;

/// Address spaces of guest ring 3 that keep a world of their own.
const MAX_USER_SPACES: usize = 16;
/// Linear addresses below this are never mapped (vm.mmap_min_addr of an ordinary account).
const LOW_LIMIT: u32 = 0x1_0000;
/// Pages mapped around a faulting one where the guest has them present.
const AROUND: u32 = 16;
/// After so many moves the reservations stay where they are: a guest that has memory everywhere would keep us moving.
const MAX_MOVES: u64 = 40;
/// EFLAGS bits that are the hardware's own while guest ring-0 code runs; the others are virtual.
const NATIVE_FLAGS: u32 = eflags::ARITH | eflags::DF;
/// EFLAGS bits that guest user code may change natively.
const USER_FLAGS: u32 = eflags::ARITH | eflags::DF | eflags::NT | eflags::AC | eflags::ID;

/// Why raw mode cannot run the CPU as it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RawRefusal {
    /// CR0.PE clear.
    RealMode,
    /// EFLAGS.VM.
    V86,
    /// CS.D clear.
    Code16,
    /// Ring 1 or 2.
    MiddleRing,
    /// Single-stepping.
    TrapFlag,
    /// Ring 0 with a CS that does not start at 0.
    CodeBase,
    /// Ring 0 with a stack segment that is not flat: trampolines need it.
    StackSegment,
    /// CR0.TS or CR0.EM set in guest ring 3: the next FPU instruction must raise #NM.
    FpuTrap,
    /// CR4.TSD: rdtsc of ring 3 must fault.
    TscTrap,
    /// The interrupt shadow of `sti` or `mov ss` is in force.
    Shadow,
}

/// What EM has to do after a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// Nothing: run again.
    Continue,
    /// Interpret the instruction at EIP.
    Interpret,
    /// Deliver this to the guest.
    Deliver(Event),
    /// Somebody wants the EMT's attention.
    Kicked,
}

/// One exit, for the accounting and the trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExitRecord {
    /// Why.
    pub cause: Cause,
    /// Which way.
    pub route: Route,
    /// Guest EIP.
    pub eip: u32,
    /// CPL.
    pub cpl: u8,
    /// What the world said.
    pub raw: WorldExit,
}

/// What can end a run of the raw engine besides the guest.
#[derive(Debug, thiserror::Error)]
pub enum RawError {
    /// The world failed.
    #[error(transparent)]
    World(#[from] WorldError),
    /// No more code memory.
    #[error("the code view needs more than its {0} MiB of memory")]
    CodeMemory(u64),
}

/// Where a kick from another thread goes.
#[derive(Default)]
pub struct KickTarget {
    current: Mutex<Option<Arc<dyn Kicker>>>,
}

impl KickTarget {
    /// Makes the running world leave guest code soon.
    pub fn kick(&self) {
        if let Ok(current) = self.current.lock()
            && let Some(k) = current.as_ref()
        {
            k.kick();
        }
    }
    fn set(&self, kicker: Option<Arc<dyn Kicker>>) {
        if let Ok(mut current) = self.current.lock() {
            *current = kicker;
        }
    }
}

struct CachedSegment {
    segment: Segment,
    host: u16,
}

/// All worlds of a guest.
pub struct RawEngine {
    host: RawHost,
    code: CodeMemory,
    layout: Layout,
    layouts_tried: usize,
    kernel: Space,
    users: Vec<Space>,
    clock: u64,
    /// The ring-0 code view.
    pub kernel_code: KernelCode,
    /// Copied pages of ring-3 code.
    pub user_code: UserCode,
    segment_cache: Vec<Option<CachedSegment>>,
    cache_generation: u32,
    kick: Arc<KickTarget>,
    kicking: Option<usize>,
    paging_key: u32,
    /// Which space's world has the guest's newest FPU state; None: CPUM has it.
    fpu_in: Option<usize>,
    last: ExitRecord,
    /// TSC when the last run entered the world and when it left.
    last_run: (u64, u64),
    /// How often reservations moved.
    pub moves: u64,
    /// Worlds that died and were made again.
    pub rebuilt: u64,
}

/// The vCPU page of a world as PATM's fixes see it.
struct Words<'a>(&'a mut dyn World);

impl VcpuWords for Words<'_> {
    fn read(&mut self, offset: u32) -> u32 {
        self.0.vcpu_read(offset)
    }
    fn write(&mut self, offset: u32, value: u32) {
        self.0.vcpu_write(offset, value);
    }
}

/// Index of the ring-0 space where spaces are numbered; ring-3 spaces follow.
const KERNEL: usize = 0;

impl RawEngine {
    /// Makes the ring-0 world.
    pub fn new(host: RawHost, code: CodeMemory, count_inline: bool) -> Result<RawEngine, RawError> {
        let layout = Layout::CANDIDATES[0];
        let kernel = Space::new(Box::new(host.spawn_world()?), Role::Supervisor);
        let mut engine = RawEngine {
            host,
            code,
            layout,
            layouts_tried: 1,
            kernel,
            users: Vec::new(),
            clock: 0,
            kernel_code: KernelCode::new(layout, count_inline),
            user_code: UserCode::default(),
            segment_cache: (0..vp::SEGMENT_CACHE_LEN).map(|_| None).collect(),
            cache_generation: 0,
            kick: Arc::default(),
            kicking: None,
            paging_key: 0,
            fpu_in: None,
            last: ExitRecord {
                cause: Cause::Other,
                route: Route::Signal,
                eip: 0,
                cpl: 0,
                raw: WorldExit::Kick,
            },
            last_run: (0, 0),
            moves: 0,
            rebuilt: 0,
        };
        engine.furnish_kernel()?;
        Ok(engine)
    }

    /// The handle other threads kick through.
    #[must_use]
    pub fn kick_target(&self) -> Arc<KickTarget> {
        self.kick.clone()
    }

    /// The last exit.
    #[must_use]
    pub fn last_exit(&self) -> ExitRecord {
        self.last
    }

    /// TSC when the last run entered the world and when it left.
    #[must_use]
    pub fn last_run(&self) -> (u64, u64) {
        self.last_run
    }

    /// Number of ring-3 spaces, data pages mapped, code-view pages mapped.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize, usize) {
        let all = || std::iter::once(&self.kernel).chain(&self.users);
        (self.users.len(), all().map(|s| s.data.len()).sum(), all().map(|s| s.code.len()).sum())
    }

    /// One line per world.
    #[must_use]
    pub fn describe_worlds(&self) -> String {
        let mut text = String::new();
        for s in std::iter::once(&self.kernel).chain(&self.users) {
            let who = match s.role {
                Role::Supervisor => "ring 0".to_string(),
                Role::User { cr3 } => format!("ring 3 of cr3 {cr3:08x}"),
            };
            text += &format!("{who}: {} data pages, {} code pages\n", s.data.len(), s.code.len());
        }
        text
    }

    /// The code view's bytes beside the original's.
    #[must_use]
    pub fn debug_view(&self, at: u32, len: u32) -> String {
        self.kernel_code.debug_view(&self.code, GuestLin(at), len)
    }

    /// The current layout.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// A read counter of in-line executions by kind (0..64), as the ring-0 world counted them.
    #[must_use]
    pub fn inline_counter(&self, kind: u32) -> u32 {
        self.kernel.world.vcpu_read(vp::COUNTERS + 4 * (kind & 63))
    }

    /// Why the CPU's state is not for raw mode, if it is not.
    #[must_use]
    pub fn refusal(cpu: &CpuState) -> Option<RawRefusal> {
        if !cpu.protected() {
            return Some(RawRefusal::RealMode);
        }
        if cpu.v86() {
            return Some(RawRefusal::V86);
        }
        let cs = &cpu.seg[seg::CS];
        if !cs.big() {
            return Some(RawRefusal::Code16);
        }
        if cpu.eflags & eflags::TF != 0 {
            return Some(RawRefusal::TrapFlag);
        }
        if cpu.shadow != Held::None {
            return Some(RawRefusal::Shadow);
        }
        match cpu.cpl {
            0 => {
                let ss = &cpu.seg[seg::SS];
                if cs.base != 0 {
                    Some(RawRefusal::CodeBase)
                } else if !ss.is_flat() || !ss.big() || !ss.present() {
                    Some(RawRefusal::StackSegment)
                } else {
                    None
                }
            }
            3 => {
                if cpu.cr0 & (cr0::TS | cr0::EM) != 0 {
                    Some(RawRefusal::FpuTrap)
                } else if cpu.cr4 & cr4::TSD != 0 {
                    Some(RawRefusal::TscTrap)
                } else {
                    None
                }
            }
            _ => Some(RawRefusal::MiddleRing),
        }
    }

    /// Puts the vCPU page, the gate and the trampolines into the ring-0 world.
    fn furnish_kernel(&mut self) -> Result<(), RawError> {
        let (gate, vcpu) = (GuestLin(self.layout.gate), GuestLin(self.layout.vcpu));
        self.kernel.world.place_gate(self.layout.data(gate), self.layout.data(vcpu))?;
        let pages: Vec<_> = self.kernel_code.trampoline_pages().collect();
        for (lin, offset) in pages {
            self.kernel.world.map(
                self.layout.code(lin),
                0x1000,
                Backing::Code(offset),
                Prot::READ | Prot::EXEC,
            )?;
        }
        self.kernel_code.new_trampolines.clear();
        self.forget_segment_cache();
        Ok(())
    }

    fn forget_segment_cache(&mut self) {
        for (i, slot) in self.segment_cache.iter_mut().enumerate() {
            if slot.take().is_some() {
                self.kernel.world.vcpu_write(vp::SEGMENT_CACHE + 16 * i as u32 + 12, 0);
            }
        }
        self.cache_generation = self.kernel.ldt_generation;
    }

    fn clear_kernel(&mut self) -> Result<(), RawError> {
        self.kernel.clear()?;
        self.furnish_kernel()
    }

    /// Moves every reservation: the guest wants addresses we sit on.
    fn relocate(&mut self, m: &mut Machine) -> Result<(), RawError> {
        self.layout = Layout::CANDIDATES[self.layouts_tried % Layout::CANDIDATES.len()];
        self.layouts_tried += 1;
        self.moves += 1;
        log::info!("reservations move to {:x?}", self.layout);
        self.kernel_code.reset(m, &self.code, self.layout);
        for space in &mut self.users {
            space.clear()?;
        }
        self.clear_kernel()
    }

    /// Whether a world laid out so would hide guest memory: behind the code view of `code`, or (in the ring-0 world)
    /// behind our own pages. Reading there would not fault, it would show the wrong bytes.
    fn hides(m: &Machine, cpu: &CpuState, layout: &Layout, code: GuestLin, supervisor: bool) -> bool {
        Self::hides_behind_code(m, cpu, layout, code, supervisor)
            || supervisor
                && [layout.vcpu, layout.gate, layout.tramp, layout.tramp_as_data()]
                    .into_iter()
                    .any(|at| peek(m, cpu, GuestLin(at)).is_some_and(|l| m.is_ram(l.frame)))
    }

    /// The part of [`Self::hides`] that is about one page of code.
    fn hides_behind_code(
        m: &Machine,
        cpu: &CpuState,
        layout: &Layout,
        code: GuestLin,
        supervisor: bool,
    ) -> bool {
        let place = layout.code(code.page_base());
        let ours = [layout.vcpu, layout.gate].into_iter().any(|at| layout.data(GuestLin(at)) == place);
        supervisor && ours
            || peek(m, cpu, layout.guest_of_data(place))
                .is_some_and(|l| m.is_ram(l.frame) && (supervisor || l.user))
    }

    /// Moves the reservations if they hide guest memory and can lie where they do not; says whether they moved.
    fn make_room(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        code: GuestLin,
        supervisor: bool,
    ) -> Result<bool, RawError> {
        if self.moves >= MAX_MOVES || !Self::hides(m, cpu, &self.layout, code, supervisor) {
            return Ok(false);
        }
        let better = Layout::CANDIDATES.iter().position(|l| !Self::hides(m, cpu, l, code, supervisor));
        let Some(better) = better else { return Ok(false) };
        self.layouts_tried = better;
        self.relocate(m)?;
        Ok(true)
    }

    /// Gives up every copy of code, kernel's and users', when code memory is used up: what is executed again is
    /// scanned again.
    fn recycle_code(&mut self, m: &mut Machine) -> Result<(), RawError> {
        log::info!("code memory is used up: all copies are made anew");
        self.kernel_code.reset(m, &self.code, self.layout);
        self.user_code.reset(m, &self.code);
        for space in &mut self.users {
            space.clear()?;
        }
        self.clear_kernel()
    }

    /// The code memory of the copy of a ring-0 page.
    fn kernel_page(&mut self, m: &mut Machine, lin: GuestLin, pfn: u32) -> Result<u64, RawError> {
        if let Some(offset) = self.kernel_code.page(m, &self.code, lin, pfn) {
            return Ok(offset);
        }
        self.recycle_code(m)?;
        self.kernel_code.page(m, &self.code, lin, pfn).ok_or(RawError::CodeMemory(self.code.size() >> 20))
    }

    /// Follows what the guest (or the monitor for it) changed since the last run.
    fn follow_changes(&mut self, m: &mut Machine, cpu: &CpuState) -> Result<(), RawError> {
        while !m.code_writes.is_empty() {
            for w in std::mem::take(&mut m.code_writes) {
                self.kernel_code.code_written(m, &self.code, w.at, w.len);
                self.user_code.code_written(m, &self.code, w.at);
            }
            self.settle_code()?;
        }
        if m.paging_changes.is_empty() {
            return Ok(());
        }
        let mut moved = false;
        for change in std::mem::take(&mut m.paging_changes) {
            moved |= !matches!(change, PagingChange::Page(_));
            match change {
                PagingChange::Mode => {
                    let key = (cpu.cr0 & (cr0::PG | cr0::WP))
                        | (cpu.cr4 & (cr4::PSE | cr4::PAE))
                        | (cpu.msr.efer as u32 & crate::cpum::efer::NXE as u32);
                    if key != self.paging_key {
                        self.paging_key = key;
                        self.clear_kernel()?;
                        for space in &mut self.users {
                            space.clear()?;
                        }
                    } else {
                        self.kernel.sync(m, cpu, Scope::All, &self.layout)?;
                        for space in &mut self.users {
                            space.pending_sync = Some(Scope::All);
                        }
                    }
                }
                PagingChange::Cr3 => {
                    self.kernel.sync(m, cpu, Scope::NonGlobal, &self.layout)?;
                    for space in &mut self.users {
                        if space.role == (Role::User { cr3: cpu.cr3 }) && space.pending_sync.is_none() {
                            space.pending_sync = Some(Scope::NonGlobal);
                        }
                    }
                }
                PagingChange::Page(lin) => {
                    self.kernel.drop_data(lin, &self.layout)?;
                    self.kernel.drop_code(lin, &self.layout)?;
                    for space in &mut self.users {
                        if space.role == (Role::User { cr3: cpu.cr3 }) {
                            space.drop_data(lin, &self.layout)?;
                            space.drop_code(lin, &self.layout)?;
                        }
                    }
                }
            }
        }
        if moved {
            self.make_room(m, cpu, GuestLin(cpu.linear_eip()), cpu.cpl != 3)?;
        }
        Ok(())
    }

    /// Carries out in the worlds what the code views decided: new trampoline pages, frames that became code, copies
    /// that are gone.
    fn settle_code(&mut self) -> Result<(), RawError> {
        for (lin, offset) in std::mem::take(&mut self.kernel_code.new_trampolines) {
            self.kernel.world.map(
                self.layout.code(lin),
                0x1000,
                Backing::Code(offset),
                Prot::READ | Prot::EXEC,
            )?;
        }
        for lin in std::mem::take(&mut self.kernel_code.dropped) {
            self.kernel.drop_code(lin, &self.layout)?;
        }
        for pfn in std::mem::take(&mut self.kernel_code.newly_tracked)
            .into_iter()
            .chain(std::mem::take(&mut self.user_code.newly_tracked))
        {
            for space in std::iter::once(&mut self.kernel).chain(&mut self.users) {
                for lin in space.data.take_writable(pfn) {
                    space.drop_data(lin, &self.layout)?;
                }
            }
        }
        for (lin, pfn) in std::mem::take(&mut self.user_code.dropped) {
            for space in &mut self.users {
                if space.code.get(lin).mapped() && space.code.get(lin).pfn() == pfn {
                    space.drop_code(lin, &self.layout)?;
                }
            }
        }
        Ok(())
    }

    /// The number of the space the CPU's next instruction runs in.
    fn choose_space(&mut self, cpu: &CpuState) -> Result<usize, RawError> {
        if cpu.cpl != 3 {
            return Ok(KERNEL);
        }
        self.clock += 1;
        let role = Role::User { cr3: cpu.cr3 };
        if let Some(i) = self.users.iter().position(|s| s.role == role) {
            self.users[i].last_used = self.clock;
            return Ok(i + 1);
        }
        let i = if self.users.len() < MAX_USER_SPACES {
            self.users.push(Space::new(Box::new(self.host.spawn_world()?), role));
            self.users.len() - 1
        } else {
            let oldest = (0..self.users.len()).min_by_key(|&i| self.users[i].last_used).unwrap_or(0);
            if self.fpu_in == Some(oldest + 1) {
                self.users[oldest].world.fpu();
            }
            self.users[oldest].clear()?;
            self.users[oldest].role = role;
            oldest
        };
        self.users[i].last_used = self.clock;
        Ok(i + 1)
    }

    fn space(&mut self, number: usize) -> &mut Space {
        if number == KERNEL { &mut self.kernel } else { &mut self.users[number - 1] }
    }

    /// Brings the guest's FPU state into CPUM, whose copy counts from here to the next run.
    pub fn fetch_fpu(&mut self, cpu: &mut CpuState) {
        if let Some(number) = self.fpu_in.take() {
            cpu.fpu.0 = *self.space(number).world.fpu();
        }
    }

    /// Runs the guest until something happens. The CPU is in a state [`Self::refusal`] has nothing against.
    pub fn run(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        interrupt_waits: bool,
    ) -> Result<After, RawError> {
        self.follow_changes(m, cpu)?;
        let number = self.choose_space(cpu)?;
        if self.kicking != Some(number) {
            let kicker = self.space(number).world.kicker();
            self.kick.set(Some(kicker));
            self.kicking = Some(number);
        }
        let layout = self.layout;
        if number != KERNEL
            && let Some(scope) = self.users[number - 1].pending_sync.take()
        {
            self.users[number - 1].sync(m, cpu, scope, &layout)?;
        }
        let mut regs = HwRegs { gpr: cpu.gpr, eip: cpu.eip, eflags: 0, sel: [0; 6] };
        for (i, s) in cpu.seg.iter().enumerate() {
            regs.sel[i] = self.space(number).host_selector(s, i == seg::CS, &layout)?;
        }
        if number == KERNEL {
            if self.cache_generation != self.kernel.ldt_generation {
                self.forget_segment_cache();
            }
            regs.eip = self.kernel_code.patm.resume_eip(cpu.eip);
            regs.eflags = (cpu.eflags & NATIVE_FLAGS) | eflags::FIXED | eflags::IF;
            self.load_vcpu_page(cpu, interrupt_waits);
        } else {
            regs.eflags = (cpu.eflags & USER_FLAGS & !eflags::AC) | eflags::FIXED | eflags::IF;
        }
        if self.fpu_in != Some(number) {
            self.fetch_fpu(cpu);
            *self.space(number).world.fpu() = cpu.fpu.0;
            self.fpu_in = Some(number);
        }
        let space = self.space(number);
        let entered = host_tsc();
        let exit = space.run(&mut regs);
        self.last_run = (entered, host_tsc());
        let exit = match exit {
            Ok(exit) => exit,
            Err(WorldError::BadState(why)) => {
                log::warn!("a world could not load the guest's state: {why}");
                return Ok(After::Interpret);
            }
            Err(e) => return Err(e.into()),
        };
        cpu.gpr = regs.gpr;
        cpu.eip = regs.eip;
        if number == KERNEL {
            self.read_back_kernel(cpu, m, &regs, exit)
        } else {
            self.read_back_user(cpu, m, number, &regs, exit)
        }
    }

    fn load_vcpu_page(&mut self, cpu: &CpuState, interrupt_waits: bool) {
        let w = &mut self.kernel.world;
        w.vcpu_write(vp::IF_FLAG, cpu.eflags & eflags::IF);
        w.vcpu_write(vp::PENDING, u32::from(interrupt_waits));
        w.vcpu_write(vp::HIDDEN_FLAGS, cpu.eflags & (eflags::IOPL | eflags::NT | eflags::AC | eflags::ID));
        for (i, s) in cpu.seg.iter().enumerate() {
            w.vcpu_write(vp::SELECTORS + 4 * i as u32, u32::from(s.selector));
        }
        w.vcpu_write(vp::CR0, cpu.cr0);
        w.vcpu_write(vp::CR2, cpu.cr2);
        w.vcpu_write(vp::CR3, cpu.cr3);
        w.vcpu_write(vp::CR4, cpu.cr4);
        w.vcpu_write(vp::GDT_BASE, cpu.gdtr.base);
        w.vcpu_write(vp::GDT_LIMIT, u32::from(cpu.gdtr.limit));
    }

    /// Takes the state of the ring-0 world over into the CPU and deals with the exit.
    fn read_back_kernel(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        regs: &HwRegs,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        let mut flags = regs.eflags;
        let mut site_reached = false;
        let mut committed_sti = false;
        let mut in_trampoline = false;
        match exit {
            WorldExit::Gate { reason } => match self.kernel_code.patm.by_reason(reason) {
                Some((_, site, kind)) => match kind {
                    ReasonKind::Emulate => {
                        cpu.eip = site.at.0;
                        site_reached = true;
                    }
                    ReasonKind::PendingAfterSti => {
                        cpu.eip = site.next().0;
                        committed_sti = true;
                    }
                    ReasonKind::PendingAfterPopf => cpu.eip = site.next().0,
                },
                None => {
                    return Err(
                        WorldError::Died(format!("it left with the unknown reason {reason:#x}")).into()
                    );
                }
            },
            _ => match self.kernel_code.locate(regs.eip) {
                Location::Trampoline { fix, .. } => {
                    in_trampoline = true;
                    cpu.eip = fix.apply(&mut cpu.gpr, &mut flags, &mut Words(self.kernel.world.as_mut()));
                }
                Location::PatchStart(id) => {
                    // At the slot of a short jump the guest's EIP is the start of the window.
                    if let Some(patch) = self.kernel_code.patm.get(id) {
                        cpu.eip = patch.start.0;
                    }
                }
                Location::Stray => {
                    // The guest's own code lies where our trampolines are.
                    self.relocate(m)?;
                }
                _ => {}
            },
        }
        let w = &self.kernel.world;
        let hidden = cpu.eflags & !(NATIVE_FLAGS | eflags::IF | eflags::RF);
        cpu.eflags =
            (flags & NATIVE_FLAGS) | (w.vcpu_read(vp::IF_FLAG) & eflags::IF) | hidden | eflags::FIXED;
        let behind_sti = exit == WorldExit::Kick
            && cpu.eflags & eflags::IF != 0
            && self.kernel_code.patm.is_after_sti(cpu.eip);
        if committed_sti || behind_sti {
            cpu.shadow = Held::Sti;
        }
        for i in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            let selector = self.kernel.world.vcpu_read(vp::SELECTORS + 4 * i as u32) as u16;
            if selector == cpu.seg[i].selector && regs.sel[i] == self.kernel.loaded[i] {
                continue;
            }
            if selector & !3 == 0 && i != seg::SS {
                cpu.seg[i] = Segment { selector, ..Segment::default() };
                continue;
            }
            let cached = self.segment_cache.get(usize::from(selector >> 3)).and_then(Option::as_ref);
            match cached {
                Some(c) if selector & 4 == 0 && c.host == regs.sel[i] => {
                    cpu.seg[i] = Segment { selector, ..c.segment };
                }
                // Rolled back between the load and its commit: the old segment is the guest's still.
                _ if selector == cpu.seg[i].selector => {}
                _ => {
                    // Not what any trampoline of ours does: ask the guest's tables.
                    if selm::load_segment(cpu, m, i, selector).is_err() {
                        cpu.seg[i] = Segment { selector, ..Segment::default() };
                    }
                }
            }
        }
        let eip = cpu.eip;
        let mut record = |cause, route| {
            self.last = ExitRecord { cause, route, eip, cpl: cpu.cpl, raw: exit };
        };
        match exit {
            WorldExit::Gate { .. } => {
                record(if site_reached { Cause::Sensitive } else { Cause::Interrupt }, Route::FarExit);
                Ok(if site_reached { After::Interpret } else { After::Continue })
            }
            WorldExit::Kick => {
                record(Cause::Kick, Route::Signal);
                Ok(After::Kicked)
            }
            WorldExit::Syscall => {
                // `int 80h` of ring 0 that the host took for its own: EIP is behind the two bytes.
                record(Cause::Syscall, Route::Signal);
                cpu.eip = cpu.eip.wrapping_sub(2);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector: 14, error_code, cr2 } => {
                self.page_fault(cpu, m, KERNEL, error_code, cr2, exit)
            }
            WorldExit::Fault { vector: 13, .. } => {
                if !in_trampoline {
                    match self.kernel_code.locate(cpu.eip) {
                        // A branch into the middle of a patch: the trampoline goes on from there.
                        Location::MidWindow { forward: Some(_), .. } => {
                            record(Cause::InPatch, Route::Signal);
                            return Ok(After::Continue);
                        }
                        Location::Guest if !self.kernel_code.is_proven_start(GuestLin(cpu.eip)) => {
                            record(Cause::Scan, Route::Signal);
                            return self.scan(cpu, m);
                        }
                        _ => {}
                    }
                }
                record(Cause::Sensitive, Route::Signal);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector, .. } => {
                record(Cause::GuestFault, Route::Signal);
                Ok(Self::other_fault(cpu, m, vector))
            }
        }
    }

    /// A fault other than #GP and #PF: the guest's own, by an instruction the interpreter then sees too.
    fn other_fault(cpu: &mut CpuState, m: &mut Machine, vector: u8) -> After {
        match vector {
            // `int3`, `into` and `int 3` are traps: EIP is behind the instruction.
            3 | 4 => {
                let mut last = [0u8; 1];
                let at = GuestLin(cpu.linear_eip().wrapping_sub(1));
                let short = m.fetch(cpu, at, &mut last).is_ok() && matches!(last, [0xcc | 0xce]);
                cpu.eip = cpu.eip.wrapping_sub(if short { 1 } else { 2 });
                After::Interpret
            }
            // `int1`; single steps do not happen in raw mode.
            1 => After::Deliver(Event::Exception(Trap::DB)),
            _ => After::Interpret,
        }
    }

    /// Scans from EIP, which stands on an unproven byte of the code view.
    fn scan(&mut self, cpu: &mut CpuState, m: &mut Machine) -> Result<After, RawError> {
        let lin = GuestLin(cpu.eip);
        if self.layout.in_trampolines(lin) {
            self.relocate(m)?;
            return Ok(After::Continue);
        }
        let access = Access::fetch(Privilege::Supervisor);
        let leaf = match walk(m, cpu, lin, access) {
            Ok(leaf) => leaf,
            Err(code) => return Ok(After::Deliver(Event::Exception(Trap::pf(code, lin.0)))),
        };
        if !m.is_ram(leaf.frame) {
            return Ok(After::Interpret);
        }
        let pfn = (leaf.frame.0 >> 12) as u32;
        self.kernel_page(m, lin, pfn)?;
        let found = self.kernel_code.scan(m, &self.code, cpu, lin);
        self.settle_code()?;
        // Nothing decodable there, or a site that could not be patched: the interpreter knows what the guest sees.
        Ok(if found == 0 { After::Interpret } else { After::Continue })
    }

    /// Takes the state of a ring-3 world over into the CPU and deals with the exit.
    fn read_back_user(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        number: usize,
        regs: &HwRegs,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        cpu.eflags = (cpu.eflags & !(USER_FLAGS | eflags::RF)) | (regs.eflags & USER_FLAGS) | eflags::FIXED;
        let mut reloaded = false;
        let (cs, eip) = (regs.sel[seg::CS], cpu.eip);
        if cs != self.users[number - 1].loaded[seg::CS] {
            // A far transfer to a selector behind which the host has a code segment; what has the guest there?
            self.last =
                ExitRecord { cause: Cause::Segment, route: Route::Signal, eip, cpl: cpu.cpl, raw: exit };
            return Ok(match selm::far_jump(cpu, m, cs, eip, 4) {
                Ok(()) if exit == WorldExit::Kick => After::Kicked,
                Ok(()) => After::Continue,
                Err(trap) => After::Deliver(Event::Exception(trap)),
            });
        }
        for i in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            let loaded = self.users[number - 1].loaded[i];
            if regs.sel[i] == loaded {
                continue;
            }
            // Guest code loaded the register itself; the host found something behind the number.
            reloaded = true;
            let selector = regs.sel[i];
            if let Err(trap) = selm::load_segment(cpu, m, i, selector) {
                self.last = ExitRecord {
                    cause: Cause::Segment,
                    route: Route::Signal,
                    eip: cpu.eip,
                    cpl: cpu.cpl,
                    raw: exit,
                };
                return Ok(After::Deliver(Event::Exception(trap)));
            }
        }
        let eip = cpu.eip;
        let mut record = |cause| {
            self.last = ExitRecord { cause, route: Route::Signal, eip, cpl: 3, raw: exit };
        };
        if reloaded && matches!(exit, WorldExit::Fault { .. }) {
            // The fault may be due to the host's idea of the segment: try again with the guest's.
            record(Cause::Segment);
            return Ok(After::Continue);
        }
        match exit {
            WorldExit::Gate { .. } => Err(WorldError::Died("a ring-3 world used the gate".into()).into()),
            WorldExit::Kick => {
                record(Cause::Kick);
                Ok(After::Kicked)
            }
            WorldExit::Syscall => {
                record(Cause::Syscall);
                cpu.eip = cpu.eip.wrapping_sub(2);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector: 14, error_code, cr2 } => {
                self.page_fault(cpu, m, number, error_code, cr2, exit)
            }
            WorldExit::Fault { vector: 13, .. } => {
                let lin = GuestLin(cpu.linear_eip());
                let pfn = self.users[number - 1].code.get(lin);
                if pfn.mapped() && self.user_code.is_unscanned(lin, pfn.pfn()) {
                    record(Cause::Scan);
                    let found = self.user_code.scan(m, cpu, &self.code, lin, pfn.pfn());
                    return Ok(if found { After::Continue } else { After::Interpret });
                }
                record(Cause::Sensitive);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector, .. } => {
                record(Cause::GuestFault);
                Ok(Self::other_fault(cpu, m, vector))
            }
        }
    }

    /// A page fault in a world: ours to fill, the guest's to see, or an access that must be interpreted.
    fn page_fault(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        number: usize,
        error_code: u32,
        cr2: u32,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        let supervisor = number == KERNEL;
        let privilege = if supervisor { Privilege::Supervisor } else { Privilege::User };
        let (eip, cpl) = (cpu.eip, cpu.cpl);
        let after = |this: &mut Self, cause, after| {
            this.last = ExitRecord { cause, route: Route::Signal, eip, cpl, raw: exit };
            Ok(after)
        };
        let layout = self.layout;
        if error_code & pf::FETCH != 0 {
            let lin = layout.guest_of_code(WorldLin(cr2));
            let leaf = match walk(m, cpu, lin, Access::fetch(privilege)) {
                Ok(leaf) => leaf,
                Err(code) => {
                    return after(
                        self,
                        Cause::GuestFault,
                        After::Deliver(Event::Exception(Trap::pf(code, lin.0))),
                    );
                }
            };
            if !m.is_ram(leaf.frame) || layout.code(lin).0 < LOW_LIMIT {
                return after(self, Cause::Mmio, After::Interpret);
            }
            if self.make_room(m, cpu, lin, supervisor)? {
                return after(self, Cause::Scan, After::Continue);
            }
            if Self::hides_behind_code(m, cpu, &layout, lin, supervisor) {
                // Memory everywhere. Slow, but the guest sees its own bytes.
                return after(self, Cause::Scan, After::Interpret);
            }
            if supervisor {
                if layout.in_trampolines(lin) {
                    self.relocate(m)?;
                    return after(self, Cause::Scan, After::Continue);
                }
                self.map_kernel_code(m, lin, &leaf)?;
            } else {
                self.map_user_code(m, cpu, number, lin, &leaf)?;
            }
            return after(self, Cause::Scan, After::Continue);
        }
        let lin = layout.guest_of_data(WorldLin(cr2));
        let write = error_code & pf::WRITE != 0;
        if supervisor && layout.reserved(lin) {
            // The guest reached for what is ours. If it has something there we move, else it gets its fault.
            if peek(m, cpu, lin).is_some() {
                self.relocate(m)?;
                return after(self, Cause::ShadowFault, After::Continue);
            }
        }
        let access = Access { write, fetch: false, privilege };
        let leaf = match walk(m, cpu, lin, access) {
            Ok(leaf) => leaf,
            Err(code) => {
                return after(
                    self,
                    Cause::GuestFault,
                    After::Deliver(Event::Exception(Trap::pf(code, lin.0))),
                );
            }
        };
        if layout.data(lin).0 < LOW_LIMIT {
            return after(self, Cause::LowMemory, After::Interpret);
        }
        if !m.is_ram(leaf.frame) {
            return after(self, Cause::Mmio, After::Interpret);
        }
        let pfn = (leaf.frame.0 >> 12) as u32;
        if write && m.is_tracked(pfn) {
            return after(self, Cause::CodeWrite, After::Interpret);
        }
        // A code-view page of this space where the guest has data: one of them must go.
        let there = layout.code_in_place_of(lin.page_base());
        if self.space(number).code.get(there).mapped() {
            if there.page_base() == GuestLin(cpu.linear_eip()).page_base() {
                self.relocate(m)?;
            } else {
                self.space(number).drop_code(there, &layout)?;
            }
        }
        self.fill(cpu, m, number, lin, leaf)?;
        after(self, Cause::ShadowFault, After::Continue)
    }

    fn map_kernel_code(&mut self, m: &mut Machine, lin: GuestLin, leaf: &Leaf) -> Result<(), RawError> {
        let pfn = (leaf.frame.0 >> 12) as u32;
        let offset = self.kernel_page(m, lin, pfn)?;
        self.settle_code()?;
        let layout = self.layout;
        self.kernel.drop_data(layout.guest_of_data(layout.code(lin)), &layout)?;
        self.kernel.map_code(lin, leaf, Backing::Code(offset), &layout)?;
        Ok(())
    }

    fn map_user_code(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        number: usize,
        lin: GuestLin,
        leaf: &Leaf,
    ) -> Result<(), RawError> {
        let pfn = (leaf.frame.0 >> 12) as u32;
        let mut view = self.user_code.view(m, cpu, &self.code, lin, pfn);
        if matches!(view, user_code::View::NoMemory) {
            self.recycle_code(m)?;
            view = self.user_code.view(m, cpu, &self.code, lin, pfn);
        }
        let backing = match view {
            user_code::View::Direct => Backing::Ram(leaf.frame.0),
            user_code::View::Copy(offset) => Backing::Code(offset),
            user_code::View::NoMemory => return Err(RawError::CodeMemory(self.code.size() >> 20)),
        };
        self.settle_code()?;
        let layout = self.layout;
        let space = &mut self.users[number - 1];
        space.drop_data(layout.guest_of_data(layout.code(lin)), &layout)?;
        space.map_code(lin, leaf, backing, &layout)?;
        Ok(())
    }

    /// Whether this space may map `leaf` writable now.
    fn host_write(&self, m: &Machine, cpu: &CpuState, number: usize, leaf: &Leaf) -> bool {
        let allowed = leaf.writable || number == KERNEL && cpu.cr0 & cr0::WP == 0;
        allowed && leaf.dirty && !m.is_tracked((leaf.frame.0 >> 12) as u32)
    }

    /// Maps the page of `lin` and what belongs around it.
    fn fill(
        &mut self,
        cpu: &CpuState,
        m: &mut Machine,
        number: usize,
        lin: GuestLin,
        leaf: Leaf,
    ) -> Result<(), RawError> {
        let large = leaf.shift > 12;
        if large && number == KERNEL {
            let region = lin.0 & !0x1f_ffff;
            let ours = |l: &Layout| {
                let tramp = l.tramp_as_data();
                [l.vcpu, l.gate, tramp].iter().any(|a| a & !0x1f_ffff == region)
                    || region.wrapping_sub(tramp) < TRAMP_LEN
            };
            // The guest has memory right where we sit, and reads there would not fault.
            if ours(&self.layout) && self.moves < MAX_MOVES {
                return self.relocate(m);
            }
        }
        let span = if large { 512 } else { AROUND };
        let lo = lin.page_number() & !(span - 1);
        let centre = lin.page_number();
        let layout = self.layout;
        let mut run: Vec<Leaf> = Vec::new();
        let mut run_at = GuestLin(0);
        let mut run_write = false;
        for page in lo..lo + span {
            let at = GuestLin(page << 12);
            let mut this = None;
            let skip = layout.data(at).0 < LOW_LIMIT
                || page != centre && self.space(number).data.get(at).mapped()
                || number == KERNEL && layout.reserved(at)
                || self.space(number).code.get(layout.code_in_place_of(at)).mapped();
            if !skip {
                let l = if page == centre {
                    Some(leaf)
                } else if large {
                    let delta = u64::from(page).wrapping_sub(u64::from(centre)) << 12;
                    Some(Leaf { frame: GuestPhys(leaf.frame.0.wrapping_add(delta)), ..leaf })
                } else {
                    peek(m, cpu, at)
                        .filter(|l| l.shift == 12 && (number == KERNEL || l.user))
                        .and_then(|_| prefetch(m, cpu, at))
                };
                this = l.filter(|l| m.is_ram(l.frame));
            }
            if let Some(l) = this {
                let w = self.host_write(m, cpu, number, &l);
                let follows = run.last().is_some_and(|p: &Leaf| p.frame.0 + 0x1000 == l.frame.0);
                if follows && w == run_write {
                    run.push(l);
                    continue;
                }
                self.space(number).map_data_run(run_at, &run, run_write, &layout)?;
                run.clear();
                run.push(l);
                run_at = at;
                run_write = w;
            } else {
                self.space(number).map_data_run(run_at, &run, run_write, &layout)?;
                run.clear();
            }
        }
        self.space(number).map_data_run(run_at, &run, run_write, &layout)?;
        Ok(())
    }

    /// The interpreter has just loaded a segment register of ring 0: lets trampolines load the same selector.
    pub fn cache_segment(&mut self, cpu: &CpuState, m: &mut Machine, which: usize) -> Result<(), RawError> {
        let s = cpu.seg[which];
        let index = usize::from(s.selector >> 3);
        if s.selector & 4 != 0
            || index == 0
            || index >= self.segment_cache.len()
            || !s.present()
            || s.attr.contains(SegAttr::CODE)
            || index * 8 + 7 > usize::from(cpu.gdtr.limit)
        {
            return Ok(());
        }
        let mut bytes = [0u8; 8];
        let at = GuestLin(cpu.gdtr.base.wrapping_add(index as u32 * 8));
        if m.read(cpu, at, &mut bytes, Privilege::Supervisor).is_err() {
            return Ok(());
        }
        let layout = self.layout;
        let host = self.kernel.host_selector(&s, false, &layout)?;
        if self.cache_generation != self.kernel.ldt_generation {
            self.forget_segment_cache();
        }
        let low = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let high = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let base = vp::SEGMENT_CACHE + 16 * index as u32;
        let w = &mut self.kernel.world;
        w.vcpu_write(base, low);
        w.vcpu_write(base + 4, high);
        w.vcpu_write(base + 8, u32::from(host));
        w.vcpu_write(base + 12, 1);
        self.segment_cache[index] = Some(CachedSegment { segment: s, host });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_state_is_not_for_raw_mode() {
        assert_eq!(RawEngine::refusal(&CpuState::reset()), Some(RawRefusal::RealMode));
    }

    #[test]
    fn layouts_keep_our_own_pages_apart() {
        for l in Layout::CANDIDATES {
            let tramp = l.tramp_as_data();
            assert!(l.vcpu.wrapping_sub(tramp) >= TRAMP_LEN && l.gate.wrapping_sub(tramp) >= TRAMP_LEN);
            assert_eq!(l.tramp & 0xff_ffff, 0);
            assert!(
                l.reserved(GuestLin(l.vcpu)) && l.reserved(GuestLin(l.gate)) && l.reserved(GuestLin(tramp))
            );
        }
    }
}
