//! Owns the bytes of an established connection, both ways: decrypt what comes by TLS, encrypt what goes by TLS, half-close,
//! back-pressure, the deadlines of this phase. Knows nothing of handshakes, tokens or how the upstream was chosen.
//! I/O thread only.
//!
//! Each direction is `Open -> Ended -> Finished`: its source has ended, then everything was handed on and the
//! destination told; or, when the upstream has reset the connection, `Open -> Refused -> Finished`. A direction reads only when it has nothing left to write, so a slow reader stops its sender.
//! Either end may speak TLS or not. An end of TLS that was not said (RFC 8446 6.1) is not told to TLS at the other end as a whole
//! one; plaintext has one kind of end, and is told of that: half the servers and clients of this world never say theirs. What
//! is broken or refused by an alert resets plaintext.
//! Buffers belong to the worker (`Scratch`), not to the connection: only what a peer does not take at once is kept.

use std::cell::{Cell, RefCell};
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

/// Read from a socket at once, at first.
const READ_BYTES_MIN: usize = 64 * 1024;
/// The same for a direction that has shown it can use it. A read acknowledges, and a write wakes the peer: that is most of what
/// bulk data costs, and a quarter of it goes when there are eight times fewer of them.
const READ_BYTES_MAX: usize = 512 * 1024;
/// Read in one direction before other connections get their turn.
const TURN_BYTES_MAX: usize = READ_BYTES_MAX;
/// Kept for peers that do not take it, in all connections of a worker, before every read is as small as at first. Without
/// it, slow readers would hold the largest read each.
const KEPT_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What a worker's connections share: buffers, borrowed only inside one poll, and how much they all keep for slow peers.
pub struct Scratch {
    buffers: RefCell<Buffers>,
    kept_bytes: Cell<usize>,
}

struct Buffers {
    /// As read from a socket. Never resized, like `output`.
    input: Vec<u8>,
    decrypted: Vec<u8>,
    /// Encrypted, for a socket.
    output: Vec<u8>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            buffers: RefCell::new(Buffers {
                input: vec![0; UNPROCESSED_MAX + READ_BYTES_MAX],
                decrypted: Vec::new(),
                // What a read completes can be more than was read: a part of a record was there before.
                output: vec![0; ciphertext_max(UNPROCESSED_MAX + READ_BYTES_MAX) + ciphertext_max(0)],
            }),
            kept_bytes: Cell::new(0),
        }
    }
}

impl Scratch {
    /// Lends a buffer for one read that does not wait.
    pub fn with_input<T>(&self, read: impl FnOnce(&mut [u8]) -> T) -> T {
        read(&mut self.buffers.borrow_mut().input[..READ_BYTES_MIN])
    }

    fn read_bytes(&self, direction: &Direction) -> usize {
        if self.kept_bytes.get() < KEPT_BYTES_MAX { direction.read_bytes } else { READ_BYTES_MIN }
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

/// Where bytes are counted: for the listener, and for the connection.
#[derive(Clone, Copy)]
pub struct Meter<'a> {
    pub all: &'a RelayBytes,
    pub own: &'a RelayBytes,
}

impl Meter<'_> {
    fn count(self, way: Way, bytes: usize) {
        for counted in [self.all, self.own] {
            let counter = match way {
                Way::ToUpstream => &counted.to_upstream,
                Way::ToClient => &counted.to_client,
            };
            counter.add(bytes as u64);
        }
    }
}

/// One end of a relay.
pub struct End<'a> {
    pub stream: &'a Stream,
    /// None: plaintext.
    pub tls: Option<Tls>,
}

/// What one end has said before the relay begins.
#[derive(Default)]
pub struct Said {
    /// For the other end, before all that is still to come. Plaintext.
    pub bytes: Vec<u8>,
    /// How many of `bytes` are a PROXY header, which is not the client's and not counted.
    pub header_bytes: usize,
    /// How many of `bytes` the other end has already.
    pub taken: usize,
    /// Nothing more comes from this end.
    pub ended: bool,
}

