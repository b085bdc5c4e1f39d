//! An event-sourcing runtime for domain services: ledgers, order systems, inventories, workflow back ends.
//!
//! You write an [`Aggregate`] (state, commands, events) as plain Rust, and storied gives you the rest: an actor for each
//! live aggregate, a durable log, a bus that carries it in order, and projections that apply every event exactly once.
//! The promise: *nothing acknowledged is ever lost, skipped, reordered within its stream or applied twice to a read
//! model; whatever dies, whenever.*
//!
//! # The way of a command
//!
//! ```text
//!  runtime.execute ─► command ─► aggregate ─► store ─► publisher ─► bus ─► feed ─► projection
//!        ▲              to the     folds,      log,      in log      port   live     folds into
//!        └── receipt ── one actor  decides     durable   order              view     a read model
//! ```
//!
//! Each station is a module, and knows only those to its right that it needs:
//!
//! - [`event`]: what happened, and what it is called; [`codec`]: how it becomes bytes, and how old shapes are read;
//! - [`store`]: the port to the log (append, read, frontier, checkpoints, leases, snapshots), with [`MemoryStore`],
//!   [`SqliteStore`] and [`PostgresStore`];
//! - [`bus`]: the port that carries the log to others, with [`LocalBus`] and [`NatsBus`]; [`publisher`] moves the log to it,
//!   the [`feed`] is a process's repaired view of it;
//! - [`aggregate`]: decide and fold, pipelined ahead of the disk; [`command`]: to the one actor that owns it, here or on another
//!   node, and handlers for what is no aggregate's;
//! - [`projection`]: catch up, follow, checkpoint together with the read model;
//! - [`runtime`]: puts them together, supervises them, takes them down in order;
//! - `telemetry`: the spans and metrics of all of them;
//! - [`testing`](https://docs.rs/storied) (feature `testing`): `given(events).when(command).then(events)`, and the suite
//!   that every store passes.
//!
//! # Features
//!
//! | feature | default | what |
//! |---|---|---|
//! | `sqlite` | yes | [`SqliteStore`] and SQLite read models |
//! | `postgres` | yes | [`PostgresStore`] and PostgreSQL read models, with TLS |
//! | `nats` | yes | [`NatsBus`], over NATS Core or JetStream |
//! | `otel` | no | OpenTelemetry: metrics, and trace context from the current span into events |
//! | `testing` | no | the test kit |
//! | `cli` | no | the command-line tool `storied` |
//!
//! # Quick start
//!
//! See the README, whose example is a program that runs as a test, `docs/guide.md` for the way from there to several nodes, and
//! `examples/retail` for a whole program.

pub mod aggregate;
mod backoff;
pub mod bus;
pub mod codec;
pub mod command;
mod command_id;
pub mod event;
pub mod feed;
mod future;
#[cfg(test)]
mod fuzz;
mod invalid_option;
mod lease;
mod outage;
mod panic;
mod partition;
pub mod projection;
pub mod publisher;
mod rate_limit;
pub mod runtime;
mod startup;
pub mod store;
mod supervised;
mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
mod time;
mod transient;

pub use ciborium;

pub use self::aggregate::{Aggregate, AggregateOptions, Context, Decision, ExecuteError, Receipt};
pub use self::bus::{EventBus, LocalBus};
#[cfg(feature = "nats")]
pub use self::bus::{NatsBus, NatsOptions};
pub use self::codec::{Codec, Upcasters};
pub use self::command::{CommandBus, Handler};
pub use self::event::{
    DecodeError, EncodeError, Event, EventName, Metadata, NewEvent, Position, RecordedEvent, StreamId,
    Version,
};
pub use self::feed::{FeedOptions, FeedStatus};
pub use self::future::BoxFuture;
pub use self::invalid_option::InvalidOption;
pub use self::partition::Partition;
#[cfg(feature = "postgres")]
pub use self::projection::PostgresReadModel;
#[cfg(feature = "sqlite")]
pub use self::projection::SqliteReadModel;
pub use self::projection::{Projection, ProjectionHandle, ProjectionOptions, ProjectionStatus};
pub use self::publisher::{PublisherOptions, PublisherState, PublisherStatus};
pub use self::runtime::Runtime;
pub use self::store::{EventStore, ExpectedVersion, Filter, MemoryStore, ReadLog, StoreError};
#[cfg(feature = "postgres")]
pub use self::store::{PostgresOptions, PostgresStore};
#[cfg(feature = "sqlite")]
pub use self::store::{SqliteOptions, SqliteStore};
pub use self::supervised::StopError;
#[cfg(feature = "otel")]
pub use self::telemetry::Telemetry;

/// The pieces of code in these documents are documentation tests. Those of README.md and docs/guide.md are in programs that run,
/// which tests/docs sees to.
#[cfg(all(doctest, feature = "sqlite", feature = "postgres", feature = "nats"))]
mod documents {
    #[doc = include_str!("../docs/nats.md")]
    struct Nats;
    #[doc = include_str!("../docs/operations.md")]
    struct Operations;
    #[cfg(feature = "otel")]
    #[doc = include_str!("../docs/observability.md")]
    struct Observability;
}
