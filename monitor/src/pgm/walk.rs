//! The guest's page walk: GuestLin to GuestPhys (SDM Vol. 3A, chapter 4).

use crate::cpum::{CpuState, cr0, cr4, efer};
use crate::env::Privilege;
use csam::{GuestLin, GuestPhys};

/// What the walker needs of guest physical memory.
pub trait PhysMemory {
    /// Reads a naturally aligned u32; memory that is not there reads as ones.
    fn read_u32(&self, at: GuestPhys) -> u32;
    /// Writes a naturally aligned u32; ignored where there is no memory.
    fn write_u32(&self, at: GuestPhys, value: u32);
}

/// Kind of access, for the permission check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// A write.
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// On whose behalf.
    pub privilege: Privilege,
}

impl Access {
    /// A data read.
    #[must_use]
    pub const fn read(privilege: Privilege) -> Access {
        Access { write: false, fetch: false, privilege }
    }
    /// A data write.
    #[must_use]
    pub const fn write(privilege: Privilege) -> Access {
        Access { write: true, fetch: false, privilege }
    }
    /// An instruction fetch.
    #[must_use]
    pub const fn fetch(privilege: Privilege) -> Access {
        Access { write: false, fetch: true, privilege }
    }
}

/// What the guest's tables say about one 4 KiB page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// The frame: GuestPhys of the 4 KiB page (also inside a large page).
    pub frame: GuestPhys,
    /// R/W on every level.
    pub writable: bool,
    /// U/S on every level.
    pub user: bool,
    /// No fetches.
    pub no_execute: bool,
    /// D of the leaf entry.
    pub dirty: bool,
    /// G of the leaf entry, and CR4.PGE.
    pub global: bool,
    /// log2 of the page size: 12, 21 or 22 (32 when paging is off).
    pub shift: u8,
}

/// Page-fault error code bits (SDM Vol. 3A, 4.7).
pub mod pf {
    #![allow(missing_docs)]
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const USER: u32 = 4;
    pub const RESERVED: u32 = 8;
    pub const FETCH: u32 = 16;
}

const P: u32 = 1;
const RW: u32 = 2;
const US: u32 = 4;
const A: u32 = 0x20;
const D: u32 = 0x40;
const PS: u32 = 0x80;
const G: u32 = 0x100;

/// One entry as read: low and high half, and where it lies.
#[derive(Clone, Copy)]
struct Entry {
    at: GuestPhys,
    low: u32,
    high: u32,
}

struct Path {
    leaf: Leaf,
    /// Upper-level entry (the PDE above a 4 KiB PTE), whose A bit is set as well.
    parent: Option<Entry>,
    entry: Option<Entry>,
}

#[derive(Clone, Copy)]
enum Miss {
    NotPresent,
    Reserved,
}

/// What is above the leaf entries of one 2 MiB of addresses, of which it is the same everywhere.
pub struct Upper(Result<Level, Miss>);

enum Level {
    /// Paging is off.
    Identity,
    /// The leaf is this entry.
    Large(Entry),
    /// The leaves are in the table this entry names.
    Table(Entry),
}

/// One entry of PAE's tables.
fn read_pae<M: PhysMemory + ?Sized>(mem: &M, base: u64, index: u32) -> Entry {
    let at = GuestPhys(base.wrapping_add(u64::from(index) * 8));
    Entry { at, low: mem.read_u32(at), high: mem.read_u32(GuestPhys(at.0 + 4)) }
}

/// One entry of tables without PAE.
fn read_short<M: PhysMemory + ?Sized>(mem: &M, base: u32, index: u32) -> Entry {
    let at = GuestPhys(u64::from(base) + u64::from(index) * 4);
    Entry { at, low: mem.read_u32(at), high: 0 }
}

/// Present and well-formed.
fn check_pae(cpu: &CpuState, e: &Entry) -> Result<(), Miss> {
    if e.low & P == 0 {
        return Err(Miss::NotPresent);
    }
    // Bits 62:36 are reserved (MAXPHYADDR is reported as 36), and NX is where EFER.NXE is clear.
    let reserved = if cpu.msr.efer & efer::NXE != 0 { 0x7fff_fff0 } else { 0xffff_fff0 };
    if e.high & reserved != 0 { Err(Miss::Reserved) } else { Ok(()) }
}

