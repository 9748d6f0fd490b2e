//! Owns what TLS can do with a certificate's public key: its algorithm, the signature schemes, how each is asked of a
//! token, and the check of what the token returned. Must not know PKCS#11 sessions or lanes. Pure; runs on any thread.

use std::fmt;

use aws_lc_rs::digest;
use aws_lc_rs::signature as lc;
use rustls::SignatureScheme;
use rustls::pki_types::alg_id;

use super::encode;
use super::pkcs11::{Mechanism, PssHash};
use super::queue::Class;

/// The public half of a private key in a token, parsed once.
pub struct PublicKey {
    spki: Vec<u8>,
    algorithm: KeyAlgorithm,
    schemes: Vec<SignatureScheme>,
    /// Invariant: one per scheme, in the same order.
    verifiers: Vec<lc::ParsedPublicKey>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyAlgorithm {
    P256,
    P384,
    /// 2048..=8192.
    Rsa {
        bits: u32,
    },
    Ed25519,
}

/// The SubjectPublicKeyInfo cannot be used; says why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKeyError(pub String);

/// The token returned something that is not the signature of this message by this key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongSignature(pub String);

impl PublicKey {
    /// From a DER SubjectPublicKeyInfo (RFC 5280 4.1.2.7).
    pub fn from_spki(spki: &[u8]) -> Result<PublicKey, PublicKeyError> {
        let algorithm = algorithm_of(spki)?;
        let recipes = recipes(algorithm);
        let verifiers = recipes
            .iter()
            .map(|recipe| lc::ParsedPublicKey::new(recipe.verification, spki))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|reason| PublicKeyError(format!("the {algorithm} public key is not valid: {reason}")))?;
        Ok(PublicKey {
            spki: spki.to_vec(),
            algorithm,
            schemes: recipes.iter().map(|recipe| recipe.scheme).collect(),
            verifiers,
        })
    }

    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    pub fn algorithm(&self) -> KeyAlgorithm {
        self.algorithm
    }

    /// What this key can sign, in the order of preference. An EC key signs only with the hash of its curve: that is all
    /// TLS 1.3 allows (RFC 8446 4.2.3), and what TLS 1.2 clients offer as well.
    pub fn schemes(&self) -> &[SignatureScheme] {
        &self.schemes
    }

    /// Every mechanism that `schemes` needs, each once.
    pub fn mechanisms(&self) -> impl Iterator<Item = Mechanism> {
        let mut seen = Vec::new();
        recipes(self.algorithm).iter().map(|recipe| recipe.mechanism).filter(move |mechanism| {
            let new = !seen.contains(&mechanism.ck_type());
            seen.push(mechanism.ck_type());
            new
        })
    }

    /// What to ask of the token for `message`: the mechanism and its input. `None`: not one of `schemes`.
    pub fn token_request(&self, scheme: SignatureScheme, message: &[u8]) -> Option<(Mechanism, Vec<u8>)> {
        let recipe = self.recipe(scheme)?;
        let digest_of = |hash: Hash| digest::digest(hash.algorithm(), message);
        let input = match recipe.input {
            Input::Message => message.to_vec(),
            Input::Digest(hash) => digest_of(hash).as_ref().to_vec(),
            Input::DigestInfo(hash) => encode::digest_info(hash.prefix(), digest_of(hash).as_ref()),
        };
        Some((recipe.mechanism, input))
    }

    pub fn mechanism(&self, scheme: SignatureScheme) -> Option<Mechanism> {
        self.recipe(scheme).map(|recipe| recipe.mechanism)
    }

    /// The signature as TLS sends it, from what the token returned.
    pub fn tls_signature(&self, from_token: &[u8]) -> Result<Vec<u8>, WrongSignature> {
        let wrong = |wrong: encode::WrongLength| WrongSignature(wrong.to_string());
        match self.algorithm {
            KeyAlgorithm::P256 => encode::ecdsa_der(from_token, 32).map_err(wrong),
            KeyAlgorithm::P384 => encode::ecdsa_der(from_token, 48).map_err(wrong),
            KeyAlgorithm::Rsa { bits } => exactly(from_token, bits.div_ceil(8) as usize).map_err(wrong),
            KeyAlgorithm::Ed25519 => exactly(from_token, 64).map_err(wrong),
        }
    }

    pub fn verify(
        &self,
        scheme: SignatureScheme,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), WrongSignature> {
        self.schemes
            .iter()
            .position(|known| *known == scheme)
            .and_then(|index| self.verifiers.get(index))
            .and_then(|verifier| verifier.verify_sig(message, signature).ok())
            .ok_or_else(|| WrongSignature("a signature that the certificate's public key refuses".into()))
    }

    fn recipe(&self, scheme: SignatureScheme) -> Option<&'static Recipe> {
        recipes(self.algorithm).iter().find(|recipe| recipe.scheme == scheme)
    }
}

