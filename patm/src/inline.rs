//! Sites: the sequence that does a sensitive instruction without leaving the world, or leaves by the gate.
//!
//! The reader needs three rules. Before `commit` nothing the guest can see has changed, or the [`Fix`] of the boundary
//! undoes it. Flags are the guest's unless `save_flags` came first. Memory operands are read while every register
//! still has its guest value, so that `mov ds, [eax]` and `mov [esp+4], ds` see what the guest means.
//!
//! [`Fix`]: crate::map::Fix

use crate::emit::{Cond, EAX, ECX, ESP, Emitter};
use crate::far;
use crate::insn::Insn;
use crate::map::{Finish, IF, NATIVE};
use crate::segment::{self, Kept};
use crate::transition;
use crate::vcpu_page as page;
use crate::{Keys, ReasonKind, Route, reason_word};
use csam::SensitiveKind as Kind;
use iced_x86::{Code, FlowControl, InstructionInfoFactory, OpAccess, Register};

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
        Kind::LoadFarPointer => 14,
        Kind::Verr => 15,
        Kind::Lar => 16,
        Kind::Lsl => 17,
        Kind::Sgdt => 18,
        Kind::Sidt => 19,
        Kind::Sldt => 20,
        Kind::Str => 21,
        Kind::Smsw => 22,
        Kind::Wbinvd => 23,
        Kind::Invd => 24,
        Kind::FarJump => 25,
        Kind::FarCall => 26,
        Kind::FarReturn => 27,
        _ => page::COUNTERS_LEN - 1,
    }
}

/// What an in-line sequence may use.
pub(crate) struct Context {
    pub(crate) site_id: u32,
    pub(crate) count: bool,
    /// The hardware ring of guest ring 0.
    pub(crate) ring: u8,
    pub(crate) keys: Option<Keys>,
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
        | Code::Pushd_GS => segment::number(i.op0_register()).is_some_and(|s| {
            e.page_op(&[0xff], 6, page::SELECTORS + 4 * u32::from(s));
            e.commit(next);
            true
        }),
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg => segment::number(i.op1_register())
            .is_some_and(|s| segment::store_word(e, insn, page::SELECTORS + 4 * u32::from(s))),
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 => {
            segment::load(e, insn, i.op0_register(), Kept::Operand(1), cx)
        }
        Code::Popd_DS | Code::Popd_ES | Code::Popd_SS | Code::Popd_FS | Code::Popd_GS => {
            segment::load(e, insn, i.op0_register(), Kept::Stack, cx)
        }
        Code::Lds_r32_m1632 => segment::load(e, insn, Register::DS, Kept::FarPointer, cx),
        Code::Les_r32_m1632 => segment::load(e, insn, Register::ES, Kept::FarPointer, cx),
        Code::Lfs_r32_m1632 => segment::load(e, insn, Register::FS, Kept::FarPointer, cx),
        Code::Lgs_r32_m1632 => segment::load(e, insn, Register::GS, Kept::FarPointer, cx),
        Code::Lss_r32_m1632 => segment::load(e, insn, Register::SS, Kept::FarPointer, cx),
        Code::Mov_r32_cr => mov_from_control(e, insn),
        Code::Iretd => return iret(e, cx),
        Code::Clts => {
            clts(e, next, cx);
            true
        }
        Code::Verw_rm16 | Code::Verw_r32m16 => segment::verify(e, insn, true, cx),
        Code::Verr_rm16 | Code::Verr_r32m16 => segment::verify(e, insn, false, cx),
        Code::Lar_r32_r32m16 => segment::access_rights(e, insn, cx),
        Code::Lsl_r32_r32m16 => segment::limit(e, insn, cx),
        Code::Sldt_rm16 | Code::Sldt_r32m16 => segment::store_word(e, insn, page::LDTR),
        Code::Str_rm16 | Code::Str_r32m16 => segment::store_word(e, insn, page::TR),
        Code::Smsw_rm16 | Code::Smsw_r32m16 => segment::store_word(e, insn, page::CR0),
        Code::Sgdt_m1632 => segment::store_table(e, insn, page::GDT_BASE, page::GDT_LIMIT),
        Code::Sidt_m1632 => segment::store_table(e, insn, page::IDT_BASE, page::IDT_LIMIT),
        Code::Wbinvd | Code::Invd => {
            // Guest and devices see the same memory through the same caches.
            e.op(&[0x90]); // nop
            e.commit(next);
            true
        }
        Code::Jmp_ptr1632 | Code::Jmp_m1632 | Code::Call_ptr1632 | Code::Call_m1632 => {
            if far::branch(e, insn, kind, cx) {
                return (Route::InLine, false);
            }
            false
        }
        Code::Retfd | Code::Retfd_imm16 => {
            far::ret(e, insn, cx);
            return (Route::InLine, false);
        }
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
    e.op(&[0x8b, 0x04, 0x24]); // mov eax, [esp]: EIP is what the CPU reads first, and CR2 of a fault says so
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
    transition::enter_user(e, slow, cx);
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
