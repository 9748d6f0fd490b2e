//! Owns `relay`: as much as goes through, in one or both directions, and every byte of it checked. The upstream is a sink or a
//! source (upstream/bulk.rs). One thread, one epoll.

use std::io;
use std::time::{Duration, Instant};

use mio::Token;
use serde::Serialize;

use crate::connection::{Connection, Flow};
use crate::crowd::{Crowd, Outcome, TICK};
use crate::descriptors;
use crate::failure::{Failure, Fault};
use crate::flags::Flags;
use crate::pattern::{Incoming, Pattern, WORD_BYTES, end_word, message_bytes};
use crate::said::{Started, say};
use crate::target::Target;

const CONNECTIONS_MAX: usize = 1000;
/// In each direction: so that one busy connection lets the others have their turn.
const TURN_BYTES: usize = 1024 * 1024;

/// Small messages go to the socket together, each in its own record: otherwise this program, which pays a system call for
/// each, would be what is measured.
const WRITE_BYTES: usize = 16 * 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
    Both,
}

pub struct Plan {
    target: Target,
    direction: Direction,
    message_bytes: usize,
    connections: usize,
    time: Duration,
}

impl Plan {
    pub fn from_flags(flags: &mut Flags) -> Result<Self, String> {
        let directions = [("both", Direction::Both), ("up", Direction::Up), ("down", Direction::Down)];
        let plan = Self {
            target: Target::from_flags(flags)?,
            direction: flags.choice("direction", &directions)?,
            message_bytes: message_bytes(flags)?,
            connections: flags.number("connections", 4, 1..=CONNECTIONS_MAX)?,
            time: Duration::from_secs_f64(flags.number("seconds", 3.0, 0.01..=600.0)?),
        };
        descriptors::raise_for(plan.connections)?;
        Ok(plan)
    }
}

/// Prints the results to standard output.
pub fn run(plan: &Plan) -> io::Result<()> {
    let mut crowd = Crowd::establish(&plan.target, plan.connections)?;
    let mut streams: Vec<_> = (0..plan.connections).map(|index| Stream::new(index, plan)).collect();
    let mut message = vec![0; plan.message_bytes];
    say(&Started {})?;
    let began = Instant::now();
    let mut closing = false;
    // Those that stopped only because their turn was over: epoll will not tell of them again.
    let mut unfinished: Vec<usize> = (0..plan.connections).collect();
    while streams.iter().any(|stream| !stream.over) {
        let timeout = if unfinished.is_empty() { TICK } else { Duration::ZERO };
        let mut ready = std::mem::take(&mut unfinished);
        ready.extend(crowd.wait(timeout)?.into_iter().map(|Token(index)| index));
        if !closing && began.elapsed() >= plan.time {
            closing = true;
            ready.extend(0..plan.connections);
        }
        for index in ready {
            if streams[index].turn(&mut crowd, &mut message, closing) == Turn::More {
                unfinished.push(index);
            }
        }
        for stream in &mut streams {
            if !stream.over && stream.moved_at.elapsed() > plan.target.deadline {
                stream.fail(&mut crowd, Failure::Deadline.into());
            }
        }
    }
    say(&Finished {
        up_bytes: streams.iter().map(|stream| stream.arrived_bytes).sum(),
        down_bytes: streams.iter().map(|stream| stream.incoming.received_bytes()).sum(),
        outcome: crowd.outcome(began.elapsed()),
    })
}

#[derive(Serialize)]
#[serde(tag = "event", rename = "finished", rename_all = "camelCase")]
struct Finished<'crowd> {
    /// That the upstream has received and found right.
    up_bytes: u64,
    /// That came here and were right.
    down_bytes: u64,
    /// Failures count connections.
    #[serde(flatten)]
    outcome: Outcome<'crowd>,
}

/// How a turn has ended.
#[derive(PartialEq, Eq)]
enum Turn {
    Waiting,
    /// There may be more to do, after the others had their turn.
    More,
}

