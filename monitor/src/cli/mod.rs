//! The command line: parsed with clap into plain data.

mod qemu;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use csam::GuestPhys;

use crate::config::{
    self, DEFAULT_MEMORY, EngineChoice, ISA_DEBUG_EXIT_PORT, Kernel, LockstepConfig, ModuleFile, RunConfig,
    SerialTarget, ShuffleConfig, Trace,
};
use crate::cpuid_msr::CpuModel;
use crate::em::engine::EngineKind;
use crate::em::raw::Isolation;
use crate::outcome::ExitCode;
use crate::scan::ScanOptions;

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Run a guest.
    Run(Box<RunConfig>),
    /// Scan a kernel offline.
    Scan(ScanOptions),
    /// Say what this host can do.
    Doctor {
        /// As JSON.
        json: bool,
    },
    /// Print the tables of a statistics file.
    Report {
        /// What `--stats-out` wrote.
        file: PathBuf,
        /// The guest kernel's symbols.
        symbols: Option<PathBuf>,
    },
    /// Write the built-in guest as a Multiboot kernel file.
    BuiltinImage {
        /// Where to.
        file: PathBuf,
    },
}

/// What to show instead of doing something.
#[derive(Debug)]
pub enum Refusal {
    /// Help or version: standard output, exit code 0.
    Shown(String),
    /// A mistake: one line for standard error, exit code 2.
    Mistake(String),
}

const EXAMPLES: &str = "\
Examples:
  subring run                                     the built-in guest: checks itself, prints a verdict
  subring run vmlinuz --initrd initrd.img --append 'console=ttyS0'
  subring run -kernel vmlinuz -initrd initrd.img -append console=ttyS0 -m 256 -nographic
  subring run kernel.elf --module driver.bin,verbose --stats
  subring run --raw boot.bin --load-addr 0x100000 --entry 0x100020
  subring run vmlinuz --engine-shuffle 50         moves the running guest from engine to engine
  subring run vmlinuz --lockstep interp --lockstep-limit 50000000
  subring run vmlinuz --stats-out run.json; subring report run.json --symbols System.map

On a terminal: Ctrl-A x quits, Ctrl-A c opens the console (and closes it), Ctrl-A b sends a break,
Ctrl-A a sends Ctrl-A, Ctrl-A h shows this. If standard input is no terminal, Ctrl-A means nothing special unless
--serial mon:stdio (or -nographic) is given; the end of standard input does not end a run.
";

fn exit_codes() -> String {
    let lines = ExitCode::ALL.map(|(code, what)| format!("  {:>3}  {what}\n", code as u8));
    format!("Exit codes:\n{}", lines.concat())
}

