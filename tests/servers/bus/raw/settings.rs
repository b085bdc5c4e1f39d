//! Effects of single consumer settings.

use std::time::Duration;

use chrono::Utc;
use storied::bus::{BusError, ConsumerOptions, StartFrom, SubscribeOptions};

use super::common::*;
use super::*;

fn consumer(options: ConsumerOptions) -> SubscribeOptions {
    SubscribeOptions::new().consumer(options)
}

/// Acknowledged without a confirmation: the server redelivers an event whose ack is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledging_without_waiting() {
    let (bus, mut server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    let options =
        ConsumerOptions::durable_as("hurries").ack_wait(Duration::from_millis(700)).double_ack(false);
    let mut subscriber = listen(&bus, &["*"], consumer(options)).await;
    press.written(200).await;
    take(&mut subscriber, 200).await;
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let floor = async || {
        let stream = context.get_stream("STORIED_EVENTS").await.unwrap();
        stream.consumer_info("hurries").await.unwrap().ack_floor.stream_sequence
    };
    let give_up = tokio::time::Instant::now() + PATIENCE;
    while floor().await < 200 {
        assert!(tokio::time::Instant::now() < give_up, "never settled");
        pause(10).await;
    }
    assert_eq!(subscriber.stats().redelivered, 0);
    // An ack on a connection that dies: the event is redelivered.
    let last = press.written(1).await;
    let unheard = delivery(&mut subscriber).await;
    server.pause();
    unheard.ack().await.unwrap();
    server.kill();
    server.restart().await;
    // Perhaps with other events: a killed server loses its last acks.
    while delivery(&mut subscriber).await.event().position != last[0].position {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unacknowledged_deliveries_are_bounded() {
    for push in [false, true] {
        let (bus, server) = Way::Durable.start().await;
        let mut press = Press::new(&bus).await;
        let options = ConsumerOptions::durable_as("few").max_ack_pending(3);
        let options = if push { options.push() } else { options };
        let mut subscriber = listen(&bus, &["*"], consumer(options)).await;
        let printed = press.written(20).await;
        let mut out = Vec::new();
        for _ in 0..3 {
            out.push(delivery(&mut subscriber).await);
        }
        nothing(&mut subscriber, 300).await;
        let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
        let stream = context.get_stream("STORIED_EVENTS").await.unwrap();
        assert_eq!(stream.consumer_info("few").await.unwrap().num_ack_pending, 3, "push: {push}");
        // Each acknowledgement frees one slot.
        out.remove(0).ack().await.unwrap();
        let fourth = delivery(&mut subscriber).await;
        same(&[fourth.event().clone()], &printed[3..4]);
        nothing(&mut subscriber, 100).await;
        for delivery in out.into_iter().chain([fourth]) {
            delivery.ack().await.unwrap();
        }
        same(&take(&mut subscriber, 16).await, &printed[4..]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starts_at_a_time_or_with_the_last_of_each_name() {
    let (bus, _server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    press.written(10).await;
    press.events(1, &[Note::Torn]).await;
    pause(50).await;
    let time = Utc::now();
    pause(50).await;
    let printed = press.written(5).await;
    for options in [ConsumerOptions::ephemeral(), ConsumerOptions::durable("later")] {
        let mut later = listen(&bus, &["*"], consumer(options.start(StartFrom::Time(time)))).await;
        same(&take(&mut later, 5).await, &printed);
        nothing(&mut later, 10).await;
    }
    for (options, names) in [
        (ConsumerOptions::ephemeral(), &["*"][..]),
        (ConsumerOptions::durable("last"), &["note.torn", "note.written"]),
    ] {
        let mut last = listen(&bus, names, consumer(options.start(StartFrom::LastOfEach))).await;
        let taken = take(&mut last, 2).await;
        assert_eq!([taken[0].name.as_str(), taken[1].name.as_str()], ["note.torn", "note.written"]);
        assert_eq!(taken[1].position, printed[4].position);
        nothing(&mut last, 10).await;
    }
    let far = StartFrom::Time(chrono::DateTime::<Utc>::MAX_UTC);
    let error = bus.subscribe(["*"], consumer(ConsumerOptions::ephemeral().start(far))).await.unwrap_err();
    assert!(matches!(&error, BusError::Incompatible { reason } if reason.contains("start at")), "{error}");
}
