//! Owns what transparent mode asks of the kernel about addresses: where a redirected client wanted to go, whether an address
//! is one of this host, and sockets with addresses of others (IP_TRANSPARENT). Knows nothing of listeners or upstreams.
//! I/O thread, and JavaScript thread for what listeners and `keygate check` need.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::stream::Stream;

/// What the client connected to: before nftables' REDIRECT, or, where TPROXY or nobody redirected it, the address of the
/// connection.
///
/// # Errors
/// The connection is gone.
pub fn original_destination(stream: &Stream) -> io::Result<SocketAddr> {
    let Stream::Tcp(tcp) = stream else { return Err(io::ErrorKind::Unsupported.into()) };
    let local = tcp.local_addr()?;
    let socket = SockRef::from(tcp);
    let before_redirect = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    // ENOENT: the kernel did not track it, so nothing has changed its address; ENOPROTOOPT: the kernel tracks nothing.
    Ok(before_redirect.ok().and_then(|address| address.as_socket()).unwrap_or(local))
}

/// Whether `destination`, on behalf of `client`, would lead back to this host. Then so would the connection to it, and
/// from there perhaps to us again, for ever:
/// * `destination` is an address of this host: the client was not redirected, or wanted one of our own services;
/// * `client` is one of this host: our own connection was redirected to us by rules that catch what leaves the host;
/// * with the client's address as the source of our connection, that one shows by the port that it holds.
///
/// Answers yes also where that cannot be known, as with `net.ipv4.ip_nonlocal_bind`.
pub fn loops(client: SocketAddr, destination: SocketAddr, has_foreign_source: bool) -> bool {
    if is_of_this_host(destination.ip()) || is_of_this_host(client.ip()) {
        return true;
    }
    has_foreign_source && !is_free_here(client)
}

/// Binding is the one question to which the kernel answers what it will do; it asks its own table of addresses. A socket of
/// UDP, which is the same there: the sandbox lets nobody bind one of TCP unless an upstream is transparent.
fn is_of_this_host(address: IpAddr) -> bool {
    let bound = Socket::new(domain_of(address), Type::DGRAM, Some(Protocol::UDP))
        .and_then(|socket| socket.bind(&SocketAddr::new(address, 0).into()));
    // Anything else than "not ours" leaves it open.
    !bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
}

/// Whether no socket of this host has that address and port, though neither is this host's.
fn is_free_here(address: SocketAddr) -> bool {
    let bound = bindable(address.ip()).and_then(|socket| {
        allow_foreign_address(&socket, address.is_ipv6())?;
        socket.bind(&address.into())
    });
    bound.is_ok()
}

fn bindable(address: IpAddr) -> io::Result<Socket> {
    Socket::new(domain_of(address), Type::STREAM, Some(Protocol::TCP))
}

fn domain_of(address: IpAddr) -> Domain {
    if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }
}

/// Lets the socket have addresses that are not this host's: those that TPROXY gives to a listener, or the source of a
/// connection to an upstream. To be called before bind.
///
/// # Errors
/// EPERM without CAP_NET_RAW (or CAP_NET_ADMIN, which may do more).
pub fn allow_foreign_address(socket: &Socket, is_ipv6: bool) -> io::Result<()> {
    if is_ipv6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

/// Gives `socket`, which is to connect to `server`, the address of a client as its source. The port is another: the client's
/// own connection to here may have this host's connection tracking take both for one.
///
/// # Errors
/// EPERM as `allow_foreign_address`; AddrNotAvailable when client and server are not of one family.
pub fn bind_as_client(socket: &Socket, client: IpAddr, server: IpAddr) -> io::Result<()> {
    if client.is_ipv4() != server.is_ipv4() {
        return Err(io::ErrorKind::AddrNotAvailable.into());
    }
    allow_foreign_address(socket, client.is_ipv6())?;
    // Or bind would choose the port alone, and one client could have no more connections than there are ports.
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one int, which lives through the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            std::ptr::from_ref(&on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind(&SocketAddr::new(client, 0).into())
}

/// Whether this process may use `allow_foreign_address`.
///
/// # Errors
/// As setsockopt(2): EPERM.
pub fn probe_foreign_address() -> io::Result<()> {
    allow_foreign_address(&Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?, false)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tokio::net::{TcpListener, TcpStream};

    #[test]
    fn an_address_of_this_host_leads_back_to_it_whichever_end_it_is() {
        let (ours, theirs): (SocketAddr, SocketAddr) =
            ("127.0.0.1:443".parse().unwrap(), "192.0.2.1:443".parse().unwrap());
        assert!(loops(theirs, ours, false));
        assert!(loops(ours, theirs, false));
        assert!(!loops(theirs, theirs, false));
        assert!(loops("[::1]:1".parse().unwrap(), "[2001:db8::1]:1".parse().unwrap(), false));
        assert!(loops(theirs, "0.0.0.0:443".parse().unwrap(), false));
    }

    #[test]
    fn our_own_connection_with_a_clients_address_shows_by_its_port() {
        if probe_foreign_address().is_err() {
            return println!("skipped: only with CAP_NET_RAW");
        }
        let (own, wanted): (SocketAddr, SocketAddr) =
            ("192.0.2.1:4711".parse().unwrap(), "198.51.100.1:443".parse().unwrap());
        let connecting = bindable(own.ip()).unwrap();
        allow_foreign_address(&connecting, false).unwrap();
        connecting.bind(&own.into()).unwrap();
        assert!(loops(own, wanted, true));
        assert!(!loops("192.0.2.1:4712".parse().unwrap(), wanted, true));
        drop(connecting);
        assert!(!loops(own, wanted, true));
    }

    #[test]
    fn a_socket_is_bound_as_a_client_only_towards_a_server_of_its_family() {
        let (v4, v6) = (IpAddr::from([192, 0, 2, 1]), "2001:db8::1".parse().unwrap());
        let refused = bind_as_client(&bindable(v4).unwrap(), v4, v6).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrNotAvailable);
        if probe_foreign_address().is_err() {
            return println!("skipped: only with CAP_NET_RAW");
        }
        for client in [v4, v6] {
            let socket = bindable(client).unwrap();
            bind_as_client(&socket, client, client).unwrap();
            assert_eq!(socket.local_addr().unwrap().as_socket().unwrap().ip(), client);
        }
    }

    #[tokio::test]
    async fn a_connection_that_nobody_redirected_wanted_to_come_here() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let wanted = listener.local_addr().unwrap();
            let _client = TcpStream::connect(wanted).await.unwrap();
            let accepted = listener.accept().await.unwrap().0;
            assert_eq!(original_destination(&accepted.into()).unwrap(), wanted);
        }
    }
}
