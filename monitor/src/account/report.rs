//! The tables of `subring report` and of `run --stats`.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::symbols::Symbols;
use super::{Route, Stats, Tally};
use crate::paint::Paint;

/// How many sites, and how many trap-byte sites, are listed.
const TOP: usize = 25;

/// Renders the whole report.
#[must_use]
pub fn render(stats: &Stats, symbols: Option<&Symbols>, paint: Paint) -> String {
    let mut out = String::new();
    let total = stats.exits.iter().fold(Tally::default(), |sum, line| add(sum, line.count, line.ns));
    let inline: u64 = stats.inline.iter().fold(0, |sum, line| sum.saturating_add(line.count));
    let seconds = stats.wall_ns as f64 / 1e9;
    let _ = writeln!(
        out,
        "{} {} events in {seconds:.3} s ({:.0}/s), {} handling them ({} of the time); engine {}, subring {}",
        paint.bold("accounting:"),
        total.count,
        if seconds > 0.0 { total.count as f64 / seconds } else { 0.0 },
        duration(total.ns),
        percent(total.ns, stats.wall_ns),
        stats.engine,
        stats.subring,
    );
    let left: u64 = stats
        .exits
        .iter()
        .filter(|line| line.route != Route::InLine.name())
        .fold(0, |sum, line| sum.saturating_add(line.count));
    let _ = writeln!(
        out,
        "faults avoided by patches: {inline} in line, {} of all {}",
        percent(inline, inline.saturating_add(left)),
        inline.saturating_add(left)
    );
    group(&mut out, stats, paint, "cause", total, |line| line.cause.clone());
    group(&mut out, stats, paint, "route", total, |line| line.route.clone());
    group(&mut out, stats, paint, "instruction", total, |line| line.instruction.clone());
    sites(&mut out, stats, symbols, paint, total);
    pairs(
        &mut out,
        paint,
        "completed in line",
        stats.inline.iter().map(|l| (l.instruction.clone(), l.count)),
    );
    pairs(
        &mut out,
        paint,
        "delivered to the guest",
        stats.injected.iter().map(|line| (vector_name(line.vector), line.count)),
    );
    pairs(&mut out, paint, "patches by tactic", stats.patches.iter().map(|(k, v)| (k.clone(), *v)));
    trap_sites(&mut out, stats, symbols, paint);
    pairs(&mut out, paint, "at the end", stats.gauges.iter().map(|(k, v)| (k.clone(), *v)));
    out
}

fn add(sum: Tally, count: u64, ns: u64) -> Tally {
    Tally { count: sum.count.saturating_add(count), ns: sum.ns.saturating_add(ns) }
}

fn by_count<K: Ord>(tallies: BTreeMap<K, Tally>) -> Vec<(K, Tally)> {
    let mut sorted: Vec<_> = tallies.into_iter().collect();
    sorted.sort_by_key(|(_, tally)| std::cmp::Reverse(tally.count));
    sorted
}

fn group(
    out: &mut String,
    stats: &Stats,
    paint: Paint,
    title: &str,
    total: Tally,
    key: impl Fn(&super::ExitLine) -> String,
) {
    let mut tallies: BTreeMap<String, Tally> = BTreeMap::new();
    for line in &stats.exits {
        let tally = tallies.entry(key(line)).or_default();
        *tally = add(*tally, line.count, line.ns);
    }
    if tallies.is_empty() {
        return;
    }
    let head =
        format!("\n{title:<18}{:>12}{:>8}{:>12}{:>8}{:>10}", "count", "share", "time", "share", "each");
    let _ = writeln!(out, "{}", paint.bold(&head));
    for (name, tally) in by_count(tallies).into_iter().take(TOP) {
        let _ = writeln!(
            out,
            "{name:<18}{:>12}{:>8}{:>12}{:>8}{:>10}",
            tally.count,
            percent(tally.count, total.count),
            duration(tally.ns),
            percent(tally.ns, total.ns),
            duration(tally.ns / tally.count.max(1)),
        );
    }
}

