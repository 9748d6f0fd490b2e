//! Owns reading a header, as it comes: hostile bytes until they have been understood. Takes no byte that is behind the
//! header, never waits for one that it does not need, and never keeps more than a header may be long. Knows nothing of
//! sockets, and not whether the sender may be believed. Runs on the I/O thread.

use std::iter::repeat_n;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{
    Endpoints, PREFIX_V1, SIGNATURE_V2, TCP_OVER_IPV4, TCP_OVER_IPV6, Type, UDP_OVER_IPV4, UDP_OVER_IPV6,
    UNIX_DATAGRAM, UNIX_STREAM, UNSPECIFIED, VERSION_2_LOCAL, VERSION_2_PROXY, crc32c,
};

/// Spec 2.1: the longest line there can be, with its CRLF.
const LINE_BYTES_MAX: usize = 107;
const FIXED_BYTES: usize = 16;
/// A header of version 2 may say 65535; what senders have to say is below a tenth of this.
pub const HEADER_IN_BYTES_MAX: usize = 4_096;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// None: the ends of the connection itself are the ones (LOCAL, UNKNOWN, or a family that is not TCP over IP).
    pub endpoints: Option<Endpoints>,
}

/// Why bytes are not a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// They do not begin as one.
    Missing,
    /// They begin as one and go on otherwise, or are too many.
    Malformed,
}

/// Reads one header from whatever pieces it comes in.
#[derive(Debug, Default)]
pub struct HeaderReader {
    bytes: Vec<u8>,
}

/// What became of a piece.
#[derive(Debug, PartialEq, Eq)]
pub struct Fed {
    /// How many of its bytes belong to the header. All of them, unless the header is complete.
    pub taken: usize,
    /// Some when the header is complete: what follows is the client's.
    pub header: Option<Header>,
}

impl HeaderReader {
    /// How many bytes at most the header still lacks, as far as one can tell. At least 1 until it is complete.
    pub fn lacks_max(&self) -> usize {
        let end = match self.bytes.first() {
            // Which version it is the first byte says.
            None => LINE_BYTES_MAX,
            Some(first) if *first == PREFIX_V1[0] => LINE_BYTES_MAX,
            Some(_) => self.end_v2().unwrap_or(FIXED_BYTES),
        };
        end.saturating_sub(self.bytes.len())
    }

    /// Takes from `piece` what belongs to the header.
    ///
    /// # Errors
    /// It can become no header. The reader must not be fed any more.
    pub fn feed(&mut self, piece: &[u8]) -> Result<Fed, Fault> {
        let mut taken = 0;
        // Two steps for version 2 (the length stands in the first), one for version 1.
        while taken < piece.len() {
            let step = self.share_of(&piece[taken..]);
            self.bytes.extend_from_slice(&piece[taken..taken + step]);
            taken += step;
            if let Some(header) = self.look()? {
                return Ok(Fed { taken, header: Some(header) });
            }
        }
        Ok(Fed { taken, header: None })
    }

    /// How many of `next`, which is not empty, surely belong to the header.
    fn share_of(&self, next: &[u8]) -> usize {
        let first = self.bytes.first().unwrap_or(&next[0]);
        if *first == PREFIX_V1[0] {
            let until_line_feed = next.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
            return until_line_feed.unwrap_or(next.len()).min(LINE_BYTES_MAX - self.bytes.len());
        }
        let end = self.end_v2().unwrap_or(FIXED_BYTES);
        next.len().min(end - self.bytes.len())
    }

    fn look(&self) -> Result<Option<Header>, Fault> {
        let bytes = self.bytes.as_slice();
        if bytes.first() == Some(&PREFIX_V1[0]) {
            begins_as(bytes, PREFIX_V1)?;
            return match bytes {
                [.., b'\n'] => parse_v1(bytes).map(Some).ok_or(Fault::Malformed),
                _ if bytes.len() >= LINE_BYTES_MAX => Err(Fault::Malformed),
                _ => Ok(None),
            };
        }
        begins_as(bytes, SIGNATURE_V2)?;
        match self.end_v2() {
            Some(end) if end > HEADER_IN_BYTES_MAX => Err(Fault::Malformed),
            Some(end) if bytes.len() == end => parse_v2(bytes).map(Some).ok_or(Fault::Malformed),
            _ => Ok(None),
        }
    }

    /// Where a header of version 2 ends, once that has been read.
    fn end_v2(&self) -> Option<usize> {
        let length = self.bytes.get(FIXED_BYTES - 2..FIXED_BYTES)?;
        Some(FIXED_BYTES + usize::from(u16::from_be_bytes([length[0], length[1]])))
    }
}

fn begins_as(bytes: &[u8], mark: &[u8]) -> Result<(), Fault> {
    let common = bytes.len().min(mark.len());
    if bytes[..common] == mark[..common] { Ok(()) } else { Err(Fault::Missing) }
}

