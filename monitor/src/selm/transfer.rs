//! Far `jmp`, `call` and `ret` (SDM Vol. 2, JMP, CALL, RET; Vol. 3A, 5.8).

use super::descriptor::{Descriptor, code, fetch_or, in_ldt, is_null, rpl, set_accessed, system_type};
use super::stack::{Frame, Stack, inner_stack, privilege_of};
use super::task::{Switch, switch_task};
use super::{drop_inner_segments, real_segment};
use crate::cpum::{CpuState, Segment, gpr, seg};
use crate::env::Env;
use crate::trap::Trap;

/// EIP as an operand of `operand_size` bytes gives it.
fn truncated(offset: u32, operand_size: u8) -> u32 {
    if operand_size == 2 { offset & 0xffff } else { offset }
}

fn check_eip(cs: &Segment, eip: u32) -> Result<(), Trap> {
    if eip > cs.limit { Err(Trap::gp(0)) } else { Ok(()) }
}

/// Where a far transfer leads.
enum Target {
    /// A code segment, reached directly or through a gate, at the CPL in the selector's RPL.
    Code { cs: Segment, eip: u32, gate: Option<Descriptor> },
    /// Another task.
    Task { selector: u16, tss: Descriptor },
}

/// Follows the pointer of a far `jmp` (`call` false) or `call` with all checks short of the stack.
fn resolve(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    offset: u32,
    call: bool,
) -> Result<Target, Trap> {
    let found = fetch_or(cpu, env, selector, Trap::gp)?;
    let blame = Trap::gp(code(selector));
    let outranked = found.dpl() < cpu.cpl.max(rpl(selector));
    match found.system_type() {
        None => {
            if !found.is_code() {
                return Err(blame);
            }
            let allowed = if found.is_conforming() {
                found.dpl() <= cpu.cpl
            } else {
                rpl(selector) <= cpu.cpl && found.dpl() == cpu.cpl
            };
            if !allowed {
                return Err(blame);
            }
            if !found.present() {
                return Err(Trap::np(code(selector)));
            }
            let cs = found.segment(with_rpl(selector, cpu.cpl));
            check_eip(&cs, offset)?;
            set_accessed(cpu, env, selector, found)?;
            Ok(Target::Code { cs, eip: offset, gate: None })
        }
        Some(system_type::CALL_GATE16 | system_type::CALL_GATE32) => {
            if outranked {
                return Err(blame);
            }
            if !found.present() {
                return Err(Trap::np(code(selector)));
            }
            through_call_gate(cpu, env, found, call)
        }
        Some(system_type::TASK_GATE) => {
            if outranked {
                return Err(blame);
            }
            if !found.present() {
                return Err(Trap::np(code(selector)));
            }
            let selector = found.gate_selector();
            let tss = task_gate_tss(cpu, env, selector, 0)?;
            Ok(Target::Task { selector, tss })
        }
        Some(system_type::TSS16_AVAILABLE | system_type::TSS32_AVAILABLE) => {
            if outranked || in_ldt(selector) {
                return Err(blame);
            }
            if !found.present() {
                return Err(Trap::np(code(selector)));
            }
            Ok(Target::Task { selector, tss: found })
        }
        Some(_) => Err(blame),
    }
}

/// The TSS a task gate names; `ext` (0 or 1) goes into error codes.
pub(crate) fn task_gate_tss(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    ext: u32,
) -> Result<Descriptor, Trap> {
    let tss = fetch_or(cpu, env, selector, |c| Trap::gp(c | ext))?;
    if in_ldt(selector) || !tss.is_available_tss() {
        return Err(Trap::gp(code(selector) | ext));
    }
    if !tss.present() {
        return Err(Trap::np(code(selector) | ext));
    }
    Ok(tss)
}

