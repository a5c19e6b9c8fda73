//! Worlds that hand the guest over to each other, when it loads CR3, without the monitor: what they and the monitor share, and
//! the monitor's side.
//!
//! 1. Each such world has a *seat*: its arena lies in one memory object with those of all others, which each of them has
//!    mapped, behind the [`Baton`].
//! 2. The monitor gives the baton to one world and waits for it, whoever gives it back: [`Baton::holder`] then says which
//!    world has left guest code.
//! 3. A world can be taken over by another one while it is *armed* ([`Hand`]): the monitor says for which CR3, and what the
//!    guest's tables were when all its shadow was right. Whatever is changed in it afterwards disarms it.
//!
//! All these worlds belong to one guest and hold its kernel: that they can write each other's arena gives it nothing. Ring 3
//! of a keyed world reaches none of it. The world's side is [`super::rc_switch`].

use std::io;
use std::mem::offset_of;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, Release, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::arena::{Arena, ArenaMap, Word, turn};
use super::spawn::Process;
use crate::ram::GuestRam;
use crate::shared::SharedMap;
use crate::world::TableSpan;

/// How many worlds can have a seat at a time, those that are about to end included.
pub(crate) const SEATS: usize = 640;
/// Worlds that can be handed to in one run.
const LISTED: usize = 64;
/// Entries of the table by which a world is found.
pub(crate) const PLACES: usize = 256;
/// Pieces of the guest's tables that can be watched for one world, and 32-bit words in them.
const SPANS: usize = 64;
const WORDS: usize = 2048;
/// Slots of a host LDT, in words of a bitmap.
const SLOT_WORDS: usize = 8192 / 32;

/// What all of them share.
#[repr(C, align(4096))]
pub(crate) struct Baton {
    /// Whose turn it is: a world's or the monitor's.
    pub(crate) turn: AtomicU32,
    /// The seat of the world that has it, or had it last.
    pub(crate) holder: AtomicU32,
    /// Changes whenever something does that the monitor tells all worlds alike.
    pub(crate) epoch: AtomicU32,
    /// How many there are in `list`.
    pub(crate) listed: AtomicU32,
    /// Seats of worlds that were handed to since the monitor last looked.
    pub(crate) list: [AtomicU32; LISTED],
    /// By CR3 ([`place_of`]), the seat of the world that may be it, plus 1; or 0.
    pub(crate) places: [AtomicU32; PLACES],
}

/// Where [`Baton::places`] has the world for this CR3.
pub(crate) fn place_of(cr3: u32) -> usize {
    (cr3 >> 12) as usize % PLACES
}

/// The memory object. There is no value of this type, only its layout.
#[repr(C)]
pub(crate) struct RelayMemory {
    pub(crate) baton: Baton,
    pub(crate) arenas: [Arena; SEATS],
}

const _: () = assert!(offset_of!(RelayMemory, arenas).is_multiple_of(4096));

/// A piece of the guest's tables, and how many words of [`Hand::words`] it takes.
#[repr(C)]
pub(crate) struct Span {
    /// GuestPhys, a multiple of 4.
    pub(crate) at: u64,
    pub(crate) words: u32,
    pub(crate) reserved: u32,
}

/// The part of the arena that is about handing over.
#[repr(C)]
pub(crate) struct Hand {
    /// Set-up: the world's seat plus 1; 0: it has none.
    pub(crate) seat: AtomicU32,
    /// 1: armed.
    pub(crate) ready: AtomicU32,
    /// For which CR3.
    pub(crate) cr3: AtomicU32,
    /// Under which [`Baton::epoch`].
    pub(crate) epoch: AtomicU32,
    /// Not 0: since the monitor last looked, the guest has flushed here what other address spaces may have, too.
    pub(crate) flushed: AtomicU32,
    /// It is in the baton's list.
    pub(crate) listed: AtomicU32,
    /// How often it was handed to, ever (wraps).
    pub(crate) taken: AtomicU32,
    /// How many spans count.
    pub(crate) spans: AtomicU32,
    pub(crate) span: [Span; SPANS],
    /// What was in them, one behind the other.
    pub(crate) words: [AtomicU32; WORDS],
    /// Which slots of its LDT hold what the monitor says, a bit each.
    pub(crate) slots: [AtomicU32; SLOT_WORDS],
}

