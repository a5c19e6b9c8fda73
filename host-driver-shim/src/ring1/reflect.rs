//! What the monitor needs to send `int n` and plain exceptions of ring 3 to the guest's handler by itself ([`Reflect`]).
//!
//! It is part of the tables page, read-only in every world: the host writes it while the vCPU stands still. The assembly
//! that goes by it is in `monitor.rs`; what it does is what the world's side of `raw` does (`raw/rc_deliver.rs`), without
//! walking the guest's page tables: it reads and writes guest memory through the world's own mappings, and where one is
//! missing or says no, the host is asked as ever, with nothing changed.

use std::mem::size_of;

use super::monitor::{self, Descriptor};
use crate::raw::rc_deliver::{FIXED, IF, RF};
use crate::world::{DeliveryRules, Reflected, Table};

/// Bytes of the frame that a gate to ring 0 pushes on ring 0's stack, without an error code.
pub(super) const GUEST_FRAME: u32 = 20;
/// `int n` with a byte for n.
const INT: u32 = 0xcd;

/// How many events there can be.
pub(super) const EVENTS: usize = 3;
/// No vector.
const NOTHING: u32 = u32::MAX;

/// An event the monitor may send to its handler.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct Event {
    /// The vector it comes by: 13 for `int n`.
    pub(super) vector: u32,
    /// The error code it comes with: 8 n + 2 for `int n`.
    pub(super) error: u32,
    /// The two bytes of `int n`; 0: what the instruction is does not matter.
    pub(super) instruction: u32,
    /// So many bytes further on the guest is to go on.
    pub(super) behind: u32,
    /// What its EFLAGS have set in the frame: bit 1, IF, and RF for a fault.
    pub(super) flags: u32,
    /// The guest's gate.
    pub(super) gate: Table,
    /// EIP of the handler.
    pub(super) target: u32,
    /// The new virtual IF is the old one and this.
    pub(super) if_mask: u32,
}

/// Words in the tables page. Addresses in it are guest linear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct Reflect {
    /// The host selector of guest data as flat ring 0 sees it: SS of the handlers.
    pub(super) ss_host: u32,
    /// Its base. What the world has at an address is at that address less this.
    pub(super) base: u32,
    /// The vCPU page, in that segment.
    pub(super) vcpu: u32,
    /// The host selector SS must hold in ring 3.
    pub(super) user_ss_host: u32,
    /// The handlers' CS and SS: the guest's descriptors.
    pub(super) cs_descriptor: Table,
    pub(super) ss_descriptor: Table,
    /// Where ESP0 is; SS0 is the word at +4.
    pub(super) tss_esp0: u32,
    /// The highest ESP a handler may begin with: behind it the monitor's own stack might be.
    pub(super) stack_last: u32,
    /// What SS0 must be.
    pub(super) ss: u32,
    /// The handlers' CS as the guest sees it.
    pub(super) cs: u32,
    pub(super) events: [Event; EVENTS],
}

const EVENT_WORDS: usize = size_of::<Event>() / 4;
pub(super) const REFLECT_WORDS: usize = size_of::<Reflect>() / 4;

impl Event {
    const NONE: Event = Event {
        vector: NOTHING,
        error: 0,
        instruction: 0,
        behind: 0,
        flags: 0,
        gate: Table { at: 0, low: 0, high: 0 },
        target: 0,
        if_mask: 0,
    };

    fn new(kind: Reflected, rules: &DeliveryRules) -> Event {
        let DeliveryRules { gate, target, if_mask, .. } = *rules;
        let plain = Event { flags: FIXED | IF, gate, target, if_mask, ..Event::NONE };
        match kind {
            Reflected::Int(n) => Event {
                vector: 13,
                error: u32::from(n) << 3 | 2,
                instruction: INT | u32::from(n) << 8,
                behind: 2,
                ..plain
            },
            Reflected::Fault(vector) => Event { vector: u32::from(vector), flags: plain.flags | RF, ..plain },
            Reflected::Trap(vector) => Event { vector: u32::from(vector), ..plain },
        }
    }

    fn words(&self) -> [u32; EVENT_WORDS] {
        let Event { vector, error, instruction, behind, flags, gate, target, if_mask } = *self;
        [vector, error, instruction, behind, flags, gate.at, gate.low, gate.high, target, if_mask]
    }
}

