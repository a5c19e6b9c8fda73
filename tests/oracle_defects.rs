//! The oracle catches deliberate defects: each of those in `docs/oracle.md`, within so many generated cases.

use monitor::em::placement::Placement;
use subring_tests::oracle::case::{self, Case};
use subring_tests::oracle::defects::{Defect, Saboteur};
use subring_tests::oracle::rewrite::{self, Rewrite};
use subring_tests::oracle::rig::Rig;
use subring_tests::oracle::{Honest, Meddler, Tally};
use subring_tests::ring0_code::Random;

/// Cases a defect may survive.
const CASES: u64 = 60;

enum Input {
    Case(Case),
    Rewrite(Rewrite),
}

impl Input {
    fn run(&self, rig: &mut Rig, meddler: &mut dyn Meddler, tally: &mut Tally) -> Result<(), String> {
        match self {
            Input::Case(case) => case::run(rig, case, meddler, tally),
            Input::Rewrite(rewrite) => rewrite::run(rig, rewrite, meddler, tally),
        }
    }
}

#[test]
fn every_deliberate_defect_is_caught() {
    let placement = Placement::current().unwrap();
    let mut rig = match Rig::new(Some(placement.cpu())) {
        Ok(rig) => rig,
        Err(why) => {
            println!("SKIP: no raw mode here: {why}");
            return;
        }
    };
    placement.bind().unwrap();
    let mut survivors = Vec::new();
    for defect in Defect::ALL {
        let (mut changed, mut tally, mut caught) = (0, Tally::default(), None);
        for seed in 0..CASES {
            let mut saboteur = Saboteur::new(defect, &rig.code);
            *rig.worlds.control.tamper.borrow_mut() = Some(saboteur.between());
            let r = &mut Random(seed);
            let input = if defect.needs_rewriting() {
                Input::Rewrite(Rewrite::generate(r, false))
            } else {
                // Stopped at every few boundaries: a defect may well make an endless loop.
                let mut case = Case::generate(r, false);
                case.flags |= 0x30;
                Input::Case(case)
            };
            let result = input.run(&mut rig, &mut saboteur, &mut tally);
            changed += saboteur.changed;
            *rig.worlds.control.tamper.borrow_mut() = None;
            if let Err(why) = result {
                let again = input.run(&mut rig, &mut Honest, &mut Tally::default());
                again.expect("without the defect nothing differs");
                caught = Some((seed, why.lines().next().unwrap_or_default().to_string()));
                break;
            }
        }
        match caught {
            Some((seed, why)) => println!("{defect:?}: case {seed}, {changed} changes: {why:.150}"),
            None => {
                println!("{defect:?}: not caught, {changed} changes, {tally:?}");
                survivors.push(defect);
            }
        }
    }
    assert_eq!(survivors, [], "not caught within {CASES} cases");
}
