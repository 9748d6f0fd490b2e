//! Owns the worker's I/O thread: its runtime, the listeners on it, and the few orders that the JavaScript thread gives.
//! Knows nothing of Node-API.

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{AbortHandle, LocalSet, spawn_local};

use crate::close::CloseCounters;
use crate::listener::{Listener, ListenerPlan, ListenerStats, accept_from};
use crate::relay::Scratch;
use crate::upstream::{Upstream, UpstreamPlan, UpstreamStats};

/// How often a joining thread is looked at: `JoinHandle` has no join with a deadline.
const JOIN_POLL: Duration = Duration::from_millis(1);

/// The running I/O thread, as the JavaScript thread holds it.
pub struct IoThread {
    orders: UnboundedSender<Order>,
    thread: Option<JoinHandle<()>>,
    pub stats: IoStats,
}

/// Everything the I/O thread measures, shared for reading.
#[derive(Clone)]
pub struct IoStats {
    pub listeners: Vec<(String, Arc<ListenerStats>)>,
    pub upstreams: Vec<Arc<UpstreamStats>>,
    pub closes: Arc<CloseCounters>,
    /// False once the thread has ended, for whatever reason.
    pub running: Arc<AtomicBool>,
}

enum Order {
    /// Accept on this socket too: a sibling's, until the sibling is back.
    Accept {
        listener: String,
        fd: RawFd,
    },
    StopAccepting {
        fd: RawFd,
    },
    Drain,
    Stop,
}

impl IoThread {
    /// Starts the thread; returns when it accepts.
    ///
    /// # Errors
    /// The thread or its runtime cannot be made, or a descriptor is not a listening socket.
    pub fn start(listeners: Vec<ListenerPlan>, upstreams: Vec<UpstreamPlan>) -> io::Result<Self> {
        let (orders, inbox) = unbounded_channel();
        let (started, start) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("keygate-io".into())
            .spawn(move || run(listeners, upstreams, inbox, &started))?;
        let stats = start.recv().map_err(|_| io::Error::other("the I/O thread ended while it started"))??;
        Ok(Self { orders, thread: Some(thread), stats })
    }

    pub fn accept(&self, listener: String, fd: RawFd) {
        self.order(Order::Accept { listener, fd });
    }

    pub fn stop_accepting(&self, fd: RawFd) {
        self.order(Order::StopAccepting { fd });
    }

    /// Accepts nothing any more; what is established goes on. `connections_open` tells when the last one has ended.
    pub fn drain(&self) {
        self.order(Order::Drain);
    }

    /// Ends the thread and every connection on it. False if it has not ended within `budget`.
    pub fn stop(&mut self, budget: Duration) -> bool {
        self.order(Order::Stop);
        let until = Instant::now() + budget;
        let Some(thread) = self.thread.take() else { return true };
        while !thread.is_finished() {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(JOIN_POLL);
        }
        // An error is the panic that ended it; `running` has told already.
        let _ = thread.join();
        true
    }

    /// An order to a thread that has ended is moot.
    fn order(&self, order: Order) {
        let _ = self.orders.send(order);
    }
}

fn run(
    listeners: Vec<ListenerPlan>,
    upstreams: Vec<UpstreamPlan>,
    inbox: UnboundedReceiver<Order>,
    started: &std::sync::mpsc::Sender<io::Result<IoStats>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build() {
        Ok(runtime) => runtime,
        Err(error) => return drop(started.send(Err(error))),
    };
    let tasks = LocalSet::new();
    tasks.block_on(&runtime, async {
        match Io::start(listeners, upstreams) {
            Err(error) => drop(started.send(Err(error))),
            Ok(io) => {
                let _ended = MarkEnded(io.running.clone());
                drop(started.send(Ok(io.stats())));
                io.obey(inbox).await;
            }
        }
    });
    // Dropping the set drops every task, and with it every connection: each counts its own end.
}

struct Io {
    listeners: HashMap<String, Rc<Listener>>,
    upstreams: Vec<Rc<Upstream>>,
    closes: Arc<CloseCounters>,
    accepting: HashMap<RawFd, AbortHandle>,
    running: Arc<AtomicBool>,
}

impl Io {
    fn start(plans: Vec<ListenerPlan>, upstream_plans: Vec<UpstreamPlan>) -> io::Result<Self> {
        let scratch = Rc::new(Scratch::default());
        let closes = Arc::new(CloseCounters::default());
        let upstreams: Vec<_> = upstream_plans.into_iter().map(Upstream::new).collect();
        let mut io = Self {
            listeners: HashMap::new(),
            closes: closes.clone(),
            accepting: HashMap::new(),
            running: Arc::new(AtomicBool::new(true)),
            upstreams,
        };
        for plan in plans {
            let upstream = io.upstreams.iter().find(|upstream| upstream.plan().name == plan.upstream);
            let upstream = upstream.cloned().ok_or_else(|| {
                io::Error::other(format!("listener {}: no upstream {}", plan.name, plan.upstream))
            })?;
            let name = plan.name.clone();
            let sockets = plan.sockets.clone();
            let listener = Rc::new(Listener {
                plan,
                upstream,
                scratch: scratch.clone(),
                stats: Arc::new(ListenerStats::default()),
                closes: closes.clone(),
            });
            io.listeners.insert(name.clone(), listener);
            for fd in sockets {
                io.accept(&name, fd)?;
            }
        }
        for upstream in &io.upstreams {
            spawn_local(upstream.clone().check_health());
        }
        Ok(io)
    }

