//! Filling the shadow: mapping guest pages into worlds.

use super::*;

impl RawEngine {
    pub(super) fn map_kernel_code(
        &mut self,
        m: &mut Machine,
        number: usize,
        lin: GuestLin,
        leaf: &Leaf,
    ) -> Result<(), RawError> {
        let pfn = (leaf.frame.0 >> 12) as u32;
        let offset = self.kernel_page(m, lin, pfn)?;
        self.settle_code()?;
        let layout = self.layout;
        let space = &mut self.kernels[number];
        space.drop_data(layout.guest_of_data(layout.code(lin)), &layout)?;
        space.map_code(lin, leaf, (Backing::Code(offset), Whose::Kernels), &layout)?;
        Ok(())
    }

    /// Ring 3 goes on in a world of its own: maps the page of the fault the guest's handler has just answered, for which it
    /// would fault again.
    pub(super) fn refill(&mut self, cpu: &CpuState, m: &mut Machine, place: Place) -> Result<(), RawError> {
        let Some((lin, write)) = self.refill.take() else { return Ok(()) };
        let layout = self.layout;
        let access = Access { write, fetch: false, privilege: Privilege::User };
        let Ok(leaf) = walk(m, cpu, lin, access) else { return Ok(()) };
        let free = !self.reserves(matches!(place, Place::Kernel(_)))(lin);
        let space = self.space(place);
        let there = space.data.get(lin);
        let plain = free
            && m.is_ram(leaf.frame)
            && !(write && m.is_tracked((leaf.frame.0 >> 12) as u32))
            && layout.data(lin).0 >= LOW_LIMIT
            && !layout.is_engines(layout.data(lin))
            && !space.code.get(layout.code_in_place_of(lin.page_base())).mapped()
            && !(there.mapped() && (!write || there.host_write()));
        if plain { self.fill(cpu, m, place, lin, leaf) } else { Ok(()) }
    }

    pub(super) fn map_user_code(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        place: Place,
        lin: GuestLin,
        leaf: &Leaf,
    ) -> Result<(), RawError> {
        let pfn = (leaf.frame.0 >> 12) as u32;
        let copies = |this: &mut Self, m: &mut Machine| match place {
            Place::Kernel(_) => this.joint_code.view(m, cpu, &this.code, lin, pfn),
            Place::User(_) => this.user_code.view(m, cpu, &this.code, lin, pfn),
        };
        let mut view = copies(self, m);
        if matches!(view, user_code::View::NoMemory) {
            self.recycle_code(m)?;
            view = copies(self, m);
        }
        let backing = match view {
            user_code::View::Direct => Backing::Ram(leaf.frame.0),
            user_code::View::Copy(offset) => Backing::Code(offset),
            user_code::View::NoMemory => return Err(RawError::CodeMemory(self.code.size() >> 20)),
        };
        self.settle_code()?;
        let layout = self.layout;
        let space = self.space(place);
        space.drop_data(layout.guest_of_data(layout.code(lin)), &layout)?;
        space.map_code(lin, leaf, (backing, Whose::Users), &layout)?;
        self.map_user_code_around(m, cpu, place, lin)
    }

    /// Shows what else of ring 3's code lies around `lin`, as far as it needs no new copy and is in nobody's way.
    fn map_user_code_around(
        &mut self,
        m: &mut Machine,
        cpu: &CpuState,
        place: Place,
        lin: GuestLin,
    ) -> Result<(), RawError> {
        let layout = self.layout;
        let first = lin.page_number() & !(AROUND - 1);
        for page in (first..first + AROUND).filter(|p| *p != lin.page_number()) {
            let at = GuestLin(page << 12);
            let there = layout.guest_of_data(layout.code(at));
            let space = self.space(place);
            if layout.code(at).0 < LOW_LIMIT
                || page == LAST_PAGE
                || layout.in_trampolines(at)
                || space.code.get(at).mapped()
                || space.data.get(there).mapped()
                || self.boundary.is_some_and(|b| !b.holds(at))
            {
                continue;
            }
            // Code is not written to as a rule; data pages next to it are not to be in anybody's way.
            let executable =
                |l: &Leaf| l.user && !l.no_execute && !l.writable && l.shift == 12 && m.is_ram(l.frame);
            let Some(leaf) = peek(m, cpu, at).filter(executable) else { continue };
            if Self::hides_behind_code(m, cpu, &layout, at, matches!(place, Place::Kernel(_))) {
                continue;
            }
            let pfn = (leaf.frame.0 >> 12) as u32;
            let copies = match place {
                Place::Kernel(_) => &self.joint_code,
                Place::User(_) => &self.user_code,
            };
            let backing = match copies.known_view(m, cpu, at, pfn) {
                Some(user_code::View::Direct) => Backing::Ram(leaf.frame.0),
                Some(user_code::View::Copy(offset)) => Backing::Code(offset),
                _ => continue,
            };
            let Some(leaf) = prefetch(m, cpu, at) else { continue };
            self.space(place).map_code(at, &leaf, (backing, Whose::Users), &layout)?;
        }
        Ok(())
    }

