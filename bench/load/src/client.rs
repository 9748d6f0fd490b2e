//! Owns one client connection, from connect to close, and what is expected of it. Knows no clock but the one it is given,
//! and no other connection. Never waits: `drive` goes as far as the socket lets it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mio::net::TcpStream;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::crypto::{
    CryptoProvider, SupportedKxGroup, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, NamedGroup,
    ProtocolVersion, SignatureScheme, SupportedProtocolVersion,
};

use crate::upstream::{ANSWER, QUESTION};

/// The name in every client's SNI.
const SERVER_NAME: &str = "localhost";
/// What every contender has; the OpenSSL of the others knows no post-quantum group.
const GROUPS: [&dyn SupportedKxGroup; 2] = [aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1];
/// A server that gives more tickets than this is asked for only the latest.
const TICKETS_MAX: usize = 4;

/// Why a connection did not count. The words are what the results call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    Connect,
    /// Closed or reset before the handshake was over.
    ClosedInHandshake,
    /// An alert, a wrong certificate, a wrong signature, a broken record.
    Tls,
    /// Closed or reset before the whole answer was there.
    ClosedBeforeAnswer,
    WrongAnswer,
    /// A full handshake where a resumed one was asked for, or the other way round.
    WrongKind,
    Deadline,
}

impl Failure {
    pub fn word(self) -> &'static str {
        match self {
            Failure::Connect => "connect",
            Failure::ClosedInHandshake => "closed_in_handshake",
            Failure::Tls => "tls",
            Failure::ClosedBeforeAnswer => "closed_before_answer",
            Failure::WrongAnswer => "wrong_answer",
            Failure::WrongKind => "wrong_kind",
            Failure::Deadline => "deadline",
        }
    }
}

/// How far a connection has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The socket has to become ready first.
    Waiting,
    /// Reported once, on the way.
    HandshakeDone,
    /// As expected, to the close.
    Ended,
}

/// What was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    pub version: ProtocolVersion,
    pub cipher_suite: CipherSuite,
    /// None when a TLS 1.2 session was resumed.
    pub group: Option<NamedGroup>,
    pub resumed: bool,
}

pub struct Client {
    pub stream: TcpStream,
    tls: ClientConnection,
    exchange: bool,
    handshake_done: bool,
    answer: Vec<u8>,
    tls_error: Option<rustls::Error>,
}

impl Client {
    pub fn connect(address: SocketAddr, config: Arc<ClientConfig>, exchange: bool) -> Result<Self, Failure> {
        let name = ServerName::try_from(SERVER_NAME).map_err(|_| Failure::Tls)?;
        let tls = ClientConnection::new(config, name).map_err(|_| Failure::Tls)?;
        let stream = TcpStream::connect(address).map_err(|_| Failure::Connect)?;
        let _ = stream.set_nodelay(true);
        Ok(Self { stream, tls, exchange, handshake_done: false, answer: Vec::new(), tls_error: None })
    }

    /// Goes on until the socket would block, the handshake is done, or all is over.
    pub fn drive(&mut self) -> Result<Progress, Failure> {
        loop {
            if !self.handshake_done && !self.tls.is_handshaking() {
                self.handshake_done = true;
                if self.exchange {
                    // In one packet with Finished, as browsers send it.
                    self.tls.writer().write_all(QUESTION).map_err(|_| Failure::Tls)?;
                }
                return Ok(Progress::HandshakeDone);
            }
            while self.tls.wants_write() {
                match self.tls.write_tls(&mut self.stream) {
                    Ok(_) => {}
                    Err(error) if would_wait(&error) => return Ok(Progress::Waiting),
                    Err(error) => return Err(self.broken(&error)),
                }
            }
            if self.handshake_done && !self.exchange {
                return Ok(Progress::Ended);
            }
            match self.tls.read_tls(&mut self.stream) {
                Ok(0) => return self.closed(),
                Ok(_) => self.process()?,
                Err(error) if would_wait(&error) => return Ok(Progress::Waiting),
                Err(error) => return Err(self.broken(&error)),
            }
        }
    }

