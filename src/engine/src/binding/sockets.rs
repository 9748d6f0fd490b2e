//! Owns what JavaScript, above all the primary, does with sockets that no engine has: it opens, adopts and shuts listening ones,
//! and hands them to workers. Must not know the settings of listeners. JavaScript thread only.

use std::os::fd::IntoRawFd;

use napi::{Error, Result, Status};
use napi_derive::napi;

use super::{invalid, parse_address};
use crate::handover;
use crate::process;

#[napi(object)]
pub struct OpenedListener {
    /// The caller's to close.
    pub fd: i32,
    /// With the port that was chosen for port 0.
    pub address: String,
}

/// Opens a listening socket at an address and port; `transparent`: also for connections that TPROXY gives it.
/// Throws with the code of bind(2) first in the message: EADDRINUSE, EACCES, …
#[napi(catch_unwind)]
pub fn open_listener(address: String, backlog: u32, transparent: bool) -> Result<OpenedListener> {
    let parsed = parse_address(&address)?;
    let (fd, bound) = process::open_listener(parsed, backlog, transparent)
        .map_err(|error| listen_error(&address, &error))?;
    Ok(OpenedListener { fd, address: bound.to_string() })
}

/// Takes a listening TCP socket that was opened elsewhere, and says where it listens. The caller's to close.
/// Throws with what it is instead.
#[napi(catch_unwind)]
pub fn adopt_listener(fd: i32) -> Result<String> {
    let address = process::adopt_listener(fd).map_err(|error| invalid(error.to_string()))?;
    Ok(address.to_string())
}

/// Refuses clients on a listening socket from now on, in every process that holds it. The descriptor stays open.
#[napi(catch_unwind)]
pub fn shut_listener(fd: i32) -> Result<()> {
    process::shut_listener(fd).map_err(|error| invalid(format!("shutdown: {error}")))
}

/// Throws if somebody already listens at the address, or if it cannot be bound.
#[napi(catch_unwind)]
pub fn probe_address(address: String) -> Result<()> {
    let parsed = parse_address(&address)?;
    process::probe_address(parsed).map_err(|error| listen_error(&address, &error))
}

/// Sets the length of a listening socket's accept queue, also of one that has waiting connections.
#[napi(catch_unwind)]
pub fn set_backlog(fd: i32, backlog: u32) -> Result<()> {
    process::set_backlog(fd, backlog).map_err(|error| invalid(format!("listen: {error}")))
}

fn listen_error(address: &str, error: &std::io::Error) -> Error {
    let code = match error.raw_os_error() {
        Some(libc::EADDRINUSE) => "EADDRINUSE",
        Some(libc::EACCES) => "EACCES",
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL",
        Some(libc::EPERM) => "EPERM",
        _ => "ELISTEN",
    };
    Error::new(Status::GenericFailure, format!("{code} {address}: {error}"))
}

#[napi(object)]
pub struct HandoverChannel {
    /// The primary's end.
    pub primary: i32,
    /// The end that one worker inherits.
    pub worker: i32,
}

/// Opens a channel through which a running worker is handed sockets. Both ends are the caller's to close.
#[napi(catch_unwind)]
pub fn open_handover() -> Result<HandoverChannel> {
    let (primary, worker) = handover::open().map_err(|error| invalid(format!("socketpair: {error}")))?;
    Ok(HandoverChannel { primary: primary.into_raw_fd(), worker: worker.into_raw_fd() })
}

/// Puts sockets into the channel, for the worker to take when it hears of the reload.
#[napi(catch_unwind)]
pub fn hand_over(channel: i32, reload: u32, fds: Vec<i32>) -> Result<()> {
    handover::send(channel, reload, &fds).map_err(|error| invalid(format!("sendmsg: {error}")))
}

/// Has a worker accept nothing any more, also one whose JavaScript thread hangs. No socket can be handed to it after that.
#[napi(catch_unwind)]
pub fn say_farewell(channel: i32) {
    handover::say_farewell(channel);
}