    fn stats(&self) -> IoStats {
        IoStats {
            listeners: self
                .listeners
                .iter()
                .map(|(name, listener)| (name.clone(), listener.stats.clone()))
                .collect(),
            upstreams: self.upstreams.iter().map(|upstream| upstream.stats()).collect(),
            closes: self.closes.clone(),
            running: self.running.clone(),
        }
    }

    async fn obey(mut self, mut inbox: UnboundedReceiver<Order>) {
        while let Some(order) = inbox.recv().await {
            match order {
                // A socket that cannot be adopted is the sibling's again when it is back; nothing is lost meanwhile.
                Order::Accept { listener, fd } => drop(self.accept(&listener, fd)),
                Order::StopAccepting { fd } => self.stop_accepting(fd),
                Order::Drain => {
                    for (_, task) in self.accepting.drain() {
                        task.abort();
                    }
                }
                Order::Stop => return,
            }
        }
    }

    fn accept(&mut self, listener: &str, fd: RawFd) -> io::Result<()> {
        let listener = self
            .listeners
            .get(listener)
            .ok_or_else(|| io::Error::other(format!("no listener {listener}")))?;
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.accepting.entry(fd) {
            vacant.insert(accept_from(listener.clone(), fd)?);
        }
        Ok(())
    }

    fn stop_accepting(&mut self, fd: RawFd) {
        if let Some(task) = self.accepting.remove(&fd) {
            task.abort();
        }
    }
}

/// Tells the JavaScript thread also when the I/O thread ends by a panic.
struct MarkEnded(Arc<AtomicBool>);

impl Drop for MarkEnded {
    fn drop(&mut self) {
        self.0.store(false, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::close::CLOSE_REASONS;
    use crate::process::open_listener;
    use crate::tls::tests::configured;
    use crate::upstream::{Balance, PassivePlan};
    use std::io::Read;
    use std::net::{SocketAddr, TcpStream};

    const SHORT: Duration = Duration::from_secs(10);

    fn started(connections_max: usize) -> (IoThread, RawFd, SocketAddr) {
        let (fd, address) = open_listener(([127, 0, 0, 1], 0).into(), 256).expect("a port");
        let listener = ListenerPlan {
            name: "https".into(),
            tls_config: configured("1.3", "X25519").0,
            upstream: "web".into(),
            handshake_deadline: SHORT,
            idle_deadline: SHORT,
            half_closed_deadline: SHORT,
            lifetime_deadline: None,
            connections_max,
            handshakes_max: 1000,
            sockets: Vec::new(),
        };
        let upstream = UpstreamPlan {
            name: "web".into(),
            servers: Vec::new(),
            balance: Balance::RoundRobin,
            connect_deadline: SHORT,
            connect_attempts_max: 1,
            proxy_protocol: None,
            health: None,
            passive: PassivePlan { failures_max: 0, ejection: SHORT },
        };
        let io = IoThread::start(vec![listener], vec![upstream]).expect("a thread");
        (io, fd, address)
    }

    fn until(condition: impl Fn() -> bool) {
        let give_up = Instant::now() + SHORT;
        while !condition() {
            assert!(Instant::now() < give_up, "it did not come to pass");
            std::thread::sleep(JOIN_POLL);
        }
    }

    fn closed(io: &IoThread, reason: &str) -> u64 {
        let of_reason = CLOSE_REASONS.iter().position(|words| words.reason == reason).expect("a reason");
        io.stats.closes.counts().nth(of_reason).map_or(0, |(_, count)| count)
    }

    #[test]
    fn a_burst_meets_the_connection_limit() {
        let (mut io, fd, address) = started(10);
        // All are in the accept queue before the first is accepted.
        let clients: Vec<_> = (0..100).map(|_| TcpStream::connect(address).expect("queued")).collect();
        io.accept("https".into(), fd);
        let stats = io.stats.listeners[0].1.clone();
        until(|| stats.accepted.get() == 100);
        assert_eq!(stats.connections_open.get(), 10);
        assert_eq!(closed(&io, "connection_limit"), 90);
        drop(clients);
        assert!(io.stop(SHORT));
    }

    #[test]
    fn stopping_counts_the_end_of_every_connection_that_was_accepted() {
        let (mut io, fd, address) = started(100);
        io.accept("https".into(), fd);
        let mut client = TcpStream::connect(address).expect("queued");
        let stats = io.stats.listeners[0].1.clone();
        until(|| stats.connections_open.get() == 1);
        assert!(io.stop(SHORT));
        assert!(!io.stats.running.load(SeqCst));
        assert_eq!(stats.connections_open.get(), 0);
        assert_eq!(io.stats.closes.counts().map(|(_, count)| count).sum::<u64>(), 1);
        assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)));
    }

    #[test]
    fn a_socket_that_was_left_to_the_sibling_is_not_accepted_from() {
        let (mut io, fd, address) = started(100);
        io.accept("https".into(), fd);
        let first = TcpStream::connect(address).expect("queued");
        let stats = io.stats.listeners[0].1.clone();
        until(|| stats.accepted.get() == 1);
        io.stop_accepting(fd);
        let second = TcpStream::connect(address).expect("the socket is still open");
        io.accept("https".into(), fd);
        until(|| stats.accepted.get() == 2);
        drop((first, second));
        assert!(io.stop(SHORT));
    }

    #[test]
    fn a_descriptor_that_is_no_socket_is_ignored() {
        let (mut io, _, _) = started(1);
        io.accept("https".into(), -1);
        io.accept("nothing of this name".into(), 0);
        io.drain();
        assert!(io.stop(SHORT));
    }
}
