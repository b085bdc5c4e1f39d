//! The envelope of a command: id, metadata and deadlines.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::command_id;
use crate::event::Metadata;
use crate::time::{FAR, after};

/// Default time that a caller waits until a node accepts its command: 5 s.
pub const ASSIGN_TIMEOUT: Duration = Duration::from_secs(5);

/// Default time that a caller waits for the answer: 10 s.
pub const RECEIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// The id, metadata and deadlines of a command.
#[derive(Debug, Clone)]
pub(crate) struct Envelope {
    pub(crate) id: Uuid,
    pub(crate) metadata: Metadata,
    /// Time that the caller waits until a node accepts the command. Zero: no limit.
    pub(super) assign: Duration,
    /// Time that the caller waits for the answer. Zero: no limit.
    pub(super) receive: Duration,
    /// Deadline of the handler that sends the command. A nested command does not outlive it.
    until: Option<Instant>,
}

impl Envelope {
    pub(crate) fn new() -> Self {
        Self {
            id: command_id::new(),
            metadata: Metadata::default(),
            assign: ASSIGN_TIMEOUT,
            receive: RECEIVE_TIMEOUT,
            until: None,
        }
    }

    /// Creates the envelope of a command that a process sends.
    pub(super) fn of(id: Uuid, metadata: Metadata) -> Self {
        Self { id, metadata, ..Self::new() }
    }

    /// Creates the envelope of a nested command, which a handler sends.
    pub(super) fn within(id: Uuid, metadata: Metadata, until: Instant) -> Self {
        Self { id, metadata, until: Some(until), ..Self::new() }
    }

    /// Returns whether a handler sent this command.
    pub(super) fn is_nested(&self) -> bool {
        self.until.is_some()
    }

    /// Returns the time until which the caller waits, if it is limited.
    pub(super) fn deadline(&self) -> Deadline {
        let own = (!self.receive.is_zero() && self.receive < FAR).then(|| Instant::now() + self.receive);
        Deadline(own.into_iter().chain(self.until).min())
    }

    /// Returns the time until which a node must accept the command, if it is limited.
    pub(super) fn assign_deadline(&self) -> Deadline {
        Deadline((!self.assign.is_zero() && self.assign < FAR).then(|| Instant::now() + self.assign))
    }
}

/// A point in time, or none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    pub(crate) fn after(wait: Duration) -> Self {
        Self(Some(after(wait)))
    }

    pub(crate) fn never() -> Self {
        Self(None)
    }

    /// Returns the point in time, or one in the far future.
    pub(crate) fn instant(self) -> Instant {
        self.0.unwrap_or_else(|| Instant::now() + FAR)
    }

    /// Returns the time left, or `None` without a deadline.
    pub(crate) fn left(self) -> Option<Duration> {
        self.0.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Returns the time left in milliseconds, as the wire format carries it.
    pub(crate) fn left_millis(self) -> Option<u64> {
        self.left().map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    }

    pub(crate) fn is_over(self) -> bool {
        self.0.is_some_and(|at| at <= Instant::now())
    }
}

/// Defines the options of a command that set its `envelope`.
macro_rules! envelope_options {
    () => {
        /// Sets the command id: the idempotency key under which the command takes effect once.
        ///
        /// Default: a new UUIDv7. If the id is derived from a request, the request can be retried
        /// safely. Any UUID is valid. A UUIDv7 must not be more than 1 minute ahead of the clock of
        /// the executing node. It is also the cheapest id: for other ids, an aggregate with many
        /// commands queries the store first.
        pub fn command_id(mut self, id: Uuid) -> Self {
            self.envelope.id = id;
            self
        }

        /// Sets the correlation id of the events. Default: the command id.
        pub fn correlation_id(mut self, id: Uuid) -> Self {
            self.envelope.metadata.correlation_id = Some(id);
            self
        }

        /// Sets the id of the command or event that caused this command.
        ///
        /// A handler's context sets it for the commands that the handler sends.
        pub fn causation_id(mut self, id: Uuid) -> Self {
            self.envelope.metadata.causation_id = Some(id);
            self
        }

        /// Sets the W3C `traceparent` of the caller, the parent of the command's span.
        ///
        /// It is not needed if the caller's span is the current span.
        pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
            self.envelope.metadata.traceparent = Some(traceparent.into());
            self
        }

        /// Adds an entry to the user's map in the metadata.
        pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
            self.envelope.metadata.user.insert(key.into(), value.into());
            self
        }

        /// Sets how long to wait for the answer.
        ///
        /// Default: 10 s. Zero waits without limit. After the timeout, a command that has not
        /// started is dropped, and a command in flight is answered with `OutcomeUnknown`.
        pub fn timeout(mut self, timeout: Duration) -> Self {
            self.envelope.receive = timeout;
            self
        }
    };
}
pub(super) use envelope_options;
