//! Owns the one capability that workers may keep when root is given up: CAP_NET_RAW, with which a socket may have the address
//! of a client (IP_TRANSPARENT). CAP_NET_ADMIN would do as well, and could change the host's network too.
//! Must not know who needs it. JavaScript thread only: capabilities belong to a thread, and a process gets those of the one
//! that forked it.
//!
//! ```text
//! root ──keep──> setuid (glibc: all threads; the others lose everything) ──hand down──> CAP_NET_RAW alone, ambient
//!                                              fork and exec of a worker: permitted and effective, because ambient ──┘
//! ```

use std::io;

/// linux/capability.h; not in the libc crate.
const CAP_NET_RAW: u32 = 13;
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    /// 0: the calling thread.
    pid: libc::c_int,
}

/// One of two: capabilities 0 to 31, then 32 to 63.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// # Errors
/// As prctl(2).
pub fn keep_over_setuid() -> io::Result<()> {
    control(libc::PR_SET_KEEPCAPS, 1, 0)
}

/// # Errors
/// As capset(2): EPERM when this thread does not have it.
pub fn hand_down_net_raw() -> io::Result<()> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let only = 1 << CAP_NET_RAW;
    let sets = [Sets { effective: only, permitted: only, inheritable: only }, Sets::default()];
    // SAFETY: capset reads a header and, for version 3, two sets, which live through the call; it may write the header.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    control(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, CAP_NET_RAW.into())
}

/// # Errors
/// As prctl(2).
pub fn end_handing_down() -> io::Result<()> {
    control(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0)
}

fn control(option: libc::c_int, first: libc::c_ulong, second: libc::c_ulong) -> io::Result<()> {
    let unused: libc::c_ulong = 0;
    // SAFETY: the options used here take integers and touch no memory of ours.
    match unsafe { libc::prctl(option, first, second, unused, unused) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
