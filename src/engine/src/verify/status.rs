//! Owns OCSP as bytes, for the certificates that clients show: what a responder is asked and what its answer says (RFC 6960 4).
//! An answer counts if the certificate's issuer has signed it, or somebody whom that issuer has entitled to. Knows nothing of
//! how responders are reached. Pure; every answer is hostile.

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage, RawPublicKeyEntity};

use super::der::{self, Malformed, Reader, constructed};
use super::sct::OCSP_BASIC;
use super::x509::{self, Certificate};

/// 1.3.14.3.2.26. What certificates are named with, by every responder; nothing rests on its strength.
const SHA_1: &[u8] = &[0x2b, 0x0e, 0x03, 0x02, 0x1a];
/// 1.3.6.1.5.5.7.3.9: id-kp-OCSPSigning
const OCSP_SIGNING: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x09];
/// Of the certificates in an answer so many are looked at.
const SIGNERS_MAX: usize = 4;
/// Clocks differ.
const SKEW_S: i64 = 300;
/// For an answer that does not say when the next one will be there.
const UNLIMITED_S: i64 = 300;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Good,
    Revoked,
    /// The responder does not know the certificate.
    Unknown,
}

/// What is said about a certificate, and until when that holds: seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusAnswer {
    pub status: Status,
    pub until: i64,
}

/// A certificate that somebody is asked about.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Of CertID (RFC 6960 4.1.1).
    name_hash: [u8; 20],
    key_hash: [u8; 20],
    serial: Vec<u8>,
    /// DER.
    issuer: Vec<u8>,
    /// Who the certificate says must be asked (RFC 5280 4.2.2.1).
    pub responder: Option<String>,
}

impl Subject {
    /// # Errors
    /// One of them is malformed.
    pub fn new(leaf: &[u8], issuer: &[u8]) -> Result<Self, Malformed> {
        let (leaf, parsed) = (Certificate::parse(leaf)?, Certificate::parse(issuer)?);
        Ok(Self {
            name_hash: sha1(parsed.subject),
            key_hash: sha1(x509::key_bits(parsed.spki)?),
            serial: leaf.serial.to_vec(),
            issuer: issuer.to_vec(),
            responder: leaf.ocsp_responder()?,
        })
    }

    /// An OCSPRequest without a nonce, which most responders would ignore.
    pub fn request(&self) -> Vec<u8> {
        let null = der::encode(0x05, &[]);
        let algorithm = der::encode(der::SEQUENCE, &[&der::encode(der::OBJECT_IDENTIFIER, &[SHA_1]), &null]);
        let id = der::encode(
            der::SEQUENCE,
            &[
                &algorithm,
                &der::encode(der::OCTET_STRING, &[&self.name_hash]),
                &der::encode(der::OCTET_STRING, &[&self.key_hash]),
                &der::encode(der::INTEGER, &[&self.serial]),
            ],
        );
        let list = der::encode(der::SEQUENCE, &[&der::encode(der::SEQUENCE, &[&id])]);
        der::encode(der::SEQUENCE, &[&der::encode(der::SEQUENCE, &[&list])])
    }

