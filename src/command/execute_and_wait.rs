//! Commands that also wait until a projection has applied them.

use std::fmt;
use std::time::Duration;

use super::target::ToAggregate;
use super::{Execute, ExecuteError, NotExecutedKind, Receipt};
use crate::aggregate::Aggregate;
use crate::event::Position;
use crate::future::BoxFuture;
use crate::projection::WaitError;
use crate::time::FAR;

/// A command that also waits for a projection.
///
/// [`Execute::wait_for`] creates it.
#[must_use = "a command does nothing until it is awaited"]
pub struct ExecuteAndWait<A: Aggregate> {
    execute: Execute<ToAggregate<A>>,
    name: String,
    patience: Duration,
}

/// The receipt of a command, and whether a projection has applied it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied<R = ()> {
    /// Receipt of the command. The command is durable.
    pub receipt: Receipt<R>,
    /// Whether the projection has applied the command, or why this is unknown.
    pub applied: Result<(), ProjectionLag>,
}

/// A projection did not reach a position in time. The command itself is durable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("projection has not confirmed position {position}: {reason}; the command itself is durable")]
pub struct ProjectionLag {
    /// Position that the projection had to reach.
    pub position: Position,
    /// Cause.
    pub reason: String,
}

impl<A: Aggregate> Execute<ToAggregate<A>> {
    /// Also waits until the projection `name` of this node has applied the command's events.
    ///
    /// The wait for the projection has the same [`timeout`](Self::timeout), from the receipt on.
    /// The result reports the receipt and the projection separately: a slow projection never looks
    /// like a failed command. If this node runs no such projection, the command is not executed
    /// ([`NotExecutedKind::UnknownProjection`](crate::NotExecutedKind::UnknownProjection)).
    pub fn wait_for(self, name: impl Into<String>) -> ExecuteAndWait<A> {
        let timeout = self.envelope.receive;
        // A zero timeout means no limit, for the receipt and for the projection.
        let patience = if timeout.is_zero() { FAR } else { timeout };
        ExecuteAndWait { execute: self, name: name.into(), patience }
    }
}

impl<A: Aggregate> ExecuteAndWait<A> {
    /// Sets how long to wait for the projection after the receipt.
    ///
    /// Default: the timeout of the command.
    pub fn within(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }
}

impl<A: Aggregate> IntoFuture for ExecuteAndWait<A> {
    type Output = Result<Applied<A::Reply>, ExecuteError<A::Error>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            // Check the name before the command runs: afterwards, a wrong name and a slow
            // projection look the same to the caller.
            let projections = &self.execute.commands.projections;
            let Some(projection) = projections.iter().find(|one| one.name() == self.name).cloned() else {
                let known = projections.iter().map(|one| one.name().to_owned()).collect();
                return Err(NotExecutedKind::UnknownProjection { name: self.name, known }.into());
            };
            let receipt = self.execute.await?;
            let position = receipt.position;
            let applied = projection.caught_up_to_within(position, self.patience).await;
            let lag = |error: WaitError| ProjectionLag { position, reason: error.to_string() };
            Ok(Applied { receipt, applied: applied.map_err(lag) })
        })
    }
}

impl<A: Aggregate> fmt::Debug for ExecuteAndWait<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecuteAndWait")
            .field("execute", &self.execute)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
