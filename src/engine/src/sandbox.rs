//! Owns what a worker gives up for good before a PKCS#11 module is loaded: the policy, and putting it into force with
//! Landlock (files, TCP ports, signals) and seccomp (system calls). Must not know the configuration, tokens or connections.
//! JavaScript thread, once; what it puts into force holds for every thread of the process.
//!
//! The module is a stranger's code in the process that holds the PIN, and clients send bytes to the same process. Whoever gets
//! to execute code there can sign with the token while he is there, and that is all: he cannot start a program, keep anything
//! on disk, listen, look into another process, or try the parts of the kernel that were broken most often.
//!
//! **Every thread.** seccomp is put on all threads at once (TSYNC). Landlock restricts the thread that asks and those it
//! creates later, until ABI 8 (Linux 7.0). Node has started others long before the first line of JavaScript: four V8 workers
//! and their timer (`node-V8Worker`, `DelayedTaskSche`), which collect garbage and compile. They run no script and no module,
//! but they share the memory: who can write it can have them do what his own thread may not. So they are made to restrict
//! themselves, by a signal. The thread that waits for SIGUSR1 to start the debugger blocks every signal; workers are started
//! without it (src/primary/worker-process.ts). A thread that cannot be reached is reported as missing.
//!
//! **What stays allowed.** Reading files, because modules are opaque and read what they like; connecting, because upstreams and
//! network HSMs are reached so; ioctl on devices that may be opened; mapping code, because V8 compiles.
//!
//! **Rings of io_uring** do much of what seccomp forbids, listening above all, without a system call that it sees. Node's event
//! loop makes three before the first line of JavaScript runs and aborts when it cannot enter them any more. So the primary
//! gives up making any before it forks (`refuse_rings`): workers inherit that, and their event loops do without.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{c_int, c_long};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use landlock::{
    ABI, AccessFs, AccessNet, AddRuleError, AddRulesError, BitFlags, PathBeneath, PathFd, RestrictSelfAttr,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope, make_bitflags,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, sock_filter,
};

/// What may still be written, or done.
#[derive(Debug, Default)]
pub struct Exceptions {
    /// Files that are opened again after somebody has renamed them: they may be created, and so others beside and beneath them.
    pub logs: Vec<PathBuf>,
    /// Files, and directories with everything beneath, that modules are known to keep their state in.
    pub states: Vec<PathBuf>,
    /// The same, as the operator wants it.
    pub trees: Vec<PathBuf>,
    /// Connections have addresses of clients as their source, for which a socket must be bound. Without listen(2), which
    /// seccomp forbids, one that is bound is of no more use than another.
    pub binds_tcp: bool,
}

#[derive(Debug)]
pub struct Entered {
    /// 0: Landlock is not in force.
    pub landlock_abi: u32,
    pub seccomp: bool,
    /// What is not in force although it should be, and why.
    pub missing: Vec<String>,
}

/// Puts everything into force that the kernel has.
pub fn enter(exceptions: &Exceptions) -> Entered {
    let mut missing = Vec::new();
    // First: it opens files and signals threads.
    let landlock_abi = match confine_files(exceptions, &mut missing) {
        Ok(abi) => abi,
        Err(reason) => {
            missing.push(format!("Landlock: {reason}"));
            0
        }
    };
    let seccomp = match confine_calls(exceptions) {
        Ok(()) => true,
        Err(reason) => {
            missing.push(format!("seccomp: {reason}"));
            false
        }
    };
    if has_rings() {
        missing.push("seccomp: rings of io_uring, which are open already, go around it".into());
    }
    Entered { landlock_abi, seccomp, missing }
}

// Landlock

/// Everything that changes a file system, and executing. Not IOCTL_DEV: modules talk to their devices with it.
fn handled() -> BitFlags<AccessFs> {
    AccessFs::from_write(ABI::V3) | AccessFs::Execute
}

/// What everything on a Unix expects to be able to write, and that remembers nothing.
const DEVICES: [&str; 4] = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"];

