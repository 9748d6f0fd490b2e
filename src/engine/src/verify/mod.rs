//! Owns the verification of an upstream server's certificate (a client's: client.rs): which checks there are, in which order,
//! and what a mode makes of their results. Knows nothing of connections, of files, or of how DNS is asked. Called by rustls in a handshake on the I/O
//! thread, where it waits for nobody; answers from DNS are set by the JavaScript thread.
//!
//! ```text
//!  certificate, intermediates, OCSP response
//!    -> PKIX (pkix.rs)            a way to one of the roots, name, dates, revocation
//!    -> DANE (dane.rs)            records of usage 2 and 3 stand in for PKIX, those of 0 and 1 come on top
//!    -> pins (pins.rs)            over the chain that PKIX or DANE has verified
//!    -> transparency (transparency.rs)   not where a record of usage 2 or 3 has decided: logs take public CAs' certificates
//! ```
//!
//! A check that is enforced and fails ends the handshake; one that is reported counts in `Findings`. The server's own signature
//! in the handshake is always verified: without that a certificate says nothing.

mod client;
mod dane;
mod der;
mod pins;
mod pkix;
mod reason;
mod sct;
mod signatures;
mod status;
#[cfg(test)]
mod tests;
mod transparency;
mod x509;

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, Error, SignatureScheme};

pub use client::{Client, ClientVerifier, ClientVerifyPlan, Clients};
pub use dane::{Answer, Standing, Tlsa};
pub use pins::Pin;
pub use pkix::{RevocationLists, Roots};
pub use reason::{Check, Findings, Reason};
pub use signatures::PeerSignatures;
pub use status::{Status, StatusAnswer, Subject};
pub use transparency::{Log, Policy};
pub use x509::Identity;

use pkix::{Chain, Peer, Presented};
use x509::Certificate;

/// What becomes of a check's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Off,
    Report,
    Enforce,
}

/// How the certificate of one server is verified. What servers have in common is shared.
#[derive(Debug, Clone)]
pub struct VerifyPlan {
    /// The server's name as the certificate must have it, whatever SNI says.
    pub name: ServerName<'static>,
    /// Of PKIX and pins; `Off` is as `Report`.
    pub pkix: Mode,
    pub roots: Arc<Roots>,
    pub lists: Arc<RevocationLists>,
    /// Empty: any key.
    pub pins: Arc<[Pin]>,
    pub dane: Mode,
    pub tlsa: Arc<Standing>,
    pub transparency: Mode,
    pub policy: Arc<Policy>,
    /// Of the whole upstream.
    pub findings: Arc<Findings>,
}

/// What rustls asks about a server's certificate.
#[derive(Debug)]
pub struct ServerVerifier {
    plan: VerifyPlan,
    signatures: PeerSignatures,
}

impl ServerVerifier {
    pub fn new(plan: VerifyPlan, signatures: PeerSignatures) -> Arc<Self> {
        Arc::new(Self { plan, signatures })
    }

    /// Every check in its order. What is only reported is counted on the way.
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<(), Reason> {
        let plan = &self.plan;
        let presented = Presented {
            leaf,
            // Nothing can be said about it, and its key cannot be used: no mode lets it pass.
            parsed: Certificate::parse(leaf).map_err(|_| Reason::Invalid)?,
            intermediates,
            peer: Peer::Server(&plan.name),
            now,
            algorithms: self.signatures.algorithms,
        };
        let pkix = pkix::verify(&presented, &plan.roots, &plan.lists);

        let dane = match plan.dane {
            Mode::Off => None,
            mode => self.settle(mode, dane::verify(&plan.tlsa.get(), &presented, &pkix, &plan.lists))?,
        };
        let (chain, is_alone) = match dane {
            Some(dane::Recognised::Alone(chain)) if plan.dane == Mode::Enforce => (Some(chain), true),
            _ => (self.settle(plan.pkix, pkix)?, false),
        };

        self.settle(plan.pkix, pins::verify(&plan.pins, &presented.parsed, chain.as_ref()))?;

        if plan.transparency != Mode::Off && !is_alone {
            let issuer = issuer_spki(&presented, chain.as_ref());
            let now_ms = now.as_secs().saturating_mul(1000);
            let verdict =
                transparency::verify(&plan.policy, &presented.parsed, issuer.as_deref(), ocsp, now_ms);
            self.settle(plan.transparency, verdict)?;
        }
        Ok(())
    }

    /// None: the check has failed and that was only reported.
    fn settle<T>(&self, mode: Mode, result: Result<T, Reason>) -> Result<Option<T>, Reason> {
        match (result, mode) {
            (Ok(value), _) => Ok(Some(value)),
            (Err(reason), Mode::Enforce) => Err(reason),
            (Err(reason), Mode::Report | Mode::Off) => {
                self.plan.findings.report(reason);
                Ok(None)
            }
        }
    }

    /// The signature with which the server proves to have the key is wrong.
    fn refuse_signature(&self, leaf: &CertificateDer<'_>, error: Error) -> Error {
        // A broken rule of TLS is not the certificate's fault.
        let Some(reason) = Reason::from_error(&error) else { return error };
        let is_weak = Certificate::parse(leaf).is_ok_and(|leaf| pkix::is_weak(leaf.spki));
        self.refuse(if is_weak { Reason::WeakKey } else { reason })
    }

    fn refuse(&self, reason: Reason) -> Error {
        self.plan.findings.refuse(reason);
        reason.into_error()
    }
}

/// Of the verified chain, or, where there is none, of a certificate that could be the issuer's: a wrong one verifies no SCT.
fn issuer_spki(presented: &Presented<'_>, chain: Option<&Chain>) -> Option<Vec<u8>> {
    if let Some(issuer) = chain.and_then(|chain| chain.issuers.first()) {
        return Some(issuer.spki.clone());
    }
    let sent = presented.intermediates.iter().filter_map(|der| Certificate::parse(der).ok());
    sent.filter(|certificate| certificate.subject == presented.parsed.issuer)
        .map(|certificate| certificate.spki.to_vec())
        .next()
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, ocsp_response, now).map_err(|reason| self.refuse(reason))?;
        self.plan.findings.accept();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signatures.verify_tls12(message, cert, dss).map_err(|error| self.refuse_signature(cert, error))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signatures.verify_tls13(message, cert, dss).map_err(|error| self.refuse_signature(cert, error))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signatures.accepted().to_vec()
    }
}
