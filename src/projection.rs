//! Projections: fold the log into a read model and keep a checkpoint.
//!
//! A [`Projection`] is user code: a name, its events, and the handling of an event. A [`ReadModel`]
//! is the storage that holds the projection's data and its checkpoint together:
//!
//! | read model | transaction | guarantee |
//! |---|---|---|
//! | `SqliteReadModel` | `SqliteConnection` | exactly once: writes of `apply` and the checkpoint commit together (I6) |
//! | `PostgresReadModel` | `PgConnection` | the same |
//! | [`InMemory`] | `()` | on every node, rebuilt at every start: from the start of the log, or from its [snapshot](InMemory::snapshot_every) |
//! | [`AtLeastOnce`] | [`Delivery`] | at least once; position and epoch are the idempotency key |
//!
//! If nodes share a read model, one node at a time owns it. If the projection is
//! [partitioned](ProjectionOptions::partitions), each node owns a share of the partitions.
//! Owners hold leases, which show the other nodes when to take over. Stale owners are fenced: the
//! checkpoint moves only from the position that its owner last wrote, in the owner's epoch (I7).

mod at_least_once;
mod checkpoint_store;
mod control;
mod error;
mod factory;
mod handle;
mod in_memory_index;
mod interruption;
mod layout;
mod memory;
mod memory_run;
mod name;
mod operator;
mod options;
mod partition;
#[cfg(feature = "postgres")]
mod postgres;
mod request;
mod snapshot;
#[cfg(feature = "sqlite")]
mod sqlite;
mod start_position;
mod state_claim;
mod status;
mod task_handles;
mod time_limit;
mod worker;

pub(crate) mod sealed {
    /// Restricts [`ReadModel`](super::ReadModel) to the read models of storied.
    pub trait Sealed {}
}

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

pub use self::at_least_once::{AtLeastOnce, Delivery};
pub use self::control::ControlError;
pub use self::error::{ApplyError, TargetUnavailable, WaitError};
pub use self::factory::{IntoProjection, PerTarget};
pub(crate) use self::factory::{ProjectionFactory, spawn};
pub use self::handle::ProjectionHandle;
pub use self::in_memory_index::InMemoryIndex;
pub(crate) use self::layout::owner_lease;
pub use self::memory::InMemory;
pub(crate) use self::name::problem as name_problem;
pub use self::operator::{Operator, PartRecord, ProjectionRecord, RebuildRecord, RequestTicket};
pub use self::options::{FailurePolicy, FollowMode, ProjectionOptions, Schedule, UnknownNames};
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresOpen, PostgresReadModel};
pub use self::request::Answer;
pub(crate) use self::sealed::Sealed;
pub use self::snapshot::{SnapshotState, Snapshots};
#[cfg(feature = "sqlite")]
pub use self::sqlite::{SqliteOpen, SqliteReadModel};
pub use self::start_position::Start;
pub(crate) use self::start_position::record_start;
pub(crate) use self::state_claim::{SharedState, StateClaim};
pub use self::status::{PartitionStatus, ProjectionState, ProjectionStatus, RebuildStatus};
pub(crate) use self::worker::NodeServices;
use crate::event::{EventSet, Position, RecordedEvent};
use crate::outage;
use crate::partition::Partition;
pub use crate::store::Request;
use crate::store::{
    Checkpoint, CheckpointError, CheckpointKey, CheckpointRecord, EventStore, Filter, ParkedEvent,
    ProgressWrite, StoreError, StoredProgress, StoredProjection, StoredRequest,
};

