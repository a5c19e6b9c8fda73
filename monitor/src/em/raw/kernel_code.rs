//! The ring-0 code view: copies of code pages that hold only what CSAM proved to be code, with PATM's patches applied.
//!
//! 1. A page is copied when it is first executed; the copy is all `hlt` (a trap at CPL 3).
//! 2. Executing one of those bytes means "not scanned yet": [`KernelCode::scan`] follows the code from there within the
//!    page, copies the instructions it finds and has every sensitive one patched.
//! 3. A write to the frame is compared with the copy; only the changed span is forgotten and decoded again.
//!
//! Copies are keyed by linear page and remember their frame: two aliases of one frame have two copies.

use super::layout::{Layout, TRAMP_LEN};
use super::trampolines::Trampolines;
use crate::cpum::CpuState;
use crate::machine::Machine;
use crate::pgm::walk::peek;
use csam::pkru::loader_in;
use csam::{CodeMap, CodeSize, GuestLin, GuestPhys, ScanOptions, ScanReport};
use host_driver_shim::code_memory::CodeMemory;
use iced_x86::{Decoder, DecoderOptions};
use patm::{Config, Location, MapView, Patch, PatchId, Patm, Refusal, Tactic};
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};

/// What an unproven byte of the code view holds.
pub const UNSCANNED: u8 = 0xf4;
/// No window reaches further from its site.
const ROOM: u32 = 40;
/// Data writes to a page with code before its copy is given up (until it is executed again).
const WRITES_BEFORE_DROP: u32 = 64;
/// Hits of a trap byte before its site is looked at again, and at each power of two from there: a power of two.
const TRAPS_BEFORE_IMPROVING: u32 = 16;

/// Places where two streams of instructions meet that one scan follows.
const MEETINGS: usize = 64;

struct CodePage {
    pfn: u32,
    offset: u64,
    original: Box<[u8; 4096]>,
    /// The copy has changed since it was last looked through for what loads PKRU.
    changed: Cell<bool>,
    writes: u32,
    write_limit: u32,
}

/// Counters for reports.
#[derive(Clone, Copy, Default, Debug)]
#[allow(missing_docs)]
pub struct Counts {
    pub scans: u64,
    pub instructions: u64,
    pub code_writes: u64,
    pub rescans: u64,
    pub undone: u64,
    pub refused: u64,
    pub conflicts: u64,
    pub mid_instruction: u64,
    pub merged: u64,
    pub improved: u64,
    pub hastened: u64,
    pub pages_made: u64,
    pub pages_dropped: u64,
}

/// What the ring-0 code view consists of.
pub struct KernelCode {
    map: CodeMap,
    /// The patch manager.
    pub patm: Patm,
    count_inline: bool,
    ring: u8,
    keyed: bool,
    pages: HashMap<u32, CodePage>,
    by_frame: HashMap<u32, Vec<u32>>,
    /// The memory of the patches' trampolines.
    pub trampolines: Trampolines,
    /// Frames that have just become code: writable mappings of them must go.
    pub newly_tracked: Vec<u32>,
    /// Linear pages whose copy is gone: the world must not show it any more.
    pub dropped: Vec<GuestLin>,
    /// Why a site could not be patched, for reports.
    pub refusals: Vec<(GuestLin, Refusal)>,
    /// Counters.
    pub counts: Counts,
    next_limit: HashMap<u32, u32>,
    /// Counts changes of patches.
    pub changes: u64,
    /// How often each trap byte was hit.
    traps: HashMap<u32, u32>,
    /// Known instructions whose first byte traps in the view although they have no patch: sites that cannot be patched, and
    /// whatever shares bytes with them.
    interpreted: BTreeSet<GuestLin>,
    /// Copies of a few words that may be made faster when the sensitive instructions have their patches.
    slow: BTreeSet<GuestLin>,
}

/// So many places of a page that show what loads PKRU are dealt with one by one; past that the page is interpreted.
const LOADERS: u32 = 256;

impl CodePage {
    /// Shows these bytes at an offset of the page.
    fn show(&self, code: &CodeMemory, at: usize, bytes: &[u8]) {
        put(code, self.offset + at as u64, bytes);
        self.changed.set(true);
    }
}

