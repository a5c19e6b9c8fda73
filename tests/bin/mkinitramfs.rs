//! Builds the test guest's initramfs: `mkinitramfs BUSYBOX OUTPUT [--add GUEST-PATH=FILE]...`; or archives a directory
//! as it is, not compressed: `mkinitramfs --tree DIRECTORY OUTPUT`.

use std::path::Path;
use std::process::ExitCode;
use subring_tests::{cpio::Cpio, initramfs};

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(line) => {
            println!("mkinitramfs: {line}");
            ExitCode::SUCCESS
        }
        Err(line) => {
            eprintln!("mkinitramfs: {line}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Vec<String>) -> Result<String, String> {
    if let [flag, tree, output] = args.as_slice()
        && flag == "--tree"
    {
        let mut cpio = Cpio::new(Vec::new());
        cpio.tree(Path::new(tree)).map_err(|e| format!("{tree}: {e}"))?;
        let bytes = cpio.finish().map_err(|e| e.to_string())?;
        std::fs::write(output, &bytes).map_err(|e| format!("{output}: {e}"))?;
        return Ok(format!("{output}: {} bytes", bytes.len()));
    }
    let mut plain = Vec::new();
    let mut extra = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        if arg == "--add" {
            let pair = args.next().ok_or("--add needs GUEST-PATH=FILE")?;
            let (path, file) = pair.split_once('=').ok_or("--add needs GUEST-PATH=FILE")?;
            let data = std::fs::read(file).map_err(|e| format!("{file}: {e}"))?;
            extra.push((path.to_owned(), 0o755, data));
        } else {
            plain.push(arg);
        }
    }
    let [busybox, output] = plain.as_slice() else {
        return Err("usage: mkinitramfs BUSYBOX OUTPUT [--add GUEST-PATH=FILE]...".into());
    };
    let binary = std::fs::read(busybox).map_err(|e| format!("{busybox}: {e}"))?;
    // Renamed into place, so that a reader never sees half an archive.
    let part = format!("{output}.{}.part", std::process::id());
    let mut bytes = Vec::new();
    initramfs::write(&mut bytes, &binary, &extra).map_err(|e| format!("{output}: {e}"))?;
    std::fs::write(&part, &bytes)
        .and_then(|()| std::fs::rename(&part, output))
        .map_err(|e| format!("{output}: {e}"))?;
    Ok(format!("{output}: {} applets, {} bytes", initramfs::applets(&binary).len(), bytes.len()))
}
