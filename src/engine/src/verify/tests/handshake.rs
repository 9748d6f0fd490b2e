//! Whole handshakes with rustls as the server: what the server hears, and what the client can tell.

use rustls::client::ClientConnection;
use rustls::crypto::aws_lc_rs::{default_provider, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, ServerConnection};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, ClientConfig, Error, ServerConfig};

use super::super::ServerVerifier;
use super::*;

#[derive(Debug)]
struct Shows(Arc<CertifiedKey>);

impl ResolvesServerCert for Shows {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// What the client ended with, and the alert that the server got.
#[derive(Debug, PartialEq)]
struct Outcome {
    client: Result<(), Reason>,
    alert: Option<AlertDescription>,
}

const DONE: Outcome = Outcome { client: Ok(()), alert: None };

fn shake_hands(
    plan: VerifyPlan,
    chain: &[&[u8]],
    key: &rcgen::KeyPair,
    ocsp: Option<Vec<u8>>,
    version: &str,
) -> Outcome {
    let provider = Arc::new(default_provider());
    let versions: &[_] =
        if version == "1.2" { &[&rustls::version::TLS12] } else { &[&rustls::version::TLS13] };
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    let chain = chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    let mut certified = CertifiedKey::new(chain, any_supported_type(&key).expect("a usable key"));
    certified.ocsp = ocsp;
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .expect("versions")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Shows(Arc::new(certified))));
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(ServerVerifier::new(plan, every_signature()))
        .with_no_client_auth();
    let name = ServerName::try_from("sni.test").expect("a name");
    let mut client = ClientConnection::new(Arc::new(client), name).expect("a client");
    let mut server = ServerConnection::new(Arc::new(server)).expect("a server");

    let mut client_ended = Ok(());
    for _ in 0..8 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).expect("memory");
        }
        server.read_tls(&mut &bytes[..]).expect("memory");
        if let Err(error) = server.process_new_packets() {
            let Error::AlertReceived(alert) = error else { panic!("{error}") };
            return Outcome { client: client_ended, alert: Some(alert) };
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).expect("memory");
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() && client_ended.is_ok() {
            client.read_tls(&mut rest).expect("memory");
            client_ended = client
                .process_new_packets()
                .map(drop)
                .map_err(|error| Reason::from_error(&error).expect("a reason"));
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Outcome { client: client_ended, alert: None }
}

/// The clock of a handshake is the host's: these certificates are good for long.
fn lasting(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2040, 1, 1);
}

#[test]
fn the_server_hears_the_alert_that_fits_and_the_caller_the_reason() {
    let world = World::new();
    let refusals: [(VerifyPlan, Vec<u8>, Reason, AlertDescription); 5] = [
        (
            world.plan(),
            world.issue(|leaf| {
                lasting(leaf);
                leaf.not_after = date_time_ymd(2021, 1, 1);
            }),
            Reason::Expired,
            AlertDescription::CertificateExpired,
        ),
        (
            VerifyPlan { roots: Arc::default(), ..world.plan() },
            world.issue(lasting),
            Reason::UnknownIssuer,
            AlertDescription::UnknownCA,
        ),
        (
            VerifyPlan { lists: lists(&[&world.revocation_list(&[world::SERIAL], 2040)]), ..world.plan() },
            world.issue(lasting),
            Reason::Revoked,
            AlertDescription::CertificateRevoked,
        ),
        (
            VerifyPlan { pins: [[0; 32]].into(), ..world.plan() },
            world.issue(lasting),
            Reason::PinMismatch,
            AlertDescription::CertificateUnknown,
        ),
        (
            VerifyPlan { dane: Mode::Enforce, ..world.plan() },
            world.issue(lasting),
            Reason::TlsaUnavailable,
            AlertDescription::CertificateUnknown,
        ),
    ];
    for version in ["1.2", "1.3"] {
        for (plan, leaf, reason, alert) in &refusals {
            let chain: &[&[u8]] = &[leaf, world.intermediate.der()];
            let outcome = shake_hands(plan.clone(), chain, &world.leaf_key, None, version);
            assert_eq!(outcome, Outcome { client: Err(*reason), alert: Some(*alert) }, "TLS {version}");
        }
    }
}

#[test]
fn a_good_server_is_accepted_also_by_dane_alone() {
    let world = World::new();
    let leaf = world.issue(lasting);
    let chain: &[&[u8]] = &[&leaf, world.intermediate.der()];
    for version in ["1.2", "1.3"] {
        assert_eq!(shake_hands(world.plan(), chain, &world.leaf_key, None, version), DONE);
        let dane = VerifyPlan { roots: Arc::default(), ..world.dane_plan(&[record(3, 1, 1, &leaf)]) };
        assert_eq!(shake_hands(dane, &[&leaf], &world.leaf_key, None, version), DONE);
    }
}

#[test]
fn the_ocsp_response_reaches_the_verifier_in_both_versions() {
    let world = World::new();
    let leaf = world.issue(lasting);
    let chain: &[&[u8]] = &[&leaf, world.intermediate.der()];
    let plan = || VerifyPlan { transparency: Mode::Enforce, policy: world.policy(1, 1), ..world.plan() };
    let entry = [&[0, 0][..], &u24(leaf.len()), &leaf].concat();
    let response = transparency::ocsp_with(&list([world.logs[0].sct_of(1_700_000_000_000, &entry)]));
    for version in ["1.2", "1.3"] {
        assert_eq!(shake_hands(plan(), chain, &world.leaf_key, Some(response.clone()), version), DONE);
        let without = shake_hands(plan(), chain, &world.leaf_key, None, version);
        assert_eq!(without.client, Err(Reason::SctMissing));
    }
}

#[test]
fn a_server_without_the_key_is_refused_in_every_mode() {
    let world = World::new();
    let leaf = world.issue(lasting);
    let thief = key();
    let chain: &[&[u8]] = &[&leaf, world.intermediate.der()];
    let plans = [
        world.plan(),
        VerifyPlan { pkix: Mode::Report, ..world.plan() },
        world.dane_plan(&[record(3, 1, 1, &leaf)]),
    ];
    for plan in plans {
        for version in ["1.2", "1.3"] {
            let outcome = shake_hands(plan.clone(), chain, &thief, None, version);
            assert_eq!(outcome.client, Err(Reason::BadSignature), "TLS {version}");
        }
        assert_eq!(refused(&plan.findings), [Reason::BadSignature]);
    }
}
