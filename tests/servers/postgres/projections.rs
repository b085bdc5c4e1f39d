//! Many projections, and long logs.
//!
//! `STORIED_EVENTS=1000000 cargo test --release` gives the figures for a million events; run it
//! alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::PgConnection;
use sqlx::postgres::PgPoolOptions;
use storied::projection::{ApplyError, InMemory};
use storied::store::Append;
use storied::{
    AnyEvent, EventName, EventStore, ExpectedVersion, Filter, NewEvent, Position, PostgresOptions,
    PostgresReadModel, PostgresStore, Projection, ReadLog, RecordedEvent, Runtime,
};

use crate::postgres::tools::{append, events, run, stream};
use crate::support::PostgresServer;

const PATIENCE: Duration = Duration::from_secs(120);

struct Counted(String);

impl Projection for Counted {
    const NAME: &'static str = "counted";
    type Event = AnyEvent;
    type Transaction = PgConnection;

    fn name(&self) -> &str {
        &self.0
    }

    async fn apply(
        &mut self,
        _: AnyEvent,
        _: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        let count = "INSERT INTO counts VALUES ($1, 1) ON CONFLICT (name) DO UPDATE SET n = counts.n + 1";
        sqlx::query(count).bind(&self.0).execute(tx).await?;
        Ok(())
    }
}

/// Log, read models, leases and checkpoints of all projections share ten connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_projections_share_ten_connections() {
    let server = PostgresServer::shared().await;
    let url = server.create_database().await;
    run(&url, "CREATE TABLE counts (name text PRIMARY KEY, n bigint NOT NULL)").await;
    let pool = PgPoolOptions::new().max_connections(10).connect(&url).await.unwrap();
    let store = PostgresOptions::new().pool(pool.clone()).connect().await.unwrap();
    let mut builder = Runtime::builder().store(store.clone());
    for n in 0..200 {
        builder = builder.projection(Counted(format!("p{n}")), PostgresReadModel::new(pool.clone()));
    }
    let started = Instant::now();
    let runtime = builder.start().await.unwrap();
    let mut position = Position::START;
    for n in 0..20 {
        let appended = append(&store, &stream(n), ExpectedVersion::Any, events(1)).await.unwrap();
        position = appended.positions[0];
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for n in 0..200 {
        let projection = runtime.projection(&format!("p{n}")).unwrap();
        projection.caught_up_to_within(position, PATIENCE).await.unwrap();
    }
    println!("200 projections have applied 20 events each {:?} after the start", started.elapsed());
    // All of them keep their leases while idle.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let status = runtime.status().await;
    assert!(status.projections.values().all(|status| status.epoch == 1), "{status:?}");
    let counts: Vec<i64> = sqlx::query_scalar("SELECT n FROM counts").fetch_all(&pool).await.unwrap();
    assert_eq!(counts, [20; 200]);
    let stopped = Instant::now();
    runtime.shutdown().await.unwrap();
    println!("they ended in {:?}", stopped.elapsed());
}

/// An in-memory projection that counts its events.
struct Counting {
    name: &'static str,
    filter: Filter,
    seen: Arc<AtomicU64>,
}

impl Projection for Counting {
    const NAME: &'static str = "counting";
    type Event = AnyEvent;
    type Transaction = ();

    fn name(&self) -> &str {
        self.name
    }

    fn filter(&self) -> Filter {
        self.filter.clone()
    }

    async fn apply(&mut self, _: AnyEvent, _: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
        self.seen.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        self.seen.store(0, Ordering::Relaxed);
        Ok(())
    }
}

fn named(name: &str) -> Filter {
    Filter::all().with_names([EventName::new(name).unwrap()])
}

/// Appends events; one in a thousand is `order.rare`.
async fn fill(store: &PostgresStore, count: usize) -> Position {
    let mut position = Position::START;
    for batch in 0..count / 1_000 {
        let mut events: Vec<NewEvent> = events(1_000);
        events[500].name = EventName::new("order.rare").unwrap();
        let append = Append::one(stream(batch % 100), ExpectedVersion::Any, events);
        position = store.append(vec![append]).await.remove(0).unwrap().positions[999];
    }
    position
}

/// Returns the shortest time for a catch-up, and the number of events.
async fn catch_up(url: &str, name: &'static str, filter: Filter, head: Position) -> (Duration, u64) {
    let mut best = catch_up_once(url, name, filter.clone(), head).await;
    for _ in 0..2 {
        best = best.min(catch_up_once(url, name, filter.clone(), head).await);
    }
    best
}

async fn catch_up_once(url: &str, name: &'static str, filter: Filter, head: Position) -> (Duration, u64) {
    let seen = Arc::new(AtomicU64::new(0));
    let store = PostgresStore::connect(url).await.unwrap();
    let started = Instant::now();
    let projection = Counting { name, filter, seen: seen.clone() };
    let runtime =
        Runtime::builder().store(store).projection(projection, InMemory::new()).start().await.unwrap();
    let handle = runtime.projection(name).unwrap();
    handle.caught_up_to_within(head, PATIENCE).await.unwrap();
    let took = started.elapsed();
    runtime.shutdown().await.unwrap();
    (took, seen.load(Ordering::Relaxed))
}

fn resident_megabytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4 / 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn catch_up_uses_constant_memory_and_the_index_by_name() {
    let count = std::env::var("STORIED_EVENTS").map_or(30_000, |count| count.parse().unwrap());
    let server = PostgresServer::shared().await;
    let url = server.create_database().await;
    let store = PostgresOptions::new().url(&url).index_by_name(true).connect().await.unwrap();
    let head = fill(&store, count).await;

    let stop = Arc::new(AtomicBool::new(false));
    let before = resident_megabytes();
    let watch = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut most = 0;
            while !stop.load(Ordering::Relaxed) {
                most = most.max(resident_megabytes());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            most
        }
    });
    let (all, seen) = catch_up(&url, "all", Filter::all(), head).await;
    stop.store(true, Ordering::Relaxed);
    let most = watch.await.unwrap();
    assert_eq!(seen, count as u64);
    let (rare, seen) = catch_up(&url, "rare", named("order.rare"), head).await;
    assert_eq!(seen, count as u64 / 1_000);
    let (never, seen) = catch_up(&url, "never", named("order.never"), head).await;
    assert_eq!(seen, 0);
    let times = all.as_secs_f64() / rare.as_secs_f64();
    println!(
        "{count} events: all in {all:?}, one in a thousand in {rare:?} ({times:.0} times as fast), none in {never:?}"
    );
    println!("{before} MiB before, {most} MiB at most");
    if count >= 1_000_000 {
        assert!(times >= 20.0, "{times}");
        assert!(most < before + 64, "{before} MiB became {most} MiB");
    }

    // At the head it stays live, whatever is appended.
    let projection = Counting { name: "never", filter: named("order.never"), seen: Arc::default() };
    let runtime = Runtime::builder()
        .store(store.clone())
        .projection(projection, InMemory::new())
        .start()
        .await
        .unwrap();
    let handle = runtime.projection("never").unwrap();
    handle.wait_until_caught_up(PATIENCE).await.unwrap();
    for n in 0..10 {
        let appended = append(&store, &stream(n), ExpectedVersion::Any, events(3)).await.unwrap();
        handle.caught_up_to_within(appended.positions[2], PATIENCE).await.unwrap();
        assert_eq!(handle.status().lag(), Some(0));
    }
    assert_eq!(store.read_log(ReadLog::after(handle.status().position)).await.unwrap().events.len(), 0);
    runtime.shutdown().await.unwrap();
}
