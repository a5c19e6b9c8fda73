//! Both sides of a case.

use super::case::{Case, Difference, End, Outcome, Place, compare};
use super::defects::Defect;
use super::interpreter::Interpreter;
use super::kvm::Kvm;
use super::setup::{self, DATA, GDT, IDT, LDT, PAGE_DIRECTORY, PAGE_TABLE, RAM, STACKS, TSS32};
use host_driver_shim::kvm::KvmError;

/// Where cases write: compared each time.
const BUSY: [(u32, u32); 10] = [
    (GDT, IDT),
    (LDT, LDT + 0x100),
    (TSS32, TSS32 + 0x600),
    (STACKS + 0x380, STACKS + 0xc80),
    (STACKS + 0x1380, STACKS + 0x1c80),
    (STACKS + 0x2380, STACKS + 0x2c80),
    (STACKS + 0x3380, STACKS + 0x3c80),
    (DATA, DATA + 0x100),
    (PAGE_TABLE, PAGE_TABLE + 0x40),
    (PAGE_DIRECTORY, PAGE_DIRECTORY + 0x40),
];
/// Once in so many cases all of RAM is compared: reading it is what costs most.
const ALL: u64 = 64;

/// The interpreter's machine and KVM's.
pub(crate) struct Rig {
    ours: Interpreter,
    kvm: Kvm,
    /// RAM between cases.
    base: Vec<u8>,
    words: Vec<u64>,
    /// Cases so far.
    count: u64,
    /// The last case changed page tables.
    tables: bool,
}

/// What became of a case on both sides, and how that differs.
pub(crate) struct Result2 {
    pub(crate) ours: Outcome,
    pub(crate) theirs: Outcome,
    pub(crate) differences: Vec<Difference>,
}

impl Rig {
    pub(crate) fn new() -> Result<Rig, KvmError> {
        let ours = Interpreter::new().map_err(|why| KvmError { what: "RAM", why })?;
        let kvm = Kvm::new()?;
        let base = setup::memory();
        for ram in [ours.ram(), kvm.ram()] {
            ram.write(0, &base).expect("RAM has this size");
        }
        let word = |b: &[u8]| b.iter().rev().fold(0, |v, byte| v << 8 | u64::from(*byte));
        let words = base.chunks(8).map(word).collect();
        Ok(Rig { ours, kvm, base, words, count: 0, tables: false })
    }

    /// From here on this is wrong with the interpreter.
    pub(crate) fn set_defect(&mut self, defect: Option<Defect>) {
        self.ours.set_defect(defect);
    }

    /// Runs a case on both sides. None: it ran into RAM, where it does not end.
    pub(crate) fn run(&mut self, case: &Case) -> Result<Option<Result2>, KvmError> {
        let mut tables = false;
        for (at, bytes) in case.writes() {
            tables |= (PAGE_TABLE..PAGE_DIRECTORY + 0x1000).contains(&at);
            for ram in [self.ours.ram(), self.kvm.ram()] {
                ram.write(at.into(), bytes).expect("cases change RAM");
            }
        }
        let ours = self.ours.run(case);
        if matches!(ours.end, End::Lost(_)) {
            for ram in [self.ours.ram(), self.kvm.ram()] {
                ram.write(0, &self.base).expect("RAM has this size");
            }
            self.tables |= tables;
            return Ok(None);
        }
        let theirs = self.kvm.run(case, tables || self.tables)?;
        self.tables = tables;
        let mut differences = compare(case, &ours, &theirs);
        let shut_down = ours.end == End::Shutdown || theirs.end == End::Shutdown;
        self.count += 1;
        let everywhere = [(0, RAM)];
        // Handlers beyond their segment's limit fault until the stack is all over RAM.
        let ranges =
            if case.beyond_limit || matches!(theirs.end, End::Lost(_)) || self.count.is_multiple_of(ALL) {
                &everywhere[..]
            } else {
                &BUSY
            };
        for &(from, to) in ranges {
            self.compare_memory(from, to, |at, a, b, before| {
                if !shut_down && differences.len() < 60 {
                    differences.push(Difference { before, ..Difference::number(Place::Memory(at), a, b) });
                }
            });
        }
        for (at, bytes) in case.writes() {
            for ram in [self.ours.ram(), self.kvm.ram()] {
                let base = &self.base[at as usize..at as usize + bytes.len()];
                ram.write(at.into(), base).expect("cases change RAM");
            }
        }
        Ok(Some(Result2 { ours, theirs, differences }))
    }

    /// Finds where RAM differs, and puts back what it was.
    fn compare_memory(&self, from: u32, to: u32, mut differs: impl FnMut(u32, u32, u32, u32)) {
        let (ours, theirs) = (self.ours.ram(), self.kvm.ram());
        let words = &self.words[from as usize / 8..to as usize / 8];
        for (at, &base) in (u64::from(from)..).step_by(8).zip(words) {
            let a = ours.read_u64(at).expect("inside");
            let b = theirs.read_u64(at).expect("inside");
            if a == base && b == base {
                continue;
            }
            for half in [0, 32] {
                let [a, b, base] = [a, b, base].map(|word| (word >> half) as u32);
                if a != b {
                    differs(at as u32 + half / 8, a, b, base);
                }
            }
            for ram in [ours, theirs] {
                ram.write_u64(at, base).expect("inside");
            }
        }
    }
}
