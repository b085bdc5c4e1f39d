//! The messages of the actor: commands with the port for their answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chrono::{DateTime, Utc};
use ractor::concurrency::OneshotSender;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{Aggregate, ExecuteError, Receipt};
use crate::event::Metadata;
use crate::panic::text_of;
use crate::store::{AppendResult, ExpectedVersion};
use crate::telemetry::trace::CommandSpan;

/// A receipt, or the error of a command without one.
pub(crate) type CommandResult<A> =
    Result<Receipt<<A as Aggregate>::Reply>, ExecuteError<<A as Aggregate>::Error>>;

/// A command request, with everything that a further attempt needs.
pub(crate) struct CommandRequest<A: Aggregate> {
    pub(crate) command: A::Command,
    pub(crate) command_id: Uuid,
    /// Fingerprint of the content. It detects the reuse of an id for another command.
    pub(crate) content: u64,
    pub(crate) metadata: Metadata,
    /// Version of the aggregate that the caller expects.
    pub(crate) expected: ExpectedVersion,
    /// Time until which the caller waits. An undecided command is then dropped for good.
    pub(crate) deadline: Instant,
    /// Arrival time. It is the clock of the decisions.
    pub(crate) now: DateTime<Utc>,
    /// Number of decisions so far.
    pub(crate) attempts: u32,
    pub(crate) span: CommandSpan,
    /// Permit within the router's limit of commands in flight. The answer releases it.
    pub(crate) _permit: OwnedSemaphorePermit,
    pub(crate) reply: OneshotSender<CommandResult<A>>,
}

/// A guard that counts a command as in flight for its aggregate. The answer drops it.
///
/// An aggregate without guards has no queued commands and no speculative state. It can be evicted
/// without loss.
pub(in crate::aggregate) struct InFlightGuard(Arc<AtomicUsize>);

impl InFlightGuard {
    pub(in crate::aggregate) fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter.clone())
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

pub(in crate::aggregate) enum AggregateMessage<A: Aggregate> {
    /// Decide on a command. `InFlightGuard` counts it as in flight until it is dropped.
    Execute(Box<CommandRequest<A>>, InFlightGuard),
    /// The writer answered the oldest append of this actor.
    Committed(AppendResult),
}

/// Answers a caller. Logs an error that the caller no longer waits for.
pub(super) fn answer<R, E: std::fmt::Display>(port: OneshotSender<Result<R, E>>, answer: Result<R, E>) {
    if let Err(Err(error)) = port.send(answer) {
        let error = text_of(&error);
        tracing::warn!(error, "command failed after its caller stopped waiting");
    }
}
