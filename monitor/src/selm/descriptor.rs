//! Descriptors: how they are read from the guest's tables, and what their bits say.

use crate::cpum::{CpuState, SegAttr, Segment};
use crate::env::{Env, Privilege};
use crate::trap::Trap;
use csam::GuestLin;

/// System descriptor types (SDM Vol. 3A, table 3-2).
pub mod system_type {
    #![allow(missing_docs)]
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS32_AVAILABLE: u8 = 9;
    pub const TSS32_BUSY: u8 = 0xb;
    pub const CALL_GATE32: u8 = 0xc;
    pub const INTERRUPT_GATE32: u8 = 0xe;
    pub const TRAP_GATE32: u8 = 0xf;
}

/// The bit that tells a busy TSS from an available one.
pub const TSS_BUSY_BIT: u8 = 2;

/// An 8-byte descriptor as it lies in the GDT, an LDT or the IDT (SDM Vol. 3A, 3.4.5 and 6.11).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Descriptor {
    /// Bytes 0..4.
    pub low: u32,
    /// Bytes 4..8.
    pub high: u32,
}

impl Descriptor {
    /// From its bytes in memory.
    #[must_use]
    pub fn from_bytes(b: [u8; 8]) -> Descriptor {
        Descriptor {
            low: u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            high: u32::from_le_bytes([b[4], b[5], b[6], b[7]]),
        }
    }
    /// As bytes in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 8] {
        (u64::from(self.high) << 32 | u64::from(self.low)).to_le_bytes()
    }
    /// Linear base of a segment.
    #[must_use]
    pub fn base(self) -> u32 {
        self.low >> 16 | (self.high & 0xff) << 16 | self.high & 0xff00_0000
    }
    /// Inclusive limit in bytes, granularity applied.
    #[must_use]
    pub fn limit(self) -> u32 {
        let raw = self.low & 0xffff | self.high & 0xf_0000;
        if self.attr().contains(SegAttr::GRANULAR) { raw << 12 | 0xfff } else { raw }
    }
    /// Access byte and flags nibble.
    #[must_use]
    pub fn attr(self) -> SegAttr {
        SegAttr::from_bits_truncate((self.high >> 8 & 0xff | self.high >> 12 & 0xf00) as u16)
    }
    /// DPL.
    #[must_use]
    pub fn dpl(self) -> u8 {
        self.attr().dpl()
    }
    /// P.
    #[must_use]
    pub fn present(self) -> bool {
        self.attr().contains(SegAttr::PRESENT)
    }
    /// The system type, or None for a code or data segment.
    #[must_use]
    pub fn system_type(self) -> Option<u8> {
        let attr = self.attr();
        (!attr.contains(SegAttr::CODE_OR_DATA)).then(|| attr.type_bits())
    }
    /// A code segment.
    #[must_use]
    pub fn is_code(self) -> bool {
        self.attr().contains(SegAttr::CODE_OR_DATA | SegAttr::CODE)
    }
    /// A conforming code segment.
    #[must_use]
    pub fn is_conforming(self) -> bool {
        self.attr().contains(SegAttr::CODE_OR_DATA | SegAttr::CODE | SegAttr::EXPAND_DOWN)
    }
    /// A data segment that may be written (and so may be a stack).
    #[must_use]
    pub fn is_writable_data(self) -> bool {
        let attr = self.attr();
        attr.contains(SegAttr::CODE_OR_DATA | SegAttr::RW) && !attr.contains(SegAttr::CODE)
    }
    /// A data segment, or a code segment that may be read.
    #[must_use]
    pub fn is_readable(self) -> bool {
        let attr = self.attr();
        attr.contains(SegAttr::CODE_OR_DATA) && (!attr.contains(SegAttr::CODE) || attr.contains(SegAttr::RW))
    }
    /// An available TSS, 16 or 32 bits.
    #[must_use]
    pub fn is_available_tss(self) -> bool {
        matches!(self.system_type(), Some(system_type::TSS16_AVAILABLE | system_type::TSS32_AVAILABLE))
    }
    /// A busy TSS, 16 or 32 bits.
    #[must_use]
    pub fn is_busy_tss(self) -> bool {
        matches!(self.system_type(), Some(system_type::TSS16_BUSY | system_type::TSS32_BUSY))
    }
    /// Gates: the target selector.
    #[must_use]
    pub fn gate_selector(self) -> u16 {
        (self.low >> 16) as u16
    }
    /// Gates: the target offset, 16 bits wide for 286 gates.
    #[must_use]
    pub fn gate_offset(self) -> u32 {
        if self.is_32bit_system() { self.low & 0xffff | self.high & 0xffff_0000 } else { self.low & 0xffff }
    }
    /// Call gates: how many parameters are copied, 0..=31.
    #[must_use]
    pub fn gate_parameters(self) -> usize {
        (self.high & 0x1f) as usize
    }
    /// Gates and TSSs: the 386 kind (type bit 3) rather than the 286 kind.
    #[must_use]
    pub fn is_32bit_system(self) -> bool {
        self.attr().type_bits() & 8 != 0
    }
    /// The segment register contents this descriptor gives, accessed bit set as the load sets it.
    #[must_use]
    pub fn segment(self, selector: u16) -> Segment {
        let mut attr = self.attr();
        if attr.contains(SegAttr::CODE_OR_DATA) {
            attr |= SegAttr::ACCESSED;
        }
        Segment { selector, base: self.base(), limit: self.limit(), attr }
    }
}

