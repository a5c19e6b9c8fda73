//! Differences that are not the interpreter's fault, each with its reason: what KVM gets wrong in the lab, what is undefined;
//! and the one that is its own.
//!
//! Each is as narrow as it can be said, and the test counts what it explains.

use super::case::{Case, Difference, Outcome, Place};
use super::cases::pages::{PAE_DIRECTORY, PDPT};
use super::rig::Result2;
use super::setup::{self, GDT, IDT, LDT, PAGE_DIRECTORY, PAGE_TABLE, STACKS, TSS32, handler};
use monitor::cpum::{cr4, eflags};
use std::collections::BTreeSet;

/// A known deviation.
pub(crate) struct Gap {
    pub(crate) name: &'static str,
    pub(crate) reason: &'static str,
    /// It explains this difference in this case; the outcomes are ours and theirs.
    pub(crate) explains: fn(&Case, &Outcome, &Outcome, &Difference) -> bool,
}

/// A word in a stack's page.
fn pushed(d: &Difference) -> bool {
    matches!(d.place, Place::Memory(at) if (STACKS..STACKS + 0x4000).contains(&at))
}

/// What differs is this bit of the word, or of its upper half; ours has it.
fn only_ours(d: &Difference, bit: u32) -> bool {
    let differs = d.ours ^ d.theirs;
    (differs == bit || differs == bit << 16) && d.ours & differs != 0
}

fn descriptor_high(d: &Difference) -> bool {
    let tables = |at: u32| (GDT..IDT).contains(&at) || (LDT..LDT + 0x100).contains(&at);
    matches!(d.place, Place::Memory(at) if at % 8 == 4 && tables(at))
}

fn differ_in(d: &Difference, name: &str, bits: u32) -> bool {
    matches!(d.place, Place::Named(n) if n == name) && (d.ours ^ d.theirs) & !bits == 0
}

/// Both raised something, and these exceptions.
fn raised(ours: &Outcome, theirs: &Outcome, a: u32, b: u32) -> bool {
    ours.cpu.eip == handler(a) && theirs.cpu.eip == handler(b)
}

fn is_task(case: &Case) -> bool {
    case.group.contains("task")
}

fn is_debug_register(case: &Case) -> bool {
    case.group.ends_with(" dr")
}

