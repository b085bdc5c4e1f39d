//! The runtime: assembles and supervises the components of a node, and shuts them down in order.

mod commands;
mod projections;
#[cfg(feature = "otel")]
mod status_metrics;
mod supervisor;

use std::any::type_name;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ractor::SpawnErr;
use tokio::time::Instant;
use uuid::Uuid;

use self::commands::{Following, HandlerRegistration, forgetting};
use self::projections::ProjectionRegistration;
use self::supervisor::Supervisor;
use crate::aggregate::{Aggregate, AggregateOptions, Router, RouterStatus, node_runs};
use crate::bus::{BusError, BusState, EventBus, IntoEventBus, LocalBus};
use crate::command::{
    CommandBus, CommandBusStatus, Dispatcher, Envelope, Execute, Handler, HandlerOptions, HandlerStatus,
    Registry, Request, StartRouterError,
};
use crate::event::{EncodeError, Event, EventTypes, InvalidName, Position};
use crate::feed::{Feed, FeedOptions, FeedStatus};
use crate::invalid_option::{DAY, InvalidOption, within};
use crate::lease::LeaseWatcher;
use crate::partition;
use crate::projection::{
    self, BuildTarget, Lookup, NodeServices, Projection, ProjectionFactory, ProjectionHandle,
    ProjectionOptions, ProjectionStatus, ReadModel,
};
use crate::publisher::{Publisher, PublisherOptions, PublisherStatus};
use crate::startup::{self, START_TIMEOUT};
use crate::store::{
    EventStore, GroupCommitter, HighWaterStall, IntoEventStore, LeaseInfo, StoreError, StoreInfo,
    WriterOptions, WriterStatus,
};
use crate::supervised::Task;
use crate::telemetry::Metrics;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;
use crate::time::after;

/// Time that [`Runtime::shutdown`] waits for work in progress.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// Upper limit of the time that a shutdown reserves for the publisher, and for the projections.
const SHUTDOWN_RESERVE: Duration = Duration::from_secs(2);

/// A running node. Cheap to clone.
///
/// End it with [`shutdown`](Self::shutdown). Dropping the last clone stops everything at once. This
/// loses no acknowledged event, but callers in progress receive no answer.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    node: Uuid,
    store: Arc<dyn EventStore>,
    bus: Arc<dyn EventBus>,
    writer: GroupCommitter,
    publisher: Publisher,
    feed: Feed,
    /// Projections, in the order of their registration.
    projections: Vec<ProjectionHandle>,
    commands: Arc<Dispatcher>,
    /// Task that deletes expired records of commands; ends with the runtime.
    _forgetting: Option<Task>,
    /// Root of the supervision tree; stopping it stops everything.
    supervisor: Supervisor,
}

/// Assembles a [`Runtime`]. See [`Runtime::builder`].
#[must_use = "nothing runs before start()"]
pub struct Builder {
    store: Option<Arc<dyn EventStore>>,
    bus: Arc<dyn EventBus>,
    publisher: PublisherOptions,
    aggregates: Vec<Registration>,
    commands: CommandBus,
    handlers: Vec<HandlerRegistration>,
    feed: FeedOptions,
    projections: Vec<ProjectionRegistration>,
    start_timeout: Duration,
    #[cfg(feature = "otel")]
    telemetry: Option<Telemetry>,
}

/// A registered aggregate type, until the runtime starts.
struct Registration {
    category: &'static str,
    type_name: &'static str,
    /// Checks that the events can be stored.
    check: fn() -> Result<(), EncodeError>,
    options: Result<(), InvalidOption>,
    start: Box<StartAggregate>,
}

type StartAggregate = dyn FnOnce(&mut Registry, Arc<dyn EventStore>, GroupCommitter, &Supervisor) -> Result<(), StartRouterError>
    + Send;

