//! Owns what is done to the process or its sockets and has nothing to do with TLS: opening listening sockets for the
//! primary, taking those that systemd opened and telling it how the service does, giving up privileges that cannot be given
//! up from JavaScript, and leaving without running the destructors of a library that a thread is still inside. JavaScript
//! thread only.

use std::ffi::{c_int, c_void};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixSocketAddr, UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::signing::pkcs11::threads_in_modules;
use crate::transparent::allow_foreign_address;

/// How long a message to the service manager may wait for room.
const NOTIFY_BUDGET: Duration = Duration::from_millis(500);

/// Opens a listening socket with SO_REUSEPORT, so that each worker slot can have one of its own at the same address.
/// Non-blocking and close-on-exec; TCP_NODELAY is inherited by what it accepts, which saves a system call for each.
/// TPROXY gives connections only to listeners that are `transparent`.
///
/// # Errors
/// As bind(2) and listen(2); `transparent` as `allow_foreign_address`.
pub fn open_listener(
    address: SocketAddr,
    backlog: u32,
    transparent: bool,
) -> io::Result<(RawFd, SocketAddr)> {
    let socket = bindable(address)?;
    if transparent {
        allow_foreign_address(&socket, address.is_ipv6())?;
    }
    socket.set_nonblocking(true)?;
    socket.set_reuse_port(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    let bound = socket.local_addr()?.as_socket().unwrap_or(address);
    Ok((socket.into_raw_fd(), bound))
}

/// Makes a listening socket that another program opened one like ours: non-blocking, which it then is for whoever holds it,
/// close-on-exec, TCP_NODELAY. It stays open and the caller's.
///
/// # Errors
/// InvalidInput, saying what it is, when it does not listen for TCP, or listens for IPv4 at an IPv6 address, which nobody
/// can change any more; as fcntl(2) and getsockopt(2).
pub fn adopt_listener(fd: RawFd) -> io::Result<SocketAddr> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: not negative, and the caller's for the time of this call; if it is not open the first call below fails.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let socket = SockRef::from(&borrowed);
    let refused = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    let Some(address) = socket.local_addr()?.as_socket() else {
        return refused("it is not a TCP socket");
    };
    if socket.r#type()? != Type::STREAM || !socket.is_listener()? {
        return refused("it is not a TCP socket that listens");
    }
    if address.is_ipv6() && address.ip().is_unspecified() && !socket.only_v6()? {
        return refused("it takes IPv4 as well as IPv6");
    }
    socket.set_nonblocking(true)?;
    socket.set_cloexec(true)?;
    socket.set_tcp_nodelay(true)?;
    Ok(address)
}

