//! What comes into a machine from outside its CPU and RAM: recorded on one machine, played back on another.
//!
//! Two machines with the same RAM and CPU that get the same inputs at the same instructions do the same. `em::lockstep`
//! runs the second one behind the first. Time is an input too, wherever it is read.

use crate::trap::Trap;
use csam::GuestPhys;
use std::cell::{Cell, RefCell};
use std::collections::{HashSet, VecDeque};

/// One input, or an output the other machine must make as well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// `in` yielded this.
    In {
        /// Port.
        port: u16,
        /// Bytes.
        size: u8,
        /// What was read.
        value: u32,
    },
    /// `out` wrote this.
    Out {
        /// Port.
        port: u16,
        /// Bytes.
        size: u8,
        /// What was written.
        value: u32,
    },
    /// The time-stamp counter was this.
    Tsc(u64),
    /// `rdmsr` yielded this.
    Msr {
        /// ECX.
        msr: u32,
        /// EDX:EAX, or the fault.
        value: Result<u64, Trap>,
    },
    /// The machine itself wrote to RAM, not across a page.
    Ram {
        /// Where.
        at: GuestPhys,
        /// What.
        bytes: Vec<u8>,
    },
}

/// A machine's tape.
#[derive(Debug, Default)]
pub enum Tape {
    /// None.
    #[default]
    Off,
    /// Inputs are written down.
    Record(VecDeque<Input>),
    /// Inputs come from here.
    Play(Play),
}

/// A tape that is played.
#[derive(Debug, Default)]
pub struct Play {
    /// What comes next.
    pub inputs: VecDeque<Input>,
    /// The first thing the machine did that is not on the tape.
    pub mismatch: Option<String>,
    /// Frames that page walks have read: those with page tables.
    pub tables: RefCell<HashSet<u32>>,
    /// Frames written to since the owner last emptied this.
    pub written: RefCell<HashSet<u32>>,
    last_written: Cell<Option<u32>>,
}

impl Play {
    fn note_written(&self, at: GuestPhys) {
        let frame = (at.0 >> 12) as u32;
        if self.last_written.replace(Some(frame)) != Some(frame) {
            self.written.borrow_mut().insert(frame);
        }
    }

    /// Counts the frames written to afresh.
    pub fn forget_written(&mut self) {
        self.written.get_mut().clear();
        self.last_written.set(None);
    }

    /// Takes the next input if `wanted` finds in it what it is for; else notes that the machine wanted `what` instead.
    fn next<T>(&mut self, what: impl Fn() -> String, wanted: impl Fn(&Input) -> Option<T>) -> Option<T> {
        let found = self.inputs.front().and_then(wanted);
        if found.is_some() {
            self.inputs.pop_front();
        } else if self.mismatch.is_none() {
            let there = self.inputs.front().map_or("nothing".into(), |i| format!("{i:x?}"));
            self.mismatch = Some(format!("{} where the other had {there}", what()));
        }
        found
    }

    /// What `in` yields.
    pub fn port_in(&mut self, port: u16, size: u8) -> u32 {
        let what = || format!("in of {size} bytes from port {port:x}");
        self.next(what, |i| match i {
            Input::In { port: p, size: s, value } if (*p, *s) == (port, size) => Some(*value),
            _ => None,
        })
        .unwrap_or(0)
    }

    /// `out` must be the same.
    pub fn port_out(&mut self, port: u16, size: u8, value: u32) {
        let this = Input::Out { port, size, value };
        self.next(|| format!("{this:x?}"), |i| (*i == this).then_some(()));
    }

    /// What the time-stamp counter was.
    pub fn tsc(&mut self) -> u64 {
        let value = |i: &Input| if let Input::Tsc(tsc) = i { Some(*tsc) } else { None };
        self.next(|| "a reading of the time-stamp counter".into(), value).unwrap_or(0)
    }

    /// What `rdmsr` yielded.
    pub fn rdmsr(&mut self, msr: u32) -> Result<u64, Trap> {
        self.next(
            || format!("rdmsr {msr:x}"),
            |i| match i {
                Input::Msr { msr: m, value } if *m == msr => Some(*value),
                _ => None,
            },
        )
        .unwrap_or(Ok(0))
    }

    /// What the machine itself wrote to RAM next, if that comes now.
    pub fn ram(&mut self) -> Option<(GuestPhys, Vec<u8>)> {
        match self.inputs.front() {
            Some(Input::Ram { .. }) => match self.inputs.pop_front() {
                Some(Input::Ram { at, bytes }) => Some((at, bytes)),
                _ => None,
            },
            _ => None,
        }
    }
}

impl Tape {
    /// Inputs are to be written down: the machine must see them all.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        matches!(self, Tape::Record(_))
    }

    /// Writes an input down, if the tape is recording.
    #[inline]
    pub fn note(&mut self, input: impl FnOnce() -> Input) {
        if let Tape::Record(inputs) = self {
            inputs.push_back(input());
        }
    }

    /// RAM is written to, not across a page.
    #[inline]
    pub fn note_written(&self, at: GuestPhys) {
        if let Tape::Play(play) = self {
            play.note_written(at);
        }
    }

    /// A page walk reads a table in this frame.
    #[inline]
    pub fn note_table(&self, at: GuestPhys) {
        if let Tape::Play(play) = self {
            play.tables.borrow_mut().insert((at.0 >> 12) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_written_to_are_known_until_they_are_forgotten() {
        let mut play = Play::default();
        for at in [0x1000, 0x1ffc, 0x5000, 0x1004] {
            play.note_written(GuestPhys(at));
        }
        assert_eq!(*play.written.borrow(), HashSet::from([1, 5]));
        play.forget_written();
        play.note_written(GuestPhys(0x1008));
        assert_eq!(*play.written.borrow(), HashSet::from([1]));
    }

    #[test]
    fn what_is_played_is_what_was_recorded_and_anything_else_is_a_mismatch() {
        let mut tape = Tape::Record(VecDeque::new());
        tape.note(|| Input::In { port: 0x60, size: 1, value: 7 });
        tape.note(|| Input::Out { port: 0x61, size: 1, value: 8 });
        tape.note(|| Input::Tsc(9));
        tape.note(|| Input::Msr { msr: 0x10, value: Err(Trap::gp(0)) });
        tape.note(|| Input::Ram { at: GuestPhys(0x1000), bytes: vec![1] });
        let Tape::Record(inputs) = tape else { panic!() };
        let mut play = Play { inputs, ..Play::default() };
        assert_eq!(play.port_in(0x60, 1), 7);
        play.port_out(0x61, 1, 8);
        assert_eq!(play.ram(), None);
        assert_eq!(play.tsc(), 9);
        assert_eq!(play.rdmsr(0x10), Err(Trap::gp(0)));
        assert_eq!(play.ram(), Some((GuestPhys(0x1000), vec![1])));
        assert_eq!((play.mismatch.clone(), play.inputs.len()), (None, 0));

        play.inputs.push_back(Input::Out { port: 1, size: 1, value: 2 });
        play.port_out(1, 1, 3);
        play.tsc();
        let first = play.mismatch.unwrap();
        assert!(
            first.starts_with("Out") && first.contains("value: 3") && first.contains("value: 2"),
            "{first}"
        );
        assert_eq!(play.inputs.len(), 1);
    }
}
