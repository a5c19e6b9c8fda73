//! Delivery of exceptions and interrupts: vectors, gates, stacks, and what becomes of a fault on the way.

use crate::cpum::{CpuState, Segment, Shadow, eflags, gpr, seg};
use crate::env::{Env, Privilege};
use crate::selm::descriptor::{Descriptor, code, fetch_or, set_accessed, system_type};
use crate::selm::real_segment;
use crate::selm::stack::{Frame, Stack, inner_stack};
use crate::selm::task::{Switch, switch_task};
use crate::selm::task_gate_tss;
use crate::trap::{Event, Trap};
use csam::GuestLin;

/// The guest shut itself down: a fault while delivering a double fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TripleFault {
    /// The event that started it.
    pub first: Event,
    /// The last trap, which could not be delivered.
    pub last: Trap,
}

/// The vector of the double fault.
const DOUBLE_FAULT: u8 = 8;
/// The vector of the page fault.
const PAGE_FAULT: u8 = 14;

/// How exceptions combine (SDM Vol. 3A, table 6-4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(event: Event) -> Class {
    match event {
        Event::Exception(trap) => match trap.vector {
            0 | 10..=13 | 21 => Class::Contributory,
            PAGE_FAULT | 20 => Class::PageFault,
            DOUBLE_FAULT => Class::DoubleFault,
            _ => Class::Benign,
        },
        Event::Software { .. } | Event::External { .. } | Event::Nmi => Class::Benign,
    }
}

/// Delivers an event, escalating to #DF and triple fault (SDM Vol. 3A, 6.15 "Interrupt 8").
/// Real mode, V86 and protected mode; interrupt, trap and task gates.
///
/// For [`Event::Software`] prefer [`try_deliver`] and restore EIP on error: here a fault on the way pushes the EIP after
/// the instruction.
///
/// # Errors
/// [`TripleFault`]: the processor would shut down. CR2 may have changed, nothing else.
pub fn deliver(cpu: &mut CpuState, env: &mut dyn Env, event: Event) -> Result<(), TripleFault> {
    let mut pending = event;
    loop {
        if let Event::Exception(Trap { cr2: Some(address), .. }) = pending {
            // CR2 is loaded when the fault is detected, also when another one takes its place.
            cpu.cr2 = address;
        }
        let Err(raised) = try_deliver(cpu, env, pending) else { return Ok(()) };
        let second = Event::Exception(raised);
        if let Event::Exception(Trap { cr2: Some(address), .. }) = second {
            cpu.cr2 = address;
        }
        pending = match (class(pending), class(second)) {
            (Class::DoubleFault, _) | (_, Class::DoubleFault) => {
                return Err(TripleFault { first: event, last: raised });
            }
            (Class::Contributory, Class::Contributory)
            | (Class::PageFault, Class::Contributory | Class::PageFault) => Event::Exception(Trap::df()),
            // A benign exception cannot be raised by a delivery; taken as given it would not have to end.
            (_, Class::Benign) => return Err(TripleFault { first: event, last: raised }),
            _ => second,
        };
    }
}

/// One attempt to deliver: on error nothing of the CPU state has changed and the trap is what the attempt raised.
/// The interpreter uses it for `int n`.
///
/// # Errors
/// As SDM Vol. 2, "INT n", with EXT set in error codes unless the event is a software interrupt.
pub fn try_deliver(cpu: &mut CpuState, env: &mut dyn Env, event: Event) -> Result<(), Trap> {
    let delivery = Delivery::of(event);
    if let Event::Software { short_form: false, .. } = event
        && cpu.v86()
        && cpu.iopl() < 3
    {
        return Err(Trap::gp(0));
    }
    if cpu.protected() {
        delivery.protected(cpu, env)?
    } else {
        delivery.real(cpu, env)?
    }
    if let Some(address) = delivery.cr2 {
        cpu.cr2 = address;
    }
    cpu.halted = false;
    cpu.shadow = Shadow::None;
    Ok(())
}

/// An event with what its delivery needs to know.
struct Delivery {
    vector: u8,
    software: bool,
    error_code: Option<u32>,
    cr2: Option<u32>,
    /// The pushed flags have RF set (SDM Vol. 3B, 18.3.1.1).
    resume: bool,
}

impl Delivery {
    fn of(event: Event) -> Delivery {
        let plain =
            |vector, software| Delivery { vector, software, error_code: None, cr2: None, resume: false };
        match event {
            Event::Exception(trap) => Delivery {
                error_code: trap.error_code,
                cr2: trap.cr2,
                resume: is_fault(trap.vector),
                ..plain(trap.vector, false)
            },
            Event::Software { vector, .. } => plain(vector, true),
            Event::External { vector } => plain(vector, false),
            Event::Nmi => plain(2, false),
        }
    }

    /// EXT: 0 or 1.
    fn ext(&self) -> u32 {
        u32::from(!self.software)
    }

    /// The error code of a bad IDT entry (SDM Vol. 3A, 6.13).
    fn idt_error(&self) -> u32 {
        const IDT: u32 = 2;
        u32::from(self.vector) << 3 | IDT | self.ext()
    }

    fn pushed_flags(&self, cpu: &CpuState) -> u32 {
        if self.resume { cpu.eflags | eflags::RF } else { cpu.eflags }
    }

