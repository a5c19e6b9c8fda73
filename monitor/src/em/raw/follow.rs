//! Following what the guest changed since the last run: its TLB flushes and its writes to code.

use super::*;

impl RawEngine {
    /// Follows what the guest (or the monitor for it) changed since the last run.
    pub(super) fn follow_changes(&mut self, m: &mut Machine, cpu: &CpuState) -> Result<(), RawError> {
        while !m.code_writes.is_empty() {
            for w in std::mem::take(&mut m.code_writes) {
                self.kernel_code.code_written(m, &self.code, w.at, w.len);
                self.user_code.code_written(m, &self.code, w.at);
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
                    let key = (cpu.cr0 & (cr0::PG | cr0::WP))
                        | (cpu.cr4 & (cr4::PSE | cr4::PAE))
                        | (cpu.msr.efer as u32 & crate::cpum::efer::NXE as u32);
                    if key != self.paging_key {
                        self.paging_key = key;
                        self.clear_kernel()?;
                        for space in &mut self.users {
                            space.clear()?;
                        }
                    } else {
                        self.kernel.sync(m, cpu, Scope::All, &self.layout)?;
                        for space in &mut self.users {
                            space.pending_sync = Some(Scope::All);
                        }
                    }
                }
                PagingChange::Cr3 => {
                    self.kernel.sync(m, cpu, Scope::NonGlobal, &self.layout)?;
                    for space in &mut self.users {
                        if space.role == (Role::User { cr3: cpu.cr3 }) && space.pending_sync.is_none() {
                            space.pending_sync = Some(Scope::NonGlobal);
                        }
                    }
                }
                PagingChange::Page(lin) => {
                    self.kernel.drop_data(lin, &self.layout)?;
                    self.kernel.drop_code(lin, &self.layout)?;
                    for space in &mut self.users {
                        if space.role == (Role::User { cr3: cpu.cr3 }) {
                            space.drop_data(lin, &self.layout)?;
                            space.drop_code(lin, &self.layout)?;
                        }
                    }
                }
            }
        }
        if moved {
            self.make_room(m, cpu, GuestLin(cpu.linear_eip()), cpu.cpl != 3)?;
        }
        Ok(())
    }

    /// Carries out in the worlds what the code views decided: new trampoline pages, frames that became code, copies
    /// that are gone.
    pub(super) fn settle_code(&mut self) -> Result<(), RawError> {
        for (lin, offset) in std::mem::take(&mut self.kernel_code.new_trampolines) {
            self.kernel.world.map(
                self.layout.code(lin),
                0x1000,
                Backing::Code(offset),
                Prot::READ | Prot::EXEC,
            )?;
        }
        for lin in std::mem::take(&mut self.kernel_code.dropped) {
            self.kernel.drop_code(lin, &self.layout)?;
        }
        for pfn in std::mem::take(&mut self.kernel_code.newly_tracked)
            .into_iter()
            .chain(std::mem::take(&mut self.user_code.newly_tracked))
        {
            for space in std::iter::once(&mut self.kernel).chain(&mut self.users) {
                for lin in space.data.take_writable(pfn) {
                    space.drop_data(lin, &self.layout)?;
                }
            }
        }
        for (lin, pfn) in std::mem::take(&mut self.user_code.dropped) {
            for space in &mut self.users {
                if space.code.get(lin).mapped() && space.code.get(lin).pfn() == pfn {
                    space.drop_code(lin, &self.layout)?;
                }
            }
        }
        Ok(())
    }
}
