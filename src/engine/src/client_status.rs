//! Owns asking OCSP responders whether clients' certificates were revoked: one question at a time for a certificate, and what
//! was answered for as long as it holds. Knows nothing of TLS; what an answer says is read in verify/status.rs.
//! I/O thread only, which never waits: a connection does, until its handshake's deadline at most.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::UnixTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Mutex as AsyncMutex, Semaphore};
use tokio::time::{Instant, timeout};

use crate::verify::{Status, StatusAnswer, Subject};

/// Questions under way at once, for each listener.
const QUESTIONS_MAX: usize = 64;
/// Certificates that something is remembered of.
const KNOWN_MAX: usize = 10_000;
/// Of a responder's answer, with its head.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// A revocation is noticed after this long, however long the answer would hold.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// A responder that does not answer is not asked about the same certificate again for so long.
const SILENCE: Duration = Duration::from_secs(10);

/// What became of a question; `STATUS_OUTCOMES` has the words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Good,
    Revoked,
    Unknown,
    /// No answer that holds.
    Unavailable,
}

pub const STATUS_OUTCOMES: [&str; 4] = ["good", "revoked", "unknown", "unavailable"];

/// How the status of certificates is asked for.
pub struct StatusPlan {
    /// Without an answer that says good, nobody is let in.
    pub is_hard: bool,
    /// Instead of the one that a certificate names.
    pub responder: Option<String>,
    /// For one question.
    pub deadline: Duration,
}

pub struct ClientStatus {
    plan: StatusPlan,
    algorithms: WebPkiSupportedAlgorithms,
    known: Mutex<HashMap<[u8; 32], Place>>,
    questions: Semaphore,
}

/// What is known of one certificate; whoever asks holds it.
type Place = Arc<AsyncMutex<Option<Known>>>;

#[derive(Clone, Copy)]
struct Known {
    outcome: Outcome,
    until: Instant,
}

impl ClientStatus {
    pub fn new(plan: StatusPlan, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { plan, algorithms, known: Mutex::default(), questions: Semaphore::new(QUESTIONS_MAX) }
    }

    pub fn is_hard(&self) -> bool {
        self.plan.is_hard
    }

    /// Of the certificate with this SHA-256. Those who want to know the same wait for one answer.
    pub async fn of(&self, fingerprint: [u8; 32], subject: &Subject) -> Outcome {
        let place = self.place(fingerprint);
        let mut place = place.lock().await;
        match *place {
            Some(Known { outcome, until }) if until > Instant::now() => outcome,
            _ => {
                let known = self.ask(subject).await;
                *place = Some(known);
                known.outcome
            }
        }
    }

    fn place(&self, fingerprint: [u8; 32]) -> Place {
        let mut known = self.known();
        if known.len() >= KNOWN_MAX && !known.contains_key(&fingerprint) {
            let now = Instant::now();
            // Somebody who holds a place is asking.
            known.retain(|_, place| place.try_lock().is_err() || is_fresh(place, now));
            if known.len() >= KNOWN_MAX {
                known.clear();
            }
        }
        known.entry(fingerprint).or_default().clone()
    }

    fn known(&self) -> MutexGuard<'_, HashMap<[u8; 32], Place>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, subject: &Subject) -> Known {
        let unavailable = || Known { outcome: Outcome::Unavailable, until: Instant::now() + SILENCE };
        let Some(responder) = self.plan.responder.as_ref().or(subject.responder.as_ref()) else {
            return unavailable();
        };
        let Ok(_question) = self.questions.acquire().await else { return unavailable() };
        let Ok(Ok(response)) = timeout(self.plan.deadline, fetch(responder, &subject.request())).await else {
            return unavailable();
        };
        let now = UnixTime::now();
        let Ok(StatusAnswer { status, until }) = subject.read(&response, now, self.algorithms) else {
            return unavailable();
        };
        let outcome = match status {
            Status::Good => Outcome::Good,
            Status::Revoked => Outcome::Revoked,
            Status::Unknown => Outcome::Unknown,
        };
        let holds = u64::try_from(until).unwrap_or(0).saturating_sub(now.as_secs());
        Known { outcome, until: Instant::now() + Duration::from_secs(holds).min(REMEMBERED) }
    }
}

