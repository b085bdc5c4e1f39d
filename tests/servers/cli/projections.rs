//! `projection …` and `parked …`, with and without running nodes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::sqlite::{SqliteConnection, SqlitePool};
use sqlx::{AssertSqlSafe, Executor};
use storied::projection::{
    ApplyError, BuildTarget, FailurePolicy, PerTarget, PostgresReadModel, SqliteReadModel, TargetUnavailable,
};
use storied::testing::Node;
use storied::{
    EventStore, FeedOptions, Projection, ProjectionHandle, ProjectionOptions, PublisherOptions, RecordedEvent,
};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;
use uuid::Uuid;

use crate::cli::program::*;

/// Faults of the projection.
///
/// It fails on 13 pence, fails to reset, or makes no progress in a rebuild.
#[derive(Clone, Default)]
struct Faults {
    thirteen: Arc<AtomicBool>,
    reset: Arc<AtomicBool>,
    slow: Arc<AtomicBool>,
}

/// Stores the positions of its events, in a table for all versions.
struct Seen<T> {
    version: u64,
    faults: Faults,
    transaction: std::marker::PhantomData<fn(T)>,
}

macro_rules! seen_in {
    ($connection:ty) => {
        impl Projection for Seen<$connection> {
            const NAME: &'static str = "seen";
            type Event = OrderEvent;
            type Transaction = $connection;

            async fn apply(
                &mut self,
                event: OrderEvent,
                recorded: &RecordedEvent,
                tx: &mut $connection,
            ) -> Result<(), ApplyError> {
                if self.version > 0 && recorded.position.get() > 3 && self.faults.slow.load(Ordering::SeqCst)
                {
                    return Err(TargetUnavailable::new("not yet").into());
                }
                if let OrderEvent::Placed { pence: 13, .. } = event
                    && self.faults.thirteen.load(Ordering::SeqCst)
                {
                    return Err("thirteen is\nan unlucky \x1b[31mnumber".into());
                }
                let sql = format!("INSERT INTO seen VALUES ({}, {})", self.version, recorded.position);
                tx.execute(AssertSqlSafe(sql)).await?;
                Ok(())
            }

            async fn reset(&mut self, tx: &mut $connection) -> Result<(), ApplyError> {
                if self.faults.reset.load(Ordering::SeqCst) {
                    return Err("there is no way back".into());
                }
                let sql = format!("DELETE FROM seen WHERE version = {}", self.version);
                tx.execute(AssertSqlSafe(sql)).await?;
                Ok(())
            }
        }
    };
}
seen_in!(SqliteConnection);
seen_in!(PgConnection);

fn make<T>(faults: &Faults) -> impl Fn(BuildTarget) -> Seen<T> + Send + Sync + 'static {
    let faults = faults.clone();
    move |target| Seen {
        version: target.version,
        faults: faults.clone(),
        transaction: std::marker::PhantomData,
    }
}

/// Starts a node with the projection; the read model is in the database of the store.
async fn start(
    fixture: &Fixture,
    store: &Arc<dyn EventStore>,
    faults: &Faults,
    partitions: u16,
) -> (Node, ProjectionHandle) {
    let node = Node::start(store.clone(), None, FeedOptions::new(), PublisherOptions::new()).await;
    let options = ProjectionOptions::new()
        .on_failure(FailurePolicy::Park)
        .max_attempts(2)
        .initial_backoff(Duration::from_millis(5))
        .max_backoff(Duration::from_millis(50))
        .lease(Duration::from_secs(2));
    const TABLE: &str = "CREATE TABLE IF NOT EXISTS seen (version bigint, position bigint)";
    let handle = match fixture.url.strip_prefix("sqlite:") {
        Some(path) => {
            let pool = SqlitePool::connect(path).await.unwrap();
            pool.execute(TABLE).await.unwrap();
            let model = SqliteReadModel::new(pool);
            match partitions {
                0 => node.projection(PerTarget::new(make::<SqliteConnection>(faults)), model, options).await,
                _ => {
                    node.projection(
                        PerTarget::new(make::<SqliteConnection>(faults)),
                        model,
                        options.partitions(partitions),
                    )
                    .await
                }
            }
        }
        None => {
            let pool = PgPool::connect(&fixture.url).await.unwrap();
            pool.execute(TABLE).await.unwrap();
            let model = PostgresReadModel::new(pool);
            match partitions {
                0 => node.projection(PerTarget::new(make::<PgConnection>(faults)), model, options).await,
                _ => {
                    node.projection(
                        PerTarget::new(make::<PgConnection>(faults)),
                        model,
                        options.partitions(partitions),
                    )
                    .await
                }
            }
        }
    };
    // A projection that does not fit fails until an operator resets it.
    eventually("it is live", async || handle.wait_until_caught_up(PATIENCE).await.is_ok()).await;
    (node, handle)
}

