//! What an engine offers: a host address space that runs guest code until it must leave.
//!
//! Every engine (`raw`, `ring1`) implements [`World`]; the monitor drives nothing else. Addresses are linear
//! addresses inside the world (0..4 GiB); the shim gives them no meaning.

use bitflags::bitflags;

bitflags! {
    /// What a mapping in a world allows.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Prot: u8 {
        /// Data may be read.
        const READ = 1;
        /// Data may be written.
        const WRITE = 2;
        /// Instructions may be fetched.
        const EXEC = 4;
        /// Guest ring 3 may do so, too. Without it only ring 0, in worlds that tell rings apart by pages
        /// ([`SegmentRules::pages`]); and such a ring 0 executes nothing that has it (with
        /// [`SegmentRules::keys`] it may).
        const USER = 8;
    }
}

/// A linear address inside a world (0..4 GiB).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct WorldLin(pub u32);

/// The state after FNINIT and with MXCSR at its reset value, in FXSAVE64's layout.
pub(crate) fn initial_fx() -> [u8; 512] {
    let mut fx = [0; 512];
    fx[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    fx
}

/// What a mapping shows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Backing {
    /// Guest RAM at this byte offset of the RAM memory object.
    Ram(u64),
    /// Code memory (code-view pages and trampolines) at this byte offset.
    Code(u64),
    /// The vCPU page of this world (offset 0 only).
    Vcpu,
}

/// General registers and selectors exactly as the hardware holds them when a world starts or stops running.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct HwRegs {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI (encoding order).
    pub gpr: [u32; 8],
    /// Instruction pointer, relative to the CS base.
    pub eip: u32,
    /// Flags as the hardware has them.
    pub eflags: u32,
    /// ES, CS, SS, DS, FS, GS (encoding order), host selectors.
    pub sel: [u16; 6],
}

/// Why a world stopped running guest code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WorldExit {
    /// The CPU raised an exception on guest code, at `HwRegs::eip`.
    Fault {
        /// Exception vector, 0..=31.
        vector: u8,
        /// The error code pushed by the CPU (0 where it pushes none).
        error_code: u32,
        /// CR2 for vector 14, else 0.
        cr2: u32,
    },
    /// A trampoline went through the gate; the word it left at `GATE_REASON`.
    Gate {
        /// The trampoline's reason word, unchecked.
        reason: u32,
    },
    /// Guest code executed a host system call instruction (`int 80h`, `sysenter`, `syscall`); EIP is *after* it.
    Syscall,
    /// Somebody called [`Kicker::kick`].
    Kick,
    /// A world of ring 0 has entered the confined world it may ([`UsersRules`]), and that one's exit is to be
    /// [taken](World::take_exit).
    Users,
    /// The world has handed the guest over to another one, this or one behind it has left guest code, and its exit is to be
    /// [taken](World::take_exit).
    Handed {
        /// The [seat](World::seat) of the one that has left (an allegation).
        seat: u32,
    },
}

/// A piece of the guest's page tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableSpan {
    /// GuestPhys, a multiple of 4.
    pub at: u64,
    /// Bytes, a multiple of 4.
    pub len: u32,
}

/// LDT slot of ring 3's flat code in keyed worlds, which cannot be read.
pub const KEYED_CODE_SLOT: u16 = 0x7ff;
/// Its selector.
pub const KEYED_CODE: u16 = KEYED_CODE_SLOT << 3 | 7;
/// LDT slot of the flat data segment trampolines of keyed worlds work with.
pub const KEYED_DATA_SLOT: u16 = 0x7fe;
/// Its selector.
pub const KEYED_DATA: u16 = KEYED_DATA_SLOT << 3 | 7;

