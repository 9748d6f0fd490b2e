//! Owns one private key in one token: how it is found, its present handle, and one checked signature with it.
//! Must not know lanes, queues or repairs. Runs on lanes, and on the thread that looks for the key first.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
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
    /// Held across calls into the module while the key is looked for: never lock it on the I/O thread.
    place: Mutex<Place>,
    /// Milliseconds since `born`; 0: not lost. Apart from `place`, because the I/O thread reads it.
    lost_until_ms: AtomicU64,
    born: Instant,
}

/// Where the key is in the token now.
#[derive(Default)]
struct Place {
    found: Option<Found>,
    generation: u64,
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
}

impl Fault {
    /// The same for whoever configures. `function` is what was being called.
    pub(super) fn problem(self, function: &'static str) -> Problem {
        match self {
            Fault::Call(ckr) => Problem::Call { function, ckr },
            Fault::KeyMissing => Problem::KeyMissing,
            Fault::KeyAmbiguous => Problem::KeyAmbiguous,
            Fault::Wrong(_) => Problem::KeyMismatch,
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
            lost_until_ms: AtomicU64::new(0),
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
        self.place.lock().unwrap_or_else(PoisonError::into_inner).generation
    }

    /// Believes a handle that was not searched for; the caller proves it.
    pub(super) fn suppose(&self, session: &Session, handle: CK_OBJECT_HANDLE, epoch: u64) -> Found {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        place.generation += 1;
        let incarnation = session.incarnation();
        let found = Found { handle, generation: place.generation, epoch, incarnation };
        place.found = Some(found);
        found
    }

    /// The handle for this epoch; looks for the key when there is none, or when the known one is `stale` (its
    /// generation). Lanes that need the same search wait for the first one.
    pub(super) fn locate(&self, session: &Session, epoch: u64, stale: Option<u64>) -> Result<Found, Fault> {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = place.found
            && (found.epoch, found.incarnation) == (epoch, session.incarnation())
            && Some(found.generation) != stale
        {
            return Ok(found);
        }
        place.found = None;
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
        let fault = match matches {
            Matches::One(handle) => {
                place.generation += 1;
                let incarnation = session.incarnation();
                let found = Found { handle, generation: place.generation, epoch, incarnation };
                place.found = Some(found);
                self.lost_until_ms.store(0, Relaxed);
                self.token.stats().refound.add(u64::from(found.generation > 1));
                return Ok(found);
            }
            Matches::None => Fault::KeyMissing,
            Matches::Several => Fault::KeyAmbiguous,
        };
        self.lost_until_ms.store(self.age_ms(LOST_PAUSE), Relaxed);
        Err(fault)
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
        if verify {
            self.public.verify(scheme, message, &signature).map_err(Fault::Wrong)?;
        }
        Ok(signature)
    }

    /// Proves that this handle is the certificate's private key.
    pub(super) fn prove(&self, session: &Session, found: Found) -> Result<(), Fault> {
        let scheme = self.public.schemes()[0];
        self.sign(session, found, scheme, PROOF_MESSAGE, true).map(drop)
    }
}

/// Cannot be taken for anything TLS signs (RFC 8446 4.4.3 begins with 64 blanks, RFC 5246 7.4.3 with two randoms).
const PROOF_MESSAGE: &[u8] = b"keygate asks whether this private key belongs to its certificate";
