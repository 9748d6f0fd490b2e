//! What the verification of a server's certificate must and must not accept. The judges beside it are rcgen and OpenSSL, which
//! make the certificates.

mod handshake;
mod openssl;
pub(super) mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use proptest::prelude::*;
use rcgen::{CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, date_time_ymd};
use rustls::pki_types::ServerName;

use super::{Answer, Mode, Policy, Reason, Roots, Standing, VerifyPlan, der, x509};
use world::{World, ca, every_signature, judge, key, leaf, list, lists, record, refused, reported, u24};

fn pin_of(certificate: &[u8]) -> [u8; 32] {
    let spki = x509::Certificate::parse(certificate).expect("a certificate").spki;
    digest(&SHA256, spki).as_ref().try_into().expect("32 bytes")
}

mod pkix {
    use super::*;

    #[test]
    fn a_good_certificate_is_accepted() {
        let world = World::new();
        let plan = world.plan();
        assert_eq!(world.judge(plan.clone(), &world.leaf()), Ok(()));
        assert_eq!(plan.findings.accepted(), 1);
    }

    #[test]
    fn each_kind_of_bad_certificate_has_its_own_reason() {
        let world = World::new();
        let kinds: [(&str, Vec<u8>, Reason); 5] = [
            ("expired", world.issue(|leaf| leaf.not_after = date_time_ymd(2026, 12, 31)), Reason::Expired),
            (
                "not yet",
                world.issue(|leaf| leaf.not_before = date_time_ymd(2027, 12, 31)),
                Reason::NotYetValid,
            ),
            (
                "another name",
                world.issue(|leaf| {
                    leaf.subject_alt_names =
                        CertificateParams::new(["other.test".to_owned()]).expect("a name").subject_alt_names;
                }),
                Reason::WrongName,
            ),
            (
                "another purpose",
                world.issue(|leaf| leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
                Reason::WrongPurpose,
            ),
            ("not a certificate", vec![0x30, 0], Reason::Invalid),
        ];
        for (kind, certificate, reason) in kinds {
            let plan = world.plan();
            assert_eq!(world.judge(plan.clone(), &certificate), Err(reason), "{kind}");
            assert_eq!(refused(&plan.findings), [reason], "{kind}");
            assert_eq!(plan.findings.accepted(), 0, "{kind}");
        }
    }

    #[test]
    fn an_unknown_root_and_a_missing_intermediate_are_an_unknown_issuer() {
        let (world, other) = (World::new(), World::new());
        let plan = VerifyPlan { roots: Arc::new(Roots::new([other.root.der().clone()])), ..world.plan() };
        // The other root has the same name: only its signature tells.
        assert_eq!(world.judge(plan, &world.leaf()), Err(Reason::BadSignature));
        let stranger = CertifiedIssuer::self_signed(ca("Stranger"), key()).expect("a root");
        let plan = VerifyPlan { roots: Arc::new(Roots::new([stranger.der().clone()])), ..world.plan() };
        assert_eq!(world.judge(plan, &world.leaf()), Err(Reason::UnknownIssuer));
        assert_eq!(judge(world.plan(), &world.leaf(), &[], &[]), Err(Reason::UnknownIssuer));
    }

    #[test]
    fn a_self_signed_certificate_is_called_so_whether_it_is_marked_as_a_ca_or_not() {
        let world = World::new();
        for is_ca in [IsCa::NoCa, IsCa::Ca(rcgen::BasicConstraints::Unconstrained)] {
            let mut params = leaf();
            params.is_ca = is_ca;
            let certificate = params.self_signed(&world.leaf_key).expect("a certificate");
            assert_eq!(judge(world.plan(), certificate.der(), &[], &[]), Err(Reason::SelfSigned));
        }
    }

    #[test]
    fn a_self_signed_certificate_among_the_roots_is_accepted() {
        let world = World::new();
        let certificate = leaf().self_signed(&world.leaf_key).expect("a certificate");
        let plan = VerifyPlan { roots: Arc::new(Roots::new([certificate.der().clone()])), ..world.plan() };
        assert_eq!(judge(plan, certificate.der(), &[], &[]), Ok(()));
    }

    #[test]
    fn addresses_are_looked_for_among_the_addresses_of_the_certificate() {
        let world = World::new();
        let with_address = world.issue(|leaf| {
            leaf.subject_alt_names =
                CertificateParams::new(["192.0.2.1".to_owned()]).expect("an address").subject_alt_names;
        });
        let plan = |name: &str| VerifyPlan {
            name: ServerName::try_from(name.to_owned()).expect("a name"),
            ..world.plan()
        };
        assert_eq!(world.judge(plan("192.0.2.1"), &with_address), Ok(()));
        assert_eq!(world.judge(plan("192.0.2.2"), &with_address), Err(Reason::WrongName));
        assert_eq!(world.judge(plan("192.0.2.1"), &world.leaf()), Err(Reason::WrongName));
    }

    #[test]
    fn without_roots_nothing_is_accepted() {
        let world = World::new();
        let plan = VerifyPlan { roots: Arc::default(), ..world.plan() };
        assert_eq!(world.judge(plan, &world.leaf()), Err(Reason::UnknownIssuer));
    }

    #[test]
    fn a_revoked_certificate_is_refused_and_one_that_the_list_does_not_name_is_not() {
        let world = World::new();
        let with = |list: Vec<u8>| VerifyPlan { lists: lists(&[&list]), ..world.plan() };
        assert_eq!(
            world.judge(with(world.revocation_list(&[world::SERIAL], 2040)), &world.leaf()),
            Err(Reason::Revoked)
        );
        assert_eq!(world.judge(with(world.revocation_list(&[1], 2040)), &world.leaf()), Ok(()));
    }

    #[test]
    fn a_list_of_another_issuer_or_of_yesterday_tells_nothing() {
        let (world, other) = (World::new(), World::new());
        let with = |list: Vec<u8>| VerifyPlan { lists: lists(&[&list]), ..world.plan() };
        // Of the same name, and signed with another key.
        let forged = other.revocation_list(&[], 2040);
        assert_eq!(world.judge(with(forged), &world.leaf()), Err(Reason::RevocationUnknown));
        let outdated = world.revocation_list(&[], 2021);
        assert_eq!(world.judge(with(outdated), &world.leaf()), Err(Reason::RevocationUnknown));
        let of_root = CertifiedIssuer::self_signed(ca("Stranger"), key()).expect("a root");
        let strangers = World { intermediate: of_root, ..World::new() }.revocation_list(&[], 2040);
        assert_eq!(world.judge(with(strangers), &world.leaf()), Err(Reason::RevocationUnknown));
    }

    #[test]
    fn what_is_reported_is_accepted_and_counted() {
        let world = World::new();
        let plan = VerifyPlan { pkix: Mode::Report, ..world.plan() };
        let expired = world.issue(|leaf| leaf.not_after = date_time_ymd(2026, 12, 31));
        assert_eq!(world.judge(plan.clone(), &expired), Ok(()));
        assert_eq!(reported(&plan.findings), [Reason::Expired]);
        assert_eq!(refused(&plan.findings), []);
        assert_eq!(plan.findings.accepted(), 1);
    }
}

mod pins {
    use super::*;

