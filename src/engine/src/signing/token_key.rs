//! Owns one private key in one token: how it is found, its present handle, and one checked signature with it.
//! Must not know lanes, queues or repairs. Runs on lanes, and on the thread that looks for the key first; no mutex of it is
//! held across a call into the module.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cryptoki_sys::CK_OBJECT_HANDLE;
use rustls::SignatureScheme;

use super::ckr::Ckr;
use super::pkcs11::{Matches, Session};
use super::public_key::{PublicKey, WrongSignature};
use super::token::Token;
use super::token_error::Problem;

/// Which private key is meant, and the public key of the certificate that it must belong to.
pub struct KeyPlan {
    /// CKA_ID.
    pub id: Option<Vec<u8>>,
    /// CKA_LABEL. At least one of `id` and `label` is given.
    pub label: Option<String>,
    /// DER SubjectPublicKeyInfo from the certificate.
    pub spki: Vec<u8>,
    /// For messages.
    pub name: String,
}

pub struct TokenKey {
    pub(super) token: Arc<Token>,
    pub(super) public: PublicKey,
    /// Of the certificate that was the first to have it.
    pub(super) name: String,
    /// Distinguishes the keys of one token.
    pub(super) number: u64,
    id: Option<Vec<u8>>,
    label: Option<String>,
    place: Mutex<Place>,
    /// A search has ended.
    searched: Condvar,
    /// Milliseconds since `born`; 0: not lost. Apart from `place`, because the I/O thread reads it.
    lost_until_ms: AtomicU64,
    /// How often it was wrong since it was right, once it was found that it is this key and not the token.
    doubts: AtomicU32,
    /// Not yet for one whose token was away when it was named.
    is_proved: AtomicBool,
    born: Instant,
}

/// Where the key is in the token now.
#[derive(Default)]
struct Place {
    found: Option<Found>,
    generation: u64,
    searching_since: Option<Instant>,
}

/// A handle and how long it may be believed. After a new login or a re-initialised module the same number may mean
/// another key, so a handle is only used in the login epoch and in the incarnation of the module in which it was found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub handle: CK_OBJECT_HANDLE,
    pub generation: u64,
    epoch: u64,
    incarnation: u64,
}

/// Why there is no signature.
#[derive(Debug)]
pub(super) enum Fault {
    Call(Ckr),
    /// Logged in, and the key is not there.
    KeyMissing,
    KeyAmbiguous,
    Wrong(WrongSignature),
    /// It is there, and no key to sign with.
    Unfit(Problem),
}

impl Fault {
    /// The same for whoever configures. `function` is what was being called.
    pub(super) fn problem(self, function: &'static str) -> Problem {
        match self {
            Fault::Call(ckr) => Problem::Call { function, ckr },
            Fault::KeyMissing => Problem::KeyMissing,
            Fault::KeyAmbiguous => Problem::KeyAmbiguous,
            Fault::Wrong(_) => Problem::KeyMismatch,
            Fault::Unfit(problem) => problem,
        }
    }
}

impl From<Ckr> for Fault {
    fn from(ckr: Ckr) -> Fault {
        Fault::Call(ckr)
    }
}

/// A key that was deleted from the token is looked for again after this long, not for each connection.
const LOST_PAUSE: Duration = Duration::from_secs(1);
/// So often the pause until a key is asked again that was wrong doubles: up to 64 s.
const DOUBTS_MAX: u32 = 6;
/// A lane does not wait longer for another one's search: that may hang.
const SEARCH_WAIT: Duration = Duration::from_secs(1);

/// The largest signature: RSA-8192.
pub(super) const SIGNATURE_BYTES_MAX: usize = 1024;

impl TokenKey {
    pub(super) fn new(token: Arc<Token>, plan: KeyPlan, public: PublicKey, number: u64) -> TokenKey {
        TokenKey {
            token,
            public,
            name: plan.name,
            number,
            id: plan.id,
            label: plan.label,
            place: Mutex::default(),
            searched: Condvar::new(),
            lost_until_ms: AtomicU64::new(0),
            doubts: AtomicU32::new(0),
            is_proved: AtomicBool::new(false),
            born: Instant::now(),
        }
    }

