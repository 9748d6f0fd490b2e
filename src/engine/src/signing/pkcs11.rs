//! Owns every call into a PKCS#11 module: loading it, its life, PKCS#11 sessions, and who is inside it.
//! Must not know tokens' labels, recovery or TLS: it reports a `Ckr` and the caller decides.
//! Runs on lanes and on the thread that starts or stops a token; never on the I/O thread, because any call may hang.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_void};
use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cryptoki_sys as sys;
use cryptoki_sys::{CK_ATTRIBUTE, CK_MECHANISM, CK_OBJECT_HANDLE, CK_SESSION_HANDLE, CK_SLOT_ID, CK_ULONG};

use super::ckr::Ckr;
use super::pace::Pace;
use crate::process::guard_exit;

/// A loaded module. One per file and process, for the life of the process: vendors' libraries leave threads and
/// exit handlers behind, so it is never unloaded.
///
/// ```text
///  closed ──initialize──> open ──last release──> closed
///                         │  ^
///          reinitialize   v  │   refused when a thread does not leave in time
///                        resetting: nobody enters, and who is inside is waited for
/// ```
pub struct Module {
    path: PathBuf,
    functions: &'static sys::CK_FUNCTION_LIST,
    /// How many threads are inside, and the bits `CLOSED` and `RESETTING`. C_Finalize closes the gate only when it counts
    /// nobody: finalising under a running call crashes the process.
    gate: AtomicU64,
    /// Counts C_Initialize. What was opened or found in another one means nothing, or something else, in this one.
    incarnation: AtomicU64,
    life: Mutex<Life>,
    /// A change of `life` has ended, the gate has opened, or the last one has left a gate that is to close.
    changed: Condvar,
}

#[derive(Default)]
struct Life {
    /// Tokens that called `initialize` and not yet `release`.
    users: usize,
    /// C_Initialize was ours, so C_Finalize is. Otherwise it belongs to whoever was first (graphene, say).
    ours: bool,
    /// For the rest of the process' life.
    exit_guarded: bool,
    /// A thread is about to call C_Initialize or C_Finalize, without the mutex: either may hang.
    changing: bool,
    /// Of resets, whichever tokens of the module want them.
    resets: Pace,
}

/// How long those inside are waited for before a reset is given up; others wait outside meanwhile.
const RESET_WAIT: Duration = Duration::from_millis(500);
/// How long somebody waits for a change of the module's life before it goes away with an error.
const CHANGE_WAIT: Duration = Duration::from_secs(5);

const CLOSED: u64 = 1 << 63;
const RESETTING: u64 = 1 << 62;

/// Why a module was not initialised again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetFault {
    /// It was done a moment ago; not again before this.
    TooSoon(Instant),
    /// So many threads are inside and do not come out; C_Finalize would crash the process.
    ThreadsInside(usize),
    Call {
        function: &'static str,
        ckr: Ckr,
    },
}

/// What became of the module when a user let go of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    Finalized,
    /// The token was away all the time, and its module never needed.
    NotEntered,
    /// Another token of this process uses the same module.
    StillUsed,
    /// Somebody else in this process initialised it and will finalise it.
    LeftToOthers,
    /// C_Finalize was not called, because so many threads are inside.
    ThreadsInside(usize),
    /// C_Finalize was called and failed.
    Failed(Ckr),
}

/// Why a module could not be loaded.
#[derive(Debug)]
pub struct LoadError {
    pub path: PathBuf,
    pub reason: String,
}

/// How many threads of this process are inside a PKCS#11 call, all modules together. Lock-free and callable from an
/// exit handler: while it is not zero, running the modules' destructors crashes the process.
pub fn threads_in_modules() -> usize {
    THREADS_IN_MODULES.load(Ordering::SeqCst)
}

static THREADS_IN_MODULES: AtomicUsize = AtomicUsize::new(0);

/// Every module ever loaded, by the handle of the dynamic linker: two names of one file are one module.
static LOADED: Mutex<Vec<(usize, Arc<Module>)>> = Mutex::new(Vec::new());