/// Answers with the version of Landlock that is in force.
fn confine_files(exceptions: &Exceptions, missing: &mut Vec<String>) -> Result<u32, String> {
    let abi = landlock_abi()?;
    let error = |error: RulesetError| error.to_string();
    let mut ruleset =
        Ruleset::default()
            .handle_access(handled())
            .and_then(|ruleset| {
                if exceptions.binds_tcp { Ok(ruleset) } else { ruleset.handle_access(AccessNet::BindTcp) }
            })
            .and_then(|ruleset| ruleset.scope(Scope::Signal))
            .and_then(|ruleset| ruleset.create())
            .map_err(error)?;
    for device in DEVICES {
        // A container may have fewer.
        let _ = allow(&mut ruleset, Path::new(device), handled());
    }
    for tree in exceptions.states.iter().chain(&exceptions.trees) {
        let allowed = allow(&mut ruleset, tree, handled() & !AccessFs::Execute);
        missing.extend(
            allowed.err().map(|reason| format!("nothing can be written to {}: {reason}", tree.display())),
        );
    }
    for log in &exceptions.logs {
        let allowed = allow_log(&mut ruleset, log);
        missing.extend(
            allowed.err().map(|reason| format!("{} cannot be opened again: {reason}", log.display())),
        );
    }
    if abi < TSYNC_SINCE {
        // Before this thread: some kernels count a signal to a thread outside as one to another process (Landlock erratum 2).
        let fd: Option<OwnedFd> = ruleset.try_clone().map_err(|error| error.to_string())?.into();
        if let Some(fd) = fd {
            let left_out = restrict_other_threads(&fd);
            missing.extend(
                left_out.iter().map(|thread| format!("Landlock does not hold for the thread {thread}")),
            );
        }
    }
    ruleset.all_threads(true).and_then(RulesetCreated::restrict_self).map_err(error)?;
    for (since, what) in [(3, "truncating files"), (4, "binding TCP ports")] {
        if abi < since && !(exceptions.binds_tcp && what.starts_with("binding")) {
            missing
                .push(format!("Landlock does not forbid {what}: found ABI {abi}, expected {since} or later"));
        }
    }
    Ok(abi)
}

/// LANDLOCK_RESTRICT_SELF_TSYNC.
const TSYNC_SINCE: u32 = 8;

/// The kernel's own number: the crate knows those that existed when it was written.
fn landlock_abi() -> Result<u32, String> {
    const LANDLOCK_CREATE_RULESET_VERSION: c_long = 1;
    // SAFETY: with this flag the call takes no memory and answers with a number (landlock_create_ruleset(2)).
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(abi).map_err(|_| {
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOSYS) => "the kernel has none (Linux 5.13, CONFIG_SECURITY_LANDLOCK)".into(),
            Some(libc::EOPNOTSUPP) => {
                "it is in the kernel and not enabled (boot option lsm=landlock,...)".into()
            }
            _ => format!("landlock_create_ruleset: {error}"),
        }
    })
}