/// Those of QEMU's TCG (7.2), which is the lab's CPU.
pub(crate) const TCG: &[Gap] = &[
    Gap {
        name: "faults push RF as it is",
        reason: "the flags pushed for a fault have RF set (SDM vol. 3B, 17.3.1.1)",
        explains: |_, _, _, d| {
            let saved = matches!(d.place, Place::Memory(at) if at == TSS32 + 0x24);
            (pushed(d) || saved) && d.ours == d.theirs | eflags::RF
        },
    },
    Gap {
        name: "accessed bits stay clear",
        reason: "loading a segment register sets the bit (SDM vol. 3A, 3.4.5.1), also where a gate names the segment",
        explains: |_, _, _, d| descriptor_high(d) && d.ours == d.theirs | 0x100,
    },
    Gap {
        name: "error codes without EXT",
        reason: "EXT is set for faults during the delivery of what is no software interrupt (SDM vol. 3A, 6.13)",
        explains: |_, ours, _, d| ours.cpu.eip != handler(14) && pushed(d) && only_ours(d, 1),
    },
    Gap {
        name: "stacks of ring 3 are accessed as ring 0",
        reason: "an access to the stack at CPL 3 is a user's (SDM vol. 3A, 4.6.1)",
        explains: |case, _, _, d| {
            let user = case.cpu.cpl == 3;
            let page = case.page_bits(setup::stack(3)).is_some_and(|bits| bits & 5 == 1);
            user && (page || pushed(d) && only_ours(d, 4))
        },
    },
    Gap {
        name: "call gates to conforming segments give CS their DPL",
        reason: "CS.RPL becomes CPL (SDM vol. 2, CALL)",
        explains: |case, ours, theirs, d| {
            let (a, b) = (ours.cpu.seg[1].selector, theirs.cpu.seg[1].selector);
            case.group == "call gate" && d.place == Place::Segment("cs") && a & !3 == b & !3
        },
    },
    Gap {
        name: "transfers beyond the limit of the code segment",
        reason: "#GP (SDM vol. 2, JMP, CALL, RET, IRET, INT n); TCG looks at most limits nowhere",
        explains: |case, _, _, _| case.beyond_limit,
    },
    Gap {
        name: "task gates with a TSS in the LDT raise #TS",
        reason: "#GP (SDM vol. 2, CALL, JMP, INT n)",
        explains: |case, ours, theirs, d| {
            is_task(case) && d.place == Place::Named("eip") && raised(ours, theirs, 13, 10)
        },
    },
    Gap {
        name: "from V86 mode to rings 1 and 2",
        reason: "#GP unless the gate leads to ring 0 (SDM vol. 2, INT n)",
        explains: |case, ours, theirs, _| {
            case.cpu.v86() && (matches!(theirs.cpu.cpl, 1 | 2) || raised(ours, theirs, 13, 10))
        },
    },
    Gap {
        name: "iret with VM set outside ring 0",
        reason: "VM means something at CPL 0 only (SDM vol. 2, IRET)",
        explains: |case, _, _, _| {
            let cpu = &case.cpu;
            let wide = cpu.seg[1].big() == (case.code.len() == 1);
            let flags = case.changes.get(2).map_or(0, |(_, bytes)| bytes.get(2).copied().unwrap_or(0));
            case.group == "iret" && wide && cpu.cpl > 0 && !cpu.v86() && flags & 2 != 0
        },
    },
    Gap {
        name: "int1 is #UD",
        reason: "it is #DB (SDM vol. 2, INT n)",
        explains: |case, _, _, _| case.group == "int1",
    },
    Gap {
        name: "VIF and VIP are not loaded",
        reason: "`iret` at CPL 0 and task switches do (SDM vol. 2, IRET); the bits belong to VME, which the policy hides",
        explains: |_, _, _, d| differ_in(d, "eflags", eflags::VIF | eflags::VIP),
    },
    Gap {
        name: "a return to V86 mode does not load RF",
        reason: "all flags are loaded (SDM vol. 2, IRET)",
        explains: |case, _, theirs, d| {
            case.group == "iret"
                && theirs.cpu.v86()
                && differ_in(d, "eflags", eflags::RF | eflags::VIF | eflags::VIP)
        },
    },
    Gap {
        name: "lss and needless sti hold interrupts back",
        reason: "`mov ss`, `pop ss`, and `sti` where IF was clear do (SDM vol. 3A, 6.8.3; vol. 2, STI)",
        explains: |case, _, _, d| {
            let sti = case.group == "sti" && case.cpu.eflags & eflags::IF != 0;
            d.place == Place::Named("shadow") && (case.group == "lss" || sti)
        },
    },
    Gap {
        name: "sti holds single steps back",
        reason: "only `mov ss` and `pop ss` do (SDM vol. 3B, 17.3.1.4)",
        explains: |case, _, _, _| case.group == "step sti",
    },
    Gap {
        name: "a null LDTR stays present",
        reason: "KVM sees the attributes of the LDT before",
        explains: |_, ours, _, d| d.place == Place::Segment("ldtr") && !ours.cpu.ldtr.present(),
    },
    Gap {
        name: "ltr with a null selector",
        reason: "#GP(0) (SDM vol. 2, LTR)",
        explains: |case, _, theirs, _| case.group == "ltr" && theirs.cpu.tr.selector & !3 == 0,
    },
    Gap {
        name: "jmp through a gate to an absent segment is #GP",
        reason: "#NP (SDM vol. 2, JMP)",
        explains: |case, ours, theirs, d| {
            case.group == "jmp gate" && d.place == Place::Named("eip") && raised(ours, theirs, 11, 13)
        },
    },
    Gap {
        name: "a return to an absent stack is #NP",
        reason: "#SS (SDM vol. 2, RET, IRET)",
        explains: |case, ours, theirs, d| {
            let group = matches!(case.group, "retf" | "iret");
            group && d.place == Place::Named("eip") && raised(ours, theirs, 12, 11)
        },
    },
    Gap {
        name: "DR7.GD does nothing",
        reason: "#DB before an access to a debug register (SDM vol. 3B, 17.2.4)",
        explains: |case, _, _, _| is_debug_register(case) && case.cpu.dr[7] & 1 << 13 != 0,
    },
    Gap {
        name: "updates read before they write",
        reason: "an instruction that reads and writes its operand faults as a write; TCG looks at the right to write afterwards",
        explains: |case, _, _, d| {
            // The dirty bit of the first page where the second one faults.
            let table = |at: u32| (PAGE_TABLE..PAGE_DIRECTORY).contains(&at);
            let dirty = matches!(d.place, Place::Memory(at) if table(at)) && d.ours == d.theirs | 0x40;
            case.group == "page update" && (pushed(d) || dirty || d.place == Place::Named("cr2"))
        },
    },
    Gap {
        name: "reserved bits fault without P",
        reason: "bit 3 of the error code comes with bit 0 (SDM vol. 3A, 4.7)",
        explains: |case, _, _, d| {
            case.group.starts_with("page ") && pushed(d) && d.theirs & 8 != 0 && d.ours == d.theirs | 1
        },
    },
    Gap {
        name: "accessed bits in the pointer table of PAE",
        reason: "these entries are loaded with CR3 and not walked (SDM vol. 3A, 4.4.1)",
        explains: |_, _, _, d| d.place == Place::Memory(PDPT) && d.theirs == d.ours | 0x20,
    },
    Gap {
        name: "reserved bits of DR6 and DR7 can be written",
        reason: "DR6 bit 12 and DR7 bits 11, 12, 14 and 15 are 0 (SDM vol. 3B, 17.2.3 and 17.2.4)",
        explains: |case, _, _, d| {
            is_debug_register(case) && (differ_in(d, "dr6", 0x1000) || differ_in(d, "dr7", 0xd800))
        },
    },
];

