//! Owns one step of a TLS handshake, in either role: bytes that were received go in, on a stack of their own; a signature that
//! is wanted is made by a lane; what is to be sent and what has become of the handshake come out.
//! Knows nothing of alerts that must be replaced, upstreams or clients. I/O thread only.

use std::future::poll_fn;
use std::io;

use tokio::time::Instant;

use crate::access_log::SignedBy;
use crate::certificates::{HelloSeen, take_hello_seen};
use crate::close::Close;
use crate::fiber::{Abandoned, Progress, SignatureWanted, Step};
use crate::relay::Scratch;
use crate::signing::{SignError, Signed};
use crate::stream::Stream;
use crate::tls::{Tls, TlsPhase};

pub struct StepOutcome {
    pub tls: Tls,
    pub plaintext: Vec<u8>,
    /// Of a client's hello that was processed.
    pub hello: Option<HelloSeen>,
    pub signed: Option<SignedBy>,
    pub result: Result<TlsPhase, StepFault>,
}

pub enum StepFault {
    Tls(rustls::Error),
    /// The handshake needed a signature and got none.
    Unsigned(SignError),
}

/// Processes what was received, having it signed by a lane where that is needed. `gone`: why the connection ends when the peer
/// closes while a lane signs; nobody needs the signature then.
pub async fn run_step(
    mut tls: Tls,
    peer: &Stream,
    deadline: Instant,
    gone: Close,
) -> Result<StepOutcome, Close> {
    let mut step = Step::new(move || {
        let mut plaintext = Vec::new();
        let result = tls.advance(&mut plaintext);
        (tls, plaintext, result)
    })
    .map_err(|_| Close::ProxyHandshakeNoMemory)?;
    // A step that panicked has not been asked what it saw; its client is not this one.
    take_hello_seen();
    let (mut hello, mut signed, mut unsigned) = (None, None, None);
    let mut answer = Err(Abandoned);
    loop {
        let progress = step.resume(answer);
        hello = take_hello_seen().or(hello);
        match progress {
            Progress::WantsSignature(wanted) => {
                let deadline = deadline.min(Instant::now() + wanted.deadline_in);
                answer = match signature(wanted, peer, deadline, gone).await? {
                    Ok(Signed { signature, waited, signing, token }) => {
                        signed = Some(SignedBy { waited, signing, token });
                        Ok(signature)
                    }
                    Err(error) => {
                        unsigned = Some(error);
                        Err(Abandoned)
                    }
                };
            }
            Progress::Finished((tls, plaintext, result)) => {
                let result = result.map_err(|error| match unsigned {
                    Some(error) => StepFault::Unsigned(error),
                    None => StepFault::Tls(error),
                });
                return Ok(StepOutcome { tls, plaintext, hello, signed, result });
            }
        }
    }
}

/// Has `wanted` signed by a lane. The outer error is the connection's end: the peer is gone.
async fn signature(
    wanted: SignatureWanted,
    peer: &Stream,
    deadline: Instant,
    gone: Close,
) -> Result<Result<Signed, SignError>, Close> {
    tokio::select! {
        biased;
        signed = wanted.key.signature(wanted.scheme, wanted.message, deadline) => Ok(signed),
        () = closed_by(peer) => Err(gone),
    }
}

/// Returns when the peer has closed. One that sends on (it has no reason to) is not watched further.
async fn closed_by(peer: &Stream) {
    let mut byte = [0];
    match poll_fn(|context| peer.poll_peek(context, &mut byte)).await {
        Ok(0) | Err(_) => {}
        Ok(_) => std::future::pending().await,
    }
}

/// Reads once into `tls`; 0 when the peer has closed.
pub async fn receive(peer: &Stream, tls: &mut Tls, scratch: &Scratch) -> io::Result<usize> {
    read_once(peer, scratch, |received| tls.receive(received)).await
}

/// Reads once, behind what is in `bytes` already; 0 when the peer has closed.
pub async fn receive_bytes(peer: &Stream, bytes: &mut Vec<u8>, scratch: &Scratch) -> io::Result<usize> {
    read_once(peer, scratch, |received| bytes.extend_from_slice(received)).await
}

async fn read_once(peer: &Stream, scratch: &Scratch, mut take: impl FnMut(&[u8])) -> io::Result<usize> {
    loop {
        // Trying first saves a wake-up when the bytes are there already, as a client's first are.
        let read: io::Result<usize> = scratch.with_input(|buffer| {
            let received = peer.try_read(buffer)?;
            take(&buffer[..received]);
            Ok(received)
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => peer.readable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

/// Writes all of `bytes`.
///
/// # Errors
/// The peer is gone.
pub async fn write_all(stream: &Stream, mut bytes: &[u8]) -> io::Result<()> {
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
