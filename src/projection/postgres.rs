use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{AssertSqlSafe, SqlSafeStr};
use uuid::Uuid;

use super::ReadModel;
use crate::event::Position;
use crate::store::postgres::{
    Borrowed, BorrowedTransaction, Progress, Schema, database_of, failed, prepare_read_model,
};
use crate::store::{
    Adoption, BoxFuture, Checkpoint, CheckpointError, CheckpointRecord, EventStore, ParkedEvent, StoreError,
};

/// Tables in a PostgreSQL database, written in the transaction that also moves the checkpoint: exactly once.
///
/// Clones are handles to the same pool; any number of projections may share it, and each takes one of its connections for
/// the time of a transaction. All nodes share the read model: one of them owns each projection. An owner that was replaced
/// without knowing it is refused when it commits, since the checkpoint is no longer where it left it. The database may be
/// the event store's own; the application's tables and migrations stay its own affair.
///
/// Checkpoints and parked events live in the schema `storied`, or [another](Self::schema), which is created by the first
/// projection that starts.
#[derive(Clone)]
pub struct PostgresReadModel {
    shared: Arc<Shared>,
}

struct Shared {
    pool: PgPool,
    schema: Schema,
    progress: Progress,
    /// The event store whose log is folded here; known from the first `prepare` on.
    store: OnceLock<Uuid>,
}

/// An open transaction on a [`PostgresReadModel`]. Dropped without a commit it closes its connection, so that the application's
/// pool never gets one back inside a transaction.
#[derive(Debug)]
pub struct PostgresOpen(BorrowedTransaction);

impl PostgresReadModel {
    /// Uses the connections of a pool, directly on the server or through a pooler in session mode.
    pub fn new(pool: PgPool) -> Self {
        Self::within(pool, Schema::standard())
    }

    /// Keeps checkpoints and parked events in another schema than `storied`, as that of an event store's own. For before the
    /// first use: what was kept elsewhere is not moved.
    ///
    /// # Errors
    /// `Invalid` for a name that cannot be a schema's, see [`PostgresOptions::schema`](crate::PostgresOptions::schema).
    pub fn schema(self, name: &str) -> Result<Self, StoreError> {
        Ok(Self::within(self.shared.pool.clone(), Schema::new(name)?))
    }

    fn within(pool: PgPool, schema: Schema) -> Self {
        let progress = Progress::new(&schema, true);
        Self { shared: Arc::new(Shared { pool, schema, progress, store: OnceLock::new() }) }
    }

    /// The connections, for queries.
    pub fn pool(&self) -> &PgPool {
        &self.shared.pool
    }

    async fn connection(&self, doing: &str) -> Result<Borrowed, StoreError> {
        Borrowed::acquire(&self.shared.pool).await.map_err(|error| failed(doing, error))
    }

    fn store(&self) -> Result<Uuid, StoreError> {
        let store = self.shared.store.get().copied();
        store.ok_or_else(|| StoreError::Invalid { reason: "this read model was not prepared".into() })
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

    fn prepare<'a>(
        &'a self,
        store: &'a Arc<dyn EventStore>,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let id = *self.shared.store.get_or_init(|| store.info().id);
            if id != store.info().id {
                let reason = "one PostgresReadModel cannot follow two event stores; make one for each".into();
                return Err(StoreError::Invalid { reason });
            }
            let doing = "preparing the read model's database";
            let mut connection = self.connection(doing).await?;
            // I6: a copy with the configuration of its original would write into the original's read models. A copied
            // database brought its read models along. A copied schema did not: the application's tables are shared.
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
            let begun = BorrowedTransaction::begin(&self.shared.pool, None).await;
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
            // One round trip. The server ends what this process cannot end any more: a statement that waits for a lock, and a
            // transaction whose client was cut off. A shorter limit of the application's own stays.
            let millis = limit.as_millis().clamp(1, i32::MAX as u128);
            let shorter = |setting: &str| {
                format!(
                    "set_config('{setting}', CASE WHEN current_setting('{setting}')::interval > '0' \
                     AND current_setting('{setting}')::interval < '{millis} ms' THEN current_setting('{setting}') \
                     ELSE '{millis}' END, true)"
                )
            };
            let begin = format!(
                "BEGIN; SELECT {}, {}",
                shorter("statement_timeout"),
                shorter("idle_in_transaction_session_timeout")
            );
            let begin = AssertSqlSafe(begin).into_sql_str();
            let begun = BorrowedTransaction::begin(&self.shared.pool, Some(begin)).await;
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
            // The server goes on waiting for a lock, and keeps its own, also for a client that has gone.
            let set = sqlx::query("SELECT set_config('statement_timeout', $1, true)");
            let set = set.bind(limit.as_millis().max(1).to_string()).execute(open.0.connection()).await;
            set.map(drop).map_err(|error| failed("bounding a transaction", error))
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
        Box::pin(async move {
            self.shared.progress.save(open.0.connection(), name, self.store()?, from, to).await
        })
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
            self.shared.progress.save(open.0.connection(), name, self.store()?, from, to).await?;
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
