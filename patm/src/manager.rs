//! [`Patm`]: keeps the patches, makes and undoes them, and translates EIPs both ways.

mod adapt;
mod hasten;

use crate::CodeInfo;
use crate::alloc_region::{Allocator, Trapping, traps};
use crate::emit::Emitter;
use crate::insn::Insn;
use crate::map::{EipMap, Fix};
use crate::patch::{
    CodeWrite, Config, Patch, PatchId, ReasonKind, Refusal, Route, SiteRef, Tactic, Trampoline, split_reason,
};
use crate::window::{Window, grown_window, starts, window, window_to_target};
use crate::{displace, inline};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;
use csam::{Class, GuestLin, SensitiveKind};

pub(crate) use adapt::Thread;

/// `hlt`: what bytes of a window hold that nobody may execute, and the trap byte itself.
pub(crate) const HLT: u8 = 0xf4;
/// No patch depends on more bytes from its start (a window, or one instruction).
const MAX_EXTENT: u32 = 64;

/// How many slots are tried for a short jump.
const MAX_SLOTS: usize = 4;

/// What an EIP is to the patch manager.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Location {
    /// Nothing of ours.
    Guest,
    /// The first byte of a patch, or the slot of its short jump: guest state is exact, the guest EIP is the start of
    /// the window.
    PatchStart(PatchId),
    /// Inside a window, where a trapping byte stands.
    MidWindow {
        /// Whose window.
        id: PatchId,
        /// The trampoline EIP that does what the guest's instruction there does; None if no instruction the window
        /// knows starts there (undo the patch and scan from there).
        forward: Option<u32>,
    },
    /// An instruction boundary of a trampoline.
    Trampoline {
        /// Whose.
        id: PatchId,
        /// How to get the guest's state.
        fix: Fix,
    },
    /// In trampoline memory but at no boundary of a live trampoline: only a guest that jumped there by itself.
    Stray,
}

/// Counts of what is patched now, and of what was refused or undone since the start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Live patches by tactic.
    pub tactics: BTreeMap<Tactic, u64>,
    /// Live sites by kind and route.
    pub sites: BTreeMap<(SensitiveKind, Route), u64>,
    /// Live trap bytes by why there is no jump.
    pub trap_bytes: BTreeMap<Refusal, u64>,
    /// Calls of `patch` that were refused.
    pub refused: BTreeMap<Refusal, u64>,
    /// Patches undone.
    pub undone: u64,
    /// Bytes of live trampolines.
    pub trampoline_bytes: u32,
}

/// The patch manager.
#[derive(Debug)]
pub struct Patm {
    config: Config,
    memory: Allocator,
    patches: BTreeMap<PatchId, Patch>,
    /// By the first EIP of the window. Windows never overlap.
    by_start: BTreeMap<u32, PatchId>,
    /// By the EIP of the slot of a short jump.
    by_slot: BTreeMap<u32, PatchId>,
    by_trampoline: BTreeMap<u32, PatchId>,
    by_site: BTreeMap<u32, PatchId>,
    /// By the EIP of a site that is done in a window which jumps to it.
    by_tail: BTreeSet<(u32, PatchId)>,
    /// By the EIP of a jump outside the window that is done in the trampoline.
    by_via: BTreeSet<(u32, PatchId)>,
    next_patch: u32,
    next_site: u32,
    stats: Stats,
}

/// A plan that found its place.
struct Placed {
    window: Window,
    tactic: Tactic,
    writes: Vec<CodeWrite>,
    sites: Vec<SiteRef>,
    trampoline: Trampoline,
    map: EipMap,
}

