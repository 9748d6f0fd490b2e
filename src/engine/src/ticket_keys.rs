//! Owns the secrets of session tickets that a token derives: PRK = HMAC(K, purpose || rotation || epoch), once for each epoch,
//! so that every worker of every host with that key resumes the others' TLS sessions, and nothing needs to be shared.
//! Must not know how a ticket is made of them (tickets.rs). Deriving takes as long as the token does: on the JavaScript
//! thread at a start or a reload, which wait for tokens anyway, and else on a thread of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

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
    /// It could not be asked when the key was named; it is when secrets are derived.
    pub is_away: bool,
    /// At least one of id and label.
    pub id: Option<Vec<u8>>,
    pub label: Option<String>,
}

/// The secrets of an epoch, of the next and of the one before: a clock may be off by an epoch.
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
    /// With what all its tokens that are there make of an epoch; without secrets when none is.
    ///
    /// # Errors
    /// A token cannot derive, or tokens derive different secrets.
    pub fn proved(
        places: Vec<Place>,
        rotation_ms: u64,
        epoch: u64,
    ) -> Result<(Self, Option<EpochSecrets>), TicketKeyFault> {
        let key = Self { places, rotation_ms };
        let mut first: Option<(&Place, EpochSecrets)> = None;
        for place in key.places.iter().filter(|place| !place.is_away) {
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
        let secrets = first.map(|(_, secrets)| secrets);
        Ok((key, secrets))
    }

    /// Whether the other one derives the same secrets, as far as names can say.
    fn is_like(&self, other: &Self) -> bool {
        let is_same = |(own, its): (&Place, &Place)| {
            let is_named = |own: bool, its: bool, is_equal: bool| !own || !its || is_equal;
            Arc::ptr_eq(&own.token, &its.token)
                && is_named(own.id.is_some(), its.id.is_some(), own.id == its.id)
                && is_named(own.label.is_some(), its.label.is_some(), own.label == its.label)
        };
        self.rotation_ms == other.rotation_ms
            && self.places.len() == other.places.len()
            && self.places.iter().zip(&other.places).all(is_same)
    }

    fn derive_in(&self, place: &Place, epoch: u64) -> Result<EpochSecrets, TokenError> {
        let input = |epoch: u64| [PURPOSE, &self.rotation_ms.to_be_bytes(), &epoch.to_be_bytes()].concat();
        let [now, next, before] = [epoch, epoch.saturating_add(1), epoch.saturating_sub(1)].map(input);
        let [current, next, before] =
            place.token.derive(place.id.as_deref(), place.label.as_deref(), [&now, &next, &before])?;
        Ok(EpochSecrets { epoch, current, others: [next, before] })
    }
}

/// A token that takes longer to derive counts as one that cannot; its thread waits on, and no other is sent to that token.
const DERIVING_MAX: Duration = Duration::from_secs(20);

/// The rotation of a worker's ticket keys.
#[derive(Clone, Default)]
pub struct TicketRotation(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    key: Option<Arc<TicketKey>>,
    /// What is used; given up when it is too old.
    held: Option<EpochSecrets>,
    /// Of what was derived last.
    epoch: Option<u64>,
    /// Places at which a thread is, by their index, and since when.
    asking: HashMap<usize, Instant>,
    /// Why the last try came to nothing.
    failure: Option<String>,
}

/// What is known of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TicketStanding {
    /// A token is to derive the secrets.
    pub wanted: bool,
    /// None: no token has derived them.
    pub epoch: Option<u64>,
    pub deriving: bool,
    pub failure: Option<String>,
}

impl TicketRotation {
    /// From now on this key is used; None: others say which secrets are used, as they do until a token that is away is back.
    pub fn begin(&self, key: Option<(Arc<TicketKey>, Option<EpochSecrets>)>, ticketer: &Ticketer) {
        let mut state = self.lock();
        // A thread that still derives with the former key finds another one here, and gives up.
        let former = std::mem::take(&mut *state);
        let Some((key, secrets)) = key else { return };
        let is_held = former.key.is_some_and(|former| former.is_like(&key));
        state.key = Some(key);
        match secrets {
            Some(secrets) => state.adopt(secrets, ticketer),
            None if is_held => (state.held, state.epoch) = (former.held, former.epoch),
            None => {}
        }
    }