/// How the worlds of an engine want their segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentRules {
    /// The hardware ring of guest ring 0: the DPL of its segments, the RPL of its selectors.
    pub ring0: u8,
    /// Selector of flat 32-bit code for guest ring 0.
    pub code_ring0: u16,
    /// The same for guest ring 3.
    pub code_ring3: u16,
    /// So many bytes below the base of flat data segments are the engine's own: no data segment of guest ring 0 may reach
    /// them.
    pub hole: u32,
    /// Code segments of guest ring 0 may be readable.
    pub readable_code: bool,
    /// In a world that holds both, pages tell ring 3 from ring 0 ([`Prot::USER`]), and limits need not.
    pub pages: bool,
    /// The same by protection keys, in the hardware's ring 3: with [`SegmentRules::pages`]. Ring 3 runs with a code selector of its
    /// own then, [`KEYED_CODE`], and must be shown no code that loads PKRU.
    pub keys: bool,
    /// `int n` of ring 3 is #GP with the error code 8 n + 2 for every n but 3 and 4 (SDM vol. 3, 6.13), and the host
    /// does not answer it.
    pub int_faults: bool,
}

impl SegmentRules {
    /// Those of `raw`: all guest code is in ring 3, with the host's own flat code segment (GDT entry 4, RPL 3).
    pub const RAW: SegmentRules = SegmentRules {
        ring0: 3,
        code_ring0: 0x23,
        code_ring3: 0x23,
        hole: 0,
        readable_code: true,
        pages: false,
        keys: false,
        int_faults: false,
    };

    /// Those of keyed worlds of `raw`.
    pub const KEYED: SegmentRules =
        SegmentRules { code_ring3: KEYED_CODE, pages: true, keys: true, ..SegmentRules::RAW };
}

/// A segment descriptor to install in a world's LDT, always present.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HostSegment {
    /// Linear base.
    pub base: u32,
    /// Limit in units of the granularity (20 bits).
    pub limit: u32,
    /// Limit counts 4 KiB pages.
    pub limit_in_pages: bool,
    /// Code segment (readable) if true, data otherwise.
    pub code: bool,
    /// 32-bit default size (D/B).
    pub big: bool,
    /// Data only: expand-down.
    pub expand_down: bool,
    /// Data only: writable. Code: readable.
    pub rw: bool,
    /// Its DPL: 3, or what [`SegmentRules::ring0`] says.
    pub ring: u8,
}

impl HostSegment {
    /// 32-bit, of ring 3, from `base` on over all 4 GiB: code that can only be executed, or data that can be written.
    #[must_use]
    pub const fn flat(base: u32, code: bool) -> HostSegment {
        HostSegment {
            base,
            limit: 0xf_ffff,
            limit_in_pages: true,
            code,
            big: true,
            expand_down: false,
            rw: !code,
            ring: 3,
        }
    }
}

bitflags! {
    /// How a world may fill its own shadow misses, and the paging mode its walk needs.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    #[repr(transparent)]
    pub struct FillMode: u32 {
        /// It may. The guest has paging on.
        const ENABLED = 1;
        /// Accesses have supervisor rights (but see [`FillRules::user_cs`]).
        const SUPERVISOR = 2;
        /// CR0.WP.
        const WP = 4;
        /// CR4.PSE.
        const PSE = 8;
        /// CR4.PAE.
        const PAE = 0x10;
        /// CR4.PGE.
        const PGE = 0x20;
        /// EFER.NXE.
        const NXE = 0x40;
        /// What is mapped for ring 3 gets its key ([`SegmentRules::keys`]).
        const KEYS = 0x80;
    }
}

/// What a world must know to map guest RAM for a data access by itself, from the guest's own page tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct FillRules {
    /// The guest's PDPTEs as loaded (PAE only).
    pub pdpte: [u64; 4],
    /// Modes.
    pub mode: FillMode,
    /// The guest's CR3.
    pub cr3: u32,
    /// The guest's data at GuestLin L is at L + delta in the world.
    pub delta: u32,
    /// Code with this CS (a host selector) has user rights even in a supervisor world; 0: none.
    pub user_cs: u32,
    /// Where nothing of the guest's may be mapped: first world page number and how many; `(0, 0)`: none.
    pub keep_out: [(u32, u32); 8],
    /// Supervisor pages below this guest linear address would be within reach of ring 3 of a joint world: what to do about
    /// them is for the monitor to decide. 0: there is no such address.
    pub users_below: u32,
    /// Zero.
    pub reserved: u32,
}