/// A reason why a runtime does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The builder has no store.
    #[error("no event store; choose one with Runtime::builder().store(…)")]
    NoStore,
    /// Two aggregates have the same category, so their streams would mix.
    #[error("duplicate category: {first} and {second} both have {category:?}; give each aggregate its own")]
    SameCategory {
        /// The category.
        category: &'static str,
        /// The Rust type of the first aggregate.
        first: &'static str,
        /// The Rust type of the second aggregate.
        second: &'static str,
    },
    /// The name of a projection has characters that operators cannot type or see.
    #[error("invalid projection name {name:?}: {reason}")]
    ProjectionName {
        /// The first 80 characters of the name.
        name: String,
        /// The cause.
        reason: &'static str,
    },
    /// Two projections have the same name, so they would share a checkpoint.
    #[error("duplicate projection name {name:?}: a checkpoint belongs to one projection; rename one of them")]
    SameProjection {
        /// The name.
        name: String,
    },
    /// A projection would follow the bus durably, but this bus stores no events.
    #[error(
        "projection {name:?} cannot follow the bus durably: {bus} stores no events; use NATS JetStream, or FollowMode::Feed"
    )]
    NotDurable {
        /// The projection.
        name: String,
        /// The bus.
        bus: &'static str,
    },
    /// The projection cannot have this number of partitions.
    #[error("projection {name:?} cannot have {partitions} partitions: {reason}")]
    Partitions {
        /// The projection.
        name: String,
        /// The number of partitions that was set.
        partitions: u16,
        /// The cause.
        reason: &'static str,
    },
    /// The events of an aggregate cannot be stored, or a filter of a projection has unknown names.
    #[error(transparent)]
    Events(#[from] EncodeError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An option of the event bus or of the command bus is invalid.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Two handlers have the same name, so their commands and records would mix.
    #[error(
        "duplicate handler name {name:?}: commands and records belong to one handler; rename one of them"
    )]
    SameHandler {
        /// The name.
        name: &'static str,
    },
    /// The name of a handler is not a valid name of a command.
    #[error(transparent)]
    HandlerName(#[from] InvalidName),
    /// An option is out of its range.
    #[error(transparent)]
    Option(#[from] InvalidOption),
    /// A projection that delivers to another system has no start position.
    ///
    /// It has never run, and the log has events. The options must state whether to deliver these.
    #[error(
        "projection {name:?} has no start position: it delivers at least once, has no checkpoint, and the log has events; choose ProjectionOptions::start(Start::Beginning), Start::Now, Start::At(position) or Start::Since(time)"
    )]
    NoStartPosition {
        /// The projection.
        name: String,
    },
    /// Another runtime of this process folds into the same memory.
    #[error(
        "the in-memory state of projection {name:?} is in use by another runtime of this process; shut down that runtime first, or create a state for each runtime"
    )]
    StateInUse {
        /// The projection.
        name: String,
    },
    /// An actor did not start.
    #[error("starting an actor failed: {0}")]
    Actor(String),
}

impl From<SpawnErr> for StartError {
    fn from(error: SpawnErr) -> Self {
        Self::Actor(error.to_string())
    }
}

/// A projection name that this node does not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no projection {name:?}; {}", node_runs(known))]
pub struct UnknownProjection {
    /// The requested name.
    pub name: String,
    /// The names of the projections of this node.
    pub known: Vec<String>,
}

impl From<StartRouterError> for StartError {
    fn from(error: StartRouterError) -> Self {
        match error {
            StartRouterError::Events(error) => Self::Events(error),
            StartRouterError::Spawn(error) => error.into(),
        }
    }
}

/// The components that did not end in time when a runtime was shut down.
///
/// No acknowledged event is lost. The unfinished work was not acknowledged; it continues from its
/// checkpoint at the next start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shutdown incomplete after {timeout:?}: {}", unfinished.join(", "))]
pub struct ShutdownError {
    /// The time limit.
    pub timeout: Duration,
    /// The unfinished components and work.
    pub unfinished: Vec<String>,
}

/// The status of a node.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RuntimeStatus {
    /// The id of the node, new at every start.
    pub node: Uuid,
    /// The store.
    pub store: StoreInfo,
    /// The high-water mark of the log, or the error of reading it.
    pub high_water_mark: Result<Position, StoreError>,
    /// The transaction that holds back the high-water mark, if any. A running append is harmless.
    pub stall: Result<Option<HighWaterStall>, StoreError>,
    /// The group-commit writer.
    pub writer: WriterStatus,
    /// The aggregate types, by category.
    pub aggregates: Vec<RouterStatus>,
    /// The handlers, by name.
    pub handlers: Vec<HandlerStatus>,
    /// The connection to the other nodes, for commands.
    pub commands: CommandBusStatus,
    /// The connection to the bus.
    pub bus: BusState,
    /// The publisher.
    pub publisher: PublisherStatus,
    /// The live tail of the log in this process.
    pub feed: FeedStatus,
    /// The projections, by name.
    pub projections: BTreeMap<String, ProjectionStatus>,
    /// The leases and their holders, or the error of reading them.
    pub leases: Result<Vec<LeaseInfo>, StoreError>,
}