    fn judge_with(world: &World, pins: &[[u8; 32]]) -> Result<(), Reason> {
        world.judge(VerifyPlan { pins: pins.into(), ..world.plan() }, &world.leaf())
    }

    #[test]
    fn any_key_of_the_verified_chain_may_be_pinned() {
        let world = World::new();
        for certificate in [&world.leaf()[..], world.intermediate.der(), world.root.der()] {
            assert_eq!(judge_with(&world, &[[0; 32], pin_of(certificate)]), Ok(()));
        }
    }

    #[test]
    fn a_pinned_certificate_that_the_server_only_sends_along_does_not_count() {
        let (world, other) = (World::new(), World::new());
        let pinned = other.root.der();
        assert_eq!(judge_with(&world, &[pin_of(pinned)]), Err(Reason::PinMismatch));
        let plan = VerifyPlan { pins: [pin_of(pinned)].into(), ..world.plan() };
        let sent: &[&[u8]] = &[world.intermediate.der(), pinned];
        assert_eq!(judge(plan, &world.leaf(), sent, &[]), Err(Reason::PinMismatch));
    }

    #[test]
    fn without_a_chain_only_the_leaf_counts() {
        let world = World::new();
        let judge_reported = |pin| {
            let plan =
                VerifyPlan { pkix: Mode::Report, roots: Arc::default(), pins: [pin].into(), ..world.plan() };
            assert_eq!(world.judge(plan.clone(), &world.leaf()), Ok(()));
            reported(&plan.findings)
        };
        assert_eq!(judge_reported(pin_of(&world.leaf())), [Reason::UnknownIssuer]);
        assert_eq!(
            judge_reported(pin_of(world.intermediate.der())),
            [Reason::UnknownIssuer, Reason::PinMismatch]
        );
    }
}

mod dane {
    use super::*;

