//! Owns a connection from its first byte to Finished: reading, running steps, having them signed, answering with the right
//! alert. Knows nothing of upstreams or of what the bytes mean afterwards. I/O thread only.
//!
//! ```text
//!  read ──> step ──┬─ needs more ──────────────> flush ──> read
//!                  ├─ wants signature ─> lane ─> step (again)
//!                  ├─ established ─────────────> flush ──> Established
//!                  └─ failed ──────────────────> alert ──> Close
//! ```

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::time::{Instant, timeout, timeout_at};

use crate::access_log::{Facts, SignedBy};
use crate::certificates::take_hello_seen;
use crate::close::Close;
use crate::fiber::{Abandoned, Progress, SignatureWanted, Step};
use crate::relay::Scratch;
use crate::signing::{SignError, Signed};
use crate::stream::Stream;
use crate::tls::{Tls, TlsPhase, UNPROCESSED_MAX};

/// Fatal alerts as records of their own (RFC 8446 6.2): for handshakes that fail before any key is in use.
const ALERT_DECODE_ERROR: [u8; 7] = [21, 3, 3, 0, 2, 2, 50];
const ALERT_PROTOCOL_VERSION: [u8; 7] = [21, 3, 1, 0, 2, 2, 70];
const ALERT_INTERNAL_ERROR: [u8; 7] = [21, 3, 3, 0, 2, 2, 80];
const ALERT_UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// A refused client is read from for so long, or so much, that it can notice the alert before the connection closes.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 256 * 1024;

/// A finished handshake.
pub struct Established {
    pub tls: Tls,
    pub leftover: Leftover,
}

/// What the client's last packet of the handshake carried beyond it.
pub struct Leftover {
    pub plaintext: Vec<u8>,
    /// close_notify followed: nothing more comes from the client.
    pub client_closed: bool,
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
    let mut tls = Tls::new(config).map_err(|_| Close::ProxyInternalPanic)?;
    let mut is_first = true;
    loop {
        let received = timeout_at(deadline, receive(client, &mut tls, scratch))
            .await
            .map_err(|_| Close::ClientHandshakeDeadline)?
            .map_err(|_| Close::ClientHandshakeReset)?;
        if received == 0 {
            return Err(Close::ClientHandshakeClosed);
        }
        let is_first = std::mem::take(&mut is_first);
        let plain_http = is_first && looks_like_http(tls.unprocessed());
        let is_outdated = is_first && is_before_tls12(tls.unprocessed());

        let mut step = run_step(tls, client, deadline, facts).await?;
        let to_client = step.tls.take_to_client();
        let phase = match step.result {
            Ok(phase) if step.tls.unprocessed().len() <= UNPROCESSED_MAX => phase,
            Ok(_) => return Err(refuse(client, &to_client, Close::ClientHandshakeMalformed, scratch).await),
            Err((alert, close)) => {
                let (alert, close) = match close {
                    _ if plain_http => (alert, Close::ClientHandshakePlainHttp),
                    // rustls misses signature_algorithms, which those versions lack, before it looks at the version.
                    Close::ClientHandshakeNoSharedSignatureScheme if is_outdated => {
                        (Some(&ALERT_PROTOCOL_VERSION[..]), Close::ClientHandshakeNoSharedProtocol)
                    }
                    _ => (alert, close),
                };
                return Err(refuse(client, alert.unwrap_or(&to_client), close, scratch).await);
            }
        };
        timeout_at(deadline, write_all(client, &to_client))
            .await
            .map_err(|_| Close::ClientHandshakeDeadline)?
            .map_err(|_| Close::ClientHandshakeReset)?;
        match phase {
            TlsPhase::Handshaking => tls = step.tls,
            TlsPhase::ClientClosed if step.tls.is_handshaking() => return Err(Close::ClientHandshakeClosed),
            // A short request can come whole with Finished: data, and the end of the client's half behind it.
            TlsPhase::Established | TlsPhase::ClientClosed => {
                let leftover =
                    Leftover { plaintext: step.plaintext, client_closed: phase == TlsPhase::ClientClosed };
                return Ok(Established { tls: step.tls, leftover });
            }
        }
    }
}

