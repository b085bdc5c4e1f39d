//! A decided command that waits for its answer.

use super::super::{Aggregate, ExecuteError};
use super::message::{CommandRequest, InFlightGuard};
use crate::event::Version;

/// A decided command without an answer.
pub(super) struct Pending<A: Aggregate> {
    pub(super) order: Box<CommandRequest<A>>,
    pub(super) load: InFlightGuard,
    pub(super) decided: PendingOutcome<A>,
    /// Span from the decision to the end of the append.
    pub(super) _append: Option<Box<tracing::Span>>,
    /// Repetitions of the command that arrived meanwhile. They get the same answer.
    pub(super) repeated: Vec<(Box<CommandRequest<A>>, InFlightGuard)>,
}

pub(super) enum PendingOutcome<A: Aggregate> {
    /// Events that are folded into the state and whose append is in flight.
    Events { first: Version, last: Version, reply: A::Reply },
    /// No events.
    ///
    /// The answer waits until all events up to `version`, the base of the decision, are durable.
    Answer { version: Version, result: Result<A::Reply, ExecuteError<A::Error>> },
}
