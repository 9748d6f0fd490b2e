//! Owns who is at the ends of a client's connection: the peer itself and the address it came to, or what a PROXY header of a
//! proxy in front says, or what the kernel says that redirected it here. Must not know what is done with that, or TLS.
//! I/O thread only.
//!
//! ```text
//!  peer is in `from` ──yes──> its header, which must come ──> the header's client, via the peer
//!          └──no──> the peer is the client; a header of its own would be no TLS
//! ```

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::close::Close;
use crate::listener::ListenerPlan;
use crate::proxy_header::{Fault, Header, HeaderReader};
use crate::stream::Stream;
use crate::transparent::original_destination;

/// How much is looked at in one system call: most headers whole.
const PEEK_BYTES: usize = 256;

/// Who must begin with a PROXY header, and by when after accept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyIn {
    pub from: Vec<Network>,
    pub deadline: Duration,
}

/// An IP network: an address with its host part zero, and how many bits of it count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

pub struct Parties {
    pub client: SocketAddr,
    /// The peer, when it is not the client.
    pub via: Option<SocketAddr>,
    /// What the client connected to, when that is not the address of the connection.
    pub destination: Option<SocketAddr>,
}

/// Learns who the client is, before a byte of it is read.
///
/// # Errors
/// Why the connection must be closed. Nothing was sent: a proxy has no use for an alert, and nor has who is none.
pub async fn parties(
    stream: &Stream,
    plan: &ListenerPlan,
    peer: SocketAddr,
    accepted_at: Instant,
) -> Result<Parties, Close> {
    let direct = Parties { client: peer, via: None, destination: None };
    if let Some(proxy_in) = plan.proxy_in.as_ref().filter(|proxy_in| proxy_in.is_from(peer.ip())) {
        let deadline = accepted_at + proxy_in.deadline;
        let header =
            timeout_at(deadline, receive(stream)).await.map_err(|_| Close::ClientProxyHeaderDeadline)??;
        return Ok(match header.endpoints {
            None => direct,
            Some(ends) => {
                Parties { client: ends.source, via: Some(peer), destination: Some(ends.destination) }
            }
        });
    }
    if plan.transparent {
        // A socket that is not connected any more has no ends, and no client.
        let destination = original_destination(stream).map_err(|_| Close::ClientHandshakeReset)?;
        return Ok(Parties { destination: Some(destination), ..direct });
    }
    Ok(direct)
}

/// Reads the header and no byte more: what follows, in the same packet or not, is still in the socket.
async fn receive(stream: &Stream) -> Result<Header, Close> {
    let mut reader = HeaderReader::default();
    let mut piece = [0; PEEK_BYTES];
    loop {
        let room = reader.lacks_max().min(PEEK_BYTES);
        let seen = once_readable(stream, || stream.try_peek(&mut piece[..room])).await?;
        let fed = reader.feed(&piece[..seen]).map_err(|fault| match fault {
            Fault::Missing => Close::ClientProxyHeaderMissing,
            Fault::Malformed => Close::ClientProxyHeaderMalformed,
        })?;
        let mut taken = 0;
        while taken < fed.taken {
            taken += once_readable(stream, || stream.try_read(&mut piece[taken..fed.taken])).await?;
        }
        if let Some(header) = fed.header {
            return Ok(header);
        }
    }
}

/// At least one byte.
async fn once_readable(stream: &Stream, mut read: impl FnMut() -> io::Result<usize>) -> Result<usize, Close> {
    loop {
        match read() {
            Ok(0) => return Err(Close::ClientProxyHeaderClosed),
            Ok(count) => return Ok(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.readable().await.map_err(|_| Close::ClientProxyHeaderReset)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Close::ClientProxyHeaderReset),
        }
    }
}

impl ProxyIn {
    pub fn is_from(&self, peer: IpAddr) -> bool {
        self.from.iter().any(|network| network.contains(peer))
    }
}

impl Network {
    /// `192.0.2.0/24`, `2001:db8::/32`. None for anything else, also for an address with bits beyond its prefix.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, bits) = text.split_once('/')?;
        let network = Self { address: address.parse().ok()?, bits: bits.parse().ok()? };
        let (width, value) = width_and_value(network.address);
        let is_network = network.bits <= width && significant(value, width, network.bits) == value;
        is_network.then_some(network)
    }

    /// An IPv4 address that came over an IPv6 socket is one all the same.
    fn contains(&self, address: IpAddr) -> bool {
        let (width, value) = width_and_value(self.address);
        let (other_width, other) = width_and_value(address.to_canonical());
        width == other_width && significant(other, width, self.bits) == value
    }
}

/// The network that an address is in; the width tells IPv4 and IPv6 apart.
pub fn network_of(address: IpAddr, ipv4_bits: u8, ipv6_bits: u8) -> (u8, u128) {
    let (width, value) = width_and_value(address.to_canonical());
    (width, significant(value, width, if width == 32 { ipv4_bits } else { ipv6_bits }))
}

fn width_and_value(address: IpAddr) -> (u8, u128) {
    match address {
        IpAddr::V4(address) => (32, u128::from(address.to_bits())),
        IpAddr::V6(address) => (128, address.to_bits()),
    }
}

/// `value` with all but its first `bits` of `width` zero.
fn significant(value: u128, width: u8, bits: u8) -> u128 {
    let others = u32::from(width - bits.min(width));
    value.checked_shr(others).unwrap_or(0).checked_shl(others).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_network_holds_its_first_and_last_address_and_no_other() {
        for (network, inside, outside) in [
            ("192.0.2.64/26", ["192.0.2.64", "192.0.2.127"], ["192.0.2.63", "192.0.2.128"]),
            ("192.0.2.1/32", ["192.0.2.1", "::ffff:192.0.2.1"], ["192.0.2.0", "::192.0.2.1"]),
            ("0.0.0.0/0", ["0.0.0.0", "255.255.255.255"], ["::", "2001:db8::1"]),
            ("2001:db8::/33", ["2001:db8::", "2001:db8:7fff::1"], ["2001:db8:8000::", "2001:db7:ffff::"]),
            ("::1/128", ["::1", "::1"], ["::2", "127.0.0.1"]),
            ("::/0", ["::", "ffff::1"], ["127.0.0.1", "::ffff:127.0.0.1"]),
        ] {
            let parsed = Network::parse(network).unwrap();
            for address in inside {
                assert!(parsed.contains(address.parse().unwrap()), "{address} in {network}");
            }
            for address in outside {
                assert!(!parsed.contains(address.parse().unwrap()), "{address} not in {network}");
            }
        }
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in
            ["", "192.0.2.0", "192.0.2.0/33", "192.0.2.1/24", "2001:db8::1/64", "::/129", "a/8", "1.2.3.4/-1"]
        {
            assert_eq!(Network::parse(text), None, "{text}");
        }
    }
}
