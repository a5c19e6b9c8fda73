//! `cpuid` of ring 3 in the world: it traps (the page is a copy with `hlt` there, or the host's CPUID faulting), and what
//! the guest is to see is a table the monitor has given.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use super::arena::Arena;
use super::rc_fill::Ram;
use super::rc_walk::{Tables, walk};
use crate::world::{CpuidRow, FillMode, FillRules};

/// Rows of the table.
pub(crate) const ROWS: usize = 64;
/// `0f a2`, little-endian.
const CPUID: u32 = 0xa20f;
/// EFLAGS.TF.
pub(crate) const TF: u32 = 0x100;
/// The host's flat 32-bit code selector.
const HOST_CODE32: u16 = 0x23;

/// What the guest sees, in the arena.
#[repr(C)]
pub(crate) struct CpuidTable {
    /// How many rows there are; 0: `cpuid` is the monitor's.
    pub(crate) rows: AtomicU32,
    pub(crate) row: [CpuidRow; ROWS],
}

/// EAX, EBX, ECX and EDX after the `cpuid` at `eip`, if it is one and ring 3's; the code segment `cs` starts at 0.
///
/// # Safety
/// In a world, `a` is its mapped arena, and the world has the turn.
pub(crate) unsafe fn answer(
    a: *mut Arena,
    eip: u32,
    cs: u16,
    eflags: u32,
    leaf: u32,
    subleaf: u32,
) -> Option<[u32; 4]> {
    // SAFETY: by contract; the monitor writes the rules and the table only when it has the turn.
    let (rules, n, pages) = unsafe {
        (
            (&raw const (*a).fill.rules).read_volatile(),
            (*a).cpuid.rows.load(Relaxed) as usize,
            (*a).fill.ram_pages.load(Relaxed),
        )
    };
    let alone = !rules.mode.contains(FillMode::SUPERVISOR) && cs == HOST_CODE32;
    let joint = rules.user_cs != 0 && rules.user_cs == u32::from(cs);
    if n == 0 || !alone && !joint {
        return None;
    }
    // SAFETY: by contract.
    let rows = unsafe { rows(a) };
    answer_by(&Ram { pages }, &rules, rows, (eip, eflags), (leaf, subleaf))
}

/// The rows of the table.
///
/// # Safety
/// As [`answer`].
pub(crate) unsafe fn rows(a: *const Arena) -> impl Iterator<Item = CpuidRow> {
    // SAFETY: by contract: an atomic.
    let n = unsafe { (*a).cpuid.rows.load(Relaxed) as usize };
    (0..n.min(ROWS)).map(move |i| {
        // SAFETY: i < ROWS; the monitor writes the table only when it has the turn.
        unsafe { (&raw const (*a).cpuid.row).cast::<CpuidRow>().add(i).read_volatile() }
    })
}

/// The same from any table, for ring 3 in a flat code segment.
pub(crate) fn answer_by<T: Tables>(
    tables: &T,
    rules: &FillRules,
    mut rows: impl Iterator<Item = CpuidRow>,
    (eip, eflags): (u32, u32),
    (leaf, subleaf): (u32, u32),
) -> Option<[u32; 4]> {
    if eflags & TF != 0 || !rules.mode.contains(FillMode::ENABLED) {
        return None;
    }
    // The original bytes: what is executed may be a copy.
    let byte = |at: u32| -> Option<u32> {
        let page = walk(tables, rules, at, false, true)?;
        let word = tables.read(page.frame | u64::from(at & 0xffc))?;
        Some(word >> (8 * (at & 3)) & 0xff)
    };
    if byte(eip)? | byte(eip.wrapping_add(1))? << 8 != CPUID {
        return None;
    }
    let row = rows.find(|r| r.leaf == leaf && (r.any_subleaf != 0 || r.subleaf == subleaf));
    Some(row.map_or([0; 4], |r| r.registers))
}
