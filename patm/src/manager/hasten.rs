//! Short copies: `rep movsd` of a few words, which processors with fast string operations begin slowly.
//!
//! Where its source has just been written by narrow stores it waits for them to reach the cache: 150 ns for the 17 words that
//! Linux's entry code moves from one stack to another, twice in a system call. One `movsd` after the other, each of which takes its
//! word from the stores before it, needs 35 ns.

use super::Patm;
use crate::CodeInfo;
use crate::displace::can_displace;
use crate::emit::Emitter;
use crate::insn::Insn;
use crate::patch::Patch;
use crate::window::{before, starts, window};
use csam::GuestLin;
use iced_x86::{Code, OpKind, Register};

/// So many words are copied one by one; what is left then is copied as before. Linux's `struct pt_regs` has 17.
const WORDS: u32 = 18;
/// So many bytes, at most, that the count may say.
const FEW: u32 = 4 * WORDS;
/// How many instructions before the copy its count may be set.
const MAX_BACK: usize = 10;

impl Patm {
    /// Plans a patch that makes the `rep movsd` at `site` faster. None if that is no short copy, or a jump has no room; the instruction
    /// is as good as before then. What it may cover must not be wanted for a sensitive instruction: undo it then.
    pub fn hasten(&mut self, site: GuestLin, info: &dyn CodeInfo) -> Option<&Patch> {
        let insn = Insn::decode(info, site.0).filter(|insn| is_short_copy(info, insn))?;
        let placed = starts(info, insn.at).into_iter().find_map(|start| {
            let mut window = window(info, start, insn.at, 5, &[]).ok()?;
            let plain = window.insns.iter().all(can_displace) && self.is_free(start, window.len());
            window.hastened = Some(insn.at);
            if plain { self.try_jump(info, window, insn.at).ok() } else { None }
        })?;
        let id = self.enter(placed, None);
        self.get(id)
    }
}

/// A `rep movsd` from DS whose count is a small constant: set shortly before, on the only way there that falls through.
fn is_short_copy(info: &dyn CodeInfo, insn: &Insn) -> bool {
    if insn.bytes() != [0xf3, 0xa5] {
        return false;
    }
    let mut at = insn.at;
    for _ in 0..MAX_BACK {
        let Some(before) = before(info, at) else { return false };
        let i = &before.instr;
        let sets = i.op0_kind() == OpKind::Register && i.op0_register().full_register32() == Register::ECX;
        match i.code() {
            Code::Mov_r32_imm32 if sets => return i.immediate32() <= FEW,
            // Bytes to words.
            Code::Shr_rm32_imm8 if sets => {}
            _ if sets => return false,
            _ => {}
        }
        at = before.at;
    }
    false
}

/// Emits the copy. Between two words it is as far as ECX, ESI and EDI say, as the processor's own is.
pub(crate) fn emit(e: &mut Emitter, insn: &Insn) {
    let done = e.label();
    for i in 0..WORDS {
        if i != 0 {
            e.state.over_at_zero = Some(insn.next());
        }
        e.short_branch(&[0xe3], done); // jecxz
        e.op(&[0x8d, 0x49, 0xff]); // lea ecx, [ecx - 1]
        e.state.over_at_zero = None;
        e.state.count_add = 1;
        e.op(&[0xa5]); // movsd
        e.state.count_add = 0;
    }
    e.state.over_at_zero = Some(insn.next());
    e.op(insn.bytes());
    e.bind(done);
    e.state = e.at(insn.next());
}
