//! Owns the layout of the control file (README.md describes it) and the typed view of it. Must not know PKCS#11 calls.
//! Compiled into the module and into the tests that switch its faults; any thread and any process may use a view.

// The module uses one half of this file, the tests the other.
#![allow(dead_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

pub const CONTROL_BYTES: usize = 8192;
pub const MAGIC: u64 = u64::from_le_bytes(*b"KGFAULT1");
pub const VERSION: u64 = 2;
/// For everything that counts down.
pub const FOR_EVER: u64 = u64::MAX;

const WORDS: usize = CONTROL_BYTES / 8;
const FUNCTIONS_START: usize = 64;
const FUNCTION_WORDS: usize = 32;
const DEEDS_START: usize = 960;

/// The number is the place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Function {
    Initialize = 0,
    Finalize = 1,
    GetSlotList = 2,
    GetTokenInfo = 3,
    GetMechanismInfo = 4,
    OpenSession = 5,
    CloseSession = 6,
    CloseAllSessions = 7,
    GetSessionInfo = 8,
    Login = 9,
    Logout = 10,
    FindObjectsInit = 11,
    FindObjects = 12,
    FindObjectsFinal = 13,
    GetAttributeValue = 14,
    SignInit = 15,
    Sign = 16,
    GetSlotInfo = 17,
    GetMechanismList = 18,
}

/// What the module counts or is told as a whole; the number is the place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Word {
    /// Broken: two threads in one PKCS#11 session at once.
    SharedSession = 2,
    /// Broken: a call before C_Initialize or after C_Finalize.
    NotInitialized = 3,
    /// Broken: C_Finalize while calls are in flight; refused.
    FinalizeInFlight = 4,
    ExitDelayUs = 5,
    MisbehaveLeft = 6,
    /// Broken: C_SignInit while an operation is active, or C_Sign without C_SignInit.
    OperationOrder = 7,
    /// Broken: a process that was forked uses its parent's C_Initialize.
    Forked = 8,
    /// Broken: a call on a thread that must not wait, by its name.
    IoThread = 9,
    SessionsOpen = 10,
    SessionsOpenMax = 11,
    /// More are CKR_SESSION_COUNT; 0: no limit.
    SessionLimit = 12,
    /// Not 0: C_GetSlotList shows none.
    SlotsHidden = 13,
    /// Slot ids grow by so much with each C_Initialize of the process.
    SlotShift = 14,
    /// What C_FindObjects finds: 0 what there is, 1 nothing, 2 everything twice.
    Objects = 15,
    /// Not 0: after every other C_Initialize handles of neighbouring objects are exchanged.
    HandlesExchanged = 16,
    /// Not 0: CKA_EXTRACTABLE is true.
    Extractable = 17,
    /// Not 0: C_GetSessionInfo says the opposite of whether the user is logged in.
    SessionInfoLies = 18,
    /// So many signatures still begin with everybody logged out.
    LogoutLeft = 19,
    /// So many signatures still begin with their PKCS#11 session closed.
    CloseLeft = 20,
    PinsRefused = 21,
    /// After so many refused PINs the PIN is locked, and the one before is the final try; 0: the real token decides.
    PinTries = 22,
    /// So many signatures still end their process.
    CrashLeft = 23,
    /// The signal with which they do.
    CrashSignal = 24,
    /// Lost with each signature.
    LeakBytes = 25,
    /// What `flip_every` and `flip_left` do to a signature, a `Damage`.
    Damage = 26,
    Initializations = 27,
}

pub const VIOLATIONS: [Word; 6] = [
    Word::SharedSession,
    Word::NotInitialized,
    Word::FinalizeInFlight,
    Word::OperationOrder,
    Word::Forked,
    Word::IoThread,
];

/// How a signature comes to be wrong, or odd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Damage {
    Flip = 0,
    Truncate = 1,
    /// CKR_OK, and no byte.
    Empty = 2,
    /// Right, with r or s beginning with a zero byte.
    LeadingZero = 3,
    OtherKey = 4,
}

