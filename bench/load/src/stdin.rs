//! Owns standard input: lines, and its end, without ever waiting for either. Knows not what they mean.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A longer line is nobody's command.
const LINE_BYTES_MAX: usize = 4096;

#[derive(Default)]
pub struct Stdin {
    pending: Vec<u8>,
}

impl Stdin {
    pub fn new(registry: &Registry, token: Token) -> io::Result<Self> {
        let stdin = io::stdin();
        registry.register(&mut SourceFd(&stdin.as_raw_fd()), token, Interest::READABLE).map_err(|error| {
            match error.kind() {
                // epoll knows no files; /dev/null is one.
                ErrorKind::PermissionDenied => {
                    io::Error::other("standard input: expected a pipe or a terminal")
                }
                _ => error,
            }
        })?;
        Ok(Self::default())
    }

    /// What has come since the last time; none at the end.
    pub fn lines(&mut self) -> io::Result<Option<Vec<String>>> {
        let stdin = io::stdin();
        let mut piece = [0; LINE_BYTES_MAX];
        // Asked before each read: the descriptor is shared with whoever started this, and must stay a waiting one.
        while is_readable(&stdin)? {
            match rustix::io::read(&stdin, &mut piece) {
                Ok(0) => return Ok(None),
                Ok(read) => self.pending.extend_from_slice(&piece[..read]),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if self.pending.len() > LINE_BYTES_MAX {
                return Err(io::Error::other("standard input: too much at once"));
            }
        }
        let mut lines = Vec::new();
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            lines.push(String::from_utf8_lossy(line.trim_ascii()).into_owned());
        }
        Ok(Some(lines))
    }
}

fn is_readable(stdin: &io::Stdin) -> io::Result<bool> {
    let mut asked = [PollFd::new(stdin, PollFlags::IN)];
    match poll(&mut asked, Some(&Timespec::default())) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
