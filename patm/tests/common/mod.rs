//! A scanned piece of code for tests.
#![allow(dead_code, unreachable_pub)]

pub mod machine;

use csam::{CodeMap, CodeSize, GuestLin, ScanOptions, SliceSource};
use patm::{Config, MapView, Patch, Patm};

pub const BASE: u32 = 0xc100_0100;
pub const VCPU: u32 = 0xffe0_0000;

pub fn config() -> Config {
    let tramp_base = patm::good_bases(0xc1).next().unwrap();
    Config { tramp_base, tramp_len: 16 << 20, vcpu_base: VCPU, count_inline: false, ring: 3, keys: None }
}

/// Code at `BASE` and what a scan from its first byte found.
pub struct Scanned {
    pub bytes: Vec<u8>,
    pub map: CodeMap,
}

impl Scanned {
    pub fn new(bytes: &[u8]) -> Self {
        let mut map = CodeMap::new(CodeSize::Bits32);
        let mut source = SliceSource { base: GuestLin(BASE), bytes };
        map.scan(GuestLin(BASE), &mut source, &ScanOptions::default());
        Self { bytes: bytes.to_vec(), map }
    }

    /// Scans from one more entry.
    pub fn scan_from(&mut self, entry: u32) {
        let mut source = SliceSource { base: GuestLin(BASE), bytes: &self.bytes };
        self.map.scan(GuestLin(entry), &mut source, &ScanOptions::default());
    }

    pub fn fetch(&self, at: GuestLin, buf: &mut [u8]) -> usize {
        let rest = at.0.checked_sub(BASE).and_then(|o| self.bytes.get(o as usize..)).unwrap_or(&[]);
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        n
    }

    pub fn patch_one(&self, patm: &mut Patm, site: u32) -> Result<Patch, patm::Refusal> {
        let view = MapView {
            map: &self.map,
            fetch: |at, buf: &mut [u8]| self.fetch(at, buf),
            writable: |_, _| true,
        };
        patm.patch(GuestLin(site), &view).cloned()
    }

    /// Patches every site in ascending order.
    pub fn patch_all(&self, patm: &mut Patm) {
        let sites: Vec<_> = self.map.sites().map(|s| s.at.0).collect();
        for site in sites {
            let _ = self.patch_one(patm, site);
        }
    }

    /// The code view with the patches in: unproven bytes are `hlt`.
    pub fn view(&self, patm: &Patm) -> Vec<u8> {
        let mut view: Vec<u8> = (0..self.bytes.len())
            .map(|i| if self.map.proven(GuestLin(BASE + i as u32)) { self.bytes[i] } else { 0xf4 })
            .collect();
        for write in patm.patches().flat_map(|p| &p.writes) {
            let at = (write.at.0 - BASE) as usize;
            view[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        }
        view
    }
}
