use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};
use uuid::Uuid;

use super::error::transaction_ended;
use super::sealed::Sealed;
use super::{ProgressRecords, ReadModel};
use crate::event::Position;
use crate::store::postgres::{
    Borrowed, BorrowedTransaction, Schema, TransactionPool, database_of, failed, may_be_of_transaction,
    prepare_read_model, progress,
};
use crate::store::sql::Progress;
use crate::store::{
    Adoption, Checkpoint, CheckpointError, CheckpointKey, EventStore, ParkedEvent, ProgressWrite, Request,
    StoreError, StoredProgress, StoredProjection, StoredRequest,
};

/// Marks the transaction by a setting that ends with it, in the round trip of its `BEGIN`.
///
/// Progress is written only in a marked transaction: `apply` may have ended it and begun another
/// one.
const MARK: &str = "set_config('storied_transaction.state', 'open', true)";

/// The condition that the transaction is marked; after its end, the setting is empty or NULL.
const MARKED: &str =
    "pg_catalog.current_setting('storied_transaction.state', true) IS NOT DISTINCT FROM 'open'";

/// Tables in a PostgreSQL database, written together with the checkpoint: exactly once.
///
/// Clones are handles to the same pool. Any number of projections may share it; each uses one of
/// its connections during a transaction. Unless the pool is exhausted, the connection then waits
/// 100 ms for the next transaction, and the pool gets it back at least once a second.
///
/// While the events of a projection that follows the bus are read, a transaction may begin on such a
/// connection: `now()` is up to 100 ms before `apply`. At other isolation levels than read committed,
/// it begins after the read.
///
/// All nodes share the read model: one node owns each projection. A stale owner is fenced at its
/// commit, because the checkpoint has moved since its last write. The database may be that of the
/// event store; the application manages its own tables and migrations.
///
/// `apply` must not end the transaction. If it does, the batch fails.
///
/// Checkpoints and parked events are in the schema `storied`, or [another](Self::schema), which the
/// first starting projection creates.
#[derive(Clone)]
pub struct PostgresReadModel {
    shared: Arc<Shared>,
}

struct Shared {
    transactions: TransactionPool,
    schema: Schema,
    progress: Progress,
    /// The event store of the log; set by the first `prepare`.
    store: OnceLock<Uuid>,
    /// Whether transactions may begin ahead; set by `prepare`.
    begins_ahead: AtomicBool,
}

/// An open transaction on a [`PostgresReadModel`].
///
/// If dropped without a commit, it closes its connection, so that the application's pool never
/// receives a connection inside a transaction.
#[derive(Debug)]
pub struct PostgresOpen {
    transaction: BorrowedTransaction,
    projection: String,
}

impl PostgresOpen {
    /// Returns whether the transaction is the one that storied has begun.
    async fn is_marked(&mut self) -> Result<bool, StoreError> {
        let marked = AssertSqlSafe(format!("SELECT {MARKED}"));
        let marked = sqlx::query_scalar(marked).fetch_one(self.transaction.connection()).await;
        marked.map_err(|error| failed(&format!("checking the transaction of {}", self.projection), error))
    }
}

/// Returns the statements that begin a transaction, which ends after `limit`.
fn begin(limit: Option<Duration>) -> SqlStr {
    // One round trip. The server ends a transaction that this process cannot end: its statement
    // waits for a lock, or its client was cut off. A shorter limit of the application stays.
    let shorter = |setting: &str, millis: u128| {
        format!(
            ", set_config('{setting}', CASE WHEN current_setting('{setting}')::interval > '0' \
             AND current_setting('{setting}')::interval < '{millis} ms' THEN current_setting('{setting}') \
             ELSE '{millis}' END, true)"
        )
    };
    let limits = limit.map_or_else(String::new, |limit| {
        let millis = limit.as_millis().clamp(1, i32::MAX as u128);
        shorter("statement_timeout", millis) + &shorter("idle_in_transaction_session_timeout", millis)
    });
    AssertSqlSafe(format!("BEGIN; SELECT {MARK}{limits}")).into_sql_str()
}

impl PostgresReadModel {
    /// Uses the connections of a pool, direct or through a pooler in session mode.
    pub fn new(pool: PgPool) -> Self {
        Self::within(pool, Schema::standard())
    }

    /// Keeps checkpoints and parked events in another schema than `storied`.
    ///
    /// Use this for the read model of an event store with its own schema, before the first use:
    /// existing data is not moved.
    ///
    /// # Errors
    /// `Invalid` for an invalid schema name, see
    /// [`PostgresOptions::schema`](crate::PostgresOptions::schema).
    pub fn schema(self, name: &str) -> Result<Self, StoreError> {
        Ok(Self::within(self.pool().clone(), Schema::new(name)?))
    }

    fn within(pool: PgPool, schema: Schema) -> Self {
        let progress = progress::of_read_model(&schema, MARKED);
        let transactions = TransactionPool::new(pool);
        Self {
            shared: Arc::new(Shared {
                transactions,
                schema,
                progress,
                store: OnceLock::new(),
                begins_ahead: AtomicBool::new(false),
            }),
        }
    }

    /// Returns the pool, for queries.
    pub fn pool(&self) -> &PgPool {
        self.shared.transactions.pool()
    }

    async fn connection(&self, doing: &str) -> Result<Borrowed, StoreError> {
        Borrowed::acquire(self.pool()).await.map_err(|error| failed(doing, error))
    }

