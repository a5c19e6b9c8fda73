//! The ring-3 code view: RAM itself, except for pages that hold an instruction that would silently go wrong.
//!
//! Ring-3 code needs no scan to be contained, and nearly all of its pages are mapped as they are. Only a page that
//! holds the bytes of `cpuid` (0f a2), `int 80h` (cd 80) or of the descriptor-table readers (0f 00, 0f 01, 0f 02,
//! 0f 03: `sldt`, `str`, `verr`, `sgdt`, `smsw`, `lar`, `lsl`) is copied: the copy starts as `hlt`, code is copied into
//! it as far as it is found to be executed, and those instructions keep an `hlt` as their first byte.
//!
//! An instruction may run into a copied page from the page before. If that one is a copy too, its scan says where the
//! tail ends. If it is shown directly, nobody has scanned it: x86 code decoded from any of many starting points soon
//! falls into step, so all of them must agree on the first boundary in the copied page; where they do not, the page
//! before is copied as well.

use super::kernel_code::{UNSCANNED, put};
use super::layout::{Layout, USER_TRAMP_LEN, USER_TRAMPS};
use super::trampolines::Trampolines;
use crate::cpum::CpuState;
use crate::machine::Machine;
use crate::pgm::walk::peek;
use csam::pkru::loader_in;
use csam::{CodeMap, CodeSize, GuestLin, GuestPhys, ScanOptions, SensitiveKind};
use host_driver_shim::code_memory::CodeMemory;
use iced_x86::{Decoder, DecoderOptions};
use patm::{Config, Fix, LongGate, UserPatch, UserPatcher};
use std::collections::{HashMap, HashSet, VecDeque};

/// Pages remembered as to be copied. Past this they are forgotten and found again.
const MAX_FORCED: usize = 1 << 16;
/// Copies kept. Past this the oldest goes: address-space randomisation shows a shared page at ever new addresses.
const MAX_COPIES: usize = 2048;

struct UserPage {
    offset: u64,
    map: CodeMap,
    bytes: Box<[u8; 4096]>,
    /// All of it is shown as it is.
    whole: bool,
    /// Two streams of instructions overlap where a patch was: the page gets none any more.
    unpatchable: bool,
}

/// What the patcher calls a copied page.
fn key_of(number: u32, pfn: u32) -> u64 {
    u64::from(number) << 32 | u64::from(pfn)
}

/// How a page is to be shown to instruction fetch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum View {
    /// The RAM page itself.
    Direct,
    /// The copy at this offset of the code memory.
    Copy(u64),
    /// A copy is needed and there is no memory for it.
    NoMemory,
}

/// The copied pages of ring-3 code, by linear page and frame.
#[derive(Default)]
pub struct UserCode {
    pages: HashMap<(u32, u32), UserPage>,
    /// Copied pages, oldest first; some may be gone.
    order: VecDeque<(u32, u32)>,
    /// What makes system calls without a host signal.
    patcher: Option<UserPatcher>,
    /// For confined worlds: how they leave.
    long_gate: Option<LongGate>,
    /// For keyed worlds: every page is a copy, and none shows code that loads PKRU.
    keyed: bool,
    /// `int n` raises an exception by itself that says n.
    int_faults: bool,
    /// The memory of the patches' trampolines.
    pub trampolines: Trampolines,
    by_frame: HashMap<u32, Vec<u32>>,
    /// Pages to be copied though nothing in them asks for it.
    forced: HashSet<(u32, u32)>,
    /// Frames that have just become code: writable mappings of them must go.
    pub newly_tracked: Vec<u32>,
    /// Copies that are gone: (linear page address, frame).
    pub dropped: Vec<(GuestLin, u32)>,
    /// Pages looked at.
    pub looked_at: u64,
    /// Pages copied.
    pub copied: u64,
}

/// Whether a pair of bytes makes a page a candidate; `int_faults`: `int 80h` does not. Without branches, so that
/// [`has_candidate`] becomes vector code.
fn candidate(first: u8, second: u8, int_faults: bool) -> bool {
    (first == 0x0f) & ((second == 0xa2) | (second <= 3)) | (first == 0xcd) & (second == 0x80) & !int_faults
}

