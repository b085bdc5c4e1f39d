//! The publisher: an exact log stream, under any faults.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use storied::projection::{InMemory, ProjectionState};
use storied::testing::Node;
use storied::{EventStore, FeedOptions, Filter, MemoryStore, PublisherState};
use tokio::time::Instant;

use crate::projection::fixtures::*;

async fn reach(node: &Node, what: &str, condition: impl Fn(&PublisherState) -> bool) {
    eventually(what, || condition(&node.publisher().state)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_log_exactly_over_kills_zombies_and_outages() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 0..600).await;
        let log_stream = LogStream::default();
        let dice = Dice::new(1);
        let writers = Writers::start(&store, 2, 80, 15);
        let mut nodes = Vec::new();
        for round in 0..12 {
            let link = Link::new(&store);
            let cut: Arc<dyn EventStore> = Arc::new(link.clone());
            nodes.push((node(&cut, log_stream.clone()).await, link));
            dice.pause(Duration::from_millis(60)).await;
            log_stream.down.store(round % 4 == 1, Ordering::SeqCst);
            if nodes.len() == 2 {
                let (node, link) = nodes.remove(dice.roll(2) as usize);
                match round % 3 {
                    0 => node.kill(),
                    1 => {
                        link.mute.store(true, Ordering::SeqCst);
                        dice.pause(Duration::from_millis(100)).await;
                        node.kill();
                    }
                    _ => _ = node.stop(Duration::from_millis(50)).await,
                }
            }
        }
        log_stream.down.store(false, Ordering::SeqCst);
        writers.done().await;
        let node = node(&store, log_stream.clone()).await;
        let log = log(&store, &Filter::all()).await;
        eventually("all is published", || log_stream.kept().len() >= log.len()).await;
        assert_eq!(log_stream.kept(), log, "{kind}");
        for (node, _) in nodes {
            node.kill();
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_publishes_and_hands_over_when_it_stops() {
    for (kind, store, _dir) in stores().await {
        let log_stream = LogStream::default();
        let options = publishing().lease_ttl(Duration::from_secs(600));
        let bus = Arc::new(log_stream.clone());
        let start = || Node::start(store.clone(), Some(bus.clone()), FeedOptions::new(), options.clone());
        let one = start().await;
        reach(&one, "the first publishes", |state| *state == PublisherState::Publishing).await;
        let two = start().await;
        reach(&two, "the second stands by", |state| *state == PublisherState::Standby).await;
        let head = append(&store, 0, 0..1_000).await;
        one.stop(PATIENCE).await.unwrap();
        assert_eq!(
            log_stream.kept().last(),
            Some(&head),
            "{kind}: committed events are published before the stop"
        );
        let checkpoint = store.publisher_checkpoint().await.unwrap();
        assert_eq!((checkpoint.position, checkpoint.sequence, checkpoint.epoch), (head, 1_000, 1), "{kind}");

        let stopped = Instant::now();
        reach(&two, "the second publishes", |state| *state == PublisherState::Publishing).await;
        assert!(stopped.elapsed() < Duration::from_secs(5));
        append(&store, 0, 0..10).await;
        two.stop(PATIENCE).await.unwrap();
        assert_eq!(log_stream.kept(), log(&store, &Filter::all()).await, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_or_failed_bus_is_reported_and_blocks_no_append() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let log_stream = LogStream::default();
    let node = node(&store, log_stream.clone()).await;
    reach(&node, "it publishes", |state| *state == PublisherState::Publishing).await;
    log_stream.down.store(true, Ordering::SeqCst);
    // Appends do not wait for the publisher.
    append(&store, 0, 0..10).await;
    reach(
        &node,
        "it retries",
        |state| matches!(state, PublisherState::Retrying { error } if error.contains("down")),
    )
    .await;
    log_stream.down.store(false, Ordering::SeqCst);
    eventually("all is published", || log_stream.kept().len() == 10).await;
    reach(&node, "it publishes again", |state| *state == PublisherState::Publishing).await;

    log_stream.hangs.store(true, Ordering::SeqCst);
    append(&store, 0, 0..10).await;
    let error = node.stop(Duration::from_millis(200)).await.unwrap_err();
    assert_eq!(error.name, "publisher", "{error}");
}

/// More than one chunk of the log; the first one hangs on its way to the bus.
async fn stuck_in_the_first_stretch(link: &Link, log_stream: &LogStream) -> Node {
    let store: Arc<dyn EventStore> = Arc::new(link.clone());
    let head = append(&store, 0, 0..3_000).await;
    log_stream.hangs.store(true, Ordering::SeqCst);
    let feed = FeedOptions::new().idle_poll(Duration::from_secs(3_600));
    let forever = Duration::from_secs(3_600);
    let options = publishing().heartbeat(forever);
    let node = Node::start(store, Some(Arc::new(log_stream.clone())), feed, options).await;
    eventually("it publishes", || node.publisher().head == Some(head)).await;
    node
}

/// An append always wakes the publisher.
///
/// Also during the publish of one chunk, after the read of the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_during_a_publish_wakes_the_publisher() {
    let link = Link::new(&(Arc::new(MemoryStore::new()) as _));
    let log_stream = LogStream::default();
    let node = stuck_in_the_first_stretch(&link, &log_stream).await;
    append(&(Arc::new(link.clone()) as _), 0, [3_000]).await;
    log_stream.hangs.store(false, Ordering::SeqCst);
    eventually("all is published", || log_stream.kept().len() == 3_001).await;
    node.stop(PATIENCE).await.unwrap();
}

/// A store that hangs while the next chunk is read does not delay the report of a failed bus.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_bus_is_reported_while_the_store_hangs() {
    let link = Link::new(&(Arc::new(MemoryStore::new()) as _));
    let log_stream = LogStream::default();
    link.wall(1);
    let node = stuck_in_the_first_stretch(&link, &log_stream).await;
    log_stream.down.store(true, Ordering::SeqCst);
    log_stream.hangs.store(false, Ordering::SeqCst);
    reach(
        &node,
        "it retries",
        |state| matches!(state, PublisherState::Retrying { error } if error.contains("down")),
    )
    .await;
    log_stream.down.store(false, Ordering::SeqCst);
    link.wall(u64::MAX);
    eventually("all is published", || log_stream.kept().len() == 3_000).await;
    node.stop(PATIENCE).await.unwrap();
}

/// Projections and publisher of a process share one read of each append. A node without projections
/// that stands by reads nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_append_is_read_once() {
    let inner: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (link, other) = (Link::new(&inner), Link::new(&inner));
    let store: Arc<dyn EventStore> = Arc::new(link.clone());
    let log_stream = LogStream::default();
    let start = |store: &Link| {
        let feed = FeedOptions::new().idle_poll(Duration::from_secs(3_600));
        let options = publishing().lease_ttl(Duration::from_secs(600));
        Node::start(Arc::new(store.clone()), Some(Arc::new(log_stream.clone())), feed, options)
    };
    let node = start(&link).await;
    let mut handles = Vec::new();
    for name in ["one", "two", "three"] {
        let handle = node.projection(recorder(name), InMemory::new(), options()).await;
        handle.wait_until_caught_up(PATIENCE).await.unwrap();
        crate::projection::fixtures::reach(&handle, ProjectionState::Following).await;
        handles.push(handle);
    }
    eventually("feed and publisher are live", || {
        node.feed().position.is_some() && node.publisher().head.is_some()
    })
    .await;
    let standby = start(&other).await;
    reach(&standby, "the other stands by", |state| *state == PublisherState::Standby).await;
    for n in 1..=20 {
        let position = append(&store, 0, [n]).await;
        for handle in &handles {
            catch_up(handle, position).await;
        }
        eventually("it is published", || log_stream.kept().last() == Some(&position)).await;
        assert_eq!((link.reads.load(Ordering::SeqCst), other.reads.load(Ordering::SeqCst)), (n, 0));
    }
    standby.stop(PATIENCE).await.unwrap();
    node.stop(PATIENCE).await.unwrap();
}

/// The ring of the feed overflows while the bus hangs, and again while it is slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_that_lags_the_feed_publishes_every_event_in_order() {
    for (kind, store, _dir) in stores().await {
        let log_stream = LogStream::default();
        let feed = FeedOptions::new().capacity(2).idle_poll(Duration::from_secs(3_600));
        let options = publishing().lease_ttl(Duration::from_secs(600));
        let node = Node::start(store.clone(), Some(Arc::new(log_stream.clone())), feed, options).await;
        reach(&node, "it publishes", |state| *state == PublisherState::Publishing).await;
        for round in 0..3 {
            log_stream.hangs.store(true, Ordering::SeqCst);
            for n in 0..50 {
                append(&store, 0, [n]).await;
            }
            log_stream.hangs.store(false, Ordering::SeqCst);
            Writers::start(&store, 2, 30, 0).done().await;
            let log = log(&store, &Filter::all()).await;
            eventually("all is published", || log_stream.kept().len() >= log.len()).await;
            assert_eq!(log_stream.kept(), log, "{kind} {round}");
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_appends_are_found_by_polling() {
    // Two handles on one file, like two processes: appends through the second one wake no task
    // here.
    let dir = tempfile::TempDir::new().unwrap();
    let open = || storied::SqliteStore::open(dir.path().join("events.db"));
    let here: Arc<dyn EventStore> = Arc::new(open().await.unwrap());
    let there: Arc<dyn EventStore> = Arc::new(open().await.unwrap());
    let feed = FeedOptions::new().idle_poll(Duration::from_secs(3_600));
    let node = Node::start(here, None, feed, publishing()).await;
    let handle = node.projection(recorder("memory"), InMemory::new(), options()).await;
    crate::projection::fixtures::reach(&handle, ProjectionState::Following).await;
    for n in 0..5 {
        let position = append(&there, 0, [n]).await;
        catch_up(&handle, position).await;
    }
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_during_a_publisher_restart_publishes_or_reports_it() {
    for (kind, store, _dir) in stores().await {
        for mends in [true, false] {
            let log_stream = LogStream::default();
            let node = node(&store, log_stream.clone()).await;
            reach(&node, "it publishes", |state| *state == PublisherState::Publishing).await;
            log_stream.panics.store(true, Ordering::SeqCst);
            append(&store, 0, 0..10).await;
            // So many times that the next restart is seconds away.
            eventually("it panics", || log_stream.panicked.load(Ordering::SeqCst) >= 5).await;
            reach(&node, "it waits", |state| matches!(state, PublisherState::Retrying { .. })).await;
            log_stream.panics.store(!mends, Ordering::SeqCst);
            let stopped = node.stop(PATIENCE).await;
            if mends {
                stopped.unwrap();
                assert_eq!(log_stream.kept(), log(&store, &Filter::all()).await, "{kind}");
            } else {
                let error = stopped.unwrap_err();
                assert_eq!(error.name, "publisher", "{error}");
                assert!(error.reason.contains("on purpose"), "{error}");
            }
        }
    }
}
