//! How often an event is handled, and when no more.

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use super::super::limits::redelivery;
use crate::event::DecodeError;
use crate::outage::is_outage;

/// How a handler is run.
#[derive(Debug, Clone)]
pub struct HandleOptions {
    pub(super) concurrency: usize,
    pub(super) manual: bool,
    pub(super) retry: RetryPolicy,
    pub(super) dead_letters: bool,
}

impl Default for HandleOptions {
    fn default() -> Self {
        Self { concurrency: 1, manual: false, retry: RetryPolicy::new(), dead_letters: false }
    }
}

impl HandleOptions {
    /// The defaults: one event after the other.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many events are handled at a time. 1 by default, which keeps their order; at least 1 and at most 65,536.
    #[must_use]
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.concurrency = handlers.clamp(1, 65_536);
        self
    }

    /// Leaves it to the handler to settle each delivery. By default it is acknowledged when the handler has succeeded, and
    /// the [retry policy](Self::retry) says what becomes of it when it has not, unless the handler has settled it itself.
    #[must_use]
    pub fn manual(mut self) -> Self {
        self.manual = true;
        self
    }

    /// What becomes of an event on which the handler fails, with the JetStream driver; over Core it is only an error.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Keeps the events that are given up, in the stream `{NAMESPACE}_DEAD` under `{namespace}.dead.{event name}`: as they
    /// were, with headers that say why. Needs the JetStream driver, or [`for_each`](super::Subscription::for_each) refuses
    /// it. Not by default: then they are an error only.
    #[must_use]
    pub fn dead_letters(mut self) -> Self {
        self.dead_letters = true;
        self
    }
}

/// How often, and how late, an event comes again on which a handler failed.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    attempts: u64,
    first: Duration,
    pub(super) max: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { attempts: 10, first: Duration::from_millis(200), max: Duration::from_secs(30) }
    }
}

impl RetryPolicy {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// No event is handled twice because its handler failed.
    #[must_use]
    pub fn never() -> Self {
        Self::new().attempts(1)
    }

    /// How often an event is handled before it is given up, as the server counts. 10 by default, at least 1.
    #[must_use]
    pub fn attempts(mut self, attempts: u64) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// How long to wait before the second attempt, doubled for each that follows up to `max`. 200 ms and 30 s by default;
    /// both at least 1 ms and at most a year, which is as long as a server is asked to wait.
    #[must_use]
    pub fn backoff(mut self, first: Duration, max: Duration) -> Self {
        let bounded = |wait: Duration| redelivery(wait.max(Duration::from_millis(1)));
        (self.first, self.max) = (bounded(first), bounded(max));
        self
    }

    /// The wait behind this attempt; `None` when it was the last.
    /// How long to wait after a handler failed; `None` to give the event up. A transient error never gives an event up.
    pub(super) fn wait_after(&self, error: &HandleError, attempt: u64) -> Option<Duration> {
        // One attempt means that no event is handled twice, whatever the reason.
        let outage = || (self.attempts > 1 && is_outage(&*error.source)).then_some(self.max);
        if error.retry { self.wait(attempt).or_else(outage) } else { None }
    }

    fn wait(&self, attempt: u64) -> Option<Duration> {
        let doubled = || 2_u32.saturating_pow(u32::try_from(attempt.saturating_sub(1)).unwrap_or(u32::MAX));
        (attempt < self.attempts).then(|| self.first.saturating_mul(doubled()).min(self.max))
    }
}

/// Why a handler failed. Made from any error by `?`, and then it is tried again; but a [`DecodeError`] would come every time,
/// and gives the event up at once. A transient error, as an outage of a store, or one with such a cause, is retried without a limit.
#[derive(Debug)]
pub struct HandleError {
    pub(super) retry: bool,
    source: Box<dyn Error + Send + Sync>,
}

impl HandleError {
    /// It may go well the next time.
    pub fn retry(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { retry: true, source: error.into() }
    }

    /// It would fail every time: the event is given up at once.
    pub fn reject(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { retry: false, source: error.into() }
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for HandleError {
    fn from(error: E) -> Self {
        let retry = !(&error as &dyn Any).is::<DecodeError>();
        Self { retry, source: error.into() }
    }
}

impl fmt::Display for HandleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    #[test]
    fn a_transient_error_never_gives_an_event_up() {
        let policy = RetryPolicy::new().attempts(3);
        let away = || StoreError::Unavailable { reason: "test".into(), source: None };
        let fault = HandleError::retry("mine");
        assert!(policy.wait_after(&fault, 2).is_some());
        assert_eq!(policy.wait_after(&fault, 3), None);
        assert_eq!(policy.wait_after(&HandleError::from(away()), 1_000), Some(policy.max));
        assert_eq!(policy.wait_after(&HandleError::retry(away()), 1_000), Some(policy.max));
        assert_eq!(RetryPolicy::never().wait_after(&HandleError::from(away()), 1), None);
        assert_eq!(policy.wait_after(&HandleError::reject(away()), 1), None, "the handler has said so");
    }
}
