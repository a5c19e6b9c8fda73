//! Exits: taking the hardware's state over into the CPU, and dealing with what is about the shadow or the code view.

use super::*;

/// In the vCPU page's `REFILL`: the fault was a write.
pub(super) const REFILL_WRITE: u32 = 2;
/// DR6.BS: the debug exception is a single step.
const DR6_BS: u32 = 1 << 14;

/// Where in the world's code an exit happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    /// In the guest's own code, or at a patch.
    Code,
    /// In a trampoline that left by the gate.
    Gate(ReasonKind),
    /// In a trampoline that was interrupted or faulted; the state has been fixed.
    Trampoline {
        /// What faulted was an access of the processor's own.
        supervisor: bool,
    },
}

fn unknown_reason(reason: u32) -> RawError {
    WorldError::Died(format!("it left with the unknown reason {reason:#x}")).into()
}

impl RawEngine {
    /// Takes the state of a world with guest ring 0 over into the CPU and deals with the exit.
    pub(super) fn read_back(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        number: usize,
        regs: &HwRegs,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        let mut flags = regs.eflags;
        let mut origin = Origin::Code;
        let world = self.kernels[number].world.as_mut();
        match exit {
            WorldExit::Gate { reason } if patm::is_user_reason(reason) => {
                let Some(patch) = self.joint_code.by_reason(reason) else {
                    return Err(unknown_reason(reason));
                };
                cpu.eip = patch.site.0;
                origin = Origin::Gate(ReasonKind::Emulate);
                self.retract_transitions(number);
            }
            WorldExit::Gate { reason } => {
                let Some((_, site, kind)) = self.kernel_code.patm.by_reason(reason) else {
                    return Err(unknown_reason(reason));
                };
                cpu.eip = match kind {
                    ReasonKind::Emulate => site.at.0,
                    ReasonKind::PendingAfterSti | ReasonKind::PendingAfterPopf => site.next().0,
                    ReasonKind::PendingAfterIret => world.vcpu_read(vp::SCRATCH_TARGET),
                };
                if kind == ReasonKind::Emulate && site.kind == csam::SensitiveKind::Iret {
                    let refill = world.vcpu_read(vp::REFILL);
                    if refill != 0 && self.boundary == Some(Boundary::Worlds) {
                        self.refill = Some((GuestLin(refill & !0xfff), refill & REFILL_WRITE != 0));
                    } else if refill != 0 {
                        self.learn_refill(reason);
                    }
                    self.retract_transitions(number);
                }
                origin = Origin::Gate(kind);
            }
            _ => {
                if let Some(found) = self.joint_code.locate(regs.eip) {
                    // Ring 3 that jumped among the trampolines by itself is where it says it is.
                    if let Some((_, fix)) = found {
                        origin = Origin::Trampoline { supervisor: fix.supervisor };
                        cpu.eip = fix.apply(&mut cpu.gpr, &mut flags, &mut Words(world));
                    }
                } else if world.vcpu_read(vp::CPL) != 3 {
                    match self.kernel_code.locate(regs.eip) {
                        Location::Trampoline { fix, .. } => {
                            origin = Origin::Trampoline { supervisor: fix.supervisor };
                            cpu.eip = fix.apply(&mut cpu.gpr, &mut flags, &mut Words(world));
                        }
                        Location::PatchStart(id) => {
                            // At the slot of a short jump the guest's EIP is the start of the window.
                            if let Some(patch) = self.kernel_code.patm.get(id) {
                                cpu.eip = patch.start.0;
                            }
                        }
                        Location::Stray => {
                            // The guest's own code lies where our trampolines are.
                            self.relocate(m)?;
                        }
                        _ => {}
                    }
                } else if (!self.descriptors.rules().pages
                    || regs.sel[seg::CS] == self.descriptors.code_ring0())
                    && let Location::Trampoline { fix, .. } = self.kernel_code.locate(regs.eip)
                {
                    // The end of an `iret` to ring 3, or ring 3 went astray in the kernel's code, and then its EIP is there.
                    origin = Origin::Trampoline { supervisor: fix.supervisor };
                    cpu.eip = fix.apply(&mut cpu.gpr, &mut flags, &mut Words(world));
                }
            }
        }
        let cpl = if self.kernels[number].world.vcpu_read(vp::CPL) == 3 { 3 } else { 0 };
        self.follow_ring(cpu, number, cpl);
        let regs = HwRegs { eflags: flags, ..*regs };
        if cpl == 3 {
            self.read_back_joint_user(cpu, m, number, &regs, origin, exit)
        } else {
            self.read_back_kernel(cpu, m, number, &regs, origin, exit)
        }
    }