fn is_fresh(place: &AsyncMutex<Option<Known>>, now: Instant) -> bool {
    place.try_lock().is_ok_and(|known| known.is_some_and(|known| known.until > now))
}

/// `http://HOST[:PORT][/PATH]`: what may be fetched before anybody is trusted, and so what OCSP uses (RFC 6960 appendix A).
fn parts_of(url: &str) -> Option<(&str, u16, &str)> {
    let rest = url.strip_prefix("http://")?;
    let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    if authority.contains('@') || path.bytes().any(|byte| !byte.is_ascii_graphic()) {
        return None;
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !port.contains(']') => (host, port.parse().ok()?),
        _ => (authority, 80),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let is_host =
        !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte));
    is_host.then_some((host, port, path))
}

/// A POST of HTTP/1.0, which is answered in one piece that ends with the connection.
async fn fetch(url: &str, request: &[u8]) -> io::Result<Vec<u8>> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let (host, port, path) = parts_of(url).ok_or_else(malformed)?;
    let mut server = TcpStream::connect((host, port)).await?;
    let named = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let head = format!(
        "POST {path} HTTP/1.0\r\nHost: {named}\r\nContent-Type: application/ocsp-request\r\nContent-Length: {}\r\n\r\n",
        request.len()
    );
    server.write_all(&[head.as_bytes(), request].concat()).await?;
    let mut answer = Vec::new();
    server.take(ANSWER_BYTES_MAX as u64 + 1).read_to_end(&mut answer).await?;
    body_of(&answer).map(<[u8]>::to_vec).ok_or_else(malformed)
}

fn body_of(answer: &[u8]) -> Option<&[u8]> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head_bytes) = head.parse(answer).ok()? else { return None };
    let value = |name: &str| {
        let header = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok()
    };
    if head.code != Some(200) || answer.len() > ANSWER_BYTES_MAX || value("transfer-encoding").is_some() {
        return None;
    }
    let body = answer.get(head_bytes..)?;
    match value("content-length") {
        None => Some(body),
        Some(length) => body.get(..length.parse().ok()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_http_is_asked() {
        assert_eq!(parts_of("http://ocsp.test"), Some(("ocsp.test", 80, "/")));
        assert_eq!(parts_of("http://ocsp.test:8080/a/b?c"), Some(("ocsp.test", 8080, "/a/b?c")));
        assert_eq!(parts_of("http://[2001:db8::1]:81/"), Some(("2001:db8::1", 81, "/")));
        assert_eq!(parts_of("http://[2001:db8::1]"), Some(("2001:db8::1", 80, "/")));
        for url in [
            "https://ocsp.test/",
            "ftp://ocsp.test/",
            "http://",
            "http://a@b/",
            "http://a:99999/",
            "http://a b/",
            "http://a/\r\nHost: b",
            "file:///etc/passwd",
        ] {
            assert_eq!(parts_of(url), None, "{url}");
        }
    }

    #[test]
    fn an_answer_is_whole_and_good_or_nothing() {
        assert_eq!(body_of(b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabcd"), Some(&b"abc"[..]));
        assert_eq!(body_of(b"HTTP/1.1 200 OK\r\n\r\nabcd"), Some(&b"abcd"[..]));
        for answer in [
            &b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nabcd"[..],
            b"HTTP/1.0 404 Not Found\r\n\r\nabcd",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nabcd",
            b"HTTP/1.0 200 OK\r\n",
            b"abcd",
            b"",
        ] {
            assert_eq!(body_of(answer), None, "{}", String::from_utf8_lossy(answer));
        }
    }
}
