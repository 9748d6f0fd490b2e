//! Owns why a token could not be started or a key not be used. Must not know how any of it is done.
//! Made on the thread that configures (JavaScript's); the error of a single signature is `SignError`.

use std::fmt;

use super::ckr::Ckr;
use super::presented_pins::Obstacle;

/// What failed, and where: "token hsm-a" or "token hsm-a, key www". Never holds the PIN.
#[derive(Debug)]
pub struct TokenError {
    pub place: String,
    pub problem: Problem,
}

#[derive(Debug)]
pub enum Problem {
    /// The module file could not be loaded.
    Load(String),
    /// A number in the plan is out of its range.
    Plan(String),
    /// A PKCS#11 call failed.
    Call {
        function: &'static str,
        ckr: Ckr,
    },
    TokenMissing {
        label: String,
        serial: Option<String>,
        present: Vec<String>,
    },
    TokenAmbiguous {
        label: String,
        serials: Vec<String>,
    },
    PinLocked,
    /// One more wrong PIN would lock the token, so ours was not tried.
    PinFinalTry,
    /// The token refused the PIN, now or earlier in this process. It is not tried again.
    PinRefused(Ckr),
    /// The PIN was sent, here or by another worker, and the token has not answered: it may be wrong, and is not sent again.
    LoginUnanswered,
    /// A lane's thread could not be started.
    Thread(std::io::Error),
    PublicKey(String),
    /// Neither an id nor a label was given.
    KeyUnnamed,
    KeyMissing,
    KeyAmbiguous,
    /// The private key exists, and is not that of the certificate.
    KeyMismatch,
    /// CKA_ALWAYS_AUTHENTICATE: each signature would need a login of its own.
    KeyAlwaysAuthenticates,
    /// This attribute of it must be so, and is not.
    KeyExposed(&'static str, bool),
    MechanismMissing(&'static str),
}

impl TokenError {
    pub fn token(name: &str, problem: Problem) -> TokenError {
        TokenError { place: format!("token {name}"), problem }
    }

    pub fn key(token: &str, key: &str, problem: Problem) -> TokenError {
        TokenError { place: format!("token {token}, key {key}"), problem }
    }
}

impl Problem {
    /// Stable, for programs to switch on.
    pub fn code(&self) -> &'static str {
        match self {
            Problem::Load(_) => "module_not_loaded",
            Problem::Plan(_) => "plan",
            Problem::Call { .. } => "call_failed",
            Problem::TokenMissing { .. } => "token_missing",
            Problem::TokenAmbiguous { .. } => "token_ambiguous",
            Problem::PinLocked => "pin_locked",
            Problem::PinFinalTry => "pin_final_try",
            Problem::PinRefused(_) => "pin_refused",
            Problem::LoginUnanswered => "login_unanswered",
            Problem::Thread(_) => "thread",
            Problem::PublicKey(_) => "public_key",
            Problem::KeyUnnamed => "key_unnamed",
            Problem::KeyMissing => "key_missing",
            Problem::KeyAmbiguous => "key_ambiguous",
            Problem::KeyMismatch => "key_mismatch",
            Problem::KeyAlwaysAuthenticates => "key_always_authenticates",
            Problem::KeyExposed(..) => "key_exposed",
            Problem::MechanismMissing(_) => "mechanism_missing",
        }
    }

    /// Whether it is about the PIN, of which each try costs one.
    pub fn is_pin(&self) -> bool {
        matches!(self, Problem::PinLocked | Problem::PinFinalTry | Problem::PinRefused(_))
    }

    pub fn call(function: &'static str) -> impl Fn(Ckr) -> Problem {
        move |ckr| Problem::Call { function, ckr }
    }

    /// The return code behind it, where there is one.
    pub fn ckr(&self) -> Option<Ckr> {
        match self {
            Problem::Call { ckr, .. } | Problem::PinRefused(ckr) => Some(*ckr),
            _ => None,
        }
    }
}

impl From<Obstacle> for Problem {
    fn from(obstacle: Obstacle) -> Problem {
        match obstacle {
            Obstacle::Refused(ckr) => Problem::PinRefused(ckr),
            Obstacle::Unanswered => Problem::LoginUnanswered,
        }
    }
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.problem)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Load(reason) | Problem::Plan(reason) => f.write_str(reason),
            Problem::Call { function, ckr } => write!(f, "{function} returned {ckr}"),
            Problem::TokenMissing { label, serial, present } => {
                write!(f, "no slot holds a token with label {label:?}")?;
                if let Some(serial) = serial {
                    write!(f, " and serial {serial:?}")?;
                }
                write!(f, "; found {present:?}. Check the label, and that the module reads the right token store")
            }
            Problem::TokenAmbiguous { label, serials } => {
                write!(f, "several tokens have the label {label:?}, serials {serials:?}; add the serial to the URI")
            }
            Problem::PinLocked => f.write_str("its user PIN is locked; unlock it with the security officer's PIN"),
            Problem::PinFinalTry => f.write_str(
                "one more wrong PIN would lock it, so the PIN was not tried; log in once with the right PIN elsewhere",
            ),
            Problem::PinRefused(ckr) => {
                write!(f, "it refused the PIN with {ckr}; it will not be tried again before the PIN changes or a restart")
            }
            Problem::LoginUnanswered => f.write_str(
                "it has not answered a login with this PIN yet, and the PIN is not sent again before it has",
            ),
            Problem::Thread(reason) => write!(f, "cannot start a lane: {reason}"),
            Problem::PublicKey(reason) => write!(f, "the certificate's public key: {reason}"),
            Problem::KeyUnnamed => f.write_str("neither an id nor a label is given; expected at least one"),
            Problem::KeyMissing => f.write_str("the token holds no such private key"),
            Problem::KeyAmbiguous => {
                f.write_str("several private keys match, expected exactly one; give both id and label")
            }
            Problem::KeyMismatch => f.write_str("the private key is not that of the certificate"),
            Problem::KeyAlwaysAuthenticates => f.write_str(
                "the private key wants a login for each signature (CKA_ALWAYS_AUTHENTICATE), which is not supported",
            ),
            Problem::KeyExposed(attribute, expected) => {
                write!(f, "expected a private key with {attribute} {expected}, so that it cannot leave the token; found another one")
            }
            Problem::MechanismMissing(name) => write!(f, "the token cannot sign with {name}, which the key needs"),
        }
    }
}

impl std::error::Error for TokenError {}
