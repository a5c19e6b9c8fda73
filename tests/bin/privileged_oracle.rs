//! KVM as the oracle user mode cannot be: system instructions, segment loads, gates, task switches, `iret`, faults during
//! delivery, in every ring and mode, on a vCPU and by the interpreter ([`privileged`]).
//!
//! Needs hardware behind `/dev/kvm`; `tests/lab.rs` runs it where there is, or in the lab. `SUBRING_SEED` repeats a run,
//! `SUBRING_ITERATIONS` makes more random cases, `SUBRING_GROUP` picks a group by its name, `SUBRING_SHOW` says how many
//! cases of a kind are shown.

#[path = "../privileged/mod.rs"]
mod privileged;

use host_driver_shim::kvm::{KvmWorth, probe};
use privileged::cases::GROUPS;
use privileged::rig::Rig;
use privileged::{defects, gaps};
use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Instant;
use subring_tests::ring0_code::Random;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// The CPU here is QEMU's TCG, by its hypervisor leaf (QEMU, target/i386/cpu.c).
fn cpu_is_tcg() -> bool {
    let cpuid = std::arch::x86_64::__cpuid;
    let r = cpuid(0x4000_0000);
    cpuid(1).ecx >> 31 != 0 && [r.ebx, r.ecx, r.edx].map(u32::to_le_bytes).as_flattened() == b"TCGTCGTCGTCG"
}

fn main() -> ExitCode {
    if !matches!(probe(), KvmWorth::Hardware { .. }) {
        println!("SKIP: privileged-oracle: there is no hardware KVM here: {}", probe());
        return ExitCode::SUCCESS;
    }
    let seed = number("SUBRING_SEED", 0x5eed);
    let only = std::env::var("SUBRING_GROUP").ok();
    let lab = cpu_is_tcg();
    let mut rig = Rig::new().unwrap();
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut excluded: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut ran, mut all, mut endless) = (0u64, 0, 0);
    for group in GROUPS {
        if only.as_ref().is_some_and(|only| only != group.name) {
            continue;
        }
        let began = Instant::now();
        let cases = (group.cases)(&mut Random(seed), number("SUBRING_ITERATIONS", 1));
        for case in &cases {
            let result = rig.run(case).unwrap_or_else(|e| panic!("{}: {e}", case.describe()));
            let Some(result) = result else {
                endless += 1;
                continue;
            };
            let (explained, open) = gaps::explain(case, &result, lab);
            if !open.is_empty() {
                let lines: Vec<_> = open.iter().map(|d| format!("      {d}")).collect();
                let text = format!("{}\n{}", case.describe(), lines.join("\n"));
                let kind = open.iter().map(|d| d.kind());
                let kinds: BTreeSet<_> = kind.collect();
                wrong.entry(format!("{} {kinds:?}", case.group)).or_default().push(text);
            } else {
                for name in &explained {
                    *excluded.entry(name).or_default() += 1;
                }
                all += u64::from(!explained.is_empty());
            }
        }
        ran += cases.len() as u64;
        println!("{}: {} cases in {:?}", group.name, cases.len(), began.elapsed());
    }
    println!("{ran} cases, seed {seed}; {endless} of them ran into RAM; {all} agree but for what is known:");
    for (of, gaps) in gaps::LISTS {
        println!(" {of}:");
        for gap in *gaps {
            let count = excluded.get(gap.name).copied().unwrap_or(0);
            println!("   {count:6} {} ({})", gap.name, gap.reason);
        }
    }
    for (name, lines) in &wrong {
        println!("{name}: {} differences", lines.len());
        let step = lines.len().div_ceil(number("SUBRING_SHOW", 3) as usize);
        for line in lines.iter().step_by(step) {
            println!("   {line}");
        }
    }
    let missed = if only.is_none() { defects::check(&mut rig, seed, lab).unwrap() } else { Vec::new() };
    if !missed.is_empty() {
        println!("FAIL: deliberate defects that nothing caught: {missed:?}");
        return ExitCode::FAILURE;
    }
    if wrong.is_empty() {
        println!("PASS");
        return ExitCode::SUCCESS;
    }
    println!("FAIL: {} kinds of cases differ; SUBRING_SEED={seed} repeats it", wrong.len());
    ExitCode::FAILURE
}