impl Module {
    /// Loads the module, or returns it when it is loaded already. `path` must be absolute: the login lock needs the
    /// file, and a search path would let the environment choose the code that sees the PIN.
    ///
    /// `isolate` binds the module to its own libraries before those of the process (RTLD_DEEPBIND): in Node, SoftHSM
    /// would otherwise run on Node's OpenSSL. Switch it off under sanitizers and preloaded allocators.
    pub fn load(path: &Path, isolate: bool) -> Result<Arc<Module>, LoadError> {
        let failed = |reason: String| LoadError { path: path.to_owned(), reason };
        if !path.is_absolute() {
            return Err(failed("expected an absolute path".into()));
        }
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| failed("the path contains a zero byte".into()))?;
        // RTLD_NODELETE: pkcs11js closes its own handle when a JavaScript object is collected.
        let deepbind = if isolate { libc::RTLD_DEEPBIND } else { 0 };
        let flags = libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NODELETE | deepbind;

        let mut loaded = lock(&LOADED);
        // SAFETY: `name` is a C string that outlives the call. The module's constructors run here; running them is
        // what loading a module that the operator configured means.
        let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
        if handle.is_null() {
            return Err(failed(dynamic_linker_error()));
        }
        if let Some((_, module)) = loaded.iter().find(|(known, _)| *known == handle as usize) {
            return Ok(module.clone());
        }
        let module = Arc::new(Module {
            path: path.to_owned(),
            functions: function_list(handle).map_err(failed)?,
            gate: AtomicU64::new(CLOSED),
            incarnation: AtomicU64::new(0),
            life: Mutex::default(),
            changed: Condvar::new(),
        });
        loaded.push((handle as usize, module.clone()));
        Ok(module)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which C_Initialize holds.
    pub fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Acquire)
    }

    /// C_Initialize with CKF_OS_LOCKING_OK (PKCS#11 v3.0 5.4); without the flag SoftHSM uses no locks at all.
    /// An already initialised module is fine. Pair each success with one `release`.
    pub fn initialize(&self) -> Result<(), Ckr> {
        let mut change = self.change(CHANGE_WAIT).ok_or(Ckr::FUNCTION_FAILED)?;
        if change.life().users == 0 {
            self.call_initialize()?;
            change.open();
        }
        change.life().users += 1;
        Ok(())
    }

    /// Ends one user's interest; the last one finalises the module, if it is ours and nobody is inside.
    pub fn release(&self) -> Release {
        let Some(mut change) = self.change(CHANGE_WAIT) else {
            lock(&self.life).users -= 1;
            return Release::ThreadsInside(self.inside());
        };
        let mut life = change.life();
        life.users = life.users.saturating_sub(1);
        if life.users > 0 {
            return Release::StillUsed;
        }
        if !life.ours {
            return Release::LeftToOthers;
        }
        if self.gate.compare_exchange(0, CLOSED, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return Release::ThreadsInside(self.inside());
        }
        life.ours = false;
        drop(life);
        match self.call_finalize() {
            Ok(()) => Release::Finalized,
            Err(ckr) => Release::Failed(ckr),
        }
    }

    /// C_Finalize and C_Initialize, once for all who ask for another than `incarnation`. The caller holds the login lock,
    /// finds its slot again and logs in again; so does everybody else who is told that a session is unknown.
    pub fn reinitialize(&self, incarnation: u64) -> Result<(), ResetFault> {
        let mut change = self.change(CHANGE_WAIT).ok_or(ResetFault::ThreadsInside(self.inside()))?;
        if self.incarnation() != incarnation {
            return Ok(());
        }
        change.life().resets.may_begin().map_err(ResetFault::TooSoon)?;
        // Also one that fails: everybody waits outside for as long as it is tried.
        change.life().resets.begin();
        let was_open = change.close(RESET_WAIT).map_err(ResetFault::ThreadsInside)?;
        let call = |function| move |ckr| ResetFault::Call { function, ckr };
        match if was_open { self.call_finalize() } else { Ok(()) } {
            Ok(()) | Err(Ckr::NOT_INITIALIZED) => {}
            // It may have been done half: nothing of before can be relied on.
            Err(ckr) => {
                change.open();
                return Err(call("C_Finalize")(ckr));
            }
        }
        self.call_initialize().map_err(call("C_Initialize"))?;
        change.open();
        Ok(())
    }

    /// Keeps the module from being initialised again or finalised while somebody else in this process uses it without this
    /// file: graphene, on the JavaScript thread. None: a reset does not end.
    pub fn visit(self: &Arc<Self>) -> Option<Visit> {
        loop {
            let before = self.gate.fetch_add(1, Ordering::AcqRel);
            let visit = Visit(self.clone());
            if before & RESETTING == 0 {
                return Some(visit);
            }
            drop(visit);
            if !self.wait_until_reset() {
                return None;
            }
        }
    }

    fn inside(&self) -> usize {
        (self.gate.load(Ordering::Acquire) & !(CLOSED | RESETTING)) as usize
    }

    /// The right to call C_Initialize and C_Finalize, for one thread at a time.
    fn change(&self, wait: Duration) -> Option<Change<'_>> {
        let (mut life, timeout) = self
            .changed
            .wait_timeout_while(lock(&self.life), wait, |life| life.changing)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return None;
        }
        life.changing = true;
        Some(Change { module: self })
    }

    /// False: it takes too long.
    fn wait_until_reset(&self) -> bool {
        let resetting = |_: &mut Life| self.gate.load(Ordering::Acquire) & RESETTING != 0;
        let waited = self.changed.wait_timeout_while(lock(&self.life), CHANGE_WAIT, resetting);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn call_initialize(&self) -> Result<(), Ckr> {
        let mut arguments = sys::CK_C_INITIALIZE_ARGS {
            CreateMutex: None,
            DestroyMutex: None,
            LockMutex: None,
            UnlockMutex: None,
            flags: sys::CKF_OS_LOCKING_OK,
            pReserved: ptr::null_mut(),
        };
        let initialize = self.functions.C_Initialize.ok_or(Ckr::FUNCTION_NOT_SUPPORTED)?;
        let _inside = Inside::count();
        // SAFETY: the function comes from the module's own list; `arguments` lives through the call.
        match Ckr::check(unsafe { initialize(ptr::from_mut(&mut arguments).cast()) }) {
            Ok(()) => lock(&self.life).ours = true,
            Err(Ckr::ALREADY_INITIALIZED) => {}
            Err(ckr) => return Err(ckr),
        }
        let mut life = lock(&self.life);
        if !life.exit_guarded {
            // Not at load: libraries beneath the module, such as libcrypto, register theirs in C_Initialize.
            guard_exit();
            life.exit_guarded = true;
        }
        Ok(())
    }

    fn call_finalize(&self) -> Result<(), Ckr> {
        let finalize = self.functions.C_Finalize.ok_or(Ckr::FUNCTION_NOT_SUPPORTED)?;
        let _inside = Inside::count();
        // SAFETY: the argument must be NULL (v3.0 5.4); the closed gate proves that no call of ours is running.
        Ckr::check(unsafe { finalize(ptr::null_mut()) })
    }

    /// The slots that hold a token.
    pub fn slots(&self) -> Result<Vec<CK_SLOT_ID>, Ckr> {
        let (list, _inside) = self.enter(self.functions.C_GetSlotList)?;
        let mut slots = vec![0; SLOTS_MAX];
        let mut count = SLOTS_MAX as CK_ULONG;
        // SAFETY: `slots` has room for `count` ids, and both live through the call.
        Ckr::check(unsafe { list(sys::CK_TRUE, slots.as_mut_ptr(), &mut count) })?;
        slots.truncate(count as usize);
        Ok(slots)
    }

    pub fn token_info(&self, slot: CK_SLOT_ID) -> Result<TokenInfo, Ckr> {
        let (get, _inside) = self.enter(self.functions.C_GetTokenInfo)?;
        let mut info = sys::CK_TOKEN_INFO::default();
        // SAFETY: `info` is a CK_TOKEN_INFO that lives through the call.
        Ckr::check(unsafe { get(slot, &mut info) })?;
        Ok(TokenInfo {
            label: unpad(&info.label),
            serial: unpad(&info.serialNumber),
            manufacturer: unpad(&info.manufacturerID),
            model: unpad(&info.model),
            pin_locked: info.flags & sys::CKF_USER_PIN_LOCKED != 0,
            pin_final_try: info.flags & sys::CKF_USER_PIN_FINAL_TRY != 0,
        })
    }

    /// The one way into the module: refused once the gate is closed, counted while inside. Waits outside while the module
    /// is initialised again, which cannot begin as long as anybody is inside.
    fn enter<F>(&self, function: Option<F>) -> Result<(F, Inside<'_>), Ckr> {
        let function = function.ok_or(Ckr::FUNCTION_NOT_SUPPORTED)?;
        loop {
            let mut inside = Inside::count();
            let before = self.gate.fetch_add(1, Ordering::AcqRel);
            inside.module = Some(self);
            if before & (CLOSED | RESETTING) == 0 {
                return Ok((function, inside));
            }
            drop(inside);
            if before & RESETTING == 0 || !self.wait_until_reset() {
                return Err(Ckr::NOT_INITIALIZED);
            }
        }
    }

    /// One has left.
    fn left(&self) {
        let before = self.gate.fetch_sub(1, Ordering::AcqRel);
        if before & RESETTING != 0 {
            // With the mutex: who waits for this must not look just before and sleep just after.
            drop(lock(&self.life));
            self.changed.notify_all();
        }
    }
}

