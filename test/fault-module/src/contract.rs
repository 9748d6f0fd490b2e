//! Owns the checks that the module's user keeps the rules of PKCS#11, and what is in flight in this process.
//! Must not know faults. Runs on whichever thread calls the module.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use cryptoki_sys::CK_SESSION_HANDLE;

use crate::control::{Control, Function};

/// One call, from entry to return.
pub struct Running {
    control: Control,
    function: Function,
    session: Option<CK_SESSION_HANDLE>,
    /// Which call of this function it is, from 1, over all processes.
    pub number: u64,
}

static INITIALIZED: AtomicBool = AtomicBool::new(false);
static IN_FLIGHT: AtomicU64 = AtomicU64::new(0);

/// The PKCS#11 session that a thread is in, at its number modulo the size; two that share a place are not told apart
/// from a free one, so a violation may be missed but never invented.
static SESSIONS_IN_USE: [AtomicU64; SESSIONS] = [const { AtomicU64::new(0) }; SESSIONS];
const SESSIONS: usize = 1024;

impl Running {
    pub fn start(control: Control, function: Function, session: Option<CK_SESSION_HANDLE>) -> Running {
        if function != Function::Initialize && !INITIALIZED.load(SeqCst) {
            control.not_initialized().fetch_add(1, SeqCst);
        }
        // Only a session that this call holds is given back at its end.
        let session = session.filter(|session| {
            let place = &SESSIONS_IN_USE[*session as usize % SESSIONS];
            match place.compare_exchange(0, *session, SeqCst, SeqCst) {
                Ok(_) => true,
                Err(other) => {
                    control.shared_session().fetch_add(u64::from(other == *session), SeqCst);
                    false
                }
            }
        });
        IN_FLIGHT.fetch_add(1, SeqCst);
        let counters = control.of(function);
        let in_flight = counters.in_flight.fetch_add(1, SeqCst) + 1;
        counters.in_flight_max.fetch_max(in_flight, SeqCst);
        let number = counters.calls.fetch_add(1, SeqCst) + 1;
        Running { control, function, session, number }
    }

    /// For C_Finalize: whether any other call is in flight in this process.
    pub fn is_alone(&self) -> bool {
        IN_FLIGHT.load(SeqCst) == 1
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.control.of(self.function).in_flight.fetch_sub(1, SeqCst);
        IN_FLIGHT.fetch_sub(1, SeqCst);
        if let Some(session) = self.session {
            SESSIONS_IN_USE[session as usize % SESSIONS].store(0, SeqCst);
        }
    }
}

pub fn initialized(now: bool) {
    INITIALIZED.store(now, SeqCst);
}
