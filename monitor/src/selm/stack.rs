//! Stack frames as one piece: pushed in a single write after all checks, popped with a single read.

use super::descriptor;
use crate::cpum::{CpuState, SegAttr, Segment, gpr, seg};
use crate::env::{Env, Privilege};
use crate::trap::Trap;
use csam::GuestLin;

/// The most values one frame holds: 31 call-gate parameters, SS:ESP and CS:EIP.
const MAX_ITEMS: usize = 36;

/// `len` bytes (at least 1) at `offset` lie inside the segment (SDM Vol. 3A, 5.3).
#[must_use]
pub(crate) fn within_limit(segment: &Segment, offset: u32, len: u32) -> bool {
    let Some(last) = offset.checked_add(len.wrapping_sub(1)) else {
        // Wraps around 4 GiB: hardware lets a flat segment do that only between, not inside, accesses.
        return false;
    };
    if segment.attr.contains(SegAttr::CODE_OR_DATA | SegAttr::EXPAND_DOWN)
        && !segment.attr.contains(SegAttr::CODE)
    {
        let top = if segment.big() { u32::MAX } else { 0xffff };
        offset > segment.limit && last <= top
    } else {
        last <= segment.limit
    }
}

/// Who accesses memory at a privilege level.
#[must_use]
pub(crate) fn privilege_of(cpl: u8) -> Privilege {
    if cpl == 3 { Privilege::User } else { Privilege::Supervisor }
}

/// A stack to push on or pop from, which need not be the current one yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    /// SS.
    pub(crate) segment: Segment,
    /// The full ESP; on a 16-bit stack only the low half takes part.
    pub(crate) esp: u32,
    /// Whose accesses these are.
    pub(crate) privilege: Privilege,
    /// The error code of the #SS for a limit violation.
    pub(crate) error_code: u32,
}

impl Stack {
    /// The CPU's own stack.
    #[must_use]
    pub(crate) fn current(cpu: &CpuState, error_code: u32) -> Stack {
        Stack {
            segment: cpu.seg[seg::SS],
            esp: cpu.gpr[gpr::ESP],
            privilege: privilege_of(cpu.cpl),
            error_code,
        }
    }

    fn mask(&self) -> u32 {
        if self.segment.big() { u32::MAX } else { 0xffff }
    }

    /// ESP moved by `delta` within the stack's width; the upper half of a 16-bit stack's ESP stays.
    #[must_use]
    pub(crate) fn moved(&self, delta: u32) -> u32 {
        let mask = self.mask();
        self.esp & !mask | self.esp.wrapping_add(delta) & mask
    }

    /// ESP after loading `value` into the stack pointer: all of it, or SP alone on a 16-bit stack. The upper half
    /// then keeps what the inner ring had there, which is what Linux's espfix exists for.
    #[must_use]
    pub(crate) fn replaced(&self, value: u32) -> u32 {
        let mask = self.mask();
        self.esp & !mask | value & mask
    }

    fn linear(&self, offset: u32) -> GuestLin {
        GuestLin(self.segment.base).wrapping_add(offset)
    }

    fn check(&self, offset: u32, len: u32) -> Result<(), Trap> {
        if self.segment.present() && within_limit(&self.segment, offset, len) {
            Ok(())
        } else {
            Err(Trap::ss(self.error_code))
        }
    }

    /// Checks that `frame` can be pushed, without writing.
    pub(crate) fn probe(&self, cpu: &CpuState, env: &mut dyn Env, frame: &Frame) -> Result<(), Trap> {
        self.for_each_piece(frame, |stack, offset, bytes| {
            env.probe_write(cpu, stack.linear(offset), bytes.len() as u32, stack.privilege)
        })
    }

