//! How long to wait before trying again.

use std::time::Duration;

use uuid::Uuid;

use crate::time::FAR;

/// Doubles from `first` to `max`. Each wait is drawn from its upper half, so that those who failed together do not all come
/// back together.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
    /// How many waits there were since the last success.
    failures: u32,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, max: Duration) -> Self {
        // Nobody waits longer, and no clock ends before.
        let max = if max.as_secs() < FAR.as_secs() { max } else { FAR };
        Self { first, max, failures: 0 }
    }

    /// How long to wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.first.saturating_mul(2_u32.saturating_pow(self.failures)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        wait.mul_f64(0.5 + random() / 2.0)
    }

    /// Forgets the failures.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
    }
}

/// `wait`, give or take up to the part `by` of it.
#[cfg(feature = "nats")]
pub(crate) fn jitter(wait: Duration, by: f64) -> Duration {
    wait.mul_f64(1.0 - by + 2.0 * by * random())
}

/// From 0 to 1.
fn random() -> f64 {
    // 32 random bits; a UUID is where this crate gets randomness from.
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
