//! The machine around the virtual CPU: guest RAM, devices, time and policy, as the interpreter sees them ([`Env`]).

use crate::cpuid_msr::{CpuPolicy, WrmsrEffect};
use crate::cpum::{CpuState, seg};
use crate::env::{Env, PagingChange, Privilege};
use crate::interp::decode_cache::{DecodeCache, Place};
use crate::iom::{Devices, Look};
use crate::pgm::tlb::Tlb;
use crate::pgm::walk::{Access, PhysMemory, walk};
use crate::pvclock;
use crate::tape::{Input, Tape};
use crate::tm::Clock;
use crate::trap::Trap;
use csam::{GuestLin, GuestPhys};
use host_driver_shim::ram::GuestRam;
use host_driver_shim::world::Guard;
use iced_x86::Instruction;
use std::cell::RefCell;

/// A write that hit a frame with copies in a code view.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CodeWrite {
    /// First byte written.
    pub at: GuestPhys,
    /// Bytes written, not crossing the page.
    pub len: u32,
}

/// Everything a guest has besides its CPU.
pub struct Machine {
    /// Guest RAM from GuestPhys 0, without holes.
    pub ram: GuestRam,
    /// All devices.
    pub devices: Devices,
    /// CPUID and MSRs.
    pub policy: CpuPolicy,
    /// Virtual time.
    pub clock: Clock,
    /// Inputs, recorded or played.
    pub tape: Tape,
    /// For each frame: how many code-view copies of it exist. Writes to such a frame must be seen.
    tracked: Vec<u32>,
    /// Writes seen since the engine last looked.
    pub code_writes: Vec<CodeWrite>,
    /// A and D bits set in frames with copies since the engine last looked: the walk has the machine shared.
    table_writes: RefCell<Vec<CodeWrite>>,
    decoded: DecodeCache,
    tlb: Tlb,
    /// CR3 the TLB is about: a task switch looks through the new one before it is final.
    tlb_cr3: u32,
    /// Flushes since the engine last looked.
    pub paging_changes: Vec<PagingChange>,
    /// The timer is spent, and this is when the EMT will look at the devices.
    pub look: Option<Look>,
    /// Vectors of the ticks worlds have delivered since EM last looked.
    pub ticks: Vec<u8>,
    /// See [`Env::one_iteration`].
    pub one_iteration: bool,
    /// A device was accessed: deadlines and interrupt lines may have changed.
    pub devices_touched: bool,
}

impl Machine {
    /// Puts a machine together.
    pub fn new(ram: GuestRam, devices: Devices, policy: CpuPolicy, clock: Clock) -> Machine {
        let frames = (ram.size() >> 12) as usize;
        Machine {
            ram,
            devices,
            policy,
            clock,
            tape: Tape::Off,
            tracked: vec![0; frames],
            code_writes: Vec::new(),
            table_writes: RefCell::default(),
            decoded: DecodeCache::new(frames),
            tlb: Tlb::default(),
            tlb_cr3: 0,
            paging_changes: Vec::new(),
            look: None,
            ticks: Vec::new(),
            one_iteration: false,
            devices_touched: true,
        }
    }

    /// Number of 4 KiB frames of RAM.
    #[must_use]
    pub fn frames(&self) -> u32 {
        self.tracked.len() as u32
    }

    /// Frame `pfn` is RAM.
    #[must_use]
    pub fn is_ram(&self, frame: GuestPhys) -> bool {
        frame.0 < self.ram.size()
    }

    /// Frame `pfn` has copies in a code view.
    #[must_use]
    pub fn is_tracked(&self, pfn: u32) -> bool {
        self.tracked.get(pfn as usize).is_some_and(|&n| n != 0)
    }

    /// One more copy of frame `pfn` exists; true if it is the first.
    pub fn track(&mut self, pfn: u32) -> bool {
        match self.tracked.get_mut(pfn as usize) {
            Some(n) => {
                *n += 1;
                let first = *n == 1;
                if first {
                    self.ram.set_watched(pfn, true);
                }
                first
            }
            None => false,
        }
    }

