//! A projection with its read model in PostgreSQL: exactly once, whatever fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{PgConnection, PgPool};
use storied::projection::{ApplyError, ProjectionState, ReadModel};
use storied::store::Checkpoint;
use storied::{
    AnyEvent, EventStore, ExpectedVersion, MemoryStore, Position, PostgresReadModel, PostgresStore,
    Projection, RecordedEvent, Runtime,
};

use crate::postgres::tools::{append, events, eventually, run, stream, whole_log};
use crate::support::PostgresServer;

struct Seen;

impl Projection for Seen {
    const NAME: &'static str = "seen";
    type Event = AnyEvent;
    type Transaction = PgConnection;

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        sqlx::query("INSERT INTO seen (position) VALUES ($1)")
            .bind(event.position.get() as i64)
            .execute(tx)
            .await?;
        Ok(())
    }

    async fn reset(&mut self, tx: &mut PgConnection) -> Result<(), ApplyError> {
        sqlx::query("TRUNCATE seen").execute(tx).await?;
        Ok(())
    }
}

/// Two nodes over one store and one read model, in another database than the events. Server
/// processes are killed all the time, and the owner is stopped midway.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_models_are_exact_while_connections_die() {
    let server = PostgresServer::shared().await;
    let (log, tables) = (server.create_database().await, server.create_database().await);
    run(&tables, "CREATE TABLE seen (id bigint GENERATED ALWAYS AS IDENTITY, position bigint)").await;
    let node = async || {
        let pool = PgPool::connect(&tables).await.unwrap();
        Runtime::builder()
            .store(PostgresStore::connect(&log).await.unwrap())
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

/// The error recommends: "… or reset the projection".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_takes_over_a_read_model_of_another_store() {
    let server = PostgresServer::shared().await;
    let tables = server.create_database().await;
    run(&tables, "CREATE TABLE seen (id bigint GENERATED ALWAYS AS IDENTITY, position bigint)").await;
    let pool = PgPool::connect(&tables).await.unwrap();
    let seen =
        async || -> i64 { sqlx::query_scalar("SELECT count(*) FROM seen").fetch_one(&pool).await.unwrap() };
    for (count, first) in [(20, true), (5, false)] {
        let store = MemoryStore::new();
        let appended = append(&store, &stream(1), ExpectedVersion::Any, events(count)).await.unwrap();
        let runtime = Runtime::builder()
            .store(store)
            .projection(Seen, PostgresReadModel::new(pool.clone()))
            .start()
            .await
            .unwrap();
        let projection = runtime.projection("seen").unwrap();
        if !first {
            let mut status = projection.watch();
            let failed = status.wait_for(|status| status.state == ProjectionState::Failed);
            let advice = failed.await.unwrap().last_error.clone().unwrap();
            assert!(advice.contains("reset"), "{advice}");
            assert_eq!(seen().await, 20);
            projection.reset().await.unwrap();
        }
        let last = *appended.positions.last().unwrap();
        projection.caught_up_to_within(last, Duration::from_secs(30)).await.unwrap();
        assert_eq!(seen().await, count as i64);
        runtime.shutdown().await.unwrap();
    }
}

/// The pool pings at each loan: a connection serves consecutive transactions, at most for a second, and
/// not while other users of the pool need it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_serves_consecutive_transactions() {
    let server = PostgresServer::shared().await;
    for (connections, kept) in [(4, true), (1, false)] {
        let tables = server.create_database().await;
        run(&tables, "CREATE TABLE seen (id bigint GENERATED ALWAYS AS IDENTITY, position bigint)").await;
        let loans = Arc::new(AtomicUsize::new(0));
        let counter = loans.clone();
        let pool = PgPoolOptions::new().max_connections(connections).before_acquire(move |_, _| {
            counter.fetch_add(1, Ordering::Relaxed);
            Box::pin(async { Ok(true) })
        });
        let pool = pool.connect(&tables).await.unwrap();
        let store = Arc::new(MemoryStore::new());
        let builder = Runtime::builder().store(store.clone() as Arc<dyn EventStore>);
        let runtime = builder.projection(Seen, PostgresReadModel::new(pool.clone())).start().await.unwrap();
        let mut seen = runtime.projection("seen").unwrap().watch();
        // Not `caught_up_to`, which may read the checkpoint: one more loan.
        let mut apply_one = async || {
            let appended = append(&*store, &stream(1), ExpectedVersion::Any, events(1)).await.unwrap();
            seen.wait_for(|status| status.position >= appended.positions[0]).await.unwrap();
        };
        apply_one().await;
        let (before, began) = (loans.load(Ordering::Relaxed), Instant::now());
        let mut rounds = 0;
        while rounds < 100 || began.elapsed() < Duration::from_millis(2_500) {
            apply_one().await;
            rounds += 1;
        }
        let lent = loans.load(Ordering::Relaxed) - before;
        if kept {
            // Once a second; besides, a round may last longer than the connection is kept.
            assert!((1..rounds / 2).contains(&lent), "{lent} loans in {rounds} rounds");
        } else {
            assert!(lent >= rounds, "{lent} loans in {rounds} rounds");
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(pool.num_idle(), pool.size() as usize, "the pool got its connection back");
        runtime.shutdown().await.unwrap();
    }
}

