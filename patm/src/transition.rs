//! Between ring 0 and ring 3 without an exit, in worlds that hold both.
//!
//! Guest ring 0 and ring 3 both run at hardware privilege level 3. What tells them apart are the segment limits: ring 3
//! gets host descriptors that end below the guest's kernel. A transition so reloads every segment register, changes the
//! words of the vCPU page that say what the guest sees, and ends with a far jump.
//! 1. [`enter_user`]: `iret` to the ring-3 code and stack segments the monitor named (`USER_CS`, `USER_SS`).
//! 2. [`enter_kernel`]: `int n` of ring 3 through the gate the monitor named (`GATE_READY` and the words behind it).
//!
//! Both first check, in the guest's own tables, that what the monitor had looked up there still holds. Until then
//! nothing has changed; with the commit everything has, and [`Finish`] does what is still undone.
//!
//! What a ring-3 program makes of its own hardware segment registers is checked before anything is believed of them,
//! except SS: the first instructions store through it. A program that loads a host selector of another base there by
//! itself writes three words into its own memory, or faults, and then its `int n` is left to the monitor.

use crate::emit::{Cond, EAX, ECX, EDX, ESP, Emitter, Label};
use crate::inline::{Context, HELD_BACK, IRET_CLEAR, counter};
use crate::insn::Insn;
use crate::map::{CS, DATA_SEGMENTS, FIXED, Finish, IF, IOPL, NATIVE, SS};
use crate::patch::{Config, Keys};
use crate::vcpu_page as page;
use csam::SensitiveKind as Kind;

/// EFLAGS bits that ring 3 has in the hardware and ring 0 has not: TF, NT, AC, ID. A transition with one of them set is
/// for the monitor.
const USER_ONLY: u32 = 0x100 | 0x4000 | 0x4_0000 | 0x20_0000;
/// The number of FS; GS is the next.
const FS: u8 = 4;
/// Bytes of the frame that a gate to an inner ring pushes.
const FRAME: u8 = 20;

/// Goes to `slow` unless the eight bytes at the guest linear address in word `at` are those of words `low` and `low + 4`.
/// SS is flat with its whole limit. Clobbers EAX and the flags.
pub(crate) fn check_descriptor(e: &mut Emitter, at: u32, low: u32, slow: Label) {
    e.load(EAX, at);
    supervisor(e, &[0x36, 0x8b, 0x00]); // mov eax, ss:[eax]
    e.page_op(&[0x3b], EAX, low); // cmp eax, low
    e.jcc(Cond::NotEqual, slow);
    e.load(EAX, at);
    supervisor(e, &[0x36, 0x8b, 0x40, 0x04]); // mov eax, ss:[eax + 4]
    e.page_op(&[0x3b], EAX, low + 4);
    e.jcc(Cond::NotEqual, slow);
}

/// One instruction whose memory access the processor itself would make.
fn supervisor(e: &mut Emitter, bytes: &[u8]) {
    e.state.supervisor = true;
    e.op(bytes);
    e.state.supervisor = false;
}

