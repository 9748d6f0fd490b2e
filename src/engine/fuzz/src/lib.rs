//! What is fuzzed, one module for each target: `fuzz_one` takes any bytes and panics when a promise is broken. The
//! modules are also run by the engine's own tests with a bounded random corpus, on a stable compiler.

pub mod proxy_header;
pub mod proxy_header_in;
pub mod server_certificate;
pub mod tickets;
