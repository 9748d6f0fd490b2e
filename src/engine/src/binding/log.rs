//! Owns the border of logs, which JavaScript opens and writes to, and of which connections get a line. Must not know what lines
//! say. JavaScript thread only.

use napi::{Error, Result, Status};
use napi_derive::napi;

use super::{ms, signed};
use crate::access_log::{AccessCounts, AccessPlan};
use crate::log::{LineCounts, Log, Target};

/// A log: lines go into a bounded queue, and a thread of its own writes them. Nobody who says something waits.
#[napi]
pub struct LineLog {
    pub(super) log: Log,
}

#[napi]
impl LineLog {
    /// `path`: a file that is appended to, and made when it is not there, readable for its group too unless `secret`; undefined:
    /// standard output.
    ///
    /// Throws when the file cannot be opened.
    #[napi(factory, catch_unwind)]
    pub fn open(path: Option<String>, secret: bool) -> Result<Self> {
        let target = match &path {
            None => Target::StandardOutput,
            Some(path) => Target::File { path: path.into(), mode: if secret { 0o600 } else { 0o640 } },
        };
        let log = Log::open(target).map_err(|error| log_error(path.as_deref(), &error))?;
        Ok(Self { log })
    }

    /// One line, without its end. Dropped when the queue is full.
    #[napi(catch_unwind)]
    pub fn line(&self, text: String) {
        self.log.line(text.as_bytes());
    }

    /// Opens the file by its name again, after a rotation. Throws when it cannot be; the old one stays in use.
    #[napi(catch_unwind)]
    pub fn reopen(&self) -> Result<()> {
        self.log.reopen().map_err(|error| log_error(None, &error))
    }

    /// Waits at most `budget_ms` until everything said before has been written. False when it has not.
    #[napi(catch_unwind)]
    pub fn flush(&self, budget_ms: u32) -> bool {
        self.log.flush(ms(budget_ms))
    }

    #[napi(catch_unwind)]
    pub fn snapshot(&self) -> LogSnapshot {
        let of = |counts: &LineCounts| LineSnapshot {
            written: signed(counts.written.get()),
            dropped: signed(counts.dropped.get()),
        };
        let stats = self.log.stats();
        LogSnapshot { lines: of(&stats.lines), records: of(&stats.records) }
    }
}

/// Lines of one log, by what became of them.
#[napi(object)]
pub struct LineSnapshot {
    pub written: i64,
    /// The reader stalled, or the disk was full.
    pub dropped: i64,
}

#[napi(object)]
pub struct LogSnapshot {
    /// Given as text.
    pub lines: LineSnapshot,
    /// Of connections.
    pub records: LineSnapshot,
}

/// Which connections get a line in the access log.
#[napi(object)]
pub struct AccessSettings {
    /// One in so many; 1: all.
    pub sample: u32,
    /// Lines a second.
    pub rate: u32,
    /// Connections that did not end as they should are not sampled.
    pub failures_always: bool,
}

#[napi(object)]
pub struct AccessSnapshot {
    pub sampled_out: i64,
    pub rate_limited: i64,
}

fn log_error(path: Option<&str>, error: &std::io::Error) -> Error {
    let what = path.map(|path| format!("{path}: ")).unwrap_or_default();
    Error::new(Status::GenericFailure, format!("{what}{error}"))
}

pub(super) fn access_plan(settings: AccessSettings) -> AccessPlan {
    AccessPlan {
        enabled: true,
        sample: settings.sample,
        rate: settings.rate,
        failures_always: settings.failures_always,
    }
}

pub(super) fn access_snapshot(counts: &AccessCounts) -> AccessSnapshot {
    AccessSnapshot {
        sampled_out: signed(counts.sampled_out.get()),
        rate_limited: signed(counts.rate_limited.get()),
    }
}
