//! Owns the TLS sessions of one client. Knows no connection.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;

/// A server that gives more tickets than this is asked for only the latest.
const TICKETS_MAX: usize = 4;

/// Empty for ever when it must not resume. One server name: with several, a session would be resumed under another.
#[derive(Debug)]
pub struct Tickets {
    keep: bool,
    given: AtomicU64,
    tls13: Mutex<VecDeque<Tls13ClientSessionValue>>,
    tls12: Mutex<Option<Tls12ClientSessionValue>>,
}

impl Tickets {
    pub fn new(keep: bool) -> Self {
        Self { keep, given: AtomicU64::new(0), tls13: Mutex::default(), tls12: Mutex::default() }
    }

    /// How many the server gave, kept or not.
    pub fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.given.fetch_add(1, Ordering::Relaxed);
        if self.keep {
            *self.tls12.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        }
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.tls12.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        *self.tls12.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.given.fetch_add(1, Ordering::Relaxed);
        if self.keep {
            let mut tickets = self.tls13.lock().unwrap_or_else(PoisonError::into_inner);
            tickets.truncate(TICKETS_MAX - 1);
            tickets.push_front(value);
        }
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.tls13.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}
