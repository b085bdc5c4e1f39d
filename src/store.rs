//! The port to the event store: an append-only log of streams, and the small amount of state that must live beside it
//! (checkpoints, leases, snapshots, who is paused).
//!
//! Every back end keeps the same promises, and passes the same suite (`storied::testing::store`):
//!
//! - **I1** what [`EventStore::read_log`] has passed is complete: no event ever appears below
//!   [`scanned_to`](LogPage::scanned_to);
//! - **I2** versions of a stream are 1, 2, 3 …, an append that expected something else is refused without a trace;
//! - **I3** an append is answered when it is durable;
//! - **I4** an append whose commit got no answer is looked up before it is answered.
//!
//! The trait is object-safe (`Arc<dyn EventStore>`), so that no back end's type leaks into user code; one boxed future is
//! nothing beside a commit. Unless a method says otherwise it is cancel-safe in this sense: a dropped call may or may not
//! have taken effect, never half.

mod adoption;
mod append;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod columns;
mod command_events;
mod command_record;
mod decide;
mod error;
mod filter;
mod lease;
mod memory;
mod paging;
#[cfg(feature = "postgres")]
pub(crate) mod postgres;
mod progress;
#[cfg(feature = "sqlite")]
pub(crate) mod sqlite;
mod writer;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;
use uuid::Uuid;

pub use self::adoption::{Adopt, Adoption, Home};
pub use self::append::{Append, Appended, Conflict, ExpectedVersion, StreamAppend};
pub use self::command_events::CommandEvents;
pub use self::command_record::CommandRecord;
pub use self::error::{AppendError, StoreError};
pub use self::filter::Filter;
pub use self::lease::{Lease, LeaseInfo};
pub use self::memory::MemoryStore;
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresOptions, PostgresStore};
pub use self::progress::{Checkpoint, CheckpointError, CheckpointRecord, ParkedEvent};
#[cfg(feature = "sqlite")]
pub use self::sqlite::{SqliteOptions, SqliteStore};
pub use self::writer::WriterStatus;
pub(crate) use self::writer::{Chain, Outcome, Submission, Writer, WriterOptions};
use crate::codec::Codec;
use crate::event::{Position, RecordedEvent, StreamId, Version};
pub use crate::future::BoxFuture;

/// Who a store is and what it can do; fixed while it is open.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoreInfo {
    /// Made when the store was created. Checkpoints and mirrors carry it, so that a restored or another database is
    /// noticed instead of mixed up.
    pub id: Uuid,
    /// How the store keeps payloads.
    pub codec: Codec,
    /// `memory`, `sqlite`, …
    pub backend: &'static str,
    /// How many append calls may usefully run at the same time. SQLite has one writer; PostgreSQL gains from two or more.
    pub append_concurrency: usize,
    /// Whether the database is the one that the store belongs to.
    pub adoption: Adoption,
}

impl StoreInfo {
    /// For a back end's constructor. One append at a time, until
    /// [`with_append_concurrency`](Self::with_append_concurrency) says otherwise.
    pub fn new(backend: &'static str, id: Uuid, codec: Codec) -> Self {
        Self { id, codec, backend, append_concurrency: 1, adoption: Adoption::Adopted }
    }

    /// Sets [`append_concurrency`](Self::append_concurrency).
    #[must_use]
    pub fn with_append_concurrency(mut self, appends: usize) -> Self {
        self.append_concurrency = appends;
        self
    }

    /// Sets [`adoption`](Self::adoption). Default: adopted.
    #[must_use]
    pub fn with_adoption(mut self, adoption: Adoption) -> Self {
        self.adoption = adoption;
        self
    }
}

/// Which part of the log to read next.
#[derive(Debug, Clone)]
pub struct ReadLog {
    /// Events after this position.
    pub after: Position,
    /// Not beyond this position, if given: a bounded scan whose cost is fixed even when nothing matches.
    pub upto: Option<Position>,
    /// Only these events.
    pub filter: Filter,
    /// At most this many events; at least 1. A page ends earlier, though with one event at the earliest, when its events
    /// take about 4 MiB.
    pub limit: usize,
}

impl ReadLog {
    /// Everything after `position`, 1,000 events at a time.
    pub fn after(position: Position) -> Self {
        Self { after: position, upto: None, filter: Filter::all(), limit: 1_000 }
    }

    /// Sets [`upto`](Self::upto).
    #[must_use]
    pub fn upto(mut self, position: Position) -> Self {
        self.upto = Some(position);
        self
    }

