//! Deliberate defects: what the oracle is for, done on purpose behind the engine's back.
//!
//! None of them needs a change of what is tested. Code is changed where the world executes it, after PATM and the
//! monitor have put it there; words of the vCPU page and registers are changed on their way between the two.

use super::stepping::Tamper;
use super::{Meddler, guest::RAM};
use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::world::{HwRegs, WorldExit};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};
use monitor::em::raw::RawEngine;
use monitor::machine::Machine;
use patm::{Patch, PatchId, vcpu_page as page};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

/// One kind of defect.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Defect {
    /// A trampoline jumps back one byte too far.
    Displacement,
    /// `cli` in a trampoline leaves IF set.
    ForgottenIf,
    /// The monitor forgets IOPL, NT, AC and ID when it enters a world.
    ForgottenIopl,
    /// A write to code is not seen.
    StalePage,
    /// The selector of CS has an RPL of 3 in the vCPU page.
    Rpl,
    /// The map of a trampoline has a boundary's fix at the boundary before it.
    EipMap,
    /// The word that says that an interrupt waits is lost on its way into the world.
    LostDoorbell,
    /// A trampoline does not save the flags it is about to change.
    ClobberedFlags,
    /// `push ds` and its like push the neighbour's selector.
    OtherSelector,
    /// A register a trampoline used is not put back.
    LostRegister,
    /// The bytes inside a window where an instruction used to start do nothing instead of trapping.
    NoTrapInside,
    /// The selector a trampoline has loaded is another one when the monitor reads it back.
    SelectorReadBack,
    /// The byte of a site that traps is the guest's own.
    BareSite,
}

impl Defect {
    /// All of them.
    pub const ALL: [Defect; 13] = [
        Defect::Displacement,
        Defect::ForgottenIf,
        Defect::ForgottenIopl,
        Defect::StalePage,
        Defect::Rpl,
        Defect::EipMap,
        Defect::LostDoorbell,
        Defect::ClobberedFlags,
        Defect::OtherSelector,
        Defect::LostRegister,
        Defect::NoTrapInside,
        Defect::SelectorReadBack,
        Defect::BareSite,
    ];

    /// Only code that is rewritten shows it.
    #[must_use]
    pub fn needs_rewriting(self) -> bool {
        self == Defect::StalePage
    }
}

/// Boundaries of trampolines and where the boundary behind each is, as EIPs.
type Boundaries = Rc<RefCell<HashMap<u32, u32>>>;

/// Puts a defect into whatever an engine does.
pub struct Saboteur {
    defect: Defect,
    code: CodeMemory,
    done: HashSet<PatchId>,
    boundaries: Boundaries,
    /// How often something was changed.
    pub changed: u64,
}

/// The part of it that sits between engine and world.
struct Between {
    defect: Defect,
    boundaries: Boundaries,
}

impl Tamper for Between {
    fn write(&self, offset: u32, value: u32) -> u32 {
        match (self.defect, offset) {
            (Defect::ForgottenIopl, page::HIDDEN_FLAGS) | (Defect::LostDoorbell, page::PENDING) => 0,
            (Defect::Rpl, o) if o == page::SELECTORS + 4 => value | 3,
            _ => value,
        }
    }
    fn read(&self, offset: u32, value: u32) -> u32 {
        // DS, ES and GS, if they hold one of the two flat ones.
        let data = [0, 3, 5].map(|n| page::SELECTORS + 4 * n).contains(&offset);
        if self.defect == Defect::SelectorReadBack && data && value == 0x10 { 0x23 } else { value }
    }
    fn stopped(&self, regs: &mut HwRegs, exit: &WorldExit) {
        if self.defect == Defect::EipMap
            && *exit == WorldExit::Kick
            && let Some(next) = self.boundaries.borrow().get(&regs.eip)
        {
            regs.eip = *next;
        }
    }
}

impl Saboteur {
    /// For a new engine on this code memory.
    #[must_use]
    pub fn new(defect: Defect, code: &CodeMemory) -> Saboteur {
        Saboteur { defect, code: code.clone(), done: HashSet::new(), boundaries: Rc::default(), changed: 0 }
    }

    /// What is to sit between engine and world.
    #[must_use]
    pub fn between(&self) -> Rc<dyn Tamper> {
        Rc::new(Between { defect: self.defect, boundaries: Rc::clone(&self.boundaries) })
    }

