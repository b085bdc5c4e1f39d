use std::error::Error;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{AssertSqlSafe, SqlSafeStr};
use uuid::Uuid;

use super::ReadModel;
use super::error::transaction_ended;
use crate::event::Position;
use crate::store::postgres::{
    Borrowed, BorrowedTransaction, Progress, Schema, TransactionPool, database_of, failed,
    may_be_of_transaction, prepare_read_model,
};
use crate::store::{
    Adoption, BoxFuture, Checkpoint, CheckpointError, CheckpointRecord, EventStore, ParkedEvent, StoreError,
};

/// Marks the transaction by a setting that ends with it, in the round trip of its `BEGIN`.
///
/// Checkpoints move only in a marked transaction: `apply` may have ended it and begun another one.
const MARK: &str = "set_config('storied_transaction.state', 'open', true)";

/// Tables in a PostgreSQL database, written together with the checkpoint: exactly once.
///
/// Clones are handles to the same pool. Any number of projections may share it; each uses one of
/// its connections during a transaction. Unless the pool is exhausted, the connection then waits
/// 100 ms for the next transaction, and the pool gets it back at least once a second. All nodes share the read model: one node owns each
/// projection. A stale owner is fenced at its commit, because the checkpoint has moved since its
/// last write. The database may be that of the event store; the application manages its own tables
/// and migrations.
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
}

/// An open transaction on a [`PostgresReadModel`].
///
/// If dropped without a commit, it closes its connection, so that the application's pool never
/// receives a connection inside a transaction.
#[derive(Debug)]
pub struct PostgresOpen(BorrowedTransaction);

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
        let progress = Progress::of_read_model(&schema);
        let transactions = TransactionPool::new(pool);
        Self { shared: Arc::new(Shared { transactions, schema, progress, store: OnceLock::new() }) }
    }

    /// Returns the pool, for queries.
    pub fn pool(&self) -> &PgPool {
        self.shared.transactions.pool()
    }

    async fn connection(&self, doing: &str) -> Result<Borrowed, StoreError> {
        Borrowed::acquire(self.pool()).await.map_err(|error| failed(doing, error))
    }

    /// Saves the checkpoint if the transaction is the one that storied has begun.
    async fn save_within(
        &self,
        open: &mut BorrowedTransaction,
        name: &str,
        from: Checkpoint,
        to: Checkpoint,
    ) -> Result<(), CheckpointError> {
        let progress = &self.shared.progress;
        let saved = progress.save(open.connection(), name, self.store()?, from, to).await;
        // `save` moves no checkpoint without the mark of the transaction.
        if saved.is_err() && !progress.is_marked(open.connection()).await.unwrap_or(true) {
            return Err(transaction_ended(name).into());
        }
        saved
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

    fn prepare<'a>(
        &'a self,
        store: &'a Arc<dyn EventStore>,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
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
            connection.give_back();
            Ok(())
        })
    }

    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(async move {
            let mut connection = self.connection("reading a checkpoint").await?;
            let found = self.shared.progress.checkpoint(&mut connection, name, self.store()?).await?;
            connection.give_back();
            Ok(found)
        })
    }

    fn records(&self) -> BoxFuture<'_, Result<Vec<CheckpointRecord>, StoreError>> {
        Box::pin(async move {
            let mut connection = self.connection("reading the checkpoints").await?;
            let found = self.shared.progress.records(&mut connection).await?;
            connection.give_back();
            Ok(found)
        })
    }

    fn begin<'a>(
        &'a self,
        name: &'a str,
        _from: Checkpoint,
    ) -> BoxFuture<'a, Result<PostgresOpen, StoreError>> {
        Box::pin(async move {
            let begin = AssertSqlSafe(format!("BEGIN; SELECT {MARK}")).into_sql_str();
            let begun = self.shared.transactions.begin(begin).await;
            begun.map(PostgresOpen).map_err(|error| failed(&beginning(name), error))
        })
    }

    fn begin_within<'a>(
        &'a self,
        name: &'a str,
        _from: Checkpoint,
        limit: Duration,
    ) -> BoxFuture<'a, Result<PostgresOpen, StoreError>> {
        Box::pin(async move {
            // One round trip. The server ends a transaction that this process cannot end: its
            // statement waits for a lock, or its client was cut off. A shorter limit of the
            // application stays.
            let millis = limit.as_millis().clamp(1, i32::MAX as u128);
            let shorter = |setting: &str| {
                format!(
                    "set_config('{setting}', CASE WHEN current_setting('{setting}')::interval > '0' \
                     AND current_setting('{setting}')::interval < '{millis} ms' THEN current_setting('{setting}') \
                     ELSE '{millis}' END, true)"
                )
            };
            let begin = format!(
                "BEGIN; SELECT {MARK}, {}, {}",
                shorter("statement_timeout"),
                shorter("idle_in_transaction_session_timeout")
            );
            let begin = AssertSqlSafe(begin).into_sql_str();
            let begun = self.shared.transactions.begin(begin).await;
            begun.map(PostgresOpen).map_err(|error| failed(&beginning(name), error))
        })
    }

    fn transaction<'a>(&self, open: &'a mut PostgresOpen) -> &'a mut PgConnection {
        open.0.connection()
    }

    fn bound<'a>(
        &'a self,
        open: &'a mut PostgresOpen,
        limit: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            // The server would wait for a lock and hold its own locks even after the client has
            // disconnected.
            let set = sqlx::query("SELECT set_config('statement_timeout', $1, true)");
            let set = set.bind(limit.as_millis().max(1).to_string()).execute(open.0.connection()).await;
            set.map(drop).map_err(|error| failed("limiting the time of a transaction", error))
        })
    }

    fn adopt<'a>(
        &'a self,
        open: &'a mut PostgresOpen,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(async move { self.shared.progress.adopt(open.0.connection(), name, self.store()?).await })
    }

    fn save<'a>(
        &'a self,
        open: &'a mut PostgresOpen,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move { self.save_within(&mut open.0, name, from, to).await })
    }

    fn commit<'a>(
        &'a self,
        mut open: PostgresOpen,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move {
            self.save_within(&mut open.0, name, from, to).await?;
            if let Some(event) = parked {
                self.shared.progress.park(open.0.connection(), name, &event).await?;
            }
            let committed = open.0.commit().await;
            committed.map_err(|error| failed(&format!("committing a transaction of {name}"), error).into())
        })
    }

    fn rollback(&self, open: PostgresOpen) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            open.0.roll_back().await.map_err(|error| failed("rolling a transaction back", error))
        })
    }

    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        Box::pin(async move {
            let mut connection = self.connection("reading parked events").await?;
            let found = self.shared.progress.parked(&mut connection, name, limit).await?;
            connection.give_back();
            Ok(found)
        })
    }

    fn unpark<'a>(
        &'a self,
        open: &'a mut PostgresOpen,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { self.shared.progress.unpark(open.0.connection(), name, position).await })
    }

    fn unpark_all<'a>(
        &'a self,
        open: &'a mut PostgresOpen,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move { self.shared.progress.unpark_all(open.0.connection(), name).await })
    }

    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            let mut connection = self.connection("discarding a parked event").await?;
            let found = self.shared.progress.unpark(&mut connection, name, position).await?;
            connection.give_back();
            Ok(found)
        })
    }
}

fn beginning(name: &str) -> String {
    format!("beginning a transaction of {name}")
}
