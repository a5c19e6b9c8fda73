//! Far jumps, calls and returns to the code segment that is running: near ones, once the guest's table says so.
//!
//! `IRET_CS` is the selector of the running segment while loading it again would change nothing. SDM Vol. 2A, "JMP" and
//! "CALL", and Vol. 2B, "RET": same privilege level, a code segment. Any other selector is for the monitor.

use crate::emit::{Cond, EAX, ECX, ESP, Emitter, Label};
use crate::inline::{Context, counter};
use crate::insn::Insn;
use crate::map::CS;
use crate::segment::{address_prefixes, fetch_far_pointer};
use crate::transition::check_descriptor;
use crate::vcpu_page as page;
use crate::{ReasonKind, reason_word};
use csam::SensitiveKind as Kind;
use iced_x86::Code;

/// Saves what the checks clobber. Returns the way out.
fn prepare(e: &mut Emitter, cx: &Context) -> Label {
    e.save_flags();
    e.slow_path(reason_word(cx.site_id, ReasonKind::Emulate))
}

/// EAX, ECX and the flags get the guest's values again.
fn clean_up(e: &mut Emitter, kind: Kind, cx: &Context) {
    e.restore_flags();
    e.restore(ECX);
    e.restore(EAX);
    if cx.count {
        e.count(counter(kind));
    }
}

/// `jmp` and `call`, direct and through memory. False if it is for the gate. Ends the trampoline.
pub(crate) fn branch(e: &mut Emitter, insn: &Insn, kind: Kind, cx: &Context) -> bool {
    let i = &insn.instr;
    let direct = matches!(i.code(), Code::Jmp_ptr1632 | Code::Call_ptr1632);
    let mut prefixes = [0; 4];
    if address_prefixes(insn, &mut prefixes).is_none() {
        return false;
    }
    e.save(EAX);
    e.save(ECX);
    if direct {
        e.op_parts(&[&[0xb8 | ECX], &u32::from(i.far_branch_selector()).to_le_bytes()]); // mov ecx, imm32
        e.store_imm(page::SCRATCH_FAR, i.far_branch32());
    } else if fetch_far_pointer(e, insn).is_none() {
        return false;
    }
    let slow = prepare(e, cx);
    e.page_op(&[0x3b], ECX, page::IRET_CS); // cmp ecx, selector
    e.jcc(Cond::NotEqual, slow);
    check_descriptor(e, page::IRET_DESC_AT, page::IRET_DESC_LOW, slow);
    e.load(EAX, page::SCRATCH_FAR);
    e.store(page::SCRATCH_TARGET, EAX);
    let call = matches!(i.code(), Code::Call_ptr1632 | Code::Call_m1632);
    if call {
        // What is missing of the stack shows at the upper word first, and before anything is written.
        e.op(&[0x83, 0x4c, 0x24, 0xfc, 0]); // or dword [esp - 4], 0
    }
    clean_up(e, kind, cx);
    if call {
        e.op_parts(&[&[0xc7, 0x44, 0x24, 0xf8], &insn.next().to_le_bytes()]); // mov dword [esp - 8], imm32
        e.page_op(&[0xff], 6, page::SELECTORS + 4 * CS); // push cs
        e.state.esp_add = 4;
        e.op(&[0x8d, 0x64, 0x24, 0xfc]); // lea esp, [esp - 4]
        e.state.esp_add = 0;
    }
    go(e);
    true
}

/// `retf` and `retf n`. Ends the trampoline.
pub(crate) fn ret(e: &mut Emitter, insn: &Insn, cx: &Context) {
    let released =
        if insn.instr.code() == Code::Retfd_imm16 { u32::from(insn.instr.immediate16()) } else { 0 };
    e.save(EAX);
    e.save(ECX);
    e.op(&[0x8b, 0x04, 0x24]); // mov eax, [esp]: EIP
    e.store(page::SCRATCH_TARGET, EAX);
    e.op(&[0x0f, 0xb7, 0x4c, 0x24, 0x04]); // movzx ecx, word [esp + 4]: CS
    let slow = prepare(e, cx);
    e.page_op(&[0x3b], ECX, page::IRET_CS); // cmp ecx, selector
    e.jcc(Cond::NotEqual, slow);
    check_descriptor(e, page::IRET_DESC_AT, page::IRET_DESC_LOW, slow);
    clean_up(e, Kind::FarReturn, cx);
    // lea esp, [esp + imm32]
    e.op_parts(&[&[0x8d, 0x80 | ESP << 3 | 4, 0x24], &(8 + released).to_le_bytes()]);
    go(e);
}

/// The instruction is committed; its target is in `SCRATCH_TARGET`.
fn go(e: &mut Emitter) {
    e.commit(0);
    e.state.to_target = true;
    e.page_op(&[0xff], 4, page::SCRATCH_TARGET); // jmp [target]
}