    /// Sets [`filter`](Self::filter).
    #[must_use]
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// Sets [`limit`](Self::limit); 0 counts as 1.
    #[must_use]
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit.max(1);
        self
    }
}

/// A page of the log, in log order.
#[derive(Debug, Clone, Default)]
pub struct LogPage {
    /// The events that matched.
    pub events: Vec<RecordedEvent>,
    /// How far the scan got: every matching event up to here is in this page or an earlier one, for good. The position of
    /// an event that exists (not necessarily one that matched), or `after` when there was none.
    pub scanned_to: Position,
    /// The last stable event of the log when the page was read (see [`EventStore::frontier`]). With [`upto`](ReadLog::upto), perhaps
    /// a slightly older one, but not one below that.
    pub head: Position,
}

impl LogPage {
    /// Whether the log went on behind this page when it was read.
    pub fn has_more(&self) -> bool {
        self.scanned_to < self.head
    }
}

/// Who keeps the frontier from moving, so that nobody sees the events behind it yet.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Stall {
    /// The server process that holds the lowest low-water lock; `None` for a prepared transaction.
    pub pid: Option<i32>,
    /// What its client calls itself.
    pub application_name: String,
    /// What it does: `active`, `idle in transaction` …
    pub state: String,
    /// How long its transaction has been open.
    pub open_for: std::time::Duration,
    /// Its current or last statement, the first 300 characters. Empty if this login may not see it.
    pub query: String,
    /// Up to where the log can be read meanwhile.
    pub low_water: Position,
}

/// A folded state, kept so that a long stream need not be folded from its start. A cache: losing one loses nothing.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The version up to which events are folded in.
    pub version: Version,
    /// The schema revision of the state; another one is ignored by the reader.
    pub revision: u32,
    /// The encoded state.
    pub state: Bytes,
}