/// Those of KVM on any host.
pub(crate) const KVM: &[Gap] = &[Gap {
    name: "what KVM injects sets RF for good",
    reason: "KVM takes #UD and raises it again with RF in EFLAGS, where a further fault on the way finds it",
    explains: |case, _, _, d| case.group == "ud2" && pushed(d) && d.theirs == d.ours | eflags::RF,
}];

/// Where no manual says what happens, or says that it is undefined.
pub(crate) const UNDEFINED: &[Gap] = &[
    Gap {
        name: "bits 16 to 19 of what lar loads",
        reason: "undefined (SDM vol. 2, LAR)",
        explains: |case, _, _, d| case.group.starts_with("lar") && differ_in(d, "edx", 0xf_0000),
    },
    Gap {
        name: "where in the descriptor the accessed bit is written",
        reason: "CR2 of a fault by that write is an address in the descriptor",
        explains: |case, _, _, d| {
            case.page_bits(GDT).is_some() && differ_in(d, "cr2", 7) && (GDT..IDT).contains(&d.ours)
        },
    },
    Gap {
        name: "#UD or #GP first",
        reason: "an access to a register that is not there, by one who may access none",
        explains: |case, ours, theirs, _| {
            let none = case.group.ends_with(" cr") || is_debug_register(case) && case.cpu.cr4 & cr4::DE != 0;
            none && case.cpu.cpl > 0 && raised(ours, theirs, 6, 13)
        },
    },
    Gap {
        name: "upper halves of registers in a 16-bit task",
        reason: "its TSS has the lower ones (SDM vol. 3A, 7.6)",
        explains: |case, _, theirs, d| {
            let narrow = theirs.cpu.tr.attr.type_bits() & 8 == 0;
            let register = matches!(d.place, Place::Named(name) if name.starts_with('e') && name != "eip");
            is_task(case) && narrow && register && (d.ours ^ d.theirs) & 0xffff == 0
        },
    },
    Gap {
        name: "what of a TSS, or of the parameters of a call gate, is accessed first",
        reason: "CR2 of a fault by that access is one of several",
        explains: |case, ours, _, d| {
            let tss = is_task(case) && case.page_bits(TSS32).is_some() && d.ours >> 12 == TSS32 >> 12;
            let same_page = (d.ours ^ d.theirs) >> 12 == 0;
            let parameters = case.group == "call gate" && ours.cpu.cr2 >= setup::stack(case.cpu.cpl);
            d.place == Place::Named("cr2") && same_page && (tss || parameters)
        },
    },
    Gap {
        name: "the accessed bit of a directory entry when its table's entry faults",
        reason: "processors may set accessed bits early (SDM vol. 3A, 4.8)",
        explains: |case, _, _, d| {
            let directory = [PAGE_DIRECTORY + 4, PAE_DIRECTORY + 8].map(Place::Memory).contains(&d.place);
            case.group.starts_with("page ") && directory && d.theirs == d.ours | 0x20
        },
    },
    Gap {
        name: "what a push that faulted later has left",
        reason: "below the stack pointer of before; nothing says that a frame is pushed as a whole",
        explains: |case, _, _, d| {
            let faulted = case.cpu.paging() && case.changes.iter().any(|(at, _)| *at >= setup::PAGE_TABLE);
            faulted && pushed(d) && d.ours == d.before
        },
    },
];

/// What the interpreter does otherwise, knowingly.
pub(crate) const OURS: &[Gap] = &[Gap {
    name: "what is wrong with a new task is raised in the old one",
    reason: "monitor/src/selm/task.rs; processors have switched by then (SDM vol. 3A, 7.3)",
    explains: |case, ours, theirs, _| {
        let switched = theirs.cpu.tr.selector != ours.cpu.tr.selector;
        is_task(case) && (switched || ours.end != theirs.end)
    },
}];

/// All of them, by whose they are. The lab's count in the lab only.
pub(crate) const LISTS: &[(&str, &[Gap])] =
    &[("the lab's CPU", TCG), ("KVM", KVM), ("undefined", UNDEFINED), ("the interpreter", OURS)];

/// The names of the gaps that explain differences, and the differences that none explains.
pub(crate) fn explain<'a>(
    case: &Case,
    result: &'a Result2,
    lab: bool,
) -> (BTreeSet<&'static str>, Vec<&'a Difference>) {
    let mut names = BTreeSet::new();
    let mut open = Vec::new();
    let lists = if lab { LISTS } else { &LISTS[1..] };
    let all = || lists.iter().flat_map(|(_, gaps)| *gaps);
    for d in &result.differences {
        match all().find(|gap| (gap.explains)(case, &result.ours, &result.theirs, d)) {
            Some(gap) => {
                names.insert(gap.name);
            }
            None => open.push(d),
        }
    }
    (names, open)
}
