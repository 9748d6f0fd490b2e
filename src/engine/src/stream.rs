//! Owns one connected byte stream, client or upstream side, TCP or Unix: reads and writes that never wait, readiness,
//! half-close and abortive close. Knows nothing of TLS, of buffers or of who is at the other end.
//! Runs on the I/O thread.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// A connected byte stream. `&Stream` is also `std::io::Read` and `Write`, answering `WouldBlock` where it would
/// wait, which is what `rustls::Connection::read_tls` and `write_tls` ask for.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Bytes read; 0 when the peer has closed its direction. `WouldBlock` clears the readiness, and so does a read that
    /// did not fill the buffer: the socket is empty then, and finding that out by another read would cost a system call
    /// each time. What comes later is an edge of its own (epoll(7)), and the peer's close is kept apart by tokio.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut short = None;
        let read = || {
            let read = (&*self.socket()).read(buffer)?;
            if 0 < read && read < buffer.len() {
                short = Some(read);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(read)
        };
        let result = match self {
            Stream::Tcp(tcp) => tcp.try_io(Interest::READABLE, read),
            Stream::Unix(unix) => unix.try_io(Interest::READABLE, read),
        };
        short.map_or(result, Ok)
    }

    /// As `try_read`, but the bytes stay where they are; nothing is said about the readiness unless there is nothing.
    pub fn try_peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let flags = libc::MSG_PEEK;
        // SAFETY: initialised bytes are initialised bytes also as `MaybeUninit`, and recv writes bytes only.
        let room = unsafe { &mut *(std::ptr::from_mut(buffer) as *mut [MaybeUninit<u8>]) };
        let peek = || self.socket().recv_with_flags(room, flags);
        match self {
            Stream::Tcp(tcp) => tcp.try_io(Interest::READABLE, peek),
            Stream::Unix(unix) => unix.try_io(Interest::READABLE, peek),
        }
    }

    /// Bytes written, which may be fewer than given. `WouldBlock` clears the readiness.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(tcp) => tcp.try_write(bytes),
            Stream::Unix(unix) => unix.try_write(bytes),
        }
    }

    /// As `try_write`, in one system call for all of `slices`.
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Tcp(tcp) => tcp.try_write_vectored(slices),
            Stream::Unix(unix) => unix.try_write_vectored(slices),
        }
    }

    /// As `try_write_vectored`, for the last bytes before `shutdown_write`: the kernel keeps what does not fill a segment, so
    /// that it goes out in one segment with the end. Whoever does not shut down after all delays it by 200 ms (tcp(7)).
    pub fn try_write_last(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let write = || self.socket().send_vectored_with_flags(slices, libc::MSG_MORE | libc::MSG_NOSIGNAL);
        match self {
            Stream::Tcp(tcp) => tcp.try_io(Interest::WRITABLE, write),
            Stream::Unix(unix) => unix.try_io(Interest::WRITABLE, write),
        }
    }

    /// Ready when a read is worth a try: bytes, the peer's close, or an error. One task at a time may wait.
    pub fn poll_read_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Tcp(tcp) => tcp.poll_read_ready(context),
            Stream::Unix(unix) => unix.poll_read_ready(context),
        }
    }

    /// Ready when a write is worth a try: room, or an error. One task at a time may wait.
    pub fn poll_write_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Tcp(tcp) => tcp.poll_write_ready(context),
            Stream::Unix(unix) => unix.poll_write_ready(context),
        }
    }

    /// Looks at the next bytes, when there are any, without taking them; 0 when the peer has closed its direction.
    pub fn poll_peek(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_read_ready(context))?;
            match self.try_peek(buffer) {
                // The readiness was out of date, and is cleared.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                peeked => return Poll::Ready(peeked),
            }
        }
    }

    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(tcp) => tcp.readable().await,
            Stream::Unix(unix) => unix.readable().await,
        }
    }

    pub async fn writable(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(tcp) => tcp.writable().await,
            Stream::Unix(unix) => unix.writable().await,
        }
    }

    /// Half-close: the peer reads to the end of what was written and then sees the close; we can go on reading.
    /// `NotConnected` when the peer has already reset the connection.
    pub fn shutdown_write(&self) -> io::Result<()> {
        self.socket().shutdown(Shutdown::Write)
    }

    /// Closes at once and throws away what the peer has not taken yet: over TCP it sees a reset instead of an end,
    /// so it cannot mistake a cut-off transfer for a complete one, and no TIME_WAIT stays here. A Unix socket knows
    /// no reset and just closes.
    pub fn abort(self) {
        self.reset_when_dropped();
    }

    /// What `abort` does at once, for whoever does not own it.
    pub fn reset_when_dropped(&self) {
        if let Stream::Tcp(_) = self {
            // A socket that cannot be given this option is already closed by its peer: dropping it is all there is to do.
            let _ = self.socket().set_linger(Some(Duration::ZERO));
        }
    }

    /// TCP_NODELAY, without which a TLS record waits for the acknowledgement of the one before. Nothing to do for Unix.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        match self {
            Stream::Tcp(tcp) => tcp.set_nodelay(nodelay),
            Stream::Unix(_) => Ok(()),
        }
    }

    /// None for Unix. An error is not None: who took "unknown" for "local" would tell the upstream that a client whose
    /// connection broke early came from this host.
    pub fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        match self {
            Stream::Tcp(tcp) => tcp.local_addr().map(Some),
            Stream::Unix(_) => Ok(None),
        }
    }

    /// None for Unix. As with `local_addr`, an error (`NotConnected` after a reset) is not None.
    pub fn peer_addr(&self) -> io::Result<Option<SocketAddr>> {
        match self {
            Stream::Tcp(tcp) => tcp.peer_addr().map(Some),
            Stream::Unix(_) => Ok(None),
        }
    }

    fn socket(&self) -> SockRef<'_> {
        match self {
            Stream::Tcp(tcp) => SockRef::from(tcp),
            Stream::Unix(unix) => SockRef::from(unix),
        }
    }
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Self {
        Stream::Tcp(tcp)
    }
}