/// Folds events into a read model.
///
/// Events arrive one at a time, in log order. The projection retries after an error or a panic,
/// then follows [`ProjectionOptions`]. First, if the read model [can roll
/// back](ReadModel::rolls_back), all writes of the transaction are rolled back: those of the
/// failing call and of the calls before it. The earlier events are then applied again. So `apply`
/// must keep its writes in the transaction; state in `self` is a cache only.
///
/// A transient error does not count against the event: the projection retries without a limit, and
/// its status shows the error. Transient errors are: an unavailable or busy database, a failed
/// network connection, storied's own transient errors (see
/// [`ExecuteError::is_transient`](crate::ExecuteError::is_transient); also a runtime that shuts
/// down), and a [`TargetUnavailable`], directly or as the [source](Error::source) of a user's
/// error.
pub trait Projection: Send + 'static {
    /// Name of the checkpoint.
    ///
    /// The name is unique in the store and must stay the same while the program evolves. A new name
    /// starts over. Limit: 1 to 200 bytes, no control characters, no leading or trailing spaces;
    /// otherwise the runtime does not start.
    const NAME: &'static str;

    /// The events to apply, decoded: an [`Event`](crate::Event), or an [`EventSet`] over several.
    ///
    /// [`AnyEvent`](crate::AnyEvent) contains every event and decodes none.
    type Event: EventSet;

    /// Handle that `apply` writes through; see the table of the [module](self).
    type Transaction: Send;

    /// Returns the name of this instance. Default: [`NAME`](Self::NAME).
    ///
    /// Override it only if instances of the type have names of their own.
    fn name(&self) -> &str {
        Self::NAME
    }

    /// Returns the filter of the events to apply. Called once, at registration.
    ///
    /// Default: all events of [`Event`](Self::Event). A usual override is
    /// `Filter::variants::<OrderEvent>(["placed"])`, so that the projection reads no other events.
    /// The filter only narrows `Event`: if it is [invalid](Filter::check) or names other events, the
    /// runtime does not start.
    ///
    /// A later version of the program may return another filter. It then applies to the events after
    /// the checkpoint: reset or rebuild a projection that needs earlier ones.
    fn filter(&self) -> Filter {
        Filter::of::<Self::Event>()
    }

    /// Applies one event: `event` is decoded, `recorded` has its stream, position, time and metadata.
    ///
    /// An event that does not decode is not applied. It fails at once, without retries:
    /// [`on_failure`](ProjectionOptions::on_failure) and
    /// [`unknown_names`](ProjectionOptions::unknown_names) decide.
    ///
    /// If the node loses the read model to another node or stops, the future is dropped, and the
    /// writes are rolled back if the read model can roll back.
    fn apply(
        &mut self,
        event: Self::Event,
        recorded: &RecordedEvent,
        tx: &mut Self::Transaction,
    ) -> impl Future<Output = Result<(), ApplyError>> + Send;

    /// Empties the read model; the projection then applies the log from its start.
    ///
    /// Before a rebuild, it is called on the new version and creates the tables of that version:
    /// once for all partitions. The default returns an error, so that a reset never duplicates
    /// existing data.
    ///
    /// `reset` has no time limit, because emptying a large table may take long. The projection is
    /// stopped while it runs, including while it waits for a lock of another session. To limit that
    /// wait in PostgreSQL, first run `SET LOCAL lock_timeout = '5s'`. Before a rebuild, the limit
    /// is 10 s.
    ///
    /// Without [rollback](ReadModel::rolls_back), an error or a crash can leave the read model half
    /// empty, and replay must repair it. Therefore the checkpoints of an [`AtLeastOnce`] read model
    /// move to the start of the log before this call, and stay there if the call fails: the log is
    /// applied once more to the remaining data. If the node can no longer hold up the other nodes,
    /// for example because it is cut off from the store, the future is dropped.
    fn reset(&mut self, tx: &mut Self::Transaction) -> impl Future<Output = Result<(), ApplyError>> + Send {
        let _ = tx;
        async { Err(error::NoReset.into()) }
    }

    /// Drops the data of this version.
    ///
    /// Called after a [cancelled rebuild](ProjectionHandle::cancel_rebuild), once its last task has
    /// stopped, also if there is no data. The default keeps the data, unused: the next rebuild
    /// writes to the same version, and its [`reset`](Self::reset) finds it.
    fn drop_version(
        &mut self,
        tx: &mut Self::Transaction,
    ) -> impl Future<Output = Result<(), ApplyError>> + Send {
        let _ = tx;
        async { Ok(()) }
    }

    /// Makes this version the one that readers see.
    ///
    /// Called when a rebuild has caught up, in the transaction of the cut-over. A usual
    /// implementation replaces a view. With the default, readers ask for the
    /// [version](ProjectionStatus::version).
    ///
    /// Time limit: 2 s, because the live version is stopped meanwhile, including while this waits
    /// for a lock of another session. If it fails or exceeds the limit, the live version continues,
    /// the rebuilt version keeps up with it, and the cut-over is retried after 5 s to 60 s.
    /// [`RebuildStatus::last_error`] gives the cause. Do slow work elsewhere.
    fn cut_over(
        &mut self,
        tx: &mut Self::Transaction,
    ) -> impl Future<Output = Result<(), ApplyError>> + Send {
        let _ = tx;
        async { Ok(()) }
    }
}

/// Partition and version that a projection is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BuildTarget {
    /// Partition of the events; the only one if the projection is not partitioned.
    pub partition: Partition,
    /// Version of the read model to write to: 0, plus 1 for each rebuild.
    pub version: u64,
}

