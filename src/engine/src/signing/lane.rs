//! Owns one lane: a thread with one PKCS#11 session, the ladder of repairs, and the decision what is verified.
//! Must not know who waits for a signature or why. Everything here runs on the lane's own thread, where the module may
//! block for as long as it likes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::ckr::{Ckr, Repair};
use super::desk::{DownReason, Job, Work};
use super::pkcs11::Session;
use super::public_key::KeyAlgorithm;
use super::queue::Class;
use super::token::Token;
use super::token_error::Problem;
use super::token_key::{Fault, TokenKey};
use super::{SignError, Signed};

/// The life of a lane, until the token stops.
pub(super) fn run(token: &Arc<Token>) {
    let _ended = Ended(token);
    let mut lane = Lane { token, session: None, proofs: HashMap::new() };
    // Before the first job, so that a token that allows fewer PKCS#11 sessions shrinks the pool and fails nobody.
    if let Err(Ckr::SESSION_COUNT) = lane.session()
        && token.desk().shrink()
    {
        return;
    }
    let seat = Arc::default();
    while let Some(work) = token.desk().next(&seat) {
        match work {
            Work::Sign(class, job) => {
                let _done = Done { token, class };
                lane.answer(class, job);
            }
            Work::Probe(suspect) => {
                let panicked = Err(Some(DownReason::Call("the probe panicked".into())));
                let mut probed = Probed { token, result: panicked };
                probed.result = lane.probe(suspect.as_ref());
            }
        }
    }
}

/// Gives back what a request occupied, also when the lane panics.
struct Done<'a> {
    token: &'a Token,
    class: Class,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.token.desk().done(self.class);
    }
}

/// Reports the probe also when the lane panics: no other lane probes until it is reported.
struct Probed<'a> {
    token: &'a Token,
    result: Result<(), Option<DownReason>>,
}

impl Drop for Probed<'_> {
    fn drop(&mut self) {
        self.token.desk().probed(std::mem::replace(&mut self.result, Ok(())));
    }
}

/// Counts the lane out also when it panics; the last one out lets go of the token.
struct Ended<'a>(&'a Token);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if self.0.desk().lane_ended() {
            self.0.release();
        }
    }
}

struct Lane<'a> {
    token: &'a Arc<Token>,
    session: Option<Session>,
    /// What was verified in this PKCS#11 session, by the key's number.
    proofs: HashMap<u64, Proof>,
}

struct Proof {
    generation: u64,
    since_verified: u32,
}

/// Keys come and go with reloads; forgetting them all costs one verification each.
const PROOFS_MAX: usize = 4096;

/// Each rung of the ladder is climbed once per request.
#[derive(Default)]
struct Tried {
    retry: bool,
    reopen: bool,
    relogin: bool,
    refind: bool,
    /// The generation of the handle that the token did not know.
    stale: Option<u64>,
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        self.close_session(Ckr::OK);
    }
}

