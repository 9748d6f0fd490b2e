//! Owns the border to JavaScript: the shapes of what crosses it (`native.d.ts` is generated from here) and their checking.
//! No panic crosses it, and nothing calls back: JavaScript asks. JavaScript thread only.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use napi::bindgen_prelude::Buffer;
use napi::{Error, Result, Status};
use napi_derive::napi;
use rustls::pki_types::{CertificateDer, ServerName};
use zeroize::{Zeroize, Zeroizing};

use crate::access_log::AccessPlan;
use crate::capabilities;
use crate::certificates::{Certificate, Certificates, LeafDigest, UnknownName};
use crate::client_rate::ClientRatePlan;
use crate::client_status::{ClientStatus, STATUS_OUTCOMES, StatusPlan};
use crate::close::CLOSE_REASONS;
use crate::generation::{self, Generation, LoadFault, Staples, WantedToken};
use crate::handover;
use crate::io_thread::{IoPlan, IoThread};
use crate::key_log::KeyLog;
use crate::listener::{Front, ListenerClients, ListenerPlan, ListenerStats, ListenerTls};
use crate::log::{LineCounts, Log, Target};
use crate::parties::{Network, ProxyIn};
use crate::policy::{ClientPlan, Policy, PolicyWords, group_name, has_fips_module, suite_name};
use crate::process;
use crate::proxy_header::ProxyVersion;
use crate::routing::{RoutePlan, RoutesPlan};
use crate::sandbox;
use crate::signing::ckr::Ckr;
use crate::signing::login::Maker;
use crate::signing::login_lock;
use crate::signing::pkcs11::{Module, Visit};
use crate::signing::refused_pins::{self, Pin as UserPin};
use crate::signing::token::{LOST_AFTER_DEADLINES, Token, TokenPlan};
use crate::signing::token_error::TokenError;
use crate::sockets::Sockets;
use crate::stats::{HistogramSnapshot, LATENCY_BOUNDS_US};
use crate::ticket_keys::{TicketRotation, TicketStanding};
use crate::tickets::{self, EpochSecret, Ticketer};
use crate::transparent;
use crate::upstream::{Balance, CONNECT_OUTCOMES, HealthPlan, PassivePlan, ServerAddress, UpstreamPlan};
use crate::upstream_tls::{ServerTls, UpstreamTls};
use crate::verify::{
    Answer, ClientVerifier, ClientVerifyPlan, Clients, Findings, Log as TransparencyLog, Mode,
    PeerSignatures, Pin, Policy as TransparencyPolicy, RevocationLists, Roots, ServerVerifier, Standing,
    VerifyPlan,
};

/// A token and how to use it. Durations are milliseconds.
#[napi(object)]
pub struct TokenSettings {
    pub name: String,
    pub module: String,
    /// The token's label, without padding.
    pub label: String,
    pub serial: Option<String>,
    /// What it must say of itself beside that, if anything.
    pub manufacturer: Option<String>,
    pub model: Option<String>,
    /// It was out of reach: it is waited for, and nothing of its module is called on the JavaScript thread.
    pub away: bool,
    /// Overwritten with zeros when it has been taken.
    pub pin: Buffer,
    /// Signing threads, each with a PKCS#11 session: 1 to 256.
    pub lanes: u32,
    /// Lanes that are lost in the module included: at least `lanes`.
    pub threads_max: u32,
    /// How much more it is asked than others with the same keys; 0: only when none of those is up.
    pub weight: u32,
    pub queue_max: u32,
    pub queue_age_ms: u32,
    pub sign_deadline_ms: u32,
    pub login_lock_wait_ms: u32,
    /// Load the module with symbols of its own (RTLD_DEEPBIND).
    pub isolate: bool,
    /// Verify each n-th RSA signature before use; 1: all.
    pub verify_rsa_every: u32,
    /// Verify the first EC or Ed25519 signature of each PKCS#11 session and key, then each n-th; 1: all.
    pub verify_ec_every: u32,
}

/// Where a token holds a key. At least one of id and label.
#[napi(object)]
pub struct KeyPlace {
    pub token: String,
    pub id: Option<Buffer>,
    pub label: Option<String>,
}

#[napi(object)]
pub struct CertificateSettings {
    pub name: String,
    /// DNS names in lower case, wildcards as `*.example.org`.
    pub names: Vec<String>,
    /// DER, leaf first.
    pub chain: Vec<Buffer>,
    /// The leaf's SubjectPublicKeyInfo, DER (RFC 5280 4.1).
    pub public_key: Buffer,
    pub keys: Vec<KeyPlace>,
}

#[napi(object)]
pub struct HealthSettings {
    pub interval_ms: u32,
    pub timeout_ms: u32,
    pub fall: u32,
    pub rise: u32,
}

/// A TLSA record (RFC 6698 2.1).
#[napi(object)]
pub struct TlsaRecord {
    pub usage: u32,
    pub selector: u32,
    pub matching_type: u32,
    pub data: Buffer,
}

/// What is known about the TLSA records of a server.
#[napi(object)]
pub struct TlsaAnswer {
    /// Validated by DNSSEC (then also that there is no record), not signed, or not to be had.
    #[napi(ts_type = "'secure' | 'insecure' | 'unavailable'")]
    pub state: String,
    /// Empty unless `secure`.
    pub records: Vec<TlsaRecord>,
    /// How long a secure answer holds.
    pub valid_ms: u32,
}

/// A log of Certificate Transparency whose SCTs count.
#[napi(object)]
pub struct TransparencyLogSettings {
    /// SHA-256 of the key.
    pub id: Buffer,
    /// SubjectPublicKeyInfo, DER.
    pub key: Buffer,
    pub operator: String,
    /// Unix time in seconds; SCTs that it has signed from then on do not count.
    pub retired_at: Option<u32>,
    /// It takes certificates that end from here on and before there, in Unix time in seconds.
    pub ends_from: Option<u32>,
    pub ends_before: Option<u32>,
}

#[napi(object)]
pub struct TransparencySettings {
    pub logs: Vec<TransparencyLogSettings>,
    /// SCTs that a certificate needs, each of another log.
    pub scts: u32,
    pub operators: u32,
}

/// How the certificates of an upstream's servers are verified.
#[napi(object)]
pub struct VerificationSettings {
    /// Trusted certificates, DER.
    pub roots: Vec<Buffer>,
    /// Lists of revoked certificates, DER.
    pub crls: Vec<Buffer>,
    /// SHA-256 of SubjectPublicKeyInfos; empty: any key.
    pub pins: Vec<Buffer>,
    /// PKIX and pins.
    #[napi(ts_type = "'report' | 'enforce'")]
    pub pkix: String,
    #[napi(ts_type = "'off' | 'report' | 'enforce'")]
    pub dane: String,
    /// In the order of `servers`; empty when `dane` is off.
    pub tlsa: Vec<TlsaAnswer>,
    #[napi(ts_type = "'off' | 'report' | 'enforce'")]
    pub transparency: String,
}

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

