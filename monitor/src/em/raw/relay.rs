//! CR3 loads for which one world hands the guest over to another: which worlds it may be handed to, and what a run was that
//! ended in another world than it began in (`docs/decisions/0017-handing-over.md`).

use super::segments::Published;
use super::users::impossible;
use super::*;
use crate::pgm::walk::PhysMemory;
use host_driver_shim::world::{FillRules, TableSpan};

/// All that worlds are told alike, but for what is an address space's own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Common {
    published: Published,
    rules: FillRules,
    quick_version: u64,
}

impl RawEngine {
    /// CR3 loads that needed no exit.
    #[must_use]
    pub fn handed_over(&self) -> u64 {
        self.kernels.iter().map(|s| u64::from(s.world.taken_over())).sum()
    }

    /// The instruction at EIP has left by the gate: if it loads CR3, worlds may do that by themselves from now on.
    pub(super) fn learn_cr3(&mut self, cpu: &CpuState, m: &Machine, reason: u32, i: &Instruction) {
        let joint = matches!(self.kernels[0].role, Role::Joint { .. });
        if i.code() == Code::Mov_cr_r32
            && i.op0_register() == Register::CR3
            && joint
            && !m.tape.is_recording()
        {
            self.enter_quick(Quick {
                reason,
                kind: QuickKind::LoadCr3,
                base: i.op1_register().number() as u32,
                resume: self.resume_behind(cpu, i),
                ..Quick::default()
            });
        }
    }

    /// A joint world is about to run, with all it is to be told: lets others hand over to it from here on, if it is `calm`.
    pub(super) fn arm(&mut self, number: usize, cpu: &CpuState, m: &Machine, calm: bool) {
        let space = &self.kernels[number];
        let (Role::Joint { cr3 }, Some(_)) = (space.role, space.world.seat()) else { return };
        let (Some(published), Some(rules)) = (space.published, space.fill_rules) else {
            // Not all of it could be told: nobody is told the same.
            self.common = None;
            self.epoch = self.epoch.wrapping_add(1);
            self.kernels[number].world.set_epoch(self.epoch);
            return;
        };
        let common = Common {
            published: published.but_for_taints(),
            rules: FillRules { cr3: 0, pdpte: [0; 4], ..rules },
            quick_version: self.quick_version,
        };
        if self.common != Some(common) {
            self.common = Some(common);
            self.epoch = self.epoch.wrapping_add(1);
        }
        let epoch = self.epoch;
        let space = &mut self.kernels[number];
        space.match_numbering(&self.descriptors);
        space.world.set_epoch(epoch);
        if !calm || space.world.is_armed(epoch) || m.tape.is_recording() {
            return;
        }
        let below = self.boundary.and_then(Boundary::limit).unwrap_or(0);
        if space.data.has_global_below(below) || space.code.has_global_below(below) {
            return;
        }
        let mut tables = Vec::new();
        if cpu.cr4 & cr4::PAE != 0 {
            // What is latched must be what is there: it is compared with that.
            let at = GuestPhys(u64::from(cr3 & !0x1f));
            for (i, latched) in (0u64..).zip(cpu.pdpte) {
                let half = |n: u64| u64::from(m.read_u32(GuestPhys(at.0 + 8 * i + 4 * n)));
                if half(0) | half(1) << 32 != latched {
                    return;
                }
            }
            tables.push((at, 32));
        }
        for view in [&space.data, &space.code] {
            let Some(of_view) = view.local_tables(m, cpu) else { return };
            tables.extend(of_view);
        }
        let tables: Vec<TableSpan> = tables.iter().map(|&(at, len)| TableSpan { at: at.0, len }).collect();
        let _few_enough = space.world.arm(epoch, cr3, &tables);
    }

