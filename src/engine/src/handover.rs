//! Owns handing listening sockets to a process that runs already: a channel of its own between the primary and each worker,
//! inherited at fork, through which descriptors pass (unix(7), SCM_RIGHTS). Must not know what a socket is for.
//! JavaScript thread of the primary, I/O thread of workers; never blocks.

use std::ffi::c_void;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use socket2::{Domain, Socket, Type};

/// The kernel takes at most 253 in one message (SCM_MAX_FD).
const FDS_PER_MESSAGE: usize = 250;
/// Ancillary data of a full message, with room for its header and alignment.
const CONTROL_WORDS: usize = (FDS_PER_MESSAGE * size_of::<RawFd>() + 64) / size_of::<u64>();

/// The primary's end and the worker's. Messages keep their borders, so what belongs to one reload is not taken for another's.
///
/// # Errors
/// As socketpair(2).
pub fn open() -> io::Result<(OwnedFd, OwnedFd)> {
    let (primary, worker) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None)?;
    Ok((primary.into(), worker.into()))
}

/// The worker is to accept nothing any more: no socket will come. Heard by its I/O thread, whatever its JavaScript thread does.
/// One that has gone needs no farewell.
pub fn say_farewell(channel: RawFd) {
    // SAFETY: takes numbers and touches no memory.
    unsafe { libc::shutdown(channel, libc::SHUT_WR) };
}

/// Whether the primary's end is closed, as it is when the primary has ended, and not only silent for good.
pub fn is_closed(channel: RawFd) -> bool {
    let mut polled = libc::pollfd { fd: channel, events: 0, revents: 0 };
    // SAFETY: one pollfd that lives through the call, which does not wait.
    unsafe { libc::poll(&raw mut polled, 1, 0) };
    polled.revents & libc::POLLHUP != 0
}

/// Sends the sockets, marked with the number of the reload that opened them. They stay open here.
///
/// # Errors
/// As sendmsg(2): EAGAIN when the worker has left too much unread, EPIPE when it has gone.
pub fn send(channel: RawFd, reload: u32, fds: &[RawFd]) -> io::Result<()> {
    fds.chunks(FDS_PER_MESSAGE).try_for_each(|chunk| send_message(channel, reload, chunk))
}

/// The sockets that were sent for this reload, in their order; those of a reload that came to nothing are closed.
///
/// # Errors
/// As recvmsg(2); EMFILE when not all of them could be received.
pub fn receive(channel: RawFd, reload: u32) -> io::Result<Vec<OwnedFd>> {
    let mut received = Vec::new();
    loop {
        match receive_message(channel) {
            Ok(Some((number, fds))) if number == reload => received.extend(fds),
            Ok(Some(_)) => {}
            Ok(None) => return Ok(received),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(received),
            Err(error) => return Err(error),
        }
    }
}

fn send_message(channel: RawFd, reload: u32, fds: &[RawFd]) -> io::Result<()> {
    let mut number = reload.to_ne_bytes();
    let mut control = [0_u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: number.as_mut_ptr().cast(), iov_len: number.len() };
    let bytes = size_of_val(fds);
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE computes from its argument alone.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(bytes as u32) } as usize;
    // SAFETY: `control` is aligned for a cmsghdr and larger than `msg_controllen`, because `fds` has at most
    // FDS_PER_MESSAGE members; so the first header and `bytes` behind it are within it.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(bytes as u32) as usize;
        std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(header), bytes);
    }
    // SAFETY: everything that `message` points at lives through the call.
    match unsafe { libc::sendmsg(channel, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// None at the end of the channel.
fn receive_message(channel: RawFd) -> io::Result<Option<(u32, Vec<OwnedFd>)>> {
    let mut number = [0; size_of::<u32>()];
    let mut control = [0_u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: number.as_mut_ptr().cast::<c_void>(), iov_len: number.len() };
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: everything that `message` points at is writable for the lengths given and lives through the call.
    let received = unsafe { libc::recvmsg(channel, &raw mut message, flags) };
    let fds = match received {
        -1 => return Err(io::Error::last_os_error()),
        0 => return Ok(None),
        // SAFETY: the kernel has just filled `message` and the `control` it points at.
        _ => unsafe { fds_in(&message) },
    };
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(Some((u32::from_ne_bytes(number), fds)))
}

/// # Safety
/// `message` was filled by recvmsg, its control buffer is alive, and nobody has taken its descriptors yet.
unsafe fn fds_in(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the macros stay within msg_controllen, which the kernel has set; a SCM_RIGHTS header is followed by as many
    // descriptors as cmsg_len says, each open in this process and owned by nobody else.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    fds
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::{AsFd, AsRawFd};

    fn sockets(count: usize) -> Vec<TcpListener> {
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect()
    }

    fn fds(sockets: &[TcpListener]) -> Vec<RawFd> {
        sockets.iter().map(AsRawFd::as_raw_fd).collect()
    }

    fn ports(fds: Vec<OwnedFd>) -> Vec<u16> {
        fds.into_iter().map(|fd| TcpListener::from(fd).local_addr().expect("bound").port()).collect()
    }

    fn own_ports(sockets: &[TcpListener]) -> Vec<u16> {
        sockets.iter().map(|socket| socket.local_addr().expect("bound").port()).collect()
    }

    #[test]
    fn sockets_arrive_in_their_order_also_when_one_message_has_no_room_for_them() {
        let (primary, worker) = open().expect("a pair");
        let sockets = sockets(FDS_PER_MESSAGE + 7);
        send(primary.as_raw_fd(), 1, &fds(&sockets)).expect("sent");
        assert_eq!(ports(receive(worker.as_raw_fd(), 1).expect("received")), own_ports(&sockets));
    }

    #[test]
    fn sockets_of_a_reload_that_came_to_nothing_are_not_taken_for_those_of_the_next() {
        let (primary, worker) = open().expect("a pair");
        let (former, current) = (sockets(2), sockets(3));
        send(primary.as_raw_fd(), 1, &fds(&former)).expect("sent");
        send(primary.as_raw_fd(), 2, &fds(&current)).expect("sent");
        assert_eq!(ports(receive(worker.as_raw_fd(), 2).expect("received")), own_ports(&current));
    }

    #[test]
    fn an_empty_channel_gives_nothing_and_does_not_block() {
        let (primary, worker) = open().expect("a pair");
        assert!(receive(worker.as_raw_fd(), 1).expect("received").is_empty());
        drop(primary);
        assert!(receive(worker.as_raw_fd(), 1).expect("received").is_empty());
    }

    #[test]
    fn what_is_sent_to_a_worker_that_has_gone_is_an_error() {
        let (primary, worker) = open().expect("a pair");
        drop(worker);
        let own = sockets(1);
        let error = send(primary.as_raw_fd(), 1, &[own[0].as_fd().as_raw_fd()]).expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    }
}
