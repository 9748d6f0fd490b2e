//! Owns the closed loop: N clients, each with one connection at a time, until the time or the count is over.
//! Knows nothing of records or bytes. One thread, one epoll.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::version::{TLS12, TLS13};

use crate::client::{self, Client, Expectations, Failure, Negotiated, Progress, Tickets};
use crate::flags::Flags;
use crate::latency::Latency;

const COUNT_MAX: u64 = 5_000_000;
const CONNECTIONS_MAX: usize = 4096;
/// A server that has not answered by then will not.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(10);
/// A server that fails this often measures nothing any more; going on would only spin.
const FAILURES_MAX: u64 = 1000;
/// How late a deadline may be noticed.
const TICK: Duration = Duration::from_millis(100);
const NOTHING_NEGOTIATED: &str =
    "the TLS library does not say what was negotiated, though the handshake is over";

pub struct Plan {
    to: SocketAddr,
    expected: Expectations,
    connections: usize,
    time_max: Duration,
    count_max: u64,
    exchange: bool,
}

impl Plan {
    pub fn from_flags(flags: &mut Flags) -> Result<Self, String> {
        let to = flags.loopback("to", None)?;
        let certificate = flags.text("certificate")?;
        let certificate = CertificateDer::from_pem_file(&certificate)
            .map_err(|error| format!("--certificate {certificate}: {error}"))?;
        let version = match flags.text("tls").as_deref() {
            Ok("1.3") | Err(_) => &TLS13,
            Ok("1.2") => &TLS12,
            Ok(other) => return Err(format!("--tls {other}: expected 1.2 or 1.3")),
        };
        let plan = Self {
            to,
            connections: flags.number("connections", 16, 1..=CONNECTIONS_MAX)?,
            time_max: Duration::from_secs_f64(flags.number("seconds", 3.0, 0.01..=600.0)?),
            count_max: flags.number("count", COUNT_MAX, 1..=COUNT_MAX)?,
            exchange: !flags.switch("no-exchange"),
            expected: Expectations {
                version,
                certificate,
                resume: flags.switch("resume"),
                verify_every: flags.number("verify-every", 32, 1..=u64::from(u32::MAX))?,
            },
        };
        // A TLS 1.3 ticket comes after the handshake: who closes at once has none.
        match plan.expected.resume && !plan.exchange {
            true => Err("--resume needs the exchange".into()),
            false => Ok(plan),
        }
    }
}

