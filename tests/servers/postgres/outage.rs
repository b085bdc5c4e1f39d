//! Read models in PostgreSQL with a hanging server or connection: every call ends, and the
//! application's pool stays clean.

use std::time::Duration;

use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, PgConnection, PgPool};
use storied::projection::{ApplyError, ProjectionState};
use storied::{
    AnyEvent, ExpectedVersion, MemoryStore, PostgresOptions, PostgresReadModel, Projection, ProjectionHandle,
    ProjectionOptions, RecordedEvent, Runtime, StoreError,
};
use tokio::time::{Instant, timeout};

use crate::postgres::proxy::{Loss, Proxy};
use crate::postgres::tools::{append, as_user, events, eventually, run, stream, whole_log};
use crate::support::{PATIENCE, PostgresServer};

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
        // The plan of a named prepared statement depends on the table.
        sqlx::query("SELECT * FROM notes").fetch_all(&mut *tx).await?;
        sqlx::query("INSERT INTO seen (position) VALUES ($1)")
            .bind(event.position.get() as i64)
            .execute(tx)
            .await?;
        Ok(())
    }
}

/// A projection that has applied one event, over a proxy.
struct Fixture {
    url: String,
    proxy: Proxy,
    pool: PgPool,
    store: MemoryStore,
    runtime: Runtime,
}

impl Fixture {
    async fn start(connections: u32, options: ProjectionOptions) -> Self {
        let url = PostgresServer::shared().await.create_database().await;
        run(&url, "CREATE TABLE seen (position bigint); CREATE TABLE notes (text text)").await;
        let proxy = Proxy::start(&url).await;
        let pool = PgPoolOptions::new().max_connections(connections).connect(proxy.url()).await.unwrap();
        let store = MemoryStore::new();
        let model = PostgresReadModel::new(pool.clone());
        let builder = Runtime::builder().store(store.clone()).projection_with(Seen, model, options);
        let fixture = Self { url, proxy, pool, store, runtime: builder.start().await.unwrap() };
        let position = fixture.append().await;
        fixture.projection().caught_up_to_within(position, PATIENCE).await.unwrap();
        fixture
    }

    async fn append(&self) -> storied::Position {
        let appended = append(&self.store, &stream(1), ExpectedVersion::Any, events(1)).await.unwrap();
        *appended.positions.last().unwrap()
    }

    fn projection(&self) -> &ProjectionHandle {
        self.runtime.projection("seen").unwrap()
    }

    /// Silences all connections once they are idle. While the pool takes one back it has none, and would
    /// open another, which works.
    async fn silence_all(&self) {
        eventually("an idle pool", async || self.pool.num_idle() as u32 == self.pool.size()).await;
        self.proxy.silence_all();
    }

    /// Waits until the projection reports an error.
    async fn error(&self) -> String {
        let mut status = self.projection().watch();
        let failed = timeout(PATIENCE, status.wait_for(|status| status.last_error.is_some())).await;
        failed.expect("an error").unwrap().last_error.clone().unwrap()
    }

    /// Counts rows through another client.
    async fn count(&self, table: &str) -> i64 {
        let other = PgPool::connect(&self.url).await.unwrap();
        let sql = format!("SELECT count(*) FROM {table}");
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&other).await.unwrap()
    }
}

fn short() -> ProjectionOptions {
    ProjectionOptions::new()
        .transaction_timeout(Duration::from_millis(300))
        .initial_backoff(Duration::from_millis(10))
        .max_backoff(Duration::from_millis(50))
        .max_attempts(1)
}