impl FillRules {
    /// Whether nothing of the guest's may be mapped somewhere in `pages` world pages from `page`.
    pub(crate) fn keeps_out(&self, page: u32, pages: u32) -> bool {
        self.keep_out.iter().any(|&(first, len)| {
            len != 0 && page < first.saturating_add(len) && first < page.saturating_add(pages)
        })
    }
}

/// What `cpuid` of ring 3 answers for a leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct CpuidRow {
    /// EAX before.
    pub leaf: u32,
    /// ECX before, unless `any_subleaf` is not 0.
    pub subleaf: u32,
    /// Not 0: the leaf has no subleaves.
    pub any_subleaf: u32,
    /// EAX, EBX, ECX, EDX after.
    pub registers: [u32; 4],
}

/// An entry of a guest descriptor table as the monitor saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Table {
    /// Guest linear address.
    pub at: u32,
    /// Low half.
    pub low: u32,
    /// High half.
    pub high: u32,
}

/// What a world must know to deliver page faults to the guest by itself: through a 32-bit interrupt or trap gate to flat
/// ring-0 code, onto flat stacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct DeliveryRules {
    /// Not 0: it may.
    pub ready: u32,
    /// Not 0: for faults of ring 3 as well.
    pub from_ring3: u32,
    /// The IDT entry of the page fault.
    pub gate: Table,
    /// EIP of the handler.
    pub target: u32,
    /// The new virtual IF is the old one and this.
    pub if_mask: u32,
    /// The handler's CS selector as the guest sees it.
    pub cs: u32,
    /// Its descriptor.
    pub cs_descriptor: Table,
    /// The host selector of ring-0 code.
    pub cs_host: u32,
    /// Guest linear address of ESP0 in the TSS; SS0 is the word at +4.
    pub tss_esp0: u32,
    /// What SS0 must be.
    pub ss: u32,
    /// Its descriptor.
    pub ss_descriptor: Table,
    /// The host selector for it.
    pub ss_host: u32,
    /// The host selector SS must hold in ring 3.
    pub user_ss_host: u32,
}

/// How the world of ring 0 may enter a confined world of ring 3 by itself, and what it may do with a system call that ends that.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct UsersRules {
    /// The number of its cell, plus 1; 0: it may not.
    pub cell: u32,
    /// Vector of the system call.
    pub vector: u32,
    /// Its gate.
    pub gate: DeliveryRules,
    /// Ring 3's CS selector as the guest sees it.
    pub cs: u32,
    /// Its descriptor.
    pub cs_descriptor: Table,
    /// The host selector for it.
    pub cs_host: u32,
    /// The same for SS.
    pub ss: u32,
    /// Its descriptor.
    pub ss_descriptor: Table,
    /// The host selector for it.
    pub ss_host: u32,
}

/// An event of ring 3 that has no more to it than a gate of the guest's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reflected {
    /// `int n`, where [`SegmentRules::int_faults`].
    Int(u8),
    /// A fault without an error code, by its vector.
    Fault(u8),
    /// A trap, by its vector.
    Trap(u8),
}

/// What a world may do by itself when a trampoline leaves by the gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u32)]
pub enum QuickKind {
    /// `invlpg [base + displacement]`.
    #[default]
    Invlpg = 0,
    /// Map the page whose fault was last delivered from ring 3, and do the `iret` again.
    Refill = 1,
    /// `in al, port`, the port's number being register + displacement.
    In = 2,
    /// `out port, al`, likewise.
    Out = 3,
    /// `hlt`: sleep until the timer's tick and deliver it, see [`Guard`]. `resume` is the guest EIP behind it.
    Halt = 4,
    /// `iret`, if it is to ring 3: see [`UsersRules`].
    ToUsers = 5,
    /// `mov cr3, r32` with the register `base`: the world may hand the guest over to another one.
    LoadCr3 = 6,
}

/// A site that a world may do by itself when its trampoline leaves by the gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Quick {
    /// The reason word; 0: no entry.
    pub reason: u32,
    /// What to do.
    pub kind: QuickKind,
    /// Number of the base register in encoding order, 0..=7; [`NO_BASE`]: none.
    pub base: u32,
    /// Added to it.
    pub displacement: u32,
    /// Number of the segment register in encoding order, 0..=5: it is flat while the guest sees this selector in it.
    pub segment: u32,
    /// That selector.
    pub selector: u32,
    /// The world EIP behind the instruction, or of what does it again.
    pub resume: u32,
}

