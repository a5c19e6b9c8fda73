//! The raw engine: guest code runs natively in worlds until it must leave.
//!
//! 1. [`RawEngine::refusal`] says whether the CPU is in a state raw mode can carry, and if not, why.
//! 2. [`RawEngine::run`] follows what the guest changed since the last run (flushes, code writes), picks the space
//!    (`joint.rs`), loads the hardware state, runs, reads it back and turns an EIP inside a trampoline into a guest EIP.
//! 3. The exit is then dealt with here if it is about the shadow or the code view; the rest is told to EM as
//!    [`After`].
//!
//! What a world holds after a run is an allegation: selectors, flags and vCPU words are checked before they are used.

mod exits;
mod fill;
mod follow;
mod in_world;
mod joint;
pub mod kernel_code;
pub mod layout;
mod relay;
mod room;
mod segments;
pub mod space;
pub mod trampolines;
pub mod user_code;
mod users;

use super::engine::{Engine, EngineError, EngineKind, HostExit};
use super::loaded_segment;
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
use host_driver_shim::raw;
use host_driver_shim::ring1::Ring1Engine;
use host_driver_shim::tsc::read as host_tsc;
use host_driver_shim::world::{
    Backing, HwRegs, Kicker, QUICK_SITES, Quick, QuickKind, SegmentRules, UsersRules, World, WorldError,
    WorldExit, WorldLin,
};
use iced_x86::{Code, Instruction, Register};
use joint::Boundary;
pub use joint::Isolation;
use joint::{FEW_JOINT_SPACES, MAX_JOINT_SPACES};
use kernel_code::KernelCode;
use layout::Layout;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use patm::{Location, LongGate, ReasonKind, VcpuWords, vcpu_page as vp};
use segments::Transitions;
use space::{Descriptors, For, Role, Space, Whose};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use user_code::UserCode;
use users::Both;

/// Open files this process asks the host for, if it has less.
const WANTED_FILES: u64 = 2048;
/// Of these so many are not for worlds.
const OTHER_FILES: usize = 256;
/// Address spaces of guest ring 3 that keep a world of their own.
const MAX_USER_SPACES: usize = 16;
/// Linear addresses below this are never mapped (vm.mmap_min_addr of an ordinary account).
const LOW_LIMIT: u32 = 0x1_0000;
/// Code in the last page is interpreted: the end of a span of it would be no 32-bit address.
const LAST_PAGE: u32 = 0xf_ffff;
/// Pages mapped around a faulting one where the guest has them present.
const AROUND: u32 = 16;
/// The host's 64-bit code segment (Linux's __USER_CS).
const HOST_CS64: u16 = 0x33;
/// The host's 32-bit code segment (Linux's __USER32_CS).
const HOST_CS32: u16 = 0x23;
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
    /// EFLAGS.AC set in ring 3: the host's handlers are not to run with alignment checks.
    AlignmentCheck,
    /// EFLAGS.IF clear in ring 3, by a `cli` with IOPL 3: `popf` and `pushf` of ring 3 know only the host's IF.
    UserIfClear,
    /// EFLAGS.VIF or EFLAGS.VIP set.
    VirtualInterrupts,
    /// The interrupt shadow of `sti` or `mov ss` is in force.
    Shadow,
}

impl RawRefusal {
    /// The name in reports, behind who ran instead: `interpreted_in_real_mode` counts instructions, `kvm_ran_in_real_mode`
    /// exits.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            RawRefusal::RealMode => "in_real_mode",
            RawRefusal::V86 => "in_v86_mode",
            RawRefusal::Code16 => "in_16_bit_code",
            RawRefusal::MiddleRing => "in_ring_1_or_2",
            RawRefusal::TrapFlag => "single_stepping",
            RawRefusal::CodeBase => "with_code_base",
            RawRefusal::StackSegment => "with_stack_not_flat",
            RawRefusal::FpuTrap => "with_cr0_em",
            RawRefusal::TscTrap => "with_cr4_tsd",
            RawRefusal::AlignmentCheck => "with_alignment_checks",
            RawRefusal::UserIfClear => "in_ring_3_with_if_clear",
            RawRefusal::VirtualInterrupts => "with_vif_or_vip",
            RawRefusal::Shadow => "in_interrupt_shadow",
        }
    }

    /// As a rule more instructions than a few come before raw mode can go on.
    #[must_use]
    pub const fn lasts(self) -> bool {
        !matches!(self, RawRefusal::Shadow | RawRefusal::FpuTrap | RawRefusal::TrapFlag)
    }
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
    /// The CPU shut down: an exception came while a double fault was being delivered.
    TripleFault {
        /// The host has reset the CPU: what it was doing is not known any more.
        state_lost: bool,
    },
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
    /// What the host said.
    pub raw: HostExit,
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
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    kicker: Option<Arc<dyn Kicker>>,
    /// A kick no exit has answered yet. The next world inherits it: it may have come between the EMT's last look and
    /// the change of worlds.
    unanswered: bool,
}

impl KickTarget {
    /// Makes the running world leave guest code soon.
    pub fn kick(&self) {
        let mut current = self.lock();
        current.unanswered = true;
        if let Some(k) = &current.kicker {
            k.kick();
        }
    }
    pub(super) fn set(&self, kicker: Option<Arc<dyn Kicker>>) {
        let mut current = self.lock();
        if current.unanswered
            && let Some(k) = &kicker
        {
            k.kick();
        }
        current.kicker = kicker;
    }
    /// A kick made a world exit, and the EMT will look round.
    pub(super) fn answered(&self) {
        self.lock().unanswered = false;
    }
    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names a space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// One that guest ring 0 runs in (and ring 3, if it is a joint one).
    Kernel(usize),
    /// One for guest ring 3 alone.
    User(usize),
}

