//! Owns the commands of the load generator. Knows nothing of what is measured against what.
//! One thread. Talks to loopback addresses only.

mod client;
mod connection;
mod descriptors;
mod exchange;
mod failure;
mod flags;
mod handshakes;
mod latency;
mod pace;
mod said;
mod stdin;
mod target;
mod tickets;
mod upstream;

use std::process::ExitCode;

use flags::Flags;

const USAGE: &str = "\
usage: keygate-load handshakes TARGET [--connections N] [--seconds S] [--count N] [--rate R] [--resume]
                               [--exchange none|line|http]
       keygate-load upstream [--listen ADDRESS[,ADDRESS...]] [--serve line|http]

handshakes  N clients (default 16), each with one connection at a time: connect, shake hands, send one line or one HTTP request,
            expect the answer and the close, again; until S seconds (default 3, at most 600) or N connections (default and at
            most 5000000). With --rate, R connections begin per second at fixed spacing whatever the server does, latency counts
            from when each was due, and N is the most in flight: what could not begin is a failure, not_begun.
upstream    What a proxy connects to. line: one line, one answer, close; http: HTTP/1.1 with keep-alive.
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
    let outcome = Flags::parse(arguments).and_then(|mut flags| match command.as_str() {
        "handshakes" => {
            let plan = handshakes::Plan::from_flags(&mut flags)?;
            flags.refuse_unknown()?;
            Ok(handshakes::run(&plan))
        }
        "upstream" => {
            let plan = upstream::Plan::from_flags(&mut flags)?;
            flags.refuse_unknown()?;
            Ok(upstream::run(&plan))
        }
        other => Err(format!("unknown command {other:?}, expected handshakes or upstream")),
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
