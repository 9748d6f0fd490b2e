//! keygate's engine: what happens per byte or per handshake. See ../../README.md for the life of a connection.

pub mod proxy_header;
pub mod signing;
pub mod stats;
pub mod stream;
pub mod upstream;
