//! One world with what the monitor knows of it: both shadow views and the descriptors installed.

use super::layout::Layout;
use super::segments::{Published, SegmentCache};
use crate::cpum::CpuState;
use crate::cpum::{SegAttr, Segment, seg};
use crate::machine::Machine;
use crate::pgm::shadow::{Entry, Scope, Shadow};
use crate::pgm::walk::Leaf;
use csam::GuestLin;
use host_driver_shim::world::{
    Backing, FillRules, HostSegment, HwRegs, PORT_ROWS, PortRow, Prot, SegmentRules, World, WorldError,
    WorldExit, WorldLin,
};
use std::collections::HashMap;

/// First LDT slot we use: high, so that the low selectors a guest's own LDT would have fault in a world.
const FIRST_SLOT: u16 = 0x800;
/// Slots in a host LDT (LDT_ENTRIES).
const LAST_SLOT: u16 = 8191;
/// More host mappings than this, and the view (data or code) is emptied (vm.max_map_count is 65,530 by default).
const MAX_SMALL_MAPPINGS: usize = 24_000;
/// The most pages of nothing unmapped to save a call.
const MAX_GAP: u32 = 64;

/// What a space is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Guest ring 0, in every address space: supervisor rights, scanned code, vCPU page and trampolines.
    Supervisor,
    /// Guest ring 0 and ring 3 of the address space with this CR3, kept apart by segment limits.
    Joint {
        /// Guest CR3.
        cr3: u32,
    },
    /// Guest ring 3 of the address space with this CR3: user pages only.
    User {
        /// Guest CR3.
        cr3: u32,
    },
}

/// For which ring of the guest a host selector is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum For {
    /// Ring 0.
    Ring0,
    /// Ring 3.
    Ring3 {
        /// No byte from this guest linear address on is to be reached through a segment whose base is 0; segments with
        /// another base (thread-local storage, addressed with negative offsets) stay whole.
        below: Option<u32>,
    },
}

/// Whose view of the code a page shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose {
    /// Ring 0's, scanned and patched.
    Kernels,
    /// Ring 3's.
    Users,
}

/// The limit with which a data segment of guest ring 0 keeps out of the last `hole` bytes of the guest's addresses; None: it
/// begins in them, or is of a kind that cannot be cut.
fn limit_before_hole(seg: &Segment, hole: u32) -> Option<u32> {
    let end = u64::from(hole.wrapping_neg());
    let base = u64::from(seg.base);
    if seg.expands_down() {
        let top = if seg.big() { 1u64 << 32 } else { 1 << 16 };
        let (from, to) = (base + u64::from(seg.limit) + 1, base + top);
        let hit = |at: u64| from < at + u64::from(hole) && at < to;
        return (!hit(end) && !hit(end + (1 << 32))).then_some(seg.limit);
    }
    let room = end.checked_sub(base).filter(|room| *room > 0)?;
    if u64::from(seg.limit) < room {
        return Some(seg.limit);
    }
    // Large limits count pages.
    let room = if room > 0x10_0000 { room & !0xfff } else { room };
    u32::try_from(room - 1).ok()
}

/// The descriptors worlds have in their host LDT: one numbering for all worlds of a guest, so that selectors may go from
/// one to another. A world is given a descriptor when it first needs it ([`Space::install`]).
pub struct Descriptors {
    rules: SegmentRules,
    /// Code segments of ring 3 in joint worlds end below the guest kernel, too.
    limit_code: bool,
    slots: HashMap<HostSegment, u16>,
    contents: Vec<HostSegment>,
    /// Answers of [`Descriptors::selector`], which is asked the same up to eighteen times a run.
    recent: Vec<Option<Answer>>,
    /// Counts how often the numbering was started afresh; selectors of an older one are void.
    pub generation: u32,
}

/// How many answers are remembered; a power of two.
const RECENT: usize = 64;

/// A question to [`Descriptors::selector`] and its answer.
#[derive(Clone, Copy)]
struct Answer {
    segment: Segment,
    is_cs: bool,
    delta: u32,
    whose: For,
    selector: u16,
}

impl Default for Descriptors {
    fn default() -> Descriptors {
        Descriptors::new(SegmentRules::RAW)
    }
}

