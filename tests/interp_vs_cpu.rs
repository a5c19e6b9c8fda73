//! The interpreter against the real CPU: every user-mode instruction form, random operands, same results.
//!
//! Opcodes are enumerated byte by byte (four maps, each prefix, each ModRM group, register and memory), so a form is
//! covered because it exists, not because somebody listed it. `SUBRING_ITERATIONS` raises the number of rounds,
//! `SUBRING_SEED` repeats a run; both are printed on failure.

use host_driver_shim::native32::{BATCH, Case, Native32};
use std::collections::{BTreeMap, BTreeSet};
use subring_tests::forms::{Mode, Plan, describe, difference, forms, plan};
use subring_tests::ring0_code::Random;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn the_interpreter_does_what_the_cpu_does() {
    let mut native = match Native32::new() {
        Ok(native) => native,
        Err(e) => {
            println!("SKIP: no 32-bit code on this host: {e}");
            return;
        }
    };
    let seed = number("SUBRING_SEED", 0x5eed);
    let rounds = number("SUBRING_ITERATIONS", 1);
    let mut random = Random(seed);
    let mut covered: BTreeSet<String> = BTreeSet::new();
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut ran = 0u64;
    for _ in 0..rounds {
        for mode in [Mode::Bits32, Mode::Bits16] {
            let all = forms(&mut random);
            let plans: Vec<Plan> = all.into_iter().filter_map(|b| plan(b, mode, &mut random)).collect();
            for batch in plans.chunks(BATCH) {
                let mut cases: Vec<Case> = batch.iter().map(|p| p.case).collect();
                if let Err(e) = native.run(&mut cases) {
                    if ran == 0 && mode == Mode::Bits32 {
                        println!("SKIP: no 32-bit code on this host: {e}");
                        return;
                    }
                    panic!("{e}");
                }
                for (plan, result) in batch.iter().zip(&cases) {
                    ran += 1;
                    let code = format!("{:?}", plan.instruction.code());
                    if let Some(why) = difference(plan, result) {
                        let line = format!(
                            "{}
      {why}",
                            describe(mode, plan)
                        );
                        wrong.entry(code.clone()).or_default().push(line);
                    }
                    covered.insert(code);
                }
            }
        }
    }
    println!("{ran} cases, {} instruction forms, seed {seed}", covered.len());
    for (code, lines) in &wrong {
        println!("{code}: {} differences", lines.len());
        for line in lines.iter().take(3) {
            println!("   {line}");
        }
    }
    assert!(
        wrong.is_empty(),
        "{} forms differ; SUBRING_SEED={seed} SUBRING_ITERATIONS={rounds} repeats it",
        wrong.len()
    );
    assert!(covered.len() > 1000, "only {} forms were tried", covered.len());
}
