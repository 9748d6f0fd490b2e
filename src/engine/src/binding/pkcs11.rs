//! Owns what JavaScript needs to use a PKCS#11 module itself, beside lanes and other processes: the gate of the module, the lock
//! around a login, what is known of PINs. Must not know the settings of tokens. JavaScript thread only; it may block.

use std::path::PathBuf;

use napi::bindgen_prelude::Buffer;
use napi::{Error, Result, Status};
use napi_derive::napi;

use super::{invalid, ms, signed};
use crate::signing::ckr::Ckr;
use crate::signing::login_lock;
use crate::signing::pkcs11::{Module, Visit};
use crate::signing::presented_pins::{self, Obstacle, Pin};

/// Somebody else in this process who uses a PKCS#11 module: as long as it lasts, the engine does not initialise it again.
#[napi]
pub struct ModuleVisit {
    visit: Option<Visit>,
}

#[napi]
impl ModuleVisit {
    /// Loads the module before anybody else does, with symbols of its own if `isolate`; it stays loaded. Blocks while the
    /// engine initialises it again. Throws when it cannot be loaded, or that takes too long.
    #[napi(factory, catch_unwind)]
    pub fn begin(path: String, isolate: bool) -> Result<Self> {
        let failed = |why: String| Error::new(Status::GenericFailure, format!("{path}: {why}"));
        let module =
            Module::load(&PathBuf::from(&path), isolate).map_err(|error| failed(error.to_string()))?;
        match module.visit() {
            Some(visit) => Ok(Self { visit: Some(visit) }),
            None => Err(failed("it is being initialised again, and that does not end".into())),
        }
    }

    #[napi(catch_unwind)]
    pub fn end(&mut self) {
        self.visit = None;
    }
}

/// Keeps other processes of this host from logging in to tokens of the same module at the same moment.
#[napi]
pub struct LoginLock {
    lock: Option<login_lock::LoginLock>,
}

#[napi]
impl LoginLock {
    /// Waits at most `wait_ms`, blocking. Throws when the module cannot be opened or the time is over.
    #[napi(factory, catch_unwind)]
    pub fn acquire(module: String, wait_ms: u32) -> Result<Self> {
        let lock = login_lock::LoginLock::acquire(&PathBuf::from(&module), ms(wait_ms)).map_err(|error| {
            Error::new(Status::GenericFailure, format!("login lock on {module}: {error}"))
        })?;
        Ok(Self { lock: Some(lock) })
    }

    #[napi(catch_unwind)]
    pub fn release(&mut self) {
        self.lock = None;
    }
}

/// A PIN that a token refused, as the workers of one keygate know it.
#[napi(object)]
pub struct PinRefusal {
    /// Made with their secret.
    pub digest: Buffer,
    /// The return code of C_Login.
    pub ckr: i64,
}

/// `secret`: 32 random bytes that all workers of a keygate have, and nobody else: with it they tell each other which PINs were
/// refused. `known`: by those that are no more. Before the first login.
#[napi(catch_unwind)]
pub fn share_refusals(secret: &[u8], known: Vec<PinRefusal>) -> Result<()> {
    let bytes = |bytes: &[u8]| {
        <[u8; 32]>::try_from(bytes).map_err(|_| invalid(format!("expected 32 bytes, found {}", bytes.len())))
    };
    let known =
        known.into_iter().map(|PinRefusal { digest, ckr }| Ok((bytes(&digest)?, Ckr(ckr.unsigned_abs()))));
    presented_pins::share(bytes(secret)?, known.collect::<Result<Vec<_>>>()?);
    Ok(())
}

/// What this process knows, for those that come after it.
#[napi(catch_unwind)]
pub fn pin_refusals() -> Vec<PinRefusal> {
    let refusals = presented_pins::known().into_iter();
    refusals.map(|(digest, ckr)| PinRefusal { digest: digest.to_vec().into(), ckr: signed(ckr.0) }).collect()
}

/// Why a PIN must not be presented to a token now.
#[napi(object)]
pub struct PinObstacle {
    /// The return code with which this token refused this PIN, in this process or in one beside it. Without one, the PIN was sent
    /// by somebody, and the token has not answered.
    pub refused: Option<i64>,
}

/// To be called before a C_Login by somebody else than lanes; without an obstacle, `pin_answered` is to follow.
#[napi(catch_unwind)]
pub fn present_pin(module: String, serial: String, pin: &[u8]) -> Option<PinObstacle> {
    let pin = Pin { module: module.as_ref(), serial: &serial, pin };
    pin.present().err().map(|obstacle| match obstacle {
        Obstacle::Refused(ckr) => PinObstacle { refused: Some(signed(ckr.0)) },
        Obstacle::Unanswered => PinObstacle { refused: None },
    })
}

/// What C_Login returned, so that lanes and the processes beside this one know it; nothing where it was not called.
#[napi(catch_unwind)]
pub fn pin_answered(module: String, serial: String, pin: &[u8], ckr: Option<i64>) {
    let pin = Pin { module: module.as_ref(), serial: &serial, pin };
    pin.answered(ckr.map(|ckr| Ckr(ckr.unsigned_abs())));
}
