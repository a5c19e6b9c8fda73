//! `iret`: back to the same ring, an outer ring, V86 mode or the previous task (SDM Vol. 2, IRET).

use crate::cpum::{CpuState, eflags, gpr, seg};
use crate::env::Env;
use crate::selm::stack::{Stack, privilege_of};
use crate::selm::task::return_to_previous_task;
use crate::selm::{
    drop_inner_segments, real_segment, return_code_segment, return_stack_segment, v86_segment,
};
use crate::trap::Trap;

/// Flags every `iret` loads, whatever its size and privilege.
const ALWAYS: u32 = eflags::ARITH | eflags::TF | eflags::DF | eflags::NT;
/// Flags only the 32-bit form has.
const WIDE: u32 = eflags::RF | eflags::AC | eflags::ID;

/// EFLAGS after loading `popped`, at the privilege `cpu` has now. VM is never loaded here.
fn loaded_flags(cpu: &CpuState, popped: u32, operand_size: u8) -> u32 {
    let mut mask = ALWAYS;
    if operand_size == 4 {
        mask |= WIDE;
    }
    if cpu.v86() {
        // IOPL is 3 here; V86 code changes IF but not IOPL.
        mask |= eflags::IF;
    } else if !cpu.protected() {
        mask |= eflags::IF | eflags::IOPL;
    } else {
        if cpu.cpl <= cpu.iopl() {
            mask |= eflags::IF;
        }
        if cpu.cpl == 0 {
            mask |= eflags::IOPL;
            if operand_size == 4 {
                mask |= eflags::VIF | eflags::VIP;
            }
        }
    }
    cpu.eflags & !mask | popped & mask | eflags::FIXED
}

/// `iret`: same and outer level, to V86, nested task. `operand_size` is 2 or 4. On error nothing has changed.
///
/// # Errors
/// As SDM Vol. 2, "IRET".
pub fn iret(cpu: &mut CpuState, env: &mut dyn Env, operand_size: u8) -> Result<(), Trap> {
    if cpu.protected() && !cpu.v86() {
        if cpu.eflags & eflags::NT != 0 {
            return return_to_previous_task(cpu, env);
        }
        return iret_protected(cpu, env, operand_size);
    }
    if cpu.v86() && cpu.iopl() < 3 {
        return Err(Trap::gp(0));
    }
    let stack = Stack::current(cpu, 0);
    let [eip, selector, flags] = stack.peek::<3>(cpu, env, operand_size, 0)?;
    let cs = real_segment(cpu, &cpu.seg[seg::CS], selector as u16);
    if eip > cs.limit {
        return Err(Trap::gp(0));
    }
    cpu.eflags = loaded_flags(cpu, flags, operand_size);
    cpu.gpr[gpr::ESP] = stack.moved(3 * u32::from(operand_size));
    cpu.seg[seg::CS] = cs;
    cpu.eip = eip;
    Ok(())
}

fn iret_protected(cpu: &mut CpuState, env: &mut dyn Env, operand_size: u8) -> Result<(), Trap> {
    let stack = Stack::current(cpu, 0);
    let [eip, selector, flags] = stack.peek::<3>(cpu, env, operand_size, 0)?;
    if operand_size == 4 && flags & eflags::VM != 0 && cpu.cpl == 0 {
        return iret_to_v86(cpu, env, eip, selector as u16, flags);
    }
    let target = return_code_segment(cpu, env, selector as u16, eip)?;
    let new_cpl = target.cpl();
    let outward = new_cpl > cpu.cpl;
    let (segment, esp) = if outward {
        let [esp, ss] = stack.peek::<2>(cpu, env, operand_size, 3 * u32::from(operand_size))?;
        let segment = return_stack_segment(cpu, env, ss as u16, new_cpl)?;
        let outer =
            Stack { segment, esp: cpu.gpr[gpr::ESP], privilege: privilege_of(new_cpl), error_code: 0 };
        (segment, outer.replaced(esp))
    } else {
        (stack.segment, stack.moved(3 * u32::from(operand_size)))
    };
    target.mark(cpu, env)?;
    cpu.eflags = loaded_flags(cpu, flags, operand_size);
    cpu.seg[seg::SS] = segment;
    cpu.gpr[gpr::ESP] = esp;
    cpu.seg[seg::CS] = target.cs;
    cpu.eip = eip;
    cpu.cpl = new_cpl;
    if outward {
        drop_inner_segments(cpu);
    }
    Ok(())
}

/// The popped flags have VM set at CPL 0: six more values follow, and the rest is V86 mode.
fn iret_to_v86(cpu: &mut CpuState, env: &mut dyn Env, eip: u32, cs: u16, flags: u32) -> Result<(), Trap> {
    /// All that exists in EFLAGS: at CPL 0 everything is loaded.
    const ALL: u32 = 0x003f_7fd5;
    let stack = Stack::current(cpu, 0);
    let [esp, ss, es, ds, fs, gs] = stack.peek::<6>(cpu, env, 4, 12)?;
    let cs = v86_segment(cs);
    if eip > cs.limit {
        return Err(Trap::gp(0));
    }
    cpu.eflags = flags & ALL | eflags::FIXED;
    cpu.seg[seg::CS] = cs;
    for (index, selector) in [(seg::SS, ss), (seg::ES, es), (seg::DS, ds), (seg::FS, fs), (seg::GS, gs)] {
        cpu.seg[index] = v86_segment(selector as u16);
    }
    cpu.gpr[gpr::ESP] = esp;
    cpu.eip = eip;
    cpu.cpl = 3;
    Ok(())
}