/// Where worlds come from.
pub trait Worlds {
    /// A new world with nothing mapped.
    fn spawn(&self) -> Result<Box<dyn World>, WorldError>;
    /// The same for guest ring 3 alone, whose code may be hostile.
    fn spawn_for_users(&self) -> Result<Box<dyn World>, WorldError> {
        self.spawn()
    }
    /// How trampolines leave in these.
    fn long_gate(&self) -> Option<LongGate> {
        None
    }
    /// The same for guest ring 0 alone, in one that may be told to enter those by itself.
    fn spawn_master(&self) -> Result<Box<dyn World>, WorldError> {
        self.spawn()
    }
    /// Worlds made from here on are bound to this host CPU.
    fn set_cpu(&self, cpu: usize);
    /// For how many address spaces at most the host is asked for worlds of their own.
    fn most(&self) -> usize {
        FEW_JOINT_SPACES
    }
    /// What runs guest code with them.
    fn kind(&self) -> EngineKind {
        EngineKind::Raw
    }
    /// How segments have to be in them.
    fn segments(&self) -> SegmentRules {
        SegmentRules::RAW
    }
    /// In every world, what [`SegmentRules::hole`] is about now ends at `delta`, where the data of guest linear 0 is.
    fn settle(&self, _delta: WorldLin) -> Result<(), WorldError> {
        Ok(())
    }
}

impl Worlds for raw::RawEngine {
    fn spawn(&self) -> Result<Box<dyn World>, WorldError> {
        Ok(Box::new(self.spawn_world()?))
    }
    fn spawn_for_users(&self) -> Result<Box<dyn World>, WorldError> {
        Ok(Box::new(self.spawn_confined()?))
    }
    fn long_gate(&self) -> Option<LongGate> {
        Some(LongGate { selector: HOST_CS64, at: raw::long_gate() })
    }
    fn spawn_master(&self) -> Result<Box<dyn World>, WorldError> {
        Ok(Box::new(raw::RawEngine::spawn_master(self)?))
    }
    fn set_cpu(&self, cpu: usize) {
        raw::RawEngine::set_cpu(self, cpu);
    }
    fn most(&self) -> usize {
        let files = raise_file_limit();
        MAX_JOINT_SPACES.min(files.saturating_sub(OTHER_FILES) / raw::RawWorld::FILES).max(FEW_JOINT_SPACES)
    }
}

/// Worlds of `raw` in which ring 3 is kept from ring 0 by a protection key.
pub struct Keyed(pub raw::RawEngine);

impl Worlds for Keyed {
    fn spawn(&self) -> Result<Box<dyn World>, WorldError> {
        Ok(Box::new(self.0.spawn_keyed()?))
    }
    fn spawn_for_users(&self) -> Result<Box<dyn World>, WorldError> {
        self.0.spawn_for_users()
    }
    fn long_gate(&self) -> Option<LongGate> {
        Worlds::long_gate(&self.0)
    }
    fn set_cpu(&self, cpu: usize) {
        self.0.set_cpu(cpu);
    }
    fn most(&self) -> usize {
        self.0.most()
    }
    fn segments(&self) -> SegmentRules {
        SegmentRules::KEYED
    }
}

impl Worlds for Ring1Engine {
    fn spawn(&self) -> Result<Box<dyn World>, WorldError> {
        Ok(Box::new(self.spawn_world()?))
    }
    fn set_cpu(&self, _: usize) {}
    fn kind(&self) -> EngineKind {
        EngineKind::Ring1
    }
    fn segments(&self) -> SegmentRules {
        SegmentRules { pages: self.has_smep(), ..Ring1Engine::segment_rules() }
    }
    fn settle(&self, delta: WorldLin) -> Result<(), WorldError> {
        Ring1Engine::settle(self, delta)
    }
}

/// Lets this process have as many open files as it may, and says how many that are.
fn raise_file_limit() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 0 };
    let wanted = hard.min(WANTED_FILES).max(soft);
    let have = if setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).is_ok() { wanted } else { soft };
    usize::try_from(have).unwrap_or(usize::MAX)
}

