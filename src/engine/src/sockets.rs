//! Owns the listening sockets of a worker: descriptors of its own, inherited from the primary at fork or taken out of the
//! channel for those that a reload opens. They are closed here and nowhere else, so that they can be closed whatever the
//! JavaScript thread does, and a number that it knows never means another file. The primary and the sibling workers have
//! the same sockets: nothing here may change their flags or shut them down. I/O thread only, from its start on.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::handover;

#[derive(Default)]
pub struct Sockets {
    held: HashMap<RawFd, OwnedFd>,
    /// None: no more will come.
    channel: Option<OwnedFd>,
}

impl Sockets {
    /// # Errors
    /// A number is negative.
    ///
    /// # Safety
    /// The descriptors are open, and nobody else closes them.
    pub unsafe fn inherited(fds: &[RawFd], channel: Option<RawFd>) -> io::Result<Self> {
        if fds.iter().chain(&channel).any(|fd| *fd < 0) {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: not negative; open and ours, as the caller says.
        let own = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
        let mut sockets = Self { channel: channel.map(own), ..Self::default() };
        sockets.hold(fds.iter().copied().map(own));
        Ok(sockets)
    }

    /// # Errors
    /// It is not held.
    pub fn get(&self, fd: RawFd) -> io::Result<&OwnedFd> {
        self.held.get(&fd).ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Those that the primary has sent for this reload, in their order.
    ///
    /// # Errors
    /// As `handover::receive`; NotConnected when no more will come.
    pub fn take_over(&mut self, reload: u32) -> io::Result<Vec<RawFd>> {
        let channel = self.channel.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let received = handover::receive(channel.as_raw_fd(), reload)?;
        let fds = received.iter().map(AsRawFd::as_raw_fd).collect();
        self.hold(received);
        Ok(fds)
    }

    /// To hear by that no socket will come any more.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn channel(&self) -> io::Result<Option<OwnedFd>> {
        self.channel.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// One that is not held is left alone.
    pub fn close(&mut self, fd: RawFd) {
        self.held.remove(&fd);
    }

    /// With those that are still in the channel.
    pub fn close_all(&mut self) {
        *self = Self::default();
    }

    fn hold(&mut self, fds: impl IntoIterator<Item = OwnedFd>) {
        self.held.extend(fds.into_iter().map(|fd| (fd.as_raw_fd(), fd)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::fd::IntoRawFd;
    use std::time::{Duration, Instant};

    fn socket() -> (TcpListener, SocketAddr) {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = socket.local_addr().expect("bound");
        (socket, address)
    }

    fn is_open(address: SocketAddr) -> bool {
        TcpStream::connect(address).is_ok()
    }

    /// A test beside this one may fork, and its child has what this process has, for a moment.
    fn is_closed_soon(address: SocketAddr) -> bool {
        let give_up = Instant::now() + Duration::from_secs(10);
        while is_open(address) && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(1));
        }
        !is_open(address)
    }

    #[test]
    fn what_was_inherited_taken_over_or_is_on_its_way_is_closed_with_all() {
        let (primary, worker) = handover::open().expect("a pair");
        let [(inherited, first), (sent, second), (on_its_way, third)] = [(); 3].map(|()| socket());
        // SAFETY: both have just been given up by who owned them.
        let mut sockets =
            unsafe { Sockets::inherited(&[inherited.into_raw_fd()], Some(worker.into_raw_fd())) }
                .expect("open");
        for (reload, socket) in [(1, sent), (2, on_its_way)] {
            handover::send(primary.as_raw_fd(), reload, &[socket.as_raw_fd()]).expect("sent");
            if reload == 1 {
                assert_eq!(sockets.take_over(1).expect("taken").len(), 1);
            }
        }
        assert!([first, second, third].into_iter().all(is_open));
        sockets.close_all();
        assert!([first, second, third].into_iter().all(is_closed_soon));
        assert!(sockets.take_over(3).is_err());
    }

    #[test]
    fn a_number_that_is_not_held_is_nobodys_to_close() {
        let (other, address) = socket();
        let mut sockets = Sockets::default();
        sockets.close(other.as_raw_fd());
        assert!(sockets.get(other.as_raw_fd()).is_err());
        assert!(is_open(address));
    }
}
