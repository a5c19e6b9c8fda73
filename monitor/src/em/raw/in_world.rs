//! What worlds do by themselves (shadow misses, `invlpg`, pages mapped on the way back from a fault, ports that need nobody
//! at once): telling them how, and taking over what they did.

use super::layout::{TRAMP_LEN, USER_TRAMP_LEN, USER_TRAMPS};
use super::*;
use crate::cpum::efer;
use crate::devices::i8254::COUNTER_0;
use crate::iom::Look;
use crate::pgm::shadow::Entry;
use host_driver_shim::raw::rc_walk::right;
use host_driver_shim::world::{Fill, FillMode, FillRules, NO_BASE, POSTED_TSC, QuickKind, TICK};
use iced_x86::Register;

/// The longest run a world can have mapped: a large page's worth.
const MAX_RUN: u32 = 512;

/// Number of EDX.
const EDX: u32 = 2;

/// What a world needs to fill its shadow as [`super::RawEngine`] would; `supervisor`: guest ring 0 runs in it.
fn rules(
    cpu: &CpuState,
    supervisor: bool,
    layout: &Layout,
    (user_cs, keys): (u16, bool),
    boundary: Option<Boundary>,
) -> FillRules {
    let mut mode = FillMode::empty();
    mode.set(FillMode::ENABLED, cpu.paging());
    mode.set(FillMode::SUPERVISOR, supervisor);
    mode.set(FillMode::KEYS, keys && supervisor);
    mode.set(FillMode::WP, cpu.cr0 & cr0::WP != 0);
    mode.set(FillMode::PSE, cpu.cr4 & cr4::PSE != 0);
    mode.set(FillMode::PAE, cpu.cr4 & cr4::PAE != 0);
    mode.set(FillMode::PGE, cpu.cr4 & cr4::PGE != 0);
    mode.set(FillMode::NXE, cpu.msr.efer & efer::NXE != 0);
    let mut keep_out = [(0, 0); 8];
    if supervisor {
        let page = |lin: u32| layout.data(GuestLin(lin)).0 >> 12;
        let tramp = layout.code(GuestLin(layout.user_tramp())).0 >> 12;
        keep_out[0] = (page(layout.vcpu), 1);
        keep_out[1] = (page(layout.gate), 1);
        keep_out[2] = (tramp, (USER_TRAMP_LEN + TRAMP_LEN) >> 12);
        for (slot, base) in keep_out[3..].iter_mut().zip(USER_TRAMPS) {
            *slot = (layout.code(GuestLin(base)).0 >> 12, USER_TRAMP_LEN >> 12);
        }
        if let Some(transit) = layout.transit {
            keep_out[3 + USER_TRAMPS.len()] = (page(transit), 1);
        }
    }
    let users_below = if user_cs == 0 { 0 } else { boundary.map_or(0, Boundary::users_below) };
    FillRules {
        pdpte: cpu.pdpte,
        mode,
        cr3: cpu.cr3,
        delta: layout.delta,
        user_cs: u32::from(user_cs),
        keep_out,
        users_below,
        reserved: 0,
    }
}

/// The guest page a world says it has mapped first, and the leaf it says it found; `None` if that cannot be.
fn checked(fill: &Fill, layout: &Layout, frames: u32) -> Option<(GuestLin, Leaf)> {
    let end = u64::from(fill.at.0 >> 12) + u64::from(fill.pages);
    let in_ram = fill.pfn.checked_add(fill.pages).is_some_and(|end| end <= frames);
    if fill.pages == 0 || fill.pages > MAX_RUN || end > 1 << 20 || !in_ram {
        return None;
    }
    let has = |bit| fill.rights & bit != 0;
    let leaf = Leaf {
        frame: GuestPhys(u64::from(fill.pfn) << 12),
        writable: has(right::WRITABLE),
        user: has(right::USER),
        no_execute: has(right::NO_EXECUTE),
        dirty: has(right::DIRTY),
        global: has(right::GLOBAL),
        shift: if has(right::LARGE) { 21 } else { 12 },
    };
    Some((layout.guest_of_data(fill.at), leaf))
}

impl Space {
    /// Tells the world how it may fill its shadow in the run to come.
    pub(super) fn allow_fills(
        &mut self,
        cpu: &CpuState,
        layout: &Layout,
        user: (u16, bool),
        boundary: Option<Boundary>,
    ) {
        let rules = rules(cpu, self.supervisor(), layout, user, boundary);
        if self.fill_rules != Some(rules) {
            self.world.set_fill_rules(&rules);
            self.fill_rules = Some(rules);
        }
    }

    /// Tells a new world what `cpuid` of ring 3 answers.
    pub fn tell_cpuid(&mut self, m: &Machine) {
        if !self.cpuid_told {
            self.cpuid_told = true;
            self.world.set_cpuid(&m.policy.rows());
        }
    }

    /// Tells the world which ports it may answer in the run to come.
    pub fn allow_ports(&mut self, m: &Machine) {
        let rows = m.devices.quiet_ports(m.look);
        if self.ports != rows {
            self.world.set_ports(&rows);
            self.ports = rows;
        }
    }

