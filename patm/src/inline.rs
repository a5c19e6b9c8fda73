//! Sites: the sequence that does a sensitive instruction without leaving the world, or leaves by the gate.
//!
//! The reader needs three rules. Before `commit` nothing the guest can see has changed, or the [`Fix`] of the boundary
//! undoes it. Flags are the guest's unless `save_flags` came first. Memory operands are read while every register
//! still has its guest value, so that `mov ds, [eax]` and `mov [esp+4], ds` see what the guest means.
//!
//! [`Fix`]: crate::map::Fix

use crate::emit::{Cond, EAX, ECX, EDX, ESP, Emitter};
use crate::insn::Insn;
use crate::map::{Finish, IF, NATIVE};
use crate::transition;
use crate::vcpu_page as page;
use crate::{ReasonKind, Route, reason_word};
use csam::SensitiveKind as Kind;
use iced_x86::{Code, FlowControl, InstructionInfoFactory, OpAccess, OpKind, Register};

/// EFLAGS bits that must be clear for an `iret` in line: NT, VM, VIF, VIP. For RF see `IRET_REFUSES`.
pub(crate) const IRET_CLEAR: u32 = 0x4000 | 0x2_0000 | 0x8_0000 | 0x10_0000;
/// CR0.TS.
const TS: u8 = 8;
/// EFLAGS bits `popf` may not set while hardware holds the flags: TF, IOPL, NT, AC, ID.
pub(crate) const HELD_BACK: u32 = 0x100 | 0x3000 | 0x4000 | 0x4_0000 | 0x20_0000;

/// The counter in the vCPU page of in-line executions of `kind`.
#[must_use]
pub fn counter(kind: Kind) -> u32 {
    match kind {
        Kind::Cli => 0,
        Kind::Sti => 1,
        Kind::Pushf => 2,
        Kind::Popf => 3,
        Kind::PushSreg => 4,
        Kind::PopSreg => 5,
        Kind::MovFromSreg => 6,
        Kind::MovToSreg => 7,
        Kind::MovFromCr => 8,
        Kind::CsData => 9,
        Kind::Iret => 10,
        Kind::Clts => 11,
        Kind::Verw => 12,
        Kind::Int => 13,
        _ => page::COUNTERS_LEN - 1,
    }
}

/// What an in-line sequence may use.
pub(crate) struct Context {
    pub(crate) site_id: u32,
    pub(crate) count: bool,
}

/// The number of a segment register in encoding order (ES, CS, SS, DS, FS, GS).
fn segment(register: Register) -> Option<u8> {
    Some(match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        Register::GS => 5,
        _ => return None,
    })
}

/// The segments that may be loaded in line. CS cannot be, SS would need its interrupt shadow.
fn loadable(register: Register) -> Option<u8> {
    segment(register).filter(|s| !matches!(s, 1 | 2))
}

/// Emits the site `insn`; `begin` has been called. Returns how it is done and whether execution may go on behind it.
pub(crate) fn emit(e: &mut Emitter, insn: &Insn, kind: Kind, cx: &Context) -> (Route, bool) {
    let i = &insn.instr;
    let next = insn.next();
    let done = match i.code() {
        Code::Cli => {
            e.store_imm(page::IF_FLAG, 0);
            e.commit(next);
            true
        }
        Code::Sti => return sti(e, insn, cx),
        Code::Pushfd => {
            pushf(e, next);
            true
        }
        Code::Popfd => {
            popf(e, next, cx);
            true
        }
        Code::Pushd_CS
        | Code::Pushd_SS
        | Code::Pushd_DS
        | Code::Pushd_ES
        | Code::Pushd_FS
        | Code::Pushd_GS => segment(i.op0_register()).is_some_and(|s| {
            e.page_op(&[0xff], 6, page::SELECTORS + 4 * u32::from(s));
            e.commit(next);
            true
        }),
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg => mov_from_segment(e, insn),
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 => load_segment(e, insn, i.op0_register(), false, cx),
        Code::Popd_DS | Code::Popd_ES | Code::Popd_FS | Code::Popd_GS => {
            load_segment(e, insn, i.op0_register(), true, cx)
        }
        Code::Mov_r32_cr => mov_from_control(e, insn),
        Code::Iretd => return iret(e, cx),
        Code::Clts => {
            clts(e, next, cx);
            true
        }
        Code::Verw_rm16 | Code::Verw_r32m16 => verw(e, insn, cx),
        _ if kind == Kind::CsData => {
            let flow = i.flow_control();
            if cs_data(e, insn) {
                return (Route::InLine, flow == FlowControl::Next);
            }
            false
        }
        _ => false,
    };
    if !done {
        e.gate(reason_word(cx.site_id, ReasonKind::Emulate));
        return (Route::Gate, false);
    }
    if cx.count {
        e.count(counter(kind));
    }
    (Route::InLine, true)
}