fn has_candidate(bytes: &[u8; 4096], int_faults: bool) -> bool {
    bytes.iter().zip(&bytes[1..]).fold(false, |found, (&a, &b)| found | candidate(a, b, int_faults))
}

/// Whether the instruction must not run natively in ring 3.
fn must_trap(kind: SensitiveKind, int_faults: bool) -> bool {
    if kind == SensitiveKind::Int {
        return !int_faults;
    }
    matches!(
        kind,
        SensitiveKind::Cpuid
            | SensitiveKind::Sgdt
            | SensitiveKind::Sidt
            | SensitiveKind::Sldt
            | SensitiveKind::Str
            | SensitiveKind::Smsw
            | SensitiveKind::Lar
            | SensitiveKind::Lsl
            | SensitiveKind::Verr
            | SensitiveKind::Verw
    )
}

/// Where the first instruction behind byte 64 starts, counted from there, if decoding from each of the first 32 bytes
/// comes to the same answer.
fn agreed_boundary(bytes: &[u8; 80]) -> Option<usize> {
    let mut agreed = None;
    for start in 0..32 {
        let mut at = start;
        let mut decoder = Decoder::new(32, bytes, DecoderOptions::NONE);
        while at < 64 {
            decoder.set_position(at).ok()?;
            let i = decoder.decode();
            // Bytes that do not decode say nothing: step over one.
            at += if i.is_invalid() { 1 } else { i.len() };
        }
        let head = at - 64;
        if *agreed.get_or_insert(head) != head {
            return None;
        }
    }
    agreed
}

impl UserCode {
    /// For worlds where nothing is patched.
    #[must_use]
    pub fn new(int_faults: bool) -> UserCode {
        UserCode { int_faults, ..UserCode::default() }
    }

    /// For joint worlds with this layout, where system calls are done in line; with `long_gate`, for confined ones, where they
    /// leave by it.
    #[must_use]
    pub fn patching(layout: &Layout, count_inline: bool, long_gate: Option<LongGate>) -> UserCode {
        let mut patcher = UserPatcher::new(Config {
            tramp_base: layout.user_tramp(),
            tramp_len: USER_TRAMP_LEN,
            vcpu_base: layout.vcpu,
            count_inline,
            ring: 3,
            keys: layout.keys(),
        });
        for base in USER_TRAMPS {
            patcher = patcher.with_region(base, USER_TRAMP_LEN);
        }
        if let Some(gate) = long_gate {
            patcher = patcher.leaving_by(gate);
        }
        UserCode { patcher: Some(patcher), long_gate, keyed: layout.transit.is_some(), ..UserCode::default() }
    }

    /// Whether anything is patched.
    #[must_use]
    pub fn is_patching(&self) -> bool {
        self.patcher.is_some()
    }

    /// Is `eip` in the memory of our trampolines? And if it is on a boundary of one, whose and what it stands for.
    #[must_use]
    pub fn locate(&self, eip: u32) -> Option<Option<(&UserPatch, Fix)>> {
        let patcher = self.patcher.as_ref().filter(|p| p.owns(eip))?;
        Some(patcher.locate(eip))
    }

    /// The `int n` whose trampoline left by the gate with this reason.
    #[must_use]
    pub fn by_reason(&self, word: u32) -> Option<&UserPatch> {
        self.patcher.as_ref()?.by_reason(word)
    }

    /// System calls that are patched now.
    #[must_use]
    pub fn patches(&self) -> usize {
        self.patcher.as_ref().map_or(0, |p| p.patches().count())
    }

    /// Undoes the patches of a page; their trampolines trap.
    fn unpatch(&mut self, code: &CodeMemory, key: (u32, u32)) {
        let removed = self.patcher.as_mut().map(|p| p.remove(key_of(key.0, key.1))).unwrap_or_default();
        for patch in removed {
            self.trampolines.erase(code, patch.trampoline.at, patch.trampoline.code.len());
        }
    }