    const ALL: [(u8, u8); 6] = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)];

    /// A server without roots, so that nothing but DANE can accept it.
    fn alone(world: &World, records: &[world::Record]) -> VerifyPlan {
        VerifyPlan { roots: Arc::default(), ..world.dane_plan(records) }
    }

    #[test]
    fn usage_3_accepts_the_leaf_by_every_selector_and_matching_type() {
        let world = World::new();
        let leaf = world.leaf();
        for (selector, matching) in ALL {
            let plan = alone(&world, &[record(3, selector, matching, &leaf)]);
            assert_eq!(world.judge(plan, &leaf), Ok(()), "3 {selector} {matching}");
            let plan = alone(&world, &[record(3, selector, matching, &World::new().leaf())]);
            assert_eq!(world.judge(plan, &leaf), Err(Reason::TlsaMismatch), "3 {selector} {matching}");
        }
    }

    #[test]
    fn usage_3_asks_neither_for_dates_nor_for_names_nor_for_a_signature_by_anybody() {
        let world = World::new();
        let mut params = leaf();
        params.not_after = date_time_ymd(2026, 12, 31);
        params.subject_alt_names.clear();
        let certificate = params.self_signed(&world.leaf_key).expect("a certificate");
        let plan = world.dane_plan(&[record(3, 1, 1, certificate.der())]);
        assert_eq!(judge(plan.clone(), certificate.der(), &[], &[]), Ok(()));
        assert_eq!(reported(&plan.findings), [], "what PKIX says does not matter then");
    }

    #[test]
    fn usage_3_does_not_accept_a_certificate_that_is_only_sent_along() {
        let (world, other) = (World::new(), World::new());
        let plan = alone(&world, &[record(3, 1, 1, &other.leaf())]);
        assert_eq!(judge(plan, &world.leaf(), &[&other.leaf()], &[]), Err(Reason::TlsaMismatch));
    }

    #[test]
    fn usage_2_accepts_what_leads_to_the_anchor_that_the_server_sends() {
        let world = World::new();
        let sent: &[&[u8]] = &[world.intermediate.der(), world.root.der()];
        for anchor in sent {
            for (selector, matching) in ALL {
                let plan = alone(&world, &[record(2, selector, matching, anchor)]);
                assert_eq!(judge(plan, &world.leaf(), sent, &[]), Ok(()), "2 {selector} {matching}");
            }
        }
    }

    #[test]
    fn usage_2_accepts_an_anchor_that_only_the_record_has() {
        let world = World::new();
        for selector in [0, 1] {
            let plan = alone(&world, &[record(2, selector, 0, world.root.der())]);
            assert_eq!(world.judge(plan, &world.leaf()), Ok(()), "2 {selector} 0");
            let plan = alone(&world, &[record(2, selector, 1, world.root.der())]);
            assert_eq!(world.judge(plan, &world.leaf()), Err(Reason::TlsaMismatch), "2 {selector} 1");
        }
    }

    #[test]
    fn usage_2_still_asks_for_name_and_dates_and_signature() {
        let (world, other) = (World::new(), World::new());
        let judge_leaf =
            |leaf: &[u8]| world.judge(alone(&world, &[record(2, 1, 1, world.intermediate.der())]), leaf);
        let expired = world.issue(|leaf| leaf.not_after = date_time_ymd(2026, 12, 31));
        assert_eq!(judge_leaf(&expired), Err(Reason::Expired));
        let misnamed = world.issue(|leaf| {
            leaf.subject_alt_names =
                CertificateParams::new(["other.test".to_owned()]).expect("a name").subject_alt_names;
        });
        assert_eq!(judge_leaf(&misnamed), Err(Reason::WrongName));
        // Its issuer has the same name, and another key.
        assert_eq!(judge_leaf(&other.leaf()), Err(Reason::BadSignature));
    }

    #[test]
    fn usage_2_does_not_accept_the_leaf_as_its_own_anchor() {
        let world = World::new();
        let certificate = leaf().self_signed(&world.leaf_key).expect("a certificate");
        let plan = alone(&world, &[record(2, 1, 1, certificate.der())]);
        assert_eq!(judge(plan, certificate.der(), &[], &[]), Err(Reason::TlsaMismatch));
    }

    #[test]
    fn usages_0_and_1_come_on_top_of_pkix() {
        let (world, other) = (World::new(), World::new());
        let leaf = world.leaf();
        for (usage, certificate) in [(1, &leaf[..]), (0, world.intermediate.der()), (0, world.root.der())] {
            for (selector, matching) in ALL {
                let records = [record(usage, selector, matching, certificate)];
                let what = format!("{usage} {selector} {matching}");
                assert_eq!(world.judge(world.dane_plan(&records), &leaf), Ok(()), "{what}");
                // The same record, and a PKIX that refuses, or that would only report.
                for pkix in [Mode::Enforce, Mode::Report] {
                    let plan = VerifyPlan { pkix, ..alone(&world, &records) };
                    assert_eq!(world.judge(plan, &leaf), Err(Reason::UnknownIssuer), "{what}");
                }
            }
        }
        for (usage, certificate) in [(1, other.leaf()), (0, other.root.der().to_vec()), (0, world.leaf())] {
            let plan = world.dane_plan(&[record(usage, 0, 1, &certificate)]);
            assert_eq!(world.judge(plan, &leaf), Err(Reason::TlsaMismatch), "{usage}");
        }
    }

    #[test]
    fn one_record_that_fits_is_enough() {
        let (world, other) = (World::new(), World::new());
        let records = [
            record(3, 1, 1, &other.leaf()),
            record(2, 0, 1, other.root.der()),
            record(3, 1, 1, &world.leaf()),
        ];
        assert_eq!(world.judge(alone(&world, &records), &world.leaf()), Ok(()));
    }

    #[test]
    fn records_that_are_not_usable_are_as_none() {
        let world = World::new();
        let data = |bytes: usize| vec![7; bytes];
        let unusable = [
            (4, 1, 1, data(32)),
            (3, 2, 1, data(32)),
            (3, 1, 3, data(32)),
            (3, 1, 1, data(31)),
            (3, 1, 2, data(32)),
            (3, 0, 0, data(0)),
        ];
        for one in &unusable {
            let plan = world.dane_plan(std::slice::from_ref(one));
            assert_eq!(world.judge(plan, &world.leaf()), Err(Reason::TlsaMissing), "{one:?}");
        }
        let mut records = unusable.to_vec();
        records.push(record(3, 1, 1, &world.leaf()));
        assert_eq!(world.judge(alone(&world, &records), &world.leaf()), Ok(()));
    }

    #[test]
    fn a_weaker_digest_does_not_count_beside_a_stronger_one_of_the_same_thing() {
        let (world, other) = (World::new(), World::new());
        let records = [record(3, 1, 1, &world.leaf()), record(3, 1, 2, &other.leaf())];
        assert_eq!(world.judge(alone(&world, &records), &world.leaf()), Err(Reason::TlsaMismatch));
        let of_another_thing = [record(3, 1, 1, &world.leaf()), record(3, 0, 2, &other.leaf())];
        assert_eq!(world.judge(alone(&world, &of_another_thing), &world.leaf()), Ok(()));
    }

    #[test]
    fn an_answer_that_does_not_hold_never_means_pkix_alone() {
        let world = World::new();
        let long_ago = Instant::now() - Duration::from_secs(1);
        let outdated = record(3, 1, 1, &world.leaf());
        let outdated = [(outdated.0, outdated.1, outdated.2, &outdated.3[..])];
        for (answer, reason) in [
            (Answer::Insecure, Reason::TlsaInsecure),
            (Answer::Unavailable, Reason::TlsaUnavailable),
            (Answer::secure([], Instant::now() + Duration::from_secs(60)), Reason::TlsaMissing),
            (Answer::secure(outdated, long_ago), Reason::TlsaUnavailable),
        ] {
            let tlsa = Standing::default();
            tlsa.set(answer.clone());
            let plan = VerifyPlan { dane: Mode::Enforce, tlsa: Arc::new(tlsa), ..world.plan() };
            assert_eq!(world.judge(plan.clone(), &world.leaf()), Err(reason), "{answer:?}");
            let plan = VerifyPlan { dane: Mode::Report, ..plan };
            assert_eq!(world.judge(plan.clone(), &world.leaf()), Ok(()), "{answer:?}");
            assert_eq!(reported(&plan.findings), [reason], "{answer:?}");
        }
        let plan = VerifyPlan { dane: Mode::Enforce, ..world.plan() };
        assert_eq!(world.judge(plan, &world.leaf()), Err(Reason::TlsaUnavailable), "nobody has asked yet");
    }

    #[test]
    fn a_record_that_fits_does_not_stand_in_for_pkix_while_dane_only_reports() {
        let world = World::new();
        let plan = VerifyPlan { dane: Mode::Report, ..alone(&world, &[record(3, 1, 1, &world.leaf())]) };
        assert_eq!(world.judge(plan, &world.leaf()), Err(Reason::UnknownIssuer));
    }

    #[test]
    fn pins_hold_for_what_dane_has_accepted() {
        let world = World::new();
        let records = [record(2, 1, 0, world.root.der())];
        for certificate in [&world.leaf()[..], world.intermediate.der(), world.root.der()] {
            let plan = VerifyPlan { pins: [pin_of(certificate)].into(), ..alone(&world, &records) };
            assert_eq!(world.judge(plan, &world.leaf()), Ok(()));
        }
        let plan = VerifyPlan { pins: [[0; 32]].into(), ..alone(&world, &records) };
        assert_eq!(world.judge(plan, &world.leaf()), Err(Reason::PinMismatch));
    }

    #[test]
    fn changes_are_counted_when_another_answer_comes_and_not_when_the_same_is_renewed() {
        let standing = Standing::default();
        let secure = |byte: u8, seconds| {
            let data = [byte; 32];
            Answer::secure([(3, 1, 1, &data[..])], Instant::now() + Duration::from_secs(seconds))
        };
        for (answer, changes) in
            [(secure(1, 1), 1), (secure(1, 2), 1), (secure(2, 2), 2), (Answer::Insecure, 3)]
        {
            standing.set(answer);
            assert_eq!(standing.changes(), changes);
        }
    }
}