/// One thread's right to change the module's life.
struct Change<'a> {
    module: &'a Module,
}

impl Change<'_> {
    fn life(&mut self) -> MutexGuard<'_, Life> {
        lock(&self.module.life)
    }

    /// Nobody enters any more and nobody is inside; whether the module was initialised until now. `Err`: so many are inside,
    /// and the gate is as it was.
    fn close(&mut self, wait: Duration) -> Result<bool, usize> {
        let Module { gate, changed, .. } = self.module;
        let was_open = gate.fetch_or(RESETTING, Ordering::AcqRel) & CLOSED == 0;
        // Who is turned away counts for a moment, too; but only who came in before can be inside once nobody has been.
        let is_busy = |_: &mut Life| self.module.inside() > 0;
        let waited = changed.wait_timeout_while(lock(&self.module.life), wait, is_busy);
        if !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            return Ok(was_open);
        }
        let inside = self.module.inside();
        gate.fetch_and(!RESETTING, Ordering::AcqRel);
        Err(inside)
    }

    /// Another incarnation.
    fn open(&mut self) {
        self.module.incarnation.fetch_add(1, Ordering::AcqRel);
        self.module.gate.fetch_and(!(CLOSED | RESETTING), Ordering::AcqRel);
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        // A reset that failed half-way leaves the module closed, until the next one opens it. Nobody else changes these bits.
        if self.module.gate.load(Ordering::Acquire) & RESETTING != 0 {
            self.module.gate.fetch_or(CLOSED, Ordering::AcqRel);
            self.module.gate.fetch_and(!RESETTING, Ordering::AcqRel);
        }
        lock(&self.module.life).changing = false;
        self.module.changed.notify_all();
    }
}

