//! Owns signed certificate timestamps as bytes: lists of them, what a log has signed, the list in an OCSP response (RFC 6962
//! 3.2, 3.3; RFC 6960 4.2.1). Knows no log and judges nothing. Pure; every input is hostile.

use aws_lc_rs::digest::{SHA256, digest};

use super::der::{self, Malformed, Value, constructed};

/// A certificate with more SCTs is as good as one with so many; each costs a verification.
const PER_LIST_MAX: usize = 16;
/// 1.3.6.1.4.1.11129.2.4.5 (RFC 6962 3.3)
const OCSP_SCT_LIST: &[u8] = &[0x2b, 0x06, 0x01, 0x04, 0x01, 0xd6, 0x79, 0x02, 0x04, 0x05];
/// 1.3.6.1.5.5.7.48.1.1: id-pkix-ocsp-basic
pub const OCSP_BASIC: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01];

pub type LogId = [u8; 32];

/// Of version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sct<'a> {
    pub log: LogId,
    /// Since 1970.
    pub timestamp_ms: u64,
    extensions: &'a [u8],
    /// HashAlgorithm and SignatureAlgorithm of RFC 5246 7.4.1.4.1.
    pub algorithm: [u8; 2],
    pub signature: &'a [u8],
}

/// What a log has promised to publish.
#[derive(Debug)]
pub enum Entry {
    X509 { certificate: Vec<u8> },
    Precertificate { issuer_key_hash: [u8; 32], tbs: Vec<u8> },
}

impl Entry {
    /// `tbs`: without the list of SCTs and without the poison, which a certificate that is in use never has.
    pub fn precertificate(issuer_spki: &[u8], tbs: Vec<u8>) -> Self {
        let mut issuer_key_hash = [0; 32];
        issuer_key_hash.copy_from_slice(digest(&SHA256, issuer_spki).as_ref());
        Self::Precertificate { issuer_key_hash, tbs }
    }
}

impl<'a> Sct<'a> {
    /// RFC 6962 3.2: what the signature is over. None for an entry that is too long to be one.
    pub fn signed(&self, entry: &Entry) -> Option<Vec<u8>> {
        let mut signed = vec![0, 0]; // version 1, certificate_timestamp
        signed.extend_from_slice(&self.timestamp_ms.to_be_bytes());
        let certificate = match entry {
            Entry::X509 { certificate } => {
                signed.extend_from_slice(&[0, 0]);
                certificate
            }
            Entry::Precertificate { issuer_key_hash, tbs } => {
                signed.extend_from_slice(&[0, 1]);
                signed.extend_from_slice(issuer_key_hash);
                tbs
            }
        };
        let [0, length @ ..] = u32::try_from(certificate.len()).ok()?.to_be_bytes() else { return None };
        signed.extend_from_slice(&length);
        signed.extend_from_slice(certificate);
        signed.extend_from_slice(&u16::try_from(self.extensions.len()).ok()?.to_be_bytes());
        signed.extend_from_slice(self.extensions);
        Some(signed)
    }
}

/// The first SCTs of a SignedCertificateTimestampList; those of a version that we do not know are left out.
///
/// # Errors
/// It is not one.
pub fn parse_list(list: &[u8]) -> Result<Vec<Sct<'_>>, Malformed> {
    let mut outer = Bytes(list);
    let mut entries = Bytes(outer.vector()?);
    outer.end()?;
    let mut scts = Vec::new();
    while !entries.0.is_empty() {
        let sct = parse(entries.vector()?)?;
        if scts.len() < PER_LIST_MAX {
            scts.extend(sct);
        }
    }
    Ok(scts)
}

fn parse(bytes: &[u8]) -> Result<Option<Sct<'_>>, Malformed> {
    let mut bytes = Bytes(bytes);
    if bytes.array::<1>()? != [0] {
        return Ok(None);
    }
    let sct = Sct {
        log: bytes.array()?,
        timestamp_ms: u64::from_be_bytes(bytes.array()?),
        extensions: bytes.vector()?,
        algorithm: bytes.array()?,
        signature: bytes.vector()?,
    };
    bytes.end()?;
    Ok(Some(sct))
}

/// TLS' presentation language (RFC 5246 4).
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    /// `<0..2^16-1>`
    fn vector(&mut self) -> Result<&'a [u8], Malformed> {
        let length = u16::from_be_bytes(self.array()?);
        self.take(usize::from(length))
    }

    fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed) }
    }
}

/// The lists of SCTs in an OCSP response. The response's own signature does not matter here: each SCT has the log's.
///
/// # Errors
/// It is not a basic OCSP response.
pub fn lists_in_ocsp(response: &[u8]) -> Result<Vec<&[u8]>, Malformed> {
    let mut response = der::only(response, der::SEQUENCE)?.inside();
    if response.expect(der::ENUMERATED)?.content != [0] {
        return Ok(Vec::new()); // not successful: nothing in it
    }
    let mut bytes = der::only(response.expect(constructed(0))?.content, der::SEQUENCE)?.inside();
    if bytes.expect(der::OBJECT_IDENTIFIER)?.content != OCSP_BASIC {
        return Err(Malformed);
    }
    let basic = der::only(bytes.expect(der::OCTET_STRING)?.content, der::SEQUENCE)?;
    let mut data = basic.inside().expect(der::SEQUENCE)?.inside();
    data.optional(constructed(0))?; // version
    data.any()?; // responderID
    data.expect(der::GENERALIZED_TIME)?; // producedAt
    let mut responses = data.expect(der::SEQUENCE)?.inside();
    let mut lists = Vec::new();
    while !responses.is_empty() {
        lists.extend(list_in_single_response(responses.expect(der::SEQUENCE)?)?);
    }
    Ok(lists)
}

fn list_in_single_response(single: Value<'_>) -> Result<Option<&[u8]>, Malformed> {
    let mut single = single.inside();
    single.expect(der::SEQUENCE)?; // certID
    single.any()?; // certStatus
    single.expect(der::GENERALIZED_TIME)?; // thisUpdate
    single.optional(constructed(0))?; // nextUpdate
    let Some(extensions) = single.optional(constructed(1))? else { return Ok(None) };
    let mut extensions = der::only(extensions.content, der::SEQUENCE)?.inside();
    while !extensions.is_empty() {
        let mut extension = extensions.expect(der::SEQUENCE)?.inside();
        if extension.expect(der::OBJECT_IDENTIFIER)?.content == OCSP_SCT_LIST {
            extension.optional(0x01)?; // critical
            let value = extension.expect(der::OCTET_STRING)?;
            return der::only(value.content, der::OCTET_STRING).map(|list| Some(list.content));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_that_are_not_known_are_left_out() {
        assert_eq!(parse_list(&[0, 4, 0, 2, 1, 0]), Ok(Vec::new()));
    }

    #[test]
    fn lists_that_end_too_early_or_too_late_are_malformed() {
        for list in [&[][..], &[0], &[0, 1, 0], &[0, 3, 0, 2, 0], &[0, 0, 0], &[0, 3, 0, 1, 0]] {
            assert_eq!(parse_list(list), Err(Malformed), "{list:02x?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_list(&bytes);
            let _ = lists_in_ocsp(&bytes);
        }
    }
}
