//! Owns session tickets: encrypting what rustls wants to remember under keys that every worker shares, and taking them
//! back. Knows nothing of where the keys come from (the primary, or a token). Called on the I/O thread.
//!
//! A ticket is `name(16) || nonce(12) || AES-256-GCM(issued(8) || state) || tag(16)` (RFC 5077 section 4 in spirit). The name
//! tells the epoch, so a ticket of the previous or the next epoch is accepted too: a clock that is a little off costs no
//! handshake. The scope is authenticated and not in the ticket: where another one holds, the ticket does not open.

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use rustls::server::ProducesTickets;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};
use zeroize::Zeroizing;

const NAME_BYTES: usize = 16;
const KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const ISSUED_BYTES: usize = 8;
const HEAD_BYTES: usize = NAME_BYTES + NONCE_LEN;
/// RFC 8446 4.6.1: a ticket fits in 2^16 - 1 bytes; ours are far smaller unless a client certificate chain is in them.
const TICKET_BYTES_MAX: usize = 16 * 1024;
/// RFC 8446 4.6.1: clients must not keep tickets longer than seven days.
pub const LIFETIME_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a ticket is good for beside its keys: a digest of what its session may have been agreed on under.
pub type TicketScope = [u8; 32];

/// The secret of one epoch, from which its name and key are derived.
pub type EpochSecret = Zeroizing<[u8; 32]>;

/// Which keys to use: `current` encrypts, all three decrypt.
pub struct TicketKeys {
    current: EpochKey,
    others: Vec<EpochKey>,
}

struct EpochKey {
    name: [u8; NAME_BYTES],
    /// Makes its nonces itself, as SP 800-38D 8.2.2 has it and the FIPS module wants it.
    key: RandomizedNonceKey,
}

/// What rustls talks to, one for each listener's configuration; `rotate` reaches them all.
#[derive(Clone)]
pub struct Ticketer {
    // None until the first rotate: no tickets are given out then, and none taken.
    keys: Arc<RwLock<Option<TicketKeys>>>,
    lifetime: Duration,
    /// Authenticated and not in the ticket: where another one holds, the ticket does not open.
    scope: TicketScope,
}

impl Ticketer {
    /// `lifetime` (at most `LIFETIME_MAX`): what clients are told, and how old a ticket may be that is taken back, whoever
    /// issued it. Its keys may be gone before.
    pub fn new(lifetime: Duration) -> Self {
        let keys = Arc::new(RwLock::new(None));
        Self { keys, lifetime: lifetime.min(LIFETIME_MAX), scope: TicketScope::default() }
    }

    /// The same keys, also after later rotations: sessions survive a reload.
    pub fn within(&self, scope: TicketScope, lifetime: Duration) -> Self {
        Self { keys: self.keys.clone(), lifetime: lifetime.min(LIFETIME_MAX), scope }
    }

    /// No tickets any more, until the next `rotate`.
    pub fn stop(&self) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub fn rotate(&self, current: &EpochSecret, others: &[EpochSecret]) {
        let derived =
            EpochKey::derive(current).zip(others.iter().map(EpochKey::derive).collect::<Option<Vec<_>>>());
        let keys = derived.map(|(current, others)| TicketKeys { current, others });
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }
}

impl std::fmt::Debug for Ticketer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticketer").field("lifetime", &self.lifetime).finish_non_exhaustive()
    }
}

impl ProducesTickets for Ticketer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(self.lifetime.as_secs()).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.seal(plain, SystemTime::now())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.open(ticket, SystemTime::now())
    }
}

