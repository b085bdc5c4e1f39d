//! The wait after a failure of the store or the read model.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;

/// Backoff for failures of the store and the read model, which no event caused.
pub(super) struct Retry {
    backoff: Backoff,
    /// Earliest time of the next attempt.
    at: Instant,
}

impl Retry {
    pub(super) fn new((first, max): (Duration, Duration)) -> Self {
        Self { backoff: Backoff::new(first, max), at: Instant::now() }
    }

    /// Waits after one more failure; returns for how long.
    pub(super) fn later(&mut self) -> Duration {
        let wait = self.backoff.next();
        self.at = Instant::now() + wait;
        wait
    }

    /// Ends the wait.
    pub(super) fn now(&mut self) {
        self.at = Instant::now();
        self.succeeded();
    }

    /// Resets the backoff.
    pub(super) fn succeeded(&mut self) {
        self.backoff.succeeded();
    }

    /// Returns the end of the wait, if the task waits.
    pub(super) fn waits_until(&self) -> Option<Instant> {
        Some(self.at).filter(|at| *at > Instant::now())
    }
}
