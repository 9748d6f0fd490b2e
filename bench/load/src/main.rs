//! Owns the commands of the load generator. Knows nothing of what is measured against what.
//! One thread. Talks to loopback addresses only.

mod client;
mod connection;
mod crowd;
mod descriptors;
mod echo;
mod exchange;
mod failure;
mod flags;
mod handshakes;
mod idle;
mod latency;
mod pace;
mod pattern;
mod relay;
mod said;
mod stdin;
mod target;
mod tickets;
mod upstream;

use std::io;
use std::process::ExitCode;

use flags::Flags;

const USAGE: &str = "\
usage: keygate-load handshakes TARGET [--connections N] [--seconds S] [--count N] [--rate R] [--resume]
                               [--exchange line|http|none]
       keygate-load idle TARGET [--connections N] [--rate R]
       keygate-load echo TARGET [--connections N] [--seconds S] [--count N] [--rate R] [--bytes B]
       keygate-load relay TARGET [--connections N] [--seconds S] [--direction both|up|down] [--message BYTES]
       keygate-load upstream [--listen ADDRESS[,ADDRESS...]] [--serve line|http|echo|sink|source] [--message BYTES]

handshakes  N clients (default 16), each with one connection at a time: connect, shake hands, send one line or one HTTP request,
            expect the answer and the close, again; until S seconds (default 3, at most 600) or N connections (default and at
            most 5000000). With --rate, R connections begin per second at fixed spacing whatever the server does, latency counts
            from when each was due, and N is the most in flight: what could not begin is a failure, not_begun.
idle        N connections (default 1000) that say nothing, each second R more of them. Prints progress, and holding when all are
            there. A line `check` on standard input sends a line on up to 1000 of them and expects its echo: checked.
            Ends when its standard input does.
echo        On N connections (default 16) messages of B bytes (default 64), each of which must come back: one at a time on each
            connection, or R per second at fixed spacing, and then latency counts from when each was due.
relay       On N connections (default 4) messages of BYTES (default 16384) as fast as they go, to a sink or a source. Each is
            handed to TLS by itself; small ones go to the socket together.
upstream    What a proxy connects to. line: one line, one answer, close; http: HTTP/1.1 with keep-alive; echo; sink: checks what
            comes and says how much it was; source: the same, and sends messages of BYTES from the first word that comes.
            Prints {\"event\":\"listening\",\"addresses\":[...]}. Ends when its standard input does.

TARGET      --to ADDRESS[,ADDRESS...] --certificate FILE [--tls 1.2|1.3] [--group X25519|X25519MLKEM768|secp256r1|secp384r1]
            [--server-name NAME[,NAME...]] [--verify-every N] [--deadline-seconds S]
            --certificate is the PEM file that the server must show; the handshake must use this group (default X25519).
            Several names, or one like host{0..9999}.test, are used in turn: then each certificate must be for its name and have the
            public key of FILE's. One signature in --verify-every (default 32) is verified.
ADDRESS     IP:PORT of this host's loopback interface; anything else is refused.

Each client command prints {\"event\":\"started\"} when it is warm, and at the end one line with the results.";

/// sysexits(3).
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let outcome = Flags::parse(arguments).and_then(|flags| match command.as_str() {
        "handshakes" => start(flags, handshakes::Plan::from_flags, handshakes::run),
        "idle" => start(flags, idle::Plan::from_flags, idle::run),
        "echo" => start(flags, echo::Plan::from_flags, echo::run),
        "relay" => start(flags, relay::Plan::from_flags, relay::run),
        "upstream" => start(flags, upstream::Plan::from_flags, upstream::run),
        other => {
            Err(format!("unknown command {other:?}, expected handshakes, idle, echo, relay or upstream"))
        }
    });
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("keygate-load {command}: {error}");
            ExitCode::FAILURE
        }
        Err(usage) => {
            eprintln!("keygate-load: {usage}\n{USAGE}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// The outer error is of the command line.
fn start<Plan>(
    mut flags: Flags,
    from_flags: fn(&mut Flags) -> Result<Plan, String>,
    run: fn(&Plan) -> io::Result<()>,
) -> Result<io::Result<()>, String> {
    let plan = from_flags(&mut flags)?;
    flags.refuse_unknown()?;
    Ok(run(&plan))
}
