//! Owns `handshakes`: N clients with one short connection each at a time, until the time or the count is over.
//! Knows nothing of records or bytes. One thread, one epoll.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};
use rustls::version::TLS13;
use rustls::{ClientConfig, HandshakeKind};
use serde::Serialize;

use crate::client::{Client, Progress};
use crate::connection::{Connection, Negotiated, SCRATCH_BYTES};
use crate::descriptors;
use crate::exchange::Exchange;
use crate::failure::{Failure, Failures, Fault};
use crate::flags::Flags;
use crate::latency::{Latency, Summary};
use crate::pace::{Pace, Until};
use crate::said::{Started, say};
use crate::target::Target;
use crate::tickets::Tickets;

const COUNT_MAX: u64 = 5_000_000;
const CONNECTIONS_MAX: usize = 10_000;
const EVENTS_MAX: usize = 1024;
/// A server that fails this often in a closed loop measures nothing any more; going on would only spin.
const FAILURES_MAX: u64 = 1000;
/// How late a deadline may be noticed.
const TICK: Duration = Duration::from_millis(100);
const TIMER: Token = Token(usize::MAX - 1);

pub struct Plan {
    target: Target,
    connections: usize,
    until: Until,
    rate: Option<f64>,
    resume: bool,
    exchange: Exchange,
}

impl Plan {
    pub fn from_flags(flags: &mut Flags) -> Result<Self, String> {
        let plan = Self {
            target: Target::from_flags(flags)?,
            connections: flags.number("connections", 16, 1..=CONNECTIONS_MAX)?,
            until: Until {
                time: Duration::from_secs_f64(flags.number("seconds", 3.0, 0.01..=600.0)?),
                count: flags.number("count", COUNT_MAX, 1..=COUNT_MAX)?,
            },
            rate: flags.number_if_given("rate", 0.1..=1e6)?,
            resume: flags.switch("resume"),
            exchange: flags.choice(
                "exchange",
                &[("line", Exchange::Line), ("none", Exchange::None), ("http", Exchange::Http)],
            )?,
        };
        if plan.resume && plan.target.names.len() > 1 {
            return Err("--resume: a TLS session belongs to one server name, and there are several".into());
        }
        if plan.resume && plan.exchange == Exchange::None && plan.target.version == &TLS13 {
            return Err(
                "--resume: a TLS 1.3 ticket comes after the handshake: who closes at once has none".into()
            );
        }
        descriptors::raise_for(plan.connections)?;
        Ok(plan)
    }
}

/// Prints the results to standard output.
pub fn run(plan: &Plan) -> io::Result<()> {
    let mut fleet = Fleet::new(plan)?;
    plan.target.warm_up()?;
    if plan.resume {
        // Each client's first TLS session, before the clock starts.
        let once_each = Until { time: Duration::MAX, count: plan.connections as u64 };
        fleet.round(&mut Pace::closed(once_each), HandshakeKind::Full)?;
        fleet.forget();
    }
    say(&Started {})?;
    let mut pace = match plan.rate {
        Some(rate) => Pace::open(rate, plan.until, fleet.poll.registry(), TIMER)?,
        None => Pace::closed(plan.until),
    };
    fleet.round(&mut pace, if plan.resume { HandshakeKind::Resumed } else { HandshakeKind::Full })?;
    say(&fleet.finished(&pace))
}

/// All clients, and what has been measured.
struct Fleet<'plan> {
    plan: &'plan Plan,
    poll: Poll,
    slots: Vec<Slot>,
    /// Slots without a connection. First in, first out: so that each client's turn comes.
    free: VecDeque<usize>,
    turn: u64,
    scratch: Vec<u8>,
    ended: u64,
    handshake: Latency,
    whole: Latency,
    failures: Failures,
    negotiated: Option<Negotiated>,
    /// Connections that negotiated something else than the first one.
    deviations: u64,
    tickets_before: u64,
}

/// One client and its connection, if it has one now.
struct Slot {
    config: Arc<ClientConfig>,
    tickets: Arc<Tickets>,
    attempt: Option<Attempt>,
}

struct Attempt {
    client: Client,
    due: Instant,
    began: Instant,
}

impl<'plan> Fleet<'plan> {
    fn new(plan: &'plan Plan) -> io::Result<Self> {
        let slot = |_| {
            let tickets = Arc::new(Tickets::new(plan.resume));
            let config = plan.target.config(tickets.clone()).map_err(io::Error::other)?;
            Ok(Slot { config, tickets, attempt: None })
        };
        Ok(Self {
            plan,
            poll: Poll::new()?,
            slots: (0..plan.connections).map(slot).collect::<io::Result<_>>()?,
            free: (0..plan.connections).collect(),
            turn: 0,
            scratch: vec![0; SCRATCH_BYTES],
            ended: 0,
            handshake: Latency::default(),
            whole: Latency::default(),
            failures: Failures::default(),
            negotiated: None,
            deviations: 0,
            tickets_before: 0,
        })
    }

