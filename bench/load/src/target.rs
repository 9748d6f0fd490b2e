//! Owns who is connected to, what a handshake offers, and what it must find. Knows no socket.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::{
    CryptoProvider, SupportedKxGroup, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, NamedGroup, SignatureScheme,
    SupportedProtocolVersion,
};

use crate::connection::Negotiated;
use crate::failure::Failure;
use crate::flags::Flags;
use crate::tickets::Tickets;

const GROUPS: [(&str, &dyn SupportedKxGroup); 4] = [
    ("X25519", aws_lc_rs::kx_group::X25519),
    ("X25519MLKEM768", aws_lc_rs::kx_group::X25519MLKEM768),
    ("secp256r1", aws_lc_rs::kx_group::SECP256R1),
    ("secp384r1", aws_lc_rs::kx_group::SECP384R1),
];
const NAMES_MAX: u64 = 100_000;

pub struct Target {
    pub addresses: Vec<SocketAddr>,
    /// In every client's SNI, in turn.
    pub names: Vec<ServerName<'static>>,
    pub version: &'static SupportedProtocolVersion,
    /// Another one is a failure.
    group: NamedGroup,
    /// Without any progress for so long, a connection has failed.
    pub deadline: Duration,
    provider: Arc<CryptoProvider>,
    verifier: Arc<Verifier>,
}

impl Target {
    pub fn from_flags(flags: &mut Flags) -> Result<Self, String> {
        let addresses = flags.loopback("to", None)?;
        let file = flags.text("certificate")?;
        let complain = |error: &dyn std::fmt::Display| format!("--certificate {file}: {error}");
        let certificate = CertificateDer::from_pem_file(&file).map_err(|error| complain(&error))?;
        let key = public_key(&certificate).map_err(|error| complain(&error))?;
        let version = flags.choice("tls", &[("1.3", &TLS13), ("1.2", &TLS12)])?;
        let group = flags.choice("group", &GROUPS)?;
        if !group.usable_for_version(version.version) {
            return Err(format!("--group {:?}: is not for {:?}", group.name(), version.version));
        }
        let names = names(&flags.text("server-name").unwrap_or("localhost".to_owned()))?;
        let provider =
            Arc::new(CryptoProvider { kx_groups: offered(group, version), ..aws_lc_rs::default_provider() });
        let verifier = Arc::new(Verifier {
            expected: match names.len() {
                1 => Expected::Certificate(certificate),
                _ => Expected::KeyAndName(key),
            },
            verify_every: flags.number("verify-every", 32, 1..=u64::from(u32::MAX))?,
            signatures: AtomicU64::new(0),
            provider: provider.clone(),
        });
        let deadline = Duration::from_secs_f64(flags.number("deadline-seconds", 10.0, 0.1..=600.0)?);
        Ok(Self { addresses, names, version, group: group.name(), deadline, provider, verifier })
    }

    /// Makes a ClientHello for nobody. The first of a process seeds aws-lc's random generator, which takes tens of milliseconds of
    /// CPU, and far longer where others want the core too: in a short round that would be most of what is measured.
    pub fn warm_up(&self) -> io::Result<()> {
        let config = self.config(Arc::new(Tickets::new(false))).map_err(io::Error::other)?;
        ClientConnection::new(config, self.name(0).clone()).map_err(io::Error::other)?;
        Ok(())
    }

    /// Who shares a configuration shares its TLS sessions.
    pub fn config(&self, tickets: Arc<Tickets>) -> Result<Arc<ClientConfig>, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[self.version])?
            .dangerous()
            .with_custom_certificate_verifier(self.verifier.clone())
            .with_no_client_auth();
        config.resumption = Resumption::store(tickets);
        Ok(Arc::new(config))
    }

    /// Why this is not the handshake that was asked for.
    pub fn refuses(&self, negotiated: &Negotiated, kind: HandshakeKind) -> Option<Failure> {
        match negotiated {
            _ if negotiated.kind != kind => Some(Failure::WrongKind),
            _ if negotiated.group.is_some_and(|group| group != self.group) => Some(Failure::WrongGroup),
            _ => None,
        }
    }

    /// Connections are spread over addresses and names in turn.
    pub fn address(&self, turn: u64) -> SocketAddr {
        self.addresses[(turn % self.addresses.len() as u64) as usize]
    }

    pub fn name(&self, turn: u64) -> &ServerName<'static> {
        &self.names[(turn % self.names.len() as u64) as usize]
    }
}

