//! Over Core: at most once, with reported losses.

use std::time::Duration;

use storied::bus::{Gap, SubscribeOptions, SubscriptionError};
use tokio::time::Instant;

use super::common::*;
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_events_expire_with_an_error_and_the_next_arrives() {
    let (bus, _server) = Way::Core.start().await;
    let mut press = Press::new(&bus).await;
    let options = SubscribeOptions::new().pull_timeout(Duration::from_millis(100));
    let mut subscriber = listen(&bus, &["note.written"], options).await;
    let mut errors = subscriber.errors();
    let late = press.written(1).await;
    match error(&mut errors).await {
        SubscriptionError::PullTimeout { event, position, timeout } => {
            assert_eq!(
                (event.as_str(), position, timeout.as_millis()),
                ("note.written", late[0].position, 100)
            );
        }
        other => panic!("{other}"),
    }
    nothing(&mut subscriber, 10).await;
    let next = press.written(1).await;
    same(&take(&mut subscriber, 1).await, &next);
    assert_eq!((subscriber.stats().dropped, subscriber.stats().errors), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_errors_block_nothing() {
    for eat in [false, true] {
        let (bus, server) = Way::Core.start().await;
        let mut press = Press::new(&bus).await;
        let options = SubscribeOptions::new();
        let options = if eat { options.discard_errors() } else { options };
        let mut subscriber = listen(&bus, &["note.written"], options).await;
        let raw = async_nats::connect(server.url()).await.unwrap();
        for _ in 0..1_000 {
            raw.publish("storied.events.note.written", "\u{ff}garbage".into()).await.unwrap();
        }
        raw.flush().await.unwrap();
        let good = press.written(10).await;
        same(&take(&mut subscriber, 10).await, &good);
        // The events came over another connection, perhaps later.
        eventually("garbage", || subscriber.stats().errors == 1_000).await;
        let mut errors = subscriber.errors();
        if eat {
            drop(subscriber);
            assert!(timeout(PATIENCE, errors.next()).await.unwrap().is_none());
        } else {
            assert_eq!(subscriber.stats().errors_lost, 1_000 - 256);
            let SubscriptionError::Malformed { subject, .. } = error(&mut errors).await else { panic!() };
            assert_eq!(subject, "storied.events.note.written");
        }
    }
}

/// A gap before an event does not expire.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_after_a_gap_expire_in_time() {
    let (bus, mut server) = Way::Core.start().await;
    let mut press = Press::new(&bus).await;
    let options = SubscribeOptions::new().pull_timeout(Duration::from_millis(100));
    let mut subscriber = listen(&bus, &["note.written"], options).await;
    server.restart().await;
    let mut errors = subscriber.errors();
    let SubscriptionError::Gap(Gap::Reconnected) = error(&mut errors).await else { panic!("a gap") };
    let late = press.written(1).await;
    match error(&mut errors).await {
        SubscriptionError::PullTimeout { position, .. } => assert_eq!(position, late[0].position),
        other => panic!("{other}"),
    }
    let Received::Gap(Gap::Reconnected) = received(&mut subscriber).await else { panic!("the gap") };
    nothing(&mut subscriber, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_a_gap_with_the_lost_count() {
    let (bus, _server) = Way::Core.start().await;
    let mut press = Press::new(&bus).await;
    let mut subscriber = listen(&bus, &["note.written"], SubscribeOptions::new().capacity(100)).await;
    let printed = press.written(1_000).await;
    eventually("all came", || subscriber.stats().received == 1_000).await;
    same(&take(&mut subscriber, 100).await, &printed[..100]);
    let Received::Gap(gap) = received(&mut subscriber).await else { panic!("a gap") };
    assert_eq!(gap, Gap::Overflow { lost: 900 });
    let next = press.written(1).await;
    same(&take(&mut subscriber, 1).await, &next);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_a_gap_and_recovers_by_itself() {
    let (bus, mut server) = Way::Core.start().await;
    let mut press = Press::new(&bus).await;
    let mut subscriber = listen(&bus, &["*"], SubscribeOptions::new()).await;
    let before = press.written(5).await;
    same(&take(&mut subscriber, 5).await, &before);
    server.restart().await;
    let Received::Gap(gap) = received(&mut subscriber).await else { panic!("a gap") };
    assert_eq!(gap, Gap::Reconnected);
    let after = press.written(5).await;
    let taken = take(&mut subscriber, 5).await;
    same(&taken, &after);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribed_before_the_server_is_there() {
    for way in [Way::Core, Way::Ephemeral, Way::Durable] {
        let (bus, mut server) = way.start().await;
        server.stop().await;
        let mut subscriber = listen(&bus, &["note.written"], way.options("early").lazy()).await;
        let mut errors = subscriber.errors();
        let SubscriptionError::Interrupted(_) = error(&mut errors).await else { panic!("no server") };
        server.restart().await;
        // A lazy subscription reports only failures; one that is not lazy confirms its start.
        let other = options(way.kind(), &server).bus();
        let start = Instant::now();
        let mut press = Press::new(&other).await;
        loop {
            assert!(start.elapsed() < PATIENCE, "{way:?}");
            press.written(1).await;
            if timeout(Duration::from_millis(50), subscriber.next()).await.is_ok() {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_bus_ends_its_subscriptions() {
    for way in WAYS {
        let (bus, _server) = way.start().await;
        let mut subscriber = listen(&bus, &["note.written"], way.options("x")).await;
        let mut errors = subscriber.errors();
        bus.disconnect().await;
        assert!(timeout(PATIENCE, subscriber.next()).await.unwrap().is_none(), "{way:?}");
        while timeout(PATIENCE, errors.next()).await.unwrap().is_some() {}
    }
}
