//! The kernel loaders on any file: an error or a start state inside guest RAM, no panic.

use arbitrary::{Arbitrary, Unstructured};
use csam::GuestPhys;
use monitor::boot::{BootOptions, GuestMemoryWriter, Module, OutsideRam, load};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    mib: u8,
    cmdline: u8,
    initrd: Option<u16>,
    module: Option<u16>,
    file: &'a [u8],
}

/// Guest RAM that keeps what is written sparse: files may name any address.
struct Ram {
    size: u64,
    pages: std::collections::HashMap<u64, Box<[u8; 4096]>>,
}

impl Ram {
    fn check(&self, at: GuestPhys, len: usize) -> Result<(), OutsideRam> {
        let len = len as u64;
        let inside = at.0.checked_add(len).is_some_and(|end| end <= self.size);
        inside.then_some(()).ok_or(OutsideRam { at, len })
    }
}

impl GuestMemoryWriter for Ram {
    fn size(&self) -> u64 {
        self.size
    }
    fn write(&mut self, at: GuestPhys, data: &[u8]) -> Result<(), OutsideRam> {
        self.check(at, data.len())?;
        for (n, b) in data.iter().enumerate() {
            let a = at.0 + n as u64;
            self.pages.entry(a >> 12).or_insert_with(|| Box::new([0; 4096]))[(a & 0xfff) as usize] = *b;
        }
        Ok(())
    }
    fn read(&self, at: GuestPhys, buf: &mut [u8]) -> Result<(), OutsideRam> {
        self.check(at, buf.len())?;
        for (n, b) in buf.iter_mut().enumerate() {
            let a = at.0 + n as u64;
            *b = self.pages.get(&(a >> 12)).map_or(0, |p| p[(a & 0xfff) as usize]);
        }
        Ok(())
    }
}

/// The body of the fuzz target.
///
/// # Panics
/// When it finds something.
pub fn fuzz(bytes: &[u8]) {
    let Ok(i) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let mut ram = Ram { size: u64::from(i.mib) << 20, pages: Default::default() };
    let options = BootOptions {
        cmdline: "x".repeat(usize::from(i.cmdline)),
        initrd: i.initrd.map(|n| vec![0x5a; usize::from(n)]),
        modules: i
            .module
            .map(|n| Module { cmdline: "m".into(), data: vec![1; usize::from(n)] })
            .into_iter()
            .collect(),
        raw: None,
    };
    if let Err(e) = load(i.file, &options, &mut ram) {
        let line = e.to_string();
        assert!(!line.is_empty() && !line.contains('\n'), "one line: {line:?}");
    }
}
