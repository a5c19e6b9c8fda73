//! Instructions about segments: what a trampoline can say from the vCPU page, and loads the segment cache allows.
//!
//! A load of SS is done only to a flat, big, writable segment of DPL 0. The one before was flat as well, since ring 0
//! runs in raw mode only so: ESP means the same with both. The interrupt shadow behind `mov ss` and `pop ss` (SDM Vol.
//! 3A, 6.8.3) is kept by who delivers interrupts: [`crate::Patm::is_after_sti`] tells where it is.

use crate::emit::{Cond, EAX, ECX, EDX, Emitter, Label};
use crate::inline::Context;
use crate::insn::Insn;
use crate::map::{Finish, SS};
use crate::vcpu_page as page;
use crate::{ReasonKind, reason_word};
use iced_x86::{OpKind, Register};

/// The number of a segment register in encoding order (ES, CS, SS, DS, FS, GS).
pub(crate) fn number(register: Register) -> Option<u8> {
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

/// Where an instruction has the selector it is about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// On the stack, to be popped.
    Stack,
    /// In this operand.
    Operand(u32),
    /// Behind the 32-bit offset in its memory operand.
    FarPointer,
}

/// Prefix bytes that address a memory operand, CS turned into SS: CS shows the code view.
pub(crate) fn address_prefixes(insn: &Insn, out: &mut [u8; 4]) -> Option<usize> {
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

/// ModRM and what follows it.
fn modrm(insn: &Insn) -> Option<(u8, &[u8])> {
    let skip = if insn.opcode().first() == Some(&0x0f) { 2 } else { 1 };
    let (&modrm, tail) = insn.opcode().get(skip..)?.split_first()?;
    Some((modrm, tail))
}

/// `opcode reg, m` with the memory operand of `insn` and these prefixes first.
pub(crate) fn memory_op(e: &mut Emitter, insn: &Insn, prefix: &[u8], opcode: &[u8], reg: u8) -> Option<()> {
    let mut prefixes = [0; 4];
    let n = address_prefixes(insn, &mut prefixes)?;
    let (modrm, tail) = modrm(insn)?;
    e.op_parts(&[prefix, prefixes.get(..n)?, opcode, &[(modrm & !0x38) | reg << 3], tail]);
    Some(())
}

/// The prefix that makes `[eax]` go through the segment of the memory operand. CS becomes SS.
fn override_of(insn: &Insn) -> u8 {
    match insn.instr.memory_segment() {
        Register::ES => 0x26,
        Register::DS => 0x3e,
        Register::FS => 0x64,
        Register::GS => 0x65,
        _ => 0x36,
    }
}

/// A write through CS faults.
fn writes_through_cs(insn: &Insn) -> bool {
    insn.instr.memory_segment() == Register::CS
}

/// `mov r/m, sreg`, `sldt`, `str`, `smsw`: a register gets the word of the vCPU page at `from`, memory its low half.
pub(crate) fn store_word(e: &mut Emitter, insn: &Insn, from: u32) -> bool {
    let i = &insn.instr;
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
    if writes_through_cs(insn) || address_prefixes(insn, &mut prefixes).is_none() {
        return false;
    }
    let reg = free_register(insn);
    e.save(reg);
    e.load(reg, from);
    if memory_op(e, insn, &[0x66], &[0x89], reg).is_none() {
        return false;
    }
    e.commit(insn.next());
    e.restore(reg);
    true
}

/// `sgdt` and `sidt`: 16 bits of limit, 32 bits of base.
pub(crate) fn store_table(e: &mut Emitter, insn: &Insn, base: u32, limit: u32) -> bool {
    let mut prefixes = [0; 4];
    if writes_through_cs(insn) || address_prefixes(insn, &mut prefixes).is_none() {
        return false;
    }
    let through = override_of(insn);
    e.save(EAX);
    e.save(ECX);
    if memory_op(e, insn, &[], &[0x8d], EAX).is_none() {
        return false; // lea eax, m
    }
    // Whatever faults, the instruction is done again as a whole.
    e.load(ECX, limit);
    e.op(&[through, 0x66, 0x89, 0x08]); // mov [eax], cx
    e.load(ECX, base);
    e.op(&[through, 0x89, 0x48, 0x02]); // mov [eax + 2], ecx
    e.commit(insn.next());
    e.restore(ECX);
    e.restore(EAX);
    true
}

/// `mov sreg, r/m16`, `pop sreg` and `lds`, `les`, `lss`, `lfs`, `lgs`: loads what the monitor cached, if the guest's
/// descriptor is still the cached one.
pub(crate) fn load(e: &mut Emitter, insn: &Insn, dest: Register, kept: Kept, cx: &Context) -> bool {
    let Some(s) = number(dest).filter(|s| *s != 1) else { return false };
    let stack = u32::from(s) == SS;
    let register = insn.instr.op0_register();
    let far = (kept == Kept::FarPointer).then(|| register.number() as u8);
    if register == Register::ESP && !stack {
        return false;
    }
    let Some(slow) = fetch_selector(e, insn, kept, cx) else { return false };
    if stack {
        e.op(&[0x83, 0xf9, 0x03]); // cmp ecx, 3: null
        e.jcc(Cond::BelowOrEqual, slow);
        check_cached(e, slow);
        check_flat_stack(e, slow);
        e.cache_op(&[0x0f, 0xb7], EAX, 14); // movzx eax, word
        e.cache_op(&[0x8b], ECX, 8);
    } else {
        let load = e.label();
        // ECX is now the host selector to load if the guest's is null (0..=3), EAX the one for ring 3.
        e.op(&[0x31, 0xc0]); // xor eax, eax
        e.op(&[0x83, 0xf9, 0x03]); // cmp ecx, 3
        e.jcc(Cond::BelowOrEqual, load);
        check_cached(e, slow);
        e.cache_op(&[0x0f, 0xb7], EAX, 14); // movzx eax, word
        e.cache_op(&[0x8b], ECX, 8);
        e.bind(load);
    }
    e.op(&[0x8e, 0xc0 | s << 3 | ECX]); // mov sreg, cx
    e.commit(insn.next());
    e.state.finish = match far {
        Some(register) => Finish::StoreFar { segment: s, register },
        None => Finish::StoreSelector(s),
    };
    if kept == Kept::Stack {
        e.state.esp_add = 4;
    }
    // The monitor writes these two anew at every entry, so a stop before they are done needs no Finish.
    e.store(page::HOST_RING0 + 4 * u32::from(s), ECX);
    e.store(page::HOST_RING3 + 4 * u32::from(s), EAX);
    e.load(ECX, page::SCRATCH_VALUE);
    e.store(page::SELECTORS + 4 * u32::from(s), ECX);
    e.state.finish = far.map_or(Finish::Nothing, Finish::StoreRegister);
    e.restore_flags();
    e.restore(ECX);
    e.restore(EAX);
    if let Some(register) = far {
        e.load(register, page::SCRATCH_FAR);
        e.state.finish = Finish::Nothing;
    }
    if kept == Kept::Stack {
        e.op(&[0x8d, 0x64, 0x24, 0x04]); // lea esp, [esp + 4]
        e.state.esp_add = 0;
    }
    true
}

/// Goes to `slow` unless the cached entry at ECX is a flat, big, writable data segment of DPL 0 (whatever its A and AVL
/// bits) and the selector has RPL 0. Clobbers EAX and the flags.
fn check_flat_stack(e: &mut Emitter, slow: Label) {
    e.test_page_byte(page::SCRATCH_VALUE, 3);
    e.jcc(Cond::NotEqual, slow);
    e.cache_op(&[0x8b], EAX, 4);
    e.op_parts(&[&[0x25], &0xffef_feff_u32.to_le_bytes()]); // and eax, all but AVL and A
    e.op_parts(&[&[0x3d], &0x00cf_9200_u32.to_le_bytes()]); // cmp eax, imm32
    e.jcc(Cond::NotEqual, slow);
    e.cache_op(&[0x8b], EAX, 0);
    e.op_parts(&[&[0x3d], &0x0000_ffff_u32.to_le_bytes()]); // cmp eax, imm32
    e.jcc(Cond::NotEqual, slow);
}

/// Fetches the selector of operand `op`, which the cache must know and which is not null: the high half of its
/// descriptor is then in EAX, and ECX is its index in the cache.
fn look_up(e: &mut Emitter, insn: &Insn, op: u32, cx: &Context) -> Option<Label> {
    let slow = fetch_selector(e, insn, Kept::Operand(op), cx)?;
    e.op(&[0x83, 0xf9, 0x03]); // cmp ecx, 3
    e.jcc(Cond::BelowOrEqual, slow);
    check_cached(e, slow);
    e.cache_op(&[0x8b], EAX, 4);
    Some(slow)
}

/// Gives the flags back with ZF set; the instruction is committed with the last of it.
fn restore_flags_with_zf(e: &mut Emitter) {
    e.load(EAX, page::SCRATCH_FLAGS);
    e.op(&[0x80, 0xcc, 0x40]); // or ah, 40h: ZF
    e.op(&[0x04, 0x7f]); // add al, 7fh: OF from bit 0
    e.op(&[0x9e]); // sahf
    e.state.restore_flags = false;
}

/// `verw` and `verr` of a selector the cache knows to be writable or any data: ZF := 1. SDM Vol. 2C, "VERR/VERW".
pub(crate) fn verify(e: &mut Emitter, insn: &Insn, write: bool, cx: &Context) -> bool {
    let Some(slow) = look_up(e, insn, 0, cx) else { return false };
    let writable = if write { 0x200_u32 } else { 0 };
    e.op_parts(&[&[0x25], &(0x1800 | writable).to_le_bytes()]); // and eax, S | code | writable
    e.op_parts(&[&[0x3d], &(0x1000 | writable).to_le_bytes()]); // cmp eax, S | writable
    e.jcc(Cond::NotEqual, slow);
    e.restore(ECX);
    restore_flags_with_zf(e);
    e.commit(insn.next());
    e.restore(EAX);
    true
}

/// `lar` of a selector the cache knows. SDM Vol. 2A, "LAR".
pub(crate) fn access_rights(e: &mut Emitter, insn: &Insn, cx: &Context) -> bool {
    if insn.instr.op0_register() == Register::ESP || look_up(e, insn, 1, cx).is_none() {
        return false;
    }
    e.op_parts(&[&[0x25], &0x00ff_ff00_u32.to_le_bytes()]); // and eax, imm32
    give(e, insn);
    true
}

/// `lsl` of a selector the cache knows: its limit in bytes. SDM Vol. 2A, "LSL".
pub(crate) fn limit(e: &mut Emitter, insn: &Insn, cx: &Context) -> bool {
    if insn.instr.op0_register() == Register::ESP || look_up(e, insn, 1, cx).is_none() {
        return false;
    }
    let bytes = e.label();
    e.cache_op(&[0x0f, 0xb7], ECX, 0); // movzx ecx, word: limit 15..0
    e.store(page::SCRATCH_FAR, EAX);
    e.op_parts(&[&[0x25], &0x000f_0000_u32.to_le_bytes()]); // and eax, limit 19..16
    e.op(&[0x09, 0xc8]); // or eax, ecx
    e.test_page_byte(page::SCRATCH_FAR + 2, 0x80); // G
    e.short_branch(&[0x74], bytes); // je
    e.op(&[0xc1, 0xe0, 0x0c]); // shl eax, 12
    e.op_parts(&[&[0x0d], &0xfff_u32.to_le_bytes()]); // or eax, fffh
    e.bind(bytes);
    give(e, insn);
    true
}

/// EAX becomes the destination register's value and ZF 1.
fn give(e: &mut Emitter, insn: &Insn) {
    let register = insn.instr.op0_register().number() as u8;
    e.store(page::SCRATCH_FAR, EAX);
    e.restore(ECX);
    restore_flags_with_zf(e);
    e.commit(insn.next());
    e.state.finish = Finish::StoreRegister(register);
    e.restore(EAX);
    e.load(register, page::SCRATCH_FAR);
    e.state.finish = Finish::Nothing;
}

/// Reads the selector into ECX and `SCRATCH_VALUE`, the offset of a far pointer into `SCRATCH_FAR`; EAX, ECX and the
/// flags are then free. Returns the way out.
fn fetch_selector(e: &mut Emitter, insn: &Insn, kept: Kept, cx: &Context) -> Option<Label> {
    let i = &insn.instr;
    let mut prefixes = [0; 4];
    address_prefixes(insn, &mut prefixes)?;
    e.save(EAX);
    e.save(ECX);
    match kept {
        Kept::Stack => e.op(&[0x0f, 0xb7, 0x0c, 0x24]), // movzx ecx, word [esp]
        Kept::Operand(op) if i.op_kind(op) == OpKind::Register => {
            e.op(&[0x0f, 0xb7, 0xc0 | ECX << 3 | (i.op_register(op).number() as u8 & 7)]); // movzx ecx, r16
        }
        Kept::Operand(_) => memory_op(e, insn, &[], &[0x0f, 0xb7], ECX)?, // movzx ecx, word m
        Kept::FarPointer => fetch_far_pointer(e, insn)?,
    }
    e.store(page::SCRATCH_VALUE, ECX);
    e.save_flags();
    Some(e.slow_path(reason_word(cx.site_id, ReasonKind::Emulate)))
}

/// Reads the far pointer in memory: selector into ECX, offset into `SCRATCH_FAR`. EAX and ECX have been saved.
pub(crate) fn fetch_far_pointer(e: &mut Emitter, insn: &Insn) -> Option<()> {
    let through = override_of(insn);
    memory_op(e, insn, &[], &[0x8d], EAX)?; // lea eax, m
    // The offset first, which tells of a missing page as the interpreter does.
    e.op(&[through, 0x8b, 0x08]); // mov ecx, [eax]
    e.store(page::SCRATCH_FAR, ECX);
    e.op(&[through, 0x0f, 0xb7, 0x48, 0x04]); // movzx ecx, word [eax + 4]
    Some(())
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
