//! Every event exactly once and in order, under any faults of the bus, the timing and the process.

use std::sync::Arc;
use std::time::Duration;

use storied::projection::{AtLeastOnce, InMemory, ProjectionState, WaitError};
use storied::store::CheckpointKey;
use storied::testing::Node;
use storied::{
    EventBus, EventStore, FeedOptions, Filter, MemoryStore, Position, ProjectionOptions, PublisherOptions,
};
use tokio::time::timeout;

use crate::projection::fixtures::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applies_exactly_once_over_kills_at_any_moment() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let dice = Dice::new(7);
        let writers = Writers::start(&store, 2, 120, 15);
        let options = options().batch_size(5).lease(Duration::from_millis(50));
        for _ in 0..10 {
            let node = local_node(&store).await;
            let handle = node.projection(table("table"), database.open().await, options.clone()).await;
            let moved = handle.status().position;
            // Usually long enough to take over the dead node's lease.
            let _ = tokio::time::timeout(
                Duration::from_millis(200),
                handle.watch().wait_for(|status| status.position > moved),
            )
            .await;
            dice.pause(Duration::from_millis(30)).await;
            node.kill();
        }
        writers.done().await;
        let node = local_node(&store).await;
        let handle = node.projection(table("table"), database.open().await, options).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_that_loses_duplicates_and_reorders_changes_nothing() {
    for (kind, store, _dir) in stores().await {
        for seed in 0..3 {
            let [publishing, node] = two_nodes(&store, Lossy::new(Loss::Chaos, seed), quick()).await;
            let (memory, slow) = (recorder("memory"), recorder::<()>("even").filter(evens()));
            let (seen, even_seen) = (memory.seen.clone(), slow.seen.clone());
            let memory = node.projection(memory, InMemory::new(), options()).await;
            let even = node.projection(slow, InMemory::new(), options()).await;
            Writers::start(&store, 3, 60, 3).done().await;
            let head = store.high_water_mark().await.unwrap();
            catch_up(&memory, head).await;
            catch_up(&even, head).await;
            assert_eq!(seen.positions(), log(&store, &Filter::all()).await, "{kind} {seed}");
            assert_eq!(even_seen.positions(), log(&store, &evens()).await, "{kind} {seed}");
            assert!(node.feed().repairs > 0, "{:?}", node.feed());
            node.stop(PATIENCE).await.unwrap();
            publishing.stop(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_event_is_found_even_if_the_bus_lost_it() {
    // By the heartbeat, by polling the store, and without a bus.
    let never = Duration::from_secs(3_600);
    let soon = Duration::from_millis(50);
    for (loss, idle_poll) in [(Loss::Batches, never), (Loss::Silence, soon), (Loss::Refused, soon)] {
        for (kind, store, _dir) in stores().await {
            let feed = FeedOptions::new().idle_poll(idle_poll);
            let [publishing, node] = two_nodes(&store, Lossy::new(loss, 0), feed).await;
            let recorder = recorder("memory");
            let seen = recorder.seen.clone();
            let handle = node.projection(recorder, InMemory::new(), options()).await;
            reach(&handle, ProjectionState::Following).await;
            let last = append(&store, 0, [1]).await;
            catch_up(&handle, last).await;
            assert_eq!(seen.positions(), [last], "{kind} {loss:?}");
            if loss == Loss::Refused {
                eventually("the feed reports it", || node.feed().last_error.is_some()).await;
            }
            node.stop(PATIENCE).await.unwrap();
            publishing.stop(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_projection_delays_no_other_and_misses_no_event() {
    for (kind, store, _dir) in stores().await {
        let feed = FeedOptions::new().capacity(2).idle_poll(Duration::from_millis(50));
        let node = Node::start(store.clone(), None, feed, publishing()).await;
        let gate = Gate::closed();
        let (slow, fast) = (recorder("slow").hook(gate.hook()), recorder::<()>("fast"));
        let (slow_seen, fast_seen) = (slow.seen.clone(), fast.seen.clone());
        let slow = node.projection(slow, InMemory::new(), options()).await;
        let fast = node.projection(fast, InMemory::new(), options()).await;
        reach(&slow, ProjectionState::Following).await;
        append(&store, 0, [0]).await;
        gate.reached().await;
        for n in 0..50 {
            // One by one, so that the ring overflows.
            let position = append(&store, 0, [n]).await;
            catch_up(&fast, position).await;
        }
        assert!(slow_seen.positions().is_empty());
        gate.open();
        catch_up(&slow, store.high_water_mark().await.unwrap()).await;
        let log = log(&store, &Filter::all()).await;
        assert_eq!(slow_seen.positions(), log, "{kind}");
        assert_eq!(fast_seen.positions(), log, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_your_own_writes() {
    for (_, store, _dir) in stores().await {
        let node = local_node(&store).await;
        let database = Database::new().await;
        let handle = node.projection(table("table"), database.open().await, options()).await;
        for n in 0..20 {
            let position = append(&store, 0, [n]).await;
            handle.caught_up_to(position).await.unwrap();
            assert_eq!(database.seen("table").await.last(), Some(&position));
        }
        handle.wait_until_caught_up(PATIENCE).await.unwrap();

        let beyond = Position::new(store.high_water_mark().await.unwrap().get() + 1);
        let error = handle.caught_up_to_within(beyond, Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, WaitError::TimedOut { wanted, .. } if wanted == beyond), "{error}");

        let waiting = tokio::spawn({
            let handle = handle.clone();
            async move { handle.caught_up_to_within(beyond, PATIENCE).await }
        });
        node.stop(PATIENCE).await.unwrap();
        let error = waiting.await.unwrap().unwrap_err();
        assert!(matches!(error, WaitError::Stopped { .. }), "{error}");
        assert_eq!(handle.status().state, ProjectionState::Stopped);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_projections_live_in_one_process() {
    for (kind, store, _dir) in stores().await {
        let node = local_node(&store).await;
        let database = Database::new().await;
        let model = database.open().await;
        let mut handles = Vec::new();
        for n in 0..25 {
            let name = format!("table {n}");
            handles.push(node.projection(table(&name), model.clone(), ProjectionOptions::new()).await);
            let name = format!("memory {n}");
            handles.push(node.projection(recorder(&name), InMemory::new(), ProjectionOptions::new()).await);
        }
        Writers::start(&store, 2, 20, 5).done().await;
        let head = store.high_water_mark().await.unwrap();
        for handle in &handles {
            catch_up(handle, head).await;
        }
        let log = log(&store, &Filter::all()).await;
        for n in 0..25 {
            assert_eq!(database.seen(&format!("table {n}")).await, log, "{kind} {n}");
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

/// A filter without matches, over a log of many positions.
///
/// Each page ends in bounded time, and matching events after it are found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_for_rare_events_handles_messages_and_saves_progress() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 0..300).await;
        // One position in a thousand is used.
        let link = Link::new(&store).sparse(1_000);
        link.wall(100_000);
        let sparse: Arc<dyn EventStore> = Arc::new(link.clone());
        let node = local_node(&sparse).await;
        let never = recorder("never").filter(Filter::variants::<Thing>(["never"]));
        let handle = node.projection(never, AtLeastOnce::new(), options()).await;
        catch_up(&handle, Position::new(100_000)).await;
        let hears = async {
            handle.pause().await.unwrap();
            let checkpoint = store.checkpoint(&CheckpointKey::new("never")).await.unwrap();
            assert_eq!(checkpoint.position, Position::new(100_000), "{kind}");
            handle.resume().await.unwrap();
        };
        timeout(PATIENCE, hears).await.unwrap();
        assert_eq!(handle.status().position, Position::new(100_000), "{kind}");
        link.wall(u64::MAX);
        catch_up(&handle, Position::new(300_000)).await;
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gaps_in_the_log_are_crossed() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 0..20).await;
        let sparse: Arc<dyn EventStore> = Arc::new(Link::new(&store).sparse(1_000_000_000));
        let node = local_node(&sparse).await;
        let evens = recorder("evens").filter(evens());
        let seen = evens.seen.clone();
        let handle = node.projection(evens, InMemory::new(), options()).await;
        catch_up(&handle, Position::new(20_000_000_000)).await;
        for n in 20..30 {
            append(&store, 0, [n]).await;
        }
        catch_up(&handle, Position::new(30_000_000_000)).await;
        let filter = crate::projection::fixtures::evens();
        assert_eq!(seen.positions(), log(&sparse, &filter).await, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Unlimited durations, as a way to configure "never".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn durations_have_no_upper_limit() {
    let never = Duration::MAX;
    let longest = Duration::from_secs(24 * 60 * 60);
    for (kind, store, _dir) in stores().await {
        let feed = FeedOptions::new().idle_poll(never);
        let publishing = PublisherOptions::new().heartbeat(never).lease_ttl(longest);
        let log_stream = LogStream::default();
        for bus in [None, Some(Arc::new(log_stream.clone()) as Arc<dyn EventBus>)] {
            let node = Node::start(store.clone(), bus, feed.clone(), publishing.clone()).await;
            let options = ProjectionOptions::new()
                .lease(longest)
                .initial_backoff(Duration::from_millis(1))
                .max_backoff(never);
            let delivered = node.projection(recorder("delivered"), AtLeastOnce::new(), options.clone()).await;
            let head = append(&store, 0, [1]).await;
            delivered.caught_up_to_within(head, never).await.unwrap();
            delivered.wait_until_caught_up(never).await.unwrap();
            node.stop(never).await.unwrap();
        }
        assert_eq!(log_stream.kept().last(), log(&store, &Filter::all()).await.last(), "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlimited_backoff_does_not_panic() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, [1]).await;
    let node = local_node(&store).await;
    let options = ProjectionOptions::new().initial_backoff(Duration::MAX).max_backoff(Duration::MAX);
    let failing = recorder("failing").hook(hook(|_| Err("always".into())));
    let handle = node.projection(failing, InMemory::new(), options).await;
    reach(&handle, ProjectionState::Retrying).await;
    let error = handle.caught_up_to_within(Position::new(1), Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, WaitError::TimedOut { .. }), "{error}");
    assert!(handle.status().last_error.is_some_and(|error| error.contains("always")));
    node.stop(PATIENCE).await.unwrap();
}