    /// One copy less of frame `pfn`.
    pub fn untrack(&mut self, pfn: u32) {
        if let Some(n) = self.tracked.get_mut(pfn as usize) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                self.ram.set_watched(pfn, false);
            }
        }
    }

    /// Reads RAM; bytes beyond its end read as ones.
    pub fn read_ram(&self, at: GuestPhys, buf: &mut [u8]) {
        if self.ram.read(at.0, buf).is_none() {
            for (i, b) in buf.iter_mut().enumerate() {
                let mut one = [0xffu8];
                let _ = self.ram.read(at.0.wrapping_add(i as u64), &mut one);
                *b = one[0];
            }
        }
    }

    /// Writes RAM and notes a write to code; bytes beyond the end are dropped. Must not cross a page.
    pub fn write_ram(&mut self, at: GuestPhys, data: &[u8]) {
        self.decoded.written(at.0);
        self.tape.note_written(at);
        if self.ram.write(at.0, data).is_some() && self.is_tracked((at.0 >> 12) as u32) {
            self.code_writes.push(CodeWrite { at, len: data.len() as u32 });
        }
    }

    /// Takes the writes to frames with copies since the last call, by the guest and by page walks.
    pub fn take_code_writes(&mut self) -> Vec<CodeWrite> {
        let mut writes = std::mem::take(&mut self.code_writes);
        writes.append(self.table_writes.get_mut());
        writes
    }

    /// How much the interpreter has noted for the engine to follow.
    #[must_use]
    pub fn notes(&self) -> usize {
        self.paging_changes.len() + self.code_writes.len() + self.table_writes.borrow().len()
    }

    /// Nobody needs to follow.
    pub fn forget_notes(&mut self) {
        self.take_code_writes();
        self.paging_changes.clear();
    }

    /// Guest code has run natively: it may have written anywhere.
    pub fn ran_natively(&mut self) {
        self.decoded.distrust();
    }

    /// Where the instruction at CS:EIP lies, if the walk to it is remembered.
    #[inline]
    fn place(&self, cpu: &CpuState) -> Option<Place> {
        if self.tlb_cr3 != cpu.cr3 {
            return None;
        }
        let at = GuestLin(cpu.linear_eip());
        let privilege = if cpu.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let frame = self.tlb.get(at, Access::fetch(privilege))?;
        let phys = frame.0 + at.page_offset() as u64;
        Some(Place { phys, eip: cpu.eip, big: cpu.seg[seg::CS].big() })
    }

    /// How a world watches the time in EM's place, if one is to.
    #[must_use]
    pub fn guard(&self) -> Option<Guard> {
        self.look.and_then(|look| look.guard)
    }

    /// Forgets walks the interpreter remembers: the guest may have flushed its TLB where the interpreter did not see it.
    pub fn forget_translations(&mut self) {
        self.tlb.clear();
    }

    /// The frame behind a page for an access, from the TLB or by a walk.
    #[inline]
    fn frame(&mut self, cpu: &CpuState, lin: GuestLin, access: Access) -> Result<GuestPhys, Trap> {
        if self.tlb_cr3 != cpu.cr3 {
            self.tlb.clear();
            self.tlb_cr3 = cpu.cr3;
        }
        if let Some(frame) = self.tlb.get(lin, access) {
            return Ok(frame);
        }
        let leaf = walk(self, cpu, lin, access).map_err(|code| Trap::pf(code, lin.0))?;
        self.tlb.put(lin, access, leaf.frame);
        Ok(leaf.frame)
    }

    /// Translates every page of an access; nothing is accessed unless all of it may be.
    fn translate(
        &mut self,
        cpu: &CpuState,
        at: GuestLin,
        len: usize,
        access: Access,
    ) -> Result<Chunks, Trap> {
        let mut chunks = Chunks { list: [(GuestPhys(0), 0); 3], n: 0 };
        let mut lin = at;
        let mut left = len;
        while left > 0 {
            let frame = self.frame(cpu, lin, access)?;
            let here = left.min(0x1000 - lin.page_offset());
            if chunks.n == chunks.list.len() {
                // No instruction accesses more than two pages at once; string instructions are split by the caller.
                return Err(Trap::gp(0));
            }
            chunks.list[chunks.n] = (frame.wrapping_add(lin.page_offset() as u64), here);
            chunks.n += 1;
            lin = lin.wrapping_add(here as u32);
            left -= here;
        }
        Ok(chunks)
    }
}

struct Chunks {
    list: [(GuestPhys, usize); 3],
    n: usize,
}

impl PhysMemory for Machine {
    fn read_u32(&self, at: GuestPhys) -> u32 {
        self.tape.note_table(at);
        let mut b = [0xff; 4];
        let _ = self.ram.read(at.0, &mut b);
        u32::from_le_bytes(b)
    }
    fn write_u32(&self, at: GuestPhys, value: u32) {
        self.decoded.written(at.0);
        self.tape.note_written(at);
        // A and D bits in page tables. A frame with copies of code may become a page table without being written much.
        let written = self.ram.write(at.0, &value.to_le_bytes()).is_some();
        if written && self.is_tracked((at.0 >> 12) as u32) {
            self.table_writes.borrow_mut().push(CodeWrite { at, len: 4 });
        }
    }
}

