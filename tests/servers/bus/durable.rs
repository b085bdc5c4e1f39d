//! Projections that follow their own durable consumer.

use std::future::ready;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use storied::projection::{ApplyError, AtLeastOnce, Delivery, FollowMode};
use storied::runtime::StartError;
use storied::testing::Node;
use storied::{
    EventStore, Filter, MemoryStore, Metadata, NatsBus, NewEvent, Position, Projection, ProjectionHandle,
    ProjectionOptions, RecordedEvent, Runtime,
};

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

/// A projection of the rare torn notes.
struct Torn(Arc<Mutex<Vec<Position>>>);

impl Projection for Torn {
    const NAME: &'static str = "torn";
    type Event = Note;
    type Transaction = Delivery;

    fn filter(&self) -> Filter {
        Filter::variants::<Note>(["torn"])
    }

    async fn apply(&mut self, _: Note, recorded: &RecordedEvent, _: &mut Delivery) -> Result<(), ApplyError> {
        self.0.lock().unwrap().push(recorded.position);
        Ok(())
    }
}

fn durable() -> ProjectionOptions {
    ProjectionOptions::new().follow(FollowMode::Durable).lease(Duration::from_secs(1))
}

struct Following {
    node: Node,
    handle: ProjectionHandle,
    seen: Arc<Mutex<Vec<Position>>>,
}

impl Following {
    async fn start(store: &Arc<dyn EventStore>, server: &NatsServer) -> Self {
        let bus = Arc::new(options(Kind::JetStream, server).bus());
        let node = Node::start(store.clone(), Some(bus), blind(), publishing()).await;
        let seen = Arc::default();
        let handle = node.projection(Torn(Arc::clone(&seen)), AtLeastOnce::new(), durable()).await;
        Self { node, handle, seen }
    }

    fn seen(&self) -> Vec<Position> {
        self.seen.lock().unwrap().clone()
    }

    async fn reaches(&self, position: Position) {
        self.handle.caught_up_to_within(position, PATIENCE).await.unwrap();
    }
}

/// Appends many notes and one torn note; returns the position of the latter.
async fn tear(store: &Arc<dyn EventStore>, n: u64) -> Position {
    write(store, n % 5, 10).await;
    let torn = NewEvent::encode(&Note::Torn, store.info().codec, &Metadata::default()).unwrap();
    append(store, n % 3, vec![torn]).await
}

async fn torn(store: &Arc<dyn EventStore>) -> Vec<Position> {
    let events = events(store, Position::START).await;
    let torn = events.iter().filter(|event| event.name.as_str() == "note.torn");
    torn.map(|event| event.position).collect()
}

type Consumer = async_nats::jetstream::consumer::PullConsumer;

/// Waits for the projection's consumer on the server.
async fn consumer(server: &NatsServer) -> (async_nats::jetstream::stream::Stream, Consumer) {
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Ok(stream) = context.get_stream("STORIED_EVENTS").await
            && let Ok(consumer) = stream.get_consumer("projection=2Ftorn").await
        {
            return (stream, consumer);
        }
        assert!(tokio::time::Instant::now() < give_up, "there is no consumer");
        pause(10).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_filters_events_and_keeps_them_until_applied() {
    let (store, server) = (store(), NatsServer::start(support::NatsOptions::jetstream()).await);
    let before = tear(&store, 0).await;
    let one = Following::start(&store, &server).await;
    one.reaches(before).await;
    let (_, mut consumer) = consumer(&server).await;
    let mut last = before;
    for n in 0..20 {
        last = tear(&store, n).await;
        pause(10).await;
    }
    one.reaches(last).await;
    assert_eq!(one.seen(), torn(&store).await);
    let config = &consumer.cached_info().config;
    assert_eq!((&*config.filter_subject, config.durable_name.is_some()), ("storied.events.note.torn", true));
    // The server delivered the events, and knows that they are applied.
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        let info = consumer.info().await.unwrap();
        if info.ack_floor.consumer_sequence >= 15 && info.num_ack_pending == 0 {
            break;
        }
        assert!(tokio::time::Instant::now() < give_up, "{info:?}");
        pause(20).await;
    }
    // Without matching events, the projection still reaches the head.
    let head = write(&store, 9, 100).await;
    one.reaches(head).await;

    // Another node continues there.
    one.node.stop(PATIENCE).await.unwrap();
    let missed = tear(&store, 1).await;
    let two = Following::start(&store, &server).await;
    two.reaches(missed).await;
    let last = tear(&store, 2).await;
    two.reaches(last).await;
    assert_eq!(two.seen(), [missed, last]);
    two.node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_lost_on_the_server_are_read_from_the_store() {
    let (store, mut server) = (store(), NatsServer::start(support::NatsOptions::jetstream()).await);
    let one = Following::start(&store, &server).await;
    let (mut last, mut stolen) = (tear(&store, 0).await, 0);
    for round in 0..8 {
        let (stream, _) = consumer(&server).await;
        for n in 0..10 {
            last = tear(&store, n).await;
            pause(5).await;
            if n == 5 {
                match round % 4 {
                    0 => _ = stream.delete_consumer("projection=2Ftorn").await.unwrap(),
                    1 => {
                        server.kill();
                        pause(100).await;
                        server.restart().await;
                    }
                    2 => {
                        server.kill();
                        server.wipe();
                        server.restart().await;
                    }
                    // Another reader takes some of the projection's deliveries without an ack.
                    _ => {
                        let (_, consumer) = consumer(&server).await;
                        let theft = consumer.fetch().max_messages(3).expires(Duration::from_secs(2));
                        let theft = theft.messages().await.unwrap();
                        let theft = tokio::spawn(theft.filter(|message| ready(message.is_ok())).count());
                        for n in 0..6 {
                            last = tear(&store, n).await;
                            pause(5).await;
                        }
                        stolen += theft.await.unwrap();
                    }
                }
            }
        }
        one.reaches(last).await;
    }
    consumer(&server).await;
    assert!(stolen > 0, "nothing was taken");
    assert_eq!(one.seen(), torn(&store).await);
    one.node.stop(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn a_bus_that_keeps_nothing_cannot_be_followed_durably() {
    async fn refused(bus: Option<NatsBus>) -> StartError {
        let torn = Torn(Arc::default());
        let builder = Runtime::builder().store(MemoryStore::new());
        let builder = match bus {
            Some(bus) => builder.bus(bus),
            None => builder,
        };
        builder.projection_with(torn, AtLeastOnce::new(), durable()).start().await.unwrap_err()
    }
    let core = NatsBus::core("nats://127.0.0.1:1");
    for (error, name) in [(refused(None).await, None), (refused(Some(core)).await, Some("nats-core"))] {
        let expected = matches!(&error, StartError::NotDurable { bus, .. } if *bus == name);
        assert!(expected, "{error}");
        assert!(error.to_string().contains("JetStream"), "{error}");
    }
}