/// [`Quick::base`] where there is no base register.
pub const NO_BASE: u32 = 8;
/// How many [`Quick`] sites a world knows.
pub const QUICK_SITES: usize = 24;

/// A port whose accesses by single bytes a world may answer by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct PortRow {
    /// The port.
    pub port: u32,
    /// Not 0: reading gives `value` and does nothing else. What is then written is what is read next.
    pub readable: u32,
    /// What reading gives.
    pub value: u32,
    /// Not 0: the monitor need not see at once a written value whose bits in `mask` are `pattern`.
    pub posts: u32,
    /// Bits that are looked at.
    pub mask: u32,
    /// What they must be.
    pub pattern: u32,
    /// Not 0: bytes are written in pairs, the low one first, as a number of units of so many counts of the time-stamp
    /// counter, with 0 for 10000h. The second byte posts only if that time from now is not over before `until`. A first
    /// byte that waits for its second is in `value`, plus 100h.
    pub unit: u32,
    /// Zero.
    pub reserved: u32,
    /// Reading of the host's time-stamp counter.
    pub until: u64,
}

/// How many [`PortRow`]s a world knows.
pub const PORT_ROWS: usize = 5;

/// A byte a world wrote to a port while nobody waited for it. Unchecked: it is what the world says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortWrite {
    /// The port.
    pub port: u16,
    /// The byte.
    pub value: u8,
    /// The host's time-stamp counter then; 40 bits.
    pub tsc: u64,
}

/// Bits of [`PortWrite::tsc`].
pub const POSTED_TSC: u64 = (1 << 40) - 1;

/// [`PortWrite::port`] where nothing was written: the world delivered the timer's interrupt.
pub const TICK: u16 = 0xffff;

/// How a world watches the time by itself, and lets the guest sleep from one tick of its timer to the next. Points in time
/// are readings of the host's time-stamp counter, lengths are its counts.
///
/// The tick a count written by a row with [`PortRow::unit`] ends with is the world's to deliver, by the rules of
/// [`World::set_tick_rules`], if the guest sleeps in a [`QuickKind::Halt`] or runs in ring 3 then. The next one is expected
/// `period` later: the world comes back `after` it at the latest, and the row's `until` becomes `before` it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Guard {
    /// The world leaves by [`WorldExit::Kick`] now. 0: the monitor watches the time.
    pub at: u64,
    /// From one tick to the next, as it was last.
    pub period: u64,
    /// See above.
    pub before: u64,
    /// See above.
    pub after: u64,
    /// Nanoseconds in 2^24 counts.
    pub scale: u32,
    /// Not 0: no interrupt is in service.
    pub idle: u32,
    /// A write to this port, if it posts, ends the service of the interrupt.
    pub end_port: u32,
    /// While bit 0 of this port's readable value is set, there is no tick.
    pub mask_port: u32,
}

/// A run of pages a world mapped by itself, with the leaf rights used; no pages: it has followed an `invlpg` there.
/// Unchecked: it is what the world says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fill {
    /// First page in the world.
    pub at: WorldLin,
    /// Number of pages.
    pub pages: u32,
    /// Guest frame number of the first.
    pub pfn: u32,
    /// Bits of [`crate::raw::rc_walk::right`].
    pub rights: u32,
}

/// Interrupts a running world from another thread.
pub trait Kicker: Send + Sync {
    /// Makes the world leave guest code with [`WorldExit::Kick`] soon, or at its next start if it is not running.
    fn kick(&self);
}