impl Lane<'_> {
    fn answer(&mut self, class: Class, job: Job) {
        let stats = self.token.stats();
        let taken = Instant::now();
        let waited = taken - job.submitted;
        let Some(mechanism) = job.key.public.mechanism(job.scheme) else {
            let _ = job.reply.send(Err(SignError::SchemeUnsupported));
            return;
        };
        stats.sign_wait.observe(waited);
        let result = self.sign(&job);
        let signing = taken.elapsed();

        let outcomes = stats.of(mechanism);
        match &result {
            Ok(_) => {
                outcomes.ok.add(1);
                outcomes.sign.observe(signing);
            }
            Err(SignError::Wrong) => outcomes.wrong.add(1),
            Err(_) => outcomes.failed.add(1),
        }
        match class {
            Class::Ec => self.token.service_ec.measured(signing),
            Class::Rsa => self.token.service_rsa.measured(signing),
        }
        let token = self.token.name().clone();
        // The caller may have gone away while the token was busy.
        let _ = job.reply.send(result.map(|signature| Signed { signature, waited, signing, token }));
    }

    fn sign(&mut self, job: &Job) -> Result<Vec<u8>, SignError> {
        let mut tried = Tried::default();
        loop {
            let epoch = self.token.epoch();
            let fault = match self.attempt(job, epoch, tried.stale) {
                Ok(signature) => {
                    self.token.signature_succeeded();
                    return Ok(signature);
                }
                Err((fault, generation)) => {
                    tried.stale = generation;
                    fault
                }
            };
            match fault {
                Fault::Call(ckr) => self.repair(ckr, epoch, &mut tried, &job.key)?,
                // Other keys of the token are not concerned.
                Fault::KeyMissing | Fault::KeyAmbiguous => return Err(SignError::KeyLost),
                Fault::Wrong(wrong) => {
                    self.down(DownReason::WrongSignature(wrong.0), &job.key, true);
                    return Err(SignError::Wrong);
                }
            }
        }
    }

    /// One try. An error comes with the generation of the handle when it was the handle that was refused.
    fn attempt(
        &mut self,
        job: &Job,
        epoch: u64,
        stale: Option<u64>,
    ) -> Result<Vec<u8>, (Fault, Option<u64>)> {
        self.session().map_err(|ckr| (ckr.into(), stale))?;
        let Some(session) = &self.session else { return Err((Ckr::NOT_INITIALIZED.into(), stale)) };
        let found = job.key.locate(session, epoch, stale).map_err(|fault| (fault, stale))?;
        let verify = must_verify(&mut self.proofs, self.token, &job.key, found.generation);
        job.key.sign(session, found, job.scheme, &job.message, verify).map_err(|fault| {
            // Until a signature is seen to be right, the next one is a first one again.
            self.proofs.remove(&job.key.number);
            let refused = matches!(fault, Fault::Call(ckr) if ckr.repair() == Repair::Refind);
            (fault, refused.then_some(found.generation))
        })
    }

    /// Climbs one rung, or gives up on this request and says whether the token is to blame.
    fn repair(
        &mut self,
        ckr: Ckr,
        epoch: u64,
        tried: &mut Tried,
        key: &Arc<TokenKey>,
    ) -> Result<(), SignError> {
        let rung = match ckr.repair() {
            // Two in a row: a new PKCS#11 session may reach another device behind the same slot.
            Repair::Retry if tried.retry => Repair::Reopen,
            rung => rung,
        };
        match rung {
            Repair::Retry => tried.retry = true,
            Repair::Reopen if !tried.reopen => {
                tried.reopen = true;
                self.close_session(ckr);
                self.token.stats().reopened.add(1);
            }
            Repair::Relogin if !tried.relogin => {
                tried.relogin = true;
                if let Err(problem) = self.token.login_again(epoch) {
                    let (reason, probe) = login_failure(&problem);
                    self.down(reason, key, probe);
                    return Err(SignError::Failed(problem.ckr().unwrap_or(ckr)));
                }
            }
            Repair::Refind if !tried.refind => tried.refind = true,
            Repair::Hopeless => return Err(SignError::Failed(ckr)),
            // Re-initialising the module belongs here, when all lanes can be brought out of it.
            Repair::DeviceGone | Repair::PinRefused => {
                self.down(
                    DownReason::Call(format!("signing with key {} returned {ckr}", key.name)),
                    key,
                    true,
                );
                return Err(SignError::Failed(ckr));
            }
            Repair::Reopen | Repair::Relogin | Repair::Refind => {
                if self.token.signature_failed() {
                    self.down(
                        DownReason::Call(format!("signing with key {} returned {ckr}", key.name)),
                        key,
                        true,
                    );
                }
                return Err(SignError::Failed(ckr));
            }
        }
        Ok(())
    }

    /// Tries the whole way to a signature from the start. `Err(None)`: trying again cannot help.
    fn probe(&mut self, suspect: Option<&Arc<TokenKey>>) -> Result<(), Option<DownReason>> {
        self.close_session(Ckr::OK);
        let key = suspect.cloned().or_else(|| self.token.any_key());
        let mut result = self.try_probe(key.as_ref());
        let epoch = self.token.epoch();
        if let Err(Fault::Call(ckr)) = &result
            && matches!(ckr.repair(), Repair::Relogin | Repair::Reopen | Repair::Refind)
        {
            self.close_session(*ckr);
            if let Err(problem) = self.token.login_again(epoch) {
                let (reason, probe) = login_failure(&problem);
                return Err(probe.then_some(reason));
            }
            result = self.try_probe(key.as_ref());
        }
        result.map_err(|fault| {
            self.close_session(if let Fault::Call(ckr) = fault { ckr } else { Ckr::OK });
            Some(match fault {
                Fault::Call(ckr) => DownReason::Call(format!("a probe got {ckr}")),
                Fault::KeyMissing | Fault::KeyAmbiguous => {
                    DownReason::Call("a probe did not find its private key".into())
                }
                Fault::Wrong(wrong) => DownReason::WrongSignature(wrong.0),
            })
        })?;
        self.token.signature_succeeded();
        Ok(())
    }

    fn try_probe(&mut self, key: Option<&Arc<TokenKey>>) -> Result<(), Fault> {
        let epoch = self.token.epoch();
        let session = self.session()?;
        let Some(key) = key else {
            return match session.is_logged_in()? {
                true => Ok(()),
                false => Err(Ckr::USER_NOT_LOGGED_IN.into()),
            };
        };
        // Never the handle that may have been the trouble.
        let stale = key.generation();
        let found = key.locate(session, epoch, Some(stale))?;
        key.prove(session, found)
    }

    fn session(&mut self) -> Result<&Session, Ckr> {
        match &mut self.session {
            Some(session) => Ok(session),
            none => {
                let session = none.insert(self.token.open_session()?);
                self.token.stats().sessions_open.add(1);
                Ok(session)
            }
        }
    }

    /// `after` is what the last call in it returned.
    fn close_session(&mut self, after: Ckr) {
        if let Some(session) = self.session.take() {
            session.end_after(after);
            self.token.stats().sessions_open.add(-1);
        }
        self.proofs.clear();
    }

    fn down(&self, reason: DownReason, key: &Arc<TokenKey>, probe: bool) {
        self.token.desk().mark_down(reason, &Arc::downgrade(key), probe);
    }
}