impl Patm {
    /// A manager without patches.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            memory: Allocator::new(config.tramp_base, config.tramp_len),
            patches: BTreeMap::new(),
            by_start: BTreeMap::new(),
            by_slot: BTreeMap::new(),
            by_trampoline: BTreeMap::new(),
            by_site: BTreeMap::new(),
            by_tail: BTreeSet::new(),
            by_via: BTreeSet::new(),
            next_patch: 0,
            next_site: 1,
            stats: Stats::default(),
        }
    }

    /// What it was made with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Plans the patch of the sensitive instruction at `site` by the best tactic that fits, and reserves its trampoline.
    /// The caller writes [`Patch::writes`] to the code view and the trampoline to its memory. A site that lies in the
    /// window of a live patch is already taken care of: that patch comes back.
    pub fn patch(&mut self, site: GuestLin, info: &dyn CodeInfo) -> Result<&Patch, Refusal> {
        match self.plan(site, info) {
            Ok(id) => self.patches.get(&id).ok_or(Refusal::NotCode),
            Err(why) => {
                *self.stats.refused.entry(why).or_default() += 1;
                Err(why)
            }
        }
    }

    fn plan(&mut self, site: GuestLin, info: &dyn CodeInfo) -> Result<PatchId, Refusal> {
        let insn = Insn::decode(info, site.0).ok_or(Refusal::NotCode)?;
        let kind = match insn.class() {
            Class::Innocuous => return Err(Refusal::NotSensitive),
            Class::Trapping => return Err(Refusal::TrapsItself),
            Class::Sensitive(kind) => kind,
        };
        if let Some(patch) = self.patch_at(site.0) {
            return if patch.sites.iter().any(|s| s.at == site) {
                Ok(patch.id)
            } else {
                Err(Refusal::Overlap)
            };
        }
        let mut why = None;
        let starts = starts(info, site.0);
        for &start in &starts {
            let placed = grown_window(info, start, site.0, 5).and_then(|w| self.try_jump(info, w, site.0));
            match placed {
                Ok(placed) => return Ok(self.enter(placed, None)),
                Err(refusal) => why = why.or(Some(refusal)),
            }
        }
        for &start in starts.iter().take(2) {
            if let Ok(placed) = self.try_short_jump(info, start, site.0) {
                return Ok(self.enter(placed, None));
            }
        }
        // The site is a branch's target: who only falls through to it is spared the trap.
        for &start in starts.iter().skip(1) {
            let placed = window_to_target(info, start, site.0).and_then(|w| self.try_jump(info, w, site.0));
            if let Ok(placed) = placed {
                return Ok(self.enter(placed, None));
            }
        }
        if !info.writable_window(site, 1) {
            return Err(Refusal::NotWritable);
        }
        Ok(self.enter_trap_byte(&insn, kind, why.unwrap_or(Refusal::NoPlace)))
    }

    /// For a site that was just patched: the bytes of the live patches, one of them a trap byte, which alone stand in the
    /// way of a jump that would do them all. Undo everything there and patch the sites again, lowest first.
    #[must_use]
    pub fn mergeable(&self, site: GuestLin, info: &dyn CodeInfo) -> Option<(GuestLin, GuestLin)> {
        let patch = self.patch_at(site.0)?;
        if patch.tactic != Tactic::TrapByte {
            // It would have grown over a trap byte behind it, had that not been there first.
            let window = grown_window(info, patch.start.0, site.0, 5).ok()?;
            let hi = patch.start.0.wrapping_add(window.len());
            let behind = self.in_the_way(patch.start.0, hi, patch.start)?;
            let traps = |p: &&Patch| p.tactic == Tactic::TrapByte;
            return behind.iter().all(traps).then_some((patch.start, GuestLin(hi)));
        }
        starts(info, site.0).into_iter().find_map(|start| {
            let first = self.patch_at(start).filter(|p| p.start != site);
            let lo = first.map_or(start, |p| p.start.0);
            let window = grown_window(info, lo, site.0, 5);
            let len = window.or_else(|_| window_to_target(info, lo, site.0)).ok()?.len();
            let hi = lo.wrapping_add(len);
            self.in_the_way(lo, hi, site).map(|_| (GuestLin(lo), GuestLin(hi)))
        })
    }

    /// The patches that start in `lo..hi`, except the one at `but`, if there are any and all are whole in there.
    fn in_the_way(&self, lo: u32, hi: u32, but: GuestLin) -> Option<Vec<&Patch>> {
        let within = self.by_start.range(lo..hi).filter_map(|(_, id)| self.patches.get(id));
        let found: Vec<&Patch> = within.filter(|p| p.start != but).collect();
        let whole = |p: &&Patch| p.extent() <= hi && p.writes.len() == 1;
        (!found.is_empty() && found.iter().all(whole)).then_some(found)
    }

    /// No window and no slot of a short jump has any of these bytes.
    #[must_use]
    pub fn is_free(&self, lo: u32, len: u32) -> bool {
        let hi = u64::from(lo) + u64::from(len);
        let hits = |start: u32, end: u64| u64::from(start) < hi && end > u64::from(lo);
        let near = lo.saturating_sub(MAX_EXTENT)..=lo.saturating_add(len);
        let window = |id: &PatchId| {
            self.patches.get(id).is_some_and(|p| hits(p.start.0, u64::from(p.start.0) + u64::from(p.len)))
        };
        !self.by_start.range(near.clone()).any(|(_, id)| window(id))
            && !self.by_slot.range(near).any(|(&slot, _)| hits(slot, u64::from(slot) + 5))
    }

    /// Emits the trampoline of `window`.
    fn emit(&self, window: &Window) -> (Emitter, Vec<SiteRef>) {
        let mut e = Emitter::new(self.config.vcpu_base, None).keyed(self.config.keys);
        let mut sites = Vec::new();
        let mut goes_on = true;
        let mut site = |e: &mut Emitter, insn: &Insn, kind: SensitiveKind| {
            let id = self.next_site + sites.len() as u32;
            let Config { count_inline: count, ring, keys, .. } = self.config;
            let cx = inline::Context { site_id: id, count, ring, keys };
            let (route, goes_on) = inline::emit(e, insn, kind, &cx);
            sites.push(SiteRef {
                at: GuestLin(insn.at),
                len: insn.len() as u8,
                kind,
                route,
                id,
                shadow: insn.shadows(),
            });
            goes_on
        };
        let mut end = window.start().wrapping_add(window.len());
        for insn in &window.insns {
            e.begin(insn.at);
            goes_on = match (insn.class(), &window.tail) {
                (Class::Sensitive(kind), _) => site(&mut e, insn, kind),
                _ if window.hastened == Some(insn.at) => {
                    hasten::emit(&mut e, insn);
                    true
                }
                (_, Some(tail)) if insn.next() == end => {
                    e.op(&[0x90]); // nop: the jump, which keeps its own place in the map
                    e.state = e.at(tail.at);
                    end = tail.next();
                    match tail.class() {
                        Class::Sensitive(kind) => site(&mut e, tail, kind),
                        _ => true,
                    }
                }
                _ => displace::emit(&mut e, insn),
            };
        }
        if goes_on {
            e.state = e.at(end);
            debug_assert!(window.filler == 0, "filler only follows an instruction that does not go on");
            e.guest_branch(&[0xe9], end);
        }
        if let Some(Thread { via, sites }) = &window.thread {
            via.iter().for_each(|jump| e.begin(jump.at));
            let mut next = None;
            for insn in sites {
                e.begin(insn.at);
                let Class::Sensitive(kind) = insn.class() else { break };
                next = site(&mut e, insn, kind).then(|| insn.next());
            }
            if let Some(next) = next {
                e.state = e.at(next);
                e.guest_branch(&[0xe9], next);
            }
        }
        e.flush_slow_paths();
        (e, sites)
    }

    /// Places a trampoline for a jump that ends at EIP `jump_end`.
    fn place(
        &mut self,
        window: &Window,
        jump_end: u32,
        trapping: Trapping,
    ) -> Result<(Trampoline, EipMap, Vec<SiteRef>), Refusal> {
        let (e, sites) = self.emit(window);
        let at = self.memory.allocate(e.len(), jump_end, trapping).ok_or(Refusal::NoPlace)?;
        match e.finish(at) {
            Some((code, map)) => Ok((Trampoline { at, code }, map, sites)),
            None => {
                self.memory.free(at);
                Err(Refusal::NotDisplaceable)
            }
        }
    }

    fn try_jump(&mut self, info: &dyn CodeInfo, mut window: Window, site: u32) -> Result<Placed, Refusal> {
        let start = window.start();
        if !self.is_free(start, window.len()) {
            window = self::window(info, start, site, 5, &[])?;
        }
        if !self.is_free(start, window.len()) {
            return Err(Refusal::Overlap);
        }
        let jump_end = start.wrapping_add(5);
        let mut trapping = Trapping::default();
        // A guest may yet enter the filler: a function that begins with a `nop` and is only called indirectly.
        let filler = window.len() - window.filler..window.len();
        for offset in window.inner_starts().chain(filler).filter(|o| (1..5).contains(o)) {
            trapping.0 |= 1 << (offset - 1);
        }
        let (trampoline, map, sites) = self.place(&window, jump_end, trapping)?;
        let mut bytes = jump(jump_end, trampoline.at).to_vec();
        bytes.resize(window.len() as usize, HLT);
        let tactic = match (&window, trapping.0) {
            (w, _) if w.inner_target => Tactic::JccWindow,
            (w, _) if w.insns.len() == 1 => Tactic::Jump5,
            (_, 0) => Tactic::Group,
            _ => Tactic::Pun,
        };
        let writes = vec![CodeWrite { at: GuestLin(start), bytes }];
        Ok(Placed { window, tactic, writes, sites, trampoline, map })
    }

    fn try_short_jump(&mut self, info: &dyn CodeInfo, start: u32, site: u32) -> Result<Placed, Refusal> {
        let window = window(info, start, site, 2, &[])?;
        if !self.is_free(start, window.len()) {
            return Err(Refusal::Overlap);
        }
        let must_trap = window.inner_starts().any(|o| o == 1);
        let jump_end = start.wrapping_add(2);
        // A function may begin in the filler that is only called indirectly. Its first byte must trap, so the slot begins
        // behind the first byte of a filler instruction, and the next ones meet trapping bytes of its displacement.
        let reach = |rel: i8| {
            let slot = jump_end.checked_add_signed(i32::from(rel))?;
            let apart = slot.saturating_add(5) <= start || slot >= start.saturating_add(window.len());
            let at = GuestLin(slot);
            let starts = info.padding(at, 5).filter(|starts| starts & 1 == 0)?;
            let free = apart && info.writable_window(at, 5) && self.is_free(slot, 5);
            free.then_some((rel, slot, Trapping((starts >> 1) as u8 & 15)))
        };
        let mut slots: Vec<_> = (i8::MIN..=i8::MAX)
            .filter(|rel| !must_trap || traps(rel.cast_unsigned()))
            .filter_map(reach)
            .collect();
        slots.sort_by_key(|(_, _, trapping)| trapping.0.count_ones());
        let place = |(rel, slot, trapping)| {
            let placed = self.place(&window, u32::wrapping_add(slot, 5), trapping).ok()?;
            Some((rel, slot, placed))
        };
        let (rel, slot, (trampoline, map, sites)) =
            slots.into_iter().take(MAX_SLOTS).find_map(place).ok_or(Refusal::NoPlace)?;
        let slot_end = slot.wrapping_add(5);
        let mut bytes = vec![0xeb, rel.cast_unsigned()];
        bytes.resize(window.len() as usize, HLT);
        let writes = vec![
            CodeWrite { at: GuestLin(start), bytes },
            CodeWrite { at: GuestLin(slot), bytes: jump(slot_end, trampoline.at).to_vec() },
        ];
        Ok(Placed { window, tactic: Tactic::ShortJump, writes, sites, trampoline, map })
    }

    fn enter(&mut self, placed: Placed, why: Option<Refusal>) -> PatchId {
        let Placed { window, tactic, writes, sites, trampoline, map } = placed;
        let hastened = window.hastened.map(GuestLin);
        let via = window.thread.as_ref().map_or(&[][..], |t| &t.via);
        self.insert(Patch {
            id: PatchId(self.next_patch),
            start: GuestLin(window.start()),
            len: window.len() as u8,
            original: window
                .insns
                .iter()
                .flat_map(|i| i.bytes().iter().copied())
                .chain((0..window.filler).map(|_| HLT))
                .collect(),
            writes,
            tactic,
            sites,
            via: via.iter().map(|i| (GuestLin(i.at), i.len() as u8)).collect(),
            trampoline: Some(trampoline),
            map,
            why,
            hastened,
        })
    }

    fn enter_trap_byte(&mut self, insn: &Insn, kind: SensitiveKind, why: Refusal) -> PatchId {
        let at = GuestLin(insn.at);
        let site = SiteRef {
            at,
            len: insn.len() as u8,
            kind,
            route: Route::TrapByte,
            id: self.next_site,
            shadow: insn.shadows(),
        };
        self.insert(Patch {
            id: PatchId(self.next_patch),
            start: at,
            len: 1,
            original: insn.bytes().first().copied().into_iter().collect(),
            writes: vec![CodeWrite { at, bytes: vec![HLT] }],
            tactic: Tactic::TrapByte,
            sites: vec![site],
            via: Vec::new(),
            trampoline: None,
            map: EipMap::default(),
            why: Some(why),
            hastened: None,
        })
    }

    fn insert(&mut self, patch: Patch) -> PatchId {
        let id = patch.id;
        self.next_patch += 1;
        self.next_site += patch.sites.len() as u32;
        *self.stats.tactics.entry(patch.tactic).or_default() += 1;
        if let Some(why) = patch.why {
            *self.stats.trap_bytes.entry(why).or_default() += 1;
        }
        for site in &patch.sites {
            *self.stats.sites.entry((site.kind, site.route)).or_default() += 1;
            self.by_site.insert(site.id, id);
            if !patch.holds(site) {
                self.by_tail.insert((site.at.0, id));
            }
        }
        for (at, _) in &patch.via {
            self.by_via.insert((at.0, id));
        }
        self.by_start.insert(patch.start.0, id);
        if let Some(slot) = patch.writes.get(1) {
            self.by_slot.insert(slot.at.0, id);
        }
        if let Some(trampoline) = &patch.trampoline {
            self.by_trampoline.insert(trampoline.at, id);
        }
        self.patches.insert(id, patch);
        id
    }

    /// Forgets a patch and frees its trampoline memory, which the caller fills with `hlt`. The caller also puts the
    /// original bytes back, and no CPU may be inside the trampoline.
    pub fn undo(&mut self, id: PatchId) -> Option<Patch> {
        let patch = self.patches.remove(&id)?;
        self.by_start.remove(&patch.start.0);
        if let Some(slot) = patch.writes.get(1) {
            self.by_slot.remove(&slot.at.0);
        }
        if let Some(trampoline) = &patch.trampoline {
            self.by_trampoline.remove(&trampoline.at);
            self.memory.free(trampoline.at);
        }
        for site in &patch.sites {
            self.by_site.remove(&site.id);
            self.by_tail.remove(&(site.at.0, id));
            decrement(&mut self.stats.sites, (site.kind, site.route));
        }
        for (at, _) in &patch.via {
            self.by_via.remove(&(at.0, id));
        }
        decrement(&mut self.stats.tactics, patch.tactic);
        if let Some(why) = patch.why {
            decrement(&mut self.stats.trap_bytes, why);
        }
        self.stats.undone += 1;
        Some(patch)
    }

    /// Undoes every patch that depends on or occupies a byte of `lo..hi`.
    pub fn undo_overlapping(&mut self, lo: GuestLin, hi: GuestLin) -> Vec<Patch> {
        let from = lo.0.saturating_sub(MAX_EXTENT);
        if from >= hi.0 {
            return Vec::new();
        }
        let windows = self.by_start.range(from..hi.0).map(|(_, &id)| id);
        let windows = windows.filter(|id| self.patches.get(id).is_some_and(|p| p.extent() > lo.0));
        let slots = self.by_slot.range(from..hi.0).filter(|(slot, _)| slot.saturating_add(5) > lo.0);
        let tails = self.by_tail.range((from, PatchId(0))..(hi.0, PatchId(0)));
        let tails = tails.filter(|(at, id)| {
            let sites = self.patches.get(id).map_or(&[][..], |p| &p.sites);
            sites.iter().any(|s| s.at.0 == *at && s.next() > lo)
        });
        let via = self.by_via.range((from, PatchId(0))..(hi.0, PatchId(0)));
        let via = via.filter(|(at, id)| {
            let jumps = self.patches.get(id).map_or(&[][..], |p| &p.via);
            jumps.iter().any(|(v, len)| v.0 == *at && v.0.saturating_add(u32::from(*len)) > lo.0)
        });
        let ids: BTreeSet<PatchId> =
            windows.chain(slots.map(|(_, &id)| id)).chain(tails.chain(via).map(|&(_, id)| id)).collect();
        ids.into_iter().filter_map(|id| self.undo(id)).collect()
    }

    /// A live patch.
    #[must_use]
    pub fn get(&self, id: PatchId) -> Option<&Patch> {
        self.patches.get(&id)
    }

    /// Every live patch, oldest first.
    pub fn patches(&self) -> impl Iterator<Item = &Patch> {
        self.patches.values()
    }

    /// The patch whose window holds `eip`.
    #[must_use]
    pub fn patch_at(&self, eip: u32) -> Option<&Patch> {
        let (&start, id) = self.by_start.range(..=eip).next_back()?;
        self.patches.get(id).filter(|p| eip - start < u32::from(p.len))
    }

    /// Patches that only make something faster and have a byte of `lo..hi`.
    #[must_use]
    pub fn hastened_in(&self, lo: GuestLin, hi: GuestLin) -> Vec<(GuestLin, GuestLin)> {
        let near = self.by_start.range(lo.0.saturating_sub(MAX_EXTENT)..hi.0);
        let patches = near.filter_map(|(_, id)| self.patches.get(id));
        patches.filter(|p| p.hastened.is_some() && p.end() > lo).map(|p| (p.start, p.end())).collect()
    }

    /// Does a patch start in `lo..hi`?
    #[must_use]
    pub fn starts_in(&self, lo: GuestLin, hi: GuestLin) -> bool {
        lo < hi && self.by_start.range(lo.0..hi.0).next().is_some()
    }

    /// The patch whose trampoline holds `eip`, and the offset in it.
    fn trampoline_at(&self, eip: u32) -> Option<(&Patch, u32)> {
        let (&start, id) = self.by_trampoline.range(..=eip).next_back()?;
        let patch = self.patches.get(id)?;
        let len = patch.trampoline.as_ref()?.code.len() as u32;
        (eip - start < len).then_some((patch, eip - start))
    }

    /// Whose reason word this is. None for a word no live trampoline writes.
    #[must_use]
    pub fn by_reason(&self, reason: u32) -> Option<(&Patch, &SiteRef, ReasonKind)> {
        let (site_id, kind) = split_reason(reason);
        let patch = self.patches.get(self.by_site.get(&site_id)?)?;
        let site = patch.sites.iter().find(|s| s.id == site_id)?;
        Some((patch, site, kind))
    }

    /// Where the hardware must go on to do the site of a reason word again, state untouched.
    #[must_use]
    pub fn restart_eip(&self, reason: u32) -> Option<u32> {
        let (patch, site, _) = self.by_reason(reason)?;
        forward(patch, site.at.0)
    }

    /// What `eip`, where the hardware stopped, is.
    #[must_use]
    pub fn locate(&self, eip: u32) -> Location {
        if self.memory.contains(eip) {
            return match self.trampoline_at(eip) {
                Some((patch, offset)) => match patch.map.fix(offset) {
                    Some(&fix) => Location::Trampoline { id: patch.id, fix },
                    None => Location::Stray,
                },
                None => Location::Stray,
            };
        }
        if let Some(patch) = self.patch_at(eip) {
            if patch.start.0 == eip {
                return Location::PatchStart(patch.id);
            }
            return Location::MidWindow { id: patch.id, forward: forward(patch, eip) };
        }
        match self.by_slot.range(..=eip).next_back() {
            Some((&slot, &id)) if slot == eip => Location::PatchStart(id),
            Some((&slot, &id)) if eip - slot < 5 => Location::MidWindow { id, forward: None },
            _ => Location::Guest,
        }
    }

    /// Where the hardware must go on so that the guest goes on at `guest_eip`: inside a window that is the trampoline's
    /// copy of the instruction. An EIP in a window that starts none of its instructions comes back unchanged (and
    /// traps there; see [`Location::MidWindow`]).
    #[must_use]
    pub fn resume_eip(&self, guest_eip: u32) -> u32 {
        match self.patch_at(guest_eip) {
            Some(patch) if patch.start.0 != guest_eip => forward(patch, guest_eip).unwrap_or(guest_eip),
            _ => guest_eip,
        }
    }

    /// The patch that a newly proven instruction start contradicts: it lies inside a window where the patch knows no
    /// start (overlapping code), or in the slot of a short jump. Undo that patch and patch its sites again.
    #[must_use]
    pub fn contradicts(&self, start: GuestLin) -> Option<PatchId> {
        match self.locate(start.0) {
            Location::MidWindow { id, forward: None } => Some(id),
            Location::PatchStart(id) if self.by_slot.contains_key(&start.0) => Some(id),
            _ => None,
        }
    }

    /// Is `guest_eip` directly behind a patched `sti`, or a load of SS that shadows it as `sti` does? A kick that stopped
    /// there may have come through it, so an interrupt should wait for one more instruction (`sti; hlt` loses a wake-up
    /// otherwise); it always may.
    #[must_use]
    pub fn is_after_sti(&self, guest_eip: u32) -> bool {
        guest_eip
            .checked_sub(1)
            .and_then(|last| self.patch_at(last))
            .is_some_and(|patch| patch.sites.iter().any(|s| s.shadow && s.next().0 == guest_eip))
    }

    /// First EIPs of the trampoline pages that need memory. Only grows.
    #[must_use]
    pub fn trampoline_pages(&self) -> BTreeSet<u32> {
        self.memory.pages()
    }

    /// What is patched and what was refused.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats { trampoline_bytes: self.memory.used_bytes(), ..self.stats.clone() }
    }
}

fn forward(patch: &Patch, eip: u32) -> Option<u32> {
    Some(patch.trampoline.as_ref()?.at.wrapping_add(patch.map.forward(eip)?))
}

/// `jmp rel32` that ends at `end`.
pub(crate) fn jump(end: u32, target: u32) -> [u8; 5] {
    let [a, b, c, d] = target.wrapping_sub(end).to_le_bytes();
    [0xe9, a, b, c, d]
}

fn decrement<K: Ord>(counts: &mut BTreeMap<K, u64>, key: K) {
    if let Some(n) = counts.get_mut(&key) {
        *n = n.saturating_sub(1);
    }
}
