//! The runtime: assembles and supervises the components of a node, and shuts them down in order.

mod builder;
mod commands;
mod error;
mod inner;
mod processes;
mod projections;
mod schedules;
mod shutdown;
mod status;
#[cfg(feature = "otel")]
mod status_metrics;

use std::fmt;
use std::sync::Arc;

pub use self::builder::Builder;
pub use self::error::{StartError, UnknownProjection};
use self::inner::Inner;
pub use self::shutdown::ShutdownError;
pub use self::status::RuntimeStatus;
use crate::aggregate::Aggregate;
use crate::command::{
    Command, Envelope, Execute, ExecuteCommand, ExecuteDecision, Handler, ToAggregate, ToHandler,
};
use crate::decide::Decide;
use crate::process::{InstanceHandle, Process};
use crate::projection::ProjectionHandle;
use crate::store::EventStore;

/// A running node. Cheap to clone.
///
/// End it with [`shutdown`](Self::shutdown). Dropping the last clone stops everything at once. This
/// loses no acknowledged event, but callers in progress receive no answer.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

impl Runtime {
    /// Executes a command on the aggregate `id` of type `A`.
    ///
    /// Await the result for the [`Receipt`](crate::Receipt), or set options first, see [`Execute`].
    ///
    /// # Errors
    /// When awaited: the rejection of the aggregate, or another cause that kept the command from
    /// taking effect, see [`ExecuteError`](crate::ExecuteError).
    pub fn execute<A: Aggregate>(
        &self,
        id: impl fmt::Display,
        command: impl Into<A::Command>,
    ) -> Execute<ToAggregate<A>> {
        Execute::new(self.inner.commands.clone(), Some(id.to_string()), command.into(), Envelope::new())
    }

    /// Executes a command with its own type of reply, see [`Command`].
    ///
    /// # Errors
    /// When awaited: as [`execute`](Self::execute). If the aggregate gave the reply to another
    /// command, the error is [`NoReply`](crate::ExecuteError::NoReply).
    pub fn execute_command<C: Command>(&self, id: impl fmt::Display, command: C) -> ExecuteCommand<C> {
        ExecuteCommand::new(self.execute::<C::Aggregate>(id, command))
    }

    /// Decides a command over the events that match a query, on this node: see [`Decide`].
    ///
    /// Await the result for the [`Receipt`](crate::Receipt), or set options first, see
    /// [`ExecuteDecision`]. No registration is needed.
    ///
    /// # Errors
    /// When awaited: the rejection of the decision, or another cause that kept the command from
    /// taking effect, see [`ExecuteError`](crate::ExecuteError).
    pub fn decide<D: Decide>(&self, decision: D) -> ExecuteDecision<D> {
        ExecuteDecision::new(self.inner.commands.clone(), decision)
    }

    /// Executes a command on the handler `H`, on any node that runs it.
    ///
    /// Await the result for the reply, or set options first, see [`Execute`].
    ///
    /// # Errors
    /// When awaited: the rejection of the handler, or another cause that kept the command from
    /// being handled, see [`ExecuteError`](crate::ExecuteError).
    pub fn execute_handler<H: Handler>(&self, command: impl Into<H::Command>) -> Execute<ToHandler<H>> {
        Execute::new(self.inner.commands.clone(), None, command.into(), Envelope::new())
    }

    /// Returns the handle of a projection, which waits, pauses, resets and lists parked events.
    ///
    /// # Errors
    /// If no projection of that name is registered on this node.
    pub fn projection(&self, name: &str) -> Result<&ProjectionHandle, UnknownProjection> {
        let followers = self.inner.processes.iter().map(|process| process.follower());
        let mut projections = self.inner.projections.iter().chain(followers);
        projections.clone().find(|projection| projection.name() == name).ok_or_else(|| UnknownProjection {
            name: name.to_owned(),
            known: projections.by_ref().map(|projection| projection.name().to_owned()).collect(),
        })
    }

    /// Returns the handle of an instance of a process, on any node.
    ///
    /// The process need not run on this node.
    pub fn process<P: Process>(&self, id: impl fmt::Display) -> InstanceHandle<P> {
        InstanceHandle::new(self.inner.store.clone(), id.to_string())
    }

    /// Returns the event store.
    pub fn store(&self) -> &Arc<dyn EventStore> {
        &self.inner.store
    }

    /// Returns the status of all components.
    pub async fn status(&self) -> RuntimeStatus {
        let (aggregates, handlers) = self.inner.commands.registry().status();
        let projections = self.inner.projections.iter();
        let followers = self.inner.processes.iter().map(|process| process.follower());
        let projections = projections.chain(followers);
        let projections = projections.map(|one| (one.name().to_owned(), one.status())).collect();
        RuntimeStatus {
            node: self.inner.node,
            store: self.inner.store.info().clone(),
            high_water_mark: self.inner.store.high_water_mark().await,
            stall: self.inner.store.stall().await,
            writer: self.inner.writer.status(),
            aggregates,
            handlers,
            processes: self.inner.processes.iter().map(|process| process.status()).collect(),
            scheduler: self.inner.scheduler_status(),
            commands: self.inner.commands.status(),
            bus: self.inner.bus.as_ref().map(|bus| bus.state()),
            publisher: self.inner.publisher_status(),
            feed: self.inner.feed.status(),
            projections,
            leases: self.inner.store.leases().await,
        }
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("node", &self.inner.node).finish_non_exhaustive()
    }
}