    /// Pushes `frame` and returns the new ESP. On error nothing was written.
    pub(crate) fn push(&self, cpu: &CpuState, env: &mut dyn Env, frame: &Frame) -> Result<u32, Trap> {
        let probed = if self.contiguous(frame.byte_len()) { Ok(()) } else { self.probe(cpu, env, frame) };
        let pushed = probed.and_then(|()| {
            self.for_each_piece(frame, |stack, offset, bytes| {
                env.write(cpu, stack.linear(offset), bytes, stack.privilege)
            })
        });
        match pushed {
            Ok(()) => Ok(self.moved(frame.byte_len().wrapping_neg())),
            // A processor pushes from the top: the first push that faults decides CR2.
            Err(trap) if trap.cr2.is_some() => Err(self.first_fault(cpu, env, frame).err().unwrap_or(trap)),
            Err(trap) => Err(trap),
        }
    }

    /// The page fault of the first push that has one.
    fn first_fault(&self, cpu: &CpuState, env: &mut dyn Env, frame: &Frame) -> Result<(), Trap> {
        let size = u32::from(frame.size);
        for n in 1..=frame.count as u32 {
            let offset = self.esp.wrapping_sub(n * size) & self.mask();
            env.probe_write(cpu, self.linear(offset), size, self.privilege)?;
        }
        Ok(())
    }

    /// A frame of `len` bytes below ESP does not wrap around the stack's width.
    fn contiguous(&self, len: u32) -> bool {
        let low = self.esp.wrapping_sub(len) & self.mask();
        low.checked_add(len.saturating_sub(1)).is_some_and(|last| last <= self.mask())
    }

    fn for_each_piece(
        &self,
        frame: &Frame,
        mut act: impl FnMut(&Stack, u32, &[u8]) -> Result<(), Trap>,
    ) -> Result<(), Trap> {
        let len = frame.byte_len();
        if len == 0 {
            return Ok(());
        }
        let low = self.esp.wrapping_sub(len) & self.mask();
        let (bytes, _) = frame.bytes();
        let bytes = &bytes[..len as usize];
        if self.contiguous(len) {
            self.check(low, len)?;
            return act(self, low, bytes);
        }
        let size = u32::from(frame.size);
        let offsets = (0..).map(|i: u32| low.wrapping_add(i * size) & self.mask());
        for (offset, _) in offsets.clone().zip(bytes.chunks(size as usize)) {
            self.check(offset, size)?;
        }
        for (offset, item) in offsets.zip(bytes.chunks(size as usize)) {
            act(self, offset, item)?;
        }
        Ok(())
    }

    /// Reads `N` values of `size` bytes from the top of the stack, `skip` bytes above ESP, without moving it.
    pub(crate) fn peek<const N: usize>(
        &self,
        cpu: &CpuState,
        env: &mut dyn Env,
        size: u8,
        skip: u32,
    ) -> Result<[u32; N], Trap> {
        let mut values = [0u32; N];
        self.peek_into(cpu, env, size, skip, &mut values)?;
        Ok(values)
    }

    /// [`Stack::peek`] for a number of values known only at run time.
    pub(crate) fn peek_into(
        &self,
        cpu: &CpuState,
        env: &mut dyn Env,
        size: u8,
        skip: u32,
        values: &mut [u32],
    ) -> Result<(), Trap> {
        let mask = self.mask();
        let width = u32::from(size);
        let first = self.esp.wrapping_add(skip) & mask;
        let len = width * values.len() as u32;
        let mut bytes = [0u8; MAX_ITEMS * 4];
        if let Some(bytes) = bytes.get_mut(..len as usize)
            && len > 0
            && first.checked_add(len - 1).is_some_and(|last| last <= mask)
            && self.check(first, len).is_ok()
        {
            env.read(cpu, self.linear(first), bytes, self.privilege)?;
            for (value, item) in values.iter_mut().zip(bytes.chunks(usize::from(size))) {
                let mut wide = [0u8; 4];
                wide[..usize::from(size)].copy_from_slice(item);
                *value = u32::from_le_bytes(wide);
            }
            return Ok(());
        }
        for (i, value) in (0u32..).zip(values.iter_mut()) {
            let offset = self.esp.wrapping_add(skip).wrapping_add(i * width) & mask;
            self.check(offset, width)?;
            let mut bytes = [0u8; 4];
            env.read(cpu, self.linear(offset), &mut bytes[..usize::from(size)], self.privilege)?;
            *value = u32::from_le_bytes(bytes);
        }
        Ok(())
    }
}

