//! What the vCPU page says of segments: selectors trampolines may load and code they may return to without leaving the
//! world.

use super::*;
use host_driver_shim::world::{DeliveryRules, Reflected, Table, UsersRules};

/// A segment trampolines may load.
#[derive(Clone, Copy)]
pub(super) struct CachedSegment {
    segment: Segment,
    /// Host selector for ring 0.
    host: u16,
    /// Host selector for ring 3 of a joint world; 0: ring 3 may not have it.
    host_ring3: u16,
    /// The guest's descriptor, low and high half.
    bytes: [u32; 2],
}

impl CachedSegment {
    /// Host selector for ring 3; 0: ring 3 may not have it.
    pub(super) fn for_ring3(&self) -> u16 {
        self.host_ring3
    }
}

/// The segment cache of one vCPU page. Each world has its own: thread-local storage has the same selector in every
/// process and another descriptor in each.
#[derive(Clone)]
pub struct SegmentCache {
    entries: Vec<Option<CachedSegment>>,
    /// Entries the vCPU page does not have yet.
    changed: Vec<u8>,
    /// Generation of the host selectors in it.
    generation: u32,
}

impl Default for SegmentCache {
    fn default() -> Self {
        SegmentCache {
            entries: vec![None; vp::SEGMENT_CACHE_LEN as usize],
            changed: Vec::new(),
            generation: 0,
        }
    }
}

impl SegmentCache {
    fn set(&mut self, index: usize, entry: CachedSegment) {
        self.entries[index] = Some(entry);
        self.changed.push(index as u8);
    }

    /// The segments in it.
    pub(super) fn entries(&self) -> impl Iterator<Item = &CachedSegment> {
        self.entries.iter().flatten()
    }

    fn forget(&mut self) {
        for (i, entry) in self.entries.iter_mut().enumerate() {
            if entry.take().is_some() {
                self.changed.push(i as u8);
            }
        }
    }

    /// The same for the vCPU page of a new world.
    pub(super) fn for_new_world(&self) -> SegmentCache {
        let changed =
            (0..self.entries.len() as u8).filter(|i| self.entries[usize::from(*i)].is_some()).collect();
        SegmentCache { changed, ..self.clone() }
    }
}

/// What is known of the guest's ring transitions: the segments its rings run with and the vector of its system calls.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Transitions {
    pub kernel_cs: Segment,
    pub user_cs: Segment,
    pub user_ss: Segment,
    pub vector: Option<u8>,
}

/// What a vCPU page was last told of transitions, and on what grounds: the same grounds, the same words. Trampolines
/// compare the guest's tables with what they were then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Published {
    transitions: Transitions,
    gdt: (u32, u16),
    idt: (u32, u16),
    tss: u32,
    cr0: u32,
    cr4: u32,
    breakpoints: bool,
    boundary: Option<Boundary>,
    tainted: bool,
    generation: u32,
    /// Vector of the timer's interrupt.
    tick: u8,
}

impl Published {
    /// The same, as if nothing kept ring 3 out of the world it is for.
    pub(super) fn but_for_taints(self) -> Published {
        Published { tainted: false, ..self }
    }
}

/// The eight bytes of a descriptor table entry that trampolines compare.
struct Expected {
    at: u32,
    low: u32,
    high: u32,
}

struct UserSegments {
    cs: Expected,
    cs_host: u16,
    ss: Expected,
    ss_host: u16,
}

/// A 32-bit interrupt or trap gate to the running ring-0 code.
struct Gate {
    entry: Expected,
    dpl: u8,
    target: u32,
    if_mask: u32,
}

/// The stack on which ring 0 begins when it is entered from ring 3.
struct EntryStack {
    descriptor: Expected,
    segment: Segment,
    host: u16,
}

fn entry(cpu: &CpuState, m: &mut Machine, at: GuestLin) -> Option<(Expected, [u8; 8])> {
    let mut bytes = [0u8; 8];
    m.read(cpu, at, &mut bytes, Privilege::Supervisor).ok()?;
    let [a, b, c, d, e, f, g, h] = bytes;
    let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    Some((Expected { at: at.0, low, high }, bytes))
}

