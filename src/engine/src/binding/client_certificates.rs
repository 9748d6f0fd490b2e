//! Owns the border of clients' certificates: which are taken, how clients are told apart by them, what OCSP responders are asked
//! and have said. Must not know what else a listener has. JavaScript thread only.

use std::sync::Arc;

use napi::bindgen_prelude::Buffer;
use napi_derive::napi;

use super::verify::{lists_of, pins_of, roots_of};
use super::{ms, signed};
use crate::client_status::{ClientStatus, STATUS_OUTCOMES, StatusPlan};
use crate::listener::{ListenerClients, ListenerStats};
use crate::verify::{ClientVerifier, ClientVerifyPlan, Clients, PeerSignatures};

/// Certificates that clients show.
#[napi(object)]
pub struct ClientCertificateSettings {
    /// False: clients without one are served too.
    pub required: bool,
    /// DER; at least one.
    pub roots: Vec<Buffer>,
    /// DER.
    pub crls: Vec<Buffer>,
    /// Nobody named: everybody whom a root vouches for.
    pub allow: ClientsSettings,
    /// Undefined: no OCSP responder is asked.
    pub status: Option<ClientStatusSettings>,
}

/// Clients by what their certificates call them; one match is enough.
#[napi(object)]
pub struct ClientsSettings {
    pub common_names: Vec<String>,
    /// Lower case; `*.` stands for one label.
    pub dns_names: Vec<String>,
    /// Whole, or with `/*` at the end for whatever is below.
    pub uris: Vec<String>,
    pub emails: Vec<String>,
    /// SHA-256 of SubjectPublicKeyInfo.
    pub spki: Vec<Buffer>,
}

/// Asking OCSP responders about clients' certificates.
#[napi(object)]
pub struct ClientStatusSettings {
    /// Nobody is let in whose certificate is not said to be good.
    pub hard: bool,
    /// `http://host:port/path`, instead of what certificates say.
    pub responder: Option<String>,
    pub deadline_ms: u32,
}

/// What OCSP responders said of clients' certificates.
#[napi(object)]
pub struct ClientStatusSnapshot {
    pub outcome: String,
    pub count: i64,
}

pub(super) fn listener_clients(
    settings: &ClientCertificateSettings,
    signatures: PeerSignatures,
) -> std::result::Result<Arc<ListenerClients>, String> {
    let of = |what: &str| format!("clientCertificates.{what}");
    let roots = roots_of(&settings.roots, &of("roots"))?;
    // Every one of a file that was named is meant; of the hundreds of a host some are always odd.
    if roots.len() < settings.roots.len() {
        let (found, expected) = (roots.len(), settings.roots.len());
        return Err(format!(
            "clientCertificates.roots: expected {expected} usable certificates, found {found}"
        ));
    }
    let plan = ClientVerifyPlan {
        is_required: settings.required,
        roots,
        lists: lists_of(&settings.crls, &of("crls"))?,
        allowed: clients_of(&settings.allow, &of("allow"))?,
        files: settings.roots.iter().chain(&settings.crls).map(|der| der.to_vec()).collect(),
        asks_status: settings.status.is_some(),
    };
    let algorithms = signatures.algorithms;
    let status = settings.status.as_ref().map(|status| {
        let plan = StatusPlan {
            is_hard: status.hard,
            responder: status.responder.clone(),
            deadline: ms(status.deadline_ms),
        };
        ClientStatus::new(plan, algorithms)
    });
    Ok(Arc::new(ListenerClients { verifier: ClientVerifier::new(plan, signatures), status }))
}

pub(super) fn clients_of(settings: &ClientsSettings, place: &str) -> std::result::Result<Clients, String> {
    Ok(Clients {
        common_names: settings.common_names.iter().cloned().collect(),
        dns_names: settings.dns_names.iter().cloned().collect(),
        uris: settings.uris.clone(),
        emails: settings.emails.iter().cloned().collect(),
        spki: pins_of(&settings.spki, &format!("{place}.spki"))?,
    })
}

pub(super) fn client_status_snapshots(stats: &ListenerStats) -> Vec<ClientStatusSnapshot> {
    STATUS_OUTCOMES
        .iter()
        .zip(&stats.client_statuses)
        .map(|(outcome, count)| ClientStatusSnapshot {
            outcome: (*outcome).to_owned(),
            count: signed(count.get()),
        })
        .collect()
}
