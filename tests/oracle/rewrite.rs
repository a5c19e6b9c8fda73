//! Code that is run, rewritten and run again: what the fuzz target `code_write` is fed.
//!
//! The engine keeps its copies, its patches and what it knows of the code from one run to the next; a stale byte shows as
//! a state the interpreter did not pass.

use super::case::{Case, LIMITS, all_guarded, two_streams};
use super::guest::{CODE, CODE_LEN};
use super::rig::Rig;
use super::{
    End, Honest, Limits, Meddler, NEVER, Native, Tally, Trace, Useless, compare_memory, follow, interpret,
    settle_frame,
};
use crate::ring0_code::Random;
use csam::{GuestLin, GuestPhys};
use monitor::cpum::CpuState;
use monitor::env::{Env, PagingChange, Privilege};

/// Bytes of a phase in the input.
pub const PHASE: usize = 24;
/// Most phases.
pub const PHASES: usize = 6;
/// GuestPhys of the code with which the guest itself writes.
const WRITER: u32 = 0x3_2000;

/// Which way the bytes come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// As a device writes.
    Device,
    /// By an instruction that is interpreted.
    Interpreter,
    /// The same, through the other address of the page.
    Alias,
    /// By stores of code in raw mode.
    Guest,
}

/// A write and where the code is entered after it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Phase {
    /// How.
    pub path: Path,
    /// Where the code is entered, from its beginning.
    pub entry: u8,
    /// Where the bytes go, from 16 bytes before the code.
    pub to: u16,
    /// What is written, 1 to 16 bytes.
    pub bytes: Vec<u8>,
}

/// A guest, and what becomes of its code.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rewrite {
    /// The guest and its first run.
    pub case: Case,
    /// What comes then.
    pub phases: Vec<Phase>,
}

impl Rewrite {
    /// Reads one: a byte with the number of phases, those, and a [`Case`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Rewrite {
        let (&n, mut rest) = bytes.split_first().unwrap_or((&0, &[]));
        let mut phases = Vec::new();
        for _ in 0..usize::from(n) % PHASES + 1 {
            let Some((p, more)) = rest.split_at_checked(PHASE) else { break };
            rest = more;
            let path = [Path::Device, Path::Interpreter, Path::Alias, Path::Guest][usize::from(p[0] & 3)];
            let bytes = p[8..9 + usize::from(p[4] & 15)].to_vec();
            phases.push(Phase { path, entry: p[1], to: u16::from_le_bytes([p[2], p[3]]), bytes });
        }
        Rewrite { case: Case::from_bytes(rest), phases }
    }

    /// Writes it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut b = vec![self.phases.len() as u8 - 1];
        for p in &self.phases {
            b.extend([p.path as u8, p.entry]);
            b.extend(p.to.to_le_bytes());
            b.push(p.bytes.len() as u8 - 1);
            b.extend([0; 3]);
            let mut bytes = p.bytes.clone();
            bytes.resize(16, 0);
            b.extend(bytes);
        }
        b.extend(self.case.to_bytes());
        b
    }

    /// Generated code whose sensitive instructions and their neighbours are rewritten.
    #[must_use]
    pub fn generate(r: &mut Random, wild: bool) -> Rewrite {
        let mut case = Case::generate(r, wild);
        case.flags |= 0x30;
        let len = case.code.len() as u64;
        let phases = (0..1 + r.below(PHASES as u64 - 1))
            .map(|_| {
                let to = r.below(len + 16) as u16;
                let bytes = if r.one_in(3) {
                    // A piece of the code itself: instructions again, perhaps out of step.
                    let from = r.below(len) as usize;
                    case.code[from..case.code.len().min(from + 1 + r.below(16) as usize)].to_vec()
                } else {
                    let what: &[&[u8]] = &[
                        &[0x90],
                        &[0xfa],
                        &[0x9c, 0x9d],
                        &[0xf4],
                        &[0xcc],
                        &[0x90; 5],
                        &[0xe8, 0, 0, 0, 0],
                        &[0xe9, 2, 0, 0, 0],
                        &[0x0f, 0x1f, 0x44, 0, 0],
                        &[0xfb, 0x9c, 0xfa, 0x9d, 0x16, 0x17],
                        &[0x0f, 0x20, 0xd8, 0x90],
                        &[0x66, 0x90],
                    ];
                    r.pick(what).to_vec()
                };
                let path = r.pick(&[Path::Device, Path::Interpreter, Path::Alias, Path::Guest]);
                Phase {
                    path,
                    entry: if r.one_in(2) { case.entry } else { r.below(len.min(256)) as u8 },
                    to,
                    bytes,
                }
            })
            .collect();
        Rewrite { case, phases }
    }
}

/// Interprets from what memory is now; what cannot be compared becomes `hlt` in both memories, as if a device wrote it.
fn interpret_here(rig: &mut Rig, cpu: &CpuState, base: u32, limits: Limits) -> Result<Trace, Useless> {
    let mut before = vec![0u8; rig.interpreter.ram.size() as usize];
    let _all = rig.interpreter.ram.read(0, &mut before);
    for _ in 0..16 {
        match interpret(cpu.clone(), &mut rig.interpreter, limits) {
            Err(Useless::Excluded(eip)) => {
                let at = eip.wrapping_sub(base) & 0x3f_ffff;
                let _all = rig.interpreter.ram.write(0, &before);
                rig.interpreter.ran_natively();
                rig.interpreter.paging_changed(cpu, PagingChange::Cr3);
                if before.get(at as usize).is_none_or(|b| *b == 0xf4) {
                    return Err(Useless::Excluded(eip));
                }
                before[at as usize] = 0xf4;
                for m in [&mut rig.interpreter, &mut rig.native] {
                    m.write_ram(GuestPhys(u64::from(at)), &[0xf4]);
                }
                rig.interpreter.take_code_writes();
            }
            result => return result,
        }
    }
    Err(Useless::Budget)
}