/// Asking OCSP responders about clients' certificates.
#[napi(object)]
pub struct ClientStatusSettings {
    /// Nobody is let in whose certificate is not said to be good.
    pub hard: bool,
    /// `http://host:port/path`, instead of what certificates say.
    pub responder: Option<String>,
    pub deadline_ms: u32,
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

/// Which connections get a line in the access log.
#[napi(object)]
pub struct AccessSettings {
    /// One in so many; 1: all.
    pub sample: u32,
    /// Lines a second.
    pub rate: u32,
    /// Connections that did not end as they should are not sampled.
    pub failures_always: bool,
}

/// The secret key from which tokens derive the secrets of session tickets.
#[napi(object)]
pub struct TicketKeySettings {
    /// At least one; all must hold the same key.
    pub places: Vec<KeyPlace>,
    /// How long an epoch lasts.
    pub rotation_ms: u32,
    /// The epoch that issues tickets.
    pub epoch: i64,
}

#[napi(object)]
pub struct EngineSettings {
    pub tokens: Vec<TokenSettings>,
    pub certificates: Vec<CertificateSettings>,
    pub upstreams: Vec<UpstreamSettings>,
    pub listeners: Vec<ListenerSettings>,
    /// Undefined: `set_ticket_secrets` says which secrets are used.
    pub ticket_key: Option<TicketKeySettings>,
    /// Undefined: no access log.
    pub access: Option<AccessSettings>,
    /// Undefined: no upstream asks for it.
    pub transparency: Option<TransparencySettings>,
}

/// What clients that ask for the status of a certificate get (RFC 6066 8).
#[napi(object)]
pub struct Staple {
    /// SHA-256 of the first certificate of the chain, DER.
    pub leaf: Buffer,
    /// An OCSP response, DER, as the responder sent it; undefined: none.
    pub response: Option<Buffer>,
}

/// Not cumulative; bucket i counts what is above bound i-1 and at most bound i, the last one what is above all bounds.
#[napi(object)]
pub struct LatencySnapshot {
    pub buckets: Vec<i64>,
    pub sum_us: i64,
}

#[napi(object)]
pub struct HandshakeSnapshot {
    #[napi(ts_type = "'TLSv1.2' | 'TLSv1.3'")]
    pub protocol: String,
    pub resumed: bool,
    pub latency: LatencySnapshot,
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

/// What OCSP responders said of clients' certificates.
#[napi(object)]
pub struct ClientStatusSnapshot {
    pub outcome: String,
    pub count: i64,
}

#[napi(object)]
pub struct ConnectSnapshot {
    pub outcome: String,
    pub count: i64,
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

/// How often something was found about a certificate of a server, and what came of it.
#[napi(object)]
pub struct FindingSnapshot {
    /// The third word of a close reason.
    pub reason: String,
    /// The certificate was refused, or this was only counted.
    pub refused: i64,
    pub reported: i64,
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
pub struct CloseSnapshot {
    pub side: String,
    pub phase: String,
    pub reason: String,
    pub count: i64,
}

#[napi(object)]
pub struct CloseReason {
    pub side: String,
    pub phase: String,
    pub reason: String,
    pub meaning: String,
    /// Connections end like this on a day on which nothing is wrong.
    pub ordinary: bool,
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

/// Lines of one log, by what became of them.
#[napi(object)]
pub struct LineSnapshot {
    pub written: i64,
    /// The reader stalled, or the disk was full.
    pub dropped: i64,
}

#[napi(object)]
pub struct LogSnapshot {
    /// Given as text.
    pub lines: LineSnapshot,
    /// Of connections.
    pub records: LineSnapshot,
}

#[napi(object)]
pub struct TicketSnapshot {
    /// A token is to derive the secrets.
    pub wanted: bool,
    /// The epoch whose secrets a token has derived and that issues tickets; undefined: none has.
    pub epoch: Option<i64>,
    /// A token is at it.
    pub deriving: bool,
    /// Why the last try came to nothing; the secrets that were there are used on.
    pub failure: Option<String>,
}

#[napi(object)]
pub struct AccessSnapshot {
    pub sampled_out: i64,
    pub rate_limited: i64,
}

#[napi(object)]
pub struct MechanismSnapshot {
    #[napi(ts_type = "'ecdsa' | 'rsa_pkcs' | 'rsa_pkcs_pss' | 'eddsa'")]
    pub mechanism: String,
    pub ok: i64,
    pub failed: i64,
    /// Signatures that did not verify; none of them was sent.
    pub wrong: i64,
    pub latency: LatencySnapshot,
}

#[napi(object)]
pub struct TokenSnapshot {
    pub name: String,
    pub up: bool,
    /// Why it is not up.
    pub down_reason: Option<String>,
    pub mechanisms: Vec<MechanismSnapshot>,
    pub sign_wait: LatencySnapshot,
    pub queue_depth_ec: i64,
    pub queue_depth_rsa: i64,
    pub lanes_idle: i64,
    pub lanes_busy: i64,
    pub lanes_lost: i64,
    pub lanes_written_off: i64,
    pub sessions_open: i64,
    pub reopened: i64,
    pub logged_in: i64,
    pub refound: i64,
    pub reinitialized: i64,
    pub failed_over: i64,
    pub shed_queue_full: i64,
    pub shed_queue_aged: i64,
    pub shed_token_down: i64,
    pub cancelled: i64,
    pub went_down: i64,
    pub login_lock_timeouts: i64,
}

#[napi(object)]
pub struct EngineSnapshot {
    /// False when the I/O thread has ended without being told to: the worker must be replaced.
    pub running: bool,
    pub listeners: Vec<ListenerSnapshot>,
    pub upstreams: Vec<UpstreamSnapshot>,
    pub closes: Vec<CloseSnapshot>,
    pub tokens: Vec<TokenSnapshot>,
    /// Finished handshakes by cipher suite.
    pub ciphers: Vec<CipherSnapshot>,
    /// Finished handshakes by key exchange group; a resumed TLS 1.2 session has none.
    pub groups: Vec<GroupSnapshot>,
    pub access: AccessSnapshot,
    pub tickets: TicketSnapshot,
    /// CPU time of the I/O thread.
    pub io_cpu_us: i64,
}

/// Descriptors.
#[napi(object)]
pub struct InheritedSockets {
    /// Of all workers: each may have to accept from a sibling's.
    pub sockets: Vec<i32>,
    /// Through which others come.
    pub handover: Option<i32>,
}

/// The data path of one worker.
#[napi]
pub struct Engine {
    io: IoThread,
    current: Generation,
    /// Replaced by reloads; handshakes may still use them.
    former: Vec<Generation>,
    prepared: Option<Generation>,
    shared: Shared,
    staples: Staples,
}

/// What every configuration of the worker has in common.
struct Shared {
    ticketer: Ticketer,
    rotation: TicketRotation,
    key_log: Option<Arc<KeyLog>>,
}

#[napi]
impl Engine {
    /// Logs in to the tokens, finds the keys, starts to accept. Takes as long as the tokens' logins do. Every PIN is tried once.
    /// `ticket_secrets`: as for `set_ticket_secrets`. `access_log` gets the lines of connections; `key_log`, where there
    /// is one, the secrets of every connection. `staples`: as for `set_staples`. `inherited` is the engine's from now on.
    ///
    /// Throws an error whose message names the token, key or listener; a token's fault begins with `token_fault <code>: `.
    #[napi(constructor, catch_unwind)]
    pub fn new(
        settings: EngineSettings,
        ticket_secrets: Vec<Buffer>,
        access_log: &LineLog,
        key_log: Option<&LineLog>,
        staples: Vec<Staple>,
        inherited: InheritedSockets,
    ) -> Result<Self> {
        let InheritedSockets { sockets, handover } = inherited;
        // SAFETY: the worker inherited them for this and leaves them to the engine.
        let sockets = unsafe { Sockets::inherited(&sockets, handover) }
            .map_err(|error| invalid(format!("inherited sockets: {error}")))?;
        let ticketer = Ticketer::new(tickets::LIFETIME_MAX);
        let shared = Shared {
            ticketer,
            rotation: TicketRotation::default(),
            key_log: key_log.map(|log| Arc::new(KeyLog(log.log.clone()))),
        };
        use_secrets(ticket_secrets, &shared)?;
        let mut kept = Staples::new();
        keep_staples(&mut kept, &staple_changes(staples)?);
        // Before the first lane: exit must not run a module's destructors under it.
        process::engine_runs(true);
        let nothing = Generation::default();
        let started = build(settings, &nothing, &shared, &kept).and_then(|(mut current, plan)| {
            // Before the first client.
            if let Some(key) = current.ticket_key.take() {
                shared.rotation.begin(Some(key), &shared.ticketer);
            }
            match IoThread::start(plan, access_log.log.clone(), sockets) {
                Ok(io) => {
                    current.begin();
                    Ok((current, io))
                }
                Err(error) => {
                    current.stop_unless_in(&[], STOP_BUDGET);
                    Err(invalid(error.to_string()))
                }
            }
        });
        let (current, io) = started.inspect_err(|_| process::engine_runs(false))?;
        Ok(Self { io, current, former: Vec::new(), prepared: None, shared, staples: kept })
    }

