//! Owns the border of upstreams: their servers, how one is chosen and spoken to, and how each is doing. What its certificate must
//! be is verify.rs. Must not know listeners. JavaScript thread only.

use std::sync::Arc;

use napi::Result;
use napi_derive::napi;
use rustls::pki_types::ServerName;

use super::policy::{PolicySettings, policy};
use super::stats::{LatencySnapshot, latency};
use super::verify::{FindingSnapshot, VerificationSettings, finding_snapshots, tlsa_answer, verification};
use super::{Shared, invalid, ms, parse_address, signed};
use crate::generation::Generation;
use crate::policy::ClientPlan;
use crate::proxy_header::ProxyVersion;
use crate::upstream::{
    Balance, CONNECT_OUTCOMES, HealthPlan, PassivePlan, ServerAddress, ServerStats, UpstreamPlan,
    UpstreamStats,
};
use crate::upstream_tls::{ServerTls, UpstreamTls};
use crate::verify::{Findings, Policy as TransparencyPolicy, ServerVerifier, Standing, VerifyPlan};

#[napi(object)]
pub struct UpstreamSettings {
    pub name: String,
    /// `192.0.2.1:80`, `[2001:db8::1]:80` or `unix:/path`: addresses, not names. Or `original` alone.
    pub servers: Vec<String>,
    #[napi(ts_type = "'round-robin' | 'least-connections'")]
    pub balance: String,
    pub connect_deadline_ms: u32,
    pub connect_attempts_max: u32,
    #[napi(ts_type = "'v1' | 'v2'")]
    pub proxy_protocol: Option<String>,
    /// Whether its header has the client's whole certificate.
    pub proxy_client_certificate: bool,
    /// 0: none.
    pub slow_start_ms: u32,
    /// The client's address is the source of its connections.
    pub transparent: bool,
    pub health: Option<HealthSettings>,
    pub passive_failures_max: u32,
    pub passive_ejection_ms: u32,
    /// Undefined: plaintext.
    pub tls: Option<UpstreamTlsSettings>,
}

#[napi(object)]
pub struct HealthSettings {
    pub interval_ms: u32,
    pub timeout_ms: u32,
    pub fall: u32,
    pub rise: u32,
}

/// TLS towards an upstream.
#[napi(object)]
pub struct UpstreamTlsSettings {
    /// DNS names or IP addresses that the servers' certificates must be for, in the order of `servers`.
    pub names: Vec<String>,
    pub verification: VerificationSettings,
    /// Whether the name is sent (SNI). An IP address never is.
    pub send_name: bool,
    /// Name of a certificate to show when a server asks for one.
    pub certificate: Option<String>,
    pub alpn: Vec<String>,
    pub policy: PolicySettings,
    /// Whether TLS sessions are resumed.
    pub resume: bool,
    pub deadline_ms: u32,
}

#[napi(object)]
pub struct UpstreamSnapshot {
    pub name: String,
    pub servers: Vec<ServerSnapshot>,
    /// Certificates of servers that were accepted.
    pub certificates_accepted: i64,
    /// Of each reason; empty without TLS.
    pub findings: Vec<FindingSnapshot>,
}

#[napi(object)]
pub struct ServerSnapshot {
    pub address: String,
    pub up: bool,
    pub connections_open: i64,
    pub connects: Vec<ConnectSnapshot>,
    pub connect_latency: LatencySnapshot,
    /// TLS handshakes with it that finished.
    pub full_handshake_latency: LatencySnapshot,
    pub resumed_handshake_latency: LatencySnapshot,
}

#[napi(object)]
pub struct ConnectSnapshot {
    pub outcome: String,
    pub count: i64,
}

