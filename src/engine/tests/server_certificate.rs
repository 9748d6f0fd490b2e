//! Runs the fuzz target of servers' certificates on random cases, so that it stays true on a stable compiler.

#![allow(clippy::expect_used, reason = "a fuzz target panics when a promise is broken")]

#[path = "../fuzz/src/server_certificate.rs"]
mod fuzzed;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_but_the_certificate_that_dns_names_is_accepted(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        fuzzed::fuzz_one(&bytes);
    }
}

#[test]
fn the_certificate_that_dns_names_is_accepted() {
    fuzzed::fuzz_one(&[1]);
}
