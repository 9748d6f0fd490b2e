//! Owns reading DER (X.690), as far as certificates and OCSP responses need it: one value after the other, each inside its
//! parent. Knows nothing of what the values mean. Pure; every input is hostile.

pub const INTEGER: u8 = 0x02;
pub const BIT_STRING: u8 = 0x03;
pub const OCTET_STRING: u8 = 0x04;
pub const OBJECT_IDENTIFIER: u8 = 0x06;
pub const ENUMERATED: u8 = 0x0a;
pub const UTF8_STRING: u8 = 0x0c;
pub const PRINTABLE_STRING: u8 = 0x13;
pub const IA5_STRING: u8 = 0x16;
pub const UTC_TIME: u8 = 0x17;
pub const GENERALIZED_TIME: u8 = 0x18;
pub const SEQUENCE: u8 = 0x30;
pub const SET: u8 = 0x31;

/// `[number]`, with other values inside.
pub const fn constructed(number: u8) -> u8 {
    0xa0 | number
}

/// The bytes are not DER, or not what was expected there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value<'a> {
    pub tag: u8,
    /// With tag and length.
    pub whole: &'a [u8],
    pub content: &'a [u8],
}

/// What has not been read yet.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many bytes have not been read yet.
    pub fn remaining(&self) -> usize {
        self.0.len()
    }

    pub fn next_tag(&self) -> Option<u8> {
        self.0.first().copied()
    }

    /// # Errors
    /// There is no whole value, or its length is not encoded as DER wants it.
    pub fn any(&mut self) -> Result<Value<'a>, Malformed> {
        let (&tag, after_tag) = self.0.split_first().ok_or(Malformed)?;
        // X.690 8.1.2.4: tags of more than one byte do not occur in what we read.
        if tag & 0x1f == 0x1f {
            return Err(Malformed);
        }
        let (length, after_length) = read_length(after_tag)?;
        let content = after_length.get(..length).ok_or(Malformed)?;
        let head = self.0.len() - after_length.len();
        let (whole, rest) = self.0.split_at(head + length);
        self.0 = rest;
        Ok(Value { tag, whole, content })
    }

    /// # Errors
    /// The next value is another one, or none.
    pub fn expect(&mut self, tag: u8) -> Result<Value<'a>, Malformed> {
        let value = self.any()?;
        if value.tag == tag { Ok(value) } else { Err(Malformed) }
    }

    /// The next value if it has this tag.
    ///
    /// # Errors
    /// It has the tag and is not whole.
    pub fn optional(&mut self, tag: u8) -> Result<Option<Value<'a>>, Malformed> {
        if self.next_tag() == Some(tag) { self.any().map(Some) } else { Ok(None) }
    }

    /// # Errors
    /// Something is left.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed) }
    }
}

impl<'a> Value<'a> {
    pub fn inside(&self) -> Reader<'a> {
        Reader::new(self.content)
    }
}

/// The one value that `bytes` are.
///
/// # Errors
/// They are another one, none, or more than one.
pub fn only(bytes: &[u8], tag: u8) -> Result<Value<'_>, Malformed> {
    let mut reader = Reader::new(bytes);
    let value = reader.expect(tag)?;
    reader.end()?;
    Ok(value)
}

/// X.690 10.1: the definite form, in as few bytes as possible. More than three bytes of length do not fit into TLS.
fn read_length(bytes: &[u8]) -> Result<(usize, &[u8]), Malformed> {
    let (&first, rest) = bytes.split_first().ok_or(Malformed)?;
    if first < 0x80 {
        return Ok((usize::from(first), rest));
    }
    let count = usize::from(first & 0x7f);
    if count == 0 || count > 3 {
        return Err(Malformed);
    }
    let digits = rest.get(..count).ok_or(Malformed)?;
    let length = digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit));
    let minimal = if count == 1 { length >= 0x80 } else { digits[0] != 0 };
    if minimal { Ok((length, &rest[count..])) } else { Err(Malformed) }
}

/// A value with this tag and what `parts` are together.
pub fn encode(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = Vec::with_capacity(length + 6);
    out.push(tag);
    if length < 0x80 {
        out.push(length as u8);
    } else {
        let digits = length.to_be_bytes();
        let significant = &digits[digits.iter().take_while(|digit| **digit == 0).count()..];
        out.push(0x80 | significant.len() as u8);
        out.extend_from_slice(significant);
    }
    for part in parts {
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_that_are_not_der_are_refused() {
        for bytes in [
            &[][..],
            &[0x30],
            &[0x30, 0x80, 0, 0],          // indefinite
            &[0x30, 0x81, 0x01, 0],       // not minimal
            &[0x30, 0x82, 0x00, 0x80, 0], // not minimal
            &[0x30, 0x84, 0, 0, 0, 1, 0], // more than three bytes
            &[0x30, 0x02, 0],             // longer than what there is
            &[0x3f, 0x81, 0x01, 0],       // a long tag
        ] {
            assert_eq!(Reader::new(bytes).any(), Err(Malformed), "{bytes:02x?}");
        }
    }

    #[test]
    fn only_refuses_what_follows() {
        assert!(only(&[0x30, 0], SEQUENCE).is_ok());
        assert_eq!(only(&[0x30, 0, 0], SEQUENCE), Err(Malformed));
        assert_eq!(only(&[0x31, 0], SEQUENCE), Err(Malformed));
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_read_back(content in prop::collection::vec(any::<u8>(), 0..70_000)) {
            let encoded = encode(OCTET_STRING, &[&content]);
            let value = only(&encoded, OCTET_STRING).expect("our own encoding");
            prop_assert_eq!(value.content, &content[..]);
            prop_assert_eq!(value.whole, &encoded[..]);
        }

        #[test]
        fn arbitrary_bytes_are_read_without_panic_and_never_beyond_their_end(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut reader = Reader::new(&bytes);
            let mut read = 0;
            while let Ok(value) = reader.any() {
                read += value.whole.len();
            }
            prop_assert!(read <= bytes.len());
        }
    }
}
