//! Owns the border of the verification of servers' certificates: roots and pins, TLSA records, Certificate Transparency, and what
//! was found. Lends client_certificates.rs what both need. Must not know upstreams. JavaScript thread only.

use std::sync::Arc;
use std::time::Instant;

use napi::bindgen_prelude::Buffer;
use napi_derive::napi;
use rustls::pki_types::{CertificateDer, ServerName};

use super::{ms, signed};
use crate::verify::{
    Answer, Findings, Log as TransparencyLog, Mode, Pin, Policy as TransparencyPolicy, RevocationLists,
    Roots, VerifyPlan,
};

/// How the certificates of an upstream's servers are verified.
#[napi(object)]
pub struct VerificationSettings {
    /// Trusted certificates, DER.
    pub roots: Vec<Buffer>,
    /// Lists of revoked certificates, DER.
    pub crls: Vec<Buffer>,
    /// SHA-256 of SubjectPublicKeyInfos; empty: any key.
    pub pins: Vec<Buffer>,
    /// PKIX and pins.
    #[napi(ts_type = "'report' | 'enforce'")]
    pub pkix: String,
    #[napi(ts_type = "'off' | 'report' | 'enforce'")]
    pub dane: String,
    /// In the order of `servers`; empty when `dane` is off.
    pub tlsa: Vec<TlsaAnswer>,
    #[napi(ts_type = "'off' | 'report' | 'enforce'")]
    pub transparency: String,
}

/// A TLSA record (RFC 6698 2.1).
#[napi(object)]
pub struct TlsaRecord {
    pub usage: u32,
    pub selector: u32,
    pub matching_type: u32,
    pub data: Buffer,
}

/// What is known about the TLSA records of a server.
#[napi(object)]
pub struct TlsaAnswer {
    /// Validated by DNSSEC (then also that there is no record), not signed, or not to be had.
    #[napi(ts_type = "'secure' | 'insecure' | 'unavailable'")]
    pub state: String,
    /// Empty unless `secure`.
    pub records: Vec<TlsaRecord>,
    /// How long a secure answer holds.
    pub valid_ms: u32,
}

/// A log of Certificate Transparency whose SCTs count.
#[napi(object)]
pub struct TransparencyLogSettings {
    /// SHA-256 of the key.
    pub id: Buffer,
    /// SubjectPublicKeyInfo, DER.
    pub key: Buffer,
    pub operator: String,
    /// Unix time in seconds; SCTs that it has signed from then on do not count.
    pub retired_at: Option<u32>,
    /// It takes certificates that end from here on and before there, in Unix time in seconds.
    pub ends_from: Option<u32>,
    pub ends_before: Option<u32>,
}

#[napi(object)]
pub struct TransparencySettings {
    pub logs: Vec<TransparencyLogSettings>,
    /// SCTs that a certificate needs, each of another log.
    pub scts: u32,
    pub operators: u32,
}

/// How often something was found about a certificate of a server, and what came of it.
#[napi(object)]
pub struct FindingSnapshot {
    /// The third word of a close reason.
    pub reason: String,
    /// The certificate was refused, or this was only counted.
    pub refused: i64,
    pub reported: i64,
}

/// Why this is not a list of revoked certificates (DER) that the engine understands; undefined: it is one.
#[napi(catch_unwind)]
pub fn revocation_list_fault(der: Buffer) -> Option<String> {
    RevocationLists::new([&der[..]]).err()
}

/// What the servers of an upstream have in common: all but name and TLSA records.
pub(super) fn verification(
    settings: &VerificationSettings,
    logs: &Arc<TransparencyPolicy>,
    findings: Arc<Findings>,
) -> std::result::Result<VerifyPlan, String> {
    Ok(VerifyPlan {
        name: ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()), // each server has its own
        pkix: mode("tls.verify", &settings.pkix)?,
        roots: Arc::new(roots_of(&settings.roots, "tls.roots")?),
        lists: Arc::new(lists_of(&settings.crls, "tls.crls")?),
        pins: pins_of(&settings.pins, "tls.pins")?,
        dane: mode("tls.dane", &settings.dane)?,
        tlsa: Arc::default(),
        transparency: mode("tls.transparency", &settings.transparency)?,
        policy: logs.clone(),
        findings,
    })
}

fn mode(key: &str, word: &str) -> std::result::Result<Mode, String> {
    match word {
        "off" => Ok(Mode::Off),
        "report" => Ok(Mode::Report),
        "enforce" => Ok(Mode::Enforce),
        other => Err(format!("{key}: expected off, report or enforce, found {other:?}")),
    }
}

pub(super) fn roots_of(certificates: &[Buffer], place: &str) -> std::result::Result<Roots, String> {
    let roots = Roots::new(certificates.iter().map(|der| CertificateDer::from(der.to_vec())));
    if roots.is_empty() {
        let found = certificates.len();
        return Err(format!("{place}: expected a usable certificate, found none among {found}"));
    }
    Ok(roots)
}

pub(super) fn lists_of(lists: &[Buffer], place: &str) -> std::result::Result<RevocationLists, String> {
    RevocationLists::new(lists.iter().map(|der| &der[..]))
        .map_err(|error| format!("{place}: expected a list of revoked certificates, found {error}"))
}

pub(super) fn pins_of<All: FromIterator<Pin>>(
    pins: &[Buffer],
    place: &str,
) -> std::result::Result<All, String> {
    let parse = |pin: &Buffer| {
        Pin::try_from(&pin[..]).map_err(|_| format!("{place}: expected 32 bytes, found {}", pin.len()))
    };
    pins.iter().map(parse).collect()
}

pub(super) fn tlsa_answer(answer: TlsaAnswer) -> std::result::Result<Answer, String> {
    match answer.state.as_str() {
        "insecure" => Ok(Answer::Insecure),
        "unavailable" => Ok(Answer::Unavailable),
        "secure" => {
            // A number that does not fit is one that we do not know either.
            let byte = |number: u32| u8::try_from(number).unwrap_or(u8::MAX);
            let records = answer.records.iter().map(|TlsaRecord { usage, selector, matching_type, data }| {
                (byte(*usage), byte(*selector), byte(*matching_type), &data[..])
            });
            Ok(Answer::secure(records, Instant::now() + ms(answer.valid_ms)))
        }
        other => Err(format!("TLSA: expected secure, insecure or unavailable, found {other:?}")),
    }
}

pub(super) fn transparency_policy(
    settings: TransparencySettings,
) -> std::result::Result<TransparencyPolicy, String> {
    let logs = settings.logs.into_iter().map(|log| {
        let id = <[u8; 32]>::try_from(&log.id[..])
            .map_err(|_| format!("transparency: expected a log's id of 32 bytes, found {}", log.id.len()))?;
        let interval = log.ends_from.zip(log.ends_before);
        Ok(TransparencyLog {
            id,
            key: log.key.to_vec(),
            operator: log.operator,
            retired_ms: log.retired_at.map(|at| u64::from(at) * 1000),
            interval_ms: interval.map(|(from, before)| (i64::from(from) * 1000, i64::from(before) * 1000)),
        })
    });
    let logs = logs.collect::<std::result::Result<Vec<_>, String>>()?;
    Ok(TransparencyPolicy::new(logs, settings.scts as usize, settings.operators as usize))
}

pub(super) fn finding_snapshots(findings: &Findings) -> Vec<FindingSnapshot> {
    findings
        .refused()
        .zip(findings.reported())
        .map(|((reason, refused), (_, reported))| FindingSnapshot {
            reason: reason.word().to_owned(),
            refused: signed(refused),
            reported: signed(reported),
        })
        .collect()
}
