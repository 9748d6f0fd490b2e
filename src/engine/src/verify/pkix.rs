//! Owns the way from a peer's certificate to a trust anchor (RFC 5280, RFC 9525), as webpki finds it, and what it is called
//! when there is none. Knows nothing of modes, pins, DNS or logs.

use std::collections::HashMap;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList,
    RevocationCheckDepth, RevocationOptions, RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::reason::Reason;
use super::x509::{self, Certificate};

const RSA_BITS_MIN: usize = 2048;

/// Certificates at which a way may end.
#[derive(Debug, Default)]
pub struct Roots {
    anchors: Vec<TrustAnchor<'static>>,
    /// By subject and key: TLSA records may be about a whole certificate, of which an anchor is only a part.
    certificates: HashMap<(Vec<u8>, Vec<u8>), CertificateDer<'static>>,
}

impl Roots {
    /// Those that cannot be understood are left out: a system's store has some that nobody needs.
    pub fn new(certificates: impl IntoIterator<Item = CertificateDer<'static>>) -> Self {
        let mut roots = Self::default();
        for certificate in certificates {
            let Ok(anchor) = webpki::anchor_from_trusted_cert(&certificate).map(|anchor| anchor.to_owned())
            else {
                continue;
            };
            roots.certificates.insert(key_of(&anchor), certificate);
            roots.anchors.push(anchor);
        }
        roots
    }

    pub fn len(&self) -> usize {
        self.anchors.len()
    }

    pub fn is_empty(&self) -> bool {
        self.anchors.is_empty()
    }

    /// Contents of the subjects' Names, which tell clients whose certificates are wanted.
    pub fn subjects(&self) -> impl Iterator<Item = &[u8]> {
        self.anchors.iter().map(|anchor| anchor.subject.as_ref())
    }

    fn certificate_of(&self, anchor: &TrustAnchor<'_>) -> Option<&CertificateDer<'static>> {
        self.certificates.get(&key_of(anchor))
    }
}

fn key_of(anchor: &TrustAnchor<'_>) -> (Vec<u8>, Vec<u8>) {
    (anchor.subject.as_ref().to_vec(), anchor.subject_public_key_info.as_ref().to_vec())
}

/// Certificates that were revoked. A leaf whose issuer has no list here is refused.
#[derive(Debug, Default)]
pub struct RevocationLists(Vec<CertRevocationList<'static>>);

impl RevocationLists {
    /// # Errors
    /// One of them is not a list of revoked certificates that webpki understands; the text says why.
    pub fn new<'a>(lists: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, String> {
        lists
            .into_iter()
            .map(|der| OwnedCertRevocationList::from_der(der).map(Into::into))
            .collect::<Result<_, _>>()
            .map(Self)
            .map_err(|error| format!("{error:?}"))
    }
}

/// A way that was verified: every certificate on it is signed by the next.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    /// From the leaf's issuer to the trust anchor.
    pub issuers: Vec<Issuer>,
}

#[derive(Debug, Clone)]
pub struct Issuer {
    /// None: a trust anchor whose certificate is not known.
    pub certificate: Option<Vec<u8>>,
    /// The whole SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
}

/// Who shows the certificate, and so what it must be for (RFC 5280 4.2.1.12).
#[derive(Debug, Clone, Copy)]
pub enum Peer<'a> {
    Client,
    Server(&'a ServerName<'static>),
}

/// What every verification of a way is about.
pub struct Presented<'a> {
    pub leaf: &'a CertificateDer<'a>,
    /// The same, as far as x509.rs reads it.
    pub parsed: Certificate<'a>,
    /// The others that the peer sent, in its order.
    pub intermediates: &'a [CertificateDer<'a>],
    pub peer: Peer<'a>,
    pub now: UnixTime,
    pub algorithms: WebPkiSupportedAlgorithms,
}

/// From the leaf to one of `roots`; valid now, for such a peer, a server's for its name, not revoked, with keys and signatures
/// that are strong enough.
///
/// # Errors
/// Why there is no such way.
pub fn verify(presented: &Presented<'_>, roots: &Roots, lists: &RevocationLists) -> Result<Chain, Reason> {
    let chain = way_to(presented, &roots.anchors, lists, |anchor| {
        roots.certificate_of(anchor).map(|der| der.to_vec())
    })?;
    verify_name(presented)?;
    Ok(chain)
}