/// Tells the service manager something (sd_notify(3)): a datagram to the socket it named. `@` begins an abstract name.
///
/// # Errors
/// As socket(2) and sendto(2).
pub fn notify(socket: &str, state: &str) -> io::Result<()> {
    let address = match socket.strip_prefix('@') {
        Some(name) => UnixSocketAddr::from_abstract_name(name)?,
        None => UnixSocketAddr::from_pathname(socket)?,
    };
    let sender = UnixDatagram::unbound()?;
    // READY=1 is said once, so a manager that is busy is waited for; one that does not read must not hold keygate up.
    sender.set_write_timeout(Some(NOTIFY_BUDGET))?;
    sender.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// Refuses clients on a listening socket from now on, also for the other processes that hold it, and resets what waits in
/// its queue: closing it would not, as long as one of them keeps it open.
///
/// # Errors
/// As shutdown(2).
pub fn shut_listener(fd: RawFd) -> io::Result<()> {
    // SAFETY: shutdown takes a descriptor and touches no memory; on one that is no socket it fails.
    match unsafe { libc::shutdown(fd, libc::SHUT_RD) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the length of a listening socket's accept queue; what waits there stays.
///
/// # Errors
/// As listen(2).
pub fn set_backlog(fd: RawFd, backlog: u32) -> io::Result<()> {
    // SAFETY: listen takes two integers and touches no memory; on a descriptor that is no socket it fails.
    match unsafe { libc::listen(fd, i32::try_from(backlog).unwrap_or(i32::MAX)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether somebody else already listens at the address: SO_REUSEPORT alone would let us share it silently with another
/// process of the same user.
///
/// # Errors
/// As bind(2): EADDRINUSE, EACCES, EADDRNOTAVAIL.
pub fn probe_address(address: SocketAddr) -> io::Result<()> {
    bindable(address)?.bind(&address.into())
}

/// What is asked before listening and what listens later must be refused, or not, for the same reasons.
fn bindable(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // "[::]" is IPv6 and nothing else, so that "0.0.0.0" can be bound beside it.
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// No new privileges by exec, no core dump and no ptrace by others of the same user: the process holds a PIN.
///
/// # Errors
/// As prctl(2).
pub fn harden() -> io::Result<()> {
    for (option, value) in [(libc::PR_SET_NO_NEW_PRIVS, 1), (libc::PR_SET_DUMPABLE, 0)] {
        // SAFETY: both options take one integer and touch no memory of ours.
        if unsafe { libc::prctl(option, value, 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Gives pages that hold nothing any more back to the system, in every arena of the allocator: on its own it gives back
/// what lies at the end of one, and a start leaves thousands of holes.
pub fn trim_memory() {
    // SAFETY: takes a number of bytes to keep and may be called at any time, from any thread (malloc_trim(3)).
    unsafe { libc::malloc_trim(0) };
}

/// Has the kernel end this process at once when the one that forked it ends, also while a token's call blocks everything else.
///
/// # Errors
/// As prctl(2).
pub fn end_with_parent() -> io::Result<()> {
    end_signal(libc::SIGKILL)
}

/// What this process gets when the one that forked it ends.
fn end_signal(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: the option takes a signal number and touches no memory of ours.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has the kernel end this process `for_seconds` after the one that forked it, in place of at once; 1..=`u32::MAX`. Who has asked for
/// `parent_end` before hears of it then. May be called again, for another time.
///
/// # Errors
/// As sigaction(2) and prctl(2).
pub fn outlive_parent(for_seconds: u32) -> io::Result<()> {
    OUTLIVES_SECONDS.store(for_seconds.max(1), Relaxed);
    // SAFETY: takes nothing and cannot fail.
    let parent = unsafe { libc::getppid() };
    // Not that of an orphan, which it was told of already.
    let _ = PARENT.compare_exchange(0, parent, Relaxed, Relaxed);
    // SAFETY: an all-zero sigaction is valid; the handler does what is async-signal-safe (signal-safety(7)).
    let installed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_flags = libc::SA_RESTART;
        action.sa_sigaction = parent_ended as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut())
    };
    if installed != 0 {
        return Err(io::Error::last_os_error());
    }
    end_signal(libc::SIGALRM)
}

/// Who forked this process; 0: not looked up yet.
static PARENT: AtomicI32 = AtomicI32::new(0);
static OUTLIVES_SECONDS: AtomicU32 = AtomicU32::new(1);
/// On the monotonic clock; 0: the parent lives.
static ENDS_AT_SECONDS: AtomicU64 = AtomicU64::new(0);

/// Becomes readable when the process that forked this one has ended, and stays so; see `outlive_parent`. Non-blocking.
///
/// # Errors
/// As socketpair(2) and fcntl(2).
pub fn parent_end() -> io::Result<UnixStream> {
    let (heard, _) = match PARENT_END.get() {
        Some(pair) => pair,
        None => {
            let pair = UnixStream::pair()?;
            pair.0.set_nonblocking(true)?;
            pair.1.set_nonblocking(true)?;
            PARENT_END.get_or_init(|| pair)
        }
    };
    heard.try_clone()
}

/// Where it is heard and where it is said.
static PARENT_END: OnceLock<(UnixStream, UnixStream)> = OnceLock::new();

fn say_that_parent_ended() {
    if let Some((_, said)) = PARENT_END.get() {
        // SAFETY: async-signal-safe; reads a byte that lives through the call, and the descriptor is never closed.
        unsafe { libc::write(said.as_raw_fd(), [1_u8].as_ptr().cast(), 1) };
    }
}

/// The parent's end is told once for each of its threads, then the alarm is.
extern "C" fn parent_ended(_: libc::c_int) {
    // SAFETY: async-signal-safe; takes nothing and cannot fail. The kernel gives an orphan another parent before it signals.
    if unsafe { libc::getppid() } == PARENT.load(Relaxed) {
        return; // a library's alarm, or anybody's
    }
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: async-signal-safe; writes a timespec that lives through the call, and cannot fail with this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    let now = now.tv_sec.unsigned_abs();
    let for_seconds = OUTLIVES_SECONDS.load(Relaxed);
    match ENDS_AT_SECONDS.compare_exchange(0, now + u64::from(for_seconds), Relaxed, Relaxed) {
        Ok(_) => {
            say_that_parent_ended();
            // SAFETY: async-signal-safe; takes a number and touches no memory of ours.
            unsafe { libc::alarm(for_seconds) };
        }
        // SAFETY: async-signal-safe; a thread may be inside a module, whose destructors do not run.
        Err(ends_at) if now >= ends_at => unsafe { libc::_exit(1) },
        Err(_) => {}
    }
}

/// The CPU time of one thread, to be read by any other.
#[derive(Clone)]
pub struct ThreadClock {
    clock: libc::clockid_t,
    /// Of the last reading: a thread that has ended has no clock any more.
    last_us: Arc<AtomicU64>,
}

impl ThreadClock {
    /// # Errors
    /// As pthread_getcpuclockid(3).
    pub fn of_this_thread() -> io::Result<Self> {
        let mut clock = 0;
        // SAFETY: the calling thread exists, and the clock's number is written to a variable that lives through the call.
        match unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) } {
            0 => Ok(Self { clock, last_us: Arc::default() }),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Microseconds of CPU since the thread began; never less than before.
    pub fn elapsed_us(&self) -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes a timespec that lives through the call; a clock whose thread has ended makes it fail.
        if unsafe { libc::clock_gettime(self.clock, &mut time) } != 0 {
            return self.last_us.load(Relaxed);
        }
        let now_us = time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1_000;
        self.last_us.fetch_max(now_us, Relaxed).max(now_us)
    }
}

/// While true, exit must not run destructors: the I/O thread is using what they would tear down.
static ENGINE_RUNNING: AtomicBool = AtomicBool::new(false);

/// Says whether the I/O thread runs or is about to.
pub fn engine_runs(running: bool) {
    ENGINE_RUNNING.store(running, SeqCst);
}

/// Arranges that `exit` with a thread still inside a PKCS#11 module, or with a running engine, leaves at once. Without it
/// the static destructors of the module and its libraries run under their own threads: a crash. Exit handlers run in
/// reverse order: to be called once for each module, when all of them have registered theirs and before a lane starts.
pub fn guard_exit() {
    // SAFETY: the handler is a plain function for the life of the process (the addon is never unloaded by Node), and it
    // ignores its argument.
    unsafe { on_exit(leave_if_busy, std::ptr::null_mut()) };
}

unsafe extern "C" {
    // glibc; not in the libc crate.
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

extern "C" fn leave_if_busy(status: c_int, _argument: *mut c_void) {
    if ENGINE_RUNNING.load(SeqCst) || threads_in_modules() > 0 {
        // SAFETY: _exit ends the process without touching memory.
        unsafe { libc::_exit(status) };
    }
}