    /// Has the secrets of this epoch derived by the first token that can, and used when they are there. Until then the epoch
    /// begins with the secret that was derived for it beforehand; when that too is over, there are no tickets.
    pub fn rotate(&self, epoch: u64, ticketer: &Ticketer) {
        let mut state = self.lock();
        let Some(key) = state.key.clone() else { return };
        state.stand_in(epoch, ticketer);
        if state.is_deriving() {
            return;
        }
        let free: Vec<_> = (0..key.places.len()).filter(|index| !state.asking.contains_key(index)).collect();
        if free.len() < key.places.len() {
            let hung = |index: &usize| key.places.get(*index).map(|place| place.token.name().to_string());
            let hung: Vec<_> = state.asking.keys().filter_map(hung).collect();
            let seconds = DERIVING_MAX.as_secs();
            state.failure = Some(format!("no answer for {seconds} s from token {}", hung.join(", ")));
        }
        if free.is_empty() {
            return;
        }
        // Tokens that are down are asked last: they may take long to say no.
        let (mut order, down): (Vec<_>, Vec<_>) =
            free.into_iter().partition(|index| key.places[*index].token.is_up());
        order.extend(down);
        let (rotation, ticketer) = (self.clone(), ticketer.clone());
        let first = order.first().copied();
        let thread = thread::Builder::new().name("keygate-tickets".into());
        match thread.spawn(move || rotation.ask(&key, &order, epoch, &ticketer)) {
            Ok(_) => state.asking.extend(first.map(|index| (index, Instant::now()))),
            Err(error) => state.failure = Some(format!("no thread to ask a token: {error}")),
        }
    }

    /// On a thread of its own: asks one place after the other.
    fn ask(&self, key: &Arc<TicketKey>, order: &[usize], epoch: u64, ticketer: &Ticketer) {
        let mut failures = Vec::new();
        for index in order {
            let Some(place) = key.places.get(*index) else { continue };
            if !failures.is_empty() && !self.lock().arrive(key, *index) {
                continue;
            }
            let derived = match self.prove(key, place) {
                Ok(()) => key.derive_in(place, epoch).map_err(|error| error.to_string()),
                Err(why) => Err(why),
            };
            let mut state = self.lock();
            if !state.has(key) {
                return;
            }
            state.asking.remove(index);
            match derived {
                // Whoever was asked in the meantime may have been faster, or the next epoch may have begun.
                Ok(secrets) if state.epoch.is_none_or(|known| known < secrets.epoch) => {
                    return state.adopt(secrets, ticketer);
                }
                Ok(_) => return,
                Err(error) => failures.push(error),
            }
        }
        let mut state = self.lock();
        if state.has(key) {
            state.failure = Some(failures.join("; "));
        }
    }

