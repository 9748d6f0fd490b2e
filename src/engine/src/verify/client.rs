//! Owns the verification of a client's certificate, and who is let in. Knows nothing of connections, files or routes. Called on
//! the I/O thread, where it waits for nobody.
//!
//! A resumed session shows no certificate: what the ticket remembers of it is verified anew (`identify`), because meanwhile it
//! may have expired, or its revocation list may be out of date. Tickets of other roots, lists or names do not open at all
//! (`digest`, which is part of what a ticket is good for): the client then shows its certificate in a full handshake.

use std::collections::HashSet;
use std::sync::Arc;

use aws_lc_rs::digest::{Context, SHA256};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::pins::Pin;
use super::pkix::{self, Peer, Presented, RevocationLists, Roots};
use super::reason::Reason;
use super::signatures::PeerSignatures;
use super::status::Subject;
use super::x509::{Certificate, Identity};

/// Clients by what their certificates call them. One match is enough.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Clients {
    pub common_names: HashSet<String>,
    /// Lower case; `*.` stands for one label.
    pub dns_names: HashSet<String>,
    /// Whole, or with `/*` at the end for whatever is below.
    pub uris: Vec<String>,
    pub emails: HashSet<String>,
    pub spki: HashSet<Pin>,
}

impl Clients {
    /// Whether nobody is named.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub fn include(&self, client: &Identity) -> bool {
        client.common_name.as_ref().is_some_and(|name| self.common_names.contains(name))
            || client.dns_names.iter().any(|name| self.includes_dns_name(name))
            || client.uris.iter().any(|uri| self.uris.iter().any(|own| is_at_or_below(own, uri)))
            || client.emails.iter().any(|email| self.emails.contains(email))
            || self.spki.contains(&client.spki)
    }

    fn includes_dns_name(&self, name: &str) -> bool {
        // A certificate for a wildcard names no client.
        !name.starts_with("*.")
            && (self.dns_names.contains(name)
                || name
                    .split_once('.')
                    .is_some_and(|(_, parent)| self.dns_names.contains(&format!("*.{parent}"))))
    }
}

/// Byte by byte: two spellings of a URI that mean the same are two clients.
fn is_at_or_below(own: &str, uri: &str) -> bool {
    match own.strip_suffix('*') {
        // Dots would lead elsewhere, were the URI ever resolved, and escapes can be dots and slashes.
        Some(parent) if parent.ends_with('/') => uri.strip_prefix(parent).is_some_and(|below| {
            !below.is_empty()
                && !below.contains('%')
                && below.split('/').all(|part| !matches!(part, "" | "." | ".."))
        }),
        _ => own == uri,
    }
}

pub struct ClientVerifyPlan {
    /// False: those without a certificate are served too.
    pub is_required: bool,
    pub roots: Roots,
    pub lists: RevocationLists,
    /// Nobody named: everybody whom a root vouches for.
    pub allowed: Clients,
    /// What roots and lists were read from.
    pub files: Vec<Vec<u8>>,
    /// Whether somebody will be asked about the certificates' status.
    pub asks_status: bool,
}

/// A client that was let in by its certificate.
pub struct Client {
    pub identity: Identity,
    /// What a responder can be asked about; with `asks_status`.
    pub subject: Option<Subject>,
}

/// What rustls asks about a client's certificate.
pub struct ClientVerifier {
    is_required: bool,
    roots: Roots,
    lists: RevocationLists,
    allowed: Clients,
    asks_status: bool,
    digest: [u8; 32],
    hints: Vec<DistinguishedName>,
    signatures: PeerSignatures,
}

impl ClientVerifier {
    pub fn new(plan: ClientVerifyPlan, signatures: PeerSignatures) -> Arc<Self> {
        let ClientVerifyPlan { is_required, roots, lists, allowed, files, asks_status } = plan;
        let digest = digest_of(is_required, &files, &allowed);
        let hints = roots.subjects().map(DistinguishedName::in_sequence).collect();
        Arc::new(Self { is_required, roots, lists, allowed, asks_status, digest, hints, signatures })
    }