impl Reflect {
    /// The monitor is to do nothing by itself.
    pub(super) const NONE: Reflect = Reflect {
        ss_host: 0,
        base: 0,
        vcpu: 0,
        user_ss_host: 0,
        cs_descriptor: Event::NONE.gate,
        ss_descriptor: Event::NONE.gate,
        tss_esp0: 0,
        stack_last: 0,
        ss: 0,
        cs: 0,
        events: [Event::NONE; EVENTS],
    };

    /// In a world with the region at `region` and the vCPU page at `vcpu`; the rules differ in gates only. `ss`: what is
    /// behind a selector.
    pub(super) fn new(
        events: &[(Reflected, DeliveryRules)],
        ss: impl FnOnce(u16) -> Option<Descriptor>,
        region: u32,
        vcpu: u32,
    ) -> Reflect {
        let usable = |rules: &DeliveryRules| {
            rules.ready != 0 && rules.from_ring3 != 0 && rules.cs_host == u32::from(monitor::KERNEL_CS)
        };
        let mut usable = events.iter().filter(|(_, rules)| usable(rules));
        let Some(first) = usable.next() else { return Reflect::NONE };
        let rules = &first.1;
        let Some(ss) = u16::try_from(rules.ss_host).ok().and_then(ss) else { return Reflect::NONE };
        let mut entries = [Event::NONE; EVENTS];
        for (entry, (kind, rules)) in entries.iter_mut().zip(std::iter::once(first).chain(usable)) {
            *entry = Event::new(*kind, rules);
        }
        Reflect {
            ss_host: rules.ss_host,
            base: ss.base,
            vcpu: vcpu.wrapping_sub(ss.base),
            user_ss_host: rules.user_ss_host,
            cs_descriptor: rules.cs_descriptor,
            ss_descriptor: rules.ss_descriptor,
            tss_esp0: rules.tss_esp0,
            stack_last: region.wrapping_sub(ss.base).wrapping_sub(GUEST_FRAME),
            ss: rules.ss,
            cs: rules.cs,
            events: entries,
        }
    }

    /// As it lies in memory.
    pub(super) fn words(&self) -> [u32; REFLECT_WORDS] {
        let [cs, ss] = [self.cs_descriptor, self.ss_descriptor].map(|t| [t.at, t.low, t.high]);
        let head = [self.ss_host, self.base, self.vcpu, self.user_ss_host];
        let tail = [self.tss_esp0, self.stack_last, self.ss, self.cs];
        let events = self.events.map(|e| e.words());
        let mut words = [0; REFLECT_WORDS];
        let all = [&head[..], &cs, &ss, &tail, events.as_flattened()].concat();
        words.iter_mut().zip(all).for_each(|(word, value)| *word = value);
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn words_are_where_the_assembly_has_them() {
        let table = |at| Table { at, low: at + 1, high: at + 2 };
        let event = |kind, at| {
            Event::new(kind, &DeliveryRules { gate: table(at), target: at, ..DeliveryRules::default() })
        };
        let r = Reflect {
            user_ss_host: 6,
            cs_descriptor: table(10),
            ss_descriptor: table(20),
            cs: 4,
            events: [event(Reflected::Int(0x80), 30), event(Reflected::Fault(6), 40), Event::NONE],
            ..Reflect::NONE
        };
        let word = |at: usize| r.words()[at / 4];
        assert_eq!(word(offset_of!(Reflect, user_ss_host)), 6);
        assert_eq!(word(offset_of!(Reflect, cs_descriptor)), 10);
        assert_eq!(word(offset_of!(Reflect, ss_descriptor) + 8), 22);
        assert_eq!(word(offset_of!(Reflect, cs)), 4);
        let of_event = |n: usize, at: usize| word(offset_of!(Reflect, events) + n * size_of::<Event>() + at);
        assert_eq!(of_event(0, offset_of!(Event, vector)), 13);
        assert_eq!(of_event(0, offset_of!(Event, error)), 0x402);
        assert_eq!(of_event(0, offset_of!(Event, instruction)), 0x80cd);
        assert_eq!(of_event(0, offset_of!(Event, flags)), 0x202);
        assert_eq!(of_event(1, offset_of!(Event, gate) + 4), 41);
        assert_eq!(of_event(1, offset_of!(Event, target)), 40);
        assert_eq!(of_event(1, offset_of!(Event, flags)), 0x1_0202);
        assert_eq!(of_event(2, offset_of!(Event, vector)), NOTHING);
    }
}
