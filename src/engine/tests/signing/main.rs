//! The signing lanes against a real SoftHSM behind the fault module. Each test runs in a process and a token of its own.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bystander;
#[path = "../../../../test/fault-module/src/control.rs"]
mod control;
mod world;

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use keygate_engine::signing::desk::DownReason;
use keygate_engine::signing::login_lock::LoginLock;
use keygate_engine::signing::pkcs11::{Release, threads_in_modules};
use keygate_engine::signing::token::{StopOutcome, Token};
use keygate_engine::signing::token_error::Problem;
use keygate_engine::signing::token_key::KeyPlan;
use keygate_engine::signing::{PrivateKey, SignError};
use rustls::SignatureScheme;

use control::{FOR_EVER, Function};
use world::{Kind, PrivateKeyOf, World, answer, find, in_own_process, until};

macro_rules! token_tests {
    ($(fn $name:ident($world:ident: World) $body:block)*) => {$(
        #[test]
        fn $name() {
            in_own_process(concat!(module_path!(), "::", stringify!($name)), |$world: World| $body);
        }
    )*};
}

mod recovery;
mod several_tokens;

/// A token with so many lanes, all idle.
fn idle_lanes(world: &World, lanes: usize) -> (Arc<Token>, Vec<PrivateKeyOf>) {
    let (token, keys) = world.start(&[Kind::P256], |plan| plan.lanes = lanes);
    world.sign().hang.store(1, SeqCst);
    let pending: Vec<_> = (0..lanes).map(|_| keys[0].submit().unwrap()).collect();
    until("every lane signs", || world.sign().in_flight.load(SeqCst) == lanes as u64);
    world.sign().hang.store(0, SeqCst);
    pending.into_iter().for_each(|signature| drop(answer(signature).unwrap()));
    until("every lane is idle", || token.stats().lanes_idle.get() == lanes as i64);
    (token, keys)
}

/// How often each lane of this process has gone to sleep, once all of them sleep (proc_pid_status(5)).
fn sleeps_of_lanes() -> HashMap<String, u64> {
    let lanes = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        // A thread that is no lane may end meanwhile.
        let status = tasks.filter_map(|task| fs::read_to_string(task.join("status")).ok());
        status.filter(|status| status.starts_with("Name:\tlane-")).collect::<Vec<_>>()
    };
    until("every lane sleeps", || lanes().iter().all(|status| status.contains("State:\tS")));
    let field = |status: &str, name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
    };
    lanes()
        .iter()
        .map(|status| (field(status, "Name:"), field(status, "voluntary_ctxt_switches:").parse().unwrap()))
        .collect()
}

const STOP_BUDGET: Duration = Duration::from_secs(10);
/// Where a test waits for something to be too late.
const SOON: Duration = Duration::from_millis(200);

/// A request that waited for a token in vain.
fn is_shed<T>(answer: Result<T, SignError>) -> bool {
    matches!(answer, Err(SignError::QueueAged | SignError::TokenDown))
}

