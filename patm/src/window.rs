//! Windows: which instructions a jump over a site may cover.

use crate::CodeInfo;
use crate::displace::can_displace;
use crate::insn::Insn;
use crate::manager::Thread;
use crate::patch::Refusal;
use alloc::vec::Vec;
use csam::{Class, GuestLin};
use iced_x86::Code;

/// How many instructions before a site a window may start.
const MAX_BACK: usize = 6;
/// How many bytes a window grows over to reach a site that has no room for a jump of its own.
const MAX_GAP: u32 = 8;
/// No window is longer, in bytes.
pub(crate) const MAX_LEN: u32 = 32;

/// Instructions to be done by a trampoline, back to back.
pub(crate) struct Window {
    pub(crate) insns: Vec<Insn>,
    /// Bytes of filler behind the last instruction that the jump also covers; 0 unless the flow ends there.
    pub(crate) filler: u32,
    /// A branch inside goes to an instruction inside other than the first.
    pub(crate) inner_target: bool,
    /// The site to which the `jmp` goes that is the last instruction: it has no room for a jump of its own, so it is done
    /// here, too.
    pub(crate) tail: Option<Insn>,
    /// A site elsewhere to which a branch of the window leads, done here as well.
    pub(crate) thread: Option<Thread>,
    /// The instruction at this EIP, the copy of [`crate::Patm::hasten`], is done in another way.
    pub(crate) hastened: Option<u32>,
}

/// Sites inside a window that branches from outside may go to nevertheless: those that would be trapping bytes
/// otherwise. Such a branch still meets a trapping byte; who falls through to the site no longer does.
pub(crate) type Tolerated<'a> = &'a [u32];

impl Window {
    pub(crate) fn start(&self) -> u32 {
        self.insns.first().map_or(0, |i| i.at)
    }

    pub(crate) fn len(&self) -> u32 {
        self.insns.iter().map(Insn::len).sum::<u32>() + self.filler
    }

    /// Offsets, 1.., at which an instruction starts.
    pub(crate) fn inner_starts(&self) -> impl Iterator<Item = u32> {
        self.insns.iter().skip(1).map(|i| i.at - self.start())
    }
}

/// The instruction right in front of `at` from which execution falls through to it.
pub(crate) fn before(info: &dyn CodeInfo, at: u32) -> Option<Insn> {
    (1..=15).find_map(|d| {
        let insn = Insn::decode(info, at.checked_sub(d)?)?;
        (insn.len() == d && insn.falls_through()).then_some(insn)
    })
}

/// Where a window covering the site at `site` may start: at the site, else at each instruction before it from which
/// execution only falls through to it.
pub(crate) fn starts(info: &dyn CodeInfo, site: u32) -> Vec<u32> {
    let mut starts = Vec::from([site]);
    let mut at = site;
    for _ in 0..MAX_BACK {
        match before(info, at) {
            Some(insn) if site - insn.at < MAX_LEN - 15 => at = insn.at,
            _ => break,
        }
        starts.push(at);
    }
    starts
}

/// The window of [`window`], grown over the sites behind it that it leaves no room for a jump of their own: the `iret`
/// of `pushf; push cs; push imm32; iret`, whose first seven bytes make a window.
pub(crate) fn grown_window(
    info: &dyn CodeInfo,
    start: u32,
    site: u32,
    min_len: u32,
) -> Result<Window, Refusal> {
    let mut window = window(info, start, site, min_len, &[])?;
    let mut tolerated = Vec::new();
    while let Some(next) = crowded_site(info, &window) {
        tolerated.push(next);
        match self::window(info, start, next, min_len, &tolerated) {
            Ok(longer) => window = longer,
            Err(_) => break,
        }
    }
    if let Some((jump, site)) = jump_to_crowded_site(info, &window)
        && let Ok(longer) = self::window(info, start, jump.at, min_len, &tolerated)
    {
        window = Window { tail: Some(site), ..longer };
    }
    Ok(window)
}

/// The `jmp` that ends `window` or follows it shortly, with the site it goes to, if that can have no window at all from
/// where the jump goes: the `iret` that Linux's return to ring 0 shares with that to ring 3.
fn jump_to_crowded_site(info: &dyn CodeInfo, window: &Window) -> Option<(Insn, Insn)> {
    let mut last = *window.insns.last()?;
    let end = last.next();
    if window.filler > 0 {
        return None;
    }
    while last.falls_through() && last.next() - end <= MAX_GAP && !info.is_target(GuestLin(last.next())) {
        last = Insn::decode(info, last.next())?;
    }
    if !matches!(last.instr.code(), Code::Jmp_rel8_32 | Code::Jmp_rel32_32) {
        return None;
    }
    let site = Insn::decode(info, last.instr.near_branch32())?;
    let elsewhere = site.at < window.start() || site.at >= last.next();
    let crowded = matches!(site.class(), Class::Sensitive(_)) && is_crowded(info, &site, 0);
    (elsewhere && crowded).then_some((last, site))
}