/// Both directions of one connection.
struct Stream {
    index: usize,
    direction: Direction,
    outgoing: Pattern,
    incoming: Incoming,
    /// The last word has been handed to TLS.
    closed: bool,
    /// What the upstream says that it has received.
    arrived_bytes: u64,
    moved_at: Instant,
    over: bool,
}

impl Stream {
    fn new(index: usize, plan: &Plan) -> Self {
        let pattern = Pattern::of_connection(index);
        Self {
            index,
            direction: plan.direction,
            outgoing: pattern.clone(),
            incoming: Incoming::expecting(pattern),
            closed: false,
            arrived_bytes: 0,
            moved_at: Instant::now(),
            over: false,
        }
    }

    fn turn(&mut self, crowd: &mut Crowd<'_>, message: &mut [u8], closing: bool) -> Turn {
        // An event may be of a connection that is over.
        if self.over {
            return Turn::Waiting;
        }
        let Some(connection) = &mut crowd.members[self.index] else { return Turn::Waiting };
        let scratch = &mut crowd.scratch;
        let outcome = self
            .send(connection, message, closing)
            .and_then(|sent| Ok((sent, self.receive(connection, scratch)?)));
        match outcome {
            Ok(_) if self.incoming.ended().is_some() => {
                self.end(crowd);
                Turn::Waiting
            }
            Ok((Turn::Waiting, Turn::Waiting)) => Turn::Waiting,
            Ok(_) => Turn::More,
            Err(fault) => {
                self.fail(crowd, fault);
                Turn::Waiting
            }
        }
    }

    fn send(
        &mut self,
        connection: &mut Connection,
        message: &mut [u8],
        closing: bool,
    ) -> Result<Turn, Fault> {
        let mut left = TURN_BYTES;
        while connection.flush()? {
            if left == 0 {
                return Ok(Turn::More);
            }
            let (length, times) = match self.direction {
                _ if self.closed => return Ok(Turn::Waiting),
                _ if closing => {
                    self.closed = true;
                    connection.send(&end_word(self.outgoing.at_bytes()))?;
                    continue;
                }
                Direction::Up | Direction::Both => (message.len(), (WRITE_BYTES / message.len()).max(1)),
                // The word that a source waits for.
                Direction::Down if self.outgoing.at_bytes() == 0 => (WORD_BYTES, 1),
                Direction::Down => return Ok(Turn::Waiting),
            };
            for _ in 0..times {
                self.outgoing.fill(&mut message[..length]);
                connection.send(&message[..length])?;
            }
            self.moved_at = Instant::now();
            left = left.saturating_sub(times * length);
        }
        Ok(Turn::Waiting)
    }

    fn receive(&mut self, connection: &mut Connection, scratch: &mut [u8]) -> Result<Turn, Fault> {
        let until_bytes = self.incoming.received_bytes() + TURN_BYTES as u64;
        while self.incoming.received_bytes() < until_bytes {
            let incoming = &mut self.incoming;
            match connection
                .receive(scratch, |bytes| incoming.take(bytes).map_err(|_| Failure::WrongAnswer))?
            {
                Flow::Dry => return Ok(Turn::Waiting),
                Flow::More => self.moved_at = Instant::now(),
                Flow::Closed if self.incoming.ended().is_some() => return Ok(Turn::Waiting),
                Flow::Closed => return Err(Failure::ClosedBeforeAnswer.into()),
            }
        }
        Ok(Turn::More)
    }

    /// The upstream has said its last word: how much has arrived there.
    fn end(&mut self, crowd: &mut Crowd<'_>) {
        self.arrived_bytes = self.incoming.ended().unwrap_or_default();
        match self.closed && self.arrived_bytes == self.outgoing.at_bytes() {
            true => {
                self.over = true;
                crowd.members[self.index] = None;
            }
            false => self.fail(crowd, Failure::WrongAnswer.into()),
        }
    }

    fn fail(&mut self, crowd: &mut Crowd<'_>, fault: Fault) {
        self.over = true;
        crowd.fail(self.index, fault);
    }
}
