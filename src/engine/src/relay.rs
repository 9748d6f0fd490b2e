//! Owns the bytes of an established connection: decrypt towards the upstream, encrypt towards the client, half-close,
//! back-pressure, the deadlines of this phase. Knows nothing of handshakes, tokens or how the upstream was chosen.
//! I/O thread only.
//!
//! Each direction is `Open -> Ended -> Finished`: its source has ended, then everything was handed on and the
//! destination told. A direction reads only when it has nothing left to write, so a slow reader stops its sender.
//! Buffers belong to the worker (`Scratch`), not to the connection: only what a peer does not take at once is kept.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::close::Close;
use crate::stats::Counter;
use crate::stream::Stream;
use crate::tls::{Tls, TlsPhase, UNPROCESSED_MAX, ciphertext_max};

/// Read from a socket at once. Four full records: larger reads no longer save system calls worth having.
const READ_BYTES: usize = 64 * 1024;
/// Reads in one direction before other connections get their turn.
const READS_PER_TURN_MAX: usize = 8;

/// The worker's shared buffers; borrowed only inside one poll.
pub struct Scratch {
    buffers: RefCell<Buffers>,
}

struct Buffers {
    ciphertext: Vec<u8>,
    plaintext: Vec<u8>,
}

impl Default for Scratch {
    fn default() -> Self {
        let ciphertext = vec![0; ciphertext_max(READ_BYTES).max(UNPROCESSED_MAX + READ_BYTES)];
        Self { buffers: RefCell::new(Buffers { ciphertext, plaintext: vec![0; READ_BYTES] }) }
    }
}

impl Scratch {
    /// Lends the larger buffer for one read that does not wait.
    pub fn with_ciphertext<T>(&self, read: impl FnOnce(&mut [u8]) -> T) -> T {
        read(&mut self.buffers.borrow_mut().ciphertext[..READ_BYTES])
    }
}

#[derive(Debug, Clone, Copy)]
pub struct RelayDeadlines {
    /// Without a byte in either direction.
    pub idle: Duration,
    /// After one direction has ended.
    pub half_closed: Duration,
    /// Of the whole connection, from accept; None: no limit.
    pub lifetime_until: Option<Instant>,
}

/// Plaintext bytes relayed, counted as they are handed on.
#[derive(Default)]
pub struct RelayBytes {
    pub to_upstream: Counter,
    pub to_client: Counter,
}

/// What the client's last packet of the handshake carried beyond it.
pub struct Leftover {
    pub plaintext: Vec<u8>,
    /// close_notify followed: nothing more comes from the client.
    pub client_closed: bool,
}

/// Relays until both directions have ended or a deadline passes.
pub async fn relay(
    client: &Stream,
    tls: Tls,
    leftover: Leftover,
    upstream: &Stream,
    deadlines: RelayDeadlines,
    scratch: &Scratch,
    bytes: &RelayBytes,
) -> Close {
    bytes.to_upstream.add(leftover.plaintext.len() as u64);
    let mut relay = Relay {
        client,
        upstream,
        tls,
        scratch,
        bytes,
        to_upstream: Direction { pending: leftover.plaintext, ..Direction::default() },
        to_client: Direction::default(),
        client_truncated: false,
        first_ended: None,
        last_byte_at: Instant::now(),
    };
    if leftover.client_closed {
        relay.end_to_upstream(Close::ClientRelayClosed);
    }
    let mut timer = pin!(sleep_until(relay.deadline(deadlines).0));
    poll_fn(|context| {
        if let Poll::Ready(close) = relay.poll(context) {
            return Poll::Ready(close);
        }
        // The timer is moved only when it fires: a busy connection never touches the timer wheel.
        while timer.as_mut().poll(context).is_ready() {
            let (until, close) = relay.deadline(deadlines);
            if until <= Instant::now() {
                return Poll::Ready(close);
            }
            timer.as_mut().reset(until);
        }
        if relay.first_ended.is_some() && timer.deadline() > relay.deadline(deadlines).0 {
            timer.as_mut().reset(relay.deadline(deadlines).0);
            context.waker().wake_by_ref();
        }
        Poll::Pending
    })
    .await
}

