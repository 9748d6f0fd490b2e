//! Owns what a configuration holds beside the I/O thread: tokens, the certificates' keys, the TLS configurations. Makes
//! the next one beside the one that serves, out of what the two have in common, and lets go of former ones.
//! Must not know Node-API, nor what a connection is. JavaScript thread only: it may wait for tokens, and freeing thousands
//! of certificates must not hold up the I/O thread.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use zeroize::Zeroizing;

use crate::certificates::{Certificate, LeafDigest};
use crate::policy::Policy;
use crate::signing::PrivateKey;
use crate::signing::token::{Token, TokenPlan};
use crate::signing::token_error::TokenError;
use crate::signing::token_key::KeyPlan;
use crate::ticket_keys::{self, EpochSecrets, TicketKey, TicketKeyFault};
use crate::upstream_tls::UpstreamTls;

/// One configuration.
#[derive(Default)]
pub struct Generation {
    tokens: Vec<StartedToken>,
    certificates: HashMap<String, Arc<Certificate>>,
    /// By name and signature schemes: for policies that do not allow all that a key can sign with, or prefer others.
    limited: HashMap<(String, Vec<u16>), Arc<Certificate>>,
    /// By the certificate's name.
    keys: Vec<(String, Arc<PrivateKey>)>,
    /// What a token makes session tickets' secrets of, with those of the epoch in which it was proved; taken when it begins to
    /// serve, so that no secret is here longer than it is used.
    pub ticket_key: Option<(Arc<TicketKey>, Option<EpochSecrets>)>,
    /// Handshakes hold them for as long as they last.
    pub tls_configs: Vec<Arc<ServerConfig>>,
    /// The same, for handshakes with upstreams.
    pub upstream_tls: Vec<Arc<UpstreamTls>>,
}

/// OCSP responses by what they are about, also of certificates that come with a later configuration.
pub type Staples = HashMap<LeafDigest, Vec<u8>>;

/// A token of a configuration.
pub struct WantedToken {
    pub plan: TokenPlan,
    pub sign_deadline: Duration,
    /// Whoever looked could not reach it, and others have its keys. It is not asked for anything now.
    pub is_away: bool,
}

struct StartedToken {
    identity: TokenIdentity,
    sign_deadline: Duration,
    is_away: bool,
    token: Arc<Token>,
    /// What a token that was there before is to adopt when the configuration begins to serve.
    pin: Zeroizing<Vec<u8>>,
    weight: u32,
}

/// What cannot change without being another token.
struct TokenIdentity {
    name: String,
    module: PathBuf,
    label: String,
    /// None while nobody has seen it, or wants any.
    serial: Option<String>,
    isolate: bool,
}

/// Where a token holds a private key. At least one of id and label.
pub struct KeyPlace {
    /// Name in the configuration.
    pub token: String,
    pub id: Option<Vec<u8>>,
    pub label: Option<String>,
}

impl Generation {
    /// With the tokens of `wanted`: those of `former` where they are the same, the others started. All or none; each PIN
    /// is tried once, and not at all where the process is logged in.
    pub fn with_tokens(
        former: &Generation,
        wanted: Vec<WantedToken>,
        stop_budget: Duration,
    ) -> Result<Self, TokenError> {
        let mut generation = Self::default();
        for WantedToken { plan, sign_deadline, is_away } in wanted {
            let mut identity = TokenIdentity::of(&plan);
            let known = former.tokens.iter().find(|started| started.identity.is(&identity));
            let (pin, weight) = (plan.pin.clone(), plan.weight);
            let token = match known {
                Some(known) => {
                    identity.serial = identity.serial.or_else(|| known.identity.serial.clone());
                    Ok(known.token.clone())
                }
                None if is_away => Token::awaited(plan),
                None => Token::start(plan),
            };
            let token = token.inspect_err(|_| generation.stop_unless_in(&[former], stop_budget))?;
            generation.tokens.push(StartedToken { identity, sign_deadline, is_away, token, pin, weight });
        }
        Ok(generation)
    }

    /// It serves from now on. Tokens that are away are looked for from here on, when nobody else begins with their modules.
    pub fn begin(&mut self) {
        for started in &mut self.tokens {
            started.token.adopt(&std::mem::take(&mut started.pin), started.weight);
            started.token.look();
        }
    }

    /// Finds the certificate's key in its tokens. One that is in use already needs no search, and one in a token that is away
    /// is found and proved when that is back.
    ///
    /// # Errors
    /// What is wrong with the first place that cannot be used.
    pub fn load(
        &mut self,
        name: String,
        public_key: &[u8],
        places: Vec<KeyPlace>,
        staples: &Staples,
        make: impl FnOnce(Arc<PrivateKey>, Duration) -> Certificate,
    ) -> Result<(), LoadFault> {
        let mut keys = Vec::with_capacity(places.len());
        let mut sign_deadline = Duration::ZERO;
        for KeyPlace { token, id, label } in places {
            let started =
                self.tokens.iter().find(|started| started.identity.name == token).ok_or_else(|| {
                    LoadFault::Settings(format!(
                        "certificate {name}: expected one of the tokens, found {token:?}"
                    ))
                })?;
            let plan = KeyPlan { id, label, spki: public_key.to_vec(), name: name.clone() };
            let key = match started.is_away {
                true => started.token.expect_key(plan),
                false => started.token.find_key(plan),
            };
            keys.push(key.map_err(LoadFault::Token)?);
            sign_deadline = sign_deadline.max(started.sign_deadline);
        }
        let key = PrivateKey::new(keys)
            .map_err(|error| LoadFault::Settings(format!("certificate {name}: {error}")))?;
        self.keys.push((name.clone(), key.clone()));
        let certificate = make(key, sign_deadline);
        certificate.staple(staples.get(certificate.leaf()).cloned());
        self.certificates.insert(name, Arc::new(certificate));
        Ok(())
    }

