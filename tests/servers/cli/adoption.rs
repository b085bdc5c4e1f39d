//! Copies of a database that have the configuration of their original.
//!
//! A copy neither publishes nor joins the command bus until an operator adopts it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::Subscriber;
use futures_util::StreamExt;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, PgPool};
use storied::bus::{JetStreamOptions, NatsOptions as BusOptions};
use storied::command::{CommandBus, CommandBusStatus, NatsCommandOptions};
use storied::projection::{ApplyError, FollowMode, InMemoryIndex, Projection, ProjectionState, ReadModel};
use storied::store::{
    Adoption, Checkpoint, CheckpointKey, ProgressWrite, PublisherCheckpoint, StoredProjection,
};
use storied::{
    AnyEvent, EventStore, Position, PostgresOptions, PostgresReadModel, PostgresStore, ProjectionOptions,
    PublisherState, RecordedEvent, Runtime, SqliteStore, StoreError,
};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::cli::program::*;
use crate::support::{NatsOptions, NatsServer, PostgresServer};

/// Copies the PostgreSQL database at `url`, and returns the new URL.
///
/// No store may have the database open.
pub async fn copy_database(url: &str) -> String {
    let (server, name) = url.rsplit_once('/').unwrap();
    let copy = format!("{name}_copy_{}", Uuid::new_v4().simple());
    let mut connection = PgConnection::connect(&format!("{server}/postgres")).await.unwrap();
    // Connections of the store may take a moment to end.
    eventually("the copy is made", async || {
        connection.execute(AssertSqlSafe(format!("CREATE DATABASE {copy} TEMPLATE {name}"))).await.is_ok()
    })
    .await;
    format!("{server}/{copy}")
}

/// Starts a node as the program does, over any store.
async fn node(
    store: impl EventStore,
    server: &NatsServer,
    jetstream: bool,
    seen: &InMemoryIndex<Vec<u64>>,
) -> Runtime {
    let bus = if jetstream {
        BusOptions::jetstream(JetStreamOptions::new().max_bytes(10 << 20))
    } else {
        BusOptions::core()
    };
    let commands = NatsCommandOptions::new(BusOptions::core().url(server.url())).node(store.info().backend);
    Runtime::builder()
        .store(store)
        .bus(bus.url(server.url()).bus())
        .commands(CommandBus::nats(commands))
        .in_memory_index(seen)
        .start()
        .await
        .unwrap()
}

fn positions() -> InMemoryIndex<Vec<u64>> {
    InMemoryIndex::new("seen", |seen: &mut Vec<u64>, _: AnyEvent, event| {
        seen.push(event.position.get());
        Ok(())
    })
}

