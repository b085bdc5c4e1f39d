//! Dispatch of commands from callers to the actors that execute them.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ractor::concurrency::oneshot;
use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

use super::envelope::{Deadline, Envelope};
use super::hooks::{CommandEnd, CommandHooks, CommandInfo};
use super::registry::Registry;
use super::wait::ProjectionWaiter;
use super::wire::{CommandFrame, Expected, FORMAT, Failure, Kind, Outcome};
use super::{Dispatched, ExecuteError};
use crate::bus::BusError;
use crate::codec::to_cbor;
use crate::event::{EncodeError, Metadata, Position};
use crate::future::BoxFuture;
use crate::invalid_option::{DAY, InvalidOption, within};
#[cfg(feature = "nats")]
use crate::store::StoreInfo;
use crate::supervised::Task;
use crate::telemetry::Metrics;

#[cfg(feature = "nats")]
use super::nats::{NatsCommandOptions, NatsNode};

/// Default retention of the records of handlers' commands.
const KEEP_RECORDS: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The transport of commands: within this process ([`local`](Self::local)) or between nodes.
///
/// A command bus is not an event bus. It has its own connection and subjects, and sends every
/// command to the node that owns it. It has no queue groups, because they would send commands to
/// nodes that do not own them:
///
/// ```compile_fail,E0599
/// # use storied::command::CommandBus;
/// let bus = CommandBus::nats("nats://127.0.0.1:4222").queue_group("workers");
/// ```
///
/// ```compile_fail,E0308
/// # use storied::{NatsBus, Runtime};
/// let bus = NatsBus::core("nats://127.0.0.1:4222");
/// let builder = Runtime::builder().commands(bus);
/// ```
///
/// Filters and hooks run on the node that executes a command, on every caller's behalf.
#[derive(Debug, Clone)]
pub struct CommandBus {
    pub(super) hooks: CommandHooks,
    pub(super) command_retention: Duration,
    #[cfg(feature = "nats")]
    pub(super) nats: Option<NatsCommandOptions>,
}

impl Default for CommandBus {
    fn default() -> Self {
        Self::local()
    }
}

impl CommandBus {
    /// Creates a bus whose commands stay within this process. This is the default.
    #[must_use]
    pub fn local() -> Self {
        Self {
            hooks: CommandHooks::default(),
            command_retention: KEEP_RECORDS,
            #[cfg(feature = "nats")]
            nats: None,
        }
    }

