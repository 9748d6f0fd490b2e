//! keygate's engine: what happens per byte or per handshake. See ../../README.md for the life of a connection.

mod access_log;
#[cfg(not(any(fuzzing, sanitized)))]
mod allocator;
pub mod binding;
mod capabilities;
mod certificates;
mod client_hello;
mod client_rate;
mod client_status;
mod close;
mod connection;
mod fiber;
mod generation;
mod handover;
mod handshake;
mod io_thread;
mod key_log;
mod listener;
pub mod log;
mod parties;
mod policy;
mod process;
pub mod proxy_header;
mod relay;
mod routing;
mod sandbox;
pub mod signing;
mod sockets;
pub mod stats;
mod step;
pub mod stream;
mod ticket_keys;
pub mod tickets;
mod tls;
mod transparent;
pub mod upstream;
mod upstream_tls;
pub mod verify;

/// For the engine's own memory; Node, aws-lc and the PKCS#11 modules keep the process' allocator. Not under the fuzzer
/// or a sanitizer (`sanitized`, test/sanitizers), which must see every allocation.
#[cfg(not(any(fuzzing, sanitized)))]
#[global_allocator]
static ALLOCATOR: allocator::BySize = allocator::BySize;
