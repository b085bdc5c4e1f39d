//! Consumers after the loss of their server, their stream or themselves, and consumers that differ.

use std::collections::BTreeSet;
use std::time::Duration;

use storied::bus::{
    BusError, ConsumerOptions, Gap, JetStreamOptions, NatsOptions, ProvisionPolicy, SubscribeOptions,
};

use super::common::*;
use super::*;
use crate::support::{self, NatsServer};

fn durable(options: ConsumerOptions) -> SubscribeOptions {
    SubscribeOptions::new().consumer(options.ack_wait(Duration::from_millis(500)))
}

/// Reads and acknowledges until every given event has arrived; returns the gaps.
/// The server may never receive an ack before an outage, or its answer may be lost. Only the
/// arrival counts.
async fn until_all(subscription: &mut Subscription, printed: &[RecordedEvent]) -> Vec<Gap> {
    let mut missing: BTreeSet<_> = printed.iter().map(|event| event.position).collect();
    let mut gaps = Vec::new();
    while !missing.is_empty() {
        match received(subscription).await {
            Received::Event(delivery) => {
                missing.remove(&delivery.event().position);
                let _ = delivery.ack().await;
            }
            Received::Gap(gap) => gaps.push(gap),
            other => panic!("{other:?}"),
        }
    }
    gaps
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_loses_nothing_when_its_server_is_killed() {
    for way in [Way::Ephemeral, Way::Durable, Way::Push, Way::DurableQueue, Way::PushQueue, Way::Queue] {
        let (bus, mut server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let soon = |consumer: ConsumerOptions| consumer.ack_wait(Duration::from_millis(500));
        let mut subscriber = listen(&bus, &["*"], way.options_with("x", soon)).await;
        let mut printed = press.written(300).await;
        // Not always the first hundred: deliveries that waited too long were returned, and arrive
        // after the rest.
        let taken: BTreeSet<_> =
            take(&mut subscriber, 100).await.iter().map(|event| event.position).collect();
        server.kill();
        server.restart().await;
        // The publisher finds the end of the log stream, as after every outage.
        let mut again = loop {
            let other = options(Kind::JetStream, &server).bus();
            if let Ok(mut publisher) = other.publisher_of(&press).await
                && publisher.resume(storied::bus::LogStreamEnd::default()).await.is_ok()
            {
                break publisher;
            }
            pause(50).await;
        };
        let head = press.store.high_water_mark().await.unwrap();
        write(&press.store, 0, 100).await;
        for batch in batches(&press.store, head, 300).await {
            printed.extend_from_slice(&batch.events);
            again.publish(batch).await.unwrap();
        }
        printed.retain(|event| !taken.contains(&event.position));
        until_all(&mut subscriber, &printed).await;
    }
}

trait PublisherOf {
    async fn publisher_of(&self, press: &Press) -> Result<Box<dyn BusPublisher>, BusError>;
}

impl PublisherOf for NatsBus {
    async fn publisher_of(&self, press: &Press) -> Result<Box<dyn BusPublisher>, BusError> {
        storied::EventBus::publisher(self, press.store.info().id).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_consumer_is_recreated_and_continues() {
    for way in [Way::Ephemeral, Way::Durable, Way::Push, Way::DurableQueue, Way::PushQueue, Way::Queue] {
        let (bus, server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let mut subscriber = listen(&bus, &["note.written"], way.options("x")).await;
        press.written(50).await;
        take(&mut subscriber, 50).await;
        let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
        let stream = jetstream.get_stream("STORIED_EVENTS").await.unwrap();
        let names: Vec<String> =
            futures_util::TryStreamExt::try_collect(stream.consumer_names()).await.unwrap();
        stream.delete_consumer(&names[0]).await.unwrap();
        let printed = press.written(50).await;
        let gaps = until_all(&mut subscriber, &printed).await;
        assert!(
            matches!(&gaps[..], [Gap::Consumer { reason }] if reason.contains("deleted")),
            "{way:?} {gaps:?}"
        );
        assert!(subscriber.stats().errors >= 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_stream_is_followed_from_its_new_start() {
    let (bus, mut server) = Way::Durable.start().await;
    let store = store();
    let node = Recording::start(&store, bus.clone(), blind()).await;
    let mut subscriber = listen(&bus, &["*"], durable(ConsumerOptions::durable("x"))).await;
    write(&store, 0, 100).await;
    until_all(&mut subscriber, &events(&store, Position::START).await).await;
    server.stop().await;
    server.wipe();
    server.restart().await;
    write(&store, 0, 100).await;
    let gaps = until_all(&mut subscriber, &events(&store, Position::START).await).await;
    assert!(!gaps.is_empty(), "it is said");
    node.node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_deleted_by_the_stream_are_a_gap() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    // Room for about 100 events.
    let small = JetStreamOptions::new().max_bytes(60_000);
    let bus = quick(NatsOptions::jetstream(small).url(server.url())).bus();
    let mut press = Press::new(&bus).await;
    let options = || durable(ConsumerOptions::durable("x"));
    let mut subscriber = listen(&bus, &["*"], options()).await;
    press.written(10).await;
    take(&mut subscriber, 10).await;
    subscriber.close(PATIENCE).await.unwrap();
    // While no reader is active.
    press.written(1_000).await;
    let mut subscriber = listen(&bus, &["*"], options()).await;
    let Received::Gap(Gap::Consumer { reason }) = received(&mut subscriber).await else { panic!("a gap") };
    assert!(reason.contains("limits"), "{reason}");
    let next = delivery(&mut subscriber).await;
    assert!(next.previous() > Position::new(10), "{}", next.previous());
    next.ack().await.unwrap();

    // With a reader that is too slow for the stream.
    let small = durable(ConsumerOptions::durable("slow").max_ack_pending(1));
    let mut slow = listen(&bus, &["*"], small).await;
    let first = delivery(&mut slow).await;
    press.written(1_000).await;
    first.ack().await.unwrap();
    loop {
        match received(&mut slow).await {
            Received::Event(delivery) => delivery.ack().await.unwrap(),
            Received::Gap(Gap::Consumer { reason }) => {
                assert!(reason.contains("limits"), "{reason}");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_different_consumer_is_left_alone_unless_configured() {
    let (bus, server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    press.written(5).await;
    let with = |policy, wait| {
        let options =
            ConsumerOptions::durable_as("my.consumer").policy(policy).ack_wait(Duration::from_secs(wait));
        SubscribeOptions::new().consumer(options)
    };
    let error =
        bus.subscribe(["note.written"], with(ProvisionPolicy::RequireExisting, 30)).await.unwrap_err();
    assert!(matches!(&error, BusError::Incompatible { reason } if reason.contains("no consumer")), "{error}");
    let first = listen(&bus, &["note.written"], with(ProvisionPolicy::CreateOrVerify, 30)).await;
    drop(first);
    listen(&bus, &["note.written"], with(ProvisionPolicy::RequireExisting, 30)).await;
    // Another filter and another wait: named in the error, and left unchanged.
    for (names, wait, field) in [("note.torn", 30, "filter_subjects"), ("note.written", 7, "ack_wait")] {
        let error = bus.subscribe([names], with(ProvisionPolicy::CreateOrVerify, wait)).await.unwrap_err();
        assert!(matches!(&error, BusError::Incompatible { reason } if reason.contains(field)), "{error}");
    }
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let stream = jetstream.get_stream("STORIED_EVENTS").await.unwrap();
    let config = stream.consumer_info("my_consumer").await.unwrap().config;
    assert_eq!(
        (config.filter_subject.as_str(), config.ack_wait.as_secs()),
        ("storied.events.note.written", 30)
    );
    let mut changed = listen(&bus, &["note.*"], with(ProvisionPolicy::CreateOrUpdate, 7)).await;
    assert_eq!(take(&mut changed, 5).await.len(), 5);
    let config = stream.consumer_info("my_consumer").await.unwrap().config;
    assert_eq!((config.filter_subject.as_str(), config.ack_wait.as_secs()), ("storied.events.note.*", 7));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_start_one_consumer_at_once() {
    for way in [Way::DurableQueue, Way::Queue, Way::PushQueue] {
        let (_, server) = way.start().await;
        let starts = (0..16).map(|_| {
            let bus = options(way.kind(), &server).bus();
            tokio::spawn(async move { listen(&bus, &["note.written"], way.options("x")).await })
        });
        for start in starts.collect::<Vec<_>>() {
            start.await.unwrap().close(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_subscriber_creates_the_stream_for_any_store() {
    let (bus, _server) = Way::Durable.start().await;
    let mut early = listen(&bus, &["*"], durable(ConsumerOptions::durable("x"))).await;
    let mut press = Press::new(&bus).await;
    let printed = press.written(3).await;
    same(&take(&mut early, 3).await, &printed);
    // From then on, the stream belongs to that store.
    let other = store();
    let mut publisher = storied::EventBus::publisher(&bus, other.info().id).await.unwrap();
    let error = publisher.resume(storied::bus::LogStreamEnd::default()).await.unwrap_err();
    assert!(error.to_string().contains("another store"), "{error}");
}
