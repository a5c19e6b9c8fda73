//! [`UserPatcher`]: `int n` in ring-3 code, done in line by [`crate::transition`].
//!
//! Patches of ring-3 code are fewer and simpler than those of ring 0. Only the bytes in front of the site may be
//! covered: what follows is where the handler returns to. One linear page may be shown for several frames, each with
//! trampolines of its own, so everything is keyed by what the caller calls the page.

use crate::CodeInfo;
use crate::alloc_region::{Allocator, Trapping};
use crate::displace;
use crate::emit::Emitter;
use crate::insn::Insn;
use crate::manager::{HLT, jump};
use crate::map::{EipMap, Fix};
use crate::patch::{
    CodeWrite, Config, LongGate, ReasonKind, Refusal, Trampoline, USER_SITES, reason_word, split_reason,
};
use crate::transition;
use crate::view::MapView;
use crate::window::{starts, window};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use csam::{Class, CodeMap, GuestLin};
use iced_x86::Code;

const PAGE: u32 = 4096;

/// A patched `int n` of ring-3 code.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UserPatch {
    /// Its number in reason words.
    pub id: u32,
    /// What the caller calls the page.
    pub key: u64,
    /// First byte of the window, a proven instruction.
    pub start: GuestLin,
    /// The `int n`: the last instruction of the window.
    pub site: GuestLin,
    /// What the page's copy must show: a jump, and `hlt` up to the end of the window.
    pub write: CodeWrite,
    /// What to store in trampoline memory.
    pub trampoline: Trampoline,
    /// What each boundary of the trampoline stands for.
    pub map: EipMap,
}

impl UserPatch {
    /// The EIP behind the window, to which the handler returns.
    #[must_use]
    pub fn end(&self) -> GuestLin {
        self.start.wrapping_add(self.write.bytes.len() as u32)
    }

    /// The trampoline EIP that does what the window's instruction at `eip` does.
    #[must_use]
    pub fn forward(&self, eip: u32) -> Option<u32> {
        Some(self.trampoline.at.wrapping_add(self.map.forward(eip)?))
    }
}

/// Keeps the patches of ring-3 code.
#[derive(Debug)]
pub struct UserPatcher {
    config: Config,
    /// Trampoline regions, the one of `config` first.
    memory: Vec<Allocator>,
    patches: BTreeMap<u32, UserPatch>,
    /// By page and start of the window. Windows in one page never overlap.
    by_start: BTreeMap<(u64, u32), u32>,
    by_trampoline: BTreeMap<u32, u32>,
    next: u32,
    /// How trampolines leave, if they cannot do the `int n`.
    long_gate: Option<LongGate>,
}

