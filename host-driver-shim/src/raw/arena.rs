//! The arena: the memory a world and the monitor share to talk to each other.
//!
//! One per world. The world's runtime sees it at [`ARENA_VA`]; the monitor maps it anywhere. A guest that broke out of
//! its 32 bits can write all of it, so the monitor treats what it reads here as an allegation: every number is checked
//! or harmless whatever it is.

use std::io;
use std::mem::offset_of;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::fill::FillArea;
use super::orders::Orders;
use super::rc_access::{FLEETING, Fleeting};
use super::rc_cpuid::CpuidTable;
use super::rc_doze::DozeArea;
use super::rc_port::PortArea;
use super::rc_quick::QUICK;
use super::rc_users::UsersArea;
use super::relay::Hand;
use crate::shared::{SharedMap, copy};
use crate::world::{DeliveryRules, HwRegs, Quick};

/// Where the runtime maps the arena in a world: fixed, so that assembly can name it.
pub(crate) const ARENA_VA: u64 = 0x1000_0000_0000;
/// The runtime's stack in a world.
pub(crate) const STACK_VA: u64 = ARENA_VA + 0x1000_0000;
pub(crate) const STACK_SIZE: u64 = 64 << 10;
pub(crate) const STACK_TOP: u64 = STACK_VA + STACK_SIZE;
/// The runtime's signal stack in a world.
pub(crate) const SIGNAL_STACK_VA: u64 = ARENA_VA + 0x2000_0000;
pub(crate) const SIGNAL_STACK_SIZE: u64 = 64 << 10;

/// Guest RAM in a world for the runtime's own use: GuestPhys 0 is here.
pub(crate) const RAM_VA: u64 = 0x2000_0000_0000;
/// The bitmap of watched frames ([`crate::ram::GuestRam::set_watched`]) in a world, read-only.
pub(crate) const WATCHED_VA: u64 = ARENA_VA + 0x4000_0000;
/// What a world knows about its windows ([`super::rc_window`]).
pub(crate) const WINDOWS_VA: u64 = ARENA_VA + 0x5000_0000;

/// The orders of a confined world's mapper, read-only ([`super::orders`]).
pub(crate) const ORDERS_VA: u64 = ARENA_VA + 0x6000_0000;

/// In a world of ring 0 that may enter confined worlds by itself: all [`Cell`]s ([`super::rc_users`]).
pub(crate) const CELLS_VA: u64 = ARENA_VA + 0x7000_0000;

/// In a world that has a seat: all of them ([`super::relay`]).
pub(crate) const SEATS_VA: u64 = ARENA_VA + 0x1_0000_0000;

/// Where a world has its vDSO. When 32-bit code executes SYSENTER, an Intel host's kernel goes on at the low half of where the process
/// has its vDSO, and the landing pad's offset in the 32-bit one (Linux, arch/x86/entry/syscall_32.c, do_SYSENTER_32): for a 64-bit
/// process that is anywhere below 4 GiB, but from here it is in the first pages, where nothing is ever mapped.
pub(crate) const VDSO_VA: u64 = 0x3000_0000_0000;

/// How many commands fit.
pub(crate) const COMMANDS: usize = 1024;

/// vCPU page: far pointer of the gate (u32 offset, u16 selector). The same as patm's `vcpu_page::GATE`.
pub const GATE: u32 = 0x70;
/// Offsets in the vCPU page from here on are of the transit page of a keyed world. The same as patm's `vcpu_page::TRANSIT`.
pub const TRANSIT: u32 = 0x2000;
/// Transit page: where the runtime keeps the `iretq` frame to ring 3, then EAX, ECX, EDX and EDI.
pub(crate) const TRANSIT_WAY: usize = 0x100;
/// vCPU page: the reason word a trampoline leaves. The same as patm's `vcpu_page::GATE_REASON`.
pub const GATE_REASON: u32 = 0x78;
/// vCPU page: the shim's own 256 bytes. The same as patm's `vcpu_page::SHIM_SAVE`. The stub keeps EAX in the first word.
pub const SHIM_SAVE: u32 = 0x200;

/// Whose turn it is: the value of [`Arena::turn`].
pub(crate) mod turn {
    pub(crate) const MONITOR: u32 = 0;
    pub(crate) const WORLD: u32 = 1;
    pub(crate) const DEAD: u32 = 2;
}

/// What the monitor wants: the value of [`Arena::request`].
pub(crate) mod request {
    /// Carry out the commands, then run the guest.
    pub(crate) const RUN: u32 = 0;
    /// Carry out the commands only.
    pub(crate) const COMMANDS: u32 = 1;
}

