//! Owns one TLS connection: its socket, and bytes in both directions. Knows not what they mean. Never waits: whatever it cannot
//! do at once is done when the socket is ready again, which epoll tells once (edge-triggered).

use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

use mio::net::TcpStream;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustls::pki_types::ServerName;
use rustls::{CipherSuite, ClientConfig, ClientConnection, HandshakeKind, NamedGroup, ProtocolVersion};
use serde::Serialize;

use crate::failure::{Failure, Fault};

/// What one read takes from a socket. All connections share one such buffer.
pub const SCRATCH_BYTES: usize = 256 * 1024;

/// What reading once has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// Nothing; epoll will tell.
    Dry,
    /// Something, and there may be more.
    More,
    /// The server closed, by close_notify or without it.
    Closed,
}

/// What was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(into = "NegotiatedWords")]
pub struct Negotiated {
    pub version: ProtocolVersion,
    pub cipher_suite: CipherSuite,
    /// None when a TLS 1.2 session was resumed.
    pub group: Option<NamedGroup>,
    pub kind: HandshakeKind,
}

/// As it is printed, in rustls' words.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NegotiatedWords {
    protocol: String,
    cipher_suite: String,
    group: Option<String>,
    resumed: bool,
}

impl From<Negotiated> for NegotiatedWords {
    fn from(negotiated: Negotiated) -> Self {
        Self {
            protocol: format!("{:?}", negotiated.version),
            cipher_suite: format!("{:?}", negotiated.cipher_suite),
            group: negotiated.group.map(|group| format!("{group:?}")),
            resumed: negotiated.kind == HandshakeKind::Resumed,
        }
    }
}

pub struct Connection {
    pub stream: TcpStream,
    tls: ClientConnection,
}

impl Connection {
    /// `source` is for more connections than one address has ports.
    pub fn connect(
        address: SocketAddr,
        source: Option<Ipv4Addr>,
        config: Arc<ClientConfig>,
        name: &ServerName<'static>,
    ) -> Result<Self, Fault> {
        let mut tls = ClientConnection::new(config, name.clone()).map_err(tls_fault)?;
        // Nothing is handed to TLS before the last has gone out (`flush`): that is the bound.
        tls.set_buffer_limit(None);
        let stream = match (source, address) {
            (Some(source), SocketAddr::V4(address)) => connect_from(source, address),
            _ => TcpStream::connect(address),
        };
        let stream = stream.map_err(|_| Failure::Connect)?;
        let _ = stream.set_nodelay(true);
        Ok(Self { stream, tls })
    }

    pub fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// None before the end of the handshake.
    pub fn negotiated(&self) -> Option<Negotiated> {
        Some(Negotiated {
            version: self.tls.protocol_version()?,
            cipher_suite: self.tls.negotiated_cipher_suite()?.suite(),
            group: self.tls.negotiated_key_exchange_group().map(|group| group.name()),
            kind: self.tls.handshake_kind()?,
        })
    }

    /// Whatever comes is read and must be nothing but TLS' own, such as session tickets. True when the handshake is over.
    pub fn settle(&mut self, scratch: &mut [u8]) -> Result<bool, Fault> {
        self.take_all(scratch, |_| Err(Failure::WrongAnswer))?;
        Ok(self.flush()? && !self.is_handshaking())
    }

    /// Reads until the socket is dry. A close is a failure.
    pub fn take_all(
        &mut self,
        scratch: &mut [u8],
        mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Fault> {
        loop {
            self.flush()?;
            match self.receive(scratch, &mut take)? {
                Flow::Dry => return Ok(()),
                Flow::More => {}
                Flow::Closed => return Err(self.closed().into()),
            }
        }
    }

    /// Hands plaintext to TLS. It goes out with `flush`.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        Ok(self.tls.writer().write_all(bytes).map_err(|_| Failure::Tls)?)
    }

    /// False when the socket has no room for all of it.
    pub fn flush(&mut self) -> Result<bool, Fault> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.stream) {
                Ok(_) => {}
                Err(error) if would_wait(&error) => return Ok(false),
                Err(error) => return Err(self.broken(&error).into()),
            }
        }
        Ok(true)
    }

    /// Reads once. What TLS wants to send because of it goes out with `flush`.
    pub fn receive(
        &mut self,
        scratch: &mut [u8],
        mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<Flow, Fault> {
        let mut rest = match self.stream.read(scratch) {
            Ok(0) => return Ok(Flow::Closed),
            Ok(read) => &scratch[..read],
            Err(error) if would_wait(&error) => return Ok(Flow::Dry),
            Err(error) => return Err(self.broken(&error).into()),
        };
        while !rest.is_empty() {
            // Zero after close_notify: whatever follows is nothing.
            if self.tls.read_tls(&mut rest).map_err(|_| Failure::Tls)? == 0 {
                return Ok(Flow::Closed);
            }
            let state = self.tls.process_new_packets().map_err(|error| {
                // So that the server logs what was wrong; it may be gone.
                let _ = self.tls.write_tls(&mut self.stream);
                tls_fault(error)
            })?;
            let mut left = state.plaintext_bytes_to_read();
            let mut reader = self.tls.reader();
            while left > 0 {
                let bytes = reader.fill_buf().map_err(|_| Failure::Tls)?;
                let length = bytes.len();
                take(bytes)?;
                reader.consume(length);
                left -= length;
            }
            if state.peer_has_closed() {
                return Ok(Flow::Closed);
            }
        }
        Ok(Flow::More)
    }

    /// What it means that the server is gone.
    pub fn closed(&self) -> Failure {
        match self.tls.is_handshaking() {
            true => Failure::ClosedInHandshake,
            false => Failure::ClosedBeforeAnswer,
        }
    }

    fn broken(&self, error: &io::Error) -> Failure {
        match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::AddrNotAvailable | ErrorKind::TimedOut => {
                Failure::Connect
            }
            _ => self.closed(),
        }
    }
}

fn connect_from(source: Ipv4Addr, address: SocketAddrV4) -> io::Result<TcpStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(source, 0))?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from_std(socket.into())),
        Err(error) => Err(error.into()),
    }
}

fn tls_fault(error: rustls::Error) -> Fault {
    Fault { failure: Failure::Tls, detail: Some(error.to_string()) }
}

fn would_wait(error: &io::Error) -> bool {
    // NotConnected: the connect is still going on.
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::NotConnected)
}