fn allow(ruleset: &mut RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<(), String> {
    let is_directory = fs::metadata(path).map_err(|error| error.to_string())?.is_dir();
    let access = if is_directory { access } else { access & AccessFs::from_file(ABI::V3) };
    let fd = PathFd::new(path).map_err(|error| error.to_string())?;
    match ruleset.add_rule(PathBeneath::new(fd, access & !AccessFs::Execute)) {
        Ok(_) => Ok(()),
        // A pipe or a socket that /dev/stdout leads to: it lies in no file system, so it is not restricted.
        Err(RulesetError::AddRules(AddRulesError::Fs(AddRuleError::AddRuleCall { source, .. })))
            if source.raw_os_error() == Some(libc::EBADFD) =>
        {
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// The directory, because a log is created anew when somebody has renamed it, and with it all that is beneath, because
/// Landlock knows no less; of what is no file, only itself. Through a link, the directory of what it leads to.
fn allow_log(ruleset: &mut RulesetCreated, log: &Path) -> Result<(), String> {
    match fs::metadata(log) {
        Ok(found) if !found.is_file() => allow(ruleset, log, make_bitflags!(AccessFs::{WriteFile})),
        _ => {
            let target = fs::canonicalize(log).unwrap_or_else(|_| log.to_owned());
            let directory = target.parent().ok_or("it is in no directory")?;
            allow(ruleset, directory, make_bitflags!(AccessFs::{WriteFile | MakeReg | Truncate}))
        }
    }
}

// Threads that are there already

/// Nobody else uses it; the C library keeps those below for itself.
fn restrict_signal() -> c_int {
    libc::SIGRTMIN() + 7
}

/// A thread that creates another blocks signals for a moment; one that does so for ever is not waited for.
const BLOCKED_DEADLINE: Duration = Duration::from_millis(100);
/// A thread that does not block the signal answers within microseconds.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
const ANSWER_POLL: Duration = Duration::from_micros(50);

static RULESET: AtomicI32 = AtomicI32::new(-1);
static RESTRICTED: AtomicUsize = AtomicUsize::new(0);
static FAILED: AtomicUsize = AtomicUsize::new(0);

/// Has every other thread restrict itself, and answers with the names of those that could not be made to.
fn restrict_other_threads(ruleset: &OwnedFd) -> Vec<String> {
    let signal = restrict_signal();
    RULESET.store(ruleset.as_raw_fd(), SeqCst);
    // SAFETY: an all-zero sigaction is valid; the handler is a plain function that makes system calls only.
    let former = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(c_int) = restrict_this_thread;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        let mut former: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, &raw const action, &raw mut former) != 0 {
            return vec![format!("that is not the main one: {}", io::Error::last_os_error())];
        }
        former
    };
    // SAFETY: no arguments.
    let mut seen = BTreeSet::from([unsafe { libc::gettid() }]);
    let mut left_out = Vec::new();
    let mut is_late = false;
    // Until a look finds nobody new: a thread that is not restricted yet may have created another.
    loop {
        let new: Vec<c_int> = threads().into_iter().filter(|thread| seen.insert(*thread)).collect();
        if new.is_empty() {
            break;
        }
        for thread in new {
            match restrict_thread(thread, signal) {
                Outcome::Restricted => {}
                Outcome::LeftOut => left_out.push(thread_name(thread)),
                Outcome::Late => {
                    is_late = true;
                    left_out.push(thread_name(thread));
                }
            }
        }
    }
    // A signal that is still to come would end the process without its handler, and find no ruleset without the descriptor.
    if is_late {
        // SAFETY: duplicates a descriptor that is open; the copy is never closed.
        RULESET.store(unsafe { libc::fcntl(ruleset.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) }, SeqCst);
    } else {
        // SAFETY: puts back what sigaction gave.
        unsafe { libc::sigaction(signal, &raw const former, std::ptr::null_mut()) };
    }
    left_out
}

enum Outcome {
    /// Or gone.
    Restricted,
    LeftOut,
    Late,
}

fn restrict_thread(thread: c_int, signal: c_int) -> Outcome {
    let give_up = Instant::now() + BLOCKED_DEADLINE;
    while blocks(thread, signal) {
        if Instant::now() > give_up {
            return Outcome::LeftOut;
        }
        thread::sleep(ANSWER_POLL);
    }
    let (restricted, failed) = (RESTRICTED.load(SeqCst), FAILED.load(SeqCst));
    // SAFETY: the call takes three integers.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, process::id(), thread, signal) };
    if sent != 0 {
        return if is_gone(thread) { Outcome::Restricted } else { Outcome::LeftOut };
    }
    let give_up = Instant::now() + ANSWER_DEADLINE;
    loop {
        if RESTRICTED.load(SeqCst) > restricted {
            return Outcome::Restricted;
        }
        if FAILED.load(SeqCst) > failed {
            return Outcome::LeftOut;
        }
        if is_gone(thread) {
            return Outcome::Restricted;
        }
        if Instant::now() > give_up {
            return Outcome::Late;
        }
        thread::sleep(ANSWER_POLL);
    }
}

/// Signal handler: no memory is allocated, no lock taken, and errno is as it was.
extern "C" fn restrict_this_thread(_signal: c_int) {
    // SAFETY: both calls take integers; errno is this thread's own.
    let is_restricted = unsafe {
        let errno = libc::__errno_location();
        let former = *errno;
        let is_restricted = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_landlock_restrict_self, RULESET.load(SeqCst), 0) == 0;
        *errno = former;
        is_restricted
    };
    if is_restricted { &RESTRICTED } else { &FAILED }.fetch_add(1, SeqCst);
}

fn threads() -> Vec<c_int> {
    fs::read_dir("/proc/self/task")
        .map(|entries| {
            entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
        })
        .unwrap_or_default()
}

fn is_gone(thread: c_int) -> bool {
    !Path::new("/proc/self/task").join(thread.to_string()).exists()
}

/// proc(5): SigBlk is a mask in which signal 1 is the lowest bit.
fn blocks(thread: c_int, signal: c_int) -> bool {
    let status = fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigBlk:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}

fn thread_name(thread: c_int) -> String {
    let name = fs::read_to_string(format!("/proc/self/task/{thread}/comm")).unwrap_or_default();
    format!("{} ({thread})", name.trim())
}

// seccomp

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// A list of what is forbidden, not of what is allowed: modules are opaque, and V8 and the C library use new calls in each
/// version. EPERM and not an end of the process: a module that tries something and can do without goes on.
fn confine_calls(exceptions: &Exceptions) -> Result<(), String> {
    let rules = forbidden(exceptions).map_err(|error| error.to_string())?;
    let program = compile(rules).map_err(|error| error.to_string())?;
    install(&program).map_err(|error| error.to_string())
}

/// For the primary, before it forks workers: from now on neither it nor they can make a ring. ENOSYS is what kernels without
/// rings answer, and what event loops are prepared for.
///
/// # Errors
/// As seccomp(2). Workers then report that they have rings.
pub fn refuse_rings() -> io::Result<()> {
    let architecture = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let program: BpfProgram = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_io_uring_setup, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        architecture,
    )
    .and_then(TryInto::try_into)
    .map_err(io::Error::other)?;
    install(&program)
}

