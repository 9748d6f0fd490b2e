//! Owns what this process has done with the module: its PKCS#11 sessions with the operation in each, when it last logged
//! in, when it last initialised. Must not know what is done about it. Runs on whichever thread calls the module.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use cryptoki_sys::{CK_MECHANISM, CK_OBJECT_HANDLE, CK_SESSION_HANDLE, CK_SLOT_ID};

use crate::control::now_us;

#[derive(Clone, Default)]
pub struct Session {
    pub slot: CK_SLOT_ID,
    pub opened_us: u64,
    pub signing: Option<Signing>,
}

/// What C_SignInit has begun, with a copy of the mechanism to begin it again.
#[derive(Clone)]
pub struct Signing {
    pub key: CK_OBJECT_HANDLE,
    mechanism: u64,
    /// In words, because a parameter may be a struct of them.
    parameter: Vec<u64>,
    parameter_bytes: u64,
}

static SESSIONS: LazyLock<Mutex<HashMap<CK_SESSION_HANDLE, Session>>> = LazyLock::new(Mutex::default);
/// First bytes of their labels, of the tokens in the slots as they were after C_Initialize.
static TOKENS: LazyLock<Mutex<HashMap<CK_SLOT_ID, u64>>> = LazyLock::new(Mutex::default);
static LOGGED_IN_US: AtomicU64 = AtomicU64::new(0);
static INITIALIZED_US: AtomicU64 = AtomicU64::new(0);
static INITIALIZATIONS: AtomicU64 = AtomicU64::new(0);

pub fn opened(session: CK_SESSION_HANDLE, slot: CK_SLOT_ID) {
    lock(&SESSIONS).insert(session, Session { slot, opened_us: now_us(), signing: None });
}

/// Whether it was open.
pub fn closed(session: CK_SESSION_HANDLE) -> bool {
    lock(&SESSIONS).remove(&session).is_some()
}

/// How many were open, in the slot or in any.
pub fn all_closed(slot: Option<CK_SLOT_ID>) -> u64 {
    let mut sessions = lock(&SESSIONS);
    let before = sessions.len();
    sessions.retain(|_, session| slot.is_some_and(|slot| session.slot != slot));
    (before - sessions.len()) as u64
}

pub fn of(session: CK_SESSION_HANDLE) -> Option<Session> {
    lock(&SESSIONS).get(&session).cloned()
}

/// Begins an operation, or ends the one there is; tells whether there was one.
pub fn signing(session: CK_SESSION_HANDLE, signing: Option<Signing>) -> bool {
    match lock(&SESSIONS).get_mut(&session) {
        Some(known) => std::mem::replace(&mut known.signing, signing).is_some(),
        None => false,
    }
}

pub fn logged_in() {
    LOGGED_IN_US.store(now_us(), SeqCst);
}

pub fn initialized(tokens: HashMap<CK_SLOT_ID, u64>) {
    *lock(&TOKENS) = tokens;
    INITIALIZED_US.store(now_us(), SeqCst);
    INITIALIZATIONS.fetch_add(1, SeqCst);
}

pub fn logged_in_us() -> u64 {
    LOGGED_IN_US.load(SeqCst)
}

pub fn initialized_us() -> u64 {
    INITIALIZED_US.load(SeqCst)
}

/// How often this process has initialised the module.
pub fn initializations() -> u64 {
    INITIALIZATIONS.load(SeqCst)
}

/// The first bytes of the label of the slot's token.
pub fn token_in(slot: CK_SLOT_ID) -> Option<u64> {
    lock(&TOKENS).get(&slot).copied()
}

impl Signing {
    /// # Safety
    /// `mechanism` is null or a mechanism whose parameter is readable for its length.
    pub unsafe fn copy(mechanism: *const CK_MECHANISM, key: CK_OBJECT_HANDLE) -> Option<Signing> {
        // SAFETY: by the caller's promise.
        let mechanism = unsafe { mechanism.as_ref() }?;
        let bytes = if mechanism.pParameter.is_null() { 0 } else { mechanism.ulParameterLen as usize };
        let mut parameter = vec![0_u64; bytes.div_ceil(8)];
        // SAFETY: readable by the caller's promise; there is room for as many bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(
                mechanism.pParameter.cast::<u8>(),
                parameter.as_mut_ptr().cast::<u8>(),
                bytes,
            );
        }
        Some(Signing { key, mechanism: mechanism.mechanism, parameter, parameter_bytes: bytes as u64 })
    }

    /// Points into `self`.
    pub fn mechanism(&mut self) -> CK_MECHANISM {
        CK_MECHANISM {
            mechanism: self.mechanism,
            pParameter: if self.parameter_bytes == 0 {
                std::ptr::null_mut()
            } else {
                self.parameter.as_mut_ptr().cast()
            },
            ulParameterLen: self.parameter_bytes,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
