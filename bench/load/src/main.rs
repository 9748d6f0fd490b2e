//! Owns the commands of the load generator: `handshakes` and `upstream`. Knows nothing of what is measured against what.
//! One thread. Talks to loopback addresses only.

mod client;
mod flags;
mod handshakes;
mod latency;
mod upstream;

use std::process::ExitCode;

use flags::Flags;

const USAGE: &str = "\
usage: keygate-load handshakes --to ADDRESS --certificate FILE [--connections N] [--seconds S] [--count N]
                               [--tls 1.2|1.3] [--resume] [--no-exchange] [--verify-every N]
       keygate-load upstream [--listen ADDRESS]

handshakes  N clients (default 16), each with one connection at a time: connect, shake hands, send one line, expect one line
            and the close, again; until S seconds (default 3, at most 600) or N handshakes (default and at most 5000000).
            --certificate is the PEM file that the server must show. One signature in --verify-every (default 32) is verified.
            Prints {\"event\":\"started\"} when every client is warm, and at the end one line with the results.
upstream    Accepts, reads one line, answers with one, closes. Prints {\"event\":\"listening\",\"address\":...}.
            Ends when its standard input does.
ADDRESS     IP:PORT of this host's loopback interface; anything else is refused.";

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
            let address = flags.loopback("listen", Some("127.0.0.1:0"))?;
            flags.refuse_unknown()?;
            Ok(upstream::run(address))
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
