//! Owns what is read out of a certificate beside what webpki does: its key, its end, whether it is self-issued, what its holder
//! is called, its SCTs and what was signed by the logs (RFC 5280 4.1, RFC 6962 3.2). Judges nothing. Pure; every input is hostile.

use aws_lc_rs::digest::{SHA256, digest};

use super::der::{self, Malformed, Reader, Value, constructed};

/// 1.2.840.113549.1.1.1
const RSA_ENCRYPTION: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
/// 1.3.6.1.4.1.11129.2.4.2 (RFC 6962 3.3)
const SCT_LIST: &[u8] = &[0x2b, 0x06, 0x01, 0x04, 0x01, 0xd6, 0x79, 0x02, 0x04, 0x02];

/// 2.5.4.3
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// 2.5.29.17
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
/// 1.3.6.1.5.5.7.1.1
const AUTHORITY_INFO_ACCESS: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x01, 0x01];
/// 1.3.6.1.5.5.7.48.1
const OCSP: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01];
/// RFC 5280 4.2.1.6: choices of GeneralName, all of them IA5String.
const EMAIL: u8 = 0x81;
const DNS_NAME: u8 = 0x82;
const URI: u8 = 0x86;

/// What the holder of a certificate is called. Text is as it stands in the certificate: hostile until somebody has verified that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// Of the subject; None also when there are two, of which others may read the other one.
    pub common_name: Option<String>,
    /// Lower case.
    pub dns_names: Vec<String>,
    pub uris: Vec<String>,
    pub emails: Vec<String>,
    /// SHA-256 of the SubjectPublicKeyInfo.
    pub spki: [u8; 32],
    /// SHA-256 of the whole certificate.
    pub fingerprint: [u8; 32],
}

impl Identity {
    /// What a person would call the client: a workload by its URI, others by their common name or what else there is.
    pub fn name(&self) -> Option<&str> {
        let others = self.dns_names.iter().chain(&self.emails);
        self.uris.iter().chain(&self.common_name).chain(others).map(String::as_str).next()
    }
}

/// The parts of a certificate, where they stand in it.
#[derive(Debug, Clone, Copy)]
pub struct Certificate<'a> {
    pub der: &'a [u8],
    pub serial: &'a [u8],
    pub issuer: &'a [u8],
    pub subject: &'a [u8],
    /// The whole SubjectPublicKeyInfo.
    pub spki: &'a [u8],
    /// Seconds since 1970.
    pub not_after: i64,
    /// TBSCertificate up to its extensions.
    before_extensions: &'a [u8],
    /// Each a whole Extension.
    extensions: &'a [u8],
}

/// The list of SCTs that was put into a certificate (RFC 6962 3.3).
#[derive(Debug, PartialEq, Eq)]
pub struct EmbeddedScts<'a> {
    pub list: &'a [u8],
    /// The TBSCertificate that the logs have signed: the same without the list.
    pub tbs: Vec<u8>,
}

impl<'a> Certificate<'a> {
    /// # Errors
    /// These bytes are not a certificate of X.509 version 1 or 3.
    pub fn parse(der: &'a [u8]) -> Result<Self, Malformed> {
        let mut certificate = der::only(der, der::SEQUENCE)?.inside();
        let tbs = certificate.expect(der::SEQUENCE)?;
        certificate.expect(der::SEQUENCE)?; // signatureAlgorithm
        certificate.expect(der::BIT_STRING)?;
        certificate.end()?;

        let mut fields = tbs.inside();
        fields.optional(constructed(0))?; // version
        let serial = fields.expect(der::INTEGER)?.content;
        fields.expect(der::SEQUENCE)?; // signature
        let issuer = fields.expect(der::SEQUENCE)?;
        let mut validity = fields.expect(der::SEQUENCE)?.inside();
        validity.any()?; // notBefore
        let not_after = seconds(validity.any()?)?;
        validity.end()?;
        let subject = fields.expect(der::SEQUENCE)?;
        let spki = fields.expect(der::SEQUENCE)?;
        fields.optional(0x81)?; // issuerUniqueID
        fields.optional(0x82)?; // subjectUniqueID
        let before_extensions = before(tbs.content, &fields);
        let extensions = match fields.optional(constructed(3))? {
            None => &[][..],
            Some(tagged) => der::only(tagged.content, der::SEQUENCE)?.content,
        };
        fields.end()?;
        Ok(Self {
            der,
            serial,
            issuer: issuer.whole,
            subject: subject.whole,
            spki: spki.whole,
            not_after,
            before_extensions,
            extensions,
        })
    }

