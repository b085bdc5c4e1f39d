//! The runtime: puts store, bus, aggregates and projections together, supervises them, and takes them down in order.

mod supervisor;

use std::any::type_name;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use self::supervisor::Supervisor;
use crate::aggregate::{Aggregate, AggregateOptions, Router, RouterStatus};
use crate::codec::EncodeError;
use crate::command::{Execute, Handlers, StartRouterError};
use crate::event::{Event, Position};
use crate::store::{EventStore, StoreError, StoreInfo, Writer, WriterOptions, WriterStatus};

/// How long [`Runtime::shutdown`] waits for what is under way.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// A running node; cheap to clone. End it with [`shutdown`](Self::shutdown): dropping the last clone stops everything at
/// once, which loses nothing that was acknowledged, but leaves callers without answers.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    node: Uuid,
    store: Arc<dyn EventStore>,
    writer: Writer,
    handlers: Arc<Handlers>,
    /// Above everything that runs; stopping it stops all.
    supervisor: Supervisor,
}

/// Puts a [`Runtime`] together. See [`Runtime::builder`].
#[must_use = "nothing runs before start()"]
pub struct Builder {
    store: Option<Arc<dyn EventStore>>,
    aggregates: Vec<Registration>,
}

/// What is known of an aggregate's type until the runtime starts.
struct Registration {
    category: &'static str,
    type_name: &'static str,
    start: Box<StartAggregate>,
}

type StartAggregate = dyn FnOnce(&mut Handlers, Arc<dyn EventStore>, Writer, &Supervisor) -> Result<(), StartRouterError>
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
    /// An aggregate's events cannot be stored.
    #[error(transparent)]
    Events(#[from] EncodeError),
    /// The store does not work.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An actor could not be started.
    #[error("an actor could not be started: {0}")]
    Actor(String),
}

impl From<StartRouterError> for StartError {
    fn from(error: StartRouterError) -> Self {
        match error {
            StartRouterError::Events(error) => Self::Events(error),
            StartRouterError::Spawn(error) => Self::Actor(error.to_string()),
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
    /// The group-commit writer.
    pub writer: WriterStatus,
    /// The kinds of aggregates, by category.
    pub aggregates: Vec<RouterStatus>,
}

impl Builder {
    /// The event store. Required.
    pub fn store(mut self, store: impl EventStore) -> Self {
        self.store = Some(Arc::new(store));
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
            start: Box::new(move |handlers, store, writer, supervisor| {
                let router = Router::start(store, writer, options, supervisor.cell())?;
                supervisor.adopt(Box::new(router.clone()));
                handlers.register(router);
                Ok(())
            }),
        });
        self
    }

    /// Starts everything, in order: store, bus, publisher, projections, and the intake of commands last. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// When something is missing or contradictory, or the store cannot be used. Nothing runs then.
    pub async fn start(self) -> Result<Runtime, StartError> {
        let store = self.store.ok_or(StartError::NoStore)?;
        for (index, registration) in self.aggregates.iter().enumerate() {
            let same = |other: &&Registration| other.category == registration.category;
            if let Some(other) = self.aggregates[..index].iter().find(same) {
                return Err(StartError::SameCategory {
                    category: registration.category,
                    first: other.type_name,
                    second: registration.type_name,
                });
            }
        }
        store.frontier().await?;
        let supervisor = Supervisor::start().await.map_err(StartError::Actor)?;
        let writer = Writer::start(store.clone(), WriterOptions::default());
        let mut handlers = Handlers::default();
        for registration in self.aggregates {
            (registration.start)(&mut handlers, store.clone(), writer.clone(), &supervisor)?;
        }
        let handlers = Arc::new(handlers);
        Ok(Runtime { inner: Arc::new(Inner { node: Uuid::now_v7(), store, writer, handlers, supervisor }) })
    }
}

impl Runtime {
    /// Starts putting a runtime together.
    pub fn builder() -> Builder {
        Builder { store: None, aggregates: Vec::new() }
    }

    /// Executes a command on the aggregate `id` of type `A`: await it for the [`Receipt`](crate::Receipt), or say more
    /// first, see [`Execute`].
    ///
    /// # Errors
    /// When awaited: the aggregate's own refusal, or what else kept the command from taking effect, see
    /// [`ExecuteError`](crate::ExecuteError).
    pub fn execute<A: Aggregate>(&self, id: impl fmt::Display, command: impl Into<A::Command>) -> Execute<A> {
        Execute::new(self.inner.handlers.clone(), id, command.into())
    }

    /// The event store.
    pub fn store(&self) -> &Arc<dyn EventStore> {
        &self.inner.store
    }

    /// How everything is doing.
    pub async fn status(&self) -> RuntimeStatus {
        RuntimeStatus {
            node: self.inner.node,
            store: self.inner.store.info().clone(),
            frontier: self.inner.store.frontier().await,
            writer: self.inner.writer.status(),
            aggregates: self.inner.handlers.status(),
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
        let deadline = Instant::now() + timeout;
        let mut unfinished = Vec::new();
        let commands = self.inner.handlers.shut_down(deadline).await;
        if commands > 0 {
            unfinished.push(format!("{commands} commands without an answer"));
        }
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
