//! Owns `echo`: messages on established connections at fixed spacing, whatever the server does; each comes back and is compared.
//! One thread, one epoll.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use mio::Token;
use serde::Serialize;

use crate::crowd::{Crowd, Outcome, TICK, TIMER};
use crate::descriptors;
use crate::failure::{Failure, Fault};
use crate::flags::Flags;
use crate::latency::{Latency, Summary};
use crate::pace::{Pace, Until};
use crate::pattern::Pattern;
use crate::said::{Started, say};
use crate::target::Target;

const CONNECTIONS_MAX: usize = 10_000;
/// On one connection. A server that is so far behind has failed, and the memory must end somewhere.
const WAITING_MAX: usize = 1000;

pub struct Plan {
    target: Target,
    connections: usize,
    /// Messages per second on all connections together. Without it each sends when its last one has come back.
    rate: Option<f64>,
    message_bytes: usize,
    until: Until,
}

impl Plan {
    pub fn from_flags(flags: &mut Flags) -> Result<Self, String> {
        let plan = Self {
            target: Target::from_flags(flags)?,
            connections: flags.number("connections", 16, 1..=CONNECTIONS_MAX)?,
            rate: flags.number_if_given("rate", 0.1..=1e6)?,
            message_bytes: flags.number("bytes", 64, 1..=64 * 1024)?,
            until: Until {
                time: Duration::from_secs_f64(flags.number("seconds", 3.0, 0.01..=600.0)?),
                count: flags.number("count", u64::MAX, 1..=u64::MAX)?,
            },
        };
        descriptors::raise_for(plan.connections)?;
        Ok(plan)
    }
}

/// Prints the results to standard output.
pub fn run(plan: &Plan) -> io::Result<()> {
    let mut crowd = Crowd::establish(&plan.target, plan.connections)?;
    let mut lines: Vec<_> = (0..plan.connections).map(Line::new).collect();
    let mut message = vec![0; plan.message_bytes];
    let mut latency = Latency::default();
    let mut messages = 0;
    say(&Started {})?;
    let mut pace = match plan.rate {
        Some(rate) => Pace::open(rate, plan.until, crowd.poll.registry(), TIMER)?,
        None => Pace::closed(plan.until),
    };
    // Whose turn it is: in an open loop everybody's in turn, in a closed loop those whose message has come back.
    let mut next: VecDeque<usize> = (0..lines.len()).collect();
    // Of the last echo, or of the last message: who has not answered long after it never will.
    let mut moved_at = Instant::now();
    while !pace.is_over()
        || (lines.iter().any(|line| !line.waiting.is_empty()) && moved_at.elapsed() < plan.target.deadline)
    {
        while !next.is_empty()
            && let Some(due) = pace.take()
            && let Some(index) = next.pop_front()
        {
            lines[index].send(&mut crowd, due, &mut message);
            if !pace.waits_for_room() {
                next.push_back(index);
            }
            moved_at = Instant::now();
        }
        for token in crowd.wait(TICK)? {
            match token {
                TIMER => pace.woken()?,
                Token(index) => {
                    let came = lines[index].receive(&mut crowd, &mut latency);
                    if came > 0 {
                        messages += came;
                        moved_at = Instant::now();
                    }
                    if came > 0 && pace.waits_for_room() {
                        next.push_back(index);
                    }
                }
            }
        }
    }
    for line in &mut lines {
        line.give_up(&mut crowd, Failure::Deadline);
    }
    say(&Finished {
        messages,
        intended: pace.taken(),
        outcome: crowd.outcome(pace.elapsed()),
        latency_us: latency.summary(),
    })
}

#[derive(Serialize)]
#[serde(tag = "event", rename = "finished", rename_all = "camelCase")]
struct Finished<'crowd> {
    /// That came back as they were.
    messages: u64,
    intended: u64,
    /// Failures count messages.
    #[serde(flatten)]
    outcome: Outcome<'crowd>,
    /// Since each message was due.
    latency_us: Summary,
}

/// The messages of one connection: one stream, and the same back.
struct Line {
    index: usize,
    sent: Pattern,
    received: Pattern,
    /// Where each message ends in the stream, and when it was due.
    waiting: VecDeque<(u64, Instant)>,
}

impl Line {
    fn new(index: usize) -> Self {
        let pattern = Pattern::of_connection(index);
        Self { index, sent: pattern.clone(), received: pattern, waiting: VecDeque::new() }
    }

    fn send(&mut self, crowd: &mut Crowd<'_>, due: Instant, message: &mut [u8]) {
        let Some(connection) = &mut crowd.members[self.index] else {
            return crowd.failures.add(Failure::NotBegun.into());
        };
        if self.waiting.len() >= WAITING_MAX {
            return crowd.failures.add(Failure::NotBegun.into());
        }
        self.sent.fill(message);
        self.waiting.push_back((self.sent.at_bytes(), due));
        if let Err(fault) = connection.send(message).and_then(|()| connection.flush()) {
            self.lose(crowd, fault);
        }
    }

    /// How many messages have come back.
    fn receive(&mut self, crowd: &mut Crowd<'_>, latency: &mut Latency) -> u64 {
        let Some(connection) = &mut crowd.members[self.index] else { return 0 };
        let (received, sent_bytes) = (&mut self.received, self.sent.at_bytes());
        let outcome = connection.take_all(&mut crowd.scratch, |bytes| {
            let right = received.check(bytes) == bytes.len() && received.at_bytes() <= sent_bytes;
            if right { Ok(()) } else { Err(Failure::WrongAnswer) }
        });
        let mut messages = 0;
        while let Some((end, due)) = self.waiting.front()
            && *end <= self.received.at_bytes()
        {
            latency.observe(due.elapsed());
            self.waiting.pop_front();
            messages += 1;
        }
        if let Err(fault) = outcome {
            self.lose(crowd, fault);
        }
        messages
    }

    /// The messages that wait fail with the connection; one that has none fails itself.
    fn lose(&mut self, crowd: &mut Crowd<'_>, fault: Fault) {
        let failure = fault.failure;
        self.waiting.pop_front();
        crowd.fail(self.index, fault);
        self.give_up(crowd, failure);
    }

    fn give_up(&mut self, crowd: &mut Crowd<'_>, failure: Failure) {
        for _ in self.waiting.drain(..) {
            crowd.failures.add(failure.into());
        }
    }
}