    /// Takes over the ring a world of ring 0 says the guest is in.
    pub(super) fn follow_ring(&mut self, cpu: &mut CpuState, number: usize, cpl: u8) {
        // A page fault may have been delivered in the world.
        cpu.cr2 = self.kernels[number].world.vcpu_read(vp::CR2);
        if cpl != cpu.cpl {
            let (cs, ss) = match cpl {
                3 => (self.transitions.user_cs, self.transitions.user_ss),
                _ => (self.transitions.kernel_cs, self.entry_ss),
            };
            (cpu.seg[seg::CS], cpu.seg[seg::SS]) = (cs, ss);
            // What ring 3 had in the hardware it had clear (else the transition was not done in line); ring 3 runs with
            // IF set.
            cpu.eflags &= !(eflags::NT | eflags::AC | eflags::ID);
            cpu.eflags |= eflags::IF;
            cpu.cpl = cpl;
        }
    }

    /// Takes over the data segments of ring 3 as the words of the vCPU page have them; yields the host selectors it was given.
    pub(super) fn ring3_segments(&mut self, cpu: &mut CpuState, m: &mut Machine, number: usize) -> [u16; 6] {
        let word =
            |this: &Self, at: u32, i: usize| this.kernels[number].world.vcpu_read(at + 4 * i as u32) as u16;
        let whose = For::Ring3 { below: self.boundary.and_then(Boundary::limit) };
        let Transitions { user_cs, user_ss, .. } = self.transitions;
        let mut expected = [0; 6];
        expected[seg::CS] = self.descriptors.selector(&user_cs, true, &self.layout, whose);
        expected[seg::SS] = self.descriptors.selector(&user_ss, false, &self.layout, whose);
        for i in [seg::ES, seg::DS, seg::FS, seg::GS] {
            expected[i] = word(self, vp::HOST_RING3, i);
            // What trampolines loaded since the world was entered.
            let (selector, full) = (word(self, vp::SELECTORS, i), word(self, vp::HOST_RING0, i));
            if let Some(segment) = self.segment_loaded(number, cpu.seg[i], selector, full) {
                cpu.seg[i] = segment;
            } else if selm::load_segment(cpu, m, i, selector).is_err() {
                cpu.seg[i] = Segment { selector, ..Segment::default() };
            }
        }
        expected
    }

    /// Takes over the state of ring 3 in a joint world.
    fn read_back_joint_user(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        number: usize,
        regs: &HwRegs,
        origin: Origin,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        let mut regs = *regs;
        let expected = self.ring3_segments(cpu, m, number);
        match origin {
            Origin::Code => {
                // `int n` (SDM vol. 3, 6.13: the IDT bit), which the world may do by itself: perhaps the gate is another
                // one now.
                if matches!(exit, WorldExit::Fault { vector: 13, error_code, .. } if error_code & 2 != 0) {
                    self.retract_transitions(number);
                }
            }
            Origin::Gate(_) => {
                // The gate leaves no CS behind, and in a keyed world another SS.
                regs.sel[seg::CS] = expected[seg::CS];
                if self.descriptors.rules().keys {
                    regs.sel[seg::SS] = self.kernels[number].world.vcpu_read(vp::SCRATCH_SS) as u16;
                }
            }
            // Rolled back, or rolled forward: what the registers hold in the middle of a trampoline means nothing.
            Origin::Trampoline { .. } => regs.sel = expected,
        }
        match (origin, exit) {
            (Origin::Gate(_), _) => {
                let (eip, flags) = (cpu.eip, regs.eflags);
                self.user_flags(cpu, flags);
                self.last = ExitRecord {
                    cause: Cause::Sensitive,
                    route: Route::FarExit,
                    eip,
                    cpl: 3,
                    raw: exit.into(),
                };
                Ok(self
                    .user_selectors(cpu, m, &regs, expected)
                    .map_or_else(|trap| After::Deliver(Event::Exception(trap)), |_| After::Interpret))
            }
            (Origin::Trampoline { supervisor: true }, WorldExit::Fault { vector: 14, .. })
                if self.astray(cpu, m).is_none() =>
            {
                self.user_flags(cpu, regs.eflags);
                self.page_fault(cpu, m, Place::Kernel(number), Privilege::Supervisor, exit)
            }
            _ => self.read_back_user(cpu, m, Place::Kernel(number), &regs, expected, exit),
        }
    }

