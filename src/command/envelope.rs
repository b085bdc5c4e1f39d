//! What every command travels with, whoever handles it.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::command_id;
use crate::event::Metadata;
use crate::time::{FAR, after};

/// How long a dispatcher waits for somebody to take its command unless it says otherwise.
pub const ASSIGN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a caller waits for its answer unless it says otherwise.
pub const RECEIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Who a command is, what came with it, and how long it has.
#[derive(Debug, Clone)]
pub(crate) struct Envelope {
    pub(crate) id: Uuid,
    pub(crate) metadata: Metadata,
    assign: Duration,
    receive: Duration,
    /// No command that another one gives outlives it.
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

    /// For a command that is given while another one is handled.
    pub(super) fn within(id: Uuid, metadata: Metadata, until: Instant) -> Self {
        Self { id, metadata, until: Some(until), ..Self::new() }
    }

    /// Whether another command is being handled that needs this one.
    pub(super) fn is_nested(&self) -> bool {
        self.until.is_some()
    }

    pub(super) fn set_assign(&mut self, timeout: Duration) {
        self.assign = timeout;
    }

    pub(super) fn set_receive(&mut self, timeout: Duration) {
        self.receive = timeout;
    }

    /// When the caller stops waiting, if it does.
    pub(super) fn deadline(&self) -> Deadline {
        let own = (!self.receive.is_zero() && self.receive < FAR).then(|| Instant::now() + self.receive);
        Deadline(own.into_iter().chain(self.until).min())
    }

    /// When somebody must have taken the command, if ever.
    pub(super) fn assign_deadline(&self) -> Deadline {
        Deadline((!self.assign.is_zero() && self.assign < FAR).then(|| Instant::now() + self.assign))
    }

    pub(super) fn timeout(&self) -> Duration {
        self.receive
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

    /// The point in time, or one that nobody lives to see.
    pub(crate) fn instant(self) -> Instant {
        self.0.unwrap_or_else(|| Instant::now() + FAR)
    }

    /// How much time is left; `None` if there is no end to it.
    pub(crate) fn left(self) -> Option<Duration> {
        self.0.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// As it travels to other nodes.
    pub(crate) fn left_millis(self) -> Option<u64> {
        self.left().map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    }

    pub(crate) fn is_over(self) -> bool {
        self.0.is_some_and(|at| at <= Instant::now())
    }
}

macro_rules! envelope_setters {
    () => {
        /// The id under which the command takes effect at most once. Default: a new UUIDv7. Give it one that is derived from
        /// the request, and the request can be repeated safely. Any UUID will do. A UUIDv7 must not be more than a minute
        /// ahead of the clock of the node that executes the command; it is also the cheapest: for other ids an aggregate with
        /// many commands asks the store first.
        pub fn command_id(mut self, id: uuid::Uuid) -> Self {
            self.envelope.id = id;
            self
        }

        /// Ties the events to what set the command off; the command's own id by default.
        pub fn correlation_id(mut self, id: uuid::Uuid) -> Self {
            self.envelope.metadata.correlation_id = Some(id);
            self
        }

        /// The command or event that made somebody give this command. Set already where a handler gives it.
        pub fn causation_id(mut self, id: uuid::Uuid) -> Self {
            self.envelope.metadata.causation_id = Some(id);
            self
        }

        /// The W3C `traceparent` of the caller: the command's span belongs under it. Not needed where the caller's span is the
        /// current one.
        pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
            self.envelope.metadata.traceparent = Some(traceparent.into());
            self
        }

        /// An entry for the metadata.
        pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
            self.envelope.metadata.user.insert(key.into(), value.into());
            self
        }

        /// How long to wait for the answer; 10 seconds by default, zero for as long as it takes. A command that nobody has
        /// begun by then is dropped; one that is under way is answered `OutcomeUnknown`.
        pub fn timeout(mut self, timeout: std::time::Duration) -> Self {
            self.envelope.set_receive(timeout);
            self
        }

        /// How long to wait for a node that takes the command; 5 seconds by default, zero for as long as
        /// [`timeout`](Self::timeout) says. Of no concern in one process.
        pub fn assign_timeout(mut self, timeout: std::time::Duration) -> Self {
            self.envelope.set_assign(timeout);
            self
        }
    };
}
pub(super) use envelope_setters;
