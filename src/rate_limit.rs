//! Rate limits for work that messages of other processes cause: store reads and log lines.

use std::time::Duration;

use tokio::time::Instant;

/// A token bucket, stored as the time at which it is full.
#[derive(Debug)]
pub(crate) struct RateLimit {
    interval: Duration,
    /// Time to refill an empty bucket.
    burst: Duration,
    full_at: Instant,
}

impl RateLimit {
    /// Creates a limit of `burst` tokens at once (minimum 1), and one more per `interval`.
    pub(crate) fn new(burst: u32, interval: Duration) -> Self {
        Self { interval, burst: interval * burst.max(1), full_at: Instant::now() }
    }

    /// Creates the limit of store reads that find nothing: 10 at once, then 20 per second.
    pub(crate) fn of_reads() -> Self {
        Self::new(10, Duration::from_millis(50))
    }

    /// Takes a token, in advance if there is none; returns the time at which it may be used.
    pub(crate) fn take(&mut self) -> Instant {
        let now = Instant::now();
        self.full_at = self.full_at.max(now) + self.interval;
        self.full_at.checked_sub(self.burst).map_or(now, |due| due.max(now))
    }

    /// Takes a token if one is available.
    pub(crate) fn try_take(&mut self) -> bool {
        let now = Instant::now();
        let full_at = self.full_at.max(now) + self.interval;
        let allowed = full_at.checked_sub(self.burst).is_none_or(|due| due <= now);
        if allowed {
            self.full_at = full_at;
        }
        allowed
    }

    /// Returns a token, because its use was productive.
    pub(crate) fn refund(&mut self) {
        if let Some(full_at) = self.full_at.checked_sub(self.interval) {
            self.full_at = full_at;
        }
    }
}

/// A counter of suppressed log lines, so that the next line can report their number.
#[derive(Debug)]
pub(crate) struct LogLimit {
    limit: RateLimit,
    count: u64,
}

impl LogLimit {
    /// Creates a limit of one line per minute.
    pub(crate) fn each_minute() -> Self {
        Self { limit: RateLimit::new(1, Duration::from_secs(60)), count: 0 }
    }

    /// Counts an occurrence. If a line may be written, returns the count since the last line.
    #[cfg(feature = "nats")]
    pub(crate) fn count(&mut self) -> Option<u64> {
        self.add(1)
    }

    /// Counts `more` occurrences. If a line may be written, returns the count since the last line.
    pub(crate) fn add(&mut self, more: u64) -> Option<u64> {
        self.count += more;
        self.limit.try_take().then(|| std::mem::take(&mut self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_allows_a_burst_then_a_rate_and_refunds_tokens() {
        let mut limit = RateLimit::new(3, Duration::from_millis(50));
        let start = Instant::now();
        let waits: Vec<_> = (0..5).map(|_| (limit.take() - start).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 50, 100]);
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..1_000 {
            assert_eq!(limit.take(), Instant::now());
            limit.refund();
        }
    }

    #[cfg(feature = "nats")]
    #[tokio::test(start_paused = true)]
    async fn a_line_per_minute_reports_the_count() {
        let mut limit = LogLimit::each_minute();
        let lines: Vec<_> = (0..100).filter_map(|_| limit.count()).collect();
        assert_eq!(lines, [1]);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(limit.count(), Some(100));
    }
}