/// Why the world handed over: the value of [`Exit::kind`].
pub(crate) mod exit_kind {
    pub(crate) const READY: u32 = 0;
    pub(crate) const COMMANDS_DONE: u32 = 1;
    pub(crate) const COMMAND_FAILED: u32 = 2;
    pub(crate) const BAD_STATE: u32 = 3;
    pub(crate) const FAULT: u32 = 4;
    pub(crate) const GATE: u32 = 5;
    pub(crate) const SYSCALL: u32 = 6;
    pub(crate) const KICK: u32 = 7;
    /// In the world of ring 0: the confined world it entered has left guest code, and that is for the monitor.
    pub(crate) const USERS: u32 = 8;
}

/// What a world does before it enters the guest: the value of [`Command::op`].
pub(crate) mod op {
    /// mmap: `a` = address, `b` = length, `c` = PROT_*, `d` = descriptor, `offset`.
    pub(crate) const MAP: u32 = 0;
    /// munmap: `a` = address, `b` = length; both 0 = all of 0..4 GiB.
    pub(crate) const UNMAP: u32 = 1;
    /// mprotect: `a` = address, `b` = length, `c` = PROT_*.
    pub(crate) const PROTECT: u32 = 2;
    /// modify_ldt: `a` = slot, `b` = base, `c` = limit, `d` = the flag word of `struct user_desc`.
    pub(crate) const SEGMENT: u32 = 3;
}

/// Descriptors of a world.
pub(crate) const RAM_FD: i32 = 3;
pub(crate) const CODE_FD: i32 = 4;
pub(crate) const ARENA_FD: i32 = 5;
/// The bitmap of watched frames: closed once it is mapped, and then the userfaultfd's.
pub(crate) const WATCHED_FD: i32 = 6;
/// In a confined world, the orders, in the mapper's hands alone.
pub(crate) const ORDERS_FD: i32 = 6;
/// All cells. Closed once they are mapped.
pub(crate) const CELLS_FD: i32 = 7;

/// One command, see [`op`].
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub(crate) struct Command {
    pub(crate) op: u32,
    pub(crate) a: u32,
    pub(crate) b: u32,
    pub(crate) c: u32,
    pub(crate) d: u32,
    pub(crate) reserved: u32,
    pub(crate) offset: u64,
}

/// The exit record, see [`exit_kind`].
#[repr(C)]
pub(crate) struct Exit {
    pub(crate) kind: AtomicU32,
    /// Exception vector of a fault.
    pub(crate) vector: AtomicU32,
    pub(crate) error_code: AtomicU32,
    pub(crate) cr2: AtomicU32,
    /// Index of the first command that failed.
    pub(crate) command: AtomicU32,
    /// Its errno.
    pub(crate) errno: AtomicU32,
}

/// x87/MMX/SSE state as FXSAVE64 keeps it (SDM vol. 1, 10.5.1).
#[repr(C, align(64))]
pub(crate) struct Fx(pub(crate) [u8; 512]);

/// A page of its own.
#[repr(C, align(4096))]
pub(crate) struct Page(pub(crate) [u8; 4096]);

/// Index in [`Arena::filters`]: the filter of the thread that runs guest code.
pub(crate) const OWN_FILTER: usize = 0;
/// The same of a confined world's mapper.
pub(crate) const MAPPERS_FILTER: usize = 1;

/// How many BPF instructions the jail's filter may have.
pub(crate) const FILTER_MAX: usize = 256;

/// How many confined worlds there may be at a time, those that are about to end included.
pub(crate) const CELLS: usize = 48;

/// What belongs to one confined world.
#[repr(C)]
pub(crate) struct Cell {
    /// What it may write.
    pub(crate) arena: Arena,
    /// What it may read.
    pub(crate) orders: Orders,
    /// In place of the arena's, and not for it.
    pub(crate) fill: FillArea,
}

const _: () = assert!(size_of::<Cell>() == size_of::<Arena>() + size_of::<Orders>() + size_of::<FillArea>());

