//! The scan: recursive descent from an entry address through a worklist, adding what is new to a [`CodeMap`].
//!
//! 1. Take an address from the worklist. An instruction already known there ends the path.
//! 2. Decode, record, classify; put a direct branch's target on the worklist; go on where control falls through.
//! 3. End the path at jumps, returns, `ud2` and `int3`, and where bytes do not decode or are not there.
//!
//! `int3` ends a path on purpose: a guest that is rewriting an instruction puts one over its first byte, and what
//! follows is then the middle of an instruction. Where the handler does return behind it, the address is met when it
//! is executed. `hlt`, `int n` and calls fall through. Indirect targets are unknown until they are executed.

use alloc::vec::Vec;
use core::ops::Range;

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, OpKind};

use crate::GuestLin;
use crate::codemap::{CodeMap, MAX_INSTRUCTION, SensitiveSite};
use crate::sensitivity::{Class, classify_instruction};

const PAGE: usize = 4096;

/// Where the scanner reads code from.
pub trait CodeSource {
    /// Copies bytes from `at` on into `buf` and returns how many could be read; 0 when there is nothing at `at`.
    fn fetch(&mut self, at: GuestLin, buf: &mut [u8]) -> usize;
}

impl<F: FnMut(GuestLin, &mut [u8]) -> usize> CodeSource for F {
    fn fetch(&mut self, at: GuestLin, buf: &mut [u8]) -> usize {
        self(at, buf)
    }
}

/// Bytes at an address.
#[derive(Clone, Copy, Debug)]
pub struct SliceSource<'a> {
    /// The address of the first byte.
    pub base: GuestLin,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl CodeSource for SliceSource<'_> {
    fn fetch(&mut self, at: GuestLin, buf: &mut [u8]) -> usize {
        let Some(offset) = at.0.checked_sub(self.base.0) else { return 0 };
        let rest = self.bytes.get(offset as usize..).unwrap_or_default();
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        count
    }
}

/// Where control goes after an instruction, in offsets of the code segment turned into linear addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// To the next instruction only (also after `int n`, `into`, `hlt`, `syscall`, `vmcall`).
    Next,
    /// To the target only.
    Jump(GuestLin),
    /// To the target or the next instruction (`jcc`, `loop`, `jcxz`, `xbegin`).
    Conditional(GuestLin),
    /// To the target, which returns to the next instruction.
    Call(GuestLin),
    /// Somewhere, which returns to the next instruction (indirect and far calls).
    CallUnknown,
    /// Somewhere (indirect and far jumps, returns).
    Unknown,
    /// Nowhere by itself: `ud2`, `int3`, `int1`.
    Stops,
}

impl Flow {
    /// The flow of a decoded instruction whose code segment has this base.
    #[must_use]
    pub fn of(instruction: &Instruction, cs_base: u32) -> Self {
        let near = matches!(
            instruction.op0_kind(),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
        );
        // In 16- and 32-bit code the target is an offset of at most 32 bits.
        let target = GuestLin(cs_base.wrapping_add(instruction.near_branch_target() as u32));
        match instruction.flow_control() {
            FlowControl::Next => Self::Next,
            FlowControl::UnconditionalBranch if near => Self::Jump(target),
            FlowControl::ConditionalBranch => Self::Conditional(target),
            FlowControl::Call if near => Self::Call(target),
            // Far calls return; `syscall`, `vmcall` and their like come back behind themselves too.
            FlowControl::Call | FlowControl::IndirectCall => Self::CallUnknown,
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return => {
                Self::Unknown
            }
            FlowControl::XbeginXabortXend if near => Self::Conditional(target),
            FlowControl::XbeginXabortXend => Self::Next,
            FlowControl::Interrupt => match instruction.code() {
                iced_x86::Code::Int3 | iced_x86::Code::Int1 => Self::Stops,
                _ => Self::Next,
            },
            FlowControl::Exception => Self::Stops,
        }
    }
}

/// How far a scan goes.
#[derive(Clone, Debug)]
pub struct ScanOptions {
    /// At most this many new instructions; what is left is in [`ScanReport::unfinished`].
    pub budget: usize,
    /// Scan the functions that direct calls lead to. Their entries are recorded as targets in any case.
    pub follow_calls: bool,
    /// Only addresses in here.
    pub range: Option<Range<GuestLin>>,
    /// The base of the code segment: what is added to branch offsets.
    pub cs_base: u32,
    /// The entries were jumped to, so they are branch targets. False for scanning forgotten instructions again.
    pub entry_is_target: bool,
}

