//! Commands whose caller also waits for a projection.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::bus::Commands;
use super::{Execute, ExecuteError, Receipt};
use crate::aggregate::Aggregate;
use crate::event::Position;
use crate::future::BoxFuture;

/// What waits for projections: above this module, as the projections are beside it.
pub(crate) trait Follow: Send + Sync {
    /// The names of the projections of this node.
    fn names(&self) -> Vec<String>;
    /// Waits until the projection `name` has come to `position`.
    fn caught_up<'a>(
        &'a self,
        name: &'a str,
        position: Position,
        patience: Duration,
    ) -> BoxFuture<'a, Result<(), String>>;
}

/// A command whose caller also waits for a projection. Made by [`Execute::wait_for`].
#[must_use = "a command does nothing until it is awaited"]
pub struct ExecuteAndFollow<A: Aggregate> {
    execute: Execute<A>,
    commands: Arc<Commands>,
    name: String,
    patience: Duration,
}

/// What became of a command, and whether a projection knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Followed<R = ()> {
    /// The command took effect: what this says is durable.
    pub receipt: Receipt<R>,
    /// Whether the projection has applied it, or why that is not known.
    pub applied: Result<(), NotApplied>,
}

/// A projection did not come to a position in time. Of the command this says nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the command took effect at position {position}, but it is not known to be applied: {reason}")]
pub struct NotApplied {
    /// The position to come to.
    pub position: Position,
    /// What was in the way.
    pub reason: String,
}

impl<A: Aggregate> ExecuteAndFollow<A> {
    pub(super) fn new(
        execute: Execute<A>,
        commands: Arc<Commands>,
        name: String,
        patience: Duration,
    ) -> Self {
        Self { execute, commands, name, patience }
    }

    /// How long to wait for the projection once the command has its receipt; as long as for the receipt by default.
    pub fn within(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }
}

impl<A: Aggregate> IntoFuture for ExecuteAndFollow<A> {
    type Output = Result<Followed<A::Reply>, ExecuteError<A::Error>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            // Before the command: after it, the caller could not tell a wrong name from a slow projection.
            let known = self.commands.projections();
            if !known.contains(&self.name) {
                return Err(ExecuteError::UnknownProjection { name: self.name, known });
            }
            let receipt = self.execute.await?;
            let position = receipt.position;
            let applied = self.commands.caught_up(&self.name, position, self.patience).await;
            Ok(Followed { receipt, applied: applied.map_err(|reason| NotApplied { position, reason }) })
        })
    }
}

impl<A: Aggregate> fmt::Debug for ExecuteAndFollow<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecuteAndFollow")
            .field("execute", &self.execute)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