fn frame_pae(e: &Entry) -> u64 {
    (u64::from(e.high & 0xf) << 32) | u64::from(e.low & !0xfff)
}

impl Upper {
    /// For the 2 MiB `lin` lies in.
    pub fn read<M: PhysMemory + ?Sized>(mem: &M, cpu: &CpuState, lin: GuestLin) -> Upper {
        Upper(Upper::level(mem, cpu, lin))
    }

    fn level<M: PhysMemory + ?Sized>(mem: &M, cpu: &CpuState, lin: GuestLin) -> Result<Level, Miss> {
        if !cpu.paging() {
            return Ok(Level::Identity);
        }
        if cpu.cr4 & cr4::PAE != 0 {
            let pdpte = cpu.pdpte[(lin.0 >> 30) as usize];
            if pdpte & 1 == 0 {
                return Err(Miss::NotPresent);
            }
            let pde = read_pae(mem, pdpte & 0x000f_ffff_ffff_f000, (lin.0 >> 21) & 0x1ff);
            check_pae(cpu, &pde)?;
            if pde.low & PS == 0 {
                return Ok(Level::Table(pde));
            }
            return if pde.low & 0x001f_e000 != 0 { Err(Miss::Reserved) } else { Ok(Level::Large(pde)) };
        }
        let pde = read_short(mem, cpu.cr3 & !0xfff, lin.0 >> 22);
        if pde.low & P == 0 {
            return Err(Miss::NotPresent);
        }
        if pde.low & PS == 0 || cpu.cr4 & cr4::PSE == 0 {
            return Ok(Level::Table(pde));
        }
        // PSE-36: bits 20:13 are address bits 39:32, of which 35:32 exist; bit 21 is reserved.
        if pde.low & 0x003e_0000 != 0 { Err(Miss::Reserved) } else { Ok(Level::Large(pde)) }
    }

    fn path<M: PhysMemory + ?Sized>(&self, mem: &M, cpu: &CpuState, lin: GuestLin) -> Result<Path, Miss> {
        // `rights`: R/W and U/S of all levels; `own`: D and G of the leaf's entry.
        let leaf = |frame: u64, rights: u32, own: u32, no_execute: bool, shift: u8| Leaf {
            frame: GuestPhys(frame),
            writable: rights & RW != 0,
            user: rights & US != 0,
            no_execute,
            dirty: own & D != 0,
            global: cpu.cr4 & cr4::PGE != 0 && own & G != 0,
            shift,
        };
        let pae = cpu.cr4 & cr4::PAE != 0;
        match self.0.as_ref().map_err(|miss| *miss)? {
            Level::Identity => {
                let leaf = Leaf {
                    frame: GuestPhys(u64::from(lin.0 & !0xfff)),
                    writable: true,
                    user: true,
                    no_execute: false,
                    dirty: true,
                    global: false,
                    shift: 32,
                };
                Ok(Path { leaf, parent: None, entry: None })
            }
            Level::Large(pde) if pae => {
                let base = frame_pae(pde) & !0x1f_ffff;
                let frame = base | u64::from(lin.0 & 0x001f_f000);
                let leaf = leaf(frame, pde.low, pde.low, pde.high >> 31 != 0, 21);
                Ok(Path { leaf, parent: None, entry: Some(*pde) })
            }
            Level::Large(pde) => {
                let high = u64::from((pde.low >> 13) & 0xf) << 32;
                let frame = high | u64::from(pde.low & 0xffc0_0000) | u64::from(lin.0 & 0x003f_f000);
                let leaf = leaf(frame, pde.low, pde.low, false, 22);
                Ok(Path { leaf, parent: None, entry: Some(*pde) })
            }
            Level::Table(pde) if pae => {
                let pte = read_pae(mem, frame_pae(pde), (lin.0 >> 12) & 0x1ff);
                check_pae(cpu, &pte)?;
                let no_execute = (pde.high | pte.high) >> 31 != 0;
                let leaf = leaf(frame_pae(&pte), pde.low & pte.low, pte.low, no_execute, 12);
                Ok(Path { leaf, parent: Some(*pde), entry: Some(pte) })
            }
            Level::Table(pde) => {
                let pte = read_short(mem, pde.low & !0xfff, (lin.0 >> 12) & 0x3ff);
                if pte.low & P == 0 {
                    return Err(Miss::NotPresent);
                }
                let leaf = leaf(u64::from(pte.low & !0xfff), pde.low & pte.low, pte.low, false, 12);
                Ok(Path { leaf, parent: Some(*pde), entry: Some(pte) })
            }
        }
    }

