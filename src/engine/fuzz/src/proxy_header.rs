//! Owns what every PROXY header must hold to, whatever the client sent: it can be parsed by the letter of the spec, it
//! says what it was given and nothing else, and it fits into one segment. The parser here is written from the spec
//! alone and shares no code with the writer, or both could be wrong together.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use keygate_engine::proxy_header::{
    self, ClientCertificate, Endpoints, HEADER_BYTES_MAX, HEADER_WITH_CERTIFICATE_BYTES_MAX, NAME_BYTES_MAX,
    ProxyInfo, ProxyVersion, SslInfo, UNIQUE_ID_BYTES_MAX, VALUE_BYTES_MAX,
};

pub fn fuzz_one(bytes: &[u8]) {
    let mut input = Input(bytes);
    let version = if input.flag() { ProxyVersion::V1 } else { ProxyVersion::V2 };
    check(version, &input.info());
}

/// Writes a header behind bytes that are already there, parses it and compares.
pub fn check(version: ProxyVersion, info: &ProxyInfo<'_>) {
    let before = b"before".to_vec();
    let mut out = before.clone();
    proxy_header::write(version, info, &mut out);
    let header = out.strip_prefix(before.as_slice()).expect("what was there before must stay");
    assert!(header.len() <= bytes_max(info), "{} bytes", header.len());
    let mut parsed = parse(header).unwrap_or_else(|problem| panic!("{problem}: {header:02x?}"));
    // What is optional is there exactly if there was room for it: the URI first, and then the certificate.
    let mut room = bytes_max(info) - header.len();
    let certificate = info.ssl.as_ref().and_then(|ssl| ssl.client_certificate.as_ref());
    let certificate = certificate.filter(|_| version == ProxyVersion::V2);
    let der = parsed.ssl.as_mut().and_then(|ssl| take(&mut ssl.values, 0x28).expect("once"));
    match (der, certificate.and_then(|certificate| certificate.der)) {
        (Some(der), wanted) => {
            assert_eq!(Some(&der[..]), wanted);
            room += 3 + der.len();
        }
        (None, Some(wanted)) => assert!(3 + wanted.len() > room),
        (None, None) => {}
    }
    let uri = take(&mut parsed.values, 0xe6).expect("once");
    match (uri, certificate.and_then(|certificate| text(certificate.uri))) {
        (Some(uri), wanted) => assert_eq!(Some(&uri[..]), wanted),
        (None, Some(wanted)) => assert!(3 + wanted.len() > room),
        (None, None) => {}
    }
    assert_eq!(parsed, expected(version, info));
}

fn bytes_max(info: &ProxyInfo<'_>) -> usize {
    let certificate = info.ssl.as_ref().and_then(|ssl| ssl.client_certificate.as_ref());
    match certificate.and_then(|certificate| certificate.der) {
        Some(_) => HEADER_WITH_CERTIFICATE_BYTES_MAX,
        None => HEADER_BYTES_MAX,
    }
}

/// A header as a receiver understands it.
#[derive(Debug, PartialEq, Eq)]
pub struct Header {
    pub local: bool,
    pub endpoints: Option<(SocketAddr, SocketAddr)>,
    /// Type and value in order of appearance, without CRC32C (which was right) and SSL.
    pub values: Vec<(u8, Vec<u8>)>,
    pub ssl: Option<Ssl>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Ssl {
    pub client: u8,
    pub verify: u32,
    pub values: Vec<(u8, Vec<u8>)>,
}

/// Exactly one header and nothing behind it; the error is what the spec does not allow.
pub fn parse(bytes: &[u8]) -> Result<Header, &'static str> {
    if bytes.starts_with(b"PROXY") { parse_text(bytes) } else { parse_binary(bytes) }
}

fn parse_text(bytes: &[u8]) -> Result<Header, &'static str> {
    if bytes.len() > 107 {
        return Err("a line longer than 107 bytes");
    }
    let line = std::str::from_utf8(bytes).map_err(|_| "not ASCII")?;
    let line = line.strip_suffix("\r\n").ok_or("no CRLF at the end")?;
    let endpoints = match line.split(' ').collect::<Vec<_>>()[..] {
        ["PROXY", "UNKNOWN"] => None,
        ["PROXY", "TCP4", source, destination, source_port, destination_port] => Some((
            SocketAddr::new(ipv4(source)?, port(source_port)?),
            SocketAddr::new(ipv4(destination)?, port(destination_port)?),
        )),
        ["PROXY", "TCP6", source, destination, source_port, destination_port] => Some((
            SocketAddr::new(ipv6(source)?, port(source_port)?),
            SocketAddr::new(ipv6(destination)?, port(destination_port)?),
        )),
        _ => return Err("not a line of version 1"),
    };
    Ok(Header { local: false, endpoints, values: Vec::new(), ssl: None })
}