    /// Takes the sockets that the primary has handed over for this reload, in their order; those of others are closed.
    #[napi(catch_unwind)]
    pub fn take_over(&self, reload: u32) -> Result<Vec<i32>> {
        self.io.take_over(reload).map_err(|error| invalid(format!("sockets of the primary: {error}")))
    }

    /// Makes another configuration ready beside the one that serves, which notices nothing of it. Logs in to new tokens
    /// and finds the keys of new certificates. In place of what was prepared before.
    ///
    /// Throws as the constructor does; then nothing is prepared.
    #[napi(catch_unwind)]
    pub fn prepare(&mut self, settings: EngineSettings) -> Result<()> {
        self.discard();
        let (next, plan) = build(settings, &self.current, &self.shared, &self.staples)?;
        if let Err(error) = self.io.prepare(plan) {
            self.stop_tokens_of(&next);
            return Err(invalid(error.to_string()));
        }
        self.prepared = Some(next);
        Ok(())
    }

    /// What was prepared serves from now on; connections that are there go on with what they began with. Sockets that it has
    /// no more are to be retired.
    ///
    /// Throws when nothing is prepared.
    #[napi(catch_unwind)]
    pub fn commit(&mut self) -> Result<()> {
        let mut next =
            self.prepared.take().ok_or_else(|| invalid("expected a prepared configuration, found none"))?;
        let key = next.ticket_key.take();
        next.begin();
        if key.is_some() || self.shared.rotation.standing().wanted {
            self.shared.rotation.begin(key, &self.shared.ticketer);
        }
        self.io.commit().map_err(|error| invalid(error.to_string()))?;
        self.former.push(std::mem::replace(&mut self.current, next));
        self.let_go();
        Ok(())
    }

    /// Forgets what was prepared, if anything was.
    #[napi(catch_unwind)]
    pub fn discard(&mut self) {
        self.io.discard();
        if let Some(next) = self.prepared.take() {
            self.stop_tokens_of(&next);
        }
    }

    /// Frees what no handshake uses any more of former configurations. To be called now and then.
    #[napi(catch_unwind)]
    pub fn let_go(&mut self) {
        let (used, unused) = std::mem::take(&mut self.former).into_iter().partition(Generation::is_in_use);
        self.former = used;
        let unused: Vec<Generation> = unused;
        for generation in &unused {
            self.stop_tokens_of(generation);
        }
    }

    /// Writes off signing threads that are lost in their modules and starts others. To be called now and then. Returns why this
    /// process should be replaced, if it should: calls into a module that the certificate needs do not return.
    #[napi(catch_unwind)]
    pub fn look(&self) -> Option<String> {
        let certificate = self.current.look()?;
        Some(format!("no token signs for certificate {certificate}, and calls into a module do not return"))
    }

    /// Accepts also from a socket of a sibling that is gone. An unknown listener is ignored.
    #[napi(catch_unwind)]
    pub fn accept(&self, listener: String, socket: i32) {
        self.io.accept(listener, socket);
    }

    /// Leaves a socket to the sibling that is back.
    #[napi(catch_unwind)]
    pub fn stop_accepting(&self, socket: i32) {
        self.io.stop_accepting(socket);
    }

    /// Has a token derive the secrets of this epoch, in the background; `snapshot` tells what came of it. Nothing happens while
    /// a token is still at it, or when no token derives secrets.
    #[napi(catch_unwind)]
    pub fn rotate_tickets(&self, epoch: i64) {
        self.shared.rotation.rotate(epoch.unsigned_abs(), &self.shared.ticketer);
    }

    /// `secrets`: 32 bytes for each epoch, the current one first. They are overwritten with zeros. Without effect when a token
    /// has derived them.
    #[napi(catch_unwind)]
    pub fn set_ticket_secrets(&self, secrets: Vec<Buffer>) -> Result<()> {
        use_secrets(secrets, &self.shared)
    }

    /// New handshakes see them at once, and certificates of later configurations have them from the start. No handshake waits.
    #[napi(catch_unwind)]
    pub fn set_staples(&mut self, staples: Vec<Staple>) -> Result<()> {
        let changes = staple_changes(staples)?;
        keep_staples(&mut self.staples, &changes);
        for generation in self.former.iter().chain(&self.prepared).chain([&self.current]) {
            generation.staple(&changes);
        }
        Ok(())
    }

    /// What DNS says now about a server of an upstream, by its place in `servers`; also for handshakes that are under way. One
    /// that is not there, or not any more, is ignored.
    #[napi(catch_unwind)]
    pub fn set_tlsa(&self, upstream: String, server: u32, answer: TlsaAnswer) -> Result<()> {
        let answer = tlsa_answer(answer).map_err(invalid)?;
        let it = self.current.upstream_tls.iter().find(|tls| tls.name == upstream);
        if let Some(server) = it.and_then(|tls| tls.servers.get(server as usize)) {
            server.tlsa.set(answer);
        }
        Ok(())
    }

