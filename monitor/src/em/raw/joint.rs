//! Which space the CPU's next instruction runs in.
//!
//! `--isolation worlds`: one world for guest ring 0, and one with user pages only for each hot CR3 of guest ring 3.
//!
//! `--isolation limits`: one world for each hot CR3 holds the guest's kernel and its users, as the hardware would have
//! it. Ring 3 runs there with segments that end below the guest kernel (the *boundary*), so that system calls and their
//! returns need no change of address space. That stops accidents, not hostile guest users: user code is not scanned and
//! may load the host's own flat selector (`docs/decisions/0003-joint-worlds.md`). Code segments are left whole, because
//! one with a limit slows all code down; ring 3 that is found above the boundary gets its page fault there
//! (`docs/decisions/0007-code-segments-are-whole.md`). Where limits cannot tell users from the
//! kernel (kernel memory below the boundary, CR0.WP clear, segments that are not flat) ring 3 still gets a world of its
//! own.
//!
//! `--isolation strict`: the same worlds, and users are kept from all that is not theirs by a memory protection key
//! (`docs/decisions/0015-keyed-worlds.md`). Where the CPU has none it means `worlds`.
//!
//! Where the engine has rings of its own (`ring1`), the same worlds are kept apart by pages: what the guest gives its
//! users are user pages there, everything else is the supervisor's, and segments need not end anywhere.

use super::*;

/// How the guest kernel is kept from its users.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Isolation {
    /// In one world, by what the engine has for that: pages (`ring1`), or else the limits of data segments, which stop
    /// accidents.
    #[default]
    Limits,
    /// By the limits of code segments, too: a jump into the guest kernel faults where it lands.
    LimitsCode,
    /// So that hostile guest users are withstood: by a memory protection key in one world, or else by [`Isolation::Worlds`].
    Strict,
    /// By worlds of their own without the guest kernel.
    Worlds,
}

/// Address spaces that have a joint world as soon as they are used.
pub(super) const FEW_JOINT_SPACES: usize = 16;
/// Address spaces that have one at the most. Each costs the host a process and some 900 KiB.
pub(super) const MAX_JOINT_SPACES: usize = 512;
/// Worlds that count as used of late.
const LATELY: usize = 8;
/// Of so many address spaces that had a joint world is known that they lost it.
const MAX_EVICTED: usize = 1024;
/// The boundary is a multiple of this.
const BOUNDARY_STEP: u32 = 256 << 20;
/// Guest kernels whose page-fault handler is lower are not told from their users by limits.
const LOWEST_KERNEL: u32 = 0x8000_0000;

/// Bytes of the transit page in use.
const TRANSIT_LEN: u32 = 0x180;

/// What keeps ring 3 from the guest kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Boundary {
    /// The limits of its segments, at this guest linear address.
    At(u32),
    /// The U/S bit.
    Pages,
    /// None is needed: ring 3 has worlds of its own.
    Worlds,
}

impl Boundary {
    /// What it is before ring 3 has run.
    pub(super) fn at_first(isolation: Isolation) -> Option<Boundary> {
        (isolation == Isolation::Worlds).then_some(Boundary::Worlds)
    }
    /// Where segments of ring 3 end.
    pub(super) fn limit(self) -> Option<u32> {
        match self {
            Boundary::At(end) => Some(end),
            Boundary::Pages | Boundary::Worlds => None,
        }
    }
    /// Whatever is mapped below this guest linear address ring 3 can reach.
    pub(super) fn users_below(self) -> u32 {
        self.limit().unwrap_or(0)
    }
    /// Ring 3 may have something at `lin`.
    pub(super) fn holds(self, lin: GuestLin) -> bool {
        self.limit().is_none_or(|end| lin.0 < end)
    }
}

impl RawEngine {
    /// The space the CPU's next instruction runs in.
    pub(super) fn choose_space(&mut self, cpu: &CpuState, m: &mut Machine) -> Result<Place, RawError> {
        self.clock += 1;
        if self.isolation == Isolation::Worlds || !cpu.paging() {
            if cpu.cpl != 3 {
                self.kernels[0].role = Role::Supervisor;
                return Ok(Place::Kernel(0));
            }
            return self.user_space(cpu);
        }
        if cpu.cpl == 3 && !self.limits_hold(cpu, m) {
            return self.user_space(cpu);
        }
        let number = self.joint_space(cpu)?;
        if cpu.cpl == 3 && self.kernels[number].tainted {
            return self.user_space(cpu);
        }
        Ok(Place::Kernel(number))
    }

    /// The world of ring 3 alone for the CPU's address space.
    fn user_space(&mut self, cpu: &CpuState) -> Result<Place, RawError> {
        let role = Role::User { cr3: cpu.cr3 };
        let i = match self.users.iter().position(|s| s.role == role) {
            Some(i) => i,
            None if self.users.len() < MAX_USER_SPACES => {
                self.users.push(Space::new(self.host.spawn_for_users()?, role));
                self.furnish_user(self.users.len() - 1)?;
                self.users.len() - 1
            }
            None => {
                let oldest = (0..self.users.len()).min_by_key(|&i| self.users[i].last_used).unwrap_or(0);
                self.users[oldest].clear()?;
                self.furnish_user(oldest)?;
                self.users[oldest].role = role;
                oldest
            }
        };
        self.users[i].last_used = self.clock;
        Ok(Place::User(i))
    }

