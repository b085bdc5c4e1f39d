//! Waiting times between retries.

use std::time::Duration;

use uuid::Uuid;

use crate::time::FAR;

/// Exponential backoff from `first` to `max`, with jitter.
///
/// Each wait is drawn from the upper half of its range, so that callers that failed together do not
/// retry together.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
    /// Number of waits since the last success.
    failures: u32,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, max: Duration) -> Self {
        // A longer wait has no use, and `FAR` stays within the range of every clock.
        let max = if max.as_secs() < FAR.as_secs() { max } else { FAR };
        Self { first, max, failures: 0 }
    }

    /// Returns the wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.first.saturating_mul(2_u32.saturating_pow(self.failures)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        wait.mul_f64(0.5 + random() / 2.0)
    }

    /// Resets the backoff.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
    }
}

/// Returns `wait`, changed randomly by at most the fraction `by` of it.
pub(crate) fn jitter(wait: Duration, by: f64) -> Duration {
    wait.mul_f64(1.0 - by + 2.0 * by * random())
}

/// Returns a random number from 0 to 1.
fn random() -> f64 {
    // 32 random bits. UUIDs are this crate's source of randomness.
    (Uuid::new_v4().as_u128() & u128::from(u32::MAX)) as f64 / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_with_jitter_up_to_the_maximum_and_starts_over_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(350));
        for whole in [100, 200, 350, 350] {
            let wait = backoff.next();
            assert!(
                wait >= Duration::from_millis(whole / 2) && wait <= Duration::from_millis(whole),
                "{wait:?}"
            );
        }
        backoff.succeeded();
        assert!(backoff.next() <= Duration::from_millis(100));
        let mut patient = Backoff::new(Duration::MAX, Duration::MAX);
        (0..100).for_each(|_| assert!(patient.next() <= FAR));
        backoff.failures = u32::MAX;
        assert!(backoff.next() <= Duration::from_millis(350));
    }
}
