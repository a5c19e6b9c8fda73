//! Sites that keep trapping: a better patch, once it is known that one pays.
//!
//! A trap byte is what a site gets when no jump is without risk. When the site proves to be hot:
//! 1. a jump others may branch into is tried: their branch meets a trapping byte in it, which is as slow as the trap byte
//!    was, but it is they who pay now (`cli; mov; mov` where an error path branches to the first `mov`);
//! 2. a branch that leads to the site is patched where it stands: it does the site's work and never gets there
//!    (`test; je 1f; ..; 1: jmp 2f; ..; 2: iret`).

use super::{Patm, Placed, Tactic};
use crate::CodeInfo;
use crate::insn::Insn;
use crate::patch::{PatchId, Refusal};
use crate::window::{MAX_LEN, Window, starts, window};
use alloc::vec::Vec;
use csam::{Class, GuestLin};
use iced_x86::Code;

/// How many unconditional jumps may lie between a branch and the site.
const MAX_VIA: usize = 3;
/// How many sites in a row a branch does.
const MAX_SITES: usize = 3;
/// How many branches to one site are patched.
const MAX_BRANCHES: usize = 4;

/// A site done by a branch that leads to it.
pub(crate) struct Thread {
    /// The unconditional jumps between the branch and the site, in the order they would be executed.
    pub(crate) via: Vec<Insn>,
    /// The site, and the ones right behind it that have a trap byte as well (`sti; hlt`).
    pub(crate) sites: Vec<Insn>,
}

impl Patm {
    /// Makes the best of a site with a trap byte that is often executed. Returns the patches made; the site's trap byte is
    /// gone if one of them holds it, else it stays for whoever still comes to it. Nothing if there is nothing better.
    pub fn improve(&mut self, site: GuestLin, info: &dyn CodeInfo) -> Vec<PatchId> {
        let Some(old) = self.patch_at(site.0).filter(|p| p.tactic == Tactic::TrapByte) else {
            return Vec::new();
        };
        let (old, why) = (old.id, old.why.unwrap_or(Refusal::NoPlace));
        let Some(insn) = Insn::decode(info, site.0) else { return Vec::new() };
        let Class::Sensitive(kind) = insn.class() else { return Vec::new() };
        self.undo(old);
        if let Some(placed) = self.risky_jump(info, &insn) {
            return Vec::from([self.enter(placed, None)]);
        }
        self.enter_trap_byte(&insn, kind, why);
        self.thread_branches(info, &insn)
    }

    /// A jump over the site with branches into it, as few as possible and none to the site.
    fn risky_jump(&mut self, info: &dyn CodeInfo, site: &Insn) -> Option<Placed> {
        let mut best: Option<(usize, Window)> = None;
        for start in starts(info, site.at) {
            let any: Vec<u32> = (start..start.saturating_add(MAX_LEN)).collect();
            let Ok(window) = window(info, start, site.at, 5, &any) else { continue };
            let hi = start.wrapping_add(window.len());
            let outside =
                |at: u32| info.sources(GuestLin(at)).iter().filter(|s| s.0 < start || s.0 >= hi).count();
            if start != site.at && outside(site.at) > 0 {
                continue;
            }
            let risk = window.insns.iter().skip(1).map(|i| outside(i.at)).sum();
            if best.as_ref().is_none_or(|(least, _)| risk < *least) {
                best = Some((risk, window));
            }
        }
        let (_, window) = best?;
        let start = window.start();
        if !self.is_free(start, window.len()) {
            return None;
        }
        self.try_jump(info, window, site.at).ok()
    }

    /// Patches branches that lead to the site, so that they do it themselves.
    fn thread_branches(&mut self, info: &dyn CodeInfo, site: &Insn) -> Vec<PatchId> {
        let mut made = Vec::new();
        let mut paths: Vec<Vec<Insn>> = Vec::from([Vec::new()]);
        while let Some(via) = paths.pop() {
            let target = via.first().map_or(site.at, |jump: &Insn| jump.at);
            for source in info.sources(GuestLin(target)) {
                if made.len() >= MAX_BRANCHES {
                    return made;
                }
                let Some(branch) = Insn::decode(info, source.0) else { continue };
                match self.thread(info, &branch, &via, site) {
                    Some(id) => made.push(id),
                    None if matches!(branch.instr.code(), Code::Jmp_rel8_32 | Code::Jmp_rel32_32)
                        && via.len() < MAX_VIA
                        && via.iter().all(|v| v.at != branch.at) =>
                    {
                        let mut longer = Vec::from([branch]);
                        longer.extend_from_slice(&via);
                        paths.push(longer);
                    }
                    None => {}
                }
            }
        }
        made
    }

    fn thread(&mut self, info: &dyn CodeInfo, branch: &Insn, via: &[Insn], site: &Insn) -> Option<PatchId> {
        for start in starts(info, branch.at) {
            let Ok(mut window) = window(info, start, branch.at, 5, &[]) else { continue };
            let lo = window.start();
            let hi = lo.wrapping_add(window.len());
            let inside = |at: u32| at >= lo && at < hi;
            if inside(site.at) || via.iter().any(|v| inside(v.at)) || !self.is_free(lo, window.len()) {
                continue;
            }
            let sites = self.with_sites_behind(info, site);
            window.thread = Some(Thread { via: via.to_vec(), sites });
            if let Ok(placed) = self.try_jump(info, window, branch.at) {
                return Some(self.enter(Placed { tactic: Tactic::Thread, ..placed }, None));
            }
        }
        None
    }

    /// The site and those right behind it that would trap at once.
    fn with_sites_behind(&self, info: &dyn CodeInfo, site: &Insn) -> Vec<Insn> {
        let mut sites = Vec::from([*site]);
        let mut last = *site;
        while sites.len() < MAX_SITES
            && last.falls_through()
            && self.patch_at(last.next()).is_some_and(|p| p.tactic == Tactic::TrapByte)
            && let Some(next) = Insn::decode(info, last.next())
        {
            sites.push(next);
            last = next;
        }
        sites
    }
}
