//! Owns the echo: back goes what has come.

use std::io::{self, ErrorKind, Write};

use mio::net::TcpStream;

use super::{Service, TURN_BYTES, Turn, read_once};

#[derive(Default)]
pub struct Echo {
    /// What the socket had no room for. Nothing more is read before it is gone, and it takes no memory then: most of these
    /// connections are idle.
    pending: Vec<u8>,
}

impl Service for Echo {
    fn turn(&mut self, stream: &mut TcpStream, scratch: &mut [u8]) -> io::Result<Turn> {
        let mut left = TURN_BYTES;
        let pending = std::mem::take(&mut self.pending);
        if !self.give(stream, &pending)? {
            return Ok(Turn::Waiting);
        }
        while left > 0 {
            match read_once(stream, scratch)? {
                None => return Ok(Turn::Waiting),
                Some(0) => return Ok(Turn::Over),
                Some(read) => {
                    if !self.give(stream, &scratch[..read])? {
                        return Ok(Turn::Waiting);
                    }
                    left = left.saturating_sub(read);
                }
            }
        }
        Ok(Turn::More)
    }
}

impl Echo {
    /// False when some of it has to wait.
    fn give(&mut self, stream: &mut TcpStream, mut bytes: &[u8]) -> io::Result<bool> {
        while !bytes.is_empty() {
            match stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.pending = bytes.to_vec();
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
