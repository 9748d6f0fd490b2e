//! Owns the border of listeners: what clients meet, where their connections go, and how many there were. Must not know
//! certificates and upstreams, which it calls by name. JavaScript thread only.

use std::sync::Arc;

use napi::Result;
use napi_derive::napi;

use super::client_certificates::{
    ClientCertificateSettings, ClientStatusSnapshot, ClientsSettings, client_status_snapshots, clients_of,
    listener_clients,
};
use super::policy::{PolicySettings, policy};
use super::stats::{LatencySnapshot, latency};
use super::{Shared, invalid, ms, signed};
use crate::certificates::{Certificates, UnknownName};
use crate::client_rate::ClientRatePlan;
use crate::generation::Generation;
use crate::listener::{Front, ListenerPlan, ListenerStats, ListenerTls};
use crate::parties::{Network, ProxyIn};
use crate::routing::{RoutePlan, RoutesPlan};

#[napi(object)]
pub struct ListenerSettings {
    pub name: String,
    /// What clients speak: TLS that ends here, plaintext, or TLS that is passed on.
    #[napi(ts_type = "'tls' | 'plain' | 'passthrough'")]
    pub front: String,
    /// Names of certificates; the first is the default. Empty where no TLS ends.
    pub certificates: Vec<String>,
    #[napi(ts_type = "'default' | 'refuse'")]
    pub unknown_name: String,
    pub alpn: Vec<String>,
    pub policy: PolicySettings,
    /// Undefined: clients are asked for none.
    pub client_certificates: Option<ClientCertificateSettings>,
    pub routes: Vec<RouteSettings>,
    /// Where connections go that no route fits; undefined: they are refused.
    pub upstream: Option<String>,
    pub handshake_deadline_ms: u32,
    pub idle_deadline_ms: u32,
    pub half_closed_deadline_ms: u32,
    /// 0: none.
    pub lifetime_deadline_ms: u32,
    pub proxy_in: Option<ProxyInSettings>,
    /// Clients were redirected here.
    pub transparent: bool,
    pub connections_max: u32,
    pub handshakes_max: u32,
    pub per_client: Option<ClientRateSettings>,
    /// Inherited listening sockets of this worker's slot.
    pub sockets: Vec<i32>,
}

/// The first route that fits says where a connection goes.
#[napi(object)]
pub struct RouteSettings {
    /// DNS names in lower case, wildcards as `*.example.org`; empty: any.
    pub names: Vec<String>,
    /// Application protocols; empty: any.
    pub alpn: Vec<String>,
    /// Undefined: any, with or without a certificate.
    pub clients: Option<ClientsSettings>,
    /// Undefined: it is refused.
    pub upstream: Option<String>,
}

/// Who must begin with a PROXY header.
#[napi(object)]
pub struct ProxyInSettings {
    /// `192.0.2.0/24`, `2001:db8::/32`
    pub from: Vec<String>,
    pub deadline_ms: u32,
}

/// How often a client may come, in one worker.
#[napi(object)]
pub struct ClientRateSettings {
    /// Connections per second.
    pub rate: u32,
    /// At once.
    pub burst: u32,
    /// Of an address that tell clients apart.
    pub ipv4_bits: u32,
    pub ipv6_bits: u32,
}

#[napi(object)]
pub struct ListenerSnapshot {
    pub name: String,
    pub accepted: i64,
    pub accept_failures: i64,
    pub connections_open: i64,
    pub handshakes_in_flight: i64,
    pub to_upstream_bytes: i64,
    pub to_client_bytes: i64,
    pub handshakes: Vec<HandshakeSnapshot>,
    pub client_statuses: Vec<ClientStatusSnapshot>,
}

#[napi(object)]
pub struct HandshakeSnapshot {
    #[napi(ts_type = "'TLSv1.2' | 'TLSv1.3'")]
    pub protocol: String,
    pub resumed: bool,
    pub latency: LatencySnapshot,
}