/// Leaves by the gate if an interrupt waits; the instruction is committed. Keeps flags and registers.
fn leave_if_pending(e: &mut Emitter, done: crate::emit::Label, reason: u32) {
    e.load(ECX, page::PENDING);
    e.short_branch(&[0xe3], done); // jecxz
    let state = e.state;
    e.restore(ECX);
    e.gate(reason);
    e.state = state;
}

fn sti(e: &mut Emitter, insn: &Insn, cx: &Context) -> (Route, bool) {
    e.store_imm(page::IF_FLAG, IF);
    e.commit(insn.next());
    if cx.count {
        e.count(counter(Kind::Sti));
    }
    e.save(ECX);
    let done = e.label();
    leave_if_pending(e, done, reason_word(cx.site_id, ReasonKind::PendingAfterSti));
    e.bind(done);
    e.restore(ECX);
    (Route::InLine, true)
}

/// The pushed image is hardware's with IF replaced and the hidden bits added; `lea` adds without touching flags.
fn pushf(e: &mut Emitter, next: u32) {
    e.op(&[0x9c]); // pushfd
    e.state.esp_add = 4; // until the image is right the push has not happened
    e.save(EAX);
    e.save(ECX);
    e.op(&[0x8b, 0x04, 0x24]); // mov eax, [esp]
    e.load(ECX, page::IF_FLAG);
    let minus_if = IF.wrapping_neg().to_le_bytes();
    e.op_parts(&[&[0x8d, 0x84, 0x08], &minus_if]); // lea eax, [eax + ecx - 200h]: hardware always has IF = 1
    e.load(ECX, page::HIDDEN_FLAGS);
    e.op(&[0x8d, 0x04, 0x08]); // lea eax, [eax + ecx]: hardware has none of the hidden bits
    e.op(&[0x89, 0x04, 0x24]); // mov [esp], eax
    e.state.esp_add = 0;
    e.commit(next);
    e.restore(ECX);
    e.restore(EAX);
}

fn popf(e: &mut Emitter, next: u32, cx: &Context) {
    e.save(EAX);
    e.save_flags();
    e.op(&[0x8b, 0x04, 0x24]); // mov eax, [esp]
    e.page_op(&[0x0b], EAX, page::HIDDEN_FLAGS); // or eax, hidden
    e.op_parts(&[&[0xa9], &HELD_BACK.to_le_bytes()]); // test eax, imm32
    let slow = e.slow_path(reason_word(cx.site_id, ReasonKind::Emulate));
    e.jcc(Cond::NotEqual, slow);
    e.op(&[0x8b, 0x04, 0x24]); // mov eax, [esp]
    e.op_parts(&[&[0x25], &IF.to_le_bytes()]); // and eax, 200h
    e.store(page::SCRATCH_VALUE, EAX);
    e.restore(EAX);
    e.op(&[0x9d]); // popfd
    e.commit(next);
    e.state.restore_flags = false;
    e.state.finish = Finish::StoreIf;
    store_if_and_leave_if_pending(e, reason_word(cx.site_id, ReasonKind::PendingAfterPopf));
}

