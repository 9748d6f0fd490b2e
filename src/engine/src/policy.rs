//! Owns what is negotiated: versions, cipher suites, groups, signature schemes, application protocols, tickets. Turns names from
//! the configuration into a rustls configuration, or says which name is unknown. Runs on the JavaScript thread, at start.

use aws_lc_rs::digest;
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, SupportedKxGroup, WebPkiSupportedAlgorithms, aws_lc_rs as lc};
use rustls::pki_types::SignatureVerificationAlgorithm;
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig, SignatureScheme, SupportedCipherSuite, SupportedProtocolVersion};
use std::sync::Arc;
use std::time::Duration;

use crate::certificates::Certificate;
use crate::key_log::KeyLog;
use crate::stats::Counter;
use crate::tickets::{TicketScope, Ticketer};
use crate::verify::{ClientVerifier, PeerSignatures};

/// One ticket for each full handshake: a second one costs an encryption and 200 bytes, and few clients use it.
const TICKETS_PER_HANDSHAKE: usize = 1;

pub struct Policy {
    pub versions: Vec<&'static SupportedProtocolVersion>,
    pub cipher_suites: Vec<SupportedCipherSuite>,
    pub groups: Vec<&'static dyn SupportedKxGroup>,
    /// What our keys sign with, and what is accepted of peers; preferred first.
    pub schemes: Vec<SignatureScheme>,
    /// Of the cipher suites that both have, the one that the client prefers is taken, not the one that stands first here.
    pub client_order: bool,
    /// TLS 1.2 without extended master secrets (RFC 7627) is refused.
    pub requires_ems: bool,
    /// How old a ticket may be; None: no tickets. For listeners.
    pub ticket_lifetime: Option<Duration>,
    /// Nothing but what the FIPS module has been validated for.
    pub fips: bool,
}

/// Words of the configuration. An empty list means everything that rustls has, in its order.
#[derive(Default)]
pub struct PolicyWords<'a> {
    /// `1.2`, `1.3`
    pub versions: &'a [String],
    /// This and what follows: IANA names.
    pub cipher_suites: &'a [String],
    pub groups: &'a [String],
    pub signature_schemes: &'a [String],
}

impl Policy {
    /// As rustls would have it, but for the words.
    ///
    /// # Errors
    /// A sentence that names the word and what is known instead.
    pub fn parse(words: &PolicyWords<'_>) -> Result<Self, String> {
        let versions = match words.versions {
            [] => vec![&TLS13, &TLS12],
            names => names.iter().map(|name| parse_version(name)).collect::<Result<_, _>>()?,
        };
        let cipher_suites = match words.cipher_suites {
            [] => lc::ALL_CIPHER_SUITES.to_vec(),
            names => pick(names, lc::ALL_CIPHER_SUITES, "cipher suite", suite_name)?,
        };
        let groups = match words.groups {
            [] => lc::DEFAULT_KX_GROUPS.to_vec(),
            names => pick(names, lc::ALL_KX_GROUPS, "group", |group| group_name(*group))?,
        };
        let schemes = match words.signature_schemes {
            [] => SCHEMES.iter().map(|(_, scheme)| *scheme).collect(),
            names => pick(names, &SCHEMES, "signature scheme", |(name, _)| (*name).to_owned())?
                .into_iter()
                .map(|(_, scheme)| scheme)
                .collect(),
        };
        Ok(Self {
            versions,
            cipher_suites,
            groups,
            schemes,
            client_order: true,
            requires_ems: false,
            ticket_lifetime: None,
            fips: false,
        })
    }

