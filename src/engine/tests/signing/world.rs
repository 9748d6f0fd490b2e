//! Owns the surroundings of one test: a process of its own with a private SoftHSM token directory, keys, and the fault
//! module in front of SoftHSM. Must not know what is tested.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use keygate_engine::signing::login::Maker;
use keygate_engine::signing::token::{Token, TokenPlan};
use keygate_engine::signing::token_error::TokenError;
use keygate_engine::signing::token_key::KeyPlan;
use keygate_engine::signing::{PendingSignature, PrivateKey, SignError, Signed};
use rustls::SignatureScheme;

use crate::control::{Control, Function, FunctionControl};

pub const PIN: &str = "correct-horse";
pub const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// Everything waits at most this long for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct World {
    dir: PathBuf,
    pub control: Control,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    P256,
    P384,
    Rsa2048,
    Ed25519,
}

/// A private key in the token, made outside of it so that the test can check what the token does.
pub struct Key {
    pub label: String,
    pub spki: Vec<u8>,
    pub public_pem: PathBuf,
}

/// Runs the body of the test `name` in a process of its own: SoftHSM reads SOFTHSM2_CONF once per process, a process
/// has one login, and a crash must fail one test.
pub fn in_own_process(path: &str, body: fn(World)) {
    // Without the name of the crate.
    let name = path.split_once("::").map_or(path, |(_, name)| name);
    if let Some(dir) = env::var_os("KEYGATE_TEST_DIR") {
        // SAFETY: takes a number; the default action of SIGALRM ends this process should the test hang.
        unsafe { libc::alarm(60) };
        let dir = PathBuf::from(dir);
        let control = Control::open(&dir.join("control")).expect("the parent made it");
        return body(World { dir, control });
    }
    let dir = Scratch::new();
    fs::create_dir(dir.0.join("tokens")).expect("a new directory");
    let conf = format!(
        "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
        dir.0.join("tokens").display()
    );
    fs::write(dir.0.join("softhsm2.conf"), conf).expect("a new file");
    Control::create(&dir.0.join("control")).expect("a new file");
    let output = Command::new(env::current_exe().expect("known"))
        .args(["--exact", name, "--nocapture", "--include-ignored"])
        .env("KEYGATE_TEST_DIR", &dir.0)
        .env("SOFTHSM2_CONF", dir.0.join("softhsm2.conf"))
        .env("KEYGATE_FAULT_CONTROL", dir.0.join("control"))
        .env("KEYGATE_FAULT_MODULE", SOFTHSM)
        .env("KEYGATE_TEST_FAULT_MODULE", fault_module())
        .output()
        .expect("the test runs itself");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, error) = (said(&output.stdout), said(&output.stderr));
    // Also when no test of this name ran.
    let passed = output.status.success() && out.contains("1 passed");
    assert!(passed, "{name} in its own process: {}\n{out}\n{error}", output.status);
}

/// Where they are, and where they belong.
pub struct HiddenObjects(Vec<(PathBuf, PathBuf)>);

impl HiddenObjects {
    pub fn restore(self) {
        self.0.into_iter().for_each(|(hidden, file)| fs::rename(hidden, file).expect("it can be moved"));
    }
}

impl World {
    pub fn init_token(&self, label: &str) {
        let so = ["--so-pin", "security-officer"];
        run(Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", label, "--pin", PIN])
            .args(so));
    }

