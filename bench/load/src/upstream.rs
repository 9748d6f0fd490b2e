//! Owns the upstream that every contender connects to: it costs as little as an upstream can, and the same for all.
//! Knows not what its services say. One thread, one epoll.

mod bulk;
mod echo;
mod http;
mod line;

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;
use std::time::Duration;

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use serde::Serialize;

use crate::connection::SCRATCH_BYTES;
use crate::descriptors;
use crate::flags::Flags;
use crate::pattern::message_bytes;
use crate::said::say;
use crate::stdin::Stdin;

const STDIN: Token = Token(usize::MAX - 1);
const EVENTS_MAX: usize = 1024;
/// In each direction: so that one busy connection lets the others have their turn.
const TURN_BYTES: usize = 1024 * 1024;

pub struct Plan {
    listen: Vec<SocketAddr>,
    serve: Serve,
    message_bytes: usize,
}

#[derive(Clone, Copy)]
enum Serve {
    Line,
    Http,
    Echo,
    Sink,
    Source,
}

impl Plan {
    pub fn from_flags(flags: &mut Flags) -> Result<Self, String> {
        Ok(Self {
            listen: flags.loopback("listen", Some("127.0.0.1:0"))?,
            serve: flags.choice(
                "serve",
                &[
                    ("line", Serve::Line),
                    ("http", Serve::Http),
                    ("echo", Serve::Echo),
                    ("sink", Serve::Sink),
                    ("source", Serve::Source),
                ],
            )?,
            message_bytes: message_bytes(flags)?,
        })
    }
}

/// What a service does with one connection.
pub trait Service {
    /// Goes on for one turn. An error is the peer's: the connection ends.
    fn turn(&mut self, stream: &mut TcpStream, scratch: &mut [u8]) -> io::Result<Turn>;
}

/// How a turn has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// The socket has to become ready first.
    Waiting,
    /// There may be more to do, after the others had their turn.
    More,
    Over,
}

/// Serves until standard input ends, so that it cannot outlive whoever started it.
pub fn run(plan: &Plan) -> io::Result<()> {
    let mut server = Server::new(plan)?;
    let mut stdin = Stdin::new(server.poll.registry(), STDIN)?;
    say(&Listening { addresses: server.addresses()? })?;
    let mut events = Events::with_capacity(EVENTS_MAX);
    loop {
        let timeout = (!server.unfinished.is_empty()).then_some(Duration::ZERO);
        match server.poll.poll(&mut events, timeout) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            match event.token() {
                STDIN => {
                    if stdin.lines()?.is_none() {
                        return Ok(());
                    }
                }
                Token(token) if token < server.listeners.len() => server.accept(token)?,
                token => server.serve(token),
            }
        }
        for token in std::mem::take(&mut server.unfinished) {
            server.serve(token);
        }
    }
}

#[derive(Serialize)]
#[serde(tag = "event", rename = "listening")]
struct Listening {
    addresses: Vec<SocketAddr>,
}

struct Server {
    poll: Poll,
    serve: Serve,
    message_bytes: usize,
    /// Their tokens are their indices.
    listeners: Vec<TcpListener>,
    connections: HashMap<Token, (TcpStream, Box<dyn Service>)>,
    connections_max: usize,
    next: usize,
    /// Those that stopped only because their turn was over: epoll will not tell of them again.
    unfinished: Vec<Token>,
    scratch: Vec<u8>,
}

impl Server {
    fn new(plan: &Plan) -> io::Result<Self> {
        let poll = Poll::new()?;
        let mut listeners = Vec::new();
        for (index, address) in plan.listen.iter().enumerate() {
            let mut listener = TcpListener::bind(*address)?;
            poll.registry().register(&mut listener, Token(index), Interest::READABLE)?;
            listeners.push(listener);
        }
        Ok(Self {
            poll,
            serve: plan.serve,
            message_bytes: plan.message_bytes,
            next: listeners.len(),
            connections_max: descriptors::raise().saturating_sub(listeners.len()),
            listeners,
            connections: HashMap::new(),
            unfinished: Vec::new(),
            scratch: vec![0; SCRATCH_BYTES],
        })
    }

    fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    fn accept(&mut self, listener: usize) -> io::Result<()> {
        loop {
            match self.listeners[listener].accept() {
                Ok((stream, _)) if self.connections.len() < self.connections_max => self.begin(stream)?,
                // Closed at once, which whoever connected sees.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn begin(&mut self, mut stream: TcpStream) -> io::Result<()> {
        let mut service: Box<dyn Service> = match self.serve {
            Serve::Line => Box::new(line::Line),
            Serve::Http => Box::new(http::Http::default()),
            Serve::Echo => Box::new(echo::Echo::default()),
            Serve::Sink => Box::new(bulk::Bulk::sink()),
            Serve::Source => Box::new(bulk::Bulk::source(self.message_bytes)),
        };
        let _ = stream.set_nodelay(true);
        // Often the question is there already, and a short connection needs no epoll at all.
        let turn = service.turn(&mut stream, &mut self.scratch);
        let Ok(Turn::Waiting | Turn::More) = turn else { return Ok(()) };
        let token = Token(self.next);
        self.next += 1;
        // What has come before the registration is told as well, so there is no need to know which of the two it was.
        self.poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        self.connections.insert(token, (stream, service));
        Ok(())
    }

    fn serve(&mut self, token: Token) {
        // An event may be of a connection that has ended meanwhile.
        let Some((stream, service)) = self.connections.get_mut(&token) else { return };
        match service.turn(stream, &mut self.scratch) {
            Ok(Turn::Waiting) => {}
            Ok(Turn::More) => self.unfinished.push(token),
            // A peer that is gone already shows up as a failure on the client's side.
            Ok(Turn::Over) | Err(_) => {
                self.connections.remove(&token);
            }
        }
    }
}

/// What reading once has found.
fn read_once(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match stream.read(buffer) {
        Ok(read) => Ok(Some(read)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
