//! A scripted world for tests of what drives worlds: no process, no guest code.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::world::{
    Backing, Fill, HostSegment, HwRegs, Kicker, Prot, TableSpan, World, WorldError, WorldExit, WorldLin,
};

const PAGE: u32 = 4096;
const PAGES: u32 = 1 << 20;

/// What a fake world has been told, and what it holds. Scripts may look at it and change it.
#[derive(Debug)]
pub struct FakeState {
    /// What each mapped page (by page number) shows and allows. `Backing` offsets are those of the page itself.
    pub pages: BTreeMap<u32, (Backing, Prot)>,
    /// LDT slots in use.
    pub segments: BTreeMap<u16, HostSegment>,
    /// The vCPU page.
    pub vcpu: Vec<u8>,
    /// FXSAVE64 image.
    pub fpu: Box<[u8; 512]>,
    /// Where the gate stub and the vCPU page were placed.
    pub gate: Option<(WorldLin, WorldLin)>,
    /// The registers of every run, as it was started.
    pub runs: Vec<HwRegs>,
}

/// What a fake world with a seat is armed for: epoch, CR3 and tables. None: it is not.
pub type Armed = Arc<Mutex<Option<(u32, u32, Vec<TableSpan>)>>>;

type Step = Box<dyn FnMut(&mut HwRegs, &mut FakeState) -> Result<WorldExit, WorldError> + Send>;

/// A world that does at each run what the next step of its script says. When the script is over, `run` answers
/// [`WorldError::Died`].
pub struct FakeWorld {
    state: FakeState,
    script: VecDeque<Step>,
    kicked: Arc<FakeKicker>,
    fills: Vec<Fill>,
    seat: Option<u32>,
    armed: Armed,
    gone: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct FakeKicker(AtomicBool);

impl Kicker for FakeKicker {
    fn kick(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Default for FakeWorld {
    fn default() -> Self {
        FakeWorld::new()
    }
}

impl FakeWorld {
    /// A world with nothing mapped and an empty script.
    #[must_use]
    pub fn new() -> FakeWorld {
        let state = FakeState {
            pages: BTreeMap::new(),
            segments: BTreeMap::new(),
            vcpu: vec![0; PAGE as usize],
            fpu: Box::new([0; 512]),
            gate: None,
            runs: Vec::new(),
        };
        FakeWorld {
            state,
            script: VecDeque::new(),
            kicked: Arc::default(),
            fills: Vec::new(),
            seat: None,
            armed: Armed::default(),
            gone: Arc::default(),
        }
    }

    /// Appends a step.
    pub fn then(
        &mut self,
        step: impl FnMut(&mut HwRegs, &mut FakeState) -> Result<WorldExit, WorldError> + Send + 'static,
    ) -> &mut Self {
        self.script.push_back(Box::new(step));
        self
    }

    /// Appends a step that exits like this with the registers as they are.
    pub fn then_exit(&mut self, exit: WorldExit) -> &mut Self {
        self.then(move |_, _| Ok(exit))
    }

    /// Lets it say that it has mapped these runs by itself, each for one fault.
    pub fn will_have_filled(&mut self, fills: &[Fill]) {
        self.fills.extend_from_slice(fills);
    }

    /// Gives it a seat, and yields what it is armed for.
    pub fn take_seat(&mut self, seat: u32) -> Armed {
        self.seat = Some(seat);
        Arc::clone(&self.armed)
    }

    /// With which it can be said to have ended.
    #[must_use]
    pub fn end(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.gone)
    }

    /// What the world has been told so far.
    #[must_use]
    pub fn state(&self) -> &FakeState {
        &self.state
    }

    /// What is mapped at this address.
    #[must_use]
    pub fn mapped(&self, at: WorldLin) -> Option<(Backing, Prot)> {
        self.state.pages.get(&(at.0 / PAGE)).copied()
    }

    fn range(at: WorldLin, len: u32) -> Result<std::ops::Range<u32>, WorldError> {
        let fine = len > 0
            && len.is_multiple_of(PAGE)
            && at.0.is_multiple_of(PAGE)
            && u64::from(at.0) + u64::from(len) <= 1 << 32;
        if !fine {
            let why = String::from("not a range of whole pages below 4 GiB");
            return Err(WorldError::Map { at: at.0, len, why });
        }
        let first = at.0 / PAGE;
        Ok(first..first + len / PAGE)
    }
}

impl World for FakeWorld {
    fn run(&mut self, regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        if self.kicked.0.swap(false, Ordering::SeqCst) {
            return Ok(WorldExit::Kick);
        }
        self.state.runs.push(*regs);
        let Some(mut step) = self.script.pop_front() else {
            return Err(WorldError::Died(String::from("the script is over")));
        };
        step(regs, &mut self.state)
    }