impl Ticketer {
    fn seal(&self, plain: &[u8], now: SystemTime) -> Option<Vec<u8>> {
        let keys = self.keys.read().ok()?;
        let EpochKey { name, key } = &keys.as_ref()?.current;
        let mut ticket = Vec::with_capacity(HEAD_BYTES + ISSUED_BYTES + plain.len() + TAG_BYTES);
        ticket.extend_from_slice(name);
        ticket.extend_from_slice(&[0; NONCE_LEN]);
        ticket.extend_from_slice(&milliseconds(now).to_be_bytes());
        ticket.extend_from_slice(plain);
        let (head, body) = ticket.split_at_mut(HEAD_BYTES);
        let (nonce, tag) = key.seal_in_place_separate_tag(self.aad(name), body).ok()?;
        head.get_mut(NAME_BYTES..)?.copy_from_slice(nonce.as_ref());
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    fn open(&self, ticket: &[u8], now: SystemTime) -> Option<Vec<u8>> {
        if ticket.len() < HEAD_BYTES + ISSUED_BYTES + TAG_BYTES || ticket.len() > TICKET_BYTES_MAX {
            return None;
        }
        let (head, body) = ticket.split_at(HEAD_BYTES);
        let (name, nonce) = head.split_at(NAME_BYTES);
        let keys = self.keys.read().ok()?;
        let keys = keys.as_ref()?;
        // Names are public, so an early exit from the comparison tells nothing.
        let epoch = std::iter::once(&keys.current).chain(&keys.others).find(|epoch| epoch.name == name)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut body = body.to_vec();
        let plain = epoch.key.open_in_place(nonce, self.aad(&epoch.name), &mut body).ok()?;
        let (issued, state) = plain.split_first_chunk::<ISSUED_BYTES>()?;
        // One from the future is of another host, whose clock is ahead.
        let age_ms = milliseconds(now).saturating_sub(u64::from_be_bytes(*issued));
        (u128::from(age_ms) <= self.lifetime.as_millis()).then(|| state.to_vec())
    }

    fn aad(&self, name: &[u8; NAME_BYTES]) -> Aad<Vec<u8>> {
        Aad::from([&name[..], &self.scope].concat())
    }
}

/// Since 1970. A clock before that says that every ticket is new, and the keys that open it still end.
fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl EpochKey {
    /// HKDF-Expand (RFC 5869) of the epoch's secret; None only if the library refuses lengths that are constants here.
    fn derive(secret: &EpochSecret) -> Option<Self> {
        let prk = Salt::new(HKDF_SHA256, b"keygate session tickets").extract(secret.as_slice());
        let mut name = [0; NAME_BYTES];
        prk.expand(&[b"name"], Bytes(NAME_BYTES)).ok()?.fill(&mut name).ok()?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        prk.expand(&[b"key"], Bytes(KEY_BYTES)).ok()?.fill(key.as_mut_slice()).ok()?;
        Some(Self { name, key: RandomizedNonceKey::new(&AES_256_GCM, key.as_slice()).ok()? })
    }
}

struct Bytes(usize);

impl KeyType for Bytes {
    fn len(&self) -> usize {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secret(byte: u8) -> EpochSecret {
        Zeroizing::new([byte; 32])
    }

    fn ticketer(current: u8, others: &[u8]) -> Ticketer {
        let ticketer = Ticketer::new(Duration::from_secs(3600));
        ticketer.rotate(&secret(current), &others.iter().map(|byte| secret(*byte)).collect::<Vec<_>>());
        ticketer
    }

    #[test]
    fn another_worker_with_the_same_epoch_takes_a_ticket_back() {
        let ticket = ticketer(1, &[]).encrypt(b"state").expect("a ticket");
        assert_eq!(ticketer(1, &[]).decrypt(&ticket).as_deref(), Some(&b"state"[..]));
    }

    #[test]
    fn previous_and_next_epochs_are_taken_and_others_are_not() {
        let ticket = ticketer(1, &[]).encrypt(b"state").expect("a ticket");
        assert!(ticketer(2, &[1, 3]).decrypt(&ticket).is_some());
        assert!(ticketer(0, &[1]).decrypt(&ticket).is_some());
        assert!(ticketer(3, &[2, 4]).decrypt(&ticket).is_none());
    }

    #[test]
    fn without_keys_no_ticket_is_given_or_taken() {
        let empty = Ticketer::new(Duration::from_secs(3600));
        assert!(empty.encrypt(b"state").is_none());
        assert!(empty.decrypt(&ticketer(1, &[]).encrypt(b"state").expect("a ticket")).is_none());
    }

    #[test]
    fn a_ticket_is_taken_until_the_lifetime_of_who_takes_it_and_no_longer() {
        let issuer = ticketer(1, &[]);
        let strict = issuer.within(TicketScope::default(), Duration::from_secs(60));
        let issued = SystemTime::now();
        let ticket = issuer.seal(b"state", issued).expect("a ticket");
        for (age_s, by_issuer, by_strict) in
            [(0, true, true), (60, true, true), (61, true, false), (3601, false, false)]
        {
            let now = issued + Duration::from_secs(age_s);
            assert_eq!(issuer.open(&ticket, now).is_some(), by_issuer, "{age_s} s");
            assert_eq!(strict.open(&ticket, now).is_some(), by_strict, "{age_s} s");
        }
        let ahead = issued - Duration::from_secs(5);
        assert!(issuer.open(&ticket, ahead).is_some(), "the clock of another host is ahead");
    }

    #[test]
    fn a_ticket_of_another_scope_is_refused() {
        let ticketer = ticketer(1, &[]);
        let [one, other] = [[1; 32], [2; 32]].map(|scope| ticketer.within(scope, Duration::from_secs(60)));
        let ticket = one.encrypt(b"state").expect("a ticket");
        assert!(one.decrypt(&ticket).is_some());
        assert!(other.decrypt(&ticket).is_none());
        assert!(ticketer.decrypt(&ticket).is_none());
    }

    #[test]
    fn the_lifetime_told_to_clients_is_at_most_seven_days() {
        assert_eq!(Ticketer::new(Duration::from_secs(30 * 24 * 3600)).lifetime(), 7 * 24 * 3600);
    }

    proptest! {
        #[test]
        fn any_state_survives_and_any_flipped_bit_is_refused(state in prop::collection::vec(any::<u8>(), 0..2000), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let ticketer = ticketer(7, &[]);
            let mut ticket = ticketer.encrypt(&state).expect("a ticket");
            prop_assert_eq!(ticketer.decrypt(&ticket), Some(state));
            let index = at.index(ticket.len());
            ticket[index] ^= 1 << bit;
            prop_assert_eq!(ticketer.decrypt(&ticket), None);
        }

        #[test]
        fn arbitrary_bytes_are_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(ticketer(7, &[]).decrypt(&bytes), None);
        }
    }
}