impl UserPatcher {
    /// None yet. The region is not [`crate::Patm`]'s, and ring 3's code segment must reach it.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            memory: Vec::from([Allocator::new(config.tramp_base, config.tramp_len)]),
            patches: BTreeMap::new(),
            by_start: BTreeMap::new(),
            by_trampoline: BTreeMap::new(),
            next: USER_SITES,
            long_gate: None,
        }
    }

    /// Trampolines do not do the `int n`: they leave by this gate, for whoever does. Nothing of the vCPU page is used.
    #[must_use]
    pub fn leaving_by(mut self, gate: LongGate) -> Self {
        self.long_gate = Some(gate);
        self
    }

    /// One more trampoline region. The distance from the code decides which of a jump's displacement bytes can trap
    /// ([`crate::good_bases`]); ring-3 code lies in several places.
    #[must_use]
    pub fn with_region(mut self, base: u32, len: u32) -> Self {
        self.memory.push(Allocator::new(base, len));
        self
    }

    fn free_memory(&mut self, at: u32) {
        if let Some(memory) = self.memory.iter_mut().find(|m| m.contains(at)) {
            memory.free(at);
        }
    }

    /// Plans a patch of the `int n` at `site` in the page `key` and reserves its trampoline. `map` is what is known of the
    /// page, `fetch` reads its original bytes. If it is patched already, that patch comes back. If it is refused, its
    /// first byte has to trap; more code proven in front of it may change that.
    pub fn patch_int(
        &mut self,
        key: u64,
        map: &CodeMap,
        fetch: impl Fn(GuestLin, &mut [u8]) -> usize,
        site: GuestLin,
    ) -> Result<&UserPatch, Refusal> {
        let info = MapView { map, fetch, writable: |_, _| true };
        let id = match self.at(key, site.0) {
            Some(patch) if patch.site == site => patch.id,
            Some(_) => return Err(Refusal::Overlap),
            None => self.plan(key, &info, site.0)?,
        };
        self.patches.get(&id).ok_or(Refusal::NotCode)
    }

    fn plan(&mut self, key: u64, info: &dyn CodeInfo, site: u32) -> Result<u32, Refusal> {
        let insn = Insn::decode(info, site).ok_or(Refusal::NotCode)?;
        if insn.instr.code() != Code::Int_imm8 {
            return Err(Refusal::NotSensitive);
        }
        let vector = insn.instr.immediate8();
        let mut why = None;
        for start in starts(info, site) {
            if insn.next().wrapping_sub(start) < 5 {
                continue;
            }
            match self.try_jump(key, info, start, &insn, vector) {
                Ok(patch) => return Ok(self.enter(patch)),
                Err(refusal) => why = why.or(Some(refusal)),
            }
        }
        Err(why.unwrap_or(Refusal::NoRoom))
    }

    fn try_jump(
        &mut self,
        key: u64,
        info: &dyn CodeInfo,
        start: u32,
        site: &Insn,
        vector: u8,
    ) -> Result<UserPatch, Refusal> {
        let last = site.next().wrapping_sub(1);
        if start / PAGE != last / PAGE {
            return Err(Refusal::NoRoom);
        }
        // With room for a jump up to the end of the site, the shortest window ends there.
        let window = window(info, start, site.at, 5, &[])?;
        let (in_front, end) = match window.insns.split_last() {
            Some((last, in_front)) if last.at == site.at => (in_front, site.next()),
            _ => return Err(Refusal::NotDisplaceable),
        };
        if in_front.iter().any(|i| i.class() != Class::Innocuous) {
            return Err(Refusal::NotDisplaceable);
        }
        if !self.is_free(key, start, end) {
            return Err(Refusal::Overlap);
        }
        let mut e = Emitter::new(self.config.vcpu_base, Some(3)).keyed(self.config.keys);
        for insn in in_front {
            e.begin(insn.at);
            displace::emit(&mut e, insn);
        }
        e.begin(site.at);
        if let Some(gate) = self.long_gate {
            e.long_gate(gate, site.next());
        } else {
            let reason = reason_word(self.next, ReasonKind::Emulate);
            transition::enter_kernel(&mut e, site, vector, reason, &self.config);
            e.flush_slow_paths();
        }
        let mut trapping = Trapping::default();
        for offset in window.inner_starts().filter(|o| *o < 5) {
            trapping.0 |= 1 << (offset - 1);
        }
        let jump_end = start.wrapping_add(5);
        let len = e.len();
        let place = |m: &mut Allocator| m.allocate(len, jump_end, trapping);
        let at = self.memory.iter_mut().find_map(place).ok_or(Refusal::NoPlace)?;
        let Some((code, map)) = e.finish(at) else {
            self.free_memory(at);
            return Err(Refusal::NotDisplaceable);
        };
        let mut bytes = jump(jump_end, at).to_vec();
        bytes.resize(end.wrapping_sub(start) as usize, HLT);
        Ok(UserPatch {
            id: self.next,
            key,
            start: GuestLin(start),
            site: GuestLin(site.at),
            write: CodeWrite { at: GuestLin(start), bytes },
            trampoline: Trampoline { at, code },
            map,
        })
    }

    fn is_free(&self, key: u64, lo: u32, hi: u32) -> bool {
        let before = self.by_start.range((key, 0)..(key, hi)).next_back();
        before.and_then(|(_, id)| self.patches.get(id)).is_none_or(|p| p.end().0 <= lo)
    }

    fn enter(&mut self, patch: UserPatch) -> u32 {
        let id = patch.id;
        // Numbers wrap after half a billion patches; one that is in use is left out.
        loop {
            self.next = USER_SITES | (self.next.wrapping_add(1) & (USER_SITES - 1));
            if self.next != id && !self.patches.contains_key(&self.next) {
                break;
            }
        }
        self.by_start.insert((patch.key, patch.start.0), id);
        self.by_trampoline.insert(patch.trampoline.at, id);
        self.patches.insert(id, patch);
        id
    }

    /// The patch in the page `key` whose window holds `eip`.
    #[must_use]
    pub fn at(&self, key: u64, eip: u32) -> Option<&UserPatch> {
        let (_, id) = self.by_start.range((key, 0)..=(key, eip)).next_back()?;
        self.patches.get(id).filter(|p| eip < p.end().0)
    }

    /// Where the hardware must go on so that ring 3 goes on at `eip` in the page `key`: inside a window that is the
    /// trampoline's copy of the instruction. Also for a trap on one of the window's bytes, at `eip`.
    #[must_use]
    pub fn resume_eip(&self, key: u64, eip: u32) -> u32 {
        match self.at(key, eip) {
            Some(patch) if patch.start.0 != eip => patch.forward(eip).unwrap_or(eip),
            _ => eip,
        }
    }

    /// The trampoline, and the boundary in it, at which the hardware stopped. None in trampoline memory
    /// ([`Self::owns`]): only ring 3 that jumped there by itself.
    #[must_use]
    pub fn locate(&self, eip: u32) -> Option<(&UserPatch, Fix)> {
        let (&start, id) = self.by_trampoline.range(..=eip).next_back()?;
        let patch = self.patches.get(id)?;
        Some((patch, *patch.map.fix(eip - start)?))
    }

    /// Is `eip` in trampoline memory?
    #[must_use]
    pub fn owns(&self, eip: u32) -> bool {
        self.memory.iter().any(|m| m.contains(eip))
    }

    /// Whose reason word this is: its `int n` is still to be done, at CPL 3 and with EIP at the site. The state is exact.
    #[must_use]
    pub fn by_reason(&self, word: u32) -> Option<&UserPatch> {
        self.patches.get(&split_reason(word).0)
    }

    /// Forgets the patches of a page and frees their trampolines, which the caller fills with `hlt`. No CPU may be inside
    /// one.
    pub fn remove(&mut self, key: u64) -> Vec<UserPatch> {
        let ids: Vec<u32> = self.by_start.range((key, 0)..=(key, u32::MAX)).map(|(_, &id)| id).collect();
        let mut removed = Vec::new();
        for id in ids {
            let Some(patch) = self.patches.remove(&id) else { continue };
            self.by_start.remove(&(patch.key, patch.start.0));
            self.by_trampoline.remove(&patch.trampoline.at);
            self.free_memory(patch.trampoline.at);
            removed.push(patch);
        }
        removed
    }

    /// Every live patch, by number.
    pub fn patches(&self) -> impl Iterator<Item = &UserPatch> {
        self.patches.values()
    }

    /// First EIPs of the trampoline pages that need memory. Only grows.
    #[must_use]
    pub fn trampoline_pages(&self) -> BTreeSet<u32> {
        self.memory.iter().flat_map(Allocator::pages).collect()
    }
}
