//! Commands that also wait until a projection has applied them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::dispatcher::Dispatcher;
use super::envelope::Envelope;
use super::target::ToAggregate;
use super::{Execute, ExecuteError, NotExecutedKind, Receipt};
use crate::aggregate::Aggregate;
use crate::event::Position;
use crate::future::BoxFuture;
use crate::projection::WaitError;
use crate::time::FAR;

/// The future receipt of a command.
type FutureReceipt<R, E> = BoxFuture<'static, Result<Receipt<R>, ExecuteError<E>>>;

/// A command that also waits for a projection.
///
/// [`Execute::wait_for`] and [`ExecuteDecision::wait_for`](super::ExecuteDecision::wait_for) create
/// it.
#[must_use = "a command does nothing until it is awaited"]
pub struct ExecuteAndWait<R, E> {
    commands: Arc<Dispatcher>,
    command_id: Uuid,
    /// Executes the command when it is polled.
    receipt: FutureReceipt<R, E>,
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
    pub fn wait_for(self, name: impl Into<String>) -> ExecuteAndWait<A::Reply, A::Error> {
        let (commands, envelope) = (self.commands.clone(), self.envelope.clone());
        ExecuteAndWait::new(commands, &envelope, self.into_future(), name.into())
    }
}

impl<R, E> ExecuteAndWait<R, E> {
    pub(super) fn new(
        commands: Arc<Dispatcher>,
        envelope: &Envelope,
        receipt: FutureReceipt<R, E>,
        name: String,
    ) -> Self {
        let timeout = envelope.receive;
        // A zero timeout means no limit, for the receipt and for the projection.
        let patience = if timeout.is_zero() { FAR } else { timeout };
        Self { commands, command_id: envelope.id, receipt, name, patience }
    }

    /// Sets how long to wait for the projection after the receipt.
    ///
    /// Default: the timeout of the command.
    pub fn within(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }
}

impl<R: Send + 'static, E: Send + 'static> IntoFuture for ExecuteAndWait<R, E> {
    type Output = Result<Applied<R>, ExecuteError<E>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            // Check the name before the command runs: afterwards, a wrong name and a slow
            // projection look the same to the caller.
            let Self { commands, receipt, name, patience, .. } = self;
            let projections = &commands.projections;
            let Some(projection) = projections.iter().find(|one| one.name() == name).cloned() else {
                let known = projections.iter().map(|one| one.name().to_owned()).collect();
                return Err(NotExecutedKind::UnknownProjection { name, known }.into());
            };
            // The drop of the last runtime ends the wait for the receipt.
            drop(commands);
            let receipt = receipt.await?;
            let position = receipt.position;
            let applied = projection.caught_up_to_within(position, patience).await;
            let lag = |error: WaitError| ProjectionLag { position, reason: error.to_string() };
            Ok(Applied { receipt, applied: applied.map_err(lag) })
        })
    }
}

impl<R, E> fmt::Debug for ExecuteAndWait<R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecuteAndWait")
            .field("command_id", &self.command_id)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