    /// A new private key in the token, with this CKA_LABEL and CKA_ID.
    pub fn make_key(&self, token: &str, label: &str, id: &str, kind: Kind) -> Key {
        let pem = self.dir.join(format!("{token}-{label}-{id}.pem"));
        let public_pem = pem.with_extension("pub");
        let algorithm: &[&str] = match kind {
            Kind::P256 => &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            Kind::P384 => &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
            Kind::Rsa2048 => &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
            Kind::Ed25519 => &["-algorithm", "ED25519"],
        };
        run(Command::new("openssl").arg("genpkey").args(algorithm).arg("-out").arg(&pem));
        run(Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&pem).arg("-out").arg(&public_pem));
        let der = ["-pubin", "-outform", "DER", "-in"];
        let spki = run(Command::new("openssl").arg("pkey").args(der).arg(&public_pem));
        self.import_key(&pem, token, label, id);
        Key { label: label.to_owned(), spki, public_pem }
    }

    /// The key that `make_key` made, into another token too.
    pub fn copy_key(&self, from: &str, to: &str, label: &str, id: &str) {
        self.import_key(&self.dir.join(format!("{from}-{label}-{id}.pem")), to, label, id);
    }

    fn import_key(&self, pem: &Path, token: &str, label: &str, id: &str) {
        run(Command::new("softhsm2-util")
            .arg("--import")
            .arg(pem)
            .args(["--token", token, "--label", label, "--id", id, "--pin", PIN]));
    }

    /// Takes the files of the token's objects away, and has SoftHSM notice it.
    pub fn hide_objects(&self, token: &str) -> HiddenObjects {
        let tokens = fs::read_dir(self.dir.join("tokens")).expect("there");
        let moves: Vec<_> = tokens
            .map(|token| token.expect("readable").path())
            .flat_map(|token| fs::read_dir(token).expect("a directory"))
            .map(|file| file.expect("readable").path())
            .filter(|file| {
                file.extension().is_some_and(|it| it == "object") && !file.ends_with("token.object")
            })
            .map(|file| (self.dir.join(file.file_name().expect("it has one")), file))
            .collect();
        moves.iter().for_each(|(hidden, file)| fs::rename(file, hidden).expect("it can be moved"));
        self.make_key(token, "another", "FF", Kind::P256);
        HiddenObjects(moves)
    }

    /// The key that `make_key` made, in a copy of the test.
    pub fn made_key(&self, token: &str, label: &str, id: &str) -> Key {
        let public_pem = self.dir.join(format!("{token}-{label}-{id}.pub"));
        let der = ["pkey", "-pubin", "-outform", "DER", "-in"];
        let spki = run(Command::new("openssl").args(der).arg(&public_pem));
        Key { label: label.to_owned(), spki, public_pem }
    }

    /// Runs so many more copies of this test at once, on the same tokens; they see `is_copy`. All must pass.
    pub fn run_copies(&self, name: &str, count: usize) {
        let copies: Vec<_> = (0..count)
            .map(|_| {
                Command::new(env::current_exe().expect("known"))
                    .args(["--exact", name, "--nocapture"])
                    .env("KEYGATE_TEST_COPY", "1")
                    .stdout(std::process::Stdio::piped())
                    .stderr(std::process::Stdio::piped())
                    .spawn()
                    .expect("the test runs itself")
            })
            .collect();
        for copy in copies {
            let output = copy.wait_with_output().expect("the copy ends");
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "a copy: {}\n{error}", output.status);
        }
    }

    /// Waits until so many copies are here.
    pub fn meet(&self, what: &str, count: usize) {
        let place = self.dir.join(format!("meeting-{what}"));
        fs::create_dir_all(&place).expect("a directory");
        fs::write(place.join(std::process::id().to_string()), "").expect("a file");
        until("everybody is here", || fs::read_dir(&place).expect("there").count() == count);
    }

    pub fn is_copy(&self) -> bool {
        env::var_os("KEYGATE_TEST_COPY").is_some()
    }

    pub fn plan(&self, label: &str) -> TokenPlan {
        TokenPlan {
            name: label.to_owned(),
            module: env::var_os("KEYGATE_TEST_FAULT_MODULE").expect("set by the parent").into(),
            label: label.to_owned(),
            serial: None,
            maker: Maker::default(),
            pin: PIN.as_bytes().to_vec().into(),
            lanes: 1,
            threads_max: 4,
            lost_after: PATIENCE,
            weight: 1,
            queue_max: 1024,
            queue_age_max: PATIENCE,
            login_lock_wait: PATIENCE,
            isolate: true,
            verify_rsa_every: 1,
            verify_ec_every: 1,
        }
    }

    /// A token with one key of each kind asked for, started with this plan.
    pub fn start(
        &self,
        kinds: &[Kind],
        change: impl FnOnce(&mut TokenPlan),
    ) -> (Arc<Token>, Vec<PrivateKeyOf>) {
        self.init_token("t");
        let keys: Vec<Key> = kinds
            .iter()
            .enumerate()
            .map(|(index, kind)| {
                self.make_key("t", &format!("{kind:?}-{index}"), &format!("A{index}"), *kind)
            })
            .collect();
        let mut plan = self.plan("t");
        change(&mut plan);
        plan.threads_max = plan.threads_max.max(plan.lanes);
        let token = Token::start(plan).expect("the token starts");
        let keys = keys.into_iter().map(|key| find(&token, key).expect("the key is found")).collect();
        (token, keys)
    }

    pub fn sign(&self) -> FunctionControl<'_> {
        self.control.of(Function::Sign)
    }

    pub fn calls(&self, function: Function) -> u64 {
        self.control.of(function).calls.load(SeqCst)
    }

    /// Checks a signature with OpenSSL, which shares no code with the engine.
    pub fn openssl_accepts(
        &self,
        key: &Key,
        scheme: SignatureScheme,
        message: &[u8],
        signature: &[u8],
    ) -> bool {
        let (message_file, signature_file) = (self.dir.join("message"), self.dir.join("signature"));
        fs::write(&message_file, message).expect("a file");
        fs::write(&signature_file, signature).expect("a file");
        let options: &[&str] = match scheme {
            SignatureScheme::ECDSA_NISTP256_SHA256 | SignatureScheme::RSA_PKCS1_SHA256 => {
                &["-digest", "sha256"]
            }
            SignatureScheme::ECDSA_NISTP384_SHA384 | SignatureScheme::RSA_PKCS1_SHA384 => {
                &["-digest", "sha384"]
            }
            SignatureScheme::RSA_PKCS1_SHA512 => &["-digest", "sha512"],
            SignatureScheme::RSA_PSS_SHA256 => &pss("sha256"),
            SignatureScheme::RSA_PSS_SHA384 => &pss("sha384"),
            SignatureScheme::RSA_PSS_SHA512 => &pss("sha512"),
            SignatureScheme::ED25519 => &[],
            other => panic!("no recipe for {other:?}"),
        };
        Command::new("openssl")
            .args(["pkeyutl", "-verify", "-rawin", "-pubin", "-inkey"])
            .arg(&key.public_pem)
            .arg("-in")
            .arg(message_file)
            .arg("-sigfile")
            .arg(signature_file)
            .args(options)
            .output()
            .expect("openssl runs")
            .status
            .success()
    }
}

