//! The event store in PostgreSQL: a log without gaps, while writers never wait for each other.
//!
//! - Positions come from a sequence. Before a transaction draws a position, it takes a shared
//!   advisory lock on the sequence's current value (the *low-water lock*). Readers stay below the
//!   lowest such lock that is held, so they never pass a position that is still to appear (I1). A
//!   transaction without events holds back no reader.
//! - The unique index on stream and version decides between concurrent appends (I2).
//! - A batch of appends is one call of one function: one round trip and one commit.
//! - An append with tags locks them, so a decision misses no event that matches its query (I13).
//! - If an append gets no answer, the store looks up its events on another connection before it
//!   answers or repeats the append (I4).
//!
//! The SQL is in `migrations/postgres`, with the reasons beside it.

mod adopt;
mod append;
mod append_call;
mod append_failure;
mod append_partition;
mod append_retry;
mod borrowed;
mod command_batchers;
mod commands;
mod commit_recovery;
mod conditional_append;
mod conditional_permits;
mod connection;
mod control;
mod convert;
mod correlated;
mod detach_on_drop;
mod durability;
mod error;
mod high_water_mark;
mod inner;
mod leases;
mod notices;
mod notify;
mod numbering;
mod numbers;
mod options;
pub(crate) mod progress;
mod queries;
mod query_arguments;
mod read;
mod request_batcher;
mod scheduled_commands;
mod schedules;
mod schema;
mod snapshots;
mod statements;
mod stuck;
mod tail_cache;
mod tailer;
mod timers;
mod transaction_pool;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use uuid::Uuid;

pub(crate) use self::borrowed::Borrowed;
use self::connection::Connections;
use self::detach_on_drop::detach_on_drop;
pub(crate) use self::error::{failed, is_outage, may_be_of_transaction};
use self::inner::PgInner;
use self::notify::Hints;
pub use self::options::PostgresOptions;
pub(crate) use self::schema::{database_of, prepare_read_model};
pub(crate) use self::statements::Schema;
pub(crate) use self::transaction_pool::{BorrowedTransaction, TransactionPool};
use super::{
    Adopt, Append, AppendError, Appended, BoxFuture, Checkpoint, CheckpointError, CheckpointKey,
    CommandEvents, CommandRecord, ControlChange, DueTimers, EventStore, HighWaterStall, Lease, LeaseInfo,
    LogPage, NewTimer, ParkedEvent, ProgressWrite, ProjectionControl, PublisherCheckpoint, ReadLog, Request,
    Snapshot, StoreError, StoreInfo, StoredProjection, StoredRequest, StoredTimer, TimerRef,
};
use crate::event::{Position, RecordedEvent, StreamId, Version};
use crate::panic::panic_text;
use crate::startup;

/// Maximum number of append transactions that the runtime keeps in flight: one is in transit while
/// the server commits the other, if that takes long.
const APPENDS: usize = 2;

/// An event store in PostgreSQL 15 or newer.
///
/// Clones are handles to the same connections. Any number of processes may use one database. The
/// tables are in a schema of their own.
///
/// ```no_run
/// # async fn example() -> Result<(), storied::StoreError> {
/// use storied::{PostgresOptions, PostgresStore};
///
/// let store = PostgresStore::connect("postgres://shop:secret@db.internal/shop").await?;
/// // The URL is that of the variable DATABASE_URL.
/// let other = PostgresOptions::new().schema("audit").max_connections(4).connect().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct PostgresStore {
    shared: Arc<Shared>,
}

/// Ends the tailer when the last handle is dropped.
struct Shared {
    core: Arc<PgInner>,
    tailer: AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.tailer.abort();
    }
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStore").field("info", &self.shared.core.info).finish_non_exhaustive()
    }
}

impl PostgresOptions {
    /// Connects, creates or migrates the tables if needed, and checks all conditions of the log.
    ///
    /// Any number of processes may do so at the same time.
    ///
    /// # Errors
    /// - `Invalid` for an invalid URL or schema name, or an option out of its range;
    /// - `Misconfigured`, with a remedy, if the server refuses the login, or its version or settings
    ///   do not meet the requirements;
    /// - `Incompatible`, with a remedy, if the tables, the sequence or the codec do not;
    /// - `Storage` if rights are missing;
    /// - `Unavailable` if the server cannot be reached within
    ///   [`connect_timeout`](Self::connect_timeout).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn connect(self) -> Result<PostgresStore, StoreError> {
        self.validate()?;
        let schema = Schema::new(&self.schema)?;
        let connections = Arc::new(self.connections()?);
        let hints = if self.notify { Some(self.hints(&schema)?) } else { None };
        let Self { codec, migrate, index_by_name, connect_timeout, .. } = self;
        let prepare = || schema::prepare(&connections, &schema, codec, migrate, index_by_name);
        let reason = || connections.refusal();
        let prepared =
            startup::wait_for("connecting to PostgreSQL", connect_timeout, reason, prepare).await?;
        let indexed = prepared.indexed_by_name;
        let info = StoreInfo::new("postgres", prepared.id, codec)
            .with_append_concurrency(APPENDS)
            .with_adoption(prepared.adoption);
        let open = || PostgresStore::open(info.clone(), indexed, &schema, connections.clone(), hints.clone());
        startup::wait_for("reading the high-water mark", connect_timeout, reason, open).await
    }
}

