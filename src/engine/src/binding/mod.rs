//! Owns the border to JavaScript, from which `native.d.ts` is generated. This file has the `Engine`, what JavaScript asks of it
//! while it runs, and how a whole configuration is made ready or nothing of it; each of the others has one thing that crosses:
//! its shapes, the checking of what comes in, the making of what goes out. Must not know what single settings mean. No panic
//! crosses, and nothing calls back: JavaScript asks. JavaScript thread only, as everything in this folder.

// `pub` where functions stand alone: a build of the tests registers nothing with Node, and would call them dead.
mod certificates;
mod client_certificates;
mod listener;
mod log;
pub mod pkcs11;
pub mod policy;
pub mod process;
pub mod sockets;
pub mod stats;
mod tickets;
mod token;
mod upstream;
pub mod verify;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use napi::bindgen_prelude::Buffer;
use napi::{Error, Result, Status};
use napi_derive::napi;

use crate::generation::{Generation, Staples};
use crate::io_thread::{IoPlan, IoThread};
use crate::key_log::KeyLog;
use crate::process::engine_runs;
use crate::sockets::Sockets;
use crate::ticket_keys::TicketRotation;
use crate::tickets::{LIFETIME_MAX, Ticketer};
use crate::verify::Findings;
use certificates::{CertificateSettings, Staple, keep_staples, load_certificates, staple_changes};
use listener::{ListenerSettings, ListenerSnapshot, listener_plan, listener_snapshot};
use log::{AccessSettings, AccessSnapshot, LineLog, access_plan, access_snapshot};
use policy::{CipherSnapshot, GroupSnapshot, cipher_snapshots, group_snapshots};
use stats::{CloseSnapshot, close_snapshots};
use tickets::{TicketKeySettings, TicketSnapshot, load_ticket_key, ticket_snapshot, use_secrets};
use token::{TokenSettings, TokenSnapshot, token_error, token_snapshot, wanted_token};
use upstream::{UpstreamSettings, UpstreamSnapshot, upstream_plan, upstream_snapshot};
use verify::{TlsaAnswer, TransparencySettings, tlsa_answer, transparency_policy};

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
        let ticketer = Ticketer::new(LIFETIME_MAX);
        let shared = Shared {
            ticketer,
            rotation: TicketRotation::default(),
            key_log: key_log.map(|log| Arc::new(KeyLog(log.log.clone()))),
        };
        use_secrets(ticket_secrets, &shared)?;
        let mut kept = Staples::new();
        keep_staples(&mut kept, &staple_changes(staples)?);
        // Before the first lane: exit must not run a module's destructors under it.
        engine_runs(true);
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
        let (current, io) = started.inspect_err(|_| engine_runs(false))?;
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
        engine_runs(!io_ended);
    }

    #[napi(catch_unwind)]
    pub fn snapshot(&self) -> EngineSnapshot {
        let stats = &self.io.stats;
        EngineSnapshot {
            running: stats.running.load(std::sync::atomic::Ordering::SeqCst),
            listeners: stats.listeners.iter().map(|(name, stats)| listener_snapshot(name, stats)).collect(),
            upstreams: stats
                .upstreams
                .iter()
                .map(|stats| upstream_snapshot(stats, self.findings_of(&stats.name)))
                .collect(),
            closes: close_snapshots(&stats.closes),
            tokens: self.current.tokens().map(|token| token_snapshot(token)).collect(),
            ciphers: cipher_snapshots(&stats.negotiated),
            groups: group_snapshots(&stats.negotiated),
            access: access_snapshot(&stats.access),
            tickets: ticket_snapshot(self.shared.rotation.standing()),
            io_cpu_us: signed(stats.cpu.elapsed_us()),
        }
    }

    fn findings_of(&self, upstream: &str) -> Option<&Findings> {
        let tls = self.current.upstream_tls.iter().find(|tls| tls.name == upstream)?;
        Some(&tls.findings)
    }

    fn stop_tokens_of(&self, unused: &Generation) {
        let used: Vec<_> = self.former.iter().chain(&self.prepared).chain([&self.current]).collect();
        unused.stop_unless_in(&used, STOP_BUDGET);
    }
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

fn parse_address(address: &str) -> Result<SocketAddr> {
    address.parse().map_err(|_| invalid(format!("expected an IP address and port, found {address:?}")))
}
