//! Owns how something is said: one JSON object per line of standard output. Knows none of them.

use std::io::{self, Write};

use serde::Serialize;

/// Fails when nobody listens any more: then there is nobody to measure for.
pub fn say(event: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    io::stdout().lock().write_all(&line)
}

/// Every client is warm, and the clock starts.
#[derive(Serialize)]
#[serde(tag = "event", rename = "started")]
pub struct Started {}
