//! Owns when a call is late and when it fails, by what the control file says. Must not know what the functions do.
//! Runs on whichever thread calls the module, which it makes wait.

use std::cell::Cell;
use std::process;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use cryptoki_sys::{CK_RV, CK_SESSION_HANDLE};

use crate::control::{FunctionControl, Heal, now_us};
use crate::sessions;

/// The test that releases it may be a Node process, which can write a word and wake nobody.
const HANG_POLL: Duration = Duration::from_micros(500);

/// Whether the faults of a function are for this caller.
pub fn concern(control: &FunctionControl<'_>, session: Option<CK_SESSION_HANDLE>) -> bool {
    let (pid, only, token) =
        (control.only_pid.load(SeqCst), control.only_session.load(SeqCst), control.only_token.load(SeqCst));
    let is_of_token = || {
        let slot = session.and_then(sessions::of).map(|session| session.slot);
        slot.and_then(sessions::token_in) == Some(token)
    };
    (pid == 0 || pid == u64::from(process::id()))
        && (only == 0 || session == Some(only))
        && (token == 0 || is_of_token())
}

/// As long as this call, the `number`th, is to take before it is done.
pub fn wait(control: &FunctionControl<'_>, number: u64) {
    let delay_us = control.delay_us.load(SeqCst);
    let sigma = control.delay_sigma.load(SeqCst) as f64 / 1000.0;
    pause((delay_us as f64 * (sigma * normal()).exp()) as u64);
    let (spike_us, every) = (control.spike_us.load(SeqCst), control.spike_every.load(SeqCst).max(1));
    if number.is_multiple_of(every) {
        pause(spike_us);
    }
    let rate = control.rate.load(SeqCst);
    if rate > 0 {
        let now = now_us();
        let after = |next: u64| Some(next.max(now) + 1_000_000 / rate);
        let turn = control.rate_next_us.fetch_update(SeqCst, SeqCst, after).unwrap_or(now);
        pause(turn.saturating_sub(now));
    }
    while control.hang.load(SeqCst) != 0 {
        thread::sleep(HANG_POLL);
    }
}

/// The error that this call is to return.
pub fn failure(
    control: &FunctionControl<'_>,
    session: Option<CK_SESSION_HANDLE>,
    number: u64,
) -> Option<CK_RV> {
    let rv = control.rv.load(SeqCst);
    if rv == 0 || is_over(control) || is_healed(control, session) {
        return None;
    }
    let chance = control.rv_per_million.load(SeqCst);
    if chance != 0 && random() % 1_000_000 >= chance {
        return None;
    }
    FunctionControl::selects(number, control.rv_every, control.rv_left).then_some(rv as CK_RV)
}

fn is_over(control: &FunctionControl<'_>) -> bool {
    let until_ms = control.rv_until_ms.load(SeqCst);
    until_ms != 0 && now_us() / 1000 >= until_ms
}

fn is_healed(control: &FunctionControl<'_>, session: Option<CK_SESSION_HANDLE>) -> bool {
    let since_us = control.rv_since_us.load(SeqCst);
    let heal = control.rv_heal.load(SeqCst);
    let healed_us = if heal == Heal::Reopen as u64 {
        session.and_then(sessions::of).map_or(0, |session| session.opened_us)
    } else if heal == Heal::Login as u64 {
        sessions::logged_in_us()
    } else if heal == Heal::Initialize as u64 {
        sessions::initialized_us()
    } else {
        return false;
    };
    healed_us > since_us
}

fn pause(us: u64) {
    if us > 0 {
        thread::sleep(Duration::from_micros(us));
    }
}

/// Of the standard normal distribution (Box and Muller).
fn normal() -> f64 {
    let uniform = || ((random() >> 11) as f64 + 1.0) / (1_u64 << 53) as f64;
    (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
}

/// Marsaglia's xorshift64; each thread has its own.
fn random() -> u64 {
    thread_local! {
        static STATE: Cell<u64> = Cell::new(now_us() ^ (u64::from(process::id()) << 32));
    }
    STATE.with(|state| {
        let mut next = state.get();
        next ^= next << 13;
        next ^= next >> 7;
        next ^= next << 17;
        state.set(next);
        next
    })
}
