//! Owns one configured token: its start, its keys, its login and its end.
//! Must not know TLS connections. `start`, `find_key` and `stop` run on the thread that configures (JavaScript's) and
//! may wait for the token; `submit` runs on the I/O thread and never waits; the rest runs on lanes.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::ckr::Ckr;
use super::desk::{Desk, DeskPlan, DownReason, Health, Job, LaneWanted};
use super::key_directory::KeyDirectory;
use super::lane;
use super::login::{Entered, Login, LoginFault, LoginPlan, Maker, Place, SharedPin};
use super::pace::Pace;
use super::pkcs11::{Matches, Release, Session};
use super::public_key::PublicKey;
use super::service_time::ServiceTime;
use super::token_error::{Problem, TokenError};
use super::token_key::{Fault, KeyPlan, TokenKey, exposure};
use super::token_stats::TokenStats;
use super::{Class, SignError};

/// What a token is configured to be.
pub struct TokenPlan {
    pub name: String,
    /// Absolute path of the PKCS#11 module.
    pub module: PathBuf,
    /// CKA label of the token, without its padding. Tokens are never addressed by slot id: those change.
    pub label: String,
    pub serial: Option<String>,
    pub maker: Maker,
    /// Kept to log in again, in memory that is wiped when it is given up.
    pub pin: Zeroizing<Vec<u8>>,
    /// 1..=256. Threads are started when they are needed first.
    pub lanes: usize,
    /// Lanes, those that are lost in the module included: each holds a PKCS#11 session. At least `lanes`.
    pub threads_max: usize,
    /// A lane that has been in the module for so long is lost, and another one takes its place.
    pub lost_after: Duration,
    /// How much more this token is asked than others with the same keys; 0: only when none of those is up.
    pub weight: u32,
    /// Waiting requests per class (EC, RSA), 1..; one more is answered `QueueFull`.
    pub queue_max: usize,
    /// A request that waited longer is answered `QueueAged`, not signed.
    pub queue_age_max: Duration,
    /// How long a login waits for another process' login; then it goes ahead.
    pub login_lock_wait: Duration,
    /// RTLD_DEEPBIND.
    pub isolate: bool,
    /// 1: verify each RSA signature before use; N: the first of a PKCS#11 session and key, then one in N.
    pub verify_rsa_every: u32,
    /// The same for ECDSA and Ed25519.
    pub verify_ec_every: u32,
}

pub const LANES_MAX: usize = 256;
/// So many deadlines of a signature after which nobody waits for its lane any more either.
pub const LOST_AFTER_DEADLINES: u32 = 2;

/// Lanes hold it, so it ends with `stop`, not with the last handle.
pub struct Token {
    name: Arc<str>,
    module: Entered,
    login: Mutex<Login>,
    pin: SharedPin,
    /// Where the token is, as of the last login. Apart from `login`, which is held across calls.
    place: Mutex<Place>,
    /// Counts logins, and whatever else ends the trust in handles. One that was found in an older epoch is not used.
    epoch: AtomicU64,
    keys: Mutex<HashMap<KeyIdentity, Weak<TokenKey>>>,
    directory: Mutex<KeyDirectory>,
    keys_numbered: AtomicU64,
    /// Initialisations of the module while somebody else does well with it.
    disturbances: Mutex<Pace>,
    /// Counts keys that were witnesses of others.
    probes: AtomicUsize,
    /// Signatures that failed since the last good one.
    failures_in_a_row: AtomicU32,
    lanes: u32,
    weight: AtomicU32,
    lost_after: Duration,
    desk: Desk,
    stats: Arc<TokenStats>,
    service_ec: ServiceTime,
    service_rsa: ServiceTime,
    pub(super) verify_rsa_every: u32,
    pub(super) verify_ec_every: u32,
    released: OnceLock<Release>,
}

/// What two certificates must have in common to share a key.
#[derive(PartialEq, Eq, Hash)]
struct KeyIdentity {
    id: Option<Vec<u8>>,
    label: Option<String>,
    spki: Vec<u8>,
}

impl KeyIdentity {
    fn of(KeyPlan { id, label, spki, .. }: &KeyPlan) -> KeyIdentity {
        KeyIdentity { id: id.clone(), label: label.clone(), spki: spki.clone() }
    }
}

