//! Following what the guest changed since the last run: its TLB flushes and its writes to code.

use super::*;

/// What the meaning of the guest's tables depends on.
fn paging_key(cpu: &CpuState) -> u32 {
    (cpu.cr0 & (cr0::PG | cr0::WP))
        | (cpu.cr4 & (cr4::PSE | cr4::PAE))
        | (cpu.msr.efer as u32 & crate::cpum::efer::NXE as u32)
}

impl RawEngine {
    /// Another engine has run the guest: nothing mapped is believed any more, and copies of code are compared with what
    /// is in RAM now. Patches and scans of code that did not change stay.
    pub(super) fn start_over(&mut self, cpu: &CpuState, m: &mut Machine) -> Result<(), RawError> {
        m.forget_notes();
        self.kernel_code.compare(m, &self.code);
        self.user_code.compare(m, &self.code);
        self.joint_code.compare(m, &self.code);
        self.settle_code()?;
        self.paging_key = paging_key(cpu);
        self.clear_all()?;
        let copied = self.kernel_code.copied_pages();
        self.forget_code_of_other_frames(m, cpu, &copied)?;
        self.make_room(m, cpu, GuestLin(cpu.linear_eip()), cpu.cpl != 3)?;
        Ok(())
    }

    /// Follows what the guest (or the monitor for it) changed since the last run.
    pub(super) fn follow_changes(&mut self, m: &mut Machine, cpu: &CpuState) -> Result<(), RawError> {
        loop {
            let writes = m.take_code_writes();
            if writes.is_empty() {
                break;
            }
            for w in writes {
                self.kernel_code.code_written(m, &self.code, w.at, w.len);
                self.user_code.code_written(m, &self.code, w.at);
                self.joint_code.code_written(m, &self.code, w.at);
            }
            self.settle_code()?;
        }
        if m.paging_changes.is_empty() {
            return Ok(());
        }
        let mut moved = false;
        for change in std::mem::take(&mut m.paging_changes) {
            moved |= !matches!(change, PagingChange::Page(_));
            match change {
                PagingChange::Mode => {
                    let key = paging_key(cpu);
                    if key != self.paging_key {
                        self.paging_key = key;
                        self.clear_all()?;
                        let copied = self.kernel_code.copied_pages();
                        self.forget_code_of_other_frames(m, cpu, &copied)?;
                    } else {
                        for space in self.spaces() {
                            space.pending_sync = Some(Scope::All);
                            space.world.disarm();
                        }
                    }
                }
                PagingChange::Cr3 => {
                    let ring0 = (self.kernels[0].role == Role::Supervisor).then_some(Place::Kernel(0));
                    let joint = self.known_joint_space(cpu.cr3).map(Place::Kernel);
                    let user = Role::User { cr3: cpu.cr3 };
                    let user = self.users.iter().position(|s| s.role == user).map(Place::User);
                    for place in [ring0, joint, user].into_iter().flatten() {
                        self.space(place).pending_sync.get_or_insert(Scope::NonGlobal);
                    }
                }
                PagingChange::Page(lin) => {
                    let layout = self.layout;
                    let mut gone = Vec::new();
                    for space in self.spaces() {
                        let concerned = match space.role {
                            Role::Supervisor => true,
                            // Other address spaces are flushed when CR3 is loaded with them, except for global pages.
                            Role::Joint { cr3 } | Role::User { cr3 } => {
                                cr3 == cpu.cr3 || space.data.get(lin).global() || space.code.get(lin).global()
                            }
                        };
                        if concerned {
                            let dropped = space.invalidate(lin, &layout)?;
                            if space.supervisor() {
                                gone.extend(dropped);
                            }
                        }
                    }
                    self.forget_code_of_other_frames(m, cpu, &gone)?;
                }
            }
        }
        if moved {
            self.make_room(m, cpu, GuestLin(cpu.linear_eip()), cpu.cpl != 3)?;
        }
        Ok(())
    }

    /// Some pages left the ring-0 code view. Where another frame is now (or none), the copy goes at once and not when the
    /// page is executed again: an instruction or a patch of the page before may reach into it.
    pub(super) fn forget_code_of_other_frames(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        pages: &[GuestLin],
    ) -> Result<(), RawError> {
        let mut any = false;
        for &lin in pages {
            if let Some(pfn) = self.kernel_code.frame_of(lin)
                && peek(m, cpu, lin).is_none_or(|l| l.frame.0 >> 12 != u64::from(pfn))
            {
                self.kernel_code.drop_page(m, &self.code, lin.page_number());
                any = true;
            }
        }
        if any { self.settle_code() } else { Ok(()) }
    }

    /// Carries out in the worlds what the code views decided: new trampoline pages, frames that became code, copies
    /// that are gone.
    pub(super) fn settle_code(&mut self) -> Result<(), RawError> {
        self.kernel_code.hide_pkru_loaders(&self.code);
        self.map_trampolines()?;
        for lin in std::mem::take(&mut self.kernel_code.dropped) {
            let layout = self.layout;
            for space in &mut self.kernels {
                space.drop_code(lin, &layout)?;
            }
        }
        for pfn in std::mem::take(&mut self.kernel_code.newly_tracked)
            .into_iter()
            .chain(std::mem::take(&mut self.user_code.newly_tracked))
            .chain(std::mem::take(&mut self.joint_code.newly_tracked))
        {
            let layout = self.layout;
            for space in self.spaces() {
                for lin in space.data.take_writable(pfn) {
                    space.drop_data(lin, &layout)?;
                }
            }
        }
        let layout = self.layout;
        let shown =
            |space: &Space, lin, pfn| space.code.get(lin).mapped() && space.code.get(lin).pfn() == pfn;
        for (lin, pfn) in std::mem::take(&mut self.user_code.dropped) {
            for space in self.users.iter_mut().filter(|s| shown(s, lin, pfn)) {
                space.drop_code(lin, &layout)?;
            }
        }
        for (lin, pfn) in std::mem::take(&mut self.joint_code.dropped) {
            for space in self.kernels.iter_mut().filter(|s| shown(s, lin, pfn)) {
                space.drop_code(lin, &layout)?;
            }
        }
        Ok(())
    }
}
