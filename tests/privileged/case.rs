//! A case, and what became of it on one side: [`Case`], [`Outcome`], [`compare`].
//!
//! A case is a CPU, RAM, and the instruction at its CS:EIP, the last one in RAM. Whatever it does, it goes on at an address
//! behind RAM, which no side executes: that ends the run, before a further instruction can blur the result, at every
//! privilege and in every mode. (A single step by EFLAGS.TF would show in what is pushed, and the handlers of rings 1 to 3
//! could not be stopped.)

use super::setup::{self, GDT, IDT, RAM};
use monitor::cpum::{CpuState, SegAttr, Segment, Shadow, seg};

/// One case.
#[derive(Clone)]
pub(crate) struct Case {
    /// What it is a case of: gaps of the lab are looked up by it, differences counted.
    pub(crate) group: &'static str,
    /// What is special about it.
    pub(crate) note: String,
    /// The CPU before.
    pub(crate) cpu: CpuState,
    /// Changes of RAM, in order.
    pub(crate) changes: Vec<(u32, Vec<u8>)>,
    /// The instruction.
    pub(crate) code: Vec<u8>,
    /// An external interrupt that is delivered first.
    pub(crate) interrupt: Option<u8>,
    /// General registers whose value nobody can foretell (`rdtsc`), as bits.
    pub(crate) ignored_gprs: u8,
    /// The transfer's EIP is beyond the limit of the code segment it goes to.
    pub(crate) beyond_limit: bool,
}

impl Case {
    /// A case with this CPU and code, which is placed.
    #[must_use]
    pub(crate) fn new(group: &'static str, mut cpu: CpuState, code: &[u8]) -> Case {
        cpu.eip = RAM - code.len() as u32 - cpu.seg[seg::CS].base;
        let code = code.to_vec();
        Case {
            group,
            note: String::new(),
            cpu,
            changes: Vec::new(),
            code,
            interrupt: None,
            ignored_gprs: 0,
            beyond_limit: false,
        }
    }
    /// With these bytes in RAM.
    #[must_use]
    pub(crate) fn put(mut self, at: u32, bytes: &[u8]) -> Case {
        self.changes.push((at, bytes.to_vec()));
        self
    }
    /// With this descriptor in the GDT.
    #[must_use]
    pub(crate) fn descriptor(self, selector: u16, bytes: [u8; 8]) -> Case {
        self.put(GDT + u32::from(selector & !7), &bytes)
    }
    /// With this gate in the IDT.
    #[must_use]
    pub(crate) fn gate(self, vector: u8, bytes: [u8; 8]) -> Case {
        self.put(IDT + u32::from(vector) * 8, &bytes)
    }
    /// With the entry of a page changed: its low bits are these (P 1, R/W 2, U/S 4).
    #[must_use]
    pub(crate) fn page(self, at: u32, bits: u32) -> Case {
        let entry = at & !0xfff | 0x60 | bits;
        self.put(setup::PAGE_TABLE + (at >> 12) * 4, &entry.to_le_bytes())
    }
    /// With a name for what is special.
    #[must_use]
    pub(crate) fn note(mut self, note: impl Into<String>) -> Case {
        self.note = note.into();
        self
    }
    /// The low bits the entry of a page has been given; None where the page is anybody's.
    #[must_use]
    pub(crate) fn page_bits(&self, at: u32) -> Option<u8> {
        let entry = setup::PAGE_TABLE + (at >> 12) * 4;
        let change = self.changes.iter().rev().find(|(to, _)| *to == entry && self.cpu.paging());
        change.map(|(_, bytes)| bytes[0] & 7)
    }
    /// With a transfer to this target in it.
    #[must_use]
    pub(crate) fn target(mut self, selector: u16, eip: u32) -> Case {
        let short =
            matches!(selector & !7, setup::sel::CODE16 | setup::sel::CODE16_RING3) && selector & 4 == 0;
        self.beyond_limit |= eip > 0xffff && (short || self.cpu.real_addressing());
        self
    }
    /// All that is put into RAM.
    pub(crate) fn writes(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let code = (RAM - self.code.len() as u32, self.code.as_slice());
        std::iter::once(code).chain(self.changes.iter().map(|(at, bytes)| (*at, bytes.as_slice())))
    }
    /// How it can be recognised in a report.
    #[must_use]
    pub(crate) fn describe(&self) -> String {
        let mode = match (self.cpu.protected(), self.cpu.v86()) {
            (false, _) => "real".to_owned(),
            (true, true) => "v86".to_owned(),
            _ => format!("ring {}", self.cpu.cpl),
        };
        let paging = if self.cpu.paging() { ", paging" } else { "" };
        let event = self.interrupt.map_or(String::new(), |v| format!(", interrupt {v:02x}"));
        format!("{} [{}] {mode}{paging}{event}: {:02x?}", self.group, self.note, self.code)
    }
}

/// How a run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// At an address behind RAM.
    Landed,
    /// In `hlt`.
    Halted,
    /// In a shutdown. Of the CPU nothing is known then.
    Shutdown,
    /// It could not be followed, and why.
    Lost(String),
}

/// An access to a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Port {
    pub(crate) port: u16,
    pub(crate) size: u8,
    /// What was written; None: it was read, and all ones was the answer.
    pub(crate) written: Option<u32>,
}

