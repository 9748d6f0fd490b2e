//! Owns the life of one connection, from accept to close: this file is the table of contents of the data path.
//! I/O thread only.
//!
//! ```text
//! accept ─> handshake (handshake.rs; signature on a lane) ─> connect (upstream/; PROXY header first) ─> relay (relay.rs) ─> close
//! ```
//!
//! Whatever happens, a connection ends in one place with one reason: `Life::drop`.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use aws_lc_rs::rand;
use rustls::ServerConfig;
use tokio::time::Instant;

use crate::close::Close;
use crate::handshake::{Established, Leftover, handshake};
use crate::listener::Listener;
use crate::policy::openssl_name;
use crate::proxy_header::{self, Endpoints, ProxyInfo, ProxyVersion, SslInfo};
use crate::relay::{Opening, RelayDeadlines, relay};
use crate::stream::Stream;
use crate::tls::Tls;
use crate::upstream::ConnectError;

const UNIQUE_ID_BYTES: usize = 16;

/// Runs one accepted connection to its end.
pub async fn serve(mut life: Life, tls_config: Arc<ServerConfig>, client: Stream, source: SocketAddr) {
    let close = run(&mut life, tls_config, &client, source).await;
    life.end(close);
}

async fn run(life: &mut Life, tls_config: Arc<ServerConfig>, client: &Stream, source: SocketAddr) -> Close {
    let listener = life.listener.clone();
    let accepted_at = Instant::now();
    let deadline = accepted_at + listener.plan.handshake_deadline;
    // Boxed so that a relaying connection does not keep the room of its handshake.
    let established = match Box::pin(handshake(client, tls_config, deadline, &listener.scratch)).await {
        Ok(established) => established,
        Err(close) => return close,
    };
    life.handshake_done(&established.tls, accepted_at);

    let Established { tls, leftover, server_name } = established;
    let mut opening = match opening(&listener, client, source, &tls, server_name, leftover) {
        Ok(opening) => opening,
        Err(error) => return close_for(&error.into()),
    };
    let connected = match Box::pin(listener.upstream.connect(&opening.bytes)).await {
        Ok(connected) => connected,
        Err(error) => return close_for(&error),
    };
    opening.taken = connected.taken;

    let deadlines = RelayDeadlines {
        idle: listener.plan.idle_deadline,
        half_closed: listener.plan.half_closed_deadline,
        lifetime_until: listener.plan.lifetime_deadline.map(|lifetime| accepted_at + lifetime),
    };
    let bytes = &listener.stats.relay_bytes;
    relay(client, tls, opening, &connected.stream, deadlines, &listener.scratch, bytes).await
}

/// What the server hears first: who the client is, and what the client has said already.
fn opening(
    listener: &Listener,
    client: &Stream,
    source: SocketAddr,
    tls: &Tls,
    server_name: Option<String>,
    leftover: Leftover,
) -> io::Result<Opening> {
    let Leftover { plaintext, client_closed } = leftover;
    let Some(version) = listener.upstream.plan().proxy_protocol else {
        return Ok(Opening { bytes: plaintext, header_bytes: 0, taken: 0, client_closed });
    };
    let mut bytes = Vec::new();
    write_proxy_header(version, client, source, tls, server_name.as_deref(), &mut bytes)?;
    let header_bytes = bytes.len();
    bytes.extend_from_slice(&plaintext);
    Ok(Opening { bytes, header_bytes, taken: 0, client_closed })
}

fn write_proxy_header(
    version: ProxyVersion,
    client: &Stream,
    source: SocketAddr,
    tls: &Tls,
    server_name: Option<&str>,
    out: &mut Vec<u8>,
) -> io::Result<()> {
    let mut unique_id = [0; UNIQUE_ID_BYTES];
    let unique_id = rand::fill(&mut unique_id).ok().map(|()| &unique_id[..]);
    let cipher = tls.cipher_suite().map(|suite| openssl_name(&suite));
    let destination = client.local_addr()?;
    let info = ProxyInfo {
        endpoints: destination.map(|destination| Endpoints { source, destination }),
        alpn: tls.alpn(),
        authority: server_name,
        ssl: Some(SslInfo {
            version: protocol_name(tls),
            cipher: cipher.as_deref(),
            signature_algorithm: None,
            key_algorithm: None,
            client_certificate: None,
        }),
        unique_id,
    };
    proxy_header::write(version, &info, out);
    Ok(())
}

fn protocol_name(tls: &Tls) -> &'static str {
    if is_tls13(tls) { "TLSv1.3" } else { "TLSv1.2" }
}

fn is_tls13(tls: &Tls) -> bool {
    tls.protocol() == Some(rustls::ProtocolVersion::TLSv1_3)
}

fn close_for(error: &ConnectError) -> Close {
    match error {
        ConnectError::NoServer => Close::UpstreamConnectNoServer,
        ConnectError::Refused => Close::UpstreamConnectRefused,
        ConnectError::Deadline => Close::UpstreamConnectDeadline,
        ConnectError::Unreachable => Close::UpstreamConnectUnreachable,
        _ => Close::UpstreamConnectFailed,
    }
}

/// What is counted while a connection lives, and the one way out.
pub struct Life {
    listener: Rc<Listener>,
    handshaking: bool,
    close: Option<Close>,
}

impl Life {
    pub fn begin(listener: Rc<Listener>) -> Self {
        listener.stats.connections_open.add(1);
        listener.stats.handshakes_in_flight.add(1);
        Self { listener, handshaking: true, close: None }
    }

    fn handshake_done(&mut self, tls: &Tls, since: Instant) {
        self.handshaking = false;
        let stats = &self.listener.stats;
        stats.handshakes_in_flight.add(-1);
        stats.handshake(is_tls13(tls), tls.is_resumed()).observe(since.elapsed());
    }

    fn end(&mut self, close: Close) {
        self.close = Some(close);
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let stats = &self.listener.stats;
        stats.connections_open.add(-1);
        if self.handshaking {
            stats.handshakes_in_flight.add(-1);
        }
        // A connection that is dropped without a reason was cut by the end of the drain, or by a panic in its own task.
        let cut =
            if std::thread::panicking() { Close::ProxyInternalPanic } else { Close::ProxyDrainDeadline };
        self.listener.closes.count(self.close.unwrap_or(cut));
    }
}
