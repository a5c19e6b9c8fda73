//! Where our own things lie: putting them into the ring-0 world, and moving them when the guest wants the place.

use super::*;
use host_driver_shim::world::{HostSegment, KEYED_CODE_SLOT, KEYED_DATA_SLOT};

impl RawEngine {
    /// Puts the vCPU page, the gate and the trampolines into a ring-0 world.
    pub(super) fn furnish(&mut self, number: usize) -> Result<(), RawError> {
        let (gate, vcpu) = (GuestLin(self.layout.gate), GuestLin(self.layout.vcpu));
        let keyed = self.keyed_segments();
        let space = &mut self.kernels[number];
        for (slot, segment) in keyed {
            space.world.set_segment(slot, segment)?;
        }
        space.world.place_gate(self.layout.data(gate), self.layout.data(vcpu))?;
        if let Some(transit) = self.layout.transit {
            space.world.place_transit(self.layout.data(GuestLin(transit)))?;
        }
        for (lin, offset) in self.kernel_code.trampolines.pages().chain(self.joint_code.trampolines.pages()) {
            space.show_trampoline(lin, offset, &self.layout)?;
        }
        Ok(())
    }

    /// The descriptors whose selectors are fixed, if worlds are keyed.
    fn keyed_segments(&self) -> Vec<(u16, HostSegment)> {
        if !self.descriptors.rules().keys {
            return Vec::new();
        }
        let (code, data) = (HostSegment::flat(0, true), HostSegment::flat(self.layout.delta, false));
        vec![(KEYED_CODE_SLOT, code), (KEYED_DATA_SLOT, data)]
    }

    /// Puts the trampolines into a world of ring 3 alone.
    pub(super) fn furnish_user(&mut self, number: usize) -> Result<(), RawError> {
        for (slot, segment) in self.keyed_segments() {
            self.users[number].world.set_segment(slot, segment)?;
        }
        for (lin, offset) in self.user_code.trampolines.pages() {
            self.users[number].show_trampoline(lin, offset, &self.layout)?;
        }
        Ok(())
    }

    /// Shows the new pages of trampolines in the worlds they are for.
    pub(super) fn map_trampolines(&mut self) -> Result<(), WorldError> {
        let (new, layout) = (std::mem::take, self.layout);
        let kernels = new(&mut self.kernel_code.trampolines.new);
        let joint = new(&mut self.joint_code.trampolines.new);
        for (lin, offset) in kernels.into_iter().chain(joint) {
            for space in &mut self.kernels {
                space.show_trampoline(lin, offset, &layout)?;
            }
        }
        for (lin, offset) in new(&mut self.user_code.trampolines.new) {
            for space in &mut self.users {
                space.show_trampoline(lin, offset, &layout)?;
            }
        }
        Ok(())
    }

    /// Whether a world with guest ring 0 (`supervisor`), or one of ring 3 alone, has something of ours where the guest's data at a
    /// linear address would be.
    pub(super) fn reserves(&self, supervisor: bool) -> impl Fn(GuestLin) -> bool + use<> {
        let (layout, patching) = (self.layout, self.user_code.is_patching());
        move |lin| {
            if supervisor { layout.reserved(lin) } else { patching && layout.behind_trampolines(lin) }
        }
    }

    /// Empties every world.
    pub(super) fn clear_all(&mut self) -> Result<(), RawError> {
        for space in self.spaces() {
            space.clear()?;
        }
        for i in 0..self.kernels.len() {
            self.furnish(i)?;
        }
        for i in 0..self.users.len() {
            self.furnish_user(i)?;
        }
        self.kernel_code.trampolines.new.clear();
        self.joint_code.trampolines.new.clear();
        self.user_code.trampolines.new.clear();
        self.boundary = Boundary::at_first(self.isolation);
        self.forget_segment_cache();
        Ok(())
    }

    /// Moves every reservation: the guest wants addresses we sit on.
    pub(super) fn relocate(&mut self, m: &mut Machine) -> Result<(), RawError> {
        self.layout = self.candidate(self.layouts_tried);
        self.layouts_tried += 1;
        self.moves += 1;
        self.host.settle(WorldLin(self.layout.delta))?;
        // Made for the old place of the engine's own things, they may reach the new one.
        self.descriptors.restart();
        log::info!("reservations move to {:x?}", self.layout);
        self.kernel_code.reset(m, &self.code, self.layout);
        self.joint_code.reset(m, &self.code, &self.layout, self.count_inline);
        if self.user_code.is_patching() {
            self.user_code.reset(m, &self.code, &self.layout, self.count_inline);
        }
        self.clear_all()
    }

