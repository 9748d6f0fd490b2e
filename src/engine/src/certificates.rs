//! Owns the choice of a certificate for a ClientHello: by name (exact, then wildcard), then by what the client can verify.
//! Also owns the OCSP response that goes with a certificate, and the bridge from rustls' signing call to the suspended step.
//! Knows nothing of lanes. I/O thread only, but for `Certificate::staple`.

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::fiber::{SignatureWanted, suspend_for_signature};
use crate::signing::PrivateKey;
use crate::signing::public_key::KeyAlgorithm;

/// SHA-256 of the DER of the first certificate of a chain: what an OCSP response is about.
pub type LeafDigest = [u8; 32];

/// A chain, the names it is for, and the key in the token. One for all listeners: there may be ten thousand of them.
pub struct Certificate {
    names: Vec<String>,
    leaf: LeafDigest,
    /// What its key signs with, preferred first.
    schemes: Vec<SignatureScheme>,
    /// Replaced as a whole when the OCSP response changes. A handshake takes the one of its ClientHello and waits for no lock;
    /// those under way keep theirs.
    certified: ArcSwap<CertifiedKey>,
}

impl Certificate {
    /// `names`: DNS names, lower case; a wildcard is `*.` and the rest (RFC 9525 6.3: the whole left-most label).
    /// `sign_deadline`: how long a handshake waits for a signature by this key.
    pub fn new(
        names: Vec<String>,
        chain: Vec<CertificateDer<'static>>,
        key: Arc<PrivateKey>,
        sign_deadline: Duration,
    ) -> Self {
        let schemes = key.schemes().to_vec();
        Self::with_key(names, chain, schemes, Arc::new(TokenSigningKey { key, sign_deadline }))
    }

    fn with_key(
        names: Vec<String>,
        chain: Vec<CertificateDer<'static>>,
        schemes: Vec<SignatureScheme>,
        key: Arc<dyn SigningKey>,
    ) -> Self {
        let leaf = leaf_digest(chain.first().map_or(&[], |leaf| leaf));
        Self { names, leaf, schemes, certified: ArcSwap::from_pointee(CertifiedKey::new(chain, key)) }
    }

    pub fn schemes(&self) -> &[SignatureScheme] {
        &self.schemes
    }

    /// The same with nothing but these schemes of its own, preferred first. Its staples are set for themselves.
    pub fn limited_to(&self, schemes: Vec<SignatureScheme>) -> Self {
        let served = self.certified.load();
        let key = Arc::new(LimitedKey { key: served.key.clone(), schemes: schemes.clone() });
        let certified = CertifiedKey { key, ..CertifiedKey::clone(&served) };
        let certified = ArcSwap::from_pointee(certified);
        Self { names: self.names.clone(), leaf: self.leaf, schemes, certified }
    }

    pub fn leaf(&self) -> &LeafDigest {
        &self.leaf
    }

    /// What clients that ask for it get from the next ClientHello on; None: nothing. JavaScript thread.
    pub fn staple(&self, response: Option<Vec<u8>>) {
        let served = self.certified.load_full();
        if served.ocsp != response {
            self.certified.store(Arc::new(CertifiedKey { ocsp: response, ..CertifiedKey::clone(&served) }));
        }
    }
}

fn leaf_digest(leaf: &[u8]) -> LeafDigest {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest::digest(&digest::SHA256, leaf).as_ref());
    bytes
}

/// Shown to an upstream that asks who we are.
#[derive(Debug)]
pub struct OwnCertificate(Arc<CertifiedKey>);

impl Certificate {
    pub fn for_upstreams(&self) -> OwnCertificate {
        OwnCertificate(self.certified.load_full())
    }
}

impl ResolvesClientCert for OwnCertificate {
    /// Also when the server names other issuers: it may trust ours nevertheless, and says no if not.
    fn resolve(&self, _issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.key.choose_scheme(schemes).is_some().then(|| self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// What a client gets that asks for a name no certificate has, or for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownName {
    /// The certificates named first for the listener.
    Default,
    /// The alert unrecognized_name (RFC 6066 3). A client that sends no name at all still gets the default.
    Refuse,
}

/// The certificates of a listener.
pub struct Certificates {
    by_name: HashMap<String, Vec<Arc<Certificate>>>,
    default: Vec<Arc<Certificate>>,
    unknown_name: UnknownName,
}

/// What the certificate choice learnt from the ClientHello of the step that just ran.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HelloSeen {
    pub server_name: Option<String>,
    pub refused_name: bool,
    /// No certificate for that name can sign with what the client verifies.
    pub unverifiable: bool,
}

thread_local! {
    // rustls' unbuffered connection does not tell the server name, and the resolver is not told the connection. Steps run
    // one at a time on this thread and choose the certificate before they first suspend, so one slot serves all.
    static HELLO_SEEN: RefCell<Option<HelloSeen>> = const { RefCell::new(None) };
}

/// What the step that just ran has seen; None if it processed no ClientHello.
pub fn take_hello_seen() -> Option<HelloSeen> {
    HELLO_SEEN.take()
}

impl Certificates {
    pub fn new(certificates: &[Arc<Certificate>], unknown_name: UnknownName) -> Self {
        let mut by_name: HashMap<String, Vec<Arc<Certificate>>> = HashMap::new();
        let mut default = Vec::new();
        for certificate in certificates {
            for name in &certificate.names {
                by_name.entry(name.clone()).or_default().push(certificate.clone());
            }
            // The default is the first certificate and those of other key types for the very same names: an EC and RSA pair.
            if certificates.first().is_some_and(|first| same_names(first, certificate)) {
                default.push(certificate.clone());
            }
        }
        Self { by_name, default, unknown_name }
    }

