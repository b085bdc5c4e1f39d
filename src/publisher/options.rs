//! Options of the publisher.

use std::time::Duration;

use crate::invalid_option::{InvalidOption, at_least};
use crate::lease;

/// Options of the publisher.
#[derive(Debug, Clone)]
pub struct PublisherOptions {
    pub(super) heartbeat: Duration,
    pub(super) lease: Duration,
}

impl Default for PublisherOptions {
    fn default() -> Self {
        Self { heartbeat: Duration::from_secs(1), lease: Duration::from_secs(6) }
    }
}

impl PublisherOptions {
    /// Creates the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the interval of heartbeats while nothing is published.
    ///
    /// A heartbeat carries the end of the log. Default: 1 s. Minimum: 10 ms.
    #[must_use]
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.heartbeat = every;
        self
    }

    /// Sets the TTL of the lease.
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
        at_least("PublisherOptions::heartbeat", self.heartbeat, Duration::from_millis(10))?;
        lease::check("PublisherOptions::lease_ttl", self.lease)
    }
}
