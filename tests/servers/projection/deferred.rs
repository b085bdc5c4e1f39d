//! Constraints that a database checks only at the commit, without naming an event.

use std::marker::PhantomData;
use std::sync::Arc;

use sqlx::sqlite::SqliteConnection;
use sqlx::{Executor, PgConnection, PgPool};
use storied::projection::{
    ApplyError, FailurePolicy, PostgresReadModel, ProjectionState, ReadModel, SqliteReadModel,
};
use storied::{AnyEvent, EventStore, MemoryStore, Position, Projection, RecordedEvent};
use tempfile::TempDir;

use crate::projection::fixtures::*;
use crate::support::PostgresServer;

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
            const NAME: &'static str = "deferred";
            type Event = AnyEvent;
            type Transaction = $connection;

            fn name(&self) -> &str {
                self.name
            }

            async fn apply(
                &mut self,
                _: AnyEvent,
                event: &RecordedEvent,
                tx: &mut $connection,
            ) -> Result<(), ApplyError> {
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
    let options = options().max_attempts(2);
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
    let options = options().max_attempts(2).on_failure(FailurePolicy::Park);
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
