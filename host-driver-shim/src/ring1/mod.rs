//! The ring1 engine: guest ring 0 in hardware ring 1, guest ring 3 in ring 3, under a 32-bit monitor in ring 0 of a KVM
//! virtual machine.
//!
//! 1. [`monitor`]: the monitor (assembly), what it pushes and where its pages lie; [`reflect`]: what it may do by itself.
//! 2. [`machine`]: the virtual machine, entered and left by KVM_RUN.
//! 3. [`tables`]: the worlds' page tables.
//! 4. [`world`]: [`Ring1World`], a set of page tables and an LDT; [`fill`]: its exits that need nobody else's attention.
//! 5. Here: [`Ring1Engine`], what all worlds of a guest share. All run on the one vCPU.
//!
//! A guest that reaches ring 0 of the virtual machine has the machine: guest RAM, copies of its own code, its worlds'
//! page tables. It does not have this process.

mod fill;
mod machine;
mod monitor;
mod reflect;
mod tables;
mod world;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::code_memory::CodeMemory;
use crate::ram::GuestRam;
use crate::world::{
    HostSegment, HwRegs, Kicker, SegmentRules, World, WorldError, WorldExit, WorldLin, initial_fx,
};
use fill::Filler;
use machine::{Bell, Machine};
use reflect::Reflect;
use tables::{Exhausted, Pool, Tables};
use world::LDT_PAGES;
pub use world::Ring1World;

/// Memory for page tables and LDTs: all of 4 GiB in small pages for as many worlds as a guest has. It is taken from the
/// host as it is used.
const POOL: usize = 384 << 20;
/// Where the region ends before anybody says where it should.
const FIRST_END: u32 = 0x5000_0000;
/// The filler of the gate's page: `hlt`, which tells the host that a trampoline has something to say.
const GATE_FILLER: u8 = 0xf4;

/// What the worlds of a guest share.
#[derive(Clone, Debug)]
pub struct Ring1Engine(Arc<Engine>);

#[derive(Debug)]
struct Engine {
    ram: GuestRam,
    code: CodeMemory,
    pool: Pool,
    shared: SharedPages,
    /// Where the region has to be in every world that runs from here on.
    region: AtomicU32,
    worlds: AtomicU64,
    vcpu: Mutex<Vcpu>,
}

/// Pages of the pool that every world shows.
#[derive(Debug)]
struct SharedPages {
    code: u64,
    tables: u64,
    state: u64,
    /// LDT pages without a segment.
    no_segments: u64,
    gate: u64,
}

#[derive(Debug)]
struct Vcpu {
    machine: Machine,
    /// The world whose FPU state the vCPU has.
    fpu_of: Option<u64>,
    /// The states of worlds that lost the vCPU before anybody asked for theirs.
    parked: Vec<(u64, [u8; 512])>,
}

impl Engine {
    fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_memory(_: Exhausted) -> WorldError {
    WorldError::Host { what: "memory for page tables", source: io::Error::from(io::ErrorKind::OutOfMemory) }
}

fn refused(at: WorldLin, len: u32, why: &str) -> WorldError {
    WorldError::Map { at: at.0, len, why: String::from(why) }
}

impl Ring1Engine {
    /// An engine for this RAM and code memory. Says what is missing where KVM cannot carry it.
    pub fn new(ram: &GuestRam, code: &CodeMemory) -> Result<Ring1Engine, WorldError> {
        let host = |source| WorldError::Host { what: "memory for the monitor", source };
        let pool = Pool::new(POOL).map_err(host)?;
        let page = || pool.alloc().ok_or(Exhausted).map_err(no_memory);
        let shared = SharedPages {
            code: page()?,
            tables: page()?,
            state: page()?,
            no_segments: page()?,
            gate: page()?,
        };
        let _in_range = pool.map().write(shared.code, monitor::code());
        let _in_range = pool.map().fill(shared.gate, 4096, GATE_FILLER);
        let machine = Machine::new(&pool, shared.state, shared.tables, ram.shared(), code.shared())?;
        let engine = Ring1Engine(Arc::new(Engine {
            ram: ram.clone(),
            code: code.clone(),
            pool,
            shared,
            region: AtomicU32::new(FIRST_END - monitor::REGION),
            worlds: AtomicU64::new(0),
            vcpu: Mutex::new(Vcpu { machine, fpu_of: None, parked: Vec::new() }),
        }));
        engine.probe()?;
        Ok(engine)
    }