/// The window of a jump from `start` up to the site at `site`, which branches from outside go to.
pub(crate) fn window_to_target(info: &dyn CodeInfo, start: u32, site: u32) -> Result<Window, Refusal> {
    window(info, start, site, 5, &[site])
}

/// The site shortly behind `window` that can have no window which starts there or later.
fn crowded_site(info: &dyn CodeInfo, window: &Window) -> Option<u32> {
    if window.filler > 0 {
        return None;
    }
    let mut last = *window.insns.last()?;
    let end = last.next();
    while last.falls_through() && last.next() - end <= MAX_GAP {
        let insn = Insn::decode(info, last.next())?;
        if matches!(insn.class(), Class::Sensitive(_)) {
            return is_crowded(info, &insn, end).then_some(insn.at);
        }
        if info.is_target(GuestLin(insn.at)) {
            return None;
        }
        last = insn;
    }
    None
}

/// Can the site `insn` have no window that starts at `end` or later?
fn is_crowded(info: &dyn CodeInfo, insn: &Insn, end: u32) -> bool {
    let alone = |&s: &u32| s >= end && self::window(info, s, insn.at, 5, &[]).is_ok();
    // Who branches to it is served by a short jump there, if by anything.
    let short = || info.is_target(GuestLin(insn.at)) && self::window(info, insn.at, insn.at, 2, &[]).is_ok();
    !starts(info, insn.at).iter().any(alone) && !short()
}

/// The shortest window from `start` with at least `min_len` bytes that holds the instruction at `site`.
pub(crate) fn window(
    info: &dyn CodeInfo,
    start: u32,
    site: u32,
    min_len: u32,
    tolerated: Tolerated,
) -> Result<Window, Refusal> {
    let mut insns: Vec<Insn> = Vec::new();
    let mut at = start;
    let mut filler = 0;
    while at.wrapping_sub(start) < min_len || at <= site {
        if insns.last().is_some_and(|i| !i.falls_through()) {
            filler = min_len - at.wrapping_sub(start).min(min_len);
            if at > site && info.padding(GuestLin(at), filler).is_some() {
                at = at.checked_add(filler).ok_or(Refusal::NotCode)?;
                break;
            }
            return Err(Refusal::EndOfFlow);
        }
        let insn = Insn::decode(info, at).ok_or(Refusal::NotCode)?;
        if !matches!(insn.class(), Class::Sensitive(_)) && !can_displace(&insn) {
            return Err(Refusal::NotDisplaceable);
        }
        if insns.last().is_some_and(|i| i.instr.code() == Code::Hlt) {
            // The interrupt that ends it returns right behind it: that is no place for the inside of a window.
            return Err(Refusal::BranchTarget);
        }
        at = insn.next();
        insns.push(insn);
        if at.wrapping_sub(start) > MAX_LEN {
            return Err(Refusal::NotDisplaceable);
        }
    }
    let (lo, hi) = (GuestLin(start), GuestLin(at));
    if !info.writable_window(lo, at - start) {
        return Err(Refusal::NotWritable);
    }
    // An instruction that begins before the window and ends in it would read the jump as its own bytes.
    let reaches_in = |back: u32| {
        let before = start.checked_sub(back).filter(|before| info.is_start(GuestLin(*before)));
        before.and_then(|before| Insn::decode(info, before)).is_some_and(|insn| insn.len() > back)
    };
    if (1..15).any(reaches_in) {
        return Err(Refusal::BranchTarget); // overlapping code
    }
    let mut inner_target = false;
    for eip in start + 1..at {
        let here = GuestLin(eip);
        if insns.iter().any(|i| i.at == eip) {
            if info.is_target(here) {
                if !info.targeted_from_outside(here, lo, hi) {
                    inner_target = true;
                } else if !tolerated.contains(&eip) {
                    return Err(Refusal::BranchTarget);
                }
            }
        } else if info.is_target(here) || info.is_start(here) {
            return Err(Refusal::BranchTarget); // overlapping code
        }
    }
    Ok(Window { insns, filler, inner_target, tail: None, thread: None, hastened: None })
}