/// All worlds of a guest.
pub struct RawEngine {
    host: Box<dyn Worlds>,
    code: CodeMemory,
    layout: Layout,
    layouts_tried: usize,
    /// Highest byte of the addresses the guest's kernel runs at, once it does.
    code_top: Option<u8>,
    isolation: Isolation,
    /// Worlds of guest ring 0, at least one: the only one, or one for each hot CR3.
    kernels: Vec<Space>,
    /// Which of them is whose joint world, by CR3: an entry counts if that world says so, too.
    joint_of: HashMap<u32, usize>,
    /// CR3 of address spaces that had a joint world and lost it, the latest last.
    evicted: VecDeque<u32>,
    /// As many joint worlds as there may be.
    most_worlds: usize,
    /// Worlds of guest ring 3 alone.
    users: Vec<Space>,
    /// What keeps ring 3 from ring 0 in joint worlds, once ring 3 has run.
    boundary: Option<Boundary>,
    descriptors: Descriptors,
    clock: u64,
    /// The ring-0 code view.
    pub kernel_code: KernelCode,
    /// Copied pages of ring-3 code in worlds of its own, where system calls are made to leave by a gate.
    pub user_code: UserCode,
    /// Copied pages of ring-3 code in joint worlds, where system calls are patched.
    pub joint_code: UserCode,
    count_inline: bool,
    transitions: Transitions,
    /// Instructions worlds may do by themselves; the version of the table, and of the patches it was made for.
    quick: [Quick; QUICK_SITES],
    quick_version: u64,
    quick_changes: u64,
    /// The stack segment with which ring 0 begins after a system call done in line.
    entry_ss: Segment,
    kick: Arc<KickTarget>,
    /// Who is kicked: where the CPU runs, and the world of ring 3 that one may enter.
    kicking: Option<(Place, Option<usize>)>,
    paging_key: u32,
    /// Which space's world has the guest's newest FPU state; None: CPUM has it.
    fpu_in: Option<Place>,
    last: ExitRecord,
    /// TSC when the last run entered the world and when it left.
    last_run: (u64, u64),
    /// Ticks worlds have delivered by themselves.
    ticks: u64,
    /// How often reservations moved.
    pub moves: u64,
    /// Worlds of ring 3 that its code has broken.
    pub broken_worlds: u64,
    /// Worlds that had ended before they were to run.
    pub replaced_worlds: u64,
    /// The page of ring 3 whose fault the guest was last told, to be mapped on its way back.
    refill: Option<(GuestLin, bool)>,
    /// What the world of ring 0 needs to enter one of ring 3 by itself, but for which.
    users_rules: UsersRules,
    /// Which it may enter.
    may_enter: Option<usize>,
    /// What joint worlds were told last, and the number that stands for it.
    common: Option<relay::Common>,
    epoch: u32,
    /// The joint worlds that ran in the last run, if it went through more than one.
    ran: Vec<usize>,
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

impl RawEngine {
    /// Makes the first ring-0 world.
    pub fn new(
        host: Box<dyn Worlds>,
        code: CodeMemory,
        count_inline: bool,
        isolation: Isolation,
    ) -> Result<RawEngine, RawError> {
        let rules = host.segments();
        let layout = Layout { hole: rules.hole, ..Layout::CANDIDATES[0] };
        let layout = if rules.keys { layout.keyed(0) } else { layout };
        host.settle(WorldLin(layout.delta))?;
        // Ring 0 must not run what is shown to ring 3 as it is: if it does so by limits alone, that is a known gap.
        let isolation = if rules.ring0 != 3 && !rules.pages { Isolation::Worlds } else { isolation };
        let isolation = match isolation {
            _ if rules.keys => Isolation::Limits,
            Isolation::Strict => Isolation::Worlds,
            other => other,
        };
        let strict = isolation == Isolation::Worlds;
        let kernel = if strict { host.spawn_master()? } else { host.spawn()? };
        let kernel = Space::new(kernel, Role::Supervisor);
        let (most_worlds, long_gate) = (host.most(), host.long_gate());
        let mut descriptors = Descriptors::new(rules);
        descriptors.limit_code(isolation == Isolation::LimitsCode);
        let mut engine = RawEngine {
            host,
            code,
            layout,
            layouts_tried: 1,
            code_top: None,
            isolation,
            kernels: vec![kernel],
            joint_of: HashMap::new(),
            evicted: VecDeque::new(),
            most_worlds,
            users: Vec::new(),
            boundary: Boundary::at_first(isolation),
            descriptors,
            clock: 0,
            kernel_code: KernelCode::new(layout, count_inline, rules.ring0),
            user_code: match long_gate {
                Some(_) => UserCode::patching(&Layout { transit: None, ..layout }, count_inline, long_gate),
                None => UserCode::new(rules.int_faults),
            },
            joint_code: if rules.int_faults {
                UserCode::new(true)
            } else {
                UserCode::patching(&layout, count_inline, None)
            },
            count_inline,
            transitions: Transitions::default(),
            quick: Default::default(),
            quick_version: 0,
            quick_changes: 0,
            entry_ss: Segment::default(),
            kick: Arc::default(),
            kicking: None,
            paging_key: 0,
            fpu_in: None,
            last: ExitRecord {
                cause: Cause::Other,
                route: Route::Signal,
                eip: 0,
                cpl: 0,
                raw: WorldExit::Kick.into(),
            },
            last_run: (0, 0),
            ticks: 0,
            moves: 0,
            broken_worlds: 0,
            replaced_worlds: 0,
            refill: None,
            users_rules: UsersRules::default(),
            may_enter: None,
            common: None,
            epoch: 0,
            ran: Vec::new(),
        };
        engine.furnish(0)?;
        Ok(engine)
    }

    /// Moves every world to a host CPU.
    pub fn pin(&mut self, cpu: usize) -> Result<(), RawError> {
        self.host.set_cpu(cpu);
        for space in self.kernels.iter_mut().chain(&mut self.users) {
            space.world.pin(cpu)?;
        }
        Ok(())
    }

    /// Number of spaces, data pages mapped, code-view pages mapped.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize, usize) {
        let all = || self.kernels.iter().chain(&self.users);
        (all().count(), all().map(|s| s.data.len()).sum(), all().map(|s| s.code.len()).sum())
    }

