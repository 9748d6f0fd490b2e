//! Owns many connections that stay: beginning them, and taking each through its handshake. Knows not what they are for.
//! One thread, one epoll.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};
use rustls::{ClientConfig, HandshakeKind};
use serde::Serialize;

use crate::connection::{Connection, Negotiated, SCRATCH_BYTES};
use crate::failure::{Failure, Failures, Fault};
use crate::pace::{Pace, Until};
use crate::target::Target;
use crate::tickets::Tickets;

pub const TIMER: Token = Token(usize::MAX - 1);
/// How late a deadline may be noticed.
pub const TICK: Duration = Duration::from_millis(100);
const IN_FLIGHT_MAX: usize = 256;
const EVENTS_MAX: usize = 1024;
/// A loopback address has some 28,000 ports for each address that it connects to; several processes may share these.
const SOURCES: usize = 250;

pub struct Crowd<'target> {
    target: &'target Target,
    pub poll: Poll,
    /// Their tokens are their indices. None before it begins, and after it failed.
    pub members: Vec<Option<Connection>>,
    /// One for all: a configuration takes more memory than a connection.
    config: Arc<ClientConfig>,
    /// Those in their handshake, and since when.
    in_flight: HashMap<usize, Instant>,
    begun: usize,
    events: Events,
    deadlines_at: Instant,
    pub failures: Failures,
    negotiated: Option<Negotiated>,
    deviations: u64,
    pub scratch: Vec<u8>,
}

impl<'target> Crowd<'target> {
    pub fn new(target: &'target Target, connections: usize) -> io::Result<Self> {
        Ok(Self {
            target,
            poll: Poll::new()?,
            members: (0..connections).map(|_| None).collect(),
            config: target.config(Arc::new(Tickets::new(false))).map_err(io::Error::other)?,
            in_flight: HashMap::new(),
            begun: 0,
            events: Events::with_capacity(EVENTS_MAX),
            deadlines_at: Instant::now() + TICK,
            failures: Failures::default(),
            negotiated: None,
            deviations: 0,
            scratch: vec![0; SCRATCH_BYTES],
        })
    }

    /// All of them, or an error: a workload on fewer connections than asked for is another workload.
    pub fn establish(target: &'target Target, connections: usize) -> io::Result<Self> {
        let mut crowd = Self::new(target, connections)?;
        let mut pace = Pace::closed(Until { time: Duration::MAX, count: connections as u64 });
        while !crowd.is_established() {
            crowd.begin_due(&mut pace)?;
            for token in crowd.wait(TICK)? {
                crowd.shake(token.0)?;
            }
        }
        match crowd.failures.total() {
            0 => Ok(crowd),
            failed => Err(io::Error::other(format!(
                "{failed} of {connections} connections were not established: {}",
                crowd.failures.summary()
            ))),
        }
    }

    /// Whoever was to begin has, and has finished the handshake or failed.
    pub fn is_established(&self) -> bool {
        self.begun == self.members.len() && self.in_flight.is_empty()
    }

    pub fn open(&self) -> usize {
        self.members.iter().flatten().count() - self.in_flight.len()
    }

    /// What is due waits while too many are in their handshake.
    pub fn begin_due(&mut self, pace: &mut Pace) -> io::Result<()> {
        while self.begun < self.members.len() && self.in_flight.len() < IN_FLIGHT_MAX && pace.take().is_some()
        {
            let index = self.begun;
            self.begun += 1;
            let (address, name) = (self.target.address(index as u64), self.target.name(index as u64));
            match Connection::connect(address, Some(source(index)), self.config.clone(), name) {
                Ok(mut connection) => {
                    let interest = Interest::READABLE | Interest::WRITABLE;
                    self.poll.registry().register(&mut connection.stream, Token(index), interest)?;
                    self.members[index] = Some(connection);
                    self.in_flight.insert(index, Instant::now());
                    self.shake(index)?;
                }
                Err(fault) => self.failures.add(fault),
            }
        }
        Ok(())
    }

    /// Which sockets are ready. Also fails the handshakes that take too long.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<Vec<Token>> {
        match self.poll.poll(&mut self.events, Some(timeout)) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => result?,
        }
        if Instant::now() >= self.deadlines_at {
            let late = |began: &Instant| began.elapsed() > self.target.deadline;
            let late: Vec<_> =
                self.in_flight.iter().filter(|(_, began)| late(began)).map(|(index, _)| *index).collect();
            for index in late {
                self.fail(index, Failure::Deadline.into());
            }
            self.deadlines_at = Instant::now() + TICK;
        }
        Ok(self.events.iter().map(mio::event::Event::token).collect())
    }

    /// Takes a connection further through its handshake. False when it is established already, or gone.
    pub fn shake(&mut self, index: usize) -> io::Result<bool> {
        if !self.in_flight.contains_key(&index) {
            return Ok(false);
        }
        let Some(connection) = &mut self.members[index] else { return Ok(false) };
        match connection.settle(&mut self.scratch) {
            Ok(false) => {}
            Ok(true) => {
                let negotiated =
                    connection.negotiated().ok_or(io::Error::other("a handshake without result"))?;
                let first = *self.negotiated.get_or_insert(negotiated);
                self.deviations += u64::from(negotiated != first);
                match self.target.refuses(&negotiated, HandshakeKind::Full) {
                    Some(failure) => self.fail(index, failure.into()),
                    None => drop(self.in_flight.remove(&index)),
                }
            }
            Err(fault) => self.fail(index, fault),
        }
        Ok(true)
    }

    /// What an established connection brings. False when it is lost by it.
    pub fn hear(&mut self, index: usize, take: impl FnMut(&[u8]) -> Result<(), Failure>) -> bool {
        let Some(connection) = &mut self.members[index] else { return false };
        match connection.take_all(&mut self.scratch, take) {
            Ok(()) => return true,
            Err(Fault { failure: Failure::ClosedBeforeAnswer, .. }) => self.fail(index, Failure::Lost.into()),
            Err(fault) => self.fail(index, fault),
        }
        false
    }

    pub fn outcome(&self, elapsed: Duration) -> Outcome<'_> {
        Outcome {
            seconds: elapsed.as_secs_f64(),
            failures: &self.failures,
            tls_error: self.failures.detail(),
            negotiated: self.negotiated,
            deviations: self.deviations,
        }
    }

    pub fn fail(&mut self, index: usize, fault: Fault) {
        self.in_flight.remove(&index);
        self.members[index] = None;
        self.failures.add(fault);
    }
}

/// What each command prints of its connections.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome<'crowd> {
    seconds: f64,
    failures: &'crowd Failures,
    tls_error: Option<&'crowd str>,
    negotiated: Option<Negotiated>,
    /// Handshakes that negotiated something else than the first one.
    deviations: u64,
}

/// Without sources of their own, connections would use up the ports of 127.0.0.1.
fn source(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 1, 0, 1 + (index % SOURCES) as u8)
}