/// One TLS signature scheme: how a token makes it and how it is checked.
struct Recipe {
    scheme: SignatureScheme,
    mechanism: Mechanism,
    input: Input,
    verification: &'static dyn lc::VerificationAlgorithm,
}

#[derive(Clone, Copy)]
enum Input {
    Message,
    Digest(Hash),
    DigestInfo(Hash),
}

#[derive(Clone, Copy)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

fn recipes(algorithm: KeyAlgorithm) -> &'static [Recipe] {
    match algorithm {
        KeyAlgorithm::P256 => &P256,
        KeyAlgorithm::P384 => &P384,
        KeyAlgorithm::Rsa { .. } => &RSA,
        KeyAlgorithm::Ed25519 => &ED25519,
    }
}

static P256: [Recipe; 1] = [Recipe {
    scheme: SignatureScheme::ECDSA_NISTP256_SHA256,
    mechanism: Mechanism::Ecdsa,
    input: Input::Digest(Hash::Sha256),
    verification: &lc::ECDSA_P256_SHA256_ASN1,
}];

static P384: [Recipe; 1] = [Recipe {
    scheme: SignatureScheme::ECDSA_NISTP384_SHA384,
    mechanism: Mechanism::Ecdsa,
    input: Input::Digest(Hash::Sha384),
    verification: &lc::ECDSA_P384_SHA384_ASN1,
}];

static ED25519: [Recipe; 1] = [Recipe {
    scheme: SignatureScheme::ED25519,
    mechanism: Mechanism::Eddsa,
    input: Input::Message,
    verification: &lc::ED25519,
}];

/// PSS first: TLS 1.3 allows nothing else for RSA. SHA-256 first: every token has it.
static RSA: [Recipe; 6] = [
    pss(SignatureScheme::RSA_PSS_SHA256, PssHash::Sha256, Hash::Sha256, &lc::RSA_PSS_2048_8192_SHA256),
    pss(SignatureScheme::RSA_PSS_SHA384, PssHash::Sha384, Hash::Sha384, &lc::RSA_PSS_2048_8192_SHA384),
    pss(SignatureScheme::RSA_PSS_SHA512, PssHash::Sha512, Hash::Sha512, &lc::RSA_PSS_2048_8192_SHA512),
    pkcs1(SignatureScheme::RSA_PKCS1_SHA256, Hash::Sha256, &lc::RSA_PKCS1_2048_8192_SHA256),
    pkcs1(SignatureScheme::RSA_PKCS1_SHA384, Hash::Sha384, &lc::RSA_PKCS1_2048_8192_SHA384),
    pkcs1(SignatureScheme::RSA_PKCS1_SHA512, Hash::Sha512, &lc::RSA_PKCS1_2048_8192_SHA512),
];

const fn pss(
    scheme: SignatureScheme,
    pss_hash: PssHash,
    hash: Hash,
    verification: &'static dyn lc::VerificationAlgorithm,
) -> Recipe {
    Recipe { scheme, mechanism: Mechanism::RsaPkcsPss(pss_hash), input: Input::Digest(hash), verification }
}

const fn pkcs1(
    scheme: SignatureScheme,
    hash: Hash,
    verification: &'static dyn lc::VerificationAlgorithm,
) -> Recipe {
    Recipe { scheme, mechanism: Mechanism::RsaPkcs, input: Input::DigestInfo(hash), verification }
}

impl Hash {
    fn algorithm(self) -> &'static digest::Algorithm {
        match self {
            Hash::Sha256 => &digest::SHA256,
            Hash::Sha384 => &digest::SHA384,
            Hash::Sha512 => &digest::SHA512,
        }
    }

    fn prefix(self) -> &'static [u8; encode::DIGEST_INFO_PREFIX_BYTES] {
        match self {
            Hash::Sha256 => &encode::SHA256_PREFIX,
            Hash::Sha384 => &encode::SHA384_PREFIX,
            Hash::Sha512 => &encode::SHA512_PREFIX,
        }
    }
}

impl KeyAlgorithm {
    pub fn class(self) -> Class {
        match self {
            KeyAlgorithm::Rsa { .. } => Class::Rsa,
            _ => Class::Ec,
        }
    }
}

impl fmt::Display for KeyAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyAlgorithm::P256 => f.write_str("P-256"),
            KeyAlgorithm::P384 => f.write_str("P-384"),
            KeyAlgorithm::Rsa { bits } => write!(f, "RSA-{bits}"),
            KeyAlgorithm::Ed25519 => f.write_str("Ed25519"),
        }
    }
}