impl PostgresStore {
    /// Connects to the database at `url` with the defaults of [`PostgresOptions`].
    ///
    /// If `url` is empty, the variable `DATABASE_URL` is used. Creates or migrates the tables of
    /// storied if needed.
    ///
    /// # Errors
    /// See [`PostgresOptions::connect`].
    pub async fn connect(url: impl Into<String>) -> Result<Self, StoreError> {
        PostgresOptions::new().url(url).connect().await
    }

    async fn open(
        info: StoreInfo,
        indexed_by_name: bool,
        schema: &Schema,
        connections: Arc<Connections>,
        hints: Option<Hints>,
    ) -> Result<Self, StoreError> {
        let core = Arc::new(PgInner::new(info, indexed_by_name, schema, connections, hints.is_some()));
        core.high_water_mark.refresh(&core.connections, &core.sql).await?;
        let tailer = tokio::spawn(tailer::run_tailer(core.clone(), hints)).abort_handle();
        Ok(Self { shared: Arc::new(Shared { core, tailer }) })
    }

    fn call<'a, T: 'a, E: From<StoreError> + 'a, F>(
        &'a self,
        doing: &'static str,
        call: F,
    ) -> BoxFuture<'a, Result<T, E>>
    where
        F: Future<Output = Result<T, E>> + Send + 'a,
    {
        Box::pin(self.shared.core.timed_call(doing, call))
    }

    /// Runs a call that commits, like [`call`](Self::call).
    fn commit<'a, T: Send + 'a, E: From<StoreError> + Send + 'a, F>(
        &'a self,
        doing: &'static str,
        call: F,
    ) -> BoxFuture<'a, Result<T, E>>
    where
        F: Future<Output = Result<T, E>> + Send + 'a,
    {
        Box::pin(self.shared.core.commit_call(doing, call))
    }
}

impl EventStore for PostgresStore {
    fn info(&self) -> &StoreInfo {
        &self.shared.core.info
    }

    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, AppendError>>> {
        let core = self.shared.core.clone();
        let appends = batch.len();
        // The append runs to completion even if the caller drops the future.
        let append = AssertUnwindSafe(detach_on_drop(async move { append::append(&core, batch).await }));
        Box::pin(append.catch_unwind().map(move |answers| {
            answers.unwrap_or_else(|panic| {
                let reason =
                    format!("{}: the append panicked: {}", append_failure::DOING, panic_text(&*panic));
                vec![Err(StoreError::OutcomeUnknown { reason, source: None }.into()); appends]
            })
        }))
    }

