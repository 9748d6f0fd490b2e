//! Owns when something is due: as soon as there is room (closed loop), or at fixed spacing whatever the server does (open loop).
//! Knows not what it is.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Waking more often costs more than it makes precise.
const WAKE_INTERVAL_MIN: Duration = Duration::from_micros(50);

/// When nothing more is due.
#[derive(Clone, Copy)]
pub struct Until {
    pub time: Duration,
    pub count: u64,
}

pub struct Pace {
    began: Instant,
    until: Until,
    taken: u64,
    open: Option<OpenLoop>,
}

struct OpenLoop {
    per_second: f64,
    /// poll(2) and epoll_wait(2) know only milliseconds, and a late start is counted as the server's latency.
    timer: OwnedFd,
}

impl Pace {
    pub fn closed(until: Until) -> Self {
        Self { began: Instant::now(), until, taken: 0, open: None }
    }

    /// `token` is what wakes the poll; then call `woken`.
    pub fn open(per_second: f64, until: Until, registry: &Registry, token: Token) -> io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let interval = timespec(Duration::from_secs_f64(1.0 / per_second).max(WAKE_INTERVAL_MIN));
        let began = Instant::now();
        timerfd_settime(
            &timer,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval: interval, it_value: interval },
        )?;
        registry.register(&mut SourceFd(&timer.as_raw_fd()), token, Interest::READABLE)?;
        Ok(Self { began, until, taken: 0, open: Some(OpenLoop { per_second, timer }) })
    }

    /// In a closed loop whatever is due waits for room; in an open loop it fails.
    pub fn waits_for_room(&self) -> bool {
        self.open.is_none()
    }

    /// Takes one that is due by now. Returns since when it is.
    pub fn take(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let due = match self.open {
            Some(_) => self.next_due().filter(|due| *due <= now)?,
            None if self.is_over() => return None,
            None => now,
        };
        self.taken += 1;
        Some(due)
    }

    /// Nothing will be due any more.
    pub fn is_over(&self) -> bool {
        match self.open {
            Some(_) => self.next_due().is_none(),
            None => self.taken >= self.until.count || self.began.elapsed() >= self.until.time,
        }
    }

    /// The timer goes on only when it has been read.
    pub fn woken(&self) -> io::Result<()> {
        let Some(open) = &self.open else { return Ok(()) };
        match rustix::io::read(&open.timer, &mut [0; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// How many were due, whether there was room for them or not.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// In an open loop.
    fn next_due(&self) -> Option<Instant> {
        let after = Duration::from_secs_f64(self.taken as f64 / self.open.as_ref()?.per_second);
        (self.taken < self.until.count && after < self.until.time).then_some(self.began + after)
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs().cast_signed(), tv_nsec: duration.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mio::{Events, Poll};

    const WAKE: Token = Token(7);

    #[test]
    fn an_open_loop_is_due_at_fixed_spacing_however_late_it_is_asked() {
        let mut poll = Poll::new().expect("epoll");
        let until = Until { time: Duration::from_millis(50), count: u64::MAX };
        let mut pace = Pace::open(1000.0, until, poll.registry(), WAKE).expect("timer");
        let mut due = Vec::new();
        let mut events = Events::with_capacity(1);
        while !pace.is_over() {
            poll.poll(&mut events, None).expect("poll");
            pace.woken().expect("timer");
            due.extend(std::iter::from_fn(|| pace.take()));
        }
        assert_eq!((due.len(), pace.taken()), (50, 50));
        for (index, moment) in due.iter().enumerate() {
            assert_eq!(*moment, due[0] + Duration::from_millis(index as u64));
        }
    }

    #[test]
    fn a_closed_loop_is_due_at_once_until_its_count_is_over() {
        let mut pace = Pace::closed(Until { time: Duration::MAX, count: 3 });
        assert!(pace.waits_for_room());
        assert_eq!(std::iter::from_fn(|| pace.take()).count(), 3);
        assert!(pace.is_over());
        assert!(Pace::closed(Until { time: Duration::ZERO, count: 3 }).is_over());
    }
}