/// A host address space that runs guest code.
///
/// `map`, `unmap`, `protect` and `set_segment` queue commands that take effect, in order, before the next guest
/// instruction runs. Lengths and addresses are multiples of 4096.
pub trait World {
    /// Runs guest code from `regs` until an exit; `regs` is then the state at the exit.
    fn run(&mut self, regs: &mut HwRegs) -> Result<WorldExit, WorldError>;
    /// Maps `len` bytes of `backing` at `at`, replacing what was there.
    fn map(&mut self, at: WorldLin, len: u32, backing: Backing, prot: Prot) -> Result<(), WorldError>;
    /// Removes whatever is mapped in the range. `len` 0 with `at` 0 means all of 0..4 GiB.
    fn unmap(&mut self, at: WorldLin, len: u32) -> Result<(), WorldError>;
    /// Changes the protection of an existing mapping.
    fn protect(&mut self, at: WorldLin, len: u32, prot: Prot) -> Result<(), WorldError>;
    /// Installs a descriptor in LDT slot `slot` (its selector is `slot << 3 | 7`).
    fn set_segment(&mut self, slot: u16, segment: HostSegment) -> Result<(), WorldError>;
    /// The guest's x87/MMX/SSE state as FXSAVE64 keeps it, valid while the world is stopped. What is written here is
    /// loaded at the next start; reserved MXCSR bits are cleared first.
    fn fpu(&mut self) -> &mut [u8; 512];
    /// Reads a u32 of the vCPU page, or of a keyed world's transit page ([`crate::raw::TRANSIT`]).
    fn vcpu_read(&self, offset: u32) -> u32;
    /// Writes one.
    fn vcpu_write(&mut self, offset: u32, value: u32);
    /// Places the gate stub (one page, 64-bit code reached by `GATE`) and the vCPU page, which the stub uses, at these
    /// linear addresses. Must be called before the first run of a world whose trampolines use the gate.
    fn place_gate(&mut self, stub: WorldLin, vcpu: WorldLin) -> Result<(), WorldError>;
    /// Places the transit page of a keyed world. Must be called before it first runs.
    fn place_transit(&mut self, _at: WorldLin) -> Result<(), WorldError> {
        Ok(())
    }
    /// Binds the world to one host CPU; an engine whose worlds run on the caller's thread has nothing to do.
    fn pin(&mut self, _cpu: usize) -> Result<(), WorldError> {
        Ok(())
    }
    /// Lets the world map guest RAM at data faults by itself, by these rules, from the next run on. A world that cannot
    /// do that ignores it.
    fn set_fill_rules(&mut self, _rules: &FillRules) {}
    /// Lets the world deliver page faults to the guest by itself from the next run on, if `ready`. A world that cannot do
    /// that ignores it.
    fn set_delivery_rules(&mut self, _rules: &DeliveryRules) {}
    /// The same for the timer's interrupt: what [`Guard`] needs.
    fn set_tick_rules(&mut self, _rules: &DeliveryRules) {}
    /// Whether this world can do what [`Guard`] is for.
    fn can_guard(&self) -> bool {
        false
    }
    /// Says who watches the time in the next run. Only for worlds that [can](World::can_guard).
    fn set_guard(&mut self, _guard: &Guard) {}
    /// Lets the world send these events of ring 3 to the guest's handlers by itself from the next run on, if `ready`; the
    /// rules differ in their gates only, and the first ones are the most wanted. A world that cannot do that, or whose
    /// trampolines do, ignores it.
    fn set_reflections(&mut self, _events: &[(Reflected, DeliveryRules)]) {}
    /// The number of its cell, if this world is a confined one that others may enter by themselves.
    fn cell(&self) -> Option<u32> {
        None
    }
    /// Lets this world of ring 0 enter a confined one by itself in the next run. That one has been told
    /// ([`World::settle`]), and nothing is done with it meanwhile.
    fn set_users(&mut self, _rules: &UsersRules) {}
    /// Of the flushes this world has done by itself there was one that the confined world it may enter has not followed.
    fn users_are_stale(&self) -> bool {
        true
    }
    /// Hands over pages of the confined world it may enter that the guest has flushed, which are mapped there still although
    /// [`World::take_fills`] of that one says otherwise. Until [`World::set_users`].
    fn take_flushes_of_users(&mut self, _each: &mut dyn FnMut(WorldLin)) {}
    /// Another world may enter this one: queued commands are to take effect before.
    fn settle(&mut self) -> Result<(), WorldError> {
        Ok(())
    }
    /// After [`WorldExit::Users`] or [`WorldExit::Handed`] of another world: what [`World::run`] of this one would have yielded.
    fn take_exit(&mut self, _regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        Err(WorldError::Died(String::from("nobody enters this world by itself")))
    }
    /// A kick that has been answered elsewhere is no exit of this world any more.
    fn forget_kick(&mut self) {}
    /// How many of those the world says it has sent, ever (wraps).
    fn reflected(&self) -> u32 {
        0
    }
    /// How many page faults the world says it has delivered to the guest, ever (wraps).
    fn faults_delivered(&self) -> u32 {
        0
    }
    /// Lets the world answer `cpuid` of ring 3 by itself: with these rows, and zeros for what is in none. None: it may not.
    fn set_cpuid(&mut self, _rows: &[CpuidRow]) {}
    /// The sites a world may do by itself from the next run on.
    fn set_quick(&mut self, _table: &[Quick; QUICK_SITES]) {}
    /// How many `invlpg`s of that table the world says it has done, ever (wraps).
    fn flushes_done(&self) -> u32 {
        0
    }
    /// How many accesses to pages mapped for a moment the world says it has done by itself, ever (wraps).
    fn accesses_done(&self) -> u32 {
        0
    }
    /// The ports a world may answer by itself from the next run on.
    fn set_ports(&mut self, _rows: &[PortRow; PORT_ROWS]) {}
    /// How many port accesses the world says it has answered, ever (wraps).
    fn ports_done(&self) -> u32 {
        0
    }
    /// Hands over, in order, what the world has written to ports since the last call.
    fn take_posted(&mut self, _each: &mut dyn FnMut(PortWrite)) {}
    /// Something of a large guest page is mapped around this guest linear address: `invlpg` there is for the monitor.
    fn mark_large(&mut self, _lin: u32) {}
    /// It has ended: it will not run again.
    fn is_gone(&self) -> bool {
        false
    }
    /// Its number among the worlds that may hand the guest over to each other; None: it never does, and is never handed to.
    fn seat(&self) -> Option<u32> {
        None
    }
    /// Other worlds may hand the guest over to this one, when it loads `cr3`, as long as what is in `tables` now is there still,
    /// nothing is queued for this world or has been mapped by it, and both have been told the same ([`World::set_epoch`]).
    /// False: there is too much to compare.
    fn arm(&mut self, _epoch: u32, _cr3: u32, _tables: &[TableSpan]) -> bool {
        false
    }
    /// It is armed, under this epoch.
    fn is_armed(&self, _epoch: u32) -> bool {
        false
    }
    /// The guest is not handed over to this world any more.
    fn disarm(&mut self) {}
    /// All that is told to all worlds alike (rules, sites, descriptors by number) is what it was when the number was the same.
    fn set_epoch(&mut self, _epoch: u32) {}
    /// After [`WorldExit::Handed`]: the seats of all worlds that were handed to (an allegation).
    fn take_runners(&mut self) -> Vec<u32> {
        Vec::new()
    }
    /// No slot of its LDT counts as set.
    fn forget_segments(&mut self) {}
    /// How often the world says the guest was handed over to it, ever (wraps).
    fn taken_over(&self) -> u32 {
        0
    }
    /// Hands over, in order, what the world has mapped by itself since the last call, and yields how many faults that
    /// answered.
    fn take_fills(&mut self, _each: &mut dyn FnMut(Fill)) -> u32 {
        0
    }
    /// A handle to interrupt this world.
    fn kicker(&self) -> std::sync::Arc<dyn Kicker>;
}

/// What can go wrong with a world. None of it is the guest's to see.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// The world process ended (a guest that broke out can kill its own world).
    #[error("the world process died: {0}")]
    Died(String),
    /// The world could not carry out a mapping command.
    #[error("the host refused a mapping at {at:#010x} (+{len:#x}): {why}")]
    Map {
        /// Where.
        at: u32,
        /// How much.
        len: u32,
        /// The host's reason.
        why: String,
    },
    /// The state given to `run` cannot be loaded (bad selector).
    #[error("the world cannot load that state: {0}")]
    BadState(String),
    /// A host call failed.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}
