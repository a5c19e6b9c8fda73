//! What a run was asked to be: plain data between the command line and the virtual machine.

use std::path::PathBuf;

use bitflags::bitflags;
use csam::GuestPhys;

use crate::cpuid_msr::CpuModel;
use crate::em::engine::EngineKind;
use crate::em::raw::Isolation;

/// One mebibyte in bytes.
pub const MIB: u64 = 1 << 20;
/// Guest RAM when nothing is said, in bytes.
pub const DEFAULT_MEMORY: u64 = 256 * MIB;
/// The least guest RAM, in bytes: nothing we load starts below 1 MiB.
pub const MIN_MEMORY: u64 = 2 * MIB;
/// The most guest RAM, in bytes: what fits under the 32-bit PCI hole.
pub const MAX_MEMORY: u64 = 3072 * MIB;
/// QEMU's default `iobase` of isa-debug-exit, used by the built-in guest.
pub const ISA_DEBUG_EXIT_PORT: u16 = 0x501;

/// Which engine runs guest ring 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineChoice {
    /// The best one this host offers.
    #[default]
    Auto,
    /// Native execution in jailed world processes.
    Raw,
    /// Everything interpreted.
    Interp,
    /// Hardware virtualisation through /dev/kvm.
    Kvm,
    /// Native execution in hardware ring 1.
    Ring1,
}

impl EngineChoice {
    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            EngineChoice::Auto => "auto",
            EngineChoice::Raw => "raw",
            EngineChoice::Interp => "interp",
            EngineChoice::Kvm => "kvm",
            EngineChoice::Ring1 => "ring1",
        }
    }
}

/// Random changes of engines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShuffleConfig {
    /// Guest time between two changes, ms.
    pub interval_ms: u32,
    /// Repeats the order of another run.
    pub seed: Option<u64>,
    /// These and the interpreter, and each of them must be there; empty: all there are.
    pub engines: Vec<EngineKind>,
}

/// Comparison with the interpreter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockstepConfig {
    /// Instructions to compare; the run ends with them.
    pub limit: u64,
}

/// What to boot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// The built-in test guest ([`crate::builtin`]).
    Builtin,
    /// A bzImage, an ELF32 or a Multiboot kernel: the loader tells them apart by content.
    File(PathBuf),
    /// Bytes without a header, entered in flat 32-bit protected mode.
    Raw {
        /// The file.
        file: PathBuf,
        /// Where its first byte goes.
        load: GuestPhys,
        /// Where execution starts.
        entry: GuestPhys,
    },
}

/// A Multiboot module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuleFile {
    /// The file.
    pub path: PathBuf,
    /// Its command line, without the file name.
    pub args: String,
}

/// Where a serial port leads.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum SerialTarget {
    /// Connected to nothing: COM1 exists nevertheless, the others only when they lead somewhere.
    #[default]
    None,
    /// Our standard input and output.
    Stdio {
        /// Ctrl-A sequences are commands to us even when standard input is no terminal (`mon:stdio`).
        escape_always: bool,
    },
    /// Output is written to a file, input is nothing.
    File(PathBuf),
    /// A listening Unix stream socket.
    Unix(PathBuf),
    /// A new pseudo-terminal whose name is printed.
    Pty,
}

bitflags! {
    /// What is traced on standard error.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Trace: u8 {
        /// Every exit from a world.
        const EXITS = 1;
        /// Every patch made, refused or undone.
        const PATCHES = 2;
        /// Every scan.
        const SCANS = 4;
        /// Every page fault, shadow or guest.
        const FAULTS = 8;
        /// Every interrupt and exception delivered to the guest.
        const INT = 16;
    }
}

