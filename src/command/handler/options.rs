use std::time::Duration;

use crate::aggregate::MOST_IN_FLIGHT;
use crate::invalid_option::{DAY, InvalidOption, within};

/// How a handler is run on a node.
#[derive(Debug, Clone)]
pub struct HandlerOptions {
    pub(crate) workers: usize,
    pub(crate) in_flight: usize,
    pub(crate) admission: Duration,
    pub(crate) time_limit: Duration,
}

/// How long an attempt may take unless set.
const TIME_LIMIT: Duration = Duration::from_secs(5 * 60);

impl Default for HandlerOptions {
    fn default() -> Self {
        Self { workers: 1, in_flight: 1_024, admission: Duration::from_secs(1), time_limit: TIME_LIMIT }
    }
}

impl HandlerOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many commands are handled at the same time on this node. Default: 1, which is one after the other, in the order in
    /// which they came. Range: 1 to 1,000,000. A handler that waits for a command of its own gives its place to the next one meanwhile.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// How many commands may be under way or wait for a worker; further callers wait for
    /// [`admission_timeout`](Self::admission_timeout). Default: 1,024. Range: 1 to 1,000,000.
    #[must_use]
    pub fn max_in_flight(mut self, commands: usize) -> Self {
        self.in_flight = commands;
        self
    }

    /// How long a command waits for its turn at [`max_in_flight`](Self::max_in_flight) before it is answered
    /// `Overloaded`. Default: 1 s. Range: any; with zero it does not wait.
    #[must_use]
    pub fn admission_timeout(mut self, timeout: Duration) -> Self {
        self.admission = timeout;
        self
    }

    /// How long one attempt at a command may take, the commands that it gives included, however long its callers wait. An
    /// attempt that takes longer is dropped without a record, and its callers get `OutcomeUnknown`. Default: 5 minutes.
    /// Range: 1 ms to 1 day.
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
