//! Reading a PROXY header: every rule of the spec at, above and below its limit, every way of cutting it into pieces, and
//! bytes that are none.

use std::net::SocketAddr;

use keygate_engine::proxy_header::{
    Endpoints, Fault, HEADER_IN_BYTES_MAX, Header, ProxyInfo, ProxyVersion, SslInfo, write, write_local,
};
use proptest::prelude::*;

use crate::proxy_header_in::{Read, check, fuzz_one};
use crate::{cases, proxy_header as judge};

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// What comes behind a header, and must stay where it is.
const BEHIND: &[u8] = b"\x16\x03\x01\x00\x05hello\r\nPROXY \n";

/// What is read of `header` with the client's bytes behind it: the same as without, and nothing of them.
fn read(header: &[u8]) -> Read {
    let read = check(&[header, BEHIND].concat(), &[6, 0, 2]);
    if let Ok(Some((_, taken))) = read {
        assert_eq!(taken, header.len(), "{header:02x?}");
        assert_eq!(check(header, &[2]), read);
        for end in 0..header.len() {
            assert_eq!(check(&header[..end], &[3]), Ok(None), "the first {end} bytes of {header:02x?}");
        }
    }
    read
}

fn ends(source: &str, destination: &str) -> Option<Endpoints> {
    Some(Endpoints { source: source.parse().unwrap(), destination: destination.parse().unwrap() })
}

fn assert_says(header: &[u8], endpoints: Option<Endpoints>) {
    assert_eq!(read(header), Ok(Some((Header { endpoints }, header.len()))), "{}", header.escape_ascii());
}

fn assert_refused(header: &[u8], fault: Fault) {
    assert_eq!(read(header), Err(fault), "{}", header.escape_ascii());
}

fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).unwrap().to_be_bytes();
    [SIGNATURE, &[command, family], &length, block].concat()
}

const IPV4: [u8; 12] = [192, 0, 2, 1, 198, 51, 100, 7, 0xdc, 0x04, 0x01, 0xbb];

#[test]
fn version_1_says_who_the_client_is() {
    for (line, source, destination) in [
        ("TCP4 192.0.2.1 198.51.100.7 56324 443", "192.0.2.1:56324", "198.51.100.7:443"),
        ("TCP4 0.0.0.0 255.255.255.255 0 65535", "0.0.0.0:0", "255.255.255.255:65535"),
        ("TCP6 2001:db8::1 2001:db8::2 1 65535", "[2001:db8::1]:1", "[2001:db8::2]:65535"),
        // A client of IPv4 is one, in whatever notation; HAProxy writes the first and keygate the second.
        ("TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 1 2", "192.0.2.1:1", "192.0.2.2:2"),
        ("TCP6 ::ffff:c000:201 2001:db8::2 1 2", "192.0.2.1:1", "[2001:db8::2]:2"),
        // The longest.
        (
            "TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535",
            "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
            "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
        ),
    ] {
        assert_says(format!("PROXY {line}\r\n").as_bytes(), ends(source, destination));
    }
}

#[test]
fn version_1_may_not_know_who_the_client_is() {
    assert_says(b"PROXY UNKNOWN\r\n", None);
    assert_says(b"PROXY UNKNOWN anything \xff\0 else\r\n", None);
    let at_the_limit = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 107 - 16], b"\r\n"].concat();
    assert_eq!(at_the_limit.len(), 107);
    assert_says(&at_the_limit, None);
}

#[test]
fn a_line_that_breaks_a_rule_of_version_1_is_malformed() {
    for line in [
        "TCP4 192.0.2.1 198.51.100.7 56324",
        "TCP4 192.0.2.1 198.51.100.7 56324 443 ",
        "TCP4 192.0.2.1 198.51.100.7 56324 443 7",
        "TCP4  192.0.2.1 198.51.100.7 56324 443",
        "TCP4 192.0.2.1\t198.51.100.7 56324 443",
        "TCP4 192.0.2.01 198.51.100.7 1 2",
        "TCP4 192.0.2.256 198.51.100.7 1 2",
        "TCP4 192.0.2 198.51.100.7 1 2",
        "TCP4 2001:db8::1 2001:db8::2 1 2",
        "TCP6 192.0.2.1 192.0.2.2 1 2",
        "TCP6 fe80::1%1 fe80::2 1 2",
        "TCP4 192.0.2.1 198.51.100.7 65536 2",
        "TCP4 192.0.2.1 198.51.100.7 01 2",
        "TCP4 192.0.2.1 198.51.100.7 +1 2",
        "TCP4 192.0.2.1 198.51.100.7 -1 2",
        "TCP4 192.0.2.1 198.51.100.7  2",
        "TCP5 192.0.2.1 198.51.100.7 1 2",
        "tcp4 192.0.2.1 198.51.100.7 1 2",
        "UNKNOWNS",
        "unknown",
        "",
        " UNKNOWN",
        "TCP4 192.0.2.1 198.51.100.7 1 2\r",
    ] {
        assert_refused(format!("PROXY {line}\r\n").as_bytes(), Fault::Malformed);
    }
    // A line feed alone ends nothing.
    assert_refused(b"PROXY TCP4 192.0.2.1 198.51.100.7 1 2\n", Fault::Malformed);
    let too_long = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 108 - 16], b"\r\n"].concat();
    assert_refused(&too_long, Fault::Malformed);
    // Without waiting for an end.
    assert_eq!(check(&too_long[..107], &[9]), Err(Fault::Malformed));
    assert_eq!(check(&too_long[..106], &[9]), Ok(None));
}