impl Builder {
    /// Sets the event store. Required.
    ///
    /// Also accepts a shared store, as [`Runtime::store`] returns it.
    pub fn store(mut self, store: impl IntoEventStore) -> Self {
        self.store = Some(store.into_event_store());
        self
    }

    /// Sets the bus that carries the log to the projections of all nodes that it reaches.
    ///
    /// Default: [`LocalBus`].
    pub fn bus(mut self, bus: impl IntoEventBus) -> Self {
        self.bus = bus.into_event_bus();
        self
    }

    /// Sets how the log is published to the bus.
    pub fn publisher(mut self, options: PublisherOptions) -> Self {
        self.publisher = options;
        self
    }

    /// Sets how this node follows the log.
    pub fn feed(mut self, options: FeedOptions) -> Self {
        self.feed = options;
        self
    }

    /// Sets where metrics go, those of the bus included. Default: [`Telemetry::global`].
    #[cfg(feature = "otel")]
    pub fn telemetry(mut self, telemetry: Telemetry) -> Self {
        self.telemetry = Some(telemetry);
        self
    }

    /// Runs a projection over its read model, with the default options.
    pub fn projection<P, R>(self, projection: P, read_model: R) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        self.projection_with(projection, read_model, ProjectionOptions::new())
    }

    /// Runs a projection over its read model.
    pub fn projection_with<P, R>(self, projection: P, read_model: R, options: ProjectionOptions) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        self.project(ProjectionFactory::Single(projection), None, read_model, options)
    }

    /// Runs a projection that can be [rebuilt](ProjectionHandle::rebuild) next to the live version.
    ///
    /// `make` creates the projection for each version of its read model, in tables of its own. Some
    /// read models cannot cut over in a transaction: [`InMemory`](crate::projection::InMemory) and
    /// [`AtLeastOnce`](crate::projection::AtLeastOnce). On these the projection runs as any other, and a
    /// rebuild is [refused](crate::projection::ControlError::NotRebuildable).
    pub fn rebuildable<P, R>(
        self,
        make: impl Fn(BuildTarget) -> P + Send + Sync + 'static,
        read_model: R,
        options: ProjectionOptions,
    ) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        self.project(ProjectionFactory::Versioned(Arc::new(make)), None, read_model, options)
    }

    /// Runs a projection in `partitions` partitions, with the default options.
    ///
    /// All nodes that register it share the partitions evenly. A partition applies the events of
    /// [its](crate::Partition) streams, in their order. `make` creates the projection for each
    /// partition, and for each version of a [rebuild](ProjectionHandle::rebuild); all have the same
    /// name and filter.
    ///
    /// Range: 1 to 256. The first start fixes the number. Nodes beyond the number of partitions
    /// stay idle, so choose the largest number of nodes that you expect. Changing it needs a
    /// [reset](ProjectionHandle::reset).
    ///
    /// The partitions of a node share the pages that they read. A node keeps at most 4 pages of
    /// about 4 MiB each, and as many for a rebuild; it drops a page that no partition has used for
    /// 5 s. At the start each partition acquires a lease and claims its checkpoint: some
    /// milliseconds each on SQLite, which commits one after the other.
    pub fn partitioned<P, R>(
        self,
        partitions: u16,
        make: impl Fn(BuildTarget) -> P + Send + Sync + 'static,
        read_model: R,
    ) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        self.partitioned_with(partitions, make, read_model, ProjectionOptions::new())
    }

    /// As [`partitioned`](Self::partitioned), with options that apply to each partition.
    pub fn partitioned_with<P, R>(
        self,
        partitions: u16,
        make: impl Fn(BuildTarget) -> P + Send + Sync + 'static,
        read_model: R,
        options: ProjectionOptions,
    ) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        // start() reports a number out of range; the clamp only bounds the work until then.
        let count = partitions.clamp(1, partition::MOST);
        self.project(
            ProjectionFactory::Partitioned(count, Arc::new(make)),
            Some(partitions),
            read_model,
            options,
        )
    }

    /// Keeps an in-memory index of events on this node: see [`Lookup`].
    pub fn lookup<T: Default + Send + Sync + 'static>(mut self, lookup: &Lookup<T>) -> Self {
        let (lookup, made, read_model) =
            (lookup.clone(), ProjectionFactory::Single(lookup.projection()), lookup.read_model());
        let state = Some(lookup.shared_state());
        let on_start = Box::new(move |handle: &ProjectionHandle| lookup.runs(handle));
        let options = ProjectionOptions::new();
        let registration = ProjectionRegistration::over(state, made, None, read_model, options, on_start);
        self.projections.push(registration);
        self
    }

    fn project<P, R>(
        mut self,
        made: ProjectionFactory<P>,
        partitions: Option<u16>,
        read_model: R,
        options: ProjectionOptions,
    ) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        self.projections.push(ProjectionRegistration::new(made, partitions, read_model, options));
        self
    }

    /// Executes commands of aggregates of type `A`, with the default options.
    pub fn aggregate<A: Aggregate>(self) -> Self {
        self.aggregate_with(AggregateOptions::<A>::new())
    }

    /// Executes commands of aggregates of type `A`.
    pub fn aggregate_with<A: Aggregate>(mut self, options: AggregateOptions<A>) -> Self {
        self.aggregates.push(Registration {
            category: <A::Event as Event>::CATEGORY,
            type_name: type_name::<A>(),
            check: || EventTypes::of::<A::Event>().map(drop),
            options: options.validate(),
            start: Box::new(move |handlers, store, writer, supervisor| {
                let router = Router::start(store, writer, options, supervisor.cell())?;
                supervisor.adopt(Box::new(router.clone()));
                handlers.aggregate(router);
                Ok(())
            }),
        });
        self
    }

    /// Executes commands that belong to no aggregate, with the default options.
    pub fn handler<H: Handler>(self, handler: H) -> Self {
        self.handler_with(handler, HandlerOptions::new())
    }

    /// Executes commands that belong to no aggregate.
    pub fn handler_with<H: Handler>(mut self, handler: H, options: HandlerOptions) -> Self {
        self.handlers.push(HandlerRegistration::new(handler, options));
        self
    }

    /// Sets how commands reach their aggregate or handler.
    ///
    /// Default: [`CommandBus::local`], within this process.
    pub fn commands(mut self, bus: CommandBus) -> Self {
        self.commands = bus;
        self
    }

    /// Sets how long [`start`](Self::start) waits for an unreachable store.
    ///
    /// The store may be unreachable while its server restarts. Each failed attempt is a log line. A
    /// permanent error ends the start at once. Default: 30 s. Range: at most 1 day; zero is one
    /// attempt.
    pub fn start_timeout(mut self, limit: Duration) -> Self {
        self.start_timeout = limit;
        self
    }

    /// Starts everything in order: store, bus, publisher, projections, and finally commands.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If a part is missing or contradicts another one, if the store fails, or if it stays
    /// unreachable for [`start_timeout`](Self::start_timeout). Nothing runs after an error.
    pub async fn start(self) -> Result<Runtime, StartError> {
        let store = self.store.ok_or(StartError::NoStore)?;
        // Checks every registration before anything runs.
        for (index, registration) in self.aggregates.iter().enumerate() {
            let same = |other: &&Registration| other.category == registration.category;
            if let Some(other) = self.aggregates[..index].iter().find(same) {
                return Err(StartError::SameCategory {
                    category: registration.category,
                    first: other.type_name,
                    second: registration.type_name,
                });
            }
            (registration.check)()?;
            registration.options.clone()?;
        }
        for (index, ProjectionRegistration { name, .. }) in self.projections.iter().enumerate() {
            if let Some(reason) = projection::name_problem(name) {
                return Err(StartError::ProjectionName { name: name.chars().take(80).collect(), reason });
            }
            if self.projections[..index].iter().any(|other| other.name == *name) {
                return Err(StartError::SameProjection { name: name.clone() });
            }
        }
        within("Builder::start_timeout", self.start_timeout, Duration::ZERO..=DAY)?;
        self.publisher.validate()?;
        self.feed.validate()?;
        commands::check(&self.handlers)?;
        self.bus.check()?;
        self.commands.validate()?;
        self.commands.check()?;
        let log_end = startup::wait_for(
            "reading the high-water mark",
            self.start_timeout,
            || None,
            || store.high_water_mark(),
        )
        .await?;
        let mut projections = Vec::with_capacity(self.projections.len());
        for registration in self.projections {
            projections.push(registration.check(&store, &*self.bus, log_end).await?);
        }
        #[cfg(feature = "otel")]
        let telemetry = self.telemetry.unwrap_or_default();
        #[cfg(feature = "otel")]
        let metrics = Metrics::of(&telemetry);
        #[cfg(not(feature = "otel"))]
        let metrics = Metrics::default();
        #[cfg(feature = "otel")]
        self.bus.observe(&telemetry);
        let node = Uuid::now_v7();
        let supervisor = Supervisor::start().await.map_err(StartError::Actor)?;
        // The feed subscribes before the publisher publishes anything.
        let feed = Feed::start(store.clone(), self.bus.clone(), self.feed);
        let (bus, root) = (self.bus.clone(), Some(supervisor.cell()));
        let publisher =
            Publisher::spawn(store.clone(), bus, self.publisher, node, metrics.clone(), root).await?;
        let services = NodeServices {
            store: store.clone(),
            feed: feed.clone(),
            node,
            bus: self.bus.clone(),
            lease_watcher: LeaseWatcher::start(store.clone()),
            metrics: metrics.clone(),
            supervisor: Some(supervisor.cell()),
            alive: supervisor.alive(),
            log_end,
        };
        let mut handles = Vec::with_capacity(projections.len());
        for projection in projections {
            handles.push(projection.start(services.clone()).await?);
        }
        let writer = GroupCommitter::start(store.clone(), WriterOptions::default(), metrics.clone());
        let forgetting = (!self.handlers.is_empty())
            .then(|| Task::spawn(forgetting(store.clone(), self.commands.retention())));
        let commands = Dispatcher::new(self.commands.hooks(), metrics);
        let mut registry = Registry::default();
        for registration in self.aggregates {
            (registration.start)(&mut registry, store.clone(), writer.clone(), &supervisor)?;
        }
        for registration in self.handlers {
            registration.start(&mut registry, store.clone(), &commands, &supervisor)?;
        }
        commands.open(registry, Box::new(Following(handles.clone())));
        #[cfg(feature = "nats")]
        commands.connect(self.commands, store.info(), node).await;
        let inner = Inner {
            node,
            store,
            bus: self.bus,
            writer,
            publisher,
            feed,
            projections: handles,
            commands,
            _forgetting: forgetting,
            supervisor,
        };
        let inner = Arc::new(inner);
        #[cfg(feature = "otel")]
        status_metrics::observe(&telemetry, &inner);
        Ok(Runtime { inner })
    }
}