impl Descriptors {
    /// None yet, for worlds with these rules.
    #[must_use]
    pub fn new(rules: SegmentRules) -> Descriptors {
        Descriptors {
            rules,
            limit_code: false,
            slots: HashMap::new(),
            contents: Vec::new(),
            recent: vec![None; RECENT],
            generation: 0,
        }
    }

    /// Decides whether code segments of ring 3 in joint worlds end below the guest kernel, too; at first they do not.
    pub fn limit_code(&mut self, limited: bool) {
        self.limit_code = limited;
        self.recent.fill(None);
    }

    /// Starts the numbering afresh.
    pub fn restart(&mut self) {
        self.slots.clear();
        self.contents.clear();
        self.recent.fill(None);
        self.generation += 1;
    }

    /// How segments are to be.
    #[must_use]
    pub fn rules(&self) -> &SegmentRules {
        &self.rules
    }

    /// The selector of flat code of ring 0.
    #[must_use]
    pub fn code_ring0(&self) -> u16 {
        self.rules.code_ring0
    }

    /// The selector of an LDT descriptor with this content.
    fn slot(&mut self, segment: HostSegment) -> u16 {
        if let Some(&s) = self.slots.get(&segment) {
            return s << 3 | 4 | u16::from(segment.ring);
        }
        if usize::from(LAST_SLOT - FIRST_SLOT) <= self.contents.len() {
            self.restart();
        }
        let slot = FIRST_SLOT + self.contents.len() as u16;
        self.contents.push(segment);
        self.slots.insert(segment, slot);
        slot << 3 | 4 | u16::from(segment.ring)
    }

    /// What the slot of a selector holds, with the slot's index among ours.
    fn content(&self, selector: u16) -> Option<(usize, HostSegment)> {
        if selector & 4 == 0 {
            return None;
        }
        let index = usize::from((selector >> 3).checked_sub(FIRST_SLOT)?);
        self.contents.get(index).map(|c| (index, *c))
    }

    /// The host selector that gives the hardware what the guest's hidden segment state says.
    pub fn selector(&mut self, seg: &Segment, is_cs: bool, layout: &Layout, whose: For) -> u16 {
        if !seg.present() {
            return 0;
        }
        let ring3 = usize::from(whose != For::Ring0);
        let place = (usize::from(seg.selector >> 3) << 1 | ring3) & (RECENT - 1);
        if let Some(known) = &self.recent[place]
            && (known.segment, known.is_cs, known.delta, known.whose) == (*seg, is_cs, layout.delta, whose)
        {
            return known.selector;
        }
        let selector = self.work_out(seg, is_cs, layout, whose);
        self.recent[place] = Some(Answer { segment: *seg, is_cs, delta: layout.delta, whose, selector });
        selector
    }

    fn work_out(&mut self, seg: &Segment, is_cs: bool, layout: &Layout, whose: For) -> u16 {
        let rules = self.rules;
        let (ring, flat_code) = match whose {
            For::Ring0 => (rules.ring0, rules.code_ring0),
            For::Ring3 { .. } => (3, rules.code_ring3),
        };
        let beside_kernel = matches!(whose, For::Ring3 { below: Some(_) });
        let limit = match whose {
            // What expands down has no upper end that could be moved.
            For::Ring3 { below: Some(_) } if !is_cs && seg.expands_down() => {
                return self.unreachable(ring, layout);
            }
            For::Ring3 { below: Some(end) } if seg.base == 0 && (!is_cs || self.limit_code) => {
                seg.limit.min(end.wrapping_sub(1))
            }
            For::Ring0 if rules.hole != 0 && !is_cs => match limit_before_hole(seg, rules.hole) {
                Some(limit) => limit,
                None => return self.unreachable(ring, layout),
            },
            _ => seg.limit,
        };
        let pages = limit > 0xf_ffff;
        let limit_field = if pages { limit >> 12 } else { limit };
        if is_cs {
            // Beside ring 0 its selector tells which ring it was that was interrupted.
            if seg.base == 0 && limit == u32::MAX && seg.big() && !beside_kernel {
                return flat_code;
            }
            return self.slot(HostSegment {
                base: seg.base,
                limit: limit_field,
                limit_in_pages: pages,
                code: true,
                big: seg.big(),
                expand_down: false,
                // What it shows is the code view, and beside ring 0 the kernel's, too.
                rw: rules.readable_code && !beside_kernel,
                ring,
            });
        }
        let code = seg.attr.contains(SegAttr::CODE);
        let rw = code || seg.attr.contains(SegAttr::RW);
        let expand_down = !code && seg.attr.contains(SegAttr::EXPAND_DOWN);
        // A readable code segment as data: a read-only data descriptor does the same.
        self.slot(HostSegment {
            base: seg.base.wrapping_add(layout.delta),
            limit: limit_field,
            limit_in_pages: pages,
            code: false,
            big: seg.big(),
            expand_down,
            rw: !code && rw,
            ring,
        })
    }