    /// Adds a filter: this node accepts only commands for which all filters return `true`.
    ///
    /// A command that this node does not accept goes to another node.
    #[must_use]
    pub fn filter(mut self, filter: impl Fn(&CommandInfo<'_>) -> bool + Send + Sync + 'static) -> Self {
        self.hooks.add_filter(Arc::new(filter));
        self
    }

    /// Adds a hook that runs before every command. It must not block.
    ///
    /// An error of the hook refuses the command, which then goes to no other node.
    #[must_use]
    pub fn before_all(
        mut self,
        hook: impl Fn(&CommandInfo<'_>) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.add_before(None, Arc::new(hook));
        self
    }

    /// Adds a hook that runs before every command of one aggregate category or handler name.
    #[must_use]
    pub fn before(
        mut self,
        name: impl Into<String>,
        hook: impl Fn(&CommandInfo<'_>) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.add_before(Some(name.into()), Arc::new(hook));
        self
    }

    /// Adds a hook that runs after every accepted command, for every result. It must not block.
    #[must_use]
    pub fn after_all(mut self, hook: impl Fn(&CommandInfo<'_>, &CommandEnd) + Send + Sync + 'static) -> Self {
        self.hooks.add_after(None, Arc::new(hook));
        self
    }

    /// Adds a hook that runs after every command of one aggregate category or handler name.
    #[must_use]
    pub fn after(
        mut self,
        name: impl Into<String>,
        hook: impl Fn(&CommandInfo<'_>, &CommandEnd) + Send + Sync + 'static,
    ) -> Self {
        self.hooks.add_after(Some(name.into()), Arc::new(hook));
        self
    }

    /// Sets how long the store keeps the records of handlers' commands.
    ///
    /// A handler's command id takes effect once within this time. The store deletes older records
    /// within 1 hour. Default: 7 days. Range: 1 min to 36,500 days.
    #[must_use]
    pub fn command_retention(mut self, age: Duration) -> Self {
        self.command_retention = age;
        self
    }

    /// Rejects options that are out of range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        let range = Duration::from_secs(60)..=DAY.saturating_mul(36_500);
        within("CommandBus::command_retention", self.command_retention, range)?;
        #[cfg(feature = "nats")]
        if let Some(nats) = &self.nats {
            nats.validate()?;
        }
        Ok(())
    }

    /// Rejects options with which no connection can work.
    pub(crate) fn check(&self) -> Result<(), BusError> {
        #[cfg(feature = "nats")]
        if let Some(nats) = &self.nats {
            return nats.check();
        }
        Ok(())
    }

    pub(crate) fn retention(&self) -> Duration {
        self.command_retention
    }

    pub(crate) fn hooks(&self) -> CommandHooks {
        self.hooks.clone()
    }
}

/// The status of a node's command bus.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommandBusStatus {
    /// Commands stay within this process.
    Local,
    /// Commands reach these other nodes.
    Connected {
        /// Names of the other nodes, sorted.
        ///
        /// Nodes without a recent heartbeat are candidates of last resort.
        nodes: Vec<String>,
        /// Last asynchronous error of the NATS server, for example a missing permission.
        ///
        /// `None` after a reconnect.
        last_error: Option<String>,
    },
    /// The store [does not belong](crate::store::Adoption) to its database.
    ///
    /// Commands stay within this process.
    Incompatible {
        /// Cause and remedy.
        reason: String,
    },
    /// There is no connection. The node retries without limit.
    Disconnected {
        /// Cause.
        reason: String,
    },
}

/// A command in flight to other nodes. The inner future resolves to its result.
type Sent<'a> = BoxFuture<'a, Result<BoxFuture<'static, (Outcome, Duration)>, Failure>>;

/// The dispatcher of commands. Every sender of commands holds it.
pub(crate) struct Dispatcher {
    hooks: CommandHooks,
    metrics: Metrics,
    /// Aggregates and handlers of this node. Set before the runtime has started.
    registry: OnceLock<Registry>,
    follow: OnceLock<Box<dyn ProjectionWaiter>>,
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

/// The first destination of a command.
#[derive(Debug)]
pub(super) enum Route {
    /// An actor of this process. `others`: whether other nodes can execute the command too.
    Local { others: bool },
    /// Other nodes.
    Remote,
}

impl Dispatcher {
    pub(crate) fn new(hooks: CommandHooks, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            hooks,
            metrics,
            registry: OnceLock::new(),
            follow: OnceLock::new(),
            closing: AtomicBool::new(false),
            executor: Task::spawn(std::future::pending()),
            #[cfg(feature = "nats")]
            nats: OnceLock::new(),
            #[cfg(feature = "nats")]
            incompatible: OnceLock::new(),
        })
    }

    /// Starts to accept commands.
    pub(crate) fn open(&self, registry: Registry, follow: Box<dyn ProjectionWaiter>) {
        // The runtime calls this once, so the cells are empty.
        let _ = self.registry.set(registry);
        let _ = self.follow.set(follow);
    }

    /// Joins the other nodes, if the bus reaches any.
    ///
    /// Without a server it retries in the background.
    #[cfg(feature = "nats")]
    pub(crate) async fn connect(self: &Arc<Self>, bus: CommandBus, store: &StoreInfo, incarnation: Uuid) {
        let Some(options) = bus.nats else { return };
        // A copied store would answer commands that are meant for the original.
        if let Some(reason) = store.adoption.problem() {
            tracing::error!(reason, "not joining other nodes; commands stay within this process");
            let _ = self.incompatible.set(reason);
            return;
        }
        let node = NatsNode::start(options, Arc::downgrade(self), store.id, incarnation).await;
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
        let unanswered = self.registry().shut_down(deadline).await;
        #[cfg(feature = "nats")]
        if let Some(nats) = self.nats.get() {
            nats.stop(deadline).await;
        }
        unanswered
    }

    pub(crate) fn hooks(&self) -> &CommandHooks {
        &self.hooks
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
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
        static NOBODY: OnceLock<Registry> = OnceLock::new();
        self.registry.get().unwrap_or_else(|| NOBODY.get_or_init(Registry::default))
    }

    /// Returns the names of the projections on this node.
    pub(super) fn projections(&self) -> Vec<String> {
        self.follow.get().map_or_else(Vec::new, |follow| follow.names())
    }

    pub(super) fn caught_up<'a>(
        &'a self,
        name: &'a str,
        position: Position,
        patience: Duration,
    ) -> BoxFuture<'a, Result<(), String>> {
        match self.follow.get() {
            Some(follow) => follow.caught_up(name, position, patience),
            None => Box::pin(std::future::ready(Err("runtime has not started".into()))),
        }
    }