    pub fn is_self_issued(&self) -> bool {
        self.issuer == self.subject
    }

    /// # Errors
    /// The extensions are malformed, or there are two such lists.
    pub fn embedded_scts(&self) -> Result<Option<EmbeddedScts<'a>>, Malformed> {
        let mut reader = Reader::new(self.extensions);
        let mut found = None;
        while !reader.is_empty() {
            let start = before(self.extensions, &reader);
            let extension = reader.expect(der::SEQUENCE)?;
            let mut parts = extension.inside();
            if parts.expect(der::OBJECT_IDENTIFIER)?.content != SCT_LIST {
                continue;
            }
            parts.optional(0x01)?; // critical
            let list = der::only(parts.expect(der::OCTET_STRING)?.content, der::OCTET_STRING)?.content;
            parts.end()?;
            let rest = &self.extensions[start.len() + extension.whole.len()..];
            if found.replace(EmbeddedScts { list, tbs: self.tbs_with(&[start, rest]) }).is_some() {
                return Err(Malformed);
            }
        }
        Ok(found)
    }

    /// The first address at which an OCSP responder can be asked about it.
    ///
    /// # Errors
    /// The extension is malformed.
    pub fn ocsp_responder(&self) -> Result<Option<String>, Malformed> {
        let mut extensions = Reader::new(self.extensions);
        while !extensions.is_empty() {
            let mut parts = extensions.expect(der::SEQUENCE)?.inside();
            if parts.expect(der::OBJECT_IDENTIFIER)?.content != AUTHORITY_INFO_ACCESS {
                continue;
            }
            parts.optional(0x01)?; // critical
            let descriptions = parts.expect(der::OCTET_STRING)?.content;
            let mut descriptions = der::only(descriptions, der::SEQUENCE)?.inside();
            while !descriptions.is_empty() {
                let mut description = descriptions.expect(der::SEQUENCE)?.inside();
                let method = description.expect(der::OBJECT_IDENTIFIER)?.content;
                let location = description.any()?;
                if method == OCSP && location.tag == URI {
                    return ascii(location.content).map(Some);
                }
            }
        }
        Ok(None)
    }

    /// # Errors
    /// A name in it is malformed, or is not text: half of an identity must not be taken for the whole.
    pub fn identity(&self) -> Result<Identity, Malformed> {
        let mut identity =
            Identity { spki: sha256(self.spki), fingerprint: sha256(self.der), ..Identity::default() };
        // RFC 5280 4.1.2.4: sets of attributes.
        let mut common_names = Vec::new();
        let mut sets = der::only(self.subject, der::SEQUENCE)?.inside();
        while !sets.is_empty() {
            let mut attributes = sets.expect(der::SET)?.inside();
            while !attributes.is_empty() {
                let mut attribute = attributes.expect(der::SEQUENCE)?.inside();
                let kind = attribute.expect(der::OBJECT_IDENTIFIER)?;
                let value = attribute.any()?;
                attribute.end()?;
                if kind.content == COMMON_NAME {
                    common_names.push(text(value)?);
                }
            }
        }
        identity.common_name = common_names.pop().filter(|_| common_names.is_empty());
        let mut extensions = Reader::new(self.extensions);
        let mut is_named = false;
        while !extensions.is_empty() {
            let mut parts = extensions.expect(der::SEQUENCE)?.inside();
            if parts.expect(der::OBJECT_IDENTIFIER)?.content != SUBJECT_ALT_NAME {
                continue;
            }
            // RFC 5280 4.2: each extension once.
            if std::mem::replace(&mut is_named, true) {
                return Err(Malformed);
            }
            parts.optional(0x01)?; // critical
            let names = parts.expect(der::OCTET_STRING)?.content;
            parts.end()?;
            let mut names = der::only(names, der::SEQUENCE)?.inside();
            while !names.is_empty() {
                let name = names.any()?;
                match name.tag {
                    DNS_NAME => identity.dns_names.push(ascii(name.content)?.to_ascii_lowercase()),
                    URI => identity.uris.push(ascii(name.content)?),
                    EMAIL => identity.emails.push(ascii(name.content)?),
                    _ => {}
                }
            }
        }
        Ok(identity)
    }

    fn tbs_with(&self, extensions: &[&[u8]]) -> Vec<u8> {
        let list = der::encode(der::SEQUENCE, extensions);
        let tagged = der::encode(constructed(3), &[&list]);
        der::encode(der::SEQUENCE, &[self.before_extensions, &tagged])
    }
}

