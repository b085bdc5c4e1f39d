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
