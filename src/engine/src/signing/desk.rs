//! Owns the hand-over between the I/O thread and the lanes of one token: the queue, who is idle, who is lost in the module,
//! and how the token does. Must not know PKCS#11. Its mutex is held for moments only, so the I/O thread never waits for a
//! token.
//!
//! ```text
//!          a call fails for good            requests have waited too long
//!   Up ────────────────────────> Mending ─────────────────────────> Down
//!   ^      or every lane is lost    │   a wrong signature, a refused PIN, no thread left: at once
//!   └──────── a probe signs ────────┴──────────────────────────────────┘
//! ```
//! Up: lanes sign. Mending: requests wait in the queue while one lane repairs. Down: they are refused at once, and one lane
//! probes now and then.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::SignatureScheme;
use tokio::sync::oneshot;

use super::pace::{PAUSE_MAX, PAUSE_MIN, jittered};
use super::queue::{Class, Queue, Request, Stale};
use super::token_key::TokenKey;
use super::token_stats::TokenStats;
use super::{SignError, Signed};

/// One signature somebody waits for.
pub struct Job {
    pub key: Arc<TokenKey>,
    pub scheme: SignatureScheme,
    pub message: Vec<u8>,
    pub submitted: Instant,
    /// Nobody else can be asked: it waits while the token is mended. Others are answered, to be asked of another token.
    pub is_alone: bool,
    /// The token failed on it before. It does not wait for another repair.
    pub has_failed: bool,
    /// Closed when the caller went away.
    pub reply: oneshot::Sender<Result<Signed, SignError>>,
}

impl Request for Job {
    fn is_cancelled(&self) -> bool {
        self.reply.is_closed()
    }
}

/// What a lane is to do next.
pub enum Work {
    Sign(Class, Job),
    /// The token is down: find out whether it is back, with the key that it failed on, if that still exists.
    Probe(Option<Arc<TokenKey>>),
}

/// What a probe has found.
pub enum Probed {
    Up,
    /// Not yet; the earliest moment to try again, where that is known.
    Still(DownReason, Option<Instant>),
    /// The token answers, and has none of its keys: nobody is to wait for that to change.
    Keyless(DownReason),
    /// No probe can help.
    Never(DownReason),
}

/// How a token does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Health {
    Up,
    Mending,
    Down,
}

/// Why the token is down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownReason {
    /// It returned a signature that does not verify.
    WrongSignature(String),
    /// Its PIN is refused, locked or about to be locked.
    Pin(String),
    /// A call failed and no repair helped.
    Call(String),
    /// Every lane is lost in the module.
    Hangs,
}

impl fmt::Display for DownReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DownReason::Pin(what) | DownReason::Call(what) => formatter.write_str(what),
            DownReason::Hangs => formatter.write_str("no call into the module returns"),
            DownReason::WrongSignature(what) => write!(formatter, "a signature was wrong: {what}"),
        }
    }
}

/// What a desk is bounded by.
pub struct DeskPlan {
    /// Waiting requests per class.
    pub count_max: usize,
    pub age_max: Duration,
    /// Lanes that serve.
    pub lanes_max: usize,
    /// Threads, those that are lost in the module included.
    pub threads_max: usize,
    /// A lane that has been at one thing for so long is lost.
    pub lost_after: Duration,
}

/// Lanes sit on a stack: the one that sat down last is called first, because its stack, its arena and what the module
/// keeps for its thread are still in the caches. At most one is on its way at a time: it calls the next when it finds more
/// work than its own, so that of a burst only as many lanes wake up as find something to do.
pub struct Desk {
    state: Mutex<State>,
    /// `stop` waits here for the last lane.
    ended: Condvar,
    /// Copy of `state.health()`, to be read without the mutex.
    health: AtomicU8,
    /// As configured.
    lanes_max: usize,
    threads_max: usize,
    age_max: Duration,
    lost_after: Duration,
    stats: Arc<TokenStats>,
}