    /// Accepts no more connections, and closes every socket; established connections go on.
    #[napi(catch_unwind)]
    pub fn drain(&self) {
        self.io.drain();
    }

    /// Sockets that nobody will accept from any more, or ever has: what waits in their queues is accepted, then they are closed.
    #[napi(catch_unwind)]
    pub fn retire(&self, sockets: Vec<i32>) -> Result<()> {
        self.io.retire(sockets).map_err(|error| invalid(error.to_string()))
    }

    /// Ends every connection, the lanes and the PKCS#11 modules. Returns within about `budget_ms` (per token) even if a
    /// token hangs; the process must then end.
    #[napi(catch_unwind)]
    pub fn stop(&mut self, budget_ms: u32) {
        let io_ended = self.io.stop(ms(budget_ms));
        for generation in self.former.iter().chain(&self.prepared).chain([&self.current]) {
            generation.stop_unless_in(&[], ms(budget_ms));
        }
        process::engine_runs(!io_ended);
    }

    #[napi(catch_unwind)]
    pub fn snapshot(&self) -> EngineSnapshot {
        let stats = &self.io.stats;
        EngineSnapshot {
            running: stats.running.load(std::sync::atomic::Ordering::SeqCst),
            listeners: stats
                .listeners
                .iter()
                .map(|(name, stats)| ListenerSnapshot {
                    name: name.clone(),
                    accepted: signed(stats.accepted.get()),
                    accept_failures: signed(stats.accept_failures.get()),
                    connections_open: stats.connections_open.get(),
                    handshakes_in_flight: stats.handshakes_in_flight.get(),
                    to_upstream_bytes: signed(stats.relay_bytes.to_upstream.get()),
                    to_client_bytes: signed(stats.relay_bytes.to_client.get()),
                    handshakes: handshake_snapshots(stats),
                    client_statuses: STATUS_OUTCOMES
                        .iter()
                        .zip(&stats.client_statuses)
                        .map(|(outcome, count)| ClientStatusSnapshot {
                            outcome: (*outcome).to_owned(),
                            count: signed(count.get()),
                        })
                        .collect(),
                })
                .collect(),
            upstreams: stats
                .upstreams
                .iter()
                .map(|upstream| UpstreamSnapshot {
                    certificates_accepted: self
                        .findings_of(&upstream.name)
                        .map_or(0, |findings| signed(findings.accepted())),
                    findings: self.findings_of(&upstream.name).map(finding_snapshots).unwrap_or_default(),
                    name: upstream.name.clone(),
                    servers: upstream
                        .servers
                        .iter()
                        .map(|server| ServerSnapshot {
                            address: server.address.clone(),
                            up: server.up.get() == 1,
                            connections_open: server.connections_open.get(),
                            connects: CONNECT_OUTCOMES
                                .iter()
                                .zip(&server.connects)
                                .map(|(outcome, count)| ConnectSnapshot {
                                    outcome: (*outcome).to_owned(),
                                    count: signed(count.get()),
                                })
                                .collect(),
                            connect_latency: latency(server.connect_latency.snapshot()),
                            full_handshake_latency: latency(server.handshake(false).snapshot()),
                            resumed_handshake_latency: latency(server.handshake(true).snapshot()),
                        })
                        .collect(),
                })
                .collect(),
            closes: stats
                .closes
                .counts()
                .map(|(words, count)| CloseSnapshot {
                    side: words.side.into(),
                    phase: words.phase.into(),
                    reason: words.reason.into(),
                    count: signed(count),
                })
                .collect(),
            tokens: self.current.tokens().map(|token| token_snapshot(token)).collect(),
            ciphers: stats
                .negotiated
                .cipher_suites()
                .map(|(suite, count)| CipherSnapshot {
                    protocol: if suite.tls13().is_some() { "TLSv1.3" } else { "TLSv1.2" }.into(),
                    cipher: suite_name(suite),
                    count: signed(count),
                })
                .collect(),
            groups: stats
                .negotiated
                .groups()
                .map(|(group, count)| GroupSnapshot { group: group_name(group), count: signed(count) })
                .collect(),
            access: AccessSnapshot {
                sampled_out: signed(stats.access.sampled_out.get()),
                rate_limited: signed(stats.access.rate_limited.get()),
            },
            tickets: self.ticket_snapshot(),
            io_cpu_us: signed(stats.cpu.elapsed_us()),
        }
    }

    fn findings_of(&self, upstream: &str) -> Option<&Findings> {
        let tls = self.current.upstream_tls.iter().find(|tls| tls.name == upstream)?;
        Some(&tls.findings)
    }

    fn ticket_snapshot(&self) -> TicketSnapshot {
        let TicketStanding { wanted, epoch, deriving, failure } = self.shared.rotation.standing();
        TicketSnapshot { wanted, epoch: epoch.map(signed), deriving, failure }
    }