    /// The run that began in one world has ended in that of another `seat`, if there is one: brings all that is known of the
    /// CPU and of the worlds up to where that one goes on. Yields which it is.
    pub(super) fn follow_hand_overs(
        &mut self,
        from: usize,
        seat: Option<u32>,
        cpu: &mut CpuState,
        m: &mut Machine,
        entered: u64,
    ) -> Result<usize, RawError> {
        let layout = self.layout;
        let by_seat = |this: &Self, seat| this.kernels.iter().position(|s| s.world.seat() == Some(seat));
        let runners = self.kernels[from].world.take_runners();
        if runners.is_empty() && seat.is_none() {
            return Ok(from);
        }
        let to = seat.map_or(Some(from), |seat| by_seat(self, seat)).ok_or_else(impossible)?;
        let mut ran: Vec<usize> =
            runners.into_iter().filter_map(|seat| by_seat(self, seat)).chain([from]).collect();
        ran.sort_unstable();
        ran.dedup();
        for &i in ran.iter().filter(|i| **i != to) {
            let Role::Joint { cr3 } = self.kernels[i].role else { return Err(impossible()) };
            cpu.cr3 = cr3;
            let space = &mut self.kernels[i];
            space.last_used = self.clock;
            space.take_posted(m, entered);
            let flushed = space.take_fills(&layout, m.frames())?;
            self.follow_flushes(Place::Kernel(i), cpu, &flushed)?;
        }
        // What the first one was told of ports and time went along.
        let (ports, guards, loaded) =
            (self.kernels[from].ports, self.kernels[from].guards, self.kernels[from].loaded);
        for i in ran.iter().copied().chain([to]) {
            (self.kernels[i].ports, self.kernels[i].guards) = (ports, guards);
        }
        let space = &mut self.kernels[to];
        let (Role::Joint { cr3 }, Some(rules)) = (space.role, space.fill_rules) else {
            return Err(impossible());
        };
        space.loaded = loaded;
        space.last_used = self.clock;
        (cpu.cr3, cpu.pdpte) = (cr3, rules.pdpte);
        self.fpu_in = Some(Place::Kernel(to));
        m.forget_translations();
        self.ran = ran;
        Ok(to)
    }

