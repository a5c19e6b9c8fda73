//! CR3 loads for which one world hands the guest over to another: which worlds it may be handed to, and what a run was that
//! ended in another world than it began in (`docs/decisions/0017-handing-over.md`).

use super::segments::Published;
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

/// A world says that it has handed the guest to one that cannot be.
fn impossible() -> RawError {
    WorldError::Died("it handed over to a world that is none".into()).into()
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
        let (ports, guards, loaded) =
            (self.kernels[from].ports, self.kernels[from].guards, self.kernels[from].loaded);
        let space = &mut self.kernels[to];
        let (Role::Joint { cr3 }, Some(rules)) = (space.role, space.fill_rules) else {
            return Err(impossible());
        };
        (space.ports, space.guards, space.loaded) = (ports, guards, loaded);
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
