//! Owns the access log: one line for each connection that has ended, with everything that was known about it. Which
//! connections get one, the words of the line, and what a connection remembers for it (`Facts`).
//! Must not know how lines are written (log.rs). I/O thread only, except for `Ended::write`, which is the log's thread.

use std::cell::Cell;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use rustls::SupportedCipherSuite;
use rustls::crypto::SupportedKxGroup;
use serde::Serialize;

use crate::close::{CLOSE_REASONS, Close, CloseReason};
use crate::log::{Log, Record};
use crate::policy::{group_name, suite_name};
use crate::relay::RelayBytes;
use crate::stats::Counter;
use crate::tls::Tls;
use crate::upstream::ServerAddress;
use crate::verify::Identity;

/// What a client sent is cut to so many bytes: a name of the DNS is no longer (RFC 1035 2.3.4), nor is one of ALPN.
const CLIENT_TEXT_BYTES_MAX: usize = 255;

/// Which connections get a line. The default: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessPlan {
    pub enabled: bool,
    /// One in so many. 0 is taken as 1: all.
    pub sample: u32,
    /// Lines a second, in this worker; twice as many at once after a quiet time.
    pub rate: u32,
    /// Those that did not end as connections should are not sampled, only limited.
    pub failures_always: bool,
}

/// The access log of a worker.
pub struct AccessLog {
    plan: AccessPlan,
    log: Log,
    pub counts: Arc<AccessCounts>,
    seen: Cell<u32>,
    allowance: Cell<f64>,
    counted_at: Cell<Instant>,
}

/// Lines that were not to be written. Those that could not be are counted by the log.
#[derive(Debug, Default)]
pub struct AccessCounts {
    pub sampled_out: Counter,
    pub rate_limited: Counter,
}

impl AccessLog {
    pub fn new(plan: AccessPlan, log: Log, counts: Arc<AccessCounts>) -> Self {
        let allowance = Cell::new(f64::from(plan.rate));
        Self { plan, log, counts, seen: Cell::new(0), allowance, counted_at: Cell::new(Instant::now()) }
    }

    /// The same log for another configuration.
    pub fn succeeded_by(&self, plan: AccessPlan) -> Self {
        Self::new(plan, self.log.clone(), self.counts.clone())
    }

    /// A connection has ended. `facts` is asked for only if it gets a line.
    pub fn ended(&self, close: Close, facts: impl FnOnce() -> Ended) {
        if !self.plan.enabled {
            return;
        }
        if !self.is_sampled(close) {
            self.counts.sampled_out.add(1);
        } else if !self.is_allowed(Instant::now()) {
            self.counts.rate_limited.add(1);
        } else {
            self.log.record(Box::new(facts()));
        }
    }

    fn is_sampled(&self, close: Close) -> bool {
        if self.plan.failures_always && !close.is_ordinary() {
            return true;
        }
        let seen = self.seen.get();
        self.seen.set((seen + 1) % self.plan.sample.max(1));
        seen == 0
    }

    fn is_allowed(&self, now: Instant) -> bool {
        let rate = f64::from(self.plan.rate);
        let earned = now.saturating_duration_since(self.counted_at.get()).as_secs_f64() * rate;
        self.counted_at.set(now);
        let allowance = (self.allowance.get() + earned).min(2.0 * rate.max(1.0));
        let allowed = allowance >= 1.0;
        self.allowance.set(if allowed { allowance - 1.0 } else { allowance });
        allowed
    }
}

/// What a connection remembers of itself for its line.
#[derive(Default)]
pub struct Facts {
    /// The peer of the connection, when a PROXY header said that somebody else is the client.
    pub via: Option<SocketAddr>,
    /// What the client connected to, by a PROXY header or by the kernel that redirected it here.
    pub destination: Option<SocketAddr>,
    pub server_name: Option<String>,
    /// What a client whose TLS is passed on would like best.
    pub offered_alpn: Option<Vec<u8>>,
    /// Of a finished handshake.
    pub negotiated: Option<Negotiated>,
    /// By the certificate that the client has shown, and that was verified.
    pub identity: Option<Box<Identity>>,
    /// From accept to Finished.
    pub handshake: Option<Duration>,
    /// The signature of the handshake, if it needed one and got it.
    pub signed: Option<SignedBy>,
    /// Where it was routed to.
    pub upstream: Option<Arc<str>>,
    pub connect: Option<Duration>,
    pub server: Option<ServerAddress>,
    /// Of the handshake with the server, where TLS is spoken to it.
    pub upstream_handshake: Option<Duration>,
    pub relayed: RelayBytes,
}

pub struct SignedBy {
    /// In the queue.
    pub waited: Duration,
    /// On the lane.
    pub signing: Duration,
    pub token: Arc<str>,
}