/// `iret` from ring 0 to ring 3, SDM Vol. 2A, "IRET", label RETURN-TO-OUTER-PRIVILEGE-LEVEL. EAX and the flags are
/// saved, the CS of the frame is `USER_CS`. The frame: EIP, CS, EFLAGS, ESP, SS. Ends the trampoline.
///
/// An EIP behind the limit of the host's CS faults at the far jump, when the return is committed: for the guest, whose
/// limit is larger, that is a fault of ring 3 at the target.
pub(crate) fn enter_user(e: &mut Emitter, slow: Label, cx: &Context) {
    // With rings of its own the hardware must do the change: a far jump goes to no other ring.
    let by_iret = cx.ring != 3;
    let and_eax = |e: &mut Emitter, mask: u32| e.op_parts(&[&[0x25], &mask.to_le_bytes()]);
    e.op(&[0x8b, 0x44, 0x24, 0x08]); // mov eax, [esp + 8]: EFLAGS
    and_eax(e, IRET_CLEAR | USER_ONLY | IF);
    e.op_parts(&[&[0x3d], &IF.to_le_bytes()]); // cmp eax, IF: ring 3 runs with the host's IF, which is 1
    e.jcc(Cond::NotEqual, slow);
    e.op(&[0x8b, 0x44, 0x24, 0x08]); // mov eax, [esp + 8]
    e.page_op(&[0x85], EAX, page::IRET_REFUSES); // test mask, eax
    e.jcc(Cond::NotEqual, slow);
    e.page_op(&[0x33], EAX, page::HIDDEN_FLAGS); // xor eax, hidden: these must stay as they are
    e.op_parts(&[&[0xa9], &HELD_BACK.to_le_bytes()]); // test eax, imm32
    e.jcc(Cond::NotEqual, slow);
    e.cmp_imm(page::PENDING, 0);
    e.jcc(Cond::NotEqual, slow);
    e.cmp_imm(page::REFILL, 0);
    e.jcc(Cond::NotEqual, slow);
    e.op(&[0x0f, 0xb7, 0x44, 0x24, 0x10]); // movzx eax, word [esp + 16]: SS
    e.page_op(&[0x3b], EAX, page::USER_SS);
    e.jcc(Cond::NotEqual, slow);
    check_descriptor(e, page::USER_CS_DESC_AT, page::USER_CS_DESC_LOW, slow);
    check_descriptor(e, page::USER_SS_DESC_AT, page::USER_SS_DESC_LOW, slow);
    e.op(&[0x8b, 0x04, 0x24]); // mov eax, [esp]: EIP
    e.store(page::USER_CS_HOST, EAX);
    if by_iret {
        e.store(page::USER_FRAME, EAX);
    }
    e.op(&[0x8b, 0x44, 0x24, 0x0c]); // mov eax, [esp + 12]: ESP
    e.store(page::USER_SS_HOST, EAX);
    if by_iret {
        e.store(page::USER_FRAME + 12, EAX);
    }
    e.op(&[0x8b, 0x44, 0x24, 0x08]); // mov eax, [esp + 8]
    and_eax(e, NATIVE);
    e.store(page::SCRATCH_IMAGE, EAX);
    if by_iret {
        e.store(page::USER_FRAME + 8, EAX);
    }
    e.save(ECX);
    e.commit(0);
    e.state.to_target = true;
    e.state.restore_flags = false;
    e.state.restore_image = true;
    e.state.finish = Finish::EnterUser;
    e.state.cpl = Some(3);
    for s in DATA_SEGMENTS {
        let word = 4 * u32::from(s);
        let (load, done) = (e.label(), e.label());
        e.load(ECX, page::HOST_RING3 + word);
        e.page_op(&[0x3b], ECX, page::HOST_RING0 + word); // the same for both rings: it is loaded already
        e.short_branch(&[0x74], done); // je
        e.op(&[0x85, 0xc9]); // test ecx, ecx
        e.short_branch(&[0x75], load); // jne
        e.store(page::SELECTORS + word, ECX);
        e.store(page::HOST_RING0 + word, ECX);
        e.bind(load);
        e.op(&[0x8e, 0xc0 | s << 3 | ECX]); // mov sreg, ecx
        e.bind(done);
    }
    e.load(ECX, page::USER_CS);
    e.store(page::SELECTORS + 4 * CS, ECX);
    e.load(ECX, page::USER_SS);
    e.store(page::SELECTORS + 4 * SS, ECX);
    e.store_imm(page::IF_FLAG, IF);
    e.store_imm(page::CPL, 3);
    if cx.count {
        e.count(counter(Kind::Iret));
    }
    if let (Some(_), false) = (cx.keys, by_iret) {
        leave_by_transit(e);
        return;
    }
    e.restore(ECX);
    e.restore(EAX);
    if by_iret {
        e.point_esp_at(page::USER_FRAME);
        e.op(&[0xcf]); // iretd; IF stays as it is where CPL > IOPL
        return;
    }
    e.point_esp_at(page::SCRATCH_IMAGE);
    e.op(&[0x9d]); // popfd
    e.state.restore_image = false;
    e.page_op(&[0x0f, 0xb2], ESP, page::USER_SS_HOST); // lss esp, [stack]
    e.page_op(&[0xff], 5, page::USER_CS_HOST); // jmp far [code]
}

