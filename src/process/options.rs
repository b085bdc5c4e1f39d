use std::time::Duration;

use crate::invalid_option::{DAY, InvalidOption, within};
use crate::projection::Start;

/// Options of a process.
#[derive(Debug, Clone)]
pub struct ProcessOptions {
    pub(super) start: Start,
    pub(super) lease: Duration,
    pub(super) in_flight: usize,
    pub(super) limits: Limits,
}

/// The limits of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(super) effects: usize,
    pub(super) timers: usize,
    pub(super) depth: u16,
}

impl Default for ProcessOptions {
    fn default() -> Self {
        Self {
            start: Start::Now,
            lease: Duration::from_secs(6),
            in_flight: 1_024,
            limits: Limits { effects: 1_000, timers: 100, depth: 32 },
        }
    }
}

impl ProcessOptions {
    /// Returns the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the first event of a new process.
    ///
    /// The first start records the position. No earlier event is ever delivered, not even after a reset.
    /// Default: [`Start::Now`].
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Sets the TTL of the lease under which a node owns the process.
    ///
    /// If the lease holder dies, another node continues after this time. Default: 6 s. Range: 1 s
    /// to 1 day.
    #[must_use]
    pub fn lease(mut self, ttl: Duration) -> Self {
        self.lease = ttl;
        self
    }

    /// Sets the maximum number of commands in flight for all instances.
    ///
    /// Further commands wait. Default: 1,024. Range: 1 to 1,000,000.
    #[must_use]
    pub fn max_in_flight(mut self, commands: usize) -> Self {
        self.in_flight = commands;
        self
    }

    /// Sets the maximum number of unanswered commands of an instance.
    ///
    /// A reaction that exceeds it parks the instance. Default: 1,000. Range: 1 to 10,000.
    #[must_use]
    pub fn max_open_effects(mut self, effects: usize) -> Self {
        self.limits.effects = effects;
        self
    }

    /// Sets the maximum number of timers of an instance.
    ///
    /// A reaction that exceeds it parks the instance. Default: 100. Range: 1 to 10,000.
    #[must_use]
    pub fn max_timers(mut self, timers: usize) -> Self {
        self.limits.timers = timers;
        self
    }

    /// Sets the maximum length of a chain of reactions.
    ///
    /// An event that a process has caused has the depth 1. If another process reacts to it, the
    /// events that this causes have the depth 2, and so on. An input at the limit parks its
    /// instance, so that processes that trigger each other stop. Default: 32. Range: 1 to 1,000.
    #[must_use]
    pub fn max_depth(mut self, depth: u16) -> Self {
        self.limits.depth = depth;
        self
    }

    /// Rejects options that are out of range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        within("ProcessOptions::lease", self.lease, Duration::from_secs(1)..=DAY)?;
        within("ProcessOptions::max_in_flight", self.in_flight, 1..=1_000_000)?;
        within("ProcessOptions::max_open_effects", self.limits.effects, 1..=10_000)?;
        within("ProcessOptions::max_timers", self.limits.timers, 1..=10_000)?;
        within("ProcessOptions::max_depth", self.limits.depth, 1..=1_000)
    }
}
