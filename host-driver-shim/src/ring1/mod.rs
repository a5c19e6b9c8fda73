//! The ring1 engine: guest ring 0 in hardware ring 1, guest ring 3 in ring 3, under a 32-bit monitor in ring 0 of a KVM
//! virtual machine.
//!
//! 1. [`monitor`]: the monitor (assembly), what it pushes and where its pages lie.
//! 2. [`machine`]: the virtual machine, entered and left by KVM_RUN.
//! 3. [`tables`]: the worlds' page tables.
//! 4. [`fill`]: exits that need no monitor process's attention.
//! 5. Here: [`Ring1Engine`], what all worlds of a guest share, and [`Ring1World`], which is a set of page tables and an
//!    LDT. All worlds run on the one vCPU.
//!
//! A guest that reaches ring 0 of the virtual machine has the machine: guest RAM, copies of its own code, its worlds'
//! page tables. It does not have this process.

mod fill;
mod machine;
mod monitor;
mod tables;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::code_memory::CodeMemory;
use crate::ram::GuestRam;
use crate::raw::{GATE, GATE_REASON};
use crate::world::{
    Backing, Fill, FillRules, HostSegment, HwRegs, Kicker, Prot, QUICK_SITES, Quick, SegmentRules, World,
    WorldError, WorldExit, WorldLin,
};
use fill::Filler;
use machine::{Bell, CODE_AT, Exit, Machine, RAM_AT};
use monitor::{FRAME_WORDS, Frame};
use tables::{Exhausted, Pool, Tables, bit};

/// Memory for page tables and LDTs: all of 4 GiB in small pages for as many worlds as a guest has. It is taken from the
/// host as it is used.
const POOL: usize = 384 << 20;
/// Where the region ends before anybody says where it should.
const FIRST_END: u32 = 0x5000_0000;
/// The filler of the gate's page: `hlt`, which tells the host that a trampoline has something to say.
const GATE_FILLER: u8 = 0xf4;
/// EFLAGS that guest code may run with: all but IOPL, VM, VIF and VIP.
const EFLAGS: u32 = 0x0025_4fd5;
/// EFLAGS bit 1, and IF: only the doorbell interrupts, and it must.
const EFLAGS_SET: u32 = 0x202;
/// Slots of an LDT page.
const SLOTS: u32 = 512;
/// MXCSR bits that exist on every CPU with SSE2.
const MXCSR_BITS: u32 = 0xffff;

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
            && region.is_none_or(|at| holds(shared.tables, &mut page, &monitor::tables_page(at)))
            && holds(shared.no_segments, &mut page, &[0; 4096])
            && holds(shared.gate, &mut page, &[GATE_FILLER; 4096])
    }

    /// How segments have to be in these worlds.
    #[must_use]
    pub fn segment_rules() -> SegmentRules {
        SegmentRules {
            ring0: 1,
            code_ring0: monitor::KERNEL_CS,
            code_ring3: monitor::USER_CS,
            hole: monitor::REGION,
            readable_code: false,
        }
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
            gate: None,
            kick: Arc::new(Kick { kicked: AtomicBool::new(false), bell }),
            fx: Box::new(initial_fx()),
            fx_is_ours: true,
            filler: Filler::new(),
        })
    }
}

