//! Over the log stream: at least once, after the death of any process.

use std::time::Duration;

use storied::bus::{AckError, ConsumerOptions, StartFrom, SubscribeOptions};
use tokio::time::Instant;

use super::common::*;
use super::*;

fn durable(options: ConsumerOptions) -> SubscribeOptions {
    SubscribeOptions::new().consumer(options)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn durable_gets_all_events_and_ephemeral_only_new_ones() {
    for way in [Way::Ephemeral, Way::Queue, Way::Durable, Way::DurableQueue, Way::Push, Way::PushQueue] {
        let (bus, server) = way.start().await;
        let mut press = Press::new(&bus).await;
        press.written(5).await;
        let mut subscriber = listen(&bus, &["note.written"], way.options("x")).await;
        press.written(5).await;
        let durable = !matches!(way, Way::Ephemeral | Way::Queue);
        let expected = if durable { 10 } else { 5 };
        assert_eq!(take(&mut subscriber, expected).await.len(), expected);
        nothing(&mut subscriber, 20).await;
        subscriber.close(PATIENCE).await.unwrap();
        let raw = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
        let mut stream = raw.get_stream("STORIED_EVENTS").await.unwrap();
        // No reader of a shared ephemeral consumer knows that it is the last: the consumer expires.
        let left = if way == Way::Ephemeral { 0 } else { 1 };
        assert_eq!(stream.info().await.unwrap().state.consumer_count, left, "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_continues_after_both_sides_were_away() {
    for way in [Way::Durable, Way::DurableQueue, Way::Push, Way::PushQueue] {
        // A restarted server forgets naks, and waits until `ack_wait` is over.
        let soon = |consumer: ConsumerOptions| consumer.ack_wait(Duration::from_millis(500));
        let (bus, mut server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let printed = press.written(100).await;
        let mut subscriber = listen(&bus, &["note.written"], way.options_with("x", soon)).await;
        same(&take(&mut subscriber, 50).await, &printed[..50]);
        subscriber.close(PATIENCE).await.unwrap();
        bus.disconnect().await;
        server.restart().await;
        bus.connect().await.unwrap();
        let mut subscriber = listen(&bus, &["note.written"], way.options_with("x", soon)).await;
        same(&take(&mut subscriber, 50).await, &printed[50..]);
        nothing(&mut subscriber, 20).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_acknowledgement_has_its_effect() {
    let (bus, _server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    let wait = Duration::from_millis(600);
    let options = durable(ConsumerOptions::durable("x").ack_wait(wait));
    let mut subscriber = listen(&bus, &["note.written"], options).await;

    // No acknowledgement: redelivered after ack_wait.
    let printed = press.written(1).await;
    let start = Instant::now();
    let first = delivery(&mut subscriber).await;
    assert_eq!((first.attempt(), first.stream_sequence()), (1, Some(1)));
    let second = delivery(&mut subscriber).await;
    assert!(start.elapsed() >= wait - Duration::from_millis(50), "{:?}", start.elapsed());
    assert_eq!((second.attempt(), second.stream_sequence()), (2, Some(1)));
    // nak: redelivered at once.
    let start = Instant::now();
    second.nak().await.unwrap();
    assert!(matches!(second.ack().await, Err(AckError::Settled)), "once");
    let third = delivery(&mut subscriber).await;
    assert!(start.elapsed() < wait / 2, "{:?}", start.elapsed());
    // nak_with_delay: redelivered after the delay.
    let start = Instant::now();
    third.nak_with_delay(Duration::from_millis(300)).await.unwrap();
    let fourth = delivery(&mut subscriber).await;
    assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
    assert_eq!(fourth.attempt(), 4);
    // in_progress: not redelivered while it is repeated.
    for _ in 0..5 {
        pause(250).await;
        fourth.in_progress().await.unwrap();
    }
    assert_eq!(subscriber.stats().received, 4);
    // ack: never redelivered.
    fourth.ack().await.unwrap();
    same(&[fourth.into_event()], &printed);
    // term: never redelivered either.
    press.written(1).await;
    delivery(&mut subscriber).await.term().await.unwrap();
    nothing(&mut subscriber, 900).await;
    assert_eq!((subscriber.stats().received, subscriber.stats().redelivered), (5, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_have_a_maximum_size() {
    for way in WAYS {
        let (bus, _server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let mut subscriber = listen(&bus, &["note.written"], way.options("x")).await;
        press.written(25).await;
        eventually("all came", || subscriber.stats().received == 25).await;
        for expected in [10, 10, 5, 0] {
            let start = Instant::now();
            let batch = subscriber.fetch(10, Duration::from_millis(100)).await;
            assert_eq!(batch.len(), expected, "{way:?}");
            assert_eq!(start.elapsed() >= Duration::from_millis(100), expected < 10, "{way:?}");
            for delivery in batch {
                delivery.ack().await.unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn undecodable_messages_are_not_redelivered() {
    let (bus, server) = Way::Durable.start().await;
    let options = durable(ConsumerOptions::durable("x").ack_wait(Duration::from_millis(100)));
    let _press = Press::new(&bus).await;
    let mut subscriber = listen(&bus, &["note.written"], options).await;
    let raw = async_nats::connect(server.url()).await.unwrap();
    let mut advisories = raw.subscribe("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>").await.unwrap();
    raw.publish("storied.events.note.written", "garbage".into()).await.unwrap();
    let SubscriptionError::Malformed { reason, .. } = error(&mut subscriber.errors()).await else { panic!() };
    assert!(reason.contains("header"), "{reason}");
    let advisory = timeout(PATIENCE, futures_util::StreamExt::next(&mut advisories)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&advisory.payload).contains("\"deliveries\":1"));
    nothing(&mut subscriber, 300).await;
    assert_eq!(subscriber.stats().errors, 1);
}

/// Foreign messages in the log stream are errors. A publisher has to find its end again after them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_errors_block_no_consumer() {
    for way in [Way::Ephemeral, Way::Durable, Way::Push, Way::DurableQueue] {
        let (bus, server) = way.start().await;
        let press = Press::new(&bus).await;
        let mut subscriber = listen(&bus, &["note.written"], way.options("x")).await;
        let raw = async_nats::connect(server.url()).await.unwrap();
        for round in 1..=3 {
            for _ in 0..200 {
                raw.publish("storied.events.note.written", "garbage".into()).await.unwrap();
            }
            raw.flush().await.unwrap();
            let before = press.store.high_water_mark().await.unwrap();
            write(&press.store, 0, 10).await;
            eventually("garbage", || subscriber.stats().errors == 200 * round).await;
            let mut publisher = publisher(&bus, &press.store).await;
            for batch in batches(&press.store, before, 10).await {
                publisher.publish(batch).await.unwrap();
            }
            same(&take(&mut subscriber, 10).await, &events(&press.store, before).await);
        }
        let stats = subscriber.stats();
        assert_eq!((stats.errors, stats.errors_lost, stats.redelivered), (600, 600 - 256, 0), "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_confirmed_ack_fails_when_the_server_hangs() {
    let (bus, mut server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    let with = |name: &str| ConsumerOptions::durable(name).ack_wait(Duration::from_millis(500));
    let mut waits = listen(&bus, &["note.written"], durable(with("waits"))).await;
    let mut hurries = listen(&bus, &["note.written"], durable(with("hurries").double_ack(false))).await;
    press.written(1).await;
    let (waiting, hurrying) = (delivery(&mut waits).await, delivery(&mut hurries).await);
    server.pause();
    hurrying.ack().await.unwrap();
    assert!(matches!(waiting.ack().await, Err(AckError::Bus(_))));
    server.resume();
    // The ack was not confirmed: it can be repeated, or the event is redelivered.
    while waiting.ack().await.is_err() {
        pause(20).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_start_where_configured() {
    let (bus, _server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    let printed = press.written(10).await;
    for (from, behind) in [
        (StartFrom::Beginning, 0),
        (StartFrom::Sequence(4), 3),
        (StartFrom::Sequence(10), 9),
        (StartFrom::New, 10),
    ] {
        for consumer in [ConsumerOptions::ephemeral(), ConsumerOptions::durable(format!("from-{behind}"))] {
            let mut subscriber = listen(&bus, &["note.*"], durable(consumer.start(from))).await;
            same(&take(&mut subscriber, printed.len() - behind).await, &printed[behind..]);
            nothing(&mut subscriber, 10).await;
        }
    }
}
