//! The high-water mark of one process does not limit what another process has read (F42).
//!
//! A writer that takes its lock late lowers the mark for a moment. That must not count as lost
//! events.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use sqlx::{AssertSqlSafe, Executor, PgConnection, PgPool};
use storied::bus::{JetStreamOptions, NatsOptions};
use storied::projection::{ApplyError, InMemory, Projection, ProjectionState};
use storied::{
    AnyEvent, EventStore, ExpectedVersion, Position, PostgresReadModel, PostgresStore, PublisherState,
    ReadLog, RecordedEvent, Runtime, SnapshotRevision,
};

use crate::postgres::tools::{
    append, assert_sound, connect, events, eventually, exact, run, stream, whole_log,
};
use crate::support::{self, NatsServer, PostgresServer};

const PATIENCE: Duration = Duration::from_secs(20);

/// Opens a transaction that holds the low-water lock of an empty log.
async fn pull_back(url: &str) -> PgConnection {
    let mut slow = connect(url).await;
    slow.execute("BEGIN").await.unwrap();
    slow.execute("SELECT pg_advisory_xact_lock_shared((('storied.positions'::regclass::oid::bigint & 1048575) << 44) | 0)")
        .await
        .unwrap();
    slow
}

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
        let position = event.position.get() as i64;
        sqlx::query("INSERT INTO seen VALUES ($1)").bind(position).execute(tx).await?;
        Ok(())
    }
}

/// A projection that counts how often it has applied each event.
struct Kept {
    positions: Arc<RwLock<Vec<u64>>>,
    applied: Arc<RwLock<Vec<u64>>>,
}

impl Projection for Kept {
    const NAME: &'static str = "kept";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
        self.positions.write().unwrap().push(event.position.get());
        self.applied.write().unwrap().push(event.position.get());
        Ok(())
    }

    async fn reset(&mut self, _: &mut ()) -> Result<(), ApplyError> {
        self.positions.write().unwrap().clear();
        Ok(())
    }
}