/// What ends an injected error that is meant to last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Heal {
    Never = 0,
    /// For PKCS#11 sessions opened since.
    Reopen = 1,
    /// For processes that have logged in since.
    Login = 2,
    /// For processes that have initialised the module since.
    Initialize = 3,
}

/// What a module may try that has turned against its host; the order is the place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    Program,
    Exec,
    Fork,
    Create,
    Overwrite,
    Truncate,
    Remove,
    MakeDirectory,
    ChangeMode,
    BindTcp,
    Listen,
    RawSocket,
    OddSocket,
    Trace,
    ReadMemory,
    Signal,
    Namespace,
    Keyring,
    Ring,
    Identity,
}

pub const DEEDS: [Deed; 20] = [
    Deed::Program,
    Deed::Exec,
    Deed::Fork,
    Deed::Create,
    Deed::Overwrite,
    Deed::Truncate,
    Deed::Remove,
    Deed::MakeDirectory,
    Deed::ChangeMode,
    Deed::BindTcp,
    Deed::Listen,
    Deed::RawSocket,
    Deed::OddSocket,
    Deed::Trace,
    Deed::ReadMemory,
    Deed::Signal,
    Deed::Namespace,
    Deed::Keyring,
    Deed::Ring,
    Deed::Identity,
];

#[derive(Clone, Copy)]
pub struct Control {
    words: &'static [AtomicU64; WORDS],
}

/// The fields of one function.
pub struct FunctionControl<'a> {
    pub delay_us: &'a AtomicU64,
    pub hang: &'a AtomicU64,
    pub rv: &'a AtomicU64,
    pub rv_every: &'a AtomicU64,
    pub rv_left: &'a AtomicU64,
    pub flip_every: &'a AtomicU64,
    pub flip_left: &'a AtomicU64,
    pub calls: &'a AtomicU64,
    pub in_flight: &'a AtomicU64,
    pub in_flight_max: &'a AtomicU64,
    pub injected: &'a AtomicU64,
    pub flipped: &'a AtomicU64,
    /// Milliseconds of CLOCK_MONOTONIC; 0: no end.
    pub rv_until_ms: &'a AtomicU64,
    /// Of a million calls; 0: each.
    pub rv_per_million: &'a AtomicU64,
    pub rv_heal: &'a AtomicU64,
    /// When it was switched on, microseconds of CLOCK_MONOTONIC; for `rv_heal`.
    pub rv_since_us: &'a AtomicU64,
    /// Faults concern these alone; 0: all.
    pub only_pid: &'a AtomicU64,
    pub only_session: &'a AtomicU64,
    /// The first eight bytes of a token's label.
    pub only_token: &'a AtomicU64,
    /// Sigma of a log-normal distribution around `delay_us`, in thousandths.
    pub delay_sigma: &'a AtomicU64,
    pub spike_us: &'a AtomicU64,
    pub spike_every: &'a AtomicU64,
    /// Calls per second, all processes together; 0: no cap.
    pub rate: &'a AtomicU64,
    /// When the next call may begin, microseconds of CLOCK_MONOTONIC.
    pub rate_next_us: &'a AtomicU64,
}

