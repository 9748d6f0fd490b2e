//! Owns the border of our certificates: with which keys they come, and what is stapled to them. Must not know listeners and
//! upstreams, which call them by name. JavaScript thread only.

use std::collections::HashMap;

use napi::Result;
use napi::bindgen_prelude::Buffer;
use napi_derive::napi;
use rustls::pki_types::CertificateDer;

use super::invalid;
use super::token::{KeyPlace, key_place, load_fault};
use crate::certificates::{Certificate, LeafDigest};
use crate::generation::{Generation, Staples};

#[napi(object)]
pub struct CertificateSettings {
    pub name: String,
    /// DNS names in lower case, wildcards as `*.example.org`.
    pub names: Vec<String>,
    /// DER, leaf first.
    pub chain: Vec<Buffer>,
    /// The leaf's SubjectPublicKeyInfo, DER (RFC 5280 4.1).
    pub public_key: Buffer,
    pub keys: Vec<KeyPlace>,
}

/// What clients that ask for the status of a certificate get (RFC 6066 8).
#[napi(object)]
pub struct Staple {
    /// SHA-256 of the first certificate of the chain, DER.
    pub leaf: Buffer,
    /// An OCSP response, DER, as the responder sent it; undefined: none.
    pub response: Option<Buffer>,
}

pub(super) fn load_certificates(
    next: &mut Generation,
    certificates: Vec<CertificateSettings>,
    staples: &Staples,
) -> Result<()> {
    for CertificateSettings { name, names, chain, public_key, keys } in certificates {
        let places = keys.into_iter().map(key_place).collect();
        let chain = chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let make = |key, sign_deadline| Certificate::new(names, chain, key, sign_deadline);
        next.load(name, &public_key, places, staples, make).map_err(load_fault)?;
    }
    next.loaded();
    Ok(())
}

pub(super) fn keep_staples(kept: &mut Staples, changes: &HashMap<LeafDigest, Option<Vec<u8>>>) {
    for (leaf, response) in changes {
        match response {
            Some(response) => kept.insert(*leaf, response.clone()),
            None => kept.remove(leaf),
        };
    }
}

pub(super) fn staple_changes(staples: Vec<Staple>) -> Result<HashMap<LeafDigest, Option<Vec<u8>>>> {
    staples
        .into_iter()
        .map(|Staple { leaf, response }| {
            let leaf = LeafDigest::try_from(leaf.as_ref()).map_err(|_| {
                invalid(format!("staple: expected a digest of 32 bytes, found {}", leaf.len()))
            })?;
            Ok((leaf, response.map(|response| response.to_vec())))
        })
        .collect()
}
