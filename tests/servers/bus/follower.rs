//! The durable follower alone: after every loss it gets a gap before the next item.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::{Info, PullConsumer, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt;
use storied::bus::{DurableItem, DurableSubscription, Follow, NatsBus, NatsOptions};
use storied::{EventBus, EventStore, Filter, Position, ReadLog, RecordedEvent};
use tokio::time::{Instant, timeout};

use crate::bus::fixtures::*;
use crate::bus::link::Link;
use crate::bus::raw::Press;
use crate::support::{self, NatsServer};

/// Maximum number of unapplied events of a follower. Twice as many items are buffered.
const ROOM: u64 = 512;

/// A reader like a projection: takes each item as the next event, and reads the store after a gap.
struct Follower {
    subscription: Box<dyn DurableSubscription>,
    store: Arc<dyn EventStore>,
    filter: Filter,
    /// Position up to which every event was delivered or is known from the store.
    upto: Position,
    /// Reasons of the gaps.
    gaps: Vec<String>,
}

impl Follower {
    fn start(bus: &NatsBus, store: &Arc<dyn EventStore>) -> Self {
        Self::of(bus, store, Filter::all())
    }

    fn of(bus: &NatsBus, store: &Arc<dyn EventStore>, filter: Filter) -> Self {
        let names = filter.names().map(|names| names.iter().cloned().collect());
        let follow = Follow { name: "x".into(), store: store.info().id, names, categories: None };
        let subscription = bus.follow(follow).unwrap();
        Self { subscription, store: store.clone(), filter, upto: Position::START, gaps: Vec::new() }
    }

    /// Takes the next item; returns the position if it was an event.
    async fn take(&mut self) -> Option<Position> {
        match timeout(PATIENCE, self.subscription.next()).await.unwrap().unwrap() {
            DurableItem::Wake(at) => {
                if at > self.upto {
                    let between = ReadLog::after(self.upto).upto(at).filter(self.filter.clone());
                    let between = self.store.read_log(between).await.unwrap().events;
                    let position = between.first().map(|first| first.position);
                    assert_eq!(position, Some(at), "no gap was reported after {:?}", self.gaps);
                    self.upto = at;
                }
                Some(at)
            }
            DurableItem::Gap(why) => {
                self.gaps.push(why);
                self.upto = self.store.high_water_mark().await.unwrap();
                None
            }
            other => panic!("{other:?}"),
        }
    }

    /// Takes items up to that event.
    async fn reaches(&mut self, position: Position) {
        while self.take().await != Some(position) {}
    }

    /// Takes the next item, which must be a gap.
    async fn gap(&mut self) {
        assert_eq!(self.take().await, None);
    }
}

fn last(events: &[RecordedEvent]) -> Position {
    events.last().unwrap().position
}

async fn stream(server: &NatsServer) -> Stream {
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    context.get_stream("STORIED_EVENTS").await.unwrap()
}

/// Waits until the follower's consumer meets the condition.
async fn consumer(stream: &Stream, what: &str, is_so: impl Fn(&Info) -> bool) -> PullConsumer {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let found = stream.get_consumer::<pull::Config>("x").await;
        if let Ok(consumer) = &found
            && is_so(consumer.cached_info())
        {
            return found.unwrap();
        }
        assert!(Instant::now() < give_up, "never: {what}: {found:?}");
        pause(10).await;
    }
}

/// Unrequested messages are removed before the next request.
/// The consumer sequence numbers of the deliveries show no gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_follower_gets_a_gap_for_removed_messages() {
    for purged in [true, false] {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let bus = options(Kind::JetStream, &server).bus();
        let mut press = Press::new(&bus).await;
        let stream = stream(&server).await;
        let mut follower = Follower::start(&bus, &press.store);
        follower.gap().await;
        consumer(&stream, "the follower requests", |info| info.num_waiting > 0).await;
        let full = last(&press.written(ROOM).await);
        follower.reaches(full).await;
        press.written(10).await;
        consumer(&stream, "the follower is full", |info| info.num_pending == 10).await;
        if purged {
            stream.purge().await.unwrap();
        } else {
            stream.delete_message(ROOM + 5).await.unwrap();
        }
        follower.subscription.applied(full);
        // From now on it requests again.
        consumer(&stream, "the follower requests", |info| info.num_waiting > 0).await;
        follower.reaches(last(&press.written(1).await)).await;
        assert!(follower.gaps.iter().any(|why| why.contains("has lost messages")), "{:?}", follower.gaps);
    }
}

/// With any messages in flight: the server delivers the rest without a missing number.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_at_any_moment_is_a_gap() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let mut press = Press::new(&bus).await;
    let stream = stream(&server).await;
    let mut follower = Follower::start(&bus, &press.store);
    follower.gap().await;
    consumer(&stream, "the follower requests", |info| info.num_waiting > 0).await;
    let writer = tokio::spawn(async move {
        loop {
            press.written(300).await;
        }
    });
    let purger = tokio::spawn(async move {
        loop {
            pause(3).await;
            stream.purge().await.unwrap();
        }
    });
    let reading = async {
        while follower.gaps.len() < 6 {
            if let Some(at) = follower.take().await {
                follower.subscription.applied(at);
            }
        }
    };
    timeout(PATIENCE, reading).await.expect("something is purged before it is read");
    writer.abort();
    purger.abort();
}

