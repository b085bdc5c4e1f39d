//! Promises of every way to subscribe.

use std::collections::BTreeSet;
use std::time::Duration;

use storied::bus::{BusError, NatsOptions, SubscribeOptions};

use super::common::*;
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_subscriber_gets_exactly_its_events() {
    for way in WAYS {
        let (bus, _server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let mut subscribers = Vec::new();
        for n in 0..10 {
            subscribers.push(listen(&bus, &["note.written"], way.options(&format!("reader-{n}"))).await);
        }
        press.events(1, &[Note::Torn]).await;
        let written = press.written(3).await;
        for subscriber in &mut subscribers {
            same(&take(subscriber, 3).await, &written);
        }
        for subscriber in &mut subscribers {
            nothing(subscriber, 5).await;
            assert_eq!((subscriber.stats().taken, subscriber.stats().dropped), (3, 0), "{way:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_names_and_wildcards_in_log_order() {
    for way in WAYS {
        let (bus, _server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let shared = matches!(way, Way::Queue | Way::CoreQueue | Way::DurableQueue | Way::PushQueue);
        for (n, names) in [&["note.written", "note.torn"][..], &["note.*"], &["*"], &["note.>", "note.torn"]]
            .iter()
            .enumerate()
        {
            // Over several queue groups, names have no common order.
            if shared && n == 0 {
                continue;
            }
            let mut subscriber = listen(&bus, names, way.options(&format!("n{n}"))).await;
            let before = events(&press.store, Position::START).await.len();
            let mixed: Vec<_> = (0..100)
                .map(|n| if n % 3 == 0 { Note::Torn } else { Note::Written { n, text: "x".into() } })
                .collect();
            let printed = press.events(2, &mixed).await;
            let skip = if matches!(way, Way::Durable | Way::Push | Way::DurableQueue | Way::PushQueue) {
                before
            } else {
                0
            };
            let taken = take(&mut subscriber, printed.len() + skip).await;
            same(&taken[skip..], &printed);
            let decoded: Vec<Note> = taken[skip..].iter().map(|event| event.decode().unwrap()).collect();
            assert_eq!(decoded, mixed, "{way:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_a_group_share_and_each_event_reaches_one() {
    for way in [Way::CoreQueue, Way::Queue, Way::DurableQueue, Way::PushQueue] {
        let (bus, server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let mut members = Vec::new();
        for _ in 0..5 {
            // As five instances of a service: each with its own connection.
            let bus = options(way.kind(), &server).bus();
            let options = way.options("shipping").capacity(if way == Way::CoreQueue { 4_000 } else { 64 });
            members.push(tokio::spawn(async move {
                let mut member = listen(&bus, &["note.written"], options).await;
                let mut seen = Vec::new();
                while let Ok(Some(next)) = timeout(Duration::from_millis(1_000), member.next()).await {
                    let Received::Event(delivery) = next else { panic!("{next:?}") };
                    delivery.ack().await.unwrap();
                    seen.push(delivery.event().position);
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
                assert_eq!(member.stats().dropped, 0);
                seen
            }));
        }
        pause(300).await;
        let printed = press.written(500).await;
        let mut all = Vec::new();
        for member in members {
            let seen = member.await.unwrap();
            assert!(!seen.is_empty(), "{way:?}: a member without work");
            all.extend(seen);
        }
        assert_eq!(all.len(), printed.len(), "{way:?}: each once");
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), printed.len(), "{way:?}: each once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_that_stops_or_never_reads_harms_no_other() {
    for way in WAYS {
        let (bus, _server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let mut healthy = listen(&bus, &["note.written"], way.options("healthy")).await;
        let deaf = listen(&bus, &["note.written"], way.options("deaf").capacity(10)).await;
        for round in 0..10 {
            let gone = listen(&bus, &["note.written"], way.options(&format!("gone-{round}"))).await;
            let printing = tokio::spawn(async move {
                press.written(50).await;
                press
            });
            drop(gone);
            press = printing.await.unwrap();
            assert_eq!(take(&mut healthy, 50).await.len(), 50, "{way:?}");
        }
        // Over Core, events above the capacity are lost. A pull consumer requests no more than the
        // capacity; a push consumer is limited by max_ack_pending.
        let (room, lost) = match way {
            Way::Core | Way::CoreQueue => (10, 490),
            Way::Push | Way::PushQueue => (500, 0),
            _ => (10, 0),
        };
        eventually("full", || deaf.stats().waiting == room && deaf.stats().dropped == lost).await;
        pause(50).await;
        assert_eq!((deaf.stats().waiting, deaf.stats().dropped), (room, lost), "{way:?}");
        // It ends in order, although it never read.
        deaf.close(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_subscriptions_are_refused_at_once() {
    let nowhere = NatsOptions::core().url("nats://127.0.0.1:1").bus();
    let error = nowhere.subscribe(["note.*"], SubscribeOptions::new()).await.unwrap_err();
    assert!(matches!(error, BusError::Unavailable { .. }), "{error}");
    for names in [&["a b"][..], &[""], &[], &["a.>.b"], &["a.*.c", "a.b.*"]] {
        let error = nowhere.subscribe(names, SubscribeOptions::new()).await.unwrap_err();
        assert!(matches!(error, BusError::Incompatible { .. }), "{error}");
    }
    let consumer = SubscribeOptions::new().consumer(storied::bus::ConsumerOptions::durable("x"));
    let error = nowhere.subscribe(["*"], consumer).await.unwrap_err();
    assert!(error.to_string().contains("JetStream driver"), "{error}");
    let error = nowhere.subscribe(["*"], SubscribeOptions::new().queue_group("a b")).await.unwrap_err();
    assert!(error.to_string().contains("queue group"), "{error}");
}