    /// The world of all rings for the CPU's address space.
    fn joint_space(&mut self, cpu: &CpuState) -> Result<usize, RawError> {
        let role = Role::Joint { cr3: cpu.cr3 };
        let i = match self.known_joint_space(cpu.cr3) {
            Some(i) => i,
            None => {
                let i = if self.kernels[0].role == Role::Supervisor {
                    0
                } else {
                    let returns = self.evicted.iter().any(|cr3| *cr3 == cpu.cr3);
                    match self.new_joint_space(role, returns)? {
                        Some(new) => new,
                        None => self.evict(returns),
                    }
                };
                self.joint_of.insert(cpu.cr3, i);
                let keyed = self.descriptors.rules().keys;
                let space = &mut self.kernels[i];
                if keyed {
                    // What another process had in its registers is nothing for this one.
                    let own = (0..TRANSIT_LEN).step_by(4).map(|at| vp::TRANSIT + at);
                    let all = own.chain([vp::USER_SS_HOST, vp::USER_CS_HOST]);
                    all.for_each(|at| space.world.vcpu_write(at, 0));
                }
                space.role = role;
                space.world.disarm();
                space.published = None;
                // The guest kernel's half is the same under every CR3 as a rule: only what is not goes.
                space.pending_sync = Some(Scope::All);
                space.tainted = false;
                i
            }
        };
        self.kernels[i].last_used = self.clock;
        Ok(i)
    }

    /// The joint world an address space has.
    pub(super) fn known_joint_space(&self, cr3: u32) -> Option<usize> {
        let i = *self.joint_of.get(&cr3)?;
        self.kernels.get(i).is_some_and(|space| space.role == Role::Joint { cr3 }).then_some(i)
    }

    /// One more joint world, if there are few or the address space `returns` after it lost its own: then there are more address
    /// spaces in use than worlds. None: there are enough, or the host gives no more.
    fn new_joint_space(&mut self, role: Role, returns: bool) -> Result<Option<usize>, RawError> {
        let i = self.kernels.len();
        let enough = if returns { MAX_JOINT_SPACES } else { FEW_JOINT_SPACES };
        if i >= enough.min(self.most_worlds) {
            return Ok(None);
        }
        let world = match self.host.spawn() {
            Ok(world) => world,
            Err(e) => {
                log::warn!("no more than {i} worlds: {e}");
                self.most_worlds = i;
                return Ok(None);
            }
        };
        self.kernels.push(Space::new(world, role));
        self.furnish(i)?;
        let latest = (0..i).max_by_key(|&i| self.kernels[i].last_used).unwrap_or(0);
        self.show_known_code(i, latest)?;
        self.kernels[i].cache = self.kernels[latest].cache.for_new_world();
        Ok(Some(i))
    }

    /// Takes an address space its joint world: the one not used for longest. If an address space comes that `returns`, there are
    /// more in use than worlds, and then that one is always the next to be used: one of those used of late goes, whose tables are
    /// still in the host's caches, but not the last, which is perhaps between any two others.
    fn evict(&mut self, returns: bool) -> usize {
        let mut order: Vec<usize> = (0..self.kernels.len()).collect();
        order.sort_unstable_by_key(|&i| std::cmp::Reverse(self.kernels[i].last_used));
        let place = if returns { 1 + self.clock as usize % LATELY } else { usize::MAX };
        let i = order[place.min(order.len() - 1)];
        if let Role::Joint { cr3 } = self.kernels[i].role {
            self.joint_of.remove(&cr3);
            self.evicted.retain(|other| *other != cr3);
            if self.evicted.len() >= MAX_EVICTED {
                self.evicted.pop_front();
            }
            self.evicted.push_back(cr3);
        }
        i
    }

    /// Maps into a new world the copies of kernel code the world used last has.
    fn show_known_code(&mut self, number: usize, latest: usize) -> Result<(), RawError> {
        let boundary = self.boundary.and_then(Boundary::limit).unwrap_or(LOWEST_KERNEL);
        let pages: Vec<_> = self.kernels[latest].code.pages().filter(|(lin, _)| lin.0 >= boundary).collect();
        for (lin, entry) in pages {
            if let Some(offset) = self.kernel_code.copy_of(lin, entry.pfn()) {
                let layout = self.layout;
                self.kernels[number].map_code_entry(
                    lin,
                    entry,
                    (Backing::Code(offset), Whose::Kernels),
                    &layout,
                )?;
            }
        }
        Ok(())
    }