fn ipv4(text: &str) -> Result<IpAddr, &'static str> {
    text.parse::<Ipv4Addr>().map(IpAddr::from).map_err(|_| "not an IPv4 address")
}

fn ipv6(text: &str) -> Result<IpAddr, &'static str> {
    if !text.bytes().all(|byte| byte == b':' || byte.is_ascii_hexdigit()) {
        return Err("an IPv6 address with other than hexadecimal digits and colons");
    }
    text.parse::<Ipv6Addr>().map(IpAddr::from).map_err(|_| "not an IPv6 address")
}

fn port(text: &str) -> Result<u16, &'static str> {
    let port = text.parse::<u16>().map_err(|_| "not a port")?;
    if port.to_string() == text { Ok(port) } else { Err("a port with leading zeros or a sign") }
}

fn parse_binary(bytes: &[u8]) -> Result<Header, &'static str> {
    let rest = bytes
        .strip_prefix(&[0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a])
        .ok_or("no signature")?;
    let [command, family, high, low, payload @ ..] = rest else { return Err("shorter than 16 bytes") };
    if payload.len() != usize::from(*high) << 8 | usize::from(*low) {
        return Err("a length that is not that of the payload");
    }
    let local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err("an unknown version or command"),
    };
    if local && payload.is_empty() {
        return Ok(Header { local, endpoints: None, values: Vec::new(), ssl: None });
    }
    let (endpoints, values) = match (local, family) {
        (true, 0x00) => (None, payload),
        (false, 0x11) => {
            let (addresses, values) =
                payload.split_first_chunk::<12>().ok_or("too short for TCP over IPv4")?;
            let address = |at: usize| IpAddr::from([0, 1, 2, 3].map(|index| addresses[at + index]));
            let port = |at: usize| u16::from(addresses[at]) << 8 | u16::from(addresses[at + 1]);
            let (source, destination) = (address(0), address(4));
            (Some((SocketAddr::new(source, port(8)), SocketAddr::new(destination, port(10)))), values)
        }
        (false, 0x21) => {
            let (addresses, values) =
                payload.split_first_chunk::<36>().ok_or("too short for TCP over IPv6")?;
            let address =
                |at: usize| IpAddr::from(std::array::from_fn::<u8, 16, _>(|index| addresses[at + index]));
            let port = |at: usize| u16::from(addresses[at]) << 8 | u16::from(addresses[at + 1]);
            let (source, destination) = (address(0), address(16));
            (Some((SocketAddr::new(source, port(32)), SocketAddr::new(destination, port(34)))), values)
        }
        _ => return Err("a family that does not go with the command"),
    };
    let mut values = parse_values(values)?;
    let checksum = take(&mut values, 0x03)?.ok_or("no CRC32C")?;
    // Found from the end, since it is demanded to be last.
    let field = bytes.len() - 4;
    if bytes[field..] != checksum {
        return Err("a CRC32C that is not last");
    }
    let zeroed = [&bytes[..field], &[0; 4]].concat();
    if crc32c(&zeroed).to_be_bytes() != checksum[..] {
        return Err("a wrong CRC32C");
    }
    let ssl = take(&mut values, 0x20)?.map(|value| parse_ssl(&value)).transpose()?;
    Ok(Header { local, endpoints, values, ssl })
}

pub fn parse_ssl(bytes: &[u8]) -> Result<Ssl, &'static str> {
    let [client, a, b, c, d, values @ ..] = bytes else { return Err("an SSL value that is too short") };
    Ok(Ssl { client: *client, verify: u32::from_be_bytes([*a, *b, *c, *d]), values: parse_values(values)? })
}

pub fn parse_values(mut bytes: &[u8]) -> Result<Vec<(u8, Vec<u8>)>, &'static str> {
    let mut values = Vec::new();
    while !bytes.is_empty() {
        let [kind, high, low, rest @ ..] = bytes else { return Err("half a value") };
        let length = usize::from(*high) << 8 | usize::from(*low);
        let (value, rest) = rest.split_at_checked(length).ok_or("a value that is longer than the rest")?;
        values.push((*kind, value.to_vec()));
        bytes = rest;
    }
    Ok(values)
}

/// The only value of this type; a second one would let two receivers read two things.
fn take(values: &mut Vec<(u8, Vec<u8>)>, kind: u8) -> Result<Option<Vec<u8>>, &'static str> {
    let Some(at) = values.iter().position(|(other, _)| *other == kind) else { return Ok(None) };
    let (_, value) = values.remove(at);
    if values.iter().any(|(other, _)| *other == kind) { Err("a value twice") } else { Ok(Some(value)) }
}

