//! Start position of a projection without a checkpoint.

use std::sync::Arc;

use chrono::{DateTime, Duration, Utc};
use storied::projection::{AtLeastOnce, Delivery, InMemory, PerTarget, ProjectionState, Start};
use storied::runtime::StartError;
use storied::testing::Node;
use storied::{
    EventStore, Filter, MemoryStore, Position, ProjectionHandle, ProjectionOptions, ReadLog, Runtime,
    SqliteStore,
};

use crate::projection::conformance::place::{InPostgres, InSqlite, Outside, Place, Writes};
use crate::projection::fixtures::*;

async fn run<P: Place>(
    store: &Arc<dyn EventStore>,
    place: &P,
    name: &str,
    start: Start,
) -> (Node, ProjectionHandle) {
    let node = local_node(store).await;
    let options = options().start(start);
    let handle = node.projection(Writes::new(place.clone(), name), place.model().await, options).await;
    (node, handle)
}

async fn done(node: Node, handle: &ProjectionHandle) {
    handle.wait_until_caught_up(PATIENCE).await.unwrap();
    node.stop(PATIENCE).await.unwrap();
}

/// Returns the positions of the log after this one.
async fn after(store: &Arc<dyn EventStore>, position: Position) -> Vec<Position> {
    let mut positions = log(store, &Filter::all()).await;
    positions.retain(|other| *other > position);
    positions
}

