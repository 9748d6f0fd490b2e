//! Owns the choice of a server and the connection to it: balancing, the attempts within one deadline, what a failed
//! attempt is called. What is known about one server is server.rs, the active checks are health.rs. Knows nothing of
//! clients, TLS or relaying. Runs on the I/O thread; only the statistics are read by another.

mod health;
mod server;
#[cfg(test)]
mod tests;

use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::proxy_header::ProxyVersion;
use crate::stats::{Counter, Gauge, Histogram};
use crate::stream::Stream;
use server::{Opened, Server};

pub use server::Lease;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ServerAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
    /// Where the client wanted to go before it was redirected to us.
    Original,
}

/// Whose connection a connection to a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnBehalf {
    pub client: SocketAddr,
    /// For `ServerAddress::Original`.
    pub destination: Option<SocketAddr>,
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerAddress::Tcp(address) => write!(formatter, "{address}"),
            ServerAddress::Unix(path) => write!(formatter, "unix:{}", path.display()),
            ServerAddress::Original => formatter.write_str("original"),
        }
    }
}

/// Which of the eligible servers is next. Either way a worker starts at a server of its own choice, so that workers
/// that start together do not all begin with the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    RoundRobin,
    /// Fewest connections open or being opened by this worker; among equals as `RoundRobin`.
    LeastConnections,
}

/// Active checks: a connection is opened and closed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthPlan {
    /// From the end of one check to the begin of the next, give or take an eighth.
    pub interval: Duration,
    /// A check that takes longer has failed.
    pub timeout: Duration,
    /// Failed checks in a row that take a server out. At least 1 (0 is taken as 1).
    pub fall: u32,
    /// Passed checks in a row that bring it back. At least 1 (0 is taken as 1).
    pub rise: u32,
}

/// What a worker concludes from the connections it makes anyway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassivePlan {
    /// Failed connects in a row that eject a server. 0 ejects never.
    pub failures_max: u32,
    /// After this time one connection may try the server: it returns when that succeeds, else is ejected again.
    pub ejection: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamPlan {
    pub name: String,
    pub servers: Vec<ServerAddress>,
    pub balance: Balance,
    /// For all attempts together: what a client waits at most.
    pub connect_deadline: Duration,
    /// Servers tried for one connection, each once. At least 1 (0 is taken as 1).
    pub connect_attempts_max: usize,
    /// For the checks' own connections; who relays a client writes the client's header.
    pub proxy_protocol: Option<ProxyVersion>,
    /// Whether its header has the client's whole certificate.
    pub proxy_client_certificate: bool,
    /// Servers see the client's address as the source of its connections. Checks come from this host's own.
    pub transparent: bool,
    /// None: only `passive`.
    pub health: Option<HealthPlan>,
    pub passive: PassivePlan,
    /// How long a server that has returned gets less than its share. Zero: not at all.
    pub slow_start: Duration,
}

/// The service a client's bytes go to: several servers, one of which is chosen for each connection.
///
/// ```text
///              fall checks failed                       failures_max connects failed
///      CHECKED -------------------> DOWN      TRUSTED ------------------------------> EJECTED
///         ^     rise checks passed   |           ^        ejection over, one tries       |
///         +--------------------------+           +-------------- succeeded --------------+
/// ```
///
/// Both machines run for each server. *Down* is a fact, seen by a check a moment ago: a down server is never chosen, and
/// with all down `connect` fails at once (as HAProxy). *Ejected* is a guess from past connections, and no check
/// would correct it: an ejected server is the last choice, but it is tried when there is no other. A server that has *returned*
/// has cold caches and no connections of its own yet, so for `slow_start` it stands back for others, less and less often.
pub struct Upstream {
    plan: UpstreamPlan,
    servers: Vec<Rc<Server>>,
    /// Where the next search begins.
    next: Cell<usize>,
    stats: Arc<UpstreamStats>,
    on_change: OnceCell<OnChange>,
}

type OnChange = Box<dyn Fn(ServerChange<'_>)>;

/// A server left or returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerChange<'a> {
    pub upstream: &'a str,
    pub server: usize,
    pub address: &'a ServerAddress,
    pub up: bool,
    pub cause: ChangeCause,
}

/// Who noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeCause {
    Check,
    Connections,
}

impl Upstream {
    pub fn new(plan: UpstreamPlan) -> Rc<Self> {
        Self::replacing(None, plan)
    }

    /// After a reload. Servers that stay keep what is known about them, and their measurements go on; without a change
    /// it is `former` itself.
    pub fn succeeding(former: &Rc<Self>, plan: UpstreamPlan) -> Rc<Self> {
        if former.plan == plan { former.clone() } else { Self::replacing(Some(former), plan) }
    }