/// As long as it lives, the module is not initialised again.
pub struct Visit(Arc<Module>);

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.left();
    }
}

/// More slots than any module here has; a longer list is CKR_BUFFER_TOO_SMALL, an error that says so.
const SLOTS_MAX: usize = 1024;

/// What a token says of itself, padding removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenInfo {
    pub label: String,
    pub serial: String,
    pub manufacturer: String,
    pub model: String,
    pub pin_locked: bool,
    /// The next wrong PIN locks the token.
    pub pin_final_try: bool,
}

/// A thread inside the module, for as long as this lives.
struct Inside<'a> {
    module: Option<&'a Module>,
}

impl Inside<'_> {
    fn count() -> Inside<'static> {
        THREADS_IN_MODULES.fetch_add(1, Ordering::SeqCst);
        Inside { module: None }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if let Some(module) = self.module {
            module.left();
        }
        THREADS_IN_MODULES.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A PKCS#11 session; closed when dropped. `Send`, because a lane may open it elsewhere than it uses it; not `Sync`,
/// because a PKCS#11 session carries one operation at a time (v3.0 5.1) and two threads in it corrupt each other.
pub struct Session {
    module: Arc<Module>,
    /// In another one the handle is unknown, or somebody else's: no call goes through then.
    incarnation: u64,
    handle: CK_SESSION_HANDLE,
    slot: CK_SLOT_ID,
    close_on_drop: bool,
    _not_sync: PhantomData<Cell<()>>,
}

/// How many private keys match, with the only one's handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matches {
    None,
    One(CK_OBJECT_HANDLE),
    Several,
}

/// CKA_ID and CKA_LABEL of a key; empty when it has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyNames {
    pub id: Vec<u8>,
    pub label: Vec<u8>,
}

/// As long as `object` and `id` can be in a PKCS#11 URI of the configuration.
const NAME_BYTES_MAX: usize = 255;

/// The signing mechanisms that TLS needs. All take what the lane has hashed, Eddsa takes the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mechanism {
    Ecdsa,
    RsaPkcs,
    RsaPkcsPss(PssHash),
    Eddsa,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PssHash {
    Sha256,
    Sha384,
    Sha512,
}

