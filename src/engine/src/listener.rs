//! Owns a listener inside a worker: accepting from its sockets, its limits, its measurements. I/O thread only.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep};

use crate::access_log::{AccessLog, Ended, Facts};
use crate::client_rate::{ClientRate, ClientRatePlan};
use crate::client_status::{ClientStatus, STATUS_OUTCOMES};
use crate::close::{Close, CloseCounters};
use crate::connection::{Life, serve};
use crate::parties::ProxyIn;
use crate::policy::NegotiatedCounters;
use crate::relay::{RelayBytes, Scratch};
use crate::routing::{Router, RoutesPlan};
use crate::stats::{Counter, Gauge, Histogram};
use crate::stream::Stream;
use crate::verify::ClientVerifier;

/// How long accepting rests when the process or the host is out of file descriptors or memory.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// More than any queue holds: what waits is accepted in one go, and a flood must not make that endless.
const BACKLOG_MAX: usize = 65_536;

/// A listener's settings, checked.
pub struct ListenerPlan {
    pub name: String,
    pub front: Front,
    pub routes: RoutesPlan,
    pub handshake_deadline: Duration,
    pub idle_deadline: Duration,
    pub half_closed_deadline: Duration,
    pub lifetime_deadline: Option<Duration>,
    /// Who must begin with a PROXY header.
    pub proxy_in: Option<ProxyIn>,
    /// Clients were redirected here: what they wanted to reach is asked of the kernel.
    pub transparent: bool,
    /// In this worker.
    pub connections_max: usize,
    /// In this worker.
    pub handshakes_max: usize,
    /// In this worker. None: a client may come as often as it likes.
    pub per_client: Option<ClientRatePlan>,
    /// File descriptors of this worker's listening sockets.
    pub sockets: Vec<RawFd>,
}

/// What clients speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// TLS, which ends here.
    Tls,
    Plain,
    /// TLS, which is passed on as it is.
    Passthrough,
}

/// What a connection keeps from accept to close, also when a reload has replaced it.
pub struct Listener {
    pub plan: ListenerPlan,
    pub scratch: Rc<Scratch>,
    pub stats: Arc<ListenerStats>,
    pub closes: Arc<CloseCounters>,
    pub negotiated: Arc<NegotiatedCounters>,
    pub access_log: Rc<AccessLog>,
}

/// How TLS ends at a listener.
#[derive(Clone)]
pub struct ListenerTls {
    pub config: Arc<ServerConfig>,
    /// None: clients are asked for no certificate.
    pub clients: Option<Arc<ListenerClients>>,
}

/// Who is let in by a certificate.
pub struct ListenerClients {
    /// The same that the TLS configuration has.
    pub verifier: Arc<ClientVerifier>,
    /// None: no OCSP responder is asked.
    pub status: Option<ClientStatus>,
}

/// What a listener offers to those who come now. TLS configurations, with their certificates, and the table of rates are given to
/// handshakes and to nothing that lives longer: connections stay for days, and must not keep a former configuration in memory.
#[derive(Clone)]
pub struct Offer {
    pub listener: Rc<Listener>,
    /// Where TLS ends here.
    pub tls: Option<ListenerTls>,
    pub router: Rc<Router>,
    /// None: a client may come as often as it likes.
    pub client_rate: Option<Rc<ClientRate>>,
}

/// A reload puts another offer in its place; who accepts looks for each connection.
pub type CurrentOffer = Rc<RefCell<Offer>>;

#[derive(Default)]
pub struct ListenerStats {
    pub accepted: Counter,
    /// accept() failed for want of file descriptors or memory.
    pub accept_failures: Counter,
    pub connections_open: Gauge,
    pub handshakes_in_flight: Gauge,
    pub relay_bytes: RelayBytes,
    /// What OCSP responders said of clients' certificates, in the order of `STATUS_OUTCOMES`.
    pub client_statuses: [Counter; STATUS_OUTCOMES.len()],
    /// Full TLS 1.2, resumed 1.2, full 1.3, resumed 1.3.
    handshakes: [Histogram; 4],
}

