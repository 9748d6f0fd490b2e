//! Owns how fast a repair may follow itself: ever more slowly, until it was not needed for a while.
//! Must not know what is repaired. Pure; used under the mutexes of those who repair.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

pub(super) struct Pace {
    pause_min: Duration,
    pause_max: Duration,
    last: Option<Instant>,
    pause: Duration,
}

pub(super) const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Short enough that nobody waits long for a token that is well again, and long enough not to keep one from it.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(1);
/// What was well for so many of the longest pauses begins anew with the shortest one.
const FORGOTTEN_AFTER: u32 = 10;

impl Default for Pace {
    fn default() -> Pace {
        Pace::between(PAUSE_MIN, PAUSE_MAX)
    }
}

impl Pace {
    pub const fn between(pause_min: Duration, pause_max: Duration) -> Pace {
        Pace { pause_min, pause_max, last: None, pause: Duration::ZERO }
    }

    /// `Err`: not before then.
    pub fn may_begin(&mut self) -> Result<(), Instant> {
        let Some(last) = self.last else { return Ok(()) };
        if last.elapsed() > self.pause_max * FORGOTTEN_AFTER {
            self.pause = Duration::ZERO;
        }
        match last + self.pause {
            at if at <= Instant::now() => Ok(()),
            at => Err(at),
        }
    }

    pub fn begin(&mut self) {
        self.last = Some(Instant::now());
        self.pause = (self.pause * 2).clamp(self.pause_min, self.pause_max);
    }
}

/// Between a half and the whole of it, so that processes that failed together do not try again together.
pub(super) fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    pause / 2 + pause.mul_f64(random as f64 / u64::MAX as f64 / 2.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_first_is_at_once_and_each_next_one_waits_twice_as_long_up_to_a_maximum() {
        let mut pace = Pace::default();
        assert_eq!(pace.may_begin(), Ok(()));
        for pause_ms in [10, 20, 40, 80, 160, 320, 640, 1000, 1000] {
            pace.begin();
            let not_before = pace.may_begin().unwrap_err();
            assert_eq!(not_before - pace.last.unwrap(), Duration::from_millis(pause_ms));
        }
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let long_ago = Instant::now().checked_sub(2 * FORGOTTEN_AFTER * PAUSE_MAX);
        let mut pace = Pace { last: long_ago, pause: PAUSE_MAX, ..Pace::default() };
        assert_eq!(pace.may_begin(), Ok(()));
        pace.begin();
        assert_eq!(pace.pause, PAUSE_MIN);
    }

    #[test]
    fn a_pause_is_never_longer_and_never_shorter_than_half() {
        for _ in 0..1000 {
            assert!((PAUSE_MAX / 2..=PAUSE_MAX).contains(&jittered(PAUSE_MAX)));
        }
    }
}
