//! Owns the conversions between what a token takes and returns and what TLS sends.
//! Must not know tokens, keys or threads. Pure functions; called on lanes.

use std::fmt;

/// A token returned something that is not a signature of the expected length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongLength {
    pub expected_bytes: usize,
    pub found_bytes: usize,
}

/// The SEQUENCE { r INTEGER, s INTEGER } that TLS sends (RFC 3279 2.2.3), from the fixed-width r||s of CKM_ECDSA
/// (PKCS#11 v3.0 section 2.3.1). `field_bytes` is the size of the group order, 1..=66.
///
/// The length must be exactly twice that: a shorter answer would be read as other numbers, not as an error.
pub fn ecdsa_der(r_and_s: &[u8], field_bytes: usize) -> Result<Vec<u8>, WrongLength> {
    let expected_bytes = 2 * field_bytes;
    if field_bytes == 0 || field_bytes > FIELD_BYTES_MAX || r_and_s.len() != expected_bytes {
        return Err(WrongLength { expected_bytes, found_bytes: r_and_s.len() });
    }
    let (r, s) = r_and_s.split_at(field_bytes);
    let (r, s) = (Magnitude::of(r), Magnitude::of(s));
    let body_bytes = r.der_bytes() + s.der_bytes();
    let mut der = Vec::with_capacity(3 + body_bytes);
    der.push(0x30);
    // P-521 is the only curve whose body needs the long form; FIELD_BYTES_MAX keeps it to one length byte.
    if body_bytes >= 0x80 {
        der.push(0x81);
    }
    der.push(body_bytes as u8);
    r.write(&mut der);
    s.write(&mut der);
    Ok(der)
}

/// P-521.
const FIELD_BYTES_MAX: usize = 66;

/// An unsigned big-endian number without its leading zeros.
struct Magnitude<'a> {
    /// Invariant: never empty, at most `FIELD_BYTES_MAX` long.
    bytes: &'a [u8],
    /// DER integers are signed: a set top bit needs a zero in front.
    padded: bool,
}