    /// Gives up one copy.
    fn drop_page(&mut self, m: &mut Machine, code: &CodeMemory, key: (u32, u32)) {
        let Some(page) = self.pages.remove(&key) else { return };
        self.unpatch(code, key);
        code.free(page.offset);
        m.untrack(key.1);
        if let Some(list) = self.by_frame.get_mut(&key.1) {
            list.retain(|&n| n != key.0);
        }
        self.dropped.push((GuestLin(key.0 << 12), key.1));
    }

    /// Number of copies.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// There are no copies.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The page of `lin`, frame `pfn`, can be shown as it is, or its copy is known; None: it needs a copy.
    pub fn known_view(&self, m: &Machine, cpu: &CpuState, lin: GuestLin, pfn: u32) -> Option<View> {
        let key = (lin.page_number(), pfn);
        if let Some(p) = self.pages.get(&key) {
            return Some(View::Copy(p.offset));
        }
        if self.keyed {
            return None;
        }
        let mut bytes = [0u8; 4096];
        m.read_ram(GuestPhys(u64::from(pfn) << 12), &mut bytes);
        self.may_be_shown_whole(m, cpu, lin, pfn, &bytes).then_some(View::Direct)
    }

    /// Nothing in the page would silently go wrong.
    fn may_be_shown_whole(
        &self,
        m: &Machine,
        cpu: &CpuState,
        lin: GuestLin,
        pfn: u32,
        bytes: &[u8; 4096],
    ) -> bool {
        let key = (lin.page_number(), pfn);
        let straddles = matches!(bytes[4095], 0x0f | 0xcd) && self.straddles(m, cpu, lin, bytes[4095]);
        !self.forced.contains(&key) && !straddles && !has_candidate(bytes, self.int_faults)
    }

    /// A pair begins with `last`, the last byte of the page of `lin`, and ends in the next, or that is not known.
    fn straddles(&self, m: &Machine, cpu: &CpuState, lin: GuestLin, last: u8) -> bool {
        peek(m, cpu, lin.page_base().wrapping_add(0x1000)).is_none_or(|l| {
            let mut b = [0u8; 1];
            m.read_ram(l.frame, &mut b);
            candidate(last, b[0], self.int_faults)
        })
    }

    /// How the page of `lin`, frame `pfn`, is to be shown.
    pub fn view(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        code: &CodeMemory,
        lin: GuestLin,
        pfn: u32,
    ) -> View {
        let key = (lin.page_number(), pfn);
        if let Some(p) = self.pages.get(&key) {
            return View::Copy(p.offset);
        }
        self.looked_at += 1;
        if let Some(view) = self.known_view(m, cpu, lin, pfn) {
            return view;
        }
        let mut bytes = Box::new([0u8; 4096]);
        m.read_ram(GuestPhys(u64::from(pfn) << 12), &mut bytes[..]);
        while self.pages.len() >= MAX_COPIES {
            let Some(oldest) = self.order.pop_front() else { break };
            self.drop_page(m, code, oldest);
        }
        let Some(offset) = code.alloc() else { return View::NoMemory };
        let whole = self.keyed
            && loader_in(&bytes[..], |_| false).is_none()
            && self.may_be_shown_whole(m, cpu, lin, pfn, &bytes);
        put(code, offset, if whole { &bytes[..] } else { &[UNSCANNED; 4096] });
        if self.order.len() > 4 * MAX_COPIES {
            let pages = &self.pages;
            self.order.retain(|key| pages.contains_key(key));
        }
        self.order.push_back(key);
        if m.track(pfn) {
            self.newly_tracked.push(pfn);
        }
        self.copied += 1;
        self.by_frame.entry(pfn).or_default().push(lin.page_number());
        let map = CodeMap::new(CodeSize::Bits32);
        if !whole {
            let head = self.head(m, cpu, code, lin.page_base());
            put(code, offset, &bytes[..head]);
        }
        self.pages.insert(key, UserPage { offset, map, bytes, whole, unpatchable: false });
        self.hide_loaders(code, key);
        View::Copy(offset)
    }