/// [`Finish::StoreIf`] is due: does it, and leaves by the gate if IF is 1 and an interrupt waits.
fn store_if_and_leave_if_pending(e: &mut Emitter, reason: u32) {
    e.save(ECX);
    e.load(ECX, page::SCRATCH_VALUE);
    e.store(page::IF_FLAG, ECX);
    e.state.finish = Finish::Nothing;
    let done = e.label();
    e.short_branch(&[0xe3], done); // jecxz: IF = 0
    leave_if_pending(e, done, reason);
    e.bind(done);
    e.restore(ECX);
}

/// `iret` to the running code segment: no change of privilege, stack or CS. SDM Vol. 2A, "IRET", label
/// RETURN-TO-SAME-PRIVILEGE-LEVEL. To ring 3 see [`transition::enter_user`]. Anything else is for the monitor.
fn iret(e: &mut Emitter, cx: &Context) -> (Route, bool) {
    e.save(EAX);
    e.save_flags();
    let slow = e.slow_path(reason_word(cx.site_id, ReasonKind::Emulate));
    e.op(&[0x0f, 0xb7, 0x44, 0x24, 0x04]); // movzx eax, word [esp + 4]: CS
    e.page_op(&[0x3b], EAX, page::USER_CS); // cmp eax, selector
    let user = e.label();
    e.jcc(Cond::Equal, user);
    let at_user = e.state;
    e.page_op(&[0x3b], EAX, page::IRET_CS);
    e.jcc(Cond::NotEqual, slow);
    e.op(&[0x8b, 0x44, 0x24, 0x08]); // mov eax, [esp + 8]: EFLAGS
    e.op_parts(&[&[0xa9], &IRET_CLEAR.to_le_bytes()]); // test eax, imm32
    e.jcc(Cond::NotEqual, slow);
    e.page_op(&[0x85], EAX, page::IRET_REFUSES); // test mask, eax
    e.jcc(Cond::NotEqual, slow);
    e.page_op(&[0x33], EAX, page::HIDDEN_FLAGS); // xor eax, hidden: these must stay as they are
    e.op_parts(&[&[0xa9], &HELD_BACK.to_le_bytes()]); // test eax, imm32
    e.jcc(Cond::NotEqual, slow);
    transition::check_descriptor(e, page::IRET_DESC_AT, page::IRET_DESC_LOW, slow);
    e.op(&[0x8b, 0x04, 0x24]); // mov eax, [esp]: EIP
    e.store(page::SCRATCH_TARGET, EAX);
    e.op(&[0x8b, 0x44, 0x24, 0x08]); // mov eax, [esp + 8]
    e.op_parts(&[&[0x25], &IF.to_le_bytes()]); // and eax, 200h
    e.store(page::SCRATCH_VALUE, EAX);
    e.op(&[0x8b, 0x44, 0x24, 0x08]); // mov eax, [esp + 8]
    e.op_parts(&[&[0x25], &NATIVE.to_le_bytes()]); // and eax, imm32
    e.store(page::SCRATCH_IMAGE, EAX);
    e.op(&[0x8d, 0x44, 0x24, 0x0c]); // lea eax, [esp + 12]
    e.store(page::SCRATCH + 4 * u32::from(ESP), EAX);
    e.restore(EAX);
    e.point_esp_at(page::SCRATCH_IMAGE);
    e.state.restore.insert(ESP);
    e.state.esp_add = -12;
    e.op(&[0x9d]); // popfd
    e.commit(0);
    e.state.to_target = true;
    e.state.esp_add = 0;
    e.state.restore_flags = false;
    e.state.finish = Finish::StoreIf;
    e.restore(ESP);
    store_if_and_leave_if_pending(e, reason_word(cx.site_id, ReasonKind::PendingAfterIret));
    if cx.count {
        e.count(counter(Kind::Iret));
    }
    e.page_op(&[0xff], 4, page::SCRATCH_TARGET); // jmp [target]
    e.bind(user);
    e.state = at_user;
    transition::enter_user(e, slow, cx.count);
    (Route::InLine, false)
}