#[derive(Parser)]
#[command(
    name = "subring",
    version,
    about = "Runs unmodified 32-bit x86 guest kernels natively, without VT-x, as an ordinary user",
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a guest; without a kernel, the built-in one
    #[command(after_help = EXAMPLES)]
    Run(Box<RunArgs>),
    /// Scan a kernel for sensitive instructions, offline
    Scan(ScanArgs),
    /// Say what this host can do, why it matters and what to do about it
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the tables of a statistics file
    Report {
        /// What `run --stats-out` wrote
        file: PathBuf,
        /// The guest kernel's symbols: System.map, or vmlinux with a symbol table
        #[arg(long, value_name = "FILE")]
        symbols: Option<PathBuf>,
    },
    /// Write the built-in guest as a Multiboot kernel file
    #[command(hide = true)]
    BuiltinImage {
        /// Where to
        file: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineArg {
    Auto,
    Raw,
    Interp,
    Kvm,
    Ring1,
}

#[derive(Clone, Copy, ValueEnum)]
enum ShuffleArg {
    Raw,
    Ring1,
    Kvm,
    Interp,
}

impl ShuffleArg {
    fn kind(self) -> EngineKind {
        match self {
            ShuffleArg::Raw => EngineKind::Raw,
            ShuffleArg::Ring1 => EngineKind::Ring1,
            ShuffleArg::Kvm => EngineKind::Kvm,
            ShuffleArg::Interp => EngineKind::Interp,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum LockstepArg {
    /// The interpreter
    Interp,
}

#[derive(Clone, Copy, ValueEnum)]
enum IsolationArg {
    /// In one world: fast. By limits of data segments, which stop accidents; on ring1 by pages
    Limits,
    /// By limits of code segments, too: stray jumps fault where they land; programs are some 10 % slower
    LimitsCode,
    /// Withstands hostile guest users: in one world by a memory protection key, or as worlds where the CPU has none
    Strict,
    /// The same, always by worlds of their own
    Worlds,
}

#[derive(Args)]
struct RunArgs {
    /// bzImage, ELF32 or Multiboot kernel (also -kernel FILE); the built-in guest if missing
    #[arg(value_name = "KERNEL", conflicts_with_all = ["kernel_option", "raw"])]
    kernel: Option<PathBuf>,
    /// The same, spelled as an option
    #[arg(
        long = "kernel",
        value_name = "FILE",
        id = "kernel_option",
        hide = true,
        overrides_with = "kernel_option"
    )]
    kernel_option: Option<PathBuf>,
    /// Initial RAM disk (also -initrd)
    #[arg(long, value_name = "FILE", overrides_with = "initrd")]
    initrd: Option<PathBuf>,
    /// Kernel command line (also -append)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, overrides_with = "append")]
    append: Option<String>,
    /// Multiboot module with its arguments; may be repeated
    #[arg(long = "module", value_name = "FILE[,ARGS]")]
    modules: Vec<String>,
    /// Run a raw binary, entered in flat 32-bit protected mode
    #[arg(long, value_name = "FILE", requires = "load_addr")]
    raw: Option<PathBuf>,
    /// Physical address of the raw binary's first byte
    #[arg(long, value_name = "ADDR", value_parser = config::parse_number, requires = "raw")]
    load_addr: Option<u32>,
    /// Physical address where the raw binary starts [default: the load address]
    #[arg(long, value_name = "ADDR", value_parser = config::parse_number, requires = "raw")]
    entry: Option<u32>,
    /// Guest RAM in MiB, or with K, M, G (also -m) [default: 256]
    #[arg(short, long, value_name = "SIZE", value_parser = config::parse_memory, overrides_with = "memory")]
    memory: Option<u64>,
    /// The host's CPU without some features: host,-pge,sse4.2=off (also -cpu)
    #[arg(long, value_name = "CPU", value_parser = CpuModel::parse, overrides_with = "cpu")]
    cpu: Option<CpuModel>,
    /// Which engine runs guest ring 0
    #[arg(long, value_enum, default_value = "auto", overrides_with = "engine")]
    engine: EngineArg,
    /// Hand the running guest to a random other engine every so many milliseconds
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    engine_shuffle: Option<u32>,
    /// Repeat the order of engines of the run that printed this number
    #[arg(long, value_name = "SEED", requires = "engine_shuffle")]
    shuffle_seed: Option<u64>,
    /// Go to these engines and the interpreter only [default: all that there are]
    #[arg(long, value_enum, value_name = "ENGINES", requires = "engine_shuffle", value_delimiter = ',')]
    shuffle_engines: Vec<ShuffleArg>,
    /// Do everything again on a second engine behind the first, and stop at the first difference
    #[arg(long, value_enum, value_name = "ENGINE", conflicts_with = "engine_shuffle")]
    lockstep: Option<LockstepArg>,
    /// End the run well when so many instructions have been compared
    #[arg(long, value_name = "INSTRUCTIONS", requires = "lockstep", value_parser = clap::value_parser!(u64).range(1..))]
    lockstep_limit: Option<u64>,
    /// How the raw engine keeps the guest's kernel from its users
    #[arg(long, value_enum, default_value = "limits", overrides_with = "isolation")]
    isolation: IsolationArg,
    /// COM1, then COM2..COM4: stdio, mon:stdio, none, pty, file=PATH, unix=PATH [default: stdio]
    #[arg(long, value_name = "TARGET", value_parser = config::parse_serial)]
    serial: Vec<SerialTarget>,
    /// As QEMU's -nographic: the serial port and the console share standard input, even if it is no terminal
    #[arg(long)]
    nographic: bool,
    /// Boot again when the guest restarts
    #[arg(long, overrides_with = "no_reboot")]
    reboot: bool,
    /// End the run when the guest restarts (the default; also -no-reboot)
    #[arg(long, overrides_with = "reboot")]
    no_reboot: bool,
    /// Let the guest end the run by writing to this port [default port: 0x501]
    #[arg(long, value_name = "PORT", num_args = 0..=1, require_equals = true, default_missing_value = "0x501",
          value_parser = config::parse_number)]
    isa_debug_exit: Option<u32>,
    /// Show what the guest writes to port E9h on standard error
    #[arg(long)]
    debugcon: bool,
    /// Print the fault accounting at the end, on standard error
    #[arg(long)]
    stats: bool,
    /// Write the fault accounting as JSON at the end
    #[arg(long, value_name = "FILE")]
    stats_out: Option<PathBuf>,
    /// The guest kernel's symbols for the accounting: System.map, or vmlinux with a symbol table
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Trace on standard error: exits, patches, scans, faults, int, all (also SUBRING_TRACE=...)
    #[arg(short = 'd', long, value_name = "LIST", value_parser = Trace::parse)]
    trace: Vec<Trace>,
    /// Write the VGA text screen here at the end (- is standard output)
    #[arg(long, value_name = "FILE")]
    vga_dump: Option<PathBuf>,
}

