//! Owns what the verification of a server's certificate must hold to: whatever a server sends, it is refused without a panic
//! unless its leaf is, byte for byte, the one that a TLSA record names; and nothing that it sends along changes that.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use keygate_engine::verify::{
    Answer, Mode, PeerSignatures, Policy, Roots, ServerVerifier, Standing, VerifyPlan,
};
use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};

/// The first byte chooses where the rest goes: in place of the leaf, over the leaf, beside it, or into the OCSP response.
pub fn fuzz_one(bytes: &[u8]) {
    let World { good, by_dane, by_logs } = world();
    let Some((choice, rest)) = bytes.split_first() else { return };
    let (leaf, sent, ocsp) = match choice % 4 {
        0 => (rest.to_vec(), Vec::new(), &[][..]),
        1 => (overwritten(good, rest), Vec::new(), &[][..]),
        2 => (good.clone(), vec![CertificateDer::from(rest)], &[][..]),
        _ => (good.clone(), Vec::new(), rest),
    };
    let judge = |verifier: &ServerVerifier| {
        let name = ServerName::try_from("server.test").expect("a name");
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000));
        verifier.verify_server_cert(&CertificateDer::from(&leaf[..]), &sent, &name, ocsp, now).is_ok()
    };
    assert_eq!(judge(by_dane), leaf == *good);
    // Its SCTs are of no log that is known; what they hold must still be read.
    assert!(!judge(by_logs));
}

struct World {
    good: Vec<u8>,
    by_dane: Arc<ServerVerifier>,
    by_logs: Arc<ServerVerifier>,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let good = certificate();
        let standing = Standing::default();
        standing.set(Answer::secure([(3, 0, 0, &good[..])], Instant::now() + Duration::from_secs(1 << 24)));
        let plan = VerifyPlan {
            name: ServerName::try_from("server.test").expect("a name"),
            pkix: Mode::Enforce,
            roots: Arc::new(Roots::new([CertificateDer::from(good.clone())])),
            lists: Arc::default(),
            pins: [].into(),
            dane: Mode::Enforce,
            tlsa: Arc::new(standing),
            transparency: Mode::Off,
            policy: Arc::new(Policy::new([], 1, 1)),
            findings: Arc::default(),
        };
        let by_logs =
            VerifyPlan { pkix: Mode::Report, dane: Mode::Off, transparency: Mode::Enforce, ..plan.clone() };
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        let signatures = PeerSignatures::new(algorithms, &algorithms.supported_schemes());
        World {
            good,
            by_dane: ServerVerifier::new(plan, signatures.clone()),
            by_logs: ServerVerifier::new(by_logs, signatures),
        }
    })
}

/// Signed by itself, with a list of one SCT.
fn certificate() -> Vec<u8> {
    let mut sct = vec![0; 43]; // version 1, a log, a time, no extensions
    sct.extend_from_slice(&[4, 3, 0, 4, 0x30, 2, 5, 0]);
    let list = [&[0, sct.len() as u8 + 2, 0, sct.len() as u8][..], &sct].concat();
    let value = [&[0x04, list.len() as u8][..], &list].concat();
    let mut params = CertificateParams::new(["server.test".to_owned()]).expect("a name");
    params.custom_extensions =
        vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 11129, 2, 4, 2], value)];
    params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").der().to_vec()
}

/// Triples of position (two bytes) and byte; what is left at the end cuts the certificate at that position.
fn overwritten(good: &[u8], edits: &[u8]) -> Vec<u8> {
    let mut certificate = good.to_vec();
    for edit in edits.chunks(3) {
        match *edit {
            [high, low, byte] => {
                let at = usize::from(u16::from_be_bytes([high, low])) % certificate.len().max(1);
                if let Some(target) = certificate.get_mut(at) {
                    *target = byte;
                }
            }
            [high, low] => certificate.truncate(usize::from(u16::from_be_bytes([high, low]))),
            _ => {}
        }
    }
    certificate
}