/// `clts` while CR0.TS is clear does nothing.
fn clts(e: &mut Emitter, next: u32, cx: &Context) {
    e.save(EAX);
    e.save_flags();
    e.test_page_byte(page::CR0, TS);
    let slow = e.slow_path(reason_word(cx.site_id, ReasonKind::Emulate));
    e.jcc(Cond::NotEqual, slow);
    e.restore_flags();
    e.restore(EAX);
    e.commit(next);
}

fn mov_from_control(e: &mut Emitter, insn: &Insn) -> bool {
    let offset = match insn.instr.op1_register() {
        Register::CR0 => page::CR0,
        Register::CR2 => page::CR2,
        Register::CR3 => page::CR3,
        Register::CR4 => page::CR4,
        _ => return false,
    };
    let dest = insn.instr.op0_register().number() as u8;
    if dest == 4 {
        return false; // mov esp, cr: no sane guest, and [esp] needs no thought then
    }
    e.load(dest, offset);
    e.commit(insn.next());
    true
}

/// Prefix bytes that address a memory operand, CS turned into SS: CS shows the code view.
fn address_prefixes(insn: &Insn, out: &mut [u8; 4]) -> Option<usize> {
    let mut n = 0;
    for &b in insn.prefixes() {
        match b {
            0xf0 => return None,
            0x66 | 0xf2 | 0xf3 => continue,
            _ => {}
        }
        *out.get_mut(n)? = if b == 0x2e { 0x36 } else { b };
        n += 1;
    }
    Some(n)
}

/// A register whose number is not used to address the memory operand of `insn` and is not ESP.
fn free_register(insn: &Insn) -> u8 {
    let used = |n: u8| {
        let same = |r: Register| r != Register::None && r.full_register32().number() as u8 == n;
        same(insn.instr.memory_base()) || same(insn.instr.memory_index())
    };
    [EAX, ECX, EDX].into_iter().find(|&n| !used(n)).unwrap_or(EAX)
}

fn mov_from_segment(e: &mut Emitter, insn: &Insn) -> bool {
    let i = &insn.instr;
    let Some(s) = segment(i.op1_register()) else { return false };
    let from = page::SELECTORS + 4 * u32::from(s);
    if i.op0_kind() == OpKind::Register {
        let dest = i.op0_register();
        if dest.full_register32() == Register::ESP {
            return false;
        }
        let number = dest.number() as u8;
        if dest.is_gpr32() {
            e.load(number, from);
        } else {
            e.page_op(&[0x66, 0x8b], number, from);
        }
        e.commit(insn.next());
        return true;
    }
    let mut prefixes = [0; 4];
    let Some(n) = address_prefixes(insn, &mut prefixes) else { return false };
    if insn.prefixes().contains(&0x2e) {
        return false; // a write through CS faults
    }
    let [_, modrm, tail @ ..] = insn.opcode() else { return false };
    let reg = free_register(insn);
    e.save(reg);
    e.load(reg, from);
    e.op_parts(&[&[0x66], prefixes.get(..n).unwrap_or(&[]), &[0x89, (modrm & !0x38) | reg << 3], tail]);
    e.commit(insn.next());
    e.restore(reg);
    true
}