struct State {
    queue: Queue<Job>,
    /// Fewer than configured while the token allows fewer PKCS#11 sessions.
    lanes_max: usize,
    threads_max: usize,
    shrunk_until: Option<Instant>,
    /// Lanes whose thread runs or is about to, the lost ones included.
    live: usize,
    /// Lanes that wait for work, those on their way included.
    idle: usize,
    /// Lanes that can be called.
    seats: Vec<Arc<Seat>>,
    /// Lanes that were called and have not looked for work yet.
    on_their_way: usize,
    lanes_started: usize,
    /// Lanes that are at something.
    tasks: Vec<Task>,
    /// So many of them are lost.
    lost: usize,
    /// When the first of them will be lost.
    lost_at: Instant,
    handles: Vec<JoinHandle<()>>,
    down: Option<Down>,
    stopping: bool,
    /// `stop` gave up waiting: the last lane must not touch the module any more, because the process is ending.
    abandoned: bool,
    all_ended: bool,
}

/// What a lane is at: a request of this class, or starting, probing, leaving.
struct Task {
    lane: usize,
    class: Option<Class>,
    since: Instant,
    is_lost: bool,
}

/// Where one lane waits for work; each has its own, so that the caller chooses who wakes up.
pub struct Seat {
    lane: usize,
    called: Condvar,
}

struct Down {
    reason: DownReason,
    suspect: Weak<TokenKey>,
    since: Instant,
    /// Mending until then.
    waits_until: Option<Instant>,
    /// `None`: no probe can help.
    probe_at: Option<Instant>,
    backoff: Duration,
    /// The lane that is probing now.
    probing: Option<usize>,
}

/// For so long a token is believed that it allows no more PKCS#11 sessions.
const SHRUNK_FOR: Duration = Duration::from_secs(60);

/// What whoever is told must do for a new lane: start a thread for it.
pub struct LaneWanted {
    pub number: usize,
}

impl Seat {
    pub fn new(lane: usize) -> Arc<Seat> {
        Arc::new(Seat { lane, called: Condvar::new() })
    }
}

impl Desk {
    pub fn new(plan: DeskPlan, stats: Arc<TokenStats>) -> Desk {
        let DeskPlan { count_max, age_max, lanes_max, threads_max, lost_after } = plan;
        let state = State {
            queue: Queue::new(count_max, age_max, lanes_max),
            lanes_max,
            threads_max,
            shrunk_until: None,
            live: 0,
            idle: 0,
            seats: Vec::new(),
            on_their_way: 0,
            lanes_started: 0,
            tasks: Vec::new(),
            lost: 0,
            lost_at: Instant::now() + lost_after,
            handles: Vec::new(),
            down: None,
            stopping: false,
            abandoned: false,
            all_ended: false,
        };
        let health = AtomicU8::new(Health::Up as u8);
        Desk {
            state: Mutex::new(state),
            ended: Condvar::new(),
            health,
            lanes_max,
            threads_max,
            age_max,
            lost_after,
            stats,
        }
    }

    pub fn health(&self) -> Health {
        match self.health.load(Ordering::Relaxed) {
            up if up == Health::Up as u8 => Health::Up,
            mending if mending == Health::Mending as u8 => Health::Mending,
            _ => Health::Down,
        }
    }

    pub fn down_reason(&self) -> Option<DownReason> {
        self.lock().down.as_ref().map(|down| down.reason.clone())
    }

    /// For how long the token has been down with a lane lost in the module: then this process cannot mend it.
    pub fn hangs_for(&self) -> Option<Duration> {
        let state = self.lock();
        let down = state.down.as_ref()?;
        (state.lost > 0).then(|| down.since.elapsed())
    }