struct StepOutcome {
    tls: Tls,
    plaintext: Vec<u8>,
    /// The alert is Some when it must replace what rustls would send.
    result: Result<TlsPhase, (Option<&'static [u8]>, Close)>,
}

/// Processes what was received, having it signed by a lane where that is needed.
async fn run_step(
    mut tls: Tls,
    client: &Stream,
    deadline: Instant,
    facts: &mut Facts,
) -> Result<StepOutcome, Close> {
    let mut step = Step::new(move || {
        let mut plaintext = Vec::new();
        let result = tls.advance(&mut plaintext);
        (tls, plaintext, result)
    })
    .map_err(|_| Close::ProxyHandshakeNoMemory)?;
    // A step that panicked has not been asked what it saw; its client is not this one.
    take_hello_seen();
    let mut refused_name = false;
    let mut sign_failure = None;
    let mut answer = Err(Abandoned);
    loop {
        let progress = step.resume(answer);
        if let Some(hello) = take_hello_seen() {
            facts.server_name = hello.server_name;
            refused_name = hello.refused_name;
        }
        match progress {
            Progress::WantsSignature(wanted) => {
                let deadline = deadline.min(Instant::now() + wanted.deadline_in);
                answer = match signature(wanted, client, deadline).await? {
                    Ok(Signed { signature, waited, signing, token }) => {
                        facts.signed = Some(SignedBy { waited, signing, token });
                        Ok(signature)
                    }
                    Err(error) => {
                        sign_failure = Some(Close::from_sign_error(&error));
                        Err(Abandoned)
                    }
                };
            }
            Progress::Finished((tls, plaintext, result)) => {
                // Nothing of a failed first flight was sent, so the plain alert is the first thing that the client sees
                // of it, and no key of that flight is in use on its side.
                let result = result.map_err(|error| match (sign_failure, refused_name) {
                    (Some(close), _) => (Some(&ALERT_INTERNAL_ERROR[..]), close),
                    (None, true) => (Some(&ALERT_UNRECOGNIZED_NAME[..]), Close::ClientHandshakeUnknownName),
                    (None, false) => (None, Close::from_tls_error(&error)),
                });
                return Ok(StepOutcome { tls, plaintext, result });
            }
        }
    }
}

/// Has `wanted` signed by a lane. The outer error is the connection's end: the client is gone, so nobody needs it any more.
async fn signature(
    wanted: SignatureWanted,
    client: &Stream,
    deadline: Instant,
) -> Result<Result<Signed, SignError>, Close> {
    let pending = match wanted.key.sign(wanted.scheme, wanted.message) {
        Ok(pending) => pending,
        Err(error) => return Ok(Err(error)),
    };
    tokio::select! {
        biased;
        signed = timeout_at(deadline, pending) => Ok(match signed {
            Ok(signed) => signed,
            Err(_) => Err(SignError::Deadline),
        }),
        () = client_gone(client) => Err(Close::ClientHandshakeClosed),
    }
}

/// Returns when the client has closed. A client that sends on (it has no reason to) is not watched further.
async fn client_gone(client: &Stream) {
    let mut byte = [0];
    match poll_fn(|context| client.poll_peek(context, &mut byte)).await {
        Ok(0) | Err(_) => {}
        Ok(_) => std::future::pending().await,
    }
}

/// Reads once into `tls`; 0 when the client has closed.
async fn receive(client: &Stream, tls: &mut Tls, scratch: &Scratch) -> io::Result<usize> {
    loop {
        // Trying first saves a wake-up when the bytes are there already, and they are: clients speak first.
        let read: io::Result<usize> = scratch.with_ciphertext(|buffer| {
            let received = client.try_read(buffer)?;
            tls.receive(&buffer[..received]);
            Ok(received)
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => client.readable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

/// Writes all of `bytes`.
///
/// # Errors
/// The peer is gone.
async fn write_all(stream: &Stream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
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
        match scratch.with_ciphertext(|unwanted| client.try_read(unwanted)) {
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
