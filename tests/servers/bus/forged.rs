//! The store is the source of truth: messages of a plain client move no read model, and cost
//! little.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::{Client, HeaderMap, Message};
use bytes::Bytes;
use futures_util::StreamExt;
use sqlx::{PgConnection, PgPool, SqliteConnection, SqlitePool};
use storied::bus::{BusError, BusPublisher, BusState, BusSubscription};
use storied::projection::{
    ApplyError, FollowMode, InMemory, PostgresReadModel, ProjectionState, SqliteReadModel,
};
use storied::testing::Node;
use storied::{
    AnyEvent, BoxFuture, EventBus, EventStore, FeedOptions, Position, PostgresStore, Projection,
    ProjectionHandle, ProjectionOptions, PublisherState, RecordedEvent, SqliteStore,
};
use tokio::time::Instant;

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer, PostgresServer};

type Rows = Vec<(Position, Bytes)>;

/// Positions and payloads, in memory.
struct Memory(Arc<Mutex<Rows>>);

impl Projection for Memory {
    const NAME: &'static str = "memory";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, (): &mut ()) -> Result<(), ApplyError> {
        self.0.lock().unwrap().push((event.position, event.payload.clone()));
        Ok(())
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        self.0.lock().unwrap().clear();
        Ok(())
    }
}