/// Bit by bit, as in RFC 9260 appendix A.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = crc & 1;
            crc >>= 1;
            if carry != 0 {
                crc ^= 0x1edc_6f41_u32.reverse_bits();
            }
        }
    }
    crc ^ u32::MAX
}

fn expected(version: ProxyVersion, info: &ProxyInfo<'_>) -> Header {
    let endpoints = info.endpoints.map(|Endpoints { source, destination }| {
        let (from, to) = (source.ip().to_canonical(), destination.ip().to_canonical());
        let alike = from.is_ipv4() && to.is_ipv4();
        let at = |ip: IpAddr, port| match ip {
            IpAddr::V4(ip) if !alike => SocketAddr::new(ip.to_ipv6_mapped().into(), port),
            _ => SocketAddr::new(ip, port),
        };
        (at(from, source.port()), at(to, destination.port()))
    });
    let local = version == ProxyVersion::V2 && endpoints.is_none();
    let mut header = Header { local, endpoints, values: Vec::new(), ssl: None };
    if let ProxyVersion::V2 = version {
        header.values = present([
            (0x01, info.alpn, VALUE_BYTES_MAX),
            (0x02, text(info.authority), VALUE_BYTES_MAX),
            (0x05, info.unique_id, UNIQUE_ID_BYTES_MAX),
        ]);
        header.ssl = info.ssl.as_ref().map(|ssl| {
            let certificate = ssl.client_certificate.as_ref();
            Ssl {
                client: certificate
                    .map_or(1, |certificate| if certificate.resumed { 1 | 4 } else { 1 | 2 | 4 }),
                verify: u32::from(!certificate.is_some_and(|certificate| certificate.verified)),
                values: present([
                    (0x21, text(Some(ssl.version)), NAME_BYTES_MAX),
                    (
                        0x22,
                        text(certificate.and_then(|certificate| certificate.common_name)),
                        VALUE_BYTES_MAX,
                    ),
                    (0x23, text(ssl.cipher), NAME_BYTES_MAX),
                    (0x24, text(ssl.signature_algorithm), NAME_BYTES_MAX),
                    (0x25, text(ssl.key_algorithm), NAME_BYTES_MAX),
                ]),
            }
        });
    }
    header
}

fn text(value: Option<&str>) -> Option<&[u8]> {
    value.filter(|value| !value.contains('\0')).map(str::as_bytes)
}

fn present<const N: usize>(values: [(u8, Option<&[u8]>, usize); N]) -> Vec<(u8, Vec<u8>)> {
    let present = |(kind, value, bytes_max): (u8, Option<&[u8]>, usize)| {
        value.filter(|value| value.len() <= bytes_max).map(|value| (kind, value.to_vec()))
    };
    values.into_iter().filter_map(present).collect()
}

/// Takes the fuzzer's bytes apart; zeros once they are used up.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn info(&mut self) -> ProxyInfo<'a> {
        ProxyInfo {
            endpoints: self
                .flag()
                .then(|| Endpoints { source: self.socket_address(), destination: self.socket_address() }),
            alpn: self.value(),
            authority: self.text(),
            ssl: self.flag().then(|| SslInfo {
                version: self.text().unwrap_or_default(),
                cipher: self.text(),
                signature_algorithm: self.text(),
                key_algorithm: self.text(),
                client_certificate: self.flag().then(|| ClientCertificate {
                    common_name: self.text(),
                    uri: self.text(),
                    der: self.long_value(),
                    verified: self.flag(),
                    resumed: self.flag(),
                }),
            }),
            unique_id: self.value(),
        }
    }

    fn socket_address(&mut self) -> SocketAddr {
        let mut octets = [0; 16];
        let kind = self.byte() % 3;
        let bytes = self.bytes(if kind == 2 { 16 } else { 4 });
        octets[..bytes.len()].copy_from_slice(bytes);
        let ipv4 = Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]);
        let ip = match kind {
            0 => IpAddr::V4(ipv4),
            1 => IpAddr::V6(ipv4.to_ipv6_mapped()),
            _ => IpAddr::from(octets),
        };
        SocketAddr::new(ip, u16::from_be_bytes([self.byte(), self.byte()]))
    }

    fn text(&mut self) -> Option<&'a str> {
        let value = self.value()?;
        let valid = std::str::from_utf8(value).map_or_else(|error| error.valid_up_to(), |_| value.len());
        std::str::from_utf8(&value[..valid]).ok()
    }

    fn value(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.byte()) + usize::from(self.byte() % 3);
        self.flag().then(|| self.bytes(length))
    }

    /// Of a length around the limit, or of what is left.
    fn long_value(&mut self) -> Option<&'a [u8]> {
        let length = 2_500 + 16 * usize::from(self.byte());
        self.flag().then(|| self.bytes(length))
    }

    fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or_default()
    }
}
