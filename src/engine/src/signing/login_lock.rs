//! Owns the lock that keeps logins of different processes apart. Must not know PKCS#11: it is about one file.
//! Taken on the thread that starts a token or logs in again; never on the I/O thread, because it may wait.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Held from C_Initialize to C_Login by every process that shares a module. SoftHSM 2.6.1 rewrites its token file in
/// C_Login and flushes it after it has unlocked it: another process then reads an empty file ("token not recognized").
///
/// The lock is `flock` on the module file itself: every process of the host that can load the module can open it,
/// and no lock file has to be named, created or cleaned up. It is advisory and ends with the process.
/// Two locks on one module exclude each other also within a process: never acquire one while holding one.
///
/// Whoever hangs inside the module does not keep it for longer than `HELD_MAX`: the process that takes its place logs in to
/// the same token.
#[derive(Debug)]
pub struct LoginLock {
    _module: Held,
}

/// Longer than a login and a search take, and not longer than others wait by default.
pub const HELD_MAX: Duration = Duration::from_secs(10);

impl LoginLock {
    /// Waits for at most `wait`. Errors: `TimedOut` when another process still holds the lock (the caller may go on,
    /// and should say so), else what opening or locking the file gave.
    pub fn acquire(module: &Path, wait: Duration) -> io::Result<LoginLock> {
        let give_up = Instant::now() + wait;
        let file = File::open(module)?;
        let mut pause = PAUSE_MIN;
        loop {
            if try_lock(&file)? {
                return Ok(LoginLock { _module: Held::at_most(file, HELD_MAX) });
            }
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("another process has held the login lock on {} for {wait:?}", module.display()),
                ));
            }
            // Polled, because a blocking flock has no deadline. A login takes milliseconds.
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// A locked file, until this is dropped or its time is over.
#[derive(Debug)]
pub struct Held {
    /// Closing the only descriptor of this open file description releases the lock.
    file: Arc<Mutex<Option<File>>>,
    /// Ends the thread that watches over the time.
    _dropped: Sender<()>,
}

impl Held {
    pub fn at_most(file: File, time: Duration) -> Held {
        let file = Arc::new(Mutex::new(Some(file)));
        let (_dropped, dropped) = channel::<()>();
        let watched = file.clone();
        let watch = move || {
            if dropped.recv_timeout(time) == Err(RecvTimeoutError::Timeout) {
                close(&watched);
            }
        };
        // Out of threads, nobody watches, and only whoever has it ends it.
        let _ = thread::Builder::new().name("lock-watch".into()).spawn(watch);
        Held { file, _dropped }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        close(&self.file);
    }
}

fn close(file: &Mutex<Option<File>>) {
    *file.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

const PAUSE_MIN: Duration = Duration::from_micros(500);
const PAUSE_MAX: Duration = Duration::from_millis(10);

fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: flock takes a descriptor and touches no memory; `file` keeps the descriptor open.
    let status = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    if status == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
        _ => Err(error),
    }
}
