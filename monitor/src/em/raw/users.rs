//! Worlds of ring 3 that the world of ring 0 enters by itself (`--isolation worlds`): for which one, and what it left behind.
//!
//! Nothing the guest's tables have lost since may be in it when it is entered: what is known of that is done first, and the world
//! of ring 0 leaves the rest to us.

use super::*;

impl RawEngine {
    /// Lets the world of ring 0 that is about to run enter the one of ring 3 of the same address space; yields which.
    pub(super) fn let_enter(
        &mut self,
        place: Place,
        cpu: &CpuState,
        m: &mut Machine,
    ) -> Result<Option<usize>, RawError> {
        let Place::Kernel(number) = place else { return Ok(None) };
        let rules = self.users_rules;
        let role = Role::User { cr3: cpu.cr3 };
        let wanted = self.boundary == Some(Boundary::Worlds) && rules.gate.ready != 0;
        let user = if wanted { self.users.iter().position(|s| s.role == role) } else { None };
        let cell = user.and_then(|i| self.users[i].world.cell());
        let (Some(i), Some(cell)) = (user, cell) else {
            self.forbid_entering(number);
            return Ok(None);
        };
        self.catch_up(Place::User(i), cpu, m)?;
        let space = &mut self.users[i];
        space.last_used = self.clock;
        for selector in [rules.cs_host as u16, rules.ss_host as u16] {
            space.install(&self.descriptors, selector)?;
        }
        for i in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let selector = self.kernels[number].world.vcpu_read(vp::HOST_RING3 + 4 * i as u32) as u16;
            space.install(&self.descriptors, selector)?;
        }
        for cached in self.kernels[number].cache.entries() {
            space.install(&self.descriptors, cached.for_ring3())?;
        }
        match space.world.settle() {
            Ok(()) => {}
            // It is found to be gone when it is to run.
            Err(WorldError::Died(_)) => {
                self.forbid_entering(number);
                return Ok(None);
            }
            Err(e) => return Err(e.into()),
        }
        let world = &mut self.kernels[number].world;
        world.set_users(&UsersRules { cell: cell + 1, ..rules });
        if let Some((lin, write)) = self.refill.take() {
            let write = if write { exits::REFILL_WRITE } else { 0 };
            world.vcpu_write(vp::REFILL, lin.page_base().0 | write | 1);
        }
        self.may_enter = Some(i);
        Ok(Some(i))
    }

    /// Follows what the world of ring 0 has done with the one it may enter in the run that just ended.
    pub(super) fn follow_users(&mut self, number: usize, frames: u32) -> Result<(), RawError> {
        let Some(i) = self.may_enter else { return Ok(()) };
        let layout = self.layout;
        let space = &mut self.users[i];
        space.take_fills(&layout, frames)?;
        let mut mapped = Vec::new();
        self.kernels[number].world.take_flushes_of_users(&mut |at| mapped.push(at));
        for at in mapped {
            space.drop_data(layout.guest_of_data(at), &layout)?;
            space.world.unmap(at, 0x1000)?;
        }
        Ok(())
    }

    /// The world of ring 0 enters none any more.
    pub(super) fn forbid_entering(&mut self, number: usize) {
        if self.may_enter.take().is_some() {
            self.kernels[number].world.set_users(&UsersRules::default());
        }
    }

    /// Ring 3 has run in a world that the world of ring 0 has entered, and that is for us.
    pub(super) fn take_over_from_users(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        number: usize,
    ) -> Result<After, RawError> {
        let Some(i) = self.may_enter else {
            return Err(impossible());
        };
        let mut regs = HwRegs::default();
        let exit = self.users[i].world.take_exit(&mut regs);
        self.follow_ring(cpu, number, 3);
        let expected = self.ring3_segments(cpu, m, number);
        (cpu.gpr, cpu.eip) = (regs.gpr, regs.eip);
        match exit {
            Ok(exit) => {
                if exit == WorldExit::Kick {
                    self.kick.answered();
                    self.kernels[number].world.forget_kick();
                }
                if matches!(exit, WorldExit::Syscall | WorldExit::Gate { .. }) {
                    // The world could have done it: perhaps the gate is another one now.
                    self.retract_transitions(number);
                }
                self.read_back_user(cpu, m, Place::User(i), &regs, expected, exit)
            }
            Err(WorldError::Died(why)) => self.ring3_broke_its_world(Place::User(i), cpu, &why),
            Err(WorldError::BadState(why)) => {
                log::warn!("a world could not load the guest's state: {why}");
                Ok(After::Interpret)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// An `iret` has left by the gate: if it is to ring 3 of a world that may be entered, that is for the world.
    pub(super) fn learn_iret(&mut self, reason: u32, instruction: &Instruction) {
        if instruction.code() == Code::Iretd && self.boundary == Some(Boundary::Worlds) {
            self.enter_quick(Quick { reason, kind: QuickKind::ToUsers, ..Quick::default() });
        }
    }
}

/// A world says that it has entered one it has not been told of.
pub(super) fn impossible() -> RawError {
    WorldError::Died("it entered a world it does not know of".into()).into()
}

/// Kicks a world, and the one it may have entered.
pub(super) struct Both(pub(super) Arc<dyn Kicker>, pub(super) Arc<dyn Kicker>);

impl Kicker for Both {
    fn kick(&self) {
        self.0.kick();
        self.1.kick();
    }
}