/// The state after FNINIT and with MXCSR at its reset value, in FXSAVE64's layout.
fn initial_fx() -> [u8; 512] {
    let mut fx = [0; 512];
    fx[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    fx
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

const LDT_PAGES: usize = (monitor::LDT_LEN / 4096) as usize;

/// A world: page tables and an LDT.
#[derive(Debug)]
pub struct Ring1World {
    engine: Arc<Engine>,
    number: u64,
    tables: Tables,
    /// Where its tables show the region, if anywhere.
    region: Option<u32>,
    /// Its LDT's own pages; 0: the shared one without segments.
    ldt: [u64; LDT_PAGES],
    vcpu: u64,
    /// Where the gate's page is.
    gate: Option<u32>,
    kick: Arc<Kick>,
    fx: Box<[u8; 512]>,
    /// `fx` counts; else the vCPU has it, or it is parked.
    fx_is_ours: bool,
    filler: Filler,
}

impl Drop for Ring1World {
    fn drop(&mut self) {
        let mut vcpu = self.engine.vcpu();
        vcpu.forget(self.number);
        vcpu.machine.leave_world(self.tables.cr3());
        drop(vcpu);
        self.ldt.iter().filter(|p| **p != 0).for_each(|p| self.engine.pool.free(*p));
        self.engine.pool.free(self.vcpu);
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

const ALWAYS: u64 = bit::PRESENT | bit::ACCESSED | bit::DIRTY;

fn rights(prot: Prot) -> u64 {
    let mut bits = 0;
    if prot.contains(Prot::WRITE) {
        bits |= bit::WRITE;
    }
    if !prot.contains(Prot::EXEC) {
        bits |= bit::NO_EXECUTE;
    }
    bits
}

impl Ring1World {
    /// Whether CPUID raises #GP(0) in this world (KVM can fault it).
    #[must_use]
    pub fn cpuid_faults(&self) -> bool {
        self.engine.vcpu().machine.cpuid_faults
    }

    /// The pages of the region.
    fn kept(&self) -> Range<u32> {
        self.region.map_or(0..0, |at| at >> 12..(at >> 12) + (monitor::REGION >> 12))
    }

    fn range(at: WorldLin, len: u32) -> Result<Range<u32>, WorldError> {
        let fine = len > 0
            && len.is_multiple_of(4096)
            && at.0.is_multiple_of(4096)
            && u64::from(at.0) + u64::from(len) <= 1 << 32;
        let first = at.0 >> 12;
        if fine {
            Ok(first..first + (len >> 12))
        } else {
            Err(refused(at, len, "not a range of whole pages below 4 GiB"))
        }
    }

    /// Shows the region where it has to be. If that is elsewhere than before, segments made for the old place may reach
    /// the new one: the LDT starts empty.
    fn follow_region(&mut self) -> Result<u32, WorldError> {
        let wanted = self.engine.region.load(Ordering::Relaxed);
        if self.region == Some(wanted) {
            return Ok(wanted);
        }
        let old = self.kept();
        self.region = None;
        self.tables.clear(old.start, old.end, 0..0);
        for page in &mut self.ldt {
            if *page != 0 {
                self.engine.pool.free(std::mem::take(page));
            }
        }
        let first = wanted >> 12;
        let shared = &self.engine.shared;
        let fixed = [
            (monitor::CODE, shared.code, 0),
            (monitor::TABLES, shared.tables, bit::NO_EXECUTE),
            (monitor::STATE, shared.state, bit::NO_EXECUTE | bit::WRITE),
        ];
        for (at, page, bits) in fixed {
            self.tables.set(first + (at >> 12), page | ALWAYS | bits).map_err(no_memory)?;
        }
        for i in 0..LDT_PAGES as u32 {
            let page = first + (monitor::LDT >> 12) + i;
            self.tables.set(page, shared.no_segments | ALWAYS | bit::NO_EXECUTE).map_err(no_memory)?;
        }
        self.region = Some(wanted);
        Ok(wanted)
    }

    fn frame_of(&self, regs: &HwRegs) -> Result<Frame, WorldError> {
        let [es, cs, ss, ds, fs, gs] = regs.sel;
        // Ring 0 is the monitor's; the CPU itself looks at everything else.
        if !matches!((cs & 3, ss & 3), (1, 1) | (3, 3)) {
            return Err(WorldError::BadState(format!(
                "{cs:04x} and {ss:04x} are no code and stack of a guest"
            )));
        }
        let monitors = |s: u16| s & 4 == 0 && s > 3 && !matches!(s, monitor::KERNEL_CS | monitor::USER_CS);
        if let Some(s) = regs.sel.into_iter().find(|s| monitors(*s)) {
            return Err(WorldError::BadState(format!("{s:04x} is the monitor's")));
        }
        let [eax, ecx, edx, ebx, esp, ebp, esi, edi] = regs.gpr;
        Ok(Frame {
            gs: u32::from(gs),
            fs: u32::from(fs),
            es: u32::from(es),
            ds: u32::from(ds),
            edi,
            esi,
            ebp,
            ebx,
            edx,
            ecx,
            eax,
            eip: regs.eip,
            cs: u32::from(cs),
            eflags: regs.eflags & EFLAGS | EFLAGS_SET,
            esp,
            ss: u32::from(ss),
            ..Frame::default()
        })
    }

    fn load_fpu(&mut self) -> Result<(), WorldError> {
        let mut vcpu = self.engine.vcpu();
        if !self.fx_is_ours {
            if vcpu.fpu_of == Some(self.number) {
                return Ok(());
            }
            if let Some(fx) = vcpu.take_fpu(self.number)? {
                *self.fx = fx;
            }
        }
        vcpu.park()?;
        for (byte, real) in self.fx[24..28].iter_mut().zip(MXCSR_BITS.to_le_bytes()) {
            *byte &= real;
        }
        vcpu.machine.set_fpu(&self.fx)?;
        vcpu.fpu_of = Some(self.number);
        self.fx_is_ours = false;
        Ok(())
    }

    /// Runs guest code once.
    fn run_once(&mut self, regs: &mut HwRegs, region: u32) -> Result<WorldExit, WorldError> {
        let mut frame: [u32; FRAME_WORDS] = self.frame_of(regs)?.words();
        let stale = std::mem::take(&mut self.tables.stale);
        let exit = {
            let mut vcpu = self.engine.vcpu();
            vcpu.machine.run(&mut frame, (self.tables.cr3(), region, stale), &self.kick.kicked)?
        };
        match exit {
            Exit::Guest => {}
            Exit::Kicked => {
                self.tables.stale |= stale;
                self.kick.kicked.store(false, Ordering::SeqCst);
                return Ok(WorldExit::Kick);
            }
            Exit::BadState(vector, code) => {
                return Err(WorldError::BadState(format!(
                    "exception {vector} (error code {code:#x}) while loading {regs:x?}"
                )));
            }
        }
        let f = Frame::from_words(&frame);
        regs.gpr = [f.eax, f.ecx, f.edx, f.ebx, f.esp, f.ebp, f.esi, f.edi];
        (regs.eip, regs.eflags) = (f.eip, f.eflags);
        // The upper halves are whatever the CPU left there.
        regs.sel = [f.es, f.cs, f.ss, f.ds, f.fs, f.gs].map(|s| s as u16);
        if f.vector == u32::from(monitor::DOORBELL) {
            self.kick.kicked.store(false, Ordering::SeqCst);
        }
        Ok(self.exit_of(&f, regs))
    }

    /// What a frame of guest code says of why it was left.
    fn exit_of(&self, frame: &Frame, regs: &mut HwRegs) -> WorldExit {
        let in_gate = self.gate.is_some_and(|gate| regs.eip.wrapping_sub(gate) < 4096);
        if in_gate && regs.sel[1] == monitor::KERNEL_CS {
            // Whatever stopped it here, the `hlt` would have come next.
            if frame.vector == u32::from(monitor::DOORBELL) {
                self.kick.kicked.store(true, Ordering::SeqCst);
            }
            regs.eip = 0;
            return WorldExit::Gate { reason: self.vcpu_read(GATE_REASON) };
        }
        if frame.vector == u32::from(monitor::DOORBELL) {
            return WorldExit::Kick;
        }
        WorldExit::Fault {
            vector: frame.vector as u8,
            error_code: frame.error_code,
            cr2: if frame.vector == 14 { frame.cr2 } else { 0 },
        }
    }
}

impl World for Ring1World {
    fn run(&mut self, regs: &mut HwRegs) -> Result<WorldExit, WorldError> {
        if self.kick.kicked.swap(false, Ordering::SeqCst) {
            return Ok(WorldExit::Kick);
        }
        let region = self.follow_region()?;
        self.load_fpu()?;
        self.filler.begin();
        loop {
            let exit = self.run_once(regs, region)?;
            match exit {
                WorldExit::Fault { vector: 14, error_code, cr2 } => {
                    let filled = self.filler.fill(&mut self.tables, &self.engine.ram, cr2, error_code);
                    if !filled.map_err(no_memory)? {
                        return Ok(exit);
                    }
                }
                WorldExit::Gate { reason } => {
                    let (pool, vcpu) = (&self.engine.pool, self.vcpu);
                    let word = |at: u32| pool.map().read_u32(vcpu + u64::from(at)).unwrap_or(0);
                    let Some(resume) = self.filler.quick(&mut self.tables, reason, &regs.gpr, word) else {
                        return Ok(exit);
                    };
                    regs.eip = resume;
                }
                exit => return Ok(exit),
            }
        }
    }

    fn map(&mut self, at: WorldLin, len: u32, backing: Backing, prot: Prot) -> Result<(), WorldError> {
        let pages = Self::range(at, len)?;
        self.follow_region()?;
        let (start, offset, size) = match backing {
            Backing::Ram(offset) => (RAM_AT, offset, self.engine.ram.size()),
            Backing::Code(offset) => (CODE_AT, offset, self.engine.code.size()),
            Backing::Vcpu => (self.vcpu, 0, 4096),
        };
        if !offset.is_multiple_of(4096) || offset.checked_add(u64::from(len)).is_none_or(|end| end > size) {
            return Err(refused(at, len, "its backing ends before it"));
        }
        if prot.contains(Prot::WRITE | Prot::EXEC)
            || matches!(backing, Backing::Code(_)) && prot.contains(Prot::WRITE)
        {
            return Err(refused(at, len, "what is executed is never writable in a world"));
        }
        let as_data = matches!(backing, Backing::Ram(_)) && !prot.contains(Prot::EXEC);
        let data = if as_data { bit::DATA } else { 0 };
        let kept = self.kept();
        let mut frame = start + offset;
        for page in pages {
            // Where the region lies the guest has nothing, and gets a fault.
            if !kept.contains(&page) {
                let entry = if prot.is_empty() { 0 } else { frame | bit::GUEST | data | rights(prot) };
                self.tables.set(page, entry).map_err(no_memory)?;
            }
            frame += 4096;
        }
        Ok(())
    }

    fn unmap(&mut self, at: WorldLin, len: u32) -> Result<(), WorldError> {
        let kept = self.kept();
        let pages = if (at.0, len) == (0, 0) { 0..1 << 20 } else { Self::range(at, len)? };
        self.tables.clear(pages.start, pages.end, kept);
        Ok(())
    }

    fn protect(&mut self, at: WorldLin, len: u32, prot: Prot) -> Result<(), WorldError> {
        let pages = Self::range(at, len)?;
        if prot.contains(Prot::WRITE | Prot::EXEC) {
            return Err(refused(at, len, "what is executed is never writable in a world"));
        }
        if self.tables.protect(pages.start, pages.end, rights(prot), &self.kept()) {
            Ok(())
        } else {
            Err(refused(at, len, "nothing is mapped in a part of it"))
        }
    }

    fn set_segment(&mut self, slot: u16, segment: HostSegment) -> Result<(), WorldError> {
        let bad = |why: &str| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, why);
            WorldError::Host { what: "setting a segment", source }
        };
        if slot >= 8192 || !matches!(segment.ring, 1 | 3) {
            return Err(bad("slots are 0..8192, rings 1 and 3"));
        }
        let region = self.follow_region()?;
        if segment.ring == 1 && (segment.code && segment.rw || !segment.code && reaches(&segment, region)) {
            return Err(bad("ring 1 could reach the monitor by it"));
        }
        let kind = match segment {
            HostSegment { code: true, rw, .. } => 9 | u8::from(rw) << 1,
            HostSegment { expand_down, rw, .. } => 1 | u8::from(rw) << 1 | u8::from(expand_down) << 2,
        };
        let descriptor = monitor::Descriptor {
            base: segment.base,
            limit: segment.limit,
            kind,
            s: true,
            dpl: segment.ring,
            big: segment.big,
            pages: segment.limit_in_pages,
        };
        let (page, entry) = (u32::from(slot) / SLOTS, u64::from(u32::from(slot) % SLOTS));
        let own = &mut self.ldt[page as usize];
        if *own == 0 {
            *own = self.engine.pool.alloc().ok_or(Exhausted).map_err(no_memory)?;
            let at = ((region + monitor::LDT) >> 12) + page;
            self.tables.set(at, *own | ALWAYS | bit::NO_EXECUTE).map_err(no_memory)?;
        }
        let _in_range = self.engine.pool.map().write_u64(*own + entry * 8, descriptor.bytes());
        Ok(())
    }

    fn fpu(&mut self) -> &mut [u8; 512] {
        if !self.fx_is_ours {
            self.fx_is_ours = true;
            if let Ok(Some(fx)) = self.engine.vcpu().take_fpu(self.number) {
                *self.fx = fx;
            }
        }
        &mut self.fx
    }

    fn vcpu_read(&self, offset: u32) -> u32 {
        if offset > 4092 {
            return 0;
        }
        self.engine.pool.map().read_u32(self.vcpu + u64::from(offset)).unwrap_or(0)
    }

    fn vcpu_write(&mut self, offset: u32, value: u32) {
        if offset <= 4092 {
            let _in_range = self.engine.pool.map().write_u32(self.vcpu + u64::from(offset), value);
        }
    }

    fn place_gate(&mut self, stub: WorldLin, vcpu: WorldLin) -> Result<(), WorldError> {
        let (stub_page, vcpu_page) = (Self::range(stub, 4096)?, Self::range(vcpu, 4096)?);
        self.follow_region()?;
        let kept = self.kept();
        if kept.contains(&stub_page.start) || kept.contains(&vcpu_page.start) {
            return Err(refused(stub, 4096, "the monitor is there"));
        }
        self.vcpu_write(GATE, stub.0);
        self.vcpu_write(GATE + 4, u32::from(monitor::KERNEL_CS));
        self.gate = Some(stub.0);
        self.map(vcpu, 4096, Backing::Vcpu, Prot::READ | Prot::WRITE)?;
        self.tables.set(stub_page.start, self.engine.shared.gate | bit::GUEST).map_err(no_memory)
    }

    fn set_fill_rules(&mut self, rules: &FillRules) {
        self.filler.rules = *rules;
    }

    fn set_quick(&mut self, table: &[Quick; QUICK_SITES]) {
        self.filler.quick = *table;
    }

    fn flushes_done(&self) -> u32 {
        self.filler.flushes_done
    }

    fn mark_large(&mut self, lin: u32) {
        self.filler.mark_large(lin);
    }

    fn take_fills(&mut self, each: &mut dyn FnMut(Fill)) -> u32 {
        self.filler.take(each)
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.kick.clone()
    }
}

/// Whether a data segment reaches a byte of the region at `region`.
fn reaches(segment: &HostSegment, region: u32) -> bool {
    let limit = match segment.limit_in_pages {
        true => u64::from(segment.limit & 0xf_ffff) << 12 | 0xfff,
        false => u64::from(segment.limit & 0xf_ffff),
    };
    // The offsets it has (SDM vol. 3, 5.3).
    let (first, end) = match (segment.expand_down, segment.big) {
        (false, _) => (0, limit + 1),
        (true, true) => (limit + 1, 1 << 32),
        (true, false) => (limit + 1, 1 << 16),
    };
    // An access that begins inside may be as wide as an FPU's state; the CPU holds all of its bytes against the limit.
    let wrapped = 1u64 << 32;
    let (from, to) = (u64::from(segment.base) + first, u64::from(segment.base) + end);
    let hit = |at: u64| from < at + u64::from(monitor::REGION) && at < to;
    first < end && (hit(u64::from(region)) || hit(u64::from(region) + wrapped))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(base: u32, limit: u32, limit_in_pages: bool) -> HostSegment {
        HostSegment {
            base,
            limit,
            limit_in_pages,
            code: false,
            big: true,
            expand_down: false,
            rw: true,
            ring: 1,
        }
    }

    #[test]
    fn a_segment_reaches_the_region_or_ends_before_it() {
        let at = 0x5000_0000 - monitor::REGION;
        let pages = monitor::REGION >> 12;
        assert!(reaches(&data(0, 0xf_ffff, true), at));
        assert!(!reaches(&data(0, (at >> 12) - 1, true), at));
        assert!(reaches(&data(0, at >> 12, true), at));
        // Round the end of the address space up to the region, and a page further.
        assert!(!reaches(&data(0x5000_0000, 0xf_ffff - pages, true), at));
        assert!(reaches(&data(0x5000_0000, 0xf_ffff - pages + 1, true), at));
        assert!(reaches(&data(at + 5, 0, false), at));
        let down = HostSegment { expand_down: true, ..data(0, 0xf_ffff, true) };
        assert!(!reaches(&down, at));
        assert!(reaches(&HostSegment { limit: 0, ..down }, at));
        assert!(!reaches(&HostSegment { limit: 0, big: false, ..down }, at));
    }
}
