//! A load of CR3 whose world is armed ([`super::relay`]): this world hands the guest over to it and sleeps.
//!
//! What the monitor would do is done here or shown to be needless: nothing of the other world's shadow went stale if the
//! guest's tables are as they were when all of it was right; the state the guest's CPU has is carried over; what the monitor
//! has told both worlds is the same (the epoch). Anything else is left to the monitor, and nothing has changed then.

use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::arena::{Arena, Fx, SEATS_VA, request, turn, vcpu_word};
use super::rc::syscall;
use super::rc_deliver::{CPL, HOST_RING0, HOST_RING3, REFILL, SELECTORS};
use super::rc_fill::Ram;
use super::rc_quick::{CS, KERNEL_CS};
use super::relay::{Hand, RelayMemory, SEATS, place_of};
use crate::shared::copy;
use crate::world::{HwRegs, Quick};

const TF: u32 = 0x100;
/// In a selector: of the LDT.
const LDT: u32 = 4;
/// vCPU page: the same as patm's `vcpu_page` of this name.
const CR3: u32 = 0x30;
/// Words of the vCPU page in which the guest's CPU has state, the same as patm's `vcpu_page` has (first offset, words): IF, pending interrupts and hidden flags;
/// selectors; CR0 and CR2; CR4; GDTR; IDTR, LDTR and TR; CPL; the host's selectors.
pub const CARRIED: [(u32, u32); 9] = [
    (0, 3),
    (SELECTORS, 6),
    (0x28, 2),
    (0x34, 1),
    (0x64, 2),
    (0x1a0, 4),
    (CPL, 1),
    (HOST_RING0, 6),
    (HOST_RING3, 6),
];

/// All seats, in a world that has one.
fn relay() -> *mut RelayMemory {
    std::ptr::with_exposed_provenance_mut(SEATS_VA as usize)
}

/// The turn of all worlds that share the baton, in one that has a seat.
pub(crate) fn common_turn<'a>() -> &'a AtomicU32 {
    // SAFETY: it is mapped for the world's whole life; it is an atomic.
    unsafe { &(*relay()).baton.turn }
}

