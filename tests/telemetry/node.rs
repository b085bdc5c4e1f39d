//! The metrics of a node: PostgreSQL, JetStream, a projection, and a competing node.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sqlx::postgres::PgPoolOptions;
use storied::command::{CommandBus, NatsCommandOptions};
use storied::projection::{ApplyError, FailurePolicy, InMemory, SnapshotState};
use storied::{
    NatsOptions, PostgresOptions, PostgresReadModel, PostgresStore, ProjectionOptions, Runtime,
    SnapshotRevision, StoreError,
};

use crate::meters::*;
use crate::support::{self, NatsServer, PostgresServer};

async fn store(url: &str) -> Result<(PostgresStore, PostgresReadModel), StoreError> {
    let pool = PgPoolOptions::new().max_connections(5).connect(url).await.unwrap();
    let store = PostgresOptions::new().pool(pool.clone()).connect().await?;
    Ok((store, PostgresReadModel::new(pool)))
}

/// Fails to encode its first snapshot.
#[derive(Default)]
struct Fickle(AtomicU64);

impl SnapshotState for Fickle {
    fn save(&self) -> Result<Vec<u8>, ApplyError> {
        if self.0.fetch_add(1, Ordering::SeqCst) == 0 { Err("not now".into()) } else { Ok(Vec::new()) }
    }

    fn load(&self, _: &[u8]) -> Result<(), ApplyError> {
        Ok(())
    }
}