    /// Routes a command. `able`: whether this node accepts it.
    pub(super) fn way<E>(
        &self,
        kind: Kind,
        name: &'static str,
        info: &CommandInfo<'_>,
        envelope: &Envelope,
        able: bool,
    ) -> Result<Route, ExecuteError<E>> {
        if self.closing.load(Ordering::Acquire) && !envelope.is_nested() {
            return Err(ExecuteError::ShuttingDown);
        }
        if self.executor.is_finished() {
            return Err(ExecuteError::ExecutorEnded);
        }
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
            return nats.way(kind, name, spread, able).map_err(|reason| ExecuteError::Unavailable { reason });
        }
        if able {
            return Ok(Route::Local { others: false });
        }
        if self.registry().endpoint(kind, name).is_some() {
            let reason = format!("a filter of this node does not accept command {}", info.id);
            return Err(ExecuteError::NotAccepted { reason });
        }
        #[cfg(feature = "nats")]
        if let Some(reason) = self.incompatible.get() {
            return Err(ExecuteError::Unavailable { reason: reason.clone() });
        }
        Err(ExecuteError::NoHandler { name, retryable: false })
    }

    pub(super) fn frame<C: Serialize>(
        &self,
        kind: Kind,
        info: &CommandInfo<'_>,
        command: &C,
        envelope: &Envelope,
        prompt: bool,
        deadline: Deadline,
    ) -> Result<CommandFrame, EncodeError> {
        Ok(CommandFrame {
            format: FORMAT,
            id: envelope.id,
            kind,
            name: info.name.to_owned(),
            key: info.key.map(Into::into),
            payload: to_cbor(command)?,
            metadata: envelope.metadata.encode()?.into(),
            expected: Expected::Any,
            left: deadline.left_millis(),
            sent: None,
            attempt: 1,
            prompt,
        })
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

/// The after-hooks of a command of this process, if there are any.
pub(super) struct Watch(Option<Watched>);

struct Watched {
    commands: Arc<Dispatcher>,
    name: &'static str,
    key: Option<String>,
    metadata: Metadata,
}

/// Prepares the after-hooks of a command of this process.
pub(super) fn watched(
    commands: &Arc<Dispatcher>,
    metadata: &Metadata,
    name: &'static str,
    key: Option<&str>,
) -> Watch {
    Watch(commands.hooks.has_after(name).then(|| Watched {
        commands: commands.clone(),
        name,
        key: key.map(Into::into),
        metadata: metadata.clone(),
    }))
}

impl Watch {
    /// Runs the hooks when the command ends, even if its caller has stopped waiting.
    pub(super) fn over<T, E>(self, dispatched: Dispatched<T, E>) -> Dispatched<T, E>
    where
        T: Send + 'static,
        E: std::error::Error + Send + 'static,
    {
        let Some(Watched { commands, name, key, metadata }) = self.0 else { return dispatched };
        let id: Uuid = dispatched.command_id();
        let (sender, receiver) = oneshot();
        tokio::spawn(async move {
            let report = dispatched.report().await;
            let info = CommandInfo { name, key: key.as_deref(), id, metadata: &metadata };
            commands.hooks.after(&info, report.runtime, &report.result);
            // A failed send means that the caller has stopped waiting.
            let _ = sender.send((report.result, report.runtime));
        });
        Dispatched::new(id, async move {
            receiver.await.unwrap_or_else(|_| {
                let reason = "a hook after the command panicked".to_owned();
                (Err(ExecuteError::OutcomeUnknown { command_id: id, reason }), Duration::ZERO)
            })
        })
    }
}