pub struct Negotiated {
    protocol: &'static str,
    cipher_suite: Option<SupportedCipherSuite>,
    group: Option<&'static dyn SupportedKxGroup>,
    resumed: bool,
    alpn: Option<Box<[u8]>>,
}

impl Negotiated {
    pub fn by(tls: &Tls) -> Self {
        Self {
            protocol: tls.protocol_name(),
            cipher_suite: tls.cipher_suite(),
            group: tls.group(),
            resumed: tls.is_resumed(),
            alpn: tls.alpn().map(Box::from),
        }
    }
}

/// A connection that has ended, on its way to the log.
pub struct Ended {
    pub at: SystemTime,
    pub client: SocketAddr,
    pub listener: String,
    pub facts: Facts,
    /// From accept to close.
    pub total: Duration,
    pub close: Close,
}

/// The line. Fields that a connection did not come to are left out. Times are milliseconds, to the microsecond.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    level: &'static str,
    time: String,
    pid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<u32>,
    event: &'static str,
    client: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<SocketAddr>,
    listener: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alpn: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resumed: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_fingerprint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<String>,
    to_upstream_bytes: u64,
    to_client_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    handshake_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sign_wait_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sign_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connect_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream_handshake_ms: Option<f64>,
    total_ms: f64,
    side: &'static str,
    phase: &'static str,
    reason: &'static str,
    message: &'static str,
}

impl Record for Ended {
    fn write(&self, line: &mut Vec<u8>, for_people: bool) {
        if for_people { self.write_for_people(line) } else { self.write_json(line) }
    }
}

impl Ended {
    fn write_json(&self, line: &mut Vec<u8>) {
        let Facts { server_name, negotiated, signed, .. } = &self.facts;
        let close = &CLOSE_REASONS[self.close as usize];
        let negotiated = negotiated.as_ref();
        let signed = signed.as_ref();
        let identity = self.facts.identity.as_deref();
        let words = Line {
            level: "info",
            time: format!("{:.3}", Timestamp::try_from(self.at).unwrap_or(Timestamp::UNIX_EPOCH)),
            pid: std::process::id(),
            worker: worker(),
            event: "connection",
            client: self.client,
            via: self.facts.via,
            destination: self.facts.destination,
            listener: &self.listener,
            server_name: server_name.as_deref().map(shortened),
            protocol: negotiated.map(|it| it.protocol),
            cipher: negotiated.and_then(|it| it.cipher_suite.as_ref()).map(suite_name),
            group: negotiated.and_then(|it| it.group).map(group_name),
            alpn: negotiated
                .and_then(|it| it.alpn.as_deref())
                .map(|alpn| String::from_utf8_lossy(alpn).into_owned()),
            resumed: negotiated.map(|it| it.resumed),
            client_name: identity.and_then(|it| it.name()).map(shortened),
            client_fingerprint: identity.map(|it| hexadecimal(&it.fingerprint)),
            upstream: self.facts.upstream.as_deref(),
            server: self.facts.server.as_ref().map(ToString::to_string),
            to_upstream_bytes: self.facts.relayed.to_upstream.get(),
            to_client_bytes: self.facts.relayed.to_client.get(),
            handshake_ms: self.facts.handshake.map(ms),
            token: signed.map(|it| &*it.token),
            sign_wait_ms: signed.map(|it| ms(it.waited)),
            sign_ms: signed.map(|it| ms(it.signing)),
            connect_ms: self.facts.connect.map(ms),
            upstream_handshake_ms: self.facts.upstream_handshake.map(ms),
            total_ms: ms(self.total),
            side: close.side,
            phase: close.phase,
            reason: close.reason,
            message: "connection ended",
        };
        // Writing into memory, of strings and numbers: nothing can fail.
        let _ = serde_json::to_writer(line, &words);
    }

    /// Without what somebody at a terminal can look up elsewhere.
    fn write_for_people(&self, line: &mut Vec<u8>) {
        let CloseReason { side, phase, reason, .. } = &CLOSE_REASONS[self.close as usize];
        let Facts { server_name, relayed, .. } = &self.facts;
        let name =
            server_name.as_deref().map_or("-".into(), |name| shortened(name).escape_debug().to_string());
        let (up, down, total_ms) = (relayed.to_upstream.get(), relayed.to_client.get(), ms(self.total));
        let (client, listener) = (self.client, &self.listener);
        // As above.
        let _ = write!(
            line,
            "connection {client} -> {listener} {name}: {side}/{phase}/{reason}, {up} B up, {down} B down, {total_ms} ms"
        );
    }
}

/// The worker's slot, as in every other line of its process.
fn worker() -> Option<u32> {
    static SLOT: OnceLock<Option<u32>> = OnceLock::new();
    *SLOT.get_or_init(|| std::env::var("KEYGATE_SLOT").ok()?.parse().ok())
}