#[derive(Args)]
struct ScanArgs {
    /// An ELF32 vmlinux, a bzImage, or a raw binary with --base
    file: PathBuf,
    /// The file is a raw binary whose first byte is at this linear address
    #[arg(long, value_name = "ADDR", value_parser = config::parse_number)]
    base: Option<u32>,
    /// Start from this linear address; may be repeated
    #[arg(long = "entry", value_name = "ADDR", value_parser = config::parse_number)]
    entries: Vec<u32>,
    /// The size of the code in bits
    #[arg(long, value_name = "16|32", default_value_t = 32)]
    bits: u32,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Parses the command line, the program's name first. `trace_variable` is the value of SUBRING_TRACE.
pub fn parse(
    words: impl IntoIterator<Item = OsString>,
    trace_variable: Option<&str>,
) -> Result<Action, Refusal> {
    let mut words: Vec<OsString> = words.into_iter().collect();
    // `subring -kernel FILE` means run, as it would for QEMU.
    if let Some(first) = words.get(1).and_then(|w| w.to_str())
        && first.starts_with('-')
        && !matches!(first, "-h" | "--help" | "-V" | "--version" | "--")
    {
        words.insert(1, "run".into());
    }
    if words.get(1).is_some_and(|w| w == "run") {
        let translated = qemu::translate(words.split_off(2)).map_err(Refusal::Mistake)?;
        words.extend(translated);
    }
    let exit_codes = exit_codes();
    let command = <Cli as clap::CommandFactory>::command()
        .after_help(exit_codes.clone())
        .mut_subcommand("run", |run| run.after_help(format!("{EXAMPLES}\n{exit_codes}")));
    let cli = command
        .try_get_matches_from(words)
        .and_then(|matches| <Cli as clap::FromArgMatches>::from_arg_matches(&matches))
        .map_err(|error| refusal(&error))?;
    match cli.command {
        Command::Run(args) => {
            run_config(*args, trace_variable).map(|c| Action::Run(Box::new(c))).map_err(Refusal::Mistake)
        }
        Command::Scan(ScanArgs { file, base, entries, bits, json }) => {
            Ok(Action::Scan(ScanOptions { file, base, entries, bits, json }))
        }
        Command::Doctor { json } => Ok(Action::Doctor { json }),
        Command::Report { file, symbols } => Ok(Action::Report { file, symbols }),
        Command::BuiltinImage { file } => Ok(Action::BuiltinImage { file }),
    }
}

/// Help passes as it is; a mistake is folded into one line.
fn refusal(error: &clap::Error) -> Refusal {
    use clap::error::ErrorKind;
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Refusal::Shown(text),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Refusal::Mistake("no command given; try 'subring run', or 'subring --help'".into())
        }
        _ => {
            let line: Vec<&str> = text
                .lines()
                .map(str::trim)
                .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
                .filter(|line| !line.is_empty())
                .collect();
            let line = line.join(" ");
            Refusal::Mistake(line.strip_prefix("error: ").unwrap_or(&line).to_owned())
        }
    }
}

