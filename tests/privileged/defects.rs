//! Deliberate defects: what the oracle is for, done on purpose behind the interpreter's back. What it reads of descriptors
//! and TSSs is not what is there, or what it writes gets lost. Each must be caught, in a case that passes without it.

use super::cases::GROUPS;
use super::gaps;
use super::rig::Rig;
use super::setup::{GDT, IDT, IO_MAP, LDT, NEW16, NEW32, TSS16, TSS32};
use host_driver_shim::kvm::KvmError;
use subring_tests::ring0_code::Random;

/// One kind of defect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Defect {
    /// Accessed bits are not written.
    Accessed,
    /// Busy bits of TSSs are not written.
    Busy,
    /// Every descriptor in the GDT is present.
    Present,
    /// Code segments are never conforming.
    Conforming,
    /// D/B of code segments is lost.
    Width,
    /// Every gate of the IDT is for ring 3.
    GateDpl,
    /// A 16-bit gate of the IDT is one of 32 bits.
    GateWidth,
    /// An interrupt gate leaves IF alone.
    TrapGate,
    /// Every port is free.
    Bitmap,
    /// An inner stack begins four bytes higher.
    InnerStack,
    /// A nested task does not know which one it came from.
    BackLink,
    /// Ring 0 writes where it likes.
    WriteProtect,
}

/// All of them, with the group that must catch each.
const ALL: [(Defect, &str); 12] = [
    (Defect::Accessed, "segments"),
    (Defect::Busy, "tasks"),
    (Defect::Present, "segments"),
    (Defect::Conforming, "transfers"),
    (Defect::Width, "irets"),
    (Defect::GateDpl, "events"),
    (Defect::GateWidth, "events"),
    (Defect::TrapGate, "events"),
    (Defect::Bitmap, "ports and flags"),
    (Defect::InnerStack, "events"),
    (Defect::BackLink, "tasks"),
    (Defect::WriteProtect, "events"),
];

/// Cases in which one must be caught.
const ENOUGH: usize = 600;

impl Defect {
    /// Changes what was read.
    pub(crate) fn read(self, at: u32, bytes: &mut [u8]) {
        let gdt = (GDT..GDT + 0x1000).contains(&at) && bytes.len() == 8;
        let idt = (IDT..LDT).contains(&at) && bytes.len() == 8;
        let tss = (TSS32..NEW16 + 0x100).contains(&at);
        match (self, bytes) {
            (Defect::Present, b) if gdt => b[5] |= 0x80,
            (Defect::Conforming, b) if gdt && b[5] & 0x18 == 0x18 => b[5] &= !4,
            (Defect::Width, b) if gdt && b[5] & 0x18 == 0x18 => b[6] &= !0x40,
            (Defect::GateDpl, b) if idt => b[5] |= 0x60,
            (Defect::GateWidth, b) if idt && b[5] & 0x1e == 6 => b[5] |= 8,
            (Defect::TrapGate, b) if idt && b[5] & 0x17 == 6 => b[5] |= 1,
            (Defect::Bitmap, b) if b.len() == 2 && (TSS32 + IO_MAP..NEW32).contains(&at) => b.fill(0),
            (Defect::InnerStack, b) if tss && matches!(b.len(), 4 | 6) && (at & 0xff) < 0x20 => b[0] ^= 4,
            _ => {}
        }
    }

    /// What is written gets lost.
    pub(crate) fn loses(self, at: u32, bytes: &[u8]) -> bool {
        let access = (GDT..GDT + 0x1000).contains(&at) && bytes.len() == 1;
        match self {
            Defect::Accessed => access && bytes[0] & 0x10 != 0,
            Defect::Busy => access && bytes[0] & 0x10 == 0,
            Defect::BackLink => [TSS32, NEW32, TSS16, NEW16].contains(&at) && bytes.len() == 2,
            _ => false,
        }
    }
}

/// Which of them nothing caught.
pub(crate) fn check(rig: &mut Rig, seed: u64, lab: bool) -> Result<Vec<Defect>, KvmError> {
    let mut missed = Vec::new();
    for (defect, name) in ALL {
        let Some(group) = GROUPS.iter().find(|group| group.name == name) else { continue };
        let cases = (group.cases)(&mut Random(seed), 1);
        let step = (cases.len() / ENOUGH).max(1);
        let mut caught = false;
        for case in cases.iter().step_by(step) {
            let mut passes = |with| {
                rig.set_defect(with);
                let result = rig.run(case)?;
                Ok::<_, KvmError>(result.is_none_or(|result| gaps::explain(case, &result, lab).1.is_empty()))
            };
            if !passes(Some(defect))? && passes(None)? {
                caught = true;
                break;
            }
        }
        rig.set_defect(None);
        if !caught {
            missed.push(defect);
        }
    }
    Ok(missed)
}
