//! Owns what reading a PROXY header must hold to, whatever comes: it says the same however the bytes are cut into pieces, it
//! takes no byte behind the header, it keeps no more than a header may be long, and what a writer wrote it understands.

use std::net::SocketAddr;

use keygate_engine::proxy_header::{Fault, HEADER_IN_BYTES_MAX, Header, HeaderReader};

use crate::proxy_header as judge;

/// The first bytes say where the others are cut.
pub fn fuzz_one(bytes: &[u8]) {
    let (cuts, stream) = bytes.split_at(bytes.len().min(4));
    // Whether it is a header is not the question here.
    let _ = check(stream, cuts);
}

/// What the reader makes of a stream: the header and how many bytes it took; None while it wants more.
pub type Read = Result<Option<(Header, usize)>, Fault>;

/// Reads the stream at once, byte by byte, and in pieces of the lengths `cuts` over and over.
pub fn check(stream: &[u8], cuts: &[u8]) -> Read {
    let whole = read_in_pieces(stream, std::iter::repeat(stream.len().max(1)));
    assert_eq!(whole, read_in_pieces(stream, std::iter::repeat(1)), "byte by byte: {stream:02x?}");
    let lengths = cuts.iter().map(|cut| usize::from(*cut) + 1).collect::<Vec<_>>();
    if !lengths.is_empty() {
        let pieces = lengths.iter().copied().cycle();
        assert_eq!(whole, read_in_pieces(stream, pieces), "{lengths:?} of {stream:02x?}");
    }
    if let Ok(Some((header, taken))) = whole {
        assert!(taken <= HEADER_IN_BYTES_MAX);
        let text = &stream[..taken];
        if text.starts_with(b"PROXY ") {
            assert!(taken <= 107 && text.ends_with(b"\r\n") && !text[..taken - 2].contains(&b'\n'));
        } else {
            assert_eq!(taken, 16 + usize::from(u16::from_be_bytes([text[14], text[15]])));
        }
        // The judge knows what keygate writes, which is less than what others may.
        if let Ok(judged) = judge::parse(text) {
            let canonical = |(from, to): (SocketAddr, SocketAddr)| {
                let plain = |it: SocketAddr| SocketAddr::new(it.ip().to_canonical(), it.port());
                (plain(from), plain(to))
            };
            let read = header.endpoints.map(|ends| (ends.source, ends.destination));
            assert_eq!(judged.endpoints.filter(|_| !judged.local).map(canonical), read, "{text:02x?}");
        }
    }
    whole
}

fn read_in_pieces(stream: &[u8], lengths: impl Iterator<Item = usize>) -> Read {
    let mut reader = HeaderReader::default();
    let mut taken = 0;
    for length in lengths {
        let piece = &stream[taken..stream.len().min(taken + length)];
        if piece.is_empty() {
            break;
        }
        let lacks = reader.lacks_max();
        assert!((1..=usize::from(u16::MAX)).contains(&lacks), "lacks {lacks}");
        let fed = reader.feed(piece)?;
        assert!(fed.taken <= piece.len() && fed.taken <= lacks.max(HEADER_IN_BYTES_MAX));
        taken += fed.taken;
        match fed.header {
            Some(header) => return Ok(Some((header, taken))),
            None => assert_eq!(fed.taken, piece.len(), "bytes of an unfinished header were left"),
        }
    }
    Ok(None)
}