/// A read at the mark goes on without a query of the mark, but not beyond its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_beyond_the_mark_stops_at_its_end() {
    let url = PostgresServer::shared().await.create_database().await;
    let node = async || PostgresStore::connect(&url).await.unwrap();
    let (reader, writer) = (node().await, node().await);
    let first = append(&writer, &stream(1), exact(0), events(1)).await.unwrap().positions[0];
    assert_eq!(reader.high_water_mark().await.unwrap(), first);
    let next = append(&writer, &stream(1), exact(1), events(3)).await.unwrap().positions;
    let page = reader.read_log(ReadLog::after(first).upto(next[1]).limit(500)).await.unwrap();
    let read: Vec<_> = page.events.iter().map(|event| event.position).collect();
    assert_eq!((&read[..], page.scanned_to), (&next[..2], next[1]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_is_claimed_below_its_checkpoint() {
    let url = PostgresServer::shared().await.create_database().await;
    run(&url, "CREATE TABLE seen (position bigint)").await;
    let pool = PgPool::connect(&url).await.unwrap();
    let node = async || {
        let store = PostgresStore::connect(&url).await.unwrap();
        let seen = PostgresReadModel::new(pool.clone());
        let runtime = Runtime::builder().store(store.clone()).projection(Seen, seen).start().await.unwrap();
        (store, runtime)
    };
    let (store, runtime) = node().await;
    let last = append(&store, &stream(1), exact(0), events(3)).await.unwrap().positions[2];
    runtime.projection("seen").unwrap().caught_up_to_within(last, PATIENCE).await.unwrap();
    runtime.shutdown().await.unwrap();

    let mut slow = pull_back(&url).await;
    let (store, runtime) = node().await;
    assert_eq!(store.high_water_mark().await.unwrap(), Position::START);
    let mut status = runtime.projection("seen").unwrap().watch();
    let claimed = status.wait_for(|status| status.state == ProjectionState::Failed || status.epoch > 0);
    let claimed = tokio::time::timeout(PATIENCE, claimed).await.unwrap().unwrap().clone();
    assert_ne!(claimed.state, ProjectionState::Failed, "{claimed:?}");
    slow.execute("COMMIT").await.unwrap();
    let last = append(&store, &stream(1), exact(3), events(1)).await.unwrap().positions[0];
    runtime.projection("seen").unwrap().caught_up_to_within(last, PATIENCE).await.unwrap();
    let seen: Vec<i64> = sqlx::query_scalar("SELECT position FROM seen").fetch_all(&pool).await.unwrap();
    assert_eq!(seen, [1, 2, 3, 4]);
    runtime.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_loaded_above_the_mark() {
    let url = PostgresServer::shared().await.create_database().await;
    let node = async || {
        let store = PostgresStore::connect(&url).await.unwrap();
        let kept = Kept { positions: Arc::default(), applied: Arc::default() };
        let (positions, applied) = (kept.positions.clone(), kept.applied.clone());
        let memory = InMemory::new().snapshot_every(1, SnapshotRevision(1), positions.clone());
        let runtime = Runtime::builder().store(store.clone()).projection(kept, memory).start().await.unwrap();
        (store, runtime, positions, applied)
    };
    let (store, runtime, ..) = node().await;
    let last = append(&store, &stream(1), exact(0), events(3)).await.unwrap().positions[2];
    runtime.projection("kept").unwrap().caught_up_to_within(last, PATIENCE).await.unwrap();
    runtime.shutdown().await.unwrap();

    let mut slow = pull_back(&url).await;
    let (store, runtime, positions, applied) = node().await;
    eventually("the snapshot is loaded", async || *positions.read().unwrap() == [1, 2, 3]).await;
    slow.execute("COMMIT").await.unwrap();
    let last = append(&store, &stream(1), exact(3), events(1)).await.unwrap().positions[0];
    runtime.projection("kept").unwrap().caught_up_to_within(last, PATIENCE).await.unwrap();
    assert_eq!(*positions.read().unwrap(), [1, 2, 3, 4]);
    assert_eq!(*applied.read().unwrap(), [4], "replayed in spite of the snapshot");
    runtime.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_stream_goes_on_above_the_mark() {
    let url = PostgresServer::shared().await.create_database().await;
    let nats = NatsServer::start(support::NatsOptions::jetstream()).await;
    let node = async || {
        let store = PostgresStore::connect(&url).await.unwrap();
        let bus = NatsOptions::jetstream(JetStreamOptions::new().max_bytes(100 << 20)).url(nats.url()).bus();
        let runtime = Runtime::builder().store(store.clone()).bus(bus).start().await.unwrap();
        (store, runtime)
    };
    let published = async |runtime: &Runtime, last: Position| {
        eventually("it is published", async || {
            let status = runtime.status().await.publisher;
            if let PublisherState::Retrying { error } = status.state {
                assert!(!error.contains("the log stream ends at"), "{error}");
            }
            status.published.is_some_and(|published| published >= last)
        })
        .await;
    };
    let (store, runtime) = node().await;
    let last = append(&store, &stream(1), exact(0), events(3)).await.unwrap().positions[2];
    published(&runtime, last).await;
    runtime.shutdown().await.unwrap();

    let mut slow = pull_back(&url).await;
    let (store, runtime) = node().await;
    assert_eq!(store.high_water_mark().await.unwrap(), Position::START);
    // The publisher continues at the end of the log stream, whatever the mark is.
    published(&runtime, last).await;
    slow.execute("COMMIT").await.unwrap();
    let last = append(&store, &stream(1), exact(3), events(1)).await.unwrap().positions[0];
    published(&runtime, last).await;
    runtime.shutdown().await.unwrap();
}

/// Checks an application's own advisory locks.
///
/// Only the key of one `bigint` can look like storied's, and only in the same database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn advisory_locks_of_others_delay_readers_at_most() {
    let server = PostgresServer::shared().await;
    let url = server.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let grow = async |count| {
        *append(&store, &stream(1), ExpectedVersion::Any, events(count))
            .await
            .unwrap()
            .positions
            .last()
            .unwrap()
    };
    let head = grow(3).await;
    let mut theirs = connect(&format!("{url}?application_name=theirs")).await;
    let oid = "SELECT 'storied.positions'::regclass::oid::bigint & 1048575";
    let oid: i64 = sqlx::query_scalar(oid).fetch_one(&mut theirs).await.unwrap();
    let alike = |position: u64| (oid << 44) | position as i64;
    let lock = async |connection: &mut PgConnection, call: &str| {
        connection.execute(AssertSqlSafe(format!("SELECT {call}"))).await.unwrap();
    };

    // Other keys have no effect.
    let mut elsewhere = connect(&server.create_database().await).await;
    lock(&mut elsewhere, &format!("pg_advisory_lock({})", alike(0))).await;
    let another = ((oid ^ 1) << 44) | head.get() as i64;
    for key in [0, 1, -1, head.get() as i64, i64::from(i32::MAX), i64::MAX, i64::MIN + 1, another] {
        lock(&mut theirs, &format!("pg_advisory_lock({key})")).await;
        lock(&mut theirs, &format!("pg_advisory_lock_shared({key})")).await;
    }
    for position in [0, head.get()] {
        let (upper, lower) = (alike(position) >> 32, alike(position) & 0xffff_ffff);
        lock(&mut theirs, &format!("pg_advisory_lock({upper}, {lower})")).await;
    }
    let head = grow(3).await;
    assert_eq!(store.high_water_mark().await.unwrap(), head);
    assert_eq!(store.stall().await.unwrap(), None);
    theirs.execute("SELECT pg_advisory_unlock_all()").await.unwrap();

    // Nor has a key beyond the end of the log.
    lock(&mut theirs, &format!("pg_advisory_lock({})", alike(head.get() + 100))).await;
    assert_eq!(PostgresStore::connect(&url).await.unwrap().high_water_mark().await.unwrap(), head);
    let head = grow(2).await;
    assert_eq!(store.high_water_mark().await.unwrap(), head);
    theirs.execute("SELECT pg_advisory_unlock_all()").await.unwrap();

    // A key within the log makes readers wait there. None goes back, none misses an event.
    for (position, others) in [(head, head), (Position::START, Position::START)] {
        let seen = whole_log(&store).await;
        lock(&mut theirs, &format!("pg_advisory_lock_shared({})", alike(position.get()))).await;
        let other = PostgresStore::connect(&url).await.unwrap();
        assert_eq!(other.high_water_mark().await.unwrap(), others);
        let end = store.high_water_mark().await.unwrap();
        // A hole, as of a refused append: readers take consecutive events without the mark.
        theirs.execute("SELECT nextval('storied.positions')").await.unwrap();
        let last = grow(2).await;
        assert_eq!(store.high_water_mark().await.unwrap(), end);
        let after = seen.last().unwrap().position;
        let page = store.read_log(ReadLog::after(after)).await.unwrap();
        assert_eq!((page.events.len(), page.scanned_to), (0, after));
        let stall = store.stall().await.unwrap().expect("a culprit");
        assert_eq!((stall.application_name.as_str(), stall.low_water), ("theirs", position));
        theirs.execute("SELECT pg_advisory_unlock_all()").await.unwrap();
        for store in [&store, &other] {
            assert_eq!(store.high_water_mark().await.unwrap(), last);
            let log = whole_log(store).await;
            assert_sound(&log);
            assert_eq!(log.len(), seen.len() + 2);
            assert!(log.iter().zip(&seen).all(|(now, before)| now.id == before.id));
        }
    }

    // An exclusive lock on the key of the next append delays the append as well.
    let head = store.high_water_mark().await.unwrap();
    lock(&mut theirs, &format!("pg_advisory_lock({})", alike(head.get()))).await;
    let waiting = async {
        let mut watcher = connect(&url).await;
        eventually("the append waits", async || {
            let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
            sqlx::query_scalar(waits).fetch_one(&mut watcher).await.unwrap()
        })
        .await;
        theirs.execute("SELECT pg_advisory_unlock_all()").await.unwrap();
    };
    let (last, ()) = tokio::join!(grow(1), waiting);
    assert_eq!(store.high_water_mark().await.unwrap(), last);
}
