//! Loading data segments, LDTR and TR, and the instructions that only look at a descriptor.

use super::descriptor::{
    TSS_BUSY_BIT, code, fetch, fetch_or, in_ldt, is_null, rpl, set_accessed, system_type, write_access_byte,
};
use crate::cpum::{CpuState, SegAttr, Segment, seg};
use crate::env::{Env, Privilege};
use crate::trap::Trap;
use csam::GuestLin;

/// A V86 segment: a paragraph, 64 KiB, DPL 3 (SDM Vol. 3A, 20.1.1 and Vol. 3C, 26.3.1.2).
#[must_use]
pub fn v86_segment(selector: u16) -> Segment {
    Segment { attr: SegAttr::from_bits_truncate(0xf3), ..Segment::real(selector) }
}

/// What a load of `selector` gives in real mode or V86. Real mode keeps limit and attributes ("unreal mode"): real
/// processors since the Pentium do, whatever SDM Vol. 3A, 20.1.1 says. A register that held a null selector in
/// protected mode has nothing to keep and becomes an ordinary real-mode segment.
#[must_use]
pub(crate) fn real_segment(cpu: &CpuState, old: &Segment, selector: u16) -> Segment {
    if cpu.v86() {
        v86_segment(selector)
    } else if old.present() {
        Segment { selector, base: u32::from(selector) << 4, ..*old }
    } else {
        Segment::real(selector)
    }
}

/// `mov sreg`, `pop sreg`, `lds` and friends: loads a data or stack segment register (`seg` is an index of
/// [`crate::cpum::seg`], never CS) with every check of SDM Vol. 2 "MOV". Does not touch the interrupt shadow.
///
/// # Errors
/// #GP, #NP or #SS with the selector as error code, or a page fault in the descriptor table. Nothing has changed then.
pub fn load_segment(cpu: &mut CpuState, env: &mut dyn Env, seg: usize, selector: u16) -> Result<(), Trap> {
    let Some(old) = cpu.seg.get(seg).copied() else { return Err(Trap::UD) };
    if seg == seg::CS {
        return Err(Trap::UD);
    }
    let new = if cpu.real_addressing() {
        real_segment(cpu, &old, selector)
    } else if seg == seg::SS {
        stack_segment(cpu, env, selector)?
    } else {
        data_segment(cpu, env, selector)?
    };
    cpu.seg[seg] = new;
    Ok(())
}

fn stack_segment(cpu: &CpuState, env: &mut dyn Env, selector: u16) -> Result<Segment, Trap> {
    let found = fetch_or(cpu, env, selector, Trap::gp)?;
    if rpl(selector) != cpu.cpl || !found.is_writable_data() || found.dpl() != cpu.cpl {
        return Err(Trap::gp(code(selector)));
    }
    if !found.present() {
        return Err(Trap::ss(code(selector)));
    }
    set_accessed(cpu, env, selector, found)?;
    Ok(found.segment(selector))
}

fn data_segment(cpu: &CpuState, env: &mut dyn Env, selector: u16) -> Result<Segment, Trap> {
    if is_null(selector) {
        return Ok(Segment { selector, ..Segment::default() });
    }
    let found = fetch_or(cpu, env, selector, Trap::gp)?;
    if !found.is_readable() || !found.is_conforming() && cpu.cpl.max(rpl(selector)) > found.dpl() {
        return Err(Trap::gp(code(selector)));
    }
    if !found.present() {
        return Err(Trap::np(code(selector)));
    }
    set_accessed(cpu, env, selector, found)?;
    Ok(found.segment(selector))
}

/// After a return to an outer ring: data segments the new CPL may not use become null (SDM Vol. 2, RET and IRET).
pub(crate) fn drop_inner_segments(cpu: &mut CpuState) {
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let attr = cpu.seg[index].attr;
        let conforming = attr.contains(SegAttr::CODE_OR_DATA | SegAttr::CODE | SegAttr::EXPAND_DOWN);
        if !conforming && attr.dpl() < cpu.cpl {
            cpu.seg[index] = Segment::default();
        }
    }
}

fn require_ring0(cpu: &CpuState) -> Result<(), Trap> {
    if cpu.real_addressing() {
        Err(Trap::UD)
    } else if cpu.cpl != 0 {
        Err(Trap::gp(0))
    } else {
        Ok(())
    }
}

/// `lldt`.
///
/// # Errors
/// #UD in real mode and V86, #GP(0) outside ring 0, #GP or #NP with the selector.
pub fn load_ldtr(cpu: &mut CpuState, env: &mut dyn Env, selector: u16) -> Result<(), Trap> {
    require_ring0(cpu)?;
    if is_null(selector) {
        cpu.ldtr = Segment { selector, ..Segment::default() };
        return Ok(());
    }
    if in_ldt(selector) {
        return Err(Trap::gp(code(selector)));
    }
    let found = fetch_or(cpu, env, selector, Trap::gp)?;
    if found.system_type() != Some(system_type::LDT) {
        return Err(Trap::gp(code(selector)));
    }
    if !found.present() {
        return Err(Trap::np(code(selector)));
    }
    cpu.ldtr = found.segment(selector);
    Ok(())
}