    /// Runs one `hlt` in ring 1, that of the gate. A KVM that emulates in software has a node and takes all of the set-up, but not that.
    fn probe(&self) -> Result<(), WorldError> {
        let cannot = |why: String| WorldError::Host {
            what: "trying KVM with code in ring 1",
            source: io::Error::other(why),
        };
        let mut world = self.spawn_world()?;
        world.place_gate(WorldLin(0x1000), WorldLin(0x2000))?;
        let rules = Self::segment_rules();
        let stack = HostSegment {
            base: 0,
            limit: 2,
            limit_in_pages: true,
            code: false,
            big: true,
            expand_down: false,
            rw: true,
            ring: rules.ring0,
        };
        world.set_segment(1, stack)?;
        let ss = 1 << 3 | 4 | u16::from(rules.ring0);
        let mut regs = HwRegs { eip: 0x1004, sel: [0, rules.code_ring0, ss, 0, 0, 0], ..HwRegs::default() };
        match world.run(&mut regs) {
            Ok(WorldExit::Gate { .. }) => Ok(()),
            Ok(other) => Err(cannot(format!("a halt was answered by {other:?} at {:#x}", regs.eip))),
            Err(e) => Err(cannot(e.to_string())),
        }
    }

    /// Puts the monitor's region so that it ends at `end`, a multiple of 4096 and 0 or at least the size of
    /// [`SegmentRules::hole`], in each world from its next run on. Their LDTs are empty then.
    pub fn settle(&self, end: WorldLin) -> Result<(), WorldError> {
        if !end.0.is_multiple_of(4096) || (1..monitor::REGION).contains(&end.0) {
            return Err(refused(end, 0, "the monitor's region cannot end there"));
        }
        self.0.region.store(end.0.wrapping_sub(monitor::REGION), Ordering::Relaxed);
        Ok(())
    }

    /// Whether the monitor's code and tables are what they were made as: a guest that changed one would have broken out.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        let Engine { pool, shared, .. } = &*self.0;
        let mut page = [0; 4096];
        let holds = |at: u64, page: &mut [u8; 4096], bytes: &[u8]| {
            pool.map().read(at, page).is_some() && page.starts_with(bytes)
        };
        let region = self.0.vcpu().machine.region();
        holds(shared.code, &mut page, monitor::code())
            && region.is_none_or(|at| {
                holds(shared.tables, &mut page, &monitor::tables_page(at)[..monitor::REFLECT_AT as usize])
            })
            && holds(shared.no_segments, &mut page, &[0; 4096])
            && holds(shared.gate, &mut page, &[GATE_FILLER; 4096])
    }

    /// How segments have to be in these worlds, if the CPU has SMEP.
    #[must_use]
    pub fn segment_rules() -> SegmentRules {
        SegmentRules {
            ring0: 1,
            code_ring0: monitor::KERNEL_CS,
            code_ring3: monitor::USER_CS,
            hole: monitor::REGION,
            readable_code: false,
            keys: false,
            pages: true,
            int_faults: true,
        }
    }

    /// The CPU refuses to execute a user page in ring 1 (SMEP).
    #[must_use]
    pub fn has_smep(&self) -> bool {
        self.0.vcpu().machine.smep
    }

    /// From the next run of a world on, `rdtsc` raises #GP(0), so that the monitor decides what the guest reads.
    pub fn trap_tsc(&self) {
        self.0.vcpu().machine.trap_tsc();
    }

    /// Makes a world, ready to run, with nothing mapped.
    pub fn spawn_world(&self) -> Result<Ring1World, WorldError> {
        let engine = &self.0;
        let vcpu = engine.pool.alloc().ok_or(Exhausted).map_err(no_memory)?;
        let tables = Tables::new(&engine.pool).map_err(|e| {
            engine.pool.free(vcpu);
            no_memory(e)
        })?;
        let bell = Arc::clone(engine.vcpu().machine.bell());
        Ok(Ring1World {
            engine: Arc::clone(engine),
            number: engine.worlds.fetch_add(1, Ordering::Relaxed),
            tables,
            region: None,
            ldt: [0; LDT_PAGES],
            vcpu,
            vcpu_at: 0,
            reflect: Reflect::NONE,
            gate: None,
            kick: Arc::new(Kick { kicked: AtomicBool::new(false), bell }),
            fx: Box::new(initial_fx()),
            fx_is_ours: true,
            filler: Filler::new(),
        })
    }
}

#[derive(Debug)]
struct Kick {
    kicked: AtomicBool,
    bell: Arc<Bell>,
}

impl Kicker for Kick {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.bell.ring();
    }
}

impl Vcpu {
    fn forget(&mut self, world: u64) {
        self.fpu_of = self.fpu_of.filter(|w| *w != world);
        self.parked.retain(|(w, _)| *w != world);
    }

    /// Makes the vCPU's FPU free for another world.
    fn park(&mut self) -> Result<(), WorldError> {
        if let Some(owner) = self.fpu_of.take() {
            let fx = self.machine.fpu()?;
            self.parked.push((owner, fx));
        }
        Ok(())
    }

    /// Hands out the state of a world's FPU, which the world then keeps itself.
    fn take_fpu(&mut self, world: u64) -> Result<Option<[u8; 512]>, WorldError> {
        if self.fpu_of == Some(world) {
            self.fpu_of = None;
            return self.machine.fpu().map(Some);
        }
        let parked = self.parked.iter().position(|(w, _)| *w == world);
        Ok(parked.map(|i| self.parked.swap_remove(i).1))
    }
}
