//! Transactions that end within `apply`: by the database, or by statements of the projection.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqlitePoolOptions};
use sqlx::{Executor, PgConnection, PgPool, SqlitePool};
use storied::projection::{
    ApplyError, FailurePolicy, PostgresReadModel, ProjectionState, ReadModel, SqliteReadModel,
};
use storied::{AnyEvent, EventStore, MemoryStore, Position, Projection, RecordedEvent};
use tempfile::TempDir;

use crate::projection::fixtures::*;
use crate::support::PostgresServer;

const TABLES: &str = "CREATE TABLE written (position bigint);
    CREATE TABLE taken (n bigint UNIQUE);
    INSERT INTO taken VALUES (1)";

/// Runs a statement after the write of event 3, this many times, and ignores its error.
struct Ending<T> {
    name: String,
    sql: &'static str,
    times: AtomicU64,
    transaction: PhantomData<fn(T)>,
}

macro_rules! writes {
    ($connection:ty, $insert:literal) => {
        impl Projection for Ending<$connection> {
            const NAME: &'static str = "ending";
            type Event = AnyEvent;
            type Transaction = $connection;

            fn name(&self) -> &str {
                &self.name
            }

            async fn apply(
                &mut self,
                _: AnyEvent,
                event: &RecordedEvent,
                tx: &mut $connection,
            ) -> Result<(), ApplyError> {
                sqlx::query($insert).bind(event.position.get() as i64).execute(&mut *tx).await?;
                let left = |times: u64| times.checked_sub(1);
                if event.position == Position::new(3)
                    && self.times.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left).is_ok()
                {
                    let _ = sqlx::raw_sql(self.sql).execute(tx).await;
                }
                Ok(())
            }
        }
    };
}

writes!(PgConnection, "INSERT INTO written VALUES ($1)");
writes!(SqliteConnection, "INSERT INTO written VALUES (?)");

async fn finds_the_event<T: Send + 'static, R>(store: &Arc<dyn EventStore>, model: R, sql: &'static str)
where
    R: ReadModel<Transaction = T>,
    Ending<T>: Projection<Transaction = T>,
{
    let node = local_node(store).await;
    let name = sql.replace(|c: char| !c.is_ascii_alphabetic(), "-");
    let projection = Ending { name, sql, times: u64::MAX.into(), transaction: PhantomData };
    let handle = node.projection(projection, model, options().max_attempts(2)).await;
    reach(&handle, ProjectionState::Failed).await;
    let status = handle.status();
    assert_eq!(status.position, Position::new(2), "{sql}");
    let error = status.last_error.unwrap();
    assert!(error.contains("at position 3") && error.contains("the transaction has ended"), "{sql}: {error}");
    node.stop(PATIENCE).await.unwrap();
}

async fn one_connection(dir: &TempDir, name: &str) -> SqlitePool {
    let options = SqliteConnectOptions::new().filename(dir.path().join(name)).create_if_missing(true);
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    pool.execute(TABLES).await.unwrap();
    pool
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_apply_ends_on_sqlite_moves_no_checkpoint() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;
    let dir = TempDir::new().unwrap();
    for (n, sql) in
        ["COMMIT", "COMMIT; BEGIN", "ROLLBACK", "ROLLBACK; BEGIN", "INSERT OR ROLLBACK INTO taken VALUES (1)"]
            .into_iter()
            .enumerate()
    {
        let pool = one_connection(&dir, &format!("{n}.db")).await;
        finds_the_event::<SqliteConnection, _>(&store, SqliteReadModel::new(pool.clone()), sql).await;
        // The only connection of the pool is usable.
        pool.begin().await.unwrap().commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_apply_ends_on_postgres_moves_no_checkpoint() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;
    let url = PostgresServer::shared().await.create_database().await;
    let pool = PgPool::connect(&url).await.unwrap();
    pool.execute(TABLES).await.unwrap();
    for sql in
        ["COMMIT", "COMMIT; BEGIN", "COMMIT AND CHAIN", "ROLLBACK", "ROLLBACK; BEGIN", "ROLLBACK AND CHAIN"]
    {
        finds_the_event::<PgConnection, _>(&store, PostgresReadModel::new(pool.clone()), sql).await;
    }
}

/// A table of the projection with the name of ours does not receive the checkpoint.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_temporary_table_does_not_replace_the_checkpoints() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;
    let dir = TempDir::new().unwrap();
    let pool = one_connection(&dir, "read.db").await;
    let node = local_node(&store).await;
    let sql = "CREATE TEMP TABLE storied_checkpoints AS SELECT * FROM main.storied_checkpoints";
    let projection = Ending::<SqliteConnection> {
        name: "orders".into(),
        sql,
        times: u64::MAX.into(),
        transaction: PhantomData,
    };
    let handle = node.projection(projection, SqliteReadModel::new(pool.clone()), options()).await;
    catch_up(&handle, Position::new(6)).await;
    node.stop(PATIENCE).await.unwrap();
    let saved = sqlx::query_scalar("SELECT max(position) FROM main.storied_checkpoints");
    let saved: i64 = saved.fetch_one(&pool).await.unwrap();
    assert_eq!(saved, 6);
}

/// Writes rows that fit on the disk only while there is room.
struct Large(Arc<AtomicBool>);