/// `mov sreg, r/m16` and `pop sreg`: loads what the monitor cached, if the guest's descriptor is still the cached one.
fn load_segment(e: &mut Emitter, insn: &Insn, dest: Register, pop: bool, cx: &Context) -> bool {
    let Some(s) = loadable(dest) else { return false };
    let source = if pop { Selector::Stack } else { Selector::Operand(1) };
    let Some(slow) = fetch_selector(e, insn, source, cx) else { return false };
    let load = e.label();
    // ECX is now the host selector to load if the guest's is null (0..=3), EAX the one for ring 3.
    e.op(&[0x31, 0xc0]); // xor eax, eax
    e.op(&[0x83, 0xf9, 0x03]); // cmp ecx, 3
    e.jcc(Cond::BelowOrEqual, load);
    check_cached(e, slow);
    e.cache_op(&[0x0f, 0xb7], EAX, 14); // movzx eax, word
    e.cache_op(&[0x8b], ECX, 8);
    e.bind(load);
    e.op(&[0x8e, 0xc0 | s << 3 | ECX]); // mov sreg, cx
    e.commit(insn.next());
    e.state.finish = Finish::StoreSelector(s);
    if pop {
        e.state.esp_add = 4;
    }
    // The monitor writes these two anew at every entry, so a stop before they are done needs no Finish.
    e.store(page::HOST_RING0 + 4 * u32::from(s), ECX);
    e.store(page::HOST_RING3 + 4 * u32::from(s), EAX);
    e.load(ECX, page::SCRATCH_VALUE);
    e.store(page::SELECTORS + 4 * u32::from(s), ECX);
    e.state.finish = Finish::Nothing;
    e.restore_flags();
    e.restore(ECX);
    e.restore(EAX);
    if pop {
        e.op(&[0x8d, 0x64, 0x24, 0x04]); // lea esp, [esp + 4]
        e.state.esp_add = 0;
    }
    true
}

/// `verw` of a selector the cache knows to be writable data: ZF := 1. SDM Vol. 2C, "VERR/VERW".
fn verw(e: &mut Emitter, insn: &Insn, cx: &Context) -> bool {
    let Some(slow) = fetch_selector(e, insn, Selector::Operand(0), cx) else { return false };
    e.op(&[0x83, 0xf9, 0x03]); // cmp ecx, 3
    e.jcc(Cond::BelowOrEqual, slow);
    check_cached(e, slow);
    e.cache_op(&[0x8b], EAX, 4);
    e.op_parts(&[&[0x25], &0x1a00_u32.to_le_bytes()]); // and eax, S | code | writable
    e.op_parts(&[&[0x3d], &0x1200_u32.to_le_bytes()]); // cmp eax, S | writable
    e.jcc(Cond::NotEqual, slow);
    e.restore(ECX);
    e.load(EAX, page::SCRATCH_FLAGS);
    e.op(&[0x80, 0xcc, 0x40]); // or ah, 40h: ZF
    e.op(&[0x04, 0x7f]); // add al, 7fh: OF from bit 0
    e.op(&[0x9e]); // sahf
    e.state.restore_flags = false;
    e.commit(insn.next());
    e.restore(EAX);
    true
}

/// Where an instruction has its selector.
#[derive(Clone, Copy)]
enum Selector {
    Stack,
    Operand(u32),
}

/// Reads the selector into ECX and `SCRATCH_VALUE`; EAX, ECX and the flags are then free. Returns the way out.
fn fetch_selector(
    e: &mut Emitter,
    insn: &Insn,
    source: Selector,
    cx: &Context,
) -> Option<crate::emit::Label> {
    let i = &insn.instr;
    let mut prefixes = [0; 4];
    let n = address_prefixes(insn, &mut prefixes)?;
    let [_, modrm_at @ ..] = insn.opcode() else { return None };
    // `mov sreg, rm` has its ModRM behind one opcode byte, `verw rm` behind two.
    let modrm_at = if insn.opcode().first() == Some(&0x0f) { modrm_at.get(1..)? } else { modrm_at };
    e.save(EAX);
    e.save(ECX);
    match source {
        Selector::Stack => e.op(&[0x0f, 0xb7, 0x0c, 0x24]), // movzx ecx, word [esp]
        Selector::Operand(op) if i.op_kind(op) == OpKind::Register => {
            e.op(&[0x0f, 0xb7, 0xc0 | ECX << 3 | (i.op_register(op).number() as u8 & 7)]); // movzx ecx, r16
        }
        Selector::Operand(_) => {
            let [modrm, tail @ ..] = modrm_at else { return None };
            // movzx ecx, word m
            e.op_parts(&[prefixes.get(..n)?, &[0x0f, 0xb7, (modrm & !0x38) | ECX << 3], tail]);
        }
    }
    e.store(page::SCRATCH_VALUE, ECX);
    e.save_flags();
    Some(e.slow_path(reason_word(cx.site_id, ReasonKind::Emulate)))
}

