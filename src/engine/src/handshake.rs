//! Owns a connection from its first byte to Finished: reading, running steps, having them signed, answering with the right
//! alert. Knows nothing of upstreams or of what the bytes mean afterwards. I/O thread only.
//!
//! ```text
//!  read ──> step ──┬─ needs more ──────────────> flush ──> read
//!                  ├─ wants signature ─> lane ─> step (again)
//!                  ├─ established ─────────────> flush ──> Established
//!                  └─ failed ──────────────────> alert ──> Close
//! ```

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::{Error, PeerMisbehaved, ServerConfig};
use tokio::time::{Instant, timeout, timeout_at};

use crate::access_log::Facts;
use crate::close::Close;
use crate::relay::Scratch;
use crate::step::{StepFault, receive, run_step, write_all};
use crate::stream::Stream;
use crate::tls::{RECORD_PLAINTEXT_MAX, Tls, TlsPhase, UNPROCESSED_MAX};

/// Fatal alerts as records of their own (RFC 8446 6.2): for handshakes that fail before any key is in use.
const ALERT_RECORD_OVERFLOW: [u8; 7] = [21, 3, 3, 0, 2, 2, 22];
const ALERT_HANDSHAKE_FAILURE: [u8; 7] = [21, 3, 3, 0, 2, 2, 40];
const ALERT_ILLEGAL_PARAMETER: [u8; 7] = [21, 3, 3, 0, 2, 2, 47];
const ALERT_DECODE_ERROR: [u8; 7] = [21, 3, 3, 0, 2, 2, 50];
const ALERT_PROTOCOL_VERSION: [u8; 7] = [21, 3, 1, 0, 2, 2, 70];
const ALERT_INTERNAL_ERROR: [u8; 7] = [21, 3, 3, 0, 2, 2, 80];
pub const ALERT_UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// A refused client is read from for so long, or so much, that it can notice the alert before the connection closes.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 256 * 1024;

/// A finished handshake.
pub struct Established {
    pub tls: Tls,
    pub leftover: Leftover,
}

/// What the peer's last packet of the handshake carried beyond it.
pub struct Leftover {
    pub plaintext: Vec<u8>,
    /// close_notify followed: nothing more comes from the peer.
    pub ended: bool,
}

/// Takes `client` through the handshake. What is learnt of it on the way is left in `facts`.
///
/// # Errors
/// Why the connection must be closed. The client was sent the alert that belongs to it.
pub async fn handshake(
    client: &Stream,
    config: Arc<ServerConfig>,
    deadline: Instant,
    scratch: &Scratch,
    facts: &mut Facts,
) -> Result<Established, Close> {
    let mut tls = Tls::server(config).map_err(|_| Close::ProxyInternalPanic)?;
    let mut is_answered = false;
    let mut records = Records::default();
    loop {
        let received = timeout_at(deadline, receive(client, &mut tls, scratch))
            .await
            .map_err(|_| Close::ClientHandshakeDeadline)?
            .map_err(|_| Close::ClientHandshakeReset)?;
        if received == 0 {
            return Err(Close::ClientHandshakeClosed);
        }
        // Until we have answered, what came first is still there, and begins as it did.
        let first_flight = if is_answered { &[][..] } else { tls.unprocessed() };
        let plain_http = looks_like_http(first_flight);
        let is_outdated = is_before_tls12(first_flight);
        let is_sslv2 = is_sslv2(first_flight);
        let waiting = tls.unprocessed();
        if records.pass(&waiting[waiting.len().saturating_sub(received)..]) {
            // rustls takes a little more than is allowed, and says decode_error to what is more than that.
            let alert = if is_answered { &[][..] } else { &ALERT_RECORD_OVERFLOW };
            return Err(refuse(client, alert, Close::ClientHandshakeMalformed, scratch).await);
        }

        let mut step = run_step(tls, client, deadline, Close::ClientHandshakeClosed).await?;
        let (mut refused_name, mut unverifiable) = (false, false);
        if let Some(hello) = step.hello {
            facts.server_name = hello.server_name;
            (refused_name, unverifiable) = (hello.refused_name, hello.unverifiable);
        }
        facts.signed = step.signed.or(facts.signed.take());
        let to_client = step.tls.take_to_peer();
        let phase = match step.result {
            Ok(phase) if step.tls.unprocessed().len() <= UNPROCESSED_MAX => phase,
            Ok(_) => return Err(refuse(client, &to_client, Close::ClientHandshakeMalformed, scratch).await),
            Err(fault) => {
                // Nothing of a failed first flight was sent, so the plain alert is the first thing that the client sees of it, and
                // no key of that flight is in use on its side.
                let (alert, close) = match fault {
                    StepFault::Unsigned(error) => {
                        (Some(&ALERT_INTERNAL_ERROR[..]), Close::from_sign_error(&error))
                    }
                    StepFault::Tls(_) if refused_name => {
                        (Some(&ALERT_UNRECOGNIZED_NAME[..]), Close::ClientHandshakeUnknownName)
                    }
                    // rustls has no word for it in TLS 1.2, and no alert.
                    StepFault::Tls(Error::General(_)) if unverifiable => {
                        (Some(&ALERT_HANDSHAKE_FAILURE[..]), Close::ClientHandshakeNoSharedSignatureScheme)
                    }
                    // Nor to that. The ClientHello after a HelloRetryRequest is in plaintext still.
                    StepFault::Tls(Error::PeerMisbehaved(PeerMisbehaved::ServerNameDifferedOnRetry)) => {
                        (Some(&ALERT_ILLEGAL_PARAMETER[..]), Close::ClientHandshakeProtocolError)
                    }
                    StepFault::Tls(error) => (None, Close::from_tls_error(&error)),
                };
                let (alert, close) = match close {
                    _ if plain_http => (alert, Close::ClientHandshakePlainHttp),
                    _ if is_sslv2 => {
                        (Some(&ALERT_PROTOCOL_VERSION[..]), Close::ClientHandshakeNoSharedProtocol)
                    }
                    // rustls misses signature_algorithms, which those versions lack, before it looks at the version.
                    Close::ClientHandshakeNoSharedSignatureScheme if is_outdated => {
                        (Some(&ALERT_PROTOCOL_VERSION[..]), Close::ClientHandshakeNoSharedProtocol)
                    }
                    _ => (alert, close),
                };
                return Err(refuse(client, alert.unwrap_or(&to_client), close, scratch).await);
            }
        };
        is_answered |= !to_client.is_empty();
        timeout_at(deadline, write_all(client, &to_client))
            .await
            .map_err(|_| Close::ClientHandshakeDeadline)?
            .map_err(|_| Close::ClientHandshakeReset)?;
        match phase {
            TlsPhase::Handshaking => tls = step.tls,
            TlsPhase::PeerClosed if step.tls.is_handshaking() => return Err(Close::ClientHandshakeClosed),
            // A short request can come whole with Finished: data, and the end of the client's half behind it.
            TlsPhase::Established | TlsPhase::PeerClosed => {
                let leftover = Leftover { plaintext: step.plaintext, ended: phase == TlsPhase::PeerClosed };
                return Ok(Established { tls: step.tls, leftover });
            }
        }
    }
}