fn run_config(args: RunArgs, trace_variable: Option<&str>) -> Result<RunConfig, String> {
    let kernel = match (args.raw, args.load_addr, args.kernel.or(args.kernel_option)) {
        (Some(_), _, Some(_)) => return Err("a raw binary and a kernel cannot both be run".into()),
        (Some(file), Some(load), None) => Kernel::Raw {
            file,
            load: GuestPhys(load.into()),
            entry: GuestPhys(args.entry.unwrap_or(load).into()),
        },
        (_, _, Some(file)) => Kernel::File(file),
        (_, _, None) => Kernel::Builtin,
    };
    if kernel == Kernel::Builtin {
        for (given, name) in [
            (args.initrd.is_some(), "--initrd"),
            (args.append.is_some(), "--append"),
            (!args.modules.is_empty(), "--module"),
        ] {
            if given {
                return Err(format!("{name} needs a kernel; the built-in guest takes none"));
            }
        }
    }
    let debug_exit = match args.isa_debug_exit {
        Some(port) => {
            Some(u16::try_from(port).map_err(|_| format!("{port:#x} is no port for isa-debug-exit"))?)
        }
        None => (kernel == Kernel::Builtin).then_some(ISA_DEBUG_EXIT_PORT),
    };
    let shuffle = args.engine_shuffle.map(|interval_ms| ShuffleConfig {
        interval_ms,
        seed: args.shuffle_seed,
        engines: args.shuffle_engines.into_iter().map(ShuffleArg::kind).collect(),
    });
    if shuffle.is_some() && !matches!(args.engine, EngineArg::Auto) {
        return Err("--engine-shuffle uses every engine there is; leave out --engine".into());
    }
    let lockstep = args
        .lockstep
        .map(|LockstepArg::Interp| LockstepConfig { limit: args.lockstep_limit.unwrap_or(u64::MAX) });
    if lockstep.is_some() && matches!(args.engine, EngineArg::Interp) {
        return Err(
            "--lockstep interp compares another engine with the interpreter; leave out --engine".into()
        );
    }
    let mut trace = args.trace.into_iter().fold(Trace::empty(), |all, one| all | one);
    if let Some(list) = trace_variable {
        trace |= Trace::parse(list).map_err(|why| format!("SUBRING_TRACE: {why}"))?;
    }
    Ok(RunConfig {
        kernel,
        initrd: args.initrd,
        append: args.append.unwrap_or_default(),
        modules: args.modules.iter().map(|text| module(text)).collect(),
        memory: args.memory.unwrap_or(DEFAULT_MEMORY),
        cpu: args.cpu.unwrap_or_default(),
        isolation: match args.isolation {
            IsolationArg::Limits => Isolation::Limits,
            IsolationArg::LimitsCode => Isolation::LimitsCode,
            IsolationArg::Strict => Isolation::Strict,
            IsolationArg::Worlds => Isolation::Worlds,
        },
        engine: match args.engine {
            EngineArg::Auto => EngineChoice::Auto,
            EngineArg::Raw => EngineChoice::Raw,
            EngineArg::Interp => EngineChoice::Interp,
            EngineArg::Kvm => EngineChoice::Kvm,
            EngineArg::Ring1 => EngineChoice::Ring1,
        },
        shuffle,
        lockstep,
        reboot: args.reboot,
        serial: serial_ports(args.serial, args.nographic)?,
        debugcon: args.debugcon,
        isa_debug_exit: debug_exit,
        stats: args.stats,
        stats_out: args.stats_out,
        symbols: args.symbols,
        trace,
        vga_dump: args.vga_dump,
    })
}

fn module(text: &str) -> ModuleFile {
    let (path, args) = text.split_once(',').unwrap_or((text, ""));
    ModuleFile { path: path.into(), args: args.into() }
}