    fn real(&self, cpu: &mut CpuState, env: &mut dyn Env) -> Result<(), Trap> {
        let offset = u32::from(self.vector) * 4;
        if offset + 3 > u32::from(cpu.idtr.limit) {
            return Err(Trap::gp(self.idt_error()));
        }
        let mut b = [0u8; 4];
        env.read(cpu, GuestLin(cpu.idtr.base).wrapping_add(offset), &mut b, Privilege::Supervisor)?;
        let eip = u32::from(u16::from_le_bytes([b[0], b[1]]));
        let cs = real_segment(cpu, &cpu.seg[seg::CS], u16::from_le_bytes([b[2], b[3]]));
        if eip > cs.limit {
            return Err(Trap::gp(self.ext()));
        }
        let mut frame = Frame::new(2);
        frame.extend(&[cpu.eflags, u32::from(cpu.seg[seg::CS].selector), cpu.eip]);
        let esp = Stack::current(cpu, self.ext()).push(cpu, env, &frame)?;
        cpu.gpr[gpr::ESP] = esp;
        cpu.seg[seg::CS] = cs;
        cpu.eip = eip;
        cpu.eflags &= !(eflags::IF | eflags::TF | eflags::AC | eflags::RF);
        Ok(())
    }

    fn protected(&self, cpu: &mut CpuState, env: &mut dyn Env) -> Result<(), Trap> {
        let offset = u32::from(self.vector) * 8;
        if offset + 7 > u32::from(cpu.idtr.limit) {
            return Err(Trap::gp(self.idt_error()));
        }
        let mut bytes = [0u8; 8];
        env.read(cpu, GuestLin(cpu.idtr.base).wrapping_add(offset), &mut bytes, Privilege::Supervisor)?;
        let gate = Descriptor::from_bytes(bytes);
        let kind = match gate.system_type() {
            Some(
                kind @ (system_type::TASK_GATE
                | system_type::INTERRUPT_GATE16
                | system_type::TRAP_GATE16
                | system_type::INTERRUPT_GATE32
                | system_type::TRAP_GATE32),
            ) => kind,
            _ => return Err(Trap::gp(self.idt_error())),
        };
        if self.software && gate.dpl() < cpu.cpl {
            return Err(Trap::gp(self.idt_error()));
        }
        if !gate.present() {
            return Err(Trap::np(self.idt_error()));
        }
        if kind == system_type::TASK_GATE {
            return self.through_task_gate(cpu, env, gate);
        }
        let clears_if = matches!(kind, system_type::INTERRUPT_GATE16 | system_type::INTERRUPT_GATE32);
        self.through_gate(cpu, env, gate, clears_if)
    }

    fn through_task_gate(&self, cpu: &mut CpuState, env: &mut dyn Env, gate: Descriptor) -> Result<(), Trap> {
        let selector = gate.gate_selector();
        let tss = task_gate_tss(cpu, env, selector, self.ext())?;
        let how = Switch::Gate { ext: self.ext(), error_code: self.error_code };
        // The old task's image gets the flags a gate would have pushed; a refused switch leaves them as they were.
        let pushed = self.pushed_flags(cpu);
        let flags = std::mem::replace(&mut cpu.eflags, pushed);
        switch_task(cpu, env, selector, tss, how).inspect_err(|_| cpu.eflags = flags)
    }

    fn through_gate(
        &self,
        cpu: &mut CpuState,
        env: &mut dyn Env,
        gate: Descriptor,
        clears_if: bool,
    ) -> Result<(), Trap> {
        let ext = self.ext();
        let selector = gate.gate_selector();
        let found = fetch_or(cpu, env, selector, |c| Trap::gp(c | ext))?;
        let blame = Trap::gp(code(selector) | ext);
        if !found.is_code() || found.dpl() > cpu.cpl {
            return Err(blame);
        }
        if !found.present() {
            return Err(Trap::np(code(selector) | ext));
        }
        let new_cpl = if found.is_conforming() { cpu.cpl } else { found.dpl() };
        let from_v86 = cpu.v86();
        if from_v86 && new_cpl != 0 {
            return Err(blame);
        }
        let cs = found.segment(selector & !3 | u16::from(new_cpl));
        let eip = gate.gate_offset();
        if eip > cs.limit {
            return Err(Trap::gp(ext));
        }
        set_accessed(cpu, env, selector, found)?;

        let mut frame = Frame::new(if gate.is_32bit_system() { 4 } else { 2 });
        let visible = |index: usize| u32::from(cpu.seg[index].selector);
        let stack = if new_cpl < cpu.cpl {
            if from_v86 {
                frame.extend(&[visible(seg::GS), visible(seg::FS), visible(seg::DS), visible(seg::ES)]);
            }
            frame.extend(&[visible(seg::SS), cpu.gpr[gpr::ESP]]);
            inner_stack(cpu, env, new_cpl, ext)?
        } else {
            Stack::current(cpu, ext)
        };
        frame.extend(&[self.pushed_flags(cpu), visible(seg::CS), cpu.eip]);
        if let Some(error_code) = self.error_code {
            frame.push(error_code);
        }
        let esp = stack.push(cpu, env, &frame)?;

        if from_v86 {
            for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
                cpu.seg[index] = Segment::default();
            }
        }
        cpu.seg[seg::SS] = stack.segment;
        cpu.gpr[gpr::ESP] = esp;
        cpu.seg[seg::CS] = cs;
        cpu.eip = eip;
        cpu.cpl = new_cpl;
        cpu.eflags &= !(eflags::TF | eflags::NT | eflags::RF | eflags::VM);
        if clears_if {
            cpu.eflags &= !eflags::IF;
        }
        Ok(())
    }
}

/// Exceptions reported before their instruction has had an effect (SDM Vol. 3A, table 6-1). #DB is left out: as a trap
/// it pushes RF as it is, and as an instruction-breakpoint fault it must not set RF.
fn is_fault(vector: u8) -> bool {
    matches!(vector, 0 | 5 | 6 | 7 | 10..=14 | 16 | 17 | 19 | 20 | 21)
}