/// Relays until both directions have ended or a deadline passes.
pub async fn relay(
    client: End<'_>,
    by_client: Said,
    upstream: End<'_>,
    by_upstream: Said,
    deadlines: RelayDeadlines,
    scratch: &Scratch,
    meter: Meter<'_>,
) -> Close {
    let mut relay = Relay {
        client,
        upstream,
        scratch,
        meter,
        to_upstream: Direction::default(),
        to_client: Direction::default(),
        client_truncated: false,
        upstream_cut: false,
        upstream_reset: false,
        first_ended: None,
        last_byte_at: Instant::now(),
        kept_bytes: 0,
    };
    if let Err(close) =
        relay.begin(Way::ToUpstream, by_client).and_then(|()| relay.begin(Way::ToClient, by_upstream))
    {
        return close;
    }
    let mut timer = pin!(sleep_until(relay.deadline(deadlines).0));
    poll_fn(|context| {
        let polled = relay.poll(context);
        relay.account();
        if let Poll::Ready(close) = polled {
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    ToUpstream,
    ToClient,
}

struct Relay<'a> {
    client: End<'a>,
    upstream: End<'a>,
    scratch: &'a Scratch,
    meter: Meter<'a>,
    to_upstream: Direction,
    to_client: Direction,
    /// The client speaks TLS and ended without close_notify (RFC 8446 6.1).
    client_truncated: bool,
    /// The upstream's last words may be missing: the client must not be told that they were the last.
    upstream_cut: bool,
    /// The upstream ended by a reset, noticed while reading from it or writing to it.
    upstream_reset: bool,
    first_ended: Option<Close>,
    last_byte_at: Instant,
    /// This connection's part of `Scratch::kept_bytes`.
    kept_bytes: usize,
}

struct Direction {
    state: DirectionState,
    /// What the destination has not taken yet, from `written` on. Empty and without memory most of the time.
    pending: Vec<u8>,
    written: usize,
    /// Doubled by a turn in which the source had that much all the time and the destination took it; halved when the
    /// destination did not.
    read_bytes: usize,
}

impl Default for Direction {
    fn default() -> Self {
        Self { state: DirectionState::Open, pending: Vec::new(), written: 0, read_bytes: READ_BYTES_MIN }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DirectionState {
    Open,
    /// The source has ended; `pending` and the end itself are still to be handed on.
    Ended,
    /// The upstream takes nothing any more. What the client still sends is read and thrown away until it ends: a socket
    /// that is closed with unread bytes resets the connection, and the client would lose the answer that it has not read yet.
    Refused,
    Finished,
}

impl<'a> Relay<'a> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Close> {
        let to_upstream = self.poll_way(Way::ToUpstream, context);
        if let Poll::Ready(Err(close)) = to_upstream {
            return Poll::Ready(self.cause_of(close));
        }
        let to_client = self.poll_way(Way::ToClient, context);
        if let Poll::Ready(Err(close)) = to_client {
            return Poll::Ready(self.cause_of(close));
        }
        if to_upstream.is_ready() && to_client.is_ready() {
            return Poll::Ready(self.first_ended.unwrap_or(Close::ClientRelayClosed));
        }
        Poll::Pending
    }

    /// Clients complain about the missing close_notify after the upstream's reset, with an alert or a reset of their own.
    fn cause_of(&self, close: Close) -> Close {
        if self.upstream_reset { Close::UpstreamRelayReset } else { close }
    }

    /// Where bytes come from, where they go, and what is between.
    fn split(&mut self, way: Way) -> (&mut End<'a>, &mut End<'a>, &mut Direction) {
        match way {
            Way::ToUpstream => (&mut self.client, &mut self.upstream, &mut self.to_upstream),
            Way::ToClient => (&mut self.upstream, &mut self.client, &mut self.to_client),
        }
    }

    /// Takes up what a source has said before.
    fn begin(&mut self, way: Way, said: Said) -> Result<(), Close> {
        let Said { bytes, header_bytes, taken, ended } = said;
        self.meter.count(way, bytes.len() - header_bytes);
        let is_whole = ended && self.ended(way, SourceEnd::Closed);
        let (_, sink, direction) = self.split(way);
        let Some(tls) = &mut sink.tls else {
            direction.pending = bytes;
            direction.written = taken;
            return Ok(());
        };
        if bytes.is_empty() && !is_whole {
            return Ok(());
        }
        let mut encrypted = vec![0; ciphertext_max(bytes.len()) + ciphertext_max(0)];
        let used = seal(tls, &bytes, is_whole, &mut encrypted).map_err(|_| way.sink_is_broken())?;
        direction.pending = tls.take_to_peer();
        direction.pending.extend_from_slice(&encrypted[..used]);
        Ok(())
    }

    fn poll_way(&mut self, way: Way, context: &mut Context<'_>) -> Poll<Result<(), Close>> {
        let mut received = 0;
        while received < TURN_BYTES_MAX {
            self.queue_own_records(way);
            if ready!(self.poll_flush(way, context)).is_err() {
                self.refused_by_sink(way)?;
            }
            match (self.split(way).2.state, way) {
                (DirectionState::Finished, _) => return Poll::Ready(Ok(())),
                (DirectionState::Open, _) | (DirectionState::Refused, Way::ToUpstream) => {
                    received += ready!(self.poll_read(way, context))?;
                }
                (DirectionState::Ended, Way::ToUpstream) => {
                    // Closing says it as well, and that is next when the other direction has finished. An upstream that is gone
                    // already has ended the other direction; that is where it is noticed.
                    if self.to_client.state != DirectionState::Finished {
                        let _ = self.upstream.stream.shutdown_write();
                    }
                    self.to_upstream.state = DirectionState::Finished;
                }
                // Not Refused: a client that takes nothing any more ends the connection.
                (DirectionState::Ended | DirectionState::Refused, Way::ToClient) => {
                    let _ = self.client.stream.shutdown_write();
                    self.to_client.state = DirectionState::Finished;
                }
            }
        }
        self.split(way).2.read_more();
        context.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_flush(&mut self, way: Way, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut last_byte_at = self.last_byte_at;
        let (_, sink, direction) = self.split(way);
        let flushed = direction.poll_flush(context, sink.stream, &mut last_byte_at);
        self.last_byte_at = last_byte_at;
        flushed
    }

    /// One read from the source, handed on to the sink in its own terms; with the end, when that is known already. How many
    /// bytes it was.
    fn poll_read(&mut self, way: Way, context: &mut Context<'_>) -> Poll<Result<usize, Close>> {
        let scratch = self.scratch;
        let mut buffers = scratch.buffers.borrow_mut();
        let Buffers { input, decrypted, output } = &mut *buffers;
        let (source, _, direction) = self.split(way);
        let read_bytes = scratch.read_bytes(direction);
        let Received { bytes, end } = match ready!(source.poll_receive(context, input, decrypted, read_bytes))
        {
            Ok(received) => received,
            Err(error) => return Poll::Ready(Err(self.broken_by_source(way, error.as_ref()))),
        };
        let plaintext = if source.tls.is_some() { &decrypted[..] } else { &input[..bytes] };
        if let Some(SourceEnd::Reset) = end
            && way == Way::ToUpstream
        {
            return Poll::Ready(Err(self.client_reset()));
        }
        // What a client sends to an upstream that takes nothing any more is thrown away.
        let is_open = direction.state == DirectionState::Open;
        let is_whole = end.is_some_and(|end| self.ended(way, end));
        if !is_open {
            return Poll::Ready(Ok(bytes));
        }
        if !plaintext.is_empty() {
            self.last_byte_at = Instant::now();
            self.meter.count(way, plaintext.len());
        }
        let (_, sink, direction) = self.split(way);
        let written = match &mut sink.tls {
            None => direction.write(sink.stream, plaintext, &[], end.is_some()),
            Some(tls) => {
                let used = seal(tls, plaintext, is_whole, output).map_err(|_| way.sink_is_broken())?;
                direction.write(sink.stream, &tls.take_to_peer(), &output[..used], end.is_some())
            }
        };
        if written.is_err() {
            drop(buffers);
            self.refused_by_sink(way)?;
        }
        Poll::Ready(Ok(bytes))
    }

    /// The source of this direction has ended; whether the sink may be told that nothing is missing.
    fn ended(&mut self, way: Way, end: SourceEnd) -> bool {
        match (way, end) {
            (Way::ToUpstream, _) => {
                let close = match end {
                    SourceEnd::Closed => Close::ClientRelayClosed,
                    SourceEnd::Truncated | SourceEnd::Reset => {
                        self.client_truncated = true;
                        Close::ClientRelayTruncated
                    }
                };
                self.first_ended.get_or_insert(close);
                self.to_upstream.state = match self.to_upstream.state {
                    DirectionState::Refused => DirectionState::Finished,
                    _ => DirectionState::Ended,
                };
                !self.client_truncated
            }
            (Way::ToClient, SourceEnd::Reset) => {
                self.refuse_to_upstream();
                self.to_client.state = DirectionState::Ended;
                false
            }
            (Way::ToClient, _) => {
                let close = match end {
                    SourceEnd::Truncated => {
                        self.upstream_cut = true;
                        Close::UpstreamRelayTruncated
                    }
                    _ => Close::UpstreamRelayClosed,
                };
                self.first_ended.get_or_insert(close);
                self.to_client.state = DirectionState::Ended;
                // After a reset nobody knows whether the answer was whole. One that was noticed in writing reads like an
                // end: an error is told once.
                !self.upstream_cut
            }
        }
    }

    /// The sink takes nothing any more.
    fn refused_by_sink(&mut self, way: Way) -> Result<(), Close> {
        match way {
            Way::ToUpstream => {
                self.refuse_to_upstream();
                Ok(())
            }
            Way::ToClient => Err(self.client_reset()),
        }
    }

    /// The upstream has reset the connection.
    fn refuse_to_upstream(&mut self) {
        self.upstream_reset = true;
        self.upstream_cut = true;
        self.first_ended.get_or_insert(Close::UpstreamRelayReset);
        self.to_upstream.forget_pending();
        self.to_upstream.state = match self.to_upstream.state {
            DirectionState::Open | DirectionState::Refused => DirectionState::Refused,
            DirectionState::Ended | DirectionState::Finished => DirectionState::Finished,
        };
    }

    /// Sends the alert that rustls has made of the source's fault, unless it would cut a record in two.
    /// `error`: None for a message that is too large to be looked at.
    fn broken_by_source(&mut self, way: Way, error: Option<&rustls::Error>) -> Close {
        let (end, sink, back) = match way {
            Way::ToUpstream => (&mut self.client, &self.upstream, &self.to_client),
            Way::ToClient => (&mut self.upstream, &self.client, &self.to_upstream),
        };
        // Without TLS there is no other way to say that this is no end.
        if sink.tls.is_none() {
            sink.stream.reset_when_dropped();
        }
        let alert = end.tls.as_mut().map(Tls::take_to_peer).unwrap_or_default();
        if back.pending.is_empty() {
            let _ = end.stream.try_write(&alert);
        }
        match (way, error) {
            (Way::ToUpstream, Some(rustls::Error::AlertReceived(_))) => Close::ClientRelayAlert,
            (Way::ToUpstream, _) => Close::ClientRelayProtocolError,
            (Way::ToClient, Some(rustls::Error::AlertReceived(_))) => Close::UpstreamRelayAlert,
            (Way::ToClient, _) => Close::UpstreamRelayProtocolError,
        }
    }

    /// Tickets, key updates and alerts go behind what is pending already.
    fn queue_own_records(&mut self, way: Way) {
        let (_, sink, direction) = self.split(way);
        let Some(tls) = &mut sink.tls else { return };
        let own = tls.take_to_peer();
        // After close_notify there is nothing more to say (RFC 8446 6.1).
        if !own.is_empty() && direction.state == DirectionState::Open {
            direction.pending.extend_from_slice(&own);
        }
    }

    /// Keeps `Scratch::kept_bytes` true.
    fn account(&mut self) {
        let kept_bytes = self.to_upstream.pending.capacity() + self.to_client.pending.capacity();
        self.scratch.kept_bytes.update(|all| all - self.kept_bytes + kept_bytes);
        self.kept_bytes = kept_bytes;
    }

    fn client_reset(&self) -> Close {
        if self.client_truncated { Close::ClientRelayTruncated } else { Close::ClientRelayReset }
    }

    /// The nearest deadline and what it means when it passes.
    fn deadline(&self, deadlines: RelayDeadlines) -> (Instant, Close) {
        let quiet = if self.first_ended.is_some() {
            let close = if self.upstream_reset {
                Close::UpstreamRelayReset
            } else {
                Close::ProxyRelayHalfClosedDeadline
            };
            (self.last_byte_at + deadlines.half_closed, close)
        } else {
            (self.last_byte_at + deadlines.idle, Close::ProxyRelayIdleDeadline)
        };
        match deadlines.lifetime_until {
            Some(until) if until < quiet.0 => (until, Close::ProxyRelayLifetimeDeadline),
            _ => quiet,
        }
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        self.scratch.kept_bytes.update(|all| all - self.kept_bytes);
    }
}

impl Direction {
    /// Writes what is pending; Ready when nothing is.
    fn poll_flush(
        &mut self,
        context: &mut Context<'_>,
        destination: &Stream,
        last_byte_at: &mut Instant,
    ) -> Poll<io::Result<()>> {
        while self.written < self.pending.len() {
            match destination.try_write(&self.pending[self.written..]) {
                Ok(written) => {
                    self.written += written;
                    *last_byte_at = Instant::now(); // a slow reader is not an idle one
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ready!(destination.poll_write_ready(context))?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        self.forget_pending();
        Poll::Ready(Ok(()))
    }

    /// After a turn that ended only because others must have theirs.
    fn read_more(&mut self) {
        self.read_bytes = (self.read_bytes * 2).min(READ_BYTES_MAX);
    }

    fn forget_pending(&mut self) {
        self.pending = Vec::new();
        self.written = 0;
    }

    /// Offers `first` then `second` to the destination and keeps what it does not take. Nothing is pending before.
    /// `is_last`: `shutdown_write` follows as soon as nothing is pending.
    fn write(&mut self, destination: &Stream, first: &[u8], second: &[u8], is_last: bool) -> io::Result<()> {
        let mut taken = 0;
        let whole = first.len() + second.len();
        while taken < whole {
            let (rest, next) = if taken < first.len() {
                (&first[taken..], second)
            } else {
                (&second[taken - first.len()..], &[][..])
            };
            let slices = [io::IoSlice::new(rest), io::IoSlice::new(next)];
            let offered = match is_last {
                true => destination.try_write_last(&slices),
                false => destination.try_write_vectored(&slices),
            };
            match offered {
                Ok(written) => taken += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.pending.extend_from_slice(rest);
                    self.pending.extend_from_slice(next);
                    self.read_bytes = (self.read_bytes / 2).max(READ_BYTES_MIN);
                    break;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourceEnd {
    /// As it should.
    Closed,
    /// By TCP alone, where TLS would have said so.
    Truncated,
    Reset,
}

/// What one read has brought.
struct Received {
    /// From the socket.
    bytes: usize,
    end: Option<SourceEnd>,
}

impl Way {
    /// A defect rather than the peer's doing: rustls does not encrypt any more.
    fn sink_is_broken(self) -> Close {
        match self {
            Way::ToUpstream => Close::UpstreamRelayProtocolError,
            Way::ToClient => Close::ClientRelayProtocolError,
        }
    }
}

impl End<'_> {
    /// Reads once. Plaintext is in `input` where there is no TLS, and in `decrypted` where there is.
    ///
    /// # Errors
    /// The peer broke TLS; None: with a message that is too large to be looked at.
    fn poll_receive(
        &mut self,
        context: &mut Context<'_>,
        input: &mut [u8],
        decrypted: &mut Vec<u8>,
        read_bytes: usize,
    ) -> Poll<Result<Received, Option<rustls::Error>>> {
        let Some(tls) = &mut self.tls else {
            let (bytes, end) = ready!(poll_read_and_end(context, self.stream, &mut input[..read_bytes]));
            return Poll::Ready(Ok(Received { bytes, end }));
        };
        decrypted.clear();
        let kept = tls.unprocessed().len();
        let bytes = match ready!(poll_read(context, self.stream, &mut input[kept..kept + read_bytes])) {
            Ok(0) => return Poll::Ready(Ok(Received { bytes: 0, end: Some(SourceEnd::Truncated) })),
            Ok(bytes) => bytes,
            Err(_) => return Poll::Ready(Ok(Received { bytes: 0, end: Some(SourceEnd::Reset) })),
        };
        input[..kept].copy_from_slice(tls.unprocessed());
        let phase = tls.process(&mut input[..kept + bytes], decrypted)?;
        if tls.unprocessed().len() > UNPROCESSED_MAX {
            return Poll::Ready(Err(None));
        }
        tls.release_buffers();
        let end = (phase == TlsPhase::PeerClosed).then_some(SourceEnd::Closed);
        Poll::Ready(Ok(Received { bytes, end }))
    }
}

/// Encrypts into `out`, with close_notify behind it when nothing more comes; how many bytes that makes.
fn seal(tls: &mut Tls, plaintext: &[u8], is_last: bool, out: &mut [u8]) -> Result<usize, rustls::Error> {
    let mut used = 0;
    if !plaintext.is_empty() {
        used = tls.encrypt(plaintext, out)?;
    }
    if is_last {
        used += tls.close_notify(&mut out[used..]).unwrap_or(0);
    }
    Ok(used)
}

/// Reads once, and looks for the end behind it: what a server sends before it closes goes out in one segment with
/// close_notify and the end, and the other two of three segments are spared. An error is kept until what came before it was handed on.
fn poll_read_and_end(
    context: &mut Context<'_>,
    source: &Stream,
    buffer: &mut [u8],
) -> Poll<(usize, Option<SourceEnd>)> {
    let mut received = 0;
    while received < buffer.len() {
        match poll_read(context, source, &mut buffer[received..]) {
            Poll::Pending if received == 0 => return Poll::Pending,
            Poll::Pending => break,
            Poll::Ready(Ok(0)) => return Poll::Ready((received, Some(SourceEnd::Closed))),
            Poll::Ready(Ok(more)) => received += more,
            Poll::Ready(Err(_)) => return Poll::Ready((received, Some(SourceEnd::Reset))),
        }
    }
    Poll::Ready((received, None))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access_log::Facts;
    use crate::handshake::handshake;
    use crate::tls::tests::configured;
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::thread::JoinHandle;
    use tokio::net::{TcpListener, TcpStream};

    const SHORT: Duration = Duration::from_secs(5);

    /// A blocking end for the test's threads, and the relay's end.
    async fn connected() -> (std::net::TcpStream, Stream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let there = TcpStream::connect(address).await.expect("listening").into_std().expect("a socket");
        there.set_nonblocking(false).expect("a socket");
        let (here, _) = listener.accept().await.expect("connected");
        (there, here.into())
    }

    type TlsClient = rustls::StreamOwned<rustls::ClientConnection, std::net::TcpStream>;

    /// Relays between `client` and `upstream`, each on a thread of its own.
    fn relayed<C: Send + 'static, U: Send + 'static>(
        client: impl FnOnce(TlsClient) -> C + Send + 'static,
        upstream: impl FnOnce(std::net::TcpStream) -> U + Send + 'static,
        deadlines: RelayDeadlines,
    ) -> (Close, C, U) {
        relayed_after(b"", client, upstream, deadlines)
    }

    /// The same, and `first` is what the client has said already when the relay begins.
    fn relayed_after<C: Send + 'static, U: Send + 'static>(
        first: &[u8],
        client: impl FnOnce(TlsClient) -> C + Send + 'static,
        upstream: impl FnOnce(std::net::TcpStream) -> U + Send + 'static,
        deadlines: RelayDeadlines,
    ) -> (Close, C, U) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (close, client, upstream) = runtime.block_on(async {
            let (client_there, client_here) = connected().await;
            let (upstream_there, upstream_here) = connected().await;
            let (config, tls_client) = configured("1.3", "X25519");
            let client: JoinHandle<C> =
                std::thread::spawn(move || client(rustls::StreamOwned::new(tls_client, client_there)));
            let upstream: JoinHandle<U> = std::thread::spawn(move || upstream(upstream_there));
            let scratch = Scratch::default();
            let established =
                handshake(&client_here, config, Instant::now() + SHORT, &scratch, &mut Facts::default())
                    .await
                    .unwrap_or_else(|close| panic!("the handshake ended: {close:?}"));
            let (all, own) = (RelayBytes::default(), RelayBytes::default());
            let said = [first, &established.leftover.plaintext].concat();
            let close = relay(
                End { stream: &client_here, tls: Some(established.tls) },
                Said { bytes: said, ..Said::default() },
                End { stream: &upstream_here, tls: None },
                Said::default(),
                deadlines,
                &scratch,
                Meter { all: &all, own: &own },
            )
            .await;
            assert_eq!(all.to_client.get(), own.to_client.get());
            assert_eq!(scratch.kept_bytes.get(), 0, "what an ended connection kept is still accounted for");
            (close, client, upstream)
        });
        (close, client.join().expect("a client"), upstream.join().expect("an upstream"))
    }

    const PATIENT: RelayDeadlines = RelayDeadlines { idle: SHORT, half_closed: SHORT, lifetime_until: None };

    #[test]
    fn an_answer_arrives_whole_although_the_upstream_stopped_taking_the_request() {
        const ANSWER_BYTES: usize = 1_000_000;
        let (close, received, ()) = relayed(
            |mut client| {
                let piece = [1; 16_384];
                let mut sent = 0;
                // Far more than the upstream and all buffers between take.
                while sent < 32 << 20 && client.write_all(&piece).is_ok() {
                    sent += piece.len();
                }
                let mut received = Vec::new();
                let _ = client.read_to_end(&mut received); // a reset upstream is not told to be complete
                received.len()
            },
            |mut upstream| {
                let mut first = [0; 1];
                upstream.read_exact(&mut first).expect("a request");
                upstream.write_all(&vec![2; ANSWER_BYTES]).expect("room");
                // Closing with unread bytes resets the connection, as a server does that refuses a body; its kernel would
                // throw away what the relay's kernel has not taken yet.
                while unacknowledged_bytes(&upstream) > 0 {
                    std::thread::yield_now();
                }
            },
            PATIENT,
        );
        assert_eq!(received, ANSWER_BYTES);
        assert!(matches!(close, Close::UpstreamRelayReset | Close::ClientRelayTruncated), "{close:?}");
    }

    #[test]
    fn reads_grow_while_the_destination_takes_them_and_shrink_when_it_does_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (_there, here) = connected().await;
            let scratch = Scratch::default();
            let mut direction = Direction::default();
            assert_eq!(scratch.read_bytes(&direction), READ_BYTES_MIN);
            for _ in 0..10 {
                direction.read_more();
            }
            assert_eq!(scratch.read_bytes(&direction), READ_BYTES_MAX);
            while direction.pending.is_empty() {
                direction.write(&here, &[0; READ_BYTES_MAX], &[], false).expect("connected");
            }
            assert_eq!(scratch.read_bytes(&direction), READ_BYTES_MAX / 2);
        });
    }

    #[test]
    fn when_slow_peers_hold_much_memory_every_read_is_small() {
        let scratch = Scratch::default();
        let direction = Direction { read_bytes: READ_BYTES_MAX, ..Direction::default() };
        scratch.kept_bytes.set(KEPT_BYTES_MAX - 1);
        assert_eq!(scratch.read_bytes(&direction), READ_BYTES_MAX);
        scratch.kept_bytes.set(KEPT_BYTES_MAX);
        assert_eq!(scratch.read_bytes(&direction), READ_BYTES_MIN);
    }

    fn unacknowledged_bytes(socket: &std::net::TcpStream) -> i32 {
        use std::os::fd::AsRawFd;
        let mut bytes = 0;
        // SAFETY: TIOCOUTQ writes one int, and the descriptor is open.
        assert_eq!(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) }, 0);
        bytes
    }

    #[test]
    fn the_last_bytes_and_the_end_come_in_one_segment() {
        let (close, (answer, segments), ()) = relayed(
            |mut client| {
                let mut greeting = [0; 5];
                client.read_exact(&mut greeting).expect("a greeting");
                let before = segments_with_data(client.get_ref());
                client.write_all(b"request").expect("established");
                let mut answer = Vec::new();
                client.read_to_end(&mut answer).expect("an end with close_notify");
                (answer, segments_with_data(client.get_ref()) - before)
            },
            |mut upstream| {
                upstream.write_all(b"hello").expect("open");
                upstream.read_exact(&mut [0; 7]).expect("a request");
                let flags = libc::MSG_MORE; // so that the relay sees both at once
                socket2::SockRef::from(&upstream).send_with_flags(b"answer", flags).expect("room");
                upstream.shutdown(Shutdown::Write).expect("open");
            },
            PATIENT,
        );
        assert_eq!((answer.as_slice(), segments), (&b"answer"[..], 1));
        assert_eq!(close, Close::UpstreamRelayClosed);
    }

    /// `tcpi_data_segs_in` of linux/tcp.h, which libc does not know.
    fn segments_with_data(socket: &std::net::TcpStream) -> u32 {
        use std::os::fd::AsRawFd;
        let mut info = [0_u32; 64];
        let mut bytes = size_of_val(&info) as libc::socklen_t;
        // SAFETY: `info` has room for `bytes` bytes and any bytes make it valid; the descriptor is open.
        let got = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        assert!(got == 0 && bytes >= 156, "{bytes} bytes");
        info[152 / 4]
    }

    #[test]
    fn what_the_upstream_sent_before_its_reset_arrives_and_is_not_said_to_be_whole() {
        // A write that fails takes the error from the socket, which then reads like one that was closed.
        for (noticed_by, first) in [("reading", &b""[..]), ("writing", b"request")] {
            let (reset, was_reset) = std::sync::mpsc::channel();
            let (close, (answer, ended), ()) = relayed_after(
                first,
                move |mut client| {
                    // The relay begins after the handshake, and finds both at once.
                    was_reset.recv().expect("an upstream");
                    let mut answer = Vec::new();
                    let ended = client.read_to_end(&mut answer).map_err(|error| error.kind());
                    (answer, ended)
                },
                move |mut upstream| {
                    upstream.write_all(b"half an ans").expect("open");
                    socket2::SockRef::from(&upstream).set_linger(Some(Duration::ZERO)).expect("open");
                    drop(upstream);
                    reset.send(()).expect("a client");
                },
                PATIENT,
            );
            assert_eq!(answer, b"half an ans", "noticed by {noticed_by}");
            assert_eq!(ended, Err(ErrorKind::UnexpectedEof), "noticed by {noticed_by}");
            assert_eq!(close, Close::UpstreamRelayReset, "noticed by {noticed_by}");
        }
    }

    #[test]
    fn each_half_can_be_closed_while_the_other_goes_on() {
        let (close, (answer, ended), request) = relayed(
            |mut client| {
                client.write_all(b"request").expect("established");
                client.conn.send_close_notify();
                client.flush().expect("established");
                let mut answer = Vec::new();
                let ended = client.read_to_end(&mut answer).is_ok(); // an error without close_notify
                (answer, ended)
            },
            |mut upstream| {
                let mut request = Vec::new();
                upstream.read_to_end(&mut request).expect("the client's end");
                upstream.write_all(b"answer").expect("the other half is open");
                upstream.shutdown(Shutdown::Write).expect("open");
                request
            },
            PATIENT,
        );
        assert_eq!((request.as_slice(), answer.as_slice(), ended), (&b"request"[..], &b"answer"[..], true));
        assert_eq!(close, Close::ClientRelayClosed);
    }

    #[test]
    fn a_connection_without_a_byte_ends_at_the_idle_deadline() {
        let idle = RelayDeadlines { idle: Duration::from_millis(50), ..PATIENT };
        let (close, (), ()) = relayed(
            |mut client| drop(client.read(&mut [0; 1])),
            |mut upstream| drop(upstream.read(&mut [0; 1])),
            idle,
        );
        assert_eq!(close, Close::ProxyRelayIdleDeadline);
    }

    #[test]
    fn a_half_closed_connection_ends_at_its_own_deadline() {
        let half_closed = RelayDeadlines { half_closed: Duration::from_millis(50), ..PATIENT };
        let (close, (), _still_open) = relayed(
            |mut client| {
                client.conn.complete_io(&mut client.sock).expect("a handshake");
                client.conn.send_close_notify();
                client.flush().expect("established");
                let _ = client.read(&mut [0; 1]);
            },
            |mut upstream| {
                assert_eq!(upstream.read(&mut [0; 1]).expect("the client's end"), 0);
                upstream
            },
            half_closed,
        );
        assert_eq!(close, Close::ProxyRelayHalfClosedDeadline);
    }

    #[test]
    fn a_busy_connection_ends_at_its_lifetime() {
        let lifetime =
            RelayDeadlines { lifetime_until: Some(Instant::now() + Duration::from_millis(300)), ..PATIENT };
        let (close, (), ()) = relayed(
            |mut client| while client.write_all(b"x").is_ok() {},
            |mut upstream| while matches!(upstream.read(&mut [0; 4096]), Ok(1..)) {},
            lifetime,
        );
        assert_eq!(close, Close::ProxyRelayLifetimeDeadline);
    }
}
