//! Promises of every bus, and failures that only a bus over NATS can have.

use std::sync::Arc;

use storied::bus::{BusError, BusItem, BusState, NatsBus, NatsOptions, SubscribeOptions};
use storied::{EventBus, EventStore, MemoryStore, Position, PublisherState};
use tokio::time::timeout;

use crate::bus::fixtures::*;
use crate::bus::raw::{listen, take};
use crate::support::FaultyStore;
use crate::support::{self, NatsServer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_subscriber_receives_the_log_in_order_without_gaps() {
    for (kind, bus, _server) in nats().await {
        let store = store();
        let mut feeds = vec![subscribe(&bus, &store).await, subscribe(&bus, &store).await];
        let options = || SubscribeOptions::new().capacity(2_048);
        let mut readers = [listen(&bus, &["*"], options()).await, listen(&bus, &["*"], options()).await];
        for stream in 0..20 {
            write(&store, stream, 1 + stream * 7).await;
        }
        let head = store.high_water_mark().await.unwrap();
        let mut publisher = publisher(&bus, &store).await;
        for batch in batches(&store, Position::START, 300).await {
            let upto = batch.upto;
            let end = timeout(PATIENCE, publisher.publish(batch)).await.unwrap().unwrap();
            assert_eq!(end.position, upto, "{kind:?}");
        }
        let log = events(&store, Position::START).await;
        for reader in &mut readers {
            same(&take(reader, log.len()).await, &log);
        }
        for feed in &mut feeds {
            wakes(feed, head).await;
        }
        let later = Position::new(head.get() + 1);
        publisher.heartbeat(later).await.unwrap();
        for feed in &mut feeds {
            assert_eq!(next(feed).await, BusItem::Upto(later), "{kind:?}");
        }
        assert!(matches!(bus.state(), BusState::Connected { .. }), "{kind:?}: {:?}", bus.state());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_miss_no_event_after_subscribing() {
    for (_, bus, _server) in nats().await {
        let store = store();
        write(&store, 0, 40).await;
        let mut publisher = publisher(&bus, &store).await;
        for batch in batches(&store, Position::START, 1).await {
            let upto = batch.upto;
            let mut subscription = subscribe(&bus, &store).await;
            publisher.publish(batch).await.unwrap();
            wakes(&mut subscription, upto).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_a_gap_and_blocks_no_other() {
    let store = store();
    write(&store, 0, 3_000).await;
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    for kind in NATS {
        let small = options(kind, &server).subscription_capacity(100).bus();
        let bus = options(kind, &server).bus();
        let mut slow = subscribe(&small, &store).await;
        let mut quick = subscribe(&bus, &store).await;
        let mut publisher = publisher(&bus, &store).await;
        for batch in batches(&store, Position::START, 300).await {
            let upto = batch.upto;
            publisher.publish(batch).await.unwrap();
            wakes(&mut quick, upto).await;
        }
        while next(&mut slow).await != BusItem::Gap {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_start_of_many_nodes_at_once() {
    for (kind, _, server) in nats().await {
        let store = store();
        let starts = (0..16).map(|_| {
            let (bus, store) = (options(kind, &server).bus(), store.clone());
            tokio::spawn(async move {
                let _publisher = publisher(&bus, &store).await;
                subscribe(&bus, &store).await;
            })
        });
        for start in starts.collect::<Vec<_>>() {
            start.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oversized_events_are_announced() {
    for kind in NATS {
        let config = vec!["max_payload: 8192".into()];
        let server =
            NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::jetstream() }).await;
        let bus = options(kind, &server).bus();
        let store = store();
        let mut subscription = subscribe(&bus, &store).await;
        append(&store, 0, vec![note(&store, 0, 10), note(&store, 1, 9_000)]).await;
        append(&store, 0, vec![note(&store, 2, 3_000)]).await;
        let mut publisher = publisher(&bus, &store).await;
        for batch in batches(&store, Position::START, 1).await {
            let upto = batch.upto;
            publisher.publish(batch).await.unwrap();
            wakes(&mut subscription, upto).await;
        }
        // A projection receives the oversized events from the store.
        let recording = Recording::start(&store, options(kind, &server).bus(), blind()).await;
        append(&store, 0, vec![note(&store, 1, 20_000)]).await;
        recording.reaches("large events", &store).await;
        recording.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_and_foreign_messages_are_ignored() {
    for (kind, bus, server) in nats().await {
        let (mine, theirs) = (store(), store());
        let mut subscription = subscribe(&bus, &mine).await;
        let raw = async_nats::connect(server.url()).await.unwrap();
        let nonsense = async || {
            for n in 0..1_000_u32 {
                let mut headers = async_nats::HeaderMap::new();
                for name in ["Storied-Wire", "Storied-Position", "Storied-Store"].iter().take(n as usize % 4)
                {
                    headers.insert(*name, "1");
                }
                let subject = ["storied.events.note.written", "storied.head"][n as usize % 2];
                raw.publish_with_headers(subject, headers, "\u{ff}nonsense".into()).await.unwrap();
            }
            raw.flush().await.unwrap();
        };
        if kind == Kind::Core {
            // The publisher would refuse a log stream with these messages.
            nonsense().await;
            // More than in the own log: these positions would be too high.
            write(&theirs, 0, 20).await;
            let mut publisher = publisher(&bus, &theirs).await;
            for batch in batches(&theirs, Position::START, 20).await {
                publisher.publish(batch).await.unwrap();
            }
        }
        let head = write(&mine, 0, 10).await;
        let mut publisher = publisher(&bus, &mine).await;
        for batch in batches(&mine, Position::START, 10).await {
            publisher.publish(batch).await.unwrap();
        }
        loop {
            match next(&mut subscription).await {
                BusItem::Upto(upto) if upto < head => {}
                item => break assert_eq!(item, BusItem::Upto(head), "{kind:?}"),
            }
        }

        // A running node survives malformed messages, also in its log stream.
        let recording = Recording::start(&mine, options(kind, &server).bus(), blind()).await;
        write(&mine, 0, 10).await;
        recording.reaches("before", &mine).await;
        if kind == Kind::Core {
            nonsense().await;
        } else {
            for _ in 0..20 {
                raw.publish("storied.events.note.written", "nonsense".into()).await.unwrap();
            }
        }
        write(&mine, 0, 10).await;
        recording.reaches("after malformed messages", &mine).await;
        let published = mine.high_water_mark().await.unwrap();
        eventually("published", || recording.node.publisher().published == Some(published)).await;
        recording.node.stop(PATIENCE).await.unwrap();
    }
}

/// Two services in one namespace. A second node of each is woken by the bus alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_another_store_on_the_same_bus_are_ignored() {
    let server = NatsServer::start(support::NatsOptions::core()).await;
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let inner = MemoryStore::new();
        let store: Arc<dyn EventStore> = Arc::new(inner.clone());
        let one = Recording::start(&store, options(Kind::Core, &server).bus(), blind()).await;
        eventually("publishing", || one.node.publisher().state == PublisherState::Publishing).await;
        let apart: Arc<dyn EventStore> = Arc::new(FaultyStore::apart(inner));
        let two = Recording::start(&apart, options(Kind::Core, &server).bus(), blind()).await;
        eventually("following", || two.node.feed().position.is_some()).await;
        nodes.push((store, one, two));
    }
    for n in 0..10 {
        // The positions of the second store are ahead.
        for (events, (store, _, two)) in [1, 3].into_iter().zip(&nodes) {
            let head = write(store, n, events).await;
            two.reaches("the own log", store).await;
            assert_eq!(two.node.feed().position, Some(head));
        }
    }
    for (store, one, two) in nodes {
        one.reaches("the end", &store).await;
        two.node.stop(PATIENCE).await.unwrap();
        one.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connects_on_first_use_and_recovers_from_a_failure() {
    for (kind, _, mut server) in nats().await {
        let bus = options(kind, &server).bus();
        assert_eq!(bus.state(), BusState::Idle);
        let store = store();
        server.stop().await;
        for _ in 0..2 {
            let Err(error) = EventBus::subscribe(&bus, store.info().id).await else {
                panic!("without a server")
            };
            assert!(matches!(error, BusError::Unavailable { .. }), "{error}");
            assert!(bus.connect().await.is_err());
        }
        assert!(matches!(bus.state(), BusState::Disconnected { .. }));
        server.restart().await;
        let mut subscription = subscribe(&bus, &store).await;
        bus.connect().await.unwrap();

        bus.disconnect().await;
        assert!(matches!(subscription.next().await, Err(BusError::Closed)));
        assert!(matches!(EventBus::subscribe(&bus, store.info().id).await, Err(BusError::Closed)));
        assert_eq!(bus.state(), BusState::Closed);
        bus.connect().await.unwrap();
        subscribe(&bus, &store).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_borrowed_connection_is_never_closed() {
    for (kind, _, server) in nats().await {
        let client = async_nats::connect(server.url()).await.unwrap();
        let bus = options(kind, &server).url("nats://127.0.0.1:1").client(client.clone()).bus();
        let store = store();
        let head = write(&store, 0, 10).await;
        let mut subscription = subscribe(&bus, &store).await;
        let mut publisher = publisher(&bus, &store).await;
        for batch in batches(&store, Position::START, 10).await {
            publisher.publish(batch).await.unwrap();
        }
        wakes(&mut subscription, head).await;
        bus.disconnect().await;
        assert!(matches!(subscription.next().await, Err(BusError::Closed)));
        assert!(matches!(publisher.heartbeat(head).await, Err(BusError::Closed)));
        client.publish("still", "open".into()).await.unwrap();
        client.flush().await.unwrap();
    }
}

#[test]
fn nothing_secret_is_printed() {
    let options = NatsOptions::core()
        .url("nats://ann:hidden1@localhost")
        .user_and_password("ann", "hidden2")
        .token("hidden3")
        .nkey("hidden4");
    let shown = format!("{options:?} {:?}", options.clone().bus());
    assert!(!shown.contains("hidden"), "{shown}");
    for wrong in ["nats://ann:hidden@:::", "ftp://ann:hidden@host"] {
        let bus = NatsBus::core(wrong);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(bus.connect()).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(matches!(error, BusError::Incompatible { .. }) && !shown.contains("hidden"), "{shown}");
    }
    for wrong in ["", "a b", "a..b", "*", "a.>"] {
        let error = NatsOptions::core().namespace(wrong).bus().check().unwrap_err().to_string();
        assert!(error.contains("NatsOptions::namespace"), "{wrong:?}: {error}");
    }
}