    fn stop_tokens_of(&self, unused: &Generation) {
        let used: Vec<_> = self.former.iter().chain(&self.prepared).chain([&self.current]).collect();
        unused.stop_unless_in(&used, STOP_BUDGET);
    }
}

fn keep_staples(kept: &mut Staples, changes: &HashMap<LeafDigest, Option<Vec<u8>>>) {
    for (leaf, response) in changes {
        match response {
            Some(response) => kept.insert(*leaf, response.clone()),
            None => kept.remove(leaf),
        };
    }
}

fn staple_changes(staples: Vec<Staple>) -> Result<HashMap<LeafDigest, Option<Vec<u8>>>> {
    staples
        .into_iter()
        .map(|Staple { leaf, response }| {
            let leaf = LeafDigest::try_from(leaf.as_ref()).map_err(|_| {
                invalid(format!("staple: expected a digest of 32 bytes, found {}", leaf.len()))
            })?;
            Ok((leaf, response.map(|response| response.to_vec())))
        })
        .collect()
}

/// How long a token may take to stop after a failed start, or when a reload has removed it. A lane that takes longer is
/// left behind: it stays inside its module.
const STOP_BUDGET: Duration = Duration::from_millis(200);

/// All of it or nothing: no token stays started when something is wrong.
fn build(
    settings: EngineSettings,
    former: &Generation,
    shared: &Shared,
    staples: &Staples,
) -> Result<(Generation, IoPlan)> {
    let EngineSettings { tokens, certificates, upstreams, listeners, ticket_key, access, transparency } =
        settings;
    // All PINs are taken before the first login can fail, so that none stays behind in JavaScript's memory.
    let tokens = tokens.into_iter().map(wanted_token).collect();
    let mut next =
        Generation::with_tokens(former, tokens, STOP_BUDGET).map_err(|error| token_error(&error))?;
    let loaded = load_certificates(&mut next, certificates, staples)
        .and_then(|()| load_ticket_key(&mut next, ticket_key));
    let planned = loaded.and_then(|()| {
        let logs =
            Arc::new(transparency.map(transparency_policy).transpose().map_err(invalid)?.unwrap_or_default());
        let plan = IoPlan {
            listeners: listeners
                .into_iter()
                .map(|settings| listener_plan(settings, &mut next, shared))
                .collect::<Result<_>>()?,
            upstreams: upstreams
                .into_iter()
                .map(|settings| {
                    let former = former.upstream_tls.iter().find(|tls| tls.name == settings.name);
                    let findings = former.map(|tls| tls.findings.clone()).unwrap_or_default();
                    upstream_plan(settings, &mut next, shared, &logs, findings)
                })
                .collect::<Result<_>>()?,
            access: access.map(access_plan).unwrap_or_default(),
        };
        let configs = plan.listeners.iter().filter_map(|(_, tls)| tls.as_ref());
        next.tls_configs = configs.map(|tls| tls.config.clone()).collect();
        next.upstream_tls = plan.upstreams.iter().filter_map(|(_, tls)| tls.clone()).collect();
        Ok(plan)
    });
    match planned {
        Ok(plan) => Ok((next, plan)),
        Err(error) => {
            next.stop_unless_in(&[former], STOP_BUDGET);
            Err(error)
        }
    }
}

/// Upper bounds of every latency histogram, in microseconds.
#[napi(catch_unwind)]
pub fn latency_bounds_us() -> Vec<i64> {
    LATENCY_BOUNDS_US.iter().map(|bound| signed(*bound)).collect()
}

/// Whether the engine is built with the FIPS module of AWS-LC, and that passed its self-test.
#[napi(catch_unwind)]
pub fn is_fips() -> bool {
    has_fips_module()
}

/// The closed list of reasons why a connection can end.
#[napi(catch_unwind)]
pub fn close_reasons() -> Vec<CloseReason> {
    CLOSE_REASONS
        .iter()
        .map(|words| CloseReason {
            side: words.side.into(),
            phase: words.phase.into(),
            reason: words.reason.into(),
            meaning: words.meaning.into(),
            ordinary: words.close.is_ordinary(),
        })
        .collect()
}

#[napi(object)]
pub struct OpenedListener {
    /// The caller's to close.
    pub fd: i32,
    /// With the port that was chosen for port 0.
    pub address: String,
}

/// Opens a listening socket at an address and port; `transparent`: also for connections that TPROXY gives it.
/// Throws with the code of bind(2) first in the message: EADDRINUSE, EACCES, …
#[napi(catch_unwind)]
pub fn open_listener(address: String, backlog: u32, transparent: bool) -> Result<OpenedListener> {
    let parsed = parse_address(&address)?;
    let (fd, bound) = process::open_listener(parsed, backlog, transparent)
        .map_err(|error| listen_error(&address, &error))?;
    Ok(OpenedListener { fd, address: bound.to_string() })
}

/// Takes a listening TCP socket that was opened elsewhere, and says where it listens. The caller's to close.
/// Throws with what it is instead.
#[napi(catch_unwind)]
pub fn adopt_listener(fd: i32) -> Result<String> {
    let address = process::adopt_listener(fd).map_err(|error| invalid(error.to_string()))?;
    Ok(address.to_string())
}

/// Sends `state`, lines of `NAME=value`, to the service manager's datagram socket. Throws when it is not taken.
#[napi(catch_unwind)]
pub fn notify(socket: String, state: String) -> Result<()> {
    process::notify(&socket, &state).map_err(|error| invalid(format!("{socket}: {error}")))
}

/// Refuses clients on a listening socket from now on, in every process that holds it. The descriptor stays open.
#[napi(catch_unwind)]
pub fn shut_listener(fd: i32) -> Result<()> {
    process::shut_listener(fd).map_err(|error| invalid(format!("shutdown: {error}")))
}

/// Throws if somebody already listens at the address, or if it cannot be bound.
#[napi(catch_unwind)]
pub fn probe_address(address: String) -> Result<()> {
    let parsed = parse_address(&address)?;
    process::probe_address(parsed).map_err(|error| listen_error(&address, &error))
}

/// Sets the length of a listening socket's accept queue, also of one that has waiting connections.
#[napi(catch_unwind)]
pub fn set_backlog(fd: i32, backlog: u32) -> Result<()> {
    process::set_backlog(fd, backlog).map_err(|error| invalid(format!("listen: {error}")))
}

#[napi(object)]
pub struct HandoverChannel {
    /// The primary's end.
    pub primary: i32,
    /// The end that one worker inherits.
    pub worker: i32,
}

/// Opens a channel through which a running worker is handed sockets. Both ends are the caller's to close.
#[napi(catch_unwind)]
pub fn open_handover() -> Result<HandoverChannel> {
    let (primary, worker) = handover::open().map_err(|error| invalid(format!("socketpair: {error}")))?;
    Ok(HandoverChannel { primary: primary.into_raw_fd(), worker: worker.into_raw_fd() })
}

/// Puts sockets into the channel, for the worker to take when it hears of the reload.
#[napi(catch_unwind)]
pub fn hand_over(channel: i32, reload: u32, fds: Vec<i32>) -> Result<()> {
    handover::send(channel, reload, &fds).map_err(|error| invalid(format!("sendmsg: {error}")))
}

/// Has a worker accept nothing any more, also one whose JavaScript thread hangs. No socket can be handed to it after that.
#[napi(catch_unwind)]
pub fn say_farewell(channel: i32) {
    handover::say_farewell(channel);
}

/// No new privileges, no core dump, no ptrace by the same user: for processes that hold a PIN.
#[napi(catch_unwind)]
pub fn harden() -> Result<()> {
    process::harden().map_err(|error| invalid(format!("prctl: {error}")))
}

/// What a process in the sandbox may still write or do; everything else is decided in sandbox.rs.
#[napi(object)]
pub struct SandboxSettings {
    /// Files that are opened for appending, again and again: others may be created beside and beneath them.
    pub logs: Vec<String>,
    /// Files, and directories with everything in them, that modules are known to keep their state in.
    pub states: Vec<String>,
    /// The same, as the configuration says it; with any, modes and owners may be changed.
    pub writable: Vec<String>,
    /// Whether connections may be given a source address, as those of transparent upstreams are.
    pub binds_tcp: bool,
}

#[napi(object)]
pub struct SandboxReport {
    /// Version of what the kernel has of Landlock; 0: none is in force.
    pub landlock_abi: u32,
    pub seccomp: bool,
    /// What is not in force although it should be, and why, for people.
    pub missing: Vec<String>,
}

/// Gives up, for good and for every thread, what a worker has no business with. To be called before a module is loaded and
/// before the engine starts. What the kernel does not have is missing in the report, and no error.
#[napi(catch_unwind)]
pub fn enter_sandbox(settings: SandboxSettings) -> SandboxReport {
    let paths = |texts: Vec<String>| texts.into_iter().map(PathBuf::from).collect();
    let entered = sandbox::enter(&sandbox::Exceptions {
        logs: paths(settings.logs),
        states: paths(settings.states),
        trees: paths(settings.writable),
        binds_tcp: settings.binds_tcp,
    });
    SandboxReport { landlock_abi: entered.landlock_abi, seccomp: entered.seccomp, missing: entered.missing }
}

/// For the primary, before it forks workers in a sandbox: no ring of io_uring can be made any more, here and in them. Where the
/// kernel cannot be asked for that, the report of `enterSandbox` in the worker says so.
#[napi(catch_unwind)]
pub fn refuse_rings() {
    let _ = sandbox::refuse_rings();
}

/// Has the coming setuid keep what `hand_down_net_raw` needs, on this thread alone.
#[napi(catch_unwind)]
pub fn keep_capabilities_over_setuid() -> Result<()> {
    capabilities::keep_over_setuid().map_err(|error| invalid(format!("prctl: {error}")))
}

/// After setuid: of all capabilities CAP_NET_RAW is left, to this thread and to the processes that it forks.
#[napi(catch_unwind)]
pub fn hand_down_net_raw() -> Result<()> {
    capabilities::hand_down_net_raw().map_err(|error| invalid(format!("capset: {error}")))
}

/// What this process was handed down, the programs that it starts are not.
#[napi(catch_unwind)]
pub fn end_handing_down() -> Result<()> {
    capabilities::end_handing_down().map_err(|error| invalid(format!("prctl: {error}")))
}

/// Throws EPERM unless this process may use addresses of others (IP_TRANSPARENT).
#[napi(catch_unwind)]
pub fn probe_foreign_address() -> Result<()> {
    transparent::probe_foreign_address().map_err(|error| invalid(error.to_string()))
}

/// Gives memory that is free inside this process back to the system.
#[napi(catch_unwind)]
pub fn trim_memory() {
    process::trim_memory();
}

/// Ends this process, by SIGKILL, when the process that forked it has ended.
#[napi(catch_unwind)]
pub fn end_with_parent() -> Result<()> {
    process::end_with_parent().map_err(|error| invalid(format!("prctl: {error}")))
}

/// As `endWithParent`, but by SIGALRM and `forSeconds` later, whatever becomes of JavaScript meanwhile; an engine retires all its
/// sockets at once. Each call holds in place of the one before.
#[napi(catch_unwind)]
pub fn outlive_parent(for_seconds: u32) -> Result<()> {
    process::outlive_parent(for_seconds).map_err(|error| invalid(format!("sigaction or prctl: {error}")))
}

/// Somebody else in this process who uses a PKCS#11 module: as long as it lasts, the engine does not initialise it again.
#[napi]
pub struct ModuleVisit {
    visit: Option<Visit>,
}

#[napi]
impl ModuleVisit {
    /// Loads the module before anybody else does, with symbols of its own if `isolate`; it stays loaded. Blocks while the
    /// engine initialises it again. Throws when it cannot be loaded, or that takes too long.
    #[napi(factory, catch_unwind)]
    pub fn begin(path: String, isolate: bool) -> Result<Self> {
        let failed = |why: String| Error::new(Status::GenericFailure, format!("{path}: {why}"));
        let module =
            Module::load(&PathBuf::from(&path), isolate).map_err(|error| failed(error.to_string()))?;
        match module.visit() {
            Some(visit) => Ok(Self { visit: Some(visit) }),
            None => Err(failed("it is being initialised again, and that does not end".into())),
        }
    }

