//! One decoded guest instruction with its bytes.

use crate::CodeInfo;
use csam::{Class, GuestLin, classify_instruction};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, Register};

/// A guest instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Insn {
    pub(crate) at: u32,
    pub(crate) instr: Instruction,
    bytes: [u8; 15],
    len: u8,
    prefixes: u8,
}

impl Insn {
    /// Decodes at a proven instruction start. None if nothing was proven there or it would wrap at 4 GiB.
    pub(crate) fn decode(info: &dyn CodeInfo, at: u32) -> Option<Self> {
        if !info.is_start(GuestLin(at)) {
            return None;
        }
        let mut bytes = [0u8; 15];
        let n = info.bytes(GuestLin(at), &mut bytes).min(15);
        let instr =
            Decoder::with_ip(32, bytes.get(..n)?, u64::from(at), DecoderOptions::NONE).into_iter().next()?;
        if instr.is_invalid() {
            return None;
        }
        let len = u8::try_from(instr.len()).ok()?;
        at.checked_add(u32::from(len))?;
        let is_prefix =
            |b: &u8| matches!(b, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65);
        let prefixes = bytes.iter().take(usize::from(len)).take_while(|b| is_prefix(b)).count() as u8;
        Some(Self { at, instr, bytes, len, prefixes })
    }

    pub(crate) fn len(&self) -> u32 {
        u32::from(self.len)
    }

    /// The EIP behind it.
    pub(crate) fn next(&self) -> u32 {
        self.at.wrapping_add(self.len())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or(&[])
    }

    pub(crate) fn prefixes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.prefixes)).unwrap_or(&[])
    }

    /// From the first opcode byte on.
    pub(crate) fn opcode(&self) -> &[u8] {
        self.bytes().get(usize::from(self.prefixes)..).unwrap_or(&[])
    }

    /// Does no interrupt come directly behind it?
    pub(crate) fn shadows(&self) -> bool {
        match self.instr.mnemonic() {
            Mnemonic::Sti => true,
            Mnemonic::Mov | Mnemonic::Pop => self.instr.op0_register() == Register::SS,
            _ => false,
        }
    }

    pub(crate) fn class(&self) -> Class {
        classify_instruction(&self.instr)
    }

    /// May the instruction behind it be the next one to run, and only a conditional branch decides otherwise?
    pub(crate) fn falls_through(&self) -> bool {
        matches!(self.instr.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch)
    }
}
