//! Owns what is asked and answered on a short connection. Client and upstream agree by this file. Knows no connection.

/// What a client sends, and what the upstream answers before it closes.
pub const QUESTION: &[u8] = b"keygate?\n";
pub const ANSWER: &[u8] = b"keygate!\n";

const STATUS: &[u8] = b"HTTP/1.1 200 ";
pub const HEAD_END: &[u8] = b"\r\n\r\n";
/// The head of an HTTP answer may be as long; a proxy may add to it.
const HTTP_ANSWER_BYTES_MAX: usize = 8 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// The connection ends with its handshake.
    None,
    Line,
    Http,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Right so far.
    Partial,
    Whole,
    Wrong,
}

impl Exchange {
    pub fn question(self, host: &str) -> Vec<u8> {
        match self {
            Exchange::None => Vec::new(),
            Exchange::Line => QUESTION.to_vec(),
            Exchange::Http => {
                format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").into_bytes()
            }
        }
    }

    /// Judges all that has come.
    pub fn judge(self, answer: &[u8]) -> Verdict {
        match self {
            Exchange::None => compare(answer, b""),
            Exchange::Line => compare(answer, ANSWER),
            Exchange::Http if answer.len() < STATUS.len() => match compare(answer, STATUS) {
                Verdict::Wrong => Verdict::Wrong,
                _ => Verdict::Partial,
            },
            Exchange::Http if !answer.starts_with(STATUS) => Verdict::Wrong,
            Exchange::Http => match answer.windows(HEAD_END.len()).position(|window| window == HEAD_END) {
                Some(head) => compare(&answer[head + HEAD_END.len()..], ANSWER),
                None if answer.len() > HTTP_ANSWER_BYTES_MAX => Verdict::Wrong,
                None => Verdict::Partial,
            },
        }
    }
}

fn compare(found: &[u8], expected: &[u8]) -> Verdict {
    match found == expected {
        true => Verdict::Whole,
        false if expected.starts_with(found) => Verdict::Partial,
        false => Verdict::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_right_only_when_all_of_it_is() {
        let right = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nkeygate!\n";
        for cut in 0..right.len() {
            assert_eq!(Exchange::Http.judge(&right[..cut]), Verdict::Partial, "{cut}");
        }
        assert_eq!(Exchange::Http.judge(right), Verdict::Whole);
        assert_eq!(Exchange::Line.judge(b"keyg"), Verdict::Partial);
        assert_eq!(Exchange::Line.judge(ANSWER), Verdict::Whole);
        assert_eq!(Exchange::None.judge(b""), Verdict::Whole);
        for wrong in [
            &b"HTTP/1.1 503 no\r\n\r\nkeygate!\n"[..],
            b"HTTP/1.1 200 OK\r\n\r\nkeygate?\n",
            b"HTTP/1.1 200 OK\r\n\r\nkeygate!\nand more",
            b"HTTP/1.0",
            &[&b"HTTP/1.1 200 "[..], &[b'x'; HTTP_ANSWER_BYTES_MAX]].concat(),
        ] {
            assert_eq!(Exchange::Http.judge(wrong), Verdict::Wrong);
        }
        assert_eq!(Exchange::Line.judge(QUESTION), Verdict::Wrong);
        assert_eq!(Exchange::None.judge(ANSWER), Verdict::Wrong);
    }
}
