//! Owns the order in which waiting requests of one token are signed, and their bounds.
//! Must not know PKCS#11, threads or what a request is. Pure; used under the desk's mutex by the I/O thread and lanes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Two queues, because an RSA signature takes ten times as long as an EC one and must not delay it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// ECDSA and Ed25519.
    Ec,
    Rsa,
}

/// What the queue must be able to ask a request.
pub trait Request {
    /// Nobody waits for the answer any more.
    fn is_cancelled(&self) -> bool;
}

/// A request that left the queue without being signed.
#[derive(Debug, PartialEq, Eq)]
pub enum Stale<R> {
    Cancelled(R),
    Aged(R),
}

/// EC first, except:
/// - after `EC_IN_A_ROW_MAX` EC requests a waiting RSA request has its turn, so that EC does not starve RSA;
/// - RSA never holds more than `rsa_running_max` lanes, so that there is always a lane for EC.
#[derive(Debug)]
pub struct Queue<R> {
    ec: VecDeque<Waiting<R>>,
    rsa: VecDeque<Waiting<R>>,
    /// EC requests taken since an RSA request could have been taken instead.
    ec_in_a_row: u32,
    rsa_running: usize,
    rsa_running_max: usize,
    count_max: usize,
    age_max: Duration,
}

#[derive(Debug)]
struct Waiting<R> {
    since: Instant,
    request: R,
}

const EC_IN_A_ROW_MAX: u32 = 8;

impl<R: Request> Queue<R> {
    /// `count_max` holds for each class on its own: a burst of RSA must not shed EC.
    pub fn new(count_max: usize, age_max: Duration, lanes: usize) -> Queue<R> {
        Queue {
            ec: VecDeque::new(),
            rsa: VecDeque::new(),
            ec_in_a_row: 0,
            rsa_running: 0,
            rsa_running_max: rsa_running_max(lanes),
            count_max,
            age_max,
        }
    }

    /// Gives the request back when its class is full.
    pub fn push(&mut self, class: Class, request: R, now: Instant) -> Result<(), R> {
        let count_max = self.count_max;
        let queue = self.of(class);
        if queue.len() >= count_max {
            return Err(request);
        }
        queue.push_back(Waiting { since: now, request });
        Ok(())
    }

    /// Removes one request that needs no signature any more, from the front of either class. Call until `None`.
    /// Fronts suffice: ages grow towards the front, and what is cancelled further back is found when it gets there.
    pub fn take_stale(&mut self, now: Instant) -> Option<Stale<R>> {
        let age_max = self.age_max;
        for queue in [&mut self.ec, &mut self.rsa] {
            let Some(first) = queue.front() else { continue };
            let cancelled = first.request.is_cancelled();
            if cancelled || now.saturating_duration_since(first.since) > age_max {
                return queue.pop_front().map(|first| match cancelled {
                    true => Stale::Cancelled(first.request),
                    false => Stale::Aged(first.request),
                });
            }
        }
        None
    }

    /// Gives a request that was taken back its place, in front; also when its class is full.
    pub fn put_back(&mut self, class: Class, request: R, since: Instant) {
        self.of(class).push_front(Waiting { since, request });
    }

    /// Everything of which `leaves` is true.
    pub fn remove(&mut self, leaves: impl Fn(&R) -> bool) -> Vec<R> {
        let mut left = Vec::new();
        for queue in [&mut self.ec, &mut self.rsa] {
            let (leaving, staying) =
                queue.drain(..).partition(|waiting: &Waiting<R>| leaves(&waiting.request));
            *queue = staying;
            left.extend(Vec::from(leaving).into_iter().map(|waiting: Waiting<R>| waiting.request));
        }
        left
    }

    /// The next request to sign. The lane that takes it says `done` afterwards.
    pub fn take(&mut self) -> Option<(Class, R)> {
        let rsa_may_run = !self.rsa.is_empty() && self.rsa_running < self.rsa_running_max;
        let rsa_has_turn = rsa_may_run && self.ec_in_a_row >= EC_IN_A_ROW_MAX;
        if !rsa_has_turn && let Some(first) = self.ec.pop_front() {
            self.ec_in_a_row = if rsa_may_run { self.ec_in_a_row + 1 } else { 0 };
            return Some((Class::Ec, first.request));
        }
        if !rsa_may_run {
            return None;
        }
        let first = self.rsa.pop_front()?;
        self.ec_in_a_row = 0;
        self.rsa_running += 1;
        Some((Class::Rsa, first.request))
    }

    pub fn done(&mut self, class: Class) {
        if class == Class::Rsa {
            self.rsa_running -= 1;
        }
    }