    /// Whether a space may map `leaf` writable now, for ring 0 or for ring 3.
    pub(super) fn host_write(m: &Machine, cpu: &CpuState, supervisor: bool, leaf: &Leaf) -> bool {
        let allowed = leaf.writable || supervisor && cpu.cr0 & cr0::WP == 0;
        allowed && leaf.dirty && !m.is_tracked((leaf.frame.0 >> 12) as u32)
    }

    /// Maps the page of `lin` and what belongs around it.
    pub(super) fn fill(
        &mut self,
        cpu: &CpuState,
        m: &mut Machine,
        place: Place,
        lin: GuestLin,
        leaf: Leaf,
    ) -> Result<(), RawError> {
        let large = leaf.shift > 12;
        let supervisor = matches!(place, Place::Kernel(_));
        if large && supervisor {
            let region = lin.0 & !0x1f_ffff;
            let ours = |l: &Layout| {
                [l.vcpu, l.gate, l.tramp_as_data()].iter().any(|a| a & !0x1f_ffff == region)
                    || l.behind_trampolines(GuestLin(region))
            };
            // The guest has memory right where we sit, and reads there would not fault.
            if ours(&self.layout) && self.moves < MAX_MOVES {
                return self.relocate(m);
            }
        }
        let (layout, users_below) = (self.layout, self.boundary.map_or(0, Boundary::users_below));
        // The guest kernel's own memory within reach of its users: they may not run in that world any more.
        let exposed = |at: GuestLin, l: &Leaf| supervisor && !l.user && at.0 < users_below;
        let span = if large { 512 } else { AROUND };
        let lo = lin.page_number() & !(span - 1);
        let centre = lin.page_number();
        let reserved = self.reserves(supervisor);
        let space = self.space(place);
        space.tainted |= exposed(lin, &leaf);
        let mut run: Vec<Leaf> = Vec::new();
        let mut run_at = GuestLin(0);
        let mut run_write = false;
        for page in lo..lo + span {
            let at = GuestLin(page << 12);
            let mut this = None;
            let skip = layout.data(at).0 < LOW_LIMIT
                || layout.is_engines(layout.data(at))
                || page != centre && space.data.get(at).mapped()
                || reserved(at)
                || space.code.get(layout.code_in_place_of(at)).mapped();
            if !skip {
                let l = if page == centre {
                    Some(leaf)
                } else if large {
                    let delta = u64::from(page).wrapping_sub(u64::from(centre)) << 12;
                    Some(Leaf { frame: GuestPhys(leaf.frame.0.wrapping_add(delta)), ..leaf })
                } else {
                    peek(m, cpu, at)
                        .filter(|l| l.shift == 12 && if supervisor { !exposed(at, l) } else { l.user })
                        .and_then(|_| prefetch(m, cpu, at))
                };
                this = l.filter(|l| m.is_ram(l.frame));
            }
            if let Some(l) = this {
                let w = Self::host_write(m, cpu, supervisor, &l);
                let follows =
                    run.last().is_some_and(|p: &Leaf| p.frame.0 + 0x1000 == l.frame.0 && p.user == l.user);
                if follows && w == run_write {
                    run.push(l);
                    continue;
                }
                space.map_data_run(run_at, &run, run_write, &layout)?;
                run.clear();
                run.push(l);
                run_at = at;
                run_write = w;
            } else {
                space.map_data_run(run_at, &run, run_write, &layout)?;
                run.clear();
            }
        }
        space.map_data_run(run_at, &run, run_write, &layout)?;
        Ok(())
    }
}