impl Runtime {
    /// Returns an empty builder of a runtime.
    pub fn builder() -> Builder {
        Builder {
            store: None,
            bus: Arc::new(LocalBus::new()),
            publisher: PublisherOptions::new(),
            feed: FeedOptions::new(),
            aggregates: Vec::new(),
            commands: CommandBus::local(),
            handlers: Vec::new(),
            projections: Vec::new(),
            start_timeout: START_TIMEOUT,
            #[cfg(feature = "otel")]
            telemetry: None,
        }
    }

    /// Executes a command on the aggregate `id` of type `A`.
    ///
    /// Await the result for the [`Receipt`](crate::Receipt), or set options first, see [`Execute`].
    ///
    /// # Errors
    /// When awaited: the rejection of the aggregate, or another cause that kept the command from
    /// taking effect, see [`ExecuteError`](crate::ExecuteError).
    pub fn execute<A: Aggregate>(&self, id: impl fmt::Display, command: impl Into<A::Command>) -> Execute<A> {
        Execute::new(self.inner.commands.clone(), id.to_string(), command.into(), Envelope::new())
    }

    /// Executes a command on the handler `H`, on any node that runs it.
    ///
    /// Await the result for the reply, or set options first, see [`Request`].
    ///
    /// # Errors
    /// When awaited: the rejection of the handler, or another cause that kept the command from
    /// being handled, see [`ExecuteError`](crate::ExecuteError).
    pub fn command<H: Handler>(&self, command: impl Into<H::Command>) -> Request<H> {
        Request::new(self.inner.commands.clone(), command.into(), Envelope::new())
    }