/// Returns the stored positions, with repetitions.
async fn seen(fixture: &Fixture, version: i64) -> Vec<i64> {
    const SQL: &str = "SELECT position FROM seen WHERE version = $1 ORDER BY position";
    match fixture.url.strip_prefix("sqlite:") {
        Some(path) => {
            let pool = SqlitePool::connect(path).await.unwrap();
            sqlx::query_scalar(SQL).bind(version).fetch_all(&pool).await.unwrap()
        }
        None => {
            let pool = PgPool::connect(&fixture.url).await.unwrap();
            sqlx::query_scalar(SQL).bind(version).fetch_all(&pool).await.unwrap()
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_projection_is_seen_paused_and_resumed() {
    for (fixture, store) in filled().await {
        fixture.run(&["projection", "list"]).await.code(0).shows(&["no projection has a checkpoint here"]);
        fixture
            .run(&["projection", "pause", "seen"])
            .await
            .code(4)
            .complains(&["no projection seen", "--force"]);
        let (node, handle) = start(&fixture, &store, &Faults::default(), 0).await;

        fixture
            .run(&["projection", "list"])
            .await
            .code(0)
            .shows(&["PROJECTION  STATE  POSITION  LAG", "seen        owned  5         0"]);
        let list = fixture.run(&["projection", "list", "--json"]).await.code(0).json();
        let seen = &list["projections"][0];
        assert_eq!(
            (&seen["name"], &seen["lag"], &seen["state"]),
            (&json!("seen"), &json!(0), &json!("owned"))
        );
        assert_eq!(seen["parts"][0]["owner"], json!(node.id()));
        fixture.run(&["status"]).await.code(0).shows(&["seen        owned", &node.id().to_string()]);

        fixture
            .run(&["projection", "pause", "seen"])
            .await
            .code(0)
            .shows(&["seen is paused; its nodes follow within 1 s"]);
        eventually("it stands still", async || {
            handle.status().state == storied::projection::ProjectionState::Paused
        })
        .await;
        append(&store, "1", &[placed(4)]).await;
        fixture.run(&["projection", "list"]).await.code(0).shows(&["seen        paused  5         1"]);
        let json = fixture.run(&["projection", "resume", "seen", "--json"]).await.code(0).json();
        assert_eq!(json, json!({ "projection": "seen", "paused": false, "owned_parts": 1 }));
        handle.wait_until_caught_up(PATIENCE).await.unwrap();

        node.stop(PATIENCE).await.unwrap();
        fixture.run(&["projection", "list"]).await.code(0).shows(&["seen        no node"]);
        fixture.run(&["projection", "pause", "seen"]).await.code(0).shows(&["no live node owns it"]);
        fixture.run(&["projection", "pause", "in_memory", "--force"]).await.code(0);
        for name in ["", " seen", "a\nb", &"x".repeat(300)] {
            fixture.run(&["projection", "pause", name, "--force"]).await.code(2).complains(&["the name"]);
        }
        fixture.run(&["projection", "list"]).await.code(0).shows(&["in_memory"]);
        fixture.run(&["projection", "reset", "in_memory"]).await.code(4).complains(&["--read-model-url"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_executes_a_requested_reset() {
    for partitions in [0, 3] {
        for (fixture, store) in filled().await {
            let faults = Faults::default();
            let (node, handle) = start(&fixture, &store, &faults, partitions).await;
            let (other, _) = start(&fixture, &store, &faults, partitions).await;
            // The projection applies removed positions again, once.
            fixture.run_sql("INSERT INTO seen VALUES (0, 99)").await;
            fixture
                .run(&["projection", "reset", "seen"])
                .await
                .code(0)
                .shows(&["seen was reset, and has caught up"]);
            assert_eq!(seen(&fixture, 0).await, [1, 2, 3, 4, 5]);
            let json = fixture.run(&["projection", "reset", "seen", "--json"]).await.code(0).json();
            assert_eq!((&json["taken"], &json["done"]), (&json!(true), &json!(true)));

            // A paused projection stays paused.
            handle.pause().await.unwrap();
            fixture.run(&["projection", "reset", "seen"]).await.code(0).shows(&["starts when it is resumed"]);
            assert_eq!(seen(&fixture, 0).await, [] as [i64; 0]);
            handle.resume().await.unwrap();
            handle.wait_until_caught_up(PATIENCE).await.unwrap();

            // If the code of the projection refuses, nothing changes.
            faults.reset.store(true, Ordering::SeqCst);
            fixture
                .run(&["projection", "reset", "seen"])
                .await
                .code(1)
                .complains(&["a node refused", "there is no way back"]);
            assert_eq!(seen(&fixture, 0).await, [1, 2, 3, 4, 5]);
            let list = fixture.run(&["projection", "list", "--json"]).await.code(0).json();
            assert_eq!(list["projections"][0]["requests"], json!([]));
            node.stop(PATIENCE).await.unwrap();
            other.stop(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_node_a_request_stays_pending() {
    for (fixture, store) in filled().await {
        let faults = Faults::default();
        let (node, _) = start(&fixture, &store, &faults, 0).await;
        node.stop(PATIENCE).await.unwrap();
        fixture.run_sql("INSERT INTO seen VALUES (0, 99)").await;
        let reset = ["projection", "reset", "seen", "--take-within", "1"];
        fixture
            .run(&reset)
            .await
            .code(5)
            .complains(&["no live node runs the projection", "storied projection withdraw seen"]);
        fixture
            .run(&["projection", "list"])
            .await
            .code(0)
            .shows(&["seen: reset is requested; no node has taken it yet"]);
        let run = fixture.run(&[&reset[..], &["--json"]].concat()).await.code(5);
        assert!(run.err.starts_with("{\"error\":{\"kind\":\"pending\""), "{}", run.err);

        // After a withdrawal, a starting node does nothing.
        fixture.run(&["projection", "withdraw", "seen"]).await.code(0).shows(&["withdrew the reset of seen"]);
        fixture.run(&["projection", "withdraw", "seen"]).await.code(4);
        let (node, handle) = start(&fixture, &store, &faults, 0).await;
        append(&store, "1", &[placed(4)]).await;
        handle.wait_until_caught_up(PATIENCE).await.unwrap();
        assert_eq!(seen(&fixture, 0).await, [1, 2, 3, 4, 5, 6, 99]);
        node.stop(PATIENCE).await.unwrap();

        // Without a withdrawal, it resets.
        fixture.run(&reset).await.code(5);
        let (node, _) = start(&fixture, &store, &faults, 0).await;
        eventually("the reset", async || seen(&fixture, 0).await == [1, 2, 3, 4, 5, 6]).await;
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Another node holds up the projection: the request waits until it has finished.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_during_another_change_stays_pending() {
    let (fixture, store) = filled().await.remove(0);
    let faults = Faults::default();
    let (node, _) = start(&fixture, &store, &faults, 0).await;
    let others = store.acquire_lease("order/seen", Uuid::new_v4(), 2 * PATIENCE).await.unwrap().unwrap();
    let reset = ["projection", "reset", "seen", "--take-within", "1"];
    fixture.run(&reset).await.code(5).complains(&["withdraw it with `storied projection withdraw seen`"]);
    let list = fixture.run(&["projection", "list"]).await.code(0);
    list.shows(&["seen: reset is requested; no node has taken it yet"]);
    store.release_lease(&others).await.unwrap();
    let done = async || !fixture.run(&["projection", "list"]).await.code(0).out.contains("is requested");
    eventually("the reset", done).await;
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_is_watched_until_it_is_live() {
    for partitions in [0, 2] {
        for (fixture, store) in filled().await {
            let faults = Faults::default();
            let (node, handle) = start(&fixture, &store, &faults, partitions).await;
            faults.slow.store(true, Ordering::SeqCst);
            let detached = fixture.run(&["projection", "rebuild", "seen", "--detach"]).await.code(0);
            detached.shows(&["a node has taken the rebuild of seen"]);
            fixture.run(&["projection", "list"]).await.code(0).shows(&["seen: version 1 is being built"]);
            // A repeated request watches the running rebuild.
            let mut child = fixture.command(&["projection", "rebuild", "seen"]).spawn().unwrap();
            let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
            let line = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
            let of = 5 * partitions.max(1);
            assert!(line.starts_with("seen [") && line.contains(&format!("of {of} positions")), "{line}");
            faults.slow.store(false, Ordering::SeqCst);
            let run = Run::of(timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap());
            run.code(0).shows(&["seen was rebuilt in", "version 1 is live"]);
            handle.wait_until_caught_up(PATIENCE).await.unwrap();
            assert_eq!(seen(&fixture, 1).await, [1, 2, 3, 4, 5]);
            assert_eq!(seen(&fixture, 0).await, [1, 2, 3, 4, 5]);
            let json = fixture.run(&["projection", "rebuild", "seen", "--json"]).await.code(0).json();
            assert_eq!((&json["version"], &json["done"]), (&json!(2), &json!(true)));

            faults.slow.store(true, Ordering::SeqCst);
            fixture.run(&["projection", "rebuild", "seen", "--detach"]).await.code(0);
            fixture.run(&["projection", "list"]).await.code(0).shows(&["seen: version 3 is being built"]);
            // The watching tool reports the cancellation.
            let mut child = fixture.command(&["projection", "rebuild", "seen"]).spawn().unwrap();
            let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
            timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
            let cancelled = fixture.run(&["projection", "cancel-rebuild", "seen"]).await.code(0);
            let mut last = String::new();
            while let Some(line) = timeout(PATIENCE / 2, lines.next_line()).await.unwrap().unwrap() {
                last = line;
            }
            assert_eq!(last, "error: the rebuild of seen was cancelled; version 2 stays live");
            Run::of(child.wait_with_output().await.unwrap()).code(1);
            cancelled.shows(&["the rebuild of seen is cancelled"]);
            let list = fixture.run(&["projection", "list"]).await.code(0);
            assert!(!list.out.contains("is being built"), "{}", list.out);
            // The live version stays live. A second cancellation has nothing to do, and is no
            // error.
            let json = fixture.run(&["projection", "cancel-rebuild", "seen", "--json"]).await.code(0).json();
            assert_eq!(json["done"], json!(true));
            assert_eq!(seen(&fixture, 2).await, [1, 2, 3, 4, 5]);
            node.stop(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parked_events_are_shown_retried_and_discarded() {
    for partitions in [0, 3] {
        for (fixture, store) in filled().await {
            let faults = Faults::default();
            faults.thirteen.store(true, Ordering::SeqCst);
            let (node, handle) = start(&fixture, &store, &faults, partitions).await;
            fixture.run(&["parked", "list"]).await.code(0).shows(&["no parked events"]);
            for stream in ["1", "2", "3"] {
                append(&store, stream, &[placed(13)]).await;
            }
            handle.wait_until_caught_up(PATIENCE).await.unwrap();

            let run = fixture
                .run(&["parked", "list"])
                .await
                .code(0)
                .shows(&["seen        6         order.placed  order/1 v3"]);
            // Foreign text does not control the terminal.
            assert!(!run.out.contains('\x1b') && run.out.lines().count() == 4, "{}", run.out);
            let list = fixture.run(&["parked", "list", "seen", "--json"]).await.code(0).json();
            let positions: Vec<_> =
                list["parked"].as_array().unwrap().iter().map(|event| event["position"].clone()).collect();
            assert_eq!(positions, [json!(6), json!(7), json!(8)]);
            fixture.run(&["projection", "list"]).await.code(0).shows(&["PARKED"]);
            fixture.run(&["parked", "show", "seen", "6"]).await.code(0).shows(&[
                "unlucky",
                "\"pence\":13",
                "after 2 attempts",
            ]);
            let shown = fixture.run(&["parked", "show", "seen", "7", "--json"]).await.code(0).json();
            assert_eq!(shown["event"]["payload"]["pence"], 13);
            for wrong in [["seen", "5"], ["unseen", "6"]] {
                for command in ["show", "retry", "discard", "withdraw"] {
                    fixture.run(&[&["parked", command], &wrong[..]].concat()).await.code(4);
                }
            }

            fixture
                .run(&["parked", "retry", "seen", "6"])
                .await
                .code(1)
                .complains(&["a node refused the retry of 6", "unlucky"]);
            faults.thirteen.store(false, Ordering::SeqCst);
            fixture
                .run(&["parked", "retry", "seen", "6"])
                .await
                .code(0)
                .shows(&["seen has applied the event at position 6"]);
            let json = fixture.run(&["parked", "retry", "seen", "8", "--json"]).await.code(0).json();
            assert_eq!(json, json!({ "projection": "seen", "position": 8, "applied": true }));
            assert_eq!(seen(&fixture, 0).await, [1, 2, 3, 4, 5, 6, 8]);
            fixture.run(&["parked", "discard", "seen", "7"]).await.code(0).shows(&["has discarded"]);
            fixture.run(&["parked", "discard", "seen", "7"]).await.code(4);
            fixture.run(&["parked", "list"]).await.code(0).shows(&["no parked events"]);
            assert_eq!(seen(&fixture, 0).await, [1, 2, 3, 4, 5, 6, 8]);

            // Without a node the retry stands, and can be withdrawn.
            faults.thirteen.store(true, Ordering::SeqCst);
            append(&store, "1", &[placed(13)]).await;
            handle.wait_until_caught_up(PATIENCE).await.unwrap();
            node.stop(PATIENCE).await.unwrap();
            fixture
                .run(&["parked", "retry", "seen", "9", "--take-within", "0"])
                .await
                .code(5)
                .complains(&["parked withdraw seen 9"]);
            fixture
                .run(&["parked", "withdraw", "seen", "9"])
                .await
                .code(0)
                .shows(&["withdrew the retry of 9"]);
            fixture.run(&["parked", "discard", "seen", "9", "--json"]).await.code(0);
        }
    }
}

/// Checks that a read model with another number of partitions is unused until it is reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_makes_fit_what_does_not() {
    for (fixture, store) in filled().await {
        let faults = Faults::default();
        let (node, _) = start(&fixture, &store, &faults, 2).await;
        node.stop(PATIENCE).await.unwrap();
        let starting = start(&fixture, &store, &faults, 3);
        let resetting = async {
            fixture.run(&["projection", "reset", "seen", "--take-within", "60", "--detach"]).await.code(0);
        };
        let ((node, _), ()) = tokio::join!(starting, resetting);
        assert_eq!(seen(&fixture, 0).await, [1, 2, 3, 4, 5]);
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Uses a separate database for the read model.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_read_model_may_be_elsewhere() {
    let (mut filled, other) = (filled().await, databases().await);
    let (fixture, store) = filled.remove(1);
    let other = &other[1];
    let (node, _) = start(other, &store, &Faults::default(), 0).await;
    let list = ["projection", "list"];
    fixture.run(&list).await.code(0).shows(&["no projection has a checkpoint here"]);
    fixture
        .run(&[&list[..], &["--read-model-url", &other.url]].concat())
        .await
        .code(0)
        .shows(&["seen        owned  5"]);
    fixture.run(&["projection", "reset", "seen", "--read-model-url", &other.url]).await.code(0);
    node.stop(PATIENCE).await.unwrap();
    // The tool creates nothing in an empty database, and prints no secret.
    let empty = &databases().await[1];
    fixture.run(&[&list[..], &["--read-model-url", &empty.url]].concat()).await.code(4);
    empty.run(&["status"]).await.code(4);
    let wrong = "postgres://u:hunter2@127.0.0.1:9/x";
    let run =
        fixture.run(&[&list[..], &["--timeout", "1", "--read-model-url", wrong]].concat()).await.code(3);
    assert!(!run.err.contains("hunter2"), "{}", run.err);
}