/// What became of a case, but for RAM.
#[derive(Clone)]
pub(crate) struct Outcome {
    pub(crate) end: End,
    pub(crate) cpu: CpuState,
    pub(crate) ports: Vec<Port>,
}

/// Where the two sides differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// How the run ended.
    End,
    /// A register, or what else has a name.
    Named(&'static str),
    /// A segment register, hidden part included.
    Segment(&'static str),
    /// A word of RAM.
    Memory(u32),
}

/// One difference.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Difference {
    pub(crate) place: Place,
    /// The two values, where it is numbers that differ.
    pub(crate) ours: u32,
    pub(crate) theirs: u32,
    /// Of RAM: what neither has written to.
    pub(crate) before: u32,
    /// For the report.
    pub(crate) text: String,
}

impl Difference {
    pub(crate) fn number(place: Place, ours: u32, theirs: u32) -> Difference {
        Difference { place, ours, theirs, before: 0, text: format!("ours {ours:08x}, theirs {theirs:08x}") }
    }
    /// Its place, by name.
    pub(crate) fn kind(&self) -> &'static str {
        match self.place {
            Place::End => "end",
            Place::Named(name) | Place::Segment(name) => name,
            Place::Memory(_) => "memory",
        }
    }
    fn text(place: Place, text: String) -> Difference {
        Difference { place, ours: 0, theirs: 0, before: 0, text }
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.place {
            Place::End => write!(f, "end: {}", self.text),
            Place::Named(name) | Place::Segment(name) => write!(f, "{name}: {}", self.text),
            Place::Memory(at) => write!(f, "[{at:04x}]: {}", self.text),
        }
    }
}

/// What is not compared of a segment: G beside a limit in bytes (KVM recomputes it), the accessed bit of a loaded segment
/// (SVM has it set always), all of what a null selector leaves behind, and whether a TSS is busy (the lab's TR never is).
fn visible(s: &Segment, task: bool) -> Segment {
    if !s.present() {
        return Segment { selector: s.selector, ..Segment::default() };
    }
    let mut attr = s.attr & !SegAttr::GRANULAR;
    if s.attr.contains(SegAttr::CODE_OR_DATA) {
        attr |= SegAttr::ACCESSED;
    }
    if task {
        attr |= SegAttr::RW;
    }
    Segment { attr, ..*s }
}

fn segment(name: &'static str, a: &Segment, b: &Segment, task: bool) -> Option<Difference> {
    let (a, b) = (visible(a, task), visible(b, task));
    let text = |s: &Segment| {
        format!("{:04x} base {:x} limit {:x} attr {:x}", s.selector, s.base, s.limit, s.attr.bits())
    };
    let differs =
        || Difference::text(Place::Segment(name), format!("ours {}, theirs {}", text(&a), text(&b)));
    (a != b).then(differs)
}

/// All that differs in the CPU, and how it ended; empty if nothing does.
#[must_use]
pub(crate) fn compare(case: &Case, ours: &Outcome, theirs: &Outcome) -> Vec<Difference> {
    let mut out = Vec::new();
    if ours.end != theirs.end {
        out.push(Difference::text(Place::End, format!("ours {:?}, theirs {:?}", ours.end, theirs.end)));
    }
    if ours.end == End::Shutdown || theirs.end == End::Shutdown {
        return out;
    }
    let mut number = |name: &'static str, a: u32, b: u32| {
        if a != b {
            out.push(Difference::number(Place::Named(name), a, b));
        }
    };
    let (a, b) = (&ours.cpu, &theirs.cpu);
    for (n, name) in ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"].into_iter().enumerate() {
        if case.ignored_gprs >> n & 1 == 0 {
            number(name, a.gpr[n], b.gpr[n]);
        }
    }
    number("eip", a.eip, b.eip);
    number("eflags", a.eflags, b.eflags);
    number("cpl", a.cpl.into(), b.cpl.into());
    for (name, a, b) in
        [("cr0", a.cr0, b.cr0), ("cr2", a.cr2, b.cr2), ("cr3", a.cr3, b.cr3), ("cr4", a.cr4, b.cr4)]
    {
        number(name, a, b);
    }
    for (n, name) in [(0, "dr0"), (1, "dr1"), (2, "dr2"), (3, "dr3"), (6, "dr6"), (7, "dr7")] {
        number(name, a.dr[n], b.dr[n]);
    }
    for (names, a, b) in
        [(("gdtr base", "gdtr limit"), a.gdtr, b.gdtr), (("idtr base", "idtr limit"), a.idtr, b.idtr)]
    {
        number(names.0, a.base, b.base);
        number(names.1, a.limit.into(), b.limit.into());
    }
    // SVM has one kind of shadow only.
    let (shadow_a, shadow_b) = (a.shadow != Shadow::None, b.shadow != Shadow::None);
    number("shadow", shadow_a.into(), shadow_b.into());
    for (n, name) in ["es", "cs", "ss", "ds", "fs", "gs"].into_iter().enumerate() {
        out.extend(segment(name, &a.seg[n], &b.seg[n], false));
    }
    out.extend(segment("ldtr", &a.ldtr, &b.ldtr, false));
    out.extend(segment("tr", &a.tr, &b.tr, true));
    if ours.ports != theirs.ports {
        let text = format!("ours {:x?}, theirs {:x?}", ours.ports, theirs.ports);
        out.push(Difference::text(Place::Named("ports"), text));
    }
    out
}
