//! Owns what is known of PINs that were presented: which a token refused, and which it has not answered yet. A wrong one is tried
//! once, by all workers together, because a token locks after few. Must not know logins. Runs where logins are.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::hmac;

use super::ckr::Ckr;
use super::login_lock::{HELD_MAX, Held};

/// One token's PIN.
pub struct Pin<'a> {
    pub module: &'a Path,
    pub serial: &'a str,
    pub pin: &'a [u8],
}

/// For the life of the process. Digests only; bounded, because every entry is a refusal.
static REFUSED: Mutex<Vec<Refused>> = Mutex::new(Vec::new());
const KNOWN_MAX: usize = 256;

struct Refused {
    pin: [u8; 32],
    ckr: Ckr,
    /// What siblings see; none when a sibling was refused.
    _mark: Option<File>,
}

/// PINs that were right when they were presented last, by this process.
static ACCEPTED: Mutex<Vec<[u8; 32]>> = Mutex::new(Vec::new());

/// Of this process; one for each token that it is logging in to.
static PRESENTED: Mutex<Vec<Presented>> = Mutex::new(Vec::new());

/// A PIN that was sent, and of which nobody knows yet whether it is right.
struct Presented {
    pin: [u8; 32],
    /// From then on others may try it.
    until: Instant,
    /// What siblings see.
    mark: Option<Held>,
}

/// A call that has not returned for so long went to a token that is gone: the process that takes the place of this one may try.
/// A PIN that was right is tried as soon as the login lock is free.
pub const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Why a PIN must not be sent now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// With what.
    Refused(Ckr),
    /// It was sent a moment ago, here or by a sibling, or nobody can be asked whether it was.
    Unanswered,
}

/// What the digests are made with: whoever does not know it cannot guess PINs by them.
static SECRET: OnceLock<[u8; 32]> = OnceLock::new();

/// Makes this process one of those that tell each other which PINs were refused, and tells it what was `known` before it was
/// there. To be called before the first login; without it a process is alone.
pub fn share(secret: [u8; 32], known: impl IntoIterator<Item = ([u8; 32], Ckr)>) {
    // A second secret would make strangers of siblings.
    if SECRET.set(secret).is_ok() {
        let mut refused = lock(&REFUSED);
        known.into_iter().for_each(|(pin, ckr)| remember(&mut refused, Refused { pin, ckr, _mark: None }));
    }
}

/// What this process knows, for those that come after it: digests under the secret.
pub fn known() -> Vec<([u8; 32], Ckr)> {
    let refused = lock(&REFUSED);
    refused.iter().map(|known| (known.pin, known.ckr)).collect()
}