    /// Of a token that was away when the key was named: that its key is the one that the others have.
    fn prove(&self, key: &TicketKey, place: &Place) -> Result<(), String> {
        let held = self.lock().held.as_ref().map(|held| (held.epoch, held.current.clone()));
        let Some((epoch, current)) = held.filter(|_| place.is_away) else { return Ok(()) };
        match key.derive_in(place, epoch) {
            Ok(secrets) if *secrets.current == *current => Ok(()),
            Ok(_) => Err(format!("token {} holds another ticket key than the others", place.token.name())),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Unless a token has derived others. Under the mutex under which that happens.
    pub fn use_unless_derived(&self, ticketer: &Ticketer, current: &EpochSecret, others: &[EpochSecret]) {
        let state = self.lock();
        if state.epoch.is_none() {
            ticketer.rotate(current, others);
        }
    }

    pub fn standing(&self) -> TicketStanding {
        let state = self.lock();
        TicketStanding {
            wanted: state.key.is_some(),
            epoch: state.epoch,
            deriving: state.is_deriving(),
            failure: state.failure.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn has(&self, key: &Arc<TicketKey>) -> bool {
        self.key.as_ref().is_some_and(|current| Arc::ptr_eq(current, key))
    }

    /// False: somebody is there already, or the key is another one.
    fn arrive(&mut self, key: &Arc<TicketKey>, index: usize) -> bool {
        self.has(key) && {
            let is_free = !self.asking.contains_key(&index);
            self.asking.entry(index).or_insert_with(Instant::now);
            is_free
        }
    }

    fn is_deriving(&self) -> bool {
        self.asking.values().any(|since| since.elapsed() < DERIVING_MAX)
    }

    fn adopt(&mut self, secrets: EpochSecrets, ticketer: &Ticketer) {
        ticketer.rotate(&secrets.current, &secrets.others);
        self.epoch = Some(secrets.epoch);
        self.held = Some(secrets);
        self.failure = None;
    }

    /// Another epoch than that of what is held has begun.
    fn stand_in(&mut self, epoch: u64, ticketer: &Ticketer) {
        let Some(EpochSecrets { epoch: held, current, others: [next, _] }) = &self.held else { return };
        if *held == epoch || held.checked_sub(1) == Some(epoch) {
            return; // that of a host whose clock is ahead
        }
        if held.checked_add(1) == Some(epoch) {
            ticketer.rotate(next, std::slice::from_ref(current));
        } else {
            ticketer.stop();
            self.held = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::server::ProducesTickets;
    use zeroize::Zeroizing;

    fn secrets(epoch: u64) -> EpochSecrets {
        let secret = |epoch: u64| Zeroizing::new([epoch as u8; 32]);
        EpochSecrets { epoch, current: secret(epoch), others: [secret(epoch + 1), secret(epoch - 1)] }
    }

    fn ticketer_in(epoch: u64) -> Ticketer {
        let ticketer = Ticketer::new(Duration::from_secs(3600));
        State::default().adopt(secrets(epoch), &ticketer);
        ticketer
    }

    #[test]
    fn without_a_token_the_next_epoch_begins_with_the_secret_that_was_derived_for_it() {
        let ticketer = Ticketer::new(Duration::from_secs(3600));
        let mut state = State::default();
        state.adopt(secrets(10), &ticketer);
        let before = ticketer.encrypt(b"before").expect("a ticket");
        state.stand_in(11, &ticketer);
        let after = ticketer.encrypt(b"after").expect("a ticket");
        assert_eq!(ticketer.decrypt(&before).as_deref(), Some(&b"before"[..]));
        // A host whose token has answered is in the same epoch.
        assert_eq!(ticketer_in(11).decrypt(&after).as_deref(), Some(&b"after"[..]));
        assert_eq!(ticketer_in(12).decrypt(&after).as_deref(), Some(&b"after"[..]));
        assert_eq!(ticketer_in(13).decrypt(&after), None);
    }

    #[test]
    fn after_that_there_are_no_tickets_until_a_token_answers() {
        let ticketer = Ticketer::new(Duration::from_secs(3600));
        let mut state = State::default();
        state.adopt(secrets(10), &ticketer);
        let ticket = ticketer.encrypt(b"state").expect("a ticket");
        state.stand_in(12, &ticketer);
        assert!(ticketer.encrypt(b"state").is_none());
        assert_eq!(ticketer.decrypt(&ticket), None);
        state.adopt(secrets(12), &ticketer);
        assert!(ticketer.encrypt(b"state").is_some());
    }

    #[test]
    fn a_clock_that_is_set_back_by_an_epoch_changes_nothing() {
        let ticketer = Ticketer::new(Duration::from_secs(3600));
        let mut state = State::default();
        state.adopt(secrets(10), &ticketer);
        state.stand_in(9, &ticketer);
        let ticket = ticketer.encrypt(b"state").expect("a ticket");
        assert!(ticketer_in(10).decrypt(&ticket).is_some());
    }
}
