//! Owns latency samples and their percentiles. Exact: a benchmark is bounded, so every sample is kept.

use std::time::Duration;

/// Durations in whole microseconds.
#[derive(Default)]
pub struct Latency(Vec<u32>);

/// What is printed of them.
const PERCENTILES: [(&str, f64); 5] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p999", 99.9), ("max", 100.0)];

impl Latency {
    pub fn observe(&mut self, duration: Duration) {
        self.0.push(u32::try_from(duration.as_micros()).unwrap_or(u32::MAX));
    }

    /// `{"p50":...}` in microseconds; every value null when there are no samples.
    pub fn json(&mut self) -> String {
        self.0.sort_unstable();
        let fields = PERCENTILES.map(|(name, percent)| match nearest_rank(&self.0, percent) {
            Some(value) => format!("\"{name}\":{value}"),
            None => format!("\"{name}\":null"),
        });
        format!("{{{}}}", fields.join(","))
    }
}

/// The smallest sample that at least `percent` of all samples do not exceed.
fn nearest_rank(sorted: &[u32], percent: f64) -> Option<u32> {
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_sample_that_so_many_do_not_exceed() {
        let hundred: Vec<u32> = (1..=100).collect();
        for (percent, value) in [(50.0, 50), (90.0, 90), (99.0, 99), (99.9, 100), (100.0, 100), (0.0, 1)] {
            assert_eq!(nearest_rank(&hundred, percent), Some(value), "{percent}");
        }
        assert_eq!(nearest_rank(&[7], 50.0), Some(7));
        assert_eq!(nearest_rank(&[], 50.0), None);
    }

    #[test]
    fn samples_are_printed_in_microseconds_whatever_their_order() {
        let mut latency = Latency::default();
        for millis in [3, 1, 2] {
            latency.observe(Duration::from_millis(millis));
        }
        assert_eq!(latency.json(), r#"{"p50":2000,"p90":3000,"p99":3000,"p999":3000,"max":3000}"#);
        assert_eq!(Latency::default().json(), r#"{"p50":null,"p90":null,"p99":null,"p999":null,"max":null}"#);
    }
}
