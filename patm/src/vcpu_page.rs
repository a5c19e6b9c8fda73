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
/// EFLAGS bits which, set in its frame, keep `iret` from being done in line though it could be: RF while the guest has
/// instruction breakpoints. Without any, RF means nothing and an `iret` in line ignores it. u32.
pub const IRET_REFUSES: u32 = 0x198;
/// Scratch u32: the offset of a far pointer, or a value for a register.
pub const SCRATCH_FAR: u32 = 0x19c;
/// Guest IDTR base (guest linear), for `sidt`. u32.
pub const IDT_BASE: u32 = 0x1a0;
/// Guest IDTR limit. u32.
pub const IDT_LIMIT: u32 = 0x1a4;
/// The guest's LDTR selector, zero-extended, for `sldt`. u32.
pub const LDTR: u32 = 0x1a8;
/// The guest's TR selector, zero-extended, for `str`. u32.
pub const TR: u32 = 0x1ac;
/// A value of `IRET_CS` and of `USER_CS` that no selector has.
pub const IRET_NOWHERE: u32 = u32::MAX;
/// Scratch u32: the host selector ring 3 had in SS when its `int n` began, in a keyed world.
pub const SCRATCH_SS: u32 = 0x1b0;
/// Where the 64-bit gate stub keeps the guest's registers until the runtime copies them (owned by the shim). 256 bytes.
pub const SHIM_SAVE: u32 = 0x200;
// The rest, up to the segment cache, is for worlds that hold guest ring 0 and ring 3 together (see
// `crate::transition`). The monitor writes all of it before each run; in-line transitions keep it right in between.