/// Spec 2.1. Stricter than the tools' own `inet_pton` and `atoi` in nothing that they write.
fn parse_v1(line: &[u8]) -> Option<Header> {
    let said = line.strip_prefix(PREFIX_V1)?.strip_suffix(b"\r\n")?;
    if said == b"UNKNOWN" || said.starts_with(b"UNKNOWN ") {
        // "the receiver must ignore anything presented before the CRLF"
        return Some(Header { endpoints: None });
    }
    let mut words = std::str::from_utf8(said).ok()?.split(' ');
    let family = words.next()?;
    let (source, destination) = (words.next()?, words.next()?);
    let (source_port, destination_port) = (port(words.next()?)?, port(words.next()?)?);
    let ip = |text: &str| -> Option<IpAddr> {
        match family {
            "TCP4" => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            // HAProxy and nginx write a mapped address with dots.
            "TCP6" => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            _ => None,
        }
    };
    let endpoints = Endpoints {
        source: SocketAddr::new(ip(source)?, source_port),
        destination: SocketAddr::new(ip(destination)?, destination_port),
    };
    words.next().is_none().then(|| Header { endpoints: Some(canonical(endpoints)) })
}

/// Decimal, without sign and leading zeros.
fn port(text: &str) -> Option<u16> {
    let is_plain = text == "0" || (!text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit()));
    if is_plain { text.parse().ok() } else { None }
}

/// Spec 2.2; exactly one header.
fn parse_v2(bytes: &[u8]) -> Option<Header> {
    let ([.., command, family, _, _], block) = bytes.split_first_chunk::<FIXED_BYTES>()?;
    let addresses_bytes = match *family {
        // Where the addresses are unspecified nobody knows where they end.
        UNSPECIFIED => None,
        TCP_OVER_IPV4 | UDP_OVER_IPV4 => Some(12),
        TCP_OVER_IPV6 | UDP_OVER_IPV6 => Some(36),
        UNIX_STREAM | UNIX_DATAGRAM => Some(216),
        // "other values are reserved and must be rejected"
        _ => return None,
    };
    match *command {
        // "must discard the protocol block including the family"
        VERSION_2_LOCAL => return Some(Header { endpoints: None }),
        VERSION_2_PROXY => {}
        _ => return None,
    }
    let Some(addresses_bytes) = addresses_bytes else { return Some(Header { endpoints: None }) };
    let (addresses, values) = block.split_at_checked(addresses_bytes)?;
    check_values(bytes, values)?;
    let endpoints = match *family {
        TCP_OVER_IPV4 => {
            let (source, rest) = addresses.split_first_chunk::<4>()?;
            let (destination, ports) = rest.split_first_chunk::<4>()?;
            Some(between((*source).into(), (*destination).into(), ports)?)
        }
        TCP_OVER_IPV6 => {
            let (source, rest) = addresses.split_first_chunk::<16>()?;
            let (destination, ports) = rest.split_first_chunk::<16>()?;
            Some(between((*source).into(), (*destination).into(), ports)?)
        }
        // "automatically falls back to the UNSPEC mode for the valid combinations above that it does not support"
        _ => None,
    };
    Some(Header { endpoints: endpoints.map(canonical) })
}

fn between(source: IpAddr, destination: IpAddr, ports: &[u8]) -> Option<Endpoints> {
    let [a, b, c, d] = *ports.first_chunk::<4>()?;
    Some(Endpoints {
        source: SocketAddr::new(source, u16::from_be_bytes([a, b])),
        destination: SocketAddr::new(destination, u16::from_be_bytes([c, d])),
    })
}

/// Every value ends within the block, and the checksum, if there is one, is right (spec 2.2.3). None when not.
fn check_values(header: &[u8], mut values: &[u8]) -> Option<()> {
    let mut checksum = None;
    while !values.is_empty() {
        let ([kind, high, low], rest) = values.split_first_chunk::<3>()?;
        let (value, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes([*high, *low])))?;
        if *kind == Type::Crc32c as u8 {
            // A second one would leave open which of them counts.
            if checksum.replace((<[u8; 4]>::try_from(value).ok()?, header.len() - rest.len() - 4)).is_some() {
                return None;
            }
        }
        values = rest;
    }
    let Some((said, at)) = checksum else { return Some(()) };
    let without = header[..at].iter().chain(repeat_n(&0, 4)).chain(&header[at + 4..]);
    (crc32c(without) == u32::from_be_bytes(said)).then_some(())
}

/// A client of IPv4 is one, also where the sender has a socket for both families.
fn canonical(Endpoints { source, destination }: Endpoints) -> Endpoints {
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    Endpoints { source: plain(source), destination: plain(destination) }
}
