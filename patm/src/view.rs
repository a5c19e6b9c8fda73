//! [`MapView`]: a [`CodeMap`] and a way to read original bytes, as [`CodeInfo`].

use crate::CodeInfo;
use alloc::vec::Vec;
use csam::{CodeMap, GuestLin};
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

/// How far around a label its sources are looked for, in bytes: what an 8-bit displacement reaches.
const NEAR: u32 = 132;
/// How far around a site that proved to be hot branches to it are looked for, in bytes.
const FAR: u32 = 2048;

/// What a scan found, for planning patches.
///
/// `CodeMap` does not keep where branches come from. Those that matter for `je 1f; sti; 1:` are short ones, so the
/// neighbourhood is searched; a far branch to such a label is missed and lands on a trapping byte: slow, not wrong.
pub struct MapView<'a, F, W> {
    /// What is known.
    pub map: &'a CodeMap,
    /// Reads original bytes at an address, proven or not; returns how many.
    pub fetch: F,
    /// Whether the code view can be written in a range of bytes.
    pub writable: W,
}

impl<F, W> MapView<'_, F, W>
where
    F: Fn(GuestLin, &mut [u8]) -> usize,
    W: Fn(GuestLin, u32) -> bool,
{
    fn decode(&self, at: GuestLin) -> Option<Instruction> {
        let mut bytes = [0u8; 15];
        let n = (self.fetch)(at, &mut bytes).min(15);
        let mut decoder =
            Decoder::with_ip(32, bytes.get(..n)?, u64::from(at.0), DecoderOptions::NONE).into_iter();
        decoder.next().filter(|i| !i.is_invalid())
    }

    /// Where a direct branch at `at` goes, if one is there.
    fn branches_to(&self, at: GuestLin) -> Option<u32> {
        let i = self.decode(at)?;
        (i.op_count() > 0 && i.op0_kind() == OpKind::NearBranch32).then(|| i.near_branch32())
    }

    /// The first byte of the filler `at` lies in, which begins behind an instruction that never goes on.
    fn filler_start(&self, at: GuestLin) -> Option<GuestLin> {
        let first = (1..=16u32).find_map(|d| {
            let before = GuestLin(at.0.checked_sub(d)?);
            self.map.proven(before).then_some(before.wrapping_add(1))
        })?;
        let ends_there = |(start, len): &(GuestLin, u8)| start.0.wrapping_add(u32::from(*len)) == first.0;
        let (last, _) =
            self.map.instructions_in(GuestLin(first.0.saturating_sub(15)), first).find(ends_there)?;
        let flow = self.decode(last)?.flow_control();
        matches!(flow, FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return)
            .then_some(first)
    }
}

/// Does nothing, whatever state it runs in, or is the `int3` compilers put behind a `ret`.
fn is_filler(i: &Instruction) -> bool {
    match i.mnemonic() {
        Mnemonic::Nop | Mnemonic::Int3 => true,
        Mnemonic::Lea => {
            i.code() == Code::Lea_r32_m
                && i.memory_displacement32() == 0
                && i.memory_base() == i.op0_register()
                && i.memory_index() == Register::None
        }
        _ => false,
    }
}

impl<F, W> CodeInfo for MapView<'_, F, W>
where
    F: Fn(GuestLin, &mut [u8]) -> usize,
    W: Fn(GuestLin, u32) -> bool,
{
    fn bytes(&self, at: GuestLin, buf: &mut [u8]) -> usize {
        let n = (self.fetch)(at, buf).min(buf.len());
        (0..n).take_while(|&i| self.map.proven(at.wrapping_add(i as u32))).count()
    }

    fn is_start(&self, at: GuestLin) -> bool {
        self.map.is_instruction_start(at)
    }

    fn is_target(&self, at: GuestLin) -> bool {
        self.map.is_target(at)
    }

    fn targeted_from_outside(&self, at: GuestLin, lo: GuestLin, hi: GuestLin) -> bool {
        let from = GuestLin(at.0.saturating_sub(NEAR));
        let to = GuestLin(at.0.saturating_add(NEAR));
        let mut inside = false;
        for (source, _) in self.map.instructions_in(from, to) {
            if self.branches_to(source) == Some(at.0) {
                if source < lo || source >= hi {
                    return true;
                }
                inside = true;
            }
        }
        !inside
    }

    fn sources(&self, at: GuestLin) -> Vec<GuestLin> {
        let from = GuestLin(at.0.saturating_sub(FAR));
        let to = GuestLin(at.0.saturating_add(FAR));
        let near = self.map.instructions_in(from, to).map(|(source, _)| source);
        near.filter(|&source| self.branches_to(source) == Some(at.0)).collect()
    }

    fn padding(&self, at: GuestLin, len: u32) -> Option<u32> {
        let mut here = self.filler_start(at)?;
        let end = at.0.checked_add(len)?;
        let mut starts = 0;
        while here.0 < end {
            let i = self.decode(here).filter(is_filler)?;
            for b in 0..i.len() as u32 {
                let byte = here.wrapping_add(b);
                if self.map.proven(byte) || self.map.is_target(byte) {
                    return None;
                }
            }
            if let Some(offset) = here.0.checked_sub(at.0) {
                starts |= 1u32.checked_shl(offset).unwrap_or(0);
            }
            here = here.wrapping_add(i.len() as u32);
        }
        Some(starts)
    }

    fn writable_window(&self, at: GuestLin, len: u32) -> bool {
        (self.writable)(at, len)
    }
}
