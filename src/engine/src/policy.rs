//! Owns what a listener negotiates: versions, cipher suites, groups, application protocols, tickets. Turns names from the
//! configuration into a rustls configuration, or says which name is unknown. Runs on the JavaScript thread, at start.

use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};
use std::sync::Arc;

use crate::certificates::Certificate;
use crate::key_log::KeyLog;
use crate::stats::Counter;
use crate::tickets::Ticketer;
use crate::verify::ClientVerifier;

/// One ticket for each full handshake: a second one costs an encryption and 200 bytes, and few clients use it.
const TICKETS_PER_HANDSHAKE: usize = 1;

pub struct Policy {
    pub versions: Vec<&'static SupportedProtocolVersion>,
    pub cipher_suites: Vec<SupportedCipherSuite>,
    pub groups: Vec<&'static dyn SupportedKxGroup>,
    pub tickets: bool,
}

impl Policy {
    /// Empty lists mean everything that rustls offers, in its order.
    ///
    /// # Errors
    /// A sentence that names the word and what is known instead.
    pub fn parse(
        versions: &[String],
        suites: &[String],
        groups: &[String],
        tickets: bool,
    ) -> Result<Self, String> {
        let known = aws_lc_rs::default_provider();
        let versions = match versions {
            [] => vec![&TLS13, &TLS12],
            _ => versions.iter().map(|name| parse_version(name)).collect::<Result<_, _>>()?,
        };
        let cipher_suites = match suites {
            [] => known.cipher_suites,
            _ => pick(suites, &known.cipher_suites, "cipher suite", suite_name)?,
        };
        let groups = match groups {
            [] => known.kx_groups,
            _ => pick(groups, aws_lc_rs::ALL_KX_GROUPS, "group", |group| group_name(*group))?,
        };
        Ok(Self { versions, cipher_suites, groups, tickets })
    }

    /// # Errors
    /// The versions, suites and groups do not fit together.
    pub fn server_config(
        &self,
        certificates: Arc<dyn ResolvesServerCert>,
        alpn: &[String],
        ticketer: &Ticketer,
        clients: Option<Arc<ClientVerifier>>,
        key_log: Option<Arc<KeyLog>>,
    ) -> Result<Arc<ServerConfig>, rustls::Error> {
        let provider = CryptoProvider {
            cipher_suites: self.cipher_suites.clone(),
            kx_groups: self.groups.clone(),
            ..aws_lc_rs::default_provider()
        };
        let builder =
            ServerConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(&self.versions)?;
        // A session is resumed only where its client would be let in by the same rules.
        let ticketer = ticketer.within(clients.as_ref().map(|clients| clients.digest()).unwrap_or_default());
        let builder = match clients {
            Some(verifier) => builder.with_client_cert_verifier(verifier),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(certificates);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        // Resumption is by tickets alone: a session cache in one worker is of no use to the others.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.max_early_data_size = 0;
        // Preferred first, as the policy says. (Groups: rustls takes the client's first that we have.)
        config.ignore_client_order = true;
        if let Some(key_log) = key_log {
            config.key_log = key_log;
        }
        if self.tickets {
            config.ticketer = Arc::new(ticketer);
            config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
        } else {
            config.send_tls13_tickets = 0;
        }
        Ok(Arc::new(config))
    }
}

/// What a server is offered, beside the policy.
pub struct ClientPlan<'a> {
    pub verifier: Arc<dyn ServerCertVerifier>,
    pub certificate: Option<&'a Certificate>,
    pub alpn: &'a [String],
    pub send_name: bool,
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
        let provider = Arc::new(CryptoProvider {
            cipher_suites: self.cipher_suites.clone(),
            kx_groups: self.groups.clone(),
            ..aws_lc_rs::default_provider()
        });
        let builder = ClientConfig::builder_with_provider(provider)
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
        config.resumption = resumption(self.tickets);
        if let Some(key_log) = plan.key_log {
            config.key_log = key_log;
        }
        Ok(config)
    }
}

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
        let known = aws_lc_rs::default_provider().cipher_suites;
        Self {
            cipher_suites: known.into_iter().map(|suite| (suite, Counter::default())).collect(),
            groups: aws_lc_rs::ALL_KX_GROUPS.iter().map(|group| (*group, Counter::default())).collect(),
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
        let ours: Vec<_> = aws_lc_rs::default_provider().cipher_suites.iter().map(openssl_name).collect();
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
        let error = Policy::parse(&[], &names, &[], true).err().expect("refused");
        assert!(
            error.contains("TLS_RSA_WITH_RC4_128_MD5") && error.contains("TLS_AES_128_GCM_SHA256"),
            "{error}"
        );
    }

    #[test]
    fn names_choose_and_order_what_is_offered() {
        let groups = ["secp384r1".to_owned(), "X25519MLKEM768".to_owned()];
        let policy = Policy::parse(&["1.3".to_owned()], &[], &groups, true).expect("known names");
        let names: Vec<_> = policy.groups.iter().map(|group| format!("{:?}", group.name())).collect();
        assert_eq!(names, groups);
        assert_eq!(policy.versions, [&TLS13]);
    }
}