/// Values to push, in the order of the pushes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    size: u8,
    count: usize,
    items: [u32; MAX_ITEMS],
}

impl Frame {
    /// An empty frame of 2- or 4-byte items.
    #[must_use]
    pub(crate) fn new(size: u8) -> Frame {
        Frame { size, count: 0, items: [0; MAX_ITEMS] }
    }
    /// Adds a push. A frame that is full ignores it; no caller has more than [`MAX_ITEMS`].
    pub(crate) fn push(&mut self, value: u32) {
        debug_assert!(self.count < MAX_ITEMS);
        if let Some(slot) = self.items.get_mut(self.count) {
            *slot = value;
            self.count += 1;
        }
    }
    /// Adds several pushes.
    pub(crate) fn extend(&mut self, values: &[u32]) {
        for &v in values {
            self.push(v);
        }
    }
    fn byte_len(&self) -> u32 {
        self.count as u32 * u32::from(self.size)
    }
    /// The frame as it lies in memory, lowest address first, and its length.
    fn bytes(&self) -> ([u8; MAX_ITEMS * 4], usize) {
        let mut out = [0u8; MAX_ITEMS * 4];
        let size = usize::from(self.size);
        let pushed = self.items[..self.count].iter().rev();
        for (slot, item) in out.chunks_mut(size).zip(pushed) {
            slot.copy_from_slice(&item.to_le_bytes()[..size]);
        }
        (out, self.count * size)
    }
}

/// The stack for privilege level `new_cpl` (0..=2) out of the current TSS, fully checked: the first half of every
/// transfer inward (SDM Vol. 2 CALL "more privilege", INT n "inter privilege level"). `ext` is 0 or 1.
pub(crate) fn inner_stack(cpu: &CpuState, env: &mut dyn Env, new_cpl: u8, ext: u32) -> Result<Stack, Trap> {
    let tr_error = Trap::ts(descriptor::code(cpu.tr.selector) | ext);
    if !cpu.tr.present() {
        return Err(tr_error);
    }
    let wide = cpu.tr.attr.type_bits() & 8 != 0;
    let (offset, last) = if wide {
        (u32::from(new_cpl) * 8 + 4, u32::from(new_cpl) * 8 + 4 + 5)
    } else {
        (u32::from(new_cpl) * 4 + 2, u32::from(new_cpl) * 4 + 2 + 3)
    };
    if last > cpu.tr.limit {
        return Err(tr_error);
    }
    let at = GuestLin(cpu.tr.base).wrapping_add(offset);
    let (esp, selector) = if wide {
        let mut b = [0u8; 6];
        env.read(cpu, at, &mut b, Privilege::Supervisor)?;
        (u32::from_le_bytes([b[0], b[1], b[2], b[3]]), u16::from_le_bytes([b[4], b[5]]))
    } else {
        let mut b = [0u8; 4];
        env.read(cpu, at, &mut b, Privilege::Supervisor)?;
        (u32::from(u16::from_le_bytes([b[0], b[1]])), u16::from_le_bytes([b[2], b[3]]))
    };
    let blame = |code: u32| Trap::ts(code | ext);
    let found = descriptor::fetch_or(cpu, env, selector, blame)?;
    let error_code = descriptor::code(selector) | ext;
    if descriptor::rpl(selector) != new_cpl || found.dpl() != new_cpl || !found.is_writable_data() {
        return Err(Trap::ts(error_code));
    }
    if !found.present() {
        return Err(Trap::ss(error_code));
    }
    descriptor::set_accessed(cpu, env, selector, found)?;
    Ok(Stack { segment: found.segment(selector), esp, privilege: Privilege::Supervisor, error_code })
}
