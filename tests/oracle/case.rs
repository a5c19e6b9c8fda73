//! One guest and one run of it as bytes: what the fuzz target `patch_semantics` is fed.

use super::guest::{BASES, CODE, CODE_LEN, DATA, Plain, STACK};
use super::rig::Rig;
use super::{
    Choices, Honest, Limits, Meddler, NEVER, Native, Passed, Tally, Trace, Useless, compare_memory, follow,
    interpret,
};
use crate::ring0_code::{Random, sel};
use monitor::cpum::{CpuState, eflags, gpr};
use monitor::em::raw::RawEngine;
use std::collections::BTreeMap;

/// Bytes before the code.
pub const HEADER: usize = 48;
/// At most so many bytes of code.
pub const MAX_CODE: usize = 768;
/// What a run may cost.
pub const LIMITS: Limits = Limits { budget: 160, may_be_longer: true, memory: true };
/// Excluded instructions that are replaced by `hlt` before a guest is given up.
const REPLACED: usize = 24;

/// A guest and the state it starts in.
#[derive(Clone, PartialEq, Eq)]
pub struct Case {
    /// 1: paging, 2: CR0.WP, 4: trampolines count, 8: DS and ES have DPL 3; bits 4..6: how raw mode is stopped.
    pub flags: u8,
    /// Where the guest is (low half) and has its alias (high half).
    pub bases: u8,
    /// Where the code begins in the code pages.
    pub at: u16,
    /// Where it is entered.
    pub entry: u8,
    /// Rarity of a waiting interrupt, of interpreting on, of a branch to where the CPU stands: powers of two, 7 and
    /// more for never.
    pub rarity: [u8; 3],
    /// EFLAGS.
    pub eflags: u32,
    /// For what is in memory, and for the choices.
    pub seed: u32,
    /// General registers: see [`Case::register`].
    pub gpr: [u32; 8],
    /// The code.
    pub code: Vec<u8>,
}

