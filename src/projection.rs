//! Projections: fold the log into a read model, remember how far.
//!
//! A [`Projection`] is the user's part: a name, a filter, and what to do with an event. Where its read model and its
//! checkpoint live together is a [`ReadModel`]:
//!
//! | read model | transaction | guarantee |
//! |---|---|---|
//! | `SqliteReadModel` | `SqliteConnection` | exactly once: what `apply` writes and the checkpoint commit together (I6) |
//! | `PostgresReadModel` | `PgConnection` | the same |
//! | [`InMemory`] | `()` | on every node, rebuilt at every start: from the start of the log, or from its [snapshot](InMemory::snapshot_every) |
//! | [`External`] | [`Delivery`] | at least once; position and epoch are the idempotency key |
//!
//! Where nodes share a read model, one of them at a time owns it; or, [partitioned](crate::runtime::Builder::partitioned), each of
//! them a share of its partitions. Owners hold leases, by which others know when to take over; that an owner who was replaced
//! changes nothing any more is up to the checkpoint, which only moves from where its owner left it, in its epoch (I7).

mod balance;
mod control;
mod error;
mod external;
mod group;
mod handle;
mod lookup;
mod memory;
mod memory_run;
mod name;
mod operator;
mod options;
#[cfg(feature = "postgres")]
mod postgres;
mod progress;
mod request;
mod shape;
mod snapshot;
#[cfg(feature = "sqlite")]
mod sqlite;
mod start;
mod start_position;
mod state_claim;
mod status;
mod time_limit;
mod worker;

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

pub use self::control::ControlError;
pub use self::error::{ApplyError, TargetUnavailable, WaitError};
pub use self::external::{Delivery, External};
pub use self::handle::ProjectionHandle;
pub use self::lookup::Lookup;
pub use self::memory::InMemory;
use self::memory_run::MemoryRun;
pub(crate) use self::name::problem as name_problem;
pub use self::operator::{Asked, Operator, PartRecord, ProjectionRecord, RebuildRecord};
pub use self::options::{FailurePolicy, FollowMode, ProjectionOptions, Schedule, UnknownNames};
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresOpen, PostgresReadModel};
pub use self::request::{Answer, Request};
pub use self::snapshot::{SnapshotState, Snapshots};
#[cfg(feature = "sqlite")]
pub use self::sqlite::{SqliteOpen, SqliteReadModel};
pub(crate) use self::start::{Made, spawn};
pub use self::start_position::Start;
pub(crate) use self::start_position::record_start;
pub(crate) use self::state_claim::{SharedState, StateClaim};
pub use self::status::{PartitionStatus, ProjectionState, ProjectionStatus, RebuildStatus};
pub(crate) use self::worker::Surroundings;
use crate::event::{EncodeError, Position, RecordedEvent};
use crate::outage;
use crate::partition::Partition;
use crate::store::{
    BoxFuture, Checkpoint, CheckpointError, CheckpointRecord, EventStore, Filter, ParkedEvent, StoreError,
};

