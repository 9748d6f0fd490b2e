//! Owns the service of one line: one question, one answer, close.

use std::io::{self, Write};

use mio::net::TcpStream;

use super::{Service, Turn, read_once};
use crate::exchange::{ANSWER, QUESTION};

/// The question is so short that it comes as one piece or the connection is broken, and the answer fits in any fresh socket's
/// buffer: there is nothing to remember.
pub struct Line;

impl Service for Line {
    fn turn(&mut self, stream: &mut TcpStream, scratch: &mut [u8]) -> io::Result<Turn> {
        let Some(read) = read_once(stream, scratch)? else { return Ok(Turn::Waiting) };
        if &scratch[..read] == QUESTION {
            stream.write_all(ANSWER)?;
        }
        Ok(Turn::Over)
    }
}