/// Begins a transaction; returns whether it had begun before this call, and its time limit.
async fn begun(model: &PostgresReadModel, limit: Option<Duration>) -> (bool, String) {
    let clock: DateTime<Utc> =
        sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(model.pool()).await.unwrap();
    let mut open = model.begin("seen", Checkpoint::default(), limit).await.unwrap();
    let about = sqlx::query_as("SELECT now() < $1, current_setting('statement_timeout')").bind(clock);
    let about = about.fetch_one(model.transaction(&mut open)).await.unwrap();
    model.commit(open, vec![]).await.unwrap();
    about
}

/// A transaction that begins ahead serves the next `begin` alike. If it is not needed, it ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_begins_ahead_on_a_kept_connection() {
    let tables = PostgresServer::shared().await.create_database().await;
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let model = async |isolation: &str| {
        let options: PgConnectOptions = tables.parse().unwrap();
        let options = options.options([("default_transaction_isolation", isolation)]);
        let pool = PgPoolOptions::new().max_connections(4).connect_with(options).await.unwrap();
        let model = PostgresReadModel::new(pool);
        model.prepare(&store).await.unwrap();
        model
    };
    let (minute, other) = (Some(Duration::from_secs(60)), Some(Duration::from_secs(120)));
    let ahead = async |model: &PostgresReadModel| {
        model.will_begin("seen", minute);
        tokio::time::sleep(Duration::from_millis(10)).await;
        begun(model, minute).await
    };
    let committed = model("read committed").await;
    // No connection is kept yet: another user of the pool may need the next one.
    assert_eq!(ahead(&committed).await, (false, "1min".into()));
    // Again on a busy machine, where it may come too late for the kept connection.
    eventually("a transaction that began ahead", async || ahead(&committed).await.0).await;
    // With another limit: another transaction.
    committed.will_begin("seen", minute);
    assert_eq!(begun(&committed, other).await, (false, "2min".into()));

    // At a level where the transaction would not see what is committed meanwhile.
    let repeatable = model("repeatable read").await;
    for _ in 0..5 {
        assert_eq!(ahead(&repeatable).await, (false, "1min".into()));
    }

    // The server process is killed before the transaction is used.
    begun(&committed, minute).await;
    committed.will_begin("seen", minute);
    tokio::time::sleep(Duration::from_millis(10)).await;
    run(
        &tables,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    .await;
    let mut open = committed.begin("seen", Checkpoint::default(), minute).await.unwrap();
    // On a busy machine, it may come too late and get another connection.
    if let Err(error) = sqlx::query("SELECT 1").execute(committed.transaction(&mut open)).await {
        assert!(ReadModel::is_outage(&committed, &error), "{error}");
    }
    drop(open);

    // One that is not used ends, and the pool gets its connection back.
    tokio::time::sleep(Duration::from_millis(200)).await;
    begun(&committed, minute).await;
    committed.will_begin("seen", minute);
    eventually("the pool got its connections back", async || {
        committed.pool().num_idle() == committed.pool().size() as usize
    })
    .await;
    let open =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'";
    let open: i64 = sqlx::query_scalar(open).fetch_one(committed.pool()).await.unwrap();
    assert_eq!(open, 0);
}

/// The error of an application, with every way of passing on its causes.
#[derive(Debug, thiserror::Error)]
enum Mine {
    #[error("my read model: {0}")]
    Told(#[from] sqlx::Error),
    #[error(transparent)]
    HandedOn(sqlx::Error),
}

#[tokio::test]
async fn an_outage_inside_an_application_error_is_detected() {
    let server = PostgresServer::shared().await;
    let pool = PgPool::connect(&server.create_database().await).await.unwrap();
    let model = PostgresReadModel::new(pool.clone());
    let outage = |error: ApplyError| ReadModel::is_outage(&model, &*error);
    let failing = async |sql: &'static str| sqlx::raw_sql(sql).execute(&pool).await.unwrap_err();
    // Like a deadlock: no statement is at fault.
    let deadlock = "DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$";
    assert!(outage(failing(deadlock).await.into()));
    assert!(outage(Mine::Told(failing(deadlock).await).into()));
    assert!(outage(Mine::HandedOn(failing(deadlock).await).into()));
    let mistake = "SELECT nothing FROM nowhere";
    assert!(!outage(failing(mistake).await.into()));
    assert!(!outage(Mine::Told(failing(mistake).await).into()));
    assert!(!outage(Mine::HandedOn(failing(mistake).await).into()));
    assert!(!outage("mine".into()));
}
