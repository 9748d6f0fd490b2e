//! Owns what session tickets must hold to: whatever a client presents, it is refused without a panic unless it is, byte for
//! byte, a ticket that was given out.

use std::sync::OnceLock;

use keygate_engine::tickets::{EpochSecret, LIFETIME_MAX, Ticketer};
use rustls::server::ProducesTickets;

const STATE: &[u8] = b"the state of a TLS session";

/// The first byte chooses: arbitrary bytes as a ticket, or a good ticket with some bytes overwritten by the rest.
pub fn fuzz_one(bytes: &[u8]) {
    let (ticketer, good) = given_out();
    let Some((choice, rest)) = bytes.split_first() else { return };
    let presented = if choice % 2 == 0 { rest.to_vec() } else { overwritten(good, rest) };
    let expected = (presented == *good).then(|| STATE.to_vec());
    assert_eq!(ticketer.decrypt(&presented), expected);
}

fn given_out() -> &'static (Ticketer, Vec<u8>) {
    static GIVEN_OUT: OnceLock<(Ticketer, Vec<u8>)> = OnceLock::new();
    GIVEN_OUT.get_or_init(|| {
        let ticketer = Ticketer::new(LIFETIME_MAX);
        ticketer.rotate(&EpochSecret::new([1; 32]), &[EpochSecret::new([2; 32])]);
        let good = ticketer.encrypt(STATE).expect("keys are set");
        (ticketer, good)
    })
}

/// Pairs of position and byte; an odd last byte cuts the ticket at that position.
fn overwritten(good: &[u8], edits: &[u8]) -> Vec<u8> {
    let mut ticket = good.to_vec();
    for edit in edits.chunks(2) {
        match *edit {
            [position, byte] => {
                let at = usize::from(position) % ticket.len().max(1);
                if let Some(target) = ticket.get_mut(at) {
                    *target = byte;
                }
            }
            [length] => ticket.truncate(usize::from(length)),
            _ => {}
        }
    }
    ticket
}