    /// # Errors
    /// The versions, suites and groups do not fit together, or are not what `fips` demands.
    pub fn server_config(
        &self,
        certificates: Arc<dyn ResolvesServerCert>,
        alpn: &[String],
        ticketer: &Ticketer,
        clients: Option<Arc<ClientVerifier>>,
        key_log: Option<Arc<KeyLog>>,
    ) -> Result<Arc<ServerConfig>, String> {
        let scope = self.ticket_scope(clients.as_deref());
        let builder = ServerConfig::builder_with_provider(self.provider())
            .with_protocol_versions(&self.versions)
            .map_err(|error| error.to_string())?;
        let builder = match clients {
            Some(verifier) => builder.with_client_cert_verifier(verifier),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(certificates);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        // Resumption is by tickets alone: a session cache in one worker is of no use to the others.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.max_early_data_size = 0;
        // Groups: rustls takes the client's first that we have, whatever stands first here.
        config.ignore_client_order = !self.client_order;
        config.require_ems = self.requires_ems;
        if let Some(key_log) = key_log {
            config.key_log = key_log;
        }
        if let Some(lifetime) = self.ticket_lifetime {
            config.ticketer = Arc::new(ticketer.within(scope, lifetime));
            config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
        } else {
            config.send_tls13_tickets = 0;
        }
        self.demand_fips(config.fips())?;
        Ok(Arc::new(config))
    }

    /// Of those schemes that a key can sign with, the ones that the policy allows, in the policy's order.
    pub fn limit(&self, of_key: &[SignatureScheme]) -> Vec<SignatureScheme> {
        self.schemes.iter().copied().filter(|scheme| of_key.contains(scheme)).collect()
    }

    /// What is accepted of peers.
    pub fn peer_signatures(&self) -> PeerSignatures {
        let known = lc::default_provider().signature_verification_algorithms;
        let of_chains = if self.fips { APPROVED } else { known.all };
        PeerSignatures::new(WebPkiSupportedAlgorithms { all: of_chains, ..known }, &self.schemes)
    }

    fn provider(&self) -> Arc<CryptoProvider> {
        Arc::new(CryptoProvider {
            cipher_suites: self.cipher_suites.clone(),
            kx_groups: self.groups.clone(),
            ..lc::default_provider()
        })
    }

    /// A session is resumed only under the policy that it was agreed on under: a resumption of TLS 1.2 agrees on no group and
    /// no signature anew (RFC 5246 7.3), and one of TLS 1.3 shows no certificate. Whatever else a policy demands of a session
    /// belongs in here; how long a ticket is good does not, each listener judges that by itself. Nor is one resumed where its
    /// client would be let in by other rules.
    fn ticket_scope(&self, clients: Option<&ClientVerifier>) -> TicketScope {
        let suites: Vec<_> = self.cipher_suites.iter().map(suite_name).collect();
        let groups: Vec<_> = self.groups.iter().map(|group| group_name(*group)).collect();
        let versions: Vec<_> = self.versions.iter().map(|version| version.version).collect();
        let text = format!("{versions:?} {suites:?} {groups:?} {:?} {}", self.schemes, self.requires_ems);
        let mut scope = TicketScope::default();
        let rules = clients.map(ClientVerifier::digest);
        let agreed = [text.as_bytes(), rules.as_ref().map_or(&[][..], |rules| rules)].concat();
        scope.copy_from_slice(digest::digest(&digest::SHA256, &agreed).as_ref());
        scope
    }

    fn demand_fips(&self, is_fips: bool) -> Result<(), String> {
        if self.fips && !is_fips {
            let not_of_it = |name: String, is_approved: bool| (!is_approved).then_some(name);
            let suites =
                self.cipher_suites.iter().filter_map(|suite| not_of_it(suite_name(suite), suite.fips()));
            let groups = self.groups.iter().filter_map(|group| not_of_it(group_name(*group), group.fips()));
            let found = suites.chain(groups).collect::<Vec<_>>().join(", ");
            return Err(format!(
                "a policy of FIPS 140-3: expected what the module has been validated for, found {}; take it out of the policy, or build the engine with the feature fips",
                if found.is_empty() { "an engine without the module" } else { &found }
            ));
        }
        Ok(())
    }
}

/// Whether the cryptography is that of a FIPS module.
pub fn has_fips_module() -> bool {
    lc::default_provider().fips()
}

/// What a server is offered, beside the policy.
pub struct ClientPlan<'a> {
    pub verifier: Arc<dyn ServerCertVerifier>,
    pub certificate: Option<&'a Certificate>,
    pub alpn: &'a [String],
    pub send_name: bool,
    /// Whether its TLS sessions are resumed.
    pub resume: bool,
    pub key_log: Option<Arc<KeyLog>>,
}

/// TLS sessions kept of a server.
const SESSIONS_MAX: usize = 16;

/// What is remembered of a server's TLS sessions: nothing yet.
pub fn resumption(enabled: bool) -> Resumption {
    if enabled { Resumption::in_memory_sessions(SESSIONS_MAX) } else { Resumption::disabled() }
}

impl Policy {
    /// As a client of a server.
    ///
    /// # Errors
    /// The versions, suites and groups do not fit together.
    pub fn client_config(&self, plan: ClientPlan<'_>) -> Result<ClientConfig, String> {
        let builder = ClientConfig::builder_with_provider(self.provider())
            .with_protocol_versions(&self.versions)
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(plan.verifier);
        let mut config = match plan.certificate {
            None => builder.with_no_client_auth(),
            Some(own) => builder.with_client_cert_resolver(Arc::new(own.for_upstreams())),
        };
        config.alpn_protocols = plan.alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        config.enable_sni = plan.send_name;
        config.enable_early_data = false;
        config.resumption = resumption(plan.resume);
        config.require_ems = self.requires_ems;
        if let Some(key_log) = plan.key_log {
            config.key_log = key_log;
        }
        self.demand_fips(config.fips())?;
        Ok(config)
    }
}

