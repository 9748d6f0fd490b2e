//! Owns the HTTP service: HTTP/1.1 with keep-alive and pipelining, and one small answer to every GET. Not a web server: it answers
//! what load generators ask.

use std::io::{self, ErrorKind, Write};

use mio::net::TcpStream;

use super::{Service, Turn, read_once};
use crate::exchange::{ANSWER, HEAD_END};

const HEAD_BYTES_MAX: usize = 8 * 1024;
/// Who does not read its answers gets no more of them.
const ANSWERS_BYTES_MAX: usize = 64 * 1024;

#[derive(Default)]
pub struct Http {
    /// The beginning of a request whose end has not come yet.
    asked: Vec<u8>,
    answers: Vec<u8>,
    closing: bool,
}

impl Service for Http {
    fn turn(&mut self, stream: &mut TcpStream, scratch: &mut [u8]) -> io::Result<Turn> {
        loop {
            self.answer();
            while !self.answers.is_empty() {
                match stream.write(&self.answers) {
                    Ok(written) => drop(self.answers.drain(..written)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Turn::Waiting),
                    Err(error) => return Err(error),
                }
            }
            if self.closing {
                return Ok(Turn::Over);
            }
            match read_once(stream, scratch)? {
                None => return Ok(Turn::Waiting),
                Some(0) => return Ok(Turn::Over),
                Some(read) => self.asked.extend_from_slice(&scratch[..read]),
            }
        }
    }
}

impl Http {
    /// Answers the requests that are complete.
    fn answer(&mut self) {
        let mut done = 0;
        while !self.closing && self.answers.len() < ANSWERS_BYTES_MAX {
            let rest = &self.asked[done..];
            let Some(length) = rest.windows(HEAD_END.len()).position(|window| window == HEAD_END) else {
                self.closing = rest.len() > HEAD_BYTES_MAX;
                break;
            };
            let head = &rest[..length];
            done += length + HEAD_END.len();
            // A request with a body would need its length read; nobody sends one.
            self.closing = !head.starts_with(b"GET ") || asks_for_close(head);
            let (status, connection) = match (head.starts_with(b"GET "), self.closing) {
                (true, false) => ("200 OK", "keep-alive"),
                (true, true) => ("200 OK", "close"),
                (false, _) => ("400 Bad Request", "close"),
            };
            let answer = format!(
                "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
                ANSWER.len()
            );
            self.answers.extend_from_slice(answer.as_bytes());
            self.answers.extend_from_slice(ANSWER);
        }
        self.asked.drain(..done);
    }
}

fn asks_for_close(head: &[u8]) -> bool {
    head.split(|byte| *byte == b'\n').any(|line| line.trim_ascii().eq_ignore_ascii_case(b"connection: close"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(asked: &str) -> (String, Http) {
        let mut http = Http { asked: asked.as_bytes().to_vec(), ..Http::default() };
        http.answer();
        (String::from_utf8_lossy(&http.answers).into_owned(), http)
    }

    #[test]
    fn each_whole_request_is_answered_and_the_rest_waits() {
        let (said, http) = answers("GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\n\r\nGET / HT");
        assert_eq!(said.matches("HTTP/1.1 200 OK\r\n").count(), 2);
        assert_eq!(said.matches("Connection: keep-alive\r\n").count(), 2);
        assert_eq!((http.asked.as_slice(), http.closing), (&b"GET / HT"[..], false));
    }

    #[test]
    fn who_asks_for_the_close_gets_it_after_the_answer() {
        let (said, http) = answers("GET / HTTP/1.1\r\nCONNECTION: Close\r\n\r\nGET / HTTP/1.1\r\n\r\n");
        assert_eq!(said.matches("HTTP/1.1 200 OK\r\n").count(), 1);
        assert!(said.contains("Connection: close\r\n") && http.closing);
    }

    #[test]
    fn another_method_and_an_endless_head_end_the_connection() {
        let (said, http) = answers("POST / HTTP/1.1\r\n\r\n");
        assert!(said.starts_with("HTTP/1.1 400 ") && http.closing);
        let (said, http) = answers(&"x".repeat(HEAD_BYTES_MAX + 1));
        assert!(said.is_empty() && http.closing);
    }
}