    /// Tells the world whether it is to watch the time in the run to come.
    pub fn allow_guard(&mut self, m: &Machine) {
        let guard = m.guard();
        if guard.is_some() || self.guards {
            self.world.set_guard(&guard.map(|guard| m.devices.guarded(guard)).unwrap_or_default());
            self.guards = guard.is_some();
        }
    }

    /// Gives the devices what the world says was written to ports in the run that just ended; it began at `entered` (TSC).
    pub fn take_posted(&mut self, m: &mut Machine, entered: u64) {
        let (ports, guards) = (&mut self.ports, self.guards);
        self.world.take_posted(&mut |write| {
            let tsc = host_tsc();
            let age = (tsc.wrapping_sub(write.tsc) & POSTED_TSC).min(tsc.saturating_sub(entered));
            let then = m.clock.now().saturating_sub(m.clock.ns_of_counts(age));
            if write.port == TICK {
                m.ticks.extend(m.devices.tick_was_delivered(then).filter(|_| guards));
                m.devices_touched = true;
                return;
            }
            let row = ports.iter_mut().find(|row| row.port == u32::from(write.port) && row.posts != 0);
            let Some(row) = row.filter(|row| u32::from(write.value) & row.mask == row.pattern) else {
                return;
            };
            if row.readable != 0 {
                row.value = u32::from(write.value);
            }
            m.devices.port_out(write.port, 1, u32::from(write.value), then);
            m.devices_touched |= write.port == COUNTER_0;
        });
    }

    /// Enters in the shadow what the world says it mapped in the run that just ended. A lie is believed as far as it is
    /// possible at all: it spoils the guest's own memory and nothing else.
    ///
    /// Returns the pages for which it has followed an `invlpg`.
    pub fn take_fills(&mut self, layout: &Layout, frames: u32) -> Result<Vec<GuestLin>, WorldError> {
        let data = &mut self.data;
        let mut flushed = Vec::new();
        let answered = self.world.take_fills(&mut |fill| {
            if fill.pages == 0 {
                let lin = layout.guest_of_data(fill.at);
                data.clear(lin);
                flushed.push(lin);
                return;
            }
            let Some((lin, leaf)) = checked(&fill, layout, frames) else { return };
            let host_write = fill.rights & right::HOST_WRITE != 0;
            for i in 0..fill.pages {
                let frame = GuestPhys(leaf.frame.0 + (u64::from(i) << 12));
                data.set(lin.wrapping_add(i << 12), Entry::new(&Leaf { frame, ..leaf }, host_write));
            }
        });
        self.filled += u64::from(answered);
        self.limit_mappings(layout)?;
        Ok(flushed)
    }
}

impl RawEngine {
    /// A world has followed an `invlpg` of the guest in its own mappings; now the others.
    pub(super) fn follow_flushes(
        &mut self,
        place: Place,
        cpu: &CpuState,
        pages: &[GuestLin],
    ) -> Result<(), RawError> {
        let layout = self.layout;
        let followed = match place {
            Place::Kernel(number) if !pages.is_empty() => {
                self.may_enter.filter(|_| !self.kernels[number].world.users_are_stale())
            }
            _ => None,
        };
        for &lin in pages {
            for (i, space) in self.kernels.iter_mut().enumerate() {
                if Place::Kernel(i) != place && space.data.get(lin).global() {
                    space.invalidate(lin, &layout)?;
                }
            }
            for (i, space) in self.users.iter_mut().enumerate() {
                if followed == Some(i) {
                    // The world has seen to that one, too.
                    continue;
                }
                if space.role == (Role::User { cr3: cpu.cr3 }) || space.data.get(lin).global() {
                    space.invalidate(lin, &layout)?;
                }
            }
        }
        Ok(())
    }

    /// The instruction at EIP has left by the gate: if it is a plain `invlpg`, worlds may do it themselves from now on.
    pub(super) fn learn_invlpg(&mut self, cpu: &CpuState, reason: u32, i: &Instruction) {
        let plain =
            i.code() == Code::Invlpg_m && i.memory_base().is_gpr32() && i.memory_index() == Register::None;
        let segment = match i.memory_segment() {
            Register::DS => seg::DS,
            Register::SS => seg::SS,
            _ => return,
        };
        let flat_cs = cpu.seg[seg::CS].base == 0 && cpu.seg[seg::CS].limit == u32::MAX;
        if !plain || !flat_cs || !cpu.seg[segment].is_flat() {
            return;
        }
        self.enter_quick(Quick {
            reason,
            kind: QuickKind::Invlpg,
            base: i.memory_base().number() as u32,
            displacement: i.memory_displacement32(),
            segment: segment as u32,
            selector: u32::from(cpu.seg[segment].selector),
            resume: self.resume_behind(cpu, i),
        });
    }

