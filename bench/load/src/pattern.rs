//! Owns the bytes of streams that are checked: each word of eight says where it belongs, so that nothing can be lost, repeated,
//! moved or mixed up with another connection unnoticed. Client and upstream agree by this file. Knows no connection.

use crate::flags::Flags;

pub const WORD_BYTES: usize = 8;
/// The first byte of every word, which tells the last word of a stream from the others.
const TAG: u8 = b'k';
const END_TAG: u8 = b'e';
/// What is generated for one comparison; it stays in the first-level cache.
const BLOCK_BYTES: usize = 4096;

/// How much is written at once on a stream of this kind, which is made of whole words.
pub fn message_bytes(flags: &mut Flags) -> Result<usize, String> {
    let bytes = flags.number("message", 16 * 1024, 64..=1024 * 1024)?;
    match bytes % WORD_BYTES {
        0 => Ok(bytes),
        _ => Err(format!("--message {bytes}: expected a multiple of {WORD_BYTES}")),
    }
}

/// A position in a stream whose word number n is TAG and then the lower seven bytes of origin + n.
#[derive(Debug, Clone)]
pub struct Pattern {
    origin: u64,
    at_bytes: u64,
}

impl Pattern {
    /// Connections differ in their upper bytes; the lower four count words.
    pub fn of_connection(index: usize) -> Self {
        Self { origin: (index as u64) << 32, at_bytes: 0 }
    }

    fn continuing(first: [u8; WORD_BYTES]) -> Self {
        Self { origin: u64::from_le_bytes(first) >> 8, at_bytes: 0 }
    }

    pub fn at_bytes(&self) -> u64 {
        self.at_bytes
    }

    /// Writes what comes next.
    pub fn fill(&mut self, mut buffer: &mut [u8]) {
        let inside = (self.at_bytes % WORD_BYTES as u64) as usize;
        if inside > 0 {
            let word = self.word();
            let length = buffer.len().min(WORD_BYTES - inside);
            let (head, rest) = buffer.split_at_mut(length);
            head.copy_from_slice(&word[inside..inside + length]);
            self.at_bytes += length as u64;
            buffer = rest;
        }
        let mut counter = self.counter();
        self.at_bytes += buffer.len() as u64;
        let mut words = buffer.chunks_exact_mut(WORD_BYTES);
        for word in &mut words {
            word.copy_from_slice(&tagged(counter, TAG));
            counter = counter.wrapping_add(1);
        }
        let tail = words.into_remainder();
        tail.copy_from_slice(&tagged(counter, TAG)[..tail.len()]);
    }

    /// How many of the bytes are what comes next.
    pub fn check(&mut self, bytes: &[u8]) -> usize {
        let mut expected = [0; BLOCK_BYTES];
        let mut right = 0;
        for block in bytes.chunks(BLOCK_BYTES) {
            let before = self.at_bytes;
            let expected = &mut expected[..block.len()];
            self.fill(expected);
            if block != expected {
                let same = block.iter().zip(expected).take_while(|(found, expected)| *found == *expected);
                let same = same.count();
                self.at_bytes = before + same as u64;
                return right + same;
            }
            right += block.len();
        }
        right
    }

    fn counter(&self) -> u64 {
        self.origin.wrapping_add(self.at_bytes / WORD_BYTES as u64)
    }

    fn word(&self) -> [u8; WORD_BYTES] {
        tagged(self.counter(), TAG)
    }
}

/// The last word of a stream: how many bytes its sender has sent (a client) or received (an upstream).
pub fn end_word(bytes: u64) -> [u8; WORD_BYTES] {
    tagged(bytes, END_TAG)
}

fn tagged(number: u64, tag: u8) -> [u8; WORD_BYTES] {
    (number << 8 | u64::from(tag)).to_le_bytes()
}

/// The receiving end of a stream that has a last word.
#[derive(Debug)]
pub struct Incoming {
    /// None until the first word has come, for who does not know where the stream begins.
    pattern: Option<Pattern>,
    opening: Vec<u8>,
    closing: Vec<u8>,
}

/// The offset of the first wrong byte.
#[derive(Debug, PartialEq, Eq)]
pub struct WrongAt(pub u64);

impl Incoming {
    pub fn expecting(pattern: Pattern) -> Self {
        Self { pattern: Some(pattern), opening: Vec::new(), closing: Vec::new() }
    }

