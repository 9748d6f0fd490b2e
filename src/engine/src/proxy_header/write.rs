//! Owns writing a header, by which the upstream learns who the client is and what its TLS is. Knows nothing of sockets or of
//! where its values come from. Runs on the I/O thread.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    Endpoints, PREFIX_V1, ProxyVersion, SIGNATURE_V2, TCP_OVER_IPV4, TCP_OVER_IPV6, Type, UNSPECIFIED,
    VERSION_2_LOCAL, VERSION_2_PROXY, crc32c,
};

/// What the upstream is told. Version 1 has room for the endpoints alone.
///
/// A value is left out, never shortened, when it is longer than its limit (`VALUE_BYTES_MAX`, `UNIQUE_ID_BYTES_MAX`,
/// `NAME_BYTES_MAX`) or, being text, holds a NUL: an upstream would otherwise see another name than the verified one. The same holds
/// for what a whole header has no more room for: the client's certificate, and then the URI in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxyInfo<'a> {
    /// None when the client came over a Unix socket: the upstream then sees keygate as the client.
    pub endpoints: Option<Endpoints>,
    /// The protocol that ALPN settled on.
    pub alpn: Option<&'a [u8]>,
    /// The server name the client asked for (SNI).
    pub authority: Option<&'a str>,
    /// None when the client spoke no TLS.
    pub ssl: Option<SslInfo<'a>>,
    pub unique_id: Option<&'a [u8]>,
}

/// The client's TLS (spec 2.2.6).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SslInfo<'a> {
    /// As OpenSSL writes it, because upstreams compare strings: "TLSv1.2", "TLSv1.3".
    pub version: &'a str,
    /// As OpenSSL writes it: "TLS_AES_128_GCM_SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256".
    pub cipher: Option<&'a str>,
    /// How our certificate was signed by its issuer, as OpenSSL and with it HAProxy write it: "ecdsa-with-SHA256",
    /// "RSA-SHA256".
    pub signature_algorithm: Option<&'a str>,
    /// The key of our certificate, e.g. "EC256", "RSA2048".
    pub key_algorithm: Option<&'a str>,
    pub client_certificate: Option<ClientCertificate<'a>>,
}

/// The certificate that the client presented.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientCertificate<'a> {
    /// The subject's CN.
    pub common_name: Option<&'a str>,
    /// Of its subjectAltName.
    pub uri: Option<&'a str>,
    /// The whole of it, where the upstream wants that.
    pub der: Option<&'a [u8]>,
    /// False also when nobody looked.
    pub verified: bool,
    /// True when it was presented in an earlier connection of this TLS session and not in this one.
    pub resumed: bool,
}

/// ALPN, authority and CN: the longest ALPN name (RFC 7301 3.1), the longest DNS name, more than X.520 allows a CN.
pub const VALUE_BYTES_MAX: usize = 255;

/// Spec 2.2.5.
pub const UNIQUE_ID_BYTES_MAX: usize = 128;

/// TLS version, cipher and algorithms.
pub const NAME_BYTES_MAX: usize = 64;

/// Type and length.
const VALUE_HEAD_BYTES: usize = 3;

/// What `write` appends at most. It fits into one TCP segment, as the spec promises to receivers that read once (2.2).
pub const HEADER_BYTES_MAX: usize = 1_240;

/// The same with the client's whole certificate, which may need several: what nginx, and keygate itself, read at most.
pub const HEADER_WITH_CERTIFICATE_BYTES_MAX: usize = 4_096;

/// Appends the header of a relayed connection.
pub fn write(version: ProxyVersion, info: &ProxyInfo<'_>, out: &mut Vec<u8>) {
    match version {
        ProxyVersion::V1 => write_v1(info.endpoints, out),
        ProxyVersion::V2 => write_v2(info, out),
    }
}

/// Appends the header of a connection that is relayed for nobody (a health check). `own` are that connection's ends:
/// version 2 has LOCAL for it, version 1 names them because receivers may reject UNKNOWN (spec 2.1, 2.2).
pub fn write_local(version: ProxyVersion, own: Option<Endpoints>, out: &mut Vec<u8>) {
    match version {
        ProxyVersion::V1 => write_v1(own, out),
        ProxyVersion::V2 => {
            out.extend_from_slice(SIGNATURE_V2);
            out.extend_from_slice(&[VERSION_2_LOCAL, UNSPECIFIED, 0, 0]);
        }
    }
}