/// How a token ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopOutcome {
    /// All lanes are gone; this is what became of the module.
    Stopped(Release),
    /// So many lanes did not come back in time. The module was not finalised, and running its exit handlers may crash:
    /// leave the process with `_exit`.
    LanesInside(usize),
}

/// This many failed signatures without a good one between them open the circuit.
const FAILURES_MAX: u32 = 3;

/// A key or a token that is really gone must not cost the others of its module an initialisation again and again.
const DISTURBANCE_PAUSE_MIN: Duration = Duration::from_secs(1);
const DISTURBANCE_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Which happens ever more rarely.
const DISTURBED_MAX: u32 = 3;

/// So many other keys are tried before a token is down for what one of them is wrong with.
const WITNESSES_MAX: usize = 8;

/// Of this process, whichever modules they are in.
static TOKENS: Mutex<Vec<Weak<Token>>> = Mutex::new(Vec::new());

impl Token {
    /// Loads the module, finds the token, logs in once and starts the first lane. Takes the login lock of the module:
    /// the caller must not hold it. Run it before anything else in this process logs in: with read-only token files
    /// SoftHSM cannot tell its label any more after a login. A process that is logged in already does not present the
    /// PIN, so a wrong one shows only when it is needed.
    pub fn start(plan: TokenPlan) -> Result<Arc<Token>, TokenError> {
        let name = plan.name.clone();
        start(plan).map_err(|problem| TokenError::token(&name, problem))
    }

    /// One that is away: down until a lane has found it and logged in, which `look` starts. Calls nothing of its module on this
    /// thread.
    pub fn awaited(plan: TokenPlan) -> Result<Arc<Token>, TokenError> {
        let name = plan.name.clone();
        awaited(plan).map_err(|problem| TokenError::token(&name, problem))
    }

    /// What may change while the token is in use: its PIN, for the next login, and its weight. A token that is down is looked at
    /// again: what kept it down may have been mended, and a PIN that was refused is not presented again for that.
    pub fn adopt(&self, pin: &Zeroizing<Vec<u8>>, weight: u32) {
        self.weight.store(weight, Ordering::Relaxed);
        lock(&self.pin).clone_from(pin);
        self.desk.probe_soon();
    }

    /// Finds the private key, and proves with one verified signature that it is the certificate's. A key that is in use
    /// for the same public key has been proved, or will be before its first signature.
    pub fn find_key(self: &Arc<Self>, plan: KeyPlan) -> Result<Arc<TokenKey>, TokenError> {
        let identity = KeyIdentity::of(&plan);
        if let Some(known) = lock(&self.keys).get(&identity).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let name = plan.name.clone();
        let found =
            self.new_key(plan).and_then(|key| self.undisturbed(|| self.try_find_key(&key)).map(|()| key));
        let key = found.map_err(|problem| TokenError::key(&self.name, &name, problem))?;
        self.keep(identity, &key);
        Ok(key)
    }

    fn keep(&self, identity: KeyIdentity, key: &Arc<TokenKey>) {
        let mut keys = lock(&self.keys);
        // Keys that nobody uses any more go when there would be no room: looking at all each time is quadratic.
        if keys.len() == keys.capacity() {
            keys.retain(|_, key| key.strong_count() > 0);
        }
        keys.insert(identity, Arc::downgrade(key));
    }

    /// The private key of a token that cannot be asked now: it is found and proved before its first signature.
    pub fn expect_key(self: &Arc<Self>, plan: KeyPlan) -> Result<Arc<TokenKey>, TokenError> {
        // Whoever could ask the token named both.
        let is_named = |KeyIdentity { id, label, spki }: &KeyIdentity| {
            *spki == plan.spki
                && (plan.id.is_none() || plan.id == *id)
                && (plan.label.is_none() || plan.label == *label)
        };
        let known = |(identity, key): (_, &Weak<TokenKey>)| is_named(identity).then(|| key.upgrade())?;
        if let Some(known) = lock(&self.keys).iter().find_map(known) {
            return Ok(known);
        }
        let identity = KeyIdentity::of(&plan);
        let name = plan.name.clone();
        let key = self.new_key(plan).map_err(|problem| TokenError::key(&self.name, &name, problem))?;
        self.keep(identity, &key);
        Ok(key)
    }

