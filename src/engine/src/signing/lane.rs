//! Owns one lane: a thread with one PKCS#11 session, the ladder of repairs, and the decision what is verified.
//! Must not know who waits for a signature or why. Everything here runs on the lane's own thread, where the module may
//! block for as long as it likes.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::ckr::{Ckr, Repair, Rung};
use super::desk::{DownReason, Job, Probed, Seat, Work};
use super::login::LoginFault;
use super::pace::jittered;
use super::pkcs11::{ResetFault, Session};
use super::public_key::KeyAlgorithm;
use super::queue::{Class, Request};
use super::token::Token;
use super::token_error::Problem;
use super::token_key::{Fault, TokenKey};
use super::{SignError, Signed};

/// The life of a lane, until the token stops or another one has taken its place.
pub(super) fn run(token: &Arc<Token>, number: usize) {
    let _ended = Ended(token, number);
    let mut lane = Lane { token, session: None, proofs: HashMap::new() };
    // Before the first job, so that a token that allows fewer PKCS#11 sessions shrinks the pool and fails nobody.
    if let Err(Ckr::SESSION_COUNT) = lane.session()
        && token.desk().shrink()
    {
        return;
    }
    let seat = Seat::new(number);
    while let Some(work) = token.desk().next(&seat) {
        match work {
            Work::Sign(class, job) => lane.answer(class, job),
            Work::Probe(suspect) => token.desk().probed(number, lane.probe(suspect.as_ref())),
        }
    }
}