    #[napi(catch_unwind)]
    pub fn end(&mut self) {
        self.visit = None;
    }
}

/// A log: lines go into a bounded queue, and a thread of its own writes them. Nobody who says something waits.
#[napi]
pub struct LineLog {
    log: Log,
}

#[napi]
impl LineLog {
    /// `path`: a file that is appended to, and made when it is not there, readable for its group too unless `secret`; undefined:
    /// standard output.
    ///
    /// Throws when the file cannot be opened.
    #[napi(factory, catch_unwind)]
    pub fn open(path: Option<String>, secret: bool) -> Result<Self> {
        let target = match &path {
            None => Target::StandardOutput,
            Some(path) => Target::File { path: path.into(), mode: if secret { 0o600 } else { 0o640 } },
        };
        let log = Log::open(target).map_err(|error| log_error(path.as_deref(), &error))?;
        Ok(Self { log })
    }

    /// One line, without its end. Dropped when the queue is full.
    #[napi(catch_unwind)]
    pub fn line(&self, text: String) {
        self.log.line(text.as_bytes());
    }

    /// Opens the file by its name again, after a rotation. Throws when it cannot be; the old one stays in use.
    #[napi(catch_unwind)]
    pub fn reopen(&self) -> Result<()> {
        self.log.reopen().map_err(|error| log_error(None, &error))
    }

    /// Waits at most `budget_ms` until everything said before has been written. False when it has not.
    #[napi(catch_unwind)]
    pub fn flush(&self, budget_ms: u32) -> bool {
        self.log.flush(ms(budget_ms))
    }

    #[napi(catch_unwind)]
    pub fn snapshot(&self) -> LogSnapshot {
        let of = |counts: &LineCounts| LineSnapshot {
            written: signed(counts.written.get()),
            dropped: signed(counts.dropped.get()),
        };
        let stats = self.log.stats();
        LogSnapshot { lines: of(&stats.lines), records: of(&stats.records) }
    }
}

fn log_error(path: Option<&str>, error: &std::io::Error) -> Error {
    let what = path.map(|path| format!("{path}: ")).unwrap_or_default();
    Error::new(Status::GenericFailure, format!("{what}{error}"))
}

/// Why this is not a list of revoked certificates (DER) that the engine understands; undefined: it is one.
#[napi(catch_unwind)]
pub fn revocation_list_fault(der: Buffer) -> Option<String> {
    RevocationLists::new([&der[..]]).err()
}

/// Keeps other processes of this host from logging in to tokens of the same module at the same moment.
#[napi]
pub struct LoginLock {
    lock: Option<login_lock::LoginLock>,
}

#[napi]
impl LoginLock {
    /// Waits at most `wait_ms`, blocking. Throws when the module cannot be opened or the time is over.
    #[napi(factory, catch_unwind)]
    pub fn acquire(module: String, wait_ms: u32) -> Result<Self> {
        let lock = login_lock::LoginLock::acquire(&PathBuf::from(&module), ms(wait_ms)).map_err(|error| {
            Error::new(Status::GenericFailure, format!("login lock on {module}: {error}"))
        })?;
        Ok(Self { lock: Some(lock) })
    }

