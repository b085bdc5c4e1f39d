//! The port that every back end implements.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;
use uuid::Uuid;

use super::adoption::Adopt;
use super::append::{Append, AppendError, Appended};
use super::command_events::CommandEvents;
use super::command_record::CommandRecord;
use super::control::{ControlChange, ProjectionControl, PublisherCheckpoint};
use super::error::StoreError;
use super::high_water_stall::HighWaterStall;
use super::info::StoreInfo;
use super::lease::{Lease, LeaseInfo};
use super::log_page::{LogPage, ReadLog};
use super::progress::{
    Checkpoint, CheckpointError, CheckpointKey, ParkedEvent, ProgressWrite, StoredProjection,
};
use super::query_store::QueryStore;
use super::request::{Request, StoredRequest};
use super::schedule_store::ScheduleStore;
use super::snapshot::Snapshot;
use super::timer::{DueTimers, NewTimer, StoredTimer, TimerRef};
use crate::event::{Position, RecordedEvent, StreamId, Version};
use crate::future::BoxFuture;

/// An event store. The [module](super) lists its guarantees.
pub trait EventStore: QueryStore + ScheduleStore {
    /// Returns the identity and capabilities of the store.
    fn info(&self) -> &StoreInfo;

    /// Appends a batch and returns one result for each [`Append`], in their order.
    ///
    /// Each append is atomic. A stream occurs at most once in a batch; a later append to it is
    /// `Invalid`. A conflict and an append that is invalid by itself do not affect the others. If
    /// the database refuses the content of an append, every append of its transaction is `Invalid`,
    /// and none is written: send them in smaller batches. The writer of a
    /// [`Runtime`](crate::Runtime) does, so a command never fails because of another one.
    ///
    /// A batch is not ordered across streams. If the order across streams matters, use sequential
    /// calls or one append to several streams. A [condition](Append::unless) sees the earlier appends
    /// of its batch, and may see later ones that have no condition.
    ///
    /// A result is returned when it is durable, and all results of a batch together.
    ///
    /// # Cancellation safety
    /// If the future is dropped, the append may or may not take effect. Poll it to its end or drop it:
    /// on SQLite, other writes of the store wait for it until then.
    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, AppendError>>>;

    /// Reads one page of a stream: at most `limit` events after `after`.
    ///
    /// Fewer than `limit` events mean that the stream ended there.
    fn read_stream<'a>(
        &'a self,
        stream: &'a StreamId,
        after: Version,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>>;

    /// Reads one page of the log.
    ///
    /// # Errors
    /// `Invalid` if the [filter is invalid](super::Filter::check). Otherwise as every read.
    fn read_log(&self, read: ReadLog) -> BoxFuture<'_, Result<LogPage, StoreError>>;

