//! Owns the life of one connection, from accept to close: this file is the table of contents of the data path.
//! I/O thread only.
//!
//! ```text
//! accept ─> parties (parties.rs; who the client is, by the PROXY header of a proxy in front or by the kernel)
//!        ─> front: handshake (handshake.rs; signature on a lane), or a ClientHello that is passed on, or nothing
//!        ─> back:  route (routing.rs) ─> connect (upstream/; PROXY header first) ─> handshake (upstream_tls.rs), if TLS is spoken
//!        ─> relay (relay.rs) ─> close
//! ```
//!
//! Whatever happens, a connection ends in one place with one reason: `Life::drop`.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use aws_lc_rs::rand;
use rustls::pki_types::UnixTime;
use tokio::time::{Instant, timeout_at};

use crate::access_log::{Facts, Negotiated};
use crate::client_hello::{HelloRead, read_hello, refuse_name};
use crate::client_status::Outcome;
use crate::close::Close;
use crate::handshake::{Established, Leftover, handshake};
use crate::listener::{Front, Listener, ListenerClients, ListenerStats, Offer};
use crate::parties::{Parties, parties};
use crate::policy::openssl_name;
use crate::proxy_header::{self, ClientCertificate, Endpoints, ProxyInfo, SslInfo};
use crate::relay::{End, Meter, RelayDeadlines, Said, relay};
use crate::routing::{Router, Target};
use crate::step::write_all;
use crate::stream::Stream;
use crate::tls::Tls;
use crate::upstream::{ConnectError, Connected, Lease, OnBehalf, Tries, Upstream};
use crate::upstream_tls::{UpstreamTls, shake_hands};
use crate::verify::{Client, Identity};

const UNIQUE_ID_BYTES: usize = 16;

/// Runs one accepted connection to its end.
pub async fn serve(mut life: Life, offer: Offer, client: Stream) {
    let close = run(&mut life, offer, &client).await;
    life.end(close);
}

async fn run(life: &mut Life, offer: Offer, client: &Stream) -> Close {
    let listener = life.listener.clone();
    match Box::pin(parties(client, &listener.plan, life.source, life.accepted_at)).await {
        Ok(parties) => life.identified(parties),
        Err(close) => return close,
    }
    if life.facts.via.is_some() && offer.is_over_rate(life.source) {
        client.reset_when_dropped();
        return Close::ProxyAcceptClientRate;
    }
    // Boxed so that a relaying connection does not keep the room of its handshakes.
    let (client_tls, said) = match Box::pin(front(life, &offer, client)).await {
        Ok(front) => front,
        Err(close) => return close,
    };
    let opened = match Box::pin(back(life, offer, client, client_tls.as_ref(), said)).await {
        Ok(opened) => opened,
        Err(close) => return close,
    };
    let deadlines = RelayDeadlines {
        idle: listener.plan.idle_deadline,
        half_closed: listener.plan.half_closed_deadline,
        lifetime_until: listener.plan.lifetime_deadline.map(|lifetime| life.accepted_at + lifetime),
    };
    let meter = Meter { all: &listener.stats.relay_bytes, own: &life.facts.relayed };
    let Opened { stream, tls, by_client, by_upstream, lease: _lease } = opened;
    let client = End { stream: client, tls: client_tls };
    let upstream = End { stream: &stream, tls };
    relay(client, by_client, upstream, by_upstream, deadlines, &listener.scratch, meter).await
}

/// The client's side, until it is known what it wants: its TLS, if that ends here, and what it has said beyond.
async fn front(life: &mut Life, offer: &Offer, client: &Stream) -> Result<(Option<Tls>, Leftover), Close> {
    let Listener { plan, scratch, .. } = &*life.listener.clone();
    let deadline = life.accepted_at + plan.handshake_deadline;
    match (plan.front, &offer.tls) {
        (Front::Tls, Some(listener_tls)) => {
            let handshake =
                handshake(client, listener_tls.config.clone(), deadline, scratch, &mut life.facts);
            let Established { tls, leftover } = handshake.await?;
            if let Some(clients) = &listener_tls.clients {
                let identified = timeout_at(deadline, identify(clients, &tls, &life.listener.stats)).await;
                life.facts.identity = identified.map_err(|_| Close::ClientHandshakeDeadline)??;
            }
            life.handshake_done(&tls);
            Ok((Some(tls), leftover))
        }
        (Front::Passthrough, _) => {
            let HelloRead { server_name, alpn, bytes } = read_hello(client, deadline, scratch).await?;
            life.facts.server_name = server_name;
            life.facts.offered_alpn = alpn.into_iter().next();
            life.handshaking_done();
            Ok((None, Leftover { plaintext: bytes, ended: false }))
        }
        // Never plaintext for want of a certificate.
        (Front::Tls, None) => Err(Close::ProxyInternalPanic),
        (Front::Plain, _) => {
            life.handshaking_done();
            Ok((None, Leftover { plaintext: Vec::new(), ended: false }))
        }
    }
}

