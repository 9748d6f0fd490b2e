//! Owns Certificate Transparency (RFC 6962): whether a certificate's SCTs are of known logs, hold, and are enough. Knows nothing
//! of where the list of logs comes from, and asks no log.

use std::collections::{HashMap, HashSet};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey, VerificationAlgorithm,
};

use super::der;
use super::reason::Reason;
use super::sct::{self, Entry, LogId, Sct};
use super::x509::{self, Certificate};

/// How far a log's clock may be ahead of ours.
const CLOCK_SKEW_MS: u64 = 60_000;
/// sha256 with rsa and with ecdsa (RFC 6962 2.1.4, RFC 5246 7.4.1.4.1).
const RSA: [u8; 2] = [4, 1];
const ECDSA: [u8; 2] = [4, 3];

#[derive(Debug, Clone)]
pub struct Log {
    pub id: LogId,
    /// SubjectPublicKeyInfo.
    pub key: Vec<u8>,
    pub operator: String,
    /// Milliseconds since 1970 of when it was retired: what it has signed later does not count.
    pub retired_ms: Option<u64>,
    /// It takes certificates that end from here on and before there, in milliseconds since 1970.
    pub interval_ms: Option<(i64, i64)>,
}

/// Which SCTs a certificate must have.
#[derive(Debug, Default)]
pub struct Policy {
    logs: HashMap<LogId, Log>,
    /// How many, each of another log.
    scts: usize,
    /// From how many operators.
    operators: usize,
}

impl Policy {
    pub fn new(logs: impl IntoIterator<Item = Log>, scts: usize, operators: usize) -> Self {
        let logs = logs.into_iter().map(|log| (log.id, log)).collect();
        Self { logs, scts: scts.max(1), operators: operators.max(1) }
    }
}

/// How an SCT came to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Certificate,
    OcspResponse,
}

enum Verdict {
    Holds,
    /// Of no log that counts for this certificate.
    DoesNotCount,
    Wrong,
}

/// `issuer_spki`: of who has signed the leaf. `ocsp`: what the server stapled; empty: nothing.
///
/// SCTs in a TLS extension (RFC 6962 3.3.1) cannot be looked at: rustls does not ask for them.
///
/// # Errors
/// There are none, or too few that hold.
pub fn verify(
    policy: &Policy,
    leaf: &Certificate<'_>,
    issuer_spki: Option<&[u8]>,
    ocsp: &[u8],
    now_ms: u64,
) -> Result<(), Reason> {
    let embedded = leaf.embedded_scts().map_err(|_| Reason::SctInvalid)?;
    let (embedded, tbs) = embedded.map(|scts| (scts.list, scts.tbs)).unzip();
    let stapled = if ocsp.is_empty() { Vec::new() } else { sct::lists_in_ocsp(ocsp).unwrap_or_default() };
    let precertificate = tbs.zip(issuer_spki).map(|(tbs, spki)| Entry::precertificate(spki, tbs));
    let certificate = Entry::X509 { certificate: leaf.der.to_vec() };

    let mut found = 0;
    let mut wrong = false;
    let mut holding = Vec::new();
    let lists = embedded
        .into_iter()
        .map(|list| (Way::Certificate, list))
        .chain(stapled.into_iter().take(1).map(|list| (Way::OcspResponse, list)));
    for (way, list) in lists {
        let entry = match way {
            Way::Certificate => precertificate.as_ref(),
            Way::OcspResponse => Some(&certificate),
        };
        let Ok(scts) = sct::parse_list(list) else {
            wrong = true;
            continue;
        };
        for sct in scts {
            found += 1;
            match (policy.logs.get(&sct.log), entry) {
                (Some(log), Some(entry)) => match judge(log, &sct, entry, way, leaf, now_ms) {
                    Verdict::Holds => holding.push(log),
                    Verdict::DoesNotCount => {}
                    Verdict::Wrong => wrong = true,
                },
                _ => continue,
            }
        }
    }
    let logs: HashSet<_> = holding.iter().map(|log| log.id).collect();
    let operators: HashSet<_> = holding.iter().map(|log| &log.operator).collect();
    // As browsers have it: one log at least must still be there to be asked.
    let living = holding.iter().any(|log| log.retired_ms.is_none());
    if logs.len() >= policy.scts && operators.len() >= policy.operators && living {
        Ok(())
    } else if wrong {
        Err(Reason::SctInvalid)
    } else if found == 0 {
        Err(Reason::SctMissing)
    } else {
        Err(Reason::SctInsufficient)
    }
}

fn judge(log: &Log, sct: &Sct<'_>, entry: &Entry, way: Way, leaf: &Certificate<'_>, now_ms: u64) -> Verdict {
    let not_after_ms = leaf.not_after.saturating_mul(1000);
    let in_interval = log.interval_ms.is_none_or(|(start, end)| (start..end).contains(&not_after_ms));
    // Of a retired log only what is in a certificate since before: anything else could have been asked for since.
    let in_time = log.retired_ms.is_none_or(|retired| way == Way::Certificate && sct.timestamp_ms < retired);
    if !in_interval || !in_time {
        return Verdict::DoesNotCount;
    }
    let in_past = sct.timestamp_ms <= now_ms.saturating_add(CLOCK_SKEW_MS);
    let signed = sct.signed(entry);
    if in_past && signed.is_some_and(|signed| is_signed(&log.key, sct, &signed)) {
        Verdict::Holds
    } else {
        Verdict::Wrong
    }
}

fn is_signed(spki: &[u8], sct: &Sct<'_>, signed: &[u8]) -> bool {
    let is_rsa = matches!(x509::rsa_bits(spki), Ok(Some(_)));
    let algorithm: &'static dyn VerificationAlgorithm = match sct.algorithm {
        RSA if is_rsa => &RSA_PKCS1_2048_8192_SHA256,
        ECDSA if !is_rsa => &ECDSA_P256_SHA256_ASN1,
        _ => return false,
    };
    let Some(key) = key_in(spki) else { return false };
    UnparsedPublicKey::new(algorithm, key).verify(signed, sct.signature).is_ok()
}

/// The key inside a SubjectPublicKeyInfo: a point or an RSAPublicKey.
fn key_in(spki: &[u8]) -> Option<&[u8]> {
    let mut parts = der::only(spki, der::SEQUENCE).ok()?.inside();
    parts.expect(der::SEQUENCE).ok()?;
    parts.expect(der::BIT_STRING).ok()?.content.strip_prefix(&[0])
}
