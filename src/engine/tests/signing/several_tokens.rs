//! One private key in more than one token.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use keygate_engine::signing::desk::DownReason;
use keygate_engine::signing::token::{Token, TokenPlan};
use keygate_engine::signing::token_key::KeyPlan;
use keygate_engine::signing::{PrivateKey, SignError, Signed};
use tokio::time::Instant;

use crate::control::{FOR_EVER, Function, FunctionControl, Word};
use crate::world::{Kind, PATIENCE, PIN, World, answer, in_own_process, until};

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

    fn a_token_that_is_away_at_the_start_is_used_once_it_is_back(world: World) {
        world.init_token("a");
        let key = world.make_key("a", "k", "A1", Kind::P256);
        let plan = || KeyPlan { id: None, label: Some("k".into()), spki: key.spki.clone(), name: "www".into() };
        let a = Token::start(world.plan("a")).unwrap();
        let b = Token::awaited(world.plan("b")).unwrap();
        b.look();
        let both = PrivateKey::new(vec![a.find_key(plan()).unwrap(), b.expect_key(plan()).unwrap()]).unwrap();
        until("it is looked for", || {
            b.down_reason() == Some(DownReason::Call("its module shows no such token".into()))
        });
        assert_eq!(&*signature(&both, PATIENCE).unwrap().token, "a");
        world.init_token("b");
        world.copy_key("a", "b", "k", "A1");
        until("it is back", || {
            signature(&both, PATIENCE).unwrap();
            b.is_up()
        });
        // Only another initialisation shows it. One that is gone for long does not cost the others one in each second.
        assert!((1..=5).contains(&b.stats().reinitialized.get()), "{}", b.stats().reinitialized.get());
        world.control.of(Function::Sign).fail(0x30, FOR_EVER);
        only(&world.sign(), "a");
        assert_eq!(&*signature(&both, PATIENCE).unwrap().token, "b");
        assert_eq!(world.control.violations(), 0);
    }

    fn a_key_that_could_leave_a_token_that_was_away_signs_nothing(world: World) {
        world.init_token("b");
        let key = world.make_key("b", "k", "A1", Kind::P256);
        world.control.word(Word::Extractable).store(1, SeqCst);
        let b = Token::awaited(world.plan("b")).unwrap();
        let plan = KeyPlan { id: None, label: Some("k".into()), spki: key.spki.clone(), name: "www".into() };
        let key = PrivateKey::new(vec![b.expect_key(plan).unwrap()]).unwrap();
        b.look();
        until("it is found", || {
            matches!(b.down_reason(), Some(DownReason::Call(why)) if why.contains("CKA_EXTRACTABLE"))
        });
        assert_eq!(signature(&key, PATIENCE).err(), Some(SignError::TokenDown));
        assert_eq!(world.calls(Function::Sign), 0);
    }

    fn a_token_is_probed_beside_its_hung_lane_while_another_one_of_the_module_signs(world: World) {
        let ([a, b], key) = two_tokens(&world, |plan| plan.lanes = 2);
        let plan = KeyPlan { id: None, label: Some("k".into()), spki: key.spki().to_vec(), name: "www".into() };
        let of_b = PrivateKey::new(vec![b.find_key(plan).unwrap()]).unwrap();
        let initialized = world.calls(Function::Initialize);
        only(&world.sign(), "b");
        world.sign().hang.store(1, SeqCst);
        let inside = of_b.sign(of_b.schemes()[0], b"message".to_vec()).unwrap();
        until("a lane of it hangs", || world.sign().in_flight.load(SeqCst) == 1);
        let start = world.control.of(Function::SignInit);
        only(&start, "b");
        start.fail(0x30, FOR_EVER);
        let refused = of_b.sign(of_b.schemes()[0], b"message".to_vec()).unwrap();
        let tried = start.injected.load(SeqCst) + 20;
        until("it is probed again and again", || start.injected.load(SeqCst) >= tried);
        assert_eq!(&*signature(&key, PATIENCE).unwrap().token, "a");
        assert!(a.is_up());
        start.rv.store(0, SeqCst);
        world.sign().hang.store(0, SeqCst);
        answer(inside).unwrap();
        drop(refused);
        assert_eq!(world.calls(Function::Initialize), initialized);
        assert_eq!(world.control.violations(), 0);
    }

    fn a_weight_is_adopted_without_another_start(world: World) {
        let ([_a, b], key) = two_tokens(&world, |plan| plan.weight = 0);
        assert_eq!(&*signature(&key, PATIENCE).unwrap().token, "a");
        b.adopt(&PIN.as_bytes().to_vec().into(), u32::MAX);
        assert_eq!(&*signature(&key, PATIENCE).unwrap().token, "b");
    }

    fn a_token_is_not_initialised_where_that_would_cost_another_one_its_login(world: World) {
        world.init_token("a");
        let key = world.make_key("a", "k", "A1", Kind::P256);
        let a = Token::start(world.plan("a")).unwrap();
        let plan = KeyPlan { id: None, label: Some("k".into()), spki: key.spki.clone(), name: "www".into() };
        let key = PrivateKey::new(vec![a.find_key(plan).unwrap()]).unwrap();
        world.control.word(Word::PinTries).store(2, SeqCst);
        world.control.word(Word::PinsRefused).store(1, SeqCst);
        let b = Token::awaited(world.plan("b")).unwrap();
        b.look();
        let lists = world.calls(Function::GetSlotList) + 20;
        until("it is looked for again and again", || world.calls(Function::GetSlotList) >= lists);
        assert_eq!(b.stats().reinitialized.get(), 0);
        signature(&key, PATIENCE).unwrap();
    }
}