impl Env for Machine {
    fn read(
        &mut self,
        cpu: &CpuState,
        at: GuestLin,
        buf: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Trap> {
        let access = Access::read(privilege);
        if at.page_offset() + buf.len() <= 0x1000 {
            let frame = self.frame(cpu, at, access)?;
            self.read_ram(frame.wrapping_add(at.page_offset() as u64), buf);
            return Ok(());
        }
        let chunks = self.translate(cpu, at, buf.len(), access)?;
        let mut done = 0;
        for &(phys, n) in &chunks.list[..chunks.n] {
            self.read_ram(phys, &mut buf[done..done + n]);
            done += n;
        }
        Ok(())
    }

    fn write(&mut self, cpu: &CpuState, at: GuestLin, data: &[u8], privilege: Privilege) -> Result<(), Trap> {
        let access = Access::write(privilege);
        if at.page_offset() + data.len() <= 0x1000 {
            let frame = self.frame(cpu, at, access)?;
            self.write_ram(frame.wrapping_add(at.page_offset() as u64), data);
            return Ok(());
        }
        let chunks = self.translate(cpu, at, data.len(), access)?;
        let mut done = 0;
        for &(phys, n) in &chunks.list[..chunks.n] {
            self.write_ram(phys, &data[done..done + n]);
            done += n;
        }
        Ok(())
    }

    fn probe_write(
        &mut self,
        cpu: &CpuState,
        at: GuestLin,
        len: u32,
        privilege: Privilege,
    ) -> Result<(), Trap> {
        self.translate(cpu, at, len as usize, Access::write(privilege)).map(|_| ())
    }

    fn fetch(&mut self, cpu: &CpuState, at: GuestLin, buf: &mut [u8]) -> Result<usize, Trap> {
        let privilege = if cpu.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let access = Access::fetch(privilege);
        let first = buf.len().min(0x1000 - at.page_offset());
        let frame = self.frame(cpu, at, access)?;
        self.read_ram(frame.wrapping_add(at.page_offset() as u64), &mut buf[..first]);
        let rest = buf.len() - first;
        if rest == 0 {
            return Ok(first);
        }
        // Only a fetch that really needs the next page may set its A bit: look without touching.
        let next = at.wrapping_add(first as u32);
        match crate::pgm::walk::peek(self, cpu, next) {
            Some(l) if !(l.no_execute || privilege == Privilege::User && !l.user) => {
                self.read_ram(l.frame, &mut buf[first..]);
                Ok(first + rest)
            }
            _ => Ok(first),
        }
    }

    fn one_iteration(&self) -> bool {
        self.one_iteration
    }

    #[inline]
    fn decoded(&mut self, cpu: &CpuState) -> Option<Instruction> {
        let place = self.place(cpu)?;
        // It was decoded when CS had another limit, perhaps.
        let i = self.decoded.get(place)?;
        let last = cpu.eip.checked_add(i.len() as u32 - 1)?;
        (last <= cpu.seg[seg::CS].limit).then_some(*i)
    }

    fn decoded_from(&mut self, cpu: &CpuState, bytes: &[u8; 16], got: usize) -> Option<Instruction> {
        let place = self.place(cpu)?;
        self.decoded.get_same(place, bytes, got)
    }

    fn remember_decoded(&mut self, cpu: &CpuState, bytes: &[u8; 16], instruction: &Instruction) {
        if let Some(place) = self.place(cpu) {
            self.decoded.put(place, bytes, instruction);
        }
    }

    fn port_in(&mut self, port: u16, size: u8) -> u32 {
        if let Tape::Play(play) = &mut self.tape {
            return play.port_in(port, size);
        }
        self.devices_touched = true;
        let now = self.clock.now();
        let value = self.devices.port_in(port, size, now);
        self.tape.note(|| Input::In { port, size, value });
        value
    }

    fn port_out(&mut self, port: u16, size: u8, value: u32) {
        if let Tape::Play(play) = &mut self.tape {
            return play.port_out(port, size, value);
        }
        self.tape.note(|| Input::Out { port, size, value });
        self.devices_touched = true;
        let now = self.clock.now();
        self.devices.port_out(port, size, value, now);
    }

    fn tsc(&mut self, cpu: &CpuState) -> u64 {
        if let Tape::Play(play) = &mut self.tape {
            return play.tsc();
        }
        let tsc = self.clock.tsc().wrapping_add_signed(cpu.msr.tsc_offset);
        self.tape.note(|| Input::Tsc(tsc));
        tsc
    }

    fn marks_pdptes(&self) -> bool {
        // For guests of its SVM with nested paging.
        self.policy.on_tcg()
    }

    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.policy.cpuid(cpu, leaf, subleaf)
    }

