//! Owns pins: keys of which one must be in a server's chain. Knows nothing of how the chain was verified.

use super::pkix::Chain;
use super::reason::Reason;
use super::x509::Certificate;

use aws_lc_rs::digest::{SHA256, digest};

/// SHA-256 of a SubjectPublicKeyInfo.
pub type Pin = [u8; 32];

/// The leaf's key or an issuer's, the trust anchor's among them, must be one of `pins`. Certificates that the server only sent
/// along do not count: anybody can send anybody's certificates. Without a verified chain only the leaf's key counts, which the
/// server proves to have.
///
/// # Errors
/// None of them is.
pub fn verify(pins: &[Pin], leaf: &Certificate<'_>, chain: Option<&Chain>) -> Result<(), Reason> {
    let issuers = chain.into_iter().flat_map(|chain| &chain.issuers).map(|issuer| &issuer.spki[..]);
    let pinned = |spki: &[u8]| pins.iter().any(|pin| digest(&SHA256, spki).as_ref() == pin);
    if pins.is_empty() || std::iter::once(leaf.spki).chain(issuers).any(pinned) {
        Ok(())
    } else {
        Err(Reason::PinMismatch)
    }
}
