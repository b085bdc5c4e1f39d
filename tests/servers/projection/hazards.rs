//! Hazards of NATS and PostgreSQL for projections: kills, pauses, purges and slowness.
//!
//! The numbers are those of `docs/dev/hazards.md`, which also lists where the other numbers are
//! tested.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use storied::bus::{JetStreamOptions, NatsBus, NatsOptions};
use storied::projection::{AtLeastOnce, FailurePolicy, FollowMode, InMemory, PerTarget, ProjectionState};
use storied::testing::Node;
use storied::{EventStore, FeedOptions, Filter, MemoryStore, Partition, ProjectionOptions};

use crate::projection::conformance::place::{InPostgres, Place, Writes};
use crate::projection::fixtures::*;
use crate::support::{NatsOptions as Server, NatsServer, PostgresServer};

/// Options of a feed that never polls.
fn blind() -> FeedOptions {
    FeedOptions::new().idle_poll(Duration::from_secs(3_600))
}

fn jetstream(server: &NatsServer, keeps: u64) -> NatsBus {
    let log_stream = JetStreamOptions::new().max_bytes(keeps);
    NatsOptions::jetstream(log_stream).url(server.url()).reconnect_wait(Duration::from_millis(100)).bus()
}

fn durable() -> ProjectionOptions {
    options().follow(FollowMode::Durable)
}

type Consumer = async_nats::jetstream::consumer::PullConsumer;

async fn consumer(server: &NatsServer, name: &str) -> Consumer {
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Ok(stream) = context.get_stream("STORIED_EVENTS").await
            && let Ok(consumer) = stream.get_consumer(&format!("projection=2F{name}")).await
        {
            return consumer;
        }
        assert!(tokio::time::Instant::now() < give_up, "there is no consumer of {name}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_03_a_subscriber_that_reconnects_later_than_the_publisher() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let mut server = NatsServer::start(Server::core()).await;
    let core = |wait| NatsOptions::core().url(server.url()).reconnect_wait(wait);
    let start = |wait| Node::start(store.clone(), Some(Arc::new(core(wait).bus())), blind(), publishing());
    let (one, two) = (start(Duration::from_millis(20)).await, start(Duration::from_secs(2)).await);
    let recorder = recorder("late");
    let seen = recorder.seen.clone();
    let late = two.projection(recorder, InMemory::new(), options()).await;
    catch_up(&late, append(&store, 0, 0..5).await).await;
    server.kill();
    append(&store, 0, 0..5).await;
    server.restart().await;
    // Published while the other node is disconnected.
    let publishes = |node: &Node, upto| node.publisher().published.is_some_and(|at| at >= upto);
    for n in 0..50 {
        let head = append(&store, 0, [n]).await;
        eventually("a node publishes", || publishes(&one, head) || publishes(&two, head)).await;
    }
    catch_up(&late, store.high_water_mark().await.unwrap()).await;
    assert_eq!(seen.positions(), log(&store, &Filter::all()).await);
    one.stop(PATIENCE).await.unwrap();
    two.stop(PATIENCE).await.unwrap();
}

/// Acknowledged messages are delivered again, as if for the first time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_10_a_server_killed_after_acknowledged_deliveries() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let mut server = NatsServer::start(Server::jetstream()).await;
    let database = Database::new().await;
    let bus = Arc::new(jetstream(&server, 50 << 20));
    let node = Node::start(store.clone(), Some(bus), blind(), publishing()).await;
    let handle = node.projection(table("killed"), database.open().await, durable()).await;
    let mut consumer = consumer(&server, "killed").await;
    for round in 0..3 {
        for n in 0..50 {
            catch_up(&handle, append(&store, n % 3, [n]).await).await;
        }
        let settled = consumer.info().await.unwrap().ack_floor.consumer_sequence;
        server.kill();
        let head = append(&store, 0, [1]).await;
        server.restart().await;
        catch_up(&handle, head).await;
        assert!(round > 0 || settled > 0, "nothing was settled");
    }
    assert_eq!(database.seen("killed").await, log(&store, &Filter::all()).await);
    node.stop(PATIENCE).await.unwrap();
}

/// The follower is full, and the limits of the stream remove messages that it has not requested
/// yet.
///
/// The numbers of its deliveries do not show the gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_12_a_stream_that_discards_under_a_full_follower() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let server = NatsServer::start(Server::jetstream()).await;
    let bus = Arc::new(jetstream(&server, 50 << 10));
    let node = Node::start(store.clone(), Some(bus), blind(), publishing()).await;
    let gate = Gate::closed();
    // Only part of the log, so that a step in the stream's numbers proves nothing.
    let slow = recorder("slow").filter(evens()).hook(gate.hook());
    let seen = slow.seen.clone();
    let slow = node.projection(slow, AtLeastOnce::new(), durable()).await;
    reach(&slow, ProjectionState::Following).await;
    let mut consumer = consumer(&server, "slow").await;
    // One at a time, so that each event is delivered until the follower is full.
    let mut appended = 0;
    while appended < 2_500 {
        let head = append(&store, appended % 7, [appended]).await;
        eventually("it is published", || node.publisher().published.is_some_and(|upto| upto >= head)).await;
        appended += 1;
    }
    gate.reached().await;
    let info = consumer.info().await.unwrap();
    assert!(
        info.num_ack_pending < 1_000 && info.num_pending > 0,
        "it is not full: {} {}",
        info.num_ack_pending,
        info.num_pending
    );
    gate.open();
    let head = append(&store, 0, [2]).await;
    catch_up(&slow, head).await;
    assert_eq!(seen.positions(), log(&store, &evens()).await);
    node.stop(PATIENCE).await.unwrap();
}

