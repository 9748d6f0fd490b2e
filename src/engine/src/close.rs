//! Owns the reasons why a connection ends: one closed list, three words each (side / phase / reason), the same in metric,
//! log, panel and README. Knows nothing of how a connection is run.

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};

use crate::signing::SignError;
use crate::stats::Counter;
use crate::verify::Reason;

macro_rules! close_reasons {
    ($($name:ident = $side:literal / $phase:literal / $reason:literal : $meaning:literal;)+) => {
        /// Why a connection ended. See `CLOSE_REASONS` for the words and their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Close { $($name),+ }

        /// The words of every `Close`, in the order of its variants.
        pub const CLOSE_REASONS: &[CloseReason] = &[
            $(CloseReason { close: Close::$name, side: $side, phase: $phase, reason: $reason, meaning: $meaning }),+
        ];
    };
}

pub struct CloseReason {
    pub close: Close,
    pub side: &'static str,
    pub phase: &'static str,
    pub reason: &'static str,
    pub meaning: &'static str,
}

close_reasons! {
    ClientAcceptReset = "client" / "accept" / "reset": "The client was gone before it was accepted.";
    ProxyAcceptConnectionLimit = "proxy" / "accept" / "connection_limit": "The listener holds `limits.connections` already; shed at once.";
    ProxyAcceptHandshakeLimit = "proxy" / "accept" / "handshake_limit": "`limits.handshakes` are in flight already; shed at once.";
    ProxyAcceptClientRate = "proxy" / "accept" / "client_rate": "The client comes more often than `limits.perClient` lets it; shed at once.";

    ClientProxyHeaderMissing = "client" / "proxy_header" / "missing": "A peer of `proxyProtocol.from` began without a PROXY header: it does not send one, or is no proxy.";
    ClientProxyHeaderMalformed = "client" / "proxy_header" / "malformed": "The PROXY header broke a rule of its version, was longer than 4096 bytes, or its checksum was wrong.";
    ClientProxyHeaderDeadline = "client" / "proxy_header" / "deadline": "The PROXY header was not complete within `proxyProtocol.deadline`.";
    ClientProxyHeaderClosed = "client" / "proxy_header" / "closed": "The peer closed before its PROXY header was complete (health checks of load balancers do).";
    ClientProxyHeaderReset = "client" / "proxy_header" / "reset": "The peer reset the connection before its PROXY header was complete.";

    ClientHandshakeClosed = "client" / "handshake" / "closed": "The client closed before the handshake was done (port scans and health checks do).";
    ClientHandshakeReset = "client" / "handshake" / "reset": "The client reset the connection during the handshake.";
    ClientHandshakeDeadline = "client" / "handshake" / "deadline": "The client did not finish the handshake within `deadlines.handshake`.";
    ClientHandshakePlainHttp = "client" / "handshake" / "plain_http": "The client spoke plain HTTP to a TLS listener.";
    ClientHandshakeNotTls = "client" / "handshake" / "not_tls": "The first bytes were not TLS.";
    ClientHandshakeMalformed = "client" / "handshake" / "malformed": "A TLS message could not be decoded or was too large.";
    ClientHandshakeProtocolError = "client" / "handshake" / "protocol_error": "The client broke a rule of TLS.";
    ClientHandshakeAlert = "client" / "handshake" / "alert": "The client refused with an alert: it does not trust the certificate, or lacks a common parameter.";
    ClientHandshakeNoSharedProtocol = "client" / "handshake" / "no_shared_protocol": "No TLS version in common with the policy.";
    ClientHandshakeNoSharedCipher = "client" / "handshake" / "no_shared_cipher": "No cipher suite in common with the policy and the certificates.";
    ClientHandshakeNoSharedGroup = "client" / "handshake" / "no_shared_group": "No key exchange group in common with the policy.";
    ClientHandshakeNoSharedSignatureScheme = "client" / "handshake" / "no_shared_signature_scheme": "The client accepts no signature that the certificates' keys can make.";
    ClientHandshakeNoSharedAlpn = "client" / "handshake" / "no_shared_alpn": "No application protocol in common with `alpn`.";
    ClientHandshakeNoExtendedMasterSecret = "client" / "handshake" / "no_extended_master_secret": "The client speaks TLS 1.2 without extended master secrets, and the policy says `extendedMasterSecret: required`.";
    ClientHandshakeUnknownName = "client" / "handshake" / "unknown_name": "No certificate for the name the client asked for, and `unknownName: refuse`.";

    ClientHandshakeCertificateRequired = "client" / "handshake" / "certificate_required": "The client showed no certificate, and `clientCertificates.mode` is `require`.";
    ClientHandshakeCertificateInvalid = "client" / "handshake" / "certificate_invalid": "The client's certificate cannot be understood, or breaks a rule of X.509.";
    ClientHandshakeCertificateUnknownIssuer = "client" / "handshake" / "certificate_unknown_issuer": "The client's certificate leads to none of `clientCertificates.roots`, or the client does not send its intermediate certificates.";
    ClientHandshakeCertificateExpired = "client" / "handshake" / "certificate_expired": "The client's certificate, or one of its issuers, has expired, or this host's clock is wrong.";
    ClientHandshakeCertificateNotYetValid = "client" / "handshake" / "certificate_not_yet_valid": "The client's certificate, or one of its issuers, is not valid yet, or this host's clock is wrong.";
    ClientHandshakeCertificateWrongPurpose = "client" / "handshake" / "certificate_wrong_purpose": "The client's certificate is not for TLS clients (extended key usage).";
    ClientHandshakeCertificateBadSignature = "client" / "handshake" / "certificate_bad_signature": "A signature on the client's certificate, or the client's own in the handshake, is wrong.";
    ClientHandshakeCertificateWeak = "client" / "handshake" / "certificate_weak": "The client's key, or an issuer's, is RSA of less than 2048 bits, or a certificate is signed with an algorithm that is not accepted, such as SHA-1.";
    ClientHandshakeCertificateRevoked = "client" / "handshake" / "certificate_revoked": "One of `clientCertificates.crls`, or its OCSP responder, revokes the client's certificate or an issuer's.";
    ClientHandshakeCertificateRevocationUnknown = "client" / "handshake" / "certificate_revocation_unknown": "None of `clientCertificates.crls` is of the certificate's issuer, or it is out of date or not signed as it should be.";
    ClientHandshakeCertificateStatusUnknown = "client" / "handshake" / "certificate_status_unknown": "The OCSP responder does not know the client's certificate; or `clientCertificates.ocsp.mode` is `hard`, and it gave no answer that holds.";
    ClientHandshakeCertificateNotAllowed = "client" / "handshake" / "certificate_not_allowed": "The client's certificate is good, and nothing in it is in `clientCertificates.allow`.";

    ClientHandshakeNoRoute = "client" / "handshake" / "no_route": "No route of the listener fits the name and protocol that the client asked for, and it has no default `upstream`.";

    TokenSigningQueueFull = "token" / "signing" / "queue_full": "The token's queue was full (`queue.max`): it signs slower than handshakes come.";
    TokenSigningQueueAged = "token" / "signing" / "queue_aged": "The request waited longer than `queue.age` for a lane.";
    TokenSigningDeadline = "token" / "signing" / "deadline": "The token did not sign within `signDeadline`: slow, hung or unreachable.";
    TokenSigningTokenDown = "token" / "signing" / "token_down": "No token that holds the key is up.";
    TokenSigningWrongSignature = "token" / "signing" / "wrong_signature": "The token's signature did not verify; it was not sent.";
    TokenSigningKeyLost = "token" / "signing" / "key_lost": "The token no longer holds exactly one such private key.";
    TokenSigningSchemeUnsupported = "token" / "signing" / "scheme_unsupported": "The key cannot sign with the scheme that the handshake chose. A defect: report it.";
    TokenSigningTokenFailed = "token" / "signing" / "token_failed": "The token refused to sign and no repair helped; the log has the CKR code.";

    UpstreamConnectRefused = "upstream" / "connect" / "refused": "Every server tried refused the connection.";
    UpstreamConnectDeadline = "upstream" / "connect" / "deadline": "No server accepted within `connectDeadline`.";
    UpstreamConnectUnreachable = "upstream" / "connect" / "unreachable": "No route to the server, or no such socket path.";
    UpstreamConnectNoServer = "upstream" / "connect" / "no_server": "The upstream has no server that may be tried.";
    ProxyConnectLoop = "proxy" / "connect" / "loop": "The upstream is `original`, and the client wanted to reach, or came from, an address of this host.";
    UpstreamConnectFailed = "upstream" / "connect" / "failed": "Connecting failed in another way.";

    UpstreamHandshakeClosed = "upstream" / "handshake" / "closed": "The server closed before the handshake was done.";
    UpstreamHandshakeReset = "upstream" / "handshake" / "reset": "The server reset the connection during the handshake.";
    UpstreamHandshakeDeadline = "upstream" / "handshake" / "deadline": "The server did not finish the handshake within `tls.deadline`.";
    UpstreamHandshakeNotTls = "upstream" / "handshake" / "not_tls": "The server's first bytes were not TLS.";
    UpstreamHandshakeProtocolError = "upstream" / "handshake" / "protocol_error": "The server broke a rule of TLS.";
    UpstreamHandshakeAlert = "upstream" / "handshake" / "alert": "The server refused with an alert: it wants another certificate of ours, or none of what we offered.";
    UpstreamHandshakeNoSharedParameters = "upstream" / "handshake" / "no_shared_parameters": "No version, cipher suite, group, signature scheme or application protocol in common with the server.";
    // Those of the server's certificate: verify/reason.rs.
    UpstreamHandshakeInvalid = "upstream" / "handshake" / "invalid": "The server's certificate cannot be understood, or breaks a rule of X.509.";
    UpstreamHandshakeUnknownIssuer = "upstream" / "handshake" / "unknown_issuer": "The server's certificate leads to none of `tls.roots`: the wrong roots, or the server does not send its intermediate certificates.";
    UpstreamHandshakeSelfSigned = "upstream" / "handshake" / "self_signed": "The server's certificate is signed by itself and by nobody in `tls.roots`.";
    UpstreamHandshakeExpired = "upstream" / "handshake" / "expired": "The server's certificate, or one of its issuers, has expired, or this host's clock is wrong.";
    UpstreamHandshakeNotYetValid = "upstream" / "handshake" / "not_yet_valid": "The server's certificate, or one of its issuers, is not valid yet, or this host's clock is wrong.";
    UpstreamHandshakeWrongName = "upstream" / "handshake" / "wrong_name": "The server's certificate is for other names than the server's, or `tls.name`.";
    UpstreamHandshakeWrongPurpose = "upstream" / "handshake" / "wrong_purpose": "The server's certificate is not for TLS servers (extended key usage).";
    UpstreamHandshakeBadSignature = "upstream" / "handshake" / "bad_signature": "A signature on a certificate, or the server's own in the handshake, is wrong.";
    UpstreamHandshakeWeakKey = "upstream" / "handshake" / "weak_key": "The server's key or an issuer's is RSA of less than 2048 bits.";
    UpstreamHandshakeWeakSignature = "upstream" / "handshake" / "weak_signature": "A certificate is signed with an algorithm that is not accepted, such as SHA-1.";
    UpstreamHandshakeRevoked = "upstream" / "handshake" / "revoked": "One of `tls.crls` revokes the server's certificate or an issuer's.";
    UpstreamHandshakeRevocationUnknown = "upstream" / "handshake" / "revocation_unknown": "None of `tls.crls` is of the certificate's issuer, or it is out of date or not signed as it should be.";
    UpstreamHandshakePinMismatch = "upstream" / "handshake" / "pin_mismatch": "No key in the server's chain is one of `tls.pins`.";
    UpstreamHandshakeTlsaMismatch = "upstream" / "handshake" / "tlsa_mismatch": "The server's certificate matches none of its TLSA records.";
    UpstreamHandshakeTlsaMissing = "upstream" / "handshake" / "tlsa_missing": "DNSSEC proves that the server has no usable TLSA record.";
    UpstreamHandshakeTlsaInsecure = "upstream" / "handshake" / "tlsa_insecure": "The server's zone is not signed, or the resolver does not validate.";
    UpstreamHandshakeTlsaUnavailable = "upstream" / "handshake" / "tlsa_unavailable": "No TLSA answer that holds: DNSSEC validation failed, or the resolver does not answer.";
    UpstreamHandshakeSctMissing = "upstream" / "handshake" / "sct_missing": "The server showed no signed certificate timestamp.";
    UpstreamHandshakeSctInvalid = "upstream" / "handshake" / "sct_invalid": "Too few timestamps hold, and one has a wrong signature.";
    UpstreamHandshakeSctInsufficient = "upstream" / "handshake" / "sct_insufficient": "Too few timestamps are from logs in `transparency.logs`, or from too few operators.";

    ClientRelayClosed = "client" / "relay" / "closed": "The client closed first. Normal.";
    ClientRelayTruncated = "client" / "relay" / "truncated": "The client closed without close_notify: bytes may be missing (many HTTP clients do so).";
    ClientRelayReset = "client" / "relay" / "reset": "The client reset the connection.";
    ClientRelayProtocolError = "client" / "relay" / "protocol_error": "A record from the client did not decrypt or broke a rule of TLS.";
    ClientRelayAlert = "client" / "relay" / "alert": "The client ended the connection with a fatal alert.";
    UpstreamRelayClosed = "upstream" / "relay" / "closed": "The upstream closed first. Normal.";
    UpstreamRelayReset = "upstream" / "relay" / "reset": "The upstream reset the connection.";
    UpstreamRelayTruncated = "upstream" / "relay" / "truncated": "The upstream closed without close_notify: bytes may be missing. A client that speaks TLS was not told that it had all; plaintext just ended.";
    UpstreamRelayProtocolError = "upstream" / "relay" / "protocol_error": "A record from the upstream did not decrypt or broke a rule of TLS.";
    UpstreamRelayAlert = "upstream" / "relay" / "alert": "The upstream ended the connection with a fatal alert.";
    ProxyRelayIdleDeadline = "proxy" / "relay" / "idle_deadline": "No byte in either direction for `deadlines.idle`.";
    ProxyRelayHalfClosedDeadline = "proxy" / "relay" / "half_closed_deadline": "One direction was closed and the other did not end within `deadlines.halfClosed`.";
    ProxyRelayLifetimeDeadline = "proxy" / "relay" / "lifetime_deadline": "The connection is older than `deadlines.lifetime`.";

    ProxyDrainDeadline = "proxy" / "drain" / "deadline": "The worker stopped and the connection had not ended by `drainDeadline`.";
    ProxyHandshakeNoMemory = "proxy" / "handshake" / "no_memory": "No memory for another handshake's stack.";
    ProxyInternalPanic = "proxy" / "internal" / "panic": "A defect in keygate ended this connection alone. Report it.";
}