pub(super) fn upstream_plan(
    settings: UpstreamSettings,
    generation: &mut Generation,
    shared: &Shared,
    logs: &Arc<TransparencyPolicy>,
    findings: Arc<Findings>,
) -> Result<(UpstreamPlan, Option<Arc<UpstreamTls>>)> {
    let name = settings.name;
    let fault = |what: String| invalid(format!("upstream {name}: {what}"));
    let tls = match settings.tls {
        None => None,
        Some(tls) if tls.names.len() == settings.servers.len() => {
            let verification = verification(&tls.verification, logs, findings).map_err(fault)?;
            Some(upstream_tls(&name, tls, &verification, generation, shared).map_err(fault)?)
        }
        Some(_) => return Err(fault("tls.names: expected one for each server".into())),
    };
    let servers = settings
        .servers
        .iter()
        .map(|server| match server.strip_prefix("unix:") {
            Some(path) => Ok(ServerAddress::Unix(path.into())),
            None if server == "original" => Ok(ServerAddress::Original),
            None => parse_address(server).map(ServerAddress::Tcp),
        })
        .collect::<Result<Vec<_>>>()?;
    let balance = match settings.balance.as_str() {
        "round-robin" => Balance::RoundRobin,
        "least-connections" => Balance::LeastConnections,
        other => {
            return Err(fault(format!(
                "balance: expected round-robin or least-connections, found {other:?}"
            )));
        }
    };
    let proxy_protocol = match settings.proxy_protocol.as_deref() {
        None => None,
        Some("v1") => Some(ProxyVersion::V1),
        Some("v2") => Some(ProxyVersion::V2),
        Some(other) => return Err(fault(format!("proxyProtocol: expected v1 or v2, found {other:?}"))),
    };
    let plan = UpstreamPlan {
        servers,
        balance,
        connect_deadline: ms(settings.connect_deadline_ms),
        connect_attempts_max: settings.connect_attempts_max as usize,
        proxy_protocol,
        proxy_client_certificate: settings.proxy_client_certificate,
        slow_start: ms(settings.slow_start_ms),
        transparent: settings.transparent,
        health: settings.health.map(|health| HealthPlan {
            interval: ms(health.interval_ms),
            timeout: ms(health.timeout_ms),
            fall: health.fall,
            rise: health.rise,
        }),
        passive: PassivePlan {
            failures_max: settings.passive_failures_max,
            ejection: ms(settings.passive_ejection_ms),
        },
        name,
    };
    Ok((plan, tls))
}

/// The error says what is wrong with the upstream.
fn upstream_tls(
    upstream: &str,
    settings: UpstreamTlsSettings,
    verification: &VerifyPlan,
    generation: &mut Generation,
    shared: &Shared,
) -> std::result::Result<Arc<UpstreamTls>, String> {
    let policy = policy(&settings.policy)?;
    let certificate = match &settings.certificate {
        None => None,
        Some(name) => {
            Some(generation.certificate(name, &policy).map_err(|error| format!("tls.certificate: {error}"))?)
        }
    };
    let mut answers = settings.verification.tlsa.into_iter();
    let server = |name: &String| {
        let name = ServerName::try_from(name.clone())
            .map_err(|_| format!("tls.names: expected a DNS name or an IP address, found {name:?}"))?;
        let tlsa = Arc::new(Standing::default());
        if let Some(answer) = answers.next() {
            tlsa.set(tlsa_answer(answer)?);
        }
        let plan = VerifyPlan { name: name.clone(), tlsa: tlsa.clone(), ..verification.clone() };
        let config = policy.client_config(ClientPlan {
            verifier: ServerVerifier::new(plan, policy.peer_signatures()),
            certificate: certificate.as_deref(),
            alpn: &settings.alpn,
            send_name: settings.send_name,
            resume: settings.resume,
            key_log: shared.key_log.clone(),
        })?;
        Ok::<_, String>(ServerTls::new(name, config, settings.resume, tlsa))
    };
    Ok(Arc::new(UpstreamTls {
        name: upstream.to_owned(),
        servers: settings.names.iter().map(server).collect::<std::result::Result<_, _>>()?,
        findings: verification.findings.clone(),
        deadline: ms(settings.deadline_ms),
    }))
}

pub(super) fn upstream_snapshot(stats: &UpstreamStats, findings: Option<&Findings>) -> UpstreamSnapshot {
    UpstreamSnapshot {
        name: stats.name.clone(),
        servers: stats.servers.iter().map(|server| server_snapshot(server)).collect(),
        certificates_accepted: findings.map_or(0, |findings| signed(findings.accepted())),
        findings: findings.map(finding_snapshots).unwrap_or_default(),
    }
}

fn server_snapshot(stats: &ServerStats) -> ServerSnapshot {
    ServerSnapshot {
        address: stats.address.clone(),
        up: stats.up.get() == 1,
        connections_open: stats.connections_open.get(),
        connects: CONNECT_OUTCOMES
            .iter()
            .zip(&stats.connects)
            .map(|(outcome, count)| ConnectSnapshot {
                outcome: (*outcome).to_owned(),
                count: signed(count.get()),
            })
            .collect(),
        connect_latency: latency(stats.connect_latency.snapshot()),
        full_handshake_latency: latency(stats.handshake(false).snapshot()),
        resumed_handshake_latency: latency(stats.handshake(true).snapshot()),
    }
}
