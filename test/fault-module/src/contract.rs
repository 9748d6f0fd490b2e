//! Owns the checks that the module's user keeps the rules of PKCS#11, and what is in flight in this process.
//! Must not know faults. Runs on whichever thread calls the module.

use std::process;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use cryptoki_sys::CK_SESSION_HANDLE;

use crate::control::{Control, Function, Word};

/// One call, from entry to return.
pub struct Running {
    control: Control,
    function: Function,
    session: Option<CK_SESSION_HANDLE>,
    /// Which call of this function it is, from 1, over all processes.
    pub number: u64,
}

/// The process that has called C_Initialize and not C_Finalize; 0: none has.
static INITIALIZED_BY: AtomicU32 = AtomicU32::new(0);
static IN_FLIGHT: AtomicU64 = AtomicU64::new(0);

/// The PKCS#11 session that a thread is in, at its number modulo the size; two that share a place are not told apart
/// from a free one, so a violation may be missed but never invented.
static SESSIONS_IN_USE: [AtomicU64; SESSIONS] = [const { AtomicU64::new(0) }; SESSIONS];
const SESSIONS: usize = 1024;

/// Threads of keygate that everything waits for must wait for no token.
const NEVER_IN_A_MODULE: &[u8] = b"keygate-io\0";

impl Running {
    pub fn start(control: Control, function: Function, session: Option<CK_SESSION_HANDLE>) -> Running {
        match INITIALIZED_BY.load(SeqCst) {
            _ if function == Function::Initialize => {}
            0 => control.count(Word::NotInitialized),
            pid if pid != process::id() => control.count(Word::Forked),
            _ => {}
        }
        if is_on_io_thread() {
            control.count(Word::IoThread);
        }
        // Only a session that this call holds is given back at its end.
        let session = session.filter(|session| {
            let place = &SESSIONS_IN_USE[*session as usize % SESSIONS];
            match place.compare_exchange(0, *session, SeqCst, SeqCst) {
                Ok(_) => true,
                Err(other) => {
                    if other == *session {
                        control.count(Word::SharedSession);
                    }
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
    INITIALIZED_BY.store(if now { process::id() } else { 0 }, SeqCst);
}

fn is_on_io_thread() -> bool {
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, zero-terminated (prctl(2)).
    let told = unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    told == 0 && name.starts_with(NEVER_IN_A_MODULE)
}