/// The pool must not hand out a connection whose BEGIN was sent and then abandoned: writes of the
/// application on it would be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_gets_no_connection_back_inside_a_transaction() {
    for needle in [&b"BEGIN"[..], b"COMMIT"] {
        let fixture = Fixture::start(1, short()).await;
        fixture.proxy.lose(needle, Loss::Stall(Duration::from_secs(1)));
        fixture.append().await;
        let error = fixture.error().await;
        assert!(error.contains("transaction_timeout"), "{error}");
        fixture.runtime.clone().shutdown().await.unwrap();
        // The application writes on any connection of the pool.
        let written = sqlx::query("INSERT INTO notes (text) VALUES ('mine')").execute(&fixture.pool).await;
        assert_eq!(written.unwrap().rows_affected(), 1);
        assert_eq!(fixture.count("notes").await, 1, "an acknowledged row is missing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_dies_silently_is_replaced() {
    let fixture = Fixture::start(3, short()).await;
    fixture.silence_all().await;
    let position = fixture.append().await;
    let error = fixture.error().await;
    assert!(error.contains("transaction_timeout"), "{error}");
    fixture.projection().caught_up_to_within(position, PATIENCE).await.unwrap();
    assert_eq!(fixture.count("seen").await, 2);

    // A call of the handle has the same limit.
    fixture.silence_all().await;
    let error = fixture.projection().parked(10).await.unwrap_err().to_string();
    assert!(error.contains("transaction_timeout"), "{error}");

    // A dead connection costs a ping instead of the pool's time limit.
    let fixture = Fixture::start(3, ProjectionOptions::new()).await;
    fixture.silence_all().await;
    let (began, position) = (Instant::now(), fixture.append().await);
    fixture.projection().caught_up_to_within(position, PATIENCE).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());

    // Also with the default limit.
    let fixture = Fixture::start(3, ProjectionOptions::new()).await;
    fixture.silence_all().await;
    fixture.append().await;
    let began = Instant::now();
    fixture.runtime.clone().shutdown().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

/// A statement that waits for a lock ends on the server too, with the locks of its transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_given_up_ends_on_the_server() {
    let fixture = Fixture::start(5, short()).await;
    let other = PgPool::connect(&fixture.url).await.unwrap();
    let mut lock = other.begin().await.unwrap();
    sqlx::query("LOCK TABLE seen").execute(&mut *lock).await.unwrap();
    let position = fixture.append().await;
    fixture.error().await;
    let waiting = async || -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'seen'::regclass")
            .fetch_one(&other)
            .await
            .unwrap()
    };
    // At any number of attempts.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(2) {
        assert!(waiting().await <= 3);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    lock.rollback().await.unwrap();
    fixture.projection().caught_up_to_within(position, PATIENCE).await.unwrap();
    assert_eq!(fixture.count("seen").await, 2);
    eventually("no statement waits any more", async || waiting().await == 0).await;
    fixture.runtime.clone().shutdown().await.unwrap();
}

/// After `SELECT *` in `apply` and a new column, old connections fail with "cached plan must not
/// change result type".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_plan_costs_a_connection_and_no_event() {
    // A single connection: another one would not have a plan yet.
    let fixture = Fixture::start(1, short().transaction_timeout(Duration::from_secs(20))).await;
    run(&fixture.url, "ALTER TABLE notes ADD COLUMN written timestamptz").await;
    let position = fixture.append().await;
    fixture.projection().caught_up_to_within(position, PATIENCE).await.unwrap();
    fixture.projection().wait_until_caught_up(PATIENCE).await.unwrap();
    assert_eq!(fixture.count("seen").await, 2);
    fixture.runtime.clone().shutdown().await.unwrap();
}