    /// How many bytes at the start of the page at `base` belong to an instruction of the page before.
    fn head(&mut self, m: &Machine, cpu: &CpuState, code: &CodeMemory, base: GuestLin) -> usize {
        let before = base.wrapping_add(0u32.wrapping_sub(0x1000));
        let Some(leaf) = peek(m, cpu, before) else { return 0 };
        if !leaf.user || leaf.no_execute || !m.is_ram(leaf.frame) {
            return 0;
        }
        let key = (before.page_number(), (leaf.frame.0 >> 12) as u32);
        if let Some(p) = self.pages.get(&key).filter(|p| !p.whole) {
            let crossing = p.map.overlapping(base, base.wrapping_add(1));
            return crossing
                .iter()
                .map(|(at, len)| at.0.wrapping_add(u32::from(*len)).wrapping_sub(base.0))
                .max()
                .unwrap_or(0) as usize;
        }
        let mut bytes = [0u8; 64 + 16];
        m.read_ram(leaf.frame.wrapping_add(0x1000 - 64), &mut bytes[..64]);
        if let Some(own) = peek(m, cpu, base) {
            m.read_ram(own.frame, &mut bytes[64..]);
        }
        match agreed_boundary(&bytes) {
            Some(head) => head,
            None => {
                // Shown directly until now: from here on a copy, so that its scan tells.
                if self.forced.len() >= MAX_FORCED {
                    self.forced.clear();
                }
                self.forced.insert(key);
                self.dropped.push((before, key.1));
                if let Some(p) = self.pages.get_mut(&key) {
                    p.whole = false;
                    put(code, p.offset, &[UNSCANNED; 4096]);
                }
                0
            }
        }
    }

    /// `lin` is in a copied page and has not been found to be an instruction yet.
    #[must_use]
    pub fn is_unscanned(&self, lin: GuestLin, pfn: u32) -> bool {
        self.pages
            .get(&(lin.page_number(), pfn))
            .is_some_and(|p| !p.whole && !p.map.is_instruction_start(lin))
    }

    /// Follows the code from `lin` within its page and copies what it finds. False if nothing new was found.
    pub fn scan(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        code: &CodeMemory,
        lin: GuestLin,
        pfn: u32,
    ) -> bool {
        let Some(page) = self.pages.get_mut(&(lin.page_number(), pfn)) else { return false };
        let base = lin.page_base();
        let own = &page.bytes;
        let m = &*m;
        let mut source = |at: GuestLin, buf: &mut [u8]| -> usize {
            if at.page_base() != base {
                let Some(leaf) = peek(m, cpu, at).filter(|l| l.user && !l.no_execute) else { return 0 };
                let n = buf.len().min(0x1000 - at.page_offset());
                m.read_ram(leaf.frame.wrapping_add(at.page_offset() as u64), &mut buf[..n]);
                return n;
            }
            let n = buf.len().min(0x1000 - at.page_offset());
            buf[..n].copy_from_slice(&own[at.page_offset()..at.page_offset() + n]);
            n
        };
        let options = ScanOptions {
            range: Some(base..GuestLin(base.0.saturating_add(0x1000))),
            ..ScanOptions::default()
        };
        let report = page.map.scan(lin, &mut source, &options);
        for &(at, len) in &report.instructions {
            let from = at.page_offset();
            let to = (from + usize::from(len)).min(4096);
            put(code, page.offset + from as u64, &page.bytes[from..to]);
        }
        for site in page.map.sites().filter(|s| must_trap(s.kind, self.int_faults)) {
            if site.at.page_base() == base {
                put(code, page.offset + site.at.page_offset() as u64, &[UNSCANNED]);
            }
        }
        let starts: Vec<GuestLin> = report.instructions.iter().map(|(at, _)| *at).collect();
        self.patch(code, (lin.page_number(), pfn), &starts);
        let found = !report.instructions.is_empty();
        // The tail of an instruction that runs into the next page, if that one is a copy.
        let next = base.wrapping_add(0x1000);
        let tail = report
            .instructions
            .iter()
            .map(|(at, len)| (at.page_offset() + usize::from(*len)).saturating_sub(0x1000))
            .max()
            .unwrap_or(0);
        if tail > 0
            && let Some(leaf) = peek(m, cpu, next)
            && let Some(p) = self.pages.get(&(next.page_number(), (leaf.frame.0 >> 12) as u32))
        {
            put(code, p.offset, &p.bytes[..tail]);
            let next = (next.page_number(), (leaf.frame.0 >> 12) as u32);
            self.hide_loaders(code, next);
        }
        self.hide_loaders(code, (lin.page_number(), pfn));
        found
    }

