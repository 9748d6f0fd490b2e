//! Owns the life of one connection, from accept to close: this file is the table of contents of the data path.
//! I/O thread only.
//!
//! ```text
//! accept ─> handshake (handshake.rs; signature on a lane) ─> connect (upstream/) ─> PROXY header ─> relay (relay.rs) ─> close
//! ```
//!
//! Whatever happens, a connection ends in one place with one reason: `Life::drop`.

use std::net::SocketAddr;
use std::rc::Rc;

use aws_lc_rs::rand;
use tokio::time::{Instant, timeout_at};

use crate::close::Close;
use crate::handshake::{Established, handshake, write_all};
use crate::listener::Listener;
use crate::policy::openssl_name;
use crate::proxy_header::{self, Endpoints, ProxyInfo, SslInfo};
use crate::relay::{RelayDeadlines, relay};
use crate::stream::Stream;
use crate::tls::Tls;
use crate::upstream::{ConnectError, Connected};

const UNIQUE_ID_BYTES: usize = 16;

/// Runs one accepted connection to its end.
pub async fn serve(mut life: Life, client: Stream, source: SocketAddr) {
    let close = run(&mut life, &client, source).await;
    life.end(close);
}

async fn run(life: &mut Life, client: &Stream, source: SocketAddr) -> Close {
    let listener = life.listener.clone();
    let accepted_at = Instant::now();
    let deadline = accepted_at + listener.plan.handshake_deadline;
    let tls_config = listener.plan.tls_config.clone();
    // Boxed so that a relaying connection does not keep the room of its handshake.
    let established = match Box::pin(handshake(client, tls_config, deadline, &listener.scratch)).await {
        Ok(established) => established,
        Err(close) => return close,
    };
    life.handshake_done(&established.tls, accepted_at);

    let connected = match Box::pin(connect(&listener, client, source, &established)).await {
        Ok(connected) => connected,
        Err(error) => return close_for(&error),
    };

    let deadlines = RelayDeadlines {
        idle: listener.plan.idle_deadline,
        half_closed: listener.plan.half_closed_deadline,
        lifetime_until: listener.plan.lifetime_deadline.map(|lifetime| accepted_at + lifetime),
    };
    let Established { tls, leftover, .. } = established;
    relay(client, tls, leftover, &connected.stream, deadlines, &listener.scratch, &listener.stats.relay_bytes)
        .await
}

/// Connects to a server of the upstream and tells it who the client is.
async fn connect(
    listener: &Listener,
    client: &Stream,
    source: SocketAddr,
    established: &Established,
) -> Result<Connected, ConnectError> {
    let plan = listener.upstream.plan();
    let deadline = Instant::now() + plan.connect_deadline;
    let connected = listener.upstream.connect().await?;
    if let Some(version) = plan.proxy_protocol {
        let mut header = Vec::new();
        let mut unique_id = [0; UNIQUE_ID_BYTES];
        let unique_id = rand::fill(&mut unique_id).ok().map(|()| &unique_id[..]);
        let cipher = established.tls.cipher_suite().map(|suite| openssl_name(&suite));
        let destination = client.local_addr()?;
        proxy_header::write(
            version,
            &ProxyInfo {
                endpoints: destination.map(|destination| Endpoints { source, destination }),
                alpn: established.tls.alpn(),
                authority: established.server_name.as_deref(),
                ssl: Some(SslInfo {
                    version: protocol_name(&established.tls),
                    cipher: cipher.as_deref(),
                    signature_algorithm: None,
                    key_algorithm: None,
                    client_certificate: None,
                }),
                unique_id,
            },
            &mut header,
        );
        // A header fits in any fresh socket's buffer; the deadline is for a server that is broken in some new way.
        timeout_at(deadline, write_all(&connected.stream, &header))
            .await
            .map_err(|_| ConnectError::Deadline)??;
    }
    Ok(connected)
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
