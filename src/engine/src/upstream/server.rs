//! Owns what is known about one server: whether it is down or ejected, how many connections are open, and one attempt
//! to connect. Knows nothing of the other servers. Runs on the I/O thread.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout};

use super::{
    ConnectError, HealthPlan, OnBehalf, PassivePlan, ServerAddress, ServerStats, UpstreamPlan,
    random_fraction,
};
use crate::stream::Stream;
use crate::transparent::{bind_as_client, loops};

/// Of its turns, that a server takes at the begin of its slow start: enough to see that it works.
const SLOW_START_SHARE_MIN: f64 = 0.1;

pub struct Server {
    pub index: usize,
    pub address: ServerAddress,
    transparent: bool,
    /// By the checks.
    down: Cell<bool>,
    /// Checks in a row that contradict `down`.
    contradictions: Cell<u32>,
    /// Failed connects in a row.
    failures: Cell<u32>,
    /// Invariant: Some exactly while ejected. Once it has passed, one connection may try, which moves it on.
    ejected_until: Cell<Option<Instant>>,
    /// When it came up again; None: it was never away.
    returned_at: Cell<Option<Instant>>,
    stats: Arc<ServerStats>,
}

impl Server {
    /// A server is taken as up until something shows otherwise: a start need not wait for the first checks. What its
    /// `former` self has shown holds for it too, but a server that nothing checks any more cannot stay down.
    pub fn new(index: usize, plan: &UpstreamPlan, former: Option<&Server>) -> Self {
        let address = plan.servers[index].clone();
        let stats = former.map_or_else(|| Arc::new(ServerStats::of(&address)), |former| former.stats.clone());
        let server = Server {
            index,
            address,
            transparent: plan.transparent,
            down: Cell::new(former.is_some_and(Server::is_down) && plan.health.is_some()),
            contradictions: Cell::new(0),
            failures: Cell::new(former.map_or(0, |former| former.failures.get())),
            ejected_until: Cell::new(former.and_then(|former| former.ejected_until.get())),
            returned_at: Cell::new(former.and_then(|former| former.returned_at.get())),
            stats,
        };
        server.stats.up.set(i64::from(server.is_up()));
        server
    }

    /// Shared with its successors.
    pub fn stats(&self) -> &Arc<ServerStats> {
        &self.stats
    }

    pub fn is_down(&self) -> bool {
        self.down.get()
    }

    /// False again when the ejection is over and nobody has tried yet.
    pub fn is_ejected(&self) -> bool {
        self.ejected_until.get().is_some_and(|until| Instant::now() < until)
    }

    /// Whether another server should get this connection: often at first, and never when the slow start is over.
    pub fn stands_back(&self, slow_start: Duration) -> bool {
        let Some(since) = self.returned_at.get().map(|returned| returned.elapsed()) else { return false };
        if since >= slow_start {
            return false;
        }
        let share = (since.as_secs_f64() / slow_start.as_secs_f64()).max(SLOW_START_SHARE_MIN);
        random_fraction() >= share
    }

    /// Open or being opened.
    pub fn connections(&self) -> i64 {
        self.stats().connections_open.get()
    }

    /// To be taken before the connection is tried, so that connects at the same moment see each other.
    pub fn lease(self: &Rc<Self>, passive: &PassivePlan) -> Lease {
        if self.ejected_until.get().is_some() {
            // This one tries; all others stay away until it has succeeded or another ejection has passed.
            self.ejected_until.set(Some(Instant::now() + passive.ejection));
        }
        self.stats().connections_open.add(1);
        Lease(self.clone())
    }

    /// One attempt for a client, counted. Otherwise as `open`.
    pub async fn connect(
        &self,
        first: &[u8],
        on_behalf: OnBehalf,
        deadline_in: Duration,
    ) -> Result<Opened, ConnectError> {
        let started = Instant::now();
        let mut attempt = Attempt { stats: self.stats(), outcome: "cancelled" };
        let opened = self.open(first, Some(on_behalf), deadline_in).await;
        attempt.outcome = opened.as_ref().map_or_else(ConnectError::reason, |_| "ok");
        if opened.is_ok() {
            self.stats().connect_latency.observe(started.elapsed());
        }
        opened
    }