fn serial_ports(given: Vec<SerialTarget>, nographic: bool) -> Result<[SerialTarget; 4], String> {
    if given.len() > 4 {
        return Err("there are four serial ports, COM1 to COM4".into());
    }
    if given.iter().filter(|t| matches!(t, SerialTarget::Stdio { .. })).count() > 1 {
        return Err("standard input and output can serve only one serial port".into());
    }
    let mut ports: [SerialTarget; 4] = Default::default();
    if given.is_empty() {
        ports[0] = SerialTarget::Stdio { escape_always: nographic };
    }
    for (port, target) in ports.iter_mut().zip(given) {
        *port = target;
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Action, Refusal> {
        parse(std::iter::once("subring").chain(line.split_ascii_whitespace()).map(OsString::from), None)
    }
    fn run(line: &str) -> RunConfig {
        match parsed(line) {
            Ok(Action::Run(config)) => *config,
            other => panic!("{line}: {other:?}"),
        }
    }
    fn mistake(line: &str) -> String {
        match parsed(line) {
            Err(Refusal::Mistake(line)) => line,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_parser_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn run_alone_is_the_default_configuration() {
        assert_eq!(run("run"), RunConfig::default());
    }

    #[test]
    fn qemus_spelling_and_ours_mean_the_same() {
        let ours = run("run k --initrd i --append a=b -m 64 --no-reboot --nographic");
        assert_eq!(run("run -kernel k -initrd i -append a=b -m 64M -no-reboot -nographic"), ours);
        assert_eq!(run("-kernel k -initrd i -append a=b -m size=65536K -no-reboot -nographic"), ours);
        assert_eq!(ours.kernel, Kernel::File("k".into()));
        assert_eq!(ours.serial[0], SerialTarget::Stdio { escape_always: true });
        assert_eq!(run("run -cpu host,-pge k"), run("run --cpu max,pge=off k"));
        assert_eq!(run("run -cpu host k"), run("run k"));
    }

    #[test]
    fn the_last_of_two_opposites_counts() {
        assert!(run("run k --no-reboot --reboot").reboot);
        assert!(!run("run k --reboot -no-reboot").reboot);
        assert_eq!(run("run k -m 64 -m 128").memory, 128 << 20);
    }

    #[test]
    fn isa_debug_exit_is_on_for_the_built_in_guest_only() {
        assert_eq!(run("run").isa_debug_exit, Some(0x501));
        assert_eq!(run("run k").isa_debug_exit, None);
        assert_eq!(run("run k --isa-debug-exit").isa_debug_exit, Some(0x501));
        assert_eq!(run("run k --isa-debug-exit=0xf4").isa_debug_exit, Some(0xf4));
    }

    #[test]
    fn raw_binaries_and_modules_are_understood() {
        let config = run("run --raw b --load-addr 0x7c00 --entry 0x7c10");
        let (load, entry) = (GuestPhys(0x7c00), GuestPhys(0x7c10));
        assert_eq!(config.kernel, Kernel::Raw { file: "b".into(), load, entry });
        let config = run("run k --module m,a=1,b --module n");
        assert_eq!(config.modules[0], ModuleFile { path: "m".into(), args: "a=1,b".into() });
        assert_eq!(config.modules[1], ModuleFile { path: "n".into(), args: String::new() });
    }

    #[test]
    fn traces_add_up_over_options_and_environment() {
        let words = ["subring", "run", "-d", "exits", "-d", "int"].map(OsString::from);
        let Ok(Action::Run(config)) = parse(words, Some("scans")) else { panic!("refused") };
        assert_eq!(config.trace, Trace::EXITS | Trace::INT | Trace::SCANS);
    }

    #[test]
    fn a_shuffle_has_an_interval_and_perhaps_a_seed() {
        assert_eq!(run("run").shuffle, None);
        let shuffle = run("run k --engine-shuffle 50 --shuffle-seed 18446744073709551615").shuffle;
        let seed = Some(u64::MAX);
        assert_eq!(shuffle, Some(ShuffleConfig { interval_ms: 50, seed, engines: vec![] }));
        let shuffle = run("run k --engine-shuffle=9 --shuffle-engines=raw,ring1").shuffle;
        let engines = vec![EngineKind::Raw, EngineKind::Ring1];
        assert_eq!(shuffle, Some(ShuffleConfig { interval_ms: 9, seed: None, engines }));
    }

    #[test]
    fn a_lockstep_run_may_have_a_limit() {
        let limit = |line| run(line).lockstep.map(|l| l.limit);
        assert_eq!(limit("run"), None);
        assert_eq!(limit("run --lockstep interp"), Some(u64::MAX));
        assert_eq!(limit("run --lockstep interp --lockstep-limit 5000000000"), Some(5_000_000_000));
    }

    #[test]
    fn every_mistake_is_one_line() {
        for line in [
            "",
            "launch",
            "run a b",
            "run --memory",
            "run -m 5T",
            "run -m 1",
            "run --cpu 486",
            "run -cpu host,+avx",
            "run --engine vmx",
            "run --engine-shuffle 0",
            "run --engine-shuffle fast",
            "run --engine interp --engine-shuffle 50",
            "run --shuffle-seed 1",
            "run --engine-shuffle 50 --shuffle-seed x",
            "run --lockstep raw",
            "run --lockstep",
            "run --lockstep interp --lockstep-limit 0",
            "run --lockstep interp --engine interp",
            "run --lockstep interp --engine-shuffle 50",
            "run --lockstep-limit 5",
            "run --serial tcp:1",
            "run --serial stdio --serial stdio",
            "run -cdrom x",
            "run --append x",
            "run --raw f",
            "run k --isa-debug-exit=0x10000",
            "run -d everything",
            "report",
            "scan f --base zzz",
        ] {
            let text = mistake(line);
            assert!(
                !text.is_empty() && !text.contains('\n') && !text.starts_with("error"),
                "{line}: {text:?}"
            );
        }
    }

    #[test]
    fn help_lists_the_exit_codes() {
        for line in ["--help", "run --help"] {
            match parsed(line) {
                Err(Refusal::Shown(text)) => assert!(text.contains("130  interrupted"), "{text}"),
                other => panic!("{other:?}"),
            }
        }
    }
}