impl Close {
    /// Whether connections end like this on a day on which nothing is wrong; health checks and browsers that think better of it belong to every day.
    /// Everything else is worth a look.
    pub fn is_ordinary(self) -> bool {
        matches!(
            self,
            Self::ClientHandshakeClosed
                | Self::ClientRelayClosed
                | Self::ClientRelayTruncated
                | Self::UpstreamRelayClosed
                | Self::ProxyRelayIdleDeadline
                | Self::ProxyRelayLifetimeDeadline
        )
    }

    /// Whether it was a server of the upstream.
    pub fn is_of_upstream(self) -> bool {
        CLOSE_REASONS[self as usize].side == "upstream"
    }

    /// The reason for a handshake that rustls ended.
    pub fn from_tls_error(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented => Self::ClientHandshakeCertificateRequired,
            Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
                Self::ClientHandshakeCertificateNotAllowed
            }
            Error::InvalidCertificate(_) => Self::from_client_certificate(error),
            Error::AlertReceived(AlertDescription::CloseNotify) => Self::ClientHandshakeClosed,
            Error::AlertReceived(_) => Self::ClientHandshakeAlert,
            Error::NoApplicationProtocol => Self::ClientHandshakeNoSharedAlpn,
            Error::PeerIncompatible(incompatible) => match incompatible {
                PeerIncompatible::NoCipherSuitesInCommon => Self::ClientHandshakeNoSharedCipher,
                PeerIncompatible::NoKxGroupsInCommon
                | PeerIncompatible::NamedGroupsExtensionRequired
                | PeerIncompatible::KeyShareExtensionRequired => Self::ClientHandshakeNoSharedGroup,
                PeerIncompatible::NoSignatureSchemesInCommon
                | PeerIncompatible::SignatureAlgorithmsExtensionRequired => {
                    Self::ClientHandshakeNoSharedSignatureScheme
                }
                PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled => Self::ClientHandshakeNoSharedProtocol,
                PeerIncompatible::ExtendedMasterSecretExtensionRequired => {
                    Self::ClientHandshakeNoExtendedMasterSecret
                }
                _ => Self::ClientHandshakeProtocolError,
            },
            Error::InvalidMessage(InvalidMessage::InvalidContentType) => Self::ClientHandshakeNotTls,
            Error::InvalidMessage(_) | Error::PeerSentOversizedRecord => Self::ClientHandshakeMalformed,
            _ => Self::ClientHandshakeProtocolError,
        }
    }

    fn from_client_certificate(error: &Error) -> Self {
        match Reason::from_error(error) {
            Some(Reason::UnknownIssuer | Reason::SelfSigned) => Self::ClientHandshakeCertificateUnknownIssuer,
            Some(Reason::Expired) => Self::ClientHandshakeCertificateExpired,
            Some(Reason::NotYetValid) => Self::ClientHandshakeCertificateNotYetValid,
            Some(Reason::WrongPurpose) => Self::ClientHandshakeCertificateWrongPurpose,
            Some(Reason::BadSignature) => Self::ClientHandshakeCertificateBadSignature,
            Some(Reason::WeakKey | Reason::WeakSignature) => Self::ClientHandshakeCertificateWeak,
            Some(Reason::Revoked) => Self::ClientHandshakeCertificateRevoked,
            Some(Reason::RevocationUnknown) => Self::ClientHandshakeCertificateRevocationUnknown,
            _ => Self::ClientHandshakeCertificateInvalid,
        }
    }

    /// The reason for a handshake with an upstream that rustls ended.
    pub fn from_upstream_tls_error(error: &Error) -> Self {
        if let Some(reason) = Reason::from_error(error) {
            return reason.close();
        }
        match error {
            Error::AlertReceived(AlertDescription::CloseNotify) => Self::UpstreamHandshakeClosed,
            Error::AlertReceived(_) => Self::UpstreamHandshakeAlert,
            Error::PeerIncompatible(_) | Error::NoApplicationProtocol => {
                Self::UpstreamHandshakeNoSharedParameters
            }
            Error::InvalidMessage(InvalidMessage::InvalidContentType) => Self::UpstreamHandshakeNotTls,
            _ => Self::UpstreamHandshakeProtocolError,
        }
    }

    /// The reason for a handshake that got no signature.
    pub fn from_sign_error(error: &SignError) -> Self {
        match error {
            SignError::QueueFull => Self::TokenSigningQueueFull,
            SignError::QueueAged => Self::TokenSigningQueueAged,
            SignError::Deadline => Self::TokenSigningDeadline,
            SignError::TokenDown => Self::TokenSigningTokenDown,
            SignError::Wrong => Self::TokenSigningWrongSignature,
            SignError::KeyLost => Self::TokenSigningKeyLost,
            SignError::SchemeUnsupported => Self::TokenSigningSchemeUnsupported,
            SignError::Failed(_) => Self::TokenSigningTokenFailed,
        }
    }
}

