//! Owns what JavaScript asks of the process that it runs in, primary or worker: what it gives up, what it hands down, when it
//! ends, its memory, its service manager. Must not know the engine. JavaScript thread only.

use std::path::PathBuf;

use napi::Result;
use napi_derive::napi;

use super::invalid;
use crate::capabilities;
use crate::process;
use crate::sandbox;
use crate::transparent;

/// No new privileges, no core dump, no ptrace by the same user: for processes that hold a PIN.
#[napi(catch_unwind)]
pub fn harden() -> Result<()> {
    process::harden().map_err(|error| invalid(format!("prctl: {error}")))
}

/// What a process in the sandbox may still write or do; everything else is decided in sandbox.rs.
#[napi(object)]
pub struct SandboxSettings {
    /// Files that are opened for appending, again and again: others may be created beside and beneath them.
    pub logs: Vec<String>,
    /// Files, and directories with everything in them, that modules are known to keep their state in.
    pub states: Vec<String>,
    /// The same, as the configuration says it; with any, modes and owners may be changed.
    pub writable: Vec<String>,
    /// Whether connections may be given a source address, as those of transparent upstreams are.
    pub binds_tcp: bool,
}

#[napi(object)]
pub struct SandboxReport {
    /// Version of what the kernel has of Landlock; 0: none is in force.
    pub landlock_abi: u32,
    pub seccomp: bool,
    /// What is not in force although it should be, and why, for people.
    pub missing: Vec<String>,
}

/// Gives up, for good and for every thread, what a worker has no business with. To be called before a module is loaded and
/// before the engine starts. What the kernel does not have is missing in the report, and no error.
#[napi(catch_unwind)]
pub fn enter_sandbox(settings: SandboxSettings) -> SandboxReport {
    let paths = |texts: Vec<String>| texts.into_iter().map(PathBuf::from).collect();
    let entered = sandbox::enter(&sandbox::Exceptions {
        logs: paths(settings.logs),
        states: paths(settings.states),
        trees: paths(settings.writable),
        binds_tcp: settings.binds_tcp,
    });
    SandboxReport { landlock_abi: entered.landlock_abi, seccomp: entered.seccomp, missing: entered.missing }
}

/// For the primary, before it forks workers in a sandbox: no ring of io_uring can be made any more, here and in them. Where the
/// kernel cannot be asked for that, the report of `enterSandbox` in the worker says so.
#[napi(catch_unwind)]
pub fn refuse_rings() {
    let _ = sandbox::refuse_rings();
}

/// Has the coming setuid keep what `hand_down_net_raw` needs, on this thread alone.
#[napi(catch_unwind)]
pub fn keep_capabilities_over_setuid() -> Result<()> {
    capabilities::keep_over_setuid().map_err(|error| invalid(format!("prctl: {error}")))
}

/// After setuid: of all capabilities CAP_NET_RAW is left, to this thread and to the processes that it forks.
#[napi(catch_unwind)]
pub fn hand_down_net_raw() -> Result<()> {
    capabilities::hand_down_net_raw().map_err(|error| invalid(format!("capset: {error}")))
}

/// What this process was handed down, the programs that it starts are not.
#[napi(catch_unwind)]
pub fn end_handing_down() -> Result<()> {
    capabilities::end_handing_down().map_err(|error| invalid(format!("prctl: {error}")))
}

/// Throws EPERM unless this process may use addresses of others (IP_TRANSPARENT).
#[napi(catch_unwind)]
pub fn probe_foreign_address() -> Result<()> {
    transparent::probe_foreign_address().map_err(|error| invalid(error.to_string()))
}

/// Ends this process, by SIGKILL, when the process that forked it has ended.
#[napi(catch_unwind)]
pub fn end_with_parent() -> Result<()> {
    process::end_with_parent().map_err(|error| invalid(format!("prctl: {error}")))
}

/// As `endWithParent`, but by SIGALRM and `forSeconds` later, whatever becomes of JavaScript meanwhile; an engine retires all its
/// sockets at once. Each call holds in place of the one before.
#[napi(catch_unwind)]
pub fn outlive_parent(for_seconds: u32) -> Result<()> {
    process::outlive_parent(for_seconds).map_err(|error| invalid(format!("sigaction or prctl: {error}")))
}

/// Gives memory that is free inside this process back to the system.
#[napi(catch_unwind)]
pub fn trim_memory() {
    process::trim_memory();
}

/// Sends `state`, lines of `NAME=value`, to the service manager's datagram socket. Throws when it is not taken.
#[napi(catch_unwind)]
pub fn notify(socket: String, state: String) -> Result<()> {
    process::notify(&socket, &state).map_err(|error| invalid(format!("{socket}: {error}")))
}