    /// Returns the id of the event at `position`, also above the high-water mark of this process.
    ///
    /// `None` if there is no such event. Another process may have read further than this one, so a
    /// position alone does not show whether events were lost. The event at the position does. The
    /// default implementation reads the log, which suffices if all processes share one high-water
    /// mark.
    fn event_id_at(&self, position: Position) -> BoxFuture<'_, Result<Option<Uuid>, StoreError>> {
        let Some(before) = position.get().checked_sub(1) else {
            return Box::pin(std::future::ready(Ok(None)));
        };
        let read = self.read_log(ReadLog::after(Position::new(before)).upto(position).limit(1));
        Box::pin(async move { Ok(read.await?.events.first().map(|event| event.id)) })
    }

    /// Confirms that everything visible before the call is durable; for answers that rest on a
    /// read.
    ///
    /// The default implementation does nothing: it suits stores whose commits are visible only once
    /// they are durable. On PostgreSQL with synchronous standbys the call takes one transaction and
    /// waits for a standby.
    ///
    /// # Errors
    /// `Unavailable` if the confirmation does not arrive in time; a failover may lose what was
    /// read.
    fn confirm_durable(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Returns the high-water mark: no new event can appear at or below it.
    ///
    /// It is [`Position::START`] in an empty log.
    fn high_water_mark(&self) -> BoxFuture<'_, Result<Position, StoreError>>;

    /// Returns the transaction that holds back the high-water mark at this moment, if any.
    ///
    /// It is an append in flight, perhaps for a millisecond only, or a transaction left open after
    /// an append. The default is `None`, for stores that commit one transaction after the other.
    fn stall(&self) -> BoxFuture<'_, Result<Option<HighWaterStall>, StoreError>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Subscribes to the last position up to which the log is known to be stable.
    ///
    /// It wakes the readers of this process after an append of this process. Appends of other
    /// processes should show here soon, but need not: readers also poll, once a second.
    fn appended(&self) -> watch::Receiver<Position>;

    /// Loads the layout, the versions and the start position of a projection's read model.
    fn projection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<StoredProjection, StoreError>>;

    /// Loads a checkpoint; the default one if none was saved.
    fn checkpoint<'a>(&'a self, key: &'a CheckpointKey) -> BoxFuture<'a, Result<Checkpoint, StoreError>>;

    /// Loads all checkpoints of a projection, also those of earlier versions and layouts.
    fn checkpoints<'a>(
        &'a self,
        projection: &'a str,
    ) -> BoxFuture<'a, Result<Vec<(CheckpointKey, Checkpoint)>, StoreError>>;

    /// Makes all writes in one transaction, or none.
    fn write_progress(&self, writes: Vec<ProgressWrite>) -> BoxFuture<'_, Result<(), CheckpointError>>;

    /// Returns parked events from a position on, oldest first, at most `limit`.
    fn parked<'a>(
        &'a self,
        key: &'a CheckpointKey,
        from: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>>;

    /// Returns the requests to a projection from `from` on, at most `limit`.
    fn requests<'a>(
        &'a self,
        projection: &'a str,
        from: Request,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredRequest>, StoreError>>;

    /// Returns what operators control, by projection.
    fn controls(&self) -> BoxFuture<'_, Result<BTreeMap<String, ProjectionControl>, StoreError>>;

    /// Changes what operators control of a projection; returns the result.
    fn control<'a>(
        &'a self,
        projection: &'a str,
        change: ControlChange,
    ) -> BoxFuture<'a, Result<ProjectionControl, StoreError>>;

    /// Loads the checkpoint of the publisher; the default one if none was saved.
    fn publisher_checkpoint(&self) -> BoxFuture<'_, Result<PublisherCheckpoint, StoreError>>;

    /// Moves the checkpoint of the publisher from exactly `from` to `to`.
    ///
    /// Returns whether it was there. If not, or if the epoch of `to` is lower, the caller is fenced.
    fn save_publisher_checkpoint(
        &self,
        from: PublisherCheckpoint,
        to: PublisherCheckpoint,
    ) -> BoxFuture<'_, Result<bool, StoreError>>;

    /// Acquires the lease `name` for `owner`; returns `None` if another owner holds it.
    ///
    /// The lease is available if it is free, has expired or already belongs to `owner`. The clock
    /// is the store's. Every new owner gets a higher epoch; a repeated acquisition by the owner
    /// keeps the epoch.
    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        owner: Uuid,
        ttl: std::time::Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>>;

    /// Takes a lease over from another owner, if its epoch and expiry are still as in `seen`.
    ///
    /// For a lease that its owner no longer renews although it is live by the store's clock,
    /// because the clock was ahead when the lease was written.
    fn take_over_lease<'a>(
        &'a self,
        seen: &'a LeaseInfo,
        owner: Uuid,
        ttl: std::time::Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>>;

    /// Renews leases; returns, in the same order, whether each is still held.
    ///
    /// A lease is held if owner and epoch are unchanged and the lease was not released. A lost lease
    /// does not affect the others. A node calls this several times within a TTL, with all leases
    /// that it holds. A back end should renew them in one transaction.
    fn renew_leases<'a>(
        &'a self,
        leases: &'a [Lease],
        ttl: std::time::Duration,
    ) -> BoxFuture<'a, Result<Vec<bool>, StoreError>>;

    /// Releases a lease at once; does nothing if another owner holds it.
    fn release_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Returns all leases that were ever taken, by name.
    fn leases(&self) -> BoxFuture<'_, Result<Vec<LeaseInfo>, StoreError>>;

    /// Loads the snapshot of a stream, if there is one.
    fn snapshot<'a>(&'a self, stream: &'a StreamId) -> BoxFuture<'a, Result<Option<Snapshot>, StoreError>>;

    /// Replaces the snapshot of a stream, unless the stored one is newer and of the same revision.
    fn save_snapshot<'a>(
        &'a self,
        stream: &'a StreamId,
        snapshot: Snapshot,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Finds the events of a command in a stream, at whatever time they were appended.
    ///
    /// Returns `None` if there are none. Costs one index look-up, however large the stream and the
    /// log are. Sees every append that was answered before the call.
    fn command_events<'a>(
        &'a self,
        stream: &'a StreamId,
        command: Uuid,
    ) -> BoxFuture<'a, Result<Option<CommandEvents>, StoreError>>;

    /// Returns the events with a [correlation id](crate::Metadata::correlation_id), in log order.
    ///
    /// Without one of its own, a command has its id as the correlation id, and its nested commands
    /// pass it on. So these are the events that the command has caused. The id of a nested command
    /// finds only its own events.
    ///
    /// Returns at most `limit` events (0 counts as 1) after `after`, up to the high-water mark; fewer
    /// if they are large, and none only at the end. The default scans the log.
    fn correlated(
        &self,
        id: Uuid,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<RecordedEvent>, StoreError>> {
        let correlates = move |event: &RecordedEvent| {
            let correlation = || event.decode_metadata().ok().and_then(|metadata| metadata.correlation_id);
            event.command_id == id || correlation() == Some(id)
        };
        Box::pin(async move {
            let (mut found, mut after, limit) = (Vec::new(), after, limit.max(1));
            while found.len() < limit {
                let page = self.read_log(ReadLog::after(after)).await?;
                let (left, has_more) = (limit - found.len(), page.has_more() && page.scanned_to > after);
                after = page.scanned_to;
                found.extend(page.events.into_iter().filter(correlates).take(left));
                if !has_more {
                    break;
                }
            }
            Ok(found)
        })
    }

    /// Returns the record of the command with this id, if it exists and was not deleted.
    fn command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<CommandRecord>, StoreError>>;

    /// Makes the current database the store's own, and returns the store's id from now on.
    ///
    /// Stop all nodes first: running nodes keep the old identity. Idempotent for [`Adopt::Moved`];
    /// every [`Adopt::Copy`] gives a new id.
    ///
    /// # Errors
    /// `Invalid` by default, for stores that cannot be copied; `Storage` if the login does not own
    /// the tables.
    fn adopt(&self, adopt: Adopt) -> BoxFuture<'_, Result<Uuid, StoreError>> {
        let reason = format!(
            "adopting ({adopt:?}) failed: a store of the kind {} does not support it",
            self.info().backend
        );
        Box::pin(std::future::ready(Err(StoreError::Invalid { reason })))
    }

    /// Records the outcome of a command; the first record of a command is kept and returned.
    ///
    /// The store replaces the time in `record` by its own.
    fn record_command(&self, record: CommandRecord) -> BoxFuture<'_, Result<CommandRecord, StoreError>>;

    /// Deletes at most `limit` command records older than `age`; returns the number deleted.
    fn forget_commands(
        &self,
        age: std::time::Duration,
        limit: usize,
    ) -> BoxFuture<'_, Result<usize, StoreError>>;

    /// Removes and then puts timers of a process, all in one transaction or none.
    ///
    /// A process has one timer of each instance and name. A removal applies to a timer whose version
    /// is at most the given one. A put inserts the timer, or replaces one of a lower version. Timers
    /// of the same or a higher version stay, so repeating the call moves no due time. A timer with
    /// an empty name is also replaced by one of the same version: putting it again reschedules the
    /// instance. If a call puts a timer twice, the higher version wins.
    ///
    /// The store's clock is the one of its leases. The call is idempotent: after an error without a
    /// known outcome, repeat it.
    ///
    /// # Errors
    /// `Invalid` if the process, an instance or a name is no text that the id of a stream may be;
    /// only a name may be empty.
    fn write_timers<'a>(
        &'a self,
        process: &'a str,
        put: Vec<NewTimer>,
        remove: Vec<TimerRef>,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Returns the timers of a process that are due by the store's clock, at most `limit`.
    ///
    /// The oldest due time is first. Also returns when the next timer is due. Reads no timer after
    /// that one, however many are pending.
    ///
    /// # Errors
    /// `Invalid` if `limit` is above 10,000 ([`StoredTimer::MAX_LIMIT`]).
    fn due_timers<'a>(
        &'a self,
        process: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<DueTimers, StoreError>>;

    /// Returns timers of a process, or of all, after the last timer of the previous page.
    ///
    /// Their order is that of due time, process, instance and name. Returns fewer than `limit` only
    /// at the end. Only the four parts of the order of `after` matter.
    ///
    /// # Errors
    /// `Invalid` if `limit` is above 10,000 ([`StoredTimer::MAX_LIMIT`]).
    fn timers<'a>(
        &'a self,
        process: Option<&'a str>,
        after: Option<&'a StoredTimer>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredTimer>, StoreError>>;
}

/// A value that [`Builder::store`](crate::runtime::Builder::store) accepts: a store or a shared
/// store.
pub trait IntoEventStore {
    /// Returns the shared store.
    fn into_event_store(self) -> Arc<dyn EventStore>;
}

impl<S: EventStore> IntoEventStore for S {
    fn into_event_store(self) -> Arc<dyn EventStore> {
        Arc::new(self)
    }
}

impl<S: EventStore> IntoEventStore for Arc<S> {
    fn into_event_store(self) -> Arc<dyn EventStore> {
        self
    }
}

impl IntoEventStore for Arc<dyn EventStore> {
    fn into_event_store(self) -> Arc<dyn EventStore> {
        self
    }
}