impl Session {
    /// A read-only PKCS#11 session; it is logged in when another one of this process on the same token is. `slot` is as of
    /// `incarnation`: in another one nobody is logged in who has not found the slot again.
    pub fn open(module: &Arc<Module>, slot: CK_SLOT_ID, incarnation: u64) -> Result<Session, Ckr> {
        let (open, _inside) = module.enter(module.functions.C_OpenSession)?;
        if module.incarnation() != incarnation {
            return Err(Ckr::USER_NOT_LOGGED_IN);
        }
        let mut handle: CK_SESSION_HANDLE = 0;
        // SAFETY: no callback and so no callback argument; `handle` lives through the call.
        Ckr::check(unsafe { open(slot, sys::CKF_SERIAL_SESSION, ptr::null_mut(), None, &mut handle) })?;
        Ok(Session {
            module: module.clone(),
            incarnation,
            handle,
            slot,
            close_on_drop: true,
            _not_sync: PhantomData,
        })
    }

    pub fn slot(&self) -> CK_SLOT_ID {
        self.slot
    }

    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Into the module in which the session was opened; once that was initialised again, it knows no such session.
    fn enter<F>(&self, function: Option<F>) -> Result<(F, Inside<'_>), Ckr> {
        let entered = self.module.enter(function)?;
        match self.module.incarnation() == self.incarnation {
            true => Ok(entered),
            false => Err(Ckr(sys::CKR_SESSION_HANDLE_INVALID)),
        }
    }

    /// Ends a session that a call failed in. When the module said that it does not know it any more, it is not closed:
    /// its number may belong to a newer session of another lane by now.
    pub fn end_after(mut self, ckr: Ckr) {
        self.close_on_drop = !matches!(ckr.0, sys::CKR_SESSION_HANDLE_INVALID | sys::CKR_SESSION_CLOSED);
    }

    /// C_Login as CKU_USER. Holds for all PKCS#11 sessions of the process on this token.
    pub fn login(&self, pin: &[u8]) -> Result<(), Ckr> {
        let (login, _inside) = self.enter(self.module.functions.C_Login)?;
        // SAFETY: `pin` is readable for its length through the call; the standard makes the module only read it.
        Ckr::check(unsafe {
            login(self.handle, sys::CKU_USER, pin.as_ptr().cast_mut(), pin.len() as CK_ULONG)
        })
    }

    /// Whether the user is logged in, by C_GetSessionInfo; also proves that the PKCS#11 session is alive.
    pub fn is_logged_in(&self) -> Result<bool, Ckr> {
        let (get, _inside) = self.enter(self.module.functions.C_GetSessionInfo)?;
        let mut info = sys::CK_SESSION_INFO::default();
        // SAFETY: `info` is a CK_SESSION_INFO that lives through the call.
        Ckr::check(unsafe { get(self.handle, &mut info) })?;
        Ok(matches!(info.state, sys::CKS_RO_USER_FUNCTIONS | sys::CKS_RW_USER_FUNCTIONS))
    }

    /// The private keys with this CKA_ID and this CKA_LABEL, whichever is given.
    pub fn find_private_keys(&self, id: Option<&[u8]>, label: Option<&str>) -> Result<Matches, Ckr> {
        self.find_keys(sys::CKO_PRIVATE_KEY, id, label)
    }

    /// The same for secret keys.
    pub fn find_secret_keys(&self, id: Option<&[u8]>, label: Option<&str>) -> Result<Matches, Ckr> {
        self.find_keys(sys::CKO_SECRET_KEY, id, label)
    }

    fn find_keys(
        &self,
        class: sys::CK_OBJECT_CLASS,
        id: Option<&[u8]>,
        label: Option<&str>,
    ) -> Result<Matches, Ckr> {
        let mut template = vec![attribute(sys::CKA_CLASS, ptr::from_ref(&class).cast(), size_of_val(&class))];
        template.extend(id.map(|id| attribute(sys::CKA_ID, id.as_ptr().cast(), id.len())));
        template.extend(label.map(|label| attribute(sys::CKA_LABEL, label.as_ptr().cast(), label.len())));
        self.find_start(&mut template)?;
        let found = self.find_some();
        // Also after an error: an unfinished search keeps the PKCS#11 session busy.
        self.find_end()?;
        found
    }

    /// Every private key of the token; None when there are more than `max`.
    pub fn private_keys(&self, max: usize) -> Result<Option<Vec<CK_OBJECT_HANDLE>>, Ckr> {
        let class = sys::CKO_PRIVATE_KEY;
        self.find_start(&mut [attribute(sys::CKA_CLASS, ptr::from_ref(&class).cast(), size_of_val(&class))])?;
        let found = self.find_all(max);
        self.find_end()?;
        found
    }

