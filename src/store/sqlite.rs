//! The embedded event store: one SQLite file, one connection that writes, several that read.
//!
//! SQLite runs one writing transaction at a time across all processes, and an append takes the
//! write lock before it reads the last position. So transactions commit in the order of their
//! positions, and the last visible event is the high-water mark (I1). The write-ahead log is synced
//! at every commit (I3). It also keeps readers and the writer from blocking each other.

mod append;
mod command_records;
mod connection;
mod convert;
mod error;
mod leases;
mod migrate;
mod number_cache;
mod options;
pub(crate) mod progress;
mod queries;
mod read;
mod scheduled_commands;
mod schedules;
mod schema;
mod shared;
mod snapshots;
mod tag_query;
mod tailer;
mod timers;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use tokio::sync::watch;
use uuid::Uuid;

use self::connection::{Readers, Writer};
pub(crate) use self::error::{failed, is_outage, may_be_of_transaction};
use self::number_cache::NumberCache;
pub use self::options::SqliteOptions;
use self::progress::{CONTROLS, PROGRESS};
pub(crate) use self::schema::home;
use self::shared::Shared;
use super::page_size::PageSizer;
use super::timer::timer_changes;
use super::{
    Adopt, Append, AppendError, Appended, BoxFuture, Checkpoint, CheckpointError, CheckpointKey,
    CommandEvents, CommandRecord, ControlChange, DueTimers, EventStore, Lease, LeaseInfo, LogPage, NewTimer,
    ParkedEvent, ProgressWrite, ProjectionControl, PublisherCheckpoint, ReadLog, Request, Snapshot,
    StoreError, StoreInfo, StoredProjection, StoredRequest, StoredTimer, TimerRef,
};
use crate::event::{Position, RecordedEvent, StreamId, Version};

/// An event store in a SQLite file.
///
/// Clones are handles to the same connections. Several processes may open the same file, but not
/// over a network file system. Tests with paused time use [`MemoryStore`](super::MemoryStore)
/// instead: their clock jumps while the threads of SQLite work.
///
/// ```no_run
/// # async fn example() -> Result<(), storied::StoreError> {
/// use storied::SqliteStore;
///
/// let store = SqliteStore::open("shop.db").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct SqliteStore {
    shared: Arc<Shared>,
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore").field("info", &self.shared.info).finish_non_exhaustive()
    }
}

impl SqliteOptions {
    /// Opens the store, and creates or migrates its tables if needed.
    ///
    /// Any number of processes may do so at the same time.
    ///
    /// # Errors
    /// - `Invalid` for a path that names no file, or an option out of its range;
    /// - `Incompatible` if the file is not a database, or was created by a newer storied or with
    ///   another codec;
    /// - `Storage` if the file cannot be opened or written;
    /// - `Unavailable` if other processes keep the file locked.
    pub async fn open(self) -> Result<SqliteStore, StoreError> {
        self.validate()?;
        let memory = ["", ":memory:"].iter().any(|name| self.path.as_os_str() == *name);
        if memory {
            let reason =
                format!("the path {:?} names no file; use MemoryStore for a store in memory", self.path);
            return Err(StoreError::Invalid { reason });
        }
        if self.path.to_str().is_some_and(|path| path.starts_with("sqlite:")) {
            let reason = format!("the path {:?} is a URL; pass the path of a file", self.path);
            return Err(StoreError::Invalid { reason });
        }
        if self.path.is_dir() {
            let reason = format!("{} is a directory; name a file in it", self.path.display());
            return Err(StoreError::Invalid { reason });
        }
        // A FIFO or a device: SQLite reports an I/O error.
        if self.path.metadata().is_ok_and(|file| !file.is_file()) {
            let reason = format!("{} is not a regular file; name a database", self.path.display());
            return Err(StoreError::Invalid { reason });
        }
        self.create()?;
        let shared = SqliteConnectOptions::new()
            .filename(literal_path(&self.path))
            .busy_timeout(self.busy_timeout)
            .disable_statement_logging();
        let writing = shared
            .clone()
            .create_if_missing(self.create_if_missing)
            .synchronous(SqliteSynchronous::Full)
            // On macOS a plain fsync leaves data in the drive's cache; elsewhere this changes
            // nothing.
            .pragma("fullfsync", "ON");
        // The file keeps this setting, so a file that may belong to another program is left
        // unchanged.
        let writing = if self.migrate { writing.journal_mode(SqliteJournalMode::Wal) } else { writing };
        let (connection, (id, adoption)) = self.prepare(&writing).await?;
        let reading = shared.pragma("query_only", "ON");
        let readers = Readers::new(reading);
        let head = read::high_water_mark(&readers).await?;
        let shared = Arc::new(Shared {
            info: StoreInfo::new("sqlite", id, self.codec).with_adoption(adoption),
            path: self.path,
            writer: Writer::new(writing, connection),
            readers,
            page_sizer: PageSizer::default(),
            numbers: NumberCache::default(),
            appended: watch::Sender::new(head),
        });
        tokio::spawn(tailer::run_tailer(Arc::downgrade(&shared)));
        Ok(SqliteStore { shared })
    }
}