async fn begins_where_it_is_told<P: Place>() {
    let (store, place) = P::open().await;
    for stream in 0..20 {
        append(&store, stream, 0..5).await;
    }
    let all = log(&store, &Filter::all()).await;
    let (at, before) = (all[30], all[29]);
    let head = *all.last().unwrap();
    for (name, start, floor) in [
        ("beginning", Start::Beginning, Position::START),
        ("at", Start::At(at), before),
        ("at-0", Start::At(Position::START), Position::START),
        ("at-end", Start::At(Position::new(head.get() + 1)), head),
        ("since-ever", Start::Since(DateTime::UNIX_EPOCH), Position::START),
        ("since-tomorrow", Start::Since(Utc::now() + Duration::days(1)), head),
        ("now", Start::Now, head),
    ] {
        let (node, handle) = run(&store, &place, name, start).await;
        done(node, &handle).await;
        assert_eq!(place.seen(name).await, after(&store, floor).await, "{name}");
    }
    // Later events are applied, regardless of the option in a later program; a reset does not go
    // before the start.
    append(&store, 1, 5..10).await;
    for (name, start, floor) in [
        ("at", Start::Now, before),
        ("now", Start::Beginning, head),
        ("beginning", Start::Now, Position::START),
        ("since-tomorrow", Start::At(Position::new(1)), head),
    ] {
        let (node, handle) = run(&store, &place, name, start).await;
        handle.wait_until_caught_up(PATIENCE).await.unwrap();
        let expected = after(&store, floor).await;
        assert_eq!(place.seen(name).await, expected, "{name}");
        handle.reset().await.unwrap();
        done(node, &handle).await;
        assert_eq!(place.seen(name).await, expected, "{name}, reset");
    }
    // In partitions, all of which begin there.
    let node = local_node(&store).await;
    let (parts, model) = (place.clone(), place.model().await);
    let make = move |_| Writes::new(parts.clone(), "parts");
    let handle =
        node.projection(PerTarget::new(make), model, options().start(Start::At(at)).partitions(4)).await;
    handle.wait_until_caught_up(PATIENCE).await.unwrap();
    let mut seen = place.seen("parts").await;
    seen.sort();
    assert_eq!(seen, after(&store, before).await);
    node.stop(PATIENCE).await.unwrap();
    if P::TOGETHER {
        let node = local_node(&store).await;
        let (built, model) = (place.clone(), place.model().await);
        let make = move |target: storied::projection::BuildTarget| {
            Writes::new(built.clone(), "built").version(target.version)
        };
        let handle = node.projection(PerTarget::new(make), model, options().start(Start::At(at))).await;
        handle.wait_until_caught_up(PATIENCE).await.unwrap();
        handle.rebuild().await.unwrap();
        eventually("it is rebuilt", || handle.status().version == 1).await;
        handle.wait_until_caught_up(PATIENCE).await.unwrap();
        assert_eq!(place.seen("built@1").await, after(&store, before).await);
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_external_projection_begins_at_its_start_position() {
    begins_where_it_is_told::<Outside>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sqlite_projection_begins_at_its_start_position() {
    begins_where_it_is_told::<InSqlite>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_projection_begins_at_its_start_position() {
    begins_where_it_is_told::<InPostgres>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_in_memory_start_position_is_resolved_at_every_start() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 0..10).await;
        let run = async |start| {
            let node = local_node(&store).await;
            let recorder = recorder::<()>("memory");
            let seen = recorder.seen.clone();
            let handle = node.projection(recorder, InMemory::new(), options().start(start)).await;
            handle.wait_until_caught_up(PATIENCE).await.unwrap();
            (node, handle, seen)
        };
        for _ in 0..2 {
            let (node, handle, seen) = run(Start::Now).await;
            assert_eq!(seen.positions(), [], "{kind}");
            let position = append(&store, 0, [7]).await;
            catch_up(&handle, position).await;
            assert_eq!(seen.positions(), [position], "{kind}");
            handle.reset().await.unwrap();
            catch_up(&handle, position).await;
            assert_eq!(seen.positions(), [position], "{kind}, reset");
            node.stop(PATIENCE).await.unwrap();
        }
        let (node, _, seen) = run(Start::At(Position::new(4))).await;
        assert_eq!(seen.positions(), after(&store, Position::new(3)).await, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

/// The times of a log go back by less than an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn since_a_time_leaves_no_later_event_out() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("events.db");
    let store: Arc<dyn EventStore> = Arc::new(SqliteStore::open(&path).await.unwrap());
    for stream in 0..20 {
        append(&store, stream, 0..200).await;
    }
    let pool = sqlx::SqlitePool::connect(path.to_str().unwrap()).await.unwrap();
    sqlx::query("DROP TRIGGER storied_events_no_update").execute(&pool).await.unwrap();
    // One event per minute, out of order by up to 50 minutes.
    let disorder =
        "UPDATE storied_events SET recorded_at = (position * 60 - (position * 7919) % 3000) * 1000000";
    sqlx::query(disorder).execute(&pool).await.unwrap();
    let events = store.read_log(ReadLog::after(Position::START).limit(10_000)).await.unwrap().events;
    assert_eq!(events.len(), 4_000);
    for minute in [0, 1, 59, 700, 2_345, 3_999, 4_000, 5_000] {
        let time = DateTime::UNIX_EPOCH + Duration::minutes(minute);
        let node = local_node(&store).await;
        let recorder = recorder::<Delivery>(&format!("since-{minute}"));
        let seen = recorder.seen.clone();
        let handle = node.projection(recorder, AtLeastOnce::new(), options().start(Start::Since(time))).await;
        done(node, &handle).await;
        let expected: Vec<_> = events.iter().skip_while(|event| event.recorded_at < time).collect();
        assert!(
            seen.positions().iter().eq(expected.iter().map(|event| &event.position)),
            "{minute}: {:?} instead of {:?}",
            seen.positions().first(),
            expected.first().map(|event| event.position)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_beyond_the_log_waits_for_it() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..5).await;
    let place = Outside::default();
    let (node, handle) = run(&store, &place, "later", Start::At(Position::new(8))).await;
    reach(&handle, ProjectionState::Retrying).await;
    let error = handle.status().last_error.unwrap();
    assert!(error.contains("start position 8: the log ends at 5"), "{error}");
    assert!(error.starts_with("waiting for"), "{error}");
    append(&store, 0, 0..5).await;
    done(node, &handle).await;
    assert_eq!(place.seen("later").await, [8, 9, 10].map(Position::new));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_least_once_on_a_log_with_events_needs_a_start_position() {
    for (kind, store, _dir) in stores().await {
        let start = async |name: &str, options: ProjectionOptions| {
            let recorder = recorder::<Delivery>(name);
            let seen = recorder.seen.clone();
            let builder = Runtime::builder().store(store.clone());
            let runtime = builder.projection_with(recorder, AtLeastOnce::new(), options).start().await?;
            let handle = runtime.projection(name).unwrap();
            handle.wait_until_caught_up(PATIENCE).await.unwrap();
            runtime.shutdown().await.unwrap();
            Ok::<_, StartError>(seen.positions())
        };
        // While the log is empty, there is no difference.
        assert_eq!(start("early", options()).await.unwrap(), []);
        append(&store, 0, 0..3).await;
        assert_eq!(start("early", options()).await.unwrap().len(), 3, "{kind}");
        let refused = start("mails", options()).await.unwrap_err();
        assert!(matches!(&refused, StartError::NoStartPosition { name } if name == "mails"), "{refused}");
        for choice in ["Beginning", "Now", "At", "Since"] {
            assert!(refused.to_string().contains(choice), "{refused}");
        }
        let parts = Runtime::builder().store(store.clone());
        let parts = parts.projection_with(
            PerTarget::new(|_| recorder::<Delivery>("parts")),
            AtLeastOnce::new(),
            ProjectionOptions::new().partitions(4),
        );
        let refused = parts.start().await.unwrap_err();
        assert!(matches!(refused, StartError::NoStartPosition { .. }), "{refused}");
        assert_eq!(start("mails", options().start(Start::Now)).await.unwrap(), []);
        append(&store, 0, 0..1).await;
        // It has a checkpoint.
        assert_eq!(start("mails", options()).await.unwrap().len(), 1, "{kind}");
        assert_eq!(start("all", options().start(Start::Beginning)).await.unwrap().len(), 4, "{kind}");
    }
}

/// Every event appended after the start returned is applied, however late the projection first
/// runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn now_is_when_the_runtime_started() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 0..3).await;
        for round in 0..10 {
            let names = ["whole", "parts", "memory"].map(|kind| format!("{kind}-{round}"));
            let (whole, memory) = (recorder::<Delivery>(&names[0]), recorder::<()>(&names[2]));
            let (parts, name) = (Seen::default(), names[1].clone());
            let (whole_seen, parts_seen, memory_seen) =
                (whole.seen.clone(), parts.clone(), memory.seen.clone());
            let make = move |_| recorder::<Delivery>(&name).into(&parts);
            // No event is as late, so this is `Now`.
            let later = chrono::Utc::now() + chrono::Duration::days(1);
            let now = || options().start(if round % 2 == 0 { Start::Now } else { Start::Since(later) });
            let runtime = Runtime::builder()
                .store(store.clone())
                .projection_with(whole, AtLeastOnce::new(), now())
                .projection_with(PerTarget::new(make), AtLeastOnce::new(), now().partitions(16))
                .projection_with(memory, InMemory::new(), now())
                .start()
                .await
                .unwrap();
            let mut expected = Vec::new();
            for stream in 0..5 {
                expected.push(append(&store, stream, [1]).await);
            }
            for name in &names {
                catch_up(runtime.projection(name).unwrap(), expected[4]).await;
            }
            for (seen, name) in [whole_seen, parts_seen, memory_seen].iter().zip(&names) {
                let mut seen = seen.positions();
                seen.sort();
                assert_eq!(seen, expected, "{kind}, {name}");
            }
            runtime.shutdown().await.unwrap();
        }
    }
}