/// As `Case::from_hex` reads it.
impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_bytes().iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl Case {
    /// Reads what `Debug` writes.
    #[must_use]
    pub fn from_hex(text: &str) -> Case {
        let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
        Case::from_bytes(&digits.chunks_exact(2).map(|d| d[0] << 4 | d[1]).collect::<Vec<u8>>())
    }

    /// Reads a case; what is missing is zero.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Case {
        let mut h = [0u8; HEADER];
        let n = bytes.len().min(HEADER);
        h[..n].copy_from_slice(&bytes[..n]);
        let word = |at: usize| u32::from_le_bytes([h[at], h[at + 1], h[at + 2], h[at + 3]]);
        let code = &bytes[n..];
        Case {
            flags: h[0],
            bases: h[1],
            at: u16::from_le_bytes([h[2], h[3]]),
            entry: h[4],
            rarity: [h[5], h[6], h[7]],
            eflags: word(8),
            seed: word(12),
            gpr: std::array::from_fn(|i| word(16 + 4 * i)),
            code: code[..code.len().min(MAX_CODE)].to_vec(),
        }
    }

    /// Writes it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut b = vec![self.flags, self.bases];
        b.extend(self.at.to_le_bytes());
        b.push(self.entry);
        b.extend(self.rarity);
        b.extend(self.eflags.to_le_bytes());
        b.extend(self.seed.to_le_bytes());
        for g in self.gpr {
            b.extend(g.to_le_bytes());
        }
        b.extend(&self.code);
        b
    }

    /// A case of generated code in which sensitive instructions are frequent.
    #[must_use]
    pub fn generate(r: &mut Random, wild: bool) -> Case {
        let mut case = Case {
            flags: r.bits() as u8 | 1,
            bases: r.bits() as u8,
            at: if r.one_in(2) { 0xfe0 + r.below(0x40) as u16 } else { r.below(0x3000) as u16 },
            entry: 0,
            rarity: [r.below(6) as u8, 2 + r.below(4) as u8, 1 + r.below(6) as u8],
            eflags: r.bits() as u32,
            seed: r.bits() as u32,
            gpr: std::array::from_fn(|_| r.bits() as u32),
            code: Vec::new(),
        };
        let places = case.plain().places;
        let at = case.at();
        let items = 4 + r.below(40) as usize;
        let code = crate::ring0_code::generate(r, places, at, items, wild);
        case.entry = if r.one_in(2) { 0 } else { r.pick(&code.starts).min(255) as u8 };
        case.code = code.bytes;
        case.code.truncate(MAX_CODE);
        case
    }

    /// Where the code begins in the code pages, in bytes.
    #[must_use]
    pub fn at(&self) -> u32 {
        u32::from(self.at) % (CODE_LEN - 0x400)
    }

    fn plain(&self) -> Plain {
        let base = usize::from(self.bases & 15) % BASES.len();
        let alias = (base + 1 + usize::from(self.bases >> 4) % (BASES.len() - 1)) % BASES.len();
        Plain::new((self.flags & 1 != 0).then_some((BASES[base], BASES[alias])))
    }

    /// A register: three times out of four an address of data, else what it says.
    fn register(value: u32, data: u32) -> u32 {
        if value & 3 == 3 { value.rotate_right(2) } else { data + (value >> 2) % 0x1f00 }
    }

    /// The guest, and its CPU at the start.
    #[must_use]
    pub fn guest(&self) -> (Plain, CpuState) {
        let mut plain = self.plain();
        let mut r = Random(u64::from(self.seed));
        let code = plain.places.code + self.at();
        plain.put(CODE + self.at(), &self.code);
        // What a stray `ret`, `pop ds`, `popf` or far pointer finds.
        let mut word = || match r.below(6) {
            0 => u32::from(r.pick(&sel::LOADS)),
            1 => r.bits() as u32 & 0xcd5 | r.bits() as u32 & 0x200,
            2 => r.bits() as u32,
            _ => code + r.below(self.code.len() as u64 + 1) as u32,
        };
        for i in 0..0x100u32 {
            plain.put(STACK - 0x200 + 4 * i, &word().to_le_bytes());
        }
        for i in 0..0x40u32 {
            plain.put(DATA + 0x7c * i, &word().to_le_bytes());
        }
        let mut cpu = plain.cpu(self.flags & 2 != 0, self.flags & 8 != 0);
        cpu.eflags |= self.eflags & (eflags::ARITH | eflags::IF | eflags::DF);
        cpu.gpr = self.gpr.map(|g| Case::register(g, plain.places.data));
        cpu.gpr[gpr::ESP] = plain.base + STACK - 4 * (self.gpr[gpr::ESP] % 64);
        cpu.eip = code + u32::from(self.entry) % (self.code.len() as u32 + 1);
        (plain, cpu)
    }

    /// The engine hears of every so many instruction boundaries. Never of none: a difference may well be an endless loop.
    #[must_use]
    pub fn every(&self) -> u32 {
        match self.flags >> 4 & 7 {
            1 => 3,
            2 => 7,
            _ => 1,
        }
    }

    /// What happens by the way.
    pub fn choices<'a>(&self, r: &'a mut Random) -> Choices<'a> {
        let [wait, burst, branch] = self.rarity.map(|n| if n & 15 > 6 { NEVER } else { 1 << (n & 15) });
        Choices { r, wait, burst, branch }
    }
}

/// Interprets a guest, replacing what cannot be compared by `hlt` in both memories.
///
/// # Errors
/// When no run can be compared.
pub fn interpret_guest(
    rig: &mut Rig,
    memory: &mut [u8],
    cpu: &CpuState,
    base: u32,
) -> Result<Trace, Useless> {
    let mut last = Useless::Ring;
    for _ in 0..REPLACED {
        rig.fill(memory, cpu);
        match interpret(cpu.clone(), &mut rig.interpreter, LIMITS) {
            Err(Useless::Excluded(eip)) => {
                last = Useless::Excluded(eip);
                let at = (eip.wrapping_sub(base) & 0x3f_ffff) as usize;
                let Some(byte) = memory.get_mut(at) else { break };
                if *byte == 0xf4 {
                    break;
                }
                *byte = 0xf4;
            }
            result => return result,
        }
    }
    Err(last)
}

