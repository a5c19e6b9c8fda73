//! What a patch is.

use crate::map::EipMap;
use alloc::vec::Vec;
use csam::{GuestLin, SensitiveKind};

/// Where trampolines live and what they use. All addresses are EIPs or flat linear addresses, 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// First EIP of the trampoline region. Best 16 MiB aligned and one of [`crate::good_bases`].
    pub tramp_base: u32,
    /// Length of the region in bytes; up to 16 MiB is used well. Only touched pages need memory.
    pub tramp_len: u32,
    /// Linear address of the vCPU page ([`crate::vcpu_page`]).
    pub vcpu_base: u32,
    /// In-line trampolines count their executions in the vCPU page.
    pub count_inline: bool,
    /// The hardware ring that guest ring 0 runs in: 3, as its users', or 1.
    pub ring: u8,
    /// In worlds where ring 3 is kept from all else by a protection key: what trampolines go by.
    pub keys: Option<Keys>,
}

/// How a ring transition changes what protection keys allow (SDM Vol. 3A, 4.6.2). Only code of this very kind may load PKRU
/// where ring 3 can jump to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keys {
    /// Ring 3's flat code segment, which no other code has.
    pub code: u16,
    /// A flat data segment.
    pub data: u16,
    /// Linear address of the transit page ([`crate::vcpu_page::TRANSIT`]).
    pub transit: u32,
}

impl Keys {
    /// PKRU of ring 3: nothing of key 0. It must be less than 80h.
    pub const RING3: u8 = 3;
    /// PKRU of ring 0.
    pub const RING0: u8 = 0;
}

/// Names a patch; never used twice by one [`crate::Patm`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PatchId(pub u32);

/// How a patch gets control.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Tactic {
    /// A 5-byte `jmp` over one instruction.
    Jump5,
    /// A 5-byte `jmp` over several instructions; none but the first starts in the jump itself.
    Group,
    /// A 5-byte `jmp` over several instructions, its displacement chosen so that it traps wherever one of them starts.
    Pun,
    /// One of these with a branch into the window from inside the window only (`je 1f; sti; 1:`).
    JccWindow,
    /// A 2-byte `jmp` to filler nearby, which holds the 5-byte one.
    ShortJump,
    /// One of these over a branch that leads to a site with a trap byte and does that site itself.
    Thread,
    /// One trapping byte (`hlt`).
    TrapByte,
}

impl Tactic {
    /// Every tactic, best first.
    pub const ALL: [Self; 7] =
        [Self::Jump5, Self::Group, Self::Pun, Self::JccWindow, Self::ShortJump, Self::Thread, Self::TrapByte];

    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Jump5 => "jump",
            Self::Group => "group",
            Self::Pun => "pun",
            Self::JccWindow => "jcc window",
            Self::ShortJump => "short jump",
            Self::Thread => "threaded branch",
            Self::TrapByte => "trap byte",
        }
    }
}

/// How a site is done.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Route {
    /// Completely in its trampoline (which may still leave by the gate in rare cases).
    InLine,
    /// The trampoline leaves by the gate and the monitor does it.
    Gate,
    /// The site is a trapping byte and the monitor does it.
    TrapByte,
}

/// Why a trampoline left by the gate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ReasonKind {
    /// The site is still to be done: EIP is the site.
    Emulate,
    /// `sti` is done and an interrupt waits: EIP is behind the site, in the STI shadow.
    PendingAfterSti,
    /// `popf` is done, IF is 1 and an interrupt waits: EIP is behind the site.
    PendingAfterPopf,
    /// `iret` is done, IF is 1 and an interrupt waits: EIP is in `SCRATCH_TARGET`.
    PendingAfterIret,
}

/// The word a trampoline leaves at `GATE_REASON`: the site's number and why.
#[must_use]
pub const fn reason_word(site_id: u32, kind: ReasonKind) -> u32 {
    site_id << 2
        | match kind {
            ReasonKind::Emulate => 0,
            ReasonKind::PendingAfterSti => 1,
            ReasonKind::PendingAfterPopf => 2,
            ReasonKind::PendingAfterIret => 3,
        }
}

/// A way out of ring-3 code that cannot write to the vCPU page: into 64-bit code, with the EIP behind the `int n` in R8D and R9
/// clobbered. All else is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LongGate {
    /// The host's selector of a 64-bit code segment.
    pub selector: u16,
    /// Where its address is.
    pub at: u64,
}

impl LongGate {
    /// Length of [`Self::exit_code`].
    pub const EXIT_LEN: usize = 19;

    /// The 64-bit code that goes there.
    #[must_use]
    pub fn exit_code(&self, next: u32) -> [u8; Self::EXIT_LEN] {
        let mut code = [0; Self::EXIT_LEN];
        let (load_next, rest) = code.split_at_mut(6);
        let (load_gate, jump) = rest.split_at_mut(10);
        load_next[..2].copy_from_slice(&[0x41, 0xb8]); // mov r8d, imm32
        load_next[2..].copy_from_slice(&next.to_le_bytes());
        load_gate[..2].copy_from_slice(&[0x49, 0xb9]); // mov r9, imm64
        load_gate[2..].copy_from_slice(&self.at.to_le_bytes());
        jump.copy_from_slice(&[0x41, 0xff, 0x21]); // jmp [r9]
        code
    }
}

