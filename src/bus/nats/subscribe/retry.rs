//! Retry policy of event handlers.

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use super::super::limits::redelivery;
use crate::event::DecodeError;
use crate::outage::is_outage;

/// Options of a handler.
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
    /// Creates the default options: one event at a time.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the number of events handled concurrently.
    ///
    /// Default: 1, which keeps their order. Range: 1 to 65,536.
    #[must_use]
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.concurrency = handlers.clamp(1, 65_536);
        self
    }

    /// Leaves the acknowledgement of each delivery to the handler.
    ///
    /// By default, a success acknowledges the delivery, and the [retry policy](Self::retry) decides
    /// after a failure. A delivery that the handler has acknowledged itself is left unchanged.
    #[must_use]
    pub fn manual(mut self) -> Self {
        self.manual = true;
        self
    }

    /// Sets the retry policy of the JetStream driver. Over Core, a failure is an error only.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Keeps given-up events as dead letters.
    ///
    /// The stream is `{NAMESPACE}_DEAD`, the subject `{namespace}.dead.{event name}`. A dead letter
    /// has the unchanged event and headers with the reason. Needs the JetStream driver;
    /// [`for_each`](super::Subscription::for_each) refuses it over Core. Default: off, and a
    /// given-up event is an error only.
    #[must_use]
    pub fn dead_letters(mut self) -> Self {
        self.dead_letters = true;
        self
    }
}

/// The number and the delay of retries after a handler fails.
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
    /// Creates the default policy.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a policy without retries: a failed event is not handled again.
    #[must_use]
    pub fn never() -> Self {
        Self::new().max_attempts(1)
    }

    /// Sets the number of attempts before an event is given up, as the server counts them.
    ///
    /// Default: 10. Minimum: 1.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u64) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// Sets the wait before the second attempt. The wait doubles with each further attempt.
    ///
    /// Default: 200 ms. Range: 1 ms to 1 year.
    #[must_use]
    pub fn initial_backoff(mut self, wait: Duration) -> Self {
        self.first = redelivery(wait.max(Duration::from_millis(1)));
        self
    }

    /// Sets the maximum wait between two attempts.
    ///
    /// Default: 30 s. Range: 1 ms to 1 year.
    #[must_use]
    pub fn max_backoff(mut self, wait: Duration) -> Self {
        self.max = redelivery(wait.max(Duration::from_millis(1)));
        self
    }

    /// The wait after a failed attempt; `None` to give the event up.
    /// A transient error never gives an event up.
    pub(super) fn wait_after(&self, error: &HandleError, attempt: u64) -> Option<Duration> {
        // With one attempt, no event is handled twice, whatever the reason.
        let outage = || (self.attempts > 1 && is_outage(&*error.source)).then_some(self.max);
        if error.retry { self.wait(attempt).or_else(outage) } else { None }
    }

    fn wait(&self, attempt: u64) -> Option<Duration> {
        let doubled = || 2_u32.saturating_pow(u32::try_from(attempt.saturating_sub(1)).unwrap_or(u32::MAX));
        (attempt < self.attempts).then(|| self.first.saturating_mul(doubled()).min(self.max))
    }
}

/// The failure of a handler. `?` converts any error.
///
/// By default, a failure is retried. A [`DecodeError`] is permanent and gives the event up at once.
/// A transient error, such as an outage of a store or an error with such a cause, is retried
/// without a limit.
#[derive(Debug)]
pub struct HandleError {
    pub(super) retry: bool,
    source: Box<dyn Error + Send + Sync>,
}

impl HandleError {
    /// Creates a failure that may succeed when retried.
    pub fn retry(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { retry: true, source: error.into() }
    }

    /// Creates a permanent failure: the event is given up at once.
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
        let policy = RetryPolicy::new().max_attempts(3);
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
