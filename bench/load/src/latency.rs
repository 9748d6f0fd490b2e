//! Owns latency samples, their percentiles and their histogram. Knows not what was measured.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Beyond this a sample counts as this; no deadline is so long.
const US_MAX: u64 = 700_000_000;
/// Percentiles are right within 0.1 %.
const SIGNIFICANT_DIGITS: u8 = 3;
/// For plots: 30 octaves hold everything from one microsecond to the longest.
const BUCKETS_PER_OCTAVE: f64 = 2.0;

/// Durations in whole microseconds.
pub struct Latency(Histogram<u64>);

/// What is printed of them; nothing when there are no samples.
#[derive(Serialize, Debug, PartialEq)]
pub struct Summary {
    p50: Option<u64>,
    p90: Option<u64>,
    p99: Option<u64>,
    p999: Option<u64>,
    max: Option<u64>,
    /// Upper bound and count of every bucket that has one.
    histogram: Vec<(u64, u64)>,
}

impl Default for Latency {
    fn default() -> Self {
        Self(
            Histogram::new_with_bounds(1, US_MAX, SIGNIFICANT_DIGITS)
                .expect("the bounds are constant and valid"),
        )
    }
}

impl Latency {
    pub fn observe(&mut self, duration: Duration) {
        self.0.saturating_record(u64::try_from(duration.as_micros()).unwrap_or(US_MAX));
    }

    pub fn summary(&self) -> Summary {
        let quantile = |q| (!self.0.is_empty()).then(|| self.0.value_at_quantile(q));
        Summary {
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: (!self.0.is_empty()).then(|| self.0.max()),
            histogram: self.buckets(),
        }
    }

    fn buckets(&self) -> Vec<(u64, u64)> {
        let mut buckets: Vec<(u64, u64)> = Vec::new();
        for step in self.0.iter_recorded() {
            let upper = bucket_upper(step.value_iterated_to());
            match buckets.last_mut() {
                Some((last, count)) if *last == upper => *count += step.count_at_value(),
                _ => buckets.push((upper, step.count_at_value())),
            }
        }
        buckets
    }
}

fn bucket_upper(us: u64) -> u64 {
    let octaves = (us.max(1) as f64).log2();
    ((octaves * BUCKETS_PER_OCTAVE).ceil() / BUCKETS_PER_OCTAVE).exp2().round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_that_so_many_do_not_exceed() {
        let mut latency = Latency::default();
        for us in (1..=1000).rev() {
            latency.observe(Duration::from_micros(us));
        }
        let summary = latency.summary();
        assert_eq!(
            [summary.p50, summary.p90, summary.p99, summary.p999, summary.max],
            [500, 900, 990, 999, 1000].map(Some)
        );
        assert_eq!(latency.summary().histogram.iter().map(|(_, count)| count).sum::<u64>(), 1000);
    }

    #[test]
    fn without_samples_there_is_nothing_to_say() {
        let nothing = Latency::default().summary();
        assert_eq!([nothing.p50, nothing.p90, nothing.p99, nothing.p999, nothing.max], [None; 5]);
        assert_eq!(nothing.histogram, []);
    }

    #[test]
    fn any_latency_finds_its_bucket_and_there_are_few_of_them() {
        let mut latency = Latency::default();
        let mut us = 0;
        while us < 2 * US_MAX {
            latency.observe(Duration::from_micros(us));
            us += 1 + us / 64;
        }
        let buckets = latency.summary().histogram;
        assert!(buckets.len() <= 60, "{}", buckets.len());
        assert!(buckets.is_sorted_by(|left, right| left.0 < right.0), "{buckets:?}");
        assert_eq!(
            (bucket_upper(0), bucket_upper(1), bucket_upper(1000), bucket_upper(1024)),
            (1, 1, 1024, 1024)
        );
    }
}