    /// One line per world.
    #[must_use]
    pub fn describe_worlds(&self) -> String {
        let mut text = String::new();
        for s in self.kernels.iter().chain(&self.users) {
            let who = match s.role {
                Role::Supervisor => "ring 0".to_string(),
                Role::Joint { cr3 } => format!("all rings of cr3 {cr3:08x}"),
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

    /// A counter of in-line executions by kind (0..64), as the ring-0 worlds counted them.
    #[must_use]
    pub fn inline_counter(&self, kind: u32) -> u64 {
        let at = vp::COUNTERS + 4 * (kind & 63);
        self.kernels.iter().map(|s| u64::from(s.world.vcpu_read(at))).sum()
    }

    /// Shadow misses worlds have filled by themselves.
    #[must_use]
    pub fn filled_in_worlds(&self) -> u64 {
        self.kernels.iter().chain(&self.users).map(|s| s.filled).sum()
    }

    /// Page faults worlds have delivered to the guest by themselves.
    #[must_use]
    pub fn delivered_in_worlds(&self) -> u64 {
        self.kernels.iter().map(|s| u64::from(s.world.faults_delivered())).sum()
    }

    /// `invlpg`s worlds have done by themselves behind the gate.
    #[must_use]
    pub fn flushed_in_worlds(&self) -> u64 {
        self.kernels.iter().map(|s| u64::from(s.world.flushes_done())).sum()
    }

    /// Accesses to pages mapped for a moment that worlds have done by themselves.
    #[must_use]
    pub fn accessed_in_worlds(&self) -> u64 {
        self.kernels.iter().map(|s| u64::from(s.world.accesses_done())).sum()
    }

    /// System calls and exceptions of ring 3 that worlds have sent to the guest's handlers by themselves, other than page
    /// faults.
    #[must_use]
    pub fn reflected_in_worlds(&self) -> u64 {
        self.kernels.iter().map(|s| u64::from(s.world.reflected())).sum()
    }

    /// Ticks worlds have delivered to a guest that slept or was in ring 3, by themselves.
    #[must_use]
    pub fn ticks_in_worlds(&self) -> u64 {
        self.ticks
    }

    /// Port accesses worlds have answered by themselves behind the gate.
    #[must_use]
    pub fn ports_in_worlds(&self) -> u64 {
        self.kernels.iter().map(|s| u64::from(s.world.ports_done())).sum()
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
        // Trampolines have no place for these; ring 0 sets them by `iret` only (SDM Vol. 2A, IRET).
        if cpu.eflags & (eflags::VIF | eflags::VIP) != 0 {
            return Some(RawRefusal::VirtualInterrupts);
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
                } else if cpu.eflags & eflags::AC != 0 {
                    Some(RawRefusal::AlignmentCheck)
                } else if cpu.eflags & eflags::IF == 0 {
                    Some(RawRefusal::UserIfClear)
                } else {
                    None
                }
            }
            _ => Some(RawRefusal::MiddleRing),
        }
    }

    fn space(&mut self, place: Place) -> &mut Space {
        match place {
            Place::Kernel(i) => &mut self.kernels[i],
            Place::User(i) => &mut self.users[i],
        }
    }

    fn spaces(&mut self) -> impl Iterator<Item = &mut Space> {
        self.kernels.iter_mut().chain(&mut self.users)
    }

    /// Brings the guest's FPU state into CPUM, whose copy counts from here to the next run.
    pub fn fetch_fpu(&mut self, cpu: &mut CpuState) {
        if let Some(place) = self.fpu_in.take() {
            cpu.fpu.0 = *self.space(place).world.fpu();
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
        let place = self.choose_space(cpu, m)?;
        if m.guard().is_some() && !self.space(place).world.can_guard() {
            // This one cannot watch the time: the monitor does.
            return Ok(After::Kicked);
        }
        if self.space(place).world.is_gone() {
            self.replace(place, cpu)?;
        }
        let calm = self.catch_up(place, cpu, m)?;
        self.ran.clear();
        if matches!(place, Place::User(_)) {
            self.refill(cpu, m, place)?;
        }
        let whose = match cpu.cpl {
            3 => {
                let joint = self.boundary.filter(|_| matches!(place, Place::Kernel(_)));
                For::Ring3 { below: joint.and_then(Boundary::limit) }
            }
            _ => For::Ring0,
        };
        let sel = self.descriptors.selectors(&cpu.seg, &self.layout, whose);
        let mut regs = HwRegs { gpr: cpu.gpr, eip: cpu.eip, eflags: 0, sel };
        if cpu.cpl == 3 {
            regs.eflags = (cpu.eflags & USER_FLAGS & !eflags::AC) | eflags::FIXED | eflags::IF;
        } else {
            regs.eip = self.kernel_code.patm.resume_eip(cpu.eip);
            regs.eflags = (cpu.eflags & NATIVE_FLAGS) | eflags::FIXED | eflags::IF;
        }
        match place {
            Place::Kernel(number) => self.load_vcpu_page(number, cpu, m, interrupt_waits)?,
            Place::User(_) => self.note_user_segments(cpu),
        }
        if self.fpu_in != Some(place) {
            self.fetch_fpu(cpu);
            *self.space(place).world.fpu() = cpu.fpu.0;
            self.fpu_in = Some(place);
        }
        let user_cs = match place {
            Place::Kernel(i) if matches!(self.kernels[i].role, Role::Joint { .. }) => {
                self.user_code_selector()
            }
            _ => 0,
        };
        let entered = self.let_enter(place, cpu, m)?;
        if self.kicking != Some((place, entered)) {
            let mut kicker = self.space(place).world.kicker();
            if let Some(i) = entered {
                kicker = Arc::new(Both(kicker, self.users[i].world.kicker()));
            }
            self.kick.set(Some(kicker));
            self.kicking = Some((place, entered));
        }
        let descriptors = &self.descriptors;
        let space = match place {
            Place::Kernel(i) => &mut self.kernels[i],
            Place::User(i) => &mut self.users[i],
        };
        for selector in sel {
            space.install(descriptors, selector)?;
        }
        let layout = self.layout;
        space.tell_cpuid(m);
        space.allow_fills(cpu, &layout, (user_cs, descriptors.rules().keys), self.boundary);
        space.allow_ports(m);
        space.allow_guard(m);
        if let Place::Kernel(number) = place {
            self.arm(number, cpu, m, calm);
        }
        let entered = host_tsc();
        let mut exit = self.space(place).run(&mut regs);
        let left = host_tsc();
        let mut place = place;
        if let Place::Kernel(from) = place {
            let to = match exit {
                Ok(WorldExit::Handed { seat }) => Some(seat),
                _ => None,
            };
            let to = self.follow_hand_overs(from, to, cpu, m, entered)?;
            if to != from {
                place = Place::Kernel(to);
                exit = self.kernels[to].world.take_exit(&mut regs);
            }
        }
        self.space(place).take_posted(m, entered);
        self.ticks += m.ticks.len() as u64;
        m.ran_natively();
        let flushed = self.space(place).take_fills(&layout, m.frames())?;
        self.last_run = (entered, left);
        if let Place::Kernel(number) = place {
            self.follow_users(number, m.frames())?;
        }
        if !flushed.is_empty() {
            m.forget_translations();
        }
        self.follow_flushes(place, cpu, &flushed)?;
        let exit = match exit {
            Ok(exit) => exit,
            Err(WorldError::BadState(why)) => {
                log::warn!("a world could not load the guest's state: {why}");
                return Ok(After::Interpret);
            }
            Err(WorldError::Died(why)) if matches!(place, Place::User(_)) => {
                return self.ring3_broke_its_world(place, cpu, &why);
            }
            Err(WorldError::Died(why)) if self.ring3_ran_joint(place) => {
                return self.ring3_broke_a_joint_world(place, cpu, m, &why);
            }
            Err(e) => return Err(e.into()),
        };
        if exit == WorldExit::Kick {
            self.kick.answered();
            self.forget_kicks();
            if let Some(i) = self.may_enter {
                self.users[i].world.forget_kick();
            }
        }
        if let (WorldExit::Users, Place::Kernel(number)) = (exit, place) {
            return self.take_over_from_users(cpu, m, number);
        }
        cpu.gpr = regs.gpr;
        cpu.eip = regs.eip;
        match place {
            Place::Kernel(number) => self.read_back(cpu, m, number, &regs, exit),
            Place::User(number) => {
                let expected = self.users[number].loaded;
                self.read_back_user(cpu, m, place, &regs, expected, exit)
            }
        }
    }

    /// A world of ring 3 alone is gone: it gets another one, and the guest a #GP of the code that ran there, at the last place
    /// known. What does that natively is nothing a guest could do on bare metal.
    fn ring3_broke_its_world(
        &mut self,
        place: Place,
        cpu: &mut CpuState,
        why: &str,
    ) -> Result<After, RawError> {
        self.renew(place)?;
        Ok(self.world_is_broken(cpu, why))
    }

    /// Puts a new world in the place of one that is gone.
    fn renew(&mut self, place: Place) -> Result<(), RawError> {
        let world = match place {
            Place::Kernel(_) if self.isolation == Isolation::Worlds => self.host.spawn_master()?,
            Place::Kernel(_) => self.host.spawn()?,
            Place::User(_) => self.host.spawn_for_users()?,
        };
        self.forbid_entering(0);
        let clock = self.clock;
        let space = self.space(place);
        *space = Space::new(world, space.role);
        space.last_used = clock;
        self.kicking = None;
        self.kick.set(None);
        match place {
            Place::Kernel(number) => self.furnish(number),
            Place::User(number) => self.furnish_user(number),
        }
    }

    /// A world ended while it slept: another one takes its place, and nothing is lost.
    fn replace(&mut self, place: Place, cpu: &mut CpuState) -> Result<(), RawError> {
        log::warn!("a world has ended by itself; another one takes its place");
        if self.fpu_in == Some(place) {
            self.fetch_fpu(cpu);
        }
        self.replaced_worlds += 1;
        self.renew(place)
    }

    /// Ring 3's world has been replaced: what ring 3 gets. Its FPU state is lost, and what is known may be another program's.
    fn world_is_broken(&mut self, cpu: &mut CpuState, why: &str) -> After {
        cpu.fpu = CpuState::reset().fpu;
        log::warn!("code of ring 3 broke its world ({why}); it gets a #GP at {:08x}", cpu.eip);
        self.fpu_in = None;
        self.broken_worlds += 1;
        self.last = ExitRecord {
            cause: Cause::GuestFault,
            route: Route::Signal,
            eip: cpu.eip,
            cpl: 3,
            raw: WorldExit::Fault { vector: Trap::gp(0).vector, error_code: 0, cr2: 0 }.into(),
        };
        After::Deliver(Event::Exception(Trap::gp(0)))
    }

    /// What a joint world says last is that ring 3 was running in it. (Where an engine has pages for the rings, its worlds do not
    /// end one by one.)
    fn ring3_ran_joint(&self, place: Place) -> bool {
        let rules = self.descriptors.rules();
        let Place::Kernel(i) = place else { return false };
        let space = &self.kernels[i];
        let joint = matches!(space.role, Role::Joint { .. }) && (rules.keys || !rules.pages);
        joint && space.world.vcpu_read(vp::CPL) == 3
    }

    /// The same as [`Self::ring3_broke_its_world`] for a joint world. What it held for ring 0 (CR2, the virtual IF) ring 3 could
    /// not write where there are keys. Ring 3's own registers are lost but for those it was entered with last; what is known of
    /// the others may be ring 0's.
    fn ring3_broke_a_joint_world(
        &mut self,
        place: Place,
        cpu: &mut CpuState,
        m: &mut Machine,
        why: &str,
    ) -> Result<After, RawError> {
        let Place::Kernel(number) = place else { return Err(WorldError::Died(why.into()).into()) };
        self.follow_ring(cpu, number, 3);
        self.ring3_segments(cpu, m, number);
        let world = &self.kernels[number].world;
        cpu.gpr = [0; 8];
        cpu.gpr[4] = world.vcpu_read(vp::USER_SS_HOST);
        cpu.eip = world.vcpu_read(vp::USER_CS_HOST);
        cpu.eflags = eflags::FIXED | eflags::IF | cpu.eflags & eflags::IOPL;
        self.renew(place)?;
        Ok(self.world_is_broken(cpu, why))
    }

    /// Follows the flush that a space has missed. True: all it shows is right now, and nothing was entered or dropped since
    /// the last time.
    fn catch_up(&mut self, place: Place, cpu: &CpuState, m: &mut Machine) -> Result<bool, RawError> {
        let layout = self.layout;
        let space = self.space(place);
        let Some(scope) = space.pending_sync.take() else { return Ok(false) };
        let gone = space.sync(m, cpu, scope, &layout)?;
        let changes = space.data.changes().wrapping_add(space.code.changes());
        let calm = std::mem::replace(&mut space.changes, changes) == changes;
        if let Place::Kernel(_) = place {
            self.forget_code_of_other_frames(m, cpu, &gone)?;
        }
        Ok(calm)
    }

    fn load_vcpu_page(
        &mut self,
        number: usize,
        cpu: &CpuState,
        m: &mut Machine,
        interrupt_waits: bool,
    ) -> Result<(), RawError> {
        let (mut ring0, mut ring3) = ([0u16; 6], [0u16; 6]);
        if self.boundary.is_some() {
            for (i, s) in cpu.seg.iter().enumerate().filter(|(i, _)| *i != seg::CS) {
                ring0[i] = self.descriptors.selector(s, false, &self.layout, For::Ring0);
                ring3[i] = self.ring3_selector(s);
            }
            for selector in ring0.into_iter().chain(ring3) {
                self.kernels[number].install(&self.descriptors, selector)?;
            }
        }
        self.publish_segment_cache(number)?;
        self.publish_transitions(number, cpu, m)?;
        self.publish_quick(number);
        let w = &mut self.kernels[number].world;
        w.vcpu_write(vp::CPL, u32::from(cpu.cpl));
        w.vcpu_write(vp::REFILL, 0);
        w.vcpu_write(vp::IF_FLAG, cpu.eflags & eflags::IF);
        w.vcpu_write(vp::PENDING, u32::from(interrupt_waits));
        w.vcpu_write(vp::HIDDEN_FLAGS, cpu.eflags & (eflags::IOPL | eflags::NT | eflags::AC | eflags::ID));
        for (i, s) in cpu.seg.iter().enumerate() {
            let at = 4 * i as u32;
            w.vcpu_write(vp::SELECTORS + at, u32::from(s.selector));
            w.vcpu_write(vp::HOST_RING0 + at, u32::from(ring0[i]));
            w.vcpu_write(vp::HOST_RING3 + at, u32::from(ring3[i]));
        }
        w.vcpu_write(vp::CR0, cpu.cr0);
        w.vcpu_write(vp::CR2, cpu.cr2);
        w.vcpu_write(vp::CR3, cpu.cr3);
        w.vcpu_write(vp::CR4, cpu.cr4);
        w.vcpu_write(vp::GDT_BASE, cpu.gdtr.base);
        w.vcpu_write(vp::GDT_LIMIT, u32::from(cpu.gdtr.limit));
        w.vcpu_write(vp::IDT_BASE, cpu.idtr.base);
        w.vcpu_write(vp::IDT_LIMIT, u32::from(cpu.idtr.limit));
        w.vcpu_write(vp::LDTR, u32::from(cpu.ldtr.selector));
        w.vcpu_write(vp::TR, u32::from(cpu.tr.selector));
        Ok(())
    }
}

impl Engine for RawEngine {
    fn kind(&self) -> EngineKind {
        self.host.kind()
    }
    fn refusal(&self, cpu: &CpuState) -> Option<RawRefusal> {
        RawEngine::refusal(cpu)
    }
    fn run(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        interrupt_waits: bool,
    ) -> Result<After, EngineError> {
        Ok(RawEngine::run(self, cpu, m, interrupt_waits)?)
    }
    fn fetch_fpu(&mut self, cpu: &mut CpuState) {
        RawEngine::fetch_fpu(self, cpu);
    }
    fn follow(&mut self, cpu: &CpuState, m: &mut Machine) -> Result<(), EngineError> {
        Ok(self.follow_changes(m, cpu)?)
    }
    fn others_ran(&mut self, cpu: &CpuState, m: &mut Machine) -> Result<(), EngineError> {
        Ok(self.start_over(cpu, m)?)
    }
    fn kick_target(&self) -> Arc<KickTarget> {
        self.kick.clone()
    }
    fn last_exit(&self) -> ExitRecord {
        self.last
    }
    fn last_run(&self) -> (u64, u64) {
        self.last_run
    }
    fn will_interpret(&mut self, cpu: &CpuState, m: &Machine, instruction: &Instruction) {
        if cpu.cpl == 3 && instruction.code() == Code::Int_imm8 {
            self.note_system_call(instruction.immediate8());
        }
        if cpu.cpl == 0
            && let HostExit::World(WorldExit::Gate { reason }) = self.last.raw
        {
            self.learn_invlpg(cpu, reason, instruction);
            self.learn_port(cpu, m, reason, instruction);
            self.learn_halt(cpu, m, reason, instruction);
            self.learn_iret(reason, instruction);
            self.learn_cr3(cpu, m, reason, instruction);
        }
    }
    fn has_interpreted(&mut self, cpu: &CpuState, m: &mut Machine, instruction: &Instruction) {
        if let Some(which) = loaded_segment(instruction) {
            self.cache_segment(cpu, m, which);
        }
    }
    fn can_guard(&self) -> bool {
        self.kernels.first().is_some_and(|space| space.world.can_guard())
    }
    fn guards(&self, cpu: &CpuState) -> bool {
        cpu.cpl != 3 || self.isolation != Isolation::Worlds && self.users.iter().all(|s| s.world.can_guard())
    }
    fn as_raw(&self) -> Option<&RawEngine> {
        Some(self)
    }
}

impl Drop for RawEngine {
    fn drop(&mut self) {
        // Other threads keep the target: no kick is to go to a world that is gone.
        self.kick.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::{machine, paged};
    use crate::pgm::walk::PhysMemory;
    use host_driver_shim::fake::{FakeState, FakeWorld};

    type Script = fn(&mut FakeWorld);

    /// Worlds that follow scripts: the ring-0 world the first, ring-3 worlds the second.
    struct Fakes(Mutex<Vec<Script>>);

    impl Worlds for Fakes {
        fn spawn(&self) -> Result<Box<dyn World>, WorldError> {
            let mut scripts = self.0.lock().unwrap();
            let mut world = FakeWorld::new();
            let script = if scripts.len() > 1 { scripts.remove(0) } else { scripts[0] };
            script(&mut world);
            Ok(Box::new(world))
        }
        fn set_cpu(&self, _: usize) {}
    }

    fn engine(scripts: &[Script]) -> RawEngine {
        let code = CodeMemory::new(1 << 20).unwrap();
        RawEngine::new(Box::new(Fakes(Mutex::new(scripts.to_vec()))), code, false, Isolation::Worlds).unwrap()
    }

    /// 32-bit protected mode without paging, everything flat.
    fn flat(cpl: u8) -> CpuState {
        let mut cpu = CpuState::reset();
        cpu.cr0 |= cr0::PE;
        cpu.cpl = cpl;
        cpu.eip = 0x2000;
        cpu.eflags = eflags::FIXED | eflags::IF;
        let attr = SegAttr::PRESENT | SegAttr::RW | SegAttr::BIG;
        for s in &mut cpu.seg {
            *s = Segment { selector: 0x10 | u16::from(cpl), base: 0, limit: u32::MAX, attr };
        }
        cpu.seg[seg::CS].attr |= SegAttr::CODE;
        assert_eq!(RawEngine::refusal(&cpu), None);
        cpu
    }

    fn single_step_trap(regs: &mut HwRegs, _: &mut FakeState) -> Result<WorldExit, WorldError> {
        regs.eip += 1;
        regs.eflags |= eflags::TF;
        Ok(WorldExit::Fault { vector: 1, error_code: 0, cr2: 0 })
    }

    #[test]
    fn a_kick_that_comes_before_the_world_is_chosen_is_not_lost() {
        let (mut engine, mut m) = (engine(&[|_| ()]), machine(1));
        engine.kick_target().kick();
        assert_eq!(engine.run(&mut flat(0), &mut m, false).unwrap(), After::Kicked);
        // And it is over with that: the ring-3 world follows its (empty) script, which is its end.
        let after = engine.run(&mut flat(3), &mut m, false).unwrap();
        assert_eq!(after, After::Deliver(Event::Exception(Trap::gp(0))));
        assert_eq!((engine.users.len(), engine.broken_worlds), (1, 1));
    }

    #[test]
    fn a_kick_of_one_world_that_another_runs_after_is_inherited() {
        let script: Script = |w| {
            w.then_exit(WorldExit::Syscall);
        };
        let (mut engine, mut m) = (engine(&[script]), machine(1));
        engine.run(&mut flat(0), &mut m, false).unwrap();
        engine.kick_target().kick();
        assert_eq!(engine.run(&mut flat(3), &mut m, false).unwrap(), After::Kicked);
    }

    const CODE: u32 = 0x2_0000;

    #[test]
    fn a_code_page_whose_frame_changed_loses_its_copy_with_the_flush_and_not_later() {
        let script: Script = |w| {
            w.then(|regs, _| {
                regs.eip = CODE;
                Ok(WorldExit::Fault { vector: 14, error_code: pf::FETCH | pf::USER, cr2: CODE })
            });
            for shown in [true, true, false] {
                w.then(move |_, state| {
                    let page = state.pages.get(&(CODE >> 12)).copied();
                    assert_eq!(page.is_some_and(|(b, _)| matches!(b, Backing::Code(_))), shown);
                    Ok(WorldExit::Kick)
                });
            }
        };
        let (mut engine, mut m) = (engine(&[script]), machine(1));
        let mut cpu = flat(0);
        let tables = paged(&m, 0x1000, 0);
        (cpu.cr0, cpu.cr3) = (tables.cr0, tables.cr3);
        let pte = GuestPhys(0x2000 + u64::from(CODE >> 12) * 4);
        m.write_u32(pte, 0x8003);
        assert_eq!(engine.run(&mut cpu, &mut m, false).unwrap(), After::Continue);
        assert!(m.is_tracked(8));
        engine.run(&mut cpu, &mut m, false).unwrap();
        // A new table entry without a flush changes nothing yet.
        m.write_u32(pte, 0x9003);
        engine.run(&mut cpu, &mut m, false).unwrap();
        m.paging_changed(&cpu, PagingChange::Page(GuestLin(CODE + 5)));
        engine.run(&mut cpu, &mut m, false).unwrap();
        assert_eq!(engine.kernel_code.frame_of(GuestLin(CODE)), None);
        assert!(!m.is_tracked(8));
    }

    #[test]
    fn single_stepping_that_ring_3_began_by_itself_is_told_to_the_guest() {
        let script: Script = |w| {
            w.then(single_step_trap);
        };
        let (mut engine, mut m) = (engine(&[script]), machine(1));
        let mut cpu = flat(3);
        let after = engine.run(&mut cpu, &mut m, false).unwrap();
        assert_eq!(after, After::Deliver(Event::Exception(Trap::DB)));
        assert_ne!(cpu.eflags & eflags::TF, 0);
        assert_ne!(cpu.dr[6] & (1 << 14), 0);
        assert_eq!(RawEngine::refusal(&cpu), Some(RawRefusal::TrapFlag));
    }

    #[test]
    fn ring_3_is_interpreted_where_its_flags_mean_more_than_the_hosts() {
        let mut cpu = flat(3);
        cpu.eflags &= !eflags::IF;
        assert_eq!(RawEngine::refusal(&cpu), Some(RawRefusal::UserIfClear));
        cpu.eflags |= eflags::IF | eflags::AC;
        assert_eq!(RawEngine::refusal(&cpu), Some(RawRefusal::AlignmentCheck));
        cpu.cpl = 0;
        assert_eq!(RawEngine::refusal(&cpu), None);
        cpu.eflags |= eflags::VIF;
        assert_eq!(RawEngine::refusal(&cpu), Some(RawRefusal::VirtualInterrupts));
    }

    #[test]
    fn the_reset_state_is_not_for_raw_mode() {
        assert_eq!(RawEngine::refusal(&CpuState::reset()), Some(RawRefusal::RealMode));
    }

    #[test]
    fn layouts_keep_our_own_pages_apart() {
        for l in Layout::CANDIDATES {
            let l = Layout { hole: Ring1Engine::segment_rules().hole, ..l };
            let engines = |at: u32, len: u32| {
                (0..len).step_by(0x1000).any(|i| l.is_engines(WorldLin(at.wrapping_add(i))))
            };
            assert!(l.is_engines(WorldLin(l.delta - 1)) && !l.is_engines(WorldLin(l.delta)));
            assert!(!engines(l.data(GuestLin(l.vcpu)).0, 0x2000));
            assert!(layout::USER_TRAMPS.iter().all(|at| !engines(*at, layout::USER_TRAMP_LEN)));
            let tramp = l.tramp_as_data();
            assert!([l.vcpu, l.gate].iter().all(|a| !l.behind_trampolines(GuestLin(*a))));
            for top in 0..=u8::MAX {
                let near = l.near(top);
                assert!(!engines(near.user_tramp(), layout::USER_TRAMP_LEN + layout::TRAMP_LEN), "{top:x}");
                assert!([l.vcpu, l.gate].iter().all(|a| !near.behind_trampolines(GuestLin(*a))), "{top:x}");
                for base in layout::USER_TRAMPS {
                    let apart = base.wrapping_sub(near.user_tramp())
                        >= layout::TRAMP_LEN + layout::USER_TRAMP_LEN
                        && near.user_tramp().wrapping_sub(base) >= layout::USER_TRAMP_LEN;
                    assert!(apart, "{top:x}: {base:x} and {near:x?}");
                }
            }
            assert_eq!(l.tramp & 0xff_ffff, 0);
            // A large page lies among the trampolines if its first byte does.
            assert!([l.delta, l.user_tramp(), layout::USER_TRAMP_LEN].iter().all(|a| a & 0x1f_ffff == 0));
            assert!(
                l.reserved(GuestLin(l.vcpu)) && l.reserved(GuestLin(l.gate)) && l.reserved(GuestLin(tramp))
            );
        }
    }
}