    /// A data segment of which not a byte can be reached: what is tried is interpreted.
    fn unreachable(&mut self, ring: u8, layout: &Layout) -> u16 {
        self.slot(HostSegment {
            base: layout.delta,
            limit: 0xf_ffff,
            limit_in_pages: true,
            code: false,
            big: true,
            expand_down: true,
            rw: true,
            ring,
        })
    }

    /// Host selectors for all segment registers, in encoding order.
    pub fn selectors(&mut self, segments: &[Segment; 6], layout: &Layout, whose: For) -> [u16; 6] {
        loop {
            let generation = self.generation;
            let mut selectors = [0; 6];
            for (i, (s, out)) in segments.iter().zip(&mut selectors).enumerate() {
                *out = self.selector(s, i == seg::CS, layout, whose);
            }
            // If the numbering was started afresh on the way, the first ones are old. A new one has room.
            if generation == self.generation {
                return selectors;
            }
        }
    }
}

/// A world and its shadow.
pub struct Space {
    /// The host side.
    pub world: Box<dyn World>,
    /// For whom.
    pub role: Role,
    /// Guest data pages mapped.
    pub data: Shadow,
    /// Guest pages visible to instruction fetch (at + delta).
    pub code: Shadow,
    /// A flush the guest did that this space has not yet followed.
    pub pending_sync: Option<Scope>,
    /// When last used (counter).
    pub last_used: u64,
    /// Selectors loaded at the last start, in encoding order.
    pub loaded: [u16; 6],
    /// A joint space shows a page of the guest kernel below the limit of its users' segments: they may not run here.
    pub tainted: bool,
    /// What its vCPU page says of ring transitions.
    pub published: Option<Published>,
    /// The segments its trampolines may load.
    pub cache: SegmentCache,
    /// The ports it may answer, as it has them.
    pub ports: [PortRow; PORT_ROWS],
    /// It watches the time.
    pub guards: bool,
    /// The version of the table of quick sites it has.
    pub quick_version: u64,
    /// Its views' [`Shadow::changes`] when they were last all right.
    pub(super) changes: u32,
    /// Which of [`Descriptors`] its LDT has, a bit each, and of which generation.
    installed: Vec<u64>,
    installed_generation: u32,
    /// What the world was told about filling its shadow (`in_world.rs`).
    pub(super) fill_rules: Option<FillRules>,
    /// The world knows what `cpuid` answers.
    pub(super) cpuid_told: bool,
    /// Shadow misses the world says it has filled by itself.
    pub filled: u64,
}

impl Space {
    /// A fresh, empty world.
    pub fn new(world: Box<dyn World>, role: Role) -> Space {
        Space {
            world,
            role,
            data: Shadow::default(),
            code: Shadow::default(),
            pending_sync: None,
            last_used: 0,
            loaded: [0; 6],
            tainted: false,
            published: None,
            cache: SegmentCache::default(),
            ports: Default::default(),
            guards: false,
            quick_version: 0,
            changes: 0,
            installed: Vec::new(),
            installed_generation: 0,
            fill_rules: None,
            filled: 0,
            cpuid_told: false,
        }
    }

    /// Guest ring 0 runs here.
    #[must_use]
    pub fn supervisor(&self) -> bool {
        !matches!(self.role, Role::User { .. })
    }

    /// What is installed counts for the descriptors' numbering as it is now.
    pub(super) fn match_numbering(&mut self, descriptors: &Descriptors) {
        if self.installed_generation != descriptors.generation {
            self.installed.clear();
            self.installed_generation = descriptors.generation;
            self.world.forget_segments();
        }
    }

    /// Sees to it that the world's LDT has the descriptor of `selector`.
    pub fn install(&mut self, descriptors: &Descriptors, selector: u16) -> Result<(), WorldError> {
        let Some((index, content)) = descriptors.content(selector) else { return Ok(()) };
        self.match_numbering(descriptors);
        let (word, bit) = (index / 64, 1u64 << (index % 64));
        if self.installed.len() <= word {
            self.installed.resize(word + 1, 0);
        }
        if self.installed[word] & bit == 0 {
            self.installed[word] |= bit;
            self.world.set_segment(FIRST_SLOT + index as u16, content)?;
        }
        Ok(())
    }