    fn read_stream<'a>(
        &'a self,
        stream: &'a StreamId,
        after: Version,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        self.call("reading a stream", read::stream(&self.shared.core, stream, after, limit))
    }

    fn read_log(&self, read: ReadLog) -> BoxFuture<'_, Result<LogPage, StoreError>> {
        self.call("reading the log", async move {
            read.filter.check()?;
            read::log(&self.shared.core, &read).await
        })
    }

    fn event_id_at(&self, position: Position) -> BoxFuture<'_, Result<Option<Uuid>, StoreError>> {
        self.call("looking up an event", read::event_id_at(&self.shared.core, position))
    }

    fn confirm_durable(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(durability::confirm_all(&self.shared.core))
    }

    fn high_water_mark(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        let core = &self.shared.core;
        self.call("reading the high-water mark", core.high_water_mark.refresh(&core.connections, &core.sql))
    }

    fn appended(&self) -> watch::Receiver<Position> {
        self.shared.core.high_water_mark.subscribe()
    }

    fn projection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<StoredProjection, StoreError>> {
        self.call("reading a projection", control::projection(&self.shared.core, name))
    }

    fn checkpoint<'a>(&'a self, key: &'a CheckpointKey) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        self.call("reading a checkpoint", control::checkpoint(&self.shared.core, key))
    }

    fn checkpoints<'a>(
        &'a self,
        projection: &'a str,
    ) -> BoxFuture<'a, Result<Vec<(CheckpointKey, Checkpoint)>, StoreError>> {
        self.call("reading checkpoints", control::checkpoints(&self.shared.core, projection))
    }

    fn write_progress(&self, writes: Vec<ProgressWrite>) -> BoxFuture<'_, Result<(), CheckpointError>> {
        self.commit(
            "writing the progress of a projection",
            control::write_progress(&self.shared.core, writes),
        )
    }

    fn parked<'a>(
        &'a self,
        key: &'a CheckpointKey,
        from: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        self.call("reading parked events", control::parked(&self.shared.core, key, from, limit))
    }

    fn requests<'a>(
        &'a self,
        projection: &'a str,
        from: Request,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredRequest>, StoreError>> {
        self.call("reading requests", control::requests(&self.shared.core, projection, from, limit))
    }

    fn controls(&self) -> BoxFuture<'_, Result<BTreeMap<String, ProjectionControl>, StoreError>> {
        self.call("reading the controls of the projections", control::controls(&self.shared.core))
    }

    fn control<'a>(
        &'a self,
        projection: &'a str,
        change: ControlChange,
    ) -> BoxFuture<'a, Result<ProjectionControl, StoreError>> {
        self.commit("controlling a projection", control::control(&self.shared.core, projection, change))
    }

    fn publisher_checkpoint(&self) -> BoxFuture<'_, Result<PublisherCheckpoint, StoreError>> {
        self.call("reading the checkpoint of the publisher", control::publisher(&self.shared.core))
    }

    fn save_publisher_checkpoint(
        &self,
        from: PublisherCheckpoint,
        to: PublisherCheckpoint,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        let save = control::save_publisher(&self.shared.core, from, to);
        self.commit("saving the checkpoint of the publisher", save)
    }

    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        self.commit("acquiring a lease", leases::acquire_lease(&self.shared.core, name, owner, ttl))
    }

    fn take_over_lease<'a>(
        &'a self,
        seen: &'a LeaseInfo,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        self.commit("taking a lease over", leases::take_over_lease(&self.shared.core, seen, owner, ttl))
    }

    fn renew_leases<'a>(
        &'a self,
        leases: &'a [Lease],
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        self.commit("renewing leases", leases::renew_leases(&self.shared.core, leases, ttl))
    }

    fn release_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<(), StoreError>> {
        self.commit("releasing a lease", leases::release_lease(&self.shared.core, lease))
    }

    /// Returns the stall, if any; a lasting one is also logged as a warning.
    fn stall(&self) -> BoxFuture<'_, Result<Option<HighWaterStall>, StoreError>> {
        self.call("looking for a stall", tailer::stall(&self.shared.core))
    }

    fn leases(&self) -> BoxFuture<'_, Result<Vec<LeaseInfo>, StoreError>> {
        self.call("reading the leases", leases::leases(&self.shared.core))
    }

    fn snapshot<'a>(&'a self, stream: &'a StreamId) -> BoxFuture<'a, Result<Option<Snapshot>, StoreError>> {
        self.call("reading a snapshot", snapshots::snapshot(&self.shared.core, stream))
    }

    fn save_snapshot<'a>(
        &'a self,
        stream: &'a StreamId,
        snapshot: Snapshot,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        self.call("saving a snapshot", async move {
            snapshots::save_snapshot(&self.shared.core, stream, &snapshot).await
        })
    }

    fn command_events<'a>(
        &'a self,
        stream: &'a StreamId,
        command: Uuid,
    ) -> BoxFuture<'a, Result<Option<CommandEvents>, StoreError>> {
        let find = commands::events(&self.shared.core, stream, command);
        self.call("looking up the events of a command", find)
    }

    fn correlated(
        &self,
        id: Uuid,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<RecordedEvent>, StoreError>> {
        self.call(correlated::DOING, correlated::correlated(&self.shared.core, id, after, limit))
    }

    fn adopt(&self, adopt: Adopt) -> BoxFuture<'_, Result<Uuid, StoreError>> {
        self.call(adopt::ADOPTING, adopt::adopt(&self.shared.core, adopt))
    }

    fn command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<CommandRecord>, StoreError>> {
        self.call("reading a command record", commands::command(&self.shared.core, id))
    }

    fn record_command(&self, record: CommandRecord) -> BoxFuture<'_, Result<CommandRecord, StoreError>> {
        self.call("recording a command", commands::record_command(&self.shared.core, record))
    }

    fn forget_commands(&self, age: Duration, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        let forget = commands::forget_commands(&self.shared.core, age, limit);
        self.call("deleting old command records", forget)
    }

    fn write_timers<'a>(
        &'a self,
        process: &'a str,
        put: Vec<NewTimer>,
        remove: Vec<TimerRef>,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        self.commit("writing timers", timers::write_timers(&self.shared.core, process, put, remove))
    }

    fn due_timers<'a>(
        &'a self,
        process: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<DueTimers, StoreError>> {
        self.call("reading due timers", timers::due_timers(&self.shared.core, process, limit))
    }

    fn timers<'a>(
        &'a self,
        process: Option<&'a str>,
        after: Option<&'a StoredTimer>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredTimer>, StoreError>> {
        self.call("listing timers", timers::timers(&self.shared.core, process, after, limit))
    }
}
