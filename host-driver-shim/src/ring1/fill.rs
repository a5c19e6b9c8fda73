//! What a world's `run` does by itself between two entries of guest code: data faults that are only misses of the shadow,
//! page faults that are the guest's own, `cpuid` of ring 3 and `invlpg` of a small page. As the runtime of a raw world does
//! ([`crate::raw::rc_walk`] is the same walk, [`rc_deliver`] the same delivery), with the same notes for the monitor.

use crate::ram::GuestRam;
use crate::raw::rc_cpuid;
use crate::raw::rc_deliver::{self, PageFault, RF, SELECTORS, Side};
use crate::raw::rc_walk::{self, Access, Page, prefetch, refusal, right, walk};
use crate::world::{
    CpuidRow, DeliveryRules, Fill, FillMode, FillRules, HwRegs, QUICK_SITES, Quick, QuickKind, WorldLin,
};

use super::machine::RAM_AT;
use super::monitor;
use super::tables::{Exhausted, Pool, Tables, bit};

/// Pages mapped around a faulting one where the guest has them present. As in the monitor.
const AROUND: u32 = 16;
/// 4 KiB pages mapped of a large one.
const LARGE_PAGES: u32 = 512;
/// World pages below this are left to the monitor.
const LOW_PAGES: u32 = 16;
/// More notes than this, and the monitor is asked.
const LOG: usize = 512;
/// The longest run a note tells of.
const MAX_RUN: u32 = 512;
/// Page-fault error code bits.
const PF_WRITE: u32 = 2;
const PF_FETCH: u32 = 16;
/// No fault was answered yet.
const NO_FAULT: u32 = u32::MAX;

/// What a world knows and notes.
#[derive(Debug)]
pub(super) struct Filler {
    pub(super) rules: FillRules,
    pub(super) delivery: DeliveryRules,
    /// What `cpuid` of ring 3 answers; empty: it is the monitor's.
    pub(super) cpuid: Vec<CpuidRow>,
    pub(super) quick: [Quick; QUICK_SITES],
    /// A bit for each 2 MiB of guest linear space in which something of a large page was mapped, ever.
    large: [u32; 64],
    log: Vec<Fill>,
    /// Faults answered since the log was taken.
    answered: u32,
    /// `invlpg`s done, ever (wraps).
    pub(super) flushes_done: u32,
    /// Page faults delivered to the guest, ever (wraps).
    pub(super) delivered: u32,
    /// The fault answered last since the monitor's last look: page address and bit 1 for a write.
    last: u32,
}

/// Whose access it was. The error code says so, too, but QEMU's TCG has it wrong for the stack of `retf` and `iret`.
pub(super) fn is_ring3(regs: &HwRegs) -> bool {
    regs.sel[1] & 3 == 3
}

/// Guest RAM for the walk.
struct Ram<'a>(&'a GuestRam);

impl Ram<'_> {
    fn holds(&self, pfn: u64) -> bool {
        pfn < self.0.size() >> 12
    }
    fn is_watched(&self, pfn: u64) -> bool {
        u32::try_from(pfn).map_or(true, |pfn| self.0.is_watched(pfn))
    }
}

impl rc_walk::Tables for Ram<'_> {
    fn read(&self, at: u64) -> Option<u32> {
        self.0.read_u32(at)
    }
    fn update(&self, at: u64, old: u32, new: u32) -> bool {
        !self.is_watched(at >> 12) && self.0.compare_exchange_u32(at, old, new) == Some(true)
    }
}

/// Guest RAM and the vCPU page (`vcpu`: where it is in the pool) for deliveries.
struct Delivering<'a> {
    ram: Ram<'a>,
    pool: &'a Pool,
    vcpu: u64,
}

impl rc_walk::Tables for Delivering<'_> {
    fn read(&self, at: u64) -> Option<u32> {
        self.ram.read(at)
    }
    fn update(&self, at: u64, old: u32, new: u32) -> bool {
        self.ram.update(at, old, new)
    }
}

impl Side for Delivering<'_> {
    fn is_watched(&self, pfn: u64) -> bool {
        self.ram.is_watched(pfn)
    }
    fn write(&self, at: u64, value: u32) {
        let _in_range = self.ram.0.write_u32(at, value);
    }
    fn get(&self, offset: u32) -> u32 {
        self.pool.map().read_u32(self.vcpu + u64::from(offset)).unwrap_or(0)
    }
    fn set(&self, offset: u32, value: u32) {
        let _in_range = self.pool.map().write_u32(self.vcpu + u64::from(offset), value);
    }
}