/// The descriptor of a segment that is loaded, if loading it again would change nothing, not even the table.
fn descriptor(cpu: &CpuState, m: &mut Machine, s: &Segment) -> Option<Expected> {
    let (expected, bytes) = entry(cpu, m, selm::descriptor::address(cpu, s.selector)?)?;
    let now = selm::descriptor::Descriptor::from_bytes(bytes).segment(s.selector);
    let accessed = bytes[5] & 1 != 0;
    (accessed && now == *s).then_some(expected)
}

/// The vector of the page fault.
const PAGE_FAULT: u8 = 14;
/// Exceptions of ring 3 that worlds may send to the guest's handlers: #DE and `int3`. What raises others the interpreter must
/// have seen: it knows what the guest has there, and has.
const REFLECTED: [Reflected; 2] = [Reflected::Fault(0), Reflected::Trap(3)];
/// EFLAGS.RF.
const RF: u32 = 1 << 16;

impl RawEngine {
    pub(super) fn forget_segment_cache(&mut self) {
        for space in &mut self.kernels {
            space.cache.forget();
        }
    }

    /// Brings the segment cache in a ring-0 world's vCPU page up to date.
    pub(super) fn publish_segment_cache(&mut self, number: usize) -> Result<(), WorldError> {
        let space = &mut self.kernels[number];
        if space.cache.generation != self.descriptors.generation {
            space.cache.forget();
            space.cache.generation = self.descriptors.generation;
        }
        while let Some(i) = space.cache.changed.pop() {
            let base = vp::SEGMENT_CACHE + 16 * u32::from(i);
            let Some(c) = space.cache.entries[usize::from(i)] else {
                space.world.vcpu_write(base + 12, 0);
                continue;
            };
            space.install(&self.descriptors, c.host)?;
            space.install(&self.descriptors, c.host_ring3)?;
            let w = &mut space.world;
            w.vcpu_write(base, c.bytes[0]);
            w.vcpu_write(base + 4, c.bytes[1]);
            w.vcpu_write(base + 8, u32::from(c.host));
            w.vcpu_write(base + 12, 1 | u32::from(c.host_ring3) << 16);
        }
        Ok(())
    }

    /// The host selector of ring 3's code in joint worlds; 0 if there is none.
    pub(super) fn user_code_selector(&mut self) -> u16 {
        let user_cs = self.transitions.user_cs;
        self.boundary.map_or(0, |b| {
            self.descriptors.selector(&user_cs, true, &self.layout, For::Ring3 { below: b.limit() })
        })
    }

    /// Ring 3 makes system calls by this vector.
    pub fn note_system_call(&mut self, vector: u8) {
        self.transitions.vector = Some(vector);
    }

    /// Ring 3 runs with these segments.
    pub(super) fn note_user_segments(&mut self, cpu: &CpuState) {
        self.transitions.user_cs = cpu.seg[seg::CS];
        self.transitions.user_ss = cpu.seg[seg::SS];
    }

    /// A transition was left to the monitor: something is not as it was when the worlds were told.
    pub(super) fn retract_transitions(&mut self, number: usize) {
        self.kernels[number].published = None;
    }