fn sites(out: &mut String, stats: &Stats, symbols: Option<&Symbols>, paint: Paint, total: Tally) {
    let mut tallies: BTreeMap<(u32, u8, &str, &str), Tally> = BTreeMap::new();
    for line in &stats.exits {
        let tally = tallies.entry((line.eip, line.cpl, &line.instruction, &line.cause)).or_default();
        *tally = add(*tally, line.count, line.ns);
    }
    let count = tallies.len();
    if count == 0 {
        return;
    }
    let head = format!(
        "\ntop sites of {count:<5}{:>12}{:>8}{:>12}  cpl {:<12}{:<17}symbol",
        "count", "share", "time", "instruction", "cause"
    );
    let _ = writeln!(out, "{}", paint.bold(&head));
    for ((eip, cpl, instruction, cause), tally) in by_count(tallies).into_iter().take(TOP) {
        let symbol = symbols.and_then(|s| s.name(eip)).unwrap_or_else(|| "-".into());
        let _ = writeln!(
            out,
            "{eip:<18}{:>12}{:>8}{:>12}    {cpl} {instruction:<12}{cause:<17}{symbol}",
            tally.count,
            percent(tally.count, total.count),
            duration(tally.ns),
            eip = format!("{eip:08x}"),
        );
    }
}

fn trap_sites(out: &mut String, stats: &Stats, symbols: Option<&Symbols>, paint: Paint) {
    if stats.trap_sites.is_empty() {
        return;
    }
    let _ = writeln!(out, "{}", paint.bold(&format!("\ntrap-byte sites: {}", stats.trap_sites.len())));
    for site in stats.trap_sites.iter().take(TOP) {
        let symbol = symbols.and_then(|s| s.name(site.eip)).unwrap_or_else(|| "-".into());
        let _ = writeln!(out, "{:08x}  {:<12}{:<28}{symbol}", site.eip, site.instruction, site.reason);
    }
}

fn pairs(out: &mut String, paint: Paint, title: &str, lines: impl Iterator<Item = (String, u64)>) {
    let mut lines = lines.filter(|(_, count)| *count != 0).peekable();
    if lines.peek().is_none() {
        return;
    }
    let _ = writeln!(out, "{}", paint.bold(&format!("\n{title}")));
    for (name, count) in lines {
        let _ = writeln!(out, "{name:<30}{count:>12}");
    }
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.1}%", part as f64 * 100.0 / whole as f64) }
}

fn duration(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns} ns"),
        10_000..10_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

fn vector_name(vector: u8) -> String {
    const NAMES: [&str; 20] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "-", "#TS", "#NP", "#SS", "#GP",
        "#PF", "-", "#MF", "#AC", "#MC", "#XM",
    ];
    match NAMES.get(usize::from(vector)) {
        Some(name) => format!("{vector:02x}h {name}"),
        None => format!("{vector:02x}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Account, Cause, Kind};
    use super::*;
    use iced_x86::Mnemonic;

    #[test]
    fn the_report_names_shares_and_what_patches_avoided() {
        let mut account = Account::new();
        for _ in 0..3 {
            account.record(
                Cause::Sensitive,
                Route::FarExit,
                Kind::from(Mnemonic::Iretd),
                0xc180_0000,
                0,
                1000,
            );
        }
        account.record(Cause::ShadowFault, Route::Signal, Kind::NONE, 0x0804_8000, 3, 1000);
        account.set_inline("cli", 12);
        account.record_injected(14);
        account.add_trap_site(0xc100_0000, Kind::from(Mnemonic::Sti), "no room");
        let text = render(&account.stats("raw", 1_000_000), None, Paint::PLAIN);
        let line = |start: &str| text.lines().find(|l| l.starts_with(start)).unwrap_or("").to_owned();
        assert!(line("sensitive").contains("75.0%"), "{text}");
        assert!(line("faults avoided").contains("12 in line, 75.0% of all 16"), "{text}");
        assert!(line("c1800000").contains("iretd"), "{text}");
        assert!(line("0eh #PF").ends_with('1'), "{text}");
        assert!(line("c1000000").contains("no room"), "{text}");
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn an_empty_account_is_no_error() {
        let text = render(&Account::new().stats("raw", 0), None, Paint::PLAIN);
        assert!(text.starts_with("accounting: 0 events"));
    }
}
