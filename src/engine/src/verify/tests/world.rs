//! Owns a small world for tests: a CA, certificates that are wrong in a way of the test's choice, logs, and the verifier of a
//! server called server.test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, SHA512, digest};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, CustomExtension,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData,
    RevokedCertParams, SerialNumber, SigningKey, date_time_ymd,
};
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};

use crate::verify::{
    Answer, Findings, Log, Mode, PeerSignatures, Policy, Reason, RevocationLists, Roots, ServerVerifier,
    Standing, VerifyPlan, der, x509,
};

pub const SERIAL: u64 = 4711;
/// In the middle of what every certificate here is valid for.
pub const NOW_S: u64 = 1_800_000_000;
const SCT_LIST_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 11129, 2, 4, 2];

type Ca = CertifiedIssuer<'static, KeyPair>;

pub struct World {
    pub root: Ca,
    pub intermediate: Ca,
    pub leaf_key: KeyPair,
    pub logs: Vec<TestLog>,
}

impl World {
    pub fn new() -> Self {
        let root = Ca::self_signed(ca("Test Root"), key()).expect("a root");
        let intermediate = Ca::signed_by(ca("Test Intermediate"), key(), &root).expect("an intermediate");
        let logs = ["one", "one", "two"].map(TestLog::new).into();
        Self { root, intermediate, leaf_key: key(), logs }
    }

    /// One that is good.
    pub fn leaf(&self) -> Vec<u8> {
        self.issue(|_| {})
    }

    /// By the intermediate.
    pub fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = leaf();
        change(&mut params);
        params.signed_by(&self.leaf_key, &self.intermediate).expect("a leaf").der().to_vec()
    }

    /// With SCTs in it, each over what a log has seen: the same certificate without them.
    pub fn issue_logged(&self, logs: &[&TestLog]) -> Vec<u8> {
        self.issue_with_list(&list(logs.iter().map(|log| log.sct(&self.precertificate()))))
    }

    pub fn issue_with_list(&self, list: &[u8]) -> Vec<u8> {
        self.issue(|params| params.custom_extensions = vec![sct_extension(list)])
    }

    /// What a log signs of the good leaf.
    pub fn precertificate(&self) -> Vec<u8> {
        let leaf = self.leaf();
        let tbs =
            der::only(&leaf, der::SEQUENCE).and_then(|leaf| leaf.inside().any()).expect("a certificate");
        let issuer_key_hash = digest(&SHA256, &self.intermediate.key().subject_public_key_info());
        [&[0, 1][..], issuer_key_hash.as_ref(), &u24(tbs.whole.len()), tbs.whole].concat()
    }

    /// Of the intermediate, from 2020 on.
    pub fn revocation_list(&self, revoked: &[u64], next_update_year: i32) -> Vec<u8> {
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2021, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(next_update_year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.intermediate).expect("a revocation list").der().to_vec()
    }

    pub fn policy(&self, scts: usize, operators: usize) -> Arc<Policy> {
        Arc::new(Policy::new(self.logs.iter().map(TestLog::known), scts, operators))
    }

    /// PKIX is enforced, the rest is off.
    pub fn plan(&self) -> VerifyPlan {
        VerifyPlan {
            name: ServerName::try_from("server.test").expect("a name"),
            pkix: Mode::Enforce,
            roots: Arc::new(Roots::new([self.root.der().clone()])),
            lists: Arc::default(),
            pins: [].into(),
            dane: Mode::Off,
            tlsa: Arc::default(),
            transparency: Mode::Off,
            policy: Arc::default(),
            findings: Arc::default(),
        }
    }

    /// DANE is enforced on top, or instead.
    pub fn dane_plan(&self, records: &[Record]) -> VerifyPlan {
        VerifyPlan { dane: Mode::Enforce, tlsa: standing(records), ..self.plan() }
    }

    /// What the verifier says about a leaf that comes with the intermediate.
    pub fn judge(&self, plan: VerifyPlan, leaf: &[u8]) -> Result<(), Reason> {
        judge(plan, leaf, &[self.intermediate.der()], &[])
    }
}

/// Usage, selector, matching type, data.
pub type Record = (u8, u8, u8, Vec<u8>);

pub fn standing(records: &[Record]) -> Arc<Standing> {
    let standing = Standing::default();
    let records =
        records.iter().map(|(usage, selector, matching, data)| (*usage, *selector, *matching, &data[..]));
    standing.set(Answer::secure(records, Instant::now() + Duration::from_secs(60)));
    Arc::new(standing)
}