#[test]
fn version_2_says_who_the_client_is() {
    assert_says(&v2(0x21, 0x11, &IPV4), ends("192.0.2.1:56324", "198.51.100.7:443"));
    let mut ipv6 = [0; 36];
    for (at, value) in [(0, 0x20), (1, 0x01), (15, 1), (16, 0xfd), (31, 2), (33, 5), (35, 6)] {
        ipv6[at] = value;
    }
    assert_says(&v2(0x21, 0x21, &ipv6), ends("[2001::1]:5", "[fd00::2]:6"));
}

#[test]
fn version_2_may_not_know_who_the_client_is() {
    // LOCAL, whatever stands behind it.
    assert_says(&v2(0x20, 0x00, &[]), None);
    assert_says(&v2(0x20, 0x11, &IPV4), None);
    assert_says(&v2(0x20, 0x00, &[0xff; 5]), None);
    // Families that are valid and none of ours.
    assert_says(&v2(0x21, 0x00, &[]), None);
    assert_says(&v2(0x21, 0x00, &[0xff; 5]), None);
    assert_says(&v2(0x21, 0x12, &IPV4), None);
    assert_says(&v2(0x21, 0x22, &[0; 36]), None);
    assert_says(&v2(0x21, 0x31, &[0; 216]), None);
    assert_says(&v2(0x21, 0x32, &[0; 216]), None);
}

#[test]
fn a_block_that_breaks_a_rule_of_version_2_is_malformed() {
    for (command, family) in
        [(0x01, 0x11), (0x11, 0x11), (0x31, 0x11), (0x22, 0x11), (0x2f, 0x11), (0x21, 0x10), (0x21, 0x13)]
            .into_iter()
            .chain([(0x21, 0x41), (0x21, 0x01), (0x21, 0xff), (0x20, 0x41)])
    {
        assert_refused(&v2(command, family, &IPV4), Fault::Malformed);
    }
    for (family, bytes) in [(0x11, 11), (0x21, 35), (0x31, 215), (0x11, 0), (0x12, 11)] {
        assert_refused(&v2(0x21, family, &vec![0; bytes]), Fault::Malformed);
    }
}

#[test]
fn values_are_skipped_but_none_may_reach_beyond_the_header() {
    let with = |values: &[u8]| v2(0x21, 0x11, &[&IPV4, values].concat());
    let known = ends("192.0.2.1:56324", "198.51.100.7:443");
    assert_says(&with(&[0x02, 0, 1, b'a']), known);
    assert_says(&with(&[0xee, 0, 0]), known);
    assert_says(&with(&[0x04, 0, 2, 0, 0, 0x20, 0, 0]), known);
    for values in
        [&[0x02][..], &[0x02, 0], &[0x02, 0, 1], &[0x02, 0, 2, b'a'], &[0x04, 0, 0, 0x02, 0xff, 0xff]]
    {
        assert_refused(&with(values), Fault::Malformed);
    }
}

#[test]
fn a_checksum_must_be_right_and_there_is_one_at_most() {
    let summed = |values_before: &[u8], values_behind: &[u8]| {
        let block = [&IPV4, values_before, &[0x03, 0, 4, 0, 0, 0, 0], values_behind].concat();
        let mut header = v2(0x21, 0x11, &block);
        let at = 16 + IPV4.len() + values_before.len() + 3;
        let sum = judge::crc32c(&header);
        header[at..at + 4].copy_from_slice(&sum.to_be_bytes());
        header
    };
    let known = ends("192.0.2.1:56324", "198.51.100.7:443");
    for header in [summed(&[], &[]), summed(&[0x02, 0, 1, b'a'], &[]), summed(&[], &[0x02, 0, 1, b'a'])] {
        assert_says(&header, known);
        let sum_type = header.windows(3).position(|three| three == [0x03, 0, 4]).unwrap();
        // Of another type it would be no checksum.
        for at in (16..header.len()).filter(|at| *at != sum_type) {
            let mut damaged = header.clone();
            damaged[at] ^= 0x01;
            assert_eq!(read(&damaged).ok().flatten(), None, "byte {at} of {header:02x?}");
        }
    }
    assert_refused(&summed(&[], &[0x03, 0, 4, 0, 0, 0, 0]), Fault::Malformed);
    assert_refused(&v2(0x21, 0x11, &[&IPV4[..], &[0x03, 0, 3, 0, 0, 0]].concat()), Fault::Malformed);
}

