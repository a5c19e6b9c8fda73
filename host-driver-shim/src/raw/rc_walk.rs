//! The page walk of a world's runtime: what the monitor's walk does (SDM Vol. 3A, chapter 4), for a world that fills its
//! own shadow misses.
//!
//! It never says which fault the guest must see: where the tables do not allow the access, where they lie outside RAM or
//! where an entry cannot be updated, the monitor looks for itself. No unsafe code, no allocation and no panics here.

use crate::world::{FillMode, FillRules};

/// Guest physical memory as the walk needs it.
pub trait Tables {
    /// Reads an aligned u32 at this GuestPhys; `None` where there is no RAM.
    fn read(&self, at: u64) -> Option<u32>;
    /// Replaces `old` by `new` in an aligned u32; `false` if it did not hold `old` or must not be written from here.
    fn update(&self, at: u64, old: u32, new: u32) -> bool;
}

/// What the tables allow on a page: bits of [`Page::rights`] and of [`crate::world::Fill::rights`].
pub mod right {
    /// R/W on every level.
    pub const WRITABLE: u32 = 0x02;
    /// U/S on every level.
    pub const USER: u32 = 0x04;
    /// No fetches.
    pub const NO_EXECUTE: u32 = 0x08;
    /// D of the leaf entry.
    pub const DIRTY: u32 = 0x10;
    /// G of the leaf entry, and CR4.PGE.
    pub const GLOBAL: u32 = 0x20;
    /// The host mapping is writable.
    pub const HOST_WRITE: u32 = 0x40;
    /// The leaf is a large page.
    pub const LARGE: u32 = 0x80;
    /// All there are.
    pub const ALL: u32 = 0xfe;
}

/// What the tables say about one 4 KiB page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// GuestPhys of the 4 KiB frame (also inside a large page).
    pub frame: u64,
    /// See [`right`].
    pub rights: u32,
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
    at: u64,
    low: u32,
    high: u32,
}

struct Path {
    page: Page,
    /// The PDE above a 4 KiB PTE, whose A bit is set as well.
    parent: Option<Entry>,
    entry: Entry,
}

fn page(rules: &FillRules, frame: u64, levels: u32, own: u32, no_execute: bool, large: bool) -> Page {
    let bit = |on: bool, bit: u32| if on { bit } else { 0 };
    let rights = bit(levels & RW != 0, right::WRITABLE)
        | bit(levels & US != 0, right::USER)
        | bit(no_execute, right::NO_EXECUTE)
        | bit(own & D != 0, right::DIRTY)
        | bit(own & G != 0 && rules.mode.contains(FillMode::PGE), right::GLOBAL)
        | bit(large, right::LARGE);
    Page { frame, rights }
}

/// Why there is no leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Miss {
    /// P is clear somewhere on the way.
    NotPresent,
    /// Malformed, or outside RAM: the monitor must look.
    Unclear,
}

/// The leaf of `lin` and the entries that lead to it.
fn path<T: Tables + ?Sized>(tables: &T, rules: &FillRules, lin: u32) -> Result<Path, Miss> {
    if rules.mode.contains(FillMode::PAE) {
        path_pae(tables, rules, lin)
    } else {
        path_32(tables, rules, lin)
    }
}

/// Whether the tables show nothing at `lin`.
pub(crate) fn is_absent<T: Tables + ?Sized>(tables: &T, rules: &FillRules, lin: u32) -> bool {
    matches!(path(tables, rules, lin), Err(Miss::NotPresent))
}

/// Whether the tables show a small page at `lin` that ring 3 may read and not write.
pub(crate) fn is_only_read<T: Tables + ?Sized>(tables: &T, rules: &FillRules, lin: u32) -> bool {
    let of_interest = right::USER | right::WRITABLE | right::LARGE;
    path(tables, rules, lin).is_ok_and(|p| p.page.rights & of_interest == right::USER)
}

fn path_32<T: Tables + ?Sized>(tables: &T, rules: &FillRules, lin: u32) -> Result<Path, Miss> {
    let read = |base: u32, index: u32| -> Result<Entry, Miss> {
        let at = u64::from(base & !0xfff) + u64::from(index) * 4;
        let low = tables.read(at).ok_or(Miss::Unclear)?;
        if low & P == 0 { Err(Miss::NotPresent) } else { Ok(Entry { at, low, high: 0 }) }
    };
    let pde = read(rules.cr3, lin >> 22)?;
    if pde.low & PS != 0 && rules.mode.contains(FillMode::PSE) {
        // PSE-36: bits 20:13 are address bits 39:32, of which 35:32 exist; bit 21 is reserved.
        if pde.low & 0x003e_0000 != 0 {
            return Err(Miss::Unclear);
        }
        let high = u64::from((pde.low >> 13) & 0xf) << 32;
        let frame = high | u64::from(pde.low & 0xffc0_0000) | u64::from(lin & 0x003f_f000);
        return Ok(Path {
            page: page(rules, frame, pde.low, pde.low, false, true),
            parent: None,
            entry: pde,
        });
    }
    let pte = read(pde.low, (lin >> 12) & 0x3ff)?;
    let leaf = page(rules, u64::from(pte.low & !0xfff), pde.low & pte.low, pte.low, false, false);
    Ok(Path { page: leaf, parent: Some(pde), entry: pte })
}