    fn rdmsr(&mut self, cpu: &CpuState, msr: u32) -> Result<u64, Trap> {
        if let Tape::Play(play) = &mut self.tape {
            return play.rdmsr(msr);
        }
        let tsc = self.clock.tsc().wrapping_add_signed(cpu.msr.tsc_offset);
        let value = self.policy.rdmsr(cpu, msr, tsc);
        self.tape.note(|| Input::Msr { msr, value });
        value
    }

    fn wrmsr(&mut self, cpu: &mut CpuState, msr: u32, value: u64) -> Result<(), Trap> {
        let tsc = self.tsc(cpu);
        match self.policy.wrmsr(cpu, msr, value, tsc)? {
            WrmsrEffect::None => {}
            WrmsrEffect::PagingMode => {
                self.tlb.clear();
                self.paging_changes.push(PagingChange::Mode);
            }
            _ if matches!(self.tape, Tape::Play(_)) => {
                while let Tape::Play(play) = &mut self.tape
                    && let Some((at, bytes)) = play.ram()
                {
                    self.write_ram(at, &bytes);
                }
            }
            WrmsrEffect::TscOffset | WrmsrEffect::SystemTime => pvclock::write_system_time(self, cpu),
            WrmsrEffect::WallClock => pvclock::write_wall_clock(self, cpu),
        }
        Ok(())
    }

    fn read_phys(&mut self, at: GuestPhys, buf: &mut [u8]) {
        self.read_ram(at, buf);
    }

    fn paging_changed(&mut self, _cpu: &CpuState, change: PagingChange) {
        self.tlb.clear();
        self.paging_changes.push(change);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cpum::cr0;
    use crate::iom::DevicesConfig;

    /// A machine with this many MiB of empty RAM.
    pub(crate) fn machine(mib: u64) -> Machine {
        let ram = GuestRam::new(mib << 20).unwrap();
        let devices = Devices::new(DevicesConfig {
            ram_bytes: mib << 20,
            utc_ns: 0,
            serial: Default::default(),
            debug_console: None,
            debug_exit: None,
        });
        Machine::new(ram, devices, CpuPolicy::host(), Clock::host())
    }

    /// A CPU whose page directory at `cr3` leads with its first entry to the table at cr3 + 1000h, which shows `frame`
    /// at linear 0.
    pub(crate) fn paged(m: &Machine, cr3: u32, frame: u32) -> CpuState {
        let mut cpu = CpuState::reset();
        cpu.cr0 = cr0::PE | cr0::PG | cr0::WP;
        cpu.cr3 = cr3;
        m.write_u32(GuestPhys(u64::from(cr3)), (cr3 + 0x1000) | 3);
        m.write_u32(GuestPhys(u64::from(cr3) + 0x1000), frame | 3);
        cpu
    }

    #[test]
    fn a_look_through_another_cr3_sees_its_pages_and_leaves_nothing_behind() {
        let mut m = machine(1);
        let (old, new) = (paged(&m, 0x1000, 0x8000), paged(&m, 0x4000, 0x9000));
        m.write_ram(GuestPhys(0x8000), b"old");
        m.write_ram(GuestPhys(0x9000), b"new");
        for (cpu, want) in [(&old, b"old"), (&new, b"new"), (&old, b"old")] {
            let mut buf = [0u8; 3];
            m.read(cpu, GuestLin(0), &mut buf, Privilege::Supervisor).unwrap();
            assert_eq!(&buf, want);
        }
    }

    #[test]
    fn accessed_bits_set_in_a_frame_with_copies_count_as_writes_to_it() {
        let mut m = machine(1);
        let cpu = paged(&m, 0x1000, 0x8000);
        m.track(2);
        m.read(&cpu, GuestLin(0), &mut [0], Privilege::Supervisor).unwrap();
        assert_eq!(m.take_code_writes(), [CodeWrite { at: GuestPhys(0x2000), len: 4 }]);
        assert_eq!(m.take_code_writes(), []);
    }
}