    /// In a keyed world, sees to it that a copy shows nothing that loads PKRU: the instruction whose bytes those are traps instead.
    fn hide_loaders(&mut self, code: &CodeMemory, key: (u32, u32)) {
        if !self.keyed {
            return;
        }
        let Some(page) = self.pages.get(&key).filter(|p| !p.whole) else { return };
        let offset = page.offset;
        let mut shown = [0u8; 4096];
        let look = |shown: &mut [u8; 4096]| {
            if code.read(offset, shown).is_none() {
                shown.fill(0);
            }
            loader_in(&shown[..], |_| false)
        };
        if look(&mut shown).is_none() {
            return;
        }
        // Patches of the page go first: what they wrote could be part of it.
        self.give_up_patches(code, key);
        let base = GuestLin(key.0 << 12);
        while let Some(at) = look(&mut shown) {
            let lin = base.wrapping_add(at as u32);
            self.trap_what_runs_in(code, key.0.wrapping_sub(1), lin);
            let Some(page) = self.pages.get(&key) else { return };
            for (start, _) in page.map.overlapping(lin, lin.wrapping_add(1)) {
                if start.page_base() == base {
                    put(code, offset + start.page_offset() as u64, &[UNSCANNED]);
                }
            }
            put(code, offset + at as u64, &[UNSCANNED]);
        }
    }

    /// The byte at `lin` is about to trap: an instruction that runs there from the page before, `number`, is to trap as a whole.
    fn trap_what_runs_in(&mut self, code: &CodeMemory, number: u32, lin: GuestLin) {
        if lin.page_offset() >= 15 {
            return; // None is longer.
        }
        for (_, page) in self.pages.iter_mut().filter(|(key, _)| key.0 == number) {
            if std::mem::take(&mut page.whole) {
                // Not known where its instructions are: from here on they are scanned.
                put(code, page.offset, &[UNSCANNED; 4096]);
            }
            for (start, _) in page.map.overlapping(lin, lin.wrapping_add(1)) {
                put(code, page.offset + start.page_offset() as u64, &[UNSCANNED]);
            }
        }
    }

    /// Undoes the patches of a page, which gets no others.
    fn give_up_patches(&mut self, code: &CodeMemory, key: (u32, u32)) {
        let (Some(patcher), Some(page)) = (&self.patcher, self.pages.get_mut(&key)) else { return };
        page.unpatchable = true;
        for p in patcher.patches().filter(|p| p.key == key_of(key.0, key.1)) {
            let (from, len) = (p.start.page_offset(), p.write.bytes.len());
            put(code, page.offset + from as u64, &page.bytes[from..from + len]);
            put(code, page.offset + p.site.page_offset() as u64, &[UNSCANNED]);
        }
        self.unpatch(code, key);
    }

    /// Makes every system call of a copied page that can do without an exit do without. `new`: instructions just found.
    fn patch(&mut self, code: &CodeMemory, key: (u32, u32), new: &[GuestLin]) {
        let name = key_of(key.0, key.1);
        let (Some(patcher), Some(page)) = (&mut self.patcher, self.pages.get_mut(&key)) else { return };
        if page.unpatchable {
            return;
        }
        let inside = |at: &GuestLin| {
            patcher.at(name, at.0).is_some_and(|p| p.start != *at && p.forward(at.0).is_none())
        };
        if new.iter().any(inside) {
            // The jump's bytes would be executed as something else.
            self.give_up_patches(code, key);
            return;
        }
        let base = GuestLin(key.0 << 12);
        let sites: Vec<GuestLin> = page
            .map
            .sites()
            .filter(|s| s.kind == SensitiveKind::Int && s.at.page_base() == base)
            .map(|s| s.at)
            .collect();
        let mut trampolines = Vec::new();
        for site in sites {
            let bytes = &page.bytes;
            let fetch = |at: GuestLin, buf: &mut [u8]| {
                if at.page_base() != base {
                    return 0;
                }
                let n = buf.len().min(0x1000 - at.page_offset());
                buf[..n].copy_from_slice(&bytes[at.page_offset()..at.page_offset() + n]);
                n
            };
            match patcher.patch_int(name, &page.map, fetch, site) {
                Ok(patch) => {
                    put(code, page.offset + patch.write.at.page_offset() as u64, &patch.write.bytes);
                    trampolines.push(patch.trampoline.clone());
                }
                Err(refusal) => log::debug!(target: "patches", "int at {site} of ring 3: {}", refusal.name()),
            }
        }
        for t in trampolines {
            self.trampolines.write(code, t.at, &t.code);
        }
    }

