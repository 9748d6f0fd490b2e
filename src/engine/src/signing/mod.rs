//! Owns the way from "this handshake needs a signature" to the signature, over one or more tokens.
//! Must not know TLS connections, nor PKCS#11 below the token. This file runs on the I/O thread and never blocks it.
//!
//! ```text
//!  I/O thread   PrivateKey::sign --> Token::submit --> Desk (queue.rs)      PendingSignature::poll
//!                    |  the token with the shortest expected wait |                  ^
//!  lanes             +--------------------------- lane.rs takes a Job -- oneshot ----+
//!                                                    | token_key.rs: C_SignInit, C_Sign, check
//!                                                    | repairs: reopen -> log in (login.rs) -> find again
//!  the module                                     pkcs11.rs
//! ```

pub mod ckr;
pub mod desk;
pub mod encode;
mod key_directory;
mod lane;
pub mod login;
pub mod login_lock;
mod pace;
pub mod pkcs11;
pub mod presented_pins;
pub mod public_key;
pub mod queue;
pub mod service_time;
pub mod token;
pub mod token_error;
pub mod token_key;
pub mod token_stats;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::SignatureScheme;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use ckr::Ckr;
use desk::{Health, Job};
use public_key::KeyAlgorithm;
use queue::Class;
use token::Token;
use token_key::TokenKey;

/// A certificate's private key, held by one or more tokens.
pub struct PrivateKey {
    /// Invariant: not empty, all with the same public key.
    keys: Vec<Arc<TokenKey>>,
}

/// The tokens given for one certificate do not hold one private key.
#[derive(Debug, PartialEq, Eq)]
pub enum PrivateKeyError {
    NoToken,
    /// Two tokens hold keys of different certificates.
    PublicKeysDiffer {
        first: Arc<str>,
        other: Arc<str>,
    },
}

/// A signature in the TLS encoding (RFC 8446 4.2.3), and where its time went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    pub signature: Vec<u8>,
    /// In the queue.
    pub waited: Duration,
    /// On the lane: the token's calls, repairs, and the check.
    pub signing: Duration,
    /// Name of the token.
    pub token: Arc<str>,
}

/// Why there is no signature. `reason` is the third word of the close reason `token/signing/<reason>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignError {
    /// Too many requests of this class wait.
    QueueFull,
    /// Waited longer than `queue_age_max`.
    QueueAged,
    /// Every token with this key is down or stopping, or went down while the request waited.
    TokenDown,
    /// The caller's own deadline passed. Lanes never say this.
    Deadline,
    /// The token returned a wrong signature, which was thrown away.
    Wrong,
    /// The token no longer holds exactly one such private key.
    KeyLost,
    /// The key cannot sign with this scheme.
    SchemeUnsupported,
    /// The token failed, and no repair helped.
    Failed(Ckr),
}

impl PrivateKey {
    pub fn new(keys: Vec<Arc<TokenKey>>) -> Result<Arc<PrivateKey>, PrivateKeyError> {
        let Some(first) = keys.first() else { return Err(PrivateKeyError::NoToken) };
        if let Some(other) = keys.iter().find(|key| key.public.spki() != first.public.spki()) {
            return Err(PrivateKeyError::PublicKeysDiffer {
                first: first.token_name().clone(),
                other: other.token_name().clone(),
            });
        }
        Ok(Arc::new(PrivateKey { keys }))
    }

    pub fn algorithm(&self) -> KeyAlgorithm {
        self.keys[0].public.algorithm()
    }

    /// In the order of preference.
    pub fn schemes(&self) -> &[SignatureScheme] {
        self.keys[0].public.schemes()
    }

    /// The DER SubjectPublicKeyInfo.
    pub fn spki(&self) -> &[u8] {
        self.keys[0].public.spki()
    }

    /// Whether any token that holds the key is up.
    pub fn is_up(&self) -> bool {
        self.keys.iter().any(|key| key.token.is_up())
    }

    /// No token that holds the key is up, and one of them only a new process can help.
    pub fn is_stuck(&self) -> bool {
        !self.is_up() && self.keys.iter().any(|key| key.token.is_stuck())
    }

    /// A signature by whichever token makes one before the deadline: one that fails, or takes more than its share of the
    /// time, is followed by the next. A token that is being mended is waited for when there is no other. I/O thread.
    pub async fn signature(
        self: &Arc<Self>,
        scheme: SignatureScheme,
        message: Vec<u8>,
        deadline: Instant,
    ) -> Result<Signed, SignError> {
        let mut asked = Asked::default();
        loop {
            let pending = self.ask(scheme, message.clone(), &mut asked)?;
            let token = pending.token.clone();
            let tokens = self.others_up(&asked) + 1;
            let share = deadline.saturating_duration_since(Instant::now()) / tokens;
            let error = match timeout_at(Instant::now() + share, pending).await {
                Ok(Ok(signed)) => return Ok(signed),
                Ok(Err(error)) => error,
                Err(_) => {
                    // What is not measured costs nothing, and would be asked first again.
                    token.took(self.algorithm().class(), share);
                    SignError::Deadline
                }
            };
            if deadline <= Instant::now() || self.candidates(&asked).next().is_none() {
                return Err(error);
            }
            token.stats().failed_over.add(1);
        }
    }

