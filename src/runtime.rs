//! The runtime: puts store, bus, aggregates and projections together, supervises them, and takes them down in order.

mod commands;
#[cfg(feature = "otel")]
mod observed;
mod projections;
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
    CommandBus, CommandBusStatus, Commands, Envelope, Execute, Handler, HandlerOptions, HandlerStatus,
    Registry, Request, StartRouterError,
};
use crate::event::{EncodeError, Event, EventTypes, InvalidName, Position};
use crate::feed::{Feed, FeedOptions, FeedStatus};
use crate::invalid_option::{DAY, InvalidOption, within};
use crate::lease::Board;
use crate::partition;
use crate::projection::{
    self, Lookup, Made, Projection, ProjectionHandle, ProjectionOptions, ProjectionStatus, ReadModel,
    Surroundings, Target,
};
use crate::publisher::{Publisher, PublisherOptions, PublisherStatus};
use crate::startup::{self, START_TIMEOUT};
use crate::store::{
    EventStore, IntoEventStore, LeaseInfo, Stall, StoreError, StoreInfo, Writer, WriterOptions, WriterStatus,
};
use crate::supervised::Task;
use crate::telemetry::Metrics;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;
use crate::time::after;

/// How long [`Runtime::shutdown`] waits for what is under way.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of that time is kept for the publisher, and how much for the projections.
const SHUTDOWN_RESERVE: Duration = Duration::from_secs(2);

/// A running node; cheap to clone. End it with [`shutdown`](Self::shutdown): dropping the last clone stops everything at
/// once, which loses nothing that was acknowledged, but leaves callers without answers.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    node: Uuid,
    store: Arc<dyn EventStore>,
    bus: Arc<dyn EventBus>,
    writer: Writer,
    publisher: Publisher,
    feed: Feed,
    /// In the order in which they were registered.
    projections: Vec<ProjectionHandle>,
    commands: Arc<Commands>,
    /// Forgets old records of commands; ends with the runtime.
    _forgetting: Option<Task>,
    /// Above everything that runs; stopping it stops all.
    supervisor: Supervisor,
}

/// Puts a [`Runtime`] together. See [`Runtime::builder`].
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

/// What is known of an aggregate's type until the runtime starts.
struct Registration {
    category: &'static str,
    type_name: &'static str,
    /// Whether the events can be stored at all.
    check: fn() -> Result<(), EncodeError>,
    options: Result<(), InvalidOption>,
    start: Box<StartAggregate>,
}

type StartAggregate = dyn FnOnce(&mut Registry, Arc<dyn EventStore>, Writer, &Supervisor) -> Result<(), StartRouterError>
    + Send;

/// Why a runtime does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No store was given.
    #[error("no event store was given; choose one with Runtime::builder().store(…)")]
    NoStore,
    /// Two aggregates have the same category: their streams would mix.
    #[error("{first} and {second} both have the category {category:?}; a category belongs to one aggregate")]
    SameCategory {
        /// The category.
        category: &'static str,
        /// A Rust type.
        first: &'static str,
        /// Another.
        second: &'static str,
    },
    /// A projection has a name that operators could not type or see.
    #[error("{name:?} cannot be the name of a projection: {reason}")]
    ProjectionName {
        /// The name, the first 80 characters.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// Two projections have the same name: they would share a checkpoint.
    #[error("two projections are called {name:?}; a checkpoint belongs to one projection")]
    SameProjection {
        /// The name.
        name: String,
    },
    /// A projection is to follow the bus durably, and this one keeps nothing.
    #[error(
        "projection {name:?} is to follow the bus durably, but {bus} keeps no events; use NATS JetStream, or FollowMode::Feed"
    )]
    NotDurable {
        /// The projection.
        name: String,
        /// The bus.
        bus: &'static str,
    },
    /// A projection cannot be partitioned so.
    #[error("projection {name:?} cannot be in {partitions} partitions: {reason}")]
    Partitions {
        /// The projection.
        name: String,
        /// How many were asked for.
        partitions: u16,
        /// Why not.
        reason: &'static str,
    },
    /// An aggregate's events cannot be stored, or a projection's filter names events that there are not.
    #[error(transparent)]
    Events(#[from] EncodeError),
    /// The store does not work.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An option of the event bus or of the command bus cannot be used.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Two handlers have the same name: their commands and records would mix.
    #[error("two handlers are called {name:?}; a name belongs to one handler")]
    SameHandler {
        /// The name.
        name: &'static str,
    },
    /// A handler has a name that no command can have.
    #[error(transparent)]
    HandlerName(#[from] InvalidName),
    /// An option has a value out of its range.
    #[error(transparent)]
    Option(#[from] InvalidOption),
    /// A projection delivers to another system, has never run, and the log has events: whether they are to be delivered is
    /// not said.
    #[error(
        "projection {name:?} has no start position: it delivers at least once, has no checkpoint, and the log has events; choose ProjectionOptions::start(Start::Beginning), Start::Now, Start::At(position) or Start::Since(time)"
    )]
    NoStartPosition {
        /// The projection.
        name: String,
    },
    /// Another runtime of this process folds into the same memory.
    #[error(
        "the in-memory state of projection {name:?} is in use by another runtime of this process; shut that down first, or make a state for each runtime"
    )]
    StateInUse {
        /// The projection.
        name: String,
    },
    /// An actor could not be started.
    #[error("an actor could not be started: {0}")]
    Actor(String),
}