    /// Gives up every copy and starts afresh at another layout.
    pub fn reset(&mut self, m: &mut Machine, code: &CodeMemory, layout: &Layout, count_inline: bool) {
        for ((_, pfn), page) in self.pages.drain() {
            code.free(page.offset);
            m.untrack(pfn);
        }
        self.trampolines.free(code);
        let (looked_at, copied) = (self.looked_at, self.copied);
        let fresh = match self.patcher {
            Some(_) if self.keyed => UserCode::patching(layout, count_inline, None),
            Some(_) => UserCode::patching(&Layout { transit: None, ..*layout }, count_inline, self.long_gate),
            None => UserCode::new(self.int_faults),
        };
        *self = UserCode { looked_at, copied, ..fresh };
    }

    /// Finds out which copied frames were written to behind our back, and gives up their copies.
    pub fn compare(&mut self, m: &mut Machine, code: &CodeMemory) {
        let mut changed = HashSet::new();
        for ((_, pfn), page) in &self.pages {
            let mut now = [0u8; 4096];
            m.read_ram(GuestPhys(u64::from(*pfn) << 12), &mut now);
            if now != *page.bytes {
                changed.insert(*pfn);
            }
        }
        for pfn in changed {
            self.code_written(m, code, GuestPhys(u64::from(pfn) << 12));
        }
    }

