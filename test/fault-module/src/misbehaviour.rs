//! Owns what a module does that has turned against its host: each thing is tried once, and what the kernel said is kept.
//! Must not know PKCS#11, nor who forbids what. Runs on the thread that signs.

use std::env;
use std::ffi::{CString, c_int, c_void};
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::atomic::Ordering::SeqCst;

use crate::control::{Control, DEEDS, Deed};

/// Nothing that the host would notice: what is damaged is the test's own (KEYGATE_FAULT_PREY, a directory with a file `kept`).
pub fn misbehave(control: Control) {
    let prey = PathBuf::from(env::var_os("KEYGATE_FAULT_PREY").unwrap_or_default());
    for (index, deed) in DEEDS.into_iter().enumerate() {
        control.deed(index).store(answer(attempt(deed, &prey)), SeqCst);
    }
}

/// 1: it was done; otherwise errno in the upper half.
fn answer(result: io::Result<()>) -> u64 {
    match result {
        Ok(()) => 1,
        Err(error) => u64::try_from(error.raw_os_error().unwrap_or(0)).unwrap_or(0) << 32,
    }
}

fn attempt(deed: Deed, prey: &Path) -> io::Result<()> {
    let kept = prey.join("kept");
    match deed {
        Deed::Program => Command::new("/bin/true").status().map(drop),
        Deed::Exec => {
            // ENOENT shows that nobody was in the way: what exists would take this process' place.
            let path = CString::new("/nonexistent").map_err(io::Error::other)?;
            let arguments = [path.as_ptr(), ptr::null()];
            // SAFETY: a C string and a list that ends with null.
            done(unsafe { libc::execv(path.as_ptr(), arguments.as_ptr()) }.into())
        }
        Deed::Fork => fork(),
        Deed::Create => File::create(prey.join("created")).map(drop),
        Deed::Overwrite => File::options().write(true).open(&kept).map(drop),
        Deed::Truncate => {
            let path = CString::new(kept.into_os_string().into_encoded_bytes()).map_err(io::Error::other)?;
            // SAFETY: a C string.
            done(unsafe { libc::truncate(path.as_ptr(), 0) }.into())
        }
        Deed::Remove => fs::remove_file(kept),
        Deed::MakeDirectory => fs::create_dir(prey.join("made")),
        Deed::ChangeMode => fs::set_permissions(prey, fs::Permissions::from_mode(0o755)),
        Deed::BindTcp => TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).map(drop),
        Deed::Listen => listen(),
        Deed::RawSocket => socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
        Deed::OddSocket => socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
        Deed::Trace => {
            // ESRCH shows that nobody was in the way: we do not trace it, and attaching would hold up its signals.
            // SAFETY: numbers; nothing is read.
            done(unsafe {
                libc::ptrace(libc::PTRACE_CONT, libc::getppid(), ptr::null::<c_void>(), ptr::null::<c_void>())
            })
        }
        Deed::ReadMemory => read_memory(),
        // SAFETY: two numbers; signal 0 is sent to nobody (kill(2)).
        Deed::Signal => done(unsafe { libc::kill(libc::getppid(), 0) }.into()),
        // SAFETY: one number.
        Deed::Namespace => done(unsafe { libc::unshare(libc::CLONE_NEWUTS) }.into()),
        Deed::Keyring => {
            const KEYCTL_GET_KEYRING_ID: c_int = 0;
            const KEY_SPEC_THREAD_KEYRING: c_int = -1;
            // SAFETY: numbers.
            done(unsafe {
                libc::syscall(libc::SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_THREAD_KEYRING, 1)
            })
        }
        Deed::Ring => ring(),
        Deed::Identity => {
            // SAFETY: numbers; as long as it is the same user nothing changes.
            done(unsafe { libc::syscall(libc::SYS_setuid, libc::getuid()) })
        }
    }
}

/// Also of calls that answer with a descriptor or an identifier.
fn done(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn fork() -> io::Result<()> {
    // SAFETY: the child calls _exit and nothing else.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    done(child.into())?;
    // SAFETY: waits for the child that was just made.
    done(unsafe { libc::waitpid(child, ptr::null_mut(), 0) }.into())
}

/// Without bind(2): the kernel takes any port.
fn listen() -> io::Result<()> {
    // SAFETY: numbers; the descriptor is closed below.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    done(socket.into())?;
    // SAFETY: numbers.
    let result = done(unsafe { libc::listen(socket, 1) }.into());
    // SAFETY: our own descriptor.
    unsafe { libc::close(socket) };
    result
}

fn socket(family: c_int, kind: c_int, protocol: c_int) -> io::Result<()> {
    // SAFETY: numbers.
    let socket = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    done(socket.into())?;
    // SAFETY: our own descriptor.
    unsafe { libc::close(socket) };
    Ok(())
}

fn read_memory() -> io::Result<()> {
    let mut byte = 0_u8;
    let local = libc::iovec { iov_base: ptr::from_mut(&mut byte).cast(), iov_len: 1 };
    // EFAULT shows that nobody was in the way: nothing is mapped at address 0.
    let remote = libc::iovec { iov_base: ptr::null_mut(), iov_len: 1 };
    // SAFETY: `local` describes one byte of ours; `remote` is an address in another process.
    done(unsafe { libc::process_vm_readv(libc::getppid(), &raw const local, 1, &raw const remote, 1, 0) }
        as i64)
}

fn ring() -> io::Result<()> {
    // Larger than struct io_uring_params; all zero is valid.
    let mut parameters = [0_u64; 32];
    // SAFETY: the kernel writes the parameters, for which there is room.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    done(ring)?;
    // SAFETY: the descriptor was just made and is nobody else's.
    unsafe { libc::close(ring as c_int) };
    Ok(())
}
