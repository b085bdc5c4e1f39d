//! Assembles a runtime: checks every registration, then starts the components in order.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::Runtime;
use super::commands::{Registration, TargetServices, forgetting};
use super::error::StartError;
use super::inner::Inner;
use super::processes::{ProcessRegistration, record_starts, start_processes};
use super::projections::{ProjectionRegistration, start_projections};
use super::schedules::start_scheduler;
#[cfg(feature = "otel")]
use super::status_metrics;
use crate::aggregate::{Aggregate, AggregateOptions};
use crate::bus::{EventBus, IntoEventBus};
use crate::command::{CommandBus, Dispatcher, Handler, HandlerOptions, Registry};
use crate::feed::{Feed, FeedOptions};
use crate::invalid_option::{DAY, within};
use crate::lease::LeaseWatcher;
use crate::process::{Process, ProcessOptions};
use crate::projection::{
    self, InMemoryIndex, IntoProjection, NodeServices, Projection, ProjectionHandle, ProjectionOptions,
    ReadModel,
};
use crate::publisher::{Publisher, PublisherOptions};
use crate::startup::{START_TIMEOUT, end_of_log};
use crate::store::{EventStore, GroupCommitter, IntoEventStore};
use crate::supervised::{Supervisor, Task};
use crate::telemetry::Metrics;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;

/// Assembles a [`Runtime`]. See [`Runtime::builder`].
#[must_use = "nothing runs before start()"]
pub struct Builder {
    store: Option<Arc<dyn EventStore>>,
    bus: Option<Arc<dyn EventBus>>,
    publisher: PublisherOptions,
    aggregates: Vec<Registration>,
    commands: CommandBus,
    handlers: Vec<Registration>,
    feed: FeedOptions,
    projections: Vec<ProjectionRegistration>,
    processes: Vec<ProcessRegistration>,
    start_timeout: Duration,
    #[cfg(feature = "otel")]
    telemetry: Option<Telemetry>,
}

impl Builder {
    /// Sets the event store. Required.
    ///
    /// Also accepts a shared store, as [`Runtime::store`] returns it.
    pub fn store(mut self, store: impl IntoEventStore) -> Self {
        self.store = Some(store.into_event_store());
        self
    }

    /// Sets the bus that carries the log to other nodes and programs.
    ///
    /// Default: none. Projections then follow the store directly.
    pub fn bus(mut self, bus: impl IntoEventBus) -> Self {
        self.bus = Some(bus.into_event_bus());
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
        P: IntoProjection,
        R: ReadModel<Transaction = <P::Projection as Projection>::Transaction>,
    {
        self.projection_with(projection, read_model, ProjectionOptions::new())
    }

    /// Runs a projection over its read model.
    ///
    /// A [`PerTarget`](crate::projection::PerTarget) can be
    /// [rebuilt](ProjectionHandle::rebuild) and [partitioned](ProjectionOptions::partitions).
    pub fn projection_with<P, R>(mut self, projection: P, read_model: R, options: ProjectionOptions) -> Self
    where
        P: IntoProjection,
        R: ReadModel<Transaction = <P::Projection as Projection>::Transaction>,
    {
        let made = projection.into_projection();
        self.projections.push(ProjectionRegistration::new(made, read_model, options));
        self
    }

    /// Keeps an in-memory index of events on this node: see [`InMemoryIndex`].
    pub fn in_memory_index<T: Default + Send + Sync + 'static>(mut self, index: &InMemoryIndex<T>) -> Self {
        let (index, made, read_model) =
            (index.clone(), index.projection().into_projection(), index.read_model());
        let state = Some(index.shared_state());
        let on_start = Box::new(move |handle: &ProjectionHandle| index.runs(handle));
        let options = ProjectionOptions::new();
        let registration = ProjectionRegistration::over(state, made, read_model, options, on_start);
        self.projections.push(registration);
        self
    }

    /// Executes commands of aggregates of type `A`, with the default options.
    pub fn aggregate<A: Aggregate>(self) -> Self {
        self.aggregate_with(AggregateOptions::<A>::new())
    }

    /// Executes commands of aggregates of type `A`.
    pub fn aggregate_with<A: Aggregate>(mut self, options: AggregateOptions<A>) -> Self {
        self.aggregates.push(Registration::aggregate(options));
        self
    }

    /// Executes commands that belong to no aggregate, with the default options.
    pub fn handler<H: Handler>(self, handler: H) -> Self {
        self.handler_with(handler, HandlerOptions::new())
    }

    /// Executes commands that belong to no aggregate.
    pub fn handler_with<H: Handler>(mut self, handler: H, options: HandlerOptions) -> Self {
        self.handlers.push(Registration::handler(handler, options));
        self
    }

    /// Runs a process manager, with the default options.
    ///
    /// One node owns it at a time; the others take over if that node ends.
    pub fn process<P: Process>(self) -> Self {
        self.process_with::<P>(ProcessOptions::new())
    }