mod transparency {
    use super::*;

    fn plan(world: &World, scts: usize, operators: usize) -> VerifyPlan {
        VerifyPlan { transparency: Mode::Enforce, policy: world.policy(scts, operators), ..world.plan() }
    }

    /// One response about the leaf, with a list of SCTs (RFC 6960 4.2.1).
    pub fn ocsp_with(list: &[u8]) -> Vec<u8> {
        let oid = |bytes: &[u8]| der::encode(der::OBJECT_IDENTIFIER, &[bytes]);
        let sequence = |parts: &[&[u8]]| der::encode(der::SEQUENCE, parts);
        let time = der::encode(der::GENERALIZED_TIME, &[b"20270101000000Z"]);
        let value = der::encode(der::OCTET_STRING, &[&der::encode(der::OCTET_STRING, &[list])]);
        let other = sequence(&[&oid(&[0x2a, 0x03]), &der::encode(der::OCTET_STRING, &[&[5, 0]])]);
        let extension =
            sequence(&[&oid(&[0x2b, 0x06, 0x01, 0x04, 0x01, 0xd6, 0x79, 0x02, 0x04, 0x05]), &value]);
        let extensions = der::encode(der::constructed(1), &[&sequence(&[&other, &extension])]);
        let next_update = der::encode(der::constructed(0), &[&time]);
        let good = [0x80, 0];
        let single = sequence(&[&sequence(&[]), &good, &time, &next_update, &extensions]);
        let responder = der::encode(der::constructed(2), &[&der::encode(der::OCTET_STRING, &[&[1; 20]])]);
        let data = sequence(&[&responder, &time, &sequence(&[&single])]);
        let basic = sequence(&[&data, &sequence(&[]), &der::encode(der::BIT_STRING, &[&[0, 1]])]);
        let bytes = sequence(&[
            &oid(&[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01]),
            &der::encode(der::OCTET_STRING, &[&basic]),
        ]);
        sequence(&[&der::encode(der::ENUMERATED, &[&[0]]), &der::encode(der::constructed(0), &[&bytes])])
    }

