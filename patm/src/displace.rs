//! Instructions that are no sites but lie in a window: how each is done from inside a trampoline.
//!
//! 32-bit code has no EIP-relative data, so only control transfers change their bytes. A call must be the last of its
//! window: the return address it pushes is the guest's own, and nothing of a window but its start is executed well.

use crate::emit::Emitter;
use crate::insn::Insn;
use csam::Class;
use iced_x86::{Code, CpuidFeature, FlowControl, OpKind, Register};

/// Can [`emit`] do it?
pub(crate) fn can_displace(insn: &Insn) -> bool {
    let i = &insn.instr;
    if insn.class() != Class::Innocuous {
        return false;
    }
    match i.flow_control() {
        // x87 records the address of the last instruction, which `fnstenv` shows.
        FlowControl::Next => !i
            .cpuid_features()
            .iter()
            .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)),
        FlowControl::ConditionalBranch => i.op0_kind() == OpKind::NearBranch32,
        FlowControl::UnconditionalBranch => matches!(i.code(), Code::Jmp_rel8_32 | Code::Jmp_rel32_32),
        FlowControl::IndirectBranch => i.code() == Code::Jmp_rm32,
        FlowControl::Return => matches!(i.code(), Code::Retnd | Code::Retnd_imm16),
        FlowControl::Call => i.code() == Code::Call_rel32_32,
        FlowControl::IndirectCall => {
            let esp = |r| r == Register::ESP;
            i.code() == Code::Call_rm32
                && !(i.op0_kind() == OpKind::Register && esp(i.op0_register()))
                && !(i.op0_kind() == OpKind::Memory && (esp(i.memory_base()) || esp(i.memory_index())))
        }
        _ => false,
    }
}

/// Emits `insn`, for which [`can_displace`] holds. True if execution may go on behind it.
pub(crate) fn emit(e: &mut Emitter, insn: &Insn) -> bool {
    let i = &insn.instr;
    let opcode = insn.opcode();
    let first = opcode.first().copied().unwrap_or(0x90);
    match i.flow_control() {
        FlowControl::ConditionalBranch => {
            let target = i.near_branch32();
            if (0xe0..=0xe3).contains(&first) {
                emit_loop(e, insn, first, target);
            } else {
                let cond = if first == 0x0f { opcode.get(1).copied().unwrap_or(0x80) } else { first };
                e.guest_branch(&[0x0f, 0x80 | (cond & 15)], target);
            }
            true
        }
        FlowControl::UnconditionalBranch => {
            e.guest_branch(&[0xe9], i.near_branch32());
            false
        }
        FlowControl::Call => {
            push_return_address(e, insn);
            e.state = e.at(i.near_branch32());
            e.guest_branch(&[0xe9], i.near_branch32());
            false
        }
        FlowControl::IndirectCall => {
            push_return_address(e, insn);
            e.state.esp_add = 4; // a fault while the target is read: the push has not happened
            let modrm = opcode.get(1).copied().unwrap_or(0xe0);
            e.op_parts(&[insn.prefixes(), &[0xff, (modrm & !0x38) | 4 << 3], opcode.get(2..).unwrap_or(&[])]);
            false
        }
        flow => {
            e.op(insn.bytes());
            flow == FlowControl::Next
        }
    }
}

fn push_return_address(e: &mut Emitter, insn: &Insn) {
    e.op_parts(&[&[0x68], &insn.next().to_le_bytes()]);
}

/// `loop`, `loope`, `loopne`, `jecxz` (or their 16-bit counter forms) only have 8-bit displacements.
fn emit_loop(e: &mut Emitter, insn: &Insn, opcode: u8, target: u32) {
    let (taken, not_taken) = (e.label(), e.label());
    let narrow = insn.prefixes().contains(&0x67);
    let bytes = [0x67, opcode];
    e.short_branch(if narrow { &bytes } else { &bytes[1..] }, taken);
    e.state = e.at(insn.next());
    e.short_branch(&[0xeb], not_taken);
    e.bind(taken);
    e.state = e.at(target);
    e.guest_branch(&[0xe9], target);
    e.bind(not_taken);
}