/// An event store. See the [module](self) for its promises.
pub trait EventStore: Send + Sync + 'static {
    /// Who the store is.
    fn info(&self) -> &StoreInfo;

    /// Appends a batch: each [`Append`] succeeds or is refused alone, all or nothing within it. One answer for each, in
    /// their order. An append may follow another on the same stream in one batch and is then decided after it.
    /// Between streams a batch has no order: what it has for one of them may be put together. Who needs one appends one by one,
    /// or several streams in one append.
    ///
    /// Answered when durable. Dropping the future does not say whether the append happened.
    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, AppendError>>>;

    /// One page of a stream: events after `after`, at most `limit`. Fewer than `limit` means that the stream ended there.
    fn read_stream<'a>(
        &'a self,
        stream: &'a StreamId,
        after: Version,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>>;

    /// One page of the log.
    fn read_log(&self, read: ReadLog) -> BoxFuture<'_, Result<LogPage, StoreError>>;

    /// The id of the event at `position`, if there is one; also above the high-water mark of this process.
    ///
    /// Another process may have read further than this one: positions of its events say nothing about what was lost. The event
    /// at that position does. By default it is read from the log, which suffices where the mark is the same for all processes.
    fn event_id_at(&self, position: Position) -> BoxFuture<'_, Result<Option<Uuid>, StoreError>> {
        let Some(before) = position.get().checked_sub(1) else {
            return Box::pin(std::future::ready(Ok(None)));
        };
        let read = self.read_log(ReadLog::after(Position::new(before)).upto(position).limit(1));
        Box::pin(async move { Ok(read.await?.events.first().map(|event| event.id)) })
    }

    /// Confirms that everything is durable that was visible before the call: for an answer that rests on a read.
    ///
    /// Where a commit is visible only once it is durable, there is nothing to do, as by default. On PostgreSQL with synchronous
    /// standbys it takes one transaction, and waits for a standby.
    ///
    /// # Errors
    /// `Unavailable` when it cannot be confirmed in time; what was read may be lost by a failover.
    fn confirm_durable(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// The position of the last event below which nothing new can ever appear; [`Position::START`] in an empty log.
    fn frontier(&self) -> BoxFuture<'_, Result<Position, StoreError>>;

    /// Who keeps the frontier from moving at this moment, so that nobody can read beyond it: an append that is under way, if
    /// only for a millisecond, or a transaction that somebody has left open after appending. None by default, as where
    /// commits come one after the other.
    fn stall(&self) -> BoxFuture<'_, Result<Option<Stall>, StoreError>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Wakes readers of this process after it appended; carries the last position up to which the log is known to be stable. A
    /// hint: another process's appends need not show here, so whoever waits also polls.
    fn appended(&self) -> watch::Receiver<Position>;

    /// How far `name` has got; the default checkpoint if it was never saved.
    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>>;

    /// Moves the checkpoint of `name` from exactly `from` to `to`, and parks an event with it, in one transaction.
    fn save_checkpoint<'a>(
        &'a self,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>>;

    /// The events that `name` has parked, oldest first.
    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>>;

    /// Forgets a parked event; whether there was one.
    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;

    /// The names of the projections that are to stand still, on every node.
    fn paused(&self) -> BoxFuture<'_, Result<BTreeSet<String>, StoreError>>;

    /// Remembers that the projection `name` is to stand still, or to go on.
    fn set_paused<'a>(&'a self, name: &'a str, paused: bool) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Takes the lease `name` for `owner` if it is free, has run out, or is `owner`'s already; `None` if another holds it.
    /// Time is the store's. Every new owner gets a higher epoch; taking one's own lease again keeps it.
    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        owner: Uuid,
        ttl: std::time::Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>>;

    /// Takes a lease over from another owner, if it is still exactly as it was `seen`: same epoch, same expiry. For one that its owner
    /// does not renew any more although the store's clock says that it is live, because that clock was ahead when it was written.
    fn take_over_lease<'a>(
        &'a self,
        seen: &'a LeaseInfo,
        owner: Uuid,
        ttl: std::time::Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>>;

    /// Prolongs a lease that is still one's own (same owner and epoch, not taken by another since).
    fn renew_lease<'a>(
        &'a self,
        lease: &'a Lease,
        ttl: std::time::Duration,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;

    /// Renews leases as [`renew_lease`](Self::renew_lease) does; returns in the same order whether each is still its owner's.
    ///
    /// A lost lease does not affect the others. A node calls this several times within a TTL, with all leases that it holds: a
    /// back end renews them in one transaction. The default renews them one after the other.
    fn renew_leases<'a>(
        &'a self,
        leases: &'a [Lease],
        ttl: std::time::Duration,
    ) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move {
            let mut renewed = Vec::with_capacity(leases.len());
            for lease in leases {
                renewed.push(self.renew_lease(lease, ttl).await?);
            }
            Ok(renewed)
        })
    }

    /// Gives a lease back at once. Nothing happens if it is another's by now.
    fn release_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<(), StoreError>>;

    /// All leases that were ever taken, by name.
    fn leases(&self) -> BoxFuture<'_, Result<Vec<LeaseInfo>, StoreError>>;

    /// The snapshot of a stream, if there is one.
    fn snapshot<'a>(&'a self, stream: &'a StreamId) -> BoxFuture<'a, Result<Option<Snapshot>, StoreError>>;

    /// Replaces the snapshot of a stream, unless a newer one of the same revision is there.
    fn save_snapshot<'a>(
        &'a self,
        stream: &'a StreamId,
        snapshot: Snapshot,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Finds the events of a command in a stream, however long ago they were appended; `None` if there are none. Costs one
    /// look-up in an index, whatever the stream and the log contain. Sees every append that was answered before the call.
    fn command_events<'a>(
        &'a self,
        stream: &'a StreamId,
        command: Uuid,
    ) -> BoxFuture<'a, Result<Option<CommandEvents>, StoreError>>;

    /// What became of the command with this id, if that was recorded and not forgotten since.
    fn command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<CommandRecord>, StoreError>>;

    /// Makes the database that the store is in its own; the store's id from now on. Stop all nodes first: those that run
    /// keep what they knew. Idempotent for [`Adopt::Moved`]; every [`Adopt::Copy`] gives a new id.
    ///
    /// # Errors
    /// `Invalid` by default, as for a store that cannot be copied; `Storage` if the login does not own the tables.
    fn adopt(&self, adopt: Adopt) -> BoxFuture<'_, Result<Uuid, StoreError>> {
        let reason = format!("a store of the kind {} cannot be adopted ({adopt:?})", self.info().backend);
        Box::pin(std::future::ready(Err(StoreError::Invalid { reason })))
    }

    /// Records what became of a command, unless that was recorded before: the first record counts, and is returned. The
    /// time in `record` is replaced by the store's.
    fn record_command(&self, record: CommandRecord) -> BoxFuture<'_, Result<CommandRecord, StoreError>>;

    /// Forgets at most `limit` records that are older than `age`; how many there were.
    fn forget_commands(
        &self,
        age: std::time::Duration,
        limit: usize,
    ) -> BoxFuture<'_, Result<usize, StoreError>>;
}

/// What [`Builder::store`](crate::runtime::Builder::store) takes: a store, or one that is shared already.
pub trait IntoEventStore {
    /// The store, shared.
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