    /// One attempt, not counted. `first` is what will be written at the beginning; a check is on behalf of nobody.
    pub async fn open(
        &self,
        first: &[u8],
        on_behalf: Option<OnBehalf>,
        deadline_in: Duration,
    ) -> Result<Opened, ConnectError> {
        let source = on_behalf.filter(|_| self.transparent).map(|on_behalf| on_behalf.client.ip());
        let open = async {
            match &self.address {
                ServerAddress::Tcp(address) => Ok(open_tcp(*address, source, first).await?),
                ServerAddress::Original => {
                    let wanted = on_behalf.and_then(|it| it.destination.map(|wanted| (it.client, wanted)));
                    let (client, wanted) = wanted.ok_or(ConnectError::NoServer)?;
                    if loops(client, wanted, self.transparent) {
                        return Err(ConnectError::Loop);
                    }
                    Ok(open_tcp(wanted, source, first).await?)
                }
                ServerAddress::Unix(path) => {
                    Ok(Opened { stream: Stream::Unix(UnixStream::connect(path).await?), taken: 0 })
                }
            }
        };
        timeout(deadline_in, open).await.unwrap_or(Err(ConnectError::Deadline))
    }

    /// Learns from a client's attempt. Some(up) when that changed the server's standing.
    pub fn succeeded(&self) -> Option<bool> {
        let before = self.is_up();
        self.failures.set(0);
        self.ejected_until.set(None);
        self.publish(before)
    }

    /// As `succeeded`, of an attempt that says that something is wrong with the server.
    pub fn failed(&self, passive: &PassivePlan) -> Option<bool> {
        // Each client wants another server: one that is gone says nothing about the next.
        if self.address == ServerAddress::Original {
            return None;
        }
        let before = self.is_up();
        self.failures.set(self.failures.get().saturating_add(1));
        if passive.failures_max > 0 && self.failures.get() >= passive.failures_max {
            self.ejected_until.set(Some(Instant::now() + passive.ejection));
        }
        self.publish(before)
    }

    /// Learns from a check. Some(up) when that changed the server's standing.
    pub fn checked(&self, passed: bool, health: &HealthPlan) -> Option<bool> {
        let before = self.is_up();
        if passed != self.down.get() {
            self.contradictions.set(0);
            return None;
        }
        self.contradictions.set(self.contradictions.get() + 1);
        let needed = if passed { health.rise } else { health.fall };
        if self.contradictions.get() >= needed {
            self.contradictions.set(0);
            self.down.set(!passed);
        }
        self.publish(before)
    }

    fn is_up(&self) -> bool {
        !self.down.get() && self.ejected_until.get().is_none()
    }

    fn publish(&self, before: bool) -> Option<bool> {
        let up = self.is_up();
        self.stats().up.set(i64::from(up));
        if up && !before {
            self.returned_at.set(Some(Instant::now()));
        }
        (up != before).then_some(up)
    }
}

/// A connection to a server.
pub struct Opened {
    pub stream: Stream,
    /// How many of the first bytes it has taken already.
    pub taken: usize,
}

/// Connects with TCP_NODELAY. With `first` in hand the acknowledgement that ends TCP's handshake is left to them, and where
/// the server is so near that it has answered already, they are written without waiting for the event that says so.
async fn open_tcp(address: SocketAddr, source: Option<IpAddr>, first: &[u8]) -> io::Result<Opened> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    if let Some(source) = source {
        bind_as_client(&socket, source, address.ip())?;
    }
    if !first.is_empty() {
        // For this one acknowledgement; the kernel returns to quick ones by itself (tcp(7)).
        socket.set_tcp_quickack(false)?;
    }
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => {}
    }
    // Before anything is sent: what fails afterwards must not have given a server bytes that the next one will get too.
    let tcp = TcpStream::from_std(socket.into())?;
    let taken = match first {
        [] => 0,
        first => match SockRef::from(&tcp).send_with_flags(first, libc::MSG_NOSIGNAL) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            taken => taken?,
        },
    };
    if taken == 0 {
        tcp.writable().await?;
        if let Some(error) = tcp.take_error()? {
            return Err(error);
        }
    }
    Ok(Opened { stream: Stream::Tcp(tcp), taken })
}

/// One connection, open or being opened, in the server's count.
pub struct Lease(Rc<Server>);

impl Lease {
    pub(super) fn server(&self) -> &Server {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.stats().connections_open.add(-1);
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Lease({})", self.0.address)
    }
}

/// Counts an attempt when it ends, however it ends: a future that is dropped ends as its initial outcome.
struct Attempt<'a> {
    stats: &'a ServerStats,
    outcome: &'static str,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let counter = self.stats.connects(self.outcome);
        debug_assert!(counter.is_some(), "CONNECT_OUTCOMES lacks {}", self.outcome);
        if let Some(counter) = counter {
            counter.add(1);
        }
    }
}
