//! Owns one TLS connection's state and the bytes that rustls has not yet taken or given out. Knows nothing of sockets,
//! deadlines or tokens. I/O thread only. Built on rustls' unbuffered interface: an established connection that is idle
//! holds no buffer at all, and bulk data is read and written in the worker's shared scratch buffers (relay.rs).

use rustls::client::UnbufferedClientConnection;
use rustls::crypto::SupportedKxGroup;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError};
use rustls::{ClientConfig, Error, ServerConfig};
use std::sync::Arc;

/// RFC 8446 5.1: the most plaintext in a record.
pub const RECORD_PLAINTEXT_MAX: usize = 16_384;
/// Room for a record's header, authentication tag, explicit nonce (TLS 1.2) and content type.
pub const RECORD_OVERHEAD_MAX: usize = 64;
/// Bytes that may wait for the rest of a message. rustls refuses handshake messages over 64 KiB; this is that, plus headers.
pub const UNPROCESSED_MAX: usize = 72 * 1024;

/// What the connection is after everything received so far was processed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsPhase {
    Handshaking,
    Established,
    /// The peer sent close_notify: nothing more comes from it.
    PeerClosed,
}

/// TLS with a client, as its server; or with an upstream, as its client.
pub struct Tls {
    state: Role,
    /// Received and not processed: the beginning of a record or of a fragmented message. Invariant: rustls is always shown
    /// these bytes first, because its deframer remembers offsets into them.
    unprocessed: Vec<u8>,
    /// Produced by rustls itself (handshake messages, tickets, alerts, key updates), to be sent before anything else.
    to_peer: Vec<u8>,
}

enum Role {
    Server(Box<UnbufferedServerConnection>),
    Client(Box<UnbufferedClientConnection>),
}

/// The same for either role: rustls' two connections have the same methods, and no trait that says so.
macro_rules! either {
    ($state:expr, $connection:ident => $body:expr) => {
        match $state {
            Role::Server($connection) => $body,
            Role::Client($connection) => $body,
        }
    };
}

