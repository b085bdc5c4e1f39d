//! The event store port: an append-only log of streams and the state that must be stored beside it.
//!
//! That state is checkpoints, leases, snapshots, command records, timers, scheduled commands with
//! their schedules, and the set of paused projections.
//!
//! Every back end gives the same guarantees and passes the same suite (`storied::testing::store`):
//!
//! - **I1** The log has no gaps. [`EventStore::read_log`] reports
//!   [`scanned_to`](LogPage::scanned_to); no event ever appears later at or below that position.
//! - **I2** Versions of a stream are 1, 2, 3 …. An append with another expected version is refused
//!   and writes nothing.
//! - **I3** An append is answered when it is durable.
//! - **I4** If the commit of an append gets no answer, the store looks up the append's events
//!   before it answers.
//!
//! The trait is object-safe (`Arc<dyn EventStore>`), so no type of a back end leaks into user code.
//! The cost of one boxed future is negligible beside a commit.
//!
//! # Cancellation safety
//! Unless a method says otherwise, a dropped call took effect completely or not at all.

mod adoption;
mod append;
mod boundary;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod columns;
mod command_events;
mod command_record;
mod control;
mod error;
mod event_store;
mod filter;
mod group_commit;
mod high_water_stall;
mod info;
mod lease;
mod log_page;
mod memory;
mod memory_clock;
mod memory_leases;
mod memory_progress;
mod memory_schedules;
mod memory_tags;
mod memory_timers;
mod page_size;
#[cfg(feature = "postgres")]
pub(crate) mod postgres;
mod progress;
mod query;
mod query_store;
mod request;
mod schedule_arguments;
mod schedule_store;
mod scheduled;
mod snapshot;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) mod sql;
#[cfg(feature = "sqlite")]
pub(crate) mod sqlite;
mod timer;
mod version_check;

pub use self::adoption::{Adopt, Adoption, Home};
pub use self::append::{Append, AppendError, Appended, Conflict, ExpectedVersion, StreamAppend};
pub use self::boundary::Boundary;
pub use self::command_events::CommandEvents;
pub use self::command_record::CommandRecord;
pub use self::control::{ControlChange, ProjectionControl, PublisherCheckpoint};
pub use self::error::StoreError;
pub use self::event_store::{EventStore, IntoEventStore};
pub use self::filter::{Filter, FilterError};
pub use self::group_commit::WriterStatus;
pub(crate) use self::group_commit::{AppendResult, GroupCommitter, PendingAppend, SpeculationChain};
pub use self::high_water_stall::HighWaterStall;
pub use self::info::StoreInfo;
pub use self::lease::{Lease, LeaseInfo};
pub use self::log_page::{LogPage, ReadLog};
pub use self::memory::MemoryStore;
pub(crate) use self::memory_progress::MemoryProgress;
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresOptions, PostgresStore};
pub use self::progress::{
    Checkpoint, CheckpointError, CheckpointKey, CheckpointRecord, ParkedEvent, ProgressWrite, StoredProgress,
    StoredProjection,
};
pub use self::query::{Query, QueryError, QueryItem};
pub use self::query_store::QueryStore;
pub use self::request::{Request, StoredRequest};
pub use self::schedule_store::ScheduleStore;
pub use self::scheduled::{
    DueCommands, DueSchedules, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledOutcome,
    ScheduledQuery, ScheduledState, StoredSchedule,
};
pub use self::snapshot::{Snapshot, SnapshotRevision};
#[cfg(feature = "sqlite")]
pub use self::sqlite::{SqliteOptions, SqliteStore};
pub use self::timer::{DueTime, DueTimers, NewTimer, StoredTimer, TimerRef};
pub use crate::future::BoxFuture;