    /// Asks the token that costs least; the next one when that one is full. Never blocks.
    /// `Err` at once: `SchemeUnsupported`, `QueueFull`, or `TokenDown` when no token is up.
    pub fn sign(
        self: &Arc<Self>,
        scheme: SignatureScheme,
        message: Vec<u8>,
    ) -> Result<PendingSignature, SignError> {
        self.ask(scheme, message, &mut Asked::default())
    }

    fn ask(
        &self,
        scheme: SignatureScheme,
        message: Vec<u8>,
        asked: &mut Asked,
    ) -> Result<PendingSignature, SignError> {
        if !self.schemes().contains(&scheme) {
            return Err(SignError::SchemeUnsupported);
        }
        let class = self.algorithm().class();
        let submitted = std::time::Instant::now();
        let (reply, answer) = oneshot::channel();
        let mut payload = (message, reply);
        let mut error = SignError::TokenDown;
        while let Some((index, key)) = self.cheapest(class, asked) {
            asked.0 |= 1 << index;
            let (key, token) = (key.clone(), key.token.clone());
            let is_alone = self.others_up(asked) == 0;
            let (message, reply) = payload;
            let job = Job { key, scheme, message, submitted, is_alone, has_failed: false, reply };
            match token.submit(class, job) {
                Ok(()) => return Ok(PendingSignature { token, answer }),
                Err((job, refused)) => {
                    payload = (job.message, job.reply);
                    error = refused;
                }
            }
        }
        Err(error)
    }

    fn cheapest(&self, class: Class, asked: &Asked) -> Option<(usize, &Arc<TokenKey>)> {
        let mut candidates = self.candidates(asked);
        let first = candidates.next()?;
        // The common case is one token: no estimate needed.
        let Some(second) = candidates.next() else { return Some(first) };
        [first, second].into_iter().chain(candidates).min_by_key(|(_, key)| key.token.cost(class))
    }

    /// How many could sign at once if those that were asked do not.
    fn others_up(&self, asked: &Asked) -> u32 {
        self.candidates(asked).map(|(_, key)| u32::from(key.token.health() == Health::Up)).sum()
    }

    /// Where the key may be signed with.
    fn candidates(&self, asked: &Asked) -> impl Iterator<Item = (usize, &Arc<TokenKey>)> {
        let asked = asked.0;
        self.keys.iter().enumerate().take(u64::BITS as usize).filter(move |(index, key)| {
            asked & (1 << index) == 0 && key.token.health() != Health::Down && !key.is_lost()
        })
    }
}

/// The tokens that were tried for one signature, by their place among the keys. More than there are bits are never tried.
#[derive(Default)]
struct Asked(u64);

/// A signature on its way. Dropping it cancels the request: a lane that comes to it afterwards does not sign.
/// The caller enforces the deadline of the handshake.
#[must_use]
pub struct PendingSignature {
    /// That is asked.
    token: Arc<Token>,
    answer: oneshot::Receiver<Result<Signed, SignError>>,
}

impl Future for PendingSignature {
    type Output = Result<Signed, SignError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // A lane that vanished without an answer has panicked; its token is as good as down.
        Pin::new(&mut self.answer).poll(context).map(|answer| answer.unwrap_or(Err(SignError::TokenDown)))
    }
}

impl SignError {
    /// Every reason, for the tests that hold the lists on both sides of the border equal.
    pub const REASONS: [&'static str; 8] = [
        "queue_full",
        "queue_aged",
        "token_down",
        "deadline",
        "wrong_signature",
        "key_lost",
        "scheme_unsupported",
        "token_failed",
    ];

    pub fn reason(self) -> &'static str {
        match self {
            SignError::QueueFull => "queue_full",
            SignError::QueueAged => "queue_aged",
            SignError::TokenDown => "token_down",
            SignError::Deadline => "deadline",
            SignError::Wrong => "wrong_signature",
            SignError::KeyLost => "key_lost",
            SignError::SchemeUnsupported => "scheme_unsupported",
            SignError::Failed(_) => "token_failed",
        }
    }
}

impl fmt::Display for SignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SignError::Failed(ckr) => write!(f, "{}: {ckr}", self.reason()),
            _ => f.write_str(self.reason()),
        }
    }
}

impl std::error::Error for SignError {}

impl fmt::Display for PrivateKeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PrivateKeyError::NoToken => f.write_str("no token holds the private key"),
            PrivateKeyError::PublicKeysDiffer { first, other } => {
                write!(f, "tokens {first} and {other} hold private keys of different certificates")
            }
        }
    }
}

impl std::error::Error for PrivateKeyError {}

// The I/O thread shares keys with lanes, and lanes hand signatures back.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    const fn sent<T: Send>() {}
    shared::<PrivateKey>();
    sent::<PendingSignature>();
    sent::<pkcs11::Session>();
};
