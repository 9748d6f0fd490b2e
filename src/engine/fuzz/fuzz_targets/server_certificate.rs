//! `cargo +nightly fuzz run server_certificate`

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| keygate_engine_fuzz::server_certificate::fuzz_one(bytes));
