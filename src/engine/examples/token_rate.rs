//! What a token can do: as many threads as lanes, each with a PKCS#11 session of its own, that do nothing but C_SignInit and
//! C_Sign. The benchmark (bench/token-rate.ts) holds keygate's handshakes against it.
//!
//! SOFTHSM2_CONF=... token_rate sign --module FILE --token LABEL --pin-file FILE --key LABEL --spki FILE.der --threads N --seconds S
//!
//! Says {"event":"started"}, and at the end {"event":"finished","signatures":N,"seconds":S}.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use keygate_engine::signing::login::Maker;
use keygate_engine::signing::pkcs11::{Matches, Mechanism, Module, Session};
use keygate_engine::signing::public_key::PublicKey;
use keygate_engine::signing::token::{Token, TokenPlan};

const MESSAGE: &[u8] = &[7; 130];
/// Of the longest signature, RSA-4096's.
const SIGNATURE_BYTES_MAX: usize = 512;
const THREADS_MAX: usize = 256;
const SECONDS_MAX: f64 = 60.0;

fn main() {
    let flags = Flags::parse();
    let threads = flags.text("threads").parse().expect("--threads: a number");
    assert!((1..=THREADS_MAX).contains(&threads), "--threads: expected 1 to {THREADS_MAX}");
    let seconds = flags.text("seconds").parse().expect("--seconds: a number");
    assert!((0.01..=SECONDS_MAX).contains(&seconds), "--seconds: expected 0.01 to {SECONDS_MAX}");
    let spki = std::fs::read(flags.text("spki")).expect("the public key");
    let public = PublicKey::from_spki(&spki).expect("a public key");
    let (mechanism, input) = public.token_request(public.schemes()[0], MESSAGE).expect("a scheme");

    // Logs in, once and under the lock that keeps programs apart, and is idle then. The login holds for all PKCS#11 sessions.
    let _logged_in = Token::start(token_plan(&flags)).expect("the token starts");
    let module = Module::load(flags.text("module").as_ref(), true).expect("loaded already");
    let barrier = Arc::new(Barrier::new(threads + 1));
    let signers: Vec<_> = (0..threads)
        .map(|_| {
            let (session, key) = signer(&module, &flags);
            let (barrier, input) = (barrier.clone(), input.clone());
            thread::spawn(move || sign(session, mechanism, key, &input, &barrier, seconds))
        })
        .collect();
    barrier.wait();
    println!(r#"{{"event":"started"}}"#);
    let began = Instant::now();
    let signatures: u64 = signers.into_iter().map(|signer| signer.join().expect("signs to the end")).sum();
    let seconds = began.elapsed().as_secs_f64();
    println!(r#"{{"event":"finished","signatures":{signatures},"seconds":{seconds}}}"#);
}

fn token_plan(flags: &Flags) -> TokenPlan {
    let pin = std::fs::read(flags.text("pin-file")).expect("the PIN");
    TokenPlan {
        name: "token".into(),
        module: flags.text("module").into(),
        label: flags.text("token").to_owned(),
        serial: None,
        maker: Maker::default(),
        pin: pin.trim_ascii().to_vec().into(),
        lanes: 1,
        threads_max: 1,
        lost_after: Duration::from_secs(60),
        weight: 1,
        queue_max: 1,
        queue_age_max: Duration::from_secs(60),
        login_lock_wait: Duration::from_secs(5),
        isolate: true,
        verify_rsa_every: 1,
        verify_ec_every: 1,
    }
}

fn signer(module: &Arc<Module>, flags: &Flags) -> (Session, u64) {
    let labelled = |slot: &_| module.token_info(*slot).is_ok_and(|info| info.label == flags.text("token"));
    let slot = module.slots().expect("slots").into_iter().find(labelled).expect("the token");
    let session = Session::open(module, slot, module.incarnation()).expect("a session");
    let Matches::One(key) = session.find_private_keys(None, Some(flags.text("key"))).expect("a search")
    else {
        panic!("--key {}: expected one private key of this label", flags.text("key"));
    };
    (session, key)
}

fn sign(
    session: Session,
    mechanism: Mechanism,
    key: u64,
    input: &[u8],
    barrier: &Barrier,
    seconds: f64,
) -> u64 {
    let mut room = [0; SIGNATURE_BYTES_MAX];
    let mut signatures = 0;
    barrier.wait();
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    while Instant::now() < until {
        session.sign(mechanism, key, input, &mut room).expect("signs");
        signatures += 1;
    }
    signatures
}

struct Flags(HashMap<String, String>);

impl Flags {
    fn parse() -> Self {
        let arguments: Vec<String> = std::env::args().skip(2).collect();
        let named = |pair: &[String]| match pair {
            [name, value] => (name.trim_start_matches("--").to_owned(), value.clone()),
            _ => panic!("{pair:?}: expected a value"),
        };
        Self(arguments.chunks(2).map(named).collect())
    }

    fn text(&self, name: &str) -> &str {
        self.0.get(name).unwrap_or_else(|| panic!("--{name} is missing"))
    }
}