pub(super) fn listener_plan(
    settings: ListenerSettings,
    generation: &mut Generation,
    shared: &Shared,
) -> Result<(ListenerPlan, Option<ListenerTls>)> {
    let fault = |what: String| invalid(format!("listener {}: {what}", settings.name));
    let front = match settings.front.as_str() {
        "tls" => Front::Tls,
        "plain" => Front::Plain,
        "passthrough" => Front::Passthrough,
        other => return Err(fault(format!("front: expected tls, plain or passthrough, found {other:?}"))),
    };
    let tls = match front {
        Front::Tls => Some(listener_tls(&settings, generation, shared).map_err(fault)?),
        Front::Plain | Front::Passthrough => None,
    };
    let proxy_in = match settings.proxy_in {
        None => None,
        Some(ProxyInSettings { from, deadline_ms }) => {
            let parse = |text: &String| {
                Network::parse(text).ok_or_else(|| {
                    fault(format!(
                        "proxyProtocol.from: expected a network such as 192.0.2.0/24, found {text:?}"
                    ))
                })
            };
            let from = from.iter().map(parse).collect::<Result<_>>()?;
            Some(ProxyIn { from, deadline: ms(deadline_ms) })
        }
    };
    let route = |RouteSettings { names, alpn, clients, upstream }| {
        let clients = clients
            .as_ref()
            .map(|clients| clients_of(clients, "routes.clients"))
            .transpose()
            .map_err(fault)?;
        let alpn = alpn.into_iter().map(String::into_bytes).collect();
        Ok(RoutePlan { names, alpn, clients: clients.unwrap_or_default(), upstream })
    };
    let routes = settings.routes.into_iter().map(route).collect::<Result<_>>()?;
    let plan = ListenerPlan {
        front,
        routes: RoutesPlan { routes, default: settings.upstream },
        handshake_deadline: ms(settings.handshake_deadline_ms),
        idle_deadline: ms(settings.idle_deadline_ms),
        half_closed_deadline: ms(settings.half_closed_deadline_ms),
        lifetime_deadline: (settings.lifetime_deadline_ms > 0).then(|| ms(settings.lifetime_deadline_ms)),
        proxy_in,
        transparent: settings.transparent,
        connections_max: settings.connections_max as usize,
        handshakes_max: settings.handshakes_max as usize,
        per_client: settings.per_client.map(client_rate_plan),
        sockets: settings.sockets,
        name: settings.name,
    };
    Ok((plan, tls))
}

/// The error says what is wrong with the listener.
fn listener_tls(
    settings: &ListenerSettings,
    generation: &mut Generation,
    shared: &Shared,
) -> std::result::Result<ListenerTls, String> {
    let policy = policy(&settings.policy)?;
    let mut chosen = Vec::with_capacity(settings.certificates.len());
    for wanted in &settings.certificates {
        chosen.push(generation.certificate(wanted, &policy)?);
    }
    if chosen.is_empty() {
        return Err("expected at least one certificate, found none".into());
    }
    let unknown_name = match settings.unknown_name.as_str() {
        "default" => UnknownName::Default,
        "refuse" => UnknownName::Refuse,
        other => return Err(format!("unknownName: expected default or refuse, found {other:?}")),
    };
    let of_policy = |settings| listener_clients(settings, policy.peer_signatures());
    let clients = settings.client_certificates.as_ref().map(of_policy).transpose()?;
    let config = policy.server_config(
        Arc::new(Certificates::new(&chosen, unknown_name)),
        &settings.alpn,
        &shared.ticketer,
        clients.as_ref().map(|clients| clients.verifier.clone()),
        shared.key_log.clone(),
    )?;
    Ok(ListenerTls { config, clients })
}

fn client_rate_plan(settings: ClientRateSettings) -> ClientRatePlan {
    let bits = |bits: u32| u8::try_from(bits).unwrap_or(u8::MAX);
    ClientRatePlan {
        rate: settings.rate,
        burst: settings.burst,
        ipv4_bits: bits(settings.ipv4_bits),
        ipv6_bits: bits(settings.ipv6_bits),
    }
}

pub(super) fn listener_snapshot(name: &str, stats: &ListenerStats) -> ListenerSnapshot {
    ListenerSnapshot {
        name: name.to_owned(),
        accepted: signed(stats.accepted.get()),
        accept_failures: signed(stats.accept_failures.get()),
        connections_open: stats.connections_open.get(),
        handshakes_in_flight: stats.handshakes_in_flight.get(),
        to_upstream_bytes: signed(stats.relay_bytes.to_upstream.get()),
        to_client_bytes: signed(stats.relay_bytes.to_client.get()),
        handshakes: handshake_snapshots(stats),
        client_statuses: client_status_snapshots(stats),
    }
}

fn handshake_snapshots(stats: &ListenerStats) -> Vec<HandshakeSnapshot> {
    [(false, false), (false, true), (true, false), (true, true)]
        .map(|(tls13, resumed)| HandshakeSnapshot {
            protocol: if tls13 { "TLSv1.3" } else { "TLSv1.2" }.into(),
            resumed,
            latency: latency(stats.handshake(tls13, resumed).snapshot()),
        })
        .into()
}
