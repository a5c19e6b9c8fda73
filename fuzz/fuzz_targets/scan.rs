#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| subring_tests::fuzz::run("scan", bytes).unwrap());