/// The end of [`enter_user`] in a keyed world: loads PKRU, behind which the vCPU page is out of reach.
fn leave_by_transit(e: &mut Emitter) {
    e.save(EDX);
    e.store(page::TRANSIT_REGISTERS + 4 * u32::from(EDX), EDX);
    let words = [
        (page::SCRATCH + 4 * u32::from(EAX), page::TRANSIT_REGISTERS + 4 * u32::from(EAX)),
        (page::SCRATCH + 4 * u32::from(ECX), page::TRANSIT_REGISTERS + 4 * u32::from(ECX)),
        (page::SCRATCH_IMAGE, page::TRANSIT_IMAGE),
        (page::USER_SS_HOST, page::TRANSIT_STACK),
        (page::USER_SS_HOST + 4, page::TRANSIT_STACK + 4),
        (page::USER_CS_HOST, page::TRANSIT_CODE),
        (page::USER_CS_HOST + 4, page::TRANSIT_CODE + 4),
    ];
    for (from, to) in words {
        e.load(ECX, from);
        e.store(to, ECX);
    }
    load_pkru(e, Keys::RING3);
    e.state.transit = true;
    // Whoever jumped to that instruction gets no further unless what he loaded is ring 3's. These bytes mean the same in
    // code of all three sizes.
    e.op(&[0x83, 0xf8, Keys::RING3]); // cmp eax, imm8
    e.op(&[0x74, 0x01]); // je over the hlt
    e.op(&[0xf4]);
    for reg in [EAX, ECX, EDX] {
        e.load(reg, page::TRANSIT_REGISTERS + 4 * u32::from(reg));
    }
    e.point_esp_at(page::TRANSIT_IMAGE);
    e.op(&[0x9d]); // popfd
    e.state.restore_image = false;
    e.page_op(&[0x0f, 0xb2], ESP, page::TRANSIT_STACK); // lss esp, [stack]
    e.page_op(&[0xff], 5, page::TRANSIT_CODE); // jmp far [code]
}

/// Loads PKRU; EAX, ECX and EDX are saved. Leaves the flags alone.
fn load_pkru(e: &mut Emitter, value: u8) {
    for (reg, value) in [(EAX, value), (ECX, 0), (EDX, 0)] {
        e.op_parts(&[&[0xb8 | reg], &u32::from(value).to_le_bytes()]); // mov reg, imm32
    }
    e.wrpkru();
}

/// The beginning of [`enter_kernel`]: EAX, ECX, ESP and the flags are saved, and ring 3's flags are in `SCRATCH_IMAGE`.
fn save_all(e: &mut Emitter) {
    e.save(EAX);
    e.save(ESP);
    e.point_esp_at(page::SCRATCH_IMAGE + 4);
    e.op(&[0x9c]); // pushfd: into SCRATCH_IMAGE
    e.save(ECX);
    e.save_flags();
}