impl<'a> Magnitude<'a> {
    fn of(fixed: &'a [u8]) -> Magnitude<'a> {
        let zeros = fixed.iter().take_while(|byte| **byte == 0).count();
        // Zero itself keeps one byte.
        let bytes = &fixed[zeros.min(fixed.len() - 1)..];
        Magnitude { bytes, padded: bytes[0] & 0x80 != 0 }
    }

    fn der_bytes(&self) -> usize {
        2 + usize::from(self.padded) + self.bytes.len()
    }

    fn write(&self, der: &mut Vec<u8>) {
        der.push(0x02);
        der.push((usize::from(self.padded) + self.bytes.len()) as u8);
        if self.padded {
            der.push(0);
        }
        der.extend_from_slice(self.bytes);
    }
}

/// The DigestInfo that CKM_RSA_PKCS pads and signs (RFC 8017 9.2): the fixed DER prefix of the hash, then the digest.
pub fn digest_info(prefix: &[u8; DIGEST_INFO_PREFIX_BYTES], digest: &[u8]) -> Vec<u8> {
    let mut info = Vec::with_capacity(prefix.len() + digest.len());
    info.extend_from_slice(prefix);
    info.extend_from_slice(digest);
    info
}

pub const DIGEST_INFO_PREFIX_BYTES: usize = 19;

/// RFC 8017 9.2, note 1.
pub const SHA256_PREFIX: [u8; DIGEST_INFO_PREFIX_BYTES] = prefix(0x31, 0x01, 0x20);
pub const SHA384_PREFIX: [u8; DIGEST_INFO_PREFIX_BYTES] = prefix(0x41, 0x02, 0x30);
pub const SHA512_PREFIX: [u8; DIGEST_INFO_PREFIX_BYTES] = prefix(0x51, 0x03, 0x40);

const fn prefix(sequence_bytes: u8, hash: u8, digest_bytes: u8) -> [u8; DIGEST_INFO_PREFIX_BYTES] {
    [
        0x30,
        sequence_bytes,
        0x30,
        0x0d,
        0x06,
        0x09,
        0x60,
        0x86,
        0x48,
        0x01,
        0x65,
        0x03,
        0x04,
        0x02,
        hash,
        0x05,
        0x00,
        0x04,
        digest_bytes,
    ]
}

impl fmt::Display for WrongLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a signature of {} bytes, expected {}", self.found_bytes, self.expected_bytes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn der_reads_back_as_the_same_two_numbers(
            field_bytes in prop::sample::select(vec![32_usize, 48, 66]),
            bytes in prop::collection::vec(any::<u8>(), 132),
            r_zeros in 0_usize..=66,
            s_zeros in 0_usize..=66,
        ) {
            let mut fixed = bytes[..2 * field_bytes].to_vec();
            fixed[..r_zeros.min(field_bytes)].fill(0);
            fixed[field_bytes..][..s_zeros.min(field_bytes)].fill(0);

            let der = ecdsa_der(&fixed, field_bytes).unwrap();

            let (r, s) = read_strict(&der).unwrap();
            prop_assert_eq!(left_pad(&r, field_bytes), &fixed[..field_bytes]);
            prop_assert_eq!(left_pad(&s, field_bytes), &fixed[field_bytes..]);
        }

        #[test]
        fn any_other_length_than_two_fields_is_refused(length in 0_usize..200) {
            for field_bytes in [32, 48, 66] {
                prop_assert_eq!(ecdsa_der(&vec![1; length], field_bytes).is_ok(), length == 2 * field_bytes);
            }
        }
    }

    #[test]
    fn a_field_no_curve_has_is_refused() {
        assert!(ecdsa_der(&[], 0).is_err());
        assert!(ecdsa_der(&[1; 134], 67).is_err());
    }

    #[test]
    fn a_real_signature_converts_to_the_der_that_verifies() {
        use aws_lc_rs::rand::SystemRandom;
        use aws_lc_rs::signature::{
            ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
        };
        let key = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap();
        let public = UnparsedPublicKey::new(&ECDSA_P384_SHA384_ASN1, key.public_key().as_ref());
        for message in 0..64_u8 {
            let fixed = key.sign(&SystemRandom::new(), &[message]).unwrap();
            public.verify(&[message], &ecdsa_der(fixed.as_ref(), 48).unwrap()).unwrap();
        }
    }

    #[test]
    fn a_digest_info_names_its_hash_and_carries_all_of_the_digest() {
        for (prefix, digest_bytes) in [(SHA256_PREFIX, 32), (SHA384_PREFIX, 48), (SHA512_PREFIX, 64)] {
            let info = digest_info(&prefix, &vec![7; digest_bytes]);
            assert_eq!(usize::from(info[1]), info.len() - 2);
            assert_eq!(usize::from(info[18]), digest_bytes);
        }
    }

    /// An independent reader that accepts only the one encoding DER allows (X.690 8.3.2, 10.1).
    fn read_strict(der: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let (body, rest) = element(der, 0x30)?;
        let (r, tail) = element(body, 0x02)?;
        let (s, end) = element(tail, 0x02)?;
        (rest.is_empty() && end.is_empty()).then_some(())?;
        Some((unsigned(r)?, unsigned(s)?))
    }

    fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
        let (head, rest) = der.split_at_checked(2)?;
        (head[0] == tag).then_some(())?;
        let (length, rest) = match head[1] {
            short if short < 0x80 => (usize::from(short), rest),
            0x81 => {
                let (long, rest) = rest.split_first()?;
                (*long >= 0x80).then_some((usize::from(*long), rest))?
            }
            _ => return None,
        };
        rest.split_at_checked(length)
    }

    fn unsigned(integer: &[u8]) -> Option<Vec<u8>> {
        match integer {
            [] => None,
            [first, ..] if first & 0x80 != 0 => None,
            [0, second, ..] if second & 0x80 == 0 => None,
            [0, rest @ ..] if !rest.is_empty() => Some(rest.to_vec()),
            all => Some(all.to_vec()),
        }
    }

    fn left_pad(number: &[u8], field_bytes: usize) -> Vec<u8> {
        let mut fixed = vec![0; field_bytes - number.len()];
        fixed.extend_from_slice(number);
        fixed
    }
}
