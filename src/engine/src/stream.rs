//! Owns one connected byte stream, client or upstream side, TCP or Unix: reads and writes that never wait, readiness,
//! half-close and abortive close. Knows nothing of TLS, of buffers or of who is at the other end.
//! Runs on the I/O thread.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::ReadBuf;
use tokio::net::{TcpStream, UnixStream};

/// A connected byte stream. `&Stream` is also `std::io::Read` and `Write`, answering `WouldBlock` where it would
/// wait, which is what `rustls::Connection::read_tls` and `write_tls` ask for.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Bytes read; 0 when the peer has closed its direction. `WouldBlock` clears the readiness.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(tcp) => tcp.try_read(buffer),
            Stream::Unix(unix) => unix.try_read(buffer),
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

    /// Looks at the next bytes without taking them; 0 when the peer has closed its direction. Unix sockets cannot.
    pub fn poll_peek(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Tcp(tcp) => tcp.poll_peek(context, &mut ReadBuf::new(buffer)),
            Stream::Unix(_) => Poll::Ready(Err(io::ErrorKind::Unsupported.into())),
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