    fn replacing(former: Option<&Rc<Self>>, plan: UpstreamPlan) -> Rc<Self> {
        // Two names may have one address: each of its servers is succeeded once.
        let mut known: HashMap<_, Vec<_>> = HashMap::new();
        for server in former.iter().flat_map(|former| former.servers.iter().rev()) {
            known.entry(&server.address).or_default().push(server.as_ref());
        }
        let servers: Vec<_> = (0..plan.servers.len())
            .map(|index| (index, known.get_mut(&plan.servers[index]).and_then(Vec::pop)))
            .map(|(index, former)| Rc::new(Server::new(index, &plan, former)))
            .collect();
        let stats = Arc::new(UpstreamStats {
            name: plan.name.clone(),
            servers: servers.iter().map(|server| server.stats().clone()).collect(),
        });
        let next = Cell::new((random_fraction() * servers.len() as f64) as usize);
        Rc::new(Upstream { plan, servers, next, stats, on_change: OnceCell::new() })
    }

    /// Hears of every server that leaves or returns. To be called once, before the first `connect`; a second callback
    /// is ignored. It runs inside `connect` and `check_health` and must not call back into the upstream.
    pub fn on_change(&self, callback: impl Fn(ServerChange<'_>) + 'static) {
        let _ = self.on_change.set(Box::new(callback));
    }

    /// Connects to a server, with TCP_NODELAY; when that fails, to the next one, until `connect_attempts_max` or
    /// `connect_deadline`. Every attempt gets an equal share of the time that is left, so a server that answers nothing
    /// leaves time for the others. The error is the last attempt's. Dropping the future ends the attempt.
    ///
    /// `first` is what the caller writes first; `Connected::taken` says how much of it the server has already.
    pub async fn connect(&self, first: &[u8], on_behalf: OnBehalf) -> Result<Connected, ConnectError> {
        let connected = self.connect_next(&mut Tries::default(), first, on_behalf).await?;
        self.succeeded(&connected);
        Ok(connected)
    }

    /// As `connect`, where being connected is not all: the caller says whether it `succeeded` or `failed`, and after a failure
    /// may ask for the next server, with the same `tries`.
    pub async fn connect_next(
        &self,
        tries: &mut Tries,
        first: &[u8],
        on_behalf: OnBehalf,
    ) -> Result<Connected, ConnectError> {
        let deadline = Instant::now() + self.plan.connect_deadline;
        let mut error = ConnectError::NoServer;
        while let Some(share) = self.tries_left(tries)
            && let Some(lease) = self.choose(&tries.tried)
        {
            let deadline_in = deadline.saturating_duration_since(Instant::now()) / share;
            match lease.server().connect(first, on_behalf, deadline_in).await {
                Ok(Opened { stream, taken }) => {
                    return Ok(Connected { stream, taken, server: lease.server().index, lease });
                }
                Err(failed) => {
                    tries.tried.push(lease.server().index);
                    if failed.is_of_server() {
                        self.judge(&lease, Server::failed);
                    }
                    error = failed;
                }
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(error)
    }

    /// How many servers may still be tried, the one among them that is connected and not judged yet; None: no other.
    pub fn tries_left(&self, tries: &Tries) -> Option<u32> {
        let candidates = self.servers.iter().filter(|server| is_candidate(server, &tries.tried)).count();
        let left = self.plan.connect_attempts_max.max(1).saturating_sub(tries.tried.len()).min(candidates);
        u32::try_from(left).ok().filter(|left| *left > 0)
    }

    pub fn succeeded(&self, connected: &Connected) {
        self.judge(&connected.lease, |server, _| server.succeeded());
    }

    pub fn failed(&self, connected: &Connected, tries: &mut Tries) {
        tries.tried.push(connected.server);
        self.judge(&connected.lease, Server::failed);
    }

    fn judge(&self, lease: &Lease, verdict: impl FnOnce(&Server, &PassivePlan) -> Option<bool>) {
        let server = lease.server();
        if let Some(up) = verdict(server, &self.plan.passive) {
            self.tell(server, up, ChangeCause::Connections);
        }
    }

    /// Checks all servers at their intervals, for ever; dropping the future ends the checks. Returns at once without a
    /// health plan. Must run inside a `LocalSet`.
    pub async fn check_health(self: Rc<Self>) {
        health::check(self).await;
    }

    pub fn stats(&self) -> Arc<UpstreamStats> {
        self.stats.clone()
    }

    pub fn plan(&self) -> &UpstreamPlan {
        &self.plan
    }

    /// The best candidate: trusted before ejected, those that stand back last among them, then by balance. Begins its search behind the server chosen last.
    fn choose(&self, tried: &[usize]) -> Option<Lease> {
        let count = self.servers.len();
        let from = self.next.get();
        let in_turn = (0..count).map(|step| &self.servers[(from + step) % count]);
        let server = in_turn
            .filter(|server| is_candidate(server, tried))
            // The first of equals wins, which makes it round robin.
            .min_by_key(|server| {
                let connections = match self.plan.balance {
                    Balance::RoundRobin => 0,
                    Balance::LeastConnections => server.connections(),
                };
                (server.is_ejected(), server.stands_back(self.plan.slow_start), connections)
            })?;
        self.next.set((server.index + 1) % count);
        Some(server.lease(&self.plan.passive))
    }

    fn tell(&self, server: &Server, up: bool, cause: ChangeCause) {
        if let Some(callback) = self.on_change.get() {
            let (upstream, address) = (self.plan.name.as_str(), &server.address);
            callback(ServerChange { upstream, server: server.index, address, up, cause });
        }
    }
}

fn is_candidate(server: &Server, tried: &[usize]) -> bool {
    !server.is_down() && !tried.contains(&server.index)
}

/// From 0 up to but not including 1. Spreads load and checks; not for secrets.
fn random_fraction() -> f64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    (RandomState::new().build_hasher().finish() >> 11) as f64 / (1_u64 << 53) as f64
}

/// The servers that were tried for one client in vain. Allocates with the first.
#[derive(Default)]
pub struct Tries {
    tried: Vec<usize>,
}

/// A connection to a server.
#[derive(Debug)]
pub struct Connected {
    pub stream: Stream,
    /// How many of the first bytes the server has taken.
    pub taken: usize,
    /// Index into `UpstreamPlan::servers` and `UpstreamStats::servers`.
    pub server: usize,
    /// Counts as open until dropped; to be kept as long as the stream, also when the two are taken apart.
    pub lease: Lease,
}

/// Why no server was reached; the close reason is `upstream/connect/<reason>`.
#[derive(Debug)]
pub enum ConnectError {
    /// All servers are down by their checks, or there are none.
    NoServer,
    /// Nobody listens there, or (Unix) the listener's queue is full.
    Refused,
    /// No answer in time.
    Deadline,
    /// No route, no such host or network, or (Unix) no such path.
    Unreachable,
    /// The way would lead back to this host.
    Loop,
    /// Reset while connecting.
    Reset,
    /// Something on this side, e.g. no file descriptors or ports left; says nothing about the server.
    Other(io::Error),
}

impl ConnectError {
    /// Whether something seems to be wrong with the server, and not with this host, or with the client's wish.
    fn is_of_server(&self) -> bool {
        !matches!(self, Self::Other(_) | Self::NoServer | Self::Loop)
    }

    /// One of `CONNECT_REASONS`.
    pub fn reason(&self) -> &'static str {
        match self {
            ConnectError::NoServer => "no_server",
            ConnectError::Refused => "refused",
            ConnectError::Deadline => "deadline",
            ConnectError::Unreachable => "unreachable",
            ConnectError::Loop => "loop",
            ConnectError::Reset => "reset",
            ConnectError::Other(_) => "other",
        }
    }
}

/// Every `ConnectError::reason`.
pub const CONNECT_REASONS: [&str; 7] =
    ["no_server", "refused", "deadline", "unreachable", "loop", "reset", "other"];

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::*;
        match error.kind() {
            // A Unix socket answers EAGAIN when the listener's queue is full.
            ConnectionRefused | WouldBlock => ConnectError::Refused,
            TimedOut => ConnectError::Deadline,
            HostUnreachable | NetworkUnreachable | NetworkDown | NotFound => ConnectError::Unreachable,
            ConnectionReset | ConnectionAborted | BrokenPipe | NotConnected => ConnectError::Reset,
            _ => ConnectError::Other(error),
        }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::Other(error) => write!(formatter, "other: {error}"),
            _ => formatter.write_str(self.reason()),
        }
    }
}