impl From<SpawnErr> for StartError {
    fn from(error: SpawnErr) -> Self {
        Self::Actor(error.to_string())
    }
}

/// There is no projection of that name on this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no projection {name:?}; {}", node_runs(known))]
pub struct UnknownProjection {
    /// The name asked for.
    pub name: String,
    /// The names that there are.
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

/// What did not end in time when a runtime was shut down. Nothing acknowledged is lost: what is named here had not been
/// acknowledged, and goes on from its checkpoint at the next start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not everything ended within {timeout:?}: {}", unfinished.join(", "))]
pub struct ShutdownError {
    /// The time there was.
    pub timeout: Duration,
    /// What was unfinished.
    pub unfinished: Vec<String>,
}

/// How a node is doing.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RuntimeStatus {
    /// The node's id, new with every start.
    pub node: Uuid,
    /// The store.
    pub store: StoreInfo,
    /// The frontier of the log, or why it could not be read.
    pub frontier: Result<Position, StoreError>,
    /// Who holds the frontier back, if anybody does; an append that is just under way is no reason to worry.
    pub stall: Result<Option<Stall>, StoreError>,
    /// The group-commit writer.
    pub writer: WriterStatus,
    /// The kinds of aggregates, by category.
    pub aggregates: Vec<RouterStatus>,
    /// The handlers, by name.
    pub handlers: Vec<HandlerStatus>,
    /// How commands get at other nodes.
    pub commands: CommandBusStatus,
    /// The connection to the bus.
    pub bus: BusState,
    /// The publisher.
    pub publisher: PublisherStatus,
    /// The live view of the log.
    pub feed: FeedStatus,
    /// The projections, by name.
    pub projections: BTreeMap<String, ProjectionStatus>,
    /// Who holds which lease, or why it could not be read.
    pub leases: Result<Vec<LeaseInfo>, StoreError>,
}

impl Builder {
    /// The event store. Required.
    /// Also one that is shared already: what [`Runtime::store`] returns.
    pub fn store(mut self, store: impl IntoEventStore) -> Self {
        self.store = Some(store.into_event_store());
        self
    }

    /// The bus that carries the log to the projections of this node, and of others if it reaches them. [`LocalBus`] by
    /// default.
    pub fn bus(mut self, bus: impl IntoEventBus) -> Self {
        self.bus = bus.into_event_bus();
        self
    }

    /// How the log is published to the bus.
    pub fn publisher(mut self, options: PublisherOptions) -> Self {
        self.publisher = options;
        self
    }

    /// How this node follows the log.
    pub fn feed(mut self, options: FeedOptions) -> Self {
        self.feed = options;
        self
    }

