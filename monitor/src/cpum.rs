//! CPUM: the engine-neutral state of one virtual CPU, as the guest believes it to be.

use bitflags::bitflags;

/// General register numbers in encoding order.
pub mod gpr {
    #![allow(missing_docs)]
    pub const EAX: usize = 0;
    pub const ECX: usize = 1;
    pub const EDX: usize = 2;
    pub const EBX: usize = 3;
    pub const ESP: usize = 4;
    pub const EBP: usize = 5;
    pub const ESI: usize = 6;
    pub const EDI: usize = 7;
}

/// Segment register numbers in encoding order.
pub mod seg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// EFLAGS bits (SDM Vol. 1, 3.4.3).
pub mod eflags {
    #![allow(missing_docs)]
    pub const CF: u32 = 1 << 0;
    pub const FIXED: u32 = 1 << 1;
    pub const PF: u32 = 1 << 2;
    pub const AF: u32 = 1 << 4;
    pub const ZF: u32 = 1 << 6;
    pub const SF: u32 = 1 << 7;
    pub const TF: u32 = 1 << 8;
    pub const IF: u32 = 1 << 9;
    pub const DF: u32 = 1 << 10;
    pub const OF: u32 = 1 << 11;
    pub const IOPL: u32 = 3 << 12;
    pub const NT: u32 = 1 << 14;
    pub const RF: u32 = 1 << 16;
    pub const VM: u32 = 1 << 17;
    pub const AC: u32 = 1 << 18;
    pub const VIF: u32 = 1 << 19;
    pub const VIP: u32 = 1 << 20;
    pub const ID: u32 = 1 << 21;
    pub const ARITH: u32 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits (SDM Vol. 3A, 2.5).
pub mod cr0 {
    #![allow(missing_docs)]
    pub const PE: u32 = 1 << 0;
    pub const MP: u32 = 1 << 1;
    pub const EM: u32 = 1 << 2;
    pub const TS: u32 = 1 << 3;
    pub const ET: u32 = 1 << 4;
    pub const NE: u32 = 1 << 5;
    pub const WP: u32 = 1 << 16;
    pub const AM: u32 = 1 << 18;
    pub const NW: u32 = 1 << 29;
    pub const CD: u32 = 1 << 30;
    pub const PG: u32 = 1 << 31;
}

/// CR4 bits (SDM Vol. 3A, 2.5).
pub mod cr4 {
    #![allow(missing_docs)]
    pub const VME: u32 = 1 << 0;
    pub const PVI: u32 = 1 << 1;
    pub const TSD: u32 = 1 << 2;
    pub const DE: u32 = 1 << 3;
    pub const PSE: u32 = 1 << 4;
    pub const PAE: u32 = 1 << 5;
    pub const MCE: u32 = 1 << 6;
    pub const PGE: u32 = 1 << 7;
    pub const PCE: u32 = 1 << 8;
    pub const OSFXSR: u32 = 1 << 9;
    pub const OSXMMEXCPT: u32 = 1 << 10;
    pub const UMIP: u32 = 1 << 11;
}

/// EFER bits.
pub mod efer {
    #![allow(missing_docs)]
    pub const NXE: u64 = 1 << 11;
}

bitflags! {
    /// The attribute part of a descriptor: access byte in bits 0..=7, flags nibble (AVL, L, D/B, G) in bits 8..=11.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct SegAttr: u16 {
        /// Accessed (code/data).
        const ACCESSED = 1 << 0;
        /// Writable (data) or readable (code).
        const RW = 1 << 1;
        /// Expand-down (data) or conforming (code).
        const EXPAND_DOWN = 1 << 2;
        /// Code segment.
        const CODE = 1 << 3;
        /// Not a system segment (S).
        const CODE_OR_DATA = 1 << 4;
        /// DPL, low bit.
        const DPL_LOW = 1 << 5;
        /// DPL, high bit.
        const DPL_HIGH = 1 << 6;
        /// Present.
        const PRESENT = 1 << 7;
        /// Available to software.
        const AVL = 1 << 8;
        /// 64-bit code (never here).
        const LONG = 1 << 9;
        /// D/B: 32-bit default size.
        const BIG = 1 << 10;
        /// G: limit in pages.
        const GRANULAR = 1 << 11;
    }
}