    /// The page fault of ring 3 that has jumped into the guest kernel of its joint world and ran on there, because code
    /// segments have no limit.
    fn astray(&self, cpu: &CpuState, m: &mut Machine) -> Option<Trap> {
        let eip = GuestLin(cpu.eip);
        self.boundary.filter(|b| self.descriptors.rules().keys || !b.holds(eip))?;
        let code = walk(m, cpu, eip, Access::fetch(Privilege::User)).err()?;
        Some(Trap::pf(code, eip.0))
    }

    fn read_back_kernel(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        number: usize,
        regs: &HwRegs,
        origin: Origin,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        let flags = regs.eflags;
        let in_trampoline = matches!(origin, Origin::Trampoline { .. });
        let committed_sti = origin == Origin::Gate(ReasonKind::PendingAfterSti);
        let site_reached = origin == Origin::Gate(ReasonKind::Emulate);
        if !in_trampoline
            && !matches!(exit, WorldExit::Gate { .. })
            && self.kernel_code.is_mid_instruction(&self.code, GuestLin(cpu.eip))
        {
            self.kernel_code.counts.mid_instruction += 1;
        }
        let w = &self.kernels[number].world;
        let hidden = cpu.eflags & !(NATIVE_FLAGS | eflags::IF | eflags::RF);
        cpu.eflags =
            (flags & NATIVE_FLAGS) | (w.vcpu_read(vp::IF_FLAG) & eflags::IF) | hidden | eflags::FIXED;
        // Not only a kick: between a fault of ours right behind it and the next run, an interrupt may come, too.
        let behind_sti = !matches!(exit, WorldExit::Gate { .. })
            && cpu.eflags & eflags::IF != 0
            && self.kernel_code.patm.is_after_sti(cpu.eip);
        if committed_sti || behind_sti {
            cpu.shadow = Held::Sti;
        }
        for i in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            let selector = self.kernels[number].world.vcpu_read(vp::SELECTORS + 4 * i as u32) as u16;
            if selector == cpu.seg[i].selector && regs.sel[i] == self.kernels[number].loaded[i] {
                continue;
            }
            if selector & !3 == 0 && i != seg::SS {
                cpu.seg[i] = Segment { selector, ..Segment::default() };
            } else if let Some(segment) = self.segment_loaded(number, cpu.seg[i], selector, regs.sel[i]) {
                cpu.seg[i] = segment;
            } else if selector != cpu.seg[i].selector {
                // Not what any trampoline of ours does: ask the guest's tables.
                if selm::load_segment(cpu, m, i, selector).is_err() {
                    cpu.seg[i] = Segment { selector, ..Segment::default() };
                }
            }
            // Else it was rolled back between the load and its commit: the old segment is the guest's still.
        }
        let eip = cpu.eip;
        let mut record = |cause, route| {
            self.last = ExitRecord { cause, route, eip, cpl: cpu.cpl, raw: exit.into() };
        };
        match exit {
            WorldExit::Gate { .. } => {
                record(if site_reached { Cause::Sensitive } else { Cause::Interrupt }, Route::FarExit);
                Ok(if site_reached { After::Interpret } else { After::Continue })
            }
            WorldExit::Kick => {
                record(Cause::Kick, Route::Signal);
                Ok(After::Kicked)
            }
            WorldExit::Users | WorldExit::Handed { .. } => Err(users::impossible()),
            WorldExit::Syscall => {
                // `int 80h` of ring 0 that the host took for its own: EIP is behind the two bytes.
                record(Cause::Syscall, Route::Signal);
                cpu.eip = cpu.eip.wrapping_sub(2);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector: 14, .. } => {
                self.page_fault(cpu, m, Place::Kernel(number), Privilege::Supervisor, exit)
            }
            WorldExit::Fault { vector: 13, .. } => {
                if !in_trampoline {
                    match self.kernel_code.locate(cpu.eip) {
                        // A branch into the middle of a patch: the trampoline goes on from there.
                        Location::MidWindow { forward: Some(_), .. } => {
                            record(Cause::InPatch, Route::Signal);
                            return Ok(After::Continue);
                        }
                        Location::Guest if !self.kernel_code.is_proven_start(GuestLin(cpu.eip)) => {
                            record(Cause::Scan, Route::Signal);
                            return self.scan(cpu, m);
                        }
                        _ => {}
                    }
                }
                record(Cause::Sensitive, Route::Signal);
                if !in_trampoline {
                    self.kernel_code.note_trap(&self.code, GuestLin(eip));
                    self.settle_code()?;
                }
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector, .. } => {
                record(Cause::GuestFault, Route::Signal);
                let after = Self::other_fault(cpu, m, vector);
                if matches!(vector, 3 | 4) {
                    self.step_back_over_prefixes(cpu, m);
                }
                Ok(after)
            }
        }
    }

    /// EIP is at the opcode of an instruction of ring 0: brings it to the start.
    fn step_back_over_prefixes(&self, cpu: &mut CpuState, m: &mut Machine) {
        let mut at = cpu.eip;
        // No instruction has more than 15 bytes.
        for _ in 0..15 {
            if self.kernel_code.is_proven_start(GuestLin(at)) {
                cpu.eip = at;
                return;
            }
            at = at.wrapping_sub(1);
            let mut byte = [0u8; 1];
            if m.fetch(cpu, GuestLin(at), &mut byte).is_err() || !raw::rc_deliver::is_prefix(byte[0]) {
                return;
            }
        }
    }

    /// A fault other than #GP and #PF: the guest's own, by an instruction the interpreter then sees too.
    pub(super) fn other_fault(cpu: &mut CpuState, m: &mut Machine, vector: u8) -> After {
        match vector {
            // `int3`, `into` and `int 3` are traps: EIP is behind the instruction.
            3 | 4 => {
                let mut last = [0u8; 1];
                let at = GuestLin(cpu.linear_eip().wrapping_sub(1));
                let short = m.fetch(cpu, at, &mut last).is_ok() && matches!(last, [0xcc | 0xce]);
                cpu.eip = cpu.eip.wrapping_sub(if short { 1 } else { 2 });
                After::Interpret
            }
            // A single step, after a `popf` of ring 3 that set TF, or `int1`.
            1 => {
                if cpu.eflags & eflags::TF != 0 {
                    cpu.dr[6] |= DR6_BS;
                }
                After::Deliver(Event::Exception(Trap::DB))
            }
            _ => After::Interpret,
        }
    }

    /// Scans from EIP, which stands on an unproven byte of the code view.
    pub(super) fn scan(&mut self, cpu: &mut CpuState, m: &mut Machine) -> Result<After, RawError> {
        let lin = GuestLin(cpu.eip);
        if self.layout.in_trampolines(lin) {
            self.relocate(m)?;
            return Ok(After::Continue);
        }
        let access = Access::fetch(Privilege::Supervisor);
        let leaf = match walk(m, cpu, lin, access) {
            Ok(leaf) => leaf,
            Err(code) => return Ok(After::Deliver(Event::Exception(Trap::pf(code, lin.0)))),
        };
        if !m.is_ram(leaf.frame) {
            return Ok(After::Interpret);
        }
        let pfn = (leaf.frame.0 >> 12) as u32;
        self.kernel_page(m, lin, pfn)?;
        let found = self.kernel_code.scan(m, &self.code, cpu, lin);
        self.settle_code()?;
        // Nothing decodable there, or a site that could not be patched: the interpreter knows what the guest sees.
        Ok(if found == 0 { After::Interpret } else { After::Continue })
    }

    /// Takes the state of ring 3 over into the CPU and deals with the exit. `expected`: the host selectors it was given.
    pub(super) fn read_back_user(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        place: Place,
        regs: &HwRegs,
        expected: [u16; 6],
        exit: WorldExit,
    ) -> Result<After, RawError> {
        self.user_flags(cpu, regs.eflags);
        let (cs, eip) = (regs.sel[seg::CS], cpu.eip);
        if cs != expected[seg::CS] {
            // A far transfer to a selector behind which the host has a code segment; what has the guest there?
            self.last = ExitRecord {
                cause: Cause::Segment,
                route: Route::Signal,
                eip,
                cpl: cpu.cpl,
                raw: exit.into(),
            };
            if cs == HOST_CS32 && eip < LOW_LIMIT && Self::is_fetch(exit) {
                // SYSENTER, which CPUID hides: an Intel host takes it, and a world has it end here. EIP is lost, and ESP is EBP.
                return Ok(After::Deliver(Event::Exception(Trap::UD)));
            }
            return Ok(match selm::far_jump(cpu, m, cs, eip, 4) {
                Ok(()) if exit == WorldExit::Kick => After::Kicked,
                Ok(()) => After::Continue,
                Err(trap) => After::Deliver(Event::Exception(trap)),
            });
        }
        let alone = matches!(place, Place::User(_));
        if let (Place::User(i), false) = (place, matches!(exit, WorldExit::Gate { .. })) {
            self.leave_trampoline(cpu, i, regs.eflags);
        }
        let reloaded = match self.user_selectors(cpu, m, regs, expected) {
            Ok(reloaded) => reloaded,
            Err(trap) => {
                self.last = ExitRecord {
                    cause: Cause::Segment,
                    route: Route::Signal,
                    eip,
                    cpl: cpu.cpl,
                    raw: exit.into(),
                };
                return Ok(After::Deliver(Event::Exception(trap)));
            }
        };
        let eip = cpu.eip;
        let astray = match (place, exit) {
            (Place::Kernel(_), WorldExit::Fault { .. }) => self.astray(cpu, m),
            _ => None,
        };
        let mut record = |cause| {
            self.last = ExitRecord { cause, route: Route::Signal, eip, cpl: 3, raw: exit.into() };
        };
        if reloaded && matches!(exit, WorldExit::Fault { .. }) {
            // The fault may be due to the host's idea of the segment: try again with the guest's.
            record(Cause::Segment);
            return Ok(After::Continue);
        }
        if let Some(trap) = astray {
            record(Cause::GuestFault);
            return Ok(After::Deliver(Event::Exception(trap)));
        }
        match exit {
            WorldExit::Gate { .. } if !alone || !self.user_code.is_patching() => {
                Err(WorldError::Died("ring 3 used the gate".into()).into())
            }
            WorldExit::Gate { .. } => {
                // What it left behind is the linear address behind the two bytes.
                cpu.eip = eip.wrapping_sub(2).wrapping_sub(cpu.seg[seg::CS].base);
                self.last = ExitRecord {
                    cause: Cause::Syscall,
                    route: Route::FarExit,
                    eip: cpu.eip,
                    cpl: 3,
                    raw: exit.into(),
                };
                Ok(After::Interpret)
            }
            WorldExit::Users | WorldExit::Handed { .. } => Err(users::impossible()),
            WorldExit::Kick => {
                record(Cause::Kick);
                Ok(After::Kicked)
            }
            WorldExit::Syscall => {
                record(Cause::Syscall);
                cpu.eip = cpu.eip.wrapping_sub(2);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector: 14, .. } => self.page_fault(cpu, m, place, Privilege::User, exit),
            WorldExit::Fault { vector: 13, .. } => {
                let lin = GuestLin(cpu.linear_eip());
                let pfn = match place {
                    Place::Kernel(i) => self.kernels[i].code.get(lin),
                    Place::User(i) => self.users[i].code.get(lin),
                };
                let copies = match place {
                    Place::Kernel(_) => &mut self.joint_code,
                    Place::User(_) => &mut self.user_code,
                };
                if pfn.mapped() && copies.is_unscanned(lin, pfn.pfn()) {
                    record(Cause::Scan);
                    let found = copies.scan(m, cpu, &self.code, lin, pfn.pfn());
                    self.settle_code()?;
                    return Ok(if found { After::Continue } else { After::Interpret });
                }
                record(Cause::Sensitive);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector, .. } => {
                record(Cause::GuestFault);
                Ok(Self::other_fault(cpu, m, vector))
            }
        }
    }

    /// If EIP is in a trampoline of a world of ring 3 alone, brings the CPU to the instruction that stands for.
    fn leave_trampoline(&mut self, cpu: &mut CpuState, number: usize, flags: u32) {
        let base = cpu.seg[seg::CS].base;
        // Ring 3 that jumped among them by itself is where it says it is.
        let Some(Some((_, fix))) = self.user_code.locate(cpu.eip.wrapping_add(base)) else { return };
        let mut flags = flags;
        let words = &mut Words(self.users[number].world.as_mut());
        cpu.eip = fix.apply(&mut cpu.gpr, &mut flags, words).wrapping_sub(base);
        self.user_flags(cpu, flags);
    }

    /// The exit is a page fault of a fetch.
    fn is_fetch(exit: WorldExit) -> bool {
        matches!(exit, WorldExit::Fault { vector: 14, error_code, .. } if error_code & pf::FETCH != 0)
    }

    /// EFLAGS of ring 3. `popf` of ring 3 may have set TF; the refusal of it keeps it out of worlds from here on.
    fn user_flags(&mut self, cpu: &mut CpuState, flags: u32) {
        let native = USER_FLAGS | eflags::TF;
        cpu.eflags = (cpu.eflags & !(native | eflags::RF)) | (flags & native) | eflags::FIXED;
    }

    /// Takes over the segment registers that ring 3 loaded by itself, with what the guest's tables have behind the
    /// numbers. Says whether there were any.
    fn user_selectors(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        regs: &HwRegs,
        expected: [u16; 6],
    ) -> Result<bool, Trap> {
        let mut reloaded = false;
        let selectors = cpu.seg.map(|s| s.selector);
        for i in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            if regs.sel[i] != expected[i] {
                // `mov r, sreg` has read the host's number: the guest means the segment that register held.
                let before = (0..6).find(|&j| expected[j] == regs.sel[i] && regs.sel[i] & !3 != 0);
                reloaded = true;
                selm::load_segment(cpu, m, i, before.map_or(regs.sel[i], |j| selectors[j]))?;
            }
        }
        Ok(reloaded)
    }

    /// The instruction at EIP has a CS prefix.
    fn reads_through_cs(cpu: &CpuState, m: &mut Machine) -> bool {
        raw::rc_deliver::has_cs_prefix(|i| {
            let mut b = [0u8; 1];
            m.fetch(cpu, GuestLin(cpu.linear_eip().wrapping_add(i)), &mut b).ok().map(|_| b[0])
        })
    }

    /// A page fault in a world: ours to fill, the guest's to see, or an access that must be interpreted.
    pub(super) fn page_fault(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        place: Place,
        privilege: Privilege,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        let WorldExit::Fault { error_code, cr2, .. } = exit else { return Ok(After::Continue) };
        let supervisor = privilege == Privilege::Supervisor;
        let kernel_world = matches!(place, Place::Kernel(_));
        let (eip, cpl) = (cpu.eip, cpu.cpl);
        let after = |this: &mut Self, cause, after| {
            this.last = ExitRecord { cause, route: Route::Signal, eip, cpl, raw: exit.into() };
            Ok(after)
        };
        let refused = |this: &mut Self, code, lin: GuestLin| {
            if let Place::Kernel(number) = place {
                // The world could have delivered it; perhaps the gate is another one now.
                this.retract_transitions(number);
            } else {
                this.refill = Some((lin, code & pf::WRITE != 0)).filter(|_| code & pf::FETCH == 0);
            }
            after(this, Cause::GuestFault, After::Deliver(Event::Exception(Trap::pf(code, lin.0))))
        };
        let layout = self.layout;
        if error_code & pf::FETCH != 0 {
            let lin = layout.guest_of_code(WorldLin(cr2));
            let leaf = match walk(m, cpu, lin, Access::fetch(privilege)) {
                Ok(leaf) => leaf,
                Err(code) => {
                    return refused(self, code, lin);
                }
            };
            if !m.is_ram(leaf.frame) || layout.code(lin).0 < LOW_LIMIT || lin.page_number() == LAST_PAGE {
                return after(self, Cause::Mmio, After::Interpret);
            }
            if supervisor && leaf.user && lin.0 < self.boundary.map_or(0, Boundary::users_below) {
                // Ring 0 runs a page of its users: in a world joined by limits that page is shown unpatched.
                return after(self, Cause::Scan, After::Interpret);
            }
            if self.make_room(m, cpu, lin, kernel_world)? {
                return after(self, Cause::Scan, After::Continue);
            }
            if Self::hides_behind_code(m, cpu, &layout, lin, kernel_world) {
                // Memory everywhere. Slow, but the guest sees its own bytes.
                return after(self, Cause::Scan, After::Interpret);
            }
            if let (true, Place::Kernel(number)) = (supervisor, place) {
                if self.approach_kernel(m, cpu, lin)? {
                    return after(self, Cause::Scan, After::Continue);
                }
                if layout.in_trampolines(lin) {
                    self.relocate(m)?;
                    return after(self, Cause::Scan, After::Continue);
                }
                self.map_kernel_code(m, number, lin, &leaf)?;
            } else if kernel_world
                && self.descriptors.rules().pages
                && lin.0.wrapping_sub(layout.tramp) < layout::TRAMP_LEN
                || !kernel_world && self.user_code.is_patching() && layout.in_trampolines(lin)
            {
                // Ring 3 has code where trampolines are: ring 0's, or in a world of its own any.
                if self.moves >= MAX_MOVES {
                    return after(self, Cause::Scan, After::Interpret);
                }
                self.relocate(m)?;
            } else {
                self.map_user_code(m, cpu, place, lin, &leaf)?;
            }
            return after(self, Cause::Scan, After::Continue);
        }
        if !supervisor && Self::reads_through_cs(cpu, m) {
            // A read of the code view, which need not show what the guest has there.
            return after(self, Cause::Segment, After::Interpret);
        }
        let lin = layout.guest_of_data(WorldLin(cr2));
        let write = error_code & pf::WRITE != 0;
        if self.reserves(kernel_world)(lin) {
            // The guest reached for what is ours. If it has something there we move, else it gets its fault.
            if peek(m, cpu, lin).is_some() {
                if !kernel_world && self.moves >= MAX_MOVES {
                    return after(self, Cause::ShadowFault, After::Interpret);
                }
                self.relocate(m)?;
                return after(self, Cause::ShadowFault, After::Continue);
            }
        }
        let access = Access { write, fetch: false, privilege };
        let leaf = match walk(m, cpu, lin, access) {
            Ok(leaf) => leaf,
            Err(code) => {
                return refused(self, code, lin);
            }
        };
        if layout.data(lin).0 < LOW_LIMIT || layout.is_engines(layout.data(lin)) {
            return after(self, Cause::LowMemory, After::Interpret);
        }
        if !m.is_ram(leaf.frame) {
            return after(self, Cause::Mmio, After::Interpret);
        }
        let pfn = (leaf.frame.0 >> 12) as u32;
        if write && m.is_tracked(pfn) {
            return after(self, Cause::CodeWrite, After::Interpret);
        }
        // A code-view page of this space where the guest has data: one of them must go.
        let there = layout.code_in_place_of(lin.page_base());
        if self.space(place).code.get(there).mapped() {
            if there.page_base() == GuestLin(cpu.linear_eip()).page_base() {
                self.relocate(m)?;
            } else {
                self.space(place).drop_code(there, &layout)?;
            }
        }
        self.fill(cpu, m, place, lin, leaf)?;
        after(self, Cause::ShadowFault, After::Continue)
    }
}