/// Says whether a run that differed did so because the guest branched to a place in the middle of a known instruction
/// that nobody had found: its bytes are shown as they are, and patches behind them are not what they mean.
#[must_use]
pub fn two_streams(raw: &RawEngine, trace: &Trace) -> bool {
    let unscanned = |p: &Passed| raw.kernel_code.is_unscanned_inside(csam::GuestLin(p.state.eip));
    overlap(trace) || trace.passed.iter().any(unscanned)
}

/// Whether two instructions that were passed have bytes in common. When the first ran, nobody knew of the second, whatever is
/// known at the end. Where an instruction has been replaced by another one, nothing is said.
fn overlap(trace: &Trace) -> bool {
    let mut lengths: BTreeMap<u32, Option<usize>> = BTreeMap::new();
    for p in &trace.passed {
        let length = p.instruction.len();
        let known = lengths.entry(p.state.eip).or_insert(Some(length));
        *known = known.filter(|known| *known == length);
    }
    let spans: Vec<(u32, usize)> = lengths.into_iter().filter_map(|(at, len)| Some((at, len?))).collect();
    spans.windows(2).any(|pair| ((pair[1].0 - pair[0].0) as usize) < pair[0].1)
}

/// Every sensitive instruction that scans found is patched or traps, whether it was executed or not.
///
/// # Errors
/// Which is neither.
pub fn all_guarded(raw: &RawEngine) -> Result<(), String> {
    match raw.kernel_code.unguarded() {
        Some(at) => {
            Err(format!("the site at {at} is neither patched nor trapped\n{}", raw.debug_view(at.0, 16)))
        }
        None => Ok(()),
    }
}

/// Runs a case both ways.
///
/// # Errors
/// What differs, in words.
pub fn run(rig: &mut Rig, case: &Case, meddler: &mut dyn Meddler, tally: &mut Tally) -> Result<(), String> {
    let (mut plain, start) = case.guest();
    let base = plain.base;
    let Ok(trace) = interpret_guest(rig, &mut plain.memory, &start, base) else {
        tally.discarded += 1;
        return Ok(());
    };
    tally.runs += 1;
    tally.instructions += trace.passed.len() as u64;
    *tally.ends.entry(format!("{:x?}", trace.end).chars().take(24).collect()).or_default() += 1;
    rig.worlds.control.every.set(case.every());
    rig.worlds.control.each.set(case.flags >> 4 & 7 == 7);
    let mut raw = rig.engine(case.flags & 4 != 0)?;
    let mut cpu = start;
    let mut r = Random(u64::from(case.seed) << 32 | 1);
    let mut choices = case.choices(&mut r);
    let native = &mut rig.native;
    let mut result = follow(
        Native { raw: &mut raw, cpu: &mut cpu, m: native, base },
        &trace,
        &mut choices,
        meddler,
        tally,
    );
    if result.is_ok() && trace.end != super::End::Budget {
        result = compare_memory(&rig.native, &rig.interpreter, &cpu, trace.end);
    }
    if let Err(why) = &mut result {
        if two_streams(&raw, &trace) {
            tally.two_streams += 1;
            result = Ok(());
        } else {
            *why = format!("{why}\n{}", raw.debug_view(cpu.eip.wrapping_sub(12), 32));
        }
    }
    result = result.and_then(|()| all_guarded(&raw));
    rig.retire(raw);
    result
}

/// The body of the fuzz target `patch_semantics`.
///
/// # Panics
/// When raw mode and the interpreter differ.
pub fn fuzz(rig: &mut Rig, bytes: &[u8]) {
    let case = Case::from_bytes(bytes);
    if let Err(why) = run(rig, &case, &mut Honest, &mut Tally::default()) {
        panic!("{case:?}: {why}");
    }
}
