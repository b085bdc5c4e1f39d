//! Copied event stores with the configuration of the original: they do not write its read models.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, PgPool};
use storied::projection::{PostgresReadModel, ProjectionState, ReadModel, SqliteReadModel};
use storied::{EventStore, PostgresStore, Projection, Runtime, SqliteStore};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::projection::fixtures::*;
use crate::support::PostgresServer;

/// Runs `recorder` over a copied store until it stops; checks the reason and that nothing was
/// applied.
async fn is_refused<T: Send + 'static, R: ReadModel<Transaction = T>>(store: Arc<dyn EventStore>, model: R)
where
    Recorder<T>: Projection<Transaction = T>,
{
    assert!(!store.info().adoption.is_adopted());
    let recorder = recorder::<T>("orders");
    let seen = recorder.seen.clone();
    let runtime = Runtime::builder().store(store).projection(recorder, model).start().await.unwrap();
    let handle = runtime.projection("orders").unwrap();
    reach(handle, ProjectionState::Failed).await;
    let error = handle.status().last_error.unwrap();
    assert!(error.contains("a read model in") && error.contains("storied store adopt"), "{error}");
    assert_eq!(seen.positions(), []);
    runtime.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copied_file_writes_no_read_model_of_its_original() {
    let dir = TempDir::new().unwrap();
    let [shop, copy, read] = ["shop.db", "copy.db", "read.db"].map(|name| dir.path().join(name));
    let original: Arc<dyn EventStore> = Arc::new(SqliteStore::open(&shop).await.unwrap());
    append(&original, 0, 0..5).await;
    for file in ["shop.db", "shop.db-wal"] {
        fs::copy(dir.path().join(file), dir.path().join(file.replace("shop", "copy"))).unwrap();
    }
    let copy: Arc<dyn EventStore> = Arc::new(SqliteStore::open(&copy).await.unwrap());
    append(&copy, 0, 5..10).await;
    is_refused::<SqliteConnection, _>(copy.clone(), SqliteReadModel::open(&read).await.unwrap()).await;
    // A read model that came with the copy belongs to it, and so does one in memory.
    let within = SqliteReadModel::open(dir.path().join("copy.db")).await.unwrap();
    let memory = SqliteReadModel::new(sqlx::SqlitePool::connect("sqlite::memory:").await.unwrap());
    for (name, model) in [("within", within), ("memory", memory)] {
        let node = local_node(&copy).await;
        let handle = node.projection(recorder::<SqliteConnection>(name), model, options()).await;
        handle.wait_until_caught_up(PATIENCE).await.unwrap();
        node.stop(PATIENCE).await.unwrap();
    }
    // The original continues.
    let node = local_node(&original).await;
    let recorder = recorder::<SqliteConnection>("orders");
    let seen = recorder.seen.clone();
    let handle = node.projection(recorder, SqliteReadModel::open(&read).await.unwrap(), options()).await;
    handle.wait_until_caught_up(PATIENCE).await.unwrap();
    assert_eq!(seen.positions().len(), 5);
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copied_database_writes_no_read_model_in_another_one() {
    let server = PostgresServer::shared().await;
    let (url, tables) = (server.create_database().await, server.create_database().await);
    let original: Arc<dyn EventStore> = Arc::new(PostgresStore::connect(&url).await.unwrap());
    append(&original, 0, 0..5).await;
    drop(original);
    let (base, name) = url.rsplit_once('/').unwrap();
    let mut connection = PgConnection::connect(&format!("{base}/postgres")).await.unwrap();
    // The store's connections may take a moment to end.
    let copied = format!("CREATE DATABASE {name}_copy TEMPLATE {name}");
    timeout(PATIENCE, async {
        while connection.execute(AssertSqlSafe(copied.clone())).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the copy is made");
    let copy = PostgresStore::connect(&format!("{url}_copy")).await.unwrap();
    let pool = PgPool::connect(&tables).await.unwrap();
    is_refused::<PgConnection, _>(Arc::new(copy), PostgresReadModel::new(pool.clone())).await;
    let schemas: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'storied%'")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(schemas, 0);
}