impl ListenerStats {
    pub fn handshake(&self, tls13: bool, resumed: bool) -> &Histogram {
        &self.handshakes[usize::from(tls13) * 2 + usize::from(resumed)]
    }
}

/// A listening socket as this thread's runtime sees it. It stays open when this is dropped.
///
/// # Errors
/// `socket` is not a listening TCP socket.
pub fn socket_of(socket: &OwnedFd) -> io::Result<TcpListener> {
    TcpListener::from_std(socket.try_clone()?.into())
}

/// Accepts from a listening socket until the task is aborted.
pub fn accept_from(offer: CurrentOffer, socket: TcpListener) -> AbortHandle {
    spawn_local(accept(offer, socket)).abort_handle()
}

/// Accepts what waits in the queue of a socket that is about to be closed, and would be reset.
///
/// # Errors
/// `socket` is not a socket.
pub fn accept_waiting(offer: &CurrentOffer, socket: &OwnedFd) -> io::Result<()> {
    let socket = std::net::TcpListener::from(socket.try_clone()?);
    for _ in 0..BACKLOG_MAX {
        match socket.accept() {
            Ok((client, source)) => {
                client.set_nonblocking(true)?;
                welcome(offer, TcpStream::from_std(client)?, source);
            }
            Err(error) if is_of_the_connection(&error) => {}
            Err(_) => break,
        }
    }
    Ok(())
}

async fn accept(offer: CurrentOffer, socket: TcpListener) {
    loop {
        match socket.accept().await {
            Ok((client, source)) => welcome(&offer, client, source),
            // The primary has shut it: the order to drain is on its way.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            Err(error) if is_of_the_connection(&error) => {
                offer.borrow().listener.closes.count(Close::ClientAcceptReset);
            }
            Err(_) => {
                offer.borrow().listener.stats.accept_failures.add(1);
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

fn welcome(offer: &CurrentOffer, client: TcpStream, source: SocketAddr) {
    let offer = offer.borrow().clone();
    let listener = offer.listener.clone();
    listener.stats.accepted.add(1);
    match offer.over_limit(source) {
        // Counted now and not when the task first runs, so that a burst meets the limits.
        None => {
            drop(spawn_local(serve(Life::begin(listener, source), offer, Stream::Tcp(client))));
        }
        Some(close) => {
            // A reset costs neither side a wait, and no TIME_WAIT here.
            Stream::Tcp(client).abort();
            listener.ended(close, source, Facts::default(), Duration::ZERO);
        }
    }
}

/// accept(2) also reports errors of the connection it was about to return; the next one may be fine.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

impl Listener {
    /// The end of every connection that was accepted, counted and perhaps logged.
    pub fn ended(&self, close: Close, client: SocketAddr, facts: Facts, total: Duration) {
        self.closes.count(close);
        self.access_log.ended(close, || Ended {
            at: SystemTime::now(),
            client,
            listener: self.plan.name.clone(),
            facts,
            total,
            close,
        });
    }
}

impl Offer {
    /// Whether the client comes too often. Of who comes over a proxy this is known only when that has said who it is.
    pub fn is_over_rate(&self, client: SocketAddr) -> bool {
        self.client_rate.as_ref().is_some_and(|rate| !rate.admits(client.ip(), Instant::now()))
    }

    fn over_limit(&self, peer: SocketAddr) -> Option<Close> {
        let Listener { plan, stats, .. } = &*self.listener;
        let is_proxy = plan.proxy_in.as_ref().is_some_and(|proxies| proxies.is_from(peer.ip()));
        let at_least = |gauge: &Gauge, max: usize| usize::try_from(gauge.get()).is_ok_and(|now| now >= max);
        if at_least(&stats.connections_open, plan.connections_max) {
            Some(Close::ProxyAcceptConnectionLimit)
        } else if at_least(&stats.handshakes_in_flight, plan.handshakes_max) {
            Some(Close::ProxyAcceptHandshakeLimit)
        } else if !is_proxy && self.is_over_rate(peer) {
            Some(Close::ProxyAcceptClientRate)
        } else {
            None
        }
    }
}
