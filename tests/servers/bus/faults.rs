//! From appends to projections over NATS, with the server killed, paused, restarted and absent.

use std::time::Duration;

use storied::bus::BusState;
use storied::{EventBus, FeedOptions, PublisherState};
use tokio::time::Instant;
use uuid::Uuid;

use crate::bus::fixtures::*;
use crate::support::NatsServer;

/// Two nodes over one store, as two processes: their followers must get the whole log after any
/// fault.
/// Their feeds do not poll the store: the bus has to report its losses.
async fn two_nodes_survive(what: &str, fault: impl AsyncFn(&mut NatsServer)) {
    for (kind, bus, mut server) in nats().await {
        let store = store();
        write(&store, 0, 100).await;
        let one = Recording::start(&store, bus, blind()).await;
        let two = Recording::start(&store, options(kind, &server).bus(), blind()).await;
        let writers = [1, 2].map(|n| Writer::start(&store, n, n, Duration::from_millis(3)));
        pause(300).await;
        fault(&mut server).await;
        pause(300).await;
        for writer in writers {
            let (appends, longest) = writer.done().await;
            assert!(appends > 20, "{what} {kind:?}: {appends}");
            assert!(longest < Duration::from_secs(1), "{what} {kind:?}: an append took {longest:?}");
        }
        one.reaches(what, &store).await;
        two.reaches(what, &store).await;
        let head = store.high_water_mark().await.unwrap();
        eventually("published", || {
            [&one, &two].iter().any(|recording| recording.node.publisher().published == Some(head))
        })
        .await;
        one.node.stop(PATIENCE).await.unwrap();
        two.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server() {
    two_nodes_survive("killed", async |server| {
        server.kill();
        pause(700).await;
        server.restart().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_restarted_at_once_twice() {
    two_nodes_survive("restarted", async |server| {
        for _ in 0..2 {
            server.restart().await;
            pause(100).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs() {
    two_nodes_survive("paused", async |server| {
        server.pause();
        pause(3_000).await;
        server.resume();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_there_yet() {
    for (kind, _, mut server) in nats().await {
        server.stop().await;
        let store = store();
        let bus = options(kind, &server).bus();
        let feed = FeedOptions::new().idle_poll(Duration::from_millis(100));
        let recording = Recording::start(&store, bus.clone(), feed).await;
        let start = Instant::now();
        write(&store, 0, 100).await;
        assert!(start.elapsed() < Duration::from_secs(1));
        // Without the bus, events only arrive later.
        recording.reaches("without a server", &store).await;
        eventually("retrying", || {
            matches!(recording.node.publisher().state, PublisherState::Retrying { .. })
        })
        .await;
        assert!(matches!(bus.state(), BusState::Disconnected { .. }), "{:?}", bus.state());
        server.restart().await;
        eventually("publishing", || recording.node.publisher().state == PublisherState::Publishing).await;
        assert!(matches!(bus.state(), BusState::Connected { .. }), "{:?}", bus.state());
        write(&store, 0, 100).await;
        recording.reaches("with a server", &store).await;
        recording.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_last_event_is_found_by_the_heartbeat() {
    for (kind, bus, _server) in nats().await {
        let store = store();
        // Only this test publishes, and it publishes nothing.
        store.acquire_lease("publisher", Uuid::now_v7(), PATIENCE).await.unwrap().unwrap();
        let recording = Recording::start(&store, bus.clone(), blind()).await;
        let mut publisher = publisher(&bus, &store).await;
        for _ in 0..3 {
            let head = write(&store, 0, 10).await;
            pause(100).await;
            publisher.heartbeat(head).await.unwrap();
            recording.reaches(&format!("{kind:?}"), &store).await;
        }
        recording.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_buffer_overflows_misses_and_repeats_nothing() {
    for (kind, _, server) in nats().await {
        let store = store();
        let one = Recording::start(&store, options(kind, &server).bus(), blind()).await;
        let small = options(kind, &server).subscription_capacity(1).bus();
        let two = Recording::start(&store, small, blind()).await;
        for stream in 0..20 {
            write(&store, stream, 500).await;
        }
        one.reaches("the quick one", &store).await;
        two.reaches("the one with the small buffer", &store).await;
        assert!(two.node.feed().repairs > 0, "{kind:?}: {:?}", two.node.feed());
        one.node.stop(PATIENCE).await.unwrap();
        two.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_on_a_dead_connection_fails_at_once_and_sends_nothing_late() {
    for (kind, bus, mut server) in nats().await {
        let store = store();
        write(&store, 0, 20).await;
        let mut publisher = publisher(&bus, &store).await;
        let mut batches = batches(&store, storied::Position::START, 10).await.into_iter();
        publisher.publish(batches.next().unwrap()).await.unwrap();
        server.kill();
        eventually("disconnected", || matches!(bus.state(), BusState::Disconnected { .. })).await;
        let start = Instant::now();
        let late = batches.next().unwrap();
        assert!(publisher.publish(late.clone()).await.is_err(), "{kind:?}");
        assert!(publisher.heartbeat(late.upto).await.is_err(), "{kind:?}");
        assert!(start.elapsed() < Duration::from_millis(100), "{kind:?}: {:?}", start.elapsed());
        server.restart().await;
        let raw = async_nats::connect(server.url()).await.unwrap();
        let mut seen = raw.subscribe("storied.>").await.unwrap();
        raw.flush().await.unwrap();
        eventually("connected", || matches!(bus.state(), BusState::Connected { .. })).await;
        let nothing =
            tokio::time::timeout(Duration::from_millis(300), futures_util::StreamExt::next(&mut seen));
        assert!(nothing.await.is_err(), "{kind:?}");
    }
}