    /// Where the entries lie that map pages `first` to `last` (of 512) of the 2 MiB at `base`: the upper level's and the run of
    /// the leaves, as address and length in bytes. None: nothing is present there, or paging is off.
    pub fn entries(
        &self,
        cpu: &CpuState,
        base: GuestLin,
        first: u32,
        last: u32,
    ) -> Option<[(GuestPhys, u32); 2]> {
        let size = if cpu.cr4 & cr4::PAE != 0 { 8 } else { 4 };
        match self.0.as_ref().ok()? {
            Level::Identity => None,
            Level::Large(pde) => Some([(pde.at, size), (pde.at, 0)]),
            Level::Table(pde) => {
                let (table, index) = match size {
                    8 => (frame_pae(pde), first),
                    _ => (u64::from(pde.low & !0xfff), (base.0 >> 12 & 0x200) + first),
                };
                let at = GuestPhys(table + u64::from(index * size));
                Some([(pde.at, size), (at, (last + 1 - first) * size)])
            }
        }
    }

    /// [`peek`] for a page of the 2 MiB this was read for.
    pub fn peek<M: PhysMemory + ?Sized>(&self, mem: &M, cpu: &CpuState, lin: GuestLin) -> Option<Leaf> {
        self.path(mem, cpu, lin).ok().map(|p| p.leaf)
    }
}

fn path<M: PhysMemory + ?Sized>(mem: &M, cpu: &CpuState, lin: GuestLin) -> Result<Path, Miss> {
    Upper::read(mem, cpu, lin).path(mem, cpu, lin)
}

/// What the tables say about `lin`, without touching A or D. None: not present (or malformed).
pub fn peek<M: PhysMemory + ?Sized>(mem: &M, cpu: &CpuState, lin: GuestLin) -> Option<Leaf> {
    path(mem, cpu, lin).ok().map(|p| p.leaf)
}

/// Where the entry lies that maps `lin` (of a PAE entry its low half). None: not present, or paging is off.
pub fn entry<M: PhysMemory + ?Sized>(mem: &M, cpu: &CpuState, lin: GuestLin) -> Option<GuestPhys> {
    Some(path(mem, cpu, lin).ok()?.entry?.at)
}

fn permitted(cpu: &CpuState, leaf: &Leaf, access: Access) -> bool {
    if access.fetch && leaf.no_execute {
        return false;
    }
    match access.privilege {
        Privilege::User => leaf.user && (!access.write || leaf.writable),
        Privilege::Supervisor => !access.write || leaf.writable || cpu.cr0 & cr0::WP == 0,
    }
}