struct Relay<'a> {
    client: &'a Stream,
    upstream: &'a Stream,
    tls: Tls,
    scratch: &'a Scratch,
    bytes: &'a RelayBytes,
    to_upstream: Direction,
    to_client: Direction,
    /// The client ended without close_notify (RFC 8446 6.1).
    client_truncated: bool,
    first_ended: Option<Close>,
    last_byte_at: Instant,
}

#[derive(Default)]
struct Direction {
    state: DirectionState,
    /// What the destination has not taken yet, from `written` on. Empty and without memory most of the time.
    pending: Vec<u8>,
    written: usize,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum DirectionState {
    #[default]
    Open,
    /// The source has ended; `pending` and the end itself are still to be handed on.
    Ended,
    Finished,
}

impl Relay<'_> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Close> {
        let to_upstream = self.poll_to_upstream(context);
        if let Poll::Ready(Err(close)) = to_upstream {
            return Poll::Ready(close);
        }
        let to_client = self.poll_to_client(context);
        if let Poll::Ready(Err(close)) = to_client {
            return Poll::Ready(close);
        }
        if to_upstream.is_ready() && to_client.is_ready() {
            return Poll::Ready(self.first_ended.unwrap_or(Close::ClientRelayClosed));
        }
        Poll::Pending
    }

    fn poll_to_upstream(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Close>> {
        for _ in 0..READS_PER_TURN_MAX {
            ready!(self.to_upstream.poll_flush(context, self.upstream))
                .map_err(|_| Close::UpstreamRelayReset)?;
            match self.to_upstream.state {
                DirectionState::Finished => return Poll::Ready(Ok(())),
                DirectionState::Ended => {
                    // An upstream that is gone already has ended the other direction; that is where it is noticed.
                    let _ = self.upstream.shutdown_write();
                    self.to_upstream.state = DirectionState::Finished;
                }
                DirectionState::Open => ready!(self.poll_read_client(context))?,
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_to_client(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Close>> {
        for _ in 0..READS_PER_TURN_MAX {
            self.queue_own_records();
            ready!(self.to_client.poll_flush(context, self.client)).map_err(|_| self.client_reset())?;
            match self.to_client.state {
                DirectionState::Finished => return Poll::Ready(Ok(())),
                DirectionState::Ended => {
                    if self.tls.close_notify().is_ok() {
                        self.queue_own_records();
                        ready!(self.to_client.poll_flush(context, self.client))
                            .map_err(|_| self.client_reset())?;
                    }
                    let _ = self.client.shutdown_write();
                    self.to_client.state = DirectionState::Finished;
                }
                DirectionState::Open => ready!(self.poll_read_upstream(context))?,
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read from the client, decrypted and offered to the upstream.
    fn poll_read_client(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Close>> {
        let mut buffers = self.scratch.buffers.borrow_mut();
        let Buffers { ciphertext, plaintext } = &mut *buffers;
        let kept = self.tls.unprocessed().len();
        let received = ready!(poll_read(context, self.client, &mut ciphertext[kept..kept + READ_BYTES]))
            .map_err(|_| self.client_reset())?;
        if received == 0 {
            self.client_truncated = true;
            self.end_to_upstream(Close::ClientRelayTruncated);
            return Poll::Ready(Ok(()));
        }
        self.last_byte_at = Instant::now();
        ciphertext[..kept].copy_from_slice(self.tls.unprocessed());
        plaintext.clear();
        let phase = self.tls.process(&mut ciphertext[..kept + received], plaintext);
        if phase.is_err() || self.tls.unprocessed().len() > UNPROCESSED_MAX {
            let _ = self.client.try_write(&self.tls.take_to_client());
            return Poll::Ready(Err(Close::ClientRelayProtocolError));
        }
        self.tls.release_buffers();
        self.bytes.to_upstream.add(plaintext.len() as u64);
        self.to_upstream.write(self.upstream, plaintext, &[]).map_err(|_| Close::UpstreamRelayReset)?;
        if phase == Ok(TlsPhase::ClientClosed) {
            self.end_to_upstream(Close::ClientRelayClosed);
        }
        Poll::Ready(Ok(()))
    }

    /// One read from the upstream, encrypted and offered to the client.
    fn poll_read_upstream(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Close>> {
        let mut buffers = self.scratch.buffers.borrow_mut();
        let Buffers { ciphertext, plaintext } = &mut *buffers;
        plaintext.resize(READ_BYTES, 0);
        let received =
            ready!(poll_read(context, self.upstream, plaintext)).map_err(|_| Close::UpstreamRelayReset)?;
        if received == 0 {
            self.first_ended.get_or_insert(Close::UpstreamRelayClosed);
            self.to_client.state = DirectionState::Ended;
            return Poll::Ready(Ok(()));
        }
        self.last_byte_at = Instant::now();
        let encrypted = self
            .tls
            .encrypt(&plaintext[..received], ciphertext)
            .map_err(|_| Close::ClientRelayProtocolError)?;
        self.bytes.to_client.add(received as u64);
        let own = self.tls.take_to_client();
        self.to_client.write(self.client, &own, &ciphertext[..encrypted]).map_err(|_| self.client_reset())?;
        Poll::Ready(Ok(()))
    }

    fn end_to_upstream(&mut self, close: Close) {
        self.first_ended.get_or_insert(close);
        self.to_upstream.state = DirectionState::Ended;
    }

    /// Tickets, key updates and alerts go behind what is pending already.
    fn queue_own_records(&mut self) {
        let own = self.tls.take_to_client();
        if !own.is_empty() {
            self.to_client.pending.extend_from_slice(&own);
        }
    }

    fn client_reset(&self) -> Close {
        if self.client_truncated { Close::ClientRelayTruncated } else { Close::ClientRelayReset }
    }

    /// The nearest deadline and what it means when it passes.
    fn deadline(&self, deadlines: RelayDeadlines) -> (Instant, Close) {
        let quiet = if self.first_ended.is_some() {
            (self.last_byte_at + deadlines.half_closed, Close::ProxyRelayHalfClosedDeadline)
        } else {
            (self.last_byte_at + deadlines.idle, Close::ProxyRelayIdleDeadline)
        };
        match deadlines.lifetime_until {
            Some(until) if until < quiet.0 => (until, Close::ProxyRelayLifetimeDeadline),
            _ => quiet,
        }
    }
}

impl Direction {
    /// Writes what is pending; Ready when nothing is.
    fn poll_flush(&mut self, context: &mut Context<'_>, destination: &Stream) -> Poll<io::Result<()>> {
        while self.written < self.pending.len() {
            match destination.try_write(&self.pending[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ready!(destination.poll_write_ready(context))?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        self.pending = Vec::new();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    /// Offers `first` then `second` to the destination and keeps what it does not take. Nothing is pending before.
    fn write(&mut self, destination: &Stream, first: &[u8], second: &[u8]) -> io::Result<()> {
        let mut taken = 0;
        let whole = first.len() + second.len();
        while taken < whole {
            let (rest, next) = if taken < first.len() {
                (&first[taken..], second)
            } else {
                (&second[taken - first.len()..], &[][..])
            };
            match destination.try_write_vectored(&[io::IoSlice::new(rest), io::IoSlice::new(next)]) {
                Ok(written) => taken += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.pending.extend_from_slice(rest);
                    self.pending.extend_from_slice(next);
                    break;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Tries to read before it waits: level information is usually there, and a try is the way to clear a stale one.
fn poll_read(context: &mut Context<'_>, stream: &Stream, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_read_ready(context))?;
        match stream.try_read(buffer) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            read => return Poll::Ready(read),
        }
    }
}