    /// Returns the handle of a projection, which waits, pauses, resets and lists parked events.
    ///
    /// # Errors
    /// If no projection of that name is registered on this node.
    pub fn projection(&self, name: &str) -> Result<&ProjectionHandle, UnknownProjection> {
        let projections = &self.inner.projections;
        projections.iter().find(|projection| projection.name() == name).ok_or_else(|| UnknownProjection {
            name: name.to_owned(),
            known: projections.iter().map(|projection| projection.name().to_owned()).collect(),
        })
    }

    /// Returns the event store.
    pub fn store(&self) -> &Arc<dyn EventStore> {
        &self.inner.store
    }

    /// Returns the status of all components.
    pub async fn status(&self) -> RuntimeStatus {
        // Reads the watch channel first: its borrow must not span the await of the store.
        let publisher = self.inner.publisher.status().borrow().clone();
        let projections = self.inner.projections.iter();
        let projections = projections.map(|one| (one.name().to_owned(), one.status())).collect();
        RuntimeStatus {
            node: self.inner.node,
            store: self.inner.store.info().clone(),
            high_water_mark: self.inner.store.high_water_mark().await,
            stall: self.inner.store.stall().await,
            writer: self.inner.writer.status(),
            aggregates: self.inner.commands.registry().aggregates(),
            handlers: self.inner.commands.registry().handlers(),
            commands: self.inner.commands.status(),
            bus: self.inner.bus.state(),
            publisher,
            feed: self.inner.feed.status(),
            projections,
            leases: self.inner.store.leases().await,
        }
    }