/// What certificates may be signed with under FIPS 140-3: ECDSA and RSA (FIPS 186-5) with SHA-2.
const APPROVED: &[&dyn SignatureVerificationAlgorithm] = &[
    webpki::aws_lc_rs::ECDSA_P256_SHA256,
    webpki::aws_lc_rs::ECDSA_P256_SHA384,
    webpki::aws_lc_rs::ECDSA_P256_SHA512,
    webpki::aws_lc_rs::ECDSA_P384_SHA256,
    webpki::aws_lc_rs::ECDSA_P384_SHA384,
    webpki::aws_lc_rs::ECDSA_P384_SHA512,
    webpki::aws_lc_rs::ECDSA_P521_SHA256,
    webpki::aws_lc_rs::ECDSA_P521_SHA384,
    webpki::aws_lc_rs::ECDSA_P521_SHA512,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA256,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA384,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA512,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
];

/// Every scheme that a key of ours signs with or a server's signature is verified with, by its IANA name.
const SCHEMES: [(&str, SignatureScheme); 13] = [
    ("ecdsa_secp256r1_sha256", SignatureScheme::ECDSA_NISTP256_SHA256),
    ("ecdsa_secp384r1_sha384", SignatureScheme::ECDSA_NISTP384_SHA384),
    ("ecdsa_secp521r1_sha512", SignatureScheme::ECDSA_NISTP521_SHA512),
    ("ed25519", SignatureScheme::ED25519),
    ("rsa_pss_rsae_sha256", SignatureScheme::RSA_PSS_SHA256),
    ("rsa_pss_rsae_sha384", SignatureScheme::RSA_PSS_SHA384),
    ("rsa_pss_rsae_sha512", SignatureScheme::RSA_PSS_SHA512),
    ("rsa_pkcs1_sha256", SignatureScheme::RSA_PKCS1_SHA256),
    ("rsa_pkcs1_sha384", SignatureScheme::RSA_PKCS1_SHA384),
    ("rsa_pkcs1_sha512", SignatureScheme::RSA_PKCS1_SHA512),
    ("mldsa44", SignatureScheme::ML_DSA_44),
    ("mldsa65", SignatureScheme::ML_DSA_65),
    ("mldsa87", SignatureScheme::ML_DSA_87),
];

fn parse_version(name: &str) -> Result<&'static SupportedProtocolVersion, String> {
    match name {
        "1.2" => Ok(&TLS12),
        "1.3" => Ok(&TLS13),
        _ => Err(format!("unknown TLS version {name:?}, known: 1.2, 1.3")),
    }
}

fn pick<T: Copy>(
    names: &[String],
    known: &[T],
    what: &str,
    name_of: impl Fn(&T) -> String,
) -> Result<Vec<T>, String> {
    let find = |name: &String| known.iter().find(|item| name_of(item) == *name).copied();
    names
        .iter()
        .map(|name| {
            find(name).ok_or_else(|| {
                let known = known.iter().map(&name_of).collect::<Vec<_>>().join(", ");
                format!("unknown {what} {name:?}, known: {known}")
            })
        })
        .collect()
}

/// OpenSSL's name, which is what upstreams compare in PROXY headers: the suites of TLS 1.3 have their IANA names there too,
/// those of TLS 1.2 have not.
pub fn openssl_name(suite: &SupportedCipherSuite) -> String {
    let iana = suite_name(suite);
    let Some((exchange, cipher)) = iana.split_once("_WITH_") else { return iana };
    let exchange = exchange.trim_start_matches("TLS_").replace('_', "-");
    let cipher = match cipher {
        "CHACHA20_POLY1305_SHA256" => "CHACHA20-POLY1305".to_owned(),
        aes => aes.replace("AES_", "AES").replace('_', "-"),
    };
    format!("{exchange}-{cipher}")
}

/// The IANA name: rustls writes TLS13_ where IANA writes TLS_ for the suites of TLS 1.3.
pub fn suite_name(suite: &SupportedCipherSuite) -> String {
    format!("{:?}", suite.suite()).replace("TLS13_", "TLS_")
}

/// The IANA name.
pub fn group_name(group: &'static dyn SupportedKxGroup) -> String {
    format!("{:?}", group.name())
}

/// Finished handshakes by what they agreed on. Closed lists: everything that any policy can choose.
pub struct NegotiatedCounters {
    cipher_suites: Vec<(SupportedCipherSuite, Counter)>,
    groups: Vec<(&'static dyn SupportedKxGroup, Counter)>,
}

impl Default for NegotiatedCounters {
    fn default() -> Self {
        let known = lc::ALL_CIPHER_SUITES.to_vec();
        Self {
            cipher_suites: known.into_iter().map(|suite| (suite, Counter::default())).collect(),
            groups: lc::ALL_KX_GROUPS.iter().map(|group| (*group, Counter::default())).collect(),
        }
    }
}

impl NegotiatedCounters {
    /// A resumed TLS 1.2 session has no group.
    pub fn count(
        &self,
        cipher_suite: Option<SupportedCipherSuite>,
        group: Option<&'static dyn SupportedKxGroup>,
    ) {
        let suite = self.cipher_suites.iter().find(|(known, _)| Some(*known) == cipher_suite);
        let group = self.groups.iter().find(|(known, _)| group.is_some_and(|it| it.name() == known.name()));
        for counter in suite.map(|(_, counter)| counter).into_iter().chain(group.map(|(_, counter)| counter))
        {
            counter.add(1);
        }
    }