impl Projection for Large {
    const NAME: &'static str = "large";
    type Event = AnyEvent;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        // SQLite takes the current size if the limit is lower.
        let full = self.0.load(Ordering::SeqCst);
        let limit = if full { "PRAGMA max_page_count = 1" } else { "PRAGMA max_page_count = 1000000" };
        tx.execute(limit).await?;
        let insert = sqlx::query("INSERT INTO large VALUES (?, zeroblob(100000))");
        insert.bind(event.position.get() as i64).execute(tx).await?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_continues_after_a_full_disk() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;
    let dir = TempDir::new().unwrap();
    let pool = one_connection(&dir, "read.db").await;
    pool.execute("CREATE TABLE large (position INTEGER, filling BLOB)").await.unwrap();
    let full = Arc::new(AtomicBool::new(true));
    let node = local_node(&store).await;
    let model = SqliteReadModel::new(pool.clone());
    let handle = node.projection(Large(full.clone()), model, options()).await;
    let filled = async {
        while !handle.status().last_error.is_some_and(|error| error.contains("full")) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, filled).await.unwrap();
    full.store(false, Ordering::SeqCst);
    catch_up(&handle, Position::new(6)).await;
    node.stop(PATIENCE).await.unwrap();
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM large ORDER BY 1").fetch_all(&pool).await.unwrap();
    assert_eq!(written, [1, 2, 3, 4, 5, 6]);
}

async fn parks_the_event<T: Send + 'static, R>(
    store: &Arc<dyn EventStore>,
    model: R,
    name: String,
    sql: &'static str,
) where
    R: ReadModel<Transaction = T>,
    Ending<T>: Projection<Transaction = T>,
{
    let node = local_node(store).await;
    let projection = Ending { name, sql, times: u64::MAX.into(), transaction: PhantomData };
    let options = options().max_attempts(2).on_failure(FailurePolicy::Park);
    let handle = node.projection(projection, model, options).await;
    catch_up(&handle, Position::new(6)).await;
    let parked = handle.parked(10).await.unwrap();
    let parked: Vec<_> = parked.iter().map(|event| event.position.get()).collect();
    assert_eq!(parked, [3], "{sql}");
    node.stop(PATIENCE).await.unwrap();
}

/// `apply` ignored an error, or changed the session: the other events are applied once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_makes_its_transaction_unusable_is_identified() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;

    let pool = PgPool::connect(&PostgresServer::shared().await.create_database().await).await.unwrap();
    pool.execute(TABLES).await.unwrap();
    let statements =
        ["SELECT * FROM missing", "SET TRANSACTION READ ONLY", "SET LOCAL ROLE pg_read_all_data"];
    for (number, statement) in statements.into_iter().enumerate() {
        let (model, name) = (PostgresReadModel::new(pool.clone()), format!("parks-{number}"));
        parks_the_event::<PgConnection, _>(&store, model, name, statement).await;
    }
    // This harms only later statements of the same transaction, so each event alone succeeds.
    let node = local_node(&store).await;
    let statement = "SET LOCAL search_path = pg_catalog";
    let projection = Ending::<PgConnection> {
        name: "applies".into(),
        sql: statement,
        times: u64::MAX.into(),
        transaction: PhantomData,
    };
    let handle =
        node.projection(projection, PostgresReadModel::new(pool.clone()), options().max_attempts(2)).await;
    catch_up(&handle, Position::new(6)).await;
    node.stop(PATIENCE).await.unwrap();
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM written ORDER BY 1").fetch_all(&pool).await.unwrap();
    let expected: Vec<i64> = [(1, 4), (2, 4), (3, 1), (4, 4), (5, 4), (6, 4)]
        .into_iter()
        .flat_map(|(position, times)| vec![position; times])
        .collect();
    assert_eq!(written, expected);

    let dir = TempDir::new().unwrap();
    let model = SqliteReadModel::open(dir.path().join("read.db")).await.unwrap();
    model.pool().execute(TABLES).await.unwrap();
    let pragma = "PRAGMA query_only = ON";
    parks_the_event::<SqliteConnection, _>(&store, model.clone(), "lite".into(), pragma).await;
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM written ORDER BY 1").fetch_all(model.pool()).await.unwrap();
    assert_eq!(written, [1, 2, 4, 5, 6]);
}

/// A server that becomes a standby is read-only for a transaction, and the next one reaches the new
/// primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_that_ends_between_two_transactions_is_no_events_fault() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;
    let pool = PgPool::connect(&PostgresServer::shared().await.create_database().await).await.unwrap();
    pool.execute(TABLES).await.unwrap();
    let node = local_node(&store).await;
    let statement = "SET TRANSACTION READ ONLY";
    let projection = Ending::<PgConnection> {
        name: "once".into(),
        sql: statement,
        times: 2.into(),
        transaction: PhantomData,
    };
    let options = options().max_attempts(1).on_failure(FailurePolicy::Park);
    let handle = node.projection(projection, PostgresReadModel::new(pool.clone()), options).await;
    catch_up(&handle, Position::new(6)).await;
    assert_eq!(handle.parked(10).await.unwrap(), []);
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM written ORDER BY 1").fetch_all(&pool).await.unwrap();
    assert_eq!(written, [1, 2, 3, 4, 5, 6]);
    node.stop(PATIENCE).await.unwrap();
}