impl SegAttr {
    /// Descriptor privilege level, 0..=3.
    #[must_use]
    pub fn dpl(self) -> u8 {
        ((self.bits() >> 5) & 3) as u8
    }
    /// The four type bits.
    #[must_use]
    pub fn type_bits(self) -> u8 {
        (self.bits() & 0xf) as u8
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Guest-visible selector.
    pub selector: u16,
    /// Linear base.
    pub base: u32,
    /// Limit in bytes, inclusive, granularity applied.
    pub limit: u32,
    /// Attributes. Empty (not present) for a null selector: any use faults.
    pub attr: SegAttr,
}

impl Segment {
    /// A real-mode (or V86) segment for a selector.
    #[must_use]
    pub fn real(selector: u16) -> Segment {
        Segment {
            selector,
            base: u32::from(selector) << 4,
            limit: 0xffff,
            attr: SegAttr::from_bits_truncate(0x93),
        }
    }
    /// D/B: operations default to 32 bits (code) or the stack pointer is ESP (stack).
    #[must_use]
    pub fn big(&self) -> bool {
        self.attr.contains(SegAttr::BIG)
    }
    /// Base 0 and limit 4 GiB - 1, and not expand-down.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        self.base == 0
            && self.limit == u32::MAX
            && (self.attr.contains(SegAttr::CODE) || !self.attr.contains(SegAttr::EXPAND_DOWN))
    }
    /// A data segment whose offsets lie above its limit (SDM Vol. 3A, 3.4.5.1).
    #[must_use]
    pub fn expands_down(&self) -> bool {
        self.present()
            && self.attr.contains(SegAttr::CODE_OR_DATA | SegAttr::EXPAND_DOWN)
            && !self.attr.contains(SegAttr::CODE)
    }
    /// Usable at all: present.
    #[must_use]
    pub fn present(&self) -> bool {
        self.attr.contains(SegAttr::PRESENT)
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableRegister {
    /// Guest linear base.
    pub base: u32,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}

/// Delivery of interrupts is held back for one instruction (SDM Vol. 3A, 6.8.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Shadow {
    /// Nothing held back.
    #[default]
    None,
    /// After `sti` that set IF: maskable interrupts wait.
    Sti,
    /// After `mov ss` / `pop ss`: interrupts and debug traps wait.
    MovSs,
}

/// x87/MMX/SSE state in the 512-byte FXSAVE64 format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct FxState(pub [u8; 512]);

impl Default for FxState {
    /// As after FNINIT with MXCSR at its reset value (SDM Vol. 1, 8.1.5 and 10.2.3).
    fn default() -> Self {
        let mut b = [0u8; 512];
        b[0] = 0x7f;
        b[1] = 0x03;
        b[24] = 0x80;
        b[25] = 0x1f;
        FxState(b)
    }
}

/// Model-specific registers that hold plain state. The policy which exist is in `cpuid_msr`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub struct Msrs {
    pub efer: u64,
    pub pat: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub misc_enable: u64,
    /// GuestPhys of KVM's `pvclock_vcpu_time_info`; bit 0: it is wanted.
    pub kvm_system_time: u64,
    /// GuestPhys of KVM's `pvclock_wall_clock`.
    pub kvm_wall_clock: u64,
    /// Added to the host's TSC to yield the guest's.
    pub tsc_offset: i64,
}

/// The whole state of a virtual CPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CpuState {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    pub gpr: [u32; 8],
    /// Offset into CS.
    pub eip: u32,
    /// The guest's EFLAGS, all bits as the guest would see them on bare metal.
    pub eflags: u32,
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// Control registers. CR8 does not exist in 32-bit mode.
    pub cr0: u32,
    /// Page-fault linear address.
    pub cr2: u32,
    /// Page-table base.
    pub cr3: u32,
    /// CR4.
    pub cr4: u32,
    /// The four PAE page-directory pointers, loaded with CR3 (SDM Vol. 3A, 4.4.1).
    pub pdpte: [u64; 4],
    /// DR0-DR3, (4, 5 unused), DR6, DR7.
    pub dr: [u32; 8],
    /// Current privilege level, 0..=3. In real mode 0, in V86 mode 3.
    pub cpl: u8,
    /// Interrupt shadow.
    pub shadow: Shadow,
    /// In HLT, waiting for an interrupt.
    pub halted: bool,
    /// FPU.
    pub fpu: FxState,
    /// MSRs.
    pub msr: Msrs,
}

impl CpuState {
    /// State after reset (SDM Vol. 3A, table 9-1).
    #[must_use]
    pub fn reset() -> CpuState {
        let mut cs = Segment::real(0xf000);
        cs.base = 0xffff_0000;
        cs.attr = SegAttr::from_bits_truncate(0x9b);
        let data = Segment::real(0);
        let mut cpu = CpuState {
            gpr: [0; 8],
            eip: 0xfff0,
            eflags: eflags::FIXED,
            seg: [data, cs, data, data, data, data],
            ldtr: Segment { attr: SegAttr::from_bits_truncate(0x82), limit: 0xffff, ..Segment::default() },
            tr: Segment { attr: SegAttr::from_bits_truncate(0x8b), limit: 0xffff, ..Segment::default() },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            pdpte: [0; 4],
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            cpl: 0,
            shadow: Shadow::None,
            halted: false,
            fpu: FxState::default(),
            msr: Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() },
        };
        cpu.gpr[gpr::EDX] = 0x600;
        cpu
    }
    /// CR0.PE.
    #[must_use]
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }
    /// EFLAGS.VM.
    #[must_use]
    pub fn v86(&self) -> bool {
        self.eflags & eflags::VM != 0
    }
    /// Real mode or V86: selectors are paragraphs.
    #[must_use]
    pub fn real_addressing(&self) -> bool {
        !self.protected() || self.v86()
    }
    /// CR0.PG.
    #[must_use]
    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }
    /// I/O privilege level.
    #[must_use]
    pub fn iopl(&self) -> u8 {
        ((self.eflags >> 12) & 3) as u8
    }
    /// Maskable interrupts may be delivered before the next instruction.
    #[must_use]
    pub fn interruptible(&self) -> bool {
        self.eflags & eflags::IF != 0 && self.shadow == Shadow::None
    }
    /// Linear address of the next instruction.
    #[must_use]
    pub fn linear_eip(&self) -> u32 {
        self.seg[seg::CS].base.wrapping_add(self.eip)
    }
}
