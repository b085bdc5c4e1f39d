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

use super::ReadModel;
use super::error::transaction_ended;
use crate::event::Position;
use crate::store::sqlite::{failed, home, literal_path, may_be_of_transaction, progress};
use crate::store::{
    Adoption, BoxFuture, Checkpoint, CheckpointError, CheckpointRecord, EventStore, ParkedEvent, StoreError,
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
    ended: bool,
    _turn: OwnedMutexGuard<()>,
}

impl SqliteOpen {
    /// Checks that the transaction is the one that storied has begun.
    ///
    /// After a `ROLLBACK`, all later writes would commit one by one, the checkpoint included.
    async fn check(&mut self, name: &str) -> Result<(), StoreError> {
        let checked = sqlx::raw_sql(STILL_OPEN).execute(&mut *self.connection).await;
        checked.map(drop).map_err(|error| {
            let missing =
                error.as_database_error().is_some_and(|error| error.message().contains("no such savepoint"));
            if missing { transaction_ended(name) } else { failed(&saving(name), error) }
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

fn saving(name: &str) -> String {
    format!("saving the checkpoint of {name}")
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

    async fn open_transaction(&self, doing: &str) -> Result<SqliteOpen, StoreError> {
        let turn = self.turn(doing).await?;
        let connection = self.shared.pool.acquire().await.map_err(|error| failed(doing, error))?;
        let mut open = SqliteOpen { connection, ended: false, _turn: turn };
        let begun = Manager::begin(&mut open.connection, Some(BEGIN.into_sql_str())).await;
        begun.map_err(|error| failed(doing, error))?;
        Ok(open)
    }
}

impl fmt::Debug for SqliteReadModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteReadModel").field("store", &self.shared.store.get()).finish_non_exhaustive()
    }
}

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

    fn prepare<'a>(
        &'a self,
        store: &'a Arc<dyn EventStore>,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
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
        })
    }

    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(async move {
            let connection = self.shared.pool.acquire().await;
            let mut connection = connection.map_err(|error| failed("reading a checkpoint", error))?;
            progress::checkpoint(&mut connection, name, self.store()?).await
        })
    }

    fn records(&self) -> BoxFuture<'_, Result<Vec<CheckpointRecord>, StoreError>> {
        Box::pin(async move {
            let connection = self.shared.pool.acquire().await;
            let mut connection = connection.map_err(|error| failed("reading the checkpoints", error))?;
            progress::records(&mut connection).await
        })
    }

    fn begin<'a>(
        &'a self,
        name: &'a str,
        _from: Checkpoint,
    ) -> BoxFuture<'a, Result<SqliteOpen, StoreError>> {
        Box::pin(async move { self.open_transaction(&format!("beginning a transaction of {name}")).await })
    }

    fn transaction<'a>(&self, open: &'a mut SqliteOpen) -> &'a mut SqliteConnection {
        &mut open.connection
    }

    fn adopt<'a>(
        &'a self,
        open: &'a mut SqliteOpen,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(async move { progress::adopt(&mut open.connection, name, self.store()?).await })
    }

    fn save<'a>(
        &'a self,
        open: &'a mut SqliteOpen,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move {
            open.check(name).await?;
            progress::save(&mut open.connection, name, self.store()?, from, to).await
        })
    }

    fn commit<'a>(
        &'a self,
        mut open: SqliteOpen,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move {
            let committed = async {
                open.check(name).await?;
                progress::save(&mut open.connection, name, self.store()?, from, to).await?;
                if let Some(event) = parked {
                    progress::park(&mut open.connection, name, &event).await?;
                }
                let committed = open.commit().await;
                committed
                    .map_err(|error| failed(&format!("committing a transaction of {name}"), error).into())
            };
            let committed = committed.await;
            if committed.is_err() {
                open.roll_back().await;
            }
            committed
        })
    }

    fn rollback(&self, open: SqliteOpen) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            // Closing the connection rolls back as well.
            open.roll_back().await;
            Ok(())
        })
    }

    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        Box::pin(async move {
            let connection = self.shared.pool.acquire().await;
            let mut connection = connection.map_err(|error| failed("reading parked events", error))?;
            progress::parked(&mut connection, name, limit).await
        })
    }

    fn unpark<'a>(
        &'a self,
        open: &'a mut SqliteOpen,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { progress::unpark(&mut open.connection, name, position).await })
    }

    fn unpark_all<'a>(
        &'a self,
        open: &'a mut SqliteOpen,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move { progress::unpark_all(&mut open.connection, name).await })
    }

    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            let doing = format!("discarding a parked event of {name}");
            let mut open = self.open_transaction(&doing).await?;
            let removed = progress::unpark(&mut open.connection, name, position).await?;
            open.commit().await.map_err(|error| failed(&doing, error))?;
            Ok(removed)
        })
    }
}
