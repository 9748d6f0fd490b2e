//! Owns the memory of PINs that a token refused: each is tried once, by all workers together, because a token locks after few.
//! Must not know logins. Runs where logins are, under the login lock.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use aws_lc_rs::hmac;

use super::ckr::Ckr;

/// One token's PIN.
pub struct Pin<'a> {
    pub module: &'a Path,
    pub serial: &'a str,
    pub pin: &'a [u8],
}

/// For the life of the process. Digests only; bounded, because every entry is a refusal.
static REFUSED: Mutex<Vec<Refused>> = Mutex::new(Vec::new());
const REFUSED_MAX: usize = 256;

struct Refused {
    pin: [u8; 32],
    ckr: Ckr,
    /// What siblings see; none when a sibling was refused.
    _mark: Option<File>,
}

/// What the digests are made with: whoever does not know it cannot guess PINs by them.
static SECRET: OnceLock<[u8; 32]> = OnceLock::new();

/// Makes this process one of those that tell each other which PINs were refused, and tells it what was `known` before it was
/// there. To be called before the first login; without it a process is alone.
pub fn share(secret: [u8; 32], known: impl IntoIterator<Item = ([u8; 32], Ckr)>) {
    // A second secret would make strangers of siblings.
    if SECRET.set(secret).is_ok() {
        let mut refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
        known.into_iter().for_each(|(pin, ckr)| remember(&mut refused, Refused { pin, ckr, _mark: None }));
    }
}

/// What this process knows, for those that come after it: digests under the secret.
pub fn known() -> Vec<([u8; 32], Ckr)> {
    let refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
    refused.iter().map(|known| (known.pin, known.ckr)).collect()
}

impl Pin<'_> {
    /// With what it was refused, here or in a sibling. To be asked before each login, also by others than lanes.
    pub fn refused_before(&self) -> Option<Ckr> {
        let ckr = self.would_be_refused()?;
        let pin = self.digest();
        let mut refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
        if !refused.iter().any(|known| known.pin == pin) {
            // For when the sibling is no more.
            remember(&mut refused, Refused { pin, ckr, _mark: None });
        }
        Some(ckr)
    }

    /// The same, of somebody who does not want to log in now, and is not held to the answer.
    pub fn would_be_refused(&self) -> Option<Ckr> {
        let pin = self.digest();
        let refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = refused.iter().find(|known| known.pin == pin) {
            return Some(known.ckr);
        }
        // Without the file there is no module either: whoever logs in finds out.
        self.marked().ok()?
    }

    pub fn refused(&self, ckr: Ckr) {
        let mut refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
        remember(&mut refused, Refused { pin: self.digest(), ckr, _mark: self.mark(ckr).ok() });
    }

    /// It may have been wrong before; the token has changed its mind.
    pub fn accepted(&self) {
        let pin = self.digest();
        REFUSED.lock().unwrap_or_else(PoisonError::into_inner).retain(|known| known.pin != pin);
    }

    /// The mark is a read lock on bytes of the module file far beyond its end, as many as the return code says. It needs no file
    /// that somebody would have to name or clean up, and ends with the process. Everybody can see where it is, in /proc/locks;
    /// that says nothing to those who do not know the secret.
    fn mark(&self, ckr: Ckr) -> io::Result<File> {
        if SECRET.get().is_none() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let file = File::open(self.module)?;
        self.lock(&file, libc::F_OFD_SETLK, libc::F_RDLCK, ckr.0 as libc::off_t)?;
        Ok(file)
    }

    fn marked(&self) -> io::Result<Option<Ckr>> {
        if SECRET.get().is_none() {
            return Ok(None);
        }
        let file = File::open(self.module)?;
        let found = self.lock(&file, libc::F_OFD_GETLK, libc::F_WRLCK, 1)?;
        Ok((i32::from(found.l_type) != libc::F_UNLCK).then_some(Ckr(found.l_len as u64)))
    }

    fn lock(&self, file: &File, command: i32, kind: i32, bytes: libc::off_t) -> io::Result<libc::flock> {
        // SAFETY: a plain C struct, of which zero is a value; `l_pid` must be zero (fcntl(2), open file description locks).
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        lock.l_start = self.place();
        lock.l_len = bytes;
        // SAFETY: `lock` lives through the call, and `file` keeps the descriptor open.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
            0 => Ok(lock),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn place(&self) -> libc::off_t {
        let digest = self.digest();
        let mut place = [0; 8];
        place.copy_from_slice(&digest[..8]);
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

fn remember(refused: &mut Vec<Refused>, entry: Refused) {
    if refused.len() >= REFUSED_MAX {
        refused.remove(0);
    }
    refused.push(entry);
}