    /// # Errors
    /// The answer is malformed, is about something else, does not hold now, or is not signed by who may.
    pub fn read(
        &self,
        response: &[u8],
        now: UnixTime,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Result<StatusAnswer, Malformed> {
        let mut response = der::only(response, der::SEQUENCE)?.inside();
        if response.expect(der::ENUMERATED)?.content != [0] {
            return Err(Malformed);
        }
        let mut bytes = der::only(response.expect(constructed(0))?.content, der::SEQUENCE)?.inside();
        response.end()?;
        if bytes.expect(der::OBJECT_IDENTIFIER)?.content != OCSP_BASIC {
            return Err(Malformed);
        }
        let basic = bytes.expect(der::OCTET_STRING)?.content;
        bytes.end()?;

        let mut basic = der::only(basic, der::SEQUENCE)?.inside();
        let data = basic.expect(der::SEQUENCE)?;
        let algorithm = basic.expect(der::SEQUENCE)?.content;
        let signature = basic.expect(der::BIT_STRING)?.content.strip_prefix(&[0]).ok_or(Malformed)?;
        let certificates = basic.optional(constructed(0))?;
        basic.end()?;
        let signed = Signed { data: data.whole, algorithm, signature };
        self.verify(&signed, certificates.map(|it| it.content), now, algorithms)?;

        let mut data = data.inside();
        data.optional(constructed(0))?; // version
        data.any()?; // responderID
        data.expect(der::GENERALIZED_TIME)?; // producedAt
        let mut answers = data.expect(der::SEQUENCE)?.inside();
        let now = i64::try_from(now.as_secs()).map_err(|_| Malformed)?;
        while !answers.is_empty() {
            if let Some(answer) = self.single(answers.expect(der::SEQUENCE)?.inside(), now)? {
                return Ok(answer);
            }
        }
        Err(Malformed)
    }

    /// None: it is about another certificate.
    fn single(&self, mut answer: Reader<'_>, now: i64) -> Result<Option<StatusAnswer>, Malformed> {
        let mut id = answer.expect(der::SEQUENCE)?.inside();
        let algorithm = id.expect(der::SEQUENCE)?.inside().expect(der::OBJECT_IDENTIFIER)?.content;
        let name_hash = id.expect(der::OCTET_STRING)?.content;
        let key_hash = id.expect(der::OCTET_STRING)?.content;
        let serial = id.expect(der::INTEGER)?.content;
        id.end()?;
        if algorithm != SHA_1
            || name_hash != self.name_hash
            || key_hash != self.key_hash
            || serial != self.serial
        {
            return Ok(None);
        }
        let status = match answer.any()?.tag {
            0x80 => Status::Good,
            0xa1 => Status::Revoked,
            0x82 => Status::Unknown,
            _ => return Err(Malformed),
        };
        let this_update = x509::seconds(answer.expect(der::GENERALIZED_TIME)?)?;
        let until = match answer.optional(constructed(0))? {
            Some(next) => x509::seconds(der::only(next.content, der::GENERALIZED_TIME)?)?,
            None => this_update + UNLIMITED_S,
        };
        if this_update > now + SKEW_S || until + SKEW_S < now {
            return Err(Malformed);
        }
        Ok(Some(StatusAnswer { status, until }))
    }

    fn verify(
        &self,
        signed: &Signed<'_>,
        certificates: Option<&[u8]>,
        now: UnixTime,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Result<(), Malformed> {
        let issuer = Certificate::parse(&self.issuer)?;
        if signed.is_by(issuer.spki, algorithms) {
            return Ok(());
        }
        let mut delegates = match certificates {
            None => return Err(Malformed),
            Some(list) => der::only(list, der::SEQUENCE)?.inside(),
        };
        let issuer = CertificateDer::from(&self.issuer[..]);
        let anchor = webpki::anchor_from_trusted_cert(&issuer).map_err(|_| Malformed)?;
        for _ in 0..SIGNERS_MAX {
            if delegates.is_empty() {
                break;
            }
            let der = CertificateDer::from(delegates.expect(der::SEQUENCE)?.whole);
            let delegate = Certificate::parse(&der)?;
            let is_entitled = EndEntityCert::try_from(&der).is_ok_and(|certificate| {
                let usage = KeyUsage::required(OCSP_SIGNING);
                let anchors = std::slice::from_ref(&anchor);
                certificate.verify_for_usage(algorithms.all, anchors, &[], now, usage, None, None).is_ok()
            });
            if is_entitled && signed.is_by(delegate.spki, algorithms) {
                return Ok(());
            }
        }
        Err(Malformed)
    }
}

struct Signed<'a> {
    data: &'a [u8],
    /// Content of the AlgorithmIdentifier.
    algorithm: &'a [u8],
    signature: &'a [u8],
}

impl Signed<'_> {
    fn is_by(&self, spki: &[u8], algorithms: WebPkiSupportedAlgorithms) -> bool {
        let spki = SubjectPublicKeyInfoDer::from(spki);
        let Ok(key) = RawPublicKeyEntity::try_from(&spki) else { return false };
        let fitting = algorithms.all.iter().filter(|it| it.signature_alg_id().as_ref() == self.algorithm);
        fitting.into_iter().any(|it| key.verify_signature(*it, self.data, self.signature).is_ok())
    }
}

fn sha1(bytes: &[u8]) -> [u8; 20] {
    let mut hash = [0; 20];
    hash.copy_from_slice(digest(&SHA1_FOR_LEGACY_USE_ONLY, bytes).as_ref());
    hash
}