/// On every thread. The crate's own function would switch on the mitigation of Speculative Store Bypass on kernels before 5.16,
/// which costs more than all calls together and protects from code that is confined by software; ours is by the kernel.
fn install(program: &BpfProgram) -> io::Result<()> {
    // SAFETY: one integer.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut().cast() };
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: the kernel copies the program, of as many instructions as `len` says (`compile` has fewer than 65536); both
    // types of instruction are the kernel's struct sock_filter.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter) };
    match answer {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!("thread {thread} has a filter of its own"))),
    }
}

fn forbidden(exceptions: &Exceptions) -> Result<Rules, BackendError> {
    let own = u64::from(process::id());
    let mut rules: Rules = NEVER.iter().copied().flatten().map(|call| (*call, Vec::new())).collect();
    if exceptions.trees.is_empty() {
        rules.extend(METADATA.iter().map(|call| (*call, Vec::new())));
    }
    if !has_rings() {
        rules.insert(libc::SYS_io_uring_enter, Vec::new());
    }
    // Processes: what is no thread, or a thread in namespaces of its own.
    let mut clone = vec![all_of([masked(0, libc::CLONE_THREAD as u64, 0)?])?];
    for flag in [
        libc::CLONE_NEWCGROUP,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWNET,
        libc::CLONE_NEWNS,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWUTS,
    ] {
        clone.push(all_of([masked(0, flag as u64, flag as u64)?])?);
    }
    rules.insert(libc::SYS_clone, clone);
    // Signals to others, also where Landlock has no scope for them: nobody but the primary tells a process what to do. tkill
    // and pidfd_send_signal do not say whose thread it is (in NEVER).
    for call in [libc::SYS_kill, libc::SYS_tgkill, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_tgsigqueueinfo] {
        rules.insert(call, vec![all_of([is_not(0, own)?])?]);
    }
    // Limits of another process of the same user.
    rules.insert(libc::SYS_prlimit64, vec![all_of([is_not(0, 0)?, is_not(0, own)?])?]);
    // Families that are rarely used and often broken. The five are those of upstreams, network HSMs, local daemons, the
    // resolver (netlink) and enclaves (vsock, also of p11-kit).
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_VSOCK];
    let other_family: Result<Vec<_>, _> = families.iter().map(|family| is_not(0, *family as u64)).collect();
    let mut socket = vec![all_of(other_family?)?];
    // Packets that the kernel did not make.
    for family in [libc::AF_INET, libc::AF_INET6] {
        socket.push(all_of([
            masked(0, u64::from(u32::MAX), family as u64)?,
            masked(1, SOCKET_TYPE_MASK, libc::SOCK_RAW as u64)?,
        ])?);
    }
    rules.insert(libc::SYS_socket, socket);
    // Typing on the terminal that keygate was started from; attributes, for which a file that may be read is enough.
    let mut requests = vec![libc::TIOCSTI, libc::TIOCLINUX];
    if exceptions.trees.is_empty() {
        requests.extend([FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR]);
    }
    let requests: Result<Vec<_>, BackendError> =
        requests.into_iter().map(|request| all_of([is(1, request)?])).collect();
    rules.insert(libc::SYS_ioctl, requests?);
    Ok(rules)
}

/// SOCK_TYPE_MASK: the rest are flags (socket(2)).
const SOCKET_TYPE_MASK: u64 = 0xf;

/// Whatever the arguments.
const NEVER: [&[c_long]; 10] = [
    // Starting programs. Modules that do (p11-kit with `remote: |command`) need the sandbox off.
    &[libc::SYS_execve, libc::SYS_execveat],
    // Looking into other processes, and taking their descriptors.
    &[
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kcmp,
        libc::SYS_pidfd_getfd,
        libc::SYS_process_madvise,
        libc::SYS_process_mrelease,
        libc::SYS_move_pages,
        libc::SYS_migrate_pages,
    ],
    // Signals whose receiver the filter cannot see.
    &[libc::SYS_tkill, libc::SYS_pidfd_send_signal],
    // New clients: only the primary's sockets have any. Without bind(2) it would take any free port.
    &[libc::SYS_listen],
    // Another view of the file system or of the system; opening files by their number passes over directories.
    &[
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_mount_setattr,
        libc::SYS_open_tree,
        OPEN_TREE_ATTR,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_open_by_handle_at,
        libc::SYS_fanotify_init,
        libc::SYS_quotactl,
        libc::SYS_quotactl_fd,
        libc::SYS_acct,
        libc::SYS_mknodat,
    ],
    // Other identities and capabilities: privileges were given up by the primary, before.
    &[
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setreuid,
        libc::SYS_setregid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setfsuid,
        libc::SYS_setfsgid,
        libc::SYS_setgroups,
        libc::SYS_capset,
    ],
    // Parts of the kernel with a long record of holes, and no use here.
    &[
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        libc::SYS_vmsplice,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_personality,
        libc::SYS_lookup_dcookie,
        libc::SYS_nfsservctl,
    ],
    // The machine itself.
    &[
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_vhangup,
        libc::SYS_syslog,
    ],
    // Clocks: certificates and tickets are valid by them.
    &[libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_clock_adjtime, libc::SYS_adjtimex],
    OF_THIS_ARCHITECTURE,
];