macro_rules! write_traffic {
    ($tls:expr, $traffic:ident => $write:expr) => {
        either!(&mut $tls.state, connection => loop {
            match connection.process_tls_records(&mut $tls.unprocessed).state {
                Ok(ConnectionState::WriteTraffic(mut $traffic)) => {
                    break $write.map_err(|error: EncryptError| Error::General(error.to_string()));
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => append(&mut $tls.to_peer, &mut data),
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                // rustls reports the peer's close once before it lets us write on: half-close.
                Ok(ConnectionState::PeerClosed) => {}
                Ok(_) => break Err(Error::General("the connection cannot send".into())),
                Err(error) => break Err(error),
            }
        })
    };
}

impl Tls {
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self::new(Role::Server(Box::new(UnbufferedServerConnection::new(config)?))))
    }

    /// Its first words are there after an `advance` without bytes.
    pub fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, Error> {
        Ok(Self::new(Role::Client(Box::new(UnbufferedClientConnection::new(config, name)?))))
    }

    fn new(state: Role) -> Self {
        Self { state, unprocessed: Vec::new(), to_peer: Vec::new() }
    }

    /// Adds bytes read during the handshake.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.unprocessed.extend_from_slice(bytes);
    }

    pub fn unprocessed(&self) -> &[u8] {
        &self.unprocessed
    }

    /// Processes what was received so far. Application data that came along is appended to `plaintext`.
    ///
    /// # Errors
    /// The handshake failed; the alert that says so is in `take_to_peer`.
    pub fn advance(&mut self, plaintext: &mut Vec<u8>) -> Result<TlsPhase, Error> {
        let mut received = std::mem::take(&mut self.unprocessed);
        let result = self.process(&mut received, plaintext);
        if self.unprocessed.is_empty() && !received.is_empty() {
            received.clear(); // keeps the allocation while the handshake lasts
            self.unprocessed = received;
        }
        result
    }

    /// Processes `received`, which must begin with `unprocessed()`; keeps what is incomplete.
    ///
    /// # Errors
    /// The peer broke the protocol; the alert that says so is in `take_to_peer`.
    pub fn process(&mut self, received: &mut [u8], plaintext: &mut Vec<u8>) -> Result<TlsPhase, Error> {
        let mut start = 0;
        let result = either!(&mut self.state, connection => loop {
            let status = connection.process_tls_records(&mut received[start..]);
            let discard = status.discard;
            let ended = match status.state {
                Ok(ConnectionState::ReadTraffic(mut records)) => {
                    let mut failed = None;
                    while let Some(record) = records.next_record() {
                        match record {
                            Ok(record) => plaintext.extend_from_slice(record.payload),
                            Err(error) => failed = Some(Err(error)),
                        }
                    }
                    failed
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    append(&mut self.to_peer, &mut data);
                    None
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done(); // it is in to_peer, which the caller sends
                    None
                }
                Ok(ConnectionState::BlockedHandshake) => Some(Ok(TlsPhase::Handshaking)),
                Ok(ConnectionState::WriteTraffic(_)) => Some(Ok(TlsPhase::Established)),
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Some(Ok(TlsPhase::PeerClosed)),
                // Early data is never enabled (server config), so anything else is rustls' future, which must not pass silently.
                Ok(_) => Some(Err(Error::General("unexpected TLS connection state".into()))),
                Err(error) => Some(Err(error)),
            };
            start += discard;
            if let Some(ended) = ended {
                break ended;
            }
        });
        if result.is_err() {
            self.collect_alert(&mut received[start..]);
        }
        self.unprocessed.clear();
        self.unprocessed.extend_from_slice(&received[start..]);
        result
    }

    /// rustls queues the alert for an error and hands it out on the next call, which must show it what it has not taken yet:
    /// its deframer remembers offsets into that also after an error, and panics when they are not there.
    fn collect_alert(&mut self, mut rest: &mut [u8]) {
        either!(&mut self.state, connection => loop {
            let status = connection.process_tls_records(rest);
            let discard = status.discard;
            match status.state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => append(&mut self.to_peer, &mut data),
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                _ => return,
            }
            rest = &mut rest[discard..];
        })
    }

    /// Encrypts `plaintext` into `out`, which has room for `ciphertext_max` bytes; returns how many it used.
    /// What is in `take_to_peer` afterwards goes out first.
    ///
    /// # Errors
    /// The connection cannot send (any more).
    pub fn encrypt(&mut self, plaintext: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        write_traffic!(self, traffic => traffic.encrypt(plaintext, out))
    }

    /// Says to the peer that nothing more comes (RFC 8446 6.1): into `out`, which has room for `ciphertext_max(0)` bytes;
    /// returns how many it used. What is in `take_to_peer` afterwards goes out first.
    ///
    /// # Errors
    /// The connection cannot send (any more).
    pub fn close_notify(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        write_traffic!(self, traffic => traffic.queue_close_notify(out))
    }

    /// What must be sent to the peer before anything else; empty afterwards.
    pub fn take_to_peer(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.to_peer)
    }

    /// Gives back what an idle connection does not need.
    pub fn release_buffers(&mut self) {
        self.unprocessed.shrink_to_fit();
    }

    pub fn is_handshaking(&self) -> bool {
        either!(&self.state, connection => connection.is_handshaking())
    }

    pub fn is_resumed(&self) -> bool {
        either!(&self.state, connection => connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed))
    }

    pub fn cipher_suite(&self) -> Option<rustls::SupportedCipherSuite> {
        either!(&self.state, connection => connection.negotiated_cipher_suite())
    }

    /// None for a resumed TLS 1.2 session.
    pub fn group(&self) -> Option<&'static dyn SupportedKxGroup> {
        either!(&self.state, connection => connection.negotiated_key_exchange_group())
    }

    pub fn is_tls13(&self) -> bool {
        either!(&self.state, connection => connection.protocol_version() == Some(rustls::ProtocolVersion::TLSv1_3))
    }

    /// As OpenSSL and the PROXY protocol have it.
    pub fn protocol_name(&self) -> &'static str {
        if self.is_tls13() { "TLSv1.3" } else { "TLSv1.2" }
    }

    /// What the peer has shown in this connection, or, when the session is resumed, in an earlier one of it; leaf first.
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        either!(&self.state, connection => connection.peer_certificates())
    }

    pub fn alpn(&self) -> Option<&[u8]> {
        either!(&self.state, connection => connection.alpn_protocol())
    }
}

/// The most bytes that `plaintext_len` bytes become.
pub const fn ciphertext_max(plaintext_len: usize) -> usize {
    let records = plaintext_len.div_ceil(RECORD_PLAINTEXT_MAX);
    plaintext_len + (if records == 0 { 1 } else { records } + 1) * RECORD_OVERHEAD_MAX
}

