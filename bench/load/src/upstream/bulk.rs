//! Owns sink and source: both check what comes, and say at its end how much it was; a source sends as well, from the first word
//! that it gets to the last.

use std::io::{self, ErrorKind, Write};

use mio::net::TcpStream;

use super::{Service, TURN_BYTES, Turn, read_once};
use crate::pattern::{Incoming, Pattern, end_word};

pub struct Bulk {
    incoming: Incoming,
    /// None for a sink.
    source: Option<Source>,
    /// The last word has been made.
    closing: bool,
    /// What is being sent: a message or the last word, and how much of it has gone.
    outgoing: Vec<u8>,
    sent: usize,
}

struct Source {
    pattern: Option<Pattern>,
    message_bytes: usize,
}

impl Bulk {
    pub fn sink() -> Self {
        Self::new(None)
    }

    pub fn source(message_bytes: usize) -> Self {
        Self::new(Some(Source { pattern: None, message_bytes }))
    }

    fn new(source: Option<Source>) -> Self {
        Self { incoming: Incoming::of_anybody(), source, closing: false, outgoing: Vec::new(), sent: 0 }
    }
}

impl Service for Bulk {
    fn turn(&mut self, stream: &mut TcpStream, scratch: &mut [u8]) -> io::Result<Turn> {
        let received = self.receive(stream, scratch)?;
        if received == Turn::Over {
            return Ok(Turn::Over);
        }
        let sent = self.send(stream)?;
        Ok(if received == Turn::More || sent == Turn::More { Turn::More } else { Turn::Waiting })
    }
}

impl Bulk {
    fn receive(&mut self, stream: &mut TcpStream, scratch: &mut [u8]) -> io::Result<Turn> {
        let mut left = TURN_BYTES;
        while left > 0 {
            match read_once(stream, scratch)? {
                None => return Ok(Turn::Waiting),
                Some(0) => return Ok(Turn::Over),
                Some(read) => {
                    self.incoming.take(&scratch[..read]).map_err(|wrong| {
                        eprintln!("keygate-load upstream: wrong byte at {} of a stream", wrong.0);
                        io::Error::from(ErrorKind::InvalidData)
                    })?;
                    left = left.saturating_sub(read);
                }
            }
        }
        Ok(Turn::More)
    }

    fn send(&mut self, stream: &mut TcpStream) -> io::Result<Turn> {
        let mut left = TURN_BYTES;
        loop {
            while self.sent < self.outgoing.len() {
                match stream.write(&self.outgoing[self.sent..]) {
                    Ok(written) => self.sent += written,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Turn::Waiting),
                    Err(error) => return Err(error),
                }
            }
            if left == 0 {
                return Ok(Turn::More);
            }
            if !self.next_outgoing() {
                return Ok(Turn::Waiting);
            }
            left = left.saturating_sub(self.outgoing.len());
        }
    }

    /// False when there is nothing to send now.
    fn next_outgoing(&mut self) -> bool {
        if self.closing {
            return false;
        }
        if self.incoming.ended().is_some() {
            self.closing = true;
            self.outgoing = end_word(self.incoming.received_bytes()).to_vec();
        } else {
            let Some(source) = &mut self.source else { return false };
            source.pattern = source.pattern.take().or_else(|| self.incoming.counterpart());
            let Some(pattern) = &mut source.pattern else { return false };
            self.outgoing.resize(source.message_bytes, 0);
            pattern.fill(&mut self.outgoing);
        }
        self.sent = 0;
        true
    }
}
