//! The scan's report as a table for people.

use std::io::{self, Write};

use super::Report;

/// Pages with most sites to show; JSON has them all.
const PAGES_SHOWN: usize = 20;

/// Undecodable addresses to show.
const UNDECODABLE_SHOWN: usize = 10;

pub(super) fn table(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{} {}-bit code, entry point {:08x}", report.format, report.bits, report.entry)?;
    for part in &report.code {
        let end = u64::from(part.at) + part.length as u64;
        writeln!(out, "  {:08x}..{end:08x} {:>10} bytes  {}", part.at, part.length, part.name)?;
    }
    writeln!(out, "\n{:>10} {:>12} {:>7}  found by", "starts", "instructions", "sites")?;
    for pass in &report.passes {
        writeln!(out, "{:>10} {:>12} {:>7}  {}", pass.entries, pass.instructions, pass.sites, pass.name)?;
    }
    let totals = &report.totals;
    writeln!(
        out,
        "\n{} pages, {} instructions, {} sensitive; unproven: {} instructions, {} sensitive; {} undecodable",
        totals.pages,
        totals.instructions,
        totals.sites,
        totals.unproven_instructions,
        totals.unproven_sites,
        report.undecodable.len()
    )?;
    if !report.kinds.is_empty() {
        writeln!(out, "\n{:>7} {:>8}  {:<18} unpatched", "sites", "unproven", "instruction")?;
    }
    for kind in &report.kinds {
        writeln!(out, "{:>7} {:>8}  {:<18} {}", kind.sites, kind.unproven, kind.name, kind.host)?;
    }
    let mut pages: Vec<_> = report.pages.iter().filter(|page| page.sites > 0).collect();
    pages.sort_by_key(|page| (std::cmp::Reverse(page.sites), page.at));
    if !pages.is_empty() {
        let shown = pages.len().min(PAGES_SHOWN);
        writeln!(out, "\n{} pages have sensitive instructions; the first {shown}:", pages.len())?;
        writeln!(out, "{:>8} {:>7} {:>12} {:>7} {:>7}", "page", "sites", "instructions", "bytes", "targets")?;
    }
    for page in pages.iter().take(PAGES_SHOWN) {
        let (at, sites, instructions) = (page.at, page.sites, page.instructions);
        writeln!(out, "{at:08x} {sites:>7} {instructions:>12} {:>7} {:>7}", page.proven_bytes, page.targets)?;
    }
    if !report.undecodable.is_empty() {
        let some: Vec<_> =
            report.undecodable.iter().take(UNDECODABLE_SHOWN).map(|at| format!("{at:08x}")).collect();
        let more = if report.undecodable.len() > some.len() { " ..." } else { "" };
        writeln!(out, "\nundecodable: {}{more}", some.join(" "))?;
    }
    Ok(())
}
