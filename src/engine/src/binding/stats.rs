//! Owns the border of what is measured everywhere: latencies and close reasons, with the closed lists of bounds and words. Must
//! not know what took its time. JavaScript thread only.

use napi_derive::napi;

use super::signed;
use crate::close::{CLOSE_REASONS, CloseCounters};
use crate::stats::{HistogramSnapshot, LATENCY_BOUNDS_US};

/// Not cumulative; bucket i counts what is above bound i-1 and at most bound i, the last one what is above all bounds.
#[napi(object)]
pub struct LatencySnapshot {
    pub buckets: Vec<i64>,
    pub sum_us: i64,
}

#[napi(object)]
pub struct CloseSnapshot {
    pub side: String,
    pub phase: String,
    pub reason: String,
    pub count: i64,
}

#[napi(object)]
pub struct CloseReason {
    pub side: String,
    pub phase: String,
    pub reason: String,
    pub meaning: String,
    /// Connections end like this on a day on which nothing is wrong.
    pub ordinary: bool,
}

/// Upper bounds of every latency histogram, in microseconds.
#[napi(catch_unwind)]
pub fn latency_bounds_us() -> Vec<i64> {
    LATENCY_BOUNDS_US.iter().map(|bound| signed(*bound)).collect()
}

/// The closed list of reasons why a connection can end.
#[napi(catch_unwind)]
pub fn close_reasons() -> Vec<CloseReason> {
    CLOSE_REASONS
        .iter()
        .map(|words| CloseReason {
            side: words.side.into(),
            phase: words.phase.into(),
            reason: words.reason.into(),
            meaning: words.meaning.into(),
            ordinary: words.close.is_ordinary(),
        })
        .collect()
}

pub(super) fn latency(snapshot: HistogramSnapshot) -> LatencySnapshot {
    LatencySnapshot {
        buckets: snapshot.buckets.into_iter().map(signed).collect(),
        sum_us: signed(snapshot.sum_us),
    }
}

pub(super) fn close_snapshots(closes: &CloseCounters) -> Vec<CloseSnapshot> {
    closes
        .counts()
        .map(|(words, count)| CloseSnapshot {
            side: words.side.into(),
            phase: words.phase.into(),
            reason: words.reason.into(),
            count: signed(count),
        })
        .collect()
}