    /// Writes progress if the transaction is the one that storied has begun.
    async fn write_all(
        &self,
        open: &mut PostgresOpen,
        writes: &[ProgressWrite],
    ) -> Result<(), CheckpointError> {
        // The statement that moves a checkpoint checks the mark itself.
        let checks = matches!(writes, [ProgressWrite::Checkpoint { .. }, ..]);
        if !checks && !open.is_marked().await? {
            return Err(transaction_ended(&open.projection).into());
        }
        let store = self.store()?;
        for write in writes {
            let written = self.shared.progress.write(open.transaction.connection(), store, write).await;
            if written.is_err() && !open.is_marked().await.unwrap_or(true) {
                return Err(transaction_ended(&open.projection).into());
            }
            written?;
        }
        Ok(())
    }

    fn store(&self) -> Result<Uuid, StoreError> {
        let store = self.shared.store.get().copied();
        store.ok_or_else(|| StoreError::Invalid { reason: "using a read model failed: not prepared".into() })
    }
}

impl fmt::Debug for PostgresReadModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresReadModel").field("store", &self.shared.store.get()).finish_non_exhaustive()
    }
}

impl Sealed for PostgresReadModel {}

impl ReadModel for PostgresReadModel {
    type Transaction = PgConnection;
    type Open = PostgresOpen;

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
            let reason = "preparing a PostgresReadModel failed: already in use for another event store; create one per store".into();
            return Err(StoreError::Invalid { reason });
        }
        let doing = "preparing the read model's database";
        let mut connection = self.connection(doing).await?;
        // I6: a copy with the configuration of its original would write into the original's
        // read models. A copied database includes its read models. A copied schema does not:
        // the application's tables are shared.
        if let Adoption::Unadopted { found, recorded } = &store.info().adoption {
            let database = database_of(&mut connection).await?;
            if database.holds(recorded) || !database.holds(found) {
                return Err(store.info().adoption.refuses(&database));
            }
        }
        prepare_read_model(&mut connection, &self.shared.schema).await?;
        // At the other levels, all statements of a transaction see the data of its beginning: without
        // what was committed since, as the last checkpoint.
        let level = sqlx::query_scalar(
            "SELECT pg_catalog.current_setting('transaction_isolation') = 'read committed'",
        );
        let level = level.fetch_one(&mut *connection).await.map_err(|error| failed(doing, error))?;
        self.shared.begins_ahead.store(level, Ordering::Relaxed);
        connection.give_back();
        Ok(())
    }

    async fn projection(&self, name: &str) -> Result<StoredProjection, StoreError> {
        let mut connection = self.connection("reading a projection").await?;
        let found = self.shared.progress.projection(&mut *connection, name, Some(self.store()?)).await?;
        connection.give_back();
        Ok(found)
    }

    async fn projection_of_any_store(&self, name: &str) -> Result<StoredProjection, StoreError> {
        let mut connection = self.connection("reading a projection").await?;
        let found = self.shared.progress.projection(&mut *connection, name, None).await?;
        connection.give_back();
        Ok(found)
    }

    async fn checkpoint(&self, key: &CheckpointKey) -> Result<Checkpoint, StoreError> {
        let mut connection = self.connection("reading a checkpoint").await?;
        let found = self.shared.progress.checkpoint(&mut *connection, key, self.store()?).await?;
        connection.give_back();
        Ok(found)
    }

    async fn parked(
        &self,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        let mut connection = self.connection("reading parked events").await?;
        let found = self.shared.progress.parked(&mut *connection, key, from, limit).await?;
        connection.give_back();
        Ok(found)
    }

    async fn requests(
        &self,
        projection: &str,
        from: Request,
        limit: usize,
    ) -> Result<Vec<StoredRequest>, StoreError> {
        let mut connection = self.connection("reading requests").await?;
        let found = self.shared.progress.requests(&mut *connection, projection, from, limit).await?;
        connection.give_back();
        Ok(found)
    }

    async fn records(&self) -> Result<ProgressRecords, StoreError> {
        let mut connection = self.connection("reading the checkpoints").await?;
        let projections = self.shared.progress.projections(&mut *connection).await?;
        let checkpoints = self.shared.progress.records(&mut *connection).await?;
        connection.give_back();
        Ok(ProgressRecords { projections, checkpoints })
    }

    async fn begin(
        &self,
        projection: &str,
        _from: Checkpoint,
        limit: Option<Duration>,
    ) -> Result<PostgresOpen, StoreError> {
        let transaction = self
            .shared
            .transactions
            .begin(begin(limit))
            .await
            .map_err(|error| failed(&format!("beginning a transaction of {projection}"), error))?;
        Ok(PostgresOpen { transaction, projection: projection.to_owned() })
    }

    fn will_begin(&self, _projection: &str, limit: Option<Duration>) {
        if self.shared.begins_ahead.load(Ordering::Relaxed) {
            self.shared.transactions.begin_ahead(begin(limit));
        }
    }

    fn transaction<'a>(&self, open: &'a mut PostgresOpen) -> &'a mut PgConnection {
        open.transaction.connection()
    }

    async fn adopt(&self, open: &mut PostgresOpen, projection: &str) -> Result<StoredProgress, StoreError> {
        self.shared.progress.adopt(open.transaction.connection(), projection, self.store()?).await
    }

    async fn write(&self, open: &mut PostgresOpen, write: ProgressWrite) -> Result<(), CheckpointError> {
        self.write_all(open, &[write]).await
    }

    async fn commit(
        &self,
        mut open: PostgresOpen,
        writes: Vec<ProgressWrite>,
    ) -> Result<(), CheckpointError> {
        self.write_all(&mut open, &writes).await?;
        let PostgresOpen { transaction, projection } = open;
        let committed = transaction.commit().await;
        committed.map_err(|error| failed(&format!("committing a transaction of {projection}"), error).into())
    }

    async fn rollback(&self, open: PostgresOpen) -> Result<(), StoreError> {
        open.transaction.roll_back().await.map_err(|error| failed("rolling a transaction back", error))
    }
}