impl Control {
    /// For tests: a new file without faults.
    pub fn create(path: &Path) -> io::Result<Control> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.set_len(CONTROL_BYTES as u64)?;
        let control = Control::map(&file)?;
        control.words[1].store(VERSION, SeqCst);
        control.words[0].store(MAGIC, SeqCst);
        Ok(control)
    }

    pub fn open(path: &Path) -> io::Result<Control> {
        let file = File::options().read(true).write(true).open(path)?;
        // A shorter file would be a bus error at the first access.
        if file.metadata()?.len() != CONTROL_BYTES as u64 {
            return Err(io::Error::other(format!("expected {CONTROL_BYTES} bytes")));
        }
        let control = Control::map(&file)?;
        if (control.words[0].load(SeqCst), control.words[1].load(SeqCst)) != (MAGIC, VERSION) {
            return Err(io::Error::other(format!("expected the magic KGFAULT1 and version {VERSION}")));
        }
        Ok(control)
    }

    pub fn of(&self, function: Function) -> FunctionControl<'_> {
        let start = FUNCTIONS_START + FUNCTION_WORDS * function as usize;
        let field = |index: usize| &self.words[start + index];
        FunctionControl {
            delay_us: field(0),
            hang: field(1),
            rv: field(2),
            rv_every: field(3),
            rv_left: field(4),
            flip_every: field(5),
            flip_left: field(6),
            calls: field(8),
            in_flight: field(9),
            in_flight_max: field(10),
            injected: field(11),
            flipped: field(12),
            rv_until_ms: field(13),
            rv_per_million: field(14),
            rv_heal: field(15),
            rv_since_us: field(16),
            only_pid: field(17),
            only_session: field(18),
            only_token: field(19),
            delay_sigma: field(20),
            spike_us: field(21),
            spike_every: field(22),
            rate: field(23),
            rate_next_us: field(24),
        }
    }

    pub fn word(&self, word: Word) -> &AtomicU64 {
        &self.words[word as usize]
    }

    pub fn read(&self, word: Word) -> u64 {
        self.word(word).load(SeqCst)
    }

    pub fn count(&self, word: Word) {
        self.word(word).fetch_add(1, SeqCst);
    }

    /// Whether there is one left; uses it up.
    pub fn takes(&self, word: Word) -> bool {
        take(self.word(word))
    }

    /// What became of a deed: 0 while it has not been tried, 1 when it was done, else errno in the upper half.
    pub fn deed(&self, index: usize) -> &AtomicU64 {
        &self.words[DEEDS_START + index]
    }

    /// All broken contracts together.
    pub fn violations(&self) -> u64 {
        VIOLATIONS.iter().map(|word| self.read(*word)).sum()
    }

    fn map(file: &File) -> io::Result<Control> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping of an open file, at an address the kernel chooses.
        let address = unsafe {
            libc::mmap(ptr::null_mut(), CONTROL_BYTES, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: page-aligned, CONTROL_BYTES long and never unmapped; all access, also from other processes, is to
        // whole words, and every bit pattern is a valid word.
        Ok(Control { words: unsafe { &*address.cast::<[AtomicU64; WORDS]>() } })
    }
}

impl FunctionControl<'_> {
    /// For tests: the next `times` calls return `rv`.
    pub fn fail(&self, rv: u64, times: u64) {
        self.rv_every.store(1, SeqCst);
        self.rv_since_us.store(now_us(), SeqCst);
        self.rv.store(rv, SeqCst);
        self.rv_left.store(times, SeqCst);
    }

    /// For tests: as `fail`, until the user of the module does what heals it.
    pub fn fail_until(&self, rv: u64, heal: Heal) {
        self.rv_heal.store(heal as u64, SeqCst);
        self.fail(rv, FOR_EVER);
    }

    /// Whether this call, the `call`th, is one of those that `every` and `left` select; uses one up.
    pub fn selects(call: u64, every: &AtomicU64, left: &AtomicU64) -> bool {
        call.is_multiple_of(every.load(SeqCst).max(1)) && take(left)
    }
}

fn take(left: &AtomicU64) -> bool {
    let less = |left| match left {
        0 => None,
        FOR_EVER => Some(FOR_EVER),
        some => Some(some - 1),
    };
    left.fetch_update(SeqCst, SeqCst, less).is_ok()
}

/// CLOCK_MONOTONIC, which is the same for all processes of a machine; never 0.
pub fn now_us() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes a timespec that lives through the call; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    (time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000).max(1)
}
