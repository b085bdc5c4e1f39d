//! A read model in PostgreSQL that follows the bus: what it does while its event is read.

use std::sync::Arc;
use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use storied::projection::{ApplyError, FollowMode, PostgresReadModel};
use storied::testing::Node;
use storied::{
    AnyEvent, EventStore, MemoryStore, Position, Projection, ProjectionHandle, ProjectionOptions,
    PublisherState, RecordedEvent,
};
use tokio::time::Instant;

use crate::bus::fixtures::*;
use crate::support::{FaultyStore, PostgresServer, eventually_async};

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
        let insert = sqlx::query("INSERT INTO seen (position) VALUES ($1)");
        insert.bind(event.position.get() as i64).execute(tx).await?;
        Ok(())
    }
}

/// Waits for the status: another wait could query the store.
async fn reaches(handle: &ProjectionHandle, position: Position) {
    let mut status = handle.watch();
    let reached = status.wait_for(|status| status.position >= position);
    tokio::time::timeout(PATIENCE, reached).await.unwrap().unwrap();
}

/// The transaction begins while the event is read, for a follower of the feed and for a durable
/// consumer. The feed beside a durable consumer reads the end of the log at most ten times a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_begins_while_its_event_is_read() {
    let postgres = PostgresServer::shared().await;
    for (kind, bus, server) in nats().await {
        let log = MemoryStore::new();
        let store: Arc<dyn EventStore> = Arc::new(log.clone());
        let publisher = Node::start(store.clone(), Some(Arc::new(bus)), blind(), publishing()).await;
        eventually("publishing", || publisher.publisher().state == PublisherState::Publishing).await;
        // A store as of another process: only messages wake its readers.
        let reader = FaultyStore::apart(log);
        let apart: Arc<dyn EventStore> = Arc::new(reader.clone());
        let bus = Arc::new(options(kind, &server).bus());
        let node = Node::start(apart, Some(bus), blind(), publishing()).await;
        let url = postgres.create_database().await;
        let pool = PgPool::connect(&url).await.unwrap();
        let watcher = PgPool::connect(&postgres.url()).await.unwrap();
        sqlx::query("CREATE TABLE seen (id bigint GENERATED ALWAYS AS IDENTITY, position bigint)")
            .execute(&pool)
            .await
            .unwrap();
        let follow = if kind == Kind::JetStream { FollowMode::Durable } else { FollowMode::Feed };
        let model = PostgresReadModel::new(pool.clone());
        let handle = node.projection(Seen, model, ProjectionOptions::new().follow(follow)).await;
        let one = async || write(&store, 0, 1).await;
        let database = url.rsplit('/').next().unwrap();
        let open = async || -> bool {
            let open = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = $1 AND state = 'idle in transaction')";
            sqlx::query_scalar(open).bind(database).fetch_one(&watcher).await.unwrap()
        };
        // Another round on a busy machine, where the message may come too late for the kept connection.
        let give_up = Instant::now() + PATIENCE;
        let mut begun = false;
        while !begun {
            assert!(Instant::now() < give_up, "{kind:?}: no transaction began while the event was read");
            reaches(&handle, one().await).await;
            reader.hold_reads();
            let position = one().await;
            let late = Instant::now() + Duration::from_millis(300);
            while !begun && Instant::now() < late {
                begun = open().await;
            }
            reader.heal();
            reaches(&handle, position).await;
        }

        if kind == Kind::JetStream {
            // The feed subscribes to the bus in the background.
            eventually_async("the feed receives messages", async || {
                let position = one().await;
                reaches(&handle, position).await;
                pause(200).await;
                node.feed().position == Some(position)
            })
            .await;
            let (before, start) = (reader.marks_read(), Instant::now());
            for _ in 0..50 {
                reaches(&handle, one().await).await;
            }
            let (marks, time) = (reader.marks_read() - before, start.elapsed());
            let allowed = 3 + time.as_millis() as usize / 100;
            assert!(marks <= allowed, "{marks} queries of the high-water mark for 50 messages in {time:?}");
        }
        let seen: Vec<i64> =
            sqlx::query_scalar("SELECT position FROM seen ORDER BY id").fetch_all(&pool).await.unwrap();
        let all: Vec<i64> = (1..=seen.len() as i64).collect();
        assert_eq!(seen, all);
        node.stop(PATIENCE).await.unwrap();
        publisher.stop(PATIENCE).await.unwrap();
    }
}