/// Writes code memory. Offsets come from its own allocator, so the bounds check cannot fail.
pub fn put(code: &CodeMemory, offset: u64, bytes: &[u8]) {
    let written = code.write(offset, bytes);
    debug_assert!(written.is_some(), "code memory offset {offset:#x} out of range");
}

/// Reads the original bytes of copied pages.
fn fetch(pages: &HashMap<u32, CodePage>) -> impl Fn(GuestLin, &mut [u8]) -> usize {
    |at, buf| {
        for (i, b) in buf.iter_mut().enumerate() {
            let lin = at.wrapping_add(i as u32);
            match pages.get(&lin.page_number()) {
                Some(p) => *b = p.original[lin.page_offset()],
                None => return i,
            }
        }
        buf.len()
    }
}

/// Whether a range of bytes has copies.
fn writable(pages: &HashMap<u32, CodePage>) -> impl Fn(GuestLin, u32) -> bool {
    |at, len| {
        pages.contains_key(&at.page_number())
            && pages.contains_key(&at.wrapping_add(len.saturating_sub(1)).page_number())
    }
}

/// A patch as text: the window's instructions and the trampoline's.
fn describe(patch: &Patch) -> String {
    let list = |at: u32, bytes: &[u8]| {
        Decoder::with_ip(32, bytes, u64::from(at), DecoderOptions::NONE)
            .iter()
            .map(|i| format!("\n    {:08x} {i}", i.ip32()))
            .collect::<String>()
    };
    let mut text = format!(
        "{} at {}, why {:?}:{}",
        patch.tactic.name(),
        patch.start,
        patch.why,
        list(patch.start.0, &patch.original)
    );
    if let Some(t) = &patch.trampoline {
        text += "\n  trampoline:";
        text += &list(t.at, &t.code);
    }
    text
}

impl KernelCode {
    /// An empty code view; `ring`: the hardware ring it is run in.
    #[must_use]
    pub fn new(layout: Layout, count_inline: bool, ring: u8) -> KernelCode {
        KernelCode {
            map: CodeMap::new(CodeSize::Bits32),
            patm: Self::patm(&layout, count_inline, ring),
            count_inline,
            ring,
            keyed: layout.transit.is_some(),
            pages: HashMap::new(),
            by_frame: HashMap::new(),
            trampolines: Trampolines::default(),
            newly_tracked: Vec::new(),
            dropped: Vec::new(),
            refusals: Vec::new(),
            counts: Counts::default(),
            next_limit: HashMap::new(),
            changes: 0,
            traps: HashMap::new(),
            interpreted: BTreeSet::new(),
            slow: BTreeSet::new(),
        }
    }

    fn patm(layout: &Layout, count_inline: bool, ring: u8) -> Patm {
        Patm::new(Config {
            tramp_base: layout.tramp,
            tramp_len: TRAMP_LEN,
            vcpu_base: layout.vcpu,
            count_inline,
            ring,
            keys: layout.keys(),
        })
    }

    /// Gives up every copy and patch and starts afresh at another layout.
    pub fn reset(&mut self, m: &mut Machine, code: &CodeMemory, layout: Layout) {
        for (_, page) in self.pages.drain() {
            m.untrack(page.pfn);
            code.free(page.offset);
        }
        self.trampolines.free(code);
        let (counts, changes) = (self.counts, self.changes + 1);
        *self = KernelCode::new(layout, self.count_inline, self.ring);
        (self.counts, self.changes) = (counts, changes);
    }

    /// The code view's bytes beside the original's, for debugging.
    #[must_use]
    pub fn debug_view(&self, code: &CodeMemory, at: GuestLin, len: u32) -> String {
        let mut view = String::new();
        let mut own = String::new();
        for i in 0..len {
            let lin = at.wrapping_add(i);
            let Some(page) = self.pages.get(&lin.page_number()) else { break };
            let b = code.read_u8(page.offset + lin.page_offset() as u64).unwrap_or(0);
            let mark = if self.map.is_instruction_start(lin) { '|' } else { ' ' };
            view += &format!("{mark}{b:02x}");
            own += &format!("{mark}{:02x}", page.original[lin.page_offset()]);
        }
        format!("view {at}:{view}\nguest {at}:{own}")
    }