impl Default for ScanOptions {
    fn default() -> Self {
        Self { budget: usize::MAX, follow_calls: true, range: None, cs_base: 0, entry_is_target: true }
    }
}

impl ScanOptions {
    fn allows(&self, at: GuestLin) -> bool {
        self.range.as_ref().is_none_or(|range| range.contains(&at))
    }
}

/// What one scan added.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct ScanReport {
    /// The new instructions and their lengths, in the order they were found.
    pub instructions: Vec<(GuestLin, u8)>,
    /// The sensitive ones among them.
    pub sites: Vec<SensitiveSite>,
    /// Addresses that became branch targets.
    pub targets: Vec<GuestLin>,
    /// Numbers (address / 4096) of the pages that hold a byte of a new instruction, ascending.
    pub pages: Vec<u32>,
    /// Where a path met bytes that are no instruction: executing them raises #UD (or #GP beyond 15 bytes).
    pub undecodable: Vec<GuestLin>,
    /// Where a path met bytes that cannot be read: an unmapped page, the end of the file.
    pub unreadable: Vec<GuestLin>,
    /// Addresses not looked at because the budget was used up.
    pub unfinished: Vec<GuestLin>,
}

impl CodeMap {
    /// Scans from `entry` and adds what is new.
    pub fn scan(
        &mut self,
        entry: GuestLin,
        source: &mut dyn CodeSource,
        options: &ScanOptions,
    ) -> ScanReport {
        self.scan_all(&[entry], source, options)
    }

    /// Scans from each of the entries and adds what is new.
    pub fn scan_all(
        &mut self,
        entries: &[GuestLin],
        source: &mut dyn CodeSource,
        options: &ScanOptions,
    ) -> ScanReport {
        let mut scan = Scan {
            map: self,
            options,
            report: ScanReport::default(),
            // The first entry is scanned first.
            work: entries.iter().rev().copied().collect(),
        };
        if options.entry_is_target {
            for entry in entries {
                scan.target(*entry);
            }
        }
        scan.run(source);
        let mut report = scan.report;
        report.pages.sort_unstable();
        report.pages.dedup();
        report
    }
}

struct Scan<'a> {
    map: &'a mut CodeMap,
    options: &'a ScanOptions,
    report: ScanReport,
    work: Vec<GuestLin>,
}

/// How a run over one page's bytes ended.
enum Ran {
    /// Take the next address from the worklist.
    PathEnded,
    /// Control goes on at an address outside the window.
    LeftWindow(GuestLin),
}