    /// What the key is called; None when a name is longer than any keygate can be told.
    pub fn key_names(&self, key: CK_OBJECT_HANDLE) -> Result<Option<KeyNames>, Ckr> {
        let (get, _inside) = self.enter(self.module.functions.C_GetAttributeValue)?;
        let (mut id, mut label) = ([0_u8; NAME_BYTES_MAX], [0_u8; NAME_BYTES_MAX]);
        let mut template = [
            attribute(sys::CKA_ID, id.as_mut_ptr().cast(), id.len()),
            attribute(sys::CKA_LABEL, label.as_mut_ptr().cast(), label.len()),
        ];
        // SAFETY: two attributes with room for as many bytes as they say; all live through the call.
        match Ckr::check(unsafe { get(self.handle, key, template.as_mut_ptr(), 2) }) {
            // An attribute that the key does not have comes with a length of -1, and the others are there (v3.0 5.7.5).
            Ok(()) | Err(Ckr(sys::CKR_ATTRIBUTE_TYPE_INVALID)) => {}
            Err(Ckr(sys::CKR_BUFFER_TOO_SMALL)) => return Ok(None),
            Err(ckr) => return Err(ckr),
        }
        let taken = |room: &[u8], attribute: &CK_ATTRIBUTE| match attribute.ulValueLen {
            sys::CK_UNAVAILABLE_INFORMATION => Some(Vec::new()),
            length => room.get(..usize::try_from(length).ok()?).map(<[u8]>::to_vec),
        };
        Ok(taken(&id, &template[0])
            .zip(taken(&label, &template[1]))
            .map(|(id, label)| KeyNames { id, label }))
    }

    /// Whether the token can sign with this mechanism.
    pub fn can_sign(&self, mechanism: sys::CK_MECHANISM_TYPE) -> Result<bool, Ckr> {
        let (get, _inside) = self.enter(self.module.functions.C_GetMechanismInfo)?;
        let mut info = sys::CK_MECHANISM_INFO::default();
        // SAFETY: `info` is a CK_MECHANISM_INFO that lives through the call.
        match Ckr::check(unsafe { get(self.slot, mechanism, &mut info) }) {
            Ok(()) => Ok(info.flags & sys::CKF_SIGN != 0),
            Err(Ckr(sys::CKR_MECHANISM_INVALID)) => Ok(false),
            Err(ckr) => Err(ckr),
        }
    }

    /// Whether an attribute of the key that is a boolean is true; None when the token does not know the attribute.
    pub fn flag(
        &self,
        key: CK_OBJECT_HANDLE,
        attribute: sys::CK_ATTRIBUTE_TYPE,
    ) -> Result<Option<bool>, Ckr> {
        let (get, _inside) = self.enter(self.module.functions.C_GetAttributeValue)?;
        let mut value: sys::CK_BBOOL = sys::CK_FALSE;
        let mut template = [CK_ATTRIBUTE {
            type_: attribute,
            pValue: ptr::from_mut(&mut value).cast(),
            ulValueLen: size_of_val(&value) as CK_ULONG,
        }];
        // SAFETY: one attribute with room for one CK_BBOOL; both live through the call.
        match Ckr::check(unsafe { get(self.handle, key, template.as_mut_ptr(), 1) }) {
            Ok(()) => Ok(Some(value != sys::CK_FALSE)),
            Err(Ckr(sys::CKR_ATTRIBUTE_TYPE_INVALID)) => Ok(None),
            Err(ckr) => Err(ckr),
        }
    }

    /// C_SignInit and C_Sign (v3.0 5.13). `room` must hold the whole signature: asking for its length first would be
    /// one more round trip to a network token. Returns the length of the signature in `room`.
    pub fn sign(
        &self,
        mechanism: Mechanism,
        key: CK_OBJECT_HANDLE,
        input: &[u8],
        room: &mut [u8],
    ) -> Result<usize, Ckr> {
        let mut pss = mechanism.pss_parameters();
        let (parameter, parameter_bytes) = match &mut pss {
            Some(pss) => (ptr::from_mut(pss).cast(), size_of_val(pss)),
            None => (ptr::null_mut(), 0),
        };
        let mut raw = CK_MECHANISM {
            mechanism: mechanism.ck_type(),
            pParameter: parameter,
            ulParameterLen: parameter_bytes as CK_ULONG,
        };
        self.sign_raw(&mut raw, key, input, room)
    }