/// Site numbers from here on are those of ring-3 code ([`crate::UserPatcher`]): bit 31 of a reason word.
pub(crate) const USER_SITES: u32 = 1 << 29;

/// Is this reason word that of a site in ring-3 code?
#[must_use]
pub const fn is_user_reason(word: u32) -> bool {
    word >> 31 != 0
}

pub(crate) const fn split_reason(word: u32) -> (u32, ReasonKind) {
    let kind = match word & 3 {
        0 => ReasonKind::Emulate,
        1 => ReasonKind::PendingAfterSti,
        2 => ReasonKind::PendingAfterPopf,
        _ => ReasonKind::PendingAfterIret,
    };
    (word >> 2, kind)
}

/// A sensitive instruction a patch takes care of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SiteRef {
    /// Where the guest has it.
    pub at: GuestLin,
    /// Its length in bytes, 1..=15.
    pub len: u8,
    /// What it does.
    pub kind: SensitiveKind,
    /// How it is done.
    pub route: Route,
    /// Its number in reason words.
    pub id: u32,
    /// No interrupt comes directly behind it: `sti`, `mov ss`, `pop ss` (SDM Vol. 3A, 6.8.3).
    pub shadow: bool,
}

impl SiteRef {
    /// The EIP behind it.
    #[must_use]
    pub const fn next(&self) -> GuestLin {
        self.at.wrapping_add(self.len as u32)
    }
}

/// Bytes to be put into the code view.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CodeWrite {
    /// Where.
    pub at: GuestLin,
    /// What.
    pub bytes: Vec<u8>,
}

/// Code outside the guest's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trampoline {
    /// Its first EIP.
    pub at: u32,
    /// Its bytes.
    pub code: Vec<u8>,
}

/// Everything about one patch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Patch {
    /// Its name.
    pub id: PatchId,
    /// First byte of the window.
    pub start: GuestLin,
    /// Length of the window in bytes: nothing in it but `start` may be executed from the code view.
    pub len: u8,
    /// What the window shows without the patch: the guest's own bytes, `hlt` for filler, which is not proven code. The
    /// slot of a short jump is all filler.
    pub original: Vec<u8>,
    /// What the code view must hold: the window first, then the slot of a short jump.
    pub writes: Vec<CodeWrite>,
    /// How it gets control.
    pub tactic: Tactic,
    /// The sensitive instructions in the window, ascending. Behind them, if the window ends with a `jmp` to a sensitive
    /// instruction elsewhere that has no room for a jump, that one.
    pub sites: Vec<SiteRef>,
    /// Unconditional jumps outside the window that the trampoline does as well: address and length.
    pub via: Vec<(GuestLin, u8)>,
    /// None for a trap byte.
    pub trampoline: Option<Trampoline>,
    /// What each boundary of the trampoline stands for.
    pub map: EipMap,
    /// For a trap byte: why no jump was possible.
    pub why: Option<Refusal>,
    /// It is for no sensitive instruction but makes the one here faster ([`crate::Patm::hasten`]).
    pub hastened: Option<GuestLin>,
}

impl Patch {
    /// The EIP behind the window.
    #[must_use]
    pub fn end(&self) -> GuestLin {
        self.start.wrapping_add(u32::from(self.len))
    }

    /// The bytes for the window.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.writes.first().map_or(&[], |w| &w.bytes)
    }

    /// The EIP behind everything it depends on (a trap byte depends on its whole instruction).
    pub(crate) fn extent(&self) -> u32 {
        let end = self.end().0;
        self.sites.iter().filter(|s| self.holds(s)).map(|s| s.next().0).max().map_or(end, |e| e.max(end))
    }

    /// Is the site one of the window's own, and not the one its last instruction jumps to?
    pub(crate) fn holds(&self, site: &SiteRef) -> bool {
        site.at >= self.start && site.at < self.end()
    }
}

/// Why something was not patched, or not with a jump.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Refusal {
    /// No proven instruction there, or it would wrap at 4 GiB.
    NotCode,
    /// The instruction is not sensitive.
    NotSensitive,
    /// The instruction traps by itself at every privilege level (`int3`, `ud2`); it stays as it is.
    TrapsItself,
    /// Another patch has some of the bytes.
    Overlap,
    /// The code view cannot be written there.
    NotWritable,
    /// A branch from outside would land in the window.
    BranchTarget,
    /// An instruction after which execution does not go on would have to be crossed.
    EndOfFlow,
    /// An instruction in the window cannot be done from elsewhere.
    NotDisplaceable,
    /// There are not enough bytes in the page in front of the site for a jump that covers nothing behind it.
    NoRoom,
    /// No free trampoline memory where the displacement has its trapping bytes.
    NoPlace,
}

impl Refusal {
    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotCode => "not code",
            Self::NotSensitive => "not sensitive",
            Self::TrapsItself => "traps itself",
            Self::Overlap => "overlaps another patch",
            Self::NotWritable => "not writable",
            Self::BranchTarget => "branch target in the window",
            Self::EndOfFlow => "end of flow in the window",
            Self::NotDisplaceable => "not displaceable",
            Self::NoRoom => "no room for a jump",
            Self::NoPlace => "no place for the trampoline",
        }
    }
}