/// The same in a keyed world, where the vCPU page is out of reach until PKRU is loaded. What is in the transit page then is
/// whatever ring 3 wants, and so are its registers and segments, if it has jumped to where PKRU is loaded: up to there nothing
/// is done that it could not do, and behind it nothing is done by a segment or a register of its own before its code segment is
/// known to be the one this code is written for.
fn come_by_transit(e: &mut Emitter, keys: Keys) {
    let slot = |reg: u8| page::TRANSIT_REGISTERS + 4 * u32::from(reg);
    e.state.transit = true;
    for reg in [EAX, ECX, EDX, ESP] {
        e.store(slot(reg), reg);
        e.state.restore.insert(reg);
    }
    e.op(&[0x9f]); // lahf
    e.op(&[0x0f, 0x90, 0xc0]); // seto al
    e.store(page::TRANSIT_FLAGS, EAX);
    e.state.restore_flags = true;
    e.point_esp_at(page::TRANSIT_IMAGE + 4);
    e.op(&[0x9c]); // pushfd: into TRANSIT_IMAGE
    load_pkru(e, Keys::RING0);
    // As 64-bit code this means the same, and CS is another one then. As 16-bit code the comparison takes the branch behind it
    // for its operand, and the hlt is next.
    e.op(&[0x8c, 0xc8]); // mov eax, cs
    e.op_parts(&[&[0x66, 0x3d], &keys.code.to_le_bytes()]); // cmp ax, imm16
    e.op(&[0x74, 0x01]); // je over the hlt
    e.op(&[0xf4]);
    e.op(&[0x8c, 0xd1]); // mov ecx, ss
    e.op_parts(&[&[0xb8 | EAX], &u32::from(keys.data).to_le_bytes()]); // mov eax, imm32
    e.op(&[0x8e, 0xd0]); // mov ss, eax
    e.store(page::SCRATCH_SS, ECX);
    for reg in [EAX, ECX, ESP] {
        e.load(EAX, slot(reg));
        e.store(page::SCRATCH + 4 * u32::from(reg), EAX);
    }
    e.load(EAX, page::TRANSIT_FLAGS);
    e.store(page::SCRATCH_FLAGS, EAX);
    e.load(EAX, page::TRANSIT_IMAGE);
    e.op_parts(&[&[0x25], &(NATIVE | USER_ONLY).to_le_bytes()]); // and eax, imm32
    e.op_parts(&[&[0x0d], &(FIXED | IF).to_le_bytes()]); // or eax, imm32
    e.store(page::SCRATCH_IMAGE, EAX);
    e.load(EDX, slot(EDX));
    e.state.restore.remove(EDX);
    e.state.transit = false;
}