    /// Tells trampolines which ring transitions they may do: `iret` to the code that runs (`IRET_*`), and in a joint
    /// world `iret` to ring 3 (`USER_*`) and its system calls (`GATE_*`).
    pub(super) fn publish_transitions(
        &mut self,
        number: usize,
        cpu: &CpuState,
        m: &mut Machine,
    ) -> Result<(), WorldError> {
        if cpu.cpl == 0 {
            self.transitions.kernel_cs = cpu.seg[seg::CS];
        } else {
            self.note_user_segments(cpu);
        }
        let joint = matches!(self.kernels[number].role, Role::Joint { .. });
        let apart = self.boundary == Some(Boundary::Worlds);
        let grounds = Published {
            transitions: self.transitions,
            gdt: (cpu.gdtr.base, cpu.gdtr.limit),
            idt: (cpu.idtr.base, cpu.idtr.limit),
            tss: cpu.tr.base,
            cr0: cpu.cr0 & (cr0::TS | cr0::EM | cr0::WP),
            cr4: cpu.cr4 & cr4::TSD,
            breakpoints: cpu.dr[7] & 0xff != 0,
            boundary: self.boundary.filter(|_| joint || apart),
            tainted: self.kernels[number].tainted,
            generation: self.descriptors.generation,
            tick: m.devices.pic.master.vector_base(),
        };
        if self.kernels[number].published == Some(grounds) {
            return Ok(());
        }
        let kernel_cs = self.transitions.kernel_cs;
        let flat_kernel = kernel_cs.is_flat() && kernel_cs.present() && kernel_cs.selector & 7 == 0;
        let kernel = if flat_kernel { descriptor(cpu, m, &kernel_cs) } else { None };
        let user = grounds
            .boundary
            .filter(|_| !grounds.tainted && grounds.cr0 == cr0::WP && grounds.cr4 == 0 && kernel.is_some());
        let user = user.and_then(|boundary| self.user_segments(boundary, cpu, m));
        let stack = user.as_ref().and_then(|_| self.entry_stack(cpu, m));
        let vector = self.transitions.vector;
        let call = stack
            .as_ref()
            .and_then(|_| Some((vector?, self.gate(cpu, m, vector?).filter(|gate| gate.dpl == 3)?)));
        let page_fault = kernel.as_ref().and_then(|_| self.gate(cpu, m, PAGE_FAULT));
        let tick = kernel.as_ref().and_then(|_| self.gate(cpu, m, grounds.tick));
        let exceptions = REFLECTED.map(|kind| {
            let (vector, dpl) = match kind {
                Reflected::Trap(vector) => (vector, 3),
                Reflected::Fault(vector) | Reflected::Int(vector) => (vector, 0),
            };
            let gate = stack.as_ref().and_then(|_| self.gate(cpu, m, vector));
            (kind, gate.filter(|gate| gate.dpl >= dpl))
        });
        let mut host = Vec::new();
        if let Some(u) = &user {
            host.extend([u.cs_host, u.ss_host]);
        }
        host.extend(stack.as_ref().map(|s| s.host));
        if self.descriptors.generation != grounds.generation {
            // The numbering of descriptors started afresh on the way: at the next entry, then.
            return Ok(());
        }
        let space = &mut self.kernels[number];
        for selector in host {
            space.install(&self.descriptors, selector)?;
        }
        let w = &mut space.world;
        let mut put = |words: &[(u32, u32)]| words.iter().for_each(|&(at, value)| w.vcpu_write(at, value));
        put(&[(vp::IRET_REFUSES, if grounds.breakpoints { RF } else { 0 }), (vp::GATE_READY, 0)]);
        match &kernel {
            Some(d) => put(&[
                (vp::IRET_DESC_AT, d.at),
                (vp::IRET_DESC_LOW, d.low),
                (vp::IRET_DESC_HIGH, d.high),
                (vp::IRET_CS, u32::from(kernel_cs.selector)),
            ]),
            None => put(&[(vp::IRET_CS, vp::IRET_NOWHERE)]),
        }
        // Ring 3 of another world is entered by the runtime.
        match user.as_ref().filter(|_| !apart) {
            Some(u) => put(&[
                (vp::USER_CS_DESC_AT, u.cs.at),
                (vp::USER_CS_DESC_LOW, u.cs.low),
                (vp::USER_CS_DESC_HIGH, u.cs.high),
                (vp::USER_CS_HOST + 4, u32::from(u.cs_host)),
                (vp::USER_SS_DESC_AT, u.ss.at),
                (vp::USER_SS_DESC_LOW, u.ss.low),
                (vp::USER_SS_DESC_HIGH, u.ss.high),
                (vp::USER_SS_HOST + 4, u32::from(u.ss_host)),
                (vp::USER_FRAME + 4, u32::from(u.cs_host)),
                (vp::USER_FRAME + 16, u32::from(u.ss_host)),
                (vp::USER_SS, u32::from(self.transitions.user_ss.selector)),
                (vp::USER_CS, u32::from(self.transitions.user_cs.selector)),
            ]),
            None => put(&[(vp::USER_CS, vp::IRET_NOWHERE)]),
        }
        if let Some(stack) = &stack {
            put(&[
                (vp::TSS_ESP0_AT, cpu.tr.base.wrapping_add(4)),
                (vp::KERNEL_SS, u32::from(stack.segment.selector)),
                (vp::KERNEL_SS_DESC_AT, stack.descriptor.at),
                (vp::KERNEL_SS_DESC_LOW, stack.descriptor.low),
                (vp::KERNEL_SS_DESC_HIGH, stack.descriptor.high),
                (vp::KERNEL_SS_HOST + 4, u32::from(stack.host)),
                (vp::KERNEL_CS_HOST + 4, u32::from(self.descriptors.code_ring0())),
            ]);
            self.entry_ss = stack.segment;
        }
        if let Some((vector, gate)) = call.as_ref().filter(|_| !apart) {
            put(&[
                (vp::GATE_VECTOR, u32::from(*vector)),
                (vp::GATE_AT, gate.entry.at),
                (vp::GATE_LOW, gate.entry.low),
                (vp::GATE_HIGH, gate.entry.high),
                (vp::GATE_IF_MASK, gate.if_mask),
                (vp::GATE_CS, u32::from(kernel_cs.selector)),
                (vp::GATE_TARGET, gate.target),
                (vp::GATE_READY, 1),
            ]);
        }
        let table = |e: &Expected| Table { at: e.at, low: e.low, high: e.high };
        let cs_host = u32::from(self.descriptors.code_ring0());
        let rules = |gate: Option<&Gate>| {
            let (Some(gate), Some(cs)) = (gate, &kernel) else { return DeliveryRules::default() };
            let rules = DeliveryRules {
                ready: 1,
                gate: table(&gate.entry),
                target: gate.target,
                if_mask: gate.if_mask,
                cs: u32::from(kernel_cs.selector),
                cs_descriptor: table(cs),
                cs_host,
                ..DeliveryRules::default()
            };
            let (Some(stack), Some(user)) = (&stack, &user) else { return rules };
            DeliveryRules {
                from_ring3: 1,
                tss_esp0: cpu.tr.base.wrapping_add(4),
                ss: u32::from(stack.segment.selector),
                ss_descriptor: table(&stack.descriptor),
                ss_host: u32::from(stack.host),
                user_ss_host: u32::from(user.ss_host),
                ..rules
            }
        };
        w.set_delivery_rules(&rules(page_fault.as_ref()));
        w.set_tick_rules(&rules(tick.as_ref()));
        self.users_rules = match (&user, &call) {
            (Some(user), Some((vector, gate))) if apart => UsersRules {
                cell: 0,
                vector: u32::from(*vector),
                gate: rules(Some(gate)),
                cs: u32::from(self.transitions.user_cs.selector),
                cs_descriptor: table(&user.cs),
                cs_host: u32::from(user.cs_host),
                ss: u32::from(self.transitions.user_ss.selector),
                ss_descriptor: table(&user.ss),
                ss_host: u32::from(user.ss_host),
            },
            _ => UsersRules::default(),
        };
        let call = call.as_ref().map(|(vector, gate)| (Reflected::Int(*vector), rules(Some(gate))));
        let others = exceptions.iter().map(|(kind, gate)| (*kind, rules(gate.as_ref())));
        w.set_reflections(&call.into_iter().chain(others).collect::<Vec<_>>());
        self.kernels[number].published = Some(grounds);
        Ok(())
    }