/// Who the client is by its certificate. One that is refused here hears no alert, for the handshake is done: its session was
/// resumed and it would not be let in any more, or an OCSP responder is against it.
async fn identify(
    clients: &ListenerClients,
    tls: &Tls,
    stats: &ListenerStats,
) -> Result<Option<Box<Identity>>, Close> {
    let ListenerClients { verifier, status } = clients;
    let client = verifier.identify(tls.peer_certificates(), tls.is_resumed(), UnixTime::now());
    let Some(Client { identity, subject }) = client.map_err(|error| Close::from_tls_error(&error))? else {
        return Ok(None);
    };
    if let Some(status) = status {
        let outcome = match &subject {
            Some(subject) => status.of(identity.fingerprint, subject).await,
            None => Outcome::Unavailable,
        };
        stats.client_statuses[outcome as usize].add(1);
        match outcome {
            Outcome::Good => {}
            Outcome::Revoked => return Err(Close::ClientHandshakeCertificateRevoked),
            Outcome::Unavailable if !status.is_hard() => {}
            // Whoever must know the certificate does not: it may be forged.
            Outcome::Unknown | Outcome::Unavailable => {
                return Err(Close::ClientHandshakeCertificateStatusUnknown);
            }
        }
    }
    Ok(Some(Box::new(identity)))
}

/// A server that is ready for the relay, and what both sides have said already.
struct Opened {
    stream: Stream,
    tls: Option<Tls>,
    by_client: Said,
    by_upstream: Said,
    lease: Lease,
}

/// The upstream's side: choose, connect, introduce the client, and shake hands where TLS is spoken.
async fn back(
    life: &mut Life,
    offer: Offer,
    client: &Stream,
    client_tls: Option<&Tls>,
    leftover: Leftover,
) -> Result<Opened, Close> {
    let Some(target) = life.route(&offer.router, client_tls) else {
        if life.listener.plan.front == Front::Passthrough {
            refuse_name(client);
        }
        return Err(Close::ClientHandshakeNoRoute);
    };
    let Target { upstream, tls: upstream_tls } = target;
    // From here on a former configuration is kept by what still needs it.
    drop(offer);
    let mut header =
        proxy_header(life, &upstream, client, client_tls).map_err(|error| close_for(&error.into()))?;
    let Leftover { plaintext, ended } = leftover;
    let header_bytes = header.len();
    // Plaintext goes to a server in one piece with the header, as soon as it is connected.
    if upstream_tls.is_none() {
        header.extend_from_slice(&plaintext);
    }
    let Some(upstream_tls) = upstream_tls else {
        let connecting_at = Instant::now();
        let connected =
            upstream.connect(&header, life.on_behalf()).await.map_err(|error| close_for(&error))?;
        life.connected(&upstream, &connected, connecting_at);
        let Connected { stream, taken, lease, .. } = connected;
        let by_client = Said { bytes: header, header_bytes, taken, ended };
        return Ok(Opened { stream, tls: None, by_client, by_upstream: Said::default(), lease });
    };
    let (connected, Established { tls, leftover }) =
        back_tls(life, &upstream, &upstream_tls, &header).await?;
    let Connected { stream, lease, .. } = connected;
    let by_client = Said { bytes: plaintext, ended, ..Said::default() };
    let by_upstream = Said { bytes: leftover.plaintext, ended: leftover.ended, ..Said::default() };
    Ok(Opened { stream, tls: Some(tls), by_client, by_upstream, lease })
}

/// TLS to a server. Nothing of the client's has been sent before it is there, so when one server's handshake fails, the next
/// is tried. All handshakes together have the upstream's deadline, each an equal share of what is left.
async fn back_tls(
    life: &mut Life,
    upstream: &Upstream,
    upstream_tls: &UpstreamTls,
    header: &[u8],
) -> Result<(Connected, Established), Close> {
    let scratch = life.listener.scratch.clone();
    // As with the client's: it costs as much, and the limit is there for what it costs.
    life.handshaking_begins();
    let mut time_left = upstream_tls.deadline;
    let mut tries = Tries::default();
    let mut failure = None;
    loop {
        let connecting_at = Instant::now();
        let connected = match upstream.connect_next(&mut tries, header, life.on_behalf()).await {
            Ok(connected) => connected,
            // What the last server did says more than that there is no other.
            Err(error) => return Err(failure.unwrap_or_else(|| close_for(&error))),
        };
        life.connected(upstream, &connected, connecting_at);
        let Connected { stream, taken, server, .. } = &connected;
        let shaking_at = Instant::now();
        let deadline = shaking_at + time_left / upstream.tries_left(&tries).unwrap_or(1);
        let shaken = async {
            timeout_at(deadline, write_all(stream, &header[*taken..]))
                .await
                .map_err(|_| Close::UpstreamHandshakeDeadline)?
                .map_err(|_| Close::UpstreamHandshakeReset)?;
            shake_hands(stream, upstream_tls, *server, deadline, &scratch).await
        };
        match shaken.await {
            Ok(established) => {
                upstream.succeeded(&connected);
                life.handshaking_done();
                life.upstream_ready(upstream, *server, &established.tls, shaking_at);
                return Ok((connected, established));
            }
            Err(close) if close.is_of_upstream() => {
                upstream.failed(&connected, &mut tries);
                time_left = time_left.saturating_sub(shaking_at.elapsed());
                failure = Some(close);
            }
            // A token that does not sign for one server signs for no other.
            Err(close) => return Err(close),
        }
    }
}

