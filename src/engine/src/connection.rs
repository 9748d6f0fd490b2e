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

use crate::access_log::{Facts, Negotiated};
use crate::close::Close;
use crate::handshake::{Established, Leftover, handshake};
use crate::listener::Listener;
use crate::policy::openssl_name;
use crate::proxy_header::{self, Endpoints, ProxyInfo, ProxyVersion, SslInfo};
use crate::relay::{End, Meter, RelayDeadlines, Said, relay};
use crate::stream::Stream;
use crate::tls::Tls;
use crate::upstream::{ConnectError, Connected};

const UNIQUE_ID_BYTES: usize = 16;

/// Runs one accepted connection to its end.
pub async fn serve(mut life: Life, tls_config: Arc<ServerConfig>, client: Stream) {
    let close = run(&mut life, tls_config, &client).await;
    life.end(close);
}

async fn run(life: &mut Life, tls_config: Arc<ServerConfig>, client: &Stream) -> Close {
    let listener = life.listener.clone();
    let accepted_at = life.accepted_at;
    let deadline = accepted_at + listener.plan.handshake_deadline;
    // Boxed so that a relaying connection does not keep the room of its handshake.
    let handshake = Box::pin(handshake(client, tls_config, deadline, &listener.scratch, &mut life.facts));
    let Established { tls, leftover } = match handshake.await {
        Ok(established) => established,
        Err(close) => return close,
    };
    life.handshake_done(&tls);

    let mut said = match opening(life, client, &tls, leftover) {
        Ok(said) => said,
        Err(error) => return close_for(&error.into()),
    };
    let connecting_at = Instant::now();
    let connected = match Box::pin(listener.upstream.connect(&said.bytes)).await {
        Ok(connected) => connected,
        Err(error) => return close_for(&error),
    };
    said.taken = connected.taken;
    life.connected(&connected, connecting_at);

    let deadlines = RelayDeadlines {
        idle: listener.plan.idle_deadline,
        half_closed: listener.plan.half_closed_deadline,
        lifetime_until: listener.plan.lifetime_deadline.map(|lifetime| accepted_at + lifetime),
    };
    let meter = Meter { all: &listener.stats.relay_bytes, own: &life.facts.relayed };
    let client = End { stream: client, tls: Some(tls) };
    let upstream = End { stream: &connected.stream, tls: None };
    relay(client, said, upstream, Said::default(), deadlines, &listener.scratch, meter).await
}

/// What the server hears first: who the client is, and what the client has said already.
fn opening(life: &Life, client: &Stream, tls: &Tls, leftover: Leftover) -> io::Result<Said> {
    let Leftover { plaintext, client_closed } = leftover;
    let Some(version) = life.listener.upstream.plan().proxy_protocol else {
        return Ok(Said { bytes: plaintext, ended: client_closed, ..Said::default() });
    };
    let mut bytes = Vec::new();
    write_proxy_header(version, client, life.source, tls, life.facts.server_name.as_deref(), &mut bytes)?;
    let header_bytes = bytes.len();
    bytes.extend_from_slice(&plaintext);
    Ok(Said { bytes, header_bytes, taken: 0, ended: client_closed })
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
            version: tls.protocol_name(),
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

fn close_for(error: &ConnectError) -> Close {
    match error {
        ConnectError::NoServer => Close::UpstreamConnectNoServer,
        ConnectError::Refused => Close::UpstreamConnectRefused,
        ConnectError::Deadline => Close::UpstreamConnectDeadline,
        ConnectError::Unreachable => Close::UpstreamConnectUnreachable,
        _ => Close::UpstreamConnectFailed,
    }
}

/// What is counted while a connection lives, what will be said of it, and the one way out.
pub struct Life {
    listener: Rc<Listener>,
    source: SocketAddr,
    accepted_at: Instant,
    handshaking: bool,
    facts: Facts,
    close: Option<Close>,
}

impl Life {
    pub fn begin(listener: Rc<Listener>, source: SocketAddr) -> Self {
        listener.stats.connections_open.add(1);
        listener.stats.handshakes_in_flight.add(1);
        let accepted_at = Instant::now();
        Self { listener, source, accepted_at, handshaking: true, facts: Facts::default(), close: None }
    }

    fn handshake_done(&mut self, tls: &Tls) {
        self.handshaking = false;
        let took = self.accepted_at.elapsed();
        let Listener { stats, negotiated, .. } = &*self.listener;
        stats.handshakes_in_flight.add(-1);
        stats.handshake(tls.is_tls13(), tls.is_resumed()).observe(took);
        negotiated.count(tls.cipher_suite(), tls.group());
        self.facts.negotiated = Some(Negotiated::by(tls));
        self.facts.handshake = Some(took);
    }

    fn connected(&mut self, connected: &Connected, since: Instant) {
        self.facts.connect = Some(since.elapsed());
        self.facts.server = self.listener.upstream.plan().servers.get(connected.server).cloned();
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
        let (facts, total) = (std::mem::take(&mut self.facts), self.accepted_at.elapsed());
        self.listener.ended(self.close.unwrap_or(cut), self.source, facts, total);
    }
}
