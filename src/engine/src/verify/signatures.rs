//! Owns the signature with which a peer proves in the handshake to have its certificate's key: which schemes are accepted, and
//! whether it is right. Knows nothing of certificates' own signatures, which are the chain's (pkix.rs).

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::CertificateDer;
use rustls::{DigitallySignedStruct, Error, PeerMisbehaved, SignatureScheme};

#[derive(Debug, Clone)]
pub struct PeerSignatures {
    /// Also for the signatures of certificates.
    pub algorithms: WebPkiSupportedAlgorithms,
    accepted: Vec<SignatureScheme>,
}

impl PeerSignatures {
    /// Accepts those of `schemes` that can be verified; they are offered in this order.
    pub fn new(algorithms: WebPkiSupportedAlgorithms, schemes: &[SignatureScheme]) -> Self {
        let known = algorithms.supported_schemes();
        let accepted = schemes.iter().copied().filter(|scheme| known.contains(scheme)).collect();
        Self { algorithms, accepted }
    }

    pub fn accepted(&self) -> &[SignatureScheme] {
        &self.accepted
    }

    /// # Errors
    /// It is wrong, or of a scheme that was not offered, which rustls leaves to us.
    pub fn verify_tls12(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.demand_accepted(signature)?;
        verify_tls12_signature(message, leaf, signature, &self.algorithms)
    }

    /// # Errors
    /// As `verify_tls12`.
    pub fn verify_tls13(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.demand_accepted(signature)?;
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn demand_accepted(&self, signature: &DigitallySignedStruct) -> Result<(), Error> {
        if self.accepted.contains(&signature.scheme) {
            return Ok(());
        }
        Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
    }
}