/// The shared memory. Everything in it is only ever accessed atomically, by assembly, or by raw copies.
#[repr(C, align(4096))]
pub(crate) struct Arena {
    pub(crate) turn: AtomicU32,
    /// Non-zero: leave for the monitor before running guest code.
    pub(crate) kick: AtomicU32,
    pub(crate) request: AtomicU32,
    pub(crate) commands_len: AtomicU32,
    pub(crate) regs: HwRegs,
    pub(crate) exit: Exit,
    /// EFLAGS.TF if the gate was entered single-stepping (the trap is swallowed in the stub), else 0.
    pub(crate) stepped: AtomicU32,
    /// In a confined world, the EIP with which the gate was entered last; else 0.
    pub(crate) called: AtomicU32,
    /// Where the gate stub jumps to, or in a confined world a trampoline: an address of the runtime.
    pub(crate) gate_entry: AtomicU64,
    /// Set-up: the monitor's pid as the world must see it as its parent.
    pub(crate) monitor_pid: AtomicU32,
    /// Set-up: how far it came (see `init`), and the errno of the step that failed.
    pub(crate) setup_step: AtomicU32,
    pub(crate) setup_errno: AtomicU32,
    /// Set-up: 1 if CPUID raises #GP in this world.
    pub(crate) cpuid_faults: AtomicU32,
    /// Non-zero: `rdtsc` is to raise #GP(0).
    pub(crate) trap_tsc: AtomicU32,
    /// Set-up: non-zero for a confined world, see [`super::mapper`].
    pub(crate) confined: AtomicU32,
    /// Set-up: non-zero for a keyed world, see [`super::keys`].
    pub(crate) keyed: AtomicU32,
    /// In a keyed world: PKRU with which guest code goes on.
    pub(crate) pkru: AtomicU32,
    /// Where a signal frame has PKRU, in bytes from its XSAVE area's start.
    pub(crate) pkru_at: AtomicU32,
    /// Not 0 only between the runtime's decision to load [`super::keys::KERNEL_PKRU`] and that.
    pub(crate) token: AtomicU32,
    /// The world address of the transit page.
    pub(crate) transit_at: AtomicU64,
    /// What a return from a signal must know.
    pub(crate) secret: AtomicU64,
    /// The frame of the `iretq` to ring 0, then EAX, ECX, EDX and EDI.
    pub(crate) kernel_way: [AtomicU64; 7],
    /// Set-up: non-zero for a world that may enter confined ones by itself, see [`super::rc_users`].
    pub(crate) master: AtomicU32,
    /// Set-up: the mapper's thread id, once it is there.
    pub(crate) mapper: AtomicU32,
    /// Set-up: number of BPF instructions in `filters`.
    pub(crate) filter_len: [AtomicU32; 2],
    pub(crate) fx: Fx,
    /// The jail's filters: the world's own and its mapper's.
    pub(crate) filters: [[u64; FILTER_MAX]; 2],
    pub(crate) vcpu: Page,
    pub(crate) stub: Page,
    /// In a keyed world, what ring 3 may have of its own way in and out: mapped with its key.
    pub(crate) transit: Page,
    pub(crate) delivery: DeliveryRules,
    pub(crate) users: UsersArea,
    pub(crate) hand: Hand,
    pub(crate) quick: [Quick; QUICK],
    pub(crate) ports: PortArea,
    pub(crate) doze: DozeArea,
    pub(crate) fleeting: [Fleeting; FLEETING],
    pub(crate) cpuid: CpuidTable,
    pub(crate) fill: FillArea,
    /// While a fault answered in the world is returned from: the `ucontext_t` of its signal frame.
    pub(crate) returning: AtomicU64,
    pub(crate) commands: [Command; COMMANDS],
}

/// Byte offset of the vCPU page in the arena's memory object.
pub(crate) const VCPU_OFFSET: usize = offset_of!(Arena, vcpu);
/// Byte offset of the transit page in the arena's memory object.
pub(crate) const TRANSIT_OFFSET: usize = offset_of!(Arena, transit);
/// Byte offset of the stub page in the arena's memory object.
pub(crate) const STUB_OFFSET: usize = offset_of!(Arena, stub);

const _: () = {
    assert!(TRANSIT_OFFSET.is_multiple_of(4096));
    assert!(VCPU_OFFSET.is_multiple_of(4096) && STUB_OFFSET.is_multiple_of(4096));
    assert!(size_of::<Arena>().is_multiple_of(4096));
    assert!(offset_of!(Arena, fx).is_multiple_of(64) && offset_of!(Arena, fill).is_multiple_of(4096));
    assert!(ARENA_VA + size_of::<Arena>() as u64 <= STACK_VA);
    assert!(size_of::<Command>() == 32 && size_of::<HwRegs>() == 52);
};

/// A word of the vCPU page as the world sees it; the first one for an offset outside it.
///
/// # Safety
/// In a world, `a` is its mapped arena.
pub(crate) unsafe fn vcpu_word<'a>(a: *mut Arena, offset: u32) -> &'a AtomicU32 {
    let at = if offset <= 4092 { offset as usize & !3 } else { 0 };
    // SAFETY: `at` is a multiple of 4 inside the page, which is mapped for the world's whole life.
    unsafe { AtomicU32::from_ptr((&raw mut (*a).vcpu).cast::<u8>().add(at).cast()) }
}