fn path_pae<T: Tables + ?Sized>(tables: &T, rules: &FillRules, lin: u32) -> Result<Path, Miss> {
    let read = |base: u64, index: u32| -> Result<Entry, Miss> {
        let at = base.wrapping_add(u64::from(index) * 8);
        let word = |at| tables.read(at).ok_or(Miss::Unclear);
        let e = Entry { at, low: word(at)?, high: word(at.wrapping_add(4))? };
        // Bits 62:36 are reserved (MAXPHYADDR is reported as 36), and NX is where EFER.NXE is clear.
        let reserved = if rules.mode.contains(FillMode::NXE) { 0x7fff_fff0 } else { 0xffff_fff0 };
        match e.low & P {
            0 => Err(Miss::NotPresent),
            _ if e.high & reserved != 0 => Err(Miss::Unclear),
            _ => Ok(e),
        }
    };
    let frame = |e: &Entry| (u64::from(e.high & 0xf) << 32) | u64::from(e.low & !0xfff);
    let pdpte = *rules.pdpte.get((lin >> 30) as usize).ok_or(Miss::Unclear)?;
    if pdpte & 1 == 0 {
        return Err(Miss::NotPresent);
    }
    let pde = read(pdpte & 0x000f_ffff_ffff_f000, (lin >> 21) & 0x1ff)?;
    let nx = pde.high >> 31 != 0;
    if pde.low & PS != 0 {
        if pde.low & 0x001f_e000 != 0 {
            return Err(Miss::Unclear);
        }
        let at = frame(&pde) & !0x1f_ffff | u64::from(lin & 0x001f_f000);
        return Ok(Path { page: page(rules, at, pde.low, pde.low, nx, true), parent: None, entry: pde });
    }
    let pte = read(frame(&pde), (lin >> 12) & 0x1ff)?;
    let nx = nx || pte.high >> 31 != 0;
    let leaf = page(rules, frame(&pte), pde.low & pte.low, pte.low, nx, false);
    Ok(Path { page: leaf, parent: Some(pde), entry: pte })
}

fn set<T: Tables + ?Sized>(tables: &T, e: &Entry, bits: u32) -> bool {
    e.low & bits == bits || tables.update(e.at, e.low, e.low | bits)
}

/// Translates `lin` for a data access and sets A (and D for a write) like the MMU. `None`: the monitor must look.
pub fn walk<T: Tables + ?Sized>(
    tables: &T,
    rules: &FillRules,
    lin: u32,
    write: bool,
    user: bool,
) -> Option<Page> {
    let mut p = path(tables, rules, lin).ok()?;
    let has = |bit: u32| p.page.rights & bit != 0;
    let writable = has(right::WRITABLE) || !user && !rules.mode.contains(FillMode::WP);
    if user && !has(right::USER) || write && !writable {
        return None;
    }
    if let Some(parent) = &p.parent
        && !set(tables, parent, A)
    {
        return None;
    }
    if !set(tables, &p.entry, if write { A | D } else { A }) {
        return None;
    }
    if write {
        p.page.rights |= right::DIRTY;
    }
    Some(p.page)
}

/// What kind of access an error code tells of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// A write.
    pub write: bool,
    /// With user rights.
    pub user: bool,
    /// An instruction fetch.
    pub fetch: bool,
}

/// The error code of the page fault the guest must see (SDM Vol. 3A, 4.7), if the tables clearly do not allow the access.
/// `None`: they do, or the monitor must look. Changes nothing.
pub fn refusal<T: Tables + ?Sized>(tables: &T, rules: &FillRules, lin: u32, access: Access) -> Option<u32> {
    let bit = |on: bool, bit: u32| if on { bit } else { 0 };
    let Access { write, user, fetch } = access;
    let shows_fetch = rules.mode.contains(FillMode::PAE | FillMode::NXE);
    let code = bit(write, 2) | bit(user, 4) | bit(fetch && shows_fetch, 16);
    match path(tables, rules, lin) {
        Err(Miss::NotPresent) => Some(code),
        Err(Miss::Unclear) => None,
        Ok(p) => {
            let has = |bit: u32| p.page.rights & bit != 0;
            let writable = has(right::WRITABLE) || !user && !rules.mode.contains(FillMode::WP);
            let refused = user && !has(right::USER) || write && !writable || fetch && has(right::NO_EXECUTE);
            refused.then_some(code | 1)
        }
    }
}

/// The 4 KiB page of `lin` if it is present and may be mapped ahead of its use; sets A of its entry.
pub fn prefetch<T: Tables + ?Sized>(tables: &T, rules: &FillRules, lin: u32, user: bool) -> Option<Page> {
    let p = path(tables, rules, lin).ok()?;
    let fits = p.page.rights & right::LARGE == 0 && (!user || p.page.rights & right::USER != 0);
    (fits && set(tables, &p.entry, A)).then_some(p.page)
}
