use std::time::Duration;

use crate::aggregate::MOST_IN_FLIGHT;
use crate::invalid_option::{DAY, InvalidOption, within};

/// Options of a handler on a node.
#[derive(Debug, Clone)]
pub struct HandlerOptions {
    pub(crate) workers: usize,
    pub(crate) in_flight: usize,
    pub(crate) admission: Duration,
    pub(crate) time_limit: Duration,
}

/// Default time limit of an attempt.
const TIME_LIMIT: Duration = Duration::from_secs(5 * 60);

impl Default for HandlerOptions {
    fn default() -> Self {
        Self { workers: 1, in_flight: 1_024, admission: Duration::from_secs(1), time_limit: TIME_LIMIT }
    }
}

impl HandlerOptions {
    /// Creates options with the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the number of commands that run concurrently on this node.
    ///
    /// Default: 1, which handles commands sequentially in the order of their arrival. Range: 1 to
    /// 1,000,000. A handler that waits for a nested command releases its worker slot meanwhile. A
    /// [recorded step](super::HandlerContext::run) keeps it.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// Sets the maximum number of queued and running commands.
    ///
    /// Further callers wait for [`admission_timeout`](Self::admission_timeout). Default: 1,024.
    /// Range: 1 to 1,000,000.
    #[must_use]
    pub fn max_in_flight(mut self, commands: usize) -> Self {
        self.in_flight = commands;
        self
    }

    /// Sets how long a command waits for a permit before it fails with `Overloaded`.
    ///
    /// [`max_in_flight`](Self::max_in_flight) limits the permits. Default: 1 s. Range: any; zero
    /// does not wait.
    #[must_use]
    pub fn admission_timeout(mut self, timeout: Duration) -> Self {
        self.admission = timeout;
        self
    }

    /// Sets the time limit of one attempt at a command, including its nested commands.
    ///
    /// The limit is independent of the callers' timeouts. An attempt that exceeds it is dropped
    /// without a record, and its callers get `OutcomeUnknown`. Default: 5 minutes. Range: 1 ms to 1
    /// day.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        within("HandlerOptions::workers", self.workers, 1..=MOST_IN_FLIGHT)?;
        within("HandlerOptions::max_in_flight", self.in_flight, 1..=MOST_IN_FLIGHT)?;
        within("HandlerOptions::time_limit", self.time_limit, Duration::from_millis(1)..=DAY)
    }
}
