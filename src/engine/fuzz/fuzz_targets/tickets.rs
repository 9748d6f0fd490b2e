//! `cargo +nightly fuzz run tickets`

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| keygate_engine_fuzz::tickets::fuzz_one(bytes));
