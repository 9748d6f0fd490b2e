//! Owns the hand-over between the I/O thread and the lanes of one token: the queue, who is idle, and whether the token
//! is up. Must not know PKCS#11. Its mutex is held for moments only, so the I/O thread never waits for a token.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::SignatureScheme;
use tokio::sync::oneshot;

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

/// Why the token is down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownReason {
    /// It returned a signature that does not verify.
    WrongSignature(String),
    /// Its PIN is refused, locked or about to be locked.
    Pin(String),
    /// A call failed and no repair helped.
    Call(String),
}

impl fmt::Display for DownReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DownReason::Pin(what) | DownReason::Call(what) => formatter.write_str(what),
            DownReason::WrongSignature(what) => write!(formatter, "a signature was wrong: {what}"),
        }
    }
}

/// Lanes sit on a stack: the one that sat down last is called first, because its stack, its arena and what the module
/// keeps for its thread are still in the caches. At most one is on its way at a time: it calls the next when it finds more
/// work than its own, so that of a burst only as many lanes wake up as find something to do.
pub struct Desk {
    state: Mutex<State>,
    /// `stop` waits here for the last lane.
    ended: Condvar,
    /// Copy of `state.down.is_none() && !state.stopping`, to be read without the mutex.
    up: AtomicBool,
    stats: Arc<TokenStats>,
}

struct State {
    queue: Queue<Job>,
    lanes_max: usize,
    /// Lanes whose thread runs or is about to.
    live: usize,
    /// Lanes that wait for work, those on their way included.
    idle: usize,
    /// Lanes that can be called.
    seats: Vec<Arc<Seat>>,
    /// Lanes that were called and have not looked for work yet.
    on_their_way: usize,
    lanes_started: usize,
    handles: Vec<JoinHandle<()>>,
    down: Option<Down>,
    stopping: bool,
    /// `stop` gave up waiting: the last lane must not touch the module any more, because the process is ending.
    abandoned: bool,
    all_ended: bool,
}

/// Where one lane waits for work; each has its own, so that the caller chooses who wakes up.
#[derive(Default)]
pub struct Seat {
    called: Condvar,
}

struct Down {
    reason: DownReason,
    suspect: Weak<TokenKey>,
    /// `None`: no probe can help.
    probe_at: Option<Instant>,
    backoff: Duration,
    /// A lane is probing now.
    probing: bool,
}

const PROBE_BACKOFF_MIN: Duration = Duration::from_millis(100);
const PROBE_BACKOFF_MAX: Duration = Duration::from_secs(5);

/// What the submitter must do for a new lane: start a thread for it.
pub struct LaneWanted {
    pub number: usize,
}

impl Desk {
    pub fn new(count_max: usize, age_max: Duration, lanes_max: usize, stats: Arc<TokenStats>) -> Desk {
        let state = State {
            queue: Queue::new(count_max, age_max, lanes_max),
            lanes_max,
            live: 0,
            idle: 0,
            seats: Vec::new(),
            on_their_way: 0,
            lanes_started: 0,
            handles: Vec::new(),
            down: None,
            stopping: false,
            abandoned: false,
            all_ended: false,
        };
        Desk { state: Mutex::new(state), ended: Condvar::new(), up: AtomicBool::new(true), stats }
    }

    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    pub fn down_reason(&self) -> Option<DownReason> {
        self.lock().down.as_ref().map(|down| down.reason.clone())
    }

    /// Queues the job and calls a lane, or says that a new lane is wanted for it. Gives the job back when it cannot.
    pub fn submit(&self, class: Class, job: Job) -> Result<Option<LaneWanted>, (Job, SignError)> {
        let now = job.submitted;
        let mut state = self.lock();
        if state.stopping || state.down.is_some() {
            self.stats.shed_token_down.add(1);
            return Err((job, SignError::TokenDown));
        }
        // Here too, not only on lanes: when every lane hangs, requests must still be answered when they are too old.
        self.shed_stale(&mut state, now);
        if let Err(job) = state.queue.push(class, job, now) {
            self.stats.shed_queue_full.add(1);
            return Err((job, SignError::QueueFull));
        }
        let wanted = if state.queue.runnable() > state.idle { state.new_lane() } else { None };
        let called = state.call_one();
        self.show(&state);
        drop(state);
        wake(called);
        Ok(wanted)
    }

    /// The first lane of a token, which also probes.
    pub fn first_lane(&self) -> Option<LaneWanted> {
        self.lock().new_lane()
    }

