//! The task switch (SDM Vol. 3A, chapter 8), for task gates, far transfers to a TSS and `iret` with NT.
//!
//! The order: read the new TSS, build the new state beside the old one with all its checks, probe every write, write,
//! take the new state over. Two deviations from hardware follow, both visible only to a broken guest: a fault in the
//! new task's selectors is raised in the old task (hardware has already switched then), and the T bit of the new TSS
//! raises no #DB.

use super::descriptor::{
    Descriptor, TSS_BUSY_BIT, address, code, fetch_or, in_ldt, is_null, rpl, set_accessed, system_type,
};
use super::load::v86_segment;
use super::stack::{Frame, Stack};
use crate::cpum::{CpuState, Segment, cr0, cr4, eflags, gpr, seg};
use crate::env::{Env, PagingChange, Privilege};
use crate::trap::Trap;
use csam::{GuestLin, GuestPhys};

/// What makes the task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Switch {
    /// Far `jmp`: the old task is no longer busy, nothing is nested.
    Jump,
    /// Far `call`: nested.
    Call,
    /// `iret` with NT: back to the task in the back link, which is already busy.
    Iret,
    /// An interrupt or exception through a task gate: nested. `ext` is 0 or 1.
    Gate { ext: u32, error_code: Option<u32> },
}

impl Switch {
    fn ext(self) -> u32 {
        match self {
            Switch::Gate { ext, .. } => ext,
            _ => 0,
        }
    }
    fn nests(self) -> bool {
        matches!(self, Switch::Call | Switch::Gate { .. })
    }
}

/// Segment registers in the order both TSS formats keep them: ES, CS, SS, DS, then FS, GS in the 32-bit one.
const TSS_ORDER: [usize; 6] = [seg::ES, seg::CS, seg::SS, seg::DS, seg::FS, seg::GS];

/// The two TSS layouts (SDM Vol. 3A, figures 8-2 and 8-10).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Layout {
    Tss16,
    Tss32,
}

impl Layout {
    fn of(wide: bool) -> Layout {
        if wide { Layout::Tss32 } else { Layout::Tss16 }
    }
    /// The least limit a TSS must have.
    fn least_limit(self) -> u32 {
        match self {
            Layout::Tss16 => 0x2b,
            Layout::Tss32 => 0x67,
        }
    }
    /// Where the part that a switch saves begins (the instruction pointer).
    fn dynamic_start(self) -> u32 {
        match self {
            Layout::Tss16 => 0x0e,
            Layout::Tss32 => 0x20,
        }
    }
    fn read(self, b: &[u8; 104]) -> Image {
        let word = |at: usize| u32::from(u16::from_le_bytes([b[at], b[at + 1]]));
        let dword = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        match self {
            Layout::Tss32 => Image {
                cr3: Some(dword(0x1c)),
                eip: dword(0x20),
                eflags: dword(0x24),
                gpr: std::array::from_fn(|i| dword(0x28 + 4 * i)),
                selectors: std::array::from_fn(|i| word(0x48 + 4 * i) as u16),
                ldt: word(0x60) as u16,
            },
            Layout::Tss16 => Image {
                cr3: None,
                eip: word(0x0e),
                eflags: word(0x10),
                gpr: std::array::from_fn(|i| word(0x12 + 2 * i) | 0xffff_0000),
                selectors: std::array::from_fn(|i| if i < 4 { word(0x22 + 2 * i) as u16 } else { 0 }),
                ldt: word(0x2a) as u16,
            },
        }
    }
    /// The bytes a switch saves, from [`Layout::dynamic_start`] on.
    fn save(self, cpu: &CpuState, flags: u32) -> ([u8; 0x40], usize) {
        let mut out = [0u8; 0x40];
        let values = [cpu.eip, flags].into_iter().chain(cpu.gpr);
        let selectors = TSS_ORDER.into_iter().map(|i| u32::from(cpu.seg[i].selector));
        let (size, count) = match self {
            Layout::Tss16 => (2, 4),
            Layout::Tss32 => (4, 6),
        };
        for (slot, value) in out.chunks_mut(size).zip(values.chain(selectors.take(count))) {
            slot.copy_from_slice(&value.to_le_bytes()[..size]);
        }
        (out, size * (10 + count))
    }
}

/// A task's state as its TSS holds it.
struct Image {
    cr3: Option<u32>,
    eip: u32,
    eflags: u32,
    gpr: [u32; 8],
    /// In [`TSS_ORDER`].
    selectors: [u16; 6],
    ldt: u16,
}