/// `ltr`: marks the TSS busy, in memory and in TR.
///
/// # Errors
/// As [`load_ldtr`]; a null selector is #GP(0).
pub fn load_tr(cpu: &mut CpuState, env: &mut dyn Env, selector: u16) -> Result<(), Trap> {
    require_ring0(cpu)?;
    if in_ldt(selector) {
        return Err(Trap::gp(code(selector)));
    }
    let found = fetch_or(cpu, env, selector, Trap::gp)?;
    if !found.is_available_tss() {
        return Err(Trap::gp(code(selector)));
    }
    if !found.present() {
        return Err(Trap::np(code(selector)));
    }
    let mut tr = found.segment(selector);
    tr.attr |= SegAttr::from_bits_truncate(u16::from(TSS_BUSY_BIT));
    write_access_byte(cpu, env, selector, tr.attr.bits() as u8)?;
    cpu.tr = tr;
    Ok(())
}

/// `lar`: the value to store, or None for ZF = 0. The 16-bit form stores its low half.
///
/// # Errors
/// #UD in real mode and V86; a page fault in the descriptor table.
pub fn load_access_rights(cpu: &CpuState, env: &mut dyn Env, selector: u16) -> Result<Option<u32>, Trap> {
    use system_type::*;
    let kinds =
        [TSS16_AVAILABLE, LDT, TSS16_BUSY, CALL_GATE16, TASK_GATE, TSS32_AVAILABLE, TSS32_BUSY, CALL_GATE32];
    Ok(inspect(cpu, env, selector, &kinds)?.map(|found| found.high & 0x00ff_ff00))
}

/// `lsl`: the limit in bytes, or None for ZF = 0.
///
/// # Errors
/// As [`load_access_rights`].
pub fn load_segment_limit(cpu: &CpuState, env: &mut dyn Env, selector: u16) -> Result<Option<u32>, Trap> {
    use system_type::*;
    let kinds = [TSS16_AVAILABLE, LDT, TSS16_BUSY, TSS32_AVAILABLE, TSS32_BUSY];
    Ok(inspect(cpu, env, selector, &kinds)?.map(super::descriptor::Descriptor::limit))
}

/// The descriptor, where `selector` may be looked at from this CPL and is a segment or one of `system_types`.
fn inspect(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    system_types: &[u8],
) -> Result<Option<super::descriptor::Descriptor>, Trap> {
    if cpu.real_addressing() {
        return Err(Trap::UD);
    }
    if is_null(selector) {
        return Ok(None);
    }
    let Some(found) = fetch(cpu, env, selector)? else { return Ok(None) };
    let kind_fits = found.system_type().is_none_or(|t| system_types.contains(&t));
    let visible = found.is_conforming() || cpu.cpl.max(rpl(selector)) <= found.dpl();
    Ok((kind_fits && visible).then_some(found))
}

/// `verr` (`write` false) and `verw` (`write` true): the new ZF.
///
/// # Errors
/// As [`load_access_rights`].
pub fn verify_segment(cpu: &CpuState, env: &mut dyn Env, selector: u16, write: bool) -> Result<bool, Trap> {
    let found = inspect(cpu, env, selector, &[])?;
    Ok(found.is_some_and(|d| if write { d.is_writable_data() } else { d.is_readable() }))
}

/// `in`/`out` permission: CPL against IOPL, then the TSS I/O bitmap (SDM Vol. 1, 19.5). `size` is 1, 2 or 4 bytes.
///
/// # Errors
/// #GP(0) when refused; a page fault in the TSS.
pub fn check_io(cpu: &CpuState, env: &mut dyn Env, port: u16, size: u8) -> Result<(), Trap> {
    /// Where a 32-bit TSS keeps the offset of its I/O bitmap.
    const IO_MAP_BASE: u32 = 0x66;
    if !cpu.protected() || !cpu.v86() && cpu.cpl <= cpu.iopl() {
        return Ok(());
    }
    let tr = cpu.tr;
    let wide =
        matches!(tr.attr.type_bits(), system_type::TSS32_AVAILABLE | system_type::TSS32_BUSY) && tr.present();
    if !wide || tr.limit < IO_MAP_BASE + 1 {
        return Err(Trap::gp(0));
    }
    let mut word = [0u8; 2];
    env.read(cpu, GuestLin(tr.base).wrapping_add(IO_MAP_BASE), &mut word, Privilege::Supervisor)?;
    let offset = u32::from(u16::from_le_bytes(word)) + u32::from(port >> 3);
    // Two bytes are always read, so the map needs one byte more than the ports it covers.
    if offset + 1 > tr.limit {
        return Err(Trap::gp(0));
    }
    env.read(cpu, GuestLin(tr.base).wrapping_add(offset), &mut word, Privilege::Supervisor)?;
    let wanted = ((1u32 << size.min(4)) - 1) << (port & 7);
    if u32::from(u16::from_le_bytes(word)) & wanted == 0 { Ok(()) } else { Err(Trap::gp(0)) }
}