/// Storage of a read model together with its checkpoint.
///
/// The read models of the [module](self) implement it. For another target, use [`AtLeastOnce`].
pub trait ReadModel: Sealed + Send + Sync + 'static {
    /// Handle that a projection writes through.
    type Transaction: Send;
    /// An open transaction.
    type Open: Send;

    /// Returns whether all nodes share one read model, which then has one owner at a time.
    ///
    /// Otherwise every node has its own (in memory).
    fn shared(&self) -> bool;

    /// Returns whether a rollback undoes the writes.
    ///
    /// Otherwise the events before a failing event stay applied.
    fn rolls_back(&self) -> bool;

    /// Returns whether `apply` failed for a transient reason that the event did not cause.
    ///
    /// The projection then retries without a limit. The transient errors of storied, of sqlx and of
    /// the network count, also as the sources of a user's error; so does [`TargetUnavailable`].
    fn is_outage(&self, error: &(dyn Error + 'static)) -> bool {
        outage::is_outage(error)
    }

    /// Returns whether an earlier statement of the same transaction may have caused the error: it
    /// failed and was ignored, or it changed the session.
    ///
    /// If a transaction without events succeeds meanwhile, such an error counts as a failure of the
    /// event. Default: never.
    fn may_be_of_event(&self, error: &(dyn Error + 'static)) -> bool {
        let _ = error;
        false
    }

    /// Returns the snapshot settings of a read model that every node keeps [for
    /// itself](Self::shared).
    ///
    /// Default: none.
    fn snapshots(&self) -> Option<&Snapshots> {
        None
    }

    /// Creates missing tables. Called before all other methods, repeatedly until it succeeds.
    fn prepare(&self, store: &Arc<dyn EventStore>) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Returns the layout, the versions and the start position of the read model of a projection.
    ///
    /// # Errors
    /// Includes: the progress belongs to the log of another event store than that of
    /// [`prepare`](Self::prepare).
    fn projection(&self, name: &str) -> impl Future<Output = Result<StoredProjection, StoreError>> + Send;

    /// Returns the same, also if it belongs to the log of another store.
    fn projection_of_any_store(
        &self,
        name: &str,
    ) -> impl Future<Output = Result<StoredProjection, StoreError>> + Send {
        self.projection(name)
    }

    /// Returns a checkpoint.
    ///
    /// # Errors
    /// As [`projection`](Self::projection).
    fn checkpoint(&self, key: &CheckpointKey) -> impl Future<Output = Result<Checkpoint, StoreError>> + Send;

    /// Returns parked events from a position on, oldest first, at most `limit`.
    fn parked(
        &self,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<ParkedEvent>, StoreError>> + Send;

    /// Returns the requests to a projection from `from` on, at most `limit`.
    fn requests(
        &self,
        projection: &str,
        from: Request,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<StoredRequest>, StoreError>> + Send;

    /// Returns all projections and all checkpoints, for an [`Operator`].
    ///
    /// Works before [`prepare`](Self::prepare). The default returns an error.
    ///
    /// # Errors
    /// `Invalid` if the read model does not list checkpoints, `Incompatible` if it was never used.
    fn records(&self) -> impl Future<Output = Result<ProgressRecords, StoreError>> + Send {
        let reason = "listing checkpoints failed: this read model does not support it".into();
        async { Err(StoreError::Invalid { reason }) }
    }

    /// Opens a transaction. `from` is the checkpoint, with the epoch of the calling owner.
    ///
    /// After `limit`, the database ends the transaction, also if it is cut off from this process.
    fn begin(
        &self,
        projection: &str,
        from: Checkpoint,
        limit: Option<Duration>,
    ) -> impl Future<Output = Result<Self::Open, StoreError>> + Send;

    /// Announces that [`begin`](Self::begin) with the same limit probably follows soon.
    ///
    /// Does not wait. A transaction may begin meanwhile; if it is not used, it ends by itself.
    /// Default: does nothing.
    fn will_begin(&self, projection: &str, limit: Option<Duration>) {
        let _ = (projection, limit);
    }

    /// Returns the handle that the user writes through.
    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut Self::Transaction;

    /// Returns the progress for a reset, even if it belongs to the log of another store.
    ///
    /// The commit of this transaction binds the progress to this store.
    fn adopt(
        &self,
        open: &mut Self::Open,
        projection: &str,
    ) -> impl Future<Output = Result<StoredProgress, StoreError>> + Send;

    /// Writes progress with the commit of this transaction.
    ///
    /// Without [rollback](Self::rolls_back), checks only that what the write deletes exists.
    fn write(
        &self,
        open: &mut Self::Open,
        write: ProgressWrite,
    ) -> impl Future<Output = Result<(), CheckpointError>> + Send;

    /// Commits everything that the transaction has written, and `writes`, together.
    fn commit(
        &self,
        open: Self::Open,
        writes: Vec<ProgressWrite>,
    ) -> impl Future<Output = Result<(), CheckpointError>> + Send;

    /// Undoes the writes. Dropping an open transaction does the same, later.
    fn rollback(&self, open: Self::Open) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// All progress in a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgressRecords {
    /// Layout, versions and start position of each projection, by name.
    pub projections: Vec<(String, StoredProjection)>,
    /// All checkpoints, ordered by key.
    pub checkpoints: Vec<CheckpointRecord>,
}
