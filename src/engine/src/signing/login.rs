//! Owns a token's way in: the module's file, the PIN, and the anchor PKCS#11 session that keeps the login alive.
//! Must not know keys, lanes or signatures. Runs on the thread that starts the token and on the lane that logs in again, one
//! at a time.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cryptoki_sys::CK_SLOT_ID;
use zeroize::Zeroizing;

use super::ckr::{Ckr, Repair};
use super::login_lock::LoginLock;
use super::pace::Pace;
use super::pkcs11::{Module, ResetFault, Session, TokenInfo};
use super::presented_pins::Pin;
use super::token_error::Problem;
use super::token_stats::TokenStats;

/// The login is the process', not a PKCS#11 session's (PKCS#11 v3.0 5.6): closing the last session logs out. The
/// anchor is a session that is only ever held, so lanes may close theirs. C_Logout is never called.
pub struct Login {
    path: PathBuf,
    isolate: bool,
    place: Place,
    /// Which token: slot ids change when a module is initialised again.
    label: String,
    /// As the token calls itself, once it was seen.
    serial: Option<String>,
    maker: Maker,
    pin: SharedPin,
    lock_wait: Duration,
    anchor: Option<Session>,
    /// The last login did not fail.
    is_in: bool,
    /// Of repeated logins; each rewrites SoftHSM's token file, and makes HSMs ask each other.
    pace: Pace,
    stats: Arc<TokenStats>,
}

pub struct LoginPlan {
    pub path: PathBuf,
    pub isolate: bool,
    pub label: String,
    pub serial: Option<String>,
    pub maker: Maker,
    pub pin: SharedPin,
    pub lock_wait: Duration,
}

/// What else a token is to say of itself: the PIN is for no other one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Maker {
    pub manufacturer: Option<String>,
    pub model: Option<String>,
}

/// Can be replaced while a login hangs, and then is presented by the next one.
pub type SharedPin = Arc<Mutex<Zeroizing<Vec<u8>>>>;

/// The module, from the moment at which it was loaded and initialised for a token.
pub type Entered = OnceLock<Arc<Module>>;

/// The slot of a token, and in which C_Initialize it was that.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub slot: CK_SLOT_ID,
    pub incarnation: u64,
}

impl Place {
    /// Not found yet: in no incarnation.
    const UNKNOWN: Place = Place { slot: 0, incarnation: u64::MAX };
}

impl Login {
    /// Nobody is logged in yet.
    pub fn new(plan: LoginPlan, stats: Arc<TokenStats>) -> Login {
        let LoginPlan { path, isolate, label, serial, maker, pin, lock_wait } = plan;
        let (place, pace) = (Place::UNKNOWN, Pace::default());
        Login {
            path,
            isolate,
            place,
            label,
            serial,
            maker,
            pin,
            lock_wait,
            anchor: None,
            is_in: false,
            pace,
            stats,
        }
    }

    /// Loads the module, finds the token, opens the anchor and logs in, unless this process is logged in already.
    pub fn start(&mut self, entered: &Entered) -> Result<(), Problem> {
        let _lock = take_lock(&self.path, self.lock_wait, &self.stats);
        let module = self.enter(entered)?;
        let token = self.find(module)?;
        let anchor = open_anchor(module, self.place)?;
        let is_logged_in = anchor.is_logged_in().map_err(Problem::call("C_GetSessionInfo"))?;
        self.anchor = Some(anchor);
        if !is_logged_in {
            refuse_risk(&token)?;
            self.present_pin()?;
        }
        self.is_in = true;
        Ok(())
    }

    /// Logs in after the token forgot us, or for the first time, having initialised the module again if it is still in `reset`.
    /// The caller makes sure that one lane does it for all. `epoch` is counted before and after the login: a number that was a
    /// handle before may mean another key from the login on.
    pub fn again(
        &mut self,
        entered: &Entered,
        reset: Option<u64>,
        epoch: &AtomicU64,
    ) -> Result<(), LoginFault> {
        // Another initialisation has a pace of its own, and a login belongs to it.
        if reset.is_none()
            && entered.get().is_some_and(|module| self.place.incarnation == module.incarnation())
        {
            self.pace.may_begin().map_err(LoginFault::TooSoon)?;
        }
        // For all of it: SoftHSM does not see a token that another process is writing.
        let _lock = take_lock(&self.path, self.lock_wait, &self.stats);
        let module = self.enter(entered)?;
        if let Some(incarnation) = reset
            && module.incarnation() == incarnation
        {
            module.reinitialize(incarnation).map_err(LoginFault::NotReset)?;
            self.stats.reinitialized.add(1);
        }
        if self.place.incarnation != module.incarnation() {
            // The module does not know it any more, and is not told that it is closed.
            self.anchor = None;
            self.find(module)?;
        }
        if let Some(anchor) = self.anchor.take() {
            match anchor.is_logged_in() {
                Ok(_) => self.anchor = Some(anchor),
                Err(ckr) => anchor.end_after(ckr),
            }
        }
        if self.anchor.is_none() {
            self.anchor = Some(open_anchor(module, self.place)?);
        }
        // SoftHSM cannot read its flags any more after a login when its files are read-only. This PIN was right once.
        if let Ok(token) = module.token_info(self.place.slot) {
            refuse_risk(&token)?;
        }
        self.pace.begin();
        self.is_in = false;
        epoch.fetch_add(1, Ordering::AcqRel);
        self.present_pin()?;
        epoch.fetch_add(1, Ordering::AcqRel);
        self.is_in = true;
        Ok(())
    }