    fn x509_entry(certificate: &[u8]) -> Vec<u8> {
        [&[0, 0][..], &u24(certificate.len()), certificate].concat()
    }

    #[test]
    fn scts_in_the_certificate_are_verified_over_what_the_logs_saw() {
        let world = World::new();
        let [first, _, third] = &world.logs[..] else { unreachable!("three logs") };
        assert_eq!(world.judge(plan(&world, 2, 2), &world.issue_logged(&[first, third])), Ok(()));
    }

    #[test]
    fn too_few_scts_or_operators_are_not_enough() {
        let world = World::new();
        let [first, second, third] = &world.logs[..] else { unreachable!("three logs") };
        let unknown = world::TestLog::new("three");
        for logs in
            [&[first][..], &[first, first], &[first, second], &[first, &unknown], &[&unknown, &unknown]]
        {
            let leaf = world.issue_logged(logs);
            assert_eq!(world.judge(plan(&world, 2, 2), &leaf), Err(Reason::SctInsufficient));
        }
        let leaf = world.issue_logged(&[first, second]);
        assert_eq!(world.judge(plan(&world, 2, 1), &leaf), Ok(()));
        let leaf = world.issue_logged(&[&unknown, first, third]);
        assert_eq!(world.judge(plan(&world, 2, 2), &leaf), Ok(()), "strangers do no harm");
    }

