//! Owns the secrets of session tickets that a token derives: PRK = HMAC(K, purpose || rotation || epoch), once for each epoch,
//! so that every worker of every host with that key resumes the others' TLS sessions, and nothing needs to be shared.
//! Must not know how a ticket is made of them (tickets.rs). Deriving takes as long as the token does: on the JavaScript
//! thread at a start or a reload, which wait for tokens anyway, and else on a thread of its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::signing::token::Token;
use crate::signing::token_error::TokenError;
use crate::tickets::{EpochSecret, Ticketer};

/// Says what the key is used for: the same key in another role gives other secrets.
const PURPOSE: &[u8] = b"keygate session tickets 1\0";

/// The secret key, in every token that holds it.
pub struct TicketKey {
    places: Vec<Place>,
    /// Epochs of another length are other epochs.
    rotation_ms: u64,
}

pub struct Place {
    pub token: Arc<Token>,
    /// At least one of id and label.
    pub id: Option<Vec<u8>>,
    pub label: Option<String>,
}

/// The secrets of an epoch, of the next and of the one before: a clock may be off by an epoch.
#[derive(Clone)]
pub struct EpochSecrets {
    pub epoch: u64,
    current: EpochSecret,
    others: [EpochSecret; 2],
}

/// Why a ticket key cannot be used.
pub enum TicketKeyFault {
    Token(TokenError),
    /// Two tokens hold different keys: their hosts would not resume each other's sessions.
    Differ(String),
}

impl TicketKey {
    /// With what all its tokens make of an epoch.
    ///
    /// # Errors
    /// A token cannot derive, or tokens derive different secrets.
    pub fn proved(
        places: Vec<Place>,
        rotation_ms: u64,
        epoch: u64,
    ) -> Result<(Self, EpochSecrets), TicketKeyFault> {
        let key = Self { places, rotation_ms };
        let mut first: Option<(&Place, EpochSecrets)> = None;
        for place in &key.places {
            let secrets = key.derive_in(place, epoch).map_err(TicketKeyFault::Token)?;
            match &first {
                None => first = Some((place, secrets)),
                Some((other, known)) if *known.current != *secrets.current => {
                    return Err(TicketKeyFault::Differ(format!(
                        "tokens {} and {} hold different ticket keys",
                        other.token.name(),
                        place.token.name()
                    )));
                }
                Some(_) => {}
            }
        }
        match first {
            Some((_, secrets)) => Ok((key, secrets)),
            None => Err(TicketKeyFault::Differ("no token that is there holds the ticket key".into())),
        }
    }

    /// By the first token that can; else what each of them said.
    fn derive(&self, epoch: u64) -> Result<EpochSecrets, String> {
        // Tokens that are down are asked last: they may take long to say no.
        let (up, down): (Vec<_>, Vec<_>) = self.places.iter().partition(|place| place.token.is_up());
        let mut failures = Vec::new();
        for place in up.into_iter().chain(down) {
            match self.derive_in(place, epoch) {
                Ok(secrets) => return Ok(secrets),
                Err(error) => failures.push(error.to_string()),
            }
        }
        Err(failures.join("; "))
    }

    fn derive_in(&self, place: &Place, epoch: u64) -> Result<EpochSecrets, TokenError> {
        let input = |epoch: u64| [PURPOSE, &self.rotation_ms.to_be_bytes(), &epoch.to_be_bytes()].concat();
        let [now, next, before] = [epoch, epoch.saturating_add(1), epoch.saturating_sub(1)].map(input);
        let [current, next, before] =
            place.token.derive(place.id.as_deref(), place.label.as_deref(), [&now, &next, &before])?;
        Ok(EpochSecrets { epoch, current, others: [next, before] })
    }
}

/// The rotation of a worker's ticket keys.
#[derive(Clone, Default)]
pub struct TicketRotation(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    key: Option<Arc<TicketKey>>,
    /// Whose secrets are used.
    epoch: Option<u64>,
    deriving: bool,
    /// Why the last try came to nothing.
    failure: Option<String>,
}

/// What is known of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TicketStanding {
    /// None: no token derives the secrets.
    pub epoch: Option<u64>,
    pub deriving: bool,
    pub failure: Option<String>,
}

impl TicketRotation {
    /// From now on this key is used; None: others say which secrets are used.
    pub fn begin(&self, key: Option<(Arc<TicketKey>, EpochSecrets)>, ticketer: &Ticketer) {
        let mut state = self.lock();
        // A thread that still derives with the former key finds another one here, and gives up.
        *state = State::default();
        if let Some((key, secrets)) = key {
            state.key = Some(key);
            state.adopt(&secrets, ticketer);
        }
    }

    /// Has the secrets of this epoch derived, and used when they are there; until then those that are used stay in use.
    /// One at a time: a token that hangs holds one thread and no more.
    pub fn rotate(&self, epoch: u64, ticketer: &Ticketer) -> std::io::Result<()> {
        let mut state = self.lock();
        let Some(key) = state.key.clone().filter(|_| !state.deriving) else { return Ok(()) };
        let (rotation, ticketer) = (self.clone(), ticketer.clone());
        thread::Builder::new().name("keygate-tickets".into()).spawn(move || {
            let derived = key.derive(epoch);
            let mut state = rotation.lock();
            if !state.key.as_ref().is_some_and(|current| Arc::ptr_eq(current, &key)) {
                return;
            }
            state.deriving = false;
            match derived {
                Ok(secrets) => state.adopt(&secrets, &ticketer),
                Err(failures) => state.failure = Some(failures),
            }
        })?;
        state.deriving = true;
        Ok(())
    }

    pub fn standing(&self) -> TicketStanding {
        let State { epoch, deriving, failure, .. } = &*self.lock();
        TicketStanding { epoch: *epoch, deriving: *deriving, failure: failure.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn adopt(&mut self, secrets: &EpochSecrets, ticketer: &Ticketer) {
        ticketer.rotate(&secrets.current, &secrets.others);
        self.epoch = Some(secrets.epoch);
        self.failure = None;
    }
}
