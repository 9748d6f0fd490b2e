//! Owns the border of what may be agreed on in TLS, and of what was. Must not know with whom. JavaScript thread only.

use napi_derive::napi;

use super::{ms, signed};
use crate::policy::{NegotiatedCounters, Policy, PolicyWords, group_name, has_fips_module, suite_name};

/// What may be agreed on in TLS. Of lists, what is preferred stands first, and an empty one means everything.
#[napi(object)]
pub struct PolicySettings {
    /// `1.2`, `1.3`.
    pub versions: Vec<String>,
    /// This and the lists that follow: IANA names.
    pub cipher_suites: Vec<String>,
    pub groups: Vec<String>,
    /// What certificates of ours sign with, and what is accepted of servers.
    pub signature_schemes: Vec<String>,
    /// Whose preference counts between cipher suites. (Between groups it is the client's.)
    #[napi(ts_type = "'client' | 'server'")]
    pub cipher_order: String,
    /// Refuse TLS 1.2 without it (RFC 7627).
    pub require_extended_master_secret: bool,
    /// How old a session ticket may be; undefined: there are none. Of listeners.
    pub ticket_lifetime_ms: Option<u32>,
    /// Refuse to begin with anything that the FIPS module is not validated for.
    pub fips: bool,
}

#[napi(object)]
pub struct CipherSnapshot {
    #[napi(ts_type = "'TLSv1.2' | 'TLSv1.3'")]
    pub protocol: String,
    /// IANA name.
    pub cipher: String,
    pub count: i64,
}

#[napi(object)]
pub struct GroupSnapshot {
    /// IANA name.
    pub group: String,
    pub count: i64,
}

/// Whether the engine is built with the FIPS module of AWS-LC, and that passed its self-test.
#[napi(catch_unwind)]
pub fn is_fips() -> bool {
    has_fips_module()
}

pub(super) fn policy(settings: &PolicySettings) -> std::result::Result<Policy, String> {
    let words = PolicyWords {
        versions: &settings.versions,
        cipher_suites: &settings.cipher_suites,
        groups: &settings.groups,
        signature_schemes: &settings.signature_schemes,
    };
    Ok(Policy {
        client_order: match settings.cipher_order.as_str() {
            "client" => true,
            "server" => false,
            other => return Err(format!("cipherOrder: expected client or server, found {other:?}")),
        },
        requires_ems: settings.require_extended_master_secret,
        ticket_lifetime: settings.ticket_lifetime_ms.map(ms),
        fips: settings.fips,
        ..Policy::parse(&words)?
    })
}

pub(super) fn cipher_snapshots(negotiated: &NegotiatedCounters) -> Vec<CipherSnapshot> {
    negotiated
        .cipher_suites()
        .map(|(suite, count)| CipherSnapshot {
            protocol: if suite.tls13().is_some() { "TLSv1.3" } else { "TLSv1.2" }.into(),
            cipher: suite_name(suite),
            count: signed(count),
        })
        .collect()
}

pub(super) fn group_snapshots(negotiated: &NegotiatedCounters) -> Vec<GroupSnapshot> {
    negotiated
        .groups()
        .map(|(group, count)| GroupSnapshot { group: group_name(group), count: signed(count) })
        .collect()
}