    #[napi(catch_unwind)]
    pub fn release(&mut self) {
        self.lock = None;
    }
}

/// A PIN that a token refused, as the workers of one keygate know it.
#[napi(object)]
pub struct PinRefusal {
    /// Made with their secret.
    pub digest: Buffer,
    /// The return code of C_Login.
    pub ckr: i64,
}

/// `secret`: 32 random bytes that all workers of a keygate have, and nobody else: with it they tell each other which PINs were
/// refused. `known`: by those that are no more. Before the first login.
#[napi(catch_unwind)]
pub fn share_refusals(secret: &[u8], known: Vec<PinRefusal>) -> Result<()> {
    let bytes = |bytes: &[u8]| {
        <[u8; 32]>::try_from(bytes).map_err(|_| invalid(format!("expected 32 bytes, found {}", bytes.len())))
    };
    let known =
        known.into_iter().map(|PinRefusal { digest, ckr }| Ok((bytes(&digest)?, Ckr(ckr.unsigned_abs()))));
    refused_pins::share(bytes(secret)?, known.collect::<Result<Vec<_>>>()?);
    Ok(())
}

/// What this process knows, for those that come after it.
#[napi(catch_unwind)]
pub fn pin_refusals() -> Vec<PinRefusal> {
    let refusals = refused_pins::known().into_iter();
    refusals.map(|(digest, ckr)| PinRefusal { digest: digest.to_vec().into(), ckr: signed(ckr.0) }).collect()
}

/// The return code with which this token refused this PIN, in this process or in one beside it: it must not be presented again.
#[napi(catch_unwind)]
pub fn pin_refused_before(module: String, serial: String, pin: &[u8]) -> Option<i64> {
    let pin = UserPin { module: module.as_ref(), serial: &serial, pin };
    pin.refused_before().map(|ckr| signed(ckr.0))
}

/// What C_Login returned to somebody else than lanes, so that they and the processes beside this one know it.
#[napi(catch_unwind)]
pub fn pin_answered(module: String, serial: String, pin: &[u8], ckr: i64) {
    let pin = UserPin { module: module.as_ref(), serial: &serial, pin };
    match Ckr(ckr.unsigned_abs()) {
        Ckr::OK => pin.accepted(),
        ckr if ckr.blames_pin() => pin.refused(ckr),
        _ => {}
    }
}

fn wanted_token(mut settings: TokenSettings) -> WantedToken {
    let pin = Zeroizing::new(settings.pin.to_vec());
    settings.pin.as_mut().zeroize();
    let plan = TokenPlan {
        name: settings.name,
        module: settings.module.into(),
        label: settings.label,
        serial: settings.serial,
        maker: Maker { manufacturer: settings.manufacturer, model: settings.model },
        pin,
        lanes: settings.lanes as usize,
        threads_max: settings.threads_max as usize,
        lost_after: ms(settings.sign_deadline_ms) * LOST_AFTER_DEADLINES,
        weight: settings.weight,
        queue_max: settings.queue_max as usize,
        queue_age_max: ms(settings.queue_age_ms),
        login_lock_wait: ms(settings.login_lock_wait_ms),
        isolate: settings.isolate,
        verify_rsa_every: settings.verify_rsa_every,
        verify_ec_every: settings.verify_ec_every,
    };
    WantedToken { plan, sign_deadline: ms(settings.sign_deadline_ms), is_away: settings.away }
}

/// `token_fault <code>: <message>`: the code says whether another try could cost one of the PIN's few.
fn token_error(error: &TokenError) -> Error {
    Error::new(Status::GenericFailure, format!("token_fault {}: {error}", error.problem.code()))
}

fn load_certificates(
    next: &mut Generation,
    certificates: Vec<CertificateSettings>,
    staples: &Staples,
) -> Result<()> {
    for CertificateSettings { name, names, chain, public_key, keys } in certificates {
        let places = keys.into_iter().map(key_place).collect();
        let chain = chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let make = |key, sign_deadline| Certificate::new(names, chain, key, sign_deadline);
        next.load(name, &public_key, places, staples, make).map_err(load_fault)?;
    }
    next.loaded();
    Ok(())
}

fn load_ticket_key(next: &mut Generation, settings: Option<TicketKeySettings>) -> Result<()> {
    let Some(TicketKeySettings { places, rotation_ms, epoch }) = settings else { return Ok(()) };
    let places = places.into_iter().map(key_place).collect();
    next.load_ticket_key(places, rotation_ms.into(), epoch.unsigned_abs()).map_err(load_fault)
}

fn key_place(KeyPlace { token, id, label }: KeyPlace) -> generation::KeyPlace {
    generation::KeyPlace { token, id: id.map(|id| id.to_vec()), label }
}

fn load_fault(fault: LoadFault) -> Error {
    match fault {
        LoadFault::Token(error) => token_error(&error),
        LoadFault::Settings(what) => invalid(what),
    }
}

fn listener_plan(
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

fn listener_clients(
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

fn clients_of(settings: &ClientsSettings, place: &str) -> std::result::Result<Clients, String> {
    Ok(Clients {
        common_names: settings.common_names.iter().cloned().collect(),
        dns_names: settings.dns_names.iter().cloned().collect(),
        uris: settings.uris.clone(),
        emails: settings.emails.iter().cloned().collect(),
        spki: pins_of(&settings.spki, &format!("{place}.spki"))?,
    })
}

fn policy(settings: &PolicySettings) -> std::result::Result<Policy, String> {
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

fn client_rate_plan(settings: ClientRateSettings) -> ClientRatePlan {
    let bits = |bits: u32| u8::try_from(bits).unwrap_or(u8::MAX);
    ClientRatePlan {
        rate: settings.rate,
        burst: settings.burst,
        ipv4_bits: bits(settings.ipv4_bits),
        ipv6_bits: bits(settings.ipv6_bits),
    }
}

fn access_plan(settings: AccessSettings) -> AccessPlan {
    AccessPlan {
        enabled: true,
        sample: settings.sample,
        rate: settings.rate,
        failures_always: settings.failures_always,
    }
}

fn upstream_plan(
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

fn roots_of(certificates: &[Buffer], place: &str) -> std::result::Result<Roots, String> {
    let roots = Roots::new(certificates.iter().map(|der| CertificateDer::from(der.to_vec())));
    if roots.is_empty() {
        let found = certificates.len();
        return Err(format!("{place}: expected a usable certificate, found none among {found}"));
    }
    Ok(roots)
}

fn lists_of(lists: &[Buffer], place: &str) -> std::result::Result<RevocationLists, String> {
    RevocationLists::new(lists.iter().map(|der| &der[..]))
        .map_err(|error| format!("{place}: expected a list of revoked certificates, found {error}"))
}

fn pins_of<All: FromIterator<Pin>>(pins: &[Buffer], place: &str) -> std::result::Result<All, String> {
    let parse = |pin: &Buffer| {
        Pin::try_from(&pin[..]).map_err(|_| format!("{place}: expected 32 bytes, found {}", pin.len()))
    };
    pins.iter().map(parse).collect()
}

/// What the servers of an upstream have in common: all but name and TLSA records.
fn verification(
    settings: &VerificationSettings,
    logs: &Arc<TransparencyPolicy>,
    findings: Arc<Findings>,
) -> std::result::Result<VerifyPlan, String> {
    Ok(VerifyPlan {
        name: ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()), // each server has its own
        pkix: mode("tls.verify", &settings.pkix)?,
        roots: Arc::new(roots_of(&settings.roots, "tls.roots")?),
        lists: Arc::new(lists_of(&settings.crls, "tls.crls")?),
        pins: pins_of(&settings.pins, "tls.pins")?,
        dane: mode("tls.dane", &settings.dane)?,
        tlsa: Arc::default(),
        transparency: mode("tls.transparency", &settings.transparency)?,
        policy: logs.clone(),
        findings,
    })
}

fn mode(key: &str, word: &str) -> std::result::Result<Mode, String> {
    match word {
        "off" => Ok(Mode::Off),
        "report" => Ok(Mode::Report),
        "enforce" => Ok(Mode::Enforce),
        other => Err(format!("{key}: expected off, report or enforce, found {other:?}")),
    }
}

fn tlsa_answer(answer: TlsaAnswer) -> std::result::Result<Answer, String> {
    match answer.state.as_str() {
        "insecure" => Ok(Answer::Insecure),
        "unavailable" => Ok(Answer::Unavailable),
        "secure" => {
            // A number that does not fit is one that we do not know either.
            let byte = |number: u32| u8::try_from(number).unwrap_or(u8::MAX);
            let records = answer.records.iter().map(|TlsaRecord { usage, selector, matching_type, data }| {
                (byte(*usage), byte(*selector), byte(*matching_type), &data[..])
            });
            Ok(Answer::secure(records, Instant::now() + ms(answer.valid_ms)))
        }
        other => Err(format!("TLSA: expected secure, insecure or unavailable, found {other:?}")),
    }
}

fn transparency_policy(settings: TransparencySettings) -> std::result::Result<TransparencyPolicy, String> {
    let logs = settings.logs.into_iter().map(|log| {
        let id = <[u8; 32]>::try_from(&log.id[..])
            .map_err(|_| format!("transparency: expected a log's id of 32 bytes, found {}", log.id.len()))?;
        let interval = log.ends_from.zip(log.ends_before);
        Ok(TransparencyLog {
            id,
            key: log.key.to_vec(),
            operator: log.operator,
            retired_ms: log.retired_at.map(|at| u64::from(at) * 1000),
            interval_ms: interval.map(|(from, before)| (i64::from(from) * 1000, i64::from(before) * 1000)),
        })
    });
    let logs = logs.collect::<std::result::Result<Vec<_>, String>>()?;
    Ok(TransparencyPolicy::new(logs, settings.scts as usize, settings.operators as usize))
}

fn finding_snapshots(findings: &Findings) -> Vec<FindingSnapshot> {
    findings
        .refused()
        .zip(findings.reported())
        .map(|((reason, refused), (_, reported))| FindingSnapshot {
            reason: reason.word().to_owned(),
            refused: signed(refused),
            reported: signed(reported),
        })
        .collect()
}

fn use_secrets(secrets: Vec<Buffer>, Shared { ticketer, rotation, .. }: &Shared) -> Result<()> {
    // All are taken, and wiped in JavaScript's memory, before the first bad one is reported.
    let secrets: Vec<_> = secrets.into_iter().map(epoch_secret).collect();
    let secrets = secrets.into_iter().collect::<Result<Vec<_>>>()?;
    let Some((current, others)) = secrets.split_first() else {
        return Err(invalid("ticket secrets: expected at least one"));
    };
    rotation.use_unless_derived(ticketer, current, others);
    Ok(())
}

fn epoch_secret(mut buffer: Buffer) -> Result<EpochSecret> {
    let secret = <[u8; 32]>::try_from(buffer.as_ref()).map(Zeroizing::new);
    buffer.as_mut().zeroize();
    secret.map_err(|_| invalid(format!("ticket secret: expected 32 bytes, found {}", buffer.len())))
}

fn parse_address(address: &str) -> Result<SocketAddr> {
    address.parse().map_err(|_| invalid(format!("expected an IP address and port, found {address:?}")))
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

fn token_snapshot(token: &Token) -> TokenSnapshot {
    let stats = token.stats();
    let mechanisms = [
        ("ecdsa", &stats.ecdsa),
        ("rsa_pkcs", &stats.rsa_pkcs),
        ("rsa_pkcs_pss", &stats.rsa_pkcs_pss),
        ("eddsa", &stats.eddsa),
    ];
    TokenSnapshot {
        name: token.name().to_string(),
        up: token.is_up(),
        down_reason: token.down_reason().map(|reason| reason.to_string()),
        mechanisms: mechanisms
            .map(|(mechanism, stats)| MechanismSnapshot {
                mechanism: mechanism.into(),
                ok: signed(stats.ok.get()),
                failed: signed(stats.failed.get()),
                wrong: signed(stats.wrong.get()),
                latency: latency(stats.sign.snapshot()),
            })
            .into(),
        sign_wait: latency(stats.sign_wait.snapshot()),
        queue_depth_ec: stats.queue_depth_ec.get(),
        queue_depth_rsa: stats.queue_depth_rsa.get(),
        lanes_idle: stats.lanes_idle.get(),
        lanes_busy: stats.lanes_busy.get(),
        lanes_lost: stats.lanes_lost.get(),
        lanes_written_off: signed(stats.written_off.get()),
        sessions_open: stats.sessions_open.get(),
        reopened: signed(stats.reopened.get()),
        logged_in: signed(stats.logged_in.get()),
        refound: signed(stats.refound.get()),
        reinitialized: signed(stats.reinitialized.get()),
        failed_over: signed(stats.failed_over.get()),
        shed_queue_full: signed(stats.shed_queue_full.get()),
        shed_queue_aged: signed(stats.shed_queue_aged.get()),
        shed_token_down: signed(stats.shed_token_down.get()),
        cancelled: signed(stats.cancelled.get()),
        went_down: signed(stats.went_down.get()),
        login_lock_timeouts: signed(stats.login_lock_timeouts.get()),
    }
}

fn latency(snapshot: HistogramSnapshot) -> LatencySnapshot {
    LatencySnapshot {
        buckets: snapshot.buckets.into_iter().map(signed).collect(),
        sum_us: signed(snapshot.sum_us),
    }
}

/// JavaScript's numbers are exact up to 2^53: 285 years in microseconds, 8 PiB.
fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn ms(milliseconds: u32) -> Duration {
    Duration::from_millis(u64::from(milliseconds))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Status::InvalidArg, message.into())
}

fn listen_error(address: &str, error: &std::io::Error) -> Error {
    let code = match error.raw_os_error() {
        Some(libc::EADDRINUSE) => "EADDRINUSE",
        Some(libc::EACCES) => "EACCES",
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL",
        Some(libc::EPERM) => "EPERM",
        _ => "ELISTEN",
    };
    Error::new(Status::GenericFailure, format!("{code} {address}: {error}"))
}