/// Older names of the above, and ways to the hardware.
#[cfg(target_arch = "x86_64")]
const OF_THIS_ARCHITECTURE: &[c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_mknod,
    libc::SYS_uselib,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const OF_THIS_ARCHITECTURE: &[c_long] = &[];

/// Changes of files that Landlock has no rights for. A module that may write somewhere may need them there, and the filter
/// does not see where.
const METADATA: &[c_long] = &[
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    FCHMODAT2,
    FILE_SETATTR,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    SETXATTRAT,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    REMOVEXATTRAT,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_utime,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_utimes,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_futimesat,
];

// Not in the libc crate, or not for all; the same number on every architecture.
const FCHMODAT2: c_long = 452;
const SETXATTRAT: c_long = 463;
const REMOVEXATTRAT: c_long = 466;
const OPEN_TREE_ATTR: c_long = 467;
const FILE_SETATTR: c_long = 469;
/// linux/fs.h.
const FS_IOC_SETFLAGS: u64 = 0x4008_6602;
const FS_IOC_FSSETXATTR: u64 = 0x401c_5820;

/// Whether Node's event loop has made rings, which it will go on to use: nobody has called `refuse_rings` in the primary.
fn has_rings() -> bool {
    let Ok(descriptors) = fs::read_dir("/proc/self/fd") else { return true };
    descriptors
        .flatten()
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
        .any(|target| target.as_os_str() == "anon_inode:[io_uring]")
}

/// Calls that are allowed whatever their arguments are never shown to the filter: the kernel works out which they are when it
/// is installed (Linux 5.11). So its length costs nothing on the data path, where only socket(2) is looked at.
fn compile(rules: Rules) -> Result<BpfProgram, BackendError> {
    let architecture = std::env::consts::ARCH.try_into()?;
    // Calls of another architecture (int 0x80) have other numbers: they end the process.
    let checks: BpfProgram = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        architecture,
    )?
    .try_into()?;
    let refuse = |errno: c_int| u32::from(SeccompAction::Errno(errno as u32));
    let mut program = vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, SYSCALL_NUMBER_OFFSET),
        // Its flags are in memory, which the filter cannot read. The C library then uses clone.
        jump(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_clone3 as u32, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, refuse(libc::ENOSYS)),
    ];
    if cfg!(target_arch = "x86_64") {
        // The calls of x32 are those of x86_64 under numbers of their own, and would pass.
        program.extend([
            jump(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, X32_SYSCALL_BIT, 0, 1),
            statement(libc::BPF_RET | libc::BPF_K, refuse(libc::EPERM)),
        ]);
    }
    program.extend(checks);
    Ok(program)
}

const X32_SYSCALL_BIT: u32 = 0x4000_0000;
/// Of `nr` in struct seccomp_data (seccomp(2)).
const SYSCALL_NUMBER_OFFSET: u32 = 0;

fn statement(code: u32, value: u32) -> sock_filter {
    jump(code, value, 0, 0)
}

/// Skips `yes` or `no` instructions.
fn jump(code: u32, value: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { code: code as u16, jt: yes, jf: no, k: value }
}

fn all_of(conditions: impl Into<Vec<SeccompCondition>>) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.into())
}