fn through_call_gate(
    cpu: &CpuState,
    env: &mut dyn Env,
    gate: Descriptor,
    call: bool,
) -> Result<Target, Trap> {
    let selector = gate.gate_selector();
    let found = fetch_or(cpu, env, selector, Trap::gp)?;
    let reachable =
        if call || found.is_conforming() { found.dpl() <= cpu.cpl } else { found.dpl() == cpu.cpl };
    if !found.is_code() || !reachable {
        return Err(Trap::gp(code(selector)));
    }
    if !found.present() {
        return Err(Trap::np(code(selector)));
    }
    let new_cpl = if found.is_conforming() { cpu.cpl } else { found.dpl() };
    let cs = found.segment(with_rpl(selector, new_cpl));
    let eip = gate.gate_offset();
    check_eip(&cs, eip)?;
    set_accessed(cpu, env, selector, found)?;
    Ok(Target::Code { cs, eip, gate: Some(gate) })
}

fn with_rpl(selector: u16, cpl: u8) -> u16 {
    selector & !3 | u16::from(cpl)
}

/// Far `jmp`. `operand_size` is 2 or 4. On error nothing has changed.
///
/// # Errors
/// As SDM Vol. 2, "JMP".
pub fn far_jump(
    cpu: &mut CpuState,
    env: &mut dyn Env,
    selector: u16,
    offset: u32,
    operand_size: u8,
) -> Result<(), Trap> {
    let offset = truncated(offset, operand_size);
    if cpu.real_addressing() {
        let cs = real_segment(cpu, &cpu.seg[seg::CS], selector);
        check_eip(&cs, offset)?;
        cpu.seg[seg::CS] = cs;
        cpu.eip = offset;
        return Ok(());
    }
    match resolve(cpu, env, selector, offset, false)? {
        Target::Code { cs, eip, .. } => {
            cpu.seg[seg::CS] = cs;
            cpu.eip = eip;
            Ok(())
        }
        Target::Task { selector, tss } => switch_task(cpu, env, selector, tss, Switch::Jump),
    }
}

/// Far `call`; `cpu.eip` is already the return address. On error nothing has changed.
///
/// # Errors
/// As SDM Vol. 2, "CALL".
pub fn far_call(
    cpu: &mut CpuState,
    env: &mut dyn Env,
    selector: u16,
    offset: u32,
    operand_size: u8,
) -> Result<(), Trap> {
    let offset = truncated(offset, operand_size);
    let return_to = [u32::from(cpu.seg[seg::CS].selector), cpu.eip];
    if cpu.real_addressing() {
        let cs = real_segment(cpu, &cpu.seg[seg::CS], selector);
        check_eip(&cs, offset)?;
        let mut frame = Frame::new(operand_size);
        frame.extend(&return_to);
        let esp = Stack::current(cpu, 0).push(cpu, env, &frame)?;
        cpu.gpr[gpr::ESP] = esp;
        cpu.seg[seg::CS] = cs;
        cpu.eip = offset;
        return Ok(());
    }
    let (cs, eip, gate) = match resolve(cpu, env, selector, offset, true)? {
        Target::Task { selector, tss } => return switch_task(cpu, env, selector, tss, Switch::Call),
        Target::Code { cs, eip, gate } => (cs, eip, gate),
    };
    let size = gate.map_or(operand_size, |g| if g.is_32bit_system() { 4 } else { 2 });
    let mut frame = Frame::new(size);
    let new_cpl = rpl(cs.selector);
    let old = Stack::current(cpu, 0);
    let stack = if new_cpl < cpu.cpl {
        let stack = inner_stack(cpu, env, new_cpl, 0)?;
        let mut parameters = [0u32; 31];
        let count = gate.map_or(0, Descriptor::gate_parameters);
        let parameters = &mut parameters[..count];
        old.peek_into(cpu, env, size, 0, parameters)?;
        frame.extend(&[u32::from(cpu.seg[seg::SS].selector), cpu.gpr[gpr::ESP]]);
        parameters.reverse();
        frame.extend(parameters);
        stack
    } else {
        old
    };
    frame.extend(&return_to);
    let esp = stack.push(cpu, env, &frame)?;
    cpu.seg[seg::SS] = stack.segment;
    cpu.gpr[gpr::ESP] = esp;
    cpu.seg[seg::CS] = cs;
    cpu.eip = eip;
    cpu.cpl = new_cpl;
    Ok(())
}

