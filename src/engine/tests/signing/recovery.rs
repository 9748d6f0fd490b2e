//! A token, a module or a lane that is gone for good unless something is done about it.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use keygate_engine::signing::SignError;
use keygate_engine::signing::ckr::Ckr;
use keygate_engine::signing::desk::{DownReason, Health};
use keygate_engine::signing::pkcs11::{Module, Release};
use keygate_engine::signing::presented_pins::{self, Obstacle, Pin};
use keygate_engine::signing::token::{StopOutcome, Token};

use crate::control::{Damage, FOR_EVER, Function, Heal, Word};
use crate::world::{Kind, PIN, PrivateKeyOf, World, answer, find, in_own_process, until};
use crate::{SOON, STOP_BUDGET, is_shed};

fn until_signs(key: &PrivateKeyOf) {
    until("it signs", || key.sign().is_ok());
}

token_tests! {
    fn what_only_another_initialisation_heals_fails_nobody(world: World) {
        let (token, keys) = world.start(&[Kind::P256, Kind::Rsa2048], |plan| plan.lanes = 4);
        let mut resets = 0;
        for (function, code) in [
            (Function::SignInit, 0x190),
            (Function::SignInit, 0x30),
            (Function::Sign, 0x32),
            (Function::Sign, 0xE0),
            (Function::SignInit, 0xE1),
            (Function::SignInit, 0x3),
        ] {
            // Two in quick succession are apart by a pause, which is short as long as they are few.
            world.control.of(function).fail_until(code, Heal::Initialize);
            let pending: Vec<_> = (0..16).map(|index| keys[index % 2].submit().unwrap()).collect();
            for signature in pending {
                answer(signature).unwrap_or_else(|error| panic!("0x{code:X} in {function:?}: {error}"));
            }
            resets += 1;
            assert_eq!(token.stats().reinitialized.get(), resets, "0x{code:X} in {function:?}");
            world.control.of(function).rv.store(0, SeqCst);
        }
        assert_eq!(world.calls(Function::Initialize), 1 + resets);
        assert_eq!(world.calls(Function::Login), 1 + resets);
        assert_eq!(token.stop(STOP_BUDGET), StopOutcome::Stopped(Release::Finalized));
        assert_eq!(world.control.violations(), 0);
    }

    fn what_another_session_or_another_login_heals_is_not_initialised_again(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        for (code, heal) in [(0xB3, Heal::Reopen), (0x30, Heal::Reopen), (0x101, Heal::Login)] {
            if heal == Heal::Login {
                crate::bystander::log_out();
            }
            world.control.of(Function::SignInit).fail_until(code, heal);
            keys[0].sign().unwrap_or_else(|error| panic!("0x{code:X}: {error}"));
            world.control.of(Function::SignInit).rv.store(0, SeqCst);
        }
        assert_eq!(token.stats().reinitialized.get(), 0);
        assert_eq!(token.stats().went_down.get(), 0);
    }

    fn requests_wait_while_the_module_cannot_be_initialised_and_are_served_once_it_can(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        world.control.of(Function::SignInit).fail_until(0x30, Heal::Initialize);
        world.control.of(Function::Initialize).fail(0x5, 3);
        let pending: Vec<_> = (0..4).map(|_| keys[0].submit().unwrap()).collect();
        pending.into_iter().for_each(|signature| drop(answer(signature).unwrap()));
        assert_eq!(world.control.of(Function::Initialize).injected.load(SeqCst), 3);
        assert_eq!(token.health(), Health::Up);
        assert_eq!(world.control.violations(), 0);
    }

    fn a_token_whose_slot_is_gone_is_looked_for_until_it_is_back_under_any_id(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.queue_age_max = SOON);
        world.control.word(Word::SlotsHidden).store(1, SeqCst);
        world.control.word(Word::SlotShift).store(1000, SeqCst);
        world.control.of(Function::SignInit).fail_until(0x30, Heal::Initialize);
        assert!(is_shed(keys[0].sign()));
        until("it says why", || {
            matches!(token.down_reason(), Some(DownReason::Call(why)) if why.contains("no such token"))
        });
        world.control.word(Word::SlotsHidden).store(0, SeqCst);
        until("it is found", || token.is_up());
        keys[0].sign().unwrap();
        assert_eq!(world.control.violations(), 0);
    }

    fn two_tokens_of_one_module_share_its_initialisation(world: World) {
        world.init_token("one");
        world.init_token("two");
        let [one, two] = ["one", "two"].map(|label| {
            let key = world.make_key(label, "k", "A1", Kind::P256);
            let mut plan = world.plan(label);
            plan.lanes = 4;
            let token = Token::start(plan).unwrap();
            let key = find(&token, key).unwrap();
            (token, key)
        });
        let before = world.calls(Function::Initialize);
        world.sign().delay_us.store(1_000, SeqCst);
        world.control.of(Function::SignInit).fail_until(0x30, Heal::Initialize);
        let pending: Vec<_> = (0..32)
            .map(|index| if index % 2 == 0 { one.1.submit() } else { two.1.submit() }.unwrap())
            .collect();
        pending.into_iter().for_each(|signature| drop(answer(signature).unwrap()));
        assert_eq!(world.calls(Function::Initialize), before + 1, "once for both");
        assert_eq!(one.0.stop(STOP_BUDGET), StopOutcome::Stopped(Release::StillUsed));
        assert_eq!(two.0.stop(STOP_BUDGET), StopOutcome::Stopped(Release::Finalized));
        assert_eq!(world.control.violations(), 0);
    }

    fn a_handle_that_means_another_key_after_an_initialisation_signs_nothing(world: World) {
        // Nothing but the first signature of a key's handle is verified.
        let (token, keys) =
            world.start(&[Kind::P256, Kind::P256], |plan| plan.verify_ec_every = u32::MAX);
        world.control.word(Word::HandlesExchanged).store(1, SeqCst);
        for round in 1..=4 {
            keys.iter().for_each(|key| drop(key.sign().unwrap()));
            world.control.of(Function::SignInit).fail_until(0x190, Heal::Initialize);
            for key in &keys {
                let scheme = key.private.schemes()[0];
                let signed = answer(key.private.sign(scheme, b"message".to_vec()).unwrap()).unwrap();
                assert!(world.openssl_accepts(&key.key, scheme, b"message", &signed.signature), "round {round}");
            }
            assert_eq!(token.stats().reinitialized.get(), round);
        }
        assert_eq!(token.stats().ecdsa.wrong.get(), 0);
    }

    fn a_key_that_the_module_lost_sight_of_is_found_again_once_it_is_back(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        keys[0].sign().unwrap();
        let hidden = world.hide_objects("t");
        // It has no other, and says so at once.
        assert_eq!(keys[0].sign().err(), Some(SignError::TokenDown));
        assert_eq!(token.down_reason(), Some(DownReason::Call("a probe did not find its private key".into())));
        hidden.restore();
        // SoftHSM looks for files only when another process says that something changed, or from the start.
        until_signs(&keys[0]);
        assert_eq!(token.stats().reinitialized.get(), 2);
        assert_eq!(world.control.violations(), 0);
    }

    fn a_login_that_could_not_be_had_again_is_not_given_up_for_a_key(world: World) {
        let (token, keys) = world.start(&[Kind::P256, Kind::P384], |_| {});
        // Somebody mistyped the PIN: the next wrong one locks the token, so nobody logs in.
        world.control.word(Word::PinTries).store(2, SeqCst);
        world.control.word(Word::PinsRefused).store(1, SeqCst);
        crate::bystander::delete_private_key(&keys[0].key.label);
        assert_eq!(keys[0].sign().err(), Some(SignError::KeyLost));
        keys[1].sign().unwrap();
        assert_eq!(token.stats().reinitialized.get(), 0);
    }

    fn a_token_is_up_as_long_as_one_of_its_keys_is_there(world: World) {
        let (token, keys) = world.start(&[Kind::P256; 6], |_| {});
        for key in &keys[..5] {
            crate::bystander::delete_private_key(&key.key.label);
        }
        for key in &keys[..5] {
            // Not even asked, for a moment, where a probe has looked for it already.
            assert!(key.submit().map_or(true, |pending| answer(pending).is_err()));
            keys[5].sign().unwrap();
        }
        assert!(token.is_up());
    }

    fn a_key_that_was_replaced_by_another_takes_only_itself_down(world: World) {
        let (token, keys) = world.start(&[Kind::P256, Kind::P256], |plan| plan.verify_ec_every = u32::MAX);
        keys.iter().for_each(|key| drop(key.sign().unwrap()));
        crate::bystander::delete_private_key(&keys[0].key.label);
        world.make_key("t", &keys[0].key.label, "A0", Kind::P256);
        assert_eq!(keys[0].sign().err(), Some(SignError::Wrong));
        until("a probe finds that it is this key", || token.is_up());
        let went_down = token.stats().went_down.get();
        for _ in 0..3 {
            assert!(keys[0].submit().is_err(), "it is not even asked, for a while");
            keys[1].sign().unwrap();
        }
        until("it is asked again", || keys[0].sign().err() == Some(SignError::Wrong));
        keys[1].sign().unwrap();
        assert_eq!(token.stats().went_down.get(), went_down, "and disturbs nobody");
    }

    fn a_pin_that_was_changed_is_replaced_without_another_start(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        crate::bystander::change_pin(PIN, "battery-staple");
        crate::bystander::log_out();
        assert!(keys[0].sign().is_err());
        assert_eq!(token.down_reason(), Some(DownReason::Pin("C_Login returned CKR_PIN_INCORRECT (0xA0)".into())));
        let logins = world.calls(Function::Login);
        token.adopt(&PIN.as_bytes().to_vec().into(), 1);
        std::thread::sleep(SOON); // nothing is to happen
        assert_eq!(world.calls(Function::Login), logins);
        token.adopt(&b"neither".to_vec().into(), 1);
        until("another one is tried", || world.calls(Function::Login) == logins + 1);
        until("and refused", || matches!(token.down_reason(), Some(DownReason::Pin(_))));
        token.adopt(&PIN.as_bytes().to_vec().into(), 1);
        std::thread::sleep(SOON); // nothing is to happen
        assert_eq!(world.calls(Function::Login), logins + 1, "the one that was refused stays refused");
        token.adopt(&b"battery-staple".to_vec().into(), 1);
        until_signs(&keys[0]);
        assert_eq!(world.calls(Function::Login), logins + 2);
    }

    fn a_wrong_pin_is_not_tried_again_after_an_initialisation(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |_| {});
        world.control.of(Function::SignInit).fail(0x30, FOR_EVER);
        world.control.of(Function::Login).fail(0xA0, FOR_EVER);
        assert!(is_shed(keys[0].sign()));
        assert!(matches!(token.down_reason(), Some(DownReason::Pin(_))));
        assert_eq!(keys[0].submit().err(), Some(SignError::TokenDown));
        let logins = world.calls(Function::Login);
        assert_eq!(logins, 2);
        std::thread::sleep(SOON); // nothing is to happen
        assert_eq!(world.calls(Function::Login), logins);
    }

    fn a_pin_that_is_refused_is_tried_by_one_process_for_all(world: World) {
        if !world.is_copy() {
            world.init_token("t");
            world.make_key("t", "k", "A1", Kind::P256);
            world.run_copies("recovery::a_pin_that_is_refused_is_tried_by_one_process_for_all", 4);
            assert_eq!(world.control.of(Function::Login).injected.load(SeqCst), 2);
            return;
        }
        presented_pins::share([7; 32], []);
        let token = Token::start(world.plan("t")).unwrap();
        let key = find(&token, world.made_key("t", "k", "A1")).unwrap();
        // All have logged in before anybody is refused.
        let login = world.control.of(Function::Login);
        until("everybody has logged in", || login.calls.load(SeqCst) >= 4);
        login.fail(0xA0, FOR_EVER);
        crate::bystander::log_out();
        assert!(key.sign().is_err());
        assert_eq!(token.down_reason(), Some(DownReason::Pin("C_Login returned CKR_PIN_INCORRECT (0xA0)".into())));
        // Whoever leaves takes what it knows with it, so nobody does before all know.
        world.meet("first", 4);
        // And another PIN, which all get together.
        let logins = login.calls.load(SeqCst);
        token.adopt(&b"another".to_vec().into(), 1);
        until("it is refused, too", || login.injected.load(SeqCst) == 2);
        until("all know", || {
            assert!(key.sign().is_err());
            token.down_reason() == Some(DownReason::Pin("C_Login returned CKR_PIN_INCORRECT (0xA0)".into()))
        });
        world.meet("second", 4);
        assert!(login.calls.load(SeqCst) <= logins + 1);
        assert_eq!(login.injected.load(SeqCst), 2);
    }

    fn a_pin_that_the_token_has_not_answered_is_sent_by_nobody_else(world: World) {
        let login = world.control.of(Function::Login);
        if !world.is_copy() {
            world.init_token("t");
            login.fail(0xA0, FOR_EVER);
            login.hang.store(1, SeqCst);
            world.run_copies("recovery::a_pin_that_the_token_has_not_answered_is_sent_by_nobody_else", 2);
            assert_eq!(world.calls(Function::Login), 1);
            return;
        }
        presented_pins::share([7; 32], []);
        let start = || {
            let mut plan = world.plan("t");
            plan.login_lock_wait = SOON;
            Token::start(plan).err().unwrap().problem.code()
        };
        match start() {
            // The other one was first, and waits for the token.
            "login_unanswered" => {
                assert_eq!(start(), "login_unanswered", "it is still so");
                login.hang.store(0, SeqCst);
                until("the refusal is known", || start() == "pin_refused");
            }
            first => assert_eq!(first, "pin_refused"),
        }
        // Marks end with their process.
        world.meet("end", 2);
    }

    fn a_login_that_another_worker_awaits_is_no_reason_to_initialise_the_module_again(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.queue_age_max = SOON);
        let plan = world.plan("t");
        let module = Module::load(&plan.module, plan.isolate).unwrap();
        let serials = module.slots().unwrap().into_iter().map(|slot| module.token_info(slot).unwrap());
        let serial = serials.filter(|info| info.label == "t").map(|info| info.serial).next().unwrap();
        let other = Pin { module: &plan.module, serial: &serial, pin: PIN.as_bytes() };
        other.present().unwrap();
        let logins = world.calls(Function::Login);
        crate::bystander::log_out();
        assert!(is_shed(keys[0].sign()));
        until("the reason is said", || {
            matches!(token.down_reason(), Some(DownReason::Call(why)) if why.contains("has not answered a login"))
        });
        assert_eq!((world.calls(Function::Login), token.stats().reinitialized.get()), (logins, 0));
        other.answered(Some(Ckr::OK));
        until_signs(&keys[0]);
        assert_eq!((world.calls(Function::Login), token.stats().reinitialized.get()), (logins + 1, 0));
    }

    fn a_pin_that_was_not_sent_after_all_may_be_sent(world: World) {
        world.init_token("t");
        let plan = world.plan("t");
        let pin = Pin { module: &plan.module, serial: "1", pin: b"1234" };
        pin.present().unwrap();
        assert_eq!(pin.present(), Err(Obstacle::Unanswered));
        assert_eq!(pin.obstacle(), Some(Obstacle::Unanswered));
        let another = Pin { pin: b"12345", ..pin };
        another.present().unwrap();
        pin.answered(None);
        assert_eq!(pin.obstacle(), None);
        pin.present().unwrap();
        pin.answered(Some(Ckr(0xA0)));
        assert_eq!(pin.present(), Err(Obstacle::Refused(Ckr(0xA0))));
        assert_eq!(pin.obstacle(), Some(Obstacle::Refused(Ckr(0xA0))));
        // A call that failed for another reason says nothing of the PIN.
        another.answered(Some(Ckr(0x30)));
        another.present().unwrap();
    }

    fn initialisations_follow_each_other_ever_more_slowly(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.queue_age_max = SOON);
        world.control.of(Function::SignInit).fail(0x30, FOR_EVER);
        assert!(is_shed(keys[0].sign()));
        let from = (Instant::now(), token.stats().reinitialized.get());
        std::thread::sleep(Duration::from_secs(1));
        let resets = token.stats().reinitialized.get() - from.1;
        assert!(resets <= 6, "{resets} in {:?}", from.0.elapsed());
    }

    fn logins_follow_each_other_ever_more_slowly(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.queue_age_max = SOON);
        world.control.word(Word::LogoutLeft).store(u64::MAX / 2, SeqCst);
        let from = Instant::now();
        while from.elapsed() < Duration::from_secs(1) {
            assert!(keys[0].sign().is_err());
        }
        // Each probe tries another login, and another initialisation with its own.
        let logins = token.stats().logged_in.get();
        assert!((3..=24).contains(&logins), "{logins} in {:?}", from.elapsed());
        world.control.word(Word::LogoutLeft).store(0, SeqCst);
        until_signs(&keys[0]);
    }

    fn after_a_wrong_signature_no_handle_of_the_token_is_believed(world: World) {
        let (token, keys) =
            world.start(&[Kind::P256, Kind::P256], |plan| plan.verify_ec_every = u32::MAX);
        keys[1].sign().unwrap();
        world.sign().flip_every.store(1, SeqCst);
        world.sign().flip_left.store(1, SeqCst);
        assert_eq!(keys[0].sign().err(), Some(SignError::Wrong));
        until("a probe succeeds", || token.is_up());
        assert_eq!(token.stats().refound.get(), 1, "by the probe");
        keys[1].sign().unwrap();
        assert_eq!(token.stats().refound.get(), 2);
    }

    fn a_module_is_not_finalised_under_a_thread_that_is_inside(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| plan.lanes = 2);
        world.sign().hang.store(1, SeqCst);
        let inside = keys[0].submit().unwrap();
        until("a lane hangs", || world.sign().in_flight.load(SeqCst) == 1);
        world.control.of(Function::SignInit).fail_until(0x30, Heal::Initialize);
        let waiting = keys[0].submit().unwrap();
        until("the token is to be mended", || token.health() == Health::Mending);
        let probes = world.control.of(Function::SignInit).injected.load(SeqCst) + 3;
        until("probes", || world.control.of(Function::SignInit).injected.load(SeqCst) >= probes);
        assert_eq!(world.calls(Function::Finalize), 0);
        world.sign().hang.store(0, SeqCst);
        answer(inside).unwrap();
        answer(waiting).unwrap();
        assert_eq!(world.calls(Function::Finalize), 1);
        assert_eq!(world.control.violations(), 0);
    }

    fn a_lost_lane_is_replaced_and_goes_when_it_comes_back(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| {
            plan.lanes = 1;
            plan.threads_max = 2;
            plan.lost_after = SOON;
        });
        // So many that of those to come only one is hit. The lane has nothing left to prove.
        for _ in 0..10 {
            keys[0].sign().unwrap();
        }
        let sign = world.sign();
        sign.spike_every.store(sign.calls.load(SeqCst) + 1, SeqCst);
        sign.spike_us.store(5_000_000, SeqCst);
        let lost = keys[0].submit().unwrap();
        until("a lane hangs", || sign.in_flight.load(SeqCst) == 1);
        let waiting = keys[0].submit().unwrap();
        until("it is lost", || {
            token.look();
            token.stats().lanes_lost.get() == 1
        });
        answer(waiting).unwrap();
        assert_eq!(sign.in_flight.load(SeqCst), 1, "by another lane");
        drop(lost);
        until("it comes back, and goes", || {
            token.stats().lanes_lost.get() == 0 && token.stats().sessions_open.get() == 1
        });
        assert_eq!(token.stats().written_off.get(), 1);
        assert_eq!(token.stats().went_down.get(), 1, "for lack of any other lane, until it was there");
        keys[0].sign().unwrap();
        assert_eq!(world.control.violations(), 0);
    }

    fn when_every_lane_is_lost_requests_are_refused_at_once_until_one_comes_back(world: World) {
        let (token, keys) = world.start(&[Kind::P256], |plan| {
            plan.lanes = 2;
            plan.threads_max = 3;
            plan.lost_after = SOON;
        });
        world.sign().hang.store(1, SeqCst);
        let pending = [keys[0].submit().unwrap(), keys[0].submit().unwrap()];
        until("every lane is lost, and the one that probes", || {
            token.look();
            token.stats().lanes_lost.get() == 3
        });
        assert_eq!(token.down_reason(), Some(DownReason::Hangs));
        assert_eq!(keys[0].submit().err(), Some(SignError::TokenDown));
        until("only another process can help", || token.is_stuck());
        world.sign().hang.store(0, SeqCst);
        until("a lane comes back", || token.is_up());
        assert!(!token.is_stuck());
        drop(pending);
        keys[0].sign().unwrap();
        until("two lanes are left", || {
            let stats = token.stats();
            stats.lanes_lost.get() == 0 && stats.lanes_idle.get() + stats.lanes_busy.get() <= 2
        });
        assert_eq!(world.control.violations(), 0);
    }

    fn odd_signatures_are_never_returned_wrong(world: World) {
        let (token, keys) = world.start(&[Kind::P256, Kind::P256], |_| {});
        let scheme = keys[0].private.schemes()[0];
        world.control.word(Word::Damage).store(Damage::LeadingZero as u64, SeqCst);
        world.sign().flip_left.store(1, SeqCst);
        let signed = keys[0].sign().unwrap();
        assert!(world.openssl_accepts(&keys[0].key, scheme, b"message", &signed.signature));
        for damage in [Damage::Truncate, Damage::Empty, Damage::OtherKey] {
            world.control.word(Word::Damage).store(damage as u64, SeqCst);
            world.sign().flip_left.store(1, SeqCst);
            assert_eq!(keys[0].sign().err(), Some(SignError::Wrong), "{damage:?}");
            until("a probe succeeds", || token.is_up());
        }
    }
}