    /// Whether the PIN may be presented if the login is given up: as far as can be known without presenting it.
    pub fn may_log_in_again(&self, entered: &Entered) -> bool {
        let Some(module) = entered.get() else { return true };
        let is_risky = module.token_info(self.place.slot).is_ok_and(|token| refuse_risk(&token).is_err());
        !is_risky && self.pin_of(&self.secret()).obstacle().is_none()
    }

    pub fn is_in(&self) -> bool {
        self.is_in
    }

    /// Ends the login, when no other PKCS#11 session of this process is open.
    pub fn end(&mut self) {
        self.anchor = None;
    }

    pub fn place(&self) -> Place {
        self.place
    }

    fn enter<'a>(&self, entered: &'a Entered) -> Result<&'a Arc<Module>, Problem> {
        if let Some(module) = entered.get() {
            return Ok(module);
        }
        let module =
            Module::load(&self.path, self.isolate).map_err(|error| Problem::Load(error.to_string()))?;
        module.initialize().map_err(Problem::call("C_Initialize"))?;
        // Nobody else sets it: whoever comes here has the login to itself.
        Ok(entered.get_or_init(|| module))
    }

    fn find(&mut self, module: &Module) -> Result<TokenInfo, Problem> {
        let (place, token) = find_slot(module, &self.label, self.serial.as_deref(), &self.maker)?;
        self.place = place;
        self.serial = Some(token.serial.clone());
        Ok(token)
    }

    fn present_pin(&self) -> Result<(), Problem> {
        let Some(anchor) = &self.anchor else { return Err(Problem::call("C_Login")(Ckr::NOT_INITIALIZED)) };
        let secret = self.secret();
        let pin = self.pin_of(&secret);
        pin.present()?;
        let answer = anchor.login(&secret);
        pin.answered(Some(answer.err().unwrap_or(Ckr::OK)));
        match answer {
            Ok(()) => {
                self.stats.logged_in.add(1);
                Ok(())
            }
            // Another thread of this process was faster.
            Err(Ckr::USER_ALREADY_LOGGED_IN) => Ok(()),
            // Unless it was replaced meanwhile: that one was not tried.
            Err(ckr) if ckr.repair() == Repair::PinRefused && *self.secret() == *secret => {
                Err(Problem::PinRefused(ckr))
            }
            Err(ckr) => Err(Problem::call("C_Login")(ckr)),
        }
    }

    fn secret(&self) -> Zeroizing<Vec<u8>> {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pin_of<'a>(&'a self, secret: &'a [u8]) -> Pin<'a> {
        Pin { module: &self.path, serial: self.serial.as_deref().unwrap_or_default(), pin: secret }
    }
}

/// Why nobody is logged in again.
#[derive(Debug)]
pub enum LoginFault {
    /// Not before then.
    TooSoon(Instant),
    NotReset(ResetFault),
    Problem(Problem),
}

impl From<Problem> for LoginFault {
    fn from(problem: Problem) -> LoginFault {
        LoginFault::Problem(problem)
    }
}

fn open_anchor(module: &Arc<Module>, Place { slot, incarnation }: Place) -> Result<Session, Problem> {
    Session::open(module, slot, incarnation).map_err(Problem::call("C_OpenSession"))
}

fn find_slot(
    module: &Module,
    label: &str,
    serial: Option<&str>,
    maker: &Maker,
) -> Result<(Place, TokenInfo), Problem> {
    let incarnation = module.incarnation();
    let slots = module.slots().map_err(Problem::call("C_GetSlotList"))?;
    // A slot that cannot tell its token is none of ours; one broken reader must not hide the others.
    let tokens: Vec<(CK_SLOT_ID, TokenInfo)> =
        slots.into_iter().filter_map(|slot| Some((slot, module.token_info(slot).ok()?))).collect();
    let is = |wanted: Option<&str>, found: &str| wanted.is_none_or(|wanted| wanted == found);
    let matches = |info: &TokenInfo| {
        info.label == label
            && is(serial, &info.serial)
            && is(maker.manufacturer.as_deref(), &info.manufacturer)
            && is(maker.model.as_deref(), &info.model)
    };
    let matching: Vec<_> = tokens.iter().filter(|(_, info)| matches(info)).collect();
    match matching[..] {
        [(slot, info)] => Ok((Place { slot: *slot, incarnation }, info.clone())),
        [] => Err(Problem::TokenMissing {
            label: label.to_owned(),
            serial: serial.map(str::to_owned),
            // A slot that waits for C_InitToken has no label.
            present: tokens
                .into_iter()
                .map(|(_, info)| info.label)
                .filter(|label| !label.is_empty())
                .collect(),
        }),
        _ => Err(Problem::TokenAmbiguous {
            label: label.to_owned(),
            serials: matching.iter().map(|(_, info)| info.serial.clone()).collect(),
        }),
    }
}

/// Takes the login lock; when another process holds it too long the login goes ahead without it, counted: refusing to
/// serve because somebody else hangs would be worse than the small race the lock prevents.
fn take_lock(module: &Path, wait: Duration, stats: &TokenStats) -> Option<LoginLock> {
    LoginLock::acquire(module, wait).map_err(|_| stats.login_lock_timeouts.add(1)).ok()
}

fn refuse_risk(token: &TokenInfo) -> Result<(), Problem> {
    match (token.pin_locked, token.pin_final_try) {
        (true, _) => Err(Problem::PinLocked),
        (_, true) => Err(Problem::PinFinalTry),
        _ => Ok(()),
    }
}
