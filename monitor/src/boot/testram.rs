//! Guest RAM for the loaders' tests: a plain vector.

use super::{GuestMemoryWriter, OutsideRam};
use crate::GuestPhys;

/// RAM of a fixed size.
pub(super) struct TestRam(Vec<u8>);

impl std::fmt::Debug for TestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TestRam({} bytes)", self.0.len())
    }
}

impl TestRam {
    pub(super) fn new(size: usize) -> TestRam {
        TestRam(vec![0; size])
    }
    pub(super) fn bytes(&self, at: u64, len: usize) -> &[u8] {
        &self.0[at as usize..at as usize + len]
    }
    pub(super) fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at, 4).try_into().unwrap())
    }
    pub(super) fn string(&self, at: u64) -> String {
        let bytes = &self.0[at as usize..];
        String::from_utf8(bytes.iter().copied().take_while(|&b| b != 0).collect()).unwrap()
    }
    fn span(&self, at: GuestPhys, len: usize) -> Result<std::ops::Range<usize>, OutsideRam> {
        let refused = OutsideRam { at, len: len as u64 };
        let start = usize::try_from(at.0).map_err(|_| refused)?;
        let end = start.checked_add(len).filter(|&end| end <= self.0.len()).ok_or(refused)?;
        Ok(start..end)
    }
}

impl GuestMemoryWriter for TestRam {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn write(&mut self, at: GuestPhys, data: &[u8]) -> Result<(), OutsideRam> {
        let span = self.span(at, data.len())?;
        self.0[span].copy_from_slice(data);
        Ok(())
    }
    fn read(&self, at: GuestPhys, buf: &mut [u8]) -> Result<(), OutsideRam> {
        buf.copy_from_slice(&self.0[self.span(at, buf.len())?]);
        Ok(())
    }
}