/// Returns the ids of the published events in order of arrival, up to one.
async fn published(subscriber: &mut Subscriber, upto: Uuid) -> Vec<Uuid> {
    let mut ids: Vec<Uuid> = Vec::new();
    while ids.last() != Some(&upto) {
        let message = timeout(PATIENCE, subscriber.next()).await.expect("the event is published").unwrap();
        let id = message.headers.as_ref().and_then(|headers| headers.get("Nats-Msg-Id"));
        ids.extend(id.and_then(|id| id.as_str().parse::<Uuid>().ok()));
    }
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_does_not_publish_for_its_original() {
    for jetstream in [false, true] {
        let options = if jetstream { NatsOptions::jetstream() } else { NatsOptions::default() };
        let server = NatsServer::start(options).await;
        let url = PostgresServer::shared().await.create_database().await;
        let open: Arc<dyn EventStore> = Arc::new(PostgresStore::connect(&url).await.unwrap());
        fill(&open).await;
        let original_id = open.info().id;
        drop(open);
        let staging = copy_database(&url).await;

        let client = async_nats::connect(server.url()).await.unwrap();
        let mut subscriber = client.subscribe("storied.events.>").await.unwrap();
        client.flush().await.unwrap();
        let seen = positions();
        let original = node(PostgresStore::connect(&url).await.unwrap(), &server, jetstream, &seen).await;
        let of_copy = positions();
        let copied = PostgresStore::connect(&staging).await.unwrap();
        assert_eq!(copied.info().id, original_id);
        assert!(!copied.info().adoption.is_adopted());
        let copy = node(copied, &server, jetstream, &of_copy).await;

        // The copy works for itself …
        for number in 0..10 {
            append(copy.store(), &format!("staging-{number}"), &[placed(number)]).await;
        }
        eventually("the copy follows its own log", async || of_copy.read(|seen| seen.len() == 15)).await;
        // … and does not publish its events.
        append(original.store(), "real", &[placed(1)]).await;
        let log = original.store().read_log(storied::ReadLog::after(Position::START)).await.unwrap().events;
        let ids: Vec<_> = log.iter().map(|event| event.id).collect();
        let published = published(&mut subscriber, *ids.last().unwrap()).await;
        assert!(published.iter().all(|id| ids.contains(id)), "jetstream: {jetstream}");
        eventually("the original follows its own log", async || seen.read(|seen| seen.len() == 6)).await;

        let status = copy.status().await;
        let PublisherState::Incompatible { reason } = &status.publisher.state else { panic!("{status:?}") };
        let database = |url: &str| format!("database {} (", url.rsplit('/').next().unwrap());
        for part in [&*database(&url), &database(&staging), "storied store adopt --moved", "--copy"] {
            assert!(reason.contains(part), "{part}: {reason}");
        }
        assert_eq!(status.commands, CommandBusStatus::Incompatible { reason: reason.clone() });
        assert!(matches!(status.store.adoption, Adoption::Unadopted { .. }));
        assert_eq!(
            original.status().await.commands,
            CommandBusStatus::Connected { nodes: Vec::new(), last_error: None }
        );
        let begun = Instant::now();
        copy.shutdown().await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5));
        original.shutdown().await.unwrap();
    }
}

/// A projection that only keeps a checkpoint.
struct Orders;

impl Projection for Orders {
    const NAME: &'static str = "orders";
    type Event = AnyEvent;
    type Transaction = PgConnection;