fn write_v1(endpoints: Option<Endpoints>, out: &mut Vec<u8>) {
    let line = match endpoints.map(Family::of) {
        None => "UNKNOWN\r\n".to_owned(),
        Some(Family::Inet(source, destination, [source_port, destination_port])) => {
            format!("TCP4 {source} {destination} {source_port} {destination_port}\r\n")
        }
        Some(Family::Inet6(source, destination, [source_port, destination_port])) => {
            let (source, destination) = (hexadecimal(source), hexadecimal(destination));
            format!("TCP6 {source} {destination} {source_port} {destination_port}\r\n")
        }
    };
    out.extend_from_slice(PREFIX_V1);
    out.extend_from_slice(line.as_bytes());
}

/// Rust prints a mapped address as `::ffff:192.0.2.1`, but version 1 knows hexadecimal digits and colons only (spec 2.1).
fn hexadecimal(address: Ipv6Addr) -> String {
    match address.to_ipv4_mapped() {
        Some(_) => {
            let [.., high, low] = address.segments();
            format!("::ffff:{high:x}:{low:x}")
        }
        None => address.to_string(),
    }
}

/// Spec 2.2. A client without addresses is LOCAL, as HAProxy sends it, because HAProxy refuses PROXY of an unspecified
/// family. Receivers must then use the connection's own addresses; whether they read the values is theirs to say.
fn write_v2(info: &ProxyInfo<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    let family = info.endpoints.map(Family::of);
    out.extend_from_slice(SIGNATURE_V2);
    out.extend_from_slice(&match family {
        None => [VERSION_2_LOCAL, UNSPECIFIED],
        Some(Family::Inet(..)) => [VERSION_2_PROXY, TCP_OVER_IPV4],
        Some(Family::Inet6(..)) => [VERSION_2_PROXY, TCP_OVER_IPV6],
    });
    let length_at = open_length(out);
    match family {
        None => {}
        Some(Family::Inet(source, destination, ports)) => {
            out.extend_from_slice(&source.octets());
            out.extend_from_slice(&destination.octets());
            write_ports(ports, out);
        }
        Some(Family::Inet6(source, destination, ports)) => {
            out.extend_from_slice(&source.octets());
            out.extend_from_slice(&destination.octets());
            write_ports(ports, out);
        }
    }
    write_value(Type::Alpn, info.alpn, out);
    write_text(Type::Authority, info.authority, out);
    write_value(Type::UniqueId, info.unique_id, out);
    if let Some(ssl) = &info.ssl {
        write_ssl(ssl, start, out);
    }
    write_value(Type::Crc32c, Some(&[0; 4]), out);
    close_length(length_at, out);
    // The checksum covers the whole header with its own field zero (spec 2.2.3).
    let checksum = crc32c(&out[start..]);
    let checksum_at = out.len() - 4;
    out[checksum_at..].copy_from_slice(&checksum.to_be_bytes());
    debug_assert!(out.len() - start <= bytes_max(info.ssl.as_ref()), "a header keeps its limit");
}

fn write_ports(ports: [u16; 2], out: &mut Vec<u8>) {
    for port in ports {
        out.extend_from_slice(&port.to_be_bytes());
    }
}

impl Type {
    fn bytes_max(self) -> usize {
        match self {
            Type::Alpn | Type::Authority | Type::SslCommonName => VALUE_BYTES_MAX,
            Type::UniqueId => UNIQUE_ID_BYTES_MAX,
            Type::SslVersion | Type::SslCipher | Type::SslSignatureAlgorithm | Type::SslKeyAlgorithm => {
                NAME_BYTES_MAX
            }
            Type::Crc32c => 4,
            // Bounded by what the header has room for.
            Type::ClientUri | Type::SslClientCertificate => HEADER_WITH_CERTIFICATE_BYTES_MAX,
            // Written by its parts, which are bounded each.
            Type::Ssl => 0,
        }
    }
}

