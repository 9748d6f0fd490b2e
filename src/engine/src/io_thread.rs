//! Owns the worker's I/O thread: its runtime, the listeners on it, and the few orders that the JavaScript thread gives.
//! Knows nothing of Node-API.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{AbortHandle, LocalSet, spawn_local};

use crate::access_log::{AccessCounts, AccessLog, AccessPlan};
use crate::client_rate::ClientRate;
use crate::close::CloseCounters;
use crate::handover;
use crate::listener::{
    CurrentOffer, Listener, ListenerPlan, ListenerStats, ListenerTls, Offer, accept_from, accept_waiting,
    socket_of,
};
use crate::log::Log;
use crate::policy::NegotiatedCounters;
use crate::process::{ThreadClock, parent_end};
use crate::relay::Scratch;
use crate::routing::{Router, Target};
use crate::sockets::Sockets;
use crate::upstream::{Upstream, UpstreamPlan, UpstreamStats};
use crate::upstream_tls::UpstreamTls;

/// How often a joining thread is looked at: `JoinHandle` has no join with a deadline.
const JOIN_POLL: Duration = Duration::from_millis(1);
/// The I/O thread waits for nobody, so an answer that takes longer will not come.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// What a configuration is to this thread.
pub struct IoPlan {
    /// With TLS where it ends here.
    pub listeners: Vec<(ListenerPlan, Option<ListenerTls>)>,
    /// With TLS where it is spoken to them.
    pub upstreams: Vec<(UpstreamPlan, Option<Arc<UpstreamTls>>)>,
    pub access: AccessPlan,
}

/// The running I/O thread, as the JavaScript thread holds it.
pub struct IoThread {
    orders: UnboundedSender<Order>,
    thread: Option<JoinHandle<()>>,
    pub stats: IoStats,
}

/// Everything the I/O thread measures, shared for reading.
#[derive(Clone)]
pub struct IoStats {
    /// Also those that a reload has removed, until the reload after their last connection has ended.
    pub listeners: Vec<(String, Arc<ListenerStats>)>,
    pub upstreams: Vec<Arc<UpstreamStats>>,
    pub closes: Arc<CloseCounters>,
    pub negotiated: Arc<NegotiatedCounters>,
    pub access: Arc<AccessCounts>,
    /// How much of its core the thread has used; at one second a second it is what a worker is limited by.
    pub cpu: ThreadClock,
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
    TakeOver {
        reload: u32,
        answer: mpsc::Sender<io::Result<Vec<RawFd>>>,
    },
    Prepare {
        plan: IoPlan,
        answer: mpsc::Sender<io::Result<()>>,
    },
    Commit {
        answer: mpsc::Sender<IoStats>,
    },
    Discard,
    Drain,
    /// Nobody will accept from these sockets any more, or ever has: those of a reload that came to nothing.
    Retire {
        fds: Vec<RawFd>,
        answer: mpsc::Sender<()>,
    },
    Stop,
}

impl IoThread {
    /// Starts the thread; returns when it accepts.
    ///
    /// # Errors
    /// The thread or its runtime cannot be made, or a descriptor of the plan is not a listening socket among `sockets`.
    pub fn start(plan: IoPlan, access_log: Log, sockets: Sockets) -> io::Result<Self> {
        let (orders, inbox) = unbounded_channel();
        let (started, start) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("keygate-io".into())
            .spawn(move || run(plan, access_log, sockets, inbox, &started))?;
        let stats = start.recv().map_err(|_| io::Error::other("the I/O thread ended while it started"))??;
        Ok(Self { orders, thread: Some(thread), stats })
    }

    pub fn accept(&self, listener: String, fd: RawFd) {
        self.order(Order::Accept { listener, fd });
    }

    pub fn stop_accepting(&self, fd: RawFd) {
        self.order(Order::StopAccepting { fd });
    }

    /// Takes the sockets that the primary has sent for this reload, in their order. Who does not want them retires them.
    ///
    /// # Errors
    /// As recvmsg(2); or the thread drains.
    pub fn take_over(&self, reload: u32) -> io::Result<Vec<RawFd>> {
        self.ask(|answer| Order::TakeOver { reload, answer })?
    }

    /// Makes everything of a plan that can fail, beside what serves. In place of what was prepared before.
    ///
    /// # Errors
    /// A descriptor is not a listening socket, an upstream is not there, or the thread drains.
    pub fn prepare(&self, plan: IoPlan) -> io::Result<()> {
        self.ask(|answer| Order::Prepare { plan, answer })?
    }

