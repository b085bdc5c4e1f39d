//! Subjects of events in the publisher, the stream, the feed and raw subscriptions.

use std::num::NonZeroU16;

use futures_util::StreamExt;
use storied::bus::{BusError, ConsumerOptions, Subjects, SubscribeOptions};
use storied::{Event, Partition, Position, StreamId};
use tokio::time::timeout;

use crate::bus::fixtures::*;
use crate::bus::raw::{Press, listen, take};
use crate::support::{self, NatsServer};

/// A second category, to test the order between categories.
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Added { n: u64 },
}

impl Event for Line {
    const CATEGORY: &'static str = "shop.line";
}

fn mappings() -> Vec<(Subjects, &'static str, &'static [&'static str])> {
    let sixteen = NonZeroU16::new(16).unwrap();
    let custom = || {
        Subjects::custom(["v1.>", "old.note.*"], |name| match name {
            "note.torn" => "old.note.torn".into(),
            name => format!("v1.{}", name.replace('.', "-")),
        })
    };
    vec![
        (Subjects::new(), "storied.events.note.written", &["storied.events.>"]),
        (Subjects::prefix("events.").unwrap(), "events.note.written", &["events.>"]),
        (Subjects::identity(["note.*", "shop.line.>"]).unwrap(), "note.written", &["note.*", "shop.line.>"]),
        (custom().unwrap(), "v1.note-written", &["old.note.*", "v1.>"]),
        (Subjects::new().partitions(sixteen), "storied.events.{p}.note.written", &["storied.events.*.>"]),
        (Subjects::prefix("a").unwrap().partitions(sixteen), "a.{p}.note.written", &["a.*.>"]),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_mapping_from_publisher_to_feed_and_subscribers() {
    for (subjects, subject, all) in mappings() {
        for kind in NATS {
            let server = NatsServer::start(support::NatsOptions::jetstream()).await;
            let bus = options(kind, &server).subjects(subjects.clone()).bus();
            let p = Partition::of(&StreamId::new("note", 7).unwrap(), 16).index().to_string();
            let subject = subject.replace("{p}", &p);
            let raw = async_nats::connect(server.url()).await.unwrap();
            let mut foreign = raw.subscribe(subject.clone()).await.unwrap();
            raw.flush().await.unwrap();

            let mut press = Press::new(&bus).await;
            let mut feed = subscribe(&bus, &press.store).await;
            let ways = [("*", 200), ("note.*", 100), ("note.torn", 50), ("shop.line.added", 100)];
            let mut subscribers = Vec::new();
            for (names, count) in ways {
                subscribers.push((listen(&bus, &[names], SubscribeOptions::new()).await, names, count));
            }
            let mut printed = Vec::new();
            for n in 0..50 {
                printed
                    .extend(press.events(7, &[Note::Torn, Note::Written { n, text: String::new() }]).await);
                printed.extend(press.events(8, &[Line::Added { n }, Line::Added { n }]).await);
            }
            let head = printed.last().unwrap().position;
            wakes(&mut feed, head).await;
            for (subscriber, names, count) in &mut subscribers {
                let taken = take(subscriber, *count).await;
                let prefix = names.trim_end_matches('*');
                let expected: Vec<_> =
                    printed.iter().filter(|event| event.name.as_str().starts_with(prefix)).cloned().collect();
                same(&taken, &expected);
            }
            let message = timeout(PATIENCE, foreign.next()).await.unwrap().unwrap();
            assert_eq!(message.subject.as_str(), subject);
            if kind == Kind::JetStream {
                let jetstream = async_nats::jetstream::new(raw);
                let mut stream = jetstream.get_stream("STORIED_EVENTS").await.unwrap();
                let mut subjects = stream.info().await.unwrap().config.subjects.clone();
                subjects.sort_unstable();
                assert_eq!(subjects, all);
                // The publisher finds the end of the log stream again.
                let mut publisher = publisher(&bus, &press.store).await;
                assert!(matches!(
                    publisher.resume(storied::bus::LogStreamEnd::default()).await.unwrap(),
                    storied::bus::Resume::After(end) if end.position == head
                ));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_follow_over_a_mapping() {
    for (subjects, ..) in mappings() {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let store = store();
        let start = async || {
            let bus = options(Kind::JetStream, &server).subjects(subjects.clone()).bus();
            Recording::start(&store, bus, blind()).await
        };
        let (one, two) = (start().await, start().await);
        write(&store, 0, 500).await;
        one.reaches("one", &store).await;
        two.reaches("two", &store).await;
        one.node.stop(PATIENCE).await.unwrap();
        two.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_uncovered_event_is_refused_and_reported() {
    for kind in NATS {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let bus = options(kind, &server).subjects(Subjects::identity(["shop.>"]).unwrap()).bus();
        let store = store();
        write(&store, 0, 1).await;
        let mut publisher = publisher(&bus, &store).await;
        let batch = batches(&store, Position::START, 1).await.remove(0);
        let error = publisher.publish(batch).await.unwrap_err();
        assert!(
            matches!(&error, BusError::Incompatible { reason } if reason.contains("note.written")),
            "{error}"
        );
        // Heartbeats would be events of the log stream.
        let bus = options(kind, &server).subjects(Subjects::identity(["storied.*"]).unwrap()).bus();
        let error = bus.connect().await.unwrap_err();
        assert!(
            matches!(&error, BusError::Incompatible { reason } if reason.contains("storied.head")),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_partition_is_filtered_by_the_server() {
    // As a program without storied would do it.
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let partitions = NonZeroU16::new(4).unwrap();
    let bus = options(Kind::JetStream, &server).subjects(Subjects::new().partitions(partitions)).bus();
    let mut press = Press::new(&bus).await;
    for stream in 0..100 {
        press.events(stream, &[Note::Torn]).await;
    }
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let mut seen = 0;
    for partition in 0..4 {
        let stream = jetstream.get_stream("STORIED_EVENTS").await.unwrap();
        let filter_subject = format!("storied.events.{partition}.>");
        let config = async_nats::jetstream::consumer::pull::Config { filter_subject, ..Default::default() };
        let consumer = stream.create_consumer(config).await.unwrap();
        let mut messages = consumer.fetch().max_messages(200).messages().await.unwrap();
        while let Some(message) = messages.next().await {
            let message = message.unwrap();
            let stream = message.headers.as_ref().unwrap().get("Storied-Stream").unwrap().as_str();
            let (category, id) = stream.split_once('/').unwrap();
            assert_eq!(Partition::of(&StreamId::new(category, id).unwrap(), 4).index(), partition);
            seen += 1;
        }
    }
    assert_eq!(seen, 100);
    let durable = SubscribeOptions::new().consumer(ConsumerOptions::durable("x"));
    assert_eq!(take(&mut listen(&bus, &["note.torn"], durable).await, 100).await.len(), 100);
}
