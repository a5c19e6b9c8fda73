//! What the vCPU page says of segments: selectors trampolines may load and code they may return to without leaving the
//! world.

use super::*;

/// What a vCPU page was last told of the code `iret` may return to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Published {
    cs: Segment,
    gdt: (u32, u16),
}

impl RawEngine {
    pub(super) fn forget_segment_cache(&mut self) {
        self.cache_version += 1;
        for slot in &mut self.segment_cache {
            if slot.entry.take().is_some() {
                slot.version = self.cache_version;
            }
        }
        self.cache_generation = self.descriptors.generation;
    }

    /// Brings the segment cache in a ring-0 world's vCPU page up to date.
    pub(super) fn publish_segment_cache(&mut self, number: usize) -> Result<(), WorldError> {
        if self.cache_generation != self.descriptors.generation {
            self.forget_segment_cache();
        }
        let space = &mut self.kernels[number];
        if space.cache_version == self.cache_version {
            return Ok(());
        }
        for (i, slot) in self.segment_cache.iter().enumerate() {
            if slot.version <= space.cache_version {
                continue;
            }
            let base = vp::SEGMENT_CACHE + 16 * i as u32;
            let Some(c) = &slot.entry else {
                space.world.vcpu_write(base + 12, 0);
                continue;
            };
            space.install(&self.descriptors, c.host)?;
            space.install(&self.descriptors, c.host_ring3)?;
            let w = &mut space.world;
            w.vcpu_write(base, c.bytes[0]);
            w.vcpu_write(base + 4, c.bytes[1]);
            w.vcpu_write(base + 8, u32::from(c.host));
            w.vcpu_write(base + 12, 1);
        }
        space.cache_version = self.cache_version;
        Ok(())
    }

    /// Tells trampolines to which CS `iret` may return without asking: the one that runs, if loading it again as the
    /// guest's table is now would change nothing.
    pub(super) fn publish_code_segment(&mut self, number: usize, cpu: &CpuState, m: &mut Machine) {
        let cs = cpu.seg[seg::CS];
        let now = Published { cs, gdt: (cpu.gdtr.base, cpu.gdtr.limit) };
        if self.kernels[number].published == Some(now) {
            return;
        }
        let flat = cs.base == 0 && cs.limit == u32::MAX && cs.selector & 7 == 0;
        let descriptor = selm::descriptor::address(cpu, cs.selector).filter(|_| flat).and_then(|at| {
            let mut bytes = [0u8; 8];
            m.read(cpu, at, &mut bytes, Privilege::Supervisor).ok()?;
            let now = selm::descriptor::Descriptor::from_bytes(bytes).segment(cs.selector);
            let accessed = bytes[5] & 1 != 0; // else loading it would write the table
            (accessed && now == cs).then_some((at, bytes))
        });
        let space = &mut self.kernels[number];
        let w = &mut space.world;
        let Some((at, [a, b, c, d, e, f, g, h])) = descriptor else {
            w.vcpu_write(vp::IRET_CS, vp::IRET_NOWHERE);
            space.published = None;
            return;
        };
        w.vcpu_write(vp::IRET_DESC_AT, at.0);
        w.vcpu_write(vp::IRET_DESC_LOW, u32::from_le_bytes([a, b, c, d]));
        w.vcpu_write(vp::IRET_DESC_HIGH, u32::from_le_bytes([e, f, g, h]));
        w.vcpu_write(vp::IRET_CS, u32::from(cs.selector));
        space.published = Some(now);
    }

    /// The interpreter has just loaded a segment register of ring 0: lets trampolines load the same selector.
    pub fn cache_segment(&mut self, cpu: &CpuState, m: &mut Machine, which: usize) {
        let s = cpu.seg[which];
        let index = usize::from(s.selector >> 3);
        if s.selector & 4 != 0
            || index == 0
            || index >= self.segment_cache.len()
            || !s.present()
            || s.attr.contains(SegAttr::CODE)
            || index * 8 + 7 > usize::from(cpu.gdtr.limit)
        {
            return;
        }
        let mut bytes = [0u8; 8];
        let at = GuestLin(cpu.gdtr.base.wrapping_add(index as u32 * 8));
        if m.read(cpu, at, &mut bytes, Privilege::Supervisor).is_err() {
            return;
        }
        let layout = self.layout;
        let host = self.descriptors.selector(&s, false, &layout, None);
        let host_ring3 = self.ring3_selector(&s);
        if self.cache_generation != self.descriptors.generation {
            self.forget_segment_cache();
            return;
        }
        let [a, b, c, d, e, f, g, h] = bytes;
        let bytes = [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])];
        self.cache_version += 1;
        self.segment_cache[index] = CacheSlot {
            version: self.cache_version,
            entry: Some(CachedSegment { segment: s, host, host_ring3, bytes }),
        };
    }

    /// The host selector with which ring 3 may use a data segment in a joint world; 0: it may not.
    pub(super) fn ring3_selector(&mut self, s: &Segment) -> u16 {
        let Some(boundary) = self.boundary else { return 0 };
        if s.present() && s.attr.dpl() == 3 {
            self.descriptors.selector(s, false, &self.layout, Some(boundary))
        } else {
            0
        }
    }

    /// The segment behind a selector a trampoline may have loaded, if the hardware holds what it stands for.
    pub(super) fn segment_loaded(&mut self, old: Segment, selector: u16, host: u16) -> Option<Segment> {
        if selector == old.selector
            && (self.descriptors.selector(&old, false, &self.layout, None) == host
                || host == self.ring3_selector(&old))
        {
            return Some(old);
        }
        if selector & !3 == 0 && host & !3 == 0 {
            return Some(Segment { selector, ..Segment::default() });
        }
        let cached = self.segment_cache.get(usize::from(selector >> 3)).and_then(|s| s.entry.as_ref());
        match cached {
            Some(c) if selector & 4 == 0 && (c.host == host || c.host_ring3 == host) => {
                Some(Segment { selector, ..c.segment })
            }
            _ => None,
        }
    }
}
