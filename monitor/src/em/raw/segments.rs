//! The segment cache of the vCPU page: selectors trampolines may load without leaving the world.

use super::*;

impl RawEngine {
    pub(super) fn forget_segment_cache(&mut self) {
        for (i, slot) in self.segment_cache.iter_mut().enumerate() {
            if slot.take().is_some() {
                self.kernel.world.vcpu_write(vp::SEGMENT_CACHE + 16 * i as u32 + 12, 0);
            }
        }
        self.cache_generation = self.kernel.ldt_generation;
        self.iret_key = None;
    }

    /// Tells trampolines to which CS `iret` may return without asking: the one that runs, if loading it again as the
    /// guest's table is now would change nothing.
    pub(super) fn allow_iret(&mut self, cpu: &CpuState, m: &mut Machine) {
        let cs = cpu.seg[seg::CS];
        let key = (cs, cpu.gdtr.base, cpu.gdtr.limit);
        if self.iret_key == Some(key) {
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
        let w = &mut self.kernel.world;
        let Some((at, [a, b, c, d, e, f, g, h])) = descriptor else {
            w.vcpu_write(vp::IRET_CS, vp::IRET_NOWHERE);
            return;
        };
        w.vcpu_write(vp::IRET_DESC_AT, at.0);
        w.vcpu_write(vp::IRET_DESC_LOW, u32::from_le_bytes([a, b, c, d]));
        w.vcpu_write(vp::IRET_DESC_HIGH, u32::from_le_bytes([e, f, g, h]));
        w.vcpu_write(vp::IRET_CS, u32::from(cs.selector));
        self.iret_key = Some(key);
    }

    /// The interpreter has just loaded a segment register of ring 0: lets trampolines load the same selector.
    pub fn cache_segment(&mut self, cpu: &CpuState, m: &mut Machine, which: usize) -> Result<(), RawError> {
        let s = cpu.seg[which];
        let index = usize::from(s.selector >> 3);
        if s.selector & 4 != 0
            || index == 0
            || index >= self.segment_cache.len()
            || !s.present()
            || s.attr.contains(SegAttr::CODE)
            || index * 8 + 7 > usize::from(cpu.gdtr.limit)
        {
            return Ok(());
        }
        let mut bytes = [0u8; 8];
        let at = GuestLin(cpu.gdtr.base.wrapping_add(index as u32 * 8));
        if m.read(cpu, at, &mut bytes, Privilege::Supervisor).is_err() {
            return Ok(());
        }
        let layout = self.layout;
        let host = self.kernel.host_selector(&s, false, &layout)?;
        if self.cache_generation != self.kernel.ldt_generation {
            self.forget_segment_cache();
        }
        let low = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let high = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let base = vp::SEGMENT_CACHE + 16 * index as u32;
        let w = &mut self.kernel.world;
        w.vcpu_write(base, low);
        w.vcpu_write(base + 4, high);
        w.vcpu_write(base + 8, u32::from(host));
        w.vcpu_write(base + 12, 1);
        self.segment_cache[index] = Some(CachedSegment { segment: s, host });
        Ok(())
    }
}