    /// What was prepared serves from now on; connections that are there go on with what they began with.
    ///
    /// # Errors
    /// The thread has ended. (Nothing else can fail: without a prepared plan, nothing changes.)
    pub fn commit(&mut self) -> io::Result<()> {
        self.stats = self.ask(|answer| Order::Commit { answer })?;
        Ok(())
    }

    /// Forgets what was prepared.
    pub fn discard(&self) {
        self.order(Order::Discard);
    }

    /// Accepts nothing any more, and closes the sockets: they are for others. What is established goes on; `connections_open`
    /// tells when the last one has ended.
    pub fn drain(&self) {
        self.order(Order::Drain);
    }

    /// From these sockets what waits is accepted, because nobody else will, then they are closed.
    ///
    /// # Errors
    /// The thread does not answer.
    pub fn retire(&self, fds: Vec<RawFd>) -> io::Result<()> {
        self.ask(|answer| Order::Retire { fds, answer })
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

    fn ask<T>(&self, order: impl FnOnce(mpsc::Sender<T>) -> Order) -> io::Result<T> {
        let (answer, answered) = mpsc::channel();
        self.order(order(answer));
        answered.recv_timeout(ANSWER_DEADLINE).map_err(|_| io::Error::other("the I/O thread does not answer"))
    }
}

fn run(
    plan: IoPlan,
    access_log: Log,
    sockets: Sockets,
    inbox: UnboundedReceiver<Order>,
    started: &mpsc::Sender<io::Result<IoStats>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build() {
        Ok(runtime) => runtime,
        Err(error) => return drop(started.send(Err(error))),
    };
    let tasks = LocalSet::new();
    tasks.block_on(&runtime, async {
        match Io::start(plan, access_log, sockets) {
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

async fn heard(parent_end: &UnixStream) {
    // An error is the runtime's end, and says nothing of the parent.
    if parent_end.readable().await.is_err() {
        pending::<()>().await;
    }
}

/// The primary, which lives, wants nothing more of this worker.
async fn bidden_farewell(channel: Option<&UnixStream>) {
    let Some(channel) = channel else { return pending().await };
    while let Ok(ready) = channel.ready(Interest::READABLE).await {
        if !ready.is_read_closed() {
            // Sockets of a reload, which are taken when the worker is told of it: until then there is nothing to read.
            let _ = channel.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        } else if handover::is_closed(channel.as_raw_fd()) {
            break; // its end is heard otherwise
        } else {
            return;
        }
    }
    pending().await
}

struct Io {
    listeners: HashMap<String, CurrentOffer>,
    /// Removed by reloads.
    departed: HashMap<String, Arc<ListenerStats>>,
    upstreams: Vec<CheckedUpstream>,
    sockets: Sockets,
    accepting: HashMap<RawFd, Accepting>,
    parent_end: UnixStream,
    /// None: nothing more is to be heard.
    channel: Option<UnixStream>,
    prepared: Option<Prepared>,
    draining: bool,
    scratch: Rc<Scratch>,
    closes: Arc<CloseCounters>,
    negotiated: Arc<NegotiatedCounters>,
    access_log: Rc<AccessLog>,
    cpu: ThreadClock,
    running: Arc<AtomicBool>,
}

struct CheckedUpstream {
    upstream: Rc<Upstream>,
    tls: Option<Arc<UpstreamTls>>,
    checks: AbortHandle,
}

struct Accepting {
    offer: CurrentOffer,
    task: AbortHandle,
}

struct Prepared {
    plan: IoPlan,
    /// Those that are not accepted from yet, or for another listener.
    sockets: Vec<(String, RawFd, TcpListener)>,
}

impl Io {
    fn start(plan: IoPlan, access_log: Log, sockets: Sockets) -> io::Result<Self> {
        let watched = |channel| {
            let channel = std::os::unix::net::UnixStream::from(channel);
            channel.set_nonblocking(true)?;
            UnixStream::from_std(channel)
        };
        let channel = sockets.channel()?.map(watched).transpose()?;
        let mut io = Self {
            channel,
            listeners: HashMap::new(),
            departed: HashMap::new(),
            upstreams: Vec::new(),
            sockets,
            accepting: HashMap::new(),
            parent_end: UnixStream::from_std(parent_end()?)?,
            prepared: None,
            draining: false,
            scratch: Rc::new(Scratch::default()),
            closes: Arc::new(CloseCounters::default()),
            negotiated: Arc::new(NegotiatedCounters::default()),
            access_log: Rc::new(AccessLog::new(AccessPlan::default(), access_log, Arc::default())),
            cpu: ThreadClock::of_this_thread()?,
            running: Arc::new(AtomicBool::new(true)),
        };
        io.prepare(plan)?;
        io.commit();
        Ok(io)
    }

    fn stats(&self) -> IoStats {
        let listeners = self
            .listeners
            .iter()
            .map(|(name, offer)| (name.clone(), offer.borrow().listener.stats.clone()))
            .chain(self.departed.iter().map(|(name, stats)| (name.clone(), stats.clone())));
        IoStats {
            listeners: listeners.collect(),
            upstreams: self.upstreams.iter().map(|checked| checked.upstream.stats()).collect(),
            closes: self.closes.clone(),
            negotiated: self.negotiated.clone(),
            access: self.access_log.counts.clone(),
            cpu: self.cpu.clone(),
            running: self.running.clone(),
        }
    }

    async fn obey(mut self, mut inbox: UnboundedReceiver<Order>) {
        let mut is_orphan = false;
        loop {
            let order = tokio::select! {
                order = inbox.recv() => order,
                () = heard(&self.parent_end), if !is_orphan => {
                    is_orphan = true;
                    self.outlive_parent();
                    continue;
                }
                () = bidden_farewell(self.channel.as_ref()) => {
                    self.drain();
                    continue;
                }
            };
            // Who asked and does not listen any more has given up this thread.
            let Some(order) = order else { return };
            match order {
                // A socket that cannot be adopted is the sibling's again when it is back; nothing is lost meanwhile.
                Order::Accept { listener, fd } => drop(self.adopt(&listener, fd)),
                Order::StopAccepting { fd } => self.stop_accepting(fd),
                Order::TakeOver { reload, answer } => drop(answer.send(self.sockets.take_over(reload))),
                Order::Prepare { plan, answer } => drop(answer.send(self.prepare(plan))),
                Order::Commit { answer } => {
                    self.commit();
                    drop(answer.send(self.stats()));
                }
                Order::Discard => self.prepared = None,
                Order::Drain => self.drain(),
                Order::Retire { fds, answer } => {
                    fds.into_iter().for_each(|fd| self.retire(fd));
                    let _ = answer.send(());
                }
                Order::Stop => return,
            }
        }
    }

    fn drain(&mut self) {
        self.draining = true;
        self.prepared = None;
        self.channel = None;
        for (_, Accepting { task, .. }) in self.accepting.drain() {
            task.abort();
        }
        self.sockets.close_all();
    }

    /// A primary that starts anew has other sockets and workers, and wants the addresses: nobody may wait in the queues of
    /// these, also while the JavaScript thread, which is told as well, hangs in a token.
    fn outlive_parent(&mut self) {
        let fds: Vec<_> = self.accepting.keys().copied().collect();
        fds.into_iter().for_each(|fd| self.retire(fd));
        self.drain();
    }

    fn prepare(&mut self, plan: IoPlan) -> io::Result<()> {
        self.prepared = None;
        if self.draining {
            return Err(io::Error::other("the worker drains"));
        }
        let mut sockets = Vec::new();
        for (listener, _) in &plan.listeners {
            let ListenerPlan { name, routes, .. } = listener;
            let missing =
                routes.upstreams().find(|name| !plan.upstreams.iter().any(|(plan, _)| plan.name == **name));
            if let Some(missing) = missing {
                return Err(io::Error::other(format!("listener {name}: no upstream {missing}")));
            }
            for fd in &listener.sockets {
                if !self.accepts_for(name, *fd) {
                    sockets.push((name.clone(), *fd, socket_of(self.sockets.get(*fd)?)?));
                }
            }
        }
        self.prepared = Some(Prepared { plan, sockets });
        Ok(())
    }

    fn accepts_for(&self, listener: &str, fd: RawFd) -> bool {
        self.accepting
            .get(&fd)
            .is_some_and(|accepting| accepting.offer.borrow().listener.plan.name == listener)
    }

    fn commit(&mut self) {
        let Some(Prepared { plan, sockets }) = self.prepared.take() else { return };
        self.access_log = Rc::new(self.access_log.succeeded_by(plan.access));
        self.replace_upstreams(plan.upstreams);
        self.replace_listeners(plan.listeners);
        if self.draining {
            return;
        }
        for (name, fd, socket) in sockets {
            self.stop_accepting(fd);
            self.accept(&name, fd, socket);
        }
    }

    fn retire(&mut self, fd: RawFd) {
        if let Some(Accepting { offer, task }) = self.accepting.remove(&fd) {
            task.abort();
            // It was accepted from a moment ago, so it is a socket; out of descriptors, those who wait are reset.
            drop(self.sockets.get(fd).and_then(|socket| accept_waiting(&offer, socket)));
        }
        self.sockets.close(fd);
    }

    fn replace_upstreams(&mut self, plans: Vec<(UpstreamPlan, Option<Arc<UpstreamTls>>)>) {
        let mut former = std::mem::take(&mut self.upstreams);
        for (plan, tls) in plans {
            let known = former.iter().position(|checked| checked.upstream.plan().name == plan.name);
            let known = known.map(|index| former.swap_remove(index));
            let upstream = match &known {
                Some(known) => Upstream::succeeding(&known.upstream, plan),
                None => Upstream::new(plan),
            };
            let checked = match known {
                Some(known) if Rc::ptr_eq(&known.upstream, &upstream) => CheckedUpstream { tls, ..known },
                known => {
                    former.extend(known);
                    let checks = spawn_local(upstream.clone().check_health()).abort_handle();
                    CheckedUpstream { upstream, tls, checks }
                }
            };
            self.upstreams.push(checked);
        }
        for replaced in former {
            replaced.checks.abort();
        }
    }

    fn replace_listeners(&mut self, plans: Vec<(ListenerPlan, Option<ListenerTls>)>) {
        self.departed.retain(|_, stats| stats.connections_open.get() > 0);
        let mut former = std::mem::take(&mut self.listeners);
        for (plan, tls) in plans {
            let name = plan.name.clone();
            let known = former.remove(&name);
            let stats = match &known {
                Some(offer) => offer.borrow().listener.stats.clone(),
                None => self.departed.remove(&name).unwrap_or_default(),
            };
            // `prepare` has refused a plan that lacks one.
            let router = Rc::new(Router::new(&plan.routes, |name| {
                let checked = self.upstreams.iter().find(|it| it.upstream.plan().name == name)?;
                Some(Target { upstream: checked.upstream.clone(), tls: checked.tls.clone() })
            }));
            let former = known.as_ref().and_then(|offer| offer.borrow().client_rate.clone());
            let client_rate = plan.per_client.clone();
            let client_rate = client_rate.map(|plan| ClientRate::succeeding(former.as_ref(), plan));
            let listener = Rc::new(Listener {
                plan,
                scratch: self.scratch.clone(),
                stats,
                closes: self.closes.clone(),
                negotiated: self.negotiated.clone(),
                access_log: self.access_log.clone(),
            });
            let offer = Offer { listener, tls, router, client_rate };
            let current = match known {
                Some(current) => {
                    current.replace(offer);
                    current
                }
                None => Rc::new(RefCell::new(offer)),
            };
            self.listeners.insert(name, current);
        }
        for (name, offer) in former {
            self.departed.insert(name, offer.borrow().listener.stats.clone());
        }
    }

    /// Accepts also from a sibling's socket.
    fn adopt(&mut self, listener: &str, fd: RawFd) -> io::Result<()> {
        if !self.accepting.contains_key(&fd) {
            self.accept(listener, fd, socket_of(self.sockets.get(fd)?)?);
        }
        Ok(())
    }

    /// An unknown listener is ignored.
    fn accept(&mut self, listener: &str, fd: RawFd, socket: TcpListener) {
        if let Some(offer) = self.listeners.get(listener).cloned() {
            let task = accept_from(offer.clone(), socket);
            self.accepting.insert(fd, Accepting { offer, task });
        }
    }

    fn stop_accepting(&mut self, fd: RawFd) {
        if let Some(Accepting { task, .. }) = self.accepting.remove(&fd) {
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
    use crate::client_rate::ClientRatePlan;
    use crate::close::CLOSE_REASONS;
    use crate::listener::Front;
    use crate::log;
    use crate::process::open_listener;
    use crate::routing::RoutesPlan;
    use crate::tls::tests::configured;
    use crate::upstream::{Balance, PassivePlan, ServerAddress};
    use rustls::ClientConnection;
    use std::io::Read;
    use std::net::{SocketAddr, TcpStream};

    const SHORT: Duration = Duration::from_secs(10);

    fn started(connections_max: usize) -> (IoThread, RawFd, SocketAddr) {
        let (fd, address) = open_listener(([127, 0, 0, 1], 0).into(), 256, false).expect("a port");
        let (plan, _) = plan("https", connections_max, Vec::new());
        let io = IoThread::start(plan, unread(), holding(fd)).expect("a thread");
        (io, fd, address)
    }

    fn holding(fd: RawFd) -> Sockets {
        // SAFETY: `open_listener` has just given it away.
        unsafe { Sockets::inherited(&[fd], None) }.expect("open")
    }

    fn unread() -> Log {
        Log::open(log::Target::File { path: "/dev/null".into(), mode: 0o640 }).expect("a log")
    }

    /// One listener without sockets, and a client that trusts its certificate.
    fn plan(name: &str, connections_max: usize, servers: Vec<ServerAddress>) -> (IoPlan, ClientConnection) {
        let listener = ListenerPlan {
            name: name.into(),
            front: Front::Tls,
            routes: RoutesPlan { routes: Vec::new(), default: Some("web".into()) },
            handshake_deadline: SHORT,
            idle_deadline: SHORT,
            half_closed_deadline: SHORT,
            lifetime_deadline: None,
            proxy_in: None,
            transparent: false,
            connections_max,
            handshakes_max: 1000,
            per_client: None,
            sockets: Vec::new(),
        };
        let upstream = UpstreamPlan {
            name: "web".into(),
            servers,
            balance: Balance::RoundRobin,
            connect_deadline: SHORT,
            connect_attempts_max: 1,
            proxy_protocol: None,
            proxy_client_certificate: false,
            transparent: false,
            health: None,
            passive: PassivePlan { failures_max: 0, ejection: SHORT },
            slow_start: Duration::ZERO,
        };
        let (config, client) = configured("1.3", "X25519");
        let access = AccessPlan::default();
        let listeners = vec![(listener, Some(ListenerTls { config, clients: None }))];
        (IoPlan { listeners, upstreams: vec![(upstream, None)], access }, client)
    }

    fn stats_of(io: &IoThread, listener: &str) -> Option<Arc<ListenerStats>> {
        io.stats.listeners.iter().find(|(name, _)| name == listener).map(|(_, stats)| stats.clone())
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
    fn a_retired_socket_refuses_clients_and_those_who_wait_are_accepted() {
        let (mut io, fd, address) = started(1000);
        // Whatever the thread has accepted by itself until the order comes.
        io.accept("https".into(), fd);
        let waiting: Vec<_> = (0..200).map(|_| TcpStream::connect(address).expect("queued")).collect();
        io.retire(vec![fd]).expect("retired");
        assert_eq!(stats_of(&io, "https").expect("measured").accepted.get(), 200);
        until(|| TcpStream::connect(address).is_err());
        drop(waiting);
        assert!(io.stop(SHORT));
    }

    #[test]
    fn a_worker_that_drains_holds_no_socket() {
        let (mut io, fd, address) = started(1000);
        io.accept("https".into(), fd);
        io.drain();
        until(|| TcpStream::connect(address).is_err());
        io.accept("https".into(), fd);
        assert!(io.take_over(1).is_err());
        assert!(io.stop(SHORT));
    }

    #[test]
    fn a_prepared_plan_serves_when_it_is_committed_and_not_before_and_connections_stay() {
        let (mut io, fd, address) = started(10);
        io.accept("https".into(), fd);
        let stats = stats_of(&io, "https").expect("measured");
        let mut clients = vec![TcpStream::connect(address).expect("queued")];
        until(|| stats.connections_open.get() == 1);
        io.prepare(plan("https", 2, Vec::new()).0).expect("prepared");
        clients.extend((0..2).map(|_| TcpStream::connect(address).expect("queued")));
        until(|| stats.connections_open.get() == 3);
        io.commit().expect("committed");
        clients.push(TcpStream::connect(address).expect("queued"));
        until(|| closed(&io, "connection_limit") == 1);
        assert_eq!((stats.connections_open.get(), stats.accepted.get()), (3, 4));
        assert!(io.stop(SHORT));
    }

    #[test]
    fn what_was_discarded_is_not_committed() {
        let (mut io, fd, address) = started(10);
        io.accept("https".into(), fd);
        io.prepare(plan("other", 0, Vec::new()).0).expect("prepared");
        io.discard();
        io.commit().expect("nothing to do");
        let client = TcpStream::connect(address).expect("queued");
        let stats = stats_of(&io, "https").expect("still there");
        until(|| stats.connections_open.get() == 1);
        assert!(stats_of(&io, "other").is_none());
        drop(client);
        assert!(io.stop(SHORT));
    }

    #[test]
    fn a_plan_that_cannot_be_served_is_refused_when_it_is_prepared() {
        let (mut io, ..) = started(10);
        let (mut without_upstream, _) = plan("https", 10, Vec::new());
        without_upstream.upstreams.clear();
        assert!(io.prepare(without_upstream).is_err());
        let (mut without_socket, _) = plan("https", 10, Vec::new());
        without_socket.listeners[0].0.sockets.push(-1);
        assert!(io.prepare(without_socket).is_err());
        io.drain();
        assert!(io.prepare(plan("https", 10, Vec::new()).0).is_err());
        assert!(io.stop(SHORT));
    }

    #[test]
    fn a_removed_listener_is_measured_until_the_reload_after_its_last_connection() {
        let (mut io, fd, address) = started(10);
        io.accept("https".into(), fd);
        let client = TcpStream::connect(address).expect("queued");
        let stats = stats_of(&io, "https").expect("measured");
        until(|| stats.connections_open.get() == 1);
        for _ in 0..2 {
            io.prepare(plan("other", 10, Vec::new()).0).expect("prepared");
            io.commit().expect("committed");
            io.retire(vec![fd]).expect("retired");
            assert!(stats_of(&io, "https").is_some());
        }
        drop(client);
        until(|| stats.connections_open.get() == 0);
        io.prepare(plan("other", 10, Vec::new()).0).expect("prepared");
        io.commit().expect("committed");
        assert!(stats_of(&io, "https").is_none());
        assert!(io.stop(SHORT));
    }

    #[test]
    fn a_reload_forgives_no_client_that_came_too_often_unless_the_rate_is_another() {
        let (fd, address) = open_listener(([127, 0, 0, 1], 0).into(), 256, false).expect("a port");
        let limited = |burst| {
            let (mut plan, _) = plan("https", 1000, Vec::new());
            let rate = ClientRatePlan { rate: 1, burst, ipv4_bits: 32, ipv6_bits: 64 };
            plan.listeners[0].0.per_client = Some(rate);
            plan
        };
        let mut io = IoThread::start(limited(50), unread(), holding(fd)).expect("a thread");
        io.accept("https".into(), fd);
        let stats = stats_of(&io, "https").expect("measured");
        // Of as many as a burst; and each second lets one in.
        let turned_away = |io: &IoThread| {
            let (accepted, before) = (stats.accepted.get(), closed(io, "client_rate"));
            let clients: Vec<_> = (0..50).map(|_| TcpStream::connect(address).expect("queued")).collect();
            until(|| stats.accepted.get() == accepted + 50);
            drop(clients);
            closed(io, "client_rate") - before
        };
        assert_eq!(turned_away(&io), 0);
        for (burst, is_forgiven) in [(50, false), (60, true)] {
            io.prepare(limited(burst)).expect("prepared");
            io.commit().expect("committed");
            let turned_away = turned_away(&io);
            assert_eq!(turned_away < 25, is_forgiven, "{turned_away} with a burst of {burst}");
        }
        assert!(io.stop(SHORT));
    }

    #[test]
    fn an_established_connection_keeps_no_former_certificates_in_memory() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let servers = vec![ServerAddress::Tcp(server.local_addr().expect("bound"))];
        let (fd, address) = open_listener(([127, 0, 0, 1], 0).into(), 256, false).expect("a port");
        let (first, mut client) = plan("https", 10, servers.clone());
        let former = Arc::downgrade(&first.listeners[0].1.as_ref().expect("TLS").config);
        let mut io = IoThread::start(first, unread(), holding(fd)).expect("a thread");
        io.accept("https".into(), fd);
        let mut wire = TcpStream::connect(address).expect("queued");
        while client.is_handshaking() {
            client.complete_io(&mut wire).expect("a handshake");
        }
        let relayed = server.accept().expect("the upstream's end");
        io.prepare(plan("https", 10, servers).0).expect("prepared");
        io.commit().expect("committed");
        until(|| former.strong_count() == 0);
        assert_eq!(stats_of(&io, "https").expect("measured").connections_open.get(), 1);
        drop(relayed);
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