    /// What `iret` to ring 3 needs, if it may be done in line.
    fn user_segments(&mut self, boundary: Boundary, cpu: &CpuState, m: &mut Machine) -> Option<UserSegments> {
        let Transitions { user_cs, user_ss, .. } = self.transitions;
        let flat = |s: &Segment| s.is_flat() && s.big() && s.present() && s.selector & 7 == 3;
        if !flat(&user_cs) || !flat(&user_ss) {
            return None;
        }
        Some(UserSegments {
            cs: descriptor(cpu, m, &user_cs)?,
            cs_host: self.descriptors.selector(
                &user_cs,
                true,
                &self.layout,
                For::Ring3 { below: boundary.limit() },
            ),
            ss: descriptor(cpu, m, &user_ss)?,
            ss_host: self.descriptors.selector(
                &user_ss,
                false,
                &self.layout,
                For::Ring3 { below: boundary.limit() },
            ),
        })
    }

    /// The gate of a vector, if it is one that worlds can go through by themselves: 32 bits, to the running ring-0 code.
    fn gate(&self, cpu: &CpuState, m: &mut Machine, vector: u8) -> Option<Gate> {
        const GATE_END: u32 = 7;
        let index = u32::from(vector) * 8;
        if index + GATE_END > u32::from(cpu.idtr.limit) {
            return None;
        }
        let (entry, bytes) = entry(cpu, m, GuestLin(cpu.idtr.base.wrapping_add(index)))?;
        let d = selm::descriptor::Descriptor::from_bytes(bytes);
        let if_mask = match d.system_type() {
            Some(selm::descriptor::system_type::INTERRUPT_GATE32) => 0,
            Some(selm::descriptor::system_type::TRAP_GATE32) => u32::MAX,
            _ => return None,
        };
        let ours = d.present() && d.gate_selector() & !3 == self.transitions.kernel_cs.selector;
        ours.then(|| Gate { entry, dpl: d.dpl(), target: d.gate_offset(), if_mask })
    }