/// Folds events into a read model.
///
/// Events arrive one at a time, in log order. An error (or a panic) is retried, then handled as [`ProjectionOptions`] say;
/// whatever the failing call, and those before it in the same transaction, had written is rolled back first where the read
/// model [can](ReadModel::rolls_back), and what went before is applied again. So `apply` keeps what it writes in the
/// transaction; what it keeps in `self` is a cache at most.
///
/// A transient error says nothing about the event: the projection retries without a limit, and its status shows the error. Transient
/// are a database that is away or busy, a failed network connection, storied's own transient errors (as
/// [`ExecuteError::is_transient`](crate::ExecuteError::is_transient), or a runtime that shuts down), and a [`TargetUnavailable`]: itself, or as
/// the [source](Error::source) of an error of the user's own.
pub trait Projection: Send + 'static {
    /// What `apply` writes through: see the table of the [module](self).
    type Transaction: Send;

    /// The name of the checkpoint: unique in the store, and kept while the program evolves. A new name starts over. 1 to 200 bytes,
    /// without control characters and without spaces at its ends; the runtime does not start otherwise.
    fn name(&self) -> &str;

    /// Which events. Asked once, when the projection is registered; `Filter::of::<OrderEvent>()` and
    /// `Filter::variants::<OrderEvent>(&["placed"])` are the usual answers.
    ///
    /// # Errors
    /// When a filter names events that there are not; the runtime does not start then.
    fn filter(&self) -> Result<Filter, EncodeError>;

    /// Folds one event in. Dropped in the middle of it, and what it wrote rolled back where that can be, when its node loses the
    /// read model to another one or ends.
    fn apply(
        &mut self,
        event: &RecordedEvent,
        tx: &mut Self::Transaction,
    ) -> impl Future<Output = Result<(), ApplyError>> + Send;

    /// Empties the read model; the log is then applied from its start. Before a rebuild it is called on the new version, whose
    /// tables it creates then: once, however many partitions there are. The default refuses, so that a reset never doubles what
    /// is already there.
    ///
    /// A reset has as long as it takes, since emptying a large table may take long: the projection stands still meanwhile, also
    /// while this waits for a lock that somebody else holds. To bound that, let the database do it: in PostgreSQL
    /// `SET LOCAL lock_timeout = '5s'` first. Before a rebuild it has 10 s.
    ///
    /// Where nothing is [rolled back](ReadModel::rolls_back), what an error or a crash leaves half empty has to become whole again.
    /// So the checkpoints of an [`External`] read model are at the start of the log before this is called, and stay there when it
    /// does not succeed: the log is applied once more to whatever is left. It is dropped in the middle of it when its node may not
    /// keep the others waiting any more, as one that is cut off from the store.
    fn reset(&mut self, tx: &mut Self::Transaction) -> impl Future<Output = Result<(), ApplyError>> + Send {
        let _ = tx;
        async { Err(error::NoReset.into()) }
    }

    /// Drops what this version has written: called when its [rebuild was cancelled](ProjectionHandle::cancel_rebuild), behind the
    /// last of those who built it; also when there is nothing to drop. The default leaves it where it is, out of use: the next
    /// rebuild writes to the same version, and its [`reset`](Self::reset) finds it.
    fn discard(&mut self, tx: &mut Self::Transaction) -> impl Future<Output = Result<(), ApplyError>> + Send {
        let _ = tx;
        async { Ok(()) }
    }

    /// Makes the version that this one writes to the one that readers see: called when a rebuild has caught up, in the
    /// transaction of the switch. Replacing a view is a usual way. The default leaves it to readers to ask for the
    /// [version](ProjectionStatus::version).
    ///
    /// It has 2 s, since the live version stands still meanwhile, also while this waits for a lock that somebody else holds. Then,
    /// or when it fails, the live version goes on, what was rebuilt keeps up with it, and the switch is tried again some seconds
    /// later, or up to a minute if that happens again; [`RebuildStatus::last_error`] says why. So what takes long belongs elsewhere.
    fn go_live(&mut self, tx: &mut Self::Transaction) -> impl Future<Output = Result<(), ApplyError>> + Send {
        let _ = tx;
        async { Ok(()) }
    }
}

/// What a projection is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Target {
    /// The partition whose events it gets; of one, if it is not partitioned.
    pub partition: Partition,
    /// The version of the read model that it writes to: 0, and one more with every rebuild.
    pub version: u64,
}