/// Sends the alert, and gives the client a moment to read it: closing while bytes of the client are unread or under way
/// would make the kernel reset the connection and take the alert back.
async fn refuse(client: &Stream, alert: &[u8], close: Close, scratch: &Scratch) -> Close {
    // rustls says nothing about a message that is too large to be looked at.
    let is_unsaid = alert.is_empty() && close == Close::ClientHandshakeMalformed;
    let _ = client.try_write(if is_unsaid { &ALERT_DECODE_ERROR } else { alert });
    let _ = client.shutdown_write();
    let _ = timeout(LINGER, discard(client, scratch)).await;
    close
}

/// Reads until the client has closed or said too much.
async fn discard(client: &Stream, scratch: &Scratch) {
    let mut left = LINGER_BYTES_MAX;
    while left > 0 && client.readable().await.is_ok() {
        match scratch.with_input(|unwanted| client.try_read(unwanted)) {
            Ok(0) => return,
            Ok(read) => left = left.saturating_sub(read),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => return,
        }
    }
}

fn looks_like_http(bytes: &[u8]) -> bool {
    const METHODS: [&[u8]; 8] =
        [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"CONNECT ", b"PATCH "];
    METHODS.iter().any(|method| bytes.starts_with(method))
}

/// Whether a ClientHello says TLS 1.1 or older in `legacy_version` (RFC 8446 4.1.2), which newer clients never do.
fn is_before_tls12(bytes: &[u8]) -> bool {
    matches!(bytes, [22, _, _, _, _, 1, _, _, _, major, minor, ..] if (*major, *minor) < (3, 3))
}

/// Whether a ClientHello is one of SSL 2.0, also where it offers newer versions (RFC 5246 E.2, forbidden by RFC 8446 D.5).
fn is_sslv2(bytes: &[u8]) -> bool {
    matches!(bytes, [0x80..=0xff, _, 1, 0 | 3, ..])
}

/// Where the client's records begin and end, whatever pieces they come in. rustls moves what waits for the rest of a message.
#[derive(Default)]
struct Records {
    header: Vec<u8>,
    /// Of the record that is passing.
    left: usize,
}

impl Records {
    /// Whether one among the next bytes is longer than plaintext may be (RFC 8446 5.1). What is application data on the outside is
    /// encrypted, and rustls' to judge.
    fn pass(&mut self, mut bytes: &[u8]) -> bool {
        while let Some((first, rest)) = bytes.split_first() {
            if self.left > 0 {
                let passing = self.left.min(bytes.len());
                self.left -= passing;
                bytes = bytes.get(passing..).unwrap_or_default();
                continue;
            }
            self.header.push(*first);
            bytes = rest;
            if let [kind, major, _, high, low] = self.header[..] {
                self.header.clear();
                self.left = usize::from(u16::from_be_bytes([high, low]));
                if matches!(kind, 20..=22) && major == 3 && self.left > RECORD_PLAINTEXT_MAX {
                    return true;
                }
            }
        }
        false
    }
}
