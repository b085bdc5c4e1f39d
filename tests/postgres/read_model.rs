//! A projection whose read model is in PostgreSQL: exactly once, whoever dies.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use storied::projection::ApplyError;
use storied::{
    EncodeError, EventStore, ExpectedVersion, Filter, LocalBus, Position, PostgresReadModel, PostgresStore,
    Projection, RecordedEvent, Runtime,
};

use crate::support::PostgresServer;
use crate::tools::{append, events, run, stream, whole_log};

struct Seen;

impl Projection for Seen {
    type Transaction = PgConnection;

    fn name(&self) -> &str {
        "seen"
    }

    fn filter(&self) -> Result<Filter, EncodeError> {
        Ok(Filter::all())
    }

    async fn apply(&mut self, event: &RecordedEvent, tx: &mut PgConnection) -> Result<(), ApplyError> {
        sqlx::query("INSERT INTO seen (position) VALUES ($1)")
            .bind(event.position.get() as i64)
            .execute(tx)
            .await?;
        Ok(())
    }
}

/// Two nodes over one store and one read model, in another database than the events; server processes are killed all the
/// time, and the owner goes away in the middle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_models_are_exact_while_connections_die() {
    let server = PostgresServer::shared().await;
    let (log, tables) = (server.create_database().await, server.create_database().await);
    run(&tables, "CREATE TABLE seen (id bigint GENERATED ALWAYS AS IDENTITY, position bigint)").await;
    let node = async || {
        let pool = PgPool::connect(&tables).await.unwrap();
        Runtime::builder()
            .store(PostgresStore::connect(&log).await.unwrap())
            .bus(LocalBus::new())
            .projection(Seen, PostgresReadModel::new(pool))
            .start()
            .await
            .unwrap()
    };
    let (first, second) = (node().await, node().await);
    let writer = PostgresStore::connect(&log).await.unwrap();
    let mut last = Position::START;
    let mut first = Some(first);
    for round in 0..60 {
        let appended = append(&writer, &stream(round % 7), ExpectedVersion::Any, events(5)).await;
        if let Ok(appended) = appended {
            last = appended.positions[4];
        }
        if round % 6 == 0 {
            for database in [&tables, &log] {
                run(
                    database,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid()",
                )
                .await;
            }
        }
        if round == 30 {
            first.take().unwrap().shutdown().await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    second.projection("seen").unwrap().caught_up_to_within(last, Duration::from_secs(30)).await.unwrap();
    let pool = PgPool::connect(&tables).await.unwrap();
    let seen: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM seen ORDER BY id").fetch_all(&pool).await.unwrap();
    let log: Vec<i64> =
        whole_log(&writer as &dyn EventStore).await.iter().map(|event| event.position.get() as i64).collect();
    assert_eq!(seen, log);
    second.shutdown().await.unwrap();
}
