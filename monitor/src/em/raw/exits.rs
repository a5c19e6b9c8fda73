//! Exits: taking the hardware's state over into the CPU, and dealing with what is about the shadow or the code view.

use super::*;

/// DR6.BS: the debug exception is a single step.
const DR6_BS: u32 = 1 << 14;

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
        if self.kernels[number].world.vcpu_read(vp::CPL) == 3 {
            let mut expected = self.kernels[number].loaded;
            for i in [seg::ES, seg::DS, seg::FS, seg::GS] {
                expected[i] = self.kernels[number].world.vcpu_read(vp::HOST_RING3 + 4 * i as u32) as u16;
            }
            return self.read_back_user(cpu, m, Place::Kernel(number), regs, expected, exit);
        }
        self.read_back_kernel(cpu, m, number, regs, exit)
    }

    fn read_back_kernel(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        number: usize,
        regs: &HwRegs,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        let mut flags = regs.eflags;
        let mut site_reached = false;
        let mut committed_sti = false;
        let mut in_trampoline = false;
        match exit {
            WorldExit::Gate { reason } => match self.kernel_code.patm.by_reason(reason) {
                Some((_, site, kind)) => match kind {
                    ReasonKind::Emulate => {
                        cpu.eip = site.at.0;
                        site_reached = true;
                    }
                    ReasonKind::PendingAfterSti => {
                        cpu.eip = site.next().0;
                        committed_sti = true;
                    }
                    ReasonKind::PendingAfterPopf => cpu.eip = site.next().0,
                    ReasonKind::PendingAfterIret => {
                        cpu.eip = self.kernels[number].world.vcpu_read(vp::SCRATCH_TARGET);
                    }
                },
                None => {
                    return Err(
                        WorldError::Died(format!("it left with the unknown reason {reason:#x}")).into()
                    );
                }
            },
            _ => match self.kernel_code.locate(regs.eip) {
                Location::Trampoline { fix, .. } => {
                    in_trampoline = true;
                    cpu.eip =
                        fix.apply(&mut cpu.gpr, &mut flags, &mut Words(self.kernels[number].world.as_mut()));
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
            },
        }
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
            } else if let Some(segment) = self.segment_loaded(cpu.seg[i], selector, regs.sel[i]) {
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
            self.last = ExitRecord { cause, route, eip, cpl: cpu.cpl, raw: exit };
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
            WorldExit::Syscall => {
                // `int 80h` of ring 0 that the host took for its own: EIP is behind the two bytes.
                record(Cause::Syscall, Route::Signal);
                cpu.eip = cpu.eip.wrapping_sub(2);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector: 14, error_code, cr2 } => {
                self.page_fault(cpu, m, Place::Kernel(number), error_code, cr2, exit)
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
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector, .. } => {
                record(Cause::GuestFault, Route::Signal);
                Ok(Self::other_fault(cpu, m, vector))
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
        // `popf` of ring 3 may have set TF; the refusal of it keeps it out of worlds from here on.
        let native = USER_FLAGS | eflags::TF;
        cpu.eflags = (cpu.eflags & !(native | eflags::RF)) | (regs.eflags & native) | eflags::FIXED;
        let mut reloaded = false;
        let (cs, eip) = (regs.sel[seg::CS], cpu.eip);
        if cs != expected[seg::CS] {
            // A far transfer to a selector behind which the host has a code segment; what has the guest there?
            self.last =
                ExitRecord { cause: Cause::Segment, route: Route::Signal, eip, cpl: cpu.cpl, raw: exit };
            return Ok(match selm::far_jump(cpu, m, cs, eip, 4) {
                Ok(()) if exit == WorldExit::Kick => After::Kicked,
                Ok(()) => After::Continue,
                Err(trap) => After::Deliver(Event::Exception(trap)),
            });
        }
        for i in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            if regs.sel[i] == expected[i] {
                continue;
            }
            // Guest code loaded the register itself; the host found something behind the number.
            reloaded = true;
            let selector = regs.sel[i];
            if let Err(trap) = selm::load_segment(cpu, m, i, selector) {
                self.last = ExitRecord {
                    cause: Cause::Segment,
                    route: Route::Signal,
                    eip: cpu.eip,
                    cpl: cpu.cpl,
                    raw: exit,
                };
                return Ok(After::Deliver(Event::Exception(trap)));
            }
        }
        let eip = cpu.eip;
        let mut record = |cause| {
            self.last = ExitRecord { cause, route: Route::Signal, eip, cpl: 3, raw: exit };
        };
        if reloaded && matches!(exit, WorldExit::Fault { .. }) {
            // The fault may be due to the host's idea of the segment: try again with the guest's.
            record(Cause::Segment);
            return Ok(After::Continue);
        }
        match exit {
            WorldExit::Gate { .. } => Err(WorldError::Died("ring 3 used the gate".into()).into()),
            WorldExit::Kick => {
                record(Cause::Kick);
                Ok(After::Kicked)
            }
            WorldExit::Syscall => {
                record(Cause::Syscall);
                cpu.eip = cpu.eip.wrapping_sub(2);
                Ok(After::Interpret)
            }
            WorldExit::Fault { vector: 14, error_code, cr2 } => {
                self.page_fault(cpu, m, place, error_code, cr2, exit)
            }
            WorldExit::Fault { vector: 13, .. } => {
                let lin = GuestLin(cpu.linear_eip());
                let pfn = match place {
                    Place::Kernel(i) => self.kernels[i].code.get(lin),
                    Place::User(i) => self.users[i].code.get(lin),
                };
                if pfn.mapped() && self.user_code.is_unscanned(lin, pfn.pfn()) {
                    record(Cause::Scan);
                    let found = self.user_code.scan(m, cpu, &self.code, lin, pfn.pfn());
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

    /// A page fault in a world: ours to fill, the guest's to see, or an access that must be interpreted.
    pub(super) fn page_fault(
        &mut self,
        cpu: &mut CpuState,
        m: &mut Machine,
        place: Place,
        error_code: u32,
        cr2: u32,
        exit: WorldExit,
    ) -> Result<After, RawError> {
        let supervisor = cpu.cpl != 3;
        let kernel_world = matches!(place, Place::Kernel(_));
        let privilege = if supervisor { Privilege::Supervisor } else { Privilege::User };
        let (eip, cpl) = (cpu.eip, cpu.cpl);
        let after = |this: &mut Self, cause, after| {
            this.last = ExitRecord { cause, route: Route::Signal, eip, cpl, raw: exit };
            Ok(after)
        };
        let refused = |this: &mut Self, code, lin: GuestLin| {
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
            if supervisor && leaf.user && self.boundary.is_some_and(|b| lin.0 < b) {
                // Ring 0 runs a page of its users: in a joint world that page is shown unpatched.
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
            } else {
                self.map_user_code(m, cpu, place, lin, &leaf)?;
            }
            return after(self, Cause::Scan, After::Continue);
        }
        let lin = layout.guest_of_data(WorldLin(cr2));
        let write = error_code & pf::WRITE != 0;
        if kernel_world && layout.reserved(lin) {
            // The guest reached for what is ours. If it has something there we move, else it gets its fault.
            if peek(m, cpu, lin).is_some() {
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
        if layout.data(lin).0 < LOW_LIMIT {
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