/// Positions and payloads, in a table.
macro_rules! table {
    ($name:ident, $connection:ty, $insert:literal) => {
        struct $name(&'static str);

        impl Projection for $name {
            const NAME: &'static str = "table";
            type Event = AnyEvent;
            type Transaction = $connection;

            fn name(&self) -> &str {
                self.0
            }

            async fn apply(
                &mut self,
                _: AnyEvent,
                event: &RecordedEvent,
                tx: &mut $connection,
            ) -> Result<(), ApplyError> {
                let insert = sqlx::query($insert).bind(self.0).bind(event.position.get() as i64);
                insert.bind(&event.payload[..]).execute(tx).await?;
                Ok(())
            }
        }
    };
}

table!(PgTable, PgConnection, "INSERT INTO seen VALUES ($1, $2, $3)");
table!(SqliteTable, SqliteConnection, "INSERT INTO seen VALUES (?, ?, ?)");

fn rows(found: Vec<(i64, Vec<u8>)>) -> Rows {
    found.into_iter().map(|(at, payload)| (Position::new(at as u64), payload.into())).collect()
}

const READ: &str = "SELECT position, payload FROM seen WHERE name = $1 ORDER BY ";

async fn pg_rows(pool: &PgPool, name: &str) -> Rows {
    let read = sqlx::AssertSqlSafe(format!("{READ} ctid"));
    rows(sqlx::query_as(read).bind(name).fetch_all(pool).await.unwrap())
}

async fn sqlite_rows(pool: &SqlitePool, name: &str) -> Rows {
    let read = sqlx::AssertSqlSafe(format!("{READ} rowid"));
    rows(sqlx::query_as(read).bind(name).fetch_all(pool).await.unwrap())
}

/// A copy of a published message, with other headers and another payload.
fn forged(from: &Message, headers: &[(&'static str, String)], body: &Bytes) -> (HeaderMap, Bytes) {
    // JetStream refuses a message that expects another end of the stream. A forger would omit this
    // header.
    let mut forged = HeaderMap::new();
    for (name, values) in from.headers.as_ref().unwrap().iter() {
        if AsRef::<str>::as_ref(name) != "Nats-Expected-Last-Sequence" {
            values.iter().for_each(|value| forged.append(name.clone(), value.clone()));
        }
    }
    forged.insert("Nats-Msg-Id", uuid::Uuid::now_v7().to_string());
    for (name, value) in headers {
        forged.insert(*name, value.clone());
    }
    (forged, body.clone())
}

async fn forge(client: &Client, genuine: &Message, other: &Message, head: u64) {
    let (store, format) = ("Storied-Store", "Storied-Wire");
    let at = |previous: u64, position: u64| {
        vec![("Storied-Previous", previous.to_string()), ("Storied-Position", position.to_string())]
    };
    let mut kinds = vec![
        at(head, head + 1),
        at(head, head + 2),
        at(head + 1, head + 3),
        at(0, 1 << 62),
        at(head, u64::MAX),
        at(0, head + 1),
        at(0, 1),
        at(head - 1, head),
        at(head + 5, head + 1),
        vec![("Storied-Position", "-1".into())],
        vec![("Storied-Position", "0".into())],
        vec![(format, "2".into())],
    ];
    kinds.push([at(head, head + 1), vec![(store, uuid::Uuid::now_v7().to_string())]].concat());
    kinds.push([at(head, head + 1), vec![("Storied-Body", "omitted".into())]].concat());
    for kind in &kinds {
        // Payload of another event under the headers of this one, and an invalid payload.
        for body in [&other.payload, &Bytes::from_static(b"\xffnonsense")] {
            let (headers, body) = forged(genuine, kind, body);
            for subject in [genuine.subject.as_str(), "storied.head"] {
                client.publish_with_headers(subject.to_owned(), headers.clone(), body.clone()).await.unwrap();
            }
        }
    }
    // An exact replay.
    let headers = genuine.headers.clone().unwrap();
    let replayed = client.publish_with_headers(genuine.subject.clone(), headers, genuine.payload.clone());
    replayed.await.unwrap();
    client.publish(genuine.subject.clone(), "nonsense".into()).await.unwrap();
    client.flush().await.unwrap();
}

/// Waits until a consumer has acknowledged every message. Unacknowledged messages block later ones.
async fn acknowledged(server: &NatsServer, consumer: &str) {
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let stream = context.get_stream("STORIED_EVENTS").await.unwrap();
    let mut consumer: PullConsumer = stream.get_consumer(consumer).await.unwrap();
    let give_up = Instant::now() + PATIENCE;
    loop {
        let info = consumer.info().await.unwrap();
        if info.num_ack_pending == 0 && info.num_pending == 0 {
            break;
        }
        assert!(Instant::now() < give_up, "{info:?}");
        pause(50).await;
    }
}

async fn reaches(handles: &[ProjectionHandle], position: Position) {
    for handle in handles {
        handle.caught_up_to_within(position, PATIENCE).await.unwrap();
    }
}

/// F3: in memory, SQLite and PostgreSQL, over the feed and a durable consumer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_message_moves_a_read_model() {
    let postgres = PostgresServer::shared().await;
    for kind in NATS {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let url = postgres.create_database().await;
        let store: Arc<dyn EventStore> = Arc::new(PostgresStore::connect(&url).await.unwrap());
        let pg = PgPool::connect(&url).await.unwrap();
        sqlx::query("CREATE TABLE seen (name text, position bigint, payload bytea)")
            .execute(&pg)
            .await
            .unwrap();
        let dir = tempfile::TempDir::new().unwrap();
        let file = format!("sqlite://{}?mode=rwc", dir.path().join("model.db").display());
        let sqlite = SqlitePool::connect(&file).await.unwrap();
        sqlx::query("CREATE TABLE seen (name text, position integer, payload blob)")
            .execute(&sqlite)
            .await
            .unwrap();
        let feed = FeedOptions::new().idle_poll(Duration::from_millis(200));
        let bus = Arc::new(options(kind, &server).bus());
        let node = Node::start(store.clone(), Some(bus), feed, publishing()).await;
        let seen = Arc::<Mutex<Rows>>::default();
        let options = ProjectionOptions::new;
        let mut handles = vec![
            node.projection(Memory(seen.clone()), InMemory::new(), options()).await,
            node.projection(PgTable("feed"), PostgresReadModel::new(pg.clone()), options()).await,
            node.projection(SqliteTable("feed"), SqliteReadModel::new(sqlite.clone()), options()).await,
        ];
        if kind == Kind::JetStream {
            let durable = options().follow(FollowMode::Durable);
            handles.push(node.projection(PgTable("kept"), PostgresReadModel::new(pg.clone()), durable).await);
        }
        let client = async_nats::connect(server.url()).await.unwrap();
        let mut raw = client.subscribe("storied.events.>").await.unwrap();
        client.flush().await.unwrap();
        eventually("publishing", || node.publisher().state == PublisherState::Publishing).await;
        let head = write(&store, 0, 3).await;
        let (genuine, other) = (raw.next().await.unwrap(), raw.next().await.unwrap());
        reaches(&handles, head).await;
        for _ in 0..3 {
            let head = store.high_water_mark().await.unwrap();
            forge(&client, &genuine, &other, head.get()).await;
            // Real events take the forged positions.
            let last = write(&store, 1, 2).await;
            forge(&client, &genuine, &other, last.get()).await;
            reaches(&handles, last).await;
        }
        // Also without later real events.
        pause(300).await;
        let log: Rows = events(&store, Position::START)
            .await
            .iter()
            .map(|event| (event.position, event.payload.clone()))
            .collect();
        assert_eq!(*seen.lock().unwrap(), log, "{kind:?} in memory");
        assert_eq!(pg_rows(&pg, "feed").await, log, "{kind:?} PostgreSQL");
        assert_eq!(sqlite_rows(&sqlite, "feed").await, log, "{kind:?} SQLite");
        if kind == Kind::JetStream {
            assert_eq!(pg_rows(&pg, "kept").await, log, "durable");
            // Includes forged positions beyond the log.
            acknowledged(&server, "projection=2Fkept").await;
        }
        for handle in &handles {
            let status = handle.status();
            let name = handle.name();
            assert_eq!(status.position, log.last().unwrap().0, "{kind:?} {name}: {status:?}");
            assert_eq!(status.state, ProjectionState::Following, "{kind:?} {name}: {status:?}");
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

/// F3: without the bus, nothing wakes a node.
/// The feed still receives the appends of its own store, and a durable follower finds those of
/// another process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_message_the_store_is_read() {
    let mut server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("events.db");
    let store: Arc<dyn EventStore> = Arc::new(SqliteStore::open(&path).await.unwrap());
    // As in another process.
    let other: Arc<dyn EventStore> = Arc::new(SqliteStore::open(&path).await.unwrap());
    let file = format!("sqlite://{}?mode=rwc", dir.path().join("model.db").display());
    let model = SqlitePool::connect(&file).await.unwrap();
    sqlx::query("CREATE TABLE seen (name text, position integer, payload blob)")
        .execute(&model)
        .await
        .unwrap();
    let bus = || options(Kind::JetStream, &server).bus();
    let recording = Recording::start(&store, bus(), blind()).await;
    let node = Node::start(other.clone(), Some(Arc::new(bus())), blind(), publishing()).await;
    let durable = ProjectionOptions::new().follow(FollowMode::Durable);
    let kept = [node.projection(SqliteTable("kept"), SqliteReadModel::new(model), durable).await];
    let head = write(&store, 0, 3).await;
    recording.reaches("before", &store).await;
    reaches(&kept, head).await;
    server.kill();
    for _ in 0..3 {
        pause(500).await;
        let head = write(&store, 0, 3).await;
        recording.reaches("the feed", &store).await;
        reaches(&kept, head).await;
    }
    recording.node.kill();
    node.kill();
}

/// F23: number of transactions that a flood of messages causes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_heartbeats_and_hints_costs_few_queries() {
    let postgres = PostgresServer::shared().await;
    let server = NatsServer::start(support::NatsOptions::core()).await;
    let url = postgres.create_database().await;
    let store: Arc<dyn EventStore> = Arc::new(PostgresStore::connect(&url).await.unwrap());
    let recording = Recording::start(&store, options(Kind::Core, &server).bus(), FeedOptions::new()).await;
    let client = async_nats::connect(server.url()).await.unwrap();
    let mut heads = client.subscribe("storied.head").await.unwrap();
    client.flush().await.unwrap();
    write(&store, 0, 3).await;
    recording.reaches("before", &store).await;
    let headers = heads.next().await.unwrap().headers.unwrap();
    let watcher = PgPool::connect(&postgres.url()).await.unwrap();
    let count = async || -> i64 {
        // The statistics of a session arrive one second later.
        pause(1_200).await;
        let counted = sqlx::query_scalar("SELECT xact_commit FROM pg_stat_database WHERE datname = $1");
        let name = url.rsplit('/').next().unwrap();
        counted.bind(name).fetch_one(&watcher).await.unwrap()
    };
    for (subject, position) in [("storied.head", Some(1_u64 << 62)), ("storied.hint", None)] {
        let (before, start) = (count().await, Instant::now());
        let mut headers = headers.clone();
        if let Some(position) = position {
            headers.insert("Storied-Position", position.to_string());
        }
        // Sequentially: hints during a read cause one read afterwards.
        for _ in 0..3_000 {
            client.publish_with_headers(subject, headers.clone(), Bytes::new()).await.unwrap();
            pause(1).await;
        }
        client.flush().await.unwrap();
        write(&store, 0, 1).await;
        recording.reaches(subject, &store).await;
        let caused = count().await - before;
        let limit = 100 + 80 * (1 + start.elapsed().as_secs() as i64);
        assert!(caused < limit, "{subject}: {caused} transactions in {:?}", start.elapsed());
    }
    recording.node.stop(PATIENCE).await.unwrap();
}

/// F20: a node does not wait for a bus that it cannot publish to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealed_stream_delays_no_shutdown() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    let recording = Recording::start(&store, options(Kind::JetStream, &server).bus(), blind()).await;
    eventually("publishing", || recording.node.publisher().state == PublisherState::Publishing).await;
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let mut config = context.get_stream("STORIED_EVENTS").await.unwrap().cached_info().config.clone();
    config.sealed = true;
    context.update_stream(config).await.unwrap();
    write(&store, 0, 3).await;
    eventually("publishing fails", || {
        matches!(recording.node.publisher().state, PublisherState::Retrying { .. })
    })
    .await;
    recording.reaches("without the bus", &store).await;
    let start = Instant::now();
    // Publishing ends by itself, before the limit.
    recording.node.stop(Duration::from_secs(20)).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

/// A bus that refuses every publisher. With `silent`, it does not answer any more.
#[derive(Default)]
struct Refusing {
    attempts: AtomicUsize,
    silent: AtomicBool,
}

impl EventBus for Refusing {
    fn name(&self) -> &'static str {
        "refusing"
    }

    fn state(&self) -> BusState {
        BusState::Idle
    }

    fn publisher(&self, _: uuid::Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>> {
        Box::pin(async {
            self.attempts.fetch_add(1, Ordering::SeqCst);
            if self.silent.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            Err(BusError::Incompatible { reason: "test".into() })
        })
    }

    fn subscribe(&self, _: uuid::Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>> {
        Box::pin(async { Err(BusError::Incompatible { reason: "test".into() }) })
    }
}

/// F20: a stop starts no attempt that may take as long as the stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_does_not_ask_a_refusing_bus_again() {
    let bus = Arc::new(Refusing::default());
    let node = Node::start(store(), Some(bus.clone()), blind(), publishing()).await;
    // By then, the pause before the next attempt is longer than one second.
    eventually("some attempts", || bus.attempts.load(Ordering::SeqCst) >= 7).await;
    bus.silent.store(true, Ordering::SeqCst);
    let start = Instant::now();
    node.stop(Duration::from_secs(20)).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}
