//! Promises of every bus, and failures that only a bus over NATS can have.

use storied::bus::{BusError, BusItem, BusState, NatsBus, NatsOptions};
use storied::{EventBus, LocalBus, Position};
use tokio::time::timeout;

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_subscriber_receives_the_log_in_order_without_gaps() {
    for (kind, bus, _server) in buses().await {
        let store = store();
        let mut subscriptions = vec![subscribe(&*bus, &store).await, subscribe(&*bus, &store).await];
        for stream in 0..20 {
            write(&store, stream, 1 + stream * 7).await;
        }
        let head = store.high_water_mark().await.unwrap();
        let mut publisher = publisher(&*bus, &store).await;
        for batch in batches(&store, Position::START, 300).await {
            let upto = batch.upto;
            let end = timeout(PATIENCE, publisher.publish(batch)).await.unwrap().unwrap();
            assert_eq!(end.position, upto, "{kind:?}");
        }
        let log = events(&store, Position::START).await;
        for subscription in &mut subscriptions {
            same(&collect(subscription, Position::START, head).await, &log);
        }
        publisher.heartbeat(head).await.unwrap();
        for subscription in &mut subscriptions {
            assert!(
                matches!(next(subscription).await, BusItem::Head(position) if position == head),
                "{kind:?}"
            );
        }
        assert!(matches!(bus.state(), BusState::Connected { .. }), "{kind:?}: {:?}", bus.state());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_miss_no_event_after_subscribing() {
    for (_, bus, _server) in buses().await {
        let store = store();
        write(&store, 0, 40).await;
        let mut publisher = publisher(&*bus, &store).await;
        for batch in batches(&store, Position::START, 1).await {
            let (after, upto) = (batch.after, batch.upto);
            let mut subscription = subscribe(&*bus, &store).await;
            publisher.publish(batch).await.unwrap();
            assert_eq!(collect(&mut subscription, after, upto).await.len(), 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_a_gap_and_blocks_no_other() {
    let store = store();
    write(&store, 0, 3_000).await;
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    for kind in ALL {
        let buses: [Box<dyn EventBus>; 2] = match kind {
            Kind::Local => {
                let bus = LocalBus::with_capacity(4);
                [Box::new(bus.clone()), Box::new(bus)]
            }
            kind => {
                let slow = options(kind, &server).subscription_capacity(100).bus();
                [Box::new(slow), Box::new(options(kind, &server).bus())]
            }
        };
        let mut slow = subscribe(&*buses[0], &store).await;
        let mut quick = subscribe(&*buses[1], &store).await;
        let mut publisher = publisher(&*buses[1], &store).await;
        let mut at = Position::START;
        for batch in batches(&store, Position::START, 300).await {
            let upto = batch.upto;
            publisher.publish(batch).await.unwrap();
            assert!(!collect(&mut quick, at, upto).await.is_empty());
            at = upto;
        }
        while !matches!(next(&mut slow).await, BusItem::Gap) {}
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
        let large = append(&store, 0, vec![note(&store, 0, 10), note(&store, 1, 9_000)]).await;
        let head = append(&store, 0, vec![note(&store, 2, 3_000)]).await;
        let mut publisher = publisher(&bus, &store).await;
        for batch in batches(&store, Position::START, 10).await {
            publisher.publish(batch).await.unwrap();
        }
        let mut items = Vec::new();
        for _ in 0..3 {
            items.push(match next(&mut subscription).await {
                BusItem::Batch(batch) => ("events", batch.after.get(), batch.upto.get()),
                BusItem::Head(head) => ("head", 0, head.get()),
                other => panic!("{other:?}"),
            });
        }
        assert_eq!(items, [("events", 0, 1), ("head", 0, large.get()), ("events", large.get(), head.get())]);

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
            write(&theirs, 0, 10).await;
            let mut publisher = publisher(&bus, &theirs).await;
            for batch in batches(&theirs, Position::START, 10).await {
                publisher.publish(batch).await.unwrap();
            }
        }
        let head = write(&mine, 0, 10).await;
        let mut publisher = publisher(&bus, &mine).await;
        for batch in batches(&mine, Position::START, 10).await {
            publisher.publish(batch).await.unwrap();
        }
        same(&collect(&mut subscription, Position::START, head).await, &events(&mine, Position::START).await);

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
        collect(&mut subscription, Position::START, head).await;
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
        assert!(NatsOptions::core().namespace(wrong).is_err(), "{wrong:?}");
    }
}
