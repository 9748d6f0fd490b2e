//! The PROXY header against three judges: bytes from the spec, a parser written from the spec, and HAProxy itself
//! as receiver and as sender.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use keygate_engine::proxy_header::{
    ClientCertificate, Endpoints, HEADER_BYTES_MAX, NAME_BYTES_MAX, ProxyInfo, ProxyVersion, SslInfo,
    UNIQUE_ID_BYTES_MAX, VALUE_BYTES_MAX, write, write_local,
};
use proptest::prelude::*;

use crate::{cases, proxy_header as judge};

#[test]
fn version_1_is_the_line_of_the_spec() {
    for (source, destination, line) in [
        ("192.0.2.1:56324", "198.51.100.7:443", "PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n"),
        ("[2001:db8::1]:1", "[2001:db8::2]:65535", "PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n"),
        ("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2", "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"),
        ("[::ffff:192.0.2.1]:1", "[2001:db8::2]:2", "PROXY TCP6 ::ffff:c000:201 2001:db8::2 1 2\r\n"),
        ("[2001:db8::1]:1", "0.0.0.0:2", "PROXY TCP6 2001:db8::1 ::ffff:0:0 1 2\r\n"),
        ("[::]:1", "[::1]:2", "PROXY TCP6 :: ::1 1 2\r\n"),
        // No flow label, no scope.
        ("[fe80::1%7]:1", "[fe80::2%7]:2", "PROXY TCP6 fe80::1 fe80::2 1 2\r\n"),
    ] {
        assert_eq!(String::from_utf8(header(ProxyVersion::V1, &between(source, destination))).unwrap(), line);
    }
    assert_eq!(header(ProxyVersion::V1, &ProxyInfo::default()), b"PROXY UNKNOWN\r\n");
}

#[test]
fn version_2_is_the_bytes_of_the_spec() {
    let info = ProxyInfo {
        alpn: Some(b"h2"),
        authority: Some("a.example"),
        unique_id: Some(b"\x00\xff"),
        ssl: Some(SslInfo {
            version: "TLSv1.3",
            cipher: Some("TLS_AES_128_GCM_SHA256"),
            signature_algorithm: Some("ecdsa-with-SHA256"),
            key_algorithm: Some("EC256"),
            client_certificate: Some(ClientCertificate {
                common_name: Some("alice"),
                verified: true,
                ..ClientCertificate::default()
            }),
        }),
        ..between("192.0.2.1:256", "198.51.100.7:443")
    };
    let ssl = [
        &[0x01 | 0x02 | 0x04, 0, 0, 0, 0][..],
        b"\x21\x00\x07TLSv1.3",
        b"\x22\x00\x05alice",
        b"\x23\x00\x16TLS_AES_128_GCM_SHA256",
        b"\x24\x00\x11ecdsa-with-SHA256",
        b"\x25\x00\x05EC256",
    ]
    .concat();
    let mut expected = [
        &b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x00"[..],
        &[192, 0, 2, 1, 198, 51, 100, 7, 1, 0, 1, 187],
        b"\x01\x00\x02h2",
        b"\x02\x00\x09a.example",
        b"\x05\x00\x02\x00\xff",
        &[0x20, 0, ssl.len() as u8],
        &ssl,
        &[0x03, 0, 4, 0, 0, 0, 0],
    ]
    .concat();
    expected[15] = (expected.len() - 16) as u8;
    let checksum = judge::crc32c(&expected);
    let at = expected.len() - 4;
    expected[at..].copy_from_slice(&checksum.to_be_bytes());
    assert_eq!(header(ProxyVersion::V2, &info), expected);
}