/// How often connections ended for each reason.
pub struct CloseCounters([Counter; CLOSE_REASONS.len()]);

impl Default for CloseCounters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl CloseCounters {
    pub fn count(&self, close: Close) {
        self.0[close as usize].add(1);
    }

    /// Every reason with its count, in the order of `CLOSE_REASONS`.
    pub fn counts(&self) -> impl Iterator<Item = (&'static CloseReason, u64)> {
        CLOSE_REASONS.iter().zip(self.0.iter().map(Counter::get))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_reasons_have_the_same_three_words() {
        let mut words: Vec<_> = CLOSE_REASONS.iter().map(|r| (r.side, r.phase, r.reason)).collect();
        words.sort_unstable();
        let count = words.len();
        words.dedup();
        assert_eq!(words.len(), count);
    }

    #[test]
    fn words_follow_the_order_of_the_variants() {
        assert_eq!(CLOSE_REASONS[Close::ClientAcceptReset as usize].phase, "accept");
        assert_eq!(CLOSE_REASONS[Close::ProxyDrainDeadline as usize].phase, "drain");
        assert_eq!(Close::ProxyInternalPanic as usize + 1, CLOSE_REASONS.len());
    }

    #[test]
    fn every_reason_of_a_failed_signature_is_a_close_reason() {
        let mut of_signing: Vec<_> =
            CLOSE_REASONS.iter().filter(|r| r.phase == "signing").map(|r| r.reason).collect();
        let mut of_lanes = SignError::REASONS.to_vec();
        of_signing.sort_unstable();
        of_lanes.sort_unstable();
        assert_eq!(of_signing, of_lanes);
    }
}