    pub fn negotiated(&self) -> Option<Negotiated> {
        Some(Negotiated {
            version: self.tls.protocol_version()?,
            cipher_suite: self.tls.negotiated_cipher_suite()?.suite(),
            group: self.tls.negotiated_key_exchange_group().map(|group| group.name()),
            resumed: self.tls.handshake_kind() == Some(HandshakeKind::Resumed),
        })
    }

    /// What a failure of kind `Tls` was.
    pub fn tls_error(&self) -> Option<String> {
        self.tls_error.as_ref().map(ToString::to_string)
    }

    fn process(&mut self) -> Result<(), Failure> {
        if let Err(error) = self.tls.process_new_packets() {
            self.tls_error = Some(error);
            // So that the server logs what was wrong; it may be gone.
            let _ = self.tls.write_tls(&mut self.stream);
            return Err(Failure::Tls);
        }
        let mut piece = [0; 256];
        loop {
            match self.tls.reader().read(&mut piece) {
                // close_notify: it may have come in one piece with the answer.
                Ok(0) => break,
                Ok(read) => self.answer.extend_from_slice(&piece[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Err(Failure::ClosedBeforeAnswer),
            }
        }
        match ANSWER.starts_with(&self.answer) {
            true => Ok(()),
            false => Err(Failure::WrongAnswer),
        }
    }

    fn closed(&self) -> Result<Progress, Failure> {
        if !self.handshake_done {
            Err(Failure::ClosedInHandshake)
        } else if self.answer == ANSWER {
            Ok(Progress::Ended)
        } else {
            Err(Failure::ClosedBeforeAnswer)
        }
    }

    fn broken(&self, error: &io::Error) -> Failure {
        match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::AddrNotAvailable | ErrorKind::TimedOut => {
                Failure::Connect
            }
            _ if self.handshake_done => Failure::ClosedBeforeAnswer,
            _ => Failure::ClosedInHandshake,
        }
    }
}

fn would_wait(error: &io::Error) -> bool {
    // NotConnected: the connect is still going on.
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::NotConnected)
}

/// What is asked of every connection.
pub struct Expectations {
    pub version: &'static SupportedProtocolVersion,
    pub certificate: CertificateDer<'static>,
    pub resume: bool,
    pub verify_every: u64,
}

/// A configuration of its own for each client, so that each resumes its own TLS session.
pub fn config(expected: &Expectations, tickets: Arc<Tickets>) -> Result<Arc<ClientConfig>, rustls::Error> {
    let provider = Arc::new(CryptoProvider { kx_groups: GROUPS.to_vec(), ..aws_lc_rs::default_provider() });
    let verifier = Arc::new(Pinned {
        certificate: expected.certificate.clone(),
        verify_every: expected.verify_every,
        signatures: AtomicU64::new(0),
        provider: provider.clone(),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[expected.version])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.resumption = Resumption::store(tickets);
    Ok(Arc::new(config))
}

/// One client's TLS sessions; empty for ever when it must not resume.
#[derive(Debug)]
pub struct Tickets {
    keep: bool,
    given: AtomicU64,
    tls13: Mutex<VecDeque<Tls13ClientSessionValue>>,
    tls12: Mutex<Option<Tls12ClientSessionValue>>,
}

impl Tickets {
    pub fn new(keep: bool) -> Self {
        Self { keep, given: AtomicU64::new(0), tls13: Mutex::default(), tls12: Mutex::default() }
    }

    /// How many the server gave, kept or not.
    pub fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.given.fetch_add(1, Ordering::Relaxed);
        if self.keep {
            *self.tls12.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        }
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.tls12.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        *self.tls12.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.given.fetch_add(1, Ordering::Relaxed);
        if self.keep {
            let mut tickets = self.tls13.lock().unwrap_or_else(PoisonError::into_inner);
            tickets.truncate(TICKETS_MAX - 1);
            tickets.push_front(value);
        }
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.tls13.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// Takes exactly one certificate. Verifies the first signature and then a sample: enough to notice a server that signs
/// wrongly, and little enough that the load does not become the bottleneck.
#[derive(Debug)]
struct Pinned {
    certificate: CertificateDer<'static>,
    verify_every: u64,
    signatures: AtomicU64,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn is_sampled(&self) -> bool {
        self.signatures.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.verify_every)
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match *end_entity == self.certificate {
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