fn is(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn is_not(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;
    use std::fs::{File, Permissions};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;
    use std::sync::mpsc;

    /// There is no way out of a sandbox: each test is in a process of its own, with a directory that is removed outside.
    fn in_child(test: &str, body: impl FnOnce(&Path)) {
        const DIRECTORY: &str = "KEYGATE_TEST_SANDBOX";
        if let Some(directory) = env::var_os(DIRECTORY) {
            return body(Path::new(&directory));
        }
        let directory = env::temp_dir().join(format!("keygate-{test}-{}", process::id()));
        fs::create_dir(&directory).expect("made");
        let output = Command::new(env::current_exe().expect("known"))
            .args([&format!("sandbox::tests::{test}"), "--exact", "--nocapture"])
            .env(DIRECTORY, &directory)
            .output();
        fs::remove_dir_all(&directory).expect("removed");
        let output = output.expect("started");
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{}: {text}", output.status);
    }

    fn errno<T>(result: io::Result<T>) -> Option<c_int> {
        result.err().and_then(|error| error.raw_os_error())
    }

    fn errno_of(result: impl Into<i64>) -> Option<c_int> {
        if result.into() < 0 { io::Error::last_os_error().raw_os_error() } else { None }
    }

    const REFUSED_PATH: Option<c_int> = Some(libc::EACCES);
    const REFUSED_CALL: Option<c_int> = Some(libc::EPERM);

    #[test]
    fn everything_holds_on_this_kernel() {
        in_child("everything_holds_on_this_kernel", |_| {
            let entered = enter(&Exceptions::default());
            assert!(entered.landlock_abi >= 4 && entered.seccomp, "{entered:?}");
            assert_eq!(entered.missing, Vec::<String>::new());
        });
    }

    #[test]
    fn a_log_behind_a_link_can_be_opened_again() {
        in_child("a_log_behind_a_link_can_be_opened_again", |directory| {
            let [links, logs] = ["links", "logs"].map(|name| directory.join(name));
            for place in [&links, &logs] {
                fs::create_dir(place).expect("made");
            }
            let (link, log) = (links.join("a.log"), logs.join("a.log"));
            fs::write(&log, "old").expect("written");
            std::os::unix::fs::symlink(&log, &link).expect("a link");
            let entered = enter(&Exceptions { logs: vec![link.clone()], ..Exceptions::default() });
            assert_eq!(entered.missing, Vec::<String>::new());
            fs::write(&link, "new").expect("allowed");
            assert_eq!(errno(fs::write(links.join("other"), "")), REFUSED_PATH);
            File::create(logs.join("again")).expect("allowed: the log may have been renamed");
        });
    }

    #[test]
    fn what_was_given_up_before_leaves_no_ring_to_go_around_it() {
        in_child("what_was_given_up_before_leaves_no_ring_to_go_around_it", |_| {
            refuse_rings().expect("given up");
            // SAFETY: without room for its parameters the call would fail anyhow, with another error.
            let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null::<u8>()) };
            assert_eq!(errno_of(ring), Some(libc::ENOSYS));
            assert_eq!(enter(&Exceptions::default()).missing, Vec::<String>::new());
        });
    }

    #[test]
    fn files_are_written_where_it_was_said_and_nowhere_else() {
        in_child("files_are_written_where_it_was_said_and_nowhere_else", |directory| {
            let [tree, state, logs, other] =
                ["tree", "state", "logs", "other"].map(|name| directory.join(name));
            for place in [&tree, &state, &logs, &other] {
                fs::create_dir(place).expect("made");
                fs::write(place.join("old"), "old").expect("written");
            }
            let one = other.join("one");
            fs::write(&one, "old").expect("written");
            let entered = enter(&Exceptions {
                logs: vec![logs.join("access.log"), PathBuf::from("/dev/stderr")],
                states: vec![state.clone()],
                trees: vec![tree.clone(), one.clone()],
                binds_tcp: false,
            });
            assert_eq!(entered.missing, Vec::<String>::new());

            for place in [&tree, &state] {
                fs::write(place.join("new"), "new").expect("allowed");
                fs::create_dir(place.join("inner")).expect("allowed");
                fs::rename(place.join("new"), place.join("inner/moved")).expect("allowed");
                fs::remove_file(place.join("inner/moved")).expect("allowed");
            }
            fs::set_permissions(tree.join("old"), Permissions::from_mode(0o600)).expect("allowed");
            fs::write(&one, "new").expect("allowed");
            fs::write("/dev/null", "new").expect("allowed");
            // A log that somebody else has renamed is opened anew.
            File::options().create(true).append(true).open(logs.join("access.log")).expect("allowed");
            assert_eq!(errno(fs::remove_file(logs.join("old"))), REFUSED_PATH);
            assert_eq!(errno(fs::rename(logs.join("old"), logs.join("new"))), REFUSED_PATH);

            assert_eq!(fs::read(other.join("old")).expect("reading is free"), b"old");
            assert_eq!(errno(fs::write(other.join("new"), "new")), REFUSED_PATH);
            assert_eq!(errno(File::options().append(true).open(other.join("old"))), REFUSED_PATH);
            assert_eq!(errno(fs::remove_file(&one)), REFUSED_PATH);
            assert_eq!(errno(fs::create_dir(other.join("made"))), REFUSED_PATH);
            assert_eq!(errno(std::os::unix::fs::symlink("/", other.join("link"))), REFUSED_PATH);
            assert_eq!(errno(fs::hard_link(other.join("old"), tree.join("link"))), Some(libc::EXDEV));
            for place in [&tree, &state] {
                fs::remove_dir_all(place).expect_err("of it nothing is left but itself");
            }
        });
    }

    #[test]
    fn modes_and_attributes_can_be_changed_only_by_who_may_write_somewhere() {
        in_child("modes_and_attributes_can_be_changed_only_by_who_may_write_somewhere", |directory| {
            let entered =
                enter(&Exceptions { states: vec![directory.to_path_buf()], ..Exceptions::default() });
            assert_eq!(entered.missing, Vec::<String>::new());
            assert_eq!(errno(fs::set_permissions(directory, Permissions::from_mode(0o755))), REFUSED_CALL);
            assert_eq!(errno(std::os::unix::fs::chown(directory, None, None)), REFUSED_CALL);
            let opened = File::open(directory).expect("readable");
            for request in [FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR] {
                // SAFETY: both read 28 bytes at most.
                let answer = unsafe { libc::ioctl(opened.as_raw_fd(), request, [0_u8; 28].as_ptr()) };
                assert_eq!(errno_of(answer), REFUSED_CALL, "{request:x}");
            }
        });
    }

    #[test]
    fn threads_that_were_there_before_are_in_it_too() {
        in_child("threads_that_were_there_before_are_in_it_too", |directory| {
            let path = directory.join("new");
            let (go, wait) = mpsc::channel::<()>();
            let earlier = {
                let path = path.clone();
                thread::spawn(move || {
                    wait.recv().expect("told");
                    (errno(File::create(&path)), errno(Command::new("/bin/true").status()), errno(bind()))
                })
            };
            let entered = enter(&Exceptions::default());
            assert_eq!(entered.missing, Vec::<String>::new());
            go.send(()).expect("waits");
            assert_eq!(earlier.join().expect("no panic"), (REFUSED_PATH, REFUSED_CALL, REFUSED_PATH));
            let later = thread::spawn(move || errno(File::create(path)));
            assert_eq!(later.join().expect("no panic"), REFUSED_PATH);
        });
    }

    #[test]
    fn a_thread_that_cannot_be_reached_is_missing_by_its_name() {
        in_child("a_thread_that_cannot_be_reached_is_missing_by_its_name", |_| {
            let (go, wait) = mpsc::channel::<()>();
            let (blocked, is_blocked) = mpsc::channel::<()>();
            let deaf = thread::Builder::new().name("deaf".into()).spawn(move || {
                // SAFETY: an all-zero set is filled before it is used; only this thread's mask changes.
                unsafe {
                    let mut all: libc::sigset_t = std::mem::zeroed();
                    libc::sigfillset(&raw mut all);
                    libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
                }
                blocked.send(()).expect("waited for");
                wait.recv().expect("told");
            });
            is_blocked.recv().expect("told");
            let entered = enter(&Exceptions::default());
            let [missing] = entered.missing.as_slice() else { panic!("{:?}", entered.missing) };
            assert!(missing.starts_with("Landlock does not hold for the thread deaf ("), "{missing}");
            assert!(entered.landlock_abi > 0 && entered.seccomp);
            go.send(()).expect("waits");
            deaf.expect("started").join().expect("no panic");
        });
    }

    #[test]
    fn no_program_and_no_process_is_started_and_threads_are() {
        in_child("no_program_and_no_process_is_started_and_threads_are", |_| {
            enter(&Exceptions::default());
            assert_eq!(errno(Command::new("/bin/true").status()), REFUSED_CALL);
            // SAFETY: a child, which the test is there to refuse, would end.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: ends the child.
                unsafe { libc::_exit(0) };
            }
            assert_eq!(errno_of(child), REFUSED_CALL);
            // SAFETY: refused before the kernel reads its argument.
            assert_eq!(errno_of(unsafe { libc::syscall(libc::SYS_clone3, 0, 0) }), Some(libc::ENOSYS));
            assert_eq!(thread::spawn(|| 7).join().expect("no panic"), 7);
        });
    }

    #[test]
    fn signals_and_limits_are_for_itself_only() {
        in_child("signals_and_limits_are_for_itself_only", |_| {
            enter(&Exceptions::default());
            let own = process::id() as c_int;
            // SAFETY: signal 0 is sent to nobody; prlimit64 reads nothing and writes nothing with null pointers.
            unsafe {
                let parent = libc::getppid();
                assert_eq!(errno_of(libc::kill(own, 0)), None);
                assert_eq!(errno_of(libc::kill(parent, 0)), REFUSED_CALL);
                assert_eq!(errno_of(libc::kill(0, 0)), REFUSED_CALL);
                assert_eq!(errno_of(libc::syscall(libc::SYS_tgkill, own, libc::gettid(), 0)), None);
                assert_eq!(errno_of(libc::syscall(libc::SYS_tgkill, parent, parent, 0)), REFUSED_CALL);
                let null = std::ptr::null::<u8>();
                for (process, expected) in [(0, None), (own, None), (parent, REFUSED_CALL)] {
                    let limit = libc::syscall(libc::SYS_prlimit64, process, libc::RLIMIT_NOFILE, null, null);
                    assert_eq!(errno_of(limit), expected);
                }
            }
        });
    }

    #[test]
    fn who_may_bind_still_does_not_listen() {
        in_child("who_may_bind_still_does_not_listen", |_| {
            let entered = enter(&Exceptions { binds_tcp: true, ..Exceptions::default() });
            assert_eq!(entered.missing, Vec::<String>::new());
            // bind(2) has succeeded, or it would be REFUSED_PATH.
            assert_eq!(errno(bind()), REFUSED_CALL);
        });
    }

    #[test]
    fn it_connects_and_never_listens() {
        in_child("it_connects_and_never_listens", |_| {
            let upstream = bind().expect("bound");
            enter(&Exceptions::default());
            TcpStream::connect(upstream.local_addr().expect("bound")).expect("allowed");
            assert_eq!(errno(bind()), REFUSED_PATH);
            let socket = |family: c_int, kind: c_int| {
                // SAFETY: numbers; the descriptor is closed with the process.
                errno_of(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) })
            };
            for (family, kind) in [
                (libc::AF_UNIX, libc::SOCK_STREAM),
                (libc::AF_INET, libc::SOCK_DGRAM),
                (libc::AF_NETLINK, libc::SOCK_RAW),
            ] {
                assert_eq!(socket(family, kind), None, "family {family}");
            }
            for (family, kind) in [
                (libc::AF_INET, libc::SOCK_RAW),
                (libc::AF_INET6, libc::SOCK_RAW | libc::SOCK_NONBLOCK),
                (libc::AF_PACKET, libc::SOCK_DGRAM),
                (libc::AF_ALG, libc::SOCK_SEQPACKET),
            ] {
                assert_eq!(socket(family, kind), REFUSED_CALL, "family {family}");
            }
            // SAFETY: numbers.
            let unbound = unsafe { libc::listen(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0), 1) };
            assert_eq!(errno_of(unbound), REFUSED_CALL);
        });
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn calls_under_numbers_of_x32_do_not_pass() {
        in_child("calls_under_numbers_of_x32_do_not_pass", |_| {
            let execve = c_long::from(X32_SYSCALL_BIT) | 520;
            // SAFETY: refused, or not there, before the kernel reads an argument.
            let before = errno_of(unsafe { libc::syscall(execve, 0, 0, 0) });
            assert_ne!(before, REFUSED_CALL);
            enter(&Exceptions::default());
            // SAFETY: as above.
            assert_eq!(errno_of(unsafe { libc::syscall(execve, 0, 0, 0) }), REFUSED_CALL);
        });
    }

    #[test]
    fn a_kernel_that_has_neither_is_no_error() {
        in_child("a_kernel_that_has_neither_is_no_error", |directory| {
            let path = directory.join("new");
            // Landlock first: the second filter forbids others.
            for (call, errno) in
                [(libc::SYS_landlock_create_ruleset, libc::ENOSYS), (libc::SYS_seccomp, libc::EINVAL)]
            {
                let action = SeccompAction::Errno(errno as u32);
                let architecture = env::consts::ARCH.try_into().expect("known");
                let filter =
                    SeccompFilter::new([(call, vec![])].into(), SeccompAction::Allow, action, architecture)
                        .expect("valid");
                install(&BpfProgram::try_from(filter).expect("small")).expect("applied");
            }
            let entered = enter(&Exceptions::default());
            assert!(entered.landlock_abi == 0 && !entered.seccomp, "{entered:?}");
            let [landlock, seccomp] = entered.missing.as_slice() else { panic!("{:?}", entered.missing) };
            assert!(landlock.starts_with("Landlock: the kernel has none"), "{landlock}");
            assert!(seccomp.starts_with("seccomp: "), "{seccomp}");
            fs::write(path, "new").expect("nothing is forbidden");
        });
    }

    fn bind() -> io::Result<TcpListener> {
        TcpListener::bind("127.0.0.1:0")
    }
}