/// The monitor's mapping of one world's arena.
#[derive(Debug)]
pub(crate) struct ArenaMap {
    arena: SharedMap,
    /// A cell's.
    fill: Option<SharedMap>,
}

impl ArenaMap {
    pub(crate) fn new() -> io::Result<ArenaMap> {
        Ok(ArenaMap { arena: SharedMap::new(c"subring-arena", size_of::<Arena>())?, fill: None })
    }

    /// The one in cell `number`.
    pub(crate) fn in_cell(cells: &SharedMap, number: usize) -> io::Result<ArenaMap> {
        let part = |at: usize, len| cells.part((number * size_of::<Cell>() + at) as u64, len);
        let arena = part(offset_of!(Cell, arena), size_of::<Arena>())?;
        Ok(ArenaMap { arena, fill: Some(part(offset_of!(Cell, fill), size_of::<FillArea>())?) })
    }

    /// The one at this offset of a larger memory object.
    pub(crate) fn part_of(map: &SharedMap, at: u64) -> io::Result<ArenaMap> {
        Ok(ArenaMap { arena: map.part(at, size_of::<Arena>())?, fill: None })
    }

    /// The mapping the fill area is in, and where.
    pub(super) fn fill_area(&self) -> (&SharedMap, usize) {
        self.fill.as_ref().map_or((&self.arena, offset_of!(Arena, fill)), |map| (map, 0))
    }

    /// Where it begins in its memory object.
    pub(crate) fn start(&self) -> u64 {
        self.arena.start()
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.arena.fd()
    }

    /// The memory object.
    pub(crate) fn shared(&self) -> &SharedMap {
        &self.arena
    }

    fn ptr(&self) -> *mut Arena {
        self.arena.base().as_ptr().cast()
    }

    /// One atomic word of the arena.
    pub(crate) fn word(&self, field: Word) -> &AtomicU32 {
        // SAFETY: `field` holds an offset_of! of an AtomicU32 of Arena, inside the mapping, which lives as long as self.
        unsafe { AtomicU32::from_ptr(self.arena.base().as_ptr().add(field.0).cast()) }
    }

    pub(crate) fn get(&self, field: Word) -> u32 {
        self.word(field).load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, field: Word, value: u32) {
        self.word(field).store(value, Ordering::Release);
    }

    pub(crate) fn regs(&self) -> HwRegs {
        let mut regs = HwRegs::default();
        // SAFETY: both sides are one HwRegs (plain integers, any bit pattern is valid); the source is inside the mapping.
        unsafe {
            copy((&raw const (*self.ptr()).regs).cast(), (&raw mut regs).cast(), size_of::<HwRegs>());
        }
        regs
    }

    pub(crate) fn set_regs(&self, regs: &HwRegs) {
        // SAFETY: both sides are one HwRegs; the destination is inside the mapping.
        unsafe {
            copy((&raw const *regs).cast(), (&raw mut (*self.ptr()).regs).cast(), size_of::<HwRegs>());
        }
    }

    pub(crate) fn fx(&self, to: &mut [u8; 512]) {
        // SAFETY: both sides are 512 bytes; the source is inside the mapping.
        unsafe { copy((&raw const (*self.ptr()).fx).cast(), to.as_mut_ptr(), 512) };
    }

    pub(crate) fn set_fx(&self, from: &[u8; 512]) {
        // SAFETY: both sides are 512 bytes; the destination is inside the mapping.
        unsafe { copy(from.as_ptr(), (&raw mut (*self.ptr()).fx).cast(), 512) };
    }

    /// Hands over the commands; at most [`COMMANDS`].
    pub(crate) fn set_commands(&self, commands: &[Command]) {
        let n = commands.len().min(COMMANDS);
        // SAFETY: n commands fit the array, which lies inside the mapping.
        unsafe {
            copy(
                commands.as_ptr().cast(),
                (&raw mut (*self.ptr()).commands).cast(),
                n * size_of::<Command>(),
            );
        }
        self.set(Word::COMMANDS_LEN, u32::try_from(n).unwrap_or(0));
    }

