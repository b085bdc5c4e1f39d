use std::error::Error;
use std::fmt;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::SqlSafeStr;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{
    Sqlite, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx_core::transaction::TransactionManager;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;
use uuid::Uuid;

use super::error::transaction_ended;
use super::sealed::Sealed;
use super::{ProgressRecords, ReadModel};
use crate::event::Position;
use crate::store::sqlite::progress::{self, PROGRESS};
use crate::store::sqlite::{failed, home, literal_path, may_be_of_transaction};
use crate::store::{
    Adoption, Checkpoint, CheckpointError, CheckpointKey, EventStore, ParkedEvent, ProgressWrite, Request,
    StoreError, StoredProgress, StoredProjection, StoredRequest,
};

/// Maximum wait for transactions of other projections and other processes on the same database.
const PATIENCE: Duration = Duration::from_secs(5);

type Manager = <Sqlite as sqlx::Database>::TransactionManager;

/// Acquires the lock now and not at the first write: the checkpoint stays valid until the commit.
///
/// The savepoint exists only in this transaction. SQLite drops it at every `COMMIT` and `ROLLBACK`.
const BEGIN: &str = "BEGIN IMMEDIATE; SAVEPOINT storied_transaction";

/// Fails outside the transaction that [`BEGIN`] has begun.
const STILL_OPEN: &str = "RELEASE storied_transaction; SAVEPOINT storied_transaction";

/// Tables in a SQLite database, written together with the checkpoint: exactly once.
///
/// Clones are handles to the same database. Several projections may share it and then take turns,
/// because SQLite allows one write transaction at a time. All nodes that use a file on one machine
/// share the read model: one node owns each projection. The database may be the event store's own
/// file, but then a transaction blocks appends: a slow `apply`, for example one that calls another
/// service, stalls the event store.
///
/// `apply` must not end the transaction. If it does, or if SQLite does and `apply` ignores the
/// error, the batch fails. A connection whose transaction did not end is closed; a database in
/// memory ends with its connection.
#[derive(Clone)]
pub struct SqliteReadModel {
    shared: Arc<Shared>,
}

struct Shared {
    pool: SqlitePool,
    /// Serializes the writes of this process's projections in request order.
    ///
    /// SQLite would let them try and fail.
    turn: Arc<Mutex<()>>,
    /// Number of completed waits for a turn.
    turns: AtomicU64,
    /// The event store of the log; set by the first `prepare`.
    store: OnceLock<Uuid>,
    /// Whether the checkpoint tables are known to exist; projections and partitions share them.
    migrated: AtomicBool,
}

/// An open transaction on a [`SqliteReadModel`].
///
/// Only a confirmed end returns the connection to the pool. SQLite ends a transaction by itself,
/// for example if the disk is full. `COMMIT` and `ROLLBACK` then fail, and sqlx still counts the
/// transaction as open: every later transaction on the connection would fail.
#[derive(Debug)]
pub struct SqliteOpen {
    /// Declared before the turn, so that it ends before the next turn begins.
    connection: PoolConnection<Sqlite>,
    projection: String,
    ended: bool,
    _turn: OwnedMutexGuard<()>,
}

impl SqliteOpen {
    /// Checks that the transaction is the one that storied has begun.
    ///
    /// After a `ROLLBACK`, all later writes would commit one by one, the checkpoint included.
    async fn check(&mut self) -> Result<(), StoreError> {
        let checked = sqlx::raw_sql(STILL_OPEN).execute(&mut *self.connection).await;
        let name = &self.projection;
        checked.map(drop).map_err(|error| {
            let missing =
                error.as_database_error().is_some_and(|error| error.message().contains("no such savepoint"));
            if missing {
                transaction_ended(name)
            } else {
                failed(&format!("saving the checkpoint of {name}"), error)
            }
        })
    }

    async fn commit(&mut self) -> Result<(), sqlx::Error> {
        // More than one, if `apply` has forgotten a nested transaction.
        while Manager::get_transaction_depth(&self.connection) > 0 {
            Manager::commit(&mut self.connection).await?;
        }
        self.confirm();
        Ok(())
    }

    /// Rolls back, or closes the connection.
    async fn roll_back(mut self) {
        if let Err(error) = Manager::rollback(&mut self.connection).await {
            tracing::debug!(%error, "closing a connection whose transaction could not be rolled back");
            return;
        }
        self.confirm();
    }

    /// Allows the connection to return to the pool, unless a nested transaction was ended instead.
    fn confirm(&mut self) {
        self.ended = Manager::get_transaction_depth(&self.connection) == 0;
    }
}

impl Drop for SqliteOpen {
    fn drop(&mut self) {
        if !self.ended {
            // Closing takes a while, and the next turn would wait for the lock.
            Manager::start_rollback(&mut self.connection);
            self.connection.close_on_drop();
        }
    }
}

impl SqliteReadModel {
    /// Opens the database at `path`; creates the file, but not its directory.
    ///
    /// In WAL mode with `synchronous = NORMAL`: a power failure may lose the last transactions, but
    /// with them their checkpoints, so they are applied again.
    ///
    /// # Errors
    /// `Storage` if it cannot be opened, `Incompatible` if it is not a database.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let doing = format!("opening {}", path.as_ref().display());
        let options = SqliteConnectOptions::new()
            .filename(literal_path(path.as_ref()))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(PATIENCE);
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .acquire_timeout(PATIENCE)
            .test_before_acquire(false)
            .connect_with(options)
            .await
            .map_err(|error| failed(&doing, error))?;
        Ok(Self::new(pool))
    }

    /// Uses an existing pool.
    ///
    /// Projections use one of its connections at a time; the others are free for queries.
    pub fn new(pool: SqlitePool) -> Self {
        Self {
            shared: Arc::new(Shared {
                pool,
                turn: Arc::default(),
                turns: AtomicU64::new(0),
                store: OnceLock::new(),
                migrated: AtomicBool::new(false),
            }),
        }
    }

    /// Returns the pool, for queries.
    pub fn pool(&self) -> &SqlitePool {
        &self.shared.pool
    }

    fn store(&self) -> Result<Uuid, StoreError> {
        let store = self.shared.store.get().copied();
        store.ok_or_else(|| StoreError::Invalid { reason: "using a read model failed: not prepared".into() })
    }

    async fn turn(&self, doing: &str) -> Result<OwnedMutexGuard<()>, StoreError> {
        let turns = &self.shared.turns;
        let mut turn = pin!(self.shared.turn.clone().lock_owned());
        let mut seen = turns.load(Ordering::Relaxed);
        loop {
            if let Ok(turn) = timeout(PATIENCE, &mut turn).await {
                turns.fetch_add(1, Ordering::Relaxed);
                return Ok(turn);
            }
            // Many partitions make a long queue. While it moves, no transaction is too slow.
            let now = turns.load(Ordering::Relaxed);
            if now == seen {
                let reason = format!(
                    "{doing} failed: the transaction of another projection took longer than {PATIENCE:?}"
                );
                return Err(StoreError::Unavailable { reason, source: None });
            }
            seen = now;
        }
    }

    async fn connection(&self, doing: &str) -> Result<PoolConnection<Sqlite>, StoreError> {
        self.shared.pool.acquire().await.map_err(|error| failed(doing, error))
    }

    async fn write_all(
        &self,
        open: &mut SqliteOpen,
        writes: &[ProgressWrite],
    ) -> Result<(), CheckpointError> {
        open.check().await?;
        let store = self.store()?;
        for write in writes {
            PROGRESS.write(&mut *open.connection, store, write).await?;
        }
        Ok(())
    }
}