/// Runs through all metrics of a node.
pub async fn scenario(meters: &Meters) {
    let url = PostgresServer::shared().await.create_database().await;
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let ((log, read_model), (other_log, _)) = (store(&url).await.unwrap(), store(&url).await.unwrap());
    let once = ProjectionOptions::new().max_attempts(1).on_failure(FailurePolicy::Park);
    let node = Runtime::builder()
        .store(log)
        .bus(log_stream(&server).bus())
        .publisher(publishing())
        .commands(CommandBus::nats(NatsCommandOptions::new(quick(NatsOptions::core().url(server.url())))))
        .aggregate::<Counter>()
        .projection_with(sums("sums"), read_model, once.clone())
        .projection_with(
            sums("memory"),
            InMemory::new().snapshot_every(2, SnapshotRevision(1), Arc::new(Fickle::default())),
            once.batch_size(1),
        )
        .telemetry(meters.telemetry())
        .start()
        .await
        .unwrap();
    // The metrics of this node go nowhere.
    let other = Runtime::builder().store(other_log).aggregate::<Counter>().start().await.unwrap();

    let of = [("storied.command.name", "counter")];
    node.execute::<Counter>("a", Add(1)).await.unwrap();
    node.execute::<Counter>("b", Add(13)).await.unwrap();
    node.execute::<Counter>("a", AddUpTo { add: 1, limit: 0 }).await.unwrap_err();
    assert_eq!(meters.count("storied.command.duration", &of), 3);
    assert_eq!(meters.count("storied.command.duration", &[of[0], ("error.type", "rejected")]), 1);
    assert_eq!(meters.value("storied.command.retries", &of), None);
    // The other node appends first.
    other.execute::<Counter>("a", Add(2)).await.unwrap();
    assert_eq!(node.execute::<Counter>("a", Add(3)).await.unwrap().reply, 6);
    assert_eq!(meters.sum("storied.command.retries", &of), 1.0);
    for (outcome, count) in [("committed", 3.0), ("conflict", 1.0), ("failed", 0.0)] {
        assert_eq!(meters.sum("storied.append.count", &[("storied.outcome", outcome)]), count, "{outcome}");
    }
    assert_eq!(meters.sum("storied.append.events", &[]), 3.0);
    assert_eq!(meters.sum("storied.append.queue", &[]), 0.0);
    // One transaction each, because they came one by one; the conflict counts too.
    assert_eq!(meters.count("storied.append.duration", &[]), 4);
    assert_eq!(meters.value("storied.append.batch.size", &[]), Some((4.0, 4)));
    assert_eq!(meters.sum("storied.aggregate.live", &of), 2.0);
    meters.until("storied.command.active", &of, |active| active == 0.0).await;

    let stream = [("messaging.system", "nats"), ("messaging.destination.name", "STORIED_EVENTS")];
    let publish = [stream[0], stream[1], ("messaging.operation.name", "publish")];
    meters.until("messaging.client.sent.messages", &publish, |sent| sent == 4.0).await;
    assert!((1..=4).contains(&meters.count("messaging.client.operation.duration", &publish)));
    meters.until("storied.nats.stream.messages", &stream, |messages| messages == 4.0).await;
    assert!(meters.sum("storied.nats.stream.size", &stream) > 400.0);
    meters.until("storied.publisher.lag", &[("storied.bus", "nats-jetstream")], |lag| lag == 0.0).await;

    let sums = [("storied.projection", "sums")];
    meters.until("storied.projection.events", &sums, |events| events == 3.0).await;
    meters.until("storied.projection.lag", &sums, |lag| lag == 0.0).await;
    assert_eq!(meters.sum("storied.projection.lag.time", &sums), 0.0);
    assert_eq!(meters.sum("storied.projection.parked", &sums), 1.0);
    assert!(meters.count("storied.projection.duration", &sums) >= 1);
    let memory = [("storied.projection", "memory"), ("error.type", "not_taken")];
    meters.until("storied.projection.snapshots", &memory, |failed| failed == 1.0).await;
    meters.until("storied.projection.snapshots", &memory[..1], |all| all == 2.0).await;
    // On a busy machine the bus may be late.
    let before = node.status().await.feed.repairs as f64;
    let repairs = meters.sum("storied.feed.repairs", &[]);
    assert!((before..=node.status().await.feed.repairs as f64).contains(&repairs), "{before} {repairs}");
    for connection in ["events", "commands"] {
        let of = [("storied.connection", connection)];
        assert_eq!(meters.sum("storied.nats.connection.attempts", &of), 1.0, "{connection}");
        assert_eq!(meters.count("storied.nats.connection.start.duration", &of), 1, "{connection}");
        assert_eq!(meters.value("storied.nats.connection.errors", &of), None, "{connection}");
    }

    let leases = |kind, change| {
        let of = [("storied.lease.kind", kind), ("storied.lease.change", change)];
        meters.sum("storied.lease.changes", &of)
    };
    for kind in ["publisher", "projection", "scheduler"] {
        meters.until("storied.lease.changes", &[("storied.lease.kind", kind)], |all| all >= 1.0).await;
        assert_eq!((leases(kind, "acquired"), leases(kind, "released")), (1.0, 0.0), "{kind}");
    }
    node.shutdown().await.unwrap();
    for kind in ["publisher", "projection", "scheduler"] {
        assert_eq!((leases(kind, "released"), leases(kind, "lost")), (1.0, 0.0), "{kind}");
    }
    let commands = [("storied.connection", "commands")];
    assert_eq!(meters.count("storied.nats.connection.close.duration", &commands), 1);
    other.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_the_work_of_a_node() {
    let _turn = TURN.read().await;
    scenario(&Meters::new()).await;
}

/// The store is unreachable for longer than a lease lasts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_a_lost_lease_and_appends_that_fail() {
    let _turn = TURN.read().await;
    let meters = Meters::new();
    let mut server = PostgresServer::start().await;
    let (log, read_model) = store(&server.create_database().await).await.unwrap();
    let node = Runtime::builder()
        .store(log)
        .aggregate::<Counter>()
        .projection_with(sums("sums"), read_model, ProjectionOptions::new().lease(Duration::from_millis(500)))
        .telemetry(meters.telemetry())
        .start()
        .await
        .unwrap();
    let position = node.execute::<Counter>("a", Add(1)).await.unwrap().position;
    node.projection("sums").unwrap().caught_up_to_within(position, PATIENCE).await.unwrap();
    // On a busy machine the lease may be lost earlier.
    let lost = [("storied.lease.kind", "projection"), ("storied.lease.change", "lost")];
    let before = meters.sum("storied.lease.changes", &lost);
    server.kill();
    node.execute::<Counter>("a", Add(1)).await.unwrap_err();
    meters.until("storied.lease.changes", &lost, |lost| lost > before).await;
    meters.until("storied.append.count", &[("storied.outcome", "failed")], |failed| failed >= 1.0).await;
    assert!(
        meters
            .points()
            .iter()
            .any(|point| point.name == "storied.append.duration"
                && point.attributes.contains_key("error.type")),
        "{:#?}",
        meters.points()
    );
    let acquired = [("storied.lease.kind", "projection"), ("storied.lease.change", "acquired")];
    let before = meters.sum("storied.lease.changes", &acquired);
    server.restart().await;
    meters.until("storied.lease.changes", &acquired, |acquired| acquired > before).await;
    node.shutdown().await.unwrap();
}

/// Checks that observed metrics keep neither a node nor its store alive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_node_reports_nothing() {
    let _turn = TURN.read().await;
    let meters = Meters::new();
    let builder = Runtime::builder().store(storied::MemoryStore::new()).aggregate::<Counter>();
    let node = builder.telemetry(meters.telemetry()).start().await.unwrap();
    node.execute::<Counter>("a", Add(1)).await.unwrap();
    assert_eq!(meters.sum("storied.aggregate.live", &[]), 1.0);
    node.shutdown().await.unwrap();
    assert_eq!(meters.value("storied.aggregate.live", &[]), None);
}