    /// The certificates for exactly this name, then those for its wildcard.
    fn for_name(&self, name: &str) -> Vec<&Arc<Certificate>> {
        let exact = self.by_name.get(name);
        let wildcard = name.split_once('.').and_then(|(_, parent)| self.by_name.get(&format!("*.{parent}")));
        exact.into_iter().chain(wildcard).flatten().collect()
    }
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").field("names", &self.by_name.keys()).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let server_name = hello.server_name().map(str::to_ascii_lowercase);
        let mut candidates = server_name.as_deref().map_or_else(Vec::new, |name| self.for_name(name));
        let is_unknown = server_name.is_some() && candidates.is_empty();
        let refused_name = is_unknown && self.unknown_name == UnknownName::Refuse;
        if candidates.is_empty() {
            candidates = self.default.iter().collect();
        }
        // In the order of the configuration.
        let verifiable = candidates
            .iter()
            .map(|certificate| certificate.certified.load())
            .find(|certified| is_verifiable(certified, &hello))
            .map(|certified| Arc::clone(&certified));
        HELLO_SEEN.set(Some(HelloSeen { server_name, refused_name, unverifiable: verifiable.is_none() }));
        if refused_name {
            return None;
        }
        // When nothing fits, the first goes on and rustls says what is missing.
        verifiable.or_else(|| candidates.first().map(|certificate| certificate.certified.load_full()))
    }
}

fn same_names(one: &Certificate, other: &Certificate) -> bool {
    let sorted = |certificate: &Certificate| {
        let mut names = certificate.names.clone();
        names.sort_unstable();
        names
    };
    one.names.len() == other.names.len() && sorted(one) == sorted(other)
}

/// Whether the client accepts a signature by this key. rustls has already removed the schemes that go with none of the
/// client's cipher suites, so this holds for TLS 1.2 as well.
fn is_verifiable(certified: &CertifiedKey, hello: &ClientHello<'_>) -> bool {
    certified.key.choose_scheme(hello.signature_schemes()).is_some()
}

/// A key as rustls sees it.
struct TokenSigningKey {
    key: Arc<PrivateKey>,
    sign_deadline: Duration,
}

impl std::fmt::Debug for TokenSigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenSigningKey")
    }
}

impl SigningKey for TokenSigningKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = *self.key.schemes().iter().find(|scheme| offered.contains(scheme))?;
        Some(Box::new(TokenSigner { key: self.key.clone(), scheme, sign_deadline: self.sign_deadline }))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        match self.key.algorithm() {
            KeyAlgorithm::P256 | KeyAlgorithm::P384 => SignatureAlgorithm::ECDSA,
            KeyAlgorithm::Rsa { .. } => SignatureAlgorithm::RSA,
            KeyAlgorithm::Ed25519 => SignatureAlgorithm::ED25519,
        }
    }
}

/// A key that makes only some of the signatures that it could.
#[derive(Debug)]
struct LimitedKey {
    key: Arc<dyn SigningKey>,
    /// Preferred first.
    schemes: Vec<SignatureScheme>,
}

impl SigningKey for LimitedKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = *self.schemes.iter().find(|scheme| offered.contains(scheme))?;
        self.key.choose_scheme(&[scheme])
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.key.algorithm()
    }
}

struct TokenSigner {
    key: Arc<PrivateKey>,
    scheme: SignatureScheme,
    sign_deadline: Duration,
}

impl std::fmt::Debug for TokenSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenSigner").field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

impl Signer for TokenSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let wanted = SignatureWanted {
            key: self.key.clone(),
            scheme: self.scheme,
            message: message.to_vec(),
            deadline_in: self.sign_deadline,
        };
        suspend_for_signature(wanted).map_err(|_| Error::General("no signature from the token".into()))
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}