impl fmt::Debug for SqliteReadModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteReadModel").field("store", &self.shared.store.get()).finish_non_exhaustive()
    }
}

impl Sealed for SqliteReadModel {}

impl ReadModel for SqliteReadModel {
    type Transaction = SqliteConnection;
    type Open = SqliteOpen;

    fn shared(&self) -> bool {
        true
    }

    fn rolls_back(&self) -> bool {
        true
    }

    fn may_be_of_event(&self, error: &(dyn Error + 'static)) -> bool {
        may_be_of_transaction(error)
    }

    async fn prepare(&self, store: &Arc<dyn EventStore>) -> Result<(), StoreError> {
        let id = *self.shared.store.get_or_init(|| store.info().id);
        if id != store.info().id {
            let reason = "preparing a SqliteReadModel failed: already in use for another event store; open one per store".into();
            return Err(StoreError::Invalid { reason });
        }
        let doing = "preparing the read model's database";
        // One at a time: concurrent migrations would fail each other.
        let _turn = self.turn(doing).await?;
        if self.shared.migrated.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut connection = self.shared.pool.acquire().await.map_err(|error| failed(doing, error))?;
        // I6: a copy with the configuration of its original would write into the original's
        // read models.
        if let Adoption::Unadopted { found, .. } = &store.info().adoption {
            let file: String =
                sqlx::query_scalar("SELECT file FROM pragma_database_list WHERE name = 'main'")
                    .fetch_one(&mut *connection)
                    .await
                    .map_err(|error| failed(doing, error))?;
            // An in-memory database has no file and belongs to this process only.
            let home = if file.is_empty() { None } else { Some(home(Path::new(&file))?) };
            if let Some(home) = home.filter(|home| home.identity != found.identity) {
                return Err(store.info().adoption.refuses(&home));
            }
        }
        if let Err(error) = progress::migrate(&mut connection).await {
            // Its transaction may still count as open.
            connection.close_on_drop();
            return Err(error);
        }
        self.shared.migrated.store(true, Ordering::Release);
        Ok(())
    }

    async fn projection(&self, name: &str) -> Result<StoredProjection, StoreError> {
        let mut connection = self.connection("reading a projection").await?;
        PROGRESS.projection(&mut *connection, name, Some(self.store()?)).await
    }

    async fn projection_of_any_store(&self, name: &str) -> Result<StoredProjection, StoreError> {
        let mut connection = self.connection("reading a projection").await?;
        PROGRESS.projection(&mut *connection, name, None).await
    }

    async fn checkpoint(&self, key: &CheckpointKey) -> Result<Checkpoint, StoreError> {
        let mut connection = self.connection("reading a checkpoint").await?;
        PROGRESS.checkpoint(&mut *connection, key, self.store()?).await
    }

    async fn parked(
        &self,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        let mut connection = self.connection("reading parked events").await?;
        PROGRESS.parked(&mut *connection, key, from, limit).await
    }

    async fn requests(
        &self,
        projection: &str,
        from: Request,
        limit: usize,
    ) -> Result<Vec<StoredRequest>, StoreError> {
        let mut connection = self.connection("reading requests").await?;
        PROGRESS.requests(&mut *connection, projection, from, limit).await
    }

    async fn records(&self) -> Result<ProgressRecords, StoreError> {
        let mut connection = self.connection("reading the checkpoints").await?;
        let projections = PROGRESS.projections(&mut *connection).await?;
        Ok(ProgressRecords { projections, checkpoints: PROGRESS.records(&mut *connection).await? })
    }

    async fn begin(
        &self,
        projection: &str,
        _from: Checkpoint,
        _limit: Option<Duration>,
    ) -> Result<SqliteOpen, StoreError> {
        let (doing, projection) = (format!("beginning a transaction of {projection}"), projection.to_owned());
        let turn = self.turn(&doing).await?;
        let connection = self.connection(&doing).await?;
        let mut open = SqliteOpen { connection, projection, ended: false, _turn: turn };
        let begun = Manager::begin(&mut open.connection, Some(BEGIN.into_sql_str())).await;
        begun.map_err(|error| failed(&doing, error))?;
        Ok(open)
    }

    fn transaction<'a>(&self, open: &'a mut SqliteOpen) -> &'a mut SqliteConnection {
        &mut open.connection
    }

    async fn adopt(&self, open: &mut SqliteOpen, projection: &str) -> Result<StoredProgress, StoreError> {
        PROGRESS.adopt(&mut *open.connection, projection, self.store()?).await
    }

    async fn write(&self, open: &mut SqliteOpen, write: ProgressWrite) -> Result<(), CheckpointError> {
        self.write_all(open, &[write]).await
    }

    async fn commit(&self, mut open: SqliteOpen, writes: Vec<ProgressWrite>) -> Result<(), CheckpointError> {
        let committed = async {
            self.write_all(&mut open, &writes).await?;
            let committed = open.commit().await;
            let doing = || format!("committing a transaction of {}", open.projection);
            committed.map_err(|error| failed(&doing(), error).into())
        };
        let committed = committed.await;
        if committed.is_err() {
            open.roll_back().await;
        }
        committed
    }

    async fn rollback(&self, open: SqliteOpen) -> Result<(), StoreError> {
        // Closing the connection rolls back as well.
        open.roll_back().await;
        Ok(())
    }
}
