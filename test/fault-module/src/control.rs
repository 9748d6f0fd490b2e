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

pub const CONTROL_BYTES: usize = 4096;
pub const MAGIC: u64 = u64::from_le_bytes(*b"KGFAULT1");
pub const VERSION: u64 = 1;
/// For `rv_left` and `flip_left`.
pub const FOR_EVER: u64 = u64::MAX;

const WORDS: usize = CONTROL_BYTES / 8;
const FUNCTIONS_START: usize = 16;
const FUNCTION_WORDS: usize = 16;
const DEEDS_START: usize = 448;

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
        }
    }

    pub fn shared_session(&self) -> &AtomicU64 {
        &self.words[2]
    }

    pub fn not_initialized(&self) -> &AtomicU64 {
        &self.words[3]
    }

    pub fn finalize_in_flight(&self) -> &AtomicU64 {
        &self.words[4]
    }

    pub fn exit_delay_us(&self) -> &AtomicU64 {
        &self.words[5]
    }

    /// So many signatures still begin with every deed of `DEEDS`.
    pub fn misbehave_left(&self) -> &AtomicU64 {
        &self.words[6]
    }

    /// What became of a deed: 0 while it has not been tried, 1 when it was done, else errno in the upper half.
    pub fn deed(&self, index: usize) -> &AtomicU64 {
        &self.words[DEEDS_START + index]
    }

    /// All broken contracts together.
    pub fn violations(&self) -> u64 {
        [self.shared_session(), self.not_initialized(), self.finalize_in_flight()]
            .iter()
            .map(|counter| counter.load(SeqCst))
            .sum()
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
        self.rv.store(rv, SeqCst);
        self.rv_left.store(times, SeqCst);
    }

    /// Whether this call, the `call`th, is one of those that `every` and `left` select; uses one up.
    pub fn selects(call: u64, every: &AtomicU64, left: &AtomicU64) -> bool {
        let every = every.load(SeqCst).max(1);
        call.is_multiple_of(every)
            && left
                .fetch_update(SeqCst, SeqCst, |left| match left {
                    0 => None,
                    FOR_EVER => Some(FOR_EVER),
                    some => Some(some - 1),
                })
                .is_ok()
    }
}
