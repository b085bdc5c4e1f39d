//! Dispatch of commands from callers to the actors that execute them.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
#[cfg(feature = "nats")]
use uuid::Uuid;

use super::NotExecutedKind;
#[cfg(feature = "nats")]
use super::bus::CommandBus;
use super::bus::CommandBusStatus;
use super::decisions::Decisions;
use super::envelope::{Deadline, Envelope};
use super::hooks::{CommandHooks, CommandInfo};
#[cfg(feature = "nats")]
use super::nats::NatsNode;
use super::registry::Registry;
use super::route::Route;
use super::wire::{CommandFrame, Failure, Kind, Outcome};
use crate::future::BoxFuture;
use crate::projection::ProjectionHandle;
use crate::store::EventStore;
#[cfg(feature = "nats")]
use crate::store::StoreInfo;
use crate::supervised::Task;
use crate::telemetry::Metrics;

/// A command in flight to other nodes. The inner future resolves to its result.
type Sent<'a> = BoxFuture<'a, Result<BoxFuture<'static, (Outcome, Duration)>, Failure>>;

/// The dispatcher of commands. Every sender of commands holds it.
pub(crate) struct Dispatcher {
    pub(super) hooks: CommandHooks,
    pub(super) metrics: Metrics,
    /// Aggregates and handlers of this node. Set before the runtime has started.
    registry: OnceLock<Arc<Registry>>,
    /// Store of the scheduled commands.
    pub(crate) store: Arc<dyn EventStore>,
    /// Notified when this node has scheduled a command.
    pub(crate) scheduled: Notify,
    /// Projections of this node, for callers that wait for them.
    pub(super) projections: Vec<ProjectionHandle>,
    /// Decisions in flight on this node.
    pub(super) decisions: Decisions,
    /// Set at the start of a shutdown. Only handlers in flight may then send commands.
    closing: AtomicBool,
    /// Task that ends with the tokio runtime in which the node was started.
    executor: Task,
    #[cfg(feature = "nats")]
    nats: OnceLock<NatsNode>,
    /// Reason why this node must not join the other nodes.
    #[cfg(feature = "nats")]
    incompatible: OnceLock<String>,
}

impl Dispatcher {
    pub(crate) fn new(
        hooks: CommandHooks,
        metrics: Metrics,
        store: Arc<dyn EventStore>,
        projections: Vec<ProjectionHandle>,
    ) -> Arc<Self> {
        Arc::new(Self {
            hooks,
            metrics,
            registry: OnceLock::new(),
            store,
            scheduled: Notify::new(),
            projections,
            decisions: Decisions::new(),
            closing: AtomicBool::new(false),
            executor: Task::spawn(std::future::pending()),
            #[cfg(feature = "nats")]
            nats: OnceLock::new(),
            #[cfg(feature = "nats")]
            incompatible: OnceLock::new(),
        })
    }

    /// Starts to accept commands.
    pub(crate) fn open(&self, registry: Registry) {
        // The runtime calls this once, so the cell is empty.
        let _ = self.registry.set(Arc::new(registry));
    }

    /// Joins the other nodes, if the bus reaches any.
    ///
    /// Without a server it retries in the background.
    #[cfg(feature = "nats")]
    pub(crate) async fn connect(&self, bus: CommandBus, store: &StoreInfo, incarnation: Uuid) {
        let Some(options) = bus.nats else { return };
        // A copied store would answer commands that are meant for the original.
        if let Some(reason) = store.adoption.problem() {
            tracing::error!(reason, "not joining other nodes; commands stay within this process");
            let _ = self.incompatible.set(reason);
            return;
        }
        let registry = self.registry.get().map(Arc::downgrade).unwrap_or_default();
        let (hooks, metrics) = (self.hooks.clone(), self.metrics.clone());
        let node = NatsNode::start(options, registry, hooks, metrics, store.id, incarnation).await;
        let _ = self.nats.set(node);
    }