    #[test]
    fn a_certificate_without_scts_is_refused_and_with_report_only_counted() {
        let world = World::new();
        assert_eq!(world.judge(plan(&world, 1, 1), &world.leaf()), Err(Reason::SctMissing));
        let plan = VerifyPlan { transparency: Mode::Report, ..plan(&world, 1, 1) };
        assert_eq!(world.judge(plan.clone(), &world.leaf()), Ok(()));
        assert_eq!(reported(&plan.findings), [Reason::SctMissing]);
    }

    #[test]
    fn an_sct_of_another_certificate_or_from_the_future_is_wrong() {
        let (world, other) = (World::new(), World::new());
        let log = &world.logs[0];
        let of_other = list([log.sct(&other.precertificate())]);
        let leaf = world.issue_with_list(&of_other);
        assert_eq!(world.judge(plan(&world, 1, 1), &leaf), Err(Reason::SctInvalid));
        let tomorrow = list([log.sct_of((world::NOW_S + 86_400) * 1000, &world.precertificate())]);
        let leaf = world.issue_with_list(&tomorrow);
        assert_eq!(world.judge(plan(&world, 1, 1), &leaf), Err(Reason::SctInvalid));
        let leaf = world.issue_with_list(&[0, 9, 0]);
        assert_eq!(world.judge(plan(&world, 1, 1), &leaf), Err(Reason::SctInvalid));
    }

    #[test]
    fn a_wrong_sct_does_no_harm_beside_enough_that_hold() {
        let (world, other) = (World::new(), World::new());
        let [first, second, third] = &world.logs[..] else { unreachable!("three logs") };
        let entry = world.precertificate();
        let scts = [first.sct(&entry), second.sct(&other.precertificate()), third.sct(&entry)];
        assert_eq!(world.judge(plan(&world, 2, 2), &world.issue_with_list(&list(scts))), Ok(()));
    }

    #[test]
    fn scts_in_an_ocsp_response_are_over_the_certificate_itself() {
        let world = World::new();
        let leaf = world.leaf();
        let sent: &[&[u8]] = &[world.intermediate.der()];
        let entry = x509_entry(&leaf);
        let good = ocsp_with(&list(world.logs.iter().map(|log| log.sct(&entry))));
        assert_eq!(judge(plan(&world, 2, 2), &leaf, sent, &good), Ok(()));
        let of_precertificate =
            ocsp_with(&list(world.logs.iter().map(|log| log.sct(&world.precertificate()))));
        assert_eq!(judge(plan(&world, 2, 2), &leaf, sent, &of_precertificate), Err(Reason::SctInvalid));
        assert_eq!(judge(plan(&world, 2, 2), &leaf, sent, &[0x30, 0]), Err(Reason::SctMissing));
    }

    #[test]
    fn both_ways_count_together_and_one_log_counts_once() {
        let world = World::new();
        let [first, _, third] = &world.logs[..] else { unreachable!("three logs") };
        let leaf = world.issue_logged(&[first]);
        let sent: &[&[u8]] = &[world.intermediate.der()];
        let entry = x509_entry(&leaf);
        let of_third = ocsp_with(&list([third.sct(&entry)]));
        assert_eq!(judge(plan(&world, 2, 2), &leaf, sent, &of_third), Ok(()));
        let of_first = ocsp_with(&list([first.sct(&entry)]));
        assert_eq!(judge(plan(&world, 2, 1), &leaf, sent, &of_first), Err(Reason::SctInsufficient));
    }