/// Translates `lin` for an access: sets A (and D for a write) like the MMU, or says which page-fault error code the
/// guest must see.
pub fn walk<M: PhysMemory + ?Sized>(
    mem: &M,
    cpu: &CpuState,
    lin: GuestLin,
    access: Access,
) -> Result<Leaf, u32> {
    let mut code = 0;
    if access.write {
        code |= pf::WRITE;
    }
    if access.privilege == Privilege::User {
        code |= pf::USER;
    }
    // I/D is reported only where fetches can be refused (PAE and EFER.NXE; SDM Vol. 3A, 4.7).
    if access.fetch && cpu.cr4 & cr4::PAE != 0 && cpu.msr.efer & efer::NXE != 0 {
        code |= pf::FETCH;
    }
    let p = path(mem, cpu, lin).map_err(|m| match m {
        Miss::NotPresent => code,
        Miss::Reserved => code | pf::PRESENT | pf::RESERVED,
    })?;
    if !permitted(cpu, &p.leaf, access) {
        return Err(code | pf::PRESENT);
    }
    if let Some(parent) = p.parent
        && parent.low & A == 0
    {
        mem.write_u32(parent.at, parent.low | A);
    }
    let mut leaf = p.leaf;
    if let Some(e) = p.entry {
        let want = e.low | A | if access.write { D } else { 0 };
        if want != e.low {
            mem.write_u32(e.at, want);
        }
        leaf.dirty |= access.write;
    }
    Ok(leaf)
}