    /// The name of the token that holds it.
    pub fn token_name(&self) -> &Arc<str> {
        self.token.name()
    }

    pub fn public_key(&self) -> &PublicKey {
        &self.public
    }

    pub(super) fn id(&self) -> Option<&[u8]> {
        self.id.as_deref()
    }

    pub(super) fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }

    /// The token did not have it a moment ago; another token may. Never waits.
    pub fn is_lost(&self) -> bool {
        match self.lost_until_ms.load(Relaxed) {
            0 => false, // the common case costs no look at the clock
            until_ms => self.age_ms(Duration::ZERO) < until_ms,
        }
    }

    fn age_ms(&self, later: Duration) -> u64 {
        u64::try_from((self.born.elapsed() + later).as_millis()).unwrap_or(u64::MAX)
    }

    /// Counts how often the key was found.
    pub(super) fn generation(&self) -> u64 {
        self.place().generation
    }

    /// Believes a handle that was not searched for; the caller proves it.
    pub(super) fn suppose(&self, session: &Session, handle: CK_OBJECT_HANDLE, epoch: u64) -> Found {
        self.place().find(session, handle, epoch)
    }

    /// The handle for this epoch; looks for the key when there is none, or when the known one is `stale` (its
    /// generation). Lanes that need the same search wait for the first one, unless it takes long.
    pub(super) fn locate(&self, session: &Session, epoch: u64, stale: Option<u64>) -> Result<Found, Fault> {
        let mut place = self.place();
        loop {
            if let Some(found) = place.found
                && (found.epoch, found.incarnation) == (epoch, session.incarnation())
                && Some(found.generation) != stale
            {
                return Ok(found);
            }
            let waited = place.searching_since.map(|since| since.elapsed());
            let Some(left) = waited.and_then(|waited| SEARCH_WAIT.checked_sub(waited)) else { break };
            place = self.searched.wait_timeout(place, left).map_or_else(|it| it.into_inner().0, |it| it.0);
        }
        place.searching_since = Some(Instant::now());
        // A handle that was refused is nobody's any more, also when nothing is found.
        if place.found.is_some_and(|found| Some(found.generation) == stale) {
            place.found = None;
        }
        drop(place);
        let searched = self.search(session);
        let mut place = self.place();
        place.searching_since = None;
        let found = searched.map(|handle| place.find(session, handle, epoch));
        drop(place);
        self.searched.notify_all();
        match &found {
            Ok(found) => {
                if !self.is_doubted() {
                    self.lost_until_ms.store(0, Relaxed);
                }
                self.token.stats().refound.add(u64::from(found.generation > 1));
            }
            Err(Fault::KeyMissing | Fault::KeyAmbiguous) => self.lose(LOST_PAUSE),
            Err(_) => {}
        }
        found
    }

    fn search(&self, session: &Session) -> Result<CK_OBJECT_HANDLE, Fault> {
        let find = || session.find_private_keys(self.id.as_deref(), self.label.as_deref());
        let mut matches = find()?;
        // Private objects are invisible without a login (v3.0 5.7): that is not a missing key. Another lane may log in
        // between the search and the question, so only a search after the answer counts.
        if matches == Matches::None {
            if !session.is_logged_in()? {
                return Err(Ckr::USER_NOT_LOGGED_IN.into());
            }
            matches = find()?;
        }
        match matches {
            Matches::One(handle) => Ok(handle),
            Matches::None => Err(Fault::KeyMissing),
            Matches::Several => Err(Fault::KeyAmbiguous),
        }
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, pause: Duration) {
        self.lost_until_ms.store(self.age_ms(pause), Relaxed);
    }

    /// It was wrong, or unfit, while other keys of the token were right: from now on that is this key's matter alone, and it is asked ever
    /// more rarely until it is right.
    pub(super) fn doubt(&self) {
        let doubts = self.doubts.fetch_add(1, Relaxed).min(DOUBTS_MAX);
        self.lose(LOST_PAUSE * (1 << doubts));
    }

    pub(super) fn is_doubted(&self) -> bool {
        self.doubts.load(Relaxed) > 0
    }

    /// Whether it was seen that lanes may use the key.
    pub(super) fn is_proved(&self) -> bool {
        self.is_proved.load(Relaxed)
    }

    /// One signature in the TLS encoding. The lengths are always checked; the signature itself when `verify` says so.
    pub(super) fn sign(
        &self,
        session: &Session,
        found: Found,
        scheme: SignatureScheme,
        message: &[u8],
        verify: bool,
    ) -> Result<Vec<u8>, Fault> {
        let Some((mechanism, input)) = self.public.token_request(scheme, message) else {
            return Err(Ckr(cryptoki_sys::CKR_MECHANISM_INVALID).into());
        };
        let mut room = [0; SIGNATURE_BYTES_MAX];
        let length = session.sign(mechanism, found.handle, &input, &mut room)?;
        let signature = self.public.tls_signature(&room[..length]).map_err(Fault::Wrong)?;
        // Somebody may have logged in meanwhile, and the handle have become another key's: then it is looked for again.
        let is_stale = self.token.epoch() != found.epoch;
        if verify || is_stale || self.is_doubted() {
            self.public.verify(scheme, message, &signature).map_err(|wrong| match is_stale {
                true => Fault::Call(Ckr(cryptoki_sys::CKR_KEY_HANDLE_INVALID)),
                false => Fault::Wrong(wrong),
            })?;
            if self.is_doubted() {
                self.doubts.store(0, Relaxed);
                self.lost_until_ms.store(0, Relaxed);
            }
        }
        Ok(signature)
    }

    /// Proves that this handle is the certificate's private key.
    pub(super) fn prove(&self, session: &Session, found: Found) -> Result<(), Fault> {
        let scheme = self.public.schemes()[0];
        self.sign(session, found, scheme, PROOF_MESSAGE, true).map(drop)
    }

    /// The same, and that it is a key to sign with that cannot leave the token.
    ///
    /// # Errors
    /// `Unfit` says what else it is; what a call returned, or that it is not the certificate's.
    pub(super) fn prove_fit(&self, session: &Session, found: Found) -> Result<(), Fault> {
        for mechanism in self.public.mechanisms() {
            if !session.can_sign(mechanism.ck_type())? {
                return Err(Fault::Unfit(Problem::MechanismMissing(mechanism.name())));
            }
        }
        if session.flag(found.handle, cryptoki_sys::CKA_ALWAYS_AUTHENTICATE)? == Some(true) {
            return Err(Fault::Unfit(Problem::KeyAlwaysAuthenticates));
        }
        if let Some((attribute, expected)) = exposure(session, found.handle)? {
            return Err(Fault::Unfit(Problem::KeyExposed(attribute, expected)));
        }
        self.prove(session, found)?;
        self.is_proved.store(true, Relaxed);
        Ok(())
    }
}

