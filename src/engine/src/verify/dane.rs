//! Owns DANE (RFC 6698, RFC 7671): whether what DNS says about a server fits to what the server shows. Knows nothing of how
//! records are asked for; whoever asks says how far the answer holds, and how long.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use aws_lc_rs::digest::{SHA256, SHA512, digest};
use rustls::pki_types::{CertificateDer, TrustAnchor};

use super::pkix::{self, Chain, Issuer, Presented, RevocationLists};
use super::reason::Reason;
use super::x509::Certificate;

const SHA256_BYTES: usize = 32;
const SHA512_BYTES: usize = 64;

/// RFC 6698 2.1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Usage {
    /// 0: a CA on a way that PKIX accepts.
    PkixTa,
    /// 1: the leaf of a way that PKIX accepts.
    PkixEe,
    /// 2: a trust anchor.
    DaneTa,
    /// 3: the leaf.
    DaneEe,
}

/// RFC 6698 2.1.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Selector {
    Certificate,
    PublicKey,
}

/// RFC 6698 2.1.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Matching {
    Full,
    Sha256,
    Sha512,
}

/// A record that says something we understand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tlsa {
    pub usage: Usage,
    pub selector: Selector,
    pub matching: Matching,
    pub data: Vec<u8>,
}

impl Tlsa {
    /// None: the record is not usable (RFC 7671 4.1): a number that we do not know, or data that cannot be what it says.
    pub fn usable(usage: u8, selector: u8, matching: u8, data: &[u8]) -> Option<Self> {
        let usage = match usage {
            0 => Usage::PkixTa,
            1 => Usage::PkixEe,
            2 => Usage::DaneTa,
            3 => Usage::DaneEe,
            _ => return None,
        };
        let selector = match selector {
            0 => Selector::Certificate,
            1 => Selector::PublicKey,
            _ => return None,
        };
        let matching = match (matching, data.len()) {
            (0, 1..) => Matching::Full,
            (1, SHA256_BYTES) => Matching::Sha256,
            (2, SHA512_BYTES) => Matching::Sha512,
            _ => return None,
        };
        Some(Self { usage, selector, matching, data: data.to_vec() })
    }

    fn matches(&self, certificate: Option<&[u8]>, spki: &[u8]) -> bool {
        let selected = match self.selector {
            Selector::Certificate => match certificate {
                Some(certificate) => certificate,
                None => return false,
            },
            Selector::PublicKey => spki,
        };
        match self.matching {
            Matching::Full => self.data == selected,
            Matching::Sha256 => digest(&SHA256, selected).as_ref() == self.data,
            Matching::Sha512 => digest(&SHA512, selected).as_ref() == self.data,
        }
    }
}

/// What is known about a server's TLSA records.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Answer {
    /// Validated by DNSSEC. The records that are usable; none: that there is no usable one is validated too.
    Secure { records: Vec<Tlsa>, until: Instant },
    /// Not signed. Whatever it says does not count.
    Insecure,
    /// Validation failed, or nobody answered, or nobody has asked yet.
    #[default]
    Unavailable,
}

impl Answer {
    /// `records`: usage, selector, matching type and data of each.
    pub fn secure<'a>(records: impl IntoIterator<Item = (u8, u8, u8, &'a [u8])>, until: Instant) -> Self {
        let usable = records
            .into_iter()
            .filter_map(|(usage, selector, matching, data)| Tlsa::usable(usage, selector, matching, data))
            .collect();
        Self::Secure { records: with_strongest_digest(usable), until }
    }
}

/// RFC 7671 9: of the digests that stand for the same thing only the strongest count, so that breaking the weaker one helps
/// nobody.
fn with_strongest_digest(mut records: Vec<Tlsa>) -> Vec<Tlsa> {
    let strong: HashSet<_> = records
        .iter()
        .filter(|record| record.matching == Matching::Sha512)
        .map(|record| (record.usage, record.selector))
        .collect();
    records.retain(|record| {
        record.matching != Matching::Sha256 || !strong.contains(&(record.usage, record.selector))
    });
    records
}

/// The answer about one server that counts now; written by who asks, read by handshakes.
#[derive(Debug, Default)]
pub struct Standing {
    answer: RwLock<Arc<Answer>>,
    changes: AtomicU64,
}