    /// Begins connections when they are due until none will be, and then those in flight end.
    fn round(&mut self, pace: &mut Pace, kind: HandshakeKind) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS_MAX);
        let mut deadlines_at = Instant::now() + TICK;
        loop {
            self.begin_due(pace, kind)?;
            if pace.is_over() && self.free.len() == self.slots.len() {
                return Ok(());
            }
            match self.poll.poll(&mut events, Some(TICK)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                match event.token() {
                    TIMER => pace.woken()?,
                    Token(index) => self.advance(index, pace, kind)?,
                }
            }
            if Instant::now() >= deadlines_at {
                self.enforce_deadlines(pace)?;
                deadlines_at = Instant::now() + TICK;
            }
        }
    }

    fn begin_due(&mut self, pace: &mut Pace, kind: HandshakeKind) -> io::Result<()> {
        while !(self.free.is_empty() && pace.waits_for_room()) {
            let Some(due) = pace.take() else { return Ok(()) };
            match self.free.pop_front() {
                Some(index) => {
                    self.begin(index, due, pace)?;
                    self.advance(index, pace, kind)?;
                }
                None => self.failures.add(Failure::NotBegun.into()),
            }
        }
        Ok(())
    }

    fn begin(&mut self, index: usize, due: Instant, pace: &Pace) -> io::Result<()> {
        let Plan { target, exchange, .. } = self.plan;
        let (address, name) = (target.address(self.turn), target.name(self.turn));
        self.turn += 1;
        match Connection::connect(address, None, self.slots[index].config.clone(), name) {
            Ok(mut connection) => {
                let interest = Interest::READABLE | Interest::WRITABLE;
                self.poll.registry().register(&mut connection.stream, Token(index), interest)?;
                let client = Client::new(connection, *exchange, &name.to_str());
                self.slots[index].attempt = Some(Attempt { client, due, began: Instant::now() });
                Ok(())
            }
            Err(fault) => self.fail(index, fault, pace),
        }
    }

    /// Takes one client as far as it can go without waiting.
    fn advance(&mut self, index: usize, pace: &Pace, kind: HandshakeKind) -> io::Result<()> {
        // An event may be of a connection that has ended meanwhile.
        while let Some(attempt) = &mut self.slots[index].attempt {
            match attempt.client.drive(&mut self.scratch) {
                Ok(Progress::Waiting) => return Ok(()),
                Ok(Progress::HandshakeDone(negotiated)) => {
                    self.handshake.observe(attempt.due.elapsed());
                    let first = *self.negotiated.get_or_insert(negotiated);
                    self.deviations += u64::from(negotiated != first);
                    if let Some(failure) = self.plan.target.refuses(&negotiated, kind) {
                        self.fail(index, failure.into(), pace)?;
                    }
                }
                Ok(Progress::Ended) => {
                    self.whole.observe(attempt.due.elapsed());
                    self.ended += 1;
                    self.slots[index].attempt = None;
                    self.free.push_back(index);
                }
                Err(fault) => self.fail(index, fault, pace)?,
            }
        }
        Ok(())
    }

    fn enforce_deadlines(&mut self, pace: &Pace) -> io::Result<()> {
        for index in 0..self.slots.len() {
            let late = |attempt: &Attempt| attempt.began.elapsed() > self.plan.target.deadline;
            if self.slots[index].attempt.as_ref().is_some_and(late) {
                self.fail(index, Failure::Deadline.into(), pace)?;
            }
        }
        Ok(())
    }

    fn fail(&mut self, index: usize, fault: Fault, pace: &Pace) -> io::Result<()> {
        self.slots[index].attempt = None;
        self.free.push_back(index);
        self.failures.add(fault);
        match pace.waits_for_room() && self.failures.total() > FAILURES_MAX {
            true => Err(io::Error::other(format!("too many failures: {}", self.failures.summary()))),
            false => Ok(()),
        }
    }

    /// Forgets what was measured while warming up, except failures: they are never forgotten.
    fn forget(&mut self) {
        self.ended = 0;
        (self.handshake, self.whole) = (Latency::default(), Latency::default());
        self.negotiated = None;
        self.deviations = 0;
        self.tickets_before = self.tickets_given();
    }

    fn tickets_given(&self) -> u64 {
        self.slots.iter().map(|slot| slot.tickets.given()).sum()
    }

    fn finished(&self, pace: &Pace) -> Finished<'_> {
        Finished {
            handshakes: self.ended,
            intended: pace.taken(),
            seconds: pace.elapsed().as_secs_f64(),
            failures: &self.failures,
            tls_error: self.failures.detail(),
            deviations: self.deviations,
            tickets: self.tickets_given() - self.tickets_before,
            negotiated: self.negotiated,
            handshake_us: self.handshake.summary(),
            connection_us: self.whole.summary(),
        }
    }
}

#[derive(Serialize)]
#[serde(tag = "event", rename = "finished", rename_all = "camelCase")]
struct Finished<'fleet> {
    handshakes: u64,
    intended: u64,
    seconds: f64,
    failures: &'fleet Failures,
    tls_error: Option<&'fleet str>,
    deviations: u64,
    tickets: u64,
    negotiated: Option<Negotiated>,
    handshake_us: Summary,
    connection_us: Summary,
}