/// Sets A on a present page the shadow is about to map ahead of use, and returns its leaf.
pub fn prefetch<M: PhysMemory + ?Sized>(mem: &M, cpu: &CpuState, lin: GuestLin) -> Option<Leaf> {
    let p = path(mem, cpu, lin).ok()?;
    if let Some(e) = p.entry
        && e.low & A == 0
    {
        mem.write_u32(e.at, e.low | A);
    }
    Some(p.leaf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    struct Mem(RefCell<Vec<u32>>);
    impl PhysMemory for Mem {
        fn read_u32(&self, at: GuestPhys) -> u32 {
            self.0.borrow().get((at.0 / 4) as usize).copied().unwrap_or(u32::MAX)
        }
        fn write_u32(&self, at: GuestPhys, value: u32) {
            if let Some(w) = self.0.borrow_mut().get_mut((at.0 / 4) as usize) {
                *w = value;
            }
        }
    }
    fn mem() -> Mem {
        Mem(RefCell::new(vec![0; 0x10000]))
    }
    fn paged() -> CpuState {
        let mut cpu = CpuState::reset();
        cpu.cr0 = cr0::PE | cr0::PG | cr0::WP;
        cpu.cr4 = cr4::PSE;
        cpu.cr3 = 0x1000;
        cpu
    }
    const SUP_R: Access = Access::read(Privilege::Supervisor);
    const SUP_W: Access = Access::write(Privilege::Supervisor);
    const USR_R: Access = Access::read(Privilege::User);

    #[test]
    fn a_4k_page_is_translated_and_a_and_d_are_set() {
        let m = mem();
        let cpu = paged();
        m.write_u32(GuestPhys(0x1000 + 4), 0x2003);
        m.write_u32(GuestPhys(0x2000), 0x5003);
        let leaf = walk(&m, &cpu, GuestLin(0x0040_0123), SUP_R).unwrap();
        assert_eq!(leaf.frame, GuestPhys(0x5000));
        assert_eq!(m.read_u32(GuestPhys(0x2000)), 0x5023);
        assert_eq!(m.read_u32(GuestPhys(0x1004)), 0x2023);
        walk(&m, &cpu, GuestLin(0x0040_0123), SUP_W).unwrap();
        assert_eq!(m.read_u32(GuestPhys(0x2000)), 0x5063);
        assert_eq!(walk(&m, &cpu, GuestLin(0x0040_0123), USR_R), Err(5));
    }

    #[test]
    fn wp_decides_whether_the_supervisor_may_write_read_only_pages() {
        let m = mem();
        let mut cpu = paged();
        m.write_u32(GuestPhys(0x1000), 0x2007);
        m.write_u32(GuestPhys(0x2000), 0x5005);
        assert_eq!(walk(&m, &cpu, GuestLin(0), SUP_W), Err(3));
        cpu.cr0 &= !cr0::WP;
        assert!(walk(&m, &cpu, GuestLin(0), SUP_W).is_ok());
        assert_eq!(walk(&m, &cpu, GuestLin(0), Access::write(Privilege::User)), Err(7));
    }

    #[test]
    fn a_large_page_covers_4_mib_with_pse_and_is_a_table_without() {
        let m = mem();
        let mut cpu = paged();
        m.write_u32(GuestPhys(0x1000 + 4 * 0x300), 0x0040_0083);
        let leaf = peek(&m, &cpu, GuestLin(0xc012_3456)).unwrap();
        assert_eq!((leaf.frame, leaf.shift), (GuestPhys(0x0052_3000), 22));
        cpu.cr4 = 0;
        assert!(
            peek(&m, &cpu, GuestLin(0xc012_3456)).is_some_and(|l| l.shift == 12)
                || peek(&m, &cpu, GuestLin(0xc012_3456)).is_none()
        );
    }

    #[test]
    fn pae_honours_nx_and_reserved_bits() {
        let m = mem();
        let mut cpu = paged();
        cpu.cr4 = cr4::PAE;
        cpu.msr.efer = efer::NXE;
        cpu.pdpte[0] = 0x3001;
        m.write_u32(GuestPhys(0x3000), 0x4003);
        m.write_u32(GuestPhys(0x4000), 0x6003);
        m.write_u32(GuestPhys(0x4004), 0x8000_0000);
        assert!(walk(&m, &cpu, GuestLin(0), SUP_R).is_ok());
        assert_eq!(
            walk(&m, &cpu, GuestLin(0), Access::fetch(Privilege::Supervisor)),
            Err(pf::FETCH | pf::PRESENT)
        );
        cpu.msr.efer = 0;
        assert_eq!(walk(&m, &cpu, GuestLin(0), SUP_R), Err(pf::PRESENT | pf::RESERVED));
    }
}

/// The walk of a world's runtime against this one: on the same tables the same answer, or none.
#[cfg(test)]
mod in_world {
    use super::*;
    use host_driver_shim::raw::rc_walk::{self, Page, Tables, right};
    use host_driver_shim::world::{FillMode, FillRules};
    use proptest::prelude::*;
    use std::cell::{Cell, RefCell};

    /// Frames of RAM: few, so that random entries often lead to tables.
    const FRAMES: u64 = 8;

    #[derive(Clone)]
    struct Mem {
        words: RefCell<Vec<u32>>,
        missed: Cell<bool>,
    }
    impl PhysMemory for Mem {
        fn read_u32(&self, at: GuestPhys) -> u32 {
            let word = self.words.borrow().get((at.0 / 4) as usize).copied();
            self.missed.set(self.missed.get() | word.is_none());
            word.unwrap_or(u32::MAX)
        }
        fn write_u32(&self, at: GuestPhys, value: u32) {
            if let Some(w) = self.words.borrow_mut().get_mut((at.0 / 4) as usize) {
                *w = value;
            }
        }
    }
    impl Tables for Mem {
        fn read(&self, at: u64) -> Option<u32> {
            self.words.borrow().get((at / 4) as usize).copied()
        }
        fn update(&self, at: u64, old: u32, new: u32) -> bool {
            let mut words = self.words.borrow_mut();
            let Some(w) = words.get_mut((at / 4) as usize).filter(|w| **w == old) else { return false };
            *w = new;
            true
        }
    }

    fn same(leaf: &Leaf, page: &Page) -> bool {
        let has = |bit| page.rights & bit != 0;
        leaf.frame.0 == page.frame
            && (leaf.writable, leaf.user, leaf.no_execute)
                == (has(right::WRITABLE), has(right::USER), has(right::NO_EXECUTE))
            && (leaf.dirty, leaf.global, leaf.shift > 12)
                == (has(right::DIRTY), has(right::GLOBAL), has(right::LARGE))
    }

    /// An entry that is often plausible: a frame in RAM and any of the low bits.
    fn entry() -> impl Strategy<Value = u32> {
        let plausible = (0..FRAMES as u32, any::<u32>()).prop_map(|(f, low)| f << 12 | low & 0xf7f | 1);
        let large = (any::<u32>(), any::<u32>()).prop_map(|(at, low)| at & 0xffc0_0000 | low & 0xfff | 0x81);
        prop_oneof![6 => plausible, 2 => large, 1 => any::<u32>(), 1 => Just(0)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn a_worlds_walk_says_what_this_one_says(
            entries in prop::collection::vec(entry(), 64),
            fill in any::<u64>(),
            lin in any::<u32>(),
            (pae, pse, pge, nxe, wp) in any::<(bool, bool, bool, bool, bool)>(),
            (write, user, high) in any::<(bool, bool, bool)>(),
            (cr3, pdpte) in (0..FRAMES as u32, prop::array::uniform4(0..FRAMES * 2)),
        ) {
            let size = FRAMES as usize * 1024;
            let words: Vec<u32> = (0..size)
                .map(|i| {
                    let pick = (i as u64 + 1).wrapping_mul(fill | 1) >> 32;
                    let e = entries[pick as usize % entries.len()];
                    // High halves of PAE entries: nothing, NX, or anything.
                    match (pae && i % 2 == 1, high, pick % 6) {
                        (true, true, 0 | 1) => 0x8000_0000,
                        (true, true, 2) => e.rotate_left(19) & 0x8000_001f,
                        (true, ..) => 0,
                        _ => e,
                    }
                })
                .collect();
            let mut cpu = CpuState::reset();
            cpu.cr0 = cr0::PE | cr0::PG | if wp { cr0::WP } else { 0 };
            for (on, bit) in [(pae, cr4::PAE), (pse, cr4::PSE), (pge, cr4::PGE)] {
                cpu.cr4 |= if on { bit } else { 0 };
            }
            cpu.msr.efer = if nxe { efer::NXE } else { 0 };
            cpu.cr3 = cr3 << 12;
            cpu.pdpte = pdpte.map(|p| (p / 2) << 12 | u64::from(p % 8 != 0));
            let mut mode = FillMode::ENABLED;
            mode.set(FillMode::PAE, pae);
            mode.set(FillMode::PSE, pse);
            mode.set(FillMode::PGE, pge);
            mode.set(FillMode::NXE, nxe);
            mode.set(FillMode::WP, wp);
            mode.set(FillMode::SUPERVISOR, !user);
            let rules = FillRules { mode, cr3: cpu.cr3, pdpte: cpu.pdpte, ..FillRules::default() };
            let ours = Mem { words: RefCell::new(words.clone()), missed: Cell::new(false) };
            let theirs = ours.clone();
            let privilege = if user { Privilege::User } else { Privilege::Supervisor };
            let access = Access { write, fetch: false, privilege };

            let before = peek(&ours, &cpu, GuestLin(lin));
            let told = walk(&ours, &cpu, GuestLin(lin), access);
            // A directory that is its own table: its entry changes between the two updates. The next try finds A set.
            let page = rc_walk::walk(&theirs, &rules, lin, write, user)
                .or_else(|| rc_walk::walk(&theirs, &rules, lin, write, user));
            match (&told, &page) {
                (Ok(leaf), Some(page)) => prop_assert!(same(leaf, page), "{leaf:x?} {page:x?}"),
                (Err(_), None) => {}
                // Tables in memory that is not there are not the world's business.
                (Ok(_), None) => prop_assert!(ours.missed.get(), "{told:x?}"),
                (Err(_), Some(_)) => prop_assert!(false, "{told:x?} {page:x?}"),
            }
            if told.is_err() || page.is_some() {
                prop_assert!(ours.words == theirs.words, "A and D");
            }

            let fresh = || Mem { words: RefCell::new(words.clone()), missed: Cell::new(false) };
            let (ours, theirs) = (fresh(), fresh());
            let expected = before.filter(|l| l.shift == 12 && (!user || l.user));
            let ahead = rc_walk::prefetch(&theirs, &rules, lin, user);
            if let Some(page) = &ahead {
                prop_assert!(prefetch(&ours, &cpu, GuestLin(lin)).is_some_and(|leaf| same(&leaf, page)));
                prop_assert!(expected.is_some() && ours.words == theirs.words);
            } else {
                peek(&ours, &cpu, GuestLin(lin));
                prop_assert!(expected.is_none() || ours.missed.get(), "{expected:x?}");
            }
        }
    }
}