/// Moves what rustls wants sent behind the end of `out`.
fn append<Data>(out: &mut Vec<u8>, data: &mut EncodeTlsData<'_, Data>) {
    // The first try tells the size and keeps the data for the second.
    let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) else { return };
    let before = out.len();
    out.resize(before + size.required_size, 0);
    let written = data.encode(&mut out[before..]).unwrap_or(0);
    out.truncate(before + written);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::policy::{Policy, PolicyWords};
    use crate::tickets::Ticketer;
    use proptest::prelude::*;
    use rustls::RootCertStore;
    use rustls::client::ClientConnection;
    use rustls::pki_types::PrivateKeyDer;
    use rustls::pki_types::pem::PemObject;
    use rustls::server::ResolvesServerCertUsingSni;
    use rustls::sign::CertifiedKey;
    use std::sync::OnceLock;
    use std::time::Duration;

    /// A software key and its certificate for "localhost": these tests are about records, not about signing.
    fn certified() -> &'static (CertificateDer<'static>, PrivateKeyDer<'static>) {
        static MADE: OnceLock<(CertificateDer<'static>, PrivateKeyDer<'static>)> = OnceLock::new();
        MADE.get_or_init(|| {
            let arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout - -days 2 \
                -subj /CN=localhost -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE";
            let output = std::process::Command::new("openssl")
                .args(arguments.split_whitespace())
                .output()
                .expect("openssl is installed");
            let certificate = CertificateDer::from_pem_slice(&output.stdout).expect("a certificate");
            (certificate, PrivateKeyDer::from_pem_slice(&output.stdout).expect("a key"))
        })
    }

    /// Both ends of a connection that has not begun.
    pub(crate) fn pair(version: &str, group: &str) -> (Tls, ClientConnection) {
        let (config, client) = configured(version, group);
        (Tls::server(config).expect("a server"), client)
    }

    /// A server's configuration, and a client that trusts it.
    pub(crate) fn configured(version: &str, group: &str) -> (Arc<ServerConfig>, ClientConnection) {
        let (certificate, key) = certified();
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let signing_key = provider.key_provider.load_private_key(key.clone_key()).expect("a usable key");
        let mut resolver = ResolvesServerCertUsingSni::new();
        let certified = CertifiedKey::new(vec![certificate.clone()], signing_key);
        resolver.add("localhost", certified).expect("the certificate is for localhost");
        let (versions, groups) = ([version.to_owned()], [group.to_owned()]);
        let words = PolicyWords { versions: &versions, groups: &groups, ..PolicyWords::default() };
        let policy = Policy {
            ticket_lifetime: Some(Duration::from_secs(60)),
            ..Policy::parse(&words).expect("known names")
        };
        let config = policy
            .server_config(Arc::new(resolver), &[], &Ticketer::new(Duration::from_secs(60)), None, None)
            .expect("a server configuration");
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).expect("a trust anchor");
        let client = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").expect("a name");
        let client = ClientConnection::new(Arc::new(client), name).expect("a client");
        (config, client)
    }

    /// Runs the handshake, handing the client's bytes over in pieces of `piece_bytes`.
    fn shake_hands(server: &mut Tls, client: &mut ClientConnection, piece_bytes: usize) {
        let mut plaintext = Vec::new();
        for _ in 0..8 {
            let mut from_client = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut from_client).expect("memory");
            }
            for piece in from_client.chunks(piece_bytes) {
                server.receive(piece);
                server.advance(&mut plaintext).expect("a good client");
            }
            give(client, &server.take_to_peer());
            if !client.is_handshaking() && !client.wants_write() {
                break;
            }
        }
        assert!(plaintext.is_empty());
        assert_eq!(server.unprocessed(), b"");
    }

    /// Hands the server's bytes to the client and returns what they say to the application.
    fn give(client: &mut ClientConnection, mut bytes: &[u8]) -> Vec<u8> {
        use std::io::Read;
        let mut plaintext = Vec::new();
        while !bytes.is_empty() {
            client.read_tls(&mut bytes).expect("memory");
            client.process_new_packets().expect("a good server");
            let _ = client.reader().read_to_end(&mut plaintext); // WouldBlock at the end
        }
        plaintext
    }

    fn client_sends(client: &mut ClientConnection, bytes: &[u8]) -> Vec<u8> {
        use std::io::Write;
        client.set_buffer_limit(None);
        client.writer().write_all(bytes).expect("memory");
        let mut records = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut records).expect("memory");
        }
        records
    }

    #[test]
    fn a_handshake_may_arrive_byte_by_byte() {
        for version in ["1.2", "1.3"] {
            let (mut server, mut client) = pair(version, "X25519");
            shake_hands(&mut server, &mut client, 1);
            assert!(!client.is_handshaking());
            assert!(!server.is_resumed());
        }
    }

    #[test]
    fn the_client_is_told_of_the_end_and_can_still_send() {
        for version in ["1.2", "1.3"] {
            let (mut server, mut client) = pair(version, "X25519");
            shake_hands(&mut server, &mut client, usize::MAX);
            let mut out = vec![0; ciphertext_max(0)];
            let written = server.close_notify(&mut out).expect("an established connection");
            give(&mut client, &out[..written]);
            assert!(client.process_new_packets().expect("no error").peer_has_closed());
            let mut records = client_sends(&mut client, b"last words");
            let mut plaintext = Vec::new();
            let phase = server.process(&mut records, &mut plaintext);
            assert!(phase.is_ok());
            assert_eq!(plaintext, b"last words");
        }
    }

    #[test]
    fn after_the_clients_close_notify_the_server_can_still_send() {
        for version in ["1.2", "1.3"] {
            let (mut server, mut client) = pair(version, "X25519");
            shake_hands(&mut server, &mut client, usize::MAX);
            client.send_close_notify();
            let mut records = client_sends(&mut client, b"");
            let phase = server.process(&mut records, &mut Vec::new());
            assert_eq!(phase, Ok(TlsPhase::PeerClosed));
            let mut out = vec![0; ciphertext_max(6)];
            let written = server.encrypt(b"answer", &mut out).expect("half-close");
            assert_eq!(give(&mut client, &out[..written]), b"answer");
        }
    }

    #[test]
    fn a_key_update_that_asks_for_one_is_answered_before_the_next_data() {
        let (mut server, mut client) = pair("1.3", "X25519");
        shake_hands(&mut server, &mut client, usize::MAX);
        client.refresh_traffic_keys().expect("TLS 1.3");
        let mut records = client_sends(&mut client, b"after the update");
        let mut plaintext = Vec::new();
        server.process(&mut records, &mut plaintext).expect("a key update");
        assert_eq!(plaintext, b"after the update");
        let mut out = vec![0; ciphertext_max(3)];
        let written = server.encrypt(b"yes", &mut out).expect("established");
        give(&mut client, &server.take_to_peer());
        assert_eq!(give(&mut client, &out[..written]), b"yes");
    }

    #[test]
    fn a_flipped_bit_ends_the_connection_with_an_alert() {
        let (mut server, mut client) = pair("1.3", "X25519");
        shake_hands(&mut server, &mut client, usize::MAX);
        let mut records = client_sends(&mut client, b"data");
        let last = records.len() - 1;
        records[last] ^= 1;
        assert!(server.process(&mut records, &mut Vec::new()).is_err());
        assert!(!server.take_to_peer().is_empty());
    }

    #[test]
    fn a_bad_message_with_more_behind_or_before_it_is_answered_with_an_alert() {
        let two_messages_in_one_record = [22, 3, 1, 0, 12, 1, 0, 0, 2, 9, 9, 1, 0, 0, 2, 9, 9];
        let part_of_a_message_then_a_bad_record = [22, 3, 1, 0, 6, 1, 0, 0, 200, 3, 3, 99, 3, 1, 0, 1, 0];
        for bytes in [two_messages_in_one_record, part_of_a_message_then_a_bad_record] {
            let (mut server, _) = pair("1.3", "X25519");
            server.receive(&bytes);
            assert!(server.advance(&mut Vec::new()).is_err());
            let alert = server.take_to_peer();
            assert_eq!((alert.first(), alert.len()), (Some(&21), 7), "{alert:?}");
        }
    }

    #[test]
    fn an_idle_connection_holds_no_buffer() {
        let (mut server, mut client) = pair("1.3", "X25519MLKEM768");
        shake_hands(&mut server, &mut client, 100);
        let mut records = client_sends(&mut client, &[7; 50_000]);
        server.process(&mut records, &mut Vec::new()).expect("data");
        server.release_buffers();
        assert_eq!(server.unprocessed.capacity(), 0);
        assert_eq!(server.to_peer.capacity(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn data_arrives_whole_however_it_is_cut(
            data in prop::collection::vec(any::<u8>(), 0..60_000),
            cuts in prop::collection::vec(1..20_000_usize, 1..20),
            version in prop::sample::select(vec!["1.2", "1.3"]),
        ) {
            let (mut server, mut client) = pair(version, "X25519");
            shake_hands(&mut server, &mut client, usize::MAX);
            let records = client_sends(&mut client, &data);
            let mut arrived = Vec::new();
            let mut rest = &records[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, later) = rest.split_at((*cut).min(rest.len()));
                let mut received = [server.unprocessed(), piece].concat();
                server.process(&mut received, &mut arrived).expect("good records");
                rest = later;
            }
            prop_assert_eq!(&arrived, &data);

            let mut out = vec![0; ciphertext_max(data.len())];
            let written = server.encrypt(&data, &mut out).expect("established");
            prop_assert_eq!(give(&mut client, &out[..written]), data);
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_never_establish(bytes in prop::collection::vec(any::<u8>(), 1..400)) {
            let (mut server, _) = pair("1.3", "X25519");
            server.receive(&bytes);
            prop_assert_ne!(server.advance(&mut Vec::new()), Ok(TlsPhase::Established));
        }
    }
}