impl Filler {
    pub(super) fn new() -> Filler {
        Filler {
            rules: FillRules::default(),
            delivery: DeliveryRules::default(),
            cpuid: Vec::new(),
            quick: Default::default(),
            large: [0; 64],
            log: Vec::new(),
            answered: 0,
            flushes_done: 0,
            delivered: 0,
            last: NO_FAULT,
        }
    }

    /// The monitor has looked.
    pub(super) fn begin(&mut self) {
        self.last = NO_FAULT;
    }

    pub(super) fn mark_large(&mut self, lin: u32) {
        self.large[(lin >> 26) as usize] |= 1 << (lin >> 21 & 31);
    }

    pub(super) fn take(&mut self, each: &mut dyn FnMut(Fill)) -> u32 {
        self.log.drain(..).for_each(each);
        std::mem::take(&mut self.answered)
    }

    fn is_taken(&self, tables: &Tables, page: u32) -> bool {
        page < LOW_PAGES || tables.is_other(page) || self.rules.keeps_out(page, 1)
    }

    /// Does the `cpuid` of ring 3 at which #GP was raised, if it is one.
    pub(super) fn cpuid(&self, ram: &GuestRam, regs: &mut HwRegs) -> bool {
        if self.cpuid.is_empty() || regs.sel[1] != monitor::USER_CS {
            return false;
        }
        let rows = self.cpuid.iter().copied();
        let [eax, ecx, ..] = regs.gpr;
        let answer = rc_cpuid::answer_by(&Ram(ram), &self.rules, rows, (regs.eip, regs.eflags), (eax, ecx));
        let Some([eax, ebx, ecx, edx]) = answer else { return false };
        regs.gpr[..4].copy_from_slice(&[eax, ecx, edx, ebx]);
        regs.eip = regs.eip.wrapping_add(2);
        regs.eflags &= !RF;
        true
    }

    /// Delivers a page fault to the guest if its tables say that it is the guest's to see: the registers to go on with.
    pub(super) fn deliver(
        &mut self,
        (pool, vcpu): (&Pool, u64),
        ram: &GuestRam,
        regs: &HwRegs,
        (cr2, error): (u32, u32),
    ) -> Option<HwRegs> {
        if !self.rules.mode.contains(FillMode::ENABLED) {
            return None;
        }
        let user = is_ring3(regs);
        let (write, fetch) = (error & PF_WRITE != 0, error & PF_FETCH != 0);
        let lin = if fetch { cr2 } else { cr2.wrapping_sub(self.rules.delta) };
        let side = Delivering { ram: Ram(ram), pool, vcpu };
        if fetch && !user {
            return None;
        }
        let error_code = refusal(&side, &self.rules, lin, Access { write, user, fetch })?;
        let fault = PageFault { error_code, lin, fetch };
        let regs = rc_deliver::page_fault(&side, (&self.delivery, &self.rules), regs, &fault)?;
        self.last = NO_FAULT;
        self.delivered = self.delivered.wrapping_add(1);
        Some(regs)
    }

