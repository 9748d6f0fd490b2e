//! Owns a token's login: the PIN, the anchor PKCS#11 session that keeps the login alive, and the memory of refused
//! PINs. Must not know keys, lanes or signatures. Runs on the thread that starts the token and on the lane that logs
//! in again, one at a time.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest;
use cryptoki_sys::CK_SLOT_ID;
use zeroize::Zeroizing;

use super::ckr::{Ckr, Repair};
use super::login_lock::LoginLock;
use super::pkcs11::{Module, Session, TokenInfo};
use super::token_error::Problem;
use super::token_stats::TokenStats;

/// The login is the process', not a PKCS#11 session's (PKCS#11 v3.0 5.6): closing the last session logs out. The
/// anchor is a session that is only ever held, so lanes may close theirs. C_Logout is never called.
pub struct Login {
    module: Arc<Module>,
    slot: CK_SLOT_ID,
    /// Which token, for the memory of refused PINs: a slot id does not survive a restart of the module.
    serial: String,
    pin: Zeroizing<Vec<u8>>,
    lock_wait: Duration,
    anchor: Option<Session>,
}

impl Login {
    /// Opens the anchor and logs in, unless this process is logged in already. The caller holds the login lock.
    pub fn start(
        module: &Arc<Module>,
        slot: CK_SLOT_ID,
        token: &TokenInfo,
        pin: Zeroizing<Vec<u8>>,
        lock_wait: Duration,
        stats: &TokenStats,
    ) -> Result<Login, Problem> {
        let anchor = Session::open(module, slot).map_err(Problem::call("C_OpenSession"))?;
        let logged_in = anchor.is_logged_in().map_err(Problem::call("C_GetSessionInfo"))?;
        let serial = token.serial.clone();
        let login = Login { module: module.clone(), slot, serial, pin, lock_wait, anchor: Some(anchor) };
        if !logged_in {
            refuse_risk(token)?;
            login.present_pin(stats)?;
        }
        Ok(login)
    }

    /// Logs in after the token forgot us. The caller makes sure that one lane does it for all.
    pub fn again(&mut self, stats: &TokenStats) -> Result<(), Problem> {
        if let Some(anchor) = self.anchor.take() {
            match anchor.is_logged_in() {
                Ok(_) => self.anchor = Some(anchor),
                Err(ckr) => anchor.end_after(ckr),
            }
        }
        if self.anchor.is_none() {
            self.anchor =
                Some(Session::open(&self.module, self.slot).map_err(Problem::call("C_OpenSession"))?);
        }
        // SoftHSM cannot read its flags any more after a login when its files are read-only. This PIN was right once.
        if let Ok(token) = self.module.token_info(self.slot) {
            refuse_risk(&token)?;
        }
        let _lock = take_lock(self.module.path(), self.lock_wait, stats);
        self.present_pin(stats)
    }

    /// Ends the login, when no other PKCS#11 session of this process is open.
    pub fn end(&mut self) {
        self.anchor = None;
    }

    pub fn slot(&self) -> CK_SLOT_ID {
        self.slot
    }

    fn present_pin(&self, stats: &TokenStats) -> Result<(), Problem> {
        let Some(anchor) = &self.anchor else { return Err(Problem::call("C_Login")(Ckr::NOT_INITIALIZED)) };
        let fingerprint = fingerprint(self.module.path(), &self.serial, &self.pin);
        if let Some(ckr) = refused_before(&fingerprint) {
            return Err(Problem::PinRefused(ckr));
        }
        match anchor.login(&self.pin) {
            Ok(()) => {
                stats.logged_in.add(1);
                Ok(())
            }
            // Another thread of this process was faster.
            Err(Ckr::USER_ALREADY_LOGGED_IN) => Ok(()),
            Err(ckr) if ckr.repair() == Repair::PinRefused => {
                remember_refused(fingerprint, ckr);
                Err(Problem::PinRefused(ckr))
            }
            Err(ckr) => Err(Problem::call("C_Login")(ckr)),
        }
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

/// PINs that a token refused, for the life of the process: whoever starts a token again with the same PIN would
/// otherwise spend another of its few tries. Digests only; bounded, because every entry is a refusal.
static REFUSED: Mutex<Vec<(Fingerprint, Ckr)>> = Mutex::new(Vec::new());
const REFUSED_MAX: usize = 256;

type Fingerprint = [u8; 32];

fn fingerprint(module: &Path, serial: &str, pin: &[u8]) -> Fingerprint {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in [module.as_os_str().as_encoded_bytes(), serial.as_bytes(), pin] {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(context.finish().as_ref());
    fingerprint
}

fn refused_before(fingerprint: &Fingerprint) -> Option<Ckr> {
    let refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
    refused.iter().find(|(known, _)| known == fingerprint).map(|(_, ckr)| *ckr)
}

fn remember_refused(fingerprint: Fingerprint, ckr: Ckr) {
    let mut refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
    if refused.len() < REFUSED_MAX {
        refused.push((fingerprint, ckr));
    }
}
