//! Owns the upstream that every contender connects to: it costs as little as an upstream can, and the same for all.
//! One thread.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;

use mio::net::{TcpListener, TcpStream};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

/// What a client sends, and what the upstream answers before it closes.
pub const QUESTION: &[u8] = b"keygate?\n";
pub const ANSWER: &[u8] = b"keygate!\n";

const LISTENER: Token = Token(0);
const STDIN: Token = Token(1);
const FIRST_CONNECTION: usize = 2;
const EVENTS_MAX: usize = 256;
const CONNECTIONS_MAX: usize = 10_000;

/// Serves until standard input ends, so that it cannot outlive whoever started it.
pub fn run(address: SocketAddr) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut listener = TcpListener::bind(address)?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    poll.registry().register(&mut SourceFd(&0), STDIN, Interest::READABLE)?;
    println!(r#"{{"event":"listening","address":"{}"}}"#, listener.local_addr()?);

    let mut connections: HashMap<Token, TcpStream> = HashMap::new();
    let mut next = FIRST_CONNECTION;
    let mut events = Events::with_capacity(EVENTS_MAX);
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            match event.token() {
                LISTENER => {
                    while let Some(mut stream) = accepted(listener.accept())? {
                        if connections.len() < CONNECTIONS_MAX && !serve(&mut stream) {
                            let token = Token(next);
                            next += 1;
                            poll.registry().register(&mut stream, token, Interest::READABLE)?;
                            // Bytes that came before the registration are reported as well: epoll looks when it is told.
                            connections.insert(token, stream);
                        }
                    }
                }
                STDIN => {
                    if io::stdin().read(&mut [0; 64])? == 0 {
                        return Ok(());
                    }
                }
                token => {
                    if connections.get_mut(&token).is_some_and(serve) {
                        connections.remove(&token);
                    }
                }
            }
        }
    }
}

fn accepted(result: io::Result<(TcpStream, SocketAddr)>) -> io::Result<Option<TcpStream>> {
    match result {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Answers if the question is there. True when the connection is over. The question is so short that it comes as one piece
/// or the connection is broken, and the answer fits in any fresh socket's buffer.
fn serve(stream: &mut TcpStream) -> bool {
    let mut question = [0; QUESTION.len() + 1];
    match stream.read(&mut question) {
        Ok(read) => {
            if &question[..read] == QUESTION {
                // A peer that is gone already shows up as a failure on the client's side.
                let _ = stream.write(ANSWER);
            }
            true
        }
        Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
    }
}