fn bytes_max(ssl: Option<&SslInfo<'_>>) -> usize {
    let certificate = ssl.and_then(|ssl| ssl.client_certificate.as_ref());
    match certificate.and_then(|certificate| certificate.der) {
        Some(_) => HEADER_WITH_CERTIFICATE_BYTES_MAX,
        None => HEADER_BYTES_MAX,
    }
}

/// `start`: of the header. What is optional comes last, as far as there is room; the checksum's place is kept.
fn write_ssl(ssl: &SslInfo<'_>, start: usize, out: &mut Vec<u8>) {
    const OVER_SSL: u8 = 0x01;
    const CERTIFICATE_IN_CONNECTION: u8 = 0x02;
    const CERTIFICATE_IN_SESSION: u8 = 0x04;
    let certificate = ssl.client_certificate.as_ref();
    let flags = match certificate {
        None => OVER_SSL,
        Some(ClientCertificate { resumed: true, .. }) => OVER_SSL | CERTIFICATE_IN_SESSION,
        Some(_) => OVER_SSL | CERTIFICATE_IN_CONNECTION | CERTIFICATE_IN_SESSION,
    };
    // Zero only for a certificate that was presented and verified.
    let verify: u32 = if certificate.is_some_and(|certificate| certificate.verified) { 0 } else { 1 };

    out.push(Type::Ssl as u8);
    let length_at = open_length(out);
    out.push(flags);
    out.extend_from_slice(&verify.to_be_bytes());
    write_text(Type::SslVersion, Some(ssl.version), out);
    write_text(Type::SslCommonName, certificate.and_then(|certificate| certificate.common_name), out);
    write_text(Type::SslCipher, ssl.cipher, out);
    write_text(Type::SslSignatureAlgorithm, ssl.signature_algorithm, out);
    write_text(Type::SslKeyAlgorithm, ssl.key_algorithm, out);
    let mut room = bytes_max(Some(ssl)) - (out.len() - start) - (VALUE_HEAD_BYTES + 4);
    let mut fits = |value: &[u8]| match room.checked_sub(VALUE_HEAD_BYTES + value.len()) {
        Some(left) => {
            room = left;
            true
        }
        None => false,
    };
    let uri = certificate.and_then(|certificate| certificate.uri);
    let uri = uri.filter(|uri| !uri.contains('\0') && fits(uri.as_bytes()));
    let der = certificate.and_then(|certificate| certificate.der).filter(|der| fits(der));
    write_value(Type::SslClientCertificate, der, out);
    close_length(length_at, out);
    write_text(Type::ClientUri, uri, out);
}

fn write_text(kind: Type, text: Option<&str>, out: &mut Vec<u8>) {
    write_value(kind, text.map(str::as_bytes).filter(|bytes| !bytes.contains(&0)), out);
}

fn write_value(kind: Type, value: Option<&[u8]>, out: &mut Vec<u8>) {
    let Some(value) = value.filter(|value| value.len() <= kind.bytes_max()) else { return };
    out.push(kind as u8);
    let length_at = open_length(out);
    out.extend_from_slice(value);
    close_length(length_at, out);
}

/// Leaves room for a length; `close_length` fills it in with what was appended since.
fn open_length(out: &mut Vec<u8>) -> usize {
    out.extend_from_slice(&[0, 0]);
    out.len() - 2
}

fn close_length(length_at: usize, out: &mut [u8]) {
    // Cannot be cut: HEADER_BYTES_MAX is far below 64 KiB.
    let length = (out.len() - length_at - 2) as u16;
    out[length_at..length_at + 2].copy_from_slice(&length.to_be_bytes());
}

/// Both addresses in one family, as the header demands: a dual-stack listener shows IPv4 clients as mapped addresses.
#[derive(Clone, Copy)]
enum Family {
    Inet(Ipv4Addr, Ipv4Addr, [u16; 2]),
    Inet6(Ipv6Addr, Ipv6Addr, [u16; 2]),
}

impl Family {
    fn of(Endpoints { source, destination }: Endpoints) -> Family {
        let ports = [source.port(), destination.port()];
        match (source.ip().to_canonical(), destination.ip().to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Family::Inet(source, destination, ports),
            (source, destination) => Family::Inet6(mapped(source), mapped(destination), ports),
        }
    }
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}