    /// HMAC-SHA256 of `input` under a secret key that does not leave the token (CKM_SHA256_HMAC).
    pub fn hmac_sha256(&self, key: CK_OBJECT_HANDLE, input: &[u8], mac: &mut [u8; 32]) -> Result<(), Ckr> {
        let mut raw =
            CK_MECHANISM { mechanism: sys::CKM_SHA256_HMAC, pParameter: ptr::null_mut(), ulParameterLen: 0 };
        match self.sign_raw(&mut raw, key, input, mac)? {
            32 => Ok(()),
            _ => Err(Ckr(sys::CKR_GENERAL_ERROR)),
        }
    }

    fn sign_raw(
        &self,
        mechanism: &mut CK_MECHANISM,
        key: CK_OBJECT_HANDLE,
        input: &[u8],
        room: &mut [u8],
    ) -> Result<usize, Ckr> {
        self.sign_start(mechanism, key)?;
        let (sign, _inside) = self.enter(self.module.functions.C_Sign)?;
        let mut length = room.len() as CK_ULONG;
        // SAFETY: `input` is only read, `room` has room for `length` bytes; all live through the call.
        Ckr::check(unsafe {
            sign(
                self.handle,
                input.as_ptr().cast_mut(),
                input.len() as CK_ULONG,
                room.as_mut_ptr(),
                &mut length,
            )
        })?;
        // A module that claims to have written more than there was room for has at least lied about the length.
        usize::try_from(length)
            .ok()
            .filter(|length| *length <= room.len())
            .ok_or(Ckr(sys::CKR_BUFFER_TOO_SMALL))
    }

    fn sign_start(&self, mechanism: &mut CK_MECHANISM, key: CK_OBJECT_HANDLE) -> Result<(), Ckr> {
        let (start, _inside) = self.enter(self.module.functions.C_SignInit)?;
        // SAFETY: the mechanism and the parameter it points to live through the call; the module copies what it keeps.
        Ckr::check(unsafe { start(self.handle, mechanism, key) })
    }

    fn find_start(&self, template: &mut [CK_ATTRIBUTE]) -> Result<(), Ckr> {
        let (start, _inside) = self.enter(self.module.functions.C_FindObjectsInit)?;
        // SAFETY: the template and the values it points to live through the call, and are only read (v3.0 5.7).
        Ckr::check(unsafe { start(self.handle, template.as_mut_ptr(), template.len() as CK_ULONG) })
    }

    fn find_some(&self) -> Result<Matches, Ckr> {
        let (find, _inside) = self.enter(self.module.functions.C_FindObjects)?;
        let mut handles: [CK_OBJECT_HANDLE; 2] = [0; 2];
        let mut count: CK_ULONG = 0;
        // SAFETY: `handles` has room for the two handles asked for; both live through the call.
        Ckr::check(unsafe { find(self.handle, handles.as_mut_ptr(), 2, &mut count) })?;
        Ok(match count {
            0 => Matches::None,
            1 => Matches::One(handles[0]),
            _ => Matches::Several,
        })
    }

    fn find_all(&self, max: usize) -> Result<Option<Vec<CK_OBJECT_HANDLE>>, Ckr> {
        let mut found = Vec::new();
        loop {
            let (find, _inside) = self.enter(self.module.functions.C_FindObjects)?;
            let mut handles: [CK_OBJECT_HANDLE; 256] = [0; 256];
            let mut count: CK_ULONG = 0;
            // SAFETY: `handles` has room for as many handles as are asked for; both live through the call.
            Ckr::check(unsafe {
                find(self.handle, handles.as_mut_ptr(), handles.len() as CK_ULONG, &mut count)
            })?;
            let more = usize::try_from(count).ok().and_then(|count| handles.get(..count));
            match more {
                Some([]) => return Ok(Some(found)),
                Some(more) if found.len() + more.len() <= max => found.extend_from_slice(more),
                // A module that claims to have written more than there was room for can be believed nothing.
                _ => return Ok(None),
            }
        }
    }

    fn find_end(&self) -> Result<(), Ckr> {
        let (end, _inside) = self.enter(self.module.functions.C_FindObjectsFinal)?;
        // SAFETY: takes no pointer.
        Ckr::check(unsafe { end(self.handle) })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.close_on_drop {
            return;
        }
        let Ok((close, _inside)) = self.enter(self.module.functions.C_CloseSession) else { return };
        // SAFETY: takes no pointer. The result does not matter: a session that cannot be closed is gone already.
        let _ = unsafe { close(self.handle) };
    }
}