    /// The stack of ring 0 that a 32-bit TSS names, if it is flat.
    fn entry_stack(&mut self, cpu: &CpuState, m: &mut Machine) -> Option<EntryStack> {
        const TSS32_END: u32 = 0x67;
        // TSS types 9 and 11 are the 32-bit ones (SDM Vol. 3A, table 3-2).
        if cpu.tr.limit < TSS32_END || !matches!(cpu.tr.attr.type_bits(), 9 | 11) {
            return None;
        }
        let mut word = [0u8; 2];
        m.read(cpu, GuestLin(cpu.tr.base.wrapping_add(8)), &mut word, Privilege::Supervisor).ok()?;
        let selector = u16::from_le_bytes(word);
        if selector & 7 != 0 || selector == 0 {
            return None;
        }
        let (descriptor, bytes) = entry(cpu, m, selm::descriptor::address(cpu, selector)?)?;
        let d = selm::descriptor::Descriptor::from_bytes(bytes);
        let segment = d.segment(selector);
        let accessed = bytes[5] & 1 != 0;
        if !accessed || !d.present() || !d.is_writable_data() || d.dpl() != 0 {
            return None;
        }
        if !segment.is_flat() || !segment.big() {
            return None;
        }
        let host = self.descriptors.selector(&segment, false, &self.layout, For::Ring0);
        Some(EntryStack { descriptor, segment, host })
    }

    /// The interpreter has just loaded a segment register of ring 0: lets trampolines load the same selector.
    pub fn cache_segment(&mut self, cpu: &CpuState, m: &mut Machine, which: usize) {
        let s = cpu.seg[which];
        let index = usize::from(s.selector >> 3);
        if s.selector & 4 != 0
            || index == 0
            || index >= vp::SEGMENT_CACHE_LEN as usize
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
        let host = self.descriptors.selector(&s, false, &layout, For::Ring0);
        let host_ring3 = self.ring3_selector(&s);
        let [a, b, c, d, e, f, g, h] = bytes;
        let bytes = [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])];
        let number = self.known_joint_space(cpu.cr3).unwrap_or(0);
        let cache = &mut self.kernels[number].cache;
        if cache.generation == self.descriptors.generation {
            cache.set(index, CachedSegment { segment: s, host, host_ring3, bytes });
        }
    }

    /// The host selector of a data segment for ring 3 in a joint world; 0 if a return to ring 3 makes it null.
    pub(super) fn ring3_selector(&mut self, s: &Segment) -> u16 {
        let Some(boundary) = self.boundary else { return 0 };
        if s.present() && s.attr.dpl() == 3 {
            self.descriptors.selector(s, false, &self.layout, For::Ring3 { below: boundary.limit() })
        } else {
            0
        }
    }

    /// The segment behind a selector a trampoline may have loaded, if the hardware holds what it stands for.
    pub(super) fn segment_loaded(
        &mut self,
        number: usize,
        old: Segment,
        selector: u16,
        host: u16,
    ) -> Option<Segment> {
        if selector == old.selector
            && (self.descriptors.selector(&old, false, &self.layout, For::Ring0) == host
                || host == self.ring3_selector(&old))
        {
            return Some(old);
        }
        if selector & !3 == 0 && host & !3 == 0 {
            return Some(Segment { selector, ..Segment::default() });
        }
        // Perhaps it was loaded in a world that has handed over since.
        let mut caches =
            std::iter::once(number).chain(self.ran.iter().copied()).map(|i| &self.kernels[i].cache.entries);
        caches.find_map(|entries| {
            let c = entries.get(usize::from(selector >> 3)).and_then(Option::as_ref)?;
            let loaded = selector & 4 == 0 && (c.host == host || c.host_ring3 == host);
            loaded.then_some(Segment { selector, ..c.segment })
        })
    }
}
