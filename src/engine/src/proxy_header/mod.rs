//! Owns what a PROXY protocol header (versions 1 and 2) is, for the one who writes it (write.rs) and the one who reads it
//! (read.rs): the marks it begins with, its types, its checksum. Knows nothing of sockets. Runs on the I/O thread.
//!
//! Source: "The PROXY protocol, versions 1 & 2", HAProxy's doc/proxy-protocol.txt; its sections are cited.

mod read;
mod write;

use std::net::SocketAddr;

pub use read::{Fault, Fed, HEADER_IN_BYTES_MAX, Header, HeaderReader};
pub use write::{
    ClientCertificate, HEADER_BYTES_MAX, HEADER_WITH_CERTIFICATE_BYTES_MAX, NAME_BYTES_MAX, ProxyInfo,
    SslInfo, UNIQUE_ID_BYTES_MAX, VALUE_BYTES_MAX, write, write_local,
};

/// Text or binary. Only version 2 carries anything besides the addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyVersion {
    V1,
    V2,
}

/// The two ends of the client's connection, as seen by whoever accepted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoints {
    /// The client.
    pub source: SocketAddr,
    /// The address that the client connected to.
    pub destination: SocketAddr,
}

const PREFIX_V1: &[u8; 6] = b"PROXY ";
const SIGNATURE_V2: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

const VERSION_2_LOCAL: u8 = 0x20;
const VERSION_2_PROXY: u8 = 0x21;
const UNSPECIFIED: u8 = 0x00;
const TCP_OVER_IPV4: u8 = 0x11;
const UDP_OVER_IPV4: u8 = 0x12;
const TCP_OVER_IPV6: u8 = 0x21;
const UDP_OVER_IPV6: u8 = 0x22;
const UNIX_STREAM: u8 = 0x31;
const UNIX_DATAGRAM: u8 = 0x32;

/// Spec 2.2 and 2.2.6.
#[derive(Clone, Copy)]
enum Type {
    Alpn = 0x01,
    Authority = 0x02,
    Crc32c = 0x03,
    UniqueId = 0x05,
    Ssl = 0x20,
    SslVersion = 0x21,
    SslCommonName = 0x22,
    SslCipher = 0x23,
    SslSignatureAlgorithm = 0x24,
    SslKeyAlgorithm = 0x25,
    SslClientCertificate = 0x28,
    /// Ours, out of the range for applications (spec 2.2.8): the spec has none for a URI of subjectAltName, which is all the name
    /// that a SPIFFE certificate has.
    ClientUri = 0xe6,
}

/// CRC-32C (Castagnoli), RFC 9260 appendix A: reflected, all ones before and after.
fn crc32c<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u32 {
    !bytes.into_iter().fold(u32::MAX, |crc, byte| {
        let index = (crc ^ u32::from(*byte)) & 0xff;
        (crc >> 8) ^ CRC32C_TABLE[index as usize]
    })
}

const CRC32C_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < table.len() {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};
