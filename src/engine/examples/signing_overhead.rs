//! What a lane costs: signatures through the desk and a lane against the same number straight through C_SignInit and
//! C_Sign, in turns on one machine, so that only the ratios count.
//!
//! SOFTHSM2_CONF=... cargo run --release --example signing_overhead -- MODULE TOKEN PIN LABEL SPKI.der

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use keygate_engine::signing::PrivateKey;
use keygate_engine::signing::login::Maker;
use keygate_engine::signing::pkcs11::{Matches, Module, Session};
use keygate_engine::signing::public_key::PublicKey;
use keygate_engine::signing::token::{Token, TokenPlan};
use keygate_engine::signing::token_key::KeyPlan;

const ROUNDS: usize = 21;
const ROUND_TIME: Duration = Duration::from_millis(150);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [module, label, pin, key_label, spki] = &arguments[..] else {
        panic!("expected MODULE TOKEN PIN LABEL SPKI.der");
    };
    let spki = std::fs::read(spki).expect("the public key");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");

    let lanes = [1, 2].map(|lanes| {
        let token = Token::start(TokenPlan {
            name: format!("{lanes}-lanes"),
            module: module.into(),
            label: label.clone(),
            serial: None,
            maker: Maker::default(),
            pin: pin.as_bytes().to_vec().into(),
            lanes,
            threads_max: lanes,
            lost_after: Duration::from_secs(60),
            weight: 1,
            queue_max: 4096,
            queue_age_max: Duration::from_secs(60),
            login_lock_wait: Duration::from_secs(5),
            isolate: true,
            verify_rsa_every: 1,
            verify_ec_every: 256,
        })
        .expect("the token starts");
        let plan =
            KeyPlan { id: None, label: Some(key_label.clone()), spki: spki.clone(), name: "key".into() };
        PrivateKey::new(vec![token.find_key(plan).expect("the key")]).expect("one token")
    });

    let module = Module::load(module.as_ref(), true).expect("loaded already");
    let slot = module
        .slots()
        .expect("slots")
        .into_iter()
        .find(|slot| module.token_info(*slot).is_ok_and(|info| info.label == *label))
        .expect("the token");
    let session = Session::open(&module, slot, module.incarnation()).expect("a session");
    let Matches::One(handle) = session.find_private_keys(None, Some(key_label)).expect("a search") else {
        panic!("not one key");
    };
    let public = PublicKey::from_spki(&spki).expect("a public key");
    let (mechanism, input) = public.token_request(public.schemes()[0], MESSAGE).expect("a scheme");
    let mut room = [0; 1024];

    let mut bare_us = Vec::new();
    let mut one_us = Vec::new();
    let mut pipe_us = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        bare_us.push(round(1, || {
            session.sign(mechanism, handle, &input, &mut room).expect("signs");
        }));
        one_us.push(round(1, || runtime.block_on(sign_many(&lanes[0], 1))));
        for (lanes, pipe_us) in lanes.iter().zip(&mut pipe_us) {
            pipe_us.push(round(32, || runtime.block_on(sign_many(lanes, 32))));
        }
    }
    let bare = median(&bare_us);
    println!(
        "{} bare C_SignInit+C_Sign: {:.1} us ({:.1} us of CPU)",
        public.algorithm(),
        bare.wall,
        bare.cpu
    );
    let line = |what: &str, us: Vec<Cost>| {
        let us = median(&us);
        println!(
            "  {what}: {:.1} us, {:.0}/s, {:.2} x bare, {:+.1} us; CPU {:.2} x bare, {:+.1} us",
            us.wall,
            1e6 / us.wall,
            us.wall / bare.wall,
            us.wall - bare.wall,
            us.cpu / bare.cpu,
            us.cpu - bare.cpu
        );
    };
    line("one at a time, submit to result (1 lane)", one_us);
    let [pipe_one, pipe_two] = pipe_us;
    line("32 in flight, 1 lane", pipe_one);
    line("32 in flight, 2 lanes", pipe_two);
}

const MESSAGE: &[u8] = &[7; 130];

async fn sign_many(key: &Arc<PrivateKey>, count: usize) {
    let scheme = key.schemes()[0];
    let pending: Vec<_> =
        (0..count).map(|_| key.sign(scheme, MESSAGE.to_vec()).expect("submitted")).collect();
    for signature in pending {
        signature.await.expect("signed");
    }
}

/// Microseconds per signature. CPU is that of the whole process, which neighbours on the machine disturb less.
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    cpu: f64,
}

/// `work` makes so many signatures.
fn round(signatures: u32, mut work: impl FnMut()) -> Cost {
    let (start, cpu_start) = (Instant::now(), cpu_us());
    let mut count = 0;
    while start.elapsed() < ROUND_TIME {
        work();
        count += signatures;
    }
    let count = f64::from(count);
    Cost { wall: start.elapsed().as_secs_f64() * 1e6 / count, cpu: (cpu_us() - cpu_start) / count }
}

fn cpu_us() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

fn median(costs: &[Cost]) -> Cost {
    let middle = |of: fn(&Cost) -> f64| {
        let mut values: Vec<f64> = costs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Cost { wall: middle(|cost| cost.wall), cpu: middle(|cost| cost.cpu) }
}