/// The memory of all seats, and who has them.
#[derive(Debug)]
pub(crate) struct Relay {
    map: SharedMap,
    seats: Mutex<Vec<Seat>>,
    /// The seat of the world that was given the baton last, by the monitor itself.
    given: AtomicU32,
}

/// Who has a seat.
#[derive(Clone, Debug, Default)]
struct Seat {
    process: Option<Arc<Process>>,
    /// The monitor does nothing more with it.
    left: bool,
}

impl Relay {
    pub(crate) fn new() -> io::Result<Relay> {
        Ok(Relay {
            map: SharedMap::new(c"subring-arena", size_of::<RelayMemory>())?,
            seats: Mutex::new(vec![Seat::default(); SEATS]),
            given: AtomicU32::new(u32::MAX),
        })
    }

    /// Where in the memory object the arena of this seat is.
    pub(crate) fn arena_at(seat: usize) -> u64 {
        (offset_of!(RelayMemory, arenas) + seat * size_of::<Arena>()) as u64
    }

    fn seats(&self) -> MutexGuard<'_, Vec<Seat>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A seat nobody has, with an arena of zeroes. None: there is none.
    pub(crate) fn free(&self) -> io::Result<Option<(usize, ArenaMap)>> {
        let free = |seat: &Seat| seat.process.as_ref().is_none_or(|p| seat.left && p.is_dead());
        let Some(seat) = self.seats().iter().position(free) else { return Ok(None) };
        self.map.discard(Self::arena_at(seat), size_of::<Arena>())?;
        Ok(Some((seat, ArenaMap::part_of(&self.map, Self::arena_at(seat))?)))
    }

    /// Gives somebody a seat.
    pub(crate) fn seat(&self, seat: usize, process: &Arc<Process>) {
        if let Some(slot) = self.seats().get_mut(seat) {
            *slot = Seat { process: Some(Arc::clone(process)), left: false };
        }
    }

    /// The monitor has dropped its world.
    pub(crate) fn leave(&self, seat: u32) {
        if let Some(slot) = self.seats().get_mut(seat as usize) {
            slot.left = true;
        }
    }

    /// Who has this seat.
    pub(crate) fn process(&self, seat: u32) -> Option<Arc<Process>> {
        self.seats().get(seat as usize).and_then(|seat| seat.process.clone())
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= size_of::<Baton>());
        // SAFETY: the callers pass the offset of an AtomicU32 of the Baton, with which the mapping begins; it lives as long
        // as self.
        unsafe { AtomicU32::from_ptr(self.map.base().as_ptr().add(offset).cast()) }
    }

    pub(crate) fn turn(&self) -> &AtomicU32 {
        self.word(offset_of!(Baton, turn))
    }

    /// The seat of the world that runs, or ran last (an allegation).
    pub(crate) fn holder(&self) -> u32 {
        self.word(offset_of!(Baton, holder)).load(SeqCst)
    }

    /// The world of this seat gets the baton from the monitor.
    pub(crate) fn begin(&self, seat: u32) {
        self.given.store(seat, SeqCst);
        self.word(offset_of!(Baton, holder)).store(seat, SeqCst);
        self.turn().store(turn::WORLD, SeqCst);
    }

    pub(crate) fn set_epoch(&self, epoch: u32) {
        self.word(offset_of!(Baton, epoch)).store(epoch, Relaxed);
    }

    /// The world of this seat is the one for this CR3.
    pub(crate) fn set_place(&self, cr3: u32, seat: u32) {
        let word = self.word(offset_of!(Baton, places) + 4 * place_of(cr3));
        word.store(seat + 1, Relaxed);
    }

    /// Empties the list of worlds that were handed to (an allegation: any numbers).
    pub(crate) fn take_listed(&self) -> Vec<u32> {
        let listed = self.word(offset_of!(Baton, listed));
        let n = (listed.swap(0, Relaxed) as usize).min(LISTED);
        (0..n).map(|i| self.word(offset_of!(Baton, list) + 4 * i).load(Relaxed)).collect()
    }

    /// A kick of the world that was given the baton has come: so does whoever has it now.
    pub(crate) fn kick_holder(&self, given_to: u32, signal: i32) {
        loop {
            let holder = self.holder();
            // A world that was given it since, perhaps one that is not ready for signals, is not this kick's.
            let begun = self.given.load(SeqCst) == given_to && self.turn().load(SeqCst) == turn::WORLD;
            if holder == given_to || !begun {
                return;
            }
            let Some(process) = self.process(holder) else { return };
            process.arena.word(Word::KICK).store(1, SeqCst);
            process.signal(signal);
            if self.holder() == holder {
                return;
            }
        }
    }
}

