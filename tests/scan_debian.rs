//! The offline scan reads Debian's kernels as they are packaged.

use std::path::PathBuf;

use monitor::scan::{ScanOptions, run};

fn scan(name: &str) -> Option<serde_json::Value> {
    let cache = std::env::var_os("SUBRING_CACHE")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("cache"), PathBuf::from);
    let file = cache.join(name);
    if !file.exists() {
        println!("SKIP: {} is not there; tests/guests/fetch gets it", file.display());
        return None;
    }
    let mut json = Vec::new();
    let options = ScanOptions { file, base: None, entries: vec![], bits: 32, json: true };
    run(&options, &mut json).expect("Debian's kernel is a bzImage");
    Some(serde_json::from_slice(&json).expect("the report is JSON"))
}

#[test]
fn most_of_debians_kernel_is_proven_code_and_all_of_it_decodes() {
    for name in ["vmlinuz-686", "vmlinuz-686-pae"] {
        let Some(report) = scan(name) else { continue };
        let total = |field: &str| report["totals"][field].as_u64().expect("a count");
        assert_eq!(report["format"], "bzImage");
        assert_eq!(report["entry"], 0xc100_0000_u32, "Linux links its i386 kernel there");
        assert!(total("instructions") > 2_000_000, "{name}: {}", report["totals"]);
        assert!(total("instructions") > 9 * total("unproven_instructions"), "{name}: {}", report["totals"]);
        assert!(total("sites") > 3_000, "{name}: {}", report["totals"]);
        // A path into bytes that are no instruction would mean that something was taken for code that is not.
        assert_eq!(report["undecodable"], serde_json::json!([]), "{name}");
    }
}
