//! Owns reading a ClientHello without answering it: what a client asks for, to route by, and its bytes, to pass on.
//! Must not know where they are passed to. I/O thread only.

use rustls::server::Acceptor;
use tokio::time::{Instant, timeout_at};

use crate::close::Close;
use crate::handshake::ALERT_UNRECOGNIZED_NAME;
use crate::relay::Scratch;
use crate::step::receive_bytes;
use crate::stream::Stream;
use crate::tls::UNPROCESSED_MAX;

pub struct HelloRead {
    /// In lower case.
    pub server_name: Option<String>,
    /// Offered, preferred first.
    pub alpn: Vec<Vec<u8>>,
    /// Everything that was read.
    pub bytes: Vec<u8>,
}

/// # Errors
/// Why the connection must be closed.
pub async fn read_hello(client: &Stream, deadline: Instant, scratch: &Scratch) -> Result<HelloRead, Close> {
    let mut acceptor = Acceptor::default();
    let mut bytes = Vec::new();
    loop {
        let before = bytes.len();
        let received = timeout_at(deadline, receive_bytes(client, &mut bytes, scratch))
            .await
            .map_err(|_| Close::ClientHandshakeDeadline)?
            .map_err(|_| Close::ClientHandshakeReset)?;
        if received == 0 {
            return Err(Close::ClientHandshakeClosed);
        }
        let mut new = &bytes[before..];
        while !new.is_empty() {
            acceptor.read_tls(&mut new).map_err(|_| Close::ClientHandshakeMalformed)?;
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let hello = accepted.client_hello();
                    let server_name = hello.server_name().map(str::to_ascii_lowercase);
                    let alpn = hello.alpn().map(|all| all.map(<[u8]>::to_vec).collect()).unwrap_or_default();
                    return Ok(HelloRead { server_name, alpn, bytes });
                }
                Err((error, mut alert)) => {
                    let mut record = Vec::new();
                    let _ = alert.write(&mut record);
                    let _ = client.try_write(&record);
                    return Err(Close::from_tls_error(&error));
                }
            }
        }
        if bytes.len() > UNPROCESSED_MAX {
            return Err(Close::ClientHandshakeMalformed);
        }
    }
}

/// Tells a client that nobody here serves what it asked for (RFC 6066 3).
pub fn refuse_name(client: &Stream) {
    let _ = client.try_write(&ALERT_UNRECOGNIZED_NAME);
    let _ = client.shutdown_write();
}