    /// Shows a page of trampolines, which lies at this offset of the code memory.
    pub fn show_trampoline(&mut self, lin: GuestLin, offset: u64, layout: &Layout) -> Result<(), WorldError> {
        self.world.map(layout.code(lin), 0x1000, Backing::Code(offset), Prot::READ | Prot::EXEC)
    }

    /// Forgets all mappings, here and in the world.
    pub fn clear(&mut self) -> Result<(), WorldError> {
        self.data.clear_all();
        self.code.clear_all();
        self.pending_sync = None;
        self.tainted = false;
        self.world.unmap(WorldLin(0), 0)
    }

    /// Follows a flush by the guest: drops what went stale. Returns the pages that left the code view.
    pub fn sync(
        &mut self,
        m: &Machine,
        cpu: &CpuState,
        scope: Scope,
        layout: &Layout,
    ) -> Result<Vec<GuestLin>, WorldError> {
        let mut result = Ok(());
        let mut gone = Vec::new();
        let mut runs = Vec::new();
        self.data.sync(m, cpu, scope, |at, pages| runs.push((at.page_number(), pages)));
        self.unmap_stale(runs, layout)?;
        let world = &mut self.world;
        self.code.sync(m, cpu, scope, |at, pages| {
            if result.is_ok() {
                result = world.unmap(layout.code(at), pages << 12);
            }
            gone.extend((0..pages).map(|i| at.wrapping_add(i << 12)));
        });
        result.map(|()| gone)
    }

    /// Unmaps runs of data pages (page number, pages), together with what is between them where that is nothing: one call
    /// of the host costs more than looking at a few pages.
    fn unmap_stale(&mut self, mut runs: Vec<(u32, u32)>, layout: &Layout) -> Result<(), WorldError> {
        runs.sort_unstable();
        let mut i = 0;
        while let Some(&(first, pages)) = runs.get(i) {
            let mut end = first + pages;
            i += 1;
            while let Some(&(next, pages)) = runs.get(i) {
                let nothing = |page: u32| {
                    let at = GuestLin(page << 12);
                    !self.data.get(at).mapped()
                        && !layout.reserved(at)
                        && !self.code.get(layout.code_in_place_of(at)).mapped()
                };
                if next - end > MAX_GAP || !(end..next).all(nothing) {
                    break;
                }
                end = next + pages;
                i += 1;
            }
            unmap_data(self.world.as_mut(), layout, GuestLin(first << 12), end - first)?;
        }
        Ok(())
    }

    /// Follows `invlpg`: drops the page of `lin` from both views, all of it if it is a large one. Returns the pages that
    /// left the code view.
    pub fn invalidate(&mut self, lin: GuestLin, layout: &Layout) -> Result<Vec<GuestLin>, WorldError> {
        let mut data = Vec::new();
        self.data.clear_page_of(lin, |at| data.push(at));
        unmap_runs(self.world.as_mut(), layout, &data)?;
        let mut gone = Vec::new();
        self.code.clear_page_of(lin, |at| gone.push(at));
        for at in &gone {
            self.world.unmap(layout.code(*at), 0x1000)?;
        }
        Ok(gone)
    }

    /// Drops one data page.
    pub fn drop_data(&mut self, lin: GuestLin, layout: &Layout) -> Result<(), WorldError> {
        if self.data.clear(lin) { self.world.unmap(layout.data(lin.page_base()), 0x1000) } else { Ok(()) }
    }

    /// Drops one page of the code view.
    pub fn drop_code(&mut self, lin: GuestLin, layout: &Layout) -> Result<(), WorldError> {
        if self.code.clear(lin) { self.world.unmap(layout.code(lin.page_base()), 0x1000) } else { Ok(()) }
    }