/// The first signature of each (PKCS#11 session, key generation), then one in so many.
fn must_verify(proofs: &mut HashMap<u64, Proof>, token: &Token, key: &TokenKey, generation: u64) -> bool {
    let every = match key.public.algorithm() {
        KeyAlgorithm::Rsa { .. } => token.verify_rsa_every,
        _ => token.verify_ec_every,
    };
    if every == 1 {
        return true;
    }
    if proofs.len() >= PROOFS_MAX {
        proofs.clear();
    }
    let proof = proofs.entry(key.number).or_insert(Proof { generation: 0, since_verified: 0 });
    proof.since_verified += 1;
    if proof.generation == generation && proof.since_verified < every {
        return false;
    }
    *proof = Proof { generation, since_verified: 0 };
    true
}

/// Why the token is down after a failed login, and whether trying again may help. It may when somebody else can change
/// the answer without us presenting the PIN: the flags are read before each try.
fn login_failure(problem: &Problem) -> (DownReason, bool) {
    match problem {
        Problem::PinRefused(ckr) => (DownReason::Pin(format!("C_Login returned {ckr}")), false),
        Problem::PinLocked => (DownReason::Pin("the PIN is locked".into()), true),
        Problem::PinFinalTry => (DownReason::Pin("one more wrong PIN would lock the token".into()), true),
        Problem::Call { function, ckr } => (DownReason::Call(format!("{function} returned {ckr}")), true),
        other => (DownReason::Call(other.code().into()), true),
    }
}