    /// Shuts the node down in order, within 30 s.
    ///
    /// The node accepts no new commands and answers those in progress. The publisher publishes all
    /// committed events, the projections store their checkpoints, and the leases are released. While
    /// the bus is unavailable and events are unpublished, the publisher uses the whole time. See
    /// [`shutdown_within`](Self::shutdown_within) for another time limit.
    ///
    /// # Errors
    /// If a component did not end in time; it was stopped then.
    pub async fn shutdown(self) -> Result<(), ShutdownError> {
        self.shutdown_within(SHUTDOWN_TIMEOUT).await
    }

    /// As [`shutdown`](Self::shutdown), with a time limit.
    ///
    /// # Errors
    /// As [`shutdown`](Self::shutdown).
    pub async fn shutdown_within(self, timeout: Duration) -> Result<(), ShutdownError> {
        // Reserves a part of the time for each later stage. A stuck command or an unreachable bus
        // must not take away the time in which the projections store their checkpoints.
        let reserve = (timeout / 6).min(SHUTDOWN_RESERVE);
        let deadline = after(timeout);
        let until = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        let mut unfinished = Vec::new();
        let commands = self.inner.commands.shut_down(deadline - 2 * reserve).await;
        if commands > 0 {
            unfinished.push(format!("{commands} commands without an answer"));
        }
        let stopped = self.inner.publisher.stop(until(deadline - reserve)).await;
        unfinished.extend(stopped.err().map(|error| error.to_string()));
        let stopped = self.inner.projections.iter().map(|projection| projection.stop(until(deadline)));
        for stopped in futures_util::future::join_all(stopped).await {
            unfinished.extend(stopped.err().map(|error| error.to_string()));
        }
        self.inner.feed.stop();
        self.inner.supervisor.stop();
        if unfinished.is_empty() { Ok(()) } else { Err(ShutdownError { timeout, unfinished }) }
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("node", &self.inner.node).finish_non_exhaustive()
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let categories: Vec<_> = self.aggregates.iter().map(|registration| registration.category).collect();
        f.debug_struct("Builder").field("aggregates", &categories).finish_non_exhaustive()
    }
}