    /// Answers a page fault if it is only a miss of the data shadow; false: it is the monitor's. `user`: of ring 3.
    pub(super) fn fill(
        &mut self,
        tables: &mut Tables,
        ram: &GuestRam,
        (cr2, error): (u32, u32),
        user: bool,
    ) -> Result<bool, Exhausted> {
        let mode = self.rules.mode;
        let write = error & PF_WRITE != 0;
        let this = cr2 & !0xfff | u32::from(write) << 1;
        let again = std::mem::replace(&mut self.last, this) == this;
        if error & PF_FETCH != 0
            || !mode.contains(FillMode::ENABLED)
            // The same fault again: something is not as we think. The monitor knows more.
            || again
            || self.log.len() > LOG
            || self.is_taken(tables, cr2 >> 12)
        {
            return Ok(false);
        }
        let ram = Ram(ram);
        let user = user || !mode.contains(FillMode::SUPERVISOR);
        let lin = cr2.wrapping_sub(self.rules.delta);
        let Some(page) = walk(&ram, &self.rules, lin, write, user) else { return Ok(false) };
        if !ram.holds(page.frame >> 12) || write && ram.is_watched(page.frame >> 12) {
            return Ok(false);
        }
        let large = page.rights & right::LARGE != 0;
        let span = if large { LARGE_PAGES } else { AROUND };
        let centre = lin >> 12;
        let low = centre & !(span - 1);
        let delta_pages = self.rules.delta >> 12;
        if large {
            if self.rules.keeps_out(low.wrapping_add(delta_pages) & 0xf_ffff, span) {
                return Ok(false);
            }
            self.mark_large(lin);
        }
        for number in low..low + span {
            let at = number.wrapping_add(delta_pages) & 0xf_ffff;
            if self.is_taken(tables, at) || number != centre && tables.is_data(at) {
                continue;
            }
            let this = if number == centre {
                Some(page)
            } else if large {
                let into = u64::from(number).wrapping_sub(u64::from(centre)) << 12;
                Some(Page { frame: page.frame.wrapping_add(into), ..page })
            } else {
                prefetch(&ram, &self.rules, number << 12, user)
            };
            let Some(p) = this.filter(|p| ram.holds(p.frame >> 12)) else { continue };
            let allowed = p.rights & right::WRITABLE != 0 || !user && !mode.contains(FillMode::WP);
            let writes = allowed && p.rights & right::DIRTY != 0 && !ram.is_watched(p.frame >> 12);
            let entry_user = if p.rights & right::USER != 0 { bit::USER } else { 0 };
            let (entry_write, host_write) = if writes { (bit::WRITE, right::HOST_WRITE) } else { (0, 0) };
            tables.set(
                at,
                (RAM_AT + p.frame) | bit::ALWAYS | bit::DATA | bit::NO_EXECUTE | entry_user | entry_write,
            )?;
            self.note(at, (p.frame >> 12) as u32, p.rights | host_write);
        }
        self.answered = self.answered.wrapping_add(1);
        Ok(true)
    }

    fn note(&mut self, at: u32, pfn: u32, rights: u32) {
        if let Some(last) = self.log.last_mut()
            && last.pages != 0
            && last.pages < MAX_RUN
            && (last.at.0 >> 12) + last.pages == at
            && last.pfn + last.pages == pfn
            && last.rights == rights
        {
            last.pages += 1;
            return;
        }
        self.log.push(Fill { at: WorldLin(at << 12), pages: 1, pfn, rights });
    }