/// A record that fits to this certificate.
pub fn record(usage: u8, selector: u8, matching: u8, certificate: &[u8]) -> Record {
    let parsed = x509::Certificate::parse(certificate).expect("a certificate");
    let selected = if selector == 0 { certificate } else { parsed.spki };
    let data = match matching {
        0 => selected.to_vec(),
        1 => digest(&SHA256, selected).as_ref().to_vec(),
        _ => digest(&SHA512, selected).as_ref().to_vec(),
    };
    (usage, selector, matching, data)
}

/// Of all schemes that there are.
pub fn every_signature() -> PeerSignatures {
    let algorithms = default_provider().signature_verification_algorithms;
    PeerSignatures::new(algorithms, &algorithms.supported_schemes())
}

pub fn judge(plan: VerifyPlan, leaf: &[u8], sent: &[&[u8]], ocsp: &[u8]) -> Result<(), Reason> {
    let verifier = ServerVerifier::new(plan, every_signature());
    let sent: Vec<_> = sent.iter().map(|der| CertificateDer::from(*der)).collect();
    // SNI may say something else; it does not matter here.
    let sni = ServerName::try_from("sni.test").expect("a name");
    let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW_S));
    match verifier.verify_server_cert(&CertificateDer::from(leaf), &sent, &sni, ocsp, now) {
        Ok(_) => Ok(()),
        Err(error) => Err(Reason::from_error(&error).expect("a reason")),
    }
}

/// Which reasons were only reported, or had a certificate refused.
pub fn reported(findings: &Findings) -> Vec<Reason> {
    findings.reported().filter(|(_, count)| *count > 0).map(|(reason, _)| reason).collect()
}

pub fn refused(findings: &Findings) -> Vec<Reason> {
    findings.refused().filter(|(_, count)| *count > 0).map(|(reason, _)| reason).collect()
}

pub fn lists(lists: &[&[u8]]) -> Arc<RevocationLists> {
    Arc::new(RevocationLists::new(lists.iter().copied()).expect("revocation lists"))
}

pub struct TestLog {
    key: KeyPair,
    operator: &'static str,
}

impl TestLog {
    pub fn new(operator: &'static str) -> Self {
        Self { key: key(), operator }
    }

    pub fn known(&self) -> Log {
        let key = self.key.subject_public_key_info();
        let mut id = [0; 32];
        id.copy_from_slice(digest(&SHA256, &key).as_ref());
        Log { id, key, operator: self.operator.to_owned(), retired_ms: None, interval_ms: None }
    }

    /// Signed a day ago.
    pub fn sct(&self, entry: &[u8]) -> Vec<u8> {
        self.sct_of((NOW_S - 86_400) * 1000, entry)
    }

    /// `entry`: its type and all that follows it up to the extensions (RFC 6962 3.2).
    pub fn sct_of(&self, timestamp_ms: u64, entry: &[u8]) -> Vec<u8> {
        let timestamp = timestamp_ms.to_be_bytes();
        let signed = [&[0, 0][..], &timestamp, entry, &[0, 0]].concat();
        let signature = self.key.sign(&signed).expect("a signature");
        [&[0][..], &self.known().id, &timestamp, &[0, 0, 4, 3], &u16_of(&signature), &signature].concat()
    }
}

/// RFC 6962 3.3.
pub fn list(scts: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    let entries: Vec<u8> = scts.into_iter().flat_map(|sct| [&u16_of(&sct)[..], &sct].concat()).collect();
    [&u16_of(&entries)[..], &entries].concat()
}

pub fn u24(length: usize) -> [u8; 3] {
    let [_, digits @ ..] = (length as u32).to_be_bytes();
    digits
}

fn u16_of(bytes: &[u8]) -> [u8; 2] {
    (bytes.len() as u16).to_be_bytes()
}

fn sct_extension(list: &[u8]) -> CustomExtension {
    CustomExtension::from_oid_content(SCT_LIST_OID, der::encode(der::OCTET_STRING, &[list]))
}

pub fn key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

pub fn ca(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = Default::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2040, 1, 1);
    params
}

pub fn leaf() -> CertificateParams {
    let mut params = CertificateParams::new(["server.test".to_owned()]).expect("a name");
    params.distinguished_name = Default::default();
    params.distinguished_name.push(DnType::CommonName, "leaf");
    params.serial_number = Some(SerialNumber::from(SERIAL));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.not_before = date_time_ymd(2026, 1, 1);
    params.not_after = date_time_ymd(2028, 1, 1);
    params
}