/// The checks of a return to `selector`, shared by far `ret` and `iret`: the new CS, whose RPL is the new CPL.
/// The accessed bit is not yet written: `ReturnTo::commit` does, after the stack has been checked too.
pub(crate) struct ReturnTo {
    /// The new CS.
    pub(crate) cs: Segment,
    descriptor: Descriptor,
}

impl ReturnTo {
    /// The CPL returned to.
    pub(crate) fn cpl(&self) -> u8 {
        rpl(self.cs.selector)
    }
    /// Sets the accessed bit in memory.
    pub(crate) fn mark(&self, cpu: &CpuState, env: &mut dyn Env) -> Result<(), Trap> {
        set_accessed(cpu, env, self.cs.selector, self.descriptor)
    }
}

pub(crate) fn return_code_segment(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    eip: u32,
) -> Result<ReturnTo, Trap> {
    let found = fetch_or(cpu, env, selector, Trap::gp)?;
    let new_cpl = rpl(selector);
    let allowed = if found.is_conforming() { found.dpl() <= new_cpl } else { found.dpl() == new_cpl };
    if !found.is_code() || new_cpl < cpu.cpl || !allowed {
        return Err(Trap::gp(code(selector)));
    }
    if !found.present() {
        return Err(Trap::np(code(selector)));
    }
    let cs = found.segment(selector);
    check_eip(&cs, eip)?;
    Ok(ReturnTo { cs, descriptor: found })
}

/// SS for a return to the outer ring `new_cpl`.
pub(crate) fn return_stack_segment(
    cpu: &CpuState,
    env: &mut dyn Env,
    selector: u16,
    new_cpl: u8,
) -> Result<Segment, Trap> {
    if is_null(selector) {
        return Err(Trap::gp(0));
    }
    let found = fetch_or(cpu, env, selector, Trap::gp)?;
    if rpl(selector) != new_cpl || !found.is_writable_data() || found.dpl() != new_cpl {
        return Err(Trap::gp(code(selector)));
    }
    if !found.present() {
        return Err(Trap::ss(code(selector)));
    }
    set_accessed(cpu, env, selector, found)?;
    Ok(found.segment(selector))
}

/// Far `ret imm16`. On error nothing has changed.
///
/// # Errors
/// As SDM Vol. 2, "RET".
pub fn far_return(cpu: &mut CpuState, env: &mut dyn Env, operand_size: u8, release: u16) -> Result<(), Trap> {
    let stack = Stack::current(cpu, 0);
    let [eip, selector] = stack.peek::<2>(cpu, env, operand_size, 0)?;
    let selector = selector as u16;
    let popped = u32::from(operand_size) * 2 + u32::from(release);
    if cpu.real_addressing() {
        let cs = real_segment(cpu, &cpu.seg[seg::CS], selector);
        check_eip(&cs, eip)?;
        cpu.gpr[gpr::ESP] = stack.moved(popped);
        cpu.seg[seg::CS] = cs;
        cpu.eip = eip;
        return Ok(());
    }
    let target = return_code_segment(cpu, env, selector, eip)?;
    let new_cpl = target.cpl();
    if new_cpl == cpu.cpl {
        target.mark(cpu, env)?;
        cpu.gpr[gpr::ESP] = stack.moved(popped);
    } else {
        let [esp, ss] = stack.peek::<2>(cpu, env, operand_size, popped)?;
        let segment = return_stack_segment(cpu, env, ss as u16, new_cpl)?;
        target.mark(cpu, env)?;
        let kept = Stack { segment, esp: cpu.gpr[gpr::ESP], privilege: privilege_of(new_cpl), error_code: 0 };
        cpu.gpr[gpr::ESP] = Stack { esp: kept.replaced(esp), ..kept }.moved(u32::from(release));
        cpu.seg[seg::SS] = segment;
    }
    let outward = new_cpl > cpu.cpl;
    cpu.seg[seg::CS] = target.cs;
    cpu.eip = eip;
    cpu.cpl = new_cpl;
    if outward {
        drop_inner_segments(cpu);
    }
    Ok(())
}