    /// HMAC-SHA256 of each of `inputs` under the one secret key of these names; at least one is given. Takes a PKCS#11
    /// session of its own, and as long as the token does.
    pub fn derive<const N: usize>(
        &self,
        id: Option<&[u8]>,
        label: Option<&str>,
        inputs: [&[u8]; N],
    ) -> Result<[Zeroizing<[u8; 32]>; N], TokenError> {
        let name = label.map_or_else(|| format!("with id {}", hex(id.unwrap_or_default())), str::to_owned);
        self.undisturbed(|| self.try_derive(id, label, inputs))
            .map_err(|problem| TokenError::key(&self.name, &name, problem))
    }

    /// Frees what only helps to find many keys. To be called when those of a configuration have been found.
    pub fn keys_are_found(&self) {
        *lock(&self.directory) = KeyDirectory::default();
    }

    /// No new work; waits for lanes until `budget` is over, then leaves them. C_Finalize only when nobody is inside.
    pub fn stop(&self, budget: Duration) -> StopOutcome {
        match (self.desk.stop(budget), self.released.get()) {
            (0, Some(release)) => StopOutcome::Stopped(*release),
            // It never had a lane.
            (0, None) => StopOutcome::Stopped(Release::NotEntered),
            (lanes, _) => StopOutcome::LanesInside(lanes),
        }
    }

    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub fn is_up(&self) -> bool {
        self.desk.health() == Health::Up
    }

    pub fn health(&self) -> Health {
        self.desk.health()
    }

    /// Writes off lanes that are lost, and starts others. To be called now and then; the I/O thread does when requests come.
    pub fn look(self: &Arc<Self>) {
        if let Some(wanted) = self.desk.look() {
            // Out of threads: later.
            let _ = self.start_lane(wanted);
        }
    }

    /// Down with a lane lost in the module, for so long that only another process can help.
    pub fn is_stuck(&self) -> bool {
        self.desk.hangs_for().is_some_and(|duration| duration > self.lost_after)
    }

    pub fn down_reason(&self) -> Option<DownReason> {
        self.desk.down_reason()
    }

    pub fn stats(&self) -> &TokenStats {
        &self.stats
    }

    /// How long a new request would wait and take, roughly, and by how much the token is preferred. Only good for comparing
    /// tokens: the least is asked first.
    pub(super) fn cost(&self, class: Class) -> (Health, bool, Duration) {
        // One that has not been measured costs a little, or its weight would mean nothing.
        let expected = self.expected(class).max(Duration::from_micros(1));
        let weight = self.weight.load(Ordering::Relaxed);
        (self.health(), weight == 0, expected / weight.max(1))
    }

    /// How long one request has occupied the token.
    pub(super) fn took(&self, class: Class, time: Duration) {
        match class {
            Class::Ec => self.service_ec.measured(time),
            Class::Rsa => self.service_rsa.measured(time),
        }
    }

    fn expected(&self, class: Class) -> Duration {
        let (ec, rsa) = (self.service_ec.estimate(), self.service_rsa.estimate());
        let depth = |gauge: &crate::stats::Gauge| u32::try_from(gauge.get()).unwrap_or(0);
        let (ecs, rsas) = (depth(&self.stats.queue_depth_ec), depth(&self.stats.queue_depth_rsa));
        let (ahead, own) = match class {
            Class::Ec => (ec * ecs, ec),
            Class::Rsa => (ec * ecs + rsa * rsas, rsa),
        };
        // A lane that was called is idle until it has woken up, and what it was called for waits.
        let wanted = depth(&self.stats.lanes_busy) + ecs + rsas;
        let lanes = self.lanes;
        if wanted < lanes { own } else { (ahead + own) / lanes + own }
    }

    pub(super) fn submit(self: &Arc<Self>, class: Class, job: Job) -> Result<(), (Job, SignError)> {
        if let Some(wanted) = self.desk.submit(class, job)? {
            // Out of threads: the lanes that exist will come to the job.
            let _ = self.start_lane(wanted);
        }
        Ok(())
    }

