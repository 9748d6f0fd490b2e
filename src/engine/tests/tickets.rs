//! Runs the fuzz target of session tickets on random cases, so that it stays true on a stable compiler.

#![allow(clippy::expect_used, reason = "a fuzz target panics when a promise is broken")]

#[path = "../fuzz/src/tickets.rs"]
mod fuzzed;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_but_a_ticket_that_was_given_out_is_taken_back(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        fuzzed::fuzz_one(&bytes);
    }
}

#[test]
fn a_ticket_that_was_given_out_is_taken_back() {
    fuzzed::fuzz_one(&[1]);
}