#[test]
fn a_header_of_version_2_may_have_4096_bytes_and_no_more() {
    let filled = |bytes: usize| {
        let value = bytes - 16 - IPV4.len() - 3;
        let length = u16::try_from(value).unwrap().to_be_bytes();
        v2(0x21, 0x11, &[&IPV4[..], &[0x04, length[0], length[1]], &vec![0; value]].concat())
    };
    let longest = filled(HEADER_IN_BYTES_MAX);
    assert_eq!(
        check(&longest, &[200]).map(|read| read.map(|(_, taken)| taken)),
        Ok(Some(HEADER_IN_BYTES_MAX))
    );
    // Without waiting for what it announces.
    let longer = filled(HEADER_IN_BYTES_MAX + 1);
    assert_eq!(check(&longer[..16], &[2]), Err(Fault::Malformed));
    assert_eq!(check(&[SIGNATURE, &[0x21, 0x11, 0xff, 0xff]].concat(), &[2]), Err(Fault::Malformed));
}

#[test]
fn what_does_not_begin_as_a_header_is_none_with_its_first_wrong_byte() {
    for none in [
        &b"\x16\x03\x01\x02\x00\x01"[..],
        b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\n",
        b"\0",
        b"\r\n\r\n\r\n",
    ] {
        assert_eq!(check(none, &[1]), Err(Fault::Missing), "{}", none.escape_ascii());
    }
    assert_eq!(check(b"P", &[]), Ok(None));
    assert_eq!(check(b"PO", &[]), Err(Fault::Missing));
    assert_eq!(check(b"PROXYv", &[]), Err(Fault::Missing));
    assert_eq!(check(b"\r\n\r\n\0\r\nQUIT\r", &[]), Err(Fault::Missing));
}

#[test]
fn what_keygate_writes_it_reads() {
    for (source, destination) in [("192.0.2.1:5", "192.0.2.2:6"), ("[2001:db8::1]:5", "[2001:db8::2]:6")] {
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            let endpoints = ends(source, destination);
            let ssl = SslInfo { version: "TLSv1.3", ..SslInfo::default() };
            let info = ProxyInfo {
                endpoints,
                authority: Some("a.example"),
                unique_id: Some(b"id"),
                ssl: Some(ssl),
                ..ProxyInfo::default()
            };
            let mut header = Vec::new();
            write(version, &info, &mut header);
            assert_says(&header, endpoints);
            header.clear();
            write(version, &ProxyInfo { endpoints: None, ..info }, &mut header);
            assert_says(&header, None);
            header.clear();
            write_local(version, endpoints, &mut header);
            assert_says(&header, if version == ProxyVersion::V1 { endpoints } else { None });
        }
    }
}

/// Headers that are almost right: what random bytes never come to.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let header =
        (any::<bool>(), any::<[u8; 16]>(), any::<bool>(), any::<u16>()).prop_map(|(v1, ip, v4, port)| {
            let ip =
                if v4 { [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ip[0], ip[1], ip[2], ip[3]] } else { ip };
            let source = SocketAddr::from((ip, port));
            let version = if v1 { ProxyVersion::V1 } else { ProxyVersion::V2 };
            let mut out = Vec::new();
            let info = ProxyInfo { authority: Some("a.example"), ..ProxyInfo::default() };
            write(
                version,
                &ProxyInfo { endpoints: Some(Endpoints { source, destination: source }), ..info },
                &mut out,
            );
            out
        });
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 0..4);
    (header, damage).prop_map(|(mut header, damage)| {
        for (at, byte, kind) in damage {
            let at = at.index(header.len());
            match kind {
                0 => header[at] = byte,
                1 => header[at] ^= 1 << (byte % 8),
                2 => header.insert(at, byte),
                _ => drop(header.remove(at)),
            }
            if header.is_empty() {
                header.push(byte);
            }
        }
        header
    })
}

proptest! {
    #![proptest_config(cases(4_096))]

    #[test]
    fn any_bytes_are_read_the_same_however_they_are_cut(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz_one(&bytes);
    }

    #[test]
    fn any_block_is_read_the_same_however_it_is_cut(
        command in prop::sample::select(vec![0x20_u8, 0x21, 0x21, 0x21, 0x22]),
        family in prop::sample::select(vec![0x00_u8, 0x11, 0x11, 0x12, 0x21, 0x31, 0x44]),
        block in prop::collection::vec(prop::sample::select(vec![0_u8, 0, 0, 1, 3, 4, 5, 0xff]), 0..80),
        cuts in any::<[u8; 3]>(),
    ) {
        let _ = check(&[&v2(command, family, &block)[..], BEHIND].concat(), &cuts);
    }

    #[test]
    fn a_damaged_header_is_read_the_same_however_it_is_cut(header in damaged(), cuts in any::<[u8; 3]>()) {
        let _ = check(&[&header[..], BEHIND].concat(), &cuts);
    }
}