impl Pin<'_> {
    /// To be called before each C_Login, also by others than lanes, and followed by `answered`.
    pub fn present(&self) -> Result<(), Obstacle> {
        let pin = self.digest();
        let wait = if lock(&ACCEPTED).contains(&pin) { HELD_MAX } else { ANSWER_MAX };
        let mut presented = lock(&PRESENTED);
        presented.retain(|earlier| earlier.until > Instant::now());
        if presented.iter().any(|earlier| earlier.pin == pin) {
            return Err(Obstacle::Unanswered);
        }
        presented.push(Presented { pin, until: Instant::now() + wait, mark: None });
        // Others need not wait for the file.
        drop(presented);
        match self.mark_presented(wait) {
            Ok(mark) => {
                let mut presented = lock(&PRESENTED);
                if let Some(own) = presented.iter_mut().find(|earlier| earlier.pin == pin) {
                    own.mark = mark;
                }
                Ok(())
            }
            Err(obstacle) => {
                lock(&PRESENTED).retain(|earlier| earlier.pin != pin);
                Err(obstacle)
            }
        }
    }

    fn mark_presented(&self, wait: Duration) -> Result<Option<Held>, Obstacle> {
        let mark = match self.mark(Mark::Presented, 1) {
            // First the mark, then the look: of two at once, at most one goes on.
            Ok(file) if self.marked(Mark::Presented, &file).is_some() => return Err(Obstacle::Unanswered),
            Ok(file) => Some(Held::at_most(file, wait)),
            // Nobody to tell.
            Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::NotFound) => {
                None
            }
            // As out of descriptors.
            Err(_) => return Err(Obstacle::Unanswered),
        };
        // After that look: who was refused meanwhile had said so before its mark of a presented one was gone.
        let Some(ckr) = self.refused_with() else { return Ok(mark) };
        let pin = self.digest();
        let mut refused = lock(&REFUSED);
        if !refused.iter().any(|known| known.pin == pin) {
            // For when the sibling is no more.
            remember(&mut refused, Refused { pin, ckr, _mark: None });
        }
        Err(Obstacle::Refused(ckr))
    }

    /// What C_Login returned; `None` where it was not called.
    pub fn answered(&self, ckr: Option<Ckr>) {
        let pin = self.digest();
        match ckr {
            // It may have been wrong before; the token has changed its mind.
            Some(Ckr::OK) => {
                lock(&REFUSED).retain(|known| known.pin != pin);
                let mut accepted = lock(&ACCEPTED);
                accepted.retain(|known| *known != pin);
                accepted.truncate(KNOWN_MAX - 1);
                accepted.push(pin);
            }
            Some(ckr) if ckr.blames_pin() => {
                lock(&ACCEPTED).retain(|known| *known != pin);
                let mark = self.mark(Mark::Refused, ckr.0).ok();
                remember(&mut lock(&REFUSED), Refused { pin, ckr, _mark: mark });
            }
            _ => {}
        }
        // Last: whoever finds it gone is to find the other mark.
        lock(&PRESENTED).retain(|earlier| earlier.pin != pin);
    }

    /// What `present` would say now, of somebody who does not want to log in yet.
    pub fn obstacle(&self) -> Option<Obstacle> {
        if let Some(ckr) = self.refused_with() {
            return Some(Obstacle::Refused(ckr));
        }
        let pin = self.digest();
        let now = Instant::now();
        let is_presented = lock(&PRESENTED).iter().any(|earlier| earlier.pin == pin && earlier.until > now)
            || File::open(self.module).is_ok_and(|file| self.marked(Mark::Presented, &file).is_some());
        is_presented.then_some(Obstacle::Unanswered)
    }

    /// Here or in a sibling.
    fn refused_with(&self) -> Option<Ckr> {
        let pin = self.digest();
        if let Some(known) = lock(&REFUSED).iter().find(|known| known.pin == pin) {
            return Some(known.ckr);
        }
        self.marked(Mark::Refused, &File::open(self.module).ok()?)
    }

    /// A mark is a read lock on bytes of the module file far beyond its end, as many as the return code says. It needs no file
    /// that somebody would have to name or clean up, and ends with the process. Everybody can see where it is, in /proc/locks;
    /// that says nothing to those who do not know the secret.
    fn mark(&self, mark: Mark, bytes: u64) -> io::Result<File> {
        if SECRET.get().is_none() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let file = File::open(self.module)?;
        self.lock_bytes(&file, mark, libc::F_OFD_SETLK, libc::F_RDLCK, bytes as libc::off_t)?;
        Ok(file)
    }

    /// How many bytes somebody else than `file` has marked.
    fn marked(&self, mark: Mark, file: &File) -> Option<Ckr> {
        SECRET.get()?;
        let found = self.lock_bytes(file, mark, libc::F_OFD_GETLK, libc::F_WRLCK, 1).ok()?;
        (i32::from(found.l_type) != libc::F_UNLCK).then_some(Ckr(found.l_len as u64))
    }

    fn lock_bytes(
        &self,
        file: &File,
        mark: Mark,
        command: i32,
        kind: i32,
        bytes: libc::off_t,
    ) -> io::Result<libc::flock> {
        // SAFETY: a plain C struct, of which zero is a value; `l_pid` must be zero (fcntl(2), open file description locks).
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        lock.l_start = self.place(mark);
        lock.l_len = bytes;
        // SAFETY: `lock` lives through the call, and `file` keeps the descriptor open.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
            0 => Ok(lock),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn place(&self, mark: Mark) -> libc::off_t {
        let digest = self.digest();
        let mut place = [0; 8];
        place.copy_from_slice(match mark {
            Mark::Refused => &digest[..8],
            Mark::Presented => &digest[8..16],
        });
        // Beyond the end of any file, and with room behind it.
        (i64::from_be_bytes(place) & (i64::MAX >> 1)) | (1 << 60)
    }

    fn digest(&self) -> [u8; 32] {
        // Who is alone keeps the digests to itself.
        let secret = SECRET.get().copied().unwrap_or_default();
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &secret));
        for part in [self.module.as_os_str().as_encoded_bytes(), self.serial.as_bytes(), self.pin] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(context.sign().as_ref());
        digest
    }
}

/// What siblings see of a PIN.
#[derive(Clone, Copy)]
enum Mark {
    Refused,
    Presented,
}

fn lock<T>(memory: &Mutex<T>) -> MutexGuard<'_, T> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remember(refused: &mut Vec<Refused>, entry: Refused) {
    if refused.len() >= KNOWN_MAX {
        refused.remove(0);
    }
    refused.push(entry);
}
