//! Owns one short connection, from connect to close, and what is expected of it. Knows no clock and no other connection.
//! Never waits: `drive` goes as far as the socket lets it.

use crate::connection::{Connection, Flow, Negotiated};
use crate::exchange::{Exchange, Verdict};
use crate::failure::{Failure, Fault};

/// How far a connection has come.
#[derive(Debug, PartialEq)]
pub enum Progress {
    /// The socket has to become ready first.
    Waiting,
    /// Reported once, on the way.
    HandshakeDone(Negotiated),
    /// As expected, to the close.
    Ended,
}

pub struct Client {
    pub connection: Connection,
    exchange: Exchange,
    handshake_done: bool,
    question: Vec<u8>,
    answer: Vec<u8>,
}

impl Client {
    pub fn new(connection: Connection, exchange: Exchange, host: &str) -> Self {
        let question = exchange.question(host);
        Self { connection, exchange, handshake_done: false, question, answer: Vec::new() }
    }

    /// Goes on until the socket would block, the handshake is done, or all is over.
    pub fn drive(&mut self, scratch: &mut [u8]) -> Result<Progress, Fault> {
        loop {
            if !self.handshake_done
                && let Some(negotiated) = self.finished_handshake()
            {
                self.handshake_done = true;
                // In one packet with Finished, as browsers send it.
                self.connection.send(&self.question)?;
                return Ok(Progress::HandshakeDone(negotiated));
            }
            let flushed = self.connection.flush()?;
            if self.handshake_done && self.exchange == Exchange::None {
                return Ok(if flushed { Progress::Ended } else { Progress::Waiting });
            }
            let (exchange, answer) = (self.exchange, &mut self.answer);
            let flow = self.connection.receive(scratch, |bytes| {
                answer.extend_from_slice(bytes);
                match exchange.judge(answer) {
                    Verdict::Wrong => Err(Failure::WrongAnswer),
                    Verdict::Partial | Verdict::Whole => Ok(()),
                }
            })?;
            match flow {
                Flow::Dry => return Ok(Progress::Waiting),
                Flow::More => {}
                Flow::Closed
                    if self.handshake_done && self.exchange.judge(&self.answer) == Verdict::Whole =>
                {
                    return Ok(Progress::Ended);
                }
                Flow::Closed => return Err(self.connection.closed().into()),
            }
        }
    }

    fn finished_handshake(&self) -> Option<Negotiated> {
        (!self.connection.is_handshaking()).then(|| self.connection.negotiated()).flatten()
    }
}