/// Switches to the task of `selector`, whose descriptor is `tss`: present, and busy exactly for [`Switch::Iret`]
/// (the callers check, with the error codes of their own instruction). `cpu.eip` is where the old task goes on.
pub(crate) fn switch_task(
    cpu: &mut CpuState,
    env: &mut dyn Env,
    selector: u16,
    tss: Descriptor,
    how: Switch,
) -> Result<(), Trap> {
    let ext = how.ext();
    let layout = Layout::of(tss.is_32bit_system());
    if tss.limit() < layout.least_limit() {
        return Err(Trap::ts(code(selector) | ext));
    }
    let old_layout = Layout::of(cpu.tr.attr.type_bits() & 8 != 0);
    if !cpu.tr.present() || cpu.tr.limit < old_layout.least_limit() {
        return Err(Trap::ts(code(cpu.tr.selector) | ext));
    }

    let mut bytes = [0u8; 104];
    let len = layout.least_limit() as usize + 1;
    let new_base = GuestLin(tss.base());
    env.read(cpu, new_base, &mut bytes[..len], Privilege::Supervisor)?;
    let image = layout.read(&bytes);

    let mut new = incoming(cpu, env, selector, tss, &image, how)?;
    let error_frame = match how {
        Switch::Gate { error_code: Some(error_code), .. } => {
            let mut frame = Frame::new(if layout == Layout::Tss32 { 4 } else { 2 });
            frame.push(error_code);
            let stack = Stack::current(&new, ext);
            stack.probe(&new, env, &frame)?;
            Some((stack, frame))
        }
        _ => None,
    };

    // Everything that will be written, checked before the first byte is.
    let flags = if how == Switch::Iret { cpu.eflags & !eflags::NT } else { cpu.eflags };
    let (saved, saved_len) = old_layout.save(cpu, flags);
    let old_dynamic = GuestLin(cpu.tr.base).wrapping_add(old_layout.dynamic_start());
    env.probe_write(cpu, old_dynamic, saved_len as u32, Privilege::Supervisor)?;
    if how.nests() {
        env.probe_write(cpu, new_base, 2, Privilege::Supervisor)?;
    }
    let old_access = if how.nests() { None } else { busy_byte(cpu, env, cpu.tr.selector, false)? };
    let new_access = if how == Switch::Iret { None } else { busy_byte(cpu, env, selector, true)? };
    for (at, _) in [old_access, new_access].into_iter().flatten() {
        env.probe_write(cpu, at, 1, Privilege::Supervisor)?;
    }

    env.write(cpu, old_dynamic, &saved[..saved_len], Privilege::Supervisor)?;
    if how.nests() {
        env.write(cpu, new_base, &cpu.tr.selector.to_le_bytes(), Privilege::Supervisor)?;
    }
    for (at, byte) in [old_access, new_access].into_iter().flatten() {
        env.write(cpu, at, &[byte], Privilege::Supervisor)?;
    }
    if let Some((stack, frame)) = error_frame {
        new.gpr[gpr::ESP] = stack.push(&new, env, &frame)?;
    }
    let cr3_loaded = cpu.paging() && image.cr3.is_some();
    *cpu = new;
    if cr3_loaded {
        env.paging_changed(cpu, PagingChange::Cr3);
    }
    Ok(())
}

/// Where the access byte of a TSS descriptor lies and what it is with the busy bit set or cleared.
fn busy_byte(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    busy: bool,
) -> Result<Option<(GuestLin, u8)>, Trap> {
    let Some(at) = address(cpu, selector & !4).map(|at| at.wrapping_add(5)) else { return Ok(None) };
    let mut access = [0u8];
    env.read(cpu, at, &mut access, Privilege::Supervisor)?;
    let byte = if busy { access[0] | TSS_BUSY_BIT } else { access[0] & !TSS_BUSY_BIT };
    Ok(Some((at, byte)))
}

/// The CPU state the new task starts with, all its selectors checked (SDM Vol. 3A, table 8-1).
fn incoming(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    tss: Descriptor,
    image: &Image,
    how: Switch,
) -> Result<CpuState, Trap> {
    let ext = how.ext();
    let mut new = cpu.clone();
    new.tr = tss.segment(selector);
    new.tr.attr |= crate::cpum::SegAttr::from_bits_truncate(u16::from(TSS_BUSY_BIT));
    new.cr0 |= cr0::TS;
    if let (true, Some(cr3)) = (cpu.paging(), image.cr3) {
        load_cr3(&mut new, env, cr3);
    }
    new.gpr = image.gpr;
    new.eip = image.eip;
    new.eflags = image.eflags & WRITABLE_FLAGS | eflags::FIXED;
    if how.nests() {
        new.eflags |= eflags::NT;
    }
    // Local breakpoints do not follow into another task (SDM Vol. 3B, 18.2.4).
    new.dr[7] &= !0x155;

    new.ldtr = incoming_ldt(&new, env, image.ldt, ext)?;
    let selectors = TSS_ORDER.into_iter().zip(image.selectors);
    if new.v86() {
        new.cpl = 3;
        for (index, selector) in selectors {
            new.seg[index] = v86_segment(selector);
        }
    } else {
        let [_, cs, ss, ..] = image.selectors;
        new.cpl = rpl(cs);
        new.seg[seg::SS] = incoming_stack(&new, env, ss, ext)?;
        for (index, selector) in selectors.filter(|&(i, _)| i != seg::CS && i != seg::SS) {
            new.seg[index] = incoming_data(&new, env, selector, ext)?;
        }
        new.seg[seg::CS] = incoming_code(&new, env, cs, ext)?;
    }
    if new.eip > new.seg[seg::CS].limit {
        return Err(Trap::gp(ext));
    }
    Ok(new)
}