impl From<UnixStream> for Stream {
    fn from(unix: UnixStream) -> Self {
        Stream::Unix(unix)
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read(buffer)
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::ErrorKind;
    use std::net::Ipv4Addr;
    use std::task::Waker;

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn after_a_half_close_the_peer_sees_the_end_and_can_still_answer() {
        for (here, there) in [tcp_pair().await, unix_pair()] {
            assert_eq!((&here).write(b"question").unwrap(), 8);
            here.shutdown_write().unwrap();
            assert_eq!(read_to_end(&there).await.unwrap(), b"question");
            assert_eq!(there.try_write(b"answer").unwrap(), 6);
            drop(there);
            assert_eq!(read_to_end(&here).await.unwrap(), b"answer");
        }
    }

    #[tokio::test]
    async fn after_an_abort_the_peer_sees_a_reset_and_not_an_end() {
        let (here, there) = tcp_pair().await;
        here.abort();
        assert_eq!(read_to_end(&there).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn an_aborted_unix_stream_is_closed() {
        let (here, there) = unix_pair();
        here.abort();
        assert_eq!(read_to_end(&there).await.unwrap(), b"");
    }

    #[tokio::test]
    async fn a_read_that_would_wait_says_so() {
        for (here, _there) in [tcp_pair().await, unix_pair()] {
            assert_eq!((&here).read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
        }
    }

    #[tokio::test]
    async fn what_was_looked_at_is_still_there() {
        for (here, there) in [tcp_pair().await, unix_pair()] {
            assert_eq!(here.try_peek(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
            there.try_write(b"bytes").unwrap();
            here.readable().await.unwrap();
            let mut buffer = [0; 16];
            assert_eq!(here.try_peek(&mut buffer).unwrap(), 5);
            assert_eq!(here.try_read(&mut buffer[..2]).unwrap(), 2);
            assert_eq!(here.try_peek(&mut buffer).unwrap(), 3);
            assert_eq!(&buffer[..3], b"tes");
        }
    }

    #[tokio::test]
    async fn looking_waits_for_bytes_or_for_the_end() {
        for (here, there) in [tcp_pair().await, unix_pair()] {
            let early = here.poll_peek(&mut Context::from_waker(Waker::noop()), &mut [0]);
            assert!(early.is_pending(), "there was nothing to see: {early:?}");
            there.try_write(b"b").unwrap();
            let bytes = std::future::poll_fn(|context| here.poll_peek(context, &mut [0]));
            assert_eq!(bytes.await.unwrap(), 1);
            assert_eq!((&here).read(&mut [0; 1]).unwrap(), 1);
            drop(there);
            let end = std::future::poll_fn(|context| here.poll_peek(context, &mut [0]));
            assert_eq!(end.await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn a_write_that_would_wait_says_so_and_is_ready_again_when_the_peer_has_read() {
        for (here, there) in [tcp_pair().await, unix_pair()] {
            let chunk = vec![7; 65_536];
            let mut written = 0;
            loop {
                // The kernel may still be moving bytes to the peer: full is when it stays full.
                here.writable().await.unwrap();
                match here.try_write(&chunk) {
                    Ok(count) => written += count,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::WouldBlock);
                        break;
                    }
                }
            }
            let mut read = 0;
            let drain = async {
                let mut buffer = vec![0; 65_536];
                while read < written {
                    there.readable().await.unwrap();
                    match there.try_read(&mut buffer) {
                        Ok(count) => read += count,
                        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
            };
            let (ready, ()) =
                tokio::join!(std::future::poll_fn(|context| here.poll_write_ready(context)), drain);
            ready.unwrap();
            assert_eq!(read, written);
        }
    }

    #[tokio::test]
    async fn slices_arrive_in_order_as_one_write() {
        for (here, there) in [tcp_pair().await, unix_pair()] {
            let slices = [IoSlice::new(b"one "), IoSlice::new(b""), IoSlice::new(b"two")];
            assert_eq!((&here).write_vectored(&slices).unwrap(), 7);
            drop(here);
            assert_eq!(read_to_end(&there).await.unwrap(), b"one two");
        }
    }

    #[tokio::test]
    async fn tcp_has_addresses_and_unix_has_none() {
        let (here, there) = tcp_pair().await;
        assert!(here.local_addr().unwrap().is_some());
        assert_eq!(here.local_addr().unwrap(), there.peer_addr().unwrap());
        let (here, _there) = unix_pair();
        assert_eq!((here.local_addr().unwrap(), here.peer_addr().unwrap()), (None, None));
    }

    #[tokio::test]
    async fn the_address_of_a_peer_that_reset_the_connection_is_an_error_and_not_none() {
        let (here, there) = tcp_pair().await;
        here.abort();
        std::future::poll_fn(|context| there.poll_read_ready(context)).await.unwrap();
        assert_eq!(there.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
    }

    async fn tcp_pair() -> (Stream, Stream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (there, _) = listener.accept().await.unwrap();
        (here.into(), there.into())
    }

    fn unix_pair() -> (Stream, Stream) {
        let (here, there) = UnixStream::pair().unwrap();
        (here.into(), there.into())
    }

    async fn read_to_end(mut stream: &Stream) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 16];
        loop {
            stream.readable().await?;
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(bytes),
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}
