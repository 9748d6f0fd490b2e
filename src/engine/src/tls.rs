//! Owns one TLS connection's state and the bytes that rustls has not yet taken or given out. Knows nothing of sockets,
//! deadlines or tokens. I/O thread only. Built on rustls' unbuffered interface: an established connection that is idle
//! holds no buffer at all, and bulk data is read and written in the worker's shared scratch buffers (relay.rs).

use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, WriteTraffic};
use rustls::{Error, ServerConfig};
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
    /// The client sent close_notify: nothing more comes from it.
    ClientClosed,
}

pub struct Tls {
    state: Box<UnbufferedServerConnection>,
    /// Received and not processed: the beginning of a record or of a fragmented message. Invariant: rustls is always shown
    /// these bytes first, because its deframer remembers offsets into them.
    unprocessed: Vec<u8>,
    /// Produced by rustls itself (handshake messages, tickets, alerts, key updates), to be sent before anything else.
    to_client: Vec<u8>,
}

impl Tls {
    pub fn new(config: Arc<ServerConfig>) -> Result<Self, Error> {
        let state = Box::new(UnbufferedServerConnection::new(config)?);
        Ok(Self { state, unprocessed: Vec::new(), to_client: Vec::new() })
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
    /// The handshake failed; the alert that says so is in `take_to_client`.
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
    /// The client broke the protocol; the alert that says so is in `take_to_client`.
    pub fn process(&mut self, received: &mut [u8], plaintext: &mut Vec<u8>) -> Result<TlsPhase, Error> {
        let mut start = 0;
        let result = loop {
            let status = self.state.process_tls_records(&mut received[start..]);
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
                    append(&mut self.to_client, &mut data);
                    None
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done(); // it is in to_client, which the caller sends
                    None
                }
                Ok(ConnectionState::BlockedHandshake) => Some(Ok(TlsPhase::Handshaking)),
                Ok(ConnectionState::WriteTraffic(_)) => Some(Ok(TlsPhase::Established)),
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Some(Ok(TlsPhase::ClientClosed)),
                // Early data is never enabled (server config), so anything else is rustls' future, which must not pass silently.
                Ok(_) => Some(Err(Error::General("unexpected TLS connection state".into()))),
                Err(error) => Some(Err(error)),
            };
            start += discard;
            if let Some(ended) = ended {
                break ended;
            }
        };
        self.unprocessed.clear();
        self.unprocessed.extend_from_slice(&received[start..]);
        if result.is_err() {
            self.collect_alert();
        }
        result
    }

    /// rustls queues the alert for an error and hands it out on the next call.
    fn collect_alert(&mut self) {
        loop {
            match self.state.process_tls_records(&mut []).state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    append(&mut self.to_client, &mut data);
                }
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                _ => return,
            }
        }
    }

    /// Encrypts `plaintext` into `out`, which has room for `ciphertext_max` bytes; returns how many it used.
    /// What is in `take_to_client` afterwards goes out first.
    ///
    /// # Errors
    /// The connection cannot send (any more).
    pub fn encrypt(&mut self, plaintext: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        self.write_traffic(|traffic| traffic.encrypt(plaintext, out))
    }

    /// Says to the client that nothing more comes (RFC 8446 6.1); the record is at the end of `take_to_client`.
    ///
    /// # Errors
    /// The connection cannot send (any more).
    pub fn close_notify(&mut self) -> Result<(), Error> {
        let mut record = [0; RECORD_OVERHEAD_MAX];
        let record_bytes = self.write_traffic(|traffic| traffic.queue_close_notify(&mut record))?;
        self.to_client.extend_from_slice(&record[..record_bytes]);
        Ok(())
    }

    fn write_traffic(
        &mut self,
        write: impl FnOnce(&mut WriteTraffic<'_, ServerConnectionData>) -> Result<usize, EncryptError>,
    ) -> Result<usize, Error> {
        loop {
            match self.state.process_tls_records(&mut self.unprocessed).state {
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    return write(&mut traffic).map_err(|error| Error::General(error.to_string()));
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => append(&mut self.to_client, &mut data),
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                // rustls reports the client's close once before it lets us write on: half-close.
                Ok(ConnectionState::PeerClosed) => {}
                Ok(_) => return Err(Error::General("the connection cannot send".into())),
                Err(error) => return Err(error),
            }
        }
    }

    /// What must be sent to the client before anything else; empty afterwards.
    pub fn take_to_client(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.to_client)
    }

    /// Gives back what an idle connection does not need.
    pub fn release_buffers(&mut self) {
        self.unprocessed.shrink_to_fit();
    }

    pub fn is_resumed(&self) -> bool {
        self.state.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }

    pub fn protocol(&self) -> Option<rustls::ProtocolVersion> {
        self.state.protocol_version()
    }

    pub fn cipher_suite(&self) -> Option<rustls::SupportedCipherSuite> {
        self.state.negotiated_cipher_suite()
    }

    pub fn alpn(&self) -> Option<&[u8]> {
        self.state.alpn_protocol()
    }
}

/// The most bytes that `plaintext_len` bytes become.
pub fn ciphertext_max(plaintext_len: usize) -> usize {
    plaintext_len
        + plaintext_len.div_ceil(RECORD_PLAINTEXT_MAX).max(1) * RECORD_OVERHEAD_MAX
        + RECORD_OVERHEAD_MAX
}

/// Moves what rustls wants sent behind the end of `out`.
fn append(out: &mut Vec<u8>, data: &mut EncodeTlsData<'_, ServerConnectionData>) {
    // The first try tells the size and keeps the data for the second.
    let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) else { return };
    let before = out.len();
    out.resize(before + size.required_size, 0);
    let written = data.encode(&mut out[before..]).unwrap_or(0);
    out.truncate(before + written);
}