/// `int n` from ring 3 to ring 0 through an interrupt or trap gate, SDM Vol. 2A, "INT n", label
/// INTER-PRIVILEGE-LEVEL-INTERRUPT. `begin` has been called. Ends the trampoline.
///
/// A debugger sees nothing of it: with TF set it is the monitor's.
pub(crate) fn enter_kernel(e: &mut Emitter, insn: &Insn, vector: u8, reason: u32, config: &Config) {
    match config.keys {
        Some(keys) => come_by_transit(e, keys),
        None => save_all(e),
    }
    let slow = e.slow_path(reason);
    e.cmp_imm(page::GATE_READY, 1);
    e.jcc(Cond::NotEqual, slow);
    e.cmp_imm(page::GATE_VECTOR, u32::from(vector));
    e.jcc(Cond::NotEqual, slow);
    e.load(EAX, page::SCRATCH_IMAGE);
    e.op_parts(&[&[0xa9], &USER_ONLY.to_le_bytes()]); // test eax, imm32
    e.jcc(Cond::NotEqual, slow);
    for s in DATA_SEGMENTS {
        e.op(&[0x8c, 0xc0 | s << 3]); // mov eax, sreg
        e.page_op(&[0x3b], EAX, page::HOST_RING3 + 4 * u32::from(s));
        e.jcc(Cond::NotEqual, slow);
        if config.keys.is_some() && s >= FS {
            // 64-bit code of ring 3 can change the base behind a selector.
            e.op(&[0x85, 0xc0]); // test eax, eax
            let null = e.label();
            e.short_branch(&[0x74], null); // je
            e.op(&[0x8e, 0xc0 | s << 3]); // mov sreg, eax
            e.bind(null);
        }
    }
    match config.keys {
        Some(_) => e.load(EAX, page::SCRATCH_SS),
        None => e.op(&[0x8c, 0xd0]), // mov eax, ss
    }
    e.page_op(&[0x3b], EAX, page::USER_SS_HOST + 4);
    e.jcc(Cond::NotEqual, slow);
    e.load(EAX, page::KERNEL_SS_HOST + 4);
    e.op(&[0x8e, 0xd0]); // mov ss, eax: the tables and the stack lie behind ring 3's limit
    let slow = match config.keys {
        // Whatever ring 3 had there must not be used any more: the monitor knows it from SCRATCH_SS.
        Some(_) => e.slow_path(reason),
        None => e.slow_path_to_user_stack(reason),
    };
    check_descriptor(e, page::GATE_AT, page::GATE_LOW, slow);
    e.load(EAX, page::GATE_CS);
    e.page_op(&[0x3b], EAX, page::IRET_CS);
    e.jcc(Cond::NotEqual, slow);
    check_descriptor(e, page::IRET_DESC_AT, page::IRET_DESC_LOW, slow);
    check_descriptor(e, page::KERNEL_SS_DESC_AT, page::KERNEL_SS_DESC_LOW, slow);
    e.load(ECX, page::TSS_ESP0_AT);
    supervisor(e, &[0x36, 0x0f, 0xb7, 0x41, 0x04]); // movzx eax, word ss:[ecx + 4]: SS0
    e.page_op(&[0x3b], EAX, page::KERNEL_SS);
    e.jcc(Cond::NotEqual, slow);
    supervisor(e, &[0x36, 0x8b, 0x09]); // mov ecx, ss:[ecx]: ESP0
    let push = |e: &mut Emitter, below: u8| {
        supervisor(e, &[0x36, 0x89, 0x41, below.wrapping_neg()]); // mov ss:[ecx - below], eax
    };
    e.load(EAX, page::SELECTORS + 4 * SS);
    push(e, 4);
    e.load(EAX, page::SCRATCH + 4 * u32::from(ESP));
    push(e, 8);
    // The hardware's image has IF = 1, as ring 3 of raw mode always has, and IOPL 0.
    e.load(EAX, page::HIDDEN_FLAGS);
    e.op_parts(&[&[0x25], &IOPL.to_le_bytes()]); // and eax, imm32
    e.page_op(&[0x0b], EAX, page::SCRATCH_IMAGE); // or eax, image
    push(e, 12);
    e.load(EAX, page::SELECTORS + 4 * CS);
    push(e, 16);
    e.op_parts(&[&[0xb8 | EAX], &insn.next().to_le_bytes()]); // mov eax, imm32
    push(e, FRAME);
    e.op(&[0x8d, 0x41, FRAME.wrapping_neg()]); // lea eax, [ecx - 20]
    e.store(page::KERNEL_SS_HOST, EAX);
    e.commit(0);
    e.state.to_target = true;
    e.state.finish = Finish::EnterKernel;
    e.state.cpl = Some(0);
    e.state.restore.remove(ESP);
    e.load(EAX, page::KERNEL_SS);
    e.store(page::SELECTORS + 4 * SS, EAX);
    e.load(EAX, page::GATE_CS);
    e.store(page::SELECTORS + 4 * CS, EAX);
    e.load(EAX, page::GATE_IF_MASK);
    e.page_op(&[0x21], EAX, page::IF_FLAG); // and if, eax
    e.page_imm(4, page::HIDDEN_FLAGS, IOPL); // and hidden, IOPL: the others were ring 3's own, and clear
    e.store_imm(page::CPL, 0);
    for s in DATA_SEGMENTS {
        let word = 4 * u32::from(s);
        let done = e.label();
        e.load(EAX, page::HOST_RING0 + word);
        e.page_op(&[0x3b], EAX, page::HOST_RING3 + word);
        e.short_branch(&[0x74], done); // je
        e.op(&[0x8e, 0xc0 | s << 3]); // mov sreg, eax
        e.bind(done);
    }
    if config.count_inline {
        e.count(counter(Kind::Int));
    }
    e.restore_flags();
    e.restore(ECX);
    e.restore(EAX);
    e.load(ESP, page::KERNEL_SS_HOST);
    e.page_op(&[0xff], 5, page::KERNEL_CS_HOST); // jmp far [handler]
}
