//! A world: page tables and an LDT, and what [`World`] asks of it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::fill::{Filler, is_ring3};
use super::machine::{CODE_AT, Exit, RAM_AT};
use super::monitor::{self, FRAME_WORDS, Frame};
use super::reflect::Reflect;
use super::tables::Exhausted;
use super::tables::{Tables, bit};
use super::{Engine, Kick, no_memory, refused};
use crate::raw::rc_deliver::REFLECTED;
use crate::raw::{GATE, GATE_REASON};
use crate::world::{
    Backing, CpuidRow, DeliveryRules, Fill, FillRules, HostSegment, HwRegs, Kicker, Prot, QUICK_SITES, Quick,
    Reflected, World, WorldError, WorldExit, WorldLin,
};

/// EFLAGS that guest code may run with: all but IOPL, VM, VIF and VIP.
const EFLAGS: u32 = 0x0025_4fd5;
/// EFLAGS bit 1, and IF: only the doorbell interrupts, and it must.
const EFLAGS_SET: u32 = 0x202;
/// Slots of an LDT page.
const SLOTS: u32 = 512;
/// MXCSR bits that exist on every CPU with SSE2.
const MXCSR_BITS: u32 = 0xffff;

pub(super) const LDT_PAGES: usize = (monitor::LDT_LEN / 4096) as usize;

/// A world: page tables and an LDT.
#[derive(Debug)]
pub struct Ring1World {
    pub(super) engine: Arc<Engine>,
    pub(super) number: u64,
    pub(super) tables: Tables,
    /// Where its tables show the region, if anywhere.
    pub(super) region: Option<u32>,
    /// Its LDT's own pages; 0: the shared one without segments.
    pub(super) ldt: [u64; LDT_PAGES],
    pub(super) vcpu: u64,
    /// Where its tables show that page.
    pub(super) vcpu_at: u32,
    /// What the monitor may do by itself in it.
    pub(super) reflect: Reflect,
    /// Where the gate's page is.
    pub(super) gate: Option<u32>,
    pub(super) kick: Arc<Kick>,
    pub(super) fx: Box<[u8; 512]>,
    /// `fx` counts; else the vCPU has it, or it is parked.
    pub(super) fx_is_ours: bool,
    pub(super) filler: Filler,
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

fn whose(prot: Prot) -> u64 {
    if prot.contains(Prot::USER) { bit::USER } else { 0 }
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
        self.reflect = Reflect::NONE;
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
            self.tables.set(first + (at >> 12), page | bit::ALWAYS | bits).map_err(no_memory)?;
        }
        for i in 0..LDT_PAGES as u32 {
            let page = first + (monitor::LDT >> 12) + i;
            self.tables.set(page, shared.no_segments | bit::ALWAYS | bit::NO_EXECUTE).map_err(no_memory)?;
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

    /// What the LDT has behind a selector; `None`: nothing, or it is not of ring 1.
    fn segment_of(&self, selector: u16) -> Option<monitor::Descriptor> {
        let slot = u32::from(selector >> 3);
        let page = *self.ldt.get((slot / SLOTS) as usize).filter(|page| **page != 0 && selector & 4 != 0)?;
        let bytes = self.engine.pool.map().read_u64(page + u64::from(slot % SLOTS) * 8)?;
        monitor::Descriptor::from_bytes(bytes).filter(|d| d.s && d.dpl == 1)
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
            vcpu.machine.run(
                &mut frame,
                (self.tables.cr3(), region, stale),
                &self.reflect,
                &self.kick.kicked,
            )?
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
                    let (pool, ram) = (&self.engine.pool, &self.engine.ram);
                    let at = (cr2, error_code);
                    if let Some(handler) = self.filler.deliver((pool, self.vcpu), ram, regs, at) {
                        *regs = handler;
                        continue;
                    }
                    let filled = self.filler.fill(&mut self.tables, &self.engine.ram, at, is_ring3(regs));
                    if !filled.map_err(no_memory)? {
                        return Ok(exit);
                    }
                }
                WorldExit::Fault { vector: 13, error_code: 0, .. } => {
                    if !self.filler.cpuid(&self.engine.ram, regs) {
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
                let entry =
                    if prot.is_empty() { 0 } else { frame | bit::ALWAYS | whose(prot) | data | rights(prot) };
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
            self.tables.set(at, *own | bit::ALWAYS | bit::NO_EXECUTE).map_err(no_memory)?;
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
        self.vcpu_at = vcpu.0;
        self.reflect = Reflect::NONE;
        self.map(vcpu, 4096, Backing::Vcpu, Prot::READ | Prot::WRITE)?;
        self.tables.set(stub_page.start, self.engine.shared.gate | bit::ALWAYS).map_err(no_memory)
    }

    fn set_fill_rules(&mut self, rules: &FillRules) {
        self.filler.rules = *rules;
    }

    fn set_cpuid(&mut self, rows: &[CpuidRow]) {
        self.filler.cpuid = rows.to_vec();
    }

    fn set_delivery_rules(&mut self, rules: &DeliveryRules) {
        self.filler.delivery = *rules;
    }

    fn faults_delivered(&self) -> u32 {
        self.filler.delivered
    }

    fn set_reflections(&mut self, events: &[(Reflected, DeliveryRules)]) {
        self.reflect = match self.region {
            Some(region) => Reflect::new(events, |selector| self.segment_of(selector), region, self.vcpu_at),
            None => Reflect::NONE,
        };
    }

    fn reflected(&self) -> u32 {
        self.vcpu_read(REFLECTED)
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
