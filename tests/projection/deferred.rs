//! Transactions that a database refuses only at the end, without naming an event.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sqlx::sqlite::SqliteConnection;
use sqlx::{Executor, PgConnection, PgPool};
use storied::projection::{
    ApplyError, FailurePolicy, PostgresReadModel, ProjectionState, ReadModel, SqliteReadModel,
};
use storied::{EncodeError, EventStore, Filter, MemoryStore, Position, Projection, RecordedEvent};
use tempfile::TempDir;

use crate::harness::PostgresServer;
use crate::support::*;

const TABLES: &str = "CREATE TABLE allowed (position bigint PRIMARY KEY);
    CREATE TABLE written (position bigint REFERENCES allowed DEFERRABLE INITIALLY DEFERRED);
    INSERT INTO allowed VALUES (1), (2), (4), (5), (6)";

/// Writes positions, one of which the database rejects.
struct Deferred<T> {
    name: &'static str,
    transaction: PhantomData<fn(T)>,
}

macro_rules! writes {
    ($connection:ty, $insert:literal) => {
        impl Projection for Deferred<$connection> {
            type Transaction = $connection;

            fn name(&self) -> &str {
                self.name
            }

            fn filter(&self) -> Result<Filter, EncodeError> {
                Ok(Filter::all())
            }

            async fn apply(&mut self, event: &RecordedEvent, tx: &mut $connection) -> Result<(), ApplyError> {
                sqlx::query($insert).bind(event.position.get() as i64).execute(tx).await?;
                Ok(())
            }
        }
    };
}

writes!(PgConnection, "INSERT INTO written VALUES ($1)");
writes!(SqliteConnection, "INSERT INTO written VALUES (?)");

async fn finds_the_event<T: Send + 'static, R>(store: &Arc<dyn EventStore>, model: R)
where
    R: ReadModel<Transaction = T>,
    Deferred<T>: Projection<Transaction = T>,
{
    let node = local_node(store).await;
    let projection = |name| Deferred { name, transaction: PhantomData };
    let options = options().attempts(2);
    let handle = node.projection(projection("stops"), model, options).await;
    reach(&handle, ProjectionState::Failed).await;
    let status = handle.status();
    assert_eq!(status.position, Position::new(2));
    let error = status.last_error.unwrap();
    assert!(error.contains("at position 3") && error.contains("failed"), "{error}");
    node.stop(PATIENCE).await.unwrap();
}

async fn parks_the_event<T: Send + 'static, R>(store: &Arc<dyn EventStore>, model: R)
where
    R: ReadModel<Transaction = T>,
    Deferred<T>: Projection<Transaction = T>,
{
    let node = local_node(store).await;
    let projection = Deferred { name: "parks", transaction: PhantomData };
    let options = options().attempts(2).on_failure(FailurePolicy::Park);
    let handle = node.projection(projection, model, options).await;
    catch_up(&handle, Position::new(6)).await;
    let parked = handle.parked(10).await.unwrap();
    assert_eq!(parked.iter().map(|event| event.position.get()).collect::<Vec<_>>(), [3]);
    assert_eq!(parked[0].attempts, 2);
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_rejected_at_the_commit_is_identified() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;

    let pool = PgPool::connect(&PostgresServer::shared().await.create_database().await).await.unwrap();
    pool.execute(TABLES).await.unwrap();
    finds_the_event::<PgConnection, _>(&store, PostgresReadModel::new(pool.clone())).await;
    parks_the_event::<PgConnection, _>(&store, PostgresReadModel::new(pool.clone())).await;
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM written ORDER BY 1").fetch_all(&pool).await.unwrap();
    assert_eq!(written, [1, 1, 2, 2, 4, 5, 6]);

    let dir = TempDir::new().unwrap();
    let model = SqliteReadModel::open(dir.path().join("read.db")).await.unwrap();
    model.pool().execute(TABLES).await.unwrap();
    finds_the_event::<SqliteConnection, _>(&store, model.clone()).await;
    parks_the_event::<SqliteConnection, _>(&store, model.clone()).await;
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM written ORDER BY 1").fetch_all(model.pool()).await.unwrap();
    assert_eq!(written, [1, 1, 2, 2, 4, 5, 6]);
}

/// Applies each event, and runs a statement whose error it ignores at position 3, this many times.
struct Careless<T> {
    name: String,
    statement: &'static str,
    times: AtomicU64,
    transaction: PhantomData<fn(T)>,
}