/// Prints the results to standard output.
pub fn run(plan: &Plan) -> io::Result<()> {
    let mut fleet = Fleet::new(plan)?;
    if plan.expected.resume {
        // Each client's first TLS session, before the clock starts.
        let warm = Until { time: Instant::now() + CONNECTION_DEADLINE, count: u64::MAX, count_each: 1 };
        fleet.round(plan, &warm, false)?;
        fleet.warm();
    }
    println!(r#"{{"event":"started"}}"#);
    let began = Instant::now();
    let until = Until { time: began + plan.time_max, count: plan.count_max, count_each: u64::MAX };
    fleet.round(plan, &until, plan.expected.resume)?;
    println!("{}", fleet.results(began.elapsed()));
    Ok(())
}

/// When no more connections are made.
struct Until {
    time: Instant,
    count: u64,
    /// Of each client: one that never has to wait could otherwise make those of all others.
    count_each: u64,
}

struct Fleet {
    poll: Poll,
    slots: Vec<Slot>,
    started: u64,
    ended: u64,
    /// From the connect to the end of the handshake, and to the close.
    handshake: Latency,
    whole: Latency,
    failures: BTreeMap<Failure, u64>,
    first_tls_error: Option<String>,
    negotiated: Option<Negotiated>,
    /// Connections that negotiated something else than the first one.
    deviations: u64,
    tickets_before: u64,
}

/// One client and its connection, if it has one now.
struct Slot {
    config: Arc<ClientConfig>,
    tickets: Arc<Tickets>,
    started: u64,
    client: Option<(Client, Instant)>,
}

impl Fleet {
    fn new(plan: &Plan) -> io::Result<Self> {
        let slot = |_| {
            let tickets = Arc::new(Tickets::new(plan.expected.resume));
            let config = client::config(&plan.expected, tickets.clone()).map_err(io::Error::other)?;
            Ok(Slot { config, tickets, started: 0, client: None })
        };
        Ok(Self {
            poll: Poll::new()?,
            slots: (0..plan.connections).map(slot).collect::<io::Result<_>>()?,
            started: 0,
            ended: 0,
            handshake: Latency::default(),
            whole: Latency::default(),
            failures: BTreeMap::new(),
            first_tls_error: None,
            negotiated: None,
            deviations: 0,
            tickets_before: 0,
        })
    }

    /// Lets every client make connections until the time or the count is over, and then those in flight end.
    fn round(&mut self, plan: &Plan, until: &Until, resumed: bool) -> io::Result<()> {
        let mut events = Events::with_capacity(CONNECTIONS_MAX);
        for index in 0..self.slots.len() {
            self.advance(index, plan, until, resumed)?;
        }
        while self.slots.iter().any(|slot| slot.client.is_some()) {
            match self.poll.poll(&mut events, Some(TICK)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                self.advance(event.token().0, plan, until, resumed)?;
            }
            self.enforce_deadlines(plan, until, resumed)?;
        }
        Ok(())
    }

    /// Takes one client as far as it can go without waiting, through as many connections as that is.
    fn advance(&mut self, index: usize, plan: &Plan, until: &Until, resumed: bool) -> io::Result<()> {
        loop {
            if self.slots[index].client.is_none() && !self.begin(index, plan, until)? {
                return Ok(());
            }
            let Some((client, began)) = &mut self.slots[index].client else { return Ok(()) };
            match client.drive() {
                Ok(Progress::Waiting) => return Ok(()),
                Ok(Progress::HandshakeDone) => {
                    self.handshake.observe(began.elapsed());
                    let negotiated = client.negotiated().ok_or(io::Error::other(NOTHING_NEGOTIATED))?;
                    let first = *self.negotiated.get_or_insert(negotiated);
                    self.deviations += u64::from(negotiated != first);
                    if negotiated.resumed != resumed {
                        self.fail(index, Failure::WrongKind)?;
                    }
                }
                Ok(Progress::Ended) => {
                    self.whole.observe(began.elapsed());
                    self.ended += 1;
                    self.slots[index].client = None;
                }
                Err(failure) => self.fail(index, failure)?,
            }
        }
    }

    /// False when no connection is to be made any more.
    fn begin(&mut self, index: usize, plan: &Plan, until: &Until) -> io::Result<bool> {
        let now = Instant::now();
        let slot = &mut self.slots[index];
        if now >= until.time || self.started >= until.count || slot.started >= until.count_each {
            return Ok(false);
        }
        self.started += 1;
        slot.started += 1;
        match Client::connect(plan.to, slot.config.clone(), plan.exchange) {
            Ok(mut client) => {
                let interest = Interest::READABLE | Interest::WRITABLE;
                self.poll.registry().register(&mut client.stream, Token(index), interest)?;
                slot.client = Some((client, now));
            }
            Err(failure) => self.fail(index, failure)?,
        }
        Ok(true)
    }

    fn enforce_deadlines(&mut self, plan: &Plan, until: &Until, resumed: bool) -> io::Result<()> {
        for index in 0..self.slots.len() {
            let late = |(_, began): &(Client, Instant)| began.elapsed() > CONNECTION_DEADLINE;
            if self.slots[index].client.as_ref().is_some_and(late) {
                self.fail(index, Failure::Deadline)?;
                self.advance(index, plan, until, resumed)?;
            }
        }
        Ok(())
    }

    fn fail(&mut self, index: usize, failure: Failure) -> io::Result<()> {
        let tls_error = self.slots[index].client.take().and_then(|(client, _)| client.tls_error());
        self.first_tls_error = self.first_tls_error.take().or(tls_error);
        *self.failures.entry(failure).or_default() += 1;
        match self.failures.values().sum::<u64>() > FAILURES_MAX {
            true => Err(io::Error::other(format!(
                "too many failures: {}; first TLS error: {}",
                self.failures_json(),
                self.first_tls_error.as_deref().unwrap_or("none")
            ))),
            false => Ok(()),
        }
    }

    /// Forgets what was measured while warming up, except failures: they are never forgotten.
    fn warm(&mut self) {
        (self.started, self.ended) = (0, 0);
        (self.handshake, self.whole) = (Latency::default(), Latency::default());
        self.negotiated = None;
        self.deviations = 0;
        self.tickets_before = self.tickets_given();
    }

    fn tickets_given(&self) -> u64 {
        self.slots.iter().map(|slot| slot.tickets.given()).sum()
    }

    fn results(&mut self, elapsed: Duration) -> String {
        let negotiated = self.negotiated.map_or("null".to_owned(), |negotiated| {
            format!(
                r#"{{"protocol":"{:?}","cipherSuite":"{:?}","group":{},"resumed":{}}}"#,
                negotiated.version,
                negotiated.cipher_suite,
                negotiated.group.map_or("null".to_owned(), |group| format!("\"{group:?}\"")),
                negotiated.resumed
            )
        });
        format!(
            r#"{{"event":"finished","handshakes":{},"seconds":{:.6},"failures":{},"deviations":{},"tickets":{},"negotiated":{negotiated},"handshakeUs":{},"connectionUs":{}}}"#,
            self.ended,
            elapsed.as_secs_f64(),
            self.failures_json(),
            self.deviations,
            self.tickets_given() - self.tickets_before,
            self.handshake.json(),
            self.whole.json(),
        )
    }

    fn failures_json(&self) -> String {
        let fields: Vec<_> =
            self.failures.iter().map(|(failure, count)| format!("\"{}\":{count}", failure.word())).collect();
        format!("{{{}}}", fields.join(","))
    }
}