impl Place {
    fn find(&mut self, session: &Session, handle: CK_OBJECT_HANDLE, epoch: u64) -> Found {
        self.generation += 1;
        let found = Found { handle, generation: self.generation, epoch, incarnation: session.incarnation() };
        // One that hung may come late.
        if self.found.is_none_or(|known| known.epoch <= epoch) {
            self.found = Some(found);
        }
        found
    }
}

/// The attribute by which the key could leave its token, and what it should be.
pub(super) fn exposure(
    session: &Session,
    key: CK_OBJECT_HANDLE,
) -> Result<Option<(&'static str, bool)>, Ckr> {
    for (attribute, name, expected) in CONFINED {
        if session.flag(key, attribute)? != Some(expected) {
            return Ok(Some((name, expected)));
        }
    }
    Ok(None)
}

/// What makes a key one that cannot leave its token (PKCS#11 v3.0 4.9).
const CONFINED: [(cryptoki_sys::CK_ATTRIBUTE_TYPE, &str, bool); 2] = [
    (cryptoki_sys::CKA_SENSITIVE, "CKA_SENSITIVE", true),
    (cryptoki_sys::CKA_EXTRACTABLE, "CKA_EXTRACTABLE", false),
];

/// Cannot be taken for anything TLS signs (RFC 8446 4.4.3 begins with 64 blanks, RFC 5246 7.4.3 with two randoms).
const PROOF_MESSAGE: &[u8] = b"keygate asks whether this private key belongs to its certificate";
