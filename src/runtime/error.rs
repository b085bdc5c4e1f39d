//! Errors of a runtime: at its start, and of names.

use ractor::SpawnErr;

use crate::aggregate::node_runs;
use crate::bus::BusError;
use crate::event::{EncodeError, InvalidName};
use crate::invalid_option::InvalidOption;
use crate::store::{FilterError, StoreError};

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
    /// A projection would follow the bus durably, but no bus stores events.
    #[error(
        "projection {name:?} cannot follow the bus durably: {}; use NATS JetStream, or FollowMode::Feed",
        bus.map_or_else(|| "there is no bus".to_owned(), |bus| format!("{bus} stores no events"))
    )]
    NotDurable {
        /// The projection.
        name: String,
        /// The bus, if there is one.
        bus: Option<&'static str>,
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
    /// The events of an aggregate cannot be stored.
    #[error(transparent)]
    Events(#[from] EncodeError),
    /// The filter of a projection is invalid, for example because of an unknown variant.
    #[error("invalid filter of projection {name:?}: {error}")]
    Filter {
        /// The projection.
        name: String,
        /// The cause.
        error: FilterError,
    },
    /// Two processes have the same name, so their instances would mix.
    #[error("duplicate process name {name:?}: instances belong to one process; rename one process")]
    SameProcess {
        /// The name.
        name: &'static str,
    },
    /// A route of a process is invalid, for example because of an unknown variant.
    #[error("invalid route of process {name:?}: {error}")]
    Route {
        /// The process.
        name: &'static str,
        /// The cause.
        error: FilterError,
    },
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