    /// Stops admission and waits for the commands in flight.
    ///
    /// Returns the number of commands without an answer at the deadline.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        self.closing.store(true, Ordering::Release);
        #[cfg(feature = "nats")]
        if let Some(nats) = self.nats.get() {
            nats.leave().await;
        }
        let (registry, decisions) = (self.registry(), &self.decisions);
        let (commands, decisions) = tokio::join!(registry.shut_down(deadline), decisions.shut_down(deadline));
        #[cfg(feature = "nats")]
        if let Some(nats) = self.nats.get() {
            nats.stop(deadline).await;
        }
        commands + decisions
    }

    pub(crate) fn status(&self) -> CommandBusStatus {
        #[cfg(feature = "nats")]
        if let Some(nats) = self.nats.get() {
            return nats.status();
        }
        #[cfg(feature = "nats")]
        if let Some(reason) = self.incompatible.get() {
            return CommandBusStatus::Incompatible { reason: reason.clone() };
        }
        CommandBusStatus::Local
    }

    pub(crate) fn registry(&self) -> &Registry {
        static EMPTY: OnceLock<Registry> = OnceLock::new();
        match self.registry.get() {
            Some(registry) => registry,
            None => EMPTY.get_or_init(Registry::default),
        }
    }

    /// Refuses a command after the end of the node.
    ///
    /// During a shutdown, it refuses all but those of handlers in flight.
    pub(super) fn check_open(&self, envelope: &Envelope) -> Result<(), NotExecutedKind> {
        if self.closing.load(Ordering::Acquire) && !envelope.is_nested() {
            return Err(NotExecutedKind::ShuttingDown);
        }
        if self.executor.is_finished() {
            return Err(NotExecutedKind::ExecutorEnded);
        }
        Ok(())
    }

    /// Routes a command; `None` if no node handles it. `able`: whether this node accepts it.
    pub(super) fn route(
        &self,
        kind: Kind,
        name: &str,
        info: &CommandInfo<'_>,
        envelope: &Envelope,
        able: bool,
    ) -> Result<Option<Route>, NotExecutedKind> {
        self.check_open(envelope)?;
        #[cfg(feature = "nats")]
        if let Some(nats) = self.nats.get() {
            let id;
            let spread = match info.key {
                Some(key) => key,
                None => {
                    // Without a key, any node may execute the command. Every attempt chooses the
                    // same.
                    id = info.id.to_string();
                    &id
                }
            };
            return nats
                .route(kind, name, spread, able)
                .map(Some)
                .map_err(|reason| NotExecutedKind::Unavailable { reason });
        }
        if able {
            return Ok(Some(Route::Local { others: false }));
        }
        if self.registry().endpoint(kind, name).is_some() {
            let reason = format!("a filter of this node does not accept command {}", info.id);
            return Err(NotExecutedKind::NotAccepted { reason });
        }
        #[cfg(feature = "nats")]
        if let Some(reason) = self.incompatible.get() {
            return Err(NotExecutedKind::Unavailable { reason: reason.clone() });
        }
        Ok(None)
    }

    /// Sends a command to other nodes.
    ///
    /// With `prompt`, the outer future resolves when a node has accepted the command, and the inner
    /// one with its result.
    pub(super) fn send(&self, frame: CommandFrame, envelope: &Envelope, deadline: Deadline) -> Sent<'_> {
        #[cfg(feature = "nats")]
        if let Some(nats) = self.nats.get() {
            // Boxed, so that futures of local commands stay small.
            return Box::pin(nats.send(frame, envelope.assign_deadline(), deadline));
        }
        let _ = (frame, envelope, deadline);
        let failure = Failure::new(super::wire::Code::Unavailable, "no command bus to other nodes");
        Box::pin(std::future::ready(Err(failure)))
    }
}

impl fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatcher").field("registry", &self.registry).finish_non_exhaustive()
    }
}
