//! The high-water mark of one process does not limit what another process has read (F42).
//!
//! A writer that takes its lock late lowers the mark for a moment. That must not count as lost
//! events.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use sqlx::{Executor, PgConnection, PgPool};
use storied::bus::{JetStreamOptions, NatsOptions};
use storied::projection::{ApplyError, InMemory, Projection, ProjectionState};
use storied::{
    EncodeError, EventStore, Filter, LocalBus, Position, PostgresReadModel, PostgresStore, PublisherState,
    RecordedEvent, Runtime,
};

use crate::support::{self, NatsServer, PostgresServer};
use crate::tools::{append, connect, events, eventually, exact, run, stream};

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
    type Transaction = PgConnection;

    fn name(&self) -> &str {
        "seen"
    }

    fn filter(&self) -> Result<Filter, EncodeError> {
        Ok(Filter::all())
    }

    async fn apply(&mut self, event: &RecordedEvent, tx: &mut PgConnection) -> Result<(), ApplyError> {
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
    type Transaction = ();

    fn name(&self) -> &str {
        "kept"
    }

    fn filter(&self) -> Result<Filter, EncodeError> {
        Ok(Filter::all())
    }

    async fn apply(&mut self, event: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
        self.positions.write().unwrap().push(event.position.get());
        self.applied.write().unwrap().push(event.position.get());
        Ok(())
    }

    async fn reset(&mut self, _: &mut ()) -> Result<(), ApplyError> {
        self.positions.write().unwrap().clear();
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_is_claimed_below_its_checkpoint() {
    let url = PostgresServer::shared().await.create_database().await;
    run(&url, "CREATE TABLE seen (position bigint)").await;
    let pool = PgPool::connect(&url).await.unwrap();
    let node = async || {
        let store = PostgresStore::connect(&url).await.unwrap();
        let seen = PostgresReadModel::new(pool.clone());
        let runtime = Runtime::builder()
            .store(store.clone())
            .bus(LocalBus::new())
            .projection(Seen, seen)
            .start()
            .await
            .unwrap();
        (store, runtime)
    };
    let (store, runtime) = node().await;
    let last = append(&store, &stream(1), exact(0), events(3)).await.unwrap().positions[2];
    runtime.projection("seen").unwrap().caught_up_to_within(last, PATIENCE).await.unwrap();
    runtime.shutdown().await.unwrap();

    let mut slow = pull_back(&url).await;
    let (store, runtime) = node().await;
    assert_eq!(store.frontier().await.unwrap(), Position::START);
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
        let memory = InMemory::new().snapshot_every(1, 1, positions.clone());
        let runtime = Runtime::builder()
            .store(store.clone())
            .bus(LocalBus::new())
            .projection(kept, memory)
            .start()
            .await
            .unwrap();
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
async fn a_mirror_goes_on_above_the_mark() {
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
    assert_eq!(store.frontier().await.unwrap(), Position::START);
    // The publisher continues at the end of the mirror, whatever the mark is.
    published(&runtime, last).await;
    slow.execute("COMMIT").await.unwrap();
    let last = append(&store, &stream(1), exact(3), events(1)).await.unwrap().positions[0];
    published(&runtime, last).await;
    runtime.shutdown().await.unwrap();
}