impl ArenaMap {
    fn hand_word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= size_of::<Hand>());
        // SAFETY: the callers pass the offset of an AtomicU32 of Hand, so it lies in the mapping, which lives as long as
        // self.
        unsafe {
            AtomicU32::from_ptr(self.shared().base().as_ptr().add(offset_of!(Arena, hand) + offset).cast())
        }
    }

    /// The world has this seat.
    pub(crate) fn set_seat(&self, seat: usize) {
        self.hand_word(offset_of!(Hand, seat)).store(seat as u32 + 1, Release);
    }

    /// Arms the world, with what is in these pieces of guest RAM now. False: there are too many, or one is not in RAM.
    pub(crate) fn arm(&self, ram: &GuestRam, epoch: u32, cr3: u32, tables: &[TableSpan]) -> bool {
        self.disarm();
        let mut used = 0;
        for (i, table) in tables.iter().enumerate() {
            let words = table.len as usize / 4;
            let fits = i < SPANS && used + words <= WORDS;
            if !fits || !table.at.is_multiple_of(4) || !table.len.is_multiple_of(4) {
                return false;
            }
            let span = offset_of!(Arena, hand) + offset_of!(Hand, span) + i * size_of::<Span>();
            let at = (span + offset_of!(Span, at)) as u64;
            let _in_range = self.shared().write_u64(at, table.at);
            let at = (span + offset_of!(Span, words)) as u64;
            let _in_range = self.shared().write_u32(at, table.len / 4);
            for word in 0..words {
                let Some(value) = ram.shared().read_u32(table.at + 4 * word as u64) else { return false };
                self.hand_word(offset_of!(Hand, words) + 4 * (used + word)).store(value, Relaxed);
            }
            used += words;
        }
        self.hand_word(offset_of!(Hand, spans)).store(tables.len() as u32, Relaxed);
        self.hand_word(offset_of!(Hand, cr3)).store(cr3, Relaxed);
        self.hand_word(offset_of!(Hand, epoch)).store(epoch, Relaxed);
        self.hand_word(offset_of!(Hand, ready)).store(1, Release);
        true
    }

    pub(crate) fn disarm(&self) {
        self.hand_word(offset_of!(Hand, ready)).store(0, Release);
    }

    /// It is armed, under this epoch.
    pub(crate) fn is_armed(&self, epoch: u32) -> bool {
        self.hand_word(offset_of!(Hand, ready)).load(Relaxed) == 1
            && self.hand_word(offset_of!(Hand, epoch)).load(Relaxed) == epoch
    }

    /// What other address spaces may have, too, has been followed there; and it is in no list.
    pub(crate) fn forget_hand(&self) {
        self.hand_word(offset_of!(Hand, flushed)).store(0, Relaxed);
        self.hand_word(offset_of!(Hand, listed)).store(0, Relaxed);
    }

    /// The slot of the LDT holds what the monitor says.
    pub(crate) fn slot_is_set(&self, slot: u16) {
        let word = usize::from(slot) / 32 % SLOT_WORDS;
        self.hand_word(offset_of!(Hand, slots) + 4 * word).fetch_or(1 << (slot % 32), Relaxed);
    }

    /// No slot of the LDT does.
    pub(crate) fn forget_slots(&self) {
        for word in 0..SLOT_WORDS {
            self.hand_word(offset_of!(Hand, slots) + 4 * word).store(0, Relaxed);
        }
    }

    /// How often the world says it was handed to, ever.
    pub(crate) fn taken(&self) -> u32 {
        self.hand_word(offset_of!(Hand, taken)).load(Relaxed)
    }
}