/// EFLAGS bits a TSS can set.
const WRITABLE_FLAGS: u32 = 0x003f_7fd5;

fn load_cr3(new: &mut CpuState, env: &mut dyn Env, cr3: u32) {
    new.cr3 = cr3;
    if new.cr4 & cr4::PAE != 0 {
        let mut table = [0u8; 32];
        env.read_phys(GuestPhys(u64::from(cr3 & !0x1f)), &mut table);
        for (entry, bytes) in new.pdpte.iter_mut().zip(table.chunks_exact(8)) {
            let mut b = [0u8; 8];
            b.copy_from_slice(bytes);
            *entry = u64::from_le_bytes(b);
        }
    }
}

fn incoming_ldt(new: &CpuState, env: &mut dyn Env, selector: u16, ext: u32) -> Result<Segment, Trap> {
    if is_null(selector) {
        return Ok(Segment { selector, ..Segment::default() });
    }
    let blame = Trap::ts(code(selector) | ext);
    if in_ldt(selector) {
        return Err(blame);
    }
    let found = fetch_or(new, env, selector, |c| Trap::ts(c | ext))?;
    if found.system_type() != Some(system_type::LDT) || !found.present() {
        return Err(blame);
    }
    Ok(found.segment(selector))
}

fn incoming_code(new: &CpuState, env: &mut dyn Env, selector: u16, ext: u32) -> Result<Segment, Trap> {
    let found = fetch_or(new, env, selector, |c| Trap::ts(c | ext))?;
    let allowed = if found.is_conforming() { found.dpl() <= new.cpl } else { found.dpl() == new.cpl };
    if !found.is_code() || !allowed {
        return Err(Trap::ts(code(selector) | ext));
    }
    if !found.present() {
        return Err(Trap::np(code(selector) | ext));
    }
    set_accessed(new, env, selector, found)?;
    Ok(found.segment(selector))
}

fn incoming_stack(new: &CpuState, env: &mut dyn Env, selector: u16, ext: u32) -> Result<Segment, Trap> {
    let found = fetch_or(new, env, selector, |c| Trap::ts(c | ext))?;
    if !found.is_writable_data() || found.dpl() != new.cpl || rpl(selector) != new.cpl {
        return Err(Trap::ts(code(selector) | ext));
    }
    if !found.present() {
        return Err(Trap::ss(code(selector) | ext));
    }
    set_accessed(new, env, selector, found)?;
    Ok(found.segment(selector))
}

fn incoming_data(new: &CpuState, env: &mut dyn Env, selector: u16, ext: u32) -> Result<Segment, Trap> {
    if is_null(selector) {
        return Ok(Segment { selector, ..Segment::default() });
    }
    let found = fetch_or(new, env, selector, |c| Trap::ts(c | ext))?;
    if !found.is_readable() || !found.is_conforming() && new.cpl.max(rpl(selector)) > found.dpl() {
        return Err(Trap::ts(code(selector) | ext));
    }
    if !found.present() {
        return Err(Trap::np(code(selector) | ext));
    }
    set_accessed(new, env, selector, found)?;
    Ok(found.segment(selector))
}

/// `iret` with NT set: the back link of the current TSS names the task to return to.
pub(crate) fn return_to_previous_task(cpu: &mut CpuState, env: &mut dyn Env) -> Result<(), Trap> {
    let mut link = [0u8; 2];
    if !cpu.tr.present() || cpu.tr.limit < 1 {
        return Err(Trap::ts(code(cpu.tr.selector)));
    }
    env.read(cpu, GuestLin(cpu.tr.base), &mut link, Privilege::Supervisor)?;
    let selector = u16::from_le_bytes(link);
    let tss = fetch_or(cpu, env, selector, Trap::ts)?;
    if in_ldt(selector) || !tss.is_busy_tss() {
        return Err(Trap::ts(code(selector)));
    }
    if !tss.present() {
        return Err(Trap::np(code(selector)));
    }
    switch_task(cpu, env, selector, tss, Switch::Iret)
}