macro_rules! runs_a_statement {
    ($connection:ty, $insert:literal) => {
        impl Projection for Careless<$connection> {
            type Transaction = $connection;

            fn name(&self) -> &str {
                &self.name
            }

            fn filter(&self) -> Result<Filter, EncodeError> {
                Ok(Filter::all())
            }

            async fn apply(&mut self, event: &RecordedEvent, tx: &mut $connection) -> Result<(), ApplyError> {
                sqlx::query($insert).bind(event.position.get() as i64).execute(&mut *tx).await?;
                let at_most = |times: u64| times.checked_sub(1);
                if event.position.get() == 3
                    && self.times.fetch_update(Ordering::SeqCst, Ordering::SeqCst, at_most).is_ok()
                {
                    let _ = tx.execute(self.statement).await;
                }
                Ok(())
            }
        }
    };
}

runs_a_statement!(PgConnection, "INSERT INTO careless VALUES ($1)");
runs_a_statement!(SqliteConnection, "INSERT INTO careless VALUES (?)");

const CARELESS: &str = "CREATE TABLE careless (position bigint)";

async fn parks_the_careless_event<T: Send + 'static, R>(
    store: &Arc<dyn EventStore>,
    model: R,
    name: String,
    statement: &'static str,
) where
    R: ReadModel<Transaction = T>,
    Careless<T>: Projection<Transaction = T>,
{
    let node = local_node(store).await;
    let projection = Careless { name, statement, times: u64::MAX.into(), transaction: PhantomData };
    let options = options().attempts(2).on_failure(FailurePolicy::Park);
    let handle = node.projection(projection, model, options).await;
    catch_up(&handle, Position::new(6)).await;
    let parked = handle.parked(10).await.unwrap();
    let parked: Vec<_> = parked.iter().map(|event| event.position.get()).collect();
    assert_eq!(parked, [3], "{statement}");
    node.stop(PATIENCE).await.unwrap();
}

/// `apply` ignored an error, or changed the session: the other events are applied once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_makes_its_transaction_unusable_is_identified() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;

    let pool = PgPool::connect(&PostgresServer::shared().await.create_database().await).await.unwrap();
    pool.execute(CARELESS).await.unwrap();
    let statements =
        ["SELECT * FROM missing", "SET TRANSACTION READ ONLY", "SET LOCAL ROLE pg_read_all_data"];
    for (number, statement) in statements.into_iter().enumerate() {
        let (model, name) = (PostgresReadModel::new(pool.clone()), format!("parks-{number}"));
        parks_the_careless_event::<PgConnection, _>(&store, model, name, statement).await;
    }
    // This harms only later statements of the same transaction, so each event alone succeeds.
    let node = local_node(&store).await;
    let statement = "SET LOCAL search_path = pg_catalog";
    let projection = Careless::<PgConnection> {
        name: "applies".into(),
        statement,
        times: u64::MAX.into(),
        transaction: PhantomData,
    };
    let handle =
        node.projection(projection, PostgresReadModel::new(pool.clone()), options().attempts(2)).await;
    catch_up(&handle, Position::new(6)).await;
    node.stop(PATIENCE).await.unwrap();
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM careless ORDER BY 1").fetch_all(&pool).await.unwrap();
    let expected: Vec<i64> = [(1, 4), (2, 4), (3, 1), (4, 4), (5, 4), (6, 4)]
        .into_iter()
        .flat_map(|(position, times)| vec![position; times])
        .collect();
    assert_eq!(written, expected);

    let dir = TempDir::new().unwrap();
    let model = SqliteReadModel::open(dir.path().join("read.db")).await.unwrap();
    model.pool().execute(CARELESS).await.unwrap();
    let pragma = "PRAGMA query_only = ON";
    parks_the_careless_event::<SqliteConnection, _>(&store, model.clone(), "lite".into(), pragma).await;
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM careless ORDER BY 1").fetch_all(model.pool()).await.unwrap();
    assert_eq!(written, [1, 2, 4, 5, 6]);
}

/// A server that becomes a standby is read-only for a transaction, and the next one reaches the new
/// primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_that_ends_between_two_transactions_is_no_events_fault() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..6).await;
    let pool = PgPool::connect(&PostgresServer::shared().await.create_database().await).await.unwrap();
    pool.execute(CARELESS).await.unwrap();
    let node = local_node(&store).await;
    let statement = "SET TRANSACTION READ ONLY";
    let projection = Careless::<PgConnection> {
        name: "once".into(),
        statement,
        times: 2.into(),
        transaction: PhantomData,
    };
    let options = options().attempts(1).on_failure(FailurePolicy::Park);
    let handle = node.projection(projection, PostgresReadModel::new(pool.clone()), options).await;
    catch_up(&handle, Position::new(6)).await;
    assert_eq!(handle.parked(10).await.unwrap(), []);
    let written: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM careless ORDER BY 1").fetch_all(&pool).await.unwrap();
    assert_eq!(written, [1, 2, 3, 4, 5, 6]);
    node.stop(PATIENCE).await.unwrap();
}
