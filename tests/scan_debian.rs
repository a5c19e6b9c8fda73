//! The offline scan reads Debian's kernels as they are packaged.

use std::path::PathBuf;

use monitor::scan::{ScanOptions, run};
use subring_tests::{cache, or_skip};

fn scan(file: PathBuf) -> serde_json::Value {
    let mut json = Vec::new();
    let options = ScanOptions { file, base: None, entries: vec![], bits: 32, json: true };
    run(&options, &mut json).expect("Debian's kernel is a bzImage");
    serde_json::from_slice(&json).expect("the report is JSON")
}

#[test]
fn most_of_debians_kernel_is_proven_code_and_all_of_it_decodes() {
    for (name, kernel) in [("686", cache::kernel_686()), ("686-pae", cache::kernel_686_pae())] {
        let report = scan(or_skip!("scan_debian", kernel));
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
