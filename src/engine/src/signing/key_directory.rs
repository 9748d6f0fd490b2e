//! Owns a list of a token's private keys by what they are called: a token may look at every object that it holds in each
//! search, so the keys of many certificates are not searched for one by one. What it says is a hint, as of when the list
//! was made: who uses a handle proves it with a signature. Must not know certificates. Runs where keys are found.

use std::collections::HashMap;

use cryptoki_sys::CK_OBJECT_HANDLE;

use super::ckr::Ckr;
use super::pkcs11::{KeyNames, Session};

/// Empty until it was asked a few times.
#[derive(Default)]
pub(super) struct KeyDirectory {
    asked: usize,
    listed: Option<Listed>,
}

struct Listed {
    /// Of the login and of the module's incarnation: handles are not used in others.
    epoch: (u64, u64),
    keys: Vec<(CK_OBJECT_HANDLE, KeyNames)>,
    /// Places in `keys`.
    by_label: HashMap<Vec<u8>, Vec<usize>>,
    by_id: HashMap<Vec<u8>, Vec<usize>>,
}

/// A token may hold far more keys than a configuration names: listing them all must not be the price of a few.
const ASKED_MAX: usize = 16;
/// Of a token that holds more none is listed: what is missing could be a second key of the same name.
const KEYS_MAX: usize = 100_000;

impl KeyDirectory {
    /// The only key of these names; at least one is given. None: search.
    pub fn find(
        &mut self,
        session: &Session,
        epoch: u64,
        id: Option<&[u8]>,
        label: Option<&str>,
    ) -> Option<CK_OBJECT_HANDLE> {
        let epoch = (epoch, session.incarnation());
        if self.listed.as_ref().is_some_and(|listed| listed.epoch != epoch) {
            *self = Self::default();
        }
        self.asked += 1;
        if self.listed.is_none() && self.asked == ASKED_MAX + 1 {
            // Who searches is told what is wrong with the token.
            self.listed = Listed::read(session, epoch).unwrap_or_default();
        }
        let found = self.listed.as_ref()?.only(id, label.map(str::as_bytes));
        if found.is_none() {
            // Keys have come or gone since: a new list, when so much is asked for again.
            *self = Self::default();
        }
        found
    }
}

impl Listed {
    fn read(session: &Session, epoch: (u64, u64)) -> Result<Option<Listed>, Ckr> {
        let Some(handles) = session.private_keys(KEYS_MAX)? else { return Ok(None) };
        let mut listed = Listed { epoch, keys: Vec::new(), by_label: HashMap::new(), by_id: HashMap::new() };
        for handle in handles {
            let Some(names) = session.key_names(handle)? else { return Ok(None) };
            let place = listed.keys.len();
            listed.by_label.entry(names.label.clone()).or_default().push(place);
            listed.by_id.entry(names.id.clone()).or_default().push(place);
            listed.keys.push((handle, names));
        }
        Ok(Some(listed))
    }

    fn only(&self, id: Option<&[u8]>, label: Option<&[u8]>) -> Option<CK_OBJECT_HANDLE> {
        let places = match (label, id) {
            (Some(label), _) => self.by_label.get(label),
            (None, Some(id)) => self.by_id.get(id),
            (None, None) => None,
        };
        let mut matching = places?
            .iter()
            .filter_map(|place| self.keys.get(*place))
            .filter(|(_, names)| id.is_none_or(|id| names.id == id));
        let (handle, _) = matching.next()?;
        matching.next().is_none().then_some(*handle)
    }
}