/// Goes to `slow` unless the cache serves the selector in ECX, which is not null; ECX is then its cache index for
/// [`Emitter::cache_op`]. Clobbers EAX and the flags.
fn check_cached(e: &mut Emitter, slow: crate::emit::Label) {
    let rpl_fits = e.label();
    e.op(&[0xf6, 0xc1, 0x04]); // test cl, 4: TI
    e.jcc(Cond::NotEqual, slow);
    e.op_parts(&[&[0x81, 0xf9], &(page::SEGMENT_CACHE_LEN * 8 - 1).to_le_bytes()]); // cmp ecx, imm32
    e.jcc(Cond::Above, slow);
    e.op(&[0x83, 0xe1, 0xf8]); // and ecx, ~7
    e.op(&[0x8d, 0x41, 0x07]); // lea eax, [ecx + 7]
    e.page_op(&[0x3b], EAX, page::GDT_LIMIT); // cmp eax, limit
    e.jcc(Cond::Above, slow);
    e.load(EAX, page::GDT_BASE);
    e.op(&[0x36, 0x8b, 0x04, 0x08]); // mov eax, ss:[eax + ecx]: descriptor, low half
    e.cache_op(&[0x3b], EAX, 0);
    e.jcc(Cond::NotEqual, slow);
    e.load(EAX, page::GDT_BASE);
    e.op(&[0x36, 0x8b, 0x44, 0x08, 0x04]); // mov eax, ss:[eax + ecx + 4]: high half
    e.cache_op(&[0x3b], EAX, 4);
    e.jcc(Cond::NotEqual, slow);
    // At CPL 0, RPL 0 may load any DPL and any RPL may load DPL 3. What is between is rare: the monitor decides.
    e.test_page_byte(page::SCRATCH_VALUE, 3);
    e.jcc(Cond::Equal, rpl_fits);
    e.op_parts(&[&[0x25], &0x6000_u32.to_le_bytes()]); // and eax, DPL
    e.op_parts(&[&[0x3d], &0x6000_u32.to_le_bytes()]); // cmp eax, DPL 3
    e.jcc(Cond::NotEqual, slow);
    e.bind(rpl_fits);
    e.cache_test_byte(12, 1); // valid?
    e.jcc(Cond::Equal, slow);
}

/// A read through CS: the same through SS, which is flat and shows RAM.
fn cs_data(e: &mut Emitter, insn: &Insn) -> bool {
    let i = &insn.instr;
    if !matches!(i.flow_control(), FlowControl::Next | FlowControl::IndirectBranch)
        || i.code() == Code::Jmp_rm16
        || insn.prefixes().contains(&0xf0)
    {
        return false;
    }
    let reads = |a| matches!(a, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
    let mut factory = InstructionInfoFactory::new();
    let through_cs = |m: &&iced_x86::UsedMemory| m.segment() == Register::CS;
    if !factory.info(i).used_memory().iter().filter(through_cs).all(|m| reads(m.access())) {
        return false;
    }
    let mut bytes = [0u8; 15];
    let mut n = 0;
    for (slot, &b) in bytes.iter_mut().zip(insn.prefixes()) {
        *slot = if b == 0x2e { 0x36 } else { b };
        n += 1;
    }
    e.op_parts(&[bytes.get(..n).unwrap_or(&[]), insn.opcode()]);
    e.state = e.at(insn.next());
    true
}