/// Starting nodes wait for a server that restarts. A permanent error ends a start at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_waits_for_a_server_that_restarts() {
    let mut server = PostgresServer::start().await;
    let url = server.create_database().await;
    let options = || PostgresOptions::new().url(&url).acquire_timeout(Duration::from_millis(200));
    let store = options().connect().await.unwrap();
    server.stop_immediately().await;
    // More than one attempt fails.
    let failed = options().connect_timeout(Duration::ZERO).connect().await.unwrap_err();
    assert!(failed.is_transient(), "{failed}");
    let failed = Runtime::builder().store(store.clone()).start_timeout(Duration::ZERO).start().await;
    assert!(failed.is_err());
    let back = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        server.restart().await;
    };
    let (connected, started, ()) =
        tokio::join!(options().connect(), Runtime::builder().store(store).start(), back);
    connected.unwrap();
    started.unwrap().shutdown().await.unwrap();
    let began = Instant::now();
    let (base, _) = url.rsplit_once('/').unwrap();
    let missing = PostgresOptions::new().url(format!("{base}/nowhere")).connect().await.unwrap_err();
    assert!(matches!(missing, StoreError::Misconfigured { .. }), "{missing}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// Creates the login `careful` with the password `right`, which the server checks.
async fn careful_login(server: &PostgresServer, url: &str) {
    run(url, "CREATE ROLE careful LOGIN SUPERUSER PASSWORD 'right'").await;
    let rules = server.dir().join("data/pg_hba.conf");
    let others = std::fs::read_to_string(&rules).unwrap();
    std::fs::write(&rules, format!("host all careful all scram-sha-256\n{others}")).unwrap();
    run(url, "SELECT pg_reload_conf()").await;
    let wrong = as_user(url, "careful:wrong");
    eventually("the server checks passwords", async || PgConnection::connect(&wrong).await.is_err()).await;
}

/// A failure that ends without a restart needs no `resume` either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_survives_a_changed_login_or_schema() {
    let server = PostgresServer::start().await;
    let url = server.create_database().await;
    run(&url, "CREATE TABLE seen (position bigint); CREATE TABLE notes (text text)").await;
    careful_login(&server, &url).await;

    let login = as_user(&url, "careful:right");
    let options = PostgresOptions::new().url(&login).acquire_timeout(Duration::from_millis(200));
    let store = options.connect().await.unwrap();
    let reader = PostgresOptions::new().url(&url).connect().await.unwrap();
    let model = PostgresReadModel::new(PgPool::connect(&login).await.unwrap());
    let quick = ProjectionOptions::new()
        .initial_backoff(Duration::from_millis(10))
        .max_backoff(Duration::from_millis(100));
    let runtime =
        Runtime::builder().store(store.clone()).projection_with(Seen, model, quick).start().await.unwrap();
    let projection = runtime.projection("seen").unwrap();
    let one = async || append(&store, &stream(1), ExpectedVersion::Any, events(1)).await;
    // Other idle connections of the store may have been closed, too.
    let retried = async || {
        let began = Instant::now();
        loop {
            match one().await {
                Ok(appended) => break appended.positions[0],
                Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
            }
        }
    };
    for (change, undo, disconnects) in [
        ("ALTER ROLE careful PASSWORD 'another'", "ALTER ROLE careful PASSWORD 'right'", true),
        ("ALTER ROLE careful NOLOGIN", "ALTER ROLE careful LOGIN", true),
        (
            "ALTER ROLE careful SET default_transaction_isolation = 'serializable'",
            "ALTER ROLE careful RESET default_transaction_isolation",
            true,
        ),
        ("ALTER SCHEMA storied RENAME TO gone", "ALTER SCHEMA gone RENAME TO storied", false),
        (
            "ALTER TABLE storied.checkpoints RENAME TO others",
            "ALTER TABLE storied.others RENAME TO checkpoints",
            false,
        ),
    ] {
        let position = retried().await;
        projection.caught_up_to_within(position, PATIENCE).await.unwrap();
        let kill = "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE usename = 'careful'";
        run(&url, change).await;
        if disconnects {
            run(&url, kill).await;
        }
        // Only after a renamed table of checkpoints does it succeed.
        let _ = one().await;
        // The isolation level disturbs only the event store.
        let mut failed = change.contains("isolation");
        let since = Instant::now();
        // Longer on a busy machine, where the first errors are those of a slow connection.
        while since.elapsed() < Duration::from_secs(2) || (!failed && since.elapsed() < PATIENCE) {
            let status = projection.status();
            assert_ne!(status.state, ProjectionState::Failed, "{change}: {:?}", status.last_error);
            failed |= status.state == ProjectionState::Retrying;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(failed, "{change}: {:?}", projection.status());
        run(&url, undo).await;
        if disconnects {
            run(&url, kill).await;
        }
        let position = retried().await;
        projection.caught_up_to_within(position, PATIENCE).await.unwrap();
        let rows: i64 = {
            let mut other = PgConnection::connect(&url).await.unwrap();
            sqlx::query_scalar("SELECT count(*) FROM seen").fetch_one(&mut other).await.unwrap()
        };
        assert_eq!(rows, whole_log(&reader).await.len() as i64, "{change}");
    }
    runtime.shutdown().await.unwrap();
}

/// The limits are longer than the patience here: a start that repeats its attempt until then does not end in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_ends_a_start_at_once() {
    const LIMIT: Duration = Duration::from_secs(3_600);
    let server = PostgresServer::start().await;
    let url = server.create_database().await;
    careful_login(&server, &url).await;

    let wrong = as_user(&url, "careful:wrong");
    let options = |url: &str| PostgresOptions::new().url(url).connect_timeout(LIMIT);
    let store = options(&as_user(&url, "careful:right")).connect().await.unwrap();
    let failed = timeout(PATIENCE, options(&wrong).connect()).await.expect("it ends at once").unwrap_err();
    assert!(matches!(failed, StoreError::Misconfigured { .. }) && !failed.is_transient(), "{failed:?}");
    for part in ["password authentication failed", "careful", "check user name and password"] {
        assert!(failed.to_string().contains(part), "{part:?} is not in: {failed}");
    }

    // The same of a store that is open, and is refused when it connects again.
    run(&url, "ALTER ROLE careful PASSWORD 'another'").await;
    run(&url, "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE usename = 'careful'")
        .await;
    let start = Runtime::builder().store(store).start_timeout(LIMIT).start();
    let failed = timeout(PATIENCE, start).await.expect("it ends at once").unwrap_err().to_string();
    assert!(failed.contains("check user name and password"), "{failed}");
}