    /// Finds the ticket key in the tokens that are there, and has them derive the secrets of `epoch`; without secrets when all
    /// are away.
    ///
    /// # Errors
    /// A token cannot, or two of them hold different keys.
    pub fn load_ticket_key(
        &mut self,
        places: Vec<KeyPlace>,
        rotation_ms: u64,
        epoch: u64,
    ) -> Result<(), LoadFault> {
        let places = places.into_iter().filter_map(|KeyPlace { token, id, label }| {
            let started = self.tokens.iter().find(|started| started.identity.name == token)?;
            Some(ticket_keys::Place { token: started.token.clone(), is_away: started.is_away, id, label })
        });
        let (key, secrets) =
            TicketKey::proved(places.collect(), rotation_ms, epoch).map_err(|fault| match fault {
                TicketKeyFault::Token(error) => LoadFault::Token(error),
                TicketKeyFault::Differ(what) => LoadFault::Settings(what),
            })?;
        self.ticket_key = Some((Arc::new(key), secrets));
        Ok(())
    }

    /// Every certificate is loaded.
    pub fn loaded(&self) {
        for token in self.tokens() {
            token.keys_are_found();
        }
    }

    /// As the policy allows it to sign.
    ///
    /// # Errors
    /// There is no such certificate, or the policy allows none of what its key can sign with.
    pub fn certificate(&mut self, name: &str, policy: &Policy) -> Result<Arc<Certificate>, String> {
        let known = self.certificates.get(name);
        let known = known.ok_or_else(|| format!("expected one of the certificates, found {name:?}"))?;
        let schemes = policy.limit(known.schemes());
        if schemes.is_empty() {
            return Err(format!(
                "certificate {name}: expected a key that signs with one of {:?}, which the policy allows, found {:?}",
                policy.schemes,
                known.schemes()
            ));
        }
        if schemes == known.schemes() {
            return Ok(known.clone());
        }
        let place = (name.to_owned(), schemes.iter().map(|scheme| u16::from(*scheme)).collect());
        let limited = self.limited.entry(place).or_insert_with(|| Arc::new(known.limited_to(schemes)));
        Ok(limited.clone())
    }

    /// By digest and not by name: in the next configuration, or in a file that was replaced, a name may be of another certificate.
    pub fn staple(&self, changed: &HashMap<LeafDigest, Option<Vec<u8>>>) {
        for certificate in self.certificates.values().chain(self.limited.values()) {
            if let Some(response) = changed.get(certificate.leaf()) {
                certificate.staple(response.clone());
            }
        }
    }

    pub fn tokens(&self) -> impl Iterator<Item = &Arc<Token>> {
        self.tokens.iter().map(|started| &started.token)
    }

    /// Writes off what is lost in the tokens' modules. A certificate that no token signs for any more and that only a new
    /// process can help, if there is one.
    pub fn look(&self) -> Option<&str> {
        for token in self.tokens() {
            token.look();
        }
        self.keys.iter().find(|(_, key)| key.is_stuck()).map(|(certificate, _)| certificate.as_str())
    }

    /// Whether a handshake may still want a signature by its keys.
    pub fn is_in_use(&self) -> bool {
        self.tls_configs.iter().any(|tls_config| Arc::strong_count(tls_config) > 1)
            || self.upstream_tls.iter().any(|tls| Arc::strong_count(tls) > 1)
    }

    /// Stops the tokens that none of `others` has too.
    pub fn stop_unless_in(&self, others: &[&Generation], budget: Duration) {
        for token in self.tokens() {
            if !others.iter().any(|other| other.has(token)) {
                token.stop(budget);
            }
        }
    }

    fn has(&self, token: &Arc<Token>) -> bool {
        self.tokens().any(|own| Arc::ptr_eq(own, token))
    }
}

/// Why a certificate cannot be served.
pub enum LoadFault {
    Token(TokenError),
    Settings(String),
}

impl TokenIdentity {
    fn is(&self, other: &Self) -> bool {
        let Self { name, module, label, serial, isolate } = other;
        let is_serial = self.serial.is_none() || serial.is_none() || self.serial == *serial;
        is_serial && (&self.name, &self.module, &self.label, &self.isolate) == (name, module, label, isolate)
    }

    fn of(plan: &TokenPlan) -> Self {
        Self {
            name: plan.name.clone(),
            module: plan.module.clone(),
            label: plan.label.clone(),
            serial: plan.serial.clone(),
            isolate: plan.isolate,
        }
    }
}