impl Trace {
    const NAMES: [(&'static str, Trace); 5] = [
        ("exits", Trace::EXITS),
        ("patches", Trace::PATCHES),
        ("scans", Trace::SCANS),
        ("faults", Trace::FAULTS),
        ("int", Trace::INT),
    ];

    /// Parses `exits,int`, or `all`. The error is the line to show.
    pub fn parse(list: &str) -> Result<Trace, String> {
        let mut trace = Trace::empty();
        for word in list.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            if word == "all" {
                trace = Trace::all();
                continue;
            }
            match Trace::NAMES.iter().find(|(name, _)| *name == word) {
                Some((_, bit)) => trace |= *bit,
                None => {
                    return Err(format!(
                        "'{word}' cannot be traced; choose from exits, patches, scans, faults, int, all"
                    ));
                }
            }
        }
        Ok(trace)
    }
}

/// Everything `subring run` was told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunConfig {
    /// What to boot.
    pub kernel: Kernel,
    /// The initial RAM disk (bzImage only).
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub append: String,
    /// Multiboot modules in order.
    pub modules: Vec<ModuleFile>,
    /// Guest RAM in bytes, a multiple of 4 KiB.
    pub memory: u64,
    /// The CPU the guest sees.
    pub cpu: CpuModel,
    /// Which engine.
    pub engine: EngineChoice,
    /// Change between all engines there are.
    pub shuffle: Option<ShuffleConfig>,
    /// Have the interpreter do everything again and compare.
    pub lockstep: Option<LockstepConfig>,
    /// How the raw engine keeps the guest kernel from its users.
    pub isolation: Isolation,
    /// A restart of the guest boots it again; otherwise it ends the run.
    pub reboot: bool,
    /// COM1..COM4.
    pub serial: [SerialTarget; 4],
    /// Where bytes written to port E9h go: standard error if true, nowhere otherwise.
    pub debugcon: bool,
    /// The base port of isa-debug-exit, if the guest may have one.
    pub isa_debug_exit: Option<u16>,
    /// Print the accounting at the end.
    pub stats: bool,
    /// Write the accounting here at the end.
    pub stats_out: Option<PathBuf>,
    /// The guest kernel's symbols: a System.map or an ELF with a symbol table.
    pub symbols: Option<PathBuf>,
    /// What to trace.
    pub trace: Trace,
    /// Write the VGA text screen here at the end; `-` is standard output.
    pub vga_dump: Option<PathBuf>,
}

impl Default for RunConfig {
    /// What `subring run` alone means.
    fn default() -> Self {
        RunConfig {
            kernel: Kernel::Builtin,
            initrd: None,
            append: String::new(),
            modules: Vec::new(),
            memory: DEFAULT_MEMORY,
            cpu: CpuModel::default(),
            engine: EngineChoice::Auto,
            shuffle: None,
            lockstep: None,
            isolation: Isolation::default(),
            reboot: false,
            serial: [
                SerialTarget::Stdio { escape_always: false },
                SerialTarget::None,
                SerialTarget::None,
                SerialTarget::None,
            ],
            debugcon: false,
            isa_debug_exit: Some(ISA_DEBUG_EXIT_PORT),
            stats: false,
            stats_out: None,
            symbols: None,
            trace: Trace::empty(),
            vga_dump: None,
        }
    }
}

/// Parses a memory size as QEMU does: a plain number counts MiB; K, M, G are binary; `size=` may come first and other
/// `,key=value` parts may follow `size=` only if they reserve nothing. The error is the line to show.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    let mut size = text;
    if let Some((first, rest)) = text.split_once(',') {
        size = first;
        for part in rest.split(',') {
            if !matches!(part.split_once('='), Some(("slots", "0"))) {
                return Err(format!("memory option '{part}' is not supported; say only a size"));
            }
        }
    }
    let size = size.strip_prefix("size=").unwrap_or(size);
    let (digits, unit) = match size.char_indices().last() {
        Some((at, 'k' | 'K')) => (&size[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&size[..at], MIB),
        Some((at, 'g' | 'G')) => (&size[..at], 1 << 30),
        _ => (size, MIB),
    };
    let bytes = digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .ok_or_else(|| format!("'{text}' is no memory size; say for example 256, 256M or 1G"))?;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
        return Err(format!(
            "{text} of memory is out of range; a guest can have {} MiB to {} MiB",
            MIN_MEMORY / MIB,
            MAX_MEMORY / MIB
        ));
    }
    Ok(bytes & !0xfff)
}