/// Counts the lane out also when it panics; the last one out lets go of the token.
struct Ended<'a>(&'a Token, usize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if self.0.desk().lane_ended(self.1) {
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

/// Why a lane gives up on a request.
enum Trouble {
    /// It is to blame.
    Request(SignError),
    /// The token is, or its module.
    Token(Ckr),
    /// The key was there; perhaps only the module has lost sight of it.
    KeyMissing,
}

impl From<SignError> for Trouble {
    fn from(error: SignError) -> Trouble {
        Trouble::Request(error)
    }
}

/// Keys come and go with reloads; forgetting them all costs one verification each.
const PROOFS_MAX: usize = 4096;

const RETRY_PAUSE: Duration = Duration::from_millis(4);
/// A login that is to come later than that is left to a probe; meanwhile the token is being mended.
const LOGIN_WAIT_MAX: Duration = Duration::from_millis(50);

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
        let result = match self.sign(&job) {
            Ok(signature) => Ok(signature),
            Err(Trouble::Request(error)) => Err(error),
            Err(trouble) => {
                let name = &job.key.name;
                let (reason, error) = match trouble {
                    Trouble::Token(ckr) => {
                        (format!("signing with key {name} returned {ckr}"), SignError::Failed(ckr))
                    }
                    _ => (format!("its module does not show key {name} any more"), SignError::KeyLost),
                };
                let (reason, suspect) = (DownReason::Call(reason), Arc::downgrade(&job.key));
                if !job.has_failed {
                    return self.token.desk().mend(reason, &suspect, Some((class, job)));
                }
                self.token.desk().mend(reason, &suspect, None);
                Err(error)
            }
        };
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
        self.token.took(class, signing);
        let token = self.token.name().clone();
        // The caller may have gone away while the token was busy.
        let _ = job.reply.send(result.map(|signature| Signed { signature, waited, signing, token }));
    }

    fn sign(&mut self, job: &Job) -> Result<Vec<u8>, Trouble> {
        let mut tried = Tried::default();
        loop {
            let (epoch, incarnation) = (self.token.epoch(), self.token.incarnation());
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
                // Nobody waits: whoever is next finds out what helps, in a PKCS#11 session without a past.
                Fault::Call(ckr) if job.is_cancelled() => {
                    self.close_session(ckr);
                    return Err(SignError::Failed(ckr).into());
                }
                // Another token had the module initialised again under this request: it begins anew, and so rarely that it ends.
                Fault::Call(_) if self.token.incarnation() != incarnation => tried = Tried::default(),
                Fault::Call(ckr) => self.repair(ckr, epoch, &mut tried, &job.key)?,
                Fault::KeyMissing if !job.has_failed && self.token.may_search_anew() => {
                    return Err(Trouble::KeyMissing);
                }
                // Other keys of the token are not concerned.
                Fault::KeyMissing | Fault::KeyAmbiguous => return Err(SignError::KeyLost.into()),
                Fault::Wrong(_) if job.key.is_doubted() => {
                    job.key.doubt();
                    return Err(SignError::Wrong.into());
                }
                Fault::Unfit(_) if job.key.is_doubted() => {
                    job.key.doubt();
                    return Err(SignError::KeyLost.into());
                }
                Fault::Unfit(problem) => {
                    self.down(unfit(&job.key, &problem), &job.key, true);
                    return Err(SignError::KeyLost.into());
                }
                Fault::Wrong(wrong) => {
                    self.token.distrust_handles();
                    self.down(DownReason::WrongSignature(wrong.0), &job.key, true);
                    return Err(SignError::Wrong.into());
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
        if !job.key.is_proved() {
            job.key.prove_fit(session, found).map_err(|fault| (fault, stale))?;
        }
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
    ) -> Result<(), Trouble> {
        let rung = match ckr.repair() {
            // Two in a row: a new PKCS#11 session may reach another device behind the same slot.
            Repair::Retry if tried.retry => Repair::Reopen,
            rung => rung,
        };
        match rung {
            Repair::Retry => {
                tried.retry = true;
                // A token that is busy is not helped by more of the same at once.
                thread::sleep(jittered(RETRY_PAUSE));
            }
            Repair::Reopen if !tried.reopen => {
                tried.reopen = true;
                self.close_session(ckr);
                self.token.stats().reopened.add(1);
            }
            Repair::Relogin if !tried.relogin => {
                tried.relogin = true;
                match self.token.login_again(epoch, None) {
                    Ok(()) => {}
                    Err(LoginFault::TooSoon(at)) if at <= Instant::now() + LOGIN_WAIT_MAX => {
                        tried.relogin = false;
                        thread::sleep(at.saturating_duration_since(Instant::now()));
                    }
                    Err(LoginFault::Problem(problem)) if problem.is_pin() => {
                        let (reason, probe) = pin_trouble(&problem);
                        self.down(reason, key, probe);
                        return Err(SignError::Failed(problem.ckr().unwrap_or(ckr)).into());
                    }
                    Err(_) => return Err(Trouble::Token(ckr)),
                }
            }
            Repair::Refind if !tried.refind => tried.refind = true,
            Repair::Hopeless => return Err(SignError::Failed(ckr).into()),
            Repair::Reinitialize => return Err(Trouble::Token(ckr)),
            Repair::PinRefused => {
                let what = format!("signing with key {} returned {ckr}", key.name);
                self.down(DownReason::Call(what), key, true);
                return Err(SignError::Failed(ckr).into());
            }
            // What is said of a device that is gone in so many words is not said of one request.
            Repair::Reopen | Repair::Relogin | Repair::Refind => {
                return match ckr == Ckr::DEVICE_ERROR || self.token.signature_failed() {
                    true => Err(Trouble::Token(ckr)),
                    false => Err(SignError::Failed(ckr).into()),
                };
            }
        }
        Ok(())
    }

    /// Tries the whole way to a signature from the start: as things are, after another login, after another C_Initialize.
    fn probe(&mut self, suspect: Option<&Arc<TokenKey>>) -> Probed {
        let keys = self.token.keys_in_use(suspect);
        let (key, witnesses) =
            keys.split_first().map_or((None, &[][..]), |(key, others)| (Some(key), others));
        let mut ended_with = Ckr::OK;
        let mut fault = None;
        // In better words than the return code that stands for it.
        let mut not_logged_in = None;
        for rung in [None, Some(Rung::Login), Some(Rung::Reset)] {
            if let Some(rung) = rung {
                let is_key = match fault {
                    Some(Fault::Call(ckr)) if ckr.is_helped_by(rung) => {
                        ended_with = ckr;
                        false
                    }
                    Some(Fault::Call(_) | Fault::KeyMissing) if rung == Rung::Login => continue,
                    Some(Fault::KeyMissing) => true,
                    _ => break,
                };
                if rung == Rung::Reset && !self.token.may_reset(is_key) {
                    break;
                }
            }
            self.close_session(ended_with);
            let (epoch, incarnation) = (self.token.epoch(), self.token.incarnation());
            let reset = (rung == Some(Rung::Reset)).then_some(incarnation);
            if rung.is_some()
                && let Err(failed) = self.token.login_again(epoch, reset)
            {
                match failed {
                    LoginFault::Problem(problem) if problem.is_pin() => {
                        return match pin_trouble(&problem) {
                            (reason, true) => Probed::Still(reason, None),
                            (reason, false) => Probed::Never(reason),
                        };
                    }
                    // It waits for somebody else; nothing is wrong with the module.
                    LoginFault::Problem(problem @ Problem::LoginUnanswered) => {
                        return Probed::Still(login_trouble(&problem), None);
                    }
                    // The module may have to be initialised again for that, too.
                    LoginFault::Problem(problem) if reset.is_none() => {
                        not_logged_in = Some(login_trouble(&problem));
                        fault = Some(Fault::Call(problem.ckr().unwrap_or(Ckr::TOKEN_NOT_PRESENT)));
                        continue;
                    }
                    LoginFault::Problem(problem) => return Probed::Still(login_trouble(&problem), None),
                    LoginFault::TooSoon(at) | LoginFault::NotReset(ResetFault::TooSoon(at)) => {
                        return Probed::Still(not_logged_in.unwrap_or(probe_trouble(fault)), Some(at));
                    }
                    LoginFault::NotReset(ResetFault::ThreadsInside(_)) => {
                        return Probed::Still(not_logged_in.unwrap_or(probe_trouble(fault)), None);
                    }
                    LoginFault::NotReset(ResetFault::Call { function, ckr }) => {
                        return Probed::Still(DownReason::Call(format!("{function} returned {ckr}")), None);
                    }
                }
            }
            match self.try_probe(key) {
                Ok(()) => {
                    self.token.signature_succeeded();
                    return Probed::Up;
                }
                Err(failed) => (fault, not_logged_in) = (Some(failed), None),
            }
        }
        self.close_session(ended_with);
        let has_no_key = matches!(fault, Some(Fault::KeyMissing | Fault::KeyAmbiguous));
        let is_doubtful = matches!(fault, Some(Fault::Wrong(_) | Fault::Unfit(_)));
        if (has_no_key || is_doubtful)
            && witnesses.iter().any(|witness| self.try_probe(Some(witness)).is_ok())
        {
            // The token does well, and its other keys must not wait for this one.
            if let Some(key) = key.filter(|_| is_doubtful) {
                key.doubt();
            }
            return Probed::Up;
        }
        let reason = match (key, &fault, not_logged_in) {
            (_, _, Some(reason)) => reason,
            (Some(key), Some(Fault::Unfit(problem)), _) => unfit(key, problem),
            _ => probe_trouble(fault),
        };
        if has_no_key { Probed::Keyless(reason) } else { Probed::Still(reason, None) }
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
        match key.is_proved() {
            true => key.prove(session, found),
            false => key.prove_fit(session, found),
        }
    }

    fn session(&mut self) -> Result<&Session, Ckr> {
        let incarnation = self.token.incarnation();
        if self.session.as_ref().is_some_and(|session| session.incarnation() != incarnation) {
            self.close_session(Ckr::SESSION_HANDLE_INVALID);
        }
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

/// Why the token is down for its PIN, and whether looking again may help. It may when somebody else can change the answer
/// without us presenting the PIN: the flags are read before each try.
fn pin_trouble(problem: &Problem) -> (DownReason, bool) {
    match problem {
        Problem::PinRefused(ckr) => (DownReason::Pin(format!("C_Login returned {ckr}")), false),
        Problem::PinLocked => (DownReason::Pin("the PIN is locked".into()), true),
        _ => (DownReason::Pin("one more wrong PIN would lock the token".into()), true),
    }
}

fn login_trouble(problem: &Problem) -> DownReason {
    DownReason::Call(match problem {
        Problem::TokenMissing { .. } => "its module shows no such token".into(),
        other => other.to_string(),
    })
}

fn unfit(key: &TokenKey, problem: &Problem) -> DownReason {
    DownReason::Call(format!("key {}: {problem}", key.name))
}

fn probe_trouble(fault: Option<Fault>) -> DownReason {
    match fault {
        Some(Fault::Call(ckr)) => DownReason::Call(format!("a probe got {ckr}")),
        Some(Fault::Wrong(wrong)) => DownReason::WrongSignature(wrong.0),
        _ => DownReason::Call("a probe did not find its private key".into()),
    }
}
