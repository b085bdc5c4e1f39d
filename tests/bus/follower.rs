//! What projections follow durably, by itself: whatever was lost on the way, nothing comes behind a hole that was not told of.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::{Info, PullConsumer, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt;
use storied::bus::{DurableItem, DurableSubscription, Follow, NatsBus, NatsOptions};
use storied::{EventBus, EventStore, Filter, Position, ReadLog, RecordedEvent};
use tokio::time::{Instant, timeout};

use crate::harness::{self, NatsServer};
use crate::link::Link;
use crate::raw::Press;
use crate::support::*;

/// How many events a follower may have without having applied them. Twice as many items wait for it.
const ROOM: u64 = 512;

/// Reads as a projection does: takes what comes next for the next, and the store's word behind a gap.
struct Follower {
    subscription: Box<dyn DurableSubscription>,
    store: Arc<dyn EventStore>,
    filter: Filter,
    /// Everything up to here was given, or is known from the store.
    upto: Position,
    /// Why the store was read.
    gaps: Vec<String>,
}

impl Follower {
    fn start(bus: &NatsBus, store: &Arc<dyn EventStore>) -> Self {
        Self::of(bus, store, Filter::all())
    }

    fn of(bus: &NatsBus, store: &Arc<dyn EventStore>, filter: Filter) -> Self {
        let names = filter.wanted_names().map(|names| names.iter().cloned().collect());
        let follow = Follow { name: "x".into(), store: store.info().id, names, categories: None };
        let subscription = bus.follow(follow).unwrap();
        Self { subscription, store: store.clone(), filter, upto: Position::START, gaps: Vec::new() }
    }

    /// Takes the next item; the position, if it was an event.
    async fn take(&mut self) -> Option<Position> {
        match timeout(PATIENCE, self.subscription.next()).await.unwrap().unwrap() {
            DurableItem::Wake(at) => {
                if at > self.upto {
                    let between = ReadLog::after(self.upto).upto(at).filter(self.filter.clone());
                    let between = self.store.read_log(between).await.unwrap().events;
                    let position = between.first().map(|first| first.position);
                    assert_eq!(position, Some(at), "not told of, behind {:?}", self.gaps);
                    self.upto = at;
                }
                Some(at)
            }
            DurableItem::Gap(why) => {
                self.gaps.push(why);
                self.upto = self.store.frontier().await.unwrap();
                None
            }
            other => panic!("{other:?}"),
        }
    }

    /// Takes what comes up to that event.
    async fn reaches(&mut self, position: Position) {
        while self.take().await != Some(position) {}
    }

    /// Takes the next item, which is a gap.
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

/// Waits until the follower's consumer is so.
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

/// What it has not asked for is gone when it asks again, and its deliveries are numbered as if that had never been.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_was_full_is_told_of_what_was_removed() {
    for purged in [true, false] {
        let server = NatsServer::start(harness::NatsOptions::jetstream()).await;
        let bus = options(Kind::JetStream, &server).bus();
        let mut press = Press::new(&bus).await;
        let stream = stream(&server).await;
        let mut follower = Follower::start(&bus, &press.store);
        follower.gap().await;
        consumer(&stream, "it listens", |info| info.num_waiting > 0).await;
        let full = last(&press.written(ROOM).await);
        follower.reaches(full).await;
        press.written(10).await;
        consumer(&stream, "it is full", |info| info.num_pending == 10).await;
        if purged {
            stream.purge().await.unwrap();
        } else {
            stream.delete_message(ROOM + 5).await.unwrap();
        }
        follower.subscription.applied(full);
        // From now on it listens again.
        consumer(&stream, "it listens", |info| info.num_waiting > 0).await;
        follower.reaches(last(&press.written(1).await)).await;
        assert!(follower.gaps.iter().any(|why| why.contains("has lost messages")), "{:?}", follower.gaps);
    }
}