pub struct PrivateKeyOf {
    pub key: Key,
    pub private: Arc<PrivateKey>,
}

impl PrivateKeyOf {
    /// Submits one signature with the preferred scheme.
    pub fn submit(&self) -> Result<PendingSignature, SignError> {
        self.private.sign(self.private.schemes()[0], b"message".to_vec())
    }

    pub fn sign(&self) -> Result<Signed, SignError> {
        answer(self.submit()?)
    }
}

pub fn find(token: &Arc<Token>, key: Key) -> Result<PrivateKeyOf, TokenError> {
    let plan =
        KeyPlan { id: None, label: Some(key.label.clone()), spki: key.spki.clone(), name: key.label.clone() };
    let private = PrivateKey::new(vec![token.find_key(plan)?]).expect("one token");
    Ok(PrivateKeyOf { key, private })
}

/// What the signature became; the engine's I/O thread awaits it the same way.
pub fn answer<F: Future>(pending: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime
        .block_on(async { tokio::time::timeout(PATIENCE, pending).await })
        .expect("an answer before the test's patience ends")
}

/// For states of the module and the token that send no event to a test.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let give_up = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < give_up, "never happened: {what}");
        thread::yield_now();
    }
}

fn pss(digest: &'static str) -> [&'static str; 6] {
    ["-digest", digest, "-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", "rsa_pss_saltlen:digest"]
}

/// Builds the fault module; cargo does nothing when it is up to date.
fn fault_module() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../test/fault-module");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--locked", "--manifest-path"]).arg(crate_dir.join("Cargo.toml"));
    cargo.arg("--target-dir").arg(crate_dir.join("target"));
    run(&mut cargo);
    crate_dir.join("target/debug/libkeygate_fault_module.so").canonicalize().expect("cargo has just built it")
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {complaint}", output.status);
    output.stdout
}

/// A new private directory, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        let mut template = env::temp_dir().join("keygate-XXXXXX").into_os_string().into_encoded_bytes();
        template.push(0);
        // SAFETY: a writable C string, which mkdtemp changes in place.
        let made = unsafe { libc::mkdtemp(template.as_mut_ptr().cast()) };
        assert!(!made.is_null(), "mkdtemp: {}", std::io::Error::last_os_error());
        template.pop();
        Scratch(PathBuf::from(String::from_utf8(template).expect("the temporary directory is UTF-8")))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A directory that stays behind fails nothing.
        let _ = fs::remove_dir_all(&self.0);
    }
}
