//! Owns the reasons why an upstream server's certificate is refused, or would be: one closed list, how they travel through
//! rustls, and how often each was found. Knows nothing of how one is found out.

use std::fmt;
use std::sync::Arc;

use rustls::{CertificateError, Error, OtherError};

use crate::close::Close;
use crate::stats::Counter;

/// What is looked at. Each has a mode of its own, except that pins follow PKIX.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    Pkix,
    Dane,
    Transparency,
}

macro_rules! reasons {
    ($($name:ident = $check:ident $word:literal => $close:ident;)+) => {
        /// Why a server's certificate is not accepted. What each means to an operator stands in close.rs.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Reason { $($name),+ }

        impl Reason {
            pub const ALL: &[Reason] = &[$(Reason::$name),+];

            /// The third word of the close reason.
            pub fn word(self) -> &'static str {
                match self { $(Self::$name => $word),+ }
            }

            pub fn check(self) -> Check {
                match self { $(Self::$name => Check::$check),+ }
            }

            /// Why a connection ends that is refused for this.
            pub fn close(self) -> Close {
                match self { $(Self::$name => Close::$close),+ }
            }
        }
    };
}

reasons! {
    Invalid = Pkix "invalid" => UpstreamHandshakeInvalid;
    UnknownIssuer = Pkix "unknown_issuer" => UpstreamHandshakeUnknownIssuer;
    SelfSigned = Pkix "self_signed" => UpstreamHandshakeSelfSigned;
    Expired = Pkix "expired" => UpstreamHandshakeExpired;
    NotYetValid = Pkix "not_yet_valid" => UpstreamHandshakeNotYetValid;
    WrongName = Pkix "wrong_name" => UpstreamHandshakeWrongName;
    WrongPurpose = Pkix "wrong_purpose" => UpstreamHandshakeWrongPurpose;
    BadSignature = Pkix "bad_signature" => UpstreamHandshakeBadSignature;
    WeakKey = Pkix "weak_key" => UpstreamHandshakeWeakKey;
    WeakSignature = Pkix "weak_signature" => UpstreamHandshakeWeakSignature;
    Revoked = Pkix "revoked" => UpstreamHandshakeRevoked;
    RevocationUnknown = Pkix "revocation_unknown" => UpstreamHandshakeRevocationUnknown;
    PinMismatch = Pkix "pin_mismatch" => UpstreamHandshakePinMismatch;
    TlsaMismatch = Dane "tlsa_mismatch" => UpstreamHandshakeTlsaMismatch;
    TlsaMissing = Dane "tlsa_missing" => UpstreamHandshakeTlsaMissing;
    TlsaInsecure = Dane "tlsa_insecure" => UpstreamHandshakeTlsaInsecure;
    TlsaUnavailable = Dane "tlsa_unavailable" => UpstreamHandshakeTlsaUnavailable;
    SctMissing = Transparency "sct_missing" => UpstreamHandshakeSctMissing;
    SctInvalid = Transparency "sct_invalid" => UpstreamHandshakeSctInvalid;
    SctInsufficient = Transparency "sct_insufficient" => UpstreamHandshakeSctInsufficient;
}

impl Reason {
    /// With the alert that TLS has for it (RFC 8446 6.2): rustls chooses that by the error's variant. What has no variant of
    /// its own is `certificate_unknown`.
    pub fn into_error(self) -> Error {
        Error::InvalidCertificate(match self {
            Self::Invalid => CertificateError::BadEncoding,
            Self::UnknownIssuer => CertificateError::UnknownIssuer,
            Self::Expired => CertificateError::Expired,
            Self::NotYetValid => CertificateError::NotValidYet,
            Self::WrongName => CertificateError::NotValidForName,
            Self::WrongPurpose => CertificateError::InvalidPurpose,
            Self::BadSignature => CertificateError::BadSignature,
            Self::Revoked => CertificateError::Revoked,
            Self::RevocationUnknown => CertificateError::UnknownRevocationStatus,
            _ => CertificateError::Other(OtherError(Arc::new(Refusal(self)))),
        })
    }

    /// Which one ended a handshake with a server; None: it was not the server's certificate, nor its proof of having the key.
    pub fn from_error(error: &Error) -> Option<Self> {
        let Error::InvalidCertificate(error) = error else { return None };
        Some(match error {
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::Expired => Self::Expired,
            CertificateError::NotValidYet => Self::NotYetValid,
            CertificateError::NotValidForName => Self::WrongName,
            CertificateError::InvalidPurpose => Self::WrongPurpose,
            CertificateError::BadSignature
            | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => Self::BadSignature,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::UnknownRevocationStatus => Self::RevocationUnknown,
            CertificateError::Other(OtherError(other)) => {
                other.downcast_ref::<Refusal>().map_or(Self::Invalid, |refusal| refusal.0)
            }
            _ => Self::Invalid,
        })
    }
}

/// Carries a reason through rustls.
#[derive(Debug)]
struct Refusal(Reason);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server's certificate is refused: {}", self.0.word())
    }
}

impl std::error::Error for Refusal {}

/// What the verifications of one upstream have found. A verifier does not know for which connection it works, so what is only
/// reported is counted here, by reason; what is enforced is also the handshake's error.
#[derive(Default)]
pub struct Findings {
    accepted: Counter,
    reported: [Counter; Reason::ALL.len()],
    refused: [Counter; Reason::ALL.len()],
}

impl Findings {
    pub(super) fn accept(&self) {
        self.accepted.add(1);
    }

    pub(super) fn report(&self, reason: Reason) {
        self.reported[reason as usize].add(1);
    }

    pub(super) fn refuse(&self, reason: Reason) {
        self.refused[reason as usize].add(1);
    }

    /// Certificates that were accepted, also those about which something was reported.
    pub fn accepted(&self) -> u64 {
        self.accepted.get()
    }

    /// Every reason with how often it was reported and the certificate accepted, or another check refused it.
    pub fn reported(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.iter().copied().zip(self.reported.iter().map(Counter::get))
    }

    /// Every reason with how often a certificate was refused for it.
    pub fn refused(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.iter().copied().zip(self.refused.iter().map(Counter::get))
    }
}

impl fmt::Debug for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Findings").field("accepted", &self.accepted()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::close::CLOSE_REASONS;

    #[test]
    fn every_reason_survives_its_way_through_rustls() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_error(&reason.into_error()), Some(*reason));
        }
    }

    #[test]
    fn every_reason_is_a_close_reason_of_the_upstream_with_the_same_word() {
        for reason in Reason::ALL {
            let words = &CLOSE_REASONS[reason.close() as usize];
            assert_eq!((words.side, words.phase, words.reason), ("upstream", "handshake", reason.word()));
        }
    }

    #[test]
    fn another_error_is_no_reason() {
        assert_eq!(Reason::from_error(&Error::NoApplicationProtocol), None);
    }
}
