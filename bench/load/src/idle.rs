//! Owns `idle`: connections that say nothing, until somebody asks whether they still work. One thread, one epoll.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use mio::Token;
use serde::Serialize;

use crate::crowd::{Crowd, Outcome, TICK, TIMER};
use crate::descriptors;
use crate::failure::Failure;
use crate::flags::Flags;
use crate::pace::{Pace, Until};
use crate::said::{Started, say};
use crate::stdin::Stdin;
use crate::target::Target;

const CONNECTIONS_MAX: usize = 100_000;
/// Asked all at once, most of them would not be idle connections any more.
const CHECKED_MAX: usize = 1000;
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
const STDIN: Token = Token(usize::MAX - 2);

pub struct Plan {
    target: Target,
    connections: usize,
    rate: Option<f64>,
}

impl Plan {
    pub fn from_flags(flags: &mut Flags) -> Result<Self, String> {
        let plan = Self {
            target: Target::from_flags(flags)?,
            connections: flags.number("connections", 1000, 1..=CONNECTIONS_MAX)?,
            rate: flags.number_if_given("rate", 0.1..=1e6)?,
        };
        descriptors::raise_for(plan.connections)?;
        Ok(plan)
    }
}

/// Holds the connections until standard input ends.
pub fn run(plan: &Plan) -> io::Result<()> {
    let mut crowd = Crowd::new(&plan.target, plan.connections)?;
    let mut stdin = Stdin::new(crowd.poll.registry(), STDIN)?;
    let until = Until { time: Duration::MAX, count: plan.connections as u64 };
    plan.target.warm_up()?;
    say(&Started {})?;
    let began = Instant::now();
    let mut pace = match plan.rate {
        Some(rate) => Pace::open(rate, until, crowd.poll.registry(), TIMER)?,
        None => Pace::closed(until),
    };
    let mut held = false;
    let mut said_at = began;
    let mut check: Option<Check> = None;
    loop {
        crowd.begin_due(&mut pace)?;
        for token in crowd.wait(TICK)? {
            match token {
                TIMER => pace.woken()?,
                STDIN => {
                    let Some(lines) = stdin.lines()? else {
                        return say(&State::of("finished", &crowd, began));
                    };
                    for line in lines {
                        if line != "check" || !held || check.is_some() {
                            let reason = "expected check, when all are held, and one at a time";
                            return Err(io::Error::other(format!("standard input: {line:?}: {reason}")));
                        }
                        check = Some(Check::begin(&mut crowd, plan.target.deadline));
                    }
                }
                Token(index) => {
                    if !crowd.shake(index)? {
                        hear(&mut crowd, index, check.as_mut());
                    }
                }
            }
        }
        if !held && crowd.is_established() {
            held = true;
            say(&State::of("holding", &crowd, began))?;
        } else if !held && said_at.elapsed() >= PROGRESS_INTERVAL {
            said_at = Instant::now();
            say(&State::of("progress", &crowd, began))?;
        }
        if let Some(over) = check.take_if(|check| check.is_over()) {
            say(&over.checked())?;
        }
    }
}

#[derive(Serialize)]
struct State<'crowd> {
    event: &'static str,
    /// Established and not lost.
    open: usize,
    lost: u64,
    #[serde(flatten)]
    outcome: Outcome<'crowd>,
}

impl<'crowd> State<'crowd> {
    fn of(event: &'static str, crowd: &'crowd Crowd<'_>, began: Instant) -> Self {
        Self {
            event,
            open: crowd.open(),
            lost: crowd.failures.of(Failure::Lost),
            outcome: crowd.outcome(began.elapsed()),
        }
    }
}

/// One line on some of the connections, and its echo.
struct Check {
    asked: usize,
    answered: usize,
    /// By connection: the rest of the echo.
    expected: HashMap<usize, Vec<u8>>,
    until: Instant,
}

#[derive(Serialize)]
#[serde(tag = "event", rename = "checked")]
struct Checked {
    asked: usize,
    answered: usize,
}

impl Check {
    fn begin(crowd: &mut Crowd<'_>, deadline: Duration) -> Self {
        let open: Vec<usize> =
            (0..crowd.members.len()).filter(|index| crowd.members[*index].is_some()).collect();
        let every = open.len().div_ceil(CHECKED_MAX).max(1);
        let mut check =
            Self { asked: 0, answered: 0, expected: HashMap::new(), until: Instant::now() + deadline };
        for index in open.into_iter().step_by(every) {
            // Of its own, so that an echo on the wrong connection shows.
            let line = format!("are you there, {index}?\n").into_bytes();
            let Some(connection) = &mut crowd.members[index] else { continue };
            check.asked += 1;
            match connection.send(&line).and_then(|()| connection.flush()) {
                Ok(_) => drop(check.expected.insert(index, line)),
                Err(_) => crowd.fail(index, Failure::Lost.into()),
            }
        }
        check
    }

    /// Nothing is missing, or it has taken too long.
    fn is_over(&self) -> bool {
        self.expected.is_empty() || Instant::now() >= self.until
    }

    fn checked(&self) -> Checked {
        Checked { asked: self.asked, answered: self.answered }
    }
}

/// Takes what an established connection says, which is an echo or nothing.
fn hear(crowd: &mut Crowd<'_>, index: usize, check: Option<&mut Check>) {
    let Some((check, mut rest)) = check.and_then(|check| {
        let rest = check.expected.remove(&index)?;
        Some((check, rest))
    }) else {
        crowd.hear(index, |_| Err(Failure::WrongAnswer));
        return;
    };
    let kept = crowd.hear(index, |bytes| match rest.starts_with(bytes) {
        true => {
            rest.drain(..bytes.len());
            Ok(())
        }
        false => Err(Failure::WrongAnswer),
    });
    match kept {
        true if rest.is_empty() => check.answered += 1,
        true => drop(check.expected.insert(index, rest)),
        false => {}
    }
}