    pub fn cipher_suites(&self) -> impl Iterator<Item = (&SupportedCipherSuite, u64)> {
        self.cipher_suites.iter().map(|(suite, counter)| (suite, counter.get()))
    }

    pub fn groups(&self) -> impl Iterator<Item = (&'static dyn SupportedKxGroup, u64)> {
        self.groups.iter().map(|(group, counter)| (*group, counter.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_has_the_name_that_openssl_gives_it() {
        let ours: Vec<_> = lc::ALL_CIPHER_SUITES.iter().map(openssl_name).collect();
        let expected = [
            "TLS_AES_256_GCM_SHA384",
            "TLS_AES_128_GCM_SHA256",
            "TLS_CHACHA20_POLY1305_SHA256",
            "ECDHE-ECDSA-AES256-GCM-SHA384",
            "ECDHE-ECDSA-AES128-GCM-SHA256",
            "ECDHE-ECDSA-CHACHA20-POLY1305",
            "ECDHE-RSA-AES256-GCM-SHA384",
            "ECDHE-RSA-AES128-GCM-SHA256",
            "ECDHE-RSA-CHACHA20-POLY1305",
        ];
        assert_eq!(ours, expected);
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let names = ["TLS_RSA_WITH_RC4_128_MD5".to_owned()];
        let words = PolicyWords { cipher_suites: &names, ..PolicyWords::default() };
        let error = Policy::parse(&words).err().expect("refused");
        assert!(
            error.contains("TLS_RSA_WITH_RC4_128_MD5") && error.contains("TLS_AES_128_GCM_SHA256"),
            "{error}"
        );
    }

    #[test]
    fn names_choose_and_order_what_is_offered() {
        let groups = ["secp384r1".to_owned(), "X25519MLKEM768".to_owned()];
        let versions = ["1.3".to_owned()];
        let words = PolicyWords { versions: &versions, groups: &groups, ..PolicyWords::default() };
        let policy = Policy::parse(&words).expect("known names");
        let names: Vec<_> = policy.groups.iter().map(|group| format!("{:?}", group.name())).collect();
        assert_eq!(names, groups);
        assert_eq!(policy.versions, [&TLS13]);
    }
    #[test]
    fn every_scheme_is_one_that_signatures_are_verified_with() {
        let known = lc::default_provider().signature_verification_algorithms.supported_schemes();
        assert_eq!(known.len(), SCHEMES.len());
        for (name, scheme) in SCHEMES {
            assert!(known.contains(&scheme), "{name}");
        }
    }

    #[test]
    fn a_key_is_limited_to_the_schemes_of_the_policy_in_their_order() {
        let names = ["rsa_pss_rsae_sha512", "ed25519", "rsa_pss_rsae_sha256"].map(str::to_owned);
        let words = PolicyWords { signature_schemes: &names, ..PolicyWords::default() };
        let policy = Policy::parse(&words).expect("known names");
        let of_key = [
            SignatureScheme::RSA_PSS_SHA256,
            SignatureScheme::RSA_PSS_SHA512,
            SignatureScheme::RSA_PKCS1_SHA256,
        ];
        assert_eq!(policy.limit(&of_key), [SignatureScheme::RSA_PSS_SHA512, SignatureScheme::RSA_PSS_SHA256]);
    }

    #[test]
    fn the_scope_of_tickets_is_another_for_whatever_a_resumption_does_not_agree_on_anew() {
        let scope = |words: &PolicyWords<'_>, requires_ems| {
            let policy = Policy { requires_ems, ..Policy::parse(words).expect("known names") };
            policy.ticket_scope(None)
        };
        let all = scope(&PolicyWords::default(), false);
        assert_eq!(scope(&PolicyWords::default(), false), all);
        assert_ne!(scope(&PolicyWords::default(), true), all);
        let [version, group, scheme] = ["1.2", "secp384r1", "ed25519"].map(|word| [word.to_owned()]);
        for words in [
            PolicyWords { versions: &version, ..PolicyWords::default() },
            PolicyWords { groups: &group, ..PolicyWords::default() },
            PolicyWords { signature_schemes: &scheme, ..PolicyWords::default() },
        ] {
            assert_ne!(scope(&words, false), all);
        }
    }
}