/// Code that stores bytes at a linear address, through SS, which is flat, and halts.
fn writer(to: u32, bytes: &[u8]) -> Vec<u8> {
    let mut code = Vec::new();
    let (words, single) = bytes.split_at(bytes.len() & !3);
    let mut at = to;
    for w in words.chunks(4) {
        code.extend([0x36, 0xc7, 0x05]);
        code.extend(at.to_le_bytes());
        code.extend(w);
        at = at.wrapping_add(4);
    }
    for b in single {
        code.extend([0x36, 0xc6, 0x05]);
        code.extend(at.to_le_bytes());
        code.push(*b);
        at = at.wrapping_add(1);
    }
    code.push(0xf4);
    code
}

/// Runs all phases both ways.
///
/// # Errors
/// What differs, in words.
pub fn run(
    rig: &mut Rig,
    rewrite: &Rewrite,
    meddler: &mut dyn Meddler,
    tally: &mut Tally,
) -> Result<(), String> {
    let case = &rewrite.case;
    let (mut plain, start) = case.guest();
    let base = plain.base;
    for n in 0..PHASES {
        // Each phase's writer has a place of its own: it is not what is tested.
        plain.put(WRITER + 0x100 * n as u32, &[0xf4]);
    }
    rig.fill(&plain.memory, &start);
    rig.worlds.control.every.set(case.every());
    rig.worlds.control.each.set(false);
    let mut raw = rig.engine(case.flags & 4 != 0)?;
    let mut r = Random(u64::from(case.seed) << 32 | 2);
    let code = plain.places.code + case.at();
    let mut jobs = vec![None];
    jobs.extend(rewrite.phases.iter().map(Some));
    let mut result = Ok(());
    for (number, phase) in jobs.into_iter().enumerate() {
        let mut cpu = start.clone();
        if let Some(p) = phase {
            cpu.eip = code + u32::from(p.entry) % (case.code.len() as u32 + 1);
            let last = CODE_LEN - 16 - p.bytes.len() as u32;
            let offset =
                (case.at().saturating_sub(16) + u32::from(p.to) % (case.code.len() as u32 + 32)).min(last);
            let lin = plain.places.code + offset;
            let through = if p.path == Path::Alias { plain.places.alias + offset } else { lin };
            if p.path == Path::Guest {
                let at = WRITER + 0x100 * (number as u32 - 1);
                let code = writer(lin, &p.bytes);
                let mut writing = cpu.clone();
                writing.eip = base + at;
                for m in [&mut rig.interpreter, &mut rig.native] {
                    m.write_ram(GuestPhys(u64::from(at)), &code);
                }
                let Ok(trace) = interpret(writing.clone(), &mut rig.interpreter, LIMITS) else { break };
                let mut choices = super::Choices { r: &mut r, wait: NEVER, burst: NEVER, branch: NEVER };
                result = follow(
                    Native { raw: &mut raw, cpu: &mut writing, m: &mut rig.native, base },
                    &trace,
                    &mut choices,
                    meddler,
                    tally,
                );
            } else {
                for m in [&mut rig.interpreter, &mut rig.native] {
                    let mut done = 0;
                    while done < p.bytes.len() {
                        let at = offset + done as u32;
                        let n = (p.bytes.len() - done).min(0x1000 - (at as usize & 0xfff));
                        let piece = &p.bytes[done..done + n];
                        if p.path == Path::Device {
                            m.write_ram(GuestPhys(u64::from(CODE + at)), piece);
                        } else {
                            let to = GuestLin(through + done as u32);
                            let _mapped = m.write(&cpu, to, piece, Privilege::Supervisor);
                        }
                        done += n;
                    }
                }
            }
            if result.is_err() {
                break;
            }
        }
        let Ok(trace) = interpret_here(rig, &cpu, base, LIMITS) else {
            tally.discarded += 1;
            break;
        };
        tally.runs += 1;
        tally.instructions += trace.passed.len() as u64;
        let mut choices = case.choices(&mut r);
        let native = &mut rig.native;
        native.paging_changed(&cpu, PagingChange::Cr3);
        result = follow(
            Native { raw: &mut raw, cpu: &mut cpu, m: native, base },
            &trace,
            &mut choices,
            meddler,
            tally,
        );
        if result.is_ok() && trace.end != End::Budget {
            result = compare_memory(&rig.native, &rig.interpreter, &cpu, trace.end);
            settle_frame(&mut rig.native, &rig.interpreter, &cpu, trace.end);
        }
        if let Err(why) = &mut result {
            if two_streams(&raw, &trace) {
                tally.two_streams += 1;
                result = Ok(());
            } else {
                *why = format!("phase {number}: {why}\n{}", raw.debug_view(cpu.eip.wrapping_sub(12), 32));
            }
            break;
        }
        if trace.end == End::Budget {
            // The two are not at the same place.
            break;
        }
    }
    result = result.and_then(|()| all_guarded(&raw));
    rig.retire(raw);
    result
}

/// The body of the fuzz target `code_write`.
///
/// # Panics
/// When raw mode and the interpreter differ.
pub fn fuzz(rig: &mut Rig, bytes: &[u8]) {
    let rewrite = Rewrite::from_bytes(bytes);
    if let Err(why) = run(rig, &rewrite, &mut Honest, &mut Tally::default()) {
        panic!("{rewrite:x?}: {why}");
    }
}