/// In TLS 1.2 the same list also says which certificates a client takes: without the curve of its certificate a server has no
/// cipher suite (RFC 8422 5.1).
fn offered(
    group: &'static dyn SupportedKxGroup,
    version: &SupportedProtocolVersion,
) -> Vec<&'static dyn SupportedKxGroup> {
    let curves: [&dyn SupportedKxGroup; 2] = [aws_lc_rs::kx_group::SECP256R1, aws_lc_rs::kx_group::SECP384R1];
    let others = curves.into_iter().filter(|curve| version == &TLS12 && curve.name() != group.name());
    [group].into_iter().chain(others).collect()
}

/// `a.test,host{0..2}.test` is a.test, host0.test, host1.test, host2.test: ten thousand names do not fit into an argument.
fn names(list: &str) -> Result<Vec<ServerName<'static>>, String> {
    let mut names = Vec::new();
    for entry in list.split(',') {
        for name in
            expand(entry).ok_or(format!("--server-name {entry}: expected NAME or NAME{{FIRST..LAST}}NAME"))?
        {
            let parsed = ServerName::try_from(name.clone());
            names.push(parsed.map_err(|error| format!("--server-name {name}: {error}"))?);
        }
    }
    Ok(names)
}

fn expand(entry: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = entry.split_once('{') else { return Some(vec![entry.to_owned()]) };
    let (range, after) = rest.split_once('}')?;
    let (first, last) = range.split_once("..")?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let in_bounds = first <= last && last - first < NAMES_MAX;
    in_bounds.then(|| (first..=last).map(|number| format!("{before}{number}{after}")).collect())
}

fn public_key(certificate: &CertificateDer<'_>) -> Result<SubjectPublicKeyInfoDer<'static>, rustls::Error> {
    Ok(ParsedCertificate::try_from(certificate)?.subject_public_key_info())
}

/// Verifies the first signature and then a sample: enough to notice a server that signs wrongly, and little enough that
/// the load does not become the bottleneck.
#[derive(Debug)]
struct Verifier {
    expected: Expected,
    verify_every: u64,
    signatures: AtomicU64,
    provider: Arc<CryptoProvider>,
}

#[derive(Debug)]
enum Expected {
    /// Exactly this one, whatever is in it.
    Certificate(CertificateDer<'static>),
    /// Many certificates that share a private key: the name tells that the server chose the right one.
    KeyAndName(SubjectPublicKeyInfoDer<'static>),
}

impl Verifier {
    fn is_sampled(&self) -> bool {
        self.signatures.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.verify_every)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let as_expected = match &self.expected {
            Expected::Certificate(certificate) => end_entity == certificate,
            Expected::KeyAndName(key) => {
                let found = ParsedCertificate::try_from(end_entity)?;
                verify_server_name(&found, name)?;
                found.subject_public_key_info() == *key
            }
        };
        match as_expected {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(rustls::Error::General("another certificate than the expected one".into())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if !self.is_sampled() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if !self.is_sampled() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_in_a_server_name_stands_for_all_of_it() {
        let found = names("a.test,host{8..11}.test").expect("valid");
        let found: Vec<_> = found.iter().map(|name| name.to_str()).collect();
        assert_eq!(found, ["a.test", "host8.test", "host9.test", "host10.test", "host11.test"]);
        assert_eq!(names("host{0..9999}.test").map(|names| names.len()), Ok(10_000));
        for wrong in ["", "a.test,", "a{1..}", "a{2..1}", "a{1..2", "a{0..100000}", "a{x..y}"] {
            assert!(names(wrong).is_err(), "{wrong}");
        }
    }
}