impl Standing {
    pub fn set(&self, answer: Answer) {
        let mut current = self.answer.write().unwrap_or_else(PoisonError::into_inner);
        if !says_the_same(&current, &answer) {
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
        *current = Arc::new(answer);
    }

    /// How often another answer has come than the one before. Who resumes TLS sessions forgets them when this changes: a
    /// resumption shows no certificate.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    pub(super) fn get(&self) -> Arc<Answer> {
        self.answer.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn says_the_same(left: &Answer, right: &Answer) -> bool {
    match (left, right) {
        (Answer::Secure { records: left, .. }, Answer::Secure { records: right, .. }) => left == right,
        _ => left == right,
    }
}

/// How a server was recognised.
#[derive(Debug)]
pub enum Recognised {
    /// By a record beside PKIX (usages 0 and 1).
    BesidePkix,
    /// By a record alone (usages 2 and 3), over this chain: PKIX does not matter.
    Alone(Chain),
}

/// One record that fits is enough (RFC 6698 2.1). Those that need no PKIX come first.
///
/// # Errors
/// No record fits, or there is no answer that holds. Where a record of usage 0 or 1 would fit, what PKIX says.
pub fn verify(
    answer: &Answer,
    presented: &Presented<'_>,
    pkix: &Result<Chain, Reason>,
    lists: &RevocationLists,
) -> Result<Recognised, Reason> {
    let records = match answer {
        Answer::Secure { until, .. } if *until < Instant::now() => return Err(Reason::TlsaUnavailable),
        Answer::Secure { records, .. } if records.is_empty() => return Err(Reason::TlsaMissing),
        Answer::Secure { records, .. } => records,
        Answer::Insecure => return Err(Reason::TlsaInsecure),
        Answer::Unavailable => return Err(Reason::TlsaUnavailable),
    };
    let leaf = &presented.parsed;
    let of = |usage| records.iter().filter(move |record| record.usage == usage);
    // RFC 7671 5.1: neither the name, nor the dates, nor who has signed it.
    if of(Usage::DaneEe).any(|record| record.matches(Some(leaf.der), leaf.spki)) {
        return Ok(Recognised::Alone(Chain::default()));
    }
    let mut failure = Reason::TlsaMismatch;
    let trusted: Vec<_> = of(Usage::DaneTa).collect();
    if !trusted.is_empty() {
        match verify_by_anchor(&trusted, presented, lists) {
            Ok(chain) => return Ok(Recognised::Alone(chain)),
            Err(reason) => failure = reason,
        }
    }
    match pkix {
        Ok(chain) => {
            let leaf_fits = of(Usage::PkixEe).any(|record| record.matches(Some(leaf.der), leaf.spki));
            let fits = |issuer: &Issuer| {
                of(Usage::PkixTa).any(|record| record.matches(issuer.certificate.as_deref(), &issuer.spki))
            };
            if leaf_fits || chain.issuers.iter().any(fits) {
                Ok(Recognised::BesidePkix)
            } else {
                Err(failure)
            }
        }
        Err(reason) if of(Usage::PkixEe).chain(of(Usage::PkixTa)).next().is_some() => Err(*reason),
        Err(_) => Err(failure),
    }
}

/// RFC 7671 5.2: a way to a certificate that a record names, for the server's name. The server sends that certificate, or the
/// record holds it, or its key, whole.
fn verify_by_anchor(
    records: &[&Tlsa],
    presented: &Presented<'_>,
    lists: &RevocationLists,
) -> Result<Chain, Reason> {
    let in_records: Vec<_> = records
        .iter()
        .filter(|record| record.matching == Matching::Full && record.selector == Selector::Certificate)
        .map(|record| CertificateDer::from(&record.data[..]))
        .collect();
    let named = presented.intermediates.iter().filter(|der| {
        Certificate::parse(der)
            .is_ok_and(|sent| records.iter().any(|record| record.matches(Some(sent.der), sent.spki)))
    });
    let certificates: Vec<_> = named.chain(&in_records).collect();
    let mut anchors: Vec<_> =
        certificates.iter().filter_map(|der| webpki::anchor_from_trusted_cert(der).ok()).collect();
    anchors.extend(bare_keys(records, presented));
    if anchors.is_empty() {
        return Err(Reason::TlsaMismatch);
    }
    let certificate_of = |anchor: &TrustAnchor<'_>| {
        let is_it = |der: &&&CertificateDer<'_>| {
            webpki::anchor_from_trusted_cert(der).is_ok_and(|other| {
                other.subject == anchor.subject
                    && other.subject_public_key_info == anchor.subject_public_key_info
            })
        };
        certificates.iter().find(is_it).map(|der| der.to_vec())
    };
    let chain = pkix::way_to(presented, &anchors, lists, certificate_of).map_err(|reason| match reason {
        Reason::UnknownIssuer | Reason::SelfSigned => Reason::TlsaMismatch,
        other => other,
    })?;
    pkix::verify_name(presented)?;
    Ok(chain)
}

/// Keys that records hold whole, as anchors of the names that have signed what the server sent.
fn bare_keys<'a>(records: &'a [&Tlsa], presented: &'a Presented<'_>) -> Vec<TrustAnchor<'a>> {
    let sent = std::iter::once(presented.leaf).chain(presented.intermediates);
    let names: HashSet<_> =
        sent.filter_map(|der| Certificate::parse(der).ok()).map(|certificate| certificate.issuer).collect();
    let keys = records
        .iter()
        .filter(|record| record.matching == Matching::Full && record.selector == Selector::PublicKey)
        .filter_map(|record| super::der::only(&record.data, super::der::SEQUENCE).ok());
    keys.flat_map(|key| {
        names.iter().filter_map(move |name| {
            Some(TrustAnchor {
                subject: super::der::only(name, super::der::SEQUENCE).ok()?.content.into(),
                subject_public_key_info: key.content.into(),
                name_constraints: None,
            })
        })
    })
    .collect()
}