    async fn apply(
        &mut self,
        _: AnyEvent,
        _: &RecordedEvent,
        _: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_leaves_consumers_and_read_models_to_its_original() {
    let server = NatsServer::start(NatsOptions::jetstream()).await;
    let url = PostgresServer::shared().await.create_database().await;
    let open: Arc<dyn EventStore> = Arc::new(PostgresStore::connect(&url).await.unwrap());
    fill(&open).await;
    drop(open);
    let staging = copy_database(&url).await;
    // The original creates the stream.
    let original = node(PostgresStore::connect(&url).await.unwrap(), &server, true, &positions()).await;
    eventually("the original publishes", async || {
        original.status().await.publisher.state == PublisherState::Publishing
    })
    .await;
    let copy = async |model: &str| {
        let bus = BusOptions::jetstream(JetStreamOptions::new().max_bytes(10 << 20));
        let durable = ProjectionOptions::new().follow(FollowMode::Durable);
        Runtime::builder()
            .store(PostgresStore::connect(&staging).await.unwrap())
            .bus(bus.url(server.url()).bus())
            .projection_with(Orders, PostgresReadModel::new(PgPool::connect(model).await.unwrap()), durable)
            .start()
            .await
            .unwrap()
    };
    // In its own database, over the feed.
    let own = copy(&staging).await;
    append(own.store(), "staging", &[placed(1)]).await;
    let projection = own.projection("orders").unwrap();
    projection.caught_up_to_within(own.store().high_water_mark().await.unwrap(), PATIENCE).await.unwrap();
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let stream = context.get_stream("STORIED_EVENTS").await.unwrap();
    // Long enough to create a consumer.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let consumers: Vec<_> = stream.consumer_names().map(Result::unwrap).collect().await;
    assert!(consumers.is_empty(), "{consumers:?}");
    own.shutdown().await.unwrap();
    // In the database of the original.
    let other = copy(&url).await;
    let projection = other.projection("orders").unwrap();
    eventually("the read model is refused", async || projection.status().state == ProjectionState::Failed)
        .await;
    let error = projection.status().last_error.unwrap();
    assert!(error.contains("storied store adopt"), "{error}");
    other.shutdown().await.unwrap();
    original.shutdown().await.unwrap();
}

/// Checks a schema that was copied within a database.
///
/// For example: `pg_dump -n storied`, restored under another name.
///
/// It is a copy, and its tables are those of the original.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_copied_within_a_database_is_a_copy() {
    let url = PostgresServer::shared().await.create_database().await;
    let open = async |url: &str, schema: &str| {
        let store = PostgresOptions::new().url(url).schema(schema).connect().await.unwrap();
        Arc::new(store) as Arc<dyn EventStore>
    };
    let original = open(&url, "storied").await;
    fill(&original).await;
    drop(open(&url, "staging").await);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection
        .execute("UPDATE staging.meta AS c SET value = o.value FROM storied.meta AS o WHERE o.key = c.key")
        .await
        .unwrap();

    let copy = open(&url, "staging").await;
    assert_eq!(copy.info().id, original.info().id);
    let problem = copy.info().adoption.problem().unwrap();
    for part in ["schema storied (", "schema staging (", "storied store adopt"] {
        assert!(problem.contains(part), "{part}: {problem}");
    }
    let model = async |url: &str| PostgresReadModel::new(PgPool::connect(url).await.unwrap());
    let prepare = async |model: PostgresReadModel, store: &Arc<dyn EventStore>| model.prepare(store).await;
    prepare(model(&url).await, &original).await.unwrap();
    for model in [model(&url).await, model(&url).await.schema("staging").unwrap()] {
        let error = prepare(model, &copy).await.unwrap_err();
        assert!(matches!(error, StoreError::Incompatible { .. }), "{error}");
    }

    // A database that was copied as a whole has its own read models.
    connection.close().await.unwrap();
    drop((original, copy));
    let whole = copy_database(&url).await;
    let copy = open(&whole, "storied").await;
    assert!(!copy.info().adoption.is_adopted());
    prepare(model(&whole).await, &copy).await.unwrap();
    assert!(prepare(model(&url).await, &copy).await.is_err());

    let adopt = ["store", "adopt", "--copy", "--schema", "staging", "--database-url", &url];
    bare(&adopt).await.code(0);
    let (original, copy) = (open(&url, "storied").await, open(&url, "staging").await);
    assert!(original.info().adoption.is_adopted() && copy.info().adoption.is_adopted());
    assert_ne!(original.info().id, copy.info().id);
}

/// Checks both adoptions, and their effect on checkpoints, leases and the state of the publisher.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_adopts_a_copy() {
    for fixture in databases().await {
        let open = fixture.open().await;
        fill(&open).await;
        let id = open.info().id;
        let key = CheckpointKey::new("orders");
        let none = Checkpoint::default();
        let at = Checkpoint { position: Position::new(3), ..none };
        let orders = ProgressWrite::Checkpoint { key: key.clone(), from: none, to: at };
        let stored = StoredProjection { live_version: 1, ..StoredProjection::default() };
        let versions = ProgressWrite::Projection {
            name: "orders".into(),
            from: StoredProjection::default(),
            to: stored,
        };
        open.write_progress(vec![orders, versions]).await.unwrap();
        let none = PublisherCheckpoint::default();
        let published = PublisherCheckpoint { position: Position::new(3), ..none };
        assert!(open.save_publisher_checkpoint(none, published).await.unwrap());
        open.acquire_lease("projection:orders", Uuid::now_v7(), Duration::from_secs(3_600))
            .await
            .unwrap()
            .unwrap();
        // The original needs no adoption.
        assert!(open.info().adoption.is_adopted());
        drop(open);
        fixture.run(&["store", "adopt"]).await.code(2);
        fixture.run(&["store", "adopt", "--copy", "--moved"]).await.code(2);
        fixture.run(&["store", "adopt"]).await.code(2).complains(&["--moved", "--copy"]);
        fixture.run(&["store", "adopt", "--moved", "--copy"]).await.code(2).complains(&["cannot be used"]);
        fixture.run(&["store", "adopt", "--copy"]).await.code(4).complains(&["--force"]);
        fixture.run(&["store", "adopt", "--moved"]).await.code(0).shows(&[&id.to_string()]);

        let copies = [fixture.copy().await, fixture.copy().await];
        let [moved, copy] = &copies;
        assert!(!moved.open().await.info().adoption.is_adopted(), "{}", fixture.kind);
        moved.run(&["status"]).await.code(0).shows(&["storied store adopt --moved"]);
        assert_eq!(moved.run(&["status", "--json"]).await.json()["adopted"], false);
        moved.run(&["store", "adopt", "--moved"]).await.code(0);
        let store = moved.open().await;
        assert!(store.info().adoption.is_adopted() && store.info().id == id, "{}", fixture.kind);
        assert_eq!(store.publisher_checkpoint().await.unwrap(), published);

        let json = copy.run(&["store", "adopt", "--copy", "--json"]).await.code(0).json();
        let store = copy.open().await;
        assert!(store.info().adoption.is_adopted() && store.info().id != id, "{}", fixture.kind);
        assert_eq!(json["store_id"], store.info().id.to_string());
        assert_eq!(json["was"], id.to_string());
        assert_eq!(store.publisher_checkpoint().await.unwrap(), PublisherCheckpoint::default());
        assert_eq!(store.checkpoint(&key).await.unwrap(), at);
        assert_eq!(store.projection("orders").await.unwrap().live_version, 1);
        let leases = store.leases().await.unwrap();
        assert_eq!((leases.len(), leases[0].live, leases[0].lease.epoch), (1, false, 1));
        // A copy that looks like its original, as after pg_basebackup.
        drop(store);
        copy.run(&["store", "adopt", "--copy", "--force"]).await.code(0);
        assert_ne!(copy.open().await.info().id.to_string(), json["store_id"].as_str().unwrap());
        assert!(fixture.open().await.info().adoption.is_adopted());
    }
}