    /// Queues the job and calls a lane, or says that a new lane is wanted. Gives the job back when it cannot.
    pub fn submit(&self, class: Class, job: Job) -> Result<Option<LaneWanted>, (Job, SignError)> {
        let now = job.submitted;
        let mut state = self.lock();
        // Here too, not only on lanes: when every lane hangs, requests must still be answered when they are too old.
        self.tidy(&mut state, now);
        let refused = state.stopping || state.health() == Health::Down;
        if refused || (state.health() == Health::Mending && !job.is_alone) {
            self.stats.shed_token_down.add(1);
            return Err((job, SignError::TokenDown));
        }
        if let Err(job) = state.queue.push(class, job, now) {
            self.stats.shed_queue_full.add(1);
            return Err((job, SignError::QueueFull));
        }
        let wanted = self.lane_wanted(&mut state, now);
        let called = state.call_one();
        self.show(&state);
        drop(state);
        wake(called);
        Ok(wanted)
    }

    /// What nobody would notice while no request comes and no lane returns. To be called now and then.
    pub fn look(&self) -> Option<LaneWanted> {
        let now = Instant::now();
        let mut state = self.lock();
        self.tidy(&mut state, now);
        let wanted = self.lane_wanted(&mut state, now);
        self.show(&state);
        wanted
    }

    /// The first lane of a token, which also probes.
    pub fn first_lane(&self) -> Option<LaneWanted> {
        self.lock().new_lane(Instant::now())
    }

    pub fn lane_started(&self, handle: JoinHandle<()>) {
        let mut state = self.lock();
        state.handles.retain(|handle| !handle.is_finished());
        state.handles.push(handle);
    }

    /// A lane ends, or could not be started. True: it was the last one and has to let go of the token.
    pub fn lane_ended(&self, lane: usize) -> bool {
        let mut state = self.lock();
        state.finish(lane);
        state.live -= 1;
        self.show(&state);
        state.live == 0 && state.stopping && !state.abandoned
    }

    /// The token allows no more PKCS#11 sessions: the pool shrinks, for a while, to the lanes that have one. False: the asking
    /// lane is the only one and must stay.
    pub fn shrink(&self) -> bool {
        let mut state = self.lock();
        let serving = state.serving();
        if serving < 2 {
            return false;
        }
        state.lanes_max = serving - 1;
        state.threads_max = state.live - 1;
        state.shrunk_until = Some(Instant::now() + SHRUNK_FOR);
        let lanes = state.lanes_max;
        state.queue.set_lanes(lanes);
        true
    }