    /// Where metrics go, those of the bus included. [`Telemetry::global`] by default.
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
        self.project(Made::Once(projection), None, read_model, options)
    }

    /// Runs a projection that can be [rebuilt](ProjectionHandle::rebuild) beside the live one. `make` makes it for each
    /// version of its read model, in tables of their own. On a read model that cannot be switched in a transaction
    /// ([`InMemory`](crate::projection::InMemory), [`External`](crate::projection::External)) it runs as any other, and a rebuild is
    /// [refused](crate::projection::ControlError::NotRebuildable).
    pub fn rebuildable<P, R>(
        self,
        make: impl Fn(Target) -> P + Send + Sync + 'static,
        read_model: R,
        options: ProjectionOptions,
    ) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        self.project(Made::Versioned(Arc::new(make)), None, read_model, options)
    }

    /// Runs a projection in `partitions` partitions, which all nodes that do so share evenly, with the default options: each
    /// applies the events of [its](crate::Partition) streams, in their order. `make` makes the projection for each of them, and
    /// for each version if it is ever [rebuilt](ProjectionHandle::rebuild); all have the same name and filter.
    ///
    /// The number, from 1 to 256, is fixed with the first start: more nodes than partitions are of no use, so choose as many
    /// as there may ever be nodes. Another number needs a [reset](ProjectionHandle::reset).
    ///
    /// The partitions of a node share the pages that they read: at most 4 of about 4 MiB each are kept (and as many for a
    /// rebuild), and a page that no partition has used for 5 s is dropped.
    pub fn partitioned<P, R>(
        self,
        partitions: u16,
        make: impl Fn(Target) -> P + Send + Sync + 'static,
        read_model: R,
    ) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        self.partitioned_with(partitions, make, read_model, ProjectionOptions::new())
    }

    /// As [`partitioned`](Self::partitioned), with options, which are those of each partition.
    pub fn partitioned_with<P, R>(
        self,
        partitions: u16,
        make: impl Fn(Target) -> P + Send + Sync + 'static,
        read_model: R,
        options: ProjectionOptions,
    ) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        // What cannot be is refused when the runtime starts.
        let count = partitions.clamp(1, partition::MOST);
        self.project(Made::Partitioned(count, Arc::new(make)), Some(partitions), read_model, options)
    }

    /// Keeps an index over events in memory, on this node: see [`Lookup`].
    pub fn lookup<T: Default + Send + Sync + 'static>(mut self, lookup: &Lookup<T>) -> Self {
        let (lookup, made, read_model) =
            (lookup.clone(), Made::Once(lookup.projection()), lookup.read_model());
        let state = Some(lookup.shared_state());
        let on_start = Box::new(move |handle: &ProjectionHandle| lookup.runs(handle));
        let options = ProjectionOptions::new();
        let registration = ProjectionRegistration::over(state, made, None, read_model, options, on_start);
        self.projections.push(registration);
        self
    }

    fn project<P, R>(
        mut self,
        made: Made<P>,
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

    /// Handles commands for aggregates of type `A`, with the default options.
    pub fn aggregate<A: Aggregate>(self) -> Self {
        self.aggregate_with(AggregateOptions::<A>::new())
    }

    /// Handles commands for aggregates of type `A`.
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

    /// Handles commands that are no aggregate's, with the default options.
    pub fn handler<H: Handler>(self, handler: H) -> Self {
        self.handler_with(handler, HandlerOptions::new())
    }

    /// Handles commands that are no aggregate's.
    pub fn handler_with<H: Handler>(mut self, handler: H, options: HandlerOptions) -> Self {
        self.handlers.push(HandlerRegistration::new(handler, options));
        self
    }

    /// How commands find whoever handles them. [`CommandBus::local`] by default: within this process.
    pub fn commands(mut self, bus: CommandBus) -> Self {
        self.commands = bus;
        self
    }

    /// How long [`start`](Self::start) waits for a store that cannot be reached, as while its server restarts. Each attempt that fails is
    /// a log line; an error that lasts ends the start at once. Default: 30 s. Range: at most
    /// 1 day; zero is one attempt.
    pub fn start_timeout(mut self, limit: Duration) -> Self {
        self.start_timeout = limit;
        self
    }

    /// Starts everything, in order: store, bus, publisher, projections, and the intake of commands last. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// When something is missing or contradictory, or the store cannot be used, or not be reached within
    /// [`start_timeout`](Self::start_timeout). Nothing runs then.
    pub async fn start(self) -> Result<Runtime, StartError> {
        let store = self.store.ok_or(StartError::NoStore)?;
        // Everything that can be wrong with what was registered, before anything runs.
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
        let log_end =
            startup::wait_for("reading how far the log goes", self.start_timeout, || store.frontier())
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
        // The feed listens before anything is published.
        let feed = Feed::start(store.clone(), self.bus.clone(), self.feed);
        let (bus, root) = (self.bus.clone(), Some(supervisor.cell()));
        let publisher =
            Publisher::spawn(store.clone(), bus, self.publisher, node, metrics.clone(), root).await?;
        let surroundings = Surroundings {
            store: store.clone(),
            feed: feed.clone(),
            node,
            bus: self.bus.clone(),
            board: Board::start(store.clone()),
            metrics: metrics.clone(),
            supervisor: Some(supervisor.cell()),
            alive: supervisor.alive(),
            log_end,
        };
        let mut handles = Vec::with_capacity(projections.len());
        for projection in projections {
            handles.push(projection.start(surroundings.clone()).await?);
        }
        let writer = Writer::start(store.clone(), WriterOptions::default(), metrics.clone());
        let forgetting = (!self.handlers.is_empty())
            .then(|| Task::spawn(forgetting(store.clone(), self.commands.records_kept())));
        let commands = Commands::new(self.commands.policy(), metrics);
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
        observed::observe(&telemetry, &inner);
        Ok(Runtime { inner })
    }
}

