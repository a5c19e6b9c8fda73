//! The `subring` command.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{BufWriter, Write, stderr, stdout};
use std::path::Path;

use monitor::account::Stats;
use monitor::account::report;
use monitor::account::symbols::Symbols;
use monitor::cli::{self, Action, Refusal};
use monitor::config::RunConfig;
use monitor::doctor;
use monitor::outcome::{Ending, ExitCode};
use monitor::paint::Paint;
use monitor::scan::{self, ScanError, ScanOptions};
use monitor::terminal;
use monitor::vm;

/// A panic is one line, and ends the process whichever thread it happens on: a monitor with a thread missing would
/// hang. The main thread unwinds, so that output is still written; its exit code is then 101, too.
fn report_panics() {
    let main = std::thread::current().id();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore_from_panic();
        let what = info.payload();
        let what = what
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| what.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("panic");
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        let _ = writeln!(stderr(), "subring: internal error{place}: {}", what.replace('\n', " "));
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            let _ = writeln!(stderr(), "{backtrace}");
        }
        if std::thread::current().id() != main {
            std::process::exit(i32::from(ExitCode::Internal as u8));
        }
    }));
}

fn main() -> std::process::ExitCode {
    report_panics();
    env_logger::Builder::from_env(
        env_logger::Env::new().filter("SUBRING_LOG").write_style("SUBRING_LOG_STYLE"),
    )
    .init();
    let trace = std::env::var("SUBRING_TRACE").ok();
    let code = match cli::parse(std::env::args_os(), trace.as_deref()) {
        Ok(action) => act(action),
        Err(Refusal::Shown(text)) => {
            print(&text);
            ExitCode::Well
        }
        Err(Refusal::Mistake(line)) => complain(ExitCode::Usage, &line),
    };
    code.into()
}

/// Writes to standard output; a reader that went away (`| head`) is no error of ours.
fn print(text: &str) {
    let _ = stdout().write_all(text.as_bytes());
    let _ = stdout().flush();
}

fn complain(code: ExitCode, line: &str) -> ExitCode {
    let _ = writeln!(stderr(), "subring: {line}");
    code
}

fn act(action: Action) -> ExitCode {
    match action {
        Action::Run(config) => run(*config),
        Action::Scan(options) => scan_file(&options),
        Action::Doctor { json } => doctor(json),
        Action::Report { file, symbols } => report_file(&file, symbols.as_deref()),
        Action::BuiltinImage { file } => match std::fs::write(&file, monitor::builtin::image()) {
            Ok(()) => ExitCode::Well,
            Err(error) => complain(ExitCode::Usage, &format!("{}: {error}", file.display())),
        },
    }
}

fn scan_file(options: &ScanOptions) -> ExitCode {
    let mut out = BufWriter::new(stdout().lock());
    match scan::run(options, &mut out).and_then(|()| Ok(out.flush()?)) {
        // A reader that went away (`| head`) is no error of ours.
        Err(ScanError::Write(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::Well,
        Err(error) => complain(ExitCode::Usage, &error.to_string()),
        Ok(()) => ExitCode::Well,
    }
}

fn run(config: RunConfig) -> ExitCode {
    // Symbols are read first: a wrong path should not cost a whole run.
    let mut symbols = match config.symbols.as_deref().map(Symbols::load).transpose() {
        Ok(symbols) => symbols,
        Err(line) => return complain(ExitCode::Usage, &line),
    };
    let (show, stats_out) = (config.stats, config.stats_out.clone());
    let outcome = vm::run(config);
    let mut code = outcome.ending.exit_code();
    match &outcome.ending {
        Ending::GuestFatal(dump) => {
            let _ = writeln!(stderr(), "subring: guest fatal: {}", dump.trim_end());
        }
        Ending::Differs(text) => {
            let _ = writeln!(stderr(), "subring: lockstep: {}", text.trim_end());
        }
        Ending::BadInput(line) | Ending::HostCannot(line) => {
            complain(code, line);
        }
        Ending::DebugExit(value) if code != ExitCode::Well => {
            complain(code, &format!("the guest reported failure ({value:#x} to isa-debug-exit)"));
        }
        Ending::Interrupted => {
            complain(code, "interrupted");
        }
        Ending::Restart("triple fault") => {
            complain(code, "the guest restarted itself by a triple fault");
        }
        Ending::PoweredOff(_)
        | Ending::Restart(_)
        | Ending::DebugExit(_)
        | Ending::Compared
        | Ending::Quit => {}
    }
    if let Some(stats) = outcome.stats {
        if let Some(path) = stats_out
            && let Err(error) = stats.write(&path)
        {
            let refused = complain(ExitCode::Usage, &error.to_string());
            if code == ExitCode::Well {
                code = refused;
            }
        }
        if show {
            locate(symbols.as_mut(), &stats);
            let table = report::render(&stats, symbols.as_ref(), Paint::for_stream(&stderr()));
            let _ = stderr().write_all(table.as_bytes());
        }
    }
    code
}

fn locate(symbols: Option<&mut Symbols>, stats: &Stats) {
    if let (Some(symbols), Some(handler)) = (symbols, stats.page_fault_handler) {
        symbols.locate(handler);
    }
}

fn report_file(file: &Path, symbols: Option<&Path>) -> ExitCode {
    let stats = match Stats::read(file) {
        Ok(stats) => stats,
        Err(error) => return complain(ExitCode::Usage, &error.to_string()),
    };
    let mut symbols = match symbols.map(Symbols::load).transpose() {
        Ok(symbols) => symbols,
        Err(line) => return complain(ExitCode::Usage, &line),
    };
    locate(symbols.as_mut(), &stats);
    print(&report::render(&stats, symbols.as_ref(), Paint::for_stream(&stdout())));
    ExitCode::Well
}

fn doctor(json: bool) -> ExitCode {
    let diagnosis = doctor::diagnose();
    let text = if json {
        match serde_json::to_string_pretty(&diagnosis) {
            Ok(text) => text + "\n",
            Err(error) => return complain(ExitCode::HostCannot, &error.to_string()),
        }
    } else {
        doctor::render(&diagnosis, Paint::for_stream(&stdout()))
    };
    print(&text);
    diagnosis.exit_code()
}