    /// Maps a run of data pages: `pages[i]` is the leaf of the i-th page from `lin`, all contiguous frames, the same host
    /// write access, and all for users or none.
    pub fn map_data_run(
        &mut self,
        lin: GuestLin,
        leaves: &[Leaf],
        host_write: bool,
        layout: &Layout,
    ) -> Result<(), WorldError> {
        let Some(first) = leaves.first() else { return Ok(()) };
        self.limit_mappings(layout)?;
        if first.shift > 12 {
            self.world.mark_large(lin.0);
        }
        let mut prot = Prot::READ;
        prot.set(Prot::WRITE, host_write);
        prot.set(Prot::USER, first.user);
        self.world.map(
            layout.data(lin.page_base()),
            (leaves.len() as u32) << 12,
            Backing::Ram(first.frame.0),
            prot,
        )?;
        for (i, leaf) in leaves.iter().enumerate() {
            self.data.set(lin.page_base().wrapping_add((i as u32) << 12), Entry::new(leaf, host_write));
        }
        Ok(())
    }

    /// Empties the data view if it has too many mappings for the host.
    pub(super) fn limit_mappings(&mut self, layout: &Layout) -> Result<(), WorldError> {
        if self.data.small() <= MAX_SMALL_MAPPINGS {
            return Ok(());
        }
        let runs: Vec<GuestLin> = self.data.pages().map(|(l, _)| l).collect();
        self.data.clear_all();
        unmap_runs(self.world.as_mut(), layout, &runs)
    }

    /// Maps one page into the code view.
    pub fn map_code(
        &mut self,
        lin: GuestLin,
        leaf: &Leaf,
        (backing, whose): (Backing, Whose),
        layout: &Layout,
    ) -> Result<(), WorldError> {
        self.map_code_entry(lin, Entry::new(leaf, false), (backing, whose), layout)
    }

    /// The same for what another space's shadow says of it.
    pub fn map_code_entry(
        &mut self,
        lin: GuestLin,
        entry: Entry,
        (backing, whose): (Backing, Whose),
        layout: &Layout,
    ) -> Result<(), WorldError> {
        if self.code.len() > MAX_SMALL_MAPPINGS {
            let places = self.code.pages().map(|(l, _)| layout.guest_of_data(layout.code(l)));
            let places: Vec<GuestLin> = places.collect();
            self.code.clear_all();
            unmap_runs(self.world.as_mut(), layout, &places)?;
        }
        let mut prot = Prot::READ | Prot::EXEC;
        prot.set(Prot::USER, whose == Whose::Users);
        self.world.map(layout.code(lin.page_base()), 0x1000, backing, prot)?;
        self.code.set(lin.page_base(), entry);
        Ok(())
    }

    /// Runs guest code.
    pub fn run(&mut self, regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        self.loaded = regs.sel;
        self.world.run(regs)
    }
}

/// Unmaps a run of data pages; where the shift by delta carries it over the end of the world it is two runs.
fn unmap_data(world: &mut dyn World, layout: &Layout, at: GuestLin, pages: u32) -> Result<(), WorldError> {
    let start = layout.data(at);
    let first = pages.min(0x10_0000 - (start.0 >> 12));
    world.unmap(start, first << 12)?;
    if first < pages { world.unmap(WorldLin(0), (pages - first) << 12) } else { Ok(()) }
}