/// Whatever is on its way then: the server delivers what is left as if nothing else had ever been.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_purged_at_any_moment_is_told_of() {
    let server = NatsServer::start(harness::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let mut press = Press::new(&bus).await;
    let stream = stream(&server).await;
    let mut follower = Follower::start(&bus, &press.store);
    follower.gap().await;
    consumer(&stream, "it listens", |info| info.num_waiting > 0).await;
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

/// The server picks out what is asked for: what was passed over is only what was not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_asked_for_is_no_gap() {
    let server = NatsServer::start(harness::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let mut press = Press::new(&bus).await;
    let stream = stream(&server).await;
    let torn = Filter::variants::<Note>(&["torn"]).unwrap();
    let mut follower = Follower::of(&bus, &press.store, torn);
    follower.gap().await;
    consumer(&stream, "it listens", |info| info.num_waiting > 0).await;
    for _ in 0..20 {
        press.written(5).await;
        let torn = press.events(1, &[Note::Torn]).await;
        follower.reaches(last(&torn)).await;
    }
    assert_eq!(follower.gaps, ["the follower starts"]);
}

/// It catches up from the store, so that there is room on the server's side, and takes none of the items, until no more can wait for
/// it. What is lost from then on is told of when it reads, and so is a connection that was lost meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_does_not_read_is_told_of_what_it_lost() {
    for (cut, why) in [(false, "the follower was too slow"), (true, "the follower starts")] {
        let server = NatsServer::start(harness::NatsOptions::jetstream()).await;
        let mut press = Press::new(&options(Kind::JetStream, &server).bus()).await;
        let stream = stream(&server).await;
        let link = Link::to(&server).await;
        let linked = quick(NatsOptions::jetstream(mirror()).url(link.url())).bus();
        let mut follower = Follower::start(&linked, &press.store);
        follower.gap().await;
        consumer(&stream, "it listens", |info| info.num_waiting > 0).await;
        let mut settled = 0;
        while settled <= 2 * ROOM {
            // Never so many that it would ask for no more.
            settled += ROOM - 12;
            follower.upto = last(&press.written(ROOM - 12).await);
            follower.subscription.applied(follower.upto);
            consumer(&stream, "all is settled", |info| info.ack_floor.consumer_sequence == settled).await;
        }
        press.written(10).await;
        consumer(&stream, "all is delivered", |info| info.num_ack_pending == 10).await;
        pause(300).await;
        if cut {
            link.cut();
            consumer(&stream, "it is gone", |info| info.num_waiting == 0).await;
            link.mend();
            consumer(&stream, "it is back", |info| info.num_waiting > 0).await;
        }
        // Everything that waits.
        while timeout(Duration::from_millis(300), follower.take()).await.is_ok() {}
        follower.reaches(last(&press.written(1).await)).await;
        assert_eq!(follower.gaps.last().map(String::as_str), Some(why));
    }
}

/// Another reader asks for one message, and has it as soon as there is one.
async fn thief(consumer: &PullConsumer) -> pull::Batch {
    consumer.fetch().max_messages(1).expires(PATIENCE).messages().await.unwrap()
}

/// The number of the first delivery says whether others had any since the store was read: of those that were delivered by then, under
/// this connection or an earlier one, the next one follows, and a consumer that was made anew counts from the beginning.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_reader_had_before_the_first_delivery_is_told_of() {
    for (before, anew) in [(0, false), (3, false), (1, true)] {
        let what = format!("{before} before, made anew: {anew}");
        let server = NatsServer::start(harness::NatsOptions::jetstream()).await;
        let mut press = Press::new(&options(Kind::JetStream, &server).bus()).await;
        let stream = stream(&server).await;
        let link = Link::to(&server).await;
        let linked = quick(NatsOptions::jetstream(mirror()).url(link.url())).bus();
        let mut follower = Follower::start(&linked, &press.store);
        follower.gap().await;
        consumer(&stream, "it listens", |info| info.num_waiting > 0).await;
        for _ in 0..before {
            let at = last(&press.written(1).await);
            follower.reaches(at).await;
            follower.subscription.applied(at);
        }
        let settled = |info: &Info| info.ack_floor.consumer_sequence == before && info.num_ack_pending == 0;
        consumer(&stream, "all is settled", settled).await;
        link.cut();
        let mut away = consumer(&stream, "it is gone", |info| info.num_waiting == 0).await;
        if anew {
            let config = away.cached_info().config.clone();
            stream.delete_consumer("x").await.unwrap();
            stream.create_consumer(config).await.unwrap();
            away = consumer(&stream, "it is made anew", |info| info.delivered.consumer_sequence == 0).await;
        }
        let mut thief = thief(&away).await;
        consumer(&stream, "the other one listens", |info| info.num_waiting == 1).await;
        link.mend();
        follower.gap().await;
        consumer(&stream, "both listen", |info| info.num_waiting == 2).await;
        let stolen = press.written(1).await;
        let had = timeout(PATIENCE, thief.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(had.info().unwrap().consumer_sequence, if anew { 1 } else { before + 1 });
        follower.reaches(last(&press.written(1).await)).await;
        assert!(follower.upto > last(&stolen));
        assert_eq!(follower.gaps.len(), 3, "{what}: {:?}", follower.gaps);
    }
}