    fn take_exit(&mut self, regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        self.run(regs)
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    fn seat(&self) -> Option<u32> {
        self.seat
    }

    fn arm(&mut self, epoch: u32, cr3: u32, tables: &[TableSpan]) -> bool {
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = Some((epoch, cr3, tables.to_vec()));
        self.seat.is_some()
    }

    fn is_armed(&self, epoch: u32) -> bool {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|a| a.0 == epoch)
    }

    fn disarm(&mut self) {
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn map(&mut self, at: WorldLin, len: u32, backing: Backing, prot: Prot) -> Result<(), WorldError> {
        for (i, page) in FakeWorld::range(at, len)?.enumerate() {
            let into = i as u64 * u64::from(PAGE);
            let backing = match backing {
                Backing::Ram(offset) => Backing::Ram(offset + into),
                Backing::Code(offset) => Backing::Code(offset + into),
                Backing::Vcpu => Backing::Vcpu,
            };
            self.state.pages.insert(page, (backing, prot));
        }
        Ok(())
    }

    fn unmap(&mut self, at: WorldLin, len: u32) -> Result<(), WorldError> {
        let range = if (at.0, len) == (0, 0) { 0..PAGES } else { FakeWorld::range(at, len)? };
        self.state.pages.retain(|page, _| !range.contains(page));
        Ok(())
    }

    fn protect(&mut self, at: WorldLin, len: u32, prot: Prot) -> Result<(), WorldError> {
        let range = FakeWorld::range(at, len)?;
        if range.clone().any(|page| !self.state.pages.contains_key(&page)) {
            return Err(WorldError::Map { at: at.0, len, why: String::from("not all of it is mapped") });
        }
        for (_, mapping) in self.state.pages.range_mut(range) {
            mapping.1 = prot;
        }
        Ok(())
    }

    fn set_segment(&mut self, slot: u16, segment: HostSegment) -> Result<(), WorldError> {
        self.state.segments.insert(slot, segment);
        Ok(())
    }

    fn fpu(&mut self) -> &mut [u8; 512] {
        &mut self.state.fpu
    }

    fn vcpu_read(&self, offset: u32) -> u32 {
        let word = self.state.vcpu.get(offset as usize..).and_then(|rest| rest.first_chunk());
        word.map_or(0, |b| u32::from_le_bytes(*b))
    }

    fn vcpu_write(&mut self, offset: u32, value: u32) {
        if let Some(b) = self.state.vcpu.get_mut(offset as usize..).and_then(|rest| rest.first_chunk_mut()) {
            *b = value.to_le_bytes();
        }
    }

    fn place_gate(&mut self, stub: WorldLin, vcpu: WorldLin) -> Result<(), WorldError> {
        FakeWorld::range(stub, PAGE)?;
        self.map(vcpu, PAGE, Backing::Vcpu, Prot::READ | Prot::WRITE)?;
        self.vcpu_write(crate::raw::GATE, stub.0);
        self.vcpu_write(crate::raw::GATE + 4, 0x33);
        self.state.gate = Some((stub, vcpu));
        Ok(())
    }

    fn take_fills(&mut self, each: &mut dyn FnMut(Fill)) -> u32 {
        let n = self.fills.len() as u32;
        self.fills.drain(..).for_each(each);
        n
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kicked) as Arc<dyn Kicker>
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_followed_and_its_end_is_a_death() {
        let mut world = FakeWorld::new();
        world.then(|regs, _| {
            regs.eip = 5;
            Ok(WorldExit::Syscall)
        });
        let mut regs = HwRegs::default();
        assert_eq!(world.run(&mut regs).unwrap(), WorldExit::Syscall);
        assert_eq!((regs.eip, world.state().runs.len()), (5, 1));
        assert!(matches!(world.run(&mut regs), Err(WorldError::Died(_))));
    }

    #[test]
    fn mappings_are_kept_page_by_page() {
        let mut world = FakeWorld::new();
        world.map(WorldLin(0x10000), 0x3000, Backing::Ram(0x5000), Prot::READ).unwrap();
        world.unmap(WorldLin(0x11000), 0x1000).unwrap();
        assert_eq!(world.mapped(WorldLin(0x12fff)), Some((Backing::Ram(0x7000), Prot::READ)));
        assert_eq!(world.mapped(WorldLin(0x11000)), None);
        assert!(world.protect(WorldLin(0x10000), 0x2000, Prot::WRITE).is_err());
        world.unmap(WorldLin(0), 0).unwrap();
        assert!(world.state().pages.is_empty());
    }

    #[test]
    fn a_kick_before_a_run_ends_it_once() {
        let mut world = FakeWorld::new();
        world.then_exit(WorldExit::Syscall);
        world.kicker().kick();
        world.kicker().kick();
        assert_eq!(world.run(&mut HwRegs::default()).unwrap(), WorldExit::Kick);
        assert_eq!(world.run(&mut HwRegs::default()).unwrap(), WorldExit::Syscall);
    }
}