    /// The instruction at EIP has left by the gate: if it accesses a port that worlds might answer, they look at it from now
    /// on.
    pub(super) fn learn_port(&mut self, cpu: &CpuState, m: &Machine, reason: u32, i: &Instruction) {
        let (kind, base, displacement) = match i.code() {
            Code::In_AL_imm8 => (QuickKind::In, NO_BASE, u32::from(i.immediate8())),
            Code::In_AL_DX => (QuickKind::In, EDX, 0),
            Code::Out_imm8_AL => (QuickKind::Out, NO_BASE, u32::from(i.immediate8())),
            Code::Out_DX_AL => (QuickKind::Out, EDX, 0),
            _ => return,
        };
        if m.tape.is_recording() {
            // What a world does with a port is not on the tape.
            return;
        }
        let port = if base == NO_BASE { displacement as u16 } else { cpu.gpr[EDX as usize] as u16 };
        let rows = m.devices.quiet_ports(Some(Look { tsc: 0, counts_per_clk: 1, guard: None }));
        if rows.iter().any(|row| row.posts != 0 && row.port == u32::from(port)) {
            let resume = self.resume_behind(cpu, i);
            self.enter_quick(Quick { reason, kind, base, displacement, resume, ..Quick::default() });
        }
    }

    /// The instruction at EIP has left by the gate: if it is a `hlt`, worlds may sleep there from now on.
    pub(super) fn learn_halt(&mut self, cpu: &CpuState, m: &Machine, reason: u32, i: &Instruction) {
        if i.code() == Code::Hlt && !m.tape.is_recording() {
            let resume = cpu.eip.wrapping_add(i.len() as u32);
            self.enter_quick(Quick { reason, kind: QuickKind::Halt, resume, ..Quick::default() });
        }
    }

    /// Where a world goes on behind the instruction at EIP.
    pub(super) fn resume_behind(&self, cpu: &CpuState, i: &Instruction) -> u32 {
        self.kernel_code.patm.resume_eip(cpu.eip.wrapping_add(i.len() as u32))
    }

    /// An `iret` to ring 3 has left by the gate because a page is to be mapped on the way: worlds do that from now on.
    pub(super) fn learn_refill(&mut self, reason: u32) {
        if let Some(resume) = self.kernel_code.patm.restart_eip(reason) {
            self.enter_quick(Quick { reason, kind: QuickKind::Refill, resume, ..Quick::default() });
        }
    }

    pub(super) fn enter_quick(&mut self, quick: Quick) {
        if self.quick_changes != self.kernel_code.changes {
            self.forget_quick();
        }
        if self.quick.iter().any(|q| q.reason == quick.reason) {
            return;
        }
        if let Some(slot) = self.quick.iter_mut().find(|q| q.reason == 0) {
            *slot = quick;
            self.quick_version += 1;
        }
    }

    /// Patches have changed: where the sites go on is not known any more.
    fn forget_quick(&mut self) {
        self.quick = Default::default();
        self.quick_changes = self.kernel_code.changes;
        self.quick_version += 1;
    }

    /// Tells a world what it may do by itself.
    pub(super) fn publish_quick(&mut self, number: usize) {
        if self.quick_changes != self.kernel_code.changes {
            self.forget_quick();
        }
        let space = &mut self.kernels[number];
        if space.quick_version != self.quick_version {
            space.quick_version = self.quick_version;
            space.world.set_quick(&self.quick);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host_driver_shim::fake::FakeWorld;
    use host_driver_shim::world::WorldLin;

    const FRAMES: u32 = 0x1000;

    fn told(fills: &[Fill]) -> Space {
        let mut world = FakeWorld::new();
        world.will_have_filled(fills);
        let mut space = Space::new(Box::new(world), Role::Supervisor);
        space.take_fills(&Layout::CANDIDATES[0], FRAMES).unwrap();
        space
    }

    #[test]
    fn what_a_world_mapped_is_in_the_shadow_afterwards() {
        let layout = Layout::CANDIDATES[0];
        let at = layout.data(GuestLin(0xc012_3000));
        let rights = right::WRITABLE | right::DIRTY | right::HOST_WRITE | right::GLOBAL;
        let mut space = told(&[Fill { at, pages: 3, pfn: 0x123, rights }]);
        assert_eq!((space.data.len(), space.filled), (3, 1));
        let last = space.data.get(GuestLin(0xc012_5000));
        assert!(last.mapped() && last.host_write() && last.global());
        assert_eq!(last.pfn(), 0x125);
        // And the frame's mapping is found when the frame becomes code.
        assert_eq!(space.data.take_writable(0x124), [GuestLin(0xc012_4000)]);
    }

    #[test]
    fn impossible_notes_of_a_world_are_ignored() {
        let fill = |at, pages, pfn| Fill { at: WorldLin(at), pages, pfn, rights: right::ALL };
        let space = told(&[
            fill(0x10_0000, 0, 1),
            fill(0x10_0000, 513, 1),
            fill(0x10_0000, u32::MAX, 1),
            fill(0xffff_f000, 2, 1),
            fill(0x10_0000, 1, FRAMES),
            fill(0x10_0000, 2, FRAMES - 1),
            fill(0x10_0000, 2, u32::MAX),
        ]);
        assert!(space.data.is_empty());
    }
}