    /// A kick is answered: it is none for any of the worlds that ran.
    pub(super) fn forget_kicks(&mut self) {
        for &i in &self.ran {
            self.kernels[i].world.forget_kick();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpum::cr0;
    use crate::machine::tests::{machine, paged};
    use host_driver_shim::fake::{Armed, FakeWorld};
    use host_driver_shim::world::Fill;

    const HERE: u32 = 0x1000;
    const THERE: u32 = 0x4000;

    struct Fakes(Mutex<Vec<FakeWorld>>);

    impl Worlds for Fakes {
        fn spawn(&self) -> Result<Box<dyn World>, WorldError> {
            Ok(Box::new(self.0.lock().unwrap().remove(0)))
        }
        fn set_cpu(&self, _: usize) {}
    }

    /// An engine whose worlds are these, and what each is armed for.
    fn engine(mut worlds: Vec<FakeWorld>) -> (RawEngine, Vec<Armed>) {
        let armed = (5..).zip(&mut worlds).map(|(seat, world)| world.take_seat(seat)).collect();
        let code = CodeMemory::new(1 << 20).unwrap();
        let host = Box::new(Fakes(Mutex::new(worlds)));
        (RawEngine::new(host, code, false, Isolation::Limits).unwrap(), armed)
    }

    /// Ring 0, everything flat, the first page at linear 0.
    fn ring0(m: &Machine, cr3: u32) -> CpuState {
        let mut cpu = paged(m, cr3, 0x8000);
        cpu.cr0 |= cr0::PE;
        (cpu.eip, cpu.eflags) = (0x2000, eflags::FIXED);
        let attr = SegAttr::PRESENT | SegAttr::RW | SegAttr::BIG;
        cpu.seg.fill(Segment { selector: 0x10, base: 0, limit: u32::MAX, attr });
        cpu.seg[seg::CS].attr |= SegAttr::CODE;
        cpu
    }

    fn load_cr3(cpu: &mut CpuState, m: &mut Machine, cr3: u32) {
        cpu.cr3 = cr3;
        m.paging_changed(cpu, PagingChange::Cr3);
    }

    #[test]
    fn a_world_is_armed_when_its_cr3_is_loaded_and_all_it_shows_was_there_before() {
        let mut world = FakeWorld::new();
        let at = Layout::CANDIDATES[0].data(GuestLin(0));
        let fill = Fill { at, pages: 1, pfn: 8, rights: 0 };
        world.will_have_filled(&[fill]);
        for _ in 0..5 {
            world.then_exit(WorldExit::Kick);
        }
        let (mut engine, armed) = engine(vec![world]);
        let mut m = machine(1);
        let mut cpu = ring0(&m, HERE);
        let mut go = |engine: &mut RawEngine, cpu: &mut CpuState| {
            armed[0].lock().unwrap().take();
            load_cr3(cpu, &mut m, HERE);
            assert_eq!(engine.run(cpu, &mut m, false).unwrap(), After::Kicked);
            armed[0].lock().unwrap().clone()
        };
        assert!(go(&mut engine, &mut cpu).is_some_and(|(_, cr3, tables)| cr3 == HERE && tables.is_empty()));
        assert_eq!(go(&mut engine, &mut cpu), None, "a page was entered since");
        let (epoch, _, tables) = go(&mut engine, &mut cpu).unwrap();
        let spans: Vec<_> = tables.iter().map(|t| (t.at, t.len)).collect();
        assert_eq!(spans, [(u64::from(HERE), 4), (u64::from(HERE) + 0x1000, 4)]);
        // What all worlds are told has changed.
        cpu.gdtr.base = 0x100;
        assert!(go(&mut engine, &mut cpu).is_some_and(|(now, ..)| now != epoch));
    }

    #[test]
    fn a_run_that_ends_in_another_world_is_one_of_its_address_space() {
        let (mut first, mut second) = (FakeWorld::new(), FakeWorld::new());
        first.then_exit(WorldExit::Kick).then_exit(WorldExit::Handed { seat: 6 });
        second.then_exit(WorldExit::Kick).then(|regs, state| {
            regs.eip = 0x3000;
            state.fpu[0] = 0x55;
            Ok(WorldExit::Kick)
        });
        let (mut engine, _) = engine(vec![first, second]);
        let mut m = machine(1);
        let mut cpu = ring0(&m, HERE);
        paged(&m, THERE, 0x9000);
        for cr3 in [HERE, THERE, HERE] {
            load_cr3(&mut cpu, &mut m, cr3);
            assert_eq!(engine.run(&mut cpu, &mut m, false).unwrap(), After::Kicked);
        }
        assert_eq!((cpu.cr3, cpu.eip, engine.fpu_in), (THERE, 0x3000, Some(Place::Kernel(1))));
        engine.fetch_fpu(&mut cpu);
        assert_eq!(cpu.fpu.0[0], 0x55);
    }

    #[test]
    fn a_world_that_ended_while_it_slept_is_replaced_and_the_guest_goes_on() {
        let (mut first, mut second) = (FakeWorld::new(), FakeWorld::new());
        first.then(|regs, state| {
            (regs.eip, state.fpu[0]) = (0x2040, 0x77);
            Ok(WorldExit::Kick)
        });
        second.then(|regs, state| {
            assert_eq!((regs.eip, state.fpu[0]), (0x2040, 0x77));
            assert!(state.gate.is_some());
            Ok(WorldExit::Kick)
        });
        let end = first.end();
        let (mut engine, _) = engine(vec![first, second]);
        let mut m = machine(1);
        let mut cpu = ring0(&m, HERE);
        load_cr3(&mut cpu, &mut m, HERE);
        assert_eq!(engine.run(&mut cpu, &mut m, false).unwrap(), After::Kicked);
        end.store(true, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(engine.run(&mut cpu, &mut m, false).unwrap(), After::Kicked);
        assert_eq!((engine.kernels.len(), engine.replaced_worlds, cpu.eip), (1, 1, 0x2040));
    }

    #[test]
    fn a_hand_over_to_a_world_that_is_none_ends_the_guest() {
        let mut world = FakeWorld::new();
        world.then_exit(WorldExit::Handed { seat: 99 });
        let (mut engine, _) = engine(vec![world]);
        let mut m = machine(1);
        let mut cpu = ring0(&m, HERE);
        load_cr3(&mut cpu, &mut m, HERE);
        assert!(matches!(engine.run(&mut cpu, &mut m, false), Err(RawError::World(WorldError::Died(_)))));
    }
}
