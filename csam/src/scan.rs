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
    /// Addresses outside the range that a path goes on at, in the middle of an instruction known there: scanned from them,
    /// the same bytes are code in two ways.
    pub inside: Vec<GuestLin>,
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
            if self.map.is_instruction_start(at) || self.leaves(at) {
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

    /// Is this address, no known start of an instruction, out of range?
    fn leaves(&mut self, at: GuestLin) -> bool {
        if self.options.allows(at) {
            return false;
        }
        if self.map.proven(at) {
            self.report.inside.push(at);
        }
        true
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
            if self.map.is_instruction_start(at) || self.leaves(at) {
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
            if next.0 < at.0 && next.0 != 0 {
                // Nothing executes across the top of the address space (SDM Vol. 3A, 5.3).
                self.report.unreadable.push(at);
                return Ran::PathEnded;
            }
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
            if next.0 == 0 {
                return Ran::PathEnded;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CodeSize, SensitiveKind};
    use alloc::vec;
    use proptest::prelude::*;

    const BASE: GuestLin = GuestLin(0x0010_0000);

    fn scan_at(base: GuestLin, bytes: &[u8], options: &ScanOptions) -> (CodeMap, ScanReport) {
        let mut map = CodeMap::new(CodeSize::Bits32);
        let report = map.scan(base, &mut SliceSource { base, bytes }, options);
        (map, report)
    }

    fn scan(bytes: &[u8]) -> (CodeMap, ScanReport) {
        scan_at(BASE, bytes, &ScanOptions::default())
    }

    fn at(offset: u32) -> GuestLin {
        BASE.wrapping_add(offset)
    }

    #[test]
    fn both_sides_of_a_conditional_jump_are_scanned() {
        // je +2; cli; ret; sti; ret
        let (map, report) = scan(&[0x74, 0x02, 0xfa, 0xc3, 0xfb, 0xc3]);
        let kinds: Vec<_> = map.sites().map(|site| (site.at, site.kind)).collect();
        assert_eq!(kinds, [(at(2), SensitiveKind::Cli), (at(4), SensitiveKind::Sti)]);
        assert!(map.is_target(at(4)) && !map.is_target(at(2)));
        assert_eq!(report.targets, [at(0), at(4)]);
    }

    #[test]
    fn what_follows_a_jump_is_not_code_until_something_leads_there() {
        // jmp +1; cli; ret
        let (map, _) = scan(&[0xeb, 0x01, 0xfa, 0xc3]);
        assert!(!map.proven(at(2)) && map.proven(at(3)));
    }

    #[test]
    fn a_call_is_followed_and_its_return_point_is_a_target() {
        // call +1; ret; cli; ret
        let bytes = [0xe8, 1, 0, 0, 0, 0xc3, 0xfa, 0xc3];
        let (map, _) = scan(&bytes);
        assert!(map.is_target(at(5)) && map.is_target(at(6)) && map.site_at(at(6)).is_some());
        let stay = ScanOptions { follow_calls: false, ..ScanOptions::default() };
        let (map, _) = scan_at(BASE, &bytes, &stay);
        assert!(map.is_target(at(6)) && !map.is_instruction_start(at(6)) && map.is_instruction_start(at(5)));
    }

    #[test]
    fn a_breakpoint_ends_the_path_and_hlt_does_not() {
        let (map, _) = scan(&[0xf4, 0xcc, 0xfa]);
        assert!(map.is_instruction_start(at(1)) && !map.proven(at(2)));
    }

    #[test]
    fn a_jump_into_an_instruction_keeps_both_readings() {
        // je +1; lock inc dword [eax]; ret
        let (map, _) = scan(&[0x74, 0x01, 0xf0, 0xff, 0x00, 0xc3]);
        assert_eq!(map.instruction_length(at(2)), Some(3));
        assert_eq!(map.instruction_length(at(3)), Some(2));
    }

    #[test]
    fn an_instruction_across_two_pages_is_read_from_both() {
        let start = GuestLin(0x1fff);
        let (map, report) = scan_at(start, &[0x0f, 0x22, 0xd8, 0xc3], &ScanOptions::default()); // mov cr3, eax; ret
        assert_eq!(map.site_at(start).map(|site| site.kind), Some(SensitiveKind::MovToCr));
        assert_eq!(report.pages, [1, 2]);
        assert!(map.is_instruction_start(GuestLin(0x2002)));
    }

    #[test]
    fn an_instruction_whose_second_page_is_missing_is_unreadable_not_undecodable() {
        let (map, report) = scan_at(GuestLin(0x1ffe), &[0x0f, 0x22], &ScanOptions::default());
        assert_eq!((report.unreadable, report.undecodable), (vec![GuestLin(0x1ffe)], vec![]));
        assert_eq!(map.instruction_count(), 0);
    }

    #[test]
    fn bytes_that_are_no_instruction_are_reported_where_they_are() {
        let (map, report) = scan(&[0x90, 0x0f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        let (map2, report2) = scan(&[0x90, 0xc5, 0xf8, 0x77, 0x90, 0x90, 0x90, 0x90]); // vzeroupper
        assert!(report.undecodable.is_empty(), "ud0 is an instruction");
        assert_eq!(report2.undecodable, [at(1)]);
        assert_eq!(map2.undecodable().collect::<Vec<_>>(), [at(1)]);
        assert!(map.undecodable().next().is_none());
    }

    #[test]
    fn a_budget_leaves_the_rest_for_the_next_scan() {
        let bytes = [0x90, 0x74, 0x01, 0xc3, 0xfa, 0xc3];
        let mut map = CodeMap::new(CodeSize::Bits32);
        let mut source = SliceSource { base: BASE, bytes: &bytes };
        let one = ScanOptions { budget: 2, ..ScanOptions::default() };
        let report = map.scan(BASE, &mut source, &one);
        assert_eq!(report.unfinished, [at(3), at(4)]);
        map.scan_all(&report.unfinished, &mut source, &ScanOptions { entry_is_target: false, ..one.clone() });
        map.scan_all(&[at(5)], &mut source, &ScanOptions { entry_is_target: false, ..one });
        let (whole, _) = scan(&bytes);
        assert!(whole.pages().eq(map.pages()));
    }

    #[test]
    fn a_path_that_goes_on_inside_an_instruction_out_of_range_is_told() {
        // 0: mov eax, 0x90909090; 5: ret; 6: jmp 2
        let code = [0xb8, 0x90, 0x90, 0x90, 0x90, 0xc3, 0xeb, 0xfa];
        let mut source = SliceSource { base: at(0), bytes: &code };
        let mut map = CodeMap::new(CodeSize::Bits32);
        map.scan(at(0), &mut source, &ScanOptions::default());
        let options = ScanOptions { range: Some(at(6)..at(8)), ..ScanOptions::default() };
        let report = map.scan(at(6), &mut source, &options);
        assert_eq!(report.inside, [at(2)]);
        // Not where an instruction starts, and not where nothing is known.
        let code = [0x90, 0xeb, 0xfd, 0xeb, 0x10];
        let mut source = SliceSource { base: at(0), bytes: &code };
        let mut map = CodeMap::new(CodeSize::Bits32);
        map.scan(at(0), &mut source, &ScanOptions { range: Some(at(0)..at(1)), ..ScanOptions::default() });
        let options = ScanOptions { range: Some(at(1)..at(5)), ..ScanOptions::default() };
        assert_eq!(map.scan(at(1), &mut source, &options).inside, []);
        assert_eq!(map.scan(at(3), &mut source, &options).inside, []);
    }

    #[test]
    fn a_range_is_not_left() {
        let options = ScanOptions { range: Some(at(0)..at(2)), ..ScanOptions::default() };
        let (map, _) = scan_at(BASE, &[0x90, 0x90, 0x90], &options);
        assert_eq!(map.instruction_count(), 2);
    }

    #[test]
    fn a_known_address_ends_a_second_scan_at_once() {
        let bytes = [0x90, 0xfa, 0xc3];
        let (mut map, _) = scan(&bytes);
        let again = map.scan(BASE, &mut SliceSource { base: BASE, bytes: &bytes }, &ScanOptions::default());
        assert_eq!(again, ScanReport::default());
    }

    #[test]
    fn sixteen_bit_code_decodes_in_its_own_size_and_wraps_in_its_segment() {
        // At F000:FFF0 the reset vector: jmp F000:E05B is far; use a near jump backwards: jmp $-0x100.
        let base = GuestLin(0xf_0000);
        let mut bytes = vec![0x90; 0x1_0000];
        bytes[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0x00]); // to offset 0 by wrapping
        bytes[0] = 0xfa;
        bytes[1] = 0xc3;
        let mut map = CodeMap::new(CodeSize::Bits16);
        let options = ScanOptions { cs_base: 0xf_0000, ..ScanOptions::default() };
        map.scan(GuestLin(0xf_fff0), &mut SliceSource { base, bytes: &bytes }, &options);
        assert_eq!(map.instruction_length(GuestLin(0xf_fff0)), Some(3));
        assert!(map.site_at(base).is_some());
    }

    #[test]
    fn nothing_is_scanned_across_the_top_of_the_address_space() {
        let (map, report) = scan_at(GuestLin(0xffff_fffe), &[0x90, 0x0f], &ScanOptions::default());
        assert_eq!(map.instruction_count(), 1);
        assert_eq!(report.unreadable, [GuestLin(0xffff_ffff)]);
        let (map, _) = scan_at(GuestLin(0xffff_ffff), &[0x90], &ScanOptions::default());
        assert_eq!(map.instruction_count(), 1);
    }

    /// Instructions without a flow of their own, and what the table should say.
    fn straight() -> impl Strategy<Value = (Vec<u8>, Option<SensitiveKind>)> {
        use SensitiveKind as K;
        prop::sample::select(vec![
            (vec![0x90], None),
            (vec![0x89, 0xc8], None),
            (vec![0xb8, 0xfa, 0xfb, 0x9c, 0x9d], None),
            (vec![0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0], None),
            (vec![0xfa], Some(K::Cli)),
            (vec![0x9c], Some(K::Pushf)),
            (vec![0x66, 0x9d], Some(K::Popf)),
            (vec![0x0f, 0x20, 0xc0], Some(K::MovFromCr)),
            (vec![0x0f, 0x01, 0x15, 0xfa, 0xfa, 0xfa, 0xfa], Some(K::Lgdt)),
            (vec![0x65, 0x8e, 0x05, 0, 0, 0, 0], Some(K::MovToSreg)),
            (vec![0xcd, 0x80], Some(K::Int)),
            (vec![0xf3, 0x6c], Some(K::StringIn)),
        ])
    }

    proptest! {
        #[test]
        fn every_sensitive_instruction_of_a_straight_line_is_found(
            program in prop::collection::vec(straight(), 0..40),
            base in prop::sample::select(vec![0x1000_u32, 0x1fff, 0x2fe0, 0xfff0_0ff3]),
        ) {
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for (code, kind) in &program {
                let at = GuestLin(base).wrapping_add(bytes.len() as u32);
                expected.extend(kind.map(|kind| (at, code.len() as u8, kind)));
                bytes.extend(code);
            }
            bytes.push(0xc3);
            let (map, report) = scan_at(GuestLin(base), &bytes, &ScanOptions::default());
            let found: Vec<_> = map.sites().map(|site| (site.at, site.len, site.kind)).collect();
            prop_assert_eq!(found, expected);
            prop_assert_eq!(report.instructions.len(), program.len() + 1);
        }

        #[test]
        fn any_bytes_give_a_map_that_agrees_with_them(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            base in prop::sample::select(vec![0_u32, 0xf00, 0xffff_ff00]),
            entry in 0_u32..600,
            wide in any::<bool>(),
        ) {
            let size = if wide { CodeSize::Bits32 } else { CodeSize::Bits16 };
            let mut map = CodeMap::new(size);
            let mut source = SliceSource { base: GuestLin(base), bytes: &bytes };
            map.scan(GuestLin(base.wrapping_add(entry)), &mut source, &ScanOptions::default());
            check(&map, &mut source)?;
        }

        #[test]
        fn forgetting_and_scanning_again_changes_nothing_when_the_bytes_did_not(
            bytes in prop::collection::vec(any::<u8>(), 64..400),
            lo in 0_u32..400,
            len in 0_u32..32,
        ) {
            let base = GuestLin(0x1f80);
            let (mut map, _) = scan_at(base, &bytes, &ScanOptions::default());
            let before = map.clone();
            let mut source = SliceSource { base, bytes: &bytes };
            let forgotten = map.forget_span(base.wrapping_add(lo), base.wrapping_add(lo + len));
            check(&map, &mut source)?;
            let options = ScanOptions { entry_is_target: false, ..ScanOptions::default() };
            map.scan_all(&forgotten, &mut source, &options);
            prop_assert!(before.pages().eq(map.pages()));
            prop_assert!(before.undecodable().eq(map.undecodable()));
        }

        #[test]
        fn after_a_change_the_map_agrees_with_the_new_bytes_and_knows_all_a_fresh_scan_finds(
            bytes in prop::collection::vec(any::<u8>(), 64..400),
            patch in prop::collection::vec(any::<u8>(), 1..16),
            place in 0_usize..384,
        ) {
            let base = GuestLin(0x1f80);
            // So that running into the end of the bytes is not what differs.
            let mut bytes = bytes;
            bytes.extend([0xcc; 16]);
            let (mut map, _) = scan_at(base, &bytes, &ScanOptions::default());
            let place = place.min(bytes.len() - patch.len());
            bytes[place..place + patch.len()].copy_from_slice(&patch);
            let lo = base.wrapping_add(place as u32);
            let forgotten = map.forget_span(lo, lo.wrapping_add(patch.len() as u32));
            let mut source = SliceSource { base, bytes: &bytes };
            map.scan_all(&forgotten, &mut source, &ScanOptions { entry_is_target: false, ..ScanOptions::default() });
            check(&map, &mut source)?;
            let (fresh, _) = scan_at(base, &bytes, &ScanOptions::default());
            for (at, len) in fresh.instructions_in(GuestLin(0), GuestLin(u32::MAX)) {
                prop_assert_eq!(map.instruction_length(at), Some(len));
            }
            for (page, record) in fresh.pages() {
                for offset in record.targets.iter() {
                    prop_assert!(map.is_target(GuestLin(page << 12 | offset as u32)));
                }
            }
        }
    }

    /// Every record of the map follows from the bytes and from the other records.
    fn check(map: &CodeMap, source: &mut SliceSource<'_>) -> Result<(), TestCaseError> {
        let mut proven = alloc::collections::BTreeSet::new();
        let mut starts = 0;
        for (page, record) in map.pages() {
            for offset in record.starts.iter() {
                let at = GuestLin(page << 12 | offset as u32);
                let decoded = decode_alone(at, map.size().bits(), 0, source);
                prop_assert!(decoded.is_ok(), "{at} does not decode");
                let Ok(instruction) = decoded else { continue };
                starts += 1;
                prop_assert_eq!(map.instruction_length(at), Some(instruction.len() as u8));
                let sensitive = matches!(classify_instruction(&instruction), Class::Sensitive(_));
                prop_assert_eq!(map.site_at(at).is_some(), sensitive);
                proven.extend((0..instruction.len() as u32).map(|byte| at.wrapping_add(byte)));
            }
        }
        prop_assert_eq!(starts, map.instruction_count());
        let recorded: alloc::collections::BTreeSet<_> = map
            .pages()
            .flat_map(|(page, record)| {
                record.proven.iter().map(move |byte| GuestLin(page << 12 | byte as u32))
            })
            .collect();
        prop_assert_eq!(proven, recorded);
        Ok(())
    }
}