#[test]
fn the_judges_checksum_is_castagnolis() {
    assert_eq!(judge::crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn a_client_without_addresses_is_local_and_keeps_its_values() {
    let info = ProxyInfo { authority: Some("a.example"), ..ProxyInfo::default() };
    let parsed = judge::parse(&header(ProxyVersion::V2, &info)).unwrap();
    assert!(parsed.local);
    assert_eq!(parsed.endpoints, None);
    assert_eq!(parsed.values, [(0x02, b"a.example".to_vec())]);
}

#[test]
fn a_certificate_is_flagged_by_where_it_was_presented_and_whether_it_was_verified() {
    let certificate =
        |verified, resumed| Some(ClientCertificate { verified, resumed, ..ClientCertificate::default() });
    for (client_certificate, client, verify) in [
        (None, 0b001, 1),
        (certificate(true, false), 0b111, 0),
        (certificate(false, false), 0b111, 1),
        (certificate(true, true), 0b101, 0),
        (certificate(false, true), 0b101, 1),
    ] {
        let ssl = Some(SslInfo { version: "TLSv1.3", client_certificate, ..SslInfo::default() });
        let info = ProxyInfo { ssl, ..ProxyInfo::default() };
        let ssl = judge::parse(&header(ProxyVersion::V2, &info)).unwrap().ssl.unwrap();
        assert_eq!((ssl.client, ssl.verify), (client, verify));
    }
}

#[test]
fn a_value_over_its_limit_is_left_out_and_one_at_its_limit_is_not() {
    let long = "x".repeat(VALUE_BYTES_MAX + 1);
    let kinds = |length: usize| -> Vec<u8> {
        let info = ProxyInfo {
            alpn: Some(&long.as_bytes()[..length]),
            authority: Some(&long[..length]),
            unique_id: Some(&long.as_bytes()[..length]),
            ssl: Some(SslInfo {
                version: &long[..length],
                cipher: Some(&long[..length]),
                signature_algorithm: Some(&long[..length]),
                key_algorithm: Some(&long[..length]),
                client_certificate: Some(ClientCertificate {
                    common_name: Some(&long[..length]),
                    ..ClientCertificate::default()
                }),
            }),
            ..ProxyInfo::default()
        };
        let parsed = judge::parse(&header(ProxyVersion::V2, &info)).unwrap();
        parsed.values.into_iter().chain(parsed.ssl.unwrap().values).map(|(kind, _)| kind).collect()
    };
    assert_eq!(kinds(NAME_BYTES_MAX), [0x01, 0x02, 0x05, 0x21, 0x22, 0x23, 0x24, 0x25]);
    assert_eq!(kinds(NAME_BYTES_MAX + 1), [0x01, 0x02, 0x05, 0x22]);
    assert_eq!(kinds(UNIQUE_ID_BYTES_MAX), [0x01, 0x02, 0x05, 0x22]);
    assert_eq!(kinds(UNIQUE_ID_BYTES_MAX + 1), [0x01, 0x02, 0x22]);
    assert_eq!(kinds(VALUE_BYTES_MAX), [0x01, 0x02, 0x22]);
    assert!(kinds(VALUE_BYTES_MAX + 1).is_empty());
}

#[test]
fn a_name_with_a_nul_is_left_out_because_c_strings_end_there() {
    let info = ProxyInfo {
        authority: Some("admin.example\0.evil.example"),
        ssl: Some(SslInfo {
            version: "TLSv1.3",
            client_certificate: Some(ClientCertificate {
                common_name: Some("admin\0.evil"),
                verified: true,
                ..ClientCertificate::default()
            }),
            ..SslInfo::default()
        }),
        ..ProxyInfo::default()
    };
    let parsed = judge::parse(&header(ProxyVersion::V2, &info)).unwrap();
    assert_eq!(parsed.values, []);
    assert_eq!(parsed.ssl.unwrap().values, [(0x21, b"TLSv1.3".to_vec())]);
}

#[test]
fn the_longest_header_fits_into_one_segment_of_an_ethernet() {
    let (value, name) = ("v".repeat(VALUE_BYTES_MAX), "n".repeat(NAME_BYTES_MAX));
    let info = ProxyInfo {
        alpn: Some(value.as_bytes()),
        authority: Some(&value),
        unique_id: Some(&[0; UNIQUE_ID_BYTES_MAX]),
        ssl: Some(SslInfo {
            version: &name,
            cipher: Some(&name),
            signature_algorithm: Some(&name),
            key_algorithm: Some(&name),
            client_certificate: Some(ClientCertificate {
                common_name: Some(&value),
                uri: Some("left out"),
                der: None,
                verified: true,
                resumed: true,
            }),
        }),
        ..between("[2001:db8::1]:1", "[2001:db8::2]:2")
    };
    assert_eq!(header(ProxyVersion::V2, &info).len(), HEADER_BYTES_MAX);
    const ETHERNET_MTU_BYTES: usize = 1_500;
    const IPV6_AND_TCP_WITH_TIMESTAMPS_BYTES: usize = 40 + 32;
    const { assert!(HEADER_BYTES_MAX <= ETHERNET_MTU_BYTES - IPV6_AND_TCP_WITH_TIMESTAMPS_BYTES) };
}

#[test]
fn a_connection_of_keygates_own_is_local_or_names_its_own_ends() {
    let own = between("192.0.2.1:1", "192.0.2.2:2").endpoints;
    let local = |version, own| {
        let mut out = Vec::new();
        write_local(version, own, &mut out);
        out
    };
    assert_eq!(local(ProxyVersion::V2, own), b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    assert_eq!(local(ProxyVersion::V1, own), b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n");
    assert_eq!(local(ProxyVersion::V1, None), b"PROXY UNKNOWN\r\n");
}

proptest! {
    #![proptest_config(cases(4_096))]

    #[test]
    fn any_input_gives_a_header_that_says_just_that(bytes in prop::collection::vec(any::<u8>(), 0..2_048)) {
        judge::fuzz_one(&bytes);
    }

    #[test]
    fn any_printable_names_arrive(name in ".{0,80}", v1 in any::<bool>(), ip in any::<[u8; 16]>(), port in any::<u16>()) {
        let source = SocketAddr::from((ip, port));
        let version = if v1 { ProxyVersion::V1 } else { ProxyVersion::V2 };
        judge::check(version, &ProxyInfo {
            endpoints: Some(Endpoints { source, destination: (Ipv4Addr::LOCALHOST, port).into() }),
            authority: Some(&name),
            ssl: Some(SslInfo { version: "TLSv1.2", cipher: Some(&name), ..SslInfo::default() }),
            ..ProxyInfo::default()
        });
    }
}

#[test]
fn haproxy_understands_what_keygate_sends() {
    let haproxy = HaProxy::start(
        "bind fd@0 accept-proxy
         http-request return status 200 content-type text/plain lf-string \"%[src] %[src_port] %[dst] %[dst_port] %[fc_pp_authority] %[fc_pp_unique_id]\"",
        "http",
    );
    let tls = ProxyInfo {
        alpn: Some(b"h2"),
        authority: Some("a.example"),
        unique_id: Some(b"id-1"),
        ssl: Some(SslInfo {
            version: "TLSv1.3",
            cipher: Some("TLS_AES_128_GCM_SHA256"),
            client_certificate: Some(ClientCertificate::default()),
            ..SslInfo::default()
        }),
        ..ProxyInfo::default()
    };
    for (version, source, destination, said) in [
        (ProxyVersion::V1, "192.0.2.1:5", "192.0.2.2:6", "192.0.2.1 5 192.0.2.2 6"),
        (ProxyVersion::V1, "[::ffff:192.0.2.1]:5", "[2001:db8::2]:6", "::ffff:192.0.2.1 5 2001:db8::2 6"),
        (ProxyVersion::V2, "192.0.2.1:5", "192.0.2.2:6", "192.0.2.1 5 192.0.2.2 6 a.example id-1"),
        (
            ProxyVersion::V2,
            "[2001:db8::1]:5",
            "[2001:db8::2]:6",
            "2001:db8::1 5 2001:db8::2 6 a.example id-1",
        ),
        (
            ProxyVersion::V2,
            "192.0.2.1:5",
            "[2001:db8::2]:6",
            "::ffff:192.0.2.1 5 2001:db8::2 6 a.example id-1",
        ),
    ] {
        let info = ProxyInfo { endpoints: between(source, destination).endpoints, ..tls.clone() };
        assert_eq!(
            haproxy.ask(&header(version, &info)).as_deref().map(str::trim_end),
            Some(said),
            "{source} {destination}"
        );
    }
    // Without addresses the connection's own count.
    for header in [header(ProxyVersion::V1, &tls), header(ProxyVersion::V2, &tls), {
        let mut local = Vec::new();
        write_local(ProxyVersion::V2, None, &mut local);
        local
    }] {
        let said = haproxy.ask(&header).unwrap();
        assert!(said.starts_with("127.0.0.1 "), "{said:?}");
    }
}

#[test]
fn haproxy_refuses_a_header_whose_checksum_is_wrong() {
    let haproxy = HaProxy::start("bind fd@0 accept-proxy\nhttp-request return status 200", "http");
    let mut header = header(ProxyVersion::V2, &between("192.0.2.1:5", "192.0.2.2:6"));
    assert!(haproxy.ask(&header).is_some());
    *header.last_mut().unwrap() ^= 1;
    assert_eq!(haproxy.ask(&header), None);
}

/// Shows that the judge reads TLS values as HAProxy writes them, which HAProxy 2.6 cannot show as a receiver.
#[test]
fn the_judge_understands_what_haproxy_sends_about_tls() {
    let directory = PrivateDirectory::new();
    let certificate = directory.0.join("certificate.pem");
    let openssl = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
        ])
        .args(["-subj", "/CN=alice", "-keyout", "key.pem", "-out", "leaf.pem"])
        .current_dir(&directory.0)
        .output()
        .expect("openssl must be installed");
    assert!(openssl.status.success(), "{}", String::from_utf8_lossy(&openssl.stderr));
    let pem = ["leaf.pem", "key.pem"].map(|name| fs::read(directory.0.join(name)).unwrap()).concat();
    fs::write(&certificate, pem).unwrap();

    let upstream = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let haproxy = HaProxy::start(
        &format!(
            "bind fd@0 ssl crt {path} ca-file {path} verify optional alpn h2
             server upstream {address} send-proxy-v2 proxy-v2-options ssl,cert-cn,ssl-cipher,cert-sig,cert-key,authority,crc32c",
            path = certificate.display(),
            address = upstream.local_addr().unwrap(),
        ),
        "tcp",
    );
    let mut client = Running(
        Command::new("openssl")
            .args(["s_client", "-quiet", "-alpn", "h2", "-servername", "a.example", "-tls1_3"])
            .args(["-ciphersuites", "TLS_AES_128_GCM_SHA256", "-connect"])
            .arg(haproxy.address.to_string())
            .args(["-cert", "certificate.pem", "-key", "key.pem"])
            .current_dir(&directory.0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let (mut accepted, _) = upstream.accept().unwrap();
    let mut theirs = vec![0; 16];
    accepted.read_exact(&mut theirs).unwrap();
    let length = usize::from(theirs[14]) << 8 | usize::from(theirs[15]);
    theirs.resize(16 + length, 0);
    accepted.read_exact(&mut theirs[16..]).unwrap();
    client.0.kill().unwrap();

    // HAProxy orders its values otherwise, the checksum before the rest, so they are compared and not the bytes.
    let mut values = judge::parse_values(&theirs[28..]).unwrap();
    let ssl = values.iter().position(|(kind, _)| *kind == 0x20).map(|at| values.remove(at).1).unwrap();
    let mut ssl = judge::parse_ssl(&ssl).unwrap();
    ssl.values.sort();
    values.sort();

    let endpoints = Some(Endpoints { source: (Ipv4Addr::LOCALHOST, 1).into(), destination: haproxy.address });
    let ours = ProxyInfo {
        endpoints,
        alpn: Some(b"h2"),
        authority: Some("a.example"),
        unique_id: None,
        ssl: Some(SslInfo {
            version: "TLSv1.3",
            cipher: Some("TLS_AES_128_GCM_SHA256"),
            signature_algorithm: Some("ecdsa-with-SHA256"),
            key_algorithm: Some("EC256"),
            client_certificate: Some(ClientCertificate {
                common_name: Some("alice"),
                verified: true,
                ..ClientCertificate::default()
            }),
        }),
    };
    let ours = judge::parse(&header(ProxyVersion::V2, &ours)).unwrap();
    assert_eq!(Some(ssl), ours.ssl);
    let checksum_at = theirs.windows(3).position(|window| window == [0x03, 0, 4]).unwrap() + 3;
    let checksum = theirs[checksum_at..checksum_at + 4].to_vec();
    theirs[checksum_at..checksum_at + 4].fill(0);
    assert_eq!(judge::crc32c(&theirs).to_be_bytes(), checksum[..]);
    values.retain(|(kind, _)| *kind != 0x03);
    assert_eq!(values, ours.values);
}

fn header(version: ProxyVersion, info: &ProxyInfo<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    write(version, info, &mut out);
    out
}

fn between(source: &str, destination: &str) -> ProxyInfo<'static> {
    let endpoints =
        Some(Endpoints { source: source.parse().unwrap(), destination: destination.parse().unwrap() });
    ProxyInfo { endpoints, ..ProxyInfo::default() }
}

struct HaProxy {
    address: SocketAddr,
    _process: Running,
    _directory: PrivateDirectory,
}

impl HaProxy {
    /// HAProxy inherits a listening socket as fd 0: its port is known and clients wait in its queue until it accepts.
    fn start(listen: &str, mode: &str) -> Self {
        let directory = PrivateDirectory::new();
        let configuration = directory.0.join("haproxy.cfg");
        let text = format!(
            "defaults\n mode {mode}\n timeout connect 10s\n timeout client 10s\n timeout server 10s\nlisten keygate\n {listen}\n"
        );
        fs::write(&configuration, text).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let process = Command::new("haproxy")
            .arg("-db")
            .arg("-f")
            .arg(&configuration)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .expect("haproxy must be installed");
        HaProxy { address, _process: Running(process), _directory: directory }
    }

    /// The body of the answer, or None when the connection was refused.
    fn ask(&self, header: &[u8]) -> Option<String> {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(&[header, b"GET / HTTP/1.0\r\n\r\n"].concat()).unwrap();
        let mut answer = String::new();
        match stream.read_to_string(&mut answer) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("haproxy: {error}"),
            _ => answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()),
        }
    }
}

/// Ends with the test, also when that fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("keygate-proxy-header-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        PrivateDirectory(path)
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        // Left behind at worst.
        let _ = fs::remove_dir_all(Path::new(&self.0));
    }
}