/// Where a read model and its checkpoint live together.
///
/// The `name` that its methods get is `projection/` and the projection's name: the checkpoints of an event store may be in the
/// same place, and are not called so.
pub trait ReadModel: Send + Sync + 'static {
    /// What a projection writes through.
    type Transaction: Send;
    /// An open transaction.
    type Open: Send;

    /// Whether every node has its own (in memory) or all nodes share one, which then has one owner at a time.
    fn shared(&self) -> bool;

    /// Whether a rollback undoes what was written. Where it does not, the events before a failing one stay applied.
    fn rolls_back(&self) -> bool;

    /// Whether `apply` failed for a reason that does not last and that the event is not to blame for. It is retried without a limit
    /// then. Users wrap errors, so the causes count as well.
    ///
    /// The default knows the transient errors of storied, of sqlx and of the network. Those count on every read model, as a
    /// [`TargetUnavailable`] does: an implementation adds those of its own driver.
    fn is_outage(&self, error: &(dyn Error + 'static)) -> bool {
        outage::is_outage(error)
    }

    /// The snapshots that it keeps of what it holds in memory, on a read model that every node has [for itself](Self::shared). None
    /// by default.
    fn snapshots(&self) -> Option<&Snapshots> {
        None
    }

    /// Called before anything else, and again until it succeeds: creates what is missing.
    fn prepare<'a>(
        &'a self,
        store: &'a Arc<dyn EventStore>,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// How far the read model is.
    ///
    /// # Errors
    /// Also when its progress is in the log of another event store than it was [prepared](Self::prepare) for.
    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>>;

    /// Every checkpoint that is kept here, whosever it is, also before it was [prepared](Self::prepare): for an
    /// [`Operator`]. By default none are told.
    ///
    /// # Errors
    /// `Invalid` when they are not told, `Incompatible` when nobody has kept anything here yet.
    fn records(&self) -> BoxFuture<'_, Result<Vec<CheckpointRecord>, StoreError>> {
        let reason = "this read model does not list the checkpoints that it keeps".into();
        Box::pin(async { Err(StoreError::Invalid { reason }) })
    }

    /// Opens a transaction. `from` is the checkpoint, with the epoch of the owner who asks.
    fn begin<'a>(&'a self, name: &'a str, from: Checkpoint) -> BoxFuture<'a, Result<Self::Open, StoreError>>;

    /// As [`begin`](Self::begin), for a transaction that is given up after `limit`: the database ends it by itself then, also when it
    /// is cut off from this process. The default [bounds](Self::bound) its statements.
    fn begin_within<'a>(
        &'a self,
        name: &'a str,
        from: Checkpoint,
        limit: Duration,
    ) -> BoxFuture<'a, Result<Self::Open, StoreError>> {
        Box::pin(async move {
            let mut open = self.begin(name, from).await?;
            self.bound(&mut open, limit).await?;
            Ok(open)
        })
    }

    /// What the user writes through.
    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut Self::Transaction;

    /// From now on no statement of this transaction is to take longer than `limit`, also one that nobody waits for any more: what
    /// the transaction has locked, others wait for. By default a statement takes as long as it does.
    ///
    /// # Errors
    /// When that cannot be asked for.
    fn bound<'a>(
        &'a self,
        open: &'a mut Self::Open,
        limit: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        let _ = (open, limit);
        Box::pin(async { Ok(()) })
    }

    /// How far the read model is, in whichever store's log; with the commit of this transaction, which leads on from there, the
    /// progress is in this store's. For a reset. The default is for read models whose progress cannot be another store's.
    fn adopt<'a>(
        &'a self,
        open: &'a mut Self::Open,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        let _ = open;
        self.checkpoint(name)
    }

    /// Moves another checkpoint from exactly `from` to `to` with the commit of this transaction, or at once where there is
    /// nothing to [roll back](Self::rolls_back). For what concerns all partitions of a projection; the default refuses.
    fn save<'a>(
        &'a self,
        open: &'a mut Self::Open,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        let _ = (open, from, to);
        let reason = format!(
            "{name}: this read model keeps one checkpoint a transaction, so it cannot be partitioned"
        );
        Box::pin(async { Err(CheckpointError::Store(StoreError::Invalid { reason })) })
    }

    /// Commits together: what was written, the checkpoint from exactly `from` to `to`, the parked event.
    fn commit<'a>(
        &'a self,
        open: Self::Open,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>>;

    /// Undoes what was written. Dropping an open transaction does the same, later.
    fn rollback(&self, open: Self::Open) -> BoxFuture<'_, Result<(), StoreError>>;

    /// The parked events of a projection, oldest first.
    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>>;

    /// Forgets a parked event with the commit of this transaction; whether there is one.
    fn unpark<'a>(
        &'a self,
        open: &'a mut Self::Open,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;

    /// Forgets all parked events of `name` with the commit of this transaction.
    fn unpark_all<'a>(
        &'a self,
        open: &'a mut Self::Open,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Forgets a parked event at once; whether there was one.
    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;
}
