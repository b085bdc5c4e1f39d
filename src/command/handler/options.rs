use std::time::Duration;

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

    /// How many commands are handled at the same time on this node. 1 by default, at least 1: one after the other, in the
    /// order in which they came. A handler that waits for a command of its own gives its place to the next one meanwhile.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers.max(1);
        self
    }

    /// How many commands may be under way or wait for a worker; further callers wait for
    /// [`admission_timeout`](Self::admission_timeout). 1,024 by default, at least 1.
    #[must_use]
    pub fn max_in_flight(mut self, commands: usize) -> Self {
        self.in_flight = commands.clamp(1, u32::MAX as usize);
        self
    }

    /// How long a command waits for its turn at [`max_in_flight`](Self::max_in_flight) before it is answered
    /// `Overloaded`. 1 second by default.
    #[must_use]
    pub fn admission_timeout(mut self, timeout: Duration) -> Self {
        self.admission = timeout;
        self
    }

    /// How long one attempt at a command may take, the commands that it gives included, however long its callers wait. An
    /// attempt that takes longer is dropped without a record, and its callers get `OutcomeUnknown`. Default: 5 minutes.
    /// Range: 1 ms to 1 day; what is outside counts as the nearer end.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit.clamp(Duration::from_millis(1), Duration::from_secs(24 * 60 * 60));
        self
    }
}
