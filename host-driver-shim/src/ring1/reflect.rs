//! What the monitor needs to send `int n` of ring 3 to the guest's handler by itself ([`Reflect`]).
//!
//! It is part of the tables page, read-only in every world: the host writes it while the vCPU stands still. The assembly
//! that goes by it is in `monitor.rs`; what it does is what the world's side of `raw` does (`raw/rc_deliver.rs`), without
//! walking the guest's page tables: it reads and writes guest memory through the world's own mappings, and where one is
//! missing or says no, the host is asked as ever, with nothing changed.

use std::mem::size_of;

use super::monitor::{self, Descriptor};
use crate::world::{DeliveryRules, Table};

/// Bytes of the frame that a gate to ring 0 pushes on ring 0's stack, without an error code.
pub(super) const GUEST_FRAME: u32 = 20;
/// `int n` with a byte for n.
const INT: u32 = 0xcd;

/// Words in the tables page. Linear addresses are guest linear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct Reflect {
    /// The error code of #GP for the vector: 8 n + 2; [`NOTHING`]: no vector.
    pub(super) error: u32,
    /// The two bytes of the instruction.
    pub(super) instruction: u32,
    /// The host selector of guest data as flat ring 0 sees it: SS of the handler.
    pub(super) ss_host: u32,
    /// Its base. What the world has at an address is at that address less this.
    pub(super) base: u32,
    /// The vCPU page, in that segment.
    pub(super) vcpu: u32,
    /// The host selector SS must hold in ring 3.
    pub(super) user_ss_host: u32,
    /// Entries of the guest's tables that must still be what they were: the gate, the handler's CS, the handler's SS.
    pub(super) tables: [Table; 3],
    /// Where ESP0 is; SS0 is the word at +4.
    pub(super) tss_esp0: u32,
    /// The highest ESP a handler may begin with: behind it the monitor's own stack might be.
    pub(super) stack_last: u32,
    /// What SS0 must be.
    pub(super) ss: u32,
    /// The handler's CS as the guest sees it.
    pub(super) cs: u32,
    /// The new virtual IF is the old one and this.
    pub(super) if_mask: u32,
    /// EIP of the handler.
    pub(super) target: u32,
}

/// No error code.
pub(super) const NOTHING: u32 = u32::MAX;
pub(super) const REFLECT_WORDS: usize = size_of::<Reflect>() / 4;

impl Reflect {
    /// The monitor is to do nothing by itself.
    pub(super) const NONE: Reflect = Reflect {
        error: NOTHING,
        instruction: 0,
        ss_host: 0,
        base: 0,
        vcpu: 0,
        user_ss_host: 0,
        tables: [Table { at: 0, low: 0, high: 0 }; 3],
        tss_esp0: 0,
        stack_last: 0,
        ss: 0,
        cs: 0,
        if_mask: 0,
        target: 0,
    };

    /// For `int vector` by `rules`, in a world with the region at `region` and the vCPU page at `vcpu`; `ss`: what is
    /// behind `rules.ss_host`.
    pub(super) fn new(vector: u8, rules: &DeliveryRules, ss: Descriptor, region: u32, vcpu: u32) -> Reflect {
        if rules.ready == 0 || rules.from_ring3 == 0 || rules.cs_host != u32::from(monitor::KERNEL_CS) {
            return Reflect::NONE;
        }
        Reflect {
            error: u32::from(vector) << 3 | 2,
            instruction: INT | u32::from(vector) << 8,
            ss_host: rules.ss_host,
            base: ss.base,
            vcpu: vcpu.wrapping_sub(ss.base),
            user_ss_host: rules.user_ss_host,
            tables: [rules.gate, rules.cs_descriptor, rules.ss_descriptor],
            tss_esp0: rules.tss_esp0,
            stack_last: region.wrapping_sub(ss.base).wrapping_sub(GUEST_FRAME),
            ss: rules.ss,
            cs: rules.cs,
            if_mask: rules.if_mask,
            target: rules.target,
        }
    }

    /// As it lies in memory.
    pub(super) fn words(&self) -> [u32; REFLECT_WORDS] {
        let [gate, cs, ss] = self.tables.map(|t| [t.at, t.low, t.high]);
        let head = [self.error, self.instruction, self.ss_host, self.base, self.vcpu, self.user_ss_host];
        let tail = [self.tss_esp0, self.stack_last, self.ss, self.cs, self.if_mask, self.target];
        let mut words = [0; REFLECT_WORDS];
        for (word, value) in words.iter_mut().zip([&head[..], &gate, &cs, &ss, &tail].concat()) {
            *word = value;
        }
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
        let r = Reflect {
            tables: [table(10), table(20), table(30)],
            tss_esp0: 4,
            target: 5,
            user_ss_host: 6,
            ..Reflect::NONE
        };
        let word = |at: usize| r.words()[at / 4];
        assert_eq!(word(offset_of!(Reflect, error)), NOTHING);
        assert_eq!(word(offset_of!(Reflect, user_ss_host)), 6);
        assert_eq!(word(offset_of!(Reflect, tables)), 10);
        assert_eq!(word(offset_of!(Reflect, tables) + 2 * size_of::<Table>() + 8), 32);
        assert_eq!((word(offset_of!(Reflect, tss_esp0)), word(offset_of!(Reflect, target))), (4, 5));
    }
}