    pub fn lane_started(&self, handle: JoinHandle<()>) {
        let mut state = self.lock();
        state.handles.retain(|handle| !handle.is_finished());
        state.handles.push(handle);
    }

    /// A lane ends, or could not be started. True: it was the last one and has to let go of the token.
    pub fn lane_ended(&self) -> bool {
        let mut state = self.lock();
        state.live -= 1;
        self.show(&state);
        state.live == 0 && state.stopping && !state.abandoned
    }

    /// The token allows no more PKCS#11 sessions: the pool shrinks to the lanes that have one. False: the asking lane
    /// is the only one and must stay.
    pub fn shrink(&self) -> bool {
        let mut state = self.lock();
        if state.live < 2 {
            return false;
        }
        state.lanes_max = state.live - 1;
        let lanes = state.lanes_max;
        state.queue.set_lanes(lanes);
        true
    }

    /// Blocks a lane, on its own `seat`, until there is work. `None`: the token is stopping.
    pub fn next(&self, seat: &Arc<Seat>) -> Option<Work> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            let now = Instant::now();
            let mut wait_max = None;
            match &mut state.down {
                Some(down) if down.probing => {}
                Some(down) => match down.probe_at {
                    Some(at) if at <= now => {
                        down.probing = true;
                        return Some(Work::Probe(down.suspect.upgrade()));
                    }
                    Some(at) => wait_max = Some(at - now),
                    None => {}
                },
                None => {
                    self.shed_stale(&mut state, now);
                    if let Some((class, job)) = state.queue.take() {
                        let called = state.call_one();
                        self.show(&state);
                        drop(state);
                        wake(called);
                        return Some(Work::Sign(class, job));
                    }
                }
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

    pub fn done(&self, class: Class) {
        if class == Class::Rsa {
            self.lock().queue.done(class);
        }
    }

    /// Opens the circuit: everybody who waits is answered at once. `probe`: whether trying again may help.
    pub fn mark_down(&self, reason: DownReason, suspect: &Weak<TokenKey>, probe: bool) {
        let mut state = self.lock();
        if state.down.is_some() {
            return;
        }
        state.down = Some(Down {
            reason,
            suspect: suspect.clone(),
            probe_at: probe.then(|| Instant::now() + PROBE_BACKOFF_MIN),
            backoff: PROBE_BACKOFF_MIN,
            probing: false,
        });
        self.up.store(false, Ordering::Relaxed);
        self.stats.went_down.add(1);
        self.turn_away(&mut state);
        // Idle lanes must learn when to probe.
        state.call_all();
    }

    /// Closes the circuit, or plans the next probe. `Err(None)` keeps the reason and stops probing.
    pub fn probed(&self, result: Result<(), Option<DownReason>>) {
        let mut state = self.lock();
        let stopping = state.stopping;
        let Some(down) = &mut state.down else { return };
        down.probing = false;
        match result {
            Ok(()) => {
                state.down = None;
                self.up.store(!stopping, Ordering::Relaxed);
            }
            Err(Some(reason)) => {
                down.reason = reason;
                down.backoff = (down.backoff * 2).min(PROBE_BACKOFF_MAX);
                down.probe_at = Some(Instant::now() + down.backoff);
            }
            Err(None) => down.probe_at = None,
        }
        state.call_all();
    }

    /// No new work; waits for the lanes until `budget` is over. Returns the lanes that did not come back.
    pub fn stop(&self, budget: Duration) -> usize {
        let give_up = Instant::now() + budget;
        let mut state = self.lock();
        state.stopping = true;
        self.up.store(false, Ordering::Relaxed);
        self.turn_away(&mut state);
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

    fn shed_stale(&self, state: &mut State, now: Instant) {
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
    }

    fn turn_away(&self, state: &mut State) {
        for job in state.queue.drain() {
            self.stats.shed_token_down.add(1);
            // The caller may just have gone away.
            let _ = job.reply.send(Err(SignError::TokenDown));
        }
        self.show(state);
    }

    fn show(&self, state: &State) {
        let stats = &self.stats;
        stats.queue_depth_ec.set(state.queue.len(Class::Ec) as i64);
        stats.queue_depth_rsa.set(state.queue.len(Class::Rsa) as i64);
        stats.lanes_idle.set(state.idle as i64);
        stats.lanes_busy.set(state.live as i64 - state.idle as i64);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn new_lane(&mut self) -> Option<LaneWanted> {
        if self.live >= self.lanes_max || self.stopping {
            return None;
        }
        self.live += 1;
        self.lanes_started += 1;
        Some(LaneWanted { number: self.lanes_started })
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
