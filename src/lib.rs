//! An event-sourcing runtime for domain services: ledgers, order systems, inventories, workflows.
//!
//! You write an [`Aggregate`] (state, commands, events) in plain Rust. storied provides an actor
//! for each active aggregate, a durable log, a bus that carries the log in order, projections that
//! apply every event exactly once, processes that react to events with commands and timers, and
//! commands that wait until they are due.
//!
//! The guarantee: *no acknowledged event is lost, skipped, reordered within its stream or applied
//! twice to a read model, whichever process fails, at any time.*
//!
//! # The path of a command
//!
//! ```text
//!  runtime.execute ─► command ─► aggregate ─► store ─► feed ─► projection
//!        ▲         ▲    to the     folds,      log,     live    folds into a read model
//!        └ receipt │    one actor  decides     durable  tail ─► publisher ─► bus ─► other nodes
//!                  │                                         └► process
//!                  └── commands of a reaction ──────────────────── reacts to events
//! ```
//!
//! A scheduled command takes the same path: the scheduler sends it to its target when it is due.
//! Each stage is a module:
//!
//! - [`event`]: events and their names; [`codec`]: their encoding, and the upcasting of old
//!   payloads;
//! - [`store`]: the port to the log (append, read, high-water mark, checkpoints, leases,
//!   snapshots, timers, scheduled commands), with [`MemoryStore`], [`SqliteStore`] and
//!   [`PostgresStore`];
//! - [`feed`]: the live tail of the log in a process;
//! - [`bus`]: the port that carries the log to other processes, with [`NatsBus`]; the [`publisher`]
//!   publishes the log to it;
//! - [`aggregate`]: decides and folds, pipelined ahead of the disk;
//! - [`decide`]: decisions over the events that match a query, in any streams;
//! - [`command`]: routes a command to the actor of its aggregate, on this node or on another one,
//!   and runs handlers for commands that belong to no aggregate;
//! - [`projection`]: catch-up, live events, and a checkpoint that commits together with the read
//!   model;
//! - [`process`]: reacts to events, answers and due timers with commands to several aggregates;
//! - [`schedule`]: commands that run later, once or at regular times;
//! - [`runtime`]: assembles and supervises these components, and shuts them down in order;
//! - `telemetry`: their spans and metrics;
//! - [`testing`](https://docs.rs/storied) (feature `testing`):
//!   `given(events).when(command).then(events)`, `given_events`, `given_process`, and the
//!   conformance suite of stores.
//!
//! The [`glossary`] defines the terms.
//!
//! # Features
//!
//! | feature | default | provides |
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
//! See the README: its example is a program that runs as a test. `docs/guide.md` leads from there
//! to several nodes, and `examples/retail` is a complete program.

#![warn(clippy::too_many_lines)]

pub mod aggregate;
mod backoff;
pub mod bus;
pub mod codec;
pub mod command;
mod command_id;
pub mod decide;
pub mod event;
pub mod feed;
mod future;
#[cfg(test)]
mod fuzz;
pub mod glossary;
#[cfg(any(feature = "nats", feature = "postgres"))]
mod input_file;
mod invalid_option;
mod lease;
mod notice;
mod outage;
mod panic;
mod partition;
pub mod process;
pub mod projection;
pub mod publisher;
mod rate_limit;
pub mod runtime;
pub mod schedule;
mod serde_forms;
mod startup;
pub mod store;
mod supervised;
mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
mod time;
mod transient;

pub use ciborium;

pub use self::aggregate::{
    Aggregate, AggregateOptions, Context, Decided, Decision, ExecuteError, NeverRejects, NoReplyKind,
    NotExecutedKind, Receipt,
};
pub use self::bus::EventBus;
#[cfg(feature = "nats")]
pub use self::bus::{NatsBus, NatsOptions};
pub use self::codec::{Codec, Upcasters};
pub use self::command::{Command, CommandBus, Handler};
pub use self::decide::{Decide, DecisionOf, View};
pub use self::event::{
    AnyEvent, DecodeError, EncodeError, Event, EventDecoder, EventName, EventSet, Metadata, NewEvent,
    Position, RecordedEvent, StreamId, Version,
};
pub use self::feed::{FeedOptions, FeedStatus};
pub use self::future::BoxFuture;
pub use self::invalid_option::InvalidOption;
pub use self::partition::Partition;
pub use self::process::{Process, ProcessOptions};
#[cfg(feature = "postgres")]
pub use self::projection::PostgresReadModel;
#[cfg(feature = "sqlite")]
pub use self::projection::SqliteReadModel;
pub use self::projection::{Projection, ProjectionHandle, ProjectionOptions, ProjectionStatus};
pub use self::publisher::{PublisherOptions, PublisherState, PublisherStatus};
pub use self::runtime::Runtime;
pub use self::schedule::Recurrence;
pub use self::store::{
    EventStore, ExpectedVersion, Filter, MemoryStore, ReadLog, SnapshotRevision, StoreError,
};
#[cfg(feature = "postgres")]
pub use self::store::{PostgresOptions, PostgresStore};
#[cfg(feature = "sqlite")]
pub use self::store::{SqliteOptions, SqliteStore};
pub use self::supervised::StopError;
#[cfg(feature = "otel")]
pub use self::telemetry::Telemetry;

/// Compiles the code of these documents as documentation tests.
///
/// The code of README.md and docs/guide.md comes from programs that run; tests/fast/docs checks that.
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