    /// Blocks a lane, on its own `seat`, until there is work. `None`: the token is stopping, or the lane was lost and
    /// another one is in its place.
    pub fn next(&self, seat: &Arc<Seat>) -> Option<Work> {
        let mut state = self.lock();
        state.finish(seat.lane);
        loop {
            let now = Instant::now();
            if state.stopping || state.serving() > state.lanes_max {
                // Closing its PKCS#11 session may hang, too.
                state.begin(seat.lane, None, now);
                self.show(&state);
                return None;
            }
            self.tidy(&mut state, now);
            let mut wait_max = None;
            match &mut state.down {
                Some(Down { probing: Some(_), .. }) => {}
                Some(down) => match down.probe_at {
                    Some(at) if at <= now => {
                        down.probing = Some(seat.lane);
                        let suspect = down.suspect.upgrade();
                        state.begin(seat.lane, None, now);
                        self.show(&state);
                        return Some(Work::Probe(suspect));
                    }
                    Some(at) => wait_max = Some(at - now),
                    None => {}
                },
                None => {
                    if let Some((class, job)) = state.queue.take() {
                        state.begin(seat.lane, Some(class), now);
                        let called = state.call_one();
                        self.show(&state);
                        drop(state);
                        wake(called);
                        return Some(Work::Sign(class, job));
                    }
                }
            }
            if let Some(until) = state.down.as_ref().and_then(|down| down.waits_until) {
                wait_max = Some(wait_max.unwrap_or(Duration::MAX).min(until - now));
            }
            state.sit_down(seat);
            self.show(&state);
            state = match wait_max {
                Some(wait) => seat
                    .called
                    .wait_timeout(state, wait)
                    .map_or_else(|poison| poison.into_inner().0, |ok| ok.0),
                None => seat.called.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
            state.stand_up(seat);
            self.show(&state);
        }
    }

    /// Nobody was ever there. Before the first lane, which looks for the token at once.
    pub fn begin_down(&self, reason: DownReason) {
        let mut state = self.lock();
        let mut down = Down::new(reason, Weak::new(), true);
        down.probe_at = Some(Instant::now());
        self.goes_down(&mut state, down);
    }

    /// What kept the token down may have changed.
    pub fn probe_soon(&self) {
        let mut state = self.lock();
        if let Some(down) = &mut state.down {
            down.probe_at = Some(Instant::now());
            down.backoff = PAUSE_MIN;
        }
        state.call_all();
    }

    /// Opens the circuit: everybody who waits is answered at once. `probe`: whether trying again may help.
    pub fn mark_down(&self, reason: DownReason, suspect: &Weak<TokenKey>, probe: bool) {
        let mut state = self.lock();
        match &mut state.down {
            // What was hoped for will not be.
            Some(down) => {
                down.waits_until = None;
                down.reason = reason;
                if !probe {
                    down.probe_at = None;
                }
            }
            None => self.goes_down(&mut state, Down::new(reason, suspect.clone(), probe)),
        }
        self.tidy(&mut state, Instant::now());
        // Idle lanes must learn when to probe.
        state.call_all();
    }

    /// Has the token repaired while requests wait. The job that showed that it must be, if it is to be tried again, waits in
    /// front of them.
    pub fn mend(&self, reason: DownReason, suspect: &Weak<TokenKey>, job: Option<(Class, Job)>) {
        let now = Instant::now();
        let mut state = self.lock();
        if state.down.is_none() {
            let mut down = Down::new(reason, suspect.clone(), true);
            down.waits_until = Some(now + self.age_max);
            down.probe_at = Some(now);
            self.goes_down(&mut state, down);
            for job in state.queue.remove(|job| !job.is_alone) {
                self.turn_away(job);
            }
        }
        if let Some((class, mut job)) = job {
            job.has_failed = true;
            let since = job.submitted;
            match state.health() == Health::Mending && job.is_alone {
                true => state.queue.put_back(class, job, since),
                false => self.turn_away(job),
            }
        }
        self.tidy(&mut state, now);
        state.call_all();
    }

    /// Closes the circuit, or plans the next probe.
    pub fn probed(&self, lane: usize, found: Probed) {
        let now = Instant::now();
        let mut state = self.lock();
        let Some(down) = &mut state.down else { return };
        match found {
            Probed::Up => state.down = None,
            // It was lost meanwhile, and another one probes.
            Probed::Still(..) | Probed::Keyless(_) if down.probing != Some(lane) => return,
            Probed::Keyless(reason) => {
                down.reason = reason;
                down.no_longer_probed_by(lane);
                down.waits_until = None;
            }
            Probed::Still(reason, not_before) => {
                down.reason = reason;
                down.no_longer_probed_by(lane);
                down.probe_at = down.probe_at.max(not_before);
            }
            Probed::Never(reason) => {
                down.reason = reason;
                down.probing = None;
                down.probe_at = None;
                down.waits_until = None;
            }
        }
        self.tidy(&mut state, now);
        state.call_all();
    }

    /// No new work; waits for the lanes until `budget` is over. Returns the lanes that did not come back.
    pub fn stop(&self, budget: Duration) -> usize {
        let give_up = Instant::now() + budget;
        let mut state = self.lock();
        state.stopping = true;
        self.tidy(&mut state, Instant::now());
        state.call_all();
        while !state.all_ended {
            if state.live == 0 && state.handles.is_empty() {
                return 0; // no lane was ever started
            }
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.abandoned = true;
                return state.live;
            }
            state =
                self.ended.wait_timeout(state, left).map_or_else(|poison| poison.into_inner().0, |ok| ok.0);
        }
        let handles = std::mem::take(&mut state.handles);
        drop(state);
        for handle in handles {
            // It has said its last word to the desk; a lane's panic was printed by the panic hook.
            let _ = handle.join();
        }
        0
    }

    /// The last lane has let go of the token.
    pub fn all_ended(&self) {
        self.lock().all_ended = true;
        self.ended.notify_all();
    }