/// The guest's CPL: 0 or 3. u32.
pub const CPL: u32 = 0x300;
/// For ES, CS, SS, DS, FS, GS (encoding order) a u32: the host selector with which guest ring 0 sees the segment that
/// the register now holds, with its whole limit. For a null selector that selector, 0..=3. CS and SS are not used.
pub const HOST_RING0: u32 = 0x320;
/// The same for guest ring 3: the host selector whose limit ends below the guest kernel, or 0 where ring 3 may not keep
/// the segment (null, or DPL < 3 and no conforming code: `iret` makes it null, SDM Vol. 2A). CS and SS are not used.
pub const HOST_RING3: u32 = 0x340;
/// The CS selector, RPL 3, zero-extended, to which `iret` may return in line at CPL 3; `IRET_NOWHERE` if none. u32.
pub const USER_CS: u32 = 0x360;
/// Guest linear address of the descriptor of `USER_CS`. u32.
pub const USER_CS_DESC_AT: u32 = 0x364;
/// What the guest's descriptor there must still be, low half. u32.
pub const USER_CS_DESC_LOW: u32 = 0x368;
/// The same, high half. u32.
pub const USER_CS_DESC_HIGH: u32 = 0x36c;
/// Far pointer to ring-3 code: u32 offset, which the return writes, then the host selector of `USER_CS` as a u32.
pub const USER_CS_HOST: u32 = 0x370;
/// The SS selector that comes with `USER_CS`, zero-extended. u32.
pub const USER_SS: u32 = 0x380;
/// Guest linear address of the descriptor of `USER_SS`. u32.
pub const USER_SS_DESC_AT: u32 = 0x384;
/// What the guest's descriptor there must still be, low half. u32.
pub const USER_SS_DESC_LOW: u32 = 0x388;
/// The same, high half. u32.
pub const USER_SS_DESC_HIGH: u32 = 0x38c;
/// Far pointer to the ring-3 stack: u32 ESP, which the return writes, then the host selector as a u32. It is flat and
/// big and reaches the vCPU page. It is the one of `USER_SS`, and what SS must hold for `int n` to be done in line.
pub const USER_SS_HOST: u32 = 0x390;
/// 1 if `int GATE_VECTOR` of ring 3 may be done in line, else 0: the gate is present, 32 bits wide and DPL 3, its
/// target CS the running flat ring-0 one or the one last run (non-conforming, DPL 0), the TSS 32 bits wide. u32.
pub const GATE_READY: u32 = 0x3a0;
/// The vector. u32.
pub const GATE_VECTOR: u32 = 0x3a4;
/// Guest linear address of the IDT entry. u32.
pub const GATE_AT: u32 = 0x3a8;
/// What it must still be, low half. u32.
pub const GATE_LOW: u32 = 0x3ac;
/// The same, high half. u32.
pub const GATE_HIGH: u32 = 0x3b0;
/// The new `IF_FLAG` is the old one and this: 0 for an interrupt gate, all ones for a trap gate. u32.
pub const GATE_IF_MASK: u32 = 0x3b4;
/// The CS selector, RPL 0, zero-extended, that the guest sees after it. Must also be `IRET_CS`, whose descriptor is
/// checked. u32.
pub const GATE_CS: u32 = 0x3b8;
/// Guest linear address of ESP0 in the TSS; SS0 is the word at +4. u32.
pub const TSS_ESP0_AT: u32 = 0x3bc;
/// What SS0 must be, zero-extended: a flat, big, writable DPL 0 segment, RPL 0. u32.
pub const KERNEL_SS: u32 = 0x3c0;
/// Guest linear address of the descriptor of `KERNEL_SS`. u32.
pub const KERNEL_SS_DESC_AT: u32 = 0x3c4;
/// What the guest's descriptor there must still be, low half. u32.
pub const KERNEL_SS_DESC_LOW: u32 = 0x3c8;
/// The same, high half. u32.
pub const KERNEL_SS_DESC_HIGH: u32 = 0x3cc;
/// Far pointer to the ring-0 stack: u32 ESP, which the entry writes, then the host selector of `KERNEL_SS` as a u32.
pub const KERNEL_SS_HOST: u32 = 0x3d0;
/// Far pointer to the handler: u32 offset, which the monitor writes, then the host selector of ring-0 code as a u32.
pub const KERNEL_CS_HOST: u32 = 0x3d8;
/// The EIP of the handler: the offset of `KERNEL_CS_HOST`. u32.
pub const GATE_TARGET: u32 = KERNEL_CS_HOST;
/// Not 0: `iret` to ring 3 leaves by the gate, so that the page whose fault it returns from can be mapped on the way.
/// Written and understood by the world's runtime. u32.
pub const REFILL: u32 = 0x3e0;
/// What the hardware's `iret` takes to ring 3 where it has a ring of its own: EIP, CS, EFLAGS, ESP, SS. The monitor writes
/// the (host) selectors, the trampoline the rest. Five u32.
pub const USER_FRAME: u32 = 0x3e4;
/// How many events the engine's own ring 0 has sent to the guest's handlers by itself, ever (wraps). u32.
pub const REFLECTED: u32 = 0x3f8;
/// Offsets from here on are of the transit page of a keyed world (see [`crate::Keys`]), which lies elsewhere: all that ring 3 may
/// reach. It holds
/// what a ring transition still needs, or already has, while PKRU is ring 3's: ring 3's own registers, and nothing else.
pub const TRANSIT: u32 = 0x2000;
/// The general registers, eight u32 in encoding order.
pub const TRANSIT_REGISTERS: u32 = TRANSIT;
/// As `SCRATCH_FLAGS`.
pub const TRANSIT_FLAGS: u32 = TRANSIT + 0x20;
/// As `SCRATCH_IMAGE`.
pub const TRANSIT_IMAGE: u32 = TRANSIT + 0x24;
/// As `USER_SS_HOST`.
pub const TRANSIT_STACK: u32 = TRANSIT + 0x30;
/// As `USER_CS_HOST`.
pub const TRANSIT_CODE: u32 = TRANSIT + 0x38;
/// The segment cache: 128 entries of 16 bytes, indexed by GDT index (selector >> 3, so TI = 0 only):
/// u32 descriptor low, u32 descriptor high (as read from the guest's GDT when the monitor cached it), u32 host selector
/// for guest ring 0, and a u32 which is 0 for an invalid entry, else 1 in its lower half and in its upper half what
/// `HOST_RING3` is to hold. A trampoline may load a segment without leaving the world exactly when the entry is valid
/// and the guest's descriptor still equals it.
pub const SEGMENT_CACHE: u32 = 0x800;
/// How many entries the segment cache has.
pub const SEGMENT_CACHE_LEN: u32 = 128;