token_tests! {
    fn every_scheme_of_every_key_type_is_accepted_by_openssl(world: World) {
        let kinds = [Kind::P256, Kind::P384, Kind::Rsa2048, Kind::Ed25519];
        let (token, keys) = world.start(&kinds, |_| {});
        let mut schemes = 0;
        for key in &keys {
            for scheme in key.private.schemes() {
                let message = b"what a server signs in CertificateVerify".to_vec();
                let signed = answer(key.private.sign(*scheme, message.clone()).unwrap()).unwrap();
                assert!(world.openssl_accepts(&key.key, *scheme, &message, &signed.signature), "{scheme:?}");
                assert!(!world.openssl_accepts(&key.key, *scheme, b"another message", &signed.signature));
                assert_eq!(&*signed.token, "t");
                schemes += 1;
            }
        }
        assert_eq!(schemes, 9);
        assert_eq!(token.stats().rsa_pkcs_pss.ok.get(), 3);
        assert_eq!(token.stats().rsa_pkcs.ok.get(), 3);
        assert_eq!(token.stats().ecdsa.ok.get(), 2);
        assert_eq!(token.stats().eddsa.ok.get(), 1);
    }

    fn a_scheme_the_key_cannot_sign_is_refused_at_once(world: World) {
        let (_token, keys) = world.start(&[Kind::P256], |_| {});
        let refused = keys[0].private.sign(SignatureScheme::RSA_PSS_SHA256, vec![]);
        assert_eq!(refused.err(), Some(SignError::SchemeUnsupported));
    }

    fn many_signatures_on_many_lanes_log_in_once_and_break_no_rule(world: World) {
        let (token, keys) = world.start(&[Kind::P256, Kind::Rsa2048], |plan| plan.lanes = 4);
        world.sign().delay_us.store(500, SeqCst);
        let pending: Vec<_> = (0..200).map(|index| keys[index % 2].submit().unwrap()).collect();
        for signature in pending {
            answer(signature).unwrap();
        }
        assert_eq!(world.calls(Function::Login), 1);
        assert_eq!(world.sign().in_flight_max.load(SeqCst), 4);
        assert_eq!(token.stop(STOP_BUDGET), StopOutcome::Stopped(Release::Finalized));
        assert_eq!(world.calls(Function::Finalize), 1);
        assert_eq!(world.control.violations(), 0);
    }

    fn a_burst_calls_as_many_idle_lanes_as_there_are_requests(world: World) {
        const LANES: usize = 4;
        let (_token, keys) = idle_lanes(&world, LANES);
        world.sign().hang.store(1, SeqCst);
        let pending: Vec<_> = (0..LANES).map(|_| keys[0].submit().unwrap()).collect();
        until("every lane signs", || world.sign().in_flight.load(SeqCst) == LANES as u64);
        world.sign().hang.store(0, SeqCst);
        pending.into_iter().for_each(|signature| drop(answer(signature).unwrap()));
    }

    fn one_request_at_a_time_wakes_one_lane_and_always_the_same(world: World) {
        const LANES: usize = 4;
        let (token, keys) = idle_lanes(&world, LANES);
        keys[0].sign().unwrap();
        until("the lane is idle again", || token.stats().lanes_idle.get() == LANES as i64);
        let before = sleeps_of_lanes();
        for _ in 0..20 {
            keys[0].sign().unwrap();
            until("the lane is idle again", || token.stats().lanes_idle.get() == LANES as i64);
        }
        let after = sleeps_of_lanes();
        assert_eq!(before.len(), LANES);
        let woken = before.iter().filter(|(lane, sleeps)| after[*lane] != **sleeps).count();
        assert_eq!(woken, 1, "{before:?} {after:?}");
    }

    fn a_token_starts_again_after_it_was_stopped(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        keys[0].sign().unwrap();
        assert_eq!(token.stop(STOP_BUDGET), StopOutcome::Stopped(Release::Finalized));
        assert_eq!(keys[0].sign().err(), Some(SignError::TokenDown));
        let again = Token::start(world.plan("t")).unwrap();
        let key = find(&again, world::Key {
            label: keys[0].key.label.clone(),
            spki: keys[0].key.spki.clone(),
            public_pem: keys[0].key.public_pem.clone(),
        });
        key.unwrap().sign().unwrap();
        assert_eq!(world.control.violations(), 0);
    }

    fn the_module_is_finalised_by_the_last_of_its_tokens(world: World) {
        world.init_token("one");
        world.init_token("two");
        let one = Token::start(world.plan("one")).unwrap();
        let two = Token::start(world.plan("two")).unwrap();
        assert_eq!(one.stop(STOP_BUDGET), StopOutcome::Stopped(Release::StillUsed));
        assert_eq!(two.stop(STOP_BUDGET), StopOutcome::Stopped(Release::Finalized));
        assert_eq!(world.control.violations(), 0);
    }

    fn a_token_that_is_not_there_is_named_with_those_that_are(world: World) {
        world.init_token("present");
        let error = Token::start(world.plan("absent")).err().unwrap();
        assert!(matches!(error.problem, Problem::TokenMissing { .. }), "{error}");
        assert!(error.to_string().contains("absent") && error.to_string().contains("present"), "{error}");
        assert_eq!(world.calls(Function::Login), 0);
    }

    fn two_tokens_with_one_label_are_told_apart_by_serial_only(world: World) {
        world.init_token("twin");
        world.init_token("twin");
        let error = Token::start(world.plan("twin")).err().unwrap();
        let Problem::TokenAmbiguous { serials, .. } = error.problem else { panic!("{error}") };
        assert_eq!(serials.len(), 2);
        assert_eq!(world.calls(Function::Login), 0);
        let mut plan = world.plan("twin");
        plan.serial = Some(serials[1].clone());
        Token::start(plan).unwrap();
    }

    fn a_missing_an_ambiguous_and_a_foreign_key_are_refused(world: World) {
        world.init_token("t");
        let first = world.make_key("t", "double", "A1", Kind::P256);
        let second = world.make_key("t", "double", "A2", Kind::P256);
        let token = Token::start(world.plan("t")).unwrap();
        let plan = |id: Option<u8>, label: Option<&str>, spki: &[u8]| KeyPlan {
            id: id.map(|id| vec![id]),
            label: label.map(str::to_owned),
            spki: spki.to_vec(),
            name: "www".into(),
        };
        let problem = |plan| token.find_key(plan).err().unwrap().problem.code();
        assert_eq!(problem(plan(None, Some("double"), &first.spki)), "key_ambiguous");
        assert_eq!(problem(plan(Some(0xA3), Some("double"), &first.spki)), "key_missing");
        assert_eq!(problem(plan(Some(0xA2), Some("double"), &first.spki)), "key_mismatch");
        assert_eq!(problem(plan(None, None, &first.spki)), "key_unnamed");
        assert_eq!(problem(plan(Some(0xA1), None, b"nonsense")), "public_key");
        token.find_key(plan(Some(0xA1), None, &first.spki)).unwrap();
        token.find_key(plan(Some(0xA2), Some("double"), &second.spki)).unwrap();
        assert!(token.is_up(), "a wrong configuration of one key is no fault of the token");
    }

    fn certificates_that_share_a_key_share_its_search_and_its_proof(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        let calls = || (world.calls(Function::FindObjectsInit), world.calls(Function::Sign));
        let before = calls();
        let plan = |name: &str| KeyPlan {
            id: None,
            label: Some(keys[0].key.label.clone()),
            spki: keys[0].key.spki.clone(),
            name: name.into(),
        };
        let one = token.find_key(plan("one")).unwrap();
        assert!(Arc::ptr_eq(&one, &token.find_key(plan("other")).unwrap()));
        assert_eq!(calls(), before);

        // Nobody uses it any more: it is proved anew.
        let last = plan("last");
        drop((one, keys));
        token.find_key(last).unwrap();
        assert_eq!(calls(), (before.0 + 1, before.1 + 1));
    }

    fn the_keys_of_many_certificates_are_found_by_listing_them_once(world: World) {
        world.init_token("t");
        let keys: Vec<_> =
            (0..8_u8).map(|n| world.make_key("t", &format!("k{n}"), &format!("C{n}"), Kind::P256)).collect();
        world.make_key("t", "twin", "D1", Kind::P256);
        world.make_key("t", "twin", "D2", Kind::P256);
        let token = Token::start(world.plan("t")).unwrap();
        let plan = |id: Option<u8>, label: Option<&str>, spki: &[u8]| KeyPlan {
            id: id.map(|id| vec![id]),
            label: label.map(str::to_owned),
            spki: spki.to_vec(),
            name: "www".into(),
        };
        let mut found = Vec::new();
        for (n, key) in (0..8_u8).zip(&keys) {
            for (id, label) in
                [(Some(0xC0 + n), None), (None, Some(&*key.label)), (Some(0xC0 + n), Some(&*key.label))]
            {
                found.push(token.find_key(plan(id, label, &key.spki)).unwrap());
            }
        }
        let searches = world.calls(Function::FindObjectsInit);
        assert!(searches < found.len() as u64, "{searches} searches for {} keys", found.len());
        for key in found {
            answer(PrivateKey::new(vec![key]).unwrap().sign(SignatureScheme::ECDSA_NISTP256_SHA256, vec![1]).unwrap())
                .unwrap();
        }

        let problem = |plan| token.find_key(plan).err().unwrap().problem.code();
        assert_eq!(problem(plan(None, Some("k1"), &keys[0].spki)), "key_mismatch");
        assert_eq!(problem(plan(None, Some("twin"), &keys[0].spki)), "key_ambiguous");
        assert_eq!(problem(plan(Some(0xC1), Some("k0"), &keys[0].spki)), "key_missing");
        assert_eq!(world.control.violations(), 0);
    }

    fn a_key_that_was_replaced_since_the_keys_were_listed_is_found(world: World) {
        world.init_token("t");
        let keys: Vec<_> =
            (0..18_u8).map(|n| world.make_key("t", &format!("k{n}"), &format!("{n:02X}"), Kind::P256)).collect();
        let token = Token::start(world.plan("t")).unwrap();
        let mut keys = keys.into_iter();
        for key in keys.by_ref().take(17) {
            find(&token, key).unwrap();
        }
        let listed = world.calls(Function::FindObjectsInit);
        let old = keys.next().unwrap();
        bystander::delete_private_key(&old.label);
        let new = world.make_key("t", &old.label, "E0", Kind::P256);
        assert_ne!(new.spki, old.spki);
        find(&token, new).unwrap().sign().unwrap();
        assert!(world.calls(Function::FindObjectsInit) > listed, "the list did not know it");
    }

    fn a_mechanism_the_token_lacks_is_named(world: World) {
        world.init_token("t");
        let key = world.make_key("t", "k", "A1", Kind::Ed25519);
        let token = Token::start(world.plan("t")).unwrap();
        world.control.of(Function::GetMechanismInfo).fail(0x70, FOR_EVER);
        let error = find(&token, key).err().unwrap();
        assert!(error.to_string().contains("CKM_EDDSA"), "{error}");
    }

    fn a_wrong_pin_is_tried_exactly_once(world: World) {
        world.init_token("t");
        let wrong = || {
            let mut plan = world.plan("t");
            plan.pin = b"wrong-pin".to_vec().into();
            Token::start(plan).err().unwrap()
        };
        assert_eq!(wrong().problem.code(), "pin_refused");
        assert_eq!(wrong().problem.code(), "pin_refused");
        assert!(!wrong().to_string().contains("wrong-pin"));
        assert_eq!(world.calls(Function::Login), 1);
        // Another PIN is another matter.
        Token::start(world.plan("t")).unwrap();
        assert_eq!(world.calls(Function::Login), 2);
    }

    fn sessions_closed_behind_our_back_are_opened_again(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        keys[0].sign().unwrap();
        bystander::close_all_sessions();
        keys[0].sign().unwrap();
        assert_eq!(token.stats().reopened.get(), 1);
        assert_eq!(world.calls(Function::Login), 2);
        assert_eq!(token.stats().went_down.get(), 0);
    }

    fn a_logout_by_somebody_else_is_followed_by_one_login_for_all_lanes(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.lanes = 4);
        world.sign().delay_us.store(2_000, SeqCst);
        let all = || (0..16).map(|_| keys[0].submit().unwrap()).collect::<Vec<_>>();
        for signature in all() {
            answer(signature).unwrap();
        }
        bystander::log_out();
        for signature in all() {
            answer(signature).unwrap();
        }
        assert_eq!(world.calls(Function::Login), 2);
        assert!(token.stats().refound.get() >= 1);
        assert_eq!(token.stats().went_down.get(), 0);
        assert_eq!(world.control.violations(), 0);
    }

    fn a_pin_that_turned_wrong_takes_the_token_down_and_is_not_tried_again(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        bystander::log_out();
        world.control.of(Function::Login).fail(0xA0, FOR_EVER);
        assert!(matches!(keys[0].sign(), Err(SignError::Failed(ckr)) if ckr.0 == 0xA0));
        assert_eq!(keys[0].submit().err(), Some(SignError::TokenDown));
        assert!(matches!(token.down_reason(), Some(DownReason::Pin(_))));
        assert_eq!(world.calls(Function::Login), 2);
    }

    fn one_failure_of_any_repairable_kind_is_not_seen_by_the_client(world: World) {
        let (token, keys) = world.start(&[Kind::P256, Kind::Rsa2048], |_| {});
        let codes = [0x30, 0x31, 0x5, 0x6, 0x50, 0x90, 0x91, 0xB0, 0xB3, 0x82, 0x60, 0x101, 0x8000_0011];
        for function in [Function::SignInit, Function::Sign] {
            for code in codes {
                for key in &keys {
                    let control = world.control.of(function);
                    let before = control.injected.load(SeqCst);
                    control.fail(code, 1);
                    key.sign().unwrap_or_else(|error| panic!("0x{code:X} in {function:?}: {error}"));
                    assert_eq!(control.injected.load(SeqCst), before + 1);
                }
            }
        }
        assert_eq!(token.stats().went_down.get(), 0);
        assert_eq!(world.control.violations(), 0);
    }

    fn an_error_of_one_key_leaves_the_token_up(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        for _ in 0..10 {
            world.control.of(Function::SignInit).fail(0x68, 1);
            assert!(matches!(keys[0].sign(), Err(SignError::Failed(ckr)) if ckr.0 == 0x68));
        }
        assert!(token.is_up());
        keys[0].sign().unwrap();
    }

    fn a_token_that_was_pulled_is_waited_for_a_little_and_comes_back_without_a_restart(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.queue_age_max = SOON);
        let init = world.control.of(Function::SignInit);
        init.fail(0xE0, FOR_EVER);
        assert!(is_shed(keys[0].sign()));
        until("nothing is hoped for", || keys[0].submit().err() == Some(SignError::TokenDown));
        let probes = init.injected.load(SeqCst) + 2;
        until("two probes", || init.injected.load(SeqCst) >= probes);
        assert!(!token.is_up());
        init.rv.store(0, SeqCst);
        until("a probe succeeds", || token.is_up());
        keys[0].sign().unwrap();
        assert_eq!(token.stats().went_down.get(), 1);
    }

    fn nobody_is_left_waiting_when_the_token_fails_and_returns_again_and_again(world: World) {
        const LANES: i64 = 4;
        let (token, keys) = world.start(&[Kind::P256, Kind::Rsa2048], |plan| plan.lanes = LANES as usize);
        for round in 0..20_u64 {
            world.control.of(Function::SignInit).fail(0xE0, round % 2);
            // What is refused at once is answered, too.
            let pending: Vec<_> = (0..24).filter_map(|index| keys[index % 2].submit().ok()).collect();
            pending.into_iter().for_each(|signature| drop(answer(signature)));
            until("a probe succeeds", || token.is_up());
            keys.iter().for_each(|key| drop(key.sign().unwrap()));
        }
        assert!(token.stats().went_down.get() > 1);
        assert_eq!(token.stats().queue_depth_ec.get() + token.stats().queue_depth_rsa.get(), 0);
        until("every lane is idle", || token.stats().lanes_idle.get() == LANES);
    }

    fn a_storm_of_failures_opens_the_circuit_after_the_third(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.queue_age_max = SOON);
        world.sign().fail(0x6, FOR_EVER);
        for _ in 0..2 {
            assert!(matches!(keys[0].sign(), Err(SignError::Failed(ckr)) if ckr.0 == 0x6));
            assert!(token.is_up());
        }
        assert!(is_shed(keys[0].sign()));
        assert!(!token.is_up());
    }

    fn a_wrong_rsa_signature_is_never_returned(world: World) {
        let (token, keys) = world.start(&[Kind::Rsa2048], |_| {});
        keys[0].sign().unwrap();
        keys[0].sign().unwrap();
        world.sign().flip_left.store(1, SeqCst);
        assert_eq!(keys[0].sign().err(), Some(SignError::Wrong));
        assert_eq!(world.sign().flipped.load(SeqCst), 1);
        assert!(matches!(token.down_reason(), Some(DownReason::WrongSignature(_)) | None));
        until("a probe succeeds", || token.is_up());
        keys[0].sign().unwrap();
        assert_eq!(token.stats().rsa_pkcs_pss.wrong.get(), 1);
    }

    fn an_ec_signature_is_verified_first_and_then_one_in_n(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.verify_ec_every = 3);
        let verdicts = |count: usize| -> Vec<bool> { (0..count).map(|_| keys[0].sign().is_ok()).collect() };
        assert_eq!(verdicts(1), [true]);
        world.sign().flip_left.store(FOR_EVER, SeqCst);
        // Two go unseen: that is what sampling means, and why "always" can be configured.
        assert_eq!(verdicts(3), [true, true, false]);
        world.sign().flip_left.store(0, SeqCst);
        until("a probe succeeds", || token.is_up());
        // A new PKCS#11 session: its first signature is verified.
        world.sign().flip_left.store(1, SeqCst);
        assert_eq!(keys[0].sign().err(), Some(SignError::Wrong));
    }

    fn a_key_deleted_from_the_token_takes_only_itself_down(world: World) {
        let (token, keys) = world.start(&[Kind::P256, Kind::P384], |_| {});
        keys.iter().for_each(|key| drop(key.sign().unwrap()));
        bystander::delete_private_key(&keys[0].key.label);
        assert_eq!(keys[0].sign().err(), Some(SignError::KeyLost));
        // For a moment the token is not even asked.
        assert_eq!(keys[0].submit().err(), Some(SignError::TokenDown));
        keys[1].sign().unwrap();
        assert!(token.is_up());
        // Once, in case that it was only the module that did not see it any more.
        assert_eq!(token.stats().reinitialized.get(), 1);
    }

    fn ec_is_not_delayed_by_a_saturated_rsa_queue(world: World) {
        let (_token, keys) = world.start(&[Kind::P256, Kind::Rsa2048], |plan| plan.lanes = 3);
        let before = world.calls(Function::Sign);
        world.sign().delay_us.store(20_000, SeqCst);
        let rsa: Vec<_> = (0..40).map(|_| keys[1].submit().unwrap()).collect();
        until("RSA holds all lanes it may", || world.sign().in_flight.load(SeqCst) == 2);
        answer(keys[0].submit().unwrap()).unwrap();
        let signed = world.calls(Function::Sign) - before;
        assert!(signed <= 7, "EC was the {signed}th of 41 signatures");
        rsa.into_iter().for_each(|signature| drop(answer(signature).unwrap()));
    }

    fn a_full_queue_sheds_at_once_and_the_other_class_goes_on(world: World) {
        let (token, keys) = world.start(&[Kind::P256, Kind::Rsa2048], |plan| plan.queue_max = 2);
        world.sign().hang.store(1, SeqCst);
        let mut pending = vec![keys[0].submit().unwrap()];
        until("the lane hangs", || world.sign().in_flight.load(SeqCst) == 1);
        pending.extend((0..2).map(|_| keys[0].submit().unwrap()));
        assert_eq!(keys[0].submit().err(), Some(SignError::QueueFull));
        assert_eq!(token.stats().shed_queue_full.get(), 1);
        assert_eq!(token.stats().queue_depth_ec.get(), 2);
        pending.push(keys[1].submit().unwrap());
        world.sign().hang.store(0, SeqCst);
        pending.into_iter().for_each(|signature| drop(answer(signature).unwrap()));
        assert_eq!(token.stats().queue_depth_ec.get(), 0);
    }

    fn a_request_dropped_while_it_waits_is_never_signed(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        let before = world.calls(Function::Sign);
        world.sign().hang.store(1, SeqCst);
        let first = keys[0].submit().unwrap();
        until("the lane hangs", || world.sign().in_flight.load(SeqCst) == 1);
        let (dropped, last) = (keys[0].submit().unwrap(), keys[0].submit().unwrap());
        drop(dropped);
        world.sign().hang.store(0, SeqCst);
        answer(first).unwrap();
        answer(last).unwrap();
        assert_eq!(world.calls(Function::Sign), before + 2);
        assert_eq!(token.stats().cancelled.get(), 1);
    }

    fn asking_for_a_signature_never_waits_for_a_search_that_hangs(world: World) {
        let (_token, keys) = world.start(&[Kind::P256], |plan| plan.lanes = 2);
        keys[0].sign().unwrap();
        let search = world.control.of(Function::FindObjectsInit);
        search.hang.store(1, SeqCst);
        world.control.of(Function::SignInit).fail(0x82, 1);
        let first = keys[0].submit().unwrap();
        until("a lane hangs in the search", || search.in_flight.load(SeqCst) == 1);
        let (asked, answer_of) = std::sync::mpsc::channel();
        let private = keys[0].private.clone();
        let asking = std::thread::spawn(move || {
            let pending = private.sign(private.schemes()[0], b"a message".to_vec());
            asked.send(pending.is_ok()).unwrap();
        });
        assert_eq!(answer_of.recv_timeout(Duration::from_secs(10)), Ok(true));
        asking.join().unwrap();
        search.hang.store(0, SeqCst);
        answer(first).unwrap();
    }

    fn a_request_too_old_is_answered_although_every_lane_hangs(world: World) {
        let age_max = Duration::from_millis(500);
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.queue_age_max = age_max);
        world.sign().hang.store(1, SeqCst);
        let first = keys[0].submit().unwrap();
        until("the lane hangs", || world.sign().in_flight.load(SeqCst) == 1);
        let submitted = Instant::now();
        let old = keys[0].submit().unwrap();
        until("it is too old", || submitted.elapsed() > age_max + Duration::from_millis(1));
        let young = keys[0].submit().unwrap();
        assert_eq!(answer(old).err(), Some(SignError::QueueAged));
        assert_eq!(token.stats().shed_queue_aged.get(), 1);
        world.sign().hang.store(0, SeqCst);
        answer(first).unwrap();
        drop(young);
    }

    fn stop_returns_within_its_budget_while_a_lane_hangs_in_the_module(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.lanes = 2);
        world.sign().hang.store(1, SeqCst);
        let _hanging = keys[0].submit().unwrap();
        until("the lane hangs", || world.sign().in_flight.load(SeqCst) == 1);
        let start = Instant::now();
        assert_eq!(token.stop(Duration::from_millis(200)), StopOutcome::LanesInside(1));
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        assert_eq!(threads_in_modules(), 1);
        world.sign().hang.store(0, SeqCst);
        until("the lane leaves the module", || threads_in_modules() == 0);
        // A process that gave up waiting is ending: nobody may start C_Finalize under its exit handlers.
        assert_eq!(world.calls(Function::Finalize), 0);
        assert_eq!(world.control.violations(), 0);
    }

    fn stop_answers_everybody_who_waits(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        world.sign().hang.store(1, SeqCst);
        let signing = keys[0].submit().unwrap();
        until("the lane hangs", || world.sign().in_flight.load(SeqCst) == 1);
        let waiting = keys[0].submit().unwrap();
        assert_eq!(token.stop(Duration::from_millis(1)), StopOutcome::LanesInside(1));
        assert_eq!(answer(waiting).err(), Some(SignError::TokenDown));
        world.sign().hang.store(0, SeqCst);
        answer(signing).unwrap();
        until("the lane leaves the module", || threads_in_modules() == 0);
    }

    fn a_token_with_few_sessions_shrinks_the_pool_and_fails_nobody(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.lanes = 8);
        keys[0].sign().unwrap();
        until("the lanes so far are idle", || token.stats().lanes_busy.get() == 0);
        let lanes = token.stats().lanes_idle.get();
        world.control.of(Function::OpenSession).fail(0xB1, FOR_EVER);
        world.sign().delay_us.store(1_000, SeqCst);
        let pending: Vec<_> = (0..32).map(|_| keys[0].submit().unwrap()).collect();
        pending.into_iter().for_each(|signature| drop(answer(signature).unwrap()));
        assert!(world.control.of(Function::OpenSession).injected.load(SeqCst) >= 1);
        assert!(world.sign().in_flight_max.load(SeqCst) <= lanes as u64);
        until("only the first lanes are left", || {
            token.stats().lanes_idle.get() == lanes && token.stats().lanes_busy.get() == 0
        });
    }

    fn processes_that_log_in_at_once_do_not_disturb_each_other(world: World) {
        if !world.is_copy() {
            world.init_token("t");
            world.make_key("t", "k", "A1", Kind::P256);
            world.run_copies("processes_that_log_in_at_once_do_not_disturb_each_other", 4);
            assert_eq!(world.calls(Function::Login), 4 * 15);
            return;
        }
        for round in 0..15 {
            let token = Token::start(world.plan("t")).unwrap_or_else(|error| panic!("round {round}: {error}"));
            find(&token, world.made_key("t", "k", "A1")).unwrap().sign().unwrap();
            assert_eq!(token.stats().login_lock_timeouts.get(), 0);
            assert_eq!(token.stop(STOP_BUDGET), StopOutcome::Stopped(Release::Finalized));
        }
    }

    fn a_login_goes_ahead_when_another_process_holds_the_login_lock_too_long(world: World) {
        world.init_token("t");
        let mut plan = world.plan("t");
        let module = plan.module.clone();
        let held = LoginLock::acquire(&module, Duration::ZERO).unwrap();
        let refused = LoginLock::acquire(&module, Duration::from_millis(5)).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut);
        plan.login_lock_wait = Duration::from_millis(20);
        let token = Token::start(plan).unwrap();
        assert_eq!(token.stats().login_lock_timeouts.get(), 1);
        drop(held);
        LoginLock::acquire(&module, Duration::ZERO).unwrap();
    }
}
