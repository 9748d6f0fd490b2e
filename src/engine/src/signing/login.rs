//! Owns a token's login: the PIN, and the anchor PKCS#11 session that keeps the login alive.
//! Must not know keys, lanes or signatures. Runs on the thread that starts the token and on the lane that logs in again, one
//! at a time.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptoki_sys::CK_SLOT_ID;
use zeroize::Zeroizing;

use super::ckr::{Ckr, Repair};
use super::login_lock::LoginLock;
use super::pace::Pace;
use super::pkcs11::{Module, ResetFault, Session, TokenInfo};
use super::refused_pins::Pin;
use super::token_error::Problem;
use super::token_stats::TokenStats;

/// The login is the process', not a PKCS#11 session's (PKCS#11 v3.0 5.6): closing the last session logs out. The
/// anchor is a session that is only ever held, so lanes may close theirs. C_Logout is never called.
pub struct Login {
    module: Arc<Module>,
    place: Place,
    /// Which token, as it calls itself: slot ids change when a module is initialised again.
    label: String,
    serial: String,
    pin: Zeroizing<Vec<u8>>,
    lock_wait: Duration,
    anchor: Option<Session>,
    /// Of repeated logins; each rewrites SoftHSM's token file, and makes HSMs ask each other.
    pace: Pace,
}

/// The slot of a token, and in which C_Initialize it was that.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub slot: CK_SLOT_ID,
    pub incarnation: u64,
}

impl Login {
    /// Finds the token, opens the anchor and logs in, unless this process is logged in already. The caller holds the login
    /// lock.
    pub fn start(
        module: &Arc<Module>,
        label: &str,
        serial: Option<&str>,
        pin: Zeroizing<Vec<u8>>,
        lock_wait: Duration,
        stats: &TokenStats,
    ) -> Result<Login, Problem> {
        let (place, token) = find_slot(module, label, serial)?;
        let anchor = open_anchor(module, place)?;
        let logged_in = anchor.is_logged_in().map_err(Problem::call("C_GetSessionInfo"))?;
        let (label, serial) = (token.label.clone(), token.serial.clone());
        let login = Login {
            module: module.clone(),
            place,
            label,
            serial,
            pin,
            lock_wait,
            anchor: Some(anchor),
            pace: Pace::default(),
        };
        if !logged_in {
            refuse_risk(&token)?;
            login.present_pin(stats)?;
        }
        Ok(login)
    }

    /// Logs in after the token forgot us, having initialised the module again if it is still in `reset`. The caller makes
    /// sure that one lane does it for all.
    pub fn again(&mut self, reset: Option<u64>, stats: &TokenStats) -> Result<(), LoginFault> {
        // Another initialisation has a pace of its own, and a login belongs to it.
        if reset.is_none() && self.place.incarnation == self.module.incarnation() {
            self.pace.may_begin().map_err(LoginFault::TooSoon)?;
        }
        // For all of it: SoftHSM does not see a token that another process is writing.
        let _lock = take_lock(self.module.path(), self.lock_wait, stats);
        if let Some(incarnation) = reset
            && self.module.incarnation() == incarnation
        {
            self.module.reinitialize(incarnation).map_err(LoginFault::NotReset)?;
            stats.reinitialized.add(1);
        }
        if self.place.incarnation != self.module.incarnation() {
            // The module does not know it any more, and is not told that it is closed.
            self.anchor = None;
            (self.place, _) = find_slot(&self.module, &self.label, Some(&self.serial))?;
        }
        if let Some(anchor) = self.anchor.take() {
            match anchor.is_logged_in() {
                Ok(_) => self.anchor = Some(anchor),
                Err(ckr) => anchor.end_after(ckr),
            }
        }
        if self.anchor.is_none() {
            self.anchor = Some(open_anchor(&self.module, self.place)?);
        }
        // SoftHSM cannot read its flags any more after a login when its files are read-only. This PIN was right once.
        if let Ok(token) = self.module.token_info(self.place.slot) {
            refuse_risk(&token)?;
        }
        self.pace.begin();
        Ok(self.present_pin(stats)?)
    }

    /// Ends the login, when no other PKCS#11 session of this process is open.
    pub fn end(&mut self) {
        self.anchor = None;
    }

    pub fn place(&self) -> Place {
        self.place
    }

    fn present_pin(&self, stats: &TokenStats) -> Result<(), Problem> {
        let Some(anchor) = &self.anchor else { return Err(Problem::call("C_Login")(Ckr::NOT_INITIALIZED)) };
        let pin = Pin { module: self.module.path(), serial: &self.serial, pin: &self.pin };
        if let Some(ckr) = pin.refused_before() {
            return Err(Problem::PinRefused(ckr));
        }
        match anchor.login(&self.pin) {
            Ok(()) => {
                stats.logged_in.add(1);
                pin.accepted();
                Ok(())
            }
            // Another thread of this process was faster.
            Err(Ckr::USER_ALREADY_LOGGED_IN) => Ok(()),
            Err(ckr) if ckr.repair() == Repair::PinRefused => {
                pin.refused(ckr);
                Err(Problem::PinRefused(ckr))
            }
            Err(ckr) => Err(Problem::call("C_Login")(ckr)),
        }
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

fn find_slot(module: &Module, label: &str, serial: Option<&str>) -> Result<(Place, TokenInfo), Problem> {
    let incarnation = module.incarnation();
    let slots = module.slots().map_err(Problem::call("C_GetSlotList"))?;
    // A slot that cannot tell its token is none of ours; one broken reader must not hide the others.
    let tokens: Vec<(CK_SLOT_ID, TokenInfo)> =
        slots.into_iter().filter_map(|slot| Some((slot, module.token_info(slot).ok()?))).collect();
    let matches = |info: &TokenInfo| info.label == label && serial.is_none_or(|serial| info.serial == serial);
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
pub fn take_lock(module: &Path, wait: Duration, stats: &TokenStats) -> Option<LoginLock> {
    LoginLock::acquire(module, wait).map_err(|_| stats.login_lock_timeouts.add(1)).ok()
}

fn refuse_risk(token: &TokenInfo) -> Result<(), Problem> {
    match (token.pin_locked, token.pin_final_try) {
        (true, _) => Err(Problem::PinLocked),
        (_, true) => Err(Problem::PinFinalTry),
        _ => Ok(()),
    }
}