impl Mechanism {
    pub fn ck_type(self) -> sys::CK_MECHANISM_TYPE {
        match self {
            Mechanism::Ecdsa => sys::CKM_ECDSA,
            Mechanism::RsaPkcs => sys::CKM_RSA_PKCS,
            Mechanism::RsaPkcsPss(_) => sys::CKM_RSA_PKCS_PSS,
            Mechanism::Eddsa => sys::CKM_EDDSA,
        }
    }

    /// The name in the standard.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::Ecdsa => "CKM_ECDSA",
            Mechanism::RsaPkcs => "CKM_RSA_PKCS",
            Mechanism::RsaPkcsPss(_) => "CKM_RSA_PKCS_PSS",
            Mechanism::Eddsa => "CKM_EDDSA",
        }
    }

    /// The mask function must match the hash and the salt be as long as it (RFC 8446 4.2.3).
    fn pss_parameters(self) -> Option<sys::CK_RSA_PKCS_PSS_PARAMS> {
        let Mechanism::RsaPkcsPss(hash) = self else { return None };
        let (hash, mask, salt_bytes) = match hash {
            PssHash::Sha256 => (sys::CKM_SHA256, sys::CKG_MGF1_SHA256, 32),
            PssHash::Sha384 => (sys::CKM_SHA384, sys::CKG_MGF1_SHA384, 48),
            PssHash::Sha512 => (sys::CKM_SHA512, sys::CKG_MGF1_SHA512, 64),
        };
        Some(sys::CK_RSA_PKCS_PSS_PARAMS { hashAlg: hash, mgf: mask, sLen: salt_bytes })
    }
}

fn attribute(kind: sys::CK_ATTRIBUTE_TYPE, value: *const c_void, bytes: usize) -> CK_ATTRIBUTE {
    CK_ATTRIBUTE { type_: kind, pValue: value.cast_mut(), ulValueLen: bytes as CK_ULONG }
}

fn function_list(handle: *mut c_void) -> Result<&'static sys::CK_FUNCTION_LIST, String> {
    // SAFETY: `handle` is a live handle of dlopen and the name is a C string.
    let symbol = unsafe { libc::dlsym(handle, c"C_GetFunctionList".as_ptr()) };
    if symbol.is_null() {
        return Err("it exports no C_GetFunctionList, so it is not a PKCS#11 module".into());
    }
    // SAFETY: PKCS#11 v3.0 5.4 gives this exported symbol exactly this type.
    let get: unsafe extern "C" fn(*mut *mut sys::CK_FUNCTION_LIST) -> sys::CK_RV =
        unsafe { std::mem::transmute(symbol) };
    let mut list: *mut sys::CK_FUNCTION_LIST = ptr::null_mut();
    // SAFETY: `list` lives through the call, which may precede C_Initialize (v3.0 5.4).
    Ckr::check(unsafe { get(&mut list) }).map_err(|ckr| format!("C_GetFunctionList returned {ckr}"))?;
    // SAFETY: on CKR_OK the list is the module's static table, which RTLD_NODELETE keeps for the process' life; it is
    // not written after that. A null pointer becomes `None`.
    unsafe { list.as_ref() }.ok_or_else(|| "C_GetFunctionList returned no list".into())
}

fn dynamic_linker_error() -> String {
    // SAFETY: dlerror takes nothing, and its string stays valid until this thread's next dl* call.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "the dynamic linker gave no reason".into();
    }
    // SAFETY: not null, so it is a C string, and no dl* call happens before it is copied.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}

/// Fixed-width fields are padded with blanks, not ended by a zero (v3.0 3.1); some modules do both.
fn unpad(field: &[u8]) -> String {
    String::from_utf8_lossy(field).trim_end_matches([' ', '\0']).to_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not take signing down with it; the data is consistent after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot load the PKCS#11 module {}: {}", self.path.display(), self.reason)
    }
}

impl std::error::Error for LoadError {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_label_is_compared_without_its_padding() {
        assert_eq!(unpad(b"key gate        "), "key gate");
        assert_eq!(unpad(b"keygate\0\0\0"), "keygate");
    }

    #[test]
    fn a_relative_module_path_is_refused() {
        let refused = Module::load(Path::new("libsofthsm2.so"), true).err().unwrap();
        assert!(refused.to_string().contains("absolute"), "{refused}");
    }

    #[test]
    fn a_file_that_is_no_module_is_refused_with_its_path() {
        let refused = Module::load(Path::new("/nonexistent/module.so"), true).err().unwrap();
        assert!(refused.to_string().contains("/nonexistent/module.so"), "{refused}");
    }
}
