//! What reads bytes of strangers, and the fuzz targets on random cases, so that they stay true on a stable compiler. One
//! program, because linking each of several with the engine takes longer than all that they test.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics when a promise is broken")]

mod proxy_header_read;
mod proxy_header_written;

#[path = "../../fuzz/src/proxy_header.rs"]
mod proxy_header;
#[path = "../../fuzz/src/proxy_header_in.rs"]
mod proxy_header_in;
#[path = "../../fuzz/src/server_certificate.rs"]
mod server_certificate;
#[path = "../../fuzz/src/tickets.rs"]
mod tickets;

use proptest::prelude::*;

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(2_048))]

    #[test]
    fn nothing_but_the_certificate_that_dns_names_is_accepted(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        server_certificate::fuzz_one(&bytes);
    }
}

#[test]
fn the_certificate_that_dns_names_is_accepted() {
    server_certificate::fuzz_one(&[1]);
}

proptest! {
    #![proptest_config(cases(4_096))]

    #[test]
    fn nothing_but_a_ticket_that_was_given_out_is_taken_back(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        tickets::fuzz_one(&bytes);
    }
}

#[test]
fn a_ticket_that_was_given_out_is_taken_back() {
    tickets::fuzz_one(&[1]);
}