    /// Does what the gate was left for, if it is an `invlpg` in the table: where guest code goes on. `word` reads the vCPU
    /// page, `selectors` is where it has the guest's.
    pub(super) fn quick(
        &mut self,
        tables: &mut Tables,
        reason: u32,
        gpr: &[u32; 8],
        word: impl Fn(u32) -> u32,
    ) -> Option<u32> {
        let quick = *self.quick.iter().find(|q| q.reason == reason && reason != 0)?;
        if quick.kind != QuickKind::Invlpg
            || word(SELECTORS.wrapping_add(quick.segment.wrapping_mul(4))) != quick.selector
        {
            return None;
        }
        let lin = gpr.get(quick.base as usize)?.wrapping_add(quick.displacement);
        let page = lin.wrapping_add(self.rules.delta) >> 12;
        let large = self.large[(lin >> 26) as usize] >> (lin >> 21 & 31) & 1 != 0;
        // Code is shown at its own address; large pages have neighbours that go with them.
        if large || tables.is_other(lin >> 12) || tables.is_other(page) || self.log.len() > LOG {
            return None;
        }
        if tables.is_data(page) {
            tables.set(page, 0).ok()?;
        }
        self.log.push(Fill { at: WorldLin(page << 12), pages: 0, pfn: 0, rights: 0 });
        self.last = NO_FAULT;
        self.flushes_done = self.flushes_done.wrapping_add(1);
        Some(quick.resume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::Table;

    const DELTA: u32 = 0x5000_0000;

    /// A guest with a page directory at 1000h and a page table at 2000h for its first 4 MiB, in which each page maps the
    /// frame of its own number.
    fn guest() -> (GuestRam, Tables, Filler) {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.write_u32(0x1000, 0x2000 | 7).unwrap();
        for i in 0..256u64 {
            ram.write_u32(0x2000 + 4 * i, (i as u32) << 12 | 7).unwrap();
        }
        let pool = Pool::new(1 << 20).unwrap();
        let mut filler = Filler::new();
        filler.rules = FillRules {
            mode: FillMode::ENABLED | FillMode::SUPERVISOR | FillMode::WP,
            cr3: 0x1000,
            delta: DELTA,
            ..FillRules::default()
        };
        (ram, Tables::new(&pool).unwrap(), filler)
    }

    fn notes(filler: &mut Filler) -> Vec<(u32, u32, u32)> {
        let mut notes = Vec::new();
        filler.take(&mut |f| notes.push((f.at.0, f.pages, f.pfn)));
        notes
    }

    #[test]
    fn a_miss_maps_the_pages_around_and_notes_them_as_one_run() {
        let (ram, mut tables, mut f) = guest();
        assert!(f.fill(&mut tables, &ram, (DELTA + 0x2_3456, 0), false).unwrap());
        let page = |lin: u32| tables.get((DELTA + lin) >> 12);
        assert_eq!(page(0x2_3000) & 0xf_ffff_f000, RAM_AT + 0x2_3000);
        assert_eq!(page(0x2_3000) & bit::WRITE, 0, "not dirty yet");
        assert_ne!(page(0x2_f000), 0);
        assert_eq!((page(0x1_f000), page(0x3_0000)), (0, 0));
        assert_eq!(notes(&mut f), [(DELTA + 0x2_0000, 16, 0x20)]);
        // The write that follows sets D.
        assert!(f.fill(&mut tables, &ram, (DELTA + 0x2_3456, 2), false).unwrap());
        assert_ne!(tables.get((DELTA + 0x2_3000) >> 12) & bit::WRITE, 0);
        assert_eq!(ram.read_u32(0x2000 + 0x23 * 4).unwrap() & 0x60, 0x60);
    }

    #[test]
    fn what_is_not_plain_is_the_monitors() {
        let (ram, mut tables, mut f) = guest();
        let mut filled =
            |f: &mut Filler, lin: u32, error| f.fill(&mut tables, &ram, (DELTA + lin, error), false).unwrap();
        assert!(!filled(&mut f, 0x2_3000, PF_FETCH));
        assert!(!filled(&mut f, 0x40_0000, 0), "no table");
        f.rules.keep_out[0] = ((DELTA + 0x5_0000) >> 12, 1);
        assert!(!filled(&mut f, 0x5_0000, 0));
        ram.set_watched(0x60, true);
        assert!(!filled(&mut f, 0x6_0000, PF_WRITE));
        assert!(filled(&mut f, 0x7_0000, 0));
        assert!(!filled(&mut f, 0x7_0000, 0), "the same again");
        f.rules.mode = FillMode::empty();
        assert!(!filled(&mut f, 0x8_0000, 0));
    }

    #[test]
    fn an_invlpg_of_the_table_drops_its_page_and_is_noted() {
        let (ram, mut tables, mut f) = guest();
        f.fill(&mut tables, &ram, (DELTA + 0x2_3456, 0), false).unwrap();
        notes(&mut f);
        f.quick[3] = Quick { reason: 9, base: 2, selector: 0x7b, segment: 3, resume: 77, ..Quick::default() };
        let mut gpr = [0; 8];
        gpr[2] = 0x2_3456;
        let selector = |value| move |at| if at == SELECTORS + 12 { value } else { 0 };
        assert_eq!(f.quick(&mut tables, 8, &gpr, selector(0x7b)), None);
        assert_eq!(f.quick(&mut tables, 9, &gpr, selector(0x33)), None, "another segment");
        assert_eq!(f.quick(&mut tables, 9, &gpr, selector(0x7b)), Some(77));
        assert_eq!(tables.get((DELTA + 0x2_3000) >> 12), 0);
        assert!(tables.stale);
        assert_eq!((notes(&mut f), f.flushes_done), (vec![(DELTA + 0x2_3000, 0, 0)], 1));
        f.mark_large(0x2_3456);
        assert_eq!(f.quick(&mut tables, 9, &gpr, selector(0x7b)), None, "a large page");
    }

    #[test]
    fn cpuid_of_ring_3_is_answered_from_the_table_and_nothing_else_is() {
        let (ram, _, mut f) = guest();
        ram.write_u32(0x2_3000, 0xa20f_a20f).unwrap();
        let regs = |eip| {
            let mut regs = HwRegs { gpr: [7, 1, 2, 3, 4, 5, 6, 7], eip, ..HwRegs::default() };
            regs.sel[1] = monitor::USER_CS;
            regs
        };
        let mut r = regs(0x2_3000);
        assert!(!f.cpuid(&ram, &mut r), "no table");
        f.cpuid = vec![CpuidRow { leaf: 7, subleaf: 1, any_subleaf: 0, registers: [10, 20, 30, 40] }];
        assert!(f.cpuid(&ram, &mut r));
        assert_eq!((r.gpr, r.eip), ([10, 30, 40, 20, 4, 5, 6, 7], 0x2_3002));
        assert!(f.cpuid(&ram, &mut r));
        assert_eq!((r.gpr[..4].to_vec(), r.eip), (vec![0; 4], 0x2_3004), "a leaf that is not there");
        assert!(!f.cpuid(&ram, &mut r), "another instruction");
        let mut ring1 = HwRegs { sel: [0; 6], ..regs(0x2_3000) };
        assert!(!f.cpuid(&ram, &mut ring1));
        let mut stepped = HwRegs { eflags: rc_cpuid::TF, ..regs(0x2_3000) };
        assert!(!f.cpuid(&ram, &mut stepped));
        assert!(!f.cpuid(&ram, &mut regs(0x40_0000)), "no such page");
    }

    #[test]
    fn a_page_fault_the_tables_refuse_goes_to_the_guests_handler() {
        let (ram, _, mut f) = guest();
        let pool = Pool::new(1 << 20).unwrap();
        let vcpu = pool.alloc().unwrap();
        // Descriptors and the TSS at 30000h, which is also where ring 0's stack ends.
        let table = |n: u32| Table { at: 0x3_0000 + 8 * n, low: 0x100 + n, high: 0x200 + n };
        f.rules.user_cs = u32::from(monitor::USER_CS);
        f.delivery = DeliveryRules {
            ready: 1,
            from_ring3: 1,
            gate: table(0),
            target: 0xc000,
            cs: 0x60,
            cs_descriptor: table(1),
            cs_host: u32::from(monitor::KERNEL_CS),
            tss_esp0: 0x3_0100,
            ss: 0x68,
            ss_descriptor: table(2),
            ss_host: 0x1005,
            user_ss_host: 0x100f,
            if_mask: 0,
        };
        for t in [f.delivery.gate, f.delivery.cs_descriptor, f.delivery.ss_descriptor] {
            ram.write_u32(u64::from(t.at), t.low).unwrap();
            ram.write_u32(u64::from(t.at) + 4, t.high).unwrap();
        }
        ram.write_u32(0x3_0100, 0x3_0000).unwrap();
        ram.write_u32(0x3_0104, 0x68).unwrap();
        let word = |at: u32, value: u32| pool.map().write_u32(vcpu + u64::from(at), value).unwrap();
        word(rc_deliver::CPL, 3);
        word(rc_deliver::IF_FLAG, 0x200);
        word(SELECTORS + 4, 0x73);
        word(SELECTORS + 8, 0x7b);
        let mut regs = HwRegs { eip: 0x2_3000, eflags: 0x246, ..HwRegs::default() };
        regs.gpr[4] = 0x2_8000;
        (regs.sel[1], regs.sel[2]) = (monitor::USER_CS, 0x100f);
        let fault = (DELTA + 0x40_1234, PF_WRITE);
        assert_eq!(f.deliver((&pool, vcpu), &ram, &regs, (DELTA + 0x2_3456, 0)), None, "a miss");
        ram.set_watched(0x2f, true);
        assert_eq!(f.deliver((&pool, vcpu), &ram, &regs, fault), None, "a stack that is watched");
        ram.set_watched(0x2f, false);
        let after = f.deliver((&pool, vcpu), &ram, &regs, fault).unwrap();
        let frame = [24, 20, 16, 12, 8, 4].map(|below| ram.read_u32(0x3_0000 - below).unwrap());
        assert_eq!(frame, [6, 0x2_3000, 0x73, 0x1_0246, 0x2_8000, 0x7b]);
        assert_eq!((after.eip, after.gpr[4]), (0xc000, 0x3_0000 - 24));
        assert_eq!((after.sel[1], after.sel[2]), (monitor::KERNEL_CS, 0x1005));
        let word = |at: u32| pool.map().read_u32(vcpu + u64::from(at)).unwrap();
        assert_eq!(
            (word(rc_deliver::CPL), word(rc_deliver::CR2), word(rc_deliver::IF_FLAG)),
            (0, 0x40_1234, 0)
        );
        assert_eq!(f.delivered, 1);
        f.delivery.ready = 0;
        assert_eq!(f.deliver((&pool, vcpu), &ram, &regs, fault), None);
    }
}