/// The server would redeliver after 30 s; before that, the node reports work in progress.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_17_a_projection_slower_than_the_wait_for_its_ack() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let server = NatsServer::start(Server::jetstream()).await;
    let bus = Arc::new(jetstream(&server, 50 << 20));
    let node = Node::start(store.clone(), Some(bus), blind(), publishing()).await;
    let gate = Gate::closed();
    let slow = recorder("slow").hook(gate.hook());
    let seen = slow.seen.clone();
    let slow = node.projection(slow, AtLeastOnce::new(), durable()).await;
    reach(&slow, ProjectionState::Following).await;
    let mut consumer = consumer(&server, "slow").await;
    append(&store, 0, 0..800).await;
    gate.reached().await;
    tokio::time::sleep(Duration::from_secs(33)).await;
    let info = consumer.info().await.unwrap();
    assert_eq!(info.num_redelivered, 0, "{info:?}");
    gate.open();
    catch_up(&slow, append(&store, 0, [1]).await).await;
    assert_eq!(seen.positions(), log(&store, &Filter::all()).await);
    // Finally every delivered message is acknowledged.
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        let info = consumer.info().await.unwrap();
        if info.num_ack_pending == 0 && info.num_pending == 0 {
            break;
        }
        assert!(tokio::time::Instant::now() < give_up, "{info:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_18_a_poison_event_is_parked_and_its_partition_goes_on_in_order() {
    let (store, place) = InPostgres::open().await;
    for n in 0..200 {
        append(&store, n % 10, [n]).await;
    }
    let all = log(&store, &Filter::all()).await;
    let poisonous = all[57];
    let tries = Arc::new(AtomicU64::new(0));
    let poison = {
        let tries = tries.clone();
        hook(move |event| {
            if event.position != poisonous {
                return Ok(());
            }
            tries.fetch_add(1, Ordering::SeqCst);
            Err("poison".into())
        })
    };
    let node = Node::start(store.clone(), None, FeedOptions::new(), publishing()).await;
    let make = {
        let place = place.clone();
        move |_| Writes::new(place.clone(), "poisoned").hook(poison.clone())
    };
    let options = options().max_attempts(3).on_failure(FailurePolicy::Park);
    let handle = node.projection(PerTarget::new(make), place.model().await, options.partitions(4)).await;
    catch_up(&handle, *all.last().unwrap()).await;
    let parked = handle.parked(10).await.unwrap();
    assert_eq!((parked.len(), parked[0].position, parked[0].attempts), (1, poisonous, 3));
    assert_eq!(tries.load(Ordering::SeqCst), 3);
    // Each stream is in one partition: the order of the partitions is that of the streams.
    let stream = |position: u64| (all.binary_search(&storied::Position::new(position)).unwrap() % 10) as u64;
    let partition =
        |position: u64| Partition::of(&storied::StreamId::new("thing", stream(position)).unwrap(), 4).index();
    let seen = place.seen("poisoned").await;
    for index in 0..4 {
        let here = |of: &[storied::Position]| -> Vec<u64> {
            let positions = of.iter().filter(|&&at| at != poisonous).map(|at| at.get());
            positions.filter(|&at| partition(at) == index).collect()
        };
        assert_eq!(here(&seen), here(&all), "partition {index}");
    }
    node.stop(PATIENCE).await.unwrap();
}

/// The owner stops before another node could own the read model; after the outage everything
/// continues.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_21_a_database_that_hangs_for_longer_than_the_lease() {
    let mut server = PostgresServer::start().await;
    let (store, place) = InPostgres::at(&server.create_database().await).await;
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let node = Node::start(store.clone(), None, FeedOptions::new(), publishing()).await;
        let writes = Writes::new(place.clone(), "hangs");
        let handle = node.projection(writes, place.model().await, short_lived()).await;
        nodes.push((node, handle));
    }
    let head = append(&store, 0, 0..20).await;
    let stop = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn({
        let (store, stop) = (store.clone(), stop.clone());
        async move {
            while !stop.load(Ordering::SeqCst) {
                append(&store, 1, [1]).await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    join_all(nodes.iter().map(|(_, handle)| catch_up(handle, head))).await;
    for _ in 0..2 {
        let owns = |handle: &storied::ProjectionHandle| handle.status().epoch > 0;
        eventually("a node owns it", || nodes.iter().any(|(_, handle)| owns(handle))).await;
        server.pause();
        eventually("no node claims the ownership any more", || nodes.iter().all(|(_, handle)| !owns(handle)))
            .await;
        server.resume();
    }
    stop.store(true, Ordering::SeqCst);
    load.await.unwrap();
    let head = store.high_water_mark().await.unwrap();
    join_all(nodes.iter().map(|(_, handle)| catch_up(handle, head))).await;
    let seen = place.seen("hangs").await;
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), seen.len(), "twice");
    assert_eq!(seen, log(&store, &Filter::all()).await);
    for (node, _) in nodes {
        node.stop(PATIENCE).await.unwrap();
    }
}