/// Checks that a renamed file is the same store.
///
/// A copy is not, even under the name of the original.
#[tokio::test]
async fn a_file_that_was_renamed_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let [shop, renamed, copy] = ["shop.db", "renamed.db", "staging.db"].map(|name| dir.path().join(name));
    let adopted = async |path: &PathBuf| {
        let adoption = SqliteStore::open(path).await.unwrap().info().adoption.clone();
        let log = path.with_extension("db-wal");
        // Connections that close at the same moment leave the WAL file in place. A connection that
        // closes as the last one removes it.
        eventually("the file is closed", async || {
            let mut connection = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
            let _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").await;
            connection.close().await.unwrap();
            !log.exists()
        })
        .await;
        adoption
    };
    assert_eq!(adopted(&shop).await, Adoption::Adopted);
    fs::rename(&shop, &renamed).unwrap();
    assert_eq!(adopted(&renamed).await, Adoption::Adopted);
    fs::copy(&renamed, &copy).unwrap();
    let problem = adopted(&copy).await.problem().unwrap();
    for part in ["shop.db", "staging.db", "storied store adopt"] {
        assert!(problem.contains(part), "{part}: {problem}");
    }
    fs::rename(&copy, &shop).unwrap();
    assert!(!adopted(&shop).await.is_adopted());
    assert_eq!(adopted(&renamed).await, Adoption::Adopted);
}