/// The server filters: only filtered messages were skipped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filtered_events_are_no_gap() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let mut press = Press::new(&bus).await;
    let stream = stream(&server).await;
    let torn = Filter::variants::<Note>(["torn"]);
    let mut follower = Follower::of(&bus, &press.store, torn);
    follower.gap().await;
    consumer(&stream, "the follower requests", |info| info.num_waiting > 0).await;
    for _ in 0..20 {
        press.written(5).await;
        let torn = press.events(1, &[Note::Torn]).await;
        follower.reaches(last(&torn)).await;
    }
    assert_eq!(follower.gaps, ["the follower starts"]);
}

/// The follower catches up from the store, which frees the server's side.
/// It then takes no items until its buffer is full. Its next read gets a gap for later losses, and
/// for a connection that was lost meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_follower_gets_a_gap_for_lost_events() {
    for (cut, why) in [(false, "the follower was too slow"), (true, "the follower starts")] {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let mut press = Press::new(&options(Kind::JetStream, &server).bus()).await;
        let stream = stream(&server).await;
        let link = Link::to(&server).await;
        let linked = quick(NatsOptions::jetstream(log_stream()).url(link.url())).bus();
        let mut follower = Follower::start(&linked, &press.store);
        follower.gap().await;
        consumer(&stream, "the follower requests", |info| info.num_waiting > 0).await;
        let mut settled = 0;
        while settled <= 2 * ROOM {
            // Never so many that it stops requesting.
            settled += ROOM - 12;
            follower.upto = last(&press.written(ROOM - 12).await);
            follower.subscription.applied(follower.upto);
            consumer(&stream, "all is acknowledged", |info| info.ack_floor.consumer_sequence == settled)
                .await;
        }
        press.written(10).await;
        consumer(&stream, "all is delivered", |info| info.num_ack_pending == 10).await;
        pause(300).await;
        if cut {
            link.cut();
            consumer(&stream, "the follower is disconnected", |info| info.num_waiting == 0).await;
            link.mend();
            consumer(&stream, "the follower requests again", |info| info.num_waiting > 0).await;
        }
        // Take every buffered item.
        while timeout(Duration::from_millis(300), follower.take()).await.is_ok() {}
        follower.reaches(last(&press.written(1).await)).await;
        assert_eq!(follower.gaps.last().map(String::as_str), Some(why));
    }
}

/// Another reader, which requests one message and gets it as soon as it exists.
async fn thief(consumer: &PullConsumer) -> pull::Batch {
    consumer.fetch().max_messages(1).expires(PATIENCE).messages().await.unwrap()
}

/// The first consumer sequence number shows whether other readers had deliveries since the read.
/// It follows the last delivery of this or an earlier connection. A recreated consumer starts at 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deliveries_to_another_reader_before_the_first_are_a_gap() {
    for (before, anew) in [(0, false), (3, false), (1, true)] {
        let what = format!("{before} before, recreated: {anew}");
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let mut press = Press::new(&options(Kind::JetStream, &server).bus()).await;
        let stream = stream(&server).await;
        let link = Link::to(&server).await;
        let linked = quick(NatsOptions::jetstream(log_stream()).url(link.url())).bus();
        let mut follower = Follower::start(&linked, &press.store);
        follower.gap().await;
        consumer(&stream, "the follower requests", |info| info.num_waiting > 0).await;
        for _ in 0..before {
            let at = last(&press.written(1).await);
            follower.reaches(at).await;
            follower.subscription.applied(at);
        }
        let settled = |info: &Info| info.ack_floor.consumer_sequence == before && info.num_ack_pending == 0;
        consumer(&stream, "all is acknowledged", settled).await;
        link.cut();
        let mut away = consumer(&stream, "the follower is disconnected", |info| info.num_waiting == 0).await;
        if anew {
            let config = away.cached_info().config.clone();
            stream.delete_consumer("x").await.unwrap();
            stream.create_consumer(config).await.unwrap();
            away =
                consumer(&stream, "the consumer is recreated", |info| info.delivered.consumer_sequence == 0)
                    .await;
        }
        let mut thief = thief(&away).await;
        consumer(&stream, "the other reader requests", |info| info.num_waiting == 1).await;
        link.mend();
        follower.gap().await;
        consumer(&stream, "both request", |info| info.num_waiting == 2).await;
        let stolen = press.written(1).await;
        let had = timeout(PATIENCE, thief.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(had.info().unwrap().consumer_sequence, if anew { 1 } else { before + 1 });
        follower.reaches(last(&press.written(1).await)).await;
        assert!(follower.upto > last(&stolen));
        assert_eq!(follower.gaps.len(), 3, "{what}: {:?}", follower.gaps);
    }
}