/// What the server hears first: who the client is. Empty where it does not want to know.
fn proxy_header(
    life: &Life,
    upstream: &Upstream,
    client: &Stream,
    client_tls: Option<&Tls>,
) -> io::Result<Vec<u8>> {
    let mut header = Vec::new();
    let plan = upstream.plan();
    let Some(version) = plan.proxy_protocol else { return Ok(header) };
    let mut unique_id = [0; UNIQUE_ID_BYTES];
    let unique_id = rand::fill(&mut unique_id).ok().map(|()| &unique_id[..]);
    let cipher = client_tls.and_then(Tls::cipher_suite).map(|suite| openssl_name(&suite));
    let destination = match life.facts.destination {
        None => client.local_addr()?,
        known => known,
    };
    let info = ProxyInfo {
        endpoints: destination.map(|destination| Endpoints { source: life.source, destination }),
        alpn: client_tls.and_then(Tls::alpn),
        authority: life.facts.server_name.as_deref(),
        ssl: client_tls.map(|tls| SslInfo {
            version: tls.protocol_name(),
            cipher: cipher.as_deref(),
            signature_algorithm: None,
            key_algorithm: None,
            client_certificate: life.facts.identity.as_ref().map(|identity| ClientCertificate {
                common_name: identity.common_name.as_deref(),
                uri: identity.uris.first().map(String::as_str),
                der: leaf_of(tls).filter(|_| plan.proxy_client_certificate),
                verified: true,
                resumed: tls.is_resumed(),
            }),
        }),
        unique_id,
    };
    proxy_header::write(version, &info, &mut header);
    Ok(header)
}

fn leaf_of(tls: &Tls) -> Option<&[u8]> {
    tls.peer_certificates()?.first().map(|leaf| &leaf[..])
}

fn close_for(error: &ConnectError) -> Close {
    match error {
        ConnectError::NoServer => Close::UpstreamConnectNoServer,
        ConnectError::Refused => Close::UpstreamConnectRefused,
        ConnectError::Deadline => Close::UpstreamConnectDeadline,
        ConnectError::Unreachable => Close::UpstreamConnectUnreachable,
        ConnectError::Loop => Close::ProxyConnectLoop,
        _ => Close::UpstreamConnectFailed,
    }
}

/// What is counted while a connection lives, what will be said of it, and the one way out.
pub struct Life {
    listener: Rc<Listener>,
    /// The peer, until somebody who may says that another is the client.
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

    fn identified(&mut self, Parties { client, via, destination }: Parties) {
        self.source = client;
        self.facts.via = via;
        self.facts.destination = destination;
    }

    fn on_behalf(&self) -> OnBehalf {
        OnBehalf { client: self.source, destination: self.facts.destination }
    }

    fn handshaking_begins(&mut self) {
        self.handshaking = true;
        self.listener.stats.handshakes_in_flight.add(1);
    }

    fn handshaking_done(&mut self) {
        self.handshaking = false;
        self.listener.stats.handshakes_in_flight.add(-1);
    }

    fn handshake_done(&mut self, tls: &Tls) {
        self.handshaking_done();
        let took = self.accepted_at.elapsed();
        let Listener { stats, negotiated, .. } = &*self.listener;
        stats.handshake(tls.is_tls13(), tls.is_resumed()).observe(took);
        negotiated.count(tls.cipher_suite(), tls.group());
        self.facts.negotiated = Some(Negotiated::by(tls));
        self.facts.handshake = Some(took);
    }

    fn route(&mut self, router: &Router, client_tls: Option<&Tls>) -> Option<Target> {
        let alpn = client_tls.map_or(self.facts.offered_alpn.as_deref(), Tls::alpn);
        let client = self.facts.identity.as_deref();
        let target = router.route(self.facts.server_name.as_deref(), alpn, client)?.clone();
        self.facts.upstream = Some(target.upstream.plan().name.as_str().into());
        Some(target)
    }

    fn connected(&mut self, upstream: &Upstream, connected: &Connected, since: Instant) {
        self.facts.connect = Some(since.elapsed());
        self.facts.server = upstream.plan().servers.get(connected.server).cloned();
    }

    fn upstream_ready(&mut self, upstream: &Upstream, server: usize, tls: &Tls, since: Instant) {
        let took = since.elapsed();
        if let Some(stats) = upstream.stats().servers.get(server) {
            stats.handshake(tls.is_resumed()).observe(took);
        }
        self.facts.upstream_handshake = Some(took);
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