/// `mov cr3, r32`: true if another world has the guest now. Its turn is this one's no more.
///
/// # Safety
/// In a world, `a` is its mapped arena with the registers the gate saved, and the world has the turn.
pub(crate) unsafe fn load_cr3(a: *mut Arena, quick: &Quick) -> bool {
    // SAFETY: by contract: atomics, and registers only we touch while we have the turn.
    let (own, mut regs) = unsafe { (&(*a).hand, (&raw const (*a).regs).read_volatile()) };
    let mine = own.seat.load(Relaxed);
    let Some(&cr3) = regs.gpr.get(quick.base as usize).filter(|_| mine != 0) else { return false };
    // SAFETY: who has a seat has them all mapped for its whole life.
    let baton = unsafe { &(*relay()).baton };
    let place = baton.places.get(place_of(cr3)).map_or(0, |place| place.load(Relaxed));
    if place == 0 || place == mine || place as usize > SEATS {
        return false;
    }
    let seat = place.wrapping_sub(1);
    // SAFETY: as above: the seat's number is below SEATS.
    let b = unsafe { (&raw mut (*relay()).arenas).cast::<Arena>().add(seat as usize) };
    // SAFETY: as above. Whoever has the turn is the only one who writes what is not atomic.
    unsafe {
        let hand = &(*b).hand;
        let fine = vcpu_word(a, CPL).load(Relaxed) == 0
            && regs.eflags & TF == 0
            && (*a).kick.load(SeqCst) == 0
            && (*a).ports.posted.load(Relaxed) == 0
            && own.flushed.load(Relaxed) == 0
            && (*b).turn.load(SeqCst) == turn::MONITOR
            && (*b).kick.load(SeqCst) == 0
            && hand.ready.load(Acquire) == 1
            && hand.cr3.load(Relaxed) == cr3
            && hand.epoch.load(Relaxed) == baton.epoch.load(Relaxed)
            && has_segments(a, hand, &regs)
            && tables_are_as_they_were(&Ram { pages: (*a).fill.ram_pages.load(Relaxed) }, hand);
        if !fine {
            return false;
        }
        if hand.listed.load(Relaxed) == 0 {
            let n = baton.listed.load(Relaxed);
            let Some(slot) = baton.list.get(n as usize) else { return false };
            slot.store(seat, Relaxed);
            baton.listed.store(n.wrapping_add(1), Relaxed);
            hand.listed.store(1, Relaxed);
        }
        if (*a).fill.noted.load(Relaxed) != 0 {
            // What was mapped since is not among what the tables are compared for.
            own.ready.store(0, Relaxed);
        }
        hand.taken.store(hand.taken.load(Relaxed).wrapping_add(1), Relaxed);
        for (first, words) in CARRIED {
            for at in (0..words).map(|i| first.wrapping_add(4u32.wrapping_mul(i))) {
                vcpu_word(b, at).store(vcpu_word(a, at).load(Relaxed), Relaxed);
            }
        }
        vcpu_word(b, CR3).store(cr3, Relaxed);
        vcpu_word(b, REFILL).store(0, Relaxed);
        regs.eip = quick.resume;
        regs.sel[CS] = KERNEL_CS;
        (&raw mut (*b).regs).write_volatile(regs);
        copy((&raw const (*a).fx).cast(), (&raw mut (*b).fx).cast(), size_of::<Fx>());
        (&raw mut (*b).ports.rows).write_volatile((&raw const (*a).ports.rows).read_volatile());
        (&raw mut (*b).doze.guard).write_volatile((&raw const (*a).doze.guard).read_volatile());
        (*b).commands_len.store(0, Relaxed);
        (*b).request.store(request::RUN, Relaxed);
        baton.holder.store(seat, SeqCst);
        // Who kicked before that has kicked us, and who kicks later sees the other world.
        if (*a).kick.load(SeqCst) != 0 {
            (*b).kick.store(1, SeqCst);
        }
        (*a).turn.store(turn::MONITOR, SeqCst);
        (*b).turn.store(turn::WORLD, SeqCst);
        let word = (*b).turn.as_ptr().addr() as u64;
        syscall(libc::SYS_futex, word, libc::FUTEX_WAKE as u64, 1, 0, 0, 0);
    }
    true
}

/// All descriptors in use are in the other world's LDT, too.
///
/// # Safety
/// As [`load_cr3`].
unsafe fn has_segments(a: *mut Arena, hand: &Hand, regs: &HwRegs) -> bool {
    let has = |selector: u32| {
        selector & LDT == 0
            || hand
                .slots
                .get((selector >> 8) as usize)
                .is_some_and(|word| word.load(Relaxed) >> (selector >> 3 & 31) & 1 != 0)
    };
    let in_hardware = regs.sel.iter().enumerate().filter(|(i, _)| *i != CS);
    let known = [HOST_RING0, HOST_RING3].into_iter().all(|first| {
        // SAFETY: by contract.
        (0..6).all(|i| has(unsafe { vcpu_word(a, first.wrapping_add(4 * i)).load(Relaxed) } & 0xffff))
    });
    known && in_hardware.into_iter().all(|(_, selector)| has(u32::from(*selector)))
}

/// The guest's tables are what they were when the other world was armed.
fn tables_are_as_they_were(ram: &Ram, hand: &Hand) -> bool {
    let mut words = hand.words.iter();
    hand.span.iter().take(hand.spans.load(Relaxed) as usize).all(|span| {
        // SAFETY: a word of the mapped arena, which only the monitor writes, when it has the turn.
        let at = unsafe { AtomicU64::from_ptr((&raw const span.at).cast_mut()) }.load(Relaxed);
        // SAFETY: as above.
        let n = unsafe { AtomicU32::from_ptr((&raw const span.words).cast_mut()) }.load(Relaxed);
        (0..u64::from(n)).all(|i| match (words.next(), ram.word(at.wrapping_add(4 * i))) {
            (Some(then), Some(now)) => then.load(Relaxed) == now.load(Relaxed),
            _ => false,
        })
    })
}