    /// Number of copied pages, known instructions and patches.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        (self.pages.len(), self.map.instruction_count())
    }

    /// The frame the copy of `lin`'s page was made of, if there is a copy.
    #[must_use]
    pub fn frame_of(&self, lin: GuestLin) -> Option<u32> {
        self.pages.get(&lin.page_number()).map(|p| p.pfn)
    }

    /// The code memory of the copy of `lin`'s page, if it was made of frame `pfn`.
    #[must_use]
    pub fn copy_of(&self, lin: GuestLin, pfn: u32) -> Option<u64> {
        self.pages.get(&lin.page_number()).filter(|p| p.pfn == pfn).map(|p| p.offset)
    }

    /// The pages that have copies.
    #[must_use]
    pub fn copied_pages(&self) -> Vec<GuestLin> {
        self.pages.keys().map(|number| GuestLin(number << 12)).collect()
    }

    /// The code memory of the copy of `lin`'s page, made if need be. None when the code memory is used up.
    pub fn page(&mut self, m: &mut Machine, code: &CodeMemory, lin: GuestLin, pfn: u32) -> Option<u64> {
        let number = lin.page_number();
        if let Some(p) = self.pages.get(&number) {
            if p.pfn == pfn {
                return Some(p.offset);
            }
            self.drop_page(m, code, number);
        }
        let offset = code.alloc()?;
        put(code, offset, &[UNSCANNED; 4096]);
        let changed = Cell::new(false);
        let mut original = Box::new([0u8; 4096]);
        m.read_ram(GuestPhys(u64::from(pfn) << 12), &mut original[..]);
        if m.track(pfn) {
            self.newly_tracked.push(pfn);
        }
        let write_limit = self.next_limit.get(&pfn).copied().unwrap_or(WRITES_BEFORE_DROP);
        self.pages.insert(number, CodePage { pfn, offset, original, changed, writes: 0, write_limit });
        self.by_frame.entry(pfn).or_default().push(number);
        self.counts.pages_made += 1;
        Some(offset)
    }

    /// Removes the copy of a linear page, its patches and what is known of its code.
    pub fn drop_page(&mut self, m: &mut Machine, code: &CodeMemory, number: u32) {
        let lo = GuestLin(number << 12);
        let hi = lo.wrapping_add(0x1000);
        let orphans = self.undo_in(code, lo, hi);
        let crossing = self.map.overlapping(lo, hi);
        self.map.forget_page(number);
        for (at, _) in &crossing {
            self.interpreted.remove(at);
        }
        let Some(page) = self.pages.remove(&number) else { return };
        code.free(page.offset);
        m.untrack(page.pfn);
        if let Some(list) = self.by_frame.get_mut(&page.pfn) {
            list.retain(|&n| n != number);
        }
        self.dropped.push(lo);
        self.counts.pages_dropped += 1;
        // Instructions that ran in from the page before or out into the next one.
        for (at, len) in crossing {
            if at < lo {
                self.refresh(code, at, lo);
            }
            let end = at.wrapping_add(u32::from(len));
            if end > hi {
                self.refresh(code, hi, end);
            }
        }
        self.patch_sites(code, orphans);
    }

    /// Rewrites the copy's bytes in [lo, hi) from what is known: patch, proven code, or unscanned.
    fn refresh(&self, code: &CodeMemory, lo: GuestLin, hi: GuestLin) {
        let mut at = lo;
        while at != hi {
            if let Some(page) = self.pages.get(&at.page_number()) {
                let byte = match self.patm.patch_at(at.0) {
                    Some(p) => {
                        p.bytes().get(at.0.wrapping_sub(p.start.0) as usize).copied().unwrap_or(UNSCANNED)
                    }
                    None if self.interpreted.contains(&at) => UNSCANNED,
                    None if self.map.proven(at) => page.original[at.page_offset()],
                    None => UNSCANNED,
                };
                page.show(code, at.page_offset(), &[byte]);
            }
            at = at.wrapping_add(1);
        }
    }

    /// Undoes every patch that overlaps [lo, hi); returns the sites they covered.
    #[must_use]
    fn undo_in(&mut self, code: &CodeMemory, lo: GuestLin, hi: GuestLin) -> BTreeSet<GuestLin> {
        let mut sites = BTreeSet::new();
        for patch in self.patm.undo_overlapping(lo, hi) {
            self.changes += 1;
            self.counts.undone += 1;
            sites.extend(patch.sites.iter().map(|s| s.at));
            self.slow.extend(patch.hastened);
            if let Some(t) = &patch.trampoline {
                self.trampolines.erase(code, t.at, t.code.len());
            }
            for write in &patch.writes {
                self.refresh(code, write.at, write.at.wrapping_add(write.bytes.len() as u32));
            }
        }
        sites
    }

    /// A trap byte was hit. When that happens often, the site is looked at again.
    pub fn note_trap(&mut self, code: &CodeMemory, at: GuestLin) {
        let trapping =
            self.patm.patch_at(at.0).is_some_and(|p| p.start == at && p.tactic == Tactic::TrapByte);
        if !trapping || self.overlapped(at) {
            return;
        }
        let hits = self.traps.entry(at.0).or_default();
        *hits = hits.saturating_add(1);
        if *hits < TRAPS_BEFORE_IMPROVING || !hits.is_power_of_two() {
            return;
        }
        self.make_way(code, at);
        let made = {
            let (fetch, writable) = (fetch(&self.pages), writable(&self.pages));
            self.patm.improve(at, &MapView { map: &self.map, fetch, writable })
        };
        self.counts.improved += made.len() as u64;
        for id in made {
            self.install(code, id);
        }
        self.hasten(code);
    }

    fn patch_sites(&mut self, code: &CodeMemory, sites: impl IntoIterator<Item = GuestLin>) {
        for (lo, hi) in self.patch_each(code, sites) {
            let again = self.undo_in(code, lo, hi);
            self.counts.merged += 1;
            self.patch_each(code, again);
        }
        self.hasten(code);
    }

    /// Makes faster what can be, where sensitive instructions have left room.
    fn hasten(&mut self, code: &CodeMemory) {
        for at in std::mem::take(&mut self.slow) {
            if self.overlapped(at) || self.interpreted.contains(&at) {
                continue;
            }
            let made = {
                let (fetch, writable) = (fetch(&self.pages), writable(&self.pages));
                let info = MapView { map: &self.map, fetch, writable };
                self.patm.hasten(at, &info).map(|patch| patch.id)
            };
            if let Some(id) = made {
                self.counts.hastened += 1;
                self.install(code, id);
            }
        }
    }

    /// `rep movsd`.
    fn is_copy(&self, &(at, len): &(GuestLin, u8)) -> bool {
        let page = self.pages.get(&at.page_number());
        let bytes = page.and_then(|page| page.original.get(at.page_offset()..at.page_offset() + 2));
        len == 2 && bytes == Some(&[0xf3, 0xa5])
    }

    /// A sensitive instruction is to be patched: what is there only to be faster gives way for now.
    fn make_way(&mut self, code: &CodeMemory, site: GuestLin) {
        let lo = GuestLin(site.0.saturating_sub(ROOM));
        for (start, end) in self.patm.hastened_in(lo, GuestLin(site.0.saturating_add(ROOM))) {
            let sites = self.undo_in(code, start, end);
            debug_assert!(sites.is_empty(), "it was for none");
        }
    }

    /// Patches every site. Returns where patches made one by one would be better made together.
    fn patch_each(
        &mut self,
        code: &CodeMemory,
        sites: impl IntoIterator<Item = GuestLin>,
    ) -> Vec<(GuestLin, GuestLin)> {
        let mut mergeable = Vec::new();
        let mut work: BTreeSet<GuestLin> = sites.into_iter().collect();
        while let Some(site) = work.pop_first() {
            if self.map.site_at(site).is_none() {
                continue;
            }
            if self.patm.patch_at(site.0).is_some_and(|p| p.sites.iter().any(|s| s.at == site)) {
                continue;
            }
            if self.overlapped(site) {
                // Once: what it orphans may be done again by a patch that does this site as well.
                if !self.interpreted.contains(&site) {
                    work.extend(self.trap_overlapping(code, site));
                }
                continue;
            }
            self.interpreted.remove(&site);
            self.make_way(code, site);
            let planned = {
                let (fetch, writable) = (fetch(&self.pages), writable(&self.pages));
                let info = MapView { map: &self.map, fetch, writable };
                let planned = self.patm.patch(site, &info).map(|patch| patch.id);
                if planned.is_ok() {
                    mergeable.extend(self.patm.mergeable(site, &info));
                }
                planned
            };
            match planned {
                Ok(id) => self.install(code, id),
                Err(Refusal::TrapsItself) => {}
                Err(refusal) => {
                    // The site must not run: its first byte traps in the view, and it is interpreted when reached.
                    self.counts.refused += 1;
                    if self.refusals.len() < 4096 {
                        self.refusals.push((site, refusal));
                    }
                    self.interpret_at(code, site);
                }
            }
        }
        mergeable
    }

    /// Another instruction shares bytes with the one at `at`.
    fn overlapped(&self, at: GuestLin) -> bool {
        let len = self.map.instruction_length(at).unwrap_or(1);
        self.map.overlapping(at, at.wrapping_add(u32::from(len))).len() > 1
    }

    /// Two decodings share the bytes of a sensitive site, so none of them may be changed inside: each gets a trap as
    /// its first byte and is interpreted, and so does every instruction that one of those traps lies in. Returns the other
    /// sites that have lost their patch by that: a window elsewhere may do the site to which its `jmp` goes.
    #[must_use]
    fn trap_overlapping(&mut self, code: &CodeMemory, site: GuestLin) -> BTreeSet<GuestLin> {
        self.counts.conflicts += 1;
        let mut done = BTreeSet::new();
        let mut orphans = BTreeSet::new();
        let mut work = vec![site];
        while let Some(at) = work.pop() {
            if !done.insert(at) {
                continue;
            }
            let len = self.map.instruction_length(at).unwrap_or(1);
            let end = at.wrapping_add(u32::from(len));
            orphans.extend(self.undo_in(code, at, end));
            let first = at.wrapping_add(1);
            // Whoever has our first byte inside of it would execute the trap as an operand.
            work.extend(self.map.overlapping(at, first).iter().map(|(a, _)| *a).filter(|a| *a != at));
            if at == site {
                work.extend(self.map.overlapping(at, end).iter().map(|(a, _)| *a).filter(|a| *a != at));
            }
        }
        for at in done {
            self.interpret_at(code, at);
        }
        orphans.retain(|at| !self.interpreted.contains(at));
        orphans
    }

    /// Makes the first byte of a known instruction trap.
    fn interpret_at(&mut self, code: &CodeMemory, at: GuestLin) {
        self.interpreted.insert(at);
        if let Some(page) = self.pages.get(&at.page_number()) {
            page.show(code, at.page_offset(), &[UNSCANNED]);
        }
    }

    /// Where worlds are keyed, sees to it that no copy shows bytes that load PKRU: whatever they are part of is interpreted.
    pub fn hide_pkru_loaders(&mut self, code: &CodeMemory) {
        if !self.keyed {
            return;
        }
        // What is done to one page may change its neighbours.
        for _ in 0..LOADERS {
            let changed = self.pages.iter().filter(|(_, page)| page.changed.take());
            let changed: Vec<u32> = changed.map(|(number, _)| *number).collect();
            if changed.is_empty() {
                break;
            }
            self.hide_pkru_loaders_in(code, &changed);
        }
    }

    fn hide_pkru_loaders_in(&mut self, code: &CodeMemory, pages: &[u32]) {
        for &number in pages {
            for _ in 0..LOADERS {
                let Some(at) = self.shown_loader(code, number) else { break };
                let orphans = self.trap_overlapping(code, at);
                self.patch_sites(code, orphans);
            }
            if self.shown_loader(code, number).is_some()
                && let Some(page) = self.pages.get(&number)
            {
                page.show(code, 0, &[UNSCANNED; 4096]);
            }
        }
    }

    /// The first byte a copy shows of what loads PKRU.
    fn shown_loader(&self, code: &CodeMemory, number: u32) -> Option<GuestLin> {
        let page = self.pages.get(&number)?;
        let mut shown = [0u8; 4096];
        code.read(page.offset, &mut shown)?;
        loader_in(&shown, |_| false).map(|at| GuestLin(number << 12 | at as u32))
    }

    fn install(&mut self, code: &CodeMemory, id: PatchId) {
        self.changes += 1;
        let Some(patch) = self.patm.get(id) else { return };
        if log::log_enabled!(target: "patches", log::Level::Trace) {
            log::trace!(target: "patches", "{}", describe(patch));
        }
        let trampoline = patch.trampoline.clone();
        for w in &patch.writes {
            for (i, b) in w.bytes.iter().enumerate() {
                let at = w.at.wrapping_add(i as u32);
                if let Some(page) = self.pages.get(&at.page_number()) {
                    page.show(code, at.page_offset(), &[*b]);
                }
            }
        }
        if let Some(t) = trampoline {
            self.trampolines.write(code, t.at, &t.code);
        }
    }

    /// Scans from `eip`, whose page has a copy. Returns how many instructions were new.
    pub fn scan(&mut self, m: &mut Machine, code: &CodeMemory, cpu: &CpuState, eip: GuestLin) -> usize {
        self.counts.scans += 1;
        let page = eip.page_base();
        let options = ScanOptions {
            budget: 4096,
            follow_calls: true,
            range: Some(page..GuestLin(page.0.saturating_add(0x1000))),
            cs_base: 0,
            entry_is_target: true,
        };
        let report = self.scan_with(m, code, cpu, &[eip], &options);
        let found = report.instructions.len();
        let mut meeting = self.meeting(&report);
        // Each round finds instructions that were not known, in pages that are; bounded because the guest wrote them.
        for _ in 0..MEETINGS {
            let Some(at) = meeting.pop_first() else { break };
            let page = at.page_base();
            let range = Some(page..GuestLin(page.0.saturating_add(0x1000)));
            let report = self.scan_with(m, code, cpu, &[at], &ScanOptions { range, ..options.clone() });
            meeting.extend(self.meeting(&report));
        }
        found
    }

    /// Where a path of one page goes on in the middle of an instruction of another, in whichever order the two were
    /// scanned. Found from there the other instruction is not patched as if nobody came that way.
    fn meeting(&self, report: &ScanReport) -> BTreeSet<GuestLin> {
        let mut all: BTreeSet<GuestLin> = report.inside.iter().copied().collect();
        for &(at, len) in &report.instructions {
            let end = at.wrapping_add(u32::from(len));
            let page = at.page_base();
            // Within the page the scan has followed them, and what is left of others is no code any more.
            let inner = (1..u32::from(len)).map(|i| at.wrapping_add(i)).filter(|b| b.page_base() != page);
            all.extend(inner.filter(|b| self.map.is_target(*b)));
            if at.page_offset() < 15 && page.0 > 0 {
                let before = self.map.overlapping(GuestLin(page.0 - 1), page);
                let ends = before.iter().map(|(a, l)| a.wrapping_add(u32::from(*l)));
                all.extend(ends.filter(|e| at < *e && *e < end));
            }
        }
        all.retain(|at| !self.map.is_instruction_start(*at));
        all
    }

    fn scan_with(
        &mut self,
        m: &mut Machine,
        code: &CodeMemory,
        cpu: &CpuState,
        entries: &[GuestLin],
        options: &ScanOptions,
    ) -> ScanReport {
        let report = {
            let m = &*m;
            let mut source = |at: GuestLin, buf: &mut [u8]| -> usize {
                let Some(leaf) = peek(m, cpu, at) else { return 0 };
                if leaf.no_execute || !m.is_ram(leaf.frame) {
                    return 0;
                }
                let n = buf.len().min(0x1000 - at.page_offset());
                m.read_ram(leaf.frame.wrapping_add(at.page_offset() as u64), &mut buf[..n]);
                n
            };
            self.map.scan_all(entries, &mut source, options)
        };
        self.take_in(m, code, cpu, &report);
        report
    }

    /// Copies what a scan found and patches it.
    fn take_in(&mut self, m: &mut Machine, code: &CodeMemory, cpu: &CpuState, report: &ScanReport) {
        self.counts.instructions += report.instructions.len() as u64;
        for &number in &report.pages {
            if !self.pages.contains_key(&number)
                && let Some(leaf) = peek(m, cpu, GuestLin(number << 12))
            {
                self.page(m, code, GuestLin(number << 12), (leaf.frame.0 >> 12) as u32);
            }
        }
        // A new branch target inside a window, or a new instruction over an old window's filler: plan it again.
        let mut again = BTreeSet::new();
        for &t in &report.targets {
            if let Some(p) = self.patm.patch_at(t.0)
                && p.start != t
            {
                let (lo, hi) = (p.start, p.start.wrapping_add(u32::from(p.len)));
                again.extend(self.undo_in(code, lo, hi));
            }
        }
        for &(at, len) in &report.instructions {
            let hi = at.wrapping_add(u32::from(len));
            if !self.patm.is_free(at.0, u32::from(len)) {
                let overlapped = self.undo_in(code, at, hi);
                again.extend(overlapped);
            }
            let mut i = 0;
            while i < u32::from(len) {
                let lin = at.wrapping_add(i);
                let n = (0x1000 - lin.page_offset() as u32).min(u32::from(len) - i);
                if let Some(page) = self.pages.get(&lin.page_number()) {
                    let from = lin.page_offset();
                    page.show(code, from, &page.original[from..from + n as usize]);
                }
                i += n;
            }
        }
        // An instruction over a trap would execute it as an operand, and its bytes have just gone over the trap.
        for &(at, len) in &report.instructions {
            let inside = at.wrapping_add(1)..at.wrapping_add(u32::from(len));
            if inside.start < inside.end && self.interpreted.range(inside).next().is_some() {
                again.extend(self.trap_overlapping(code, at));
            }
        }
        again.extend(report.sites.iter().map(|s| s.at));
        let copies: Vec<_> = report.instructions.iter().filter(|i| self.is_copy(i)).map(|i| i.0).collect();
        self.slow.extend(copies);
        self.patch_sites(code, again);
        self.assert_only_scanned(code, &report.pages);
    }

    /// A write hit frame `at`: updates every copy of it. Returns false when there is none.
    pub fn code_written(&mut self, m: &mut Machine, code: &CodeMemory, at: GuestPhys, len: u32) {
        let pfn = (at.0 >> 12) as u32;
        let Some(numbers) = self.by_frame.get(&pfn).cloned() else { return };
        for number in numbers {
            let Some(page) = self.pages.get_mut(&number) else { continue };
            self.counts.code_writes += 1;
            page.writes += 1;
            if page.writes > page.write_limit {
                // A page that is data more than code: let it be written, scan it again if it is ever executed.
                let limit = page.write_limit.saturating_mul(2).min(4096);
                self.next_limit.insert(pfn, limit);
                self.drop_page(m, code, number);
                continue;
            }
            let from = at.page_offset();
            let to = (from + len as usize).min(4096);
            let mut now = [0u8; 4096];
            m.read_ram(at, &mut now[from..to]);
            let changed = |i: &usize| now[*i] != page.original[*i];
            let (Some(first), Some(last)) = ((from..to).find(changed), (from..to).rev().find(changed)) else {
                continue;
            };
            page.original[first..=last].copy_from_slice(&now[first..=last]);
            let base = GuestLin(number << 12);
            let lo = base.wrapping_add(first as u32);
            let hi = base.wrapping_add(last as u32 + 1);
            self.respan(code, lo, hi);
        }
    }

    /// Finds out which copied frames were written to behind our back, and follows.
    pub fn compare(&mut self, m: &mut Machine, code: &CodeMemory) {
        let mut changed = BTreeSet::new();
        for page in self.pages.values() {
            let mut now = [0u8; 4096];
            m.read_ram(GuestPhys(u64::from(page.pfn) << 12), &mut now);
            if now != *page.original {
                changed.insert(page.pfn);
            }
        }
        for pfn in changed {
            self.code_written(m, code, GuestPhys(u64::from(pfn) << 12), 4096);
        }
    }

    fn respan(&mut self, code: &CodeMemory, lo: GuestLin, hi: GuestLin) {
        let known = self.map.overlapping(lo, hi);
        if known.is_empty() && self.patm.is_free(lo.0, hi.0.wrapping_sub(lo.0)) {
            return;
        }
        self.counts.rescans += 1;
        let orphans = self.undo_in(code, lo, hi);
        // Not decoded again before it is executed: a change may come in several stores, and what lies between them is
        // no code anybody wrote.
        self.map.forget_span(lo, hi);
        for (at, _) in &known {
            self.interpreted.remove(at);
        }
        for &(at, len) in &known {
            self.refresh(code, at, at.wrapping_add(u32::from(len)));
        }
        self.refresh(code, lo, hi);
        self.patch_sites(code, orphans);
        self.assert_only_scanned(code, &[lo.page_number()]);
    }

    /// A known sensitive instruction that no patch holds and that has no trap: it would run natively.
    #[must_use]
    pub fn unguarded(&self) -> Option<GuestLin> {
        self.map.pages().find_map(|(number, _)| self.unguarded_in(number))
    }

    fn unguarded_in(&self, number: u32) -> Option<GuestLin> {
        let patched =
            |at: GuestLin| self.patm.patch_at(at.0).is_some_and(|p| p.sites.iter().any(|s| s.at == at));
        let mut sites = self.map.page(number)?.sites().iter().map(|s| s.at);
        sites.find(|at| !patched(*at) && !self.interpreted.contains(at))
    }

    /// In a debug build: every byte the view shows in these pages is unscanned filler, a byte of proven code, or part of
    /// a patch. So no ring-0 byte can be executed that was not scanned, and no sensitive instruction that was.
    fn assert_only_scanned(&self, code: &CodeMemory, pages: &[u32]) {
        if !cfg!(debug_assertions) {
            return;
        }
        for number in pages {
            assert_eq!(self.unguarded_in(*number), None, "neither patched nor trapped");
            let Some(page) = self.pages.get(number) else { continue };
            for i in 0..4096u32 {
                let at = GuestLin(number << 12 | i);
                let shown = code.read_u8(page.offset + u64::from(i));
                let fine = shown == Some(UNSCANNED)
                    || self.patm.patch_at(at.0).is_some()
                    || !matches!(self.patm.locate(at.0), Location::Guest)
                    || self.map.proven(at) && shown == Some(page.original[i as usize]);
                assert!(fine, "the code view shows an unscanned byte at {at}: {shown:02x?}");
            }
        }
    }

    /// The view shows something else than a trap at `eip`, and yet no known instruction starts there: guest code jumped
    /// into the middle of one.
    #[must_use]
    pub fn is_mid_instruction(&self, code: &CodeMemory, eip: GuestLin) -> bool {
        self.pages.get(&eip.page_number()).is_some_and(|page| {
            !self.map.is_instruction_start(eip)
                && code.read_u8(page.offset + eip.page_offset() as u64) != Some(UNSCANNED)
                && matches!(self.patm.locate(eip.0), Location::Guest)
        })
    }

    /// `eip` lies in a known instruction and is the start of none, or it lies in filler that holds the slot of a short
    /// jump: what runs there was never scanned.
    #[must_use]
    pub fn is_unscanned_inside(&self, eip: GuestLin) -> bool {
        let slot = match self.patm.locate(eip.0) {
            Location::PatchStart(id) | Location::MidWindow { id, .. } => {
                self.patm.get(id).is_some_and(|p| eip.0.wrapping_sub(p.start.0) >= u32::from(p.len))
            }
            _ => false,
        };
        slot || !self.map.is_instruction_start(eip) && self.map.proven(eip)
    }

    /// The original instruction bytes at `at` are proven code: executing it there is no surprise.
    #[must_use]
    pub fn is_proven_start(&self, at: GuestLin) -> bool {
        self.map.is_instruction_start(at)
    }

    /// Where EIP stands in our patches.
    #[must_use]
    pub fn locate(&self, eip: u32) -> Location {
        self.patm.locate(eip)
    }
}

#[cfg(test)]
mod tests;