    /// A write hit a frame: its copies are given up and made anew when they are executed again.
    pub fn code_written(&mut self, m: &mut Machine, code: &CodeMemory, at: GuestPhys) {
        let pfn = (at.0 >> 12) as u32;
        for number in self.by_frame.remove(&pfn).unwrap_or_default() {
            self.drop_page(m, code, (number, pfn));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::machine;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    #[test]
    fn decoders_fall_into_step_on_code_and_not_on_noise() {
        // Nothing but `add eax, 05050505h`: every start keeps its own step of five.
        let mut code = [0x05u8; 80];
        assert_eq!(agreed_boundary(&code), None);
        // Preceded by a few one-byte instructions every start agrees.
        code[..58].fill(0x90);
        code[58..63].copy_from_slice(&[0xb8, 0, 0, 0, 0]);
        code[63..68].copy_from_slice(&[0xb8, 0, 0, 0, 0]);
        assert_eq!(agreed_boundary(&code), Some(4));
    }

    #[test]
    fn pairs_that_go_wrong_silently_make_a_page_a_candidate() {
        for int_faults in [false, true] {
            let candidate = |first, second| candidate(first, second, int_faults);
            assert!(candidate(0x0f, 0xa2) && candidate(0x0f, 0x01));
            assert_ne!(candidate(0xcd, 0x80), int_faults);
            assert!(!candidate(0x0f, 0xaf) && !candidate(0xcd, 0x81) && !candidate(0x90, 0xa2));
        }
    }

    /// The view of a keyed world with this code at `at`, guest linear and physical, whose first page is shown.
    fn keyed_view(m: &mut Machine, code: &CodeMemory, bytes: &[u8], at: u32) -> UserCode {
        m.write_ram(GuestPhys(u64::from(at)), bytes);
        let mut view = UserCode::patching(&Layout::CANDIDATES[0].keyed(0), false, None);
        assert!(matches!(show(&mut view, m, code, at), View::Copy(_)));
        view
    }

    fn show(view: &mut UserCode, m: &mut Machine, code: &CodeMemory, at: u32) -> View {
        view.view(m, &CpuState::reset(), code, GuestLin(at & !0xfff), at >> 12)
    }

    fn shown(view: &UserCode, code: &CodeMemory, at: u32) -> [u8; 4096] {
        let mut page = [0u8; 4096];
        code.read(view.pages[&(at >> 12, at >> 12)].offset, &mut page).unwrap();
        page
    }

    #[test]
    fn an_instruction_whose_end_in_the_next_page_loads_pkru_traps_where_it_starts() {
        let (mut m, code) = (machine(1), CodeMemory::new(1 << 20).unwrap());
        // 8fffh: mov eax, 00ef010fh; ret
        let mut bytes = vec![0x90; 0x1000];
        bytes[0xfff] = 0xb8;
        bytes.extend([0x0f, 0x01, 0xef, 0x00, 0xc3]);
        let cpu = CpuState::reset();
        for next_is_first in [false, true] {
            let mut view = keyed_view(&mut m, &code, &bytes, 0x8000);
            if next_is_first {
                show(&mut view, &mut m, &code, 0x9000);
            }
            view.scan(&mut m, &cpu, &code, GuestLin(0x8ff0), 8);
            show(&mut view, &mut m, &code, 0x9000);
            view.scan(&mut m, &cpu, &code, GuestLin(0x9004), 9);
            let (before, behind) = (shown(&view, &code, 0x8000), shown(&view, &code, 0x9000));
            assert_eq!((before[0xfff], loader_in(&behind, |_| false)), (UNSCANNED, None));
            assert_eq!(behind[4], 0xc3);
        }
    }

    /// Pieces of code that load PKRU, nearly do, or do together with their neighbours.
    const PIECES: [&[u8]; 10] = [
        &[0x0f, 0x01, 0xef],                         // wrpkru
        &[0x0f, 0xae, 0x2f],                         // xrstor [edi]
        &[0xb8, 0x0f, 0x01, 0xef, 0x00],             // mov eax, 00ef010fh
        &[0x68, 0x0f, 0xae, 0x6f, 0x00],             // push 006fae0fh
        &[0x01, 0xef],                               // add edi, ebp
        &[0x04, 0x0f],                               // add al, 0fh
        &[0xb8, 0x14, 0x00, 0x00, 0x00, 0xcd, 0x80], // mov eax, 14h; int 80h
        &[0xb8, 0x0f, 0x01, 0xef, 0x00, 0xcd, 0x80],
        &[0x90],
        &[0x75, 0x03], // jne
    ];

    proptest! {
        #[test]
        fn no_copy_of_a_keyed_world_loads_pkru(
            pieces in vec(select(&PIECES[..]), 0..40),
            at in prop_oneof![Just(0usize), 0..4096usize, 4080..4096usize],
            entries in vec(0..64usize, 1..6),
        ) {
            const PAGE: u32 = 0x8000;
            let (mut m, code) = (machine(1), CodeMemory::new(1 << 20).unwrap());
            let cpu = CpuState::reset();
            let mut page = [0x90u8; 4096];
            for (to, from) in page[at..].iter_mut().zip(pieces.concat()) {
                *to = from;
            }
            let mut view = keyed_view(&mut m, &code, &page, PAGE);
            let lin = GuestLin(PAGE);
            let View::Copy(offset) = show(&mut view, &mut m, &code, PAGE) else { panic!("not a copy") };
            let mut shown = [0u8; 4096];
            for entry in entries {
                code.read(offset, &mut shown).unwrap();
                prop_assert_eq!(loader_in(&shown, |_| false), None);
                let at = lin.wrapping_add(((at + entry) & 0xfff) as u32);
                if view.is_unscanned(at, PAGE >> 12) {
                    view.scan(&mut m, &cpu, &code, at, PAGE >> 12);
                }
            }
            code.read(offset, &mut shown).unwrap();
            prop_assert_eq!(loader_in(&shown, |_| false), None);
            // What it shows besides traps and patches is the page's own.
            let patched = |i: usize| {
                let at = lin.wrapping_add(i as u32);
                view.patcher.iter().flat_map(|p| p.patches()).any(|p| p.start <= at && at < p.end())
            };
            for (i, (now, own)) in shown.iter().zip(page).enumerate() {
                prop_assert!(*now == UNSCANNED || *now == own || patched(i), "{:x}", i);
            }
        }
    }
}