    /// Hands over one of the jail's filters; `false` if it is too long.
    pub(crate) fn set_filter(&self, which: usize, filter: &[u64]) -> bool {
        let Ok(n) = u32::try_from(filter.len()) else { return false };
        if filter.len() > FILTER_MAX {
            return false;
        }
        let filters = offset_of!(Arena, filters) + which * size_of::<[u64; FILTER_MAX]>();
        for (i, insn) in filter.iter().enumerate() {
            if self.arena.write_u64((filters + i * 8) as u64, *insn).is_none() {
                return false;
            }
        }
        self.arena.write_u32((offset_of!(Arena, filter_len) + which * 4) as u64, n).is_some()
    }

    /// Where in the arena a u32 of the vCPU page is, or with offsets from [`TRANSIT`] on of the transit page.
    fn vcpu_place(offset: u32) -> Option<u64> {
        let place = |page: usize, offset: u32| (offset <= 4092).then(|| page as u64 + u64::from(offset));
        place(VCPU_OFFSET, offset).or_else(|| place(TRANSIT_OFFSET, offset.wrapping_sub(TRANSIT)))
    }

    /// Reads that word; 0 if there is none.
    pub(crate) fn vcpu_read(&self, offset: u32) -> u32 {
        Self::vcpu_place(offset).and_then(|at| self.arena.read_u32(at)).unwrap_or(0)
    }

    /// Writes it, if there is one.
    pub(crate) fn vcpu_write(&self, offset: u32, value: u32) {
        let _in_range = Self::vcpu_place(offset).and_then(|at| self.arena.write_u32(at, value));
    }

    /// Where the world says it has the runtime's gate.
    pub(crate) fn gate_entry(&self) -> u64 {
        self.arena.read_u64(offset_of!(Arena, gate_entry) as u64).unwrap_or(0)
    }

    /// Says where the world has its transit page.
    pub(crate) fn set_transit(&self, at: u32) {
        let _in_range = self.arena.write_u64(offset_of!(Arena, transit_at) as u64, u64::from(at));
    }

    /// Writes the gate stub's code for a vCPU page at this linear address.
    pub(crate) fn set_stub(&self, vcpu: u32) {
        // 64-bit code reached by the guest's far jump with all guest registers live. `hlt` behind it and around it.
        let mut code = Vec::with_capacity(32);
        code.push(0xa3); // mov [moffs64], eax
        code.extend((u64::from(vcpu) + u64::from(SHIM_SAVE)).to_le_bytes());
        code.extend([0x48, 0xb8]); // mov rax, imm64
        code.extend((ARENA_VA + offset_of!(Arena, gate_entry) as u64).to_le_bytes());
        code.extend([0xff, 0x20]); // jmp [rax]
        let _in_range = self.arena.fill(STUB_OFFSET as u64, 4096, 0xf4);
        let _in_range = self.arena.write(STUB_OFFSET as u64, &code);
    }
}

/// Names one atomic u32 of the arena.
#[derive(Clone, Copy)]
pub(crate) struct Word(usize);

impl Word {
    pub(crate) const TURN: Word = Word(offset_of!(Arena, turn));
    pub(crate) const KICK: Word = Word(offset_of!(Arena, kick));
    pub(crate) const REQUEST: Word = Word(offset_of!(Arena, request));
    pub(crate) const COMMANDS_LEN: Word = Word(offset_of!(Arena, commands_len));
    pub(crate) const EXIT_KIND: Word = Word(offset_of!(Arena, exit.kind));
    pub(crate) const EXIT_VECTOR: Word = Word(offset_of!(Arena, exit.vector));
    pub(crate) const EXIT_ERROR: Word = Word(offset_of!(Arena, exit.error_code));
    pub(crate) const EXIT_CR2: Word = Word(offset_of!(Arena, exit.cr2));
    pub(crate) const EXIT_COMMAND: Word = Word(offset_of!(Arena, exit.command));
    pub(crate) const EXIT_ERRNO: Word = Word(offset_of!(Arena, exit.errno));
    pub(crate) const MONITOR_PID: Word = Word(offset_of!(Arena, monitor_pid));
    pub(crate) const SETUP_STEP: Word = Word(offset_of!(Arena, setup_step));
    pub(crate) const SETUP_ERRNO: Word = Word(offset_of!(Arena, setup_errno));
    pub(crate) const TRAP_TSC: Word = Word(offset_of!(Arena, trap_tsc));
    pub(crate) const CPUID_FAULTS: Word = Word(offset_of!(Arena, cpuid_faults));
    pub(crate) const CONFINED: Word = Word(offset_of!(Arena, confined));
    pub(crate) const KEYED: Word = Word(offset_of!(Arena, keyed));
    pub(crate) const MASTER: Word = Word(offset_of!(Arena, master));
    pub(crate) const MAPPER: Word = Word(offset_of!(Arena, mapper));
}