/// Parses `stdio`, `mon:stdio`, `none`, `null`, `pty`, `file=PATH`, `unix=PATH` and QEMU's `file:PATH` and
/// `unix:PATH,server=on,wait=off`. The error is the line to show.
pub fn parse_serial(text: &str) -> Result<SerialTarget, String> {
    let path_of = |prefix: &str| {
        text.strip_prefix(prefix).and_then(|rest| rest.strip_prefix(['=', ':'])).filter(|p| !p.is_empty())
    };
    match text {
        "stdio" => return Ok(SerialTarget::Stdio { escape_always: false }),
        "mon:stdio" => return Ok(SerialTarget::Stdio { escape_always: true }),
        "none" | "null" => return Ok(SerialTarget::None),
        "pty" => return Ok(SerialTarget::Pty),
        _ => {}
    }
    if let Some(path) = path_of("file") {
        return Ok(SerialTarget::File(path.into()));
    }
    if let Some(path) = path_of("unix") {
        let (path, options) = path.split_once(',').unwrap_or((path, ""));
        for option in options.split(',').filter(|o| !o.is_empty()) {
            if !matches!(option, "server" | "server=on" | "nowait" | "wait=off") {
                return Err(format!("serial option '{option}' is not supported"));
            }
        }
        return Ok(SerialTarget::Unix(path.into()));
    }
    Err(format!("'{text}' is no serial target; say stdio, mon:stdio, none, pty, file=PATH or unix=PATH"))
}

/// Parses a number with an optional `0x`. The error is the line to show.
pub fn parse_number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("'{text}' is no number; say for example 0x100000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes_mean_what_qemu_means() {
        assert_eq!(parse_memory("256"), Ok(256 * MIB));
        assert_eq!(parse_memory("256M"), Ok(256 * MIB));
        assert_eq!(parse_memory("1G"), Ok(1024 * MIB));
        assert_eq!(parse_memory("65536k"), Ok(64 * MIB));
        assert_eq!(parse_memory("size=64M"), Ok(64 * MIB));
        assert_eq!(parse_memory("size=64M,slots=0"), Ok(64 * MIB));
    }

    #[test]
    fn senseless_memory_sizes_are_refused_not_wrapped() {
        for bad in
            ["", "M", "-1", "0", "1", "4G", "99999999999999999999", "18446744073709551615G", "64M,maxmem=1G"]
        {
            assert!(parse_memory(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_serial_target_may_be_spelled_our_way_and_qemus() {
        let file = SerialTarget::File("a.log".into());
        assert_eq!(parse_serial("file=a.log"), Ok(file.clone()));
        assert_eq!(parse_serial("file:a.log"), Ok(file));
        assert_eq!(parse_serial("unix:/tmp/s,server,nowait"), Ok(SerialTarget::Unix("/tmp/s".into())));
        assert_eq!(parse_serial("mon:stdio"), Ok(SerialTarget::Stdio { escape_always: true }));
        assert!(parse_serial("file=").is_err());
        assert!(parse_serial("tcp::1234").is_err());
    }

    #[test]
    fn an_unknown_trace_word_names_the_known_ones() {
        assert_eq!(Trace::parse("exits,int"), Ok(Trace::EXITS | Trace::INT));
        assert_eq!(Trace::parse(""), Ok(Trace::empty()));
        assert!(
            Trace::parse("exits,cpu").is_err_and(|line| line.contains("'cpu'") && line.contains("patches"))
        );
    }
}
