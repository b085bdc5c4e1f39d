//! The options of the feed.

use std::time::Duration;

use crate::invalid_option::{InvalidOption, at_least, within};

/// Options of the feed.
#[derive(Debug, Clone)]
pub struct FeedOptions {
    pub(super) capacity: usize,
    pub(super) idle_poll: Duration,
}

impl Default for FeedOptions {
    fn default() -> Self {
        Self { capacity: 128, idle_poll: Duration::from_secs(1) }
    }
}

impl FeedOptions {
    /// Returns the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the number of batches that a follower may lag before it has to read the store.
    ///
    /// A batch has at most 2,048 events or about 1 MiB. Rounded up to a power of two. Default: 128.
    /// Range: 1 to 65,536.
    #[must_use]
    pub fn capacity(mut self, batches: usize) -> Self {
        self.capacity = batches;
        self
    }

    /// Sets the interval at which the feed polls the store while nothing wakes it.
    ///
    /// It bounds the delay of the last event if its notification was lost. Default: 1 s. Range: at
    /// least 10 ms.
    #[must_use]
    pub fn idle_poll(mut self, every: Duration) -> Self {
        self.idle_poll = every;
        self
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        within("FeedOptions::capacity", self.capacity, 1..=65_536)?;
        at_least("FeedOptions::idle_poll", self.idle_poll, Duration::from_millis(10))
    }
}