    /// Whether a world laid out so would hide guest memory: behind the code view of `code`, or (in the ring-0 world)
    /// behind our own pages. Reading there would not fault, it would show the wrong bytes.
    pub(super) fn hides(
        m: &Machine,
        cpu: &CpuState,
        layout: &Layout,
        code: GuestLin,
        supervisor: bool,
    ) -> bool {
        Self::hides_behind_code(m, cpu, layout, code, supervisor)
            || supervisor
                && [layout.vcpu, layout.gate, layout.tramp, layout.tramp_as_data()]
                    .into_iter()
                    .chain(layout.transit)
                    .any(|at| peek(m, cpu, GuestLin(at)).is_some_and(|l| m.is_ram(l.frame)))
    }

    /// The part of [`Self::hides`] that is about one page of code.
    pub(super) fn hides_behind_code(
        m: &Machine,
        cpu: &CpuState,
        layout: &Layout,
        code: GuestLin,
        supervisor: bool,
    ) -> bool {
        let place = layout.code(code.page_base());
        let ours = [layout.vcpu, layout.gate]
            .into_iter()
            .chain(layout.transit)
            .any(|at| layout.data(GuestLin(at)) == place);
        layout.is_engines(place)
            || supervisor && ours
            || peek(m, cpu, layout.guest_of_data(place))
                .is_some_and(|l| m.is_ram(l.frame) && (supervisor || l.user))
    }

    /// Moves the reservations if they hide guest memory and can lie where they do not; says whether they moved.
    pub(super) fn make_room(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        code: GuestLin,
        supervisor: bool,
    ) -> Result<bool, RawError> {
        if self.moves >= MAX_MOVES || !Self::hides(m, cpu, &self.layout, code, supervisor) {
            return Ok(false);
        }
        let better = (0..Layout::CANDIDATES.len())
            .find(|&i| !Self::hides(m, cpu, &self.candidate(i), code, supervisor));
        let Some(better) = better else { return Ok(false) };
        self.layouts_tried = better;
        self.relocate(m)?;
        Ok(true)
    }

    /// Gives up every copy of code, kernel's and users', when code memory is used up: what is executed again is
    /// scanned again.
    pub(super) fn recycle_code(&mut self, m: &mut Machine) -> Result<(), RawError> {
        log::info!("code memory is used up: all copies are made anew");
        self.kernel_code.reset(m, &self.code, self.layout);
        self.user_code.reset(m, &self.code, &self.layout, self.count_inline);
        self.joint_code.reset(m, &self.code, &self.layout, self.count_inline);
        self.clear_all()
    }

    /// The code memory of the copy of a ring-0 page.
    pub(super) fn kernel_page(&mut self, m: &mut Machine, lin: GuestLin, pfn: u32) -> Result<u64, RawError> {
        if let Some(offset) = self.kernel_code.page(m, &self.code, lin, pfn) {
            return Ok(offset);
        }
        self.recycle_code(m)?;
        self.kernel_code.page(m, &self.code, lin, pfn).ok_or(RawError::CodeMemory(self.code.size() >> 20))
    }

    /// Arrangement number `i`, with the trampolines at a good distance from the guest kernel.
    fn candidate(&self, i: usize) -> Layout {
        let layout = Layout { hole: self.layout.hole, ..Layout::CANDIDATES[i % Layout::CANDIDATES.len()] };
        let layout = if self.layout.transit.is_some() { layout.keyed(i) } else { layout };
        self.code_top.map_or(layout, |top| layout.near(top))
    }

    /// Ring-0 code is about to run at `code`. The first time it is in the upper half, that is where the kernel lives
    /// (KASLR decides): trampolines go to a good distance from it. Says whether that moved them.
    pub(super) fn approach_kernel(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        code: GuestLin,
    ) -> Result<bool, RawError> {
        if self.code_top.is_some() || !cpu.paging() || code.0 < 0x8000_0000 {
            return Ok(false);
        }
        let top = (code.0 >> 24) as u8;
        self.code_top = Some(top);
        if self.layout.near(top) == self.layout || Self::hides(m, cpu, &self.layout.near(top), code, true) {
            return Ok(false);
        }
        self.layouts_tried =
            Layout::CANDIDATES.iter().position(|l| l.delta == self.layout.delta).unwrap_or(0);
        self.relocate(m)?;
        Ok(true)
    }
}