    pub fn of_anybody() -> Self {
        Self { pattern: None, opening: Vec::new(), closing: Vec::new() }
    }

    pub fn take(&mut self, bytes: &[u8]) -> Result<(), WrongAt> {
        let Some(pattern) = &mut self.pattern else { return self.open(bytes) };
        let right = if self.closing.is_empty() { pattern.check(bytes) } else { 0 };
        let rest = &bytes[right..];
        let Some(first) = rest.first() else { return Ok(()) };
        let is_end = !self.closing.is_empty()
            || (*first == END_TAG && pattern.at_bytes.is_multiple_of(WORD_BYTES as u64));
        if !is_end || self.closing.len() + rest.len() > WORD_BYTES {
            return Err(WrongAt(pattern.at_bytes));
        }
        self.closing.extend_from_slice(rest);
        Ok(())
    }

    /// The stream of the same connection in the other direction has the same words.
    pub fn counterpart(&self) -> Option<Pattern> {
        self.pattern.as_ref().map(|pattern| Pattern { at_bytes: 0, ..pattern.clone() })
    }

    /// Without the last word.
    pub fn received_bytes(&self) -> u64 {
        self.pattern.as_ref().map_or(0, Pattern::at_bytes)
    }

    /// What the last word says, when it has come.
    pub fn ended(&self) -> Option<u64> {
        let word: [u8; WORD_BYTES] = self.closing.as_slice().try_into().ok()?;
        Some(u64::from_le_bytes(word) >> 8)
    }

    fn open(&mut self, bytes: &[u8]) -> Result<(), WrongAt> {
        self.opening.extend_from_slice(bytes);
        let Some(first) = self.opening.first_chunk::<WORD_BYTES>() else { return Ok(()) };
        if first[0] != TAG {
            return Err(WrongAt(0));
        }
        self.pattern = Some(Pattern::continuing(*first));
        let opening = std::mem::take(&mut self.opening);
        self.take(&opening)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream of 10,000 bytes and its last word.
    fn stream() -> Vec<u8> {
        let mut bytes = vec![0; 10_000];
        Pattern::of_connection(3).fill(&mut bytes);
        bytes.extend_from_slice(&end_word(10_000));
        bytes
    }

    fn receive(bytes: &[u8], piece: usize) -> Result<Incoming, WrongAt> {
        let mut incoming = Incoming::of_anybody();
        bytes.chunks(piece).try_for_each(|piece| incoming.take(piece))?;
        Ok(incoming)
    }

    #[test]
    fn a_stream_is_the_same_in_whatever_pieces_it_is_made() {
        for piece in [1, 3, 7, 8, 9, 4095, 4097] {
            let (mut pattern, mut bytes) = (Pattern::of_connection(3), vec![0; 10_000]);
            bytes.chunks_mut(piece).for_each(|piece| pattern.fill(piece));
            assert_eq!(bytes, stream()[..10_000], "{piece}");
        }
    }

    #[test]
    fn a_stream_arrives_in_any_pieces_and_ends_with_its_last_word() {
        for piece in [1, 5, 8, 4096, 20_000] {
            let incoming = receive(&stream(), piece).expect("right");
            assert_eq!((incoming.received_bytes(), incoming.ended()), (10_000, Some(10_000)), "{piece}");
        }
        let before_the_end = receive(&stream()[..10_007], 100).expect("right");
        assert_eq!((before_the_end.received_bytes(), before_the_end.ended()), (10_000, None));
    }

    #[test]
    fn whatever_is_changed_lost_repeated_or_of_another_connection_is_noticed() {
        let stream = stream();
        let flipped = |at: usize| [&stream[..at], &[stream[at] ^ 1], &stream[at + 1..]].concat();
        for at in [0, 8, 5_001, 9_999] {
            assert!(receive(&flipped(at), 100).is_err(), "{at}");
        }
        let mut other = [0; 800];
        Pattern::of_connection(4).fill(&mut other);
        for wrong in [
            [&stream[..800], &stream[808..]].concat(),
            [&stream[..800], &stream[792..]].concat(),
            [&stream[..80], &other[80..]].concat(),
            [&stream[..], &[0]].concat(),
        ] {
            assert!(receive(&wrong, 100).is_err());
        }
        assert_eq!(receive(&flipped(5_001), 100).map(|_| ()), Err(WrongAt(5_001)));
    }
}
