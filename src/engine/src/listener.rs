//! Owns a listener inside a worker: accepting from its sockets, its limits, its measurements. The sockets were opened by
//! the primary and are shared with it and the sibling workers: nothing here may change their flags or shut them down.
//! I/O thread only.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::task::spawn_local;
use tokio::time::sleep;

use crate::close::{Close, CloseCounters};
use crate::connection::{Life, serve};
use crate::relay::{RelayBytes, Scratch};
use crate::stats::{Counter, Gauge, Histogram};
use crate::stream::Stream;
use crate::upstream::Upstream;

/// How long accepting rests when the process or the host is out of file descriptors or memory.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// A listener's settings, checked.
pub struct ListenerPlan {
    pub name: String,
    pub tls_config: Arc<ServerConfig>,
    pub upstream: String,
    pub handshake_deadline: Duration,
    pub idle_deadline: Duration,
    pub half_closed_deadline: Duration,
    pub lifetime_deadline: Option<Duration>,
    /// In this worker.
    pub connections_max: usize,
    /// In this worker.
    pub handshakes_max: usize,
    /// File descriptors of this worker's listening sockets.
    pub sockets: Vec<RawFd>,
}

pub struct Listener {
    pub plan: ListenerPlan,
    pub upstream: Rc<Upstream>,
    pub scratch: Rc<Scratch>,
    pub stats: Arc<ListenerStats>,
    pub closes: Arc<CloseCounters>,
}

#[derive(Default)]
pub struct ListenerStats {
    pub accepted: Counter,
    /// accept() failed for want of file descriptors or memory.
    pub accept_failures: Counter,
    pub connections_open: Gauge,
    pub handshakes_in_flight: Gauge,
    pub relay_bytes: RelayBytes,
    /// Full TLS 1.2, resumed 1.2, full 1.3, resumed 1.3.
    handshakes: [Histogram; 4],
}

impl ListenerStats {
    pub fn handshake(&self, tls13: bool, resumed: bool) -> &Histogram {
        &self.handshakes[usize::from(tls13) * 2 + usize::from(resumed)]
    }
}

/// Accepts from a listening socket until the task is aborted. The socket itself stays open: it is the primary's.
///
/// # Errors
/// `fd` is not a listening TCP socket.
pub fn accept_from(listener: Rc<Listener>, fd: RawFd) -> io::Result<tokio::task::AbortHandle> {
    if fd < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: not negative; inherited for the life of the process, and nobody closes it. A number that is not open makes
    // the duplication fail.
    let socket = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
    let socket = TcpListener::from_std(socket.into())?;
    Ok(spawn_local(accept(listener, socket)).abort_handle())
}

async fn accept(listener: Rc<Listener>, socket: TcpListener) {
    loop {
        match socket.accept().await {
            Ok((client, source)) => {
                listener.stats.accepted.add(1);
                match listener.over_limit() {
                    // Counted now and not when the task first runs, so that a burst meets the limits.
                    None => {
                        drop(spawn_local(serve(Life::begin(listener.clone()), Stream::Tcp(client), source)))
                    }
                    Some(close) => {
                        // A reset costs neither side a wait, and no TIME_WAIT here.
                        Stream::Tcp(client).abort();
                        listener.closes.count(close);
                    }
                }
            }
            // The primary has shut it: the order to drain is on its way.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            Err(error) if is_of_the_connection(&error) => listener.closes.count(Close::ClientAcceptReset),
            Err(_) => {
                listener.stats.accept_failures.add(1);
                sleep(ACCEPT_BACKOFF).await;
            }
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
    fn over_limit(&self) -> Option<Close> {
        let at_least = |gauge: &Gauge, max: usize| usize::try_from(gauge.get()).is_ok_and(|now| now >= max);
        if at_least(&self.stats.connections_open, self.plan.connections_max) {
            Some(Close::ProxyAcceptConnectionLimit)
        } else if at_least(&self.stats.handshakes_in_flight, self.plan.handshakes_max) {
            Some(Close::ProxyAcceptHandshakeLimit)
        } else {
            None
        }
    }
}