    /// Two verifiers that let in the same clients have the same.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Who the client of a finished handshake is. None: it has shown no certificate, and need not.
    ///
    /// # Errors
    /// As the handshake would have ended, had the client shown its certificate now.
    pub fn identify(
        &self,
        shown: Option<&[CertificateDer<'static>]>,
        is_resumed: bool,
        now: UnixTime,
    ) -> Result<Option<Client>, Error> {
        let Some((leaf, intermediates)) = shown.and_then(<[_]>::split_first) else {
            return if self.is_required { Err(Error::NoCertificatesPresented) } else { Ok(None) };
        };
        if is_resumed || self.asks_status {
            return self.verify(leaf, intermediates, now).map(Some);
        }
        identity_of(leaf).map(|identity| Some(Client { identity, subject: None }))
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Client, Error> {
        let parsed = Certificate::parse(leaf).map_err(|_| Reason::Invalid.into_error())?;
        let presented = Presented {
            leaf,
            parsed,
            intermediates,
            peer: Peer::Client,
            now,
            algorithms: self.signatures.algorithms,
        };
        let chain = pkix::verify(&presented, &self.roots, &self.lists).map_err(Reason::into_error)?;
        let identity = parsed.identity().map_err(|_| Reason::Invalid.into_error())?;
        if !self.allowed.is_empty() && !self.allowed.include(&identity) {
            // The alert is access_denied.
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        let issuer = chain.issuers.first().and_then(|issuer| issuer.certificate.as_ref());
        let subject = match issuer {
            Some(issuer) if self.asks_status => Subject::new(leaf, issuer).ok(),
            _ => None,
        };
        Ok(Client { identity, subject })
    }
}

fn identity_of(leaf: &CertificateDer<'_>) -> Result<Identity, Error> {
    Certificate::parse(leaf).and_then(|leaf| leaf.identity()).map_err(|_| Reason::Invalid.into_error())
}

fn digest_of(is_required: bool, files: &[Vec<u8>], allowed: &Clients) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    let mut add = |part: &[u8]| {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    };
    add(&[is_required.into()]);
    files.iter().for_each(|file| add(file));
    // Sets have no order; between kinds stands what no name is.
    for names in [&allowed.common_names, &allowed.dns_names, &allowed.emails] {
        let mut names: Vec<_> = names.iter().collect();
        names.sort_unstable();
        names.into_iter().for_each(|name| add(name.as_bytes()));
        add(b"");
    }
    allowed.uris.iter().for_each(|uri| add(uri.as_bytes()));
    add(b"");
    let mut keys: Vec<_> = allowed.spki.iter().collect();
    keys.sort_unstable();
    keys.into_iter().for_each(|key| add(key));
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

impl std::fmt::Debug for ClientVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientVerifier").field("roots", &self.roots.len()).finish_non_exhaustive()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.is_required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now).map(|_| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signatures.verify_tls12(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signatures.verify_tls13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signatures.accepted().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            common_name: Some("Billing".into()),
            dns_names: vec!["a.clients.test".into()],
            uris: vec!["spiffe://example.org/ns/prod/sa/billing".into()],
            emails: vec!["billing@example.org".into()],
            spki: [7; 32],
            fingerprint: [8; 32],
        }
    }

    fn set(names: &[&str]) -> HashSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn one_match_of_any_kind_lets_a_client_in() {
        for clients in [
            Clients { common_names: set(&["Billing"]), ..Clients::default() },
            Clients { dns_names: set(&["a.clients.test"]), ..Clients::default() },
            Clients { dns_names: set(&["*.clients.test"]), ..Clients::default() },
            Clients { uris: vec!["spiffe://example.org/ns/prod/*".into()], ..Clients::default() },
            Clients { emails: set(&["billing@example.org"]), ..Clients::default() },
            Clients { spki: [[7; 32]].into(), ..Clients::default() },
            Clients { common_names: set(&["Nobody"]), spki: [[7; 32]].into(), ..Clients::default() },
        ] {
            assert!(clients.include(&identity()), "{clients:?}");
        }
    }

    #[test]
    fn what_is_only_alike_does_not() {
        for clients in [
            Clients::default(),
            Clients { common_names: set(&["billing", "a.clients.test"]), ..Clients::default() },
            Clients { dns_names: set(&["clients.test", "*.test", "Billing"]), ..Clients::default() },
            Clients { uris: vec!["spiffe://example.org/ns/prod/sa".into()], ..Clients::default() },
            Clients { uris: vec!["spiffe://example.org/ns/prod/sa/bill*".into()], ..Clients::default() },
            Clients { uris: vec!["spiffe://example.org/ns/prod/sa/billing/*".into()], ..Clients::default() },
            Clients { emails: set(&["example.org"]), ..Clients::default() },
            Clients { spki: [[8; 32]].into(), ..Clients::default() },
        ] {
            assert!(!clients.include(&identity()), "{clients:?}");
        }
    }

    #[test]
    fn a_way_out_of_the_named_tree_is_not_below_it() {
        for uri in [
            "spiffe://x/a/",
            "spiffe://x/a/../b",
            "spiffe://x/a/%2e%2e/b",
            "spiffe://x/a//b",
            "spiffe://x/a",
            "spiffe://x/ab/c",
        ] {
            assert!(!is_at_or_below("spiffe://x/a/*", uri), "{uri}");
        }
        assert!(is_at_or_below("spiffe://x/a/*", "spiffe://x/a/b/c"));
    }

    #[test]
    fn a_certificate_for_a_wildcard_is_nobodys_name() {
        let clients = Clients { dns_names: set(&["*.clients.test"]), ..Clients::default() };
        assert!(
            !clients.include(&Identity { dns_names: vec!["*.clients.test".into()], ..Identity::default() })
        );
    }
}