impl SqliteStore {
    /// Opens the store at `path` with the defaults of [`SqliteOptions`]; creates it if needed.
    ///
    /// # Errors
    /// See [`SqliteOptions::open`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        SqliteOptions::new(path).open().await
    }

    /// Runs a transaction whose failed commit needs no look-up, because the caller repeats it.
    async fn transaction<T, E, W>(&self, doing: &'static str, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        W: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, E>> + Send + 'static,
    {
        self.shared.writer.transaction(doing, work).await
    }
}

/// Runs a call on a connection for reading.
macro_rules! on_reader {
    ($self:ident, $doing:expr, $reader:ident => $call:expr) => {
        Box::pin(async move {
            let mut session = $self.shared.readers.get($doing).await?;
            let $reader = &mut session.connection;
            let found = $call.await?;
            session.give_back();
            Ok(found)
        })
    };
}

impl EventStore for SqliteStore {
    fn info(&self) -> &StoreInfo {
        &self.shared.info
    }

    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, AppendError>>> {
        Box::pin(self.shared.append_batch(batch))
    }

    fn read_stream<'a>(
        &'a self,
        stream: &'a StreamId,
        after: Version,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        let Shared { readers, numbers, info, .. } = &*self.shared;
        Box::pin(read::stream(readers, numbers, info.codec, stream, after, limit))
    }

    fn read_log(&self, read: ReadLog) -> BoxFuture<'_, Result<LogPage, StoreError>> {
        Box::pin(async move {
            read.filter.check()?;
            let Shared { readers, page_sizer, numbers, info, .. } = &*self.shared;
            read::log(readers, page_sizer, numbers, info.codec, &read).await
        })
    }

    fn high_water_mark(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        Box::pin(read::high_water_mark(&self.shared.readers))
    }

    fn appended(&self) -> watch::Receiver<Position> {
        self.shared.appended.subscribe()
    }

    fn projection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<StoredProjection, StoreError>> {
        on_reader!(self, "reading a projection", reader => PROGRESS.projection(reader, name, Some(self.shared.info.id)))
    }

    fn checkpoint<'a>(&'a self, key: &'a CheckpointKey) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        on_reader!(self, "reading a checkpoint", reader => PROGRESS.checkpoint(reader, key, self.shared.info.id))
    }

    fn checkpoints<'a>(
        &'a self,
        projection: &'a str,
    ) -> BoxFuture<'a, Result<Vec<(CheckpointKey, Checkpoint)>, StoreError>> {
        on_reader!(self, "reading checkpoints", reader => PROGRESS.checkpoints(reader, projection, self.shared.info.id))
    }

    fn write_progress(&self, writes: Vec<ProgressWrite>) -> BoxFuture<'_, Result<(), CheckpointError>> {
        let store = self.shared.info.id;
        Box::pin(self.transaction("writing the progress of a projection", move |connection| {
            Box::pin(async move {
                for write in &writes {
                    PROGRESS.write(connection, store, write).await?;
                }
                Ok(())
            })
        }))
    }

    fn parked<'a>(
        &'a self,
        key: &'a CheckpointKey,
        from: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        on_reader!(self, "reading parked events", reader => PROGRESS.parked(reader, key, from, limit))
    }

    fn requests<'a>(
        &'a self,
        projection: &'a str,
        from: Request,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredRequest>, StoreError>> {
        on_reader!(self, "reading requests", reader => PROGRESS.requests(reader, projection, from, limit))
    }

    fn controls(&self) -> BoxFuture<'_, Result<BTreeMap<String, ProjectionControl>, StoreError>> {
        on_reader!(self, "reading the controls of the projections", reader => CONTROLS.all(reader))
    }

    fn control<'a>(
        &'a self,
        projection: &'a str,
        change: ControlChange,
    ) -> BoxFuture<'a, Result<ProjectionControl, StoreError>> {
        let projection = projection.to_owned();
        Box::pin(self.transaction("controlling a projection", move |connection| {
            Box::pin(async move { CONTROLS.change(connection, &projection, change).await })
        }))
    }

    fn publisher_checkpoint(&self) -> BoxFuture<'_, Result<PublisherCheckpoint, StoreError>> {
        on_reader!(self, "reading the checkpoint of the publisher", reader => CONTROLS.publisher(reader))
    }

    fn save_publisher_checkpoint(
        &self,
        from: PublisherCheckpoint,
        to: PublisherCheckpoint,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(self.transaction("saving the checkpoint of the publisher", move |connection| {
            Box::pin(async move { CONTROLS.save_publisher(connection, from, to).await })
        }))
    }

    fn adopt(&self, adopt: Adopt) -> BoxFuture<'_, Result<Uuid, StoreError>> {
        let (path, id) = (self.shared.path.clone(), self.shared.info.id);
        Box::pin(self.transaction(schema::ADOPTING, move |connection| {
            Box::pin(async move { schema::adopt(connection, &path, id, adopt).await })
        }))
    }

    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        let name = name.to_owned();
        Box::pin(self.transaction("acquiring a lease", move |connection| {
            Box::pin(leases::acquire_lease(connection, name, owner, ttl))
        }))
    }

    fn take_over_lease<'a>(
        &'a self,
        seen: &'a LeaseInfo,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        let seen = seen.clone();
        Box::pin(self.transaction("taking a lease over", move |connection| {
            Box::pin(leases::take_over_lease(connection, seen, owner, ttl))
        }))
    }

    fn renew_leases<'a>(
        &'a self,
        leases: &'a [Lease],
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        let leases = leases.to_vec();
        Box::pin(self.transaction("renewing leases", move |connection| {
            Box::pin(async move {
                let mut renewed = Vec::with_capacity(leases.len());
                for lease in &leases {
                    renewed.push(leases::renew_lease(connection, lease, ttl).await?);
                }
                Ok(renewed)
            })
        }))
    }

    fn release_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<(), StoreError>> {
        let lease = lease.clone();
        Box::pin(self.transaction("releasing a lease", move |connection| {
            Box::pin(async move { leases::release_lease(connection, &lease).await })
        }))
    }

    fn leases(&self) -> BoxFuture<'_, Result<Vec<LeaseInfo>, StoreError>> {
        on_reader!(self, "reading the leases", reader => leases::leases(reader))
    }

    fn snapshot<'a>(&'a self, stream: &'a StreamId) -> BoxFuture<'a, Result<Option<Snapshot>, StoreError>> {
        on_reader!(self, "reading a snapshot", reader => snapshots::snapshot(reader, stream))
    }

    fn save_snapshot<'a>(
        &'a self,
        stream: &'a StreamId,
        snapshot: Snapshot,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        let stream = stream.clone();
        Box::pin(self.transaction("saving a snapshot", move |connection| {
            Box::pin(async move { snapshots::save_snapshot(connection, &stream, &snapshot).await })
        }))
    }

    fn command_events<'a>(
        &'a self,
        stream: &'a StreamId,
        command: Uuid,
    ) -> BoxFuture<'a, Result<Option<CommandEvents>, StoreError>> {
        Box::pin(read::command_events(&self.shared.readers, stream, command))
    }

    fn correlated(
        &self,
        id: Uuid,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<RecordedEvent>, StoreError>> {
        let Shared { readers, page_sizer, numbers, info, .. } = &*self.shared;
        Box::pin(read::correlated(readers, page_sizer, numbers, info.codec, (id, after, limit)))
    }

    fn command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<CommandRecord>, StoreError>> {
        on_reader!(self, "reading a command record", reader => command_records::command(reader, id))
    }

    fn record_command(&self, record: CommandRecord) -> BoxFuture<'_, Result<CommandRecord, StoreError>> {
        Box::pin(self.transaction("recording a command", move |connection| {
            Box::pin(command_records::record_command(connection, record))
        }))
    }

    fn forget_commands(&self, age: Duration, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(self.transaction("deleting old command records", move |connection| {
            Box::pin(command_records::forget_commands(connection, age, limit))
        }))
    }

    fn write_timers<'a>(
        &'a self,
        process: &'a str,
        put: Vec<NewTimer>,
        remove: Vec<TimerRef>,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let (changes, process) = (timer_changes(process, put, remove)?, process.to_owned());
            self.transaction("writing timers", move |connection| {
                Box::pin(timers::write_timers(connection, process, changes))
            })
            .await
        })
    }

    fn due_timers<'a>(
        &'a self,
        process: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<DueTimers, StoreError>> {
        on_reader!(self, "reading due timers", reader => timers::due_timers(reader, process, limit))
    }

    fn timers<'a>(
        &'a self,
        process: Option<&'a str>,
        after: Option<&'a StoredTimer>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredTimer>, StoreError>> {
        on_reader!(self, "listing timers", reader => timers::timers(reader, process, after, limit))
    }
}

/// Returns a path that SQLite takes as it is: it reads `file:…` as a URI.
pub(crate) fn literal_path(path: &Path) -> PathBuf {
    match path.as_os_str().as_encoded_bytes().starts_with(b"file:") {
        true => Path::new(".").join(path),
        false => path.to_owned(),
    }
}