    fn goes_down(&self, state: &mut State, down: Down) {
        state.down = Some(down);
        // Before anybody is answered: who asks for another token must not be sent here again.
        self.health.store(state.health() as u8, Ordering::Relaxed);
        self.stats.went_down.add(1);
    }

    /// What time has brought about: another try for more lanes, lanes that are lost, requests that are too old or that nothing
    /// can be hoped for.
    fn tidy(&self, state: &mut State, now: Instant) {
        if state.shrunk_until.is_some_and(|until| until <= now) {
            state.shrunk_until = None;
            (state.lanes_max, state.threads_max) = (self.lanes_max, self.threads_max);
            state.queue.set_lanes(self.lanes_max);
        }
        if now >= state.lost_at {
            let lost = state.write_off(now, self.lost_after);
            self.stats.written_off.add(lost as u64);
        }
        if state.down.is_none() && state.lost > 0 && state.serving() == 0 {
            // The lane that takes their place finds out whether there is hope.
            let mut down = Down::new(DownReason::Hangs, Weak::new(), true);
            down.waits_until = Some(now + self.age_max);
            down.probe_at = Some(now);
            self.goes_down(state, down);
        }
        let is_hopeless = state.serving() == 0 && state.live >= state.threads_max;
        if let Some(down) = &mut state.down
            && down.waits_until.is_some_and(|until| until <= now || is_hopeless)
        {
            down.waits_until = None;
        }
        while let Some(stale) = state.queue.take_stale(now) {
            match stale {
                Stale::Cancelled(_) => self.stats.cancelled.add(1),
                Stale::Aged(job) => {
                    self.stats.shed_queue_aged.add(1);
                    // The caller may just have gone away.
                    let _ = job.reply.send(Err(SignError::QueueAged));
                }
            }
        }
        if state.health() == Health::Down {
            for job in state.queue.drain() {
                self.turn_away(job);
            }
        }
        self.health.store(state.health() as u8, Ordering::Relaxed);
        self.show(state);
    }

    fn turn_away(&self, job: Job) {
        self.stats.shed_token_down.add(1);
        // The caller may just have gone away.
        let _ = job.reply.send(Err(SignError::TokenDown));
    }

    /// One more lane for what waits, or to probe in place of those that are lost.
    fn lane_wanted(&self, state: &mut State, now: Instant) -> Option<LaneWanted> {
        let is_wanted = match &state.down {
            Some(down) => {
                down.probing.is_none() && down.probe_at.is_some_and(|at| at <= now) && state.idle == 0
            }
            None => state.queue.runnable() > state.idle,
        };
        if is_wanted { state.new_lane(now) } else { None }
    }

