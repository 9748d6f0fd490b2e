//! Owns the estimate of how long a token takes for one signature. Must not know tokens. Lock-free; written by lanes,
//! read by the I/O thread when it chooses between tokens.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A moving average that fades when nothing is measured: a token that once took a minute would otherwise never be
/// asked again, and so never be measured again.
#[derive(Debug, Default)]
pub struct ServiceTime {
    average_us: AtomicU64,
    measured_ms: AtomicU64,
}

/// Each measurement counts for an eighth.
const WEIGHT_SHIFT: u32 = 3;
const HALVED_AFTER_MS: u64 = 1_000;

impl ServiceTime {
    pub fn measured(&self, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let average_us = self.average_us.load(Relaxed);
        let next = if average_us == 0 {
            took_us
        } else {
            average_us - (average_us >> WEIGHT_SHIFT) + (took_us >> WEIGHT_SHIFT)
        };
        // Two lanes may overwrite each other: it is an estimate.
        self.average_us.store(next, Relaxed);
        self.measured_ms.store(now_ms(), Relaxed);
    }

    pub fn estimate(&self) -> Duration {
        let silent_ms = now_ms().saturating_sub(self.measured_ms.load(Relaxed));
        let halvings = (silent_ms / HALVED_AFTER_MS).min(63);
        Duration::from_micros(self.average_us.load(Relaxed) >> halvings)
    }
}

fn now_ms() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_moves_towards_what_is_measured() {
        let time = ServiceTime::default();
        assert_eq!(time.estimate(), Duration::ZERO);
        time.measured(Duration::from_millis(8));
        assert_eq!(time.estimate(), Duration::from_millis(8));
        (0..100).for_each(|_| time.measured(Duration::from_millis(1)));
        assert!(time.estimate() < Duration::from_micros(1_100), "{:?}", time.estimate());
    }
}
