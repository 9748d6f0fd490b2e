//! Owns the key log: the secrets of every TLS connection, in the format that Wireshark reads (SSLKEYLOGFILE). Whoever has the file
//! reads what was said, so nobody gets one by accident: the primary refuses it without a flag on its command line.
//! Must not know who allowed it. I/O thread only.

use std::fmt::Write;

use crate::log::Log;

pub struct KeyLog(pub Log);

impl std::fmt::Debug for KeyLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyLog")
    }
}

impl rustls::KeyLog for KeyLog {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        let mut line = String::with_capacity(label.len() + 2 * (client_random.len() + secret.len()) + 2);
        line.push_str(label);
        for bytes in [client_random, secret] {
            line.push(' ');
            for byte in bytes {
                // Writing into memory cannot fail.
                let _ = write!(line, "{byte:02x}");
            }
        }
        self.0.line(line.as_bytes());
    }
}