/// The key itself, without what kind it is.
///
/// # Errors
/// `spki` is not a SubjectPublicKeyInfo.
pub fn key_bits(spki: &[u8]) -> Result<&[u8], Malformed> {
    let mut parts = der::only(spki, der::SEQUENCE)?.inside();
    parts.expect(der::SEQUENCE)?; // algorithm
    // The first byte of a BIT STRING tells how many bits of the last are not used; of a key all are.
    parts.expect(der::BIT_STRING)?.content.strip_prefix(&[0]).ok_or(Malformed)
}

/// Bits of the modulus; None for a key that is not RSA.
///
/// # Errors
/// `spki` is not a SubjectPublicKeyInfo.
pub fn rsa_bits(spki: &[u8]) -> Result<Option<usize>, Malformed> {
    let mut parts = der::only(spki, der::SEQUENCE)?.inside();
    let algorithm = parts.expect(der::SEQUENCE)?.inside().expect(der::OBJECT_IDENTIFIER)?;
    if algorithm.content != RSA_ENCRYPTION {
        return Ok(None);
    }
    let modulus = der::only(key_bits(spki)?, der::SEQUENCE)?.inside().expect(der::INTEGER)?.content;
    let significant = &modulus[modulus.iter().take_while(|byte| **byte == 0).count()..];
    let leading = significant.first().map_or(0, |byte| byte.leading_zeros() as usize);
    Ok(Some(significant.len() * 8 - leading))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

/// RFC 5280 4.1.2.4: DirectoryString. Forms that nobody has issued for twenty years are left out.
fn text(value: Value<'_>) -> Result<String, Malformed> {
    match value.tag {
        der::UTF8_STRING => plain(std::str::from_utf8(value.content).map_err(|_| Malformed)?),
        der::PRINTABLE_STRING | der::IA5_STRING => ascii(value.content),
        _ => Err(Malformed),
    }
}

fn ascii(bytes: &[u8]) -> Result<String, Malformed> {
    if !bytes.is_ascii() {
        return Err(Malformed);
    }
    plain(std::str::from_utf8(bytes).map_err(|_| Malformed)?)
}

/// A name with a NUL or a line feed in it is meant to be read as another one somewhere.
fn plain(text: &str) -> Result<String, Malformed> {
    if text.is_empty() || text.chars().any(char::is_control) { Err(Malformed) } else { Ok(text.to_owned()) }
}

/// What `reader` has read of `all`.
fn before<'a>(all: &'a [u8], reader: &Reader<'_>) -> &'a [u8] {
    &all[..all.len() - reader.remaining()]
}

/// RFC 5280 4.1.2.5: `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`.
pub(super) fn seconds(time: Value<'_>) -> Result<i64, Malformed> {
    let (year, rest) = match (time.tag, time.content.len()) {
        (der::UTC_TIME, 13) => {
            let year = number(&time.content[..2])?;
            (if year < 50 { 2000 + year } else { 1900 + year }, &time.content[2..])
        }
        (der::GENERALIZED_TIME, 15) => (number(&time.content[..4])?, &time.content[4..]),
        _ => return Err(Malformed),
    };
    let [month, day, hour, minute, second] =
        [0, 2, 4, 6, 8].map(|at| number(&rest[at..at + 2]).unwrap_or(i64::MAX));
    let in_range = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0..=60).contains(&second);
    if !in_range || rest[10] != b'Z' {
        return Err(Malformed);
    }
    Ok(days_since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

fn number(digits: &[u8]) -> Result<i64, Malformed> {
    digits.iter().try_fold(0, |number, digit| match digit {
        b'0'..=b'9' => Ok(number * 10 + i64::from(digit - b'0')),
        _ => Err(Malformed),
    })
}

/// Of the proleptic Gregorian calendar, with years that begin in March, so that the leap day is the last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::tests::world::World;
    use rcgen::string::Ia5String;
    use rcgen::{CertificateParams, CustomExtension, DnType, SanType};

    fn at(tag: u8, text: &str) -> Result<i64, Malformed> {
        let encoded = der::encode(tag, &[text.as_bytes()]);
        seconds(Reader::new(&encoded).any().expect("our own encoding"))
    }

    #[test]
    fn times_are_seconds_since_1970() {
        assert_eq!(at(der::UTC_TIME, "700101000000Z"), Ok(0));
        assert_eq!(at(der::UTC_TIME, "240229235959Z"), Ok(1_709_251_199));
        assert_eq!(at(der::UTC_TIME, "491231235959Z"), Ok(2_524_607_999));
        assert_eq!(at(der::GENERALIZED_TIME, "20500101000000Z"), Ok(2_524_608_000));
        assert_eq!(at(der::GENERALIZED_TIME, "99991231235959Z"), Ok(253_402_300_799));
    }

    #[test]
    fn other_forms_of_time_are_refused() {
        for (tag, text) in [
            (der::UTC_TIME, "7001010000Z"),
            (der::UTC_TIME, "700101000000+"),
            (der::UTC_TIME, "701301000000Z"),
            (der::UTC_TIME, "70x101000000Z"),
            (der::GENERALIZED_TIME, "700101000000Z"),
            (der::INTEGER, "700101000000Z"),
        ] {
            assert_eq!(at(tag, text), Err(Malformed), "{text}");
        }
    }

    #[test]
    fn a_certificate_without_scts_has_none() {
        let world = World::new();
        let leaf = world.leaf();
        assert_eq!(Certificate::parse(&leaf).expect("a certificate").embedded_scts(), Ok(None));
    }

    #[test]
    fn a_certificate_with_something_behind_it_is_malformed() {
        let mut leaf = World::new().leaf();
        leaf.push(0);
        assert!(Certificate::parse(&leaf).is_err());
    }
    fn identity_of(change: impl FnOnce(&mut CertificateParams)) -> Result<Identity, Malformed> {
        let leaf = World::new().issue(change);
        Certificate::parse(&leaf).expect("a certificate").identity()
    }

    fn ia5(text: &str) -> Ia5String {
        Ia5String::try_from(text).expect("ASCII")
    }

    #[test]
    fn an_identity_has_every_kind_of_name() {
        let identity = identity_of(|params| {
            params.distinguished_name.push(DnType::OrganizationName, "An Organisation");
            params.distinguished_name.push(DnType::CommonName, "Bücher");
            params.subject_alt_names = vec![
                SanType::DnsName(ia5("A.Clients.Test")),
                SanType::URI(ia5("spiffe://example.org/a")),
                SanType::URI(ia5("spiffe://example.org/b")),
                SanType::Rfc822Name(ia5("a@example.org")),
                SanType::IpAddress([127, 0, 0, 1].into()),
            ];
        })
        .expect("an identity");
        assert_eq!(identity.common_name.as_deref(), Some("Bücher"));
        assert_eq!(identity.dns_names, ["a.clients.test"]);
        assert_eq!(identity.uris, ["spiffe://example.org/a", "spiffe://example.org/b"]);
        assert_eq!(identity.emails, ["a@example.org"]);
        assert_eq!(identity.name(), Some("spiffe://example.org/a"));
    }

    #[test]
    fn a_name_that_could_be_read_as_another_is_no_identity() {
        for text in ["admin\0.evil.test", "admin\n", ""] {
            assert_eq!(
                identity_of(|params| params.subject_alt_names = vec![SanType::URI(ia5(text))]),
                Err(Malformed)
            );
        }
        let forged = |params: &mut CertificateParams| {
            params.distinguished_name.push(DnType::CommonName, "admin\0.evil");
        };
        assert_eq!(identity_of(forged), Err(Malformed));
    }

    #[test]
    fn of_two_common_names_neither_counts() {
        let twice = |params: &mut CertificateParams| {
            params.distinguished_name.push(DnType::CommonName, "harmless");
            params.distinguished_name.push(DnType::CustomDnType(vec![2, 5, 4, 3]), "admin");
        };
        assert_eq!(identity_of(twice).expect("an identity").common_name, None);
    }

    #[test]
    fn two_extensions_with_names_are_malformed() {
        let again = der::encode(der::SEQUENCE, &[&der::encode(URI, &[b"spiffe://example.org/admin"])]);
        let twice = |params: &mut CertificateParams| {
            params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], again)];
        };
        assert_eq!(identity_of(twice), Err(Malformed));
    }
}