    /// What the defect makes of an instruction of a trampoline: bytes at an offset in it.
    fn spoil(&self, patch: &Patch, i: &Instruction, bytes: &[u8]) -> Option<(usize, Vec<u8>)> {
        let word = i.segment_prefix() == Register::SS && i.memory_base() == Register::None;
        let offset = i.memory_displacement32() & 0xfff;
        let selector = (page::SELECTORS..page::SELECTORS + 24).contains(&offset);
        match self.defect {
            Defect::Displacement if i.code() == Code::Jmp_rel32_32 && i.near_branch32() == patch.end().0 => {
                let d = u32::from_le_bytes(bytes[1..5].try_into().ok()?).wrapping_add(1);
                Some((1, d.to_le_bytes().to_vec()))
            }
            Defect::ForgottenIf
                if i.code() == Code::Mov_rm32_imm32
                    && word
                    && offset == page::IF_FLAG
                    && i.immediate32() == 0 =>
            {
                Some((bytes.len() - 4, 0x200u32.to_le_bytes().to_vec()))
            }
            Defect::ClobberedFlags if i.code() == Code::Lahf => Some((0, vec![0x90])),
            Defect::OtherSelector if i.code() == Code::Push_rm32 && word && selector => {
                let at = bytes.len() - 4;
                let other = (offset - page::SELECTORS + 8) % 24 + page::SELECTORS;
                let d = i.memory_displacement32() - offset + other;
                Some((at, d.to_le_bytes().to_vec()))
            }
            Defect::LostRegister => {
                let loads = matches!(i.code(), Code::Mov_r32_rm32 | Code::Mov_EAX_moffs32);
                let from = (page::SCRATCH..page::SCRATCH + 8).contains(&offset);
                (loads && word && from && i.op0_kind() == OpKind::Register)
                    .then(|| (0, vec![0x90; bytes.len()]))
            }
            _ => None,
        }
    }

    fn spoil_patch(&mut self, raw: &RawEngine, patch: &Patch) {
        let own = |at: u32| {
            let phys = at & 0x3f_ffff;
            let frame = (u64::from(phys) < RAM).then_some(phys >> 12)?;
            let page = raw.kernel_code.copy_of(csam::GuestLin(at), frame)?;
            Some(page + u64::from(at & 0xfff))
        };
        let mut put = |at: Option<u64>, byte: u8| {
            if let Some(at) = at {
                self.changed += 1;
                let _in_range = self.code.write_u8(at, byte);
            }
        };
        match self.defect {
            Defect::NoTrapInside => {
                for (eip, _) in &patch.map.starts {
                    if *eip != patch.start.0 {
                        put(own(*eip), 0x90);
                    }
                }
            }
            Defect::BareSite if patch.trampoline.is_none() => put(own(patch.start.0), patch.original[0]),
            _ => {}
        }
        let Some(t) = &patch.trampoline else { return };
        if self.defect == Defect::EipMap {
            let points = patch.map.points.windows(2);
            let next = points.map(|p| (t.at + p[0].offset, t.at + p[1].offset));
            self.boundaries.borrow_mut().extend(next);
            self.changed += 1;
        }
        let pages: HashMap<u32, u64> =
            raw.kernel_code.trampolines.pages().map(|(p, o)| (p.page_number(), o)).collect();
        for i in &mut Decoder::with_ip(32, &t.code, u64::from(t.at), DecoderOptions::NONE) {
            let from = (i.ip32() - t.at) as usize;
            let Some((offset, bytes)) = self.spoil(patch, &i, &t.code[from..from + i.len()]) else {
                continue;
            };
            self.changed += 1;
            for (n, b) in bytes.iter().enumerate() {
                let at = i.ip32() + (offset + n) as u32;
                if let Some(page) = pages.get(&(at >> 12)) {
                    let _in_range = self.code.write_u8(page + u64::from(at & 0xfff), *b);
                }
            }
        }
    }
}

impl Meddler for Saboteur {
    fn before(&mut self, _raw: &mut RawEngine, m: &mut Machine) {
        if self.defect == Defect::StalePage && !m.take_code_writes().is_empty() {
            self.changed += 1;
        }
    }
    fn after(&mut self, raw: &mut RawEngine, _m: &mut Machine) {
        let new: Vec<Patch> =
            raw.kernel_code.patm.patches().filter(|p| !self.done.contains(&p.id)).cloned().collect();
        for patch in new {
            self.spoil_patch(raw, &patch);
            self.done.insert(patch.id);
        }
    }
}
