//! Replays what is kept of the fuzz targets' inputs (`fuzz/seeds`, and whatever corpus there is), without a fuzzer.

use std::path::Path;
use std::time::{Duration, Instant};
use subring_tests::fuzz::{TARGETS, run};

/// What the corpora may take in all: they grow without end.
const CORPORA: Duration = Duration::from_secs(60);

fn files(of: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(of) else { return Vec::new() };
    let mut files: Vec<_> =
        entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.is_file()).collect();
    files.sort();
    files
}

#[test]
fn inputs_that_were_kept_find_nothing() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let since = Instant::now();
    let mut failed = Vec::new();
    for target in TARGETS {
        let seeds = files(&fuzz.join("seeds").join(target));
        assert!(!seeds.is_empty(), "{target} has no seeds");
        let corpus = files(&fuzz.join("corpus").join(target));
        // Spread over the corpus, as many as there is time for.
        let stride = (corpus.len() / 200).max(1);
        let mut done = 0;
        for (n, file) in seeds.iter().chain(corpus.iter().step_by(stride)).enumerate() {
            if n >= seeds.len() && since.elapsed() > CORPORA {
                break;
            }
            let bytes = std::fs::read(file).unwrap();
            match std::panic::catch_unwind(|| run(target, &bytes)) {
                Ok(Ok(())) => done += 1,
                Ok(Err(why)) => {
                    println!("SKIP: {target}: {why}");
                    break;
                }
                Err(_) => failed.push(file.clone()),
            }
        }
        println!("{target}: {done} of {} seeds and {} of a corpus", seeds.len(), corpus.len());
    }
    assert!(failed.is_empty(), "these find something: {failed:?}");
}

/// `SUBRING_INPUT=TARGET:FILE` shows what the target finds in the file.
#[test]
#[ignore = "to look at failures"]
fn one_input() {
    let Ok(text) = std::env::var("SUBRING_INPUT") else { return };
    let (target, file) = text.split_once(':').expect("TARGET:FILE");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    run(target, &std::fs::read(file).unwrap()).unwrap();
}