    #[test]
    fn of_a_retired_log_what_was_signed_before_counts_beside_a_living_one() {
        let world = World::new();
        let leaf = world.issue_logged(&world.logs.iter().collect::<Vec<_>>());
        let judge_retired = |retired: &[usize], retired_s: u64| {
            let logs = world.logs.iter().enumerate().map(|(index, log)| {
                let retired_ms = retired.contains(&index).then_some(retired_s * 1000);
                super::super::Log { retired_ms, ..log.known() }
            });
            let policy = Arc::new(Policy::new(logs, 3, 2));
            world.judge(VerifyPlan { policy, ..plan(&world, 3, 2) }, &leaf)
        };
        assert_eq!(judge_retired(&[0, 1], world::NOW_S), Ok(()));
        assert_eq!(judge_retired(&[0], world::NOW_S - 2 * 86_400), Err(Reason::SctInsufficient));
        assert_eq!(judge_retired(&[0, 1, 2], world::NOW_S), Err(Reason::SctInsufficient));
    }

    #[test]
    fn a_log_counts_for_certificates_that_end_in_its_interval() {
        let world = World::new();
        let leaf = world.issue_logged(&[&world.logs[0]]);
        let end_ms = 1_830_297_600_000; // 2028-01-01
        for (interval, expected) in [
            ((end_ms, end_ms + 1), Ok(())),
            ((end_ms - 1, end_ms), Err(Reason::SctInsufficient)),
            ((end_ms + 1, end_ms + 2), Err(Reason::SctInsufficient)),
        ] {
            let log = super::super::Log { interval_ms: Some(interval), ..world.logs[0].known() };
            let policy = Arc::new(Policy::new([log], 1, 1));
            assert_eq!(world.judge(VerifyPlan { policy, ..plan(&world, 1, 1) }, &leaf), expected);
        }
    }

    #[test]
    fn what_a_record_alone_has_accepted_needs_no_log() {
        let world = World::new();
        let dane = world.dane_plan(&[record(3, 1, 1, &world.leaf())]);
        let both = VerifyPlan { dane: dane.dane, tlsa: dane.tlsa, ..plan(&world, 2, 2) };
        assert_eq!(world.judge(both, &world.leaf()), Ok(()));
        let dane = world.dane_plan(&[record(1, 1, 1, &world.leaf())]);
        let both = VerifyPlan { dane: dane.dane, tlsa: dane.tlsa, ..plan(&world, 2, 2) };
        assert_eq!(world.judge(both, &world.leaf()), Err(Reason::SctMissing));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_certificate_with_any_bit_flipped_is_refused_without_panic(at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let world = shared();
        let mut leaf = world.1.clone();
        let index = at.index(leaf.len());
        leaf[index] ^= 1 << bit;
        prop_assert!(world.0.judge(world.0.plan(), &leaf).is_err());
        let dane = world.0.dane_plan(&[record(3, 0, 2, &world.1)]);
        prop_assert!(world.0.judge(dane, &leaf).is_err());
    }

    #[test]
    fn arbitrary_bytes_are_refused_without_panic(
        leaf in prop::collection::vec(any::<u8>(), 0..400),
        sent in prop::collection::vec(any::<u8>(), 0..400),
        ocsp in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let world = shared();
        let everything = VerifyPlan {
            transparency: Mode::Enforce,
            policy: world.0.policy(2, 2),
            ..world.0.dane_plan(&[record(3, 0, 2, &world.1), record(2, 0, 1, world.0.root.der())])
        };
        prop_assert!(judge(everything.clone(), &leaf, &[&sent], &ocsp).is_err());
        // A good leaf with hostile company.
        let without_dane = VerifyPlan { dane: Mode::Off, ..everything };
        let accepted = judge(without_dane, &world.1, &[&sent, world.0.intermediate.der()], &ocsp);
        prop_assert_eq!(accepted, Ok(()));
    }
}

/// A world, and a leaf with SCTs.
fn shared() -> &'static (World, Vec<u8>) {
    static SHARED: std::sync::OnceLock<(World, Vec<u8>)> = std::sync::OnceLock::new();
    SHARED.get_or_init(|| {
        let world = World::new();
        let leaf = world.issue_logged(&[&world.logs[0], &world.logs[2]]);
        (world, leaf)
    })
}