impl Runtime {
    /// Starts putting a runtime together.
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

    /// Executes a command on the aggregate `id` of type `A`: await it for the [`Receipt`](crate::Receipt), or say more
    /// first, see [`Execute`].
    ///
    /// # Errors
    /// When awaited: the aggregate's own refusal, or what else kept the command from taking effect, see
    /// [`ExecuteError`](crate::ExecuteError).
    pub fn execute<A: Aggregate>(&self, id: impl fmt::Display, command: impl Into<A::Command>) -> Execute<A> {
        Execute::new(self.inner.commands.clone(), id.to_string(), command.into(), Envelope::new())
    }

    /// Executes a command on the handler `H`, wherever it runs: await it for the answer, or say more first, see
    /// [`Request`].
    ///
    /// # Errors
    /// When awaited: the handler's own refusal, or what else kept the command from being handled, see
    /// [`ExecuteError`](crate::ExecuteError).
    pub fn command<H: Handler>(&self, command: impl Into<H::Command>) -> Request<H> {
        Request::new(self.inner.commands.clone(), command.into(), Envelope::new())
    }

    /// The projection of that name: to wait for it, pause it, reset it, look at what it parked.
    ///
    /// # Errors
    /// When it was not registered.
    pub fn projection(&self, name: &str) -> Result<&ProjectionHandle, UnknownProjection> {
        let projections = &self.inner.projections;
        projections.iter().find(|projection| projection.name() == name).ok_or_else(|| UnknownProjection {
            name: name.to_owned(),
            known: projections.iter().map(|projection| projection.name().to_owned()).collect(),
        })
    }

    /// The event store.
    pub fn store(&self) -> &Arc<dyn EventStore> {
        &self.inner.store
    }

    /// How everything is doing.
    pub async fn status(&self) -> RuntimeStatus {
        // Looked at first: a borrowed status must not be held while the store is asked.
        let publisher = self.inner.publisher.status().borrow().clone();
        let projections = self.inner.projections.iter();
        let projections = projections.map(|one| (one.name().to_owned(), one.status())).collect();
        RuntimeStatus {
            node: self.inner.node,
            store: self.inner.store.info().clone(),
            frontier: self.inner.store.frontier().await,
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

    /// Ends the node in order: no more commands are taken, those under way are answered, the publisher publishes what was
    /// committed, projections checkpoint, leases are given back. Within 30 seconds; see
    /// [`shutdown_within`](Self::shutdown_within).
    ///
    /// # Errors
    /// When something did not end in time; it was stopped then.
    pub async fn shutdown(self) -> Result<(), ShutdownError> {
        self.shutdown_within(SHUTDOWN_TIMEOUT).await
    }

    /// As [`shutdown`](Self::shutdown), with this much time.
    ///
    /// # Errors
    /// As [`shutdown`](Self::shutdown).
    pub async fn shutdown_within(self, timeout: Duration) -> Result<(), ShutdownError> {
        // A part of the time is kept for each that comes after: a stuck command must not cost the projections their
        // orderly end, nor a bus that is away.
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
