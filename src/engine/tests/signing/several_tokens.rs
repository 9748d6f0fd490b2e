//! One private key in more than one token.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use keygate_engine::signing::token::{Token, TokenPlan};
use keygate_engine::signing::token_key::KeyPlan;
use keygate_engine::signing::{PrivateKey, SignError, Signed};
use tokio::time::Instant;

use crate::control::{FOR_EVER, FunctionControl};
use crate::world::{Kind, PATIENCE, World, answer, in_own_process, until};

/// One key in the tokens `a` and `b`; the plan of `b` can be changed.
fn two_tokens(world: &World, change: impl FnOnce(&mut TokenPlan)) -> ([Arc<Token>; 2], Arc<PrivateKey>) {
    world.init_token("a");
    world.init_token("b");
    let key = world.make_key("a", "k", "A1", Kind::P256);
    world.copy_key("a", "b", "k", "A1");
    let mut plan_of_b = world.plan("b");
    change(&mut plan_of_b);
    let tokens = [world.plan("a"), plan_of_b].map(|plan| Token::start(plan).unwrap());
    let keys = tokens.each_ref().map(|token| {
        let plan = KeyPlan { id: None, label: Some("k".into()), spki: key.spki.clone(), name: "www".into() };
        token.find_key(plan).unwrap()
    });
    (tokens, PrivateKey::new(keys.to_vec()).unwrap())
}

fn signature(key: &Arc<PrivateKey>, within: Duration) -> Result<Signed, SignError> {
    answer(async { key.signature(key.schemes()[0], b"message".to_vec(), Instant::now() + within).await })
}

/// From now on faults are this token's.
fn only(control: &FunctionControl<'_>, token: &str) {
    let mut label = [b' '; 8];
    label[..token.len()].copy_from_slice(token.as_bytes());
    control.only_token.store(u64::from_le_bytes(label), SeqCst);
}

token_tests! {
    fn a_request_whose_token_fails_is_signed_by_the_next_one(world: World) {
        let ([a, b], key) = two_tokens(&world, |_| {});
        only(&world.sign(), "a");
        world.sign().fail(0x30, FOR_EVER);
        for _ in 0..20 {
            assert_eq!(&*signature(&key, PATIENCE).unwrap().token, "b");
        }
        assert!(a.stats().failed_over.get() >= 1);
        assert_eq!(b.stats().failed_over.get(), 0);
        assert!(!a.is_up() && key.is_up());
        world.sign().rv.store(0, SeqCst);
        until("the first token is back", || a.is_up());
        assert_eq!(world.control.violations(), 0);
    }

    fn a_request_whose_token_hangs_is_signed_by_the_next_one_in_its_own_time(world: World) {
        let ([a, _b], key) = two_tokens(&world, |_| {});
        only(&world.sign(), "a");
        world.sign().hang.store(1, SeqCst);
        let asked = Instant::now();
        // The first token is asked first, and then not again for a while.
        for _ in 0..10 {
            assert_eq!(&*signature(&key, Duration::from_secs(2)).unwrap().token, "b");
        }
        assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
        assert!(a.stats().failed_over.get() >= 1);
        world.sign().hang.store(0, SeqCst);
        until("the first token's lane is back", || a.stats().lanes_busy.get() == 0);
    }

    fn a_token_of_weight_0_is_asked_when_no_other_is_up(world: World) {
        let ([a, b], key) = two_tokens(&world, |plan| plan.weight = 0);
        for _ in 0..20 {
            assert_eq!(&*signature(&key, PATIENCE).unwrap().token, "a");
        }
        only(&world.sign(), "a");
        world.sign().fail(0x30, FOR_EVER);
        assert_eq!(&*signature(&key, PATIENCE).unwrap().token, "b");
        world.sign().rv.store(0, SeqCst);
        until("the first token is back", || a.is_up());
        assert_eq!(&*signature(&key, PATIENCE).unwrap().token, "a");
        assert!(b.is_up());
    }

    fn a_token_is_asked_as_much_more_as_it_weighs(world: World) {
        let (_tokens, key) = two_tokens(&world, |plan| plan.weight = 3);
        world.sign().delay_us.store(2_000, SeqCst);
        // What they cost is known once each was asked.
        (0..10).for_each(|_| drop(signature(&key, PATIENCE).unwrap()));
        let pending: Vec<_> =
            (0..200).map(|_| key.sign(key.schemes()[0], b"message".to_vec()).unwrap()).collect();
        let by_b = pending.into_iter().map(|signature| answer(signature).unwrap());
        let by_b = by_b.filter(|signed| &*signed.token == "b").count();
        assert!((120..=180).contains(&by_b), "{by_b} of 200");
    }

    fn a_wrong_signature_of_one_token_costs_nobody_a_handshake(world: World) {
        let (_tokens, key) = two_tokens(&world, |_| {});
        only(&world.sign(), "a");
        world.sign().flip_left.store(1, SeqCst);
        world.sign().flip_every.store(1, SeqCst);
        signature(&key, PATIENCE).unwrap();
    }
}
