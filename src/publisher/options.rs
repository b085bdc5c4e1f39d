//! Options of the publisher.

use std::time::Duration;

use crate::invalid_option::{InvalidOption, at_least};
use crate::lease;

/// Options of the publisher.
#[derive(Debug, Clone)]
pub struct PublisherOptions {
    pub(super) busy_poll: Duration,
    pub(super) idle_poll: Duration,
    pub(super) heartbeat: Duration,
    pub(super) lease: Duration,
}

impl Default for PublisherOptions {
    fn default() -> Self {
        Self {
            busy_poll: Duration::from_millis(5),
            idle_poll: Duration::from_millis(250),
            heartbeat: Duration::from_secs(1),
            lease: Duration::from_secs(6),
        }
    }
}

impl PublisherOptions {
    /// Creates the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the initial poll interval after events were published.
    ///
    /// Appends of other processes are published within this time. Appends of this process wake the
    /// publisher at once. Default: 5 ms. Minimum: 1 ms.
    #[must_use]
    pub fn busy_poll(mut self, every: Duration) -> Self {
        self.busy_poll = every;
        self
    }

    /// Sets the maximum poll interval. The interval doubles up to it while the log is idle.
    ///
    /// Default: 250 ms. Minimum: 10 ms.
    #[must_use]
    pub fn idle_poll(mut self, every: Duration) -> Self {
        self.idle_poll = every;
        self
    }

    /// Sets the interval of heartbeats while nothing is published.
    ///
    /// A heartbeat carries the end of the log. Default: 1 s. Minimum: 10 ms.
    #[must_use]
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.heartbeat = every;
        self
    }

    /// Sets the TTL of the lease on a shared bus.
    ///
    /// If the publishing node dies, another node takes over after this time. Default: 6 s. Range:
    /// 50 ms to 1 day.
    #[must_use]
    pub fn lease_ttl(mut self, ttl: Duration) -> Self {
        self.lease = ttl;
        self
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        at_least("PublisherOptions::busy_poll", self.busy_poll, Duration::from_millis(1))?;
        at_least("PublisherOptions::idle_poll", self.idle_poll, Duration::from_millis(10))?;
        at_least("PublisherOptions::heartbeat", self.heartbeat, Duration::from_millis(10))?;
        lease::check("PublisherOptions::lease_ttl", self.lease)
    }
}