fn algorithm_of(spki: &[u8]) -> Result<KeyAlgorithm, PublicKeyError> {
    let malformed = || PublicKeyError("not a DER SubjectPublicKeyInfo".into());
    let (info, rest) = element(spki, SEQUENCE).ok_or_else(malformed)?;
    let (id, key) = element(info, SEQUENCE).ok_or_else(malformed)?;
    let (key, end) = element(key, BIT_STRING).ok_or_else(malformed)?;
    if !rest.is_empty() || !end.is_empty() {
        return Err(malformed());
    }
    if id == alg_id::ECDSA_P256.as_ref() {
        return Ok(KeyAlgorithm::P256);
    }
    if id == alg_id::ECDSA_P384.as_ref() {
        return Ok(KeyAlgorithm::P384);
    }
    if id == alg_id::ED25519.as_ref() {
        return Ok(KeyAlgorithm::Ed25519);
    }
    if id == alg_id::RSA_ENCRYPTION.as_ref() {
        return match rsa_bits(key).ok_or_else(malformed)? {
            bits @ 2048..=8192 => Ok(KeyAlgorithm::Rsa { bits }),
            bits => Err(PublicKeyError(format!("an RSA key of {bits} bits; expected 2048 to 8192"))),
        };
    }
    Err(PublicKeyError("its algorithm is none of P-256, P-384, RSA and Ed25519".into()))
}

const SEQUENCE: u8 = 0x30;
const BIT_STRING: u8 = 0x03;
const INTEGER: u8 = 0x02;

/// The size of the modulus in an RSAPublicKey (RFC 8017 A.1.1) inside a BIT STRING.
fn rsa_bits(bit_string: &[u8]) -> Option<u32> {
    let (unused_bits, key) = bit_string.split_first()?;
    let (key, _) = element(key, SEQUENCE)?;
    let (modulus, _) = element(key, INTEGER)?;
    let zeros = modulus.iter().take_while(|byte| **byte == 0).count();
    let modulus = &modulus[zeros..];
    let first = modulus.first()?;
    (*unused_bits == 0).then(|| modulus.len() as u32 * 8 - first.leading_zeros())
}

/// The content of one DER element and what follows it. Only a router for `ParsedPublicKey`, which checks the rest.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&[found, first], rest) = der.split_first_chunk()?;
    if found != tag {
        return None;
    }
    let length_bytes = match first {
        short @ 0..=0x7f => return rest.split_at_checked(usize::from(short)),
        0x81..=0x83 => usize::from(first - 0x80),
        _ => return None,
    };
    let (length, rest) = rest.split_at_checked(length_bytes)?;
    let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
    rest.split_at_checked(length)
}

fn exactly(signature: &[u8], expected_bytes: usize) -> Result<Vec<u8>, encode::WrongLength> {
    if signature.len() == expected_bytes {
        return Ok(signature.to_vec());
    }
    Err(encode::WrongLength { expected_bytes, found_bytes: signature.len() })
}

impl fmt::Display for PublicKeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PublicKeyError {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use aws_lc_rs::encoding::AsDer;
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::KeyPair;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_algorithm_and_the_bits_are_those_of_the_public_key() {
        let ec = lc::EcdsaKeyPair::generate(&lc::ECDSA_P384_SHA384_ASN1_SIGNING).unwrap();
        let ed = lc::Ed25519KeyPair::generate().unwrap();
        let rsa = lc::RsaKeyPair::generate(KeySize::Rsa3072).unwrap();
        let cases = [
            (ec.public_key().as_der().unwrap(), KeyAlgorithm::P384),
            (ed.public_key().as_der().unwrap(), KeyAlgorithm::Ed25519),
            (rsa.public_key().as_der().unwrap(), KeyAlgorithm::Rsa { bits: 3072 }),
        ];
        for (spki, algorithm) in cases {
            assert_eq!(PublicKey::from_spki(spki.as_ref()).unwrap().algorithm(), algorithm);
        }
    }

    #[test]
    fn an_rsa_key_needs_both_of_its_mechanisms_once() {
        let rsa = lc::RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let public = PublicKey::from_spki(rsa.public_key().as_der().unwrap().as_ref()).unwrap();
        let names: Vec<_> = public.mechanisms().map(Mechanism::name).collect();
        assert_eq!(names, ["CKM_RSA_PKCS_PSS", "CKM_RSA_PKCS"]);
    }

    proptest! {
        #[test]
        fn bytes_that_are_no_public_key_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(PublicKey::from_spki(&bytes).is_err());
        }

        #[test]
        fn a_damaged_public_key_never_panics(at in 0_usize..91, bit in 0_u8..8) {
            let ec = lc::EcdsaKeyPair::generate(&lc::ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
            let mut spki = ec.public_key().as_der().unwrap().as_ref().to_vec();
            spki[at] ^= 1 << bit;
            let _ = PublicKey::from_spki(&spki);
        }
    }
}
