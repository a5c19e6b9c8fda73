//! Layout of the vCPU page: the one data page trampolines and the monitor share.
//!
//! It is mapped read-write in every world that runs guest ring 0, at a linear address the monitor chooses, and
//! trampolines reach it as `ss:[base + offset]` (raw mode requires a flat guest SS in ring 0). What the guest's
//! ring-0 code could read back of its privileged state lives here while the guest runs; the monitor copies it from
//! and to CPUM around every run. A hostile guest can write here: all of it is an allegation.

/// Virtual interrupt flag: 0 or 0x200 (EFLAGS.IF in place). u32.
pub const IF_FLAG: u32 = 0x00;
/// Non-zero when an interrupt waits for IF to become 1. u32. Only the world's kick and the monitor set it.
pub const PENDING: u32 = 0x04;
/// EFLAGS bits kept virtual besides IF, in place: IOPL, NT, AC, ID (VIF/VIP never). u32.
pub const HIDDEN_FLAGS: u32 = 0x08;
/// The guest-visible selectors ES, CS, SS, DS, FS, GS (encoding order), each a u32 with the upper half zero.
pub const SELECTORS: u32 = 0x10;
/// Guest CR0. u32.
pub const CR0: u32 = 0x28;
/// Guest CR2. u32.
pub const CR2: u32 = 0x2c;
/// Guest CR3. u32.
pub const CR3: u32 = 0x30;
/// Guest CR4. u32.
pub const CR4: u32 = 0x34;
/// Scratch slots, eight u32: where a trampoline keeps EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI (encoding order).
pub const SCRATCH: u32 = 0x40;
/// One more scratch u32 for a value computed by the trampoline (popf keeps the new IF here).
pub const SCRATCH_VALUE: u32 = 0x60;
/// Guest GDTR base (guest linear). u32.
pub const GDT_BASE: u32 = 0x64;
/// Guest GDTR limit. u32.
pub const GDT_LIMIT: u32 = 0x68;
/// Scratch u32 for the arithmetic flags: AH as `lahf` leaves it in bits 8..15, OF in bit 0.
pub const SCRATCH_FLAGS: u32 = 0x6c;
/// Far pointer of the gate into RC: u32 offset, then u16 selector.
pub const GATE: u32 = 0x70;
/// What a trampoline that leaves through the gate says: the site's `SiteId`. u32.
pub const GATE_REASON: u32 = 0x78;
/// Execution counters of in-line trampolines, one u32 per [`crate::vcpu_page::COUNTERS_LEN`] kinds.
pub const COUNTERS: u32 = 0x80;
/// How many counters there are.
pub const COUNTERS_LEN: u32 = 64;
/// The CS selector, zero-extended, to which `iret` may return in line; `IRET_NOWHERE` when there is none. It is the
/// selector of the running code segment when that is flat and in the GDT. u32.
pub const IRET_CS: u32 = 0x180;
/// Guest linear address of the descriptor of `IRET_CS`. u32.
pub const IRET_DESC_AT: u32 = 0x184;
/// What the guest's descriptor there was when CS was loaded, low half: while it is, loading CS again changes nothing.
pub const IRET_DESC_LOW: u32 = 0x188;
/// The same, high half.
pub const IRET_DESC_HIGH: u32 = 0x18c;
/// Scratch u32: the EIP an `iret` done in line returns to.
pub const SCRATCH_TARGET: u32 = 0x190;
/// Scratch u32: the arithmetic flags and DF an `iret` done in line loads.
pub const SCRATCH_IMAGE: u32 = 0x194;
/// A value of `IRET_CS` that no selector has.
pub const IRET_NOWHERE: u32 = u32::MAX;
/// Where the 64-bit gate stub keeps the guest's registers until the runtime copies them (owned by the shim). 256 bytes.
pub const SHIM_SAVE: u32 = 0x200;
/// The virtual CPL: 0 or 3. u32.
pub const CPL: u32 = 0x300;
/// For each segment register (encoding order) the host selector with which guest ring 0 sees the segment that is now
/// loaded in it. Six u32.
pub const HOST_RING0: u32 = 0x320;
/// The same for guest ring 3, whose limits are truncated; 0 where ring 3 may not keep the segment. Six u32.
pub const HOST_RING3: u32 = 0x340;
/// The segment cache: 128 entries of 16 bytes, indexed by GDT index (selector >> 3, so TI = 0 only):
/// u32 descriptor low, u32 descriptor high (as read from the guest's GDT when the monitor cached it), u32 host selector
/// to load, u32 valid (1) or not (0). A trampoline may load a segment without leaving the world exactly when the
/// entry is valid and the guest's descriptor still equals it.
pub const SEGMENT_CACHE: u32 = 0x800;
/// How many entries the segment cache has.
pub const SEGMENT_CACHE_LEN: u32 = 128;
