//! PATM: the patch manager. Plans what the code view shows instead of a sensitive instruction.
//!
//! It owns no memory: the monitor gives it a site the scan found and writes what comes back, a [`Patch`], to the code
//! view and to trampoline memory. In reading order:
//! - [`patch`]: what a patch is: window, tactic, sites, trampoline,
//! - [`vcpu_page`]: the data page trampolines share with the monitor,
//! - `window`: which instructions a jump may cover,
//! - `inline`, `segment` and `far`: what a trampoline does for sites; `displace`: for the other instructions of a window,
//! - `emit` and [`map`]: trampoline bytes, and the guest state that every boundary in them stands for,
//! - `alloc`: where a trampoline lies, chosen so that the jump's displacement bytes trap where they must,
//! - [`manager`]: [`Patm`], which keeps the patches and answers questions about EIPs,
//! - `transition` and [`user`]: between ring 0 and ring 3 without an exit, and the patches of ring-3 code for it.
//!
//! All code addresses are EIPs of a code segment the guest sees at base 0, so a [`csam::GuestLin`] and an EIP are the
//! same number.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

mod alloc_region;
mod displace;
mod emit;
mod far;
mod inline;
mod insn;
pub mod manager;
pub mod map;
pub mod patch;
mod segment;
mod transition;
pub mod user;
pub mod vcpu_page;
pub mod view;
mod window;

pub use alloc_region::traps;
pub use inline::counter;
pub use manager::{Location, Patm, Stats};
pub use map::{EipMap, Finish, Fix, Point, RegSet, VcpuWords};
pub use patch::{
    CodeWrite, Config, Keys, LongGate, Patch, PatchId, ReasonKind, Refusal, Route, SiteRef, Tactic,
    Trampoline, is_user_reason, reason_word,
};
pub use user::{UserPatch, UserPatcher};
pub use view::MapView;

use csam::GuestLin;

/// What the scan knows about guest code.
pub trait CodeInfo {
    /// Copies original guest bytes at `at` that are proven to be code; returns how many.
    fn bytes(&self, at: GuestLin, buf: &mut [u8]) -> usize;
    /// Does a proven instruction start at `at`?
    fn is_start(&self, at: GuestLin) -> bool;
    /// Is `at` the target of a known branch or call, an entry, or otherwise known to be reached not only by falling
    /// through from the instruction before?
    fn is_target(&self, at: GuestLin) -> bool;
    /// Is `at` a target of something outside `lo..hi`? Without knowledge of sources every target is.
    fn targeted_from_outside(&self, at: GuestLin, lo: GuestLin, hi: GuestLin) -> bool {
        let _ = (lo, hi);
        self.is_target(at)
    }
    /// The direct branches known to go to `at`; not necessarily all.
    fn sources(&self, at: GuestLin) -> alloc::vec::Vec<GuestLin> {
        let _ = at;
        alloc::vec::Vec::new()
    }
    /// If `len` bytes at `at` are filler (`nop`, `int3`) that never executes, as behind an unconditional jump: where its
    /// instructions start (bit n: n bytes behind `at`). A guest may yet enter it there.
    fn padding(&self, at: GuestLin, len: u32) -> Option<u32> {
        let _ = (at, len);
        None
    }
    /// May `len` bytes of the code view at `at` be written?
    fn writable_window(&self, at: GuestLin, len: u32) -> bool {
        let _ = (at, len);
        true
    }
}

/// A base for the trampoline region, 16 MiB aligned, from which a jump's highest displacement byte traps for code whose
/// EIP has the top byte `code_top`, `code_top - 1` or `code_top + 1`. Without one, windows with an instruction start at
/// their fifth byte get a trap byte instead of a jump.
pub fn good_bases(code_top: u8) -> impl Iterator<Item = u32> {
    // The top byte of the displacement is the difference of the top bytes or, when the lower 24 bits borrow, one less.
    (0..=255u8)
        .filter(move |top| {
            let d = top.wrapping_sub(code_top);
            traps(d) && traps(d.wrapping_sub(1)) && traps(d.wrapping_sub(2)) && traps(d.wrapping_add(1))
        })
        .map(|top| u32::from(top) << 24)
}