    fn show(&self, state: &State) {
        let stats = &self.stats;
        stats.queue_depth_ec.set(state.queue.len(Class::Ec) as i64);
        stats.queue_depth_rsa.set(state.queue.len(Class::Rsa) as i64);
        stats.lanes_idle.set(state.idle as i64);
        stats.lanes_busy.set((state.serving() - state.idle) as i64);
        stats.lanes_lost.set(state.lost as i64);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Down {
    fn new(reason: DownReason, suspect: Weak<TokenKey>, probe: bool) -> Down {
        let now = Instant::now();
        Down {
            reason,
            suspect,
            since: now,
            waits_until: None,
            probe_at: probe.then_some(now + PAUSE_MIN),
            backoff: PAUSE_MIN,
            probing: None,
        }
    }

    /// The probe came to nothing; the next one is later.
    fn no_longer_probed_by(&mut self, lane: usize) {
        if self.probing == Some(lane) {
            self.probing = None;
            self.probe_at = Some(Instant::now() + jittered(self.backoff));
            self.backoff = (self.backoff * 2).min(PAUSE_MAX);
        }
    }
}

impl State {
    fn new_lane(&mut self, now: Instant) -> Option<LaneWanted> {
        if self.serving() >= self.lanes_max || self.live >= self.threads_max || self.stopping {
            return None;
        }
        self.live += 1;
        self.lanes_started += 1;
        // It opens its PKCS#11 session before it looks for work, and may be lost in that.
        self.begin(self.lanes_started, None, now);
        Some(LaneWanted { number: self.lanes_started })
    }

    fn begin(&mut self, lane: usize, class: Option<Class>, since: Instant) {
        self.tasks.push(Task { lane, class, since, is_lost: false });
    }

    /// The lane is back from what it was at, or has panicked in it.
    fn finish(&mut self, lane: usize) {
        if let Some(index) = self.tasks.iter().position(|task| task.lane == lane) {
            match self.tasks.swap_remove(index) {
                Task { is_lost: true, .. } => self.lost -= 1,
                Task { class: Some(class), .. } => self.queue.done(class),
                Task { class: None, .. } => {}
            }
        }
        if let Some(down) = &mut self.down {
            down.no_longer_probed_by(lane);
        }
    }

    /// How many lanes are lost that were not yet.
    fn write_off(&mut self, now: Instant, lost_after: Duration) -> usize {
        let lost_before = self.lost;
        self.lost_at = now + lost_after;
        for Task { lane, class, since, is_lost } in &mut self.tasks {
            if *is_lost {
                continue;
            }
            if *since + lost_after > now {
                self.lost_at = self.lost_at.min(*since + lost_after);
                continue;
            }
            *is_lost = true;
            self.lost += 1;
            if let Some(class) = class {
                self.queue.done(*class);
            }
            if let Some(down) = &mut self.down {
                down.no_longer_probed_by(*lane);
            }
        }
        self.lost - lost_before
    }

    /// Lanes that are not lost.
    fn serving(&self) -> usize {
        self.live - self.lost
    }

    fn health(&self) -> Health {
        match &self.down {
            _ if self.stopping => Health::Down,
            None => Health::Up,
            Some(Down { waits_until: Some(_), .. }) => Health::Mending,
            Some(_) => Health::Down,
        }
    }

    /// The lane to wake, when there is work and nobody is coming for it.
    fn call_one(&mut self) -> Option<Arc<Seat>> {
        if self.on_their_way > 0 || self.queue.runnable() == 0 {
            return None;
        }
        let seat = self.seats.pop()?;
        self.on_their_way += 1;
        Some(seat)
    }

    /// For what every lane must know.
    fn call_all(&mut self) {
        self.on_their_way += self.seats.len();
        for seat in self.seats.drain(..) {
            seat.called.notify_one();
        }
    }

    fn sit_down(&mut self, seat: &Arc<Seat>) {
        self.idle += 1;
        self.seats.push(seat.clone());
    }

    /// Called, or because the wait was over: then nobody has taken the seat off the stack.
    fn stand_up(&mut self, seat: &Arc<Seat>) {
        self.idle -= 1;
        match self.seats.iter().position(|taken| Arc::ptr_eq(taken, seat)) {
            Some(index) => drop(self.seats.remove(index)),
            None => self.on_their_way -= 1,
        }
    }
}

/// After the mutex is free: who wakes up needs it first of all.
fn wake(called: Option<Arc<Seat>>) {
    if let Some(seat) = called {
        seat.called.notify_one();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_pool_that_shrank_for_lack_of_sessions_grows_again_after_a_while() {
        let plan = DeskPlan {
            count_max: 1,
            age_max: Duration::from_secs(1),
            lanes_max: 4,
            threads_max: 8,
            lost_after: Duration::from_secs(1),
        };
        let desk = Desk::new(plan, Arc::default());
        assert!(desk.first_lane().is_some());
        assert!(!desk.shrink(), "the only one stays");
        let second = desk.lock().new_lane(Instant::now()).unwrap();
        assert!(desk.shrink());
        desk.lane_ended(second.number);
        let limits = || {
            let state = desk.lock();
            (state.lanes_max, state.threads_max)
        };
        assert_eq!(limits(), (1, 1));
        assert!(desk.lock().new_lane(Instant::now()).is_none());
        desk.tidy(&mut desk.lock(), Instant::now() + SHRUNK_FOR);
        assert_eq!(limits(), (4, 8));
    }
}