    /// Whether pages or segment limits can keep the ring-3 code that is about to run from the guest kernel.
    fn limits_hold(&mut self, cpu: &CpuState, m: &mut Machine) -> bool {
        let (cs, ss) = (&cpu.seg[seg::CS], &cpu.seg[seg::SS]);
        let flat = |s: &Segment| s.is_flat() && s.big() && s.present();
        // Nothing of these is reached in a joint world (`Descriptors::selector`).
        let down = [seg::ES, seg::DS, seg::FS, seg::GS].iter().any(|&i| cpu.seg[i].expands_down());
        if !flat(cs) || !flat(ss) || down || cpu.cr0 & cr0::WP == 0 {
            return false;
        }
        if self.descriptors.rules().pages {
            if self.boundary.is_none() {
                self.boundary = Some(Boundary::Pages);
                self.forget_segment_cache();
            }
            return true;
        }
        if self.boundary.is_none() {
            self.boundary = Self::find_boundary(cpu, m).map(Boundary::At);
            if let Some(Boundary::At(boundary)) = self.boundary {
                log::info!("ring 3 ends at {boundary:08x}");
                self.forget_segment_cache();
                let layout = self.layout;
                for space in &mut self.kernels {
                    // What ring 0 mapped below it so far may be its own.
                    let own: Vec<_> = space
                        .data
                        .pages()
                        .filter(|(lin, e)| lin.0 < boundary && !e.user())
                        .map(|(lin, _)| lin)
                        .collect();
                    space.tainted |= !own.is_empty();
                    let code: Vec<_> = space.code.pages().filter(|(lin, _)| lin.0 < boundary).collect();
                    for (lin, _) in code {
                        if space.drop_code(lin, &layout).is_err() {
                            return false;
                        }
                    }
                }
            }
        }
        self.boundary.and_then(Boundary::limit).is_some_and(|b| cpu.eip < b && self.layout.vcpu < b)
    }

    /// The end of the user half: above the highest user page, not above the guest's page-fault handler.
    fn find_boundary(cpu: &CpuState, m: &mut Machine) -> Option<u32> {
        let mut gate = [0u8; 8];
        let at = GuestLin(cpu.idtr.base.wrapping_add(14 * 8));
        m.read(cpu, at, &mut gate, Privilege::Supervisor).ok()?;
        let handler = u32::from_le_bytes([gate[0], gate[1], gate[6], gate[7]]);
        if handler < LOWEST_KERNEL {
            return None;
        }
        let mut page = handler >> 12;
        // Downwards from the handler to the first user page; whole 2 MiB at a time where there is nothing.
        while page > 0 {
            page -= 1;
            match peek(m, cpu, GuestLin(page << 12)) {
                Some(l) if l.user => {
                    let end = (u64::from(page + 1) << 12).next_multiple_of(u64::from(BOUNDARY_STEP));
                    return u32::try_from(end).ok().filter(|b| *b <= handler);
                }
                Some(l) if l.shift > 12 => page &= !0x1ff,
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host_driver_shim::fake::FakeWorld;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A host that makes so many worlds.
    struct Host(AtomicUsize);

    impl Worlds for Host {
        fn spawn(&self) -> Result<Box<dyn World>, WorldError> {
            let left = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            left.map_err(|_| WorldError::Died("no more".into()))?;
            Ok(Box::new(FakeWorld::new()))
        }
        fn set_cpu(&self, _: usize) {}
        fn most(&self) -> usize {
            MAX_JOINT_SPACES
        }
    }

    fn engine(worlds: usize) -> RawEngine {
        let code = CodeMemory::new(1 << 20).unwrap();
        RawEngine::new(Box::new(Host(AtomicUsize::new(worlds))), code, false, Isolation::Limits).unwrap()
    }

    /// Address spaces used one after the other; how many of these had a world already.
    fn round(engine: &mut RawEngine, spaces: u32) -> usize {
        let mut cpu = CpuState::reset();
        (1..=spaces)
            .filter(|n| {
                cpu.cr3 = n << 12;
                engine.clock += 1;
                let known = engine.known_joint_space(cpu.cr3).is_some();
                let place = engine.joint_space(&cpu).unwrap();
                assert_eq!(engine.kernels[place].role, Role::Joint { cr3: cpu.cr3 });
                known
            })
            .count()
    }

    #[test]
    fn address_spaces_that_do_not_come_back_share_a_few_worlds() {
        let mut engine = engine(1000);
        assert_eq!(round(&mut engine, 300), 0);
        assert_eq!(engine.kernels.len(), FEW_JOINT_SPACES);
    }

    #[test]
    fn address_spaces_that_come_back_get_worlds_of_their_own() {
        let mut engine = engine(1000);
        round(&mut engine, 100);
        round(&mut engine, 100);
        assert_eq!(engine.kernels.len(), 100);
        assert_eq!(round(&mut engine, 100), 100);
        // And more than there may be worlds: most of them keep theirs.
        for _ in 0..3 {
            round(&mut engine, 600);
        }
        assert_eq!(engine.kernels.len(), MAX_JOINT_SPACES);
        assert!(round(&mut engine, 600) > 400);
    }

    #[test]
    fn a_host_that_makes_no_more_worlds_is_asked_no_more() {
        let mut engine = engine(40);
        for _ in 0..3 {
            round(&mut engine, 100);
        }
        assert_eq!((engine.kernels.len(), engine.most_worlds), (40, 40));
    }
}