    pub(super) fn desk(&self) -> &Desk {
        &self.desk
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Which C_Initialize of the module holds.
    pub(super) fn incarnation(&self) -> u64 {
        self.module.get().map_or(0, |module| module.incarnation())
    }

    pub(super) fn open_session(&self) -> Result<Session, Ckr> {
        let Some(module) = self.module.get() else { return Err(Ckr::USER_NOT_LOGGED_IN) };
        let Place { slot, incarnation } = *lock(&self.place);
        Session::open(module, slot, incarnation)
    }

    /// Logs in again, once for all lanes that found themselves logged out in `epoch`; with `reset`, not before the module is
    /// in another incarnation than this.
    pub(super) fn login_again(&self, epoch: u64, reset: Option<u64>) -> Result<(), LoginFault> {
        let mut login = lock(&self.login);
        if self.epoch() != epoch && login.is_in() {
            return Ok(());
        }
        // Every private object handle died with the old login.
        let done = login.again(&self.module, reset, &self.epoch);
        *lock(&self.place) = login.place();
        done
    }

    /// No handle is used any more that was found until now: one of them was not what it was.
    pub(super) fn distrust_handles(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether the module may be initialised for the sake of a key that it does not show any more: SoftHSM never shows one
    /// again whose file it once could not read.
    pub(super) fn may_search_anew(&self) -> bool {
        self.stats.lanes_lost.get() == 0 && lock(&self.disturbances).may_begin().is_ok()
    }

    /// Whether the module may be initialised because this token is gone, or shows no key: not by a token that has a lane lost in
    /// it, nor where a login that is there could not be had again, nor soon again where somebody has one.
    pub(super) fn may_reset(&self, for_a_key: bool) -> bool {
        if self.stats.lanes_lost.get() > 0 {
            return false;
        }
        let neighbours = self.neighbours();
        if for_a_key || !neighbours.is_empty() {
            let mut disturbances = lock(&self.disturbances);
            if disturbances.may_begin().is_err() {
                return false;
            }
            disturbances.begin();
        }
        // One that is busy with its login cannot be asked, and has not got it yet.
        let is_safe =
            |token: &Token| token.login.try_lock().is_ok_and(|login| login.may_log_in_again(&token.module));
        (!for_a_key || is_safe(self)) && neighbours.iter().all(|neighbour| is_safe(neighbour))
    }

    /// Tokens of the same module that are logged in. After an initialisation none is that nobody asks for a signature.
    fn neighbours(&self) -> Vec<Arc<Token>> {
        let Some(module) = self.module.get() else { return Vec::new() };
        let is_neighbour = |other: &Arc<Token>| {
            !std::ptr::eq(&raw const **other, self)
                && other.is_up()
                && other.module.get().is_some_and(|its| Arc::ptr_eq(its, module))
                && lock(&other.place).incarnation == module.incarnation()
        };
        let mut tokens: Vec<_> = lock(&TOKENS).iter().filter_map(Weak::upgrade).collect();
        // Not under the mutex: the last one to let go of a token does what may take long.
        tokens.retain(is_neighbour);
        tokens
    }

    /// That are still in use, `suspect` first, then some others: rather such as were there when they were asked for last, and not
    /// always the same.
    pub(super) fn keys_in_use(&self, suspect: Option<&Arc<TokenKey>>) -> Vec<Arc<TokenKey>> {
        let is_other = |key: &Arc<TokenKey>| suspect.is_none_or(|suspect| !Arc::ptr_eq(key, suspect));
        let mut others: Vec<_> =
            lock(&self.keys).values().filter_map(Weak::upgrade).filter(is_other).collect();
        if !others.is_empty() {
            let from = self.probes.fetch_add(WITNESSES_MAX, Ordering::Relaxed) % others.len();
            others.rotate_left(from);
        }
        others.sort_by_key(|key| key.is_lost());
        suspect.cloned().into_iter().chain(others.into_iter().take(WITNESSES_MAX)).collect()
    }

    pub(super) fn signature_succeeded(&self) {
        // Read first: lanes must not fight over the cache line when all is well.
        if self.failures_in_a_row.load(Ordering::Relaxed) != 0 {
            self.failures_in_a_row.store(0, Ordering::Relaxed);
        }
    }

    /// True: that was one too many.
    pub(super) fn signature_failed(&self) -> bool {
        self.failures_in_a_row.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_MAX
    }

    /// The last lane lets go of the token, on its own thread, because these calls may hang too.
    pub(super) fn release(&self) {
        lock(&self.login).end();
        let _ = self.released.set(self.module.get().map_or(Release::NotEntered, |module| module.release()));
        self.desk.all_ended();
    }

    fn start_lane(self: &Arc<Self>, wanted: LaneWanted) -> Result<(), std::io::Error> {
        let token = self.clone();
        let name = format!("lane-{}", wanted.number);
        match thread::Builder::new().name(name).spawn(move || lane::run(&token, wanted.number)) {
            Ok(handle) => {
                self.desk.lane_started(handle);
                Ok(())
            }
            Err(error) => {
                self.desk.lane_ended(wanted.number);
                Err(error)
            }
        }
    }

    /// Another token may have had the module initialised again under `what`: then it begins anew.
    fn undisturbed<T>(&self, what: impl Fn() -> Result<T, Problem>) -> Result<T, Problem> {
        for _ in 0..DISTURBED_MAX {
            let incarnation = self.incarnation();
            let done = what();
            if done.is_ok() || self.incarnation() == incarnation {
                return done;
            }
        }
        what()
    }

    fn try_derive<const N: usize>(
        &self,
        id: Option<&[u8]>,
        label: Option<&str>,
        inputs: [&[u8]; N],
    ) -> Result<[Zeroizing<[u8; 32]>; N], Problem> {
        let session = self.session_of_its_own()?;
        let epoch = self.epoch();
        let is_logged_in = session.is_logged_in().map_err(Problem::call("C_GetSessionInfo"))?;
        if !is_logged_in {
            self.log_in(epoch)?;
        }
        // Found anew each time, which is once in hours: a handle of another login could mean another key.
        let handle = match session.find_secret_keys(id, label).map_err(Problem::call("C_FindObjects"))? {
            Matches::One(handle) => handle,
            Matches::None => return Err(Problem::KeyMissing),
            Matches::Several => return Err(Problem::KeyAmbiguous),
        };
        if let Some((attribute, expected)) =
            exposure(&session, handle).map_err(Problem::call("C_GetAttributeValue"))?
        {
            return Err(Problem::KeyExposed(attribute, expected));
        }
        let mut derived = std::array::from_fn(|_| Zeroizing::new([0; 32]));
        for (input, secret) in inputs.into_iter().zip(&mut derived) {
            session.hmac_sha256(handle, input, secret).map_err(Problem::call("C_Sign"))?;
        }
        Ok(derived)
    }

    /// For what lanes are not asked for: they may all be busy.
    fn session_of_its_own(&self) -> Result<Session, Problem> {
        let epoch = self.epoch();
        let mut opened = self.open_session();
        if matches!(opened, Err(Ckr::USER_NOT_LOGGED_IN)) {
            self.log_in(epoch)?;
            opened = self.open_session();
        }
        opened.map_err(Problem::call("C_OpenSession"))
    }

    fn log_in(&self, epoch: u64) -> Result<(), Problem> {
        loop {
            return match self.login_again(epoch, None) {
                Ok(()) => Ok(()),
                Err(LoginFault::Problem(problem)) => Err(problem),
                Err(LoginFault::NotReset(_)) => Err(Problem::call("C_Initialize")(Ckr::FUNCTION_FAILED)),
                Err(LoginFault::TooSoon(at)) => {
                    thread::sleep(at.saturating_duration_since(Instant::now()));
                    continue;
                }
            };
        }
    }

    fn new_key(self: &Arc<Self>, plan: KeyPlan) -> Result<Arc<TokenKey>, Problem> {
        if plan.id.is_none() && plan.label.is_none() {
            return Err(Problem::KeyUnnamed);
        }
        let public =
            PublicKey::from_spki(&plan.spki).map_err(|reason| Problem::PublicKey(reason.to_string()))?;
        let number = self.keys_numbered.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(TokenKey::new(self.clone(), plan, public, number)))
    }

    fn try_find_key(&self, key: &TokenKey) -> Result<(), Problem> {
        let session = self.session_of_its_own()?;
        let mut epoch = self.epoch();
        let hint = lock(&self.directory).find(&session, epoch, key.id(), key.label());
        let supposed = hint.map(|handle| key.suppose(&session, handle, epoch));
        if let Some(found) = supposed
            && key.prove_fit(&session, found).is_ok()
        {
            return Ok(());
        }
        let stale = supposed.map(|found| found.generation);
        let mut located = key.locate(&session, epoch, stale);
        if matches!(located, Err(Fault::Call(Ckr::USER_NOT_LOGGED_IN))) {
            self.log_in(epoch)?;
            epoch = self.epoch();
            located = key.locate(&session, epoch, stale);
        }
        let found = located.map_err(|fault| fault.problem("C_FindObjects"))?;
        key.prove_fit(&session, found).map_err(|fault| fault.problem("C_Sign"))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn start(plan: TokenPlan) -> Result<Arc<Token>, Problem> {
    let token = Token::new(plan)?;
    let mut login = lock(&token.login);
    if let Err(problem) = login.start(&token.module) {
        drop(login);
        token.release();
        return Err(problem);
    }
    *lock(&token.place) = login.place();
    drop(login);
    token.with_first_lane()
}

fn awaited(plan: TokenPlan) -> Result<Arc<Token>, Problem> {
    let token = Token::new(plan)?;
    token.desk.begin_down(DownReason::Call("it was away at the start".into()));
    // Who does well with the module has just begun.
    lock(&token.disturbances).begin();
    Ok(token)
}

impl Token {
    fn new(plan: TokenPlan) -> Result<Arc<Token>, Problem> {
        if !(1..=LANES_MAX).contains(&plan.lanes) {
            return Err(Problem::Plan(format!("lanes: expected 1 to {LANES_MAX}, found {}", plan.lanes)));
        }
        if plan.threads_max < plan.lanes {
            return Err(Problem::Plan(format!(
                "threads_max: expected at least {}, found {}",
                plan.lanes, plan.threads_max
            )));
        }
        if plan.queue_max == 0 || plan.verify_ec_every == 0 || plan.verify_rsa_every == 0 {
            return Err(Problem::Plan(
                "queue_max, verify_ec_every and verify_rsa_every: expected at least 1, found 0".into(),
            ));
        }
        let stats = Arc::new(TokenStats::default());
        let pin: SharedPin = Arc::new(Mutex::new(plan.pin));
        let login_plan = LoginPlan {
            path: plan.module,
            isolate: plan.isolate,
            label: plan.label,
            serial: plan.serial,
            maker: plan.maker,
            pin: pin.clone(),
            lock_wait: plan.login_lock_wait,
        };
        let login = Login::new(login_plan, stats.clone());
        let token = Arc::new(Token {
            name: plan.name.into(),
            module: Entered::new(),
            place: Mutex::new(login.place()),
            login: Mutex::new(login),
            pin,
            epoch: AtomicU64::new(1),
            keys: Mutex::default(),
            directory: Mutex::default(),
            keys_numbered: AtomicU64::new(0),
            disturbances: Mutex::new(Pace::between(DISTURBANCE_PAUSE_MIN, DISTURBANCE_PAUSE_MAX)),
            probes: AtomicUsize::new(0),
            failures_in_a_row: AtomicU32::new(0),
            lanes: plan.lanes as u32,
            weight: AtomicU32::new(plan.weight),
            lost_after: plan.lost_after,
            desk: Desk::new(
                DeskPlan {
                    count_max: plan.queue_max,
                    age_max: plan.queue_age_max,
                    lanes_max: plan.lanes,
                    threads_max: plan.threads_max,
                    lost_after: plan.lost_after,
                },
                stats.clone(),
            ),
            stats,
            service_ec: ServiceTime::default(),
            service_rsa: ServiceTime::default(),
            verify_rsa_every: plan.verify_rsa_every,
            verify_ec_every: plan.verify_ec_every,
            released: OnceLock::new(),
        });
        let mut tokens = lock(&TOKENS);
        tokens.retain(|token| token.strong_count() > 0);
        tokens.push(Arc::downgrade(&token));
        Ok(token)
    }

    /// One lane from the start: a token without lanes could not be probed.
    fn with_first_lane(self: Arc<Self>) -> Result<Arc<Token>, Problem> {
        if let Some(wanted) = self.desk.first_lane()
            && let Err(error) = self.start_lane(wanted)
        {
            self.release();
            return Err(Problem::Thread(error));
        }
        Ok(self)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