    /// Runs a process manager.
    pub fn process_with<P: Process>(mut self, options: ProcessOptions) -> Self {
        self.processes.push(ProcessRegistration::new::<P>(options));
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
    pub async fn start(mut self) -> Result<Runtime, StartError> {
        let store = self.store.take().ok_or(StartError::NoStore)?;
        self.check_registrations()?;
        let log_end = end_of_log(&*store, self.start_timeout).await?;
        let mut projections = Vec::with_capacity(self.projections.len());
        for registration in self.projections {
            projections.push(registration.check(&store, self.bus.as_deref(), log_end).await?);
        }
        record_starts(&self.processes, &store, log_end).await?;
        #[cfg(feature = "otel")]
        let telemetry = self.telemetry.unwrap_or_default();
        #[cfg(feature = "otel")]
        let metrics = observed(&telemetry, self.bus.as_deref());
        #[cfg(not(feature = "otel"))]
        let metrics = Metrics::default();
        let node = Uuid::now_v7();
        let supervisor = Supervisor::start().await?;
        let feed = Feed::start(store.clone(), self.bus.clone(), self.feed);
        let publisher = match self.bus.clone() {
            None => None,
            Some(bus) => {
                let (store, feed, metrics) = (store.clone(), feed.clone(), metrics.clone());
                let root = Some(supervisor.cell());
                Some(Publisher::spawn(store, feed, bus, self.publisher, node, metrics, root).await?)
            }
        };
        let executes = !self.aggregates.is_empty() || !self.handlers.is_empty();
        let node_services = NodeServices {
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
        let handles = start_projections(projections, &node_services).await?;
        let writer = GroupCommitter::start(store.clone(), metrics.clone());
        let retention = (!self.handlers.is_empty()).then(|| self.commands.retention());
        let forgetting = retention.map(|retention| Task::spawn(forgetting(store.clone(), retention)));
        let commands = Dispatcher::new(self.commands.hooks(), metrics, store.clone(), handles.clone());
        let mut registry = Registry::default();
        let services = TargetServices {
            store: store.clone(),
            writer: writer.clone(),
            commands: Arc::downgrade(&commands),
            supervisor: supervisor.cell(),
        };
        for registration in self.aggregates.into_iter().chain(self.handlers) {
            (registration.start)(&mut registry, services.clone())?;
        }
        commands.open(registry);
        #[cfg(feature = "nats")]
        commands.connect(self.commands, store.info(), node).await;
        // Last, because they send commands to other nodes.
        let scheduler = start_scheduler(executes, &node_services, &services).await?;
        let processes = start_processes(self.processes, node_services, &services).await?;
        let inner = Inner {
            node,
            store,
            bus: self.bus,
            writer,
            publisher,
            feed,
            projections: handles,
            processes,
            commands,
            scheduler,
            _forgetting: forgetting,
            supervisor,
        };
        let inner = Arc::new(inner);
        #[cfg(feature = "otel")]
        status_metrics::observe(&telemetry, &inner);
        Ok(Runtime { inner })
    }

    /// Checks every registration and option, before anything runs.
    fn check_registrations(&self) -> Result<(), StartError> {
        Registration::check(&self.aggregates, |first, second| StartError::SameCategory {
            category: first.name,
            first: first.type_name,
            second: second.type_name,
        })?;
        for (index, registration) in self.projections.iter().enumerate() {
            let name = &registration.name;
            if let Some(reason) = projection::name_problem(name) {
                return Err(StartError::ProjectionName { name: name.chars().take(80).collect(), reason });
            }
            if self.projections[..index].iter().any(|other| other.name == *name) {
                return Err(StartError::SameProjection { name: name.clone() });
            }
            registration.check_filter()?;
        }
        ProcessRegistration::check(&self.processes)?;
        for process in &self.processes {
            let (name, type_name) = (process.name, process.type_name);
            if let Some(other) = self.aggregates.iter().find(|aggregate| aggregate.name == name) {
                let (category, first, second) = (name, other.type_name, type_name);
                return Err(StartError::SameCategory { category, first, second });
            }
            if self.projections.iter().any(|projection| projection.name == process.projection) {
                return Err(StartError::SameProjection { name: process.projection.clone() });
            }
        }
        within("Builder::start_timeout", self.start_timeout, Duration::ZERO..=DAY)?;
        self.publisher.validate()?;
        self.feed.validate()?;
        Registration::check(&self.handlers, |_, other| StartError::SameHandler { name: other.name })?;
        self.bus.as_ref().map_or(Ok(()), |bus| bus.check())?;
        self.commands.validate()?;
        self.commands.check()?;
        Ok(())
    }
}

/// Returns the metrics of a node, and adds those of its bus.
#[cfg(feature = "otel")]
fn observed(telemetry: &Telemetry, bus: Option<&dyn EventBus>) -> Metrics {
    if let Some(bus) = bus {
        bus.observe(telemetry);
    }
    Metrics::of(telemetry)
}

impl Runtime {
    /// Returns an empty builder of a runtime.
    pub fn builder() -> Builder {
        Builder {
            store: None,
            bus: None,
            publisher: PublisherOptions::new(),
            feed: FeedOptions::new(),
            aggregates: Vec::new(),
            commands: CommandBus::local(),
            handlers: Vec::new(),
            projections: Vec::new(),
            processes: Vec::new(),
            start_timeout: START_TIMEOUT,
            #[cfg(feature = "otel")]
            telemetry: None,
        }
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let categories: Vec<_> = self.aggregates.iter().map(|registration| registration.name).collect();
        f.debug_struct("Builder").field("aggregates", &categories).finish_non_exhaustive()
    }
}
