//! `cargo +nightly fuzz run proxy_header_in`

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| keygate_engine_fuzz::proxy_header_in::fuzz_one(bytes));