/// Unmaps single pages as few runs.
fn unmap_runs(world: &mut dyn World, layout: &Layout, pages: &[GuestLin]) -> Result<(), WorldError> {
    let mut pages: Vec<u32> = pages.iter().map(|p| p.0 >> 12).collect();
    pages.sort_unstable();
    let mut i = 0;
    while i < pages.len() {
        let mut n = 1;
        while i + n < pages.len() && pages[i + n] == pages[i] + n as u32 {
            n += 1;
        }
        unmap_data(world, layout, GuestLin(pages[i] << 12), n as u32)?;
        i += n;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use host_driver_shim::fake::FakeWorld;

    fn segment(base: u32) -> Segment {
        let attr = SegAttr::PRESENT | SegAttr::RW | SegAttr::BIG;
        Segment { selector: 0x33, base, limit: u32::MAX, attr }
    }

    #[test]
    fn selectors_of_one_run_are_never_of_two_generations_of_the_ldt() {
        let mut descriptors = Descriptors::default();
        let layout = Layout::CANDIDATES[0];
        // All but two slots: the third of six different segments starts the LDT afresh.
        for base in 0..u32::from(LAST_SLOT - FIRST_SLOT) - 2 {
            descriptors.selector(&segment(base), false, &layout, For::Ring0);
        }
        let wanted: [Segment; 6] = std::array::from_fn(|i| segment(0x8000_0000 + i as u32));
        let selectors = descriptors.selectors(&wanted, &layout, For::Ring0);
        assert_eq!(descriptors.generation, 1);
        for (i, selector) in selectors.iter().enumerate().filter(|(i, _)| *i != seg::CS) {
            let (_, content) = descriptors.content(*selector).unwrap();
            assert_eq!(content.base, wanted[i].base.wrapping_add(layout.delta));
        }
    }

    #[test]
    fn a_truncated_segment_ends_below_the_guest_kernel_and_one_with_a_base_is_whole() {
        let (mut d, layout) = (Descriptors::default(), Layout::CANDIDATES[0]);
        let limit = |d: &mut Descriptors, base, is_cs| {
            let selector =
                d.selector(&segment(base), is_cs, &layout, For::Ring3 { below: Some(0xc000_0000) });
            let (_, c) = d.content(selector).unwrap();
            (c.limit_in_pages, c.limit)
        };
        assert_eq!(limit(&mut d, 0, false), (true, 0xb_ffff));
        assert_eq!(limit(&mut d, 0, true), (true, 0xf_ffff), "a limit makes code slower");
        d.limit_code(true);
        assert_eq!(limit(&mut d, 0, true), (true, 0xb_ffff));
        let user = d.selector(&segment(0), true, &layout, For::Ring3 { below: Some(0xc000_0000) });
        assert_ne!(user, d.code_ring0());
        assert_eq!(limit(&mut d, 0x0804_a000, false), (true, 0xf_ffff));
        assert_eq!(d.selector(&segment(0), true, &layout, For::Ring0), d.code_ring0());
    }

    #[test]
    fn segments_of_ring_0_end_before_the_engines_own_place_and_those_of_ring_3_need_not() {
        const HOLE: u32 = 0x1_3000;
        let rules = SegmentRules {
            ring0: 1,
            code_ring0: 0x19,
            hole: HOLE,
            readable_code: false,
            ..SegmentRules::RAW
        };
        let mut d = Descriptors::new(rules);
        let layout = Layout { hole: HOLE, ..Layout::CANDIDATES[0] };
        // The last world address each can reach.
        let mut end = |base, limit, whose| {
            let selector = d.selector(&Segment { limit, ..segment(base) }, false, &layout, whose);
            let (_, c) = d.content(selector).unwrap();
            assert_eq!(u16::from(c.ring), selector & 3);
            assert_eq!(c.ring, if whose == For::Ring0 { 1 } else { 3 });
            let limit = if c.limit_in_pages { c.limit << 12 | 0xfff } else { c.limit };
            (!c.expand_down).then(|| c.base.wrapping_add(limit))
        };
        let ring3 = For::Ring3 { below: None };
        assert_eq!(end(0, u32::MAX, For::Ring0), Some(layout.delta - HOLE - 1));
        assert_eq!(end(0, u32::MAX, ring3), Some(layout.delta - 1));
        assert_eq!(end(0xc000_0000, 0xfff, For::Ring0), Some(layout.delta.wrapping_add(0xc000_0fff)));
        // A base in the middle of a page loses the rest of one.
        assert_eq!(end(0x8000_0123, u32::MAX, For::Ring0), Some(layout.delta - HOLE - 0x1000 + 0x122));
        // Close before the hole the limit counts bytes.
        assert_eq!(end(0u32.wrapping_sub(HOLE + 9), u32::MAX, For::Ring0), Some(layout.delta - HOLE - 1));
        assert_eq!(end(0u32.wrapping_sub(HOLE), u32::MAX, For::Ring0), None, "no byte");
        assert_eq!(end(0xffff_ffff, 0, For::Ring0), None);
        assert_eq!(d.selector(&segment(0), true, &layout, For::Ring0), 0x19);
        assert_eq!(d.selector(&segment(0), true, &layout, ring3), 0x23);
    }

    #[test]
    fn a_world_is_given_a_descriptor_once_and_again_when_the_numbering_starts_afresh() {
        let mut d = Descriptors::default();
        let mut space = Space::new(Box::new(FakeWorld::new()), Role::Supervisor);
        let selector = d.selector(&segment(1), false, &Layout::CANDIDATES[0], For::Ring0);
        space.install(&d, selector).unwrap();
        assert_eq!(space.installed, [1]);
        d.generation += 1;
        space.install(&d, selector).unwrap();
        assert_eq!((space.installed_generation, space.installed[0]), (1, 1));
    }
}