    /// How many requests an idle lane could take now.
    pub fn runnable(&self) -> usize {
        self.ec.len() + self.rsa.len().min(self.rsa_running_max.saturating_sub(self.rsa_running))
    }

    pub fn len(&self, class: Class) -> usize {
        match class {
            Class::Ec => self.ec.len(),
            Class::Rsa => self.rsa.len(),
        }
    }

    /// Everything that waits, for a token that went down.
    pub fn drain(&mut self) -> impl Iterator<Item = R> {
        self.ec.drain(..).chain(self.rsa.drain(..)).map(|waiting| waiting.request)
    }

    /// The token turned out to allow fewer PKCS#11 sessions than configured.
    pub fn set_lanes(&mut self, lanes: usize) {
        self.rsa_running_max = rsa_running_max(lanes);
    }

    fn of(&mut self, class: Class) -> &mut VecDeque<Waiting<R>> {
        match class {
            Class::Ec => &mut self.ec,
            Class::Rsa => &mut self.rsa,
        }
    }
}

fn rsa_running_max(lanes: usize) -> usize {
    lanes.saturating_sub(1).max(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    struct Fake {
        name: u32,
        cancelled: bool,
    }

    impl Request for Fake {
        fn is_cancelled(&self) -> bool {
            self.cancelled
        }
    }

    const AGE_MAX: Duration = Duration::from_secs(1);

    #[test]
    fn ec_goes_first() {
        let mut queue = queue(8, 4);
        push(&mut queue, Class::Rsa, 1);
        push(&mut queue, Class::Ec, 2);
        assert_eq!(order(&mut queue), [(Class::Ec, 2), (Class::Rsa, 1)]);
    }

    #[test]
    fn a_flood_of_ec_lets_one_rsa_pass_in_nine() {
        let mut queue = queue(64, 2);
        push(&mut queue, Class::Rsa, 100);
        (0..20).for_each(|name| push(&mut queue, Class::Ec, name));
        let position = order(&mut queue).iter().position(|(class, _)| *class == Class::Rsa);
        assert_eq!(position, Some(8));
    }

    #[test]
    fn rsa_leaves_one_lane_to_ec() {
        for (lanes, rsa_lanes) in [(1, 1), (2, 1), (4, 3)] {
            let mut queue = queue(8, lanes);
            (0..8).for_each(|name| push(&mut queue, Class::Rsa, name));
            let taken = (0..8).filter(|_| queue.take().is_some()).count();
            assert_eq!(taken, rsa_lanes, "of {lanes} lanes");
            assert_eq!(queue.runnable(), 0);
            queue.done(Class::Rsa);
            assert_eq!(queue.runnable(), 1);
        }
    }

    #[test]
    fn a_full_class_refuses_and_leaves_the_other_open() {
        let mut queue = queue(2, 1);
        push(&mut queue, Class::Rsa, 0);
        push(&mut queue, Class::Rsa, 1);
        let refused = Fake { name: 2, cancelled: false };
        assert_eq!(queue.push(Class::Rsa, refused, Instant::now()).unwrap_err().name, 2);
        push(&mut queue, Class::Ec, 3);
    }

    #[test]
    fn a_request_leaves_unsigned_just_after_its_age_and_not_at_it() {
        let mut queue = queue(2, 1);
        let start = Instant::now();
        queue.push(Class::Ec, Fake { name: 0, cancelled: false }, start).unwrap();
        assert_eq!(queue.take_stale(start + AGE_MAX), None);
        assert!(matches!(queue.take_stale(start + AGE_MAX + Duration::from_nanos(1)), Some(Stale::Aged(_))));
        assert!(queue.take().is_none());
    }

    #[test]
    fn a_cancelled_request_leaves_unsigned() {
        let mut queue = queue(2, 1);
        let start = Instant::now();
        queue.push(Class::Rsa, Fake { name: 0, cancelled: true }, start).unwrap();
        assert!(matches!(queue.take_stale(start), Some(Stale::Cancelled(_))));
        assert_eq!(queue.take_stale(start), None);
    }

    fn queue(count_max: usize, lanes: usize) -> Queue<Fake> {
        Queue::new(count_max, AGE_MAX, lanes)
    }

    fn push(queue: &mut Queue<Fake>, class: Class, name: u32) {
        queue.push(class, Fake { name, cancelled: false }, Instant::now()).unwrap();
    }

    fn order(queue: &mut Queue<Fake>) -> Vec<(Class, u32)> {
        std::iter::from_fn(|| queue.take()).map(|(class, fake)| (class, fake.name)).collect()
    }
}