/// A null selector: GDT index 0, any RPL.
#[must_use]
pub fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Requested privilege level.
#[must_use]
pub fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// The selector part of an error code (SDM Vol. 3A, 6.13).
#[must_use]
pub fn code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// TI: the selector means the LDT.
#[must_use]
pub fn in_ldt(selector: u16) -> bool {
    selector & 4 != 0
}

/// Where the descriptor of `selector` lies, or None beyond the table's limit (or without an LDT).
#[must_use]
pub fn address(cpu: &CpuState, selector: u16) -> Option<GuestLin> {
    let offset = u32::from(selector & !7);
    let (base, limit) = if in_ldt(selector) {
        if !cpu.ldtr.present() {
            return None;
        }
        (cpu.ldtr.base, cpu.ldtr.limit)
    } else {
        (cpu.gdtr.base, u32::from(cpu.gdtr.limit))
    };
    (offset + 7 <= limit).then(|| GuestLin(base).wrapping_add(offset))
}

/// Reads the descriptor of `selector`. None beyond the table's limit; a trap only for a page fault.
pub fn fetch(cpu: &CpuState, env: &mut dyn Env, selector: u16) -> Result<Option<Descriptor>, Trap> {
    let Some(at) = address(cpu, selector) else { return Ok(None) };
    let mut bytes = [0u8; 8];
    env.read(cpu, at, &mut bytes, Privilege::Supervisor)?;
    Ok(Some(Descriptor::from_bytes(bytes)))
}

/// Reads the descriptor of a selector that must not be null and must lie in its table; otherwise `blame(selector)`.
pub fn fetch_or(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    blame: impl Fn(u32) -> Trap,
) -> Result<Descriptor, Trap> {
    if is_null(selector) {
        return Err(blame(0));
    }
    fetch(cpu, env, selector)?.ok_or_else(|| blame(code(selector)))
}

/// Sets the accessed bit in memory, as loading a segment register does (SDM Vol. 3A, 3.4.5.1).
pub fn set_accessed(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    descriptor: Descriptor,
) -> Result<(), Trap> {
    let attr = descriptor.attr();
    if !attr.contains(SegAttr::CODE_OR_DATA) || attr.contains(SegAttr::ACCESSED) {
        return Ok(());
    }
    write_access_byte(cpu, env, selector, (attr | SegAttr::ACCESSED).bits() as u8)
}

/// Writes the access byte of the descriptor of `selector`, which must lie in its table.
pub fn write_access_byte(cpu: &CpuState, env: &mut dyn Env, selector: u16, access: u8) -> Result<(), Trap> {
    match address(cpu, selector) {
        Some(at) => env.write(cpu, at.wrapping_add(5), &[access], Privilege::Supervisor),
        None => Ok(()),
    }
}