impl Scan<'_> {
    fn run(&mut self, source: &mut dyn CodeSource) {
        // One page is read at a time: a page is the unit that is mapped or not.
        let mut window = [0; PAGE];
        let mut window_at = GuestLin(0);
        let mut window_len = 0;
        while let Some(at) = self.work.pop() {
            if self.map.is_instruction_start(at) || !self.options.allows(at) {
                continue;
            }
            if self.report.instructions.len() >= self.options.budget {
                self.report.unfinished.push(at);
                continue;
            }
            if (at.0.wrapping_sub(window_at.0) as usize) >= window_len {
                (window_at, window_len) = fetch_page(source, at, &mut window);
                if window_len == 0 {
                    self.report.unreadable.push(at);
                    continue;
                }
            }
            if let Ran::LeftWindow(at) = self.run_window(at, window_at, &window[..window_len], source) {
                self.work.push(at);
            }
        }
        self.report.unfinished.sort_unstable();
        self.report.unfinished.dedup();
    }

    /// Follows one path from `start` as far as the window's bytes go.
    fn run_window(
        &mut self,
        start: GuestLin,
        window_at: GuestLin,
        window: &[u8],
        source: &mut dyn CodeSource,
    ) -> Ran {
        let cs_base = self.options.cs_base;
        let bits = self.map.size().bits();
        let mut at = start;
        let mut decoder = Decoder::new(bits, window, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let position = at.0.wrapping_sub(window_at.0) as usize;
        if decoder.set_position(position).is_err() {
            return Ran::LeftWindow(at);
        }
        decoder.set_ip(u64::from(at.0.wrapping_sub(cs_base)));
        loop {
            if self.map.is_instruction_start(at) || !self.options.allows(at) {
                return Ran::PathEnded;
            }
            if self.report.instructions.len() >= self.options.budget {
                self.report.unfinished.push(at);
                return Ran::PathEnded;
            }
            decoder.decode_out(&mut instruction);
            let mut left = !decoder.can_decode();
            if decoder.last_error() == DecoderError::NoMoreBytes {
                // The instruction runs over the end of the page.
                left = true;
                match decode_alone(at, bits, cs_base, source) {
                    Ok(whole) => instruction = whole,
                    Err(DecoderError::NoMoreBytes) => {
                        self.report.unreadable.push(at);
                        return Ran::PathEnded;
                    }
                    Err(_) => return self.undecodable(at),
                }
            } else if instruction.is_invalid() {
                return self.undecodable(at);
            }
            let next = at.wrapping_add(instruction.len() as u32);
            self.add(at, next, &instruction);
            match Flow::of(&instruction, cs_base) {
                Flow::Next => {}
                Flow::Jump(target) => {
                    self.target(target);
                    self.work.push(target);
                    return Ran::PathEnded;
                }
                Flow::Conditional(target) => {
                    self.target(target);
                    self.work.push(target);
                }
                Flow::Call(target) => {
                    self.target(target);
                    self.target(next);
                    if self.options.follow_calls {
                        self.work.push(target);
                    }
                }
                Flow::CallUnknown => self.target(next),
                Flow::Unknown | Flow::Stops => return Ran::PathEnded,
            }
            if left {
                return Ran::LeftWindow(next);
            }
            at = next;
        }
    }

    fn add(&mut self, at: GuestLin, next: GuestLin, instruction: &Instruction) {
        let len = instruction.len() as u8;
        let site = match classify_instruction(instruction) {
            Class::Sensitive(kind) => Some(SensitiveSite { at, len, kind, code: instruction.code() }),
            Class::Innocuous | Class::Trapping => None,
        };
        self.map.add_instruction(at, len, site);
        self.report.instructions.push((at, len));
        self.report.sites.extend(site);
        for page in [at.page_number(), next.wrapping_add(u32::MAX).page_number()] {
            if self.report.pages.last() != Some(&page) {
                self.report.pages.push(page);
            }
        }
    }

    fn target(&mut self, at: GuestLin) {
        if self.map.add_target(at) {
            self.report.targets.push(at);
        }
    }

    fn undecodable(&mut self, at: GuestLin) -> Ran {
        self.map.add_undecodable(at);
        self.report.undecodable.push(at);
        Ran::PathEnded
    }
}

/// Fills the window with the page of `at`, or with what there is from `at` on when the page does not start readable.
fn fetch_page(source: &mut dyn CodeSource, at: GuestLin, window: &mut [u8; PAGE]) -> (GuestLin, usize) {
    let base = at.page_base();
    let len = source.fetch(base, window).min(PAGE);
    if at.page_offset() < len {
        return (base, len);
    }
    let rest = PAGE - at.page_offset();
    let len = source.fetch(at, &mut window[..rest]).min(rest);
    (at, len)
}

/// Decodes one instruction from bytes fetched for it alone.
fn decode_alone(
    at: GuestLin,
    bits: u32,
    cs_base: u32,
    source: &mut dyn CodeSource,
) -> Result<Instruction, DecoderError> {
    let mut bytes = [0; MAX_INSTRUCTION as usize];
    // Two fetches, so that a source that stops at the end of a page serves as well.
    let first = (PAGE - at.page_offset()).min(bytes.len());
    let mut len = source.fetch(at, &mut bytes[..first]).min(first);
    if len == first && first < bytes.len() {
        len += source.fetch(at.wrapping_add(first as u32), &mut bytes[first..]).min(bytes.len() - first);
    }
    let ip = u64::from(at.0.wrapping_sub(cs_base));
    let mut decoder = Decoder::with_ip(bits, &bytes[..len], ip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Ok(instruction),
        error => Err(error),
    }
}
