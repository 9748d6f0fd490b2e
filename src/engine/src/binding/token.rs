//! Owns the border of tokens: how one is used, where it holds a key, what it has done, what its faults are called. PINs are
//! taken out of JavaScript's memory here. Must not know what keys are for. JavaScript thread only.

use napi::bindgen_prelude::Buffer;
use napi::{Error, Status};
use napi_derive::napi;
use zeroize::{Zeroize, Zeroizing};

use super::stats::{LatencySnapshot, latency};
use super::{invalid, ms, signed};
use crate::generation::{self, LoadFault, WantedToken};
use crate::signing::login::Maker;
use crate::signing::token::{LOST_AFTER_DEADLINES, Token, TokenPlan};
use crate::signing::token_error::TokenError;

/// A token and how to use it. Durations are milliseconds.
#[napi(object)]
pub struct TokenSettings {
    pub name: String,
    pub module: String,
    /// The token's label, without padding.
    pub label: String,
    pub serial: Option<String>,
    /// What it must say of itself beside that, if anything.
    pub manufacturer: Option<String>,
    pub model: Option<String>,
    /// It was out of reach: it is waited for, and nothing of its module is called on the JavaScript thread.
    pub away: bool,
    /// Overwritten with zeros when it has been taken.
    pub pin: Buffer,
    /// Signing threads, each with a PKCS#11 session: 1 to 256.
    pub lanes: u32,
    /// Lanes that are lost in the module included: at least `lanes`.
    pub threads_max: u32,
    /// How much more it is asked than others with the same keys; 0: only when none of those is up.
    pub weight: u32,
    pub queue_max: u32,
    pub queue_age_ms: u32,
    pub sign_deadline_ms: u32,
    pub login_lock_wait_ms: u32,
    /// Load the module with symbols of its own (RTLD_DEEPBIND).
    pub isolate: bool,
    /// Verify each n-th RSA signature before use; 1: all.
    pub verify_rsa_every: u32,
    /// Verify the first EC or Ed25519 signature of each PKCS#11 session and key, then each n-th; 1: all.
    pub verify_ec_every: u32,
}

/// Where a token holds a key. At least one of id and label.
#[napi(object)]
pub struct KeyPlace {
    pub token: String,
    pub id: Option<Buffer>,
    pub label: Option<String>,
}

#[napi(object)]
pub struct MechanismSnapshot {
    #[napi(ts_type = "'ecdsa' | 'rsa_pkcs' | 'rsa_pkcs_pss' | 'eddsa'")]
    pub mechanism: String,
    pub ok: i64,
    pub failed: i64,
    /// Signatures that did not verify; none of them was sent.
    pub wrong: i64,
    pub latency: LatencySnapshot,
}

#[napi(object)]
pub struct TokenSnapshot {
    pub name: String,
    pub up: bool,
    /// Why it is not up.
    pub down_reason: Option<String>,
    pub mechanisms: Vec<MechanismSnapshot>,
    pub sign_wait: LatencySnapshot,
    pub queue_depth_ec: i64,
    pub queue_depth_rsa: i64,
    pub lanes_idle: i64,
    pub lanes_busy: i64,
    pub lanes_lost: i64,
    pub lanes_written_off: i64,
    pub sessions_open: i64,
    pub reopened: i64,
    pub logged_in: i64,
    pub refound: i64,
    pub reinitialized: i64,
    pub failed_over: i64,
    pub shed_queue_full: i64,
    pub shed_queue_aged: i64,
    pub shed_token_down: i64,
    pub cancelled: i64,
    pub went_down: i64,
    pub login_lock_timeouts: i64,
}

pub(super) fn wanted_token(mut settings: TokenSettings) -> WantedToken {
    let pin = Zeroizing::new(settings.pin.to_vec());
    settings.pin.as_mut().zeroize();
    let plan = TokenPlan {
        name: settings.name,
        module: settings.module.into(),
        label: settings.label,
        serial: settings.serial,
        maker: Maker { manufacturer: settings.manufacturer, model: settings.model },
        pin,
        lanes: settings.lanes as usize,
        threads_max: settings.threads_max as usize,
        lost_after: ms(settings.sign_deadline_ms) * LOST_AFTER_DEADLINES,
        weight: settings.weight,
        queue_max: settings.queue_max as usize,
        queue_age_max: ms(settings.queue_age_ms),
        login_lock_wait: ms(settings.login_lock_wait_ms),
        isolate: settings.isolate,
        verify_rsa_every: settings.verify_rsa_every,
        verify_ec_every: settings.verify_ec_every,
    };
    WantedToken { plan, sign_deadline: ms(settings.sign_deadline_ms), is_away: settings.away }
}

pub(super) fn key_place(KeyPlace { token, id, label }: KeyPlace) -> generation::KeyPlace {
    generation::KeyPlace { token, id: id.map(|id| id.to_vec()), label }
}

pub(super) fn load_fault(fault: LoadFault) -> Error {
    match fault {
        LoadFault::Token(error) => token_error(&error),
        LoadFault::Settings(what) => invalid(what),
    }
}

/// `token_fault <code>: <message>`: the code says whether another try could cost one of the PIN's few.
pub(super) fn token_error(error: &TokenError) -> Error {
    Error::new(Status::GenericFailure, format!("token_fault {}: {error}", error.problem.code()))
}

pub(super) fn token_snapshot(token: &Token) -> TokenSnapshot {
    let stats = token.stats();
    let mechanisms = [
        ("ecdsa", &stats.ecdsa),
        ("rsa_pkcs", &stats.rsa_pkcs),
        ("rsa_pkcs_pss", &stats.rsa_pkcs_pss),
        ("eddsa", &stats.eddsa),
    ];
    TokenSnapshot {
        name: token.name().to_string(),
        up: token.is_up(),
        down_reason: token.down_reason().map(|reason| reason.to_string()),
        mechanisms: mechanisms
            .map(|(mechanism, stats)| MechanismSnapshot {
                mechanism: mechanism.into(),
                ok: signed(stats.ok.get()),
                failed: signed(stats.failed.get()),
                wrong: signed(stats.wrong.get()),
                latency: latency(stats.sign.snapshot()),
            })
            .into(),
        sign_wait: latency(stats.sign_wait.snapshot()),
        queue_depth_ec: stats.queue_depth_ec.get(),
        queue_depth_rsa: stats.queue_depth_rsa.get(),
        lanes_idle: stats.lanes_idle.get(),
        lanes_busy: stats.lanes_busy.get(),
        lanes_lost: stats.lanes_lost.get(),
        lanes_written_off: signed(stats.written_off.get()),
        sessions_open: stats.sessions_open.get(),
        reopened: signed(stats.reopened.get()),
        logged_in: signed(stats.logged_in.get()),
        refound: signed(stats.refound.get()),
        reinitialized: signed(stats.reinitialized.get()),
        failed_over: signed(stats.failed_over.get()),
        shed_queue_full: signed(stats.shed_queue_full.get()),
        shed_queue_aged: signed(stats.shed_queue_aged.get()),
        shed_token_down: signed(stats.shed_token_down.get()),
        cancelled: signed(stats.cancelled.get()),
        went_down: signed(stats.went_down.get()),
        login_lock_timeouts: signed(stats.login_lock_timeouts.get()),
    }
}