impl std::error::Error for ConnectError {}

/// Read by the JavaScript thread.
#[derive(Debug)]
pub struct UpstreamStats {
    pub name: String,
    /// In the plan's order.
    pub servers: Vec<Arc<ServerStats>>,
}

#[derive(Debug)]
pub struct ServerStats {
    pub address: String,
    /// 1, or 0 while down or ejected.
    pub up: Gauge,
    /// Open or being opened.
    pub connections_open: Gauge,
    /// Attempts by outcome, in the order of `CONNECT_OUTCOMES`. Checks are not counted.
    pub connects: [Counter; CONNECT_OUTCOMES.len()],
    /// Of the attempts that succeeded.
    pub connect_latency: Histogram,
    /// Full and resumed.
    handshakes: [Histogram; 2],
}

/// How an attempt can end: `ok`, `cancelled` (the client left first), or a reason of `ConnectError`.
pub const CONNECT_OUTCOMES: [&str; 8] =
    ["ok", "cancelled", "refused", "deadline", "unreachable", "loop", "reset", "other"];

impl ServerStats {
    fn of(address: &ServerAddress) -> Self {
        ServerStats {
            address: address.to_string(),
            up: Gauge::default(),
            connections_open: Gauge::default(),
            connects: Default::default(),
            connect_latency: Histogram::default(),
            handshakes: Default::default(),
        }
    }

    /// Of the TLS handshakes with the server that finished.
    pub fn handshake(&self, resumed: bool) -> &Histogram {
        &self.handshakes[usize::from(resumed)]
    }

    /// Attempts that ended with `outcome`, one of `CONNECT_OUTCOMES`; None for any other word.
    pub fn connects(&self, outcome: &str) -> Option<&Counter> {
        CONNECT_OUTCOMES.iter().position(|known| *known == outcome).map(|index| &self.connects[index])
    }
}
