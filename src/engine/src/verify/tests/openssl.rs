//! Certificates that only OpenSSL makes: with keys and signatures that nobody should use any more.

use std::path::Path;
use std::process::Command;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::*;

/// A CA called `ca`, and `leaf` for server.test signed by it.
struct Made {
    ca: CertificateDer<'static>,
    leaf: CertificateDer<'static>,
}

const EC: &str = "ec -pkeyopt ec_paramgen_curve:P-256";

/// Made in a directory of its own; tests run on threads of one process.
fn make(ca_key: &str, leaf_key: &str, digest: &str) -> Made {
    let directory = std::env::temp_dir().join(format!(
        "keygate-verify-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::create_dir_all(&directory).expect("a directory");
    let extensions = "subjectAltName=DNS:server.test";
    std::fs::write(directory.join("extensions"), extensions).expect("a file");
    openssl(
        &directory,
        &format!("req -x509 -newkey {ca_key} -nodes -keyout ca.key -out ca.pem -days 9000 -subj /CN=ca"),
    );
    openssl(
        &directory,
        &format!("req -newkey {leaf_key} -nodes -keyout leaf.key -out leaf.csr -subj /CN=leaf"),
    );
    openssl(
        &directory,
        &format!(
            "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -{digest} -days 9000 -extfile extensions -out leaf.pem"
        ),
    );
    let read = |name| CertificateDer::from_pem_file(directory.join(name)).expect("a certificate");
    let made = Made { ca: read("ca.pem"), leaf: read("leaf.pem") };
    std::fs::remove_dir_all(&directory).expect("our directory");
    made
}

fn openssl(directory: &Path, arguments: &str) {
    let output = Command::new("openssl")
        .current_dir(directory)
        .args(arguments.split_whitespace())
        .output()
        .expect("openssl is installed");
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn judge_made(made: &Made) -> Result<(), Reason> {
    let plan = VerifyPlan { roots: Arc::new(Roots::new([made.ca.clone()])), ..World::new().plan() };
    judge(plan, &made.leaf, &[], &[])
}

#[test]
fn keys_of_2048_bits_are_strong_enough_and_shorter_ones_are_weak() {
    assert_eq!(judge_made(&make("rsa:2048", "rsa:2048", "sha256")), Ok(()));
    assert_eq!(judge_made(&make(EC, EC, "sha256")), Ok(()));
    assert_eq!(judge_made(&make(EC, "rsa:1024", "sha256")), Err(Reason::WeakKey));
    assert_eq!(judge_made(&make("rsa:1024", EC, "sha256")), Err(Reason::WeakKey));
    assert_eq!(judge_made(&make("rsa:2047", EC, "sha256")), Err(Reason::WeakKey));
}

#[test]
fn sha1_is_too_weak_for_a_signature() {
    assert_eq!(judge_made(&make(EC, EC, "sha1")), Err(Reason::WeakSignature));
    assert_eq!(judge_made(&make("rsa:2048", EC, "sha1")), Err(Reason::WeakSignature));
}

#[test]
fn a_weak_key_is_refused_also_on_a_way_that_dane_names() {
    let made = make(EC, "rsa:1024", "sha256");
    let world = World::new();
    let plan = world.dane_plan(&[record(2, 1, 0, &made.ca)]);
    assert_eq!(judge(plan, &made.leaf, &[], &[]), Err(Reason::WeakKey));
}