/// The same for anchors of another origin, without the name.
///
/// # Errors
/// Why there is no way.
pub fn way_to(
    presented: &Presented<'_>,
    anchors: &[TrustAnchor<'_>],
    lists: &RevocationLists,
    certificate_of: impl Fn(&TrustAnchor<'_>) -> Option<Vec<u8>>,
) -> Result<Chain, Reason> {
    if is_weak(presented.parsed.spki) {
        return Err(Reason::WeakKey);
    }
    let leaf = EndEntityCert::try_from(presented.leaf).map_err(|error| reason_of(&error, presented))?;
    let find = |revocation: Option<RevocationOptions<'_>>| {
        leaf.verify_for_usage(
            presented.algorithms.all,
            anchors,
            presented.intermediates,
            presented.now,
            match presented.peer {
                Peer::Client => KeyUsage::client_auth(),
                Peer::Server(_) => KeyUsage::server_auth(),
            },
            revocation,
            None,
        )
        .map_err(|error| explain(&error, presented, anchors))
    };
    let path = if lists.0.is_empty() {
        find(None)?
    } else {
        let lists: Vec<_> = lists.0.iter().collect();
        // Whoever configures lists wants each leaf to be on one; for every issuer few have them.
        find(options(&lists, RevocationCheckDepth::EndEntity, UnknownStatusPolicy::Deny))?;
        find(options(&lists, RevocationCheckDepth::Chain, UnknownStatusPolicy::Allow))?
    };
    let intermediates = path.intermediate_certificates().map(|certificate| Issuer {
        certificate: Some(certificate.der().to_vec()),
        spki: certificate.subject_public_key_info().to_vec(),
    });
    let anchor = Issuer {
        certificate: certificate_of(path.anchor()),
        spki: webpki::spki_for_anchor(path.anchor()).to_vec(),
    };
    Ok(Chain { issuers: intermediates.chain([anchor]).collect() })
}

/// RFC 9525 6: the names in subjectAltName, and no others. What a client is called is for whoever lets it in.
///
/// # Errors
/// None of them is the server's.
pub fn verify_name(presented: &Presented<'_>) -> Result<(), Reason> {
    let Peer::Server(name) = presented.peer else { return Ok(()) };
    EndEntityCert::try_from(presented.leaf)
        .and_then(|leaf| leaf.verify_is_valid_for_subject_name(name))
        .map_err(|error| reason_of(&error, presented))
}

/// A key with which nobody should sign or be known any more. webpki refuses signatures of such keys and calls them wrong.
pub fn is_weak(spki: &[u8]) -> bool {
    matches!(x509::rsa_bits(spki), Ok(Some(bits)) if bits < RSA_BITS_MIN)
}

fn options<'a>(
    lists: &'a [&'a CertRevocationList<'a>],
    depth: RevocationCheckDepth,
    unknown: UnknownStatusPolicy,
) -> Option<RevocationOptions<'a>> {
    let builder = RevocationOptionsBuilder::new(lists).ok()?;
    Some(
        builder
            .with_depth(depth)
            .with_status_policy(unknown)
            .with_expiration_policy(ExpirationPolicy::Enforce)
            .build(),
    )
}

/// As `reason_of`, with what only the other certificates tell.
fn explain(error: &webpki::Error, presented: &Presented<'_>, anchors: &[TrustAnchor<'_>]) -> Reason {
    let reason = reason_of(error, presented);
    if reason != Reason::BadSignature {
        return reason;
    }
    let sent = presented.intermediates.iter().filter_map(|der| Certificate::parse(der).ok());
    let mut signers: Vec<_> = sent.map(|certificate| certificate.spki.to_vec()).collect();
    signers.extend(anchors.iter().map(|anchor| webpki::spki_for_anchor(anchor).to_vec()));
    if signers.iter().any(|spki| is_weak(spki)) { Reason::WeakKey } else { reason }
}

fn reason_of(error: &webpki::Error, presented: &Presented<'_>) -> Reason {
    use webpki::Error;
    match error {
        // An X.509 tool's self-signed certificates are mostly marked as those of a CA.
        Error::UnknownIssuer | Error::CaUsedAsEndEntity if presented.parsed.is_self_issued() => {
            Reason::SelfSigned
        }
        Error::UnknownIssuer => Reason::UnknownIssuer,
        Error::CertExpired { .. } => Reason::Expired,
        Error::CertNotValidYet { .. } => Reason::NotYetValid,
        Error::CertNotValidForName(_) => Reason::WrongName,
        Error::RequiredEkuNotFoundContext(_) | Error::EmptyEkuExtension | Error::CaUsedAsEndEntity => {
            Reason::WrongPurpose
        }
        Error::InvalidSignatureForPublicKey | Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            Reason::BadSignature
        }
        Error::UnsupportedSignatureAlgorithmContext(_) => Reason::WeakSignature,
        Error::CertRevoked | Error::CertDistrusted => Reason::Revoked,
        Error::UnknownRevocationStatus
        | Error::CrlExpired { .. }
        | Error::InvalidCrlSignatureForPublicKey
        | Error::IssuerNotCrlSigner
        | Error::UnsupportedCrlSignatureAlgorithmContext(_)
        | Error::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_) => Reason::RevocationUnknown,
        _ => Reason::Invalid,
    }
}