fn shortened(text: &str) -> &str {
    let end = (0..=text.len().min(CLIENT_TEXT_BYTES_MAX)).rev().find(|index| text.is_char_boundary(*index));
    &text[..end.unwrap_or(0)]
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn ms(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Target;

    fn access(plan: AccessPlan) -> AccessLog {
        let log = Log::open(Target::File { path: "/dev/null".into(), mode: 0o640 }).expect("a log");
        AccessLog::new(plan, log, Arc::default())
    }

    fn ended(facts: Facts) -> Ended {
        Ended {
            at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_764_163_800_123),
            client: ([192, 0, 2, 1], 4711).into(),
            listener: "https".into(),
            facts,
            total: Duration::from_micros(1_234),
            close: Close::ClientHandshakeNotTls,
        }
    }

    fn text(ended: &Ended) -> String {
        let mut line = Vec::new();
        ended.write(&mut line, false);
        String::from_utf8(line).expect("JSON")
    }

    /// How many of `closes` get a line.
    fn logged(access: &AccessLog, closes: &[Close]) -> u32 {
        let written = Cell::new(0);
        for close in closes {
            access.ended(*close, || {
                written.set(written.get() + 1);
                ended(Facts::default())
            });
        }
        written.get()
    }

    #[test]
    fn a_line_says_what_a_connection_came_to_and_no_more() {
        let line = text(&ended(Facts { server_name: Some("a.example".into()), ..Facts::default() }));
        assert!(line.starts_with(r#"{"level":"info","time":"2025-11-26T13:30:00.123Z","pid":"#), "{line}");
        let said = r#""client":"192.0.2.1:4711","listener":"https","serverName":"a.example","toUpstreamBytes":0,"toClientBytes":0,"totalMs":1.234,"side":"client","phase":"handshake","reason":"not_tls""#;
        assert!(line.contains(said), "{line}");
    }

    #[test]
    fn a_line_tells_the_client_of_a_proxy_from_the_proxy() {
        let (via, destination) = (Some(([10, 0, 0, 1], 5).into()), Some(([192, 0, 2, 9], 443).into()));
        let line = text(&ended(Facts { via, destination, ..Facts::default() }));
        let said = r#""client":"192.0.2.1:4711","via":"10.0.0.1:5","destination":"192.0.2.9:443","listener":"https""#;
        assert!(line.contains(said), "{line}");
    }

    #[test]
    fn what_a_client_sent_can_neither_end_the_line_nor_fill_it() {
        let name = format!("\"}}\n{{\"event\":\"forged\"}}\r\u{1b}[2J{}", "é".repeat(300));
        let line = text(&ended(Facts { server_name: Some(name.clone()), ..Facts::default() }));
        assert!(!line.contains(['\n', '\r', '\u{1b}']), "{line}");
        let said = name.split("é").next().expect("its beginning");
        let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let read = read["serverName"].as_str().expect("a name");
        assert!(read.starts_with(said) && read.len() <= CLIENT_TEXT_BYTES_MAX, "{read}");
        let mut shown = Vec::new();
        ended(Facts { server_name: Some(name), ..Facts::default() }).write(&mut shown, true);
        assert!(!shown.iter().any(u8::is_ascii_control), "{}", String::from_utf8_lossy(&shown));
    }

    #[test]
    fn one_in_so_many_gets_a_line_and_every_failure_if_wanted() {
        let (good, bad) = (Close::ClientRelayClosed, Close::ClientHandshakeNotTls);
        let plan = AccessPlan { enabled: true, sample: 10, rate: 10_000, failures_always: true };
        let all = access(plan.clone());
        assert_eq!(logged(&all, &[good; 100]), 10);
        assert_eq!(logged(&all, &[bad; 7]), 7);
        assert_eq!(all.counts.sampled_out.get(), 90);
        let sampled = access(AccessPlan { failures_always: false, ..plan });
        assert_eq!(logged(&sampled, &[bad; 100]), 10);
    }

    #[test]
    fn no_more_lines_than_the_rate_allows() {
        let access = access(AccessPlan { enabled: true, sample: 1, rate: 5, failures_always: true });
        let began = Instant::now();
        assert_eq!((0..100).filter(|_| access.is_allowed(began)).count(), 5);
        assert_eq!((0..100).filter(|_| access.is_allowed(began + Duration::from_secs(1))).count(), 5);
        // What was not used is saved for a while.
        assert_eq!((0..100).filter(|_| access.is_allowed(began + Duration::from_secs(60))).count(), 10);
        logged(&access, &[Close::ClientRelayClosed; 3]);
        assert!(access.counts.rate_limited.get() >= 2);
    }

    #[test]
    fn nothing_is_logged_or_counted_when_it_is_off() {
        let access = access(AccessPlan::default());
        assert_eq!(logged(&access, &[Close::ClientHandshakeNotTls; 10]), 0);
        assert_eq!(access.counts.sampled_out.get() + access.counts.rate_limited.get(), 0);
    }
}
